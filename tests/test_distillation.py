"""Distillation: pools, readings, matching, every method, the file and its record."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from family_configs import save_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from edgeprune.calibration import read_weighted
from edgeprune.checkpoint import Checkpoint
from edgeprune.cli import app
from edgeprune.distillation import METHODS, distil, gradient_matching, readings, synthetic
from edgeprune.distillation import pool as pool_module
from edgeprune.distillation.base import Basket, Choice, Quota, Task, Written
from edgeprune.distillation.gradients import Sketch, error, inner_product
from edgeprune.distillation.labelled import LabelledReadings
from edgeprune.distillation.matching import central, clusters, farthest_first, herd, match, match_tokens
from edgeprune.distillation.pool import Fields, Pool, Source, cut, make_pool, source_of
from edgeprune.distillation.readings import COLUMNS, ModelReadings, Reading
from edgeprune.distillation.soft import DecoderLearner, SoftSet, SoftSettings, optimise, padded, train
from edgeprune.errors import BadInput
from edgeprune.files import read_json
from edgeprune.heterogeneous import load_checkpoint
from edgeprune.losses import Mix
from edgeprune.pruning import prune
from edgeprune.runtimes.pytorch import load_tokenizer

WORDS = [word for sentence in SENTENCES for word in sentence.split()]
LENGTH = 24  # tokens of a piece in these tests


def essay(count: int, seed: int) -> str:
    """Lines of words of the tests' sentences."""
    drawn = np.random.default_rng(seed).choice(WORDS, size=count)
    return "\n".join(" ".join(drawn[i : i + 12]) for i in range(0, count, 12))


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "essay.txt"
    path.write_text(essay(900, 0))
    path.with_name("essay.txt.license").write_text("SPDX-License-Identifier: CC0-1.0\n")
    return path


@pytest.fixture(scope="module")
def labelled_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of two classes that a model can tell apart: each has words of its own."""
    path = tmp_path_factory.mktemp("labelled") / "news.jsonl"
    half = len(WORDS) // 2
    rng = np.random.default_rng(1)
    with path.open("w") as file:
        for number in range(80):
            own = WORDS[:half] if number % 2 else WORDS[half:]
            text = " ".join(rng.choice(own, size=rng.integers(4, 9)))
            file.write(json.dumps({"headline": text, "label": "bad" if number % 2 else "good"}) + "\n")
    return path


@pytest.fixture(scope="module")
def student(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model pruned, every layer to widths of its own."""
    out = tmp_path_factory.mktemp("student") / "pruned"
    text = out.with_name("text.jsonl")
    text.write_text("".join(json.dumps({"text": essay(60, seed)}) + "\n" for seed in range(40)))
    prune(tiny_folder, 0.25, out, calibration=str(text), align=8)
    assert not Checkpoint(out).shape.uniform
    return out


