"""Conversations as text: what a chat template makes of them, and the same said by parts, without a template engine."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import psutil

from edgeprune.errors import BadInput

Message = Mapping[str, str]  # "role" and "content"
Render = Callable[[Sequence[Message], bool], str]  # (messages, whether an answer is to follow) -> text

RENDER_S = 10.0  # a conversation takes milliseconds
RENDER_BYTES = 1 << 30  # and some kilobytes
# The day that Llama 3.1's and 3.2's templates name where nothing tells them the date.
SOME_DAY = date(2024, 7, 26)

# Conversations in which every part occurs, and that a template given by parts must render as the original does.
TRIALS: tuple[tuple[Message, ...], ...] = (
    ({"role": "user", "content": "How deep is the harbour?"},),
    (
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Good morning! How can I help?"},
        {"role": "user", "content": 'Say "{{ .System }}" in\nthree words: é, 雨, 🙂.'},
    ),
    (
        {"role": "system", "content": "Answer in one line."},
        {"role": "user", "content": "Why is the sky blue?"},
    ),
    (
        {"role": "system", "content": "You are a pilot."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three"},
        {"role": "assistant", "content": "Four"},
        {"role": "user", "content": "Five"},
    ),
)


def renderer(folder: Path, today: date | None = None) -> Render | None:
    """Renders conversations by the chat template of a tokenizer's folder; None where it has none.

    transformers runs the template in jinja2's immutable sandbox: it is text from elsewhere.

    Args:
        today: what a template that tells the date is told; None: the date. What is kept is made with `SOME_DAY`.

    Raises:
        BadInput: no tokenizer. The renderer itself raises it for what the template refuses.
    """
    from edgeprune.runtimes.pytorch import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if not getattr(tokenizer, "chat_template", None):
        return None

    told = {} if today is None else {"strftime_now": today.strftime}

    def render(messages: Sequence[Message], answer: bool) -> str:
        try:
            with _time_limit(), _memory_limit():
                text = tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=answer, **told
                )
            return str(text)
        except Exception as error:  # whatever the template raises, or jinja2 of it
            line = " ".join(str(error).split())[:200] or type(error).__name__
            raise BadInput(f"the chat template does not take this conversation ({line})", where=folder) from error

    return render


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Raise `TimeoutError` after `RENDER_S`: a template may hold loops within loops. In the main thread of POSIX, where
    nobody else has the timer; elsewhere there is no limit."""
    signals = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    if not signals or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def over(_number: int, _frame: object) -> None:
        raise TimeoutError(f"not rendered after {RENDER_S:g} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, RENDER_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _memory_limit() -> Iterator[None]:
    """Let the process have no more than `RENDER_BYTES` beside what it has: a template may ask for a text of any length.
    Where the system has no such limit (macOS, Windows), there is none."""
    try:
        import resource
    except ImportError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = psutil.Process().memory_info().vms + RENDER_BYTES
    if soft not in (-1, resource.RLIM_INFINITY) and soft <= most:
        yield
        return
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@dataclass(frozen=True)
class ChatParts:
    """A chat template by the strings between the contents.

    Attributes:
        opening: before the first user message, where there is no system message.
        system: before the system message, and between it and the first user message; None where it is refused.
        user: before each later user message.
        after_user: after each user message.
        assistant: before an answer of the conversation.
        after_assistant: after it.
        prompt: after the last user message, for an answer to follow.
    """

    opening: str
    system: tuple[str, str] | None
    user: str
    after_user: str
    assistant: str
    after_assistant: str
    prompt: str

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation that ends with a user message, ready for an answer.

        Raises:
            BadInput: a system message, where the template takes none.
        """
        messages = list(messages)
        text, opened = self.opening, False
        if messages[0]["role"] == "system":
            if self.system is None:
                raise BadInput("this chat template takes no system message")
            text = self.system[0] + messages.pop(0)["content"] + self.system[1]
        for message in messages:
            if message["role"] == "user":
                text += (self.user if opened else "") + message["content"] + self.after_user
                opened = True
            else:
                text += self.assistant + message["content"] + self.after_assistant
        return text + self.prompt


_SYSTEM, _USER, _ANSWER, _AGAIN = ("SystemSaysThis", "UserAsksThis", "AssistantAnswersThis", "UserAsksAgain")


def chat_parts(render: Render) -> ChatParts | None:
    """The parts of a chat template, found by what it makes of marked conversations; None if it is not of that form.

    Whatever the template does, parts are returned only if they render every conversation of `TRIALS` as it does.
    """
    system, user = {"role": "system", "content": _SYSTEM}, {"role": "user", "content": _USER}
    answer, again = {"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _AGAIN}
    try:
        alone = render([user], False)
        asked = render([user], True)
        opening, after_user = alone.split(_USER)
        head, rest = render([user, answer, again], False).split(_USER)
        to_answer, rest = rest.split(_ANSWER)
        to_user, tail = rest.split(_AGAIN)
    except (ValueError, BadInput):  # a marker is not there exactly once
        return None
    fits = head == opening and tail == after_user and to_answer.startswith(after_user) and asked.startswith(alone)
    if not fits:
        return None
    # Between an answer and the next question: what also ends a question ends the answer, what also begins the first
    # question begins the next.
    shared = min(_common_end(to_user, opening), len(to_user) - _common_start(to_user, after_user))
    parts = ChatParts(
        opening,
        _around_system(render, [system, user], after_user),
        to_user[len(to_user) - shared :],
        after_user,
        to_answer.removeprefix(after_user),
        to_user[: len(to_user) - shared],
        asked.removeprefix(alone),
    )
    for trial in TRIALS:
        if trial[0]["role"] == "system" and parts.system is None:
            continue
        if render(trial, True) != parts.render(trial):
            return None
    return parts


def _around_system(render: Render, messages: Sequence[Message], after_user: str) -> tuple[str, str] | None:
    try:
        before, rest = render(messages, False).split(_SYSTEM)
        between, tail = rest.split(_USER)
    except (ValueError, BadInput):
        return None
    return (before, between) if tail == after_user else None


def _common_start(a: str, b: str) -> int:
    """Length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _common_end(a: str, b: str) -> int:
    """Length of the longest common ending."""
    return _common_start(a[::-1], b[::-1])
