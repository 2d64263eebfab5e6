"""Target `transformers.js`: graphs in three precisions where that library looks for them, and a page that uses them.

Layers may differ: the library (4.3, tried) takes the shape of each layer's cache from the graph.
"""

from __future__ import annotations

import importlib.resources
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.bundle import chat_template
from edgeprune.checkpoint import TOKENIZER_FILES
from edgeprune.export.onnx_bundle import with_plain_decoder
from edgeprune.export.onnx_graph import LOGITS_KEPT, Layout, write_graph
from edgeprune.files import read_json, write_json, write_text
from edgeprune.models import CODE_KEYS, TOKENIZER_CODE_KEYS
from edgeprune.per_layer import KEY
from edgeprune.shipping.job import Entry, Job, generation_facts

FOLDER = "onnx"
VERSION = "4.3.1"  # of the library that the bundles were tried with


@dataclass(frozen=True)
class Graph:
    """One precision: the ending of its file's name, as the library has it, and what it is exported as."""

    suffix: str
    precision: str

    @property
    def layout(self) -> Layout:
        """Names of its files, and the input that selects logits."""
        name = f"model_{self.suffix}.onnx"
        return Layout(name, f"{name}_data", LOGITS_KEPT, fused_gather=False)


# By the names of the library's `dtype`.
GRAPHS = {"q4": Graph("q4", "int4"), "q8": Graph("quantized", "int8"), "fp16": Graph("fp16", "fp16")}


def write(job: Job) -> list[Entry]:
    """onnx/model_*.onnx, config, tokenizer, bundle.json, package.json and index.html.

    Raises:
        BadInput: an unknown precision, or a model that the fused graph does not hold.
    """
    names = job.choose(tuple(GRAPHS))
    checkpoint = job.checkpoint
    (job.out / FOLDER).mkdir()
    for name in names:
        job.say(f"writing {GRAPHS[name].layout.model}")
        context = int(job.bundle.facts["n_ctx"])
        write_graph(
            checkpoint,
            job.out / FOLDER,
            precision=GRAPHS[name].precision,
            layout=GRAPHS[name].layout,
            context=context,
        )
    _write_config(checkpoint, job.out, names)
    _write_tokenizer(job, checkpoint)
    write_json(job.out / "generation_config.json", generation_facts(checkpoint))
    write_json(job.out / "package.json", _package())
    page = importlib.resources.files("edgeprune.shipping") / "web" / "index.html"
    write_text(job.out / "index.html", page.read_text(encoding="utf-8"))
    paths = {name: f"{FOLDER}/{GRAPHS[name].layout.model}" for name in names}
    job.write_bundle_json(
        paths[names[0]],
        runtime="transformers.js",
        quantisation=GRAPHS[names[0]].precision,
        graphs={name: job.graph_facts(path, "onnxruntime") for name, path in paths.items()},
        measured=None,  # of each graph it stands there
    )
    return [Entry(path, "onnxruntime") for path in paths.values()]


def _write_config(checkpoint: Path, out: Path, names: tuple[str, ...]) -> None:
    config = {k: v for k, v in read_json(checkpoint / "config.json").items() if k not in (*CODE_KEYS, KEY)}
    external = {GRAPHS[name].layout.model: 1 for name in names}
    config["transformers.js_config"] = {"dtype": names[0], "use_external_data_format": external}
    write_json(out / "config.json", config)


def _write_tokenizer(job: Job, checkpoint: Path) -> None:
    job.copy(*(n for n in TOKENIZER_FILES if n not in ("tokenizer.json", "tokenizer_config.json")), source=checkpoint)
    tokenizer = with_plain_decoder(read_json(checkpoint / "tokenizer.json"))
    write_text(job.out / "tokenizer.json", json.dumps(tokenizer, ensure_ascii=False))
    told = read_json(checkpoint / "tokenizer_config.json")
    settings = {key: value for key, value in told.items() if key not in TOKENIZER_CODE_KEYS}
    template = chat_template(checkpoint)
    write_json(job.out / "tokenizer_config.json", settings | ({"chat_template": template} if template else {}))


def _package() -> dict[str, Any]:
    return {
        "private": True,
        "type": "module",
        "dependencies": {"@huggingface/transformers": VERSION},
    }
