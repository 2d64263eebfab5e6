"""Target `executorch`: a program for ExecuTorch's text runner, `TextLLMRunner` in C++ and Python, `LlmModule` in apps.

Weights have 4 or 8 bits, embedding and head too, which are two copies where they are tied: XNNPACK packs what it
multiplies in an order of its own. Layers may differ.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from edgeprune.bundle import chat_template
from edgeprune.checkpoint import TOKENIZER_FILES
from edgeprune.files import read_json, write_text
from edgeprune.imatrix import provide_imatrix
from edgeprune.shipping.job import Entry, Job

MODEL = "model.pte"


def write(job: Job) -> list[Entry]:
    """model.pte, the tokenizer and bundle.json.

    Raises:
        BadInput: executorch is not installed, two precisions, or a model that its operators cannot compute.
    """
    from edgeprune.export.pte_writer import write_pte

    precision = job.option("int4")
    checkpoint = job.checkpoint
    bos = read_json(checkpoint / "config.json").get("bos_token_id")
    with tempfile.TemporaryDirectory() as scratch:
        imatrix = None
        if precision == "int4":
            job.say("finding what each column of the weights is multiplied by")
            imatrix = provide_imatrix(checkpoint, Path(scratch) / "imatrix.gguf")
        job.say(f"lowering to {MODEL}, some seconds a layer")
        write_pte(
            checkpoint,
            job.out / MODEL,
            precision=precision,
            imatrix=imatrix,
            context=int(job.bundle.facts["n_ctx"]),
            bos=bos if isinstance(bos, int) else None,
            eos=job.bundle.eos,
        )
    job.copy(*TOKENIZER_FILES, source=checkpoint)
    if template := chat_template(checkpoint):  # the runner reads no Jinja; the app that fills it in finds it here
        write_text(job.out / "chat_template.jinja", template)
    facts = job.graph_facts(MODEL, "executorch")
    job.write_bundle_json(MODEL, runtime="executorch", quantisation=precision, measured=facts["measured"])
    return [Entry(MODEL, "executorch")]
