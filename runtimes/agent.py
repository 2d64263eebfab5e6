"""What runs on a board: keeps files, runs measurements, and tells how they go. Standard library, and the runtimes.

    python -m edgeprune.runtimes.agent ROOT COMMAND ...

Each command is one short process, started over ssh; it prints one line of JSON, or with `follow` a line an event. A
measurement is a job of its own: it goes on when the link breaks and writes its events to a file, which can be followed
from any line on. One job measures at a time, whoever started it.

    ROOT/blobs/SHA256        file contents; SHA256.part while they arrive
    ROOT/trees/HASH/...      hard links to blobs under the names that they have in a model
    ROOT/jobs/ID/            request.json, events.jsonl
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from edgeprune.cores import allowed_processors
from edgeprune.errors import BadInput, EdgepruneError
from edgeprune.recognise import Texts, recognise
from edgeprune.runtimes.bench import cpu_info
from edgeprune.runtimes.conditions import snapshot
from edgeprune.runtimes.isolate import run_isolated

PROTOCOL = 1
PACKAGES = ("numpy", "llama-cpp-python", "onnxruntime", "tokenizers")
FRESH_S = 3600.0  # how long a result that nobody fetched answers the same request again
JOB_DAYS = 7  # how long the result of a job that nobody asked for is kept
POLL_S = 0.1
_ID = re.compile(r"[0-9a-f]{16,64}")


class Store:
    """The agent's folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("blobs", "trees", "jobs"):
            (root / name).mkdir(parents=True, exist_ok=True)
        root.chmod(0o700)

    def blob(self, digest: str) -> Path:
        """Where a file's contents are kept."""
        return self.root / "blobs" / _checked(digest)

    def part(self, digest: str) -> Path:
        """Where they arrive."""
        return self.root / "blobs" / f"{_checked(digest)}.part"

    def job(self, name: str) -> Path:
        """A job's folder."""
        return self.root / "jobs" / _checked(name)


def _checked(name: str) -> str:
    if not _ID.fullmatch(name):
        raise BadInput(f"{name[:80]!r} is no hash")
    return name


def hello(store: Store) -> dict[str, Any]:
    """What this board is, and what is installed."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    usage = shutil.disk_usage(store.root)
    return {
        "protocol": PROTOCOL,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu_info": cpu_info(),
        "cores": _fast_cores(),
        "packages": versions,
        "free_bytes": usage.free,
        "state": snapshot().to_json(),
    }


def _fast_cores() -> int:
    """Cores of the fastest kind: with the slower ones beside them decoding takes as long as these need."""
    allowed = allowed_processors()
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        cpuinfo = ""
    return max(1, min(allowed, recognise(Texts(cpuinfo=cpuinfo), logical_cores=allowed).big_cores))


def have(store: Store, *digests: str) -> dict[str, Any]:
    """Of each file how many bytes are here, and whether that is all of it."""
    found = {}
    for digest in digests:
        whole = store.blob(digest)
        part = store.part(digest)
        if whole.is_file():
            os.utime(whole)
        size = whole.stat().st_size if whole.is_file() else part.stat().st_size if part.is_file() else 0
        found[digest] = {"bytes": size, "complete": whole.is_file()}
    return found


def receive(store: Store, digest: str, size: str, offset: str) -> dict[str, Any]:
    """Append standard input to a file that is `offset` bytes long so far; complete when it has `size` and the hash."""
    part, total, start = store.part(digest), int(size), int(offset)
    with part.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # an upload of a broken link may not have ended yet
        length = os.fstat(file.fileno()).st_size
        if length != start:
            return {"bytes": length, "complete": False}  # it was still writing when it was asked how much is here
        while block := sys.stdin.buffer.read(1 << 20):
            length += len(block)
            if length > total:
                raise BadInput(f"more than the {total} bytes that were said")
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    if length < total:
        return {"bytes": length, "complete": False}
    if _sha256(part) != digest:
        part.unlink()  # damaged on the way, or begun by another file: it is sent anew
        return {"bytes": 0, "complete": False}
    part.replace(store.blob(digest))
    return {"bytes": length, "complete": True}


def tree(store: Store) -> dict[str, Any]:
    """Lay out the files of standard input's {"NAME": "SHA256"} in a folder; its path."""
    manifest = json.loads(sys.stdin.read())
    names = sorted(manifest)
    for name in names:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\\" in name:
            raise BadInput(f"{name[:80]!r} would lie outside of its folder")
    key = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    folder = store.root / "trees" / key
    if not folder.is_dir():
        scratch = folder.with_name(f"{key}.{os.getpid()}")
        for name in names:
            blob = store.blob(manifest[name])
            if not blob.is_file():
                raise BadInput(f"the contents of {name!r} are not here", where=manifest[name])
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(blob, scratch / name)
        with contextlib.suppress(OSError):  # someone else was quicker
            scratch.rename(folder)
        shutil.rmtree(scratch, ignore_errors=True)
    os.utime(folder)
    return {"path": str(folder)}


