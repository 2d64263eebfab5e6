"""Comparisons: intervals that hold what they promise, drift that does not count, settings taken only when proved."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import BadInput, StageFailed
from edgeprune.export.gguf_writer import write_gguf
from edgeprune.runtimes import settings as runtime_settings
from edgeprune.runtimes.bench import bench, forget_pages
from edgeprune.runtimes.racing import Arm, compare, judge, race, signed_rank_interval
from edgeprune.runtimes.tuning import settings_of, thread_counts, tune

A, B = Arm(Path("a.gguf"), 2, label="A"), Arm(Path("b.gguf"), 2, label="B")


@pytest.fixture(scope="module")
def tiny_gguf(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("racing") / "tiny.gguf"
    write_gguf(tiny_folder, path, dtype="F16")
    return path


def fake_bench(monkeypatch: pytest.MonkeyPatch, speed: Callable[[Any, str], float]) -> list[str]:
    """Replace the measurement by `speed(arm's options, test)`; the arms measured, in order."""
    order: list[str] = []

    def bench(path: Path, *, n_prompt: int, n_gen: int, **options: Any) -> Any:
        order.append(path.stem)
        tests = [name for name, n in ((f"pp{n_prompt}", n_prompt), (f"tg{n_gen}", n_gen)) if n]
        records = [SimpleNamespace(test=test, median_ts=speed({"path": path, **options}, test)) for test in tests]
        return SimpleNamespace(status="ok", records=records)

    monkeypatch.setattr("edgeprune.runtimes.racing.bench", bench)
    return order


def test_files_are_read_anew_for_the_first_round(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []

    def speed(options: Any, test: str) -> float:
        seen.append((options["path"].stem, options["anew"]))
        return 100.0

    fake_bench(monkeypatch, speed)
    race([A, B], rounds=2, n_prompt=0, n_gen=8)
    assert sorted(seen[:2]) == [("a", True), ("b", True)] and not any(anew for _, anew in seen[2:])


@pytest.mark.parametrize(("enough", "rounds"), [(1, 3), (5, 5), (99, 7)])
def test_a_race_goes_on_while_it_is_worth_it(monkeypatch: pytest.MonkeyPatch, enough: int, rounds: int) -> None:
    fake_bench(monkeypatch, lambda options, test: 100.0)
    (found,) = race([A], rounds=3, most=7, undecided=lambda speeds: len(speeds[0]["tg8"]) < enough, n_prompt=0, n_gen=8)
    assert len(found["tg8"]) == rounds


def test_forgotten_pages_come_back(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * 100_000)
    forget_pages(tmp_path)
    forget_pages(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"a" * 100_000


# The interval


def test_the_interval_is_wilcoxons() -> None:
    # Ten differences, their Walsh averages and the critical value 8 of the signed rank table for n = 10, two-sided 5 %.
    values = [1.1, 0.3, -0.4, 2.0, 0.9, 1.7, -0.1, 0.6, 1.3, 0.2]
    averages = sorted((a + b) / 2 for i, a in enumerate(values) for b in values[i:])
    assert signed_rank_interval(values) == pytest.approx((float(np.median(averages)), averages[8], averages[-9]))


@pytest.mark.parametrize("n", [6, 10, 15])
def test_it_holds_the_centre_as_often_as_it_says(n: int) -> None:
    noise = np.random.default_rng(n).standard_t(3, size=(4000, n))  # heavy tails, as timings have
    held = np.mean([low <= 0 <= high for _, low, high in map(signed_rank_interval, noise)])
    assert 0.94 <= held <= 0.985


@given(st.lists(st.floats(-1, 1), min_size=6, max_size=12), st.floats(-1, 1))
def test_it_moves_with_its_values_and_turns_with_the_arms(values: list[float], shift: float) -> None:
    found = signed_rank_interval(values)
    assert found[1] <= found[0] <= found[2]
    assert signed_rank_interval([v + shift for v in values]) == pytest.approx([f + shift for f in found], abs=1e-9)
    centre, low, high = signed_rank_interval([-v for v in values])
    assert (-centre, -high, -low) == pytest.approx(found)


@pytest.mark.parametrize(("level", "least"), [(0.95, 6), (0.99, 8)])
def test_too_few_rounds_say_how_many_are_needed(level: float, least: int) -> None:
    signed_rank_interval([1.0] * least, level)
    with pytest.raises(BadInput, match=f"measure {least} at least"):
        signed_rank_interval([1.0] * (least - 1), level)


def test_verdicts() -> None:
    speeds = [100.0, 101.0, 99.0, 100.5, 99.5, 100.0]
    faster = judge("tg64", speeds, [1.1 * s for s in speeds])
    assert faster.ratio == pytest.approx(1.1) and faster.verdict.startswith("B is 10.0 % faster (10.0 to 10.0 %)")
    assert judge("tg64", [1.1 * s for s in speeds], speeds).verdict.startswith("B is 9.1 % slower")
    same = judge("tg64", speeds, speeds[::-1])
    assert same.verdict.startswith("no difference seen (one of more than") and same.low <= 1 <= same.high
    assert same.to_json()["a_ts"] == speeds and same.medians == (100.0, 100.0)


# Races


def test_drift_is_not_taken_for_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = count()
    order = fake_bench(monkeypatch, lambda options, test: 100.0 * 0.97 ** next(turn))  # 3 % slower at each measurement
    (found,) = compare(A, B, rounds=10, n_prompt=0, n_gen=64)
    assert order == ["a", "b", "b", "a"] * 5
    assert found.low < 1 < found.high and "no difference seen" in found.verdict


def test_a_difference_is_found_beneath_drift_and_a_spoilt_round(monkeypatch: pytest.MonkeyPatch) -> None:
    turn, random = count(), np.random.default_rng(0)

    def speed(options: dict[str, Any], test: str) -> float:
        n = next(turn)
        spoilt = 0.3 if n == 7 else 1.0
        slower = 0.95 if options["path"].stem == "b" else 1.0
        return slower * spoilt * 100.0 * (1 - 0.005 * n) * math.exp(random.normal(0, 0.005))

    fake_bench(monkeypatch, speed)
    (found,) = compare(A, B, n_prompt=0, n_gen=64)
    assert found.high < 1 and found.ratio == pytest.approx(0.95, abs=0.015)


def test_each_test_is_compared_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_bench(monkeypatch, lambda options, test: 200.0 if test == "pp128" and options["path"].stem == "b" else 100.0)
    prompt, generation = compare(A, B, rounds=6, n_prompt=128, n_gen=32)
    assert (prompt.test, generation.test) == ("pp128", "tg32")
    assert (prompt.ratio, generation.ratio) == (pytest.approx(2.0), pytest.approx(1.0))


def test_what_does_not_run_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="5 rounds are too few"):
        compare(A, B, rounds=5, n_prompt=0, n_gen=8)
    with pytest.raises(BadInput, match="no such file"):
        compare(Arm(tmp_path / "absent.gguf", 1), B, rounds=6, n_prompt=0, n_gen=8)
    failed = SimpleNamespace(status="oom", reason="tg: out of memory", records=())
    monkeypatch.setattr("edgeprune.runtimes.racing.bench", lambda *_, **__: failed)
    with pytest.raises(StageFailed, match="A: oom: tg: out of memory"):
        race([A], rounds=1, n_prompt=0, n_gen=8)


def test_a_real_file_against_itself(tiny_gguf: Path) -> None:
    said: list[str] = []
    (found,) = compare(
        Arm(tiny_gguf, 1),
        Arm(tiny_gguf, 1, {"flash_attn": False}),
        rounds=6,
        n_prompt=0,
        n_gen=8,
        gate_s=None,
        progress=lambda done, total, arm: said.append(arm),
    )
    assert found.test == "tg8" and len(found.speeds) == 6 and all(min(pair) > 0 for pair in found.speeds)
    assert said[:2] == ["tiny.gguf t=1", "tiny.gguf t=1 flash_attn=off"]


# Tuning


def test_tuning_takes_what_is_faster_and_leaves_noise(monkeypatch: pytest.MonkeyPatch, tiny_gguf: Path) -> None:
    random = np.random.default_rng(1)

    def speed(options: dict[str, Any], test: str) -> float:
        by_threads = {4: 100.0, 3: 100.0, 2: 130.0, 1: 60.0}[options["threads"]]
        by_settings = 1.2 if options["settings"].get("flash_attn") is False else 1.0
        return by_threads * by_settings * math.exp(random.normal(0, 0.003))

    fake_bench(monkeypatch, speed)
    found = tune(tiny_gguf, threads=thread_counts(4))
    assert (found.best.threads, dict(found.best.settings)) == (2, {"flash_attn": False})
    taken = [(tried.arm.threads, dict(tried.arm.settings)) for tried in found.tried if tried.taken]
    assert taken == [(2, {}), (2, {"flash_attn": False})]
    assert not any("cache_type" in tried.arm.settings for tried in found.tried)  # it changes the answers
    assert any("cache_type" in t.arm.settings for t in tune(tiny_gguf, threads=[2], lossy=["cache_type"]).tried)
    assert found.to_json()["threads"] == 2 and len(found.to_json()["tried"]) == len(found.tried)


def test_a_setting_that_ends_the_runtime_is_left_out(monkeypatch: pytest.MonkeyPatch, tiny_gguf: Path) -> None:
    def speed(options: dict[str, Any], test: str) -> float:
        if options["settings"].get("flash_attn") is False:
            raise StageFailed("oom: the process ran out of memory")
        return 120.0 if options["settings"].get("n_ubatch") else 100.0

    fake_bench(monkeypatch, speed)
    found = tune(tiny_gguf, threads=[2])
    assert "n_ubatch" in found.best.settings and "flash_attn" not in found.best.settings


def test_with_every_setting_given_threads_alone_are_raced(monkeypatch: pytest.MonkeyPatch, tiny_gguf: Path) -> None:
    fake_bench(monkeypatch, lambda options, test: 100.0)
    given = {name: known.values[0] for name, known in settings_of("llamacpp").items()}
    found = tune(tiny_gguf, threads=[2, 1], given=given)
    assert [tried.arm.threads for tried in found.tried] == [1] and dict(found.best.settings) == given


def test_too_few_rounds_for_the_widest_race_are_refused(tiny_gguf: Path) -> None:
    with pytest.raises(BadInput, match="rounds"):
        tune(tiny_gguf, threads=[2], rounds=6)


def test_a_setting_that_cannot_be_had_there_is_left_out(monkeypatch: pytest.MonkeyPatch, tiny_gguf: Path) -> None:
    """As on a board without the GPU that llama.cpp here was built for."""
    refused: list[object] = []

    def speed(options: dict[str, Any], test: str) -> float:
        if "n_ubatch" in options["settings"]:
            refused.append(options["settings"])
            raise BadInput("no such thing there")
        return 120.0 if options["settings"].get("flash_attn") is False else 100.0

    fake_bench(monkeypatch, speed)
    found = tune(tiny_gguf, threads=[2])
    assert dict(found.best.settings) == {"flash_attn": False} and refused
    fake_bench(monkeypatch, lambda options, test: speed({**options, "settings": {"n_ubatch": 1}}, test))
    with pytest.raises(BadInput, match="no such thing there"):  # nothing could be raced at all
        tune(tiny_gguf, threads=[2])


@pytest.mark.parametrize(("cores", "counts"), [(1, [1]), (2, [2, 1]), (4, [4, 3, 2, 1]), (8, [8, 6, 4, 1])])
def test_thread_counts(cores: int, counts: list[int]) -> None:
    assert thread_counts(cores) == counts


# Settings


def test_settings_are_read_checked_and_shown() -> None:
    values = runtime_settings.parse(["flash_attn=off", "n_ubatch=128", "cache_type=Q8_0"])
    assert values == {"flash_attn": False, "n_ubatch": 128, "cache_type": "Q8_0"}
    assert runtime_settings.describe(values) == "flash_attn=off n_ubatch=128 cache_type=Q8_0"
    assert runtime_settings.check({"n_ubatch": 64}, settings_of("llamacpp"))["flash_attn"] == "auto"


@pytest.mark.parametrize(
    ("texts", "match"),
    [
        (["flash_attn"], "NAME=VALUE"),
        (["=off"], "NAME=VALUE"),
        (["n_ubatch=1", "n_ubatch=2"], "given twice"),
        (["flash_atn=off"], "did you mean 'flash_attn'"),
        (["flash_attn=maybe"], "flash_attn takes auto, off"),
        (["n_ubatch=0"], "n_ubatch takes 1 to 4096"),
        (["n_ubatch=off"], "n_ubatch takes 1 to 4096"),
    ],
)
def test_wrong_settings_are_refused(texts: list[str], match: str) -> None:
    with pytest.raises(BadInput, match=match):
        runtime_settings.check(runtime_settings.parse(texts), settings_of("llamacpp"))


def test_a_file_runs_with_settings_and_the_record_says_so(tiny_gguf: Path, tiny_folder: Path) -> None:
    options: dict[str, Any] = {"n_prompt": 0, "n_gen": 4, "repetitions": 1, "threads": 1, "least_s": 0, "gate_s": None}
    result = bench(tiny_gguf, settings={"flash_attn": False, "n_ubatch": 32}, **options)
    assert result.tg is not None and result.tg.settings == {"flash_attn": False, "n_ubatch": 32}
    with pytest.raises(BadInput, match="pytorch has no settings"):
        bench(tiny_folder, settings={"n_ubatch": 32}, **options)


def test_layers_go_to_a_gpu_only_where_there_is_one(tiny_gguf: Path) -> None:
    from edgeprune.runtimes.llamacpp_devices import gpus

    if gpus():
        pytest.skip("this build finds a GPU; `make test-gpu` tries it")
    assert settings_of("llamacpp")["gpu_layers"].values == (0,)  # so the tuner does not try
    with pytest.raises(BadInput, match="finds no GPU; install a build with one"):
        bench(tiny_gguf, n_prompt=0, n_gen=4, threads=1, gate_s=None, settings={"gpu_layers": 2})
