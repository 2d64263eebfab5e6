"""Model families as data: where each role's tensor lives in a Hugging Face checkpoint, and what the layer does.

A new family is one entry in `FAMILIES`. Everything that touches weights (scoring, surgery, export) asks this
table and knows no family itself. What a single checkpoint sets (widths, windows, soft caps …) is in `shape.ModelShape`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from edgeprune.errors import unknown

# How layers get a sliding window: none; all of them wherever the config has one ("all"); those from
# `max_window_layers` on, where `use_sliding_window` says so ("above"); all but every n-th ("alternating").
# "above" and "alternating" give way to `layer_types` where the config has it.
Windows = Literal["none", "all", "above", "alternating"]


@dataclass(frozen=True)
class Family:
    """Names and constants of one family. Paths inside a layer are relative to `layers.<index>`.

    A role is a field that names a module. Roles that a family lacks are None; where it fuses matrices, `qkv` holds the
    rows of query, key and value in this order, and `gate_up` those of gate and up, and the single roles are None.
    Biases are True, False, or the key in config.json that says which.
    """

    name: str
    model_types: tuple[str, ...]  # `model_type` in config.json
    class_name: str  # of transformers, e.g. "LlamaForCausalLM"
    gguf_arch: str  # `general.architecture`
    # The llama.cpp arch for what `gguf_arch` cannot hold: arch qwen2 and phi3 take heads · head_dim = hidden only, and
    # no bias on the output projection or the MLP. Arch llama computes the same and has neither limit.
    gguf_free_arch: str | None = None
    gguf_per_layer: str | None = None  # the llama.cpp arch that computes the same with widths of each layer's own
    # Nothing but heads · head_dim = hidden exports to GGUF, so uniform plans take neurons only.
    fixed_heads: bool = False
    permute_qk: bool = False  # `gguf_arch` stores q and k with interleaved rotary pairs
    activation: str = "silu"  # as transformers names it
    activation_key: str = "hidden_act"
    norm: Literal["rms", "layer"] = "rms"  # "layer" subtracts the mean and has a bias
    norm_eps_key: str = "rms_norm_eps"
    norm_offset: float = 0.0  # a norm multiplies by its weight plus this
    parallel: bool = False  # attention and MLP read the same norm, and both are added to the residual
    scaled_embedding: bool = False  # embedding rows are multiplied by sqrt(hidden)
    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    head_bias: bool = False
    windows: Windows = "none"
    # What the class assumes where config.json is silent. Of the words that not every class reads (partial rotary, soft
    # caps, query scale, local rotary base) a family reads those that are here.
    defaults: Mapping[str, Any] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)  # config switches that change the layer: key -> what it is
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    attention_post_norm: str | None = None  # on the output of attention, before it is added
    mlp_norm: str | None = "post_attention_layernorm"  # None in a parallel block
    mlp_post_norm: str | None = None  # on the output of the MLP, before it is added
    query: str | None = "self_attn.q_proj"
    key: str | None = "self_attn.k_proj"
    value: str | None = "self_attn.v_proj"
    qkv: str | None = None
    query_norm: str | None = None  # RMS over each head, (head_dim,), before the rotary embedding
    key_norm: str | None = None
    output: str = "self_attn.o_proj"
    gate: str | None = "mlp.gate_proj"
    up: str | None = "mlp.up_proj"
    gate_up: str | None = None
    down: str = "mlp.down_proj"

    def in_layer(self, index: int, role: str) -> str:
        """The full module path of `role` (a field of this class, e.g. "query") in layer `index`.

        Raises:
            KeyError: the family has no such role.
        """
        name = getattr(self, role)
        if name is None:
            raise KeyError(f"family {self.name} has no {role}")
        return f"{self.layers}.{index}.{name}"

    @property
    def gated(self) -> bool:
        """Whether the MLP is down(activation(gate(x)) * up(x)); else it is down(activation(up(x)))."""
        return self.gate is not None or self.gate_up is not None

    @cached_property
    def attention_inputs(self) -> tuple[str, ...]:
        """Roles whose rows, one after the other, are query, key and value."""
        return ("qkv",) if self.qkv else ("query", "key", "value")

    @cached_property
    def mlp_inputs(self) -> tuple[str, ...]:
        """Roles whose rows, one after the other, are gate (where there is one) and up."""
        if self.gate_up:
            return ("gate_up",)
        return ("gate", "up") if self.gate else ("up",)

    @cached_property
    def hidden_norms(self) -> tuple[str, ...]:
        """Roles of the norms of a layer that are as wide as the hidden state."""
        every = ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm")
        return tuple(role for role in every if getattr(self, role))

    @cached_property
    def head_norms(self) -> tuple[str, ...]:
        """Roles of the norms of a layer that are as wide as a head."""
        return tuple(role for role in ("query_norm", "key_norm") if getattr(self, role))


_GEMMA = {
    "activation": "gelu_pytorch_tanh",
    "activation_key": "hidden_activation",
    "norm_offset": 1.0,
    "scaled_embedding": True,
    "qkv_bias": "attention_bias",
    "output_bias": "attention_bias",
    "windows": "alternating",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_GEMMA_DEFAULTS = {"tie_word_embeddings": True, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        # LLaMA, TinyLlama, SmolLM, SmolLM2: gated MLP, RMSNorm, full rotary, with and without GQA.
        Family(
            name="llama",
            model_types=("llama",),
            class_name="LlamaForCausalLM",
            gguf_arch="llama",
            gguf_per_layer="deci",
            permute_qk=True,
            qkv_bias="attention_bias",
            output_bias="attention_bias",
            mlp_bias="mlp_bias",
        ),
        # LLaMA's layer; v0.1 looks back one window in every layer, later versions have none.
        Family(
            name="mistral",
            model_types=("mistral",),
            class_name="MistralForCausalLM",
            gguf_arch="llama",
            gguf_per_layer="deci",
            permute_qk=True,
            windows="all",
            defaults={"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
        ),
        # Qwen2 and 2.5: biases on q, k and v.
        Family(
            name="qwen2",
            model_types=("qwen2",),
            class_name="Qwen2ForCausalLM",
            gguf_arch="qwen2",
            gguf_free_arch="llama",
            gguf_per_layer="deci",
            qkv_bias=True,
            windows="above",
            defaults={"sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32768},
        ),
        # Qwen3: norms on each head of q and k. Arch qwen3 has a head size of its own.
        Family(
            name="qwen3",
            model_types=("qwen3",),
            class_name="Qwen3ForCausalLM",
            gguf_arch="qwen3",
            qkv_bias="attention_bias",
            output_bias="attention_bias",
            windows="above",
            query_norm="self_attn.q_norm",
            key_norm="self_attn.k_norm",
            defaults={
                "head_dim": 128,
                "num_key_value_heads": 32,
                "sliding_window": 4096,
                "max_window_layers": 28,
                "max_position_embeddings": 32768,
            },
        ),
        # Phi-1, 1.5 and 2: parallel block with one LayerNorm, an MLP without gate, biases everywhere, partial rotary.
        # PhiForCausalLM honours `head_dim` and would hold fewer heads, but llama.cpp's arch phi2 derives the head size
        # as hidden / heads, and no other arch computes this layer: uniform plans keep the heads and take neurons.
        Family(
            name="phi",
            model_types=("phi",),
            class_name="PhiForCausalLM",
            gguf_arch="phi2",
            fixed_heads=True,
            activation="gelu_new",
            norm="layer",
            norm_eps_key="layer_norm_eps",
            parallel=True,
            qkv_bias=True,
            output_bias=True,
            mlp_bias=True,
            head_bias=True,
            defaults={"partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5},
            refused={"qk_layernorm": "a LayerNorm on q and k"},
            final_norm="model.final_layernorm",
            mlp_norm=None,
            output="self_attn.dense",
            gate=None,
            up="mlp.fc1",
            down="mlp.fc2",
        ),
        # Phi-3 and 3.5 mini (with plain rotary): q, k, v and gate, up are fused. Phi3ForCausalLM honours `head_dim`.
        Family(
            name="phi3",
            model_types=("phi3",),
            class_name="Phi3ForCausalLM",
            gguf_arch="phi3",
            gguf_free_arch="llama",
            gguf_per_layer="deci",
            windows="all",
            defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "partial_rotary_factor": 1.0},
            query=None,
            key=None,
            value=None,
            qkv="self_attn.qkv_proj",
            gate=None,
            up=None,
            gate_up="mlp.gate_up_proj",
        ),
        # Gemma 2: norms before and after both halves, soft caps on attention and logits, a window in every other layer.
        Family(
            name="gemma2",
            model_types=("gemma2",),
            class_name="Gemma2ForCausalLM",
            gguf_arch="gemma2",
            defaults={
                **_GEMMA_DEFAULTS,
                "num_key_value_heads": 4,
                "sliding_window_pattern": 2,
                "max_position_embeddings": 8192,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
            },
            **_GEMMA,  # type: ignore[arg-type]
        ),
        # Gemma 3, text: norms on q and k, windows in five of six layers, which have a rotary base of their own.
        Family(
            name="gemma3",
            model_types=("gemma3_text",),
            class_name="Gemma3ForCausalLM",
            gguf_arch="gemma3",
            query_norm="self_attn.q_norm",
            key_norm="self_attn.k_norm",
            defaults={
                **_GEMMA_DEFAULTS,
                "num_key_value_heads": 4,
                "sliding_window_pattern": 6,
                "max_position_embeddings": 131072,
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
            },
            refused={"use_bidirectional_attention": "attention in both directions"},
            **_GEMMA,  # type: ignore[arg-type]
        ),
    )
}


def family_for(model_type: str, where: object = None) -> Family:
    """The family of a `config.json`'s `model_type`; `where` it stands is what an error names.

    Raises:
        BadInput: no family has it; the message names the nearest and all supported ones.
    """
    types = {model_type: family for family in FAMILIES.values() for model_type in family.model_types}
    if model_type not in types:
        raise unknown("model family", model_type, types, where)
    return types[model_type]


def family_for_gguf(architecture: str, where: object = None) -> Family:
    """The family of a GGUF file's `general.architecture`; raises `BadInput` as `family_for` does.

    Of families that share an architecture the first is taken: a Mistral file says no more than that it is a LLaMA.
    """
    archs: dict[str, Family] = {}
    for family in FAMILIES.values():
        archs.setdefault(family.gguf_arch, family)
    for family in FAMILIES.values():
        if family.gguf_per_layer:
            archs.setdefault(family.gguf_per_layer, family)
    if architecture not in archs:
        raise unknown("GGUF architecture", architecture, archs, where)
    return archs[architecture]
