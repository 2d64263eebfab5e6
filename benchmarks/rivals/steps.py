"""edgeprune's own steps, each on top of the one before, through the package's public functions."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

from edgeprune.calibration import TextSet, read_texts
from edgeprune.compensated import Origin, prune_compensated
from edgeprune.layerwise import Compensation
from edgeprune.models import load
from edgeprune.plan import LayerPlan
from edgeprune.pruning import ENERGY, METHODS, cached_scores, plan_for, windows_of
from edgeprune.pruning import prune as prune_with
from edgeprune.recipe import RECIPES, Method
from edgeprune.recovery import recover
from edgeprune.shape import LayerShape
from edgeprune.surgery import prune_checkpoint
from rivals import ALIGN, amp

TEXTS = ("c4/c4.txt", "wikipedia/wikipedia.txt")
MORE = "c4/c4_demo.jsonl"  # other documents of C4


def energy(folder: Path, ratio: float, calibration: TextSet, out: Path) -> Path:
    """AMP's widths, with heads and neurons by activation energy, tokens weighed; weights as they were."""
    model = load(folder)
    plan = plan_for(model.shape, cached_scores(model, calibration, ENERGY), ratio, align=ALIGN)
    return prune_checkpoint(folder, plan, out)


def amp_solved(folder: Path, ratio: float, calibration: TextSet, out: Path) -> Path:
    """AMP's heads and neurons, with the weights that stay solved by least squares."""
    return _amp(folder, ratio, calibration, out, _how(calibration), keep=True)


def amp_unweighted(folder: Path, ratio: float, calibration: TextSet, out: Path) -> Path:
    """The same, every token counting alike."""
    how = replace(_how(calibration), weighted=False)
    return _amp(folder, ratio, calibration, out, how, keep=True)


def amp_chosen(folder: Path, ratio: float, calibration: TextSet, out: Path) -> Path:
    """AMP's widths, with heads and neurons chosen by backward elimination and weights by least squares."""
    return _amp(folder, ratio, calibration, out, _how(calibration), keep=False)


def _how(calibration: TextSet) -> Compensation:
    return Compensation.for_tokens(calibration.tokens)


def _amp(folder: Path, ratio: float, calibration: TextSet, out: Path, how: Compensation, *, keep: bool) -> Path:
    model = load(folder)
    scores = METHODS["amp"](cached_scores(model, calibration), 0)
    plan = plan_for(model.shape, scores, ratio, align=ALIGN)
    choices: list[LayerShape | LayerPlan] = [layer if keep else layer.widths for layer in plan.layers]
    origin = Origin("amp", ratio, model.hash, calibration.hash)
    prune_compensated(model.folder, windows_of(calibration), choices, how, out, origin=origin)
    return out


def uniform(folder: Path, ratio: float, calibration: TextSet, out: Path) -> Path:
    """One width for all layers, by the damage table."""
    return _ours(folder, ratio, calibration, out, uniform=True)


def per_layer(folder: Path, ratio: float, calibration: TextSet, out: Path) -> Path:
    """Widths of each layer's own, by the damage table."""
    return _ours(folder, ratio, calibration, out)


def vocabulary(folder: Path, ratio: float, calibration: TextSet, out: Path) -> Path:
    """The vocabulary too, counted on what is left of the texts that calibration is taken from."""
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus.txt"
        corpus.write_text("\n\n".join(rest_of_texts(calibration)), encoding="utf-8")
        return _ours(folder, ratio, calibration, out, corpus=[corpus])


def _ours(folder: Path, ratio: float, calibration: TextSet, out: Path, **options: Any) -> Path:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "calibration.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in calibration.texts), encoding="utf-8")
        prune_with(folder, ratio, out, align=ALIGN, calibration=str(path), **options)
    return out


def rest_of_texts(calibration: TextSet) -> Sequence[str]:
    """What follows the calibration text in the files that it begins."""
    data = Path(os.environ["EDGEPRUNE_DATA"])
    rest = []
    for name in TEXTS:
        whole = (data / name).read_text(encoding="utf-8")
        used = max((whole.find(text[-80:]) + 80 for text in calibration.texts if text[-80:] in whole), default=0)
        rest.append(whole[used:])
    return rest


def all_texts(data: Path) -> list[str]:
    """Everything there is of the two sources, for training: what is seen twice is learnt by heart."""
    names = [*TEXTS, MORE] if (data / MORE).exists() else TEXTS
    return [text for name in names for text in read_texts(data / name)]


def recovered(method: Method, before: Any, *, minutes: float = 0.0, steps: int | None = None) -> Any:
    """A row that prunes as `before` and then trains, for so many minutes or steps of 1,024 tokens (LoRA: 8,192).

    Where that row's own folder was kept (`pruning.py --keep`), it is trained instead of another.
    """

    def prune(folder: Path, ratio: float, calibration: TextSet, out: Path) -> Path:
        with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
            pruned = out.parent.parent / f"{before.__name__}-{ratio:g}" / "folder"
            if not (pruned / "config.json").exists():
                pruned = Path(scratch) / "pruned"
                before(folder, ratio, calibration, pruned)
            texts = all_texts(Path(os.environ["EDGEPRUNE_DATA"]))
            seconds = 60 * minutes if steps is None else inf
            recipe = None if steps is None else replace(RECIPES[method], max_steps=steps)
            recover(pruned, folder, out, seconds=seconds, text=texts, method=method, recipe=recipe)
        return out

    return prune


RECOVER, PAPER = "edgeprune recover", "the paper's recipe, on the same text"
ROWS = {
    "energy": (energy, "activation energy", "widths AMP's; tokens weighed by 1/RMS²; nothing compensated"),
    "amp-unweighted": (amp_unweighted, "AMP + least squares, tokens alike", "heads and neurons AMP's"),
    "amp-solved": (amp_solved, "AMP + least squares", "heads and neurons AMP's; tokens weighed by 1/RMS²"),
    "amp-chosen": (amp_chosen, "AMP's widths, elimination, least squares", "widths AMP's"),
    "uniform": (uniform, "ours, one width for all layers", "edgeprune --uniform"),
    "per-layer": (per_layer, "ours", "edgeprune"),
    "vocabulary": (vocabulary, "ours, vocabulary too", "edgeprune --corpus"),
}

# The rows by minutes belong to a machine of 2 cores that multiply bf16: 60 of them were 1,820 steps at a fifth pruned
# (518 tokens/s, the teacher included) and 2,026 at 30 %; LoRA trained at 484 tokens/s. Those by steps are the same
# on any machine.
TRAINED = {
    "recover20": (recovered("distil", vocabulary, minutes=20), "ours, vocabulary too, + 20 minutes", RECOVER),
    "recover60": (recovered("distil", vocabulary, minutes=60), "ours, vocabulary too, + 60 minutes", RECOVER),
    "recover-600": (recovered("distil", vocabulary, steps=600), "ours, vocabulary too, + 0.6M tokens", RECOVER),
    "recover-1800": (recovered("distil", vocabulary, steps=1800), "ours, vocabulary too, + 1.8M tokens", RECOVER),
    "amp-lora20": (recovered("lora", amp.prune, minutes=20), "AMP + 20 minutes of LoRA", PAPER),
    "amp-lora60": (recovered("lora", amp.prune, minutes=60), "AMP + 60 minutes of LoRA", PAPER),
    "amp-lora-70": (recovered("lora", amp.prune, steps=70), "AMP + LoRA on 0.6M tokens", PAPER),
    "amp-lora-220": (recovered("lora", amp.prune, steps=220), "AMP + LoRA on 1.8M tokens", PAPER),
}
