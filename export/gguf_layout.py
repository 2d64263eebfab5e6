"""What a GGUF file of each family is made of: its architecture, its tensors, and where their values come from.

Facts are those of llama.cpp's `src/models/*.cpp` at the version the tests run with: which tensors an architecture
loads, which widths and biases it has room for, and what of a layer it fixes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from edgeprune.errors import BadInput
from edgeprune.export.gguf_deci import DECI, file_layers, is_filler
from edgeprune.shape import ModelShape

ROTARY = "rope_freqs.weight"  # computed, not read

# Architectures that take the head size as hidden / heads, so that heads · head_dim must be the hidden size.
_DERIVED_HEAD = ("qwen2", "phi2", "phi3")
# Roles that may have a bias, where that is not all of them.
_QKV = ("attn_q", "attn_k", "attn_v", "attn_qkv")
_BIASED_ROLES = dict.fromkeys(("qwen2", "qwen3", "phi3", "gemma2", "gemma3"), _QKV)
WINDOWED = ("gemma2", "gemma3")  # the architectures that compute sliding windows
OWN_HEAD = ("phi2",)  # that want `output.weight` beside a tied embedding too
# Layers with the attention scale of the 27B models, sqrt(heads / hidden): llama.cpp knows them by their number.
_27B_LAYERS = {"gemma2": 46, "gemma3": 62}

# llama.cpp's tensor role -> the field of `Family` that names the module.
ROLES = {
    "attn_norm": "attention_norm",
    "post_attention_norm": "attention_post_norm",
    "ffn_norm": "mlp_norm",
    "post_ffw_norm": "mlp_post_norm",
    "attn_q_norm": "query_norm",
    "attn_k_norm": "key_norm",
    "attn_qkv": "qkv",
    "attn_q": "query",
    "attn_k": "key",
    "attn_v": "value",
    "attn_output": "output",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}
# Norms that belong to attention; the others of a layer belong to its MLP.
_ATTENTION = ("attention_norm", "attention_post_norm", "query_norm", "key_norm")


@dataclass(frozen=True)
class Tensor:
    """A tensor of a GGUF file: its name and its row-major shape."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """Where a tensor's values are in a Hugging Face checkpoint: some rows of a tensor, or all of it."""

    name: str
    start: int = 0  # first row
    of: int | None = None  # rows of the fused tensor they are in; None: it is the whole tensor


def lacking(shape: ModelShape, arch: str) -> str | None:
    """What llama.cpp's architecture `arch` cannot hold of a model; None when it holds all."""
    biased = _BIASED_ROLES.get(arch)
    scaling = shape.rope_scaling or {}
    for layer in shape.layers:
        if arch in _DERIVED_HEAD and layer.heads * shape.head_dim != shape.hidden:
            return f"{layer.heads} heads of {shape.head_dim} do not make up the hidden size {shape.hidden}"
    if biased and (shape.output_bias or shape.mlp_bias):
        return "it has biases other than those of query, key and value"
    if arch in ("llama", DECI) and shape.rotary_dim != shape.head_dim:
        return "heads are rotated in part only"
    if arch not in ("llama", DECI) and scaling.get("rope_type", scaling.get("type")) == "llama3":
        return "it has llama3's rotary scaling"
    if arch == "gemma2" and not shape.tied:
        return "the head is not tied to the embedding"
    if arch == "gemma2" and not (shape.attention_soft_cap and shape.logit_soft_cap):
        return "attention or logits have no soft cap"
    if arch == "gemma3" and shape.attention_soft_cap:
        return "attention has a soft cap"
    return None


