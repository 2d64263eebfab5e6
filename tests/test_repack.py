"""Memory for llama.cpp's reordered copies of weights: by processor, and as much as llama.cpp itself reports here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MakeLlama

from edgeprune.checkpoint import Checkpoint
from edgeprune.cost import MIB, predict
from edgeprune.devices import load_profile
from edgeprune.host import gather
from edgeprune.recognise import recognise
from edgeprune.runtimes.llamacpp_repack import repacked_bytes
from edgeprune.targets import target_for

ARM = {"Q4_0", "IQ4_NL", "Q8_0", "Q4_K", "Q5_K", "Q6_K"}


@pytest.mark.parametrize(
    ("isa", "counted"),
    [
        (("neon",), set()),
        (("neon", "fp16", "dotprod"), ARM),
        (("avx2", "fma"), {"Q4_0", "IQ4_NL", "Q4_K"}),
        (("avx2", "avx512f"), {"Q4_0", "IQ4_NL", "Q4_K", "Q2_K"}),
        ((), ARM | {"Q2_K"}),
    ],
)
def test_what_is_copied_for_a_processors_kernels(isa: tuple[str, ...], counted: set[str]) -> None:
    for kind in ("F16", "Q4_0", "IQ4_NL", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"):
        tensors = [("blk.0.ffn_up.weight", kind, (64, 256), 7), ("token_embd.weight", kind, (64, 256), 5)]
        assert repacked_bytes(tensors, isa, tied=False) == 7 * (kind in counted)
        assert repacked_bytes(tensors, isa, tied=True) == 12 * (kind in counted)
        assert repacked_bytes([("blk.0.ffn_up.weight", kind, (63, 256), 7)], isa, tied=False) == 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["Q4_0:embed=Q4_0:head=Q4_0", "Q4_K_M", "Q8_0"])
def test_llamacpp_copies_as_much_as_predicted(kind: str, tied: bool, make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = make_llama(hidden_size=256, intermediate_size=512, tie_word_embeddings=tied)
    target = target_for(kind)
    path = target.format.export(folder, tmp_path / "q.gguf", target.quantisation, tmp_path, threads=1)
    script = f"import llama_cpp; llama_cpp.Llama({str(path)!r}, n_ctx=32, verbose=True)"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stderr
    found = re.findall(r"CPU_REPACK model buffer size = +([\d.]+) MiB", told)
    isa = recognise(gather()).isa
    predicted = target.format.repacked(Checkpoint(folder).shape, target.quantisation, isa)
    assert float(found[0] if found else 0) == pytest.approx(predicted / MIB, abs=0.01)


def test_a_gpu_has_no_copies() -> None:
    laptop = load_profile("rtx4050-laptop")
    figures = {"bytes_per_token": 1e9, "n_layers": 8, "weights_bytes": 10**9, "kv_bytes": 0}
    with_copies, without = (
        predict(laptop, runtime="llamacpp", repack_bytes=copied, **figures).memory_mib.value for copied in (10**9, 0)
    )
    assert with_copies == without
