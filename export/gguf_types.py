"""What llama.cpp's quantiser will do to a model, told before anything is written: the type of every tensor.

Plain functions of a `ModelShape`. `gguf_mixtures` has the rules of each mixture; here are the tensors they are asked
for, types the user names for some of them, and what replaces a type whose blocks do not fill a row.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from edgeprune.errors import BadInput, unknown
from edgeprune.export.gguf_layout import Tensor, architecture, tensors
from edgeprune.export.gguf_mixtures import (
    QUANTISATIONS,
    Place,
    Quantisation,
    mixture_type,
    needs_imatrix,
    quantisation,
)
from edgeprune.runtimes.gguf_file import BLOCKS, PARTS, part_of, tensor_bytes
from edgeprune.shape import ModelShape

__all__ = [
    "QUANTISATIONS",
    "Quantisation",
    "Recipe",
    "Tensor",
    "TENSOR_TYPES",
    "Traits",
    "alignment",
    "canonical",
    "fallbacks",
    "needing_imatrix",
    "predicted_bytes",
    "quantisation",
    "recipe",
    "tensor_types",
    "tensors",
    "types_of",
]

# Types a single tensor can be given.
TENSOR_TYPES = tuple(
    name for name in BLOCKS if name not in ("Q8_1", "Q8_K", "F64", "I8", "I16", "I32", "I64", "Q1_0", "NVFP4")
)

# What takes the place of a type whose blocks of 256 (or 64) do not fill a row; all have blocks of 32.
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_FALLBACK |= dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0")
_FALLBACK |= dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL")

# What a tensor is called in the name of a quantisation, where that is not its name in the file.
_SHORT = {"embed": "token_embd", "head": "output"}
_ROLES = (*_SHORT, "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class Recipe:
    """A mixture, and what differs from it.

    Attributes:
        kind: a key of `QUANTISATIONS`.
        imatrix: whether weights are quantised by an importance matrix; a few rules look at it.
        types: (pattern, ggml type) pairs: a tensor whose name the regular expression is found in gets the type of the
            first such pair. The mixture's rules hold for all others.
    """

    kind: str
    imatrix: bool = False
    types: tuple[tuple[str, str], ...] = field(default=())

    def __post_init__(self) -> None:
        quantisation(self.kind)
        if self.types and self.kind in ("F32", "F16"):
            raise BadInput(f"{self.kind} with other types", remedy="name a quantised kind, e.g. Q8_0, as the base")
        for pattern, type_name in self.types:
            if type_name not in TENSOR_TYPES:
                raise unknown("tensor type", type_name, TENSOR_TYPES)
            try:
                re.compile(pattern)
            except re.error as error:
                raise BadInput(f"{pattern!r} is no regular expression ({error})") from error

    def type_for(self, name: str) -> str | None:
        """The type that `types` gives a tensor, None where they say nothing of it."""
        return next((type_name for pattern, type_name in self.types if re.search(pattern, name)), None)


def recipe(name: str) -> Recipe:
    """The recipe of a quantisation's name: a mixture and options with colons between, in any case.

    Options are `imatrix` and ROLE=TYPE, where the role is one of llama.cpp's ("attn_v", "ffn_down"), "embed" or
    "head". The head of a tied model is its embedding: either name is that tensor. Examples: `Q4_K_M`,
    `Q4_0:imatrix`, `Q4_0:embed=IQ4_NL:attn_v=Q5_0`.

    Raises:
        BadInput: an unknown mixture, type or option.
    """
    kind, *options = canonical(name).split(":")
    types = [tuple(option.split("=")) for option in options if "=" in option]
    patterns = tuple((rf"(^|\.){_SHORT.get(role, role)}\.weight$", type_name) for role, type_name in types)
    return Recipe(kind, "imatrix" in options, patterns)


def canonical(name: str) -> str:
    """The name of a quantisation as it is always written: see `recipe`. One recipe by role has one name.

    Raises:
        BadInput: as `recipe`.
    """
    kind, *options = name.split(":")
    kinds = {each.lower(): each for each in QUANTISATIONS}
    if kind.lower() not in kinds:
        raise unknown("quantisation", kind, QUANTISATIONS)
    kind = kinds[kind.lower()]
    chosen: dict[str, str] = {}
    for option in map(str.lower, options):
        role, given, type_name = option.partition("=")
        if option != "imatrix" and (not given or role not in _ROLES):
            raise unknown(f"option of {kind}:", option, ("imatrix", *(f"{each}=TYPE" for each in _ROLES)))
        if role in chosen:
            raise BadInput(f"{kind}: {role} is given twice", remedy="name it once")
        if given and type_name.upper() not in TENSOR_TYPES:
            raise unknown("tensor type", type_name, TENSOR_TYPES)
        chosen[role] = type_name.upper()
    ordered = [f"{role}={chosen[role]}" for role in _ROLES if role in chosen]
    return ":".join([kind, *ordered, *(["imatrix"] if "imatrix" in chosen else [])])


# Weights whose rows are as long as what pruning shortens, as they are called in the first layer.
_PRUNED_ROWS = ("blk.0.attn_output.weight", "blk.0.ffn_down.weight")


@dataclass(frozen=True)
class Traits:
    """What the mixtures' rules ask of a model as a whole."""

    layers: int
    group: int  # query heads that share a key/value head in the first layer
    extra_value_bits: bool  # llama.cpp takes it for one of the 70B class

    @classmethod
    def of(cls, layers: int, heads: int, kv_heads: int, arch: str) -> Traits:
        """Of a model of `layers` layers whose first has `heads` and `kv_heads`, of GGUF architecture `arch`."""
        group = heads // kv_heads if kv_heads else 0
        # 80 layers are what llama.cpp knows that class by.
        seventy = layers == 80 and (arch in ("deci", "qwen2") or (arch == "llama" and heads != kv_heads))
        return cls(layers, group, seventy)


