"""Runtimes behind one small protocol. Nothing here but `pytorch` and `pte` imports torch: a board needs none."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from edgeprune.errors import BadInput, unknown
from edgeprune.runtimes.base import Runtime
from edgeprune.runtimes.settings import Value

# A new runtime is one module and one entry: name -> (module, class). The class is constructed with
# (path: Path, *, n_ctx: int, threads: int).
RUNTIMES: dict[str, tuple[str, str]] = {
    "llamacpp": ("edgeprune.runtimes.llamacpp", "LlamaCpp"),
    "onnxruntime": ("edgeprune.runtimes.ort", "OnnxRuntime"),
    "executorch": ("edgeprune.runtimes.pte", "ExecuTorch"),
    "pytorch": ("edgeprune.runtimes.pytorch", "PyTorch"),
}


def runtime_for(path: Path) -> str:
    """The name of the runtime that loads `path`: a .gguf, .onnx or .pte file, a folder with one or a checkpoint.

    Raises:
        BadInput: there is no such path, or no runtime loads it.
    """
    if not path.exists():
        raise BadInput("no such file or folder", where=path)
    if path.is_file() and path.suffix == ".gguf":
        return "llamacpp"
    if path.is_file() and path.suffix == ".onnx":
        return "onnxruntime"
    if path.is_file() and path.suffix == ".pte":
        return "executorch"
    if path.is_dir():
        if (path / "model.onnx").is_file():
            return "onnxruntime"
        if (path / "config.json").is_file():
            return "pytorch"
    raise BadInput(
        "not a model",
        where=path,
        remedy="give a .gguf, .onnx or .pte file, a folder with model.onnx, or a Hugging Face folder",
    )


def runtime_class(name: str) -> Any:
    """The class of a runtime in the table; its module is imported."""
    module, attribute = RUNTIMES[name]
    return getattr(importlib.import_module(module), attribute)


def settings_option(name: str, settings: Mapping[str, Value] | None) -> dict[str, Any]:
    """The keyword that hands `settings` to a runtime's class; none where there are none.

    Raises:
        BadInput: settings for a runtime that has none.
    """
    if not settings:
        return {}
    if not hasattr(runtime_class(name), "SETTINGS"):
        raise BadInput(f"the runtime {name} has no settings", remedy=f"leave out {', '.join(settings)}")
    return {"settings": settings}


def open_runtime(
    path: Path, *, n_ctx: int, threads: int, name: str | None = None, settings: Mapping[str, Value] | None = None
) -> Runtime:
    """Load `path` in the runtime `name` (default: the one its kind asks for), with `settings` of its table `SETTINGS`.

    Raises:
        BadInput: an unknown runtime, a bad file, a setting that it does not have, or a package that is not installed
            (the message names the extra).
    """
    name = name or runtime_for(path)
    if name not in RUNTIMES:
        raise unknown("runtime", name, RUNTIMES)
    options = settings_option(name, settings)
    return cast(Runtime, runtime_class(name)(path, n_ctx=n_ctx, threads=threads, **options))
