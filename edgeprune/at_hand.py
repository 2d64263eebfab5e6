"""The device that is there to be measured: whether a file meets the budget, and what that asks of predictions.

A profile describes a kind of device. The one at hand is a little faster or slower, or shared, and a plan of narrower
layers meets its budget with nothing to spare: it misses by as much as the prediction is off. What was measured of the
same format before, dense or another plan, tells by how much that is.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgeprune.candidates import Candidate
from edgeprune.devices import Budget, DeviceProfile
from edgeprune.record import Trial


def judge_measured(trial: Trial, budget: Budget, *, dedicated: bool = False) -> tuple[str, ...]:
    """Limits of the budget that a file broke when it was measured on the device.

    Args:
        dedicated: memory is that of a GPU; where nothing tells how much of it was taken, that limit is not judged.
    """
    reasons = []
    speed = trial.speed["tg128"]["median_ts"]
    if budget.min_tokens_per_s is not None and speed < budget.min_tokens_per_s:
        reasons.append(f"needs {budget.min_tokens_per_s:g} tokens/s, measured {speed:.1f}")
    peak = peak_mib(trial, dedicated=dedicated)
    if budget.max_memory_mib is not None and peak is not None and peak > budget.max_memory_mib:
        reasons.append(f"memory at most {budget.max_memory_mib:.4g} MiB, measured {peak:.0f}")
    size = sum(file["bytes"] for file in trial.files.values()) / (1 << 20)
    if budget.max_file_mib is not None and size > budget.max_file_mib:
        reasons.append(f"file at most {budget.max_file_mib:.4g} MiB, measured {size:.1f}")
    return tuple(reasons)


def in_gpu_memory(candidate: Candidate, profile: DeviceProfile) -> bool:
    """Whether the memory that the candidate is judged by is that of a GPU."""
    return profile.memory.dedicated and candidate.cost.backend != "cpu"


def peak_mib(trial: Trial, *, dedicated: bool = False) -> float | None:
    """Largest memory measured, MiB: the process's, or of it the GPU's own where `dedicated`; None: nothing told it."""
    which = "peak_gpu_mib" if dedicated else "peak_mib"
    return max((test[which] for test in trial.speed.values() if test[which] is not None), default=None)


def asked_of_predictions(budget: Budget, seen: Sequence[tuple[Candidate, Trial]], *, dedicated: bool = False) -> Budget:
    """The budget that a prediction has to meet for the device to meet `budget`, of other widths in the same format.

    Memory is taken to be off by one difference: libraries and activations, which widths hardly change.

    Args:
        budget: what is asked of the device.
        seen: what was measured of that format on the device, the latest last.
        dedicated: the candidates' memory is that of a GPU, of which a budget also says how many layers go there; it
            stays as it is.
    """
    candidate, trial = seen[-1]
    changed = {}
    if budget.min_tokens_per_s is not None:
        times = [(1 / c.cost.decode_tps.value, 1 / t.speed["tg128"]["median_ts"]) for c, t in seen]
        changed["min_tokens_per_s"] = 1 / predicted_time(1 / budget.min_tokens_per_s, times)
    peak = None if dedicated else peak_mib(trial)
    if budget.max_memory_mib is not None and peak is not None:
        changed["max_memory_mib"] = max(1.0, budget.max_memory_mib - (peak - candidate.cost.memory_mib.value))
    return budget.model_copy(update=changed)


def predicted_time(wanted: float, times: Sequence[tuple[float, float]]) -> float:
    """The time for which a prediction has to be asked to get the time `wanted`.

    By the line through the two measurements next to it: narrower layers may gain more or less than their bytes. With
    one measurement, or two that make no rising line, the prediction is taken to be off by one factor.

    Args:
        times: (predicted, measured), in any unit.
    """
    (predicted, measured), *others = sorted(times, key=lambda pair: abs(pair[1] - wanted))
    if others:
        run, rise = others[0][0] - predicted, others[0][1] - measured
        if run * rise > 0 and (found := predicted + (wanted - measured) * run / rise) > 0:
            return found
    return predicted * wanted / measured
