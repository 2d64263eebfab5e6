"""Finds the threads and settings with which a file runs fastest here, and takes only what is proved to be faster.

Arms race (`racing`): first the numbers of threads, then each setting's other values one at a time against the best so
far. A setting is changed where the interval of the ratio, at a level shared among the arms of its race (Bonferroni),
lies above 1: noise must not choose. Settings that change the model's answers are tried only when they are named.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeprune.errors import BadInput, StageFailed
from edgeprune.runtimes import runtime_class, runtime_for
from edgeprune.runtimes.bench import GATE_S
from edgeprune.runtimes.isolate import Execute, run_isolated
from edgeprune.runtimes.racing import LEVEL, ROUNDS, Arm, Comparison, judge, race, signed_rank_interval
from edgeprune.runtimes.settings import Setting, Value
from edgeprune.runtimes.ssh import LinkBroken

N_PROMPT, N_GEN = 256, 64  # tokens of the turn whose time is made short

Progress = Callable[[str, int, int], None]  # stage, rounds done, of how many


@dataclass(frozen=True)
class Tried:
    """One alternative and how it compares with the best before it, by tokens/s of a whole turn."""

    arm: Arm
    comparison: Comparison
    taken: bool

    def to_json(self) -> dict[str, Any]:
        """As JSON carries it."""
        arm = {"threads": self.arm.threads, "settings": dict(self.arm.settings)}
        return {**arm, "taken": self.taken, **self.comparison.to_json()}


@dataclass(frozen=True)
class Tuned:
    """The fastest way to run a file here.

    Attributes:
        best: the file with the threads and settings found.
        tried: every alternative, in the order in which they were raced.
    """

    best: Arm
    tried: tuple[Tried, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON carries it."""
        return {
            "threads": self.best.threads,
            "settings": dict(self.best.settings),
            "tried": [tried.to_json() for tried in self.tried],
        }


def settings_of(runtime: str) -> dict[str, Setting]:
    """The settings that a runtime takes, by name; empty if it has none."""
    table: dict[str, Setting] = getattr(runtime_class(runtime), "SETTINGS", {})
    return table


def thread_counts(usual: int) -> list[int]:
    """Numbers of threads worth trying where `usual` is the number of cores: it, three quarters, a half, and 1."""
    return list(dict.fromkeys([usual, *(max(1, usual * part // 4) for part in (3, 2)), 1]))


def tune(
    path: Path,
    *,
    threads: Sequence[int],
    runtime: str | None = None,
    given: Mapping[str, Value] | None = None,
    lossy: Collection[str] = (),
    n_prompt: int = N_PROMPT,
    n_gen: int = N_GEN,
    rounds: int = ROUNDS,
    gate_s: float | None = GATE_S,
    execute: Execute = run_isolated,
    progress: Progress | None = None,
) -> Tuned:
    """Find the threads and settings with which `path` answers soonest.

    Args:
        path: what `open_runtime` loads.
        threads: numbers of threads to try, the usual one first.
        runtime: its name; None: what the kind of file asks for.
        given: settings that stay as they are.
        lossy: settings to try although they change the answers; quality must then be judged with them.
        n_prompt: tokens of the prompt of the turn that is timed.
        n_gen: tokens of its answer.
        rounds: of each race.
        gate_s: as in `bench`.
        execute: as in `bench`.
        progress: called with (stage, rounds done, of how many).

    Raises:
        BadInput: as `race`.
        StageFailed: as `race`.
    """
    name = runtime or runtime_for(path)
    table = settings_of(name)
    fixed = dict(given or {})
    best = Arm(path, threads[0], runtime=name, settings=fixed)
    tried: list[Tried] = []
    wanted = {name: known for name, known in table.items() if name not in fixed and (known.lossless or name in lossy)}
    # That an interval of the widest race's level can be had of so few rounds, before anything is measured.
    widest = max([len(threads), *(len(known.values) for known in wanted.values())]) - 1
    signed_rank_interval([0.0] * rounds, 1 - (1 - LEVEL) / max(1, widest))

    def contest(stage: str, rivals: list[Arm]) -> None:
        nonlocal best
        if not rivals:
            return
        told = None if progress is None else (lambda done, total, _: progress(stage, done, total))
        speeds = [
            _turn(found, n_prompt, n_gen)
            for found in race(
                [best, *rivals],
                rounds=rounds,
                n_prompt=n_prompt,
                n_gen=n_gen,
                gate_s=gate_s,
                execute=execute,
                progress=told,
            )
        ]
        level = 1 - (1 - LEVEL) / len(rivals)
        results = [judge(f"pp{n_prompt}+tg{n_gen}", speeds[0], other, level) for other in speeds[1:]]
        winner = max(range(len(rivals)), key=lambda i: results[i].ratio if results[i].low > 1 else 0.0)
        for i, (rival, result) in enumerate(zip(rivals, results, strict=True)):
            tried.append(Tried(rival, result, taken=i == winner and result.low > 1))
        if results[winner].low > 1:
            best = rivals[winner]

    contest("threads", [replace(best, threads=count) for count in threads[1:]])
    refused: BadInput | StageFailed | None = None
    for setting, known in wanted.items():
        others = [replace(best, settings={**best.settings, setting: value}) for value in known.values[1:]]
        try:
            contest(setting, others)
        except LinkBroken:
            raise
        except (BadInput, StageFailed) as error:
            # The table is of the build here: a GPU that the build knows may not be there, least of all on a board; and
            # what needs more memory may find none. The setting stays as it is.
            refused = error
    if refused and not tried:
        raise refused
    return Tuned(best, tuple(tried))


def _turn(found: dict[str, list[float]], n_prompt: int, n_gen: int) -> list[float]:
    """Tokens/s of a whole turn in each round."""
    lengths = {f"pp{n_prompt}": n_prompt, f"tg{n_gen}": n_gen}
    columns = [[lengths[test] / speed for speed in speeds] for test, speeds in found.items()]
    return [(n_prompt + n_gen) / sum(times) for times in zip(*columns, strict=True)]
