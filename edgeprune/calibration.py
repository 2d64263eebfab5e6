"""Where calibration and held-out text comes from: a file, a hub dataset, or the model itself.

Text the model writes itself needs no download and lies near what it was trained on, which matters more for
calibration than the quality of the text (arXiv 2410.17711).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgeprune.corpus import TEXT_FIELDS, Corpus, hub_records, record_text, records, text_path
from edgeprune.errors import BadInput
from edgeprune.files import cache_dir, read_json, write_json
from edgeprune.importance import text_hash
from edgeprune.models import Model, companions_hash
from edgeprune.precision import fast_copy
from edgeprune.runtimes.pytorch import bos_of
from edgeprune.shape import ModelShape
from edgeprune.writing import Progress, continued, in_batches, start_words

SCHEMA_VERSION = 4
_MOST_WEIGHT = 1e30
SELF_GENERATED = "self-generated"
HELD_OUT_SEED = 1 << 20  # of text to judge on: far from any seed that calibration text is written with
_PREFIX_TOKENS = 2  # random words the model continues: enough to vary the topic
_MOST_SPARE = 4  # times the texts wanted: a model that then still writes too little is left to the reader's error
_SURPLUS = 1.5  # texts written for each text kept; those of highest perplexity go


@dataclass(frozen=True)
class TextSet:
    """Texts and their token ids."""

    texts: tuple[str, ...]
    ids: tuple[torch.Tensor, ...]  # (length,) each, int64, without BOS
    source: str
    bos: int | None = None  # what the tokenizer puts before every text

    @property
    def tokens(self) -> int:
        """Number of tokens, without BOS."""
        return sum(len(ids) for ids in self.ids)

    @property
    def begun(self) -> tuple[torch.Tensor, ...]:
        """Token ids as the model is to read them: with BOS where it was never without."""
        return self.ids if self.bos is None else tuple(torch.cat([ids.new_tensor([self.bos]), ids]) for ids in self.ids)

    @property
    def hash(self) -> str:
        """SHA-256 over the token ids."""
        return text_hash(self.begun)


def read_texts(path: Path) -> Iterator[str]:
    """Texts of a .txt file (whole), or of the records of a .jsonl, .jsonl.gz or .json (list) file.

    Raises:
        BadInput: unreadable, no UTF-8, broken JSON (with its line), or no text in it.
    """
    return (text for text, _ in _texts(path))


def read_weighted(path: Path) -> Iterator[tuple[str, float]]:
    """The same texts with what each counts for: the number in a record's field "weight", else 1.

    Raises:
        BadInput: as `read_texts`, or a weight that is no number above 0.
    """
    for number, (text, weight) in enumerate(_texts(path), start=1):
        if not isinstance(weight, (int, float)) or not 0 < weight < _MOST_WEIGHT:
            raise BadInput(f"text {number} has weight {weight!r}", where=path, remedy="give a number above 0")
        yield text, float(weight)


def _texts(path: Path) -> Iterator[tuple[str, Any]]:
    """The texts of a file, and what their records have for a weight."""
    found = False
    for record in _records(path):
        if text := record_text(record):
            found = True
            yield text, record.get("weight", 1.0) if isinstance(record, dict) else 1.0
    if not found:
        fields = ", ".join(TEXT_FIELDS)
        raise BadInput(f"it is empty, or no record has a text field ({fields})", where=path)


def weighted_texts(source: str) -> Iterator[tuple[str, float]]:
    """The texts of a file, or of a hub dataset's stream, with what each counts for.

    Raises:
        BadInput: as `read_weighted`, or no dataset of that name can be read.
    """
    path = text_path(source)
    return ((text, 1.0) for text in _hub_texts(source)) if path is None else read_weighted(path)


def _hub_texts(name: str) -> Iterator[str]:
    return filter(None, map(record_text, hub_records(name)))


def weights_of(texts: Sequence[tuple[str, float]] | None) -> list[float] | None:
    """What each text counts for; None where all count alike."""
    weights = [weight for _, weight in texts or ()]
    return weights if len(set(weights)) > 1 else None


def _records(path: Path) -> Iterator[Any]:
    """What a file holds: JSON values, or the text of a text file as one."""
    if ".jsonl" in path.suffixes:
        yield from (record for _, record in records(Corpus((path,), "")))
        return
    try:
        if path.suffix == ".gz":
            raw = gzip.decompress(path.read_bytes()).decode("utf-8")
        else:
            raw = path.read_text(encoding="utf-8")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise BadInput(f"cannot read the text ({error})", where=path, remedy="give UTF-8 text or JSONL") from error
    if ".json" in path.suffixes:
        try:
            found = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"not JSON ({error})", where=path) from error
        if not isinstance(found, list):
            raise BadInput("expected a list of records with text", where=path)
        yield from found
    elif raw.strip():
        yield raw


def licence_of(source: str) -> str | None:
    """The licence of a text, as a file `NAME.license` beside it (REUSE) or a hub dataset's card states it; else None.

    Source of the former: https://reuse.software/spec-3.3 (`SPDX-License-Identifier`).
    """
    path = Path(source).expanduser()
    if path.exists():
        beside = path.with_name(f"{path.name}.license")
        text = beside.read_text(encoding="utf-8", errors="replace") if beside.is_file() else ""
        found = re.search(r"SPDX-License-Identifier:\s*(\S.*)", text)
        return found[1].strip() if found else None
    try:
        from huggingface_hub import DatasetCard

        stated = DatasetCard.load(source.partition(":")[0]).data.license
    except Exception:  # of the network or of the card, and the text has been read without it
        return None
    return ", ".join(stated) if isinstance(stated, list) else stated


def first_ids(tokenizer: Any, text: str, count: int) -> list[int]:
    """The first `count` token ids of a text, or more: of a large file no more is tokenised than that takes."""
    characters = 16 * count
    while True:
        ids: list[int] = tokenizer(text[:characters], add_special_tokens=False, verbose=False)["input_ids"]
        # Where the text is cut the last tokens may be others than in the whole of it.
        if characters >= len(text) or len(ids) > count + 64:
            return ids
        characters *= 2


def take(model: Model, texts: Iterator[str], source: str, *, count: int, length: int) -> TextSet:
    """The first `count` · `length` tokens in pieces of up to `length`; long texts are cut into several pieces."""
    ids: list[torch.Tensor] = []
    room = count * length
    for text in texts:
        # Longer than the model's context is no mistake here: it is cut below.
        tokens = torch.tensor(first_ids(model.tokenizer, text, room), dtype=torch.int64)
        for piece in torch.split(tokens[:room], length):
            if len(piece) >= min(length, 8):
                ids.append(piece)
                room -= len(piece)
        if room < min(length, 8):
            break
    if not ids:
        raise BadInput("the text has too few tokens", where=source)
    return _text_set(model, ids, source)


def too_few(texts: TextSet, shape: ModelShape) -> str | None:
    """What to say of a calibration text too short for least squares; None if it is long enough.

    A layer's Gram matrix has full rank only with as many tokens as neurons; about as many fit themselves, not the text.
    """
    neurons = max(layer.neurons for layer in shape.layers)
    if texts.tokens >= 2 * neurons:
        return None
    return f"the calibration text has {texts.tokens:,} tokens, and a layer {neurons:,} neurons: give a longer one"


def _text_set(model: Model, ids: Sequence[torch.Tensor], source: str) -> TextSet:
    texts = tuple(model.tokenizer.decode(piece) for piece in ids)
    return TextSet(texts, tuple(ids), source, bos_of(model.tokenizer))


def retokenized(texts: TextSet, tokenizer: Any) -> TextSet:
    """The same texts in another tokenizer's tokens."""
    ids = tuple(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts.texts)
    return TextSet(texts.texts, ids, texts.source, bos_of(tokenizer))


