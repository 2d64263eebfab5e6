"""`report.html`: a run's record as one page that stands alone: no network, light and dark, on a phone too.

Everything on it comes from fit.json and the plan beside the bundle, so it can be made again at any time, and several
runs can stand side by side. The plot is drawn here rather than by a library: plotly's would be 4.6 MB of script in each
report, for twenty points.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from edgeprune.errors import BadInput, missing_extra
from edgeprune.files import read_json, write_text
from edgeprune.record import SCHEMA_VERSION
from edgeprune.report_chart import Point, bar, pareto

PAGE = "report.html"
MIB = 1 << 20
PROMPT = 512  # tokens before the first one of an answer

Json = Mapping[str, Any]


def write_page(runs: Sequence[Path], out: Path) -> None:
    """Write the page of one run, or of several side by side.

    Raises:
        BadInput: no run, or one of another version.
    """
    views = [view(folder) for folder in runs]
    write_text(out, _template().render(runs=views, compare=len(views) > 1))


@cache
def _template() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise missing_extra("jinja2", "prune") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("edgeprune", "pages"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    return environment.get_template("report.html.jinja")


def number(value: float | None, digits: int = 3) -> str:
    """`value` with so many digits that say something, thousands parted; a dash for none."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def view(folder: Path) -> dict[str, Any]:
    """What the page shows of a run.

    Raises:
        BadInput: no finished run, or one of another version.
    """
    record = read_json(folder / "fit.json")
    if record.get("schema_version") != SCHEMA_VERSION:
        raise BadInput("a record of another version", where=folder / "fit.json", remedy="run `edgeprune fit` again")
    candidates = record["candidates"]
    chosen = chosen_of(record)
    dense = next((each for each in candidates if each["plan"]["reached_ratio"] == 0), chosen)
    measured = [each for each in candidates if each.get("quality")]
    by_kl = all("kl_nats" in each["quality"] for each in measured)
    measured.sort(key=lambda each: _distance(each, by_kl=by_kl)["mean"])
    budget = record["budget"]
    points = [_point(each, by_kl=by_kl, chosen=each is chosen) for each in measured]
    plan = folder / "best" / "prune_plan.json"
    return {
        "folder": folder.name,
        "record": record,
        "chosen": chosen,
        "title": f"{record['model']['name']} on {record['device']['name']}",
        "bars": bars(chosen, record),
        "by_kl": by_kl,
        "plot": pareto(points, budget["min_tokens_per_s"]),
        "rows": [_row(each, record, by_kl=by_kl, chosen=each is chosen) for each in measured],
        "failed": [each for each in candidates if each.get("status") not in (None, "ok")],
        "layers": _layers(read_json(plan)["layers"], dense["plan"]) if plan.is_file() else [],
        "dense_plan": dense["plan"],
        "removed": 1 - chosen["plan"]["parameters"] / record["model"]["parameters"],
        "samples": record.get("samples", []),
        "files": chosen["files"],
    }


def chosen_of(record: Json) -> Json:
    """The candidate that a record says was chosen."""
    plan = record.get("chosen_plan")  # records of before 2026-11-27 have none
    named = [each for each in record["candidates"] if each["name"] == record["chosen"]]
    found: Json = next(each for each in named if plan in (None, each["plan"]["sha256"]))
    return found


def _distance(candidate: Json, *, by_kl: bool) -> Json:
    found: Json = candidate["quality"]["kl_nats"] if by_kl else candidate["loss_over_dense_nats"]
    return found


def _speed(candidate: Json) -> tuple[tuple[float, float, float], str]:
    """Decode in tokens/s, measured on the device where it was there; and which of the two it is."""
    if tg := candidate.get("speed", {}).get("tg128"):
        return (tg["median_ts"], tg["low_ts"], tg["high_ts"]), "measured"
    told = candidate["predicted"]["decode_tps"]
    return (told["value"], told["low"], told["high"]), "predicted"


