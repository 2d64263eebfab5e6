"""`fit` end to end on tiny models, through the real exports and runtimes; and once on the real demo model."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import onnxruntime
import pytest
from conftest import RATIOS, SENTENCES, save_llama, speed_between
from family_configs import save_tiny

import edgeprune
from edgeprune.at_hand import judge_measured
from edgeprune.candidates import Candidate, candidate_of, candidates_for, nearest_miss, worth_measuring
from edgeprune.checkpoint import Checkpoint
from edgeprune.cost import judge
from edgeprune.devices import Budget, load_profile
from edgeprune.errors import BadInput, NothingFits, StageFailed
from edgeprune.files import only_one, read_json
from edgeprune.fitting import FitOptions, FitResult, choose, fit, prepare
from edgeprune.metrics import mean_interval
from edgeprune.plan import PrunePlan, Scope, WidthPlan, keep_all
from edgeprune.proposal import propose
from edgeprune.pruning import prune
from edgeprune.quality import Quality
from edgeprune.record import Trial, append_trial, read_trials
from edgeprune.reference import MeasuredOn
from edgeprune.report import pareto_front
from edgeprune.runtimes.ssh import LinkBroken
from edgeprune.search import worth_making
from edgeprune.targets import default_targets, target_for

pytestmark = pytest.mark.usefixtures("short_fit")


def run(folder: Path, out: Path, budget: Budget, **options: Any) -> FitResult:
    """By the paper's method, whose pruned candidates are quick to make."""
    options = {"targets": ["Q8_0", "int8"], "method": "amp", **options}
    if options["method"] == "amp":
        options.setdefault("ratios", RATIOS)
    return fit(folder, "rpi5", budget, out=out, threads=2, **options)


def test_the_api_is_importable_and_lazy() -> None:
    assert edgeprune.fit is fit
    assert edgeprune.Budget is Budget
    assert callable(edgeprune.prune)


