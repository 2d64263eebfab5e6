"""A Hugging Face tokenizer as the vocabulary of a GGUF file: the way back of `edgeprune.tokenizer`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from edgeprune.errors import BadInput
from edgeprune.runtimes.gguf_file import Value, ValueType
from edgeprune.runtimes.tokenizer_file import auto_tokenizer
from edgeprune.tokenizer import (
    BYTE,
    CONTRACTIONS,
    CONTRACTIONS_ANY_CASE,
    CONTROL,
    DIGIT,
    GPT2,
    NORMAL,
    PRE_TOKENIZERS,
    SPACE,
    SPECIAL_KEYS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    PreTokenizer,
)

# Tokens that end an answer in llama.cpp whatever the file says (llama-vocab.cpp).
_KNOWN_ENDS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>"),
    *("<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>"),
)
_PHI3_TOKENS = ("</s>", "<unk>", "<s>", "<|endoftext|>")  # which its rule for Phi-3 looks up


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a Hugging Face folder, as transformers loads it.

    Raises:
        BadInput: there is none, or only a slow one.
    """
    remedy = "save the tokenizer beside the weights (tokenizer.json)"
    if not (folder / "tokenizer.json").is_file():
        raise BadInput("no tokenizer.json", where=folder, remedy=remedy)
    tokenizer = auto_tokenizer(folder)
    if not tokenizer.is_fast:
        raise BadInput("the tokenizer has no fast form", where=folder, remedy=remedy)
    return tokenizer


