"""Calibration text: files, hub datasets, and the model's own, seeded and cached."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.calibration import first_ids, licence_of, read_texts, read_weighted, self_generated, text_set, too_few
from edgeprune.errors import BadInput
from edgeprune.files import cache_dir
from edgeprune.models import Model
from edgeprune.writing import continued


def test_own_text_is_seeded_cached_and_of_the_length_asked_for(tiny: Model) -> None:
    one = self_generated(tiny, count=4, length=24, seed=3)
    calls: list[int] = []
    again = self_generated(tiny, count=4, length=24, seed=3, progress=lambda done, _: calls.append(done))
    assert not calls, "the second call reads the cache"
    assert one.hash == again.hash and one.texts == again.texts
    assert self_generated(tiny, count=4, length=24, seed=4).hash != one.hash
    assert len(one.ids) == 4 and all(2 <= len(ids) <= 24 for ids in one.ids)
    special = set(tiny.tokenizer.all_special_ids)
    assert not any(int(i) in special for ids in one.ids for i in ids)


def test_text_of_few_tokens_is_told_with_the_neurons(tiny: Model, tmp_path: Path) -> None:
    text, neurons = tmp_path / "text.txt", tiny.shape.layers[0].neurons
    text.write_text("the wind went round the house and found no door " * 200, encoding="utf-8")
    few, enough = (text_set(tiny, str(text), count=count, length=8) for count in (neurons // 8, neurons // 4))
    assert f"{neurons} tokens, and a layer {neurons} neurons" in str(too_few(few, tiny.shape))
    assert too_few(enough, tiny.shape) is None


def test_own_text_goes_on_where_it_was_interrupted(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("edgeprune.writing.ROWS", 2)
    whole = self_generated(tiny, count=4, length=24, seed=7)
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path))
    done: list[int] = []

    def interrupt(written: int, _wanted: int) -> None:
        done.append(written)
        if written == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        self_generated(tiny, count=4, length=24, seed=7, progress=interrupt)
    assert self_generated(tiny, count=4, length=24, seed=7, progress=lambda n, _: done.append(n)).hash == whole.hash
    assert done == [2, 4, 6]
    assert not list(cache_dir().rglob("*.partial.json"))


def test_own_text_ends_with_the_time(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprune.writing.ROWS", 3)
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("edgeprune.writing.time", SimpleNamespace(monotonic=lambda: next(clock)))  # ten seconds a batch
    told: list[tuple[int, int]] = []
    some = self_generated(tiny, count=40, length=24, seed=8, seconds=45, progress=lambda *both: told.append(both))
    assert told == [(3, 12), (6, 12), (9, 12), (12, 12)] and len(some.ids) == 8
    one = self_generated(tiny, count=40, length=24, seed=8, seconds=1)
    assert len(one.ids) == 2, "a batch there is always"
    assert self_generated(tiny, count=4, length=24, seed=8, seconds=900).hash == (
        self_generated(tiny, count=4, length=24, seed=8).hash
    ), "no more than was asked for"


def test_own_text_keeps_the_low_perplexity_part(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, str]] = []

    def watched(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        texts, nlls = continued(*args)
        drawn.extend(zip(nlls.tolist(), tiny.tokenizer.batch_decode(texts), strict=True))
        return texts, nlls

    monkeypatch.setattr("edgeprune.calibration.continued", watched)
    kept = self_generated(tiny, count=6, length=24, seed=11)
    best = [tiny.tokenizer(text, add_special_tokens=False)["input_ids"][:24] for _, text in sorted(drawn)[:6]]
    assert len(drawn) == 9 and [ids.tolist() for ids in kept.ids] == best


def test_own_ids_are_the_tokenizers_own(tiny: Model) -> None:
    for text, ids in zip(*(lambda s: (s.texts, s.ids))(self_generated(tiny, count=4, length=24, seed=5)), strict=True):
        assert tiny.tokenizer.decode(ids) == text


def test_plain_text_is_cut_into_pieces(tiny: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("The kettle sings before the water boils. " * 50)
    pieces = text_set(tiny, str(path), count=3, length=16)
    assert [len(ids) for ids in pieces.ids] == [16, 16, 16]
    assert torch.equal(torch.cat(pieces.ids), torch.tensor(tiny.tokenizer(path.read_text())["input_ids"][:48]))


def test_records_give_their_fields_in_order(tmp_path: Path) -> None:
    records = [{"instruction": "Add.", "input": "1 and 2", "output": "3", "id": 7}, {"text": "plain"}, "bare"]
    lines = "\n".join(json.dumps(r) for r in records)
    expected = ["Add.\n1 and 2\n3", "plain", "bare"]
    (tmp_path / "a.jsonl").write_text(lines + "\n\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "a.json").write_text(json.dumps(records))
    for name in ("a.jsonl", "a.jsonl.gz", "a.json"):
        assert list(read_texts(tmp_path / name)) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"  \n", "empty"),
        ("a.txt", b"\xff\xfe\x00", "UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{oops', "line 2"),
        ("a.jsonl", b'{"label": 1}\n', "no record has a text field"),
        ("a.json", b'{"text": "x"}', "list of records"),
        ("a.jsonl.gz", b"not gzip", "cannot read"),
    ],
)
def test_bad_files_say_where_and_what(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        list(read_texts(path))
    assert str(path) in str(caught.value)


def test_half_a_character_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_text('{"text": "cut \\ud83d here"}\n"alone \\udc00"\n')
    assert list(read_texts(path)) == ["cut ? here", "alone ?"]


def test_weights_matter_to_those_who_use_them(tiny: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "One."}\n{"text": "Two.", "weight": null}\n')
    assert list(read_texts(path)) == ["One.", "Two."]
    assert text_set(tiny, str(path), count=2, length=2).tokens > 0
    with pytest.raises(BadInput, match="text 2 has weight None; give a number above 0"):
        list(read_weighted(path))


def test_a_name_that_is_no_file_and_no_dataset(tiny: Model) -> None:
    with pytest.raises(BadInput, match="hub dataset"):
        text_set(tiny, "nobody/no-such-dataset", count=1, length=8)


def test_the_licence_of_a_text_is_what_stands_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Hello.")
    assert licence_of(str(text)) is None
    (tmp_path / "text.txt.license").write_text("SPDX-FileCopyrightText: A\nSPDX-License-Identifier: CC-BY-SA-4.0\n")
    assert licence_of(str(text)) == "CC-BY-SA-4.0"

    card = huggingface_hub.DatasetCard("---\nlicense: odc-by\n---\n# C4\n")
    monkeypatch.setattr(huggingface_hub.DatasetCard, "load", lambda name: card if name == "a/c4" else 1 / 0)
    assert licence_of("a/c4:en") == "odc-by"
    assert licence_of("a/unknown") is None


def test_short_texts_make_up_the_same_number_of_tokens(tiny: Model, tmp_path: Path) -> None:
    path = tmp_path / "short.jsonl"
    path.write_text("".join(json.dumps({"text": "one two three four five six " * 3}) + "\n" for _ in range(200)))
    texts = text_set(tiny, str(path), count=8, length=64, seed=0)
    assert len(texts.ids) > 8 and 8 * 64 - 8 < texts.tokens <= 8 * 64


@given(st.text(max_size=400), st.integers(1, 40))
def test_of_a_long_text_no_more_is_tokenised_than_is_wanted(text: str, count: int) -> None:
    tokenizer = byte_tokenizer()
    whole = tokenizer(text * 20)["input_ids"]
    found = first_ids(tokenizer, text * 20, count)
    assert found[:count] == whole[:count] and len(found) <= max(64 * count, 8 * (count + 64))


def byte_tokenizer() -> Any:
    """A stand-in that gives each byte a token."""
    return lambda text, **_options: {"input_ids": list(text.encode())}
