"""`fit` where the device is there to be measured: plans follow what it shows, not what its profile says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import speed_record
from hypothesis import assume, given
from hypothesis import strategies as st

from edgeprune.at_hand import asked_of_predictions, predicted_time
from edgeprune.candidates import Candidate
from edgeprune.checkpoint import Checkpoint
from edgeprune.devices import Budget, DeviceProfile, load_profile
from edgeprune.errors import NothingFits
from edgeprune.files import read_json
from edgeprune.fitting import FitResult, fit
from edgeprune.record import Trial
from edgeprune.runtimes.bench import BenchResult
from edgeprune.runtimes.gguf_file import GgufFile
from edgeprune.search import dense_candidates
from edgeprune.targets import target_for

pytestmark = pytest.mark.usefixtures("short_fit")

Bench = Callable[..., BenchResult]


@pytest.fixture(scope="module")
def dense(wide: Path) -> Candidate:
    (candidate,) = dense_candidates(Checkpoint(wide).shape, [target_for("Q8_0")], here(), Budget(context=64))
    return candidate


def here() -> DeviceProfile:
    """A profile of the machine at hand, as far as anybody knew: one that `machine` is like, which reorders nothing."""
    profile = load_profile("rpi5")
    return profile.model_copy(update={"name": "host", "cpu": profile.cpu.model_copy(update={"isa": ("neon",)})})


def machine(seconds: float, power: float, peak: float) -> Bench:
    """A machine that takes `seconds` x (its share of the dense file) ** `power` a token, and `peak` MiB beside a file.

    The dense file is the first it sees.
    """
    first: list[int] = []

    def bench(path: Path, *, threads: int, **_: Any) -> BenchResult:
        size = sum(GgufFile(path).bytes_by_part().values())
        first.append(size)
        taken = seconds * (size / first[0]) ** power
        test = [speed_record(n, g, threads, taken, path.stat().st_size / 2**20 + peak) for n, g in ((512, 0), (0, 128))]
        return BenchResult(tuple(test), "ok", None, None)

    return bench


def run(folder: Path, out: Path, budget: Budget, bench: Bench, patch: pytest.MonkeyPatch, **options: Any) -> FitResult:
    patch.setattr("edgeprune.workshop.bench", bench)
    return fit(folder, here(), budget, out=out, threads=2, targets=["Q8_0"], tune=False, **options)


def speed_of(trial: Trial) -> float:
    return float(trial.speed["tg128"]["median_ts"])


def test_a_slower_device_than_its_profile_gets_a_narrower_plan(
    wide: Path, dense: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predicted = dense.cost.decode_tps.value
    budget = Budget(min_tokens_per_s=0.9 * predicted, context=64)  # which dense is predicted to reach
    result = run(wide, tmp_path / "run", budget, machine(1 / (0.8 * predicted), 1.0, 0.0), monkeypatch)
    assert not result.chosen.dense and speed_of(result.trial) >= 0.9 * predicted
    assert f"measured {speed_of(result.trial):.1f} tokens/s" in result.verdict and "predicted" not in result.verdict
    record = read_json(tmp_path / "run" / "fit.json")
    first, *_, last = record["candidates"]
    assert not first["fits"] and "measured" in first["reasons"][0] and last["fits"]


def test_a_faster_device_loses_no_more_than_it_must(
    wide: Path, dense: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predicted = dense.cost.decode_tps.value
    budget = Budget(min_tokens_per_s=1.3 * predicted, context=64)
    result = run(wide, tmp_path / "run", budget, machine(1 / (1.2 * predicted), 1.0, 0.0), monkeypatch)
    assert not result.chosen.dense and result.chosen.fits
    assert result.chosen.cost.decode_tps.value < 1.3 * predicted <= speed_of(result.trial)


def test_a_plan_that_misses_when_measured_is_made_again(
    wide: Path, dense: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Narrower layers gain less there than bytes say, which only a narrower file can show."""
    predicted = dense.cost.decode_tps.value
    budget = Budget(min_tokens_per_s=1.1 * predicted, context=64)
    result = run(wide, tmp_path / "run", budget, machine(1 / predicted, 0.25, 0.0), monkeypatch)
    (_, *plans) = result.trials
    assert len(plans) > 1 and speed_of(plans[0][1]) < 1.1 * predicted <= speed_of(result.trial)
    assert [c.fits for c, _ in plans] == [False] * (len(plans) - 1) + [True]
    shares = [c.plan.reached_ratio for c, _ in plans]
    assert shares == sorted(shares)
    names = [c["name"] for c in read_json(tmp_path / "run" / "fit.json")["candidates"]]
    assert [c.name for c, _ in result.trials] == names


