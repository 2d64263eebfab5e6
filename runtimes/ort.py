"""ONNX Runtime behind the runtime protocol: bound buffers, and a key/value cache that is written in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import BadInput, missing_extra
from edgeprune.files import read_json
from edgeprune.runtimes.base import Logits, Tokens, checked
from edgeprune.runtimes.onnx_file import model_file, summary
from edgeprune.runtimes.settings import Setting, Value, Values, check
from edgeprune.runtimes.tokenizer_file import TokenizerFile

try:
    import onnxruntime
except ImportError as error:
    raise missing_extra("onnxruntime", "onnx") from error

# Inputs of our graphs: the first position whose logits are computed (optional); or, in graphs for transformers.js, how
# many of the last ones, 0 for all.
LOGITS_FROM, LOGITS_KEPT = "logits_from", "num_logits_to_keep"
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
}


def _here() -> list[str]:
    """The providers that the installed build has, the processor first."""
    built = onnxruntime.get_available_providers()
    return [name for name, provider in PROVIDERS.items() if provider in built]


class OnnxRuntime:
    """A decoder as ONNX, ours, onnxruntime-genai's or optimum's, on the CPU, with the cache of one sequence.

    Graphs with GroupQueryAttention write new keys and values into buffers of `n_ctx` positions that are allocated
    once: nothing is copied as the cache grows. Other graphs return a longer cache at each step.

    Args:
        path: a folder with `model.onnx`, or the file; checked by `onnx_file.check_onnx` before ONNX Runtime sees it.
        n_ctx: positions of the cache.
        threads: threads of one operator (`intra_op_num_threads`).
        settings: values of `SETTINGS`.

    Raises:
        BadInput: the folder is unsafe or broken, no decoder with a cache, or made for fewer than `n_ctx` positions, or
            a setting is not one.
    """

    name: ClassVar[str] = "onnxruntime"
    SETTINGS: ClassVar[dict[str, Setting]] = {
        "spinning": Setting((True, False), "idle threads spin between operators: faster, and busy"),
        "dynamic_block": Setting(
            (0, 4), "pieces of an operator's work handed out as threads come free", limits=(0, 64)
        ),
        "provider": Setting(tuple(_here()), "what computes: the processor, or a GPU by cuda, directml or coreml"),
        "memory_arena": Setting((True, False), "freed buffers are kept for the next step"),
    }

    def __init__(self, path: Path, *, n_ctx: int, threads: int, settings: Mapping[str, Value] | None = None) -> None:
        info = summary(path)
        if n_ctx < 1 or threads < 1:
            raise BadInput(f"n_ctx {n_ctx} and threads {threads} must be at least 1", where=path)
        if info.positions is not None and n_ctx > info.positions:
            raise BadInput(
                f"the model was exported for {info.positions} positions, {n_ctx} were asked for",
                where=path,
                remedy=f"ask for at most {info.positions}, or export it with a longer context",
            )
        self.path, self.n_ctx, self.n_past = path, n_ctx, 0
        self._session = _open(path, threads, check(settings or {}, self.SETTINGS))
        inputs = {item.name: item for item in self._session.get_inputs()}
        outputs = {item.name: item for item in self._session.get_outputs()}
        past = [name for name in inputs if name.startswith("past_key_values.")]
        if not past or not {"input_ids", "attention_mask"} <= inputs.keys() or "logits" not in outputs:
            raise BadInput("not a decoder with a cache: no past_key_values inputs", where=path)
        self.n_vocab = _vocabulary(outputs["logits"].shape, path)
        self._in_place = "GroupQueryAttention" in info.operators
        # A slice per cache tensor; positions are axis 2 of (1, kv_heads, positions, head_dim)
        length = n_ctx if self._in_place else 0
        self._cache = {
            name: np.empty((1, inputs[name].shape[1], length, inputs[name].shape[3]), _DTYPES[inputs[name].type])
            for name in past
        }
        for buffer in self._cache.values():
            buffer.fill(0)  # unlike np.zeros it touches every page, and so the cache counts as memory while it is empty
        self._binding = self._session.io_binding()
        self._ids = np.zeros((1, n_ctx), np.int64)
        self._mask = np.ones((1, n_ctx), np.int64)
        self._positions = np.arange(n_ctx, dtype=np.int64)[None] if "position_ids" in inputs else None
        self._last = np.empty((1, 1, self.n_vocab), np.float32)
        optional = {item.name for item in self._session.get_overridable_initializers()}
        # What the selecting input is told for all logits is 0, and this for the last one's.
        selector, self._last_only = (LOGITS_KEPT, 1) if LOGITS_KEPT in inputs else (LOGITS_FROM, -1)
        self._trims = selector in inputs.keys() | optional
        self._selected = np.zeros((1,) if selector == LOGITS_FROM else (), np.int64)
        if self._trims:
            self._bind(selector, self._selected)
        if self._in_place:
            for name, buffer in self._cache.items():
                self._bind(name, buffer)
                self._bind(_present(name), buffer, output=True)
        folder = model_file(path).parent
        if (
            folder.name == "onnx" and not (folder / "tokenizer.json").is_file()
        ):  # where transformers.js wants its graphs
            folder = folder.parent
        self._text = TokenizerFile(folder)

    def forward(self, tokens: Tokens, *, last_only: bool = False) -> Logits:
        """Append `tokens`, (T,), to the cache; logits after each of them, (T, n_vocab), or (1, n_vocab).

        Raises:
            BadInput: the context is full, or a token is not in the vocabulary.
        """
        ids = checked(tokens, n_past=self.n_past, n_ctx=self.n_ctx, n_vocab=self.n_vocab, where=self.path)
        count = len(ids)
        if not count:
            return np.empty((0, self.n_vocab), np.float32)
        stop = self.n_past + count
        self._ids[0, :count] = ids
        self._bind("input_ids", self._ids[:, :count])
        self._bind("attention_mask", self._mask[:, :stop])
        if self._positions is not None:
            self._bind("position_ids", self._positions[:, self.n_past : stop])
        one = count == 1 or (last_only and self._trims)
        self._selected[...] = self._last_only if last_only else 0
        logits = self._last if one else np.empty((1, count, self.n_vocab), np.float32)
        self._bind("logits", logits, output=True)
        if self._in_place:
            self._session.run_with_iobinding(self._binding)
        else:
            self._run_growing()
        self.n_past = stop
        return logits[0].copy() if one else logits[0, -1:] if last_only else logits[0]

    def rewind(self, n_past: int) -> None:
        """Forget all but the first `n_past` tokens of the cache; what is behind them is overwritten later."""
        if not 0 <= n_past <= self.n_past:
            raise BadInput(f"cannot rewind from {self.n_past} to {n_past} tokens", where=self.path)
        self.n_past = n_past
        if not self._in_place:
            self._cache = {name: np.ascontiguousarray(old[:, :, :n_past]) for name, old in self._cache.items()}

    @property
    def bos(self) -> int | None:
        """As `TokenizerFile.bos`."""
        return self._text.bos

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """As `TokenizerFile.encode`."""
        return self._text.encode(text, parse_special=parse_special)

    def decode(self, tokens: Sequence[int]) -> str:
        """As `TokenizerFile.decode`."""
        return self._text.decode(tokens)

    def close(self) -> None:
        """Free the model and its cache."""
        self._binding = self._session = None
        self._cache = {}

    def _bind(self, name: str, array: NDArray[Any], *, output: bool = False) -> None:
        """Bind a contiguous array as it lies in memory; whoever calls keeps it alive."""
        bind = self._binding.bind_output if output else self._binding.bind_input
        bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def _run_growing(self) -> None:
        """One step of a graph that returns the old cache and the new tokens' as fresh tensors."""
        for name, old in self._cache.items():
            self._bind(name, old)
            self._binding.bind_output(_present(name), "cpu")
        self._session.run_with_iobinding(self._binding)
        names = [item.name for item in self._session.get_outputs()]
        values = dict(zip(names, self._binding.get_outputs(), strict=True))
        self._cache = {name: values[_present(name)].numpy() for name in self._cache}


