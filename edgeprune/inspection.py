"""`inspect`: what is in a GGUF file, an ONNX folder or a checkpoint, read from headers without loading the model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeprune.checkpoint import UNUSED, Checkpoint
from edgeprune.errors import BadInput
from edgeprune.runtimes import runtime_for
from edgeprune.runtimes.gguf_file import GgufFile
from edgeprune.runtimes.onnx_file import summary
from edgeprune.shape import LayerShape

_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Inspection:
    """What is in a model file. Sizes in bytes; `parts` and `types` are empty where the format does not tell."""

    path: str
    format: str
    family: str
    parameters: int | None
    layers: tuple[LayerShape, ...]
    bytes_by_part: Mapping[str, int]
    types: Mapping[str, int]  # number of tensors by type
    file_bytes: int
    facts: Mapping[str, str]


def inspect(path: Path) -> Inspection:
    """Read the headers of `path`.

    Raises:
        BadInput: not a model, or a broken one.
    """
    kind = runtime_for(path)
    if kind == "executorch":
        raise BadInput(
            "an ExecuTorch program says nothing of its widths", where=path, remedy="inspect what it is made of"
        )
    return {"llamacpp": _gguf, "onnxruntime": _onnx, "pytorch": _checkpoint}[kind](path)


def _gguf(path: Path) -> Inspection:
    file = GgufFile(path)
    architecture = file.architecture
    layers = tuple(LayerShape(w.heads, w.kv_heads, w.neurons) for w in file.widths())
    facts = {
        key: str(value)
        for key, value in file.metadata.items()
        if isinstance(value, (str, int, float, bool)) and not key.endswith(("chat_template", "block_count"))
    }
    return Inspection(
        path=str(path),
        format="GGUF",
        family=architecture,
        parameters=file.parameters,
        layers=layers,
        bytes_by_part=file.bytes_by_part(),
        types=file.type_counts(),
        file_bytes=path.stat().st_size,
        facts=facts,
    )


def _onnx(path: Path) -> Inspection:
    found = summary(path)
    return Inspection(
        path=str(path),
        format="ONNX",
        family="decoder graph",
        parameters=None,  # block-quantised tensors do not tell how much of them is padding
        layers=tuple(LayerShape(w.heads, w.kv_heads, w.neurons or 0) for w in found.layers),
        bytes_by_part={},
        types=dict(Counter(tensor.dtype for tensor in found.initializers)),
        file_bytes=found.file_bytes,
        facts={
            "precision": found.precision,
            "longest context": str(found.positions),
            "operators": ", ".join(f"{name} {count}" for name, count in found.operators.items()),
        },
    )


def _checkpoint(path: Path) -> Inspection:
    checkpoint = Checkpoint(path)
    shape = checkpoint.shape
    parts = dict.fromkeys(("embedding", "attention", "mlp", "norms", "head"), 0)
    for name in (each for each in checkpoint.names if not each.endswith(UNUSED)):
        size = math.prod(checkpoint.dimensions(name)) * _DTYPE_BYTES[checkpoint.dtype(name)]
        parts[_part_of(name, checkpoint)] += size
    return Inspection(
        path=str(path),
        format="Hugging Face checkpoint",
        family=shape.family.name,
        parameters=sum(math.prod(checkpoint.dimensions(name)) for name in checkpoint.names),
        layers=shape.layers,
        bytes_by_part=parts,
        types=dict(Counter(checkpoint.dtype(name) for name in checkpoint.names)),
        file_bytes=sum(file.stat().st_size for file in checkpoint.files),
        facts={
            "hidden size": str(shape.hidden),
            "head_dim": str(shape.head_dim),
            "vocabulary": str(shape.vocab),
            "head": "tied to the embedding" if shape.tied else "of its own",
            "context": str(shape.max_positions),
        },
    )


def _part_of(name: str, checkpoint: Checkpoint) -> str:
    family = checkpoint.shape.family
    module = name.rpartition(".")[0]
    if module == family.embedding:
        return "embedding"
    if module == family.head:
        return "head"
    inside = module.removeprefix(f"{family.layers}.").partition(".")[2]
    if inside in {getattr(family, role) for role in (*family.attention_inputs, "output")}:
        return "attention"
    if inside in {getattr(family, role) for role in (*family.mlp_inputs, "down")}:
        return "mlp"
    if "norm" in module:
        return "norms"
    raise BadInput(f"tensor {name!r} belongs to no part of family {family.name}", where=checkpoint.folder)
