"""Commands about boards: `boards list`, `boards setup`, `boards check`, `boards clean`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeprune.cli_look import AsJson
from edgeprune.output import Stages, console, print_json, print_table

boards_app = typer.Typer(help="Boards over ssh.", no_args_is_help=True)
Address = Annotated[str, typer.Argument(help="ssh://user@host[:port], or a name in boards.toml.", metavar="BOARD")]


@boards_app.command("list")
def boards_list(as_json: AsJson = False) -> None:
    """List the boards of your boards.toml; none is asked anything."""
    from edgeprune.boards import BOARDS_FILE, read_boards
    from edgeprune.files import config_dir

    path = config_dir() / BOARDS_FILE
    boards = read_boards(path) if path.is_file() else {}
    if as_json:
        print_json({name: entry.model_dump(mode="json") for name, entry in boards.items()})
    elif boards:
        rows = [[name, entry.url, entry.device or "", str(entry.threads or "")] for name, entry in boards.items()]
        print_table(str(path), ("name", "url", "device", "threads"), rows)
    else:
        console.print(f"no boards yet; name them in {path}", soft_wrap=True)


@boards_app.command("setup")
def setup(
    board: Address,
    runtime: Annotated[str, typer.Option("--runtime", help="Runtimes to install, by commas.")] = "llamacpp",
    wheels: Annotated[
        Path | None, typer.Option("--wheels", help="Folder of wheels to send, for a board without network.")
    ] = None,
) -> None:
    """Make a virtual environment on the board with a runtime, in the versions of this machine; again: nothing."""
    from edgeprune.boards import find_board
    from edgeprune.runtimes.board_setup import requirements
    from edgeprune.runtimes.board_setup import setup as run_setup
    from edgeprune.runtimes.ssh import Link

    link = Link(find_board(board).board())
    wanted = requirements([name.strip() for name in runtime.split(",")])
    with Stages() as stages:
        told = run_setup(link, wanted, wheels=wheels, say=stages.say)
    console.print(f"{link.board} is ready: {told['cpu_info']}, {told['cores']} cores, Python {told['python']}")


@boards_app.command("check")
def check(board: Address, as_json: AsJson = False) -> None:
    """Show what a board is, what is installed there, and how it is: temperature, throttling, memory."""
    from edgeprune.boards import find_board
    from edgeprune.runtimes.ssh import Link

    link = Link(find_board(board).board())
    told = link.agent("hello")
    if as_json:
        print_json(told)
        return
    state = {key: value for key, value in told.pop("state").items() if value not in (None, [], "")}
    packages = told.pop("packages")
    rows = [[key, str(value)] for key, value in (told | packages | state).items()]
    print_table(str(link.board), ("what", "value"), rows)


@boards_app.command("clean")
def clean(
    board: Address,
    keep: Annotated[
        float, typer.Option("--keep", min=0, max=1e6, help="GiB of model files to keep, the last used.")
    ] = 0.0,
) -> None:
    """Remove model files and old results from a board; its environment stays."""
    from edgeprune.boards import find_board
    from edgeprune.runtimes.ssh import Link

    link = Link(find_board(board).board())
    told = link.agent("clean", str(int(keep * 2**30)))
    console.print(f"removed {told['removed']} files; {told['bytes'] / 2**20:.1f} MiB are kept", soft_wrap=True)
