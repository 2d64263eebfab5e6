"""Programs for ExecuTorch: against torch, in the runtime, and in ExecuTorch's own text runner."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_llama
from family_configs import TINY, save_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_heterogeneous_families import differing_plan
from torch import nn

pytest.importorskip("executorch")

from edgeprune import ship, verify
from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import BadInput
from edgeprune.export.pte_quant import GROUP, codes
from edgeprune.export.pte_writer import write_pte
from edgeprune.runtimes import open_runtime
from edgeprune.runtimes.pytorch import PyTorch, load_model
from edgeprune.shipping.proof import read_proofs

TOKENS = np.random.default_rng(3).integers(1, 290, 30)
CAPPED = {"gemma2"}  # a soft cap on attention, which ExecuTorch's operator has not
EVERY_DAY = {"mistral-window"}  # a window, fewer heads for keys, a tied head: what the others have less of


@pytest.mark.slow
def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model", num_hidden_layers=1)
    one, two = (write_pte(folder, tmp_path / name, context=32, eos=[0]) for name in ("one.pte", "two.pte"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    "name", [name if name in EVERY_DAY else pytest.param(name, marks=pytest.mark.slow) for name in sorted(TINY)]
)
def test_every_family_says_what_torch_says(name: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", name)
    if name in CAPPED:
        with pytest.raises(BadInput, match="soft cap"):
            write_pte(folder, tmp_path / "model.pte", precision="fp32", context=64)
        return
    path = write_pte(folder, tmp_path / "model.pte", precision="fp32", context=64, chunk=16)
    runtime = open_runtime(path, n_ctx=40, threads=1)
    expected = open_runtime(folder, n_ctx=40, threads=1).forward(TOKENS)
    np.testing.assert_allclose(runtime.forward(TOKENS), expected, atol=2e-4)
    runtime.rewind(10)
    np.testing.assert_allclose(runtime.forward(TOKENS[10:], last_only=True), expected[-1:], atol=2e-4)
    for tokens, message in (([1] * 11, "context of 40 tokens is full"), ([runtime.n_vocab], "not in the vocabulary")):
        with pytest.raises(BadInput, match=message):
            runtime.forward(tokens)


def dequantised(weight: torch.Tensor, importance: torch.Tensor | None = None) -> torch.Tensor:
    found, scales = codes(weight, importance)
    return (found.float().reshape(len(weight), -1, GROUP) * scales[..., None]).reshape(weight.shape)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-6, 1e3), st.booleans())
def test_codes_are_no_further_off_than_the_widest_scale(seed: int, size: float, some_zero: bool) -> None:
    weight = size * torch.randn(3, 2 * GROUP, generator=torch.Generator().manual_seed(seed))
    if some_zero:
        weight[0, :GROUP] = 0
    groups = weight.reshape(-1, GROUP)
    widest = groups.abs().amax(1, keepdim=True) / 7.5
    plain = (groups / widest.clamp_min(1e-30)).round().clamp(-8, 7) * widest
    found = dequantised(weight).reshape(-1, GROUP)
    error, plain_error = ((found - groups).square().sum(1), (plain - groups).square().sum(1))
    assert bool((error <= plain_error * 1.02 + 1e-12).all())  # scales are rounded to bfloat16
    _, scales = codes(weight)
    assert bool((scales > 0).all()) and torch.equal(scales, scales.bfloat16().float())


@pytest.mark.parametrize("tied", [True, False])
def test_importance_goes_where_it_was_measured(tied: bool, tmp_path: Path) -> None:
    """What the head reads is the head's, also where the matrix has it under the name of the one tensor of a tied model;
    and a model that no GGUF architecture holds has one too."""
    from edgeprune.export.gguf_imatrix import write_imatrix
    from edgeprune.export.pte_writer import _importance
    from edgeprune.imatrix import importance_matrix
    from edgeprune.models import load
    from edgeprune.surgery import prune_checkpoint

    folder = save_tiny(tmp_path / "model", "qwen3", tie_word_embeddings=tied)
    out = prune_checkpoint(folder, differing_plan(Checkpoint(folder).shape), tmp_path / "pruned")
    pruned = load(out)
    assert not pruned.shape.uniform
    ids = [torch.arange(1, 20)]
    found = _importance(write_imatrix(importance_matrix(pruned, ids), tmp_path / "m.gguf"), pruned.shape)
    assert "lm_head" in found and "model.embed_tokens" not in found


def test_columns_that_matter_are_nearer() -> None:
    weight = torch.randn(64, GROUP, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(GROUP)
    importance[:8] = 100.0
    error, plain = ((dequantised(weight, each) - weight).square() for each in (importance, None))
    assert float(error[:, :8].sum()) < 0.8 * float(plain[:, :8].sum())
    with pytest.raises(BadInput, match="no whole groups of 32"):
        codes(torch.ones(2, 40))


def test_four_bits_are_the_codes_that_were_chosen(tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "model", num_hidden_layers=1)
    path = write_pte(folder, tmp_path / "model.pte", context=32, chunk=8, eos=[0])
    model = load_model(folder)
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        rounded.get_output_embeddings().weight = nn.Parameter(rounded.get_output_embeddings().weight.clone())
        for part in rounded.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                part.weight.copy_(dequantised(part.weight))
    tokens = TOKENS[:20]
    found = open_runtime(path, n_ctx=32, threads=1).forward(tokens)
    expected, dense = (PyTorch.of(each, None, 32).forward(tokens) for each in (rounded, model))
    # What is left is the rounding of activations to 8 bits.
    assert np.abs(found - expected).mean() < 0.2 * np.abs(expected - dense).mean()


def test_the_text_runner_says_what_was_proved(run: Path, tmp_path: Path) -> None:
    """Layers differ in this run."""
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    folder = ship(run, "executorch:int8", tmp_path / "out")
    facts = json.loads((folder / "bundle.json").read_text())
    assert facts["quantisation"] == "int8" and facts["measured"]["kl_nats"][0] > 0
    (proof,) = read_proofs(folder)
    # Loads the operators too, which apps have linked in.
    tokenizer = open_runtime(folder / "model.pte", n_ctx=64, threads=1)
    runner = TextLLMRunner(str(folder / "model.pte"), str(folder / "tokenizer.json"))
    said: list[str] = []
    settings = GenerationConfig(max_new_tokens=len(proof.tokens), temperature=0.0, echo=False)
    try:
        runner.generate(proof.prompt, settings, said.append)
    except UnicodeDecodeError:
        # It hands over each token as a text of its own, which a piece of a character is not. A random model may say
        # one; which tokens it says hangs on the processor's rounding.
        assert "\ufffd" in tokenizer.decode(proof.tokens[len(said) : len(said) + 1])
    else:
        assert "".join(said).strip("\ufffd")
    assert tokenizer.decode(proof.tokens).startswith("".join(said).strip("\ufffd")[:8])
    assert verify(folder).ok
    with pytest.raises(BadInput, match="unknown option"):
        ship(run, "executorch:int2", tmp_path / "other")
    broken = tmp_path / "broken.pte"
    broken.write_bytes((folder / "model.pte").read_bytes()[:4000])
    for content, message in ((broken.read_bytes(), "cannot load it"), (b"GGUF" * 9, "not an ExecuTorch program")):
        broken.write_bytes(content)
        with pytest.raises(BadInput, match=message):
            open_runtime(broken, n_ctx=8, threads=1)
