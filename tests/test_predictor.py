"""The fit of the predictor's benchmark: it finds what rows were made with, and its intervals hold what they say."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from edgeprune.devices import load_profile

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import predictor
import published_devices
import published_models
from predictor_fit import Row, fit
from predictor_profiles import write_profiles
from predictor_rows import read

HEADER = (
    "device_id,device_detail,backend,ram_gb,model,params_b,quant,size_mib,threads,n_prompt,pp_tps,n_gen,tg_tps,"
    "power_w,runtime,build,kind,confidence,usable_for_fit,notes,source"
)


def rows_of(gbs: dict[str, float], *, noise: float, seed: int = 0, wrong: int = 0) -> list[Row]:
    """Rows of devices of one kind and nominal 100 GB/s, three pages each; the first `wrong` are four times too slow."""
    rng = np.random.default_rng(seed)
    rows = []
    for device, real in gbs.items():
        for i in range(12):
            size, layers = 10 ** rng.uniform(-0.5, 1), int(rng.integers(16, 48))
            seconds = size / real + layers * 2e-5
            tps = float(np.exp(rng.normal(0, noise))) / seconds
            names = {"kind:board": 1.0, f"device:{device}": 1.0}
            rows.append(Row(tps, size / 100, layers, device, f"{device} {i % 3}", names, "layer:board"))
    return [Row(**{**vars(row), "tps": row.tps / 4}) if i < wrong else row for i, row in enumerate(rows)]


def bandwidth(rows: list[Row], device: str) -> float:
    found = fit(rows)
    return 100 * float(np.exp(found.value("kind:board") + found.value(f"device:{device}")))


@pytest.mark.parametrize("wrong", [0, 3])
def test_the_fit_finds_the_bandwidths_even_where_rows_are_wrong(wrong: int) -> None:
    real = {"a": 60.0, "b": 50.0, "c": 20.0}
    rows = rows_of(real, noise=0.03, wrong=wrong)
    for device, gbs in real.items():
        assert bandwidth(rows, device) == pytest.approx(gbs, rel=0.08)


def test_an_unknown_device_is_predicted_by_its_kind() -> None:
    found = fit(rows_of({"a": 60.0, "b": 50.0}, noise=0.03))
    row = Row(1.0, 0.01, 20, "new", "new", {"kind:board": 1.0, "device:new": 1.0}, "layer:board")
    assert 50 < 1 / (found.seconds(row) - 20 * 2e-5) < 60


def test_intervals_hold_what_they_say() -> None:
    rows = rows_of(dict.fromkeys("abcdefgh", 60.0), noise=0.1)
    folds = predictor.balanced_folds([row.page for row in rows], 6)
    errors, pages = predictor.held_out(rows, folds, fit)
    assert 0.85 <= predictor.covered(errors, pages, folds) <= 0.95
    assert predictor.percent(errors) < 12


def test_folds_keep_groups_whole_and_are_balanced() -> None:
    groups = [str(i % 7) for i in range(70)]
    folds = predictor.balanced_folds(groups, 3)
    assert len({(g, f) for g, f in zip(groups, folds, strict=True)}) == 7
    assert max(map(folds.count, range(3))) <= 30


def test_bytes_read_leave_an_untied_embedding_out() -> None:
    tied = published_models.find("Llama-3.2-1B-Instruct-Q4_0.gguf", None)
    assert tied.read_bytes("F16") == pytest.approx(2 * 1.236e9)
    untied = published_models.find("TinyLlama-1.1B", None)
    assert untied.read_bytes("F16") == pytest.approx(2 * (1.1e9 - 32000 * 2048))
    with pytest.raises(KeyError):
        published_models.find("never heard of", None)
    assert published_models.find("never heard of", 7.0).params_b == 7.0


def test_devices_are_known_by_their_profiles() -> None:
    for device, backend, profile in (("rpi5-8gb", "cpu", "rpi5"), ("sbc:raspberry-pi-cm5", "cpu", "rpi5")):
        place = published_devices.find(device, backend)
        assert place.profile == profile
        assert load_profile(profile).decode[place.backend].gbs.value < place.nominal_gbs
    with pytest.raises(KeyError):
        published_devices.find("abacus", "cpu")


def test_constants_land_in_a_profile_that_still_loads(tmp_path: Path) -> None:
    lines = [
        f"rpi5,Pi,cpu,,Llama-3.2-3B,3.21,{quant},,4,512,{pp},128,{tps},,llama.cpp,,llama-bench,A,yes,,page {page}"
        for page, quant, tps, pp in ((1, "Q4_0", 5.2, 14), (1, "Q8_0", 2.9, 12), (2, "Q4_0", 5.0, 15))
    ]
    csv = tmp_path / "published_tps.csv"
    csv.write_text("\n".join([HEADER, *lines]) + "\n", encoding="utf-8")
    source = Path(__file__).parents[1] / "profiles" / "rpi5.toml"
    (tmp_path / "rpi5.toml").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    record = {name: {"half_widths": {"known": 0.2}} for name in ("decode", "prefill")}
    assert list(write_profiles(tmp_path, *read(csv), record)) == [tmp_path / "rpi5.toml"]
    found = load_profile(str(tmp_path / "rpi5.toml"))
    gbs = found.decode["cpu"].gbs
    assert gbs.value == pytest.approx(10, rel=0.1)
    assert gbs.high / gbs.value == pytest.approx(np.exp(0.2), rel=0.01)
    assert "3 rows of 2 pages" in gbs.source
    assert found.memory == load_profile("rpi5").memory  # what is not fitted stays


@pytest.mark.skipif("EDGEPRUNE_DATA" not in os.environ, reason="EDGEPRUNE_DATA names the folder of published_tps.csv")
def test_the_profiles_are_those_of_the_published_rows() -> None:
    decode, prefill = read(Path(os.environ["EDGEPRUNE_DATA"]) / "published_tps.csv")
    assert len(decode) > 700 and len(prefill) > 200
    found = fit(decode)
    gbs = 17.1 * np.exp(found.value("kind:board") + found.value("device:rpi5/cpu"))
    assert load_profile("rpi5").decode["cpu"].gbs.value == pytest.approx(gbs, rel=0.01)
