"""Reads a Hugging Face folder tensor by tensor: safetensors only, never pickle, no torch, one tensor in memory.

The safetensors header is read and checked here rather than by the library, because numpy knows no bfloat16 and
because a model file is hostile input: every offset must lie inside the file.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import BadInput
from edgeprune.files import read_json, sha256
from edgeprune.shape import ModelShape, shape_from_config, token_ids

# A tokenizer that came from a GGUF file stays beside the checkpoint, as a GGUF file without tensors, so that it can
# be written into the next GGUF file verbatim.
NAMED = "_name_or_path"  # the key of a config that says what the model was saved from
GGUF_TOKENIZER = "tokenizer.gguf"
# What the tokenizer and the chat template of a Hugging Face folder may be made of.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)

_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
UNUSED = "rotary_emb.inv_freq"  # ends names in older checkpoints; made from the config again
_HEADER_LIMIT = 100 << 20  # bytes; the library's own limit
WEIGHTS = "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def older_rope_words(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `rope_parameters` of a config.json says, in the words of transformers 4; {} where there is none.

    It is one set of parameters, or one for each kind of layer ("full_attention", "sliding_attention").
    """
    newer = config.get("rope_parameters")
    if not isinstance(newer, dict):
        return {}
    words: dict[str, Any] = {}
    if isinstance(newer.get("full_attention"), dict):
        local = newer.get("sliding_attention")
        if isinstance(local, dict) and "rope_theta" in local:
            words["rope_local_base_freq"] = local["rope_theta"]
        newer = newer["full_attention"]
    scaling = {key: value for key, value in newer.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if "partial_rotary_factor" in newer:
        words["partial_rotary_factor"] = newer["partial_rotary_factor"]
    return words | {
        "rope_theta": newer.get("rope_theta", config.get("rope_theta")),
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
    }


@dataclass(frozen=True)
class _Entry:
    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]


def _read_header(file: Path) -> dict[str, _Entry]:
    remedy = "download or convert the checkpoint again"
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_HEADER_LIMIT, size - 8):
            raise BadInput("truncated or not a safetensors file", where=file, remedy=remedy)
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise BadInput("safetensors header is not JSON", where=file, remedy=remedy) from error
    if not isinstance(header, dict):
        raise BadInput("safetensors header is not an object", where=file, remedy=remedy)
    header.pop("__metadata__", None)
    entries = {}
    for name, item in header.items():
        try:
            dtype, dimensions = item["dtype"], tuple(item["shape"])
            start, stop = item["data_offsets"]
            whole = len(dimensions) <= 8 and all(
                type(n) is int and 0 <= n < 1 << 48 for n in (*dimensions, start, stop)
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"tensor {name!r} has no dtype, shape and offsets", where=file, remedy=remedy) from error
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise BadInput(f"tensor {name!r} has dtype {dtype}", where=file, remedy=f"supported: {', '.join(_DTYPES)}")
        if (
            not whole
            or stop - start != math.prod(dimensions) * np.dtype(_DTYPES[dtype]).itemsize
            or 8 + length + stop > size
        ):
            raise BadInput(f"tensor {name!r} does not lie inside the file", where=file, remedy=remedy)
        entries[name] = _Entry(file, 8 + length + start, dtype, dimensions)
    return entries


def _weight_files(folder: Path) -> list[Path]:
    """The files with a checkpoint's weights: the usual one, those of the index, or all there are.

    Others may lie beside them: repositories of Mistral have the same weights again under other names.
    """
    one, index = folder / WEIGHTS, folder / f"{WEIGHTS}.index.json"
    if one.is_file():
        return [one]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise BadInput("no weight_map", where=index, remedy="download the checkpoint again")
    named = set(map(str, names.values()))
    for name in named:
        if Path(name).name != name or Path(name).suffix != ".safetensors":
            raise BadInput(f"weight_map names {name!r}, which is no *.safetensors file of the folder", where=index)
        if not (folder / name).is_file():
            raise BadInput(f"{name} is missing", where=folder, remedy="download the checkpoint again")
    return sorted(folder / name for name in named)