def test_fit_prunes_to_a_budget_and_proves_it(wide: Path, tmp_path: Path) -> None:
    budget = speed_between(wide, 0.3, "Q8_0", 64)
    seen: list[str] = []
    result = run(wide, tmp_path / "run", budget, progress=lambda stage, _d, _t: seen.append(stage))
    assert not result.chosen.dense and result.chosen.fits
    assert result.chosen.cost.decode_tps.value >= (budget.min_tokens_per_s or 0)

    record = json.loads((tmp_path / "run" / "fit.json").read_text())
    assert record["schema_version"] == 1 and record["chosen"] == result.chosen.name
    by_name = {c["name"]: c for c in record["candidates"]}
    dense = [c for c in by_name.values() if c["plan"]["reached_ratio"] == 0]
    assert dense and all(not c["fits"] and "tokens/s" in c["reasons"][0] for c in dense)
    chosen = by_name[record["chosen"]]
    assert chosen["predicted"]["decode_tps"]["kind"] == "predicted"
    assert chosen["quality"]["kl_nats"]["mean"] > 0 and chosen["speed"] == {}, "not the device, so no measured speed"

    best = result.best
    for line in (best / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((best / name).read_bytes()).hexdigest() == digest
    bundle = json.loads((best / "bundle.json").read_text())
    assert bundle["n_ctx"] == 64 and bundle["model_file"] == "model.gguf" and bundle["predicted"]["on"] == "rpi5"
    report = (tmp_path / "run" / "report.md").read_text()
    assert result.verdict in report and (tmp_path / "run" / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "measuring" in " ".join(seen)
    assert not (tmp_path / "run" / "work").exists()

    command = record["commands"]["again"]
    assert "--device rpi5" in command and "--ratios 0,0.1,0.2,0.3,0.4" in command and "--quant Q8_0,int8" in command

    # Stock software loads what was chosen: the widths in the file are those of the plan.
    llama = llama_cpp.Llama(str(best / "model.gguf"), n_ctx=32, verbose=False)
    widths = result.chosen.shape.layers[0]
    assert llama.metadata["llama.feed_forward_length"] == str(widths.neurons)
    assert llama.metadata["llama.attention.head_count"] == str(widths.heads)


def test_fit_by_measured_damage_gives_each_layer_its_own_widths(wide: Path, tmp_path: Path) -> None:
    budget = speed_between(wide, 0.3, "Q8_0", 64)
    result = run(wide, tmp_path / "run", budget, method="obs")
    assert not result.chosen.dense and not judge(result.chosen.cost, budget, load_profile("rpi5"))
    assert {c.target.runtime for c, _ in result.trials if not c.dense} == {"llamacpp", "onnxruntime"}
    pruned = [c for c, _ in result.trials if not c.dense]
    assert any(not c.shape.uniform for c in pruned)
    for candidate, trial in result.trials:
        assert trial.status == "ok" and trial.quality is not None
        assert (candidate.plan.reached_ratio > 0) == candidate.fits
    record = json.loads((tmp_path / "run" / "fit.json").read_text())
    chosen = next(c for c in record["candidates"] if c["name"] == record["chosen"])
    assert chosen["plan"]["predicted_damage_nats"] > 0
    plan = PrunePlan.load(result.best / "prune_plan.json", Checkpoint(wide).shape)
    assert tuple(layer.widths for layer in plan.layers) == result.chosen.shape.layers
    assert "--method obs" in record["commands"]["again"]


def test_a_model_whose_layers_differ_is_quantised_alone(wide: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES * 30), encoding="utf-8")
    prune(wide, 0.2, tmp_path / "pruned", calibration=str(text))
    size = {
        name: candidate_of(keep_all(shape), shape, target_for(name), load_profile("rpi5"), Budget()).cost.file_mib
        for shape in [Checkpoint(tmp_path / "pruned").shape]
        for name in ("F16", "Q8_0")
    }
    budget, targets = Budget(max_file_mib=(size["F16"] + size["Q8_0"]) / 2, context=64), ["F16", "Q8_0"]
    said: list[str] = []
    result = run(
        tmp_path / "pruned",
        tmp_path / "run",
        budget,
        method="obs",
        targets=targets,
        progress=lambda stage, _done, _total: said.append(stage),
    )
    assert result.chosen.dense and str(result.chosen.target) == "Q8_0 on llamacpp"
    assert "the model's layers differ already: it is not pruned again" in said
    small = budget.model_copy(update={"max_file_mib": size["Q8_0"] / 2})
    for method in ("obs", "amp"):
        with pytest.raises(NothingFits, match="nearest is dense, Q8_0"):
            run(tmp_path / "pruned", tmp_path / method, small, method=method, targets=targets)


def test_dense_trials_serve_runs_with_other_texts_and_copies_of_the_model(wide: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES * 30), encoding="utf-8")
    budget, options = Budget(context=64), {"targets": ["Q8_0"], "held_out": str(text)}
    first = run(wide, tmp_path / "one", budget, **options)
    second = run(wide, tmp_path / "two", budget, calibration=str(text), **options)
    assert second.chosen.dense and second.trials[0][1].quality == first.trials[0][1].quality
    shutil.copytree(wide, tmp_path / "copy")
    assert run(tmp_path / "copy", tmp_path / "three", budget, **options).chosen.dense


def test_another_budget_runs_nothing_of_the_dense_model_again(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(wide, tmp_path / "one", speed_between(wide, 0.3, "Q8_0", 64), method="obs", targets=["Q8_0"])

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("edgeprune.pruning.measure_damage", refuse)
    second = run(wide, tmp_path / "two", speed_between(wide, 0.2, "Q8_0", 64), method="obs", targets=["Q8_0"])
    assert not second.chosen.dense
    dense = next(t for c, t in second.trials if c.dense)
    first = read_trials(tmp_path / "one" / "trials.jsonl")
    assert first[dense.key].quality == dense.quality


def test_uniform_plans_load_everywhere(wide: Path, tmp_path: Path) -> None:
    budget = speed_between(wide, 0.3, "Q8_0", 64)
    result = run(wide, tmp_path / "run", budget, method="obs", uniform=True, targets=["Q8_0"])
    assert not result.chosen.dense and result.chosen.shape.uniform
    llama = llama_cpp.Llama(str(result.best / "model.gguf"), n_ctx=32, verbose=False)
    assert llama.metadata["general.architecture"] == "llama"


def test_recovery_trains_the_best_and_measures_it_too(wide: Path, tmp_path: Path) -> None:
    budget = speed_between(wide, 0.3, "Q8_0", 64)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(SENTENCES) * 40)
    options = {"method": "obs", "targets": ["Q8_0"], "calibration": str(text), "distill": 2048}
    result = run(wide, tmp_path / "run", budget, recovery_s=6.0, **options)
    names = {c.name for c, t in result.trials if t.status == "ok"}
    assert any("-recovered-" in name for name in names)
    assert result.chosen.name in names
    # The text was distilled twice: before there was a pruned model, and with it.
    records = {path.name: read_json(path) for path in (tmp_path / "run" / "distilled").glob("*.record.json")}
    assert sorted(records) == ["calibration.jsonl.record.json", "recovery.jsonl.record.json"]
    assert [record["student"] is None for _, record in sorted(records.items())] == [True, False]
    assert all(0 < record["tokens"] <= 2048 for record in records.values())
    fit = read_json(tmp_path / "run" / "fit.json")
    assert fit["calibration"]["source"].endswith("calibration.jsonl") and "--distill 2048" in fit["commands"]["again"]


