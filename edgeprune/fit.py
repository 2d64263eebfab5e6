"""`fit`: from a model and a device's budget to a file that fits, proved by measurement.

The pipeline is `fit` itself, read from top to bottom. Every stage leaves an artefact that a later run finds again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.candidates import RATIOS, Candidate, candidates_for, nearest_miss, worth_measuring
from edgeprune.checkpoint import Checkpoint
from edgeprune.devices import Budget, DeviceProfile, load_profile
from edgeprune.errors import BadInput, EdgepruneError, NothingFits, StageFailed
from edgeprune.files import cache_dir, write_json
from edgeprune.plan import PrunePlan, uniform_plan
from edgeprune.quality import Quality, differs, evaluate
from edgeprune.record import SCHEMA_VERSION, Trial, append_trial, environment, files_of, read_trials
from edgeprune.reference import make_reference
from edgeprune.shape import ModelShape
from edgeprune.targets import Target, default_targets, target_for

# 16 windows tell apart what differs by a few per cent in KL on the demo model; more would only take longer.
HELD_OUT_WINDOWS = 16
HELD_OUT_LENGTH = 512
_TIMEOUT_S = 1800.0

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Proposal:
    """What `fit` is about to do: shown before it runs, and all that `--dry-run` gives."""

    model: str
    shape: ModelShape
    profile: DeviceProfile
    budget: Budget
    candidates: tuple[Candidate, ...]
    to_measure: tuple[Candidate, ...]
    estimated_s: float
    provisional: bool  # made without scores, so which heads leave (hence a few bytes) may still change

    @property
    def n_feasible(self) -> int:
        """How many candidates are predicted to fit."""
        return sum(candidate.fits for candidate in self.candidates)


@dataclass(frozen=True)
class FitResult:
    """The outcome of `fit`."""

    proposal: Proposal
    trials: tuple[tuple[Candidate, Trial], ...]
    chosen: Candidate
    trial: Trial
    verdict: str
    out: Path

    @property
    def best(self) -> Path:
        """The folder with the chosen model."""
        return self.out / "best"


def _plans(shape: ModelShape, heads: Sequence[Any], neurons: Sequence[Any], **origin: str) -> Callable[..., PrunePlan]:
    """Plans by (ratio, alignment), each made once."""
    made: dict[tuple[float, int], PrunePlan] = {}

    def plan_for(ratio: float, align: int) -> PrunePlan:
        if (ratio, align) not in made:
            made[ratio, align] = uniform_plan(shape, heads, neurons, ratio, align=align, **origin)
        return made[ratio, align]

    return plan_for


def _estimate_s(shape: ModelShape, tokens: int, exports: int) -> float:
    """Rough seconds for `tokens` through the dense model and so many exports, from this machine's own arithmetic."""
    size = 1024
    a = np.ones((size, size), dtype=np.float32)
    a @ a  # the first product also starts the threads
    start = time.perf_counter()
    for _ in range(3):
        a @ a
    rate = 3 * 2 * size**3 / (time.perf_counter() - start)  # floating-point operations a second
    # A transformer's small products reach about half of a large product's rate; an export moves the weights four times.
    return 2 * shape.parameters * tokens / (0.5 * rate) + exports * 4 * shape.parameters * 4 / 1e9


def propose(
    name: str,
    shape: ModelShape,
    profile: DeviceProfile,
    budget: Budget,
    targets: Sequence[Target],
    plan_for: Callable[[float, int], PrunePlan] | None = None,
    *,
    ratios: Sequence[float] = RATIOS,
    threads: int | None = None,
    limit: int = 8,
) -> Proposal:
    """What could be shipped, and which of it would be measured. Arithmetic only.

    Without `plan_for` (scores not yet known) all heads and neurons count alike.
    """
    provisional = plan_for is None
    if plan_for is None:
        heads = [np.ones(layer.heads) for layer in shape.layers]
        plan_for = _plans(shape, heads, [np.ones(layer.neurons) for layer in shape.layers])
    candidates = candidates_for(shape, plan_for, targets, profile, budget, ratios=ratios, threads=threads)
    to_measure = worth_measuring(candidates, limit)
    held_out = HELD_OUT_WINDOWS * HELD_OUT_LENGTH
    # Text is written half as much again as is kept, token by token, which is three times slower than reading.
    tokens = 16384 * 6 + held_out * 6 + held_out * (1 + len(to_measure))
    estimate = _estimate_s(shape, tokens, len(to_measure))
    return Proposal(name, shape, profile, budget, tuple(candidates), tuple(to_measure), estimate, provisional)


