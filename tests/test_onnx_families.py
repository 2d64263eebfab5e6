"""ONNX graphs of every family: logits against those of the real class, widths that differ, sizes, onnxruntime-genai."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_configs import TINY, family_of, save_tiny
from numpy.typing import NDArray
from onnx_reference import divergence, generated, greedy, torch_logits, with_stored_weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import BadInput
from edgeprune.export.onnx_graph import export_onnx
from edgeprune.export.onnx_types import predicted_bytes
from edgeprune.export.widths import layer_shapes
from edgeprune.families import Family
from edgeprune.plan import LayerPlan, PrunePlan
from edgeprune.runtimes.onnx_file import summary
from edgeprune.runtimes.ort import OnnxRuntime
from edgeprune.shape import LayerShape, ModelShape
from edgeprune.surgery import prune_checkpoint

TOKENS = np.random.default_rng(3).integers(1, 290, 60)  # longer than every window
NAMES = list(TINY)
FAMILIES = list({family_of(name): name for name in reversed(NAMES)}.values())[::-1]  # one entry each
# The operator rotates multiples of 16 values.
CHANGES: dict[str, dict[str, Any]] = {
    "phi": {"head_dim": 32},
    "phi-grouped": {"head_dim": 64},
    "phi3-partial": {"head_dim": 32},
}
MakeTiny = Callable[..., Path]


@pytest.fixture(scope="module")
def make_tiny(tmp_path_factory: pytest.TempPathFactory) -> MakeTiny:
    """A function that saves a tiny random model of an entry of `TINY`, once; not to be written to."""

    @cache
    def make(name: str, **changes: Any) -> Path:
        return save_tiny(tmp_path_factory.mktemp("tiny") / name, name, **CHANGES.get(name, {}), **changes)

    return make


def load(folder: Path) -> torch.nn.Module:
    # Eager attention is the one that has soft caps.
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def assert_same_logits(out: Path, expected: NDArray[np.float32]) -> None:
    """The exported folder's logits of `TOKENS`: whole, then token by token and in pieces, through the cache."""
    runtime = OnnxRuntime(out, n_ctx=64, threads=1)
    largest = float(np.abs(expected).max())
    np.testing.assert_allclose(runtime.forward(TOKENS) / largest, expected / largest, atol=1e-5)
    runtime.rewind(11)
    pieces = [runtime.forward([token]) for token in TOKENS[11:30]]
    pieces += [runtime.forward(TOKENS[30:45]), runtime.forward(TOKENS[45:])]
    np.testing.assert_allclose(np.concatenate(pieces) / largest, expected[11:] / largest, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_fp32_logits_are_those_of_torch(make_tiny: MakeTiny, tmp_path: Path, name: str) -> None:
    folder = make_tiny(name)
    assert_same_logits(export_onnx(folder, tmp_path / "onnx", precision="fp32"), torch_logits(load(folder), TOKENS))


@pytest.mark.parametrize("name", NAMES)
def test_so_they_are_of_a_uniformly_pruned_model(tmp_path: Path, name: str) -> None:
    changes = {"head_dim": 16, **TINY[name][1], **CHANGES.get(name, {})}
    source = save_tiny(tmp_path / "dense", name, **{**changes, "num_attention_heads": 8, "num_key_value_heads": 4})
    kept = LayerPlan(kv_heads=(1, 3), heads=(2, 7), neurons=tuple(range(1, 128, 2))[:-3])
    plan = PrunePlan((kept,) * len(Checkpoint(source).shape.layers), "hand", 0.0, 0.0, "", "")
    folder = prune_checkpoint(source, plan, tmp_path / "pruned")
    out = export_onnx(folder, tmp_path / "onnx", precision="fp32")
    assert_same_logits(out, torch_logits(load(folder), TOKENS))
    assert {(layer.heads, layer.kv_heads, layer.neurons) for layer in summary(out).layers} == {(2, 2, 61)}
    assert sum(predicted_bytes(Checkpoint(folder).shape, "fp32").values()) == stored_bytes(out)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("precision", ["int4", "fp16"])
def test_stored_weights_are_the_ones_computed_with(
    make_tiny: MakeTiny, tmp_path: Path, name: str, precision: str
) -> None:
    folder = make_tiny(name)
    runtime = OnnxRuntime(export_onnx(folder, tmp_path / "onnx", precision=precision), n_ctx=64, threads=1)
    expected = torch_logits(with_stored_weights(load(folder), precision), TOKENS)
    # What is left is the rounding of activations to int8
    assert divergence(expected, runtime.forward(TOKENS)) < (1e-8 if precision == "fp16" else 2e-3)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("precision", ["int4", "int8", "fp16"])
def test_sizes_are_told_in_advance(make_tiny: MakeTiny, tmp_path: Path, name: str, precision: str) -> None:
    folder = make_tiny(name)
    shape = Checkpoint(folder).shape
    out = export_onnx(folder, tmp_path / "onnx", precision=precision)
    assert sum(predicted_bytes(shape, precision).values()) == stored_bytes(out)


def stored_bytes(out: Path) -> int:
    """Bytes of the weights in an exported folder, those that two initializers share counted once."""
    constants = ("cos_cache", "sin_cache", "/scale", "/shrink", "/cap")  # no weights
    return sum(
        {
            (tensor.location, tensor.offset) if tensor.location else tensor.name: tensor.nbytes
            for tensor in summary(out).initializers
            if tensor.dtype != "int64" and not tensor.name.endswith(constants)
        }.values()
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_genai_generates_what_torch_does(tmp_path: Path, name: str) -> None:
    pytest.importorskip("onnxruntime_genai")
    folder = save_tiny(tmp_path / "model", name, eos_token_id=2, **CHANGES.get(name, {}))
    prompt = TOKENS[:7]
    sequence = greedy(load(folder), prompt, 12)
    made = generated(export_onnx(folder, tmp_path / "onnx", precision="fp32"), prompt, len(sequence))
    assert made == sequence[: len(made)]
    assert len(made) > len(prompt)


# Layers that differ. What a layer is to lose is zeroed in torch, which gives the logits to expect, and then cut.


def zero(model: torch.nn.Module, shape: ModelShape, widths: tuple[LayerShape, ...]) -> None:
    """Silence the heads and neurons that `widths` does not keep of `shape`: the last of each."""
    for index, layer in enumerate(widths):
        parts = (("output", layer.heads, layer.heads * shape.head_dim), ("down", layer.neurons, layer.neurons))
        for role, width, columns in parts:
            module: Any = model.get_submodule(shape.family.in_layer(index, role))
            with torch.no_grad():
                module.weight[:, columns:] = 0
                if not width and module.bias is not None:
                    module.bias.zero_()


def cut(folder: Path, shape: ModelShape, widths: tuple[LayerShape, ...]) -> None:
    """Narrow the tensors in a folder from the widths of `shape` to `widths`; absent parts go with their norms."""
    family, file = shape.family, folder / "model.safetensors"
    tensors = load_file(file)
    for index, (old, new) in enumerate(zip(shape.layers, widths, strict=True)):
        query, key = (range(new.heads * shape.head_dim), range(new.kv_heads * shape.head_dim))
        starts = (0, old.heads * shape.head_dim, (old.heads + old.kv_heads) * shape.head_dim)
        packed = [start + i for start, kept in zip(starts, (query, key, key), strict=True) for i in kept]
        both = [start + i for start in (0, old.neurons) for i in range(new.neurons)]
        rows = {"query": query, "key": key, "value": key, "qkv": packed}
        rows |= {"gate": range(new.neurons), "up": range(new.neurons), "gate_up": both}
        for role in (*family.attention_inputs, *family.mlp_inputs):
            for kind in ("weight", "bias"):
                if (name := f"{family.in_layer(index, role)}.{kind}") in tensors:
                    tensors[name] = tensors[name][list(rows[role])]
        for role, columns in (("output", len(query)), ("down", new.neurons)):
            name = f"{family.in_layer(index, role)}.weight"
            tensors[name] = tensors[name][:, :columns]
        gone = tuple(f"{family.in_layer(index, role)}." for role in absent(family, new))
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(gone)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})


