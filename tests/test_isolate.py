"""A call in a process of its own ends in a result, however it ends. The targets are functions of this file."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgeprune.errors import BadInput, StageFailed
from edgeprune.runtimes import nvml
from edgeprune.runtimes.isolate import Outcome, memory_mib, run_isolated

HERE = Path(__file__).stem

linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc and RLIMIT_DATA are Linux's")


# Targets: they run in the child.


def add(a: int, b: int) -> dict[str, Any]:
    print("noise on stdout that is no report")
    return {"sum": a + b, "pid": os.getpid(), "group": os.getpgrp()}


def raise_bad_input() -> None:
    raise BadInput("no such model", where="models/x.gguf", remedy="choose another")


def raise_stage_failed() -> None:
    raise StageFailed("the runtime gave up", where="llama")


def raise_other() -> None:
    raise ZeroDivisionError("one\nover zero")


def die_of(name: str) -> None:
    print("last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.Signals[name])
    time.sleep(60)


def exit_with(code: int, say: str = "") -> None:
    os.write(2, say.encode())
    os._exit(code)


def allocate(mib: int) -> int:
    return len(bytearray(mib << 20))


def hold(mib: int) -> None:
    block = bytearray(os.urandom(1 << 20) * mib)
    time.sleep(0.3)
    del block


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def sleep_with_a_child(pid_file: str) -> None:
    child = subprocess.Popen(["sleep", "60"])
    Path(pid_file).write_text(str(child.pid))
    time.sleep(60)


def count(n: int, progress: Callable[[dict[str, Any]], None] | None = None) -> bool:
    for i in range(n):
        if progress is not None:
            progress({"i": i})
    return progress is not None


def set_of_numbers() -> set[int]:
    return {1, 2}


def print_much() -> int:
    for _ in range(4000):
        print("x" * 99)
    print("the end", flush=True)
    return 1


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def run(function: str, timeout_s: float = 30.0, **options: Any) -> Outcome:
    arguments = options.pop("arguments", {})
    return run_isolated(f"{HERE}:{function}", arguments, timeout_s=timeout_s, allow=[HERE], **options)


def gone(pid: int, within_s: float = 5.0) -> bool:
    """Whether the process has ended (a zombie has)."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


def test_value_comes_back_from_another_process_and_group() -> None:
    outcome = run("add", arguments={"a": 2, "b": 3})
    assert outcome.status == "ok" and outcome.reason is None
    assert outcome.value["sum"] == 5
    assert outcome.value["pid"] != os.getpid()
    assert outcome.value["group"] == outcome.value["pid"]
    assert outcome.wall_s > 0
    assert "noise on stdout" in outcome.output


@pytest.mark.parametrize("function", ["os:getcwd", "edgeprune_evil:main", "edgeprunex.a:b", "subprocess:run"])
def test_only_targets_of_the_namespace_run(function: str) -> None:
    with pytest.raises(BadInput, match="will not run"):
        run_isolated(function, {}, timeout_s=5)


def test_a_module_in_the_working_folder_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit('hijacked')")
    monkeypatch.chdir(tmp_path)
    assert run("add", arguments={"a": 1, "b": 1}).status == "ok"


def test_bad_input_is_raised_again_in_full() -> None:
    with pytest.raises(BadInput) as caught:
        run("raise_bad_input")
    assert (caught.value.what, caught.value.where, caught.value.remedy) == (
        "no such model",
        "models/x.gguf",
        "choose another",
    )


def test_stage_failed_is_raised_again() -> None:
    with pytest.raises(StageFailed, match="llama: the runtime gave up") as caught:
        run("raise_stage_failed")
    assert caught.value.remedy is None


def test_another_exception_is_a_failure_with_its_traceback_kept() -> None:
    outcome = run("raise_other")
    assert outcome.status == "failed"
    assert outcome.reason == "ZeroDivisionError: one over zero"
    assert "raise_other" in outcome.output


def test_a_value_that_json_cannot_carry_is_a_failure() -> None:
    outcome = run("set_of_numbers")
    assert outcome.status == "failed" and outcome.reason is not None
    assert "set is not JSON serializable" in outcome.reason


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGTERM", "SIGILL"])
def test_death_of_a_signal_is_a_crash_that_names_it(name: str) -> None:
    outcome = run("die_of", arguments={"name": name})
    assert outcome.status == "crash" and outcome.value is None
    told = " (a library compiled for other instructions: see edgeprune doctor)" if name == "SIGILL" else ""
    assert outcome.reason == f"died of {name}{told}"
    assert "last words" in outcome.output


