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
from edgeprune.export.gguf_deci import is_filler
from edgeprune.export.gguf_layout import architecture, tensors
from edgeprune.export.gguf_quantise import quantise, tensor_types
from edgeprune.export.gguf_writer import write_gguf
from edgeprune.export.onnx_graph import export_onnx
from edgeprune.gguf_checkpoint import gguf_to_folder
from edgeprune.imatrix import importance_matrix
from edgeprune.models import load
from edgeprune.plan import LayerPlan, PrunePlan
from edgeprune.runtimes.gguf_file import GgufFile
from edgeprune.runtimes.llamacpp import LlamaCpp
from edgeprune.runtimes.ort import OnnxRuntime
from edgeprune.sensitivity import fisher_diagonal
from edgeprune.shape import ModelShape
from edgeprune.surgery import prune_checkpoint

IDS = torch.arange(1, 41)[None]
TOLERANCE = 2e-4  # of the largest logit
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
    # Heads, and what is rotated of them, are 16 wide at least: what ONNX Runtime's attention takes.
    hidden = 512 if request.param == "phi-grouped" else 256
    widths = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": hidden}
    dense = save_tiny(base / "dense", request.param, **widths)
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
        pytest.skip("llama.cpp has no architecture for it: test_what_llamacpp_cannot_hold_is_refused")
    write_gguf(folder, path, dtype="F32")
    shape = Checkpoint(folder).shape
    assert GgufFile(path).architecture == architecture(shape) == "deci"
    with LlamaCpp(path, n_ctx=64, threads=1, exact=True) as runtime:
        found = runtime.forward(IDS[0].tolist())
    assert np.abs(found - expected).max() < TOLERANCE * np.abs(expected).max()
    back = gguf_to_folder(path, tmp_path / "back")
    assert Checkpoint(back).shape.layers == shape.layers
    np.testing.assert_allclose(logits(load_checkpoint(back)), expected, atol=1e-5, rtol=1e-4)
    small = quantise(path, tmp_path / "small.gguf", kind="Q4_K_M", threads=1)
    assert {n: t.type for n, t in GgufFile(small).tensors.items()} == tensor_types(shape, "Q4_K_M")


def test_every_quantised_weight_has_an_importance(case: tuple[str, Path, np.ndarray], tmp_path: Path) -> None:
    """Fused matrices are several in the file, and MLPs of zeros are in the file alone."""
    name, folder, _ = case
    if name not in IN_GGUF:
        pytest.skip("llama.cpp has no architecture for it: test_what_llamacpp_cannot_hold_is_refused")
    model = load(folder)
    matrices = {tensor.name: tensor.shape for tensor in tensors(model.shape) if len(tensor.shape) > 1}
    matrix = importance_matrix(model, [IDS[0]])
    head = {"token_embd.weight"} if not model.shape.tied else set()  # which no product has as its weight
    assert {key: len(values) for key, values in matrix.values.items()} == {
        key: shape[-1] for key, shape in matrices.items() if key not in head
    }
    fisher = fisher_diagonal(model, [IDS[0]])
    own = {key: shape for key, shape in matrices.items() if not is_filler(key, model.shape)}
    assert {key: tuple(values.shape) for key, values in fisher.items()} == own
    full = write_gguf(folder, tmp_path / "full.gguf", dtype="F32")
    small = quantise(full, tmp_path / "small.gguf", kind="IQ2_XXS:imatrix", threads=1, imatrix=matrix)
    assert {n: t.type for n, t in GgufFile(small).tensors.items()} == tensor_types(model.shape, "IQ2_XXS:imatrix")


def test_what_llamacpp_cannot_hold_is_refused(case: tuple[str, Path, np.ndarray], tmp_path: Path) -> None:
    name, folder, _ = case
    if name in IN_GGUF:
        pytest.skip("llama.cpp has an architecture for it: test_llamacpp")
    with pytest.raises(BadInput, match=r"cannot hold this model.*uniform"):
        write_gguf(folder, tmp_path / "m.gguf", dtype="F32")


def test_onnxruntime(case: tuple[str, Path, np.ndarray], tmp_path: Path) -> None:
    _, folder, expected = case
    out = export_onnx(folder, tmp_path / "onnx", precision="fp32")
    runtime = OnnxRuntime(out, n_ctx=64, threads=1)
    found = np.concatenate([runtime.forward(IDS[0, :25].numpy()), runtime.forward(IDS[0, 25:].numpy())])
    assert np.abs(found - expected).max() < TOLERANCE * np.abs(expected).max()
