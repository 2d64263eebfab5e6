"""`fit`: from a model and a device's budget to a file that fits, proved by measurement.

The pipeline is `fit` itself, read from top to bottom; every stage leaves an artefact that a later run finds again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from edgeprune.boards import Place, find_board, place
from edgeprune.bundle import CHECKPOINTS, Made, write_bundle
from edgeprune.calibration import licence_of
from edgeprune.candidates import RATIOS, Candidate
from edgeprune.checkpoint import Checkpoint
from edgeprune.cores import available_cores
from edgeprune.devices import Budget, DeviceProfile, load_profile
from edgeprune.errors import BadInput, NothingFits, StageFailed
from edgeprune.files import cache_dir, only_one, read_json, result_folder, write_json
from edgeprune.fit_texts import (
    HELD_OUT_LENGTH,
    HELD_OUT_WINDOWS,
    calibration_text,
    check_texts,
    held_out,
    recovery_key,
    recovery_text,
)
from edgeprune.heldout import scripts
from edgeprune.judging import JudgedOn, Measured, choose, verdict
from edgeprune.making import Maker
from edgeprune.models import checkpoint_folder, load, resolve
from edgeprune.proposal import Proposal, propose
from edgeprune.pruning import AMP, cached_scores, check_corpus
from edgeprune.record import TRIALS, Trial, files_of, fit_record
from edgeprune.reference import load_reference, make_reference
from edgeprune.report import write_report
from edgeprune.rounds import (
    LIMIT_AMP,
    LIMIT_OBS,
    by_damage,
    by_scores,
    fewer_tokens_may_fit,
    measure_all,
    nothing_fits,
    recovered,
)
from edgeprune.runtimes.bench import GATE_S
from edgeprune.runtimes.ssh import LinkBroken
from edgeprune.runtimes.tuning import Tuned, thread_counts, tune
from edgeprune.samples import side_by_side
from edgeprune.search import METHOD as OBS
from edgeprune.search import dense_candidates
from edgeprune.targets import Target, default_targets, target_for
from edgeprune.workshop import TIMEOUT_S, Workshop

FIT_METHODS = (OBS, AMP)
DISTILLED = "distilled"  # folder of a run: what the calibration text was distilled to

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class FitOptions:
    """How `fit` goes about it.

    Attributes:
        targets: what to export to; each belongs to one runtime.
        ratios: of method "amp": shares of all parameters to try removing; dense is always among them.
        calibration: text to score on, a file or hub dataset; None: the model writes its own.
        held_out: text to judge on, a file; None: the model writes its own, other than the calibration's.
        distill: tokens that the calibration text is distilled to, once for calibration and, with the pruned model at
            hand, once for recovery; None: it is used as it is.
        corpus: text files, JSONL files or folders of them: what the model will be used for. With it "obs" may drop
            tokens that it hardly uses, where something has to go and that costs least.
        threads: threads of the runtimes here. Predictions use the device's.
        method: "obs": per-layer plans from the damage table, with compensation; "amp": the paper's method alone.
        uniform: "obs" gives all layers the same widths.
        recovery_s: seconds of recovery that the best pruned candidate gets; 0: none.
        limit: how many pruned candidates to make and measure at most; None: 2 of "obs", 10 of "amp", whose are quick.
        max_time_s: measure no further candidate after this many seconds, if one is measured.
        board: name or address of a board on which candidates are measured and judged; None: this machine.
        gate_s: seconds that measuring speed here may lose to waiting for a quiet machine; None: it is not watched.
        tune: where speed is measured, find threads and settings of what ships.
        resume: use trials that an earlier run in the same folder finished.
        seed: seed of self-generated text.
    """

    targets: tuple[Target, ...] = field(default_factory=lambda: tuple(default_targets()))
    ratios: tuple[float, ...] = RATIOS
    calibration: str | None = None
    held_out: str | None = None
    distill: int | None = None
    corpus: tuple[str | Path, ...] = ()
    threads: int = field(default_factory=available_cores)
    method: str = OBS
    uniform: bool = False
    recovery_s: float = 0.0
    limit: int | None = None
    max_time_s: float | None = None
    board: str | None = None
    gate_s: float | None = GATE_S
    tune: bool = True
    resume: bool = True
    seed: int = 0

    @property
    def corpus_paths(self) -> tuple[Path, ...]:
        """The corpus's files and folders."""
        return tuple(Path(path).expanduser() for path in self.corpus)


