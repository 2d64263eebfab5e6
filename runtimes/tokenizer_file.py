"""The tokenizer beside a model's weights, through Hugging Face's tokenizers, which needs no torch, or transformers.

It is a hostile file: it may name other files, and the library's Rust code panics at some that it does not foresee.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from edgeprune.errors import BadInput, missing_extra
from edgeprune.files import read_json

_FILE = "tokenizer.json"
_HOLES = 1 << 16  # ids without a token, at most: the library lists each on standard output


def open_tokenizer(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` of a folder's tokenizer.json; it cuts and pads nothing, whatever the file says.

    Raises:
        BadInput: there is none, or it is not usable.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise missing_extra("tokenizers", "onnx") from error
    file = folder / _FILE
    if not file.is_file():
        raise BadInput("no tokenizer.json", where=folder, remedy="save the tokenizer beside the weights")
    _check(file)
    return _whole(_guarded(lambda: Tokenizer.from_file(str(file)), file))


def auto_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder as transformers loads it, from this folder's files alone.

    Raises:
        BadInput: there is none, or it is not usable.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise missing_extra("transformers", "prune") from error
    if not any((folder / name).is_file() for name in (_FILE, "tokenizer.model")):
        raise BadInput(
            "no tokenizer", where=folder, remedy="put tokenizer.json and tokenizer_config.json beside the weights"
        )
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    if (folder / _FILE).is_file():
        _check(folder / _FILE)
        options["tokenizer_file"] = str(folder / _FILE)  # or the config could name another
    tokenizer = _guarded(lambda: AutoTokenizer.from_pretrained(str(folder), **options), folder)
    if tokenizer.is_fast:
        _whole(tokenizer.backend_tokenizer)
    return tokenizer


def _check(file: Path) -> None:
    """Refuse what the library does not survive."""
    spec = read_json(file)
    model = spec.get("model")
    model = model if isinstance(model, dict) else {}
    affixes = [key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if model.get("type") == "BPE" and affixes:
        raise BadInput(f"a BPE tokenizer with {affixes[0]}", where=file, remedy="not supported")
    vocabulary, added = model.get("vocab"), spec.get("added_tokens")
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    count = len(vocabulary) if isinstance(vocabulary, (dict, list)) else 0
    if isinstance(added, list):
        ids += [token.get("id") for token in added if isinstance(token, dict)]
        count += len(added)
    largest = max((i for i in ids if isinstance(i, int)), default=0)
    if largest >= count + _HOLES:
        raise BadInput(f"token id {largest} among {count} tokens", where=file, remedy="save the tokenizer again")


def _guarded(read: Callable[[], Any], where: Path) -> Any:
    """What `read` gives; whatever it raises, the library's panics too, is one line."""
    try:
        return read()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of Rust is no Exception
        line = " ".join(str(error).split())[:200]
        raise BadInput(
            f"the tokenizer does not load ({line})", where=where, remedy="save or download it again"
        ) from error


def _whole(tokenizer: Any) -> Any:
    """The tokenizer without truncation and padding, which fine-tuning leaves in many files."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class TokenizerFile:
    """A folder's tokenizer.json, read when it is first asked for: measuring speed needs none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def bos(self) -> int | None:
        """As `Runtime.bos`; raises `BadInput` as `encode` does."""
        found = self._tokenizer.encode("a", add_special_tokens=True)
        return int(found.ids[0]) if found.special_tokens_mask[:1] == [1] else None

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids of `text`, without BOS or EOS; the text of a special token is one only if `parse_special`.

        Raises:
            BadInput: the folder has no usable tokenizer.json.
        """
        self._tokenizer.encode_special_tokens = not parse_special
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens left out; raises `BadInput` as `encode` does."""
        return str(self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True))

    @cached_property
    def _tokenizer(self) -> Any:
        return open_tokenizer(self._folder)
