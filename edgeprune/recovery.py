"""`recover`: trains what pruning damaged, for as long as the user gives.

A pruned model learns the dense model's distributions over ordinary text ("distil"), or low-rank updates on
instructions as AMP's authors did ("lora"). Text -> windows -> the teacher's records -> steps -> the best weights,
written back into the folder's own layout. State is kept beside the result, so an interrupted run goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import BadInput, StageFailed, missing_extra, unknown
from edgeprune.files import atomic_folder, cache_dir, only_writer, result_folder, write_json
from edgeprune.packing import Windows, evenly, hold_out, order, pack
from edgeprune.passes import Passes
from edgeprune.recipe import RECIPES, Method, Recipe, RecoveryResult, peak_rate
from edgeprune.recovery_inputs import (
    check_length,
    longest_window,
    own_text,
    same_vocabulary,
    shared_tokenizer,
    usual_recipe,
)
from edgeprune.recovery_state import Held, State, restore, save
from edgeprune.runtimes.pytorch import load_model
from edgeprune.teacher import TeacherCache
from edgeprune.trainee import Trainee
from edgeprune.training import Clock, Decoder, Learner, MasterAdamW, number_format, rate_share

SCHEMA_VERSION = 1
RECORD = "recovery.json"
STATE = "state.safetensors"
_LOG_STEPS = 10  # steps that one entry of the history stands for
_MOST_SKIPPED = 10  # steps in a row without a finite gradient before a run is given up

Progress = Callable[[str, int, int], None]


def recover(
    student: str | Path,
    teacher: str | Path,
    out: str | Path,
    *,
    seconds: float,
    text: Sequence[str] | None = None,
    weights: Sequence[float] | None = None,
    held_out: Sequence[str] | None = None,
    method: Method = "distil",
    recipe: Recipe | None = None,
    shorten: bool | None = None,
    seed: int = 0,
    resume: bool = True,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> RecoveryResult:
    """Train the pruned model in the folder `student` for about `seconds` and write it to `out`.

    The time counts from the call to the last step; judging the result and writing it come on top (seconds for a small
    model). Under a launcher of `accelerate` every process calls this alike; the steps' windows are shared out.

    Args:
        student: a checkpoint folder.
        teacher: the dense model's folder. Where the student has lost tokens, the teacher loses the same ones first.
        out: the folder to write: the student's own, with other weights, and `recovery.json`.
        seconds: how long to train.
        text: what to train on; None lets the teacher write it.
        weights: what each text counts for in the loss; None: all alike.
        held_out: text to judge on, by which the best weights are known; None: some windows of `text` are not trained
            on, but judged.
        method: which of `RECIPES`.
        recipe: replaces the method's.
        shorten: whether windows become shorter where there is little text; None: unless a recipe is given.
        seed: of the order of the windows, of dropout, and of text that the teacher writes.
        resume: go on from what an interrupted run of the same arguments left in `out`.partial.
        cache: where the teacher's records are kept; None: the user's cache.
        progress: called with (stage, done, total).

    Raises:
        BadInput: models or vocabularies that do not fit, too little text, a full disk.
        StageFailed: gradients that stay infinite, or a launcher's way of sharing that is not supported.
    """
    if method not in RECIPES:
        raise unknown("method", method, RECIPES)
    if not seconds > 0:
        raise BadInput(f"{seconds} seconds leave no time to train", where="--time", remedy="for example 20m")
    student, teacher, out = Path(student), Path(teacher), result_folder(Path(out), RECORD)
    shorten = recipe is None if shorten is None else shorten
    recipe = recipe or usual_recipe(method, student, teacher)
    clock = Clock()
    say = progress or (lambda _stage, _done, _total: None)
    accelerator = _accelerator()
    cache = cache or cache_dir()
    with accelerator.main_process_first():
        if text is None:
            text = own_text(teacher, seconds, seed, say)
        teacher = same_vocabulary(student, teacher, cache, say)
    tokenizer = shared_tokenizer(student, teacher, text)
    check_length(student, teacher, recipe.length)
    say("packing the text", 0, 0)
    if shorten and (most := longest_window(text, tokenizer, recipe.length)) < recipe.length:
        recipe = recipe.with_length(most)
        say(f"windows of {most} tokens: the text is short", 0, 0)
    windows = pack(text, tokenizer, recipe.length, weights)
    training, held = hold_out(len(windows), recipe.held_out)
    if held_out is not None:
        ids = pack(held_out, tokenizer, recipe.length, where="--held-out").ids
        judged = Windows(ids[evenly(len(ids), recipe.held_out)])
        training, held = torch.arange(len(windows)), torch.arange(len(judged)) + len(windows)
        windows = windows.and_held_out(judged)
    run = _Run(student, teacher, out, windows, training, held, recipe, seed, seconds, accelerator, clock, cache, say)
    try:
        with only_writer(out) if accelerator.is_main_process else contextlib.nullcontext():
            return run.all(method, resume)
    finally:
        run.passes.close()
        run.records.close()


class _Run:
    """One recovery: what its steps share."""

    def __init__(
        self,
        student: Path,
        teacher: Path,
        out: Path,
        windows: Windows,
        training: Tensor,
        held: Tensor,
        recipe: Recipe,
        seed: int,
        seconds: float,
        accelerator: Any,
        clock: Clock,
        cache: Path,
        say: Progress,
    ) -> None:
        self.recipe, self.windows, self.seed, self.seconds, self.out = recipe, windows, seed, seconds, out
        self.accelerator, self.clock, self.say = accelerator, clock, say
        self.partial = result_folder(out.with_name(f"{out.name}.partial"), STATE)  # it is removed at the end
        self.training, self.held = training, held
        device: torch.device = accelerator.device
        dtype = number_format(device)
        processes = accelerator.num_processes
        self.batch = -(-recipe.batch // processes) * processes
        self.most = max(1, recipe.micro_tokens // recipe.length)  # windows at once
        dense = Checkpoint(teacher)
        identity = dense.hash()
        self.records = TeacherCache(
            cache / "teachers",
            lambda: Decoder(load_model(teacher).to(device), dtype, recipe.length),
            identity,
            windows,
            n_vocab=dense.shape.vocab,
            k=recipe.top_k,
            dtype=dtype,
            batch=self.most,
        )
        room = self.records.most_bytes / (1 << 20)
        size = f"at most {room:.0f} MiB ({self.records.bytes_per_token:.0f} bytes a token)"
        say(f"teacher's records in {self.records.folder}: {size}", 0, 0)
        say("loading the student", 0, 0)
        torch.manual_seed(seed)  # of the adapters' first values and of dropout
        self.trainee = Trainee(
            student,
            dtype=dtype,
            device=device,
            length=recipe.length,
            low_rank=recipe.low_rank,
            train_embedding=recipe.train_embedding,
        )
        self.learner = Learner(self.trainee.decoder, recipe.mix)
        self.optimizer = MasterAdamW(
            self.trainee.masters, self.trainee.parameters, betas=recipe.betas, decay=recipe.decay
        )
        self.passes = Passes(
            self.learner,
            list(self.trainee.parameters.values()),
            windows,
            None if recipe.mix.kl == 0 else self.records,
            self.most,
            accelerator.prepare(self.learner) if processes > 1 else None,
        )
        shares = [len(training), windows.weights_hash]
        parts = [
            SCHEMA_VERSION,
            Checkpoint(student).hash(),
            identity,
            windows.hash,
            shares,
            asdict(recipe),
            seed,
            seconds,
            str(dtype),
        ]
        self.state = State(hashlib.sha256(json.dumps(parts).encode()).hexdigest())
        self.best: dict[str, Tensor] = {}
        self.saved_at = 0.0
        self.sums: list[Tensor] = []  # (loss, KL, cross-entropy) of each step since the last entry of the history

    def all(self, method: str, resume: bool) -> RecoveryResult:
        """The run from wherever it stands to the folder written."""
        if not resume:  # or an interrupt before the first checkpoint would bring it back
            (self.partial / STATE).unlink(missing_ok=True)
        elif (found := restore(self.partial / STATE, self.state.key)) is not None:
            self.state, tensors, best = found
            self.optimizer.restore(tensors)
            self.best = best or self._copy()
            self.clock.rewind(self.state.elapsed)
        if self.state.before is None:
            self.state.before = self.state.best = self._judge()
            self.best = self._copy()
        self.saved_at = self._elapsed()
        if self.state.began is None:
            self.state.began = self.saved_at
        while self._progress() < 1:
            self._step()
            if self._elapsed() - self.saved_at >= self.recipe.checkpoint_s:
                self._checkpoint()
        if self.state.steps == 0:
            raise BadInput("the time was over before the first step", where="--time", remedy="give more")
        self._keep_if_best()
        return self._finish(method)

    def _elapsed(self) -> float:
        """Seconds so far, the same in every process: each must take the same decisions."""
        return _agreed(self.clock.elapsed, self.accelerator)

    def _progress(self) -> float:
        """The share of the run that is over."""
        most = self.recipe.max_steps
        return self._elapsed() / self.seconds if most is None else self.state.steps / most

    def _rate(self) -> float:
        progress = self._progress()
        if self.recipe.max_steps is None:
            # Of the time for steps: writing text and judging come before, and are no part of the warm-up.
            began = cast("float", self.state.began)
            progress = (self._elapsed() - began) / max(self.seconds - began, 1e-9)
        # How many steps there will be is known from how long the ones so far took.
        expected = self.recipe.max_steps or (self.state.steps + 1) / max(progress, 1e-3)
        return (self.recipe.rate or peak_rate(expected, cast("Held", self.state.before).kl)) * rate_share(
            progress, self.recipe.warmup
        )

    def _step(self) -> None:
        started = time.perf_counter()
        state, recipe = self.state, self.recipe
        rate = self._rate()
        chosen = order(self.training, state.position, self.batch, self.seed)
        mine = chosen[self.accelerator.process_index :: self.accelerator.num_processes]
        taught = self.records.seconds
        figures = self.passes(mine, self.optimizer)
        finite = math.isfinite(self.optimizer.step(rate, recipe.clip))
        state.steps += 1
        state.position += self.batch
        state.tokens += self.batch * recipe.length
        state.training_s += time.perf_counter() - started
        state.teacher_s += (self.records.seconds - taught) / self.passes.workers
        self._count_skipped(finite)
        if finite:
            self.sums.append(figures)
        if state.steps % _LOG_STEPS == 0:
            self._log()
        if recipe.max_steps is None:
            self.say("training (seconds)", min(round(self.clock.elapsed), round(self.seconds)), round(self.seconds))
        else:
            self.say("training (steps)", state.steps, recipe.max_steps)

    def _count_skipped(self, finite: bool) -> None:
        state = self.state
        state.skipped_in_a_row = 0 if finite else state.skipped_in_a_row + 1
        state.skipped += not finite
        if state.skipped_in_a_row >= _MOST_SKIPPED:
            raise StageFailed(
                f"the gradients of {_MOST_SKIPPED} steps in a row are not finite (to step {state.steps})",
                remedy="use a lower learning rate, or look at the student with `edgeprune eval`",
            )

    def _log(self) -> None:
        """Put the mean of the steps since the last entry into the history."""
        if self.sums:
            means = torch.stack(self.sums).mean(dim=0).tolist()
            entry = {"step": self.state.steps, "seconds": round(self.clock.elapsed, 2)}
            self.state.history.append(entry | dict(zip(("loss", "kl", "ce"), means, strict=True)))
            self.sums.clear()

    def _judge(self) -> Held:
        """The student on the held-out windows."""
        kl = ce = 0.0
        device = self.accelerator.device
        for part in torch.split(self.held, self.most):
            sums = self.learner.judge(self.windows.ids[part].to(device), self.records.get(part).to(device))
            kl, ce = kl + sums[0], ce + sums[1]
        n = len(self.held) * self.windows.length
        entry = {"step": self.state.steps, "seconds": round(self.clock.elapsed, 2)}
        self.state.history.append(entry | {"held_out_kl": kl / n, "held_out_ce": ce / n})
        return Held(kl / n, ce / n)

    def _keep_if_best(self) -> None:
        self._log()
        held, best, mix = self._judge(), self.state.best, self.recipe.mix
        # By what is trained: where little was pruned, cross-entropy falls by more than the KL rises.
        if best is None or mix.of(held.kl, held.ce) < mix.of(best.kl, best.ce):
            self.state.best, self.state.best_step, self.best = held, self.state.steps, self._copy()

    def _checkpoint(self) -> None:
        self._keep_if_best()
        self.state.elapsed = self._elapsed()
        if self.accelerator.is_main_process:
            best = None if self.state.best_step == self.state.steps else self.best
            save(self.partial / STATE, self.state, self.optimizer.state(), best)
        self.accelerator.wait_for_everyone()
        self.saved_at = self._elapsed()

    def _copy(self) -> dict[str, Tensor]:
        return {name: value.detach().to("cpu", copy=True) for name, value in self.optimizer.masters.items()}

    def _finish(self, method: str) -> RecoveryResult:
        state = self.state
        result = RecoveryResult(
            out=self.out,
            method=method,
            steps=state.steps,
            tokens=state.tokens,
            seconds=self.clock.elapsed,
            tokens_per_s=state.tokens / state.training_s,
            teacher_s=state.teacher_s,
            skipped=state.skipped,
            before=cast("Held", state.before),
            after=cast("Held", state.best),
            best_step=state.best_step,
            cache=self.records.folder,
            cache_mib=self.records.bytes_on_disk / (1 << 20),
            history=tuple(state.history),
        )
        if self.accelerator.is_main_process:
            self.say("writing the checkpoint", 0, 0)
            with atomic_folder(self.out) as temporary:
                self.trainee.write(self.best, temporary)
                settings = {"schema_version": SCHEMA_VERSION, "recipe": asdict(self.recipe), "seed": self.seed}
                write_json(temporary / RECORD, settings | {"result": result.to_json()})
            shutil.rmtree(self.partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        return result


def is_main_process() -> bool:
    """Whether this is the process of a launcher's that tells what came of a recovery."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


def _accelerator() -> Any:
    try:
        from accelerate import Accelerator
        from accelerate.utils import DistributedType, InitProcessGroupKwargs
    except ImportError as error:
        raise missing_extra("accelerate", "recover") from error
    # Others wait while one writes text for a fifth of the time; the libraries give up after 10 or 30 minutes.
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))])
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise StageFailed(
            f"a model split over devices ({accelerator.distributed_type.value}) is not supported",
            remedy="launch it with a copy of the model on each device: accelerate launch --multi_gpu",
        )
    return accelerator


def _agreed(value: float, accelerator: Any) -> float:
    """The first process's value."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast

    return float(broadcast(torch.tensor(value, dtype=torch.float64, device=accelerator.device)))
