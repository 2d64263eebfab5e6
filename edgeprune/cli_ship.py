"""Commands that hand a model on: `ship`, `verify`, `report`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from edgeprune.cli_look import AsJson
from edgeprune.cli_measure import Threads
from edgeprune.errors import BadInput
from edgeprune.output import Stages, console, escape, print_json, print_table

To = Annotated[
    list[str] | None,
    typer.Option(
        "--to",
        help="Target, once for each or by commas: gguf, ollama, onnxruntime-genai, transformers.js[:q4,q8,fp16], "
        "huggingface, android[:onnx], ios[:onnx], executorch[:int8].",
        show_default=False,
        metavar="TARGET",
    ),
]


def check_runtimes(names: Iterable[str], runtimes: Collection[str]) -> None:
    """That a run whose files are for these runtimes can be shipped to the targets of `names`.

    Raises:
        BadInput: one needs a file of another runtime.
    """
    from edgeprune.shipping import needed_runtime

    for name in names:
        needed = needed_runtime(name)
        if needed is not None and needed not in runtimes:
            raise BadInput(
                f"{name} needs a file for {needed}", where="--to", remedy="name a quantisation for it with --quant"
            )


def targets_of(to: list[str] | None) -> list[str]:
    """The targets of `--to`, each once. A comma before an option of the target before belongs to that.

    Raises:
        BadInput: an unknown target, or one with two options, which would be one folder.
    """
    from edgeprune.errors import unknown
    from edgeprune.shipping import TARGETS

    names: list[str] = []
    for word in (word.strip() for text in to or [] for word in text.split(",")):
        if names and ":" in names[-1] and word in TARGETS[names[-1].partition(":")[0]].options:
            names[-1] += f",{word}"
        elif word.partition(":")[0] in TARGETS:
            names.append(word)
        else:
            raise unknown("target", word, TARGETS)
    names = list(dict.fromkeys(names))
    for name in names:
        known, _, options = name.partition(":")
        for option in filter(None, options.split(",")):
            if option not in TARGETS[known].options:
                raise unknown(f"option of {known}", option, TARGETS[known].options)
        if twice := [other for other in names if other != name and other.partition(":")[0] == name.partition(":")[0]]:
            raise BadInput(
                f"{name} and {twice[0]} would be one folder", where="--to", remedy="ship them one by one, with --out"
            )
    return names


def ship(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run of fit.")],
    to: To = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the targets' folders. Default: RUN/ship.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The dense model, if it is no longer where the run has it from.")
    ] = None,
    push: Annotated[
        str | None,
        typer.Option("--push", help="With huggingface: upload to this repository of the hub.", metavar="OWNER/NAME"),
    ] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Write what a run chose as a target wants it, and prove it by loading it."""
    from edgeprune.shipping import FOLDER, TARGETS
    from edgeprune.shipping import ship as write

    names = targets_of(to)
    if not names:
        if not as_json:
            print_table("Targets", ("--to", "what it writes"), [[name, each.about] for name, each in TARGETS.items()])
        raise BadInput("nothing to ship to", remedy=f"name a target with --to: {', '.join(TARGETS)}")
    if push and "huggingface" not in names:
        raise BadInput("--push uploads what --to huggingface writes", remedy="add --to huggingface")
    written: dict[str, str] = {}
    with Stages() as stages:
        for name in names:
            folder = (out or run / FOLDER) / name.partition(":")[0]
            written[name] = str(write(run, name, folder, model=model, threads=threads, say=stages.say))
        if push:
            from edgeprune.shipping.to_huggingface import push as upload

            stages(f"uploading to {push}", 0, 0)
            written["hub"] = upload(Path(written["huggingface"]), push)
    if as_json:
        print_json(written)
        return
    for name, path in written.items():
        console.print(f"[green]✓[/] {escape(name):18} {escape(path)}", soft_wrap=True)


def verify(
    bundle: Annotated[Path, typer.Argument(help="Folder that ship wrote.")],
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Check a shipped folder: its hashes, that it loads, and that it says what it said when it was shipped."""
    from edgeprune.shipping import verify as look

    with Stages() as stages:
        found = look(bundle, threads=threads, say=stages.say)
    if as_json:
        print_json({"ok": found.ok, **asdict(found)})
    else:
        for line in found.changed:
            console.print(f"[red]✗[/] {escape(line)}", soft_wrap=True)
        for each in found.verdicts:
            mark = "[green]✓[/]" if each.ok else "[red]✗[/]"
            where = "" if each.here else " (on another processor or runtime than when it was shipped)"
            console.print(f"{mark} {escape(each.path)}: {each.equal} of {each.total} tokens as shipped{where}")
        if found.ok:
            console.print("[green]✓[/] every file is the one that was shipped")
    if not found.ok:
        raise typer.Exit(4)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    compare: Annotated[bool, typer.Option("--compare", help="All runs on one page.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Page to write. Default: report.html in the run, or here.")
    ] = None,
) -> None:
    """Make the page of a run again, or one page of several runs side by side."""
    from edgeprune.report_page import PAGE, write_page

    if len(runs) > 1 and not compare:
        raise BadInput(f"{len(runs)} runs for one page", remedy="add --compare to put them side by side")
    page = out or (Path(PAGE) if compare else runs[0] / PAGE)
    write_page(runs, page)
    console.print(f"written to {page}", soft_wrap=True)
