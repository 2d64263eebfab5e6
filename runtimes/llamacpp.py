"""llama.cpp behind the runtime protocol, through its C interface: no Python work for each token but one call.

A file passes `GgufFile` before llama.cpp sees it. llama.cpp's log is not printed; its complaint becomes the text
of an error.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import BadInput, StageFailed, missing_extra
from edgeprune.runtimes.base import Logits, Tokens
from edgeprune.runtimes.gguf_file import GgufFile
from edgeprune.runtimes.tree import Tree

try:
    import llama_cpp
except ImportError as error:
    raise missing_extra("llama-cpp-python", "llama") from error

N_BATCH, N_UBATCH = 2048, 512  # tokens; llama-bench's defaults
_ERROR = 4  # GGML_LOG_LEVEL_ERROR of ggml.h; llama-cpp-python's own table is of an older ggml

_complaints: collections.deque[str] = collections.deque(maxlen=20)


def _keep_complaint(level: int, text: bytes | None, _: Any) -> None:
    if level == _ERROR and text and (line := text.decode("utf-8", "replace").strip()):
        _complaints.append(line)


# The library keeps the bare pointer: the object must live as long as the process does.
_LOG_CALLBACK = llama_cpp.llama_log_callback(_keep_complaint)


@functools.cache
def start_backend() -> None:
    """Initialise llama.cpp once, its log silenced."""
    llama_cpp.llama_log_set(_LOG_CALLBACK, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()


def forget_complaints() -> None:
    """Empty the kept log; call it before what may fail."""
    _complaints.clear()


def failure(what: str, where: object) -> StageFailed:
    """The error for a failed call: `what`, with llama.cpp's first error line (the later ones only repeat it)."""
    return StageFailed(f"{what}: {_complaints[0] if _complaints else 'it gave no reason'}", where=where)


def system_info() -> str:
    """What llama.cpp found in this processor and was built with."""
    start_backend()
    return str(llama_cpp.llama_print_system_info().decode()).strip()


def build_info() -> dict[str, str]:
    """What is known of the build, under llama-bench's names where it has one; "unknown" where it does not say."""
    start_backend()

    def ask(symbol: str) -> str:
        for library in (llama_cpp.llama_cpp._lib, _ggml_base()):
            function = getattr(library, symbol, None)
            if function is not None:
                function.restype, function.argtypes = ctypes.c_char_p, []
                answer = function()
                return answer.decode() if answer else "unknown"
        return "unknown"

    # The wheel's library has the version of llama.cpp but not its commit; that of ggml is the same tree's.
    return {
        "build_commit": ask("ggml_commit"),
        "llama_cpp_version": ask("llama_version"),
        "ggml_version": ask("ggml_version"),
        "llama_cpp_python": str(llama_cpp.__version__),
        "backends": "CPU",
    }


def _ggml_base() -> ctypes.CDLL | None:
    folder = Path(llama_cpp.__file__).parent / "lib"
    for library in sorted(folder.glob("*ggml-base*")):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(library))
    return None


def _load(path: Path, *, vocab_only: bool) -> Any:
    GgufFile(path).check_loadable()
    start_backend()
    forget_complaints()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = vocab_only
    params.n_gpu_layers = 0  # what is measured is the processor of a small device
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise failure("llama.cpp cannot load the model", path)
    return model


