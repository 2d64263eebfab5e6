"""Reading and writing Hugging Face folders whole: the baselines are for small models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from edgeprune.checkpoint import Checkpoint
from edgeprune.files import atomic_folder, write_json
from edgeprune.models import copy_companions


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder in float32, by name, without a tied head's copy."""
    checkpoint = Checkpoint(folder)
    copy = f"{checkpoint.shape.family.head}.weight" if checkpoint.shape.tied else None
    return {name: torch.from_numpy(checkpoint.tensor(name)) for name in checkpoint.names if name != copy}


def parameters_of(folder: Path) -> int:
    """Parameters in the files of a folder; a tied head counts once."""
    checkpoint = Checkpoint(folder)
    copy = f"{checkpoint.shape.family.head}.weight" if checkpoint.shape.tied else None
    sizes = (checkpoint.dimensions(name) for name in checkpoint.names if name != copy)
    return sum(torch.Size(size).numel() for size in sizes)


def save_folder(source: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], out: Path) -> Path:
    """Write `tensors` in float32 with `config` and the tokenizer of `source` to the folder `out`."""
    with atomic_folder(out) as temporary:
        whole = {name: tensor.to(torch.float32).contiguous() for name, tensor in tensors.items()}
        save_file(whole, temporary / "model.safetensors", metadata={"format": "pt"})
        plain = {key: value for key, value in config.items() if key not in ("auto_map", "dtype")}
        write_json(temporary / "config.json", {**plain, "torch_dtype": "float32"})
        copy_companions(source, temporary)
    return out
