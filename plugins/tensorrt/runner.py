"""Compiled kernels on the device: packed into a plugin's fields, loaded through the driver, launched.

Nothing here knows TensorRT's classes, and what the device needs takes neither Triton nor PyTorch: kernels
come as PTX by key, each launch is planned from the shapes (plain arithmetic) and handed to the driver.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from uhd_export.plugins.launch import Launch, Scratch
from uhd_export.plugins.operator import Operator, Shape
from uhd_export.plugins.tensorrt.driver import open_driver
from uhd_export.runtime.errors import UhdError

# Function and sizes; pointers; integers; nulls.
_Call = tuple[tuple[Any, ...], list[tuple[int, int]], tuple[int, ...], int]
KERNELS = "kernels"  # the serialized field that holds the compiled kernels
ALIGNMENT = 256  # bytes, of a scratch buffer in the workspace
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_PLANS = 64  # shapes whose launches are kept: planning takes longer than the driver does


def kernel_key(launch: Launch, types: Sequence[str], capability: int) -> str:
    """What tells the kernels of one plugin apart."""
    return json.dumps([launch.kernel, capability, list(types), [list(pair) for pair in launch.constants]])


def pack(kernels: Mapping[str, Mapping[str, Any]]) -> np.ndarray:
    """Kernels by key as the bytes of a plugin field; PTX is text and shrinks to a seventh."""
    return np.frombuffer(zlib.compress(json.dumps(kernels).encode(), 9), np.int8)


def unpack(data: Any) -> dict[str, dict[str, Any]]:
    """The inverse of `pack`. Raises UhdError where the bytes are not its work."""
    try:
        return json.loads(zlib.decompress(np.asarray(data).astype(np.int8, copy=False).tobytes()))
    except (zlib.error, ValueError, TypeError) as error:
        raise UhdError(
            f"engine: the kernels in its plugins cannot be read ({error}); build it again"
        ) from None


class Runner:
    """Plans and launches the kernels of one plugin on the device. Knows nothing of TensorRT."""

    def __init__(
        self, operator: Operator, attributes: Mapping[str, int], kernels: Mapping[str, Mapping]
    ) -> None:
        self.operator, self.attributes, self.kernels = operator, attributes, kernels
        self._functions: dict[tuple[int, str], Any] = {}
        self._plans: dict[tuple[Any, ...], list[_Call]] = {}

    def run(
        self,
        shapes: Sequence[Shape],
        types: Sequence[str],
        pointers: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Queue all launches. `types` and `pointers` are of the inputs, then the outputs."""
        driver = open_driver()
        context = driver.context()
        key = (context, tuple(map(tuple, shapes)), tuple(types))
        if key not in self._plans:
            if len(self._plans) == _PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = self._plan(shapes, types, context)
        places = (*pointers, workspace)
        for (function, grid, threads, shared), tensors, integers, nulls in self._plans[key]:
            addresses = [places[index] + offset for index, offset in tensors]
            driver.launch(function, grid, threads, shared, stream, addresses, integers, nulls)

    def _plan(self, shapes: Sequence[Shape], types: Sequence[str], context: int) -> list[_Call]:
        """The launches for inputs of these shapes: function and sizes, pointers, integers, nulls.

        A pointer is an index into inputs, outputs and workspace, and the bytes from there on.
        """
        inputs, outputs = self.operator.inputs(self.attributes), self.operator.outputs(self.attributes)
        launches, scratch = self.operator.plan(
            dict(zip(inputs, shapes, strict=True)), self.attributes, types[-1]
        )
        tensors = (*inputs, *outputs)
        kind = dict(zip(tensors, types, strict=True)) | {one.name: one.dtype for one in scratch}
        place = {name: (index, 0) for index, name in enumerate(tensors)}
        place |= {name: (len(tensors), offset) for name, offset in layout(scratch)[0].items()}
        driver, plan = open_driver(), []
        capability = driver.capability()
        for launch in launches:
            key = kernel_key(launch, [kind[name] for name in launch.tensors], capability)
            if key not in self.kernels:
                raise UhdError(self._missing(launch, capability))
            kernel = self.kernels[key]
            if (context, key) not in self._functions:
                self._functions[context, key] = driver.load(kernel["ptx"], kernel["name"], kernel["shared"])
            call = (self._functions[context, key], launch.grid, 32 * kernel["warps"], kernel["shared"])
            pointers = [place[name] for name in launch.tensors]
            plan.append((call, pointers, launch.integers, kernel["nulls"]))
        return plan

    def _missing(self, launch: Launch, capability: int) -> str:
        built = sorted({json.loads(key)[1] for key in self.kernels})
        if capability not in built:
            names = ", ".join(f"{c // 10}.{c % 10}" for c in built)
            return (
                f"operator {self.operator.name}: this GPU has compute capability {capability // 10}."
                f"{capability % 10}, the engine's kernels are for {names}; build it for this GPU"
            )
        return (
            f"operator {self.operator.name}: the engine has no kernel {launch.kernel} for this shape "
            f"({dict(launch.constants)}); build it again with a profile that covers the shape"
        )


def workspace_bytes(
    operator: Operator, shapes: Sequence[Shape], attributes: Mapping[str, int], dtype: str
) -> int:
    """Bytes of scratch for inputs of these shapes."""
    names = operator.inputs(attributes)
    _, scratch = operator.plan(dict(zip(names, shapes, strict=True)), attributes, dtype)
    return layout(scratch)[1]


def layout(scratch: Sequence[Scratch]) -> tuple[dict[str, int], int]:
    """Where each buffer begins in the workspace, and the bytes of all."""
    offsets, end = {}, 0
    for one in scratch:
        offsets[one.name] = end
        end += -(-_BYTES[one.dtype] * one.elements // ALIGNMENT) * ALIGNMENT
    return offsets, end
