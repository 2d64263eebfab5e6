"""Every family: read from its own config, scored, pruned, saved, loaded by stock transformers, written as GGUF."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from family_configs import TINY, family_of, save_tiny, tiny_module

from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import BadInput
from edgeprune.export.gguf_quantise import predicted_bytes, quantise, tensor_types
from edgeprune.export.gguf_writer import write_gguf
from edgeprune.export.widths import layer_shapes
from edgeprune.fetch import demo_model
from edgeprune.gguf_checkpoint import gguf_to_folder
from edgeprune.importance import amp_scores
from edgeprune.models import load
from edgeprune.plan import LayerPlan, PrunePlan, keep_all
from edgeprune.pruning import METHODS, plan_for, prune
from edgeprune.runtimes.gguf_file import GgufFile
from edgeprune.runtimes.llamacpp import LlamaCpp
from edgeprune.shape import shape_from_config
from edgeprune.surgery import prune_checkpoint
from edgeprune.tokenizer_proof import PROOF_TEXTS, prove_same_ids

NAMES = list(TINY)
IDS = torch.arange(1, 60)[None]

Tiny = Callable[[str], Path]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The folder of an entry of `TINY`, saved once; not to be written to."""
    return functools.cache(lambda name: save_tiny(tmp_path_factory.mktemp(name) / "dense", name))


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_real_class(name: str) -> None:
    for changes in ({}, {"tie_word_embeddings": False}, {"tie_word_embeddings": True}, {"attention_bias": True}):
        module = tiny_module(name, **changes)
        shape = shape_from_config(json.loads(module.config.to_json_string()))
        assert shape.family.name == family_of(name)
        assert shape.parameters == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_table_names_every_tensor_of_the_real_class(name: str, tiny: Tiny) -> None:
    checkpoint = Checkpoint(tiny(name))
    family, shape = checkpoint.shape.family, checkpoint.shape
    roles = (*family.hidden_norms, *family.head_norms, *family.attention_inputs, "output", *family.mlp_inputs, "down")
    known = {family.in_layer(i, role) for i in range(len(shape.layers)) for role in roles}
    known |= {family.embedding, family.final_norm, family.head}
    assert {tensor.rpartition(".")[0] for tensor in checkpoint.names} == known - (
        {family.head} if shape.tied else set()
    )


def stock_logits(folder: Path) -> torch.Tensor:
    """Logits by stock transformers, which must find every weight where it looks for it."""
    module, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )  # eager attention is the one that has soft caps
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    with torch.inference_mode():
        return module.eval()(IDS).logits[0]


def masked_logits(folder: Path, plan: PrunePlan) -> torch.Tensor:
    """The dense model with the removed heads and neurons silenced: what pruning must equal exactly."""
    model = load(folder)
    family, width = model.shape.family, model.shape.head_dim
    with torch.no_grad():
        for index, (layer, dense) in enumerate(zip(plan.layers, model.shape.layers, strict=True)):
            output = model.module.get_submodule(family.in_layer(index, "output")).weight
            for head in set(range(dense.heads)) - set(layer.heads):
                output[:, head * width : (head + 1) * width] = 0
            down = model.module.get_submodule(family.in_layer(index, "down")).weight
            down[:, sorted(set(range(dense.neurons)) - set(layer.neurons))] = 0
        return model.module(IDS).logits[0]


def plan_of(folder: Path, ratio: float, *, method: str = "random") -> PrunePlan:
    """A uniform plan of the folder's model by AMP scores on a few tokens, or by chance."""
    model = load(folder)
    texts = [torch.arange(5, 5 + length) for length in (40, 24)]
    scores = METHODS[method](amp_scores(model, texts), 1)
    return plan_for(model.shape, scores, ratio, align=8)


