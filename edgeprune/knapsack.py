"""The multiple-choice knapsack: one option of every group, the least damage in all, each cost within its limit.

Damages add up and so do costs. Solved exactly, up to a gap, by mixed-integer programming (HiGHS through scipy).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse

from edgeprune.errors import NothingFits, StageFailed

Array = NDArray[np.float64]
_SLACK = 1e-6  # of a limit: the solver's own tolerance


@dataclass(frozen=True)
class Group:
    """Options of which exactly one is taken.

    Attributes:
        damages: (options,), in any unit that adds up.
        costs: (options, costs), in the units of the limits.
    """

    damages: Array
    costs: Array


def choose_options(groups: Sequence[Group], limits: Array, *, gap: float = 1e-3, seconds: float = 60.0) -> list[int]:
    """The option of each group with the least damage in all, within the limits.

    Args:
        groups: what is chosen from.
        limits: (costs,), the most that each cost may add up to.
        gap: how far from the least damage, as a share of it, the answer may be.
        seconds: after so many, the best found is the answer.

    Returns:
        An index for each group.

    Raises:
        NothingFits: no choice is within the limits.
        StageFailed: the solver gives up.
    """
    counts = [len(group.damages) for group in groups]
    ends = np.cumsum(counts)
    damages = np.concatenate([group.damages for group in groups])
    costs = np.concatenate([group.costs for group in groups])
    rows = np.repeat(np.arange(len(groups)), counts)
    one_each = sparse.csr_matrix((np.ones(ends[-1]), (rows, np.arange(ends[-1]))))
    scale = np.maximum(np.abs(limits), 1e-12)  # bytes and parameters are millions: the solver wants numbers near 1
    with _nothing_on_stdout():
        answer = optimize.milp(
            damages,
            constraints=[
                optimize.LinearConstraint(one_each, 1, 1),
                optimize.LinearConstraint((costs / scale).T, -np.inf, limits / scale),
            ],
            integrality=np.ones(ends[-1]),
            bounds=optimize.Bounds(0, 1),
            options={"mip_rel_gap": gap, "time_limit": seconds},
        )
    if answer.status == 2:
        raise NothingFits("no choice meets the budget", remedy="relax it, or take a smaller model")
    if answer.x is None:
        raise StageFailed(f"the solver found no choice ({answer.message})")
    chosen = [int(np.argmax(answer.x[end - count : end])) for count, end in zip(counts, ends, strict=True)]
    total = sum(group.costs[option] for group, option in zip(groups, chosen, strict=True))
    if (total > limits + _SLACK * scale).any():  # HiGHS has called such answers optimal (scipy issue 24141)
        raise StageFailed("the solver's choice is beyond the limits", remedy="change the budget a little")
    return chosen


@contextlib.contextmanager
def _nothing_on_stdout() -> Iterator[None]:
    """Keeps what native code prints off the standard output, where a command's JSON goes.

    HiGHS prints a line for each solution that it repairs, even when told to be silent (HiGHS.jl issue 312).
    """
    sys.stdout.flush()
    native = ctypes.CDLL("ucrtbase" if sys.platform == "win32" else None)
    try:
        kept = os.dup(1)
    except OSError:  # there is none
        yield
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.close(nowhere)
        yield
    finally:
        native.fflush(None)  # what native code has printed lies in a buffer of its own until then
        os.dup2(kept, 1)
        os.close(kept)
