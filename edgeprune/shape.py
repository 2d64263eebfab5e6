"""The shape of a model: what `config.json` says of its widths, and the arithmetic of its parameters.

Pure data, no torch. Widths are kept for each layer, so a non-uniform model is nothing special here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
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
    """Widths and constants of a decoder-only model; what all models of a family share is in `family`."""

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
    head_bias: bool = False
    bos: int | None = None
    eos: tuple[int, ...] = ()
    partial_rotary_dim: int | None = None  # leading values of a head that are rotated; None: the whole head
    windows: tuple[
        int | None, ...
    ] = ()  # positions a layer's query sees, its own included; None: all; (): None for all
    local_rope_theta: float | None = None  # of layers with a window, which then have no rotary scaling; None: as others
    query_scalar: float | None = None  # q·k is divided by the root of this; None: of head_dim
    attention_soft_cap: float | None = None  # c: c·tanh(x/c) of q·k, scaled, before the softmax
    logit_soft_cap: float | None = None  # the same of the logits

    def __hash__(self) -> int:
        """Of what tells shapes apart: `rope_scaling` has none."""
        return hash((self.family.name, self.vocab, self.hidden, self.layers))

    @property
    def rotary_dim(self) -> int:
        """Leading values of each head that the rotary embedding turns."""
        return self.head_dim if self.partial_rotary_dim is None else self.partial_rotary_dim

    @property
    def attention_scale(self) -> float:
        """What q·k is multiplied by."""
        return 1.0 / math.sqrt(self.head_dim if self.query_scalar is None else self.query_scalar)

    @property
    def embedding_scale(self) -> float:
        """What a row of the embedding is multiplied by before the first layer."""
        return math.sqrt(self.hidden) if self.family.scaled_embedding else 1.0

    def window(self, index: int) -> int | None:
        """Positions that a query of layer `index` sees, its own included; None for all."""
        return self.windows[index] if self.windows else None

    def local_rope(self, index: int) -> bool:
        """Whether layer `index` has the rotary base `local_rope_theta`."""
        return self.local_rope_theta is not None and self.window(index) is not None

    @property
    def fixed_heads(self) -> bool:
        """Whether fewer heads would leave GGUF without an architecture for the model: uniform plans keep them all.

        True of families that say so, and of partly rotated heads where the arch for fewer heads rotates whole ones.
        """
        return self.family.fixed_heads or (self.family.gguf_free_arch is not None and self.rotary_dim < self.head_dim)

    @property
    def narrowest_window(self) -> int | None:
        """The smallest window of all layers; None where there is none."""
        return min((window for window in self.windows if window is not None), default=None)

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same widths, and both attention and an MLP."""
        return len(set(self.layers)) <= 1 and all(layer.heads and layer.neurons for layer in self.layers)

    def widths(self) -> dict[str, int | list[int]]:
        """Heads, key/value heads and neurons: a number where it is that of every layer, else a list, a layer each."""
        columns = {field.name: [getattr(layer, field.name) for layer in self.layers] for field in fields(LayerShape)}
        return {name: column[0] if len(set(column)) == 1 else column for name, column in columns.items()}

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
        matrices = 3 if self.family.gated else 2
        weights = matrices * self.hidden * layer.neurons
        return weights + self.mlp_bias * ((matrices - 1) * layer.neurons + self.hidden)

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding and, where it is not tied, the head, with its bias."""
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.head_bias * self.vocab

    @property
    def norm_parameters(self) -> int:
        """Parameters of all norms; a part that a layer lacks takes its norms with it."""
        family = self.family
        wide, heads = 1, 0
        for layer in self.layers:
            read = {
                "attention_norm": bool(layer.heads or (family.parallel and layer.neurons)),
                "attention_post_norm": bool(layer.heads),
                "mlp_norm": bool(layer.neurons),
                "mlp_post_norm": bool(layer.neurons),
            }
            wide += sum(read[role] for role in family.hidden_norms)
            heads += len(family.head_norms) * bool(layer.heads)
        per_value = 2 if family.norm == "layer" else 1  # weight and bias
        return per_value * wide * self.hidden + heads * self.head_dim

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


def token_ids(value: Any, key: str, where: object) -> tuple[int, ...]:
    """The ids under a key of a config: none, one or a list; raises `BadInput` for anything else."""
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(type(i) is int and i >= 0 for i in ids):
        raise BadInput(f"{key} must be a token id or a list of them, found {value!r}", where=where)
    return ids


def _optional(config: Mapping[str, Any], key: str, where: object) -> float | None:
    return None if config.get(key) is None else _number(config, key, where)


def _switch(config: Mapping[str, Any], said: bool | str) -> bool:
    """A bias of the family table: True, False, or what the config says under a key."""
    return bool(config.get(said, False)) if isinstance(said, str) else said


def _rope_scaling(config: Mapping[str, Any], where: object) -> Mapping[str, Any] | None:
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else scaling
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise BadInput(
            f"rotary scaling {kind!r} is not supported", where=where, remedy=f"supported: {', '.join(ROPE_TYPES)}"
        )
    for key in ROPE_TYPES[kind]:
        _number(scaling, key, where)
    return None if kind == "default" else scaling


def _windows(config: Mapping[str, Any], family: Family, count: int, where: object) -> tuple[int | None, ...]:
    """The window of each of `count` layers, () where none has one."""
    switched_off = family.windows == "above" and not config.get("use_sliding_window", False)
    if family.windows == "none" or switched_off or config.get("sliding_window") is None:
        return ()
    window = _positive(config, "sliding_window", where)
    kinds = config.get("layer_types")
    if kinds is not None and family.windows != "all":
        known = ("sliding_attention", "full_attention")
        if not isinstance(kinds, list) or len(kinds) != count or any(kind not in known for kind in kinds):
            raise BadInput(f"layer_types must be {count} of {' and '.join(known)}, found {kinds!r}", where=where)
        sliding = [kind == "sliding_attention" for kind in kinds]
    elif family.windows == "alternating":
        every = _positive(config, "sliding_window_pattern", where)
        sliding = [(index + 1) % every != 0 for index in range(count)]
    elif family.windows == "above":
        first = config.get("max_window_layers", 0)
        if not isinstance(first, int) or isinstance(first, bool):
            raise BadInput(f"max_window_layers must be an integer, found {first!r}", where=where)
        sliding = [index >= first for index in range(count)]
    else:
        sliding = [True] * count
    return tuple(window if here else None for here in sliding) if any(sliding) else ()


def _rotary_dim(config: Mapping[str, Any], head_dim: int, where: object) -> int | None:
    """Rotated values of a head, None for all of them; transformers rounds down, and rotates pairs."""
    factor = _number(config, "partial_rotary_factor", where, default=1.0)
    rotated = int(head_dim * factor)
    if factor > 1.0 or rotated < 2 or rotated % 2:
        raise BadInput(
            f"partial_rotary_factor {factor} of {head_dim}-wide heads is no even number of values", where=where
        )
    return None if rotated == head_dim else rotated


def shape_from_config(config: Mapping[str, Any], *, where: object = "config.json") -> ModelShape:
    """Read a Hugging Face `config.json`, as a mapping; `where` names it in errors.

    Raises:
        BadInput: an unsupported family, a missing or impossible width, a rotary scaling not in `ROPE_TYPES`, or a
            switch that makes another layer of it.
    """
    if not isinstance(config.get("model_type"), str):
        raise BadInput("no model_type", where=where, remedy="give a folder in Hugging Face format")
    if config["model_type"] == "gemma3":
        raise BadInput(
            "this is Gemma 3 with images", where=where, remedy="extract the text model (model_type gemma3_text)"
        )
    family = family_for(config["model_type"], where)
    config = {**family.defaults, **config}
    own = {key: config[key] for key in family.defaults}  # words that only some families' classes read
    activation = config.get(family.activation_key) or family.activation
    if activation != family.activation:
        raise BadInput(
            f"{family.activation_key} {activation!r} is not {family.activation!r}, the only one of family "
            f"{family.name}",
            where=where,
        )
    for key, meaning in family.refused.items():
        if config.get(key):
            raise BadInput(f"{key} ({meaning}) is not supported", where=where)
    hidden = _positive(config, "hidden_size", where)
    heads = _positive(config, "num_attention_heads", where)
    kv_heads = _positive(config, "num_key_value_heads", where, default=heads)
    head_dim = _positive(config, "head_dim", where, default=hidden // heads or None)
    general = LayerShape(heads, kv_heads, _positive(config, "intermediate_size", where))
    count = _positive(config, "num_hidden_layers", where)
    layers = read_layers(config, general, count, where=where)
    check_layers(layers, where=where)
    return ModelShape(
        family=family,
        vocab=_positive(config, "vocab_size", where),
        hidden=hidden,
        head_dim=head_dim,
        layers=layers,
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=_positive(config, "max_position_embeddings", where, default=2048),
        norm_eps=_number(config, family.norm_eps_key, where, default=1e-6),
        rope_theta=_number(config, "rope_theta", where, default=10000.0),
        rope_scaling=_rope_scaling(config, where),
        qkv_bias=_switch(config, family.qkv_bias),
        output_bias=_switch(config, family.output_bias),
        mlp_bias=_switch(config, family.mlp_bias),
        head_bias=family.head_bias,
        bos=next(iter(token_ids(config.get("bos_token_id"), "bos_token_id", where)), None),
        eos=token_ids(config.get("eos_token_id"), "eos_token_id", where),
        windows=_windows(config, family, count, where),
        partial_rotary_dim=_rotary_dim(own, head_dim, where),
        local_rope_theta=_optional(own, "rope_local_base_freq", where),
        query_scalar=_optional(own, "query_pre_attn_scalar", where),
        attention_soft_cap=_optional(own, "attn_logit_softcapping", where),
        logit_soft_cap=_optional(own, "final_logit_softcapping", where),
    )


def rotary_frequencies(shape: ModelShape, *, local: bool = False) -> NDArray[np.float64]:
    """Inverse frequencies of the rotary embedding, (rotary_dim / 2,), in radians per position.

    With `local` those of the layers for which `shape.local_rope(index)` holds: another base and no scaling.

    Source: RoFormer (arXiv 2104.09864) eq. 15; "linear" divides positions by `factor`; "llama3" as published with
    Llama 3.1: frequencies below `low_freq_factor` turns per original context are divided by `factor`, those above
    `high_freq_factor` kept, those between interpolated.
    """
    theta = shape.local_rope_theta if local else shape.rope_theta
    if theta is None:
        raise ValueError("no layer of this model has a rotary base of its own")
    exponent = np.arange(0, shape.rotary_dim, 2, dtype=np.float64) / shape.rotary_dim
    frequencies: NDArray[np.float64] = np.power(theta, -exponent)
    scaling = shape.rope_scaling
    if scaling is None or local:
        return frequencies
    factor = float(scaling["factor"])
    if scaling.get("rope_type", scaling.get("type")) == "linear":
        return frequencies / factor
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    scaled: NDArray[np.float64] = (1 - keep) * frequencies / factor + keep * frequencies
    return scaled
