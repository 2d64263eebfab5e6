"""The quality of a file that has other tokens than the dense model, on the same text, window by window.

The reference's windows are cut as text, and the file reads each in its own tokens: files with any tokenizer are then
compared over the same windows, so that what is hard or easy in the text cancels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.errors import BadInput
from edgeprune.heldout import Window, covered_characters, predicted_bytes
from edgeprune.metrics import Accumulator, compare, mean_interval
from edgeprune.quality import CrossQuality, quality_from_json, text_fields
from edgeprune.reference import Progress, Reference, finite_logits, isolated, load_reference, predictions, report
from edgeprune.runtimes import open_runtime
from edgeprune.runtimes.base import Runtime
from edgeprune.runtimes.isolate import Execute, run_isolated
from edgeprune.runtimes.settings import Value


def measure_across(
    runtime: Runtime, reference: Reference, texts: Sequence[str], *, progress: Progress | None = None
) -> CrossQuality:
    """Run a loaded file with other tokens over the text of the reference's windows, each from an empty cache.

    A window's likelihood is taken per byte that the file predicts there (its first token may be shorter or longer than
    the reference's, and is not predicted), over the bytes that the reference predicts. A window of more tokens than the
    file's cache holds is read in parts.

    Args:
        runtime: the file.
        reference: the dense model's distributions.
        texts: the text of each of its windows (`heldout.stretches`).

    Raises:
        BadInput: the tokenizer does not give the text back, or the texts are not those of the windows.
        StageFailed: the file's logits are not finite.
    """
    if len(texts) != len(reference.windows):
        raise BadInput(f"{len(texts)} texts for {len(reference.windows)} windows")
    parts: list[list[Window]] = []
    for text in texts:
        ids = runtime.encode(text)
        covered_characters(runtime, ids, text)
        parts.append(np.array_split(np.asarray(ids, dtype=np.int64), max(1, -(-len(ids) // runtime.n_ctx))))
        if len(parts[-1][-1]) < 2:
            raise BadInput(f"a window has only {len(ids)} tokens", remedy="judge on longer windows")
    lengths = predicted_bytes(runtime.decode, [part for window in parts for part in window])
    totals = Accumulator()
    for i, window in enumerate(parts):
        of_window = Accumulator()
        for part in window:
            logits = predictions(runtime, part, runtime.bos)
            with finite_logits(runtime.name):
                of_window.add(compare(logits, part[1:]), next(lengths))
        totals.tokens.append(of_window.n_tokens)
        totals.text_bytes.append(sum(of_window.text_bytes))
        totals.nll.append(sum(of_window.nll))
        report(progress, "quality", i + 1, len(parts))
    over = tuple(
        nll / n_bytes * dense_bytes / (len(ids) - 1) - dense
        for nll, n_bytes, dense_bytes, ids, dense in zip(
            totals.nll, totals.text_bytes, reference.n_bytes, reference.windows, reference.nll, strict=True
        )
    )
    return CrossQuality(
        **text_fields(totals, runtime.name, reference.text),
        over_nats=mean_interval(over),
        over_windows=over,
        reference=reference.key,
    )


def evaluate_across(
    path: Path,
    reference_folder: Path,
    texts: Sequence[str],
    *,
    n_ctx: int,
    runtime: str | None = None,
    threads: int,
    timeout_s: float,
    memory_mib: int | None = None,
    settings: Mapping[str, Value] | None = None,
    execute: Execute = run_isolated,
    progress: Progress | None = None,
) -> CrossQuality:
    """`measure_across` of an exported file, in a process of its own. Raises as `evaluate`.

    Args:
        n_ctx: tokens of the file's cache.
        settings: of the runtime.
    """
    arguments = {
        "path": path,
        "reference_folder": reference_folder,
        "texts": list(texts),
        "n_ctx": n_ctx,
        "runtime": runtime,
        "threads": threads,
        "settings": dict(settings or {}),
    }
    record = isolated(
        "edgeprune.cross_quality:evaluate_across_in_process", path, arguments, timeout_s, memory_mib, progress, execute
    )
    quality = quality_from_json(record)
    assert isinstance(quality, CrossQuality)
    return quality


def evaluate_across_in_process(
    path: str,
    reference_folder: str,
    texts: Sequence[str],
    n_ctx: int,
    runtime: str | None,
    threads: int,
    settings: Mapping[str, Value],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What `evaluate_across` runs in its own process; a `CrossQuality` as JSON."""
    reference = load_reference(Path(reference_folder))
    with closing(open_runtime(Path(path), n_ctx=n_ctx, threads=threads, name=runtime, settings=settings)) as opened:
        return measure_across(opened, reference, texts, progress=progress).to_json()
