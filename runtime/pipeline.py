"""The pipeline: a bundle opened, with images and questions in and text out."""

import dataclasses
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from PIL import Image

from uhd_export.runtime.bundle.integrity import verify_files
from uhd_export.runtime.bundle.manifest import EMBEDDINGS, TOKENIZER, Manifest, part_files, read_manifest
from uhd_export.runtime.conversation import Conversation
from uhd_export.runtime.engines.backends import open_engine
from uhd_export.runtime.engines.base import Array, Engine
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.encoder import VisionEncoder
from uhd_export.runtime.image.geometry import GRID_MODES
from uhd_export.runtime.image.pixels import cut, open_image
from uhd_export.runtime.image.slicing import SlicePlan, plan_slices
from uhd_export.runtime.language import prompt as prompts
from uhd_export.runtime.language.decoder import EMBEDS, Decoder
from uhd_export.runtime.language.detokenizer import Detokenizer
from uhd_export.runtime.language.embeddings import EmbeddingTable
from uhd_export.runtime.language.prefix_cache import PrefixCache
from uhd_export.runtime.language.sampling import Sampling, sample
from uhd_export.runtime.language.sequence import PlannedImage, PromptSequence, place, plan_image
from uhd_export.runtime.settings import Settings

ImageLike = str | Path | Image.Image | np.ndarray
Images = ImageLike | Sequence[ImageLike]
KEEP: Any = object()
"""Stands for "as it is" where None has a meaning."""
_IMAGES_KEPT = 4


