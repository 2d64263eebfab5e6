"""`devices measure`: the profile of a machine from short runs of the real kernels on models of random weights.

A streaming read tells what memory gives and misses what the kernels take; so the profile's figures come from the
runtime itself. A token of a yardstick that reads W bytes of type Q in n layers takes

    t = W / (q_Q B) + n c

with one c for the machine and one q B for each type, fitted to wide and slim yardsticks by least squares of the
relative errors, none below zero (Lawson and Hanson's NNLS). P = parameters x tokens/s of a prompt. A machine's speed
drifts, so the yardsticks are measured in rounds, and the medians over the rounds count. What the figures do not hold
for other shapes is in the intervals (`SHAPES`).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune import files
from edgeprune.devices import Backend, DeviceProfile
from edgeprune.errors import StageFailed
from edgeprune.export.yardstick import HEAD_DIM, WIDE, Yardstick, slim, write_yardstick
from edgeprune.offload import device_settings
from edgeprune.runtimes.bench import GATE_S, BenchResult, bench
from edgeprune.runtimes.gguf_file import GgufFile
from edgeprune.runtimes.records import Record

BASE = "Q4_0"  # the type that `gbs` is of
# Types whose kernels are timed, and the mixtures that consist of them.
KINDS: Mapping[str, tuple[str, ...]] = {
    "Q4_0": ("Q4_0",),
    "Q4_1": ("Q4_1",),
    "IQ4_NL": ("IQ4_NL",),
    "Q5_0": ("Q5_0",),
    "Q5_1": ("Q5_1",),
    "Q4_K": ("Q4_K_S", "Q4_K_M"),
    "Q5_K": ("Q5_K_S", "Q5_K_M"),
    "Q6_K": ("Q6_K",),
    "Q8_0": ("Q8_0",),
    "F16": ("F16",),
}
N_PROMPT, N_GEN = 128, 64
ROUNDS, ROUNDS_S = 4, 110.0  # as many as fit into so many seconds, one at least
SHAPES = 0.15  # how far other shapes lie from the yardsticks', of a speed: the demo model is predicted within this

Progress = Callable[[str, int, int], None]
Bench = Callable[..., BenchResult]


@dataclass
class Point:
    """One yardstick of one type at one number of threads, and what it did in each round."""

    shape: Yardstick
    kind: str
    threads: int
    read_bytes: int
    file_bytes: int
    tg: list[Record] = field(default_factory=list)
    pp: list[Record] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Of a token in decoding, the median over the rounds."""
        return 1 / float(np.median([record.median_ts for record in self.tg]))

    def spread(self) -> tuple[float, float]:
        """(slowest, fastest) round, as shares of the median speed."""
        speeds = [record.median_ts * self.seconds for record in self.tg]
        return min(speeds), max(speeds)

    @property
    def load_ms(self) -> float:
        """Of opening the file, the median over the rounds."""
        return float(np.median([record.load_ms for record in self.tg]))


def measure_device(
    base: DeviceProfile,
    *,
    counts: list[int],
    backend: Backend = "cpu",
    measure: Bench = bench,
    seconds: float = ROUNDS_S,
    gate_s: float | None = GATE_S,
    progress: Progress | None = None,
) -> DeviceProfile:
    """The profile `base` with its speeds measured.

    Args:
        base: memory, processor and budget of the machine.
        counts: numbers of threads to try.
        backend: what computes; another than the processor gets all layers.
        measure: measures one file; `bench`, here or on a board.
        seconds: about as long as the rounds may take.
        gate_s: as in `bench`.
        progress: called with (stage, done, total).

    Raises:
        StageFailed: a yardstick did not run, or the machine was not fit to be measured.
    """
    measure = partial(measure, settings=device_settings("llamacpp", backend, None))
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as scratch:

        def point(shape: Yardstick, kind: str, threads: int) -> Point:
            path = Path(scratch) / f"{shape.name}-{kind}.gguf"
            if not path.exists():
                write_yardstick(shape, kind, path)
            return Point(shape, kind, threads, _read_bytes(path), path.stat().st_size)

        def run(points: Sequence[Point], rounds: int, seconds: float) -> None:
            began = time.monotonic()
            for turn in range(rounds):
                if turn and (time.monotonic() - began) * (turn + 1) / turn > seconds:
                    break
                for number, each in enumerate(points):
                    if progress:
                        what = f"round {turn + 1}: {each.shape.name} {each.kind}, {each.threads} threads"
                        progress(what, turn * len(points) + number, rounds * len(points))
                    prompt = N_PROMPT if each.shape is WIDE else 0
                    _time(each, Path(scratch), prompt, measure, gate_s)

        sweep = [point(WIDE, BASE, count) for count in counts]
        run(sweep, 2, seconds / 3)
        best = min(sweep, key=lambda each: each.seconds).threads
        points = [point(shape, kind, best) for kind in KINDS for shape in (WIDE, slim(kind))]
        run(points, ROUNDS, seconds)
    return profile_of(base, sweep, points, backend)


def _time(point: Point, folder: Path, n_prompt: int, measure: Bench, gate_s: float | None) -> None:
    path = folder / f"{point.shape.name}-{point.kind}.gguf"
    result = measure(
        path, n_prompt=n_prompt, n_gen=N_GEN, threads=point.threads, repetitions=2, least_s=0.3, gate_s=gate_s
    )
    if result.status != "ok" or result.tg is None:
        raise StageFailed(f"{result.status}: {result.reason}", where=path.name)
    point.tg.append(result.tg)
    if result.pp is not None:
        point.pp.append(result.pp)