def test_there_must_be_text_to_distil(wide: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"--distill.*--calibration"):
        run(wide, tmp_path / "run", Budget(), distill=1024)


def test_weights_that_ship_are_kept_and_made_anew_on_demand(wide: Path, tmp_path: Path) -> None:
    budget = speed_between(wide, 0.3, "Q8_0", 64)
    result = run(wide, tmp_path / "run", budget, method="obs", targets=["Q8_0"])
    (kept,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert Checkpoint(kept).shape.layers == result.chosen.shape.layers
    (kept / "mark").touch()
    run(wide, tmp_path / "run", budget, method="obs", targets=["Q8_0"])
    assert (kept / "mark").exists()
    run(wide, tmp_path / "run", budget, method="obs", targets=["Q8_0"], resume=False)
    assert kept.exists() and not (kept / "mark").exists()


def test_the_other_runtime_gets_its_best_too(wide: Path, tmp_path: Path) -> None:
    result = run(wide, tmp_path / "run", Budget(context=64))
    assert {c.target.runtime for c, _ in result.trials} == {"llamacpp", "onnxruntime"}
    (other,) = (tmp_path / "run").glob("best-*")
    onnx = next(f for f in (result.best, other) if (f / "model.onnx").exists())
    session = onnxruntime.InferenceSession(str(onnx / "model.onnx"))
    assert {"input_ids", "attention_mask"} <= {i.name for i in session.get_inputs()}
    assert (onnx / "genai_config.json").exists() and (onnx / "bundle.json").exists()


def test_a_second_run_repeats_no_trial(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(wide, tmp_path / "run", Budget(context=64), targets=["Q8_0"])
    log = (tmp_path / "run" / "trials.jsonl").read_text()

    def never(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("edgeprune.workshop.evaluate", never)
    (tmp_path / "run" / "best-onnxruntime").mkdir()  # as an earlier run with another outcome leaves it
    (tmp_path / "run" / "best-onnxruntime" / "bundle.json").touch()
    (tmp_path / "run" / "best-of.md").touch()  # the user's
    again = run(wide, tmp_path / "run", Budget(context=64), targets=["Q8_0"])
    assert not (tmp_path / "run" / "best-onnxruntime").exists() and (tmp_path / "run" / "best-of.md").exists()
    assert (tmp_path / "run" / "trials.jsonl").read_text() == log
    assert again.verdict == first.verdict
    with pytest.raises(AssertionError, match="measured again"):
        run(wide, tmp_path / "run", Budget(context=64), targets=["Q8_0"], resume=False)


def test_a_failing_candidate_is_a_result_and_the_others_go_on(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeprune import workshop

    real = workshop.evaluate

    def sometimes(path: Path, *args: Any, **kwargs: Any) -> Quality:
        if "int8" in path.name:
            raise StageFailed("crash: SIGSEGV", where=path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(workshop, "evaluate", sometimes)
    result = run(wide, tmp_path / "run", Budget(context=64))
    outcomes = {c.target.quantisation: (t.status, t.reason) for c, t in result.trials}
    assert outcomes == {"Q8_0": ("ok", None), "int8": ("crash", "SIGSEGV")}
    assert "crash: SIGSEGV" in (tmp_path / "run" / "report.md").read_text()

    # What made it fail may be over: the next run tries again, and only that.
    tried: list[str] = []
    monkeypatch.setattr(workshop, "evaluate", lambda path, *a, **k: (tried.append(path.name), real(path, *a, **k))[1])
    again = run(wide, tmp_path / "run", Budget(context=64))
    assert len(tried) == 1 and tried[0].startswith("dense-int8")
    assert {t.status for _, t in again.trials} == {"ok"}


def test_a_broken_link_ends_the_run_and_is_no_result(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(path: Path, *_args: Any, **_kwargs: Any) -> Quality:
        raise LinkBroken("no answer", where="ssh://pi@kitchen")

    monkeypatch.setattr("edgeprune.workshop.evaluate", gone)
    with pytest.raises(LinkBroken, match="no answer"):
        run(wide, tmp_path / "run", Budget(context=64), targets=["Q8_0"])
    assert (tmp_path / "run" / "trials.jsonl").read_text() == ""


def test_two_models_of_one_name_are_not_mixed_up(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an unfinished run left of one model is not measured as the other's, in the folder that their name gives."""
    other = save_llama(tmp_path / "b" / wide.name, seed=5, intermediate_size=512, max_position_embeddings=512)

    def stop(*_args: Any, **_kwargs: Any) -> Quality:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("edgeprune.workshop.evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            run(wide, tmp_path / "run", Budget(context=64), targets=["Q8_0"])
    assert list((tmp_path / "run" / "work").glob("dense-Q8_0*.gguf"))
    result = run(other, tmp_path / "run", Budget(context=64), targets=["Q8_0"])
    alone = run(other, tmp_path / "alone", Budget(context=64), targets=["Q8_0"])
    assert result.trial.files == alone.trial.files


def test_a_run_at_work_is_left_alone(wide: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trials.jsonl").touch()
    busy = pytest.raises(BadInput, match="another run is at work there; give this one its own --out")
    with only_one(tmp_path / "run" / "trials.jsonl"), busy:
        run(wide, tmp_path / "run", Budget(context=64), targets=["Q8_0"])
    run(wide, tmp_path / "run", Budget(context=64), targets=["Q8_0"])


def test_shares_are_of_the_papers_method_alone(wide: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="obs finds the shares itself; leave it out, or add --method amp"):
        fit(wide, "rpi5", Budget(context=64), out=tmp_path / "run", ratios=(0.1,))


def test_max_time_stops_after_the_first(wide: Path, tmp_path: Path) -> None:
    result = run(wide, tmp_path / "run", Budget(context=64), max_time_s=1e-9)
    assert len(result.trials) == 1
    assert json.loads((tmp_path / "run" / "fit.json").read_text())["stopped_early"] is True


def test_nothing_fits_names_the_nearest_miss_and_writes_nothing(wide: Path, tmp_path: Path) -> None:
    with pytest.raises(NothingFits, match=r"nearest is .*needs 1e\+08 tokens/s, predicted") as caught:
        run(wide, tmp_path / "run", Budget(min_tokens_per_s=1e8, context=64))
    assert caught.value.exit_code == 3
    assert not (tmp_path / "run").exists()


def test_bad_input_comes_before_the_work(wide: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BadInput, match="not a folder"):
        run(wide, tmp_path / "file", Budget(context=64))
    with pytest.raises(BadInput, match="context 4096 is more than the model's 512"):
        run(wide, tmp_path / "run", Budget(context=4096))
    with pytest.raises(BadInput, match="did you mean 'Q8_0'"):
        run(wide, tmp_path / "run", Budget(context=64), targets=["Q8_O"])
    with pytest.raises(BadInput, match="did you mean 'rpi5'"):
        fit(wide, "rpi55", Budget(context=64))


def quality(kl: list[float]) -> Quality:
    return Quality(
        perplexity=1.0,
        bits_per_byte=1.0,
        nll_nats=mean_interval(kl),
        n_tokens=1,
        n_bytes=1,
        n_windows=len(kl),
        nll_windows=tuple(kl),
        text="t",
        measured_on=MeasuredOn("r", "m"),
        kl_nats=mean_interval(kl),
        top1=mean_interval(kl),
        kl_windows=tuple(kl),
        reference="ref",
    )


def test_choice_is_by_quality_and_by_speed_on_a_tie(tiny_folder: Path) -> None:
    shape, profile = Checkpoint(tiny_folder).shape, load_profile("rpi5")
    slow, fast = propose(
        "m", shape, profile, Budget(context=64), [target_for("F32"), target_for("Q4_0")], ratios=(0.0,)
    ).candidates
    assert slow.cost.decode_tps.value < fast.cost.decode_tps.value
    noise = np.random.default_rng(0).normal(0, 0.01, 12)
    base = Trial("k", "c", "ok", None, quality([0.1] * 12))
    near = replace(base, quality=quality((0.1 + noise - noise.mean() + 0.0001).tolist()))
    far = replace(base, quality=quality([0.2] * 12))
    failed = Trial("k", "c", "oom", "SIGKILL", None)
    assert choose([(slow, base), (fast, near)]) == (fast, near)
    assert choose([(slow, base), (fast, far)]) == (slow, base)
    assert choose([(slow, base), (fast, failed)]) == (slow, base)
    assert choose([(fast, failed)]) is None
    measured = replace(near, speed={"tg128": {"median_ts": 1.0}})
    quick = replace(base, speed={"tg128": {"median_ts": 2.0}})
    assert choose([(slow, quick), (fast, measured)]) == (slow, quick), "measured speed goes before predicted"


def test_only_the_least_pruned_of_a_target_is_measured(wide: Path) -> None:
    budget = speed_between(wide, 0.2, "Q8_0", 64)
    proposal = propose("m", Checkpoint(wide).shape, load_profile("rpi5"), budget, default_targets(), ratios=RATIOS)
    for candidate in proposal.to_measure:
        less = [
            c
            for c in proposal.candidates
            if (c.target, c.plan.scope) == (candidate.target, candidate.plan.scope)
            and c.plan.reached_ratio < candidate.plan.reached_ratio
        ]
        assert candidate.fits and not any(c.fits for c in less)
    two = worth_measuring(proposal.candidates, 2)
    assert {c.target.runtime for c in two} == {"llamacpp", "onnxruntime"}


def test_dense_is_measured_for_comparison_where_it_fits_nowhere(wide: Path) -> None:
    budget = speed_between(wide, 0.3, "Q8_0", 64)
    proposal = propose("m", Checkpoint(wide).shape, load_profile("rpi5"), budget, [target_for("Q8_0")], ratios=RATIOS)
    *fitting, dense = proposal.to_measure
    assert fitting and all(c.fits and not c.dense for c in fitting)
    assert dense.dense and not dense.fits


def test_plans_are_made_where_the_least_is_to_be_lost(tiny_folder: Path) -> None:
    shape, profile = Checkpoint(tiny_folder).shape, load_profile("rpi5")

    def of(target: str, damage: float) -> Candidate:
        plan = WidthPlan(shape.layers, "obs", 0.2, 0.2, damage)
        return candidate_of(plan, shape, target_for(target), profile, Budget(context=64))

    good, fair, bad, useless = of("Q8_0", 0.1), of("Q4_0", 0.1), of("Q6_K", 0.9), of("int8", 2.0)
    rounding = {str(c.target): kl for c, kl in ((good, 0.1), (fair, 0.11), (bad, 0.0), (useless, 0.0))}
    assert worth_making([bad, fair, good, useless], rounding, 2) == [good, fair]
    other = of("int8", 0.5)
    assert worth_making([bad, fair, good, other], rounding, 2) == [good, fair, other]  # an app may need that runtime
    assert worth_making([bad, fair, good, other], rounding, 2, best=0.205) == [good]
    assert worth_making([bad, good], rounding, 2) == [good]  # what is far behind will not come first
    assert worth_making([useless], rounding, 2) == [useless]  # there is nothing else


def test_where_the_device_is_at_hand_doubt_is_measured(wide: Path) -> None:
    budget = speed_between(wide, 0.3, "Q8_0", 64)
    profile = load_profile("rpi5")
    here = profile.model_copy(update={"name": "host"})
    far, near = (
        propose("m", Checkpoint(wide).shape, p, budget, [target_for("Q8_0")], ratios=RATIOS) for p in (profile, here)
    )
    assert all(c.fits for c in far.to_measure[:-1])
    assert any(c.doubtful and c.dense for c in near.to_measure), "the interval reaches far beyond the budget"
    assert {c.name for c in far.to_measure} <= {c.name for c in near.to_measure}


def test_what_is_measured_goes_before_what_is_predicted() -> None:
    budget = Budget(min_tokens_per_s=100, max_memory_mib=50, max_file_mib=1, context=64)
    files = {"f": {"sha256": "0", "bytes": 1 << 20}}
    test = {"median_ts": 120.0, "peak_mib": 40.0}
    good = Trial("k", "c", "ok", None, quality([0.1, 0.2]), {"pp512": test, "tg128": test}, files)
    assert judge_measured(good, budget) == ()
    bad = replace(
        good,
        speed={"pp512": {**test, "peak_mib": 60.0}, "tg128": {**test, "median_ts": 80.0}},
        files={"f": {"sha256": "0", "bytes": 3 << 20}},
    )
    speed, memory, size = judge_measured(bad, budget)
    assert "measured 80.0" in speed and "measured 60" in memory and "measured 3.0" in size
    # A GPU's own memory is what the driver tells, where one does.
    told = {"pp512": {**test, "peak_gpu_mib": 60.0}, "tg128": {**test, "peak_gpu_mib": None}}
    assert judge_measured(replace(good, speed=told), budget) == ()
    assert "measured 60" in judge_measured(replace(good, speed=told), budget, dedicated=True)[0]


def test_nearest_miss_breaks_the_fewest_limits(wide: Path) -> None:
    shape, profile = Checkpoint(wide).shape, load_profile("rpi5")
    budget = Budget(min_tokens_per_s=1e8, max_memory_mib=1, max_file_mib=0.3, context=64)

    def plan_for(ratio: float, align: int, scope: Scope) -> PrunePlan:
        return (
            propose("m", shape, profile, Budget(context=64), [target_for("Q8_0")], ratios=(ratio,)).candidates[-1].plan
        )

    candidates = candidates_for(shape, plan_for, [target_for("Q8_0")], profile, budget, ratios=RATIOS)
    miss = nearest_miss(candidates)
    assert len(miss.reasons) == min(len(c.reasons) for c in candidates)


def test_trials_survive_a_torn_line(tmp_path: Path) -> None:
    log = tmp_path / "trials.jsonl"
    one = Trial("a", "c1", "ok", None, quality([0.1, 0.2]), {}, {"f": {"sha256": "0", "bytes": 1}}, 1.0)
    append_trial(log, one)
    with log.open("ab") as file:
        file.write(b'{"schema_version": 1, "key": "b", "cand')
    assert read_trials(log) == {"a": one}
    append_trial(log, replace(one, key="c"))
    assert list(read_trials(log)) == ["a", "c"]
    with log.open("a") as file:
        file.write('{"schema_version": 99}\n')
    with pytest.raises(BadInput, match="line 4"):
        read_trials(log)
    assert list(read_trials(log, others=True)) == ["a", "c"]


def test_pareto_front() -> None:
    assert pareto_front([(1, 1), (2, 0.5), (3, 2), (0.5, 0.1), (2.5, 3)]) == [2, 1, 3]


@pytest.mark.demo
def test_fit_on_the_demo_model(tmp_path: Path, demo_gguf: Path) -> None:
    """The real model, a real budget: dense does not fit, the choice does, and llama.cpp continues a sentence."""
    budget = Budget(min_tokens_per_s=125, context=512)
    result = fit(demo_gguf, "rpi5", budget, out=tmp_path / "run", targets=["Q4_0"])
    assert not result.chosen.dense and result.trial.quality is not None
    assert 0.05 < result.trial.quality.kl_nats.mean < 6
    assert result.chosen.plan.reached_ratio == pytest.approx(result.chosen.plan.asked_ratio, abs=0.0124)
    llama = llama_cpp.Llama(str(result.best / "model.gguf"), n_ctx=64, verbose=False)
    answer = llama("The capital of France is", max_tokens=8, temperature=0.0)
    assert answer["choices"][0]["text"].strip()


def test_every_model_has_a_run_of_its_own(tmp_path: Path) -> None:
    from edgeprune.fitting import _plain

    (tmp_path / "small.v1.gguf").touch()
    assert _plain(str(tmp_path / "small.v1.gguf")) == "small.v1" and _plain(str(tmp_path)) == tmp_path.name
    names = {_plain(f"{owner}/Qwen2.5-0.5B{kind}") for owner in ("Qwen", "other") for kind in ("", "-Instruct")}
    assert len(names) == 4 and not any("/" in name for name in names) and _plain("demo") == "demo"


def test_trials_survive_any_text_in_them_and_refuse_what_is_none(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    append_trial(path, Trial("k", "c", "failed", "two\u2028lines\x85in one", None))
    with path.open("a") as file:
        file.write("[" * 100_000 + "\n")  # torn, or hostile
    assert read_trials(path)["k"].reason == "two\u2028lines\x85in one"
    with path.open("a") as file:
        file.write(json.dumps(Trial("k", "c", "ok", None, None).to_json() | {"key": [1]}) + "\n")
    with pytest.raises(BadInput, match="line 3 is not a trial"):
        read_trials(path)


@pytest.mark.parametrize("fits", [True, False])
def test_where_every_measurement_fails_that_is_what_is_told(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fits: bool
) -> None:
    def crash(path: Path, *_args: Any, **_kwargs: Any) -> Quality:
        raise StageFailed("crash: SIGILL", where=path)

    monkeypatch.setattr("edgeprune.workshop.evaluate", crash)
    budget = Budget(context=64) if fits else speed_between(wide, 0.2, "Q8_0", 64)
    with pytest.raises(StageFailed, match=r"no candidate could be chosen .*SIGILL"):
        run(wide, tmp_path / "run", budget, targets=["Q8_0"])


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"held_out": "nowhere.txt"}, "--held-out: no file nowhere.txt"),
        ({"calibration": "nowhere.txt"}, "--calibration: no file nowhere.txt"),
        ({"calibration": "data/texts.txt"}, "--calibration: no file data/texts.txt"),
        ({"calibration": "TABLE"}, "table.csv: a table, not text"),
        ({"calibration": "WEIGHED", "recovery_s": 5.0}, "weight"),
    ],
)
def test_texts_are_looked_at_before_the_work(
    wide: Path, tmp_path: Path, options: dict[str, Any], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weighed = tmp_path / "weighed.jsonl"
    weighed.write_text('{"text": "some text", "weight": 0}\n')
    table = tmp_path / "table.csv"
    table.write_text("label,text\n1,some text\n")
    files = {"WEIGHED": str(weighed), "TABLE": str(table)}
    options = {key: files.get(value, value) for key, value in options.items()}
    profile = load_profile("rpi5")
    with pytest.raises(BadInput, match=where):
        prepare(wide, profile, Budget(context=64), FitOptions(**options))


def test_a_context_beyond_what_a_runtime_computes_is_told(tmp_path: Path) -> None:
    """llama.cpp knows no window in a LLaMA's architecture: beyond it another model would run."""
    folder = save_tiny(tmp_path / "model", "mistral-window")
    window = Checkpoint(folder).shape.narrowest_window
    assert window is not None
    options, profile = FitOptions(targets=(target_for("Q8_0"),)), load_profile("rpi5")
    with pytest.raises(BadInput, match=f"beyond {window} tokens llamacpp computes another model.*--context {window}"):
        prepare(folder, profile, Budget(context=window + 1), options)
    prepare(folder, profile, Budget(context=window), options)
    prepare(folder, profile, Budget(context=window + 1), replace(options, targets=(target_for("int8"),)))


def test_a_text_too_short_to_judge_on_is_told_before_any_is_written(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(*_: Any, **__: Any) -> None:
        raise AssertionError("calibration text is written")

    monkeypatch.setattr("edgeprune.fit_texts.text_set", written)
    text = tmp_path / "text.txt"
    text.write_text(SENTENCES[0])
    with pytest.raises(BadInput, match=r"--held-out .*text.txt: the text has \d+ tokens, and 96 are judged on"):
        run(wide, tmp_path / "run", Budget(context=64), targets=["Q8_0"], held_out=str(text))


def test_recovery_does_not_begin_when_the_time_is_over(wide: Path, tmp_path: Path) -> None:
    result = run(
        wide, tmp_path / "run", speed_between(wide, 0.3, "Q8_0", 64), targets=["Q8_0"], recovery_s=5.0, max_time_s=0.001
    )
    assert not any(candidate.recovery_s for candidate, _ in result.trials)
    record = read_json(tmp_path / "run" / "fit.json")
    assert record["stopped_early"] and "--max-time" in record["commands"]["again"]