def test_the_kernels_way_of_killing_is_out_of_memory() -> None:
    assert run("die_of", arguments={"name": "SIGKILL"}).status == "oom"
    assert run("exit_with", arguments={"code": 137}).status == "oom"


def test_an_abort_after_a_failed_allocation_is_out_of_memory() -> None:
    outcome = run("exit_with", arguments={"code": 3, "say": "terminate called: std::bad_alloc"})
    assert outcome.status == "oom"


def test_silent_end_is_a_crash() -> None:
    outcome = run("exit_with", arguments={"code": 0})
    assert outcome.status == "crash" and outcome.reason == "ended with exit code 0 and no result"


@linux
def test_memory_limit_ends_in_oom_and_room_enough_does_not() -> None:
    outcome = run("allocate", arguments={"mib": 512}, memory_mib=256)
    assert outcome.status == "oom" and outcome.reason is not None and "out of memory" in outcome.reason
    assert run("allocate", arguments={"mib": 64}, memory_mib=256).value == 64 << 20


@linux
def test_peak_holds_what_was_touched_though_it_was_freed() -> None:
    outcome = run("hold", arguments={"mib": 64})
    assert outcome.peak_rss_mib is not None and outcome.peak_total_mib is not None and outcome.peak_mib is not None
    assert outcome.peak_rss_mib > 64
    assert outcome.peak_total_mib > 64  # held for longer than two looks are apart
    assert outcome.peak_mib == max(outcome.peak_rss_mib, outcome.peak_total_mib)
    assert outcome.peak_mib < 64 * 4  # the child's own, not the test runner's


@linux
def test_memory_of_no_process_is_empty() -> None:
    assert memory_mib(2**22 + 1) == {}
    assert memory_mib()["VmHWM"] > 1


def test_deadline_kills_the_whole_group(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    outcome = run("sleep_with_a_child", timeout_s=3, arguments={"pid_file": str(pid_file)})
    assert outcome.status == "timeout" and outcome.reason == "no result within 3 s"
    assert gone(int(pid_file.read_text()))


def test_progress_arrives_in_order_where_someone_listens() -> None:
    seen: list[dict[str, Any]] = []
    assert run("count", arguments={"n": 500}, progress=seen.append).value is True
    assert seen == [{"i": i} for i in range(500)]
    assert run("count", arguments={"n": 3}).value is False
    assert run("add", arguments={"a": 1, "b": 1}, progress=seen.append).status == "ok"  # has no such parameter


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_parent_leaves_no_child(error: type[BaseException]) -> None:
    before = set(_children())

    def stop(_: dict[str, Any]) -> None:
        raise error

    with pytest.raises(error):
        run("count", arguments={"n": 1}, progress=stop)
    assert set(_children()) <= before


def _children() -> list[int]:
    """Isolated children of this process; empty where there is no /proc."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may end while we look
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"runtimes.isolate" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = textwrap.dedent(f"""
        from pathlib import Path
        from edgeprune.runtimes.isolate import run_isolated
        write = lambda report: Path({str(pid_file)!r}).write_text(str(report["pid"]))
        run_isolated("{HERE}:report_and_sleep", {{}}, timeout_s=60, progress=write, allow=["{HERE}"])
    """)
    parent = subprocess.Popen([sys.executable, "-c", script])
    try:
        end = time.monotonic() + 20
        while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < end:
            time.sleep(0.02)
        child = int(pid_file.read_text())
        assert not gone(child, within_s=0.1)
    finally:
        parent.kill()
        parent.wait()
    assert gone(child)


def report_and_sleep(progress: Callable[[dict[str, Any]], None]) -> None:
    progress({"pid": os.getpid()})
    time.sleep(60)


def test_output_beyond_a_pipes_room_neither_blocks_nor_piles_up() -> None:
    outcome = run("print_much")
    assert outcome.status == "ok"
    assert outcome.output.endswith("the end\n")
    assert len(outcome.output) < 10_000


def test_a_gpu_that_tells_nothing_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a virtual one does not."""

    class NVMLError(Exception):
        pass

    def refuse(_handle: object) -> None:
        raise NVMLError

    library = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetComputeRunningProcesses=refuse,
    )
    monkeypatch.setattr(nvml, "_nvml", lambda: library)
    assert nvml.process_mib(1) is None
    library.nvmlDeviceGetComputeRunningProcesses = lambda _: [SimpleNamespace(pid=1, usedGpuMemory=3 << 20)]
    assert nvml.process_mib(1) == 3.0 and nvml.process_mib(2) is None
