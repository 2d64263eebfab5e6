"""One pass over the calibration text: sums of what enters the attention output and the down projections."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from edgeprune.importance import batches, input_hooks
from edgeprune.models import Model

_TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class Inputs:
    """Sums over tokens of each input channel of one projection, (channels,), float64."""

    total: torch.Tensor
    squares: torch.Tensor
    tokens: int

    @property
    def mean(self) -> torch.Tensor:
        """(channels,)."""
        return self.total / self.tokens

    @property
    def variance(self) -> torch.Tensor:
        """(channels,), unbiased."""
        return (self.squares - self.total**2 / self.tokens).clamp_min(0) / max(1, self.tokens - 1)


@torch.inference_mode()
def inputs_of(model: Model, texts: Sequence[torch.Tensor], names: Sequence[str]) -> dict[str, Inputs]:
    """The sums of the linear modules `names` of `model` over `texts`, (length,) token ids each."""
    totals: dict[str, torch.Tensor] = {}
    squares: dict[str, torch.Tensor] = {}
    mask = torch.empty(0)

    def visitor(name: str) -> Callable[[torch.Tensor], None]:
        width = model.module.get_submodule(name).weight.shape[1]  # type: ignore[index, union-attr]
        totals[name], squares[name] = (torch.zeros(width, dtype=torch.float64) for _ in range(2))

        def visit(x: torch.Tensor) -> None:
            rows = x[mask.bool()].double()  # (tokens, channels), padding left out
            totals[name] += rows.sum(dim=0)
            squares[name] += rows.square().sum(dim=0)

        return visit

    body = model.module.get_submodule(model.shape.family.layers.rpartition(".")[0])
    with input_hooks(model.module, {name: visitor(name) for name in names}):
        for ids, mask in batches(texts, _TOKENS_AT_ONCE):
            body(input_ids=ids, attention_mask=mask, use_cache=False)
    tokens = sum(len(text) for text in texts)
    return {name: Inputs(totals[name], squares[name], tokens) for name in names}


def projections(model: Model) -> list[tuple[str, str]]:
    """A layer: names of its attention output and its down projection."""
    family = model.shape.family
    return [(family.in_layer(i, "output"), family.in_layer(i, "down")) for i in range(len(model.shape.layers))]


def weight_of(model: Model, name: str) -> torch.Tensor:
    """Weight of a linear module, (out, in)."""
    weight = model.module.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach()
