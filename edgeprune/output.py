"""What the command line prints: tables, progress, and one-line problems. Results go to standard output, the rest to
standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape as without_markup
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from edgeprune.doctor import Check
    from edgeprune.inspection import Inspection
    from edgeprune.prediction import DevicePrediction
    from edgeprune.proposal import Proposal

# Where there is no terminal to fit into, tables get room for what they hold.
console = Console(highlight=False, width=None if sys.stdout and sys.stdout.isatty() else 160)
_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
errors = Console(stderr=True, highlight=False)


def printable(text: str, limit: int = 2000) -> str:
    """Text that may come from a model file, so that it cannot steer the terminal or fill it."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return shown if len(text) <= limit else f"{shown} …"


def without_controls(text: str) -> str:
    """What a model says, without the characters that steer a terminal; tabs and line breaks stay."""
    return text.translate(_CONTROLS)


def escape(text: str) -> str:
    """`printable` text, of which rich reads nothing as its markup."""
    return without_markup(printable(text))


def problem(text: str, *, kind: str = "error") -> None:
    """Print one line on standard error; it is never wrapped, so it can be searched and copied."""
    colour = "red" if kind == "error" else "yellow"
    errors.print(f"[{colour}]{kind}:[/] {escape(' '.join(text.split()))}", soft_wrap=True)


def print_json(value: Any) -> None:
    """Print `value` as JSON on standard output, for machines: nothing else goes there."""
    sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")


class Stages:
    """Progress of a pipeline: a bar with an estimate for each stage, or plain lines where there is no terminal."""

    def __init__(self, *, resumes: bool = True) -> None:
        self._resumes = resumes
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=errors,
            disable=not errors.is_terminal,
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Stages:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        if kind is KeyboardInterrupt:  # typer ends the command with exit code 130, and says nothing
            again = "; run the same command again to continue where it stopped" if self._resumes else ""
            problem(f"interrupted{again}", kind="stopped")

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report `done` of `total` of a stage; a total of 0 is a stage without steps."""
        new = stage not in self._tasks
        if new:
            self._tasks[stage] = self._bars.add_task(escape(stage), total=total or None)
            if not errors.is_terminal:
                errors.print(f"{escape(stage)} …", soft_wrap=True)
        self._bars.update(self._tasks[stage], completed=done, total=total or None)

    def say(self, stage: str) -> None:
        """Report a stage without steps."""
        self(stage, 0, 0)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text; `**bold**` as in Markdown is bold. Too narrow a terminal wraps cells, never cuts them; one
    too narrow for the numbers gets a block for each row."""
    widths = _widths([header, *rows], console.width - 3 * len(header) - 1) if len(header) > 2 else [None] * len(header)
    if widths is None:
        _print_blocks(title, header, rows)
        return
    table = Table(title=escape(title), title_justify="left", header_style="bold")
    for name, width in zip(header, widths, strict=True):
        table.add_column(escape(name), overflow="fold", width=width)
    for row in rows:
        bold = any(cell.startswith("**") for cell in row)
        table.add_row(*(escape(cell.strip("*")) for cell in row), style="bold" if bold else None)
    console.print(table)