def _read_bytes(path: Path) -> int:
    """Bytes that a token reads: all weights (yardsticks are tied), and the cache of half the generation."""
    file = GgufFile(path)
    cache = sum(2 * layer.kv_heads for layer in file.widths()) * HEAD_DIM * 2 * (N_GEN // 2)
    return sum(file.bytes_by_part().values()) + cache


def solve(points: Sequence[Point]) -> tuple[dict[str, float], float]:
    """({type: q B in 10^9 bytes/s}, c in ms a layer) that fit the points best.

    Raises:
        StageFailed: a type's time does not grow with its bytes: the machine was too noisy.
    """
    from scipy.optimize import nnls

    kinds = list(dict.fromkeys(point.kind for point in points))
    rows = np.zeros((len(points), len(kinds) + 1))
    for row, point in zip(rows, points, strict=True):  # each divided by its time: relative errors count
        row[kinds.index(point.kind)] = point.read_bytes / 1e9 / point.seconds
        row[-1] = point.shape.layers / 1e3 / point.seconds
    found, _ = nnls(rows, np.ones(len(points)))
    if not found[:-1].all():
        kind = kinds[int(np.argmin(found[:-1]))]
        raise StageFailed(f"more bytes of {kind} took no longer", remedy="measure again on a quiet machine")
    return dict(zip(kinds, (1 / found[:-1]).tolist(), strict=True)), float(found[-1])


def profile_of(
    base: DeviceProfile, sweep: Sequence[Point], points: Sequence[Point], backend: Backend = "cpu"
) -> DeviceProfile:
    """`base` with the figures that the points give: `sweep` at each number of threads, `points` at the best. Pure."""
    first = points[0]
    record, rounds = first.tg[0], len(first.tg)
    what = record.cpu_info if backend == "cpu" else record.gpu_info
    where = f"{what}, llama.cpp {record.build_commit}, {record.test_time[:10]}, {first.threads} threads"
    source = f"models of random weights, {rounds} rounds, on {where}"
    by_kind, layer_ms = solve(points)
    gbs = by_kind[BASE]
    # Of a typical point: a single disturbed round says little of the machine.
    lowest, highest = np.median([point.spread() for point in points], axis=0).tolist()
    slow, fast = (1 - SHAPES) * lowest, (1 + SHAPES) * highest

    def figure(value: float, low: float, high: float, digits: int = 4) -> dict[str, Any]:
        low, value, high = (float(f"{number:.{digits}g}") for number in (low, value, high))
        return {"value": value, "low": low, "high": high, "kind": "measured", "source": source}

    decode: dict[str, Any] = {"gbs": figure(gbs, gbs * slow, gbs * fast)}
    if layer_ms:
        decode["layer_ms"] = figure(layer_ms, layer_ms / fast, layer_ms / slow)
    for alone in (point for point in sweep if backend == "cpu" and point.threads == 1 < first.threads):
        rate = alone.read_bytes / alone.seconds / 1e9
        decode["one_thread_gbs"] = figure(rate, rate * slow, rate * fast)
    prefill = {}
    for point in (point for point in points if point.pp):
        speeds = [record.median_ts for record in point.pp]
        rate = float(np.median(speeds)) * point.shape.parameters / 1e9
        low, high = (end / float(np.median(speeds)) for end in (min(speeds), max(speeds)))
        for name in KINDS[point.kind]:
            prefill[name] = figure(rate, rate * low * (1 - SHAPES), rate * high * (1 + SHAPES))
    shares = {kind: rate / gbs for kind, rate in by_kind.items() if kind != BASE}
    values = base.model_dump(exclude_none=True)
    kept = {
        key: value for key, value in values["decode"].get(backend, {}).items() if key not in ("layer_ms", "fixed_ms")
    }
    types = {kind: figure(share, share, share, 3) for kind, share in shares.items()}
    types[BASE] = figure(1.0, 1.0, 1.0)
    kernels = {name: figure(share, share, share, 3) for kind, share in shares.items() for name in KINDS[kind]}
    values["decode"] = {**values["decode"], backend: {**kept, **decode, "kernel": kernels, "types": types}}
    values["prefill"] = {**values.get("prefill", {}), backend: prefill}
    values["load"] = _load(points, figure)
    values["start"]["backend"] = backend
    values["start"]["threads"] = {
        "value": float(first.threads),
        "kind": "measured",
        "source": "fastest of " + ", ".join(f"{p.threads}: {1 / p.seconds:.1f} tok/s" for p in sweep),
    }
    return DeviceProfile.model_validate(values)


def _load(points: Sequence[Point], figure: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Opening a file: what it takes by itself, by its bytes (some types are repacked), and by its vocabulary."""
    wide = [point for point in points if not point.shape.worded]
    fixed_ms = min(point.load_ms for point in wide)
    rates = sorted(point.file_bytes / max(point.load_ms - fixed_ms, 0.1) / 1e6 for point in wide)
    middle = rates[len(rates) // 2]
    tokens = sorted((p.load_ms - fixed_ms) / p.shape.vocabulary * 1e3 for p in points if p.shape.worded)
    usual = max(tokens[0], 0.0)  # the type that loads fastest: the others' time is their bytes'
    return {
        "gbs": figure(middle, rates[0], rates[-1]),
        "fixed_ms": figure(fixed_ms, 0.5 * fixed_ms, 2 * fixed_ms),
        "token_us": figure(usual, 0.5 * usual, 2 * usual),
    }


def to_toml(profile: DeviceProfile) -> str:
    """The text of a profile file, which `parse_profile` reads back as the same profile."""
    import tomlkit

    return tomlkit.dumps(profile.model_dump(mode="json", exclude_none=True, exclude_defaults=True))


def save_profile(profile: DeviceProfile, path: Path) -> Path:
    """Write a profile file; whole or not at all."""
    files.write_text(path, to_toml(profile))
    return path
