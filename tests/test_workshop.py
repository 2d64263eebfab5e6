"""What a run's exports and trials are known by, and what is kept of them; no runtime is run."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeprune.calibration import TextSet
from edgeprune.candidates import Candidate
from edgeprune.checkpoint import Checkpoint
from edgeprune.devices import Budget, load_profile
from edgeprune.fit_texts import recovery_key, recovery_text
from edgeprune.fitting import FitOptions
from edgeprune.proposal import propose
from edgeprune.report_page import chosen_of
from edgeprune.targets import target_for
from edgeprune.workshop import Workshop, trial_key


def workshop_for(wide: Path, tmp_path: Path, **options: Any) -> Workshop:
    settings: dict[str, Any] = {"reference": tmp_path / "reference", "texts": TextSet((), (), "s"), "bench": False}
    settings |= {"context": 64, "make": lambda *_: None, **options}
    return Workshop(tmp_path / "work", wide, settings.pop("reference"), 1, **settings)


def with_template(folder: Path, tmp_path: Path) -> Path:
    """The same weights with another chat template."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    return copy


def test_a_file_is_made_anew_with_another_template(wide: Path, tmp_path: Path) -> None:
    shape, profile = Checkpoint(wide).shape, load_profile("rpi5")
    (dense,) = propose("m", shape, profile, Budget(context=64), [target_for("Q8_0")], ratios=(0.0,)).candidates
    first = workshop_for(wide, tmp_path).export(dense)
    assert workshop_for(wide, tmp_path).export(dense) == first
    second = workshop_for(with_template(wide, tmp_path), tmp_path).export(dense)
    assert second != first
    assert b"{{ messages }}" in second.read_bytes() and b"{{ messages }}" not in first.read_bytes()


def test_a_trial_is_known_again_only_where_all_is_the_same(wide: Path, tmp_path: Path) -> None:
    """Each of these changes what comes out, so none may find the other's result."""
    ids = (torch.arange(8),)
    shape, profile = Checkpoint(wide).shape, load_profile("rpi5")
    targets = [target_for(name) for name in ("Q8_0", "Q4_0:imatrix", "int8")]
    plain, matrix, onnx = propose("m", shape, profile, Budget(context=64), targets, ratios=(0.0,)).candidates

    def key(candidate: Candidate, **options: Any) -> str:
        return trial_key(candidate, "model", workshop_for(wide, tmp_path, **options))

    texts = TextSet(("a",), ids, "s")
    assert key(plain) == key(plain, texts=texts), "text does not matter to a dense file"
    assert key(matrix) != key(matrix, texts=texts)
    assert key(plain) == key(plain, context=1 << 20) and key(onnx) == key(onnx, context=128)
    assert key(plain, device="jetson-7w") == key(plain)
    assert key(plain, bench=True, device="jetson-7w") != key(plain, bench=True, device="jetson-25w")
    recovered = replace(plain, recovery_s=60.0)
    assert key(recovered, recovery="one text") != key(recovered, recovery="another") != key(plain)
    template = with_template(wide, tmp_path)
    assert key(plain) != trial_key(plain, "model", workshop_for(template, tmp_path))


def test_a_graph_holds_the_context_that_is_asked_for(wide: Path, tmp_path: Path) -> None:
    shape, profile = Checkpoint(wide).shape, load_profile("rpi5")
    shape = replace(shape, max_positions=32768)
    gguf, onnx = propose(
        "m", shape, profile, Budget(context=64), [target_for("Q8_0"), target_for("int8")], ratios=(0.0,)
    ).candidates
    for asked, positions in ((64, 8192), (16384, 16384)):
        assert workshop_for(wide, tmp_path, context=asked).positions(onnx) == positions
        assert workshop_for(wide, tmp_path, context=asked).positions(gguf) is None


def test_an_interrupted_training_run_is_kept(wide: Path, tmp_path: Path) -> None:
    """Of candidates by scores one checkpoint is kept at a time; what a training run left to go on from is none."""
    shape, profile = Checkpoint(wide).shape, load_profile("rpi5")
    cut = propose("m", shape, profile, Budget(context=64), [target_for("Q8_0")], ratios=(0.0, 0.3)).candidates[-1]
    made = workshop_for(wide, tmp_path, make=lambda _c, folder, _p: folder.mkdir())
    partial = made.checkpoints / f"{made.identity(cut)}.partial"
    for folder in (partial, made.checkpoints / "another"):
        folder.mkdir(parents=True)
    assert made.checkpoint(cut).is_dir() and partial.is_dir() and not (made.checkpoints / "another").exists()


def test_recovery_is_told_apart_by_what_it_trains_on(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("One.")
    options = FitOptions(calibration=str(text), recovery_s=60.0)
    before = recovery_key(options)
    assert before != recovery_key(replace(options, seed=1)) != recovery_key(replace(options, distill=64))
    text.write_text("One. Two.")
    assert recovery_key(options) != before
    assert recovery_key(FitOptions(calibration="owner/set")) != recovery_key(FitOptions())


def test_recovery_reads_a_hub_dataset_as_calibration_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = ({"text": "word " * 20} for _ in range(1000))
    monkeypatch.setattr("edgeprune.calibration.hub_records", lambda name: records if name == "owner/set" else None)
    monkeypatch.setattr("edgeprune.fit_texts.HUB_CHARACTERS", 1000)
    give = recovery_text(tmp_path, FitOptions(calibration="owner/set"), tmp_path)
    found = give(tmp_path, None)
    assert found is not None and len(found) == 10 and found[0] == ("word " * 20, 1.0)
    assert recovery_text(tmp_path, FitOptions(), tmp_path)(tmp_path, None) is None


def test_the_chosen_plan_is_found_by_what_it_keeps() -> None:
    """Two plans whose shares round alike have one name."""
    one, two = ({"name": "pruned15.4-Q4_0", "plan": {"sha256": letter}} for letter in "ab")
    assert chosen_of({"candidates": [one, two], "chosen": one["name"], "chosen_plan": "b"}) is two
    assert chosen_of({"candidates": [one, two], "chosen": one["name"]}) is one, "a record of an earlier version"
