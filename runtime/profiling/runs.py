"""One answer, run step by step with a clock at every step: what all figures come from."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.encoder import TOKENS
from uhd_export.runtime.image.pattern import pattern
from uhd_export.runtime.image.pixels import cut
from uhd_export.runtime.image.slicing import Size
from uhd_export.runtime.language import prompt as prompts
from uhd_export.runtime.language.sampling import greedy
from uhd_export.runtime.language.sequence import PlannedImage, PromptSequence
from uhd_export.runtime.pipeline import Pipeline

QUESTION = "What is shown in this image?"
FIRST_TOKEN = ("pixels", "vision", "prefill")
"""The stages up to the first token."""


@dataclass(frozen=True)
class Span:
    """A stage's time, on the clock of `time.perf_counter`; `detail` says of what."""

    name: str
    start: float
    stop: float
    detail: str = ""

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.stop - self.start


@dataclass
class Run:
    """The spans of one answer; "sampling" lies inside "prefill" and "decode"."""

    spans: list[Span] = field(default_factory=list)

    @contextmanager
    def span(self, name: str, detail: str = "") -> Iterator[None]:
        """Note the time of the block."""
        start = time.perf_counter()
        yield
        self.spans.append(Span(name, start, time.perf_counter(), detail))

    def seconds(self, name: str) -> float:
        """Of all spans called `name`."""
        return sum(span.seconds for span in self.spans if span.name == name)

    @property
    def first_token(self) -> float:
        """Seconds from the opened image to the first token."""
        return sum(map(self.seconds, FIRST_TOKEN))

    @property
    def steps(self) -> list[float]:
        """Seconds of each decoded token."""
        return [span.seconds for span in self.spans if span.name == "decode"]


def question_sequences(
    pipeline: Pipeline, size: Size, grid_modes: Sequence[str], new_tokens: int
) -> dict[str, PromptSequence]:
    """The same question about a test image in each grid mode; the pipeline's own mode stays as it was."""
    image, before = pattern(*size), pipeline.settings
    prompt = prompts.render(QUESTION, before.template)
    sequences = {}
    try:
        for grid_mode in grid_modes:
            pipeline.configure(grid_mode=grid_mode)
            sequences[grid_mode] = pipeline.sequence(image, prompt)
    finally:
        pipeline.settings = before
    positions, context = max(map(len, sequences.values())), pipeline.generator.decoder.context
    if positions + new_tokens > context:
        raise UhdError(
            f"profile: {positions} positions and {new_tokens} tokens do not fit the context of {context}; "
            "use a smaller --size or fewer --tokens"
        )
    return sequences


def run_once(pipeline: Pipeline, sequence: PromptSequence, new_tokens: int) -> Run:
    """One answer with nothing cached but geometry; `new_tokens` are decoded, whatever they are."""
    pipeline.forget()
    run, planned = Run(), planned_image(sequence)
    with run.span("pixels", f"{len(planned.plan.crop_sizes)} crops"):
        batches = list(pipeline.encoder.batches(cut(planned.image, planned.plan), planned.grid_mode))
    tokens: list[NDArray[Any]] = [np.empty(0)] * len(planned.plan.crop_sizes)
    for members, feeds in batches:
        height, width = feeds["pixels"].shape[2:]
        with run.span("vision", f"{len(members)} of {width}x{height}"):
            for index, result in zip(members, pipeline.vision.infer(feeds)[TOKENS], strict=True):
                tokens[index] = result
    with run.span("prefill", f"{len(sequence)} positions"):
        pipeline.images.add(planned, tokens)
        logits = pipeline.generator.prefill(sequence)
        with run.span("sampling"):
            token = greedy(logits)
    for step in range(new_tokens):
        with run.span("decode", f"token {step + 1}"):
            logits = pipeline.generator.step(token)
            with run.span("sampling"):
                token = greedy(logits)
    return run


def planned_image(sequence: PromptSequence) -> PlannedImage:
    """The one image of `sequence`."""
    return next(s.content for s in sequence.segments if isinstance(s.content, PlannedImage))