def absent(family: Family, layer: LayerShape) -> list[str]:
    roles: list[str] = []
    if not layer.heads:
        roles += [*family.attention_inputs, *family.head_norms, "output", "attention_post_norm"]
        roles += [] if family.parallel and layer.neurons else ["attention_norm"]
    if not layer.neurons:
        roles += [*family.mlp_inputs, "down", "mlp_norm", "mlp_post_norm"]
    return [role for role in roles if getattr(family, role)]


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_may_differ_and_lack_parts(make_tiny: MakeTiny, tmp_path: Path, name: str) -> None:
    source = make_tiny(name, num_hidden_layers=5, **({"layer_types": None} if name == "gemma3" else {}))
    shape = Checkpoint(source).shape
    first = shape.layers[0]
    group = first.heads // first.kv_heads
    widths = (
        LayerShape(group, 1, 72),
        LayerShape(0, 0, 128),
        LayerShape(first.heads, first.kv_heads, 0),
        LayerShape(0, 0, 0),
        LayerShape(first.heads, first.kv_heads, 41),
    )
    model = load(source)
    zero(model, shape, widths)
    # Compensation of what was pruned leaves biases of which the config knows nothing.
    for role in ("output", "down"):
        linear: Any = model.get_submodule(shape.family.in_layer(4, role))
        linear.bias = torch.nn.Parameter(torch.linspace(-0.3, 0.3, shape.hidden))
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    cut(folder, shape, widths)
    pruned = shape.with_layers(widths)
    assert layer_shapes(Checkpoint(folder), pruned) == widths
    out = export_onnx(folder, tmp_path / "onnx", precision="fp32", shape=pruned)
    assert_same_logits(out, torch_logits(model, TOKENS))
    seen = [LayerShape(w.heads, w.kv_heads, w.neurons or 0) for w in summary(out).layers]
    assert seen == [layer for layer in widths if layer != LayerShape(0, 0, 0)]
    sequence = greedy(model, TOKENS[:7], 6)
    made = generated(out, TOKENS[:7], len(sequence))
    assert made == sequence[: len(made)]
    # Where the config speaks of parts that are not there, or the reverse, tensors are missing
    with pytest.raises(BadInput, match="layer 1 has no tensors of its attention"):
        export_onnx(folder, out, precision="fp32", shape=shape)
    without = (*widths[:4], LayerShape(first.heads, first.kv_heads, 0))
    with pytest.raises(BadInput, match="layer 4 has tensors of an MLP"):
        export_onnx(folder, out, precision="fp32", shape=shape.with_layers(without))


