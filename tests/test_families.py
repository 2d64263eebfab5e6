"""Every family: read from its own config, scored, pruned, saved, loaded by stock transformers, written as GGUF."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from family_configs import TINY, family_of, save_tiny, tiny_module

from edgeprune.checkpoint import Checkpoint
from edgeprune.export.gguf_writer import write_gguf
from edgeprune.export.widths import layer_shapes
from edgeprune.gguf_checkpoint import gguf_to_folder
from edgeprune.importance import amp_scores
from edgeprune.models import load
from edgeprune.plan import LayerPlan, PrunePlan
from edgeprune.pruning import METHODS, plan_for
from edgeprune.runtimes.gguf_file import GgufFile
from edgeprune.runtimes.llamacpp import LlamaCpp
from edgeprune.shape import shape_from_config
from edgeprune.surgery import prune_checkpoint

NAMES = list(TINY)
IDS = torch.arange(1, 60)[None]


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_real_class(name: str) -> None:
    for changes in ({}, {"tie_word_embeddings": False}, {"tie_word_embeddings": True}, {"attention_bias": True}):
        module = tiny_module(name, **changes)
        shape = shape_from_config(json.loads(module.config.to_json_string()))
        assert shape.family.name == family_of(name)
        assert shape.parameters == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_table_names_every_tensor_of_the_real_class(name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_tiny(tmp_path / "model", name))
    family, shape = checkpoint.shape.family, checkpoint.shape
    roles = (*family.hidden_norms, *family.head_norms, *family.attention_inputs, "output", *family.mlp_inputs, "down")
    known = {family.in_layer(i, role) for i in range(len(shape.layers)) for role in roles}
    known |= {family.embedding, family.final_norm, family.head}
    assert {tensor.rpartition(".")[0] for tensor in checkpoint.names} == known - (
        {family.head} if shape.tied else set()
    )


def stock_logits(folder: Path) -> torch.Tensor:
    """Logits by stock transformers, which must find every weight where it looks for it."""
    module, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    with torch.inference_mode():
        return module.eval()(IDS).logits[0]


def masked_logits(folder: Path, plan: PrunePlan) -> torch.Tensor:
    """The dense model with the removed heads and neurons silenced: what pruning must equal exactly."""
    model = load(folder)
    family, width = model.shape.family, model.shape.head_dim
    with torch.no_grad():
        for index, (layer, dense) in enumerate(zip(plan.layers, model.shape.layers, strict=True)):
            output = model.module.get_submodule(family.in_layer(index, "output")).weight
            for head in set(range(dense.heads)) - set(layer.heads):
                output[:, head * width : (head + 1) * width] = 0
            down = model.module.get_submodule(family.in_layer(index, "down")).weight
            down[:, sorted(set(range(dense.neurons)) - set(layer.neurons))] = 0
        return model.module(IDS).logits[0]


def plan_of(folder: Path, ratio: float, *, method: str = "random") -> PrunePlan:
    """A uniform plan of the folder's model by AMP scores on a few tokens, or by chance."""
    model = load(folder)
    texts = [torch.arange(5, 5 + length) for length in (40, 24)]
    scores = METHODS[method](amp_scores(model, texts), 1)
    return plan_for(model.shape, scores, ratio, align=8)


def cut(folder: Path, seed: int = 3) -> PrunePlan:
    """A plan by chance that removes a group, a head of the other group, and neurons, whatever the ratio."""
    shape = Checkpoint(folder).shape
    random, layers = np.random.default_rng(seed), []
    for dense in shape.layers:
        group = dense.heads // dense.kv_heads
        kv = sorted(random.choice(dense.kv_heads, max(1, dense.kv_heads // 2), replace=False).tolist())
        each = max(1, group - 1)
        heads = [h * group + g for h in kv for g in sorted(random.choice(group, each, replace=False).tolist())]
        neurons = sorted(random.choice(dense.neurons, 72, replace=False).tolist())
        layers.append(LayerPlan(tuple(kv), tuple(heads), tuple(neurons)))
    return PrunePlan(tuple(layers), "hand", 0.0, 0.0, "", "")


@pytest.mark.parametrize("name", NAMES)
def test_pruned_equals_masked_dense_in_stock_transformers(name: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "dense", name, num_attention_heads=8, num_key_value_heads=4)
    for count, plan in enumerate((plan_of(source, 0.15, method="amp"), cut(source))):
        out = prune_checkpoint(source, plan, tmp_path / f"pruned{count}")
        torch.testing.assert_close(stock_logits(out), masked_logits(source, plan), rtol=1e-4, atol=1e-5)
        after = plan.shape_after(Checkpoint(source).shape)
        assert Checkpoint(out).shape == replace(after, bos=Checkpoint(out).shape.bos)
        assert layer_shapes(Checkpoint(out), after) == after.layers


@pytest.mark.parametrize("name", NAMES)
def test_the_ratio_is_hit(name: str, tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "dense", name)
    shape = Checkpoint(source).shape
    plan = plan_of(source, 0.2, method="amp")
    step = 8 * (len(shape.layers) * (3 if shape.family.gated else 2) * shape.hidden + 10) / shape.parameters
    assert abs(plan.reached_ratio - 0.2) <= step
    if shape.family.fixed_heads:
        assert plan.scope == "mlp"
        assert all(
            layer.heads == tuple(range(dense.heads)) for layer, dense in zip(plan.layers, shape.layers, strict=True)
        )
        assert plan.layers[0].widths.neurons < shape.layers[0].neurons


def context_of(path: Path) -> int:
    """Tokens of `IDS` that the GGUF file at `path` is good for: no more than a window its architecture has not."""
    file = GgufFile(path)
    return min(IDS.shape[1], file.get(f"{file.architecture}.context_length", int))


def parity(folder: Path, path: Path) -> float:
    """The largest difference of logits of the GGUF file at `path` to the folder's in torch, relative to the largest."""
    length = context_of(path)
    expected = stock_logits(folder).numpy()[:length]
    with LlamaCpp(path, n_ctx=128, threads=1, exact=True) as runtime:
        found = runtime.forward(IDS[0, :length].tolist())
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", NAMES)
def test_gguf_gives_the_logits_of_torch(name: str, tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "dense", name)
    shape = Checkpoint(dense).shape
    family = shape.family
    plan = plan_of(dense, 0.15) if shape.fixed_heads else cut(dense)
    pruned = prune_checkpoint(dense, plan, tmp_path / "pruned")
    for folder in (dense, pruned):
        path = write_gguf(folder, tmp_path / f"{folder.name}.gguf", dtype="F32")
        assert parity(folder, path) < 1e-3
        back = gguf_to_folder(path, tmp_path / f"{folder.name}-back")
        seen = slice(context_of(path))
        torch.testing.assert_close(stock_logits(back)[seen], stock_logits(folder)[seen], rtol=1e-4, atol=1e-5)
        own = GgufFile(path).architecture == family.gguf_arch and name.partition("-")[0] != "mistral"
        assert not own or Checkpoint(back).shape.layers == Checkpoint(folder).shape.layers
        assert not own or Checkpoint(back).shape.family == family
