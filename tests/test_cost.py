"""Predictions: the arithmetic, its properties, and published rows against the shipped profiles."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.cost import MIB, Cost, Prediction, bytes_allowed, bytes_read_per_token, judge, predict
from edgeprune.devices import Budget, DeviceProfile, list_profiles, load_profile
from edgeprune.errors import BadInput

GB = 10**9
# 10^9 bytes of weights read for one token: file (llama-bench's model size, or parameters x bits of its types) less an
# untied embedding; a tied one is read in full as the head.
READ_GB = {
    ("TinyLlama-1.1B", "Q4_K_M"): (0.630, 22),
    ("TinyLlama-1.1B", "Q8_0"): (1.099, 22),
    ("TinyLlama-1.1B", "F16"): (2.07, 22),
    ("Llama-2-7B", "Q4_0"): (3.751, 32),
    ("Llama-2-13B", "Q4_0"): (7.274, 40),
    ("Llama-3.2-1B", "Q4_0"): (0.763, 16),
    ("Llama-3.2-1B", "Q8_0"): (1.313, 16),
    ("Llama-3.2-3B", "Q4_K_M"): (2.011, 28),
    ("Llama-3-8B", "Q4_0"): (4.366, 32),
    ("Llama-3-8B", "IQ4_XS"): (4.169, 32),
    ("Llama-3.1-8B", "Q4_K_M"): (4.617, 32),
    ("DeepSeek-R1-Distill-Llama-8B", "Q4_K_M"): (4.617, 32),
    ("DeepSeek-R1-Distill-Qwen-1.5B", "Q4_K_M"): (0.986, 28),
    ("DeepSeek-R1-Distill-Qwen-7B", "Q4_K_M"): (4.377, 28),
    ("qwen:1.8b", "Q4_0"): (0.938, 24),
    ("phi3:3.8b", "Q4_0"): (2.121, 32),
    ("LFM2-350M", "Q5_K_M"): (0.260, 16),
    ("LFM2-350M", "Q6_K"): (0.291, 16),
    ("LFM2-700M", "Q5_K_M"): (0.538, 16),
    ("LFM2-700M", "Q6_K"): (0.609, 16),
    ("Qwen2.5-7B", "Q4_K_M"): (4.377, 28),
    ("Gemma-3-1B", "Q4_K_M"): (0.800, 26),
}
# device, model, quantisation, tokens/s, source
PUBLISHED = [
    ("rpi5", "LFM2-350M", "Q6_K", 38.51, "https://github.com/ggml-org/llama.cpp/pull/19360"),
    ("rpi5", "LFM2-700M", "Q5_K_M", 21.33, "https://github.com/ggml-org/llama.cpp/pull/19356"),
    ("rpi5", "Llama-3.2-3B", "Q4_K_M", 4.61, "https://github.com/geerlingguy/ai-benchmarks/issues/1"),
    ("rpi5", "Llama-3.1-8B", "Q4_K_M", 2.17, "https://github.com/geerlingguy/ai-benchmarks/issues/7"),
    ("rpi5", "Llama-3-8B", "IQ4_XS", 2.5, "https://github.com/ggml-org/llama.cpp/issues/9774"),
    ("rpi4", "Llama-3.2-3B", "Q4_K_M", 1.6, "https://github.com/geerlingguy/sbc-reviews/issues/59"),
    ("rpi4", "qwen:1.8b", "Q4_0", 3.05, "https://github.com/aidatatools/ollama-benchmark/pull/9"),
    ("n150", "Llama-3.2-3B", "Q4_K_M", 9.06, "https://github.com/geerlingguy/sbc-reviews/issues/64"),
    ("n150", "DeepSeek-R1-Distill-Llama-8B", "Q4_K_M", 3.55, "https://github.com/geerlingguy/ai-benchmarks/issues/12"),
    ("jetson-nano", "Gemma-3-1B", "Q4_K_M", 5.84, "https://github.com/kreier/llama.cpp-jetson"),
    ("apple-m4", "Llama-3.2-3B", "Q4_K_M", 41.31, "https://github.com/geerlingguy/ai-benchmarks/issues/2"),
    ("rtx4060-laptop", "Llama-3.1-8B", "Q4_K_M", 47.2, "https://github.com/AlexsJones/llmfit/pull/958"),
    ("rtx4060-laptop", "Qwen2.5-7B", "Q4_K_M", 48.7, "https://github.com/AlexsJones/llmfit/pull/958"),
]


def cost(profile: DeviceProfile, **changes: Any) -> Cost:
    values: dict[str, Any] = {
        "runtime": "llamacpp",
        "bytes_per_token": 83e6,
        "n_layers": 30,
        "weights_bytes": 92_000_000,
        "kv_bytes": 47_185_920,
        "threads": None,
        "context": 2048,
    }
    return predict(profile, **(values | changes))


def decode(device: str, model: str, quantisation: str) -> Prediction:
    size, layers = READ_GB[model, quantisation]
    return cost(load_profile(device), bytes_per_token=size * GB, n_layers=layers, kv_bytes=0).decode_tps


@pytest.mark.parametrize("device, model, quantisation, measured, source", PUBLISHED)
def test_published_rows_are_predicted(device: str, model: str, quantisation: str, measured: float, source: str) -> None:
    found = decode(device, model, quantisation)
    assert found.low < measured < found.high, source


def test_published_rows_are_predicted_well_on_the_whole() -> None:
    errors = [abs(decode(*row[:3]).value / row[3] - 1) for row in PUBLISHED]
    assert median(errors) < 0.10


@pytest.mark.skipif("EDGEPRUNE_DATA" not in os.environ, reason="EDGEPRUNE_DATA names the folder of published_tps.csv")
def test_all_published_rows_of_the_raspberry_pi_5() -> None:
    path = Path(os.environ["EDGEPRUNE_DATA"]) / "published_tps.csv"
    errors = []
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            key = row["model"], row["quant"]
            if row["device_id"].split("-")[0] != "rpi5" or row["usable_for_fit"] != "yes" or key not in READ_GB:
                continue
            if row["tg_tps"] and row["threads"] in ("", "4"):
                errors.append(abs(decode("rpi5", *key).value / float(row["tg_tps"].lstrip("~")) - 1))
    assert len(errors) >= 25
    assert median(errors) < 0.15


def test_decode_is_bytes_over_bandwidth_plus_fixed_terms() -> None:
    profile = load_profile("rpi5")
    figures = profile.decode["cpu"]
    assert figures.layer_ms is not None
    got = cost(profile, kv_bytes=2048 * 1000, depth=64)
    seconds = (83e6 + 64 * 1000) / (figures.gbs.value * GB) + 30 * figures.layer_ms.value / 1000
    assert got.decode_tps.value == pytest.approx(1 / seconds)
    assert got.decode_tps.kind == "predicted"
    assert (got.backend, got.threads) == ("cpu", 4)


def test_memory_is_weights_cache_copies_and_the_runtime() -> None:
    profile = load_profile("rpi5")
    plain = cost(profile, weights_bytes=100 * MIB, kv_bytes=20 * MIB)
    copied = cost(profile, weights_bytes=100 * MIB, kv_bytes=20 * MIB, repack_bytes=50 * MIB, file_bytes=101 * MIB)
    assert plain.memory_mib.value > 120
    assert copied.memory_mib.value == pytest.approx(plain.memory_mib.value + 50)
    assert (plain.file_mib, copied.file_mib) == (100, 101)


def test_prefill_only_where_a_kernel_was_published() -> None:
    profile = load_profile("rpi5")
    known = cost(profile, parameters=354_000_000, quantisation="Q6_K").prefill_tps
    assert known is not None
    assert known.value == pytest.approx(224, rel=0.05)  # llama.cpp pull 19360, pp512
    assert cost(profile, parameters=354_000_000, quantisation="Q2_K").prefill_tps is None
    assert cost(profile).prefill_tps is None


def test_bytes_read_of_tied_and_untied_models() -> None:
    parts = {"embedding": 1000, "head": 1000, "attention": 300, "mlp": 600, "norms": 5}
    assert bytes_read_per_token(parts, tied=False, vocab=100) == 1000 + 905 + 10
    tied = {key: size for key, size in parts.items() if key != "head"}
    assert bytes_read_per_token(tied, tied=True, vocab=100) == 1905
    with pytest.raises(BadInput):
        bytes_read_per_token(parts, tied=True, vocab=0)
    with pytest.raises(BadInput):
        bytes_read_per_token({"mlp": -1}, tied=True, vocab=1)


def test_reasons_name_what_is_lacking() -> None:
    profile = load_profile("rpi-zero2w")
    heavy = cost(profile, weights_bytes=400 * MIB, file_bytes=400 * MIB)
    reasons = judge(heavy, Budget(min_tokens_per_s=150, max_memory_mib=256, max_file_mib=300), profile)
    assert len(reasons) == 3
    assert reasons[0].startswith("needs 150 tokens/s, predicted ")
    assert "memory at most 256 MiB, predicted" in reasons[1]
    assert reasons[2] == "file at most 300 MiB, predicted 400.0"
    # The narrower of two limits of memory is the one that is broken.
    (reason,) = judge(heavy, Budget(max_memory_mib=4096), profile)
    assert reason.startswith("rpi-zero2w holds")
    assert judge(heavy, Budget(), load_profile("rpi5")) == []


def test_memory_is_a_cliff_even_without_a_budget() -> None:
    # An 8 GiB Raspberry Pi 5 ran a 7.9 GB model at 0.03 tokens/s.
    profile = load_profile("rpi5-8gb")
    assert judge(cost(profile, weights_bytes=7_900_000_000), Budget(), profile)


def test_threads() -> None:
    profile = load_profile("dimensity7300")
    one, two, four, eight = (cost(profile, threads=n).decode_tps for n in (1, 2, 4, 8))
    assert one.value < two.value <= four.value
    assert eight.value < four.value  # the small cores hold the big ones up
    assert cost(load_profile("rpi5"), threads=1).decode_tps.value < cost(load_profile("rpi5")).decode_tps.value
    gpu = load_profile("rtx4060-laptop")
    assert cost(gpu, threads=1).decode_tps == cost(gpu).decode_tps


def test_unknown_runtimes_name_the_known() -> None:
    with pytest.raises(BadInput, match="did you mean 'llamacpp'"):
        cost(load_profile("rpi5"), runtime="llama.cpp")
    with pytest.raises(BadInput, match="onnxruntime"):  # no figure: its processor is unknown
        cost(load_profile("rtx4060-laptop"), runtime="onnxruntime")


@pytest.mark.parametrize(
    "change",
    [{"bytes_per_token": 0}, {"bytes_per_token": float("nan")}, {"kv_bytes": -1}, {"context": 0}, {"threads": 0}],
)
def test_impossible_numbers(change: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        cost(load_profile("rpi5"), **change)


def test_a_prediction_is_ordered() -> None:
    with pytest.raises(ValueError, match="low <= value <= high"):
        Prediction(1.0, 2.0, 3.0)
    assert str(Prediction(110.2, 101.4, 118.0)) == "110 (101–118)"


PROFILES = list_profiles()
profiles = st.sampled_from(PROFILES)
sizes = st.integers(1, 10**11)
runtimes = st.sampled_from(["llamacpp", "onnxruntime"])


@settings(max_examples=300, deadline=None)
@given(profiles, runtimes, sizes, sizes, st.integers(0, 100), st.one_of(st.none(), st.integers(1, 64)), sizes)
def test_predictions_are_ordered_and_monotone(
    profile: DeviceProfile, runtime: str, read: int, more: int, layers: int, threads: int | None, kv: int
) -> None:
    if profile.backend_for(runtime) is None:
        return
    first = cost(profile, runtime=runtime, bytes_per_token=read, n_layers=layers, threads=threads, kv_bytes=kv)
    larger = cost(profile, runtime=runtime, bytes_per_token=read + more, n_layers=layers, threads=threads, kv_bytes=kv)
    deeper = cost(profile, runtime=runtime, bytes_per_token=read, n_layers=layers + 1, threads=threads, kv_bytes=kv)
    for prediction in (first.decode_tps, first.memory_mib, larger.decode_tps):
        assert 0 < prediction.low <= prediction.value <= prediction.high
    for field in ("low", "value", "high"):
        assert getattr(larger.decode_tps, field) <= getattr(first.decode_tps, field)
        assert getattr(deeper.decode_tps, field) <= getattr(first.decode_tps, field)


@settings(max_examples=300, deadline=None)
@given(profiles, sizes, st.floats(0.1, 1e6), st.floats(1, 1e6), st.floats(1, 10))
def test_more_memory_never_makes_a_fit_a_misfit(
    profile: DeviceProfile, weights: int, speed: float, memory: float, factor: float
) -> None:
    got = cost(profile, weights_bytes=weights, bytes_per_token=weights)
    total = profile.memory.total_gib
    roomier = profile.model_copy(
        update={
            "memory": profile.memory.model_copy(
                update={"total_gib": total.scaled(factor, kind="assumed", source="test")}
            )
        }
    )
    before = judge(got, Budget(min_tokens_per_s=speed, max_memory_mib=memory), profile)
    after = judge(got, Budget(min_tokens_per_s=speed, max_memory_mib=memory * factor), roomier)
    assert len(after) <= len(before)


@pytest.mark.parametrize("runtime", ["llamacpp", "onnxruntime"])
@pytest.mark.parametrize("speed", [5.0, 50.0, 150.0])
def test_bytes_allowed_is_the_inverse_of_the_prediction(runtime: str, speed: float) -> None:
    profile = load_profile("rpi5")
    size = bytes_allowed(profile, runtime, 30, speed)
    cost = predict(profile, runtime=runtime, bytes_per_token=size, n_layers=30, weights_bytes=int(size), kv_bytes=0)
    assert cost.decode_tps.value == pytest.approx(speed)


def test_no_bytes_are_left_where_the_fixed_terms_take_longer() -> None:
    assert bytes_allowed(load_profile("rpi5"), "llamacpp", 1000, 1000.0) < 0
