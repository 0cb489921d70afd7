"""What a custom operator is, once for PyTorch, the compiler and TensorRT: names, shapes, checks, launches."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from uhd_export.plugins.launch import Launch, Scratch
from uhd_export.runtime.errors import UhdError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ShapeRanges:
    """The smallest and largest shape of every input, by name, that an engine is built for."""

    min: Mapping[str, Shape]
    max: Mapping[str, Shape]


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
    ) -> tuple[tuple[Launch, ...], tuple[Scratch, ...]]:
        """Launches for inputs of these shapes, and the scratch buffers that they share."""

    @abstractmethod
    def variants(self, shapes: "ShapeRanges", attributes: Mapping[str, int], dtype: str) -> Iterable[Launch]:
        """A launch of every kernel that inputs within these ranges may need."""

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


def kernel_dtypes(trt: ModuleType) -> dict[Any, str]:
    """Our names of the TensorRT data types that kernels exist for."""
    return {trt.float32: "float32", trt.float16: "float16", trt.bfloat16: "bfloat16"}


def check_types(*, operator: Operator, names: Sequence[str], trt: ModuleType, types: Sequence[Any]) -> None:
    """Raise UhdError where the inputs are too few, too many, or not all of one type that kernels know."""
    _check_count(operator, names, types)
    for name, kind in zip(names, types, strict=True):
        if kind not in kernel_dtypes(trt) or kind != types[0]:
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


def _check_count(operator: Operator, names: Sequence[str], inputs: Sequence) -> None:
    if len(inputs) != len(names):
        raise UhdError(
            f"operator {operator.name}: {len(inputs)} inputs, expected {len(names)}; export the graph again"
        )


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
