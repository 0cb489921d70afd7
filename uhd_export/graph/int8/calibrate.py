"""Which products of the vision graph are rounded to 8 bits, decided by the error of each on images."""

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from uhd_export.checkpoint.config import CheckpointConfig
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.graph.int8.products import (
    HIGH,
    LOW,
    ROWS,
    DynamicInt8,
    ObservedProducts,
    SomeInt8,
    StaticInt8,
)
from uhd_export.graph.int8.rounding import lengths, relative_error, rounded_product
from uhd_export.graph.int8.smoothing import Group, SmoothedView, factors, groups
from uhd_export.graph.products import Product, ProductFormat
from uhd_export.graph.vision import emit_vision
from uhd_export.runtime.bundle.manifest import VISION, VisionQuantization
from uhd_export.runtime.engines.onnxruntime import OrtEngine
from uhd_export.runtime.image.encoder import VisionEncoder
from uhd_export.runtime.image.pixels import cut
from uhd_export.runtime.image.source import ImageLike, open_image
from uhd_export.runtime.language.sequence import plan_image
from uhd_export.runtime.progress import Progress
from uhd_export.runtime.settings import Settings

# A product whose output changes by more stays dense.
LIMIT = 0.05
# How much of the outliers goes into the weights; what leaves the least error is taken, 0 meaning none.
_STRENGTHS = (0.0, 0.25, 0.5, 0.75)
_MOST_ROWS = 1024


@dataclass
class Seen:
    """What went into a product: extremes of each channel, (K,), and some rows, (N, K)."""

    low: np.ndarray
    high: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True)
class Int8Plan:
    """What is smoothed and rounded; `largest` is each product's largest input by magnitude, once smoothed."""

    smoothing: dict[Group, np.ndarray]
    largest: dict[str, float]
    record: VisionQuantization

    def view(self, checkpoint: Checkpoint) -> Checkpoint:
        """`checkpoint`, smoothed."""
        return SmoothedView(checkpoint, self.smoothing)

    def products(self, dialect: str) -> ProductFormat:
        """The products' format in the graph of `dialect`."""
        int8 = StaticInt8(self.largest) if dialect == "tensorrt" else DynamicInt8()
        return SomeInt8(int8, self.record.int8)


def calibrate_vision(
    config: CheckpointConfig,
    checkpoint: Checkpoint,
    settings: Settings,
    images: Sequence[ImageLike],
    folder: Path,
    *,
    fold: bool = True,
    progress: Progress | None = None,
) -> Int8Plan:
    """Run the float32 graph on `images` and decide. It is written to `folder` for the time of the run.

    Of the progress, writing the graph is one step, and each image another.
    """
    observed, steps = ObservedProducts(), 1 + len(images)
    with tempfile.TemporaryDirectory(prefix=".observed.", dir=folder) as temporary:
        path = Path(temporary) / VISION
        emit_vision(config, checkpoint, path, fold=fold, products=observed)
        tell = progress or (lambda done, total: None)
        seen = _observe(path, config, settings, images, lambda done, _: tell(1 + done, steps))
    smoothable = {group.product: group for group in groups(config.vision)}
    smoothing: dict[Group, np.ndarray] = {}
    largest: dict[str, float] = {}
    int8: dict[str, float] = {}
    dense: dict[str, float] = {}
    for name, product in observed.products.items():
        group = smoothable.get(name)
        error, factor = least_error(seen[name], product, group is not None)
        largest[name] = float((np.maximum(abs(seen[name].low), abs(seen[name].high)) / factor).max())
        if error > LIMIT:
            dense[name] = error
            continue
        int8[name] = error
        if group is not None:
            smoothing[group] = factor
    return Int8Plan(smoothing, largest, VisionQuantization(int8, dense, len(images)))


def least_error(seen: Seen, product: Product, smoothable: bool) -> tuple[float, np.ndarray]:
    """The least error of what is used of a product, and the factors (inputs,) that leave it."""
    weight, activations = product.weight(), np.maximum(abs(seen.low), abs(seen.high))
    bias, used = (product.bias(), lengths) if product.length_only else (0.0, np.asarray)
    exact = used(seen.rows @ weight + bias)
    best = (float("inf"), np.ones(len(weight), np.float32))
    for strength in _STRENGTHS if smoothable else (0.0,):
        factor = factors(activations, weight, strength) if strength else best[1]
        rounded = rounded_product(
            seen.rows / factor, seen.low / factor, seen.high / factor, weight * factor[:, None]
        )
        error = relative_error(used(rounded + bias), exact)
        if error < best[0]:
            best = error, factor
    return best


def _observe(
    path: Path, config: CheckpointConfig, settings: Settings, images: Sequence[ImageLike], progress: Progress
) -> dict[str, Seen]:
    seen: dict[str, Seen] = {}
    with OrtEngine(path) as engine:
        encoder = VisionEncoder(engine, config.model, roi_rounding=settings.roi_rounding)
        for done, image in enumerate(images):
            progress(done, len(images))
            planned = plan_image(open_image(image), settings, config.model)
            for crop in cut(planned.image, planned.plan):
                for _, feeds in encoder.batches([crop], settings.grid_mode):
                    for name, values in _by_product(engine.infer(feeds)):
                        _merge(seen, name, values)
    return seen


def _by_product(outputs: dict[str, np.ndarray]) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    found: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for output, value in outputs.items():
        name, _, part = output.rpartition("/")
        if name:
            found[name][part] = value
    yield from found.items()


def _merge(seen: dict[str, Seen], name: str, values: dict[str, np.ndarray]) -> None:
    if name not in seen:
        seen[name] = Seen(values[LOW], values[HIGH], values[ROWS][:_MOST_ROWS])
        return
    old = seen[name]
    old.low, old.high = np.minimum(old.low, values[LOW]), np.maximum(old.high, values[HIGH])
    room = _MOST_ROWS - len(old.rows)
    if room > 0:
        old.rows = np.concatenate([old.rows, values[ROWS][:room]])
