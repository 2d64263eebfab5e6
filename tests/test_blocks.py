"""A model run layer by layer, half by half, says what the stock model says, in every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family_configs import TINY, save_tiny

from edgeprune.blocks import HALVES, LayeredModel
from edgeprune.checkpoint import Checkpoint
from edgeprune.models import load


@torch.inference_mode()
def run(model: LayeredModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits of `ids`, (windows, length, vocabulary), by the halves of each layer."""
    residual = model.embed(ids)
    for index in range(len(model.shape.layers)):
        block = model.block(index)
        read = residual
        for half in HALVES:
            inner = block.inner(half, read)
            residual = residual + block.added(half, block.projection(half)(inner).float())
            if not model.family.parallel:
                read = residual
    return model.head().logits(residual.flatten(0, 1)).unflatten(0, ids.shape)


@pytest.mark.parametrize("name", TINY)
def test_halves_of_layers_add_up_to_the_stock_model(tmp_path: Path, name: str) -> None:
    folder = save_tiny(tmp_path, name)
    ids = torch.randint(10, 250, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        module = load(folder).module
        expected = module(input_ids=ids).logits
    got = run(LayeredModel(Checkpoint(folder)), ids)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_bfloat16_is_near(tmp_path: Path, name: str) -> None:
    folder = save_tiny(tmp_path, name)
    ids = torch.randint(10, 250, (2, 40), generator=torch.Generator().manual_seed(1))
    exact = run(LayeredModel(Checkpoint(folder)), ids)
    rounded = run(LayeredModel(Checkpoint(folder), dtype=torch.bfloat16), ids)
    assert (exact - rounded).abs().max() < 0.05 * exact.abs().max()
