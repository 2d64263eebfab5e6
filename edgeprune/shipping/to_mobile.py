"""Targets `android` and `ios`: the model file where an app's project wants it, and a loader in TypeScript.

By default a GGUF file for llama.rn, which is llama.cpp for React Native; with the option `onnx` a graph for ONNX
Runtime's mobile build. Interfaces: https://github.com/mybigday/llama.rn (0.12: `initLlama`, `completion`) and
https://onnxruntime.ai/docs/api/js (1.24: `InferenceSession`).
"""

from __future__ import annotations

import importlib.resources
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.checkpoint import TOKENIZER_FILES, Checkpoint
from edgeprune.export.onnx_graph import LOGITS_KEPT, Layout, write_graph
from edgeprune.files import write_text
from edgeprune.models import copy_files, terms
from edgeprune.shipping.job import BUNDLE_JSON, Entry, Job
from edgeprune.shipping.to_gguf import MODEL

LOADER = "loadModel.ts"


@dataclass(frozen=True)
class Place:
    """Where a kind of project has such files, and how its code gets at them."""

    folder: Path
    how: str


ANDROID = Place(
    Path("android/app/src/main/assets/model"),
    "Assets inside an APK have no path: copy the folder's files to the app's own first, for example by\n"
    "// copyFileAssets('model/…', path) of @dr.pogodin/react-native-fs, and give that path.",
)
IOS = Place(
    Path("ios/model"),
    "Add the folder ios/model to the app's target as a folder reference; its path is then\n"
    "// MainBundlePath + '/model/…' of @dr.pogodin/react-native-fs.",
)


def write_android(job: Job) -> list[Entry]:
    """android/app/src/main/assets/model/ and loadModel.ts."""
    return _write(job, ANDROID)


def write_ios(job: Job) -> list[Entry]:
    """ios/model/ and loadModel.ts."""
    return _write(job, IOS)


def _write(job: Job, place: Place) -> list[Entry]:
    write = _onnx if job.option("gguf") == "onnx" else _gguf
    (job.out / place.folder).mkdir(parents=True)
    entry, loader = write(job, place)
    (job.out / BUNDLE_JSON).rename(job.out / place.folder / BUNDLE_JSON)
    copy_files(job.bundle.folder, job.out / place.folder, terms(job.bundle.folder))  # an app has no other folder of it
    write_text(job.out / LOADER, loader)
    return [entry]


def _gguf(job: Job, place: Place) -> tuple[Entry, str]:
    job.copy(MODEL)
    (job.out / MODEL).rename(job.out / place.folder / MODEL)
    job.write_bundle_json(MODEL)
    return Entry((place.folder / MODEL).as_posix(), "llamacpp"), llama_rn_loader(job, place)


def _onnx(job: Job, place: Place) -> tuple[Entry, str]:
    layout = Layout(logits=LOGITS_KEPT)
    checkpoint, context = job.checkpoint, int(job.bundle.facts["n_ctx"])
    job.say(f"writing {layout.model}")
    write_graph(checkpoint, job.out / place.folder, precision="int4", layout=layout, context=context)
    for name in job.copy(*TOKENIZER_FILES, source=checkpoint):
        (job.out / name).rename(job.out / place.folder / name)
    path = (place.folder / layout.model).as_posix()
    facts = job.graph_facts(path, "onnxruntime")
    job.write_bundle_json(layout.model, runtime="onnxruntime", quantisation="int4", measured=facts["measured"])
    return Entry(path, "onnxruntime"), onnxruntime_loader(job, place, layout.model)


def _head(place: Place, file: str, library: str, more: str = "") -> str:
    return f"// Loads {place.folder.as_posix()}/{file} in {library}{more}.\n// {place.how}\n"


def onnxruntime_loader(job: Job, place: Place, file: str) -> str:
    """The TypeScript that opens the graph in ONNX Runtime and generates with its cache."""
    shape, facts = Checkpoint(job.checkpoint).shape, job.bundle.facts
    cache = {
        f"past_key_values.{index}.{part}": [1, layer.kv_heads, 0, shape.head_dim]
        for index, layer in enumerate(shape.layers)
        if layer.kv_heads
        for part in ("key", "value")
    }
    body = importlib.resources.files("edgeprune.shipping") / "mobile" / "answer.ts"
    return (
        _head(place, file, "onnxruntime-react-native")
        + "import { InferenceSession, Tensor } from 'onnxruntime-react-native'\n\n"
        + f"const THREADS = {facts['threads']}\n"
        + f"const CONTEXT = {facts['n_ctx']}\n"
        + f"const STOP: number[] = {json.dumps(job.bundle.eos)}\n"
        + f"const CACHE: Record<string, number[]> = {json.dumps(cache)}\n"
        + body.read_text(encoding="utf-8")
    )


def llama_rn_loader(job: Job, place: Place) -> str:
    """The TypeScript that opens the model in llama.rn with the settings that it was measured with."""
    facts = job.bundle.facts
    memory = f", as it was fitted; it needs {facts['memory_need_mib']:.0f} MiB of memory"
    head = _head(place, MODEL, "llama.rn", memory)
    settings = facts["settings"]
    # llama.rn by itself would take whatever GPU there is, which nobody measured.
    told: dict[str, Any] = {
        "n_ctx": facts["n_ctx"],
        "n_threads": facts["threads"],
        "n_gpu_layers": settings.get("gpu_layers", 0),
    }
    if "n_ubatch" in settings:
        told["n_ubatch"] = settings["n_ubatch"]
    if settings.get("flash_attn") is False:
        told["flash_attn_type"] = "off"
    if settings.get("cache_type") == "Q8_0":
        told["cache_type_k"] = told["cache_type_v"] = "q8_0"
    return f"""{head}import {{ initLlama, type LlamaContext }} from 'llama.rn'

export type Message = {{ role: 'system' | 'user' | 'assistant'; content: string }}

/** Open the model file at `path`. */
export async function loadModel(path: string): Promise<LlamaContext> {{
  return initLlama({{ model: path, {", ".join(f"{name}: {json.dumps(value)}" for name, value in told.items())} }})
}}

/** The answer to a conversation, token by token to `onToken`. */
export async function answer(
  context: LlamaContext,
  messages: Message[],
  onToken: (token: string) => void = () => {{}},
): Promise<string> {{
  const result = await context.completion(
    {{ messages, n_predict: 256, stop: {json.dumps(facts["stop"], ensure_ascii=False)} }},
    (data) => onToken(data.token),
  )
  return result.text
}}
"""
