"""Writes a Hugging Face folder as a GGUF file, tensor by tensor, for stock llama.cpp.

The folder need not be one of ours. `gguf_layout` knows what each family's architecture is made of. Architectures have
one width for all layers, but for `gguf_deci`'s; `llama` and that one have q and k with their rotary pairs next to each
other, where Hugging Face has halves.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeprune.checkpoint import GGUF_TOKENIZER, UNUSED, Checkpoint
from edgeprune.errors import BadInput, missing_extra
from edgeprune.export.gguf_deci import is_filler, width_values
from edgeprune.export.gguf_layout import (
    ROTARY,
    WINDOWED,
    Source,
    Tensor,
    architecture,
    biased,
    longest_context,
    paired_heads,
    query_factor,
    scaled_role,
    source,
    tensors,
)
from edgeprune.export.gguf_types import QUANTISATIONS
from edgeprune.files import atomic_file
from edgeprune.models import stated_licence
from edgeprune.runtimes.gguf_file import GgufFile, Value, ValueType
from edgeprune.shape import ModelShape, rotary_frequencies

try:
    import gguf
except ImportError as error:
    raise missing_extra("gguf", "prune") from error

_PHI3 = re.compile("phi-?3", re.IGNORECASE)
# Of a source's `general.*` these describe the file, not the model.
FILE_KEYS = {
    "general.architecture",
    "general.alignment",
    "general.file_type",
    "general.quantization_version",
    "general.size_label",
}


def permute(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of q or k (weights (heads * head_dim, n) or bias (heads * head_dim,)) from halves to rotary pairs."""
    pairs = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def unpermute(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """The inverse of `permute`."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def write_gguf(folder: Path, out: Path, *, dtype: Literal["F16", "F32"] = "F16") -> Path:
    """Write the checkpoint in `folder` to the GGUF file `out`; norms and biases stay F32.

    The tokenizer is the folder's `tokenizer.gguf` verbatim; without one it is rebuilt from the Hugging Face tokenizer
    and proved to give the same ids in llama.cpp.

    Args:
        folder: Hugging Face format, safetensors.
        out: the file to write; it appears whole or not at all.
        dtype: of the matrices.

    Returns:
        `out`.

    Raises:
        BadInput: the folder is no sound checkpoint of a supported family, has layers of different widths, values that
            F16 cannot hold, or a tokenizer that has no GGUF form.
        StageFailed: the rebuilt tokenizer gives other ids.
    """
    if dtype not in ("F16", "F32"):
        raise BadInput(f"dtype {dtype!r}", remedy="give F16 or F32, then quantise")
    checkpoint = Checkpoint(folder)
    shape = checkpoint.shape
    arch = architecture(shape, where=folder)
    listing = _listing(checkpoint)
    general = _general(checkpoint)
    metadata = general | _architecture(checkpoint, dtype) | _tokenizer(checkpoint, out, general)
    with atomic_file(out) as temporary:
        writer = gguf.GGUFWriter(temporary, arch)
        try:
            _put(writer, metadata)
            for tensor in listing:
                kind = np.dtype(_dtype(tensor, dtype))
                size = int(np.prod(tensor.shape)) * kind.itemsize
                writer.add_tensor_info(tensor.name, tensor.shape, kind, size)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in listing:
                writer.write_tensor_data(_values(checkpoint, tensor, dtype))
        finally:
            writer.close()
    return out


def write_metadata(out: Path, architecture: str, values: Mapping[str, Value]) -> Path:
    """Write a GGUF file without tensors that holds `values`."""
    with atomic_file(out) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        try:
            _put(writer, values)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
    return out


def _put(writer: gguf.GGUFWriter, values: Mapping[str, Value]) -> None:
    def raw(value: Any) -> Any:
        try:
            return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
        except UnicodeEncodeError as error:
            raise BadInput(f"text that is no Unicode ({value[error.start : error.end]!r})", where=key) from error

    for key, (value, kind, item) in values.items():
        plain = value.tolist() if isinstance(value, np.ndarray) else value
        if kind is ValueType.ARRAY:
            if not plain:  # the writer cannot write an empty array, and one says nothing
                continue
            plain = [raw(each) for each in plain]
        writer.add_key_value(
            key,
            raw(plain),
            gguf.GGUFValueType(kind),
            None if item is None else gguf.GGUFValueType(item),
        )


def _listing(checkpoint: Checkpoint) -> list[Tensor]:
    """The tensors to write, each found in the checkpoint with the shape it must have, and none left over."""
    shape = checkpoint.shape
    listing = list(tensors(shape))
    listed = {tensor.name for tensor in listing}
    for tensor in [tensor for tensor in listing if tensor.name.startswith("blk.") and len(tensor.shape) == 2]:
        # A bias the config does not speak of is still a bias: compensation may add one where there was none.
        bias = Tensor(tensor.name.removesuffix("weight") + "bias", tensor.shape[:1])
        room = biased(tensor.name.split(".")[2], architecture(shape))
        if room and bias.name not in listed and source(bias.name, shape).name in checkpoint:
            listing.append(bias)
    known = {f"{shape.family.head}.weight"}  # beside a tied embedding it is a copy
    for tensor in listing:
        if tensor.name == ROTARY or is_filler(tensor.name, shape):
            continue
        place = source(tensor.name, shape)
        found = checkpoint.dimensions(place.name)
        expected = (tensor.shape[0] if place.of is None else place.of, *tensor.shape[1:])
        if found != expected:
            raise BadInput(
                f"tensor {place.name!r} has shape {found}, not {expected}",
                where=checkpoint.folder,
                remedy="the checkpoint does not match its config.json",
            )
        known.add(place.name)
    extra = [name for name in checkpoint.names if name not in known and not name.endswith(UNUSED)]
    if extra:
        raise BadInput(
            f"tensor {extra[0]!r} has no place in a {shape.family.name} model of architecture {architecture(shape)!r}",
            where=checkpoint.folder,
        )
    return listing


def _dtype(tensor: Tensor, dtype: str) -> type[np.floating[Any]]:
    return np.float16 if dtype == "F16" and len(tensor.shape) > 1 else np.float32


def _values(checkpoint: Checkpoint, tensor: Tensor, dtype: str) -> NDArray[Any]:
    shape = checkpoint.shape
    if tensor.name == ROTARY:
        return rotary_factors(shape)
    if is_filler(tensor.name, shape):
        # A norm of ones: whatever comes out of it, the matrices behind it make zeros of it.
        return np.full(tensor.shape, float(len(tensor.shape) == 1), dtype=_dtype(tensor, dtype))
    place = source(tensor.name, shape)
    values = _rows(checkpoint.tensor(place.name), place, tensor.shape[0])
    role, suffix = tensor.name.split(".")[-2:]
    if role.endswith("_norm") and suffix == "weight" and shape.family.norm_offset:
        values = values + np.float32(shape.family.norm_offset)  # llama.cpp multiplies by the weight as it is
    if role == scaled_role(shape) and (factor := query_factor(shape)) != 1.0:
        values = values * np.float32(factor)
    if heads := paired_heads(tensor.name, shape):
        values = permute(values, heads)
    kind = _dtype(tensor, dtype)
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(values, dtype=kind)
    if not np.isfinite(converted).all():
        finite = bool(np.isfinite(values).all())
        raise BadInput(
            f"tensor {place.name!r} has values {'that F16 cannot hold' if finite else 'that are not numbers'}",
            where=checkpoint.folder,
            remedy="write F32" if finite else "the checkpoint is damaged",
        )
    return converted


def _rows(values: NDArray[Any], place: Source, count: int) -> NDArray[Any]:
    return values if place.of is None else values[place.start : place.start + count]


def rotary_factors(shape: ModelShape) -> NDArray[np.float32]:
    """What llama.cpp divides the rotary frequencies by, (rotary_dim / 2,): plain frequencies over scaled ones."""
    exponent = np.arange(0, shape.rotary_dim, 2, dtype=np.float64) / shape.rotary_dim
    return (shape.rope_theta**-exponent / rotary_frequencies(shape)).astype(np.float32)


def _general(checkpoint: Checkpoint) -> dict[str, Value]:
    values = {"general.type": Value("model", ValueType.STRING)}
    source = checkpoint.folder / GGUF_TOKENIZER
    if source.is_file():
        values |= {key: value for key, value in GgufFile(source).values("general.").items() if key not in FILE_KEYS}
    values.setdefault("general.name", Value(checkpoint.name, ValueType.STRING))
    license_name = stated_licence(checkpoint.folder)
    if license_name:
        values.setdefault("general.license", Value(license_name, ValueType.STRING))
    return values


def _readable_name(name: str, *, strips: bool) -> str:
    """A name under which llama.cpp reads the tokenizer as it is: with "phi-3" or "phi3" in it, and only then, special
    tokens take the space after them away (llama-vocab.cpp)."""
    if strips:
        return name if _PHI3.search(name) else f"{name} (phi-3 tokenizer)"
    return _PHI3.sub("phi 3", name)


def _architecture(checkpoint: Checkpoint, dtype: str) -> dict[str, Value]:
    shape = checkpoint.shape
    arch = architecture(shape)
    whole: dict[str, int] = {
        "block_count": len(shape.layers),
        "context_length": longest_context(shape),
        "embedding_length": shape.hidden,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "rope.dimension_count": shape.rotary_dim,
        "vocab_size": shape.vocab,
    }
    values = {f"{arch}.{key}": Value(value, ValueType.UINT32) for key, value in whole.items()}
    values |= {f"{arch}.{key}": value for key, value in width_values(shape).items()}
    epsilon = "layer_norm_epsilon" if shape.family.norm == "layer" else "layer_norm_rms_epsilon"
    values[f"{arch}.attention.{epsilon}"] = Value(shape.norm_eps, ValueType.FLOAT32)
    values[f"{arch}.rope.freq_base"] = Value(shape.rope_theta, ValueType.FLOAT32)
    values |= {f"{arch}.{key}": value for key, value in _windows(shape, arch).items()}
    caps = {
        "attn_logit_softcapping": shape.attention_soft_cap,
        "final_logit_softcapping": shape.logit_soft_cap,
    }
    values |= {f"{arch}.{key}": Value(cap, ValueType.FLOAT32) for key, cap in caps.items() if cap is not None}
    scaling = shape.rope_scaling
    # llama3's scaling is in the tensor `rope_freqs`; a type beside it would scale twice.
    if scaling and scaling.get("rope_type", scaling.get("type")) == "linear":
        values[f"{arch}.rope.scaling.type"] = Value("linear", ValueType.STRING)
        values[f"{arch}.rope.scaling.factor"] = Value(float(scaling["factor"]), ValueType.FLOAT32)
    values["general.file_type"] = Value(QUANTISATIONS[dtype].file_type, ValueType.UINT32)
    values["general.quantization_version"] = Value(gguf.GGML_QUANT_VERSION, ValueType.UINT32)
    return values


def _windows(shape: ModelShape, arch: str) -> dict[str, Value]:
    """Metadata of sliding windows, without the architecture's prefix; only what `arch` reads, and phi3 reports."""
    window = shape.narrowest_window
    if arch not in WINDOWED:
        told = arch == "phi3" and window is not None
        return {"attention.sliding_window": Value(window, ValueType.UINT32)} if told else {}
    if window is None:
        # Arch gemma2 cannot do without; one as wide as the context hides nothing. Arch gemma3 can.
        wide = Value(shape.max_positions, ValueType.UINT32)
        return {"attention.sliding_window": wide} if arch == "gemma2" else {}
    values = {"attention.sliding_window": Value(window, ValueType.UINT32)}
    sliding = [shape.window(index) is not None for index in range(len(shape.layers))]
    usual = shape.family.defaults["sliding_window_pattern"]
    if sliding != [(index + 1) % usual != 0 for index in range(len(sliding))]:  # which older readers take for granted
        values["attention.sliding_window_pattern"] = Value(sliding, ValueType.ARRAY, ValueType.BOOL)
    if shape.local_rope_theta is not None:
        values["rope.freq_base_swa"] = Value(shape.local_rope_theta, ValueType.FLOAT32)
    return values


def _tokenizer(checkpoint: Checkpoint, out: Path, general: Mapping[str, Value]) -> dict[str, Value]:
    source = checkpoint.folder / GGUF_TOKENIZER
    if source.is_file():
        file = GgufFile(source)
        file.check_loadable()
        count = len(file.metadata.get("tokenizer.ggml.tokens", ()))
        if count != checkpoint.shape.vocab:
            raise BadInput(
                f"{count} tokens for an embedding of {checkpoint.shape.vocab} rows",
                where=source,
                remedy=f"remove {GGUF_TOKENIZER} to rebuild the tokenizer from tokenizer.json",
            )
        return file.values("tokenizer.")
    from edgeprune.gguf_vocabulary import gguf_vocabulary, strips_as_phi3
    from edgeprune.tokenizer_proof import prove_same_ids

    shape = checkpoint.shape
    values = gguf_vocabulary(checkpoint.folder, shape.vocab, shape.eos, shape.bos)
    values["general.name"] = Value(
        _readable_name(general["general.name"].value, strips=strips_as_phi3(checkpoint.folder)), ValueType.STRING
    )
    # Proved on the vocabulary alone, before gigabytes of weights are written.
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".vocabulary.", dir=out.parent) as scratch:
        trial = write_metadata(Path(scratch) / "vocabulary.gguf", architecture(shape), values)
        prove_same_ids(trial, checkpoint.folder)
    return values
