"""What quantisation reaches on the demo model and on pruned ones: bytes read per token against KL to the dense model.

    python benchmarks/quantisation.py --calibration C4.txt --text HELDOUT.txt --out quantisation.json [--plot FILE]
                                      [--pruned FOLDER ...]

Rows: llama.cpp's mixtures, with and without an importance matrix, with the embedding (the head too, where they are one)
in smaller types, and mixtures of types per tensor found under budgets of bytes by an integer program over the damage
that the Fisher information tells of each type of each tensor (`edgeprune.sensitivity`, `edgeprune.bit_allocation`).
The calibration text (importance matrix, Fisher information) and the held-out text must be different texts. KL, top-1
agreement and bits per byte are of the exported file in llama.cpp. Each pruned FOLDER (of all the dense model's tokens)
gets the mixed rows under the same budgets, with an importance matrix and a Fisher diagonal of its own; it may have been
recovered, which its rows' names say.

A row whose name starts with "mixed" is one file for a budget; "mixed+Q2_0" may also use Q2_0 by a quantiser of our own
(`gguf_rows.best_q2_0`), since llama.cpp's leaves nearly nothing of a model that was not trained for it. It is the one
type below 4 bits whose blocks fill a row that is no multiple of 256. Finished rows are kept in WORK and not measured
again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from pruning_page import envelope
from safetensors.torch import load_file, save_file

from edgeprune.bit_allocation import allocate
from edgeprune.calibration import TextSet, text_set
from edgeprune.cost import bytes_read_per_token
from edgeprune.errors import NothingFits
from edgeprune.export.gguf_deci import is_filler
from edgeprune.export.gguf_imatrix import ImportanceMatrix
from edgeprune.export.gguf_layout import paired_heads
from edgeprune.export.gguf_quantise import quantise
from edgeprune.export.gguf_rows import best_q2_0, dequantise_rows, quantise_rows
from edgeprune.export.gguf_types import (
    QUANTISATIONS,
    TENSOR_TYPES,
    Recipe,
    Tensor,
    needing_imatrix,
    predicted_bytes,
    recipe,
    tensor_types,
    tensors,
)
from edgeprune.export.gguf_writer import permute, write_gguf
from edgeprune.files import cache_dir, write_json
from edgeprune.imatrix import cached_importance_matrix
from edgeprune.models import Model, load
from edgeprune.quality import evaluate
from edgeprune.record import environment
from edgeprune.recovery import RECORD
from edgeprune.reference import make_reference
from edgeprune.runtimes.gguf_file import BLOCKS, GgufFile, tensor_bytes
from edgeprune.sensitivity import fisher_diagonal
from edgeprune.shape import ModelShape

KINDS = tuple(kind for kind in QUANTISATIONS if kind not in ("F32", "F16", "TQ2_0", "TQ1_0"))
EMBEDDINGS = ("Q5_1", "Q5_0", "Q4_1", "IQ4_NL", "Q4_0", "MXFP4", "Q2_0")
EMBEDDED = ("Q4_K_M", "Q4_0", "IQ4_NL", "IQ3_XXS", "IQ2_XXS")  # mixtures measured with each of them
SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.45)  # of the bytes per token of dense Q4_0
STEP = 24  # every how many rows of a layer's weight are quantised to learn a type's damage
# Types that a single tensor may get. Not F16, NVFP4 and the ternary ones: others are smaller and better.
STOCK = tuple(kind for kind in TENSOR_TYPES if kind not in ("F32", "F16", "BF16", "Q2_0", "TQ1_0", "TQ2_0"))


def per_token(shape: ModelShape, kind: str | Recipe) -> int:
    """Bytes of weights that a decoded token reads."""
    return bytes_read_per_token(predicted_bytes(shape, kind), tied=shape.tied, vocab=shape.vocab)


def mixtures(shape: ModelShape, embeddings: bool) -> list[str]:
    """Names of the recipes to measure; of those that would give the same types, the first."""
    part = "embed" if shape.tied else "head"
    names = [f"{kind}:imatrix" for kind in KINDS]
    if embeddings:
        names += [f"{kind}:{part}={each}:imatrix" for each in EMBEDDINGS for kind in EMBEDDED]
    names += [kind for kind in KINDS if not needing_imatrix(shape, kind)]
    return names


class Bench:
    """A model, its calibration and the dense model's reference, and what is measured with them."""

    def __init__(
        self, args: argparse.Namespace, dense: Model, calibration: TextSet, pruned: Path | None = None
    ) -> None:
        self.work: Path = args.work
        self.threads: int = args.threads
        self.model = dense if pruned is None else load(pruned)
        self.removed = 1 - self.model.shape.parameters / dense.shape.parameters
        trained = pruned is not None and (pruned / RECORD).exists()
        self.label = "" if pruned is None else f"{self.removed:.0%} pruned, {'recovered, ' if trained else ''}"
        self.dense_bytes = per_token(dense.shape, "Q4_0")
        self.work.mkdir(parents=True, exist_ok=True)
        self.calibration = calibration
        self.matrix = cached_importance_matrix(self.model, self.calibration)
        self.full = self.work / f"full-{self.model.hash[:12]}.gguf"
        if not self.full.exists():
            write_gguf(self.model.folder, self.full, dtype="F32")
        self.reference = make_reference(
            dense.folder,
            args.text.read_text(encoding="utf-8"),
            cache_dir() / "references",
            model_hash=dense.hash,
            count=args.windows,
            threads=args.threads,
            timeout_s=7200,
        )
        key = f"{self.model.hash[:12]}-{self.calibration.hash[:12]}-{self.reference.name[:12]}"
        self.log = self.work / f"rows-{key}.jsonl"
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.rows: dict[str, dict[str, Any]] = {row["name"]: row for row in map(json.loads, lines)}

    def measure(self, name: str, wish: Recipe, matrix: ImportanceMatrix | None, *, own_q2_0: bool = False) -> None:
        """One row, unless it is there already."""
        if name in self.rows:
            return
        start = time.monotonic()
        path = self.work / f"candidate-{os.getpid()}.gguf"
        quantise(self.full, path, kind=wish, threads=self.threads, imatrix=matrix)
        if own_q2_0:
            rewrite_q2_0(self.full, path, self.matrix)
        found = evaluate(path, self.reference, threads=self.threads, timeout_s=7200)
        row = {
            "name": name,
            "removed": self.removed,
            "imatrix": matrix is not None,
            "bytes_per_token": per_token(self.model.shape, wish),
            "file_bytes": path.stat().st_size,
            "kl_nats": found.kl_nats.mean,
            "kl_low": found.kl_nats.low,
            "kl_high": found.kl_nats.high,
            "top1": found.top1.mean,
            "bits_per_byte": found.bits_per_byte,
            "perplexity": found.perplexity,
            "types": GgufFile(path).type_counts(),
            "seconds": time.monotonic() - start,
        }
        path.unlink()
        self.rows[name] = row
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print({key: row[key] for key in ("name", "bytes_per_token", "kl_nats", "top1", "bits_per_byte")}, flush=True)

    def fisher(self, texts: int) -> dict[str, Any]:
        """The Fisher diagonal, computed once; by GGUF name and in the order of a GGUF file's rows."""
        path = self.work / f"fisher-{self.model.hash[:12]}-{self.calibration.hash[:12]}-{texts}.safetensors"
        if not path.exists():
            save_file(fisher_diagonal(self.model, self.calibration.begun[:texts]), path)
        found = {name: values.numpy() for name, values in load_file(path).items()}
        for name, values in found.items():
            if heads := paired_heads(name, self.model.shape):
                found[name] = permute(values, heads)
        return found


