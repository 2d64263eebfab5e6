"""Target `onnxruntime-genai`: the fused graph and its genai_config.json, as that runtime opens it."""

from __future__ import annotations

from edgeprune.checkpoint import TOKENIZER_FILES
from edgeprune.errors import BadInput
from edgeprune.export.onnx_bundle import GENAI_CONFIG
from edgeprune.export.onnx_graph import Layout
from edgeprune.files import read_json, write_json
from edgeprune.shipping.job import Entry, Job


def write(job: Job) -> list[Entry]:
    """The measured graph with its weights, the tokenizer, genai_config.json with the threads, and bundle.json.

    Raises:
        BadInput: the run has no genai_config.json.
    """
    layout = Layout()
    copied = job.copy(
        layout.model, layout.data, GENAI_CONFIG, "config.json", *TOKENIZER_FILES, "generation_config.json"
    )
    if GENAI_CONFIG not in copied:
        raise BadInput(f"no {GENAI_CONFIG}", where=job.bundle.folder, remedy="run `edgeprune fit` again")
    config = read_json(job.out / GENAI_CONFIG)
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = job.bundle.facts["threads"]
    write_json(job.out / GENAI_CONFIG, config)
    job.write_bundle_json(layout.model)
    return [Entry(".", "onnxruntime")]
