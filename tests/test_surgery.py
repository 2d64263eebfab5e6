"""Applying a plan: stock transformers loads the result, and it computes what the plan says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import MakeLlama

from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import BadInput
from edgeprune.models import load
from edgeprune.plan import LayerPlan, PrunePlan, keep_all, uniform_plan
from edgeprune.surgery import prune_checkpoint

IDS = torch.arange(1, 40)[None]


def logits(folder: Path) -> torch.Tensor:
    module, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    with torch.inference_mode():
        return module.eval()(IDS).logits


def some_plan(folder: Path, ratio: float, seed: int = 0) -> PrunePlan:
    shape = Checkpoint(folder).shape
    rng = np.random.default_rng(seed)
    heads = [rng.random(w.heads) for w in shape.layers]
    return uniform_plan(shape, heads, [rng.random(w.neurons) for w in shape.layers], ratio, align=8)


def masked_logits(folder: Path, plan: PrunePlan) -> torch.Tensor:
    """The dense model with the removed heads and neurons silenced: what pruning must equal exactly."""
    model = load(folder)
    with torch.no_grad():
        for layer, kept in zip(model.module.model.layers, plan.layers, strict=True):
            width = model.shape.head_dim
            gone_heads = [h for h in range(model.shape.layers[0].heads) if h not in kept.heads]
            for head in gone_heads:
                layer.self_attn.o_proj.weight[:, head * width : (head + 1) * width] = 0
            gone = [n for n in range(model.shape.layers[0].neurons) if n not in kept.neurons]
            layer.mlp.down_proj.weight[:, gone] = 0
        return model.module(IDS).logits


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 8},
        {"num_key_value_heads": 1, "tie_word_embeddings": False},
        {"head_dim": 24},
        {"attention_bias": True, "mlp_bias": True},
    ],
    ids=["gqa", "mha", "mqa-untied", "wide-heads", "biases"],
)
@pytest.mark.parametrize("ratio", [0.1, 0.4])
def test_pruned_equals_masked_dense(make_llama: MakeLlama, tmp_path: Path, changes: dict, ratio: float) -> None:
    source = make_llama(**changes)
    plan = some_plan(source, ratio)
    out = prune_checkpoint(source, plan, tmp_path / "out")
    torch.testing.assert_close(logits(out), masked_logits(source, plan), rtol=1e-5, atol=1e-5)
    config = json.loads((out / "config.json").read_text())
    assert config["head_dim"] == Checkpoint(source).shape.head_dim
    assert Checkpoint(out).shape.parameters == plan.shape_after(Checkpoint(source).shape).parameters


def test_keep_all_is_the_same_model(tiny_folder: Path, tmp_path: Path) -> None:
    source = Checkpoint(tiny_folder)
    out = Checkpoint(prune_checkpoint(tiny_folder, keep_all(source.shape), tmp_path / "out"))
    assert sorted(out.names) == sorted(source.names)
    assert all(np.array_equal(out.tensor(name), source.tensor(name)) for name in source.names)
    assert torch.equal(logits(out.folder), logits(tiny_folder))


def test_whole_groups_can_leave(tiny_folder: Path, tmp_path: Path) -> None:
    shape = Checkpoint(tiny_folder).shape
    layer = LayerPlan((1, 3), (2, 3, 6, 7), tuple(range(shape.layers[0].neurons)))
    plan = PrunePlan((layer,) * 3, "hand", 0.0, 0.0, "", "")
    out = prune_checkpoint(tiny_folder, plan, tmp_path / "out")
    torch.testing.assert_close(logits(out), masked_logits(tiny_folder, plan), rtol=1e-5, atol=1e-5)


def test_number_format_and_companions_stay(make_llama: MakeLlama, tmp_path: Path) -> None:
    source = make_llama(dtype=torch.bfloat16)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    out = prune_checkpoint(source, some_plan(source, 0.2), tmp_path / "out")
    checkpoint = Checkpoint(out)
    assert {checkpoint.dtype(name) for name in checkpoint.names} == {"BF16"}
    assert "auto_map" not in checkpoint.config and checkpoint.config["torch_dtype"] == "bfloat16"
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_shards(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprune.surgery._SHARD_BYTES", 60_000)
    out = prune_checkpoint(tiny_folder, some_plan(tiny_folder, 0.1), tmp_path / "out")
    assert len(list(out.glob("*.safetensors"))) > 2
    assert logits(out).isfinite().all()


def test_a_failed_write_leaves_the_old_folder(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = prune_checkpoint(tiny_folder, some_plan(tiny_folder, 0.1), tmp_path / "out")
    before = (out / "model.safetensors").read_bytes()

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edgeprune.surgery.save_file", full)
    with pytest.raises(Exception, match="disk is full"):
        prune_checkpoint(tiny_folder, some_plan(tiny_folder, 0.3), out)
    assert (out / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_weights_that_no_longer_fit_their_format_are_refused(make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = make_llama(dtype=torch.float16)

    def replaced(name: str) -> np.ndarray | None:
        return None if name != "model.layers.1.mlp.down_proj.weight" else np.full((64, 128), 1e6, np.float32)

    with pytest.raises(BadInput, match=r"mlp\.down_proj\.weight no longer fits F16; convert the checkpoint"):
        prune_checkpoint(folder, keep_all(Checkpoint(folder).shape), tmp_path / "out", replaced=replaced)
    assert not (tmp_path / "out").exists()


def test_a_plan_for_another_model_is_refused(tiny_folder: Path, make_llama: MakeLlama, tmp_path: Path) -> None:
    other = make_llama(num_hidden_layers=2)
    with pytest.raises(BadInput, match="layers"):
        prune_checkpoint(tiny_folder, some_plan(other, 0.2), tmp_path / "out")
    assert not (tmp_path / "out").exists()
