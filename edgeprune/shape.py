"""The shape of a model: what `config.json` says of its widths, and the arithmetic of its parameters.

Pure data, no torch. Widths are kept for each layer, so a non-uniform model is nothing special here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import BadInput
from edgeprune.families import Family, family_for
from edgeprune.per_layer import check_layers, read_layers

# Rotary scalings, and the numbers each needs beside its name.
ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class LayerShape:
    """Widths of one layer: query heads, key/value heads (both 0: no attention), MLP neurons (0: no MLP)."""

    heads: int
    kv_heads: int
    neurons: int


@dataclass(frozen=True)
class ModelShape:
    """Widths and constants of a decoder-only model."""

    family: Family
    vocab: int
    hidden: int
    head_dim: int
    layers: tuple[LayerShape, ...]
    tied: bool  # the head shares the embedding's tensor
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    bos: int | None = None
    eos: tuple[int, ...] = ()

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same widths, and both attention and an MLP."""
        return len(set(self.layers)) <= 1 and all(layer.heads and layer.neurons for layer in self.layers)

    def with_layers(self, layers: tuple[LayerShape, ...]) -> ModelShape:
        """The same model with other widths."""
        return replace(self, layers=layers)

    def attention_parameters(self, layer: LayerShape) -> int:
        """Parameters of q, k, v and o of one layer, biases included; 0 where it has no attention."""
        if not layer.heads:
            return 0
        q, kv = layer.heads * self.head_dim, layer.kv_heads * self.head_dim
        weights = self.hidden * (2 * q + 2 * kv)
        return weights + self.qkv_bias * (q + 2 * kv) + self.output_bias * self.hidden

    def mlp_parameters(self, layer: LayerShape) -> int:
        """Parameters of gate, up and down of one layer, biases included; 0 where it has no MLP."""
        if not layer.neurons:
            return 0
        matrices = 3 if self.family.gate else 2
        weights = matrices * self.hidden * layer.neurons
        return weights + self.mlp_bias * ((matrices - 1) * layer.neurons + self.hidden)

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding and, where it is not tied, the head."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def norm_parameters(self) -> int:
        """Parameters of all norms; a part that a layer lacks takes its norm with it."""
        parts = sum(bool(layer.heads) + bool(layer.neurons) for layer in self.layers)
        return self.hidden * (parts + 1)

    @property
    def parameters(self) -> int:
        """All parameters of the model."""
        blocks = sum(self.attention_parameters(layer) + self.mlp_parameters(layer) for layer in self.layers)
        return blocks + self.embedding_parameters + self.norm_parameters

    def kv_cache_bytes(self, context: int, *, bytes_per_value: float = 2.0) -> int:
        """Bytes of the key/value cache at `context` tokens."""
        values = sum(2 * layer.kv_heads * self.head_dim for layer in self.layers)
        return int(context * values * bytes_per_value)


def _positive(config: Mapping[str, Any], key: str, where: object, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
        raise BadInput(f"{key} must be a positive integer, found {value!r}", where=where)
    return value


def _number(config: Mapping[str, Any], key: str, where: object, default: float | None = None) -> float:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e12:
        raise BadInput(f"{key} must be a positive number, found {value!r}", where=where)
    return float(value)


def _token_ids(value: Any, key: str, where: object) -> tuple[int, ...]:
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(type(i) is int and i >= 0 for i in ids):
        raise BadInput(f"{key} must be a token id or a list of them, found {value!r}", where=where)
    return ids


def shape_from_config(config: Mapping[str, Any], *, where: object = "config.json") -> ModelShape:
    """Read a Hugging Face `config.json`, as a mapping; `where` names it in errors.

    Raises:
        BadInput: an unsupported family, a missing or impossible width, or a rotary scaling not in `ROPE_TYPES`.
    """
    if not isinstance(config.get("model_type"), str):
        raise BadInput("no model_type", where=where, remedy="give a folder in Hugging Face format")
    family = family_for(config["model_type"])
    activation = config.get("hidden_act", family.activation)
    if activation != family.activation:
        raise BadInput(
            f"hidden_act {activation!r} is not {family.activation!r}, the only one of family {family.name}", where=where
        )
    hidden = _positive(config, "hidden_size", where)
    heads = _positive(config, "num_attention_heads", where)
    kv_heads = _positive(config, "num_key_value_heads", where, default=heads)
    head_dim = _positive(config, "head_dim", where, default=hidden // heads or None)
    general = LayerShape(heads, kv_heads, _positive(config, "intermediate_size", where))
    layers = read_layers(config, general, _positive(config, "num_hidden_layers", where), where=where)
    check_layers(layers, where=where)
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else scaling
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise BadInput(
            f"rotary scaling {kind!r} is not supported", where=where, remedy=f"supported: {', '.join(ROPE_TYPES)}"
        )
    for key in ROPE_TYPES[kind]:
        _number(scaling, key, where)
    attention_bias = bool(config.get("attention_bias", False))
    return ModelShape(
        family=family,
        vocab=_positive(config, "vocab_size", where),
        hidden=hidden,
        head_dim=head_dim,
        layers=layers,
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=_positive(config, "max_position_embeddings", where, default=2048),
        norm_eps=_number(config, "rms_norm_eps", where, default=1e-6),
        rope_theta=_number(config, "rope_theta", where, default=10000.0),
        rope_scaling=None if kind == "default" else scaling,
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        bos=next(iter(_token_ids(config.get("bos_token_id"), "bos_token_id", where)), None),
        eos=_token_ids(config.get("eos_token_id"), "eos_token_id", where),
    )


def rotary_frequencies(shape: ModelShape) -> NDArray[np.float64]:
    """Inverse frequencies of the rotary embedding, (head_dim / 2,), in radians per position.

    Source: RoFormer (arXiv 2104.09864) eq. 15; "linear" divides positions by `factor`; "llama3" as published with
    Llama 3.1: frequencies below `low_freq_factor` turns per original context are divided by `factor`, those above
    `high_freq_factor` kept, those between interpolated.
    """
    exponent = np.arange(0, shape.head_dim, 2, dtype=np.float64) / shape.head_dim
    frequencies: NDArray[np.float64] = np.power(shape.rope_theta, -exponent)
    scaling = shape.rope_scaling
    if scaling is None:
        return frequencies
    factor = float(scaling["factor"])
    if scaling.get("rope_type", scaling.get("type")) == "linear":
        return frequencies / factor
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    scaled: NDArray[np.float64] = (1 - keep) * frequencies / factor + keep * frequencies
    return scaled
