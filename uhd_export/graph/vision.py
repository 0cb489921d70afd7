"""`vision.onnx`: pixels of equal crops to language-model tokens, at any crop shape.

Geometry enters as input tensors (`runtime/image/geometry.py`), so one file serves every shape, batch and
grid mode. Node names start with `vit/`, `jbu/` or `hiwin/`, which is how profiles are read by stage.
"""

from pathlib import Path

import onnx_ir as ir
import torch

from uhd_export.checkpoint.config import CheckpointConfig
from uhd_export.checkpoint.reader import PROJECTOR_PREFIX, VISION_PREFIX, Checkpoint
from uhd_export.graph.hiwin import emit_folded, emit_hiwin, emit_v1
from uhd_export.graph.products import ProductFormat
from uhd_export.graph.pyramid import emit_pyramid
from uhd_export.graph.vit import emit_vit
from uhd_export.graph.weights import Weights
from uhd_export.model.folding import FoldedProjector
from uhd_export.model.folding import fold as fold_weights
from uhd_export.model.projector import HiwinProjector
from uhd_export.plugins.graph import GraphBuilder
from uhd_export.runtime.progress import Progress

DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}


def emit_vision(
    config: CheckpointConfig,
    checkpoint: Checkpoint,
    path: Path,
    *,
    fold: bool = True,
    dtype: str = "float32",
    products: ProductFormat | None = None,
    contrib: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the vision graph of `checkpoint` to `path`, its weights beside it.

    Inputs: `pixels` (B, 3, 14h, 14w) float32 and the float32 matrices of `crop_geometry`.
    Output: `tokens` (B, side^2, D) float32. `dtype` is the type of weights and
    activations; norms and softmax sums are float32 throughout. `products` is the format of dense products
    (default: dense). `contrib` uses operators that only ONNX Runtime has, for processors. With `fold` the
    Hiwin projector is folded exactly (`uhd_export.model.folding`); without, and for v1, it is the released
    computation.
    """
    b = GraphBuilder("vision")
    projector = config.projector
    b.metadata = {
        "dtype": dtype,
        "projector": projector.kind,
        "levels": ",".join(map(str, projector.levels)),
        "pyramid": projector.pyramid,
        "folded": str(fold and projector.kind == "hiwin").lower(),
    }
    kind = DTYPES[dtype]
    pixels = b.input("pixels", ir.DataType.FLOAT, ["batch", 3, "height", "width"])
    geometry = {}
    for name, matrix in config.model.geometry(24, 24).items():
        shape = [f"{name}_{i}" for i in range(matrix.ndim)]
        geometry[name] = b.input(name, ir.DataType.FLOAT, shape)
    if kind != ir.DataType.FLOAT:
        pixels = b.op("Cast", pixels, to=kind)
        geometry = {name: b.op("Cast", value, to=kind) for name, value in geometry.items()}
    with b.scope("vit"):
        weights = Weights(b, checkpoint, VISION_PREFIX, kind, products)
        features = emit_vit(b, config.vision, weights, pixels, geometry, contrib=contrib)
    weights = Weights(b, checkpoint, PROJECTOR_PREFIX, kind, products)
    if config.projector.kind == "v1":
        with b.scope("hiwin"):
            tokens = emit_v1(b, config.projector, weights, features, geometry)
    else:
        with b.scope("jbu"):
            maps = emit_pyramid(b, projector, weights, features, pixels, geometry, plain=not fold)
        with b.scope("hiwin"):
            if fold:
                tokens = emit_folded(b, config.projector, _fold(config, checkpoint), weights, maps, geometry)
            else:
                tokens = emit_hiwin(b, config.projector, weights, maps, geometry)
    if kind != ir.DataType.FLOAT:
        tokens = b.op("Cast", tokens, to=ir.DataType.FLOAT)
    b.output(
        tokens, "tokens", ir.DataType.FLOAT, ["batch", config.projector.side**2, config.projector.hidden]
    )
    b.save(path, progress)


def _fold(config: CheckpointConfig, checkpoint: Checkpoint) -> FoldedProjector:
    with torch.device("meta"):
        projector = HiwinProjector(config.projector)
    checkpoint.load_into(projector, PROJECTOR_PREFIX, torch.float32)
    return fold_weights(projector)
