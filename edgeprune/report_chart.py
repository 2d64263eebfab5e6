"""The drawings of the report: positions of points, intervals and ticks in the units of an SVG picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 480, 340  # narrow, so that its letters stay readable on a phone
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 44
FLOOR = 1e-6  # nats; a file as good as the reference still has a place on a logarithmic axis


@dataclass(frozen=True)
class Point:
    """One candidate of the plot: measured distance to dense against speed, each with its interval."""

    name: str
    runtime: str
    speed: tuple[float, float, float]  # value, low, high, tokens/s
    speed_kind: str  # "measured" or "predicted"
    distance: tuple[float, float, float]  # nats a token
    fits: bool
    chosen: bool


def nice_ticks(high: float, count: int = 5) -> list[float]:
    """Round numbers from 0 to about `high`."""
    if high <= 0:
        return [0.0]
    raw = high / count
    step = 10.0 ** math.floor(math.log10(raw))
    step *= next((m for m in (1, 2, 5) if m * step >= raw), 10)
    return [step * i for i in range(int(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers in [low, high], at most seven: all digits of powers of ten, 1, 2 and 5 of them, or powers alone."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in (range(1, 10), (1, 2, 5), (1,)):
        ticks = [digit * 10.0**exponent for exponent in exponents for digit in digits]
        ticks = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(ticks) <= 7:
            return ticks
    return ticks[:: math.ceil(len(ticks) / 7)]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in both: first coordinate larger is better, second smaller."""
    order = sorted(range(len(points)), key=lambda i: (-points[i][0], points[i][1]))
    front, best = [], float("inf")
    for i in order:
        if points[i][1] < best:
            best = points[i][1]
            front.append(i)
    return front


def pareto(points: Sequence[Point], wanted: float | None) -> dict[str, Any]:
    """The plot of quality against speed, in the picture's units: linear tokens/s, logarithmic nats."""
    top_speed = 1.08 * max([point.speed[0] for point in points] + ([wanted] if wanted else []))
    values = [max(FLOOR, point.distance[0]) for point in points]
    low, high = min(values) / 1.5, max(values) * 1.5

    def x(speed: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * min(speed, top_speed) / top_speed

    def y(nats: float) -> float:
        share = math.log(min(high, max(low, nats)) / low) / math.log(high / low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    front = sorted(pareto_front([(p.speed[0], p.distance[0]) for p in points]), key=lambda i: points[i].speed[0])
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "top": TOP,
        "bottom": HEIGHT - BOTTOM,
        "x_ticks": [(x(tick), f"{tick:g}") for tick in nice_ticks(top_speed)],
        "y_ticks": [(y(tick), f"{tick:g}") for tick in log_ticks(low, high)],
        "wanted": None if wanted is None else x(wanted),
        "front": " ".join(f"{x(points[i].speed[0]):.1f},{y(points[i].distance[0]):.1f}" for i in front),
        "points": [
            {
                "of": point,
                "x": x(point.speed[0]),
                "y": y(point.distance[0]),
                "x_low": x(point.speed[1]),
                "x_high": x(point.speed[2]),
                "y_low": y(point.distance[1]),
                "y_high": y(point.distance[2]),
            }
            for point in points
        ],
    }


def bar(
    label: str, unit: str, value: float, low: float, high: float, kind: str, limit: float | None, *, at_least: bool
) -> dict[str, Any]:
    """One bar of the budget: shares of its length, and whether the limit is kept."""
    end = 1.1 * max(value, high, limit or 0.0) or 1.0
    kept = None if limit is None else (value >= limit if at_least else value <= limit)
    return {
        "label": label,
        "unit": unit,
        "value": value,
        "low": low,
        "high": high,
        "kind": kind,
        "limit": limit,
        "at_least": at_least,
        "kept": kept,
        "share": 100 * value / end,
        "low_share": 100 * low / end,
        "high_share": 100 * high / end,
        "limit_share": None if limit is None else 100 * limit / end,
    }
