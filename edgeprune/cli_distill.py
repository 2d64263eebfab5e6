"""The command `distill`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from edgeprune.cli_look import MOST_SEED, AsJson
from edgeprune.errors import BadInput
from edgeprune.output import Stages, console, print_json


def count_of(text: str, where: str) -> int:
    """A number of "65536", "64k" (64 · 1024) or "2M", given to the option `where`.

    Raises:
        BadInput: it is no whole number above 0.
    """
    found = re.fullmatch(r"(\d+)([kKmM]?)", text.strip())
    value = int(found[1]) << {"": 0, "k": 10, "m": 20}[found[2].lower()] if found else 0
    if value <= 0:
        raise BadInput(f"{text!r} is no number of tokens", where=where, remedy="write for example 64k")
    return value


def distill(
    source: Annotated[
        list[str],
        typer.Argument(help="Text or JSON Lines files, folders of them, or one hub dataset.", metavar="SOURCE..."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help=".jsonl file to write (soft: .safetensors).")],
    tokens: Annotated[str | None, typer.Option("--tokens", help="Tokens to write at most: 16k, 64k …")] = None,
    per_class: Annotated[
        int | None, typer.Option("--per-class", min=1, help="Texts of each label, for classification data.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="auto, random, lexical, herding, k-center, k-means, distribution-matching, el2n, gradient-matching, "
            "divergence, best-of, self-generated, synthetic, soft.",
        ),
    ] = "auto",
    model: Annotated[
        str, typer.Option("--model", "-m", help="The dense model: hub id, folder, .gguf file, or demo.")
    ] = "demo",
    student: Annotated[
        Path | None,
        typer.Option(
            "--student", help="Folder of the pruned model: what is matched is then what recovers it (random: no model)."
        ),
    ] = None,
    text_field: Annotated[
        list[str] | None,
        typer.Option("--text-field", help="Field with text, once for each. Default: the usual names."),
    ] = None,
    label_field: Annotated[str, typer.Option("--label-field", help="Field of a record with its label.")] = "label",
    length: Annotated[
        int, typer.Option("--length", min=8, help="Tokens of a piece, or of a written text, at most.")
    ] = 256,
    read: Annotated[
        int | None,
        typer.Option("--read", min=8, help="First tokens of a piece that models read. Default: 400k in all at most."),
    ] = None,
    depth: Annotated[
        int, typer.Option("--depth", min=0, help="Last layers whose gradients are matched beside the head's.")
    ] = 4,
    threads: Annotated[int | None, typer.Option("--threads", "-t", min=1, help="Threads. Default: all cores.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=MOST_SEED, help="Seed of whatever is drawn.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with an interrupted pass, and reuse finished ones.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Distil text to a small set that calibrates or recovers a model nearly as well as all of it."""
    from dataclasses import asdict

    from edgeprune.corpus import text_path
    from edgeprune.models import checkpoint_folder, resolve

    for name in source:  # before a model is fetched
        if not Path(name).expanduser().is_dir():
            text_path(name)
    with Stages() as stages:
        dense = resolve(model, say=stages.say)
    import torch  # not before: it takes seconds

    from edgeprune.distillation.distil import distil
    from edgeprune.distillation.pool import Fields

    if threads:
        torch.set_num_threads(threads)
    usual = Fields()
    fields = Fields(tuple(text_field) if text_field else usual.text, label_field if per_class else None)
    with Stages() as stages:
        folder = checkpoint_folder(dense, say=stages.say)
        result = distil(
            source,
            out,
            model=folder,
            tokens=count_of(tokens, "--tokens") if tokens else None,
            per_class=per_class,
            method=method,
            student=student,
            fields=fields,
            length=length,
            read=read,
            depth=depth,
            seed=seed,
            resume=resume,
            progress=stages,
        )
    if as_json:
        print_json(asdict(result) | {"out": str(result.out), "record": str(result.record)})
        return
    size = "" if result.tokens is None else f" of {result.tokens:,} tokens"
    console.print(
        f"{result.method}: {result.texts:,} texts{size} from {result.pool_pieces:,} of {result.pool_tokens:,} tokens, "
        f"{result.seconds:.0f} s"
    )
    console.print(f"written to {result.out}; how it was made: {result.record.name}", soft_wrap=True)
