"""Readings of labelled texts: gradients of a linear classifier on top of the model, at several points of its training.

A set of a few texts a class trains a classifier; its gradient at a linear layer on the text's representation h is
(softmax - one-hot) ⊗ h, at whatever weights the layer has by then. Matched at one point alone, a set would suit the
first step only; the points here are the untrained layer, where all classes are as likely, and later ones on the pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from edgeprune.distillation.base import Floats, Indices, Readings

# Steps of the classifier's training after which gradients are taken. Accuracy of a linear learner on MiniLM's states,
# 5/10/20 texts a class, judged on training data that no set has: with the first alone SST-2 65.7/69.0/70.9 and TREC
# 49.0/55.2/62.2, with three 70.3/73.2/74.6 and 54.3/60.2/64.7, with all four 71.8/74.8/75.9 and 57.8/62.3/66.7.
_POINTS = (0, 10, 100, 300)
_RATE = 0.1
_SIZE = 256  # values that the representation is projected to; with C classes a gradient has C times as many a point

Linear = tuple[torch.Tensor, torch.Tensor]  # weight, (C, d), and bias, (C,)


class LabelledReadings:
    """Readings whose gradients and errors are of a classifier instead of the language model.

    Args:
        readings: of the pool's pieces; their means are the representation.
        labels: of each piece, (n,).
        seed: of the projection.
    """

    def __init__(self, readings: Readings, labels: Indices, seed: int = 0) -> None:
        self._readings, self._labels, self._seed = readings, labels, seed
        self._layers: list[Linear] = []
        self._scales: list[float] = []

    @cached_property
    def means(self) -> Floats:
        """The representation, (n, hidden), each value with mean 0 and variance 1 over the pool."""
        return self._standard(self._readings.means)

    @property
    def divergences(self) -> Floats:
        """As the language models say."""
        return self._readings.divergences

    @cached_property
    def gradients(self) -> Floats:
        """Gradients at each point, of the same mean square each, side by side: (n, points · classes · k)."""
        return self.gradients_of(self._readings.means, self._labels)

    @cached_property
    def errors(self) -> Floats:
        """‖softmax - one-hot‖ of the classifier, mean over the points after the first, (n,)."""
        self._fit()
        points = torch.from_numpy(self.means)
        wrong = [_error(layer, points, self._labels) for layer in self._layers[1:]]
        return np.asarray(np.mean([np.linalg.norm(each, axis=1) for each in wrong], axis=0))

    def gradients_of(self, means: Floats, labels: Indices) -> Floats:
        """Gradients of other texts at the same points, of their raw means, (m, hidden), and labels, (m,)."""
        self._fit()
        points = torch.from_numpy(self._standard(means))
        found: Floats | None = None
        for i, (part, scale) in enumerate(zip(self._raw(points, labels), self._scales, strict=True)):
            width = part.shape[1]
            if found is None:
                found = np.empty((len(part), width * len(self._scales)), np.float32)
            np.divide(part, scale, out=found[:, i * width : (i + 1) * width])
        assert found is not None
        return found

    def agrees(self, means: Floats, labels: Indices) -> NDArray[np.bool_]:
        """Whether the classifier, trained on the pool, gives other texts these labels, (m,)."""
        self._fit()
        weight, bias = self._layers[-1]
        said = torch.from_numpy(self._standard(means)) @ weight.T + bias
        return np.asarray(said.argmax(-1).numpy() == labels)

    def _standard(self, means: Floats) -> Floats:
        pool = np.asarray(self._readings.means, dtype=np.float32)
        return np.asarray((means - pool.mean(axis=0)) / (pool.std(axis=0) + 1e-6), dtype=np.float32)

    def _fit(self) -> None:
        if not self._layers:
            points = torch.from_numpy(self.means)
            self._layers = classifiers(points, torch.from_numpy(self._labels))
            squares = [float(np.square(part).sum(axis=1).mean()) for part in self._raw(points, self._labels)]
            self._scales = [max(square**0.5, 1e-30) for square in squares]

    def _raw(self, points: torch.Tensor, labels: Indices) -> Iterator[Floats]:
        generator = torch.Generator().manual_seed(self._seed)
        projection = torch.randn(points.shape[1], _SIZE, generator=generator) * _SIZE**-0.5
        small = (points @ projection).numpy()
        for layer in self._layers:
            yield (_error(layer, points, labels)[:, :, None] * small[:, None]).reshape(len(small), -1)


def _error(layer: Linear, points: torch.Tensor, labels: Indices) -> Floats:
    """softmax - one-hot, (n, C)."""
    weight, bias = layer
    own = torch.nn.functional.one_hot(torch.from_numpy(labels), len(bias))
    return ((points @ weight.T + bias).softmax(-1) - own).numpy()


def classifiers(points: torch.Tensor, labels: torch.Tensor) -> list[Linear]:
    """A linear classifier of `points`, (n, d), after `_POINTS` steps on all of them.

    It starts at 0 and is trained by Adam in full batches, so that nothing is drawn.
    """
    classes = int(labels.max()) + 1
    layer = torch.nn.Linear(points.shape[1], classes)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    # A step moves every weight by the rate, so a logit by up to the rate times the number of values.
    optimizer = torch.optim.Adam(layer.parameters(), lr=_RATE / points.shape[1], weight_decay=1e-4)
    found = []
    for step in range(_POINTS[-1] + 1):
        if step in _POINTS:
            found.append((layer.weight.detach().clone(), layer.bias.detach().clone()))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(layer(points), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return found
