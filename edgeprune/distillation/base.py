"""What methods of distillation are given, and what they give back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeprune.distillation.pool import LENGTH, Pool

if TYPE_CHECKING:
    from edgeprune.distillation.readings import ModelReadings

Indices = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Quota:
    """How much to take: tokens in all, or a number of texts."""

    tokens: int | None = None
    count: int | None = None

    def share(self, part: float) -> Quota:
        """A part of it, in [0, 1]."""
        tokens = None if self.tokens is None else round(self.tokens * part)
        return Quota(tokens, None if self.count is None else round(self.count * part))


class Basket:
    """What has been taken, and what there is room for.

    Args:
        quota: how much may be taken.
        lengths: tokens of each candidate, (n,).
    """

    def __init__(self, quota: Quota, lengths: Indices) -> None:
        self._lengths = lengths
        self._tokens = np.inf if quota.tokens is None else quota.tokens
        self._count = len(lengths) if quota.count is None else quota.count
        self._free = np.ones(len(lengths), dtype=bool)
        self.taken: list[int] = []

    @property
    def open(self) -> NDArray[np.bool_]:
        """Which candidates may still be taken, (n,)."""
        if len(self.taken) >= self._count:
            return np.zeros_like(self._free)
        return np.asarray(self._free & (self._lengths <= self._tokens))

    def has_room(self, candidate: int) -> bool:
        """Whether one candidate may still be taken."""
        room = len(self.taken) < self._count and self._lengths[candidate] <= self._tokens
        return bool(room and self._free[candidate])

    def take(self, candidate: int) -> None:
        """Take one."""
        self.taken.append(candidate)
        self._free[candidate] = False
        self._tokens -= self._lengths[candidate]

    def fill(self, order: Sequence[int] | Indices) -> Indices:
        """Take candidates in this order as long as there is room, and give all that were taken."""
        for candidate in order:
            if self.has_room(int(candidate)):
                self.take(int(candidate))
        return self.indices

    @property
    def indices(self) -> Indices:
        """What has been taken, in order."""
        return np.array(self.taken, dtype=np.int64)


class Readings(Protocol):
    """What models say of each of n pieces; measured when first asked for."""

    @property
    def means(self) -> Floats:
        """Mean last hidden state of each piece, (n, hidden)."""
        ...

    @property
    def gradients(self) -> Floats:
        """Gradient of the loss on each piece, mean over its tokens, sketched so that inner products stay: (n, k)."""
        ...

    @property
    def errors(self) -> Floats:
        """EL2N of each piece: the mean of ‖softmax - one-hot‖ over what is predicted, (n,)."""
        ...

    @property
    def divergences(self) -> Floats:
        """Mean KL(dense ‖ pruned) of each piece, nats a token, (n,)."""
        ...


@dataclass(frozen=True)
class Task:
    """A selection: which of some pieces to take.

    Attributes:
        pool: the pieces.
        candidates: indices of those that may be chosen, ascending, (m,).
        quota: how much to take of them.
        readings: what models say of all pieces of the pool.
        seed: of whatever is drawn.
    """

    pool: Pool
    candidates: Indices
    quota: Quota
    readings: Readings
    seed: int

    @property
    def lengths(self) -> Indices:
        """Tokens of each candidate, (m,)."""
        return self.pool.lengths[self.candidates]

    def of_candidates(self, column: Floats) -> Floats:
        """The candidates' rows of a column of readings, without a copy where all pieces are candidates."""
        return column if len(self.candidates) == len(column) else column[self.candidates]

    @property
    def rng(self) -> np.random.Generator:
        """A generator that starts at the seed."""
        return np.random.default_rng(self.seed)


@dataclass(frozen=True)
class Choice:
    """What a selection took: positions in `Task.candidates` in order of choice, and what each counts for (None: alike).

    Weights are positive and have a mean of 1.
    """

    taken: Indices
    weights: Floats | None = None


@dataclass(frozen=True)
class Order:
    """A whole distillation, for methods that do not choose among the pool's pieces.

    Attributes:
        pool: the source's pieces.
        quota: how much to write of each class, or in all.
        model: folder of the dense model, in the student's vocabulary.
        student: folder of the pruned model, if there is one.
        read: gives readings of a pool, of the columns named: the whole pool's, or those of texts just written.
        seed: of whatever is drawn.
        scratch: a folder for what lasts as long as the work.
        kept: a folder for what an interrupted work goes on from.
        say: told (stage, done, total).
        length: tokens of a text at most.
    """

    pool: Pool
    quota: Quota
    model: Path
    student: Path | None
    read: Callable[[Pool, tuple[str, ...]], ModelReadings]
    seed: int
    scratch: Path
    kept: Path
    say: Progress
    length: int = LENGTH


@dataclass(frozen=True)
class Written:
    """Texts that a method wrote, with labels and weights where it gives them."""

    texts: tuple[str, ...]
    labels: tuple[str, ...] | None = None
    weights: tuple[float, ...] | None = None
