"""Every family: read from its own config, scored, pruned, saved, loaded by stock transformers, written as GGUF."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from family_configs import TINY, family_of, save_tiny, tiny_module

from edgeprune.checkpoint import Checkpoint
from edgeprune.shape import shape_from_config

NAMES = list(TINY)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_real_class(name: str) -> None:
    for changes in ({}, {"tie_word_embeddings": False}, {"tie_word_embeddings": True}, {"attention_bias": True}):
        module = tiny_module(name, **changes)
        shape = shape_from_config(json.loads(module.config.to_json_string()))
        assert shape.family.name == family_of(name)
        assert shape.parameters == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_the_table_names_every_tensor_of_the_real_class(name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_tiny(tmp_path / "model", name))
    family, shape = checkpoint.shape.family, checkpoint.shape
    roles = (*family.hidden_norms, *family.head_norms, *family.attention_inputs, "output", *family.mlp_inputs, "down")
    known = {family.in_layer(i, role) for i in range(len(shape.layers)) for role in roles}
    known |= {family.embedding, family.final_norm, family.head}
    assert {tensor.rpartition(".")[0] for tensor in checkpoint.names} == known - (
        {family.head} if shape.tied else set()
    )