def start(store: Store) -> dict[str, Any]:
    """Begin the job of standard input, {"id", "target", "arguments", "timeout_s", "memory_mib"}, if it is not there."""
    request = json.loads(sys.stdin.read())
    folder = store.job(request["id"])
    if folder.is_dir() and not _alive(folder) and time.time() - (folder / "events.jsonl").stat().st_mtime > FRESH_S:
        shutil.rmtree(folder)  # nobody came back for it, and the board is another by now
    fresh = not folder.is_dir()
    if fresh:
        scratch = folder.with_name(f"{folder.name}.{os.getpid()}")
        scratch.mkdir()
        (scratch / "request.json").write_text(json.dumps(request), encoding="utf-8")
        (scratch / "events.jsonl").touch()
        scratch.rename(folder)
        command = [sys.executable, "-P", "-m", "edgeprune.runtimes.agent", str(store.root), "work", folder.name]
        # Out of the session of ssh, so that it outlives the link.
        with (folder / "log.txt").open("wb") as log:
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    return {"job": folder.name, "fresh": fresh}


def work(store: Store, name: str) -> dict[str, Any]:
    """Run a job to its end: what `start` leaves behind."""
    folder = store.job(name)
    (folder / "pid").write_text(str(os.getpid()), encoding="ascii")
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    with (folder / "events.jsonl").open("a", encoding="utf-8") as events:

        def tell(event: dict[str, Any]) -> None:
            events.write(json.dumps(event) + "\n")
            events.flush()

        try:
            with _alone(store, lambda: tell({"progress": {"stage": "waiting for the board", "done": 0, "total": 0}})):
                outcome = run_isolated(
                    request["target"],
                    request["arguments"],
                    timeout_s=request["timeout_s"],
                    memory_mib=request["memory_mib"],
                    progress=lambda report: tell({"progress": report}),
                )
            end = {"outcome": vars(outcome)}
        except EdgepruneError as error:
            end = {"error": _error(error)}
        except Exception as error:  # whatever it is, whoever follows must learn of it
            end = {
                "error": {"kind": "StageFailed", "what": f"the agent failed: {error!r}", "where": None, "remedy": None}
            }
        tell({**end, "state": snapshot().to_json()})
        os.fsync(events.fileno())
    return {"job": name}