def _open(path: Path, threads: int, settings: Values) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # a default that callers may override is worth no warning at each load
    options.enable_cpu_mem_arena = bool(settings["memory_arena"])
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(settings["spinning"])))
    options.add_session_config_entry("session.dynamic_block_base", str(settings["dynamic_block"]))
    provider = PROVIDERS[str(settings["provider"])]
    try:
        session = onnxruntime.InferenceSession(
            str(model_file(path)), options, providers=list(dict.fromkeys([provider, PROVIDERS["cpu"]]))
        )
    except Exception as error:  # its exceptions have no common base but this one
        raise BadInput(f"ONNX Runtime cannot load it ({error})", where=model_file(path)) from error
    if provider not in session.get_providers():  # it falls back to the processor with a warning
        raise BadInput(f"ONNX Runtime cannot use {provider} here", where=path, remedy="see edgeprune doctor")
    return session


def _present(past: str) -> str:
    return past.replace("past_key_values", "present", 1)


def _vocabulary(dimensions: Sequence[int | str], path: Path) -> int:
    """Entries of the vocabulary: the logits' last dimension, or what config.json says where that has a name only."""
    if isinstance(dimensions[-1], int):
        return dimensions[-1]
    size = read_json(model_file(path).parent / "config.json").get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise BadInput("neither the graph nor config.json tells the vocabulary's size", where=path)
    return size
