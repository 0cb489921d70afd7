"""A thread that encodes images: equal crops of different requests share a run."""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from uhd_export.runtime.engines.base import Array, Stop, Stopped
from uhd_export.runtime.image.encoder import TOKENS, VisionEncoder
from uhd_export.runtime.serving.images.cutting import CutImage

log = logging.getLogger(__name__)


class Encoding:
    """An image being encoded, for all who wait for it: `tokens` by crop when it is done, or `error`."""

    def __init__(self, image: CutImage) -> None:
        self.image = image
        self.tokens: dict[int, Array] = {}
        self.error: Exception | None = None
        self.done = False
        self.seconds = 0.0
        self.waiting = 0

    @property
    def missing(self) -> list[int]:
        """Crops that are still to be run."""
        return [index for index in range(len(self.image.crops)) if index not in self.tokens]


class VisionWorker:
    """Runs the vision engine in a thread of its own, beside the language engine's.

    `on_done` is called there after each image. `runs` and `crops` count what the engine did.
    """

    def __init__(self, encoder: VisionEncoder, on_done: Callable[[], None]) -> None:
        self._encoder, self._on_done = encoder, on_done
        self._waiting: OrderedDict[str, Encoding] = OrderedDict()
        self._changed = threading.Condition()
        self._current: tuple[Stop, list[Encoding]] | None = None
        self._closing = False
        self.runs = self.crops = 0
        self._thread = threading.Thread(target=self._loop, name="uhd-vision", daemon=True)
        self._thread.start()

    def encode(self, image: CutImage) -> Encoding:
        """Ask for `image`; one that is being encoded already is not encoded twice."""
        with self._changed:
            digest = image.planned.digest
            if digest not in self._waiting:
                self._waiting[digest] = Encoding(image)
            encoding = self._waiting[digest]
            encoding.waiting += 1
            self._changed.notify_all()
            return encoding

    def release(self, encoding: Encoding) -> None:
        """One who waited for `encoding` does so no more; a run that nobody wants is ended."""
        with self._changed:
            encoding.waiting -= 1
            if encoding.waiting == 0 and not encoding.done:
                self._waiting.pop(encoding.image.planned.digest, None)
                if self._current and all(e.waiting == 0 for e in self._current[1]):
                    self._current[0].request()

    def close(self) -> None:
        """End the thread, and the run in it."""
        with self._changed:
            self._closing = True
            if self._current:
                self._current[0].request()
            self._changed.notify_all()
        self._thread.join()

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._waiting)
                if self._closing:
                    return
                batch, grid_mode = self._next_batch()
                stop = Stop()
                self._current = (stop, [encoding for encoding, _ in batch])
            error: Exception | None = None
            results: list[Array] = []
            start = time.perf_counter()
            try:
                pixels = self._encoder.pixels([encoding.image.crops[index] for encoding, index in batch])
                feeds = self._encoder.feeds(pixels, grid_mode)
                results = list(self._encoder.engine.infer_resident(feeds, stop)[TOKENS])
            except Stopped:
                continue
            except Exception as failure:  # told to those who wait; the thread goes on
                log.exception("vision")
                error = failure
            finally:
                with self._changed:
                    self._current = None
            self.runs += 1
            self.crops += len(batch)
            self._deliver(batch, results, error, time.perf_counter() - start)
            if not self._waiting:
                self._encoder.engine.trim()

    def _next_batch(self) -> tuple[list[tuple[Encoding, int]], str]:
        """Crops of one shape and grid mode: those of who came first, filled up with others' equal ones."""
        first = next(iter(self._waiting.values()))
        kind = _kind(first, first.missing[0])
        equal = (
            (encoding, index)
            for encoding in self._waiting.values()
            for index in encoding.missing
            if _kind(encoding, index) == kind
        )
        most = self._encoder.batch_size(kind[0])
        return [pair for pair, _ in zip(equal, range(most), strict=False)], kind[1]

    def _deliver(
        self, batch: list[tuple[Encoding, int]], results: list[Array], error: Exception | None, seconds: float
    ) -> None:
        with self._changed:
            for number, (encoding, index) in enumerate(batch):
                encoding.seconds += seconds / len(batch)
                if error is not None:
                    encoding.error = error
                else:
                    encoding.tokens[index] = results[number]
            for encoding in {id(encoding): encoding for encoding, _ in batch}.values():
                if encoding.error is not None or not encoding.missing:
                    encoding.done = True
                    if self._waiting.get(encoding.image.planned.digest) is encoding:
                        del self._waiting[encoding.image.planned.digest]
        self._on_done()


def _kind(encoding: Encoding, index: int) -> tuple[tuple[int, ...], str]:
    return encoding.image.crops[index].shape, encoding.image.planned.grid_mode
