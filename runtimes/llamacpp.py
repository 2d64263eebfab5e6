"""llama.cpp behind the runtime protocol, through its C interface: no Python work for each token but one call."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import BadInput
from edgeprune.runtimes.base import Logits, Tokens
from edgeprune.runtimes.llamacpp_devices import require_gpu
from edgeprune.runtimes.llamacpp_library import Closing, build_info, failure, forget_complaints, llama_cpp, load_model
from edgeprune.runtimes.llamacpp_vocabulary import Tokenizer, check_tokens
from edgeprune.runtimes.settings import ALL_LAYERS, Setting, Value, check
from edgeprune.runtimes.tree import Tree

__all__ = ["LlamaCpp", "build_info"]

N_BATCH, N_UBATCH = 2048, 512  # tokens; llama-bench's defaults
_FLASH: dict[Value, int] = {
    "auto": llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO,
    False: llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}
_GPU_LAYERS = (0, ALL_LAYERS) if llama_cpp.llama_supports_gpu_offload() else (0,)
_CACHE_TYPES = {"F16": llama_cpp.GGML_TYPE_F16, "Q8_0": llama_cpp.GGML_TYPE_Q8_0}


class LlamaCpp(Closing):
    """A GGUF model in llama.cpp, on the processor.

    Args:
        path: the file.
        n_ctx: tokens the cache holds.
        threads: threads for prompt and generation.
        all_logits: whether `forward` may return logits of every token. Room for them is 100 MB at 49 152 tokens of
            vocabulary; an application that only generates needs none, and measures its memory without.
        exact: keys and values in F32 and no flash attention, for comparisons. What llama.cpp does by itself is faster
            and rounds them to F16 (flash attention does so even with a cache in F32).
        settings: values of `SETTINGS`.

    Raises:
        BadInput: no sound GGUF file, or an impossible `n_ctx`, `threads` or setting.
        StageFailed: llama.cpp refuses the model or has no memory for the context.
    """

    name: ClassVar[str] = "llamacpp"
    tree_tokens: ClassVar[int] = N_UBATCH
    tree_texts: ClassVar[int] = 128  # llama.cpp itself keeps at most 256 sequences apart
    SETTINGS: ClassVar[dict[str, Setting]] = {
        "flash_attn": Setting(("auto", False), "attention in one pass, without its matrix in memory"),
        "n_ubatch": Setting((N_UBATCH, 256, 128), "tokens of a prompt computed at once", limits=(1, 4096)),
        "gpu_layers": Setting(_GPU_LAYERS, "layers computed by the GPU, the last first", limits=(0, ALL_LAYERS)),
        "cache_type": Setting(("F16", "Q8_0"), "how keys and values are kept; Q8_0 halves them", lossless=False),
    }

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int,
        threads: int,
        all_logits: bool = True,
        exact: bool = False,
        settings: Mapping[str, Value] | None = None,
    ) -> None:
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
        self._settings = check(settings or {}, self.SETTINGS)
        self._gpus = require_gpu() if self._settings["gpu_layers"] else []
        self._model = load_model(path, vocab_only=False, gpu_layers=int(self._settings["gpu_layers"]))
        self._tokenizer = Tokenizer(self._model)
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
        params.n_batch, params.n_ubatch = min(N_BATCH, n_ctx), min(int(self._settings["n_ubatch"]), n_ctx)
        params.n_threads = params.n_threads_batch = self.threads
        params.n_seq_max = texts
        params.kv_unified = texts > 1  # a token of several texts has one place in the cache
        params.flash_attn_type = _FLASH[self._settings["flash_attn"]]
        params.type_k = params.type_v = _CACHE_TYPES[str(self._settings["cache_type"])]
        if self._exact:
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        params.offload_kqv = params.op_offload = bool(self._gpus)
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
        check_tokens(ids, self.n_vocab)
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
        check_tokens(tree.tokens, self.n_vocab)
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

    @property
    def bos(self) -> int | None:
        """As `Runtime.bos`."""
        self._open()
        return self._tokenizer.bos

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
        used = {
            "backends": ",".join(gpu.name.rstrip("0123456789") for gpu in self._gpus),
            "gpu_info": ", ".join(gpu.description for gpu in self._gpus),
        }
        return {
            **(used if self._gpus else {}),
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
