"""Targets `android` and `ios`: the model file where an app's project wants it, and a loader for llama.rn.

llama.rn is llama.cpp for React Native; it takes the path of a GGUF file. Interface: https://github.com/mybigday/llama.rn
(0.12: `initLlama`, `LlamaContext.completion`).
"""

from __future__ import annotations

import json
from pathlib import Path

from edgeprune.files import write_text
from edgeprune.shipping.job import BUNDLE_JSON, Entry, Job
from edgeprune.shipping.to_gguf import MODEL

ASSETS = Path("android/app/src/main/assets/model")
RESOURCES = Path("ios/model")
LOADER = "loadModel.ts"

_WHERE = {
    ASSETS: "Assets inside an APK have no path: copy the file to the app's own folder first, for example by\n"
    "// copyFileAssets('model/model.gguf', path) of @dr.pogodin/react-native-fs, and give that path.",
    RESOURCES: "Add the folder ios/model to the app's target as a folder reference; its path is then\n"
    "// MainBundlePath + '/model/model.gguf' of @dr.pogodin/react-native-fs.",
}


def write_android(job: Job) -> list[Entry]:
    """android/app/src/main/assets/model/ and loadModel.ts."""
    return _write(job, ASSETS)


def write_ios(job: Job) -> list[Entry]:
    """ios/model/ and loadModel.ts."""
    return _write(job, RESOURCES)


def _write(job: Job, folder: Path) -> list[Entry]:
    (job.out / folder).mkdir(parents=True)
    job.copy(MODEL)
    (job.out / MODEL).rename(job.out / folder / MODEL)
    job.write_bundle_json(MODEL)
    (job.out / BUNDLE_JSON).rename(job.out / folder / BUNDLE_JSON)
    write_text(job.out / LOADER, loader(job, folder))
    return [Entry((folder / MODEL).as_posix(), "llamacpp")]


def loader(job: Job, folder: Path) -> str:
    """The TypeScript that opens the model with the settings that it was measured with."""
    facts = job.bundle.facts
    memory = f"{facts['memory_need_mib']:.0f} MiB"
    return f"""// Loads {folder.as_posix()}/{MODEL} in llama.rn, as it was fitted; it needs {memory} of memory.
// {_WHERE[folder]}
import {{ initLlama, type LlamaContext }} from 'llama.rn'

export type Message = {{ role: 'system' | 'user' | 'assistant'; content: string }}

/** Open the model file at `path`. */
export async function loadModel(path: string): Promise<LlamaContext> {{
  return initLlama({{ model: path, n_ctx: {facts["n_ctx"]}, n_threads: {facts["threads"]} }})
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
