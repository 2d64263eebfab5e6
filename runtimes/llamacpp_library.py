"""llama.cpp's library: started once, its log kept instead of printed, its builds told apart, models loaded safely.

A file passes `GgufFile` before llama.cpp sees it. llama.cpp's log is not printed; its complaint becomes the text
of an error.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from edgeprune.errors import StageFailed, missing_extra
from edgeprune.runtimes.gguf_file import GgufFile

try:
    import llama_cpp
except ImportError as error:
    raise missing_extra("llama-cpp-python", "llama") from error

__all__ = [
    "Closing",
    "build_info",
    "failure",
    "forget_complaints",
    "llama_cpp",
    "load_model",
    "start_backend",
    "system_info",
]

_ERROR = 4  # GGML_LOG_LEVEL_ERROR of ggml.h; llama-cpp-python's own table is of an older ggml

_complaints: collections.deque[str] = collections.deque(maxlen=20)


def _keep_complaint(level: int, text: bytes | None, _: Any) -> None:
    if level == _ERROR and text and (line := text.decode("utf-8", "replace").strip()):
        _complaints.append(line)


# The library keeps the bare pointer: the object must live as long as the process does.
_LOG_CALLBACK = llama_cpp.llama_log_callback(_keep_complaint)


@functools.cache
def start_backend() -> None:
    """Initialise llama.cpp once, its log silenced."""
    llama_cpp.llama_log_set(_LOG_CALLBACK, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()


def forget_complaints() -> None:
    """Empty the kept log; call it before what may fail."""
    _complaints.clear()


def failure(what: str, where: object) -> StageFailed:
    """The error for a failed call: `what`, with llama.cpp's first error line (the later ones only repeat it)."""
    return StageFailed(f"{what}: {_complaints[0] if _complaints else 'it gave no reason'}", where=where)


def system_info() -> str:
    """What llama.cpp found in this processor and was built with."""
    start_backend()
    return str(llama_cpp.llama_print_system_info().decode()).strip()


def build_info() -> dict[str, str]:
    """What is known of the build, under llama-bench's names where it has one; "unknown" where it does not say."""
    start_backend()

    def ask(symbol: str) -> str:
        for library in (llama_cpp.llama_cpp._lib, _ggml_base()):
            function = getattr(library, symbol, None)
            if function is not None:
                function.restype, function.argtypes = ctypes.c_char_p, []
                answer = function()
                return answer.decode() if answer else "unknown"
        return "unknown"

    # The wheel's library has the version of llama.cpp but not its commit; that of ggml is the same tree's.
    return {
        "build_commit": ask("ggml_commit"),
        "llama_cpp_version": ask("llama_version"),
        "ggml_version": ask("ggml_version"),
        "llama_cpp_python": str(llama_cpp.__version__),
        "backends": "CPU",
    }


def _ggml_base() -> ctypes.CDLL | None:
    folder = Path(llama_cpp.__file__).parent / "lib"
    for library in sorted(folder.glob("*ggml-base*")):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(library))
    return None


def load_model(path: Path, *, vocab_only: bool, gpu_layers: int = 0) -> Any:
    """Load a file that has been checked; `gpu_layers` of its layers, counted from the last, go to the GPU.

    Raises:
        BadInput: it is no sound GGUF file.
        StageFailed: llama.cpp refuses it.
    """
    GgufFile(path).check_loadable()
    start_backend()
    forget_complaints()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = vocab_only
    params.n_gpu_layers = gpu_layers
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise failure("llama.cpp cannot load the model", path)
    return model


class Closing:
    """What frees memory of llama.cpp: at the end of a `with` block, or with the object. `close` may be called twice."""

    def close(self) -> None:
        """Free what is held."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # Without attributes its construction never began; at exit the library, and even `sys`, may be gone before it.
        if vars(self) and not is_finalizing():
            self.close()
