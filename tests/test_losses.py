"""Losses of recovery against autograd through plain logits, and the bound on a teacher known by its top k."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune import losses
from edgeprune.losses import Head, Mix, TopK, bucket_kl, distillation, divergence, pieces, top_k

N, V, HIDDEN, K = 7, 23, 5, 4


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Products this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def setting(
    dtype: torch.dtype = torch.float64, *, bias: bool = False, softcap: float | None = None, seed: int = 0
) -> tuple[torch.Tensor, Head, torch.Tensor, TopK]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, HIDDEN, dtype=dtype, generator=generator).requires_grad_()
    weight = torch.randn(V, HIDDEN, dtype=dtype, generator=generator).requires_grad_()
    shift = torch.randn(V, dtype=dtype, generator=generator).requires_grad_() if bias else None
    labels = torch.randint(V, (N,), generator=generator)
    teacher = top_k((2 * torch.randn(N, V, dtype=dtype, generator=generator)).softmax(dim=-1), K)
    return hidden, Head(weight, shift, softcap), labels, teacher


def plain(hidden: torch.Tensor, head: Head, labels: torch.Tensor, teacher: TopK | None, mix: Mix) -> torch.Tensor:
    """The loss as one would write it: all logits at once, autograd for the rest."""
    logits = head.raw(hidden)
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    loss = mix.ce * torch.nn.functional.cross_entropy(logits, labels)
    if teacher is not None:
        loss = loss + mix.kl * bucket_kl(logits.softmax(dim=-1), teacher).mean()
    return loss


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("with_teacher", [False, True])
def test_gradients_of_the_fused_loss_are_right(softcap: float | None, bias: bool, with_teacher: bool) -> None:
    hidden, head, labels, teacher = setting(bias=bias, softcap=softcap)

    def loss(hidden: torch.Tensor, weight: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
        own = Head(weight, bias[0] if bias else None, softcap)
        return distillation(hidden, own, labels, teacher if with_teacher else None, Mix(0.7, 0.3))[0]

    inputs = (hidden, head.weight) if head.bias is None else (hidden, head.weight, head.bias)
    assert torch.autograd.gradcheck(loss, inputs, fast_mode=True)


@pytest.mark.parametrize("block", [1, 3 * V * 8, 1 << 20])
def test_blocks_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, labels, teacher = setting()
    monkeypatch.setattr(losses, "_BLOCK_BYTES", block)
    monkeypatch.setattr(losses, "_CACHED_ROWS", 2)
    mix = Mix(0.7, 0.3)
    loss, kl, ce = distillation(hidden, head, labels, teacher, mix)
    found = torch.autograd.grad(loss, (hidden, head.weight))
    expected = plain(hidden, head, labels, teacher, mix)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(loss, 0.7 * kl + 0.3 * ce)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (hidden, head.weight)))
    sums = divergence(hidden.detach(), head, labels, teacher)
    assert sums == pytest.approx((N * float(kl), N * float(ce)))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 200), st.integers(0, 200), st.sampled_from(["cpu", "cuda"]))
def test_pieces_are_the_block(start: int, count: int, device: str) -> None:
    parts = pieces(slice(start, start + count), torch.device(device))
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(start, start + count))
    assert device == "cpu" or len(parts) <= 1


def test_bfloat16_gradients_are_close() -> None:
    hidden, head, labels, teacher = setting(torch.float32)
    low = hidden.detach().bfloat16().requires_grad_()
    weight = head.weight.detach().bfloat16().requires_grad_()
    loss, *_ = distillation(low, Head(weight), labels, teacher, Mix())
    loss.backward()
    expected = torch.autograd.grad(plain(hidden, head, labels, teacher, Mix()), (hidden, head.weight))
    for found, right in zip((low.grad, weight.grad), expected, strict=True):
        assert float((found.float() - right).norm() / right.norm()) < 0.03


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, head, labels, teacher = setting()
    frozen = replace(head, weight=head.weight.detach())
    distillation(hidden, frozen, labels, teacher, Mix())[0].backward()
    assert hidden.grad is not None and frozen.weight.grad is None


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, V), st.floats(0.1, 6))
def test_the_bucket_is_a_lower_bound_that_all_tokens_reach(seed: int, k: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (
        (spread * torch.randn(N, V, dtype=torch.float64, generator=generator)).softmax(dim=-1) for _ in range(2)
    )
    exact = (teacher * (teacher / student).log()).sum(dim=-1)
    coarse = bucket_kl(student, top_k(teacher, k))
    assert (coarse <= exact + 1e-6).all() and (coarse >= -1e-6).all()
    torch.testing.assert_close(bucket_kl(student, top_k(teacher, V)), exact, rtol=1e-5, atol=1e-6)
    assert (bucket_kl(teacher, top_k(teacher, k)).abs() < 1e-6).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(1, 40), st.integers(1, 3000), st.booleans())
def test_the_largest_are_found_wherever_they_are(seed: int, k: int, v: int, heaped: bool) -> None:
    probs = torch.rand(3, v, generator=torch.Generator().manual_seed(seed))
    if heaped:  # all of the largest beside each other, in few groups or in many
        probs[:, v // 2 : v // 2 + k] += 1
    found = top_k(probs, k)
    expected = probs.topk(min(k, v), dim=-1)
    assert torch.equal(found.probs, expected.values)
    assert torch.equal(probs.gather(-1, found.ids), expected.values)
    assert all(len(set(row.tolist())) == len(row) for row in found.ids)


def test_outcomes_that_underflow_stay_finite() -> None:
    logits = torch.zeros(1, V)
    logits[0, 0] = 500.0  # in float32 every other token has probability 0
    teacher = top_k(torch.full((1, V), 1 / V), K)
    assert bucket_kl(logits.softmax(dim=-1), teacher).isfinite().all()
    hidden = torch.ones(1, 1, requires_grad=True)
    loss, *_ = distillation(hidden, Head(logits.t().contiguous()), torch.tensor([3]), teacher, Mix())
    loss.backward()
    assert loss.isfinite() and hidden.grad is not None and hidden.grad.isfinite().all()
