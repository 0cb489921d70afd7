"""One stage of joint bilateral upsampling as two Triton kernels.

`range_features` maps every guidance pixel to its 32 range features. Kept in a small buffer (128 bytes
a pixel beside 2048 of output), they cost 6 % of traffic; computed anew within each tile's halo, each
would be computed 3.4 times, and the GELUs would outweigh the gather.

In `jbu_stage` a program owns a tile of 4x16 output pixels. It computes the tile's 49 weights a pixel,
composes them with bicubic doubling and reflect padding into weights over the 8x14 source pixels below
the tile, and runs over the channels with one small matrix product a block:

    output[64 pixels, channels] = stencil[64 pixels, 128 cells] @ source[128 cells, channels]

Neither the upsampled map nor the 49-channel kernels reach memory. Names of axes:

- *taps*: the 7x7 neighbours of a pixel, 49 of a 64-wide axis, as the fix-up's weights are stored;
- *halo*: the 10x22 output-resolution pixels within reach of the tile, rows `u` and columns `v`;
- *cells*: the 8x14 source pixels within reach, on a grid of 8 rows `r` by 16 columns `c`.

Similarities, softmax and normalisation are float32 whatever the data type, with tf32 products for half
types; the fix-up and the composition multiply in the data type. All products accumulate in float32.

Roofline (`uhd_export.plugins.roofline`), both stages of one 1008x672 image at ViT-L size in float16:
206 MB and 10.3 GFLOP; floors: H200 0.04 ms, RTX 4090 0.21 ms, Jetson AGX Orin 1.03 ms.
Where the kernels stand: not measured. The gather itself multiplies 2.6 times the 49 taps' FLOPs.
"""

# ruff: noqa: ANN001, ANN201 (Triton types the arguments)

import triton
import triton.language as tl

from uhd_export.plugins.tiles import gelu, multiply, narrow

TALL = tl.constexpr(4)  # rows of a tile
BROAD = tl.constexpr(16)  # columns of a tile
PIXELS = tl.constexpr(64)
SIDE = tl.constexpr(7)  # of the kernel
RADIUS = tl.constexpr(3)
TAPS = tl.constexpr(49)
HALO_ROWS = tl.constexpr(16)  # TALL + 2 RADIUS = 10, padded
HALO_COLUMNS = tl.constexpr(32)  # BROAD + 2 RADIUS = 22, padded
REACH = tl.constexpr(22)
ROWS = tl.constexpr(8)  # TALL / 2 + 2 RADIUS: the source rows that 7 taps of 4-tap bicubic reach
COLUMNS = tl.constexpr(16)  # BROAD / 2 + 2 RADIUS = 14, padded
COLOURS = tl.constexpr(3)
RANGE = tl.constexpr(32)
FIXUP = tl.constexpr(0.1)


