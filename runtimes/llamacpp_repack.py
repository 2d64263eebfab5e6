"""Which weights llama.cpp keeps a second copy of, reordered for the processor's kernels.

Source: `ggml_repack_get_optimal_repack_type` in ggml-cpu/repack.cpp. What is only looked up in (an embedding) has no
copy, nor has what lies on a GPU; a head has one, and so has the embedding that serves as head.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

# Type -> extension of the processor -> the rows must be a multiple of this.
_ROWS: dict[str, dict[str, int]] = {
    "Q4_0": {"avx2": 8, "dotprod": 4},
    "IQ4_NL": {"avx2": 8, "dotprod": 4},
    "MXFP4": {"avx2": 8, "dotprod": 4},
    "Q8_0": {"dotprod": 4},
    "Q2_K": {"avx512f": 8},
    "Q4_K": {"avx2": 8, "dotprod": 8},
    "Q5_K": {"dotprod": 8},
    "Q6_K": {"dotprod": 8},
}


def repacked_bytes(
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]], isa: Collection[str], *, tied: bool
) -> int:
    """Bytes of such copies.

    Args:
        tensors: (name, type, shape with the rows first, bytes) of each.
        isa: extensions of the processor, as profiles name them; empty: unknown, so whatever any has counts.
        tied: whether the embedding is the head.
    """
    head = "token_embd.weight" if tied else "output.weight"
    return sum(
        n_bytes
        for name, kind, shape, n_bytes in tensors
        if (name.startswith("blk.") or name == head) and _is_repacked(kind, shape, isa)
    )


def _is_repacked(kind: str, shape: tuple[int, ...], isa: Collection[str]) -> bool:
    rules = _ROWS.get(kind, {})
    return len(shape) == 2 and any(shape[0] % rows == 0 for name, rows in rules.items() if not isa or name in isa)
