"""The command line as a user meets it: exit codes, one-line errors, output that machines can read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeLlama
from typer.testing import CliRunner

from edgeprune.cli import app, main
from edgeprune.errors import StageFailed
from edgeprune.export.gguf_writer import write_gguf
from edgeprune.output import console, print_table, problem, without_controls
from edgeprune.runtimes.gguf_file import GgufFile


def edgeprune(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, as a shell would."""
    return subprocess.run(
        [sys.executable, "-m", "edgeprune", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"COLUMNS": "160"},
        timeout=300,
        check=False,
    )


def test_every_command_has_help() -> None:
    runner = CliRunner()
    for command in (
        ["fit"],
        ["prune"],
        ["export"],
        ["bench"],
        ["eval"],
        ["inspect"],
        ["predict"],
        ["doctor"],
        ["devices", "list"],
        ["devices", "show"],
    ):
        result = runner.invoke(app, [*command, "--help"])
        assert result.exit_code == 0 and "Usage" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "--device", "rpi55", "--dry-run"], "unknown device 'rpi55'; did you mean 'rpi5'?"),
        (["fit", "--device", "rpi5", "--board", "kitchen", "--dry-run"], "unknown board 'kitchen'"),
        (["fit", "--model", "dmeo", "--device", "rpi5"], "unknown model 'dmeo'; did you mean 'demo'?"),
        (["fit", "--device", "rpi5", "--quant", "Q4_O"], "unknown quantisation 'Q4_O'; did you mean 'Q4_0'?"),
        (["fit", "--device", "rpi5", "--runtime", "lamacpp"], "did you mean 'llamacpp'?"),
        (["fit", "--device", "rpi5", "--runtime", "onnxruntime", "--quant", "Q4_0"], "no quantisation of --quant"),
        (["fit", "--device", "rpi5", "--min-tps", "-3"], "--min-tps"),
        (["fit", "--device", "rpi5", "--max-time", "soon"], "--max-time"),
        (["fit", "--device", "rpi5", "--ratios", "0.1,many"], "--ratios"),
        (["fit", "--device", "rpi5", "--dry-run", "--ratios", "0.1"], "obs finds the shares itself"),
        (["prune", "demo", "--ratio", "20", "--out", "x"], "ratio 20 is not in [0, 1)"),
        (["prune", "demo", "--ratio", "0.2", "--corpus", "none.txt", "--out", "x"], "none.txt: no such file or folder"),
        (["export", "demo", "--quant", "Q4_0", "--context", "64", "--out", "x.gguf"], "Q4_0 is not made for a context"),
        (["fit", "--device", "rpi5", "--to", "android", "--to", "android:onnx"], "would be one folder"),
        (["prune", "runs/last/model", "--ratio", "0.1", "--out", "x"], "runs/last/model: no such file or folder"),
        (["prune", "demo-", "--ratio", "0.1", "--out", "x"], "did you mean 'demo'?"),
        (["bench", "nowhere.gguf"], "no such file"),
        (["eval", "nowhere.gguf"], "nothing to judge on"),
        (["eval", "nowhere.gguf", "--reference", "demo"], "nowhere.gguf: no such file"),
        (["compare", "nowhere.gguf", "nowhere.gguf"], "nowhere.gguf: no such file"),
        (["predict", "nowhere.gguf", "--device", "rpi5"], "nowhere.gguf: no such file"),
        (["prune", "demo", "--ratio", "0.1", "--calibration", "my/texts.txt", "--out", "x"], "no file my/texts.txt"),
        (["distill", "nowhere.jsonl", "--tokens", "1k", "--out", "x.jsonl"], "nowhere.jsonl: no such file"),
        (["eval", "x.gguf", "--text", "x.txt", "--windows", "4"], "--windows: without a reference all of the text is"),
        (["eval", "x.gguf", "--text", "x.txt", "--limit", "4"], "--limit: no tasks to take items of"),
        (["inspect", "nowhere"], "no such file"),
        (["inspect", "n" * 300], "a name longer than this system takes"),
        (["fit", "--device", "rpi5", "--model", "n" * 300], "a name longer than this system takes"),
        (["export", "demo", "--quant", "int4", "--out", "x.gguf"], "needs a folder"),
        (["export", "demo", "--quant", "Q4_0", "--out", "x"], "ends in .gguf"),
        (["export", "demo", "--quant", "Q4_0", "--out", "x.gguf", "--exporter", "optimun"], "did you mean 'optimum'?"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = edgeprune(*arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_what_nothing_foresaw_is_no_regression(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 is that of `ci`."""

    def broken(_arguments: list[str]) -> None:
        raise AttributeError("no such thing")

    monkeypatch.setattr("edgeprune.cli.app", broken)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 4
    told = capsys.readouterr().err
    assert "AttributeError: no such thing" in told and "a bug of edgeprune" in told


@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_closed_stream_changes_no_outcome(closed: str) -> None:
    command = f'"{sys.executable}" -m edgeprune predict --params 1e9 --layers 16 --quant Q4_0:imatrix --device rpi5'
    done = subprocess.run(["sh", "-c", f"{command} {closed}>&-"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ("decode" in done.stdout) == (closed != "1")


def test_what_the_output_cannot_write_is_a_question_mark() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgeprune", "devices", "show", "rpi5"],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        check=False,
    )
    assert done.returncode == 0 and b"?" in done.stdout, done.stderr


def test_a_narrow_terminal_cuts_no_number(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    name = "15.4 % pruned, IQ4_NL:embed=IQ4_NL:head=IQ4_NL:imatrix on llamacpp"
    header = ("candidate", "predicted tokens/s", "measured tokens/s", "predicted MiB", "measured MiB", "KL, nats")
    row = [name, "151.8 (102–225)", "149.25", "224 (214–244)", "231", "0.3932 (0.353–0.433)"]
    for width in (60, 80, 100, 240):
        monkeypatch.setattr(console, "_width", width)
        print_table("Measured candidates", header, [row])
        told = capsys.readouterr().out
        assert max(map(len, told.splitlines())) <= width
        assert all(number in told for cell in row[1:] for number in cell.split()), width


def test_a_home_folder_after_an_equals_sign(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "edgeprune", "export", tiny_folder, "--quant=F16", "--out=~/there/tiny.gguf"],
        cwd=tmp_path,
        capture_output=True,
        env=os.environ | {"HOME": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "there" / "tiny.gguf").is_file() and not (tmp_path / "~").exists()


def test_what_is_measured_is_told_whatever_stops_the_rest(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeprune.runtimes import bench as module

    real = module.bench

    def noisy(path: Path, **options: Any) -> Any:
        if path.name == "second":
            raise StageFailed("noisy: the machine is busy", where=path)
        return real(path, **options)

    monkeypatch.setattr(module, "bench", noisy)
    arguments = ["bench", str(tiny_folder), "second", "-p", "0", "-n", "4", "-r", "1", "--least", "0.01s", "--no-gate"]
    result = CliRunner().invoke(app, [*arguments, "-o", "json"])
    assert isinstance(result.exception, StageFailed)
    (record,) = json.loads(result.stdout)
    assert record["avg_ts"] > 0


def test_hostile_files_are_one_line(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 64)
    (tmp_path / "bad.toml").write_text("name = [")
    onnx = tmp_path / "onnx"
    onnx.mkdir()
    (onnx / "model.onnx").write_bytes(b"\x0a\xff\xff\xff\xff\x7f")
    for arguments in (
        ["inspect", tmp_path / "bad.gguf"],
        ["bench", tmp_path / "bad.gguf", "-p", "8", "-n", "8"],
        ["fit", "--model", tmp_path / "bad.gguf", "--device", "rpi5"],
        ["inspect", onnx],
        ["bench", onnx, "-p", "8", "-n", "8"],
        ["fit", "--device", tmp_path / "bad.toml", "--model", tiny_folder],
    ):
        result = edgeprune(*arguments, cwd=tmp_path)
        assert result.returncode == 2, (arguments, result.stderr)
        # What it was about to do may stand before; then one line, and nothing of Python's.
        assert [line.startswith("error: ") for line in result.stderr.splitlines()].count(True) == 1, result.stderr
        assert result.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in result.stderr


def test_a_demos_name_stands_for_its_file(demo_gguf: Path, tmp_path: Path) -> None:
    found = edgeprune("inspect", "demo", "--json", cwd=tmp_path)
    assert json.loads(found.stdout)["path"] == str(demo_gguf), found.stderr
    predicted = edgeprune("predict", "demo", "--device", "rpi5", cwd=tmp_path)
    assert predicted.returncode == 0 and "tokens/s" in predicted.stdout, predicted.stderr
    (tmp_path / "demo").mkdir()
    assert edgeprune("inspect", "./demo", cwd=tmp_path).stderr.startswith("error: demo: not a model")


def test_a_budget_nothing_meets_is_exit_code_3(tiny_folder: Path, tmp_path: Path) -> None:
    result = edgeprune(
        "fit", "--model", tiny_folder, "--device", "rpi5", "--min-tps", "9e7", "--context", "128", cwd=tmp_path
    )
    assert result.returncode == 3
    assert "nothing fits rpi5; the nearest is" in result.stderr and "predicted" in result.stderr


def test_dry_run_prints_the_plan_and_writes_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    result = edgeprune(
        "fit", "--model", tiny_folder, "--device", "rpi5", "--context", "128", "--dry-run", "--json", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    candidates = json.loads(result.stdout)
    assert {"predicted", "fits", "reasons"} <= candidates[0].keys()
    assert "budget" in result.stderr and "time    about" in result.stderr
    assert not list(tmp_path.iterdir())


def test_prune_export_inspect_eval_and_bench_stand_alone(
    make_llama: MakeLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_llama(max_position_embeddings=512)
    text = tmp_path / "text.txt"
    text.write_text("The kettle sings before the water boils, and nobody listens to it at all. " * 60)
    pruned = tmp_path / "pruned"
    done = edgeprune("prune", source, "--ratio", "0.2", "--out", pruned, "--calibration", text, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["asked_ratio"] == 0.2 and 0.2 <= summary["reached_ratio"] < 0.3 and summary["align"] == 32

    for quant, out in (("Q8_0", "model.gguf"), ("int8", "onnx")):
        done = edgeprune("export", pruned, "--quant", quant, "--out", tmp_path / out)
        assert done.returncode == 0, done.stderr
        found = edgeprune("inspect", tmp_path / out, "--json")
        assert [layer["neurons"] for layer in json.loads(found.stdout)["layers"]] == summary["neurons"], found.stderr

    judged = edgeprune(
        "eval", tmp_path / "model.gguf", "--reference", source, "--text", text, "--windows", 4, "--length", 64, "--json"
    )
    assert judged.returncode == 0, judged.stderr
    quality = json.loads(judged.stdout)["quality"]
    assert quality["kl_nats"]["mean"] > 0 and quality["measured_on"]["runtime"] == "llamacpp"

    speed = edgeprune(
        "bench",
        tmp_path / "model.gguf",
        "-p",
        16,
        "-n",
        8,
        "-r",
        2,
        "-t",
        1,
        "--least",
        "0.001s",
        "--no-gate",
        "--sustained",
        "0.5s",
        "--output",
        "json",
    )
    assert speed.returncode == 0, speed.stderr
    records = json.loads(speed.stdout)
    assert [(r["n_prompt"], r["n_gen"]) for r in records] == [(16, 0), (0, 8)]
    assert all(r["avg_ts"] > 0 and len(r["samples_ts"]) >= 2 and not r["gated"] for r in records)
    assert records[0]["sustained"] is None and records[1]["sustained"]["s"] >= 0.5


def test_devices() -> None:
    listed = edgeprune("devices", "list", "--json")
    assert "rpi5" in {profile["name"] for profile in json.loads(listed.stdout)}
    shown = edgeprune("devices", "show", "rpi5")
    assert shown.returncode == 0 and "published" in shown.stdout and "decode.cpu.gbs" in shown.stdout


def test_doctor_reports_json() -> None:
    result = edgeprune("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(result.stdout)}
    assert result.returncode == (4 if any(c["ok"] is False for c in checks.values()) else 0)
    assert len(checks) > 5


def test_a_board_needs_no_torch(tmp_path: Path) -> None:
    """The command line and every runtime but torch's own import where torch and transformers are not installed."""
    script = """
import sys
for name in ("torch", "transformers", "safetensors", "onnx", "gguf"):
    sys.modules[name] = None
import edgeprune.cli, edgeprune.runtimes.bench, edgeprune.runtimes.llamacpp, edgeprune.runtimes.ort
import edgeprune.runtimes.gguf_file, edgeprune.runtimes.onnx_file, edgeprune.runtimes.records
from edgeprune import Budget, DeviceProfile
from edgeprune.errors import BadInput
from edgeprune.models import load
try:
    load(sys.argv[1])
except BadInput as error:
    print(error)
sys.argv[1:] = ["fit", "--model", sys.argv[1], "--device", "rpi5"]
edgeprune.cli.main()
"""
    source = tmp_path / "board.py"
    source.write_text(script)
    from conftest import save_llama

    folder = save_llama(tmp_path / "llama")
    result = subprocess.run([sys.executable, source, folder], capture_output=True, text=True, check=False)
    assert result.stdout.count('pip install "edgeprune[prune]"') == 1
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count('pip install "edgeprune[prune]"') == 1


def test_an_interrupt_inside_a_callback_of_a_c_library_is_not_lost() -> None:
    script = """
import ctypes, os, signal, time
from edgeprune.cli import keep_interrupts

signal.signal(signal.SIGINT, signal.default_int_handler)
keep_interrupts()
ctypes.CFUNCTYPE(None)(lambda: os.kill(os.getpid(), signal.SIGINT))()
try:
    time.sleep(20)
    print("lost")
except KeyboardInterrupt:
    print("kept")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "kept\n"


def test_an_interrupted_fit_goes_on_where_it_stopped(tiny_folder: Path, tmp_path: Path) -> None:
    """Ctrl-C once the first trial is on disk: exit code 130, one line; the next run keeps that trial."""
    command = ["fit", "--model", tiny_folder, "--device", "rpi5", "--context", "128", "--out", "run", "--quant"]
    (tmp_path / "text.txt").write_text("The kettle sings before the water boils, and nobody listens. " * 800)
    first = subprocess.Popen(
        [sys.executable, "-m", "edgeprune", *map(str, command), "F32,F16,Q8_0,Q4_0", "--held-out", "text.txt"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs in the background hands down ignored interrupts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    log = tmp_path / "run" / "trials.jsonl"
    deadline = time.monotonic() + 200
    while not (log.exists() and log.read_text().count("\n")) and first.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=60)
    assert first.returncode == 130, said
    assert "interrupted; run the same command again" in said and "Traceback" not in said
    kept = log.read_text().splitlines()
    assert not (tmp_path / "run" / "fit.json").exists()
    again = edgeprune(*command, "F32,F16,Q8_0,Q4_0", "--held-out", "text.txt", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert log.read_text().splitlines()[: len(kept)] == kept
    assert len(log.read_text().splitlines()) == 4


def test_a_files_text_cannot_steer_the_terminal(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_gguf(tiny_folder, tmp_path / "m.gguf")
    data = file.read_bytes()
    name = GgufFile(file).metadata["general.name"].encode()
    hostile = b"\x1b]0;T\x07\x1b[2J".ljust(len(name), b"x")[: len(name)]
    file.write_bytes(data.replace(name, hostile, 1))
    shown = edgeprune("inspect", str(file))
    assert "\x1b" not in shown.stdout + shown.stderr
    problem("of a \x1b[31mfile")
    assert "of a \\x1b[31mfile" in capsys.readouterr().err
    assert without_controls("a\x1b[2J\tb\nc\x9b") == "a[2J\tb\nc"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["fit", "--device", "rpi5", "--to", "transformers.js:q5"], "unknown option of transformers.js 'q5'"),
        (["fit", "--device", "rpi5", "--quant", "Q8_0", "--to", "onnxruntime-genai"], "needs a file for onnxruntime"),
        (["recover", "a", "--teacher", "b", "--out", "c", "--rate", "-1"], "a rate of -1"),
        (["recover", "a", "--teacher", "b", "--out", "c", "--rate", "nan"], "a rate of nan"),
    ],
)
def test_what_cannot_work_is_told_before_the_work(arguments: list[str], told: str) -> None:
    done = edgeprune(*arguments)
    assert done.returncode == 2 and told in done.stderr and not done.stdout
