"""`distil`: from a source of text to a small set, written as JSON Lines of plain text beside a record of its making."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.checkpoint import Checkpoint
from edgeprune.distillation import Method, method_named
from edgeprune.distillation.base import Order, Progress, Quota, Readings, Task, Written
from edgeprune.distillation.labelled import LabelledReadings
from edgeprune.distillation.pool import LENGTH, Fields, Pool, make_pool, source_of
from edgeprune.distillation.readings import ModelReadings, Reading
from edgeprune.errors import BadInput
from edgeprune.files import atomic_file, cache_dir, sha256, writable, write_json, write_text
from edgeprune.record import environment
from edgeprune.recovery_inputs import same_vocabulary, shared_tokenizer
from edgeprune.runtimes.pytorch import bos_of, load_tokenizer

SCHEMA_VERSION = 1
AUTO = "auto"
READ_TOKENS = 400_000  # of the whole pool at most, where nothing else is asked for: some eight minutes on two cores
_LEAST_READ = 32  # tokens of a piece; fewer tell too little of it
_MOST_READ = READ_TOKENS // _LEAST_READ  # pieces; of more, as many are drawn
DEPTH = 4  # last layers whose projections' gradients are taken beside the head's


@dataclass(frozen=True)
class Distilled:
    """What `distil` wrote.

    Attributes:
        out: the file.
        record: the file that says how it was made.
        method: the method, never "auto".
        texts: how many.
        tokens: of all of them, in the model's tokens; None for soft data.
        pool_pieces, pool_tokens: what there was to choose from.
        seconds: how long it took.
    """

    out: Path
    record: Path
    method: str
    texts: int
    tokens: int | None
    pool_pieces: int
    pool_tokens: int
    seconds: float


def auto(labelled: bool) -> str:
    """The method that did best in `benchmarks/distillation_*.py`: of text without labels none did better than chance,
    neither for recovery nor for calibration."""
    return "gradient-matching" if labelled else "random"


def record_path(out: Path) -> Path:
    """Where the record of a distilled file lies."""
    return out.with_name(f"{out.name}.record.json")


def distil(
    source: Sequence[str],
    out: str | Path,
    *,
    model: str | Path,
    tokens: int | None = None,
    per_class: int | None = None,
    method: str = AUTO,
    student: str | Path | None = None,
    fields: Fields | None = None,
    length: int = LENGTH,
    read: int | None = None,
    depth: int = DEPTH,
    seed: int = 0,
    resume: bool = True,
    progress: Progress | None = None,
) -> Distilled:
    """Distil `source` into `out`.

    Args:
        source: text files, JSON Lines files or folders of them, or one hub dataset.
        out: a .jsonl file; for "soft" a .safetensors file.
        model: folder of the dense model.
        tokens: tokens to write at most; or
        per_class: texts of each label.
        method: one of `METHODS`, or "auto".
        student: folder of the pruned model: what is matched is then the loss that recovers it.
        fields: of JSON records.
        length: tokens of a piece, or of a written text, at most.
        read: leading tokens of each piece that the models read; None: all, but `READ_TOKENS` of the pool at most, for
            which pieces are drawn where there are too many to read `_LEAST_READ` of each.
        depth: last layers whose projections' gradients are matched beside the head's.
        seed: of whatever is drawn.
        resume: go on with a pass over the pool that was interrupted, and reuse finished ones.
        progress: told (stage, done, total).

    Raises:
        BadInput: a source, model or pair of options that does not fit, or a full disk.
    """
    started = time.monotonic()
    out, model, say = Path(out), Path(model), progress or (lambda _stage, _done, _total: None)
    fields = fields or Fields()
    quota = _quota(tokens, per_class, fields)
    if method == AUTO:
        method = auto(fields.label is not None)
    entry = method_named(method)
    _check(out, entry, method, student, source)
    with tempfile.TemporaryDirectory(prefix="edgeprune-distil-") as name:
        scratch = Path(name)
        cache = cache_dir() if resume else scratch
        if student is None:
            tokenizer = load_tokenizer(model)
        else:
            student = Path(student)
            model = same_vocabulary(student, model, cache, say)
            tokenizer = shared_tokenizer(student, model, None)
        dense, pruned = Checkpoint(model), None if student is None else Checkpoint(student)
        if length > dense.shape.max_positions:
            raise BadInput(
                f"pieces of {length} tokens for a model of {dense.shape.max_positions}",
                where="--length",
                remedy="ask for shorter ones",
            )
        texts = source_of(source)
        pool = make_pool(texts, tokenizer, fields=fields, length=length, folder=cache / "pools", progress=say)
        there, tokens_there = len(pool), pool.tokens
        if read is None and there > _MOST_READ and entry.reads:
            pool = pool.subset(drawn(pool, _MOST_READ, seed))
        read = read or min(length, max(_LEAST_READ, READ_TOKENS // len(pool)))

        def reader(pieces: Pool, columns: tuple[str, ...]) -> ModelReadings:
            # What was written for the purpose is few, and edited anywhere: it is read whole.
            how = Reading(columns, read=read if pieces is pool else None, depth=depth if "gradients" in columns else 0)
            where = (cache if pieces is pool else scratch) / "readings"
            return ModelReadings(pieces, dense, pruned, how, where, bos=bos_of(tokenizer), say=say)

        order = Order(pool, quota, model, student, reader, seed, scratch, cache, say, length)
        written, count = _made(order, entry, out, tokenizer)
    encoded = tokenizer(list(written.texts), add_special_tokens=False, verbose=False)["input_ids"] if written else []
    result = Distilled(
        out,
        record_path(out),
        method,
        texts=count,
        tokens=sum(map(len, encoded)) if written else None,
        pool_pieces=there,
        pool_tokens=tokens_there,
        seconds=time.monotonic() - started,
    )
    record = {
        "schema_version": SCHEMA_VERSION,
        "method": method,
        "settings": {"seed": seed, "length": length, "read": read, "depth": depth, **asdict(quota)},
        "fields": asdict(fields),
        "source": {"name": texts.name, "sha256": texts.hash, "licence": texts.licence},
        "pool": {"pieces": there, "tokens": tokens_there, "drawn": len(pool), "classes": pool.classes},
        "model": dense.hash(),
        "student": pruned.hash() if pruned else None,
        "texts": result.texts,
        "tokens": result.tokens,
        "sha256": sha256(out),
        "seconds": round(result.seconds, 1),
        "environment": environment(),
    }
    write_json(result.record, record)
    licence = out.with_name(f"{out.name}.license")
    licence.unlink(missing_ok=True)  # of a file that was there before
    if texts.licence and not entry.writes:
        write_text(licence, f"SPDX-License-Identifier: {texts.licence}\n")
    return result


def _made(order: Order, entry: Method, out: Path, tokenizer: Any) -> tuple[Written | None, int]:
    """Write `out`; the texts in it, or None where it holds none, and how many there are of whatever it holds."""
    if entry.kind == "make":
        made = entry.load().make(order)
        made.save(out)
        return None, len(made.embeddings)
    written: Written = entry.load().write(order) if entry.kind == "write" else _selected(order, entry)
    if order.quota.tokens is not None:
        written = within(written, order.quota.tokens, tokenizer)
    if not written.texts:
        raise BadInput("no text of the source is that small", where="--tokens", remedy="ask for more")
    _write(out, written, order.pool)
    return written, len(written.texts)


def _quota(tokens: int | None, per_class: int | None, fields: Fields) -> Quota:
    if (tokens is None) == (per_class is None):
        raise BadInput("give either --tokens or --per-class", remedy="for example --tokens 64k")
    if (per_class is not None) != (fields.label is not None):
        raise BadInput(
            "texts of each class need a label", where="--per-class", remedy="give --label-field with --per-class"
        )
    if (tokens or per_class or 0) <= 0:
        raise BadInput("asks for nothing", where="--tokens or --per-class", remedy="give a number above 0")
    return Quota(tokens, per_class)


def _check(out: Path, entry: Method, method: str, student: str | Path | None, source: Sequence[str]) -> None:
    suffix = ".safetensors" if entry.kind == "make" else ".jsonl"
    if out.suffix != suffix:
        raise BadInput(f"{method} writes a file that ends in {suffix}", where=out, remedy="choose another --out")
    if entry.student and student is None:
        raise BadInput(f"{method} compares with a pruned model", remedy="name one with --student")
    for path in (Path(name).expanduser().resolve() for name in source):
        if path == out.resolve() or path in out.resolve().parents:
            raise BadInput("lies in what is distilled", where=out, remedy="choose another --out")
    if out.exists() and not record_path(out).exists():
        raise BadInput("exists and is none of distill's files", where=out, remedy="choose another --out")
    writable(out)


def _selected(order: Order, entry: Method) -> Written:
    """Texts that a method chooses among the pool's, class by class where it has labels."""
    pool, select = order.pool, entry.load().select
    if pool.labels is None:
        found = select(Task(pool, np.arange(len(pool)), order.quota, order.read(pool, entry.reads), order.seed))
        texts = tuple(pool.text(int(i)) for i in found.taken)
        return Written(texts, weights=None if found.weights is None else tuple(map(float, found.weights)))
    readings = _of_classes(order, entry)
    chosen: list[str] = []
    labels: list[str] = []
    weights: list[float] = []
    for label, name in enumerate(pool.classes):
        members = (pool.labels == label).nonzero()[0]
        found = select(Task(pool, members, order.quota, readings, order.seed))
        chosen += [pool.text(int(members[i])) for i in found.taken]
        labels += [name] * len(found.taken)
        weights += [1.0] * len(found.taken) if found.weights is None else found.weights.tolist()
    return Written(tuple(chosen), tuple(labels), tuple(weights) if len(set(weights)) > 1 else None)