def choose(measured: Sequence[tuple[Candidate, Trial]], *, measured_speed: bool) -> tuple[Candidate, Trial] | None:
    """Of candidates that meet the budget, the best quality; on a tie, within what chance explains, the faster.

    Args:
        measured: candidates with their trials.
        measured_speed: the device is this machine, so speed is the measured one.
    """

    def speed(pair: tuple[Candidate, Trial]) -> float:
        if measured_speed and "tg128" in pair[1].speed:
            return float(pair[1].speed["tg128"]["median_ts"])
        return pair[0].cost.decode_tps.value

    sound = [(pair, pair[1].quality) for pair in measured if pair[1].status == "ok" and pair[1].quality]
    if not sound:
        return None
    best = min(sound, key=lambda item: item[1].kl_nats.mean)
    tied = [pair for pair, quality in sound if quality is best[1] or not differs(quality, best[1]).seen]
    return max(tied, key=speed)


class _Workshop:
    """Exports and measures candidates of one run; what it makes on the way is kept until `clean`."""

    def __init__(self, folder: Path, source: Path, reference: Path, threads: int, *, bench: bool) -> None:
        self.folder = folder
        self.source = source
        self.reference = reference
        self.threads = threads
        self.bench = bench

    def export(self, candidate: Candidate) -> Path:
        """The exported file or folder of a candidate, made at first use."""
        from edgeprune.surgery import prune_checkpoint

        out = self.folder / (candidate.name + candidate.target.format.suffix)
        if out.exists():
            return out
        scratch = self.folder / f"plan-{candidate.plan_hash[:16]}"
        checkpoint = self.source
        if not candidate.dense:
            checkpoint = scratch / "checkpoint"
            if not checkpoint.exists():
                for old in self.folder.glob("plan-*"):  # candidates come plan by plan: one at a time on disk
                    shutil.rmtree(old)
                prune_checkpoint(self.source, candidate.plan, checkpoint)
        scratch.mkdir(parents=True, exist_ok=True)
        return candidate.target.format.export(checkpoint, out, candidate.target.quantisation, scratch, self.threads)

    def measure(self, candidate: Candidate, key: str, progress: Progress | None) -> Trial:
        """Export and measure one candidate. A failure is a result, with its reason; wrong input is raised."""
        from edgeprune.runtimes.bench import bench
        from edgeprune.runtimes.records import to_dict

        start = time.monotonic()
        stage = f"measuring {candidate}"

        def tell(message: dict[str, Any]) -> None:
            if progress and "done" in message:
                progress(stage, int(message["done"]), int(message["total"]))

        files: dict[str, dict[str, Any]] = {}
        try:
            if progress:
                progress(stage, 0, HELD_OUT_WINDOWS)
            path = self.export(candidate)
            files = files_of(path)
            quality: Quality = evaluate(
                path,
                self.reference,
                runtime=candidate.target.runtime,
                threads=self.threads,
                timeout_s=_TIMEOUT_S,
                progress=tell,
            )
            speed = {}
            if self.bench:
                result = bench(path, threads=self.threads, runtime=candidate.target.runtime, timeout_s=_TIMEOUT_S)
                if result.status != "ok":
                    raise StageFailed(f"{result.status}: {result.reason}", where=path)
                speed = {record.test: to_dict(record) for record in result.records}
        except StageFailed as error:
            kind, _, rest = error.what.partition(": ")
            status = kind if kind in ("oom", "crash", "timeout") else "failed"
            reason = rest if status != "failed" else str(error)
            if "disk is full" in error.what:
                raise
            return Trial(key, candidate.name, status, reason, None, {}, files, time.monotonic() - start)
        return Trial(key, candidate.name, "ok", None, quality, speed, files, time.monotonic() - start)

    def clean(self) -> None:
        """Remove everything that was made on the way."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _trial_key(candidate: Candidate, model_hash: str, reference: str, threads: int, *, bench: bool) -> str:
    """Hash of all a trial's result depends on."""
    versions = environment()
    depends = [
        SCHEMA_VERSION,
        model_hash,
        candidate.plan_hash,
        candidate.target.quantisation,
        candidate.target.runtime,
        reference,
        threads,
        bench,
        versions["edgeprune"],
        versions["packages"],
        versions["platform"],
    ]
    return hashlib.sha256(json.dumps(depends).encode()).hexdigest()


