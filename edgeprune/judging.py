"""The choice among measured candidates, by one figure that all of them have, and what is said of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from edgeprune.at_hand import in_gpu_memory, peak_mib
from edgeprune.candidates import Candidate
from edgeprune.devices import Budget, DeviceProfile
from edgeprune.errors import BadInput
from edgeprune.metrics import Interval, mean_interval, paired_interval
from edgeprune.quality import CrossQuality, Quality, TextQuality, differs, loss_over_dense
from edgeprune.record import Trial

Measured = tuple[Candidate, Trial]

# Below it the model no longer says what dense says more often than not, and text tends to fall apart.
POOR_TOP1 = 0.5
# The same for files with other tokens, which have no top-1 agreement: what dense would say is half as likely a token.
POOR_LOSS = math.log(2)


@dataclass(frozen=True)
class JudgedOn:
    """The text that candidates were judged on.

    Attributes:
        source: where it is from.
        scripts: writing system -> share of its letters.
        reference: key of the dense model's distributions over it.
        nll: the dense model's negative log-likelihood in each window, nats per token.
    """

    source: str
    scripts: Mapping[str, float]
    reference: str
    nll: tuple[float, ...]

    @property
    def dense_perplexity(self) -> float:
        """Perplexity of the dense model, unquantised."""
        return math.exp(fmean(self.nll))

    def __str__(self) -> str:
        shares = [f"{script} {100 * share:.1f} %" for script, share in self.scripts.items() if share >= 5e-4]
        return f"{self.source}; scripts of its letters: {', '.join(shares) or 'none'}"


def has_kl(trials: Sequence[Trial]) -> bool:
    """Whether every file that was measured has the dense model's tokens, so that a KL divergence to it exists."""
    return all(isinstance(trial.quality, Quality) for trial in trials if trial.quality is not None)


def distance(quality: TextQuality, dense: Sequence[float], *, kl: bool) -> tuple[float, ...]:
    """How far a file is from the dense model, a value a window, nats per token of the dense tokenizer.

    Args:
        quality: measured on the reference's windows.
        dense: the dense model's negative log-likelihood in each window.
        kl: by KL divergence, where all files compared have it; else by the loss over dense.
    """
    return quality.kl_windows if kl and isinstance(quality, Quality) else loss_over_dense(quality, dense)


def distance_interval(quality: TextQuality, dense: Sequence[float], *, kl: bool) -> Interval:
    """Mean of `distance` with its 95 % interval."""
    return mean_interval(distance(quality, dense, kl=kl))


def choose(measured: Sequence[Measured], dense: Sequence[float] = ()) -> Measured | None:
    """The best measured quality; on a tie, within what chance explains, the faster. None if nothing was measured.

    Quality is the KL divergence to the dense model or, where one of the files has other tokens and therefore none, the
    loss over dense of all of them. Chance is told by differences over the same windows, which all files read.

    Speed is the measured one where it was measured, which is on the device itself, else the predicted.

    Args:
        measured: candidates with their trials.
        dense: the dense model's negative log-likelihood in each window, nats per token; needed where a file has other
            tokens.

    Raises:
        BadInput: they were not measured against the same reference.
    """

    def speed(pair: Measured) -> float:
        tg = pair[1].speed.get("tg128")
        return float(tg["median_ts"]) if tg else pair[0].cost.decode_tps.value

    sound = [(pair, pair[1].quality) for pair in measured if pair[1].quality is not None]
    if not sound:
        return None
    if len({quality.reference for _, quality in sound if isinstance(quality, (Quality, CrossQuality))}) > 1:
        raise BadInput("the files were not measured against the same reference", remedy="evaluate them again")
    kl = has_kl([trial for _, trial in measured])
    best = min((quality for _, quality in sound), key=lambda quality: fmean(distance(quality, dense, kl=kl)))
    return max((pair for pair, q in sound if q is best or not _told_apart(q, best, dense, kl=kl)), key=speed)


def _told_apart(a: TextQuality, b: TextQuality, dense: Sequence[float], *, kl: bool) -> bool:
    """Whether one is further from dense than the other beyond what chance explains."""
    if kl and isinstance(a, Quality) and isinstance(b, Quality):
        return differs(a, b).seen
    pairs = paired_interval(distance(a, dense, kl=kl), distance(b, dense, kl=kl))
    return not pairs.contains_zero


def verdict(chosen: Candidate, trial: Trial, profile: DeviceProfile, budget: Budget) -> str:
    """One sentence: what was chosen, whether it fits, and on what evidence."""
    quality = trial.quality
    assert quality is not None
    tg = trial.speed.get("tg128")
    speed = f"measured {tg['median_ts']:.1f}" if tg else f"predicted {chosen.cost.decode_tps}"
    peak = peak_mib(trial, dedicated=in_gpu_memory(chosen, profile))
    memory = f"predicted {chosen.cost.memory_mib}" if peak is None else f"measured {peak:.0f}"
    asked = f" (asked {budget.min_tokens_per_s:g})" if budget.min_tokens_per_s else ""
    poor, figures = False, ""
    if isinstance(quality, Quality):
        kl, top1 = quality.kl_nats, quality.top1
        figures = (
            f"measured KL to dense {kl.mean:.3f} ({kl.low:.3f}–{kl.high:.3f}) nats a token, "
            f"same first choice as dense {100 * top1.mean:.0f} %"
        )
        poor = top1.mean < POOR_TOP1
    elif isinstance(quality, CrossQuality):
        over = quality.over_nats
        figures = f"measured loss over dense {over.mean:.3f} ({over.low:.3f}–{over.high:.3f}) nats a dense token"
        poor = over.mean > POOR_LOSS
    line = f"fits {profile.name}: {chosen}; {speed} tokens/s{asked}, {memory} MiB; {figures}"
    if not poor:
        return line
    training = "" if chosen.dense else "longer recovery, or " if chosen.recovery_s else "recovery, or "
    return f"{line}; POOR QUALITY: a budget this tight needs {training}to be larger"
