"""The tables and plots of the pruning comparison, from its JSON alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

TASK_METRICS = {  # task -> short name, and the accuracy that is usually quoted for it
    "arc_easy": ("ARC-e", "acc_norm"),
    "arc_challenge": ("ARC-c", "acc_norm"),
    "hellaswag": ("HellaSwag", "acc_norm"),
    "piqa": ("PIQA", "acc_norm"),
    "winogrande": ("WinoGrande", "acc"),
}
CHANCE = (1 / 4 + 1 / 4 + 1 / 4 + 1 / 2 + 1 / 2) / 5  # of the five accuracies' average
ABSENT = "–"
WORST_DRAWN = 2.0  # bits per byte over dense; worse methods are named beside the lines
OTHERS = "0.5"  # grey

Row = Mapping[str, Any]
Reading = Callable[[Row], float | None]


def value(row: Row, column: str, key: str) -> float | None:
    """A figure of a row, or None where it was not measured or is not finite."""
    found = row["cells"].get(column, {}).get(key)
    return float(found) if isinstance(found, (int, float)) and math.isfinite(found) else None


def dense_row(record: Mapping[str, Any]) -> Row:
    """The dense model's row; an empty one where it was not measured."""
    empty: dict[str, Any] = {"method": "dense", "label": "dense", "ratio": 0.0, "cells": {}}
    return next((row for row in record["rows"] if row["method"] == "dense"), empty)


def ordered(record: Mapping[str, Any]) -> list[Row]:
    """The dense model, then ratio by ratio, the row that loses most first; one without that figure at the end."""

    def key(row: Row) -> tuple[float, float]:
        bits = value(row, "quality", "bits_per_byte")
        return row["ratio"], math.inf if bits is None else -bits

    return sorted(record["rows"], key=key)


def average(row: Row) -> tuple[float, float] | None:
    """Mean of the five accuracies, and its standard error (tasks are independent); None unless all are there."""
    found = [value(row, task, metric) for task, (_, metric) in TASK_METRICS.items()]
    errors = [value(row, task, f"{metric}_stderr") for task, (_, metric) in TASK_METRICS.items()]
    if any(each is None for each in (*found, *errors)):
        return None
    count = len(found)
    return sum(map(float, filter(None, found))) / count, math.sqrt(sum(e**2 for e in errors if e)) / count


