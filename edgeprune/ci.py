"""`edgeprune ci`: does this commit make a model slower? A suite of files, each raced against the file it replaces.

A number of last week's run says little: the runner was another, or as busy as never. So a baseline is not a number here
but the file itself, kept beside its record; it is measured again, turn by turn with the new one, and only the paired
interval of the ratio decides. A regression is an interval that lies below 1 - tolerance as a whole. A file that is
neither slower nor faster does not take its baseline's place: many commits, each within the tolerance, would add up.
"""

from __future__ import annotations

import hashlib
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from edgeprune.devices import read_toml
from edgeprune.errors import BadInput, StageFailed
from edgeprune.files import atomic_folder, read_json, result_folder, sha256, write_json
from edgeprune.record import environment
from edgeprune.runtimes.bench import GATE_S, cpu_info
from edgeprune.runtimes.racing import ROUNDS, Arm, Comparison, Speeds, judge, race
from edgeprune.runtimes.records import median_interval

SCHEMA_VERSION = 1
BASELINE = "baseline.json"
TOLERANCE = 0.02
LONGER = 3  # times the rounds, at most, while an interval holds the edge of its tolerance

State = Literal["ok", "undecided", "regression", "improvement", "new"]
Progress = Callable[[str, int, int], None]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Entry(_Strict):
    """One file of a suite and how it is run."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    file: str  # relative to the suite's folder
    n_prompt: Annotated[int, Field(ge=0, le=1 << 20)] = 256
    n_gen: Annotated[int, Field(ge=0, le=1 << 20)] = 64
    threads: Annotated[int, Field(ge=1, le=512)] | None = None
    tolerance: Annotated[float, Field(gt=0, lt=1)] | None = None
    settings: dict[str, bool | int | str] = {}


class Suite(_Strict):
    """What `edgeprune ci` measures."""

    bench: Annotated[list[Entry], Field(min_length=1)]
    rounds: Annotated[int, Field(ge=6, le=1000)] = ROUNDS  # at least
    threads: Annotated[int, Field(ge=1, le=512)] | None = None
    tolerance: Annotated[float, Field(gt=0, lt=1)] = TOLERANCE


def read_suite(path: Path) -> Suite:
    """Read and check a suite.

    Raises:
        BadInput: no such file, no TOML, a field that is missing, unknown or out of range, a graph without its folder,
            or a name that comes twice.
    """
    suite = read_toml(path, Suite.model_validate)
    names = [entry.name for entry in suite.bench]
    for entry in suite.bench:
        if entry.file.endswith(".onnx"):  # its weights lie beside it
            raise BadInput(f"{entry.name!r} names a graph", where=path, remedy="name the folder that holds model.onnx")
    if twice := {name for name in names if names.count(name) > 1}:
        raise BadInput(f"the name {min(twice)!r} comes twice", where=path)
    return suite


@dataclass(frozen=True)
class Result:
    """One test of one entry.

    Attributes:
        name: the entry's name.
        test: "pp256", "tg64" …
        speeds: tokens/s of each round.
        comparison: with the baseline; None without one.
        tolerance: share by which it may be slower.
    """

    name: str
    test: str
    speeds: tuple[float, ...]
    comparison: Comparison | None
    tolerance: float

    @property
    def median(self) -> tuple[float, float, float]:
        """(median, low, high) of the speeds, with the bootstrap interval."""
        low, high = median_interval(self.speeds)
        return statistics.median(self.speeds), low, high

    @property
    def state(self) -> State:
        """What the interval says."""
        if self.comparison is None:
            return "new"
        if self.comparison.high < 1 - self.tolerance:
            return "regression"
        if self.comparison.low > 1 + self.tolerance:
            return "improvement"
        return "undecided" if self.comparison.low < 1 - self.tolerance else "ok"

    @property
    def verdict(self) -> str:
        """One line."""
        if self.comparison is None:
            return "no baseline"
        c = self.comparison
        return f"{self.state}: {c.ratio:.3f} of the baseline's speed [{c.low:.3f}, {c.high:.3f}]"


@dataclass(frozen=True)
class Report:
    """What a run of a suite found."""

    suite: Suite
    results: tuple[Result, ...]
    hashes: dict[str, str]  # SHA-256 of each entry's file, by name
    files: dict[str, Path]
    measured_at: str
    baseline: dict[str, Path] = field(default_factory=dict)  # the baseline's files, by name
    failures: dict[str, str] = field(default_factory=dict)  # why an entry could not be measured, by name

    @property
    def to_keep(self) -> dict[str, Path]:
        """What later runs are to be raced against, by name: this run's file where it is new, or in some test faster
        than the baseline's and in none slower, else the baseline's still."""
        faster = {result.name for result in self.results if result.state == "improvement"}
        faster -= {each.name for each in self.results if each.comparison is not None and each.comparison.high < 1}
        kept = {name: file for name, file in self.files.items() if name not in self.failures}
        return kept | {name: file for name, file in self.baseline.items() if name in self.files and name not in faster}

    @property
    def regressions(self) -> list[Result]:
        """The tests that became slower beyond their tolerance."""
        return [result for result in self.results if result.state == "regression"]

    def to_json(self) -> dict[str, Any]:
        """The record; with the files beside it, the baseline of a later run."""
        return {
            "schema_version": SCHEMA_VERSION,
            "measured_at": self.measured_at,
            "cpu_info": cpu_info(),
            "environment": environment(),
            "files": {name: {"file": self.files[name].name, "sha256": digest} for name, digest in self.hashes.items()},
            "failures": self.failures,
            "results": [
                {
                    "name": result.name,
                    "test": result.test,
                    "samples_ts": list(result.speeds),
                    "state": result.state,
                    "tolerance": result.tolerance,
                    "comparison": None if result.comparison is None else result.comparison.to_json(),
                }
                for result in self.results
            ],
        }


def run_suite(
    suite: Suite,
    folder: Path,
    *,
    baseline: Path | None = None,
    baseline_python: str | None = None,
    threads: int,
    gate_s: float | None = GATE_S,
    progress: Progress | None = None,
) -> Report:
    """Measure every entry of `suite`, and what it replaces.

    Args:
        suite: what to measure.
        folder: what its files are relative to.
        baseline: a folder that `save_baseline` wrote; None: only measure.
        baseline_python: the interpreter that measures the baseline (another runtime's build in another environment);
            default: this one.
        threads: where neither the entry nor the suite says.
        gate_s: as in `bench`.
        progress: called with (stage, done, total).

    Raises:
        BadInput: a file is missing, or the baseline is not what its record says.
        StageFailed: no file ran, or the machine was not fit to measure any.
    """
    files = {entry.name: folder / entry.file for entry in suite.bench}
    for name, path in files.items():
        if not path.exists():
            raise BadInput(f"the file of {name!r} is missing", where=path)
    kept = baseline_files(baseline) if baseline else {}
    results: list[Result] = []
    failures: dict[str, StageFailed] = {}
    for done, entry in enumerate(suite.bench):
        count = entry.threads or suite.threads or threads
        arms = [Arm(files[entry.name], count, dict(entry.settings), label=entry.name)]
        if entry.name in kept:
            old = Arm(
                kept[entry.name], count, dict(entry.settings), label=f"{entry.name} (baseline)", python=baseline_python
            )
            arms.insert(0, old)
        tolerance = entry.tolerance or suite.tolerance
        try:
            speeds = race(
                arms,
                rounds=suite.rounds,
                undecided=partial(undecided, tolerance=tolerance),
                most=LONGER * suite.rounds,
                n_prompt=entry.n_prompt,
                n_gen=entry.n_gen,
                gate_s=gate_s,
                progress=progress and partial(_tell, progress, done * suite.rounds, len(suite.bench) * suite.rounds),
            )
        except StageFailed as error:  # what the others show is not lost by it
            failures[entry.name] = error
            continue
        for test, values in speeds[-1].items():
            comparison = judge(test, speeds[0][test], values) if len(arms) == 2 else None
            results.append(Result(entry.name, test, tuple(values), comparison, tolerance))
    if len(failures) == len(suite.bench):
        raise next(iter(failures.values()))
    hashes = {name: content_hash(path) for name, path in files.items()}
    at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Report(suite, tuple(results), hashes, files, at, kept, {name: str(e) for name, e in failures.items()})


def undecided(speeds: list[Speeds], *, tolerance: float) -> bool:
    """Whether some arm's interval against the first's holds the edge of the tolerance, so that more rounds may tell.

    Looking again and again finds something more often where there is nothing; here "nothing" is a ratio of 1, which is
    a whole tolerance away from the edge that decides (`benchmarks/ci_power.py` measures how often it happens).
    """
    found = [judge(test, speeds[0][test], arm[test]) for arm in speeds[1:] for test in arm]
    return any(each.low < 1 - tolerance <= each.high for each in found)


def _tell(progress: Progress, before: int, total: int, turn: int, _: int, arm: str) -> None:
    progress(arm, before + turn, total)


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or of the names and hashes of a folder's files."""
    if path.is_file():
        return sha256(path)
    listing = "\n".join(f"{sha256(file)} {file.name}" for file in sorted(path.iterdir()) if file.is_file())
    return hashlib.sha256(listing.encode()).hexdigest()


def save_baseline(report: Report, out: Path) -> Path:
    """Keep a run as the baseline of later ones: its record and `Report.to_keep`, in a folder that is whole or absent.

    An older baseline in that place is replaced; it may be the one that the run was raced against.

    Raises:
        BadInput: the folder cannot be written, or holds something else.
    """
    with atomic_folder(result_folder(out, BASELINE)) as folder:
        record = report.to_json()
        to_keep = report.to_keep
        record["files"] = {name: entry for name, entry in record["files"].items() if name in to_keep}
        for number, (name, path) in enumerate(to_keep.items()):
            kept = folder / f"{number}-{report.files[name].stem}{path.suffix}"  # by the suffix the runtime is known
            if path.is_dir():
                shutil.copytree(path, kept)
            else:
                shutil.copy2(path, kept)
            record["files"][name]["file"] = kept.name
            if path != report.files[name]:
                record["files"][name]["sha256"] = content_hash(kept)
        write_json(folder / BASELINE, record)
    return out


def baseline_files(folder: Path) -> dict[str, Path]:
    """The files of a baseline by their entries' names, each checked against its hash.

    Raises:
        BadInput: no baseline, or a file of it is missing or another.
    """
    record = read_json(folder / BASELINE)
    found: dict[str, Path] = {}
    remedy = "make it again: edgeprune ci --save-baseline DIR"
    entries = record.get("files")
    if record.get("schema_version") != SCHEMA_VERSION or not isinstance(entries, dict):
        raise BadInput("not a baseline of this version", where=folder / BASELINE, remedy=remedy)
    for name, entry in entries.items():
        entry = entry if isinstance(entry, dict) else {}
        file, digest = entry.get("file"), entry.get("sha256")
        if not isinstance(file, str) or Path(file).name != file:
            raise BadInput(f"the file of {name!r} is not in the folder", where=folder / BASELINE, remedy=remedy)
        path = folder / file
        if not path.exists() or content_hash(path) != digest:
            raise BadInput(f"the baseline's file of {name!r} is missing or changed", where=path, remedy=remedy)
        found[name] = path
    return found
