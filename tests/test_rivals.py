"""The rival methods of the pruning benchmark, and its harness, on tiny random models."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.calibration import TextSet
from edgeprune.checkpoint import Checkpoint
from edgeprune.elimination import rows_of
from edgeprune.errors import BadInput, StageFailed
from edgeprune.export.gguf_writer import write_gguf
from edgeprune.models import load
from edgeprune.plan import keep_heads, top
from edgeprune.pruning import windows_of
from edgeprune.reference import build_reference
from edgeprune.runtimes.llamacpp import LlamaCpp
from edgeprune.runtimes.pytorch import PyTorch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import pruning  # noqa: E402
import pruning_cells  # noqa: E402
from conftest import SENTENCES, save_llama  # noqa: E402
from pruning_page import TASK_METRICS, best_curve, page, spread, summary_table  # noqa: E402
from rivals import METHODS, amp, flap, magnitude, shortgpt, slicegpt, steps, wanda_sp  # noqa: E402
from rivals.folders import parameters_of  # noqa: E402
from rivals.inputs import inputs_of, projections  # noqa: E402

RIVALS = [name for name in METHODS if name not in steps.ROWS | steps.TRAINED]
STOCK = [name for name in RIVALS if METHODS[name].runtime == "llamacpp"]


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """The harness tells the processes that it starts by environment variables; other tests see none of them."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve layers of 4 heads in 2 groups, 256 neurons: a layer is a twentieth of the model."""
    return save_llama(
        tmp_path_factory.mktemp("rivals") / "dense",
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
    )


@pytest.fixture(scope="module")
def texts() -> TextSet:
    generator = torch.Generator().manual_seed(3)
    ids = tuple(torch.randint(1, 300, (24,), generator=generator) for _ in range(6))
    return TextSet(("",) * 6, ids, "random")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: torch.from_numpy(checkpoint.tensor(name)) for name in checkpoint.names}


def module_of(method: str, folder: Path) -> torch.nn.Module:
    return slicegpt.load_sliced(folder) if METHODS[method].runtime == "pytorch" else load(folder).module


@pytest.mark.parametrize("method", RIVALS)
@pytest.mark.parametrize("ratio", [0.1, 0.2])
def test_a_rival_reaches_the_ratio_loads_and_is_deterministic(method, ratio, dense, texts, tmp_path):
    folder = METHODS[method].prune(dense, ratio, texts, tmp_path / "a")
    shape = Checkpoint(dense).shape
    layer = shape.layers[0]
    # Steps: a layer; for widths 32 neurons in each of 12 layers (which hold what a group of heads rounds to); 8 of 64
    # components.
    whole = shape.attention_parameters(layer) + shape.mlp_parameters(layer) + 2 * shape.hidden
    step = {"shortgpt": whole / 2, "slicegpt": 0.13 * shape.parameters, "slicegpt-tied": 0.13 * shape.parameters}
    allowed = step.get(method, 12 * 3 * shape.hidden * 32)
    assert abs(parameters_of(folder) - (1 - ratio) * shape.parameters) <= allowed
    logits = module_of(method, folder)(input_ids=texts.ids[0][None]).logits
    assert logits.shape == (1, 24, shape.vocab)
    assert torch.isfinite(logits).all()
    again = tensors(METHODS[method].prune(dense, ratio, texts, tmp_path / "b"))
    assert all(torch.equal(value, again[name]) for name, value in tensors(folder).items())


@pytest.mark.parametrize("method", STOCK)
def test_a_rival_gives_the_same_logits_in_llama_cpp(method, dense, texts, tmp_path):
    folder = METHODS[method].prune(dense, 0.2, texts, tmp_path / "pruned")
    ids = texts.ids[0].numpy()
    file = write_gguf(folder, tmp_path / "model.gguf", dtype="F32")
    with LlamaCpp(file, n_ctx=32, threads=1, exact=True) as runtime:
        found = torch.from_numpy(runtime.forward(ids))
    with torch.inference_mode():
        expected = load(folder).module(input_ids=torch.from_numpy(ids)[None]).logits[0]
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)


