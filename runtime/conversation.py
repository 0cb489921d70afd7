"""A conversation: questions about the same images, each following the last answer."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from uhd_export.runtime.language import prompt as prompts
from uhd_export.runtime.language.sampling import Sampling

if TYPE_CHECKING:
    from uhd_export.runtime.pipeline import ImageLike, Pipeline


class Conversation:
    """History of one conversation. The pipeline's cache keeps its positions, so only new ones are run."""

    def __init__(self, pipeline: "Pipeline", images: Sequence["ImageLike"]) -> None:
        self._pipeline = pipeline
        self._images = [pipeline.plan_image(image) for image in images]
        self.ids: list[int] = []
        """Token ids so far, answers included."""

    def ask(
        self, question: str, *, max_new_tokens: int = 256, sampling: Sampling | None = None
    ) -> Iterator[str]:
        """The answer in pieces, greedy by default.

        An answer that is not read to its end counts as far as it was generated.
        """
        pipeline = self._pipeline
        ids = self.ids + self._turn(question)
        sequence = pipeline.assemble(ids, self._images)
        answer: list[int] = []

        def recorded() -> Iterator[int]:
            for token in pipeline.stream_ids(sequence, max_new_tokens, sampling):
                if token not in pipeline.manifest.model.language.eos:
                    answer.append(token)
                yield token

        def text() -> Iterator[str]:
            try:
                yield from pipeline.stream_text(recorded())
            finally:
                self.ids = ids + answer

        return text()

    def _turn(self, question: str) -> list[int]:
        """Token ids that this question adds. Follow-ups begin with what closes the previous answer."""
        pipeline = self._pipeline
        template, tokenizer = pipeline.settings.template, pipeline.tokenizer
        if not self.ids:
            return pipeline.input_ids(prompts.render(question, template, len(self._images)))
        ids = pipeline.input_ids(prompts.FOLLOW_UPS[template].replace("{question}", question))
        prefix = tokenizer.encode("").ids
        return ids[len(prefix) :] if ids[: len(prefix)] == prefix else ids