class Pipeline:
    """A bundle ready to answer. Open one with `Pipeline.open`; use it as a context manager or `close` it.

    One pipeline serves one caller at a time: its key-value cache holds one prompt.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, vision: Engine, language: Engine, *, context: int
    ) -> None:
        self.folder, self.manifest, self.settings = folder, manifest, manifest.settings
        self.vision, self.language = vision, language
        self.encoder = VisionEncoder(vision, manifest.model, roi_rounding=manifest.settings.roi_rounding)
        self.decoder = PrefixCache(Decoder(language, context))
        self.embeddings = EmbeddingTable(folder / EMBEDDINGS)
        self.tokenizer = prompts.load_tokenizer(folder / TOKENIZER)
        self.finish = ""
        """Why the last answer ended: "stop", "length" (max_new_tokens) or "context" (cache full)."""
        self._encoded: OrderedDict[str, Array] = OrderedDict()
        self._turn = 0

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
        resize: int | None = KEEP,
    ) -> Self:
        """Open the bundle in folder `bundle` on `device`, "cpu" or "cuda" (default: as its backend does).

        `threads` limits the CPU threads. `context` is the number of positions of the key-value cache, by
        default and at most the bundle's. `grid_mode`, `max_slices` and `resize` replace the bundle's defaults
        (see `configure`). Every file's size, and the SHA-256 of files up to 256 MiB, are verified first.
        Raises UhdError where the bundle cannot be trusted or run.
        """
        folder = Path(bundle)
        manifest = read_manifest(folder)
        verify_files(folder, manifest)
        most = manifest.settings.context
        if context is not None and not 1 <= context <= most:
            raise UhdError(f"context {context}: must be 1 to {most}, the positions this bundle was built for")
        run = _configured(manifest.settings, grid_mode, max_slices, resize)
        vision, language = (
            open_engine(folder / name, manifest.backend, device=device, threads=threads)
            for name in part_files(manifest.backend)
        )
        pipeline = cls(folder, manifest, vision, language, context=context or most)
        pipeline.settings = run
        return pipeline

    def configure(
        self, *, grid_mode: str | None = None, max_slices: int | None = None, resize: int | None = KEEP
    ) -> None:
        """Change how the next images are cut: grid mode, most slices (1: overview only), longest side."""
        self.settings = _configured(self.settings, grid_mode, max_slices, resize)

    def plan(self, image: Image.Image) -> SlicePlan:
        """How an RGB `image` is cut."""
        return self.plan_image(image).plan

    def plan_image(self, image: ImageLike) -> PlannedImage:
        """`image`, opened and planned. Raises UhdError where it cannot be read or cut."""
        model = self.manifest.model
        return plan_image(
            open_image(image), self.settings, side=model.projector.side, patch=model.vision.patch
        )

    def encode_image(self, image: ImageLike) -> list[np.ndarray]:
        """One float32 (tokens, D) array a crop: slices first, row by row, the overview last."""
        planned = self.plan_image(image)
        return self.encoder.encode(cut(planned.image, planned.plan), planned.grid_mode)

    def input_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of `prompt`, -200 where an image goes."""
        return prompts.encode(self.tokenizer, prompt)

    def sequence(self, image: Images, prompt: str | Sequence[int]) -> PromptSequence:
        """The positions of `prompt` with its images. Raises UhdError where they exceed the context."""
        images = image if isinstance(image, (list, tuple)) else [image]
        return self.assemble(self.input_ids(prompt), [self.plan_image(i) for i in images])

    def assemble(self, ids: Sequence[int], images: Sequence[PlannedImage]) -> PromptSequence:
        """The positions of token `ids` with `images`. Raises UhdError where they exceed the context."""
        sequence = PromptSequence(ids, images)
        context = self.decoder.decoder.context
        if len(sequence) > context:
            raise UhdError(
                f"prompt: {len(sequence)} positions are more than the context of {context}; shorten the "
                f"prompt, lower --max-slices, or {self.larger_context(len(sequence))}"
            )
        return sequence

    def larger_context(self, positions: int) -> str:
        """What to do for a context of `positions`: the bundle may allow it."""
        most = self.settings.context
        return (
            f"give a larger --context, up to {most}" if positions <= most else "build with a larger --context"
        )

    def inputs_embeds(self, image: Images, prompt: str | Sequence[int]) -> np.ndarray:
        """float32 (1, S, D) embeddings of `prompt` with each image's tokens and separators in place."""
        embeds = self.language.fetch(self._embeds(self.sequence(image, prompt), 0))
        return embeds.astype(np.float32, copy=False)[None]

    def logits(self, image: Images, prompt: str | Sequence[int]) -> np.ndarray:
        """float32 (1, vocab) logits of the last position."""
        self._turn += 1
        return self.prefill(self.sequence(image, prompt))[None]

    def generate_ids(
        self,
        image: Images,
        prompt: str | Sequence[int],
        max_new_tokens: int,
        sampling: Sampling | None = None,
    ) -> list[int]:
        """Continuation of `prompt`, greedy by default; an end-of-text token ends it and is included."""
        return list(self.stream_ids(self.sequence(image, prompt), max_new_tokens, sampling))

    def generate(
        self,
        image: Images,
        question: str,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        """The answer to `question` in the bundle's prompt template, in pieces as they are generated.

        Greedy at temperature 0. The image and the options are checked at once, the rest runs while the
        answer is read. What the prompt shares with the previous one is not computed again.
        """
        images = image if isinstance(image, (list, tuple)) else [image]
        prompt = prompts.render(question, self.settings.template, len(images))
        sampling = Sampling(temperature, top_k, top_p, seed)
        sequence = self.sequence(images, prompt)
        return self.stream_text(self.stream_ids(sequence, max_new_tokens, sampling))

    def converse(self, image: Images) -> Conversation:
        """A conversation about one or several images, each question following the last answer."""
        return Conversation(self, list(image) if isinstance(image, (list, tuple)) else [image])

    def stream_ids(
        self, sequence: PromptSequence, max_new_tokens: int, sampling: Sampling | None = None
    ) -> Iterator[int]:
        """Tokens that continue `sequence`, until end of text, `max_new_tokens` or a full cache."""
        if max_new_tokens < 1:
            raise UhdError(f"max_new_tokens: {max_new_tokens} is out of range; use 1 or more")
        sampling = sampling or Sampling()
        return self._stream_ids(sequence, max_new_tokens, sampling)

    def stream_text(self, tokens: Iterator[int]) -> Iterator[str]:
        """Text of `tokens` as soon as it is certain, without the end-of-text token."""
        detokenizer, eos = Detokenizer(self.tokenizer), self.manifest.model.language.eos
        for token in tokens:
            if token not in eos and (text := detokenizer.push(token)):
                yield text
        if text := detokenizer.flush():
            yield text

    def prefill(self, sequence: PromptSequence) -> np.ndarray:
        """float32 (vocab,) logits after `sequence`, running only what the cache does not hold."""
        return self.decoder.prefill(sequence.keys, lambda start: self._embeds(sequence, start))

    def remember(self, planned: PlannedImage, crops: Sequence[Array]) -> Array:
        """(positions, D) embeddings of an image from its crops' tokens; the last few are kept.

        They lie where the language engine reads them, as `crops` may on its device.
        """
        separators = self.embeddings.rows(planned.tokens[planned.source < 0])
        out = self._gather(place(planned.source, crops, separators))
        self._encoded[planned.digest] = out
        if len(self._encoded) > _IMAGES_KEPT:
            self._encoded.popitem(last=False)
        return out

    def forget(self) -> None:
        """Drop the key-value cache's content and the encoded images."""
        self.decoder.forget()
        self._encoded.clear()

    def close(self) -> None:
        """Free both engines."""
        self.vision.close()
        self.language.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stream_ids(self, sequence: PromptSequence, max_new_tokens: int, sampling: Sampling) -> Iterator[int]:
        generator = sampling.generator()
        self._turn += 1
        turn, eos = self._turn, self.manifest.model.language.eos
        logits = self.prefill(sequence)
        for count in range(1, max_new_tokens + 1):
            token = sample(logits, sampling, generator)
            self.finish = "stop" if token in eos else "length"
            yield token
            if token in eos or count == max_new_tokens:
                return
            if turn != self._turn:
                raise UhdError("generation: another prompt was run meanwhile; finish an answer first")
            if not self.decoder.decoder.remaining:
                self.finish = "context"
                return
            logits = self.decoder.step(token, self.embeddings.rows([token])[0])

    def _gather(self, pieces: Sequence[Array]) -> Array:
        return self.language.gather(pieces, self.language.inputs[EMBEDS].dtype)

    def _embeds(self, sequence: PromptSequence, start: int) -> Array:
        """(S, D) embeddings from position `start` on; images before it are not encoded."""
        pieces = []
        for segment in sequence.segments:
            if segment.stop > start:
                content = segment.content
                rows = (
                    self._visual(content)
                    if isinstance(content, PlannedImage)
                    else self.embeddings.rows(content)
                )
                pieces.append(rows[max(start - segment.start, 0) :])
        return self._gather(pieces)

    def _visual(self, planned: PlannedImage) -> Array:
        """(positions, D) embeddings of an image, encoded unless they are kept."""
        if planned.digest in self._encoded:
            self._encoded.move_to_end(planned.digest)
            return self._encoded[planned.digest]
        crops = cut(planned.image, planned.plan)
        return self.remember(planned, self.encoder.encode_resident(crops, planned.grid_mode))


def _configured(
    settings: Settings, grid_mode: str | None, max_slices: int | None, resize: int | None
) -> Settings:
    """`settings` with what is given in its place. Raises UhdError where it is out of range."""
    if grid_mode is not None and grid_mode not in GRID_MODES:
        raise UhdError(f"grid mode {grid_mode!r}: must be one of {', '.join(GRID_MODES)}")
    changes: dict[str, Any] = {"grid_mode": grid_mode, "max_slices": max_slices}
    changes = {name: value for name, value in changes.items() if value is not None}
    if resize is not KEEP:
        changes["resize"] = resize
    settings = dataclasses.replace(settings, **changes)
    plan_slices((1, 1), max_slices=settings.max_slices, resize=settings.resize)  # refuses the other two
    return settings
