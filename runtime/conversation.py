"""A conversation: questions about the same images, each following the last answer."""

from collections.abc import Sequence

from uhd_export.runtime.language import prompt as prompts
from uhd_export.runtime.language.answer import Answer
from uhd_export.runtime.language.generation import TextGenerator
from uhd_export.runtime.language.sequence import PlannedImage
from uhd_export.runtime.settings import Sampling


class Conversation:
    """History of one conversation. The pipeline's cache holds its positions, so only new ones are run.

    Made by `Pipeline.converse`. `template` names how questions are put (see `prompt.TEMPLATES`).
    """

    def __init__(self, generator: TextGenerator, images: Sequence[PlannedImage], template: str) -> None:
        self._generator, self._images, self._template = generator, list(images), template
        self._prompt: list[int] = []
        self._answer: Answer | None = None
        self._history: list[int] = []

    @property
    def ids(self) -> list[int]:
        """Token ids so far, answers included; an answer counts as far as it was generated."""
        if self._answer is None or not self._answer.started:
            return list(self._history)
        return self._prompt + self._answer.ids

    def ask(self, question: str, *, max_new_tokens: int = 256, sampling: Sampling | None = None) -> Answer:
        """The answer, greedy by default.

        One that is not read to its end counts as far as it was generated; one not begun does not count.
        """
        if self._answer is not None and self._answer.started and self._answer.finish_reason is None:
            self._generator.end_answer()
        history = self.ids
        prompt = history + self._turn(question, history)
        sequence = self._generator.sequence(prompt, self._images)
        answer = self._generator.answer(sequence, max_new_tokens, sampling)
        self._history, self._prompt, self._answer = history, prompt, answer
        return answer

    def __repr__(self) -> str:
        return f"<Conversation about {len(self._images)} images, {len(self.ids)} tokens so far>"

    def _turn(self, question: str, history: list[int]) -> list[int]:
        """Token ids that this question adds. Follow-ups begin with what closes the previous answer."""
        images = 0 if history else len(self._images)
        return prompts.encode_question(
            self._generator.tokenizer, question, self._template, images, follow_up=bool(history)
        )
