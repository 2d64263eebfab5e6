"""Losses of recovery as tensor functions: what is learnt from a teacher that is known by its likeliest tokens.

A teacher's distribution over a vocabulary of V entries is kept as its k likeliest tokens and the mass of the rest. To
drop the rest would teach the student that it has no mass (arXiv 2503.16870); here the rest is one more outcome. With
teacher p, student q, K the k tokens, p_r = 1 − Σ_K p and q_r = 1 − Σ_K q:

    KL_K(p ‖ q) = Σ_{i in K} p_i log(p_i / q_i) + p_r log(p_r / q_r)

By the log sum inequality that is never above KL(p ‖ q), and both are 0 where the student equals the teacher. Its
gradient by the student's logits z, from ∂ log q_i / ∂z_j = [i = j] − q_j, is

    ∂KL_K / ∂z_j = q_j − p_j  (j in K),    q_j (1 − p_r / q_r)  (otherwise).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Nats = TypeVar("Nats", float, Tensor)
_BLOCK_BYTES = 128 << 20  # of logits held at once
_CACHED_ROWS = 32  # rows whose float32 distribution a processor holds at once: stays in its cache
_GROUP = 32  # values of a row whose maximum stands for them while the largest are looked for
_LEAST_REST = 1e-7  # of q_r: below, 1 − Σ q is rounding error, and p_r / q_r would be noise


@dataclass(frozen=True)
class TopK:
    """A teacher's next-token distributions, coarsened: the k likeliest tokens and the mass of all others.

    Attributes:
        ids: (N, k), int64, no token twice in a row.
        probs: their probabilities, (N, k).
        rest: what is left, (N,); rows of `probs` and `rest` sum to 1.
    """

    ids: Tensor
    probs: Tensor
    rest: Tensor

    def to(self, device: torch.device) -> TopK:
        """The same on `device`."""
        return TopK(self.ids.to(device), self.probs.to(device), self.rest.to(device))


def top_k(probs: Tensor, k: int) -> TopK:
    """The `k` likeliest tokens of distributions (N, V) and the rest's mass."""
    best, ids = _largest(probs, min(k, probs.shape[-1]))
    return TopK(ids, best, (1 - best.sum(dim=-1)).clamp_min(0))


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` largest of each row of (N, V), largest first, and where they are: (N, k) each.

    They lie in the k groups with the largest maxima, and in what no whole group takes. To read a row once for the
    maxima and search a few groups takes half the time of a search of all of it (V = 49,152, k = 64).
    """
    n, v = values.shape
    groups = v // _GROUP
    if groups < 2 * k:
        return values.topk(k, dim=-1)
    # A group is every `groups`-th value: maxima are then taken of whole stretches at once.
    maxima = values[:, : groups * _GROUP].view(n, _GROUP, groups).amax(dim=1)
    chosen = maxima.topk(k, dim=-1).indices  # (N, k)
    members = torch.arange(0, groups * _GROUP, groups, device=values.device)
    tail = torch.arange(groups * _GROUP, v, device=values.device).expand(n, -1)
    places = torch.cat([(chosen[:, :, None] + members).flatten(1), tail], dim=1)
    best, found = values.gather(-1, places).topk(k, dim=-1)
    return best, places.gather(-1, found)


def bucket_kl(probs: Tensor, teacher: TopK) -> Tensor:
    """KL_K of the module's text, in nats, of a student's distributions (N, V): (N,)."""
    return _kl(*_outcomes(probs, teacher), teacher)


def _outcomes(probs: Tensor, teacher: TopK) -> tuple[Tensor, Tensor]:
    """The student's probabilities of the teacher's tokens, (N, k), and of the rest, (N,)."""
    kept = probs.gather(-1, teacher.ids)
    return kept, (1 - kept.sum(dim=-1)).clamp_min(_LEAST_REST)


def _kl(kept: Tensor, rest: Tensor, teacher: TopK) -> Tensor:
    tiny = torch.finfo(kept.dtype).tiny  # an underflowed q would make the sum infinite; p log p at p = 0 is 0
    terms = torch.xlogy(teacher.probs, teacher.probs) - teacher.probs * kept.clamp_min(tiny).log()
    return terms.sum(dim=-1) + torch.xlogy(teacher.rest, teacher.rest) - teacher.rest * rest.log()


@dataclass(frozen=True)
class Mix:
    """Weights of the two parts of the loss: KL to the teacher, and cross-entropy of the text's own next token.

    SmolLM2-135M, a fifth pruned with compensation, 240 steps on C4 and Wikipedia; held-out KL, and bits per byte of
    other text (WikiText-2 validation) over dense, from 0.273 and 1.111: KL alone 0.205 and 1.085, 0.85 / 0.15 0.216 and
    1.071, 0.7 / 0.3 0.239 and 1.064. A tenth pruned, 256 steps, KL and bits per byte of that other text: KL alone 0.172
    and 1.181, 0.7 / 0.3 0.209 and 1.160; five tasks, 1,000 items each, 45.5 and 45.4 ± 0.7 %.
    """

    kl: float = 0.7
    ce: float = 0.3

    def of(self, kl: Nats, ce: Nats) -> Nats:
        """The loss that these two make."""
        return self.kl * kl + self.ce * ce


@dataclass(frozen=True)
class Head:
    """The output head: logits = cap(hidden · weightᵀ + bias), where cap(z) = c · tanh(z / c) if c is given.

    Attributes:
        weight: (V, hidden).
        bias: (V,) or None.
        softcap: c, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None

    def raw(self, hidden: Tensor) -> Tensor:
        """Logits before the cap, (N, V), of hidden states (N, hidden), in their number format."""
        return torch.nn.functional.linear(hidden, self.weight, self.bias)

    def probs(self, raw: Tensor) -> Tensor:
        """Distributions (N, V) of logits before the cap; float32, or float64 if those are."""
        wide = raw if raw.dtype == torch.float64 else raw.float()
        if self.softcap is not None:
            wide = self.softcap * torch.tanh(wide / self.softcap)
        return wide.softmax(dim=-1)

    def blocks(self, n: int, itemsize: int) -> list[slice]:
        """Rows 0 to n in blocks whose logits stay below a fixed size."""
        return _slices(0, n, max(1, _BLOCK_BYTES // (self.weight.shape[0] * itemsize)))

    def distributions(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows of hidden states (N, hidden), as many as are held at once, and their distributions (rows, V)."""
        for block in self.blocks(len(hidden), hidden.element_size()):
            raw = self.raw(hidden[block])
            for rows in pieces(block, hidden.device):
                yield rows, self.probs(raw[rows.start - block.start : rows.stop - block.start])


def pieces(block: slice, device: torch.device) -> list[slice]:
    """The rows of a block in pieces whose float32 distributions are held at once: few on a processor, whose cache they
    fit; all on a GPU, where each piece costs the launch of every kernel."""
    rows = _CACHED_ROWS if device.type == "cpu" else max(1, block.stop - block.start)
    return _slices(block.start, block.stop, rows)


def _slices(start: int, stop: int, rows: int) -> list[slice]:
    return [slice(each, min(each + rows, stop)) for each in range(start, stop, rows)]


class _Distillation(torch.autograd.Function):
    """Mean loss over N tokens with gradients for hidden states, weight and bias, all made in the forward pass.

    Logits of a block are overwritten by their own gradient, a few rows at a time; neither float32 logits nor a
    distribution over the vocabulary is ever kept for a whole batch, and backward only multiplies.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        teacher: TopK | None,
        mix: Mix,
        softcap: float | None,
        weights: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = Head(weight, bias, softcap)
        n = len(hidden)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        grad_bias = torch.zeros_like(bias) if wants_bias and bias is not None else None
        wide = torch.float32 if hidden.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        kl, ce = hidden.new_zeros((), dtype=wide), hidden.new_zeros((), dtype=wide)
        for block in head.blocks(n, hidden.element_size()):
            logits = head.raw(hidden[block])  # (rows, V)
            for rows in pieces(block, hidden.device):
                piece = logits[rows.start - block.start : rows.stop - block.start]
                part = None if teacher is None else TopK(teacher.ids[rows], teacher.probs[rows], teacher.rest[rows])
                share = None if weights is None else weights[rows]
                gradient, kl_part, ce_part = _gradient(head.probs(piece), labels[rows], part, mix, share)
                kl += kl_part
                ce += ce_part
                if softcap is not None:
                    gradient *= 1 - torch.tanh(piece.to(gradient.dtype) / softcap) ** 2
                piece.copy_(gradient.mul_(1 / n))
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[block])
            if grad_weight is not None:
                grad_weight.addmm_(logits.t(), hidden[block])
            if grad_bias is not None:
                grad_bias += logits.sum(dim=0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        kl, ce = (
            (kl / n).to(torch.promote_types(hidden.dtype, torch.float32)),
            (ce / n).to(torch.promote_types(hidden.dtype, torch.float32)),
        )
        ctx.mark_non_differentiable(kl, ce)
        return mix.of(kl, ce), kl, ce

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if g is None else g * grad_loss.to(g.dtype) for g in ctx.saved_tensors]
        return (*scaled, None, None, None, None, None)


def _gradient(
    probs: Tensor, labels: Tensor, teacher: TopK | None, mix: Mix, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the weighted loss by the logits, (N, V), made in `probs` itself; sums of KL and cross-entropy."""
    own = labels[:, None]
    each = 1.0 if weights is None else weights
    ce = -(each * probs.gather(-1, own)[:, 0].clamp_min(torch.finfo(probs.dtype).tiny).log()).sum()
    if teacher is None:
        kl = torch.zeros_like(ce)
        probs *= mix.ce
    else:
        kept, rest = _outcomes(probs, teacher)
        kl = (each * _kl(kept, rest, teacher)).sum()
        probs *= (mix.ce + mix.kl * (1 - teacher.rest / rest))[:, None]
        probs.scatter_(-1, teacher.ids, (mix.ce + mix.kl) * kept - mix.kl * teacher.probs)
    probs.scatter_add_(-1, own, torch.full_like(own, -mix.ce, dtype=probs.dtype))
    return probs if weights is None else probs.mul_(weights[:, None]), kl, ce


def distillation(
    hidden: Tensor, head: Head, labels: Tensor, teacher: TopK | None, mix: Mix, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`mix.kl` · KL_K(teacher ‖ student) + `mix.ce` · cross-entropy, means over tokens, in nats.

    Equal to autograd through the logits, at about a third of its memory traffic: see `_Distillation`.

    Args:
        hidden: last hidden states, (N, hidden).
        head: the student's output head.
        labels: the text's next tokens, (N,), int64.
        teacher: of the same N positions; None leaves the KL out.
        mix: weights of the two.
        weights: what each token counts for, (N,), with a mean of 1 over the text; None: all alike.

    Returns:
        The loss, which can be differentiated, and KL and cross-entropy, which cannot.
    """
    result: tuple[Tensor, Tensor, Tensor] = _Distillation.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, labels, teacher, mix, head.softcap, weights
    )
    return result


@torch.no_grad()
def divergence(hidden: Tensor, head: Head, labels: Tensor, teacher: TopK) -> tuple[float, float]:
    """Sums over tokens of KL_K and cross-entropy, without gradients; arguments as `distillation`."""
    kl = ce = 0.0
    for rows, probs in head.distributions(hidden):
        part = TopK(teacher.ids[rows], teacher.probs[rows], teacher.rest[rows])
        kl += float(bucket_kl(probs, part).sum())
        ce -= float(probs.gather(-1, labels[rows, None]).clamp_min(torch.finfo(probs.dtype).tiny).log().sum())
    return kl, ce
