"""ShortGPT (arXiv 2403.03853): the layers that change the hidden state least leave whole.

Block influence (eq. 1): one minus the mean cosine between a token's hidden state before and after the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from edgeprune.calibration import TextSet
from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import BadInput
from edgeprune.importance import batches
from edgeprune.models import Model, load
from rivals.folders import save_folder, tensors_of

_TOKENS_AT_ONCE = 4096


def cosines(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Cosine between the rows of two (tokens, hidden) matrices: (tokens,), float64."""
    return torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)


@torch.inference_mode()
def block_influence(model: Model, texts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Block influence of every layer, (layers,), float64."""
    family, count = model.shape.family, len(model.shape.layers)
    sums = torch.zeros(count, dtype=torch.float64)
    mask = torch.empty(0)
    handles = []

    def compare(index: int) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            real = mask.bool()
            sums[index] += cosines(inputs[0][real], after[real]).sum()

        return hook

    for index in range(count):
        layer = model.module.get_submodule(f"{family.layers}.{index}")
        handles.append(layer.register_forward_hook(compare(index)))
    try:
        body = model.module.get_submodule(family.layers.rpartition(".")[0])
        for ids, mask in batches(texts, _TOKENS_AT_ONCE):
            body(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return 1 - sums / sum(len(text) for text in texts)


def layers_to_keep(influence: torch.Tensor, drop: int) -> list[int]:
    """Which layers stay when the `drop` of least influence leave; of equal ones the first leaves."""
    gone = set(torch.argsort(influence, stable=True)[:drop].tolist())
    return [index for index in range(len(influence)) if index not in gone]


def prune(folder: Path, ratio: float, calibration: TextSet, out: Path) -> Path:
    """As many layers leave as come nearest to `ratio` of all parameters.

    Raises:
        BadInput: that would be all layers.
    """
    model = load(folder)
    shape, family = model.shape, model.shape.family
    count = len(shape.layers)
    one_less = shape.with_layers(shape.layers[1:]).parameters
    drop = round(ratio * shape.parameters / (shape.parameters - one_less))
    if drop >= count:
        raise BadInput(f"ratio {ratio} would drop all {count} layers", remedy="ask for less")
    kept = layers_to_keep(block_influence(model, calibration.begun), drop)
    places = {f"{family.layers}.{old}.": f"{family.layers}.{new}." for new, old in enumerate(kept)}
    tensors = {}
    for name, tensor in tensors_of(folder).items():
        if not name.startswith(f"{family.layers}."):
            tensors[name] = tensor
            continue
        old = next((prefix for prefix in places if name.startswith(prefix)), None)
        if old is not None:
            tensors[places[old] + name.removeprefix(old)] = tensor
    config = dict(Checkpoint(folder).config)
    config["num_hidden_layers"] = len(kept)
    types = getattr(model.module.config, "layer_types", None)
    if types:  # which layers have a window goes with the layer, not with its new number
        config["layer_types"] = [types[index] for index in kept]
    return save_folder(folder, tensors, config, out)
