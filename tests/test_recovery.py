"""Recovery on tiny models: what it learns, what it leaves on the disk, and how it goes on after an interrupt.

On a machine with a CUDA device all of it runs there: `recover` takes the device that `accelerate` finds."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import typer
from conftest import SENTENCES, MakeLlama, save_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from typer.testing import CliRunner

from edgeprune.checkpoint import Checkpoint
from edgeprune.cli_recover import recover as command
from edgeprune.errors import BadInput, StageFailed
from edgeprune.losses import Head, Mix, TopK, distillation, top_k
from edgeprune.packing import Windows, evenly, hold_out, order, pack
from edgeprune.plan import LayerPlan, PrunePlan, uniform_plan
from edgeprune.recipe import RECIPES, Recipe, peak_rate
from edgeprune.recovery import recover
from edgeprune.recovery_inputs import longest_window, usual_recipe
from edgeprune.runtimes.pytorch import load_model, load_tokenizer
from edgeprune.surgery import prune_checkpoint
from edgeprune.teacher import TeacherCache
from edgeprune.training import Decoder, MasterAdamW, rate_share
from edgeprune.vocabulary_plan import PLAN_FILE, VocabularyPlan, plan_vocabulary
from edgeprune.vocabulary_surgery import prune_vocabulary
from edgeprune.weights import write_like

TEXT = ["".join(SENTENCES[(7 * i + j * j) % len(SENTENCES)] + " " for j in range(9)) for i in range(20)]
# A random teacher knows nothing of the text, so the text's own tokens would lead away from it.
QUICK = replace(RECIPES["distil"], mix=Mix(1.0, 0.0), length=32, batch=4, rate=3e-3, top_k=16, held_out=8, max_steps=24)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Products this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA whose distributions are sharper than those of the usual one: there is more to learn."""
    return save_llama(tmp_path_factory.mktemp("teacher") / "llama", initializer_range=0.2)


