"""Does the harness measure what llama-bench measures? Both on one file, turn by turn, as a table and as JSON.

    python benchmarks/harness.py MODEL.gguf --llama-bench PATH [--installed-libraries] [--rounds 12]

llama-bench is not in llama-cpp-python's wheel: build it from the source in its sdist (`vendor/llama.cpp`). With
`--installed-libraries` it is run on the wheel's own libllama and libggml, so that both sides run the same machine code.

A round measures each test once with either tool, the first of the two in turn, and gives one ratio. The machine's slow
changes hit both sides of a ratio alike; the interval over rounds tells how far they did not.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.errors import BadInput, EdgepruneError, StageFailed
from edgeprune.files import write_json
from edgeprune.runtimes.bench import bench, cpu_info
from edgeprune.runtimes.racing import judge
from edgeprune.runtimes.records import to_dict

TOLERANCE = 0.03  # of the ratio, either way


@dataclass(frozen=True)
class Settings:
    """What both tools are told."""

    model: Path
    llama_bench: Path
    threads: int
    repetitions: int
    timeout_s: float
    libraries: Path | None


def ours(settings: Settings, n_prompt: int, n_gen: int) -> dict[str, Any]:
    """One record of `edgeprune bench`; one of `n_prompt` and `n_gen` is 0."""
    result = bench(
        settings.model,
        n_prompt=n_prompt,
        n_gen=n_gen,
        repetitions=settings.repetitions,
        threads=settings.threads,
        runtime="llamacpp",
        least_s=0.0,  # as many repetitions as llama-bench makes
        timeout_s=settings.timeout_s,
    )
    if result.status != "ok":
        raise StageFailed(f"{result.status}: {result.reason}", where=settings.model)
    return to_dict(result.records[0])


def theirs(settings: Settings, n_prompt: int, n_gen: int) -> dict[str, Any]:
    """The same test's record of llama-bench.

    Raises:
        StageFailed: it failed or did not write what it should.
    """
    tests = ["-p", str(n_prompt), "-n", str(n_gen), "-r", str(settings.repetitions), "-t", str(settings.threads)]
    # No layer on a GPU: the runtime measured on the other side is the processor's.
    command = [str(settings.llama_bench), "-m", str(settings.model), *tests, "-ngl", "0", "-o", "json"]
    environment = dict(os.environ)
    if settings.libraries is not None:
        environment["LD_LIBRARY_PATH"] = str(settings.libraries)
    run = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=settings.timeout_s, check=False
    )
    try:
        (record,) = json.loads(run.stdout)
    except ValueError as error:
        raise StageFailed(
            f"llama-bench wrote no record (exit code {run.returncode}): {run.stderr[-300:].strip()}",
            where=settings.llama_bench,
        ) from error
    return dict(record)


def compare(settings: Settings, tests: dict[str, tuple[int, int]], rounds: int) -> list[dict[str, Any]]:
    """`rounds` x tests x both tools: [{"round", "test", "first", "ours": {}, "theirs": {}, "ratio", "load"}]."""
    tools: list[tuple[str, Callable[[Settings, int, int], dict[str, Any]]]] = [("ours", ours), ("theirs", theirs)]
    rows = []
    for number in range(rounds):
        for name, lengths in tests.items():
            order = tools if number % 2 == 0 else tools[::-1]
            records = {tool: measure(settings, *lengths) for tool, measure in order}
            medians = {tool: float(np.median(record["samples_ts"])) for tool, record in records.items()}
            row = {"round": number, "test": name, "first": order[0][0], **records}
            row |= {"ratio": medians["ours"] / medians["theirs"], "load": os.getloadavg()[0]}
            rows.append(row)
            print(
                f"round {number + 1}/{rounds} {name}: edgeprune {medians['ours']:.1f}, llama-bench "
                f"{medians['theirs']:.1f} t/s, ratio {row['ratio']:.3f}",
                file=sys.stderr,
                flush=True,
            )
    return rows


def summarise(rows: Sequence[dict[str, Any]], test: str) -> dict[str, Any]:
    """The paired ratio of a test with its interval over rounds, and the ratio of the best samples.

    Whatever disturbs a sample makes it slower, so the best ones compare the tools where the machine was loaded.
    """
    mine = [row for row in rows if row["test"] == test]
    samples = {tool: [ts for row in mine for ts in row[tool]["samples_ts"]] for tool in ("ours", "theirs")}
    medians = {tool: [float(np.median(row[tool]["samples_ts"])) for row in mine] for tool in samples}
    found = judge(test, medians["theirs"], medians["ours"])
    return {
        "test": test,
        "ours_ts": found.medians[1],
        "theirs_ts": found.medians[0],
        "ratio": found.ratio,
        "ratio_low": found.low,
        "ratio_high": found.high,
        "best_ratio": max(samples["ours"]) / max(samples["theirs"]),
        "rounds": len(mine),
    }


def table(summaries: Sequence[dict[str, Any]]) -> str:
    """The summaries as Markdown."""
    lines = [
        "| test | edgeprune t/s | llama-bench t/s | ratio [95 %] | ratio of the best | rounds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {s['test']} | {s['ours_ts']:.1f} | {s['theirs_ts']:.1f} | "
        f"{s['ratio']:.3f} [{s['ratio_low']:.3f}, {s['ratio_high']:.3f}] | {s['best_ratio']:.3f} | {s['rounds']} |"
        for s in summaries
    ]
    return "\n".join(lines)


def installed_libraries() -> Path:
    """The folder of libllama in the installed llama-cpp-python.

    Raises:
        BadInput: it is not installed.
    """
    found = importlib.util.find_spec("llama_cpp")  # found, not imported: this process loads no runtime
    if found is None or found.origin is None:
        raise BadInput("llama-cpp-python is not installed", remedy='pip install "edgeprune[llama]"')
    return Path(found.origin).parent / "lib"


def main() -> int:
    """Exit code 0 if every ratio is within the tolerance, 1 if not, 2 for wrong use."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--llama-bench", type=Path, required=True, help="the program")
    parser.add_argument("--installed-libraries", action="store_true", help="run it on llama-cpp-python's libraries")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--repetitions", type=int, default=5, help="samples of each test in a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--n-prompt", type=int, default=512)
    parser.add_argument("--n-gen", type=int, default=128)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one run of either tool")
    parser.add_argument("--out", type=Path, default=Path("harness.json"))
    options = parser.parse_args()
    tests = {f"pp{options.n_prompt}": (options.n_prompt, 0), f"tg{options.n_gen}": (0, options.n_gen)}
    try:
        for file in (options.model, options.llama_bench):
            if not file.is_file():
                raise BadInput("no such file", where=file)
        libraries = installed_libraries() if options.installed_libraries else None
        settings = Settings(
            options.model, options.llama_bench, options.threads, options.repetitions, options.timeout, libraries
        )
        rows = compare(settings, tests, options.rounds)
    except EdgepruneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    summaries = [summarise(rows, test) for test in tests]
    builds = {tool: rows[0][tool]["build_commit"] for tool in ("ours", "theirs")}
    print(table(summaries))
    print(f"\n{cpu_info()}, {options.threads} threads; builds: {builds['ours']} and {builds['theirs']}")
    write_json(
        options.out,
        {
            "model": options.model.name,
            "cpu_info": cpu_info(),
            "threads": options.threads,
            "same_libraries": options.installed_libraries,
            "builds": builds,
            "summary": summaries,
            "rounds": rows,
        },
    )
    return 0 if all(abs(summary["ratio"] - 1) <= TOLERANCE for summary in summaries) else 1


if __name__ == "__main__":
    sys.exit(main())
