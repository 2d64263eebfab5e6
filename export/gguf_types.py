"""What llama.cpp's quantiser will do to a model, told before anything is written: the type of every tensor.

Plain functions of a `ModelShape`. Facts are those of llama.cpp's `src/llama-quant.cpp` at the version the tests run
with: which tensors are quantised, which get more bits, and what replaces a type whose blocks do not fill a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from edgeprune.errors import unknown
from edgeprune.export.gguf_deci import DECI, architecture, file_layers
from edgeprune.runtimes.gguf_file import BLOCKS, PARTS, part_of, tensor_bytes
from edgeprune.shape import ModelShape


@dataclass(frozen=True)
class Quantisation:
    """One name a user can ask for."""

    name: str
    file_type: int  # `llama_ftype` in llama.h, which is also `general.file_type`
    base: str  # type of the tensors no rule singles out

    @property
    def bits(self) -> float:
        """Bits per weight of the base type."""
        values, size = BLOCKS[self.base]
        return 8 * size / values


QUANTISATIONS: dict[str, Quantisation] = {
    each.name: each
    for each in (
        Quantisation("F32", 0, "F32"),
        Quantisation("F16", 1, "F16"),
        Quantisation("Q8_0", 7, "Q8_0"),
        Quantisation("Q6_K", 18, "Q6_K"),
        Quantisation("Q5_K_M", 17, "Q5_K"),
        Quantisation("Q4_K_M", 15, "Q4_K"),
        Quantisation("Q4_0", 2, "Q4_0"),
        Quantisation("Q3_K_M", 12, "Q3_K"),
        Quantisation("Q2_K", 10, "Q2_K"),
    )
}

# What takes the place of a type whose blocks of 256 do not fill a row; all have blocks of 32.
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def quantisation(kind: str) -> Quantisation:
    """The entry of `QUANTISATIONS`; raises `BadInput` naming the nearest for an unknown one."""
    if kind not in QUANTISATIONS:
        raise unknown("quantisation", kind, QUANTISATIONS)
    return QUANTISATIONS[kind]


@dataclass(frozen=True)
class Tensor:
    """A tensor of a GGUF file: its name and its row-major shape."""

    name: str
    shape: tuple[int, ...]


def tensors(shape: ModelShape) -> list[Tensor]:
    """The tensors of a llama model's GGUF file, in the order the writer puts them.

    Biases are those the shape speaks of; `rope_freqs` is there for llama3's rotary scaling. A part that a layer lacks
    has none, except for the MLPs of zeros that `gguf_deci.file_layers` puts in.
    """
    hidden = shape.hidden
    found = [Tensor("token_embd.weight", (shape.vocab, hidden))]
    if shape.rope_scaling and shape.rope_scaling.get("rope_type", shape.rope_scaling.get("type")) == "llama3":
        found.append(Tensor("rope_freqs.weight", (shape.head_dim // 2,)))
    for index, layer in enumerate(file_layers(shape)):
        query, kv, neurons = layer.heads * shape.head_dim, layer.kv_heads * shape.head_dim, layer.neurons
        linear: tuple[tuple[str, int, int, bool], ...] = (
            ("attn_q", query, hidden, shape.qkv_bias),
            ("attn_k", kv, hidden, shape.qkv_bias),
            ("attn_v", kv, hidden, shape.qkv_bias),
            ("attn_output", hidden, query, shape.output_bias),
            ("ffn_gate", neurons, hidden, shape.mlp_bias),
            ("ffn_up", neurons, hidden, shape.mlp_bias),
            ("ffn_down", hidden, neurons, shape.mlp_bias),
        )
        prefix = f"blk.{index}"
        filler = not shape.layers[index].neurons
        found += [Tensor(f"{prefix}.attn_norm.weight", (hidden,))] * bool(layer.heads)
        found += [Tensor(f"{prefix}.ffn_norm.weight", (hidden,))] * bool(layer.neurons)
        for role, rows, columns, bias in linear:
            if not rows or not columns:
                continue
            if role == "ffn_gate" and shape.family.gate is None:
                continue
            found.append(Tensor(f"{prefix}.{role}.weight", (rows, columns)))
            if bias and not (filler and role.startswith("ffn_")):
                found.append(Tensor(f"{prefix}.{role}.bias", (rows,)))
    found.append(Tensor("output_norm.weight", (hidden,)))
    if not shape.tied:
        found.append(Tensor("output.weight", (shape.vocab, hidden)))
    return found


def _more_bits(layer: int, layers: int) -> bool:
    """Layers the medium mixtures spend more on: the first and last eighth and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _value(kind: str, layer: int, shape: ModelShape) -> str:
    layers = sum(bool(each.heads) for each in shape.layers)
    layer = sum(bool(each.heads) for each in shape.layers[:layer])  # the quantiser counts the tensors there are
    group = shape.layers[0].heads // shape.layers[0].kv_heads
    chosen = QUANTISATIONS[kind].base
    if kind == "Q2_K":
        chosen = "Q4_K" if group >= 4 else "Q3_K"
    elif kind == "Q3_K_M":
        chosen = "Q5_K" if layer < 2 else "Q4_K"
    elif kind in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, layers):
        chosen = "Q6_K"
    seventy = len(shape.layers) == 80 and (group > 1 or architecture(shape) == DECI)
    if seventy and chosen in ("Q3_K", "Q4_K"):  # taken for the 70B model, whose v is an eighth of q
        chosen = "Q5_K"
    return chosen


