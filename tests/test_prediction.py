"""`predict`: what a file, a checkpoint or bare numbers are predicted to do on a device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgeprune.candidates import cost_of
from edgeprune.checkpoint import Checkpoint
from edgeprune.cli import app
from edgeprune.cost import MIB, predict
from edgeprune.devices import Budget, load_profile, parse_profile
from edgeprune.errors import BadInput
from edgeprune.export.gguf_quantise import quantise
from edgeprune.export.gguf_writer import write_gguf
from edgeprune.prediction import predict_file, predict_size
from edgeprune.targets import target_for

NUMBERS = ("tg_tps", "tg_low", "tg_high", "pp_tps", "pp_low", "pp_high", "ttft_s", "peak_mib")
LLAMA_1B = ("--params", "1.24e9", "--layers", "16", "--size-mib", "770", "--quant", "Q4_0")


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["predict", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def profile_with(text: str) -> Any:
    """A device of 10 GB/s, with more TOML at its end."""
    number = 'value = {}, kind = "assumed", source = "test"'
    lines = [
        'name = "made-up"',
        'description = "for a test"',
        f"memory.total_gib = {{ {number.format(1)} }}",
        f"memory.usable_share = {{ {number.format(0.5)} }}",
        'cpu.model = "none"',
        f"cpu.cores = {{ {number.format(4)} }}",
        f"cpu.big_cores = {{ {number.format(4)} }}",
        f"decode.cpu.gbs = {{ {number.format(10)} }}",
        'start.runtime = "llamacpp"',
        'start.backend = "cpu"',
        'start.quantisation = "Q4_0"',
        f"start.threads = {{ {number.format(4)} }}",
        text.replace("NUMBER", number),
    ]
    return parse_profile("\n".join(lines), where="test")


@pytest.fixture(scope="module")
def gguf(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    half = write_gguf(tiny_folder, folder / "f16.gguf", dtype="F16")
    return quantise(half, folder / "q.gguf", kind="Q4_0", threads=1)


def test_json_has_every_figure_with_its_interval() -> None:
    found = json.loads(run("--device", "rpi5", *LLAMA_1B, "--json"))
    assert all(found[name] > 0 for name in NUMBERS)
    assert found["tg_low"] < found["tg_tps"] < found["tg_high"]
    assert found["ttft_low"] < found["ttft_s"] < found["ttft_high"]
    assert found["ttft_s"] == pytest.approx(512 / found["pp_tps"] + 1 / found["tg_tps"])
    assert (found["fits"], found["reason"], found["kind"]) == (True, None, "predicted")
    assert found["assumed"]  # a size alone does not tell the cache


def test_the_table_says_what_does_not_fit() -> None:
    said = run("--device", "rpi-zero2w", *LLAMA_1B)
    assert "rpi-zero2w holds" in said and "predicted" in said


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device", "rpi5"], "nothing to predict for"),
        (["--device", "rpi5", "--params", "1e9", "--layers", "0", "-q", "Q4_0"], "layers"),
        (["--device", "rpi5", "--params", "nan", "--layers", "3", "-q", "Q4_0"], "parameters"),
        (["--device", "rpi5", "--params", "1e9", "--layers", "3", "-q", "Q4"], "Q4_0"),
        (["--device", "rpi6", *LLAMA_1B], "rpi5"),
        (["no-such-file.gguf", "--device", "rpi5"], "no-such-file.gguf"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str) -> None:
    from edgeprune.errors import EdgepruneError

    result = CliRunner().invoke(app, ["predict", *arguments])
    assert isinstance(result.exception, EdgepruneError) and result.exception.exit_code == 2
    assert message in str(result.exception)


def test_a_file_is_what_its_checkpoint_was_predicted_to_become(tiny_folder: Path, gguf: Path) -> None:
    profile = load_profile("rpi5")
    before = predict_file(tiny_folder, profile, quantisation="Q4_0", context=128)
    after = predict_file(gguf, profile, context=128)
    assert after.quantisation == "Q4_0"
    assert after.cost.decode_tps == before.cost.decode_tps
    assert after.cost.prefill_tps == before.cost.prefill_tps
    assert after.cost.memory_mib.value == pytest.approx(before.cost.memory_mib.value, abs=0.01)
    target = target_for("Q4_0")
    assert before.cost == cost_of(Checkpoint(tiny_folder).shape, target, profile, Budget.of(profile, context=128))


def test_threads_context_and_depth_cost_what_they_should(gguf: Path) -> None:
    profile = load_profile("rpi5")
    usual = predict_file(gguf, profile, context=512).cost
    assert predict_file(gguf, profile, context=512, threads=1).cost.decode_tps.value < usual.decode_tps.value
    assert predict_file(gguf, profile, context=512, depth=500).cost.decode_tps.value < usual.decode_tps.value
    assert predict_file(gguf, profile, context=4096).cost.memory_mib.value > usual.memory_mib.value
    assert usual.prefill_tps is not None
    half = predict_file(gguf, profile, context=512, threads=2).cost.prefill_tps
    assert half is not None and half.value == pytest.approx(usual.prefill_tps.value / 2)


def test_a_file_has_its_quantisation_and_a_folder_needs_one(tiny_folder: Path, gguf: Path) -> None:
    with pytest.raises(BadInput, match="leave --quant out"):
        predict_file(gguf, load_profile("rpi5"), quantisation="Q8_0")
    with pytest.raises(BadInput, match="add --quant"):
        predict_file(tiny_folder, load_profile("rpi5"))


def test_a_kernel_that_is_bound_by_arithmetic_reads_less_a_second() -> None:
    profile = profile_with(
        "decode.cpu.kernel.IQ3_S = { NUMBER }".replace("NUMBER", 'value = 0.5, kind = "assumed", source = "t"')
    )

    def speed(quantisation: str) -> float:
        arguments: dict[str, Any] = {"bytes_per_token": 1e8, "n_layers": 10, "weights_bytes": 10**8, "kv_bytes": 0}
        return predict(profile, runtime="llamacpp", quantisation=quantisation, **arguments).decode_tps.value

    assert speed("Q4_0") == pytest.approx(100)
    assert speed("IQ3_S") == pytest.approx(50)


def test_no_figure_for_the_kernel_is_said_not_guessed() -> None:
    found = predict_size(1e8, 10, "Q4_0", profile_with(""))
    assert found.cost.prefill_tps is None and found.ttft_s is None
    assert found.to_json()["pp_tps"] is None and found.to_json()["ttft_s"] is None


def test_a_quantisation_may_be_in_any_case() -> None:
    exact, loose = (predict_size(1e8, 10, name, profile_with("")) for name in ("IQ4_NL", "iq4_nl"))
    assert exact == loose


def test_memory_beyond_the_device_is_a_reason() -> None:
    found = predict_size(1e9, 10, "Q8_0", profile_with(""), size_mib=600)
    assert not found.to_json()["fits"]
    assert "holds 512 MiB" in found.to_json()["reason"]
    assert found.cost.memory_mib.value > 600 * MIB / MIB
