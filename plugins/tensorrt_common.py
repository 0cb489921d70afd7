"""What the plugins' operators are, their checks, and the launching of their compiled kernels.

Nothing here knows TensorRT's classes (`plugins.tensorrt_plugin` does), and what the device needs takes
neither Triton nor PyTorch: kernels come as PTX by key, each launch is planned from the shapes
(`plugins/*/launch.py`, plain arithmetic) and handed to the driver.
"""

import functools
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from plugins.driver import open_driver
from plugins.launch import Launch, Scratch
from runtime.errors import UhdError

VERSION = "1"
KERNELS = "kernels"  # the serialized field that holds the compiled kernels
ALIGNMENT = 256  # bytes, of a scratch buffer in the workspace
Shape = tuple[int, ...]


class Operator(ABC):
    """One custom operator: names, shapes and launch plans. The rest of a plugin is the same for all."""

    name: str  # of the ONNX operator
    folder: str  # of its package in `plugins`
    attributes: Mapping[str, int | None]  # names and defaults; None where the node must have it

    @abstractmethod
    def inputs(self, attributes: Mapping[str, int]) -> tuple[str, ...]:
        """Names of the inputs."""

    @abstractmethod
    def outputs(self, attributes: Mapping[str, int]) -> tuple[str, ...]:
        """Names of the outputs."""

    @abstractmethod
    def ranks(self, attributes: Mapping[str, int]) -> tuple[int, ...]:
        """Number of dimensions of each input."""

    @abstractmethod
    def fixed(self, attributes: Mapping[str, int]) -> Iterable[tuple[str, int]]:
        """Inputs and axes whose size the kernels are compiled for."""

    @abstractmethod
    def output_shapes(
        self, shapes: Mapping[str, Sequence[Any]], attributes: Mapping[str, int], dims: "Dims"
    ) -> list[list[Any]]:
        """Shapes of the outputs, symbolic while an engine is built; `dims` calculates."""

    @abstractmethod
    def plan(
        self, shapes: Mapping[str, Shape], attributes: Mapping[str, int], dtype: str
    ) -> tuple[tuple[Launch, ...], Scratch]:
        """Launches for inputs of these shapes, and the scratch buffer that they share."""

    @abstractmethod
    def variants(
        self, least: Mapping[str, Shape], most: Mapping[str, Shape], attributes: Mapping[str, int], dtype: str
    ) -> Iterable[Launch]:
        """A launch of every kernel that shapes between `least` and `most` may need."""

    @abstractmethod
    def expected(
        self, shapes: Mapping[str, Sequence[int | None]], attributes: Mapping[str, int]
    ) -> dict[str, tuple[int | None, ...]]:
        """What each input's shape should be, given the others; None stands for a size not known yet."""


class Dims:
    """Arithmetic on the sizes of tensors while an engine is built."""

    def __init__(self, trt: ModuleType, builder: Any) -> None:
        self._trt, self._builder = trt, builder

    def constant(self, value: int) -> Any:
        """A size that is known."""
        return self._builder.constant(value)

    def product(self, a: Any, b: Any) -> Any:
        """a * b."""
        return self._builder.operation(self._trt.DimensionOperation.PROD, a, b)

    def quotient(self, a: Any, b: Any) -> Any:
        """a / b, rounded down."""
        return self._builder.operation(self._trt.DimensionOperation.FLOOR_DIV, a, b)


def named_dtype(trt: ModuleType, dtype: Any) -> str | None:
    """Our name of a TensorRT data type; None where kernels do not know it."""
    known = {trt.float32: "float32", trt.float16: "float16", trt.bfloat16: "bfloat16"}
    return known.get(dtype)


def check_types(*, operator: Operator, names: Sequence[str], trt: ModuleType, types: Sequence[Any]) -> None:
    """Raise UhdError where the inputs are too few, too many, or not all of one type that kernels know."""
    _check_count(operator, names, types)
    for name, kind in zip(names, types, strict=True):
        if named_dtype(trt, kind) is None or kind != types[0]:
            raise UhdError(
                f"operator {operator.name}: input {name} has type {kind.name}, {names[0]} {types[0].name}; "
                "all must be FLOAT, all HALF or all BF16"
            )


def check_shapes(
    operator: Operator, attributes: Mapping[str, int], shapes: Sequence[Sequence[int | None]]
) -> None:
    """Raise UhdError where inputs do not fit each other; None stands for a size not known yet."""
    names = operator.inputs(attributes)
    _check_count(operator, names, shapes)
    for name, rank, shape in zip(names, operator.ranks(attributes), shapes, strict=True):
        if len(shape) != rank:
            raise UhdError(
                f"operator {operator.name}: input {name} has {len(shape)} dimensions, expected {rank}; "
                "export the graph again"
            )
    named = dict(zip(names, map(tuple, shapes), strict=True))
    for name, expected in operator.expected(named, attributes).items():
        pairs = zip(named[name], expected, strict=True)
        if any(None not in pair and pair[0] != pair[1] for pair in pairs):
            raise UhdError(
                f"operator {operator.name}: input {name} has shape {list(named[name])}, expected "
                f"{list(expected)}; export the graph again"
            )


def _check_count(operator: Operator, names: Sequence[str], given: Sequence) -> None:
    if len(given) != len(names):
        raise UhdError(
            f"operator {operator.name}: {len(given)} inputs, expected {len(names)}; export the graph again"
        )


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

    def run(
        self,
        shapes: Sequence[Shape],
        types: Sequence[str],
        pointers: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        """Queue all launches. `types` and `pointers` are of the inputs, then the outputs."""
        inputs, outputs = self.operator.inputs(self.attributes), self.operator.outputs(self.attributes)
        launches, scratch = self.operator.plan(
            dict(zip(inputs, shapes, strict=True)), self.attributes, types[-1]
        )
        address = dict(zip((*inputs, *outputs, scratch.name), (*pointers, workspace), strict=True))
        kind = dict(zip((*inputs, *outputs, scratch.name), (*types, "float32"), strict=True))
        driver = open_driver()
        context, capability = driver.context(), driver.capability()
        for launch in launches:
            key = kernel_key(launch, [kind[name] for name in launch.tensors], capability)
            if key not in self.kernels:
                raise UhdError(self._missing(launch, capability))
            kernel = self.kernels[key]
            if (context, key) not in self._functions:
                self._functions[context, key] = driver.load(kernel["ptx"], kernel["name"], kernel["shared"])
            driver.launch(
                self._functions[context, key],
                launch.grid,
                32 * kernel["warps"],
                kernel["shared"],
                stream,
                [address[name] for name in launch.tensors],
                launch.integers,
                kernel["nulls"],
            )

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
    return -(-4 * scratch.elements // ALIGNMENT) * ALIGNMENT


def read_attributes(operator: Operator, fields: Mapping[str, Any]) -> dict[str, int]:
    """Attributes of a node from its plugin fields. Raises UhdError for one that is missing."""
    values = {}
    for name, default in operator.attributes.items():
        value = int(np.asarray(fields[name]).reshape(-1)[0]) if name in fields else default
        if value is None:
            raise UhdError(f"operator {operator.name}: attribute {name} is missing; export the graph again")
        if value < 1:
            raise UhdError(f"operator {operator.name}: attribute {name} is {value}; it must be at least 1")
        values[name] = value
    return values


@functools.cache
def operators() -> dict[str, Operator]:
    """All operators by name."""
    from plugins.jbu.tensorrt_plugin import JbuOperator
    from plugins.window_attention.tensorrt_plugin import WindowAttentionOperator

    return {operator.name: operator for operator in (JbuOperator(), WindowAttentionOperator())}