def rewrite_q2_0(full: Path, path: Path, matrix: ImportanceMatrix) -> None:
    """Put blocks of least error in place of llama.cpp's into the Q2_0 tensors of `path`."""
    values = {tensor.name: tensor.data for tensor in GGUFReader(full).tensors}
    with path.open("r+b") as file:
        for info in GgufFile(path).tensors.values():
            if info.type == "Q2_0":
                file.seek(info.offset)
                file.write(best_q2_0(np.asarray(values[info.name]), matrix.values[info.name]).tobytes())


def damages(
    full: Path, shape: ModelShape, fisher: Mapping[str, Any], matrix: ImportanceMatrix
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, int]]]:
    """Nats a token that each type of each weight is expected to cost, ½ Σ F δ², and its bytes."""
    damage: dict[str, dict[str, float]] = {}
    size: dict[str, dict[str, int]] = {}
    values = {tensor.name: tensor.data for tensor in GGUFReader(full).tensors}
    for tensor in _chosen(shape):
        step = STEP if tensor.name.startswith("blk.") else 4 * STEP  # an embedding has very many rows
        some = np.asarray(values[tensor.name][::step], dtype=np.float32)
        weight = np.asarray(fisher[tensor.name][::step])
        importance = matrix.values.get(tensor.name)
        importance = np.ones(tensor.shape[1], dtype=np.float32) if importance is None else importance
        damage[tensor.name], size[tensor.name] = {}, {}
        for kind in (*STOCK, "Q2_0"):
            if tensor.shape[1] % BLOCKS[kind][0]:
                continue
            blocks = best_q2_0(some, importance) if kind == "Q2_0" else quantise_rows(some, kind, importance)
            error = (dequantise_rows(blocks, kind) - some) ** 2
            damage[tensor.name][kind] = float((weight * error).sum()) / 2 * tensor.shape[0] / len(some)
            size[tensor.name][kind] = tensor_bytes(kind, tensor.shape)
    return damage, size