def _of_classes(order: Order, entry: Method) -> Readings:
    """Readings whose gradients and errors are of a classifier on the mean states."""
    columns = {"gradients": "means", "errors": "means"}
    read = tuple(dict.fromkeys(columns.get(column, column) for column in entry.reads))
    assert order.pool.labels is not None
    return LabelledReadings(order.read(order.pool, read), order.pool.labels)


def drawn(pool: Pool, count: int, seed: int) -> NDArray[np.int64]:
    """`count` pieces at random, in their order; with labels an equal share of each class, or all of a smaller one."""
    order = np.random.default_rng(seed).permutation(len(pool))
    if pool.labels is None:
        return np.sort(order[:count])
    share = -(-count // len(pool.classes))
    labels = pool.labels[order]
    parts = [order[labels == label][:share] for label in range(len(pool.classes))]
    return np.sort(np.concatenate(parts))


def within(written: Written, tokens: int, tokenizer: Any) -> Written:
    """The first of the texts, the last one cut, so that a tokenizer gives them no more tokens than were asked for.

    It may cut a text that a model wrote, or one out of a longer one, into more tokens than were counted before.
    """
    kept: list[str] = []
    for whole in written.texts:
        text = whole
        spans = _spans(text, tokenizer)
        while len(spans) > tokens:
            text = text[: min(spans[tokens][0], len(text) - 1)]
            spans = _spans(text, tokenizer)
        if text:
            kept.append(text)
            tokens -= len(spans)
        if text != whole:
            break
    labels, weights = written.labels, written.weights
    return Written(tuple(kept), labels and labels[: len(kept)], weights and weights[: len(kept)])


def _spans(text: str, tokenizer: Any) -> list[tuple[int, int]]:
    """Where in the text each of its tokens lies."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(encoded["offset_mapping"])


def _write(out: Path, written: Written, pool: Pool) -> None:
    with atomic_file(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        for i, text in enumerate(written.texts):
            record: dict[str, Any] = {"text": text}
            if written.labels is not None:
                record["label"] = pool.label_of(written.labels[i])
            if written.weights is not None:
                record["weight"] = float(f"{written.weights[i]:.6g}")  # never 0
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
