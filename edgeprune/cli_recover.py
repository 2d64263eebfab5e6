"""The command `recover`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from edgeprune.cli_look import MOST_SEED, AsJson
from edgeprune.errors import BadInput
from edgeprune.output import Stages, console, print_json


def duration(text: str, where: str) -> float:
    """Seconds of "90", "90s", "15m" or "2h", given to the option `where`.

    Raises:
        BadInput: it is no duration above 0.
    """
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:].lower())
    try:
        seconds = float(text[:-1] if unit else text) * (unit or 1)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise BadInput(f"{text!r} is no duration", where=where, remedy="write for example 90s, 15m or 2h")
    return seconds


def recover(
    pruned: Annotated[Path, typer.Argument(help="Folder of the pruned model.")],
    teacher: Annotated[
        str, typer.Option("--teacher", help="The dense model that the pruned one was made of.", metavar="MODEL")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write, new or of an earlier run.")],
    time: Annotated[str, typer.Option("--time", help="How long to train: 90s, 20m, 2h.")] = "20m",
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            "--data",
            help="Text to train on (.txt, .jsonl; what distil wrote, with its weights), once for each file. "
            "Default: the teacher's own.",
        ),
    ] = None,
    held_out: Annotated[
        list[Path] | None,
        typer.Option("--held-out", help="Text to judge on. Default: a part of the text is left out for it."),
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help="distil: from the teacher's distributions; lora: as AMP's authors did.")
    ] = "distil",
    train_embedding: Annotated[
        bool,
        typer.Option(
            "--train-embedding/--freeze-embedding", help="Train embedding and head too: slower, mostly worse."
        ),
    ] = False,
    rate: Annotated[
        float | None,
        typer.Option("--rate", help="Peak learning rate. Default: by steps and damage."),
    ] = None,
    kl: Annotated[
        float | None,
        typer.Option(
            "--kl",
            min=0,
            max=1,
            help="Share of the loss that is KL to the teacher; the rest is the text's own next tokens. "
            "1 comes nearest to the teacher, less reads text better. Default: 0.7; with --method lora 0.",
        ),
    ] = None,
    length: Annotated[int | None, typer.Option("--length", min=8, help="Tokens a window.")] = None,
    threads: Annotated[int | None, typer.Option("--threads", "-t", min=1, help="Threads. Default: all cores.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=MOST_SEED, help="Seed of the order of the text.")] = 0,
    resume: Annotated[bool, typer.Option("--resume/--no-resume", help="Go on from an interrupted run.")] = True,
    as_json: AsJson = False,
) -> None:
    """Train a pruned model to be like the dense one again, for a given time."""
    from dataclasses import replace

    if rate is not None and not 0 < rate < 1:
        raise BadInput(f"a rate of {rate:g}", where="--rate", remedy="give a number between 0 and 1, such as 3e-4")
    from edgeprune.models import checkpoint_folder, resolve

    seconds = duration(time, "--time")
    with Stages() as stages:
        dense = checkpoint_folder(resolve(teacher, say=stages.say), say=stages.say)
    import torch  # not before: it takes seconds

    from edgeprune.calibration import read_texts, read_weighted, weights_of
    from edgeprune.errors import unknown
    from edgeprune.losses import Mix
    from edgeprune.recipe import RECIPES, Method
    from edgeprune.recovery import is_main_process
    from edgeprune.recovery import recover as run
    from edgeprune.recovery_inputs import usual_recipe

    if method not in RECIPES:
        raise unknown("method", method, RECIPES)
    usual = usual_recipe(cast("Method", method), pruned, dense)
    recipe = replace(
        usual.with_length(length) if length else usual,
        train_embedding=train_embedding,
        rate=usual.rate if rate is None else rate,
        mix=usual.mix if kl is None else Mix(kl, 1 - kl),
    )
    if threads:
        torch.set_num_threads(threads)
    given = [pair for path in text or () for pair in read_weighted(path)]
    with Stages() as stages:
        result = run(
            pruned,
            dense,
            out,
            seconds=seconds,
            text=[each for each, _ in given] if text else None,
            weights=weights_of(given),
            held_out=[each for path in held_out for each in read_texts(path)] if held_out else None,
            method=cast("Method", method),
            recipe=recipe,
            shorten=length is None,
            seed=seed,
            resume=resume,
            progress=stages,
        )
    if not is_main_process():
        return
    if as_json:
        print_json(result.to_json())
        return
    before, after = result.before, result.after
    console.print(
        f"{result.steps} steps, {result.tokens:,} tokens, {result.tokens_per_s:.0f} tokens/s "
        f"({result.teacher_s:.0f} s of {result.seconds:.0f} s for the teacher)"
        + (f"; {result.skipped} steps skipped, not finite" if result.skipped else "")
    )
    console.print(
        f"held-out KL to the teacher {before.kl:.4f} → {after.kl:.4f}, cross-entropy {before.ce:.4f} → {after.ce:.4f}"
    )
    console.print(f"teacher's records: {result.cache} ({result.cache_mib:.0f} MiB)", soft_wrap=True)
    console.print(f"written to {out}", soft_wrap=True)