def label(candidate: Json) -> str:
    """A candidate in words."""
    plan = candidate["plan"]
    share = "dense" if not plan["reached_ratio"] else f"{100 * plan['reached_ratio']:.1f} % pruned"
    tokens = f" ({plan['vocabulary']:,} tokens left)" if "-vocabulary" in candidate["name"] else ""
    scope = " (MLP)" if plan["scope"] == "mlp" and plan["reached_ratio"] else ""
    recovered = " and recovered" if plan["recovery_s"] else ""
    return f"{share}{scope}{tokens}{recovered}, {candidate['quantisation']}"


def _point(candidate: Json, *, by_kl: bool, chosen: bool) -> Point:
    speed, kind = _speed(candidate)
    far = _distance(candidate, by_kl=by_kl)
    return Point(
        label(candidate),
        candidate["runtime"],
        speed,
        kind,
        (far["mean"], far["low"], far["high"]),
        candidate["fits"],
        chosen,
    )


def _memory(candidate: Json, record: Json) -> tuple[tuple[float, float, float], str]:
    """MiB as (value, low, high), and whether "measured" or "predicted": what the budget was judged by."""
    on_gpu = record["device"]["memory"].get("dedicated") and candidate["predicted"]["backend"] != "cpu"
    which = "peak_gpu_mib" if on_gpu else "peak_mib"
    if peaks := [test[which] for test in candidate.get("speed", {}).values() if test.get(which)]:
        return (max(peaks),) * 3, "measured"
    told = candidate["predicted"]["memory_mib"]
    return (told["value"], told["low"], told["high"]), "predicted"


def bars(chosen: Json, record: Json) -> list[dict[str, Any]]:
    """Speed, memory, file and time to first token of a candidate of the record, each beside its limit."""
    budget = record["budget"]
    speed, kind = _speed(chosen)
    found = [bar("decode", "tokens/s", *speed, kind, budget["min_tokens_per_s"], at_least=True)]
    memory, how = _memory(chosen, record)
    found.append(bar("memory", "MiB", *memory, how, budget["max_memory_mib"], at_least=False))
    size = sum(file["bytes"] for file in chosen["files"].values()) / MIB
    found.append(bar("file", "MiB", size, size, size, "measured", budget["max_file_mib"], at_least=False))
    if prefill := chosen["predicted"]["prefill_tps"]:
        first = (PROMPT / prefill["value"], PROMPT / prefill["high"], PROMPT / prefill["low"])
        found.append(bar(f"first token after {PROMPT}", "s", *first, "predicted", None, at_least=False))
    return found


def _row(candidate: Json, record: Json, *, by_kl: bool, chosen: bool) -> dict[str, Any]:
    quality = candidate["quality"]
    speed, kind = _speed(candidate)
    memory, memory_kind = _memory(candidate, record)
    return {
        "label": label(candidate),
        "chosen": chosen,
        "fits": candidate["fits"],
        # What was asked; what it reaches instead stands in the columns.
        "reasons": [re.split(", (?:predicted|measured)", reason)[0] for reason in candidate["reasons"]],
        "speed": speed,
        "speed_kind": kind,
        "memory": dict(zip(("value", "low", "high"), memory, strict=True)),
        "memory_kind": memory_kind,
        "size": sum(file["bytes"] for file in candidate["files"].values()) / MIB,
        "distance": _distance(candidate, by_kl=by_kl),
        "top1": quality.get("top1"),
        "bits_per_byte": quality["bits_per_byte"],
    }


def _layers(plan: Sequence[Json], dense: Json) -> list[dict[str, Any]]:
    """For each layer which heads are left and the share of its neurons."""

    def width(key: str, index: int) -> int:
        widths = dense[key]
        return int(widths[index] if isinstance(widths, list) else widths)

    return [
        {
            "heads": [head in set(layer["heads"]) for head in range(width("heads", index))],
            "neurons": len(layer["neurons"]),
            "share": len(layer["neurons"]) / max(1, width("neurons", index)),
        }
        for index, layer in enumerate(plan)
    ]
