"""Looks into an ONNX file without the onnx package: is its external data safe to map, and what is in it.

A model file is hostile input, and ONNX Runtime has no reader to offer, so this walks the protobuf wire format itself,
only through the messages in which tensors can be. Whatever the walk does not understand is refused.
Sources: https://protobuf.dev/programming-guides/encoding/ and
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto (field numbers).
"""

from __future__ import annotations

import math
import mmap
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from edgeprune.errors import BadInput

MODEL = "model.onnx"
_SIZE_LIMIT = 2 << 30  # bytes; protobuf's own limit of a message
_DEPTH_LIMIT = 32  # messages inside messages
_COUNT_LIMIT = 1 << 20  # nodes and tensors: an empty one is two bytes of the file, and a thousand times that here
_RANK_LIMIT = 16
_VARINT, _I64, _BYTES, _I32 = 0, 1, 2, 5  # wire types; 3 and 4, groups, are not in ONNX

# Message -> {field: message}: every way by which a TensorProto can be reached from a ModelProto.
_MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
# Of those, the fields that hold one message. Protobuf merges repetitions of such a field, so the parts would have to
# be judged together; no writer repeats them.
_SINGULAR = {("model", 7), ("training", 1), ("training", 2), ("attribute", 5), ("attribute", 6), ("attribute", 22)}
_SINGULAR |= {("sparse", 1), ("sparse", 2)}
# TensorProto.DataType -> (name, bits)
_DTYPES = {
    1: ("float32", 32),
    2: ("uint8", 8),
    3: ("int8", 8),
    4: ("uint16", 16),
    5: ("int16", 16),
    6: ("int32", 32),
    7: ("int64", 64),
    9: ("bool", 8),
    10: ("float16", 16),
    11: ("float64", 64),
    12: ("uint32", 32),
    13: ("uint64", 64),
    14: ("complex64", 64),
    15: ("complex128", 128),
    16: ("bfloat16", 16),
    17: ("float8e4m3fn", 8),
    18: ("float8e4m3fnuz", 8),
    19: ("float8e5m2", 8),
    20: ("float8e5m2fnuz", 8),
    21: ("uint4", 4),
    22: ("int4", 4),
    23: ("float4e2m1", 4),
}