def literal_inputs(folder: Path, texts: TextSet, name: str) -> torch.Tensor:
    """What enters a module, text by text: (tokens, channels)."""
    module, seen = load(folder).module, []
    module.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.inference_mode():
        for ids in texts.ids:
            module(input_ids=ids[None])
    return torch.cat(seen).double()


def test_the_summary_is_fair_to_other_tokens_and_to_guessing():
    def row(method: str, tokens: int, nats: float, accuracy: float, **more: float) -> dict:
        tasks = {task: {metric: accuracy, f"{metric}_stderr": 0.01} for task, (_, metric) in TASK_METRICS.items()}
        quality = {"bits_per_byte": nats * tokens / 1000, "perplexity": math.exp(nats), "tokens": tokens}
        return {
            "method": method,
            "label": method,
            "ratio": 0.2 * (method != "dense"),
            "cells": tasks | {"quality": quality},
        } | more

    rows = [row("dense", 1000, 3.0, 0.55), row("fewer", 1100, 3.0, 0.45, reached_ratio=0.211)]
    dense, fewer = summary_table({"rows": rows}).splitlines()[2:]
    assert "| 20.09 |" in dense and "| 100.0 % | 100 % |" in dense
    # The same text in a tenth more tokens: exp(3.3) by the dense model's.
    assert "| 21.1 % |" in fewer and "| 27.11 |" in fewer and "| 81.8 % | 50 % |" in fewer


def test_wanda_sp_and_flap_scores_are_the_papers(dense, texts):
    model = load(dense)
    output, down = projections(model)[5]
    inputs = inputs_of(model, texts.ids, [output, down])
    for name in (output, down):
        x = literal_inputs(dense, texts, name)
        w = model.module.get_submodule(name).weight.detach().double()
        wanda = [sum(abs(w[i, j]) * x[:, j].norm() for i in range(len(w))) for j in range(4)]
        found = wanda_sp.channel_scores(w, inputs[name].squares)
        torch.testing.assert_close(found[:4], torch.stack(wanda), rtol=1e-5, atol=0)
        mean = x.mean(dim=0)
        fluctuation = [((x[:, j] - mean[j]) ** 2).sum() / (len(x) - 1) * (w[:, j] ** 2).sum() for j in range(4)]
        found = flap.fluctuation(w, inputs[name].variance)
        torch.testing.assert_close(found[:4], torch.stack(fluctuation), rtol=1e-4, atol=0)
        torch.testing.assert_close(inputs[name].mean, mean, rtol=1e-4, atol=1e-6)


