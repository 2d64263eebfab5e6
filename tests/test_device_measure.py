"""`devices measure` finds the figures of a machine that keeps to the predictor's law, and keeps them in a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import speed_record
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.candidates import cost_of
from edgeprune.device_measure import Point, measure_device, save_profile, solve, to_toml
from edgeprune.devices import Budget, DeviceProfile, load_profile, parse_profile
from edgeprune.errors import BadInput, StageFailed
from edgeprune.export.yardstick import FILLS, SLIM, WIDE, Yardstick, write_yardstick
from edgeprune.families import FAMILIES
from edgeprune.prediction import predict_file
from edgeprune.runtimes.bench import BenchResult
from edgeprune.runtimes.gguf_file import GgufFile
from edgeprune.runtimes.llamacpp import LlamaCpp
from edgeprune.shape import LayerShape, ModelShape
from edgeprune.targets import target_for

SHARES = {
    "Q4_0": 1.0,
    "Q4_1": 0.85,
    "IQ4_NL": 0.9,
    "Q5_0": 0.7,
    "Q5_1": 0.65,
    "Q4_K": 0.8,
    "Q5_K": 0.78,
    "Q6_K": 0.75,
    "Q8_0": 1.1,
    "F16": 1.2,
}


def machine(gbs: float, layer_ms: float, best: int = 4) -> Callable[..., BenchResult]:
    """A machine whose tokens take W / (q B) + n c; with fewer than `best` threads B is less, with more a little."""

    def bench(path: Path, *, n_prompt: int, n_gen: int, threads: int, **_: Any) -> BenchResult:
        file = GgufFile(path)
        reach = threads / best if threads < best else 1 - 0.1 * (threads - best)
        cache = sum(2 * layer.kv_heads for layer in file.widths()) * 64 * n_gen
        read = sum(file.bytes_by_part().values()) + cache
        kind = path.stem.split("-", 1)[1]
        seconds = read / (gbs * reach * SHARES[kind] * 1e9) + len(file.widths()) * layer_ms / 1e3
        prompt = file.parameters / (60.0 * SHARES[kind] * 1e9)
        records = [speed_record(n_prompt, 0, threads, prompt)] if n_prompt else []
        return BenchResult((*records, speed_record(0, n_gen, threads, seconds)), "ok", None, None)

    return bench


@pytest.fixture(scope="module")
def measured() -> DeviceProfile:
    base = load_profile("rpi5").renamed("mine")
    return measure_device(base, counts=[6, 4, 1], measure=machine(12.0, 0.05))


def test_the_law_is_found_again(measured: DeviceProfile) -> None:
    decode = measured.decode["cpu"]
    assert decode.layer_ms is not None and decode.one_thread_gbs is not None
    assert decode.gbs.value == pytest.approx(12.0, rel=1e-3)
    assert decode.layer_ms.value == pytest.approx(0.05, rel=2e-2)
    assert {name: decode.kernel[name].value for name in ("Q8_0", "F16", "IQ4_NL", "Q4_K_M", "Q4_K_S", "Q6_K")} == (
        pytest.approx({"Q8_0": 1.1, "F16": 1.2, "IQ4_NL": 0.9, "Q4_K_M": 0.8, "Q4_K_S": 0.8, "Q6_K": 0.75}, rel=1e-2)
    )
    assert measured.threads == 4 and "6: " in measured.start.threads.source
    assert measured.prefill["cpu"]["Q8_0"].value == pytest.approx(66.0, rel=1e-3)
    assert decode.gbs.low < decode.gbs.value < decode.gbs.high and decode.gbs.kind == "measured"


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_another_model_is_predicted(measured: DeviceProfile, tmp_path: Path, kind: str) -> None:
    shape = Yardstick("other", layers=20, hidden=512, neurons=1536, heads=8, kv_heads=2, vocabulary=4096)
    path = write_yardstick(shape, kind, tmp_path / f"other-{kind}.gguf")
    real = machine(12.0, 0.05)(path, n_prompt=64, n_gen=128, threads=4)
    found = predict_file(path, measured).cost
    assert real.tg is not None and found.decode_tps.value == pytest.approx(real.tg.median_ts, rel=0.01)
    assert found.decode_tps.low < real.tg.median_ts < found.decode_tps.high
    assert found.load_s is not None and 0 < found.load_s.low <= found.load_s.high
    assert predict_file(path, load_profile("rpi5")).cost.load_s is None  # nobody published it
    assert real.pp is not None and found.prefill_tps is not None
    assert found.prefill_tps.value == pytest.approx(real.pp.median_ts, rel=0.01)


def test_a_mixture_is_predicted_by_its_types(measured: DeviceProfile) -> None:
    """Rows of 96 hold no block of 256: most of Q4_K_M then is Q5_0 and Q8_0, and the name says nothing of it."""
    layers = (LayerShape(4, 2, 256),) * 6
    shape = ModelShape(FAMILIES["llama"], 512, 96, 32, layers, True, 512, 1e-5, 1e4, None)
    target, budget = target_for("Q4_K_M"), Budget.of(measured)
    types = target.format.types(shape, "Q4_K_M")
    assert {"Q5_0", "Q8_0"} <= set(types)
    found = cost_of(shape, target, measured, budget, depth=0).decode_tps.value
    seconds = sum(size / (12e9 * SHARES[kind]) for kind, size in types.items()) + 6 * 0.05e-3
    assert found == pytest.approx(1 / seconds, rel=0.05)  # norms are read too
    unknown = measured.model_copy(update={"decode": load_profile("rpi5").decode})
    assert (
        cost_of(shape, target, unknown, budget).decode_tps
        == cost_of(shape, target, load_profile("rpi5"), budget).decode_tps
    )


def test_the_file_reads_back(measured: DeviceProfile, tmp_path: Path) -> None:
    path = save_profile(measured, tmp_path / "profiles" / "mine.toml")
    assert load_profile(str(path)) == measured
    assert parse_profile(to_toml(load_profile("rk3588")), where="text") == load_profile("rk3588")


@given(st.floats(1, 200), st.floats(0, 0.5), st.floats(0.5, 2.0))
def test_yardsticks_give_bandwidth_and_layers(gbs: float, layer_ms: float, share: float) -> None:
    points = []
    for shape, kind, size in ((WIDE, "Q4_0", 73e6), (SLIM, "Q4_0", 71e6), (WIDE, "Q8_0", 137e6), (SLIM, "Q8_0", 133e6)):
        rate = gbs * (share if kind == "Q8_0" else 1.0) * 1e9
        seconds = size / rate + shape.layers * layer_ms / 1e3
        points.append(Point(shape, kind, 4, int(size), int(size), [speed_record(0, 8, 4, seconds)]))
    rates, found = solve(points)
    assert rates == pytest.approx({"Q4_0": gbs, "Q8_0": gbs * share}, rel=1e-4)
    assert found == pytest.approx(layer_ms, rel=1e-3, abs=1e-4)


def test_what_goes_wrong_is_said() -> None:
    base = load_profile("rpi5")
    with pytest.raises(StageFailed, match=r"wide-Q4_0\.gguf: oom: tg: killed"):
        measure_device(base, counts=[1], measure=lambda *_, **__: BenchResult((), "oom", "tg: killed", None))
    for name in ("host", "Mine!", ""):
        with pytest.raises(BadInput, match="no name for a profile"):
            base.renamed(name)


@pytest.mark.parametrize("kind", [each.name for each in FILLS])
def test_every_yardstick_runs_and_is_the_same_everywhere(kind: str, tmp_path: Path) -> None:
    worded = kind == "Q8_0"
    shape = Yardstick("tiny", 2, hidden=256, neurons=512, heads=4, kv_heads=2, vocabulary=512, worded=worded)
    path = write_yardstick(shape, kind, tmp_path / "a.gguf")
    assert path.read_bytes() == write_yardstick(shape, kind, tmp_path / "b.gguf").read_bytes()
    file = GgufFile(path)
    assert file.parameters == shape.parameters and {t.type for t in file.tensors.values()} == {kind, "F32"}
    with LlamaCpp(path, n_ctx=16, threads=1) as model:
        logits = model.forward([1, 2, 3])
        assert not worded or model.decode(model.encode("How long? 12 Übergänge")) == "How long? 12 Übergänge"
    assert model.n_vocab == 512 and np.isfinite(logits).all() and logits.std() > 0


def test_an_unknown_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="Q4_0"):
        write_yardstick(WIDE, "Q4_00", tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())
