"""The external data file of an ONNX model, written tensor by tensor, so that memory holds one tensor at a time.

Two initializers may point at the same bytes under different shapes: that is how the embedding and a tied head share
one tensor although `GatherBlockQuantized` wants it in two dimensions and `MatMulNBits` in three.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeprune.errors import BadInput

ALIGNMENT = 64  # bytes: a cache line, so that kernels may use the memory-mapped file as it is
_INLINE = 256  # bytes; below this a tensor stays in the graph, where shape inference can read it
_DTYPES = {
    np.dtype(np.float32): ir.DataType.FLOAT,
    np.dtype(np.float16): ir.DataType.FLOAT16,
    np.dtype(np.uint8): ir.DataType.UINT8,
    np.dtype(np.int64): ir.DataType.INT64,
}


class Store:
    """Writes `folder / name` and makes the initializers that point into it. Use it as a context manager."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.initializers: list[ir.Value] = []
        self._file = (folder / name).open("wb")

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, name: str, array: NDArray[Any]) -> ir.Value:
        """Write `array`, of a dtype in float32, float16, uint8 and int64; its initializer."""
        array = np.ascontiguousarray(array)
        if array.nbytes < _INLINE:
            return self._initializer(ir.Tensor(array, name=name))
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        self._file.write(array.data)
        return self._initializer(
            ir.ExternalTensor(
                self.name,
                offset,
                array.nbytes,
                _DTYPES[array.dtype],
                shape=ir.Shape(array.shape),
                name=name,
                base_dir=self.folder,
            )
        )

    def alias(self, name: str, of: ir.Value, shape: Sequence[int]) -> ir.Value:
        """An initializer over the bytes of another, in another shape of as many elements.

        Raises:
            BadInput: the number of elements differs.
        """
        tensor = of.const_value
        if math.prod(shape) != math.prod(tensor.shape.numpy()):
            raise BadInput(f"{of.name} {tensor.shape} has other than {math.prod(shape)} elements")
        if isinstance(tensor, ir.ExternalTensor):
            return self._initializer(
                ir.ExternalTensor(
                    tensor.location,
                    tensor.offset,
                    tensor.length,
                    tensor.dtype,
                    shape=ir.Shape(shape),
                    name=name,
                    base_dir=self.folder,
                )
            )
        return self._initializer(ir.Tensor(tensor.numpy().reshape(shape), name=name))

    def _initializer(self, tensor: Any) -> ir.Value:
        value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self.initializers.append(value)
        return value
