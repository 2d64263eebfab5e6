"""What one cell of the pruning comparison measures. Each function takes files and returns plain data for the JSON.

Pruning, and all that runs a sliced model in torch, happens in a process of its own, so that its peak of memory is its
own; files in stock runtimes are measured by edgeprune's own isolated calls.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeprune.calibration import TextSet, take
from edgeprune.checkpoint import Checkpoint
from edgeprune.cost import bytes_read_per_token
from edgeprune.errors import BadInput, StageFailed
from edgeprune.export.gguf_quantise import quantise
from edgeprune.export.gguf_writer import write_gguf
from edgeprune.files import read_json, write_json
from edgeprune.host import gather
from edgeprune.models import Model
from edgeprune.quality import Quality, TextQuality, evaluate, evaluate_text, measure, quality_from_json
from edgeprune.recognise import recognise
from edgeprune.reference import load_reference
from edgeprune.runtimes.bench import bench
from edgeprune.runtimes.gguf_file import BLOCKS, GgufFile, tensor_bytes
from edgeprune.runtimes.isolate import run_isolated
from edgeprune.tasks import run_tasks, special_tokens

HERE = "pruning_cells"
TASKS = ("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande")
TIMEOUT_S = 6 * 3600.0
N_CTX = 2048
Cell = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What the figures depend on beside the method, the ratio and the calibration text itself."""

    texts: int  # calibration texts
    length: int  # tokens of each
    windows: int  # of 512 tokens of the test text
    limit: int | None  # items of a task; None: all
    dtype: str  # of the file that quality and tasks are measured on: "F32" or "F16"
    threads: int
    repetitions: int  # of the speed test

    def of(self, column: str) -> dict[str, Any]:
        """Those that a column depends on: a finished cell is measured again when one of them changed."""
        known: dict[str, Any] = {}
        if column == "quality":
            known |= {"windows": self.windows, "dtype": self.dtype}
        elif column == "shipped":
            known |= {"windows": self.windows, "dtype": "Q4_0"}
        elif column in TASKS:
            known |= {"limit": self.limit, "dtype": self.dtype}
        elif column == "speed":
            known |= {"threads": self.threads, "repetitions": self.repetitions}
        elif column == "prune":
            known |= {"threads": self.threads, "cache": "empty"}
        return known


def calibration_texts(model: Model, data: Path, settings: Settings) -> TextSet:
    """Half of the texts from C4, half from Wikipedia, each in pieces of `length` tokens from the start of its file."""
    pieces: list[TextSet] = []
    half = settings.texts // 2
    for name, count in (("c4/c4.txt", settings.texts - half), ("wikipedia/wikipedia.txt", half)):
        if not count:
            continue
        text = (data / name).read_text(encoding="utf-8")
        # A character a token at least, so ten of them give enough; tokenizing millions would take longer than pruning.
        head = text[: 10 * count * settings.length]
        found = take(model, iter([head]), name, count=count, length=settings.length)
        if len(found.ids) < count or len(found.ids[-1]) < settings.length:
            raise BadInput(f"fewer than {count} pieces of {settings.length} tokens", where=data / name)
        pieces.append(found)
    texts, ids = (tuple(x for piece in pieces for x in getattr(piece, field)) for field in ("texts", "ids"))
    return TextSet(texts, ids, " + ".join(piece.source for piece in pieces), pieces[0].bos)


def save_texts(texts: TextSet, path: Path) -> Path:
    """Write a text set for the processes that prune."""
    write_json(path, asdict(texts) | {"ids": [ids.tolist() for ids in texts.ids]})
    return path


def load_texts(path: Path) -> TextSet:
    """Read what `save_texts` wrote."""
    import torch

    record = read_json(path)
    ids = tuple(torch.tensor(ids) for ids in record["ids"])
    return TextSet(tuple(record["texts"]), ids, record["source"], record["bos"])


