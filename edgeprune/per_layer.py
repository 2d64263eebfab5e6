"""Widths that differ from layer to layer, as `config.json` holds them.

The schema is that of transformers' heterogeneous configurations (huggingface/transformers pull request 45333):
`per_layer_config` maps a layer's index to what differs from the rest of the config, sparsely; a missing part is named
in the layer's `skip`, a list of "attention" and "mlp", and leaves the file together with the norm before it::

    "per_layer_config": {"03": {"intermediate_size": 1024}, "17": {"skip": ["attention"]}}

Pure data, no torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgeprune.errors import BadInput

if TYPE_CHECKING:
    from edgeprune.families import Family
    from edgeprune.shape import LayerShape

KEY = "per_layer_config"
MOST_LAYERS = 4096  # a config is read before any tensor, and must not decide alone how much memory that takes
ATTENTION, MLP = "attention", "mlp"  # what `skip` can name
# Key of config.json -> field of LayerShape.
WIDTHS = {"num_attention_heads": "heads", "num_key_value_heads": "kv_heads", "intermediate_size": "neurons"}
_REMEDY = "the checkpoint was written for other software; supported: " + ", ".join((*WIDTHS, "skip"))


def read_layers(
    config: Mapping[str, Any], general: LayerShape, count: int, *, where: object = "config.json"
) -> tuple[LayerShape, ...]:
    """The widths of each layer.

    Args:
        config: the whole `config.json`.
        general: widths of the layers that `per_layer_config` does not speak of.
        count: number of layers.
        where: names the file in errors.

    Returns:
        (count,) widths; 0 heads and key/value heads where attention is skipped, 0 neurons where the MLP is.

    Raises:
        BadInput: a layer that there is not or that is there twice, an override that is not known, an impossible width.
    """
    if count > MOST_LAYERS:
        raise BadInput(f"{count} layers are more than {MOST_LAYERS}", where=where, remedy="give a model's own config")
    layers = [general] * count
    entries = config.get(KEY)
    if entries is None:
        return tuple(layers)
    if not isinstance(entries, Mapping):
        raise BadInput(f"{KEY} is not a mapping", where=where, remedy=_REMEDY)
    seen: set[int] = set()
    for key, overrides in entries.items():
        index = _index(key)
        if index is None or index >= count or index in seen:
            raise BadInput(f"{KEY}: {key!r} is not one of {count} layers, each once", where=where)
        seen.add(index)
        if not isinstance(overrides, Mapping):
            raise BadInput(f"{KEY}: layer {index} is not a mapping", where=where, remedy=_REMEDY)
        layers[index] = _layer(config, general, overrides, index, where)
    return tuple(layers)


def _index(key: object) -> int | None:
    # JSON has no integer keys: transformers writes "03", and a config in memory may hold 3.
    if isinstance(key, str):
        return int(key) if key.isascii() and key.isdigit() and len(key) < 10 else None
    return key if type(key) is int and key >= 0 else None


def _layer(
    config: Mapping[str, Any], general: LayerShape, overrides: Mapping[str, Any], index: int, where: object
) -> LayerShape:
    widths = {}
    for name, value in overrides.items():
        if name in WIDTHS:
            if type(value) is not int or not 0 < value < 1 << 31:
                raise BadInput(f"{KEY}: layer {index}: {name} is {value!r}, not a positive integer", where=where)
            widths[WIDTHS[name]] = value
        elif name != "skip" and (name not in config or config[name] != value):
            raise BadInput(f"{KEY}: layer {index}: {name!r} is not supported", where=where, remedy=_REMEDY)
    if "heads" in widths and config.get("num_key_value_heads") is None:
        widths.setdefault("kv_heads", widths["heads"])  # where none is said, every query head has its own
    skip = overrides.get("skip") or []
    if not isinstance(skip, (list, tuple)) or not set(map(str, skip)) <= {ATTENTION, MLP}:
        raise BadInput(f"{KEY}: layer {index}: skip is {skip!r}", where=where, remedy=f"known: {ATTENTION}, {MLP}")
    if ATTENTION in skip:
        widths |= {"heads": 0, "kv_heads": 0}
    if MLP in skip:
        widths |= {"neurons": 0}
    return replace(general, **widths)


def check_layers(layers: Sequence[LayerShape], *, where: object) -> None:
    """Check that widths of layers make a model that runs.

    Raises:
        BadInput: query heads that key/value heads cannot share, no attention in layer 0, off which runtimes read the
            length of the cache, or no MLP in any layer.
    """
    for index, layer in enumerate(layers):
        if bool(layer.heads) != bool(layer.kv_heads) or (layer.heads and layer.heads % layer.kv_heads):
            raise BadInput(
                f"layer {index}: {layer.heads} query heads cannot be shared by {layer.kv_heads} key/value heads",
                where=where,
            )
    if not layers[0].heads:
        raise BadInput("layer 0 has no attention", where=where, remedy="keep at least one head there")
    if not any(layer.neurons for layer in layers):
        raise BadInput("no layer has an MLP", where=where, remedy="keep at least one neuron")


def config_widths(layers: tuple[LayerShape, ...]) -> dict[str, Any]:
    """The keys of `config.json` that give `layers`: what `read_layers` reads back.

    Layers that are alike need no `per_layer_config` and get none. Otherwise the general widths are the widest, except
    where a layer lacks the part: then the general width is one that no layer has. Software that does not know
    `per_layer_config` would find tensors missing, fill them with random numbers and go on; so it meets tensors of
    another size instead, and stops.
    """
    attention = [layer for layer in layers if layer.heads]
    neurons = [layer.neurons for layer in layers if layer.neurons]
    widest = max(attention, key=lambda layer: (layer.heads, layer.kv_heads), default=None)
    general = {
        "num_attention_heads": widest.heads if widest else 1,
        "num_key_value_heads": widest.kv_heads if widest else 1,
        "intermediate_size": max(neurons, default=1),
    }
    if len(attention) < len(layers):
        general["num_key_value_heads"] = _unused(layer.kv_heads for layer in attention)
    if len(neurons) < len(layers):
        general["intermediate_size"] = _unused(neurons)
    digits = len(str(len(layers) - 1))
    entries: dict[str, dict[str, Any]] = {}
    for index, layer in enumerate(layers):
        entry: dict[str, Any] = {
            key: getattr(layer, field)
            for key, field in WIDTHS.items()
            if getattr(layer, field) not in (0, general[key])  # sparse, as transformers writes it
        }
        skip = [name for name, width in ((ATTENTION, layer.heads), (MLP, layer.neurons)) if not width]
        if skip:
            entry["skip"] = skip
        if entry:
            entries[str(index).zfill(digits)] = entry
    return {**general, KEY: entries} if entries else dict(general)


def _unused(widths: Iterable[int]) -> int:
    taken = set(widths)
    return next(width for width in itertools.count(1) if width not in taken)


def absent_modules(family: Family, index: int, widths: LayerShape) -> tuple[str, ...]:
    """Module paths that layer `index` lacks for want of attention or an MLP, and the norms only that part has."""
    before = family.mlp_norm or family.attention_norm  # a parallel block has one norm for both
    parts = (
        (widths.heads, family.output, (family.attention_norm, family.attention_post_norm)),
        (widths.neurons, family.down, (before, family.mlp_post_norm)),
    )
    inside = [module.rpartition(".")[0] for width, module, _ in parts if not width]
    read = {norm for width, _, norms in parts if width for norm in norms}
    inside += [norm for width, _, norms in parts if not width for norm in norms if norm and norm not in read]
    return tuple(f"{family.layers}.{index}.{path}" for path in dict.fromkeys(inside))
