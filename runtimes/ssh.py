"""A board behind ssh: files are sent there, measurements run there, and a link that breaks is taken up again.

The system's ssh does the talking, with strict host keys, no passwords and no shell of ours: every remote command is an
argument list, quoted. The code that runs there is this package itself, sent as it is here, so both sides are always of
one version; the board needs a virtual environment with numpy and a runtime (`board_setup`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import re
import shlex
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from edgeprune.errors import BadInput, NothingFits, StageFailed
from edgeprune.files import sha256
from edgeprune.runtimes.isolate import Outcome
from edgeprune.runtimes.onnx_file import summary

FOLDER = ".cache/edgeprune-board"  # below the home there
CACHE_BYTES = 16 << 30  # of model files kept there
TRIES = 8  # of a link that broke, in a row without any progress
PAUSES_S = (1, 2, 4, 8, 15, 30, 60, 60)  # before each
COMMAND_S = 120.0  # for a command that only looks
PACKAGES = ("edgeprune", "edgeprune.export", "edgeprune.runtimes", "edgeprune.profiles")
_BROKEN = 255  # ssh's own exit code: the link, not the command
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_COMPANIONS = ("config.json", "genai_config.json", "tokenizer.json", "tokenizer_config.json")  # of an ONNX graph
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,253}[A-Za-z0-9])?|[0-9A-Fa-f:]{2,45}")
_ERRORS = {kind.__name__: kind for kind in (BadInput, NothingFits, StageFailed)}
# What the board does to unpack the code: python's own words, since the agent is not there yet.
_UNPACK = """
import io, os, pathlib, shutil, sys, tarfile, time
out = pathlib.Path(sys.argv[1]).expanduser()
if not out.is_dir():
    scratch = out.with_name(f"{out.name}.{os.getpid()}")
    scratch.mkdir(parents=True, mode=0o700)
    with tarfile.open(fileobj=io.BytesIO(sys.stdin.buffer.read())) as tar:
        for member in tar.getmembers():
            parts = pathlib.PurePosixPath(member.name).parts
            assert member.isfile() and ".." not in parts and not member.name.startswith("/"), member.name
            target = scratch.joinpath(*parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(tar.extractfile(member).read())
    try:
        scratch.rename(out)
    except OSError:  # another machine that uses this board was first
        shutil.rmtree(scratch)
    for old in out.parent.iterdir():  # others may use theirs now
        if time.time() - old.stat().st_mtime > 30 * 86400: shutil.rmtree(old, ignore_errors=True)
os.utime(out)
"""

Progress = Callable[[dict[str, Any]], None]


T = TypeVar("T")


class LinkBroken(StageFailed):
    """The connection was lost or could not be made."""


@dataclass(frozen=True)
class Board:
    """Where a board is and how it is reached.

    Attributes:
        host: name or address.
        user: None: as ssh's configuration says.
        port: likewise.
        folder: the agent's, absolute or below the home there.
        python: the interpreter that runs the agent; None: the one that `board_setup` made.
        ssh_config: a configuration file for ssh instead of the user's.
    """

    host: str
    user: str | None = None
    port: int | None = None
    folder: str = FOLDER
    python: str | None = None
    ssh_config: Path | None = None

    @classmethod
    def of(cls, url: str, **options: Any) -> Board:
        """The board of "ssh://pi@raspberrypi.local:2222".

        Raises:
            BadInput: it is no such address.
        """
        remedy = "write ssh://user@host or ssh://user@host:port"
        try:
            parts = urlsplit(url)
            host, port, user = parts.hostname, parts.port, parts.username
        except ValueError as error:
            raise BadInput(f"no address of a board ({error})", where=url, remedy=remedy) from error
        if parts.scheme != "ssh" or not host or parts.path.strip("/") or parts.query or parts.fragment:
            raise BadInput("no address of a board", where=url, remedy=remedy)
        if parts.password is not None:
            raise BadInput("passwords are not taken", where=f"ssh://{user}@{host}", remedy="use a key: ssh-copy-id")
        # A leading "-" would be an option to ssh; spaces and the like belong to no name.
        if not _HOST.fullmatch(host) or (user is not None and not _USER.fullmatch(user)):
            raise BadInput("no name of a user or host that is taken", where=url, remedy=remedy)
        return cls(host, user, port, **options)

    def __str__(self) -> str:
        user = f"{self.user}@" if self.user else ""
        return f"ssh://{user}{self.host}" + (f":{self.port}" if self.port else "")

    @property
    def interpreter(self) -> str:
        """The python there."""
        return self.python or f"{self.folder}/venv/bin/python"

    def command(self, remote: list[str]) -> list[str]:
        """The argument list that runs `remote` there; a path below the home stays one, for ssh starts there."""
        options = {
            "BatchMode": "yes",
            "StrictHostKeyChecking": "yes",
            "ConnectTimeout": "15",
            "ServerAliveInterval": "10",
            "ServerAliveCountMax": "3",
            "ForwardAgent": "no",
            "ClearAllForwardings": "yes",
        }
        found = ["ssh", "-T"]
        if self.ssh_config is not None:
            found += ["-F", str(self.ssh_config)]
        for name, value in options.items():
            found += ["-o", f"{name}={value}"]
        if self.port is not None:
            found += ["-p", str(self.port)]
        if self.user is not None:
            found += ["-l", self.user]
        return [*found, "--", self.host, shlex.join(remote)]


def failure(board: Board, code: int, said: str, program: str) -> StageFailed:
    """The error for `program` over ssh that failed, in one line with the remedy for what is usual."""
    line = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), f"exit code {code}")
    low = said.lower()
    if "host key verification failed" in low or "remote host identification has changed" in low:
        remedy = (
            f"check the key and take it over: ssh {board.host}, or ssh-keyscan -H {board.host} >> ~/.ssh/known_hosts"
        )
        return StageFailed("the host's key is not known, or is another than before", where=board, remedy=remedy)
    if "permission denied" in low and code == _BROKEN:
        return StageFailed("no key of yours is taken there", where=board, remedy=f"ssh-copy-id {board.host}")
    if code == _BROKEN:
        return LinkBroken(f"the link is down ({line})", where=board, remedy="see that the board is on and reachable")
    if code in (126, 127) and program not in ("env", board.interpreter):
        return StageFailed(f"there is no {program} there", where=board)
    if code in (126, 127):
        remedy = f"edgeprune boards setup {board}"
        return StageFailed("the board is not set up", where=board, remedy=remedy)
    return StageFailed(f"the command there failed ({line})", where=board)


@dataclass
class Link:
    """Commands and measurements on one board.

    Attributes:
        board: which.
        ready: whether the code has been sent in this process.
        hashes: of files here, by path, size and time.
    """

    board: Board
    ready: bool = False
    hashes: dict[tuple[str, int, int], str] = field(default_factory=dict)

    def call(
        self, remote: list[str], send: bytes | Path = b"", *, offset: int = 0, timeout_s: float = COMMAND_S
    ) -> str:
        """What a command there prints, given `send` on its standard input (a file from `offset` on).

        Raises:
            LinkBroken: no connection.
            StageFailed: it failed, or took too long.
        """
        with _stdin(send, offset) as source:
            try:
                done = subprocess.run(
                    self.board.command(remote), stdin=source, capture_output=True, timeout=timeout_s, check=False
                )
            except subprocess.TimeoutExpired as error:
                raise LinkBroken(f"no answer within {timeout_s:g} s", where=self.board) from error
        if done.returncode:
            raise failure(self.board, done.returncode, done.stderr.decode("utf-8", "replace"), remote[0])
        return done.stdout.decode("utf-8", "replace")

    def agent(self, command: str, *arguments: str, send: bytes | Path = b"", **options: Any) -> dict[str, Any]:
        """The answer of one of the agent's commands, taken up again where the link breaks.

        Raises:
            StageFailed: the board is not set up, or not reachable.
            BadInput, StageFailed: as the agent says.
        """
        self.prepare()
        return self._answer(retried(lambda: self.call(self._agent(command, *arguments), send, **options)))

    def _agent(self, command: str, *arguments: str) -> list[str]:
        folder = self.board.folder
        path = f"PYTHONPATH={folder}/code/{code()[0]}"
        run = [self.board.interpreter, "-P", "-m", "edgeprune.runtimes.agent", folder]
        return ["env", path, *run, command, *arguments]

    def _answer(self, text: str) -> dict[str, Any]:
        lines = text.splitlines()
        answer = self._parsed(lines[-1] if lines else "")
        if "error" in answer:
            raise self._error(answer["error"])
        return answer

    def _parsed(self, line: str | bytes) -> dict[str, Any]:
        """A line of the agent's; whatever else a board says is one clear line, too."""
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise StageFailed(f"the agent's answer is none: {line[-200:]!r}", where=self.board) from error
        if not isinstance(found, dict):
            raise StageFailed(f"the agent's answer is none: {line[-200:]!r}", where=self.board)
        return found

    def _error(self, told: Any) -> Exception:
        told = told if isinstance(told, dict) else {"what": told}
        kind = _ERRORS.get(str(told.get("kind")), StageFailed)
        where = self.board if told.get("where") is None else f"{self.board}: {told['where']}"
        remedy = told.get("remedy")
        return kind(str(told.get("what"))[:2000], where=where, remedy=None if remedy is None else str(remedy)[:2000])

    def prepare(self) -> None:
        """Send the code, once."""
        if self.ready:
            return
        digest, blob = code()
        target = f"{self.board.folder}/code/{digest}"
        retried(lambda: self.call([self.board.interpreter, "-c", _UNPACK, target], blob))
        self.ready = True

    def send(self, path: Path, progress: Progress | None = None) -> str:
        """Bring a file or folder there; its path there. What is there is not sent again, what is half there goes on."""
        graph = path.suffix == ".onnx" and path.is_file()
        files = _beside(path) if graph else {path.name: path} if path.is_file() else _files(path)
        manifest = {name: self._hash(file) for name, file in files.items()}
        there = self.agent("have", *manifest.values())
        absent = [name for name, digest in manifest.items() if not there[digest]["complete"]]
        for name in absent:
            self._send_file(files[name], manifest[name], progress)
        folder = str(self.agent("tree", send=json.dumps(manifest).encode())["path"])
        if absent:
            self.agent("clean", str(CACHE_BYTES))
        return f"{folder}/{path.name}" if path.is_file() else folder

    def _hash(self, file: Path) -> str:
        """A file's SHA-256, read once as long as the file stays as it is."""
        state = file.stat()
        key = (str(file), state.st_size, state.st_mtime_ns)
        if key not in self.hashes:
            self.hashes[key] = sha256(file)
        return self.hashes[key]

    def _send_file(self, file: Path, digest: str, progress: Progress | None) -> None:
        size = file.stat().st_size
        arrived = 0

        def once() -> None:
            nonlocal arrived
            there = self.agent("have", digest)[digest]
            arrived = there["bytes"]
            if progress:
                progress({"stage": f"sending {file.name}", "done": there["bytes"] >> 20, "total": size >> 20})
            if there["complete"]:
                return
            # A slow link: an hour for a GiB, and a quarter for anything.
            limit = 900.0 + 3600.0 * (size >> 30)
            remote = self._agent("receive", digest, str(size), str(there["bytes"]))
            answer = self._answer(self.call(remote, file, offset=there["bytes"], timeout_s=limit))
            if not answer["complete"]:
                raise LinkBroken("the link broke while a file was sent", where=self.board)

        retried(once, told=lambda: arrived)

    def run(
        self,
        target: str,
        arguments: Mapping[str, Any],
        *,
        timeout_s: float,
        memory_mib: int | None = None,
        progress: Progress | None = None,
        allow: Collection[str] = (),
        python: str | None = None,
    ) -> Outcome:
        """`run_isolated`, there: paths among the arguments are sent first.

        Raises:
            BadInput, NothingFits, StageFailed: as the function raised them; StageFailed also where the board cannot be
                reached any more. The job goes on there, and the same call finds it again within an hour.
        """
        if allow or python is not None:
            raise BadInput("a board runs the package's own functions, with its own interpreter", where=self.board)
        sent = {k: self.send(v, progress) if isinstance(v, Path) else v for k, v in arguments.items()}
        request = {"target": target, "arguments": sent, "timeout_s": timeout_s, "memory_mib": memory_mib}
        name = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:32]
        self.agent("start", send=json.dumps({**request, "id": name}).encode())
        try:
            end = self._follow(name, progress)
        except KeyboardInterrupt:  # whoever asked no longer wants it
            with contextlib.suppress(StageFailed):
                self._answer(self.call(self._agent("forget", name), timeout_s=15.0))
            raise
        self.agent("forget", name)
        if "error" in end:
            raise self._error(end["error"])
        try:
            return Outcome(**end["outcome"])
        except (KeyError, TypeError) as error:
            raise StageFailed(f"the agent told no outcome ({error})", where=self.board) from error

    def _follow(self, name: str, progress: Progress | None) -> dict[str, Any]:
        seen = 0

        def read() -> dict[str, Any]:
            nonlocal seen
            for event in self._lines(self._agent("follow", name, str(seen))):
                seen += 1
                if "progress" not in event:
                    return event
                if progress:
                    progress(event["progress"])
            raise LinkBroken("the link broke while a measurement ran", where=self.board)

        return retried(read, told=lambda: seen)

    def _lines(self, remote: list[str]) -> Iterator[dict[str, Any]]:
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                self.board.command(remote), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
            )
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    # One without an end was cut by the link; others are of the board's shell, which greets.
                    if line.endswith(b"\n") and line.startswith(b"{"):
                        yield self._parsed(line)
                if code := process.wait():
                    errors.seek(0)
                    raise failure(self.board, code, errors.read().decode("utf-8", "replace"), remote[0])
            finally:
                process.kill()
                process.wait()


