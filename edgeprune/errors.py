"""Errors that end a command with one clear line: what went wrong, where, and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EdgepruneError(Exception):
    """Base of every error the user can act on.

    Args:
        what: what is wrong, without a final full stop.
        where: the file, field or option it was found in.
        remedy: what to do about it.
    """

    exit_code = 4

    def __init__(self, what: str, *, where: object = None, remedy: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = None if where is None else str(where)
        self.remedy = remedy

    def __str__(self) -> str:
        line = self.what if self.where is None else f"{self.where}: {self.what}"
        return line if self.remedy is None else f"{line}; {self.remedy}"


class BadInput(EdgepruneError):
    """Wrong use or input that cannot be used (exit code 2)."""

    exit_code = 2


class NothingFits(EdgepruneError):
    """No candidate meets the budget (exit code 3)."""

    exit_code = 3


class StageFailed(EdgepruneError):
    """A stage of the pipeline failed (exit code 4)."""

    exit_code = 4


# Packages that only an extra brings, and which.
EXTRAS = {
    "pynvml": "cuda",
    "torch": "prune",
    "transformers": "prune",
    "safetensors": "prune",
    "gguf": "prune",
    "matplotlib": "prune",
    "jinja2": "prune",
    "llama_cpp": "llama",
    "onnxruntime": "onnx",
    "distributed": "lab",
    "tokenizers": "onnx",
    "onnx_ir": "export",
    "onnx": "export",
    "optimum": "optimum",
    "lm_eval": "eval",
    "datasets": "eval",
    "fastapi": "serve",
    "starlette": "serve",
    "starlette_context": "serve",
    "sse_starlette": "serve",
    "pydantic_settings": "serve",
    "uvicorn": "serve",
    "executorch": "executorch",
    "torchao": "executorch",
    "peft": "recover",
    "accelerate": "recover",
}


def missing_extra(package: str, extra: str) -> BadInput:
    """The error for an optional package that is not installed."""
    return BadInput(f"{package} is not installed", remedy=f'pip install "edgeprune[{extra}]"')


def unknown(kind: str, name: str, known: Iterable[str], where: object = None) -> BadInput:
    """The error for a name that is not in a table, with the nearest match and all that is known."""
    names = sorted(known)
    # A letter O is near a zero for the eye, not for the matcher.
    close = difflib.get_close_matches(
        name.lower().replace("o", "0"), [n.lower().replace("o", "0") for n in names], n=1, cutoff=0.5
    )
    hint = ""
    if close:
        nearest = next(n for n in names if n.lower().replace("o", "0") == close[0])
        hint = f"did you mean {nearest!r}? "
    return BadInput(f"unknown {kind} {name!r}", where=where, remedy=f"{hint}known: {', '.join(names)}")
