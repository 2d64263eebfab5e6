"""How often does `edgeprune ci` cry wolf, and how often does it miss one? Many runs of the real thing.

    python benchmarks/ci_power.py --out ci_power.json [--runs 100] [--model FILE.gguf]

Each run races three arms by the suite's own rule: the model, the same again, and the same with a delay of 5 % in every
repetition. Judged against the first, the second must not be a regression (a false alarm), the third must be one. Runs
that are there already are kept; the command goes on with the rest. Intervals of the shares are Clopper and Pearson's.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from edgeprune.ci import LONGER, TOLERANCE, Result, undecided
from edgeprune.errors import EdgepruneError, StageFailed
from edgeprune.files import read_json, write_json
from edgeprune.models import resolve
from edgeprune.record import environment
from edgeprune.runtimes.bench import cpu_info
from edgeprune.runtimes.racing import ROUNDS, Arm, judge, race

SCHEMA = 1
DELAY = 0.05
MAX_FALSE, MIN_FOUND = 0.02, 0.95  # the aims


def one_run(model: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Race the three arms once; what the rule says of the second and the third."""
    threads = settings["threads"]
    arms = [
        Arm(model, threads, label="A"),
        Arm(model, threads, label="A again"),
        Arm(model, threads, label="delayed", delay=DELAY),
    ]
    began = time.monotonic()
    speeds = race(
        arms,
        rounds=settings["rounds"],
        undecided=partial(undecided, tolerance=TOLERANCE),
        most=LONGER * settings["rounds"],
        n_prompt=0,
        n_gen=settings["n_gen"],
        gate_s=settings["gate_s"] or None,
    )
    test = f"tg{settings['n_gen']}"
    found: dict[str, Any] = {"seconds": time.monotonic() - began}
    for name, values in (("same", speeds[1][test]), ("delayed", speeds[2][test])):
        result = Result(name, test, tuple(values), judge(test, speeds[0][test], values), TOLERANCE)
        assert result.comparison is not None
        found[name] = {"state": result.state, **result.comparison.to_json()}
    return found


def share(hits: int, runs: int) -> str:
    """ "3 of 100, 3.0 % [0.6, 8.5]"."""
    interval = binomtest(hits, runs).proportion_ci()
    return f"{hits} of {runs}, {100 * hits / runs:.1f} % [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def table(record: dict[str, Any]) -> str:
    """The figures as the README shows them."""
    runs = record["runs"]
    false = sum(run["same"]["state"] == "regression" for run in runs)
    found = sum(run["delayed"]["state"] == "regression" for run in runs)
    widths = sorted(run["same"]["high"] - run["same"]["low"] for run in runs)
    rows = [
        ("A against A called a regression", share(false, len(runs)), f"under {100 * MAX_FALSE:g} %"),
        (
            f"a delay of {100 * DELAY:g} % called a regression",
            share(found, len(runs)),
            f"at least {100 * MIN_FOUND:g} %",
        ),
        ("width of the ratio's interval, median", f"{100 * widths[len(widths) // 2]:.1f} %", ""),
        ("rounds of a run, mean", f"{sum(len(run['same']['a_ts']) for run in runs) / len(runs):.1f}", ""),
        ("runs that the machine was too noisy for", str(record["refused"]), ""),
    ]
    lines = ["| | measured [95 %] | aim |", "| --- | --- | --- |"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def main() -> None:
    """Run what is missing, write the record, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--n-gen", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gate-s", type=float, default=60.0, help="0: the machine is not watched")
    arguments = parser.parse_args()
    settings = {name: getattr(arguments, name) for name in ("rounds", "n_gen", "threads", "gate_s")}
    model = resolve(arguments.model)
    record: dict[str, Any] = {"schema_version": SCHEMA, "benchmark": "ci_power", "model": arguments.model}
    record |= {"settings": settings, "tolerance": TOLERANCE, "delay": DELAY, "refused": 0, "runs": []}
    if arguments.out.exists():
        kept = read_json(arguments.out)
        if all(kept.get(key) == record[key] for key in ("schema_version", "model", "settings", "tolerance", "delay")):
            record = kept
    record |= {"cpu_info": cpu_info(), "environment": environment()}
    while len(record["runs"]) < arguments.runs:
        try:
            record["runs"].append(one_run(model, settings))
        except StageFailed as error:
            if not error.what.startswith("noisy"):
                raise
            record["refused"] += 1
        write_json(arguments.out, record)
        print(f"{len(record['runs'])} of {arguments.runs} runs, {record['refused']} refused", file=sys.stderr)
    print(table(record))


if __name__ == "__main__":
    try:
        main()
    except EdgepruneError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
