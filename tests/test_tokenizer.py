"""GGUF vocabularies and Hugging Face tokenizers: the same ids in both worlds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unicodedata import category

import pytest
from conftest import SENTENCES, MakeLlama, save_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from edgeprune.errors import BadInput, StageFailed
from edgeprune.export.gguf_writer import write_gguf, write_metadata
from edgeprune.gguf_vocabulary import gguf_vocabulary, split_patterns
from edgeprune.runtimes.gguf_file import GgufFile, Value, ValueType
from edgeprune.runtimes.llamacpp_vocabulary import Vocabulary
from edgeprune.tokenizer import (
    PRE_TOKENIZERS,
    merges_from_scores,
    pre_tokenizer,
    save_tokenizer,
    special_ids,
    tokenizer_from_gguf,
)
from edgeprune.tokenizer_proof import PROOF_TEXTS, prove_same_ids

SPACE = "\u2581"
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = CONTRACTIONS + (r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# Text at the seams: pieces that pre-tokenizers treat differently, in any order.
SEAMS = st.lists(
    st.sampled_from(
        ["a", "Bc", " ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "1", "234", "٣", "½", "é", "e\u0301", "\u00a0",
         "\u3000", "漢", "🙂", "\u200d", "!", "--", "$", "_", "\u017f", "\u0085", "\x00", "한", "\u2028", "."]
    ),
    max_size=12,
).map("".join)  # fmt: skip
ANY_TEXT = SEAMS | st.text(max_size=20)


def byte_level(steps: list[Any], *, ignore_merges: bool = False) -> Tokenizer:
    """A byte-level tokenizer trained on a few sentences."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SENTENCES, *PROOF_TEXTS] * 3, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """A tokenizer as those that come from sentencepiece, with bytes for what it does not know."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]  # the bytes are tokens, but no text becomes them by name
    spec["post_processor"] = json.loads(
        processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]).__getstate__()
    )
    return Tokenizer.from_str(json.dumps(spec))


def gemma() -> Tokenizer:
    """As Gemma's: no space before the text, and a split at spaces that are no longer there."""
    spec = json.loads(sentencepiece().to_str())
    spec["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    spec["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    spec["decoder"]["decoders"].pop()
    return Tokenizer.from_str(json.dumps(spec))


def digits() -> Any:
    return pre_tokenizers.Digits(individual_digits=True)


def split(pattern: str, behavior: str = "isolated", invert: bool = False) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior, invert)


def bytes_only(use_regex: bool = False) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
KINDS: dict[str, Any] = {
    "gpt-2": lambda: byte_level([bytes_only(use_regex=True)]),
    "smollm": lambda: byte_level([digits(), bytes_only(use_regex=True)]),
    "llama-bpe": lambda: byte_level([split(LLAMA3), bytes_only()], ignore_merges=True),
    "dbrx": lambda: byte_level([split(LLAMA3, "removed", True), bytes_only()]),
    "qwen2": lambda: byte_level([split(QWEN2), bytes_only()]),
    "llama": sentencepiece,
    "gemma": gemma,
}
SENTENCEPIECE = ("llama", "gemma")


