"""The exporter of optimum-onnx, for families without a table here: unfused, several times slower, but independent."""

from __future__ import annotations

from pathlib import Path

from edgeprune.errors import BadInput, StageFailed, missing_extra
from edgeprune.files import atomic_folder, read_json
from edgeprune.per_layer import KEY


def export_optimum(folder: Path, out: Path) -> Path:
    """Write a Hugging Face folder as an fp32 ONNX folder `out` with optimum, whole or not at all; returns `out`.

    The graph has a cache and `position_ids`; `runtimes.ort.OnnxRuntime` runs it, onnxruntime-genai does not.

    Raises:
        BadInput: optimum-onnx is not installed, the folder is no checkpoint, or its layers have different widths.
        StageFailed: optimum cannot export this model.
    """
    if not (folder / "config.json").is_file():
        raise BadInput("no config.json", where=folder, remedy="give a folder in Hugging Face format")
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
    return out
