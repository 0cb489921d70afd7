"""Window attention as four Triton kernels, of which none passes more than pooled rows through memory.

    pooled   = RoIAlign of (scale * features)                       (`window_pool`, a level each)
    scores   = pooled @ query + positions, scale and mass' parts    (`window_scores`, a level each)
    weights  = softmax of the scores over the rows of all levels    (`window_softmax`, in place)
    attended = (weights^T @ pooled) @ value, over all levels        (`window_values`)

Pooled rows are few: 27 a window, beside 128 queries. What the queries mix of them is 14 times as much, and
only the value product wants it: `window_values` mixes a block of channels for the four queries of a head in
registers, and multiplies it by the head's values at once, a left side of full size for the tensor cores.
Values of the rows in place of mixed rows (one dense product, then mixing) would be twice the FLOPs.

Rows (p, q) of a level's bins are flat and the levels' follow each other; a *place* is a window of a crop, the
window as the slow axis.

Roofline (`uhd_export.plugins.roofline`), one 1008x672 image at ViT-L and Vicuna-7B size in float16:
485 MB and 115.5 GFLOP; floors: H200 0.12 ms, RTX 4090 0.70 ms, Jetson AGX Orin 2.75 ms.
Where the kernels stand: not measured. Their buffers add 213 MB. `window_values` issues about 16 instructions
for each tensor-core product of a warp: they hide behind the products on an RTX 4090, not on Orin and A100.
"""

# ruff: noqa: ANN001, ANN201 (Triton types the arguments)

import triton
import triton.language as tl

from uhd_export.plugins.tiles import multiply, narrow

