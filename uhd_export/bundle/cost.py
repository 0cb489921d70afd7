"""What a build takes, before it starts: bytes by part, disk, time, and what its preset lost when measured."""

from dataclasses import dataclass, replace

import numpy as np

from uhd_export.bundle.options import BuildOptions
from uhd_export.bundle.presets import PRESETS, Preset, measured
from uhd_export.bundle.size import vision_bytes
from uhd_export.bundle.stages import ASKING, PARITY, Sizes, build_units, expected_seconds
from uhd_export.checkpoint.config import CheckpointConfig
from uhd_export.checkpoint.int4.gptq import GptqCheckpoint
from uhd_export.checkpoint.int4.linears import LM_HEAD, head_group, linear_shapes
from uhd_export.runtime.bundle.manifest import Quantization
from uhd_export.runtime.units import format_bytes

# Of the checkpoint that is read, and that GPTQ writes.
_STORED = 2
# Seconds; less is start-up, which the rates leave out.
_WORTH_SAYING = 90


@dataclass(frozen=True)
class Cost:
    """Bytes of a bundle's `parts`, and of what a build keeps or needs beside them: a prediction.

    `checkpoint` is the GPTQ checkpoint written first, `temporary` a graph that is calibrated on, or those
    that engines are built from. `sizes` are those of the parts in numbers; `seconds` what each stage of the
    build takes, GPTQ's aside, on the machine on which rates were measured; `rounded` says whether anything is
    computed otherwise than in float32, `original` whether the checkpoint before any rounding is at hand.
    """

    parts: dict[str, int]
    checkpoint: int
    temporary: int
    sizes: Sizes
    seconds: dict[str, float]
    rounded: bool
    original: bool = True

    @property
    def bundle(self) -> int:
        """Bytes of the bundle."""
        return sum(self.parts.values())

    @property
    def staging(self) -> int:
        """Bytes of its folder while it is built."""
        return self.bundle + self.temporary


def estimate_cost(
    config: CheckpointConfig,
    options: BuildOptions,
    quantization: Quantization | None,
    *,
    quantizing: bool,
    verify: bool,
    gptq: GptqCheckpoint | None = None,
) -> Cost:
    """The cost of a build whose language model is stored as `quantization` says; `quantizing` it first.

    `gptq` is the checkpoint whose integers are kept, where they are there already.
    """
    language = config.language
    item = np.dtype(options.precision).itemsize
    method = None if quantization is None else quantization.method
    sizes = model_sizes(config)
    weights, head = sizes.language, sizes.head
    group = 1 if quantization is None else quantization.group
    bits = None if quantization is None else quantization.head_bits
    vision = vision_bytes(config.model, replace(options, vision_weights="dense"))
    int8 = options.vision_weights == "int8"
    tables = (options.context or language.context) * language.head_size * item
    parts = {
        "weights": tables + (weights * item if method is None else _rounded(weights, 4, group, item)),
        "head": head * item if bits is None else _rounded(head, bits, head_group(language), item),
        "embeddings": head * (item if method is None else _STORED),
        "vision": vision_bytes(config.model, options),
    }
    if gptq is not None and method == "gptq":
        parts["weights"] = tables + sum(
            _kept(gptq, name, n * k, item) for name, (n, k) in linear_shapes(language).items()
        )
        if bits is None:
            parts["head"] = _kept(gptq, LM_HEAD, head, item)
    kept = _STORED * (head * (1 if language.tied else 2) + vision // item)
    checkpoint = kept + _rounded(weights, 4, group, _STORED) if quantizing else 0
    temporary = vision if int8 else 0
    if options.engines is not None:
        temporary = max(temporary, sum(parts.values()))
    units = build_units(
        sizes,
        int8_vision=int8,
        int8_cache=options.cache_type == "int8",
        verify=verify,
        backend=options.backend,
    )
    seconds = expected_seconds(units)
    rounded = options.rounded or quantization is not None
    if verify and options.questions and rounded:
        seconds[PARITY] += expected_seconds({ASKING: (0, options.questions)})[ASKING]
    return Cost(parts, checkpoint, temporary, sizes, seconds, rounded, original=gptq is None)


def model_sizes(config: CheckpointConfig) -> Sizes:
    """Of its parts, in numbers."""
    language = config.language
    weights = sum(n * k for n, k in linear_shapes(language).values())
    vision = vision_bytes(config.model, BuildOptions()) // np.dtype(BuildOptions().precision).itemsize
    return Sizes(vision, weights, language.vocab * language.hidden)


def cost_lines(cost: Cost, options: BuildOptions, gptq_seconds: float, gptq_folder: str) -> list[str]:
    """For people: sizes by part, disk and time, and what was measured of a preset that chooses the same.

    What is yet to be quantized takes `gptq_seconds`, and stays in `gptq_folder`.
    """
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in cost.parts.items())
    lines = [f"about {format_bytes(cost.bundle)}: {parts}"]
    disk = cost.staging + cost.checkpoint
    beside = f", {format_bytes(cost.checkpoint)} of it kept as {gptq_folder}" if cost.checkpoint else ""
    seconds = sum(cost.seconds.values())
    if cost.checkpoint:
        seconds += gptq_seconds
    machine = measured()["rates"]["machine"]
    takes = f"; takes about {_duration(seconds)} on a {machine}" if seconds >= _WORTH_SAYING else ""
    lines.append(f"needs {format_bytes(disk)} of disk{beside}{takes}")
    return [*lines, loss_line(options, cost.original)] if cost.rounded else lines


def loss_line(options: BuildOptions, original: bool = True) -> str:
    """What the preset that chooses as `options` do lost on the embedded model; none may.

    Then it is measured, against the `original` checkpoint where that is at hand.
    """
    weights = options.weights
    chosen = Preset(weights.weights, weights.lm_head, options.vision_weights, options.cache, options.dtype)
    found = next((name for name, preset in PRESETS.items() if preset == chosen), None)
    table = measured()["presets"]
    if found not in table or options.engines is not None or weights.activations != "int8":
        if not original:
            return "what these options lose is not measured: the checkpoint was quantized before"
        return "what these options lose is measured at the end, unless --no-verify"
    exact, own = table["exact"], table[found]
    return (
        f"{found} on the embedded model: {own['exact']} of {own['questions']} answers exact, "
        f"{exact['exact']} in float32"
    )


def _rounded(count: int, bits: int, group: int, item: int) -> int:
    return count * bits // 8 + count // group * item


def _kept(gptq: GptqCheckpoint, name: str, count: int, item: int) -> int:
    """Bytes of a layer of `count` weights: bits and groups are its own; it may not be quantized at all."""
    if not gptq.is_quantized(name):
        return count * item
    return _rounded(count, gptq.bits(name), gptq.group(name), item)


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{seconds / 60:.0f} minutes"