def mixed(bench: Bench, shares: list[float], texts: int) -> None:
    """Rows of types chosen tensor by tensor, under shares of the bytes of dense Q4_0."""
    shape = bench.model.shape
    table = bench.work / f"damage-{bench.model.hash[:12]}-{bench.calibration.hash[:12]}-{texts}-{STEP}.json"
    if not table.exists():
        write_json(table, damages(bench.full, shape, bench.fisher(texts), bench.matrix))
    damage, size = json.loads(table.read_text())
    dense = tensor_types(shape, "Q4_0")
    skeleton = per_token(shape, "Q4_0") - sum(tensor_bytes(dense[t.name], t.shape) for t in _chosen(shape))
    for own in (False, True):
        kinds = {name: {k: d for k, d in each.items() if own or k != "Q2_0"} for name, each in damage.items()}
        for share in shares:
            budget = int(share * bench.dense_bytes) - skeleton
            try:
                types = allocate(kinds, size, budget)
            except NothingFits as error:
                print(f"{bench.label}mixed at {share:.0%}: {error}")
                continue
            if own and "Q2_0" not in types.values():
                continue  # the same as without
            wish = Recipe("Q4_0", True, tuple((f"^{name}$".replace(".", r"\."), kind) for name, kind in types.items()))
            name = f"{bench.label}mixed{'+Q2_0' if own else ''} at {share:.0%}"
            bench.measure(name, wish, bench.matrix, own_q2_0=own)
            bench.rows[name]["expected_kl"] = sum(kinds[tensor][kind] for tensor, kind in types.items())


def _chosen(shape: ModelShape) -> list[Tensor]:
    """The weights whose types are chosen: no embedding read one row a token, nothing that only fills a gap."""
    weights = [tensor for tensor in tensors(shape) if len(tensor.shape) > 1 and not is_filler(tensor.name, shape)]
    return [tensor for tensor in weights if shape.tied or tensor.name != "token_embd.weight"]


def at_most(rows: list[dict[str, Any]], budget: int) -> dict[str, Any] | None:
    """The row of least KL with at most `budget` bytes per token."""
    return min((r for r in rows if r["bytes_per_token"] <= budget), key=lambda r: r["kl_nats"], default=None)


