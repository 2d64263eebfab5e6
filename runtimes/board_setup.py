"""`boards setup`: a virtual environment on the board with numpy and a runtime, from the registry or from wheels sent.

Said again it changes nothing: what is installed is kept beside what was asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from edgeprune.errors import BadInput, StageFailed
from edgeprune.runtimes.ssh import Link

INSTALL_S = 3600.0  # llama-cpp-python compiles for a quarter of an hour on a Raspberry Pi
LEAST_PYTHON = (3, 11)
RUNTIME_PACKAGES = {"llamacpp": ("llama-cpp-python",), "onnxruntime": ("onnxruntime", "tokenizers")}
STAMP = "setup.json"

_PROBE = "import json, platform, sys; print(json.dumps([list(sys.version_info[:2]), platform.machine()]))"
_KEEP = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_bytes(sys.stdin.buffer.read())"
_SHOW = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); print(p.read_text() if p.is_file() else '{}')"

Say = Callable[[str], None]


def requirements(runtimes: Sequence[str], *, exact: bool = True) -> list[str]:
    """What the board needs for `runtimes`, in the versions that are installed here, so that both measure alike.

    Raises:
        BadInput: a runtime that no board runs.
    """
    names = ["numpy"]
    for runtime in runtimes:
        if runtime not in RUNTIME_PACKAGES:
            raise BadInput(f"no board runs {runtime!r}", remedy=f"choose of {', '.join(RUNTIME_PACKAGES)}")
        names += RUNTIME_PACKAGES[runtime]
    found = []
    for name in names:
        try:
            found.append(f"{name}=={metadata.version(name)}" if exact else name)
        except metadata.PackageNotFoundError:
            found.append(name)
    return found


def _told(link: Link, command: Sequence[str]) -> Any:
    """What a command there prints last, as JSON; before that the board's shell may greet."""
    lines = link.call(list(command)).splitlines()
    try:
        return json.loads(lines[-1])
    except (IndexError, ValueError) as error:
        raise StageFailed("its shell printed what was not asked for", where=link.board) from error


def setup(
    link: Link, wanted: Sequence[str], *, wheels: Path | None = None, say: Say = lambda _: None
) -> dict[str, Any]:
    """Make the board ready; what it then is (`agent.hello`).

    Args:
        link: the board.
        wanted: requirements, as pip takes them.
        wheels: a folder of wheels to install from; None: the registry that pip there is set up for.
        say: told what happens.

    Raises:
        BadInput: the wheels lack one that is wanted, or there are none.
        StageFailed: no connection, no Python that is new enough, or pip failed.
    """
    board = link.board
    folder = board.folder
    files = sorted(wheels.glob("*.whl")) if wheels else []
    if wheels is not None and not files:
        raise BadInput("no wheels there", where=wheels, remedy="pip download, or pip wheel, for the board's platform")
    version, machine = _told(link, ["python3", "-c", _PROBE])
    if tuple(version) < LEAST_PYTHON:
        least = ".".join(map(str, LEAST_PYTHON))
        raise StageFailed(f"its Python is {version[0]}.{version[1]}", where=board, remedy=f"{least} at least is needed")
    stamp = {"requirements": list(wanted), "python": version, "wheels": [file.name for file in files]}
    link.call(["mkdir", "-p", "-m", "700", folder])
    if _told(link, ["python3", "-c", _SHOW, f"{folder}/{STAMP}"]) == stamp:
        say("it is set up already")
        return link.agent("hello")
    say(f"making an environment ({machine}, Python {version[0]}.{version[1]})")
    try:
        link.call(["python3", "-m", "venv", "--clear", f"{folder}/venv"], timeout_s=600.0)
    except StageFailed as error:
        if "ensurepip" in error.what or "returned non-zero" in error.what:
            raise StageFailed(error.what, where=board, remedy="sudo apt install python3-venv there") from error
        raise
    install = [f"{folder}/venv/bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if files:
        link.call(["mkdir", "-p", f"{folder}/wheels"])
        for file in files:
            say(f"sending {file.name}")
            # A wheel's name is part of what it is, so it is kept under its own.
            link.call(["python3", "-c", _KEEP, f"{folder}/wheels/{_plain(file.name)}"], file, timeout_s=INSTALL_S)
        install += ["--no-index", "--find-links", f"{folder}/wheels"]
    say(f"installing {', '.join(wanted)}")
    link.call([*install, *wanted], timeout_s=INSTALL_S)
    if files:
        link.call(["rm", "-r", f"{folder}/wheels"])
    link.call(["python3", "-c", _KEEP, f"{folder}/{STAMP}"], json.dumps(stamp).encode())
    return link.agent("hello")


def _plain(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*\.whl", name):
        raise BadInput(f"{name!r} is no wheel's name")
    return name