class _Closing:
    """What frees memory of llama.cpp: at the end of a `with` block, or with the object. `close` may be called twice."""

    def close(self) -> None:
        """Free what is held."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # Without attributes its construction never began; at exit the library may be gone before its models.
        if vars(self) and not sys.is_finalizing():
            self.close()


class Vocabulary(_Closing):
    """The tokenizer in a GGUF file, without the weights.

    Args:
        path: the file; it may hold no tensors.

    Raises:
        BadInput: it is no sound GGUF file.
        StageFailed: llama.cpp refuses it.
    """

    def __init__(self, path: Path) -> None:
        self._model: Any = None
        self._model = _load(path, vocab_only=True)
        self._tokenizer = _Tokenizer(self._model)
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


class _Tokenizer:
    """Text to ids and back, of a loaded model that its owner frees."""

    def __init__(self, model: Any) -> None:
        self._vocab = llama_cpp.llama_model_get_vocab(model)
        self.n_vocab = int(llama_cpp.llama_vocab_n_tokens(self._vocab))

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
        _check_tokens(np.asarray(tokens, dtype=np.int64), self.n_vocab)
        ids = (llama_cpp.llama_token * len(tokens))(*tokens)
        room = 16 * len(tokens) + 16
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = llama_cpp.llama_detokenize(self._vocab, ids, len(tokens), buffer, room, not special, special)
            if count >= 0:
                return buffer.raw[:count].decode("utf-8", "replace")
            room = -count


def _check_tokens(tokens: NDArray[np.int64], n_vocab: int) -> None:
    if tokens.ndim != 1:
        raise BadInput(f"tokens must be a list of ids, found {tokens.ndim} dimensions")
    if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) >= n_vocab):
        wrong = next(int(token) for token in tokens if not 0 <= token < n_vocab)
        raise BadInput(f"token {wrong} is not in the vocabulary of {n_vocab}")


class LlamaCpp(_Closing):
    """A GGUF model in llama.cpp, on the processor.

    Args:
        path: the file.
        n_ctx: tokens the cache holds.
        threads: threads for prompt and generation.
        all_logits: whether `forward` may return logits of every token. Room for them is 100 MB at 49 152 tokens of
            vocabulary; an application that only generates needs none, and measures its memory without.
        exact: keys and values in F32 and no flash attention, for comparisons. What llama.cpp does by itself is faster
            and rounds them to F16 (flash attention does so even with a cache in F32).

    Raises:
        BadInput: no sound GGUF file, or an impossible `n_ctx` or `threads`.
        StageFailed: llama.cpp refuses the model or has no memory for the context.
    """

    name: ClassVar[str] = "llamacpp"
    tree_tokens: ClassVar[int] = N_UBATCH
    tree_texts: ClassVar[int] = 128  # llama.cpp itself keeps at most 256 sequences apart

    def __init__(self, path: Path, *, n_ctx: int, threads: int, all_logits: bool = True, exact: bool = False) -> None:
        self._context: Any = None
        self._tree_context: Any = None
        self._model: Any = None
        self._lock = threading.Lock()
        if not 0 < n_ctx < 1 << 31:
            raise BadInput(f"a context of {n_ctx} tokens", remedy="give a positive number")
        if not 0 < threads <= 512:
            raise BadInput(f"{threads} threads", remedy="give a number from 1 to 512")
        self.path, self.n_ctx, self.threads, self.n_past = path, n_ctx, threads, 0
        self._all_logits, self._exact = all_logits, exact
        self._model = _load(path, vocab_only=False)
        self._tokenizer = _Tokenizer(self._model)
        self.n_vocab = self._tokenizer.n_vocab
        self._context = self._make_context()
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._make_batches()

    def _make_context(self) -> Any:
        context = self._new_context(self.n_ctx)
        self._n_batch = int(llama_cpp.llama_n_batch(context))
        return context

    def _new_context(self, n_ctx: int, *, texts: int = 1) -> Any:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch, params.n_ubatch = min(N_BATCH, n_ctx), min(N_UBATCH, n_ctx)
        params.n_threads = params.n_threads_batch = self.threads
        params.n_seq_max = texts
        params.kv_unified = texts > 1  # a token of several texts has one place in the cache
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
        if self._exact:
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.offload_kqv = params.op_offload = False
        params.no_perf = True
        if not self._all_logits:
            params.n_outputs_max = 1
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise failure(f"llama.cpp cannot make a context of {n_ctx} tokens", self.path)
        return context

    def _make_batches(self) -> None:
        # The batches point into these arrays, so filling them is a copy and a call passes nothing else. With no
        # positions llama.cpp continues the sequence; with no flags only the last token of a batch has logits.
        self._tokens = np.zeros(self._n_batch, dtype=np.int32)
        self._flags = np.ones(self._n_batch, dtype=np.int8)
        self._batch = llama_cpp.llama_batch()
        self._batch.token = self._tokens.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
        self._every = llama_cpp.llama_batch()
        self._every.token = self._batch.token
        self._every.logits = self._flags.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))

    def _open(self) -> Any:
        if not self._context:
            raise BadInput("the model is closed", where=self.path)
        return self._context

    def _checked(self, tokens: Tokens) -> NDArray[np.int64]:
        ids = np.asarray(tokens, dtype=np.int64)
        _check_tokens(ids, self.n_vocab)
        if self.n_past + ids.size > self.n_ctx:
            raise BadInput(
                f"{self.n_past} + {ids.size} tokens do not fit the context of {self.n_ctx}",
                where=self.path,
                remedy="open the model with a larger context",
            )
        return ids

    def _decode(self, context: Any, batch: Any, ids: NDArray[np.int64]) -> None:
        batch.n_tokens = ids.size
        self._tokens[: ids.size] = ids
        forget_complaints()
        status = llama_cpp.llama_decode(context, batch)
        if status:
            # What got into the cache of a batch that failed is forgotten, so that the count stays true.
            llama_cpp.llama_memory_seq_rm(self._memory, 0, self.n_past, -1)
            raise failure(f"llama.cpp cannot decode (status {status})", self.path)
        self.n_past += ids.size

    def forward(self, tokens: Tokens, *, last_only: bool = False) -> Logits:
        """As `Runtime.forward`.

        Raises:
            BadInput: the context is full, a token is not in the vocabulary, or logits of every token are asked of a
                model opened without room for them.
            StageFailed: llama.cpp fails.
        """
        context, ids = self._open(), self._checked(tokens)
        if last_only or ids.size == 1:
            if not ids.size:
                raise BadInput("no tokens, so no last one", where=self.path)
            for start in range(0, ids.size, self._n_batch):
                self._decode(context, self._batch, ids[start : start + self._n_batch])
            return self._logits(context, 1)
        if not self._all_logits:
            raise BadInput("the model was opened with all_logits=False", where=self.path)
        logits = np.empty((ids.size, self.n_vocab), dtype=np.float32)
        # No more than a micro-batch at once: llama.cpp keeps the logits of a batch, which the copy doubles.
        for start in range(0, ids.size, N_UBATCH):
            piece = ids[start : start + min(N_UBATCH, self._n_batch)]
            self._decode(context, self._every, piece)
            logits[start : start + piece.size] = self._logits_view(context, piece.size)
        return logits

    def forward_tree(self, tree: Tree) -> Logits:
        """As `ForwardsTrees.forward_tree`, in a context of its own, made at the first call.

        Raises:
            BadInput: a token is not in the vocabulary, or logits of every token are asked of a model opened without
                room for them.
            StageFailed: llama.cpp fails.
        """
        self._open()
        _check_tokens(tree.tokens, self.n_vocab)
        if not self._all_logits:
            raise BadInput("the model was opened with all_logits=False", where=self.path)
        self.rewind(0)
        if not self._tree_context:
            self._tree_context = self._new_context(self.tree_tokens, texts=self.tree_texts)
        # A token's texts are consecutive, so its list of sequences is a piece of the one list of all.
        sequences = np.arange(self.tree_texts, dtype=np.int32)
        columns = [tree.tokens, tree.positions, tree.last - tree.first + 1]
        tokens, positions, counts = (np.ascontiguousarray(column, dtype=np.int32) for column in columns)
        lists = np.ascontiguousarray(sequences.ctypes.data + 4 * tree.first, dtype=np.uintp)
        flags = np.ascontiguousarray(tree.wanted, dtype=np.int8)
        batch = llama_cpp.llama_batch()
        batch.n_tokens = tree.tokens.size
        batch.token = tokens.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
        batch.pos = positions.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_pos))
        batch.n_seq_id = counts.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        batch.seq_id = lists.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(llama_cpp.llama_seq_id)))
        batch.logits = flags.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._tree_context), False)
        forget_complaints()
        if status := llama_cpp.llama_decode(self._tree_context, batch):
            raise failure(f"llama.cpp cannot decode (status {status})", self.path)
        return self._logits(self._tree_context, int(tree.wanted.sum()))

    def _logits_view(self, context: Any, rows: int) -> Logits:
        pointer = llama_cpp.llama_get_logits(context)  # waits for the computation
        return np.ctypeslib.as_array(pointer, shape=(rows, self.n_vocab))

    def _logits(self, context: Any, rows: int) -> Logits:
        return self._logits_view(context, rows).copy()

    def prefill(self, tokens: Tokens) -> None:
        """As `forward` with `last_only`, but the logits stay in llama.cpp; returns when they are there."""
        context, ids = self._open(), self._checked(tokens)
        for start in range(0, ids.size, self._n_batch):
            self._decode(context, self._batch, ids[start : start + self._n_batch])
        llama_cpp.llama_synchronize(context)

    def step(self, token: int) -> None:
        """Append one token and wait for its logits, which stay in llama.cpp: the loop to time decoding with.

        Raises:
            StageFailed: llama.cpp fails, as it does for a token outside the vocabulary and when the cache is full.
        """
        self._tokens[0] = token
        self._batch.n_tokens = 1
        if llama_cpp.llama_decode(self._open(), self._batch):
            raise failure("llama.cpp cannot decode", self.path)
        llama_cpp.llama_synchronize(self._context)
        self.n_past += 1

    def rewind(self, n_past: int) -> None:
        """Forget all but the first `n_past` tokens of the cache; raises `BadInput` when there are fewer."""
        self._open()
        if not 0 <= n_past <= self.n_past:
            raise BadInput(f"cannot rewind to {n_past}: the cache holds {self.n_past} tokens", where=self.path)
        if not llama_cpp.llama_memory_seq_rm(self._memory, 0, n_past, -1):
            raise failure(f"llama.cpp cannot rewind to {n_past} tokens", self.path)
        self.n_past = n_past

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids of `text`, without BOS or EOS; with `parse_special` the names of special tokens become them."""
        self._open()
        return self._tokenizer.encode(text, add_special=False, parse_special=parse_special)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        self._open()
        return self._tokenizer.decode(tokens)

    def description(self) -> dict[str, str | int]:
        """llama-bench's `model_type`, `model_size` (bytes) and `model_n_params`."""
        self._open()
        text = ctypes.create_string_buffer(128)
        llama_cpp.llama_model_desc(self._model, text, len(text))
        return {
            "model_type": text.value.decode("utf-8", "replace"),
            "model_size": int(llama_cpp.llama_model_size(self._model)),
            "model_n_params": int(llama_cpp.llama_model_n_params(self._model)),
        }

    def close(self) -> None:
        """Free the context and the model; a second call does nothing."""
        with self._lock:
            for context in filter(None, (self._context, self._tree_context)):
                llama_cpp.llama_free(context)
            self._context = self._tree_context = None
            if self._model:
                llama_cpp.llama_model_free(self._model)
                self._model = None
