"""Applies a prune plan to a checkpoint, tensor by tensor: one tensor in memory at a time beside a shard being filled.

The pruned checkpoint is a Hugging Face folder. Where all layers keep the same widths stock transformers loads it; where
they differ `edgeprune.heterogeneous` does, and stock transformers stops (`per_layer.config_widths`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from edgeprune.checkpoint import NAMED, Checkpoint
from edgeprune.errors import BadInput
from edgeprune.families import Family
from edgeprune.files import atomic_folder, write_json
from edgeprune.models import CODE_KEYS, copy_companions, copy_licence_name
from edgeprune.per_layer import KEY, absent_modules, config_widths
from edgeprune.plan import LayerPlan, PrunePlan, check
from edgeprune.shape import LayerShape, ModelShape

PLAN_FILE = "prune_plan.json"
_SHARD_BYTES = 2 << 30
_TORCH_DTYPES = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Progress = Callable[[int, int], None]
Array = NDArray[np.float32]
Replaced = Callable[[str], Array | None]


def rows_of_heads(heads: tuple[int, ...], head_dim: int) -> NDArray[np.int64]:
    """Rows of a projection that belong to `heads`: (len(heads) · head_dim,)."""
    return (np.asarray(heads, dtype=np.int64)[:, None] * head_dim + np.arange(head_dim)).reshape(-1)


def keep(role: str, tensor: Array, layer: LayerPlan, dense: LayerShape, head_dim: int) -> Array:
    """What stays of one tensor of a layer.

    Args:
        role: a field of `Family`, e.g. "query".
        tensor: the weight, (out, in), or the bias, (out,), of that role.
        layer: what the layer keeps.
        dense: widths of the layer before.
        head_dim: width of a head.
    """
    if role == "qkv":  # the rows of query, of key and of value
        ends = np.cumsum([dense.heads * head_dim, dense.kv_heads * head_dim])
        parts = zip(("query", "key", "value"), np.split(tensor, ends), strict=True)
        return np.concatenate([keep(each, rows, layer, dense, head_dim) for each, rows in parts])
    if role == "gate_up":  # the rows of gate and of up
        return np.concatenate([rows[list(layer.neurons)] for rows in np.split(tensor, 2)])
    if role == "query":
        return tensor[rows_of_heads(layer.heads, head_dim)]
    if role in ("key", "value"):
        return tensor[rows_of_heads(layer.kv_heads, head_dim)]
    if role in ("gate", "up"):
        return tensor[list(layer.neurons)]
    if tensor.ndim == 1:  # biases of output and down, and norms: as wide as the hidden state, which stays
        return tensor
    if role == "output":
        return tensor[:, rows_of_heads(layer.heads, head_dim)]
    if role == "down":
        return tensor[:, list(layer.neurons)]
    return tensor


def roles(family: Family, n_layers: int) -> dict[str, tuple[int, str]]:
    """Module path -> (layer, role) of every module that a plan changes."""
    return {
        family.in_layer(index, role): (index, role)
        for index in range(n_layers)
        for role in (*family.attention_inputs, "output", *family.mlp_inputs, "down")
    }


def pruned_tensors(
    checkpoint: Checkpoint, plan: PrunePlan, replaced: Replaced | None = None
) -> Iterator[tuple[str, Array]]:
    """The tensors of the pruned model, one after the other, by their names in the checkpoint.

    Args:
        replaced: name -> the tensor to write in place of the cut one, or None to cut.
    """
    shape = checkpoint.shape
    places = roles(shape.family, len(shape.layers))
    absent = [path for i, layer in enumerate(plan.layers) for path in absent_modules(shape.family, i, layer.widths)]
    gone = tuple(f"{path}." for path in absent)
    for name in checkpoint.names:
        if name.startswith(gone):
            continue
        new = replaced(name) if replaced else None
        if new is not None:
            yield name, new
            continue
        tensor = checkpoint.tensor(name)
        module = name.rpartition(".")[0]
        if module in places:
            index, role = places[module]
            kept = keep(role, tensor, plan.layers[index], shape.layers[index], shape.head_dim)
            tensor = np.ascontiguousarray(kept)
        yield name, tensor


def pruned_config(config: dict[str, Any], shape: ModelShape, *, dtype: str | None = None) -> dict[str, Any]:
    """`config.json` of the pruned model: `shape` is its shape; code references are left out.

    Layers alike give a plain config; widths that differ give `per_layer_config`.
    """
    changed: dict[str, Any] = {
        **config_widths(shape.layers),
        # After pruning, heads · head_dim is no longer the hidden size, so the default (hidden / heads) is wrong.
        "head_dim": shape.head_dim,
    }
    if dtype:
        changed["torch_dtype"] = dtype
    return {k: v for k, v in config.items() if k not in (*CODE_KEYS, "dtype", KEY)} | changed


def _save_shards(
    checkpoint: Checkpoint, plan: PrunePlan, folder: Path, replaced: Replaced | None, progress: Progress | None
) -> None:
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    written: list[Path] = []

    def flush() -> None:
        written.append(folder / f"model-{len(written) + 1:05d}.safetensors")
        save_file(shard, written[-1], metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, written[-1].name))
        shard.clear()

    total = 0
    for done, (name, tensor) in enumerate(pruned_tensors(checkpoint, plan, replaced), start=1):
        stored = torch.from_numpy(tensor).to(_TORCH_DTYPES[checkpoint.dtype(name)])
        if replaced and not stored.isfinite().all():
            remedy = "convert the checkpoint to BF16 or F32"
            raise BadInput(f"{name} no longer fits {checkpoint.dtype(name)}", where=checkpoint.folder, remedy=remedy)
        if shard and sum(t.nbytes for t in shard.values()) + stored.nbytes > _SHARD_BYTES:
            flush()
        shard[name] = stored
        total += stored.nbytes
        if progress:
            progress(done, len(checkpoint.names))
    flush()
    if len(written) == 1:
        written[0].rename(folder / "model.safetensors")
    else:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def prune_checkpoint(
    source: Path, plan: PrunePlan, out: Path, *, replaced: Replaced | None = None, progress: Progress | None = None
) -> Path:
    """Write the pruned checkpoint to the folder `out` (replaced when whole), in the source's number format.

    `replaced` gives weights that compensation has solved anew (see `pruned_tensors`).

    Raises:
        BadInput: the plan does not fit the checkpoint, or the disk is full.
    """
    checkpoint = Checkpoint(source)
    check(plan, checkpoint.shape)
    after = plan.shape_after(checkpoint.shape)
    dtypes = {_TORCH_DTYPES[checkpoint.dtype(name)] for name in checkpoint.names}
    dtype = str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else None
    with atomic_folder(out) as temporary:
        _save_shards(checkpoint, plan, temporary, replaced, progress)
        write_json(
            temporary / "config.json", pruned_config(checkpoint.config, after, dtype=dtype) | {NAMED: checkpoint.name}
        )
        plan.save(temporary / PLAN_FILE)
        copy_companions(source, temporary)
        copy_licence_name(source, temporary)
    return out
