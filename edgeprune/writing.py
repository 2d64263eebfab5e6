"""What a model writes: texts sampled side by side, and batches of them that outlast an interrupt."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from edgeprune.attention import GROUPED, attention, cache_for
from edgeprune.files import read_json, write_json
from edgeprune.models import Model
from edgeprune.runtimes.pytorch import bos_of

ROWS = 48  # texts written side by side: one read of the weights serves them all
Item = TypeVar("Item")
Progress = Callable[[int, int], None]


def in_batches(
    path: Path,
    wanted: int,
    generator: torch.Generator,
    write: Callable[[int], list[Item]],
    progress: Progress | None,
    *,
    seconds: float | None = None,
) -> list[Item]:
    """`wanted` items, `ROWS` at a time, kept in `path`: a run that was interrupted goes on, to the same items.

    Args:
        path: whose name tells all that the items depend on; the caller removes it.
        generator: all that is random in `write`.
        write: makes so many items, which JSON can hold.
        progress: told (written, wanted) after each batch.
        seconds: where writing would take longer than this, there are fewer items, but those of one batch at least.
    """
    written: list[Item] = []
    if path.exists():
        kept = read_json(path)
        written = kept["written"]
        generator.set_state(torch.frombuffer(bytearray.fromhex(kept["generator"]), dtype=torch.uint8))
    began, before, most = time.monotonic(), len(written), wanted
    while len(written) < wanted:
        written += write(min(ROWS, wanted - len(written)))
        write_json(path, {"generator": bytes(generator.get_state().tolist()).hex(), "written": written})
        if seconds is not None:  # as many whole batches as go into it at this pace
            each = (time.monotonic() - began) / (len(written) - before)
            wanted = min(most, max(len(written), before + int(seconds / each) // ROWS * ROWS))
        if progress:
            progress(min(len(written), wanted), wanted)
    return written[:wanted]


def start_words(tokenizer: Any) -> torch.Tensor:
    """Ids of tokens that begin a word of three letters or more: what a text may start with."""
    special = set(tokenizer.all_special_ids)
    ids = [
        i
        for token, i in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        if i not in special and token[:1] in "Ġ▁" and token[1:].isalpha() and len(token) > 3
    ]
    # A vocabulary without word marks (a byte-level toy) still has ids to start from.
    return torch.tensor(ids or [i for i in range(len(tokenizer)) if i not in special])


def sample(logits: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """One id a row by the inverse of the cumulative distribution, which is several times as quick as multinomial.

    Args:
        logits: (rows, vocabulary), float32; -inf for what cannot be drawn.

    Returns:
        The ids, (rows, 1), int64, and their negative log-likelihoods, nats, (rows, 1), float64.
    """
    probs = logits.double().softmax(dim=-1)
    cumulative = probs.cumsum(dim=-1)
    # In (0, 1]: an id of probability 0 is never the first whose cumulative probability reaches it.
    drawn = 1.0 - torch.rand(len(logits), 1, generator=generator, dtype=torch.float64)
    ids = torch.searchsorted(cumulative, drawn * cumulative[:, -1:])
    return ids, -probs.gather(-1, ids).log()


@torch.inference_mode()
def continued(
    model: Model, writer: Any, tokens: torch.Tensor, length: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts that begin with `tokens`, (rows, begun), sampled at temperature 1; BOS before them is not told.

    Args:
        model: whose tokenizer says which tokens are special: they are not drawn, so a text goes on to its length.
        writer: the module that writes, `fast_copy` of the model's.
        length: tokens of a text, the first ones among them.

    Returns:
        The texts, (rows, length), and the mean negative log-likelihood of each one's drawn tokens, nats, (rows,).
    """
    banned = special_ids(model.tokenizer)
    cache, step, written, nlls = cache_for(writer, length + 1), with_bos(model.tokenizer, tokens), [tokens], []
    with attention(writer, GROUPED):
        for _ in range(length - tokens.shape[1]):
            step, nll = sample(next_logits(writer, step, cache, banned), generator)
            written.append(step)
            nlls.append(nll)
    return torch.cat(written, dim=1), torch.cat(nlls, dim=1).mean(dim=1)


@torch.inference_mode()
def lines_after(
    model: Model, writer: Any, prompt: torch.Tensor, rows: int, most: int, generator: torch.Generator
) -> list[str]:
    """What the model writes after `prompt` up to the end of the line, `rows` times, sampled as in `continued`.

    The prompt is read once for all, and a line that has ended is written no further.

    Args:
        prompt: token ids, (length,).
        most: tokens of a line; a longer one is cut.

    Returns:
        The lines without space around them; one of space alone is empty.
    """
    tokenizer = model.tokenizer
    special, ends = special_ids(tokenizer), line_ends(tokenizer)
    cache = cache_for(writer, len(prompt) + 1 + most)
    lines: list[list[int]] = [[] for _ in range(rows)]
    writing = list(range(rows))  # the lines that the cache's rows are
    with attention(writer, GROUPED):
        logits = next_logits(writer, with_bos(tokenizer, prompt[None]), cache, torch.cat([special, ends]))
        cache.batch_select_indices(torch.zeros(rows, dtype=torch.int64))
        logits = logits.expand(rows, -1)
        for _ in range(most):
            step, _ = sample(logits, generator)
            going = ~torch.isin(step[:, 0], ends)
            if not going.all():
                stay = going.nonzero()[:, 0]
                if not len(stay):
                    break
                cache.batch_select_indices(stay)
                step, writing = step[stay], [writing[i] for i in stay.tolist()]
            for line, token in zip(writing, step[:, 0].tolist(), strict=True):
                lines[line].append(token)
            logits = next_logits(writer, step, cache, special)
    return [tokenizer.decode(line).strip() for line in lines]


def special_ids(tokenizer: Any) -> torch.Tensor:
    """Tokens that no text has, int64."""
    return torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.int64)


def line_ends(tokenizer: Any) -> torch.Tensor:
    """Tokens with a line break in them, int64."""
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return torch.tensor([i for i, text in enumerate(texts) if "\n" in text], dtype=torch.int64)


def with_bos(tokenizer: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens, (rows, length), after BOS where the model was never without."""
    bos = bos_of(tokenizer)
    return tokens if bos is None else torch.cat([tokens.new_full((len(tokens), 1), bos), tokens], dim=1)


def next_logits(writer: Any, tokens: torch.Tensor, cache: Any, banned: torch.Tensor) -> torch.Tensor:
    """Logits after the next tokens, (rows, length) -> (rows, vocabulary), float32; -inf for what is banned."""
    logits = writer(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
    logits[:, banned] = -torch.inf
    return torch.as_tensor(logits)
