"""The ONNX Runtime runtime keeps the protocol, and refuses folders that reach outside themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgeprune.errors import BadInput
from edgeprune.export.onnx_graph import export_onnx
from edgeprune.runtimes import open_runtime
from edgeprune.runtimes.base import generate
from edgeprune.runtimes.onnx_file import check_onnx, summary
from edgeprune.runtimes.ort import OnnxRuntime

TOKENS = np.random.default_rng(3).integers(1, 290, 30)


@pytest.fixture(scope="module")
def exported(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(tiny_folder, tmp_path_factory.mktemp("ort") / "onnx", precision="fp32")


@pytest.fixture
def runtime(exported: Path) -> OnnxRuntime:
    return OnnxRuntime(exported, n_ctx=32, threads=1)


def test_any_split_of_the_tokens_gives_the_same_logits(runtime: OnnxRuntime) -> None:
    whole = runtime.forward(TOKENS)
    assert whole.shape == (30, runtime.n_vocab)
    assert whole.dtype == np.float32
    for splits in ([1, 2, 3], [10, 20], [29], list(range(1, 30))):
        runtime.rewind(0)
        parts = np.concatenate([runtime.forward(part) for part in np.split(TOKENS, splits)])
        np.testing.assert_allclose(parts, whole, atol=1e-4)
        assert runtime.n_past == 30


def test_the_last_position_alone(runtime: OnnxRuntime) -> None:
    whole = runtime.forward(TOKENS)
    runtime.rewind(12)
    last = runtime.forward(TOKENS[12:], last_only=True)
    assert last.shape == (1, runtime.n_vocab)
    np.testing.assert_allclose(last[0], whole[-1], atol=1e-4)


def test_earlier_logits_are_not_overwritten(runtime: OnnxRuntime) -> None:
    first = runtime.forward([5])
    kept = first.copy()
    runtime.forward([6])
    np.testing.assert_array_equal(first, kept)


def test_rewinding_forgets(runtime: OnnxRuntime) -> None:
    runtime.forward(TOKENS[:8])
    expected = runtime.forward([9])
    runtime.rewind(8)
    runtime.forward(TOKENS[8:20])
    runtime.rewind(8)
    np.testing.assert_allclose(runtime.forward([9]), expected, atol=1e-5)
    with pytest.raises(BadInput, match="cannot rewind from 9 to 10"):
        runtime.rewind(10)


def test_wrong_tokens_are_refused_and_change_nothing(runtime: OnnxRuntime) -> None:
    runtime.forward(TOKENS)
    cases = {
        "context of 32 tokens is full": [1, 2, 3],
        "not in the vocabulary": [runtime.n_vocab],
        f"vocabulary of {runtime.n_vocab}": [-1],
    }
    for message, tokens in cases.items():
        with pytest.raises(BadInput, match=message):
            runtime.forward(tokens)
    assert runtime.n_past == 30
    assert runtime.forward([]).shape == (0, runtime.n_vocab)


def test_text_there_and_back(runtime: OnnxRuntime) -> None:
    text = "It isn't 3 o'clock:\n\tÜbermorgen, 雨 🙂"
    assert runtime.decode(runtime.encode(text)) == text
    marked = "<|endoftext|>stop"
    assert runtime.encode(marked, parse_special=True)[0] == 0
    plain = runtime.encode(marked)
    assert 0 not in plain
    assert runtime.decode(plain) == marked
    assert runtime.decode([0, *plain, 0]) == marked


def test_it_is_the_runtime_of_such_a_folder(exported: Path) -> None:
    runtime = open_runtime(exported, n_ctx=16, threads=2)
    assert isinstance(runtime, OnnxRuntime)
    tokens = list(generate(runtime, [1, 2, 3], 5))
    assert tokens == list(generate(runtime, [1, 2, 3], 5))
    assert runtime.n_past == 8
    runtime.close()


def test_session_settings(exported: Path) -> None:
    usual = OnnxRuntime(exported, n_ctx=8, threads=1).forward([1])
    for settings in ({"spinning": False}, {"dynamic_block": 4}, {"memory_arena": False}):
        other = OnnxRuntime(exported, n_ctx=8, threads=1, settings=settings).forward([1])
        np.testing.assert_allclose(other, usual, rtol=1e-5, atol=1e-5)
    with pytest.raises(BadInput, match="provider takes cpu"):
        OnnxRuntime(exported, n_ctx=8, threads=1, settings={"provider": "quantum"})
    with pytest.raises(BadInput, match="spinning takes on, off"):
        OnnxRuntime(exported, n_ctx=8, threads=1, settings={"spinning": 2})
    with pytest.raises(BadInput, match="at least 1"):
        OnnxRuntime(exported, n_ctx=0, threads=1)


def test_an_export_without_tokenizer(exported: Path, tmp_path: Path) -> None:
    for name in ("model.onnx", "model.onnx.data"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    runtime = OnnxRuntime(tmp_path, n_ctx=8, threads=1)
    with pytest.raises(BadInput, match=r"no tokenizer\.json"):
        runtime.encode("text")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match="the tokenizer does not load"):
        runtime.decode([1])


def test_summary_tells_what_is_inside(exported: Path) -> None:
    info = summary(exported)
    assert info.precision == "fp32"
    assert [(layer.heads, layer.kv_heads, layer.neurons) for layer in info.layers] == [(8, 4, 128)] * 3
    assert info.operators["GroupQueryAttention"] == 3
    assert info.positions == 256
    assert info.file_bytes == sum((exported / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    reference = onnx.load(exported / "model.onnx", load_external_data=False).graph
    assert [t.name for t in info.initializers] == [t.name for t in reference.initializer]
    assert [t.dimensions for t in info.initializers] == [tuple(t.dims) for t in reference.initializer]


Change = Callable[[onnx.ModelProto], None]


def external(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.external_data)


def put(key: str, value: str) -> Change:
    def change(model: onnx.ModelProto) -> None:
        tensor = external(model)
        kept = {entry.key: entry.value for entry in tensor.external_data} | {key: value}
        del tensor.external_data[:]
        for name, text in kept.items():
            tensor.external_data.add(key=name, value=text)

    return change


def twice(model: onnx.ModelProto) -> None:
    external(model).external_data.add(key="location", value="/etc/passwd")


def in_a_subgraph(model: onnx.ModelProto) -> None:
    tensor = onnx.TensorProto(name="hidden", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    constant = onnx.helper.make_node("Constant", [], ["c"], value=tensor)
    branch = onnx.helper.make_graph([constant], "branch", [], [])
    model.graph.node.append(onnx.helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch))


def in_a_function(model: onnx.ModelProto) -> None:
    tensor = onnx.TensorProto(name="hidden", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="a/b")
    constant = onnx.helper.make_node("Constant", [], ["c"], value=tensor)
    opsets = [onnx.helper.make_opsetid("", 21)]
    model.functions.append(onnx.helper.make_function("local", "f", [], ["c"], [constant], opsets))


HOSTILE: dict[str, tuple[Change, str]] = {
    "parent folder": (put("location", "../model.onnx.data"), "outside the model's folder"),
    "absolute path": (put("location", "/etc/passwd"), "outside the model's folder"),
    "Windows path": (put("location", "C:\\data"), "outside the model's folder"),
    "a memory address": (put("location", "*/_ORT_MEM_ADDR_/*"), "outside the model's folder"),
    "no location": (put("location", ""), "outside the model's folder"),
    "the folder itself": (put("location", "."), "outside the model's folder"),
    "a link": (put("location", "link"), "is a link"),
    "an absent file": (put("location", "absent"), "cannot be read"),
    "behind the end": (put("offset", str(1 << 40)), "does not lie inside"),
    "before the start": (put("offset", "-64"), "not a valid ONNX file"),
    "too long": (put("length", "1000000000"), "not a valid ONNX file"),
    "no number": (put("length", "many"), "not a valid ONNX file"),
    "told twice": (twice, "external data twice"),
    "in a subgraph": (in_a_subgraph, "outside the model's folder"),
    "in a function": (in_a_function, "outside the model's folder"),
}


@pytest.mark.parametrize(("change", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_external_data(exported: Path, tmp_path: Path, change: Change, message: str) -> None:
    model = onnx.load(exported / "model.onnx", load_external_data=False)
    change(model)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "model.onnx.data").write_bytes((exported / "model.onnx.data").read_bytes())
    (tmp_path / "link").symlink_to(exported / "model.onnx.data")
    with pytest.raises(BadInput, match=message):
        OnnxRuntime(tmp_path, n_ctx=8, threads=1)


def test_broken_files(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprune.runtimes.onnx_file._COUNT_LIMIT", 1000)
    whole = (exported / "model.onnx").read_bytes()
    field = _field(7, onnx.GraphProto(name="g").SerializeToString())
    nested = b""
    for _ in range(40):  # graph (6) of an attribute (5) of a node (1) of the graph outside
        nested = _field(1, _field(5, _field(6, nested)))
    cases = {
        "not a valid": whole[: len(whole) // 2],
        "wire type": b"\x0b\x0c",
        "there twice": field + field,
        "nested more": _field(7, nested),
        "more than 1000 nodes and tensors": _field(7, _field(1, b"") * 2000),
        "more than 16 dimensions": _field(7, _field(5, _field(1, b"\x01" * 17))),
        "no ONNX graph": b"",
        "more than ten bytes": b"\xff" * 20,
    }
    for message, content in cases.items():
        (tmp_path / "model.onnx").write_bytes(content)
        with pytest.raises(BadInput, match=message):
            check_onnx(tmp_path)
    (tmp_path / "model.onnx").unlink()
    (tmp_path / "model.onnx").symlink_to(exported / "model.onnx")
    with pytest.raises(BadInput, match=r"no model\.onnx"):
        check_onnx(tmp_path)


def _field(number: int, content: bytes) -> bytes:
    """`content` as a field of wire type 2."""
    length, size = len(content), bytearray()
    while length > 127:
        size.append(length & 127 | 128)
        length >>= 7
    return bytes([number << 3 | 2, *size, length]) + content


def test_a_graph_without_cache(tmp_path: Path) -> None:
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(BadInput, match="not a decoder with a cache"):
        OnnxRuntime(tmp_path, n_ctx=8, threads=1)
    graph.node[0].op_type = "NoSuchOperator"
    onnx.save(onnx.helper.make_model(graph, ir_version=10), tmp_path / "model.onnx")
    with pytest.raises(BadInput, match="ONNX Runtime cannot load it"):
        OnnxRuntime(tmp_path, n_ctx=8, threads=1)