@triton.jit
def range_features(
    guidance,
    range_in_weight, range_in_bias, range_out_weight, range_out_bias,
    features,
    pixels,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Range features of every guidance pixel, (pixels, 3) to float32 (pixels, 32): 1x1, GELU, 1x1.

    Grid: blocks of 64 pixels.
    """
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    stored = pixel < pixels
    channel = tl.arange(0, RANGE)
    hidden = tl.load(range_in_bias + channel).to(tl.float32)[None, :]
    for colour in tl.static_range(COLOURS):
        value = tl.load(guidance + pixel * COLOURS + colour, mask=stored, other=0).to(tl.float32)
        weight = tl.load(range_in_weight + colour * RANGE + channel).to(tl.float32)
        hidden += value[:, None] * weight[None, :]
    weight = tl.load(range_out_weight + channel[:, None] * RANGE + channel[None, :]).to(tl.float32)
    bias = tl.load(range_out_bias + channel).to(tl.float32)
    result = multiply(gelu(hidden), weight, PRECISION, False) + bias[None, :]
    tl.store(features + pixel[:, None] * RANGE + channel[None, :], result, mask=stored[:, None])


@triton.jit
def reflect(index, size):
    """Reflect padding's coordinate; clamped for the pixels of partial tiles, which nobody stores."""
    index = tl.abs(index)
    index = size - 1 - tl.abs(size - 1 - index)
    return tl.minimum(tl.maximum(index, 0), size - 1)


@triton.jit
def square(pointer, rows, columns):
    """A (rows, columns) matrix in a zero-padded 64x64 tile."""
    at = tl.arange(0, 64)
    inside = (at[:, None] < rows) & (at[None, :] < columns)
    return tl.load(pointer + at[:, None] * columns + at[None, :], mask=inside, other=0)


@triton.jit
def jbu_stage(
    source, guidance, features,
    range_temp, sigma_spatial,
    fixup_in_weight, fixup_in_bias, fixup_out_weight, fixup_out_bias,
    upsample_y, upsample_x,
    output,
    height, width,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr = False,
):  # fmt: skip
    """(B, height, width, C) `source` to (B, 2 height, 2 width, C) `output`; see the module.

    Grid: tiles, crops.
    """
    dtype: tl.constexpr = source.dtype.element_ty
    high, wide = 2 * height, 2 * width
    across = tl.cdiv(wide, BROAD)
    top = tl.program_id(0) // across * TALL
    left = tl.program_id(0) % across * BROAD
    crop = tl.program_id(1).to(tl.int64)
    guidance += crop * high * wide * COLOURS
    features += crop * high * wide * RANGE

    pixel = tl.arange(0, PIXELS)
    down, right = pixel // BROAD, pixel % BROAD  # within the tile
    tap = tl.arange(0, 64)

    # Similarity of each pixel's range features with its 49 neighbours', 64 of the 220 halo pixels at
    # a time: a product with all of them, from which the gather picks each pixel's taps.
    at = reflect(top + down, high) * wide + reflect(left + right, wide)
    channel = tl.arange(0, RANGE)
    centre = tl.load(features + at[:, None] * RANGE + channel[None, :])
    position = (down[:, None] + tap[None, :] // SIDE) * REACH + right[:, None] + tap[None, :] % SIDE
    similarity = tl.zeros((PIXELS, 64), tl.float32)
    for first in tl.range(0, 4 * 64, 64, num_stages=1):
        halo = first + tl.arange(0, 64)
        row = reflect(top - RADIUS + halo // REACH, high)
        column = reflect(left - RADIUS + halo % REACH, wide)
        around = tl.load(features + (row * wide + column)[None, :] * RANGE + channel[:, None])
        product = multiply(centre, around, PRECISION, False)
        local = position - first
        inside = (local >= 0) & (local < 64)
        similarity = tl.where(inside, tl.gather(product, tl.where(inside, local, 0), 1), similarity)

    # Softmax, spatial kernel, normalisation.
    temperature = tl.minimum(tl.maximum(tl.exp(tl.load(range_temp).to(tl.float32)), 1e-4), 1e4)
    logits = tl.where(tap[None, :] < TAPS, temperature * similarity, float("-inf"))
    kernels = tl.exp(logits - tl.max(logits, 1)[:, None])
    kernels *= (1 / tl.sum(kernels, 1))[:, None]
    sigma = tl.load(sigma_spatial).to(tl.float32)
    dy, dx = tap // SIDE - RADIUS, tap % SIDE - RADIUS
    distance = (dy * dy + dx * dx).to(tl.float32) / (RADIUS * RADIUS)
    kernels *= tl.exp(-distance / (2 * sigma * sigma))[None, :]
    kernels *= (1 / tl.maximum(tl.sum(kernels, 1), 1e-7))[:, None]

    # Fix-up: the guidance's colours stand behind the 49 taps.
    mixed = kernels
    for colour in tl.static_range(COLOURS):
        value = tl.load(guidance + at * COLOURS + colour).to(tl.float32)
        mixed = tl.where(tap[None, :] == TAPS + colour, value[:, None], mixed)
    bias = tl.load(fixup_in_bias + tap, mask=tap < TAPS, other=0).to(tl.float32)
    weight = square(fixup_in_weight, TAPS + COLOURS, TAPS).to(dtype)
    hidden = multiply(narrow(mixed, dtype, EMULATE), weight, PRECISION, EMULATE)
    hidden = narrow(gelu(hidden + bias[None, :]), dtype, EMULATE)
    bias = tl.load(fixup_out_bias + tap, mask=tap < TAPS, other=0).to(tl.float32)
    correction = multiply(hidden, square(fixup_out_weight, TAPS, TAPS).to(dtype), PRECISION, EMULATE)
    kernels += FIXUP * (correction + bias[None, :])

    # Composition, an axis at a time: taps are spread over the halo by a gather, and the halo is summed
    # into source rows or columns by a product with the upsampling matrix.
    first_row, first_column = top // 2 - RADIUS, left // 2 - RADIUS
    u, r = tl.arange(0, HALO_ROWS), tl.arange(0, ROWS)
    y = upsampling(upsample_y, top + u, first_row + r, high + 2 * RADIUS, height)
    column = tl.arange(0, 8 * HALO_ROWS)[None, :]  # (dx, u)
    dx, dy = column // HALO_ROWS, column % HALO_ROWS - down[:, None]
    near = (dx < SIDE) & (dy >= 0) & (dy < SIDE)
    spread = tl.where(near, tl.gather(kernels, tl.where(near, dy * SIDE + dx, 0), 1), 0)
    spread = tl.reshape(narrow(spread, dtype, EMULATE), (PIXELS * 8, HALO_ROWS))
    rows = multiply(spread, narrow(y, dtype, EMULATE), PRECISION, EMULATE)
    rows = tl.reshape(rows, (PIXELS, 8 * ROWS))  # (dx, r)

    v, c = tl.arange(0, HALO_COLUMNS), tl.arange(0, COLUMNS)
    x = upsampling(upsample_x, left + v, first_column + c, wide + 2 * RADIUS, width)
    column = tl.arange(0, ROWS * HALO_COLUMNS)[None, :]  # (r, v)
    dx = column % HALO_COLUMNS - right[:, None]
    near = (dx >= 0) & (dx < SIDE)
    spread = tl.where(near, tl.gather(rows, tl.where(near, dx * ROWS + column // HALO_COLUMNS, 0), 1), 0)
    spread = tl.reshape(narrow(spread, dtype, EMULATE), (PIXELS * ROWS, HALO_COLUMNS))
    stencil = multiply(spread, narrow(x, dtype, EMULATE), PRECISION, EMULATE)
    stencil = tl.reshape(narrow(stencil, dtype, EMULATE), (PIXELS, ROWS * COLUMNS))

    # The gather. Cells outside the map have weight zero: the matrices already clamp at the border.
    cell = tl.arange(0, ROWS * COLUMNS)
    row = tl.minimum(tl.maximum(first_row + cell // COLUMNS, 0), height - 1)
    column = tl.minimum(tl.maximum(first_column + cell % COLUMNS, 0), width - 1)
    channel = tl.arange(0, BLOCK)
    source += ((crop * height + row) * width + column)[:, None] * CHANNELS + channel[None, :]
    row, column = top + down, left + right
    stored = ((row < high) & (column < wide))[:, None]
    output += ((crop * high + row) * wide + column)[:, None] * CHANNELS + channel[None, :]
    for start in range(0, CHANNELS, BLOCK):
        if CHANNELS % BLOCK == 0:
            block = tl.load(source + start)
            mask = stored
        else:
            inside = (channel < CHANNELS - start)[None, :]
            block = tl.load(source + start, mask=inside, other=0)
            mask = stored & inside
        result = multiply(stencil, block, PRECISION, EMULATE)
        tl.store(output + start, narrow(result, dtype, EMULATE), mask=mask)


@triton.jit
def upsampling(matrix, row, column, rows, columns):
    """The (len(row), len(column)) part of a (rows, columns) matrix; zero outside of it."""
    inside = (row[:, None] < rows) & (column[None, :] >= 0) & (column[None, :] < columns)
    return tl.load(matrix + row[:, None] * columns + column[None, :], mask=inside, other=0).to(tl.float32)
