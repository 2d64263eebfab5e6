"""ExecuTorch behind the runtime protocol: a program for its text runner, called as the runner calls it. Needs torch.

The program gives the logits after the last token of a call, so where those of all tokens are wanted it is called token
by token.
"""

from __future__ import annotations

import importlib.metadata
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from edgeprune.errors import BadInput, missing_extra
from edgeprune.runtimes.base import Logits, Tokens, checked
from edgeprune.runtimes.tokenizer_file import TokenizerFile

_MAGIC = b"ET12"  # at byte 4: the identifier of the flatbuffer's schema


def build_info() -> dict[str, str]:
    """The version that ran, under llama-bench's name for it."""
    return {"build_commit": f"executorch {importlib.metadata.version('executorch')}"}


class ExecuTorch:
    """A program for ExecuTorch's text runner, with the cache of one sequence.

    Args:
        path: a .pte file; its tokenizer.json lies beside it.
        n_ctx: positions that may be used, at most those of the program.
        threads: of XNNPACK, which are those of the whole process.

    Raises:
        BadInput: no such program, or one made for fewer positions.
    """

    name: ClassVar[str] = "executorch"

    def __init__(self, path: Path, *, n_ctx: int, threads: int) -> None:
        with path.open("rb") as file:
            if file.read(8)[4:] != _MAGIC:
                raise BadInput("not an ExecuTorch program", where=path)
        self._torch, runtime, verification = _runtime(threads)
        try:
            self._program = runtime.load_program(path, verification=verification)
            self._forward = self._program.load_method("forward")
            positions, self._chunk, self.n_vocab = (
                int(self._program.load_method(name).execute([])[0])
                for name in ("get_max_context_len", "get_max_seq_len", "get_vocab_size")
            )
        except (RuntimeError, TypeError, AttributeError) as error:
            raise BadInput(
                f"ExecuTorch cannot load it as a text model ({' '.join(str(error).split())[:200]})", where=path
            ) from error
        if n_ctx > positions:
            raise BadInput(
                f"the program was made for {positions} positions, {n_ctx} were asked for",
                where=path,
                remedy=f"ask for at most {positions}, or ship it with a longer context",
            )
        self.path, self.n_ctx, self.n_past = path, n_ctx, 0
        self._text = TokenizerFile(path.parent)

    def forward(self, tokens: Tokens, *, last_only: bool = False) -> Logits:
        """Append `tokens`, (T,), to the cache; logits after each of them, (T, n_vocab), or (1, n_vocab).

        Raises:
            BadInput: the context is full, or a token is not in the vocabulary.
        """
        ids = checked(tokens, n_past=self.n_past, n_ctx=self.n_ctx, n_vocab=self.n_vocab, where=self.path)
        if not len(ids):
            return np.empty((0, self.n_vocab), np.float32)
        step = self._chunk if last_only else 1
        found = [self._call(ids[at : at + step]) for at in range(0, len(ids), step)]
        return found[-1] if last_only else np.concatenate(found)

    def _call(self, ids: np.ndarray[Any, np.dtype[np.int64]]) -> Logits:
        torch = self._torch
        inputs = [torch.from_numpy(ids[None].copy()), torch.tensor([self.n_past])]
        (logits,) = self._forward.execute(inputs)  # (1, 1, n_vocab), in a buffer of the program's
        self.n_past += len(ids)
        found: Logits = logits[0].float().numpy().copy()
        return found

    def rewind(self, n_past: int) -> None:
        """Forget all but the first `n_past` tokens of the cache; what is behind them is overwritten later."""
        if not 0 <= n_past <= self.n_past:
            raise BadInput(f"cannot rewind from {self.n_past} to {n_past} tokens", where=self.path)
        self.n_past = n_past

    @property
    def bos(self) -> int | None:
        """As `TokenizerFile.bos`."""
        return self._text.bos

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """As `TokenizerFile.encode`."""
        return self._text.encode(text, parse_special=parse_special)

    def decode(self, tokens: Sequence[int]) -> str:
        """As `TokenizerFile.decode`."""
        return self._text.decode(tokens)

    def close(self) -> None:
        """Free the program and its cache."""
        self._forward = self._program = None


@contextmanager
def quiet() -> Iterator[None]:
    """Without what ExecuTorch and torchao say of their own coming versions and of libraries for other machines."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _runtime(threads: int) -> tuple[Any, Any, Any]:
    """torch, the runtime with the operators of language models, and how a file is checked before it is run."""
    try:
        with quiet():
            import executorch.extension.llm.custom_ops.custom_ops
            import executorch.kernels.quantized  # noqa: F401
            import torch
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime, Verification
    except ImportError as error:
        raise missing_extra("executorch", "executorch") from error
    portable_lib._unsafe_reset_threadpool(threads)
    return torch, Runtime.get(), Verification.InternalConsistency