@pytest.fixture
def pool(tiny_folder: Path, text_file: Path, tmp_path: Path) -> Pool:
    return make_pool(source_of([str(text_file)]), load_tokenizer(tiny_folder), length=LENGTH, folder=tmp_path)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models run in float32."""
    monkeypatch.setattr(readings, "fast_dtype", lambda: torch.float32)


# The pool


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([*WORDS, "\n", "\n\n", "🙂", "雨"]), min_size=1, max_size=80), st.integers(8, 40))
def test_pieces_joined_are_the_text(tiny_folder: Path, words: list[str], length: int) -> None:
    text = " ".join(words)
    tokenizer = load_tokenizer(tiny_folder)
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    pieces = cut(text, offsets, length)
    assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces[:-1])][: len(pieces)]
    assert not pieces or pieces[-1][1] == len(offsets)
    assert all(0 < stop - start <= length for start, stop in pieces)
    # No character is cut in two: every piece begins where the one before has ended.
    assert all(offsets[stop][0] >= offsets[stop - 1][1] for _, stop in pieces[:-1])


def test_a_pool_has_each_piece_once_and_finds_it_again(tiny_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_folder)
    text = tmp_path / "text.jsonl"
    texts = [essay(40, 3), essay(40, 4), essay(40, 3), "short"]
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    pool = make_pool(source_of([str(text)]), tokenizer, length=64, folder=tmp_path / "pools")
    pieces = [pool.text(i) for i in range(len(pool))]
    assert len(set(pieces)) == len(pieces) and "".join(pieces) == texts[0] + texts[1]
    assert all(tokenizer.decode(pool.ids(i)) == pieces[i] for i in range(len(pool)))
    assert pool.tokens == sum(len(pool.ids(i)) for i in range(len(pool))) == int(pool.lengths.sum())
    before = (pool.folder / "pool.json").stat().st_mtime_ns
    again = make_pool(source_of([str(text)]), tokenizer, length=64, folder=tmp_path / "pools")
    assert again.hash == pool.hash and (pool.folder / "pool.json").stat().st_mtime_ns == before
    part = again.subset(np.array([1]))
    assert len(part) == 1 and part.text(0) == pieces[1] and part.hash != pool.hash


def test_a_source_is_read_as_a_stream(tiny_folder: Path, tmp_path: Path) -> None:
    waiting: list[int] = []

    def endless() -> Iterator[str]:
        for number in range(5000):
            waiting.append(number)
            yield f"{number} " + " ".join(WORDS[:10])
        raise BadInput("the end is not reached in memory")

    written = tmp_path / "pools"
    with pytest.raises(BadInput, match="the end"):
        make_pool(Source("endless", "x", None, endless), load_tokenizer(tiny_folder), length=64, folder=written)
    assert len(waiting) == 5000 and not list(written.glob("*"))  # nothing half-made stays


@pytest.mark.parametrize(
    ("record", "message"),
    [({"headline": "x"}, "record 1 has no field 'label'"), ({"label": "a"}, "record 1 has no text"), ("x", "no field")],
)
def test_records_that_lack_something_are_named(tiny_folder: Path, tmp_path: Path, record: Any, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(BadInput, match=message):
        make_pool(
            source_of([str(path)]),
            load_tokenizer(tiny_folder),
            fields=Fields(("headline",), "label"),
            folder=tmp_path / "pools",
        )


# Gradients


def test_inner_products_are_those_of_the_gradients() -> None:
    torch.manual_seed(0)
    delta, x = torch.randn(2, 5, 7), torch.randn(2, 5, 3)
    gradients = [delta[i].T @ x[i] for i in range(2)]
    torch.testing.assert_close(inner_product(delta[0], x[0], delta[1], x[1]), (gradients[0] * gradients[1]).sum())


def test_sketches_keep_inner_products_in_expectation() -> None:
    torch.manual_seed(0)
    delta, x, counts = torch.randn(2, 6, 40), torch.randn(2, 6, 30), torch.tensor([6, 6])
    wanted = float(inner_product(delta[0], x[0], delta[1], x[1])) / 36
    found = []
    for seed in range(600):
        sketch = Sketch(40, 30, (8, 8), seed)
        left = sketch.left(delta.flatten(0, 1)).view(2, 6, -1)
        both = sketch.join(left, sketch.right(x.flatten(0, 1)).view(2, 6, -1), counts)
        found.append(float(both[0] @ both[1]))
    standard_error = np.std(found) / len(found) ** 0.5
    assert abs(np.mean(found) - wanted) < 4 * standard_error
    assert standard_error < 0.2 * float(both.norm(dim=1).prod())  # else the test could not fail


def test_the_error_is_the_gradient_by_the_logits() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    p = torch.randn(4, 9, dtype=torch.float64).softmax(-1)
    labels, mix = torch.tensor([1, 0, 8, 3]), Mix(0.7, 0.3)
    logs = logits.log_softmax(-1)
    loss = mix.kl * (p * (p.log() - logs)).sum() - mix.ce * logs.gather(-1, labels[:, None]).sum()
    (wanted,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(error(logits.detach().softmax(-1), p, labels, mix), wanted)


# Readings


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "qwen3"])
def test_readings_are_what_stock_models_say(family: str, tmp_path: Path) -> None:
    dense, other = (save_tiny(tmp_path / str(seed), family, seed=seed) for seed in (0, 1))
    check_readings(dense, other, tmp_path)


@pytest.mark.usefixtures("exact")
def test_readings_of_a_student_whose_layers_differ(tiny_folder: Path, student: Path, tmp_path: Path) -> None:
    check_readings(tiny_folder, student, tmp_path)


def check_readings(dense: Path, student: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(dense)
    source = Source("test", "test", None, lambda: iter([essay(n, n) for n in (9, 30, 4, 17)]))
    pool = make_pool(source, tokenizer, length=20, folder=tmp_path / "pools")
    how = Reading(COLUMNS, depth=2)
    found = ModelReadings(pool, Checkpoint(dense), Checkpoint(student), how, tmp_path / "readings", bos=0)
    models = [load_checkpoint(folder) for folder in (dense, student)]
    for model in models:
        model.set_attn_implementation("eager")
    assert len(pool) > 4 and len(set(pool.lengths)) > 1
    for i in range(len(pool)):
        ids = torch.tensor([[0, *pool.ids(i)]])
        logs = []
        for model in models:
            model.zero_grad()
            logs.append(model(input_ids=ids).logits[0, :-1].float().log_softmax(-1))
        hidden = models[0].get_decoder()(input_ids=ids).last_hidden_state[0, :-1]
        own = logs[0].gather(-1, ids[0, 1:, None])[:, 0]
        one_hot = torch.nn.functional.one_hot(ids[0, 1:], logs[0].shape[1])
        kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
        close = {"rtol": 1e-3, "atol": 1e-5}
        np.testing.assert_allclose(found.means[i], hidden.mean(0).detach(), **close)
        np.testing.assert_allclose(found.nlls[i], -own.mean().item(), **close)
        np.testing.assert_allclose(found.errors[i], (logs[0].exp() - one_hot).norm(dim=-1).mean().item(), **close)
        np.testing.assert_allclose(found.divergences[i], kl.mean().item(), **close)
        np.testing.assert_allclose(
            raw_gradients(found)[i], sketched(models[1], logs[0], ids, Checkpoint(student)), **close
        )


def raw_gradients(found: ModelReadings) -> np.ndarray:
    return np.asarray(found._column("gradients"))


def sketched(model: Any, dense: torch.Tensor, ids: torch.Tensor, student: Checkpoint) -> np.ndarray:
    """The sketch of gradients made by autograd: Pᵀ G R / √(p r) at the head, and the sum at the projections.

    Args:
        dense: log-probabilities of the dense model.
    """
    mix, shape = Mix(), student.shape
    layers = model.get_submodule(shape.family.layers)
    wanted, places = [], []
    for index in range(len(shape.layers) - 2, len(shape.layers)):
        for place, role in enumerate((shape.family.output, shape.family.down)):
            module = layers[index].get_submodule(role)
            if isinstance(module, torch.nn.Linear):
                wanted.append(module.weight)
                places.append(2 * index + place)
    head = model.get_output_embeddings()
    hidden: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda _m, args: hidden.append(args[0]))
    out = model(input_ids=ids).logits[0, :-1].float()
    handle.remove()
    p = dense.detach().exp()
    q = out.log_softmax(-1)
    loss = mix.kl * (p * (p.clamp_min(1e-30).log() - q)).sum(-1).mean() - mix.ce * q.gather(-1, ids[0, 1:, None]).mean()
    # The head's own gradient, apart from that of the embedding it may be tied to: from what it read and said.
    logits = (
        out if not shape.logit_soft_cap else torch.atanh(out.detach() / shape.logit_soft_cap) * shape.logit_soft_cap
    )
    delta = torch.autograd.grad(loss, out, retain_graph=True)[0]
    if shape.logit_soft_cap:
        delta = delta * (1 - torch.tanh(logits / shape.logit_soft_cap) ** 2)
    gradient = delta.T @ hidden[0][0, :-1]
    first = Sketch(*gradient.shape, readings._HEAD_SKETCH, readings._SIGNS)
    parts = [first.left(first.right(gradient.detach()).T.contiguous()).T.flatten()]
    total = torch.zeros(readings._LAYER_SKETCH[0] * readings._LAYER_SKETCH[1])
    for place, each in zip(places, torch.autograd.grad(loss, wanted), strict=True):
        sketch = Sketch(*each.shape, readings._LAYER_SKETCH, readings._SIGNS + 1 + place)
        total += sketch.left(sketch.right(each).T.contiguous()).T.flatten()
    return torch.cat([*parts, total]).detach().numpy()


def test_a_pass_that_was_interrupted_goes_on(
    tiny_folder: Path, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readings, "_TOKENS", 200)
    calls: list[int] = []
    plain = readings.Reader.__call__

    def counted(self: Any, ids: torch.Tensor, counts: torch.Tensor) -> Any:
        calls.append(len(ids))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(self, ids, counts)

    def read(folder: str) -> np.ndarray:
        found = ModelReadings(pool, Checkpoint(tiny_folder), None, Reading(("means",)), tmp_path / folder)
        return np.array(found.means)

    whole = read("whole")
    monkeypatch.setattr(readings.Reader, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        read("interrupted")
    before = sum(calls[:2])
    np.testing.assert_array_equal(read("interrupted"), whole)
    assert sum(calls[3:]) == len(pool) - before
    calls.clear()
    np.testing.assert_array_equal(read("interrupted"), whole)
    assert not calls  # found again


def test_what_needs_a_student_says_so(tiny_folder: Path, pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--student"):
        ModelReadings(pool, Checkpoint(tiny_folder), None, Reading(("divergences",)), tmp_path)
    other = save_tiny(tmp_path / "other", "llama")
    with pytest.raises(BadInput, match="tokens"):
        ModelReadings(pool, Checkpoint(tiny_folder), Checkpoint(other), Reading(("divergences",)), tmp_path)


# Matching


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 30), st.integers(1, 200))
def test_no_method_takes_more_than_there_is_room_for(seed: int, n: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    features, lengths = rng.standard_normal((n, 4)), rng.integers(1, 40, n)
    for take in (
        lambda basket: Choice(herd(features, features.mean(axis=0), basket)),
        lambda basket: match(features, features.mean(axis=0), basket, 0.1),
        lambda basket: farthest_first(features, basket),
        lambda basket: central(features, 3, 0, basket),
    ):
        found = take(Basket(Quota(tokens=tokens), lengths))
        left = tokens - int(lengths[found.taken].sum())
        assert left >= 0 and len(set(found.taken.tolist())) == len(found.taken)
        others = np.delete(lengths, found.taken)
        assert not len(others) or others.min() > left  # nor less
        if found.weights is not None:
            assert (found.weights > 0).all() and np.isclose(found.weights.mean(), 1)
        assert len(take(Basket(Quota(count=1), lengths)).taken) == 1


def test_matching_finds_the_rows_that_a_target_is_made_of() -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((60, 30))
    target = (3 * features[7] + features[20] + 2 * features[41]) / 6
    found = match(features, target, Basket(Quota(count=3), np.ones(60, dtype=np.int64)), 0.0)
    assert set(found.taken.tolist()) == {7, 20, 41} and found.weights is not None
    order = np.argsort(found.taken)
    np.testing.assert_allclose(found.weights[order], [1.5, 0.5, 1.0], rtol=1e-6)


def test_herding_comes_nearer_to_the_mean_than_chance() -> None:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((200, 8))
    mean = features.mean(axis=0)
    taken = herd(features, mean, Basket(Quota(count=10), np.ones(200, dtype=np.int64)))
    chance = [np.linalg.norm(features[rng.permutation(200)[:10]].mean(axis=0) - mean) for _ in range(50)]
    assert np.linalg.norm(features[taken].mean(axis=0) - mean) < 0.3 * min(chance)


def test_centers_and_clusters_reach_every_group() -> None:
    rng = np.random.default_rng(0)
    middles = 50 * rng.standard_normal((6, 5))
    features = np.repeat(middles, [90, 3, 3, 3, 3, 3], axis=0) + rng.standard_normal((105, 5))
    groups = np.repeat(np.arange(6), [90, 3, 3, 3, 3, 3])
    taken = farthest_first(features, Basket(Quota(count=6), np.ones(105, dtype=np.int64))).taken
    assert set(groups[taken]) == set(range(6))
    found = clusters(features, 6, 0)
    assert all(len(set(found[groups == group])) == 1 for group in range(6)) or len(set(found)) >= 4
    assert not clusters(np.ones((5, 2)), 3, 0).any()


def test_k_means_takes_what_is_nearest_to_the_centres_of_its_clusters() -> None:
    rng = np.random.default_rng(0)
    features = np.repeat([[0.0, 0.0], [90.0, 0.0], [0.0, 90.0]], [20, 12, 7], axis=0) + rng.standard_normal((39, 2))
    groups = np.repeat(np.arange(3), [20, 12, 7])
    away = np.concatenate([np.square(rows - rows.mean(axis=0)).sum(axis=1) for rows in np.split(features, [20, 32])])
    nearest = [np.argsort(np.where(groups == group, away, np.inf))[:2] for group in range(3)]
    taken = central(features, 3, 0, Basket(Quota(count=6), np.ones(39, dtype=np.int64))).taken
    assert taken.tolist() == [nearest[group][rank] for rank in range(2) for group in range(3)]  # larger clusters first


def test_gradient_matching_has_the_pools_gradient(tiny_folder: Path, student: Path, pool: Pool, tmp_path: Path) -> None:
    how = Reading(("gradients",), depth=2)
    found = ModelReadings(pool, Checkpoint(tiny_folder), Checkpoint(student), how, tmp_path)
    task = Task(pool, np.arange(len(pool)), Quota(tokens=pool.tokens // 4), found, 0)
    choice = gradient_matching.select(task)
    target = pool.lengths @ found.gradients / pool.tokens
    assert choice.weights is not None

    def distance(taken: np.ndarray, weights: np.ndarray) -> float:
        sizes = weights * pool.lengths[taken]
        return float(np.linalg.norm(sizes @ found.gradients[taken] / sizes.sum() - target))

    chance = []
    for seed in range(20):
        drawn = Basket(task.quota, pool.lengths).fill(np.random.default_rng(seed).permutation(len(pool)))
        chance.append(distance(drawn, np.ones(len(drawn))))
    assert distance(choice.taken, choice.weights) < 0.9 * min(chance)


# Texts with labels


def test_a_classifiers_gradients_are_in_the_pools_scale(tiny_folder: Path, labelled_file: Path, tmp_path: Path) -> None:
    fields = Fields(("headline",), "label")
    pool = make_pool(source_of([str(labelled_file)]), load_tokenizer(tiny_folder), fields=fields, folder=tmp_path)
    assert pool.classes == ["bad", "good"] and pool.labels is not None
    base = ModelReadings(pool, Checkpoint(tiny_folder), None, Reading(("means",)), tmp_path)
    found = LabelledReadings(base, pool.labels)
    np.testing.assert_allclose(
        found.gradients_of(base.means[:5], pool.labels[:5]), found.gradients[:5], rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(found.means.mean(axis=0), 0, atol=1e-4)
    # The classes have words of their own: trained on all texts, the classifier is hardly wrong about any.
    assert found.errors.mean() < 0.5


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "phi", "qwen3"])
def test_layers_apart_say_what_the_whole_model_says(family: str, tmp_path: Path) -> None:
    model = load_checkpoint(save_tiny(tmp_path / family, family))
    learner = DecoderLearner(model, 3, depth=2)
    parameters = learner.start(torch.Generator().manual_seed(0))
    embeddings, mask = learner.embed(torch.arange(3, 39).view(3, 12)), torch.ones(3, 12)
    with torch.no_grad():
        hidden = model.get_decoder()(inputs_embeds=embeddings).last_hidden_state.mean(1)
        expected = (hidden / hidden.square().mean(-1, keepdim=True).sqrt()) @ parameters["head.weight"].T
        torch.testing.assert_close(learner.logits(parameters, learner.features(embeddings), mask), expected)
        for name, value in parameters.items():
            if name.endswith(("down_proj.weight", "fc2.weight")):
                value.mul_(2)
        assert not torch.allclose(learner.logits(parameters, learner.features(embeddings), mask), expected)


def test_soft_data_train_the_model_they_were_made_for(tiny_folder: Path, labelled_file: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_folder)
    fields = Fields(("headline",), "label")
    pool = make_pool(source_of([str(labelled_file)]), tokenizer, fields=fields, folder=tmp_path)
    texts, labels = [torch.from_numpy(pool.ids(i)) for i in range(len(pool))], torch.from_numpy(pool.labels)
    learner = DecoderLearner(load_checkpoint(tiny_folder), 2)
    settings = SoftSettings(length=8, steps=25, inner=3, batch=16)
    data = optimise(learner, texts, labels, 2, settings, seed=0)
    data.save(tmp_path / "soft.safetensors")
    again = SoftSet.load(tmp_path / "soft.safetensors")
    assert torch.equal(again.embeddings, data.embeddings) and again.embeddings.shape == (4, 8, 64)
    ids, mask = padded(texts, max(map(len, texts)))

    def loss(parameters: Any) -> float:
        with torch.no_grad():
            return float(
                torch.nn.functional.cross_entropy(
                    learner.logits(parameters, learner.features(learner.embed(ids)), mask), labels
                )
            )

    generator = torch.Generator().manual_seed(5)
    before = loss(learner.start(generator))
    started = SoftSet(*optimise(learner, texts, labels, 2, SoftSettings(length=8, steps=0), seed=0).__dict__.values())
    plain = loss(train(learner, started, 3, torch.Generator().manual_seed(5)))
    after = loss(train(learner, again, 3, torch.Generator().manual_seed(5)))
    assert after < min(before, plain) - 0.05
    with pytest.raises(BadInput, match="soft data"):
        SoftSet.load(tiny_folder / "config.json")


# The whole


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "_BEGUN", 4)
    monkeypatch.setattr(synthetic, "_MOST", 12)


@pytest.mark.usefixtures("short")
def test_a_student_that_lost_nothing(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Where nothing diverges, no text is worth more than another."""
    out, tokens = tmp_path / "a.jsonl", LENGTH * 8
    options: dict[str, Any] = {"model": tiny_folder, "student": tiny_folder, "tokens": tokens, "length": LENGTH}
    assert distil.distil([str(text_file)], out, method="divergence", **options).texts >= 4


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("method", [name for name, entry in METHODS.items() if entry.kind != "make"])
def test_every_method_writes_texts(
    method: str, tiny_folder: Path, student: Path, text_file: Path, tmp_path: Path
) -> None:
    def run(name: str, seed: int = 0) -> str:
        done = distil.distil(
            [str(text_file)],
            tmp_path / name,
            model=tiny_folder,
            tokens=LENGTH * 8,
            method=method,
            student=student,
            length=LENGTH,
            seed=seed,
        )
        record = read_json(record_path := done.record)
        assert record_path.name == f"{name}.record.json"
        assert record["method"] == done.method == method and record["pool"]["tokens"] == done.pool_tokens > LENGTH * 8
        assert record["source"]["licence"] == "CC0-1.0" and record["texts"] == done.texts
        assert done.tokens is not None and done.tokens <= LENGTH * 8
        return (tmp_path / name).read_text()

    first = run("a.jsonl")
    lines = [json.loads(line) for line in first.splitlines()]
    assert 4 <= len(lines) <= 16 and all(line["text"].strip() for line in lines)
    source = text_file.read_text()
    licence = tmp_path / "a.jsonl.license"
    assert licence.exists() == (not METHODS[method].writes)
    if METHODS[method].kind == "select":
        tokenizer = load_tokenizer(tiny_folder)
        assert all(line["text"] in source for line in lines)
        assert 0.8 * LENGTH * 8 < sum(len(tokenizer(line["text"])["input_ids"]) for line in lines) <= LENGTH * 8 + 16
        assert "CC0-1.0" in licence.read_text()
    assert run("b.jsonl") == first
    if method in ("random", "best-of", "self-generated", "synthetic"):
        assert run("c.jsonl", seed=1) != first


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("method", ["random", "k-center", "k-means", "gradient-matching", "el2n", "synthetic"])
def test_texts_of_each_class(method: str, tiny_folder: Path, labelled_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "few.jsonl"
    fields = Fields(("headline",), "label")
    done = distil.distil([str(labelled_file)], out, model=tiny_folder, per_class=3, method=method, fields=fields)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    given = {json.loads(line)["headline"]: json.loads(line)["label"] for line in labelled_file.read_text().splitlines()}
    assert done.texts == len(lines)
    if method == "synthetic":  # a random model may write no line worth keeping
        assert {line["label"] for line in lines} <= {"good", "bad"} and len(lines) >= 2
    else:
        assert [line["label"] for line in lines] == ["bad"] * 3 + ["good"] * 3
        assert all(given[line["text"]] == line["label"] for line in lines)


def test_the_command(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "few.jsonl"
    command = ["distill", str(text_file), "--model", str(tiny_folder), "--out", str(out), "--length", "24"]
    done = CliRunner().invoke(app, [*command, "--tokens", "1k", "--method", "gradient-matching"])
    assert done.exit_code == 0, done.output
    assert re.search(r"gradient-matching: \d+ texts of [\d,]+ tokens", done.output)
    pairs = list(read_weighted(out))
    assert len({weight for _, weight in pairs}) > 1 and np.isclose(
        np.mean([weight for _, weight in pairs]), 1, atol=0.01
    )
    as_json = CliRunner().invoke(app, [*command, "--tokens", "1k", "--method", "random", "--json"])
    assert json.loads(as_json.stdout)["method"] == "random"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1k", "--method", "hording"], "did you mean 'herding'"),
        (["--tokens", "1k", "--method", "divergence"], "--student"),
        (["--tokens", "1k", "--per-class", "3"], "either --tokens or --per-class"),
        ([], "either --tokens or --per-class"),
        (["--tokens", "many"], "no number of tokens"),
        (["--tokens", "2"], "that small"),
        (["--tokens", "1k", "--method", "soft"], "ends in .safetensors"),
        (["--per-class", "3", "--method", "best-of"], "field 'label'"),
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str], message: str, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "few.jsonl"
    command = ["distill", str(text_file), "--model", str(tiny_folder), "--out", str(out)]
    done = CliRunner().invoke(app, [*command, *arguments])
    assert isinstance(done.exception, BadInput) and message in str(done.exception)
    assert not out.exists()


def test_a_licence_is_not_left_to_other_text(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.txt"
    bare.write_text(text_file.read_text())
    out = tmp_path / "few.jsonl"
    for source, licensed in ((text_file, True), (bare, False)):
        distil.distil([str(source)], out, model=tiny_folder, tokens=200, method="random", length=LENGTH)
        assert out.with_name("few.jsonl.license").exists() == licensed


def test_a_label_is_no_part_of_its_text(tiny_folder: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "asked.jsonl", tmp_path / "few.jsonl"
    records = [{"question": essay(12, seed), "answer": "yes" if seed % 2 else "no"} for seed in range(20)]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    distil.distil([str(source)], out, model=tiny_folder, per_class=2, method="random", fields=Fields(label="answer"))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["label"] for line in lines] == ["no"] * 2 + ["yes"] * 2
    assert not any(line["text"].endswith(("yes", "no")) for line in lines)


def test_a_distilled_file_takes_nothing_elses_place(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus" / "all.jsonl"
    corpus.parent.mkdir()
    corpus.write_text(json.dumps({"text": text_file.read_text()}) + "\n")
    other = tmp_path / "notes.jsonl"
    other.write_text("{}\n")
    cases = [(corpus, corpus, "lies in what is distilled"), (corpus.parent, corpus.parent / "few.jsonl", "lies in")]
    for source, out, message in [*cases, (corpus, other, "none of distill's files")]:
        with pytest.raises(BadInput, match=message):
            distil.distil([str(source)], out, model=tiny_folder, tokens=100, method="random")
    assert other.read_text() == "{}\n" and len(corpus.read_text()) > 100
    for _ in range(2):  # its own it replaces
        distil.distil([str(corpus)], tmp_path / "few.jsonl", model=tiny_folder, tokens=100, method="random", length=64)
    with pytest.raises(BadInput, match="--length: pieces of 512 tokens for a model of 256"):
        distil.distil([str(corpus)], tmp_path / "few.jsonl", model=tiny_folder, tokens=100, length=512)


def test_a_text_under_two_labels_is_one_of_each(tiny_folder: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "split.jsonl", tmp_path / "few.jsonl"
    same = essay(12, 0)
    records = [(same, "a"), (same, "b"), (same, "b"), (essay(12, 1), "a")]
    source.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in records))
    distil.distil([str(source)], out, model=tiny_folder, per_class=5, method="random", fields=Fields(label="label"))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["label"] for line in lines] == ["a", "a", "b"] and lines[2]["text"] == same


def test_soft_data_are_counted_as_they_are(tiny_folder: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "few.jsonl", tmp_path / "soft.safetensors"
    labels = ["a"] * 6 + ["b"] * 2
    lines = [json.dumps({"text": essay(6, seed), "label": label}) for seed, label in enumerate(labels)]
    source.write_text("\n".join(lines) + "\n")
    made = distil.distil(
        [str(source)], out, model=tiny_folder, per_class=5, method="soft", fields=Fields(label="label")
    )
    assert made.texts == len(SoftSet.load(out).embeddings) == 7


def test_a_number_stays_one_as_a_label(tiny_folder: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "stars.jsonl", tmp_path / "few.jsonl"
    source.write_text("".join(json.dumps({"text": essay(12, n), "label": n % 2}) + "\n" for n in range(20)))
    distil.distil([str(source)], out, model=tiny_folder, per_class=2, method="random", fields=Fields(label="label"))
    assert [json.loads(line)["label"] for line in out.read_text().splitlines()] == [0, 0, 1, 1]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("method", ["best-of", "synthetic"])
def test_too_few_tokens_are_told(
    method: str, tiny_folder: Path, student: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="ask for more"):
        distil.distil(
            [str(text_file)],
            tmp_path / "few.jsonl",
            model=tiny_folder,
            tokens=4,
            method=method,
            student=student,
            length=LENGTH,
        )


@given(st.lists(st.text(min_size=1, max_size=30), max_size=6), st.integers(1, 40))
@settings(deadline=None)
def test_no_more_tokens_than_asked_for(demo_tokenizer: Any, texts: list[str], tokens: int) -> None:
    written = Written(tuple(texts), None, tuple(range(len(texts))))
    kept = distil.within(written, tokens, demo_tokenizer)
    counts = [len(demo_tokenizer(text, add_special_tokens=False)["input_ids"]) for text in kept.texts]
    assert sum(counts) <= tokens
    assert kept.texts[:-1] == tuple(texts)[: max(0, len(kept.texts) - 1)] and kept.weights == tuple(
        range(len(kept.texts))
    )
    if kept.texts:
        assert texts[len(kept.texts) - 1].startswith(kept.texts[-1])


@pytest.fixture(scope="module")
def demo_tokenizer(tiny_folder: Path) -> Any:
    return load_tokenizer(tiny_folder)


def test_too_many_pieces_are_drawn_from(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distil, "_MOST_READ", 5)
    done = distil.distil(
        [str(text_file)], tmp_path / "few.jsonl", model=tiny_folder, tokens=200, method="herding", length=LENGTH
    )
    pool = read_json(done.record)["pool"]
    assert pool["drawn"] == 5 < pool["pieces"] == done.pool_pieces
    labels = np.array([0] * 30 + [1] * 3)
    found = distil.drawn(cast("Any", _Labelled(labels)), 10, 0)
    assert (labels[found] == 0).sum() == 5 and (labels[found] == 1).sum() == 3


class _Labelled:
    """As much of a pool as drawing needs."""

    classes = ("a", "b")

    def __init__(self, labels: Any) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)


def test_where_tokens_count_texts_are_matched_by_their_tokens() -> None:
    features = np.array([[0.0], [0.0], [0.0], [1.0]])
    lengths = np.array([1, 1, 1, 9])
    pool: Any = SimpleNamespace(lengths=lengths)
    for quota, share in ((Quota(tokens=12), 0.75), (Quota(count=4), 0.25)):
        task = Task(pool, np.arange(4), quota, cast("Any", None), 0)
        found = match_tokens(features, task, 1e-6)
        assert found.weights is not None
        sizes = lengths[found.taken] if quota.tokens else np.ones(4)
        trained = (found.weights * sizes) @ features[found.taken, 0] / (found.weights * sizes).sum()
        assert trained == pytest.approx(share, abs=0.05)


def test_of_text_with_a_part_of_unknown_licence_none_is_stated(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("some text")
    paths = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    (tmp_path / "a.txt.license").write_text("SPDX-License-Identifier: CC0-1.0\n")
    assert source_of(paths).licence is None and source_of(paths[:1]).licence == "CC0-1.0"
    (tmp_path / "b.txt.license").write_text("SPDX-License-Identifier: MIT\n")
    assert source_of(paths).licence == "CC0-1.0 AND MIT"


def test_a_hub_dataset_is_read_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "hub_records", lambda _name: iter(lambda: {"text": "x" * 100}, None))
    monkeypatch.setattr(pool_module, "licence_of", lambda _name: None)
    monkeypatch.setattr(pool_module, "_hub_hash", lambda _name: "h")
    monkeypatch.setattr(pool_module, "HUB_CHARACTERS", 1000)
    assert 9 <= len(list(source_of(["some/dataset"]).read())) <= 10
