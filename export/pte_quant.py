"""Weights of 4 or 8 bits for ExecuTorch's XNNPACK backend; those of 4 with scales of least error, not the widest.

With 4 bits, rows are cut in groups of 32, value = scale · code, codes -8 to 7, scales positive bfloat16; with 8 a row
has one scale. Activations are rounded to 8 bits, token by token, as they come. Source: torchao's
`Int8DynamicActivationIntxWeightConfig` and `IntxWeightOnlyConfig` (0.18); XNNPACK's `xnn_datatype_qbint4`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from edgeprune.errors import BadInput, missing_extra

try:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup
except ImportError as error:
    raise missing_extra("executorch", "executorch") from error

GROUP = 32
_STEPS = torch.linspace(1 / 11, 1 / 6.5, 16).tolist()  # of a group's largest magnitude; finer gains nothing that counts
_CHUNK = 1 << 16  # groups at a time: bounds the temporaries, whatever the matrix


def codes(weight: torch.Tensor, importance: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, (rows, columns), int8, and scales, (rows, columns / 32), float32, of least weighted squared error.

    Several scales of each group are tried, each fitted once to the codes that it gives.

    Args:
        weight: (rows, columns).
        importance: what each column's error weighs, (columns,); None: all the same.

    Raises:
        BadInput: columns that are no whole groups.
    """
    rows, columns = weight.shape
    if columns % GROUP:
        raise BadInput(f"{columns} columns are no whole groups of {GROUP}", remedy="prune in steps of 32")
    weights = torch.ones(columns) if importance is None else importance.float().clamp_min(1e-12)
    count = max(1, _CHUNK * GROUP // columns)
    found = [
        _codes(part.reshape(-1, GROUP), weights.reshape(-1, GROUP).repeat(len(part), 1))
        for part in torch.split(weight.float(), count)
    ]
    whole, scales = (torch.cat(parts) for parts in zip(*found, strict=True))
    return whole.reshape(rows, columns), scales.reshape(rows, -1)


def _codes(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest = x.abs().amax(1, keepdim=True)
    least = torch.full_like(largest, torch.inf)
    best, best_scale = torch.zeros_like(x), torch.ones_like(largest)  # of a group of zeros
    for step in _STEPS:
        scale = (largest * step).clamp_min(1e-30)
        taken = (x / scale).round().clamp(-8, 7)
        fitted = (weight * x * taken).sum(1, keepdim=True) / (weight * taken.square()).sum(1, keepdim=True)
        scale = torch.where(fitted > 0, fitted, scale).bfloat16().float()
        taken = (x / scale).round().clamp(-8, 7)
        error = (weight * (x - taken * scale).square()).sum(1, keepdim=True)
        better = (error < least) & (largest > 0)
        least = torch.where(better, error, least)
        best, best_scale = torch.where(better, taken, best), torch.where(better, scale, best_scale)
    return best.to(torch.int8), best_scale


def quantise(model: nn.Module, bits: int, importance: Mapping[str, torch.Tensor] | None = None) -> None:
    """Quantise every linear layer and embedding of `model` in place; a tied head becomes a weight of its own.

    Args:
        bits: 4 or 8.
        importance: with 4 bits, what errors of a module's columns weigh, by the module's name: (columns,) each.

    Raises:
        BadInput: with 4 bits, a width that is no multiple of 32.
    """
    _untie(model)
    # torch's stubs lack int4.
    kind, granularity = (getattr(torch, "int4"), PerGroup(GROUP)) if bits == 4 else (torch.int8, PerAxis(0))  # noqa: B009
    weight_only: Any = IntxWeightOnlyConfig(weight_dtype=kind, granularity=granularity)
    dynamic: Any = Int8DynamicActivationIntxWeightConfig(weight_dtype=kind, weight_granularity=granularity)
    for name, part in model.named_modules():
        if not isinstance(part, nn.Linear | nn.Embedding):
            continue
        weight = part.weight.detach()
        quantize_(part, dynamic if isinstance(part, nn.Linear) else weight_only, lambda *_: True)
        if bits == 4:
            try:
                found, scales = codes(weight, (importance or {}).get(name))
            except BadInput as error:
                raise BadInput(error.what, where=name, remedy=error.remedy) from error
            held: Any = part.weight
            held.qdata.copy_(found)
            held.scale.copy_(scales)


def _untie(model: Any) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