@dataclass(frozen=True)
class FitResult:
    """The outcome of `fit`."""

    proposal: Proposal
    trials: tuple[Measured, ...]
    chosen: Candidate
    trial: Trial
    verdict: str
    out: Path
    judged_on: JudgedOn

    @property
    def best(self) -> Path:
        """The folder with the chosen model."""
        return self.out / "best"


def prepare(
    model: str | Path, profile: DeviceProfile, budget: Budget, options: FitOptions, *, progress: Progress | None = None
) -> tuple[Path, Proposal]:
    """The dense checkpoint's folder, and what `fit` would do with it: no forward pass, nothing written but caches.

    The shape alone decides whether anything can fit, so an impossible budget is told before anything is loaded.

    Raises:
        NothingFits: no candidate meets the budget; the message has the nearest miss.
        BadInput: an unknown or broken model, or a context longer than the model's.
    """
    say = None if progress is None else lambda text: progress(text, 0, 0)
    check_corpus(options.corpus, options.method)
    if options.method == OBS and options.ratios != RATIOS:
        raise BadInput("obs finds the shares itself", where="--ratios", remedy="leave it out, or add --method amp")
    if options.distill and options.calibration is None:
        raise BadInput("there is no text to distil", where="--distill", remedy="name it with --calibration")
    check_texts(options)
    if options.board:
        find_board(options.board)  # that it is known
        profile = profile.model_copy(update={"reachable": True})
    source = checkpoint_folder(resolve(str(model), say=say), say=say)
    shape = Checkpoint(source).shape
    if budget.context > shape.max_positions:
        raise BadInput(
            f"context {budget.context} is more than the model's {shape.max_positions}", remedy="ask for less"
        )
    for target in options.targets:
        if budget.context > (longest := target.format.longest(shape)):
            raise BadInput(
                f"beyond {longest} tokens {target.runtime} computes another model, since it knows no window there",
                where=f"context {budget.context}",
                remedy=f"add --context {longest}, or --runtime with another",
            )
    dense = tuple(dense_candidates(shape, options.targets, profile, budget))
    lacking = not all(candidate.fits for candidate in dense)
    made = (options.limit or LIMIT_OBS) if lacking and shape.uniform else 0
    proposal = Proposal(str(model), shape, profile, budget, dense, dense, plans_to_make=made)
    if options.method == OBS and proposal.n_feasible:
        return source, proposal
    limit = options.limit or LIMIT_AMP
    grid = propose(str(model), shape, profile, budget, options.targets, ratios=options.ratios, limit=limit)
    if not grid.n_feasible and not (options.corpus and fewer_tokens_may_fit(grid, source, options)):
        raise nothing_fits(grid, source, options)
    return source, proposal if options.method == OBS else grid


