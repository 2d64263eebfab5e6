"""Runs one function in a process of its own, so that a crash, a hang or a lack of memory is a result and not the end.

Runtimes are native code that reads files from elsewhere: they abort, they loop, the kernel kills them. A measurement
must survive that, and its peak of memory must be that of the measured work alone. Standard library only.

The two processes talk like this: the request is one line of JSON on the child's stdin, which then stays open as the
sign that the parent lives; reports come back as lines of JSON on a pipe of their own, because runtimes print to stdout
whatever they like. stdout and stderr of the child are kept, the last few KiB of them, for the reason of a failure.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import inspect
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol

from edgeprune.errors import BadInput, EdgepruneError, NothingFits, StageFailed
from edgeprune.runtimes.nvml import process_mib

_FIELDS = ("VmHWM:", "VmRSS:", "VmSwap:", "VmData:")
_NEARLY = 0.7  # of the limit; what could not be had is not among what is held
Status = Literal["ok", "failed", "oom", "crash", "timeout"]

NAMESPACE = "edgeprune."  # targets are ours: a name that came with a file must not choose what runs
SAMPLE_S = 0.1  # between two looks at the child's memory; a look costs some 50 us, so it does not show in a measurement
OUTPUT_TAIL = 8 << 10  # bytes kept of what the child prints
MESSAGE_LIMIT = 64 << 20  # bytes in one report: a broken child must not fill the parent's memory

_ERRORS = {kind.__name__: kind for kind in (BadInput, NothingFits, StageFailed)}
# What allocators say when they fail: libstdc++, glibc's strerror, torch, ggml, ONNX Runtime.
_OOM_PHRASES = (
    "bad_alloc",
    "cannot allocate memory",
    "can't allocate memory",
    "failed to allocate",
    "unable to allocate",
    "out of memory",
    "memoryerror",
    "failed to map segment",  # of the dynamic loader, when an import meets the limit
)
# What only a GPU's allocator says (CUDA, Vulkan); llama.cpp then reports no more than that it cannot load.
_GPU_OOM_PHRASES = ("cudamalloc failed", "outofdevicememory")


@dataclass(frozen=True)
class Outcome:
    """How a call in a process of its own ended.

    Attributes:
        status: "ok"; "failed" (the function raised); "oom" (no memory: its own limit or the kernel's killer); "crash"
            (it died of a signal or without a word); "timeout" (the deadline passed and it was killed).
        value: what the function returned, as JSON carries it; None unless "ok".
        reason: one line on why it is not "ok"; None if it is.
        peak_rss_mib: VmHWM, MiB: the largest resident set of the child, pages of mapped files included.
        peak_gpu_mib: the largest memory that was seen on NVIDIA's GPUs, MiB; None where NVML does not tell.
        peak_total_mib: the largest VmRSS + VmSwap that was seen, MiB (sampled, so short peaks may be missed).
        wall_s: seconds from the start of the interpreter to its end.
        output: the end of what the child printed.
    """

    status: Status
    value: Any
    reason: str | None
    peak_rss_mib: float | None
    peak_total_mib: float | None
    wall_s: float
    output: str = ""
    peak_gpu_mib: float | None = None

    @property
    def peak_mib(self) -> float | None:
        """The larger of the two peaks: VmHWM forgets swapped pages, the samples miss short peaks."""
        peaks = [peak for peak in (self.peak_rss_mib, self.peak_total_mib) if peak is not None]
        return max(peaks, default=None)


class Execute(Protocol):
    """`run_isolated`, or what does the same elsewhere (`ssh.Link.run`), to which paths are files to bring along."""

    def __call__(
        self,
        target: str,
        arguments: Mapping[str, Any],
        *,
        timeout_s: float,
        memory_mib: int | None = None,
        progress: Callable[[dict[str, Any]], None] | None = None,
        allow: Collection[str] = (),
        python: str | None = None,
    ) -> Outcome:
        """Call a function in a process of its own."""
        ...


def run_isolated(
    target: str,
    arguments: Mapping[str, Any],
    *,
    timeout_s: float,
    memory_mib: int | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
    allow: Collection[str] = (),
    python: str | None = None,
) -> Outcome:
    """Call `target` with `arguments` in a fresh interpreter and wait for its end.

    Args:
        target: "package.module:function"; the module lies in the `edgeprune` namespace or is named in `allow`.
        arguments: keyword arguments, as JSON carries them; paths go as text. If the function has a parameter `progress`
            and the caller listens, it gets a callable there that takes a dictionary.
        timeout_s: seconds until the whole process group is killed.
        memory_mib: limit of the child's own memory (RLIMIT_DATA on Linux: heap and private mappings, not mapped
            files, which the kernel can drop; RLIMIT_AS elsewhere).
        progress: called with each report, in the order in which they were sent.
        allow: further modules in which a target may lie.
        python: the interpreter; default: this one's. Its environment must have edgeprune.

    Raises:
        BadInput, NothingFits, StageFailed: as the function raised them; BadInput also for a target that is not ours
            and for an interpreter that is none.
    """
    if python is not None and shutil.which(python) is None:
        raise BadInput("cannot be run as an interpreter", where=python)
    module = target.partition(":")[0]
    if not (module.startswith(NAMESPACE) or module in allow):
        raise BadInput(f"will not run {target!r}", remedy=f"a target lies in the namespace {NAMESPACE}*")
    request = {
        "target": target,
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()},
        "memory_mib": memory_mib,
        "listening": progress is not None,
    }
    line = json.dumps(request).encode() + b"\n"

    began = time.monotonic()
    # -P: the working folder is not on the path, so no file that lies there can pass for a module.
    with _Child(
        [python or sys.executable, "-P", "-m", "edgeprune.runtimes.isolate", str(os.getpid())], line, began + timeout_s
    ) as child:
        child.watch(progress)
        return _judge(child, time.monotonic() - began, timeout_s, limited=memory_mib is not None)


class _Child:
    """The parent's view: the process, its two pipes and its memory. Leaving the block kills the process group."""

    def __init__(self, command: list[str], request: bytes, deadline: float) -> None:
        self.request = request
        self.deadline = deadline
        self.timed_out = False
        self.result: dict[str, Any] | None = None
        self.output = b""
        self.peak_rss_mib: float | None = None
        self.peak_total_mib: float | None = None
        self.peak_gpu_mib: float | None = None
        self._pending = b""
        self._reports, reports = os.pipe()
        self._printed, printed = os.pipe()
        try:
            self.process = subprocess.Popen(
                [*command, str(reports)],
                stdin=subprocess.PIPE,
                stdout=printed,
                stderr=printed,
                pass_fds=(reports,),
                start_new_session=True,
                bufsize=0,
            )
        except BaseException:
            os.close(self._reports)
            os.close(self._printed)
            raise
        finally:
            os.close(reports)
            os.close(printed)
        os.set_blocking(self._reports, False)
        os.set_blocking(self._printed, False)

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        assert self.process.stdin is not None
        self.process.stdin.close()
        os.close(self._reports)
        os.close(self._printed)

    def kill(self) -> None:
        """End the whole group; the child's own children may outlive it otherwise."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # gone (macOS says EPERM for a zombie's group)
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def watch(self, progress: Callable[[dict[str, Any]], None] | None) -> None:
        """Send the request, then read reports and output and look at the memory until the end or the deadline."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # dead already: its exit status will tell
            self.process.stdin.write(self.request)
        with selectors.DefaultSelector() as selector:
            selector.register(self._reports, selectors.EVENT_READ, self._take_report)
            selector.register(self._printed, selectors.EVENT_READ, self._take_output)
            next_look = time.monotonic() + SAMPLE_S
            while True:
                ended = self.process.poll() is not None  # asked before reading: what it wrote last is still read
                now = time.monotonic()
                if now >= next_look and not ended:
                    self._look_at_memory()
                    next_look = now + SAMPLE_S
                if now >= self.deadline and not ended:
                    self.timed_out = self.result is None
                    self.kill()
                    ended = True
                wait = 0.0 if ended else max(0.0, min(next_look, self.deadline) - now)
                if not selector.get_map() and not ended:
                    time.sleep(min(wait, 0.01))
                    continue
                events = selector.select(wait)
                for key, _ in events:
                    if not key.data(progress):
                        selector.unregister(key.fd)
                if ended and not events:
                    return

    def _take_output(self, _: object) -> bool:
        block = os.read(self._printed, 1 << 16)
        self.output = (self.output + block)[-OUTPUT_TAIL:]
        return bool(block)

    def _take_report(self, progress: Callable[[dict[str, Any]], None] | None) -> bool:
        block = os.read(self._reports, 1 << 16)
        *lines, self._pending = (self._pending + block).split(b"\n")
        if len(self._pending) > MESSAGE_LIMIT:
            raise StageFailed(f"an isolated process sent a report above {MESSAGE_LIMIT >> 20} MiB")
        for line in lines:
            message = json.loads(line)
            if "progress" in message:
                if progress is not None:
                    progress(message["progress"])
            else:
                self.result = message
        return bool(block)

    def _look_at_memory(self) -> None:
        sizes = memory_mib(self.process.pid)
        if "VmHWM" in sizes:
            self.peak_rss_mib = max(self.peak_rss_mib or 0.0, sizes["VmHWM"])
            total = sizes.get("VmRSS", 0.0) + sizes.get("VmSwap", 0.0)
            self.peak_total_mib = max(self.peak_total_mib or 0.0, total)
        if (held := process_mib(self.process.pid)) is not None:
            self.peak_gpu_mib = max(self.peak_gpu_mib or 0.0, held)


