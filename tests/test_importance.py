"""AMP scores: the published formula, one pass, invariances, and hooks that never stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import BadInput, StageFailed
from edgeprune.importance import Scores, amp_scores, head_l1, neuron_l1, random_scores, reversed_scores
from edgeprune.models import Model


def texts(count: int = 6, seed: int = 0, vocab: int = 400) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocab, (7 + 5 * i,), generator=generator) for i in range(count)]


def hooks(module: torch.nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in module.modules())


@given(st.integers(1, 9), st.integers(1, 4), st.integers(0, 1000))
def test_head_l1_is_equation_8(tokens: int, heads: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, heads * 4, generator=generator)
    weight = torch.randn(6, heads * 4, generator=generator)
    per_head = torch.einsum("tnd,hnd->tnh", x.view(tokens, heads, 4), weight.view(6, heads, 4))
    expected = per_head.abs().sum(dim=(0, 2)).double()
    torch.testing.assert_close(head_l1(x, weight, heads), expected, rtol=1e-5, atol=1e-5)


def test_neuron_l1_is_equation_9() -> None:
    a = torch.tensor([[1.0, -2.0], [-3.0, 0.5]])
    torch.testing.assert_close(neuron_l1(a), torch.tensor([4.0, 2.5], dtype=torch.float64))


@torch.inference_mode()
def test_scores_equal_the_published_procedure(tiny: Model) -> None:
    """One text at a time, every head's product spelled out, on activations taken from the model's own layers."""
    calibration = texts()
    scores = amp_scores(tiny, calibration)
    count = sum(len(t) for t in calibration)
    shape = tiny.shape
    for index, width in enumerate(shape.layers):
        head_sum, neuron_sum = torch.zeros(width.heads), torch.zeros(width.neurons)
        for ids in calibration:
            seen: dict[str, torch.Tensor] = {}
            layer = tiny.module.model.layers[index]
            handles = [
                layer.self_attn.o_proj.register_forward_pre_hook(lambda _, i, s=seen: s.update(o=i[0][0])),
                layer.mlp.down_proj.register_forward_pre_hook(lambda _, i, s=seen: s.update(d=i[0][0])),
            ]
            tiny.module(ids[None])
            for handle in handles:
                handle.remove()
            x = seen["o"].view(len(ids), width.heads, shape.head_dim)
            w = layer.self_attn.o_proj.weight.view(shape.hidden, width.heads, shape.head_dim)
            head_sum += torch.einsum("tnd,hnd->tnh", x, w).abs().sum(dim=(0, 2))
            neuron_sum += seen["d"].abs().sum(dim=0)
        torch.testing.assert_close(scores.heads[index].float(), head_sum / count, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(scores.neurons[index].float(), neuron_sum / count, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tokens_at_once", [1, 40, 100_000])
def test_scores_do_not_depend_on_batching_or_order(tiny: Model, tokens_at_once: int) -> None:
    one = amp_scores(tiny, texts())
    other = amp_scores(tiny, texts()[::-1], tokens_at_once=tokens_at_once)
    for a, b in zip(one.heads + one.neurons, other.heads + other.neurons, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_permuting_neurons_permutes_their_scores(tiny: Model) -> None:
    before = amp_scores(tiny, texts())
    order = torch.randperm(tiny.shape.layers[1].neurons, generator=torch.Generator().manual_seed(1))
    mlp = tiny.module.model.layers[1].mlp
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight.copy_(linear.weight[order].clone())
    mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order].clone())
    after = amp_scores(tiny, texts())
    torch.testing.assert_close(after.neurons[1], before.neurons[1][order], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(after.heads[2], before.heads[2], rtol=1e-4, atol=1e-7)


def test_hooks_are_removed_after_an_exception(tiny: Model) -> None:
    before = hooks(tiny.module)

    def broken(_done: int, _total: int) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        amp_scores(tiny, texts(), progress=broken)
    assert hooks(tiny.module) == before
    amp_scores(tiny, texts())
    assert hooks(tiny.module) == before


def test_no_tokens_is_refused(tiny: Model) -> None:
    with pytest.raises(BadInput, match="no calibration tokens"):
        amp_scores(tiny, [torch.tensor([], dtype=torch.int64)])


def test_weights_that_are_no_numbers_are_refused(tiny: Model) -> None:
    weight = tiny.module.get_parameter("model.layers.1.mlp.down_proj.weight")
    before = weight.detach().clone()
    try:
        weight.data[0, 0] = float("nan")
        with pytest.raises(StageFailed, match="scores are not finite; the model's weights are damaged"):
            amp_scores(tiny, texts())
    finally:
        weight.data.copy_(before)


def test_controls(tiny: Model) -> None:
    scores = amp_scores(tiny, texts())
    backwards = reversed_scores(scores)
    assert torch.equal(backwards.neurons[0].argsort(), scores.neurons[0].argsort(descending=True))
    assert torch.equal(random_scores(scores, 5).heads[1], random_scores(scores, 5).heads[1])
    assert not torch.equal(random_scores(scores, 5).neurons[1], random_scores(scores, 6).neurons[1])


def test_save_and_load(tiny: Model, tmp_path: Path) -> None:
    scores = amp_scores(tiny, texts())
    scores.save(tmp_path / "scores")
    again = Scores.load(tmp_path / "scores")
    assert again.text_hash == scores.text_hash and again.model_hash == tiny.hash and again.tokens == scores.tokens
    assert all(
        torch.equal(a, b) for a, b in zip(scores.heads + scores.neurons, again.heads + again.neurons, strict=True)
    )
    (tmp_path / "scores" / "scores.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(BadInput, match="score again"):
        Scores.load(tmp_path / "scores")
