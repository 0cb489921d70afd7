"""Times of an answer's stages as predicted from counts: never measured, and to be called so.

A stage takes the longer of its bytes over the bandwidth and its FLOPs over the rate of products. Launches and
the host are not counted.
"""

from dataclasses import dataclass

from uhd_export.runtime.language.decoder import visible_sizes
from uhd_export.runtime.planning.memory import Workload, cache_bytes
from uhd_export.runtime.profiling.costs import stage_costs, total
from uhd_export.runtime.profiling.devices import Device
from uhd_export.runtime.profiling.rates import Rates

# What kernels of this kind reach of a data sheet's figures.
BANDWIDTH_SHARE, PEAK_SHARE = 0.8, 0.6
# Products of integers over those of float32 on a processor: 3.1 was measured on a ViT alone.
_INTEGER_SPEED = 2.0


@dataclass(frozen=True)
class Speed:
    """Bytes and FLOPs a second that products reach; `integer` is how much faster those of integers are."""

    bandwidth: float
    flops: float
    integer: float
    how: str

    @classmethod
    def of(cls, source: Device | Rates) -> "Speed":
        """Of a device by its data sheet, or of this machine as measured."""
        if isinstance(source, Rates):
            return cls(source.bytes_per_second, source.flops_per_second, _INTEGER_SPEED, source.how)
        how = f"{source.name}, {BANDWIDTH_SHARE:.0%} of its bandwidth and {PEAK_SHARE:.0%} of its peak"
        return cls(BANDWIDTH_SHARE * source.bandwidth, PEAK_SHARE * source.flops, 1.0, how)


def predict_seconds(
    work: Workload, speed: Speed, *, integer_vision: bool = False, integer_language: bool = False
) -> dict[str, float]:
    """Seconds of "vision", "prefill", and "decode", a token after the prompt."""
    layout, grids = work.layout, work.slices.patch_grids
    costs = stage_costs(grids, work.model, work.positions, folded=layout.fold, grid_mode=layout.grid_mode)
    counts = {name: total(parts) for name, parts in costs.items()}
    seen = min(work.positions + 1, work.capacity)
    if layout.device != "cpu":  # whose kernels read the cache in steps
        seen = next(size for size in visible_sizes(work.capacity) if size >= seen)
    weights = work.weights
    flops = {
        "vision": sum(counts[name].flops for name in ("vit", "jbu", "projector")),
        "prefill": counts["prefill"].flops,
        "decode": counts["decode"].flops,
    }
    activations = sum(counts[name].activations for name in ("vit", "jbu", "projector"))
    moved = {
        "vision": weights.vision + layout.activation_bytes * activations,
        "prefill": weights.language + weights.head + layout.activation_bytes * counts["prefill"].activations,
        "decode": weights.language
        + weights.head
        + cache_bytes(work.model.language, seen, layout.cache_bytes),
    }
    faster = {"vision": integer_vision, "prefill": integer_language, "decode": integer_language}
    rates = {name: speed.flops * (speed.integer if fast else 1) for name, fast in faster.items()}
    return {name: max(moved[name] / speed.bandwidth, flops[name] / rates[name]) for name in flops}