def memory_mib(pid: int | None = None) -> dict[str, float]:
    """VmHWM, VmRSS, VmSwap and VmData of a process in MiB, from /proc; empty where there is none or no such process."""
    try:
        text = Path(f"/proc/{'self' if pid is None else pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    fields = (line.split() for line in text.splitlines() if line.startswith(_FIELDS))
    return {name[:-1]: int(kib) / 1024 for name, kib, *_ in fields}


def _judge(child: _Child, wall_s: float, timeout_s: float, *, limited: bool) -> Outcome:
    output = child.output.decode(errors="replace")
    result = child.result or {}
    peak = max((p for p in (child.peak_rss_mib, result.get("peak_rss_mib")) if p is not None), default=None)

    def outcome(status: Status, reason: str | None = None, value: Any = None) -> Outcome:
        return Outcome(status, value, reason, peak, child.peak_total_mib, wall_s, output, child.peak_gpu_mib)

    if child.timed_out:
        return outcome("timeout", f"no result within {timeout_s:g} s")
    if "value" in result:
        return outcome("ok", value=result["value"])
    if "error" in result:
        error = result["error"]
        # Libraries turn a failed allocation into an error of their own ("cannot load"), so under a limit of ours
        # what they printed counts as well.
        said = error["what"] + (output if limited else "")
        if error["kind"] == "MemoryError" or _says_oom(said) or _says_oom(output, ()):
            return outcome("oom", f"out of memory: {error['what']}")
        if error["kind"] in _ERRORS:
            raise _ERRORS[error["kind"]](error["what"], where=error["where"], remedy=error["remedy"])
        return outcome("failed", f"{error['kind']}: {error['what']}" if error["what"] else error["kind"])
    return outcome(*_death(child.process.returncode, output))


def _death(code: int, output: str) -> tuple[Status, str]:
    """Status and reason of a process that ended without a result, from its exit code (negative: a signal)."""
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return "oom", "killed by SIGKILL, as the kernel does when memory runs out"
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        if _says_oom(output):
            return "oom", f"out of memory: died of {name} after a failed allocation"
        told = " (a library compiled for other instructions: see edgeprune doctor)" if name == "SIGILL" else ""
        return "crash", f"died of {name}{told}"
    return ("oom" if _says_oom(output) else "crash"), f"ended with exit code {code} and no result"


def _says_oom(text: str, phrases: Sequence[str] = _OOM_PHRASES) -> bool:
    lower = text.lower()
    return any(phrase in lower for phrase in (*phrases, *_GPU_OOM_PHRASES))


# The child's side.


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        # The kernel's own way needs no thread of ours to run, so it works when native code holds the interpreter.
        pr_set_pdeathsig = 1  # linux/prctl.h
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)

    def wait_for_end_of_stdin() -> None:
        while os.read(0, 4096):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=wait_for_end_of_stdin, daemon=True).start()