def _meets_measured(candidate: Candidate, trial: Trial, budget: Budget) -> list[str]:
    """Limits that the measured speed breaks, where the device is this machine."""
    if budget.min_tokens_per_s is None or "tg128" not in trial.speed:
        return []
    speed = trial.speed["tg128"]["median_ts"]
    if speed >= budget.min_tokens_per_s:
        return []
    return [f"needs {budget.min_tokens_per_s:g} tokens/s, measured {speed:.1f}"]


def fit(
    model: str | Path = "demo",
    device: str | DeviceProfile = "host",
    *,
    budget: Budget | None = None,
    out: Path | None = None,
    targets: Sequence[Target | str] | None = None,
    ratios: Sequence[float] = RATIOS,
    calibration: str | None = None,
    held_out: str | None = None,
    threads: int | None = None,
    limit: int = 8,
    max_time_s: float | None = None,
    resume: bool = True,
    seed: int = 0,
    dry_run: bool = False,
    on_proposal: Callable[[Proposal], None] | None = None,
    progress: Progress | None = None,
) -> FitResult | Proposal:
    """Find the version of `model` that loses least and meets the budget on `device`; export, measure and bundle it.

    Args:
        model: a hub id, a folder, a .gguf file, or a demo name.
        device: a profile, its name, the path of a .toml, or "host" for this machine.
        budget: what to meet; default: the profile's own.
        out: folder of the run; default: `runs/MODEL-DEVICE`.
        targets: quantisations to try (each belongs to one runtime); default: all usual ones.
        ratios: shares of all parameters to try removing; dense is always among them.
        calibration: text to score on, a file or hub dataset; None: the model writes its own.
        held_out: text to judge on; None: the model writes its own, other than the calibration's.
        threads: threads of the runtimes here; default: all cores. Predictions use the device's.
        limit: how many candidates to export and measure at most.
        max_time_s: stop measuring further candidates after this many seconds, if one is measured.
        resume: use trials that an earlier run in `out` finished.
        seed: seed of self-generated text.
        dry_run: return the proposal and write nothing.
        on_proposal: called with the proposal before the long part.
        progress: called with (stage, done, total).

    Raises:
        NothingFits: no candidate meets the budget; the message has the nearest miss.
        BadInput, StageFailed: see their messages.
    """
    started = time.monotonic()
    threads = threads or os.cpu_count() or 1
    profile = load_profile(device) if isinstance(device, str) else device
    budget = budget or Budget.of(profile)
    wanted = [target_for(t) if isinstance(t, str) else t for t in targets] if targets else default_targets()
    settings: dict[str, Any] = {"ratios": ratios, "limit": limit}

    # The shape alone decides whether anything can fit, so an impossible budget is told before anything is loaded.
    from edgeprune.models import checkpoint_folder, load, resolve

    say = None if progress is None else lambda text: progress(text, 0, 0)
    source = checkpoint_folder(resolve(str(model), say=say), say=say)
    shape = Checkpoint(source).shape
    proposal = propose(str(model), shape, profile, budget, wanted, **settings)
    if budget.context > shape.max_positions:
        raise BadInput(f"context {budget.context} is more than the model's {shape.max_positions}")
    if not proposal.n_feasible:
        raise _nothing_fits(proposal)
    if on_proposal:
        on_proposal(proposal)
    if dry_run:
        return proposal

    out = out or Path("runs") / f"{Path(str(model)).stem}-{profile.name}"
    if out.exists() and not out.is_dir():
        raise BadInput("exists and is not a folder", where=out, remedy="choose another --out")
    _check_writable(out)

    # Importance: calibration text, one pass, scores; any ratio is then arithmetic.
    from edgeprune.calibration import HELD_OUT_SEED, read_texts, text_set
    from edgeprune.prune import CALIBRATION_LENGTH, CALIBRATION_TEXTS, cached_scores

    loaded = load(source)
    stage = _stages(progress)
    texts = text_set(
        loaded,
        calibration,
        count=CALIBRATION_TEXTS,
        length=CALIBRATION_LENGTH,
        seed=seed,
        progress=stage("writing calibration text"),
    )
    scores = cached_scores(loaded, texts, progress=progress)
    plan_for = _plans(
        shape,
        [h.numpy() for h in scores.heads],
        [n.numpy() for n in scores.neurons],
        method=scores.method,
        model_hash=loaded.hash,
        text_hash=texts.hash,
    )
    proposal = propose(str(model), shape, profile, budget, wanted, plan_for, **settings)
    if not proposal.to_measure:
        raise _nothing_fits(proposal)

    # The reference: the dense model's distributions over held-out text, once.
    if held_out is None:
        judge_on = text_set(
            loaded,
            None,
            count=HELD_OUT_WINDOWS + 2,
            length=HELD_OUT_LENGTH,
            seed=seed + HELD_OUT_SEED,
            progress=stage("writing held-out text"),
        )
        text, text_source = "\n\n".join(judge_on.texts), judge_on.source
    else:
        text, text_source = "\n\n".join(read_texts(Path(held_out).expanduser())), held_out
    model_hash = loaded.hash
    del loaded  # the runtimes run in processes of their own; this one's copy of the weights is done
    reference = make_reference(
        source,
        text,
        cache_dir() / "references",
        model_hash=model_hash,
        length=HELD_OUT_LENGTH,
        count=HELD_OUT_WINDOWS,
        threads=threads,
        timeout_s=_TIMEOUT_S,
        progress=_dict_stage(stage("running the dense model")),
    )

    # Measure: each candidate exported and run in its own runtime, in a process of its own.
    here = profile.name == "host" or device == "host"
    trials_path = out / "trials.jsonl"
    if not resume:
        trials_path.unlink(missing_ok=True)
    finished = read_trials(trials_path)
    workshop = _Workshop(out / "work", source, reference, threads, bench=here)
    measured: list[tuple[Candidate, Trial]] = []
    stopped_early = False
    for candidate in proposal.to_measure:
        key = _trial_key(candidate, model_hash, reference.name, threads, bench=here)
        trial = finished.get(key)
        if trial is None:
            late = max_time_s is not None and time.monotonic() - started > max_time_s
            if late and any(t.status == "ok" for _, t in measured):
                stopped_early = True
                break
            trial = workshop.measure(candidate, key, progress)
            append_trial(trials_path, trial)
        if trial.status == "ok" and here:
            candidate = replace(candidate, reasons=tuple(_meets_measured(candidate, trial, budget)))
        measured.append((candidate, trial))

    # Choose, bundle, report.
    fitting = [(candidate, trial) for candidate, trial in measured if candidate.fits]
    winner = choose(fitting, measured_speed=here)
    if winner is None:
        failures = "; ".join(f"{c}: {t.reason or ', '.join(c.reasons)}" for c, t in measured)
        raise (StageFailed if all(t.status != "ok" for _, t in measured) else NothingFits)(
            f"no candidate could be chosen ({failures})", where=trials_path
        )
    from edgeprune.bundle import write_bundle
    from edgeprune.report import write_report

    chosen, trial = winner
    verdict = _verdict(chosen, trial, profile, budget)
    result = FitResult(proposal, tuple(measured), chosen, trial, verdict, out)
    others = [
        pick
        for runtime in sorted({c.target.runtime for c, _ in fitting} - {chosen.target.runtime})
        if (pick := choose([p for p in fitting if p[0].target.runtime == runtime], measured_speed=here))
    ]
    record = {
        "schema_version": SCHEMA_VERSION,
        "device": profile.model_dump(mode="json"),
        "budget": budget.model_dump(mode="json"),
        "model": {"name": str(model), "sha256": model_hash, "parameters": shape.parameters},
        "calibration": {"source": texts.source, "sha256": texts.hash, "tokens": texts.tokens},
        "held_out": {"source": text_source, "reference": reference.name},
        "candidates": [_candidate_record(c, measured) for c in proposal.candidates],
        "chosen": chosen.name,
        "verdict": verdict,
        "stopped_early": stopped_early,
        "environment": environment(),
        "commands": {"again": _command(str(model), profile, budget, out, calibration, held_out, wanted, seed)},
        "seconds": round(time.monotonic() - started, 1),
    }
    for folder, (candidate, measured_trial) in [
        ("best", winner),
        *((f"best-{o[0].target.runtime}", o) for o in others),
    ]:
        path = workshop.export(candidate)
        if files_of(path) != measured_trial.files:
            raise StageFailed(
                "an exported file is not the one that was measured",
                where=path,
                remedy="run again with --no-resume",
            )
        write_bundle(result, candidate, measured_trial, path, source, out / folder)
    write_json(out / "fit.json", record)
    write_report(result, record)
    workshop.clean()
    return result


