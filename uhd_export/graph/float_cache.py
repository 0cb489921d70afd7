"""A language graph again, but with keys and values in the type of its activations: what its cache costs.

All else is the same, weights included, so that what differs in an answer comes from the cache alone.
"""

from pathlib import Path

import onnx
from onnx import numpy_helper

from uhd_export.graph.dialects import rotary_cache
from uhd_export.runtime.config import LanguageConfig
from uhd_export.runtime.engines.onnxruntime import OrtEngine
from uhd_export.runtime.language.decoder import EMBEDS, PAST, PRESENT

_ATTENTION = "GroupQueryAttention"
# Of its inputs: the cache, and the rotary tables.
_CACHE, _TABLES = slice(3, 5), slice(7, 9)
_CACHED = tuple(name.partition(".")[0] + "." for name in (PAST, PRESENT))


def float_cache_engine(path: Path, config: LanguageConfig, device: str = "cpu") -> OrtEngine:
    """The language graph of the onnxruntime dialect at `path`, opened with a cache in floating point.

    On `device`. It reads the weights of `path`; nothing is written. Close it, or use it as a context manager.
    """
    model = onnx.load(path, load_external_data=False)
    _replace_cache(model.graph, config)
    return OrtEngine(path, device=device, graph=model.SerializeToString())


def _replace_cache(graph: onnx.GraphProto, config: LanguageConfig) -> None:
    kind = next(value for value in graph.input if value.name == EMBEDS).type.tensor_type.elem_type
    for value in (*graph.input, *graph.output):
        if value.name.startswith(_CACHED):
            value.type.tensor_type.elem_type = kind
    tables: list[str] = []
    around: set[str] = set()
    for node in graph.node:
        if node.op_type == "If":
            _unbranch(node)
        if node.op_type == _ATTENTION:
            tables = node.input[_TABLES]
            around |= {node.input[0], node.output[0]}
    for node in graph.node:
        # A float cache of another type than the activations stands between casts.
        if node.op_type == "Cast" and around & {*node.input, *node.output}:
            node.attribute[0].i = kind
    context = next(tensor for tensor in graph.initializer if tensor.name == tables[0]).dims[0]
    for name, table in zip(tables, rotary_cache(config, context), strict=True):
        tensor = next(tensor for tensor in graph.initializer if tensor.name == name)
        exact = table.astype(onnx.helper.tensor_dtype_to_np_dtype(kind))
        tensor.CopyFrom(numpy_helper.from_array(exact, name))


def _unbranch(node: onnx.NodeProto) -> None:
    """In the place of an If: the attention of its branch in floating point, on the cache itself."""
    branch = next(a.g for a in node.attribute if a.name == "then_branch")
    other = next(a.g for a in node.attribute if a.name == "else_branch")
    (attention,) = (inner for inner in branch.node if inner.op_type == _ATTENTION)
    (stored,) = (inner for inner in other.node if inner.op_type == _ATTENTION)
    cache, outputs = list(stored.input[_CACHE]), list(node.output)
    node.CopyFrom(attention)
    node.input[_CACHE] = cache
    node.output[:] = outputs
