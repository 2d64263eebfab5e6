"""`devices measure`: the profile of a machine from short runs of the real kernels on models of random weights.

A streaming read tells what memory gives and misses what the kernels take; so the profile's figures come from the
runtime itself. With t(Q) the seconds a token of a yardstick takes and W(Q) the bytes it reads,

    t = W / (q B) + n c

has two unknowns for the four-bit type, B and c, and two yardsticks to find them: few wide layers, many narrow ones. The
other types' shares q follow from the wide one alone, and P = parameters x tokens/s of a prompt. What the figures do not
hold for other shapes is in the intervals (`SHAPES`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune import files
from edgeprune.devices import DeviceProfile
from edgeprune.errors import StageFailed
from edgeprune.export.yardstick import DEEP, WIDE, Yardstick, write_yardstick
from edgeprune.runtimes.bench import GATE_S, BenchResult, bench
from edgeprune.runtimes.gguf_file import GgufFile
from edgeprune.runtimes.records import Record

BASE = "Q4_0"  # the type that `gbs` is of
# Types whose kernels are timed, and the mixtures that consist of them.
KINDS: Mapping[str, tuple[str, ...]] = {
    "Q4_0": ("Q4_0",),
    "IQ4_NL": ("IQ4_NL",),
    "Q4_K": ("Q4_K_S", "Q4_K_M"),
    "Q6_K": ("Q6_K",),
    "Q8_0": ("Q8_0",),
    "F16": ("F16",),
}
N_PROMPT, N_GEN = 128, 32
SHAPES = 0.1  # how far other shapes lie from the yardsticks', of a speed: the demo model is predicted within this

Progress = Callable[[str, int, int], None]
Bench = Callable[..., BenchResult]


@dataclass(frozen=True)
class Speeds:
    """What one yardstick did: its records, the bytes a token reads, and its shape."""

    shape: Yardstick
    read_bytes: int
    pp: Record | None
    tg: Record

    def seconds(self, end: str = "median_ts") -> float:
        """Of a token in decoding: the median, or the end "low_ts" or "high_ts" of its interval."""
        return 1 / float(getattr(self.tg, end))


@dataclass(frozen=True)
class Sheet:
    """Everything that was measured, by type and threads."""

    wide: dict[str, Speeds]
    deep: Speeds
    by_threads: dict[int, Speeds]
    threads: int


def measure_device(
    base: DeviceProfile,
    *,
    counts: list[int],
    measure: Bench = bench,
    gate_s: float | None = GATE_S,
    progress: Progress | None = None,
) -> DeviceProfile:
    """The profile `base` with its speeds measured.

    Args:
        base: memory, processor and budget of the machine.
        counts: numbers of threads to try.
        measure: measures one file; `bench`, here or on a board.
        gate_s: as in `bench`.
        progress: called with (stage, done, total).

    Raises:
        StageFailed: a yardstick did not run, or the machine was not fit to be measured.
    """
    total = len(counts) + len(KINDS)
    done = 0
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as scratch:

        def time(shape: Yardstick, kind: str, threads: int, n_prompt: int = 0) -> Speeds:
            nonlocal done
            if progress:
                progress(f"timing {shape.name} {kind}, {threads} threads", done, total)
            path = Path(scratch) / f"{shape.name}-{kind}.gguf"
            if not path.exists():
                write_yardstick(shape, kind, path)
            result = measure(path, n_prompt=n_prompt, n_gen=N_GEN, threads=threads, repetitions=5, gate_s=gate_s)
            done += 1
            if result.status != "ok" or result.tg is None:
                raise StageFailed(f"{result.status}: {result.reason}", where=path.name)
            return Speeds(shape, _read_bytes(path), result.pp, result.tg)

        by_threads = {count: time(WIDE, BASE, count) for count in counts}
        best = max(by_threads, key=lambda count: by_threads[count].tg.median_ts)
        wide = {kind: time(WIDE, kind, best, N_PROMPT) for kind in KINDS}
        deep = time(DEEP, BASE, best)
    return profile_of(base, Sheet(wide, deep, by_threads, best))


def _read_bytes(path: Path) -> int:
    """Bytes that a token reads: all weights (yardsticks are tied), and the cache of half the generation."""
    file = GgufFile(path)
    cache = sum(2 * layer.kv_heads for layer in file.widths()) * 64 * 2 * (N_GEN // 2)
    return sum(file.bytes_by_part().values()) + cache


def solve(wide: Speeds, deep: Speeds, wide_s: float, deep_s: float) -> tuple[float, float]:
    """(B in 10^9 bytes/s, c in ms a layer) of t = W / B + n c for two yardsticks, seconds a token each.

    Where the narrow layers take no longer than their bytes explain, c is 0 and the wide one alone gives B.
    """
    n1, n2 = wide.shape.layers, deep.shape.layers
    w1, w2 = wide.read_bytes, deep.read_bytes
    # Cramer's rule for W1/B + n1 c = t1, W2/B + n2 c = t2.
    determinant = w1 * n2 - w2 * n1
    inverse = (wide_s * n2 - deep_s * n1) / determinant
    layer = (w1 * deep_s - w2 * wide_s) / determinant
    if layer < 0 or inverse <= 0:
        return w1 / wide_s / 1e9, 0.0
    return 1 / inverse / 1e9, 1e3 * layer


def profile_of(base: DeviceProfile, sheet: Sheet) -> DeviceProfile:
    """`base` with the figures that `sheet` gives. Pure."""
    main = sheet.wide[BASE]
    where = f"{main.tg.cpu_info}, llama.cpp {main.tg.build_commit}, {main.tg.test_time[:10]}, {sheet.threads} threads"
    source = f"models of random weights on {where}"
    gbs, layer_ms = solve(main, sheet.deep, main.seconds(), sheet.deep.seconds())
    # The ends of the samples' interval, widened by what other shapes do.
    spread = 1 + SHAPES
    slow, fast = (main.seconds(end) / main.seconds() for end in ("low_ts", "high_ts"))

    def figure(value: float, low: float, high: float, digits: int = 4) -> dict[str, Any]:
        low, value, high = (float(f"{number:.{digits}g}") for number in (low, value, high))
        return {"value": value, "low": low, "high": high, "kind": "measured", "source": source}

    def fixed(seconds: float) -> float:
        return seconds - main.shape.layers * layer_ms / 1e3

    decode: dict[str, Any] = {"gbs": figure(gbs, gbs / slow / spread, gbs / fast * spread)}
    if layer_ms:
        decode["layer_ms"] = figure(layer_ms, layer_ms / spread, layer_ms * spread)
    if 1 in sheet.by_threads and sheet.threads > 1:
        one = sheet.by_threads[1]
        alone = one.read_bytes / one.seconds() / 1e9
        decode["one_thread_gbs"] = figure(alone, alone / spread, alone * spread)
    kernels, prefill = {}, {}
    for kind, names in KINDS.items():
        found = sheet.wide[kind]
        share = found.read_bytes / max(fixed(found.seconds()), 1e-9) / 1e9 / gbs
        for name in names:
            if kind != BASE:
                kernels[name] = figure(share, share, share, 3)
            if found.pp is not None:
                rate = found.pp.median_ts * found.shape.parameters / 1e9
                low, high = (end / found.pp.median_ts for end in (found.pp.low_ts, found.pp.high_ts))
                prefill[name] = figure(rate, rate * low / spread, rate * high * spread)
    values = base.model_dump(exclude_none=True)
    cpu = {**values["decode"].get("cpu", {}), **decode, "kernel": kernels}
    if not layer_ms:
        cpu.pop("layer_ms", None)
    cpu.pop("fixed_ms", None)
    values["decode"] = {**values["decode"], "cpu": cpu}
    values["prefill"] = {**values.get("prefill", {}), "cpu": prefill}
    values["load"] = _load(list(sheet.wide.values()), sheet.deep, figure)
    values["start"]["threads"] = {
        "value": float(sheet.threads),
        "kind": "measured",
        "source": "fastest of " + ", ".join(f"{n}: {s.tg.median_ts:.1f} tok/s" for n, s in sheet.by_threads.items()),
    }
    return DeviceProfile.model_validate(values)


def _load(wide: list[Speeds], deep: Speeds, figure: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Opening a file: what it takes beside its bytes, and their rate, which differs by type (some are repacked)."""
    fixed_ms = min(speeds.tg.load_ms for speeds in (*wide, deep))
    rates = sorted(speeds.tg.model_size / max(speeds.tg.load_ms - fixed_ms, 1.0) / 1e6 for speeds in wide)
    middle = rates[len(rates) // 2]
    return {"gbs": figure(middle, rates[0], rates[-1]), "fixed_ms": figure(fixed_ms, 0.5 * fixed_ms, 2 * fixed_ms)}


def to_toml(profile: DeviceProfile) -> str:
    """The text of a profile file, which `parse_profile` reads back as the same profile."""
    import tomlkit

    return tomlkit.dumps(profile.model_dump(mode="json", exclude_none=True, exclude_defaults=True))


def save_profile(profile: DeviceProfile, path: Path) -> Path:
    """Write a profile file; whole or not at all."""
    files.write_text(path, to_toml(profile))
    return path
