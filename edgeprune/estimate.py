"""About how long `fit` takes on this machine: tokens read and written, by the rate of its matrix products."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgeprune.damage import MEASURED_SHARES
from edgeprune.fit_texts import HELD_OUT_LENGTH, HELD_OUT_WINDOWS
from edgeprune.plan import head_options
from edgeprune.precision import fast_dtype
from edgeprune.proposal import Proposal
from edgeprune.pruning import CALIBRATION_LENGTH, CALIBRATION_TEXTS, JUDGED_TEXTS, JUDGED_WINDOWS, WINDOW
from edgeprune.shape import ModelShape
from edgeprune.vocabulary_damage import SHARES

if TYPE_CHECKING:
    from edgeprune.fitting import FitOptions


def estimate(proposal: Proposal, options: FitOptions) -> float:
    """Rough seconds that `fit` takes here with nothing cached."""
    calibration, held_out = CALIBRATION_TEXTS * CALIBRATION_LENGTH, HELD_OUT_WINDOWS * HELD_OUT_LENGTH
    written = (calibration if options.calibration is None else 0) + (held_out if options.held_out is None else 0)
    made = proposal.plans_to_make
    read = calibration + held_out * (1 + len(proposal.to_measure) + made) + written
    if made:
        # The damage table: each option of each half is run from its layer to the end, half of the layers on average.
        shape = proposal.shape
        n_options = len(shape.layers) * (len(MEASURED_SHARES) + len(list(head_options(shape.layers[0]))))
        # The table's second moments and each plan's take another pass, a plan's two streams of hidden states.
        read += n_options * JUDGED_WINDOWS * WINDOW // 2 + (1 + 2 * made) * calibration
        if options.corpus:
            embedding = shape.embedding_parameters / shape.parameters
            read += (sum(share < embedding for share in SHARES) + 1) * JUDGED_TEXTS * WINDOW
    return options.recovery_s + estimated_seconds(
        proposal.shape,
        written=written * 3 // 2,
        read=read,
        exports=len(proposal.to_measure) + made,
        quick=fast_dtype() is torch.bfloat16,
    )


def estimated_seconds(shape: ModelShape, *, written: int, read: int, exports: int, quick: bool) -> float:
    """Rough seconds that a run takes on this machine, from the rate of its matrix products.

    Args:
        shape: the dense model.
        written: tokens of text the model writes, one after the other in each text.
        read: tokens it reads at once (scores, reference, quality).
        exports: candidates to export.
        quick: whether products are in bfloat16, in hardware.
    """
    size = 768
    a = np.ones((size, size), dtype=np.float32)
    times = []
    for _ in range(12):  # the first starts the threads, and any may be disturbed: the quickest tells
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    rate = 2 * size**3 / min(times)  # floating-point operations a second
    # Seen on two machines: a model reads at about half of the large product's rate and writes texts side by side at a
    # fifth of it, or at 5/6 and a third in bfloat16; an export moves the weights about six times, at some 0.5 GB/s.
    reading, writing = (1.2, 3.3) if quick else (2.0, 5.0)
    per_token = 2 * shape.parameters / rate
    return per_token * (reading * read + writing * written) + exports * 6 * 4 * shape.parameters / 0.5e9
