"""Training tokens/s of recovery against a plain distillation loop, on the same windows and machine.

    python benchmarks/recovery.py --student PRUNED --teacher demo --text FILE --out recovery.json

The plain loop is what one writes first: stock transformers under bf16 autocast, the teacher run alongside, all logits
in float32, AdamW on every weight. Ours is measured as it meets a text for the first time (the teacher's records are
computed) and as it meets it again (they are read), with the embedding too, and as low-rank updates. Every variant
takes a step of 1,024 tokens in turn, so that a machine that slows down slows all of them; both wall-clock and processor
seconds are recorded, since only the second mean something on a machine that is shared.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from edgeprune.calibration import read_texts
from edgeprune.checkpoint import Checkpoint
from edgeprune.files import write_json
from edgeprune.models import checkpoint_folder, resolve
from edgeprune.packing import Windows, pack
from edgeprune.passes import Passes
from edgeprune.recipe import RECIPES, Recipe
from edgeprune.record import environment
from edgeprune.runtimes.pytorch import load_model, load_tokenizer
from edgeprune.teacher import TeacherCache
from edgeprune.trainee import Trainee
from edgeprune.training import Decoder, Learner, MasterAdamW, number_format

TOKENS = 1024  # a step
Step = Callable[[int], None]  # takes the number of the step


def plain(student: Path, teacher: Path, windows: Windows) -> Step:
    """The loop one writes first."""
    pupil, dense = load_model(student).train(), load_model(teacher)
    optimizer = torch.optim.AdamW(pupil.parameters(), lr=1e-5)
    count = TOKENS // windows.length

    def step(number: int) -> None:
        ids = windows.ids[number * count : (number + 1) * count]
        inputs, labels = ids[:, :-1], ids[:, 1:].flatten()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                target = dense(input_ids=inputs, use_cache=False).logits.flatten(0, 1).float().log_softmax(dim=-1)
            logits = pupil(input_ids=inputs, use_cache=False).logits.flatten(0, 1).float()
        own = logits.log_softmax(dim=-1)
        kl = torch.nn.functional.kl_div(own, target, log_target=True, reduction="batchmean")
        (0.7 * kl + 0.3 * torch.nn.functional.nll_loss(own, labels)).backward()
        torch.nn.utils.clip_grad_norm_(pupil.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(student: Path, teacher: Path, windows: Windows, recipe: Recipe, folder: Path, *, warm: bool) -> Step:
    """A step of `recover`, without its record keeping."""
    device = torch.device("cpu")
    dtype = number_format(device)
    records = TeacherCache(
        folder,
        lambda: Decoder(load_model(teacher), dtype, windows.length),
        "benchmark",
        windows,
        n_vocab=Checkpoint(teacher).shape.vocab,
        k=recipe.top_k,
        dtype=dtype,
        batch=TOKENS // windows.length,
    )
    trainee = Trainee(
        student,
        dtype=dtype,
        device=device,
        length=windows.length,
        low_rank=recipe.low_rank,
        train_embedding=recipe.train_embedding,
    )
    learner = Learner(trainee.decoder, recipe.mix)
    optimizer = MasterAdamW(trainee.masters, trainee.parameters, betas=recipe.betas, decay=recipe.decay)
    count = TOKENS // windows.length
    taught = records if recipe.mix.kl else None
    passes = Passes(learner, list(trainee.parameters.values()), windows, taught, count)
    if warm:
        records.get(torch.arange(len(windows)))

    def step(number: int) -> None:
        passes(torch.arange(number * count, (number + 1) * count), optimizer)
        optimizer.step(1e-5, recipe.clip)

    return step


@contextmanager
def variants(student: Path, teacher: Path, texts: list[str], steps: int) -> Iterator[dict[str, Callable[[], Step]]]:
    """Name -> what prepares the variant."""
    tokenizer = load_tokenizer(student)

    distil = RECIPES["distil"]
    everything = replace(distil, train_embedding=True)
    windows = Windows(pack(texts, tokenizer, distil.length).ids[: steps * TOKENS // distil.length].clone())
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as name:
        first, again = Path(name) / "first", Path(name) / "again"
        yield {
            "plain loop": lambda: plain(student, teacher, windows),
            "recover, first time": lambda: ours(student, teacher, windows, distil, first, warm=False),
            "recover, again": lambda: ours(student, teacher, windows, distil, again, warm=True),
            "recover --train-embedding, again": lambda: ours(student, teacher, windows, everything, again, warm=True),
            "recover --method lora": lambda: ours(student, teacher, windows, RECIPES["lora"], again, warm=False),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--teacher", default="demo")
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--steps", type=int, default=6, help="of each variant; the first is not counted")
    parser.add_argument("--only", help="variants whose name contains this")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    teacher = checkpoint_folder(resolve(args.teacher))
    texts = [text for path in args.text for text in read_texts(path)]
    with variants(args.student, teacher, texts, args.steps) as makers:
        steps = {name: make() for name, make in makers.items() if args.only is None or args.only in name}
        wall: dict[str, list[float]] = {name: [] for name in steps}
        processor: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(args.steps):
            for name, step in steps.items():
                gc.collect()
                start, cpu = time.perf_counter(), time.process_time()
                step(number)
                wall[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - cpu)
                print(f"step {number}, {name}: {TOKENS / wall[name][-1]:.0f} tokens/s", flush=True)
    rows = [
        {
            "variant": name,
            "tokens_per_s": round(TOKENS / statistics.median(wall[name][1:])),
            "tokens_per_processor_s": round(TOKENS / statistics.median(processor[name][1:])),
            "seconds": [round(value, 3) for value in wall[name]],
        }
        for name in steps
    ]
    write_json(
        args.out,
        {
            "benchmark": "recovery",
            "tokens_a_step": TOKENS,
            "threads": torch.get_num_threads(),
            "environment": environment(),
            "rows": rows,
        },
    )
    print("| variant | tokens/s | tokens per processor second |\n|---|---|---|")
    for row in rows:
        print(f"| {row['variant']} | {row['tokens_per_s']} | {row['tokens_per_processor_s']} |")


if __name__ == "__main__":
    main()
