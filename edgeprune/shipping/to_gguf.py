"""Target `gguf`: the model file and what an app has to know, for whatever is built on llama.cpp."""

from __future__ import annotations

from edgeprune.shipping.job import Entry, Job

MODEL = "model.gguf"


def write(job: Job) -> list[Entry]:
    """model.gguf, which has the tokenizer and the chat template in it, and bundle.json."""
    job.copy(MODEL)
    job.write_bundle_json(MODEL)
    return [Entry(MODEL, "llamacpp")]
