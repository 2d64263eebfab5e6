"""Commands that talk to what was chosen: `chat`, `serve`."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeprune.cli_measure import Threads
from edgeprune.errors import BadInput
from edgeprune.output import console, errors, escape, problem, without_controls

if TYPE_CHECKING:
    from edgeprune.conversation import Conversation
    from edgeprune.shipping.run import Bundle

RunFolder = Annotated[Path, typer.Argument(help="Folder of a finished run of fit.")]


def _bundle(run: Path, runtime: str | None = None) -> Bundle:
    from edgeprune.shipping.run import Run

    return Run.open(run).bundle(runtime)


def chat(
    run: RunFolder,
    system: Annotated[
        str | None, typer.Option("--system", help="What the model is told before the first turn.")
    ] = None,
    most: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Of an answer, at most.")] = 512,
    threads: Threads = None,
) -> None:
    """Talk to what a run chose, in its runtime and with its settings. An empty line or Ctrl-D ends it."""
    from edgeprune.chat import renderer
    from edgeprune.conversation import Conversation
    from edgeprune.runtimes import open_runtime

    bundle = _bundle(run)
    facts = bundle.facts
    path = bundle.model if bundle.runtime == "llamacpp" else bundle.folder
    options = {"n_ctx": facts["n_ctx"], "threads": threads or facts["threads"], "name": bundle.runtime}
    try:
        model = open_runtime(path, **options, settings=facts["settings"])
    except BadInput as error:
        if not facts["settings"]:
            raise
        errors.print(f"[yellow]note:[/] {escape(error.what)}: without the settings of the device", soft_wrap=True)
        model = open_runtime(path, **options)
    with closing(model):
        talk = Conversation(model, renderer(bundle.folder), set(bundle.eos))
        if system:
            talk.messages.append({"role": "system", "content": system})
        if sys.stdin.isatty():
            errors.print(f"[bold]{escape(str(path))}[/]; an empty line ends", soft_wrap=True)
        while question := _question():
            forgotten = talk.forgotten
            try:
                _answer(talk, question, most)
            except BadInput as error:  # the question; the next may be shorter
                problem(str(error))
                continue
            if talk.forgotten > forgotten:
                errors.print("[yellow]note:[/] the context is full; the oldest turns are forgotten")


def _answer(talk: Conversation, question: str, most: int) -> None:
    """Print an answer as it comes, and its speed below."""
    for piece in talk.say(question, most=most):
        sys.stdout.write(without_controls(piece))  # not through rich: tabs, and more lines than the screen has
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    errors.print(f"[dim]{talk.n_tokens} tokens, {talk.tokens_per_s:.1f} tokens/s[/]")


def _question() -> str:
    try:
        return console.input("[bold]> [/]" if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def serve(
    run: RunFolder,
    port: Annotated[int, typer.Option("--port", "-p", min=1, max=65535, help="On 127.0.0.1.")] = 8000,
) -> None:
    """Serve what a run chose for llama.cpp to clients of OpenAI's interface, on this machine alone."""
    from edgeprune.serving import serve as run_server

    bundle = _bundle(run, "llamacpp")
    run_server(bundle.model, bundle.facts, port, lambda address: console.print(address, soft_wrap=True))
