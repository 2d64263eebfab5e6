"""Vocabulary pruning: what is kept, that text survives, and that every file agrees."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unicodedata import category

import numpy as np
import pytest
import torch
from conftest import SENTENCES, MakeLlama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_tokenizer import ANY_TEXT, KINDS, SENTENCEPIECE
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer import Typer
from typer.testing import CliRunner

from edgeprune.cli_vocabulary import vocabulary as command
from edgeprune.corpus import corpus
from edgeprune.errors import BadInput
from edgeprune.export.gguf_writer import write_gguf, write_metadata
from edgeprune.files import write_json
from edgeprune.gguf_vocabulary import gguf_vocabulary
from edgeprune.runtimes.gguf_file import GgufFile
from edgeprune.runtimes.llamacpp import LlamaCpp
from edgeprune.runtimes.llamacpp_vocabulary import Vocabulary
from edgeprune.runtimes.pytorch import load_tokenizer
from edgeprune.tokenizer_proof import PROOF_TEXTS, prove_same_ids
from edgeprune.vocabulary import closure, derive, keep_tokens, read_vocabulary, smallest
from edgeprune.vocabulary_counts import count_tokens
from edgeprune.vocabulary_plan import PLAN_FILE, VocabularyPlan, folder_vocabulary, plan_vocabulary, wanted_size
from edgeprune.vocabulary_surgery import prune_vocabulary
from edgeprune.vocabulary_tokenizer import Renumbering, pruned_ids, pruned_tokenizer
from edgeprune.vocabulary_usage import constant_direction, misfit, prior_shift

STRINGS = st.text(max_size=30) | ANY_TEXT


def spec_of(tokens: list[str], merges: list[tuple[str, str]], **model: Any) -> dict[str, Any]:
    """A tokenizer.json of a byte-pair vocabulary without anything around it."""
    return {"model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges, **model}}


SMALL = spec_of(["a", "b", "c", "ab", "bc", "abc", "abcabc"], [("a", "b"), ("b", "c"), ("ab", "c"), ("abc", "abc")])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "corpus" / "text.txt"
    path.parent.mkdir()
    path.write_text("The kettle sings before the water boils. " * 160, encoding="utf-8")
    return path


# --- the choice


def test_a_token_goes_before_what_it_is_built_from_and_its_uses_pass_on() -> None:
    vocabulary = read_vocabulary(SMALL)
    assert vocabulary.pieces[5] == (3, 2) and vocabulary.pieces[6] == (5, 5)
    assert vocabulary.fixed == {0, 1, 2} and smallest(vocabulary) == 3
    counts = np.array([1.0, 1, 1, 0, 9, 0, 4])
    choice = keep_tokens(vocabulary, counts, 6)  # "abcabc" (4 uses) is cheaper than "bc" (9); "ab" and "abc" are needed
    assert choice.kept.tolist() == [0, 1, 2, 3, 4, 5]
    assert choice.uses.tolist() == [1, 1, 1, 0, 9, 8, 0]
    assert keep_tokens(vocabulary, counts, 5).kept.tolist() == [0, 1, 2, 3, 4]  # 8 uses of "abc" now, 9 of "bc"
    assert keep_tokens(vocabulary, counts, 3).kept.tolist() == [0, 1, 2]
    assert keep_tokens(vocabulary, counts, 99).kept.tolist() == list(range(7))
    with pytest.raises(BadInput, match="3 tokens have to stay, 2 were asked for"):
        keep_tokens(vocabulary, counts, 2)
    with pytest.raises(BadInput, match="counts of shape"):
        keep_tokens(vocabulary, counts[:3], 5)


def test_rows_without_a_token_go_first() -> None:
    vocabulary = read_vocabulary(SMALL, rows=9, fixed=[8])
    choice = keep_tokens(vocabulary, np.zeros(9), 7)
    assert choice.kept.tolist() == [0, 1, 2, 3, 4, 5, 8]


def test_closure_holds_what_tokens_are_built_from() -> None:
    assert closure(read_vocabulary(SMALL), [6]).tolist() == [0, 1, 2, 3, 5, 6]


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_what_is_kept_is_always_whole(data: st.DataObject) -> None:
    """Random vocabularies: the kept ids hold all fixed ones and every piece, and each kept token is still made."""
    tokens, merges = list("abcd"), []
    for _ in range(data.draw(st.integers(0, 25))):
        pair = data.draw(st.sampled_from(tokens)), data.draw(st.sampled_from(tokens))
        if "".join(pair) not in tokens and len("".join(pair)) < 30:
            tokens.append("".join(pair))
            merges.append(pair)
    vocabulary = read_vocabulary(spec_of(tokens, merges))
    counts = np.array(data.draw(st.lists(st.integers(0, 9), min_size=len(tokens), max_size=len(tokens))), dtype=float)
    size = data.draw(st.integers(smallest(vocabulary), len(tokens)))
    choice = keep_tokens(vocabulary, counts, size)
    kept = set(choice.kept.tolist())
    assert len(kept) == size and set(closure(vocabulary, kept).tolist()) == kept
    assert sum(choice.uses) >= counts[[i for i in range(len(tokens)) if vocabulary.order[i] >= 0 or i < 4]].sum()
    left = json.loads(json.dumps(pruned_tokenizer(spec_of(tokens, merges), Renumbering(choice.kept, len(tokens)))))
    ranks = {tuple(pair): place for place, pair in reversed(list(enumerate(left["model"]["merges"])))}
    for index in kept:
        if vocabulary.order[index] >= 0:
            assert derive(tokens[index], ranks)[0] == [tokens[index]]


def test_bytes_take_over_from_characters_but_not_from_the_space() -> None:
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "é", "a", "éa"]
    vocabulary = read_vocabulary(
        spec_of(tokens, [("é", "a")], byte_fallback=True, unk_token="<unk>"),
    )
    assert vocabulary.pieces[258] == (1 + 0xC3, 1 + 0xA9)
    assert vocabulary.fixed == {*range(258), 259}  # "a" as a byte saves nothing: the model never met it like that
    counts = np.ones(len(tokens))
    assert keep_tokens(vocabulary, counts, 259).kept.tolist() == [*range(258), 259]


def test_a_character_that_is_used_outlives_words_that_are_not() -> None:
    """Bytes are all but unknown to a model with characters: `é` as two of them costs two tokens a use, not one."""
    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), "é", "a", "b", "aa", "bb"]
    vocabulary = read_vocabulary(spec_of(tokens, [("a", "a"), ("b", "b")], byte_fallback=True))
    counts = np.zeros(len(tokens))
    counts[[256, 259, 260]] = 4, 5, 7
    assert keep_tokens(vocabulary, counts, 260).kept.tolist() == [*range(259), 260]  # 5 tokens longer; "é" would be 8
    assert keep_tokens(vocabulary, counts, 259).kept.tolist() == list(range(259))


def test_tokens_taken_whole_pass_their_uses_to_what_merges_make_of_them() -> None:
    tokens, merges = ["a", "b", "c", "ab", "abc"], [("a", "b")]
    assert read_vocabulary(spec_of(tokens, merges)).pieces[4] == ()  # nothing makes it: it goes for free
    assert read_vocabulary(spec_of(tokens, merges, ignore_merges=True)).pieces[4] == (3, 2)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "a Unigram tokenizer cannot be pruned"),
        ({}, "a nameless tokenizer"),
        (spec_of(["a"], [], end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (spec_of(["a", "b"], [("a", "b")]), "has a part that is no token"),
        (spec_of(["a", "b"], ["a b c"]), "is not a pair"),  # type: ignore[list-item]
        ({**spec_of(["a"], []), "added_tokens": [{"content": "<s>", "id": 0}]}, "two tokens share an id"),
        ({**spec_of(["a"], []), "added_tokens": [{"content": "<s>", "id": 7}]}, "the embedding only 2 rows"),
        (spec_of(["a", "b" * 2000], []), "2000 characters"),
    ],
)
def test_refusals_name_the_reason(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        read_vocabulary(spec, rows=2)


# --- counting


def test_counts_are_those_of_the_text_in_any_form(tmp_path: Path, tiny_folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    expected = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for sentence in SENTENCES:
        np.add.at(expected, tokenizer.encode(sentence).ids, 1)
    folder = tmp_path / "many"
    folder.mkdir()
    records = [json.dumps({"id": i, "text": sentence}) for i, sentence in enumerate(SENTENCES)]
    (folder / "a.jsonl").write_text("\n".join(records[:3]) + "\n\n", encoding="utf-8")
    with gzip.open(folder / "b.jsonl.gz", "wt", encoding="utf-8") as out:
        out.write("\n".join(records[3:]))
    (folder / "notes.md").write_text("not counted")
    counted = count_tokens(tokenizer, corpus([folder]))
    assert np.array_equal(counted.counts, expected)
    assert counted.n_bytes == sum(len(sentence.encode()) for sentence in SENTENCES)
    assert counted.files == ("a.jsonl", "b.jsonl.gz")
    assert np.array_equal(count_tokens(tokenizer, corpus([folder])).counts, expected)  # from the cache
    assert corpus([folder]).hash != corpus([folder / "a.jsonl"]).hash


def test_a_long_text_is_counted_in_pieces(tmp_path: Path, tiny_folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    text = "The kettle sings before the water boils,\r\nand nobody listens. " * 9000
    (tmp_path / "long.txt").write_text(text, encoding="utf-8", newline="")
    counted = count_tokens(tokenizer, corpus([tmp_path / "long.txt"]))
    assert counted.n_bytes == len(text)
    assert counted.n_tokens == len(tokenizer.encode(text).ids)


def test_bad_corpora_are_refused(tmp_path: Path, tiny_folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{oops\n')
    (tmp_path / "not.txt.gz").write_text("plain")
    (tmp_path / "x.pdf").write_text("")
    (tmp_path / "nothing").mkdir()
    for name, message in [
        ("latin.txt", "cannot read the text"),
        ("empty.txt", "no text"),
        ("bad.jsonl", "line 2 is not JSON"),
        ("not.txt.gz", "cannot read the text"),
        ("x.pdf", "not a corpus file"),
        ("nothing", "no text in this folder"),
        ("absent.txt", "no such file"),
    ]:
        with pytest.raises(BadInput, match=message):
            count_tokens(tokenizer, corpus([tmp_path / name]))
    with pytest.raises(BadInput, match="no corpus"):
        corpus([])


# --- the plan


def shifted(plan: VocabularyPlan) -> VocabularyPlan:
    """The plan with some shift for a hidden state of 64."""
    return replace(
        plan, shift=tuple(np.linspace(0, 1, plan.size).tolist()), direction=tuple(np.linspace(-1, 1, 64).tolist())
    )


def test_sizes_and_ratios(tiny: Any) -> None:
    shape = tiny.shape
    assert wanted_size(shape, size=300) == 288
    assert wanted_size(shape, size=300, multiple=1) == 300
    rows = wanted_size(shape, ratio=0.1, multiple=1)
    gone = (shape.vocab - rows) * shape.hidden / shape.parameters
    assert 0.1 <= gone < 0.1 + shape.hidden / shape.parameters
    with pytest.raises(BadInput, match="size or a ratio"):
        wanted_size(shape)
    for size in (shape.vocab, 10**6):
        with pytest.raises(BadInput, match="nothing to remove"):
            wanted_size(shape, size=size)
    with pytest.raises(BadInput, match="of all parameters"):
        wanted_size(shape, ratio=0.9)


def test_plan_is_reproducible_and_comes_back_from_its_file(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    plan = plan_vocabulary(tiny_folder, [text], size=320, windows=2)
    assert plan == plan_vocabulary(tiny_folder, [text.parent], size=320, windows=2)
    assert plan.size == 320 and plan.expectation_tokens > 0
    assert not plan.shift  # the hidden states of a random model have no direction in common
    plan = shifted(plan)
    assert plan.corpus_bytes == text.stat().st_size
    assert "text.txt" in plan.counted_on()
    plan.save(tmp_path / "plan.json")
    loaded = VocabularyPlan.load(tmp_path / "plan.json")
    assert loaded.kept == plan.kept
    assert np.allclose(loaded.shift, plan.shift, rtol=1e-5)
    for key, value in [("kept", ["5-3"]), ("kept", []), ("shift", "1 2"), ("schema_version", 9), ("size_before", "x")]:
        write_json(tmp_path / "bad.json", {**plan.to_json(), key: value})
        with pytest.raises(BadInput, match="vocabulary plan"):
            VocabularyPlan.load(tmp_path / "bad.json")
    with pytest.raises(BadInput, match="have to stay"):
        plan_vocabulary(tiny_folder, [text], size=64, windows=0)


def test_a_text_becomes_as_much_longer_as_is_told(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    """The text's own counts tell it, not those with the model's expectation, by which tokens are chosen."""
    plan = plan_vocabulary(tiny_folder, [text], size=320, windows=2)
    prune_vocabulary(tiny_folder, plan, tmp_path / "small")
    before, after = (load_tokenizer(each)(text.read_text())["input_ids"] for each in (tiny_folder, tmp_path / "small"))
    assert plan.longer == pytest.approx(len(after) / len(before), rel=0.02)


def test_the_model_speaks_where_the_corpus_is_silent(tiny_folder: Path, text: Path) -> None:
    counted = plan_vocabulary(tiny_folder, [text], size=448, windows=0)
    asked = plan_vocabulary(tiny_folder, [text], size=448, windows=2)
    assert counted.kept != asked.kept and asked.expectation_tokens > counted.expectation_tokens == 0


def test_shift_is_the_log_of_new_over_old_use() -> None:
    shift = prior_shift(np.array([1.0, 2.0, 0.0]), np.array([1.0, 6.0, 5.0]))
    assert np.allclose(shift, [0.0, np.log(3.0), 0.0])


def test_direction_raises_logits_by_about_one() -> None:
    states = np.random.default_rng(0).normal(size=(4000, 8)) * 0.2 + np.arange(1.0, 9.0)
    gram, mean = states.T @ states / len(states), states.mean(axis=0)
    direction = constant_direction(gram, mean)
    assert np.isclose(misfit(direction, gram, mean), ((states @ direction - 1) ** 2).mean())
    assert misfit(np.zeros(8), gram, mean) == 1
    raised = states @ direction
    assert abs(raised.mean() - 1) < 0.02 and raised.std() < 0.1


# --- the pruned folder


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": False}, {"dtype": torch.bfloat16}],
    ids=["tied", "untied", "bfloat16"],
)
def test_kept_tokens_have_the_logits_they_had(
    make_llama: MakeLlama, text: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    source = make_llama(**changes)
    plan = plan_vocabulary(source, [text], size=320, windows=0)
    out = prune_vocabulary(source, plan, tmp_path / "out")
    old, new = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (source, out))
    kept = torch.tensor(plan.kept)
    assert new.config.vocab_size == 320 == new.get_input_embeddings().weight.shape[0]
    ids = torch.arange(0, 320, 7)[None]
    with torch.inference_mode():
        assert torch.allclose(new(ids).logits, old(kept[ids]).logits[..., kept], atol=1e-5)
    assert load_file(out / "model.safetensors")["model.embed_tokens.weight"].dtype == changes.get(
        "dtype", torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(out)
    names = AutoTokenizer.from_pretrained(source).convert_ids_to_tokens(kept.tolist())
    assert tokenizer.convert_ids_to_tokens(range(320)) == names
    assert tokenizer.bos_token_id == new.config.bos_token_id == plan.kept.index(0)
    assert VocabularyPlan.load(out / PLAN_FILE).kept == plan.kept


@pytest.mark.parametrize("tied", [True, False])
def test_the_shift_goes_to_the_head(make_llama: MakeLlama, text: Path, tmp_path: Path, tied: bool) -> None:
    source = make_llama(tie_word_embeddings=tied)
    plan = shifted(plan_vocabulary(source, [text], size=320, windows=0))
    before, after = (
        load_file(folder / "model.safetensors") for folder in (source, prune_vocabulary(source, plan, tmp_path / "out"))
    )
    step = torch.tensor(plan.shift)[:, None] * torch.tensor(plan.direction)
    kept = torch.tensor(plan.kept)
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert torch.allclose(after[head], before[head][kept] + step, atol=1e-6)
    if not tied:
        name = "model.embed_tokens.weight"
        assert torch.equal(after[name], before[name][kept])


def test_shards_keep_their_names(make_llama: MakeLlama, text: Path, tmp_path: Path) -> None:
    source = make_llama()
    model = AutoModelForCausalLM.from_pretrained(source)
    (source / "model.safetensors").unlink()
    model.save_pretrained(source, max_shard_size="100KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    plan = plan_vocabulary(source, [text], size=352, windows=0)
    out = prune_vocabulary(source, plan, tmp_path / "out")
    assert sorted(p.name for p in out.glob("*.safetensors")) == sorted(p.name for p in source.glob("*.safetensors"))
    pruned = AutoModelForCausalLM.from_pretrained(out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.numel() for p in pruned.parameters()) * 4
    assert torch.equal(pruned.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)


def test_padding_rows_go_and_the_files_of_slow_tokenizers_follow(
    make_llama: MakeLlama, text: Path, tmp_path: Path
) -> None:
    source = make_llama(vocab_size=640, eos_token_id=[0, 5])
    spec = json.loads((source / "tokenizer.json").read_text())
    write_json(source / "vocab.json", spec["model"]["vocab"])
    (source / "merges.txt").write_text("#version: 0.2\n")
    (source / "tokenizer.model").write_bytes(b"old ids")
    write_json(source / "added_tokens.json", {"<|endoftext|>": 0})
    write_json(source / "generation_config.json", {"eos_token_id": [0, 7], "suppress_tokens": [511, 1], "top_k": 5})
    plan = plan_vocabulary(source, [text], size=512, windows=0)
    assert plan.kept == tuple(range(512))  # padding alone was enough
    plan = plan_vocabulary(source, [text], size=300, multiple=1, windows=0)
    assert {0, 5, 7} <= set(plan.kept) and plan.size == 300
    out = prune_vocabulary(source, plan, tmp_path / "out")
    tokens = json.loads((out / "tokenizer.json").read_text())["model"]
    assert json.loads((out / "vocab.json").read_text()) == tokens["vocab"]
    assert len((out / "merges.txt").read_text().splitlines()) == 1 + len(tokens["merges"])
    assert json.loads((out / "added_tokens.json").read_text()) == {"<|endoftext|>": plan.kept.index(0)}
    assert not (out / "tokenizer.model").exists()
    generation = json.loads((out / "generation_config.json").read_text())
    suppressed = [plan.kept.index(old) for old in (511, 1) if old in plan.kept]
    assert generation == {
        "eos_token_id": [plan.kept.index(0), plan.kept.index(7)],
        "suppress_tokens": suppressed,
        "top_k": 5,
    }
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [plan.kept.index(0), plan.kept.index(5)]
    for wrong in ({"suppress_tokens": 5}, {"bad_words_ids": [1, 2]}):
        write_json(source / "generation_config.json", wrong)
        with pytest.raises(BadInput, match="lists no ids"):
            prune_vocabulary(source, plan, tmp_path / "wrong")


def test_a_plan_for_another_model_or_with_holes_is_refused(
    make_llama: MakeLlama, tiny_folder: Path, text: Path, tmp_path: Path
) -> None:
    plan = plan_vocabulary(tiny_folder, [text], size=320, windows=0)
    other = make_llama(vocab_size=576)
    with pytest.raises(BadInput, match="another tokenizer or another size"):
        prune_vocabulary(other, plan, tmp_path / "out")
    with pytest.raises(BadInput, match="which is needed"):
        prune_vocabulary(tiny_folder, replace(plan, kept=plan.kept[1:]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_broken_tokenizer_is_one_line(make_llama: MakeLlama, text: Path) -> None:
    source = make_llama()
    good = json.loads((source / "tokenizer.json").read_text())
    for broken in (
        {**good, "model": {"type": "BPE"}},
        {**good, "model": {**good["model"], "merges": [["no", "such"]]}},
    ):
        write_json(source / "tokenizer.json", broken)
        with pytest.raises(BadInput, match=r"tokenizer\.json: the tokenizer does not load"):
            plan_vocabulary(source, [text], size=320, windows=0)
    (source / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match=r"no tokenizer\.json"):
        plan_vocabulary(source, [text], size=320, windows=0)
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    words.save(str(source / "tokenizer.json"))
    with pytest.raises(BadInput, match="a WordLevel tokenizer cannot be pruned; supported: BPE"):
        plan_vocabulary(source, [text], size=320, windows=0)


def test_ids_below_zero_mean_none() -> None:
    ids = Renumbering(np.array([0, 2, 5]), 6)
    config = {"pad_token_id": -1, "eos_token_id": [5, 2], "vocab_size": 6, "text_config": {"bos_token_id": 5}, "x": 5}
    assert pruned_ids(config, ids, where="config.json") == {
        "pad_token_id": -1,
        "eos_token_id": [2, 1],
        "vocab_size": 3,
        "text_config": {"bos_token_id": 2},
        "x": 5,
    }
    with pytest.raises(BadInput, match="outside the vocabulary of 6"):
        pruned_ids({"pad_token_id": 6}, ids, where="config.json")
    with pytest.raises(BadInput, match="names token 1, which the plan does not keep"):
        pruned_ids({"bos_token_id": 1}, ids, where="config.json")


# --- text survives, in every kind of tokenizer and in llama.cpp


def kind_folder(kind: str, make_llama: MakeLlama) -> Path:
    """A tiny LLaMA with a tokenizer of this kind, and a GGUF vocabulary beside it for the first."""
    tokenizer = KINDS[kind]()
    folder = make_llama(vocab_size=tokenizer.get_vocab_size() + 3)
    special = ["<s>", "</s>"] if kind in SENTENCEPIECE else ["<|im_start|>", "<|im_end|>"]
    names = {"bos_token": special[0], "eos_token": special[1]} | (
        {"unk_token": "<unk>"} if kind in SENTENCEPIECE else {}
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    ids = {
        f"{role}_token_id": tokenizer.token_to_id(token) for role, token in zip(("bos", "eos"), special, strict=True)
    }
    write_json(folder / "config.json", {**config, **ids})
    write_json(folder / "generation_config.json", ids)
    return folder


@pytest.fixture(params=list(KINDS))
def pruned_pair(request: pytest.FixtureRequest, make_llama: MakeLlama, text: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A folder with a tokenizer of each kind, and the same with about two thirds of what may go gone."""
    folder = kind_folder(request.param, make_llama)
    values = gguf_vocabulary(folder, len(AutoTokenizer.from_pretrained(folder)) + 3)
    write_metadata(folder / "tokenizer.gguf", "llama", values)
    config = json.loads((folder / "config.json").read_text())
    rows = config["vocab_size"]
    least = smallest(folder_vocabulary(folder, rows))
    plan = plan_vocabulary(folder, [text], size=least + (rows - least) // 3, multiple=1, windows=0)
    return folder, prune_vocabulary(folder, plan, tmp_path / "pruned")


def test_every_kind_reads_text_as_before_and_as_llama_cpp_does(pruned_pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder, pruned = pruned_pair
    assert prove_same_ids(pruned / "tokenizer.gguf", pruned) > len(PROOF_TEXTS)
    (pruned / "tokenizer.gguf").unlink()
    gguf = write_gguf(pruned, tmp_path / "model.gguf")  # rebuilt from tokenizer.json
    assert prove_same_ids(gguf, pruned) > len(PROOF_TEXTS)
    old, new = (Tokenizer.from_file(str(path / "tokenizer.json")) for path in (folder, pruned))
    specials = AutoTokenizer.from_pretrained(pruned)
    assert specials.bos_token_id == GgufFile(gguf).metadata["tokenizer.ggml.bos_token_id"]
    assert len(old.encode("a").ids) == len(new.encode("a").ids)  # what the template adds
    with Vocabulary(gguf) as vocabulary:

        @given(text=STRINGS)
        @settings(max_examples=80, deadline=None)
        def check(text: str) -> None:
            before, after = (t.encode(text, add_special_tokens=False).ids for t in (old, new))
            assert new.decode(after, skip_special_tokens=False) == old.decode(before, skip_special_tokens=False)
            assert vocabulary.encode(text, parse_special=True) == after

        check()


def test_logits_agree_with_llama_cpp(pruned_pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, pruned = pruned_pair
    gguf = write_gguf(pruned, tmp_path / "model.gguf", dtype="F32")
    model = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(pruned)("The kettle sings", add_special_tokens=False).input_ids
    runtime = LlamaCpp(gguf, n_ctx=64, threads=1)
    try:
        theirs = np.asarray(runtime.forward(ids))
    finally:
        runtime.close()
    with torch.inference_mode():
        ours = model(torch.tensor([ids])).logits[0].numpy()
    assert np.allclose(ours[-len(theirs) :], theirs, atol=2e-3)


def test_byte_level_vocabularies_are_lossless_for_any_string(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    plan = plan_vocabulary(tiny_folder, [text], size=288, windows=0)
    tokenizer = Tokenizer.from_file(
        str(prune_vocabulary(tiny_folder, plan, tmp_path / "out") / "tokenizer.json"),
    )

    @given(text=STRINGS)
    @settings(max_examples=200, deadline=None)
    def check(text: str) -> None:
        text = text.encode("utf-8", "replace").decode()
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text

    check()


def test_command_says_what_was_counted(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    app = Typer()
    app.command()(command)
    arguments = [str(tiny_folder), "--corpus", str(text), "--size", "320", "--windows", "0", "-o", str(tmp_path / "o")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "-> 320 tokens" in result.output and "text.txt" in result.output
    as_json = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert as_json["corpus_files"] == ["text.txt"]


# --- the demo model


@pytest.mark.demo
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=STRINGS)
def test_demo_reads_any_text_as_before(demo_pruned: tuple[Tokenizer, Tokenizer, Vocabulary], text: str) -> None:
    old, new, vocabulary = demo_pruned
    before, after = (t.encode(text, add_special_tokens=False).ids for t in (old, new))
    assert new.decode(after, skip_special_tokens=False) == old.decode(before, skip_special_tokens=False)
    # The vocabulary has no tokens for some bytes; both drop them, but only llama.cpp keeps their neighbours apart.
    text = "".join(char for char in text if category(char) not in ("Cn", "Co", "Cc") or char in "\t\n\r")
    assert vocabulary.encode(text, parse_special=True) == new.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def demo_pruned(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The demo model's tokenizer before and after, and the latter in llama.cpp."""
    from edgeprune.models import checkpoint_folder

    folder = checkpoint_folder(demo_gguf)
    work = tmp_path_factory.mktemp("demo")
    (work / "text.txt").write_text("\n".join([*SENTENCES, *PROOF_TEXTS]), encoding="utf-8")
    plan = plan_vocabulary(folder, [work / "text.txt"], ratio=0.1, windows=0)
    assert 0.1 <= plan.reached_ratio < 0.101 and plan.size % 32 == 0
    out = prune_vocabulary(folder, plan, work / "out")
    assert prove_same_ids(out / "tokenizer.gguf", out) > len(PROOF_TEXTS)
    with Vocabulary(out / "tokenizer.gguf") as vocabulary:
        yield *(Tokenizer.from_file(str(f / "tokenizer.json")) for f in (folder, out)), vocabulary
