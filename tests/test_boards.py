"""A board behind a real sshd on loopback: files arrive whole, measurements survive a broken link, nothing is left."""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import psutil
import pytest
from conftest import save_llama
from typer.testing import CliRunner

from edgeprune.boards import device_of, find_board, read_boards
from edgeprune.cli import app
from edgeprune.devices import Budget
from edgeprune.errors import BadInput, StageFailed
from edgeprune.export.gguf_writer import write_gguf
from edgeprune.fitting import fit
from edgeprune.lab import run_matrix, to_markdown
from edgeprune.quality import Quality, evaluate
from edgeprune.reference import make_reference
from edgeprune.runtimes import agent, ssh
from edgeprune.runtimes.bench import bench
from edgeprune.runtimes.board_setup import requirements, setup
from edgeprune.runtimes.racing import Arm
from edgeprune.runtimes.ssh import Board, Link, LinkBroken, code
from edgeprune.runtimes.tuning import Tuned

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Board, psutil.Process]]:
    """A board on loopback with keys of its own, and its sshd."""
    if SSHD is None:
        pytest.skip("no sshd on this machine (Debian: openssh-server)")
    folder = tmp_path_factory.mktemp("sshd")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd of root locks itself in
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\n"
        f"StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin yes\nPidFile {folder}/pid\n"
    )
    (folder / "ssh_config").write_text(
        f"IdentityFile {folder}/user\nIdentitiesOnly yes\nUserKnownHostsFile {folder}/known_hosts\n"
    )
    key = (folder / "host.pub").read_text().split()[:2]
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {' '.join(key)}\n")
    daemon = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=subprocess.DEVNULL)
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    board = Board.of(
        f"ssh://{getpass.getuser()}@127.0.0.1:{port}",
        folder=str(folder / "board"),
        python=sys.executable,
        ssh_config=folder / "ssh_config",
    )
    yield board, psutil.Process(daemon.pid)
    daemon.terminate()
    daemon.wait()


@pytest.fixture
def board(server: tuple[Board, psutil.Process], tmp_path: Path) -> Board:
    """The board with an empty folder of this test's own."""
    return replace(server[0], folder=str(tmp_path / "board"))


@pytest.fixture(scope="module")
def model(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny_folder, tmp_path_factory.mktemp("model") / "tiny.gguf", dtype="F16")


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "PAUSES_S", (0.1,) * 8)


def left_in(board: Board) -> list[str]:
    """What there is in the agent's folder but files, the code and the lock."""
    root = Path(board.folder)
    return sorted(str(path.relative_to(root)) for name in ("jobs",) for path in (root / name).iterdir())


# Addresses


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("ssh://pi@raspberrypi.local", "ssh://pi@raspberrypi.local"),
        ("ssh://raspberrypi.local:2222/", "ssh://raspberrypi.local:2222"),
        ("ssh://10.0.0.7", "ssh://10.0.0.7"),
    ],
)
def test_addresses(url: str, shown: str) -> None:
    board = Board.of(url)
    assert str(board) == shown
    command = board.command(["echo", "a b; rm -rf ~"])
    assert command[-3:] == ["--", board.host, "echo 'a b; rm -rf ~'"]
    assert "StrictHostKeyChecking=yes" in command and "BatchMode=yes" in command


@pytest.mark.parametrize(
    "url",
    [
        "raspberrypi.local",
        "http://raspberrypi.local",
        "ssh://",
        "ssh://-oProxyCommand=touch%20x",
        "ssh://-oProxyCommand",
        "ssh://pi@host:99999",
        "ssh://pi@host/folder",
        "ssh://a b@host",
        "ssh://-l@host",
        "ssh://pi:secret@host",
    ],
)
def test_wrong_addresses_are_refused_and_secrets_not_repeated(url: str) -> None:
    with pytest.raises(BadInput, match=r"no address|no name|passwords") as caught:
        Board.of(url)
    assert "secret" not in str(caught.value)


# Files