@pytest.fixture(scope="module")
def student(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_folder` without three tenths of its parameters, chosen at random."""
    shape = Checkpoint(tiny_folder).shape
    rng = np.random.default_rng(0)
    heads, neurons = [rng.random(w.heads) for w in shape.layers], [rng.random(w.neurons) for w in shape.layers]
    plan = uniform_plan(shape, heads, neurons, 0.3, align=8)
    return prune_checkpoint(tiny_folder, plan, tmp_path_factory.mktemp("pruned") / "student")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in list(opened.keys())}
    return found


def stock_logits(folder: Path) -> torch.Tensor:
    module, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    with torch.inference_mode():
        logits: torch.Tensor = module.eval()(torch.arange(1, 40)[None]).logits
    return logits


def run(student: Path, teacher: Path, out: Path, recipe: Recipe = QUICK, **options: Any) -> Any:
    chosen = {"text": TEXT, "seconds": 60.0, "cache": out.parent / "cache"} | options
    return recover(student, teacher, out, recipe=recipe, **chosen)


def test_distillation_brings_the_student_nearer(student: Path, tiny_folder: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    result = run(student, tiny_folder, tmp_path / "out", progress=lambda stage, _done, _total: stages.append(stage))
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert losses[-1] < losses[0] and result.after.kl < 0.8 * result.before.kl
    assert result.steps == 24 and result.tokens == 24 * 4 * 32 and result.skipped == 0
    old, new = tensors(student), tensors(tmp_path / "out")
    assert {n: (t.dtype, t.shape) for n, t in old.items()} == {n: (t.dtype, t.shape) for n, t in new.items()}
    assert all(torch.equal(old[name], new[name]) == (name == "model.embed_tokens.weight") for name in old)
    assert (tmp_path / "out" / "config.json").read_bytes() == (student / "config.json").read_bytes()
    assert load_tokenizer(tmp_path / "out").get_vocab() == load_tokenizer(student).get_vocab()
    target = stock_logits(tiny_folder)
    distances = [float((stock_logits(folder) - target).norm()) for folder in (student, tmp_path / "out")]
    assert distances[1] < distances[0]
    record = json.loads((tmp_path / "out" / "recovery.json").read_text())
    assert record["result"]["after"]["kl"] == result.after.kl and record["recipe"]["top_k"] == 16
    assert any("MiB" in stage for stage in stages)  # what the records take is said before it is taken
    assert not (tmp_path / "out.partial").exists()


def test_the_weights_written_are_of_the_least_held_out_loss(tiny_folder: Path, tmp_path: Path) -> None:
    """A student that is the teacher cannot come nearer to it, but it can learn the text."""
    result = run(tiny_folder, tiny_folder, tmp_path / "out", replace(QUICK, mix=Mix(0.3, 0.7)))
    assert result.best_step > 0
    assert result.before.kl < 1e-4 < result.after.kl
    assert result.after.ce < result.before.ce - 0.1


@pytest.mark.parametrize("method", ["distil", "lora"])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    method: str, student: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    recipe = replace(QUICK, max_steps=14, checkpoint_s=0.0)
    if method == "lora":
        recipe = replace(recipe, mix=RECIPES["lora"].mix, low_rank=RECIPES["lora"].low_rank)

    def interrupt(stage: str, done: int, _total: int) -> None:
        if stage == "training (steps)" and done == 9:
            raise KeyboardInterrupt

    whole = run(student, tiny_folder, tmp_path / "whole", recipe, method=method)
    with pytest.raises(KeyboardInterrupt):
        run(student, tiny_folder, tmp_path / "parts", recipe, method=method, progress=interrupt)
    assert (tmp_path / "parts.partial").is_dir() and not (tmp_path / "parts").exists()
    rest: list[int] = []
    parts = run(
        student,
        tiny_folder,
        tmp_path / "parts",
        recipe,
        method=method,
        progress=lambda stage, done, _total: rest.append(done) if stage == "training (steps)" else None,
    )
    assert rest[0] == 9  # the state of step 8 was kept
    first, second = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)
    untimed = [[{k: v for k, v in e.items() if k != "seconds"} for e in r.history] for r in (whole, parts)]
    assert untimed[0] == untimed[1] and (whole.before, whole.after) == (parts.before, parts.after)


def test_a_state_of_other_arguments_is_not_continued(student: Path, tiny_folder: Path, tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, _total: int) -> None:
        if stage == "training (steps)" and done == 3:
            raise KeyboardInterrupt

    recipe = replace(QUICK, max_steps=4, checkpoint_s=0.0)
    with pytest.raises(KeyboardInterrupt):
        run(student, tiny_folder, tmp_path / "out", recipe, progress=interrupt)
    seen: list[int] = []
    run(
        student,
        tiny_folder,
        tmp_path / "out",
        recipe,
        seed=1,
        progress=lambda stage, done, _total: seen.append(done) if stage == "training (steps)" else None,
    )
    assert seen == [1, 2, 3, 4]


def test_a_damaged_state_is_one_line(student: Path, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "state.safetensors").write_bytes(b"\x07" * 99)
    with pytest.raises(BadInput, match="delete it"):
        run(student, tiny_folder, tmp_path / "out")
    assert run(student, tiny_folder, tmp_path / "out", replace(QUICK, max_steps=1), resume=False).steps == 1


def test_low_rank_updates_are_merged(student: Path, tiny_folder: Path, tmp_path: Path) -> None:
    lora = replace(RECIPES["lora"], length=32, batch=4, held_out=8, rate=1e-2, max_steps=20)
    result = run(student, tiny_folder, tmp_path / "out", lora, method="lora")
    assert result.after.ce < result.before.ce
    old, new = tensors(student), tensors(tmp_path / "out")
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert old.keys() == new.keys() and changed == {name for name in old if "proj" in name}
    for name in changed:  # a product of 8 columns by 8 rows
        assert int(torch.linalg.matrix_rank(new[name].double() - old[name].double(), rtol=1e-4)) <= 8
    assert not torch.allclose(stock_logits(tmp_path / "out"), stock_logits(student))


@pytest.mark.parametrize("trained", [False, True])
def test_the_embedding_is_trained_only_where_asked(
    student: Path, tiny_folder: Path, tmp_path: Path, trained: bool
) -> None:
    run(student, tiny_folder, tmp_path / "out", replace(QUICK, train_embedding=trained, max_steps=2))
    old, new = tensors(student), tensors(tmp_path / "out")
    same = {name for name in old if torch.equal(old[name], new[name])}
    assert same == (set() if trained else {"model.embed_tokens.weight"})


def test_number_formats_stay(make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = make_llama(dtype=torch.bfloat16, tie_word_embeddings=False)
    run(folder, folder, tmp_path / "out", replace(QUICK, max_steps=2, rate=1e-2))
    old, new = tensors(folder), tensors(tmp_path / "out")
    assert old.keys() == new.keys() and "lm_head.weight" in new
    assert {t.dtype for t in new.values()} == {torch.bfloat16}


def test_time_ends_a_run(student: Path, tiny_folder: Path, tmp_path: Path) -> None:
    result = run(student, tiny_folder, tmp_path / "out", replace(QUICK, max_steps=None), seconds=3.0)
    assert result.steps > 0 and result.seconds >= 3.0


def test_the_warm_up_begins_with_the_first_step(
    student: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it took to come there."""
    from edgeprune import recovery

    shares: list[float] = []

    def share(progress: float, warmup: float) -> float:
        shares.append(progress)
        return rate_share(progress, warmup)

    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(1.5)
        return pack(*args, **kwargs)

    monkeypatch.setattr(recovery, "rate_share", share)
    monkeypatch.setattr(recovery, "pack", slowly)
    run(student, tiny_folder, tmp_path / "out", replace(QUICK, max_steps=None), seconds=4.0)
    assert shares[0] < 0.05 and 0.5 < shares[-1] <= 1 and shares == sorted(shares)


def test_the_command(student: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in TEXT), encoding="utf-8")
    app = typer.Typer()
    app.command()(command)
    arguments = [str(student), "--teacher", str(tiny_folder), "--text", str(text), "--length", "32", "--json"]
    found = CliRunner().invoke(app, [*arguments, "--time", "2s", "--kl", "1", "--out", str(tmp_path / "out")])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["steps"] > 0 and (tmp_path / "out" / "model.safetensors").exists()
    assert json.loads((tmp_path / "out" / "recovery.json").read_text())["recipe"]["mix"] == {"kl": 1.0, "ce": 0.0}
    wrong = CliRunner().invoke(app, [*arguments, "--time", "soon", "--out", str(tmp_path / "out")])
    assert isinstance(wrong.exception, BadInput) and "no duration" in str(wrong.exception)


def test_without_text_the_teacher_writes_it(
    student: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeprune.recovery_inputs._OWN_LENGTH", 64)
    result = run(student, tiny_folder, tmp_path / "out", replace(QUICK, max_steps=1), text=None, seconds=1.0)
    assert result.tokens == 4 * 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": ["too short"]}, "fewer than two windows"),
        ({"recipe": replace(QUICK, length=512)}, "windows of 512"),
        ({"method": "sft"}, "distil, lora"),
        ({"seconds": 0.0}, "no time"),
        ({"seconds": 1e-9, "recipe": replace(QUICK, max_steps=None)}, "before the first step"),
    ],
)
def test_wrong_use_is_one_line(
    changes: dict[str, Any], message: str, student: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=message):
        run(student, tiny_folder, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_windows_are_no_longer_than_the_models_read(tiny_folder: Path, make_llama: MakeLlama) -> None:
    usual = RECIPES["distil"]
    assert usual_recipe("distil", tiny_folder, make_llama(max_position_embeddings=4096)) == usual.with_length(256)
    long = make_llama(max_position_embeddings=4096)
    assert usual_recipe("distil", long, long) == usual
    short = usual.with_length(256)
    assert (short.length, short.batch, short.held_out) == (256, 2 * usual.batch, 2 * usual.held_out)


def test_a_long_text_is_read_in_pieces(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, text = load_tokenizer(tiny_folder), "\n".join(SENTENCES)
    whole = pack([text, text], tokenizer, 8, [1.0, 2.0])
    monkeypatch.setattr("edgeprune.packing._PIECE", 100)
    lengths: list[int] = []
    call = type(tokenizer).__call__

    def counted(self: Any, text: str, **options: Any) -> Any:
        lengths.append(len(text))
        return call(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    pieces = pack([text, text], tokenizer, 8, [1.0, 2.0])
    assert max(lengths) <= 100 and len(lengths) > 2 * len(text) // 100
    assert torch.equal(whole.ids, pieces.ids) and whole.weights_hash == pieces.weights_hash


@pytest.mark.parametrize("length", [64, 256, 4096])
def test_short_texts_have_short_windows(tiny_folder: Path, length: int) -> None:
    read, text = load_tokenizer(tiny_folder), [" a" * 100] * 3
    count = sum(len(read(each)["input_ids"]) for each in text)
    fitting = next(n for n in (4096, 2048, 1024, 512, 256, 128, 64, 32) if 4 * n < count)
    assert longest_window(text, read, length) == max(length // 8, min(length, fitting))


def test_a_teacher_of_another_vocabulary_is_refused(student: Path, make_llama: MakeLlama, tmp_path: Path) -> None:
    other = make_llama(vocab_size=400)
    with pytest.raises(BadInput, match=r"another vocabulary \(400 entries"):
        run(student, other, tmp_path / "out")
    renamed = make_llama()  # as many entries, two of them exchanged
    content = json.loads((renamed / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (renamed / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(BadInput, match="another vocabulary"):
        run(student, renamed, tmp_path / "out")


def test_layers_of_different_widths_learn_and_stay_as_they_are(tiny_folder: Path, tmp_path: Path) -> None:
    shape = Checkpoint(tiny_folder).shape
    some = LayerPlan((0, 2), (0, 1, 4, 5), tuple(range(0, 128, 2)))
    layers = (some, replace(some, neurons=()), LayerPlan((0, 1, 2, 3), tuple(range(8)), tuple(range(32, 128))))
    plan = PrunePlan(layers, "test", 0.2, 0.2, "m", "t")
    ragged = prune_checkpoint(tiny_folder, plan, tmp_path / "ragged")
    result = run(ragged, tiny_folder, tmp_path / "out")
    assert result.after.kl < 0.8 * result.before.kl
    assert Checkpoint(result.out).shape.layers == plan.shape_after(shape).layers
    with torch.inference_mode():
        assert load_model(result.out)(torch.arange(1, 40)[None]).logits.isfinite().all()


def test_a_student_without_some_tokens_learns_from_the_teacher_without_them(tiny_folder: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(TEXT), encoding="utf-8")
    before = Checkpoint(tiny_folder).shape.vocab
    plan = plan_vocabulary(tiny_folder, [corpus], size=before - 32, windows=0)
    small = prune_vocabulary(tiny_folder, plan, tmp_path / "small")
    broken = shutil.copytree(small, tmp_path / "broken")
    down = "model.layers.0.mlp.down_proj.weight"
    write_like(small, {down: torch.zeros_like}, broken)
    result = run(broken, tiny_folder, tmp_path / "out")
    assert result.after.kl < 0.8 * result.before.kl
    assert Checkpoint(result.out).shape.vocab == plan.size
    assert VocabularyPlan.load(result.out / PLAN_FILE) == plan  # so that the result can be trained on
    assert run(small, tiny_folder, tmp_path / "same").before.kl < 1e-3  # the small teacher is the student's equal


def test_gradients_that_stay_infinite_end_the_run(make_llama: MakeLlama, tiny_folder: Path, tmp_path: Path) -> None:
    broken = make_llama()
    write_like(tiny_folder, {"model.norm.weight": lambda old: torch.full_like(old, 3e38)}, broken)
    with pytest.raises(StageFailed, match="10 steps in a row"):
        run(broken, tiny_folder, tmp_path / "out", replace(QUICK, max_steps=40))


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterAdamW({"w": torch.ones(4)}, {"w": parameter}, betas=(0.9, 0.95), decay=0.0)
    for gradient, moved in [(1.0, True), (float("nan"), False), (float("inf"), False), (1.0, True)]:
        before = optimizer.masters["w"].detach().clone()
        optimizer.collect([torch.full((4,), gradient, dtype=torch.bfloat16)], 1.0)
        optimizer.step(1e-4, most=1.0)
        assert torch.equal(before, optimizer.masters["w"]) is not moved
    # Two steps of 1e-4 are less than bfloat16's spacing below 1, 0.4 %: only the master has them.
    assert (
        float(optimizer.masters["w"].detach()[0]) == pytest.approx(1 - 2e-4, abs=2e-5)
        and float(parameter.detach()[0]) == 1.0
    )


def test_the_rate_rises_and_falls() -> None:
    shares = [rate_share(i / 100, 0.1) for i in range(101)]
    peak = shares.index(max(shares))
    assert peak == 10 and shares[peak] == 1.0 and 0 < shares[0] < 0.1 and shares[-1] == pytest.approx(0.0)
    assert shares[: peak + 1] == sorted(shares[: peak + 1]) and shares[peak:] == sorted(shares[peak:], reverse=True)


def test_a_student_near_its_teacher_is_trained_gently() -> None:
    rates = [peak_rate(500, damage) for damage in (0.01, 0.27, 0.6, 0.9, 3.0)]
    assert rates == sorted(rates) and rates[0] == pytest.approx(1e-4) and rates[-1] == pytest.approx(3e-4)
    assert peak_rate(5000, 0.9) < peak_rate(1000, 0.9) == peak_rate(10, 0.9)


# --- the teacher's records -------------------------------------------------------------------------------------------


@pytest.fixture
def windows(tiny_folder: Path) -> Windows:
    return pack(TEXT, load_tokenizer(tiny_folder), 32)


def cache_of(folder: Path, tiny: Path, windows: Windows, load: Callable[[], Decoder] | None = None) -> TeacherCache:
    return TeacherCache(
        folder,
        load or (lambda: Decoder(load_model(tiny), torch.float32, 32)),
        "teacher",
        windows,
        n_vocab=Checkpoint(tiny).shape.vocab,
        k=16,
        dtype=torch.float32,
        batch=3,
    )


def never() -> Decoder:
    raise AssertionError("the teacher was asked again")


def test_records_are_the_teachers_distributions(tiny_folder: Path, windows: Windows, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, tiny_folder, windows)
    wanted = torch.tensor([5, 0, 3, 2, 5])
    found = cache.get(wanted)
    assert cache.computed == 4
    with torch.inference_mode():
        exact = load_model(tiny_folder)(windows.ids[wanted, :-1]).logits.flatten(0, 1).softmax(dim=-1)
    torch.testing.assert_close(found.probs, exact.gather(-1, found.ids), rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(found.probs.sum(dim=-1) + found.rest, torch.ones(len(found.rest)))
    assert (found.probs.min(dim=-1).values >= exact.sort(dim=-1).values[:, -17] - 1e-4).all()
    assert cache.bytes_per_token == 16 * 4 + 2
    cache.close()
    again = cache_of(tmp_path, tiny_folder, windows, never).get(wanted)
    assert torch.equal(again.ids, found.ids) and torch.equal(again.probs, found.probs)


def test_a_damaged_record_is_computed_again(tiny_folder: Path, windows: Windows, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, tiny_folder, windows)
    found = cache.get(torch.arange(3))
    with (cache.folder / "records.bin").open("r+b") as file:
        file.seek(len(file.read()) // 2)  # in the second record
        file.write(b"\xff\xff")
    again = cache.get(torch.arange(3))
    assert cache.computed == 4 and torch.equal(again.ids, found.ids) and torch.equal(again.probs, found.probs)


def test_a_full_disk_is_one_line(
    tiny_folder: Path, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(tmp_path, tiny_folder, windows)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(BadInput, match="disk is full"):
            cache.get(torch.arange(2))
    assert len(cache.get(torch.arange(2)).rest) == 64  # nothing half-written is believed


# --- text as windows -------------------------------------------------------------------------------------------------


def test_windows_hold_all_of_the_text_once(tiny_folder: Path, windows: Windows) -> None:
    tokenizer = load_tokenizer(tiny_folder)
    stream = [windows.ids[0, 0].item(), *windows.ids[:, 1:].flatten().tolist()]
    assert (windows.ids[1:, 0] == windows.ids[:-1, -1]).all() and windows.length == 32
    text = "\n\n".join(TEXT)
    decoded = tokenizer.decode(stream, clean_up_tokenization_spaces=False)
    assert text.startswith(decoded.rstrip("\ufffd"))
    lengths = [len(tokenizer(each, add_special_tokens=False)["input_ids"]) for each in ("\n\n", *TEXT)]
    total = sum(lengths) + lengths[0] * (len(TEXT) - 2)
    assert total - 32 <= len(stream) <= total


def test_bos_begins_every_window_where_it_begins_a_text(tiny_folder: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(tiny_folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    found = pack(TEXT, tokenizer, 32)
    assert (found.ids[:, 0] == tokenizer.bos_token_id).all() and (found.ids[:, 1:] != tokenizer.bos_token_id).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 300), st.integers(1, 64))
def test_held_out_windows_are_never_trained_on(n: int, count: int) -> None:
    training, held = hold_out(n, count)
    assert sorted([*training.tolist(), *held.tolist()]) == list(range(n))
    assert 1 <= len(held) <= max(1, n // 4)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(0, 200), st.integers(1, 60), st.integers(0, 99))
def test_the_order_can_be_taken_up_anywhere(n: int, position: int, count: int, seed: int) -> None:
    indices = torch.arange(n) * 3
    whole = order(indices, 0, position + count, seed)
    assert torch.equal(order(indices, position, count, seed), whole[position:])
    assert sorted(order(indices, 0, n, seed).tolist()) == indices.tolist()


def test_weights_and_held_out_text(student: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """A text that hardly counts is hardly learnt, and what is judged on is not trained on."""
    counts = torch.tensor([0.5, 2.0, 0.5])
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 6, dtype=torch.float64), torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    labels, mix = torch.tensor([4, 0, 9]), Mix(0.6, 0.4)
    teacher = top_k(torch.randn(3, 11, dtype=torch.float64).softmax(-1), 4)

    def loss(rows: slice, share: torch.Tensor | None) -> torch.Tensor:
        part = TopK(teacher.ids[rows], teacher.probs[rows], teacher.rest[rows])
        return distillation(hidden[rows], Head(weight), labels[rows], part, mix, share)[0]

    one_by_one = sum(counts[i] * loss(slice(i, i + 1), None) for i in range(3)) / 3
    together = loss(slice(0, 3), counts)
    torch.testing.assert_close(together, one_by_one)
    wanted, found = (torch.autograd.grad(each, weight)[0] for each in (one_by_one, together))
    torch.testing.assert_close(found, wanted)

    packed = pack(["one two three " * 20, "four five six " * 20], load_tokenizer(student), 16, [0.5, 1.5])
    assert packed.weights is not None and packed.weights.shape == (len(packed), 16)
    assert float(packed.weights[-1, -1] / packed.weights[0, 0]) == pytest.approx(3)
    low, high = packed.weights.unique().tolist()  # each token has its own text's, also where two texts meet
    assert high == pytest.approx(3 * low) and (packed.weights.diff() != 0).sum() == 1
    assert float(packed.weights.mean()) == pytest.approx(1)

    with_all = run(student, tiny_folder, tmp_path / "a", text=TEXT, held_out=[*TEXT[:3]])
    without = run(student, tiny_folder, tmp_path / "b", text=TEXT)
    assert with_all.before.kl != without.before.kl
    weighted = run(student, tiny_folder, tmp_path / "c", text=TEXT, weights=[2.0] + [0.5] * (len(TEXT) - 1))
    assert weighted.before == without.before and weighted.after.kl != without.after.kl


def test_held_out_text_is_judged_all_over(student: Path, tiny_folder: Path, tmp_path: Path) -> None:
    assert evenly(100, 4).tolist() == [12, 37, 62, 87] and evenly(3, 8).tolist() == [0, 1, 2]
    first = run(student, tiny_folder, tmp_path / "a", text=TEXT, held_out=TEXT)
    other = run(student, tiny_folder, tmp_path / "b", text=TEXT, held_out=[*TEXT[: len(TEXT) // 2], *TEXT])
    assert first.before.kl != other.before.kl
    with pytest.raises(BadInput, match="--held-out"):
        run(student, tiny_folder, tmp_path / "c", text=TEXT, held_out=["short"])


def test_neither_model_is_written_over(student: Path, tiny_folder: Path) -> None:
    before = Checkpoint(tiny_folder).hash()
    for place in (tiny_folder, student):
        with pytest.raises(BadInput, match="holds something else"):
            run(student, tiny_folder, place, text=TEXT)
    assert Checkpoint(tiny_folder).hash() == before


def test_what_lies_beside_the_result_is_not_lost(student: Path, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious.txt").write_text("mine")
    with pytest.raises(BadInput, match="holds something else"):
        run(student, tiny_folder, tmp_path / "out")
    assert (tmp_path / "out.partial" / "precious.txt").read_text() == "mine"


def test_what_was_not_to_be_resumed_does_not_come_back(student: Path, tiny_folder: Path, tmp_path: Path) -> None:
    def until(step: int) -> Callable[[str, int, int], None]:
        def interrupt(stage: str, done: int, _total: int) -> None:
            if stage == "training (steps)" and done == step:
                raise KeyboardInterrupt

        return interrupt

    for checkpoint_s, step, resume in ((0.0, 5, True), (1e9, 1, False)):
        recipe = replace(QUICK, max_steps=8, checkpoint_s=checkpoint_s)
        with pytest.raises(KeyboardInterrupt):
            run(student, tiny_folder, tmp_path / "out", recipe, resume=resume, progress=until(step))
        assert (tmp_path / "out.partial" / "state.safetensors").exists() == resume
