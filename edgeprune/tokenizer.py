"""The vocabulary of a GGUF file as a Hugging Face tokenizer.

llama.cpp knows a vocabulary's way of splitting text by a name (`tokenizer.ggml.pre`), Hugging Face by its structure in
`tokenizer.json`. One table joins the two; `edgeprune.gguf_vocabulary` reads it in the other direction. Whether a pair
gives the same ids is not believed but tried, on text made to be hard (`edgeprune.tokenizer_proof`).

One difference is left. Where a byte-level vocabulary has no token for a byte (SmolLM2's lacks six control characters
and bytes that only unassigned code points have), both drop the byte, but only llama.cpp keeps its neighbours apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.errors import BadInput, missing_extra, unknown
from edgeprune.files import write_json
from edgeprune.runtimes.gguf_file import GgufFile

try:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
    from tokenizers.models import BPE
except ImportError as error:
    raise missing_extra("tokenizers", "prune") from error

SPACE = "\u2581"  # sentencepiece's mark for a space

# Token types of `tokenizer.ggml.token_type`: llama_token_type in llama.h.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# The published expressions of GPT-2 and of the family that Llama 3 started, which differ in how digits group.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
CONTRACTIONS_ANY_CASE = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# As llama.cpp spells it. It is not quite the same: without case the long s (U+017F) is an "s".
CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_REST = r"[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = f"{CONTRACTIONS}|{_REST}".replace("DIGITS", r"\p{N}{1,3}")
_QWEN2 = f"{CONTRACTIONS}|{_REST}".replace("DIGITS", DIGIT)


@dataclass(frozen=True)
class PreTokenizer:
    """How a vocabulary splits text before merging: each pattern splits what the ones before left, keeping all."""

    names: tuple[str, ...]  # values of `tokenizer.ggml.pre`; the first is the one to write
    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a token is taken whole
    add_bos: bool = False  # where the file does not say


# Names and behaviour: llama.cpp's src/llama-vocab.cpp. The order counts: the first that fits a structure is written.
PRE_TOKENIZERS: tuple[PreTokenizer, ...] = (
    PreTokenizer(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "gigachat", "trillion", "modern-bert"), (GPT2,)),
    PreTokenizer(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"), (DIGIT, GPT2)
    ),
    PreTokenizer(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"),
        (_LLAMA3,),
        ignore_merges=True,
        add_bos=True,
    ),
    PreTokenizer(("dbrx", "smaug-bpe", "chatglm-bpe"), (_LLAMA3,)),
    PreTokenizer(("qwen2", "stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez", "grok-2"), (_QWEN2,)),
    PreTokenizer(("default", ""), (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
)
_BY_NAME = {name: pre for pre in PRE_TOKENIZERS for name in pre.names}

_TOKEN_LIMIT = 1024  # characters; finding the merges of sentencepiece takes the square of a token's length
SPECIAL_KEYS = {"bos": "bos_token_id", "eos": "eos_token_id", "unk": "unknown_token_id", "pad": "padding_token_id"}
# Where a turn ends besides, by key and by what llama.cpp takes for an end in the families here (src/llama-vocab.cpp).
END_KEYS = ("eot_token_id", "eom_token_id")
END_TEXTS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
)
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
    for role, key in SPECIAL_KEYS.items():
        token = file.get(f"tokenizer.ggml.{key}", int, defaults.get(role))
        if token is None or token == 0xFFFFFFFF:  # llama.cpp's LLAMA_TOKEN_NULL
            continue
        if not 0 <= token < count:
            raise BadInput(f"tokenizer.ggml.{key} is {token}, outside the vocabulary of {count}", where=file.path)
        found[role] = token
    return found


def end_ids(file: GgufFile) -> tuple[int, ...]:
    """Ids of the tokens after which nothing more is generated: the end of the text first, then those of a turn.

    Raises:
        BadInput: an id outside the vocabulary.
    """
    tokens = _tokens(file)
    types = _numbers(file, "tokenizer.ggml.token_type", len(tokens)) or [CONTROL] * len(tokens)
    ids = special_ids(file)
    found = [ids["eos"]] if "eos" in ids else []
    for key in END_KEYS:
        token = file.get(f"tokenizer.ggml.{key}", int)
        if token is not None and token != 0xFFFFFFFF:
            if not 0 <= token < len(tokens):
                raise BadInput(f"tokenizer.ggml.{key} is {token}, outside the vocabulary", where=file.path)
            found.append(token)
    marks = (CONTROL, USER_DEFINED)
    found += [i for i, token in enumerate(tokens) if token in END_TEXTS and types[i] in marks]
    return tuple(dict.fromkeys(found))


def _tokens(file: GgufFile) -> list[str]:
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise BadInput("no vocabulary (tokenizer.ggml.tokens)", where=file.path, remedy="give a complete model file")
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError as error:
        raise BadInput("a token is not UTF-8", where=file.path) from error
    if (longest := max(map(len, tokens))) > _TOKEN_LIMIT:
        raise BadInput(f"a token of {longest} characters", where=file.path, remedy=f"at most {_TOKEN_LIMIT}")
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
    own_regex = patterns[-1] == GPT2
    for pattern in patterns[:-1] if own_regex else patterns:
        if pattern == DIGIT:
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
    found: list[tuple[float, int, int]] = []  # ids: of a token as long as `_TOKEN_LIMIT` texts would fill the memory
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-score, ids[left], ids[right]))
    return [(tokens[left], tokens[right]) for _, left, right in sorted(found)]


def adds_special(file: GgufFile, *, sentencepiece: bool) -> tuple[bool, bool]:
    """Whether llama.cpp puts BOS before, and EOS after, every text of a file."""
    default = sentencepiece
    if not sentencepiece:
        default = pre_tokenizer(file.get("tokenizer.ggml.pre", str, "default"), where=file.path).add_bos
    return (
        file.get("tokenizer.ggml.add_bos_token", bool, default),
        file.get("tokenizer.ggml.add_eos_token", bool, False),
    )


def _add_special_template(file: GgufFile, tokenizer: Tokenizer, tokens: list[str], *, sentencepiece: bool) -> None:
    ids = special_ids(file)
    add_bos, add_eos = adds_special(file, sentencepiece=sentencepiece)
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
