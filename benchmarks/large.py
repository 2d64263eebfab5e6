"""A model larger than the memory it may take: 7B-shaped, scored, pruned and compensated by 20 %.

    python benchmarks/large.py --out large.json [--layers 32] [--tokens 2048] [--limit-gib 6]

The model has LLaMA-7B's shape and random weights, written on the spot in shards; nothing is judged but time and memory.
Heads and neurons are chosen by backward elimination and the weights that stay are solved by least squares, layer after
layer: what is in memory does not grow with the number of layers, nor, as sums run in a stream, with that of tokens but
for the hidden states, which lie on disk where they are large. Peak memory is that of the child process (VmHWM).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from edgeprune.files import write_json
from edgeprune.record import environment

SHAPE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
RATIO = 0.2


def make_model(folder: Path, layers: int, *, seed: int = 0) -> int:
    """Write random weights of the shape, a shard a layer; the number of parameters."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, total = SHAPE["hidden_size"], SHAPE["intermediate_size"], 0

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).to(torch.bfloat16)

    def save(tensors: dict[str, torch.Tensor], name: str) -> int:
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
        return sum(tensor.numel() for tensor in tensors.values())

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    total += save({"model.embed_tokens.weight": matrix(SHAPE["vocab_size"], hidden)}, "model-embedding")
    for index in range(layers):
        at = f"model.layers.{index}"
        square = {f"{at}.self_attn.{name}_proj.weight": matrix(hidden, hidden) for name in "qkvo"}
        mlp = {f"{at}.mlp.{name}_proj.weight": matrix(inner, hidden) for name in ("gate", "up")}
        norms = {f"{at}.{name}.weight": ones.clone() for name in ("input_layernorm", "post_attention_layernorm")}
        down = {f"{at}.mlp.down_proj.weight": matrix(hidden, inner)}
        total += save({**square, **mlp, **down, **norms}, f"model-{index:05d}")
    total += save({"lm_head.weight": matrix(SHAPE["vocab_size"], hidden), "model.norm.weight": ones}, "model-head")
    write_json(folder / "config.json", {**SHAPE, "num_hidden_layers": layers})
    return total


def work(folder: Path, tokens: int, out: Path) -> dict[str, Any]:
    """What the child does: prune by a fifth of heads and neurons, and say how it went."""
    from edgeprune.checkpoint import Checkpoint
    from edgeprune.compensated import Origin, prune_compensated
    from edgeprune.layerwise import Compensation
    from edgeprune.runtimes.isolate import memory_mib
    from edgeprune.shape import LayerShape

    shape = Checkpoint(folder).shape
    dense = shape.layers[0]
    ids = torch.randint(shape.vocab, (tokens // 512, 512), generator=torch.Generator().manual_seed(1))
    blocks = shape.parameters - shape.embedding_parameters - shape.norm_parameters
    share = RATIO * shape.parameters / blocks  # of heads and neurons, so that the ratio is one of all parameters
    heads = round((1 - share) * dense.heads)
    left = LayerShape(heads, heads, round((1 - share) * dense.neurons / 32) * 32)
    began = time.monotonic()
    plan = prune_compensated(
        folder,
        ids,
        [left] * len(shape.layers),
        Compensation(),
        out,
        origin=Origin("obs", RATIO, "random", "random"),
        progress=lambda done, total: print(f"layer {done} of {total}", file=sys.stderr, flush=True),
    )
    return {
        "reached_ratio": plan.reached_ratio,
        "seconds": time.monotonic() - began,
        "peak_gib": memory_mib()["VmHWM"] / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("large.json"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--limit-gib", type=float, default=6.0)
    parser.add_argument("--work", type=Path, help="folder for the models (30 GB); default: a temporary one")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(work(args.child, args.tokens, args.work)))
        return
    with tempfile.TemporaryDirectory(dir=args.work) as scratch:
        dense, pruned = Path(scratch) / "dense", Path(scratch) / "pruned"
        parameters = make_model(dense, args.layers)
        command = [sys.executable, __file__, "--child", str(dense), "--tokens", str(args.tokens), "--work", str(pruned)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result = {"parameters": parameters, "layers": args.layers, "tokens": args.tokens, **json.loads(done.stdout)}
        shutil.rmtree(scratch, ignore_errors=True)
        Path(scratch).mkdir(exist_ok=True)
    write_json(args.out, {"environment": environment(), "aim_gib": args.limit_gib, **result})
    print("| parameters | layers | tokens | removed | minutes | peak GiB | aim |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {parameters / 1e9:.2f}e9 | {args.layers} | {args.tokens} | {100 * result['reached_ratio']:.1f} % | "
        f"{result['seconds'] / 60:.1f} | {result['peak_gib']:.2f} | < {args.limit_gib:g} |"
    )
    sys.exit(0 if result["peak_gib"] < args.limit_gib else 1)


if __name__ == "__main__":
    main()
