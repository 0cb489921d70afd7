"""`uhd.JBU` in ONNX: the node, and function bodies for runtimes that have no kernel for it."""

import numpy as np
import onnx_ir as ir

from uhd_export.plugins.graph import PLUGIN_DOMAIN, GraphBuilder
from uhd_export.plugins.jbu.launch import INPUTS
from uhd_export.plugins.jbu.reference import FIXUP, KERNEL, RADIUS

TILE = 8
HALO = TILE + 2 * RADIUS
# A tile's 14 upsampled rows come from at most this many low-resolution rows.
WINDOW = 10


def add_jbu(b: GraphBuilder, *inputs: ir.Value, plain: bool = False) -> ir.Value:
    """Add a `uhd.JBU` node and its function body; inputs as in INPUTS, output (B, H, W, C).

    `plain` carries the released order of work (upsample, then 49 shifted sums) instead of the tiled
    one.
    """
    b.add_function(_plain_body() if plain else _tiled_body())
    return b.op("JBU", *inputs, domain=PLUGIN_DOMAIN)


def _start() -> tuple[GraphBuilder, dict[str, ir.Value]]:
    b = GraphBuilder("JBU", function=True)
    return b, {name: b.input(name) for name in INPUTS}


def _range_features(b: GraphBuilder, v: dict[str, ir.Value]) -> ir.Value:
    """Guidance to (B, H, W, 32)."""
    x = b.op("Add", b.op("MatMul", v["guidance"], v["range_in_weight"]), v["range_in_bias"])
    return b.op("Add", b.op("MatMul", b.op("Gelu", x), v["range_out_weight"]), v["range_out_bias"])


def _kernels(b: GraphBuilder, v: dict[str, ir.Value], similarity: ir.Value, guidance: ir.Value) -> ir.Value:
    """(..., 49) similarities and (..., 3) guidance to the 49 weights of each pixel."""
    like = v["sigma_spatial"]

    def number(value: float | np.ndarray) -> ir.Value:
        return b.op("CastLike", b.constant(value), like)

    line = np.linspace(-1, 1, KERNEL, dtype=np.float32)
    distance = (line[:, None] ** 2 + line[None, :] ** 2).reshape(-1)
    sigma = b.op("Mul", number(2.0), b.op("Mul", like, like))
    spatial = b.op("Exp", b.op("Neg", b.op("Div", number(distance), sigma)))
    temperature = b.op("Clip", b.op("Exp", v["range_temp"]), number(1e-4), number(1e4))
    near = b.op("Mul", b.op("Softmax", b.op("Mul", temperature, similarity), axis=-1), spatial)
    total = b.op("ReduceSum", near, b.constant([-1]), keepdims=1)
    kernels = b.op("Div", near, b.op("Max", total, number(1e-7)))
    x = b.op("Concat", kernels, guidance, axis=-1)
    x = b.op("Gelu", b.op("Add", b.op("MatMul", x, v["fixup_in_weight"]), v["fixup_in_bias"]))
    x = b.op("Add", b.op("MatMul", x, v["fixup_out_weight"]), v["fixup_out_bias"])
    return b.op("Add", kernels, b.op("Mul", number(FIXUP), x))


def _plain_body() -> ir.Function:
    b, v = _start()
    height, width = b.dim(v["guidance"], 1), b.dim(v["guidance"], 2)
    features = _range_features(b, v)
    padded = b.op("Pad", features, b.constant([0, RADIUS, RADIUS, 0, 0, RADIUS, RADIUS, 0]), mode="reflect")

    def shifted(x: ir.Value, tap: int) -> ir.Value:
        starts = b.constant(list(divmod(tap, KERNEL)))
        ends = b.op("Add", b.concat_shape(height, width), starts)
        return b.op("Slice", x, starts, ends, b.constant([1, 2]))

    dots = [
        b.op("ReduceSum", b.op("Mul", features, shifted(padded, tap)), b.constant([-1]), keepdims=1)
        for tap in range(KERNEL * KERNEL)
    ]
    kernels = _kernels(b, v, b.op("Concat", *dots, axis=-1), v["guidance"])
    # Columns first: (B, h, W+6, C), then rows on a flattened last axis.
    wide = b.op("MatMul", v["upsample_x"], v["source"])
    flat = b.op("Reshape", wide, b.constant([0, 0, -1]))
    tall = b.op("MatMul", v["upsample_y"], flat)
    shape = b.concat_shape(b.dim(tall, 0), b.dim(tall, 1), b.dim(wide, 2), b.dim(wide, 3))
    up = b.op("Reshape", tall, shape)
    weights = b.ops("Split", kernels, axis=-1, num_outputs=KERNEL * KERNEL, outputs=KERNEL * KERNEL)
    out = b.op("Mul", weights[0], shifted(up, 0))
    for tap, weight in enumerate(weights[1:], 1):
        out = b.op("Add", out, b.op("Mul", weight, shifted(up, tap)))
    b.output(out, "upsampled")
    return b.function()