def _traits(shape: ModelShape) -> Traits:
    first = shape.layers[0]
    return Traits.of(len(shape.layers), first.heads, first.kv_heads, architecture(shape))


def _role(name: str) -> str:
    return name.split(".")[2 if name.startswith("blk.") else 0]


def _quantisable(tensor: Tensor) -> bool:
    return len(tensor.shape) >= 2 and tensor.name.endswith("weight") and not tensor.name.endswith("_norm.weight")


def _layer(tensor: Tensor) -> int:
    return int(tensor.name.split(".")[1]) if tensor.name.startswith("blk.") else -1


def _wanted(every: Sequence[Tensor], traits: Traits, wish: Recipe) -> dict[str, str]:
    """The type the recipe wants for each tensor, whether or not it fits the row."""
    tied = not any(tensor.name == "output.weight" for tensor in every)
    named = {tensor.name: wish.type_for(tensor.name) for tensor in every if _quantisable(tensor)}
    if tied and "token_embd.weight" in named:
        as_head = wish.type_for("output.weight")
        as_embedding = named["token_embd.weight"]
        if as_head and as_embedding and as_head != as_embedding:
            raise BadInput(
                f"the head is the embedding's tensor: it cannot be {as_head} and {as_embedding}", remedy="name one type"
            )
        named["token_embd.weight"] = as_embedding or as_head
    values = sum(_role(tensor.name) in ("attn_v", "attn_qkv") for tensor in every if _quantisable(tensor))
    before: Counter[str] = Counter()
    wanted: dict[str, str] = {}
    for tensor in sorted(every, key=_layer):  # stable: the quantiser goes layer by layer
        if not _quantisable(tensor):
            wanted[tensor.name] = "F32"
            continue
        role = _role(tensor.name)
        place = Place(
            role="output" if tied and role == "token_embd" else role,
            index=before[role],
            count=values if role in ("attn_v", "attn_qkv") else traits.layers,
            group=traits.group,
            row=tensor.shape[-1],
            imatrix=wish.imatrix,
            extra_value_bits=traits.extra_value_bits,
        )
        before[role] += 1
        wanted[tensor.name] = named[tensor.name] or mixture_type(wish.kind, place)
    return {tensor.name: wanted[tensor.name] for tensor in every}


