"""Block quantisation of weights for ONNX Runtime's `MatMulNBits` and `GatherBlockQuantized`. numpy only.

A weight (N, K), N outputs and K inputs, is cut along K into blocks of `block` values; each block has a float32 scale
and a zero point, and `value = (code - zero_point) * scale`. Codes are packed little end first: with 4 bits, code 0 in
the low half of byte 0. Layout: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#commicrosoftmatmulnbits
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BITS = (4, 8)
_CHUNK = 1 << 20  # values quantised at a time: bounds the temporaries, whatever the matrix
_RANGES = tuple(np.linspace(0.8, 1.04, 9).tolist())  # of a block's own; more candidates gain no more than 2 % of error


@dataclass(frozen=True)
class Blocks:
    """A quantised matrix (rows, columns).

    `codes` is (rows, blocks, block * bits / 8) bytes; `scales` (rows, blocks); `zero_points`, packed as the codes are,
    (rows, ceil(blocks * bits / 8)) bytes, or None where every zero point is 2^(bits - 1).
    """

    bits: int
    block: int
    columns: int
    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None

    @property
    def rows(self) -> int:
        """Outputs of the matrix."""
        return len(self.codes)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.zero_points is None else self.zero_points.nbytes)


def quantise(weight: NDArray[np.float32], *, bits: int, block: int, symmetric: bool) -> Blocks:
    """Quantise a weight (N, K) by rounding to nearest; K is padded with zeros to whole blocks.

    Symmetric: the value of largest magnitude gets code 0 (one more step on its side than on the other), as in
    llama.cpp's Q4_0, and zero gets exactly 2^(bits - 1). Asymmetric: the block's range, widened to hold zero, gets all
    2^bits codes, and zero is one of them; with 4 bits the range is cut or stretched where that lessens the squared
    error (by 7 % for normal weights).

    Raises:
        ValueError: `bits` is neither 4 nor 8, or `block` is no power of two of at least 16.
    """
    if bits not in BITS:
        raise ValueError(f"bits must be one of {BITS}, found {bits}")
    if block < 16 or block & (block - 1):
        raise ValueError(f"block must be a power of two of at least 16, found {block}")
    rows, columns = weight.shape
    count = -(-columns // block)
    codes = np.empty((rows, count, block * bits // 8), np.uint8)
    scales = np.empty((rows, count), np.float32)
    zeros = None if symmetric else np.empty((rows, -(-count * bits // 8)), np.uint8)
    step = max(1, _CHUNK // (count * block))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        padded = np.zeros((part.stop - start, count * block), np.float32)
        padded[:, :columns] = weight[part]
        values = padded.reshape(-1, count, block)
        scales[part], zero = _symmetric(values, bits) if symmetric else _asymmetric(values, bits)
        levels = np.rint(values * _inverse(scales[part])[..., None]) + zero[..., None]
        codes[part] = _pack(np.clip(levels, 0, (1 << bits) - 1).astype(np.uint8), bits)
        if zeros is not None:
            zeros[part] = _pack(zero.astype(np.uint8), bits)
    return Blocks(bits, block, columns, codes, scales, zeros)


def dequantise(blocks: Blocks) -> NDArray[np.float32]:
    """The weight (N, K), float32, that the runtime computes with."""
    rows, count = blocks.scales.shape
    levels = _unpack(blocks.codes, blocks.bits).astype(np.float32)
    if blocks.zero_points is None:
        levels -= 1 << (blocks.bits - 1)
    else:
        levels -= _unpack(blocks.zero_points, blocks.bits)[:, :count, None]
    levels *= blocks.scales[..., None]
    return levels.reshape(rows, count * blocks.block)[:, : blocks.columns]


def _symmetric(values: NDArray[np.float32], bits: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    largest = np.take_along_axis(values, np.abs(values).argmax(axis=-1)[..., None], axis=-1)[..., 0]
    middle = 1 << (bits - 1)
    return largest / np.float32(-middle), np.full(largest.shape, middle, np.float32)


def _asymmetric(values: NDArray[np.float32], bits: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scale and zero point by the smallest squared error among a few shrunk or widened ranges of each block."""
    top = (1 << bits) - 1
    low, high = np.minimum(values.min(axis=-1), 0), np.maximum(values.max(axis=-1), 0)
    best_scale = best_zero = np.zeros_like(low)
    best_error = np.full_like(low, np.inf)
    for factor in _RANGES if bits == 4 else (1.0,):
        scale = (high - low) * np.float32(factor / top)
        inverse = _inverse(scale)
        zero = np.clip(np.rint(-low * np.float32(factor) * inverse), 0, top)
        steps = values * inverse[..., None]
        error = np.clip(np.rint(steps), -zero[..., None], top - zero[..., None]) - steps
        squared = np.einsum("...i,...i->...", error, error) * scale * scale
        better = squared < best_error
        best_error = np.where(better, squared, best_error)
        best_scale, best_zero = np.where(better, scale, best_scale), np.where(better, zero, best_zero)
    return best_scale, best_zero


def _inverse(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 / scale, and 0 for a block of zeros (or of values too small to divide by)."""
    usable = np.abs(scale) > np.finfo(np.float32).tiny
    return np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=usable)


def _pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    return codes[..., 0::2] | codes[..., 1::2] << np.uint8(4)


def _unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