class _Axis:
    """Tile indices along one axis, derived in the graph from the lengths of both maps."""

    def __init__(self, b: GraphBuilder, high: ir.Value, low: ir.Value, upsample: ir.Value) -> None:
        one, self.high = b.constant([1]), high
        zero = b.constant(0)

        def scalar(x: ir.Value) -> ir.Value:
            return b.op("Squeeze", x)

        self.count = b.op("Div", b.op("Add", high, b.constant([TILE - 1])), b.constant([TILE]))
        tiles = b.op("Unsqueeze", b.op("Range", zero, scalar(self.count), b.constant(1)), b.constant([1]))
        first = b.op("Mul", tiles, b.constant([TILE]))  # (T, 1)
        last = b.op("Sub", high, one)
        # Rows of the halo, reflected at both ends; rows of the last tile beyond the map are clamped.
        halo = b.op("Abs", b.op("Add", first, b.constant(np.arange(HALO) - RADIUS)))
        halo = b.op("Sub", last, b.op("Abs", b.op("Sub", last, halo)))
        self.halo = b.op("Max", halo, b.constant([0]))  # (T, 14)
        self.centre = b.op("Min", b.op("Add", first, b.constant(np.arange(TILE))), last)  # (T, 8)
        self.window = b.op("Min", b.constant([WINDOW]), low)
        start = b.op("Mul", tiles, b.constant([TILE // 2]))
        start = b.op("Max", b.op("Sub", start, b.constant([RADIUS])), b.constant([0]))
        start = b.op("Min", start, b.op("Sub", low, self.window))
        self.low = b.op("Add", start, b.op("Range", zero, scalar(self.window), b.constant(1)))  # (T, window)
        # Rows of the upsampling matrix for each (pixel, tap), restricted to the tile's window.
        taps = np.add.outer(np.arange(TILE), np.arange(KERNEL)).reshape(-1)
        border = b.op("Add", high, b.constant([2 * RADIUS - 1]))
        rows = b.op("Min", b.op("Add", first, b.constant(taps)), border)
        gathered = b.op("Gather", upsample, rows, axis=0)  # (T, 56, low)
        columns = b.op("Unsqueeze", self.low, b.constant([1]))
        columns = b.op("Expand", columns, b.concat_shape(self.count, len(taps), self.window))
        stencil = b.op("GatherElements", gathered, columns, axis=2)
        self.stencil = b.op("Reshape", stencil, b.concat_shape(-1, KERNEL, self.window))  # (8T, 7, window)


def _flat_indices(b: GraphBuilder, rows: ir.Value, cols: ir.Value, width: ir.Value) -> ir.Value:
    """(Ty, n) rows and (Tx, m) columns to (Ty, Tx, n, m) positions in a map of `width` columns."""
    rows = b.op("Unsqueeze", b.op("Mul", rows, width), b.constant([1, 3]))
    return b.op("Add", rows, b.op("Unsqueeze", cols, b.constant([0, 2])))


def _tiled_body() -> ir.Function:
    """Tiles of 8x8 output pixels: the bicubic, reflecting 7x7 stencil becomes one dense matrix a tile.

    Counted for C channels and a tile: 64 x 100 x C multiply-adds in a matrix product, against
    64 x 49 x C in 49 passes over the upsampled map.
    """
    b, v = _start()
    source, guidance = v["source"], v["guidance"]
    batch, channels = b.dim(source, 0), b.dim(source, 3)
    y = _Axis(b, b.dim(guidance, 1), b.dim(source, 1), v["upsample_y"])
    x = _Axis(b, b.dim(guidance, 2), b.dim(source, 2), v["upsample_x"])
    pixels, side = (
        TILE * TILE,
        b.constant(np.arange(HALO * HALO).reshape(HALO, HALO)[RADIUS:-RADIUS, RADIUS:-RADIUS]),
    )

    def tiles(
        maps: ir.Value, rows: ir.Value, cols: ir.Value, width: ir.Value, size: ir.Value | int
    ) -> ir.Value:
        """Gather (B, H, W, c) into (B, Ty, Tx, size, c)."""
        index = _flat_indices(b, rows, cols, width)
        index = b.op("Reshape", index, b.concat_shape(y.count, x.count, size))
        flat = b.op("Reshape", maps, b.concat_shape(batch, -1, b.dim(maps, 3)))
        return b.op("Gather", flat, index, axis=1)

    # Similarity of each pixel with the whole halo of its tile, then the 49 neighbours picked out.
    around = tiles(_range_features(b, v), y.halo, x.halo, x.high, HALO * HALO)
    centre = b.op("Gather", around, b.op("Reshape", side, b.constant([-1])), axis=3)
    similarity = b.op("MatMul", centre, b.op("Transpose", around, perm=[0, 1, 2, 4, 3]))
    similarity = b.op("Reshape", similarity, b.concat_shape(batch, y.count, x.count, -1))
    similarity = b.op("Gather", similarity, b.constant(_neighbours()), axis=3)
    similarity = b.op("Reshape", similarity, b.concat_shape(batch, y.count, x.count, pixels, KERNEL * KERNEL))
    kernels = _kernels(b, v, similarity, tiles(guidance, y.centre, x.centre, x.high, pixels))

    # Compose with the upsampling along x, then along y. Letters: b crop, t/u tile, p/q pixel in the
    # tile, i/j tap, r/c low-resolution row/column of the window.
    grid = b.concat_shape(batch, y.count, x.count, TILE, TILE, KERNEL, KERNEL)
    band = b.op("Transpose", b.op("Reshape", kernels, grid), perm=[2, 4, 0, 1, 3, 5, 6])  # u q b t p i j
    columns = b.op("Mul", x.count, b.constant([TILE]))
    band = b.op("Reshape", band, b.concat_shape(columns, -1, KERNEL))
    band = b.op("MatMul", band, x.stencil)  # (uq, btpi, c)
    grid = b.concat_shape(x.count, TILE, batch, y.count, TILE, KERNEL, x.window)
    band = b.op("Transpose", b.op("Reshape", band, grid), perm=[3, 4, 2, 0, 1, 6, 5])  # t p b u q c i
    rows = b.op("Mul", y.count, b.constant([TILE]))
    band = b.op("Reshape", band, b.concat_shape(rows, -1, KERNEL))
    band = b.op("MatMul", band, y.stencil)  # (tp, buqc, r)
    grid = b.concat_shape(y.count, TILE, batch, x.count, TILE, x.window, y.window)
    band = b.op("Transpose", b.op("Reshape", band, grid), perm=[2, 0, 3, 1, 4, 6, 5])  # b t u p q r c
    window = b.op("Mul", y.window, x.window)
    band = b.op("Reshape", band, b.concat_shape(batch, y.count, x.count, pixels, window))

    low = tiles(source, y.low, x.low, b.dim(source, 2), window)
    out = b.op("MatMul", band, low)  # (B, Ty, Tx, 64, C)
    out = b.op("Reshape", out, b.concat_shape(batch, -1, channels))
    # Back to rows of pixels, dropping what the last tiles hold beyond the map.
    out = b.op("Gather", out, _untile(b, y, x), axis=1)
    b.output(b.op("Reshape", out, b.concat_shape(batch, y.high, x.high, channels)), "upsampled")
    return b.function()


def _neighbours() -> np.ndarray:
    """Positions of each tile pixel's 49 neighbours in its flattened (64, 196) similarities."""
    p, q, i, j = np.ix_(range(TILE), range(TILE), range(KERNEL), range(KERNEL))
    return (((p * TILE + q) * HALO + (p + i)) * HALO + (q + j)).reshape(-1)


def _untile(b: GraphBuilder, y: _Axis, x: _Axis) -> ir.Value:
    """(H * W,) positions of the map's pixels in (Ty, Tx, 8, 8) order."""

    def split(high: ir.Value) -> tuple[ir.Value, ir.Value]:
        index = b.op("Range", b.constant(0), b.op("Squeeze", high), b.constant(1))
        return b.op("Div", index, b.constant([TILE])), b.op("Mod", index, b.constant([TILE]))

    (tile_y, p), (tile_x, q) = split(y.high), split(x.high)
    rows = b.op("Mul", tile_y, b.op("Mul", x.count, b.constant([TILE * TILE])))
    rows = b.op("Add", rows, b.op("Mul", p, b.constant([TILE])))
    cols = b.op("Add", b.op("Mul", tile_x, b.constant([TILE * TILE])), q)
    index = b.op("Add", b.op("Unsqueeze", rows, b.constant([1])), b.op("Unsqueeze", cols, b.constant([0])))
    return b.op("Reshape", index, b.constant([-1]))
