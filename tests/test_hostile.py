"""Model folders from elsewhere: what their configs and tokenizers say is read, and never obeyed beyond the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SENTENCES, MakeLlama

from edgeprune.calibration import read_texts, read_weighted
from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import BadInput
from edgeprune.export.gguf_writer import write_gguf
from edgeprune.files import write_json
from edgeprune.gguf_vocabulary import gguf_vocabulary
from edgeprune.models import copy_companions, load, resolve
from edgeprune.runtimes.pytorch import load_model, load_tokenizer
from edgeprune.runtimes.tokenizer_file import TokenizerFile, open_tokenizer
from edgeprune.surgery import pruned_config
from edgeprune.vocabulary_plan import VocabularyPlan

TEXT = " ".join(SENTENCES)


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")


@pytest.mark.parametrize("key", ["_attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("value", ["someone/kernel", "flash_attention_2"])
def test_attention_that_a_config_names_is_not_fetched(make_llama: MakeLlama, key: str, value: str) -> None:
    folder = make_llama()
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        before = load_model(folder)(ids).logits
        change(folder / "config.json", **{key: value})
        model = load_model(folder)
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)
    assert model.config._attn_implementation == "sdpa"
    assert key not in pruned_config(Checkpoint(folder).config, Checkpoint(folder).shape)


def test_an_adapter_beside_the_weights_is_refused(make_llama: MakeLlama) -> None:
    folder = make_llama()
    write_json(folder / "adapter_config.json", {"base_model_name_or_path": "/elsewhere"})
    with pytest.raises(BadInput, match="an adapter lies beside the weights"):
        load(folder)


@pytest.mark.parametrize(
    "values",
    [
        {"pad_token_id": 10**6},
        {"dtype": "floaty"},
        {"num_labels": "x"},
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
    ],
)
def test_whatever_transformers_stumbles_over_is_one_line(make_llama: MakeLlama, values: dict[str, Any]) -> None:
    folder = make_llama()
    change(folder / "config.json", **values)
    with pytest.raises(BadInput, match="transformers cannot load it"):
        load_model(folder)


def test_a_header_may_hold_anything(make_llama: MakeLlama) -> None:
    folder = make_llama()
    header = json.dumps({"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(BadInput, match=r"tensor 'a' has dtype \[\]"):
        Checkpoint(folder)


def test_the_tokenizer_is_the_folders_own(make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = make_llama()
    other = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    other["model"]["merges"] = []
    (tmp_path / "other.json").write_text(json.dumps(other), encoding="utf-8")
    before = load_tokenizer(folder)(TEXT)["input_ids"]
    change(folder / "tokenizer_config.json", tokenizer_file=str(tmp_path / "other.json"))
    assert load_tokenizer(folder)(TEXT)["input_ids"] == before
    (tmp_path / "copy").mkdir()
    copy_companions(folder, tmp_path / "copy")
    assert "tokenizer_file" not in json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())


def test_nothing_is_cut_or_padded_whatever_the_file_says(make_llama: MakeLlama) -> None:
    folder = make_llama()
    before = load_tokenizer(folder)(TEXT)["input_ids"]
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 5000}, "direction": "Left", "pad_to_multiple_of": None}
    pad |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    change(folder / "tokenizer.json", truncation=cut, padding=pad)
    assert TokenizerFile(folder).encode(TEXT) == before
    assert TokenizerFile(folder).bos is None
    assert open_tokenizer(folder).encode(TEXT).ids == before
    tokenizer = load_tokenizer(folder)
    assert tokenizer(TEXT)["input_ids"] == before and tokenizer.backend_tokenizer.encode(TEXT).ids == before
    gguf_vocabulary(folder, Checkpoint(folder).shape.vocab)


def test_tokenizers_that_end_or_fill_the_process_are_refused(make_llama: MakeLlama) -> None:
    folder = make_llama()
    whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))

    def refused(message: str, content: Any) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        for read in (load_tokenizer, open_tokenizer, lambda folder: TokenizerFile(folder).encode(TEXT)):
            with pytest.raises(BadInput, match=message):
                read(folder)

    refused("with continuing_subword_prefix", whole | {"model": whole["model"] | {"continuing_subword_prefix": "../x"}})
    far = whole["model"]["vocab"] | {"far": 30_000_000}
    refused("token id 30000000 among", whole | {"model": whole["model"] | {"vocab": far}})
    refused("no JSON|not JSON|JSON", json.dumps(whole)[:500])
    refused("does not load", whole | {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}}})


def test_half_a_character_is_one_line(make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = make_llama()
    change(folder / "config.json", _name_or_path="a\ud800")
    with pytest.raises(BadInput, match="no Unicode"):
        write_gguf(folder, tmp_path / "out.gguf")
    with pytest.raises(BadInput, match="no Unicode"):
        write_json(tmp_path / "out.json", {"name": "a\ud800"})
    assert not list(tmp_path.glob("out*"))


def test_a_plan_may_not_claim_billions_of_tokens(tmp_path: Path) -> None:
    plan = {"schema_version": 1, "size_before": 3 * 10**9, "kept": ["0-2000000000"], "shift": "", "direction": ""}
    write_json(tmp_path / "plan.json", plan | {"corpus_files": []})
    with pytest.raises(BadInput, match="vocabulary"):
        VocabularyPlan.load(tmp_path / "plan.json")


def test_texts_that_break_their_readers_are_one_line(tmp_path: Path) -> None:
    deep, heavy = tmp_path / "deep.json", tmp_path / "heavy.jsonl"
    deep.write_text("[" * 200_000, encoding="utf-8")
    heavy.write_text('{"text": "a", "weight": 1' + 400 * "0" + "}\n", encoding="utf-8")
    with pytest.raises(BadInput):
        list(read_texts(deep))
    with pytest.raises(BadInput, match="weight"):
        list(read_weighted(heavy))


def test_what_is_no_name_on_the_hub_is_said() -> None:
    with pytest.raises(BadInput, match=r"is no name of a model on the hub|no such file"):
        resolve("foo/bar--baz")
