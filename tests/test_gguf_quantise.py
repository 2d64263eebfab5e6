"""Quantisation in process: types told in advance are the types written, for every mixture, recipe and row length."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SENTENCES, MakeLlama
from gguf import GGUFReader, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.calibration import text_set
from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import BadInput
from edgeprune.export.gguf_imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from edgeprune.export.gguf_quantise import quantise
from edgeprune.export.gguf_types import (
    QUANTISATIONS,
    TENSOR_TYPES,
    Recipe,
    alignment,
    canonical,
    needing_imatrix,
    predicted_bytes,
    recipe,
    tensor_types,
    tensors,
)
from edgeprune.export.gguf_writer import write_gguf
from edgeprune.families import FAMILIES
from edgeprune.imatrix import cached_importance_matrix, importance_matrix, provide_imatrix
from edgeprune.models import Model
from edgeprune.runtimes.gguf_file import GgufFile
from edgeprune.shape import LayerShape, ModelShape
from edgeprune.targets import FORMATS, IMATRIX, target_for

_SLOW = {"IQ2_S", "IQ2_XXS", "IQ1_M", "IQ1_S"}  # to make: the shapes with rows of 256 are enough
SHAPES: dict[str, dict[str, Any]] = {
    "rows of 256, one KV head": {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "tie_word_embeddings": False,
    },
    "rows of 256, groups of two": {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 128,
    },
    "rows of 64 and 256, 17 layers": {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 17,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
    "rows of 96 and 160, tied": {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2},
    "rows of 72 and 203": {"hidden_size": 72, "intermediate_size": 203, "num_hidden_layers": 2},
}


def flat_matrix(shape: ModelShape) -> ImportanceMatrix:
    """An importance matrix that finds every column as important as the next."""
    return ImportanceMatrix(
        {t.name: np.ones(t.shape[-1], dtype=np.float32) for t in tensors(shape) if len(t.shape) > 1}, tokens=512
    )


def sample_text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("\n".join(SENTENCES * 3), encoding="utf-8")
    return path


def tensor_values(path: Path, name: str) -> np.ndarray[Any, Any]:
    """The values of a tensor of a GGUF file, (rows, columns)."""
    found = next(t for t in GGUFReader(path).tensors if t.name == name)
    return np.asarray(quants.dequantize(found.data, found.tensor_type))


def written_types(path: Path) -> dict[str, str]:
    return {name: info.type for name, info in GgufFile(path).tensors.items()}


@pytest.mark.parametrize("with_imatrix", [False, True], ids=["blind", "imatrix"])
@pytest.mark.parametrize("case", SHAPES)
def test_every_mixture_is_as_told(case: str, with_imatrix: bool, make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = make_llama(**SHAPES[case])
    shape = Checkpoint(folder).shape
    matrix = flat_matrix(shape) if with_imatrix else None
    source = write_gguf(folder, tmp_path / "full.gguf", dtype="F32")
    for kind in QUANTISATIONS:
        wish = Recipe(kind, imatrix=with_imatrix)
        out = tmp_path / f"{kind}.gguf"
        if with_imatrix and not needing_imatrix(shape, wish) and tensor_types(shape, wish) == tensor_types(shape, kind):
            continue  # made without a matrix, and the matrix changes none of its types
        if kind in _SLOW and "17 layers" in case:
            continue
        if needing_imatrix(shape, wish) and matrix is None:
            with pytest.raises(BadInput, match="needs an importance matrix"):
                quantise(source, out, kind=kind, threads=1)
            assert not out.exists()
            continue
        quantise(source, out, kind=kind, threads=1, imatrix=matrix)
        assert written_types(out) == tensor_types(shape, wish), kind
        assert GgufFile(out).bytes_by_part() == predicted_bytes(shape, wish)
        assert GgufFile(out).metadata["general.file_type"] == QUANTISATIONS[kind].file_type
        out.unlink()


def test_types_named_for_single_tensors_are_as_told(make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = make_llama(hidden_size=64, intermediate_size=256, num_hidden_layers=9, tie_word_embeddings=False)
    shape = Checkpoint(folder).shape
    source = write_gguf(folder, tmp_path / "full.gguf", dtype="F32")
    types = {r"blk\.[01]\.ffn_down": "Q8_0", r"blk\.2\.": "Q6_K", "attn_v": "MXFP4"}
    plain = tensor_types(shape, "Q4_K_M")
    out = quantise(source, tmp_path / "q.gguf", kind="Q4_K_M", threads=1, types=types, embedding="IQ4_NL", head="Q3_K")
    wish = Recipe(
        "Q4_K_M",
        types=(*types.items(), (r"^token_embd\.weight$", "IQ4_NL"), (r"^output\.weight$", "Q3_K")),
    )
    told = tensor_types(shape, wish)
    assert written_types(out) == told
    assert GgufFile(out).bytes_by_part() == predicted_bytes(shape, wish)
    assert told["blk.1.ffn_down.weight"] == "Q8_0"
    assert told["blk.2.ffn_down.weight"] == "Q6_K"
    assert told["blk.2.attn_v.weight"] == "Q8_0"  # the first pattern counts, and rows of 64 are no blocks of 256
    assert told["blk.3.attn_v.weight"] == "MXFP4"
    assert (told["token_embd.weight"], told["output.weight"]) == ("IQ4_NL", "Q4_0")
    # What is named for one layer does not move the mixture's rules for another.
    assert told["blk.8.ffn_down.weight"] == plain["blk.8.ffn_down.weight"] == "Q6_K"


@given(st.data())
@settings(max_examples=12, deadline=None)
def test_any_type_for_any_tensor_is_as_told(data: st.DataObject) -> None:
    # `TENSOR_TYPES` all have blocks that fill rows of 256, or of 64, or a type that takes their place.
    shape = ModelShape(
        FAMILIES["llama"],
        vocab=64,
        hidden=data.draw(st.sampled_from([64, 96, 256])),
        head_dim=16,
        layers=(LayerShape(4, 2, 256),) * 2,
        tied=data.draw(st.booleans()),
        max_positions=64,
        norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=None,
    )
    name = data.draw(st.sampled_from([t.name for t in tensors(shape) if len(t.shape) > 1]))
    wanted = data.draw(st.sampled_from(TENSOR_TYPES))
    told = tensor_types(shape, Recipe("Q4_0", types=((f"^{name}$", wanted),)))
    usual = tensor_types(shape, "Q4_0")
    assert {other: kind for other, kind in told.items() if other != name} == {
        other: kind for other, kind in usual.items() if other != name
    }
    assert predicted_bytes(shape, Recipe("Q4_0", types=((f"^{name}$", wanted),)))  # whole blocks, or it would raise


def test_embedding_and_head_of_a_tied_model_are_one(make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = make_llama()
    shape = Checkpoint(folder).shape
    source = write_gguf(folder, tmp_path / "full.gguf", dtype="F32")
    for name in ("Q8_0:embed=Q4_0", "Q8_0:head=Q4_0", "Q8_0:embed=Q4_0:head=Q4_0"):
        out = quantise(source, tmp_path / "q.gguf", kind=name, threads=1)
        assert written_types(out) == tensor_types(shape, name)
        assert written_types(out)["token_embd.weight"] == "Q4_0"
    assert predicted_bytes(shape, "Q8_0:head=Q4_0")["embedding"] == shape.vocab * 2 * 18
    with pytest.raises(BadInput, match="one type"):
        quantise(source, tmp_path / "q.gguf", kind="Q8_0", threads=1, embedding="Q4_0", head="Q5_0")


def test_names_of_recipes() -> None:
    assert recipe("Q4_0") == Recipe("Q4_0")
    assert canonical("q4_0:IMATRIX:Embed=iq4_nl") == "Q4_0:embed=IQ4_NL:imatrix"
    assert recipe("iq2_xxs:imatrix").imatrix
    assert target_for("q4_0:head=q5_0").quantisation == "Q4_0:head=Q5_0"
    assert target_for("q4_0").quantisation == "Q4_0"
    for name, message in (
        ("Q4_K", "did you mean 'Q4_K_S'"),
        ("Q4_0:", "unknown option"),
        ("Q4_0:embed", "unknown option"),
        ("Q4_0:embed=Q4", "unknown tensor type"),
        ("Q4_0:embed=Q4_0:embed=Q5_0", "twice"),
        ("Q4_0:brain=Q4_0", "unknown option"),
        ("int4:embed=Q4_0", "unknown quantisation"),
    ):
        with pytest.raises(BadInput, match=message):
            target_for(name + ("" if ":" in name else ":"))
    with pytest.raises(BadInput, match="no regular expression"):
        Recipe("Q4_0", types=(("(", "Q8_0"),))
    with pytest.raises(BadInput, match="name a quantised kind"):
        recipe("F16:embed=Q8_0")


@given(
    st.sampled_from([kind for kind in QUANTISATIONS if kind not in ("F32", "F16")]),
    st.dictionaries(st.sampled_from(["embed", "head", "attn_v", "ffn_down"]), st.sampled_from(TENSOR_TYPES)),
    st.booleans(),
)
def test_a_recipe_has_one_name(kind: str, types: dict[str, str], with_imatrix: bool) -> None:
    options = [f"{role}={type_name}" for role, type_name in types.items()] + ["imatrix"] * with_imatrix
    name = canonical(":".join([kind, *options]))
    assert canonical(name) == canonical(name.lower()) == name
    assert recipe(name).imatrix == with_imatrix
    assert len(recipe(name).types) == len(types)


def test_alignment_follows_the_types_of_pruned_rows() -> None:
    assert alignment("Q4_0:embed=Q6_K") == 32
    assert alignment("Q4_0:ffn_down=Q3_K") == 256
    assert alignment("Q2_0") == 64


def test_the_matrix_of_a_tiny_model(tiny: Model, tiny_folder: Path) -> None:
    """Against the definition, from hooks of its own on an unpadded pass over each text."""
    texts = [torch.arange(1, 20), torch.arange(5, 37), torch.arange(40, 47)]
    matrix = importance_matrix(tiny, texts)
    path = "model.layers.1.mlp.down_proj"
    seen: list[torch.Tensor] = []
    layer = tiny.module.get_submodule(path)
    handle = layer.register_forward_pre_hook(lambda _m, given: seen.append(given[0][0].detach()))
    norm = tiny.module.get_submodule("model.norm").register_forward_hook(lambda _m, _i, out: hidden.append(out[0]))
    hidden: list[torch.Tensor] = []
    with torch.inference_mode():
        for text in texts:
            tiny.module(text[None])
    handle.remove()
    norm.remove()
    expected = torch.cat(seen).double().square().mean(dim=0).numpy()
    assert np.allclose(matrix.values["blk.1.ffn_down.weight"], expected, rtol=1e-4)
    expected = torch.cat(hidden).double().square().mean(dim=0).numpy()
    assert np.allclose(matrix.values["token_embd.weight"], expected, rtol=1e-4)
    assert matrix.tokens == sum(len(text) for text in texts)
    weights = {t.name for t in tensors(tiny.shape) if len(t.shape) > 1}
    assert matrix.values.keys() == weights


def test_a_matrix_goes_to_disk_and_back(tiny: Model, tmp_path: Path) -> None:
    texts = text_set(tiny, str(sample_text(tmp_path)), count=4, length=24)
    matrix = cached_importance_matrix(tiny, texts)
    again = read_imatrix(write_imatrix(matrix, tmp_path / "m.gguf"))
    assert again.values.keys() == matrix.values.keys()
    for name, values in matrix.values.items():
        assert np.allclose(again.values[name], values, rtol=1e-6)
    assert (again.tokens, again.text_hash, again.model_hash) == (matrix.tokens, texts.hash, tiny.hash)
    assert cached_importance_matrix(tiny, texts).values.keys() == matrix.values.keys()
    file = GgufFile(tmp_path / "m.gguf")  # what llama-imatrix's readers look for
    assert file.metadata["general.type"] == "imatrix"
    assert file.tensors["blk.0.attn_q.weight.in_sum2"].shape == (1, 64)
    assert file.tensors["blk.0.attn_q.weight.counts"].shape == (1, 1)


def test_what_is_no_matrix(make_llama: MakeLlama, tiny: Model, tmp_path: Path) -> None:
    model = write_gguf(make_llama(), tmp_path / "model.gguf")
    with pytest.raises(BadInput, match="no importance matrix"):
        read_imatrix(model)
    good = flat_matrix(tiny.shape)
    for bad in (-1.0, np.nan, np.inf):
        values = dict(good.values) | {"blk.0.attn_q.weight": np.full(64, bad, dtype=np.float32)}
        with pytest.raises(BadInput, match="no sums of squares"):
            read_imatrix(write_imatrix(replace(good, values=values), tmp_path / "bad.gguf"))
    short = replace(good, values={"blk.0.attn_q.weight": np.ones(32, dtype=np.float32)})
    with pytest.raises(BadInput, match="32 columns"):
        quantise(model, tmp_path / "q.gguf", kind="Q4_0", threads=1, imatrix=short)
    with pytest.raises(BadInput, match="is quantised by an importance matrix"):
        quantise(model, tmp_path / "q.gguf", kind="Q4_0:imatrix", threads=1)


def test_the_matrix_is_used(make_llama: MakeLlama, tmp_path: Path) -> None:
    """A column said to matter alone is rounded better than without being told so."""
    folder = make_llama()
    shape = Checkpoint(folder).shape
    source = write_gguf(folder, tmp_path / "full.gguf", dtype="F32")
    flat = flat_matrix(shape)
    skewed = {name: np.where(np.arange(len(v)) == 3, 1.0, 1e-6).astype(np.float32) for name, v in flat.values.items()}
    name = "blk.1.ffn_up.weight"
    exact = tensor_values(source, name)
    errors = []
    for matrix in (flat, replace(flat, values=skewed)):
        out = quantise(source, tmp_path / "q.gguf", kind="Q4_0", threads=1, imatrix=matrix)
        errors.append(float(((tensor_values(out, name) - exact)[:, 3] ** 2).mean()))
    assert errors[1] < 0.5 * errors[0]


def test_a_target_with_a_matrix_is_exported(tiny: Model, tiny_folder: Path, tmp_path: Path) -> None:
    target = target_for("Q4_0:imatrix")
    export = FORMATS["gguf"].export
    with pytest.raises(BadInput, match="needs an importance matrix"):
        export(tiny_folder, tmp_path / "q.gguf", target.quantisation, tmp_path, threads=1)
    provide_imatrix(tiny_folder, tmp_path / IMATRIX, calibration=str(sample_text(tmp_path)))
    out = export(tiny_folder, tmp_path / "q.gguf", target.quantisation, tmp_path, threads=1)
    assert GgufFile(out).bytes_by_part() == target.format.parts(tiny.shape, target.quantisation)
    assert read_imatrix(tmp_path / IMATRIX).model_hash == tiny.hash


def test_some_types_need_a_matrix(tiny: Model) -> None:
    aligned = replace(tiny.shape, hidden=256)
    assert not needing_imatrix(tiny.shape, "IQ3_XS")  # rows of 64 get IQ4_NL, which needs none
    assert "blk.0.attn_q.weight" in needing_imatrix(aligned, "IQ3_XS")
    assert "token_embd.weight" in needing_imatrix(aligned, "IQ2_XXS:embed=IQ2_XXS")  # for these ggml ends the process
    assert "token_embd.weight" not in needing_imatrix(aligned, "IQ2_XXS:embed=IQ3_XXS")
    assert needing_imatrix(aligned, "Q2_K_S") and not needing_imatrix(aligned, "Q2_K")
