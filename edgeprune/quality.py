"""The quality of the file that ships, measured in its own runtime against the dense model on held-out text.

The dense model runs once: the log-probabilities of its next-token distributions over every window go to disk. Each
candidate then runs over the same windows in a process of its own, and is compared window by window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.errors import BadInput
from edgeprune.heldout import covered_characters, digest, predicted_bytes
from edgeprune.metrics import Accumulator, Interval, compare, mean_interval, paired_interval
from edgeprune.reference import (
    MeasuredOn,
    Progress,
    Reference,
    finite_logits,
    isolated,
    load_reference,
    machine,
    predictions,
    report,
)
from edgeprune.runtimes import open_runtime
from edgeprune.runtimes.base import Runtime
from edgeprune.runtimes.isolate import Execute, run_isolated
from edgeprune.runtimes.settings import Value

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class TextQuality:
    """How well a file predicts a text by itself. All but `bits_per_byte` hold only among files with one tokenizer."""

    perplexity: float
    bits_per_byte: float
    nll_nats: Interval  # negative log-likelihood per token, over windows
    n_tokens: int  # predicted: the first token of each window is not
    n_bytes: int  # UTF-8 length of the text predicted
    n_windows: int
    nll_windows: tuple[float, ...]  # mean per token of each window, nats
    text: str  # SHA-256 of the held-out text
    measured_on: MeasuredOn

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `quality_from_json` reads back."""
        return {"schema_version": SCHEMA, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Quality(TextQuality):
    """How far a file is from the dense reference, and how well it predicts the text."""

    kl_nats: Interval  # KL(reference || file) per token
    top1: Interval  # share of tokens whose likeliest successor is the reference's
    kl_windows: tuple[float, ...]
    reference: str  # key of the reference


@dataclass(frozen=True, kw_only=True)
class CrossQuality(TextQuality):
    """How well a file with other tokens than the dense model's predicts the text that the dense model was judged on.

    Distributions over other tokens have no KL divergence to the reference's; both give the text a likelihood. The loss
    over dense is the rise of the text's negative log-likelihood, in nats per token of the dense tokenizer.
    """

    over_nats: Interval  # loss over dense, over windows
    over_windows: tuple[float, ...]
    reference: str  # key of the reference


def loss_over_dense(quality: TextQuality, dense: Sequence[float]) -> tuple[float, ...]:
    """How much less likely a file finds the held-out text than the dense model does: a value a window.

    It is the one figure that files with any tokenizer have. Where the dense model p wrote the text itself, it estimates
    the KL divergence: E[log p(x) - log q(x)] over x ~ p is KL(p || q) by definition, and by the chain rule the sum over
    the tokens of x of the divergences between next-token distributions. (Written text is sampled without special tokens
    and sifted, so on it this is nearly so; a file with other tokens is judged by one way to spell the text of several,
    which makes its loss, if anything, too large.)

    Args:
        quality: measured on the reference's windows.
        dense: the dense model's negative log-likelihood in each window, nats per token.

    Returns:
        (windows,), nats per token of the dense tokenizer.

    Raises:
        BadInput: it was measured on other windows, or on a text without a reference.
    """
    if isinstance(quality, CrossQuality):
        return quality.over_windows
    if not isinstance(quality, Quality) or len(quality.nll_windows) != len(dense):
        raise BadInput("the file was not measured on the reference's windows", remedy="evaluate it again")
    return tuple(own - other for own, other in zip(quality.nll_windows, dense, strict=True))


def quality_from_json(record: Mapping[str, Any]) -> TextQuality:
    """The `Quality`, `CrossQuality` or (where nothing was compared) `TextQuality` of a record made by `to_json`.

    Raises:
        BadInput: fields are missing or not as expected.
    """
    if record.get("schema_version") != SCHEMA:
        raise BadInput(f"quality record has schema {record.get('schema_version')!r}, this version reads {SCHEMA}")
    kind = Quality if "kl_nats" in record else CrossQuality if "over_nats" in record else TextQuality
    values = {key: value for key, value in record.items() if key != "schema_version"}
    try:
        for key in {"nll_nats", "kl_nats", "top1", "over_nats"} & values.keys():
            values[key] = Interval(**values[key])
        for key in {"nll_windows", "kl_windows", "over_windows"} & values.keys():
            values[key] = tuple(values[key])
        values["measured_on"] = MeasuredOn(**values["measured_on"])
        return kind(**values)
    except (TypeError, KeyError) as error:
        raise BadInput(f"not a quality record ({error})", remedy="measure the file again") from error


@dataclass(frozen=True)
class Difference:
    """KL of one file minus KL of another over the same windows; `seen` if its 95 % interval excludes zero."""

    interval: Interval

    @property
    def seen(self) -> bool:
        return not self.interval.contains_zero


def differs(a: Quality, b: Quality) -> Difference:
    """Is `a` further from the reference than `b` (positive) or nearer (negative), beyond what chance explains?

    Raises:
        BadInput: they were not measured against the same reference.
    """
    if a.reference != b.reference or len(a.kl_windows) != len(b.kl_windows):
        raise BadInput("the two files were not measured against the same reference", remedy="evaluate both again")
    return Difference(paired_interval(a.kl_windows, b.kl_windows))


def measure(runtime: Runtime, reference: Reference, *, progress: Progress | None = None) -> Quality:
    """Run a loaded file over the reference's windows, each from an empty cache, and compare.

    Raises:
        BadInput: the file has another vocabulary or tokenizes the text otherwise than the reference.
        StageFailed: the file's logits are not finite.
    """
    remedy = "compare it on text alone (bits per byte), which needs no common tokens"
    if runtime.n_vocab != reference.n_vocab:
        raise BadInput(
            f"the file's vocabulary has {runtime.n_vocab} entries, the reference's {reference.n_vocab}", remedy=remedy
        )
    expected = np.concatenate(reference.windows)
    ids = np.asarray(runtime.encode(reference.text)[: len(expected)], dtype=np.int64)
    if not np.array_equal(ids, expected):
        n = min(len(ids), len(expected))
        at = int(np.argmin(np.append(ids[:n] == expected[:n], False)))
        raise BadInput(f"the file's tokens differ from the reference's from token {at} of the text on", remedy=remedy)
    totals = Accumulator()
    for i, window in enumerate(reference.windows):
        logits = predictions(runtime, window, reference.bos)
        with finite_logits(runtime.name):
            totals.add(compare(logits, window[1:], reference.coded(i)), reference.n_bytes[i])
        report(progress, "quality", i + 1, len(reference.windows))
    return Quality(
        **text_fields(totals, runtime.name, reference.text),
        kl_nats=mean_interval(totals.kl),
        top1=mean_interval(totals.agree),
        kl_windows=tuple(totals.kl),
        reference=reference.key,
    )


def measure_text(runtime: Runtime, text: str, *, length: int = 512, progress: Progress | None = None) -> TextQuality:
    """Perplexity and bits per byte on all of `text`, with no reference and any tokenizer.

    The text is split into windows of nearly equal length, at most `length` tokens, that cover it: files with other
    tokenizers are then measured on the same text. For a comparison with files that have the reference's tokenizer,
    give `Reference.covered_text`.

    Raises:
        BadInput: as `held_out`.
        StageFailed: the file's logits are not finite.
    """
    ids = runtime.encode(text)
    count = max(2, -(-len(ids) // length))
    if len(ids) < 2 * count:
        raise BadInput(f"the text has only {len(ids)} tokens", remedy="give a longer text")
    covered_characters(runtime, ids, text)
    chunks = np.array_split(np.asarray(ids, dtype=np.int64), count)
    totals = Accumulator()
    for i, (window, n_bytes) in enumerate(zip(chunks, predicted_bytes(runtime.decode, chunks), strict=True)):
        logits = predictions(runtime, window, runtime.bos)
        with finite_logits(runtime.name):
            totals.add(compare(logits, window[1:]), n_bytes)
        report(progress, "quality", i + 1, count)
    return TextQuality(**text_fields(totals, runtime.name, text))


def evaluate(
    path: Path,
    reference_folder: Path,
    *,
    runtime: str | None = None,
    threads: int,
    settings: Mapping[str, Value] | None = None,
    timeout_s: float,
    memory_mib: int | None = None,
    execute: Execute = run_isolated,
    progress: Progress | None = None,
) -> Quality:
    """`measure` of an exported file, in a process of its own, with `settings` of its runtime.

    Raises:
        BadInput: as `measure`, or the file is bad.
        StageFailed: the process failed, ran out of memory, crashed or was too slow; the message starts with which.
    """
    arguments = {
        "path": path,
        "reference_folder": reference_folder,
        "runtime": runtime,
        "threads": threads,
        "settings": dict(settings or {}),
    }
    record = isolated(
        "edgeprune.quality:evaluate_in_process", path, arguments, timeout_s, memory_mib, progress, execute
    )
    quality = quality_from_json(record)
    assert isinstance(quality, Quality)
    return quality


def evaluate_text(
    path: Path,
    text: str,
    *,
    length: int = 512,
    runtime: str | None = None,
    threads: int,
    timeout_s: float,
    memory_mib: int | None = None,
    execute: Execute = run_isolated,
    progress: Progress | None = None,
) -> TextQuality:
    """`measure_text` of an exported file, in a process of its own. Raises as `evaluate`."""
    arguments = {"path": path, "text": text, "length": length, "runtime": runtime, "threads": threads}
    return quality_from_json(
        isolated(
            "edgeprune.quality:evaluate_text_in_process", path, arguments, timeout_s, memory_mib, progress, execute
        )
    )


def evaluate_in_process(
    path: str,
    reference_folder: str,
    runtime: str | None,
    threads: int,
    settings: Mapping[str, Value],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What `evaluate` runs in its own process; a `Quality` as JSON."""
    reference = load_reference(Path(reference_folder))
    n_ctx = len(reference.windows[0])
    with closing(open_runtime(Path(path), n_ctx=n_ctx, threads=threads, name=runtime, settings=settings)) as opened:
        return measure(opened, reference, progress=progress).to_json()


def evaluate_text_in_process(
    path: str, text: str, length: int, runtime: str | None, threads: int, progress: Progress | None = None
) -> dict[str, Any]:
    """What `evaluate_text` runs in its own process; a `TextQuality` as JSON."""
    with closing(open_runtime(Path(path), n_ctx=length, threads=threads, name=runtime)) as opened:
        return measure_text(opened, text, length=length, progress=progress).to_json()


def text_fields(totals: Accumulator, runtime: str, text: str) -> dict[str, Any]:
    """The fields of `TextQuality`, from sums over windows of `text`."""
    means = tuple(total / n for total, n in zip(totals.nll, totals.tokens, strict=True))
    return {
        "perplexity": totals.perplexity,
        "bits_per_byte": totals.bits_per_byte,
        "nll_nats": mean_interval(means),
        "n_tokens": totals.n_tokens,
        "n_bytes": sum(totals.text_bytes),
        "n_windows": len(totals.tokens),
        "nll_windows": means,
        "text": digest(text),
        "measured_on": MeasuredOn(runtime, machine()),
    }
