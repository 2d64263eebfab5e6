"""llama.cpp runs what we write: logits against torch, the cache, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeLlama
from transformers import AutoTokenizer, LlamaForCausalLM

from edgeprune.errors import BadInput, StageFailed
from edgeprune.export.gguf_quantise import quantise
from edgeprune.export.gguf_writer import write_gguf
from edgeprune.runtimes import open_runtime
from edgeprune.runtimes.base import generate
from edgeprune.runtimes.llamacpp import LlamaCpp
from edgeprune.runtimes.llamacpp_library import build_info, system_info
from edgeprune.runtimes.llamacpp_vocabulary import Vocabulary

TEXT = "The kettle sings in 2019: she'll carry 48,211 cars, and half of that.\n\ndef add(a, b): return a + b\n" * 2


def logits_of(folder: Path, tokens: list[int]) -> np.ndarray[Any, Any]:
    model = LlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    with torch.no_grad():
        found: np.ndarray[Any, Any] = model(torch.tensor([tokens])).logits[0].numpy()
    return found


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "tied, grouped, wide heads": {},
    "untied, one group": {"tie_word_embeddings": False, "num_key_value_heads": 1},
    "ungrouped, narrow heads": {"num_key_value_heads": 8, "head_dim": 4},
    "odd widths": {"intermediate_size": 103, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 20},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3 rotary": {"rope_scaling": LLAMA3, "rope_theta": 5000.0},
    "linear rotary": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("case", MODELS)
def test_logits_equal_torch(case: str, make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = make_llama(**MODELS[case])
    tokens = AutoTokenizer.from_pretrained(folder)(TEXT).input_ids[:200]
    expected = logits_of(folder, tokens)
    spread = np.abs(expected).max()
    for dtype, exact, tolerance in (("F32", True, 1e-4), ("F32", False, 1e-3), ("F16", False, 1e-2)):
        path = write_gguf(folder, tmp_path / f"{dtype}.gguf", dtype=dtype)  # type: ignore[arg-type]
        with LlamaCpp(path, n_ctx=256, threads=1, exact=exact) as runtime:
            assert runtime.encode(TEXT)[:200] == tokens
            logits = runtime.forward(tokens)
        assert logits.shape == expected.shape
        assert np.abs(logits - expected).max() / spread < tolerance, (dtype, exact)
        if exact:
            assert (logits.argmax(-1) == expected.argmax(-1)).all()


@pytest.fixture(scope="module")
def small(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny_folder, tmp_path_factory.mktemp("gguf") / "small.gguf", dtype="F32")


def test_cache(small: Path) -> None:
    tokens = list(range(20, 60))
    with LlamaCpp(small, n_ctx=128, threads=1, exact=True) as runtime:
        assert (runtime.n_ctx, runtime.n_past) == (128, 0)
        whole = runtime.forward(tokens)
        assert runtime.n_past == 40
        runtime.rewind(10)
        assert np.allclose(runtime.forward(tokens[10:]), whole[10:], atol=1e-5)
        runtime.rewind(0)
        one_by_one = np.concatenate([runtime.forward([token]) for token in tokens])
        assert np.allclose(one_by_one, whole, atol=1e-4)
        runtime.rewind(0)
        last = runtime.forward(np.array(tokens), last_only=True)
        assert last.shape == (1, runtime.n_vocab)
        assert np.allclose(last, whole[-1:], atol=1e-5)


def test_is_found_by_the_file_s_name(small: Path) -> None:
    runtime = open_runtime(small, n_ctx=8, threads=1)
    assert isinstance(runtime, LlamaCpp)
    assert runtime.name == "llamacpp"
    runtime.close()


def test_returned_logits_are_kept(small: Path) -> None:
    with LlamaCpp(small, n_ctx=64, threads=1) as runtime:
        first = runtime.forward([1, 2, 3])
        copy = first.copy()
        runtime.forward([4, 5, 6])
        assert (first == copy).all()


def test_long_prompts_are_cut_in_batches(make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = make_llama(max_position_embeddings=4096, num_hidden_layers=1)
    tokens = (np.arange(2300) % 400).tolist()
    with LlamaCpp(write_gguf(folder, tmp_path / "m.gguf", dtype="F32"), n_ctx=2400, threads=2, exact=True) as runtime:
        every = runtime.forward(tokens)
        runtime.rewind(0)
        assert np.allclose(runtime.forward(tokens, last_only=True), every[-1:], atol=1e-4)
        runtime.rewind(0)
        runtime.prefill(tokens)
        assert runtime.n_past == 2300
        after = runtime.forward([7])
    assert every.shape[0] == 2300
    assert np.allclose(after, logits_of(folder, [*tokens, 7])[-1:], atol=1e-3)


def test_step_is_forward_without_logits(small: Path) -> None:
    with LlamaCpp(small, n_ctx=64, threads=1, exact=True) as runtime:
        expected = runtime.forward([5, 6, 7, 8])[-1]
        runtime.rewind(0)
        for token in (5, 6, 7):
            runtime.step(token)
        assert runtime.n_past == 3
        assert np.allclose(runtime.forward([8])[0], expected, atol=1e-4)
        with pytest.raises(StageFailed, match="invalid token"):
            runtime.step(runtime.n_vocab)
        assert runtime.n_past == 4


def test_without_room_for_all_logits(small: Path) -> None:
    with LlamaCpp(small, n_ctx=64, threads=1, all_logits=False) as runtime:
        assert runtime.forward([1, 2, 3], last_only=True).shape[0] == 1
        assert runtime.forward([4]).shape[0] == 1
        with pytest.raises(BadInput, match="all_logits"):
            runtime.forward([5, 6])
        runtime.prefill([5, 6])
        assert runtime.n_past == 6


def test_greedy_generation_equals_torch(tiny_folder: Path, small: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_folder)
    prompt = [11, 42, 99]
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 3:]
    with LlamaCpp(small, n_ctx=64, threads=1) as runtime:
        assert list(generate(runtime, prompt, 12)) == expected.tolist()


def test_text(small: Path) -> None:
    with LlamaCpp(small, n_ctx=64, threads=1) as runtime, Vocabulary(small) as vocabulary:
        ids = runtime.encode("Häuser, 48 cars 🙂<|endoftext|>", parse_special=True)
        assert ids[-1] == 0
        assert 0 not in runtime.encode("<|endoftext|>")
        assert runtime.decode(ids) == "Häuser, 48 cars 🙂"
        assert vocabulary.decode(ids, special=True) == "Häuser, 48 cars 🙂<|endoftext|>"
        assert vocabulary.encode("Häuser, 48 cars 🙂") == ids[:-1]
        assert (runtime.encode(""), runtime.decode([])) == ([], "")
        # llama.cpp itself would leave out the spaces before these, with this tokenizer as with Llama 3's and Phi's.
        spaced = "git add . now , it 's  not ? \t\n yes !"
        assert runtime.decode(runtime.encode(spaced)) == vocabulary.decode(vocabulary.encode(spaced)) == spaced
        with pytest.raises(BadInput, match="not in the vocabulary"):
            runtime.decode([runtime.n_vocab])


def test_bad_input(small: Path, tmp_path: Path) -> None:
    with LlamaCpp(small, n_ctx=8, threads=1) as runtime:
        for tokens, message in (
            ([runtime.n_vocab], "not in the vocabulary"),
            ([-1], "not in the vocabulary"),
            ([1] * 9, "do not fit the context of 8"),
            ([[1, 2]], "2 dimensions"),
        ):
            with pytest.raises(BadInput, match=message):
                runtime.forward(tokens)  # type: ignore[arg-type]
        with pytest.raises(BadInput, match="no last one"):
            runtime.forward([], last_only=True)
        assert runtime.forward([]).shape == (0, runtime.n_vocab)
        with pytest.raises(BadInput, match="cannot rewind"):
            runtime.rewind(1)
        assert runtime.n_past == 0
    with pytest.raises(BadInput, match="closed"):
        runtime.forward([1])
    runtime.close()
    for n_ctx, threads in ((0, 1), (8, 0)):
        with pytest.raises(BadInput):
            LlamaCpp(small, n_ctx=n_ctx, threads=threads)
    with pytest.raises(BadInput, match="no such file"):
        LlamaCpp(tmp_path / "absent.gguf", n_ctx=8, threads=1)
    (tmp_path / "cut.gguf").write_bytes(small.read_bytes()[:-5000])
    with pytest.raises(BadInput, match="truncated"):
        LlamaCpp(tmp_path / "cut.gguf", n_ctx=8, threads=1)


def test_llama_cpp_s_own_reason_is_given(small: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    odd = tmp_path / "odd.gguf"
    odd.write_bytes(small.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_uq.weight"))
    with pytest.raises(StageFailed, match=r"blk\.1\.ffn_up"):
        LlamaCpp(odd, n_ctx=8, threads=1)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_what_it_says_of_itself(small: Path) -> None:
    assert "CPU" in system_info()
    assert all(build_info().values())
    with LlamaCpp(small, n_ctx=8, threads=1) as runtime:
        described = runtime.description()
    assert str(described["model_type"]).startswith("llama")
    assert int(described["model_n_params"]) > 0


@pytest.mark.demo
def test_demo_runs_quantised(demo_gguf: Path, tmp_path: Path) -> None:
    from edgeprune.gguf_checkpoint import gguf_to_folder

    folder = gguf_to_folder(demo_gguf, tmp_path / "demo")
    prompt = "The capital of France is"
    tokens = AutoTokenizer.from_pretrained(folder)(prompt).input_ids
    expected = logits_of(folder, tokens)
    source = write_gguf(folder, tmp_path / "f32.gguf", dtype="F32")
    with LlamaCpp(source, n_ctx=64, threads=2, exact=True) as runtime:
        logits = runtime.forward(tokens)
        assert np.abs(logits - expected).max() / np.abs(expected).max() < 1e-3
        assert (logits.argmax(-1) == expected.argmax(-1)).all()
    with LlamaCpp(quantise(source, tmp_path / "q.gguf", kind="Q8_0", threads=2), n_ctx=64, threads=2) as runtime:
        assert runtime.decode([int(runtime.forward(tokens, last_only=True).argmax())]) == " Paris"