def _ends(shape: ModelShape, generation: Path) -> tuple[int, ...]:
    """Tokens that end a text: the config's, and those that only generation_config.json names, as for chat models."""
    found = read_json(generation).get("eos_token_id") if generation.is_file() else None
    return tuple(dict.fromkeys((*shape.eos, *token_ids(found, "eos_token_id", generation))))


class Checkpoint:
    """A folder with `config.json`, `*.safetensors` and, maybe, `generation_config.json`, whose ends of text count too.

    Args:
        folder: the folder; a sharded checkpoint is read through the files that its index names, or all there are.

    Raises:
        BadInput: no folder, no or only pickled weights, a broken file, or an unsupported family.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise BadInput("no such folder", where=folder)
        if (folder / "adapter_config.json").is_file():
            raise BadInput(
                "an adapter lies beside the weights, and transformers would load the model that it names",
                where=folder / "adapter_config.json",
                remedy="merge it (peft's merge_and_unload) and save the whole model, or remove it",
            )
        self.folder = folder
        config = read_json(folder / "config.json")
        # transformers 5 writes `rope_parameters`, which transformers 4 and other readers pass over in silence, and
        # would compute with another theta: the older keys are what everything here reads and writes.
        self.rope_overrides = older_rope_words(config)
        self.config: dict[str, Any] = config | self.rope_overrides
        self.files = _weight_files(folder)
        if not self.files:
            pickles = [p.name for p in folder.iterdir() if p.suffix in _PICKLES]
            if pickles:
                raise BadInput(
                    f"pickled weights ({pickles[0]}) are refused: loading them runs code",
                    where=folder,
                    remedy="convert the checkpoint to safetensors",
                )
            raise BadInput("no *.safetensors file", where=folder)
        shape = shape_from_config(self.config, where=folder / "config.json")
        self.shape: ModelShape = replace(shape, eos=_ends(shape, folder / "generation_config.json"))
        self._entries: dict[str, _Entry] = {}
        self._hash: str | None = None
        for file in self.files:
            self._entries.update(_read_header(file))

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._entries)

    def names_in(self, file: Path) -> list[str]:
        """Names of the tensors that one of `files` holds."""
        return [name for name, entry in self._entries.items() if entry.file == file]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def dimensions(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """The number format of a tensor as stored: "F64", "F32", "F16" or "BF16"."""
        return self._entry(name).dtype

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise BadInput(
                f"no tensor {name!r}", where=self.folder, remedy="the checkpoint does not match its config.json"
            )
        return self._entries[name]

    def tensor(self, name: str) -> NDArray[np.float32]:
        """One tensor as float32, in memory of its own.

        Raises:
            BadInput: there is no such tensor.
        """
        entry = self._entry(name)
        count = math.prod(entry.shape)
        raw = np.fromfile(entry.file, dtype=_DTYPES[entry.dtype], count=count, offset=entry.offset)
        if entry.dtype == "BF16":
            values = (raw.astype(np.uint32) << 16).view(np.float32)
        else:
            values = raw.astype(np.float32, copy=False)
        return values.reshape(entry.shape)

    @property
    def name(self) -> str:
        """The model's name: what its config says, else the folder's."""
        named = self.config.get(NAMED)
        return Path(named).name if isinstance(named, str) and named else self.folder.resolve().name

    def hash(self) -> str:
        """SHA-256 over the config and the weights' bytes: the identity of the model in caches and records."""
        if self._hash is None:  # reading all weights takes a second for each gigabyte
            told = {key: value for key, value in self.config.items() if key != NAMED}
            digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
            for file in self.files:
                digest.update(sha256(file).encode())
            self._hash = digest.hexdigest()
        return self._hash
