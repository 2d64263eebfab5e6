"""What a recovery remembers between interrupts: one safetensors file that is whole or absent, and no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgeprune.errors import BadInput
from edgeprune.files import atomic_file

_FIELDS = "state"
_RANDOM, _RANDOM_GPU = "random", "random.cuda"
_BEST = "best."


@dataclass(frozen=True)
class Held:
    """How the student does on the held-out windows, means per token, in nats."""

    kl: float
    ce: float


@dataclass
class State:
    """Where a recovery stands.

    Attributes:
        key: hash of all that the run depends on; a state of another key is not continued.
        steps: steps done, skipped ones too.
        position: windows taken from the endless shuffled sequence.
        tokens: predictions trained on.
        elapsed: seconds of the whole run.
        began: of those, seconds before the first step; None: it is still to come.
        training_s: of those, seconds in steps, the teacher's too.
        teacher_s: of those, seconds in waiting for the teacher's records.
        skipped: steps whose gradient was not finite.
        skipped_in_a_row: of those, the last ones without a good one between.
        before: held-out figures of the student as given.
        best: of the best weights so far; `best_step` is when.
        history: one entry each few steps, and one each time the held-out windows are judged.
    """

    key: str
    steps: int = 0
    position: int = 0
    tokens: int = 0
    elapsed: float = 0.0
    began: float | None = None
    training_s: float = 0.0
    teacher_s: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    before: Held | None = None
    best: Held | None = None
    best_step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def from_json(cls, text: str) -> State:
        """Read what `save` wrote; raises `ValueError`, `TypeError` or `KeyError` for anything else."""
        fields = json.loads(text)
        for name in ("before", "best"):
            fields[name] = None if fields[name] is None else Held(**fields[name])
        return cls(**fields)


def save(path: Path, state: State, tensors: Mapping[str, Tensor], best: Mapping[str, Tensor] | None) -> None:
    """Write `state`, the optimizer's tensors, torch's random state, and the best weights if they are not the present
    ones.

    Raises:
        BadInput: the disk is full.
    """
    everything = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    everything |= {_BEST + name: value.detach().cpu().contiguous() for name, value in (best or {}).items()}
    everything[_RANDOM] = torch.get_rng_state()
    if torch.cuda.is_available():  # dropout draws there
        everything[_RANDOM_GPU] = torch.cuda.get_rng_state()
    with atomic_file(path) as temporary:
        save_file(everything, temporary, metadata={_FIELDS: json.dumps(asdict(state))})


def restore(path: Path, key: str) -> tuple[State, dict[str, Tensor], dict[str, Tensor] | None] | None:
    """What `save` wrote, with torch's random state set to what it was; None if there is nothing of that key.

    Raises:
        BadInput: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            state = State.from_json((file.metadata() or {})[_FIELDS])
            if state.key != key:
                return None
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
            torch.set_rng_state(tensors.pop(_RANDOM))
            drawn = tensors.pop(_RANDOM_GPU, None)
            if drawn is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(drawn)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise BadInput(
            f"not a usable state of a recovery ({type(error).__name__})", where=path, remedy="delete it and start again"
        ) from error
    best = {name.removeprefix(_BEST): tensors.pop(name) for name in list(tensors) if name.startswith(_BEST)}
    return state, tensors, best or None
