"""A bundle that serves many callers: what every door, be it HTTP or a file of questions, goes through."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from PIL import Image

from uhd_export.runtime.bundle.manifest import EMBEDDINGS, TOKENIZER, Manifest, read_manifest
from uhd_export.runtime.bundle.opening import open_engines
from uhd_export.runtime.bundle.probe import check_device
from uhd_export.runtime.engines.backends import default_device
from uhd_export.runtime.engines.base import Engine
from uhd_export.runtime.engines.device import parse_device
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.encoder import VisionEncoder
from uhd_export.runtime.language.embeddings import EmbeddingTable
from uhd_export.runtime.language.prompt import load_tokenizer
from uhd_export.runtime.language.sequence import PromptSequence
from uhd_export.runtime.memory import available_memory
from uhd_export.runtime.pipeline import KEEP, Pipeline, configured
from uhd_export.runtime.planning.bundle import bundle_weights, fitting_bounds
from uhd_export.runtime.planning.memory import Bounds
from uhd_export.runtime.serving.cache.rows import Rows
from uhd_export.runtime.serving.dialogue import Message, dialogue_ids
from uhd_export.runtime.serving.images.cutting import CutImage, ImageCutter
from uhd_export.runtime.serving.images.encoded import EncodedImages
from uhd_export.runtime.serving.images.worker import VisionWorker
from uhd_export.runtime.serving.memory import MemoryPlan, plan_memory
from uhd_export.runtime.serving.sampling.choice import Choosing
from uhd_export.runtime.serving.sampling.grammar import Grammar, Grammars
from uhd_export.runtime.serving.scheduling.request import AnswerStream, Request
from uhd_export.runtime.serving.scheduling.scheduler import Limits, Scheduler
from uhd_export.runtime.settings import Settings

# Positions that a device's check has room for: a question about one crop, see `probe`.
_CHECKED = 512


@dataclasses.dataclass(frozen=True)
class ServiceOptions:
    """`slots` answers at a time, each with room for `context` positions (default: the bundle's);
    `image_cache` bytes of encoded images are kept.
    """

    slots: int = 4
    context: int | None = None
    image_cache: int = 256 << 20
    limits: Limits = dataclasses.field(default_factory=Limits)

    def __post_init__(self) -> None:
        """Raise UhdError naming a field that is out of range."""
        if self.slots < 1:
            raise UhdError(f"slots: {self.slots} is out of range; use 1 or more")
        if self.image_cache < 0:
            raise UhdError(f"image cache: {self.image_cache} is out of range; use 0 or more bytes")

    def memory(self, manifest: Manifest) -> MemoryPlan:
        """What a service of the bundle reserves; a larger context than the bundle's is refused elsewhere."""
        most = manifest.settings.context
        return plan_memory(
            manifest.model,
            np.dtype(manifest.precision.cache),
            slots=self.slots,
            context=min(self.context or most, most),
            encoded=self.image_cache,
            waiting=self.limits.crop_bytes,
        )

    def check(self, manifest: Manifest, kind: str) -> None:
        """Raise UhdError where a processor cannot hold it; what a GPU has left, its engines know."""
        if kind == "cpu":
            self.memory(manifest).check(_beside_weights(manifest))

    def beside(self, manifest: Manifest) -> int:
        """What it reserves beside one answer, which has one slot's cache."""
        plan = self.memory(manifest)
        return plan.total - plan.cache // self.slots


class Service:
    """Open one with `Service.open`; use it as a context manager or `close` it. Any thread may call it."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        settings: Settings,
        engines: tuple[Engine, Engine],
        options: ServiceOptions,
        check: Callable[[], None] = lambda: None,
        bounds: Bounds | None = None,
    ) -> None:
        vision, language = engines
        self.manifest, self.settings, self.options = manifest, settings, options
        self._engines, self._check = engines, check
        self.context = options.context or settings.context
        self.memory = options.memory(manifest)
        self.tokenizer = load_tokenizer(folder / TOKENIZER)
        self.encoded = EncodedImages(options.image_cache)
        self._cutter = ImageCutter(manifest.model, settings, self.encoded)
        encoder = VisionEncoder(vision, manifest.model, roi_rounding=settings.roi_rounding)
        bounds = bounds or Bounds()
        if bounds.rows is not None:
            encoder.rows = bounds.rows
        rows = Rows(language, options.slots, self.context)
        self._grammars = Grammars(self.tokenizer, rows.vocab, manifest.model.language.eos)
        self.scheduler = Scheduler(
            rows,
            language,
            lambda on_done: VisionWorker(encoder, on_done),
            EmbeddingTable(folder / EMBEDDINGS),
            self.tokenizer,
            manifest.model.language.eos,
            encoded=self.encoded,
            limits=options.limits.bounded(bounds.chunk),
        )

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        options: ServiceOptions | None = None,
        *,
        device: str | None = None,
        threads: int | None = None,
        slicing: Mapping[str, Any] | None = None,
    ) -> Self:
        """Open the bundle in folder `bundle`, as `Pipeline.open` does.

        `slicing` has `grid_mode`, `max_slices`, `resize` and `template` in place of the bundle's. Raises
        UhdError where it cannot be trusted, run or held.
        """
        folder, options = Path(bundle), options or ServiceOptions()
        manifest = read_manifest(folder)
        most = manifest.settings.context
        if options.context is not None and not 1 <= options.context <= most:
            raise UhdError(
                f"context {options.context}: must be 1 to {most}, the positions this bundle was built for"
            )
        slicing = slicing or {}
        settings = configured(
            manifest.settings,
            slicing.get("grid_mode"),
            slicing.get("max_slices"),
            slicing.get("resize", KEEP),
            slicing.get("template"),
        )
        place = parse_device(device or default_device(manifest.backend))
        # Both before the weights take their share.
        options.check(manifest, place.kind)
        bounds = fitting_bounds(manifest, str(place), settings, options.context)
        vision, language, files = open_engines(folder, manifest, device=device, threads=threads)
        try:
            if place.kind != "cpu":
                _check_numbers(folder, manifest, vision, language)
            return cls(folder, manifest, settings, (vision, language), options, files.check, bounds)
        except BaseException:
            vision.close()
            language.close()
            raise

    def cut(self, image: Image.Image) -> CutImage:
        """An RGB `image` cut, its pixels dropped. Raises UhdError where it cannot be."""
        return self._cutter.cut(image)

    def token_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a dialogue, -200 where an image goes."""
        return dialogue_ids(self.tokenizer, self.settings.template, messages)

    def json_schema(self, schema: dict[str, Any]) -> Grammar:
        """What an answer that follows `schema` may be."""
        return self._grammars.json_schema(schema)

    def prepare(
        self,
        messages: Sequence[Message],
        images: Sequence[Image.Image | CutImage] = (),
        *,
        max_tokens: int | None = None,
        choosing: Choosing | None = None,
        stop: Sequence[str] = (),
        grammar: Grammar | None = None,
        seconds: float | None = None,
        caller: str = "",
    ) -> Request:
        """A request about RGB `images`, cut here where they are not yet, and checked.

        Raises UhdError naming what cannot be answered.
        """
        if max_tokens is not None and max_tokens < 1:
            raise UhdError(f"max_tokens: {max_tokens} is out of range; use 1 or more")
        if seconds is not None and not seconds >= 0:  # what is no number neither
            raise UhdError(f"seconds: {seconds} is out of range; use 0 or more")
        ids = self.token_ids(messages)
        cut = tuple(image if isinstance(image, CutImage) else self.cut(image) for image in images)
        sequence = PromptSequence(ids, [image.planned for image in cut])
        if len(sequence) > self.context:
            raise UhdError(
                f"messages: {len(sequence)} positions are more than the context of {self.context}; shorten "
                "them, or send fewer or smaller images"
            )
        limit = self.settings.prompt_limit
        if limit is not None and len(sequence) > limit:
            raise UhdError(
                f"messages: {len(sequence)} positions are more than tokenizer_model_max_length {limit}, "
                "where the released code cuts them; shorten them, or send fewer or smaller images"
            )
        return Request(
            sequence,
            cut,
            max_tokens,
            choosing or Choosing(self.settings.sampling),
            tuple(stop),
            grammar,
            seconds,
            caller,
            sum(image.seconds for image in cut),
        )

    def submit(self, request: Request) -> AnswerStream:
        """Ask for an answer. Raises Busy where too many wait, Closed when the service ends, UhdError
        where a file of the bundle was changed meanwhile.
        """
        self._check()
        return self.scheduler.submit(request)

    def close(self, grace: float = 0.0) -> None:
        """Take no more, give what is under way `grace` seconds, and free both engines."""
        self.scheduler.close(grace)
        for engine in self._engines:
            engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_numbers(folder: Path, manifest: Manifest, vision: Engine, language: Engine) -> None:
    """Ask a device that is new to the bundle for its logits; the cache that this takes is gone afterwards."""
    context = min(manifest.settings.context, _CHECKED)
    pipeline = Pipeline(folder, manifest, vision, language, context=context)
    check_device(folder, manifest, pipeline.generator, language.where)


def _beside_weights(manifest: Manifest) -> int | None:
    """Bytes that the processor's memory has beside the weights, which are yet to be loaded."""
    available = available_memory()
    return None if available is None else max(available - bundle_weights(manifest, "cpu").resident, 0)
