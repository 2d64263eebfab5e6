"""From what the user names (a hub id, a folder, a GGUF file, a demo name) to a checkpoint folder and a torch model."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.checkpoint import GGUF_TOKENIZER, TOKENIZER_FILES, Checkpoint
from edgeprune.errors import BadInput, missing_extra, unknown
from edgeprune.fetch import DEMO_MODELS, demo_model
from edgeprune.files import cache_dir, read_json, sha256, write_json, write_text
from edgeprune.shape import ModelShape

if TYPE_CHECKING:
    import torch

Say = Callable[[str], None]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Everything a model needs and nothing that can run code: no pickles, no Python files.
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt", "README.md"]
_HUB_FILES += [
    f"{name}*" for name in ("LICENSE", "LICENCE", "License", "license", "COPYING", "NOTICE", "Notice", "USE_POLICY")
]
_LICENCE = re.compile(r"(licen[cs]e|copying)([._-].*)?", re.IGNORECASE)
_NOTICE = re.compile(r"(notice|use_policy)([._-].*)?", re.IGNORECASE)  # what a licence may ask to go along
_MOST_TERMS = 1 << 20  # bytes of such a file
CARD = "README.md"
TOKENIZER_CONFIG = "tokenizer_config.json"
# What a config says of code to run at load (transformers fetches attention kernels from the hub), and a tokenizer's of
# files elsewhere: nothing that we write asks for that.
CODE_KEYS = ("auto_map", "_attn_implementation", "_attn_implementation_internal")
TOKENIZER_CODE_KEYS = ("auto_map", "tokenizer_file")


@dataclass(frozen=True)
class Model:
    """A loaded model: the torch module (float32, evaluation mode), its tokenizer, and the folder it came from."""

    module: torch.nn.Module
    tokenizer: Any
    folder: Path
    shape: ModelShape
    hash: str


def resolve(name: str, *, say: Say | None = None) -> Path:
    """A local path for `name`: a demo name, an existing folder or .gguf file, or a hub id (downloaded and cached).

    Raises:
        BadInput: nothing of that name, a kind of file that is refused, or a hub that does not give it.
    """
    if name in DEMO_MODELS:
        return demo_model(name, say=say)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        if path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}:
            raise BadInput(
                "pickled weights are refused: loading them runs code",
                where=path,
                remedy="convert them to safetensors and give the folder",
            )
        raise BadInput("not a model file", where=path, remedy="give a .gguf file or a folder with config.json")
    hub_id = HUB_ID.fullmatch(name)
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")) or ("/" in name and not hub_id):
        raise BadInput("no such file or folder", where=path)
    if hub_id:
        return _from_hub(name)
    raise unknown("model", name, DEMO_MODELS)


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError as error:
        raise missing_extra("huggingface_hub", "prune") from error
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=["consolidated*"]))
    except RepositoryNotFoundError as error:
        raise BadInput(f"the hub has no model {name!r}, or it is private", remedy="check the name or log in") from error
    except HFValidationError as error:
        raise BadInput(f"{name!r} is no name of a model on the hub", remedy="give owner/name, or a folder") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise BadInput(
            f"the hub could not give {name!r} ({type(error).__name__}), and it is not in the local cache",
            remedy="check the network, or download the model and give its folder",
        ) from error


def public_name(model: str) -> str:
    """What others are told of where a model or a text is from: a hub's or demo's name; of a path only its last part."""
    return Path(model).expanduser().resolve().name if Path(model).expanduser().exists() else model


def checkpoint_folder(path: Path, *, say: Say | None = None) -> Path:
    """A Hugging Face folder for `path`: itself, or a GGUF file dequantised once into the cache.

    Raises:
        BadInput: a broken file or an unsupported family.
    """
    if path.is_dir():
        return path
    from edgeprune.gguf_checkpoint import SCHEMA as GGUF_SCHEMA
    from edgeprune.gguf_checkpoint import gguf_to_folder

    folder = cache_dir() / "checkpoints" / f"{sha256(path)[:16]}-{GGUF_SCHEMA}"
    if not (folder / "config.json").exists():
        if say:
            say(f"dequantising {path.name}")
        gguf_to_folder(path, folder)
    return folder


def load(name: str | Path, *, say: Say | None = None) -> Model:
    """Load a model for scoring and pruning, in float32 on the CPU.

    Raises:
        BadInput: as `resolve`; also weights that do not match the config (nothing is ever re-initialised).
    """
    folder = checkpoint_folder(resolve(str(name), say=say), say=say)
    checkpoint = Checkpoint(folder)
    try:
        from edgeprune.runtimes.pytorch import load_model, load_tokenizer
    except ImportError as error:
        raise missing_extra(error.name or "torch", "prune") from error
    return Model(load_model(folder), load_tokenizer(folder), folder, checkpoint.shape, checkpoint.hash())


def licences(folder: Path) -> list[str]:
    """Names of the files of a folder that hold the terms of its model."""
    return _named(folder, _LICENCE)


def terms(folder: Path) -> list[str]:
    """Names of the files of a folder that go with its model wherever that goes: licences and notices."""
    return [*licences(folder), *_named(folder, _NOTICE)]


def _named(folder: Path, pattern: re.Pattern[str]) -> list[str]:
    files = [path for path in folder.iterdir() if pattern.fullmatch(path.name) and path.is_file()]
    return sorted(path.name for path in files if path.stat().st_size <= _MOST_TERMS)


def companions(folder: Path) -> list[str]:
    """Names of the files that belong to a model beside weights and config, and go along when it is changed."""
    named = (*TOKENIZER_FILES, "generation_config.json", *terms(folder), GGUF_TOKENIZER, "vocabulary_plan.json")
    return [name for name in named if (folder / name).is_file()]


def copy_companions(source: Path, target: Path) -> None:
    """Copy the files that belong to a model beside its weights (tokenizer, chat template, licence)."""
    copy_files(source, target, companions(source))


def copy_licence_name(source: Path, target: Path) -> None:
    """Let the card of a changed model name the licence that the card of its source names; the rest of that is not of
    this model."""
    if licence := stated_licence(source):
        write_text(target / CARD, f"---\nlicense: {licence}\n---\n")


def stated_licence(folder: Path) -> str | None:
    """The `license:` of a model card's front matter; for "other" the `license_name:` that goes with it."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", card.read_text("utf-8", "replace"), re.DOTALL)
    stated = dict(re.findall(r"^(license|license_name): *([\w.\-]+) *$", front[1], re.MULTILINE)) if front else {}
    licence = stated.get("license")
    return stated.get("license_name", licence) if licence == "other" else licence


def copy_files(source: Path, target: Path, names: Iterable[str]) -> list[str]:
    """Copy those of the files `names` that are in the folder `source`; their names.

    Of a tokenizer's config, what says of code to run and of files elsewhere is left out.
    """
    there = [name for name in names if (source / name).is_file()]
    for name in there:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if name == TOKENIZER_CONFIG and not (config := read_json(source / name)).keys().isdisjoint(TOKENIZER_CODE_KEYS):
            write_json(target / name, {k: v for k, v in config.items() if k not in TOKENIZER_CODE_KEYS})
        else:
            shutil.copyfile(source / name, target / name)
    return there


def companions_hash(folder: Path) -> str:
    """SHA-256 over a checkpoint's tokenizer, chat template and what else lies beside its weights."""
    depends = [(name, sha256(folder / name)) for name in companions(folder)]
    return hashlib.sha256(json.dumps(depends).encode()).hexdigest()
