"""The vision part of a bundle: crops in, tokens out, equal crops in one batch."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uhd_export.runtime.config import ModelConfig
from uhd_export.runtime.engines.base import Array, Engine, Stop
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.pixels import normalise_batch
from uhd_export.runtime.stopwatch import Stopwatch

PIXELS, TOKENS = "pixels", "tokens"
# The largest batch of crops: nine slices and an overview, as the engines' optimization profiles allow.
MAX_BATCH = 10
# Of a processor: more patches a run take memory, and are not faster. Two crops of 336x336.
ENOUGH_ROWS = 1200
# Shapes whose geometry is kept: half a megabyte each on the device, three where a crop is narrow.
_SHAPES = 16


def batch_size(grid: tuple[int, int], rows: int | None) -> int:
    """How many crops of `grid` patches run at once: as many as have `rows` patches, or one; None is all."""
    return MAX_BATCH if rows is None else min(max(rows // (grid[0] * grid[1]), 1), MAX_BATCH)


class VisionEncoder:
    """Runs the vision engine on crops of any shape.

    Geometry is computed once a shape and grid mode, and stays on the engine's device for the last few.
    """

    def __init__(self, engine: Engine, model: ModelConfig, *, roi_rounding: str = "exact") -> None:
        self.engine = engine
        self.rows = ENOUGH_ROWS if engine.on_host else None
        """Patches a run at most, see `batch_size`."""
        self._model, self._roi_rounding = model, roi_rounding
        self._names = engine.inputs.keys() - {PIXELS}
        self._dtype = engine.inputs[PIXELS].dtype
        self.geometry = lru_cache(maxsize=_SHAPES)(self._geometry)

    def encode(self, crops: Sequence[NDArray[Any]], grid_mode: str) -> list[NDArray[Any]]:
        """One float32 (tokens, D) array for each uint8 (h, w, 3) crop; sides are multiples of the patch.

        Crops of one shape run as one batch. `grid_mode` is the grid mode of the windows.
        Raises UhdError where a crop's shape has no geometry.
        """
        return [
            self.engine.fetch(tokens).astype(np.float32, copy=False)
            for tokens in self.encode_resident(crops, grid_mode)
        ]

    def encode_resident(
        self,
        crops: Sequence[NDArray[Any]],
        grid_mode: str,
        watch: Stopwatch | None = None,
        stop: Stop | None = None,
    ) -> list[Array]:
        """As `encode`, in the engine's own type and left on its device; `watch` counts the time.

        Raises Stopped where `stop` ended it.
        """
        watch = watch or Stopwatch()
        tokens: dict[int, Array] = {}
        batches = self.batches(crops, grid_mode)
        while True:
            with watch.stage("image"):
                batch = next(batches, None)
            if batch is None:
                self.engine.trim()
                return [tokens[index] for index in range(len(crops))]
            members, feeds = batch
            with watch.stage("vision"):
                results = self.engine.infer_resident(feeds, stop)[TOKENS]
                tokens |= zip(members, results, strict=True)

    def batches(
        self, crops: Sequence[NDArray[Any]], grid_mode: str
    ) -> Iterator[tuple[list[int], dict[str, Array]]]:
        """The engine's runs for `crops`: which of them, and the inputs, each made when it is due."""
        by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, crop in enumerate(crops):
            by_shape[(crop.shape[0], crop.shape[1])].append(index)
        for shape, members in by_shape.items():
            size = self.batch_size(shape)
            for start in range(0, len(members), size):
                batch = members[start : start + size]
                yield batch, self.feeds(self.pixels([crops[i] for i in batch]), grid_mode)

    def batch_size(self, shape: tuple[int, ...]) -> int:
        """How many crops of `shape`, (h, w, ...), run at once."""
        patch = self._model.vision.patch
        return batch_size((shape[0] // patch, shape[1] // patch), self.rows)

    def pixels(self, crops: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Equal uint8 (h, w, 3) crops as the engine takes them, (B, 3, h, w)."""
        return normalise_batch(crops, self._dtype, self.engine.staging)

    def feeds(self, pixels: NDArray[Any], grid_mode: str) -> dict[str, Array]:
        """The engine's inputs for normalised (B, 3, h, w) pixels of equal crops."""
        patch = self._model.vision.patch
        rows, cols = pixels.shape[2] // patch, pixels.shape[3] // patch
        return {PIXELS: pixels.astype(self._dtype, copy=False), **self.geometry(rows, cols, grid_mode)}

    def _geometry(self, rows: int, cols: int, grid_mode: str) -> dict[str, Array]:
        available = self._model.geometry(rows, cols, grid_mode=grid_mode, roi_rounding=self._roi_rounding)
        unknown = sorted(self._names - available.keys())
        if unknown:
            raise UhdError(f"vision engine: unknown inputs {', '.join(unknown)}; build the bundle again")
        inputs = self.engine.inputs
        matrices = {name: available[name].astype(inputs[name].dtype, copy=False) for name in self._names}
        return {name: self.engine.keep(matrix) for name, matrix in matrices.items()}
