"""Decode speed fitted to published rows: one model for all devices, pooled, robust. Pure functions over arrays.

    t = e^u + e^v,   u = log(bytes / nominal bandwidth) - efficiency,   v = log(layers) + cost of a layer

t is the time of one token. Both u and v are linear in the parameters, so the gradient of log t is the two designs'
mean, weighted by what either part takes:

- efficiency: that of the kind of device, and a device's own beside it, drawn to 0 (pooling); threads below and beyond
  the big cores; the kernel of a quantisation on processors and on GPUs; the runtime, relative to llama.cpp;
- cost of a layer: by kind;
- a term for each page, drawn to 0, which takes what rows of one page share (a build, a board's cooling). It is no
  part of a prediction.

Rows, pages and devices may be far off, so their loss is Cauchy's: a row that is wrong by a factor of four counts
little. The other priors are Gaussian.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Array = NDArray[np.float64]

NOISE = {"A": 0.05, "B": 0.08, "C": 0.12}  # scale of the residuals of log t within a page, by its confidence
PRIORS = {  # mean and standard deviation of a parameter, by the part of its name before the colon
    "kind": (np.log(0.6), 0.5),
    "device": (0.0, 0.15),
    "fewer": (-0.6, 0.2),  # times log(big cores / threads)
    "beyond": (-0.2, 0.3),  # threads beyond the big cores
    "kernel": (0.0, 0.15),
    "runtime": (0.0, 0.25),
    "layer": (np.log(2e-5), 0.7),  # seconds, on a processor; LFM2 in two sizes on a Raspberry Pi 5: 1 to 3e-5
    "launch": (np.log(6e-5), 0.7),  # seconds, on a GPU: a few kernels
    "page A": (0.0, 0.05),  # by confidence: what a well documented page shows is the device's
    "page B": (0.0, 0.08),
    "page C": (0.0, 0.15),
}
# Prompt processing: kinds and devices differ far more, and what a device computes has no nominal figure here.
PREFILL_PRIORS = PRIORS | {
    "kind": (np.log(500.0), 2.0),
    "device": (0.0, 0.6),
    "kernel": (0.0, 0.4),
    "page B": (0.0, 0.2),
    "page C": (0.0, 0.3),
}


@dataclass(frozen=True)
class Row:
    """A published speed, and what it depends on: `efficiency` and `layer` name parameters, with their factors."""

    tps: float
    seconds_nominal: float  # bytes read for a token / nominal bandwidth
    layers: float
    device: str
    page: str
    efficiency: dict[str, float]
    layer: str
    confidence: str = "B"
    facts: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def page_name(self) -> str:
        """The parameter of its page."""
        return f"page {self.confidence}:{self.page}"


@dataclass(frozen=True)
class Fit:
    """Parameters by name; one that was never seen stands at its prior's mean."""

    values: dict[str, float]
    priors: Mapping[str, tuple[float, float]] = field(default_factory=lambda: PRIORS)

    def value(self, name: str) -> float:
        """A parameter."""
        return self.values.get(name, self.priors[name.split(":")[0]][0])

    def seconds(self, row: Row, *, with_page: bool = False) -> float:
        """Predicted time of one token of a row, s; what is known of its page plays a part only where asked for."""
        efficiency = sum(self.value(name) * factor for name, factor in row.efficiency.items())
        page = self.value(row.page_name) if with_page else 0.0
        time = row.seconds_nominal * np.exp(-efficiency) + row.layers * np.exp(self.value(row.layer))
        return float(time * np.exp(page))


def fit(rows: Sequence[Row], priors: Mapping[str, tuple[float, float]] = PRIORS) -> Fit:
    """The parameters of greatest posterior density."""
    names = sorted({n for row in rows for n in (*row.efficiency, row.layer, row.page_name)})
    at = {name: i for i, name in enumerate(names)}
    u, v, page = (np.zeros((len(rows), len(names))) for _ in range(3))
    for i, row in enumerate(rows):
        for name, factor in row.efficiency.items():
            u[i, at[name]] = -factor
        v[i, at[row.layer]] = 1.0
        page[i, at[row.page_name]] = 1.0
    u0 = np.log([row.seconds_nominal for row in rows])
    v0 = np.log([row.layers for row in rows])
    y = -np.log([row.tps for row in rows])
    mean, sd = np.array([priors[name.split(":")[0]] for name in names]).T
    noise = np.array([NOISE[row.confidence] for row in rows])
    part = np.array([name.split(":")[0] for name in names])

    def solve(start: Array, sd: Array, far_off: tuple[str, ...]) -> Array:
        robust = np.concatenate([np.ones(len(rows), bool), np.isin(part, far_off)])

        def residuals(x: Array) -> Array:
            return np.concatenate([(np.logaddexp(u0 + u @ x, v0 + v @ x) + page @ x - y) / noise, (x - mean) / sd])

        def jacobian(x: Array) -> Array:
            first, second = u0 + u @ x, v0 + v @ x
            share = np.exp(first - np.logaddexp(first, second))[:, None]
            return np.concatenate([(share * u + (1 - share) * v + page) / noise[:, None], np.diag(1 / sd)])

        def loss(z: Array) -> float:
            square = residuals(sd * z) ** 2
            return 0.5 * float(np.where(robust, np.log1p(square), square).sum())

        def weighted(z: Array) -> tuple[Array, Array, Array]:
            r, j = residuals(sd * z), jacobian(sd * z) * sd
            return r, j, np.where(robust, 1 / (1 + r**2), 1.0)

        def gradient(z: Array) -> Array:
            r, j, weight = weighted(z)
            return j.T @ (weight * r)

        def curvature(z: Array) -> Array:  # Gauss and Newton's, of the weighted squares: never negative
            _, j, weight = weighted(z)
            return j.T @ (weight[:, None] * j)

        # Parameters in units of their priors' deviations, so that one step size suits all.
        return sd * minimize(loss, start / sd, jac=gradient, hess=curvature, method="trust-exact").x

    # Pages and devices may be far off, as rows may. That has many minima: the search starts where devices are free.
    start = solve(mean, np.where(part == "device", 1.0, sd), ())
    found = solve(start, sd, ("page A", "page B", "page C", "device"))
    return Fit(dict(zip(names, found.tolist(), strict=True)), priors)
