"""Where calibration and held-out text comes from: a file, a hub dataset, or the model itself.

Text the model writes itself needs no download and lies near what it was trained on, which matters more for
calibration than the quality of the text (arXiv 2410.17711).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from edgeprune.errors import BadInput, missing_extra
from edgeprune.files import cache_dir, read_json, write_json
from edgeprune.importance import text_hash
from edgeprune.models import Model
from edgeprune.precision import fast_copy, fast_products

SCHEMA_VERSION = 2
SELF_GENERATED = "self-generated"
HELD_OUT_SEED = 1 << 20  # of text to judge on: far from any seed that calibration text is written with
_PREFIX_TOKENS = 2  # random words the model continues: enough to vary the topic
_SURPLUS = 1.5  # texts written for each text kept; those of highest perplexity go
_ROWS_AT_ONCE = 48  # texts written side by side: one read of the weights serves them all
_TEXT_FIELDS = (
    "text",
    "content",
    "instruction",
    "question",
    "context",
    "input",
    "prompt",
    "response",
    "output",
    "answer",
)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TextSet:
    """Texts and their token ids, without BOS."""

    texts: tuple[str, ...]
    ids: tuple[torch.Tensor, ...]  # (length,) each, int64
    source: str

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(len(ids) for ids in self.ids)

    @property
    def hash(self) -> str:
        """SHA-256 over the token ids."""
        return text_hash(self.ids)


def record_text(record: Any) -> str:
    """The text of one JSON record: its known fields, joined in the record's order."""
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        return ""
    return "\n".join(v for k, v in record.items() if k in _TEXT_FIELDS and isinstance(v, str) and v)


