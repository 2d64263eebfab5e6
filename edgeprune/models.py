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
from edgeprune.files import cache_dir, read_json, sha256, write_json
from edgeprune.shape import ModelShape

if TYPE_CHECKING:
    import torch

Say = Callable[[str], None]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Everything a model needs and nothing that can run code: no pickles, no Python files.
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt", "README.md"]
_HUB_FILES += ["LICENSE*", "NOTICE*", "USE_POLICY.md"]
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENSE-MODEL")
TOKENIZER_CONFIG = "tokenizer_config.json"
# What a config says of code to run at load (transformers fetches attention kernels from the hub), and a tokenizer's of
# files elsewhere: nothing that we write asks for that.
CODE_KEYS = ("auto_map", "_attn_implementation", "_attn_implementation_internal")
TOKENIZER_CODE_KEYS = ("auto_map", "tokenizer_file")
NOTICES = ("NOTICE", "NOTICE.txt", "USE_POLICY.md")  # what a licence may ask to go along
# Beside the weights and the config: what belongs to a model and is copied along when the model is changed.
COMPANIONS = (*TOKENIZER_FILES, "generation_config.json", *LICENCES, *NOTICES, GGUF_TOKENIZER, "vocabulary_plan.json")


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


def copy_companions(source: Path, target: Path) -> None:
    """Copy the files that belong to a model beside its weights (tokenizer, chat template, licence)."""
    copy_files(source, target, COMPANIONS)


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
    depends = [(name, sha256(folder / name)) for name in COMPANIONS if (folder / name).is_file()]
    return hashlib.sha256(json.dumps(depends).encode()).hexdigest()
