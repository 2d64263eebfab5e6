"""A model divided between a GPU with memory of its own and the processor: arithmetic, profiles, and what is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.candidates import candidate_of
from edgeprune.cost import Cost, bytes_allowed, judge, predict
from edgeprune.devices import Budget, DeviceProfile, load_profile
from edgeprune.errors import BadInput
from edgeprune.families import FAMILIES
from edgeprune.host_gpu import find_gpu, with_gpu, with_memory_of
from edgeprune.offload import device_settings, split
from edgeprune.plan import keep_all
from edgeprune.runtimes.gpu import Gpu
from edgeprune.runtimes.isolate import Outcome
from edgeprune.runtimes.settings import ALL_LAYERS
from edgeprune.shape import LayerShape, ModelShape
from edgeprune.targets import target_for

RTX = Gpu("CUDA0", "NVIDIA GeForce RTX 4060 Laptop GPU", integrated=False, free_mib=7000, total_mib=8188)
LAYERS = 32


def figure(value: float) -> dict[str, Any]:
    return {"value": value, "kind": "assumed", "source": "test"}


@pytest.fixture(scope="module")
def laptop() -> DeviceProfile:
    """8 GB of GPU memory at 243 GB/s, and 16 GB beside it at 40."""
    known = load_profile("rtx4060-laptop").model_dump(exclude_none=True)
    known["decode"]["cpu"] = {"gbs": figure(40.0)}
    known["beside"] = {"total_gib": figure(16.0), "usable_share": figure(0.75)}
    return DeviceProfile.model_validate(known)


def cost(profile: DeviceProfile, gib: float, **changes: Any) -> Cost:
    """Of a model that reads so many GiB a token."""
    size = int(gib * 2**30)
    values = {"runtime": "llamacpp", "bytes_per_token": size, "n_layers": LAYERS, "weights_bytes": size, "kv_bytes": 0}
    return predict(profile, **(values | {"head_bytes": size // 20} | changes))


@given(
    st.floats(0, 2e10), st.floats(0, 2e10), st.floats(0, 1e10), st.floats(0, 1e10), st.floats(0, 1), st.integers(1, 99)
)
def test_a_split_keeps_to_the_room_and_uses_it(
    room: float, more: float, read: float, cache: float, share: float, n_layers: int
) -> None:
    sizes = {"read": read, "cache": cache, "head": read * share, "n_layers": n_layers}
    found, roomier = split(room, **sizes), split(room + more, **sizes)
    assert found.gpu_bytes <= room * (1 + 1e-9) and 0 <= found.share <= 1
    assert found.layers <= roomier.layers and found.gpu_layers <= roomier.gpu_layers
    assert (found.gpu_layers == ALL_LAYERS) == (read + cache <= room) == (found.share == 1)
    if found.gpu_layers != ALL_LAYERS:
        assert found.layers == max(0, found.gpu_layers - 1) < n_layers
        layer = (read - sizes["head"] + cache) / n_layers
        next_one = layer if found.gpu_layers else sizes["head"]
        assert found.layers == n_layers - 1 or found.gpu_bytes + next_one > room * (1 - 1e-9)


def test_what_fits_is_the_gpus_alone(laptop: DeviceProfile) -> None:
    with_beside, alone = cost(laptop, 4.0), cost(load_profile("rtx4060-laptop"), 4.0)
    assert with_beside == alone
    assert alone.gpu_layers == ALL_LAYERS and alone.beside_mib is None


def test_what_does_not_fit_is_divided(laptop: DeviceProfile) -> None:
    found = cost(laptop, 10.0)
    assert found.gpu_layers is not None and 1 < found.gpu_layers <= LAYERS
    assert found.memory_mib.value <= laptop.usable_memory_mib and found.beside_mib is not None
    assert found.memory_mib.value + found.beside_mib.value == pytest.approx(10 * 1024 + 2 * 75)
    roomy = laptop.model_copy(
        update={"memory": laptop.memory.model_copy(update={"total_gib": laptop.beside.total_gib})}
    )
    gpu, processor = cost(roomy, 10.0).decode_tps, 40e9 / (10 * 2**30)
    assert processor < found.decode_tps.value < gpu.value
    assert found.decode_tps.low < found.decode_tps.value < found.decode_tps.high
    assert not judge(found, Budget(), laptop) and cost(laptop, 10.0, quantisation="Q8_0").prefill_tps is None
    alone = load_profile("rtx4060-laptop")
    assert "holds 7373 MiB" in judge(cost(alone, 10.0), Budget(), alone)[0]
    (reason,) = judge(cost(laptop, 24.0), Budget(), laptop)
    assert reason.startswith("the machine beside the GPU holds 12288 MiB, predicted ")


def test_what_the_processor_runs_has_the_machines_memory(laptop: DeviceProfile) -> None:
    values = laptop.model_dump(exclude_none=True) | {"runtime": {"onnxruntime": {"decode": figure(0.7)}}}
    both = DeviceProfile.model_validate(values)
    found = cost(both, 10.0, runtime="onnxruntime")
    assert found.backend == "cpu" and found.gpu_layers is None and found.beside_mib is None
    assert not judge(found, Budget(), both)
    assert "holds 12288 MiB" in judge(cost(both, 13.0, runtime="onnxruntime"), Budget(), both)[0]


def test_a_budget_of_memory_is_the_gpus(laptop: DeviceProfile) -> None:
    found = cost(laptop, 4.0, gpu_memory_mib=2048.0)
    assert found.memory_mib.value <= 2048 and found.beside_mib is not None
    assert not judge(found, Budget(max_memory_mib=2048), laptop)
    none = cost(laptop, 4.0, gpu_memory_mib=100.0)
    assert none.gpu_layers == 0 and none.decode_tps.value == pytest.approx(40e9 / (4 * 2**30), rel=0.01)


@pytest.mark.parametrize("speed", [4.0, 8.0, 16.0, 60.0])
def test_bytes_allowed_is_nearly_the_inverse(laptop: DeviceProfile, speed: float) -> None:
    size = bytes_allowed(laptop, "llamacpp", LAYERS, speed, gpu_memory_mib=4096.0)
    found = cost(laptop, size / 2**30, gpu_memory_mib=4096.0)
    assert found.decode_tps.value == pytest.approx(speed, rel=0.1)  # whole layers


def test_the_runtime_is_told(laptop: DeviceProfile) -> None:
    layers = (LayerShape(32, 8, 14336),) * LAYERS
    shape = ModelShape(FAMILIES["llama"], 128256, 4096, 128, layers, False, 8192, 1e-5, 1e4, None)
    told = {}
    for profile in (laptop, load_profile("rpi5"), load_profile("apple-m2")):
        found = candidate_of(keep_all(shape), shape, target_for("Q8_0"), profile, Budget.of(profile))
        told[profile.name] = found.settings
    assert 0 < told["rtx4060-laptop"]["gpu_layers"] <= LAYERS
    assert told["rpi5"] == {} and told["apple-m2"] == {"gpu_layers": ALL_LAYERS}
    assert device_settings("onnxruntime", "cuda", None) == {"provider": "cuda"}


def test_profiles_that_make_no_sense(laptop: DeviceProfile) -> None:
    values = laptop.model_dump(exclude_none=True)
    for wrong in (
        {"decode": {"cuda": values["decode"]["cuda"]}},
        {"memory": values["memory"] | {"dedicated": False}},
        {"beside": values["beside"] | {"dedicated": True}},
    ):
        with pytest.raises(ValueError, match=r"\[beside\] needs"):
            DeviceProfile.model_validate(values | wrong)
    with pytest.raises(BadInput, match="a split needs"):
        split(1.0, read=1.0, cache=0.0, head=2.0, n_layers=1)


def test_a_known_gpu_gets_its_figures_and_the_machine_stays_beside_it() -> None:
    machine = load_profile("n100").renamed("mine")
    found = with_gpu(machine, RTX)
    assert found.start.backend == "cuda" and found.decode["cuda"] == load_profile("rtx4060-laptop").decode["cuda"]
    assert found.memory.dedicated and found.memory.total_gib.value == pytest.approx(8188 / 1024, abs=1e-3)
    assert found.beside == machine.memory and found.decode["cpu"] == machine.decode["cpu"]
    assert with_gpu(found, RTX) == found
    back = with_gpu(found, None)  # llama.cpp was installed anew, without it
    assert back.start.backend == "cpu" and back.memory == machine.memory and back.beside is None


def test_other_gpus_change_nothing_until_they_are_measured() -> None:
    machine = load_profile("n100")
    for gpu in (replace(RTX, description="NVIDIA RTX 9999"), replace(RTX, integrated=True), replace(RTX, name="SYCL0")):
        assert with_gpu(machine, gpu) == machine
    assert with_memory_of(machine, replace(RTX, integrated=True)) == machine
    assert load_profile("apple-m2") == with_gpu(load_profile("apple-m2"), Gpu("MTL0", "Apple M2", True, 9e3, 1e4))


def test_the_largest_gpu_of_its_own_memory_is_taken() -> None:
    def execute(target: str, arguments: Any, **_: Any) -> Outcome:
        small = replace(RTX, name="CUDA1", total_mib=4096.0)
        integrated = replace(RTX, name="Vulkan0", integrated=True, total_mib=32768.0)
        return Outcome("ok", [vars(gpu) for gpu in (small, integrated, RTX)], None, None, None, 0.1, "")

    def no_llama(target: str, arguments: Any, **_: Any) -> Outcome:
        raise BadInput("llama-cpp-python is not installed")

    assert find_gpu(execute) == RTX
    assert find_gpu(no_llama) is None
