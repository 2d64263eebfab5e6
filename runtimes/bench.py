"""Measures speed, time to first token, load time and memory of a model file, each test in a process of its own.

The procedure is llama-bench's, so that the figures compare: random tokens, no sampling; pp is one prompt into an empty
cache, tg is `n_gen` single steps from an empty cache; a warm-up, then repetitions with the cache cleared between them.
Unlike llama-bench's, they go on for a least duration, and the machine is watched meanwhile (`conditions`, `repeat`).
A runtime may offer `prefill(tokens)` and `step(token)`, which evaluate and wait for the end without copying logits out;
without them `forward(last_only=True)` is timed. If its class takes `all_logits`, it is opened without room for them, as
an application would; if it has a table `SETTINGS`, it takes `settings`. Its `description()` and its module's
`build_info()`, where there are such, fill fields of the record.

On memory. The peak is the measuring process's: weights, cache, compute buffers, and some 30 MiB of interpreter and
numpy. All runtimes here map weights where they can, and a mapped page counts (VmHWM) once it was touched. So a peak may
honestly lie below the file's size: of an embedding that is not the head too, only the rows of the tokens come in. But
such an embedding is no larger than the head, which is read in full, and the rest is read in full as well: below half of
the file's size the weights were not in memory when speed was measured, and the figures are refused.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import inspect
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import BadInput, StageFailed, unknown
from edgeprune.runtimes import RUNTIMES, runtime_class, runtime_for, settings_option
from edgeprune.runtimes.base import Runtime
from edgeprune.runtimes.conditions import Gate
from edgeprune.runtimes.isolate import Execute, Outcome, Status, run_isolated
from edgeprune.runtimes.onnx_file import model_file
from edgeprune.runtimes.records import Record, statistics
from edgeprune.runtimes.repeat import repeat, sustain
from edgeprune.runtimes.settings import Value

Test = Literal["pp", "tg"]
Progress = Callable[[dict[str, Any]], None]

LEAST_RESIDENT = 0.5  # of the weights' bytes: see the module's docstring
LEAST_S = 2.0  # of measured time, of each test
GATE_S = 60.0  # for waiting until the machine is fit to be measured
WARM_UP_STEPS = 4  # of decoding; llama-bench makes one, too few for runtimes that plan their memory at first use


@dataclass(frozen=True)
class BenchResult:
    """What was measured, and if a test did not end well, how.

    Attributes:
        records: a record a test that ended well, pp before tg.
        status: "ok", or how the first failing test ended.
        reason: one line on that, None if ok.
        peak_mib: the largest memory of any of the measuring processes, also of one that failed; None if unknown.
    """

    records: tuple[Record, ...]
    status: Status
    reason: str | None
    peak_mib: float | None

    @property
    def pp(self) -> Record | None:
        """The record of the prompt."""
        return next((record for record in self.records if record.n_prompt), None)

    @property
    def tg(self) -> Record | None:
        """The record of the generation."""
        return next((record for record in self.records if record.n_gen), None)


def bench(
    path: Path,
    *,
    n_prompt: int = 512,
    n_gen: int = 128,
    repetitions: int = 5,
    threads: int,
    runtime: str | None = None,
    n_ctx: int | None = None,
    settings: Mapping[str, Value] | None = None,
    least_s: float = LEAST_S,
    gate_s: float | None = GATE_S,
    sustained_s: float | None = None,
    timeout_s: float = 600.0,
    memory_mib: int | None = None,
    python: str | None = None,
    delay: float = 0.0,
    anew: bool = False,
    execute: Execute = run_isolated,
    progress: Progress | None = None,
) -> BenchResult:
    """Measure the model at `path`.

    Args:
        path: what `open_runtime` loads.
        n_prompt: tokens of the prompt; 0 leaves that test out.
        n_gen: tokens to generate; 0 leaves that test out.
        repetitions: samples of each test, at least.
        threads: threads of the runtime.
        runtime: its name; by default what the kind of file asks for.
        n_ctx: tokens that the cache has room for (memory depends on it); by default what each test needs.
        settings: what the runtime is told beside (its table `SETTINGS`).
        least_s: seconds of measured time of each test, at least.
        gate_s: seconds that may be lost, in each test, to waiting for a quiet machine and to repetitions that were
            disturbed; None: the machine is not watched, and the record says so.
        sustained_s: seconds for which the last test then goes on without a pause.
        timeout_s: seconds for each test, loading included, waiting and the sustained run left out.
        memory_mib: limit of each process's own memory (see `run_isolated`).
        python: the interpreter that measures; default: this one. Another environment's may hold another build.
        delay: share by which each repetition is made to take longer, to try what judges the figures.
        anew: the file is read from disk first. Where its pages lie in memory changes the speed by several per cent, so
            what is compared must have come there in the same way.
        execute: runs the measuring process: here, or on a board.
        progress: called with {"stage", "done", "total", "ts"} after each repetition; `ts` is its tokens/s.

    Raises:
        BadInput: a number out of range, an unknown runtime, or a file that cannot be loaded.
        StageFailed: the measurement is not credible, or the machine was not fit to be measured.
    """
    name = runtime or runtime_for(path)
    if name not in RUNTIMES:
        raise unknown("runtime", name, RUNTIMES)
    if n_prompt < 0 or n_gen < 0 or n_prompt + n_gen == 0:
        raise BadInput(f"nothing to measure: n_prompt {n_prompt}, n_gen {n_gen}", remedy="give at least one above 0")
    if repetitions < 1 or threads < 1:
        raise BadInput(f"repetitions ({repetitions}) and threads ({threads}) must be at least 1")
    if least_s < 0 or (sustained_s is not None and sustained_s <= 0) or (gate_s is not None and gate_s <= 0):
        raise BadInput("seconds must be above 0", where="bench")
    # One more than the prompt: the first token's own step belongs to its time.
    need = {"pp": n_prompt + 1 if n_prompt else 0, "tg": n_gen}
    if n_ctx is not None and n_ctx < max(need.values()):
        raise BadInput(f"n_ctx {n_ctx} is too small", remedy=f"at least {max(need.values())} is needed")

    records: list[Record] = []
    peaks: list[float] = []
    for test, length in (("pp", n_prompt), ("tg", n_gen)):
        if not length:
            continue
        arguments: dict[str, Any] = {
            "path": path,
            "runtime": name,
            "test": test,
            "length": length,
            "repetitions": repetitions,
            "threads": threads,
            "n_ctx": n_ctx or need[test],
            "settings": dict(settings or {}),
            "least_s": least_s,
            "gate_s": gate_s,
            "delay": delay,
            "anew": anew,
            "sustained_s": sustained_s if test == ("tg" if n_gen else "pp") else None,
        }
        test_time = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        outcome = execute(
            "edgeprune.runtimes.bench:measure",
            arguments,
            timeout_s=timeout_s + (gate_s or 0) + (arguments["sustained_s"] or 0),
            memory_mib=memory_mib,
            progress=progress,
            python=python,
        )
        if outcome.peak_mib is not None:
            peaks.append(outcome.peak_mib)
        if outcome.status != "ok":
            return BenchResult(tuple(records), outcome.status, f"{test}: {outcome.reason}", max(peaks, default=None))
        records.append(_record(path, name, arguments, outcome, test_time))
    return BenchResult(tuple(records), "ok", None, max(peaks, default=None))


def measure(
    *,
    path: str,
    runtime: str,
    test: Test,
    length: int,
    repetitions: int,
    threads: int,
    n_ctx: int,
    settings: dict[str, Value] | None = None,
    least_s: float = 0.0,
    gate_s: float | None = None,
    sustained_s: float | None = None,
    delay: float = 0.0,
    anew: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """One test, in this process; `bench` calls it in one of its own.

    Returns:
        {"samples_ns", "ttft_ns" (pp only), "load_ns", "n_dropped", "machine", "sustained", "cpu_info", "description"}.

    Raises:
        BadInput: as the runtime's constructor, or settings for a runtime that has none.
        StageFailed: the machine was not fit to be measured within `gate_s`.
    """
    kind = runtime_class(runtime)  # before the clock starts: Python's imports are not the model's
    module = importlib.import_module(RUNTIMES[runtime][0])
    options = settings_option(runtime, settings)
    if "all_logits" in inspect.signature(kind).parameters:
        options["all_logits"] = False
    if anew:
        forget_pages(Path(path))
    began = time.perf_counter_ns()
    model: Runtime = kind(Path(path), n_ctx=n_ctx, threads=threads, **options)
    load_ns = time.perf_counter_ns() - began
    random = np.random.default_rng(seed)
    once = _prompt_test if test == "pp" else _generation_test

    def sample() -> int:
        spent = once(model, _tokens(random, model, length))
        if delay:
            began = time.perf_counter_ns()
            time.sleep(delay * spent / 1e9)
            spent += time.perf_counter_ns() - began
        return spent

    def told(done: int, ns: int) -> None:
        if progress is not None:
            progress(
                {"stage": f"{test}{length}", "done": done, "total": max(done, repetitions), "ts": 1e9 * length / ns}
            )

    try:
        once(model, _tokens(random, model, length if test == "pp" else min(length, WARM_UP_STEPS)))
        gate = Gate(gate_s) if gate_s else None
        with _no_garbage_collection():
            kept = repeat(sample, repetitions=repetitions, least_s=least_s, gate=gate, told=told)
            first = _first_step(model) if test == "pp" else 0
        lasting = sustain(sample, sustained_s, length) if sustained_s else None
        facts: list[dict[str, Any]] = [getattr(module, "build_info", dict)(), getattr(model, "description", dict)()]
        return {
            "samples_ns": kept.ns,
            "ttft_ns": [ns + first for ns in kept.ns] if test == "pp" else None,
            "load_ns": load_ns,
            "n_dropped": kept.dropped,
            "machine": kept.machine,
            "sustained": lasting,
            "cpu_info": cpu_info(),
            "description": {key: value for part in facts for key, value in part.items()},
        }
    finally:
        model.close()


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _tokens(random: np.random.Generator, model: Runtime, count: int) -> NDArray[np.int64]:
    return random.integers(0, model.n_vocab, size=count, dtype=np.int64)


def _prompt_test(model: Runtime, tokens: NDArray[np.int64]) -> int:
    """Nanoseconds of the prompt."""
    prefill = _prefill(model)
    model.rewind(0)
    began = time.perf_counter_ns()
    prefill(tokens)
    return time.perf_counter_ns() - began


def _first_step(model: Runtime) -> int:
    """Nanoseconds of the step after a prompt.

    Taken once, at the end: a step between two prompts makes llama.cpp lay out its graph anew for either, which
    llama-bench does not measure, and slows the prompts by 1 %.
    """
    step = _step(model)
    began = time.perf_counter_ns()
    step(0)
    return time.perf_counter_ns() - began


def _generation_test(model: Runtime, tokens: NDArray[np.int64]) -> int:
    """Nanoseconds of all steps."""
    step = _step(model)
    ids = tokens.tolist()
    model.rewind(0)
    began = time.perf_counter_ns()
    for token in ids:
        step(token)
    return time.perf_counter_ns() - began


def _prefill(model: Runtime) -> Callable[[NDArray[np.int64]], object]:
    fast: Callable[[NDArray[np.int64]], object] | None = getattr(model, "prefill", None)
    return fast or (lambda tokens: model.forward(tokens, last_only=True))


def _step(model: Runtime) -> Callable[[int], object]:
    fast: Callable[[int], object] | None = getattr(model, "step", None)
    return fast or (lambda token: model.forward([token], last_only=True))


def _record(path: Path, runtime: str, arguments: dict[str, Any], outcome: Outcome, test_time: str) -> Record:
    value = outcome.value
    says = value["description"]
    size = weight_bytes(path)
    if not says.get("gpu_info"):  # else weights lie in the GPU's memory
        check_peak(outcome.peak_mib, size, path)
    prompt, length = arguments["test"] == "pp", arguments["length"]
    return Record(
        build_commit=says.get("build_commit"),
        build_number=says.get("build_number"),
        cpu_info=value["cpu_info"],
        gpu_info=says.get("gpu_info", ""),
        backends=says.get("backends", "CPU"),
        model_filename=str(path),
        model_type=says.get("model_type"),
        model_size=says.get("model_size", size),
        model_n_params=says.get("model_n_params"),
        n_batch=says.get("n_batch"),
        n_ubatch=says.get("n_ubatch"),
        n_threads=arguments["threads"],
        n_prompt=length if prompt else 0,
        n_gen=0 if prompt else length,
        n_depth=0,
        test_time=test_time,
        **statistics(value["samples_ns"], length),
        ttft_ms=float(np.median(value["ttft_ns"])) / 1e6 if prompt else None,
        load_ms=value["load_ns"] / 1e6,
        peak_mib=outcome.peak_mib,
        runtime=runtime,
        settings=arguments["settings"],
        gated=arguments["gate_s"] is not None,
        n_dropped=value["n_dropped"],
        machine=value["machine"],
        sustained=value["sustained"],
        peak_gpu_mib=outcome.peak_gpu_mib,
    )


def forget_pages(path: Path) -> None:
    """Let the kernel drop what it holds of a file, or of a folder's files; nothing where it knows no such advice."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in path.iterdir() if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())  # pages not yet written stay
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def check_peak(peak_mib: float | None, size: int, path: Path) -> None:
    """Refuse a peak (MiB) that weights of `size` bytes cannot have had; None, an unknown peak, passes.

    Raises:
        StageFailed: the peak is below `LEAST_RESIDENT` of the weights.
    """
    if peak_mib is not None and peak_mib * 2**20 < LEAST_RESIDENT * size:
        raise StageFailed(
            f"a peak of {peak_mib:.0f} MiB is not credible for weights of {size / 2**20:.0f} MiB: they did not stay in "
            "memory",
            where=path,
            remedy="free memory and measure again",
        )


def weight_bytes(path: Path) -> int:
    """Bytes of the files that hold the weights of what `open_runtime` loads."""
    if path.is_file() and path.suffix != ".onnx":
        return path.stat().st_size
    graph = model_file(path)
    files = graph.parent.glob(f"{graph.name}*") if graph.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def cpu_info() -> str:
    """Name of the processor, or of the board where its cores carry no name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        from edgeprune.host import gather  # host builds on this package

        return gather().brand or platform.machine()
    named: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        named.setdefault(key.strip().lower(), value.strip())
    return named.get("model name") or named.get("model") or platform.machine()
