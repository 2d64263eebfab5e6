"""Layers of different widths, with or without attention and MLP: config, torch, llama.cpp, ONNX Runtime."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import save_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from edgeprune import load_checkpoint
from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import BadInput
from edgeprune.export.gguf_deci import ZERO_MLP, file_layers
from edgeprune.export.gguf_quantise import predicted_bytes, quantise, tensor_types
from edgeprune.export.gguf_writer import write_gguf
from edgeprune.export.onnx_graph import export_onnx
from edgeprune.export.optimum_exporter import export_optimum
from edgeprune.families import FAMILIES
from edgeprune.gguf_checkpoint import gguf_to_folder
from edgeprune.heterogeneous import build, layer_module
from edgeprune.importance import amp_scores
from edgeprune.inspection import inspect
from edgeprune.models import load
from edgeprune.per_layer import KEY, config_widths, read_layers
from edgeprune.plan import LayerPlan, PrunePlan, check
from edgeprune.runtimes.gguf_file import GgufFile
from edgeprune.runtimes.llamacpp import LlamaCpp
from edgeprune.runtimes.ort import OnnxRuntime
from edgeprune.runtimes.pytorch import PyTorch
from edgeprune.shape import LayerShape, ModelShape, shape_from_config
from edgeprune.surgery import prune_checkpoint

TOKENS = np.random.default_rng(7).integers(1, 300, 40)
DENSE = LayerShape(8, 4, 128)
NOTHING = LayerShape(0, 0, 0)

layer_shapes = st.builds(
    lambda kv, group, neurons: LayerShape(kv * group, kv, neurons),
    st.integers(0, 4),
    st.integers(1, 2),
    st.sampled_from([0, 1, 31, 32, 64, 100, 128]),
)
model_layers = st.lists(layer_shapes, min_size=1, max_size=12).map(
    lambda layers: (LayerShape(2, 1, layers[0].neurons or 7), *layers[1:])
)

# Widths of the layers of a model; what each is about.
CASES: dict[str, tuple[LayerShape, ...]] = {
    "odd widths": (LayerShape(8, 4, 101), LayerShape(3, 3, 37), LayerShape(2, 1, 128), LayerShape(4, 2, 64)),
    "parts absent": (LayerShape(6, 3, 0), LayerShape(0, 0, 96), NOTHING, LayerShape(2, 2, 32)),
    "last layer empty": (DENSE, LayerShape(2, 1, 0), LayerShape(0, 0, 33), NOTHING),
    "alike but for attention": (DENSE, replace(DENSE, heads=0, kv_heads=0), DENSE, DENSE),
    "alike but for an MLP": (DENSE, replace(DENSE, neurons=0), DENSE, DENSE),
}
MODELS: dict[str, dict[str, Any]] = {
    "tied": {},
    "biases, untied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
}


def plan_of(widths: tuple[LayerShape, ...], dense: LayerShape = DENSE, seed: int = 0) -> PrunePlan:
    """A plan with these widths that keeps random heads and neurons."""
    rng = np.random.default_rng(seed)
    group = dense.heads // dense.kv_heads

    def some(count: int, of: int) -> tuple[int, ...]:
        return tuple(sorted(int(i) for i in rng.choice(of, count, replace=False)))

    layers = []
    for width in widths:
        kv_heads = some(width.kv_heads, dense.kv_heads)
        left = width.heads // width.kv_heads if width.kv_heads else 0
        heads = tuple(kv * group + head for kv in kv_heads for head in some(left, group))
        layers.append(LayerPlan(kv_heads, heads, some(width.neurons, dense.neurons)))
    return PrunePlan(tuple(layers), "hand", 0.0, 0.0, "", "")


def silenced(folder: Path, plan: PrunePlan) -> np.ndarray[Any, Any]:
    """Logits (tokens, vocabulary) of the dense model with what the plan removes silenced: what pruning must equal."""
    model = load(folder)
    size = model.shape.head_dim
    with torch.no_grad():
        for layer, kept in zip(model.module.model.layers, plan.layers, strict=True):  # type: ignore[union-attr]
            attention, mlp = layer.self_attn, layer.mlp
            for head in set(range(attention.o_proj.in_features // size)) - set(kept.heads):
                attention.o_proj.weight[:, head * size : (head + 1) * size] = 0
            mlp.down_proj.weight[:, sorted(set(range(mlp.down_proj.in_features)) - set(kept.neurons))] = 0
            for absent, linear in ((not kept.heads, attention.o_proj), (not kept.neurons, mlp.down_proj)):
                if absent and linear.bias is not None:
                    linear.bias.zero_()
        return logits(model.module)


def logits(model: Any) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        found: np.ndarray[Any, Any] = model(torch.from_numpy(TOKENS)[None]).logits[0].numpy()
    return found


@pytest.fixture(scope="module", params=MODELS)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "model"
    return save_llama(folder, num_hidden_layers=4, **MODELS[request.param])


# The config.


@given(model_layers)
def test_config_round_trip(layers: tuple[LayerShape, ...]) -> None:
    config = json.loads(json.dumps(config_widths(layers)))
    general = LayerShape(*(config[key] for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size")))
    assert read_layers(config, general, len(layers)) == layers
    alike = len(set(layers)) == 1
    assert (KEY in config) == (not alike)
    if any(not layer.heads for layer in layers):
        assert general.kv_heads not in {layer.kv_heads for layer in layers}
    if any(not layer.neurons for layer in layers):
        assert general.neurons not in {layer.neurons for layer in layers}
    # As transformers writes it: keys that sort as numbers do, and nothing that only repeats the general value.
    entries = config.get(KEY, {})
    assert list(entries) == sorted(entries)
    assert all(entry.get(key) != config[key] for entry in entries.values() for key in config if key != KEY)


def test_config_of_transformers_own_form(tiny_folder: Path) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())
    entries: dict[Any, Any] = {
        1: {"num_key_value_heads": 2, "rms_norm_eps": config["rms_norm_eps"]},  # explicit, though it is the general one
        "02": {"skip": ["mlp"], "num_attention_heads": 4},
    }
    shape = shape_from_config(config | {KEY: entries})
    assert shape.layers == (LayerShape(8, 4, 128), LayerShape(8, 2, 128), LayerShape(4, 4, 0))
    assert shape.parameters == sum(
        [
            shape.embedding_parameters,
            shape.norm_parameters,
            *(shape.attention_parameters(layer) + shape.mlp_parameters(layer) for layer in shape.layers),
        ]
    )
    without_kv = {key: value for key, value in config.items() if key != "num_key_value_heads"}
    assert shape_from_config(without_kv | {KEY: {"1": {"num_attention_heads": 2}}}).layers[1] == LayerShape(2, 2, 128)
    assert shape_from_config(config | {KEY: {}}).uniform


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([1, 2], "not a mapping"),
        ({"1": 3}, "not a mapping"),
        ({"3": {}}, "not one of 3 layers"),
        ({"-1": {}}, "not one of 3 layers"),
        ({"01": {}, "1": {}}, "each once"),
        ({"one": {}}, "not one of 3 layers"),
        ({"1": {"intermediate_size": 0}}, "not a positive integer"),
        ({"1": {"num_attention_heads": True}}, "not a positive integer"),
        ({"1": {"num_attention_heads": 6}}, "cannot be shared"),
        ({"1": {"head_dim": 8}}, "'head_dim' is not supported"),
        ({"1": {"skip": "mlp"}}, "skip is"),
        ({"1": {"skip": ["norm"]}}, "skip is"),
        ({"0": {"skip": ["attention"]}}, "layer 0 has no attention"),
        ({str(index): {"skip": ["mlp"]} for index in range(3)}, "no layer has an MLP"),
    ],
)
def test_configs_that_are_refused(tiny_folder: Path, entries: Any, message: str) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())
    with pytest.raises(BadInput, match=message):
        shape_from_config(config | {KEY: entries})


# Plans.


@settings(max_examples=30)
@given(st.lists(layer_shapes, min_size=3, max_size=3), st.integers(0, 100))
def test_plan_round_trip(layers: list[LayerShape], seed: int) -> None:
    shape = shape_from_config(
        {
            "model_type": "llama",
            "vocab_size": 100,
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "intermediate_size": 128,
        }
    )
    plan = plan_of(tuple(layers), seed=seed)
    if not layers[0].heads or not any(layer.neurons for layer in layers):
        with pytest.raises(BadInput, match=r"layer 0 has no attention|no layer has an MLP"):
            check(plan, shape)
        return
    check(plan, shape)
    assert plan.shape_after(shape).layers == tuple(layers)
    with tempfile.TemporaryDirectory() as folder:
        plan.save(Path(folder) / "plan.json")
        assert PrunePlan.load(Path(folder) / "plan.json", shape) == plan


@pytest.mark.parametrize("layer", [LayerPlan((), (0,), (1,)), LayerPlan((0,), (), (1,))])
def test_heads_and_their_groups_leave_together(tiny_folder: Path, layer: LayerPlan) -> None:
    shape = Checkpoint(tiny_folder).shape
    whole = plan_of((DENSE,) * 3).layers[0]
    with pytest.raises(BadInput, match="as many query heads"):
        check(PrunePlan((whole, layer, whole), "hand", 0.0, 0.0, "", ""), shape)


# torch.


@pytest.mark.parametrize("case", CASES)
def test_loader_equals_silenced_dense(dense: Path, tmp_path: Path, case: str) -> None:
    plan = plan_of(CASES[case])
    out = prune_checkpoint(dense, plan, tmp_path / "out")
    expected = silenced(dense, plan)
    model = load_checkpoint(out)
    np.testing.assert_allclose(logits(model), expected, atol=1e-5, rtol=1e-5)
    checkpoint = Checkpoint(out)
    assert checkpoint.shape.layers == CASES[case]
    assert checkpoint.shape.parameters == sum(p.numel() for p in model.parameters())
    runtime = PyTorch(out, n_ctx=64, threads=1)
    parts = [runtime.forward(TOKENS[:25]), runtime.forward(TOKENS[25:])]
    np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-5, rtol=1e-5)
    runtime.rewind(11)
    np.testing.assert_allclose(runtime.forward(TOKENS[11:]), expected[11:], atol=1e-5, rtol=1e-5)
    # Pruned once more, from a checkpoint whose layers differ already.
    again = prune_checkpoint(out, PrunePlan(tuple(keep(w) for w in CASES[case]), "", 0, 0, "", ""), tmp_path / "again")
    assert json.loads((again / "config.json").read_text()) == json.loads((out / "config.json").read_text())


def keep(width: LayerShape) -> LayerPlan:
    return LayerPlan(tuple(range(width.kv_heads)), tuple(range(width.heads)), tuple(range(width.neurons)))


def test_what_a_stock_model_does(tiny_folder: Path, tmp_path: Path) -> None:
    out = prune_checkpoint(tiny_folder, plan_of((DENSE, LayerShape(0, 0, 50), LayerShape(2, 1, 0))), tmp_path / "out")
    model: Any = load_checkpoint(out)
    assert isinstance(model, transformers.LlamaForCausalLM)
    prompt = torch.from_numpy(TOKENS[:9])[None]
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    cached = model.generate(prompt, attention_mask=mask, **settings)
    assert (cached == model.generate(prompt, attention_mask=mask, use_cache=False, **settings)).all()
    assert model.generate(prompt, attention_mask=mask, num_beams=2, **settings).shape == cached.shape
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    np.testing.assert_array_equal(logits(load_checkpoint(tmp_path / "saved")), logits(model))
    model.train()
    model(prompt, labels=prompt).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("case", CASES)
def test_stock_from_pretrained_stops(dense: Path, tmp_path: Path, case: str) -> None:
    out = prune_checkpoint(dense, plan_of(CASES[case]), tmp_path / "out")
    with pytest.raises(RuntimeError, match="size mismatch"):
        transformers.AutoModelForCausalLM.from_pretrained(out)


def test_tensors_must_fit_the_config(tiny_folder: Path, tmp_path: Path) -> None:
    out = prune_checkpoint(tiny_folder, plan_of((DENSE, LayerShape(2, 1, 50), NOTHING)), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    tensors = load_file(out / "model.safetensors")
    config[KEY]["1"]["intermediate_size"] = 49
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="size mismatch"):
        load_checkpoint(out)
    config[KEY]["1"] |= {"intermediate_size": 50}
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors | {"model.layers.2.input_layernorm.weight": np.ones(64, np.float32)}, out / "model.safetensors")
    with pytest.raises(BadInput, match=r"unexpected keys: model\.layers\.2\.input_layernorm"):
        load_checkpoint(out)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(BadInput, match=r"missing keys: model\.layers\.1\.mlp"):
        load_checkpoint(out)


@pytest.mark.parametrize("widths", [DENSE, LayerShape(3, 3, 17), LayerShape(0, 0, 17), LayerShape(2, 1, 0), NOTHING])
def test_one_layer_by_itself(tiny_folder: Path, tmp_path: Path, widths: LayerShape) -> None:
    out = prune_checkpoint(tiny_folder, plan_of((DENSE, widths, DENSE)), tmp_path / "out")
    model: Any = load_checkpoint(out)
    config = transformers.AutoConfig.from_pretrained(out)
    layer: Any = layer_module(config, 1, widths)
    layer.load_state_dict(model.model.layers[1].state_dict())
    hidden = torch.randn(1, 6, 64)
    position = model.model.rotary_emb(hidden, torch.arange(6)[None])
    with torch.no_grad():
        found = layer(hidden, position_embeddings=position)
        torch.testing.assert_close(found, model.model.layers[1](hidden, position_embeddings=position))
    if widths == NOTHING:
        torch.testing.assert_close(found, hidden)
    meta = layer_module(config, 1, widths, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in meta.parameters())
    assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in layer.named_parameters()}


def test_build_makes_the_model_without_weights(tiny_folder: Path, tmp_path: Path) -> None:
    out = prune_checkpoint(tiny_folder, plan_of((DENSE, NOTHING, LayerShape(2, 1, 9))), tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(out)
    before = config.to_dict()
    model = build(config)
    model.load_state_dict(load_checkpoint(out).state_dict())
    np.testing.assert_array_equal(logits(model), logits(load_checkpoint(out)))
    assert config.to_dict() == before


@pytest.mark.parametrize("head_dim", [16, None])  # None: as the hidden state's width and the heads give it
def test_stock_classes_of_other_families(monkeypatch: pytest.MonkeyPatch, head_dim: int | None) -> None:
    for kind in (transformers.MistralConfig, transformers.Qwen2Config):
        name = kind.model_type
        if name not in FAMILIES:
            monkeypatch.setitem(FAMILIES, name, replace(FAMILIES["llama"], name=name, model_types=(name,)))
        config = kind(
            vocab_size=50,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=4,
            **({} if head_dim is None else {"head_dim": head_dim}),
            per_layer_config={"1": {"skip": ["attention"]}, 2: {"intermediate_size": 40, "num_key_value_heads": 2}},
        )
        model: Any = build(config)
        assert type(model).__name__ == f"{kind.__name__.removesuffix('Config')}ForCausalLM"
        assert model.model.layers[2].mlp.up_proj.weight.shape == (40, 64)
        assert model.model.layers[2].self_attn.k_proj.weight.shape == (2 * (head_dim or 8), 64)
        assert not list(model.model.layers[1].self_attn.parameters())
        ids = torch.arange(9)[None]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.1)
            whole = model(ids).logits
            first = model(ids[:, :5], use_cache=True)
            rest = model(ids[:, 5:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(rest, whole[:, 5:])


def test_scores_of_layers_that_lack_parts(tiny_folder: Path, tmp_path: Path) -> None:
    layers = (LayerShape(8, 4, 0), LayerShape(0, 0, 50), LayerShape(2, 1, 9))
    model = load(prune_checkpoint(tiny_folder, plan_of(layers), tmp_path / "out"))
    scores = amp_scores(model, [torch.tensor([1, 2, 3]), torch.tensor([4, 5])])
    assert [len(heads) for heads in scores.heads] == [8, 0, 2]
    assert [len(neurons) for neurons in scores.neurons] == [0, 50, 9]
    assert all((part > 0).all() for part in (*scores.heads, *scores.neurons))
    assert model.shape.widths() == {"heads": [8, 0, 2], "kv_heads": [4, 0, 1], "neurons": [0, 50, 9]}
    assert Checkpoint(tiny_folder).shape.widths() == {"heads": 8, "kv_heads": 4, "neurons": 128}


# llama.cpp.


@pytest.mark.parametrize("case", CASES)
def test_llamacpp_equals_torch(dense: Path, tmp_path: Path, case: str) -> None:
    out = prune_checkpoint(dense, plan_of(CASES[case]), tmp_path / "out")
    expected = logits(load_checkpoint(out))
    path = write_gguf(out, tmp_path / "m.gguf", dtype="F32")
    file = GgufFile(path)
    assert file.architecture == "deci"
    padded = file_layers(Checkpoint(out).shape)
    assert [(w.heads, w.kv_heads, w.neurons) for w in file.widths()] == [
        (w.heads, w.kv_heads, w.neurons) for w in padded
    ]
    assert inspect(path).layers == padded
    assert inspect(out).layers == CASES[case]
    for exact, tolerance in ((True, 1e-4), (False, 3e-3)):  # the second with a cache of 16 bits
        with LlamaCpp(path, n_ctx=64, threads=1, exact=exact) as runtime:
            parts = [runtime.forward(TOKENS[:25]), runtime.forward(TOKENS[25:39]), runtime.forward(TOKENS[39:])]
            np.testing.assert_allclose(np.concatenate(parts), expected, atol=tolerance * np.abs(expected).max())
            runtime.rewind(0)
            last = runtime.forward(TOKENS, last_only=True)  # logits of chosen tokens only
            np.testing.assert_allclose(last[-1], expected[-1], atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("case", CASES)
def test_gguf_there_and_back(dense: Path, tmp_path: Path, case: str) -> None:
    out = prune_checkpoint(dense, plan_of(CASES[case]), tmp_path / "out")
    path = write_gguf(out, tmp_path / "m.gguf", dtype="F32")
    back = gguf_to_folder(path, tmp_path / "back")
    original, again = load_file(out / "model.safetensors"), load_file(back / "model.safetensors")
    assert original.keys() == again.keys()
    assert all((values == again[name]).all() for name, values in original.items())
    assert Checkpoint(back).shape.layers == CASES[case]
    np.testing.assert_array_equal(logits(load_checkpoint(back)), logits(load_checkpoint(out)))


WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
WIDE_DENSE = LayerShape(8, 4, 512)
WIDE_LAYERS = (
    LayerShape(8, 4, 512),
    LayerShape(0, 0, 288),
    LayerShape(4, 2, 0),
    LayerShape(1, 1, 100),
    NOTHING,
    LayerShape(6, 3, 256),
    LayerShape(0, 0, 96),
    LayerShape(2, 2, 64),
    NOTHING,
)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("wide")
    source = save_llama(base / "dense", num_hidden_layers=len(WIDE_LAYERS), head_dim=32, **WIDE)
    out = prune_checkpoint(source, plan_of(WIDE_LAYERS, WIDE_DENSE), base / "pruned")
    write_gguf(out, base / "pruned" / "full.gguf", dtype="F32")
    return out


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K_M", "Q6_K", "Q5_K_M", "Q3_K_M", "Q2_K", "F16"])
def test_types_bytes_and_text_of_quantised_files(wide: Path, tmp_path: Path, kind: str) -> None:
    shape = Checkpoint(wide).shape
    path = quantise(wide / "full.gguf", tmp_path / "m.gguf", kind=kind, threads=1)
    file = GgufFile(path)
    assert {name: info.type for name, info in file.tensors.items()} == tensor_types(shape, kind)
    assert {part: size for part, size in file.bytes_by_part().items() if size} == {
        part: size for part, size in predicted_bytes(shape, kind).items() if size
    }
    expected = logits(load_checkpoint(wide))
    with LlamaCpp(path, n_ctx=64, threads=1) as runtime:
        found = runtime.forward(TOKENS)
        for _ in range(5):
            found = np.concatenate([found, runtime.forward([int(found[-1].argmax())])])
        assert np.isfinite(found).all()
    if kind in ("F16", "Q8_0"):
        assert (found[: len(TOKENS)].argmax(-1) == expected.argmax(-1)).mean() > 0.8


def test_deci_takes_eighty_layers_for_the_largest_class(tiny_folder: Path) -> None:
    shape = replace(Checkpoint(tiny_folder).shape, hidden=256, head_dim=32)
    ungrouped = shape.with_layers((LayerShape(8, 8, 256),) * 80)
    differing = shape.with_layers((*ungrouped.layers[:-1], LayerShape(4, 4, 256)))
    name = "blk.20.attn_v.weight"  # of no layer that gets more bits anyway
    assert tensor_types(ungrouped, "Q4_K_M")[name] == "Q4_K"
    assert tensor_types(differing, "Q4_K_M")[name] == "Q5_K"


def test_a_zero_mlp_is_not_taken_for_more_than_it_is(tiny_folder: Path, tmp_path: Path) -> None:
    layers = (LayerShape(8, 4, 0), LayerShape(2, 1, ZERO_MLP), DENSE)
    out = prune_checkpoint(tiny_folder, plan_of(layers), tmp_path / "out")
    back = gguf_to_folder(write_gguf(out, tmp_path / "m.gguf"), tmp_path / "back")
    assert Checkpoint(back).shape.layers == layers


@pytest.mark.parametrize(
    ("index", "widths"),
    [
        (0, LayerShape(0, 0, 32)),  # no attention in layer 0
        (1, LayerShape(2, 1, 0)),  # the graph would lose the attention
        (2, LayerShape(0, 0, 0)),  # and here the choice of tokens
        (1, LayerShape(3, 2, 32)),
        (1, LayerShape(3, 0, 32)),
    ],
)
def test_foreign_deci_files_that_are_refused(
    tiny_folder: Path, tmp_path: Path, index: int, widths: LayerShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = prune_checkpoint(tiny_folder, plan_of((DENSE, LayerShape(2, 1, 40), DENSE)), tmp_path / "out")
    path = write_gguf(out, tmp_path / "m.gguf")
    plain = GgufFile.widths
    monkeypatch.setattr(
        GgufFile, "widths", lambda self: [widths if i == index else w for i, w in enumerate(plain(self))]
    )
    with pytest.raises(BadInput, match=f"layer {index}: impossible widths"):
        gguf_to_folder(path, tmp_path / "back")


def test_families_without_such_an_architecture(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = prune_checkpoint(tiny_folder, plan_of((DENSE, LayerShape(2, 1, 40), DENSE)), tmp_path / "out")
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], gguf_per_layer=None))
    with pytest.raises(BadInput, match=r"one width for all.*uniform"):
        write_gguf(out, tmp_path / "m.gguf")


# ONNX.


def test_onnxruntime_equals_torch(tiny_folder: Path, tmp_path: Path) -> None:
    layers = (LayerShape(8, 4, 101), LayerShape(3, 3, 37), LayerShape(2, 1, 128))
    out = prune_checkpoint(tiny_folder, plan_of(layers), tmp_path / "out")
    expected = logits(load_checkpoint(out))
    found = OnnxRuntime(export_onnx(out, tmp_path / "onnx", precision="fp32"), n_ctx=64, threads=1)
    parts = np.concatenate([found.forward(TOKENS[:25]), found.forward(TOKENS[25:])])
    np.testing.assert_allclose(parts, expected, atol=1e-4, rtol=1e-4)


def test_optimum_is_not_asked(tiny_folder: Path, tmp_path: Path) -> None:
    out = prune_checkpoint(tiny_folder, plan_of((DENSE, LayerShape(2, 1, 40), DENSE)), tmp_path / "out")
    with pytest.raises(BadInput, match="one width"):
        export_optimum(out, tmp_path / "onnx")


# The demo model.


@pytest.mark.demo
def test_demo_with_layers_that_differ(demo_gguf: Path, tmp_path: Path) -> None:
    source = gguf_to_folder(demo_gguf, tmp_path / "dense")
    shape: ModelShape = Checkpoint(source).shape
    first = shape.layers[0]
    layers = [first] * len(shape.layers)
    layers[3] = replace(first, neurons=1280)
    layers[9] = LayerShape(6, 3, 1024)
    layers[12] = LayerShape(0, 0, 1536)
    layers[17] = LayerShape(6, 2, 0)
    out = prune_checkpoint(source, plan_of(tuple(layers), first), tmp_path / "pruned")
    full = write_gguf(out, tmp_path / "full.gguf", dtype="F32")
    path = quantise(full, tmp_path / "m.gguf", kind="Q4_0", threads=2)
    predicted = predicted_bytes(Checkpoint(out).shape, "Q4_0")
    assert sum(predicted.values()) == sum(tensor.n_bytes for tensor in GgufFile(path).tensors.values())
    expected = logits(load_checkpoint(out))
    with LlamaCpp(full, n_ctx=64, threads=2) as runtime:
        np.testing.assert_allclose(runtime.forward(TOKENS), expected, atol=2e-3 * np.abs(expected).max())
    with LlamaCpp(path, n_ctx=64, threads=2) as runtime:
        found = runtime.forward(runtime.encode("The kettle sings before"))
        assert np.isfinite(found).all()