def table(rows: list[dict[str, Any]], dense: int) -> str:
    """Markdown, a line a row."""
    lines = ["| types | MB per token | of dense Q4_0 | KL | top-1 | bits per byte |", "|---|---|---|---|---|---|"]
    for row in rows:
        size, share = row["bytes_per_token"] / 1e6, row["bytes_per_token"] / dense
        figures = f"{row['kl_nats']:.4f} | {row['top1']:.3f} | {row['bits_per_byte']:.4f}"
        lines.append(f"| {row['name']} | {size:.1f} | {share:.1%} | {figures} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], dense: int, out: Path) -> None:
    """KL against bytes per token, and the envelope."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        label, mixed_types, _ = row["name"].rpartition("mixed")
        groups.setdefault(f"{label}mixed per tensor" if mixed_types else "mixture", []).append(row)
    for (label, some), mark in zip(groups.items(), itertools.cycle("oD^sv<>p"), strict=False):
        axes.plot([r["bytes_per_token"] / 1e6 for r in some], [r["kl_nats"] for r in some], mark, ms=4, label=label)
    best = envelope([row for row in rows if not row["removed"]])
    axes.step([r["bytes_per_token"] / 1e6 for r in best], [r["kl_nats"] for r in best], where="post", lw=1)
    for share in (0.8, 0.6, 0.45):
        axes.axvline(share * dense / 1e6, color="0.8", lw=1)
    axes.set(xlabel="MB of weights read per token", ylabel="KL to the dense model, nats per token", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument(
        "--calibration", type=Path, required=True, help="text for importance matrix and Fisher diagonal"
    )
    parser.add_argument("--text", type=Path, required=True, help="held-out text; not the calibration text")
    parser.add_argument("--texts", type=int, default=64, help="calibration texts of 256 tokens")
    parser.add_argument("--fisher-texts", type=int, default=16, help="of those, for the Fisher diagonal")
    parser.add_argument("--windows", type=int, default=12, help="held-out windows of 512 tokens")
    parser.add_argument("--pruned", type=Path, nargs="*", default=[], help="pruned folders, for mixed rows of each")
    parser.add_argument("--only", nargs="*", help="these mixtures, and no other")
    parser.add_argument("--no-embeddings", action="store_true", help="leave out embeddings in smaller types")
    parser.add_argument("--shares", type=float, nargs="*", default=list(SHARES), help="budgets of the mixed rows")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, default=cache_dir() / "benchmark-quantisation")
    parser.add_argument("--clean", action="store_true", help="remove WORK at the end")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.calibration.resolve() == args.text.resolve():
        parser.error("the held-out text must not be the calibration text")

    model = load(args.model)
    calibration = text_set(model, str(args.calibration), count=args.texts, length=256)
    bench = Bench(args, model, calibration)
    shape = model.shape
    if args.shares:
        mixed(bench, args.shares, args.fisher_texts)
    for name in mixtures(shape, not args.no_embeddings) if args.only is None else args.only:
        wish = recipe(name)
        bench.measure(name, wish, bench.matrix if wish.imatrix else None)
    rows = list(bench.rows.values())
    for folder in args.pruned:
        mixed(pruned := Bench(args, model, calibration, folder), args.shares, args.fisher_texts)
        rows += pruned.rows.values()
    dense = bench.dense_bytes
    alone = [row for row in rows if not row["removed"]]
    record = {
        "benchmark": "quantisation",
        "model": args.model,
        "model_sha256": model.hash,
        "calibration": {"tokens": bench.calibration.tokens, "sha256": bench.calibration.hash},
        "text": args.text.name,
        "windows": args.windows,
        "dense_q4_0_bytes_per_token": dense,
        "smallest": min(((per_token(shape, f"{k}:imatrix"), k) for k in KINDS), key=lambda pair: pair[0]),
        "at_most": {
            str(share): {
                "quantised": at_most(alone, int(share * dense)),
                "pruned and quantised": at_most([row for row in rows if row["removed"]], int(share * dense)),
            }
            for share in args.shares
        },
        "envelope": [row["name"] for row in envelope(alone)],
        "environment": environment(),
        "rows": rows,
    }
    write_json(args.out, record)
    print(table(sorted(rows, key=lambda row: -row["bytes_per_token"]), dense))
    print("\nquantisation alone, lower envelope\n" + table(envelope(alone), dense))
    if args.plot:
        plot(rows, dense, args.plot)
    if args.clean:
        shutil.rmtree(bench.work)


if __name__ == "__main__":
    main()