def make_pair(kind: str, folder: Path) -> tuple[str, Path, Path]:
    """A kind, a Hugging Face folder with a tokenizer of it, and the GGUF vocabulary made of that."""
    tokenizer = KINDS[kind]()
    named = (
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        if kind in SENTENCEPIECE
        else {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template="{{ messages[0].content }}", **named)
    fast.save_pretrained(folder)
    values = gguf_vocabulary(folder, tokenizer.get_vocab_size() + 5)
    return kind, folder, write_metadata(folder / "vocabulary.gguf", "llama", values)


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """`make_pair` for each kind."""
    return make_pair(request.param, tmp_path_factory.mktemp(f"hf-{request.param}"))


def test_kind_is_recognised_and_ids_agree(pair: tuple[str, Path, Path]) -> None:
    kind, folder, gguf = pair
    file = GgufFile(gguf)
    model, pre = ("llama", "default") if kind in SENTENCEPIECE else ("gpt2", kind)
    assert (file.metadata["tokenizer.ggml.model"], file.metadata["tokenizer.ggml.pre"]) == (model, pre)
    assert file.metadata["tokenizer.ggml.add_bos_token"] is (kind in SENTENCEPIECE)
    assert file.metadata["tokenizer.ggml.add_eos_token"] is False
    assert file.metadata["tokenizer.chat_template"] == "{{ messages[0].content }}"
    assert prove_same_ids(gguf, folder) > len(PROOF_TEXTS)


def test_back_from_gguf(pair: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, folder, gguf = pair
    file = GgufFile(gguf)
    save_tokenizer(file, tmp_path, max_length=256)
    ours, original = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(folder)
    for text in [*PROOF_TEXTS, "<|im_start|>user\nHi<|im_end|>", "a<s> b</s>"]:
        assert ours(text).input_ids == original(text).input_ids
        assert ours.decode(ours(text).input_ids) == original.decode(original(text).input_ids)
    assert (ours.bos_token, ours.eos_token) == (original.bos_token, original.eos_token)
    assert ours.chat_template == original.chat_template
    assert ours.model_max_length == 256
    assert list(ours("text")) == ["input_ids", "attention_mask"]


@given(text=ANY_TEXT)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ids_agree_on_any_text(pair: tuple[str, Path, Path], text: str) -> None:
    _, _, gguf = pair
    tokenizer, vocabulary = loaded(gguf)
    assert tokenizer.encode(text, add_special_tokens=False).ids == vocabulary.encode(text, parse_special=True)


def loaded(gguf: Path, _cache: dict[Path, tuple[Tokenizer, Vocabulary]] = {}) -> tuple[Tokenizer, Vocabulary]:  # noqa: B006
    """The tokenizer and the vocabulary of a file, loaded once."""
    if gguf not in _cache:
        _cache[gguf] = tokenizer_from_gguf(GgufFile(gguf)), Vocabulary(gguf)
    return _cache[gguf]


@pytest.mark.parametrize("name", [pre.names[0] for pre in PRE_TOKENIZERS])
def test_every_entry_of_the_table_splits_as_llama_cpp(name: str, tmp_path: Path) -> None:
    values = gguf_vocabulary(_saved(byte_level([bytes_only(use_regex=True)]), tmp_path), 700)
    for alias in pre_tokenizer(name).names:
        if alias:
            values["tokenizer.ggml.pre"] = Value(alias, ValueType.STRING)
            gguf = write_metadata(tmp_path / f"{alias}.gguf", "llama", values)
            tokenizer = tokenizer_from_gguf(GgufFile(gguf))
            with Vocabulary(gguf) as vocabulary:
                for text in [*PROOF_TEXTS, "'\u017f x", "a$$b^^c", "12345 678"]:
                    ids = tokenizer.encode(text, add_special_tokens=False).ids
                    assert ids == vocabulary.encode(text), (alias, text)
                assert len(tokenizer.encode("a").ids) == len(vocabulary.encode("a", add_special=True)), alias


def _saved(tokenizer: Tokenizer, folder: Path) -> Path:
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(folder)
    return folder


@pytest.mark.demo
def test_demo_ids_agree(demo_gguf: Path, tmp_path: Path) -> None:
    file = GgufFile(demo_gguf)
    save_tokenizer(file, tmp_path, max_length=8192)
    assert prove_same_ids(demo_gguf, tmp_path) > len(PROOF_TEXTS)
    assert special_ids(file) == {"bos": 1, "eos": 2, "unk": 0, "pad": 2}
    # No BOS, which the loader of transformers would add.
    assert AutoTokenizer.from_pretrained(tmp_path)("The").input_ids == [504]
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    assert [step["type"] for step in spec["pre_tokenizer"]["pretokenizers"]] == ["Digits", "ByteLevel"]


@pytest.mark.demo
@given(text=ANY_TEXT)
@settings(max_examples=200, deadline=None)
def test_demo_ids_agree_on_any_text(demo_gguf: Path, text: str) -> None:
    # The vocabulary has no tokens for six control characters and for the bytes of planes without characters. Both drop
    # such a byte, but only llama.cpp then keeps its neighbours apart.
    text = "".join(char for char in text if category(char) not in ("Cn", "Co", "Cc") or char in "\t\n\r\0\x85")
    tokenizer, vocabulary = loaded(demo_gguf)
    assert tokenizer.encode(text, add_special_tokens=False).ids == vocabulary.encode(text, parse_special=True)


def test_merges_follow_scores() -> None:
    tokens, scores = ["a", "b", "ab", "abb", "ba"], [0.0, 0.0, -2.0, -3.0, -1.0]
    assert merges_from_scores(tokens, scores) == [("b", "a"), ("a", "b"), ("ab", "b")]


def test_difference_is_found(tmp_path: Path) -> None:
    _, folder, gguf = make_pair("gpt-2", tmp_path)
    values = GgufFile(gguf).values("tokenizer.") | {"tokenizer.ggml.pre": Value("smollm", ValueType.STRING)}
    with pytest.raises(StageFailed, match="differ on '0 7 42"):
        prove_same_ids(write_metadata(tmp_path / "other.gguf", "llama", values), folder)


def test_special_tokens_that_take_the_space_after_them_away(tmp_path: Path) -> None:
    """Phi-3's: llama.cpp does it under that name only, which a folder of another name gets."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = sentencepiece()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    stripping = ["</s>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
    tokenizer.add_special_tokens([AddedToken(token, rstrip=True, normalized=False) for token in stripping])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|endoftext|>")
    folder = save_llama(tmp_path / "pruned", vocab_size=tokenizer.get_vocab_size())
    for old in folder.glob("*token*"):
        old.unlink()
    fast.save_pretrained(folder)
    path = write_gguf(folder, tmp_path / "model.gguf")
    assert "phi-3" in str(GgufFile(path).metadata["general.name"])
    assert prove_same_ids(path, folder)


def test_refusals(tmp_path: Path) -> None:
    _, _, gguf = make_pair("smollm", tmp_path)
    good = GgufFile(gguf).values("tokenizer.")

    def refuse(match: str, **changes: Value | None) -> None:
        values = {
            key: value
            for key, value in (good | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}).items()
            if value is not None
        }
        with pytest.raises(BadInput, match=match):
            tokenizer_from_gguf(GgufFile(write_metadata(tmp_path / "bad.gguf", "llama", values)))

    refuse("did you mean 'smollm'", pre=Value("smolm", ValueType.STRING))
    refuse("tokenizer model 'bert'", model=Value("bert", ValueType.STRING))
    refuse("no vocabulary", tokens=None)
    refuse("no merges", merges=None)
    refuse("not a pair", merges=Value(["ab"], ValueType.ARRAY, ValueType.STRING))
    refuse("does not fit together", merges=Value(["zzz qqq"], ValueType.ARRAY, ValueType.STRING))
    refuse("outside the vocabulary", bos_token_id=Value(1 << 20, ValueType.UINT32))
    refuse("one number for each", token_type=Value([1, 1], ValueType.ARRAY, ValueType.INT32))
    refuse("has no id", add_eos_token=Value(True, ValueType.BOOL), eos_token_id=None)
    refuse("same token twice", tokens=Value(["a", "a"], ValueType.ARRAY, ValueType.STRING))


def test_unknown_structures_are_refused(make_llama: MakeLlama, tmp_path: Path) -> None:
    assert split_patterns(None) is None
    folder = _saved(byte_level([pre_tokenizers.Punctuation(), bytes_only(use_regex=True)]), tmp_path)
    with pytest.raises(BadInput, match="known: gpt-2, smollm"):
        gguf_vocabulary(folder, 700)
    with pytest.raises(BadInput, match="more tokens than the embedding"):
        gguf_vocabulary(make_llama(), 20)
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "words")
    with pytest.raises(BadInput, match="WordLevel"):
        gguf_vocabulary(tmp_path / "words", 10)


def test_byte_fallback_needs_all_bytes(make_llama: MakeLlama, tmp_path: Path) -> None:
    """llama.cpp ends the process at a byte that it has no token for."""
    folder = make_llama()
    tokenizer = sentencepiece()
    spec = json.loads(tokenizer.to_str())
    index = spec["model"]["vocab"].pop("<0x41>")
    spec["model"]["vocab"]["another"] = index
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(BadInput, match="without the token <0x41>"):
        gguf_vocabulary(folder, 1024)


def test_a_token_of_a_file_has_a_length_that_can_be_taken_apart(tmp_path: Path, make_llama: MakeLlama) -> None:
    file = GgufFile(write_gguf(make_llama(), tmp_path / "m.gguf"))
    tokens = list(file.metadata["tokenizer.ggml.tokens"])
    file.metadata["tokenizer.ggml.tokens"] = [*tokens[:-1], "a" * 1025]
    with pytest.raises(BadInput, match="a token of 1025 characters"):
        tokenizer_from_gguf(file)
