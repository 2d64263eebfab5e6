"""What a model says to a few questions, greedily: shown for the dense model and the chosen file side by side, and kept
as the proof of what a file says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from edgeprune.chat import SOME_DAY, Render, renderer
from edgeprune.errors import BadInput, StageFailed
from edgeprune.files import cache_dir, read_json, write_json
from edgeprune.models import companions_hash
from edgeprune.runtimes import open_runtime
from edgeprune.runtimes.base import begun, generate
from edgeprune.runtimes.isolate import run_isolated

QUESTIONS = (
    "Why is the sky blue? Answer in two sentences.",
    "Write a short thank-you note to a neighbour who fed the cat.",
    "Name three things to pack for a day at the sea.",
)
N_TOKENS = 64
TIMEOUT_S = 900.0


def answers(
    path: str, runtime: str, prompts: Sequence[str], n_new: int, n_ctx: int, stop: Sequence[int], threads: int
) -> list[dict[str, Any]]:
    """In a process of its own: the greedy answer to each prompt, of at most `n_new` tokens, in `n_ctx` at most.

    Raises:
        StageFailed: the tokenizer makes nothing of a prompt.
    """
    # How many tokens a prompt has is not known before there is a tokenizer; a token has at least one byte.
    n_ctx = min(n_ctx, max(len(prompt.encode()) for prompt in prompts) + n_new)
    found = []
    with closing(open_runtime(Path(path), n_ctx=n_ctx, threads=threads, name=runtime)) as model:
        for prompt in prompts:
            prompt_tokens = begun(model, model.encode(prompt, parse_special=True))[: max(1, n_ctx - n_new)]
            if not prompt_tokens:
                raise StageFailed("the tokenizer makes nothing of the prompt", where=path)
            tokens = list(generate(model, prompt_tokens, n_new, stop=stop))
            found.append({"prompt_tokens": prompt_tokens, "tokens": tokens, "text": model.decode(tokens)})
    return found


def choices(path: str, runtime: str, prompt_tokens: Sequence[int], tokens: Sequence[int], threads: int) -> list[int]:
    """In a process of its own: what the file would say after the prompt, and after each of the stored tokens."""
    n_ctx = len(prompt_tokens) + len(tokens)
    with closing(open_runtime(Path(path), n_ctx=n_ctx, threads=threads, name=runtime)) as model:
        logits = model.forward(prompt_tokens, last_only=True)
        found = [int(logits[-1].argmax())]
        for token in tokens[:-1]:
            found.append(int(model.forward([token], last_only=True)[-1].argmax()))
    return found


def ask(
    path: Path,
    runtime: str,
    prompts: Sequence[str],
    *,
    n_new: int,
    n_ctx: int,
    stop: Sequence[int],
    threads: int,
) -> list[dict[str, Any]]:
    """`answers` in a process of its own; `n_new` is at most half of `n_ctx`.

    Raises:
        BadInput, StageFailed: it does not load, or says nothing.
    """
    arguments = {
        "path": str(path),
        "runtime": runtime,
        "prompts": list(prompts),
        "n_new": min(n_new, n_ctx // 2),
        "n_ctx": n_ctx,
        "stop": list(stop),
        "threads": threads,
    }
    done = run_isolated("edgeprune.samples:answers", arguments, timeout_s=TIMEOUT_S)
    if done.status != "ok":
        raise StageFailed(f"{done.status}: {done.reason}", where=path)
    found: list[dict[str, Any]] = done.value
    return found


def prompts_for(folder: Path, questions: Sequence[str] = QUESTIONS) -> list[str]:
    """The questions as the chat template of a tokenizer's folder puts them; plain where it has none or takes none."""
    render: Render | None = renderer(folder, SOME_DAY)
    if render is None:
        return list(questions)
    try:
        return [render([{"role": "user", "content": question}], True) for question in questions]
    except BadInput:
        return list(questions)


def dense_answers(
    source: Path, model_hash: str, prompts: Sequence[str], *, n_ctx: int, stop: Sequence[int], threads: int
) -> list[str]:
    """What the dense checkpoint says; cached by model and prompts."""
    depends = [model_hash, companions_hash(source), list(prompts), N_TOKENS, min(n_ctx, 2 * N_TOKENS)]
    key = hashlib.sha256(json.dumps(depends).encode())
    path = cache_dir() / "samples" / f"{key.hexdigest()[:24]}.json"
    if path.exists():
        return [str(text) for text in read_json(path)["texts"]]
    said = ask(source, "pytorch", prompts, n_new=N_TOKENS, n_ctx=n_ctx, stop=stop, threads=threads)
    texts = [str(each["text"]) for each in said]
    write_json(path, {"prompts": list(prompts), "texts": texts})
    return texts


def side_by_side(
    source: Path,
    model_hash: str,
    chosen: Path,
    runtime: str,
    *,
    n_ctx: int,
    stop: Sequence[int],
    stop_chosen: Sequence[int],
    threads: int,
) -> list[dict[str, str]]:
    """What the dense checkpoint and a file made of it say to `QUESTIONS`, question by question.

    Args:
        source: the dense checkpoint; its chat template puts the questions.
        model_hash: its identity.
        chosen: the file or folder.
        runtime: what runs that.
        n_ctx: the context that answers must fit in.
        stop: ids of the tokens that end an answer of the dense model.
        stop_chosen: the same of the file, which may number its tokens anew.
        threads: of both.

    Raises:
        StageFailed: one of them does not load, or says nothing.
    """
    prompts = prompts_for(source)
    dense = dense_answers(source, model_hash, prompts, n_ctx=n_ctx, stop=stop, threads=threads)
    found = ask(chosen, runtime, prompts, n_new=N_TOKENS, n_ctx=n_ctx, stop=stop_chosen, threads=threads)
    said = [str(each["text"]) for each in found]
    return [
        {"question": question, "dense": a, "chosen": b} for question, a, b in zip(QUESTIONS, dense, said, strict=True)
    ]
