"""Does distilled text recover, or calibrate, a pruned model as well as more text does?

    python benchmarks/distillation_recovery.py --data DATA --out distillation_recovery.json
        [--tables recovery calibration] [--methods …] [--tokens 16k 64k 256k] [--seeds 0 1 2] [--tasks]

The pool is C4 and Wikipedia text; a part of it that no method sees decides which of a training's weights are kept. The
model is the demo model with a fifth of its parameters gone, each layer to widths of its own.

recovery: each set trains the pruned model for the same number of steps, as many as the largest set has windows for one
pass (4 windows of 256 tokens a step), whatever its size: a small set is seen often, a large one once. calibration: each
set is what the dense model is pruned with, to the same widths; nothing is trained.

`--halves`: the sets of a seed are chosen from a half of the pool's documents, drawn by the seed, so that a method in
which nothing else is drawn has sets that differ too.

Judged on other text, in llama.cpp: KL to the dense model and bits per byte over the dense model's, on WikiText-2's test
text and on TinyStories. What is chosen by such figures, as `--method auto` is, is chosen by WikiText-2's validation
text. Finished cells in OUT are kept; `--render` prints the tables of what is there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pruning_cells import trainer

from edgeprune.calibration import read_texts, read_weighted, weights_of
from edgeprune.checkpoint import Checkpoint
from edgeprune.cli_distill import count_of
from edgeprune.compensated import Origin, prune_compensated
from edgeprune.distillation import METHODS
from edgeprune.distillation.distil import distil
from edgeprune.errors import EdgepruneError
from edgeprune.export.gguf_writer import write_gguf
from edgeprune.files import cache_dir, read_json, write_json
from edgeprune.layerwise import Compensation, packed
from edgeprune.memory import keep_freed_memory
from edgeprune.models import checkpoint_folder, resolve
from edgeprune.pruning import WINDOW
from edgeprune.pruning import prune as prune_model
from edgeprune.quality import evaluate
from edgeprune.recipe import RECIPES
from edgeprune.record import environment
from edgeprune.recovery import recover
from edgeprune.reference import make_reference
from edgeprune.runtimes.pytorch import load_tokenizer
from edgeprune.tasks import run_tasks

RATIO = 0.2
POOL = ("c4/c4.txt", "c4/c4_demo.jsonl", "wikipedia/wikipedia.txt")
JUDGED = {"wikitext2": "wikitext2/wiki.test.raw", "tinystories": "tinystories/tinystories.txt"}
CHOSEN_BY = {"validation": "wikitext2/wiki.valid.raw"}
WINDOWS = 20  # of 512 tokens of each judged text
STEPS = 256
# The protocol's own, whatever `recover` does by default.
RECIPE = replace(RECIPES["distil"].with_length(256), train_embedding=True)
TASKS = ("hellaswag", "arc_easy", "piqa")
HELD_OUT = 60  # documents of C4 that no method sees
TIMEOUT_S = 6 * 3600.0
Cell = dict[str, Any]


class Bench:
    """What all cells share."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch = args, scratch
        self.dense = checkpoint_folder(resolve("demo"))
        self.source = scratch / "pool"
        self.source.mkdir()
        self.held_out: list[str] = []
        for name in POOL:
            texts = list(read_texts(args.data / name))
            if name.endswith(".jsonl"):
                self.held_out, texts = texts[-HELD_OUT:], texts[:-HELD_OUT]
                lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
                (self.source / Path(name).name).write_text("\n".join(lines) + "\n", encoding="utf-8")
            else:
                shutil.copyfile(args.data / name, self.source / Path(name).name)
        self.student: Path = args.student or self._student()
        self.identity = Checkpoint(self.student).hash()

    def _student(self) -> Path:
        out = self.scratch / "student"
        prune_model(self.dense, RATIO, out, calibration=str(self.source / "c4.txt"))
        return out

    def distilled(self, method: str, tokens: int, seed: int, student: bool) -> tuple[Path, float]:
        """A set, made once, and the seconds it took."""
        ends = f"{'-student' if student else ''}{'-half' if self.args.halves else ''}"
        made_for = f"{self.identity[:12]}-" if student else ""
        out = self.args.sets / f"{made_for}{method}-{tokens}-{seed}{ends}.jsonl"
        if not out.exists():
            self.args.sets.mkdir(parents=True, exist_ok=True)
            distil(
                [str(self._half(seed) if self.args.halves else self.source)],
                out,
                model=self.dense,
                tokens=tokens,
                method=method,
                student=self.student if student else None,
                seed=seed,
            )
        return out, float(read_json(out.with_name(f"{out.name}.record.json"))["seconds"])

    def _half(self, seed: int) -> Path:
        """A half of the pool's documents."""
        path = self.scratch / f"half-{seed}.jsonl"
        if not path.exists():
            texts = [
                part for name in POOL for text in read_texts(self.source / Path(name).name) for part in parts(text)
            ]
            drawn = random.Random(seed).sample(texts, len(texts) // 2)
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in drawn), encoding="utf-8")
        return path

    def recovered(self, method: str, tokens: int, seed: int) -> Cell:
        """Distil with the pruned model at hand, train, judge."""
        path, seconds = self.distilled(method, tokens, seed, student=True)
        given = list(read_weighted(path))
        out = self.scratch / "recovered"
        done = recover(
            self.student,
            self.dense,
            out,
            seconds=1e6,
            text=[text for text, _ in given],
            weights=weights_of(given),
            held_out=self.held_out,
            recipe=replace(RECIPE, max_steps=self.args.steps),
            seed=seed,
            resume=False,
        )
        cell = {"distil_s": seconds, "train_s": round(done.seconds, 1), "trained_on": trainer()}
        cell |= {"held_out_kl": done.after.kl}
        return cell | {"before_kl": done.before.kl} | self._judged(out)

    def calibrated(self, method: str, tokens: int, seed: int) -> Cell:
        """Distil before there is a pruned model, prune to the student's widths, judge."""
        path, seconds = self.distilled(method, tokens, seed, student=False)
        tokenizer = load_tokenizer(self.dense)
        ids = [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in read_texts(path)]
        out = self.scratch / "calibrated"
        start = time.monotonic()
        widths = Checkpoint(self.student).shape.layers
        windows = packed(ids, min(WINDOW, sum(map(len, ids))))
        how = Compensation.for_tokens(windows.numel())
        prune_compensated(self.dense, windows, widths, how, out, origin=Origin("obs", RATIO, "", ""))
        cell = {"distil_s": seconds, "prune_s": round(time.monotonic() - start, 1), "ridge": how.ridge}
        return cell | self._judged(out)

    def _judged(self, folder: Path) -> Cell:
        """KL and bits per byte of the exported file; tasks where they are asked for."""
        path = self.scratch / "judged.gguf"
        path.unlink(missing_ok=True)
        write_gguf(folder, path, dtype="F32")
        cell: Cell = {}
        for name, file in (JUDGED | CHOSEN_BY).items():
            reference = make_reference(
                self.dense,
                (self.args.data / file).read_text(encoding="utf-8"),
                cache_dir() / "references",
                model_hash=Checkpoint(self.dense).hash(),
                count=WINDOWS,
                threads=self.args.threads,
                timeout_s=TIMEOUT_S,
            )
            found = evaluate(path, reference, threads=self.args.threads, timeout_s=TIMEOUT_S)
            cell[name] = {"kl": found.kl_nats.mean, "bits_per_byte": found.bits_per_byte}
        for task in TASKS if self.args.tasks else ():
            results = run_tasks(
                path,
                [task],
                limit=self.args.limit,
                data=self.args.data / "tasks",
                n_ctx=2048,
                threads=self.args.threads,
                timeout_s=TIMEOUT_S,
            )["results"][task]
            cell[task] = results.get("acc_norm,none", results["acc,none"])
        shutil.rmtree(folder)
        return cell


