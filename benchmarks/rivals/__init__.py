"""Pruning methods that edgeprune is compared with, each written from its paper in one small file.

They are baselines, no part of the product; `steps.py` has the product's own rows. A method is a function
`(folder, ratio, calibration, out) -> out`: it takes a dense Hugging Face folder, the share of all parameters to remove
(embeddings count) and the calibration texts as token ids, and writes a Hugging Face folder. A new method is one entry
in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgeprune.calibration import TextSet

Prune = Callable[[Path, float, TextSet, Path], Path]

ALIGN = 32  # neurons kept in a layer are a multiple of this: rows of Q4_0 are whole blocks of 32


@dataclass(frozen=True)
class Method:
    """A row of the comparison.

    Attributes:
        prune: what makes the folder.
        label: how the table calls it.
        source: the paper, or what the row is for.
        runtime: what runs the result: "llamacpp" its GGUF file, "pytorch" the folder, where nothing stock loads it.
        note: what the reader of the table must know of the row.
        trains: whether the row depends on the text for training too (`steps.all_texts`).
    """

    prune: Prune
    label: str
    source: str
    runtime: str = "llamacpp"
    note: str = ""
    trains: bool = False


def _methods() -> dict[str, Method]:
    from rivals import amp, flap, magnitude, shortgpt, slicegpt, steps, wanda_sp

    return {
        "random": Method(amp.random, "random", "control"),
        "magnitude": Method(magnitude.prune, "magnitude", "L2 norm of the weights of a head or neuron"),
        "reversed": Method(amp.reverse, "reversed AMP", "control: the most important go first"),
        "amp": Method(amp.prune, "AMP", "arXiv 2504.21174, as published, without its training"),
        "amp-neurons": Method(amp.neurons, "AMP, neurons alone", "arXiv 2504.21174, without its equal shares of heads"),
        "wanda-sp": Method(wanda_sp.prune, "Wanda-sp", "arXiv 2306.11695 in the structured form of arXiv 2312.11983"),
        "wanda-sp-neurons": Method(wanda_sp.neurons, "Wanda-sp, neurons alone", "the same without heads"),
        "flap": Method(
            flap.prune,
            "FLAP",
            "arXiv 2312.11983",
            note="widths of each layer's own; in GGUF architecture deci; whole groups of heads, under grouped queries",
        ),
        "slicegpt": Method(
            slicegpt.prune,
            "SliceGPT",
            "arXiv 2401.15024",
            runtime="pytorch",
            note="run in torch: no stock runtime loads it; a tied head becomes a matrix of its own, which is counted",
        ),
        "slicegpt-tied": Method(
            slicegpt.prune_tied,
            "SliceGPT, head kept tied",
            "arXiv 2401.15024, with the embedding whole and an adapter at either end",
            runtime="pytorch",
            note="run in torch: no stock runtime loads it; kinder to small tied models than the paper's form",
        ),
        "shortgpt": Method(shortgpt.prune, "ShortGPT", "arXiv 2403.03853", note="drops whole layers"),
        **{name: Method(*row) for name, row in steps.ROWS.items()},
        **{name: Method(*row, trains=True) for name, row in steps.TRAINED.items()},
    }


METHODS: dict[str, Method] = _methods()