def cut(folder: Path, seed: int = 3) -> PrunePlan:
    """A plan by chance that removes a group, a head of the other group, and neurons, whatever the ratio."""
    shape = Checkpoint(folder).shape
    random, layers = np.random.default_rng(seed), []
    for dense in shape.layers:
        group = dense.heads // dense.kv_heads
        kv = sorted(random.choice(dense.kv_heads, max(1, dense.kv_heads // 2), replace=False).tolist())
        each = max(1, group - 1)
        heads = [h * group + g for h in kv for g in sorted(random.choice(group, each, replace=False).tolist())]
        neurons = sorted(random.choice(dense.neurons, 72, replace=False).tolist())
        layers.append(LayerPlan(tuple(kv), tuple(heads), tuple(neurons)))
    return PrunePlan(tuple(layers), "hand", 0.0, 0.0, "", "")


@pytest.mark.parametrize("name", NAMES)
def test_pruned_equals_masked_dense_in_stock_transformers(name: str, tiny: Tiny, tmp_path: Path) -> None:
    source = tiny(name)
    for count, plan in enumerate((plan_of(source, 0.15, method="amp"), cut(source))):
        out = prune_checkpoint(source, plan, tmp_path / f"pruned{count}")
        torch.testing.assert_close(stock_logits(out), masked_logits(source, plan), rtol=1e-4, atol=1e-5)
        after = plan.shape_after(Checkpoint(source).shape)
        assert Checkpoint(out).shape == replace(after, bos=Checkpoint(out).shape.bos)
        assert layer_shapes(Checkpoint(out), after) == after.layers


@pytest.mark.parametrize("name", NAMES)
def test_the_ratio_is_hit(name: str, tiny: Tiny) -> None:
    source = tiny(name)
    shape = Checkpoint(source).shape
    plan = plan_of(source, 0.2, method="amp")
    step = 8 * (len(shape.layers) * (3 if shape.family.gated else 2) * shape.hidden + 10) / shape.parameters
    assert abs(plan.reached_ratio - 0.2) <= step
    if shape.family.fixed_heads:
        assert plan.scope == "mlp"
        assert all(
            layer.heads == tuple(range(dense.heads)) for layer, dense in zip(plan.layers, shape.layers, strict=True)
        )
        assert plan.layers[0].widths.neurons < shape.layers[0].neurons


def vocabulary(gguf: Path) -> dict[str, Any]:
    """The tokenizer's metadata, arrays as lists."""
    values = GgufFile(gguf).values("tokenizer.")
    return {
        key: each.value.tolist() if isinstance(each.value, np.ndarray) else each.value for key, each in values.items()
    }


def context_of(path: Path) -> int:
    """Tokens of `IDS` that the GGUF file at `path` is good for: no more than a window its architecture has not."""
    file = GgufFile(path)
    return min(IDS.shape[1], file.get(f"{file.architecture}.context_length", int))


def parity(folder: Path, path: Path) -> float:
    """The largest difference of logits of the GGUF file at `path` to the folder's in torch, relative to the largest."""
    length = context_of(path)
    expected = stock_logits(folder).numpy()[:length]
    with LlamaCpp(path, n_ctx=128, threads=1, exact=True) as runtime:
        found = runtime.forward(IDS[0, :length].tolist())
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", NAMES)
def test_gguf_gives_the_logits_of_torch(name: str, tiny: Tiny, tmp_path: Path) -> None:
    dense = tiny(name)
    shape = Checkpoint(dense).shape
    family = shape.family
    plan = plan_of(dense, 0.15) if shape.fixed_heads else cut(dense)
    pruned = prune_checkpoint(dense, plan, tmp_path / "pruned")
    for folder in (dense, pruned):
        path = write_gguf(folder, tmp_path / f"{folder.name}.gguf", dtype="F32")
        assert parity(folder, path) < 1e-3
        back = gguf_to_folder(path, tmp_path / f"{folder.name}-back")
        seen = slice(context_of(path))
        torch.testing.assert_close(stock_logits(back)[seen], stock_logits(folder)[seen], rtol=1e-4, atol=1e-5)
        own = GgufFile(path).architecture == family.gguf_arch and name.partition("-")[0] != "mistral"
        assert not own or Checkpoint(back).shape.layers == Checkpoint(folder).shape.layers
        assert not own or Checkpoint(back).shape.family == family


@pytest.mark.parametrize("name", NAMES)
def test_types_are_as_predicted(name: str, tmp_path: Path) -> None:
    # Twelve layers, so that the mixtures' rules for the first and last of them apply; rows of whole blocks of 256.
    widths = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 256}
    folder = save_tiny(tmp_path / "dense", name, num_hidden_layers=12, **widths)
    shape = Checkpoint(folder).shape
    source = write_gguf(folder, tmp_path / "f16.gguf")
    for kind in ("F16", "Q8_0", "Q4_0", "Q4_K_M", "Q5_K_M", "Q3_K_M", "Q2_K"):
        file = GgufFile(quantise(source, tmp_path / "q.gguf", kind=kind, threads=1))
        assert {tensor: info.type for tensor, info in file.tensors.items()} == tensor_types(shape, kind), kind
        assert file.bytes_by_part() == predicted_bytes(shape, kind), kind


@pytest.mark.slow
def test_the_scale_that_llama_cpp_gives_the_largest_gemmas_is_made_up_for(tmp_path: Path) -> None:
    for name, layers in (("gemma2", 46), ("gemma3", 62)):
        folder = save_tiny(tmp_path / name, name, num_hidden_layers=layers, intermediate_size=32)
        path = write_gguf(folder, tmp_path / f"{name}.gguf", dtype="F32")
        assert parity(folder, path) < 5e-3  # ggml rounds GELU to half precision, layer after layer
        assert Checkpoint(gguf_to_folder(path, tmp_path / "back")).shape.query_scalar == 64 // 4


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_any_pattern_of_windows_is_carried(name: str, tmp_path: Path) -> None:
    for count, kinds in enumerate((["full", "full", "sliding"], ["full"] * 3, ["sliding"] * 3)):
        kinds = [f"{kind}_attention" for kind in kinds]
        folder = save_tiny(tmp_path / f"{count}", name, num_hidden_layers=3, layer_types=kinds)
        path = write_gguf(folder, tmp_path / f"{count}.gguf", dtype="F32")
        assert parity(folder, path) < 1e-3
        assert Checkpoint(gguf_to_folder(path, tmp_path / "back")).shape.windows == Checkpoint(folder).shape.windows


def test_newer_rope_words_of_each_kind_of_layer_are_read(tiny: Tiny, tmp_path: Path) -> None:
    """transformers 5 writes one set of rotary parameters for each kind of layer."""
    old = tiny("gemma3")
    new = Path(shutil.copytree(old, tmp_path / "new"))
    config = json.loads((new / "config.json").read_text())
    config["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    for key in ("rope_theta", "rope_scaling", "rope_local_base_freq"):
        config.pop(key)
    (new / "config.json").write_text(json.dumps(config))
    shape = Checkpoint(new).shape
    assert (shape.rope_theta, shape.local_rope_theta) == (5e5, 2e4)
    assert shape.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    path = write_gguf(prune_checkpoint(new, keep_all(shape), tmp_path / "older"), tmp_path / "m.gguf", dtype="F32")
    assert parity(tmp_path / "older", path) < 1e-3
    assert (stock_logits(tmp_path / "older") - stock_logits(old)).abs().max() > 1e-2


def test_prune_says_that_heads_stay(tiny: Tiny, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The kettle sings before the water boils. " * 40)
    said: list[str] = []

    def progress(stage: str, _done: int, _total: int) -> None:
        said.append(stage)

    for name, told in (("phi", True), ("phi3", False)):
        said.clear()
        prune(tiny(name), 0.1, tmp_path / name, uniform=True, align=8, calibration=str(text), progress=progress)
        assert any("keeps its heads" in each for each in said) is told
        assert stock_logits(tmp_path / name).isfinite().all()


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "longrope": ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "rotary scaling 'longrope'"),
    "phi's q and k norms": ("phi", {"qk_layernorm": True}, "qk_layernorm"),
    "images": ("gemma3", {"model_type": "gemma3"}, "images"),
    "both directions": ("gemma3", {"use_bidirectional_attention": True}, "both directions"),
    "another activation": ("gemma2", {"hidden_activation": "relu"}, "hidden_activation 'relu'"),
    "odd rotary part": ("phi", {"partial_rotary_factor": 0.2}, "partial_rotary_factor"),
    "layer types": ("gemma2", {"layer_types": ["sliding_attention"]}, "layer_types"),
    "window": ("mistral", {"sliding_window": "wide"}, "sliding_window"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_config_may_not_say(case: str, tiny: Tiny) -> None:
    name, changes, message = REFUSED[case]
    with pytest.raises(BadInput, match=message):
        shape_from_config(Checkpoint(tiny(name)).config | changes)


UNHELD: dict[str, tuple[str, dict[str, Any], str]] = {
    "phi with fewer heads": ("phi", {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}, "scope mlp"),
    "gemma2 without caps": ("gemma2", {"attn_logit_softcapping": None}, "no soft cap"),
    "gemma2 with a head": ("gemma2", {"tie_word_embeddings": False}, "not tied"),
    "gemma3 with a cap": ("gemma3", {"attn_logit_softcapping": 50.0}, "has a soft cap"),
    "qwen3 with output bias": ("qwen3", {"attention_bias": True}, "biases other"),
}


@pytest.mark.parametrize("case", UNHELD)
def test_what_gguf_cannot_hold_is_told(case: str, tmp_path: Path) -> None:
    name, changes, message = UNHELD[case]
    folder = save_tiny(tmp_path / "model", name, **changes)
    stock_logits(folder)  # transformers holds them all
    with pytest.raises(BadInput, match=message):
        write_gguf(folder, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


@pytest.fixture(scope="module")
def gemma_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_to_folder(demo_model("gemma3-270m"), tmp_path_factory.mktemp("gemma") / "folder")


def tail_logits(path: Path, tokens: list[int], count: int, *, exact: bool) -> np.ndarray[Any, Any]:
    """Logits of the last `count` tokens: all of them would be a gigabyte at this vocabulary."""
    with LlamaCpp(path, n_ctx=1024, threads=2, exact=exact) as runtime:
        runtime.forward(tokens[:-count], last_only=True)
        return runtime.forward(tokens[-count:])


def gemma_logits(folder: Path, path: Path) -> tuple[list[int], np.ndarray[Any, Any]]:
    """A text longer than the window, and its last logits in torch; those of the GGUF file at `path` are the same."""
    text = "\n".join(PROOF_TEXTS) * 2
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(text).input_ids[:600]
    assert len(tokens) == 600 and tokens[0] == 2
    module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = module(torch.tensor([tokens]), logits_to_keep=16).logits[0].numpy()
    found = tail_logits(path, tokens, 16, exact=True)
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()
    assert (found.argmax(-1) == expected.argmax(-1)).all()
    return tokens, expected


@pytest.mark.demo
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_gemma_270m_for_real(gemma_folder: Path, tmp_path: Path) -> None:
    original = demo_model("gemma3-270m")
    assert prove_same_ids(original, gemma_folder) > len(PROOF_TEXTS)
    path = write_gguf(gemma_folder, tmp_path / "m.gguf", dtype="F32")
    assert vocabulary(path) == vocabulary(original)
    tokens, expected = gemma_logits(gemma_folder, path)
    stock = tail_logits(original, tokens, 16, exact=False)
    assert (stock.argmax(-1) == expected.argmax(-1)).mean() > 0.8
    types = {name: info.type for name, info in GgufFile(original).tensors.items()}
    assert types == tensor_types(Checkpoint(gemma_folder).shape, "Q4_K_M")


@pytest.mark.demo
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_gemma_270m_pruned_for_real(gemma_folder: Path, tmp_path: Path) -> None:
    plan = plan_of(gemma_folder, 0.1, method="amp")
    assert plan.layers[0].widths.neurons < 2048
    folder = prune_checkpoint(gemma_folder, plan, tmp_path / "pruned")
    gemma_logits(folder, write_gguf(folder, tmp_path / "m.gguf", dtype="F32"))
