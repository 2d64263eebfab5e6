"""The same tokenizer in two worlds: the vocabulary of a GGUF file and a Hugging Face tokenizer.

llama.cpp knows a vocabulary's way of splitting text by a name (`tokenizer.ggml.pre`), Hugging Face by its structure in
`tokenizer.json`. One table joins the two and is read in both directions. Whether a pair gives the same ids is not
believed but tried, on text made to be hard (`edgeprune.tokenizer_proof`).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.errors import BadInput, missing_extra, unknown
from edgeprune.files import write_json
from edgeprune.runtimes.gguf_file import GgufFile, Value, ValueType

try:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE
except ImportError as error:
    raise missing_extra("tokenizers", "prune") from error

SPACE = "\u2581"  # sentencepiece's mark for a space

# Token types of `tokenizer.ggml.token_type`: llama_token_type in llama.h.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# The published expressions of GPT-2 and of the family that Llama 3 started, which differ in how digits group.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_CONTRACTIONS_ANY_CASE = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# As llama.cpp spells it. It is not quite the same: without case the long s (U+017F) is an "s".
_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_REST = r"[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = f"{_CONTRACTIONS}|{_REST}".replace("DIGITS", r"\p{N}{1,3}")
_QWEN2 = f"{_CONTRACTIONS}|{_REST}".replace("DIGITS", _DIGIT)


@dataclass(frozen=True)
class PreTokenizer:
    """How a vocabulary splits text before merging: each pattern splits what the ones before left, keeping all."""

    names: tuple[str, ...]  # values of `tokenizer.ggml.pre`; the first is the one to write
    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a token is taken whole
    add_bos: bool = False  # where the file does not say


# Names and behaviour: llama.cpp's src/llama-vocab.cpp. The order counts: the first that fits a structure is written.
PRE_TOKENIZERS: tuple[PreTokenizer, ...] = (
    PreTokenizer(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "gigachat", "trillion", "modern-bert"), (_GPT2,)),
    PreTokenizer(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"), (_DIGIT, _GPT2)
    ),
    PreTokenizer(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"),
        (_LLAMA3,),
        ignore_merges=True,
        add_bos=True,
    ),
    PreTokenizer(("dbrx", "smaug-bpe", "chatglm-bpe"), (_LLAMA3,)),
    PreTokenizer(("qwen2", "stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez", "grok-2"), (_QWEN2,)),
    PreTokenizer(("default", ""), (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
)
_BY_NAME = {name: pre for pre in PRE_TOKENIZERS for name in pre.names}

_SPECIAL = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
_SENTENCEPIECE_DEFAULTS = {"bos": 1, "eos": 2, "unk": 0}  # llama.cpp's, where the file names none


def pre_tokenizer(name: str, *, where: object = None) -> PreTokenizer:
    """The entry of a `tokenizer.ggml.pre`; raises `BadInput` that names the known ones."""
    if name not in _BY_NAME:
        error = unknown("pre-tokenizer", name, [known for known in _BY_NAME if known])
        raise BadInput(error.what, where=where, remedy=error.remedy)
    return _BY_NAME[name]


def special_ids(file: GgufFile) -> dict[str, int]:
    """Ids of the special tokens a GGUF file names, by "bos", "eos", "unk", "pad"; absent where it names none.

    Raises:
        BadInput: an id outside the vocabulary.
    """
    count = len(_tokens(file))
    defaults = _SENTENCEPIECE_DEFAULTS if file.metadata.get("tokenizer.ggml.model") == "llama" else {}
    found = {}
    for role, key in _SPECIAL.items():
        token = file.get(f"tokenizer.ggml.{key}", int, defaults.get(role))
        if token is None or token == 0xFFFFFFFF:  # llama.cpp's LLAMA_TOKEN_NULL
            continue
        if not 0 <= token < count:
            raise BadInput(f"tokenizer.ggml.{key} is {token}, outside the vocabulary of {count}", where=file.path)
        found[role] = token
    return found


def _tokens(file: GgufFile) -> list[str]:
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise BadInput("no vocabulary (tokenizer.ggml.tokens)", where=file.path, remedy="give a complete model file")
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError as error:
        raise BadInput("a token is not UTF-8", where=file.path) from error
    if len(set(tokens)) != len(tokens):
        raise BadInput("the vocabulary has the same token twice", where=file.path)
    return tokens


def _numbers(file: GgufFile, key: str, count: int) -> list[Any] | None:
    values = file.metadata.get(key)
    if values is None:
        return None
    if isinstance(values, list) or not hasattr(values, "tolist") or len(values) != count:
        raise BadInput(f"{key} does not have one number for each of {count} tokens", where=file.path)
    return list(values.tolist())


def tokenizer_from_gguf(file: GgufFile) -> Tokenizer:
    """A `tokenizers.Tokenizer` with the ids and the splitting of a GGUF file's vocabulary.

    Raises:
        BadInput: no vocabulary, one whose parts do not fit together, or a kind or pre-tokenizer not in the table.
    """
    tokens = _tokens(file)
    types = _numbers(file, "tokenizer.ggml.token_type", len(tokens)) or [NORMAL] * len(tokens)
    model = file.get("tokenizer.ggml.model", str, "")
    try:
        if model == "gpt2":
            tokenizer = _byte_level(file, tokens)
        elif model == "llama":
            tokenizer = _sentencepiece(file, tokens)
        else:
            raise unknown("tokenizer model", model, ("gpt2", "llama"))
        added = [
            AddedToken(token, normalized=False, special=kind != USER_DEFINED)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (CONTROL, USER_DEFINED, UNKNOWN)
        ]
        tokenizer.add_tokens(added)
    except BadInput:
        raise
    except Exception as error:  # the library raises nothing more precise
        raise BadInput(f"the vocabulary does not fit together ({error})", where=file.path) from error
    _add_special_template(file, tokenizer, tokens, sentencepiece=model == "llama")
    return tokenizer


def _merges(file: GgufFile) -> list[tuple[str, str]]:
    merges = file.metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise BadInput("no merges (tokenizer.ggml.merges)", where=file.path, remedy="give a complete model file")
    pairs = []
    for merge in merges:
        cut = merge.find(" ", 1)  # a merge may begin with a space of its own
        if cut < 0:
            raise BadInput(f"merge {merge!r} is not a pair", where=file.path)
        pairs.append((merge[:cut], merge[cut + 1 :]))
    return pairs


def _byte_level(file: GgufFile, tokens: list[str]) -> Tokenizer:
    pre = pre_tokenizer(file.get("tokenizer.ggml.pre", str, "default"), where=file.path)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, _merges(file), ignore_merges=pre.ignore_merges))
    tokenizer.pre_tokenizer = _splitters(pre.patterns)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _splitters(patterns: Sequence[str]) -> pre_tokenizers.PreTokenizer:
    # Written in the library's own words where it has them: other readers of tokenizer.json know these best.
    steps: list[pre_tokenizers.PreTokenizer] = []
    own_regex = patterns[-1] == _GPT2
    for pattern in patterns[:-1] if own_regex else patterns:
        if pattern == _DIGIT:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own_regex))
    return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


def _sentencepiece(file: GgufFile, tokens: list[str]) -> Tokenizer:
    scores = _numbers(file, "tokenizer.ggml.scores", len(tokens))
    if scores is None:
        raise BadInput("no scores (tokenizer.ggml.scores)", where=file.path, remedy="give a complete model file")
    unknown_id = special_ids(file).get("unk")
    tokenizer = Tokenizer(
        BPE(
            {token: index for index, token in enumerate(tokens)},
            merges_from_scores(tokens, scores),
            unk_token=None if unknown_id is None else tokens[unknown_id],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = [normalizers.Replace(" ", SPACE)]
    decoding: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.get("tokenizer.ggml.add_space_prefix", bool, True):
        spaces.insert(0, normalizers.Prepend(SPACE))
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer


def merges_from_scores(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """The merges that make byte-pair merging choose as sentencepiece does, which joins the pair with the best score.

    Every way to cut a token in two tokens is a merge; the best scored token first.
    """
    ids = {token: index for index, token in enumerate(tokens)}
    found: list[tuple[float, int, int, str, str]] = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-score, ids[left], ids[right], left, right))
    return [(left, right) for _, _, _, left, right in sorted(found)]


def _adds(file: GgufFile, *, sentencepiece: bool) -> tuple[bool, bool]:
    default = sentencepiece
    if not sentencepiece:
        default = pre_tokenizer(file.get("tokenizer.ggml.pre", str, "default"), where=file.path).add_bos
    return (
        file.get("tokenizer.ggml.add_bos_token", bool, default),
        file.get("tokenizer.ggml.add_eos_token", bool, False),
    )


def _add_special_template(file: GgufFile, tokenizer: Tokenizer, tokens: list[str], *, sentencepiece: bool) -> None:
    ids = special_ids(file)
    add_bos, add_eos = _adds(file, sentencepiece=sentencepiece)
    used = [role for role, add in (("bos", add_bos), ("eos", add_eos)) if add]
    if missing := [role for role in used if role not in ids]:
        raise BadInput(f"{missing[0]} is to be added but has no id", where=file.path)
    if used:
        before = [tokens[ids["bos"]]] if add_bos else []
        after = [tokens[ids["eos"]]] if add_eos else []
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B:1", *after],
            special_tokens=[(tokens[ids[role]], ids[role]) for role in used],
        )


def save_tokenizer(file: GgufFile, folder: Path, *, max_length: int) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` of a GGUF file's vocabulary.

    Args:
        file: the GGUF file.
        folder: where to.
        max_length: the model's context, in tokens.

    Raises:
        BadInput: as `tokenizer_from_gguf`.
    """
    tokenizer = tokenizer_from_gguf(file)
    tokens = _tokens(file)
    special = {f"{role}_token": tokens[token] for role, token in special_ids(file).items()}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **special,
    }
    if template := file.get("tokenizer.chat_template", str):
        config["chat_template"] = template
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special)


