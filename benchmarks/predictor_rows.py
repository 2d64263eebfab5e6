"""The rows of published_tps.csv as the fit wants them: what each speed depends on, by name."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import published_devices
import published_models
from predictor_fit import Row
from published_devices import Place

# Quantisations whose kernels differ from Q4_0's and Q4_K's in what they get out of the memory.
KERNELS = {
    **dict.fromkeys(("F16", "BF16"), "16bit"),
    **dict.fromkeys(("Q8_0", "Q8_K_XL"), "8bit"),
    **dict.fromkeys(("Q5_K_M", "Q6_K"), "6bit"),
    **dict.fromkeys(("Q2_K", "Q3_K_M", "Q3_K_L", "AVQ2"), "3bit"),
    "IQ3_M": "iq3",
    "IQ4_XS": "iq4",
}
# Parts of a runtime's name that tell it from llama.cpp.
RUNTIMES = ("mlc", "executorch", "litert", "vulkan", "llamafile", "ollama", "vllm", "mlx", "rustllm", "lm studio")
NO_LAYERS = 1e-6  # in prompt processing a layer's fixed cost is spread over hundreds of tokens


def number(text: str) -> float:
    """A cell's number; some are marked as approximate."""
    return float(text.lstrip("~"))


def read(path: Path) -> tuple[list[Row], list[Row]]:
    """Rows of decoding and of prompt processing that are marked as usable.

    Raises:
        KeyError: a device, model or quantisation that the tables do not know.
    """
    decode, prefill = [], []
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            if line["usable_for_fit"] != "yes":
                continue
            if line["tg_tps"]:
                decode.append(decode_row(line))
            if line["pp_tps"] and line["quant"] in published_models.BITS:
                prefill.append(prefill_row(line))
    return decode, prefill


def _model(line: dict[str, str]) -> published_models.Published:
    return published_models.find(line["model"], number(line["params_b"]) if line["params_b"] else None)


def bytes_read(line: dict[str, str]) -> float:
    """Bytes of weights that a token reads: by the file's size where the row has it, else by the model's shape."""
    model, quantisation = _model(line), line["quant"]
    if not line["size_mib"]:
        return model.read_bytes(quantisation)
    embedding = 0.0 if model.tied else model.vocab * model.width * published_models.BITS[quantisation][0] / 8
    return number(line["size_mib"]) * 2**20 - embedding


def _parameters(line: dict[str, str], place: Place) -> dict[str, float]:
    names = {f"kind:{place.kind}": 1.0, f"device:{place.key}": 1.0}
    if kernel := KERNELS.get(line["quant"]):
        names[f"kernel:{place.sort}-{kernel}"] = 1.0
    if runtime := next((name for name in RUNTIMES if name in line["runtime"].lower()), None):
        names[f"runtime:{place.sort}-{runtime}"] = 1.0
    threads = int(line["threads"]) if line["threads"] else place.big_cores
    if 0 < threads < place.big_cores:
        names[f"fewer:{place.kind}"] = float(np.log(place.big_cores / threads))
    elif threads > place.big_cores > 0:
        names[f"beyond:{place.kind}"] = 1.0
    return names


def decode_row(line: dict[str, str]) -> Row:
    """A line's decode speed."""
    place = published_devices.find(line["device_id"], line["backend"])
    return Row(
        number(line["tg_tps"]),
        bytes_read(line) / place.nominal_gbs / 1e9,
        _model(line).layers,
        place.key,
        line["source"],
        _parameters(line, place),
        place.layer,
        line["confidence"],
        line,
    )


def prefill_row(line: dict[str, str]) -> Row:
    """A line's speed of prompt processing: 10^9 parameters take a second at efficiency 1, which is e^0."""
    place = published_devices.find(line["device_id"], line["backend"])
    return Row(
        number(line["pp_tps"]),
        _model(line).params_b,
        NO_LAYERS,
        place.key,
        line["source"],
        _parameters(line, place),
        "layer:none",
        line["confidence"],
        line,
    )