def read_texts(path: Path) -> Iterator[str]:
    """Texts of a .txt file (whole), or of the records of a .jsonl, .jsonl.gz or .json (list) file.

    Raises:
        BadInput: unreadable, no UTF-8, broken JSON (with its line), or no text in it.
    """
    try:
        if path.suffix == ".gz":
            raw = gzip.decompress(path.read_bytes()).decode("utf-8")
        else:
            raw = path.read_text(encoding="utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read the text ({error})", where=path, remedy="give UTF-8 text or JSONL") from error
    suffixes = path.suffixes
    if ".jsonl" in suffixes:
        found = False
        for number, line in enumerate(raw.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                text = record_text(json.loads(line))
            except ValueError as error:
                raise BadInput(f"line {number} is not JSON ({error})", where=path) from error
            if text:
                found = True
                yield text
        if not found:
            raise BadInput(f"no record has a text field ({', '.join(_TEXT_FIELDS)})", where=path)
        return
    if ".json" in suffixes:
        try:
            records = json.loads(raw)
        except ValueError as error:
            raise BadInput(f"not JSON ({error})", where=path) from error
        texts = [text for record in records if (text := record_text(record))] if isinstance(records, list) else []
        if not texts:
            raise BadInput("expected a list of records with text", where=path)
        yield from texts
        return
    if not raw.strip():
        raise BadInput("the text is empty", where=path)
    yield raw


def _hub_texts(name: str) -> Iterator[str]:
    """Texts of the training split of a hub dataset, streamed; `name` may end in `:config`."""
    try:
        import datasets
    except ImportError as error:
        raise missing_extra("datasets", "eval") from error
    repository, _, config = name.partition(":")
    try:
        stream = datasets.load_dataset(repository, config or None, split="train", streaming=True)
        for record in stream:
            if text := record_text(record):
                yield text
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(
            f"no file and no hub dataset of that name could be read ({type(error).__name__}: {error})",
            where=name,
            remedy="give a text or JSONL file, or leave the option out",
        ) from error


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


def take(model: Model, texts: Iterator[str], source: str, *, count: int, length: int) -> TextSet:
    """The first `count` pieces of up to `length` tokens; long texts are cut into several pieces."""
    ids: list[torch.Tensor] = []
    for text in texts:
        # Longer than the model's context is no mistake here: it is cut below.
        encoded = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        tokens = torch.tensor(encoded, dtype=torch.int64)
        ids += [piece for piece in torch.split(tokens, length) if len(piece) >= min(length, 8)]
        if len(ids) >= count:
            break
    ids = ids[:count]
    if not ids:
        raise BadInput("the text has too few tokens", where=source)
    return TextSet(tuple(model.tokenizer.decode(piece) for piece in ids), tuple(ids), source)


def retokenized(texts: TextSet, tokenizer: Any) -> TextSet:
    """The same texts in another tokenizer's tokens."""
    ids = tuple(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts.texts)
    return TextSet(texts.texts, ids, texts.source)


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
    path = Path(source).expanduser()
    texts = read_texts(path) if path.exists() else _hub_texts(source)
    return take(model, texts, source, count=count, length=length)


def _start_words(tokenizer: Any) -> torch.Tensor:
    """Ids of tokens that begin a word of three letters or more: what a text may start with."""
    special = set(tokenizer.all_special_ids)
    ids = [
        i
        for token, i in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        if i not in special and token[:1] in "Ġ▁" and token[1:].isalpha() and len(token) > 3
    ]
    # A vocabulary without word marks (a byte-level toy) still has ids to start from.
    return torch.tensor(ids or [i for i in range(len(tokenizer)) if i not in special])


def sample(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One id a row by the inverse of the cumulative distribution, which is several times as quick as multinomial.

    Args:
        logits: (rows, vocabulary), float32; -inf for what cannot be drawn.

    Returns:
        (rows, 1), int64.
    """
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
    # In (0, 1]: an id of probability 0 is never the first whose cumulative probability reaches it.
    drawn = 1.0 - torch.rand(len(logits), 1, generator=generator, dtype=torch.float64)
    return torch.searchsorted(cumulative, drawn * cumulative[:, -1:])


@torch.inference_mode()
def _write(model: Model, module: Any, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """`rows` sampled continuations of random words at temperature 1, by `module`: (rows, length)."""
    words = _start_words(model.tokenizer)
    pick = torch.randint(len(words), (rows, _PREFIX_TOKENS), generator=generator)
    tokens = [words[pick]]
    banned = torch.tensor(sorted(set(model.tokenizer.all_special_ids)), dtype=torch.int64)
    cache = None
    step = tokens[0]
    for _ in range(length - _PREFIX_TOKENS):
        result = module(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = result.past_key_values
        logits = result.logits[:, -1].float()
        logits[:, banned] = -torch.inf  # a text goes on to its length
        step = sample(logits, generator)
        tokens.append(step)
    return torch.cat(tokens, dim=1)


@torch.inference_mode()
def mean_nll(module: Any, ids: torch.Tensor) -> float:
    """Mean negative log-likelihood, in nats, of the tokens of one text, (length,), after the first."""
    with fast_products():
        logits = module(input_ids=ids[None], use_cache=False).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits.float(), ids[1:]))


def self_generated(model: Model, *, count: int, length: int, seed: int, progress: Progress | None = None) -> TextSet:
    """Texts the model samples from random first words, the low-perplexity ones of them; cached by model and seed."""
    key = hashlib.sha256(
        json.dumps([SCHEMA_VERSION, model.hash, count, length, seed, _PREFIX_TOKENS, _SURPLUS]).encode()
    ).hexdigest()[:24]
    path = cache_dir() / "texts" / f"{key}.json"
    source = f"{SELF_GENERATED} (seed {seed})"
    if path.exists():
        ids = tuple(torch.tensor(piece) for piece in read_json(path)["ids"])
        return TextSet(tuple(model.tokenizer.decode(piece) for piece in ids), ids, source)
    generator = torch.Generator().manual_seed(seed)
    writer = fast_copy(model.module)
    wanted = round(count * _SURPLUS)
    written: list[tuple[float, torch.Tensor]] = []
    while len(written) < wanted:
        rows = min(_ROWS_AT_ONCE, wanted - len(written))
        for row in _write(model, writer, rows, length, generator):
            # Sampled ids are not always what the tokenizer would give for their text; the text decides.
            text = model.tokenizer.decode(row, skip_special_tokens=True)
            again = torch.tensor(model.tokenizer(text, add_special_tokens=False)["input_ids"][:length])
            written.append((mean_nll(model.module, again) if len(again) > 1 else torch.inf, again))
        if progress:
            progress(len(written), wanted)
    written.sort(key=lambda pair: pair[0])
    ids = tuple(piece for _, piece in written[:count])
    write_json(path, {"schema_version": SCHEMA_VERSION, "source": source, "ids": [piece.tolist() for piece in ids]})
    return TextSet(tuple(model.tokenizer.decode(piece) for piece in ids), ids, source)


def held_out_text(
    model: Model, *, windows: int, length: int, seed: int = 0, progress: Progress | None = None
) -> TextSet:
    """Text to judge on that the model writes itself, enough for `windows` of `length` tokens when joined to one text.

    Its seed is one that calibration text never has. Two texts are to spare: joined and tokenized again, they may come
    out a little shorter.
    """
    return self_generated(model, count=windows + 2, length=length, seed=seed + HELD_OUT_SEED, progress=progress)
