"""`report.md` and its plot: quality against speed, every number marked as predicted or measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.at_hand import in_gpu_memory, peak_mib
from edgeprune.candidates import Candidate
from edgeprune.files import atomic_file, write_text
from edgeprune.judging import distance_interval, has_kl
from edgeprune.metrics import Interval
from edgeprune.quality import Quality
from edgeprune.record import Trial
from edgeprune.report_chart import pareto_front
from edgeprune.report_page import PAGE, bars, chosen_of, number, write_page

if TYPE_CHECKING:
    from edgeprune.fitting import FitResult

PLOT = "pareto.png"


def write_plot(
    pairs: Sequence[tuple[Candidate, Trial]],
    chosen: Candidate,
    dense: Sequence[float],
    wanted_tps: float | None,
    device: str,
    path: Path,
) -> None:
    """The Pareto plot as PNG: measured distance to dense (lower is better) against predicted tokens/s, with the budget.

    The distance is the KL divergence or, where a candidate has none for its other tokens, all candidates' loss over
    dense; `dense` is the dense model's negative log-likelihood in each window.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    kl = has_kl([trial for _, trial in pairs])
    shown = [(c, distance_interval(t.quality, dense, kl=kl)) for c, t in pairs if t.quality is not None]
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    colours = {"llamacpp": "#1f77b4", "onnxruntime": "#d95f02"}
    points = [(c.cost.decode_tps.value, max(far.mean, 1e-6)) for c, far in shown]
    for (candidate, far), (x, y) in zip(shown, points, strict=True):
        speed = candidate.cost.decode_tps
        axes.errorbar(
            x,
            y,
            xerr=[[x - speed.low], [speed.high - x]],
            yerr=[[max(0.0, y - max(far.low, 1e-6))], [max(0.0, far.high - y)]],
            fmt="*" if candidate.key == chosen.key else "o",
            markersize=15 if candidate.key == chosen.key else 6,
            color=colours.get(candidate.target.runtime, "#555555"),
            ecolor="#bbbbbb",
            elinewidth=1,
            alpha=1.0 if candidate.fits else 0.4,
        )
    _label(axes, shown, points)
    front = sorted(points[i] for i in pareto_front(points))
    axes.plot([p[0] for p in front], [p[1] for p in front], color="#999999", linewidth=1, linestyle=":", zorder=0)
    if wanted_tps:
        axes.axvline(wanted_tps, color="#b00020", linewidth=1.2)
        axes.annotate(
            f"budget {wanted_tps:g} tokens/s",
            (wanted_tps, 0.02),
            xycoords=("data", "axes fraction"),
            rotation=90,
            fontsize=8,
            color="#b00020",
            ha="right",
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    # Between powers of ten only where there is room: a range of less than a power and a half.
    few = max(y for _, y in points) < 30 * min(y for _, y in points)
    axes.yaxis.set_minor_formatter(
        FuncFormatter(lambda value, _: f"{value:.2g}" if few and f"{value:e}"[0] in "2346" else "")
    )
    # The widest interval would push the points together; what sticks out is in the table.
    speeds = [x for x, _ in points] + ([wanted_tps] if wanted_tps else [])
    axes.set_xlim(0.7 * min(speeds), 1.35 * max(speeds))
    axes.set_xlabel(f"predicted decode on {device}, tokens/s (interval of the prediction)")
    axes.set_ylabel(f"measured {'KL to' if kl else 'loss over'} dense, nats a token (95 % interval)")
    if not all(c.fits for c, _ in shown):
        axes.plot([], [], "o", color="#333333", alpha=0.4, label="does not fit")
    for runtime in sorted({c.target.runtime for c, _ in shown}):
        axes.plot([], [], "o", color=colours.get(runtime, "#555555"), label=runtime)
    axes.plot([], [], "*", color="#333333", markersize=12, label="chosen")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0.0, -0.12), ncols=4, frameon=False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png")