_LAYER = re.compile(r"layers\.(\d{1,6})\b")
_DOWN = re.compile(r"down(_proj)?\b")
_TEXT_LIMIT = 1 << 16  # bytes of a name
Field = tuple[int, int, int, int]  # number, wire type, then (value, 0) or (start, stop) of the value's bytes


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file. `location` is None where its data are inside the graph."""

    name: str
    dtype: str
    dimensions: tuple[int, ...]
    nbytes: int
    location: str | None = None
    offset: int = 0


@dataclass(frozen=True)
class Node:
    """One node: operator, name, inputs, and its integer attributes."""

    operator: str
    name: str
    inputs: tuple[str, ...]
    integers: dict[str, int]


@dataclass(frozen=True)
class LayerWidths:
    """Widths of one decoder layer; None where the graph does not show it."""

    heads: int
    kv_heads: int
    neurons: int | None


@dataclass(frozen=True)
class OnnxSummary:
    """What is in an ONNX model.

    `file_bytes` counts the graph and every external file once; initializers may share bytes, so theirs can sum to more.
    `positions` is the rows of the rotary tables, the longest context; None where the graph has none.
    """

    precision: str
    positions: int | None
    layers: tuple[LayerWidths, ...]
    initializers: tuple[Tensor, ...]
    operators: dict[str, int]
    file_bytes: int


@dataclass
class _Found:
    """What a walk collects: every tensor, those among them that are initializers, every node."""

    tensors: list[Tensor] = field(default_factory=list)
    initializers: list[Tensor] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)


def model_file(path: Path) -> Path:
    """The graph of an ONNX model named by its folder or by itself."""
    return path if path.suffix == ".onnx" and not path.is_dir() else path / MODEL


def check_onnx(path: Path) -> None:
    """Refuse an ONNX model, named by its folder or its graph, whose graph asks for data outside of the folder.

    Every external `location` must be the bare name of a regular file in the folder, no link, and offset and length
    must lie inside that file and agree with the tensor's type and dimensions.

    Raises:
        BadInput: it does not, or `model.onnx` is absent, a link, or no valid protobuf.
    """
    _checked(model_file(path))


def summary(path: Path) -> OnnxSummary:
    """What is in an ONNX model, after the checks of `check_onnx`; raises `BadInput` as it does."""
    path = model_file(path)
    found = _checked(path)
    operators = dict(Counter(node.operator for node in found.nodes).most_common())
    external = {tensor.location for tensor in found.tensors if tensor.location is not None}
    size = path.stat().st_size + sum((path.parent / name).stat().st_size for name in external)
    initializers = {tensor.name: tensor for tensor in found.initializers}
    return OnnxSummary(
        _precision(found),
        _positions(found.nodes, initializers),
        _layers(found.nodes, initializers),
        tuple(found.initializers),
        operators,
        size,
    )


def _checked(path: Path) -> _Found:
    if not path.is_file() or path.is_symlink():
        raise BadInput(f"no {path.name}", where=path.parent, remedy=f"give a folder with a {path.name} that is no link")
    size = path.stat().st_size
    if not 0 < size < _SIZE_LIMIT:
        raise BadInput(f"{size} bytes are no ONNX graph", where=path, remedy="export the model again")
    found = _Found()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            _walk(data, 0, size, "model", found, depth=0)
        except _Malformed as error:
            remedy = "export or download the model again"
            raise BadInput(f"not a valid ONNX file ({error})", where=path, remedy=remedy) from error
    for tensor in found.tensors:
        if tensor.location is not None:
            _check_external(path, tensor)
    return found


def _check_external(where: Path, tensor: Tensor) -> None:
    location = str(tensor.location)
    if location in ("", ".", "..") or any(character in location for character in "/\\:\0"):
        raise BadInput(
            f"tensor {tensor.name!r} wants data from {location!r}, outside the model's folder",
            where=where,
            remedy="do not use this file: an honest model keeps its data beside its graph",
        )
    file = where.parent / location
    try:
        status = file.lstat()
    except OSError as error:
        raise BadInput(f"external data file {location!r} cannot be read ({error.strerror})", where=where) from error
    if not stat.S_ISREG(status.st_mode):
        raise BadInput(
            f"external data {location!r} is a link or no regular file",
            where=where,
            remedy="copy the folder with its links resolved (cp -rL)",
        )
    if tensor.offset + tensor.nbytes > status.st_size:
        raise BadInput(
            f"tensor {tensor.name!r} does not lie inside {location!r}, a file of {status.st_size} bytes",
            where=where,
            remedy="export or download the model again",
        )


# The walk.


class _Malformed(Exception):
    """The bytes are no ONNX protobuf."""


def _varint(data: mmap.mmap, at: int, stop: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= stop:
            raise _Malformed("a number ends after its message")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (1 << 64) - 1, at
    raise _Malformed("a number of more than ten bytes")


def _fields(data: mmap.mmap, start: int, stop: int) -> Iterator[Field]:
    """The fields of the message in data[start:stop]."""
    at = start
    while at < stop:
        key, at = _varint(data, at, stop)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at, stop)
            yield number, wire, value, 0
            continue
        if wire == _BYTES:
            length, at = _varint(data, at, stop)
        elif wire in (_I64, _I32):
            length = 8 if wire == _I64 else 4
        else:
            raise _Malformed(f"wire type {wire}")
        if length > stop - at:
            raise _Malformed("a field ends after its message")
        yield number, wire, at, at + length
        at += length


def _walk(data: mmap.mmap, start: int, stop: int, message: str, found: _Found, *, depth: int) -> None:
    """Collect what the message in data[start:stop] holds, itself and the messages inside it."""
    if depth > _DEPTH_LIMIT:
        raise _Malformed(f"messages nested more than {_DEPTH_LIMIT} deep")
    if len(found.nodes) + len(found.tensors) > _COUNT_LIMIT:
        raise _Malformed(f"more than {_COUNT_LIMIT} nodes and tensors")
    if message == "tensor":
        found.tensors.append(_tensor(data, start, stop))
        return
    if message == "node":
        found.nodes.append(_node(data, start, stop))
    seen = set()
    for number, wire, first, last in _fields(data, start, stop):
        inner = _MESSAGES[message].get(number)
        if inner is None:
            continue
        if wire != _BYTES:
            raise _Malformed(f"field {number} of a {message} is no message")
        if (message, number) in _SINGULAR and number in seen:
            raise _Malformed(f"field {number} of a {message} is there twice")
        seen.add(number)
        _walk(data, first, last, inner, found, depth=depth + 1)
        if message == "graph" and inner == "tensor":
            found.initializers.append(found.tensors[-1])


def _text(data: mmap.mmap, field_: Field) -> str:
    _, wire, start, stop = field_
    if wire != _BYTES or stop - start > _TEXT_LIMIT:
        raise _Malformed("a name that is no text")
    try:
        return data[start:stop].decode()
    except UnicodeDecodeError as error:
        raise _Malformed("a name that is not UTF-8") from error


def _integers(data: mmap.mmap, field_: Field) -> list[int]:
    """A repeated int64 field, packed or not."""
    _, wire, start, stop = field_
    if wire == _VARINT:
        return [start]
    if wire != _BYTES:
        raise _Malformed("dimensions that are no integers")
    values = []
    while start < stop:
        value, start = _varint(data, start, stop)
        values.append(value)
        if len(values) > _RANK_LIMIT:
            raise _Malformed(f"a tensor of more than {_RANK_LIMIT} dimensions")
    return values


def _tensor(data: mmap.mmap, start: int, stop: int) -> Tensor:
    dimensions: list[int] = []
    dtype = location = 0
    name = ""
    external: dict[str, str] = {}
    for item in _fields(data, start, stop):
        number, wire, first, last = item
        if number == 1:
            dimensions += _integers(data, item)
            if len(dimensions) > _RANK_LIMIT:
                raise _Malformed(f"a tensor of more than {_RANK_LIMIT} dimensions")
        elif number in (2, 14):
            if wire != _VARINT:
                raise _Malformed("a tensor's type is no number")
            dtype, location = (first, location) if number == 2 else (dtype, first)
        elif number == 8:
            name = _text(data, item)
        elif number == 13:
            if wire != _BYTES:
                raise _Malformed("external data that are no entry")
            entry = {part[0]: _text(data, part) for part in _fields(data, first, last)}
            if entry.get(1, "") in external:
                raise _Malformed(f"tensor {name!r} has external data twice")
            external[entry.get(1, "")] = entry.get(2, "")
    label, bits = _DTYPES.get(dtype, (f"type {dtype}", 0))
    if any(dimension >= 1 << 40 for dimension in dimensions):
        raise _Malformed(f"tensor {name!r} has dimensions {dimensions}")
    nbytes = -(-math.prod(dimensions) * bits // 8)
    if not external and location != 1:
        return Tensor(name, label, tuple(dimensions), nbytes)
    try:
        offset, length = (int(external.get(key, default)) for key, default in (("offset", 0), ("length", nbytes)))
    except ValueError as error:
        raise _Malformed(f"tensor {name!r} has an offset or length that is no number") from error
    if offset < 0 or length != nbytes or not bits:
        raise _Malformed(f"tensor {name!r}, {label} {dimensions}, at offset {offset} with {length} bytes")
    return Tensor(name, label, tuple(dimensions), nbytes, external.get("location", ""), offset)


def _node(data: mmap.mmap, start: int, stop: int) -> Node:
    inputs: list[str] = []
    texts = {3: "", 4: ""}  # name, operator
    integers: dict[str, int] = {}
    for item in _fields(data, start, stop):
        number, _, first, last = item
        if number == 1:
            inputs.append(_text(data, item))
        elif number in texts:
            texts[number] = _text(data, item)
        elif number == 5:
            attribute = {part[0]: part for part in _fields(data, first, last) if part[0] in (1, 3)}
            if 1 in attribute and 3 in attribute and attribute[3][1] == _VARINT:
                integers[_text(data, attribute[1])] = attribute[3][2]
    return Node(texts[4], texts[3], tuple(inputs), integers)


# What the nodes say.


def _precision(found: _Found) -> str:
    """ "int4" or "int8" by the widest use of quantised operators, else the type that holds most weight bytes."""
    bits = Counter(node.integers.get("bits", 4) for node in found.nodes if node.operator == "MatMulNBits")
    if bits:
        return f"int{bits.most_common(1)[0][0]}"
    if any(node.operator in ("DynamicQuantizeMatMul", "MatMulInteger") for node in found.nodes):
        return "int8"
    sizes: Counter[str] = Counter()
    for tensor in found.initializers:
        sizes[tensor.dtype] += tensor.nbytes
    return {"float32": "fp32", "float16": "fp16"}.get(dtype := max(sizes, key=sizes.__getitem__, default="none"), dtype)


def _positions(nodes: list[Node], initializers: dict[str, Tensor]) -> int | None:
    tables = [node.inputs[7] for node in nodes if node.operator == "GroupQueryAttention" and len(node.inputs) > 7]
    found = [initializers[name].dimensions for name in tables if name in initializers]
    return min((dimensions[0] for dimensions in found if dimensions), default=None)


def _layer_of_down(name: str) -> int | None:
    """The number of the layer whose MLP's output projection a name is of; names may be long, so nothing backtracks."""
    match = _LAYER.search(name)
    return int(match[1]) if match and "bias" not in name and _DOWN.search(name, match.end()) else None


