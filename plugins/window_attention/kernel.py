"""Window attention over pooled rows as two Triton kernels a level.

Pooling, scores and mixing are all linear in the pixels, so pooled rows need not exist. Of one window
let F (pixels, C) be the features of the patch that it touches, s (pixels) their LayerNorm scale and
R (rows, pixels) RoIAlign, the outer product of two small matrices. Then

    scores  = R @ (s * (F @ query + query_scale) + query_mass) + position      (`window_scores`)
    weights = softmax over the rows of all levels
    mixed   = (weights^T @ R * s) @ F                                          (`window_mixing`)

and both kernels run over the channels with one large product a block, R being applied outside of the
loop. A window touches 9, 25 and 81 pixels at 1x, 2x and 4x of a 24x24 crop, which stands beside 128
queries: products of that size keep tensor cores busy, where pooling to 9 rows would fill half of the
smallest tile. Only the scores (27 x 128 float32 a window) pass through memory between the kernels.

Row numbers (p, q) and pixel numbers (y, x) are flat; `support` finds the patch in the matrices.

Roofline (`uhd_export.plugins.roofline`), one 1008x672 image at ViT-L and Vicuna-7B size in float16:
1204 MB and 14.0 GFLOP; floors: H200 0.25 ms, RTX 4090 1.20 ms, Jetson AGX Orin 6.02 ms.
Where the kernels stand: not measured. Two thirds of the bytes are the mixed rows that they write; the
products over pixels multiply 8 times the FLOPs of pooling first, still below what memory takes.
"""

# ruff: noqa: ANN001, ANN201 (Triton types the arguments)

import triton
import triton.language as tl

from uhd_export.plugins.tiles import multiply, narrow

ROWS = tl.constexpr(16)  # rows of a level that are handled at a time
CELLS = tl.constexpr(32)  # cells of the position table that are handled at a time
SCAN = tl.constexpr(512)


@triton.jit
def support(matrix, bins, size):
    """The first column of a (bins, size) matrix that is not all zero, and the column after the last."""
    first, end = size, 0
    for start in range(0, bins * size, SCAN):
        at = start + tl.arange(0, SCAN)
        used = tl.load(matrix + at, mask=at < bins * size, other=0).to(tl.float32) != 0
        first = tl.minimum(first, tl.min(tl.where(used, at % size, size)))
        end = tl.maximum(end, tl.max(tl.where(used, at % size + 1, 0)))
    return first, end


