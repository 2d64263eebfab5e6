"""Writes a Hugging Face folder as a GGUF file, tensor by tensor, for stock llama.cpp.

The folder need not be one of ours. Architecture `llama` has one width for all layers, `gguf_deci` has what layers that
differ become; q and k are stored with their rotary pairs next to each other, where Hugging Face has halves.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgeprune.checkpoint import GGUF_TOKENIZER, Checkpoint
from edgeprune.errors import BadInput, missing_extra
from edgeprune.export.gguf_deci import DECI, architecture, is_filler, width_values
from edgeprune.export.gguf_types import QUANTISATIONS, Tensor, tensors
from edgeprune.files import atomic_file
from edgeprune.runtimes.gguf_file import GgufFile, Value, ValueType
from edgeprune.shape import ModelShape, rotary_frequencies

try:
    import gguf
except ImportError as error:
    raise missing_extra("gguf", "prune") from error

ROTARY = "rope_freqs.weight"  # computed, not read
# llama.cpp's tensor role -> the field of `Family` that names the module.
ROLES = {
    "attn_norm": "attention_norm",
    "ffn_norm": "mlp_norm",
    "attn_q": "query",
    "attn_k": "key",
    "attn_v": "value",
    "attn_output": "output",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}
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


def module_name(tensor: str, shape: ModelShape) -> str:
    """The name in a Hugging Face checkpoint of a llama.cpp tensor (not of `rope_freqs`, which has none)."""
    family = shape.family
    if tensor.startswith("blk."):
        _, layer, role, suffix = tensor.split(".")
        return f"{family.in_layer(int(layer), ROLES[role])}.{suffix}"
    role, suffix = tensor.split(".")
    return {
        "token_embd": family.embedding,
        "output_norm": family.final_norm,
        "output": family.head,
    }[role] + f".{suffix}"


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
        BadInput: the folder is no sound checkpoint of a supported family, has layers of different widths in a family
            for which llama.cpp cannot have them, values that F16 cannot hold, or a tokenizer that has no GGUF form.
        StageFailed: the rebuilt tokenizer gives other ids.
    """
    if dtype not in ("F16", "F32"):
        raise BadInput(f"dtype {dtype!r}", remedy="give F16 or F32, then quantise")
    checkpoint = Checkpoint(folder)
    shape = checkpoint.shape
    arch = architecture(shape, where=folder)
    listing = _listing(checkpoint)
    metadata = {
        **_general(checkpoint),
        **_architecture(checkpoint, dtype),
        **_tokenizer(checkpoint, out),
    }
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
        return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value

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
    listing = tensors(shape)
    listed = {tensor.name for tensor in listing}
    for tensor in [tensor for tensor in listing if tensor.name.startswith("blk.") and len(tensor.shape) == 2]:
        # A bias the config does not speak of is still a bias: compensation may add one where there was none.
        bias = Tensor(tensor.name.removesuffix("weight") + "bias", tensor.shape[:1])
        if bias.name not in listed and module_name(bias.name, shape) in checkpoint:
            listing.append(bias)
    for tensor in listing:
        if tensor.name == ROTARY or is_filler(tensor.name, shape):
            continue
        name = module_name(tensor.name, shape)
        found = checkpoint.dimensions(name)
        if found != tensor.shape:
            raise BadInput(
                f"tensor {name!r} has shape {found}, not {tensor.shape}",
                where=checkpoint.folder,
                remedy="the checkpoint does not match its config.json",
            )
    computed = {tensor.name for tensor in listing if tensor.name == ROTARY or is_filler(tensor.name, shape)}
    known = {module_name(tensor.name, shape) for tensor in listing if tensor.name not in computed}
    known.add(f"{shape.family.head}.weight")  # beside a tied embedding it is a copy
    extra = [name for name in checkpoint.names if name not in known and not name.endswith("rotary_emb.inv_freq")]
    if extra:
        raise BadInput(f"tensor {extra[0]!r} has no place in a {shape.family.name} model", where=checkpoint.folder)
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
    name = module_name(tensor.name, shape)
    values = checkpoint.tensor(name)
    if heads := paired_heads(tensor.name, shape):
        values = permute(values, heads)
    kind = _dtype(tensor, dtype)
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(values, dtype=kind)
    if not np.isfinite(converted).all():
        finite = bool(np.isfinite(values).all())
        raise BadInput(
            f"tensor {name!r} has values {'that F16 cannot hold' if finite else 'that are not numbers'}",
            where=checkpoint.folder,
            remedy="write F32" if finite else "the checkpoint is damaged",
        )
    return converted


