"""The parts of a training loop that know neither text nor teacher: number formats, the split of a model into decoder
and head, float32 masters of low-precision weights, and the learning rate over a run."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.attention import WINDOWS, set_attention
from edgeprune.dropout import own_draws
from edgeprune.losses import Head, Mix, TopK, distillation, divergence
from edgeprune.norms import lean_norms

_WORTH_IT = 1.25  # bf16 products must be this much faster than float32 ones to be worth their rounding
_WINDOWS_BELOW = 1024  # tokens a window up to which plain products beat torch's fused kernel, with gradients
_LEAST_SHARE = 0.01  # of the peak rate, so that the first step moves at all


@functools.cache
def number_format(device: torch.device) -> torch.dtype:
    """bfloat16 where this processor multiplies it faster than float32 (measured in about 20 ms), else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    seconds = {dtype: _product_seconds(dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    return torch.bfloat16 if seconds[torch.float32] > _WORTH_IT * seconds[torch.bfloat16] else torch.float32


def _product_seconds(dtype: torch.dtype, device: torch.device) -> float:
    a, b = torch.ones(256, 512, dtype=dtype, device=device), torch.ones(1024, 512, dtype=dtype, device=device)
    best = math.inf
    for _ in range(4):  # the first call also chooses a kernel
        start = time.perf_counter()
        torch.mm(a, b.t())
        best = min(best, time.perf_counter() - start)
    return best


class Decoder:
    """A causal language model of transformers as the two parts whose boundary the loss needs.

    Args:
        model: the model; its parameters are cast to `dtype`, its buffers (rotary frequencies) keep their precision.
        dtype: number format of the parameters.
        length: tokens in a window, which chooses the attention.
    """

    def __init__(self, model: Any, dtype: torch.dtype, length: int) -> None:
        self.model = model
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        lean_norms(model)
        if self.device.type == "cpu":
            own_draws(model)
            if length <= _WINDOWS_BELOW:
                set_attention(model, WINDOWS)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def head(self) -> Head:
        """The output head, with the model's own parameters."""
        linear = self.model.get_output_embeddings()
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return Head(linear.weight, getattr(linear, "bias", None), cap)

    def hidden(self, ids: Tensor) -> Tensor:
        """Last hidden states of (B, L) tokens: (B · L, hidden)."""
        # With no mask given, transformers looks for several texts in a window, and makes a mask where there is one.
        decode, whole = self.model.get_decoder(), torch.ones_like(ids)
        states: Tensor = decode(input_ids=ids, attention_mask=whole, use_cache=False).last_hidden_state
        return states.flatten(0, 1)


class Learner(nn.Module):
    """Windows in, loss out: one module, so that a launcher can wrap the whole of it for several devices."""

    def __init__(self, decoder: Decoder, mix: Mix) -> None:
        super().__init__()
        self.model = decoder.model
        self._decoder = decoder
        self._mix = mix

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._decoder.device

    def forward(
        self,
        windows: Tensor,
        ids: Tensor | None = None,
        probs: Tensor | None = None,
        rest: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, KL and cross-entropy, means over B · L tokens.

        Args:
            windows: (B, L + 1) token ids.
            ids, probs, rest: the teacher's, as in `TopK`, with B · L rows; None without a teacher.
            weights: what each prediction counts for, (B, L); None: all alike.
        """
        teacher = None if ids is None or probs is None or rest is None else TopK(ids, probs, rest)
        hidden = self._decoder.hidden(windows[:, :-1])
        each = None if weights is None else weights.flatten()
        return distillation(hidden, self._decoder.head, windows[:, 1:].flatten(), teacher, self._mix, each)

    @torch.no_grad()
    def judge(self, windows: Tensor, teacher: TopK) -> tuple[float, float]:
        """Sums of KL and cross-entropy over B · L tokens, without dropout."""
        self.eval()
        sums = divergence(self._decoder.hidden(windows[:, :-1]), self._decoder.head, windows[:, 1:].flatten(), teacher)
        self.train()
        return sums


class MasterAdamW:
    """AdamW (arXiv 1711.05101) on float32 masters of parameters that may be in a lower precision.

    A step of a few millionths would vanish in bfloat16, whose neighbours are 0.4 % apart; the masters keep it. A
    parameter that is float32 already is its own master.

    Args:
        masters: name -> float32 values; they are changed in place.
        parameters: the same names -> the model's parameters.
        betas, decay: AdamW's.
    """

    def __init__(
        self,
        masters: Mapping[str, Tensor],
        parameters: Mapping[str, nn.Parameter],
        *,
        betas: tuple[float, float],
        decay: float,
    ) -> None:
        self.masters = {name: nn.Parameter(value) for name, value in masters.items()}
        self._parameters = dict(parameters)
        self._optimizer = torch.optim.AdamW(self.masters.values(), lr=0.0, betas=betas, weight_decay=decay, fused=True)

    def collect(self, gradients: Sequence[Tensor | None], share: float) -> None:
        """Add `share` of the parameters' `gradients`, in their order, to the masters'."""
        for master, given in zip(self.masters.values(), gradients, strict=True):
            if given is None:
                continue
            if master.grad is None:
                master.grad = given.to(torch.float32, copy=True).mul_(share)
            else:
                master.grad.add_(given, alpha=share)

    def step(self, rate: float, most: float) -> float:
        """One update at learning rate `rate` with the gradient's norm clipped to `most`; returns the norm before.

        Where the norm is not finite, nothing changes.
        """
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients))
        if math.isfinite(norm):
            if norm > most:
                torch._foreach_mul_(gradients, most / norm)
            self._optimizer.param_groups[0]["lr"] = rate
            self._optimizer.step()
            self.publish()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def publish(self) -> None:
        """Give the model the masters' values."""
        for name, parameter in self._parameters.items():
            parameter.copy_(self.masters[name])

    def state(self) -> dict[str, Tensor]:
        """All that a later run needs to go on: masters, both moments, step counts."""
        tensors: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            tensors[f"master.{name}"] = master.detach()
            for kind, value in self._optimizer.state.get(master, {}).items():
                tensors[f"{kind}.{name}"] = value
        return tensors

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `state` gave; raises `KeyError` or `RuntimeError` where it belongs to other parameters."""
        for name, master in self.masters.items():
            master.copy_(tensors[f"master.{name}"])
            if f"step.{name}" in tensors:
                kinds = ("step", "exp_avg", "exp_avg_sq")
                self._optimizer.state[master] = {
                    kind: tensors[f"{kind}.{name}"].to(master.device, copy=True) for kind in kinds
                }
        self.publish()


def rate_share(progress: float, warmup: float) -> float:
    """The learning rate over its peak at `progress` of a run, both shares in [0, 1]: linear warm-up, then a cosine to
    0 (arXiv 1608.03983)."""
    if progress < warmup:
        return max(_LEAST_SHARE, progress / warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


class Clock:
    """Elapsed seconds of a run that may have been interrupted.

    Args:
        now: gives the time, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._start = now()

    @property
    def elapsed(self) -> float:
        """Seconds so far."""
        return self._now() - self._start

    def rewind(self, seconds: float) -> None:
        """Count `seconds` of an earlier part beside those of this one."""
        self._start -= seconds
