"""Applies a vocabulary plan to a folder: rows of embedding and head, the tokenizer's files, ids in the configs.

The result is an ordinary Hugging Face folder. Shards keep their names; those without rows of the vocabulary are copied.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file

from edgeprune.checkpoint import GGUF_TOKENIZER, NAMED, Checkpoint
from edgeprune.errors import BadInput, StageFailed
from edgeprune.export.gguf_writer import write_metadata
from edgeprune.files import atomic_folder, read_json, result_folder, write_json, write_text
from edgeprune.models import CODE_KEYS, companions, copy_licence_name
from edgeprune.runtimes.gguf_file import GgufFile
from edgeprune.runtimes.tokenizer_file import open_tokenizer
from edgeprune.surgery import PLAN_FILE as LAYERS_PLAN_FILE
from edgeprune.tokenizer import tokenizer_from_gguf
from edgeprune.tokenizer_proof import PROOF_TEXTS
from edgeprune.vocabulary import closure
from edgeprune.vocabulary_plan import PLAN_FILE, VocabularyPlan, folder_vocabulary, tokenizer_hash
from edgeprune.vocabulary_tokenizer import (
    Renumbering,
    pruned_gguf,
    pruned_ids,
    pruned_tokenizer,
    pruned_tokenizer_config,
)

Progress = Callable[[int, int], None]

# The old vocabulary in forms that only slow tokenizers read; a stock loader that found them would use the old ids.
_LEFT_OUT = ("tokenizer.model",)
_WITH_IDS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    GGUF_TOKENIZER,
)


def kept_rows(tensor: torch.Tensor, plan: VocabularyPlan, *, shifted: bool) -> torch.Tensor:
    """What stays of a tensor with a row, or an entry, for each token, in its own number format.

    Args:
        tensor: (rows, hidden), or a bias, (rows,).
        plan: what to keep.
        shifted: whether the logits that this tensor makes rise by the plan's shift.
    """
    rows = tensor.index_select(0, torch.tensor(plan.kept))
    if not shifted or not plan.shift:
        return rows
    step = torch.tensor(plan.shift)
    if rows.ndim == 2:
        step = step[:, None] * torch.tensor(plan.direction)
    return (rows.float() + step).to(rows.dtype)


def _vocabulary_tensors(checkpoint: Checkpoint, plan: VocabularyPlan) -> dict[str, bool]:
    """The tensors with a row or an entry for each token, and whether each is to be shifted."""
    shape = checkpoint.shape
    embedding, head, bias = (
        f"{shape.family.embedding}.weight",
        f"{shape.family.head}.weight",
        f"{shape.family.head}.bias",
    )
    # Where embedding and head are one tensor the embedding is moved, too: the direction is short beside a row.
    shifted = {bias} if bias in checkpoint else {embedding, head} if shape.tied else {head}
    found = {name: name in shifted for name in (embedding, head, bias) if name in checkpoint}
    for name, is_shifted in found.items():
        dimensions = checkpoint.dimensions(name)
        if dimensions[0] != shape.vocab:
            raise BadInput(f"{name} has {dimensions[0]} rows, the config says {shape.vocab}", where=checkpoint.folder)
        if is_shifted and plan.shift and len(dimensions) == 2 and dimensions[1] != len(plan.direction):
            raise BadInput(f"the plan's direction has {len(plan.direction)} entries, not {dimensions[1]}", where=name)
    return found


def _save_weights(checkpoint: Checkpoint, plan: VocabularyPlan, folder: Path, progress: Progress | None) -> None:
    changed = _vocabulary_tensors(checkpoint, plan)
    total = 0
    for done, file in enumerate(checkpoint.files, start=1):
        with safe_open(file, framework="pt") as source:
            names = list(source.keys())
            if not changed.keys() & names:
                shutil.copyfile(file, folder / file.name)
                total += sum(_stored_bytes(source, name) for name in names)
            else:
                tensors = {name: source.get_tensor(name) for name in names}
                for name in changed.keys() & names:
                    tensors[name] = kept_rows(tensors[name], plan, shifted=changed[name])
                save_file(tensors, folder / file.name, metadata={"format": "pt"})
                total += sum(tensor.nbytes for tensor in tensors.values())
        if progress:
            progress(done, len(checkpoint.files))
    index = checkpoint.folder / "model.safetensors.index.json"
    if index.is_file():
        listing = read_json(index)
        metadata = {**(listing.get("metadata") or {}), "total_size": total}
        write_json(folder / index.name, {**listing, "metadata": metadata})


def _stored_bytes(source: Any, name: str) -> int:
    part = source.get_slice(name)
    size = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}[part.get_dtype()]
    return int(np.prod(part.get_shape(), dtype=np.int64)) * size


def _save_tokenizer(source: Path, ids: Renumbering, folder: Path) -> None:
    where = source / "tokenizer.json"
    spec = pruned_tokenizer(read_json(where), ids, where=where)
    write_text(folder / "tokenizer.json", json.dumps(spec, ensure_ascii=False, indent=2))
    model = spec["model"]
    for name in _WITH_IDS[1:]:
        path = source / name
        if not path.is_file():
            continue
        if name == "tokenizer_config.json":
            write_json(folder / name, pruned_tokenizer_config(read_json(path), ids, where=path))
        elif name == "generation_config.json":
            write_json(folder / name, pruned_ids(read_json(path), ids, where=path))
        elif name == "added_tokens.json":
            write_json(folder / name, {token: ids(old, where=path) for token, old in read_json(path).items()})
        elif name == "vocab.json":
            write_text(folder / name, json.dumps(model["vocab"], ensure_ascii=False))
        elif name == "merges.txt":
            merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
            write_text(folder / name, "\n".join(["#version: 0.2", *merges, ""]))
        else:
            file = GgufFile(path)
            general = file.values("general.")
            general.pop("general.architecture", None)  # the writer puts it itself
            values = pruned_gguf(file.values("tokenizer."), ids, where=path)
            write_metadata(folder / name, file.architecture, {**general, **values})


def prune_vocabulary(
    folder: Path, plan: VocabularyPlan, out: Path, *, progress: Progress | None = None, check: bool = True
) -> Path:
    """Write the model in `folder` with the tokens that `plan` keeps to the folder `out` (replaced when whole).

    Args:
        folder: the model that the plan was made for (or the same with other layers), in Hugging Face format.
        plan: what to keep.
        out: where to.
        progress: told shards done and shards in all.
        check: read hard text with the old and the new tokenizer and compare (`check_lossless`).

    Returns:
        `out`.

    Raises:
        BadInput: the plan is for another model, or a file of the folder names a token that is not kept.
        StageFailed: text comes back otherwise than it did before.
    """
    checkpoint = Checkpoint(folder)
    vocab = checkpoint.shape.vocab
    if plan.size_before != vocab or plan.tokenizer != tokenizer_hash(folder):
        raise BadInput(
            f"the vocabulary plan is for another tokenizer or another size ({plan.size_before}, not {vocab})",
            where=folder,
            remedy="make the plan again for this model",
        )
    kept = np.array(plan.kept, dtype=np.int64)
    _check_whole(folder, kept, vocab)
    ids = Renumbering(kept, vocab)
    with atomic_folder(result_folder(out, PLAN_FILE)) as temporary:
        _save_weights(checkpoint, plan, temporary, progress)
        config = pruned_ids(checkpoint.config, ids, where=folder / "config.json")
        config = {key: value for key, value in config.items() if key not in CODE_KEYS}
        write_json(temporary / "config.json", config | {NAMED: checkpoint.name})
        copy_licence_name(folder, temporary)
        _save_tokenizer(folder, ids, temporary)
        for name in (*companions(folder), LAYERS_PLAN_FILE):
            if name not in (*_WITH_IDS, *_LEFT_OUT) and (folder / name).is_file():
                shutil.copyfile(folder / name, temporary / name)
        plan.save(temporary / PLAN_FILE)
        if check:
            check_lossless(folder, temporary)
    return out


def _check_whole(folder: Path, kept: NDArray[np.int64], rows: int) -> None:
    """A plan is input, too: raise `BadInput` unless it keeps all that has to stay and all that kept tokens need."""
    vocabulary = folder_vocabulary(folder, rows)
    stays = set(kept.tolist())
    needed = closure(vocabulary, stays).tolist()
    if missing := [index for index in needed if index not in stays]:
        raise BadInput(
            f"the plan drops token {missing[0]} ({vocabulary.tokens[missing[0]]!r}), which is needed",
            where=folder,
            remedy="make the plan again",
        )


def check_lossless(before: Path, after: Path) -> int:
    """Read hard text with the tokenizers of two folders: both must give back the same text.

    Where a folder carries its vocabulary for GGUF, too, that is read as well and must give the same ids.

    Returns:
        How many texts were read.

    Raises:
        StageFailed: they differ.
    """
    old, new = open_tokenizer(before), open_tokenizer(after)
    twin = tokenizer_from_gguf(GgufFile(after / GGUF_TOKENIZER)) if (after / GGUF_TOKENIZER).is_file() else None
    for text in PROOF_TEXTS:
        ids = new.encode(text, add_special_tokens=False).ids
        expected = old.decode(old.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
        found = new.decode(ids, skip_special_tokens=False)
        if found != expected:
            raise StageFailed(
                f"after pruning, {text!r} is read as {found!r}", where=before, remedy="please report this tokenizer"
            )
        if twin is not None and twin.encode(text, add_special_tokens=False).ids != ids:
            raise StageFailed(
                f"{GGUF_TOKENIZER} and tokenizer.json differ on {text!r}", where=before, remedy="please report this"
            )
    return len(PROOF_TEXTS)
