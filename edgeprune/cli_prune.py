"""The command `prune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from edgeprune.cli_look import MOST_SEED, AsJson
from edgeprune.errors import BadInput
from edgeprune.output import Stages, console, print_json

if TYPE_CHECKING:
    from edgeprune.plan import Scope

Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="Text to score on: a .txt or .jsonl file, or a hub dataset. Default: text the model writes itself.",
        show_default=False,
        metavar="FILE|DATASET",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=MOST_SEED, help="Seed of self-generated text.")]


def prune(
    model: Annotated[str, typer.Argument(help="Hub id, folder, .gguf file, or demo.")],
    ratio: Annotated[float, typer.Option("--ratio", "-r", help="Share of all parameters to remove.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write, new or of an earlier run.")],
    method: Annotated[
        str,
        typer.Option(
            "--method", help="obs: measured damage and least squares; amp: the paper's; energy, random, reversed."
        ),
    ] = "obs",
    uniform: Annotated[
        bool, typer.Option("--uniform", help="The same widths in every layer: stock transformers loads the result.")
    ] = False,
    align: Annotated[
        str, typer.Option("--align", help="Neurons kept are a multiple of this: a number, or a quantisation to suit.")
    ] = "Q4_0",
    scope: Annotated[
        str, typer.Option("--scope", help="With amp: both (heads and neurons in equal shares) or mlp (neurons alone).")
    ] = "both",
    corpus: Annotated[
        list[Path] | None,
        typer.Option("--corpus", help="Text the model will be used for: lets obs drop tokens that it hardly uses."),
    ] = None,
    calibration: Calibration = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Prune a model to a checkpoint folder; with --uniform, stock transformers loads it."""
    from edgeprune.checkpoint import Checkpoint
    from edgeprune.models import checkpoint_folder, resolve
    from edgeprune.targets import target_for

    if align.isascii() and align.isdigit():
        step = int(align)
        if step < 1:
            raise BadInput("neurons are kept in steps of 1 or more", where="--align", remedy="for example 32")
    else:
        target = target_for(align)
        step = target.format.alignment(target.quantisation)
    with Stages() as stages:
        source = resolve(model, say=stages.say)
        from edgeprune.pruning import prune as run_prune  # not before: importing torch takes seconds

        plan = run_prune(
            source,
            ratio,
            out,
            method=method,
            uniform=uniform,
            align=step,
            scope=cast("Scope", scope),
            corpus=corpus or (),
            calibration=calibration,
            seed=seed,
            progress=stages,
        )
    layers = [layer.widths for layer in plan.layers]
    widths = {name: [getattr(layer, name) for layer in layers] for name in ("heads", "kv_heads", "neurons")}
    summary = {
        "out": str(out),
        "method": plan.method,
        "asked_ratio": plan.asked_ratio,
        "reached_ratio": plan.reached_ratio,
        "align": step,
        "vocabulary": Checkpoint(out).shape.vocab,
        **{name: values[0] if len(set(values)) == 1 else values for name, values in widths.items()},
    }
    if as_json:
        print_json(summary)
        return
    spans = {
        name: str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"
        for name, values in widths.items()
    }
    console.print(
        f"asked {100 * plan.asked_ratio:.2f} %, reached {100 * plan.reached_ratio:.2f} % of all parameters "
        f"(neurons in steps of {step}): {spans['heads']} query heads, {spans['kv_heads']} key/value heads, "
        f"{spans['neurons']} neurons a layer"
    )
    before = Checkpoint(checkpoint_folder(source)).shape.vocab
    if before != summary["vocabulary"]:
        console.print(f"{before:,} -> {summary['vocabulary']:,} tokens, by their use in the corpus")
    loader = "stock transformers" if len(set(layers)) == 1 else "edgeprune.load_checkpoint (layers differ)"
    console.print(f"written to {out}; loads in {loader}", soft_wrap=True)
