"""The feature pyramid as nodes: the JBU's, and those that the paper sets beside it."""

import onnx_ir as ir
import torch

from uhd_export.graph.weights import Weights
from uhd_export.plugins.graph import GraphBuilder
from uhd_export.plugins.jbu.onnx_op import add_jbu
from uhd_export.runtime.config import ProjectorConfig

Maps = dict[int, ir.Value]
Geometry = dict[str, ir.Value]


def emit_pyramid(
    b: GraphBuilder,
    projector: ProjectorConfig,
    weights: Weights,
    features: ir.Value,
    pixels: ir.Value,
    geometry: Geometry,
    *,
    plain: bool,
) -> Maps:
    """Every scale's map (B, s*h, s*w, C); with `plain`, the JBU's last fix-up is applied too."""
    if projector.pyramid == "bilinear":
        return _bilinear(b, projector, features, geometry)
    if projector.pyramid == "deconvolution":
        return _deconvolution(b, projector, weights, features)
    return _jbu(b, projector, weights, features, pixels, geometry, plain=plain)


def _bilinear(b: GraphBuilder, projector: ProjectorConfig, features: ir.Value, geometry: Geometry) -> Maps:
    """Each level in use, from the first: rows as one product over (h, w*C), then columns."""
    maps, rows = {1: features}, b.reshape(features, [0, 0, -1])
    for scale in projector.levels[1:]:
        x = b.op("MatMul", geometry[f"upsample_{scale}x_y"], rows)
        x = b.reshape(x, [0, 0, -1, projector.vision_hidden])
        maps[scale] = b.op("MatMul", geometry[f"upsample_{scale}x_x"], x)
    return maps


def _deconvolution(b: GraphBuilder, projector: ProjectorConfig, weights: Weights, features: ir.Value) -> Maps:
    """Kernel and stride are both 2, so that no outputs overlap: a product, and its four results laid out."""
    maps, channels = {1: features}, projector.vision_hidden
    for i, scale in enumerate(projector.stages):
        name = f"upsampler.upsampler.up{i + 1}"
        x = b.op("MatMul", features, weights.changed(f"{name}.weight", (channels, 4 * channels), _by_output))
        x = b.reshape(x, [0, 0, 0, 2, 2, channels])
        x = b.op("Add", x, weights.plain(f"{name}.bias"))
        x = b.op("Transpose", x, perm=[0, 1, 3, 2, 4, 5])
        two = b.constant([2])
        height, width = (b.op("Mul", b.dim(features, axis), two) for axis in (1, 2))
        shape = b.concat_shape(0, height, width, channels)
        features = maps[scale] = b.op("Reshape", x, shape)
    return maps


def _by_output(kernel: torch.Tensor) -> torch.Tensor:
    """(in, out, 2, 2) as (in, 4 * out): for each of the four places all outputs."""
    return kernel.permute(0, 2, 3, 1).flatten(1)


def _jbu(
    b: GraphBuilder,
    projector: ProjectorConfig,
    weights: Weights,
    features: ir.Value,
    pixels: ir.Value,
    geometry: Geometry,
    *,
    plain: bool,
) -> Maps:
    maps = {1: features}
    for i, scale in enumerate(projector.stages):
        stage = f"upsampler.upsampler.up{i + 1}."
        x = b.op("MatMul", geometry[f"guidance_{scale}x_y"], pixels)
        x = b.op("MatMul", x, b.op("Transpose", geometry[f"guidance_{scale}x_x"], perm=[1, 0]))
        guidance = b.op("Transpose", x, perm=[0, 2, 3, 1])
        parameters = [
            weights.linear(stage + "range_proj.0"),
            weights.bias(stage + "range_proj.0"),
            weights.linear(stage + "range_proj.3"),
            weights.bias(stage + "range_proj.3"),
            weights.plain(stage + "range_temp"),
            weights.plain(stage + "sigma_spatial"),
            weights.linear(stage + "fixup_proj.0"),
            weights.bias(stage + "fixup_proj.0"),
            weights.linear(stage + "fixup_proj.3"),
            weights.bias(stage + "fixup_proj.3"),
        ]
        upsample = geometry[f"upsample_{scale}x_y"], geometry[f"upsample_{scale}x_x"]
        features = maps[scale] = add_jbu(b, features, guidance, *parameters, *upsample, plain=plain)
    if plain and projector.stages:
        fixup = "upsampler.upsampler.fixup_proj.1"
        x = b.op("Add", b.op("MatMul", features, weights.linear(fixup)), weights.bias(fixup))
        maps[scale] = b.op("Add", features, b.op("Mul", x, weights.number(0.1)))
    return maps
