"""Models of random weights with which a machine's speed is measured: no download, and the same on every machine.

Speed does not depend on what the weights are, as long as no activation overflows; so blocks of a quantisation are
filled with random bits and small scales. A yardstick is written in a second and without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from edgeprune.errors import unknown
from edgeprune.files import atomic_file

HEAD_DIM = 64
SCALE = 0.002  # of a weight: activations stay small through any number of layers, as residuals carry them


@dataclass(frozen=True)
class Yardstick:
    """A LLaMA's shape, tied. Only widths that are multiples of 256 can be of every type of llama.cpp."""

    name: str
    layers: int
    hidden: int
    neurons: int
    heads: int
    kv_heads: int
    vocabulary: int
    worded: bool = False  # whether its tokens have texts, as a real model's

    @property
    def parameters(self) -> int:
        """All of them, norms among them."""
        return sum(int(np.prod(shape)) for _, shape in self.tensors())

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes, (rows, columns) or (values,)."""
        wide, narrow = self.heads * HEAD_DIM, self.kv_heads * HEAD_DIM
        found: list[tuple[str, tuple[int, ...]]] = [
            ("token_embd.weight", (self.vocabulary, self.hidden)),
            ("output_norm.weight", (self.hidden,)),
        ]
        for i in range(self.layers):
            found += [
                (f"blk.{i}.attn_norm.weight", (self.hidden,)),
                (f"blk.{i}.attn_q.weight", (wide, self.hidden)),
                (f"blk.{i}.attn_k.weight", (narrow, self.hidden)),
                (f"blk.{i}.attn_v.weight", (narrow, self.hidden)),
                (f"blk.{i}.attn_output.weight", (self.hidden, wide)),
                (f"blk.{i}.ffn_norm.weight", (self.hidden,)),
                (f"blk.{i}.ffn_gate.weight", (self.neurons, self.hidden)),
                (f"blk.{i}.ffn_up.weight", (self.neurons, self.hidden)),
                (f"blk.{i}.ffn_down.weight", (self.hidden, self.neurons)),
            ]
        return found


# Few wide layers show the bandwidth, many slim ones what a layer costs beside its bytes: .08 to .09 ms on two cores of
# a Zen 5 for every width from 576 to 2048, but .07 for 512 and .05 for 256. So the slim one has the widths of the
# smallest SmolLM2; types whose blocks do not fill such rows, which such models therefore do not get, have their own.
WIDE = Yardstick("wide", layers=5, hidden=1536, neurons=4096, heads=24, kv_heads=4, vocabulary=4096)
SLIM = Yardstick("slim", layers=30, hidden=576, neurons=1536, heads=9, kv_heads=3, vocabulary=32768, worded=True)
SLIM_256 = Yardstick("slim", layers=20, hidden=768, neurons=2048, heads=12, kv_heads=4, vocabulary=32768, worded=True)


def slim(kind: str) -> Yardstick:
    """The slim yardstick that can be of a type of llama.cpp."""
    block, _ = gguf.GGML_QUANT_SIZES[Type[kind]]
    return SLIM if SLIM.hidden % block == 0 else SLIM_256


Fill = Callable[[np.random.Generator, int], NDArray[np.uint8]]  # bytes of so many blocks, (blocks, bytes)


def _halves(blocks: int, value: float) -> NDArray[np.uint8]:
    return np.full((blocks, 1), value, np.float16).view(np.uint8)


def _bits(random: np.random.Generator, blocks: int, count: int) -> NDArray[np.uint8]:
    return random.integers(0, 256, (blocks, count), np.uint8)


def _f16(random: np.random.Generator, blocks: int) -> NDArray[np.uint8]:
    return random.normal(0, SCALE, (blocks, 1)).astype(np.float16).view(np.uint8)


# The layouts are ggml's (ggml-common.h): scales of half precision before or behind the quants.
FILLS: dict[Type, Fill] = {
    Type.F16: _f16,
    Type.Q4_0: lambda r, n: np.hstack([_halves(n, SCALE / 4), _bits(r, n, 16)]),
    Type.Q4_1: lambda r, n: np.hstack([_halves(n, SCALE / 4), _halves(n, -2 * SCALE), _bits(r, n, 16)]),
    Type.IQ4_NL: lambda r, n: np.hstack([_halves(n, SCALE / 64), _bits(r, n, 16)]),
    Type.Q5_0: lambda r, n: np.hstack([_halves(n, SCALE / 8), _bits(r, n, 20)]),
    Type.Q5_1: lambda r, n: np.hstack([_halves(n, SCALE / 8), _halves(n, -2 * SCALE), _bits(r, n, 20)]),
    Type.Q8_0: lambda r, n: np.hstack([_halves(n, SCALE / 64), _bits(r, n, 32)]),
    Type.Q4_K: lambda r, n: np.hstack([_halves(n, SCALE / 128), _halves(n, SCALE / 16), _bits(r, n, 140)]),
    Type.Q5_K: lambda r, n: np.hstack([_halves(n, SCALE / 256), _halves(n, SCALE / 16), _bits(r, n, 172)]),
    Type.Q6_K: lambda r, n: np.hstack([_bits(r, n, 208), _halves(n, SCALE / 2048)]),
}


def _byte_letters() -> list[str]:
    """A letter for each byte as GPT-2 writes it: itself where it can be printed, else one from 256 on."""
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]


def _add_words(writer: gguf.GGUFWriter, count: int) -> None:
    """A byte-level vocabulary: 256 bytes, then pairs of them, each with its merge."""
    base = _byte_letters()
    pairs = list(islice(product(base, repeat=2), count - 256))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*base, *(first + second for first, second in pairs)])
    writer.add_token_types([1] * (256 + len(pairs)))  # normal
    writer.add_token_merges([f"{first} {second}" for first, second in pairs])


def write_yardstick(shape: Yardstick, kind: str, out: Path, *, seed: int = 0) -> Path:
    """Write `shape` with all matrices in one type of llama.cpp ("Q4_0", "Q8_0", "F16" …) as a GGUF file.

    Raises:
        BadInput: there is no filling of that type.
    """
    fills = {each.name: (each, fill) for each, fill in FILLS.items()}
    if kind not in fills:
        raise unknown("type of a yardstick", kind, fills)
    each, fill = fills[kind]
    block, _ = gguf.GGML_QUANT_SIZES[each]
    random = np.random.default_rng(seed)
    with atomic_file(out) as temporary:
        writer = gguf.GGUFWriter(temporary, "llama")
        try:
            writer.add_name(f"edgeprune yardstick {shape.name} {kind}")
            writer.add_block_count(shape.layers)
            writer.add_context_length(4096)
            writer.add_embedding_length(shape.hidden)
            writer.add_feed_forward_length(shape.neurons)
            writer.add_head_count(shape.heads)
            writer.add_head_count_kv(shape.kv_heads)
            writer.add_layer_norm_rms_eps(1e-5)
            writer.add_rope_dimension_count(HEAD_DIM)
            writer.add_vocab_size(shape.vocabulary)
            if shape.worded:
                _add_words(writer, shape.vocabulary)
            else:
                writer.add_tokenizer_model("no_vocab")
            for name, size in shape.tensors():
                if len(size) == 1:
                    writer.add_tensor(name, np.ones(size, np.float32))
                    continue
                rows, columns = size
                values = fill(random, rows * columns // block).reshape(rows, -1)
                writer.add_tensor(name, values, raw_dtype=each)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return out