def steps_of(node: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """The steps of a part of `tokenizer.json` in order, sequences (children under the key `inner`) opened out."""
    if node is None:
        return []
    if node.get("type") == "Sequence":
        return [step for child in node[inner] for step in steps_of(child, inner)]
    return [node]


def split_patterns(node: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """The patterns of a byte-level `pre_tokenizer` of a tokenizer.json; None when it is anything else."""
    patterns: list[str] = []
    steps = steps_of(node, "pretokenizers")
    for step in steps:
        kind = step["type"]
        if kind == "Split" and "Regex" in step["pattern"]:
            # Removing what a pattern does not match equals keeping its matches apart when the pattern matches all.
            if (step["behavior"], step["invert"]) not in (("Isolated", False), ("Removed", True)):
                return None
            patterns.append(step["pattern"]["Regex"].replace(CONTRACTIONS_ANY_CASE, CONTRACTIONS))
        elif kind == "Digits":
            patterns.append(DIGIT if step["individual_digits"] else r"\p{N}+")
        elif kind == "ByteLevel" and step is steps[-1] and not step["add_prefix_space"]:
            patterns += [GPT2] if step["use_regex"] else []
        else:
            return None
    return tuple(patterns) if steps and steps[-1]["type"] == "ByteLevel" else None


def recognise(node: Mapping[str, Any] | None, *, ignore_merges: bool, where: object) -> PreTokenizer:
    """The table's entry for a tokenizer.json's `pre_tokenizer`.

    Raises:
        BadInput: none has its structure.
    """
    patterns = split_patterns(node)
    fitting = [pre for pre in PRE_TOKENIZERS if pre.patterns == patterns]
    if not fitting:
        raise BadInput(
            "its pre-tokenizer is none that llama.cpp knows by a name in our table",
            where=where,
            remedy=f"known: {', '.join(pre.names[0] for pre in PRE_TOKENIZERS)}",
        )
    # Where the merges lead to every token it makes no difference whether they are ignored; the proof will tell.
    return next((pre for pre in fitting if pre.ignore_merges == ignore_merges), fitting[0])


def strips_as_phi3(folder: Path) -> bool:
    """Whether special tokens of a folder's tokenizer take the space after them away, and it has those that do not."""
    backend = load_tokenizer(folder).backend_tokenizer
    stripping = any(token["rstrip"] for token in json.loads(backend.to_str())["added_tokens"])
    return stripping and all(backend.token_to_id(token) is not None for token in _PHI3_TOKENS)


def gguf_vocabulary(folder: Path, n_vocab: int, ends: Sequence[int] = (), bos: int | None = None) -> dict[str, Value]:
    """The `tokenizer.*` metadata of a Hugging Face folder's tokenizer, ready to write.

    Args:
        folder: the folder.
        n_vocab: rows of the embedding; ids without a token become unused ones.
        ends: ids that end an answer by the model's configs; they count where the tokenizer names none, and one that
            llama.cpp would not know is told as the end of a turn.
        bos: the id that begins a text, likewise.

    Raises:
        BadInput: no tokenizer, one of a kind or structure not in the table, or one larger than the embedding.
    """
    tokenizer = load_tokenizer(folder)
    backend = tokenizer.backend_tokenizer
    spec = json.loads(backend.to_str())
    if spec["model"]["type"] != "BPE":
        raise BadInput(f"a {spec['model']['type']} tokenizer", where=folder, remedy="supported: BPE")
    sentencepiece = bool(spec["model"]["byte_fallback"])
    tokens, types = _listing(backend, spec, n_vocab, sentencepiece=sentencepiece, where=folder)
    merges = [tuple(each.split(" ")) if isinstance(each, str) else tuple(each) for each in spec["model"]["merges"]]
    values: dict[str, Value] = {}

    def put(key: str, value: Any, kind: ValueType, item: ValueType | None = None) -> None:
        values[f"tokenizer.ggml.{key}"] = Value(value, kind, item)

    if sentencepiece:
        put("model", "llama", ValueType.STRING)
        put("pre", "default", ValueType.STRING)
        put("add_space_prefix", _space_prefix(spec, folder), ValueType.BOOL)
        put("scores", _scores(tokens, merges), ValueType.ARRAY, ValueType.FLOAT32)
    else:
        if (spec["normalizer"] or {}).get("type", "NFC") != "NFC":
            raise BadInput(f"normalizer {spec['normalizer']['type']}", where=folder, remedy="supported: none, NFC")
        pre = recognise(spec["pre_tokenizer"], ignore_merges=bool(spec["model"].get("ignore_merges")), where=folder)
        put("model", "gpt2", ValueType.STRING)
        put("pre", pre.names[0], ValueType.STRING)
        put("merges", [" ".join(pair) for pair in merges], ValueType.ARRAY, ValueType.STRING)
    put("tokens", tokens, ValueType.ARRAY, ValueType.STRING)
    put("token_type", types, ValueType.ARRAY, ValueType.INT32)
    ids = {role: getattr(tokenizer, f"{role}_token_id") for role in SPECIAL_KEYS}
    # Without these llama.cpp takes ids of its own: 11 in a byte-level vocabulary, which may be "+".
    ids["eos"] = ends[0] if ids["eos"] is None and ends else ids["eos"]
    ids["bos"] = bos if ids["bos"] is None else ids["bos"]
    if unknown := [end for end in ends if end != ids["eos"] and end < n_vocab and tokens[end] not in _KNOWN_ENDS]:
        put("eot_token_id", unknown[0], ValueType.UINT32)
    for role, key in SPECIAL_KEYS.items():
        if ids[role] is not None:
            put(key, ids[role], ValueType.UINT32)
    with_special = backend.encode("a", add_special_tokens=True).ids
    added = len(with_special) > len(backend.encode("a", add_special_tokens=False).ids)
    put("add_bos_token", added and with_special[0] == ids["bos"], ValueType.BOOL)
    put("add_eos_token", added and with_special[-1] == ids["eos"], ValueType.BOOL)
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    if isinstance(template, str) and template:
        values["tokenizer.chat_template"] = Value(template, ValueType.STRING)
    return values


def _listing(
    backend: Tokenizer, spec: Mapping[str, Any], n_vocab: int, *, sentencepiece: bool, where: Path
) -> tuple[list[str], list[int]]:
    vocabulary = backend.get_vocab(with_added_tokens=True)
    # Gemma 3's text models have the tokenizer of those that see, whose last token no row is for.
    beyond = {token["content"] for token in spec["added_tokens"] if token["id"] >= n_vocab}
    if beyond:
        warnings.warn(f"tokens without a row in the embedding are left out: {', '.join(sorted(beyond))}", stacklevel=2)
    vocabulary = {token: index for token, index in vocabulary.items() if token not in beyond}
    if max(vocabulary.values(), default=-1) >= n_vocab:
        raise BadInput(f"the tokenizer has more tokens than the embedding's {n_vocab} rows", where=where)
    tokens = [f"[PAD{index}]" for index in range(n_vocab)]
    types = [UNUSED] * n_vocab
    for token, index in vocabulary.items():
        tokens[index], types[index] = token, NORMAL
    if sentencepiece:
        for index, token in enumerate(tokens):
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                types[index] = BYTE
        # llama.cpp writes every unknown character in bytes, and ends the process where it finds none.
        if missing := [byte for byte in map("<0x{:02X}>".format, range(256)) if byte not in vocabulary]:
            raise BadInput(f"a tokenizer with byte fallback but without the token {missing[0]}", where=where)
    for token in spec["added_tokens"]:
        if token["id"] >= n_vocab:
            continue
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    if sentencepiece and spec["model"]["unk_token"] in vocabulary:
        types[vocabulary[spec["model"]["unk_token"]]] = UNKNOWN
    if len(set(tokens)) != n_vocab:
        raise BadInput("the vocabulary has the same token twice", where=where)
    return tokens, types


def _scores(tokens: Sequence[str], merges: Iterable[Sequence[str]]) -> list[float]:
    """Scores that order as the merges do: minus the place of the first merge that makes the token."""
    first: dict[str, int] = {}
    for place, pair in enumerate(merges):
        first.setdefault("".join(pair), place)
    return [-float(first.get(token, 0)) for token in tokens]


def _space_prefix(spec: Mapping[str, Any], where: Path) -> bool:
    """Whether a space is put before the text; raises `BadInput` for anything but sentencepiece's usual steps."""
    prefix = False
    normal = steps_of(spec["normalizer"], "normalizers")
    for step in normal:
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            prefix = True
        elif not (step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE):
            raise BadInput(f"normalizer {step['type']}", where=where, remedy=f"supported: Prepend and Replace {SPACE}")
    steps = steps_of(spec["pre_tokenizer"], "pretokenizers")
    replaced = any(step["type"] == "Replace" for step in normal)
    for step in steps:
        if replaced and step["type"] == "Split" and step["pattern"] == {"String": " "}:
            continue  # Gemma's: it finds nothing, the normalizer has left no space
        if step["type"] != "Metaspace" or step["replacement"] != SPACE or step.get("split", False):
            raise BadInput(f"pre-tokenizer {step['type']}", where=where, remedy="supported: Metaspace without split")
        if step["prepend_scheme"] == "first":
            warnings.warn(
                "llama.cpp puts a space after every special token, this tokenizer only at the start", stacklevel=2
            )
        prefix = step["prepend_scheme"] != "never"
    if not normal and not steps:
        raise BadInput(f"spaces do not become {SPACE}", where=where)
    return prefix
