"""The dense model's next-token distributions over held-out text, computed once and kept on disk.

Every candidate is compared with the same distributions; the dense model need not be loaded beside it, and what it
says on the text does not depend on the candidate.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import BadInput, StageFailed
from edgeprune.files import atomic_folder, preallocate, read_json, write_json, write_text
from edgeprune.heldout import Window, digest, held_out
from edgeprune.metrics import Accumulator, Coded, compare, encode
from edgeprune.models import companions_hash
from edgeprune.runtimes import open_runtime, runtime_for
from edgeprune.runtimes.base import Logits, Runtime
from edgeprune.runtimes.bench import cpu_info
from edgeprune.runtimes.isolate import Execute, run_isolated

SCHEMA = 2  # 1 read no BOS
ROW = np.dtype([("peak", "<f4"), ("step", "<f4"), ("top", "<i4")])  # what decodes a token's levels

Progress = Callable[[dict[str, Any]], None]  # called with {"stage", "done", "total"}


@dataclass(frozen=True)
class MeasuredOn:
    """Where a number was measured: a quantised file's logits depend on the instruction set as well as the runtime."""

    runtime: str
    machine: str


def machine() -> str:
    """The operating system and processor of this machine, as records name it."""
    return f"{platform.system()} {platform.machine()}, {cpu_info()}"


@dataclass(frozen=True)
class Reference:
    """The dense model's next-token distributions over held-out windows, on disk."""

    folder: Path
    key: str
    text: str
    n_characters: int
    windows: list[Window]
    n_bytes: list[int]
    n_vocab: int
    bos: int | None  # read before every window, and not predicted
    nll: tuple[float, ...]  # the dense model's own, mean per token of each window
    levels: NDArray[np.uint16]  # (windows, length - 1, vocabulary), memory-mapped
    rows: NDArray[np.void]  # (windows, length - 1) of ROW

    @property
    def covered_text(self) -> str:
        """The text of the windows: what a file with another tokenizer is to be measured on."""
        return self.text[: self.n_characters]

    def coded(self, window: int) -> Coded:
        """The coded distributions after each token but the last of a window."""
        rows = self.rows[window]
        return Coded(self.levels[window], rows["peak"].copy(), rows["step"].copy(), rows["top"].copy())


def reference_key(model_hash: str, runtime: str, text: str, *, length: int = 512, count: int = 20) -> str:
    """The name of a reference: a hash of all it depends on."""
    parts = json.dumps([SCHEMA, model_hash, runtime, digest(text), length, count])
    return digest(parts)[:32]


def build_reference(
    runtime: Runtime,
    text: str,
    folder: Path,
    *,
    model_hash: str,
    length: int = 512,
    count: int = 20,
    progress: Progress | None = None,
) -> Reference:
    """Run the dense model over the first `count` windows of `text` and store its distributions in `folder/KEY`.

    They take 2 bytes a token and vocabulary entry: 1.0 GB for 20 windows of 512 tokens at 49,152 entries. A finished
    reference of the same key is used as it is.

    Raises:
        BadInput: as `held_out`, or the disk has too little room.
        StageFailed: the model's logits are not finite.
    """
    key = reference_key(model_hash, runtime.name, text, length=length, count=count)
    final = folder / key
    if (final / "reference.json").exists():
        return load_reference(final)
    part = held_out(runtime, text, length=length, count=count)
    shape = (count, length - 1, runtime.n_vocab)
    _check_room(folder, 2 * int(np.prod(shape)))
    totals = Accumulator()
    with atomic_folder(final) as temporary:
        levels = np.lib.format.open_memmap(temporary / "levels.npy", mode="w+", dtype=np.dtype("<u2"), shape=shape)
        preallocate(temporary / "levels.npy")
        rows = np.empty(shape[:2], dtype=ROW)
        for i, window in enumerate(part.windows):
            logits = predictions(runtime, window, runtime.bos)
            with finite_logits(runtime.name):
                coded = encode(logits, levels[i])
                totals.add(compare(logits, window[1:]), part.n_bytes[i])
            rows[i]["peak"], rows[i]["step"], rows[i]["top"] = coded.peak, coded.step, coded.top
            report(progress, "reference", i + 1, count)
        levels.flush()
        np.save(temporary / "rows.npy", rows)
        write_text(temporary / "text.txt", part.text)
        write_json(
            temporary / "reference.json",
            {
                "schema_version": SCHEMA,
                "key": key,
                "model": model_hash,
                "text": digest(part.text),
                "n_characters": part.n_characters,
                "n_windows": count,
                "length": length,
                "n_vocab": runtime.n_vocab,
                "bos": runtime.bos,
                "n_bytes": part.n_bytes,
                "nll": [total / n for total, n in zip(totals.nll, totals.tokens, strict=True)],
                "measured_on": asdict(MeasuredOn(runtime.name, machine())),
                "tokens": [window.tolist() for window in part.windows],
            },
        )
    return load_reference(final)