def parts(text: str, least: int = 2000) -> Iterator[str]:
    """Whole lines of a text, together at least `least` characters a part but for the last."""
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        lines.append(line)
        if sum(map(len, lines)) >= least:
            yield "".join(lines)
            lines.clear()
    if lines:
        yield "".join(lines)


def table(cells: list[Cell], name: str) -> str:
    """One table of one pruned model's cells, in Markdown: means over seeds."""
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        if cell["table"] == name and "error" not in cell:
            groups.setdefault((cell["method"], cell["tokens"]), []).append(cell)
    lines = [
        "| method | tokens | sets | validation KL | WikiText-2 KL | bits/byte | TinyStories KL | bits/byte | tasks "
        "| distilled in |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")

    def mean(cells: list[Cell], text: str, figure: str) -> str:
        values = [cell[text][figure] for cell in cells if text in cell]  # earlier cells have no validation text
        if not values:
            return "–"
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.4f}{spread}"

    for (method, tokens), cells in sorted(groups.items(), key=lambda item: (item[0][1], item[0][0])):
        figures = [mean(cells, text, "kl") for text in CHOSEN_BY]
        figures += [mean(cells, text, figure) for text in JUDGED for figure in ("kl", "bits_per_byte")]
        scores = [100 * statistics.mean(cell[task] for task in TASKS) for cell in cells if TASKS[0] in cell]
        tasks = f"{statistics.mean(scores):.1f}" if scores else "–"
        seconds = statistics.mean(cell["distil_s"] for cell in cells)
        lines.append(
            f"| {method} | {tokens >> 10}k | {len(cells)} | {' | '.join(figures)} | {tasks} | {seconds / 60:.1f} min |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=os.environ.get("EDGEPRUNE_DATA"))
    parser.add_argument("--tables", nargs="+", default=["recovery", "calibration"])
    parser.add_argument("--methods", nargs="+", default=[n for n, entry in METHODS.items() if entry.kind != "make"])
    parser.add_argument("--tokens", nargs="+", default=["16k", "64k", "256k"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--halves", action="store_true", help="a half of the pool for each seed")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--tasks", action="store_true", help="judge on tasks too")
    parser.add_argument("--limit", type=int, default=1000, help="items of a task")
    parser.add_argument("--student", type=Path, help="the pruned model; default: it is made")
    parser.add_argument("--sets", type=Path, help="where the sets are kept; default: beside --out")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--render", action="store_true")
    args = parser.parse_args()
    record = read_json(args.out) if args.out.exists() else {"benchmark": "distillation_recovery", "cells": []}
    if not args.render:
        args.sets = args.sets or args.out.with_name(f"{args.out.stem}-sets")
        torch.set_num_threads(args.threads)
        keep_freed_memory()
        with tempfile.TemporaryDirectory(prefix="edgeprune-") as scratch:
            bench = Bench(args, Path(scratch))
            record["environment"] = environment()
            for name in args.tables:
                for tokens in (count_of(text, "--tokens") for text in args.tokens):
                    for seed in args.seeds:
                        for method in args.methods:
                            of = f"{name}, halves" if args.halves else name
                            add(record, bench, {"table": of, "method": method, "tokens": tokens, "seed": seed})
    for student in dict.fromkeys(cell["student_sha256"] for cell in record["cells"]):
        cells = [cell for cell in record["cells"] if cell["student_sha256"] == student]
        for name in sorted({cell["table"] for cell in cells}, reverse=True):
            print(f"\n{name}, pruned model {student[:8]}\n\n{table(cells, name)}")


def add(record: dict[str, Any], bench: Bench, key: Cell) -> None:
    """Measure a cell that is not there yet or failed, and write the record."""
    trains = key["table"].startswith("recovery")
    key = key | {"student_sha256": bench.identity} | ({"steps": bench.args.steps} if trains else {})
    there = [cell for cell in record["cells"] if all(cell.get(name) == value for name, value in key.items())]
    if any("error" not in cell for cell in there):
        return
    if not trains and METHODS[key["method"]].student:
        return  # needs a pruned model, which there is none yet
    print(f"{time.strftime('%H:%M:%S')} {key}", file=sys.stderr, flush=True)
    run = bench.recovered if trains else bench.calibrated
    try:
        cell = key | run(key["method"], key["tokens"], key["seed"])
    except EdgepruneError as error:
        cell = key | {"error": str(error)}
    print(f"{time.strftime('%H:%M:%S')} {json.dumps(cell)}", file=sys.stderr, flush=True)
    record["cells"] = [other for other in record["cells"] if other not in there] + [cell]
    write_json(bench.args.out, record)


if __name__ == "__main__":
    main()
