"""Records of speed with llama-bench's field names, so that what reads llama-bench's output reads ours.

Field names and the shape of the JSON, CSV and Markdown outputs follow llama.cpp's tools/llama-bench. Our own fields
stand behind: median and interval, because a mean over a disturbed repetition misleads, and load time, time to first
token and memory, because a device's budget asks for them.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

import numpy as np

from edgeprune.errors import unknown
from edgeprune.runtimes.settings import describe

LEVEL = 0.95  # of the bootstrap interval
RESAMPLES = 2000


@dataclass(frozen=True)
class Record:
    """One test of one model: `n_prompt` tokens at once (pp) or `n_gen` tokens one by one (tg); the other is 0.

    Attributes up to `samples_ts` are llama-bench's: times in ns, speeds in tokens/s, `model_size` in bytes of weights,
    `stddev_*` of the samples (n - 1). What a runtime does not tell is None (null in JSON), not a guess.

    Attributes:
        median_ts: median of the samples, tokens/s.
        low_ts: lower end of the bootstrap interval of the median, tokens/s.
        high_ts: its upper end.
        ttft_ms: median time to first token, ms: the prompt and the first step of decoding (pp only).
        load_ms: opening the model, ms, with whatever the page cache held.
        peak_mib: largest memory of the measuring process, MiB, mapped pages and the interpreter included.
        runtime: name of the runtime.
        settings: what the runtime was told beside threads and context (`settings.Setting`).
        gated: whether the machine was watched, and what disturbed the measurement thrown away.
        n_dropped: repetitions that were.
        machine: the machine before the first repetition and after the last, {"before", "after"} (`Snapshot.to_json`).
        sustained: what `repeat.sustain` found; None if it was not asked for.
        peak_gpu_mib: largest memory of the measuring process on NVIDIA's GPUs, MiB; None where that is not told.
    """

    build_commit: str | None
    build_number: int | None
    cpu_info: str
    gpu_info: str
    backends: str
    model_filename: str
    model_type: str | None
    model_size: int
    model_n_params: int | None
    n_batch: int | None
    n_ubatch: int | None
    n_threads: int
    n_prompt: int
    n_gen: int
    n_depth: int
    test_time: str
    avg_ns: int
    stddev_ns: int
    avg_ts: float
    stddev_ts: float
    samples_ns: tuple[int, ...]
    samples_ts: tuple[float, ...]
    median_ts: float
    low_ts: float
    high_ts: float
    ttft_ms: float | None
    load_ms: float
    peak_mib: float | None
    runtime: str
    settings: dict[str, bool | int | str] = field(default_factory=dict)
    gated: bool = False
    n_dropped: int = 0
    machine: dict[str, Any] | None = None
    sustained: dict[str, Any] | None = None
    peak_gpu_mib: float | None = None

    @property
    def test(self) -> str:
        """The test's name in llama-bench's table: pp512, tg128, with @ d4096 at a depth."""
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{name} @ d{self.n_depth}" if self.n_depth else name


def statistics(samples_ns: Sequence[int], n_tokens: int) -> dict[str, Any]:
    """The fields of a `Record` that follow from the nanoseconds that `n_tokens` tokens took in each repetition."""
    speeds = [1e9 * n_tokens / ns for ns in samples_ns]
    low, high = median_interval(speeds)
    return {
        "avg_ns": round(float(np.mean(samples_ns))),
        "stddev_ns": round(_stddev(samples_ns)),
        "avg_ts": float(np.mean(speeds)),
        "stddev_ts": _stddev(speeds),
        "samples_ns": tuple(samples_ns),
        "samples_ts": tuple(speeds),
        "median_ts": float(np.median(speeds)),
        "low_ts": low,
        "high_ts": high,
    }


def _stddev(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def median_interval(values: Sequence[float], *, level: float = LEVEL, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the median (Efron 1979), seeded: the same values give the same interval.

    With five values it is nearly their range; that is what five values can say.
    """
    generator = np.random.default_rng(seed)
    array = np.asarray(values, dtype=np.float64)
    medians = np.median(generator.choice(array, size=(RESAMPLES, array.size)), axis=1)
    tail = (1 - level) / 2
    low, high = np.quantile(medians, (tail, 1 - tail))
    return float(low), float(high)


