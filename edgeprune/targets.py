"""What a model can be exported to: every pair of a runtime and a quantisation, as a table.

A new export format is one entry in `FORMATS`: how to tell bytes before anything is written, and how to write.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgeprune.errors import BadInput, unknown
from edgeprune.export.gguf_layout import longest_context
from edgeprune.export.gguf_types import QUANTISATIONS, canonical, recipe, tensor_types, tensors
from edgeprune.export.gguf_types import alignment as gguf_alignment
from edgeprune.export.gguf_types import fallbacks as gguf_fallbacks
from edgeprune.export.gguf_types import predicted_bytes as gguf_bytes
from edgeprune.export.onnx_types import MAX_CONTEXT
from edgeprune.runtimes.gguf_file import tensor_bytes
from edgeprune.runtimes.llamacpp_repack import repacked_bytes
from edgeprune.shape import ModelShape

IMATRIX = "imatrix.gguf"  # of the checkpoint to export, in the scratch folder

Parts = Mapping[str, int]  # bytes by part of the model: "embedding", "head", "attention", "mlp", "norms"


class Export(Protocol):
    """Writes the checkpoint in `folder` to `out` with a quantisation; returns `out`.

    Args:
        scratch: a folder for what is made on the way, and where an importance matrix is.
        context: positions the file is made for, where it is made for a number of them; None: the format's default.
    """

    def __call__(
        self, folder: Path, out: Path, kind: str, scratch: Path, *, threads: int, context: int | None = None
    ) -> Path: ...


@dataclass(frozen=True)
class Format:
    """One export format.

    Attributes:
        name: how the user names it.
        runtime: the runtime that loads it.
        quantisations: the kinds it offers, best quality first.
        fit: of those, the kinds `fit` tries by default.
        parts: bytes by part of a model of a shape, quantised.
        types: bytes of matrices that a token reads, by tensor type; empty where they do not tell the speed.
        alignment: the number of MLP neurons must be a multiple of this.
        fallbacks: one line for each kind of tensor that cannot have the type asked for.
        per_layer: whether it carries widths that differ from layer to layer, for a model of a shape.
        repacked: bytes of weights that the runtime keeps a second, reordered copy of on a processor with these
            extensions (none: unknown).
        export: writes a checkpoint; see `Export`.
        positions: how many a file for a context is made for; None: it is not made for a number of them.
        longest: how many positions of a model of a shape the file computes as the model does.
        suffix: of the output path.
    """

    name: str
    runtime: str
    quantisations: tuple[str, ...]
    fit: tuple[str, ...]
    parts: Callable[[ModelShape, str], Parts]
    types: Callable[[ModelShape, str], Mapping[str, int]]
    alignment: Callable[[str], int]
    fallbacks: Callable[[ModelShape, str], list[str]]
    repacked: Callable[[ModelShape, str, Collection[str]], int]
    per_layer: Callable[[ModelShape], bool]
    export: Export
    positions: Callable[[int], int] | None = None
    longest: Callable[[ModelShape], int] = lambda shape: shape.max_positions
    suffix: str = ""


def _export_gguf(
    folder: Path, out: Path, kind: str, scratch: Path, *, threads: int, context: int | None = None
) -> Path:
    from edgeprune.export.gguf_quantise import quantise
    from edgeprune.export.gguf_writer import write_gguf

    if kind == "F16":
        return write_gguf(folder, out, dtype="F16")
    if kind == "F32":
        return write_gguf(folder, out, dtype="F32")
    matrix = None
    if recipe(kind).imatrix:
        from edgeprune.export.gguf_imatrix import read_imatrix

        path = scratch / IMATRIX
        if not path.exists():
            raise BadInput(f"{kind} needs an importance matrix", where=path, remedy="make one of this checkpoint first")
        matrix = read_imatrix(path)
    # The unquantised file serves every quantisation of the same checkpoint; it is F32, so nothing is rounded twice.
    full = scratch / "full.gguf"
    if not full.exists():
        write_gguf(folder, full, dtype="F32")
    return quantise(full, out, kind=kind, threads=threads, imatrix=matrix)


def _gguf_repacked(shape: ModelShape, kind: str, isa: Collection[str]) -> int:
    types = tensor_types(shape, kind)
    each = ((t.name, types[t.name], t.shape, tensor_bytes(types[t.name], t.shape)) for t in tensors(shape))
    return repacked_bytes(each, isa, tied=shape.tied)


def _gguf_types(shape: ModelShape, kind: str) -> Mapping[str, int]:
    types = tensor_types(shape, kind)
    totals: Counter[str] = Counter()
    for tensor in tensors(shape):
        if len(tensor.shape) > 1 and (shape.tied or tensor.name != "token_embd.weight"):
            totals[types[tensor.name]] += tensor_bytes(types[tensor.name], tensor.shape)
    return totals


def _export_onnx(
    folder: Path, out: Path, kind: str, scratch: Path, *, threads: int, context: int | None = None
) -> Path:
    from edgeprune.export.onnx_graph import export_onnx

    return export_onnx(folder, out, precision=kind, context=context)


def _onnx_parts(shape: ModelShape, kind: str) -> Parts:
    from edgeprune.export.onnx_types import predicted_bytes

    return predicted_bytes(shape, kind)


FORMATS: dict[str, Format] = {
    each.name: each
    for each in (
        Format(
            name="gguf",
            runtime="llamacpp",
            quantisations=tuple(QUANTISATIONS),
            # Beside the usual ones three that read less: embedding and head in four bits, and an importance matrix.
            fit=(
                "Q8_0",
                "Q6_K",
                "Q5_K_M",
                "Q4_K_M",
                "Q4_0",
                "Q4_0:imatrix",
                "Q4_0:embed=Q4_0:head=Q4_0:imatrix",
                "IQ4_NL:embed=IQ4_NL:head=IQ4_NL:imatrix",
                "Q3_K_M",
                "Q2_K:imatrix",
            ),
            parts=gguf_bytes,
            types=_gguf_types,
            alignment=gguf_alignment,
            fallbacks=gguf_fallbacks,
            repacked=_gguf_repacked,
            longest=longest_context,
            per_layer=lambda shape: shape.family.gguf_per_layer is not None,
            export=_export_gguf,
            suffix=".gguf",
        ),
        Format(
            name="onnx",
            runtime="onnxruntime",
            quantisations=("fp32", "fp16", "int8", "int4-head8", "int4"),
            fit=("int8", "int4"),
            parts=_onnx_parts,
            types=lambda _shape, _kind: {},
            alignment=lambda _kind: 32,  # the block of MatMulNBits
            fallbacks=lambda _shape, _kind: [],
            # It packs weights anew too, but lets the originals go: the overhead in `cost` was measured with that.
            repacked=lambda _shape, _kind, _isa: 0,
            per_layer=lambda _shape: True,
            export=_export_onnx,
            positions=lambda context: max(context, MAX_CONTEXT),
        ),
    )
}


@dataclass(frozen=True)
class Target:
    """A format and one of its quantisations."""

    format: Format
    quantisation: str

    @property
    def runtime(self) -> str:
        """The runtime that loads the result."""
        return self.format.runtime

    @property
    def mixture(self) -> str:
        """The quantisation without its options: what its speed is published under."""
        return self.quantisation.partition(":")[0]

    @property
    def needs_imatrix(self) -> bool:
        """Whether exporting takes an importance matrix of the checkpoint, in the scratch folder."""
        return self.format.name == "gguf" and recipe(self.quantisation).imatrix

    def __str__(self) -> str:
        return f"{self.quantisation} on {self.runtime}"


def target_for(quantisation: str, *, formats: Mapping[str, Format] = FORMATS) -> Target:
    """The target of a quantisation's name, whatever its case; names are unique over the formats.

    A GGUF quantisation may have options: `Q4_0:embed=IQ4_NL:imatrix` (`gguf_types.recipe`).

    Raises:
        BadInput: no format has it, or an option is unknown; the message names the nearest and all of them.
    """
    if ":" in quantisation and "gguf" in formats:
        return Target(formats["gguf"], canonical(quantisation))
    names = {kind.lower(): Target(each, kind) for each in formats.values() for kind in each.quantisations}
    if quantisation.lower() not in names:
        raise unknown("quantisation", quantisation, [target.quantisation for target in names.values()])
    return names[quantisation.lower()]


def default_targets(runtimes: tuple[str, ...] | None = None) -> list[Target]:
    """The targets `fit` tries: those of the given runtimes, or of all."""
    return [
        Target(each, kind) for each in FORMATS.values() if not runtimes or each.runtime in runtimes for kind in each.fit
    ]
