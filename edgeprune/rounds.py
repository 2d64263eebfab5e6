"""Rounds of `fit`: which candidates are made and measured, by AMP's scores or by the damage table; each is logged."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.calibration import TextSet
from edgeprune.candidates import Candidate
from edgeprune.corpus import corpus
from edgeprune.devices import Budget
from edgeprune.errors import BadInput, NothingFits
from edgeprune.files import cache_dir
from edgeprune.importance import Scores
from edgeprune.judging import Measured
from edgeprune.proposal import Proposal, plans, propose
from edgeprune.pruning import cached_damage, tell_of_vocabulary, vocabulary_damage
from edgeprune.quality import Quality
from edgeprune.record import Trial, append_trial, read_trials
from edgeprune.search import METHOD as OBS
from edgeprune.search import dense_candidates, pruned_candidates, worth_making
from edgeprune.vocabulary_damage import VocabularyOption, smaller_sizes
from edgeprune.workshop import Workshop, trial_key

if TYPE_CHECKING:
    from edgeprune.fitting import FitOptions

# Pruned candidates made at most: one by scores takes seconds, one by least squares minutes.
LIMIT_AMP, LIMIT_OBS = 10, 2

Progress = Callable[[str, int, int], None]


def fewer_tokens_may_fit(proposal: Proposal, source: Path, settings: FitOptions) -> bool:
    """Whether the smallest vocabulary that would be tried could meet the budget. Arithmetic only.

    Raises:
        BadInput: a corpus is given, and a tokenizer whose vocabulary cannot be pruned.
    """
    if settings.method != OBS:
        return False
    try:
        sizes = smaller_sizes(source)
    except BadInput:
        if settings.corpus:
            raise
        return False
    if not sizes:
        return False
    small = replace(proposal.shape, vocab=sizes[-1])
    return propose("", small, proposal.profile, proposal.budget, settings.targets).n_feasible > 0


def nothing_fits(proposal: Proposal, source: Path, settings: FitOptions) -> NothingFits:
    """The error for a budget that no candidate meets; it names a corpus as the remedy where that may be one."""
    return proposal.nothing_fits(fewer_tokens=not settings.corpus and fewer_tokens_may_fit(proposal, source, settings))


def by_scores(proposal: Proposal, scores: Scores, settings: FitOptions) -> Proposal:
    """AMP alone: uniform plans at a grid of ratios."""
    plan_for = plans(
        proposal.shape,
        [h.numpy() for h in scores.heads],
        [n.numpy() for n in scores.neurons],
        method=scores.method,
        model_hash=scores.model_hash,
        text_hash=scores.text_hash,
    )
    proposal = propose(
        proposal.model,
        proposal.shape,
        proposal.profile,
        proposal.budget,
        settings.targets,
        plan_for,
        ratios=settings.ratios,
        limit=settings.limit or LIMIT_AMP,
    )
    if not proposal.to_measure:
        raise proposal.nothing_fits()
    return proposal


Measure = Callable[..., list[Measured]]


def by_damage(
    proposal: Proposal,
    source: Path,
    model_hash: str,
    calibration: TextSet,
    settings: FitOptions,
    measure: Measure,
    progress: Progress | None,
) -> tuple[Proposal, list[Measured]]:
    """Every rounding of the dense model first; then the least damaged plans for those that do not fit.

    What rounding costs is measured on the dense model, what narrowing costs is in the damage table, and their sum tells
    which plans are worth making. With a corpus, fewer tokens are one more way to narrow, measured only now that
    something has to go.
    """
    shape, profile, budget = proposal.shape, proposal.profile, proposal.budget
    dense = dense_candidates(shape, settings.targets, profile, budget, model_hash)
    proposal = replace(proposal, candidates=tuple(dense), to_measure=tuple(dense))
    trials = measure(proposal, progress=progress)
    if all(candidate.fits for candidate, _ in trials):
        return proposal, trials
    paths = settings.corpus_paths
    tell_of_vocabulary(shape, paths, progress)
    table = cached_damage(source, model_hash, calibration, progress=progress)
    vocabulary: tuple[VocabularyOption, ...] = ()
    if paths:
        vocabulary = vocabulary_damage(source, model_hash, calibration, paths, progress=progress)
    pruned = pruned_candidates(
        table,
        shape,
        [c for c, _ in trials],
        profile,
        budget,
        uniform=settings.uniform,
        vocabulary=vocabulary,
        corpus=corpus(paths).hash if paths else "",
    )
    qualities = {str(c.target): t.quality.kl_nats.mean for c, t in trials if isinstance(t.quality, Quality)}
    best_dense = min(
        (qualities[str(c.target)] for c, _ in trials if c.fits and str(c.target) in qualities), default=inf
    )
    made = worth_making(pruned, qualities, settings.limit or LIMIT_OBS, best_dense=best_dense)
    proposal = replace(proposal, candidates=(*dense, *pruned), to_measure=(*dense, *made), vocabulary=vocabulary)
    if not made and best_dense == inf:
        raise nothing_fits(proposal, source, settings)
    return proposal, trials + measure(replace(proposal, to_measure=tuple(made)), progress=progress)


def recovered(
    proposal: Proposal, candidate: Candidate, settings: FitOptions, measure: Measure, progress: Progress | None
) -> tuple[Proposal, list[Measured]]:
    """The candidate again, with recovery before it is exported."""
    again = replace(candidate, recovery_s=settings.recovery_s)
    proposal = replace(
        proposal,
        candidates=(*proposal.candidates, again),
        to_measure=(*proposal.to_measure, again),
    )
    return proposal, measure(replace(proposal, to_measure=(again,)), progress=progress)


def dense_trials() -> Path:
    """Where trials of dense models are kept: they serve every budget and, but for speed, every device."""
    return cache_dir() / "trials.jsonl"


def measure_all(
    proposal: Proposal,
    *,
    workshop: Workshop,
    log: Path,
    model_hash: str,
    settings: FitOptions,
    started: float,
    progress: Progress | None,
) -> list[Measured]:
    """Trials of the candidates to measure, each logged when it is finished; known ones are not repeated."""
    known, shared = ({}, {}) if not settings.resume else (read_trials(log), read_trials(dense_trials()))
    measured: list[Measured] = []
    for candidate in proposal.to_measure:
        key = trial_key(candidate, model_hash, workshop)
        trial = known.get(key)
        if trial is None and candidate.dense and key in shared:
            trial = shared[key]
            append_trial(log, trial)
        if trial is None:
            late = settings.max_time_s is not None and time.monotonic() - started > settings.max_time_s
            if late and any(t.quality is not None and c.fits for c, t in measured):
                break
            trial = workshop.measure(candidate, key, progress)
            append_trial(log, trial)
            if candidate.dense and trial.status == "ok":
                append_trial(dense_trials(), trial)
        if trial.speed:  # measured on the device itself: the prediction no longer decides
            on_gpu = proposal.profile.memory.dedicated and candidate.cost.backend != "cpu"
            reasons = judge_measured(trial, proposal.budget, dedicated=on_gpu)
            candidate = replace(candidate, reasons=reasons)
        measured.append((candidate, trial))
    return measured


def judge_measured(trial: Trial, budget: Budget, *, dedicated: bool = False) -> tuple[str, ...]:
    """Limits of the budget that a file broke when it was measured on the device.

    Args:
        dedicated: memory is that of a GPU; where nothing tells how much of it was taken, that limit is not judged.
    """
    reasons = []
    speed = trial.speed["tg128"]["median_ts"]
    if budget.min_tokens_per_s is not None and speed < budget.min_tokens_per_s:
        reasons.append(f"needs {budget.min_tokens_per_s:g} tokens/s, measured {speed:.1f}")
    which = "peak_gpu_mib" if dedicated else "peak_mib"
    peaks = [test[which] for test in trial.speed.values() if test[which] is not None]
    if budget.max_memory_mib is not None and peaks and max(peaks) > budget.max_memory_mib:
        reasons.append(f"memory at most {budget.max_memory_mib:.4g} MiB, measured {max(peaks):.0f}")
    size = sum(file["bytes"] for file in trial.files.values()) / (1 << 20)
    if budget.max_file_mib is not None and size > budget.max_file_mib:
        reasons.append(f"file at most {budget.max_file_mib:.4g} MiB, measured {size:.1f}")
    return tuple(reasons)