def retried(attempt: Callable[[], T], told: Callable[[], int] = lambda: 0) -> T:
    """Call `attempt` until the link holds; `told` counts what it has got so far, which gives it new tries.

    Raises:
        LinkBroken: it broke `TRIES` times without anything new.
    """
    tries, last = 0, told()
    while True:
        try:
            return attempt()
        except LinkBroken:
            tries = 0 if told() > last else tries
            last = told()
            if tries >= TRIES:
                raise
            time.sleep(PAUSES_S[tries])
            tries += 1


def _files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise BadInput("no such file or folder", where=folder)
    # Of links only those of the hub's cache lead elsewhere; what others point to is no part of a model.
    inside = (folder.resolve(), folder.resolve().parent.parent / "blobs")
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            if file.is_symlink() and not any(file.resolve().is_relative_to(place) for place in inside):
                raise BadInput("a link that leaves the folder is not sent", where=file, remedy="copy the file there")
            found[file.relative_to(folder).as_posix()] = file
    return found


def _beside(graph: Path) -> dict[str, Path]:
    """An ONNX graph, its weights, and its tokenizer: not what else lies in its folder."""
    weights = {tensor.location for tensor in summary(graph).initializers if tensor.location is not None}
    names = [graph.name, *sorted(weights), *(name for name in _COMPANIONS if (graph.parent / name).is_file())]
    return {name: graph.parent / name for name in names}


def _stdin(send: bytes | Path, offset: int) -> Any:
    """A file object with what is to be sent."""
    if isinstance(send, Path):
        file = send.open("rb")
        file.seek(offset)
        return file
    scratch = tempfile.SpooledTemporaryFile(max_size=0)  # noqa: SIM115 (whoever asked closes it)
    scratch.write(send)
    scratch.seek(0)
    return scratch


@functools.cache
def code() -> tuple[str, bytes]:
    """(hash, tar) of this package's own sources, as they are here: what the board runs."""
    blob = io.BytesIO()
    with tarfile.open(fileobj=blob, mode="w") as tar:
        for package in PACKAGES:
            for entry in sorted(resources.files(package).iterdir(), key=lambda entry: entry.name):
                if entry.is_file() and entry.name.endswith((".py", ".toml")):
                    data = entry.read_bytes()
                    info = tarfile.TarInfo(f"{package.replace('.', '/')}/{entry.name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return hashlib.sha256(blob.getvalue()).hexdigest()[:32], blob.getvalue()