def _isolated(function: str, arguments: dict[str, Any]) -> tuple[Any, float | None]:
    """The value of a function of this module, run in a process of its own, and that process's peak in MiB."""
    outcome = run_isolated(f"{HERE}:{function}", arguments, timeout_s=TIMEOUT_S, allow=(HERE,))
    if outcome.status != "ok":
        raise StageFailed(f"{outcome.status}: {outcome.reason}", where=function)
    return outcome.value, outcome.peak_mib


def prune(method: str, folder: Path, ratio: float, texts: Path, out: Path, settings: Settings, *, fresh: bool) -> Cell:
    """Prune into `out`; what it took, and what is left. `fresh`: with an empty cache, as for the first time."""
    from rivals.folders import parameters_of

    arguments = {"method": method, "folder": str(folder), "ratio": ratio, "texts": str(texts), "out": str(out)}
    arguments |= {"threads": settings.threads}
    if fresh:
        with tempfile.TemporaryDirectory(prefix="edgeprune-") as cache:
            seconds, peak = _isolated("prune_in_process", arguments | {"cache": cache})
    else:
        seconds, peak = _isolated("prune_in_process", arguments)
    dense, left = Checkpoint(folder).shape.parameters, parameters_of(out)
    return {
        "seconds": round(seconds, 1),
        "peak_mib": None if peak is None else round(peak),
        "parameters": left,
        "reached_ratio": round(1 - left / dense, 5),
    }


def prune_in_process(
    method: str, folder: str, ratio: float, texts: str, out: str, threads: int, cache: str | None = None
) -> float:
    """Seconds that the method took, its loading of the model included, without Python's imports."""
    if cache is not None:
        os.environ["EDGEPRUNE_CACHE"] = cache  # of this process alone: nothing measured before is found
    import torch
    import transformers
    from rivals import METHODS

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    calibration = load_texts(Path(texts))
    start = time.monotonic()
    METHODS[method].prune(Path(folder), ratio, calibration, Path(out))
    return time.monotonic() - start


def trainer() -> str:
    """What `recover` trains on here."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else recognise(gather()).model


def export(folder: Path, out: Path, dtype: str, threads: int) -> Path:
    """The GGUF file of a folder in F32, F16 or a quantisation made from F16; one that is there is kept."""
    if out.exists():
        return out
    if dtype in ("F32", "F16"):
        return write_gguf(folder, out, dtype=dtype)  # type: ignore[arg-type]
    half = export(folder, out.with_name("F16.gguf"), "F16", threads)
    return quantise(half, out, kind=dtype, threads=threads)


def quality(path: Path, reference: Path, settings: Settings, runtime: str) -> Cell:
    """Perplexity and bits per byte on the test text; with the dense model's vocabulary, KL and top-1 agreement."""
    if runtime == "pytorch":
        record, _ = _isolated(
            "quality_in_process", {"folder": str(path), "reference": str(reference), "threads": settings.threads}
        )
        return _quality_cell(quality_from_json(record))
    dense = load_reference(reference)
    if _vocabulary(GgufFile(path)) != dense.n_vocab:
        # Other tokens, so nothing to compare token by token: the same text, in the file's own tokens.
        text = evaluate_text(path, dense.covered_text, threads=settings.threads, timeout_s=TIMEOUT_S)
        return _quality_cell(text)
    return _quality_cell(evaluate(path, reference, threads=settings.threads, timeout_s=TIMEOUT_S))


def _quality_cell(found: TextQuality) -> Cell:
    cell: Cell = {
        "bits_per_byte": found.bits_per_byte,
        "perplexity": found.perplexity,
        "tokens": found.n_tokens,
        "runtime": found.measured_on.runtime,
    }
    if isinstance(found, Quality):
        for name, interval in (("kl_nats", found.kl_nats), ("top1", found.top1)):
            cell |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return cell


def _sliced_runtime(folder: str, threads: int) -> Any:
    import torch
    import transformers
    from rivals.slicegpt import load_sliced

    from edgeprune.runtimes.pytorch import PyTorch, load_tokenizer

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    return PyTorch.of(load_sliced(Path(folder)), load_tokenizer(Path(folder)), N_CTX)


