"""Exports candidates and measures them, each file in its own runtime and in a process of its own."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from edgeprune.boards import Place
from edgeprune.calibration import TextSet
from edgeprune.candidates import Candidate
from edgeprune.cross_quality import evaluate_across
from edgeprune.errors import StageFailed
from edgeprune.files import atomic_folder
from edgeprune.heldout import stretches
from edgeprune.imatrix import provide_imatrix
from edgeprune.models import companions_hash, copy_companions
from edgeprune.plan import PrunePlan, WidthPlan
from edgeprune.quality import TextQuality, evaluate
from edgeprune.record import SCHEMA_VERSION, Trial, environment, files_of
from edgeprune.reference import load_reference, machine
from edgeprune.runtimes.bench import GATE_S, bench
from edgeprune.runtimes.isolate import run_isolated
from edgeprune.runtimes.pytorch import load_tokenizer
from edgeprune.runtimes.records import to_dict
from edgeprune.runtimes.settings import Values
from edgeprune.runtimes.ssh import LinkBroken
from edgeprune.shape import ModelShape
from edgeprune.surgery import PLAN_FILE
from edgeprune.targets import IMATRIX
from edgeprune.vocabulary_plan import PLAN_FILE as VOCABULARY_PLAN
from edgeprune.vocabulary_plan import VocabularyPlan

TIMEOUT_S = 1800.0
BENCH_CONTEXT = 513  # what pp512 and the token after it need
DENSE = "plan-dense"  # begins the name of the folder for what exporting the dense model needs on the way

Progress = Callable[[str, int, int], None]
# Writes the checkpoint of a pruned candidate to a folder.
Make = Callable[[Candidate, Path, Progress | None], None]


class Workshop:
    """Exports and measures candidates of one run; what it makes on the way is kept until `clean`."""

    def __init__(
        self,
        folder: Path,
        source: Path,
        reference: Path,
        threads: int,
        *,
        bench: bool,
        device: str = "",
        gate_s: float | None = GATE_S,
        place: Place | None = None,
        context: int,
        recovery: str = "",
        make: Make,
        texts: TextSet,
        checkpoints: Path | None = None,
    ) -> None:
        self.make = make
        self.texts = texts
        self.folder = folder
        self.checkpoints = checkpoints or folder / "checkpoints"  # of pruned candidates
        self.source = source
        self.reference = reference
        self.threads = threads
        self.bench = bench  # the device is at hand
        self.device = device  # its profile's name: a board in another power mode has another
        self.gate_s = gate_s
        self.place = place or Place(run_isolated, threads)
        self.context = context
        self.recovery = recovery  # tells what recovery trains on, and with which seed

    def export(self, candidate: Candidate, progress: Progress | None = None) -> Path:
        """The exported file or folder of a candidate, made at first use."""
        out = self.folder / (self._stem(candidate) + candidate.target.format.suffix)
        if out.exists():
            return out
        scratch = self._scratch(candidate)
        checkpoint = self.checkpoint(candidate, progress)
        scratch.mkdir(parents=True, exist_ok=True)
        if not candidate.dense:
            shutil.copyfile(checkpoint / PLAN_FILE, self._plan_file(candidate))
            if candidate.vocabulary:
                with atomic_folder(self._beside(candidate)) as kept:
                    copy_companions(checkpoint, kept)
        if candidate.target.needs_imatrix:
            provide_imatrix(checkpoint, scratch / IMATRIX, texts=self.texts)
        target = candidate.target
        return target.format.export(
            checkpoint, out, target.quantisation, scratch, threads=self.threads, context=self.positions(candidate)
        )

    def positions(self, candidate: Candidate) -> int | None:
        """How many its file is made for, where its format is made for a number of them."""
        wanted = candidate.target.format.positions
        return None if wanted is None else min(wanted(self.context), candidate.shape.max_positions)

    def checkpoint(self, candidate: Candidate, progress: Progress | None = None, *, alone: bool = True) -> Path:
        """The checkpoint that a candidate is exported from, made at first use.

        Args:
            alone: what was made of earlier candidates by scores goes: there are many, and one is cut in seconds.
        """
        if candidate.dense:
            return self.source
        folder = self.checkpoints / self.identity(candidate)
        if not folder.exists():
            # Candidates come plan by plan: what one needed on the way goes when the next begins.
            for old in self.folder.glob("plan-*"):
                if old != self._scratch(candidate) and not old.name.startswith(DENSE):
                    shutil.rmtree(old)
            if alone and isinstance(candidate.plan, PrunePlan):
                for old in self.checkpoints.glob("*"):
                    if old.name != f"{folder.name}.partial":  # a training run that was interrupted goes on
                        shutil.rmtree(old)
            self.make(candidate, folder, progress)
        return folder

    def identity(self, candidate: Candidate) -> str:
        """Names the weights of a candidate, of this model by these texts, whatever they are exported to."""
        depends = [candidate.plan_hash, self.reference.name, self.texts.hash, self.companions_hash]
        if candidate.recovery_s:
            depends += [str(candidate.recovery_s), self.recovery]
        return hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:16]

    def plan(self, candidate: Candidate, shape: ModelShape) -> PrunePlan:
        """What an exported candidate keeps; `shape` is the dense model's."""
        if isinstance(candidate.plan, PrunePlan):
            return candidate.plan
        return PrunePlan.load(self._plan_file(candidate), shape)

    def companions(self, candidate: Candidate) -> Path:
        """The folder with the tokenizer of an exported candidate, and what else belongs beside its weights."""
        return self._beside(candidate) if candidate.vocabulary else self.source

    def vocabulary_plan(self, candidate: Candidate) -> VocabularyPlan | None:
        """Which tokens an exported candidate keeps; None where it keeps the dense model's."""
        return VocabularyPlan.load(self._beside(candidate) / VOCABULARY_PLAN) if candidate.vocabulary else None

    def _plan_file(self, candidate: Candidate) -> Path:
        return self.folder / f"{self._stem(candidate)}.plan.json"

    def _beside(self, candidate: Candidate) -> Path:
        return self.folder / f"{self._stem(candidate)}.companions"

    def _stem(self, candidate: Candidate) -> str:
        """Begins the name of all that is made of a candidate; another plan of the same name is another file."""
        positions = self.positions(candidate)
        made_for = "" if positions is None else f"-{positions}"
        return f"{candidate.name}-{self.identity(candidate)[:8]}{made_for}"

    @cached_property
    def companions_hash(self) -> str:
        """SHA-256 over the dense model's tokenizer, chat template and what else lies beside its weights."""
        return companions_hash(self.source)

    @cached_property
    def _texts_of_windows(self) -> list[str]:
        """The text of each of the reference's windows."""
        reference, tokenizer = load_reference(self.reference), load_tokenizer(self.source)

        def decode(ids: Sequence[int]) -> str:
            return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

        return stretches(decode, reference.windows, reference.text)

    def _quality(self, candidate: Candidate, path: Path, progress: Callable[[dict[str, Any]], None]) -> TextQuality:
        """How good an exported candidate is, on the reference's windows."""
        runtime = candidate.target.runtime
        if not candidate.vocabulary:
            return evaluate(
                path,
                self.reference,
                runtime=runtime,
                threads=self.place.threads,
                timeout_s=TIMEOUT_S,
                progress=progress,
                settings=self.settings(candidate),
                execute=self.place.execute,
            )
        # With fewer tokens the same text is more of them: room for twice as many as the dense model reads at once.
        length = len(load_reference(self.reference).windows[0])
        return evaluate_across(
            path,
            self.reference,
            self._texts_of_windows,
            n_ctx=min(2 * length, candidate.shape.max_positions),
            runtime=runtime,
            threads=self.place.threads,
            timeout_s=TIMEOUT_S,
            progress=progress,
            settings=self.settings(candidate),
            execute=self.place.execute,
        )

    def settings(self, candidate: Candidate) -> Values:
        """What its runtime is told: that of the device, where it is the device."""
        return candidate.settings if self.bench else {}

    def _scratch(self, candidate: Candidate) -> Path:
        """What exporting needs on the way: the unquantised file, the importance matrix."""
        return self.folder / f"{DENSE if candidate.dense else 'plan'}-{self.identity(candidate)}"

    def measure(self, candidate: Candidate, key: str, progress: Progress | None) -> Trial:
        """Export and measure one candidate. A failure is a result, with its reason; wrong input is raised."""
        start = time.monotonic()
        stage = f"measuring {candidate}"

        def tell(message: dict[str, Any]) -> None:
            if progress and "done" in message:
                progress(stage, int(message["done"]), int(message["total"]))

        files: dict[str, dict[str, Any]] = {}
        try:
            if progress:
                progress(stage, 0, 0)
            path = self.export(candidate, progress)
            files = files_of(path)
            quality = self._quality(candidate, path, tell)
            speed = {}
            if self.bench:
                result = bench(
                    path,
                    threads=self.place.threads,
                    execute=self.place.execute,
                    runtime=candidate.target.runtime,
                    n_ctx=max(self.context, BENCH_CONTEXT),
                    gate_s=self.gate_s,
                    settings=self.settings(candidate),
                    timeout_s=TIMEOUT_S,
                )
                if result.status != "ok":
                    raise StageFailed(f"{result.status}: {result.reason}", where=path)
                speed = {record.test: to_dict(record) for record in result.records}
        except LinkBroken:  # nor does a board that is out of reach
            raise
        except StageFailed as error:
            kind, _, rest = error.what.partition(": ")
            if kind == "noisy":  # says nothing of the candidate: the run ends here, and goes on here when it is quiet
                raise
            status = kind if kind in ("oom", "crash", "timeout") else "failed"
            reason = rest if status != "failed" else str(error)
            return Trial(key, candidate.name, status, reason, None, {}, files, time.monotonic() - start)
        return Trial(key, candidate.name, "ok", None, quality, speed, files, time.monotonic() - start)

    def clean(self) -> None:
        """Remove everything that was made on the way."""
        shutil.rmtree(self.folder, ignore_errors=True)


def trial_key(candidate: Candidate, model_hash: str, workshop: Workshop) -> str:
    """Hash of all that a trial's result depends on."""
    here = environment()
    depends = [
        SCHEMA_VERSION,
        model_hash,
        candidate.plan_hash,
        candidate.plan.method,
        workshop.identity(candidate) if candidate.recovery_s else "",
        candidate.target.quantisation,
        candidate.target.runtime,
        workshop.reference.name,
        workshop.place.threads,
        workshop.place.identity,
        workshop.bench and (workshop.context, workshop.gate_s is not None, candidate.settings, workshop.device),
        workshop.positions(candidate),
        workshop.companions_hash,
        workshop.source.resolve().name,  # the files hold it
        machine(),
        here["edgeprune"],
        here["packages"],
        here["platform"],
    ]
    # Which heads, neurons and weights widths become is found on the text, and which columns count when rounding.
    if isinstance(candidate.plan, WidthPlan) or candidate.target.needs_imatrix:
        depends.append(workshop.texts.hash)
    return hashlib.sha256(json.dumps(depends).encode()).hexdigest()