def text_set(
    model: Model,
    source: str | None,
    *,
    count: int,
    length: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> TextSet:
    """`count` texts of `length` tokens from `source`: a file, a hub dataset, or (None) the model itself.

    Raises:
        BadInput: a source that cannot be read.
    """
    if source is None:
        return self_generated(model, count=count, length=length, seed=seed, progress=progress)
    path = text_path(source)
    texts = _hub_texts(source) if path is None else read_texts(path)  # without weights, which may be none
    return take(model, texts, source, count=count, length=length)


def self_generated(
    model: Model,
    *,
    count: int,
    length: int,
    seed: int,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> TextSet:
    """Texts the model samples from random first words, the low-perplexity ones of them; cached by model and seed.

    Args:
        count: of texts; the most, where `seconds` are given.
        length: of each, in tokens.
        seconds: about as long may the writing take.
    """
    if length <= _PREFIX_TOKENS:
        raise BadInput(f"texts of {length} tokens", remedy=f"ask for more: {_PREFIX_TOKENS} are drawn at random")
    depends = [SCHEMA_VERSION, model.hash, companions_hash(model.folder), count, length, seed, _PREFIX_TOKENS, _SURPLUS]
    if seconds is not None:
        depends.append(seconds)
    key = hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:24]
    path = cache_dir() / "texts" / f"{key}.json"
    source = f"{SELF_GENERATED} (seed {seed})"
    if path.exists():
        return _text_set(model, [torch.tensor(piece) for piece in read_json(path)["ids"]], source)
    generator = torch.Generator().manual_seed(seed)
    writer = fast_copy(model.module)
    words = start_words(model.tokenizer)

    def write(rows: int) -> list[tuple[float, list[int]]]:
        begun = words[torch.randint(len(words), (rows, _PREFIX_TOKENS), generator=generator)]
        found = []
        for row, nll in zip(*continued(model, writer, begun, length, generator), strict=True):
            # Sampled ids are not always what the tokenizer would give for their text; the text decides.
            text = model.tokenizer.decode(row, skip_special_tokens=True)
            again = model.tokenizer(text, add_special_tokens=False)["input_ids"][:length]
            found.append((float(nll) if len(again) > 1 else float("inf"), again))
        return found

    partial = path.with_suffix(".partial.json")
    written = in_batches(partial, round(count * _SURPLUS), generator, write, progress, seconds=seconds)
    written.sort(key=lambda pair: pair[0])
    ids = tuple(torch.tensor(piece) for _, piece in written[: round(len(written) / _SURPLUS)])
    write_json(path, {"schema_version": SCHEMA_VERSION, "source": source, "ids": [piece.tolist() for piece in ids]})
    partial.unlink(missing_ok=True)
    return _text_set(model, ids, source)


def held_out_text(
    model: Model, *, windows: int, length: int, seed: int = 0, progress: Progress | None = None
) -> TextSet:
    """Text to judge on that the model writes itself, enough for `windows` of `length` tokens when joined to one text.

    Its seed is one that calibration text never has. Joined and tokenized again, texts may come out shorter: two are to
    spare, and more are written where that is not enough.
    """
    spare = 2
    while True:
        found = self_generated(
            model, count=windows + spare, length=length, seed=seed + HELD_OUT_SEED, progress=progress
        )
        ids = model.tokenizer("\n\n".join(found.texts), add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= windows * length or spare > _MOST_SPARE * windows:
            return found
        spare += windows
