"""Files that are either whole or absent: temporary name, fsync, rename. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeprune.errors import BadInput

CHUNK = 1 << 20  # bytes
_UNWRITABLE = {errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG}


def cache_dir() -> Path:
    """The user's cache (`EDGEPRUNE_CACHE`, else `$XDG_CACHE_HOME/edgeprune`, else `~/.cache/edgeprune`)."""
    if named := os.environ.get("EDGEPRUNE_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeprune"


def config_dir() -> Path:
    """The user's settings: `$XDG_CONFIG_HOME/edgeprune`, else `~/.config/edgeprune`."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "edgeprune"


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _is_full(folder: Path, error: Exception) -> bool:
    """Whether `error` came of a full disk. Not every library says so: numpy gives no errno, safetensors a text, and
    llama.cpp only that a stream failed; so what is left free is looked at as well, before anything is cleaned up."""
    if isinstance(error, BadInput):
        return False  # it knows what it came of
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    if any(phrase in str(error) for phrase in ("No space left", "Not enough free space")):
        return True
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).free < CHUNK
    return False


@contextlib.contextmanager
def _disk_errors(path: Path, folder: Path) -> Iterator[None]:
    """Turn what goes wrong with the disk into one line about `path`; `folder` exists and is where it is written."""
    try:
        yield
    except Exception as error:
        if _is_full(folder, error):
            raise BadInput("the disk is full", where=path, remedy="free some space or choose another place") from error
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            remedy = "choose a folder you can write to"
            raise BadInput(f"cannot write ({error.strerror})", where=path, remedy=remedy) from error
        raise


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a disk that is full or cannot be written to, met while writing in or making `folder`, into one line.

    Raises:
        BadInput: as said.
    """
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    with _disk_errors(folder, existing):
        yield


def _parent(path: Path) -> Path:
    """The folder that `path` will lie in, made if need be."""
    existing = next(p for p in path.absolute().parents if p.exists())
    with _disk_errors(path, existing):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent


def preallocate(path: Path, n_bytes: int | None = None) -> None:
    """Give the file `path` its `n_bytes` (its present size) on the disk now, before it is mapped into memory.

    A page of a sparse file that finds no room later ends the process without a word. Where the system has no call for
    it (macOS, Windows), nothing is done.

    Raises:
        OSError: the disk is full.
    """
    if hasattr(os, "posix_fallocate"):
        path.touch()
        # Readable and not for appending: a file system without the call has it emulated, which needs both.
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size if n_bytes is None else n_bytes)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it takes the final name only when the block succeeds.

    Raises:
        BadInput: the disk is full, or the folder cannot be written to.
    """
    folder = _parent(path)
    temporary: Path | None = None
    try:
        with _disk_errors(path, folder):
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=folder)
            os.close(handle)
            temporary = Path(name)
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """As `atomic_file`, for a folder; an existing folder of that name is replaced at the end."""
    folder = _parent(path)
    temporary: Path | None = None
    try:
        with _disk_errors(path, folder):
            temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=folder))
            temporary.chmod(0o755)
            yield temporary
            if path.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=folder))
                path.replace(old / path.name)
                temporary.replace(path)
                shutil.rmtree(old)
            else:
                temporary.replace(path)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """As `only_one`, for a result that is a folder, or is not there yet: the lock lies in the cache."""
    locks = cache_dir() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    with only_one(locks / hashlib.sha256(str(out).encode()).hexdigest()[:24], where=out):
        yield


@contextlib.contextmanager
def only_one(path: Path, *, where: Path | None = None) -> Iterator[None]:
    """Hold the lock of the file `path`, so that two processes do not write into its folder at once.

    Args:
        path: the file, which is made.
        where: what an error names; None: its folder.

    Where the system or the file system has no such locks, nothing is held.

    Raises:
        BadInput: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadInput(
                "another run is at work there", where=where or path.parent, remedy="give this one its own --out"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
                raise
        yield


def result_folder(path: Path, *marks: str) -> Path:
    """`path`, absolute, where a command may write a folder: new, empty, or an earlier result, which it replaces.

    Args:
        path: where to.
        marks: names of files; any of them tells an earlier result.

    Raises:
        BadInput: it is a file, the folder that the process is in, holds something else, or cannot be written.
    """
    path = path.absolute()
    if path.exists() and not path.is_dir():
        raise BadInput("exists and is not a folder", where=path, remedy="choose another --out")
    if path.resolve() == Path.cwd():
        raise BadInput("is the folder you are in", where=path, remedy="name a folder inside it with --out")
    if path.is_dir() and any(path.iterdir()) and not any((path / mark).is_file() for mark in marks):
        raise BadInput("holds something else, which would be lost", where=path, remedy="give --out a new folder")
    writable(path)
    return path


def writable(path: Path) -> None:
    """That `path` can be written, told before hours are spent on what it is to hold; the folder around it is made.

    Raises:
        BadInput: it cannot.
    """
    parent = path if path.is_dir() else _parent(path)
    with _disk_errors(path, parent), tempfile.TemporaryDirectory(prefix=".edgeprune-", dir=parent):
        pass


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically.

    Raises:
        BadInput: half of a character is in it: a lone surrogate, as JSON and GGUF may hold.
    """
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadInput(
            f"the model's files hold text that is no Unicode ({text[error.start : error.end]!r})",
            where=path,
            remedy="correct the name, template or token that has it",
        ) from error
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path` atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        BadInput: the file is absent, no JSON, or no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput("no such file", where=path) from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(
            f"not readable JSON ({error})", where=path, remedy="restore the file or make it again"
        ) from error
    if not isinstance(value, dict):
        raise BadInput("expected a JSON object", where=path)
    return value
