"""Function bodies written inline, for readers of ONNX without local functions, such as OpenVINO's."""

from pathlib import Path

import onnx
from onnx.inliner import inline_local_functions


def inline_functions(path: Path) -> None:
    """Rewrite the model at `path` with its local functions inline; its weights beside it stay as they are.

    ONNX Runtime computes the same of both; TensorRT finds no plugin's nodes in an inlined graph.
    """
    model = inline_local_functions(onnx.load(path, load_external_data=False))
    used = {node.domain for node in model.graph.node}
    imports = [entry for entry in model.opset_import if entry.domain in used | {""}]
    del model.opset_import[:]
    model.opset_import.extend(imports)
    path.write_bytes(model.SerializeToString())