def test_wanda_sp_scores_a_layer_on_what_the_pruned_ones_before_it_say(dense, texts):
    model = load(dense)
    left = amp.widths_of(model, 0.2, texts)
    found = wanda_sp.scores_on_the_way(model, left, texts)
    ids = windows_of(texts)
    for index in (0, 5):
        module, seen = load(dense).module, {}
        for layer, widths in enumerate(model.shape.layers[:index]):
            _, kept = keep_heads(found.heads[layer].numpy(), widths, left)
            stay = {"output": rows_of(kept, 16).tolist(), "down": top(found.neurons[layer].numpy(), left.neurons)}
            for role, columns in stay.items():
                weight = module.get_submodule(model.shape.family.in_layer(layer, role)).weight.detach()
                weight[:, [c for c in range(weight.shape[1]) if c not in columns]] = 0
        names = [model.shape.family.in_layer(index, role) for role in ("output", "down")]
        for name in names:
            hook = lambda _, inputs, name=name, seen=seen: seen.update({name: inputs[0].flatten(0, 1).double()})  # noqa: E731
            module.get_submodule(name).register_forward_pre_hook(hook)
        with torch.inference_mode():
            module(input_ids=ids)
        output, down = (
            wanda_sp.channel_scores(module.get_submodule(name).weight.detach(), seen[name].square().sum(dim=0))
            for name in names
        )
        torch.testing.assert_close(found.heads[index], output.reshape(4, -1).sum(dim=1), rtol=1e-4, atol=0)
        torch.testing.assert_close(found.neurons[index], down, rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", ["random", "magnitude", "reversed", "wanda-sp"])
def test_methods_by_scores_have_amps_widths(method, dense, texts, tmp_path):
    folder = METHODS[method].prune(dense, 0.2, texts, tmp_path / method)
    assert set(Checkpoint(folder).shape.layers) == {amp.widths_of(load(dense), 0.2, texts)}


def test_flap_takes_more_where_less_fluctuates_and_its_bias_is_the_mean_of_what_left(dense, texts, tmp_path):
    folder = flap.prune(dense, 0.2, texts, tmp_path / "flap")
    shape = Checkpoint(folder).shape
    assert len(set(shape.layers)) > 1
    assert all(layer.neurons % 32 == 0 for layer in shape.layers)
    model = load(dense)
    names = [name for pair in projections(model) for name in pair]
    plan = flap.plan_of(model, inputs_of(model, texts.ids, names), 0.2, "")
    index = min(range(12), key=lambda i: len(plan.layers[i].neurons))
    name = model.shape.family.in_layer(index, "down")
    gone = [i for i in range(256) if i not in plan.layers[index].neurons]
    mean = literal_inputs(dense, texts, name).mean(dim=0)
    expected = model.module.get_submodule(name).weight.detach().double()[:, gone] @ mean[gone]
    torch.testing.assert_close(tensors(folder)[f"{name}.bias"].double(), expected, rtol=1e-3, atol=1e-6)


def test_one_threshold_rules_all_layers():
    scores = torch.tensor([2.0, 1.0, -1.0, -2.0])
    assert flap._left(scores, 0.0, 1) == 2
    assert flap._left(scores, 5.0, 1) == 1
    assert flap._left(torch.arange(64.0), 20.5, 32) == 32
    assert torch.allclose(flap.standardised(scores), scores / scores.std())


def test_magnitude_is_the_norm_of_all_that_leaves():
    query, output = torch.randn(6, 5), torch.randn(5, 6)
    expected = [torch.cat([query[i : i + 3].flatten(), output[:, i : i + 3].flatten()]).norm() for i in (0, 3)]
    torch.testing.assert_close(magnitude.head_norms(query, output, 2).float(), torch.stack(expected))
    gate, up, down = torch.randn(4, 5), torch.randn(4, 5), torch.randn(5, 4)
    expected = [torch.cat([gate[i], up[i], down[:, i]]).norm() for i in range(4)]
    torch.testing.assert_close(magnitude.neuron_norms([gate, up], down).float(), torch.stack(expected))


def test_shortgpt_drops_the_layer_that_does_nothing(dense, texts, tmp_path):
    idle = tensors(dense)
    for role in ("self_attn.o_proj", "mlp.down_proj"):
        idle[f"model.layers.7.{role}.weight"].zero_()
    from rivals.folders import save_folder

    source = save_folder(dense, idle, Checkpoint(dense).config, tmp_path / "idle")
    influence = shortgpt.block_influence(load(source), texts.ids)
    assert influence[7] == pytest.approx(0, abs=1e-6)
    assert int(influence.argmin()) == 7
    shape = Checkpoint(source).shape
    one = 1 - shape.with_layers(shape.layers[1:]).parameters / shape.parameters
    pruned = load(shortgpt.prune(source, one, texts, tmp_path / "short"))
    ids = texts.ids[0][None]
    with torch.inference_mode():
        torch.testing.assert_close(
            pruned.module(input_ids=ids).logits, load(source).module(input_ids=ids).logits, atol=1e-5, rtol=1e-4
        )
    with pytest.raises(BadInput, match="all 12 layers"):
        shortgpt.prune(source, 0.99, texts, tmp_path / "none")


@pytest.mark.parametrize("prune", [slicegpt.prune, slicegpt.prune_tied])
def test_slicing_nothing_changes_nothing(prune, dense, texts, tmp_path):
    model = slicegpt.load_sliced(prune(dense, 0.0, texts, tmp_path / "whole"))
    ids = texts.ids[0][None]
    with torch.inference_mode():
        expected = load(dense).module(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=2e-3, rtol=1e-3)
    with pytest.raises(BadInput, match="missing keys"):  # nothing stock takes it for a model of its own
        load(tmp_path / "whole")
    runtime = PyTorch.of(model, None, 64)
    whole = runtime.forward(ids[0])
    runtime.rewind(0)
    pieces = [runtime.forward(part) for part in (ids[0, :9], ids[0, 9:])]
    assert abs(torch.from_numpy(whole) - torch.cat([torch.from_numpy(p) for p in pieces])).max() < 1e-3


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_of_a_sliced_model_are_told_in_advance(tied, dense, texts, tmp_path):
    shape = Checkpoint(dense).shape
    width = slicegpt.choose_width(shape, 0.2, tied=tied)
    folder = (slicegpt.prune_tied if tied else slicegpt.prune)(dense, 0.2, texts, tmp_path / "sliced")
    constants = (2 * len(shape.layers) + 1) * width  # the norms' weights: one number each, written as a vector
    assert parameters_of(folder) - constants == slicegpt.sliced_parameters(shape, width, tied=tied)


@pytest.fixture
def torch_threads() -> Iterator[None]:
    """What runs in a process of its own sets torch's threads; here it must not for the tests that follow."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name in ("wikitext2/wiki.test.raw", "c4/c4.txt", "wikipedia/wikipedia.txt"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("\n".join(SENTENCES * 40), encoding="utf-8")
    (folder / "tasks").mkdir()
    piqa = "".join(
        json.dumps({"goal": f"Open jar {i}", "sol1": "Turn it.", "sol2": "Ask it."}) + "\n" for i in range(6)
    )
    (folder / "tasks" / "piqa_validation.jsonl").write_text(piqa)
    (folder / "tasks" / "piqa_validation_labels.txt").write_text("0\n1\n" * 3)
    ending = {
        "activity_label": "Tea",
        "ctx_a": "She sits.",
        "ctx_b": "then",
        "endings": ["up", "in", "a"],
        "label": "0",
    }
    lines = "".join(json.dumps(ending) + "\n" for _ in range(5))
    (folder / "tasks" / "hellaswag_validation.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    return folder


def run(out: Path, dense: Path, data: Path, *more: str, code: int = 0) -> dict:
    options = {"--texts": 4, "--length": 32, "--windows": 2, "--limit": 4, "--threads": 1, "--repetitions": 1}
    words = [str(word) for pair in options.items() for word in pair]
    fixed = ["--out", str(out), "--model", str(dense), "--data", str(data), "--ratios", "0.1"]
    assert pruning.main([*fixed, *words, *more]) == code
    return json.loads(out.read_text())


def test_the_harness_runs_and_goes_on_where_it_stopped(dense, data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "pruning.json"
    run(out, dense, data, "--rows", "dense", "--columns", "prune", "bytes")
    columns = ["--columns", "prune", "bytes", "quality", "piqa"]
    first = run(out, dense, data, "--rows", "magnitude", *columns)
    assert [(row["method"], sorted(row["cells"])) for row in first["rows"]] == [
        ("dense", ["bytes"]),
        ("magnitude", ["bytes", "piqa", "prune", "quality"]),
    ]
    dense_cells, found = (row["cells"] for row in first["rows"])
    assert not [cell for cell in found.values() if "error" in cell]
    assert found["prune"]["peak_mib"] > 0
    assert found["prune"]["reached_ratio"] == pytest.approx(0.1, abs=0.04)
    assert first["rows"][1]["reached_ratio"] == found["prune"]["reached_ratio"]
    assert found["bytes"]["bytes_per_token"] < dense_cells["bytes"]["bytes_per_token"]
    assert found["quality"]["kl_nats"] > 0
    assert found["quality"]["runtime"] == "llamacpp"
    assert found["piqa"]["items"] == 4
    assert not list((tmp_path / "pruning-work").glob("*/folder"))

    def forbidden(*_, **__):
        raise AssertionError("a finished cell was measured again")

    monkeypatch.setattr(pruning.Row, "measure", forbidden)
    assert run(out, dense, data, "--rows", "magnitude", *columns)["rows"] == first["rows"]
    for change in (["--again"], ["--windows", "3"]):  # the second is a setting that the cell depends on
        again = run(out, dense, data, "--rows", "magnitude", "--columns", "quality", *change, code=4)
        assert "measured again" in again["rows"][1]["cells"]["quality"]["error"]
    monkeypatch.undo()

    capsys.readouterr()
    curve = tmp_path / "quantisation.json"
    points = ((2e6, 0.1, 0.0), (1e6, 0.4, 0.0), (1e6, 0.3, 0.2))
    rows = [{"bytes_per_token": read, "kl_nats": kl, "removed": removed} for read, kl, removed in points]
    curve.write_text(json.dumps({"dense_q4_0_bytes_per_token": 2_000_000, "at_most": {"0.5": {}}, "rows": rows}))
    pruning.main(["--out", str(out), "--render", "--plots", str(tmp_path / "plots"), "--quantisation", str(curve)])
    assert "| **dense** |" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"quality.png", "bytes.png"}


def test_a_sliced_model_is_judged_in_torch(dense, texts, data, tmp_path, torch_threads):
    folder = slicegpt.prune(dense, 0.1, texts, tmp_path / "sliced")
    reference = build_reference(
        PyTorch(dense, n_ctx=64, threads=1), SENTENCES[0] * 20, tmp_path, model_hash="", length=32, count=2
    )
    found = pruning_cells.quality_in_process(str(folder), str(reference.folder), 1)
    assert found["kl_nats"]["mean"] > 0
    assert found["measured_on"]["runtime"] == "pytorch"
    task = pruning_cells.task_in_process(str(folder), "hellaswag", 4, str(data / "tasks"), 1)
    assert task["n-samples"]["hellaswag"]["effective"] == 4
    read = pruning_cells.sliced_bytes(folder)
    assert 0 < read["bytes_per_token"] < read["file_bytes"]


def test_what_fails_is_said_and_tried_again(dense, data, tmp_path, monkeypatch):
    out = tmp_path / "pruning.json"
    cell = run(out, dense, data, "--rows", "slicegpt", "--columns", "speed")["rows"][0]["cells"]["speed"]
    assert "no stock runtime" in cell["absent"]
    assert "Not measured" in page(json.loads(out.read_text()))
    calls = []

    def failing(self, column):
        calls.append(column)
        raise StageFailed("broken")

    monkeypatch.setattr(pruning.Row, "measure", failing)
    run(out, dense, data, "--rows", "slicegpt", "--columns", "speed", code=0)  # what cannot be is not asked for again
    for _ in range(2):
        cell = run(out, dense, data, "--rows", "amp", "--columns", "bytes", code=4)["rows"][1]["cells"]["bytes"]
        assert cell["error"] == "broken"
    assert calls == ["bytes", "bytes"]
    with pytest.raises(SystemExit):
        run(out, dense, data, "--rows", "flop")
    with pytest.raises(BadInput, match="another model"):
        out.write_text(json.dumps({"schema_version": 1, "model_sha256": "0", "rows": []}))
        run(out, dense, data, "--rows", "dense")


def test_the_curve_of_quantisation_keeps_what_nothing_smaller_beats():
    rows = [{"bytes_per_token": b, "kl_nats": kl} for b, kl in ((3e6, 0.2), (1e6, 0.5), (2e6, 0.6), (4e6, 0.0))]
    assert best_curve(rows) == [(1.0, 0.5), (3.0, 0.2)]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=15).map(sorted))
def test_names_beside_a_plot_do_not_overlap(heights: list[float]):
    moved = spread(heights, 0.05)
    assert all(0 <= height <= 1 for height in moved)
    assert all(above - below > 0.05 - 1e-9 for below, above in itertools.pairwise(moved))
    far_apart = [0.05 * round(height / 0.05) for height in heights]
    if len(set(far_apart)) == len(heights):
        assert spread(far_apart, 0.05) == pytest.approx(far_apart)


@pytest.mark.parametrize("method", ["energy", "amp-unweighted", "amp-solved", "amp-chosen"])
def test_our_steps_on_amp_keep_its_widths(method: str, dense: Path, texts: TextSet, tmp_path: Path) -> None:
    wanted = Checkpoint(METHODS["amp"].prune(dense, 0.2, texts, tmp_path / "amp")).shape
    assert Checkpoint(METHODS[method].prune(dense, 0.2, texts, tmp_path / "step")).shape == wanted
