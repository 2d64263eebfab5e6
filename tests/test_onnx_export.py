"""The ONNX graph of ours: its logits against those of torch and optimum, its files, and onnxruntime-genai on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
from conftest import MakeLlama
from onnx_reference import TOKENS, divergence, generated, greedy, torch_logits, with_stored_weights
from safetensors.numpy import load_file, save_file
from transformers import LlamaForCausalLM

from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import BadInput, StageFailed
from edgeprune.export.onnx_bundle import with_plain_decoder
from edgeprune.export.onnx_graph import export_onnx
from edgeprune.export.onnx_quant import dequantise, quantise
from edgeprune.export.onnx_types import PRECISIONS, predicted_bytes
from edgeprune.export.optimum_exporter import export_optimum
from edgeprune.runtimes.onnx_file import summary
from edgeprune.runtimes.ort import OnnxRuntime

MODELS: dict[str, dict[str, Any]] = {
    "grouped, tied": {},
    "multi-head, untied": {"num_key_value_heads": 8, "head_dim": 16, "tie_word_embeddings": False},
    "wide heads": {"head_dim": 32, "num_attention_heads": 6, "num_key_value_heads": 2},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "odd widths": {"hidden_size": 72, "intermediate_size": 100, "head_dim": 16, "num_attention_heads": 4},
    "odd, untied": {"hidden_size": 72, "intermediate_size": 100, "tie_word_embeddings": False},
    "scaled rotary": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}


def resize(model: LlamaForCausalLM, widths: list[tuple[int, int, int]]) -> LlamaForCausalLM:
    """Give each layer its own (query heads, key/value heads, neurons), keeping the first rows and columns."""

    def cut(linear: torch.nn.Linear, rows: int, columns: int) -> torch.nn.Linear:
        smaller = torch.nn.Linear(columns, rows, bias=False)
        with torch.no_grad():
            smaller.weight.copy_(linear.weight[:rows, :columns])
        return smaller

    for layer, (heads, kv_heads, neurons) in zip(model.model.layers, widths, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        hidden, size = model.config.hidden_size, attention.head_dim
        attention.q_proj = cut(attention.q_proj, heads * size, hidden)
        attention.k_proj = cut(attention.k_proj, kv_heads * size, hidden)
        attention.v_proj = cut(attention.v_proj, kv_heads * size, hidden)
        attention.o_proj = cut(attention.o_proj, hidden, heads * size)
        attention.num_key_value_groups = heads // kv_heads
        mlp.gate_proj, mlp.up_proj = cut(mlp.gate_proj, neurons, hidden), cut(mlp.up_proj, neurons, hidden)
        mlp.down_proj = cut(mlp.down_proj, hidden, neurons)
    return model


def open_model(path: Path) -> OnnxRuntime:
    return OnnxRuntime(path, n_ctx=64, threads=1)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_fp32_logits_are_those_of_torch(make_llama: MakeLlama, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = make_llama(**changes)
    expected = torch_logits(LlamaForCausalLM.from_pretrained(folder))
    runtime = open_model(export_onnx(folder, tmp_path / "onnx", precision="fp32"))
    np.testing.assert_allclose(runtime.forward(TOKENS), expected, atol=1e-4, rtol=1e-4)
    runtime.rewind(11)
    one_by_one = np.concatenate([runtime.forward([token]) for token in TOKENS[11:]])
    np.testing.assert_allclose(one_by_one, expected[11:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_layers_may_differ_in_width(make_llama: MakeLlama, tmp_path: Path, precision: str) -> None:
    source = make_llama()
    widths = [(8, 4, 128), (2, 2, 96), (6, 3, 40)]
    model = resize(LlamaForCausalLM.from_pretrained(source), widths)
    folder = shutil.copytree(source, tmp_path / "resized")  # the loaded model still maps the source's file
    model.save_pretrained(folder)  # config.json still tells the uniform widths; the tensors decide
    out = export_onnx(folder, tmp_path / "onnx", precision=precision)
    logits = open_model(out).forward(TOKENS)
    expected = torch_logits(with_stored_weights(model, precision))
    assert divergence(expected, logits) < (1e-8 if precision == "fp32" else 1e-3)
    assert [(w.heads, w.kv_heads, w.neurons) for w in summary(out).layers] == widths


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("precision", ["int4", "int4-head8", "int8", "fp16"])
def test_stored_weights_are_the_ones_computed_with(
    make_llama: MakeLlama, tmp_path: Path, precision: str, changes: dict[str, Any]
) -> None:
    folder = make_llama(**changes)
    runtime = open_model(export_onnx(folder, tmp_path / "onnx", precision=precision))
    model = LlamaForCausalLM.from_pretrained(folder)
    dense = torch_logits(model)
    expected = torch_logits(with_stored_weights(model, precision))
    logits = runtime.forward(TOKENS)
    # What is left is the rounding of activations to int8, far less than that of the weights to 4 bits
    assert divergence(expected, logits) < (1e-8 if precision == "fp16" else 2e-3)
    if precision.startswith("int4"):
        assert divergence(expected, logits) < divergence(dense, logits) / 10


@pytest.mark.filterwarnings("ignore")
def test_what_optimum_makes_another_model_of_is_refused(make_llama: MakeLlama, tmp_path: Path) -> None:
    """The installed transformers does not read what its next version writes of rotary embeddings."""
    folder = make_llama()
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_theta", None)
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 50.0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(StageFailed, match="another model"):
        export_optimum(folder, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BadInput, match="no safetensors"):
        export_optimum(folder, tmp_path / "onnx")


@pytest.mark.filterwarnings("ignore")  # of the tracing exporter's own
def test_optimum_makes_the_same_logits(make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = make_llama(num_attention_heads=4, num_key_value_heads=2)
    ours = open_model(export_onnx(folder, tmp_path / "ours", precision="fp32"))
    theirs = open_model(export_optimum(folder, tmp_path / "theirs"))
    expected = theirs.forward(TOKENS)
    np.testing.assert_allclose(ours.forward(TOKENS), expected, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(expected, torch_logits(LlamaForCausalLM.from_pretrained(folder)), atol=1e-4, rtol=1e-4)
    theirs.rewind(9)
    parts = [theirs.forward(TOKENS[9:20]), theirs.forward(TOKENS[20:], last_only=True)]
    np.testing.assert_allclose(parts[0], expected[9:20], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(parts[1], expected[-1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("uniform", [True, False], ids=["uniform", "layers differ"])
def test_genai_generates_what_torch_does(make_llama: MakeLlama, tmp_path: Path, uniform: bool) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    source = make_llama(eos_token_id=2)
    model = LlamaForCausalLM.from_pretrained(source)
    folder = shutil.copytree(source, tmp_path / "model")  # the loaded model still maps the source's file
    if not uniform:
        resize(model, [(8, 4, 128), (2, 2, 96), (6, 3, 40)]).save_pretrained(folder)
    prompt = TOKENS[:7]
    sequence = greedy(model, prompt, 12)
    out = export_onnx(folder, tmp_path / "onnx", precision="fp32")
    made = generated(out, prompt, len(sequence))
    assert made == sequence[: len(made)]
    assert len(made) > len(prompt)
    text = "The kettle sings before the water boils."
    assert list(genai.Tokenizer(genai.Model(str(out))).encode(text)) == open_model(out).encode(text)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tied_tensors_are_stored_once(make_llama: MakeLlama, tmp_path: Path, precision: str) -> None:
    folder = make_llama(hidden_size=256, num_hidden_layers=1)
    info = summary(export_onnx(folder, tmp_path / "onnx", precision=precision))
    assert info.precision == precision.removesuffix("-head8")
    stored = {(t.location, t.offset): t.nbytes for t in info.initializers if t.location}
    written = (tmp_path / "onnx" / "model.onnx.data").stat().st_size
    assert sum(stored.values()) <= written <= sum(stored.values()) + 64 * len(stored)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    tables = [t for t in info.initializers if t.dimensions and t.dimensions[0] == rows and "scales" not in t.name]
    assert len({t.offset for t in tables if "zero_points" not in t.name}) == 1


def test_the_folder_is_whole_and_runs_no_code(make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = make_llama()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "code.Model"}}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    out = export_onnx(folder, tmp_path / "onnx", precision="int4", context=100)
    names = {file.name for file in out.iterdir()}
    assert names >= {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((out / "config.json").read_text()) == config
    assert json.loads((out / "genai_config.json").read_text())["model"]["context_length"] == 100
    assert summary(out).positions == 100
    with pytest.raises(BadInput, match="exported for 100 positions, 101 were asked"):
        OnnxRuntime(out, n_ctx=101, threads=1)


def test_what_cannot_be_exported_is_refused(make_llama: MakeLlama, tmp_path: Path) -> None:
    out = tmp_path / "onnx"
    folder = make_llama()
    with pytest.raises(BadInput, match="did you mean 'int4'"):
        export_onnx(folder, out, precision="int44")
    with pytest.raises(BadInput, match=r"context 300 is not in 1 \.\.\. 256"):
        export_onnx(folder, out, precision="fp32", context=300)
    with pytest.raises(BadInput, match=r"head size 8 .* multiple of 16"):
        export_onnx(make_llama(head_dim=8), out, precision="fp32")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({**tensors, name: np.full_like(tensors[name], 1e5)}, folder / "model.safetensors")
    with pytest.raises(BadInput, match=r"mlp/down\.weight has values that float16 cannot hold"):
        export_onnx(folder, out, precision="fp16")
    save_file({**tensors, name: tensors[name][:, :-1].copy()}, folder / "model.safetensors")
    with pytest.raises(BadInput, match=r"gate_proj.weight is \(128, 64\), expected \(127, 64\)"):
        export_onnx(folder, out, precision="fp32")
    assert not out.exists()


def test_a_byte_level_tokenizer_keeps_only_its_own_decoder() -> None:
    own = {"type": "ByteLevel", "add_prefix_space": True}
    steps = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}, own]}
    assert with_plain_decoder({"pre_tokenizer": own, "decoder": steps})["decoder"] == own
    sentencepiece = {"pre_tokenizer": None, "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}]}}
    assert with_plain_decoder(sentencepiece) == sentencepiece


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantisation_rounds_to_nearest(bits: int, symmetric: bool) -> None:
    weight = np.random.default_rng(0).standard_normal((5, 72)).astype(np.float32)
    weight[1, 32:64] = 0  # a whole block
    weight[2] = np.abs(weight[2])
    blocks = quantise(weight, bits=bits, block=32, symmetric=symmetric)
    back = dequantise(blocks)
    assert blocks.codes.shape == (5, 3, 32 * bits // 8)
    assert back.shape == weight.shape
    assert (back[1, 32:64] == 0).all()
    step = np.repeat(np.abs(blocks.scales), 32, axis=1)[:, :72]
    error = np.abs(back - weight)
    assert np.quantile(error / np.where(step > 0, step, 1), 0.9) <= 0.5  # the rest are cut at the ends of the range
    assert error.max() < 2 * step.max()
    # What is on the grid stays there
    again = quantise(back, bits=bits, block=32, symmetric=True)
    if symmetric:
        np.testing.assert_allclose(dequantise(again), back, atol=1e-6)


def test_quantisation_refuses_what_the_operator_does_not_take() -> None:
    with pytest.raises(ValueError, match="bits"):
        quantise(np.zeros((2, 32), np.float32), bits=3, block=32, symmetric=True)
    with pytest.raises(ValueError, match="block"):
        quantise(np.zeros((2, 32), np.float32), bits=4, block=24, symmetric=True)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}])
def test_sizes_are_told_in_advance(
    make_llama: MakeLlama, tmp_path: Path, precision: str, changes: dict[str, Any]
) -> None:
    folder = make_llama(intermediate_size=104, **changes)  # rows that are no whole blocks
    stored = {
        (tensor.location, tensor.offset) if tensor.location else tensor.name: tensor.nbytes
        for tensor in summary(export_onnx(folder, tmp_path / "onnx", precision=precision)).initializers
        if tensor.name not in ("cos_cache", "sin_cache") and tensor.dtype != "int64"
    }
    told = predicted_bytes(Checkpoint(folder).shape, precision)
    assert sum(told.values()) == sum(stored.values())
    assert (told["head"] == 0) == (not changes)


def test_hostile_names_of_nodes_and_tensors_take_no_time(tmp_path: Path, make_llama: MakeLlama) -> None:
    out = export_onnx(make_llama(), tmp_path / "onnx", precision="fp32")
    widths = summary(out).layers
    graph = onnx.load(out / "model.onnx", load_external_data=False)
    long = "layers.1" + ".down" * 13_000 + "."
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((2, 2), np.float32), long + "bias"))
    graph.graph.initializer.append(
        onnx.numpy_helper.from_array(np.zeros((2, 2), np.float32), f"layers.{'9' * 5000}.down")
    )
    onnx.save(graph, out / "model.onnx")
    assert summary(out).layers == widths
