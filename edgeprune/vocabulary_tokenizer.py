"""The files of a tokenizer with fewer tokens: ids numbered anew and densely, merges without those that lost a part.

Every function takes what a file holds and gives what the new one holds. Files without ids are none of their business.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import BadInput
from edgeprune.runtimes.gguf_file import GgufFile, Value
from edgeprune.tokenizer import NORMAL, UNUSED
from edgeprune.vocabulary import merge_pairs

NO_TOKEN = 0xFFFFFFFF  # llama.cpp's LLAMA_TOKEN_NULL
_ID_KEYS = ("_token_id", "_token_ids", "_token_index")  # ends of keys that give ids a meaning
# Other keys of generation_config.json that hold ids, of tokens that are not to be written.
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_WORDS = "bad_words_ids"  # a list of such lists
_PER_TOKEN = ("tokens", "scores", "token_type")  # arrays of `tokenizer.ggml.*` with one entry a token


class Renumbering:
    """New ids for old ones.

    Args:
        kept: the old ids, ascending: (kept,).
        size: how many old ids there were.
    """

    def __init__(self, kept: NDArray[np.int64], size: int) -> None:
        self.kept = kept
        self.size = size
        self._new = {int(old): new for new, old in enumerate(kept)}

    def __contains__(self, old: int) -> bool:
        return old in self._new

    def __call__(self, old: int, *, where: object) -> int:
        """The new id of `old`; raises `BadInput` when it is not kept."""
        if not 0 <= old < self.size:
            raise BadInput(f"it names token {old}, outside the vocabulary of {self.size}", where=where)
        if old not in self._new:
            raise BadInput(
                f"it names token {old}, which the plan does not keep", where=where, remedy="make the plan again"
            )
        return self._new[old]


def kept_merges(merges: Iterable[tuple[str, str]], tokens: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The merges whose parts and result are all in `tokens`, in order."""
    return [pair for pair in merges if pair[0] in tokens and pair[1] in tokens and "".join(pair) in tokens]


def pruned_tokenizer(spec: Mapping[str, Any], ids: Renumbering, *, where: object = "tokenizer.json") -> dict[str, Any]:
    """A `tokenizer.json` with only the kept tokens.

    Raises:
        BadInput: a step of it names a token that is not kept.
    """
    model = dict(spec["model"])
    kept = sorted((index, token) for token, index in model["vocab"].items() if index in ids)
    model["vocab"] = {token: ids(index, where=where) for index, token in kept}
    as_text = any(isinstance(merge, str) for merge in model["merges"])
    merges = kept_merges(merge_pairs(model, where=where), model["vocab"])
    model["merges"] = [" ".join(pair) for pair in merges] if as_text else [list(pair) for pair in merges]
    changed = {
        **spec,
        "added_tokens": [{**token, "id": ids(token["id"], where=where)} for token in spec.get("added_tokens") or []],
        "post_processor": _post_processor(spec.get("post_processor"), ids, where),
        "model": model,
    }
    if isinstance(spec.get("padding"), Mapping):
        changed["padding"] = {**spec["padding"], "pad_id": ids(spec["padding"]["pad_id"], where=where)}
    return changed


def _post_processor(node: Any, ids: Renumbering, where: object) -> Any:
    if not isinstance(node, Mapping):
        return node
    kind = node.get("type")
    if kind == "Sequence":
        return {**node, "processors": [_post_processor(child, ids, where) for child in node["processors"]]}
    if kind == "TemplateProcessing":
        special = {
            name: {**entry, "ids": [ids(index, where=where) for index in entry["ids"]]}
            for name, entry in node["special_tokens"].items()
        }
        return {**node, "special_tokens": special}
    if kind in ("BertProcessing", "RobertaProcessing"):
        return {**node, **{key: [node[key][0], ids(node[key][1], where=where)] for key in ("sep", "cls")}}
    if kind == "ByteLevel":
        return node
    raise BadInput(f"post-processor {kind}", where=where, remedy="supported: TemplateProcessing, ByteLevel, Bert")


def pruned_tokenizer_config(config: Mapping[str, Any], ids: Renumbering, *, where: object) -> dict[str, Any]:
    """A `tokenizer_config.json`; raises `BadInput` when an added token is not kept."""
    changed = dict(config)
    if isinstance(added := config.get("added_tokens_decoder"), Mapping):
        changed["added_tokens_decoder"] = {str(ids(int(old), where=where)): token for old, token in added.items()}
    return changed


