"""Importance matrix of a model: the mean squared input of every weight's columns, in one pass over calibration text.

What it is for and how it is stored: `export.gguf_imatrix`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from edgeprune.calibration import TextSet, retokenized, text_set
from edgeprune.errors import BadInput
from edgeprune.export.gguf_deci import is_filler
from edgeprune.export.gguf_imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from edgeprune.export.gguf_layout import module_name
from edgeprune.export.gguf_types import tensors
from edgeprune.files import cache_dir
from edgeprune.importance import Progress, batches, input_hooks, text_hash
from edgeprune.models import Model, load
from edgeprune.vocabulary_plan import PLAN_FILE as VOCABULARY_PLAN

SCHEMA_VERSION = 1
TEXTS, LENGTH = 64, 256  # of calibration: means of squares settle with far fewer tokens than there are columns
_TOKENS_AT_ONCE = 4096  # as many as fill the matrix units


def column_squares(x: torch.Tensor) -> torch.Tensor:
    """Σ over tokens of x_c² for each column c of the input `x` of a weight, (tokens, columns): (columns,), float64."""
    return x.square().sum(dim=0, dtype=torch.float64)


@torch.inference_mode()
def importance_matrix(
    model: Model,
    texts: Sequence[torch.Tensor],
    *,
    tokens_at_once: int = _TOKENS_AT_ONCE,
    source: str = "",
    progress: Progress | None = None,
) -> ImportanceMatrix:
    """The importance matrix of `model` over `texts` (token ids, (length,) each), in one forward pass.

    Every weight of every layer has an entry, under its name in a GGUF file, and so has the head (the embedding where
    it is tied). A weight that was pruned away has none; an MLP of zeros in its place (`gguf_deci`)
    has ones, for without an entry the quantiser refuses some types.

    Raises:
        BadInput: no tokens.
    """
    texts = [text for text in texts if len(text)]
    total = sum(len(text) for text in texts)
    if not total:
        raise BadInput("no calibration tokens", remedy="give a text that is not empty")
    shape = model.shape
    sums: dict[str, torch.Tensor] = {}
    mask = torch.empty(0)

    def add(name: str, x: torch.Tensor) -> None:  # x: (texts, length, columns)
        real = x.flatten(0, 1) if bool(mask.all()) else x[mask.bool()]
        found = column_squares(real)
        sums[name] = sums[name] + found if name in sums else found

    def visitor(names: Sequence[str]) -> Callable[[torch.Tensor], None]:
        def visit(x: torch.Tensor) -> None:
            for name in names:
                add(name, x)

        return visit

    every = {t.name: t.shape[-1] for t in tensors(shape) if len(t.shape) > 1}
    fed: dict[str, list[str]] = {}  # a fused matrix of the checkpoint can be several in the file
    for name in every:
        if name.startswith("blk.") and not is_filler(name, shape):
            fed.setdefault(module_name(name, shape).removesuffix(".weight"), []).append(name)
    visitors = {module: visitor(names) for module, names in fed.items()}
    head = "output.weight" if "output.weight" in every else "token_embd.weight"
    body = model.module.get_submodule(shape.family.layers.rpartition(".")[0])
    done = 0
    with input_hooks(model.module, visitors):
        for ids, mask in batches(texts, tokens_at_once):
            # The body's last hidden state has been through the final norm: it is what the head reads.
            add(head, body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state)
            done += int(mask.sum())
            if progress:
                progress(done, total)
    values = {name: (found / total).numpy().astype(np.float32) for name, found in sums.items()}
    values |= {name: np.ones(columns, dtype=np.float32) for name, columns in every.items() if is_filler(name, shape)}
    return ImportanceMatrix(values, total, text_hash(texts), model.hash, source)


def cached_importance_matrix(model: Model, texts: TextSet, *, progress: Progress | None = None) -> ImportanceMatrix:
    """`importance_matrix` of a text set, computed once for each pair of model and text; the cache is in GGUF format."""
    key = hashlib.sha256(json.dumps([SCHEMA_VERSION, model.hash, texts.hash]).encode()).hexdigest()[:24]
    path = cache_dir() / "imatrix" / f"{key}.gguf"
    if path.exists():
        return read_imatrix(path)
    matrix = importance_matrix(model, texts.begun, source=texts.source, progress=progress)
    return read_imatrix(write_imatrix(matrix, path))  # as a later run will see it


def provide_imatrix(
    folder: Path,
    out: Path,
    *,
    texts: TextSet | None = None,
    calibration: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Write to `out` the importance matrix of the checkpoint in `folder`, for targets whose name says `imatrix`.

    Args:
        folder: Hugging Face format; a pruned model needs a matrix of its own, since other inputs reach its weights.
        out: the GGUF file to write; `targets.IMATRIX` in the scratch folder of an export. One that is there already
            is kept.
        texts: what to run it on; a model that has lost tokens reads them in those it has left. None reads
            `calibration`.
        calibration: a text file or hub dataset; None lets the model write its own.
        seed: of self-generated text.
        progress: called with tokens done and all.

    Raises:
        BadInput: a folder or a text that cannot be read.
    """
    if not out.exists():
        model = load(folder)
        if texts is None:
            texts = text_set(model, calibration, count=TEXTS, length=LENGTH, seed=seed)
        few = replace(texts, texts=texts.texts[:TEXTS], ids=texts.ids[:TEXTS])
        if (folder / VOCABULARY_PLAN).is_file():  # the ids may be those of a larger vocabulary
            few = retokenized(few, model.tokenizer)
        write_imatrix(cached_importance_matrix(model, few, progress=progress), out)
    return out