def load_reference(folder: Path) -> Reference:
    """Open a reference made by `build_reference`.

    Raises:
        BadInput: files are missing, damaged, or do not belong together.
    """
    remedy = "delete the folder; it will be made again"
    record = read_json(folder / "reference.json")
    try:
        text = (folder / "text.txt").read_bytes().decode()
        levels = np.load(folder / "levels.npy", mmap_mode="r", allow_pickle=False)
        rows = np.load(folder / "rows.npy", allow_pickle=False)
        shape = (record["n_windows"], record["length"] - 1, record["n_vocab"])
        tokens = [np.asarray(window, dtype=np.int64) for window in record["tokens"]]
        sound = (
            record["schema_version"] == SCHEMA
            and record["text"] == digest(text)
            and isinstance(record["key"], str)
            and isinstance(record["n_characters"], int)
            and (record["bos"] is None or (isinstance(record["bos"], int) and 0 <= record["bos"] < record["n_vocab"]))
            and levels.dtype == np.uint16
            and levels.shape == shape
            and rows.dtype == ROW
            and rows.shape == shape[:2]
            and [window.shape for window in tokens] == [(record["length"],)] * shape[0]
            and len(record["n_bytes"]) == len(record["nll"]) == shape[0]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"not a usable reference ({error})", where=folder, remedy=remedy) from error
    if not sound:
        raise BadInput("the files of the reference do not belong together", where=folder, remedy=remedy)
    return Reference(
        folder=folder,
        key=record["key"],
        text=text,
        n_characters=record["n_characters"],
        windows=tokens,
        n_bytes=record["n_bytes"],
        n_vocab=shape[2],
        bos=record["bos"],
        nll=tuple(record["nll"]),
        levels=levels,
        rows=rows,
    )


def make_reference(
    path: Path,
    text: str,
    folder: Path,
    *,
    model_hash: str,
    length: int = 512,
    count: int = 20,
    runtime: str | None = None,
    threads: int,
    timeout_s: float,
    progress: Progress | None = None,
) -> Path:
    """`build_reference` of a dense file, in a process of its own; the folder of the reference, for `evaluate`.

    Raises:
        BadInput, StageFailed: as `build_reference` and `evaluate`.
    """
    name = runtime or runtime_for(path)
    if path.is_dir():  # which tokens the text becomes is the tokenizer's, whose files lie beside the weights
        model_hash = f"{model_hash}-{companions_hash(path)}"
    final = folder / reference_key(model_hash, name, text, length=length, count=count)
    if not (final / "reference.json").exists():
        arguments = {
            "path": str(path),
            "text": text,
            "folder": str(folder),
            "model_hash": model_hash,
            "length": length,
            "count": count,
            "runtime": name,
            "threads": threads,
        }
        isolated("edgeprune.reference:reference_in_process", path, arguments, timeout_s, None, progress)
    return final


def reference_in_process(
    path: str,
    text: str,
    folder: str,
    model_hash: str,
    length: int,
    count: int,
    runtime: str,
    threads: int,
    progress: Progress | None = None,
) -> None:
    """What `make_reference` runs in its own process."""
    with closing(open_runtime(Path(path), n_ctx=length, threads=threads, name=runtime)) as opened:
        build_reference(
            opened, text, Path(folder), model_hash=model_hash, length=length, count=count, progress=progress
        )


def isolated(
    target: str,
    path: Path,
    arguments: Mapping[str, Any],
    timeout_s: float,
    memory_mib: int | None,
    progress: Progress | None,
    execute: Execute = run_isolated,
) -> Any:
    """What `target` returns when run on the model at `path` in a process of its own, here or on a board.

    Raises:
        BadInput: as the function raises it.
        StageFailed: the process failed, ran out of memory, crashed or was too slow; the message starts with which.
    """
    outcome = execute(target, arguments, timeout_s=timeout_s, memory_mib=memory_mib, progress=progress)
    if outcome.status != "ok":
        raise StageFailed(f"{outcome.status}: {outcome.reason}", where=path)
    return outcome.value


def predictions(runtime: Runtime, window: Window, bos: int | None) -> Logits:
    """Logits that predict all but the first token of a window, from an empty cache: (len(window) - 1, n_vocab).

    A model that was trained with BOS before every text reads it before every window: without, Gemma 3 270M's perplexity
    on WikiText-2 is 60 instead of 22. The same tokens are predicted either way, in as large a cache.
    """
    runtime.rewind(0)
    if bos is None:
        return runtime.forward(window[:-1])
    return runtime.forward(np.concatenate([[bos], window[:-1]]))[1:]


@contextmanager
def finite_logits(runtime: str) -> Iterator[None]:
    """Turn the arithmetic error of logits that are not finite into one that says what to do."""
    try:
        yield
    except FloatingPointError as error:
        raise StageFailed(
            f"{runtime}: {error}", remedy="the file is damaged, or its precision too low for this model"
        ) from error


def report(progress: Progress | None, stage: str, done: int, total: int) -> None:
    """Tell the listener, if there is one, how far a stage is."""
    if progress is not None:
        progress({"stage": stage, "done": done, "total": total})


def _check_room(folder: Path, n_bytes: int) -> None:
    existing = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < n_bytes:
        raise BadInput(
            f"the reference needs {n_bytes >> 20} MiB, the disk has {free >> 20} MiB left",
            where=folder,
            remedy="free some space, or ask for fewer or shorter windows",
        )
