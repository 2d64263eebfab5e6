"""What gradient matching costs: a 1.1B-shaped model in shards under a limit of memory, and time as the pool grows.

    python benchmarks/distillation_scale.py --out distillation_scale.json [--layers 22] [--pieces 64] [--limit-gib 6]
        [--student FOLDER --text FILE ... --pools 256k 512k 1M 2M]

The large model has TinyLlama-1.1B's shape and random weights, written on the spot in shards; texts are random tokens,
so nothing is judged but time and memory: the child's peak (VmHWM). For the curve the demo model and a pruned one read
pools made of `--text`, lines drawn from it until a pool is full; timed is the whole of
`edgeprune distill --method gradient-matching --tokens 64k`, from an empty cache.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import large
import numpy as np

from edgeprune.cli_distill import count_of
from edgeprune.files import write_json
from edgeprune.models import checkpoint_folder, resolve
from edgeprune.record import environment

SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_key_value_heads": 4, "head_dim": 64}
CHARACTERS = 4.2  # a token, roughly, of English text
DEPTH = 4


class RandomPool:
    """Pieces of random tokens."""

    hash = "random"

    def __init__(self, pieces: int, length: int) -> None:
        self._ids = np.random.default_rng(1).integers(large.SHAPE["vocab_size"], size=(pieces, length))

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def lengths(self) -> np.ndarray:
        return np.full(len(self._ids), self._ids.shape[1])

    def ids(self, index: int) -> np.ndarray:
        return self._ids[index]


def match(folder: Path, pieces: int, length: int, scratch: Path) -> dict[str, Any]:
    """What the child does: read the pool with the large model and match a quarter of it."""
    from edgeprune.checkpoint import Checkpoint
    from edgeprune.distillation.base import Quota, Task
    from edgeprune.distillation.gradient_matching import select
    from edgeprune.distillation.pool import Pool
    from edgeprune.distillation.readings import ModelReadings, Reading
    from edgeprune.runtimes.isolate import memory_mib

    pool = cast("Pool", RandomPool(pieces, length))
    how = Reading(("gradients",), depth=DEPTH)
    began = time.monotonic()
    readings = ModelReadings(pool, Checkpoint(folder), None, how, scratch)
    found = select(Task(pool, np.arange(pieces), Quota(tokens=pieces * length // 4), readings, 0))
    return {
        "texts": len(found.taken),
        "tokens": pieces * length,
        "seconds": round(time.monotonic() - began, 1),
        "peak_gib": round(memory_mib()["VmHWM"] / 1024, 2),
    }


def large_model(args: argparse.Namespace) -> dict[str, Any]:
    """Time and peak memory with the large model."""
    large.SHAPE |= SHAPE
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        dense = Path(scratch) / "dense"
        parameters = make_grouped(dense, args.layers)
        command = [sys.executable, __file__, "--child", str(dense), "--pieces", str(args.pieces), "--out", scratch]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return {"parameters": parameters, "layers": args.layers, **json.loads(done.stdout)}


def make_grouped(folder: Path, layers: int) -> int:
    """`large.make_model` with fewer key and value heads."""
    import torch
    from safetensors.torch import load_file, save_file

    total = large.make_model(folder, layers)
    width = SHAPE["num_key_value_heads"] * SHAPE["head_dim"]
    for index in range(layers):
        path = folder / f"model-{index:05d}.safetensors"
        tensors = load_file(path)
        for name in [name for name in tensors if "k_proj" in name or "v_proj" in name]:
            total -= tensors[name].numel()
            tensors[name] = tensors[name][:width].contiguous().to(torch.bfloat16)
            total += tensors[name].numel()
        save_file(tensors, path, metadata={"format": "pt"})
    return total


def curve(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of the whole command for pools of different sizes."""
    lines = [line for path in args.text for line in path.read_text(encoding="utf-8").splitlines() if len(line) > 40]
    rng = random.Random(0)
    rows = []
    for size in args.pools:
        wanted = round(count_of(size, "--pools") * CHARACTERS)
        with tempfile.TemporaryDirectory(dir=args.work) as scratch:
            source, out = Path(scratch) / "pool.txt", Path(scratch) / "out.jsonl"
            written = 0
            with source.open("w", encoding="utf-8") as file:
                while written < wanted:
                    line = rng.choice(lines)
                    written += file.write(line + "\n")
            command = [sys.executable, "-m", "edgeprune", "distill", str(source), "--out", str(out), "--json"]
            command += ["--model", str(checkpoint_folder(resolve("demo"))), "--student", str(args.student)]
            command += ["--method", "gradient-matching", "--tokens", "64k"]
            environ = {**os.environ, "EDGEPRUNE_CACHE": str(Path(scratch) / "cache")}
            began = time.monotonic()
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environ)
            found = json.loads(done.stdout)
            kept = sum(path.stat().st_blocks * 512 for path in Path(scratch).rglob("*") if path.is_file())
        figures = {name: found[name] for name in ("pool_tokens", "pool_pieces", "texts", "tokens")}
        rows.append(figures | {"seconds": round(time.monotonic() - began, 1), "disk_mib": round(kept / (1 << 20))})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("distillation_scale.json"))
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument(
        "--pieces", type=int, default=64, help="of 256 random tokens, for the large model; 0: leave it out"
    )
    parser.add_argument("--limit-gib", type=float, default=6.0)
    parser.add_argument("--student", type=Path, help="a pruned demo model, for the curve")
    parser.add_argument("--text", type=Path, nargs="+", default=[])
    parser.add_argument("--pools", nargs="+", default=["256k", "512k", "1M", "2M"])
    parser.add_argument("--work", type=Path, help="folder for models and pools; default: a temporary one")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(match(args.child, args.pieces, 256, args.out)))
        return
    result: dict[str, Any] = {
        "benchmark": "distillation_scale",
        "environment": environment(),
        "aim_gib": args.limit_gib,
    }
    if args.pieces:
        result["large"] = {"aim_gib": args.limit_gib, **large_model(args)}
    if args.student:
        result["curve"] = curve(args)
    write_json(args.out, result)
    if found := result.get("large"):
        print("| parameters | pool, tokens | minutes | peak GiB | aim |\n|---|---|---|---|---|")
        minutes = found["seconds"] / 60
        print(
            f"| {found['parameters'] / 1e9:.2f}e9 | {found['tokens']} | {minutes:.1f} | {found['peak_gib']} "
            f"| < {args.limit_gib:g} |"
        )
    if rows := result.get("curve"):
        print("\n| pool, tokens | pieces | minutes | disk MiB |\n|---|---|---|---|")
        for row in rows:
            print(f"| {row['pool_tokens']} | {row['pool_pieces']} | {row['seconds'] / 60:.1f} | {row['disk_mib']} |")


if __name__ == "__main__":
    main()
