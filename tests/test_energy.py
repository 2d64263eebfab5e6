"""Activation energy against its definition, written out on the stock model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import MakeLlama

from edgeprune.blocks import LayeredModel
from edgeprune.checkpoint import Checkpoint
from edgeprune.compensation import Moments, token_weights
from edgeprune.energy import activation_energy, energy_scores
from edgeprune.pruning import prune
from edgeprune.runtimes.pytorch import load_model


def test_it_is_the_energy_of_what_each_group_adds() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    tokens = torch.rand(50, generator=generator, dtype=torch.float64)
    moments = Moments((x * tokens[:, None]).T @ x, torch.empty(12, 0), weight, scale=2.0)
    for size in (1, 3, 12):
        expected = [
            float((tokens * (x[:, g : g + size] @ weight[g : g + size]).square().sum(1)).sum()) / 2.0
            for g in range(0, 12, size)
        ]
        assert activation_energy(moments, size).tolist() == pytest.approx(expected)


@torch.inference_mode()
def test_scores_of_a_model_are_those_of_its_hooks(make_llama: MakeLlama) -> None:
    folder = make_llama()
    shape = Checkpoint(folder).shape
    ids = torch.randint(1, shape.vocab, (3, 20), generator=torch.Generator().manual_seed(1))
    scores = energy_scores(LayeredModel(Checkpoint(folder)), ids)
    module = load_model(folder)
    layer = module.get_submodule("model.layers.1")
    seen: dict[str, torch.Tensor] = {}
    down = layer.get_submodule("mlp.down_proj")
    down.register_forward_pre_hook(lambda _m, args: seen.update(a=args[0]))
    layer.register_forward_hook(lambda _m, _a, out: seen.update(residual=out[0] if isinstance(out, tuple) else out))
    module(input_ids=ids)
    residual, a = seen["residual"].flatten(0, 1), seen["a"].flatten(0, 1)
    weights = token_weights(residual)
    scale = (weights * residual.square().sum(1)).sum()
    expected = (weights[:, None] * a.square()).sum(0) * down.weight.square().sum(0) / scale
    torch.testing.assert_close(scores.neurons[1].float(), expected, rtol=1e-3, atol=1e-9)
    assert [len(h) for h in scores.heads] == [layer.heads for layer in shape.layers]


def test_pruning_by_energy_keeps_what_is_largest(make_llama: MakeLlama, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the wind went round the house and found no door " * 40, encoding="utf-8")
    plan = prune(make_llama(), 0.2, tmp_path / "out", method="energy", align=8, calibration=str(text))
    assert plan.method == "energy" and plan.reached_ratio == pytest.approx(0.2, abs=0.05)
