"""A GGUF file becomes a Hugging Face folder: weights in float32, one in memory at a time, config and tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from edgeprune.checkpoint import GGUF_TOKENIZER
from edgeprune.errors import BadInput
from edgeprune.export.gguf_deci import DECI, ZERO_MLP, is_filler
from edgeprune.export.gguf_layout import (
    OWN_HEAD,
    ROTARY,
    WINDOWED,
    Tensor,
    architecture,
    module_name,
    paired_heads,
    runtime_attention_scale,
    tensors,
)
from edgeprune.export.gguf_writer import FILE_KEYS, rotary_factors, unpermute, write_metadata
from edgeprune.families import Family, family_for_gguf
from edgeprune.files import atomic_folder, write_json
from edgeprune.per_layer import check_layers, config_widths
from edgeprune.runtimes.gguf_file import GgufFile
from edgeprune.shape import LayerShape, ModelShape
from edgeprune.tokenizer import end_ids, save_tokenizer, special_ids

SCHEMA = 2  # of the folder: 1 named no end but the text's
_ROTARY_TOLERANCE = 1e-4  # relative; the factors are float32


def gguf_to_folder(source: Path, out: Path) -> Path:
    """Write the model in a GGUF file as a Hugging Face folder, which replaces `out`.

    The folder has `config.json`, `generation_config.json`, `model.safetensors` (float32), the tokenizer's files, and
    `tokenizer.gguf`, the source's vocabulary verbatim.

    Args:
        source: the GGUF file, of an architecture in the family table.
        out: the folder; it appears whole or not at all.

    Returns:
        `out`.

    Raises:
        BadInput: no sound GGUF file, an architecture, tensor, number format, rotary scaling or tokenizer that is not
            supported, or metadata that does not fit the tensors.
    """
    file = GgufFile(source)
    file.check_loadable()
    family = family_for_gguf(file.architecture, file.path)
    shape = _shape(file, family)
    if file.architecture not in (architecture(shape, where=source), family.gguf_per_layer):
        raise BadInput(f"widths that architecture {file.architecture!r} cannot have", where=source)
    wanted = {tensor.name: tensor for tensor in tensors(shape)}
    _check_tensors(file, wanted)
    ids = special_ids(file)
    with atomic_folder(out) as folder:
        write_json(folder / "config.json", _config(shape, ids))
        generation: dict[str, Any] = {f"{role}_token_id": ids[role] for role in _kept(ids)}
        if len(ends := end_ids(file)) > 1:
            generation["eos_token_id"] = list(ends)
        write_json(folder / "generation_config.json", generation)
        save_tokenizer(file, folder, max_length=shape.max_positions)
        general = {key: value for key, value in file.values("general.").items() if key not in FILE_KEYS}
        write_metadata(folder / GGUF_TOKENIZER, file.architecture, {**general, **file.values("tokenizer.")})
        _write_safetensors(folder / "model.safetensors", file, shape, wanted)
    return out


def _shape(file: GgufFile, family: Family) -> ModelShape:
    arch = file.architecture
    widths = _layers(file)
    hidden = _positive(file, f"{arch}.embedding_length")
    head_dim = _positive(file, f"{arch}.attention.key_length", hidden // widths[0].heads or None)
    if file.get(f"{arch}.attention.value_length", int, head_dim) != head_dim:
        raise BadInput(f"{arch}.attention.value_length is not {head_dim}", where=file.path, remedy="not supported")
    rotary = file.get(f"{arch}.rope.dimension_count", int, head_dim)
    partial = "partial_rotary_factor" in family.defaults and 0 < rotary < head_dim and rotary % 2 == 0
    if rotary != head_dim and not partial:
        raise BadInput(f"{arch}.rope.dimension_count is {rotary}", where=file.path, remedy="not supported")
    vocabulary = file.tensor("token_embd.weight").shape[0]
    if len(file.metadata.get("tokenizer.ggml.tokens", ())) != vocabulary:
        raise BadInput(f"the vocabulary does not have the embedding's {vocabulary} tokens", where=file.path)

    def biased(*roles: str) -> bool:
        return any(f"blk.{index}.{role}.bias" in file.tensors for index in range(len(widths)) for role in roles)

    # Hugging Face has one switch for q, k, v and o, and one for the MLP: what a layer lacks becomes zeros.
    attention_bias = biased("attn_q", "attn_k", "attn_v", "attn_output")
    mlp_bias = biased("ffn_gate", "ffn_up", "ffn_down")
    epsilon = "layer_norm_epsilon" if family.norm == "layer" else "layer_norm_rms_epsilon"
    ids = special_ids(file)
    shape = ModelShape(
        family=family,
        vocab=vocabulary,
        hidden=hidden,
        head_dim=head_dim,
        layers=widths,
        tied="output.weight" not in file.tensors and arch not in OWN_HEAD,
        max_positions=_positive(file, f"{arch}.context_length", 2048),
        norm_eps=_shortest(file.get(f"{arch}.attention.{epsilon}", float, 1e-5)),
        rope_theta=_shortest(file.get(f"{arch}.rope.freq_base", float, 10000.0)),
        rope_scaling=None,
        qkv_bias=attention_bias if isinstance(family.qkv_bias, str) else family.qkv_bias,
        output_bias=attention_bias if isinstance(family.output_bias, str) else family.output_bias,
        mlp_bias=mlp_bias if isinstance(family.mlp_bias, str) else family.mlp_bias,
        head_bias=family.head_bias,
        bos=ids.get("bos"),
        eos=(ids["eos"],) if "eos" in ids else (),
        partial_rotary_dim=rotary if partial else None,
    )
    shape = replace(shape, **_gemma_words(file, shape)) if arch in WINDOWED else shape
    return replace(shape, rope_scaling=_rotary_scaling(file, shape))


def _layers(file: GgufFile) -> tuple[LayerShape, ...]:
    """Widths of each layer; 0 neurons where the file has an MLP of zeros for want of one."""
    arch = file.architecture
    layers = [LayerShape(width.heads, width.kv_heads, width.neurons) for width in file.widths()]
    for index, layer in enumerate(layers):
        last = index == len(layers) - 1
        if layer.heads and layer.kv_heads:
            possible = layer.heads % layer.kv_heads == 0 and layer.neurons > 0
        else:  # `gguf_deci` tells why a last layer without anything is none
            possible = (
                arch == DECI and not layer.heads + layer.kv_heads and index > 0 and (layer.neurons > 0 or not last)
            )
        if not possible:
            raise BadInput(
                f"layer {index}: impossible widths: {layer.heads} heads, {layer.kv_heads} key/value heads, "
                f"{layer.neurons} neurons",
                where=file.path,
            )
        down = f"blk.{index}.ffn_down"
        if arch == DECI and layer.neurons == ZERO_MLP and f"{down}.bias" not in file.tensors:
            silent = not dequantised(file, f"{down}.weight").any()
            layers[index] = replace(layer, neurons=0) if silent else layer
    if arch != DECI and len(set(layers)) > 1:
        raise BadInput(f"layers of different widths in architecture {arch!r}", where=file.path)
    check_layers(layers, where=file.path)
    return tuple(layers)


def _gemma_words(file: GgufFile, shape: ModelShape) -> dict[str, Any]:
    """What Gemma's files say beside the widths, with llama.cpp's defaults: windows, soft caps, scale, local base."""
    arch, count = file.architecture, len(shape.layers)
    defaults = shape.family.defaults
    window = file.get(f"{arch}.attention.sliding_window", int, 4096 if arch == "gemma2" else 0)
    pattern = file.metadata.get(f"{arch}.attention.sliding_window_pattern", defaults["sliding_window_pattern"])
    if isinstance(pattern, np.ndarray) and len(pattern) == count:
        sliding = [bool(each) for each in pattern]
    elif type(pattern) is int and pattern >= 0:  # 0: a window in every layer
        sliding = [pattern == 0 or (index + 1) % pattern != 0 for index in range(count)]
    else:
        raise BadInput(f"{arch}.attention.sliding_window_pattern is unusable", where=file.path)
    some = 0 < window < shape.max_positions and any(sliding)  # a window as wide as the context hides nothing
    caps = {"attn_logit_softcapping": "attention_soft_cap", "final_logit_softcapping": "logit_soft_cap"}
    theta = file.get(f"{arch}.rope.freq_base_swa", float, defaults.get("rope_local_base_freq"))
    return {
        "windows": tuple(window if here else None for here in sliding) if some else (),
        "local_rope_theta": _shortest(theta) if "rope_local_base_freq" in defaults else None,
        "query_scalar": round(runtime_attention_scale(shape, arch) ** -2),
        **{name: file.get(f"{arch}.{key}", float, defaults[key]) or None for key, name in caps.items()},
    }


def _positive(file: GgufFile, key: str, default: int | None = None) -> int:
    value = file.get(key, int, default)
    if value is None or not 0 < value < 1 << 31:
        raise BadInput(f"{key} is {value!r}", where=file.path, remedy="download or convert the file again")
    return int(value)


def _shortest(value: float) -> float:
    """The shortest decimal number that float32 rounds to `value`: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rotary_scaling(file: GgufFile, shape: ModelShape) -> Mapping[str, Any] | None:
    arch = file.architecture
    kind = file.get(f"{arch}.rope.scaling.type", str, "linear")  # what llama.cpp takes it for
    if kind not in ("none", "linear"):
        raise BadInput(f"rotary scaling {kind!r} is not supported", where=file.path, remedy="supported: linear, llama3")
    if (strength := file.get(f"{arch}.rope.scaling.attn_factor", float, 1.0)) != 1.0:
        raise BadInput(f"rotary scaling with attn_factor {strength:g} is not supported", where=file.path)
    old = file.get(f"{arch}.rope.scale_linear", float, 1.0)  # the key's name in older files
    factor = _shortest(file.get(f"{arch}.rope.scaling.factor", float, old)) if kind == "linear" else 1.0
    linear = None if factor in (0.0, 1.0) else {"rope_type": "linear", "factor": factor}
    if ROTARY not in file.tensors:
        return linear
    if linear:
        raise BadInput("two kinds of rotary scaling in one file are not supported", where=file.path)
    info = file.tensor(ROTARY)
    if info.type != "F32" or info.shape != (shape.head_dim // 2,):
        raise BadInput(f"tensor {ROTARY!r} is {info.type} {info.shape}", where=file.path)
    scaling = llama3_scaling(file.tensor_bytes(ROTARY).view("<f4"), shape)
    if scaling is None:
        raise BadInput(f"tensor {ROTARY!r} is not of llama3's rotary scaling", where=file.path, remedy="not supported")
    return scaling or None


def llama3_scaling(factors: NDArray[np.float32], shape: ModelShape) -> dict[str, Any] | None:
    """The parameters of llama3's rotary scaling that give `factors`, (head_dim / 2,); {} for none, None for no fit.

    Between the two bounds the share of the plain frequency is linear in the frequency, so two factors there fix it, up
    to a common scale of the three lengths, which makes no difference; the published ones are tried first.
    """
    values = np.asarray(factors, dtype=np.float64)
    if not np.isfinite(values).all() or (values <= 0).any():
        return None
    if np.allclose(values, 1.0, rtol=_ROTARY_TOLERANCE):
        return {}
    for candidate in (8.0, 32.0, _shortest(values.max())):
        solved = (_solve(values, candidate, shape, digits) for digits in (2, 4, 6))  # round numbers are likelier
        for low, high, length in ((1.0, 4.0, 8192), *solved):
            scaling = {
                "rope_type": "llama3",
                "factor": candidate,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": length,
            }
            if length > 0 and high > low > 0:
                trial = rotary_factors(replace(shape, rope_scaling=scaling))
                if np.allclose(trial, values, rtol=_ROTARY_TOLERANCE):
                    return scaling
    return None


def _solve(values: NDArray[np.float64], factor: float, shape: ModelShape, digits: int) -> tuple[float, float, int]:
    """Bounds, the upper one to so many decimals, and original length of factors between 1 and `factor`; (0, 0, 0) when
    fewer than two lie between."""
    between = (values > 1.0 + 1e-6) & (values < factor * (1 - 1e-6))
    if between.sum() < 2:
        return 0.0, 0.0, 0
    exponent = np.arange(0, shape.head_dim, 2, dtype=np.float64) / shape.head_dim
    frequencies = (shape.rope_theta**-exponent)[between]
    share = (1 / values[between] - 1 / factor) / (1 - 1 / factor)
    slope, start = np.polyfit(frequencies, share, 1)
    if start >= 0 or slope <= 0:
        return 0.0, 0.0, 0
    high = round(1 - 1 / start, digits)
    return 1.0, high, round(slope * 2 * math.pi * (high - 1.0))


def _check_tensors(file: GgufFile, wanted: Mapping[str, Tensor]) -> None:
    for name, info in file.tensors.items():
        if name == ROTARY:
            continue
        if name not in wanted:
            raise BadInput(f"tensor {name!r} has no place in architecture {file.architecture!r}", where=file.path)
        if info.shape != wanted[name].shape:
            raise BadInput(f"tensor {name!r} has shape {info.shape}, not {wanted[name].shape}", where=file.path)
    for name in wanted:
        if name not in file.tensors and not name.endswith(".bias"):
            file.tensor(name)


def _kept(ids: Mapping[str, int]) -> list[str]:
    return [role for role in ("bos", "eos", "pad") if role in ids]


def _config(shape: ModelShape, ids: Mapping[str, int]) -> dict[str, Any]:
    family = shape.family
    return {
        "architectures": [family.class_name],
        "model_type": family.model_types[0],
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "num_hidden_layers": len(shape.layers),
        **config_widths(shape.layers),
        "head_dim": shape.head_dim,
        family.activation_key: family.activation,
        "max_position_embeddings": shape.max_positions,
        family.norm_eps_key: shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": shape.rope_scaling,
        **family_words(shape),
        "tie_word_embeddings": shape.tied,
        "torch_dtype": "float32",
        **{f"{role}_token_id": ids.get(role) for role in ("bos", "eos", "pad")},
    }


def family_words(shape: ModelShape) -> dict[str, Any]:
    """The words of a config.json that not every family has: biases, partial rotary, windows, soft caps, scale."""
    family = shape.family
    switches = {family.qkv_bias: shape.qkv_bias, family.mlp_bias: shape.mlp_bias}
    words: dict[str, Any] = {key: value for key, value in switches.items() if isinstance(key, str)}
    own = {
        "partial_rotary_factor": shape.rotary_dim / shape.head_dim,
        "rope_local_base_freq": shape.local_rope_theta,
        "query_pre_attn_scalar": shape.query_scalar,
        "attn_logit_softcapping": shape.attention_soft_cap,
        "final_logit_softcapping": shape.logit_soft_cap,
    }
    words |= {key: value for key, value in own.items() if key in family.defaults}
    if family.windows != "none":
        words["sliding_window"] = shape.narrowest_window
    if family.windows == "above":
        words["use_sliding_window"] = shape.narrowest_window is not None
    if family.windows in ("above", "alternating"):
        windows = (shape.window(index) for index in range(len(shape.layers)))
        words["layer_types"] = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return words


def dequantised(file: GgufFile, name: str) -> NDArray[np.float32]:
    """A tensor of a GGUF file as float32, in its row-major shape.

    Raises:
        BadInput: there is no such tensor, it has a number format that cannot be read, or values that are not numbers.
    """
    info = file.tensor(name)
    try:
        rows = file.tensor_bytes(name).reshape(math.prod(info.shape[:-1]), -1)
        values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[info.type])
    except (KeyError, NotImplementedError) as error:
        raise BadInput(f"tensor {name!r} has type {info.type}, which cannot be read", where=file.path) from error
    found = np.asarray(values, dtype=np.float32).reshape(info.shape)
    if not np.isfinite(found).all():
        raise BadInput(f"tensor {name!r} has values that are not numbers", where=file.path)
    return found


def _weights(
    file: GgufFile, shape: ModelShape, wanted: Mapping[str, Tensor]
) -> Iterator[tuple[str, NDArray[np.float32]]]:
    for name, tensor in wanted.items():
        if name == ROTARY or is_filler(name, shape):
            continue
        values = dequantised(file, name) if name in file.tensors else np.zeros(tensor.shape, dtype=np.float32)
        if name.endswith("_norm.weight") and shape.family.norm_offset:
            values = values - np.float32(shape.family.norm_offset)
        if heads := paired_heads(name, shape):
            values = unpermute(values, heads)
        yield module_name(name, shape), values


def _write_safetensors(path: Path, file: GgufFile, shape: ModelShape, wanted: Mapping[str, Tensor]) -> None:
    """Write the weights one after the other; the library's writer would hold all of them in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in wanted.items():
        if name != ROTARY and not is_filler(name, shape):
            size = 4 * math.prod(tensor.shape)
            header[module_name(name, shape)] = {
                "dtype": "F32",
                "shape": list(tensor.shape),
                "data_offsets": [at, at + size],
            }
            at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, values in _weights(file, shape, wanted):
            np.ascontiguousarray(values, dtype="<f4").tofile(stream)
