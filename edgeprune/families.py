"""Model families as data: where each role's tensor lives in a Hugging Face checkpoint.

A new family is one entry in `FAMILIES`. Everything that touches weights (scoring, surgery, export) asks this
table for names and knows no family itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgeprune.errors import unknown


@dataclass(frozen=True)
class Family:
    """Names of one family. Paths inside a layer are relative to `layers.<index>`."""

    name: str
    model_types: tuple[str, ...]  # `model_type` in config.json
    gguf_arch: str  # `general.architecture`
    gguf_per_layer: str | None = None  # the llama.cpp arch that computes the same with widths of each layer's own
    activation: str = "silu"
    permute_qk: bool = True  # llama.cpp stores q and k with interleaved rotary pairs for this arch
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    gate: str | None = "mlp.gate_proj"  # None where the MLP has no gate (fc1/fc2)
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"

    def in_layer(self, index: int, role: str) -> str:
        """The full module path of `role` (a field of this class, e.g. "query") in layer `index`."""
        return f"{self.layers}.{index}.{getattr(self, role)}"


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        # LLaMA, TinyLlama, SmolLM, SmolLM2: gated MLP, RMSNorm, full rotary, with and without GQA.
        Family(name="llama", model_types=("llama",), gguf_arch="llama", gguf_per_layer="deci"),
    )
}


def family_for(model_type: str) -> Family:
    """The family of a `config.json`'s `model_type`.

    Raises:
        BadInput: no family has it; the message names the nearest and all supported ones.
    """
    types = {model_type: family for family in FAMILIES.values() for model_type in family.model_types}
    if model_type not in types:
        raise unknown("model family", model_type, types)
    return types[model_type]


def family_for_gguf(architecture: str) -> Family:
    """The family of a GGUF file's `general.architecture`; raises `BadInput` as `family_for` does."""
    archs = {family.gguf_arch: family for family in FAMILIES.values()}
    for family in FAMILIES.values():
        # Several families may share one; the first in the table is read back.
        if family.gguf_per_layer:
            archs.setdefault(family.gguf_per_layer, family)
    if architecture not in archs:
        raise unknown("GGUF architecture", architecture, archs)
    return archs[architecture]