def to_dict(record: Record) -> dict[str, Any]:
    """The record as JSON carries it."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(record).items()}


def from_dict(values: dict[str, Any]) -> Record:
    """The inverse of `to_dict`; unknown fields are left out.

    Raises:
        KeyError: a field is missing that has no default.
    """
    optional = {
        item.name for item in fields(Record) if item.default is not MISSING or item.default_factory is not MISSING
    }
    kept = {item.name: values[item.name] for item in fields(Record) if item.name in values or item.name not in optional}
    for samples in ("samples_ns", "samples_ts"):
        kept[samples] = tuple(kept[samples])
    return Record(**kept)


def to_json(records: Sequence[Record]) -> str:
    """A JSON array, an object a test."""
    return json.dumps([to_dict(record) for record in records], indent=2) + "\n"


def to_csv(records: Sequence[Record]) -> str:
    """Comma-separated values, quoted, with a header; what has parts is in the JSON only, as in llama-bench."""
    nested = ("samples_ns", "samples_ts", "settings", "machine", "sustained")
    names = [item.name for item in fields(Record) if item.name not in nested]
    text = io.StringIO()
    text.write(",".join(names) + "\n")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    for record in records:
        values = [getattr(record, name) for name in names]
        writer.writerow(["" if value is None else value for value in values])
    return text.getvalue()


def to_markdown(records: Sequence[Record]) -> str:
    """A table with llama-bench's columns, then the median with its interval, and the peak of memory."""
    columns: list[tuple[str, int, Callable[[Record], str]]] = [  # negative width: aligned to the left
        ("model", -30, lambda r: r.model_type or r.model_filename.rsplit("/", 1)[-1]),
        ("size", 10, lambda r: _bytes(r.model_size)),
        ("params", 10, lambda r: _params(r.model_n_params)),
        ("backend", -10, lambda r: r.backends),
        ("threads", 7, lambda r: str(r.n_threads)),
        ("test", 15, lambda r: " ".join(filter(None, (r.test, describe(r.settings))))),
        ("t/s", 20, lambda r: f"{r.avg_ts:.2f} ± {r.stddev_ts:.2f}"),
        ("median [95 %]", 26, lambda r: f"{r.median_ts:.2f} [{r.low_ts:.2f}, {r.high_ts:.2f}]"),
        ("peak MiB", 8, lambda r: "-" if r.peak_mib is None else f"{r.peak_mib:.0f}"),
    ]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(-width) if width < 0 else cell.rjust(width)
            for cell, (_, width, _) in zip(cells, columns, strict=True)
        )
        return "| " + " | ".join(padded) + " |"

    if any(record.sustained for record in records):
        columns.append(("sustained", 24, _sustained))
    rule = ["-" * (abs(width) - 1) + ("-" if width < 0 else ":") for _, width, _ in columns]
    lines = [line([title for title, _, _ in columns]), line(rule)]
    lines += [line([show(record) for _, _, show in columns]) for record in records]
    return "\n".join(lines) + "\n"


FORMATS: dict[str, Callable[[Sequence[Record]], str]] = {"md": to_markdown, "json": to_json, "csv": to_csv}


def render(records: Sequence[Record], form: str) -> str:
    """The records as text in one of `FORMATS`.

    Raises:
        BadInput: there is no such format.
    """
    if form not in FORMATS:
        raise unknown("output format", form, FORMATS)
    return FORMATS[form](records)


def _sustained(record: Record) -> str:
    """Tokens/s at the end of the sustained run, and what that is of its beginning."""
    found = record.sustained
    return f"{found['ts']:.2f} ({100 * found['ts'] / found['first_ts']:.0f} % of first)" if found else "-"


def _bytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def _params(count: int | None) -> str:
    if count is None:
        return "-"
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