@contextlib.contextmanager
def _alone(store: Store, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the board's lock: two measurements at once would spoil each other."""
    with (store.root / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            waiting()
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def follow(store: Store, name: str, begin: str) -> Iterator[dict[str, Any]]:
    """The events of a job from number `begin` on, until its last."""
    folder = store.job(name)
    if not folder.is_dir():
        raise BadInput(f"no job {name}", remedy="start it again")
    with (folder / "events.jsonl").open(encoding="utf-8") as events:
        number, line = 0, ""
        while True:
            alive = _alive(folder)  # asked before reading: what it wrote last is still read
            line += events.readline()
            if not line.endswith("\n"):
                if not alive:
                    what = "the job ended without a result: the board was restarted, or the job killed"
                    yield {"error": {"kind": "StageFailed", "what": what, "where": None, "remedy": "measure again"}}
                    return
                time.sleep(POLL_S)
                continue
            event, line = json.loads(line), ""
            if number >= int(begin):
                yield event
            number += 1
            if "progress" not in event:
                return


def _alive(folder: Path) -> bool:
    """Whether a job runs, or has only just been started."""
    try:
        pid = int((folder / "pid").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return time.time() - folder.stat().st_mtime < 60.0
    try:
        os.kill(pid, 0)
        # Numbers of processes are used again: where it can be seen, it must be this job's.
        command = Path(f"/proc/{pid}/cmdline")
        return folder.name.encode() in command.read_bytes() if Path("/proc/self").exists() else True
    except OSError:
        return False


def forget(store: Store, name: str) -> dict[str, Any]:
    """End a job if it still runs, and remove what it left."""
    folder = store.job(name)
    if folder.is_dir() and _alive(folder):
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((folder / "pid").read_text(encoding="ascii")), signal.SIGKILL)  # its child dies with it
    shutil.rmtree(folder, ignore_errors=True)
    return {"job": name}


def clean(store: Store, limit: str) -> dict[str, Any]:
    """Remove what was used longest ago until the files take no more than `limit` bytes, and old jobs."""
    old = time.time() - JOB_DAYS * 86400
    for folder in (store.root / "jobs").iterdir():
        if folder.stat().st_mtime < old and not _alive(folder):
            shutil.rmtree(folder, ignore_errors=True)
    for scratch in (store.root / "trees").glob("*.*"):
        shutil.rmtree(scratch, ignore_errors=True)
    trees = sorted((store.root / "trees").iterdir(), key=lambda path: path.stat().st_mtime)
    blobs = sorted((store.root / "blobs").iterdir(), key=lambda path: path.stat().st_mtime)
    size = sum(blob.stat().st_size for blob in blobs)
    removed = 0
    while size > int(limit) and (trees or blobs):
        if trees:  # a tree's blobs go with it: they are what takes the room
            folder = trees.pop(0)
            inodes = {file.stat().st_ino for file in folder.rglob("*") if file.is_file()}
            shutil.rmtree(folder, ignore_errors=True)
            gone = [blob for blob in blobs if blob.stat().st_ino in inodes and blob.stat().st_nlink == 1]
        else:
            gone = blobs[:1]
        for blob in gone:
            size -= blob.stat().st_size
            blob.unlink()
            blobs.remove(blob)
            removed += 1
    return {"bytes": size, "removed": removed}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _error(error: EdgepruneError) -> dict[str, Any]:
    where = None if error.where is None else str(error.where)
    return {"kind": type(error).__name__, "what": error.what, "where": where, "remedy": error.remedy}


COMMANDS: dict[str, Callable[..., Any]] = {
    "hello": hello,
    "have": have,
    "receive": receive,
    "tree": tree,
    "start": start,
    "work": work,
    "follow": follow,
    "forget": forget,
    "clean": clean,
}


def main() -> None:
    """One command; its answer, or {"error": ...}, on standard output."""
    _, root, command, *arguments = sys.argv
    try:
        answer = COMMANDS[command](Store(Path(root).expanduser().absolute()), *arguments)
        for line in answer if isinstance(answer, Iterator) else [answer]:
            print(json.dumps(line), flush=True)
    except EdgepruneError as error:
        print(json.dumps({"error": _error(error)}), flush=True)
    except BrokenPipeError:  # whoever listened is gone
        os._exit(0)
    except OSError as error:
        what = f"the board cannot store it ({error.strerror})"
        print(
            json.dumps({"error": {"kind": "StageFailed", "what": what, "where": str(error.filename), "remedy": None}})
        )


if __name__ == "__main__":
    main()
