"""Constants of the GGUF format: number formats and their blocks, types of metadata, parts of a model.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Any, NamedTuple

# Block length in values and block size in bytes by ggml type: ggml-common.h of ggml 0.25.
BLOCKS: dict[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q8_1": (32, 36),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "Q8_K": (256, 292),
    "IQ2_XXS": (256, 66),
    "IQ2_XS": (256, 74),
    "IQ3_XXS": (256, 98),
    "IQ1_S": (256, 50),
    "IQ4_NL": (32, 18),
    "IQ3_S": (256, 110),
    "IQ2_S": (256, 82),
    "IQ4_XS": (256, 136),
    "I8": (1, 1),
    "I16": (1, 2),
    "I32": (1, 4),
    "I64": (1, 8),
    "F64": (1, 8),
    "IQ1_M": (256, 56),
    "BF16": (1, 2),
    "TQ1_0": (256, 54),
    "TQ2_0": (256, 66),
    "MXFP4": (32, 17),
    "NVFP4": (64, 36),
    "Q1_0": (128, 18),
    "Q2_0": (64, 18),
}
# Numbers of the types in a file; the gaps were given to formats that are gone.
_TYPE_NUMBERS = (*range(4), *range(6, 31), 34, 35, *range(39, 43))
TYPE_NAMES: dict[int, str] = dict(zip(_TYPE_NUMBERS, BLOCKS, strict=True))

PARTS = ("embedding", "attention", "mlp", "norms", "head", "other")


class ValueType(IntEnum):
    """Type numbers of metadata values."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


DTYPES: dict[ValueType, str] = {
    ValueType.UINT8: "<u1",
    ValueType.INT8: "<i1",
    ValueType.UINT16: "<u2",
    ValueType.INT16: "<i2",
    ValueType.UINT32: "<u4",
    ValueType.INT32: "<i4",
    ValueType.FLOAT32: "<f4",
    ValueType.BOOL: "?",
    ValueType.UINT64: "<u8",
    ValueType.INT64: "<i8",
    ValueType.FLOAT64: "<f8",
}


class Value(NamedTuple):
    """A metadata value with its type in the file, as it takes to write it again."""

    value: Any
    type: ValueType
    item: ValueType | None = None  # of an array


def tensor_bytes(type_name: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of ggml type `type_name` and row-major `shape`; the row length must fill whole blocks."""
    block, size = BLOCKS[type_name]
    return math.prod(shape[:-1]) * (shape[-1] // block) * size


def part_of(tensor: str) -> str:
    """Which of `PARTS` a llama.cpp tensor name belongs to."""
    name = tensor.split(".")[2] if tensor.startswith("blk.") and tensor.count(".") >= 2 else tensor.split(".")[0]
    if name == "token_embd":
        return "embedding"
    if name == "output":
        return "head"
    if name.endswith("norm"):
        return "norms"
    if name.startswith("attn_"):
        return "attention"
    return "mlp" if name.startswith("ffn_") else "other"
