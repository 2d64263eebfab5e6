"""Quantisation in process: types told in advance are the types written, for every mixture, recipe and row length."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeLlama
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import BadInput
from edgeprune.export.gguf_imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from edgeprune.export.gguf_quantise import quantise
from edgeprune.export.gguf_types import (
    QUANTISATIONS,
    TENSOR_TYPES,
    Recipe,
    alignment,
    needing_imatrix,
    predicted_bytes,
    recipe,
    tensor_types,
    tensors,
)
from edgeprune.export.gguf_writer import write_gguf
from edgeprune.families import FAMILIES
from edgeprune.imatrix import cached_importance_matrix, importance_matrix
from edgeprune.models import Model, load
from edgeprune.runtimes.gguf_file import GgufFile
from edgeprune.shape import LayerShape, ModelShape

SHAPES: dict[str, dict[str, Any]] = {
    "rows of 256, one KV head": {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "tie_word_embeddings": False,
    },
    "rows of 256, groups of two": {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 9,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
    },
    "rows of 64 and 256": {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 8,
        "tie_word_embeddings": False,
    },
    "rows of 96 and 160, tied": {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2},
    "rows of 72 and 203": {"hidden_size": 72, "intermediate_size": 203, "num_hidden_layers": 2},
}


def flat_matrix(shape: ModelShape) -> ImportanceMatrix:
    """An importance matrix that finds every column as important as the next."""
    return ImportanceMatrix(
        {t.name: np.ones(t.shape[-1], dtype=np.float32) for t in tensors(shape) if len(t.shape) > 1}, tokens=512
    )


def written_types(path: Path) -> dict[str, str]:
    return {name: info.type for name, info in GgufFile(path).tensors.items()}


@pytest.mark.parametrize("with_imatrix", [False, True], ids=["blind", "imatrix"])
@pytest.mark.parametrize("case", SHAPES)
def test_every_mixture_is_as_told(case: str, with_imatrix: bool, make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = make_llama(**SHAPES[case])
    shape = Checkpoint(folder).shape
    matrix = flat_matrix(shape) if with_imatrix else None
    source = write_gguf(folder, tmp_path / "full.gguf", dtype="F32")
    for kind in QUANTISATIONS:
        wish = Recipe(kind, imatrix=with_imatrix)
        out = tmp_path / f"{kind}.gguf"
        if needing_imatrix(shape, wish) and matrix is None:
            with pytest.raises(BadInput, match="needs an importance matrix"):
                quantise(source, out, kind=kind, threads=1)
            assert not out.exists()
            continue
        quantise(source, out, kind=kind, threads=1, imatrix=matrix)
        assert written_types(out) == tensor_types(shape, wish), kind
        assert GgufFile(out).bytes_by_part() == predicted_bytes(shape, wish)
        assert GgufFile(out).metadata["general.file_type"] == QUANTISATIONS[kind].file_type
        out.unlink()
