"""llama.cpp's mixtures: which type each tensor gets in a file of a kind, before it is asked whether it fits the row.

A mixture is a base type and a few roles that get more bits, or fewer. The rules are facts of llama.cpp's
`src/llama-quant.cpp` at the version the tests run with; they see a tensor's role, how many of its role came before it,
and whether there is an importance matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgeprune.errors import unknown
from edgeprune.runtimes.gguf_file import BLOCKS


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
        Quantisation("Q5_1", 9, "Q5_1"),
        Quantisation("Q5_K_M", 17, "Q5_K"),
        Quantisation("Q5_K_S", 16, "Q5_K"),
        Quantisation("Q5_0", 8, "Q5_0"),
        Quantisation("Q4_1", 3, "Q4_1"),
        Quantisation("Q4_K_M", 15, "Q4_K"),
        Quantisation("Q4_K_S", 14, "Q4_K"),
        Quantisation("Q4_0", 2, "Q4_0"),
        Quantisation("IQ4_NL", 25, "IQ4_NL"),
        Quantisation("IQ4_XS", 30, "IQ4_XS"),
        Quantisation("Q3_K_L", 13, "Q3_K"),
        Quantisation("Q3_K_M", 12, "Q3_K"),
        Quantisation("IQ3_M", 27, "IQ3_S"),
        Quantisation("Q3_K_S", 11, "Q3_K"),
        Quantisation("IQ3_S", 26, "IQ3_S"),
        Quantisation("IQ3_XS", 22, "IQ3_S"),
        Quantisation("IQ3_XXS", 23, "IQ3_XXS"),
        Quantisation("Q2_K", 10, "Q2_K"),
        Quantisation("Q2_K_S", 21, "Q2_K"),
        Quantisation("IQ2_M", 29, "IQ2_S"),
        Quantisation("IQ2_S", 28, "IQ2_XS"),
        Quantisation("IQ2_XS", 20, "IQ2_XS"),
        Quantisation("IQ2_XXS", 19, "IQ2_XXS"),
        Quantisation("IQ1_M", 31, "IQ1_M"),
        Quantisation("IQ1_S", 24, "IQ1_S"),
        # For models trained with two-bit or ternary weights; others lose nearly everything.
        Quantisation("Q2_0", 41, "Q2_0"),
        Quantisation("TQ2_0", 37, "TQ2_0"),
        Quantisation("TQ1_0", 36, "TQ1_0"),
    )
}

# Types without an importance matrix of which the quantiser refuses to make anything (but an embedding or head).
BLIND_TYPES = frozenset({"IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"})


_BLIND_ANYWHERE = frozenset({"IQ2_XXS", "IQ2_XS", "IQ1_S"})  # for these ggml ends the process


def quantisation(kind: str) -> Quantisation:
    """The entry of `QUANTISATIONS`; raises `BadInput` naming the nearest for an unknown one."""
    if kind not in QUANTISATIONS:
        raise unknown("quantisation", kind, QUANTISATIONS)
    return QUANTISATIONS[kind]


def needs_imatrix(tensor: str, type_name: str, kind: str) -> bool:
    """Whether the quantiser refuses to make `tensor` a `type_name` in a file of `kind` without an importance matrix."""
    if tensor in ("token_embd.weight", "output.weight"):
        return type_name in _BLIND_ANYWHERE
    return type_name in BLIND_TYPES or (type_name == "Q2_K" and kind == "Q2_K_S")


@dataclass(frozen=True)
class Place:
    """Where a tensor stands, as far as the rules look.

    Attributes:
        role: the part of its name that says what it does, e.g. "ffn_down".
        index: how many tensors of its role come before it. Layers without one do not count.
        count: what `index` is compared with: the number of layers or, for values, of layers with attention.
        group: query heads that share a key/value head in the first layer.
        row: its row length.
        imatrix: whether there is an importance matrix.
        extra_value_bits: the model is one of the 70B class, whose attn_v is an eighth of attn_q.
    """

    role: str
    index: int
    count: int
    group: int
    row: int
    imatrix: bool
    extra_value_bits: bool = False

    @property
    def first_eighth(self) -> bool:
        """Whether it is in the first eighth of the model, rounded down."""
        return self.index < self.count // 8

    @property
    def more_bits(self) -> bool:
        """What the medium mixtures spend more on: the first and last eighth and every third between."""
        return self.first_eighth or self.index >= 7 * self.count // 8 or (self.index - self.count // 8) % 3 == 2


_LOWEST = ("IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")  # mixtures with rules of their own


def _head(kind: str, base: str, place: Place) -> str:
    if base == "Q8_0":
        return base
    if kind in (*_LOWEST, "IQ3_XXS"):
        # Asked before the type is chosen, not after: such a row gets Q8_0, not what stands in for Q5_K.
        return "Q5_K" if place.row % BLOCKS[base][0] == 0 else "Q8_0"
    return "Q6_K"


def _embedding(kind: str, base: str, _place: Place) -> str:
    by_kind = dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"), "Q2_K")
    by_kind |= dict.fromkeys(("IQ2_S", "IQ2_M", "IQ3_XXS"), "IQ3_S") | dict.fromkeys(("TQ1_0", "TQ2_0", "Q2_0"), "Q4_K")
    return by_kind.get(kind, base)


def _value(kind: str, base: str, place: Place) -> str:
    if kind in _LOWEST:
        if place.group >= 4:
            return "Q4_K"
        return "IQ3_S" if kind in ("IQ2_S", "IQ2_M") else "Q2_K"
    chosen = base
    if kind in ("Q2_K", "Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S") and place.group >= 4:
        chosen = "Q4_K"
    elif kind == "Q2_K":
        chosen = "Q3_K"
    elif kind == "IQ3_XXS" and not place.imatrix:
        chosen = "IQ3_S"
    elif kind == "IQ3_M":
        chosen = "Q4_K"
    elif kind == "Q3_K_M":
        chosen = "Q5_K" if place.index < 2 else "Q4_K"
    elif (
        kind == "Q3_K_L"
        or (kind in ("IQ4_NL", "IQ4_XS") and place.group >= 4)
        or (kind == "Q4_K_S" and place.index < 4)
    ):
        chosen = "Q5_K"
    elif kind in ("Q4_K_M", "Q5_K_M") and place.more_bits:
        chosen = "Q6_K"
    if place.extra_value_bits and chosen in ("Q3_K", "Q4_K"):
        chosen = "Q5_K"
    return chosen


def _query_or_key(kind: str, base: str, _place: Place) -> str:
    return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(kind, base)


def _output(kind: str, base: str, _place: Place) -> str:
    by_kind = {"IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S", "IQ3_XXS": "IQ3_S"}
    by_kind |= {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "IQ3_M": "Q4_K", "Q3_K_L": "Q5_K"}
    return by_kind.get(kind, base)


def _up(kind: str, base: str, place: Place) -> str:
    between = place.count // 8 <= place.index < 7 * place.count // 8
    return "IQ3_XXS" if kind == "IQ3_XS" and between else base


def _down(kind: str, base: str, place: Place) -> str:
    everywhere = {"Q2_K": "Q3_K", "Q3_K_L": "Q5_K"}
    first_eighth = dict.fromkeys(("IQ2_S", "IQ2_M"), "IQ3_S") | dict.fromkeys(("IQ2_XS", "IQ2_XXS"), "Q2_K")
    first_eighth |= dict.fromkeys(("IQ1_M", "IQ1_S"), "Q2_K") | {"Q2_K_S": "Q4_K", "IQ3_M": "Q4_K", "Q4_K_S": "Q5_K"}
    if place.imatrix:
        first_eighth |= {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}
    else:
        everywhere["IQ3_XXS"] = "Q4_K" if place.first_eighth else "Q3_K"
        first_eighth |= {"IQ4_NL": "Q5_K", "IQ4_XS": "Q5_K"}
    if kind in everywhere:
        return everywhere[kind]
    if kind == "Q3_K_M":
        return "Q5_K" if place.index < place.count // 16 else "Q4_K"
    if kind in ("Q4_K_M", "Q5_K_M") and place.more_bits:
        return "Q6_K"
    return first_eighth.get(kind, base) if place.first_eighth else base


_RULES: dict[str, Callable[[str, str, Place], str]] = {
    "token_embd": _embedding,
    "output": _head,
    "attn_q": _query_or_key,
    "attn_k": _query_or_key,
    "attn_v": _value,
    "attn_qkv": _value,
    "attn_output": _output,
    "ffn_gate": _up,
    "ffn_up": _up,
    "ffn_down": _down,
}


def mixture_type(kind: str, place: Place) -> str:
    """The type that the mixture `kind` wants for a weight at `place`.

    Raises:
        BadInput: an unknown `kind`.
    """
    base = quantisation(kind).base
    if base in ("F32", "F16") or place.role not in _RULES:
        return base
    return _RULES[place.role](kind, base, place)
