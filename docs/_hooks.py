"""Makes the references when the site is built: of the command line out of the commands, of Python out of docstrings."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click


def command_reference() -> str:
    """Every command with its arguments and options, as Markdown."""
    from edgeprune.cli import app

    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="edgeprune", title="Commands")
    # The lists of commands cut each sentence short; the table of contents has them all.
    text = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+", "", text)
    # Help texts are plain; what looks like a tag to Markdown is a metavar.
    text = re.sub(r"<(?!https?:)", "&lt;", text)
    return text.replace("**Usage**:\n\n```console\n", "```console\n")


def on_startup(command: str, dirty: bool) -> None:
    """Lay the package out as an installed one: what reads docstrings follows no import hooks."""
    root = Path(__file__).parents[1]
    package = root / "build" / "documented" / "edgeprune"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(root / "edgeprune", package)
    for name in ("export", "runtimes", "profiles"):
        shutil.copytree(root / name, package / name)


def on_files(files: Files, config: Any) -> Files:
    """Add `reference/cli.md`."""
    files.append(File.generated(config, "reference/cli.md", content=command_reference()))
    return files