def _label(axes: Any, shown: Sequence[tuple[Candidate, Any]], points: Sequence[tuple[float, float]]) -> None:
    """Names in a column beside the plot, in the order of their points and tied to them: they never overlap."""
    order = sorted(range(len(points)), key=lambda i: points[i][1])
    for rank, i in enumerate(order):
        candidate = shown[i][0]
        share = "dense" if candidate.dense else f"−{100 * candidate.plan.reached_ratio:.0f} %"
        scope = " MLP" if candidate.plan.scope == "mlp" and not candidate.dense else ""
        scope += f" {candidate.vocabulary} tokens" if candidate.vocabulary else ""
        axes.annotate(
            f"{candidate.target.quantisation} {share}{scope}",
            points[i],
            xytext=(1.02, (rank + 0.5) / len(order)),
            textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": "#cccccc", "linewidth": 0.7},
            va="center",
            fontsize=8,
        )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measured_table(result: FitResult) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the measured candidates, best quality first; failures last, with their reason.

    Speed and memory are the measured ones where the device was at hand, else the predicted. Where one has other tokens
    than the dense model, a column has the one figure that all have, by which the choice is.
    """
    dense = result.judged_on.nll
    kl = has_kl([trial for _, trial in result.trials])
    at_hand = any(trial.speed for _, trial in result.trials)
    kind = "measured" if at_hand else "predicted"
    header = [
        "candidate",
        f"tokens/s, {kind}",
        f"memory MiB, {kind}",
        "size MiB, measured",
        *([] if kl else ["loss over dense, measured"]),
        "KL to dense, measured",
        "top-1",
        "perplexity",
        "bits/byte",
    ]

    def far(pair: tuple[Candidate, Trial]) -> float:
        quality = pair[1].quality
        return float("inf") if quality is None else distance_interval(quality, dense, kl=kl).mean

    rows = []
    for candidate, trial in sorted(result.trials, key=far):
        name = f"**{candidate}**" if candidate.key == result.chosen.key else str(candidate)
        name += "" if candidate.fits else " (does not fit)"
        size = sum(f["bytes"] for f in trial.files.values()) / (1 << 20)
        cost = (str(candidate.cost.decode_tps), str(candidate.cost.memory_mib))
        if at_hand:
            cost = _measured_cost(trial, dedicated=in_gpu_memory(candidate, result.proposal.profile))
        row = [name, *cost, f"{size:.1f}" if size else "–"]
        quality = trial.quality
        if quality is None:
            row.append(f"{trial.status}: {trial.reason}")
            rows.append(row + [""] * (len(header) - len(row)))
            continue
        if not kl:
            row.append(_interval(distance_interval(quality, dense, kl=False)))
        if isinstance(quality, Quality):
            row += [_interval(quality.kl_nats), f"{100 * quality.top1.mean:.1f} %", f"{quality.perplexity:.2f}"]
        else:  # of other tokens: there is none, and a perplexity that compares with nothing
            row += ["–", "–", "–"]
        rows.append([*row, f"{quality.bits_per_byte:.3f}"])
    return header, rows


def _measured_cost(trial: Trial, *, dedicated: bool) -> tuple[str, str]:
    """Tokens/s with their interval, and peak memory in MiB; a dash for what was not measured."""
    speed, peak = trial.speed.get("tg128"), peak_mib(trial, dedicated=dedicated)
    return (
        "–" if speed is None else _speed(speed),
        "–" if peak is None else f"{peak:.0f}",
    )


def _speed(test: Mapping[str, Any]) -> str:
    return f"{test['median_ts']:.1f} ({test['low_ts']:.1f}–{test['high_ts']:.1f})"


def _interval(of: Interval) -> str:
    return f"{of.mean:.4f} ({of.low:.4f}–{of.high:.4f})"


def _vocabulary_section(record: dict[str, Any]) -> list[str]:
    """What became of the corpus that was given, in Markdown; nothing where none was."""
    corpus = record["corpus"]
    if corpus is None:
        return []
    lines = ["## Vocabulary"]
    files = ", ".join(corpus["files"][:4]) + (" …" if len(corpus["files"]) > 4 else "")
    if not corpus["options"]:
        return [*lines, f"Nothing had to go, so every token stays; the corpus ({files}) was not counted."]
    left, before = corpus["tokens_left"], corpus["tokens_before"]
    if corpus["counted_on"]:
        lines.append(
            f"Of {before:,} tokens {left:,} are left, {corpus['counted_on']}: text unlike it is read as more tokens."
        )
    else:
        lines.append(f"All {before:,} tokens stay in what was chosen; they were judged by their use in {files}.")
    rows = [[f"{option['size']:,}", f"{option['damage']:.4f}"] for option in corpus["options"]]
    return [
        *lines,
        "What fewer tokens alone cost the dense model on the calibration text, nats per dense token:",
        _table(["tokens left", "measured damage"], rows),
    ]


def write_report(result: FitResult, record: dict[str, Any]) -> None:
    """Write `report.md` with its plot, and `report.html`, into a run's folder with fit.json and `best`."""
    proposal, budget = result.proposal, result.proposal.budget
    plot = result.out / PLOT
    write_plot(result.trials, result.chosen, result.judged_on.nll, budget.min_tokens_per_s, proposal.profile.name, plot)
    judged = {c.key: c for c, _ in result.trials}  # by what was measured, where it was
    candidates = [judged.get(c.key, c) for c in proposal.candidates]
    dropped = [c for c in candidates if not c.fits]
    by_target: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        by_target.setdefault(str(candidate.target), []).append(candidate)
    searched = []
    for target, group in by_target.items():
        least = min((c.plan.reached_ratio for c in group if c.fits), default=None)
        first = "none" if least is None else f"{100 * least:.1f} %"
        dense = group[0]
        why = "" if dense.fits else "; ".join(dense.reasons)
        searched.append([target, str(len(group)), first, why])
    measured_here = [
        [
            str(c),
            test,
            _speed(speed),
            f"{speed['peak_mib']:.0f}" if speed["peak_mib"] else "",
        ]
        for c, t in result.trials
        for test, speed in t.speed.items()
    ]
    machines = dict.fromkeys(t.quality.measured_on.machine for _, t in result.trials if t.speed and t.quality)
    sections = [
        f"# {proposal.model} on {proposal.profile.name}",
        f"**{result.verdict}**",
        f"![quality against speed]({PLOT})",
        "## Budget",
        _table(["", "asked", "this has", "kind"], _budget_rows(record)),
        f"Device: {proposal.profile.description}. Speeds and memory for it are "
        + ("measured on it" if measured_here else "predicted from its profile, with the profile's interval")
        + "; quality is measured on the exported file in its runtime.",
        "## Measured candidates",
        _table(*measured_table(result)),
    ]
    if not has_kl([trial for _, trial in result.trials]):
        sections.append(
            "Distributions over other tokens have no KL divergence to the dense model's. Such candidates are compared "
            "with the others by the loss over dense: how much less likely the text is, in nats per dense token."
        )
    if measured_here:
        sections += [
            f"## Speed, measured on {', '.join(machines)}",
            _table(["candidate", "test", "tokens/s (95 % interval)", "peak MiB"], measured_here),
        ]
    sections += [
        "## What was searched",
        f"{len(candidates)} candidates, {len(dropped)} of which do not fit. Of each target the least pruned that fits "
        "is worth measuring.",
        _table(["target", "candidates", "least pruned that fits", "why dense does not fit"], searched),
        *_vocabulary_section(record),
        "## Data",
        _table(
            ["use", "source"],
            [["calibration", record["calibration"]["source"]], ["held out", str(result.judged_on)]],
        ),
        f"The dense model, unquantised, has perplexity {record['held_out']['dense_perplexity']:.2f} on held-out text.",
        "## Files",
        _table(["file", "bytes", "SHA-256"], _file_rows(record)),
        "## Again",
        f"```\n{record['commands']['again']}\n```",
        f"edgeprune {record['environment']['edgeprune']}, {record['environment']['platform']}, "
        + ", ".join(f"{k} {v}" for k, v in record["environment"]["packages"].items())
        + f"; {record['seconds']:.0f} s.",
    ]
    if result.chosen.notes:
        sections.insert(2, "Of its format: " + "; ".join(result.chosen.notes) + ".")
    if record["stopped_early"]:
        sections.insert(2, "Stopped by `--max-time` before every candidate worth measuring was measured.")
    sections += _samples(record)
    write_text(result.out / "report.md", "\n\n".join(sections) + "\n")
    write_page([result.out], result.out / PAGE)


def _budget_rows(record: dict[str, Any]) -> list[list[str]]:
    """The figures of report.html's bars."""
    rows = []
    for each in bars(chosen_of(record), record):
        asked = "" if each["limit"] is None else f"{'≥' if each['at_least'] else '≤'} {each['limit']:g}"
        spread = f" ({number(each['low'])}–{number(each['high'])})" if each["high"] > each["low"] else ""
        rows.append([f"{each['label']}, {each['unit']}", asked, number(each["value"]) + spread, each["kind"]])
    return [*rows, ["context, tokens", f"{record['budget']['context']}", "", ""]]


def _file_rows(record: dict[str, Any]) -> list[list[str]]:
    files = chosen_of(record)["files"].items()
    return [[name, f"{file['bytes']:,}", f"`{file['sha256']}`"] for name, file in files]


def _samples(record: dict[str, Any]) -> list[str]:
    """What the dense model and the chosen file say to the same questions, in Markdown."""
    lines = ["## What it says"]
    for sample in record["samples"]:
        lines.append(f"**{sample['question']}**")
        lines += [f"{who}:\n\n> " + sample[who].strip().replace("\n", "\n> ") for who in ("dense", "chosen")]
    return lines
