"""Text dataset distillation: a small set of texts that calibrates, recovers or trains nearly as well as a large one.

Survey: arXiv 2512.03967. A method is one module: `select(task)` chooses among the pool's texts, `write(order)` writes
texts of its own, `make(order)` makes data that are no text. `distil` is the driver.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Literal

from edgeprune.errors import unknown


@dataclass(frozen=True)
class Method:
    """An entry of the table.

    Attributes:
        module: its module here.
        says: what it does, in a line.
        reads: columns of readings that it looks at.
        student: whether it needs the pruned model.
        kind: which of the three functions the module has.
        writes: whether what comes out is no text of the source's, whose licence it would have.
    """

    module: str
    says: str
    reads: tuple[str, ...] = ()
    student: bool = False
    kind: Literal["select", "write", "make"] = "select"
    writes: bool = False

    def load(self) -> Any:
        """The method's module."""
        return importlib.import_module(f"edgeprune.distillation.{self.module}")


METHODS: dict[str, Method] = {
    "random": Method("uniform", "every text is as likely as any other"),
    "lexical": Method("lexical", "covers the source's tokens, rare ones too"),
    "herding": Method("herding", "has the source's mean hidden state", ("means",)),
    "k-center": Method("k_center", "leaves no text of the source far away", ("means",)),
    "k-means": Method("k_means", "is what lies in the middle of the source's clusters", ("means",)),
    "distribution-matching": Method("distribution_matching", "has the source's kernel mean", ("means",)),
    "el2n": Method("el2n", "what the dense model is most wrong about", ("errors",)),
    "gradient-matching": Method("gradient_matching", "has the source's mean gradient", ("gradients",)),
    "divergence": Method("divergence", "where the pruned model differs most", ("means", "divergences"), student=True),
    "best-of": Method("best_of", "the best of a few random sets, by pruning with each", kind="write"),
    "self-generated": Method("self_generated", "the model writes it", kind="write", writes=True),
    "synthetic": Method(
        "synthetic",
        "the model writes it, matched to the source's gradient, edited",
        ("gradients",),
        kind="write",
        writes=True,
    ),
    "soft": Method("soft", "embeddings and soft labels that train one model, as safetensors", kind="make", writes=True),
}


def method_named(name: str) -> Method:
    """The entry of a name.

    Raises:
        BadInput: there is none.
    """
    if name not in METHODS:
        raise unknown("method of distillation", name, [*METHODS, "auto"])
    return METHODS[name]
