"""The exporter of optimum-onnx, for families without a table here: unfused, several times slower, but independent."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from edgeprune.errors import BadInput, StageFailed, missing_extra
from edgeprune.families import family_for
from edgeprune.files import atomic_folder, read_json
from edgeprune.per_layer import KEY

_PROVED = 16  # tokens on which the graph is compared with the model
_CLOSE = 1e-3  # of the largest logit


def export_optimum(folder: Path, out: Path) -> Path:
    """Write a Hugging Face folder as an fp32 ONNX folder `out` with optimum, whole or not at all; returns `out`.

    The graph has a cache and `position_ids`; `runtimes.ort.OnnxRuntime` runs it, onnxruntime-genai does not.

    Raises:
        BadInput: optimum-onnx is not installed, the folder is no checkpoint, or its layers have different widths.
        StageFailed: optimum cannot export this model.
    """
    if not (folder / "config.json").is_file():
        raise BadInput("no config.json", where=folder, remedy="give a folder in Hugging Face format")
    if not any(folder.glob("*.safetensors")):
        raise BadInput(
            "no safetensors", where=folder, remedy="convert the weights: pickles are not read, they run code"
        )
    if read_json(folder / "config.json").get(KEY):
        raise BadInput(
            "optimum makes every layer of one width, and this model's differ",
            where=folder,
            remedy="use the exporter of this package, or prune with --uniform",
        )
    try:
        from optimum.exporters.onnx import main_export
    except ImportError as error:
        raise missing_extra("optimum-onnx", "optimum") from error
    with atomic_folder(out) as temporary:
        try:
            main_export(
                str(folder),
                temporary,
                task="text-generation-with-past",
                trust_remote_code=False,
                local_files_only=True,
                do_validation=False,
            )
        except Exception as error:  # whatever the tracing of foreign model code raises
            raise StageFailed(f"optimum cannot export it ({error})", where=folder) from error
        _prove(folder, temporary)
    return out


def _prove(folder: Path, made: Path) -> None:
    """Compare the graph's logits with the model's: optimum leaves out soft caps, and reads configs by the installed
    transformers alone.

    Raises:
        StageFailed: they differ.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from edgeprune.runtimes.ort import OnnxRuntime
    from edgeprune.runtimes.pytorch import load_model

    try:
        family_for(str(read_json(folder / "config.json").get("model_type")))
        model = load_model(folder)
    except BadInput:  # of a family without a table here
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, attn_implementation="eager").float()
    with closing(OnnxRuntime(made, n_ctx=_PROVED, threads=1)) as runtime:
        ids = torch.randint(runtime.n_vocab, (1, _PROVED), generator=torch.Generator().manual_seed(0))
        found = torch.from_numpy(runtime.forward(ids[0].tolist()).copy())
    with torch.inference_mode():
        wanted = model(input_ids=ids).logits[0]
    if not torch.allclose(found, wanted, rtol=_CLOSE, atol=_CLOSE * float(wanted.abs().max())):
        far = float((found - wanted).abs().max())
        raise StageFailed(
            f"optimum's graph is another model: its logits differ by up to {far:.3g}",
            where=folder,
            remedy="use the exporter of this package (--exporter own)",
        )
