"""Quantises a GGUF file in process, with llama.cpp's own quantiser."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.errors import BadInput, missing_extra
from edgeprune.export.gguf_imatrix import ImportanceMatrix
from edgeprune.export.gguf_mixtures import needs_imatrix
from edgeprune.export.gguf_types import (
    QUANTISATIONS,
    Quantisation,
    Recipe,
    Tensor,
    Traits,
    alignment,
    fallbacks,
    predicted_bytes,
    quantisation,
    recipe,
    tensor_types,
    types_of,
)
from edgeprune.files import atomic_file
from edgeprune.runtimes.gguf_file import GgufFile
from edgeprune.runtimes.gguf_format import TYPE_NAMES

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


def quantise(
    gguf: Path,
    out: Path,
    *,
    kind: str | Recipe,
    threads: int,
    imatrix: ImportanceMatrix | None = None,
    types: Mapping[str, str] | None = None,
    embedding: str | None = None,
    head: str | None = None,
) -> Path:
    """Write `gguf`, an F16 or F32 file, to `out` quantised as `kind`.

    The types written are those `tensor_types` tells for the same recipe.

    Args:
        gguf: the source.
        out: the file to write; it appears whole or not at all.
        kind: a recipe, or the name of one: a key of `QUANTISATIONS`, with options or without (`gguf_types.recipe`).
        threads: threads to use.
        imatrix: the importance matrix. It is what makes the recipe's `imatrix` true.
        types: ggml types by regular expression, found in a tensor's name; the first that matches counts, before those
            of `kind`. A type whose blocks do not fill a row is replaced as in any mixture.
        embedding: type of the token embedding; of the head too where they are one tensor.
        head: type of the head; of the embedding too where they are one tensor.

    Returns:
        `out`.

    Raises:
        BadInput: an unknown kind or type, no sound GGUF file, a source that is quantised already, a recipe that needs
            an importance matrix and has none, or one of another model.
        StageFailed: llama.cpp fails; the message has its reason.
    """
    wish = kind if isinstance(kind, Recipe) else recipe(kind)
    if wish.imatrix and imatrix is None:
        raise BadInput(f"{kind} is quantised by an importance matrix", remedy="give one, or leave imatrix out of it")
    named = [(r"^token_embd\.weight$", embedding), (r"^output\.weight$", head)]
    chosen = [*(types or {}).items(), *((pattern, type_name) for pattern, type_name in named if type_name)]
    wish = Recipe(wish.kind, imatrix is not None, (*chosen, *wish.types))
    if threads < 1:
        raise BadInput(f"{threads} threads", remedy="give a positive number")
    source = GgufFile(gguf)
    source.check_loadable()
    if quantised := sorted({tensor.type for tensor in source.tensors.values()} - _PLAIN):
        raise BadInput(
            f"already quantised ({', '.join(quantised)})", where=gguf, remedy="quantise from an F16 or F32 file"
        )
    told = _told(source, wish, imatrix)
    try:
        import llama_cpp

        from edgeprune.runtimes import llamacpp_library as llamacpp
    except ImportError as error:
        raise missing_extra("llama-cpp-python", "llama") from error
    llamacpp.start_backend()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = quantisation(wish.kind).file_type, threads
    if imatrix is not None:
        params.imatrix, _kept = _matrix_argument(imatrix)
    if wish.types:
        params.tt_overrides = _types_argument(told)
    with atomic_file(out) as temporary:
        llamacpp.forget_complaints()
        with _interrupt_afterwards():
            failed = llama_cpp.llama_model_quantize(os.fsencode(gguf), os.fsencode(temporary), ctypes.byref(params))
        if failed:
            raise llamacpp.failure(f"llama.cpp cannot quantise to {wish.kind}", gguf)
    return out


@contextmanager
def _interrupt_afterwards() -> Iterator[None]:
    """Hold an interrupt back until the block is done.

    llama.cpp logs through a Python function; an interrupt that is raised in there is printed and lost.
    """
    if threading.current_thread() is not threading.main_thread():  # where no interrupt is raised anyway
        yield
        return
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if seen:
        signal.raise_signal(signal.SIGINT)


def _told(source: GgufFile, wish: Recipe, imatrix: ImportanceMatrix | None) -> dict[str, str]:
    """The types of the tensors of `source` by the recipe, once it is sure that the quantiser has what it needs.

    Raises:
        BadInput: as `quantise`.
    """
    heads = source.per_layer("attention.head_count")
    grouped = f"{source.architecture}.attention.head_count_kv" in source.metadata
    kv_heads = source.per_layer("attention.head_count_kv") if grouped else heads
    traits = Traits.of(len(heads), heads[0], kv_heads[0], source.architecture)
    told = types_of([Tensor(tensor.name, tensor.shape) for tensor in source.tensors.values()], traits, wish)
    have = imatrix.values if imatrix else {}
    lacking = [name for name, type_name in told.items() if needs_imatrix(name, type_name, wish.kind)]
    if lacking := [name for name in lacking if name not in have]:
        raise BadInput(
            f"{wish.kind} needs an importance matrix for {len(lacking)} tensors, {lacking[0]} first",
            where=source.path,
            remedy="give an importance matrix of this model",
        )
    for name in have.keys() & source.tensors.keys():
        if len(have[name]) != source.tensors[name].shape[-1]:
            raise BadInput(
                f"the importance matrix has {len(have[name])} columns for {name}, the model "
                f"{source.tensors[name].shape[-1]}",
                where=source.path,
                remedy="make the importance matrix of this very model",
            )
    return told


def _matrix_argument(imatrix: ImportanceMatrix) -> tuple[Any, list[Any]]:
    """The importance matrix as the array of structs that llama.cpp takes, ended by one without a name.

    Beside it the arrays that it points into, to be kept for as long as it is used.
    """
    import llama_cpp

    arrays = [np.ascontiguousarray(values, dtype=np.float32) for values in imatrix.values.values()]
    entries = (llama_cpp.llama_model_imatrix_data * (len(arrays) + 1))()
    for i, (name, array) in enumerate(zip(imatrix.values, arrays, strict=True)):
        pointer = array.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entries[i] = llama_cpp.llama_model_imatrix_data(name.encode(), pointer, len(array))
    return entries, arrays


def _types_argument(told: Mapping[str, str]) -> Any:
    """Every weight's type by its full name, as llama.cpp takes it: an array of structs, ended by one without a name.

    All of them, not only those that differ from the mixture: the quantiser counts layers by the tensors its own rules
    decide on, so a type named for one would move what the rules say of the others.
    """
    import llama_cpp

    numbers = {name: number for number, name in TYPE_NAMES.items()}
    weights = {name: type_name for name, type_name in told.items() if name.endswith("weight")}
    entries = (llama_cpp.llama_model_tensor_override * (len(weights) + 1))()
    for i, (name, type_name) in enumerate(weights.items()):
        entries[i] = llama_cpp.llama_model_tensor_override(f"^{re.escape(name)}$".encode(), numbers[type_name])
    return entries
