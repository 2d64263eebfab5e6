"""The command `ci`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeprune.cli_look import AsJson
from edgeprune.cli_measure import Gate, Threads
from edgeprune.cores import available_cores
from edgeprune.errors import BadInput, StageFailed
from edgeprune.files import writable
from edgeprune.output import Stages, console, print_json, print_table

REGRESSION = 1  # exit code


def ci(
    suite: Annotated[Path, typer.Option("--suite", help="TOML file: which files are measured, and how.")],
    baseline: Annotated[
        Path | None, typer.Option("--baseline", help="Folder of --save-baseline: what the files are raced against.")
    ] = None,
    baseline_python: Annotated[
        str | None,
        typer.Option(
            "--baseline-python", help="Interpreter that runs the baseline: another environment, an older runtime."
        ),
    ] = None,
    save_baseline: Annotated[
        Path | None,
        typer.Option("--save-baseline", help="If nothing regressed, keep new and faster files as the next baseline."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results: JSON, JUnit XML, Markdown.")] = Path(
        "edgeprune-ci"
    ),
    threads: Threads = None,
    gate: Gate = True,
    as_json: AsJson = False,
) -> None:
    """Fail where a file became slower than the one it replaces: measured turn by turn, judged by pairs."""
    from edgeprune.ci import read_suite, run_suite
    from edgeprune.ci import save_baseline as keep
    from edgeprune.ci_output import write_all
    from edgeprune.runtimes.bench import GATE_S

    read = read_suite(suite)
    if out.exists() and not out.is_dir():
        raise BadInput("exists and is not a folder", where=out, remedy="choose another --out")
    for folder in filter(None, (out, save_baseline)):
        writable(folder)
    with Stages(resumes=False) as stages:
        report = run_suite(
            read,
            suite.parent,
            baseline=baseline,
            baseline_python=baseline_python,
            threads=threads or available_cores(),
            gate_s=GATE_S if gate else None,
            progress=stages,
        )
    write_all(report, out)
    if save_baseline is not None and not report.regressions:
        keep(report, save_baseline)
    if as_json:
        print_json(report.to_json())
    else:
        rows = [[r.name, r.test, f"{r.median[0]:.2f}", f"{100 * r.tolerance:g} %", r.verdict] for r in report.results]
        print_table(f"{suite}, {read.rounds} rounds", ("benchmark", "test", "tokens/s", "tolerance", "verdict"), rows)
        console.print(f"written to {out}", soft_wrap=True)
    if report.regressions:
        raise typer.Exit(REGRESSION)
    if report.failures:
        raise StageFailed("; ".join(report.failures.values()))
