"""RMSNorm for training on a processor, where a norm is not one kernel but a dozen passes over the hidden states.

y = w · n, n = x / √(mean(x²) + ε) (arXiv 1910.07467). With g = w · ∂L/∂y and d the width:

    ∂L/∂x = (g - n · (g · n) / d) / √(mean(x²) + ε),    ∂L/∂w = Σ_tokens n · ∂L/∂y
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


class _RMSNorm(torch.autograd.Function):
    """What transformers' LLaMA norm gives, rounded where it rounds, with half of the passes over memory."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalised `hidden` (..., d), in float32 inside, times `weight` (d,)."""
        wide = hidden.to(torch.float32, copy=True)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().mul_(1 / hidden.shape[-1]).add_(eps).rsqrt_()
        normal = wide.mul_(scale).to(hidden.dtype)
        ctx.save_for_backward(normal, scale, weight)
        return weight * normal

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        normal, scale, weight = ctx.saved_tensors
        by_hidden = by_weight = None
        if ctx.needs_input_grad[1]:
            by_weight = (grad * normal).flatten(0, -2).sum(dim=0)
        if ctx.needs_input_grad[0]:
            own, wide = (grad * weight).float(), normal.to(torch.float32, copy=True)
            along = torch.linalg.vecdot(own, wide).unsqueeze(-1) / normal.shape[-1]
            by_hidden = own.sub_(wide.mul_(along)).mul_(scale).to(normal.dtype)
        return by_hidden, by_weight, None


def lean_norms(model: nn.Module) -> int:
    """Let the RMSNorms of a model of transformers train in fewer passes; how many there are.

    Those of LLaMA's form: weight · norm, with `variance_epsilon`. Gemma's (1 + weight, in float32) stay as they are.
    """
    found = 0
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = MethodType(_forward, module)
            found += 1
    return found


def _forward(module: Any, hidden: Tensor) -> Tensor:
    normed: Tensor = _RMSNorm.apply(hidden, module.weight, module.variance_epsilon)  # type: ignore[no-untyped-call]
    return normed
