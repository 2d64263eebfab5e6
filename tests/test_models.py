"""Names become models: folders, GGUF files, hub ids; and what is refused, with one line that helps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeLlama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from edgeprune.blocks import LayeredModel
from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import BadInput
from edgeprune.models import load, resolve


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_checkpoint_reads_what_torch_wrote(make_llama: MakeLlama) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        folder = make_llama(dtype=dtype)
        checkpoint = Checkpoint(folder)
        for name, tensor in load_file(folder / "model.safetensors").items():
            assert np.array_equal(checkpoint.tensor(name), tensor.float().numpy())


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 4000), flips=st.lists(st.tuples(st.integers(0, 3999), st.integers(0, 255)), max_size=4))
def test_hostile_safetensors_never_end_in_anything_but_bad_input(
    tiny_folder: Path, tmp_path: Path, cut: int, flips: list[tuple[int, int]]
) -> None:
    folder = tmp_path / "hostile"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(tiny_folder / "config.json", folder)
    data = bytearray((tiny_folder / "model.safetensors").read_bytes())
    for at, value in flips:
        data[at] = value
    (folder / "model.safetensors").write_bytes(data[: len(data) - cut])
    try:
        checkpoint = Checkpoint(folder)
        for name in checkpoint.names:
            checkpoint.tensor(name)
    except BadInput as error:
        assert "\n" not in str(error)


def test_pickles_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_folder / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(BadInput, match="pickled weights"):
        load(tmp_path)
    with pytest.raises(BadInput, match="pickled weights"):
        resolve(str(tmp_path / "pytorch_model.bin"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dmeo", "did you mean 'demo'"),
        ("./nowhere", "no such file"),
        ("missing.gguf", "no such file"),
        ("nobody/no-such-model", "hub"),
    ],
)
def test_unknown_models(name: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        resolve(name)
    assert caught.value.remedy or "no such" in str(caught.value)


def test_code_that_a_model_brings_is_never_run(make_llama: MakeLlama, tmp_path: Path) -> None:
    folder, marker = make_llama(), tmp_path / "ran"
    (folder / "theirs.py").write_text(f"open({str(marker)!r}, 'w').close()\nTheirs = None\n", encoding="utf-8")
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    change_config(folder, auto_map=dict.fromkeys(classes, "theirs.Theirs"))
    settings_file = folder / "tokenizer_config.json"
    tokenizer = json.loads(settings_file.read_text()) | {"auto_map": {"AutoTokenizer": ["theirs.Theirs", None]}}
    settings_file.write_text(json.dumps(tokenizer))
    model = load(folder)
    assert model.tokenizer("the sea")["input_ids"]
    LayeredModel(Checkpoint(folder))
    assert not marker.exists()


def test_unknown_family_names_the_supported(make_llama: MakeLlama) -> None:
    folder = make_llama()
    change_config(folder, model_type="lama")
    with pytest.raises(
        BadInput, match=r"config.json: unknown model family 'lama'; did you mean 'llama'\? known: .*llama"
    ):
        load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": -1},
        {"hidden_size": "many"},
        {"num_attention_heads": 6},
        {"num_hidden_layers": None},
        {"num_hidden_layers": 1 << 30},  # takes no gigabytes either
        {"hidden_act": "gelu"},
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
        {"model_type": 3},
        {"rope_scaling": 3},
        {"rope_scaling": {"rope_type": ["linear"]}},
        {"rms_norm_eps": "small"},
        {"rope_theta": []},
        {"eos_token_id": {"a": 1}},
    ],
)
def test_impossible_configs_are_refused(make_llama: MakeLlama, changes: dict[str, object]) -> None:
    folder = make_llama()
    change_config(folder, **changes)
    with pytest.raises(BadInput, match=r"config\.json"):
        load(folder)


def test_weights_that_do_not_match_are_never_made_up(make_llama: MakeLlama) -> None:
    folder = make_llama()
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match="missing keys"):
        load(folder)
    folder = make_llama()
    change_config(folder, intermediate_size=64)
    with pytest.raises(BadInput):
        load(folder)


def test_broken_json_is_one_line(make_llama: MakeLlama) -> None:
    folder = make_llama()
    for text in ("{", "[]", "[" * 100_000, ""):
        (folder / "config.json").write_text(text)
        with pytest.raises(BadInput, match=r"config\.json") as caught:
            load(folder)
        assert "\n" not in str(caught.value)


def test_a_hub_id_is_found_in_the_local_cache(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layout of the hub's cache: refs name a revision, snapshots hold its files."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    shutil.copytree(tiny_folder, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_OFFLINE", True)
    assert resolve("someone/tiny") == snapshot
    assert load("someone/tiny").shape.parameters == Checkpoint(tiny_folder).shape.parameters


def test_rope_parameters_of_newer_configs_are_not_passed_over(make_llama: MakeLlama) -> None:
    """transformers 5 writes theta elsewhere; torch and every export must see it."""
    old, new = make_llama(rope_theta=50_000.0), make_llama(rope_theta=50_000.0)
    config = json.loads((new / "config.json").read_text())
    del config["rope_theta"]
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 50_000.0}
    (new / "config.json").write_text(json.dumps(config))
    assert Checkpoint(new).shape == Checkpoint(old).shape
    ids = torch.arange(1, 100)[None]
    with torch.inference_mode():
        torch.testing.assert_close(load(new).module(ids).logits, load(old).module(ids).logits)


def test_the_hash_follows_the_weights(make_llama: MakeLlama) -> None:
    one, same, other = make_llama(), make_llama(), make_llama(seed=1)
    assert Checkpoint(one).hash() == Checkpoint(same).hash() != Checkpoint(other).hash()


def test_weights_are_those_of_the_index(make_llama: MakeLlama) -> None:
    """Repositories of Mistral have all weights a second time, under other names."""
    folder = make_llama()
    names = set(Checkpoint(folder).names)
    save_file({"layers.0.attention.wq.weight": torch.zeros(2, 2)}, folder / "consolidated.safetensors")
    assert set(Checkpoint(folder).names) == names
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
    assert set(Checkpoint(folder).names) == names
    for other, message in (
        ("../x.safetensors", "no .* file of the folder"),
        ("y.safetensors", "y.safetensors is missing"),
    ):
        index.write_text(json.dumps({"weight_map": {"a": other}}))
        with pytest.raises(BadInput, match=message):
            Checkpoint(folder)


def test_texts_end_where_generation_config_says_so_too(make_llama: MakeLlama) -> None:
    folder = make_llama()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 0]}))
    assert Checkpoint(folder).shape.eos == (0, 7)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": "seven"}))
    with pytest.raises(BadInput, match="eos_token_id"):
        Checkpoint(folder)
