"""What a run leaves behind: finished trials, a line each, and the record of the whole.

Trials are appended and synchronised one at a time, so a killed run continues where it stood. The record says of every
number whether it is predicted or measured, and where.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import edgeprune
from edgeprune.candidates import RATIOS
from edgeprune.cores import available_cores
from edgeprune.corpus import corpus
from edgeprune.errors import BadInput
from edgeprune.fetch import DEMO_MODELS
from edgeprune.files import sha256
from edgeprune.metrics import mean_interval
from edgeprune.quality import TextQuality, loss_over_dense, quality_from_json

if TYPE_CHECKING:
    from edgeprune.fitting import FitOptions, FitResult
    from edgeprune.vocabulary_plan import VocabularyPlan

SCHEMA_VERSION = 1
TRIALS = "trials.jsonl"
_PACKAGES = ("torch", "transformers", "llama-cpp-python", "onnxruntime", "gguf", "numpy")


@dataclass(frozen=True)
class Trial:
    """One candidate exported and measured, or the reason why that failed.

    Attributes:
        key: hash of all the result depends on.
        candidate: its name.
        status: "ok", or how it ended ("oom", "crash", "timeout", "failed").
        reason: one line on that; None if ok.
        quality: of the exported file in its runtime, compared with the dense model's distributions or, where the file
            has other tokens, with its likelihood of the text; None if it failed.
        speed: llama-bench records measured where `quality` was, by test ("pp512", "tg128"); empty if not measured.
        files: file name -> {"sha256", "bytes"} of what was exported.
        seconds: how long it took.
    """

    key: str
    candidate: str
    status: str
    reason: str | None
    quality: TextQuality | None
    speed: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The trial as a JSON object."""
        return {
            "schema_version": SCHEMA_VERSION,
            "key": self.key,
            "candidate": self.candidate,
            "status": self.status,
            "reason": self.reason,
            "quality": None if self.quality is None else self.quality.to_json(),
            "speed": self.speed,
            "files": self.files,
            "seconds": round(self.seconds, 1),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Trial:
        """Read what `to_json` wrote; raises `KeyError`, `TypeError` or `BadInput` for anything else."""
        if value.pop("schema_version") != SCHEMA_VERSION:
            raise BadInput("a trial of another version")
        quality = value["quality"]
        if quality is not None:
            value["quality"] = quality_from_json(quality)
        return cls(**value)


def read_trials(path: Path, *, others: bool = False) -> dict[str, Trial]:
    """The finished trials of a run by key, the last of each; lines torn off, of killed runs, are left out.

    Args:
        others: whether lines of other versions may be there, as in a cache; they are left out, too.

    Raises:
        BadInput: a line is no trial.
    """
    if not path.exists():
        return {}
    trials: dict[str, Trial] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")  # JSON may hold other ends of lines
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue  # what it was of is measured again
        if others and isinstance(value, dict) and value.get("schema_version") != SCHEMA_VERSION:
            continue
        try:
            trial = Trial.from_json(value)
            trials[trial.key] = trial
        except (ValueError, KeyError, TypeError, AttributeError, BadInput) as error:
            raise BadInput(
                f"line {number} is not a trial ({error})", where=path, remedy="delete the file, or use --no-resume"
            ) from error
    return trials


def append_trial(path: Path, trial: Trial) -> None:
    """Append one trial and wait until it is on disk. A torn line before it is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        torn = False
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        file.write((b"\n" if torn else b"") + json.dumps(trial.to_json(), ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def files_of(path: Path) -> dict[str, dict[str, Any]]:
    """Name -> SHA-256 and size of the file, or of every file in the folder, `path`."""
    paths: Iterable[Path] = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    base = path.parent if path.is_file() else path
    return {
        p.relative_to(base).as_posix(): {"sha256": sha256(p), "bytes": p.stat().st_size}  # for records
        for p in paths
    }


def environment() -> dict[str, Any]:
    """Versions and machine a result was obtained with."""
    versions: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "edgeprune": edgeprune.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
    }


def fit_record(
    result: FitResult,
    *,
    model_hash: str,
    calibration: dict[str, Any],
    plan: VocabularyPlan | None,
    options: FitOptions,
    device: str,
    samples: Sequence[dict[str, str]],
    seconds: float,
) -> dict[str, Any]:
    """The record of a whole run, `fit.json`: everything that was considered, measured and chosen, and on what."""
    proposal, judged_on = result.proposal, result.judged_on
    trials = {c.key: (c, trial) for c, trial in result.trials}
    candidates = []
    for proposed in proposal.candidates:
        candidate, trial = trials.get(proposed.key, (proposed, None))
        entry = candidate.to_json()
        if trial is not None:
            entry |= {
                key: value for key, value in trial.to_json().items() if key not in ("schema_version", "candidate")
            }
            if trial.quality is not None:
                over = mean_interval(loss_over_dense(trial.quality, judged_on.nll))
                entry["loss_over_dense_nats"] = asdict(over)
        candidates.append(entry)
    return {
        "schema_version": SCHEMA_VERSION,
        "device": proposal.profile.model_dump(mode="json"),
        "budget": proposal.budget.model_dump(mode="json"),
        "model": {
            "name": proposal.model,
            "path": _local(proposal.model),
            "sha256": model_hash,
            "parameters": proposal.shape.parameters,
        },
        "calibration": calibration,
        "held_out": {
            "source": judged_on.source,
            "scripts": dict(judged_on.scripts),
            "reference": judged_on.reference,
            "dense_perplexity": judged_on.dense_perplexity,
        },
        "corpus": _corpus_record(result, options, plan),
        "candidates": candidates,
        "chosen": result.chosen.name,
        "chosen_plan": result.chosen.plan_hash,  # names have rounded shares
        "verdict": result.verdict,
        "samples": list(samples),
        "stopped_early": len(result.trials) < len(proposal.to_measure) + proposal.plans_to_make,
        "environment": environment(),
        "commands": {"again": _command(result, options, device)},
        "seconds": round(seconds, 1),
    }


def _local(model: str) -> str | None:
    """Where a model lies that is a file or folder here, whatever folder a later command is called in; else None."""
    path = Path(model).expanduser()
    return str(path.resolve()) if model not in DEMO_MODELS and path.exists() else None


def _corpus_record(result: FitResult, options: FitOptions, plan: VocabularyPlan | None) -> dict[str, Any] | None:
    """The text on which tokens were, or would have been, counted, and what came of it; None without one."""
    if not options.corpus:
        return None
    found = corpus(options.corpus_paths)
    return {
        "files": list(found.names),
        "bytes": found.n_bytes,
        "sha256": found.hash,
        "options": [asdict(option) for option in result.proposal.vocabulary],
        "tokens_before": result.proposal.shape.vocab,
        "tokens_left": result.chosen.shape.vocab,
        "counted_on": None if plan is None else plan.counted_on(),
    }


def _command(result: FitResult, options: FitOptions, device: str) -> str:
    """The command line that makes the same run again; `device` as it was named."""
    budget = result.proposal.budget
    values: dict[str, Any] = {
        "--model": result.proposal.model,
        "--device": device,
        "--min-tps": budget.min_tokens_per_s,
        "--max-memory": budget.max_memory_mib,
        "--max-file": budget.max_file_mib,
        "--context": budget.context,
        "--quant": ",".join(target.quantisation for target in options.targets),
        "--calibration": options.calibration,
        "--held-out": options.held_out,
        "--distill": options.distill,
        "--ratios": ",".join(f"{r:g}" for r in options.ratios) if options.ratios != RATIOS else None,
        "--max-candidates": options.limit,
        "--method": options.method,
        "--threads": options.threads if options.threads != available_cores() else None,
        "--board": options.board,
        "--recover": f"{options.recovery_s:g}s" if options.recovery_s else None,
        "--max-time": f"{options.max_time_s:g}s" if options.max_time_s else None,
        "--seed": options.seed,
        "--out": result.out,
    }
    words = [
        word
        for key, value in values.items()
        if value is not None
        for word in (key, f"{value:g}" if isinstance(value, float) else str(value))
    ]
    words += [word for path in options.corpus for word in ("--corpus", str(path))]
    switches = {"--uniform": options.uniform, "--no-gate": options.gate_s is None, "--no-tune": not options.tune}
    return shlex.join(["edgeprune", "fit", *words, *(switch for switch, given in switches.items() if given)])
