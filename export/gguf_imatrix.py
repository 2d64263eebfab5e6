"""Importance matrices in llama.cpp's own file format: the mean square of what each weight's columns are multiplied by.

The quantiser weighs the error of a weight by it. A file holds, for each tensor NAME, `NAME.in_sum2` (sums of squares
over tokens, a column each) and `NAME.counts` (the number of tokens): what llama-imatrix writes and llama-quantize
reads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import BadInput, missing_extra
from edgeprune.files import atomic_file
from edgeprune.runtimes.gguf_file import GgufFile

_SUMS, _COUNTS = ".in_sum2", ".counts"
_REMEDY = "make the importance matrix again"


@dataclass(frozen=True)
class ImportanceMatrix:
    """Mean squared input of every weight's columns.

    Attributes:
        values: by the tensor's name in a GGUF file: (columns,), float32.
        tokens: tokens the means are over.
        text_hash: identity of the text; empty where it is not known.
        model_hash: identity of the model; empty where it is not known.
        source: what the text is, in words.
    """

    values: Mapping[str, NDArray[np.float32]]
    tokens: int
    text_hash: str = ""
    model_hash: str = ""
    source: str = ""


def write_imatrix(matrix: ImportanceMatrix, out: Path, *, chunk: int = 512) -> Path:
    """Write `matrix` as a GGUF file that llama-quantize reads; `chunk` is the tokens of one text, for the record."""
    try:
        import gguf
    except ImportError as error:
        raise missing_extra("gguf", "prune") from error
    with atomic_file(out) as temporary:
        writer = gguf.GGUFWriter(temporary, "imatrix")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [matrix.source or "unknown"])
        writer.add_uint32("imatrix.chunk_size", chunk)
        writer.add_uint32("imatrix.chunk_count", max(1, matrix.tokens // chunk))
        writer.add_string("edgeprune.text_hash", matrix.text_hash)
        writer.add_string("edgeprune.model_hash", matrix.model_hash)
        for name, values in matrix.values.items():
            sums = np.asarray(values, dtype=np.float32)[None] * np.float32(matrix.tokens)
            writer.add_tensor(name + _SUMS, np.ascontiguousarray(sums))
            writer.add_tensor(name + _COUNTS, np.full((1, 1), matrix.tokens, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return out


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read an importance matrix in GGUF format, ours or llama-imatrix's, of a model without experts.

    Raises:
        BadInput: no sound file of this kind, or values that are no means of squares.
    """
    file = GgufFile(path)
    names = [name.removesuffix(_SUMS) for name in file.tensors if name.endswith(_SUMS)]
    if file.get("general.type", str) != "imatrix" or not names:
        raise BadInput("no importance matrix in GGUF format", where=path, remedy="give a file made by llama-imatrix")
    values: dict[str, NDArray[np.float32]] = {}
    tokens = 0
    for name in names:
        sums, counts = _array(file, name + _SUMS), _array(file, name + _COUNTS)
        if counts.size != 1:
            raise BadInput(f"{name} has {counts.size} experts", where=path, remedy="only dense models are supported")
        count = float(counts[0])
        # Sums of squares of a tensor that no token reached are left out: they say nothing.
        if count <= 0:
            continue
        if not np.isfinite(count) or not np.isfinite(sums).all() or (sums < 0).any():
            raise BadInput(f"{name} has values that are no sums of squares", where=path, remedy=_REMEDY)
        values[name] = sums / np.float32(count)
        tokens = max(tokens, int(count))
    datasets: Any = file.metadata.get("imatrix.datasets")
    return ImportanceMatrix(
        values,
        tokens,
        text_hash=file.get("edgeprune.text_hash", str, ""),
        model_hash=file.get("edgeprune.model_hash", str, ""),
        source=", ".join(datasets) if isinstance(datasets, list) else "",
    )


def _array(file: GgufFile, name: str) -> NDArray[np.float32]:
    info = file.tensor(name)
    if info.type != "F32":
        raise BadInput(f"{name} is {info.type}, not F32", where=file.path, remedy=_REMEDY)
    with file.path.open("rb") as data:
        data.seek(info.offset, os.SEEK_SET)
        return np.frombuffer(data.read(info.n_bytes), dtype="<f4").astype(np.float32)
