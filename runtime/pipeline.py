"""The pipeline: a bundle opened, with images and questions in and text out."""

import dataclasses
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from uhd_export.runtime.bundle.manifest import EMBEDDINGS, TOKENIZER, Manifest, read_manifest
from uhd_export.runtime.bundle.opening import open_engines
from uhd_export.runtime.bundle.probe import check_device
from uhd_export.runtime.choices import GRID_MODES, TEMPLATE_ALIASES, TEMPLATES
from uhd_export.runtime.conversation import Conversation
from uhd_export.runtime.engines.backends import default_device
from uhd_export.runtime.engines.base import Engine
from uhd_export.runtime.engines.device import parse_device
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.encoder import VisionEncoder
from uhd_export.runtime.image.pixels import cut
from uhd_export.runtime.image.slicing import SlicePlan, plan_slices
from uhd_export.runtime.image.source import ImageLike, Images, as_images, open_image
from uhd_export.runtime.language import prompt as prompts
from uhd_export.runtime.language.answer import Answer
from uhd_export.runtime.language.embeddings import EmbeddingTable
from uhd_export.runtime.language.encoded_images import EncodedImages
from uhd_export.runtime.language.generation import TextGenerator
from uhd_export.runtime.language.sequence import PlannedImage, PromptSequence, plan_image
from uhd_export.runtime.memory import return_memory
from uhd_export.runtime.planning.bundle import fitting_bounds
from uhd_export.runtime.settings import Sampling, Settings
from uhd_export.runtime.stopwatch import Stopwatch
from uhd_export.runtime.turns import Turns


class Keep(Enum):
    """Stands for "as it is" where None has a meaning."""

    KEEP = "as it is"

    def __repr__(self) -> str:
        return self.name


KEEP = Keep.KEEP


class AnswerOptions(TypedDict, total=False):
    """The keywords of `Pipeline.generate`."""

    max_new_tokens: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    markup: bool


