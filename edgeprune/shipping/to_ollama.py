"""Target `ollama`: a Modelfile and its GGUF file, for `ollama create NAME -f Modelfile`.

Ollama's templates are Go's text/template, the model's is Jinja. The model's is taken apart by what it renders
(`chat.chat_parts`), and the parts are written as a Go template; what cannot be said so is refused.
Source of the format: https://github.com/ollama/ollama/blob/main/docs/modelfile.md
"""

from __future__ import annotations

import json
from dataclasses import replace

from edgeprune.chat import SOME_DAY, ChatParts, chat_parts, renderer
from edgeprune.errors import BadInput
from edgeprune.files import write_text
from edgeprune.models import terms
from edgeprune.runtimes.gguf_file import GgufFile
from edgeprune.runtimes.pytorch import load_tokenizer
from edgeprune.shipping.job import Entry, Job
from edgeprune.shipping.to_gguf import MODEL
from edgeprune.tokenizer import adds_special

MODELFILE = "Modelfile"


def write(job: Job) -> list[Entry]:
    """Modelfile, model.gguf and bundle.json.

    Raises:
        BadInput: a chat template that Go's cannot express.
    """
    job.copy(MODEL)
    job.write_bundle_json(MODEL)
    write_text(job.out / MODELFILE, modelfile(job))
    return [Entry(MODEL, "llamacpp")]


def modelfile(job: Job) -> str:
    """The text of the Modelfile."""
    facts = job.bundle.facts
    lines = [f"FROM ./{MODEL}"]
    if parts := _parts(job):
        lines.append(f'TEMPLATE """{go_template(parts)}"""')
    lines += [f"PARAMETER num_ctx {facts['n_ctx']}", f"PARAMETER num_thread {facts['threads']}"]
    lines.append(f"PARAMETER num_gpu {facts['settings'].get('gpu_layers', 0)}")
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in _stops(job)]
    texts = [(job.bundle.folder / name).read_text("utf-8", "replace") for name in terms(job.bundle.folder)]
    for text in texts or filter(None, [facts["licence"]]):
        quotes = '"""'
        lines.append(f"LICENSE {quotes}{text.strip().replace(quotes, chr(39) * 3)}{quotes}")
    return "\n".join(lines) + "\n"


def _parts(job: Job) -> ChatParts | None:
    render = renderer(job.bundle.folder, SOME_DAY)  # Go cannot tell the date
    if render is None:
        return None
    parts = chat_parts(render)
    if parts is None:
        raise BadInput(
            "this chat template cannot be written as one of Ollama's",
            where=job.bundle.folder,
            remedy="ship to gguf: llama.cpp renders the template that is in the file",
        )
    file = GgufFile(job.out / MODEL)
    add_bos, _ = adds_special(file, sentencepiece=file.get("tokenizer.ggml.model", str, "") == "llama")
    bos = load_tokenizer(job.bundle.folder).bos_token
    return without_beginning(parts, bos) if add_bos and bos else parts


def without_beginning(parts: ChatParts, bos: str) -> ChatParts:
    """Parts that do not begin with the token that the runtime puts before every text by itself."""
    system = None if parts.system is None else (parts.system[0].removeprefix(bos), parts.system[1])
    return replace(parts, opening=parts.opening.removeprefix(bos), system=system)


def _stops(job: Job) -> list[str]:
    """Text of every token that ends an answer, each once."""
    tokenizer = load_tokenizer(job.bundle.folder)
    by_id = [tokenizer.convert_ids_to_tokens(token) for token in job.bundle.eos]
    return list(dict.fromkeys([*(token for token in by_id if token), *job.bundle.facts["stop"]]))


def _quoted(text: str) -> str:
    if '"' in text or not text.isprintable():  # would end the parameter, and what follows be read as a command
        raise BadInput(f"a Modelfile cannot hold the stop text {text!r}", remedy="ship --to gguf")
    return f'"{text}"'


def _put(text: str) -> str:
    """An action that writes `text`; as a string of Go's, so that no trimming touches its blanks and lines."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""


def go_template(parts: ChatParts) -> str:
    """The parts as a template of Go's text/template, over Ollama's `.System` and `.Messages`."""
    # A line begins with an action that trims the line break before it; all text is inside actions.
    opening = f'{{{{- "" }}}}{_put(parts.opening)}'
    if parts.system is not None:
        before, between = map(_put, parts.system)
        opening = (
            f"{{{{- if .System }}}}{before}{{{{ .System }}}}{between}{{{{ else }}}}{_put(parts.opening)}{{{{ end }}}}"
        )
    user = f"{{{{ if $opened }}}}{_put(parts.user)}{{{{ end }}}}{{{{ $opened = true }}}}"
    lines = [
        "{{- $opened := false }}",
        opening,
        "{{- range .Messages }}",
        f'{{{{- if eq .Role "user" }}}}{user}{{{{ .Content }}}}{_put(parts.after_user)}',
        '{{- else if eq .Role "assistant" }}'
        f"{_put(parts.assistant)}{{{{ .Content }}}}{_put(parts.after_assistant)}",
        "{{- end }}",
        "{{- end }}" + _put(parts.prompt),
    ]
    return "\n".join(lines)
