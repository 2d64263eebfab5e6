"""Bench gives llama-bench's fields, says what happened when a test fails, and renders the same table."""

from __future__ import annotations

import csv
import json
import statistics as reference
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from edgeprune.errors import BadInput, StageFailed
from edgeprune.runtimes.bench import BenchResult, bench, check_peak, cpu_info, measure, weight_bytes
from edgeprune.runtimes.conditions import Gate, Snapshot
from edgeprune.runtimes.records import Record, from_dict, median_interval, render, statistics, to_dict

# In the order in which llama-bench writes them.
_HOST = ["build_commit", "build_number", "cpu_info", "gpu_info", "backends"]
_MODEL = ["model_filename", "model_type", "model_size", "model_n_params"]
_SETTINGS = ["n_batch", "n_ubatch", "n_threads", "n_prompt", "n_gen", "n_depth", "test_time"]
_RESULTS = ["avg_ns", "stddev_ns", "avg_ts", "stddev_ts", "samples_ns", "samples_ts"]
LLAMA_BENCH = _HOST + _MODEL + _SETTINGS + _RESULTS
MEASURED = ["median_ts", "low_ts", "high_ts", "ttft_ms", "load_ms", "peak_mib", "runtime"]
OURS = [*MEASURED, "settings", "gated", "n_dropped", "machine", "sustained", "peak_gpu_mib"]
NESTED = ("samples_ns", "samples_ts", "settings", "machine", "sustained")
QUICK: dict[str, Any] = {"least_s": 0.0, "gate_s": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def progress() -> list[dict[str, Any]]:
    return []


@pytest.fixture(scope="module")
def result(folder: Path, progress: list[dict[str, Any]]) -> BenchResult:
    return bench(
        folder, n_prompt=24, n_gen=6, repetitions=3, threads=1, timeout_s=120, progress=progress.append, **QUICK
    )


def test_both_tests_are_measured_in_their_own_process(folder: Path, result: BenchResult) -> None:
    assert (result.status, result.reason) == ("ok", None)
    assert [record.test for record in result.records] == ["pp24", "tg6"]
    pp, tg = result.pp, result.tg
    assert pp is not None and tg is not None
    for record, count in ((pp, 24), (tg, 6)):
        assert len(record.samples_ns) == len(record.samples_ts) == 3
        assert record.samples_ts == pytest.approx([1e9 * count / ns for ns in record.samples_ns])
        assert record.low_ts <= record.median_ts <= record.high_ts
        assert record.load_ms > 0 and record.n_threads == 1
        assert record.runtime == "pytorch" and record.backends == "CPU"
        assert record.model_size == (folder / "model.safetensors").stat().st_size
        assert record.model_n_params == 2 * 300 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64) + 64
        assert record.peak_mib is not None and record.peak_mib < 4096
    assert pp.ttft_ms is not None and pp.ttft_ms > 1e-6 * min(pp.samples_ns)
    assert tg.ttft_ms is None
    assert result.peak_mib == max(r.peak_mib for r in result.records if r.peak_mib is not None)


def test_progress_tells_each_repetition(result: BenchResult, progress: list[dict[str, Any]]) -> None:
    told = [(report["stage"], report["done"], report["total"]) for report in progress]
    assert told == [(test, i, 3) for test in ("pp24", "tg6") for i in (1, 2, 3)]
    assert [report["ts"] for report in progress] == pytest.approx([ts for r in result.records for ts in r.samples_ts])


def test_one_test_alone(folder: Path) -> None:
    result = bench(folder, n_prompt=0, n_gen=4, repetitions=1, threads=1, **QUICK)
    assert result.pp is None and result.tg is not None
    assert (result.tg.stddev_ts, result.tg.low_ts) == (0.0, result.tg.median_ts)


def test_measuring_clears_the_cache_between_repetitions(folder: Path) -> None:
    # Room for one repetition only: without clearing the second would not fit.
    value = measure(path=str(folder), runtime="pytorch", test="tg", length=5, repetitions=3, threads=1, n_ctx=5)
    assert len(value["samples_ns"]) == 3 and value["ttft_ns"] is None
    value = measure(path=str(folder), runtime="pytorch", test="pp", length=5, repetitions=3, threads=1, n_ctx=6)
    assert all(first > sample for first, sample in zip(value["ttft_ns"], value["samples_ns"], strict=True))


