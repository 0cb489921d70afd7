"""Inputs of the custom operators, with weights of about unit gain."""

import torch

from uhd_export.plugins.jbu.launch import INPUTS
from uhd_export.plugins.window_attention.reference import Level
from uhd_export.runtime.image.geometry import bicubic, crop_geometry, reflect_pad


def jbu_inputs(batch, height, width, channels, seed=0):
    """Inputs of the op in float32, with weights of about unit gain."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, gain=1.0):
        return torch.randn(*shape, generator=generator) * gain

    return dict(
        zip(
            INPUTS,
            (
                normal(batch, height, width, channels),
                normal(batch, 2 * height, 2 * width, 3),
                normal(3, 32),
                normal(32),
                normal(32, 32, gain=32**-0.5),
                normal(32),
                torch.tensor(-1.0),
                torch.tensor(0.7),
                normal(52, 49, gain=52**-0.5),
                normal(49),
                normal(49, 49, gain=49**-0.5),
                normal(49),
                *(
                    torch.tensor(reflect_pad(bicubic(2 * n, n), 3), dtype=torch.float32)
                    for n in (height, width)
                ),
            ),
            strict=True,
        )
    )


def window_inputs(
    batch, rows, cols, scales, grid_mode, side, channels, heads, roi_rounding="exact", seed=0, size=16
):
    """Position scores, value, value_moments and the flat list of the levels' tensors, in float32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    geometry = crop_geometry(
        rows, cols, levels=scales, grid_mode=grid_mode, side=side, roi_rounding=roi_rounding
    )
    windows, queries = side * side, 4 * heads
    levels, keys = [], 0
    for scale in scales:
        roi = [torch.tensor(geometry[f"roi_{scale}x_{axis}"]) for axis in "yx"]
        keys += roi[0].shape[1] * roi[1].shape[1]
        levels += Level(
            normal(batch, rows * scale, cols * scale, channels),
            normal(batch, rows * scale, cols * scale).abs() + 0.1,
            *roi,
            normal(windows, channels, queries) * channels**-0.5,
            normal(windows, queries),
            normal(windows, queries),
        )
    value = normal(len(scales), heads, channels, size) * channels**-0.5
    return normal(windows, keys, queries), value, normal(len(scales), heads, 2, size), levels