def pruned_ids(config: Mapping[str, Any], ids: Renumbering, *, where: object) -> dict[str, Any]:
    """A `config.json` or `generation_config.json`: `vocab_size` and every key that holds token ids.

    Ids below 0 mean "none" and stay; tokens that are not to be generated may be gone.

    Raises:
        BadInput: a special id is not kept.
    """

    def renumber(value: Any) -> Any:
        if isinstance(value, list):
            return [renumber(item) for item in value]
        return value if not isinstance(value, int) or value < 0 else ids(value, where=where)

    changed: dict[str, Any] = {}
    for key, value in config.items():
        if key.endswith(_ID_KEYS):
            changed[key] = renumber(value)
        elif key in (*_ID_LISTS, _WORDS) and value is not None:
            try:
                if key == _WORDS:
                    changed[key] = [renumber(word) for word in value if all(old in ids for old in word)]
                else:
                    changed[key] = [ids(old, where=where) for old in value if old in ids]
            except TypeError as error:
                raise BadInput(f"{key} lists no ids", where=where, remedy="correct or remove it") from error
        elif key == "vocab_size":
            changed[key] = len(ids.kept)
        elif isinstance(value, Mapping):
            changed[key] = pruned_ids(value, ids, where=where)
        else:
            changed[key] = value
    return changed


def special_ids_of(config: Mapping[str, Any]) -> set[int]:
    """The ids that a `config.json` or `generation_config.json` gives a meaning, and that therefore have to stay."""
    found: set[int] = set()

    def collect(value: Any) -> None:
        if isinstance(value, list):
            for item in value:
                collect(item)
        elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            found.add(value)

    for key, value in config.items():
        if key.endswith(_ID_KEYS):
            collect(value)
        elif isinstance(value, Mapping):
            found |= special_ids_of(value)
    return found


def pruned_gguf(values: Mapping[str, Value], ids: Renumbering, *, where: object) -> dict[str, Value]:
    """The `tokenizer.*` metadata of a GGUF file with only the kept tokens.

    Raises:
        BadInput: the vocabulary has another size, or there is an array of unknown meaning.
    """
    prefix = "tokenizer.ggml."
    tokens = values[f"{prefix}tokens"].value if f"{prefix}tokens" in values else []
    if len(tokens) != ids.size:
        raise BadInput(f"{len(tokens)} tokens for an embedding of {ids.size} rows", where=where)
    left = {tokens[old]: None for old in ids.kept.tolist()}
    changed: dict[str, Value] = {}
    for key, entry in values.items():
        name = key.removeprefix(prefix)
        value: Any = entry.value
        if key == "tokenizer.huggingface.json":
            continue  # a copy of the old tokenizer.json that nothing of llama.cpp reads
        if name in _PER_TOKEN:
            value = _entries(value, ids, key, where)
        elif name == "merges":
            pairs = (_pair(merge) for merge in value)
            value = [" ".join(pair) for pair in kept_merges(pairs, left)]
        elif name.endswith("_token_id") and value != NO_TOKEN:
            value = ids(int(value), where=where)
        elif entry.item is not None:
            raise BadInput(f"{key} is an array of unknown meaning", where=where, remedy="remove it from the file")
        changed[key] = Value(value, entry.type, entry.item)
    return changed


def gguf_fixed(file: GgufFile) -> set[int]:
    """Ids that a GGUF vocabulary gives a meaning: special ids, and tokens that are not of the normal or unused type."""
    fixed = {
        int(value)
        for key, value in file.metadata.items()
        if key.startswith("tokenizer.") and key.endswith("_token_id") and isinstance(value, int) and value != NO_TOKEN
    }
    types = file.metadata.get("tokenizer.ggml.token_type", ())
    return fixed | {index for index, kind in enumerate(types) if kind not in (NORMAL, UNUSED)}


def _entries(value: Any, ids: Renumbering, key: str, where: object) -> Any:
    if len(value) != ids.size:
        raise BadInput(f"{key} does not have one entry for each of {ids.size} tokens", where=where)
    return [value[old] for old in ids.kept.tolist()] if isinstance(value, list) else value[ids.kept]


def _pair(merge: str) -> tuple[str, str]:
    cut = merge.find(" ", 1)  # a merge may begin with a space of its own
    return merge[:cut], merge[cut + 1 :]
