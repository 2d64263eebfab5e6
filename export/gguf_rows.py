"""Quantises single matrices in memory, with ggml's own kernels: what a type would do to a weight, without a file."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import BadInput, missing_extra
from edgeprune.runtimes.gguf_format import BLOCKS, TYPE_NAMES, tensor_bytes

Floats = NDArray[np.float32]


@functools.cache
def _ggml() -> Any:
    try:
        import llama_cpp
    except ImportError as error:
        raise missing_extra("llama-cpp-python", "llama") from error
    folder = Path(llama_cpp.__file__).parent / "lib"
    found = sorted(p for p in folder.iterdir() if "ggml-base" in p.name)
    if not found:
        raise BadInput("llama-cpp-python has no ggml library", where=folder, remedy="install it again")
    library = ctypes.CDLL(str(found[0]))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    floats = ctypes.POINTER(ctypes.c_float)
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, floats, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, floats
    ]  # fmt: skip
    return library


def quantise_rows(values: Floats, type_name: str, importance: Floats | None = None) -> NDArray[np.uint8]:
    """The blocks of `values` in a ggml type.

    Args:
        values: (rows, columns); the columns fill whole blocks of the type.
        type_name: a ggml type that is not plain floats.
        importance: weight of each column's error, (columns,).

    Returns:
        (rows, bytes of a row).

    Raises:
        BadInput: rows that do not fill whole blocks, or an importance of another length.
    """
    values = np.ascontiguousarray(values, dtype=np.float32)
    rows, columns = values.shape
    if columns % BLOCKS[type_name][0]:
        raise BadInput(f"rows of {columns} are not whole blocks of {BLOCKS[type_name][0]}", where=type_name)
    if importance is not None and importance.shape != (columns,):
        raise BadInput(f"an importance of {importance.shape} for {columns} columns", where=type_name)
    floats = ctypes.POINTER(ctypes.c_float)
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    number = next(number for number, name in TYPE_NAMES.items() if name == type_name)
    out = np.zeros((rows, tensor_bytes(type_name, (1, columns))), dtype=np.uint8)
    _ggml().ggml_quantize_chunk(
        number,
        values.ctypes.data_as(floats),
        out.ctypes.data_as(ctypes.c_void_p),
        0,
        rows,
        columns,
        None if weights is None else weights.ctypes.data_as(floats),
    )
    return out


def dequantise_rows(blocks: NDArray[np.uint8], type_name: str) -> Floats:
    """The values that `quantise_rows`' blocks stand for, (rows, columns)."""
    if type_name == "Q2_0":
        return _q2_0_values(blocks)
    from gguf import GGMLQuantizationType, quants

    values: Floats = quants.dequantize(blocks, GGMLQuantizationType[type_name])
    return values


def _q2_0_values(blocks: NDArray[np.uint8]) -> Floats:
    parts = blocks.reshape(-1, 18)
    scale = parts[:, :2].copy().view("<f2").astype(np.float32)
    codes = (parts[:, 2:, None] >> np.array([0, 2, 4, 6], dtype=np.uint8)) & 3
    values = (codes.reshape(-1, 64).astype(np.float32) - 1) * scale
    return values.reshape(blocks.shape[0], -1)


def best_q2_0(values: Floats, importance: Floats) -> NDArray[np.uint8]:
    """Q2_0 blocks of least weighted squared error, (rows, bytes of a row).

    ggml's own quantiser takes the largest value of 64 as the step, for models trained to have nothing between; of any
    other model it leaves nearly nothing. Here the step, of either sign since the levels -1, 0, 1, 2 are lopsided, is
    searched for and then fitted to its codes by least squares.
    """
    x = np.ascontiguousarray(values, dtype=np.float32).reshape(-1, 64)
    weight = np.ascontiguousarray(np.broadcast_to(importance, values.shape), dtype=np.float32).reshape(-1, 64)
    weight = weight + np.float32(1e-12)
    largest = np.abs(x).max(axis=1)
    best = np.full(len(x), np.inf, dtype=np.float32)
    step = np.zeros(len(x), dtype=np.float32)
    codes = np.zeros(x.shape, dtype=np.float32)
    for sign in (1.0, -1.0):
        for share in np.linspace(0.25, 0.85, 9):
            trial = np.maximum(largest * np.float32(share), np.float32(1e-20)) * np.float32(sign)
            for _ in range(2):  # codes for the step, then the step for the codes
                taken = np.clip(np.rint(x / trial[:, None]), -1, 2)
                weighted = weight * taken
                norm = (weighted * taken).sum(axis=1)
                fitted = (weighted * x).sum(axis=1) / np.where(norm > 0, norm, 1)
                trial = np.where((norm > 0) & (np.abs(fitted) > 1e-20), fitted, trial).astype(np.float32)
            error = (weight * (x - taken * trial[:, None]) ** 2).sum(axis=1)
            better = error < best
            best[better], step[better], codes[better] = error[better], trial[better], taken[better]
    out = np.zeros((len(x), 18), dtype=np.uint8)
    out[:, :2] = step.astype("<f2")[:, None].view(np.uint8)
    packed = (codes + 1).astype(np.uint8).reshape(-1, 16, 4)
    out[:, 2:] = (packed << np.array([0, 2, 4, 6], dtype=np.uint8)).sum(axis=2, dtype=np.uint8)
    return out.reshape(len(values), -1)
