"""What a type does to a weight, what that costs, and the types chosen under a budget."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeLlama
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.bit_allocation import allocate
from edgeprune.errors import BadInput, NothingFits
from edgeprune.export.gguf_quantise import quantise
from edgeprune.export.gguf_rows import best_q2_0, dequantise_rows, quantise_rows
from edgeprune.export.gguf_types import TENSOR_TYPES, tensors
from edgeprune.export.gguf_writer import write_gguf
from edgeprune.models import Model, load
from edgeprune.runtimes.gguf_file import tensor_bytes
from edgeprune.sensitivity import fisher_diagonal

QUANTISED = [name for name in TENSOR_TYPES if name not in ("F32", "F16", "BF16")]


@pytest.mark.parametrize("type_name", QUANTISED)
def test_rows_in_memory(type_name: str) -> None:
    values = np.random.default_rng(0).normal(size=(3, 256)).astype(np.float32)
    blocks = quantise_rows(values, type_name, np.ones(256, dtype=np.float32))
    assert blocks.shape == (3, tensor_bytes(type_name, (1, 256)))
    error = ((dequantise_rows(blocks, type_name) - values) ** 2).mean()
    assert error < 1.01 * (values**2).mean()
    if type_name.startswith(("Q4", "Q5", "Q6", "Q8", "IQ4", "MXFP4")):
        assert error < 0.02


def test_rows_are_those_of_a_file(make_llama: MakeLlama, tmp_path: Path) -> None:
    source = write_gguf(make_llama(), tmp_path / "full.gguf", dtype="F32")
    out = quantise(source, tmp_path / "q.gguf", kind="Q4_1", threads=1)
    name = "blk.2.ffn_up.weight"
    full, small = ({t.name: t.data for t in GGUFReader(path).tensors}[name] for path in (source, out))
    assert (quantise_rows(np.asarray(full), "Q4_1") == np.asarray(small)).all()


def test_rows_refused() -> None:
    values = np.ones((2, 96), dtype=np.float32)
    with pytest.raises(BadInput, match="not whole blocks of 256"):
        quantise_rows(values, "Q4_K")
    with pytest.raises(BadInput, match="for 96 columns"):
        quantise_rows(values, "Q4_0", np.ones(95, dtype=np.float32))


def test_two_bits_of_least_error() -> None:
    """Better than ggml's own, exact where two bits are enough, and better still where it is told to look."""
    generator = np.random.default_rng(1)
    values = generator.normal(size=(8, 128)).astype(np.float32)
    flat = np.ones(128, dtype=np.float32)
    ours, theirs = (
        float(((dequantise_rows(blocks, "Q2_0") - values) ** 2).mean())
        for blocks in (best_q2_0(values, flat), quantise_rows(values, "Q2_0"))
    )
    assert ours < 0.2 < 0.5 < theirs
    few = generator.integers(-1, 3, size=(4, 64)).astype(np.float32)
    few[:, 0], few[:, 1] = 2, -1
    for scale in (0.5, -0.25):
        assert np.allclose(dequantise_rows(best_q2_0(few * scale, flat[:64]), "Q2_0"), few * scale)
    assert not dequantise_rows(best_q2_0(np.zeros((1, 64), np.float32), flat[:64]), "Q2_0").round(12).any()
    important = np.where(np.arange(128) % 16 == 0, 1.0, 1e-3).astype(np.float32)
    told = (dequantise_rows(best_q2_0(values, important), "Q2_0") - values) ** 2
    blind = (dequantise_rows(best_q2_0(values, flat), "Q2_0") - values) ** 2
    assert (told * important).mean() < (blind * important).mean()


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_allocation_is_the_best_there_is(data: st.DataObject) -> None:
    tensors_, kinds = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    numbers = st.integers(1, 50)
    damage = {f"t{i}": {f"k{j}": float(data.draw(numbers)) for j in range(kinds)} for i in range(tensors_)}
    size = {name: {kind: data.draw(numbers) for kind in each} for name, each in damage.items()}
    budget = data.draw(st.integers(1, 50 * tensors_))
    plans = [dict(zip(damage, plan, strict=True)) for plan in itertools.product(*damage.values())]
    within = [plan for plan in plans if sum(size[name][kind] for name, kind in plan.items()) <= budget]
    if not within:
        with pytest.raises(NothingFits, match="the budget is"):
            allocate(damage, size, budget)
        return
    best = min(sum(damage[name][kind] for name, kind in plan.items()) for plan in within)
    found = allocate(damage, size, budget)
    assert sum(size[name][kind] for name, kind in found.items()) <= budget
    assert sum(damage[name][kind] for name, kind in found.items()) <= best * 1.001


def kl_to(model: Model, before: torch.Tensor, text: torch.Tensor) -> float:
    after = model.module(text[None]).logits[0].double().log_softmax(dim=-1)
    return float((before.exp() * (before - after)).sum(dim=-1).mean())


@pytest.mark.parametrize("tied", [True, False])
def test_fisher_tells_the_damage_of_noise(tied: bool, make_llama: MakeLlama) -> None:
    """KL of independent noise on one weight is ½ Σ F δ²: measured on the text the diagonal comes from."""
    model = load(make_llama(tie_word_embeddings=tied, initializer_range=0.3))
    text = torch.randint(1, model.shape.vocab, (96,), generator=torch.Generator().manual_seed(0))
    fisher = fisher_diagonal(model, [text] * 12)
    names = {t.name: t.shape for t in tensors(model.shape) if len(t.shape) > 1}
    assert {name: tuple(values.shape) for name, values in fisher.items()} == names
    assert all(parameter.requires_grad for parameter in model.module.parameters())
    with torch.no_grad():
        before = model.module(text[None]).logits[0].double().log_softmax(dim=-1)
        paths = {
            "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj",
            "blk.2.attn_v.weight": "model.layers.2.self_attn.v_proj",
        }
        paths["token_embd.weight" if tied else "output.weight"] = "model.embed_tokens" if tied else "lm_head"
        for name, path in paths.items():
            weight = model.module.get_submodule(path).weight
            kept = weight.clone()
            generator = torch.Generator().manual_seed(1)
            told, measured = [], []
            for _ in range(8):
                noise = torch.randn(weight.shape, generator=generator) * 0.01 * kept.std()
                weight.copy_(kept + noise)
                measured.append(kl_to(model, before, text))
                told.append(float((fisher[name] * noise.square()).sum()) / 2)
            weight.copy_(kept)
            assert 0.5 < np.mean(told) / np.mean(measured) < 2.0, name


def test_fisher_refuses_no_text(tiny: Model) -> None:
    with pytest.raises(BadInput, match="no calibration tokens"):
        fisher_diagonal(tiny, [torch.tensor([], dtype=torch.int64)])
