"""The passes of a training step: forward and backward of a few windows each, on a processor side by side.

A small model's matrices are too small to be shared out among cores: oneDNN multiplies (1024, 1536) by (1536, 576) in
bfloat16 no faster on two cores than on one, and every pass over hidden states ends with cores that wait for each other.
Windows know nothing of each other, so cores that have a window each need not wait before the step's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.dropout import drawing_from, shared_draws
from edgeprune.packing import Windows
from edgeprune.teacher import TeacherCache
from edgeprune.training import Learner, MasterAdamW


class Passes:
    """What a step does before the optimizer's part.

    Args:
        learner: what is trained.
        parameters: those of its parameters that are.
        windows: of the text.
        records: the teacher's, of the same windows; None without a teacher.
        most: windows of all passes at once.
        wrapped: the learner as a launcher shares it out among processes; None: this is the only one.
    """

    def __init__(
        self,
        learner: Learner,
        parameters: Sequence[nn.Parameter],
        windows: Windows,
        records: TeacherCache | None,
        most: int,
        wrapped: Any = None,
    ) -> None:
        self._learner, self._wrapped = learner, wrapped
        self._parameters, self._windows, self._records = parameters, windows, records
        self._device = learner.device
        self._cores = torch.get_num_threads()
        # Threads draw from one generator in whatever order they come, and a run must be repeatable.
        alone = wrapped is not None or self._device.type != "cpu" or shared_draws(learner.model)
        self.workers = 1 if alone else max(1, min(self._cores, most))
        self.windows = max(1, most // self.workers)  # of one pass
        self._pool = None
        if self.workers > 1:
            each = self._cores // self.workers
            self._pool = ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(each,))

    def __call__(self, indices: Tensor, optimizer: MasterAdamW) -> Tensor:
        """Give the optimizer the mean gradient over the windows `indices`; loss, KL and cross-entropy: (3,).

        Raises:
            BadInput: as `TeacherCache.get`.
        """
        figures = torch.zeros(3)
        parts = torch.split(indices, self.windows)
        seeds = torch.randint(1 << 62, (len(parts),)).tolist()
        for start in range(0, len(parts), self.workers):
            some = slice(start, start + self.workers)
            for part, (gradients, found) in zip(parts[some], self._all(parts[some], seeds[some]), strict=True):
                share = len(part) / len(indices)
                optimizer.collect(gradients, share)
                figures += share * found
        return figures

    def _all(self, parts: Sequence[Tensor], seeds: Sequence[int]) -> list[tuple[Sequence[Tensor | None], Tensor]]:
        if self._pool is None:
            return [self._one(part, seed) for part, seed in zip(parts, seeds, strict=True)]
        return list(self._pool.map(self._one, parts, seeds))

    def _one(self, part: Tensor, seed: int) -> tuple[Sequence[Tensor | None], Tensor]:
        teacher: tuple[Tensor, ...] = ()
        if self._records is not None:
            found = self._records.get(part).to(self._device)
            teacher = (found.ids, found.probs, found.rest)
        weights = None if self._windows.weights is None else self._windows.weights[part].to(self._device)
        windows = self._windows.ids[part].to(self._device)
        if self._wrapped is None:
            with drawing_from(seed):
                loss, kl, ce = self._learner(windows, *teacher, weights=weights)
            gradients: Sequence[Tensor | None] = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        else:  # processes agree on gradients while they are put into the parameters
            loss, kl, ce = self._wrapped(windows, *teacher, weights=weights)
            loss.backward()
            gradients = [parameter.grad for parameter in self._parameters]
            for parameter in self._parameters:
                parameter.grad = None
        return gradients, torch.stack([loss.detach(), kl, ce]).cpu()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()
            torch.set_num_threads(self._cores)  # theirs had become the default of threads to come
