"""Writes a checkpoint as an ExecuTorch program (.pte) whose matrices XNNPACK multiplies.

The program has what ExecuTorch's text runner asks for (`TextLLMRunner`; `LlmModule` in apps): a method `forward`, and
constants under the runner's names. Source: https://docs.pytorch.org/executorch/stable/llm/run-with-c-plus-plus.html
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from edgeprune.checkpoint import Checkpoint
from edgeprune.errors import BadInput, missing_extra, unknown
from edgeprune.export.pte_graph import Decoder
from edgeprune.files import atomic_file
from edgeprune.runtimes.pte import quiet
from edgeprune.runtimes.pytorch import load_model
from edgeprune.shape import ModelShape

PRECISIONS = ("int4", "int8", "fp32")
CHUNK = 512  # tokens of a prompt that go through at once: the program's memory is planned for as many


def write_pte(
    checkpoint: Path,
    out: Path,
    *,
    precision: str = "int4",
    imatrix: Path | None = None,
    context: int,
    chunk: int = CHUNK,
    bos: int | None = None,
    eos: Sequence[int] = (),
) -> Path:
    """Write a checkpoint, whose layers may differ, to `out`; the same checkpoint gives the same bytes.

    Lowering takes some seconds a layer and holds the model in float32.

    Args:
        checkpoint: a Hugging Face folder.
        out: the file to write.
        precision: "int4", "int8" (`pte_quant`) or "fp32".
        imatrix: an importance matrix of the checkpoint, for "int4".
        context: positions of the cache.
        chunk: most tokens in one call; the runner cuts longer prompts.
        bos: id of the token that begins a text, if there is one.
        eos: ids of those that end an answer.

    Raises:
        BadInput: a model that ExecuTorch's operators cannot compute, or an unknown precision.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    shape = Checkpoint(checkpoint).shape
    if context < 2:
        raise BadInput(f"a context of {context} holds no answer", where=checkpoint)
    with quiet():
        _operators()
        decoder = Decoder(load_model(checkpoint), shape, context)
        if precision != "fp32":
            from edgeprune.export.pte_quant import quantise

            importance = {} if imatrix is None else _importance(imatrix, shape)
            quantise(decoder.model, 4 if precision == "int4" else 8, importance)
        constants: dict[str, Any] = {
            "get_max_context_len": context,
            "get_max_seq_len": min(chunk, context),
            "get_vocab_size": shape.vocab,
            "get_n_layers": len(shape.layers),
            "get_eos_ids": list(eos),
            "use_kv_cache": True,
            "use_sdpa_with_kv_cache": True,
            "enable_dynamic_shape": True,
        }
        if bos is not None:
            constants["get_bos_id"] = bos
        program = _lowered(decoder, min(chunk, context), constants)
        with atomic_file(out) as temporary, temporary.open("wb") as file:
            program.write_to_file(file)
    return out


def _importance(imatrix: Path, shape: ModelShape) -> dict[str, torch.Tensor]:
    """What errors of each module's columns weigh, by the module's name."""
    from edgeprune.export.gguf_imatrix import read_imatrix
    from edgeprune.export.gguf_layout import module_name

    found = {
        module_name(name, shape).removesuffix(".weight"): torch.from_numpy(value.copy())
        for name, value in read_imatrix(imatrix).values.items()
    }
    if shape.tied:  # the matrix has what the head reads under the name of the one tensor; here there will be two
        found[shape.family.head] = found.pop(shape.family.embedding)
    return found


def _operators() -> None:
    try:
        import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401
    except ImportError as error:
        raise missing_extra("executorch", "executorch") from error


def _lowered(decoder: Decoder, chunk: int, constants: dict[str, Any]) -> Any:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackDynamicallyQuantizedPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.quant_fusion_pass import QuantFusionPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    example = (torch.zeros((1, 2), dtype=torch.long), torch.zeros(1, dtype=torch.long))
    tokens = torch.export.Dim("tokens", min=1, max=chunk)
    with torch.no_grad():
        exported = torch.export.export(decoder, example, dynamic_shapes=({1: tokens}, None), strict=False)
    edge = to_edge_transform_and_lower(
        exported,
        # XNNPACK gets the products with quantised weights and nothing else, as in ExecuTorch's own exporter.
        partitioner=[XnnpackDynamicallyQuantizedPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        constant_methods=constants,
    )
    return edge.to_executorch(
        ExecutorchBackendConfig(
            passes=[QuantFusionPass()],
            do_quant_fusion_and_const_prop=True,
            memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
        )
    )
