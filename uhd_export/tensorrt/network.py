"""ONNX to a TensorRT network: custom operators as plugins or as their function bodies, errors with places."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from google.protobuf.message import DecodeError

from uhd_export.plugins.graph import PLUGIN_DOMAIN
from uhd_export.runtime.engines.tensorrt.backend import messages
from uhd_export.runtime.engines.tensorrt.record import OptimizationProfile, TensorRecord
from uhd_export.runtime.errors import UhdError

_BITS: dict[int, int] = {onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4, onnx.TensorProto.BOOL: 8}


@dataclass
class Network:
    """A parsed network. The parser is kept because it owns memory that the network refers to."""

    network: Any
    parser: Any
    inputs: dict[str, TensorRecord]
    outputs: dict[str, TensorRecord]
    aliases: dict[str, str]
    weight_bytes: int

    def layer_types(self) -> Counter[str]:
        """How many layers of each type there are, such as PLUGIN_V3 or MATRIX_MULTIPLY."""
        return Counter(layer.type.name for layer in self._layers())

    def plugin_layers(self) -> list[str]:
        """Names of the layers that are plugins."""
        return [layer.name for layer in self._layers() if layer.type.name.startswith("PLUGIN")]

    def _layers(self) -> list[Any]:
        return [self.network.get_layer(i) for i in range(self.network.num_layers)]


def load_graph(path: Path, plugins: Collection[str]) -> onnx.ModelProto:
    """The graph at `path` as the parser shall see it, weights left where they are.

    Operators in `plugins` stay nodes and lose their function bodies, which would win over a plugin of the
    same name. All others are replaced by their bodies, named after the node that they replace.
    """
    model = _read(path)
    others = [f for f in model.functions if f.name not in plugins]
    del model.functions[:]
    if not others:
        return model
    model.functions.extend(others)
    bodies = {(f.domain, f.name): f for f in others}
    # One copy of a body for each node, so that its nodes can be named after it.
    for node in model.graph.node:
        body = bodies.get((node.domain, node.op_type))
        if body is not None:
            copy = model.functions.add()
            copy.CopyFrom(body)
            copy.overload = node.overload = node.name
            for inner in copy.node:
                inner.name = f"{node.name}/{inner.name or inner.op_type}"
    for body in others:
        model.functions.remove(body)
    return onnx.inliner.inline_local_functions(model)


def _read(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise UhdError(f"graph {path}: no such file") from None
    except (DecodeError, OSError) as error:
        raise UhdError(f"graph {path}: cannot be read ({error}); build it again") from None


def parse(
    trt: ModuleType,
    builder: Any,
    model: onnx.ModelProto,
    path: Path,
    profiles: Sequence[OptimizationProfile] = (),
    *,
    output_types: Mapping[str, str] | None = None,
) -> Network:
    """Parse `model`, whose weights lie beside `path`. `output_types` converts outputs to other types.

    Dimensions of inputs that have one size in all `profiles` are fixed to it.
    Raises UhdError naming the node that the parser refuses.
    """
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    with messages(trt) as log:
        parser = trt.OnnxParser(network, builder.logger)
        is_parsed = parser.parse(model.SerializeToString(), str(path))
    if not is_parsed:
        raise UhdError(f"graph {path}: {_refusal(parser, model, log.reason)}")
    _fix_dimensions(network, profiles)
    _allow_decomposition(trt, network)
    for name, kind in (output_types or {}).items():
        _convert_output(trt, network, name, kind)
    return Network(
        network=network,
        parser=parser,
        inputs={v.name: _describe(trt, network.get_input(i), v) for i, v in enumerate(model.graph.input)},
        outputs={v.name: _describe(trt, _output(network, v.name), v) for v in model.graph.output},
        aliases=_aliases(trt, network),
        weight_bytes=sum(_nbytes(tensor) for tensor in model.graph.initializer),
    )


def _refusal(parser: Any, model: onnx.ModelProto, reason: str) -> str:
    """The first error in words, and how many more there are."""
    if not parser.num_errors:
        return f"TensorRT cannot read it ({reason})"
    error = parser.get_error(0)
    index = error.node()
    nodes = model.graph.node
    operator = error.node_operator() or (nodes[index].op_type if 0 <= index < len(nodes) else "")
    place = f"node {index} {error.node_name()!r} ({operator})" if operator else "the model"
    more = f"; and {parser.num_errors - 1} more" if parser.num_errors > 1 else ""
    hint = ""
    if 0 <= index < len(nodes) and nodes[index].domain == PLUGIN_DOMAIN:
        hint = "; its plugin is not registered: use --no-plugins"
    return f"TensorRT refuses {place}: {' '.join(error.desc().split())}{hint}{more}"


def _fix_dimensions(network: Any, profiles: Sequence[OptimizationProfile]) -> None:
    """Make dimensions static that are the same in every profile, so that kernels are built for them."""
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        ranges = [profile.ranges[tensor.name] for profile in profiles if tensor.name in profile.ranges]
        corners = [shape for bounds in ranges for shape in (bounds.min, bounds.max)]
        if corners and all(len(shape) == len(tensor.shape) for shape in corners):
            sizes = [set(column) for column in zip(*corners, strict=True)]
            tensor.shape = [
                values.pop() if len(values) == 1 and size < 0 else size
                for size, values in zip(tensor.shape, sizes, strict=True)
            ]


def _allow_decomposition(trt: ModuleType, network: Any) -> None:
    """Let attention run as plain operators where no fused kernel exists, such as in float32.

    The parser leaves this off, and the build then fails.
    """
    if not hasattr(trt.LayerType, "ATTENTION_INPUT"):
        return
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the binding hands out the base class only
            layer.attention.decomposable = True


def _output(network: Any, name: str) -> Any:
    outputs = (network.get_output(i) for i in range(network.num_outputs))
    return next(tensor for tensor in outputs if tensor.name == name)


def _convert_output(trt: ModuleType, network: Any, name: str, kind: str) -> None:
    """Make output `name` one of numpy type `kind`."""
    tensor, dtype = _output(network, name), trt_type(trt, kind)
    if tensor.dtype == dtype:
        return
    network.unmark_output(tensor)
    tensor.name = f"{name}.unconverted"
    layer = network.add_cast(tensor, dtype)
    layer.name = f"{name}.convert"
    layer.get_output(0).name = name
    network.mark_output(layer.get_output(0))


def _aliases(trt: ModuleType, network: Any) -> dict[str, str]:
    """Outputs that a cache update writes into an input's memory, with that input."""
    kind = getattr(trt.LayerType, "KV_CACHE_UPDATE", None)
    updates = [network.get_layer(i) for i in range(network.num_layers)]
    updates = [layer for layer in updates if kind is not None and layer.type == kind]
    pairs = ((layer.get_output(0), layer.get_input(0)) for layer in updates)
    return {out.name: past.name for out, past in pairs if out.is_network_output and past.is_network_input}


def _describe(trt: ModuleType, tensor: Any, value: onnx.ValueInfoProto) -> TensorRecord:
    """Type and shape of a network input or output; the graph knows more than TensorRT about free ones."""
    declared = [d.dim_param or str(d.dim_value) for d in value.type.tensor_type.shape.dim]
    shape = (name if size < 0 else str(size) for name, size in zip(declared, tensor.shape, strict=True))
    return TensorRecord(np.dtype(trt.nptype(tensor.dtype)).name, tuple(shape))


def trt_type(trt: ModuleType, kind: str) -> Any:
    """TensorRT's type of a numpy type name."""
    return {"float32": trt.float32, "float16": trt.float16}[kind]


def _nbytes(tensor: onnx.TensorProto) -> int:
    bits = _BITS.get(tensor.data_type)
    if bits is None:
        bits = 8 * np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
    return int(np.prod(tensor.dims, dtype=np.int64)) * bits // 8
