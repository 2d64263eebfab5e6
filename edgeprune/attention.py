"""Attention in plain matrix products, which a CPU does faster than torch's fused kernel where queries are few or texts
short: a token at a time for many texts (writing), and windows of a few hundred tokens with gradients (recovery)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import eager_mask, sdpa_mask

GROUPED = "edgeprune_grouped"
WINDOWS = "edgeprune_windows"
_BLOCK = 256  # queries of a window that share a product: no later key is multiplied for them


def grouped(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """softmax(cap(s · Q Kᵀ) + mask) V, where the heads that share a key stand as rows of one product.

    Keys and values are read once for all the heads of their group; transformers' eager attention copies them for each.

    Args:
        module: the attention module.
        query: (B, heads, L, D).
        key: (B, groups, S, D), heads a multiple of groups.
        value: (B, groups, S, D_v).
        attention_mask: added to the scores, (B or 1, 1, L, S or more); None: nothing is hidden.
        scaling: s; None: 1 / √D.
        softcap: c of cap(z) = c · tanh(z / c); None: no cap.
        dropout: share of the weights left out while `module` trains.

    Returns:
        (B, L, heads, D_v), and no weights.
    """
    batch, heads, length, width = query.shape
    groups, keys = key.shape[1:3]
    rows = (query * (width**-0.5 if scaling is None else scaling)).reshape(batch, groups, -1, width)
    scores = torch.matmul(rows, key.transpose(2, 3)).view(batch, groups, heads // groups, length, keys)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask[:, :, None, :, :keys]
    # Sums run in float32 inside, also where the scores are bfloat16.
    weights = torch.nn.functional.dropout(scores.softmax(dim=-1), dropout, module.training)
    mixed = torch.matmul(weights.view(batch, groups, -1, keys), value)
    return mixed.view(batch, heads, length, -1).transpose(1, 2).contiguous(), None


def windows(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """`grouped` for whole windows of text, each token of which sees those before it, by blocks of queries.

    Half of a causal window's scores are hidden: a block is multiplied with the keys up to its own end alone, and scale
    and mask belong to the product. Forward and backward of 9 heads, 3 groups, two windows of 512 tokens in bfloat16
    (two cores with AMX): 18 ms, where `grouped` takes 31 and torch's fused kernel 27. Without gradients that kernel is
    the fastest, and is taken.

    Args:
        attention_mask: as transformers' "sdpa" has it: None for whole windows, otherwise True for what is seen.

    The others, and the result, are those of `grouped`.
    """
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            seen = attention_mask
            attention_mask = query.new_zeros(seen.shape).masked_fill_(~seen, torch.finfo(query.dtype).min)
        return grouped(module, query, key, value, attention_mask, scaling, softcap, dropout)
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    scaling = width**-0.5 if scaling is None else scaling
    left_out = dropout if module.training else 0.0
    if softcap is None and not torch.is_grad_enabled():
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, dropout_p=left_out, is_causal=True, scale=scaling, enable_gqa=heads != groups
        )
        return mixed.transpose(1, 2).contiguous(), None
    keys, values = key.flatten(0, 1).transpose(1, 2), value.flatten(0, 1)
    parts = []
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        rows = query[:, :, start:end].reshape(batch * groups, -1, width)
        mask = _later(start, end, heads // groups, query.dtype, query.device).expand(batch * groups, -1, -1)
        if softcap is None:
            scores = torch.baddbmm(mask, rows, keys[:, :, :end], alpha=scaling)
        else:
            scores = mask + softcap * torch.tanh(torch.bmm(rows, keys[:, :, :end]) * (scaling / softcap))
        weights = torch.nn.functional.dropout(scores.softmax(dim=-1), left_out)
        parts.append(torch.bmm(weights, values[:, :end]).view(batch, heads, end - start, -1))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


@functools.lru_cache(maxsize=16)
def _later(start: int, end: int, heads: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Added to the scores of queries `start` to `end`, for each of the `heads` of a group: (heads · rows, end)."""
    hidden = torch.full((end - start, end), torch.finfo(dtype).min, dtype=dtype, device=device).triu_(start + 1)
    return hidden.repeat(heads, 1)


AttentionInterface.register(GROUPED, grouped)
AttentionMaskInterface.register(GROUPED, eager_mask)
AttentionInterface.register(WINDOWS, windows)
AttentionMaskInterface.register(WINDOWS, sdpa_mask)


def _configs(model: Any) -> list[Any]:
    """Of a model of transformers and of those layers that have one of their own."""
    found = {id(each.config): each.config for each in model.modules() if hasattr(each, "config")}
    return [config for config in found.values() if hasattr(config, "_attn_implementation")]


def set_attention(model: Any, name: str) -> None:
    """Let every layer of a model use the attention `name` of transformers, `GROUPED` or `WINDOWS`.

    `set_attn_implementation` reaches no layer whose config is its own, as those of a per-layer plan are.
    """
    for config in _configs(model):
        config._attn_implementation = name


@contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    """`set_attention`, and at the end what was there before."""
    before = [(config, config._attn_implementation) for config in _configs(model)]
    set_attention(model, name)
    try:
        yield
    finally:
        for config, old in before:
            config._attn_implementation = old


class _Room(DynamicLayer):  # type: ignore[misc]
    """Keys and values of a layer, written into room for all of them, where transformers copies all at every step."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length

    def update(self, key_states: Tensor, value_states: Tensor, cache_kwargs: Any = None) -> tuple[Tensor, Tensor]:
        """Add those of the next tokens, (B, groups, L, D) each; all so far."""
        start = self.get_seq_length()
        if not self.is_initialized:
            self.lazy_initialization(key_states)
            self._room = [
                new.new_empty(*new.shape[:2], self._length, new.shape[3]) for new in (key_states, value_states)
            ]
        end = start + key_states.shape[2]
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, start:end] = new
        self.keys, self.values = (room[:, :, :end] for room in self._room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with these texts, any of them as often as it is named."""
        end = self.get_seq_length()
        self._room = [room[indices] for room in self._room]
        self.keys, self.values = (room[:, :, :end] for room in self._room)


def cache_for(model: Any, length: int) -> Cache:
    """An empty cache with room for `length` tokens a text; sliding windows are left to the mask."""
    return Cache(layers=[_Room(length) for _ in range(model.config.get_text_config().num_hidden_layers)])
