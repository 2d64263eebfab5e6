"""Models whose layers have different widths, in stock transformers: stock classes, one config a layer.

transformers reads `per_layer_config` (see `per_layer`) into its config, and no model of it heeds it yet. Here each
layer is made by the stock decoder layer's own class from a copy of the config with that layer's widths; a part that is
absent becomes a module without weights that adds nothing.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeprune.errors import missing_extra, unknown
from edgeprune.families import family_for
from edgeprune.per_layer import WIDTHS, absent_modules
from edgeprune.shape import LayerShape, ModelShape, shape_from_config

try:
    import transformers
    from transformers.modeling_utils import no_init_weights
except ImportError as error:
    raise missing_extra("transformers", "prune") from error


class NoAttention(nn.Module):
    """Stands where a layer has no attention: adds zeros, keeps nothing in the cache.

    Args:
        replaced: the attention whose place it takes. Some layers ask theirs for constants (`is_sliding`).
    """

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        for name, value in vars(replaced).items():
            if not name.startswith("_") and isinstance(value, (bool, int, float, str)):
                setattr(self, name, value)

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        """Zeros like `hidden_states`, (batch, tokens, hidden), and no attention weights."""
        return torch.zeros_like(hidden_states), None


class NoMlp(nn.Module):
    """Stands where a layer has no MLP: adds zeros."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Zeros like `hidden_states`, (batch, tokens, hidden)."""
        return torch.zeros_like(hidden_states)


def layer_module(
    config: Any,
    index: int,
    widths: LayerShape,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """One decoder layer of the stock class with these widths; its weights are not initialised.

    Args:
        config: a config of transformers, of a family in the table; it is not changed.
        index: which layer: it decides the place in the cache and, in some families, the kind of attention.
        widths: heads, key/value heads and neurons; 0 for a part that the layer lacks.
        device: where the weights are; "meta" takes no memory.
        dtype: their number format.

    Raises:
        BadInput: a family or a kind of config that is not supported.
    """
    # Names follow the stock class, so a state dict of `<layers>.<index>.*` with that prefix cut off loads into it.
    kind: Any = type(config)
    layer_class, attention = _stock_layer(kind)
    local = copy.deepcopy(config)
    local.head_dim = shape_of(config).head_dim  # else it would follow from the heads of this layer
    for key, field in WIDTHS.items():
        # The class must be made with some width even where the part is thrown away just after.
        setattr(local, key, getattr(widths, field) or 1)
    if getattr(local, "_attn_implementation", None) is None:
        # What the stock model chooses; a layer alone would have none. Only eager attention applies a soft cap.
        local._attn_implementation = "eager" if shape_of(config).attention_soft_cap else attention
    with torch.device(device), no_init_weights():
        layer: nn.Module = layer_class(local, index).to(dtype)
    family = family_for(config.model_type)
    prefix = f"{family.layers}.{index}."
    attention_path = family.in_layer(index, "output").rpartition(".")[0]
    mlp_path = family.in_layer(index, "down").rpartition(".")[0]
    for path in absent_modules(family, index, widths):
        inside = path.removeprefix(prefix)
        if path == attention_path:
            layer.set_submodule(inside, NoAttention(layer.get_submodule(inside)))
        else:
            layer.set_submodule(inside, NoMlp() if path == mlp_path else nn.Identity())
    return layer


def model_class(config: Any) -> type[Any]:
    """A subclass of the stock causal language model of `config`'s type whose layers have widths of their own.

    It is used as the stock class is: `model_class(config).from_pretrained(folder)`, `model_class(config)(config)`.

    Raises:
        BadInput: a kind of config that is not supported.
    """
    stock: Any = _stock_class(type(config))
    subclass: type[Any] = _subclass(stock)
    return subclass


def build(config: Any) -> nn.Module:
    """The model of `config`, which may have `per_layer_config`, with weights not initialised, on the default device.

    Raises:
        BadInput: a family or widths that are not supported.
    """
    with no_init_weights():
        model: nn.Module = model_class(config)(config)
    return model.eval()


def stock_skeleton(config: Any) -> nn.Module:
    """The stock model of `config` with layers one head and one neuron wide: what surrounds the layers, nearly free.

    Weights are not initialised; `config` is not changed.

    Raises:
        BadInput: a kind of config that is not supported.
    """
    local = copy.deepcopy(config)
    for key in WIDTHS:
        setattr(local, key, 1)
    local.head_dim = shape_of(config).head_dim  # else it would follow from the one head
    with no_init_weights():
        skeleton: nn.Module = _stock_class(type(config))(local)
    return skeleton.eval()


def load_checkpoint(folder: str | Path) -> nn.Module:
    """The float32 model of a Hugging Face folder, whether its layers are alike or not, in evaluation mode.

    It has all that a stock model has: `generate`, a cache, `save_pretrained`.

    Raises:
        BadInput: no or pickled weights, weights that do not match the config, or what transformers cannot load.
    """
    from edgeprune.runtimes.pytorch import load_model

    model: nn.Module = load_model(Path(folder))
    return model


def shape_of(config: Any) -> ModelShape:
    """The shape of a config of transformers; raises `BadInput` as `shape.shape_from_config` does."""
    return shape_from_config(config.to_dict())


def _stock_class(config_class: type[Any]) -> type[Any]:
    known = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if config_class not in known:
        raise unknown("config of a causal language model", config_class.__name__, [each.__name__ for each in known])
    found: type[Any] = known[config_class]
    return found


@functools.cache
def _stock_layer(config_class: Any) -> tuple[Callable[[Any, int], nn.Module], str]:
    """The stock decoder layer's class, and the attention implementation that the stock model takes by itself."""
    config = config_class()
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    with torch.device("meta"):
        model = _stock_class(config_class)(config)
    layer = model.get_submodule(f"{family_for(config.model_type).layers}.0")
    return type(layer), model.config._attn_implementation


@functools.cache
def _subclass(stock: Any) -> type[Any]:
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        shape = shape_of(config)
        before = dict(vars(config))
        # The stock layers are thrown away: made as narrow as can be, they cost nothing.
        for key in WIDTHS:
            setattr(config, key, 1)
        config.head_dim = shape.head_dim  # else it would follow from the one head
        try:
            stock.__init__(self, config, *args, **kwargs)
        finally:
            for key in (*WIDTHS, "head_dim"):
                if key in before:
                    setattr(config, key, before[key])
                else:
                    delattr(config, key)
        weight = self.get_input_embeddings().weight
        layers = self.get_submodule(shape.family.layers)
        for index, widths in enumerate(shape.layers):
            layers[index] = layer_module(config, index, widths, device=weight.device, dtype=weight.dtype)
        self.post_init()  # initialises them, unless weights are about to be read

    # The stock name, so that `save_pretrained` writes it into `architectures`.
    return type(stock.__name__, (stock,), {"__init__": __init__, "__module__": stock.__module__})