BINS = tl.constexpr(4)  # neighbouring bins that a program pools at once
CHUNK = tl.constexpr(32)  # rows of a window whose scores are normalised at a time
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
def window_pool(
    features, scale, roi_y, roi_x, pooled, moments,
    batch, height, width, bins_y, bins_x, first_row, total,
    SIDE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, EMULATE: tl.constexpr = False,
):  # fmt: skip
    """One level's rows of `pooled` (places, total, C), and of `moments` (places, total, 2): scale and mass.

    Sums in float32. Grid: crops, windows, rows of bins by groups of BINS columns.
    """
    dtype: tl.constexpr = pooled.dtype.element_ty
    crop, window = tl.program_id(0).to(tl.int64), tl.program_id(1)
    groups = tl.cdiv(bins_x, BINS)
    p, first = tl.program_id(2) // groups, tl.program_id(2) % groups * BINS
    q = first + tl.arange(0, BINS)
    real = q < bins_x
    roi_y += (window // SIDE * bins_y + p) * height
    roi_x += window % SIDE * bins_x * width
    # Where no sample falls on the map, the support ends before it begins, and the loops do nothing.
    top, bottom = support(roi_y, 1, height)
    left, right = support(roi_x + first * width, tl.minimum(BINS, bins_x - first), width)
    row = (window.to(tl.int64) * batch + crop) * total + first_row + p * bins_x + q
    scale += crop * height * width
    features += crop * height * width * CHANNELS

    of_scale, of_mass = tl.zeros((BINS,), tl.float32), tl.zeros((BINS,), tl.float32)
    for y in range(top, bottom):
        down = tl.load(roi_y + y).to(tl.float32)
        for x in range(left, right):
            weight = down * tl.load(roi_x + q * width + x, mask=real, other=0).to(tl.float32)
            of_scale += weight * tl.load(scale + y * width + x).to(tl.float32)
            of_mass += weight
    tl.store(moments + row * 2, of_scale, mask=real)
    tl.store(moments + row * 2 + 1, of_mass, mask=real)

    for start in range(0, CHANNELS, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        inside = channel < CHANNELS
        sums = tl.zeros((BINS, BLOCK), tl.float32)
        for y in range(top, bottom):
            down = tl.load(roi_y + y).to(tl.float32)
            for x in range(left, right):
                weight = down * tl.load(roi_x + q * width + x, mask=real, other=0).to(tl.float32)
                weight *= tl.load(scale + y * width + x).to(tl.float32)
                pixel = tl.load(features + (y * width + x) * CHANNELS + channel, mask=inside, other=0)
                sums += weight[:, None] * pixel.to(tl.float32)[None, :]
        at = row[:, None] * CHANNELS + channel[None, :]
        tl.store(pooled + at, narrow(sums, dtype, EMULATE), mask=real[:, None] & inside[None, :])


@triton.jit
def window_scores(
    pooled, moments, position, query, query_scale, query_mass, scores,
    batch, bins, first_row, total,
    CHANNELS: tl.constexpr, QUERIES: tl.constexpr, QUERY_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr, EMULATE: tl.constexpr = False,
):  # fmt: skip
    """Scores of one level's rows, into `scores` (places, total, Q) float32.

    All crops of a window share its queries. Grid: blocks of ROWS rows of all crops, windows, query blocks.
    """
    window = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = at < batch * bins
    own = first_row + at % bins
    row = (window * batch + at // bins) * total + own
    q = tl.program_id(2) * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
    real = q < QUERIES
    stored = exists[:, None] & real[None, :]

    channel = tl.arange(0, BLOCK)
    pooled += row[:, None] * CHANNELS + channel[None, :]
    query += window * CHANNELS * QUERIES + channel[:, None] * QUERIES + q[None, :]
    sums = tl.zeros((ROWS, QUERY_BLOCK), tl.float32)
    for start in range(0, CHANNELS, BLOCK):
        inside = channel < CHANNELS - start
        block = tl.load(pooled + start, mask=exists[:, None] & inside[None, :], other=0)
        weight = tl.load(query + start * QUERIES, mask=inside[:, None] & real[None, :], other=0)
        sums += multiply(block, weight, PRECISION, EMULATE)

    of_scale = tl.load(moments + row * 2, mask=exists, other=0)
    of_mass = tl.load(moments + row * 2 + 1, mask=exists, other=0)
    by_scale = tl.load(query_scale + window * QUERIES + q, mask=real, other=0).to(tl.float32)
    by_mass = tl.load(query_mass + window * QUERIES + q, mask=real, other=0).to(tl.float32)
    table = position + (window * total + own)[:, None] * QUERIES + q[None, :]
    sums += of_scale[:, None] * by_scale[None, :] + of_mass[:, None] * by_mass[None, :]
    sums += tl.load(table, mask=stored, other=0).to(tl.float32)
    tl.store(scores + row[:, None] * QUERIES + q[None, :], sums, mask=stored)


@triton.jit
def window_softmax(scores, total, QUERIES: tl.constexpr, QUERY_BLOCK: tl.constexpr):
    """Softmax of `scores` (places, total, Q) over the rows, in place. Grid: places, query blocks."""
    q = tl.program_id(1) * QUERY_BLOCK + tl.arange(0, QUERY_BLOCK)
    real = (q < QUERIES)[None, :]
    scores += tl.program_id(0).to(tl.int64) * total * QUERIES + q[None, :]
    most = tl.full((QUERY_BLOCK,), float("-inf"), tl.float32)
    for chunk in range(0, total, CHUNK):
        row = (chunk + tl.arange(0, CHUNK))[:, None]
        value = tl.load(scores + row * QUERIES, mask=(row < total) & real, other=float("-inf"))
        most = tl.maximum(most, tl.max(value, 0))
    most = tl.where(q < QUERIES, most, 0)
    mass = tl.zeros((QUERY_BLOCK,), tl.float32)
    for chunk in range(0, total, CHUNK):
        row = (chunk + tl.arange(0, CHUNK))[:, None]
        value = tl.load(scores + row * QUERIES, mask=(row < total) & real, other=float("-inf"))
        mass += tl.sum(tl.exp(value - most[None, :]), 0)
    share = 1 / tl.where(q < QUERIES, mass, 1)
    for chunk in range(0, total, CHUNK):
        row = (chunk + tl.arange(0, CHUNK))[:, None]
        value = tl.load(scores + row * QUERIES, mask=(row < total) & real, other=float("-inf"))
        tl.store(
            scores + row * QUERIES, tl.exp(value - most[None, :]) * share[None, :], mask=(row < total) & real
        )


@triton.jit
def mix(rows, weights, first, last, inside, STRIDE: tl.constexpr, QUERIES: tl.constexpr):
    """Rows `first` to `last` of (n, m) tiles, STRIDE elements apart, mixed by four queries: (4n, m).

    The query is the slow axis. `weights` are the n places of the first query's weights; those of a row are
    QUERIES apart.
    """
    a = tl.zeros((weights.shape[0], inside.shape[0]), tl.float32)
    b, c, d = a, a, a
    for row in tl.range(first, last, loop_unroll_factor=3):
        block = tl.load(rows + row * STRIDE, mask=inside[None, :], other=0).to(tl.float32)
        weight = weights + row * QUERIES
        a += tl.load(weight)[:, None] * block
        b += tl.load(weight + 1)[:, None] * block
        c += tl.load(weight + 2)[:, None] * block
        d += tl.load(weight + 3)[:, None] * block
    four = tl.join(tl.join(a, b), tl.join(c, d))  # (n, m, 2, 2), the last axis between the pairs
    return tl.reshape(tl.permute(four, (3, 2, 0, 1)), (4 * a.shape[0], a.shape[1]))


@triton.jit
def window_values(
    pooled, moments, weights, value, value_moments, attended,
    batch, places, total, rows_0, rows_1, rows_2, rows_3,
    WINDOWS: tl.constexpr, LEVELS: tl.constexpr, CHANNELS: tl.constexpr, HEADS: tl.constexpr,
    SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr, EMULATE: tl.constexpr = False,
):  # fmt: skip
    """What a head's four queries attend to at TILE places, into `attended` (B, N, 4, heads * size).

    `rows_0` to `rows_3` are the levels' numbers of rows. Grid: heads, blocks of TILE places.
    """
    dtype: tl.constexpr = attended.dtype.element_ty
    head, first_place = tl.program_id(0), tl.program_id(1) * TILE
    place = tl.minimum(first_place + tl.arange(0, TILE), places - 1).to(tl.int64)
    channel, moment, size = tl.arange(0, BLOCK), tl.arange(0, 16), tl.arange(0, SIZE_BLOCK)
    real = (size < SIZE)[None, :]
    pooled += (place * total)[:, None] * CHANNELS + channel[None, :]
    moments += (place * total)[:, None] * 2 + moment[None, :]
    weights += place * total * HEADS * 4 + head * 4
    value += head.to(tl.int64) * CHANNELS * SIZE
    value_moments += head * 2 * SIZE

    sums = tl.zeros((4 * TILE, SIZE_BLOCK), tl.float32)
    first = 0
    for level in range(LEVELS):
        last = first + tl.where(
            level == 0, rows_0, tl.where(level == 1, rows_1, tl.where(level == 2, rows_2, rows_3))
        )
        two = moment < 2
        mixed = mix(moments, weights, first, last, two, 2, HEADS * 4)
        table = moment[:, None] * SIZE + size[None, :]
        by = tl.load(value_moments + table, mask=two[:, None] & real, other=0)
        sums += multiply(narrow(mixed, dtype, EMULATE), by, PRECISION, EMULATE)
        for start in range(0, CHANNELS, BLOCK):
            inside = channel < CHANNELS - start
            left = mix(pooled + start, weights, first, last, inside, CHANNELS, HEADS * 4)
            at = channel[:, None] * SIZE + size[None, :]
            right = tl.load(value + start * SIZE + at, mask=inside[:, None] & real, other=0)
            sums += multiply(narrow(left, dtype, EMULATE), right, PRECISION, EMULATE)
        value += HEADS * CHANNELS * SIZE
        value_moments += HEADS * 2 * SIZE
        first = last

    query = tl.arange(0, 4 * TILE)
    own = first_place + query % TILE
    row = (own % batch * WINDOWS + own // batch) * 4 + query // TILE
    at = (row.to(tl.int64) * HEADS + head)[:, None] * SIZE + size[None, :]
    tl.store(attended + at, narrow(sums, dtype, EMULATE), mask=(own < places)[:, None] & real)
