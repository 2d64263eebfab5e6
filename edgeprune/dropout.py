"""Dropout for passes side by side: each draws from a generator of its own, so that a run can be repeated.

torch's own dropout draws from the process's one generator, from which threads take turns in no order.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

_PASS = threading.local()


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """What this thread leaves out meanwhile is known from `seed`, on a processor."""
    _PASS.generator = torch.Generator().manual_seed(seed)
    try:
        yield
    finally:
        del _PASS.generator


def own_draws(model: nn.Module) -> None:
    """Let the dropout modules of a model, which is on a processor, draw from the generator of their pass."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def _forward(module: Any, inputs: Tensor) -> Tensor:
    if not module.training or module.p == 0:
        return inputs
    # Outside of a pass (no generator): from the process's.
    kept = torch.empty_like(inputs).bernoulli_(1 - module.p, generator=getattr(_PASS, "generator", None))
    return inputs * kept.div_(1 - module.p)


def shared_draws(model: nn.Module) -> bool:
    """Whether a pass in training draws from the process's generator: dropout that is no module of torch's."""
    modules = list(model.modules())
    configs = (getattr(module, "config", None) for module in modules)
    return any(getattr(config, "attention_dropout", 0) for config in configs) or any(
        isinstance(module, nn.modules.dropout._DropoutNd) and type(module) is not nn.Dropout for module in modules
    )
