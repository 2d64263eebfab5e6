"""Exports candidates and measures them, each file in its own runtime and in a process of its own."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgeprune.calibration import TextSet
from edgeprune.candidates import Candidate
from edgeprune.errors import StageFailed
from edgeprune.imatrix import provide_imatrix
from edgeprune.plan import PrunePlan
from edgeprune.quality import evaluate
from edgeprune.record import SCHEMA_VERSION, Trial, environment, files_of
from edgeprune.runtimes.bench import bench
from edgeprune.runtimes.records import to_dict
from edgeprune.shape import ModelShape
from edgeprune.surgery import PLAN_FILE
from edgeprune.targets import IMATRIX

TIMEOUT_S = 1800.0
BENCH_CONTEXT = 513  # what pp512 and the token after it need

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
        context: int,
        make: Make,
        texts: TextSet,
    ) -> None:
        self.make = make
        self.texts = texts
        self.folder = folder
        self.source = source
        self.reference = reference
        self.threads = threads
        self.bench = bench
        self.context = context

    def export(self, candidate: Candidate, progress: Progress | None = None) -> Path:
        """The exported file or folder of a candidate, made at first use."""
        out = self.folder / (candidate.name + candidate.target.format.suffix)
        if out.exists():
            return out
        scratch = self._scratch(candidate)
        checkpoint = self.source
        if not candidate.dense:
            checkpoint = scratch / "checkpoint"
            if not checkpoint.exists():
                # Candidates come plan by plan: one is on disk at a time, and the source's, which many share.
                for old in self.folder.glob("plan-*"):
                    if old not in (scratch, self.folder / "plan-dense"):
                        shutil.rmtree(old)
                self.make(candidate, checkpoint, progress)
            shutil.copyfile(checkpoint / PLAN_FILE, self._plan_file(candidate))
        scratch.mkdir(parents=True, exist_ok=True)
        if candidate.target.needs_imatrix:
            provide_imatrix(checkpoint, scratch / IMATRIX, texts=self.texts)
        return candidate.target.format.export(checkpoint, out, candidate.target.quantisation, scratch, self.threads)

    def plan(self, candidate: Candidate, shape: ModelShape) -> PrunePlan:
        """What an exported candidate keeps; `shape` is the dense model's."""
        if isinstance(candidate.plan, PrunePlan):
            return candidate.plan
        return PrunePlan.load(self._plan_file(candidate), shape)

    def _plan_file(self, candidate: Candidate) -> Path:
        return self.folder / f"{candidate.name}.plan.json"

    def _scratch(self, candidate: Candidate) -> Path:
        """What a candidate's plan is made in: the checkpoint and the unquantised file."""
        if candidate.dense:
            return self.folder / "plan-dense"
        recovered = f"-{candidate.recovery_s:g}" if candidate.recovery_s else ""
        return self.folder / f"plan-{candidate.plan_hash[:16]}{recovered}"

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
            quality = evaluate(
                path,
                self.reference,
                runtime=candidate.target.runtime,
                threads=self.threads,
                timeout_s=TIMEOUT_S,
                progress=tell,
            )
            speed = {}
            if self.bench:
                result = bench(
                    path,
                    threads=self.threads,
                    runtime=candidate.target.runtime,
                    n_ctx=max(self.context, BENCH_CONTEXT),
                    timeout_s=TIMEOUT_S,
                )
                if result.status != "ok":
                    raise StageFailed(f"{result.status}: {result.reason}", where=path)
                speed = {record.test: to_dict(record) for record in result.records}
        except StageFailed as error:
            kind, _, rest = error.what.partition(": ")
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
        candidate.recovery_s,
        candidate.target.quantisation,
        candidate.target.runtime,
        workshop.reference.name,
        workshop.threads,
        workshop.bench and workshop.context,
        here["edgeprune"],
        here["packages"],
        here["platform"],
    ]
    return hashlib.sha256(json.dumps(depends).encode()).hexdigest()
