"""A Hugging Face folder to GGUF and back, and quantisation as predicted."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as gguf_library
import numpy as np
import pytest
import torch
from conftest import MakeLlama
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import BadInput, StageFailed
from edgeprune.export.gguf_quantise import QUANTISATIONS, alignment, fallbacks, predicted_bytes, quantise, tensor_types
from edgeprune.export.gguf_writer import permute, rotary_factors, unpermute, write_gguf
from edgeprune.families import FAMILIES
from edgeprune.gguf_checkpoint import gguf_to_folder, llama3_scaling
from edgeprune.models import stated_licence
from edgeprune.runtimes import open_runtime
from edgeprune.runtimes.gguf_file import GgufFile, Value
from edgeprune.runtimes.llamacpp import LlamaCpp
from edgeprune.shape import LayerShape, ModelShape
from edgeprune.tokenizer import end_ids

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def vocabulary(gguf: Path) -> dict[str, Value]:
    """The tokenizer's metadata, with types, arrays as lists."""
    return {
        key: value._replace(value=value.value.tolist() if isinstance(value.value, np.ndarray) else value.value)
        for key, value in GgufFile(gguf).values("tokenizer.").items()
    }


def weights(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    found: dict[str, np.ndarray[Any, Any]] = load_file(folder / "model.safetensors")
    return found


@given(st.integers(1, 5), st.sampled_from([2, 4, 8, 16]), st.integers(1, 4))
def test_permutation_and_its_inverse(heads: int, head_dim: int, columns: int) -> None:
    rows = np.arange(heads * head_dim * columns).reshape(heads * head_dim, columns)
    assert (unpermute(permute(rows, heads), heads) == rows).all()
    # The first pair of a head is the first of either half.
    assert (permute(rows, heads)[:2] == rows[[0, head_dim // 2]]).all()
    assert (permute(rows[:, 0], heads) == permute(rows, heads)[:, 0]).all()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
        {"rope_scaling": LLAMA3, "rope_theta": 500000.0, "max_position_embeddings": 16384},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.5}, "num_key_value_heads": 8},
    ],
    ids=["tied", "biases", "llama3", "linear"],
)
def test_there_and_back(changes: dict[str, Any], make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = make_llama(**changes)
    back = gguf_to_folder(write_gguf(folder, tmp_path / "m.gguf", dtype="F32"), tmp_path / "back")
    original, again = weights(folder), weights(back)
    assert original.keys() == again.keys()
    for name, values in original.items():
        assert (values == again[name]).all(), name
    config = json.loads((back / "config.json").read_text())
    for key in ("head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "bos_token_id", "eos_token_id"):
        assert config[key] == Checkpoint(folder).config[key], key
    assert config["rope_scaling"] == changes.get("rope_scaling")
    LlamaForCausalLM.from_pretrained(back)
    text = "She'll carry 48 kettles, and 3 bridges."
    assert AutoTokenizer.from_pretrained(back)(text).input_ids == AutoTokenizer.from_pretrained(folder)(text).input_ids
    # Verbatim from here on: a second file has the very same vocabulary.
    assert vocabulary(write_gguf(back, tmp_path / "again.gguf", dtype="F32")) == vocabulary(tmp_path / "m.gguf")


def test_a_turn_ends_where_the_file_says_and_where_llamacpp_would(make_llama: MakeLlama, tmp_path: Path) -> None:
    file = GgufFile(write_gguf(make_llama(), tmp_path / "m.gguf"))
    assert end_ids(file) == (0,)
    tokens = list(file.metadata["tokenizer.ggml.tokens"])
    types = np.array(file.metadata["tokenizer.ggml.token_type"])
    tokens[40], types[40] = "<end_of_turn>", 3
    tokens[41], types[41] = "<|eot_id|>", 1  # a word like any other, here
    file.metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    file.metadata["tokenizer.ggml.eot_token_id"] = 50
    assert end_ids(file) == (0, 50, 40)
    file.metadata["tokenizer.ggml.eot_token_id"] = len(tokens)
    with pytest.raises(BadInput, match=r"eot_token_id is \d+, outside the vocabulary"):
        end_ids(file)


def test_ends_of_a_turn_reach_the_folder(
    tmp_path: Path, make_llama: MakeLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeprune.gguf_checkpoint.end_ids", lambda _file: (0, 7))
    back = gguf_to_folder(write_gguf(make_llama(), tmp_path / "m.gguf"), tmp_path / "back")
    assert Checkpoint(back).shape.eos == (0, 7)


def test_metadata(make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = make_llama(hidden_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n")
    file = GgufFile(write_gguf(folder, tmp_path / "m.gguf"))
    expected = {
        "general.architecture": "llama",
        "general.license": "apache-2.0",
        "general.file_type": 1,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.attention.head_count_kv": 2,
        "llama.context_length": 256,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
    }
    assert {key: file.metadata[key] for key in expected} == expected
    assert file.metadata["general.name"]
    assert "output.weight" not in file.tensors
    assert file.type_counts() == {"F16": 22, "F32": 7}


def test_sharded_bfloat16_folder(make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = make_llama(dtype=torch.bfloat16)
    LlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="50KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("*.safetensors"))) > 1
    back = gguf_to_folder(write_gguf(folder, tmp_path / "m.gguf", dtype="F32"), tmp_path / "back")
    name = "model.layers.1.self_attn.k_proj.weight"
    assert (weights(back)[name] == Checkpoint(folder).tensor(name)).all()


def test_an_end_that_only_the_configs_name_ends_answers(make_llama: MakeLlama, tmp_path: Path) -> None:
    """Without ids in the file llama.cpp takes 11, which is a character here, for both ends of a text."""
    folder = make_llama(eos_token_id=7, bos_token_id=5)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for role in ("eos_token", "bos_token"):
        settings.pop(role)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    path = write_gguf(folder, tmp_path / "model.gguf")
    file = GgufFile(path)
    keys = ("eos_token_id", "bos_token_id", "eot_token_id")
    assert [file.metadata[f"tokenizer.ggml.{key}"] for key in keys] == [7, 5, 9]
    assert set(end_ids(file)) >= {7, 9}


@pytest.mark.parametrize("name", ["my-phi3-like", "tiny-Phi-3"])
def test_a_name_that_llamacpp_has_a_rule_for_is_no_obstacle(name: str, make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = make_llama().rename(tmp_path / name)
    path = write_gguf(folder, tmp_path / "model.gguf")
    assert "phi 3" in str(GgufFile(path).metadata["general.name"]).lower()
    with closing(LlamaCpp(path, n_ctx=32, threads=1)) as runtime:
        assert runtime.forward([1, 2, 3]).shape[0] == 3


def test_tokens_without_a_row_are_left_out(make_llama: MakeLlama, tmp_path: Path) -> None:
    """As of Gemma 3's text models, whose tokenizer has a token for images."""
    folder = make_llama()
    rows = Checkpoint(folder).shape.vocab
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    tokenizer.save_pretrained(folder)
    assert len(tokenizer) > rows
    with pytest.warns(UserWarning, match="without a row in the embedding are left out: <image_soft_token>"):
        path = write_gguf(folder, tmp_path / "model.gguf")
    with closing(LlamaCpp(path, n_ctx=32, threads=1)) as runtime:
        assert runtime.n_vocab == rows


def test_bias_of_compensation_is_written(make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = make_llama()
    changed = weights(folder)
    bias = np.linspace(-1, 1, 64, dtype=np.float32)
    save_file(changed | {"model.layers.1.mlp.down_proj.bias": bias}, folder / "model.safetensors")
    back = gguf_to_folder(write_gguf(folder, tmp_path / "m.gguf", dtype="F32"), tmp_path / "back")
    found = weights(back)
    assert (found["model.layers.1.mlp.down_proj.bias"] == bias).all()
    assert not found["model.layers.0.mlp.down_proj.bias"].any()
    assert json.loads((back / "config.json").read_text())["mlp_bias"] is True


def test_what_cannot_be_written(make_llama: MakeLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out" / "m.gguf"
    folder = make_llama()
    good = weights(folder)
    with pytest.raises(BadInput, match="dtype"):
        write_gguf(folder, out, dtype="Q4_0")  # type: ignore[arg-type]
    name = "model.layers.0.mlp.up_proj.weight"
    for change, message in (
        ({name: good[name] * np.float32(1e9)}, "F16 cannot hold"),
        ({name: good[name] * np.float32(np.nan)}, "not numbers"),
        ({name: good[name][:-1].copy()}, "has shape"),
        ({"model.layers.0.self_attn.q_norm.weight": good[name]}, "has no place"),
    ):
        save_file(good | change, folder / "model.safetensors")
        with pytest.raises(BadInput, match=message):
            write_gguf(folder, out)
    save_file(good, folder / "model.safetensors")
    plain = Checkpoint.__init__

    def uneven(self: Checkpoint, path: Path) -> None:
        plain(self, path)
        first, *rest = self.shape.layers
        self.shape = self.shape.with_layers((replace(first, neurons=64), *rest))

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "__init__", uneven)
        with pytest.raises(BadInput, match="has shape"):
            write_gguf(folder, out)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match=r"no tokenizer\.json"):
        write_gguf(folder, out)
    assert not out.exists()
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_only_llama_is_read(make_llama: MakeLlama, tmp_path: Path) -> None:
    path = write_gguf(make_llama(), tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes().replace(b"llama", b"lldma"))
    with pytest.raises(BadInput, match="did you mean 'llama'"):
        gguf_to_folder(path, tmp_path / "back")
    assert not (tmp_path / "back").exists()


BASE = ModelShape(
    family=FAMILIES["llama"],
    vocab=512,
    hidden=256,
    head_dim=64,
    layers=(LayerShape(4, 2, 512),) * 9,
    tied=True,
    max_positions=256,
    norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
)


@given(
    st.floats(2, 64),
    st.floats(1.5, 8),
    st.integers(512, 16384),
    st.sampled_from([64, 128]),
    st.sampled_from([1e4, 5e5]),
)
@settings(max_examples=60, deadline=None)
@example(2.0, 1.65625, 6568, 128, 1e4)
def test_llama3_scaling_is_found_again(factor: float, high: float, length: int, head_dim: int, theta: float) -> None:
    scaling = LLAMA3 | {"factor": factor, "high_freq_factor": high, "original_max_position_embeddings": length}
    shape = replace(BASE, head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)
    factors = rotary_factors(shape)
    found = llama3_scaling(factors, replace(shape, rope_scaling=None))
    if found:  # with fewer than two factors between the bounds it cannot be told, and is refused
        again = rotary_factors(replace(shape, rope_scaling=found))
        assert np.allclose(again, factors, rtol=1e-4)
    else:
        between = (factors > 1.0001) & (factors < factors.max() * 0.9999)
        assert found == {} or between.sum() < 3


def test_llama3_scaling_of_published_models() -> None:
    shape = replace(BASE, head_dim=64, rope_theta=5e5)
    for factor in (8.0, 32.0):
        scaling = LLAMA3 | {"factor": factor}
        assert llama3_scaling(rotary_factors(replace(shape, rope_scaling=scaling)), shape) == scaling
    assert llama3_scaling(np.ones(32, dtype=np.float32), shape) == {}
    assert llama3_scaling(np.linspace(1, 0.1, 32, dtype=np.float32), shape) is None


USUAL = ("F32", "F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
SHAPES: dict[str, dict[str, Any]] = {
    "aligned, 16 layers": {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "tie_word_embeddings": False,
    },
    "hidden of blocks of 32": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 5},
    "odd neurons": {"hidden_size": 256, "intermediate_size": 203, "num_hidden_layers": 3, "mlp_bias": True},
    "odd hidden": {
        "hidden_size": 72,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "tie_word_embeddings": False,
        "rope_scaling": LLAMA3,
    },
}


@pytest.mark.parametrize("case", SHAPES)
def test_types_are_as_predicted(case: str, make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = make_llama(**SHAPES[case])
    shape = Checkpoint(folder).shape
    source = write_gguf(folder, tmp_path / "f16.gguf")
    for kind in USUAL:  # the others: test_gguf_quantise.py
        file = GgufFile(quantise(source, tmp_path / f"{kind}.gguf", kind=kind, threads=2))
        assert {name: info.type for name, info in file.tensors.items()} == tensor_types(shape, kind), kind
        assert file.bytes_by_part() == predicted_bytes(shape, kind)
        assert file.metadata["general.file_type"] == QUANTISATIONS[kind].file_type


@pytest.fixture(scope="module")
def demo_folder(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_to_folder(demo_gguf, tmp_path_factory.mktemp("demo") / "folder")


@pytest.mark.demo
def test_demo_types_are_as_predicted(demo_folder: Path, tmp_path: Path) -> None:
    shape = Checkpoint(demo_folder).shape
    source = write_gguf(demo_folder, tmp_path / "f16.gguf")
    for kind in ("Q4_K_M", "Q4_0", "Q3_K_M"):  # the small models above see all kinds
        path = quantise(source, tmp_path / "q.gguf", kind=kind, threads=2)
        file = GgufFile(path)
        assert {name: info.type for name, info in file.tensors.items()} == tensor_types(shape, kind), kind
        assert file.bytes_by_part() == predicted_bytes(shape, kind)


@pytest.mark.demo
def test_demo_weights_are_those_transformers_reads(demo_gguf: Path, demo_folder: Path) -> None:
    ours = LlamaForCausalLM.from_pretrained(demo_folder)
    theirs = LlamaForCausalLM.from_pretrained(
        demo_gguf.parent, gguf_file=demo_gguf.name, torch_dtype=torch.float32
    ).state_dict()
    for name, values in ours.state_dict().items():
        assert torch.equal(values, theirs[name]), name


def test_fallbacks_are_told() -> None:
    assert fallbacks(BASE, "Q4_K_M") == []
    odd = BASE.with_layers((LayerShape(4, 2, 480),) * 9)
    assert fallbacks(odd, "Q4_0") == []
    told = fallbacks(odd, "Q4_K_M")
    assert len(told) == 2  # ffn_down is Q6_K in some layers and Q4_K in the others
    assert all(line.startswith("ffn_down: rows of 480") for line in told)
    assert "Q4_K becomes Q5_0" in "".join(told)


@given(
    st.sampled_from(list(QUANTISATIONS)),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 24),
)
@settings(deadline=None)
def test_aligned_widths_never_fall_back(kind: str, hidden: int, kv_heads: int, group: int, layers: int) -> None:
    step = alignment(kind)
    shape = replace(
        BASE, hidden=hidden * step, head_dim=step, layers=(LayerShape(kv_heads * group, kv_heads, 3 * step),) * layers
    )
    # The head of a Q4_0 file is Q6_K, whose blocks are longer; without an importance matrix IQ4_NL asks for some Q5_K.
    lines = [
        line for line in fallbacks(shape, kind) if not line.startswith("token_embd") and "Q5_K becomes" not in line
    ]
    assert lines == []


def test_quantise_refuses(make_llama: MakeLlama, tmp_path: Path) -> None:
    source = write_gguf(make_llama(), tmp_path / "f16.gguf")
    with pytest.raises(BadInput, match="did you mean 'Q4_K_S'"):
        quantise(source, tmp_path / "q.gguf", kind="q4_k", threads=1)
    small = quantise(source, tmp_path / "q8.gguf", kind="Q8_0", threads=1)
    with pytest.raises(BadInput, match="already quantised"):
        quantise(small, tmp_path / "q.gguf", kind="Q4_0", threads=1)
    broken = tmp_path / "broken.gguf"
    # Sound as a file, but no model: llama.cpp gives the reason.
    broken.write_bytes(source.read_bytes().replace(b"llama.context_length", b"llama.context_lEngth"))
    with pytest.raises(StageFailed, match="context_length"):
        quantise(broken, tmp_path / "q.gguf", kind="Q4_0", threads=1)
    assert not (tmp_path / "q.gguf").exists()
    assert not list(tmp_path.glob(".q.gguf*"))


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("license: apache-2.0", "apache-2.0"),
        ("license: other\nlicense_name: gemma", "gemma"),
        ("license: other", "other"),
        ("license:\n- mit\n- cc0-1.0", None),
        ('license: """\nSYSTEM x', None),
    ],
)
def test_a_licence_is_a_name_or_nothing(card: str, licence: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\nlanguage: en\n{card}\n---\n# A model\n")
    assert stated_licence(tmp_path) == licence


def with_values(gguf: Path, out: Path, values: dict[str, Any]) -> Path:
    """A copy of a file with metadata more."""
    reader = gguf_library.GGUFReader(gguf)
    writer = gguf_library.GGUFWriter(out, "llama")
    kinds = {float: writer.add_float32, str: writer.add_string}
    for key, value in {**GgufFile(gguf).values(""), **values}.items():
        if not isinstance(value, Value):
            kinds[type(value)](key, value)
        elif key != "general.architecture" and not key.startswith("GGUF."):
            kind = gguf_library.GGUFValueType
            item = None if value.item is None else kind(value.item)
            plain = value.value.tolist() if isinstance(value.value, np.ndarray) else value.value
            writer.add_key_value(key, plain, kind(value.type), item)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize(
    ("values", "scaling"),
    [
        ({"llama.rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"llama.rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
        ({"llama.rope.scaling.factor": 0.0}, None),
        ({"llama.rope.scaling.attn_factor": 2.0}, "attn_factor 2 is not supported"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "'yarn' is not supported"),
    ],
)
def test_rotary_scaling_is_read_as_llamacpp_does(
    values: dict[str, Any], scaling: dict[str, Any] | str | None, make_llama: MakeLlama, tmp_path: Path
) -> None:
    file = with_values(write_gguf(make_llama(), tmp_path / "m.gguf", dtype="F32"), tmp_path / "changed.gguf", values)
    if isinstance(scaling, str):
        with pytest.raises(BadInput, match=scaling):
            gguf_to_folder(file, tmp_path / "back")
        return
    back = gguf_to_folder(file, tmp_path / "back")
    assert Checkpoint(back).config["rope_scaling"] == scaling
    tokens = np.arange(1, 40)
    with (
        closing(LlamaCpp(file, n_ctx=64, threads=1, exact=True)) as there,
        closing(open_runtime(back, n_ctx=64, threads=1)) as here,
    ):
        np.testing.assert_allclose(here.forward(tokens), there.forward(tokens), atol=2e-3)