def architecture(shape: ModelShape, *, where: object = "model") -> str:
    """`general.architecture` of a model: its family's own, or the freer one where that has no room for it.

    Where layers differ it is the family's architecture with widths of each layer's own.

    Raises:
        BadInput: llama.cpp has no architecture that computes this model.
    """
    family = shape.family
    if not shape.uniform:
        return _per_layer_architecture(shape, where)
    missing = lacking(shape, family.gguf_arch)
    if missing is None:
        return family.gguf_arch
    if family.gguf_free_arch is not None and lacking(shape, family.gguf_free_arch) is None:
        return family.gguf_free_arch
    raise BadInput(
        f"llama.cpp's architecture {family.gguf_arch!r} cannot hold this model: {missing}",
        where=where,
        remedy="prune with --scope mlp, or export to ONNX" if shape.fixed_heads else "export to ONNX",
    )


def _per_layer_architecture(shape: ModelShape, where: object) -> str:
    arch = shape.family.gguf_per_layer
    missing = "layers differ, and it has one width for all" if arch is None else lacking(shape, arch)
    if arch is None or missing is not None:
        raise BadInput(
            f"llama.cpp's architecture {arch or shape.family.gguf_arch!r} cannot hold this model: {missing}",
            where=where,
            remedy="prune with a uniform plan, or export to ONNX",
        )
    return arch