def test_a_deadline_is_a_result(folder: Path) -> None:
    result = bench(folder, n_prompt=8, n_gen=4, repetitions=1, threads=1, timeout_s=0.05, **QUICK)
    assert result.status == "timeout" and result.records == ()
    assert result.reason is not None and result.reason.startswith("pp: no result within")


def test_too_little_memory_is_a_result(folder: Path) -> None:
    result = bench(folder, n_prompt=8, n_gen=4, repetitions=1, threads=1, memory_mib=40, **QUICK)
    assert result.status in ("oom", "crash") and result.records == ()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_prompt": 0, "n_gen": 0}, "nothing to measure"),
        ({"n_prompt": -1}, "nothing to measure"),
        ({"repetitions": 0}, "at least 1"),
        ({"threads": 0}, "at least 1"),
        ({"n_ctx": 128, "n_prompt": 128}, "too small"),
        ({"least_s": -1.0}, "must be above 0"),
        ({"sustained_s": 0.0}, "must be above 0"),
        ({"runtime": "onnxruntim"}, "did you mean 'onnxruntime'"),
    ],
)
def test_wrong_numbers_are_refused_before_anything_runs(folder: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(BadInput, match=match):
        bench(folder, **{"threads": 1, **options})


def test_a_bad_file_is_bad_input_across_the_process(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        bench(tmp_path / "absent.gguf", threads=1)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadInput, match=r"config\.json: not readable JSON"):
        bench(tmp_path, threads=1)


def test_a_peak_that_cannot_hold_the_weights_is_refused() -> None:
    check_peak(60.0, 100 << 20, Path("m.gguf"))  # an embedding that is only looked up stays on disk
    check_peak(None, 100 << 20, Path("m.gguf"))
    with pytest.raises(StageFailed, match="40 MiB is not credible for weights of 100 MiB"):
        check_peak(40.0, 100 << 20, Path("m.gguf"))


def test_weights_are_counted_by_format(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"x" * 10)
    assert weight_bytes(tmp_path / "model.gguf") == 10
    checkpoint, graph = tmp_path / "hf", tmp_path / "onnx"
    checkpoint.mkdir()
    graph.mkdir()
    for name, size in (("a-1.safetensors", 3), ("a-2.safetensors", 4), ("tokenizer.json", 100)):
        (checkpoint / name).write_bytes(b"x" * size)
    for name, size in (("model.onnx", 5), ("model.onnx.data", 6), ("tokenizer.json", 100)):
        (graph / name).write_bytes(b"x" * size)
    assert (weight_bytes(checkpoint), weight_bytes(graph)) == (7, 11)


def test_llamacpp_is_measured_on_the_demo_model(demo_gguf: Path) -> None:
    result = bench(demo_gguf, n_prompt=16, n_gen=4, repetitions=1, threads=1, timeout_s=120, **QUICK)
    assert result.status == "ok" and result.pp is not None and result.tg is not None
    assert result.pp.runtime == "llamacpp" and result.pp.model_n_params == 134_515_008
    assert result.peak_mib is not None and result.pp.model_size == 96_576_768
    assert result.peak_mib > result.pp.model_size / 2**20  # the head is tied, so every weight is read
    assert result.peak_mib < 2 * result.pp.model_size / 2**20  # and no room is kept for logits nobody reads


def test_the_processor_has_a_name() -> None:
    assert cpu_info()


def test_a_watched_and_sustained_measurement_says_how_the_machine_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = Snapshot(at_s=0.0, processors=2, temperature_c=51.0)
    monkeypatch.setattr("edgeprune.runtimes.bench.Gate", lambda seconds: Gate(seconds, look=lambda: calm))
    value = measure(
        path=str(folder),
        runtime="pytorch",
        test="tg",
        length=4,
        repetitions=2,
        threads=1,
        n_ctx=4,
        gate_s=5.0,
        sustained_s=0.2,
    )
    assert value["machine"] == {"before": calm.to_json(), "after": calm.to_json()} and value["n_dropped"] == 0
    assert value["sustained"]["s"] >= 0.2 and value["sustained"]["ts"] > 0


def test_a_machine_unfit_to_be_measured_gives_an_error_and_no_number(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hot = Snapshot(at_s=0.0, processors=2, temperature_c=95.0)
    monkeypatch.setattr("edgeprune.runtimes.bench.Gate", lambda seconds: Gate(0.0, look=lambda: hot))
    with pytest.raises(StageFailed, match=r"noisy: .*95 °C"):
        measure(path=str(folder), runtime="pytorch", test="tg", length=4, repetitions=2, threads=1, n_ctx=4, gate_s=5.0)


# Records


@pytest.fixture
def record() -> Record:
    return Record(
        build_commit="abc",
        build_number=None,
        cpu_info='A "quoted", CPU',
        gpu_info="",
        backends="CPU",
        model_filename="models/x.gguf",
        model_type="llama 135M Q4_0",
        model_size=96_576_768,
        model_n_params=134_515_008,
        n_batch=2048,
        n_ubatch=512,
        n_threads=2,
        n_prompt=512,
        n_gen=0,
        n_depth=0,
        test_time="2025-01-01T00:00:00Z",
        **statistics([10**9, 2 * 10**9, 4 * 10**9], 512),
        ttft_ms=1010.5,
        load_ms=50.0,
        peak_mib=178.4,
        runtime="llamacpp",
    )


def test_json_has_the_field_names_of_llama_bench_in_its_order(record: Record) -> None:
    (written,) = json.loads(render([record], "json"))
    assert list(written) == LLAMA_BENCH + OURS
    assert from_dict({**written, "unknown": 1}) == record
    assert from_dict(to_dict(record)) == record


def test_statistics_are_those_of_llama_bench(record: Record) -> None:
    speeds = [512.0, 256.0, 128.0]
    assert record.samples_ts == pytest.approx(speeds)
    assert record.avg_ts == pytest.approx(reference.mean(speeds))
    assert record.stddev_ts == pytest.approx(reference.stdev(speeds))
    assert record.avg_ns == round(reference.mean(record.samples_ns))
    assert record.stddev_ns == round(reference.stdev(record.samples_ns))
    assert record.median_ts == pytest.approx(256.0)


def test_csv_reads_back(record: Record) -> None:
    rows = list(csv.DictReader(render([record, replace(record, n_prompt=0, n_gen=128)], "csv").splitlines()))
    assert list(rows[0]) == [name for name in LLAMA_BENCH + OURS if name not in NESTED]
    assert rows[0]["cpu_info"] == record.cpu_info
    assert rows[0]["build_number"] == ""
    assert [row["n_gen"] for row in rows] == ["0", "128"]


def test_markdown_is_an_even_table_with_the_rows_of_llama_bench(record: Record) -> None:
    generation = replace(record, n_prompt=0, n_gen=128, n_depth=4096, peak_mib=None, model_n_params=None)
    text = render([record, generation], "md")
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1 and len(lines) == 4
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][:7] == ["model", "size", "params", "backend", "threads", "test", "t/s"]
    assert cells[2][:6] == ["llama 135M Q4_0", "92.10 MiB", "134.52 M", "CPU", "2", "pp512"]
    assert cells[2][6] == f"{record.avg_ts:.2f} ± {record.stddev_ts:.2f}"
    assert cells[3][5] == "tg128 @ d4096" and cells[3][8] == "-"


def test_unknown_format_names_the_known(record: Record) -> None:
    with pytest.raises(BadInput, match="csv, json, md"):
        render([record], "yaml")


@given(st.lists(st.floats(1, 1e6), min_size=1, max_size=12))
def test_interval_holds_the_median_and_lies_in_the_range(values: list[float]) -> None:
    low, high = median_interval(values)
    assert min(values) <= low <= reference.median(values) * (1 + 1e-12)
    assert reference.median(values) * (1 - 1e-12) <= high <= max(values)
    assert median_interval(values) == (low, high)


def test_interval_narrows_with_more_values() -> None:
    few = median_interval([90.0, 100.0, 110.0] * 2)
    many = median_interval([90.0, 100.0, 110.0] * 40)
    assert many[1] - many[0] <= few[1] - few[0]
