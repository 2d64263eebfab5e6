"""Writes a checkpoint folder again with other values in its weights: same files, names and number formats."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import BadInput, StageFailed

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NOT_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".py"}  # weights, and what can run code

Change = Callable[[Tensor], Tensor]  # from the old value, float32, to the new


def write_like(source: Path, changes: Mapping[str, Change], folder: Path, *, prefix: str = "") -> None:
    """Write into `folder` (which exists) all that is in `source`, with some of its tensors changed.

    Args:
        source: a checkpoint folder.
        changes: tensor name -> what gives its new value, of the old shape; all other tensors stay as they are.
        folder: where to write; one file of tensors is in memory at a time.
        prefix: a part of names that the folder may have and `changes` not, or the other way ("model.").

    Raises:
        BadInput: the source is broken, or a new value leaves its number format's range.
        StageFailed: a change has no place in the source, or another shape.
    """
    checkpoint = Checkpoint(source)
    places = {_find(name, checkpoint, prefix): change for name, change in changes.items()}
    for file in checkpoint.files:
        shard = {}
        for name in checkpoint.names_in(file):
            old = torch.from_numpy(checkpoint.tensor(name))
            new = places[name](old).detach().cpu() if name in places else old
            if new.shape != old.shape:
                raise StageFailed(f"{name} has become {tuple(new.shape)}, was {tuple(old.shape)}", where=source)
            shard[name] = new.to(_DTYPES[checkpoint.dtype(name)], copy=True)  # tied tensors must not share memory
            if name in places and not shard[name].isfinite().all():
                remedy = "convert the checkpoint to BF16 or F32"
                raise BadInput(f"{name} no longer fits {checkpoint.dtype(name)}", where=source, remedy=remedy)
        save_file(shard, folder / file.name, metadata={"format": "pt"})
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith(".") and file.suffix not in _NOT_COPIED:
            shutil.copyfile(file, folder / file.name)


def _find(name: str, checkpoint: Checkpoint, prefix: str) -> str:
    """The folder's name of a tensor."""
    for candidate in (name, prefix + name, name.removeprefix(prefix)):
        if candidate in checkpoint:
            return candidate
    raise StageFailed(f"{name} was trained and is not in the folder", where=checkpoint.folder)