def test_a_plan_that_loses_more_than_it_must_is_made_again(
    wide: Path, dense: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Narrower layers gain more there than bytes say: processors have caches."""
    predicted = dense.cost.decode_tps.value
    budget = Budget(min_tokens_per_s=1.2 * predicted, context=64)
    result = run(wide, tmp_path / "run", budget, machine(1 / predicted, 3.0, 0.0), monkeypatch)
    (_, *plans) = result.trials
    assert len(plans) > 1 and all(c.fits for c, _ in plans)
    shares = [c.plan.reached_ratio for c, _ in plans]
    assert shares == sorted(shares, reverse=True)


def test_memory_that_the_prediction_does_not_know_of_is_made_room_for(
    wide: Path, dense: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = dense.cost.memory_mib.value
    beside = held + 0.2 - dense.cost.file_mib  # 0.2 MiB more than predicted, and tensors are a little less than a file
    result = run(
        wide,
        tmp_path / "run",
        Budget(max_memory_mib=held + 0.05, context=64),
        machine(0.001, 1.0, beside),
        monkeypatch,
    )
    assert not result.chosen.dense and result.chosen.fits
    assert result.trial.speed["tg128"]["peak_mib"] <= held + 0.05
    assert "measured" in result.verdict and "predicted" not in result.verdict


def test_what_no_plan_reaches_is_told_with_what_was_measured(
    wide: Path, dense: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predicted = dense.cost.decode_tps.value
    budget = Budget(min_tokens_per_s=1.1 * predicted, context=64)
    with pytest.raises(NothingFits, match=r"measured \d+"):  # a machine that narrower layers make no faster
        run(wide, tmp_path / "run", budget, machine(1 / predicted, 0.0, 0.0), monkeypatch)


def test_when_time_is_over_nothing_is_planned_if_something_fits(
    wide: Path, dense: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a damage table was measured")

    monkeypatch.setattr("edgeprune.rounds.cached_damage", refuse)
    monkeypatch.setattr("edgeprune.workshop.bench", machine(1 / dense.cost.decode_tps.value, 1.0, 0.0))
    # Q8_0 fits; F32, four times the bytes, does not.
    budget = Budget(min_tokens_per_s=0.9 * dense.cost.decode_tps.value, context=64)
    options: dict[str, Any] = {"targets": ["Q8_0", "F32"], "tune": False, "max_time_s": 1e-9}
    result = fit(wide, here(), budget, out=tmp_path / "run", threads=2, **options)
    assert result.chosen.dense
    assert read_json(tmp_path / "run" / "fit.json")["stopped_early"]


def test_a_gpu_s_memory_is_left_as_it_was_asked(dense: Candidate) -> None:
    test = {
        "median_ts": dense.cost.decode_tps.value / 2,
        "peak_mib": 2 * dense.cost.memory_mib.value,
        "peak_gpu_mib": 1.0,
    }
    trial = Trial("k", "c", "ok", None, None, {"tg128": test})
    budget = Budget(min_tokens_per_s=10, max_memory_mib=100, context=64)
    held = asked_of_predictions(budget, [(dense, trial)])
    assert held.min_tokens_per_s == pytest.approx(20)
    assert held.max_memory_mib == pytest.approx(max(1, 100 - dense.cost.memory_mib.value))
    assert asked_of_predictions(budget, [(dense, trial)], dedicated=True).max_memory_mib == 100


@given(st.floats(0.1, 10), st.floats(-0.5, 0.9), st.floats(0.2, 5), st.floats(0.2, 5), st.floats(0.2, 5))
def test_two_measurements_tell_a_device_that_is_linear(b: float, share: float, x: float, y: float, z: float) -> None:
    """Measured = a + b x predicted, a so that all three are positive times."""
    assume(abs(x - y) > 1e-3)
    a = share * b * min(x, y, z)

    def measured(predicted: float) -> float:
        return a + b * predicted

    assume(min(measured(t) for t in (x, y, z)) > 1e-3)
    found = predicted_time(measured(z), [(x, measured(x)), (y, measured(y))])
    assert found == pytest.approx(z, rel=1e-6)


def test_measurements_that_make_no_line_are_a_factor() -> None:
    assert predicted_time(2.0, [(1.0, 4.0)]) == 0.5
    assert predicted_time(2.0, [(1.0, 4.0), (2.0, 3.0)]) == pytest.approx(2.0 * 2 / 3), "wider and faster: chance"
    assert predicted_time(2.0, [(1.0, 4.0), (1.0, 4.0)]) == 0.5