class Pipeline:
    """A bundle ready to answer. Open one with `Pipeline.open`; use it as a context manager or `close` it.

    Threads may share one: its key-value cache holds one prompt, so they take turns. An answer that is being
    read keeps its turn until it is finished or closed; a thread that asks anew ends its own earlier answer.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        vision: Engine,
        language: Engine,
        *,
        context: int,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.manifest, self.settings = folder, manifest, manifest.settings
        self.vision, self.language = vision, language
        self._turns = Turns(check)
        self.encoder = VisionEncoder(vision, manifest.model, roi_rounding=manifest.settings.roi_rounding)
        table = EmbeddingTable(folder / EMBEDDINGS)
        self.images = EncodedImages(self.encoder, language, table)
        self.generator = TextGenerator(
            language,
            self.images,
            table,
            prompts.load_tokenizer(folder / TOKENIZER),
            self._turns,
            context=context,
            most=manifest.settings.context,
            eos=manifest.model.language.eos,
        )
        self.generator.sampling = manifest.settings.sampling
        self.generator.prompt_limit = manifest.settings.prompt_limit

    @classmethod
    def open(
        cls,
        bundle: str | Path,
        *,
        device: str | None = None,
        threads: int | None = None,
        context: int | None = None,
        grid_mode: str | None = None,
        max_slices: int | None = None,
        resize: int | Keep | None = KEEP,
        template: str | None = None,
    ) -> Self:
        """Open the bundle in folder `bundle` on `device`, "cpu", "cuda" or "cuda:1" (default: its backend's).

        `threads` limits the CPU threads. `context` is the number of positions of the key-value cache, by
        default and at most the bundle's. `grid_mode`, `max_slices`, `resize` and `template` replace the
        bundle's defaults (see `configure`). Every file's SHA-256 is verified first, of those over 256 MiB
        once: it is remembered until they change; on a GPU that has not run it before, the logits of a short
        prompt too. Where the memory available asks for it, fewer crops and positions run at once. Raises
        UhdError where the bundle cannot be trusted or run.
        """
        folder = Path(bundle)
        manifest = read_manifest(folder)
        most = manifest.settings.context
        if context is not None and not 1 <= context <= most:
            raise UhdError(f"context {context}: must be 1 to {most}, the positions this bundle was built for")
        run = configured(manifest.settings, grid_mode, max_slices, resize, template)
        place = parse_device(device or default_device(manifest.backend))
        bounds = fitting_bounds(manifest, str(place), run, context)  # before the weights take their share
        vision, language, files = open_engines(folder, manifest, device=device, threads=threads)
        try:
            pipeline = cls(folder, manifest, vision, language, context=context or most, check=files.check)
        except BaseException:
            vision.close()
            language.close()
            raise
        pipeline.settings = run
        pipeline.generator.prefix.chunk = bounds.chunk
        if bounds.rows is not None:
            pipeline.encoder.rows = bounds.rows
        if place.kind != "cpu":
            try:
                check_device(folder, manifest, pipeline.generator, language.where)
            except BaseException:
                pipeline.close()
                raise
        return pipeline

    def configure(
        self,
        *,
        grid_mode: str | None = None,
        max_slices: int | None = None,
        resize: int | Keep | None = KEEP,
        template: str | None = None,
    ) -> None:
        """Change how the next images are cut, or questions put.

        Grid mode, most slices (1: overview only), longest side; the conversation template.
        """
        with self._turns.call(ends_answer=False):
            self.settings = configured(self.settings, grid_mode, max_slices, resize, template)

    def plan(self, image: Image.Image) -> SlicePlan:
        """How an RGB `image` is cut."""
        return self.plan_image(image).plan

    def plan_image(self, image: ImageLike) -> PlannedImage:
        """`image`, opened and planned. Raises UhdError where it cannot be read or cut."""
        self._turns.check()
        return plan_image(open_image(image), self.settings, self.manifest.model)

    def encode_image(self, image: ImageLike) -> list[NDArray[Any]]:
        """One float32 (tokens, D) array a crop: slices first, row by row, the overview last."""
        planned = self.plan_image(image)
        with self._turns.call(ends_answer=False):
            return self.encoder.encode(cut(planned.image, planned.plan), planned.grid_mode)

    def input_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of `prompt`, -200 where an image goes."""
        self._turns.check()
        return prompts.encode(self.generator.tokenizer, prompt)

    def sequence(self, image: Images, prompt: str | Sequence[int]) -> PromptSequence:
        """The positions of `prompt` with its images. Raises UhdError where they exceed the context."""
        images = [self.plan_image(each) for each in as_images(image)]
        return self.generator.sequence(self.input_ids(prompt), images)

    def inputs_embeds(self, image: Images, prompt: str | Sequence[int]) -> NDArray[Any]:
        """float32 (1, S, D) embeddings of `prompt` with each image's tokens and separators in place."""
        sequence = self.sequence(image, prompt)
        with self._turns.call(ends_answer=False):
            embeds = self.language.fetch(self.generator.embeds(sequence))
            return embeds.astype(np.float32, copy=False)[None]

    def logits(self, image: Images, prompt: str | Sequence[int]) -> NDArray[Any]:
        """float32 (1, vocab) logits of the last position."""
        sequence = self.sequence(image, prompt)
        with self._turns.call():
            return self.generator.prefill(sequence)[None]

    def generate_ids(
        self,
        image: Images,
        prompt: str | Sequence[int],
        max_new_tokens: int,
        sampling: Sampling | None = None,
    ) -> list[int]:
        """Continuation of `prompt`, by `settings.sampling` by default; an end-of-text token is included."""
        return list(self.generator.tokens(self.sequence(image, prompt), max_new_tokens, sampling))

    def generate(
        self,
        image: Images,
        question: str,
        *,
        max_new_tokens: int = 256,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        markup: bool = False,
    ) -> Answer:
        """The answer to `question` in the bundle's prompt template, in pieces as they are generated.

        Greedy at temperature 0; what is None is as the checkpoint's generation_config says, greedy where it
        says nothing. The image and the options are checked at once, the rest runs while the
        answer is read. What the prompt shares with the previous one is not computed again. The question is
        text; with `markup`, the `<image>` and control tokens that it spells out count.
        """
        watch, images = Stopwatch(), as_images(image)
        prompts.check_text(question, "question")
        template, tokenizer = self.settings.template, self.generator.tokenizer
        prompt: str | list[int] = prompts.render(question, template, len(images))
        if not markup:
            prompt = prompts.encode_question(tokenizer, question, template, len(images))
        sampling = self.settings.sampling.changed(
            temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
        )
        with watch.stage("image"):
            sequence = self.sequence(images, prompt)
        return self.generator.answer(sequence, max_new_tokens, sampling, watch)

    def answer(self, image: Images, question: str, **options: Unpack[AnswerOptions]) -> str:
        """The whole answer to `question` as one text; options as of `generate`."""
        return "".join(self.generate(image, question, **options))

    def converse(self, image: Images) -> Conversation:
        """A conversation about one or several images, each question following the last answer."""
        images = [self.plan_image(each) for each in as_images(image)]
        return Conversation(self.generator, images, self.settings.template)

    def forget(self) -> None:
        """Drop the key-value cache's content and the encoded images."""
        with self._turns.call():
            self.generator.prefix.forget()
            self.images.clear()
            return_memory()

    def close(self) -> None:
        """Free both engines once what runs has ended; an unfinished answer cannot go on. May be repeated."""
        with self._turns.closing() as first:
            if first:
                self.vision.close()
                self.language.close()
                self.images.clear()
                return_memory()

    def __repr__(self) -> str:
        state = "closed" if self._turns.closed else f"context {self.generator.decoder.context}"
        return f"<Pipeline {self.folder}: {self.manifest.backend}, {state}>"

    def __enter__(self) -> Self:
        self._turns.check()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def configured(
    settings: Settings,
    grid_mode: str | None,
    max_slices: int | None,
    resize: int | Keep | None,
    template: str | None = None,
) -> Settings:
    """`settings` with what is given in its place. Raises UhdError where it is out of range."""
    if grid_mode is not None and grid_mode not in GRID_MODES:
        raise UhdError(f"grid mode {grid_mode!r}: must be one of {', '.join(GRID_MODES)}")
    template = None if template is None else TEMPLATE_ALIASES.get(template, template)
    if template is not None and template not in TEMPLATES:
        raise UhdError(f"template {template!r}: must be one of {', '.join(TEMPLATES)}")
    changes: dict[str, Any] = {"grid_mode": grid_mode, "max_slices": max_slices, "template": template}
    changes = {name: value for name, value in changes.items() if value is not None}
    if not isinstance(resize, Keep):
        changes["resize"] = resize
    settings = dataclasses.replace(settings, **changes)
    plan_slices((1, 1), max_slices=settings.max_slices, resize=settings.resize)  # refuses the other two
    return settings


def open_chunked(bundle: str | Path, *, prefill_chunk: int | None = None, **opening: Any) -> Pipeline:
    """As `Pipeline.open`, and prompts run `prefill_chunk` positions at a time (None: as many as suit it)."""
    pipeline = Pipeline.open(bundle, **opening)
    if prefill_chunk is not None:
        pipeline.generator.prefix.chunk = prefill_chunk
    return pipeline
