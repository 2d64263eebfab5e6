"""`prune`: score, plan, apply. The three stages as one call; each leaves an artefact that is reused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from edgeprune.calibration import TextSet, text_set
from edgeprune.errors import BadInput, unknown
from edgeprune.files import cache_dir
from edgeprune.importance import Scores, amp_scores, random_scores, reversed_scores
from edgeprune.models import Model, load
from edgeprune.plan import SCOPES, PrunePlan, Scope, scopes_of, uniform_plan
from edgeprune.shape import ModelShape
from edgeprune.surgery import prune_checkpoint

# AMP calibrates on 50 instruction prompts; 64 texts of 256 tokens are a little more, and pack evenly.
CALIBRATION_TEXTS = 64
CALIBRATION_LENGTH = 256

Progress = Callable[[str, int, int], None]

METHODS: dict[str, Callable[[Scores, int], Scores]] = {
    "amp": lambda scores, _seed: scores,
    "random": random_scores,
    "reversed": lambda scores, _seed: reversed_scores(scores),
}


def _stage(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(name, done, total)


def cached_scores(model: Model, texts: TextSet, *, progress: Progress | None = None) -> Scores:
    """AMP scores of `model` on `texts`, computed once for each pair of model and text."""
    key = hashlib.sha256(json.dumps(["amp", model.hash, texts.hash]).encode()).hexdigest()[:24]
    folder = cache_dir() / "scores" / key
    if (folder / "scores.json").exists():
        return Scores.load(folder)
    scores = amp_scores(model, texts.ids, progress=_stage(progress, "scoring heads and neurons"))
    scores.save(folder)
    return scores


def plan_for(shape: ModelShape, scores: Scores, ratio: float, *, align: int = 1, scope: Scope = "both") -> PrunePlan:
    """The uniform plan of `scores` at `ratio`; no forward pass."""
    return uniform_plan(
        shape,
        [h.numpy() for h in scores.heads],
        [n.numpy() for n in scores.neurons],
        ratio,
        align=align,
        scope=scope,
        method=scores.method,
        model_hash=scores.model_hash,
        text_hash=scores.text_hash,
    )


def prune(
    model: str | Path | Model,
    ratio: float,
    out: str | Path,
    *,
    method: str = "amp",
    align: int = 32,
    scope: Scope = "both",
    calibration: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> PrunePlan:
    """Prune `model` by `ratio` of all its parameters and write a Hugging Face folder to `out`.

    Args:
        model: a hub id, a folder, a .gguf file, a demo name, or a loaded model.
        ratio: share of all parameters to remove, in [0, 1).
        out: the folder to write.
        method: "amp", or the controls "random" and "reversed".
        align: neurons kept in a layer are a multiple of this (32 suits Q4_0 and Q8_0, 256 the K types).
        scope: "both" removes heads and neurons in equal shares, as published; "mlp" neurons alone.
        calibration: a text file or hub dataset; None lets the model write its own.
        seed: seed of self-generated text and of the random control.
        progress: called with (stage, done, total).

    Raises:
        BadInput: anything wrong with the arguments or the model, or a full disk.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    if scope not in SCOPES:
        raise unknown("scope", scope, SCOPES)
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise BadInput("exists and is not a folder", where=out, remedy="choose another --out")
    if not isinstance(model, Model):
        model = load(model, say=None if progress is None else lambda text: progress(text, 0, 0))
    family = model.shape.family
    if scope not in scopes_of(model.shape) and progress:
        progress(
            f"family {family.name} keeps its heads (GGUF {family.gguf_arch} needs them all): neurons go alone", 0, 0
        )
    texts = text_set(
        model,
        calibration,
        count=CALIBRATION_TEXTS,
        length=CALIBRATION_LENGTH,
        seed=seed,
        progress=_stage(progress, "writing calibration text"),
    )
    scores = METHODS[method](cached_scores(model, texts, progress=progress), seed)
    plan = plan_for(model.shape, scores, ratio, align=align, scope=scope)
    prune_checkpoint(model.folder, plan, out, progress=_stage(progress, "writing the checkpoint"))
    return plan
