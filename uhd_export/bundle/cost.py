"""What a build takes, before it starts: bytes by part, disk, time, and what its preset lost when measured."""

from dataclasses import dataclass

import numpy as np

from uhd_export.bundle.options import BuildOptions
from uhd_export.bundle.presets import PRESETS, Preset, measured
from uhd_export.checkpoint.config import CheckpointConfig
from uhd_export.checkpoint.int4.linears import head_group, linear_shapes
from uhd_export.graph.int4.options import HEADS
from uhd_export.runtime.bundle.manifest import Quantization
from uhd_export.runtime.units import format_bytes

# Of the checkpoint that is read, and that GPTQ writes.
_STORED = 2
# Of a question about a 1008x672 image.
_POSITIONS = 1060
# Seconds; less is start-up, which the rates leave out.
_WORTH_SAYING = 90


@dataclass(frozen=True)
class Cost:
    """Bytes of a bundle's `parts`, and of what a build keeps or needs beside them: a prediction.

    `checkpoint` is the GPTQ checkpoint written first, `temporary` a graph that is calibrated on, or those
    that engines are built from. `weights` are the language model's linear ones, in numbers; `rounded` says
    whether anything is stored in fewer bits than a float's.
    """

    parts: dict[str, int]
    checkpoint: int
    temporary: int
    weights: int
    rounded: bool

    @property
    def bundle(self) -> int:
        """Bytes of the bundle."""
        return sum(self.parts.values())

    @property
    def staging(self) -> int:
        """Bytes of its folder while it is built."""
        return self.bundle + self.temporary

    def seconds(self, samples: int) -> float:
        """On the machine on which the rates were measured, with GPTQ on `samples` images and questions."""
        rates = measured()["rates"]
        seconds = self.bundle * rates["build_seconds_per_byte"]
        if self.checkpoint:
            seconds += self.weights * samples * _POSITIONS * rates["gptq_seconds_per_weight_and_token"]
        return float(seconds)


def estimate_cost(
    config: CheckpointConfig, options: BuildOptions, quantization: Quantization | None, quantizing: bool
) -> Cost:
    """The cost of a build whose language model is stored as `quantization` says; `quantizing` it first."""
    language = config.language
    item = np.dtype(options.precision).itemsize
    method = None if quantization is None else quantization.method
    weights = sum(n * k for n, k in linear_shapes(config.language).values())
    group = 1 if quantization is None else quantization.group
    head = language.vocab * language.hidden
    bits = HEADS[quantization.lm_head] if quantization is not None else None
    products, rest = _vision_weights(config)
    vision = item * (products + rest)
    int8 = options.vision_weights == "int8"
    tables = language.context * language.head_size * item
    parts = {
        "weights": tables + (weights * item if method is None else _rounded(weights, 4, group, item)),
        "head": head * item if bits is None else _rounded(head, bits, head_group(language), item),
        "embeddings": head * (item if method is None else _STORED),
        "vision": products + item * rest if int8 else vision,
    }
    kept = _STORED * (head * (1 if language.tied else 2) + vision // item)
    checkpoint = kept + _rounded(weights, 4, group, _STORED) if quantizing else 0
    temporary = vision if int8 else 0
    if options.engines is not None:
        temporary = max(temporary, sum(parts.values()))
    return Cost(parts, checkpoint, temporary, weights, int8 or quantization is not None)


def cost_lines(cost: Cost, options: BuildOptions, samples: int, gptq_folder: str) -> list[str]:
    """For people: sizes by part, disk and time, and what was measured of a preset that chooses the same."""
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in cost.parts.items())
    lines = [f"about {format_bytes(cost.bundle)}: {parts}"]
    disk = cost.staging + cost.checkpoint
    beside = f", {format_bytes(cost.checkpoint)} of it kept as {gptq_folder}" if cost.checkpoint else ""
    seconds = cost.seconds(samples)
    machine = measured()["rates"]["machine"]
    takes = f"; takes about {_duration(seconds)} on a {machine}" if seconds >= _WORTH_SAYING else ""
    lines.append(f"needs {format_bytes(disk)} of disk{beside}{takes}")
    return [*lines, loss_line(options)] if cost.rounded else lines


def loss_line(options: BuildOptions) -> str:
    """What the preset that chooses as `options` do lost on the embedded model; none may."""
    weights = options.weights
    chosen = Preset(weights.weights, weights.lm_head, options.vision_weights, options.cache, options.dtype)
    found = next((name for name, preset in PRESETS.items() if preset == chosen), None)
    table = measured()["presets"]
    if found not in table or options.engines is not None or weights.activations != "int8":
        return "what these options lose is measured at the end, unless --no-verify"
    exact, own = table["exact"], table[found]
    return (
        f"{found} on the embedded model: {own['exact']} of {own['questions']} answers exact, "
        f"{exact['exact']} in float32"
    )


def _vision_weights(config: CheckpointConfig) -> tuple[int, int]:
    """Numbers in the folded vision part's products that can be int8, and in the rest of what counts."""
    tower, projector = config.vision, config.projector
    sets, levels, square = 4 if projector.kind == "hiwin" else 1, len(projector.levels), projector.hidden**2
    layers = tower.layers * (4 * tower.hidden**2 + 2 * tower.hidden * tower.intermediate)
    products = layers + levels * tower.hidden * projector.hidden + (sets + 2) * square
    positions = (sets + levels) * projector.side**2 * projector.hidden
    return products, 3 * square + positions + (tower.image_size // tower.patch) ** 2 * tower.hidden


def _rounded(count: int, bits: int, group: int, item: int) -> int:
    return count * bits // 8 + count // group * item


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{seconds / 60:.0f} minutes"
