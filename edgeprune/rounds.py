"""Rounds of `fit`: which candidates are made and measured, by AMP's scores or by the damage table; each is logged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.at_hand import asked_of_predictions, in_gpu_memory, judge_measured
from edgeprune.calibration import TextSet
from edgeprune.candidates import Candidate
from edgeprune.corpus import corpus
from edgeprune.devices import Budget, DeviceProfile
from edgeprune.errors import BadInput, NothingFits
from edgeprune.files import cache_dir
from edgeprune.importance import Scores
from edgeprune.judging import Measured
from edgeprune.proposal import Proposal, plans, propose
from edgeprune.pruning import cached_damage, tell_of_vocabulary, vocabulary_damage
from edgeprune.quality import CrossQuality, Quality
from edgeprune.record import TRIALS, append_trial, read_trials
from edgeprune.search import METHOD as OBS
from edgeprune.search import dense_candidates, pruned_candidates, worth_making
from edgeprune.vocabulary_damage import VocabularyOption, smaller_sizes
from edgeprune.workshop import Workshop, trial_key

if TYPE_CHECKING:
    from edgeprune.fitting import FitOptions

# Pruned candidates made at most: one by scores takes seconds, one by least squares minutes.
LIMIT_AMP, LIMIT_OBS = 10, 2
# Times that plans are made anew where the device shows that they miss the budget, or lose more than it needs.
_CORRECTIONS = 2

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
    late: Callable[[], bool],
    progress: Progress | None,
) -> tuple[Proposal, list[Measured]]:
    """Every rounding of the dense model first; then the least damaged plans for those that do not fit.

    What rounding costs is measured on the dense model, what narrowing costs is in the damage table, and their sum tells
    which plans are worth making. With a corpus, fewer tokens are one more way to narrow, measured only now that
    something has to go. Where the device is at hand, plans are for the speed and memory that it showed, and are made
    anew where their own measurement tells that they miss the budget or could lose clearly less.
    """
    shape, profile, budget = proposal.shape, proposal.profile, proposal.budget
    dense = dense_candidates(shape, settings.targets, profile, budget, model_hash)
    to_make = settings.limit or LIMIT_OBS
    proposal = replace(proposal, candidates=tuple(dense), to_measure=tuple(dense), plans_to_make=0)
    trials = measure(proposal, progress=progress)
    if all(candidate.fits for candidate, _ in trials):
        return proposal, trials
    if late() and _best(trials) < inf:
        return replace(proposal, plans_to_make=to_make), trials
    if not shape.uniform:
        if _best(trials) == inf:
            raise nothing_fits(proposal, source, settings)
        if progress:
            progress("the model's layers differ already: it is not pruned again", 0, 0)
        return proposal, trials
    paths = settings.corpus_paths
    tell_of_vocabulary(shape, paths, progress)
    table = cached_damage(source, model_hash, calibration, progress=progress)
    vocabulary: tuple[VocabularyOption, ...] = ()
    if paths:
        vocabulary = vocabulary_damage(source, model_hash, calibration, paths, progress=progress)
    proposal = replace(proposal, vocabulary=vocabulary)
    rounding = {str(c.target): t.quality.kl_nats.mean for c, t in trials if isinstance(t.quality, Quality)}
    latest = trials
    for _ in range(1 + _CORRECTIONS):
        asked = {str(c.target): _asked(c, trials, profile, budget) for c, trial in latest if trial.speed}
        pruned = pruned_candidates(
            table,
            shape,
            [candidate for candidate, _ in latest],
            profile,
            budget,
            asked=asked,
            uniform=settings.uniform,
            vocabulary=vocabulary,
            corpus=corpus(paths).hash if paths else "",
        )
        known = {candidate.key for candidate, _ in trials}
        pruned = [candidate for candidate in pruned if candidate.key not in known]
        made = worth_making(pruned, rounding, to_make, best=_best(trials))
        proposal = replace(
            proposal,
            candidates=(*proposal.candidates, *(pruned if latest is trials else made)),
            to_measure=(*proposal.to_measure, *made),
        )
        if not made:
            break
        latest = measure(replace(proposal, to_measure=tuple(made)), before=trials, progress=progress)
        trials = trials + latest
        at_hand = any(trial.speed for _, trial in latest)
        if not at_hand or (settings.limit and len(trials) - len(dense) >= settings.limit):
            break
    # Where one fits and still has no figure its measurement failed, which is another matter: `fit` says why.
    measured = [candidate for candidate, trial in trials if trial.quality is not None]
    if len(trials) == len(dense) and measured and not any(candidate.fits for candidate, _ in trials):
        raise nothing_fits(proposal, source, settings)
    return proposal, trials


def _asked(like: Candidate, trials: Sequence[Measured], profile: DeviceProfile, budget: Budget) -> Budget:
    """What predictions have to meet in the format of `like`, by all that the device showed of it."""
    seen = [(c, trial) for c, trial in trials if c.target == like.target and trial.speed]
    return asked_of_predictions(budget, seen, dedicated=in_gpu_memory(like, profile))


def _best(trials: Sequence[Measured]) -> float:
    """The least that a file which fits was measured to lose, nats a dense token; inf if there is none."""
    losses = [inf]
    for candidate, trial in trials:
        if candidate.fits and isinstance(trial.quality, Quality):
            losses.append(trial.quality.kl_nats.mean)
        elif candidate.fits and isinstance(trial.quality, CrossQuality):
            losses.append(trial.quality.over_nats.mean)
    return min(losses)


def recovered(
    proposal: Proposal,
    candidate: Candidate,
    settings: FitOptions,
    measure: Measure,
    progress: Progress | None,
    before: Sequence[Measured],
) -> tuple[Proposal, list[Measured]]:
    """The candidate again, with recovery before it is exported; nothing where the time is over by then."""
    again = replace(candidate, recovery_s=settings.recovery_s)
    proposal = replace(
        proposal,
        candidates=(*proposal.candidates, again),
        to_measure=(*proposal.to_measure, again),
    )
    return proposal, measure(replace(proposal, to_measure=(again,)), before=before, progress=progress)


def dense_trials() -> Path:
    """Where trials of dense models are kept: they serve every budget and, but for speed, every device."""
    return cache_dir() / TRIALS


def measure_all(
    proposal: Proposal,
    *,
    workshop: Workshop,
    log: Path,
    model_hash: str,
    settings: FitOptions,
    late: Callable[[], bool],
    progress: Progress | None,
    before: Sequence[Measured] = (),
) -> list[Measured]:
    """Trials of the candidates to measure, each logged when it is finished; known ones are not repeated.

    One that failed earlier is tried again: what another program took of memory or time may be there now.

    Args:
        late: whether the time is over: then no further candidate is measured, if one of these fits.
        before: what was measured earlier, which counts among these.
    """
    known, shared = ({}, {}) if not settings.resume else (read_trials(log), read_trials(dense_trials(), others=True))
    measured: list[Measured] = []
    for candidate in proposal.to_measure:
        key = trial_key(candidate, model_hash, workshop)
        trial = known.get(key)
        if trial is not None and trial.status != "ok":
            trial = None
        if trial is None and candidate.dense and key in shared:
            trial = shared[key]
            append_trial(log, trial)
        if trial is None:
            if late() and _best((*before, *measured)) < inf:
                break
            trial = workshop.measure(candidate, key, progress)
            append_trial(log, trial)
            if candidate.dense and trial.status == "ok":
                append_trial(dense_trials(), trial)
        if trial.speed:  # measured on the device itself: the prediction no longer decides
            on_gpu = in_gpu_memory(candidate, proposal.profile)
            reasons = judge_measured(trial, proposal.budget, dedicated=on_gpu)
            candidate = replace(candidate, reasons=reasons)
        measured.append((candidate, trial))
    return measured
