"""Every family with layers of different widths, some without attention or MLP: torch, llama.cpp, ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from family_configs import TINY, save_tiny

from edgeprune import load_checkpoint
from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import BadInput
from edgeprune.export.gguf_layout import architecture
from edgeprune.export.gguf_quantise import quantise, tensor_types
from edgeprune.export.gguf_writer import write_gguf
from edgeprune.export.onnx_graph import export_onnx
from edgeprune.gguf_checkpoint import gguf_to_folder
from edgeprune.models import load
from edgeprune.plan import LayerPlan, PrunePlan
from edgeprune.runtimes.gguf_file import GgufFile
from edgeprune.runtimes.llamacpp import LlamaCpp
from edgeprune.runtimes.ort import OnnxRuntime
from edgeprune.shape import ModelShape
from edgeprune.surgery import prune_checkpoint

IDS = torch.arange(1, 41)[None]
# What llama.cpp has an architecture for.
IN_GGUF = ("llama", "mistral", "mistral-window", "qwen2", "qwen2-untied", "phi3")


def differing_plan(shape: ModelShape) -> PrunePlan:
    """Each layer keeps something else: fewer heads of each group, no MLP, no attention, nothing."""
    layers = []
    for index, dense in enumerate(shape.layers):
        group = dense.heads // dense.kv_heads
        kv_heads = tuple(range(index % 2, dense.kv_heads))
        heads = tuple(kv * group + head for kv in kv_heads for head in range(max(1, group - index)))
        neurons = tuple(range(index, dense.neurons, 2))
        kind = index % 4
        layers.append(
            LayerPlan(
                kv_heads if kind in (0, 2) else (),
                heads if kind in (0, 2) else (),
                neurons if kind in (0, 1) else (),
            )
        )
    return PrunePlan(tuple(layers), "hand", 0.0, 0.0, "", "")


def silenced(folder: Path, plan: PrunePlan) -> np.ndarray:
    """Logits (tokens, vocabulary) of the dense model with what the plan removes silenced."""
    model = load(folder)
    family, width = model.shape.family, model.shape.head_dim
    with torch.no_grad():
        for index, (layer, dense) in enumerate(zip(plan.layers, model.shape.layers, strict=True)):
            output, down = (model.module.get_submodule(family.in_layer(index, role)) for role in ("output", "down"))
            for head in set(range(dense.heads)) - set(layer.heads):
                output.weight[:, head * width : (head + 1) * width] = 0
            down.weight[:, sorted(set(range(dense.neurons)) - set(layer.neurons))] = 0
            for absent, linear in ((not layer.heads, output), (not layer.neurons, down)):
                if absent and linear.bias is not None:
                    linear.bias.zero_()
        return logits(model.module)


def logits(model: torch.nn.Module) -> np.ndarray:
    with torch.inference_mode():
        return model(IDS).logits[0].float().numpy()


@pytest.fixture(scope="module", params=TINY)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, np.ndarray]:
    """Name, pruned folder and the logits it must have."""
    base = tmp_path_factory.mktemp("family")
    dense = save_tiny(base / "dense", request.param, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)
    plan = differing_plan(Checkpoint(dense).shape)
    return request.param, prune_checkpoint(dense, plan, base / "pruned"), silenced(dense, plan)


def test_torch(case: tuple[str, Path, np.ndarray]) -> None:
    _, folder, expected = case
    model = load_checkpoint(folder)
    np.testing.assert_allclose(logits(model), expected, atol=1e-5, rtol=1e-4)
    assert Checkpoint(folder).shape.parameters == sum(p.numel() for p in model.parameters())
    with torch.inference_mode():
        first = model(IDS[:, :25], use_cache=True)
        rest = model(IDS[:, 25:], past_key_values=first.past_key_values).logits[0].numpy()
    np.testing.assert_allclose(rest, expected[25:], atol=1e-5, rtol=1e-4)


def test_llamacpp(case: tuple[str, Path, np.ndarray], tmp_path: Path) -> None:
    name, folder, expected = case
    path = tmp_path / "m.gguf"
    if name not in IN_GGUF:
        with pytest.raises(BadInput, match=r"cannot hold this model.*uniform"):
            write_gguf(folder, path, dtype="F32")
        return
    write_gguf(folder, path, dtype="F32")
    shape = Checkpoint(folder).shape
    assert GgufFile(path).architecture == architecture(shape) == "deci"
    spread = np.abs(expected).max()
    with LlamaCpp(path, n_ctx=64, threads=1, exact=True) as runtime:
        np.testing.assert_allclose(runtime.forward(IDS[0].tolist()), expected, atol=1e-4 * spread)
    back = gguf_to_folder(path, tmp_path / "back")
    assert Checkpoint(back).shape.layers == shape.layers
    np.testing.assert_allclose(logits(load_checkpoint(back)), expected, atol=1e-5, rtol=1e-4)
    small = quantise(path, tmp_path / "small.gguf", kind="Q4_K_M", threads=1)
    assert {n: t.type for n, t in GgufFile(small).tensors.items()} == tensor_types(shape, "Q4_K_M")


def test_onnxruntime(case: tuple[str, Path, np.ndarray], tmp_path: Path) -> None:
    _, folder, expected = case
    try:
        out = export_onnx(folder, tmp_path / "onnx", precision="fp32")
    except BadInput as error:
        assert "head size" in str(error)  # a limit of the attention operator, whatever the widths
        return
    runtime = OnnxRuntime(out, n_ctx=64, threads=1)
    found = np.concatenate([runtime.forward(IDS[0, :25].numpy()), runtime.forward(IDS[0, 25:].numpy())])
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())
