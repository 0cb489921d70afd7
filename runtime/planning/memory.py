"""The memory of an answer: bytes by part and stage, whether they fit, and what would make them fit."""

from dataclasses import dataclass, replace

from uhd_export.runtime.config import LanguageConfig, ModelConfig
from uhd_export.runtime.image.encoder import ENOUGH_ROWS
from uhd_export.runtime.image.layout import visual_token_count
from uhd_export.runtime.image.slicing import SlicePlan
from uhd_export.runtime.language.decoder import ENOUGH_POSITIONS
from uhd_export.runtime.planning.activations import SLACK, language_elements, vision_elements

TEXT_POSITIONS = 52
"""Of a prompt beside its image: the vicuna_v1 template around a short question."""
# Python, ONNX Runtime and this program with an image in hand, before any weight: measured, Linux x86-64.
BASE = 115_000_000
# A CUDA context with cuBLAS: a data-sheet's guess, not measured.
CUDA_BASE = 600_000_000
# What a processor holds of products in 4 bits, by their bytes in the file: packed anew with their scales,
# which stay mapped too. Measured: 1.12 of layers of Vicuna's width, 1.09 of one product.
PACKED_INT4 = 1.1
# Positions a run that a prompt may be divided into, where the whole would not fit.
_CHUNKS = (512, 256, 128, 64)


@dataclass(frozen=True)
class Weights:
    """Bytes of each part as they lie in memory; embeddings are rows read from a mapped file: few count."""

    vision: int
    language: int
    head: int
    embeddings: int

    @property
    def resident(self) -> int:
        """What has to be in memory for an answer."""
        return self.vision + self.language + self.head


@dataclass(frozen=True)
class Bounds:
    """What limits activations: `rows` are the patches of a vision run (None: a whole batch, 0: one crop at a
    time), `chunk` the positions of a prefill run (None: all at once).
    """

    rows: int | None = None
    chunk: int | None = None


@dataclass(frozen=True)
class Layout:
    """How a model runs: bytes of an activation and of a number in the cache, where, and whether folded."""

    activation_bytes: int = 4
    cache_bytes: float = 4
    device: str = "cpu"
    fold: bool = True
    grid_mode: str = "selective"

    @property
    def scores(self) -> float:
        """How often attention holds its scores: a processor widens a float16 cache's, measured."""
        return 2.5 if self.device == "cpu" and self.cache_bytes == 2 else 1

    @property
    def bounds(self) -> Bounds:
        """Without a need to save memory."""
        return Bounds(ENOUGH_ROWS, ENOUGH_POSITIONS) if self.device == "cpu" else Bounds()

    @property
    def base(self) -> int:
        """Bytes of the programs themselves."""
        return BASE if self.device == "cpu" else CUDA_BASE


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part, and the peak of each stage: what is resident at the same time.

    `cache` is what the prompt's positions use, `reserved` the whole cache, of which a processor holds only
    what is used and a GPU all.
    """

    weights: Weights
    base: int
    positions: int
    capacity: int
    cache: int
    reserved: int
    vision: int
    prefill: int
    decode: int
    bounds: Bounds
    device: str

    @property
    def stages(self) -> dict[str, int]:
        """Peak of each stage. Finished stages' memory is returned, so that the largest counts."""
        held = self.base + self.weights.resident
        cache = self.cache if self.device == "cpu" else self.reserved
        early = 0 if self.device == "cpu" else self.reserved
        return {
            "vision": held + early + self.vision,
            "prefill": held + cache + self.prefill,
            "decode": held + cache + self.decode,
        }

    @property
    def peak_stage(self) -> str:
        """The stage that needs most."""
        return max(self.stages, key=lambda name: self.stages[name])

    @property
    def peak(self) -> int:
        """Bytes at most."""
        return self.stages[self.peak_stage]

    def fits(self, available: int | None) -> bool:
        """Whether `available` bytes suffice; None, which is not known, does."""
        return available is None or self.peak <= available


def visual_positions(slices: SlicePlan, layout: str, side: int) -> int:
    """Positions of a prompt about an image cut as `slices`: the image's, and a short question's."""
    return visual_token_count(slices.slice_grid, layout=layout, side=side) + TEXT_POSITIONS


def cache_bytes(language: LanguageConfig, positions: int, bytes_per: float) -> int:
    """Keys and values of `positions` positions in all layers."""
    return round(2 * language.layers * language.kv_heads * language.head_size * positions * bytes_per)


@dataclass(frozen=True)
class Workload:
    """One answer about an image cut as `slices`, whose prompt takes `positions` of a cache of `capacity`."""

    model: ModelConfig
    weights: Weights
    layout: Layout
    slices: SlicePlan
    positions: int
    capacity: int

    def plan(self, bounds: Bounds | None = None) -> MemoryPlan:
        """What it takes with `bounds` (default: the layout's)."""
        bounds = self.layout.bounds if bounds is None else bounds
        language, layout = self.model.language, self.layout
        item, number = layout.activation_bytes, layout.cache_bytes
        vision = vision_elements(
            self.slices, self.model, fold=layout.fold, grid_mode=layout.grid_mode, rows=bounds.rows
        )
        new = min(bounds.chunk or self.positions, self.positions)
        # The image's tokens, and the rows that are made of them.
        tokens = 2 * self.positions * language.hidden * 4
        return MemoryPlan(
            weights=self.weights,
            base=layout.base,
            positions=self.positions,
            capacity=self.capacity,
            cache=cache_bytes(language, self.positions, number),
            reserved=cache_bytes(language, self.capacity, number),
            vision=round(vision * item * SLACK) + tokens,
            prefill=round(
                language_elements(
                    language, new, self.positions, layout.scores, widened=layout.cache_bytes == 1
                )
                * item
                * SLACK
            )
            + tokens,
            decode=round(language_elements(language, 1, self.positions, layout.scores) * item) + tokens,
            bounds=bounds,
            device=layout.device,
        )

    def fitted(self, available: int | None) -> MemoryPlan:
        """The plan that fits into `available` bytes with the loosest bounds, else what takes least."""
        plan = self.plan()
        if available is None or plan.fits(available):
            return plan
        bounds = plan.bounds
        if plan.stages["vision"] > available:
            bounds = replace(bounds, rows=0)
        if plan.stages["prefill"] > available:
            most = min(bounds.chunk or self.positions, self.positions)
            chunks = [chunk for chunk in _CHUNKS if chunk < most]
            for chunk in chunks:
                bounds = replace(bounds, chunk=chunk)
                if self.plan(bounds).stages["prefill"] <= available:
                    break
        return self.plan(bounds)

    def fitting_capacity(self, available: int) -> int | None:
        """The largest cache that fits where all of it is reserved at once; None where none does, or it is
        not what is too much.
        """
        plan = self.fitted(available)
        if plan.device == "cpu" or plan.peak <= available:
            return None
        position = cache_bytes(self.model.language, 1, self.layout.cache_bytes)
        capacity = self.capacity - -(-(plan.peak - available) // position)
        return capacity if capacity > self.positions else None
