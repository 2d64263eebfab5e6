"""Metrics against closed forms and other libraries; the reference, and files measured against it."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny_text import TEXT, tiny_model, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from edgeprune import metrics
from edgeprune.errors import BadInput, StageFailed
from edgeprune.heldout import held_out, predicted_bytes, windows
from edgeprune.quality import Quality, differs, evaluate, evaluate_text, measure, measure_text, quality_from_json
from edgeprune.reference import build_reference, load_reference, make_reference
from edgeprune.runtimes.pytorch import PyTorch

LENGTH, COUNT = 32, 4


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def runtime(tokenizer) -> PyTorch:
    return PyTorch.of(tiny_model(len(tokenizer)), tokenizer, LENGTH)


@pytest.fixture(scope="module")
def reference(runtime, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    return build_reference(runtime, TEXT, folder, model_hash="m", length=LENGTH, count=COUNT)


# Metrics

logits_arrays = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=40),
    elements=st.floats(-30, 30, width=32),
)


@given(logits_arrays)
def test_log_softmax_is_scipys(logits):
    np.testing.assert_allclose(
        metrics.log_softmax(logits), scipy.special.log_softmax(logits.astype(np.float64), axis=-1), atol=2e-5
    )


def test_log_softmax_does_not_overflow():
    logits = np.array([[1e4, 0, -1e4], [-1e4, -1e4, -1e4]], dtype=np.float32)
    result = metrics.log_softmax(logits)
    assert np.isfinite(result).all()
    np.testing.assert_allclose(result[1], -math.log(3), rtol=1e-6)


@given(st.data(), st.integers(2, 60))
def test_kl_properties(data, n_vocab):
    rows = hnp.arrays(np.float32, (3, n_vocab), elements=st.floats(-12, 12, width=32))
    p, q = data.draw(rows), data.draw(rows)
    targets = np.zeros(3, dtype=np.int64)
    coded = metrics.encode(p)
    rows_pq, rows_pp = metrics.compare(q, targets, coded), metrics.compare(p, targets, coded)
    assert (rows_pq.kl >= 0).all()
    assert (rows_pp.kl <= 2e-6).all()
    assert rows_pp.agree.all()
    shifted = metrics.compare(q + np.float32(5), targets, coded)
    np.testing.assert_allclose(shifted.kl, rows_pq.kl, atol=2e-5)
    np.testing.assert_allclose(shifted.nll, rows_pq.nll, atol=2e-5)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.floats(0.1, 4))
def test_kl_and_nll_are_torchs(seed, scale):
    rng = np.random.default_rng(seed)
    p, q = (rng.normal(size=(5, 1000)).astype(np.float32) * np.float32(scale) for _ in range(2))
    targets = rng.integers(0, 1000, size=5)
    rows = metrics.compare(q, targets, metrics.encode(p))
    log_p, log_q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (p, q))
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(rows.kl, kl.numpy(), rtol=1e-3, atol=1e-5)
    nll = torch.nn.functional.nll_loss(log_q, torch.from_numpy(targets), reduction="none")
    np.testing.assert_allclose(rows.nll, nll.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(rows.agree, p.argmax(-1) == q.argmax(-1))


def test_coding_error_is_below_a_step():
    logits = np.random.default_rng(0).normal(size=(20, 5000)).astype(np.float32) * 4
    coded = metrics.encode(logits)
    exact = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
    assert (
        np.abs(metrics.decode(coded) - exact).max() <= coded.step.max()
    )  # half by rounding, at most half by renormalising
    assert coded.step.max() < 1e-3
    p, q = np.exp(exact), np.exp(metrics.decode(coded).astype(np.float64))
    assert np.sum(p * np.log(p / q), axis=-1).max() < 1e-7


def test_equal_logits_have_a_code():
    coded = metrics.encode(np.zeros((2, 8), dtype=np.float32))
    np.testing.assert_allclose(metrics.decode(coded), -math.log(8), rtol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(bad):
    logits = np.zeros((2, 8), dtype=np.float32)
    reference = metrics.encode(logits)
    logits[1, 3] = bad
    with pytest.raises(FloatingPointError, match="token 1"):
        metrics.encode(logits)
    with pytest.raises(FloatingPointError, match="token 1"):
        metrics.compare(logits, np.zeros(2, dtype=np.int64), reference)


@given(st.integers(1, 60), st.floats(0.6, 0.9999))
def test_t_quantile_is_scipys(degrees, probability):
    assert metrics.t_quantile(probability, degrees) == pytest.approx(scipy.stats.t.ppf(probability, degrees), rel=1e-6)


def test_mean_interval_is_scipys():
    values = np.random.default_rng(1).normal(3, 2, size=20)
    interval = metrics.mean_interval(values)
    low, high = scipy.stats.t.interval(0.95, 19, loc=values.mean(), scale=scipy.stats.sem(values))
    assert (interval.mean, interval.low, interval.high) == pytest.approx((values.mean(), low, high))
    with pytest.raises(ValueError, match="two"):
        metrics.mean_interval([1.0])


def test_pairs_see_what_single_intervals_hide():
    rng = np.random.default_rng(2)
    hard = rng.uniform(1, 5, size=20)  # windows differ far more than the two files
    a, b = hard + 0.05 + rng.normal(0, 0.02, 20), hard
    assert metrics.mean_interval(a).low < metrics.mean_interval(b).mean
    assert not metrics.paired_interval(a, b).contains_zero
    with pytest.raises(ValueError, match="same windows"):
        metrics.paired_interval(a, b[:-1])


def test_merged_accumulators_are_one():
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(4, 6, 50)).astype(np.float32)
    targets = rng.integers(0, 50, size=(4, 6))
    parts = [metrics.Accumulator(), metrics.Accumulator()]
    whole = metrics.Accumulator()
    for i in range(4):
        rows = metrics.compare(logits[i], targets[i])
        parts[i // 2].add(rows, 10 + i)
        whole.add(rows, 10 + i)
    assert parts[0].merge(parts[1]) == whole
    assert whole.bits_per_byte == pytest.approx(sum(whole.nll) / math.log(2) / 46)


# Windows and bytes


def test_windows_are_consecutive_and_whole():
    chunks = windows(list(range(23)), length=5)
    assert [chunk.tolist() for chunk in chunks] == [list(range(i, i + 5)) for i in (0, 5, 10, 15)]
    assert len(windows(list(range(23)), length=5, count=3)) == 3
    with pytest.raises(BadInput, match="23 tokens: 4 windows of 5, where 5 are needed"):
        windows(list(range(23)), length=5, count=5)
    with pytest.raises(BadInput, match="1 windows"):
        windows(list(range(9)), length=5)


def test_predicted_bytes_sum_to_the_text(tokenizer):
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    chunks = np.array_split(np.array(ids), 37)  # boundaries inside characters of several bytes as well
    first = sum(len(tokenizer.decode(chunk[:1].tolist()).encode()) for chunk in chunks)
    total = sum(predicted_bytes(tokenizer.decode, chunks))
    assert abs(total + first - len(TEXT.encode())) <= 3 * len(chunks)
    plain = "no letter here has more than one byte " * 20
    ids = tokenizer(plain, add_special_tokens=False)["input_ids"]
    chunks = np.array_split(np.array(ids), 9)
    first = sum(len(tokenizer.decode(chunk[:1].tolist())) for chunk in chunks)
    assert sum(predicted_bytes(tokenizer.decode, chunks)) + first == len(plain)


def test_held_out_takes_only_the_head_of_the_text(runtime):
    part = held_out(runtime, TEXT * 50, length=LENGTH, count=COUNT)
    assert len(part.text) < len(TEXT) * 50
    expected = runtime.encode(TEXT * 50)[: LENGTH * COUNT]
    assert np.concatenate(part.windows).tolist() == expected
    assert TEXT.startswith(part.text[: part.n_characters])


class Lossy:
    """A runtime whose tokenizer forgets capitals."""

    name, n_vocab, n_ctx, n_past = "lossy", 320, LENGTH, 0

    def __init__(self, runtime):
        self.encode = runtime.encode
        self.decode = lambda ids: runtime.decode(ids).lower()


def test_a_lossy_tokenizer_is_refused(runtime):
    with pytest.raises(BadInput, match="does not give the held-out text back"):
        held_out(Lossy(runtime), TEXT, length=LENGTH, count=COUNT)


# The reference and what is measured against it


def test_the_reference_file_measures_itself(runtime, reference, tokenizer):
    quality = measure(runtime, reference)
    assert quality.kl_nats.mean < 1e-6
    assert quality.top1.mean == 1.0
    assert quality.n_windows == COUNT
    assert quality.n_tokens == COUNT * (LENGTH - 1)
    assert quality.nll_windows == pytest.approx(reference.nll)
    # perplexity is torch's cross-entropy over the same windows
    model = tiny_model(len(tokenizer))
    ids = torch.from_numpy(np.stack(reference.windows))
    with torch.inference_mode():
        loss = model(ids, labels=ids).loss.item()
    assert quality.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert quality.bits_per_byte == pytest.approx(
        loss * quality.n_tokens / math.log(2) / sum(reference.n_bytes), rel=1e-5
    )
    assert sum(reference.n_bytes) < len(reference.covered_text.encode())


def test_another_model_is_further_away_and_the_difference_is_seen(runtime, reference, tokenizer):
    near, far = tiny_model(len(tokenizer)), tiny_model(len(tokenizer), seed=1)
    with torch.no_grad():
        near.model.layers[0].mlp.down_proj.weight *= 0.9
    stages = []
    a = measure(PyTorch.of(far, tokenizer, LENGTH), reference, progress=stages.append)
    b = measure(PyTorch.of(near, tokenizer, LENGTH), reference)
    assert stages[-1] == {"stage": "quality", "done": COUNT, "total": COUNT}
    assert a.kl_nats.mean > b.kl_nats.mean > 0
    assert a.kl_nats.low <= a.kl_nats.mean <= a.kl_nats.high
    assert differs(a, b).seen
    assert differs(a, b).interval.mean > 0
    assert not differs(a, a).seen
    with pytest.raises(BadInput, match="same reference"):
        differs(a, dataclasses.replace(b, reference="another"))


def test_quality_survives_json(runtime, reference):
    quality = measure(runtime, reference)
    assert quality_from_json(json.loads(json.dumps(quality.to_json()))) == quality
    text = measure_text(runtime, TEXT[:600], length=LENGTH)
    assert quality_from_json(json.loads(json.dumps(text.to_json()))) == text
    for broken in ({}, {**quality.to_json(), "schema_version": 99}, {**quality.to_json(), "top1": 3}):
        with pytest.raises(BadInput):
            quality_from_json(broken)


def test_text_alone_covers_all_of_it(runtime):
    text = TEXT[:999]
    quality = measure_text(runtime, text, length=LENGTH)
    n_tokens = len(runtime.encode(text))
    assert quality.n_windows == -(-n_tokens // LENGTH)
    assert quality.n_tokens == n_tokens - quality.n_windows
    assert not isinstance(quality, Quality)


def test_other_vocabulary_or_tokens_are_refused(reference, tokenizer):
    larger = PyTorch.of(tiny_model(len(tokenizer) + 1), tokenizer, LENGTH)
    with pytest.raises(BadInput, match="vocabulary has 321 entries, the reference's 320; compare it on text alone"):
        measure(larger, reference)
    shuffled = PyTorch.of(tiny_model(len(tokenizer)), tokenizer, LENGTH)
    encode = shuffled.encode
    shuffled.encode = lambda text, **_: [*encode(text)[:5], *[1] * 500]  # type: ignore[method-assign]
    with pytest.raises(BadInput, match="from token 5 of the text on"):
        measure(shuffled, reference)


def test_logits_that_are_not_finite_end_the_measurement(reference, tokenizer):
    model = tiny_model(len(tokenizer))
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    with pytest.raises(StageFailed, match="not finite"):
        measure(PyTorch.of(model, tokenizer, LENGTH), reference)


def test_a_reference_is_made_once(runtime, reference):
    class Broken:
        name = runtime.name

    again = build_reference(
        Broken(),
        TEXT,
        reference.folder.parent,
        model_hash="m",
        length=LENGTH,
        count=COUNT,  # type: ignore[arg-type]
    )
    assert again.key == reference.key


def test_an_interrupted_reference_leaves_nothing(runtime, tmp_path):
    def interrupt(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_reference(runtime, TEXT, tmp_path, model_hash="m", length=LENGTH, count=COUNT, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_damaged_references_are_refused(runtime, tmp_path):
    folder = build_reference(runtime, TEXT, tmp_path, model_hash="m", length=LENGTH, count=COUNT).folder
    with pytest.raises(BadInput, match="no such file"):
        load_reference(tmp_path / "absent")
    levels = (folder / "levels.npy").read_bytes()
    (folder / "levels.npy").write_bytes(levels[: len(levels) // 2])
    with pytest.raises(BadInput, match="will be made again"):
        load_reference(folder)
    (folder / "levels.npy").write_bytes(levels)
    (folder / "text.txt").write_text("another text")
    with pytest.raises(BadInput, match="do not belong together"):
        load_reference(folder)


def test_files_are_measured_in_a_process_of_their_own(runtime, tokenizer, tmp_path):
    model = tmp_path / "model"
    tiny_model(len(tokenizer)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    stages = []
    folder = make_reference(
        model, TEXT, tmp_path / "references", model_hash="m", length=LENGTH, count=COUNT,
        threads=1, timeout_s=120, progress=stages.append,
    )  # fmt: skip
    assert stages[-1] == {"stage": "reference", "done": COUNT, "total": COUNT}
    quality = evaluate(model, folder, threads=1, timeout_s=120)
    assert quality.kl_nats.mean < 1e-6
    assert quality.measured_on.runtime == "pytorch"
    text = load_reference(folder).covered_text
    alone = evaluate_text(model, text, length=LENGTH, threads=1, timeout_s=120)
    assert alone.bits_per_byte == pytest.approx(quality.bits_per_byte)
    with pytest.raises(BadInput, match="no such file"):
        evaluate(model, tmp_path / "absent", threads=1, timeout_s=120)
    with pytest.raises(StageFailed, match="timeout"):
        evaluate(model, folder, threads=1, timeout_s=0.05)


def test_another_tokenizer_makes_another_reference(tokenizer, tmp_path):
    model = tmp_path / "model"
    tiny_model(len(tokenizer)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    options = {"model_hash": "m", "length": LENGTH, "count": COUNT, "threads": 1, "timeout_s": 120}
    first = make_reference(model, TEXT, tmp_path / "references", **options)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True}))
    assert make_reference(model, TEXT, tmp_path / "references", **options) != first
