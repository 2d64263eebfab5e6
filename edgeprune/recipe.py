"""How a recovery trains, and what came of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from edgeprune.losses import Mix
from edgeprune.recovery_state import Held
from edgeprune.trainee import LowRank

Method = Literal["distil", "lora"]


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        mix: weights of KL to the teacher and of cross-entropy.
        low_rank: LoRA instead of all weights.
        train_embedding: train embedding and head too. Pruning leaves them alone, and AdamW moves a rare token's row,
            whose gradient is faint, as far as any other's. SmolLM2-135M, a fifth pruned, 256 steps of 1,024 tokens:
            held-out KL 0.396 with them and 0.389 without, bits per byte of WikiText-2 validation 1.237 and 1.230.
        length: tokens a window; 512, or as many as a model reads. The same 256 steps in windows of 256 and 512: bits
            per byte 1.230 and 1.225, and 7 % less speed.
        batch: windows a step, over all devices; rounded up so that each device has as many.
        micro_tokens: tokens that pass through the model at once on one device; a step takes as many rounds as it needs.
        rate: peak learning rate; None chooses it by the steps there will be and the damage (`peak_rate`).
        warmup: share of the run in which the rate rises.
        betas, decay, clip: AdamW's, and the most that the gradient's norm may be.
        top_k: tokens of the teacher that are kept a position.
        held_out: windows to judge on.
        checkpoint_s: seconds between judging and saving the state.
        max_steps: ends the run by steps instead of time.
    """

    mix: Mix = field(default_factory=Mix)
    low_rank: LowRank | None = None
    train_embedding: bool = False
    length: int = 512
    batch: int = 2
    micro_tokens: int = 1024
    rate: float | None = None
    warmup: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    decay: float = 0.0
    clip: float = 1.0
    top_k: int = 64
    held_out: int = 16
    checkpoint_s: float = 300.0
    max_steps: int | None = None

    def with_length(self, length: int) -> Recipe:
        """The same in windows of `length` tokens, with as many tokens a step and held out."""
        times = self.length / length
        batch, held_out = (max(1, round(times * count)) for count in (self.batch, self.held_out))
        return replace(self, length=length, batch=batch, held_out=held_out)


# AMP's own (arXiv 2504.21174): LoRA with r = 8, alpha 16, dropout .05 on every projection, rate 3e-4, 512 tokens,
# 16 texts a step, cross-entropy alone.
RECIPES: dict[str, Recipe] = {
    "distil": Recipe(),
    "lora": Recipe(mix=Mix(kl=0.0, ce=1.0), low_rank=LowRank(), batch=16, rate=3e-4, betas=(0.9, 0.999)),
}


@dataclass(frozen=True)
class RecoveryResult:
    """What came of a recovery.

    Attributes:
        out: the folder written.
        method: "distil" or "lora".
        steps, tokens, seconds: of the whole run; tokens are those trained on.
        tokens_per_s: tokens by the seconds spent in steps, the teacher's included.
        teacher_s: of those seconds, the ones spent in computing the teacher's distributions.
        skipped: steps left out because a gradient was not finite.
        before, after: held-out KL to the teacher (over its top k and the rest) and cross-entropy, nats a token.
        best_step: the step whose weights were written.
        cache, cache_mib: where the teacher's records are, and what they take on the disk.
        history: loss, KL and cross-entropy over the run.
    """

    out: Path
    method: str
    steps: int
    tokens: int
    seconds: float
    tokens_per_s: float
    teacher_s: float
    skipped: int
    before: Held
    after: Held
    best_step: int
    cache: Path
    cache_mib: float
    history: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return asdict(self) | {"out": str(self.out), "cache": str(self.cache)}


def peak_rate(steps: float, damage: float) -> float:
    """The peak learning rate for a run of so many steps on a student so far from its teacher.

    What is nearly whole is shaken more than it is mended by a rate that suits a wreck. SmolLM2-135M, a fifth pruned,
    held-out loss of the mix (KL): with compensation, 0.26 nats from its teacher, 60 steps at 5e-5, 1e-4, 2e-4 and 3e-4
    end at 1.109 (0.244), 1.099 (0.247), 1.103 (0.263) and 1.120 (0.287); without, 0.93 from it, 3e-4 mends and 1e-3
    does worse. Between the two the rate is taken to be proportional to the distance.

    Beyond 1,000 steps it falls by the power -0.32 of them, as the best rate does with the token horizon in pre-training
    (arXiv 2409.19913).

    Args:
        steps: how many there will be.
        damage: held-out KL to the teacher before the first step, nats a token.
    """
    near = min(1.0, max(1 / 3, damage / 0.9))
    return max(3e-5, 3e-4 * near * math.pow(max(steps / 1000, 1.0), -0.32))