@triton.jit
def patch(
    scale, roi_y, roi_x, crop, window, height, width, bins_y, bins_x, first_pixel,
    SIDE: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Coordinates y, x of PIXELS pixels of a window's patch, whether each exists, and its scale."""
    top, bottom = support(roi_y + window // SIDE * bins_y * height, bins_y, height)
    left, right = support(roi_x + window % SIDE * bins_x * width, bins_x, width)
    # A window whose samples all fall outside of the map touches nothing: its support ends before it begins.
    down, across = tl.maximum(bottom - top, 0), tl.maximum(right - left, 0)
    at = first_pixel + tl.arange(0, PIXELS)
    exists = at < down * across
    across = tl.maximum(across, 1)
    y = tl.where(exists, top + at // across, 0)
    x = tl.where(exists, left + at % across, 0)
    s = tl.load(scale + (crop * height + y) * width + x, mask=exists, other=0).to(tl.float32)
    return y, x, exists, s


@triton.jit
def outer(matrix_y, matrix_x, window, row, y, x, exists, bins_y, bins_x, height, width, SIDE: tl.constexpr):
    """matrix_y[i, p, y] * matrix_x[j, q, x] for rows (p, q) of window (i, j): (len(row), len(y))."""
    inside = (row < bins_y * bins_x)[:, None] & exists[None, :]
    p = window // SIDE * bins_y + row // bins_x
    q = window % SIDE * bins_x + row % bins_x
    first = tl.load(matrix_y + p[:, None] * height + y[None, :], mask=inside, other=0)
    second = tl.load(matrix_x + q[:, None] * width + x[None, :], mask=inside, other=0)
    return first.to(tl.float32) * second.to(tl.float32)


@triton.jit
def window_scores(
    query_position, features, scale, roi_y, roi_x, position_y, position_x, query, query_scale, query_mass,
    scores,
    batch, height, width, bins_y, bins_x, first_row, total, first_pixel,
    SIDE: tl.constexpr, CHANNELS: tl.constexpr, QUERIES: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr, PIXELS: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr = False,
):  # fmt: skip
    """Scores of one level's rows, into `scores` (windows, B, total, Q) float32 from `first_row` on.

    Adds the pixels from `first_pixel` on to what earlier launches left. Grid: crops, windows, query blocks.
    """
    crop, window = tl.program_id(0).to(tl.int64), tl.program_id(1)
    y, x, exists, s = patch(
        scale, roi_y, roi_x, crop, window, height, width, bins_y, bins_x, first_pixel, SIDE, PIXELS
    )
    q = tl.program_id(2) * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
    real = q < QUERIES

    channel = tl.arange(0, BLOCK)
    features += ((crop * height + y) * width + x)[:, None] * CHANNELS + channel[None, :]
    query += window.to(tl.int64) * CHANNELS * QUERIES + channel[:, None] * QUERIES + q[None, :]
    logits = tl.zeros((PIXELS, QUERY_BLOCK), tl.float32)
    for start in range(0, CHANNELS, BLOCK):
        inside = channel < CHANNELS - start
        block = tl.load(features + start, mask=exists[:, None] & inside[None, :], other=0)
        weight = tl.load(query + start * QUERIES, mask=inside[:, None] & real[None, :], other=0)
        logits += multiply(block, weight, PRECISION, EMULATE)
    by_scale = tl.load(query_scale + window * QUERIES + q, mask=real, other=0).to(tl.float32)
    by_mass = tl.load(query_mass + window * QUERIES + q, mask=real, other=0).to(tl.float32)
    logits = s[:, None] * (logits + by_scale[None, :]) + by_mass[None, :]

    query_position += window * QUERIES * SIDE * SIDE + q[None, :] * (SIDE * SIDE)
    for chunk in range(0, bins_y * bins_x, ROWS):
        row = chunk + tl.arange(0, ROWS)
        roi = outer(roi_y, roi_x, window, row, y, x, exists, bins_y, bins_x, height, width, SIDE)
        part = multiply(roi, logits, PRECISION, False)
        at = ((window * batch + crop) * total + first_row + row)[:, None] * QUERIES + q[None, :]
        stored = (row < bins_y * bins_x)[:, None] & real[None, :]
        if first_pixel == 0:
            for cells in range(0, SIDE * SIDE, CELLS):
                cell = cells + tl.arange(0, CELLS)
                table = cell < SIDE * SIDE
                position = outer(
                    position_y, position_x, window, row, cell // SIDE, cell % SIDE, table,
                    bins_y, bins_x, SIDE, SIDE, SIDE,
                )  # fmt: skip
                weight = tl.load(query_position + cell[:, None], mask=table[:, None] & real[None, :], other=0)
                part += multiply(position, weight.to(tl.float32), PRECISION, False)
        else:
            part += tl.load(scores + at, mask=stored, other=0)
        tl.store(scores + at, part, mask=stored)


@triton.jit
def window_mixing(
    features, scale, roi_y, roi_x, scores, rows, moments,
    batch, height, width, bins_y, bins_x, first_row, total, first_pixel, blocks,
    SIDE: tl.constexpr, CHANNELS: tl.constexpr, QUERIES: tl.constexpr, QUERY_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr, PIXELS: tl.constexpr, PRECISION: tl.constexpr, SETS: tl.constexpr,
    EMULATE: tl.constexpr = False,
):  # fmt: skip
    """Softmax of the scores and one level's share of the mix, `rows` and `moments` of the op.

    Adds the pixels from `first_pixel` on to what earlier launches left. Grid: crops, windows, query
    blocks by groups of `blocks` blocks of BLOCK channels.
    """
    dtype: tl.constexpr = rows.dtype.element_ty
    crop, window = tl.program_id(0).to(tl.int64), tl.program_id(1)
    groups = tl.cdiv(CHANNELS, blocks * BLOCK)
    group = tl.program_id(2) % groups
    y, x, exists, s = patch(
        scale, roi_y, roi_x, crop, window, height, width, bins_y, bins_x, first_pixel, SIDE, PIXELS
    )
    q = tl.program_id(2) // groups * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
    real = (q < QUERIES)[:, None]
    scores += (window * batch + crop) * total * QUERIES + q[:, None]

    most = tl.full((QUERY_BLOCK,), float("-inf"), tl.float32)
    for chunk in range(0, total, ROWS):
        row = chunk + tl.arange(0, ROWS)
        inside = real & (row < total)[None, :]
        value = tl.load(scores + row[None, :] * QUERIES, mask=inside, other=float("-inf"))
        most = tl.maximum(most, tl.max(value, 1))
    most = tl.where(q < QUERIES, most, 0)
    mass = tl.zeros((QUERY_BLOCK,), tl.float32)
    for chunk in range(0, total, ROWS):
        row = chunk + tl.arange(0, ROWS)
        inside = real & (row < total)[None, :]
        value = tl.load(scores + row[None, :] * QUERIES, mask=inside, other=float("-inf"))
        mass += tl.sum(tl.exp(value - most[:, None]), 1)
    share = 1 / tl.where(q < QUERIES, mass, 1)

    mix = tl.zeros((QUERY_BLOCK, PIXELS), tl.float32)
    for chunk in range(0, bins_y * bins_x, ROWS):
        row = chunk + tl.arange(0, ROWS)
        inside = real & (row < bins_y * bins_x)[None, :]
        value = tl.load(scores + (first_row + row)[None, :] * QUERIES, mask=inside, other=float("-inf"))
        weight = tl.exp(value - most[:, None]) * share[:, None]
        roi = outer(roi_y, roi_x, window, row, y, x, exists, bins_y, bins_x, height, width, SIDE)
        mix += multiply(weight, roi, PRECISION, False)

    windows: tl.constexpr = SIDE * SIDE
    at = (((q // SETS).to(tl.int64) * windows + window) * batch + crop) * SETS + q % SETS  # (h, n, b, s)
    stored = (q < QUERIES) & (group == 0)
    of_scale, of_mass = tl.sum(mix * s[None, :], 1), tl.sum(mix, 1)
    if first_pixel > 0:
        of_scale += tl.load(moments + at * 2, mask=stored, other=0).to(tl.float32)
        of_mass += tl.load(moments + at * 2 + 1, mask=stored, other=0).to(tl.float32)
    tl.store(moments + at * 2, narrow(of_scale, dtype, EMULATE), mask=stored)
    tl.store(moments + at * 2 + 1, narrow(of_mass, dtype, EMULATE), mask=stored)

    mix = narrow(mix * s[None, :], dtype, EMULATE)
    channel = tl.arange(0, BLOCK)
    features += ((crop * height + y) * width + x)[:, None] * CHANNELS + channel[None, :]
    rows += at[:, None] * CHANNELS + channel[None, :]
    begin = group * blocks * BLOCK
    for start in range(begin, tl.minimum(begin + blocks * BLOCK, CHANNELS), BLOCK):
        inside = (channel < CHANNELS - start)[None, :]
        block = tl.load(features + start, mask=exists[:, None] & inside, other=0)
        mixed = multiply(mix, block, PRECISION, EMULATE)
        if first_pixel > 0:
            mixed += tl.load(rows + start, mask=real & inside, other=0).to(tl.float32)
        tl.store(rows + start, narrow(mixed, dtype, EMULATE), mask=real & inside)
