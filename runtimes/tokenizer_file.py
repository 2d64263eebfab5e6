"""The tokenizer.json beside a model file, through Hugging Face's tokenizers, which needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from edgeprune.errors import BadInput, missing_extra


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
        try:
            import tokenizers
        except ImportError as error:
            raise missing_extra("tokenizers", "onnx") from error
        file = self._folder / "tokenizer.json"
        if not file.is_file():
            raise BadInput("no tokenizer.json", where=self._folder, remedy="copy the model's tokenizer.json there")
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises bare Exception for any bad file
            raise BadInput(f"not a usable tokenizer ({error})", where=file) from error
