"""`ci` fails on regressions only, keeps its baseline whole, and writes what others read."""

from __future__ import annotations

import functools
import itertools
import json
import sys
import xml.etree.ElementTree as Xml
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgeprune import ci as ci_module
from edgeprune.ci import baseline_files, read_suite, run_suite, save_baseline
from edgeprune.ci_output import FORMS, write_all
from edgeprune.cli import app
from edgeprune.errors import BadInput, StageFailed
from edgeprune.export.gguf_writer import write_gguf
from edgeprune.runtimes.bench import bench

SUITE = """
rounds = 6
threads = 1
[[bench]]
name = "first | one"
file = "a.gguf"
n_prompt = 0
n_gen = 8
[[bench]]
name = "second"
file = "b.gguf"
n_prompt = 16
n_gen = 8
tolerance = 0.2
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "suite").mkdir()
    for name in ("a", "b"):
        (tmp_path / "suite" / f"{name}.gguf").write_bytes(name.encode())
    (tmp_path / "suite" / "suite.toml").write_text(SUITE)
    return tmp_path / "suite"


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path, str], float]], None]:
    """Replaces the measurement by a function of file and test."""

    def use(function: Callable[[Path, str], float]) -> None:
        def measure(path: Path, *, n_prompt: int, n_gen: int, **_: Any) -> Any:
            tests = [name for name, n in ((f"pp{n_prompt}", n_prompt), (f"tg{n_gen}", n_gen)) if n]
            records = [SimpleNamespace(test=test, median_ts=function(path, test)) for test in tests]
            return SimpleNamespace(status="ok", records=records)

        monkeypatch.setattr("edgeprune.runtimes.racing.bench", measure)

    return use


def run(folder: Path, **options: Any) -> ci_module.Report:
    return run_suite(read_suite(folder / "suite.toml"), folder, threads=2, **options)


def test_the_first_run_has_no_baseline_and_becomes_one(folder: Path, speed: Any, tmp_path: Path) -> None:
    speed(lambda path, test: 100.0)
    report = run(folder)
    assert [(r.name, r.test, r.state) for r in report.results] == [
        ("first | one", "tg8", "new"),
        ("second", "pp16", "new"),
        ("second", "tg8", "new"),
    ]
    save_baseline(report, tmp_path / "base")
    (folder / "a.gguf").write_bytes(b"another")
    kept = baseline_files(tmp_path / "base")
    assert {name: path.read_bytes() for name, path in kept.items()} == {"first | one": b"a", "second": b"b"}
    save_baseline(run(folder), tmp_path / "base")  # a newer one takes its place
    assert baseline_files(tmp_path / "base")["first | one"].read_bytes() == b"another"
    assert sorted(path.name for path in (tmp_path / "base").iterdir()) == ["0-a.gguf", "1-b.gguf", "baseline.json"]


@pytest.mark.parametrize(
    ("ratio", "states"),
    [
        (1.0, ["ok", "ok", "ok"]),
        (0.985, ["ok", "ok", "ok"]),  # slower, but within 2 %
        (0.9, ["regression", "ok", "ok"]),  # the second's tolerance is 20 %
        (0.7, ["regression", "regression", "regression"]),
        (1.3, ["improvement", "improvement", "improvement"]),
    ],
)
def test_only_what_lies_beyond_the_tolerance_counts(
    folder: Path, speed: Any, tmp_path: Path, ratio: float, states: list[str]
) -> None:
    speed(lambda path, test: 100.0)
    base = save_baseline(run(folder), tmp_path / "base")
    speed(lambda path, test: 100.0 * (1.0 if path.parent == base else ratio))
    report = run(folder, baseline=base)
    assert [result.state for result in report.results] == states
    assert len(report.regressions) == states.count("regression")


def test_small_steps_add_up_to_a_regression(folder: Path, speed: Any, tmp_path: Path) -> None:
    """Each commit is 1.5 % slower than the one before it, within the tolerance of 2 %."""
    now = 100.0
    speeds = {b"a": now}
    speed(lambda path, test: speeds[path.read_bytes()] if path.name.endswith("a.gguf") else 100.0)
    base = save_baseline(run(folder), tmp_path / "base")
    for commit, wanted in ((b"1", "ok"), (b"2", "regression")):
        now *= 0.985
        speeds[commit] = now
        (folder / "a.gguf").write_bytes(commit)
        report = run(folder, baseline=base)
        assert report.results[0].state == wanted
        save_baseline(report, base)
        assert baseline_files(base)["first | one"].read_bytes() == b"a"
    speeds[b"3"] = 110.0
    (folder / "a.gguf").write_bytes(b"3")
    save_baseline(run(folder, baseline=base), base)
    assert baseline_files(base)["first | one"].read_bytes() == b"3"  # what is faster becomes the measure


def test_a_kept_file_keeps_its_suffix_where_the_new_one_is_of_another_kind(
    folder: Path, speed: Any, tmp_path: Path
) -> None:
    speed(lambda path, test: 100.0)
    base = save_baseline(run(folder), tmp_path / "base")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"o")
    (folder / "suite.toml").write_text(SUITE.replace("a.gguf", "onnx"))
    save_baseline(run(folder, baseline=base), base)
    kept = baseline_files(base)["first | one"]
    assert kept.suffix == ".gguf" and kept.read_bytes() == b"a"


def test_it_goes_on_while_the_interval_holds_the_edge() -> None:
    a = [100.0] * 6
    for b, wanted in (
        ([99.0, 98.5, 97.5, 97.0, 98.4, 97.2], True),  # about 2 % slower
        ([90.0, 91.0, 90.5, 89.5, 90.2, 90.8], False),
        ([100.5, 99.5, 100.1, 99.9, 100.2, 99.8], False),
    ):
        assert ci_module.undecided([{"tg8": a}, {"tg8": b}], tolerance=0.02) is wanted
    assert ci_module.undecided([{"tg8": a}], tolerance=0.02) is False


def test_what_is_faster_in_one_test_and_slower_in_another_does_not_become_the_measure(
    folder: Path, speed: Any, tmp_path: Path
) -> None:
    speed(lambda path, test: 100.0)
    base = save_baseline(run(folder), tmp_path / "base")
    factors = {"pp16": 1.5, "tg8": 0.99}
    speed(lambda path, test: 100.0 * (1.0 if path.parent == base else factors[test]))
    (folder / "b.gguf").write_bytes(b"traded")
    report = run(folder, baseline=base)
    assert [result.state for result in report.results] == ["ok", "improvement", "ok"]
    save_baseline(report, base)
    assert baseline_files(base)["second"].read_bytes() == b"b"


def test_what_could_not_be_measured_does_not_lose_the_rest(
    folder: Path, speed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    speed(lambda path, test: 100.0)
    base = save_baseline(run(folder), tmp_path / "base")

    def measured(path: Path, test: str, ratio: float) -> float:
        if path.name.endswith("b.gguf"):
            raise StageFailed("the machine is not quiet")
        return 100.0 if path.parent == base else 100.0 * ratio

    common = ["ci", "--suite", folder / "suite.toml", "--out", tmp_path / "out", "--baseline", base]
    for ratio, ends in ((1.0, StageFailed), (0.5, SystemExit)):
        speed(functools.partial(measured, ratio=ratio))
        with pytest.raises(ends) as caught:
            app([str(argument) for argument in common])
        assert ends is StageFailed or caught.value.code == 1  # type: ignore[union-attr]
        root = Xml.fromstring((tmp_path / "out" / "junit.xml").read_text())
        assert (root.get("tests"), root.get("errors")) == ("2", "1")
        assert "not measured: " in (tmp_path / "out" / "summary.md").read_text()
        record = json.loads((tmp_path / "out" / "results.json").read_text())
        assert "not quiet" in record["failures"]["second"]
    report = run(folder, baseline=base)
    save_baseline(report, base)
    assert baseline_files(base)["second"].read_bytes() == b"b"


def test_an_interval_around_the_edge_is_no_pass(folder: Path, speed: Any, tmp_path: Path) -> None:
    speed(lambda path, test: 100.0)
    base = save_baseline(run(folder), tmp_path / "base")
    turn = itertools.count()
    speed(lambda path, test: 100.0 if path.parent == base else 98.0 + 3 * (-1) ** (next(turn) // 3))
    assert "undecided" in {result.state for result in run(folder, baseline=base).results}


def test_every_form_can_be_read(folder: Path, speed: Any, tmp_path: Path) -> None:
    speed(lambda path, test: 100.0)
    base = save_baseline(run(folder), tmp_path / "base")
    speed(lambda path, test: 100.0 if path.parent == base else 50.0 if test == "tg8" else 100.0)
    report = run(folder, baseline=base)
    written = {path.name: path.read_text() for path in write_all(report, tmp_path / "out")}
    assert list(written) == list(FORMS)

    actions = json.loads(written["github-action-benchmark.json"])
    assert [(item["name"], item["unit"], item["value"]) for item in actions] == [
        ("first | one tg8", "tokens/s", 50.0),
        ("second pp16", "tokens/s", 100.0),
        ("second tg8", "tokens/s", 50.0),
    ]
    metric = json.loads(written["bencher.json"])["second tg8"]["throughput"]
    assert metric == {"value": 50.0, "lower_value": 50.0, "upper_value": 50.0}
    root = Xml.fromstring(written["junit.xml"])
    assert (root.get("tests"), root.get("failures"), root.get("skipped")) == ("3", "2", "0")
    assert [case.get("name") for case in root.iter("testcase") if case.find("failure") is not None] == ["tg8", "tg8"]
    lines = written["summary.md"].splitlines()
    assert len(lines) == 5 and "first \\| one" in lines[2] and "50.0 % [50.0, 50.0]" in lines[2]
    record = json.loads(written["results.json"])
    assert record["results"][0]["comparison"]["ratio"] == pytest.approx(0.5) and record["environment"]["python"]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("rounds = 12", "bench: Field required"),
        ("bench = []", "at least 1 item"),
        (SUITE.replace("rounds = 6", "rounds = 5"), "greater than or equal to 6"),
        (SUITE.replace("second", "first | one"), "'first | one' comes twice"),
        (SUITE + "tolerence = 0.1\n", "Extra inputs"),
        ("[[bench", "not readable TOML"),
    ],
)
def test_a_wrong_suite_is_one_line(folder: Path, text: str, match: str) -> None:
    (folder / "suite.toml").write_text(text)
    with pytest.raises(BadInput, match=match):
        read_suite(folder / "suite.toml")


def test_files_that_are_not_there_or_changed_are_refused(folder: Path, speed: Any, tmp_path: Path) -> None:
    speed(lambda path, test: 100.0)
    base = save_baseline(run(folder), tmp_path / "base")
    (base / "1-b.gguf").write_bytes(b"c")
    with pytest.raises(BadInput, match="'second' is missing or changed"):
        run(folder, baseline=base)
    record = json.loads((base / "baseline.json").read_text())
    record["files"]["second"]["file"] = "../suite/b.gguf"
    (base / "baseline.json").write_text(json.dumps(record))
    with pytest.raises(BadInput, match="'second' is not in the folder"):
        run(folder, baseline=base)
    with pytest.raises(BadInput, match="no such file"):
        run(folder, baseline=tmp_path / "nowhere")
    with pytest.raises(BadInput, match="holds something else"):
        save_baseline(run(folder), folder)
    (folder / "a.gguf").unlink()
    with pytest.raises(BadInput, match=r"'first \| one' is missing"):
        run(folder)


def test_the_command_fails_on_a_regression(
    folder: Path, speed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: object) -> int:
        with pytest.raises(SystemExit) as caught:
            app([str(argument) for argument in arguments])
        return int(caught.value.code or 0)

    common = ["ci", "--suite", folder / "suite.toml", "--out", tmp_path / "out"]
    base = tmp_path / "base"
    speed(lambda path, test: 100.0)
    assert call(*common, "--save-baseline", base) == 0
    assert call(*common, "--baseline", base) == 0
    speed(lambda path, test: 100.0 if path.parent == base else 80.0)
    (folder / "a.gguf").write_bytes(b"slow")
    assert call(*common, "--baseline", base, "--save-baseline", base) == 1
    assert baseline_files(base)["first | one"].read_bytes() == b"a"  # what is slower does not become the measure
    assert "regression: 0.800 of the baseline's speed" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "out" / "junit.xml").is_file()


def test_a_delay_and_another_interpreter_are_measured_for_real(tiny_folder: Path, tmp_path: Path) -> None:
    path = write_gguf(tiny_folder, tmp_path / "tiny.gguf", dtype="F16")
    options: dict[str, Any] = {"n_prompt": 0, "n_gen": 16, "repetitions": 5, "threads": 1, "least_s": 0, "gate_s": None}
    plain, slow = bench(path, **options), bench(path, delay=3.0, python=sys.executable, **options)
    assert plain.tg is not None and slow.tg is not None
    assert max(slow.tg.samples_ts) < 0.5 * max(plain.tg.samples_ts)
    with pytest.raises(BadInput, match=r"no-python: cannot be run as an interpreter"):
        bench(path, python=str(tmp_path / "no-python"), **options)


def test_a_graph_is_named_by_its_folder(folder: Path, speed: Any, tmp_path: Path) -> None:
    (folder / "suite.toml").write_text(SUITE.replace("a.gguf", "onnx/model.onnx"))
    with pytest.raises(BadInput, match=r"names a graph; name the folder"):
        read_suite(folder / "suite.toml")


def test_a_baseline_of_another_form_is_refused(folder: Path, speed: Any, tmp_path: Path) -> None:
    speed(lambda path, test: 100.0)
    base = save_baseline(run(folder), tmp_path / "base")
    record = json.loads((base / "baseline.json").read_text())
    (base / "baseline.json").write_text(json.dumps(record | {"files": {"second": "b.gguf"}}))
    with pytest.raises(BadInput, match="the file of 'second' is not in the folder"):
        baseline_files(base)