def _stages(progress: Progress | None) -> Callable[[str], Callable[[int, int], None] | None]:
    return lambda name: None if progress is None else lambda done, total: progress(name, done, total)


def _dict_stage(report: Callable[[int, int], None] | None) -> Callable[[dict[str, Any]], None] | None:
    return None if report is None else lambda message: report(int(message["done"]), int(message["total"]))


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BadInput(f"cannot write ({error.strerror})", where=out, remedy="choose another --out") from error


def _nothing_fits(proposal: Proposal) -> EdgepruneError:
    miss = nearest_miss(proposal.candidates)
    return NothingFits(
        f"nothing fits {proposal.profile.name}; the nearest is {miss}: {'; '.join(miss.reasons)}",
        remedy="relax the budget, or take a smaller model",
    )


def _verdict(chosen: Candidate, trial: Trial, profile: DeviceProfile, budget: Budget) -> str:
    """One sentence: what was chosen, whether it fits, and on what evidence."""
    assert trial.quality is not None
    speed = f"predicted {chosen.cost.decode_tps} tokens/s"
    if "tg128" in trial.speed:
        speed = f"measured {trial.speed['tg128']['median_ts']:.1f} tokens/s"
    asked = f" (asked {budget.min_tokens_per_s:g})" if budget.min_tokens_per_s else ""
    kl = trial.quality.kl_nats
    return (
        f"fits {profile.name}: {chosen}; {speed}{asked}, predicted {chosen.cost.memory_mib} MiB; "
        f"measured KL to dense {kl.mean:.3f} ({kl.low:.3f}–{kl.high:.3f}) nats a token"
    )


