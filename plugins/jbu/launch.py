"""Launch plan of one JBU stage: tile sizes and grid from shapes alone."""

from uhd_export.plugins.launch import Launch, Scratch, power_of_two

TALL, BROAD = 4, 16  # an output tile, as in the kernel
RANGE = 32  # channels of the range features
FEATURE_PIXELS = 64  # of a program that computes range features
INPUTS = (
    "source",  # (B, h, w, C)
    "guidance",  # (B, H, W, 3), H = 2h, W = 2w
    "range_in_weight",  # (3, 32); all weights are in x out
    "range_in_bias",
    "range_out_weight",  # (32, 32)
    "range_out_bias",
    "range_temp",  # ()
    "sigma_spatial",  # ()
    "fixup_in_weight",  # (52, 49)
    "fixup_in_bias",
    "fixup_out_weight",  # (49, 49)
    "fixup_out_bias",
    "upsample_y",  # (H + 6, h)
    "upsample_x",  # (W + 6, w)
)
OUTPUTS = ("output",)


def plan(
    batch: int, height: int, width: int, channels: int, dtype: str
) -> tuple[tuple[Launch, ...], tuple[Scratch, ...]]:
    """Both launches for a (batch, height, width, channels) source, and the range features' buffer.

    `dtype` is "float32", "float16" or "bfloat16".
    """
    single = dtype == "float32"
    block = min(power_of_two(channels), 32 if single else 64)
    tiles = -(-2 * height // TALL) * -(-2 * width // BROAD)
    precision = ("PRECISION", "ieee" if single else "tf32")
    pixels = 4 * batch * height * width
    features = Launch(
        kernel="range_features",
        grid=(-(-pixels // FEATURE_PIXELS), 1, 1),
        tensors=(*INPUTS[1:6], "features"),
        integers=(pixels,),
        constants=(precision,),
        warps=4,
        stages=1,
    )
    stage = Launch(
        kernel="jbu_stage",
        grid=(tiles, batch, 1),
        tensors=("source", "guidance", "features", *INPUTS[6:], *OUTPUTS),
        integers=(height, width),
        constants=(("CHANNELS", channels), ("BLOCK", block), precision),
        warps=8,
        stages=2,
        registers=None if single else 128,
    )
    return (features, stage), (Scratch("features", pixels * RANGE),)
