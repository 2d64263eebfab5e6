"""What ships to ARM runs on ARM: files evaluated on an emulated Cortex-A76, beside this machine. `make test-arm`.

Kernels round activations otherwise from one instruction set to the next, so a quantised file is another model there;
how much another is printed and written to `arm-quality.json` in the cache. Unquantised files must agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import arm_board
import pytest

from edgeprune.devices import Budget
from edgeprune.errors import BadInput
from edgeprune.files import write_json
from edgeprune.fitting import fit
from edgeprune.models import checkpoint_folder
from edgeprune.quality import Quality, evaluate
from edgeprune.reference import make_reference
from edgeprune.runtimes.bench import bench
from edgeprune.runtimes.board_setup import requirements, setup
from edgeprune.runtimes.ssh import Link
from edgeprune.targets import target_for

pytestmark = [pytest.mark.arm, pytest.mark.demo, pytest.mark.timeout(7200)]

TEXT = """
The river had risen in the night, and by morning the lower field was a lake with fence posts standing in it. Anna put
on her boots and walked along the dyke to see what was left. The old mill still turned, slowly, as if it had time for
everything. Two herons stood where the sheep had been yesterday. She counted the posts, as her father had taught her:
when the fourth one was under water, the road to the village would be closed by noon.
"""
WINDOWS, LENGTH = 6, 48
EXACT = {"F16": "llamacpp", "fp32": "onnxruntime"}
ROUNDED = {"Q8_0": "llamacpp", "Q4_0": "llamacpp", "Q4_1": "llamacpp", "Q4_K_M": "llamacpp", "int4": "onnxruntime"}
THREADS = 2


@pytest.fixture(scope="module")
def link() -> Iterator[Link]:
    """The board, set up from wheels."""
    if reason := arm_board.missing():
        pytest.skip(reason)
    wheels = arm_board.wheels()
    with arm_board.board() as board:
        found = Link(board)
        told = setup(found, requirements(["llamacpp", "onnxruntime"]), wheels=wheels, say=print)
        assert told["machine"] == "aarch64" and set(told["packages"]) >= {"numpy", "llama-cpp-python", "onnxruntime"}
        yield found


@pytest.fixture(scope="module")
def exported(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo model in every form that is judged."""
    folder = tmp_path_factory.mktemp("exported")
    source = checkpoint_folder(demo_gguf)
    files = {}
    for name in (*EXACT, *ROUNDED):
        target = target_for(name)
        (folder / f"scratch-{name}").mkdir()
        out = folder / f"{name}{target.format.suffix}"
        files[name] = target.format.export(source, out, name, folder / f"scratch-{name}", threads=THREADS)
    return files


def over_dense(link: Link, files: dict[str, Path], name: str, folder: Path) -> dict[str, Quality]:
    """A file here and there, each against the same file run here."""
    runtime = (EXACT | ROUNDED)[name]
    here = make_reference(
        files[name],
        TEXT * 3,
        folder,
        model_hash=name,
        length=LENGTH,
        count=WINDOWS,
        runtime=runtime,
        threads=THREADS,
        timeout_s=3600,
    )
    options = {"runtime": runtime, "threads": THREADS, "timeout_s": 3600.0}
    return {
        "here": evaluate(files[name], here, **options),
        "there": evaluate(files[name], here, execute=link.run, **options),
    }


@pytest.mark.parametrize("name", EXACT)
def test_unquantised_files_agree(link: Link, exported: dict[str, Path], name: str, tmp_path: Path) -> None:
    there = over_dense(link, exported, name, tmp_path)["there"]
    assert "aarch64" in there.measured_on.machine
    assert there.top1.mean >= 0.99 and there.kl_nats.mean <= 1e-3


def test_quantised_files_are_judged_on_both(link: Link, exported: dict[str, Path], tmp_path: Path) -> None:
    source = exported["F16"]
    dense = make_reference(
        source,
        TEXT * 3,
        tmp_path / "dense",
        model_hash="F16",
        length=LENGTH,
        count=WINDOWS,
        threads=THREADS,
        timeout_s=3600,
    )
    rows = {}
    for name, runtime in ROUNDED.items():
        options = {"runtime": runtime, "threads": THREADS, "timeout_s": 3600.0}
        here = evaluate(exported[name], dense, **options)
        there = evaluate(exported[name], dense, execute=link.run, **options)
        between = over_dense(link, exported, name, tmp_path / name)["there"]
        rows[name] = {
            "kl_dense_x86": here.kl_nats.mean,
            "kl_dense_arm": there.kl_nats.mean,
            "kl_x86_arm": between.kl_nats.mean,
            "top1_x86_arm": between.top1.mean,
            "machines": [here.measured_on.machine, there.measured_on.machine],
        }
        print(f"{name}: {rows[name]}")
        assert between.kl_nats.mean < 0.5  # another rounding, not another model
    write_json(arm_board.folder() / "arm-quality.json", {"schema_version": 1, "cpu": arm_board.CPU, "rows": rows})


def test_a_file_that_cannot_run_there_says_so(link: Link, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 64)
    with pytest.raises(BadInput, match=r"bad\.gguf"):
        bench(tmp_path / "bad.gguf", threads=1, execute=link.run)


def test_the_chosen_file_of_a_fit_is_judged_there(link: Link, demo_gguf: Path, tmp_path: Path) -> None:
    result = fit(demo_gguf, "rpi5", Budget(context=512), out=tmp_path / "run", targets=["Q4_0"])
    (path,) = result.best.glob("model.gguf")
    (reference,) = {trial.quality.reference for _, trial in result.trials if isinstance(trial.quality, Quality)}
    assert reference
    source = checkpoint_folder(demo_gguf)
    text = make_reference(
        source, TEXT * 3, tmp_path, model_hash="demo", length=LENGTH, count=WINDOWS, threads=THREADS, timeout_s=3600
    )
    there = evaluate(path, text, threads=THREADS, timeout_s=3600, execute=link.run)
    here = evaluate(path, text, threads=THREADS, timeout_s=3600)
    print(f"KL to dense: {here.kl_nats} here, {there.kl_nats} on ARM")
    assert "aarch64" in there.measured_on.machine
    assert abs(there.kl_nats.mean - here.kl_nats.mean) < 0.5 * max(here.kl_nats.mean, 0.02)
