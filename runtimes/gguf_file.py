"""Reads a GGUF file as what it is: hostile input. Standard library and numpy only.

Nothing is believed before it is checked: every count is bounded by the bytes that are left, every string, array and
tensor lies inside the file, sizes are Python integers (no overflow). C++ loaders have had holes in just these places,
so a file goes through here before any of them sees it.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import BadInput
from edgeprune.runtimes.gguf_format import BLOCKS, DTYPES, PARTS, TYPE_NAMES, Value, ValueType, part_of, tensor_bytes

__all__ = ["BLOCKS", "PARTS", "GgufFile", "TensorInfo", "Value", "ValueType", "Widths", "part_of", "tensor_bytes"]

_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_MAX_NAME = 63  # bytes; GGML_MAX_NAME less the final zero
_MAX_KEY = 65535  # bytes; the format's own limit
_MAX_STRINGS = 1 << 24  # of one array: far above any vocabulary, far below what would fill the memory
_REMEDY = "download or convert the file again"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: where it is and what it holds."""

    name: str
    shape: tuple[int, ...]  # row-major as in numpy: (rows, row length); the reverse of the order in the file
    type: str  # a key of `BLOCKS`
    offset: int  # bytes from the start of the file
    n_bytes: int

    @property
    def n_values(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Widths:
    """Widths of one layer as the metadata states them."""

    heads: int
    kv_heads: int
    neurons: int


class _Cursor:
    """A position in the mapped file that never leaves it."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def fail(self, what: str) -> NoReturn:
        raise BadInput(what, where=self.path, remedy=_REMEDY)

    def take(self, count: int, what: str) -> int:
        """Move over `count` bytes; the position they start at."""
        if count > len(self.data) - self.at:
            self.fail(f"truncated, or not what it says: {what} at byte {self.at} runs past the end")
        start = self.at
        self.at += count
        return start

    def number(self, code: str, what: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str, limit: int) -> str:
        length = self.number("Q", f"length of {what}")
        if length > limit:
            self.fail(f"{what} is {length} bytes long, the limit is {limit}")
        start = self.take(length, what)
        # Values may hold bytes that are no text; surrogates keep them, so that a copy is verbatim.
        return self.data[start : start + length].decode("utf-8", "surrogateescape")

    def count(self, code: str, least: int, what: str) -> int:
        """A number of items of at least `least` bytes each: more than the rest of the file can hold is a lie."""
        count: int = self.number(code, what)
        if count * least > len(self.data) - self.at:
            self.fail(f"{what} is {count}, more than the file can hold")
        return count


class GgufFile:
    """A checked GGUF file.

    Attributes:
        path: the file.
        version: 2 or 3.
        metadata: values by key: int, float, bool, str, numpy array, or list of str.
        types: by key, the value's type and, for an array, the type of its items.
        tensors: tensors by name, in the file's order.

    Args:
        path: the file.

    Raises:
        BadInput: there is no such file, it is no GGUF file, or anything in it does not add up.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise BadInput("no such file", where=path)
        size = path.stat().st_size
        if size < 24:
            raise BadInput("too short for a GGUF file", where=path, remedy=_REMEDY)
        self.metadata: dict[str, Any] = {}
        self.types: dict[str, tuple[ValueType, ValueType | None]] = {}
        self.tensors: dict[str, TensorInfo] = {}
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            self._read(_Cursor(data, path))

    def _read(self, cursor: _Cursor) -> None:
        start = cursor.take(4, "magic")
        if cursor.data[start:4] != b"GGUF":
            raise BadInput(
                "not a GGUF file (no magic)", where=self.path, remedy="give a .gguf file or a Hugging Face folder"
            )
        self.version: int = cursor.number("I", "version")
        if self.version & 0xFFFF == 0 and self.version:
            raise BadInput("a big-endian GGUF file", where=self.path, remedy="convert it to little-endian")
        if self.version not in (2, 3):
            raise BadInput(f"GGUF version {self.version}", where=self.path, remedy="versions 2 and 3 are supported")
        n_tensors = cursor.count("Q", 24, "number of tensors")
        n_values = cursor.count("Q", 13, "number of metadata values")
        for _ in range(n_values):
            self._read_value(cursor)
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            cursor.fail(f"general.alignment is {alignment!r}, not a power of two")
        self.alignment: int = alignment
        seen: set[str] = set()
        headers = [self._read_tensor(cursor, seen) for _ in range(n_tensors)]
        data_start = -(-cursor.at // alignment) * alignment
        for name, shape, kind, offset in headers:
            n_bytes = tensor_bytes(kind, shape)
            if offset % alignment:
                cursor.fail(f"tensor {name!r} is not aligned to {alignment} bytes")
            if data_start + offset + n_bytes > len(cursor.data):
                cursor.fail(f"truncated: tensor {name!r} does not lie inside the file")
            self.tensors[name] = TensorInfo(name, shape, kind, data_start + offset, n_bytes)
        for before, after in itertools.pairwise(sorted(self.tensors.values(), key=lambda tensor: tensor.offset)):
            if before.offset + before.n_bytes > after.offset:
                cursor.fail(f"tensors {before.name!r} and {after.name!r} overlap")

    def _read_value(self, cursor: _Cursor) -> None:
        key = cursor.string("a metadata key", _MAX_KEY)
        if not key or not key.isprintable():  # a surrogate from broken UTF-8 is not printable either
            cursor.fail(f"metadata key {key!r} is not printable text")
        if key in self.metadata:
            cursor.fail(f"metadata key {key!r} is there twice")
        kind = self._value_type(cursor, key)
        if kind is not ValueType.ARRAY:
            self.metadata[key], self.types[key] = self._scalar(cursor, key, kind), (kind, None)
            return
        item = self._value_type(cursor, key)
        if item is ValueType.ARRAY:
            cursor.fail(f"metadata value {key!r} is an array of arrays")
        least = 8 if item is ValueType.STRING else np.dtype(DTYPES[item]).itemsize
        count = cursor.count("Q", least, f"length of array {key!r}")
        self.types[key] = (kind, item)
        if item is ValueType.STRING:
            if count > _MAX_STRINGS:
                cursor.fail(f"array {key!r} has {count} strings, the limit is {_MAX_STRINGS}")
            self.metadata[key] = [cursor.string(f"an item of {key!r}", len(cursor.data)) for _ in range(count)]
            return
        start = cursor.take(count * least, f"array {key!r}")
        raw = cursor.data[start : start + count * least]
        if item is ValueType.BOOL:
            self.metadata[key] = np.frombuffer(raw, "u1") != 0
        else:
            self.metadata[key] = np.frombuffer(raw, DTYPES[item])

    def _value_type(self, cursor: _Cursor, key: str) -> ValueType:
        number = cursor.number("I", f"type of {key!r}")
        if number not in ValueType.__members__.values():
            cursor.fail(f"metadata value {key!r} has unknown type {number}")
        return ValueType(number)

    def _scalar(self, cursor: _Cursor, key: str, kind: ValueType) -> Any:
        if kind is ValueType.STRING:
            return cursor.string(f"value of {key!r}", len(cursor.data))
        dtype = np.dtype(DTYPES[kind])
        start = cursor.take(dtype.itemsize, f"value of {key!r}")
        value = np.frombuffer(cursor.data[start : start + dtype.itemsize], "u1" if kind is ValueType.BOOL else dtype)
        return bool(value[0]) if kind is ValueType.BOOL else value[0].item()

    def _read_tensor(self, cursor: _Cursor, seen: set[str]) -> tuple[str, tuple[int, ...], str, int]:
        name = cursor.string("a tensor name", _MAX_NAME)
        if not name or not name.isprintable():
            cursor.fail(f"tensor name {name!r} is not printable text")
        if name in seen:
            cursor.fail(f"tensor {name!r} is there twice")
        seen.add(name)
        n_dimensions = cursor.number("I", f"number of dimensions of {name!r}")
        if not 1 <= n_dimensions <= _MAX_DIMENSIONS:
            cursor.fail(f"tensor {name!r} has {n_dimensions} dimensions, not 1 to {_MAX_DIMENSIONS}")
        shape = tuple(cursor.number("Q", f"shape of {name!r}") for _ in range(n_dimensions))[::-1]
        if math.prod(shape) == 0 or math.prod(shape) >= 1 << 63:
            cursor.fail(f"tensor {name!r} has an impossible shape {shape}")
        number = cursor.number("I", f"type of {name!r}")
        if number not in TYPE_NAMES:
            cursor.fail(f"tensor {name!r} has unknown type {number}")
        kind = TYPE_NAMES[number]
        if shape[-1] % BLOCKS[kind][0]:
            cursor.fail(f"tensor {name!r}: rows of {shape[-1]} are not whole blocks of {kind}")
        return name, shape, kind, cursor.number("Q", f"offset of {name!r}")

    def tensor_bytes(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor, (n_bytes,), mapped from the file and read when touched.

        Raises:
            BadInput: there is no such tensor.
        """
        info = self.tensor(name)
        return np.memmap(self.path, np.uint8, "r", info.offset, (info.n_bytes,))

    def tensor(self, name: str) -> TensorInfo:
        """Where a tensor is; raises `BadInput` when there is none of that name."""
        if name not in self.tensors:
            raise BadInput(f"no tensor {name!r}", where=self.path, remedy=_REMEDY)
        return self.tensors[name]

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A metadata value of Python type `kind` (an int counts as a float), or `default` when it is absent.

        Raises:
            BadInput: it is there with another type.
        """
        value = self.metadata.get(key)
        if value is None:
            return default
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise BadInput(f"{key} is not of type {kind.__name__}", where=self.path, remedy=_REMEDY)
        return value

    def values(self, prefix: str) -> dict[str, Value]:
        """The metadata whose keys start with `prefix`, with types."""
        return {key: Value(value, *self.types[key]) for key, value in self.metadata.items() if key.startswith(prefix)}

    @property
    def architecture(self) -> str:
        """`general.architecture`.

        Raises:
            BadInput: it is absent.
        """
        name = self.get("general.architecture", str)
        if not name:
            raise BadInput("no general.architecture", where=self.path, remedy=_REMEDY)
        return str(name)

    def per_layer(self, key: str) -> list[int]:
        """`<architecture>.<key>` for each layer: a scalar counts for all of them.

        Raises:
            BadInput: it is absent, negative, not whole, or an array of another length than the number of layers.
        """
        layers = self.get(f"{self.architecture}.block_count", int, 0)
        if not 0 < layers <= 4096:
            raise BadInput(f"{self.architecture}.block_count is {layers}", where=self.path, remedy=_REMEDY)
        value = self.metadata.get(f"{self.architecture}.{key}")
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and len(value) == layers:
            values = [int(item) for item in value]
        elif type(value) is int:
            values = [value] * layers
        else:
            raise BadInput(f"{self.architecture}.{key} is absent or unusable", where=self.path, remedy=_REMEDY)
        if min(values) < 0:
            raise BadInput(f"{self.architecture}.{key} is negative", where=self.path, remedy=_REMEDY)
        return values

    def widths(self) -> list[Widths]:
        """Heads, key/value heads and neurons of each layer; raises `BadInput` as `per_layer` does."""
        heads = self.per_layer("attention.head_count")
        grouped = f"{self.architecture}.attention.head_count_kv" in self.metadata
        kv_heads = self.per_layer("attention.head_count_kv") if grouped else heads
        return [Widths(*each) for each in zip(heads, kv_heads, self.per_layer("feed_forward_length"), strict=True)]

    @property
    def parameters(self) -> int:
        """Number of values in all tensors."""
        return sum(tensor.n_values for tensor in self.tensors.values())

    def bytes_by_part(self) -> dict[str, int]:
        """Bytes of the tensors of each of `PARTS`."""
        totals = dict.fromkeys(PARTS, 0)
        for tensor in self.tensors.values():
            totals[part_of(tensor.name)] += tensor.n_bytes
        return totals

    def type_counts(self) -> dict[str, int]:
        """Number of tensors of each ggml type, the most frequent first."""
        return dict(Counter(tensor.type for tensor in self.tensors.values()).most_common())

    def bytes_by_type(self, among: Callable[[TensorInfo], bool] = lambda _: True) -> dict[str, int]:
        """Bytes in tensors of each ggml type, of those `among` says yes to."""
        totals: Counter[str] = Counter()
        for tensor in filter(among, self.tensors.values()):
            totals[tensor.type] += tensor.n_bytes
        return dict(totals)

    def check_loadable(self) -> None:
        """Check what would end llama.cpp with an abort, not an error: a vocabulary with doubles, a part of a split.

        Raises:
            BadInput: one of these.
        """
        if self.get("split.count", int, 0) > 1:
            raise BadInput("one part of a split model", where=self.path, remedy="merge the parts with llama-gguf-split")
        tokens = self.metadata.get("tokenizer.ggml.tokens", [])
        if not isinstance(tokens, list) or len(set(tokens)) != len(tokens):
            raise BadInput("the vocabulary has the same token twice", where=self.path, remedy=_REMEDY)