def _layers(nodes: list[Node], initializers: dict[str, Tensor]) -> tuple[LayerWidths, ...]:
    """Widths of the layers by the layer's number in the names, () where no attention is a GroupQueryAttention node.

    A layer of which only the MLP is found has 0 heads, one of which only attention is found 0 neurons; a layer without
    both leaves no trace.
    """
    heads: dict[int, tuple[int, int]] = {}
    neurons: dict[int, int] = {}
    for name, tensor in initializers.items():
        if (layer := _layer_of_down(name)) is not None and len(tensor.dimensions) == 2:
            neurons[layer] = tensor.dimensions[0]  # (inputs, outputs), as MatMul takes it
    for node in nodes:
        if node.operator == "GroupQueryAttention" and (match := _LAYER.search(node.name)):
            heads[int(match[1])] = (node.integers.get("num_heads", 0), node.integers.get("kv_num_heads", 0))
        elif node.operator == "MatMulNBits" and (layer := _layer_of_down(node.name)) is not None:
            neurons[layer] = node.integers.get("K", 0)
    if not heads:
        return ()
    unseen = 0 if neurons else None
    found = sorted(heads.keys() | neurons.keys())
    return tuple(LayerWidths(*heads.get(index, (0, 0)), neurons.get(index, unseen)) for index in found)
