"""The reference runtime keeps the protocol: a cached forward is the one-shot one, greedy is transformers' greedy."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_configs import save_tiny
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import BadInput
from edgeprune.plan import LayerPlan, PrunePlan
from edgeprune.runtimes import open_runtime, runtime_for
from edgeprune.runtimes.base import generate
from edgeprune.runtimes.pytorch import PyTorch, load_model
from edgeprune.surgery import prune_checkpoint

N_CTX = 48


def tiny(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 300}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "eos_token_id": None, **changes})).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|start|>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def runtime(folder: Path) -> PyTorch:
    return PyTorch(folder, n_ctx=N_CTX, threads=1)


def tokens(count: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, 300, count)]


def one_shot(ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return tiny()(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()


def test_open_runtime_finds_it(folder: Path) -> None:
    assert runtime_for(folder) == "pytorch"
    opened = open_runtime(folder, n_ctx=8, threads=1)
    assert (opened.name, opened.n_vocab, opened.n_ctx, opened.n_past) == ("pytorch", 300, 8, 0)
    opened.close()


@pytest.mark.parametrize("pieces", [[20], [1] * 20, [7, 1, 12]])
def test_pieces_through_the_cache_are_the_one_shot_forward(runtime: PyTorch, pieces: list[int]) -> None:
    ids = tokens(20)
    starts = np.cumsum([0, *pieces])
    logits = [runtime.forward(ids[a:b]) for a, b in itertools.pairwise(starts)]
    assert runtime.n_past == 20
    joined = np.concatenate(logits)
    assert joined.dtype == np.float32 and joined.shape == (20, 300)
    np.testing.assert_allclose(joined, one_shot(ids), rtol=1e-4, atol=1e-4)


def test_last_only_is_the_last_row(runtime: PyTorch) -> None:
    last = runtime.forward(np.array(tokens(9)), last_only=True)
    assert last.shape == (1, 300)
    np.testing.assert_allclose(last[0], one_shot(tokens(9))[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep", [0, 5, 12])
def test_rewind_forgets_the_rest(runtime: PyTorch, keep: int) -> None:
    ids = tokens(12)
    runtime.forward(ids)
    runtime.rewind(keep)
    assert runtime.n_past == keep
    other = tokens(6, seed=1)
    np.testing.assert_allclose(runtime.forward(other), one_shot(ids[:keep] + other)[keep:], rtol=1e-4, atol=1e-4)


def test_greedy_is_that_of_transformers(runtime: PyTorch) -> None:
    prompt = tokens(10)
    expected = tiny().generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, 10), max_new_tokens=16, do_sample=False, pad_token_id=0
    )
    assert list(generate(runtime, prompt, 16)) == expected[0, 10:].tolist()


def test_greedy_stops_after_a_stop_token(runtime: PyTorch) -> None:
    free = list(generate(runtime, tokens(10), 8))
    assert list(generate(runtime, tokens(10), 8, stop={free[2]})) == free[: free.index(free[2]) + 1]


def test_what_does_not_fit_is_refused_and_changes_nothing(runtime: PyTorch) -> None:
    runtime.forward(tokens(N_CTX - 1))
    with pytest.raises(BadInput, match="context"):
        runtime.forward(tokens(2))
    for bad in ([300], [-1], []):
        with pytest.raises(BadInput):
            runtime.forward(bad)
    with pytest.raises(BadInput, match="rewind"):
        runtime.rewind(N_CTX)
    assert runtime.n_past == N_CTX - 1
    runtime.forward(tokens(1))


@pytest.mark.parametrize("text", ["Hello, world", " two  spaces\n", "naïve 東京 🙂", ""])
def test_text_goes_to_ids_and_back(runtime: PyTorch, text: str) -> None:
    assert runtime.decode(runtime.encode(text)) == text


def test_special_tokens_are_read_only_on_demand(runtime: PyTorch) -> None:
    plain, parsed = runtime.encode("a<|end|>"), runtime.encode("a<|end|>", parse_special=True)
    assert len(plain) == len("a<|end|>") and len(parsed) == 2
    assert runtime.encode("a<|end|>") == plain  # the tokenizer keeps no mode
    assert runtime.decode(parsed) == "a"


def test_a_loaded_module_serves_as_it_is() -> None:
    model = tiny().to(torch.bfloat16)
    runtime = PyTorch.of(model, None, n_ctx=16)
    logits = runtime.forward(tokens(4))
    assert logits.dtype == np.float32 and logits.shape == (4, 300)
    with pytest.raises(BadInput, match="without a tokenizer"):
        runtime.encode("a")
    runtime.close()
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_half_precision_files_are_computed_in_float32(tmp_path: Path) -> None:
    tiny().to(torch.bfloat16).save_pretrained(tmp_path)
    logits = PyTorch(tmp_path, n_ctx=16, threads=1).forward(tokens(6))
    model = tiny()
    with torch.no_grad():  # the weights are rounded, the rotary frequencies are not
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([tokens(6)])).logits[0].numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_head_width_and_tied_head_of_a_pruned_model(tmp_path: Path) -> None:
    changes = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 16, "tie_word_embeddings": True}
    tiny(**changes).save_pretrained(tmp_path)
    with torch.no_grad():
        expected = tiny(**changes)(input_ids=torch.tensor([tokens(6)])).logits[0].numpy()
    logits = PyTorch(tmp_path, n_ctx=16, threads=1).forward(tokens(6))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("widths", ["alike", "differing"])
def test_a_soft_cap_of_attention_is_computed(widths: str, tmp_path: Path) -> None:
    """As llama.cpp and ONNX Runtime do; transformers' default attention leaves it out."""
    folder = save_tiny(tmp_path / "m", "gemma2", attn_logit_softcapping=0.5, initializer_range=0.3)
    if widths == "differing":
        dense = Checkpoint(folder).shape.layers[0]
        whole = LayerPlan(tuple(range(dense.kv_heads)), tuple(range(dense.heads)), tuple(range(dense.neurons)))
        plan = PrunePlan((whole, whole, replace(whole, neurons=(1, 4, 9))), "hand", 0.0, 0.0, "", "")
        folder = prune_checkpoint(folder, plan, tmp_path / "pruned")
    ids = tokens(12)
    found = PyTorch(folder, n_ctx=16, threads=1).forward(ids)
    module = load_model(folder)
    by_kind = {}
    for kind in ("eager", "sdpa"):
        module.set_attn_implementation(kind)
        with torch.no_grad():
            by_kind[kind] = module(input_ids=torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_array_equal(found, by_kind["eager"])
    assert np.abs(found - by_kind["sdpa"]).max() > 0.05 * np.abs(found).max()


def test_pickles_are_refused(tmp_path: Path) -> None:
    tiny().config.save_pretrained(tmp_path)
    torch.save(tiny().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(BadInput, match="pickled weights"):
        PyTorch(tmp_path, n_ctx=16, threads=1)


def test_a_missing_weight_is_refused_not_invented(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(BadInput, match=r"missing keys: model\.layers\.1\.mlp\.down_proj\.weight"):
        PyTorch(tmp_path, n_ctx=16, threads=1)


def test_a_width_that_does_not_match_is_refused(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(BadInput, match="transformers cannot load it"):
        PyTorch(tmp_path, n_ctx=16, threads=1)


def test_no_tokenizer_is_an_error_only_when_text_is_asked_for(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    runtime = PyTorch(tmp_path, n_ctx=16, threads=1)
    runtime.forward(tokens(2))
    with pytest.raises(BadInput, match="no tokenizer"):
        runtime.encode("a")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match="the tokenizer does not load"):
        runtime.encode("a")