def _widths(rows: Sequence[Sequence[str]], room: int) -> Sequence[int | None] | None:
    """Widths of columns in a terminal with `room` for them, so that no cell breaks within a word, but for a long one of
    a row's first; None where there is no room for that."""
    columns = list(zip(*rows, strict=True))
    least = [max(len(word) for cell in column for word in [*cell.split(), ""]) for column in columns]
    least[0] = min(least[0], max(20, -(-least[0] // 3)))
    wanting = [max(map(len, column)) - width for column, width in zip(columns, least, strict=True)]
    spare = room - sum(least)
    if spare >= sum(wanting):
        return [None] * len(columns)  # whatever they take
    return None if spare < 0 else [w + spare * more // sum(wanting) for w, more in zip(least, wanting, strict=True)]


def _print_blocks(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    console.print(f"[italic]{escape(title)}[/]")
    wide = max(map(len, header[1:]))
    for row in rows:
        first, *rest = (escape(cell.strip("*")) for cell in row)
        console.print(f"[bold]{first}[/]")
        for name, cell in zip(header[1:], rest, strict=True):
            console.print(f"  {escape(name):{wide}}  {cell}")


def print_prediction(found: DevicePrediction) -> None:
    """Print what a model is predicted to do on a device."""
    cost = found.cost
    with_ = [cost.backend, f"{cost.threads} threads", f"context {cost.context}"]
    if cost.beside_mib:
        with_.insert(1, f"{cost.gpu_layers} layers on the GPU")
    print_table(
        f"{found.model} {found.quantisation} on {found.device}, predicted",
        ("", "value (90 % interval)"),
        [
            ["decode", f"{cost.decode_tps} tokens/s"],
            ["prompt", "no figure for this kernel" if cost.prefill_tps is None else f"{cost.prefill_tps} tokens/s"],
            [f"first token after {found.prompt}", "no figure" if found.ttft_s is None else f"{found.ttft_s} s"],
            ["opening the file", "no figure" if cost.load_s is None else f"{cost.load_s} s, if it was read before"],
            ["peak memory", f"{cost.memory_mib} MiB"],
            *([["beside the GPU", f"{cost.beside_mib} MiB"]] if cost.beside_mib else []),
            ["fits", "; ".join(found.reasons) or "yes"],
            ["with", f"{cost.runtime}, {', '.join(with_)}"],
            *(["assumed", each] for each in found.assumed),
        ],
    )


def print_proposal(proposal: Proposal, seconds: float) -> None:
    """Print what `fit` is about to do, and about how long it takes."""
    from edgeprune.cost import bytes_allowed

    profile, budget = proposal.profile, proposal.budget
    limits = [
        f"≥ {budget.min_tokens_per_s:g} tokens/s" if budget.min_tokens_per_s else "",
        f"≤ {budget.max_memory_mib:.0f} MiB memory" if budget.max_memory_mib else "",
        f"≤ {budget.max_file_mib:.0f} MiB file" if budget.max_file_mib else "",
        f"context {budget.context}",
    ]
    errors.print(
        f"[bold]{escape(proposal.model)}[/] ({proposal.shape.parameters:,} parameters) "
        f"for [bold]{profile.name}[/], {escape(profile.description)}",
        soft_wrap=True,
    )
    errors.print(f"budget  {', '.join(limit for limit in limits if limit)}")
    if budget.min_tokens_per_s:
        allowed = {
            runtime: bytes_allowed(profile, runtime, len(proposal.shape.layers), budget.min_tokens_per_s)
            for runtime in dict.fromkeys(candidate.target.runtime for candidate in proposal.candidates)
        }
        reads = ", ".join(f"{max(0.0, size) / 1e6:.1f} MB by {runtime}" for runtime, size in allowed.items())
        errors.print(f"allows  to read {reads} for each token (weights and cache; predicted)", soft_wrap=True)
    verb = "may" if profile.at_hand else "predicted to"
    errors.print(
        f"search  {len(proposal.candidates)} candidates, {proposal.n_feasible} {verb} fit, "
        f"{len(proposal.to_measure)} to export and measure:"
    )
    for candidate in proposal.to_measure:
        cost = f"predicted {candidate.cost.decode_tps} tokens/s, {candidate.cost.memory_mib.value:.0f} MiB"
        fate = "" if candidate.fits else "; does not fit, for comparison"
        if candidate.doubtful and profile.at_hand:
            fate = "; may fit, measuring decides"
        errors.print(f"        {escape(str(candidate)):34} {cost}{fate}", soft_wrap=True)
    if proposal.plans_to_make:
        anew = ", and anew where measuring tells that they miss" if profile.at_hand else ""
        most = f"at most {proposal.plans_to_make} are made{anew}"
        errors.print(f"        then the plans of least damage for what does not fit; {most}", soft_wrap=True)
    about = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
    errors.print(f"time    about {about}, less what earlier runs left in the cache")


def print_checks(checks: Sequence[Check]) -> None:
    """Print the findings of `doctor`."""
    marks = {True: "[green]✓[/]", False: "[red]✗[/]", None: "·"}
    for check in checks:
        console.print(f"{marks[check.ok]} {escape(check.name):24} {escape(check.detail)}", soft_wrap=True)
        if check.remedy:
            console.print(f"  {'':24} → {escape(check.remedy)}", soft_wrap=True)


def print_inspection(found: Inspection) -> None:
    """Print what is in a model file."""
    mib = 1 << 20
    parameters = "" if found.parameters is None else f", {found.parameters:,} parameters"
    console.print(f"[bold]{escape(found.path)}[/]", soft_wrap=True)
    console.print(f"{escape(f'{found.format}, {found.family}')}, {found.file_bytes / mib:.1f} MiB{parameters}")
    groups: list[list[Any]] = []
    for index, layer in enumerate(found.layers):
        if groups and groups[-1][2] == layer:
            groups[-1][1] = index
        else:
            groups.append([index, index, layer])
    rows = [[str(a) if a == b else f"{a}–{b}", str(w.heads), str(w.kv_heads), str(w.neurons)] for a, b, w in groups]
    print_table("Widths", ("layers", "query heads", "key/value heads", "MLP neurons"), rows)
    if found.bytes_by_part:
        total = sum(found.bytes_by_part.values())
        rows = [[k, f"{v / mib:.2f}", f"{100 * v / total:.1f} %"] for k, v in found.bytes_by_part.items() if v]
        print_table("Bytes by part", ("part", "MiB", "share"), rows)
    print_table("Tensors", ("type", "count"), [[k, str(v)] for k, v in found.types.items()])
    print_table("Facts", ("key", "value"), [[k, v] for k, v in found.facts.items()])


def figures_of(value: Any, prefix: str = "") -> list[list[str]]:
    """Rows for every number of a device profile that carries its source, depth first."""
    from pydantic import BaseModel

    from edgeprune.devices import Figure

    if isinstance(value, Figure):
        interval = "" if value.low == value.high else f"{value.low:g}–{value.high:g}"
        return [[prefix, f"{value.value:g}", interval, value.kind, " ".join(value.source.split())]]
    if isinstance(value, BaseModel):
        items = [(name, getattr(value, name)) for name in type(value).model_fields]
    elif isinstance(value, dict):
        items = list(value.items())
    else:
        return []
    return [row for name, item in items for row in figures_of(item, f"{prefix}.{name}" if prefix else name)]