def _down(kind: str, layer: int, shape: ModelShape) -> str:
    layers = len(shape.layers)
    layer = sum(bool(each.neurons) for each in file_layers(shape)[:layer])  # here too, but out of all layers
    if kind == "Q2_K":
        return "Q3_K"
    if kind == "Q3_K_M":
        return "Q5_K" if layer < layers // 16 else "Q4_K"
    if kind in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, layers):
        return "Q6_K"
    return QUANTISATIONS[kind].base


def _output(kind: str, _layer: int, _shape: ModelShape) -> str:
    return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K"}.get(kind, QUANTISATIONS[kind].base)


_RULES: dict[str, Callable[[str, int, ModelShape], str]] = {
    "attn_v": _value,
    "attn_output": _output,
    "ffn_down": _down,
}


def wanted_type(tensor: Tensor, shape: ModelShape, kind: str) -> str:
    """The type the mixture wants for a tensor, before it is asked whether the row length allows it."""
    base = quantisation(kind).base
    if len(tensor.shape) < 2:
        return "F32"
    if base in ("F32", "F16"):
        return base
    if tensor.name == "output.weight" or (tensor.name == "token_embd.weight" and shape.tied):
        return "Q8_0" if base == "Q8_0" else "Q6_K"
    if tensor.name.startswith("blk."):
        _, layer, role, _ = tensor.name.split(".")
        if role in _RULES:
            return _RULES[role](kind, int(layer), shape)
    return base


def _fitting_type(wanted: str, row: int) -> str:
    if row % BLOCKS[wanted][0] == 0:
        return wanted
    smaller = _FALLBACK.get(wanted, wanted)
    return smaller if row % BLOCKS[smaller][0] == 0 else "F16"


def tensor_types(shape: ModelShape, kind: str) -> dict[str, str]:
    """The ggml type of every tensor, by name, in a file quantised as `kind`.

    Raises:
        BadInput: an unknown `kind`.
    """
    return {tensor.name: _fitting_type(wanted_type(tensor, shape, kind), tensor.shape[-1]) for tensor in tensors(shape)}


def predicted_bytes(shape: ModelShape, kind: str) -> dict[str, int]:
    """Bytes of the tensors of each part (the names of `gguf_file.PARTS`) in a file quantised as `kind`.

    With a tied head "embedding" is read whole for every token; without, "head" is, and one row of "embedding".
    """
    types = tensor_types(shape, kind)
    totals = dict.fromkeys(PARTS, 0)
    for tensor in tensors(shape):
        totals[part_of(tensor.name)] += tensor_bytes(types[tensor.name], tensor.shape)
    return totals


def fallbacks(shape: ModelShape, kind: str) -> list[str]:
    """One line a kind of tensor and type that the quantiser has to replace, and why; empty when none.

    Raises:
        BadInput: an unknown `kind`.
    """
    types = tensor_types(shape, kind)
    found: Counter[tuple[str, int, str, str]] = Counter()
    for tensor in tensors(shape):
        wanted = wanted_type(tensor, shape, kind)
        if types[tensor.name] != wanted:
            role = tensor.name.split(".")[2 if tensor.name.startswith("blk.") else 0]
            found[role, tensor.shape[-1], wanted, types[tensor.name]] += 1
    return [
        f"{role}: rows of {row} are not whole blocks of {BLOCKS[wanted][0]}, {wanted} becomes {given} ({count} tensors)"
        for (role, row, wanted, given), count in found.items()
    ]


def alignment(kind: str) -> int:
    """Multiple that the MLP's neurons (and heads times head_dim) must be of, so that no tensor falls back for them.

    256 for the K types and 32 for the others. 32 too for F16 and F32, which would take any width: the kernels work in
    such strides. Rows as long as the hidden size are not pruned; `fallbacks` tells of them.

    Raises:
        BadInput: an unknown `kind`.
    """
    return max(32, BLOCKS[quantisation(kind).base][0])
