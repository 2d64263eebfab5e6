"""A conversation with a model in a runtime: the cache keeps what was said, and only what is new is computed."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from edgeprune.chat import Message, Render
from edgeprune.errors import BadInput
from edgeprune.runtimes.base import Runtime, begun

ROOM = 64  # tokens that an answer has room for, or a quarter of a small context; older turns go for them
_UNFINISHED = "\ufffd"  # what a character decodes to whose bytes have not all come


@dataclass
class Conversation:
    """Turns with one loaded model, answered greedily.

    Attributes:
        runtime: the model.
        render: makes text of the turns; None: a model without a chat template, which goes on writing.
        stop: ids of the tokens that end an answer.
        messages: what was said; the oldest turns are left out when the context is full.
        forgotten: how many messages were left out so far.
        n_tokens: tokens of the last answer.
        seconds: how long they took, the first one's prompt apart.
    """

    runtime: Runtime
    render: Render | None
    stop: Collection[int]
    messages: list[Message] = field(default_factory=list)
    forgotten: int = 0
    n_tokens: int = 0
    seconds: float = 0.0
    _cached: list[int] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        """Speed of the last answer."""
        return self.n_tokens / self.seconds if self.seconds > 0 else 0.0

    def say(self, text: str, *, most: int = 512) -> Iterator[str]:
        """The answer to `text`, piece by piece, of at most `most` tokens and what the context holds.

        Raises:
            BadInput: the question alone fills the context.
        """
        self.messages.append({"role": "user", "content": text})
        prompt = self._prompt()
        shared = next(
            (i for i, (a, b) in enumerate(zip(prompt, self._cached, strict=False)) if a != b),
            min(len(prompt), len(self._cached)),
        )
        shared = min(shared, len(prompt) - 1)  # the last token's logits are needed
        self.runtime.rewind(shared)
        logits = self.runtime.forward(prompt[shared:], last_only=True)
        self._cached = list(prompt)
        tokens: list[int] = []
        told, self.n_tokens = "", 0
        began = time.monotonic()
        for _ in range(min(most, self.runtime.n_ctx - len(prompt))):
            token = int(logits[-1].argmax())
            self.n_tokens += 1
            self.seconds = time.monotonic() - began
            if token in self.stop:
                break
            tokens.append(token)
            said = self.runtime.decode(tokens)
            if not said.endswith(_UNFINISHED):
                yield said[len(told) :]
                told = said
            logits = self.runtime.forward([token], last_only=True)
            self._cached.append(token)
        self.seconds = time.monotonic() - began
        said = self.runtime.decode(tokens).rstrip(_UNFINISHED)
        if len(said) > len(told):  # whole characters before one that was cut
            yield said[len(told) :]
        self.messages.append({"role": "assistant", "content": said})

    def _prompt(self) -> Sequence[int]:
        """Tokens of the conversation, without as many of the oldest turns as do not fit."""
        messages = list(self.messages)
        while True:
            if self.render is None:
                text = "\n".join(message["content"] for message in messages)
            else:
                text = self.render(messages, True)
            prompt = begun(self.runtime, self.runtime.encode(text, parse_special=True))
            if len(prompt) + min(ROOM, self.runtime.n_ctx // 4) <= self.runtime.n_ctx:
                self.forgotten += len(self.messages) - len(messages)
                self.messages = messages
                return prompt
            first = 1 if messages[0]["role"] == "system" else 0
            if len(messages) <= first + 1:
                self.messages.pop()  # the question alone: what was said before stays
                raise BadInput(
                    f"{len(prompt)} tokens do not leave room for an answer in a context of {self.runtime.n_ctx}",
                    remedy="ask something shorter",
                )
            del messages[first : first + 2]
