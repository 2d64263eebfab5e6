"""The reference runtime: a Hugging Face folder in stock transformers, float32. The one module here that needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import BadInput, missing_extra
from edgeprune.per_layer import KEY
from edgeprune.runtimes.base import Logits, Tokens
from edgeprune.runtimes.tokenizer_file import auto_tokenizer
from edgeprune.runtimes.tree import Tree

try:
    import torch
except ImportError as error:
    raise missing_extra("torch", "prune") from error
try:
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
except ImportError as error:
    raise missing_extra("transformers", "prune") from error

_LOCAL = {"trust_remote_code": False, "local_files_only": True}


def build_info() -> dict[str, str]:
    """The versions that ran, under llama-bench's name for it."""
    return {"build_commit": f"torch {torch.__version__}, transformers {transformers.__version__}"}


class PyTorch:
    """A causal language model of transformers with the cache of one sequence.

    Only safetensors are read, no code that comes with a model runs, and every weight must be in the files: transformers
    alone would fill a missing one with random numbers and go on.

    Args:
        path: a Hugging Face folder.
        n_ctx: tokens that the cache holds.
        threads: torch's threads, which are those of the whole process.

    Raises:
        BadInput: pickled weights, or a broken or incomplete checkpoint.
    """

    name: ClassVar[str] = "pytorch"
    tree_tokens: int = 1024
    tree_texts: ClassVar[int] = 1024
    _path: Path | None

    def __init__(self, path: Path, *, n_ctx: int, threads: int) -> None:
        Checkpoint(path)  # refuses pickles and broken files before any library opens them
        torch.set_num_threads(threads)
        self._path = path
        self._hold(load_model(path), None, n_ctx)

    @classmethod
    def of(cls, model: Any, tokenizer: Any, n_ctx: int) -> PyTorch:
        """The same over a module that is loaded already; it stays the caller's, in its precision, on its device.

        Args:
            model: a causal language model of transformers; it is put into evaluation mode.
            tokenizer: a tokenizer of transformers, or None if no text will be encoded or decoded.
            n_ctx: tokens that the cache holds.
        """
        self = cls.__new__(cls)
        self._path = None
        self._hold(model, tokenizer, n_ctx)
        return self

    def _hold(self, model: Any, tokenizer: Any, n_ctx: int) -> None:
        self._model = model.eval()
        self._tokenizer = tokenizer
        # A tree's mask is the same for every layer, so a tree is no larger than the window of those that have one.
        self.tree_tokens = min(type(self).tree_tokens, getattr(model.config, "sliding_window", None) or 1024)
        self._clear()
        self.n_vocab = int(model.get_output_embeddings().weight.shape[0])
        self.n_ctx = n_ctx

    def _clear(self) -> None:
        # Made without the config on purpose: layers with a sliding window would drop what rewind needs; the model
        # masks by the window anyway.
        self._cache = DynamicCache()

    @property
    def n_past(self) -> int:
        """Tokens in the cache."""
        return int(self._cache.get_seq_length())

    def forward(self, tokens: Tokens, *, last_only: bool = False) -> Logits:
        """Append `tokens`, (T,), to the cache; logits after each of them, (T, n_vocab), or (1, n_vocab).

        Raises:
            BadInput: there are no tokens, the context is full, or a token is not in the vocabulary.
        """
        ids = np.asarray(tokens, dtype=np.int64)
        if ids.ndim != 1 or ids.size == 0:
            raise BadInput("no tokens to evaluate", remedy="give at least one token id")
        if ids.min() < 0 or ids.max() >= self.n_vocab:
            raise BadInput(f"a token is outside the vocabulary of {self.n_vocab}")
        if self.n_past + ids.size > self.n_ctx:
            raise BadInput(
                f"{self.n_past} + {ids.size} tokens do not fit the context of {self.n_ctx}", remedy="raise n_ctx"
            )
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.from_numpy(ids)[None].to(self._model.device),  # (1, T)
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1 if last_only else 0,  # 0: all of them
            )
            logits: Logits = output.logits[0].float().cpu().numpy()  # (T or 1, n_vocab)
        return logits

    def forward_tree(self, tree: Tree) -> Logits:
        """As `ForwardsTrees.forward_tree`: one sequence, whose mask and positions are the tree's.

        Raises:
            BadInput: a token is not in the vocabulary.
        """
        if tree.tokens.min() < 0 or tree.tokens.max() >= self.n_vocab:
            raise BadInput(f"a token is outside the vocabulary of {self.n_vocab}")
        self._clear()
        device, dtype = self._model.device, self._model.dtype
        visible = torch.from_numpy(tree.visible()).to(device)
        mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill(~visible, torch.finfo(dtype).min)
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.from_numpy(tree.tokens)[None].to(device),  # (1, T)
                attention_mask=mask[None, None],  # (1, 1, T, T), added to the scores
                position_ids=torch.from_numpy(tree.positions)[None].to(device),
                use_cache=False,
                logits_to_keep=torch.from_numpy(np.flatnonzero(tree.wanted)).to(device),
            )
            logits: Logits = output.logits[0].float().cpu().numpy()  # (wanted, n_vocab)
        return logits

    def rewind(self, n_past: int) -> None:
        """Forget all but the first `n_past` tokens of the cache.

        Raises:
            BadInput: there are fewer.
        """
        if not 0 <= n_past <= self.n_past:
            raise BadInput(f"cannot rewind to {n_past} of {self.n_past} tokens")
        if n_past == 0:
            self._clear()
        elif n_past < self.n_past:
            self._cache.crop(n_past)

    @property
    def bos(self) -> int | None:
        """As `Runtime.bos`; raises `BadInput` as `encode` does."""
        return bos_of(self._text())

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids of `text`, without BOS or EOS; `parse_special` reads "<|...|>" as the special token it names.

        Raises:
            BadInput: there is no tokenizer that transformers reads.
        """
        ids = self._text()(text, add_special_tokens=False, split_special_tokens=not parse_special)["input_ids"]
        return [int(i) for i in ids]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids, special tokens left out.

        Raises:
            BadInput: there is no tokenizer that transformers reads.
        """
        return str(self._text().decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _text(self) -> Any:
        if self._tokenizer is None:  # loaded when first asked for: measuring speed needs none
            if self._path is None:
                raise BadInput("the model was given without a tokenizer")
            self._tokenizer = load_tokenizer(self._path)
        return self._tokenizer

    def description(self) -> dict[str, str | int]:
        """llama-bench's `model_type`, `model_n_params` and `backends`."""
        return {
            "model_type": f"{self._model.config.model_type} {str(self._model.dtype).removeprefix('torch.')}",
            "model_n_params": sum(p.numel() for p in self._model.parameters()),
            "backends": "CPU" if self._model.device.type == "cpu" else self._model.device.type.upper(),
        }

    def close(self) -> None:
        """Let go of the model and the cache."""
        self._model = self._tokenizer = None
        self._clear()


def stock_config(checkpoint: Checkpoint) -> Any:
    """The config as transformers reads it, with the attention that we choose: the file's may name code on the hub, and
    transformers would look at it before one that is given as an argument. Raises whatever transformers does."""
    config = AutoConfig.from_pretrained(checkpoint.folder, **_LOCAL, **checkpoint.rope_overrides)
    config._attn_implementation = "eager" if checkpoint.shape.attention_soft_cap else "sdpa"
    return config


def load_model(path: Path) -> Any:
    """The float32 model of a Hugging Face folder, in evaluation mode; its layers may have different widths.

    Where attention has a soft cap (Gemma 2) the model computes it: transformers' default attention leaves it out, which
    is another model than the one that llama.cpp and ONNX Runtime run.

    Raises:
        BadInput: no or pickled weights, weights that do not match the config, or what transformers cannot load.
    """
    checkpoint = Checkpoint(path)
    remedy = "download or convert the checkpoint again"
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # what it would warn of is an error here, below
    try:
        config = stock_config(checkpoint)
        kind = AutoModelForCausalLM
        if checkpoint.config.get(KEY):
            from edgeprune.heterogeneous import model_class

            kind = model_class(config)
        model, info = kind.from_pretrained(
            path, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **_LOCAL
        )
    except Exception as error:  # a config has many fields, and each may be anything
        raise BadInput(f"transformers cannot load it ({_line(error)})", where=path, remedy=remedy) from error
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, info[kind])):
            few = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise BadInput(f"{kind.replace('_', ' ')}: {few}", where=path, remedy=remedy)
    return model.eval()


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a Hugging Face folder; raises `BadInput` if it has none or a broken one."""
    return auto_tokenizer(path)


def bos_of(tokenizer: Any) -> int | None:
    """The id of BOS if the tokenizer begins a text with it, else None."""
    first = tokenizer("a")["input_ids"][:1]
    return int(first[0]) if first and first[0] == tokenizer.bos_token_id else None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
