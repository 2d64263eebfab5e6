"""The GPUs that the installed llama.cpp can use, from ggml's registry of backends (ggml-backend.h)."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgeprune.errors import BadInput
from edgeprune.runtimes.gpu import Gpu
from edgeprune.runtimes.llamacpp_library import llama_cpp, start_backend

_GPU, _INTEGRATED = 1, 2  # enum ggml_backend_dev_type; 0 is the processor, 3 a matrix unit beside it
REMEDY = (
    'install a build with one: CMAKE_ARGS="-DGGML_VULKAN=on" (or GGML_CUDA, GGML_METAL) pip install llama-cpp-python'
)


@functools.cache
def _ggml() -> ctypes.CDLL | None:
    folder = Path(llama_cpp.__file__).parent / "lib"
    for name in ("libggml.so", "libggml.dylib", "ggml.dll"):
        if (folder / name).exists():
            library = ctypes.CDLL(str(folder / name))
            pointer = ctypes.c_void_p
            library.ggml_backend_dev_count.restype = ctypes.c_size_t
            library.ggml_backend_dev_get.restype, library.ggml_backend_dev_get.argtypes = pointer, [ctypes.c_size_t]
            for told in ("name", "description"):
                function = getattr(library, f"ggml_backend_dev_{told}")
                function.restype, function.argtypes = ctypes.c_char_p, [pointer]
            library.ggml_backend_dev_type.argtypes = [pointer]
            size = ctypes.POINTER(ctypes.c_size_t)
            library.ggml_backend_dev_memory.argtypes = [pointer, size, size]
            return library
    return None


def gpus() -> list[Gpu]:
    """All that this build finds; none where it has no backend for any."""
    start_backend()
    library = _ggml()
    found: list[Gpu] = []
    if library is None or not llama_cpp.llama_supports_gpu_offload():
        return found
    for index in range(library.ggml_backend_dev_count()):
        device = library.ggml_backend_dev_get(index)
        kind = library.ggml_backend_dev_type(device)
        if kind not in (_GPU, _INTEGRATED):
            continue
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        library.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        name, description = (
            getattr(library, f"ggml_backend_dev_{told}")(device).decode("utf-8", "replace")
            for told in ("name", "description")
        )
        found.append(Gpu(name, description, kind == _INTEGRATED, free.value / 2**20, total.value / 2**20))
    return found


def listed() -> list[dict[str, Any]]:
    """`gpus` as JSON, for a process of its own."""
    return [asdict(gpu) for gpu in gpus()]


def require_gpu() -> list[Gpu]:
    """The GPUs.

    Raises:
        BadInput: there are none.
    """
    if not (found := gpus()):
        raise BadInput("the installed llama.cpp finds no GPU", remedy=REMEDY)
    return found
