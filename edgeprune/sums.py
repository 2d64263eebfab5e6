"""`SHA256SUMS`: the hashes of all files in a folder, as `sha256sum --check` reads them."""

from __future__ import annotations

import re
from pathlib import Path

from edgeprune.errors import BadInput
from edgeprune.files import sha256, write_text

SUMS = "SHA256SUMS"
# What a folder has that comes from the hub or from npm, and no runtime reads.
_NOT_OURS = (".gitattributes", ".git", ".cache", "node_modules", "package-lock.json")
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def write_sums(folder: Path) -> None:
    """Write the hashes of all files in `folder`, those in folders inside it included."""
    write_text(folder / SUMS, "".join(f"{sha256(folder / name)}  {name}\n" for name in sorted(_files(folder))))


def _files(folder: Path) -> set[str]:
    """The files in `folder` but for the list itself and what the hub, git and npm put beside them."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in files if path.parts[0] not in _NOT_OURS} - {SUMS}


def read_sums(folder: Path) -> dict[str, str]:
    """File name -> SHA-256, as the folder's list has it.

    Raises:
        BadInput: there is no list, a line of it is none, or a name leads outside of the folder.
    """
    path = folder / SUMS
    if not path.is_file():
        raise BadInput(f"no {SUMS}", where=folder, remedy="give a folder that `edgeprune ship` or `fit` wrote")
    sums: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise BadInput(f"line {number} is no hash and file name", where=path)
        name = Path(match[2])
        if name.is_absolute() or ".." in name.parts:
            raise BadInput(f"line {number} names {match[2]!r}, outside the folder", where=path)
        sums[match[2]] = match[1]
    return sums


def changed(folder: Path) -> list[str]:
    """What differs from the folder's list: one line for each file that is missing, other than listed or not listed.

    Raises:
        BadInput: as `read_sums`.
    """
    sums = read_sums(folder)
    there = _files(folder)
    lines = [f"{name} is missing" for name in sorted(sums.keys() - there)]
    lines += [f"{name} is not in {SUMS}" for name in sorted(there - sums.keys())]
    lines += [f"{name} has other bytes" for name in sorted(sums.keys() & there) if sha256(folder / name) != sums[name]]
    return lines