def test_heads_that_the_operator_does_not_take_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "phi", "phi", head_dim=16)  # of which 8 are rotated
    with pytest.raises(BadInput, match=r"rotated part of a head 8 is no multiple of 16"):
        export_onnx(folder, tmp_path / "onnx", precision="fp32")
    folder = save_tiny(tmp_path / "gemma", "gemma2", head_dim=24)
    with pytest.raises(BadInput, match=r"head size 24 is no multiple of 16"):
        export_onnx(folder, tmp_path / "onnx", precision="fp32")


def test_tensors_that_do_not_fit_are_refused(make_tiny: MakeTiny, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "phi3")
    shape, file = Checkpoint(folder).shape, folder / "model.safetensors"
    tensors = load_file(file)
    for role, rows, message in (
        ("qkv", 100, "64 query and 18 key rows do not make groups"),
        ("gate_up", 255, r"gate_up_proj.weight is \(255, 64\), expected \(256, 64\)"),
    ):
        name = f"{shape.family.in_layer(1, role)}.weight"
        save_file({**tensors, name: tensors[name][:rows].contiguous()}, file, {"format": "pt"})
        with pytest.raises(BadInput, match=message):
            layer_shapes(Checkpoint(folder), shape)
    name = f"{shape.family.in_layer(1, 'down')}.bias"
    save_file({**tensors, name: torch.zeros(63)}, file, {"format": "pt"})
    with pytest.raises(BadInput, match="63 values for 64 rows"):
        export_onnx(folder, tmp_path / "onnx", precision="fp32")
