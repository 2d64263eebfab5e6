"""`fit --corpus`: fewer tokens as one more way to meet a budget, and what is said of a model that has them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from conftest import SENTENCES, save_llama
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from typer.testing import CliRunner

from edgeprune.calibration import take
from edgeprune.candidates import candidate_of
from edgeprune.checkpoint import Checkpoint
from edgeprune.cli import app
from edgeprune.cross_quality import measure_across
from edgeprune.damage import DamageTable, HeadOption, WidthOption
from edgeprune.devices import Budget, load_profile
from edgeprune.errors import BadInput, NothingFits
from edgeprune.export.gguf_imatrix import read_imatrix
from edgeprune.fitting import FitResult, fit
from edgeprune.heldout import scripts, stretches
from edgeprune.imatrix import provide_imatrix
from edgeprune.judging import choose, has_kl
from edgeprune.metrics import mean_interval
from edgeprune.models import load
from edgeprune.plan import WidthPlan, keep_all
from edgeprune.pruning import prune
from edgeprune.quality import CrossQuality, Quality, loss_over_dense, measure, quality_from_json
from edgeprune.record import Trial
from edgeprune.reference import MeasuredOn, build_reference
from edgeprune.runtimes.pytorch import PyTorch
from edgeprune.search import best_plan, dense_candidates
from edgeprune.shape import ModelShape
from edgeprune.targets import target_for
from edgeprune.vocabulary_damage import VocabularyOption, options_of
from edgeprune.vocabulary_plan import PLAN_FILE, VocabularyPlan, plan_vocabulary
from edgeprune.vocabulary_surgery import prune_vocabulary

CONTEXT = 64


pytestmark = pytest.mark.usefixtures("short_fit")


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with many rows that no text needs: to drop them costs nothing, to narrow a layer does."""
    folder = tmp_path_factory.mktemp("roomy") / "llama"
    return save_llama(folder, vocab_size=1536, intermediate_size=256, max_position_embeddings=512)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "kettle.txt"
    path.write_text("\n".join(SENTENCES * 8), encoding="utf-8")
    return path


def file_limit(folder: Path, share: float, quantisation: str = "Q8_0") -> Budget:
    """A budget for a file of `share` of the dense one."""
    target = target_for(quantisation)
    (dense,) = dense_candidates(Checkpoint(folder).shape, [target], load_profile("rpi5"), Budget(context=CONTEXT))
    return Budget(max_file_mib=share * dense.cost.file_mib, context=CONTEXT)


def run(folder: Path, out: Path, budget: Budget, **options: Any) -> FitResult:
    return fit(folder, "rpi5", budget, out=out, threads=1, **{"targets": ["Q8_0"], **options})


# --- the integer program


