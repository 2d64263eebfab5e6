"""Which of several is faster: measured turn by turn, judged by pairs.

A machine's speed drifts by more than the differences one looks for, so A ten times and then B ten times compares two
moments. Here every round measures each arm once, in processes of their own, in an order that rotates from round to
round; what a round gives is a ratio within the round. The interval of the ratio is the exact one of Wilcoxon's signed
rank test around the Hodges-Lehmann estimate (Hodges and Lehmann 1963; Hollander, Wolfe and Chicken, "Nonparametric
Statistical Methods", 3.7): it asks of the noise only that it is symmetric, which the rotation sees to. From twelve
rounds on, one spoilt round cannot move its ends far: they lie behind all twelve means that this round has a part in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import BadInput, StageFailed
from edgeprune.runtimes.bench import GATE_S, bench
from edgeprune.runtimes.isolate import Execute, run_isolated
from edgeprune.runtimes.settings import Value, describe

LEVEL = 0.95
ROUNDS = 12
ROUND_REPETITIONS, ROUND_LEAST_S = 2, 0.5  # of one arm in one round

Speeds = dict[str, list[float]]  # tokens/s of each round, by test
Progress = Callable[[int, int, str], None]  # rounds done, of how many, the arm about to run


@dataclass(frozen=True)
class Arm:
    """What competes: a model file and how it is run.

    Attributes:
        path: what `open_runtime` loads.
        threads: threads of the runtime.
        settings: what the runtime is told beside.
        runtime: its name; None: what the kind of file asks for.
        label: how it is called; "": by its file, threads and settings.
        python: the interpreter that runs it, of an environment with another build of the runtime; None: this one.
        delay: share by which each repetition is made to take longer, to try the judges themselves.
    """

    path: Path
    threads: int
    settings: Mapping[str, Value] = field(default_factory=dict)
    runtime: str | None = None
    label: str = ""
    python: str | None = None
    delay: float = 0.0

    def __str__(self) -> str:
        return self.label or " ".join(filter(None, (self.path.name, f"t={self.threads}", describe(self.settings))))


@dataclass(frozen=True)
class Comparison:
    """How much faster B is than A.

    Attributes:
        test: "pp512", "tg128" …
        speeds: tokens/s of (A, B) in each round.
        ratio: B over A, the Hodges-Lehmann estimate.
        low: lower end of its interval.
        high: upper end.
        level: of the interval.
    """

    test: str
    speeds: tuple[tuple[float, float], ...]
    ratio: float
    low: float
    high: float
    level: float

    @property
    def medians(self) -> tuple[float, float]:
        """Median tokens/s of A and of B."""
        a, b = np.median(self.speeds, axis=0)
        return float(a), float(b)

    @property
    def verdict(self) -> str:
        """One line: which is faster, or that no difference was seen and how large one may have been missed."""
        if self.low > 1 or self.high < 1:
            word = "faster" if self.ratio > 1 else "slower"
            change, ends = abs(self.ratio - 1), sorted(abs(end - 1) for end in (self.low, self.high))
            return f"B is {100 * change:.1f} % {word} ({100 * ends[0]:.1f} to {100 * ends[1]:.1f} %)"
        most = max(abs(self.low - 1), abs(self.high - 1))
        return f"no difference seen (one of more than {100 * most:.1f} % would have been)"

    def to_json(self) -> dict[str, Any]:
        """As JSON carries it."""
        return {
            "test": self.test,
            "ratio": self.ratio,
            "low": self.low,
            "high": self.high,
            "level": self.level,
            "verdict": self.verdict,
            "a_ts": [a for a, _ in self.speeds],
            "b_ts": [b for _, b in self.speeds],
        }


def signed_rank_interval(
    differences: Sequence[float] | NDArray[np.float64], level: float = LEVEL
) -> tuple[float, float, float]:
    """(estimate, low, high) of the centre of a symmetric distribution, of n paired differences.

    The estimate is the median of all n (n + 1) / 2 means of two (Walsh averages); the interval's ends are the averages
    at the ranks that the exact distribution of Wilcoxon's statistic gives.

    Raises:
        BadInput: too few differences for an interval of that level: its widest has 1 - 2^(1 - n).
    """
    values = np.asarray(differences, dtype=np.float64)
    n = values.size
    ways = np.ones(1)  # of each sum of ranks; a rank counts or not, each with probability 1/2
    for rank in range(1, n + 1):
        longer = np.zeros(ways.size + rank)
        longer[: ways.size] += ways / 2
        longer[rank:] += ways / 2
        ways = longer
    rank = int(np.searchsorted(np.cumsum(ways), (1 - level) / 2, side="right"))
    if n < 1 or rank < 1:
        least = math.ceil(1 - math.log2(1 - level))
        raise BadInput(f"{n} rounds are too few for a {100 * level:g} % interval", remedy=f"measure {least} at least")
    first, second = np.triu_indices(n)
    averages = np.sort((values[first] + values[second]) / 2)
    return float(np.median(averages)), float(averages[rank - 1]), float(averages[-rank])


def judge(test: str, first: Sequence[float], second: Sequence[float], level: float = LEVEL) -> Comparison:
    """The comparison of two arms from their speeds (tokens/s) round by round, (rounds,) each."""
    centre, low, high = signed_rank_interval(np.log(second) - np.log(first), level)
    pairs = tuple(zip(map(float, first), map(float, second), strict=True))
    return Comparison(test, pairs, math.exp(centre), math.exp(low), math.exp(high), level)


def race(
    arms: Sequence[Arm],
    *,
    rounds: int = ROUNDS,
    undecided: Callable[[list[Speeds]], bool] | None = None,
    most: int | None = None,
    n_prompt: int,
    n_gen: int,
    gate_s: float | None = GATE_S,
    timeout_s: float = 600.0,
    execute: Execute = run_isolated,
    progress: Progress | None = None,
) -> list[Speeds]:
    """Measure every arm once a round, in an order that rotates; each file is read from disk for the first.

    Args:
        arms: what competes.
        rounds: how often each is measured.
        undecided: whether, by the speeds so far, further rounds are worth their time; asked after each from the last of
            `rounds` on.
        most: rounds at most; default: `rounds`.
        n_prompt: tokens of the prompt; 0 leaves that test out.
        n_gen: tokens to generate; 0 leaves that test out.
        gate_s: as in `bench`, for each measurement.
        timeout_s: as in `bench`.
        execute: as in `bench`.
        progress: called before each measurement.

    Returns:
        Of each arm, tokens/s of each round by test: [{"pp512": [...], "tg64": [...]}, ...].

    Raises:
        BadInput: as `bench`, or no rounds.
        StageFailed: an arm did not run, or the machine was not fit to be measured.
    """
    if rounds < 1:
        raise BadInput(f"{rounds} rounds", remedy="measure one at least")
    found: list[Speeds] = [{} for _ in arms]
    for turn in range(max(rounds, most or 0)):
        if turn >= rounds and not (undecided and undecided(found)):
            break
        for place in range(len(arms)):
            which = (place + turn) % len(arms)
            arm = arms[which]
            if progress:
                progress(turn, max(rounds, turn + 1), str(arm))
            result = bench(
                arm.path,
                n_prompt=n_prompt,
                n_gen=n_gen,
                repetitions=ROUND_REPETITIONS,
                threads=arm.threads,
                runtime=arm.runtime,
                settings=arm.settings,
                least_s=ROUND_LEAST_S,
                gate_s=gate_s,
                timeout_s=timeout_s,
                execute=execute,
                python=arm.python,
                delay=arm.delay,
                anew=turn == 0,
            )
            if result.status != "ok":
                raise StageFailed(f"{result.status}: {result.reason}", where=arm)
            for record in result.records:
                found[which].setdefault(record.test, []).append(record.median_ts)
    return found


def compare(first: Arm, second: Arm, *, rounds: int = ROUNDS, level: float = LEVEL, **options: Any) -> list[Comparison]:
    """How much faster `second` is than `first`, a comparison a test; `options` are those of `race`.

    Raises:
        BadInput, StageFailed: as `race`; BadInput also for too few rounds, before anything is measured.
    """
    signed_rank_interval([0.0] * rounds, level)
    a, b = race([first, second], rounds=rounds, **options)
    return [judge(test, a[test], b[test], level) for test in a]
