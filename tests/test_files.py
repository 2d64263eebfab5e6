"""Files and folders are whole or absent, whatever interrupts the writing."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgeprune import files
from edgeprune.errors import BadInput, StageFailed
from edgeprune.files import (
    atomic_file,
    atomic_folder,
    preallocate,
    read_json,
    result_folder,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def break_off(_: Path) -> None:
    raise RuntimeError("broken off")


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "a.txt"
    write_text(path, "one")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        break_off(temporary)
    assert path.read_text() == "one" and names(path.parent) == ["a.txt"]
    write_text(path, "two")
    assert path.read_text() == "two"


def test_a_folder_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for text in ("one", "two"):
        with atomic_folder(path) as temporary:
            (temporary / "f").write_text(text)
        assert (path / "f").read_text() == text
    with pytest.raises(RuntimeError), atomic_folder(path) as temporary:
        (temporary / "g").write_text("half")
        break_off(temporary)
    assert names(path) == ["f"] and names(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError("Not enough free space to write 113246208 bytes after offset 1785728"),  # numpy, without errno
        RuntimeError("I/O error: No space left on device (os error 28)"),  # safetensors
    ],
    ids=["errno", "numpy", "safetensors"],
)
@pytest.mark.parametrize("context", [atomic_file, atomic_folder])
def test_a_full_disk_is_one_line(tmp_path: Path, context: Callable[..., object], error: Exception) -> None:
    with pytest.raises(BadInput, match="the disk is full") as caught, context(tmp_path / "a"):  # type: ignore[attr-defined]
        raise error
    assert caught.value.exit_code == 2 and str(tmp_path / "a") in str(caught.value)
    assert not names(tmp_path)


def test_a_library_that_does_not_say_so_is_seen_by_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(BadInput, match="the disk is full"), atomic_file(tmp_path / "a"):
        raise StageFailed("llama.cpp cannot quantise: iostream error")
    assert not names(tmp_path)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system has no call for it")
def test_a_file_to_be_mapped_has_its_place_before_it_is_filled(tmp_path: Path) -> None:
    size, path = 1 << 20, tmp_path / "a"
    with path.open("wb") as file:
        file.write(b"head")
        file.truncate(size)
    preallocate(path)
    assert path.stat().st_blocks * 512 >= size and path.stat().st_size == size
    assert path.read_bytes() == b"head" + bytes(size - 4)
    preallocate(tmp_path / "new", size)
    assert (tmp_path / "new").stat().st_blocks * 512 >= size


@pytest.mark.parametrize("error", [BadInput("not a model"), OSError(errno.EIO, "input/output error")])
def test_what_tells_its_cause_is_not_laid_to_a_disk_that_is_nearly_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(type(error)) as caught, atomic_file(tmp_path / "a"):
        raise error
    assert caught.value is error


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="something else"), atomic_file(tmp_path / "a"):
        raise StageFailed("something else")


def test_a_place_that_cannot_hold_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="cannot write"):
        write_text(tmp_path / "file" / "below", "y")


def test_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"ä": [1, 2.5, None]})
    assert read_json(tmp_path / "a.json") == {"ä": [1, 2.5, None]}
    with pytest.raises(BadInput, match="no such file"):
        read_json(tmp_path / "b.json")


def test_a_result_replaces_nothing_but_an_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "models"
    assert result_folder(path, "mark") == path
    path.mkdir()
    assert result_folder(path, "mark") == path
    (path / "thesis.txt").write_text("years of work")
    with pytest.raises(BadInput, match="holds something else"):
        result_folder(path, "mark", "other")
    (path / "other").write_text("")
    assert result_folder(path, "mark", "other") == path
    with pytest.raises(BadInput, match="not a folder"):
        result_folder(path / "thesis.txt")
    monkeypatch.chdir(path)
    with pytest.raises(BadInput, match="the folder you are in"):
        result_folder(Path(), "other")


def test_a_folder_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(BadInput, match="cannot write"):
        result_folder(file / "out", "mark")
    with pytest.raises(BadInput, match="cannot write"), atomic_file(tmp_path) as temporary:
        temporary.write_text("a file in place of a folder")
    assert result_folder(tmp_path / "new" / "out", "mark") == tmp_path / "new" / "out"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "new"]