def _read_line(fd: int) -> bytes:
    """One line, byte-exact: a buffered reader would hold its lock against the thread that waits for the end."""
    line = b""
    while not line.endswith(b"\n"):
        block = os.read(fd, 1 << 16)
        if not block:
            os._exit(1)
        line += block
    return line


def _limit_memory(mib: int) -> None:
    import resource  # not on every system, and needed only here

    kind = resource.RLIMIT_DATA if sys.platform == "linux" else resource.RLIMIT_AS
    resource.setrlimit(kind, (mib << 20, mib << 20))


def _peak_rss_mib() -> float:
    if "VmHWM" in (sizes := memory_mib()):
        return sizes["VmHWM"]
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20) if sys.platform == "darwin" else peak / 1024


def _call(request: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The message that ends the conversation: the value or the error."""
    try:
        if request["memory_mib"] is not None:
            _limit_memory(request["memory_mib"])
        module, _, name = request["target"].partition(":")
        function = getattr(importlib.import_module(module), name)
        arguments = request["arguments"]
        if request["listening"] and "progress" in inspect.signature(function).parameters:
            arguments["progress"] = lambda report: send({"progress": report})
        message = {"value": function(**arguments)}
        json.dumps(message)
        return message
    except BaseException as error:
        starved = _starved(request["memory_mib"])
        if isinstance(error, EdgepruneError) and not starved:
            kind = type(error).__name__
            return {"error": {"kind": kind, "what": error.what, "where": error.where, "remedy": error.remedy}}
        traceback.print_exc()
        what = " ".join(str(error).split())
        # Without memory anything fails in any words: CPython's parser speaks of a missing field, an import of a
        # package that is not installed.
        kind = "MemoryError" if starved else type(error).__name__
        return {"error": {"kind": kind, "what": what, "where": None, "remedy": None}}


def _starved(limit_mib: int | None) -> bool:
    """Whether this process holds nearly all that its limit allows."""
    held = memory_mib().get("VmData")
    return limit_mib is not None and held is not None and held > _NEARLY * limit_mib


def main() -> NoReturn:
    """The child: `python -m edgeprune.runtimes.isolate PARENT_PID REPORT_FD`, the request on stdin."""
    parent, reports = int(sys.argv[1]), int(sys.argv[2])
    faulthandler.enable()  # a crash leaves its Python stack in the output
    os.set_inheritable(reports, False)
    request = json.loads(_read_line(0))
    _die_with_parent(parent)
    lock = threading.Lock()

    def send(message: dict[str, Any]) -> None:
        line = memoryview(json.dumps(message).encode() + b"\n")
        with lock:
            while line:
                line = line[os.write(reports, line) :]

    message = _call(request, send)
    send({**message, "peak_rss_mib": _peak_rss_mib()})
    sys.stdout.flush()
    sys.stderr.flush()
    # A result that was delivered stands: native libraries that crash in their destructors cannot undo it.
    os._exit(0)


if __name__ == "__main__":
    main()