# From Hugging Face to GGUF


def load_tokenizer(folder: Path) -> Any:
    """The fast tokenizer of a Hugging Face folder, as transformers loads it.

    Raises:
        BadInput: there is none, or only a slow one.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise missing_extra("transformers", "prune") from error
    remedy = "save the tokenizer beside the weights (tokenizer.json)"
    if not (folder / "tokenizer.json").is_file():
        raise BadInput("no tokenizer.json", where=folder, remedy=remedy)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever is in the file, it is not usable
        raise BadInput(f"the tokenizer does not load ({error})", where=folder, remedy=remedy) from error
    if not tokenizer.is_fast:
        raise BadInput("the tokenizer has no fast form", where=folder, remedy=remedy)
    return tokenizer


def steps_of(node: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
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
            patterns.append(step["pattern"]["Regex"].replace(_CONTRACTIONS_ANY_CASE, _CONTRACTIONS))
        elif kind == "Digits":
            patterns.append(_DIGIT if step["individual_digits"] else r"\p{N}+")
        elif kind == "ByteLevel" and step is steps[-1] and not step["add_prefix_space"]:
            patterns += [_GPT2] if step["use_regex"] else []
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


def gguf_vocabulary(folder: Path, n_vocab: int) -> dict[str, Value]:
    """The `tokenizer.*` metadata of a Hugging Face folder's tokenizer, ready to write.

    Args:
        folder: the folder.
        n_vocab: rows of the embedding; ids without a token become unused ones.

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
    ids = {role: getattr(tokenizer, f"{role}_token_id") for role in _SPECIAL}
    for role, key in _SPECIAL.items():
        if ids[role] is not None:
            put(key, ids[role], ValueType.UINT32)
    with_special = backend.encode("a", add_special_tokens=True).ids
    added = len(with_special) > len(backend.encode("a", add_special_tokens=False).ids)
    put("add_bos_token", added and with_special[0] == ids["bos"], ValueType.BOOL)
    put("add_eos_token", added and with_special[-1] == ids["eos"], ValueType.BOOL)
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    if template:
        values["tokenizer.chat_template"] = Value(template, ValueType.STRING)
    return values


def _listing(
    backend: Tokenizer, spec: Mapping[str, Any], n_vocab: int, *, sentencepiece: bool, where: Path
) -> tuple[list[str], list[int]]:
    vocabulary = backend.get_vocab(with_added_tokens=True)
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
    for token in spec["added_tokens"]:
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
    for step in steps:
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