def runtime_attention_scale(shape: ModelShape, arch: str) -> float:
    """What llama.cpp multiplies q·k by; `query_factor` makes up the difference."""
    if len(shape.layers) == _27B_LAYERS.get(arch):
        return 1.0 / math.sqrt(shape.hidden // shape.layers[0].heads)
    return 1.0 / math.sqrt(shape.head_dim)


def query_factor(shape: ModelShape) -> float:
    """What queries are multiplied by in the file, so that q·k has the model's own scale; 1 for nearly all models.

    It goes into the query projection, or into the norm behind it where there is one.
    """
    factor = shape.attention_scale / runtime_attention_scale(shape, architecture(shape))
    return 1.0 if math.isclose(factor, 1.0, rel_tol=1e-9) else factor


def scaled_role(shape: ModelShape) -> str:
    """llama.cpp's role of the tensors that `query_factor` goes into."""
    return "attn_q_norm" if shape.family.query_norm else "attn_q"


def paired_heads(tensor: str, shape: ModelShape) -> int:
    """Heads of a tensor, by its llama.cpp name, whose rows the file has in rotary pairs; 0 for any other tensor."""
    permuted = shape.family.permute_qk or architecture(shape) != shape.family.gguf_arch
    if not permuted or not tensor.startswith("blk."):
        return 0
    _, index, role, _ = tensor.split(".")
    layer = shape.layers[int(index)]
    return {"attn_q": layer.heads, "attn_k": layer.kv_heads}.get(role, 0)


def longest_context(shape: ModelShape) -> int:
    """Positions a model's file is good for: where llama.cpp knows no window for the architecture, beyond it another
    model would run."""
    if shape.narrowest_window is None or _naming(shape) in WINDOWED:
        return shape.max_positions
    return min(shape.max_positions, shape.narrowest_window)


def _naming(shape: ModelShape) -> str:
    """The architecture whose names the tensors have."""
    try:
        return architecture(shape)
    except BadInput:
        return shape.family.gguf_arch


@lru_cache(maxsize=8)  # a search asks for a shape's in every format
def tensors(shape: ModelShape) -> tuple[Tensor, ...]:
    """The tensors of a model's GGUF file, in the order the writer puts them.

    Biases are those the shape speaks of; `rope_freqs` is there for llama3's rotary scaling. A part that a layer lacks
    has none, except for the MLPs of zeros that `gguf_deci.file_layers` puts in. Every model has such names, also one
    that no architecture holds: an importance matrix goes by them, whatever file it is for.
    """
    family, hidden, arch = shape.family, shape.hidden, _naming(shape)
    found = [Tensor("token_embd.weight", (shape.vocab, hidden))]

    def put(name: str, dimensions: tuple[int, ...], *, bias: bool = False) -> None:
        found.append(Tensor(f"{name}.weight", dimensions))
        if bias and not is_filler(f"{name}.weight", shape):
            found.append(Tensor(f"{name}.bias", dimensions[:1]))

    if shape.rope_scaling and shape.rope_scaling.get("rope_type", shape.rope_scaling.get("type")) == "llama3":
        found.append(Tensor(ROTARY, (shape.rotary_dim // 2,)))
    fused = arch == "phi3"
    for index, layer in enumerate(file_layers(shape)):
        query, kv, neurons = layer.heads * shape.head_dim, layer.kv_heads * shape.head_dim, layer.neurons
        prefix = f"blk.{index}"
        for role, module in ROLES.items():
            if not (layer.heads if module in _ATTENTION else layer.neurons):
                continue
            if module in family.hidden_norms:
                put(f"{prefix}.{role}", (hidden,), bias=family.norm == "layer")
            elif module in family.head_norms:
                put(f"{prefix}.{role}", (shape.head_dim,))
        linear: tuple[tuple[str, int, int, bool], ...] = (
            ("attn_qkv", (query + 2 * kv) * fused, hidden, shape.qkv_bias),
            ("attn_q", query * (not fused), hidden, shape.qkv_bias),
            ("attn_k", kv * (not fused), hidden, shape.qkv_bias),
            ("attn_v", kv * (not fused), hidden, shape.qkv_bias),
            ("attn_output", hidden, query, shape.output_bias),
            ("ffn_gate", neurons * (family.gated and not fused), hidden, shape.mlp_bias),
            ("ffn_up", neurons * (2 if fused else 1), hidden, shape.mlp_bias),
            ("ffn_down", hidden, neurons, shape.mlp_bias),
        )
        for role, rows, columns, bias in linear:
            if rows and columns:
                put(f"{prefix}.{role}", (rows, columns), bias=bias)
    put("output_norm", (hidden,), bias=family.norm == "layer")
    if not shape.tied or arch in OWN_HEAD:
        put("output", (shape.vocab, hidden), bias=shape.head_bias)
    return tuple(found)


def source(tensor: str, shape: ModelShape) -> Source:
    """Where the values of a llama.cpp tensor (any but `ROTARY`) are in a Hugging Face checkpoint."""
    family = shape.family
    *_, role, suffix = tensor.split(".")
    if not tensor.startswith("blk."):
        tied = role == "output" and suffix == "weight" and shape.tied
        head = family.embedding if tied else family.head
        modules = {"token_embd": family.embedding, "output_norm": family.final_norm, "output": head}
        return Source(f"{modules[role]}.{suffix}")
    index = int(tensor.split(".")[1])
    layer, head_dim = shape.layers[index], shape.head_dim
    query, kv = layer.heads * head_dim, layer.kv_heads * head_dim
    starts: dict[str, int] = {}
    fused = ""
    if family.qkv and role in ("attn_q", "attn_k", "attn_v"):
        fused, starts, of = "qkv", {"attn_q": 0, "attn_k": query, "attn_v": query + kv}, query + 2 * kv
    elif family.gate_up and role in ("ffn_gate", "ffn_up"):
        fused, starts, of = "gate_up", {"ffn_gate": 0, "ffn_up": layer.neurons}, 2 * layer.neurons
    if not fused:
        return Source(f"{family.in_layer(index, ROLES[role])}.{suffix}")
    name = f"{family.in_layer(index, fused)}.{suffix}"
    whole = _naming(shape) == "phi3"  # whose up projection is the fused matrix
    return Source(name) if whole else Source(name, starts[role], of)


def module_name(tensor: str, shape: ModelShape) -> str:
    """The name in a Hugging Face checkpoint of a llama.cpp tensor (not of `ROTARY`, which has none)."""
    return source(tensor, shape).name


def biased(role: str, arch: str) -> bool:
    """Whether architecture `arch` reads a bias of `role` ("attn_output") where there is one."""
    return role in _BIASED_ROLES.get(arch, (role,))