@lru_cache(maxsize=32)  # what a format costs and what it falls back to ask for the same, of the dense model too
def _wanted_by(shape: ModelShape, wish: Recipe) -> Mapping[str, str]:
    return _wanted(tensors(shape), _traits(shape), wish)


def _fitting_type(wanted: str, row: int) -> str:
    if row % BLOCKS[wanted][0] == 0:
        return wanted
    smaller = _FALLBACK.get(wanted, wanted)
    return smaller if row % BLOCKS[smaller][0] == 0 else "F16"


def types_of(every: Sequence[Tensor], traits: Traits, wish: Recipe) -> dict[str, str]:
    """The ggml type of every tensor, by name, in a file quantised by a recipe.

    Raises:
        BadInput: embedding and head are one tensor and were given two types.
    """
    wanted = _wanted(every, traits, wish)
    return {tensor.name: _fitting_type(wanted[tensor.name], tensor.shape[-1]) for tensor in every}


def _as_recipe(kind: str | Recipe) -> Recipe:
    return kind if isinstance(kind, Recipe) else recipe(kind)


def tensor_types(shape: ModelShape, kind: str | Recipe) -> dict[str, str]:
    """The ggml type of every tensor, by name, in a file quantised as `kind`: a recipe, or the name of one.

    Raises:
        BadInput: an unknown `kind`, or as `types_of`.
    """
    wanted = _wanted_by(shape, _as_recipe(kind))
    return {tensor.name: _fitting_type(wanted[tensor.name], tensor.shape[-1]) for tensor in tensors(shape)}


def needing_imatrix(shape: ModelShape, kind: str | Recipe) -> list[str]:
    """Tensors that the quantiser refuses to make without an importance matrix.

    Raises:
        BadInput: as `tensor_types`.
    """
    wish = _as_recipe(kind)
    return [name for name, type_name in tensor_types(shape, wish).items() if needs_imatrix(name, type_name, wish.kind)]


def predicted_bytes(shape: ModelShape, kind: str | Recipe) -> dict[str, int]:
    """Bytes of the tensors of each part (the names of `gguf_file.PARTS`) in a file quantised as `kind`.

    With a tied head "embedding" is read whole for every token; without, "head" is, and one row of "embedding".
    """
    types = tensor_types(shape, kind)
    totals = dict.fromkeys(PARTS, 0)
    for tensor in tensors(shape):
        totals[part_of(tensor.name)] += tensor_bytes(types[tensor.name], tensor.shape)
    return totals


def fallbacks(shape: ModelShape, kind: str | Recipe) -> list[str]:
    """One line a kind of tensor and type that the quantiser has to replace, and why; empty when none.

    Raises:
        BadInput: as `tensor_types`.
    """
    every = tensors(shape)
    wanted = _wanted_by(shape, _as_recipe(kind))
    found: Counter[tuple[str, int, str, str]] = Counter()
    for tensor in every:
        given = _fitting_type(wanted[tensor.name], tensor.shape[-1])
        if given != wanted[tensor.name]:
            found[_role(tensor.name), tensor.shape[-1], wanted[tensor.name], given] += 1
    return [
        f"{role}: rows of {row} are not whole blocks of {BLOCKS[wanted][0]}, {wanted} becomes {given} ({count} tensors)"
        for (role, row, wanted, given), count in found.items()
    ]


def alignment(kind: str | Recipe) -> int:
    """Multiple that the MLP's neurons (and heads times head_dim) must be of, so that the kind's type fits their rows.

    256 for the K types and most IQ types, 32 for the others. 32 too for F16 and F32, which would take any width: the
    kernels work in such strides. Rows as long as the hidden size are not pruned; `fallbacks` tells of them, and of the
    few tensors for which IQ4_NL asks for a K type.

    Raises:
        BadInput: an unknown `kind`.
    """
    wish = _as_recipe(kind)
    rows_pruned = [type_name for name in _PRUNED_ROWS if (type_name := wish.type_for(name))]
    return max(32, *(BLOCKS[each][0] for each in (quantisation(wish.kind).base, *rows_pruned)))
