"""The command `vocabulary`: fewer tokens, chosen by use, in a folder that stock software loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeprune.cli_look import MOST_SEED, AsJson
from edgeprune.output import Stages, console, print_json


def vocabulary(
    model: Annotated[
        str, typer.Argument(help="Hub id, folder, .gguf file, or a demo: demo, gemma3-270m.", metavar="MODEL")
    ],
    corpus: Annotated[
        list[Path],
        typer.Option(
            "--corpus", help="Text to count on: .txt, .jsonl (or .gz), or folders. May be repeated.", show_default=False
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder to write, new or of an earlier run.", show_default=False)
    ],
    size: Annotated[int | None, typer.Option("--size", min=1, help="Tokens to keep, at most.")] = None,
    ratio: Annotated[float | None, typer.Option("--ratio", help="Share of all parameters to remove, at least.")] = None,
    windows: Annotated[
        int, typer.Option("--windows", min=0, help="Windows of 512 tokens on which the model says what it expects.")
    ] = 64,
    seed: Annotated[int, typer.Option("--seed", min=0, max=MOST_SEED, help="Seed of the choice of windows.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Remove the tokens that a text of yours uses least; every string stays readable."""
    from edgeprune.models import checkpoint_folder, resolve
    from edgeprune.vocabulary_plan import plan_vocabulary
    from edgeprune.vocabulary_surgery import prune_vocabulary

    with Stages() as stages:
        folder = checkpoint_folder(resolve(model, say=stages.say), say=stages.say)
        plan = plan_vocabulary(folder, corpus, size=size, ratio=ratio, windows=windows, seed=seed, progress=stages)
        prune_vocabulary(folder, plan, out, progress=lambda done, total: stages("writing", done, total))
    if as_json:
        print_json(plan.to_json())
        return
    console.print(
        f"{plan.size_before} -> {plan.size} tokens, {plan.reached_ratio:.1%} of all parameters; "
        f"the counted text becomes {plan.longer - 1:.1%} longer in tokens\n{plan.counted_on()}; "
        f"other languages and subjects lose more\nwritten to {out}",
        soft_wrap=True,
    )
