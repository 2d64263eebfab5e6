"""Predicted speeds against published ones: how far off, how honest the intervals, and the constants of the profiles.

    python benchmarks/predictor.py --out predictor.json          (reads EDGEPRUNE_DATA/published_tps.csv; minutes)
    python benchmarks/predictor.py --out predictor.json --render (the tables again)
    python benchmarks/predictor.py --out predictor.json --render --profiles profiles   (the constants into the profiles)

Every row is predicted by a fit that has not seen it: by page (all rows of a page kept apart, 24 folds), which is what
a user's own device is like, and by row (10 folds). Beside it stands llmfit's way on the same rows, one factor of 0.55
of the nominal bandwidth for all.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from predictor_fit import PREFILL_PRIORS, PRIORS, Fit, Row, fit
from predictor_profiles import write_profiles
from predictor_rows import read

from edgeprune.files import read_json, write_json

Array = NDArray[np.float64]
SCHEMA = 1
COVERAGE = 0.9
LLMFIT = 0.55  # of the nominal bandwidth: github.com/AlexsJones/llmfit


def balanced_folds(groups: Sequence[str], n: int) -> list[int]:
    """A fold of each row, so that rows of one group share one and folds are about as large."""
    load, fold = [0] * n, {}
    for group, count in Counter(groups).most_common():
        fold[group] = int(np.argmin(load))
        load[fold[group]] += count
    return [fold[group] for group in groups]


def held_out(
    rows: Sequence[Row], folds: Sequence[int], make: Callable[[Sequence[Row]], Fit], *, with_page: bool = False
) -> tuple[Array, list[int]]:
    """Of each row log(measured / predicted) by a fit without its fold, and the pages that fit had of its device."""
    errors, pages = np.zeros(len(rows)), [0] * len(rows)
    for fold in sorted(set(folds)):
        seen = [row for row, f in zip(rows, folds, strict=True) if f != fold]
        found = make(seen)
        for i, row in enumerate(rows):
            if folds[i] == fold:
                errors[i] = np.log(row.tps * found.seconds(row, with_page=with_page))
                pages[i] = len({other.page for other in seen if other.device == row.device})
    return errors, pages


def half_widths(errors: Array, pages: Sequence[int]) -> dict[str, float]:
    """Half of the interval of log(tokens/s) that holds `COVERAGE` of the rows, for known and unknown devices."""
    known = np.array(pages) > 0
    return {"known": quantile(np.abs(errors[known])), "unknown": quantile(np.abs(errors[~known]))}


def quantile(values: Array) -> float:
    """The conformal quantile: of n values the one of rank (n + 1) x coverage."""
    if not len(values):
        return float("inf")
    rank = min(len(values) - 1, int(np.ceil((len(values) + 1) * COVERAGE)) - 1)
    return float(np.sort(values)[rank])


def covered(errors: Array, pages: Sequence[int], folds: Sequence[int]) -> float:
    """Share of rows inside an interval whose width comes from the other folds' rows alone."""
    inside = np.zeros(len(errors), bool)
    fold, known = np.array(folds), np.array(pages) > 0
    for f in sorted(set(folds)):
        widths = half_widths(errors[fold != f], [n for n, other in zip(pages, folds, strict=True) if other != f])
        limit = np.where(known, widths["known"], widths["unknown"])
        inside[fold == f] = (np.abs(errors) <= limit)[fold == f]
    return float(inside.mean())


def percent(errors: Array) -> float:
    """Median absolute error, per cent of the measured speed."""
    return round(100 * float(np.median(np.abs(np.expm1(-errors)))), 2)


def summary(rows: Sequence[Row], priors: Any) -> dict[str, Any]:
    """All figures of one sort of rows."""
    pick = {
        "all": np.ones(len(rows), bool),
        "confidence A": np.array([row.confidence == "A" for row in rows]),
        "rpi5": np.array([row.device == "rpi5/cpu" for row in rows]),
    }
    page_folds = balanced_folds([row.page for row in rows], 24)
    row_folds = [i % 10 for i in np.random.default_rng(0).permutation(len(rows))]
    result: dict[str, Any] = {"rows": len(rows), "pages": len({row.page for row in rows})}
    for name, folds in (("by page", page_folds), ("by row", row_folds)):
        errors, pages = held_out(rows, folds, lambda seen: fit(seen, priors), with_page=name == "by row")
        known = np.array(pages) > 0
        subsets = pick | {"device known": known, "device unknown": ~known} if name == "by page" else pick
        result[name] = {
            "median_ape_percent": {which: percent(errors[mask]) for which, mask in subsets.items() if mask.any()},
            "coverage_90": round(covered(errors, pages, folds), 3),
        }
        if name == "by page":
            result["half_widths"] = half_widths(errors, pages)
            result["by device"] = by_device(rows, errors)
    return result


