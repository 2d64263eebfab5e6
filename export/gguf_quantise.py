"""Quantises a GGUF file in process, with llama.cpp's own quantiser."""

from __future__ import annotations

import ctypes
from pathlib import Path

from edgeprune.errors import BadInput, missing_extra
from edgeprune.export.gguf_types import (
    QUANTISATIONS,
    Quantisation,
    alignment,
    fallbacks,
    predicted_bytes,
    quantisation,
    tensor_types,
)
from edgeprune.files import atomic_file
from edgeprune.runtimes.gguf_file import GgufFile

__all__ = [
    "QUANTISATIONS",
    "Quantisation",
    "alignment",
    "fallbacks",
    "predicted_bytes",
    "quantisation",
    "quantise",
    "tensor_types",
]

_PLAIN = {"F32", "F16", "BF16"}


def quantise(gguf: Path, out: Path, *, kind: str, threads: int) -> Path:
    """Write `gguf`, an F16 or F32 file, to `out` quantised as `kind`.

    Args:
        gguf: the source.
        out: the file to write; it appears whole or not at all.
        kind: a key of `QUANTISATIONS`.
        threads: threads to use.

    Returns:
        `out`.

    Raises:
        BadInput: an unknown `kind`, no sound GGUF file, or a source that is quantised already.
        StageFailed: llama.cpp fails; the message has its reason.
    """
    wanted = quantisation(kind)
    if threads < 1:
        raise BadInput(f"{threads} threads", remedy="give a positive number")
    source = GgufFile(gguf)
    source.check_loadable()
    if quantised := sorted({tensor.type for tensor in source.tensors.values()} - _PLAIN):
        raise BadInput(
            f"already quantised ({', '.join(quantised)})", where=gguf, remedy="quantise from an F16 or F32 file"
        )
    try:
        import llama_cpp

        from edgeprune.runtimes import llamacpp
    except ImportError as error:
        raise missing_extra("llama-cpp-python", "llama") from error
    llamacpp.start_backend()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = wanted.file_type, threads
    with atomic_file(out) as temporary:
        llamacpp.forget_complaints()
        if llama_cpp.llama_model_quantize(str(gguf).encode(), str(temporary).encode(), ctypes.byref(params)):
            raise llamacpp.failure(f"llama.cpp cannot quantise to {kind}", gguf)
    return out
