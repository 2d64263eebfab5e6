"""How far a candidate's next-token distributions are from a reference's: pure numpy functions, no model, no torch.

All logarithms are natural (nats). T tokens, V vocabulary entries. Distributions are worked through one row of V floats
at a time: a row stays in the processor's cache, so a window costs a few passes over memory it already holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]

# Reference probabilities below exp(-DEPTH) of the row's largest are stored as exp(-DEPTH) of it: 1e-17 relative mass.
DEPTH = 40.0
LEVELS = 65535


def log_softmax(logits: Floats) -> Floats:
    """Log-probabilities, nats, of each row of `logits`, (T, V); shifted by their maximum, so none overflows."""
    out = np.empty(logits.shape, dtype=np.float32)
    scratch = np.empty(logits.shape[-1], dtype=np.float32)
    for row, result in zip(np.atleast_2d(logits), np.atleast_2d(out), strict=True):
        top = row.max()
        np.subtract(row, top, out=result)
        np.exp(result, out=scratch)
        result -= np.float32(math.log(float(scratch.sum(dtype=np.float32))))
    return out


@dataclass(frozen=True)
class Coded:
    """Log-probabilities of T tokens in 16 bits each: `peak - step * levels`, both scales kept per row.

    A fixed step over each row's range is finer than float16 everywhere but within one nat of certainty, and numpy
    decodes it some ten times faster. The rounding error is uniform within half a step (at most 3.1e-4 nats), so the
    KL divergence of a distribution from its own decoded form is at most about step^2 / 24 = 1.6e-8 nats.
    """

    levels: NDArray[np.uint16]  # (T, V)
    peak: Floats  # (T,) log-probability of the likeliest token
    step: Floats  # (T,) nats
    top: NDArray[np.int32]  # (T,) the likeliest token

    def __len__(self) -> int:
        return len(self.levels)


def encode(logits: Floats, levels: NDArray[np.uint16] | None = None) -> Coded:
    """Code the log-softmax of `logits`, (T, V), into `levels` (made if absent; may be a memory map).

    Raises:
        FloatingPointError: a logit is not finite.
    """
    n_rows, n_vocab = logits.shape
    if levels is None:
        levels = np.empty((n_rows, n_vocab), dtype=np.uint16)
    peak, step = np.empty(n_rows, dtype=np.float32), np.empty(n_rows, dtype=np.float32)
    top = np.empty(n_rows, dtype=np.int32)
    drop = np.empty(n_vocab, dtype=np.float32)  # distance under the peak, >= 0
    scratch = np.empty(n_vocab, dtype=np.float32)
    for i, row in enumerate(logits):
        top[i] = row.argmax()
        with np.errstate(invalid="ignore"):  # inf - inf: found below
            np.subtract(row[top[i]], row, out=drop)
        np.exp(np.negative(drop, out=scratch), out=scratch)
        peak[i] = -math.log(float(scratch.sum()))
        deepest = float(drop.max())
        if not (math.isfinite(deepest) and math.isfinite(peak[i])):
            raise FloatingPointError(f"logits of token {i} are not finite")
        step[i] = max(min(deepest, DEPTH), 1e-6) / LEVELS
        np.multiply(drop, np.float32(1 / step[i]), out=drop)
        np.minimum(np.rint(drop, out=drop), LEVELS, out=drop)
        levels[i] = drop
    return Coded(levels, peak, step, top)


def decode(coded: Coded) -> Floats:
    """Log-probabilities, (T, V), of a `Coded` block, normalised to sum to one."""
    out = coded.levels * -coded.step[:, None] + coded.peak[:, None]
    return log_softmax(out.astype(np.float32))


@dataclass(frozen=True)
class Rows:
    """Per-token measures of one stretch of text, each (T,) float64 or bool."""

    nll: Doubles  # -log p(next token)
    kl: Doubles  # KL(reference || candidate); empty where there is no reference
    agree: NDArray[np.bool_]  # same likeliest token as the reference; empty where there is no reference


def compare(logits: Floats, targets: Ints, reference: Coded | None = None) -> Rows:
    """Negative log-likelihood of `targets`, (T,), under `logits`, (T, V), and the distance from `reference`.

    KL(P || Q) = sum p log(p / q) with P the decoded reference, renormalised, and Q = softmax(logits). Sums that would
    cancel are taken on values shifted by their row's maximum; a result below zero by rounding is set to zero.

    Raises:
        FloatingPointError: a logit is not finite.
    """
    n_rows, n_vocab = logits.shape
    nll = np.empty(n_rows)
    kl = np.empty(n_rows if reference is not None else 0)
    agree = np.empty(n_rows if reference is not None else 0, dtype=np.bool_)
    shifted, p = np.empty(n_vocab, dtype=np.float32), np.empty(n_vocab, dtype=np.float32)
    for i, row in enumerate(logits):
        best = int(row.argmax())
        with np.errstate(invalid="ignore"):  # inf - inf: found below
            np.subtract(row, row[best], out=shifted)
        np.exp(shifted, out=p)
        log_z = math.log(float(p.sum()))
        if not math.isfinite(log_z):
            raise FloatingPointError(f"logits of token {i} are not finite")
        nll[i] = log_z - float(shifted[targets[i]])
        if reference is None:
            continue
        agree[i] = best == reference.top[i]
        # r = log p relative to the reference's peak; log(p / q) = r - log_mass - (shifted - log_z)
        relative = np.multiply(reference.levels[i], -reference.step[i])
        np.exp(relative, out=p)
        mass = float(p.sum())
        np.subtract(relative, shifted, out=relative)
        kl[i] = max(0.0, float(np.dot(p, relative)) / mass - math.log(mass) + log_z)
        if not math.isfinite(kl[i]):
            raise FloatingPointError(f"logits of token {i} are not finite")
    return Rows(nll, kl, agree)


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def contains_zero(self) -> bool:
        return self.low <= 0.0 <= self.high


def t_cdf(t: float, degrees: int) -> float:
    """P(X <= t) of Student's t with a whole number of degrees of freedom (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    theta = math.atan(t / math.sqrt(degrees))
    cosine_squared = math.cos(theta) ** 2
    term, total = 1.0, 0.0
    if degrees % 2:
        term = math.cos(theta)
        for k in range(1, (degrees - 1) // 2 + 1):
            total += term
            term *= cosine_squared * 2 * k / (2 * k + 1)
        share = 2 / math.pi * (theta + math.sin(theta) * total)
    else:
        for k in range(1, degrees // 2 + 1):
            total += term
            term *= cosine_squared * (2 * k - 1) / (2 * k)
        share = math.sin(theta) * total
    return (1 + share) / 2


def t_quantile(probability: float, degrees: int) -> float:
    """The t with `t_cdf(t, degrees) = probability`, 0.5 <= probability < 1, by bisection."""
    low, high = 0.0, 1.0
    while t_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def mean_interval(values: Sequence[float] | Doubles, level: float = 0.95) -> Interval:
    """Student-t interval of the mean of independent `values`.

    The values are means over windows, not tokens: tokens of one text are not independent, windows nearly are.

    Raises:
        ValueError: fewer than two values, which have no spread to judge by.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size < 2:
        raise ValueError("an interval needs at least two values")
    mean = float(array.mean())
    half = t_quantile((1 + level) / 2, array.size - 1) * float(array.std(ddof=1)) / math.sqrt(array.size)
    return Interval(mean, mean - half, mean + half)


def paired_interval(a: Sequence[float] | Doubles, b: Sequence[float] | Doubles, level: float = 0.95) -> Interval:
    """Interval of the mean of a - b over the same windows: what both share (hard and easy text) cancels."""
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"{first.size} windows against {second.size}: pairs need the same windows")
    return mean_interval(first - second, level)


@dataclass
class Accumulator:
    """Sums over windows, in order; two of them made on disjoint windows can be merged."""

    tokens: list[int] = field(default_factory=list)
    text_bytes: list[int] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agree: list[float] = field(default_factory=list)

    def add(self, rows: Rows, n_bytes: int) -> None:
        """Take in one window: its per-token measures and the UTF-8 length of the text they predict."""
        self.tokens.append(len(rows.nll))
        self.text_bytes.append(n_bytes)
        self.nll.append(float(rows.nll.sum()))
        if rows.kl.size:
            self.kl.append(float(rows.kl.mean()))
            self.agree.append(float(rows.agree.mean()))

    def merge(self, other: Accumulator) -> Accumulator:
        """The windows of both, this one's first."""
        return Accumulator(
            self.tokens + other.tokens,
            self.text_bytes + other.text_bytes,
            self.nll + other.nll,
            self.kl + other.kl,
            self.agree + other.agree,
        )

    @property
    def n_tokens(self) -> int:
        return sum(self.tokens)

    @property
    def nll_per_token(self) -> float:
        """Mean negative log-likelihood, nats."""
        return sum(self.nll) / self.n_tokens

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood; comparable only between files with the same tokenizer."""
        return math.exp(min(self.nll_per_token, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Total negative log-likelihood in bits over the UTF-8 bytes predicted; comparable across tokenizers."""
        return sum(self.nll) / math.log(2) / sum(self.text_bytes)
