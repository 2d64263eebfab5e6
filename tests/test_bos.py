"""A model that has read BOS before every text reads it wherever it is judged, calibrated, or writes."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_llama
from tiny_text import TEXT
from tokenizers.processors import TemplateProcessing

from edgeprune.calibration import TextSet, held_out_text, retokenized, self_generated, take
from edgeprune.cross_quality import measure_across
from edgeprune.distillation import soft
from edgeprune.distillation.base import Order, Quota
from edgeprune.distillation.pool import Fields, make_pool, source_of
from edgeprune.distillation.readings import ModelReadings
from edgeprune.errors import BadInput
from edgeprune.export.gguf_writer import write_gguf
from edgeprune.export.onnx_graph import export_onnx
from edgeprune.heldout import stretches
from edgeprune.imatrix import importance_matrix
from edgeprune.layerwise import packed
from edgeprune.models import Model, load
from edgeprune.pruning import cached_scores, windows_of
from edgeprune.quality import evaluate, measure, measure_text
from edgeprune.reference import Reference, build_reference
from edgeprune.runtimes import open_runtime
from edgeprune.runtimes.base import begun
from edgeprune.runtimes.pytorch import PyTorch, load_model, load_tokenizer
from edgeprune.writing import continued

BOS, LENGTH, COUNT = 0, 32, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA whose tokenizer begins every text with BOS."""
    folder = save_llama(tmp_path_factory.mktemp("bos") / "llama", seed=3)
    tokenizer = load_tokenizer(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", BOS)]
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(folder)


@pytest.fixture(scope="module")
def files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("files")
    onnx = export_onnx(folder, out / "onnx", precision="fp32")
    return {"llamacpp": write_gguf(folder, out / "m.gguf", dtype="F32"), "onnxruntime": onnx, "pytorch": folder}


@pytest.fixture(scope="module")
def reference(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    runtime = PyTorch.of(model.module, model.tokenizer, LENGTH)
    return build_reference(
        runtime, TEXT, tmp_path_factory.mktemp("reference"), model_hash=model.hash, length=LENGTH, count=COUNT
    )


def test_runtimes_know_it(files: dict[str, Path], tiny_folder: Path, tmp_path: Path) -> None:
    for name, path in files.items():
        with closing(open_runtime(path, n_ctx=LENGTH, threads=1, name=name)) as runtime:
            assert runtime.bos == BOS
            assert begun(runtime, [5, 6]) == begun(runtime, [BOS, 5, 6]) == [BOS, 5, 6]
    for path in (tiny_folder, write_gguf(tiny_folder, tmp_path / "m.gguf", dtype="F32")):
        with closing(open_runtime(path, n_ctx=LENGTH, threads=1)) as runtime:
            assert runtime.bos is None
            assert begun(runtime, [5, 6]) == [5, 6]


def test_windows_are_judged_after_it(model: Model, reference: Reference) -> None:
    for i, window in enumerate(reference.windows):
        ids = torch.tensor([[BOS, *window.tolist()]])
        with torch.inference_mode():
            logits = model.module(input_ids=ids).logits[0, 1:-1].double()
        nll = torch.nn.functional.cross_entropy(logits, ids[0, 2:])
        assert reference.nll[i] == pytest.approx(float(nll), rel=1e-5)
    assert all(len(window) == LENGTH and BOS not in window for window in reference.windows)


@pytest.mark.parametrize("runtime", ["llamacpp", "onnxruntime"])
def test_files_are_judged_alike(runtime: str, files: dict[str, Path], reference: Reference) -> None:
    found = evaluate(files[runtime], reference.folder, runtime=runtime, threads=1, timeout_s=120)
    assert found.kl_nats.mean < 1e-5
    np.testing.assert_allclose(found.nll_windows, reference.nll, rtol=1e-4)


def test_text_alone_and_other_tokens_too(model: Model, reference: Reference) -> None:
    runtime = PyTorch.of(model.module, model.tokenizer, LENGTH)
    own = measure(runtime, reference)
    texts = stretches(runtime.decode, reference.windows, reference.text)
    assert measure_across(runtime, reference, texts).nll_nats.mean == pytest.approx(own.nll_nats.mean, rel=0.05)
    alone = measure_text(runtime, reference.covered_text, length=LENGTH)
    assert alone.nll_nats.mean == pytest.approx(own.nll_nats.mean, rel=0.05)

    class Forgetful(PyTorch):
        bos = None

    without = measure_text(Forgetful.of(model.module, model.tokenizer, LENGTH), reference.covered_text, length=LENGTH)
    assert without.n_tokens == alone.n_tokens and without.nll_windows != alone.nll_windows


def test_calibration_reads_it(model: Model) -> None:
    texts = take(model, iter([TEXT]), "text", count=3, length=LENGTH)
    plain = replace(texts, bos=None)
    assert texts.bos == BOS and texts.tokens == plain.tokens and texts.hash != plain.hash
    for ids, read in zip(texts.ids, texts.begun, strict=True):
        assert BOS not in ids and read.tolist() == [BOS, *ids.tolist()]
    windows, without = windows_of(texts), windows_of(plain)
    assert windows.shape[1] == without.shape[1] and (windows[:, 0] == BOS).all() and not (windows[:, 1:] == BOS).any()
    assert windows[:, 1:].flatten().tolist() == torch.cat(texts.ids)[: windows[:, 1:].numel()].tolist()
    assert cached_scores(model, texts).tokens == texts.tokens + 3
    matrix = importance_matrix(model, texts.begun)
    assert matrix.tokens == texts.tokens + 3
    assert retokenized(plain, model.tokenizer).bos == BOS


def test_windows_that_hold_nothing_beside_it_are_refused() -> None:
    with pytest.raises(BadInput, match="do not fill a window of 1"):
        packed([torch.arange(3)], 1, BOS)


def test_it_stands_before_what_the_model_writes(model: Model, tiny: Model) -> None:
    begin = torch.tensor([[7, 9], [20, 4]])
    plain = replace(model, tokenizer=tiny.tokenizer)  # the same weights and tokens, without BOS

    def written(writer: Model, tokens: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        return continued(writer, model.module, tokens, length, torch.Generator().manual_seed(1))

    texts, nlls = written(model, begin, 20)
    expected, same = written(plain, torch.cat([torch.full((2, 1), BOS), begin], dim=1), 21)
    assert torch.equal(texts, expected[:, 1:])
    torch.testing.assert_close(nlls, same)
    assert texts[:, 2:].tolist() != written(plain, begin, 20)[0][:, 2:].tolist()


def test_own_text_keeps_it_apart(model: Model) -> None:
    def sound(texts: TextSet) -> bool:
        return texts.bos == BOS and not any(BOS in ids for ids in texts.ids)

    assert sound(self_generated(model, count=2, length=24, seed=1))
    assert sound(self_generated(model, count=2, length=24, seed=1))  # from the cache
    assert sound(held_out_text(model, windows=2, length=24))


def test_soft_data_begin_with_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "labelled.jsonl"
    source.write_text("".join(json.dumps({"text": TEXT[i : i + 40], "label": i % 2}) + "\n" for i in range(6)))
    tokenizer = load_tokenizer(folder)
    pool = make_pool(source_of([str(source)]), tokenizer, fields=Fields(("text",), "label"), folder=tmp_path)
    monkeypatch.setattr(soft, "SoftSettings", partial(soft.SoftSettings, length=8, steps=0))
    order = Order(pool, Quota(count=1), folder, None, never, 0, tmp_path, tmp_path, lambda *_: None)
    made, table = soft.make(order).embeddings, load_model(folder).get_input_embeddings().weight
    assert made.shape[0] == 2
    assert all(torch.equal(each[0], table[BOS]) and not torch.equal(each[1], table[BOS]) for each in made)


def never(*_: object) -> ModelReadings:
    raise AssertionError("soft data are not chosen by readings")