def paired_heads(tensor: str, shape: ModelShape) -> int:
    """Heads of a tensor, by its llama.cpp name, whose rows the file has in rotary pairs; 0 for any other tensor."""
    if not (shape.family.permute_qk or architecture(shape) == DECI) or not tensor.startswith("blk."):
        return 0
    _, index, role, _ = tensor.split(".")
    layer = shape.layers[int(index)]
    return {"attn_q": layer.heads, "attn_k": layer.kv_heads}.get(role, 0)


def rotary_factors(shape: ModelShape) -> NDArray[np.float32]:
    """What llama.cpp divides the rotary frequencies by, (head_dim / 2,): plain frequencies over scaled ones."""
    exponent = np.arange(0, shape.head_dim, 2, dtype=np.float64) / shape.head_dim
    return (shape.rope_theta**-exponent / rotary_frequencies(shape)).astype(np.float32)


def _general(checkpoint: Checkpoint) -> dict[str, Value]:
    values = {"general.type": Value("model", ValueType.STRING)}
    source = checkpoint.folder / GGUF_TOKENIZER
    if source.is_file():
        values |= {key: value for key, value in GgufFile(source).values("general.").items() if key not in FILE_KEYS}
    values.setdefault("general.name", Value(_name(checkpoint), ValueType.STRING))
    license_name = _license(checkpoint.folder)
    if license_name:
        values.setdefault("general.license", Value(license_name, ValueType.STRING))
    return values


def _name(checkpoint: Checkpoint) -> str:
    named = checkpoint.config.get("_name_or_path")
    return Path(named).name if isinstance(named, str) and named else checkpoint.folder.resolve().name


def _license(folder: Path) -> str | None:
    """The `license:` of a model card's front matter."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", card.read_text("utf-8", "replace"), re.DOTALL)
    found = front and re.search(r"^license: *([\w.\-]+) *$", front[1], re.MULTILINE)
    return found[1] if found else None


def _architecture(checkpoint: Checkpoint, dtype: str) -> dict[str, Value]:
    shape = checkpoint.shape
    arch = architecture(shape)
    whole: dict[str, int] = {
        "block_count": len(shape.layers),
        "context_length": shape.max_positions,
        "embedding_length": shape.hidden,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "rope.dimension_count": shape.head_dim,
        "vocab_size": shape.vocab,
    }
    values = {f"{arch}.{key}": Value(value, ValueType.UINT32) for key, value in whole.items()}
    values |= {f"{arch}.{key}": value for key, value in width_values(shape).items()}
    values[f"{arch}.attention.layer_norm_rms_epsilon"] = Value(shape.norm_eps, ValueType.FLOAT32)
    values[f"{arch}.rope.freq_base"] = Value(shape.rope_theta, ValueType.FLOAT32)
    scaling = shape.rope_scaling
    # llama3's scaling is in the tensor `rope_freqs`; a type beside it would scale twice.
    if scaling and scaling.get("rope_type", scaling.get("type")) == "linear":
        values[f"{arch}.rope.scaling.type"] = Value("linear", ValueType.STRING)
        values[f"{arch}.rope.scaling.factor"] = Value(float(scaling["factor"]), ValueType.FLOAT32)
    values["general.file_type"] = Value(QUANTISATIONS[dtype].file_type, ValueType.UINT32)
    values["general.quantization_version"] = Value(gguf.GGML_QUANT_VERSION, ValueType.UINT32)
    return values


def _tokenizer(checkpoint: Checkpoint, out: Path) -> dict[str, Value]:
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
    from edgeprune.gguf_vocabulary import gguf_vocabulary
    from edgeprune.tokenizer_proof import prove_same_ids

    values = gguf_vocabulary(checkpoint.folder, checkpoint.shape.vocab)
    # Proved on the vocabulary alone, before gigabytes of weights are written.
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".vocabulary.", dir=out.parent) as scratch:
        trial = write_metadata(Path(scratch) / "vocabulary.gguf", checkpoint.shape.family.gguf_arch, values)
        prove_same_ids(trial, checkpoint.folder)
    return values
