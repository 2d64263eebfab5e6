"""Pruning layer by layer: what is written loads, is what was asked for, and loses less for being compensated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family_configs import TINY, save_tiny

from edgeprune import compensated
from edgeprune.blocks import LayeredModel
from edgeprune.checkpoint import Checkpoint
from edgeprune.compensated import Origin, prune_compensated
from edgeprune.damage import DamageTable, Reference, measure_damage
from edgeprune.errors import BadInput, StageFailed
from edgeprune.layerwise import Compensation, PrunedLayer, Streams, packed, prune_layers, start_streams
from edgeprune.runtimes.pytorch import load_model
from edgeprune.shape import LayerShape

EXACT = torch.float32
ORIGIN = Origin("test", 0.2, "hash", "text")


def text(windows: int = 8, length: int = 48, seed: int = 1) -> torch.Tensor:
    return torch.randint(10, 250, (windows, length), generator=torch.Generator().manual_seed(seed))


def narrowed(folder: Path) -> list[LayerShape]:
    """Half of the neurons everywhere, and one query head of each group in the second layer where there are two."""
    dense = Checkpoint(folder).shape
    widths = [replace(layer, neurons=layer.neurons // 2) for layer in dense.layers]
    if not dense.family.fixed_heads and widths[1].heads > widths[1].kv_heads:
        widths[1] = replace(widths[1], heads=widths[1].kv_heads)
    return widths


def pruned(folder: Path, choices: list[LayerShape], how: Compensation) -> tuple[list[PrunedLayer], Streams]:
    model = LayeredModel(Checkpoint(folder))
    streams = start_streams(model, text(), folder)
    return list(prune_layers(model, streams, choices, how)), streams


@pytest.mark.parametrize("name", TINY)
def test_what_is_written_computes_what_was_solved(tmp_path: Path, name: str) -> None:
    folder = save_tiny(tmp_path / "dense", name)
    choices = narrowed(folder)
    _, streams = pruned(folder, choices, Compensation())
    plan = prune_compensated(folder, text(), choices, Compensation(), tmp_path / "out", origin=ORIGIN, dtype=EXACT)
    assert [layer.widths for layer in plan.layers] == choices
    assert not (tmp_path / "out.partial").exists()
    module = load_model(tmp_path / "out")
    with torch.inference_mode():
        logits = module(input_ids=text()).logits.flatten(0, 1)
    expected = LayeredModel(Checkpoint(folder)).head().logits(streams.pruned.flatten(0, 1))
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "phi", "gemma3"])
def test_compensation_brings_the_streams_together(tmp_path: Path, name: str) -> None:
    folder = save_tiny(tmp_path / "dense", name)
    choices = narrowed(folder)
    plain = pruned(folder, choices, Compensation(solved=False))[0][-1].error
    own = pruned(folder, choices, Compensation(stream=0.0))[0][-1].error
    mixed = pruned(folder, choices, Compensation(stream=0.5))[0][-1].error
    assert mixed < own < plain


def test_the_less_text_the_nearer_to_the_old_weights() -> None:
    little, much = Compensation.for_tokens(16_384), Compensation.for_tokens(131_072)
    assert little.ridge == pytest.approx(8 * much.ridge) and much.ridge == pytest.approx(0.01, rel=0.01)
    assert Compensation.for_tokens(1).ridge == 1.0
    assert replace(little, ridge=much.ridge) == much


def test_nothing_to_remove_changes_nothing(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "dense", "llama")
    layers, streams = pruned(folder, list(Checkpoint(folder).shape.layers), Compensation())
    assert all(not layer.tensors and layer.error == 0.0 for layer in layers)
    torch.testing.assert_close(streams.pruned, streams.dense)


def test_layers_behind_the_last_change_are_not_run(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "dense", "llama")
    dense = list(Checkpoint(folder).shape.layers)
    seen: list[tuple[int, int]] = []

    def run(choices: list[LayerShape], out: str) -> dict[str, torch.Tensor]:
        prune_compensated(
            folder,
            text(),
            choices,
            Compensation(),
            tmp_path / out,
            origin=ORIGIN,
            dtype=EXACT,
            progress=lambda done, total: seen.append((done, total)),
        )
        return load_model(tmp_path / out).state_dict()

    before, same = load_model(folder).state_dict(), run(dense, "same")
    assert not seen and all(torch.equal(same[key], before[key]) for key in before)
    second = run([dense[0], replace(dense[1], neurons=64), dense[2]], "second")
    assert seen == [(1, 2), (2, 2)]
    changed = {key for key in before if second[key].shape != before[key].shape}
    assert changed == {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    assert all(torch.equal(second[key], before[key]) for key in before.keys() - changed)


def test_parts_may_be_absent(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "dense", "llama")
    dense = Checkpoint(folder).shape.layers[0]
    choices = [dense, LayerShape(0, 0, dense.neurons), replace(dense, neurons=0)]
    plan = prune_compensated(folder, text(), choices, Compensation(), tmp_path / "out", origin=ORIGIN, dtype=EXACT)
    assert [layer.widths for layer in plan.layers] == choices
    load_model(tmp_path / "out")


def test_two_runs_into_one_folder_do_not_mix(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "dense", "llama")

    def another(_done: int, _total: int) -> None:
        prune_compensated(folder, text(seed=9), narrowed(folder), Compensation(), tmp_path / "out", origin=ORIGIN)

    with pytest.raises(BadInput, match=r"out: another run is at work there"):
        prune_compensated(
            folder, text(), narrowed(folder), Compensation(), tmp_path / "out", origin=ORIGIN, progress=another
        )


def test_interrupted_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "dense", "llama")
    choices = narrowed(folder)
    monkeypatch.setattr(compensated, "_SAVE_EVERY_S", 0.0)

    def stop(done: int, _: int) -> None:
        seen.append(done)
        if done == 2:
            raise KeyboardInterrupt

    seen: list[int] = []
    args = (folder, text(), choices, Compensation())
    with pytest.raises(KeyboardInterrupt):
        prune_compensated(*args, tmp_path / "out", origin=ORIGIN, dtype=EXACT, progress=stop)
    assert not (tmp_path / "out").exists()
    again: list[int] = []
    prune_compensated(*args, tmp_path / "out", origin=ORIGIN, dtype=EXACT, progress=lambda done, _: again.append(done))
    assert seen == [1, 2] and again == [3]
    prune_compensated(*args, tmp_path / "whole", origin=ORIGIN, dtype=EXACT)
    resumed, whole = (load_model(tmp_path / name).state_dict() for name in ("out", "whole"))
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_another_plan_does_not_go_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "dense", "llama")
    monkeypatch.setattr(compensated, "_SAVE_EVERY_S", 0.0)

    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune_compensated(
            folder, text(), narrowed(folder), Compensation(), tmp_path / "out", origin=ORIGIN, progress=stop
        )
    seen: list[int] = []
    other = [replace(layer, neurons=96) for layer in Checkpoint(folder).shape.layers]
    prune_compensated(
        folder,
        text(),
        other,
        Compensation(),
        tmp_path / "out",
        origin=ORIGIN,
        progress=lambda done, _: seen.append(done),
    )
    assert seen == [1, 2, 3]


def test_a_folder_of_something_else_is_not_removed(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "dense", "llama")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "state.safetensors").touch()
    with pytest.raises(BadInput, match=r"out\.partial: holds something else"):
        prune_compensated(folder, text(), narrowed(folder), Compensation(), tmp_path / "out", origin=ORIGIN)
    assert (tmp_path / "out.partial" / "state.safetensors").exists()


@pytest.mark.parametrize("name", ["llama", "phi"])  # a parallel block keeps what the layer began with, too
def test_large_hidden_states_lie_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = save_tiny(tmp_path / "dense", name)
    in_memory, _ = pruned(folder, narrowed(folder), Compensation())
    monkeypatch.setattr("edgeprune.layerwise._IN_MEMORY", 0)
    on_disk, _ = pruned(folder, narrowed(folder), Compensation())
    assert (folder / "dense.bin").stat().st_size == 8 * 48 * 64 * 4
    assert (folder / "inner.bin").exists() and (folder / "began-dense.bin").exists() == (name == "phi")
    assert [layer.plan for layer in in_memory] == [layer.plan for layer in on_disk]


def test_text_is_packed_into_whole_windows() -> None:
    ids = packed([torch.arange(5), torch.arange(5, 12)], 4)
    assert ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    with pytest.raises(BadInput, match="do not fill a window"):
        packed([torch.arange(3)], 4)


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi", "gemma2"])
def test_damage_grows_with_what_is_removed(tmp_path: Path, name: str) -> None:
    folder = save_tiny(tmp_path / "dense", name)
    model = LayeredModel(Checkpoint(folder))
    table = measure_damage(model, text(), text(2, seed=9), Compensation(), model_hash="m", text_hash="t")
    dense = model.shape.layers[0]
    assert len(table.attention) == len(table.mlp) == len(model.shape.layers)
    for index in range(len(model.shape.layers)):
        assert (table.attention[index][0].heads, table.attention[index][0].damage) == (dense.heads, 0.0)
        assert (len(table.attention[index]) == 1) == model.shape.fixed_heads  # no more than can be chosen
        assert table.mlp_damage(index, dense.neurons) == 0.0
        assert 0 < table.mlp_damage(index, 96) <= table.mlp_damage(index, 32) <= table.mlp_damage(index, 0)
    table.save(tmp_path / "table.json")
    assert DamageTable.load(tmp_path / "table.json") == table


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_an_interrupted_table_goes_on_where_it_was(tmp_path: Path, name: str) -> None:
    folder = save_tiny(tmp_path / "dense", name)

    def table(partial: Path | None = None, stop: int = 0) -> DamageTable:
        def look(done: int, _: int) -> None:
            seen.append(done)
            if done == stop:
                raise KeyboardInterrupt

        model = LayeredModel(Checkpoint(folder))
        return measure_damage(model, text(), text(2, seed=9), Compensation(), partial=partial, progress=look)

    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        table(tmp_path / "partial.json", stop=2)
    seen.clear()
    found, whole = table(tmp_path / "partial.json"), table()
    assert seen == [3, 1, 2, 3]
    for layer in range(3):
        resumed, expected = ([option.damage for option in each.attention[layer]] for each in (found, whole))
        assert resumed == pytest.approx(expected, rel=1e-4)
        assert found.mlp_damage(layer, 64) == pytest.approx(whole.mlp_damage(layer, 64), rel=1e-4)


def test_damage_is_the_divergence_of_the_changed_model(tmp_path: Path) -> None:
    """The table's entry for one layer without MLP, against the model with that MLP taken out."""
    folder = save_tiny(tmp_path / "dense", "llama")
    judged = text(2, seed=9)
    table = measure_damage(LayeredModel(Checkpoint(folder)), text(), judged, Compensation())
    module = load_model(folder)
    with torch.inference_mode():
        dense = module(input_ids=judged).logits.log_softmax(-1)
        module.model.layers[1].mlp.down_proj.weight.zero_()
        changed = module(input_ids=judged).logits.log_softmax(-1)
    expected = float((dense.exp() * (dense - changed)).sum(-1).mean())
    assert table.mlp[1][-1].neurons == 0
    assert table.mlp[1][-1].damage == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma2"])  # Gemma 2 caps its logits
