"""Boards by name or address, and the place where something is measured: this machine or one of them.

`~/.config/edgeprune/boards.toml`, and any file given to `--boards`, has a table a board:

    [kitchen-pi]
    url = "ssh://pi@raspberrypi.local"
    device = "rpi5"
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from edgeprune.cores import available_cores
from edgeprune.devices import read_toml
from edgeprune.errors import BadInput, unknown
from edgeprune.files import config_dir
from edgeprune.runtimes.isolate import Execute, run_isolated
from edgeprune.runtimes.ssh import FOLDER, Board, Link

BOARDS_FILE = "boards.toml"  # in the user's settings


class BoardEntry(BaseModel):
    """One board of a file of boards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    url: str
    device: str | None = None  # its profile
    threads: Annotated[int, Field(ge=1, le=512)] | None = None
    folder: Annotated[str, Field(min_length=1)] = FOLDER
    python: str | None = None
    ssh_config: str | None = None

    def board(self) -> Board:
        """Its address.

        Raises:
            BadInput: it is none.
        """
        config = None if self.ssh_config is None else Path(self.ssh_config).expanduser()
        return Board.of(self.url, folder=self.folder, python=self.python, ssh_config=config)


_ENTRIES = TypeAdapter(dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")], BoardEntry])


def read_boards(path: Path) -> dict[str, BoardEntry]:
    """The boards of a file by name.

    Raises:
        BadInput: no such file, no TOML, a field that is missing, unknown or out of range, or a wrong address.
    """
    entries = read_toml(path, _ENTRIES.validate_python)
    if not entries:
        raise BadInput("no boards in it", where=path)
    for entry in entries.values():
        entry.board()
    return entries


def find_board(text: str) -> BoardEntry:
    """The board of an address, or of a name in the user's file.

    Raises:
        BadInput: no such name, or a wrong address.
    """
    if "://" in text:
        Board.of(text)
        return BoardEntry(url=text)
    path = config_dir() / BOARDS_FILE
    known = read_boards(path) if path.is_file() else {}
    if text not in known:
        raise unknown("board", text, [*known, "ssh://user@host"])
    return known[text]


def device_of(board: str | None) -> str:
    """The profile's name of a board by its entry; of no board, this machine's.

    Raises:
        BadInput: no such board, or its entry names no profile.
    """
    if board is None:
        return "host"
    entry = find_board(board)
    if entry.device is None:
        raise BadInput("which device the board is, nothing says", where=board, remedy="add --device rpi5")
    return entry.device


@dataclass(frozen=True)
class Place:
    """Where something is measured.

    Attributes:
        execute: runs a function there.
        threads: of the runtimes there.
        identity: what results depend on there: processor, versions; empty for this machine.
        board: the board; None for this machine.
    """

    execute: Execute
    threads: int
    identity: dict[str, Any] = field(default_factory=dict)
    board: Board | None = None


def place(board: str | BoardEntry | None, threads: int | None = None) -> Place:
    """This machine, or a board, which is asked what it is.

    Args:
        board: name or address; None: this machine.
        threads: default: the board's own entry, else all its cores of the fastest kind.

    Raises:
        BadInput: no such board.
        StageFailed: it cannot be reached, or is not set up.
    """
    if board is None:
        return Place(run_isolated, threads or available_cores())
    entry = find_board(board) if isinstance(board, str) else board
    link = Link(entry.board())
    told = link.agent("hello")
    identity = {key: told[key] for key in ("cpu_info", "machine", "system", "packages", "python")}
    return Place(link.run, threads or entry.threads or int(told["cores"]), identity, link.board)
