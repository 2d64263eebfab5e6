"""The texts that a fit reads: what it calibrates with, recovers with, and judges on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.calibration import (
    TextSet,
    first_ids,
    held_out_text,
    read_texts,
    read_weighted,
    text_set,
    too_few,
    weighted_texts,
)
from edgeprune.corpus import corpus, text_path, up_to
from edgeprune.distillation.distil import distil
from edgeprune.errors import BadInput
from edgeprune.files import sha256
from edgeprune.making import RecoveryText
from edgeprune.models import Model
from edgeprune.pruning import CALIBRATION_LENGTH, CALIBRATION_TEXTS, GIVEN_TEXTS
from edgeprune.search import METHOD as OBS

if TYPE_CHECKING:
    from edgeprune.fitting import FitOptions

# 16 windows tell apart what differs by a few per cent in KL on the demo model; more would only take longer.
HELD_OUT_WINDOWS = 16
HELD_OUT_LENGTH = 512
# A hub dataset may be terabytes. This is some 16 million tokens, more than a day of training on two cores takes.
HUB_CHARACTERS = 1 << 26

Progress = Callable[[str, int, int], None]


def calibration_text(model: Model, settings: FitOptions, distilled: Path, progress: Progress | None) -> TextSet:
    """What the options name, or what it is distilled to in the folder `distilled`; else the model writes its own."""
    source = settings.calibration
    if settings.distill and source:
        source = str(_distilled(model.folder, None, settings, distilled / "calibration.jsonl", progress))
    texts = text_set(
        model,
        source,
        count=CALIBRATION_TEXTS if settings.calibration is None else GIVEN_TEXTS,
        length=CALIBRATION_LENGTH,
        seed=settings.seed,
        progress=None if progress is None else lambda d, t: progress("writing calibration text", d, t),
    )
    if progress and settings.method == OBS and (caution := too_few(texts, model.shape)):
        progress(caution, 0, 0)
    return texts


def recovery_text(source: Path, settings: FitOptions, distilled: Path) -> RecoveryText:
    """What recovery trains on: what the calibration text is distilled to, else the calibration text (of a hub dataset
    its first `HUB_CHARACTERS`), else what the dense model writes."""

    def give(pruned: Path, progress: Progress | None) -> list[tuple[str, float]] | None:
        name = settings.calibration
        if name is None:
            return None
        if settings.distill:
            name = str(_distilled(source, pruned, settings, distilled / "recovery.jsonl", progress))
        texts = weighted_texts(name)
        if not Path(name).expanduser().exists():
            texts = up_to(texts, HUB_CHARACTERS, lambda pair: len(pair[0]))
        return list(texts)

    return give


def check_texts(settings: FitOptions) -> None:
    """That the texts are there and can be read, before any work is done.

    Raises:
        BadInput: one cannot, or has a weight that no training can heed.
    """
    if settings.corpus:
        corpus(settings.corpus_paths)
    for name, option in ((settings.calibration, "--calibration"), (settings.held_out, "--held-out")):
        path = None if name is None else text_path(name, option)
        if path is None:
            if name is not None and option == "--held-out":
                raise BadInput(f"no file {name}", where=option, remedy="give a text or JSONL file")
            continue
        trains = settings.recovery_s and option == "--calibration"
        for _ in read_weighted(path) if trains else read_texts(path):
            pass


def recovery_key(settings: FitOptions) -> str:
    """Tells apart what recovery trains on: the text, what it is distilled to, and the seed."""
    name = settings.calibration
    path = None if name is None else Path(name).expanduser()
    text = sha256(path) if path is not None and path.is_file() else name
    return json.dumps([text, settings.distill, settings.seed])


def _distilled(model: Path, student: Path | None, settings: FitOptions, out: Path, progress: Progress | None) -> Path:
    """Distil the calibration text into `out`."""
    assert settings.calibration is not None
    tokens = settings.distill
    return distil(
        [settings.calibration], out, model=model, tokens=tokens, student=student, seed=settings.seed, progress=progress
    ).out


def held_out(model: Model, settings: FitOptions, progress: Progress | None) -> tuple[str, str]:
    """The text to judge on, and where it is from.

    Raises:
        BadInput: a text that is too short.
    """
    if settings.held_out is not None:
        text, needed = "\n\n".join(read_texts(Path(settings.held_out).expanduser())), HELD_OUT_WINDOWS * HELD_OUT_LENGTH
        if (tokens := len(first_ids(model.tokenizer, text, needed))) < needed:
            remedy = "give a longer one, or leave the option out"
            told = f"the text has {tokens:,} tokens, and {needed:,} are judged on"
            raise BadInput(told, where=f"--held-out {settings.held_out}", remedy=remedy)
        return text, settings.held_out
    own = held_out_text(
        model,
        windows=HELD_OUT_WINDOWS,
        length=HELD_OUT_LENGTH,
        seed=settings.seed,
        progress=None if progress is None else lambda d, t: progress("writing held-out text", d, t),
    )
    return "\n\n".join(own.texts), own.source
