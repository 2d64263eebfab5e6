"""Passes side by side and norms in few passes: the same gradients as the plain ones, and the same ones every time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MakeLlama
from family_configs import TINY, tiny_module
from hypothesis import given, settings
from hypothesis import strategies as st
from test_recovery import QUICK, TEXT, cache_of

from edgeprune.checkpoint import Checkpoint
from edgeprune.dropout import drawing_from, own_draws
from edgeprune.losses import Mix
from edgeprune.norms import lean_norms
from edgeprune.packing import Windows, pack
from edgeprune.passes import Passes
from edgeprune.recovery import recover
from edgeprune.runtimes.pytorch import load_model, load_tokenizer
from edgeprune.teacher import TeacherCache
from edgeprune.trainee import LowRank
from edgeprune.training import Decoder, Learner, MasterAdamW


@pytest.fixture(autouse=True)
def cores() -> Iterator[Callable[[int], None]]:
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tiny_folder: Path) -> Path:
    return tiny_folder


@pytest.fixture
def windows(folder: Path) -> Windows:
    return pack(TEXT, load_tokenizer(folder), 32, [1.0 + i % 3 for i in range(len(TEXT))])


def step(folder: Path, windows: Windows, records: TeacherCache, most: int) -> tuple[Passes, MasterAdamW, torch.Tensor]:
    module = load_model(folder).train()
    named = dict(module.named_parameters())
    optimizer = MasterAdamW({n: p.detach() for n, p in named.items()}, named, betas=(0.9, 0.95), decay=0.0)
    learner = Learner(Decoder(module, torch.float32, 32), Mix(0.7, 0.3))
    passes = Passes(learner, list(named.values()), windows, records, most)
    figures = passes(torch.arange(7), optimizer)
    passes.close()
    return passes, optimizer, figures


def test_gradients_do_not_depend_on_who_makes_them(
    folder: Path, windows: Windows, tmp_path: Path, cores: Callable[[int], None]
) -> None:
    found = {}
    for count, most in ((1, 7), (3, 6), (2, 1)):
        cores(count)
        passes, optimizer, figures = step(folder, windows, cache_of(tmp_path / str(count), folder, windows), most)
        assert (passes.workers, passes.windows) == {1: (1, 7), 3: (3, 2), 2: (1, 1)}[count]
        assert torch.get_num_threads() == count
        found[count] = (figures, [master.grad for master in optimizer.masters.values()])
    for figures, gradients in (found[3], found[2]):
        torch.testing.assert_close(figures, found[1][0])
        for gradient, expected in zip(gradients, found[1][1], strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_records_of_several_threads_are_those_of_one(folder: Path, windows: Windows, tmp_path: Path) -> None:
    loads: list[int] = []

    def load() -> Decoder:
        loads.append(1)
        return Decoder(load_model(folder), torch.float32, 32)

    records = cache_of(tmp_path / "many", folder, windows, load)
    threads = [threading.Thread(target=records.get, args=(torch.tensor([i]),)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert records.computed == 6 and len(loads) == 1 and records.seconds > 0
    alone = cache_of(tmp_path / "one", folder, windows).get(torch.arange(6))
    torch.testing.assert_close(records.get(torch.arange(6)).probs, alone.probs, rtol=1e-3, atol=1e-6)


def test_what_draws_from_one_generator_runs_alone(folder: Path, windows: Windows, cores: Callable[[int], None]) -> None:
    cores(2)
    module = load_model(folder)
    learner = Learner(Decoder(module, torch.float32, 32), Mix(0.0, 1.0))
    side_by_side = Passes(learner, list(module.parameters()), windows, None, 4)
    side_by_side.close()
    assert side_by_side.workers == 2
    module.config.attention_dropout = 0.1
    assert Passes(learner, list(module.parameters()), windows, None, 4).workers == 1


@given(share=st.floats(0.02, 0.9), seed=st.integers(0, 1 << 62), bf16=st.booleans())
@settings(deadline=None, max_examples=20)
def test_dropout_is_torchs_but_for_its_generator(share: float, seed: int, bf16: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Dropout(share)).train()
    own_draws(module)
    inputs = torch.full((64, 512), 3.0, dtype=torch.bfloat16 if bf16 else torch.float32, requires_grad=True)

    def draw(number: int) -> torch.Tensor:
        with drawing_from(number):
            out: torch.Tensor = module(inputs)
        return out

    out = draw(seed)
    torch.rand(3)  # the process's generator has no part in it
    assert torch.equal(draw(seed), out) and not torch.equal(draw(seed + 1), out)
    left = out != 0
    n = inputs.numel()
    assert abs(float(left.float().mean()) - (1 - share)) < 6 * (share * (1 - share) / n) ** 0.5
    torch.testing.assert_close(out[left].float(), torch.full((int(left.sum()),), 3 / (1 - share)), rtol=0.01, atol=0)
    (gradient,) = torch.autograd.grad(out.sum(), inputs)
    torch.testing.assert_close(gradient * 3, out)
    assert torch.equal(module.eval()(inputs), inputs)


@pytest.mark.parametrize("low_rank", [None, LowRank(rank=4, dropout=0.3)])
def test_two_runs_are_one(
    low_rank: LowRank | None, folder: Path, make_llama: MakeLlama, tmp_path: Path, cores: Callable[[int], None]
) -> None:
    student, recipe = make_llama(num_hidden_layers=2), replace(QUICK, max_steps=6, low_rank=low_rank)
    cores(2)
    for name in ("one", "two"):
        recover(student, folder, tmp_path / name, seconds=600, text=TEXT, recipe=recipe, cache=tmp_path / "cache")
        torch.rand(1)
    one, two = (Checkpoint(tmp_path / name) for name in ("one", "two"))
    assert one.hash() == two.hash() != Checkpoint(student).hash()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TINY)
def test_lean_norms_are_the_models_own(name: str, dtype: torch.dtype) -> None:
    module = tiny_module(name).to(dtype)
    with torch.no_grad():  # no norm's weight is 1
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)).to(dtype))
    ids = torch.randint(1, 300, (2, 24), generator=torch.Generator().manual_seed(0))
    found = []
    for lean in (False, True):
        if lean:
            assert bool(lean_norms(module)) is not (name in ("phi", "phi-grouped") or name.startswith("gemma"))
        module.zero_grad()
        logits = module(input_ids=ids).logits
        logits.float().logsumexp(-1).sum().backward()
        found.append((logits.detach(), [p.grad.clone() for p in module.parameters() if p.grad is not None]))
    (one, first), (other, second) = found
    exact = dtype == torch.float32
    torch.testing.assert_close(one, other, rtol=1e-4 if exact else 0.05, atol=1e-5 if exact else 0.05)
    for a, b in zip(first, second, strict=True):
        gap = float((a - b).norm() / a.norm().clamp_min(1e-6))
        assert gap < (1e-4 if exact else 0.05)