def quality_in_process(folder: str, reference: str, threads: int) -> dict[str, Any]:
    """`edgeprune.quality.measure` of a sliced model, in torch."""
    return measure(_sliced_runtime(folder, threads), load_reference(Path(reference))).to_json()


def task(path: Path, name: str, data: Path | None, settings: Settings, runtime: str) -> Cell:
    """One of lm-eval's tasks: its accuracies with their standard errors, as lm-eval names them."""
    if runtime == "pytorch":
        arguments = {
            "folder": str(path),
            "name": name,
            "limit": settings.limit,
            "data": None if data is None else str(data),
        }
        found, _ = _isolated("task_in_process", arguments | {"threads": settings.threads})
    else:
        found = run_tasks(
            path, [name], limit=settings.limit, data=data, n_ctx=N_CTX, threads=settings.threads, timeout_s=TIMEOUT_S
        )
    results = {
        key.removesuffix(",none"): value for key, value in found["results"][name].items() if key.startswith("acc")
    }
    return {**results, "items": found["n-samples"][name]["effective"], "data": found["data"][name]}


def task_in_process(folder: str, name: str, limit: int | None, data: str | None, threads: int) -> dict[str, Any]:
    """`run_tasks` of a sliced model, in torch."""
    special = special_tokens(Path(folder))
    runtime = _sliced_runtime(folder, threads)
    return run_tasks(runtime, [name], limit=limit, data=None if data is None else Path(data), special=special)


def _vocabulary(gguf: GgufFile) -> int:
    return int(gguf.tensor("token_embd.weight").shape[0])


def file_bytes(path: Path) -> Cell:
    """Bytes of a quantised file, and those of its weights that decoding one token reads."""
    gguf = GgufFile(path)
    tied = "output.weight" not in gguf.tensors
    read = bytes_read_per_token(gguf.bytes_by_part(), tied=tied, vocab=_vocabulary(gguf))
    return {"file_bytes": path.stat().st_size, "bytes_per_token": read, "types": gguf.type_counts(), "kind": "measured"}


def sliced_bytes(folder: Path) -> Cell:
    """The same of a sliced model, computed, since no file of it exists: vectors in F32, matrices in Q4_0 with rows
    filled up to whole blocks, but the one that the head reads in Q8_0, which is what llama.cpp gives dense models of
    such widths."""
    checkpoint = Checkpoint(folder)
    family = checkpoint.shape.family
    embedding, head = f"{family.embedding}.weight", f"{family.head}.weight"
    if head not in checkpoint:
        head = embedding
    read = total = 0
    for name in checkpoint.names:
        *rows, width = checkpoint.dimensions(name)
        kind = "F32" if not rows else "Q8_0" if name == head else "Q4_0"
        block = BLOCKS[kind][0]
        n_bytes = tensor_bytes(kind, (*rows, -(-width // block) * block))
        total += n_bytes
        read += n_bytes // rows[0] if name == embedding != head else n_bytes
    return {"file_bytes": total, "bytes_per_token": read, "kind": "computed"}


def speed(path: Path, settings: Settings) -> Cell:
    """Tokens per second here: a prompt of 512 tokens, and 128 decoded ones; medians beside the spread."""
    result = bench(path, threads=settings.threads, repetitions=settings.repetitions, timeout_s=TIMEOUT_S)
    if result.pp is None or result.tg is None:
        raise StageFailed(f"{result.status}: {result.reason}", where=path)
    return {
        "pp512": round(result.pp.avg_ts, 1),
        "pp512_stddev": round(result.pp.stddev_ts, 1),
        "tg128": round(result.tg.avg_ts, 1),
        "tg128_stddev": round(result.tg.stddev_ts, 1),
        "peak_mib": None if result.peak_mib is None else round(result.peak_mib),
        "cpu": result.tg.cpu_info,
    }


def timed(make: Callable[[], Cell]) -> Cell:
    """A cell with the seconds that it took to measure."""
    start = time.monotonic()
    cell = make()
    json.dumps(cell)  # what is no plain data shows here, not when the file is written
    return {**cell, "measured_in_s": round(time.monotonic() - start, 1)}
