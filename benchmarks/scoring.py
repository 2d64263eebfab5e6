"""Seconds and peak memory of AMP scoring: one pass here, against the published procedure written plainly.

    python benchmarks/scoring.py --out scoring.json

The plain procedure makes two passes (heads, then neurons), one prompt at a time, and spells out every head's product as
tokens x heads x hidden. Both run in processes of their own, in turn, on the same prompts; the scores must agree.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import statistics
import time
from pathlib import Path
from typing import Any

from edgeprune.files import write_json
from edgeprune.record import environment

PROMPTS = 50


def _prompts(model: Any, calibration: str | None) -> list[Any]:
    """50 prompts of unequal lengths, as instructions are."""
    from edgeprune.calibration import text_set

    texts = text_set(model, calibration, count=PROMPTS, length=256)
    # Self-written texts all have 256 tokens; instructions do not, and a batched pass must cope with that.
    return [ids[: 40 + (37 * i) % 217] for i, ids in enumerate(texts.begun)]


def one_pass(model: Any, prompts: list[Any]) -> tuple[Any, Any]:
    """edgeprune's own."""
    from edgeprune.importance import amp_scores

    scores = amp_scores(model, prompts)
    return scores.heads, scores.neurons


def plain(model: Any, prompts: list[Any]) -> tuple[Any, Any]:
    """Two passes, one prompt at a time, every product in full."""
    import torch

    module, shape = model.module, model.shape
    total = sum(len(p) for p in prompts)
    heads = [torch.zeros(w.heads, dtype=torch.float64) for w in shape.layers]
    neurons = [torch.zeros(w.neurons, dtype=torch.float64) for w in shape.layers]
    with torch.inference_mode():
        for kind in ("heads", "neurons"):
            for ids in prompts:
                seen: dict[int, Any] = {}
                handles = []
                for i, layer in enumerate(module.model.layers):
                    target = layer.self_attn.o_proj if kind == "heads" else layer.mlp.down_proj
                    handles.append(
                        target.register_forward_pre_hook(lambda _, inputs, i=i, s=seen: s.update({i: inputs[0][0]}))
                    )
                module(ids[None])
                for handle in handles:
                    handle.remove()
                for i, layer in enumerate(module.model.layers):
                    if kind == "neurons":
                        neurons[i] += seen[i].abs().sum(dim=0).double()
                        continue
                    n = shape.layers[i].heads
                    x = seen[i].view(len(ids), n, shape.head_dim)
                    w = layer.self_attn.o_proj.weight.view(shape.hidden, n, shape.head_dim)
                    heads[i] += torch.einsum("tnd,hnd->tnh", x, w).abs().sum(dim=(0, 2)).double()
    return tuple(h / total for h in heads), tuple(n / total for n in neurons)


def _peak_mib() -> float:
    """Peak resident memory of this process since it was last reset (VmHWM), MiB; Linux only."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 1024  # type: ignore[index]


def _run(name: str, model_name: str, calibration: str | None, results: Any) -> None:
    """In a process of its own: load, score, report seconds, peak memory and the scores."""
    from edgeprune.models import load

    model = load(model_name)
    prompts = _prompts(model, calibration)
    # Weights are mapped: every page is touched, so that none is counted as memory of the scoring. The kernel forgets
    # the peak of loading, so that what is read below is the peak of scoring.
    for parameter in model.module.parameters():
        parameter.sum()
    Path("/proc/self/clear_refs").write_text("5")
    loaded = _peak_mib()
    start = time.perf_counter()
    heads, neurons = {"one pass": one_pass, "plain": plain}[name](model, prompts)
    seconds = time.perf_counter() - start
    peak = _peak_mib()
    results.put((seconds, loaded, peak, sum(len(p) for p in prompts), [t.numpy() for t in (*heads, *neurons)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    import numpy as np

    from edgeprune.models import load

    _prompts(load(args.model), args.calibration)  # written once, before anything is timed
    context = multiprocessing.get_context("spawn")
    seconds: dict[str, list[float]] = {"one pass": [], "plain": []}
    peaks: dict[str, list[float]] = {"one pass": [], "plain": []}
    scores: dict[str, Any] = {}
    tokens = 0
    for turn in range(args.rounds):
        for name in sorted(seconds, reverse=bool(turn % 2)):
            results = context.Queue()
            process = context.Process(target=_run, args=(name, args.model, args.calibration, results))
            process.start()
            took, loaded, peak, tokens, scores[name] = results.get()
            process.join()
            seconds[name].append(took)
            peaks[name].append(peak - loaded)
            print(f"{name}: {took:.1f} s, {peak - loaded:.0f} MiB beside the model's {loaded:.0f}", flush=True)
    worst = max(
        float(np.max(np.abs(a - b) / np.abs(b).max())) for a, b in zip(scores["one pass"], scores["plain"], strict=True)
    )
    if worst > 1e-4:
        raise SystemExit(f"the two disagree by {worst:.1e} of the largest score")
    rows = [
        {
            "procedure": name,
            "seconds": round(statistics.median(seconds[name]), 2),
            "peak_mib_beside_the_model": round(statistics.median(peaks[name])),
            "all_seconds": [round(s, 2) for s in seconds[name]],
        }
        for name in seconds
    ]
    write_json(
        args.out,
        {
            "benchmark": "scoring",
            "model": args.model,
            "prompts": PROMPTS,
            "tokens": tokens,
            "threads": os.cpu_count(),
            "largest_difference": worst,
            "environment": environment(),
            "rows": rows,
        },
    )
    print("| procedure | seconds | peak memory beside the model, MiB |\n|---|---|---|")
    for row in rows:
        print(f"| {row['procedure']} | {row['seconds']} | {row['peak_mib_beside_the_model']} |")
    print(f"{PROMPTS} prompts, {tokens} tokens; the scores agree to {worst:.0e} of the largest")


if __name__ == "__main__":
    main()