def table(shape: ModelShape, damage: float) -> DamageTable:
    """Each layer loses `damage` with all of its heads or neurons, and in proportion with some."""
    heads = [(8, 4, 0.0), (4, 4, 0.5), (4, 2, 0.5), (2, 2, 0.75), (2, 1, 0.75), (1, 1, 0.9), (0, 0, 1.0)]
    neurons = shape.layers[0].neurons
    return DamageTable(
        attention=(tuple(HeadOption(h, k, damage * d) for h, k, d in heads),) * len(shape.layers),
        mlp=(tuple(WidthOption(n, damage * (1 - n / neurons), 1 - n / neurons) for n in range(neurons, -1, -32)),)
        * len(shape.layers),
        losses=(tuple(1 - n / neurons for n in range(neurons + 1)),) * len(shape.layers),
        model_hash="m",
        text_hash="t",
    )


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("quantisation", ["Q8_0", "int4"])
def test_tokens_go_where_that_is_the_least_damage_and_stay_where_it_is_not(
    roomy: Path, uniform: bool, quantisation: str
) -> None:
    shape, profile, target = Checkpoint(roomy).shape, load_profile("rpi5"), target_for(quantisation)
    budget = file_limit(roomy, 0.85, quantisation)

    def plan(damage: float) -> WidthPlan:
        options = [VocabularyOption(1536, 0.0), VocabularyOption(1024, damage), VocabularyOption(512, 2 * damage)]
        return best_plan(table(shape, 1.0), shape, target, profile, budget, uniform=uniform, vocabulary=options)

    cheap, dear = plan(1e-3), plan(50.0)
    assert cheap.vocabulary in (1024, 512) and dear.vocabulary is None
    assert cheap.damage < dear.damage
    lost = {1024: 1e-3, 512: 2e-3}[cheap.vocabulary or 0]
    assert cheap.damage == pytest.approx(table(shape, 1.0).damage(cheap.layers) + lost)
    for made in (cheap, dear):
        candidate = candidate_of(made, shape, target, profile, budget)
        assert candidate.fits and candidate.shape.vocab == (made.vocabulary or 1536)
        assert made.reached_ratio == pytest.approx(1 - candidate.shape.parameters / shape.parameters)
    alone = best_plan(table(shape, 1.0), shape, target, profile, budget, uniform=uniform)
    assert alone.damage == pytest.approx(dear.damage, abs=2e-3)


def test_a_vocabulary_that_does_no_harm_stands_for_larger_ones_which_are_still_preferred() -> None:
    assert options_of(1000, [800, 500, 200], {200: 0.5, 500: -0.01}) == (
        VocabularyOption(1000, 0.0),
        VocabularyOption(800, pytest.approx(0.4e-3), measured=False),
        VocabularyOption(500, 1e-3),
        VocabularyOption(200, 0.5),
    )
    harm = options_of(1000, [800, 500, 200], {200: 0.5, 500: 0.02, 800: 0.03})
    assert [option.damage for option in harm] == [0.0, 0.03, 0.03, 0.5]  # fewer tokens are never better
    assert all(option.measured for option in harm)


def test_a_plan_with_fewer_tokens_is_another_plan_and_says_so(roomy: Path) -> None:
    shape, profile, budget = Checkpoint(roomy).shape, load_profile("rpi5"), Budget(context=CONTEXT)
    whole = WidthPlan(shape.layers, "obs", 0.1, 0.1, 0.0)
    plans = [whole, *(replace(whole, vocabulary=v, corpus=c) for v, c in ((512, "a"), (1024, "a"), (512, "b")))]
    made = [candidate_of(plan, shape, target_for("Q8_0"), profile, budget) for plan in plans]
    assert len({candidate.plan_hash for candidate in made}) == 4
    assert "vocabulary512" in made[1].name and "512 tokens left" in str(made[1])
    assert "vocabulary" not in made[0].name and made[0].vocabulary is None
    assert made[1].to_json()["plan"]["vocabulary"] == 512


# --- the whole way