def test_a_part_of_a_vocabulary_stands_for_all_of_it(tmp_path: Path, name: str) -> None:
    model = LayeredModel(Checkpoint(save_tiny(tmp_path / "dense", name)))
    model.embed(text())
    head = model.head()
    generator = torch.Generator().manual_seed(0)
    residual = 3 * torch.randn(300, model.shape.hidden, generator=generator)
    changed = residual + 0.5 * torch.randn(residual.shape, generator=generator)
    part = head.sample(residual, 256)
    whole, small = Reference.of(head, residual), Reference.of(part, residual)
    assert small.probabilities.shape == (300, 256) and float(part.counts.sum()) == pytest.approx(model.shape.vocab)
    assert small.divergence(part, residual) < 1e-6
    assert small.divergence(part, changed) == pytest.approx(whole.divergence(head, changed), rel=0.1)
    assert head.sample(residual, model.shape.vocab) is head


def test_a_model_that_computes_nothing_is_told(tmp_path: Path) -> None:
    model = LayeredModel(Checkpoint(save_tiny(tmp_path, "llama")))
    model.embed(text())
    head, residual = model.head(), torch.randn(3, model.shape.hidden)
    with pytest.raises(StageFailed, match="not finite"):
        Reference.of(head, residual).divergence(head, torch.full_like(residual, torch.nan))
