"""A model of transformers as the module that ExecuTorch's text runner runs: (tokens, first position) in, logits out.

The stock model computes; only its attention and its cache are replaced, by ExecuTorch's operators that write new keys
and values in place (`llama::update_cache`) and attend to as much of the cache as is filled (`llama::custom_sdpa`). Each
layer's cache has that layer's heads, so layers may differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edgeprune.errors import BadInput, missing_extra
from edgeprune.shape import ModelShape

try:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
except ImportError as error:
    raise missing_extra("transformers", "prune") from error

ATTENTION = "edgeprune_pte"  # the name that the stock attention finds `attention` by


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    start: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of new tokens to a cache that holds them already; transformers' interface.

    Args:
        module: the stock attention that asks; not looked at.
        query: (1, heads, tokens, head_dim).
        key: the cache, (1, context, kv_heads, head_dim).
        value: the same of values.
        attention_mask: none: the causal one follows from the positions.
        start: position of the first token.
        scaling: of the scores; None: 1/√head_dim.
        sliding_window: positions that a token sees, its own among them; None: all before it.

    Returns:
        (1, tokens, heads, head_dim), and no weights.
    """
    query = query.transpose(1, 2)
    context, mask = key.shape[1], None
    if sliding_window is not None and sliding_window < context:
        at = start + torch.arange(query.shape[1])[:, None]
        seen = torch.arange(context)[None]
        mask = torch.where((seen <= at) & (seen > at - sliding_window), 0.0, -torch.inf)
    out = torch.ops.llama.custom_sdpa(query, key, value, start, mask, 0.0, mask is None, scaling)
    return out, None


class Cache:
    """What the stock model takes for its cache during one call: writes into the module's buffers from `start` on."""

    is_compileable = False

    def __init__(self, owner: Decoder, start: int) -> None:
        self._owner, self._start = owner, start

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, _options: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the keys and values of new tokens, (1, kv_heads, tokens, head_dim); the whole caches of that layer."""
        buffers = self._owner.buffers_of(layer)
        for new, buffer in zip((key, value), buffers, strict=True):
            torch.ops.llama.update_cache(new.transpose(1, 2), buffer, self._start)
        return buffers

    def get_seq_length(self, _layer: int = 0) -> int:
        """Tokens in the cache, as far as masks are concerned, of which there are none."""
        return 0


class Decoder(nn.Module):
    """The module to export.

    Args:
        model: a causal language model of transformers, whose layers may differ; it is changed.
        shape: its shape.
        context: positions that each layer's cache has.

    Raises:
        BadInput: attention with a soft cap, which the operator does not compute.
    """

    def __init__(self, model: Any, shape: ModelShape, context: int) -> None:
        super().__init__()
        if shape.attention_soft_cap:
            raise BadInput("ExecuTorch's attention has no soft cap, this model's has")
        ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
        for part in model.modules():
            if hasattr(getattr(part, "config", None), "_attn_implementation"):
                part.config._attn_implementation = ATTENTION
        # A padding token is of no use here, and the operator for quantised rows knows none.
        model.get_input_embeddings().padding_idx = None
        self.model, self.context = model.eval(), context
        for index, layer in enumerate(shape.layers):
            if layer.kv_heads:
                size = (1, context, layer.kv_heads, shape.head_dim)
                self.register_buffer(f"keys_{index}", torch.zeros(size), persistent=False)
                self.register_buffer(f"values_{index}", torch.zeros(size), persistent=False)

    def buffers_of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, (1, context, kv_heads, head_dim) each."""
        return getattr(self, f"keys_{layer}"), getattr(self, f"values_{layer}")

    def forward(self, tokens: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        """Logits after the last of `tokens`, (1, tokens), which begin at position `input_pos`, (1,): (1, 1, vocab)."""
        count = tokens.shape[1]
        start: int = input_pos[0].item()  # type: ignore[assignment]
        check: Any = torch._check  # what the exporter may take for granted of a number that it does not know
        check(start >= 0)
        check(start < self.context)
        check(start + count <= self.context)
        positions = start + torch.arange(count)
        output = self.model(
            input_ids=tokens,
            position_ids=positions[None],
            cache_position=positions,
            past_key_values=Cache(self, start),
            use_cache=True,
            logits_to_keep=1,
            start=start,
        )
        logits: torch.Tensor = output.logits
        return logits
