"""Talking to what was chosen: the conversation's cache, `chat` in a terminal, and `serve` to a client of OpenAI's."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from edgeprune.chat import SOME_DAY, renderer
from edgeprune.cli import app
from edgeprune.conversation import Conversation
from edgeprune.errors import BadInput
from edgeprune.runtimes import open_runtime
from edgeprune.runtimes.base import generate
from edgeprune.samples import prompts_for
from edgeprune.shipping.run import Run
from edgeprune.sums import write_sums


class Echo:
    """A runtime whose tokens are bytes and that repeats a text, whatever it is told."""

    bos: int | None = None

    def __init__(self, text: str, n_ctx: int) -> None:
        self.says, self.n_ctx, self.n_past = [*text.encode(), 0], n_ctx, 0
        self.computed = 0
        self.answered = 0

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def rewind(self, n_past: int) -> None:
        assert n_past <= self.n_past
        self.n_past = n_past
        self.answered = 0

    def forward(self, tokens: Sequence[int], *, last_only: bool = False) -> Any:
        self.n_past += len(tokens)
        self.computed += len(tokens)
        assert self.n_past <= self.n_ctx
        logits = np.zeros((1, 256), np.float32)
        logits[0, self.says[min(self.answered, len(self.says) - 1)]] = 1
        self.answered += 1
        return logits


def _plain(messages: Any, answer: bool) -> str:
    return "".join(f"<{m['role'][0]}>{m['content']}" for m in messages) + ("<a>" if answer else "")


def test_characters_come_whole_and_nothing_is_computed_twice() -> None:
    model = Echo("é 雨", 400)
    talk = Conversation(model, _plain, {0})  # type: ignore[arg-type]
    assert list(talk.say("hello")) == ["é", " ", "雨"]
    assert [m["role"] for m in talk.messages] == ["user", "assistant"]
    first = model.computed
    assert first == len("<u>hello<a>") + 6
    assert "".join(talk.say("again")) == "é 雨"
    assert model.computed == first + len("<u>again<a>") + 6
    assert talk.n_tokens == 7 and talk.tokens_per_s > 0


def test_an_answer_cut_inside_a_character_is_told_up_to_it() -> None:
    class Pieces(Echo):
        """Tokens 1 and 2 are several bytes each, the last of which begins a character."""

        def decode(self, tokens: Sequence[int]) -> str:
            return b"".join({1: b"Hi ", 2: b"caf\xc3"}.get(token, b"") for token in tokens).decode(errors="replace")

    model = Pieces("", 400)
    model.says = [1, 2, 0]
    talk = Conversation(model, _plain, {0})  # type: ignore[arg-type]
    assert list(talk.say("hello")) == ["Hi ", "caf"]
    assert talk.messages[-1]["content"] == "Hi caf"


def test_the_oldest_turns_go_when_the_context_is_full() -> None:
    model = Echo("ok", 120)
    talk = Conversation(model, _plain, {0})  # type: ignore[arg-type]
    talk.messages.append({"role": "system", "content": "s"})
    for _ in range(5):
        assert "".join(talk.say("a question of some length")) == "ok"
    assert talk.forgotten and talk.messages[0] == {"role": "system", "content": "s"}
    before, forgotten = list(talk.messages), talk.forgotten
    with pytest.raises(BadInput, match="ask something shorter"):
        list(talk.say("x" * 200))
    assert (talk.messages, talk.forgotten) == (before, forgotten), "what was said before is still known"
    assert "".join(talk.say("short")) == "ok"


def test_a_conversation_says_what_the_model_says(run: Path) -> None:
    bundle = Run.open(run).bundle("llamacpp")
    render = renderer(bundle.folder)
    assert render is not None
    with closing(open_runtime(bundle.model, n_ctx=128, threads=2)) as model:
        talk = Conversation(model, render, set(bundle.eos))
        said = "".join(talk.say("Hello", most=8))
        prompt = model.encode(render([{"role": "user", "content": "Hello"}], True), parse_special=True)
        assert said == model.decode([t for t in generate(model, prompt, 8, stop=bundle.eos) if t not in bundle.eos])


def test_chat_answers_each_line(run: Path) -> None:
    done = CliRunner().invoke(app, ["chat", str(run), "--max-tokens", "4"], input="Hello\nAnd now?\n\nnever asked\n")
    assert done.exit_code == 0, done.output
    assert done.output.count("tokens/s") == 2


def test_chat_goes_on_without_what_only_the_device_has(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    facts = json.loads((copy / "best" / "bundle.json").read_text())
    facts["settings"] = {"gpu_layers": 999} if facts["runtime"] == "llamacpp" else {"provider": "cuda"}
    (copy / "best" / "bundle.json").write_text(json.dumps(facts))
    write_sums(copy / "best")
    done = CliRunner().invoke(app, ["chat", str(copy), "--max-tokens", "4"], input="Hello\n\n")
    assert done.exit_code == 0 and "without the settings of the device" in done.output


def test_a_template_that_tells_the_date_is_told_one(chat_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(chat_model, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}")
    ask = [{"role": "user", "content": "Hello"}]
    fixed, today = renderer(folder, SOME_DAY), renderer(folder)
    assert fixed is not None and today is not None
    assert fixed(ask, True) == "26 Jul 2024: Hello" != today(ask, True)
    assert prompts_for(folder, ["Hello"]) == ["26 Jul 2024: Hello"]


def _get(url: str, **headers: str) -> Any:
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5)


@pytest.fixture
def server(run: Path) -> Iterator[str]:
    pytest.importorskip("fastapi")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "edgeprune", "serve", str(run), "--port", str(port)]
    others = os.environ | {"CONFIG_FILE": "/nowhere.json", "API_KEY": "secret"}  # of other programs
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=others) as process:
        address = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    _get(f"{address}/v1/models").close()
                    break
                except OSError:
                    assert process.poll() is None and time.monotonic() < deadline, (
                        process.stdout and process.stdout.read()
                    )
                    time.sleep(0.2)
            yield address
        finally:
            process.terminate()
            process.wait(10)


def test_a_client_of_openai_completes_against_serve(run: Path, server: str) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
    bundle = Run.open(run).bundle("llamacpp")
    said = client.chat.completions.create(
        model=bundle.folder.name, messages=[{"role": "user", "content": "Hello"}], max_tokens=8, temperature=0.0
    )
    assert said.choices[0].message.content is not None and said.usage.completion_tokens > 0
    with _get(f"{server}/v1/models", Origin="https://example.org") as answer:
        assert "access-control-allow-origin" not in {key.lower() for key in answer.headers}
    with pytest.raises(urllib.error.HTTPError, match="400"):  # a name that was made to lead here
        _get(f"{server}/v1/models", Host="rebound.example.org")


def test_a_second_request_breaks_no_answer(run: Path, server: str) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
    ask = {"model": Run.open(run).bundle("llamacpp").folder.name, "temperature": 0.0}
    stream = client.completions.create(prompt="One", max_tokens=100, stream=True, **ask)
    first = next(iter(stream))
    answers: list[Any] = []
    other = threading.Thread(
        target=lambda: answers.append(client.completions.create(prompt="Two", max_tokens=4, **ask))
    )
    other.start()
    reasons = [first.choices[0].finish_reason, *(part.choices[0].finish_reason for part in stream)]
    other.join(30)
    assert reasons[-1] in ("length", "stop") and len(answers) == 1


def test_serve_refuses_what_llama_cpp_does_not_run(run: Path) -> None:
    from edgeprune.serving import server_settings

    bundle = Run.open(run).bundle("onnxruntime")
    with pytest.raises(BadInput, match="--quant Q4_0"):
        server_settings(bundle.model, bundle.facts)


def test_serve_tells_that_a_port_is_taken(run: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(app, ["serve", str(run), "--port", str(port)])
    assert isinstance(done.exception, BadInput) and "choose another --port" in str(done.exception)
