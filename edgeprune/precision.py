"""Which number format matrix products are quick in on this processor."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import torch


@functools.cache
def fast_dtype() -> torch.dtype:
    """bfloat16 where this processor multiplies it in hardware, else float32."""
    flags = Path("/proc/cpuinfo")
    known = flags.read_text(encoding="utf-8", errors="replace") if flags.exists() else ""
    names = ("avx512_bf16", "amx_bf16", " bf16")  # the last is ARM's, a word of its own
    return torch.bfloat16 if any(name in known for name in names) else torch.float32


def fast_copy(module: torch.nn.Module) -> torch.nn.Module:
    """A model with its parameters in `fast_dtype`: the model itself where that is theirs already.

    A step that reads every weight for a few tokens gains from a copy what `fast_products` would lose to conversions.
    Buffers stay as they are: rotary frequencies do not bear rounding.
    """
    dtype = fast_dtype()
    if all(parameter.dtype == dtype for parameter in module.parameters()):
        return module
    quick = copy.deepcopy(module)
    for parameter in quick.parameters():
        parameter.data = parameter.data.to(dtype)
    return quick


def fast_products(device: str = "cpu") -> torch.autocast:
    """A context in which matrix products run in `fast_dtype` on a processor, in bfloat16 on any other device."""
    quick = device != "cpu" or fast_dtype() is torch.bfloat16
    return torch.autocast(device, dtype=torch.bfloat16, enabled=quick)