def test_fit_drops_tokens_that_are_not_used_and_says_on_what_text(roomy: Path, corpus: Path, tmp_path: Path) -> None:
    budget = file_limit(roomy, 0.7, "Q4_0:imatrix")
    result = run(roomy, tmp_path / "run", budget, targets=["Q4_0:imatrix"], corpus=[corpus])
    chosen, before = result.chosen, Checkpoint(roomy).shape.vocab
    assert chosen.vocabulary is not None and chosen.vocabulary < before
    assert isinstance(result.trial.quality, CrossQuality)
    plan = VocabularyPlan.load(result.best / PLAN_FILE)
    assert plan.size == chosen.vocabulary

    tokenizer = AutoTokenizer.from_pretrained(result.best)
    assert len(tokenizer) <= chosen.vocabulary
    llama = llama_cpp.Llama(str(result.best / "model.gguf"), n_ctx=32, verbose=False)
    assert llama.n_vocab() == chosen.vocabulary
    for sentence in SENTENCES:
        ids = llama.tokenize(sentence.encode(), add_bos=False)
        assert ids == tokenizer(sentence, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == sentence
    bundle = json.loads((result.best / "bundle.json").read_text())
    assert bundle["eos_token_ids"] == [llama.token_eos()]
    measured = bundle["measured"]
    assert (
        measured["kl_nats"] is None and measured["loss_over_dense_nats"]["mean"] == result.trial.quality.over_nats.mean
    )

    report = (tmp_path / "run" / "report.md").read_text()
    card = (result.best / "MODEL_CARD.md").read_text()
    for text in (report, card):
        assert plan.counted_on() in text and "kettle.txt" in text
        assert "loss over dense" in text and "scripts of its letters: " in text
    assert "nan" not in report and result.verdict in report and "loss over dense" in result.verdict
    row = next(line for line in report.splitlines() if line.startswith(f"| **{chosen}**"))
    assert row.count("| – ") == 3

    record = json.loads((tmp_path / "run" / "fit.json").read_text())
    assert record["corpus"]["files"] == ["kettle.txt"] and record["corpus"]["tokens_left"] == chosen.vocabulary
    assert f"--corpus {corpus}" in record["commands"]["again"]
    for entry in record["candidates"]:
        if entry.get("quality"):
            assert ("kl_nats" in entry["quality"]) == (entry["plan"]["vocabulary"] == before)
            assert entry["loss_over_dense_nats"]["low"] <= entry["loss_over_dense_nats"]["high"]


def test_onnx_and_recovery_with_fewer_tokens_and_a_second_run_that_measures_nothing(
    roomy: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(SENTENCES) * 40)
    options = {"targets": ["int8"], "corpus": (str(corpus),), "recovery_s": 2.0, "calibration": str(text)}
    first = run(roomy, tmp_path / "run", file_limit(roomy, 0.7, "int8"), **options)
    assert first.chosen.vocabulary
    assert {c.recovery_s for c, t in first.trials if c.vocabulary and t.status == "ok"} == {0.0, 2.0}
    assert VocabularyPlan.load(first.best / PLAN_FILE).size == first.chosen.vocabulary
    config = json.loads((first.best / "genai_config.json").read_text())
    assert config["model"]["vocab_size"] == first.chosen.vocabulary
    log = (tmp_path / "run" / "trials.jsonl").read_text()

    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    for name in ("evaluate", "evaluate_across"):
        monkeypatch.setattr(f"edgeprune.workshop.{name}", never)
    again = run(roomy, tmp_path / "run", file_limit(roomy, 0.7, "int8"), **options)
    assert again.verdict == first.verdict and (tmp_path / "run" / "trials.jsonl").read_text() == log
    other = tmp_path / "other.txt"
    other.write_text(" ".join(reversed(SENTENCES)) * 30)
    with pytest.raises(AssertionError, match="measured again"):
        run(roomy, tmp_path / "run", file_limit(roomy, 0.7, "int8"), **(options | {"corpus": (other,)}))


def test_a_budget_that_needs_no_pruning_leaves_the_tokens_alone(
    roomy: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("counted")

    monkeypatch.setattr("edgeprune.pruning.measure_vocabulary", never)
    result = run(roomy, tmp_path / "run", Budget(context=CONTEXT), corpus=[corpus])
    assert result.chosen.dense and not (result.best / PLAN_FILE).exists()
    assert "every token stays" in (tmp_path / "run" / "report.md").read_text()
    assert isinstance(result.trial.quality, Quality) and "KL to dense" in result.verdict


def test_a_corpus_can_make_a_budget_possible(roomy: Path, corpus: Path, tmp_path: Path) -> None:
    budget = file_limit(roomy, 0.39)  # less than the widths that are tried leave
    with pytest.raises(NothingFits, match="--corpus FILE"):
        run(roomy, tmp_path / "without", budget)
    result = run(roomy, tmp_path / "with", budget, corpus=[corpus])
    assert result.chosen.vocabulary and result.chosen.fits
    with pytest.raises(NothingFits) as caught:
        run(roomy, tmp_path / "never", file_limit(roomy, 1e-6))
    assert "--corpus" not in str(caught.value)


def test_a_large_vocabulary_is_named_to_who_gives_no_corpus(roomy: Path, corpus: Path, tmp_path: Path) -> None:
    said: list[str] = []
    for name, paths in (("without", []), ("with", [corpus])):
        prune(
            roomy,
            0.1,
            tmp_path / name,
            corpus=paths,
            calibration=str(corpus),
            progress=lambda stage, *_, name=name: said.append(f"{name}: {stage}"),
        )
    shape = Checkpoint(roomy).shape
    share = f"{1536 * shape.hidden / shape.parameters:.0%}"
    told = [each for each in said if "is vocabulary: --corpus" in each]
    assert len(told) == 1 and told[0].startswith(f"without: {share} of this model")
    assert Checkpoint(tmp_path / "with").shape.vocab < Checkpoint(tmp_path / "without").shape.vocab == 1536


def test_wrong_use_is_told_before_the_work(roomy: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="method amp leaves the vocabulary as it is"):
        run(roomy, tmp_path / "run", Budget(context=CONTEXT), method="amp", corpus=[corpus])
    with pytest.raises(BadInput, match="method amp leaves the vocabulary as it is"):
        prune(roomy, 0.1, tmp_path / "out", method="amp", corpus=[corpus])
    with pytest.raises(BadInput, match="no such file or folder"):
        run(roomy, tmp_path / "run", Budget(context=CONTEXT), corpus=[tmp_path / "absent.txt"])
    words = ["fit", "--model", roomy, "--device", "rpi5", "--method", "amp", "--corpus", corpus, "--dry-run"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(result.exception, BadInput) and "--corpus" in str(result.exception)
    assert not (tmp_path / "run").exists()


# --- the figure that all candidates have


def test_a_file_with_other_tokens_is_judged_on_the_same_windows(
    tiny_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    text = "\n".join(SENTENCES * 3)
    dense = PyTorch(tiny_folder, n_ctx=64, threads=1)
    reference = build_reference(dense, text, tmp_path / "references", model_hash="m", length=32, count=4)
    texts = stretches(dense.decode, reference.windows, reference.text)
    assert "".join(texts) == reference.covered_text
    same = measure_across(dense, reference, texts)
    plain = measure(dense, reference)
    assert loss_over_dense(same, reference.nll) == pytest.approx([0.0] * 4, abs=0.05), "but for cut characters"
    assert loss_over_dense(plain, reference.nll) == pytest.approx([0.0] * 4, abs=1e-5)

    before = Checkpoint(tiny_folder).shape.vocab
    plan = plan_vocabulary(tiny_folder, [corpus], size=before - 64, windows=0)
    small = PyTorch(prune_vocabulary(tiny_folder, plan, tmp_path / "small"), n_ctx=64, threads=1)
    across = measure_across(small, reference, texts)
    assert len(across.over_windows) == 4 and across.n_bytes == pytest.approx(plain.n_bytes, rel=0.1)
    per_byte = (across.bits_per_byte - plain.bits_per_byte) * np.log(2)
    assert across.over_nats.mean == pytest.approx(per_byte * plain.n_bytes / plain.n_tokens, abs=0.1)
    assert quality_from_json(json.loads(json.dumps(across.to_json()))) == across

    short = PyTorch(tmp_path / "small", n_ctx=20, threads=1)
    assert measure_across(short, reference, texts).n_tokens < across.n_tokens, "read in parts"
    with pytest.raises(BadInput, match="3 texts for 4 windows"):
        measure_across(small, reference, texts[:3])


def test_importance_is_measured_in_the_tokens_that_are_left(tiny_folder: Path, corpus: Path, tmp_path: Path) -> None:
    plan = plan_vocabulary(tiny_folder, [corpus], size=Checkpoint(tiny_folder).shape.vocab - 64, windows=0)
    small = prune_vocabulary(tiny_folder, plan, tmp_path / "small")
    texts = [
        take(load(folder), iter([" ".join(SENTENCES)]), "s", count=1, length=512) for folder in (tiny_folder, small)
    ]
    found, expected = (
        read_imatrix(provide_imatrix(small, tmp_path / f"{i}.gguf", texts=each)) for i, each in enumerate(texts)
    )
    assert found.tokens == expected.tokens
    for name, value in expected.values.items():
        np.testing.assert_allclose(found.values[name], value, rtol=1e-5)


@given(st.lists(st.sampled_from("aé雨🙂 \n"), min_size=1, max_size=60), st.integers(1, 7))
def test_stretches_are_the_text_however_bytes_are_parted(characters: list[str], length: int) -> None:
    """With a byte a token, windows end within characters."""
    text = "".join(characters)
    ids = np.frombuffer(text.encode(), np.uint8).astype(np.int64)
    windows = [ids[i : i + length] for i in range(0, len(ids), length)]

    def decode(part: Any) -> str:
        return bytes(part).decode(errors="replace")

    found = stretches(decode, windows, text)
    assert len(found) == len(windows)
    assert "".join(found) == text or not text.strip()


def test_choice_goes_by_loss_over_dense_once_a_file_has_other_tokens(tiny_folder: Path) -> None:
    shape, profile, budget = Checkpoint(tiny_folder).shape, load_profile("rpi5"), Budget(context=CONTEXT)
    slow, fast = (candidate_of(keep_all(shape), shape, target_for(name), profile, budget) for name in ("F32", "Q4_0"))
    dense = (3.0, 2.0, 4.0, 1.0)
    common = {
        "perplexity": 1.0,
        "bits_per_byte": 1.0,
        "n_tokens": 4,
        "n_bytes": 4,
        "n_windows": 4,
        "text": "t",
        "measured_on": MeasuredOn("r", "m"),
        "reference": "ref",
    }

    def same(over: float, kl: float) -> Trial:
        nll = tuple(own + over for own in dense)
        kls = (kl, kl + 0.01, kl, kl)
        figures = {"kl_nats": mean_interval(kls), "top1": mean_interval(kls), "kl_windows": kls}
        quality = Quality(nll_nats=mean_interval(nll), nll_windows=nll, **figures, **common)
        return Trial("k", "c", "ok", None, quality)

    def other(over: float, spread: float = 0.0) -> Trial:
        windows = (over - spread, over + spread, over, over)
        quality = CrossQuality(
            nll_nats=mean_interval(dense),
            nll_windows=dense,
            over_nats=mean_interval(windows),
            over_windows=windows,
            **common,
        )
        return Trial("k", "c", "ok", None, quality)

    assert has_kl([same(0.1, 0.1)]) and not has_kl([same(0.1, 0.1), other(0.1)])
    a, b = (slow, same(0.3, 0.1)), (fast, same(0.1, 0.3))
    assert choose([a, b], dense) == a, "by KL where all have it"
    worse, better = (fast, other(0.5)), (fast, other(0.05))
    assert choose([a, worse], dense) == a
    assert choose([a, better], dense) == better
    assert choose([(slow, same(0.1, 0.1)), (fast, other(0.12, 0.2))], dense)[0] == fast, "a tie goes to the faster"


def test_scripts_are_shares_of_letters() -> None:
    found = scripts("Привет, мир! abc 123 ... 雨")
    assert list(found) == ["Cyrillic", "Latin", "Cjk"]
    assert sum(found.values()) == pytest.approx(1.0) and found["Cyrillic"] == pytest.approx(9 / 13)
    assert scripts("12, 3!") == {}
