"""Text that is read in a stream: text files, JSON Lines files (plain or gzipped), or folders of them.

Memory does not grow with a corpus.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from edgeprune.errors import BadInput, missing_extra
from edgeprune.files import sha256

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
_TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".xlsx")
_HUB_DATASET = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")
TEXT_FIELDS = (
    "text",
    "content",
    "instruction",
    "question",
    "context",
    "input",
    "prompt",
    "response",
    "output",
    "answer",
)
_BLOCK = 1 << 14  # characters of one piece of a text file
_LONGEST_LINE = 1 << 26  # characters of one JSON record

T = TypeVar("T")


@dataclass(frozen=True)
class Corpus:
    """The files of a corpus, in order, and SHA-256 over their bytes."""

    files: tuple[Path, ...]
    hash: str

    @property
    def n_bytes(self) -> int:
        """Bytes of all files, as stored."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def names(self) -> tuple[str, ...]:
        """File names, for reports."""
        return tuple(file.name for file in self.files)


def corpus(paths: Sequence[Path]) -> Corpus:
    """The corpus that `paths` name; folders are searched for files with one of `SUFFIXES`.

    Raises:
        BadInput: nothing given, nothing there, or a kind of file that is not read.
    """
    if not paths:
        raise BadInput("no corpus to read", remedy="give text or JSONL files, or folders of them")
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.is_file() and file.name.endswith(SUFFIXES))
            if not found:
                raise BadInput("no text in this folder", where=path, remedy=f"known: {', '.join(SUFFIXES)}")
            files += found
        elif not path.is_file():
            raise BadInput("no such file or folder", where=path)
        elif not path.name.endswith(SUFFIXES):
            raise BadInput("not a corpus file", where=path, remedy=f"known: {', '.join(SUFFIXES)}")
        else:
            files.append(path)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{'.jsonl' in file.suffixes} {sha256(file)}".encode())
    return Corpus(tuple(files), digest.hexdigest())


def text_path(name: str, where: object = None) -> Path | None:
    """The file that `name` means; None where it is the name of a hub dataset, `owner/name` or `owner/name:config`.

    Args:
        name: what the user gave.
        where: what an error names; None: the name.

    Raises:
        BadInput: there is no such file and it is no such name, or a file with a table, which would be read as prose.
    """
    path = Path(name).expanduser()
    if not path.exists():
        if _HUB_DATASET.fullmatch(name) and not name.endswith((*SUFFIXES, *_TABLES, ".json", ".gz")):
            return None
        remedy = "give a text or JSONL file, or a hub dataset as owner/name"
        raise BadInput("no such file" if where is None else f"no file {name}", where=where or name, remedy=remedy)
    if path.is_dir():
        raise BadInput("a folder, not a file", where=path, remedy="give a text or JSONL file")
    if path.suffix in _TABLES:
        raise BadInput("a table, not text", where=path, remedy='write it as JSONL: {"text": "…"} on each line')
    return path


def record_text(record: Any, fields: Sequence[str] = TEXT_FIELDS) -> str:
    """The text of one JSON record: its `fields`, joined in the record's order.

    Half of a character that UTF-16 writes in two, which JSON's escapes can hold and no text, becomes "?".
    """
    if isinstance(record, dict):
        record = "\n".join(v for k, v in record.items() if k in fields and isinstance(v, str) and v)
    return record.encode("utf-8", "replace").decode() if isinstance(record, str) else ""


def _open(file: Path) -> IO[str]:
    if file.suffix == ".gz":
        return cast("IO[str]", gzip.open(file, "rt", encoding="utf-8", newline=""))
    return file.open(encoding="utf-8", newline="")


def _records(file: Path, stream: IO[str]) -> Iterator[Any]:
    number = 0
    while line := stream.readline(_LONGEST_LINE):
        number += 1
        if len(line) == _LONGEST_LINE:
            raise BadInput(f"line {number} is longer than {_LONGEST_LINE >> 20} Mi characters", where=file)
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"line {number} is not JSON ({error})", where=file) from error


def _blocks(stream: IO[str]) -> Iterator[str]:
    rest = ""
    while block := stream.read(_BLOCK):
        # A piece ends before a space or after a line, where no token goes across.
        rest += block
        cut = max(rest.rfind("\n") + 1, rest.rfind(" "))
        if cut <= 0:
            cut = len(rest) if len(rest) > _BLOCK else 0
        if cut:
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def records(found: Corpus) -> Iterator[tuple[Path, Any]]:
    """What a corpus holds, in order, with the file it is from: JSON values, and text files' blocks as strings.

    Raises:
        BadInput: a file that is no UTF-8, no gzip, or no JSON, with its line.
    """
    for file in found.files:
        try:
            with _open(file) as stream:
                for record in _records(file, stream) if ".jsonl" in file.suffixes else _blocks(stream):
                    yield file, record
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise BadInput(f"cannot read the text ({error})", where=file, remedy="give UTF-8 text or JSONL") from error


def pieces(found: Corpus) -> Iterator[tuple[Path, str]]:
    """The text of a corpus, record by record or block by block, with the file it is from.

    Raises:
        BadInput: as `records`.
    """
    for file, record in records(found):
        if text := record_text(record):
            yield file, text


def up_to(items: Iterable[T], characters: int, size: Callable[[T], int]) -> Iterator[T]:
    """The first items, until they hold so many characters by `size`: a hub dataset may have no end that is wanted."""
    for item in items:
        yield item
        characters -= size(item)
        if characters <= 0:
            return


def hub_records(name: str) -> Iterator[Any]:
    """Records of the training split of a hub dataset, streamed; `name` may end in `:config`.

    Raises:
        BadInput: nothing of that name can be read, or `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise missing_extra("datasets", "eval") from error
    repository, _, config = name.partition(":")
    try:
        yield from datasets.load_dataset(repository, config or None, split="train", streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(
            f"no file and no hub dataset of that name could be read ({type(error).__name__}: {error})",
            where=name,
            remedy="give a text or JSONL file, or leave the option out",
        ) from error
