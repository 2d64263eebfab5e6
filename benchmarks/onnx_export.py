"""Our fused ONNX graph against the one of onnxruntime-genai's model builder: decode speed and size.

    python benchmarks/onnx_export.py MODEL_FOLDER --builder-folder DIR [--out onnx.json]

DIR is the builder's output for the same Hugging Face folder, for example (in an environment of its own: version 0.11.4
needs transformers 4.57, later ones transformers 5)

    python -m onnxruntime_genai.models.builder -i MODEL_FOLDER -o DIR -p int4 -e cpu -c CACHE \
        --extra_options int4_block_size=32 int4_accuracy_level=4

Both graphs are decoded by the same loop, ours and, where it is installed, onnxruntime-genai's own generator. A round
decodes with each graph once, the first of the two in turn, and gives one ratio: slow changes of the machine hit both
sides of a ratio alike, and the interval over rounds tells how far they did not.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edgeprune.export.onnx_graph import export_onnx
from edgeprune.export.onnx_types import PRECISIONS
from edgeprune.files import write_json
from edgeprune.runtimes.bench import cpu_info
from edgeprune.runtimes.ort import OnnxRuntime
from edgeprune.runtimes.records import median_interval

SPEED_AIM, SIZE_AIM = 1.0, 0.6  # times the builder's
Decode = Callable[[int], float]  # tokens -> tokens/s


def our_loop(folder: Path, threads: int, tokens: int) -> Decode:
    """Decode by `edgeprune.runtimes.ort`, from an empty cache, one token at a time."""
    runtime = OnnxRuntime(folder, n_ctx=tokens + 1, threads=threads)

    def decode(count: int) -> float:
        runtime.rewind(0)
        token = int(runtime.forward([1], last_only=True).argmax())
        start = time.perf_counter()
        for _ in range(count):
            token = int(runtime.forward([token], last_only=True).argmax())
        return count / (time.perf_counter() - start)

    return decode


def genai_loop(folder: Path, threads: int, tokens: int) -> Decode:
    """Decode by onnxruntime-genai's generator."""
    import onnxruntime_genai as genai

    config = genai.Config(str(folder))
    config.overlay(f'{{"model": {{"decoder": {{"session_options": {{"intra_op_num_threads": {threads}}}}}}}}}')
    model = genai.Model(config)

    def decode(count: int) -> float:
        parameters = genai.GeneratorParams(model)
        # No end of text may stop the clock
        parameters.set_search_options(max_length=tokens + 2, min_length=tokens + 2, do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.array([1], np.int32))
        generator.generate_next_token()
        start = time.perf_counter()
        for _ in range(count):
            generator.generate_next_token()
        return count / (time.perf_counter() - start)

    return decode


def compare(ours: Decode, theirs: Decode, *, tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens/s of both over `rounds` rounds after one to warm up, and the ratio ours / theirs."""
    samples: list[tuple[float, float]] = []
    for turn in range(rounds + 1):
        if turn % 2:
            theirs_ts = theirs(tokens)
            samples.append((ours(tokens), theirs_ts))
        else:
            ours_ts = ours(tokens)
            samples.append((ours_ts, theirs(tokens)))
    measured = np.array(samples[1:])
    ratios = (measured[:, 0] / measured[:, 1]).tolist()
    low, high = median_interval(ratios)
    return {
        "ours_ts": float(np.median(measured[:, 0])),
        "builder_ts": float(np.median(measured[:, 1])),
        "ratio": float(np.median(ratios)),
        "ratio_low": low,
        "ratio_high": high,
        "samples_ts": measured.tolist(),
    }


def bytes_of(folder: Path) -> int:
    """Bytes of the graph and its weights."""
    return sum(file.stat().st_size for file in folder.glob("model.onnx*"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the model in Hugging Face format")
    parser.add_argument("--builder-folder", type=Path, required=True, help="what the model builder made of it")
    parser.add_argument("--precision", choices=PRECISIONS, default="int4")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    loops = {"edgeprune": our_loop}
    if importlib.util.find_spec("onnxruntime_genai"):
        loops["genai"] = genai_loop
    with tempfile.TemporaryDirectory() as scratch:
        start = time.monotonic()
        exported = export_onnx(args.folder, Path(scratch) / "onnx", precision=args.precision)
        seconds = time.monotonic() - start
        sizes = {"ours": bytes_of(exported), "builder": bytes_of(args.builder_folder)}
        speed = {
            name: compare(
                *(loop(folder, args.threads, args.tokens) for folder in (exported, args.builder_folder)),
                tokens=args.tokens,
                rounds=args.rounds,
            )
            for name, loop in loops.items()
        }
    size_ratio = sizes["ours"] / sizes["builder"]
    print(
        f"{args.precision}, {args.threads} threads, tg{args.tokens}, {args.rounds} rounds; exported in {seconds:.0f} s"
    )
    print("\n| | ours | builder | ours / builder | aim |\n|---|---|---|---|---|")
    print(f"| file, MB | {sizes['ours'] / 1e6:.1f} | {sizes['builder'] / 1e6:.1f} | {size_ratio:.3f} | <= {SIZE_AIM} |")
    for name, row in speed.items():
        ratio = f"{row['ratio']:.3f} [{row['ratio_low']:.3f}, {row['ratio_high']:.3f}]"
        print(f"| tokens/s, {name} loop | {row['ours_ts']:.1f} | {row['builder_ts']:.1f} | {ratio} | >= {SPEED_AIM} |")
    if args.out:
        record = {
            "schema_version": 1,
            "model": args.folder.name,
            "precision": args.precision,
            "n_threads": args.threads,
            "n_gen": args.tokens,
            "cpu_info": cpu_info(),
            "onnxruntime": onnxruntime.__version__,
            "export_s": seconds,
            "bytes": {**sizes, "ratio": size_ratio},
            "decode": speed,
        }
        write_json(args.out, record)


if __name__ == "__main__":
    main()