def test_a_file_arrives_once_and_a_half_one_goes_on(board: Board, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    file = tmp_path / "weights.gguf"
    file.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    blobs = Path(board.folder) / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{digest}.part").write_bytes(data[: 2 << 20])
    told: list[dict[str, Any]] = []
    there = Link(board).send(file, told.append)
    assert Path(there).read_bytes() == data and Path(there).name == "weights.gguf"
    assert [(t["stage"], t["done"], t["total"]) for t in told] == [("sending weights.gguf", 2, 3)]
    assert sorted(path.name for path in blobs.iterdir()) == [digest]
    before = (blobs / digest).stat().st_mtime_ns
    assert Link(board).send(file) == there and (blobs / digest).stat().st_size == len(data)
    assert (blobs / digest).stat().st_mtime_ns >= before  # used again: the last to be removed


def test_a_damaged_beginning_is_sent_anew(board: Board, tmp_path: Path) -> None:
    file = tmp_path / "weights.gguf"
    file.write_bytes(b"right" * 1000)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    blobs = Path(board.folder) / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{digest}.part").write_bytes(b"wrong" * 10)
    assert Path(Link(board).send(file)).read_bytes() == file.read_bytes()


def test_a_folder_keeps_its_names_and_the_cache_its_bound(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []
    for i in range(3):
        folder = tmp_path / f"onnx{i}"
        (folder / "sub").mkdir(parents=True)
        (folder / "model.onnx").write_bytes(bytes([i]) * 1000)
        (folder / "sub" / "shared.json").write_bytes(b"{}" * 100)
        folders.append(folder)
    monkeypatch.setattr(ssh, "CACHE_BYTES", 2500)
    link = Link(board)
    places = [Path(link.send(folder)) for folder in folders]
    assert not places[0].exists()  # the oldest made room
    for place, folder in list(zip(places, folders, strict=True))[1:]:
        assert (place / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()
        assert (place / "sub" / "shared.json").read_bytes() == b"{}" * 100
    kept = sum(path.stat().st_size for path in (Path(board.folder) / "blobs").iterdir())
    assert kept == 2200


def test_the_agent_keeps_to_its_folder(board: Board) -> None:
    link = Link(board)
    for manifest in (b'{"../evil": "%s"}' % (b"0" * 64), b'{"/etc/evil": "%s"}' % (b"0" * 64)):
        with pytest.raises(BadInput, match="outside of its folder"):
            link.agent("tree", send=manifest)
    with pytest.raises(BadInput, match="is no hash"):
        link.agent("have", "../../etc/passwd")
    with pytest.raises(BadInput, match="will not run"):
        link.run("os:system", {"command": "true"}, timeout_s=10)
    assert Path(board.folder).stat().st_mode & 0o077 == 0


# Measurements


def test_a_file_is_measured_and_judged_there(board: Board, model: Path, tiny_folder: Path, tmp_path: Path) -> None:
    link = Link(board)
    told: list[dict[str, Any]] = []
    result = bench(
        model,
        n_prompt=8,
        n_gen=4,
        repetitions=2,
        threads=1,
        least_s=0,
        gate_s=None,
        execute=link.run,
        progress=told.append,
    )
    assert result.status == "ok" and [record.test for record in result.records] == ["pp8", "tg4"]
    assert result.peak_mib and [t["done"] for t in told if t["stage"] == "tg4"] == [1, 2]

    text = "The kettle sings before the water boils, and nobody listens to it at all. " * 30
    reference = make_reference(
        tiny_folder, text, tmp_path / "references", model_hash="m", length=32, count=3, threads=1, timeout_s=120
    )
    there = evaluate(model, reference, threads=1, timeout_s=120, execute=link.run)
    here = evaluate(model, reference, threads=1, timeout_s=120)
    assert isinstance(there, Quality) and there.top1 == here.top1
    assert there.kl_nats.mean == pytest.approx(here.kl_nats.mean, rel=1e-3) and there.text == here.text
    assert left_in(board) == []


def test_what_goes_wrong_there_is_told_as_if_it_were_here(board: Board, model: Path, tmp_path: Path) -> None:
    link = Link(board)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 64)
    with pytest.raises(BadInput, match=r"ssh://.*bad\.gguf"):
        bench(tmp_path / "bad.gguf", threads=1, execute=link.run)
    slow = bench(model, n_prompt=0, n_gen=4, threads=1, timeout_s=0.05, gate_s=None, execute=link.run)
    assert slow.status == "timeout"
    assert left_in(board) == []


def test_a_measurement_survives_a_broken_link(server: tuple[Board, psutil.Process], board: Board, model: Path) -> None:
    link = Link(board)
    told: list[int] = []
    broken = 0

    def progress(report: dict[str, Any]) -> None:
        nonlocal broken
        if report["stage"] != "tg16":
            return
        told.append(report["done"])
        if len(told) in (2, 5):
            broken += 1
            for session in server[1].children(recursive=True):
                if "sshd" in session.name():
                    session.kill()

    result = bench(
        model,
        n_prompt=0,
        n_gen=16,
        repetitions=8,
        threads=1,
        least_s=1.0,
        gate_s=None,
        execute=link.run,
        progress=progress,
    )
    assert result.status == "ok" and result.tg is not None and broken == 2
    assert told == list(range(1, len(result.tg.samples_ns) + 1))  # each repetition is told once, none is made again
    assert left_in(board) == []


def test_a_result_waits_for_whoever_lost_the_link(
    server: tuple[Board, psutil.Process], board: Board, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"n_prompt": 0, "n_gen": 4, "repetitions": 1, "threads": 1, "least_s": 0, "gate_s": None}
    with monkeypatch.context() as broken:
        broken.setattr(Link, "_follow", lambda *_: (_ for _ in ()).throw(LinkBroken("gone", where="board")))
        with pytest.raises(StageFailed, match="gone"):
            bench(model, execute=Link(board).run, **options)
    (job,) = (Path(board.folder) / "jobs").iterdir()
    for _ in range(200):
        if "outcome" in (job / "events.jsonl").read_text():
            break
        time.sleep(0.05)
    kept = (job / "events.jsonl").read_text()
    result = bench(model, execute=Link(board).run, **options)
    assert result.tg is not None and str(result.tg.samples_ns[0]) in kept  # the same measurement, not another
    assert left_in(board) == []


def test_an_interrupt_ends_the_job_there(board: Board, model: Path) -> None:
    def interrupt(report: dict[str, Any]) -> None:
        if report["stage"] == "tg16":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(
            model,
            n_prompt=0,
            n_gen=16,
            repetitions=1000,
            threads=1,
            least_s=60.0,
            gate_s=None,
            execute=Link(board).run,
            progress=interrupt,
        )
    assert left_in(board) == []
    workers = [p for p in psutil.process_iter(["cmdline"]) if board.folder in " ".join(p.info["cmdline"] or [])]
    assert workers == []


# By name, in commands


@pytest.fixture
def named(board: Board, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The board's name in the user's file."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    file = tmp_path / "config" / "edgeprune" / "boards.toml"
    file.parent.mkdir(parents=True)
    file.write_text(
        f'[loop]\nurl = "{board}"\nfolder = "{board.folder}"\npython = "{board.python}"\n'
        f'ssh_config = "{board.ssh_config}"\nthreads = 1\n'
    )
    return "loop"


def test_boards_are_listed(named: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    call("boards", "list", "--json")
    assert list(json.loads(capsys.readouterr().out)) == [named]
    monkeypatch.setenv("XDG_CONFIG_HOME", "/nowhere")
    call("boards", "list")
    assert "no boards yet" in capsys.readouterr().out


def call(*arguments: object) -> None:
    with pytest.raises(SystemExit) as caught:
        app([str(argument) for argument in arguments])
    assert caught.value.code in (0, None)


def test_commands_on_a_board(
    named: str, board: Board, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("boards", "check", named, "--json")
    told = json.loads(capsys.readouterr().out)
    assert (
        1 <= told["cores"] <= (os.cpu_count() or 1) and "numpy" in told["packages"] and told["state"]["total_mib"] > 0
    )
    call("bench", model, "-p", 0, "-n", 4, "-r", 1, "--least", "0.01s", "--no-gate", "--board", named, "-o", "json")
    (record,) = json.loads(capsys.readouterr().out)
    assert record["n_threads"] == 1 and record["avg_ts"] > 0
    text = tmp_path / "text.txt"
    text.write_text("The kettle sings before the water boils, and nobody listens to it at all. " * 20)
    call("eval", model, "--text", text, "--length", 32, "--board", named, "--json")
    assert json.loads(capsys.readouterr().out)["quality"]["bits_per_byte"] > 0
    assert [path.name for path in (Path(board.folder) / "blobs").iterdir()]
    call("boards", "clean", named)
    assert "removed 1 files; 0.0 MiB are kept" in capsys.readouterr().out


@pytest.mark.usefixtures("short_fit")
def test_fit_measures_and_judges_its_candidates_there(
    named: str, board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_llama(tmp_path / "llama", intermediate_size=512, max_position_embeddings=512)
    options: dict[str, Any] = {"targets": ["Q8_0"], "method": "amp", "ratios": (0.0, 0.2), "threads": 1, "gate_s": None}
    found = Tuned(Arm(tmp_path, 1, {"flash_attn": False}), ())
    monkeypatch.setattr("edgeprune.fitting.tune", lambda path, **_: found)  # tests/test_racing.py tunes
    result = fit(folder, "rpi5", Budget(context=64), out=tmp_path / "run", board=named, **options)
    assert result.trial.speed["tg128"]["median_ts"] > 0  # of a device that is not this machine: it was measured
    record = json.loads((tmp_path / "run" / "fit.json").read_text())
    assert record["device"]["name"] == "rpi5" and f"--board {named}" in record["commands"]["again"]
    assert sorted(path.name for path in (Path(board.folder) / "trees").iterdir())
    bundle = json.loads((tmp_path / "run" / "best" / "bundle.json").read_text())
    assert (bundle["threads"], bundle["settings"]) == (1, {"flash_attn": False})
    assert left_in(board) == []
    again = fit(folder, "rpi5", Budget(context=64), out=tmp_path / "run", **options)  # no board: predicted only
    assert again.trial.speed == {}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[pi]\nurl = 'http://pi'", "no address of a board"),
        ("[pi]\nurl = 'ssh://pi'\nport = 3", "Extra inputs"),
        ("['p i']\nurl = 'ssh://pi'", "match pattern"),
        ("", "no boards in it"),
        ("[pi", "not readable TOML"),
    ],
)
def test_a_wrong_file_of_boards_is_one_line(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "lab.toml").write_text(text)
    with pytest.raises(BadInput, match=match):
        read_boards(tmp_path / "lab.toml")


def test_an_unknown_name_names_the_known(named: str) -> None:
    with pytest.raises(BadInput, match="did you mean 'loop'"):
        find_board("lop")


def test_the_entry_says_which_device_it_is(named: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="loop: which device the board is, nothing says; add --device"):
        device_of(named)
    with pytest.raises(BadInput, match="which device the board is"):
        CliRunner().invoke(app, ["devices", "measure", "--board", named, "--name", "mine"], catch_exceptions=False)
    with (tmp_path / "config" / "edgeprune" / "boards.toml").open("a") as file:
        file.write('device = "rpi5"\n')
    assert device_of(named) == "rpi5" and device_of(None) == "host"
    with pytest.raises(BadInput, match="a board's profile needs a name; add --name NAME"):
        CliRunner().invoke(app, ["devices", "measure", "--board", named], catch_exceptions=False)


# A lab


@pytest.fixture
def lab(board: Board, tmp_path: Path) -> Path:
    """A file with the board under two names, and one that is not there."""
    rest = f'folder = "{board.folder}"\npython = "{board.python}"\nssh_config = "{board.ssh_config}"\nthreads = 1\n'
    path = tmp_path / "lab.toml"
    path.write_text(f'[one]\nurl = "{board}"\n{rest}[two]\nurl = "{board}"\n{rest}[gone]\nurl = "ssh://127.0.0.1:1"\n')
    return path


LAB: dict[str, Any] = {"n_prompt": 0, "n_gen": 4, "repetitions": 1, "least_s": 0, "gate_s": None, "threads": None}


def test_a_matrix_of_files_and_boards(lab: Path, model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    shutil.copy(model, other)
    cells = run_matrix([model, other], read_boards(lab), LAB)
    assert [(cell.board, cell.file, cell.status) for cell in cells] == [
        ("one", "tiny.gguf", "ok"),
        ("one", "other.gguf", "ok"),
        ("two", "tiny.gguf", "ok"),
        ("two", "other.gguf", "ok"),
        ("gone", "tiny.gguf", "failed"),
        ("gone", "other.gguf", "failed"),
    ]
    assert all(cell.records[0].avg_ts > 0 for cell in cells[:4]) and "the link is down" in (cells[4].reason or "")
    table = to_markdown(cells).splitlines()
    assert len(table) == 8 and table[2].startswith("| one | tiny.gguf | tg4 |") and "failed: " in table[-1]
    with pytest.raises(BadInput, match="two files have the same name"):
        run_matrix([model, model], read_boards(lab), LAB)


def test_a_matrix_through_a_scheduler(lab: Path, model: Path) -> None:
    distributed = pytest.importorskip("distributed")
    boards = {name: entry for name, entry in read_boards(lab).items() if name != "gone"}
    options: dict[str, Any] = {"n_workers": 1, "threads_per_worker": 2, "processes": False, "dashboard_address": None}
    with distributed.LocalCluster(**options, resources={"board:one": 1, "board:two": 1}) as cluster:
        cells = run_matrix([model], boards, LAB, scheduler=cluster.scheduler_address)
        assert [(cell.board, cell.status) for cell in cells] == [("one", "ok"), ("two", "ok")]
        assert all(cell.records[0].n_gen == 4 for cell in cells)
        with pytest.raises(BadInput, match=r"no worker has the board 'gone'; .*--resources \"board:gone=1\""):
            run_matrix([model], read_boards(lab), LAB, scheduler=cluster.scheduler_address)


# Refusals


def test_an_unknown_host_key_is_refused(board: Board, tmp_path: Path) -> None:
    assert board.ssh_config is not None
    text = board.ssh_config.read_text()
    config = tmp_path / "ssh_config"
    config.write_text(text.replace("UserKnownHostsFile ", "UserKnownHostsFile /dev/null\n# "))
    with pytest.raises(StageFailed, match="the host's key is not known"):
        Link(replace(board, ssh_config=config)).agent("hello")
    config.write_text(text.replace("IdentityFile ", "IdentityFile /dev/null\n# "))
    with pytest.raises(StageFailed, match="no key of yours is taken there; ssh-copy-id"):
        Link(replace(board, ssh_config=config)).agent("hello")


def test_a_board_that_is_not_set_up_or_not_there(board: Board) -> None:
    with pytest.raises(StageFailed, match="not set up; edgeprune boards setup ssh://"):
        Link(replace(board, python=None)).agent("hello")
    with pytest.raises(LinkBroken, match="the link is down"):
        Link(replace(board, port=1)).agent("hello")


# Setting up


def tiny_wheel(folder: Path, name: str, version: str) -> Path:
    """A wheel with one empty module."""
    info = f"{name}-{version}.dist-info"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


def test_setting_up_from_wheels_and_once(board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprune.runtimes.ssh._UNPACK", "import sys; sys.stdin.read()")  # no numpy there: no agent
    monkeypatch.setattr(Link, "agent", lambda self, command: {"asked": command})
    call = Link.call  # a shell there that greets
    monkeypatch.setattr(Link, "call", lambda self, *a, **k: "Welcome!\n" + call(self, *a, **k))
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    fresh = replace(board, python=None)
    with pytest.raises(BadInput, match="no wheels there"):
        setup(Link(fresh), ["tinypkg==1.0"], wheels=wheels)
    tiny_wheel(wheels, "tinypkg", "1.0")
    said: list[str] = []
    assert setup(Link(fresh), ["tinypkg==1.0"], wheels=wheels, say=said.append) == {"asked": "hello"}
    assert said[-1] == "installing tinypkg==1.0"
    there = Path(fresh.folder)
    assert subprocess.run([there / "venv/bin/python", "-c", "import tinypkg"], check=False).returncode == 0
    assert not (there / "wheels").exists()
    said.clear()
    setup(Link(fresh), ["tinypkg==1.0"], wheels=wheels, say=said.append)
    assert said == ["it is set up already"]
    with pytest.raises(StageFailed, match="No matching distribution found for other"):
        setup(Link(fresh), ["other==2.0"], wheels=wheels)


def test_a_shell_that_greets(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = [sys.executable, "-c", "print('Welcome!'); print('{\"progress\": 1}'); print('{\"outcome\": 2}')"]
    monkeypatch.setattr(Board, "command", lambda self, remote: talk)
    assert list(Link(board)._lines(["follow"])) == [{"progress": 1}, {"outcome": 2}]


def test_a_graph_is_sent_with_its_weights(board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "onnx"
    folder.mkdir()
    for name in ("tokenizer.json", "genai_config.json", "letters.txt"):
        (folder / name).write_text(name)
    graph = onnx.helper.make_graph([], "g", [], [], [onnx.helper.make_tensor("w", 1, [4], bytes(16), raw=True)])
    onnx.save_model(
        onnx.helper.make_model(graph),
        folder / "model.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    sent: list[str] = []

    def answer(self: Link, *command: str, send: bytes = b"") -> dict[str, Any]:
        if command[0] == "tree":
            sent.extend(json.loads(send))
            return {"path": "/there/tree"}
        return {digest: {"complete": True} for digest in command[1:]}

    monkeypatch.setattr(Link, "agent", answer)
    assert Link(board).send(folder / "model.onnx") == "/there/tree/model.onnx"
    assert sorted(sent) == ["genai_config.json", "model.onnx", "tokenizer.json", "weights.bin"]  # and nobody's letters
    (folder / "secret").symlink_to(tmp_path)
    (tmp_path / "key").write_text("key")
    (folder / "key").symlink_to(tmp_path / "key")
    with pytest.raises(BadInput, match="a link that leaves the folder is not sent"):
        Link(board).send(folder)


@pytest.mark.parametrize(
    "line", ["{bad", "5", '{"error": {}}', '{"error": 7}', "[" * 100_000, '{"outcome": {"status": "ok"}}', "{}"]
)
def test_whatever_a_board_says_is_one_line(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.setattr(Link, "prepare", lambda self: None)
    monkeypatch.setattr(Board, "command", lambda self, remote: [sys.executable, "-c", f"print({line!r})"])
    with pytest.raises(StageFailed):
        Link(Board.of("ssh://pi@board")).run("edgeprune.quality:evaluate_in_process", {}, timeout_s=1)


def test_an_upload_asked_for_while_the_last_one_writes_is_no_error(tmp_path: Path) -> None:
    store = agent.Store(tmp_path)
    store.part("a" * 64).write_bytes(b"123")
    assert agent.receive(store, "a" * 64, "9", "2") == {"bytes": 3, "complete": False}


def test_cores_of_the_fastest_kind_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ["0xd05"] * 4 + ["0xd0b"] * 4  # an RK3588: 4 Cortex-A55, 4 Cortex-A76
    text = "\n".join(f"processor : {i}\nCPU part : {part}\n" for i, part in enumerate(parts))
    monkeypatch.setattr(agent.Path, "read_text", lambda self, **_: text)
    monkeypatch.setattr(agent.os, "sched_getaffinity", lambda _: set(range(8)))
    assert agent._fast_cores() == 4


def test_the_board_gets_the_versions_of_this_machine() -> None:
    import numpy

    found = requirements(["llamacpp", "onnxruntime"])
    assert found[0] == f"numpy=={numpy.__version__}" and [name.partition("==")[0] for name in found[1:]] == [
        "llama-cpp-python",
        "onnxruntime",
        "tokenizers",
    ]
    with pytest.raises(BadInput, match="no board runs 'pytorch'"):
        requirements(["pytorch"])


def test_the_code_that_is_sent_is_this_package_without_torch() -> None:
    import io
    import tarfile

    digest, blob = code()
    assert digest == hashlib.sha256(blob).hexdigest()[:32] and len(blob) < 4 << 20
    with tarfile.open(fileobj=io.BytesIO(blob)) as tar:
        names = tar.getnames()
    assert {"edgeprune/__init__.py", "edgeprune/runtimes/agent.py", "edgeprune/profiles/rpi5.toml"} <= set(names)
