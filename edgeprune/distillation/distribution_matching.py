"""`distribution-matching`: texts, and weights, whose hidden states are distributed as the pool's are.

Two distributions are one where their means in a kernel's feature space are (maximum mean discrepancy, Gretton et al.
2012). The Gaussian kernel's features are √(2/k) · cos(Wx + b) with random W (Rahimi & Recht 2007); its width is the
median distance of two texts.
"""

from __future__ import annotations

import numpy as np

from edgeprune.distillation.base import Choice, Floats, Task
from edgeprune.distillation.matching import match_tokens

RIDGE = 0.01  # a text's features are mostly common to all texts: more damping would drown what tells them apart
_FEATURES = 1024
_PAIRS = 2000  # of texts, for the median


def kernel_features(points: Floats, rng: np.random.Generator, count: int = _FEATURES) -> Floats:
    """Random Fourier features of a Gaussian kernel of median width, (n, count), of points (n, d)."""
    pairs = rng.integers(len(points), size=(2, _PAIRS))
    distances = np.sqrt(np.square(points[pairs[0]] - points[pairs[1]]).sum(axis=1))
    width = float(np.median(distances[distances > 0])) if (distances > 0).any() else 1.0
    directions = rng.standard_normal((points.shape[1], count)) / width
    phases = rng.uniform(0, 2 * np.pi, count)
    return np.asarray(np.sqrt(2 / count) * np.cos(points @ directions + phases))


def select(task: Task) -> Choice:
    """Match the kernel mean of the pool's mean hidden states: of its tokens where tokens are counted, else of texts."""
    features = kernel_features(task.of_candidates(task.readings.means), task.rng)
    return match_tokens(features, task, RIDGE)
