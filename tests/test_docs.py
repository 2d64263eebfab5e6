"""Every command on every page of the documentation, run on a tiny model under the names that the pages use.

A block that begins with `# needs …` is not run; its commands must still be ones that the command line takes.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from conftest import SENTENCES, shorten
from typer.testing import CliRunner

from edgeprune.cli import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
# What the test adds, and the last of two values holds: less to measure, no quiet machine to wait for, short training.
ADDED = {
    "fit": "--quant Q8_0,int4 --no-tune --no-gate --recover 2s --threads 2",
    "recover": "--time 5s",
    "bench": "-p 32 -n 8 -r 1 --no-gate",
    "eval": "--windows 2 --length 32",
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    title: str | None
    text: str

    @property
    def runs(self) -> bool:
        return not self.text.startswith("# needs ")

    def commands(self) -> Iterator[list[str]]:
        """The words of each command."""
        for line in self.text.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                if words := shlex.split(command, comments=True):
                    yield words


def blocks(page: Path) -> list[Block]:
    found = re.findall(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(language, title or None, text) for language, title, text in found]


def added(words: list[str]) -> list[str]:
    extra = shlex.split(ADDED.get(words[1], ""))
    if "--recover" not in words and "--recover" in extra:
        at = extra.index("--recover")
        del extra[at : at + 2]
    return extra


def parse(words: list[str]) -> None:
    """Let the command line read a command without running it."""
    command = typer.main.get_command(app)
    arguments = words[1:]
    context = command.make_context("edgeprune", list(arguments))
    while hasattr(command, "resolve_command"):
        name, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
        assert command is not None
        context = command.make_context(name, list(arguments), parent=context)


@pytest.fixture
def at_home(chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the pages speak of."""
    shorten(monkeypatch, tmp_path / "dense-trials.jsonl")
    monkeypatch.setattr("edgeprune.models.demo_model", lambda _name, say=None: chat_model)
    home = tmp_path / "home"
    (home / "my-texts").mkdir(parents=True)
    (home / "my-llama").symlink_to(chat_model)
    text = "\n\n".join(SENTENCES * 12)
    for name in ("calibration.txt", "held-out.txt", "my-texts/one.txt"):
        (home / name).write_text(text)
    monkeypatch.chdir(home)
    return home


def run(words: list[str]) -> None:
    if words[0] == "edgeprune":
        done = CliRunner().invoke(app, [*words[1:], *added(words)], input="")
        assert done.exit_code == 0, f"{shlex.join(words)}\n{done.output}\n{done.exception!r}"
    else:
        assert words[0] in {"mkdir"}, f"{shlex.join(words)}: run by no test; begin the block with '# needs …'"
        subprocess.run(words, check=True)


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page: str, at_home: Path) -> None:
    for block in blocks(DOCS / page):
        if block.language == "toml" and block.title:
            (at_home / block.title).write_text(block.text)
        elif block.language == "python":
            exec(compile(block.text, page, "exec"), {})
        elif block.language == "sh":
            for words in block.commands():
                if block.runs:
                    run(words)
                elif words[0] == "edgeprune":
                    parse(words)


def test_the_commands_of_the_readme_are_ones() -> None:
    found = [words for block in blocks(ROOT / "README.md") if block.language == "sh" for words in block.commands()]
    ours = [words for words in found if words[0] == "edgeprune"]
    assert len(ours) > 30
    for words in ours:
        parse(words)


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stderr
    commands = (tmp_path / "site" / "reference" / "cli" / "index.html").read_text()
    assert "edgeprune devices measure" in commands and "--max-memory" in commands
    functions = (tmp_path / "site" / "reference" / "python" / "index.html").read_text()
    assert "min_tokens_per_s" in functions and "head_l1" in functions