def summary_table(record: Mapping[str, Any]) -> str:
    """What a reader looks at first: a line a row whose quality was measured.

    Tasks are also told above what guessing reaches: a model that has lost everything still has three quarters of the
    demo model's average.
    """
    dense = dense_row(record)
    whole = average(dense)
    lines = [
        "| method | removed | bits per byte | over dense | perplexity | KL, nats | top-1 | Q4_0: MB a token | tasks "
        "| of dense | above chance |",
        f"| ---{' | ---:' * 10} |",
    ]
    for row in ordered(record):
        if value(row, "quality", "bits_per_byte") is None:
            continue
        mean = average(row)
        cells = [
            *_quality_cells(row, dense),
            f"{100 * mean[0]:.1f} ± {100 * mean[1]:.1f}" if mean else ABSENT,
            f"{100 * mean[0] / whole[0]:.1f} %" if mean and whole else ABSENT,
            f"{100 * (mean[0] - CHANCE) / (whole[0] - CHANCE):.0f} %" if mean and whole else ABSENT,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _quality_cells(row: Row, dense: Row) -> list[str]:
    """What both tables on text begin with: who, how much is gone, quality, and bytes a token."""
    read = value(row, "bytes", "bytes_per_token")
    return [
        _label(row),
        _share(row),
        _number(value(row, "quality", "bits_per_byte"), ".4f"),
        _number(_over(row, value(dense, "quality", "bits_per_byte")), ".3f"),
        _perplexity(perplexity(row, dense)),
        _number(value(row, "quality", "kl_nats"), ".4f"),
        _number(value(row, "quality", "top1"), ".3f"),
        _number(read / 1e6 if read else None, ".1f"),
    ]


def perplexity(row: Row, dense: Row) -> float | None:
    """Perplexity by the dense model's tokens: a row with another vocabulary reads the same text as more of them."""
    found, tokens = value(row, "quality", "perplexity"), value(row, "quality", "tokens")
    of_dense = value(dense, "quality", "tokens")
    if found is None or value(row, "quality", "kl_nats") is not None:  # with a KL it reads the dense model's tokens
        return found
    return found ** (tokens / of_dense) if tokens and of_dense else None


def text_table(record: Mapping[str, Any]) -> str:
    """Quality on text, and the costs: a line a row."""
    dense = dense_row(record)
    lines = [
        "| method | removed | bits per byte | over dense | perplexity | KL, nats | top-1 | Q4_0: MB a token "
        "| Q4_0: KL | tokens/s | pruning, min | peak, MiB |",
        "|---|" + "---:|" * 11,
    ]
    for row in ordered(record):
        seconds = value(row, "prune", "seconds")
        cells = [
            *_quality_cells(row, dense),
            _number(value(row, "shipped", "kl_nats"), ".4f"),
            _number(value(row, "speed", "tg128"), ".0f"),
            _number(seconds / 60 if seconds is not None else None, ".1f"),
            _number(value(row, "prune", "peak_mib"), ".0f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def task_table(record: Mapping[str, Any]) -> str:
    """Accuracies in percent with standard errors, and the average over the dense model's: a line a row."""
    base = average(dense_row(record))
    names = [f"{name} ({metric})" for name, metric in TASK_METRICS.values()]
    lines = [f"| method | removed | {' | '.join(names)} | average | of dense |", "|---|" + "---:|" * (len(names) + 3)]
    for row in ordered(record):
        if not any(task in row["cells"] for task in TASK_METRICS):
            continue
        cells = []
        for task, (_, metric) in TASK_METRICS.items():
            found, error = value(row, task, metric), value(row, task, f"{metric}_stderr")
            cells.append(
                f"{100 * found:.1f} ± {100 * error:.1f}" if found is not None and error is not None else ABSENT
            )
        mean = average(row)
        cells.append(f"{100 * mean[0]:.1f} ± {100 * mean[1]:.1f}" if mean else ABSENT)
        cells.append(f"{100 * mean[0] / base[0]:.1f} %" if mean and base else ABSENT)
        lines.append(f"| {_label(row)} | {_asked(row)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(record: Mapping[str, Any]) -> str:
    """Both tables, what they were measured on, the notes, and what failed."""
    settings, calibration = record["settings"], record["calibration"]
    limits = sorted(
        {_limit(row["cells"][task]) for row in record["rows"] for task in TASK_METRICS if task in row["cells"]}
    )
    parts = [
        f"Model {record['model']}, {record['parameters']:,} parameters. Calibration: {calibration['source']}, "
        f"{calibration['tokens']:,} tokens. Text: {record['text']}, {settings['windows']} of them, "
        f"{settings['dtype']} files. Tasks: {', '.join(limits) or 'none'}.",
        summary_table(record),
        text_table(record),
        task_table(record),
    ]
    notes = {f"- {row['label']}: {row['note']}" for row in record["rows"] if row.get("note")}
    failed = [
        f"- {_label(row)}, {_asked(row)}, {column}: {cell.get('error') or cell['absent']}"
        for row in ordered(record)
        for column, cell in row["cells"].items()
        if "error" in cell or "absent" in cell
    ]
    parts += ["\n".join(sorted(notes))] if notes else []
    parts += ["Not measured:\n\n" + "\n".join(failed)] if failed else []
    return "\n\n".join(parts)


def plots(record: Mapping[str, Any], folder: Path, quantisation: Mapping[str, Any] | None = None) -> list[Path]:
    """Draw bits per byte over dense against parameters removed, and KL against bytes per token; the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_quality_plot(record, folder / "quality.png"), _bytes_plot(record, folder / "bytes.png", quantisation)]


def _lines(record: Mapping[str, Any], x: Reading, y: Reading) -> dict[str, list[tuple[float, float]]]:
    """Label -> points of the methods that have both figures."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in ordered(record):
        across, up = x(row), y(row)
        if row["method"] != "dense" and across is not None and up is not None:
            lines.setdefault(row["label"], []).append((across, up))
    return lines


def _over(row: Row, base: float | None) -> float | None:
    """Bits per byte over the dense model's."""
    bits = value(row, "quality", "bits_per_byte")
    return bits / base if bits and base else None


def _removed(row: Row) -> float:
    """The share that is gone, or was to go where that was not measured."""
    reached = row.get("reached_ratio") or value(row, "prune", "reached_ratio")
    return float(row["ratio"]) if reached is None else float(reached)


def _quality_plot(record: Mapping[str, Any], path: Path) -> Path:
    base = value(dense_row(record), "quality", "bits_per_byte")
    figure, axes = _figure("parameters removed, %", "bits per byte over dense (WikiText-2 test)")
    lines = _lines(record, _removed, lambda row: _over(row, base))
    over = {label: [(0.0, 1.0), *((100 * removed, bits) for removed, bits in some)] for label, some in lines.items()}
    beyond = [label for label, points in over.items() if points[-1][1] > WORST_DRAWN]
    axes.set_ylim(1 - 0.02, WORST_DRAWN)
    axes.yaxis.set_major_formatter("×{x:.1f}")
    _draw(axes, {label: points for label, points in over.items() if label not in beyond})
    if beyond:
        names = "\n".join(f"{label} ×{over[label][-1][1]:.1f}" for label in beyond)
        axes.text(0.02, 0.98, f"beyond the axis:\n{names}", transform=axes.transAxes, va="top", fontsize="small")
    return _save(figure, path)


def _bytes_plot(record: Mapping[str, Any], path: Path, quantisation: Mapping[str, Any] | None) -> Path:
    figure, axes = _figure("weights read per decoded token, MB", "KL to the dense model, nats a token")
    axes.set_yscale("log")
    found = _lines(
        record, lambda row: value(row, "bytes", "bytes_per_token"), lambda row: value(row, "shipped", "kl_nats")
    )
    lines = {}
    for label, points in found.items():
        if len(drawn := [(read / 1e6, kl) for read, kl in points if kl > 0]) > 1:
            lines[f"{label}, Q4_0"] = drawn
    if quantisation is not None:
        dense = quantisation["dense_q4_0_bytes_per_token"] / 1e6
        alone = [row for row in quantisation["rows"] if not row["removed"]]
        pruned = [row for row in quantisation["rows"] if row["removed"]]
        for rows, look, label in ((alone, "k--", "quantisation alone"), (pruned, "k-", "pruned, types per tensor")):
            if curve := [point for point in best_curve(rows) if point[0] < 1.2 * dense]:
                axes.plot(*zip(*curve, strict=True), f"{look}o", ms=4, drawstyle="steps-post", label=label)
        for share in map(float, quantisation["at_most"]):
            axes.axvline(share * dense, color="0.8", lw=1, zorder=0)
            axes.text(
                share * dense, 1.01, f"{share:.0%}", transform=axes.get_xaxis_transform(), ha="center", color="0.4"
            )
        axes.legend(fontsize="small", loc="lower left")  # where nobody comes
    _draw(axes, lines)
    return _save(figure, path)


def _draw(axes: Any, lines: Mapping[str, list[tuple[float, float]]]) -> None:
    """Lines with their names at the right edge, level with their ends as far as there is room; ours stand out."""
    colours = {label: f"C{number}" for number, label in enumerate(filter(_is_ours, lines))}
    for label, points in lines.items():
        width, layer = (2.0, 3) if _is_ours(label) else (1.0, 2)
        colour = colours.setdefault(label, OTHERS)
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, lw=width, color=colour, zorder=layer)
    axes.figure.draw_without_rendering()  # settles the limits
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = {label: float(to_axes.transform(points[-1])[1]) for label, points in lines.items()}
    labels = sorted(heights, key=lambda label: heights[label])
    for label, height in zip(labels, spread([heights[label] for label in labels], 0.045), strict=True):
        axes.annotate(
            label,
            xy=lines[label][-1],
            xytext=(1.03, height),
            textcoords="axes fraction",
            va="center",
            fontsize="small",
            color=colours[label],
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colours[label], "lw": 0.5, "alpha": 0.6},
        )


def _is_ours(label: str) -> bool:
    return label.startswith("ours")


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights in [0, 1] moved apart to `gap`, no further than they must."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + gap) if moved else max(height, 0.0))
    top = 1.0
    for index in reversed(range(len(moved))):
        moved[index] = top = min(moved[index], top)
        top -= gap
    return moved


def envelope(rows: Iterable[Row]) -> list[Row]:
    """The rows that no other beats: by growing bytes per token, falling KL."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["bytes_per_token"], row["kl_nats"])):
        if not best or row["kl_nats"] < best[-1]["kl_nats"]:
            best.append(row)
    return best


def best_curve(rows: Iterable[Row]) -> list[tuple[float, float]]:
    """(MB a token, KL) of the envelope, without what a logarithmic axis cannot show."""
    return [(row["bytes_per_token"] / 1e6, row["kl_nats"]) for row in envelope(r for r in rows if r["kl_nats"] > 0)]


def _figure(across: str, up: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    return path


def _label(row: Row) -> str:
    return f"**{row['label']}**" if row["method"] == "dense" else str(row["label"])


def _share(row: Row) -> str:
    return f"{100 * removed:.1f} %" if (removed := _removed(row)) else "0"


def _asked(row: Row) -> str:
    return f"{100 * row['ratio']:g} %" if row["ratio"] else "0"


def _limit(cell: Mapping[str, Any]) -> str:
    limit = cell.get("settings", {}).get("limit")
    return f"the first {limit:,} items of each" if limit else "all items"


def _number(number: float | None, form: str) -> str:
    return ABSENT if number is None else format(number, form)


def _perplexity(number: float | None) -> str:
    return ABSENT if number is None else f"{number:.2f}" if number < 1e4 else f"{number:.1e}"
