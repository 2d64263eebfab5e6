"""The tokenizer in a GGUF file, in llama.cpp's hands."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import BadInput, StageFailed
from edgeprune.runtimes.llamacpp_library import Closing, llama_cpp, load_model


class Vocabulary(Closing):
    """The tokenizer in a GGUF file, without the weights.

    Args:
        path: the file; it may hold no tensors.

    Raises:
        BadInput: it is no sound GGUF file.
        StageFailed: llama.cpp refuses it.
    """

    def __init__(self, path: Path) -> None:
        self._model: Any = None
        self._model = load_model(path, vocab_only=True)
        self._tokenizer = Tokenizer(self._model)
        self.n_vocab = self._tokenizer.n_vocab

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids of `text`; with `add_special` BOS and EOS where the file asks for them."""
        return self._tokenizer.encode(text, add_special=add_special, parse_special=parse_special)

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Text of token ids, special tokens left out unless `special`."""
        return self._tokenizer.decode(tokens, special=special)

    def close(self) -> None:
        """Free the vocabulary."""
        if self._model:
            llama_cpp.llama_model_free(self._model)
            self._model = None


class Tokenizer:
    """Text to ids and back, of a loaded model that its owner frees."""

    def __init__(self, model: Any) -> None:
        self._vocab = llama_cpp.llama_model_get_vocab(model)
        self.n_vocab = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        # Of byte-level vocabularies a text is its tokens' bytes. What puts the text together in llama.cpp also drops
        # spaces before punctuation and contractions ("git add ." becomes "git add."), for all but a few of them.
        self._plain = llama_cpp.llama_vocab_type(self._vocab) == llama_cpp.LLAMA_VOCAB_TYPE_BPE

    @property
    def bos(self) -> int | None:
        """As `Runtime.bos`."""
        found = int(llama_cpp.llama_vocab_bos(self._vocab))
        return found if found >= 0 and llama_cpp.llama_vocab_get_add_bos(self._vocab) else None

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        raw = text.encode("utf-8", "replace")
        room = len(raw) + 8  # a token has a byte at least, BOS and EOS come on top
        while True:
            buffer = (llama_cpp.llama_token * room)()
            count = llama_cpp.llama_tokenize(self._vocab, raw, len(raw), buffer, room, add_special, parse_special)
            if count >= 0:
                return list(buffer[:count])
            if -count <= room:
                raise StageFailed("llama.cpp cannot tokenise the text", where=f"{len(raw)} bytes")
            room = -count

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        check_tokens(np.asarray(tokens, dtype=np.int64), self.n_vocab)
        if self._plain:
            return b"".join(self._piece(token, special) for token in tokens).decode("utf-8", "replace")
        ids = (llama_cpp.llama_token * len(tokens))(*tokens)
        room = 16 * len(tokens) + 16
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = llama_cpp.llama_detokenize(self._vocab, ids, len(tokens), buffer, room, not special, special)
            if count >= 0:
                return buffer.raw[:count].decode("utf-8", "replace")
            room = -count

    def _piece(self, token: int, special: bool) -> bytes:
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, room, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            room = -count


def check_tokens(tokens: NDArray[np.int64], n_vocab: int) -> None:
    """Refuse what are no ids of a vocabulary of `n_vocab`.

    Raises:
        BadInput: not one dimension, or an id that is not in the vocabulary.
    """
    if tokens.ndim != 1:
        raise BadInput(f"tokens must be a list of ids, found {tokens.ndim} dimensions")
    if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) >= n_vocab):
        wrong = next(int(token) for token in tokens if not 0 <= token < n_vocab)
        raise BadInput(f"token {wrong} is not in the vocabulary of {n_vocab}")
