"""Writes a pruned and compensated checkpoint; a run that is interrupted goes on at the layer it had come to."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from edgeprune.blocks import LayeredModel
from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import BadInput
from edgeprune.files import atomic_file, only_writer, read_json, result_folder, write_json
from edgeprune.importance import text_hash
from edgeprune.layerwise import Compensation, PrunedLayer, Streams, prune_layers, start_streams, widths_of
from edgeprune.plan import LayerPlan, PrunePlan, keep_all
from edgeprune.precision import fast_dtype
from edgeprune.shape import LayerShape
from edgeprune.surgery import prune_checkpoint

SCHEMA_VERSION = 2
_SAVE_EVERY_S = 60.0  # hidden states are saved at most so often: they are large, and a layer is quickly done again

Progress = Callable[[int, int], None]
Choices = Sequence[LayerShape | LayerPlan]


@dataclass(frozen=True)
class Origin:
    """What a plan notes of where it came from."""

    method: str
    asked_ratio: float
    model_hash: str
    text_hash: str
    parameters: int | None = None  # of the dense model, where `source` is already smaller by its vocabulary


def prune_compensated(
    source: Path,
    ids: torch.Tensor,
    choices: Choices,
    how: Compensation,
    out: Path,
    *,
    origin: Origin,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> PrunePlan:
    """Prune the checkpoint `source` to `choices` with compensation and write it to `out`, whole or not at all.

    What is done of it lies in `out.partial` until then; the same call after an interrupt goes on there.

    Args:
        source: the dense model's folder.
        ids: calibration text, (windows, length).
        choices: for each layer the widths to leave, or just which heads and neurons.
        how: the compensation.
        origin: what the plan says of itself.
        dtype: number format of the matrix products on calibration text; default: `fast_dtype`.

    Returns:
        The plan, which is also in the folder.

    Raises:
        BadInput: a checkpoint that does not fit, another run at work on the same `out`, or a full disk.
        StageFailed: second moments that cannot be solved with.
    """
    model = LayeredModel(Checkpoint(source), dtype=dtype or fast_dtype())
    if len(choices) != len(model.shape.layers):
        raise BadInput(f"{len(choices)} widths for a model of {len(model.shape.layers)} layers")
    with only_writer(out):
        work = _Work(out.with_name(f"{out.name}.partial"), _key(model, ids, choices, how))
        shape = model.shape
        # Behind the last layer that loses something nobody reads what the streams would be.
        until = 1 + max((i for i, choice in enumerate(choices) if widths_of(choice) != shape.layers[i]), default=-1)
        done = work.finished(until)
        if len(done) < until:
            streams = work.streams(model, ids, len(done))
            saved = time.monotonic()
            pruned = prune_layers(model, streams, choices[:until], how, start=len(done))
            for index, layer in enumerate(pruned, start=len(done)):
                work.add(index, layer)
                done.append(layer.plan)
                last = index + 1 == until
                if not last and time.monotonic() - saved > _SAVE_EVERY_S:
                    work.save_streams(index + 1, streams)
                    saved = time.monotonic()
                if progress:
                    progress(index + 1, until)
        layers = (*done, *keep_all(shape).layers[until:])
        after = shape.with_layers(tuple(layer.widths for layer in layers)).parameters
        reached = 1 - after / (origin.parameters or shape.parameters)
        plan = PrunePlan(layers, origin.method, origin.asked_ratio, reached, origin.model_hash, origin.text_hash)
        prune_checkpoint(source, plan, out, replaced=work.replaced(model, until))
        shutil.rmtree(work.folder)
        return plan


def _key(model: LayeredModel, ids: torch.Tensor, choices: Choices, how: Compensation) -> str:
    described = [asdict(choice) for choice in choices]
    # Where tokens went, the model is another one than `origin` names.
    depends = [SCHEMA_VERSION, model.checkpoint.hash(), text_hash(list(ids)), described, asdict(how), str(model.dtype)]
    return hashlib.sha256(json.dumps(depends).encode()).hexdigest()


class _Work:
    """The folder of an unfinished run: plans and weights of the layers done, and hidden states to go on from."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        note = folder / "run.json"
        result_folder(folder, note.name)
        if note.exists() and read_json(note).get("key") != key:
            shutil.rmtree(folder)  # of another model, text or plan
        folder.mkdir(parents=True, exist_ok=True)
        if not note.exists():
            write_json(note, {"key": key})

    def _layer(self, index: int) -> tuple[Path, Path]:
        return self.folder / f"layer-{index:05d}.json", self.folder / f"layer-{index:05d}.safetensors"

    def _saved_streams(self) -> tuple[int, Path] | None:
        files = sorted(self.folder.glob("streams-*.safetensors"))
        return (int(files[-1].stem.partition("-")[2]), files[-1]) if files else None

    def finished(self, count: int) -> list[LayerPlan]:
        """Plans of the layers that need not be done again: those before the saved hidden states, or all."""
        plans: list[LayerPlan] = []
        while (note := self._layer(len(plans))[0]).exists():
            value: dict[str, Any] = read_json(note)["plan"]
            plans.append(LayerPlan(**{name: tuple(indices) for name, indices in value.items()}))
        if len(plans) == count:
            return plans
        saved = self._saved_streams()
        return plans[: saved[0]] if saved else []

    def streams(self, model: LayeredModel, ids: torch.Tensor, start: int) -> Streams:
        """Hidden states before layer `start`."""
        streams = start_streams(model, ids, self.folder)
        saved = self._saved_streams()
        if start and saved:
            values = load_file(saved[1])
            streams.dense.copy_(values["dense"])
            streams.pruned.copy_(values["pruned"])
        return streams

    def save_streams(self, start: int, streams: Streams) -> None:
        """Keep hidden states before layer `start`, and no earlier ones."""
        path = self.folder / f"streams-{start:05d}.safetensors"
        with atomic_file(path) as temporary:
            save_file({"dense": streams.dense, "pruned": streams.pruned}, temporary)
        for old in self.folder.glob("streams-*.safetensors"):
            if old != path:
                old.unlink()

    def add(self, index: int, layer: PrunedLayer) -> None:
        """Keep what became of a layer."""
        note, weights = self._layer(index)
        with atomic_file(weights) as temporary:
            save_file({role: tensor.contiguous() for role, tensor in layer.tensors.items()}, temporary)
        write_json(note, {"plan": asdict(layer.plan), "error": layer.error})

    def replaced(self, model: LayeredModel, until: int) -> Callable[[str], NDArray[np.float32] | None]:
        """Name of a tensor -> its new weights, read from the folder one layer at a time; of layers before `until`."""
        family = model.family
        places = {
            f"{family.in_layer(index, role)}.{kind}": (index, role if kind == "weight" else f"{role}.{kind}")
            for index in range(until)
            for role in ("output", "down")
            for kind in ("weight", "bias")
        }

        def find(name: str) -> NDArray[np.float32] | None:
            if name not in places:
                return None
            index, key = places[name]
            tensor = load_file(self._layer(index)[1]).get(key)
            return None if tensor is None else tensor.numpy()

        return find