def by_device(rows: Sequence[Row], errors: Array) -> dict[str, Any]:
    """Of each device that has a profile: rows, pages, and the error kept apart by page."""
    table = {}
    for device in sorted({row.device for row in rows if "|" not in row.device}):
        mine = [i for i, row in enumerate(rows) if row.device == device]
        table[device] = {
            "rows": len(mine),
            "pages": len({rows[i].page for i in mine}),
            "median_ape_percent": percent(errors[mine]),
            "median_measured_over_predicted": round(float(np.exp(np.median(errors[mine]))), 3),
        }
    return table


def one_build(rows: Sequence[Row]) -> dict[str, Any]:
    """Raspberry Pi 5, four threads, pages of at least three rows: each row by a fit that has the page's others."""
    mine = [row for row in rows if row.device == "rpi5/cpu" and row.facts["threads"] in ("", "4")]
    counts = Counter(row.page for row in mine)
    chosen = [row for row in mine if counts[row.page] >= 3]
    fits = (fit([other for other in rows if other is not row]) for row in chosen)
    errors = np.array(
        [np.log(row.tps * found.seconds(row, with_page=True)) for row, found in zip(chosen, fits, strict=True)]
    )
    return {"rows": len(chosen), "pages": sum(n >= 3 for n in counts.values()), "median_ape_percent": percent(errors)}


def llmfit(rows: Sequence[Row]) -> dict[str, float]:
    """One factor of the nominal bandwidth for every device."""
    errors = np.array([np.log(row.tps * row.seconds_nominal / LLMFIT) for row in rows])
    best = [row.confidence == "A" for row in rows]
    return {"all": percent(errors), "confidence A": percent(errors[best])}


def page(record: dict[str, Any]) -> str:
    """The tables, in Markdown."""
    decode = record["decode"]
    lines = [
        "| rows kept apart | all | confidence A | Raspberry Pi 5 | inside the 90 % interval |",
        "|---|---|---|---|---|",
    ]
    for name in ("by page", "by row"):
        found = decode[name]["median_ape_percent"]
        lines.append(
            f"| {name} | {found['all']:.1f} % | {found['confidence A']:.1f} % | {found['rpi5']:.1f} % "
            f"| {100 * decode[name]['coverage_90']:.1f} % |"
        )
    one = record["rpi5 one build"]
    lines.append(f"| by row, within a page | | | {one['median_ape_percent']:.1f} % ({one['rows']} rows) | |")
    factor = record["llmfit"]
    lines.append(f"| llmfit's factor | {factor['all']:.1f} % | {factor['confidence A']:.1f} % | | |")
    lines += ["", "| device | rows (pages) | median error by page | measured / predicted |", "|---|---|---|---|"]
    for device, found in decode["by device"].items():
        lines.append(
            f"| {device} | {found['rows']} ({found['pages']}) | {found['median_ape_percent']:.1f} % "
            f"| {found['median_measured_over_predicted']:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("EDGEPRUNE_DATA"))
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--render", action="store_true", help="measure nothing: print the tables of --out")
    parser.add_argument("--profiles", type=Path, help="folder of profiles to write the constants of --out into")
    args = parser.parse_args(arguments)
    if not args.render or args.profiles:
        if not args.data:
            parser.error("give --data, or set EDGEPRUNE_DATA")
        decode, prefill = read(args.data / "published_tps.csv")
    if args.render:
        record = read_json(args.out)
    else:
        record = {
            "schema_version": SCHEMA,
            "benchmark": "predictor",
            "decode": summary(decode, PRIORS),
            "prefill": summary(prefill, PREFILL_PRIORS),
            "rpi5 one build": one_build(decode),
            "llmfit": llmfit(decode),
        }
        write_json(args.out, record)
    if args.profiles:
        for path in write_profiles(args.profiles, decode, prefill, record):
            print(f"wrote {path}", file=sys.stderr)
    print(page(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