def fit(
    model: str | Path = "demo",
    device: str | DeviceProfile = "host",
    budget: Budget | None = None,
    *,
    out: str | Path | None = None,
    targets: Sequence[Target | str] | None = None,
    on_proposal: Callable[[Proposal], None] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> FitResult:
    """Find the version of `model` that loses least and meets the budget on `device`; export, measure and bundle it.

    Args:
        model: a hub id, a folder, a .gguf file, or a demo name.
        device: a profile, its name, the path of a .toml, or "host" for this machine.
        budget: what to meet; default: the profile's own.
        out: folder of the run; default: `runs/MODEL-DEVICE`.
        targets: quantisations to try, by name; default: all usual ones.
        on_proposal: called with the proposal before the long part.
        progress: called with (stage, done, total).
        options: the fields of `FitOptions`.

    Raises:
        NothingFits: no candidate meets the budget; the message has the nearest miss.
        BadInput, StageFailed: see their messages.
    """
    started = time.monotonic()
    profile = load_profile(device) if isinstance(device, str) else device
    budget = budget or Budget.of(profile)
    if "corpus" in options:
        options["corpus"] = tuple(options["corpus"])
    if targets:
        options["targets"] = tuple(target_for(t) if isinstance(t, str) else t for t in targets)
    settings = FitOptions(**options)
    there = place(settings.board, None if settings.board else settings.threads)
    source, proposal = prepare(model, profile, budget, settings, progress=progress)
    if on_proposal:
        on_proposal(proposal)
    named = device if isinstance(device, str) else profile.name
    out = _writable(Path(out) if out else Path("runs") / f"{_plain(str(model))}-{profile.name}")
    with only_one(out / TRIALS):
        return _fit(source, proposal, out, settings, there, started, device=named, progress=progress)


def _fit(
    source: Path,
    proposal: Proposal,
    out: Path,
    settings: FitOptions,
    there: Place,
    started: float,
    *,
    device: str,
    progress: Progress | None,
) -> FitResult:
    """The long part of `fit`: what is proposed, made and measured in the run's folder `out`, which is ours alone."""
    profile, budget = proposal.profile, proposal.budget
    if not settings.resume:
        for folder in ("work", CHECKPOINTS):
            shutil.rmtree(out / folder, ignore_errors=True)

    loaded = load(source)
    # Before calibration text, which may take minutes to write: one that is too short is told at once.
    text, text_source = held_out(loaded, settings, progress)
    calibration = calibration_text(loaded, settings, out / DISTILLED, progress)
    model_hash = loaded.hash
    scores = cached_scores(loaded, calibration, progress=progress) if settings.method == AMP else None
    del loaded  # the runtimes run in processes of their own; this one's copy of the weights is done with
    # The reference: what the dense model says of held-out text, once.
    reference = make_reference(
        source,
        text,
        cache_dir() / "references",
        model_hash=model_hash,
        length=HELD_OUT_LENGTH,
        count=HELD_OUT_WINDOWS,
        threads=settings.threads,
        timeout_s=TIMEOUT_S,
        progress=None if progress is None else lambda m: progress("running the dense model", m["done"], m["total"]),
    )
    dense = load_reference(reference)
    judged_on = JudgedOn(text_source, scripts(dense.covered_text), reference.name, dense.nll)
    workshop = Workshop(
        out / "work",
        source,
        reference,
        settings.threads,
        bench=profile.at_hand,
        device=profile.name,
        gate_s=settings.gate_s,
        place=there,
        context=budget.context,
        recovery=recovery_key(settings) if settings.recovery_s else "",
        make=Maker(
            source,
            model_hash,
            calibration,
            settings.seed,
            recovery_text(source, settings, out / DISTILLED),
            settings.corpus_paths,
        ),
        texts=calibration,
        checkpoints=out / CHECKPOINTS,
    )

    def late() -> bool:
        return settings.max_time_s is not None and time.monotonic() - started > settings.max_time_s

    measure = partial(
        measure_all,
        workshop=workshop,
        log=out / TRIALS,
        model_hash=model_hash,
        settings=settings,
        late=late,
    )

    # Candidates, each exported and measured in its runtime; then the choice.
    if scores is not None:
        proposal = by_scores(proposal, scores, settings)
        trials = measure(proposal, progress=progress)
    else:
        proposal, trials = by_damage(proposal, source, model_hash, calibration, settings, measure, late, progress)
    fitting = [(candidate, trial) for candidate, trial in trials if candidate.fits]
    winner = choose(fitting, judged_on.nll)
    if winner is not None and settings.recovery_s and not winner[0].dense:
        proposal, again = recovered(proposal, winner[0], settings, measure, progress, trials)
        trials += again
        fitting += [pair for pair in again if pair[0].fits]
        winner = choose(fitting, judged_on.nll)
    if winner is None:
        outcomes = "; ".join(f"{c}: {t.reason or ', '.join(c.reasons)}" for c, t in trials)
        failed = all(t.quality is None for _, t in trials) or any(c.fits and t.quality is None for c, t in trials)
        raise (StageFailed if failed else NothingFits)(f"no candidate could be chosen ({outcomes})", where=out)
    result = FitResult(proposal, tuple(trials), *winner, verdict(*winner, profile, budget), out, judged_on)
    bundles = {"best": winner}
    for runtime in sorted({c.target.runtime for c, _ in fitting} - {winner[0].target.runtime}):
        # An app may be tied to the other runtime: it gets the best that fits there.
        if pick := choose([pair for pair in fitting if pair[0].target.runtime == runtime], judged_on.nll):
            bundles[f"best-{runtime}"] = pick
    for stale in out.glob("best*/bundle.json"):  # of an earlier run with another outcome
        if stale.parent.name not in bundles:
            shutil.rmtree(stale.parent)
    for folder, (candidate, trial) in bundles.items():
        path = workshop.export(candidate, progress)
        # By content: what is dense was perhaps measured by a run with other texts, which its file's name has.
        here, measured = (sorted(each["sha256"] for each in files.values()) for files in (files_of(path), trial.files))
        if here != measured:
            raise StageFailed("not the file that was measured", where=path, remedy="run again with --no-resume")
        made = Made(
            path,
            source,
            workshop.companions(candidate),
            workshop.plan(candidate, proposal.shape),
            workshop.vocabulary_plan(candidate),
            None if candidate.dense else workshop.identity(candidate),
        )
        tuned = _tuned(path, candidate, there, settings, progress) if profile.at_hand and settings.tune else None
        write_bundle(result, candidate, trial, made, out / folder, tuned)
    _keep_checkpoints(workshop, [candidate for candidate, _ in bundles.values() if not candidate.dense], progress)
    if progress:
        progress("asking the dense model and the chosen file", 0, 0)
    samples = side_by_side(
        source,
        model_hash,
        workshop.export(winner[0]),
        winner[0].target.runtime,
        n_ctx=budget.context,
        stop=proposal.shape.eos,
        stop_chosen=read_json(result.best / "bundle.json")["eos_token_ids"],
        threads=settings.threads,
    )
    record = fit_record(
        result,
        model_hash=model_hash,
        calibration={
            "source": calibration.source,
            "sha256": calibration.hash,
            "tokens": calibration.tokens,
            "licence": licence_of(settings.calibration) if settings.calibration else None,
        },
        plan=workshop.vocabulary_plan(result.chosen),
        options=settings,
        device=device,
        samples=samples,
        seconds=time.monotonic() - started,
    )
    write_json(out / "fit.json", record)
    write_report(result, record)
    workshop.clean()
    return result


def _keep_checkpoints(workshop: Workshop, pruned: Sequence[Candidate], progress: Progress | None) -> None:
    """Of all checkpoints that were made keep those of what ships: other formats are exported from them later."""
    kept = {workshop.checkpoint(candidate, progress, alone=False) for candidate in pruned}
    for folder in workshop.checkpoints.glob("*"):
        if folder not in kept:
            shutil.rmtree(folder)
    if not kept:
        shutil.rmtree(workshop.checkpoints, ignore_errors=True)


def _tuned(
    path: Path, candidate: Candidate, there: Place, settings: FitOptions, progress: Progress | None
) -> Tuned | None:
    """How what ships runs fastest where it was measured; None where that could not be measured."""
    usual = there.threads
    try:
        return tune(
            path,
            threads=thread_counts(usual),
            runtime=candidate.target.runtime,
            given=candidate.settings,
            gate_s=settings.gate_s,
            execute=there.execute,
            progress=progress and (lambda stage, done, total: progress(f"tuning {stage}", done, total)),
        )
    except LinkBroken:
        raise
    except StageFailed as error:  # the choice is made, and hours of work are in it
        if progress:
            progress(f"it ships as it was measured: tuning failed ({error.what})", 0, 0)
        return None


def _plain(model: str) -> str:
    """A model's name as one of a folder: a file's or folder's own, a hub id's with its owner."""
    path = Path(model).expanduser()
    return path.resolve().name.removesuffix(".gguf") if path.exists() else model.replace("/", "--")


def _writable(out: Path) -> Path:
    """`out` as a run's folder that can be written to, told before an hour is spent."""
    out = result_folder(out, TRIALS)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / TRIALS).touch()  # from now on it is a run's
    except OSError as error:
        raise BadInput(f"cannot write ({error.strerror})", where=out, remedy="choose another --out") from error
    return out
