"""The one protocol every runtime implements, and what follows from it. numpy and the standard library only."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import BadInput

Logits = NDArray[np.float32]
Tokens = NDArray[np.int64] | Sequence[int]


class Runtime(Protocol):
    """A loaded model with the cache of one sequence."""

    name: ClassVar[str]
    n_vocab: int
    n_ctx: int
    n_past: int  # tokens in the cache

    @property
    def bos(self) -> int | None:
        """The token that the tokenizer puts before every text; None where it puts none."""
        ...

    def forward(self, tokens: Tokens, *, last_only: bool = False) -> Logits:
        """Append `tokens`, (T,), to the cache; logits after each of them, (T, n_vocab), or (1, n_vocab).

        Raises:
            BadInput: the context is full, or a token is not in the vocabulary.
        """
        ...

    def rewind(self, n_past: int) -> None:
        """Forget all but the first `n_past` tokens of the cache."""
        ...

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids of `text`, without BOS or EOS."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...


def checked(tokens: Tokens, *, n_past: int, n_ctx: int, n_vocab: int, where: object) -> NDArray[np.int64]:
    """`tokens` as an array, (T,), that a runtime with `n_past` tokens in its cache may be given.

    Raises:
        BadInput: the context is full, or a token is not in the vocabulary.
    """
    ids = np.asarray(tokens, dtype=np.int64)
    if n_past + len(ids) > n_ctx:
        raise BadInput(f"the context of {n_ctx} tokens is full", where=where, remedy="use a larger n_ctx")
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < n_vocab:
        raise BadInput(f"a token is not in the vocabulary of {n_vocab}", where=where)
    return ids


def begun(runtime: Runtime, tokens: Sequence[int]) -> list[int]:
    """`tokens` of a whole text with BOS before them, if the tokenizer puts it there and a chat template has not."""
    first = runtime.bos
    return [*tokens] if first is None or tokens[:1] == [first] else [first, *tokens]


def generate(runtime: Runtime, prompt: Sequence[int], n_new: int, *, stop: Collection[int] = ()) -> Iterator[int]:
    """Greedy continuation of `prompt` from an empty cache: at most `n_new` tokens, none after one in `stop`."""
    runtime.rewind(0)
    logits = runtime.forward(prompt, last_only=True)
    for _ in range(n_new):
        token = int(logits[-1].argmax())
        yield token
        if token in stop:
            return
        logits = runtime.forward([token], last_only=True)
