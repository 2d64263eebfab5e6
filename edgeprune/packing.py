"""Text as training sees it: windows of equal length without padding, some of them held out."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeprune.errors import BadInput
from edgeprune.runtimes.pytorch import bos_of

_BETWEEN = "\n\n"  # what separates texts that share a window
_PIECE = 1 << 20  # characters tokenised at once: a tokenizer holds some 250 bytes for each
_MOST_TOKENS = 50_000_000  # read from the texts; more would take longer to tokenise than most trainings last


@dataclass(frozen=True)
class Windows:
    """Windows of one text: position i of each predicts its token i + 1.

    Attributes:
        ids: (windows, length + 1), int64. Without BOS, the last token of a window is the first of the next.
        weights: what each prediction counts for in the loss, (windows, length), 1 on average; None: all alike.
    """

    ids: Tensor
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def length(self) -> int:
        """Predictions a window."""
        return int(self.ids.shape[1]) - 1

    @property
    def weights_hash(self) -> str | None:
        """SHA-256 over the weights, which change nothing of a teacher's records."""
        return None if self.weights is None else hashlib.sha256(self.weights.numpy().tobytes()).hexdigest()

    @property
    def hash(self) -> str:
        """SHA-256 over the token ids: what a teacher's records of them depend on."""
        return hashlib.sha256(str(tuple(self.ids.shape)).encode() + self.ids.numpy().tobytes()).hexdigest()

    def and_held_out(self, held_out: Windows) -> Windows:
        """These windows, and behind them others that are judged on."""
        weights = (
            None if self.weights is None else torch.cat([self.weights, torch.ones(len(held_out), held_out.length)])
        )
        return Windows(torch.cat([self.ids, held_out.ids]), weights)


def pack(
    texts: Iterable[str],
    tokenizer: Any,
    length: int,
    weights: Sequence[float] | None = None,
    *,
    where: str = "--text",
) -> Windows:
    """Consecutive windows of `length` predictions over all the texts, one after the other; a shorter rest is left out.

    A tokenizer that puts BOS before a text puts it before every window, since its model was never without.

    Args:
        texts: what is packed.
        tokenizer: of transformers.
        length: predictions a window.
        weights: what each token of a text counts for.
        where: what an error names.

    Raises:
        BadInput: the texts are too short for two windows.
    """
    ids, counts = array("i"), array("f")
    between = tokenizer(_BETWEEN, add_special_tokens=False)["input_ids"]
    for number, text in enumerate(texts):
        if ids:
            ids.extend(between)
        for piece in _pieces(text):
            if len(ids) <= _MOST_TOKENS:
                ids.extend(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
        if weights is not None:
            counts.extend([weights[number]] * (len(ids) - len(counts)))
        if len(ids) > _MOST_TOKENS:
            break
    stream = torch.from_numpy(np.array(ids, dtype=np.int64))
    bos = bos_of(tokenizer)
    if bos is None:
        windows = stream.unfold(0, length + 1, length) if len(stream) > length else stream.new_empty(0, length + 1)
    else:
        whole = stream[: len(stream) // length * length].view(-1, length)
        windows = torch.cat([whole.new_full((len(whole), 1), bos), whole], dim=1)
    if len(windows) < 2:
        raise BadInput(
            f"the text has {len(ids)} tokens: fewer than two windows of {length}",
            where=where,
            remedy="give more text, or ask for shorter windows",
        )
    if weights is None:
        return Windows(windows.contiguous())
    predicted = torch.from_numpy(np.array(counts))[int(bos is None) :][: len(windows) * length].view(-1, length)
    return Windows(windows.contiguous(), predicted / predicted.mean())


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of at most `_PIECE` characters, cut before an end of a line where there is one."""
    start = 0
    while len(text) - start > _PIECE:
        cut = text.rfind("\n", start + 1, start + _PIECE)
        end = start + _PIECE if cut < 0 else cut
        yield text[start:end]
        start = end
    yield text[start:]


def hold_out(n: int, count: int) -> tuple[Tensor, Tensor]:
    """Indices of `n` windows to train on, and of `count` (a quarter at most, one at least) to judge on.

    Those to judge on lie evenly over the text, so that every source in it has its share.
    """
    held = evenly(n, max(1, min(count, n // 4)))
    mask = torch.ones(n, dtype=torch.bool)
    mask[held] = False
    return mask.nonzero()[:, 0], held


def evenly(n: int, count: int) -> Tensor:
    """Indices of `count` of `n` windows that lie evenly over the text; all, where there are no more."""
    count = min(n, count)
    return ((torch.arange(count) + 0.5) * n / count).long()


def order(indices: Tensor, position: int, count: int, seed: int) -> Tensor:
    """`count` of `indices` from `position` on in an endless sequence that is shuffled anew in each pass: (count,).

    The sequence depends on the seed alone, so a position is all that resuming needs.
    """
    parts: list[Tensor] = []
    while count > 0:
        epoch, start = divmod(position, len(indices))
        parts.append(_shuffled(len(indices), seed * 1_000_003 + epoch)[start : start + count])
        position, count = position + len(parts[-1]), count - len(parts[-1])
    return indices[torch.cat(parts)]


@lru_cache(maxsize=2)  # a step takes few of many
def _shuffled(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))
