"""A small ONNX graph builder: operators by name, weights read only while the file is written."""

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import DTypeLike

from uhd_export.runtime.progress import Progress

OPSET = 23
IR_VERSION = 10
PLUGIN_DOMAIN = "uhd"
CONTRIB_DOMAIN = "com.microsoft"

Dim = int | str
Attribute = str | int | float | Sequence[int] | Sequence[float] | ir.Graph
_PACKED = (ir.DataType.INT4, ir.DataType.UINT4)


def _version() -> str:
    try:
        return importlib.metadata.version("uhd-export")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


class GraphBuilder:
    """Builds one graph, or one function body when `function` is set.

    A function body cannot hold initializers: its constants become Constant nodes, and its weights
    are inputs.
    """

    def __init__(self, name: str, *, opset: int = OPSET, function: bool = False) -> None:
        self.name, self.opset, self._is_function = name, opset, function
        self.metadata: dict[str, str] = {}
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []
        self._initializers: dict[str, ir.Value] = {}
        self._constants: dict[tuple, ir.Value] = {}
        self._functions: dict[str, ir.Function] = {}
        self._domains: dict[str, int] = {"": opset}
        self._scope = ""
        self._in_branch = False

    def input(
        self, name: str, dtype: ir.DataType | None = None, shape: Sequence[Dim] | None = None
    ) -> ir.Value:
        """A graph input; function inputs have neither type nor shape."""
        value = ir.Value(name=name)
        if dtype is not None:
            value.type = ir.TensorType(dtype)
            value.shape = ir.Shape(list(shape or ()))
        self._inputs.append(value)
        return value

    def output(
        self,
        value: ir.Value,
        name: str,
        dtype: ir.DataType | None = None,
        shape: Sequence[Dim] | None = None,
        *,
        direct: bool = False,
    ) -> None:
        """Declare `value` an output called `name`; `direct` renames the value instead of copying it."""
        value = value if direct else self.op("Identity", value)
        value.name = name
        if dtype is not None:
            value.type = ir.TensorType(dtype)
            value.shape = ir.Shape(list(shape or ()))
        self._outputs.append(value)

    def weight(
        self, name: str, shape: Sequence[int], dtype: ir.DataType, load: Callable[[], np.ndarray]
    ) -> ir.Value:
        """An initializer whose data `load` provides when the file is written, converted to `dtype`."""

        def evaluate() -> ir.Tensor:
            array = np.asarray(load(), order="C")
            if tuple(array.shape) != tuple(shape):
                raise ValueError(f"weight {name}: shape {array.shape} differs from {tuple(shape)}")
            if dtype in _PACKED:
                return ir.Tensor(array, dtype=dtype, name=name)
            return ir.Tensor(array.astype(dtype.numpy(), copy=False), name=name)

        tensor = ir.LazyTensor(evaluate, dtype=dtype, shape=ir.Shape(list(shape)), name=name)
        return self._initializer(name, tensor)

    def constant(self, array: np.ndarray | Sequence | int | float, dtype: DTypeLike = None) -> ir.Value:
        """A small constant, shared with equal ones. Python integers become int64."""
        if dtype is None:
            array = np.asarray(array)
            dtype = np.float32 if array.dtype == np.float64 else array.dtype
        array = np.asarray(array, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            tensor = ir.Tensor(array, name=name)
            if self._is_function:
                node = ir.node("Constant", [], {"value": tensor})
                self._nodes.append(node)
                self._constants[key] = node.outputs[0]
            else:
                self._constants[key] = self._initializer(name, tensor)
        return self._constants[key]

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        name: str | None = None,
        **attributes: Attribute,
    ) -> ir.Value:
        """Add a node with one output, which is returned."""
        return self.ops(op_type, *inputs, outputs=1, domain=domain, name=name, **attributes)[0]

    def ops(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        outputs: int,
        domain: str = "",
        name: str | None = None,
        **attributes: Attribute,
    ) -> tuple[ir.Value, ...]:
        """Add a node with several outputs, which are returned in order."""
        if domain:
            self._domains.setdefault(domain, 1)
        name = name or f"{self._scope}{op_type}_{len(self._nodes)}"
        node = ir.node(op_type, inputs, attributes or None, domain=domain, num_outputs=outputs, name=name)
        if self._in_branch:  # a name of its own: a branch must not hide what is outside of it
            for index, value in enumerate(node.outputs):
                value.name = f"{name}:{index}"
        self._nodes.append(node)
        return tuple(node.outputs)

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of the nodes added within, so that profiles can be read by stage."""
        outer, self._scope = self._scope, f"{self._scope}{name}/"
        yield
        self._scope = outer

    def branch(self, name: str, make: Callable[[], Sequence[ir.Value]]) -> ir.Graph:
        """A branch of an If: the nodes that `make` adds, whose result are its outputs.

        It reads values from outside as they are; its constants and weights belong to the whole graph.
        """
        outer, self._nodes = self._nodes, []
        self._in_branch = True
        try:
            with self.scope(name):
                outputs = make()
            return ir.Graph([], outputs, nodes=self._nodes, name=name)
        finally:
            self._nodes, self._in_branch = outer, False

    def reshape(self, x: ir.Value, shape: Sequence[int]) -> ir.Value:
        """Reshape to constant `shape`; 0 keeps an axis and -1 is inferred."""
        return self.op("Reshape", x, self.constant(np.array(shape, np.int64)))

    def dim(self, x: ir.Value, axis: int) -> ir.Value:
        """Length of `axis` as an int64 tensor of shape (1,)."""
        return self.op("Shape", x, start=axis, end=axis + 1)

    def concat_shape(self, *parts: ir.Value | int) -> ir.Value:
        """A shape tensor from dims (see `dim`) and integers."""
        values = [self.constant(np.array([p], np.int64)) if isinstance(p, int) else p for p in parts]
        return self.op("Concat", *values, axis=0)

    def add_function(self, function: ir.Function) -> None:
        """Carry a function body for nodes of its domain and name."""
        self._functions[function.name] = function
        self._domains.setdefault(function.domain, 1)

    def function(self, attributes: Sequence[ir.Attr] = (), domain: str = PLUGIN_DOMAIN) -> ir.Function:
        """The finished function body; `attributes` with the defaults the body was made for."""
        return ir.Function(domain, self.name, graph=self._graph(), attributes=list(attributes))

    def model(self) -> ir.Model:
        """The finished model."""
        return ir.Model(
            self._graph(),
            ir_version=IR_VERSION,
            producer_name="uhd-export",
            producer_version=_version(),
            doc_string=f"{self.name} of LLaVA-UHD, exported by uhd-export",
            metadata_props=self.metadata,
            functions=list(self._functions.values()),
        )

    def save(self, path: Path, progress: Progress | None = None) -> None:
        """Write the model with its weights beside it (`NAME.onnx.data`), one tensor at a time.

        `progress(done, total)` is called before each tensor is written.
        """

        def callback(_: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
            if progress is not None:
                progress(info.index, info.total)

        ir.save(
            self.model(),
            path,
            external_data=f"{Path(path).name}.data",
            size_threshold_bytes=1024,
            callback=callback,
        )

    def _initializer(self, name: str, tensor: ir.Tensor | ir.LazyTensor) -> ir.Value:
        if name not in self._initializers:
            value = ir.Value(
                name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self._initializers[name] = value
        return self._initializers[name]

    def _graph(self) -> ir.Graph:
        return ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports=dict(self._domains),
            name=self.name,
        )
