"""Makes the checkpoint of a pruned candidate: by its plan, with compensation and recovery where it says so."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgeprune.calibration import TextSet, weights_of
from edgeprune.candidates import Candidate
from edgeprune.checkpoint import Checkpoint
from edgeprune.compensated import Origin
from edgeprune.plan import PrunePlan
from edgeprune.pruning import write_pruned
from edgeprune.surgery import prune_checkpoint

Progress = Callable[[str, int, int], None]
# From the pruned folder to texts with what each counts for; None: the dense model writes them.
RecoveryText = Callable[[Path, Progress | None], list[tuple[str, float]] | None]


@dataclass(frozen=True)
class Maker:
    """Writes pruned checkpoints of one dense model.

    Attributes:
        source: the dense checkpoint.
        model_hash: its identity.
        texts: calibration text.
        seed: of recovery.
        recovery_text: gives what recovery trains on.
        corpus: text on which tokens are counted where some go.
    """

    source: Path
    model_hash: str
    texts: TextSet
    seed: int = 0
    recovery_text: RecoveryText = lambda _pruned, _progress: None
    corpus: tuple[Path, ...] = ()

    def __call__(self, candidate: Candidate, out: Path, progress: Progress | None) -> None:
        """Write the checkpoint of `candidate` to `out`.

        Raises:
            BadInput: a full disk.
            StageFailed: a solution or a training run that fails.
        """
        if not candidate.recovery_s:
            self._prune(candidate, out, progress)
            return
        from edgeprune.recovery import recover

        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pruned.", dir=out.parent) as scratch:
            pruned = Path(scratch) / "pruned"
            self._prune(candidate, pruned, progress)
            given = self.recovery_text(pruned, progress)
            recover(
                pruned,
                self.source,
                out,
                seconds=candidate.recovery_s,
                text=None if given is None else [text for text, _ in given],
                weights=weights_of(given),
                seed=self.seed,
                progress=progress,
            )

    def _prune(self, candidate: Candidate, out: Path, progress: Progress | None) -> None:
        plan = candidate.plan
        if isinstance(plan, PrunePlan):
            prune_checkpoint(self.source, plan, out)
            return
        parameters = Checkpoint(self.source).shape.parameters
        write_pruned(
            self.source,
            self.texts,
            plan.layers,
            plan.vocabulary,
            self.corpus,
            out,
            origin=Origin(plan.method, plan.asked_ratio, self.model_hash, self.texts.hash, parameters),
            stage=f"compensating {candidate}",
            progress=progress,
        )