def _candidate_record(candidate: Candidate, measured: Sequence[tuple[Candidate, Trial]]) -> dict[str, Any]:
    record = candidate.to_json()
    for other, trial in measured:
        if other.name == candidate.name:
            record |= {
                "fits": other.fits,
                "reasons": list(other.reasons),
                "status": trial.status,
                "reason": trial.reason,
                "measured": trial.speed,
                "quality": None if trial.quality is None else trial.quality.to_json(),
                "files": trial.files,
            }
    return record


def _command(
    model: str,
    profile: DeviceProfile,
    budget: Budget,
    out: Path,
    calibration: str | None,
    held_out: str | None,
    targets: Sequence[Target],
    seed: int,
) -> str:
    """The command line that makes the same run again."""
    import shlex

    options: list[tuple[str, Any]] = [
        ("--model", model),
        ("--device", profile.name),
        ("--min-tps", budget.min_tokens_per_s),
        ("--max-memory", budget.max_memory_mib),
        ("--max-file", budget.max_file_mib),
        ("--context", budget.context),
        ("--quant", ",".join(target.quantisation for target in targets)),
        ("--calibration", calibration),
        ("--held-out", held_out),
        ("--seed", seed),
        ("--out", out),
    ]
    words = [
        word
        for key, value in options
        if value is not None
        for word in (key, f"{value:g}" if isinstance(value, float) else str(value))
    ]
    return shlex.join(["edgeprune", "fit", *words])
