"""The GGUF reader: what it reads is right, and nothing that is wrong gets through."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.errors import BadInput
from edgeprune.runtimes.gguf_file import GgufFile, Widths
from edgeprune.runtimes.gguf_format import BLOCKS, TYPE_NAMES, ValueType, part_of, tensor_bytes

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "sample.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_key_value("llama.attention.head_count", [4, 2], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32)
    writer.add_uint32("llama.attention.head_count_kv", 2)
    writer.add_uint32("llama.feed_forward_length", 96)
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_int64("a.negative", -5)
    writer.add_array("a.words", ["one", "zwei", "三"])
    writer.add_key_value("a.raw", b"\xff\xfe", gguf.GGUFValueType.STRING)
    writer.add_tensor("token_embd.weight", np.arange(128, dtype=np.float32).reshape(4, 32))
    writer.add_tensor(
        "blk.0.attn_q.weight", RNG.integers(0, 255, (3, 34), dtype=np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0
    )
    writer.add_tensor("blk.0.ffn_norm.weight", np.ones(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "file.gguf"


def parse(path: Path, data: bytes) -> GgufFile:
    path.write_bytes(data)
    return GgufFile(path)


def test_reads_what_was_written(sample: bytes, scratch: Path) -> None:
    file = parse(scratch, sample)
    assert file.architecture == "llama"
    assert file.metadata["a.float"] == 0.5
    assert file.metadata["a.bool"] is True
    assert file.metadata["a.negative"] == -5
    assert file.metadata["a.words"] == ["one", "zwei", "三"]
    assert file.types["a.words"] == (ValueType.ARRAY, ValueType.STRING)
    assert file.metadata["a.raw"].encode("utf-8", "surrogateescape") == b"\xff\xfe"
    assert file.widths() == [Widths(4, 2, 96), Widths(2, 2, 96)]
    embedding = file.tensor("token_embd.weight")
    assert (embedding.shape, embedding.type, embedding.n_bytes) == ((4, 32), "F32", 512)
    assert file.tensor_bytes("token_embd.weight").view("<f4").tolist() == list(range(128))
    assert file.tensor("blk.0.attn_q.weight").n_bytes == 3 * 34
    assert file.parameters == 128 + 96 + 32
    assert file.type_counts() == {"F32": 2, "Q8_0": 1}
    assert file.bytes_by_part() == {
        "embedding": 512, "attention": 102, "mlp": 0, "norms": 128, "head": 0, "other": 0,
    }  # fmt: skip
    assert file.bytes_by_type() == {"F32": 640, "Q8_0": 102}


def test_types_are_those_of_the_gguf_package() -> None:
    for kind in gguf.GGMLQuantizationType:
        assert TYPE_NAMES[int(kind)] == kind.name
        if kind.name != "Q8_1":  # an intermediate of computation; the package counts its two halves as floats
            assert BLOCKS[kind.name] == tuple(gguf.GGML_QUANT_SIZES[kind])
    assert tensor_bytes("Q6_K", (2, 512)) == 2 * 2 * 210


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("token_embd.weight", "embedding"),
        ("output.weight", "head"),
        ("output_norm.weight", "norms"),
        ("blk.3.attn_norm.weight", "norms"),
        ("blk.3.attn_output.bias", "attention"),
        ("blk.11.ffn_down.weight", "mlp"),
        ("rope_freqs.weight", "other"),
    ],
)
def test_part_of(name: str, part: str) -> None:
    assert part_of(name) == part


def string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def header(*, tensors: int = 0, values: int = 0, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, values)


def value(key: str, kind: int, raw: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + raw


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


PAD = b"\0" * 256
HUGE = (1 << 64) - 1
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "no magic": header(magic=b"GGML") + PAD,
    "version 1": header(version=1) + PAD,
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + PAD,
    "number of tensors": header(tensors=HUGE) + PAD,
    "number of metadata": header(values=HUGE) + PAD,
    "longer than the file": header(values=1) + struct.pack("<Q", HUGE) + PAD,
    "unknown type": header(values=1) + value("k", 13, b"") + PAD,
    "array of arrays": header(values=1) + value("k", 9, struct.pack("<IQ", 9, 1 << 40)) + PAD,
    "array length": header(values=1) + value("k", 9, struct.pack("<IQ", 4, 1 << 62)) + PAD,
    "string array length": header(values=1) + value("k", 9, struct.pack("<IQ", 8, HUGE)) + PAD,
    "twice": header(values=2) + value("k", 4, b"\1\0\0\0") * 2 + PAD,
    "key": header(values=1) + value("", 4, b"\1\0\0\0") + PAD,
    "alignment 24": header(values=1) + value("general.alignment", 4, struct.pack("<I", 24)) + PAD,
    "alignment 0": header(values=1) + value("general.alignment", 4, struct.pack("<I", 0)) + PAD,
    "alignment text": header(values=1) + value("general.alignment", 8, string("32")) + PAD,
    "outside": header(tensors=1) + tensor("t", (1 << 20, 1 << 20)) + PAD,
    "overflow": header(tensors=1) + tensor("t", (1 << 32, 1 << 32, 1 << 32, 1 << 32)) + PAD,
    "wraps": header(tensors=1) + tensor("t", (8,), offset=HUGE - 31) + PAD,
    "misaligned": header(tensors=1) + tensor("t", (8,), offset=8) + PAD,
    "no dimension": header(tensors=1) + tensor("t", ()) + PAD,
    "five dimensions": header(tensors=1) + tensor("t", (1, 1, 1, 1, 1)) + PAD,
    "zero rows": header(tensors=1) + tensor("t", (8, 0)) + PAD,
    "tensor type": header(tensors=1) + tensor("t", (8,), kind=4) + PAD,
    "half a block": header(tensors=1) + tensor("t", (33,), kind=8) + PAD,
    "tensor twice": header(tensors=2) + tensor("t", (8,)) + tensor("t", (8,), offset=32) + PAD,
    "overlap": header(tensors=2) + tensor("t", (16,)) + tensor("u", (8,), offset=32) + PAD,
    "long name": header(tensors=1) + tensor("t" * 64, (8,)) + PAD,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(case: str, scratch: Path) -> None:
    with pytest.raises(BadInput) as caught:
        parse(scratch, HOSTILE[case])
    assert str(scratch) in str(caught.value)
    assert caught.value.remedy


def test_absent_file() -> None:
    with pytest.raises(BadInput, match="no such file"):
        GgufFile(Path("nowhere.gguf"))


def outcome(action: Callable[[], Any]) -> None:
    """Either it works or it is `BadInput` of one line; anything else fails the test."""
    try:
        action()
    except BadInput as error:
        assert "\n" not in str(error)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_every_truncation_is_refused(sample: bytes, scratch: Path, data: st.DataObject) -> None:
    # The last tensor's padding may go, nothing else.
    length = data.draw(st.integers(0, len(sample) - 33))
    with pytest.raises(BadInput):
        parse(scratch, sample[:length])


@given(st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=500, deadline=None)
def test_changed_bytes_are_read_or_refused(sample: bytes, scratch: Path, changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(sample)
    for at, byte in changes:
        damaged[at % len(damaged)] = byte

    def read_all() -> None:
        file = parse(scratch, bytes(damaged))
        for name in file.tensors:
            file.tensor_bytes(name).sum()
        outcome(file.widths)
        outcome(file.check_loadable)
        file.bytes_by_part()

    outcome(read_all)


def test_double_tokens_are_not_loadable(tmp_path: Path) -> None:
    words = struct.pack("<IQ", 8, 2) + string("a") * 2
    file = parse(tmp_path / "f.gguf", header(values=1) + value("tokenizer.ggml.tokens", 9, words))
    with pytest.raises(BadInput, match="same token twice"):
        file.check_loadable()
