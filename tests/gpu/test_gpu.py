"""Layers on a GPU: function, not speed. `make test-gpu` builds llama.cpp with Vulkan in an environment of its own.

On a machine without a GPU Mesa's software device stands in (Debian: mesa-vulkan-drivers); what it computes must be what
the processor computes. The CUDA tests skip, with the reason, where there is none.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edgeprune import fitting
from edgeprune.boards import Place
from edgeprune.cost import OVERHEAD_MIB
from edgeprune.devices import Budget, DeviceProfile, load_profile
from edgeprune.export.gguf_writer import write_gguf
from edgeprune.files import read_json
from edgeprune.host_gpu import backend_of
from edgeprune.quality import evaluate
from edgeprune.reference import make_reference
from edgeprune.runtimes.bench import bench
from edgeprune.runtimes.gpu import Gpu
from edgeprune.runtimes.isolate import Outcome, run_isolated

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(3600)]

TEXT = "The kettle sings before the water boils, and nobody listens to it at all; then it stops. " * 40


@pytest.fixture(scope="module")
def python() -> Iterator[str]:
    """The interpreter of the environment whose llama.cpp has a GPU."""
    path = os.environ.get("EDGEPRUNE_GPU_PYTHON", "")
    if not path:
        pytest.skip("EDGEPRUNE_GPU_PYTHON names no interpreter with a GPU build of llama.cpp: make test-gpu")
    with pytest.MonkeyPatch.context() as patch:
        if not gpus(path):  # llama.cpp leaves software devices out unless they are named
            patch.setenv("GGML_VK_VISIBLE_DEVICES", "0")
        yield path


def gpus(python: str) -> list[dict[str, Any]]:
    code = (
        "import json; from edgeprune.runtimes import llamacpp_devices as d; print(json.dumps([*map(vars, d.gpus())]))"
    )
    done = subprocess.run([python, "-P", "-c", code], capture_output=True, text=True, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from conftest import save_llama

    folder = tmp_path_factory.mktemp("gpu")
    save_llama(folder / "llama", head_dim=32, num_key_value_heads=4)
    return write_gguf(folder / "llama", folder / "tiny.gguf", dtype="F16")


def test_devices_are_listed(python: str) -> None:
    found = gpus(python)
    assert found and all(gpu["name"] and gpu["total_mib"] > 0 for gpu in found)


@pytest.mark.parametrize("layers", [1, 999])
def test_a_gpu_computes_what_the_processor_computes(python: str, model: Path, tmp_path: Path, layers: int) -> None:
    there = partial(run_isolated, python=python)
    reference = make_reference(model, TEXT, tmp_path, model_hash="tiny", length=64, count=4, threads=1, timeout_s=600)
    found = evaluate(model, reference, threads=1, timeout_s=600, settings={"gpu_layers": layers}, execute=there)
    assert found.kl_nats.mean < 1e-3 and found.top1.mean > 0.98


def test_it_is_measured_and_the_record_names_it(python: str, model: Path) -> None:
    result = bench(
        model,
        n_prompt=16,
        n_gen=4,
        repetitions=1,
        threads=1,
        least_s=0,
        gate_s=None,
        python=python,
        settings={"gpu_layers": 999},
    )
    assert result.status == "ok" and result.tg is not None
    assert result.tg.gpu_info and result.tg.backends in ("Vulkan", "CUDA", "Metal", "MTL")


def test_a_fit_divides_what_the_gpu_has_no_room_for(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from conftest import save_llama

    source = save_llama(tmp_path / "llama", intermediate_size=512, num_hidden_layers=6)
    (gpu, *_) = gpus(python)
    backend = backend_of(Gpu(**gpu))
    assert backend
    values = load_profile("rtx4060-laptop").model_dump(exclude_none=True)
    figure = {"value": 40.0, "kind": "assumed", "source": "test"}
    room = OVERHEAD_MIB["llamacpp"].value + 0.5  # MiB, with what the runtime takes for itself
    values |= {
        "reachable": True,
        "beside": {"total_gib": figure, "usable_share": figure | {"value": 0.75}},
        "decode": {backend: values["decode"]["cuda"], "cpu": {"gbs": figure}},
        "start": values["start"] | {"backend": backend},
        "memory": values["memory"] | {"total_gib": figure | {"value": room / 1024 / 0.9}},
    }

    def there(*arguments: Any, **options: Any) -> Outcome:
        return run_isolated(*arguments, **(options | {"python": python}))

    monkeypatch.setattr(fitting, "place", lambda *_: Place(there, 1))
    result = fitting.fit(
        source,
        DeviceProfile.model_validate(values),
        Budget(context=64),
        out=tmp_path / "run",
        targets=["F16"],
        method="amp",
        gate_s=None,
        tune=False,
    )
    layers = result.chosen.settings["gpu_layers"]
    assert 1 < int(layers) <= 6 and result.chosen.cost.beside_mib is not None
    assert result.trial.speed["tg128"]["settings"]["gpu_layers"] == layers and result.trial.speed["tg128"]["gpu_info"]
    assert read_json(result.best / "bundle.json")["settings"]["gpu_layers"] == layers


def test_memory_on_a_cuda_gpu_is_measured(python: str, model: Path) -> None:
    if not any(gpu["name"].startswith("CUDA") for gpu in gpus(python)):
        pytest.skip("no CUDA GPU at hand")
    result = bench(model, n_prompt=16, n_gen=4, threads=1, gate_s=None, python=python, settings={"gpu_layers": 999})
    assert result.tg is not None and result.tg.peak_gpu_mib
