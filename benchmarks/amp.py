"""AMP and its controls on the demo model: perplexity of the exported F32 file on WikiText-2, untrained.

    python benchmarks/amp.py --data DIR --out amp.json      (DIR holds wikitext2/wiki.test.raw; default EDGEPRUNE_DATA)

Uniform plans at 10, 20 and 30 % of all parameters: heads and neurons in equal shares, as published (with grouped-query
attention, the nearest step of heads), and neurons alone. Test text is raw, in windows of 512 tokens without BOS, the
first 40 of them; the model is scored on text it writes itself (or --calibration), never on the test text. Every figure
is measured on the F32 GGUF file in llama.cpp, so the export is part of what is judged.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from edgeprune.calibration import text_set
from edgeprune.export.gguf_writer import write_gguf
from edgeprune.files import cache_dir, write_json
from edgeprune.models import load
from edgeprune.plan import Scope
from edgeprune.pruning import CALIBRATION_LENGTH, CALIBRATION_TEXTS, METHODS, cached_scores, plan_for
from edgeprune.quality import evaluate
from edgeprune.record import environment
from edgeprune.reference import make_reference
from edgeprune.surgery import prune_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, default=os.environ.get("EDGEPRUNE_DATA"))
    parser.add_argument("--calibration", help="text to score on; default: text the model writes itself")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--align", type=int, default=32)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not args.data:
        parser.error("give --data, or set EDGEPRUNE_DATA, to the folder that holds wikitext2/wiki.test.raw")
    text = (args.data / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")

    model = load(args.model)
    calibration = text_set(model, args.calibration, count=CALIBRATION_TEXTS, length=CALIBRATION_LENGTH)
    scores = cached_scores(model, calibration)
    reference = make_reference(
        model.folder,
        text,
        cache_dir() / "references",
        model_hash=model.hash,
        count=args.windows,
        threads=args.threads,
        timeout_s=3600,
    )
    rows: list[dict[str, Any]] = []
    runs: list[tuple[str, Scope, float]] = [("dense", "both", 0.0)]
    for ratio in args.ratios:
        runs += [("amp", "both", ratio), ("amp", "mlp", ratio), ("random", "both", ratio), ("reversed", "both", ratio)]
    for method, scope, ratio in runs:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            folder, reached, widths = model.folder, 0.0, model.shape.layers[0]
            if method != "dense":
                plan = plan_for(model.shape, METHODS[method](scores, 0), ratio, align=args.align, scope=scope)
                folder, reached = prune_checkpoint(model.folder, plan, Path(scratch) / "pruned"), plan.reached_ratio
                widths = plan.layers[0].widths
            file = write_gguf(folder, Path(scratch) / "model.gguf", dtype="F32")
            quality = evaluate(file, reference, threads=args.threads, timeout_s=3600)
        rows.append(
            {
                "method": method if scope == "both" else f"{method} ({scope} only)",
                "asked_ratio": ratio,
                "reached_ratio": round(reached, 4),
                "heads": widths.heads,
                "kv_heads": widths.kv_heads,
                "neurons": widths.neurons,
                "perplexity": round(quality.perplexity, 2),
                "bits_per_byte": round(quality.bits_per_byte, 4),
                "kl_nats": round(quality.kl_nats.mean, 4),
                "top1": round(quality.top1.mean, 4),
                "seconds": round(time.monotonic() - start, 1),
            }
        )
        print(rows[-1], flush=True)
    record = {
        "benchmark": "amp",
        "model": args.model,
        "model_sha256": model.hash,
        "calibration": {"source": calibration.source, "tokens": calibration.tokens, "sha256": calibration.hash},
        "text": "WikiText-2 test, raw, windows of 512 tokens, no BOS",
        "windows": args.windows,
        "align": args.align,
        "environment": environment(),
        "rows": rows,
    }
    write_json(args.out, record)
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as the README shows them: a line a ratio, a column a method."""
    dense = rows[0]
    methods = list(dict.fromkeys(row["method"] for row in rows[1:]))
    lines = [
        f"| of all parameters | heads / KV / neurons | {' | '.join(methods)} |",
        "|---|---|" + "---|" * len(methods),
        f"| dense | {dense['heads']} / {dense['kv_heads']} / {dense['neurons']} | "
        + " | ".join([f"{dense['perplexity']:.2f}"] * len(methods))
        + " |",
    ]
    for ratio in sorted({row["asked_ratio"] for row in rows[1:]}):
        here = {row["method"]: row for row in rows if row["asked_ratio"] == ratio and row["method"] != "dense"}
        amp = here[methods[0]]
        cells = [_perplexity(here[method]["perplexity"]) for method in methods]
        widths = f"{amp['heads']} / {amp['kv_heads']} / {amp['neurons']}"
        lines.append(
            f"| {100 * ratio:.0f} % ({100 * amp['reached_ratio']:.1f} % reached) | {widths} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1e5 else f"{value:.1e}"


if __name__ == "__main__":
    main()
