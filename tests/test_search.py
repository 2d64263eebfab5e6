"""From a damage table and a budget to a plan: all that the budget allows is used, wherever the weights are."""

from __future__ import annotations

import pytest

from edgeprune.candidates import cost_of
from edgeprune.damage import DamageTable, HeadOption, WidthOption
from edgeprune.devices import Budget, DeviceProfile, load_profile
from edgeprune.errors import NothingFits
from edgeprune.families import FAMILIES
from edgeprune.host_gpu import with_gpu
from edgeprune.plan import head_options
from edgeprune.runtimes.gpu import Gpu
from edgeprune.search import best_plan, limits
from edgeprune.shape import LayerShape, ModelShape
from edgeprune.targets import target_for

CONTEXT = 512


def model(layers: int, hidden: int, neurons: int) -> ModelShape:
    return ModelShape(
        family=FAMILIES["llama"],
        vocab=8192,
        hidden=hidden,
        head_dim=64,
        layers=(LayerShape(8, 2, neurons),) * layers,
        tied=True,
        max_positions=2048,
        norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
    )


def table(shape: ModelShape) -> DamageTable:
    """Damages in proportion to what is removed; of later layers more."""
    attention, mlp = [], []
    for index, layer in enumerate(shape.layers):
        factor = 0.02 * (1 + index)
        options = [*dict.fromkeys([(layer.heads, layer.kv_heads), *head_options(layer), (0, 0)])]
        attention.append(tuple(HeadOption(h, k, factor * (1 - h / layer.heads)) for h, k in options))
        widths = (layer.neurons, layer.neurons // 2, 0)
        mlp.append(tuple(WidthOption(n, factor * (1 - n / layer.neurons), 1 - n / layer.neurons) for n in widths))
    losses = tuple(1 - n / shape.layers[0].neurons for n in range(shape.layers[0].neurons + 1))
    return DamageTable(tuple(attention), tuple(mlp), (losses,) * len(shape.layers), "m", "t")


def speed(shape: ModelShape, quantisation: str, profile: DeviceProfile) -> float:
    return cost_of(shape, target_for(quantisation), profile, Budget(context=CONTEXT)).decode_tps.value


@pytest.mark.parametrize("faster", [1.1, 1.5])
@pytest.mark.parametrize("quantisation", ["Q8_0", "Q4_K_M", "Q3_K_M", "Q4_0", "int4"])
def test_a_plan_is_as_fast_as_asked_and_hardly_faster(quantisation: str, faster: float) -> None:
    shape, profile = model(12, 512, 1536), load_profile("rpi5")
    asked = faster * speed(shape, quantisation, profile)
    budget = Budget(min_tokens_per_s=asked, context=CONTEXT)
    plan = best_plan(table(shape), shape, target_for(quantisation), profile, budget, uniform=False)
    assert asked <= speed(plan.shape_after(shape), quantisation, profile) < 1.005 * asked


def test_a_model_that_the_gpu_has_no_room_for_is_narrowed_no_more_than_it_must_be() -> None:
    """Layers beside the GPU cost more than their bytes, which no sum of bytes says; without any, speed leaps."""
    shape = model(16, 2048, 2048)
    gpu = Gpu("CUDA0", "NVIDIA GeForce RTX 4060 Laptop GPU", integrated=False, free_mib=300, total_mib=340)
    profile = with_gpu(load_profile("ryzen-7840hs"), gpu)
    dense = cost_of(shape, target_for("Q8_0"), profile, Budget(context=CONTEXT))
    assert dense.beside_mib is not None
    asked = 1.1 * dense.decode_tps.value
    budget = Budget(min_tokens_per_s=asked, context=CONTEXT)
    plan = best_plan(table(shape), shape, target_for("Q8_0"), profile, budget, uniform=False)
    assert asked <= speed(plan.shape_after(shape), "Q8_0", profile) < 1.03 * asked


def test_what_runs_on_the_processor_is_held_by_its_memory() -> None:
    gpu = Gpu("CUDA0", "NVIDIA GeForce RTX 4060 Laptop GPU", integrated=False, free_mib=7000, total_mib=8188)
    profile, shape, target = with_gpu(load_profile("ryzen-7840hs"), gpu), model(12, 512, 1536), target_for("int8")
    assert profile.beside is not None and profile.backend_for("onnxruntime") == "cpu"
    small = profile.beside.model_copy(update={"usable_share": replace_value(profile.beside.usable_share, 0.001)})
    held = [
        limits(shape, target, each, Budget())[1] for each in (profile, profile.model_copy(update={"beside": small}))
    ]
    assert held[1] < 0.01 * held[0]


def replace_value(figure: object, value: float) -> object:
    return figure.model_copy(update={"value": value})  # type: ignore[attr-defined]


def test_what_no_widths_reach_is_said() -> None:
    shape, profile = model(2, 512, 1536), load_profile("rpi5")
    with pytest.raises(NothingFits, match="no choice of widths"):
        best_plan(table(shape), shape, target_for("Q8_0"), profile, Budget(min_tokens_per_s=1e6), uniform=False)
