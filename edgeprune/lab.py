"""A matrix of files x boards: each board measures its files one after another, all boards at once.

On one machine a thread waits for each board. For a lab of many machines the same tasks go to dask.distributed: a worker
announces the boards that it can reach as resources (`dask worker ADDRESS --resources "board:NAME=1"`), which makes the
scheduler send each task where its board is and never two at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.boards import BoardEntry, place
from edgeprune.errors import BadInput, EdgepruneError, missing_extra
from edgeprune.runtimes.bench import bench
from edgeprune.runtimes.records import Record, from_dict, to_dict

RESOURCE = "board:"
MAX_BYTES = 8 << 30  # of a file that is sent to a scheduler's worker

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Cell:
    """One file on one board.

    Attributes:
        board: its name.
        file: the file's name.
        records: what was measured, as `BenchResult.records`.
        status: "ok", or how it ended: as `BenchResult.status`, or "failed" where the board could not be used.
        reason: one line on that; None if ok.
    """

    board: str
    file: str
    records: tuple[Record, ...]
    status: str
    reason: str | None

    def to_json(self) -> dict[str, Any]:
        """As JSON carries it."""
        records = [to_dict(record) for record in self.records]
        return {
            "board": self.board,
            "file": self.file,
            "status": self.status,
            "reason": self.reason,
            "records": records,
        }


def measure_cell(board: str, entry: dict[str, Any], path: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Measure one file on one board; a failure is a result. What threads and workers run."""
    name = Path(path).name
    try:
        there = place(BoardEntry.model_validate(entry), options.get("threads"))
        rest = {key: value for key, value in options.items() if key != "threads"}
        result = bench(Path(path), threads=there.threads, execute=there.execute, **rest)
    except EdgepruneError as error:
        return Cell(board, name, (), "failed", str(error)).to_json()
    except Exception as error:  # a mistake of ours on one board must not lose what the others measured
        return Cell(board, name, (), "failed", f"{type(error).__name__}: {error}").to_json()
    return Cell(board, name, result.records, result.status, result.reason).to_json()


def measure_bytes(
    board: str, entry: dict[str, Any], files: Mapping[str, bytes], options: Mapping[str, Any]
) -> dict[str, Any]:
    """As `measure_cell`, of a model that came as bytes: {"demo.gguf": ...}, or the files of a folder."""
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as scratch:
        for name, data in files.items():
            target = Path(scratch) / name
            if not target.resolve().is_relative_to(Path(scratch).resolve()):
                raise BadInput(f"{name!r} would lie outside of its folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        top = {Path(name).parts[0] for name in files}
        return measure_cell(board, entry, str(Path(scratch) / top.pop()), options)


def run_matrix(
    files: Sequence[Path],
    boards: Mapping[str, BoardEntry],
    options: Mapping[str, Any],
    *,
    scheduler: str | None = None,
    progress: Progress | None = None,
) -> list[Cell]:
    """Measure every file on every board.

    Args:
        files: what `open_runtime` loads.
        boards: by name.
        options: of `bench`; "threads" None: the board's own.
        scheduler: address of a dask scheduler; None: threads of this machine.
        progress: called with (stage, cells done, of how many).

    Returns:
        A cell for each, boards in their order, and files in theirs.

    Raises:
        BadInput: a file is missing, or no worker has one of the boards.
    """
    for file in files:
        if not file.exists():
            raise BadInput("no such file or folder", where=file)
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        raise BadInput("two files have the same name", where=max(names, key=names.count))
    run = _by_threads if scheduler is None else _by_dask
    found = run(files, boards, options, scheduler or "", progress)
    return [found[board, file.name] for board in boards for file in files]


def _cell(value: dict[str, Any]) -> Cell:
    records = tuple(from_dict(record) for record in value["records"])
    return Cell(value["board"], value["file"], records, value["status"], value["reason"])


def _by_threads(
    files: Sequence[Path],
    boards: Mapping[str, BoardEntry],
    options: Mapping[str, Any],
    _: str,
    progress: Progress | None,
) -> dict[tuple[str, str], Cell]:
    found: dict[tuple[str, str], Cell] = {}
    total = len(files) * len(boards)

    def board_by_board(board: str) -> None:
        for file in files:
            value = measure_cell(board, boards[board].model_dump(), str(file), options)
            found[board, file.name] = _cell(value)
            if progress:
                progress(f"{file.name} on {board}", len(found), total)

    with ThreadPoolExecutor(len(boards)) as pool:
        for future in as_completed([pool.submit(board_by_board, board) for board in boards]):
            future.result()
    return found


def _by_dask(
    files: Sequence[Path],
    boards: Mapping[str, BoardEntry],
    options: Mapping[str, Any],
    scheduler: str,
    progress: Progress | None,
) -> dict[tuple[str, str], Cell]:
    try:
        import distributed
    except ImportError as error:
        raise missing_extra("distributed", "lab") from error
    try:
        client = distributed.Client(scheduler, timeout=15)
    except (OSError, ValueError, TimeoutError) as error:
        raise BadInput(
            f"no scheduler answers ({error})", where=scheduler, remedy="start one: dask scheduler"
        ) from error
    found: dict[tuple[str, str], Cell] = {}
    with client:
        known = {
            name.removeprefix(RESOURCE)
            for worker in client.scheduler_info(n_workers=-1)["workers"].values()
            for name in worker["resources"]
        }
        if lacking := [board for board in boards if board not in known]:
            remedy = f'start one beside it: dask worker {scheduler} --resources "{RESOURCE}{lacking[0]}=1"'
            raise BadInput(f"no worker has the board {lacking[0]!r}", where=scheduler, remedy=remedy)
        futures = {}
        for file in files:
            model = client.scatter(_contents(file))  # once, however many boards ask for it
            for board, entry in boards.items():
                future = client.submit(
                    measure_bytes,
                    board,
                    entry.model_dump(),
                    model,
                    dict(options),
                    resources={RESOURCE + board: 1},
                    pure=False,
                    retries=2,  # of a worker that died
                )
                futures[future] = (board, file.name)
        for future in distributed.as_completed(futures):
            board, name = futures[future]
            if future.status == "error":
                found[board, name] = Cell(board, name, (), "failed", f"the worker failed: {future.exception()}")
            else:
                found[board, name] = _cell(future.result())
            if progress:
                progress(f"{name} on {board}", len(found), len(futures))
    return found


def _contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    if sum(file.stat().st_size for file in files) > MAX_BYTES:
        raise BadInput(f"larger than {MAX_BYTES >> 30} GiB: too large to be sent to workers", where=path)
    return {str(file.relative_to(path.parent)): file.read_bytes() for file in files}


def to_markdown(cells: Sequence[Cell]) -> str:
    """A row a test: board, file, tokens/s."""
    lines = ["| board | file | test | t/s | median [95 %] | peak MiB |", "| --- | --- | --- | ---: | ---: | ---: |"]
    for cell in cells:
        lines += [
            f"| {cell.board} | {cell.file} | {r.test} | {r.avg_ts:.2f} ± {r.stddev_ts:.2f} "
            f"| {r.median_ts:.2f} [{r.low_ts:.2f}, {r.high_ts:.2f}] | {round(r.peak_mib) if r.peak_mib else '-'} |"
            for r in cell.records
        ]
        if cell.status != "ok":
            lines.append(f"| {cell.board} | {cell.file} | {cell.status}: {cell.reason} | | | |")
    return "\n".join(lines) + "\n"
