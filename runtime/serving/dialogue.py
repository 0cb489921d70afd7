"""A dialogue of several turns as token ids, in the bundle's prompt template."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.language import prompt as prompts

# What a template says before the first question, which a system message replaces.
_SYSTEMS = {
    "vicuna_v1": prompts.TEMPLATES["vicuna_v1"].partition(" USER:")[0],
    "llava_v1": prompts.TEMPLATES["llava_v1"].partition(" USER:")[0],
    "plain": "",
    "qwen": "You are a helpful assistant.",
}


@dataclass(frozen=True)
class Message:
    """What `role`, "system", "user" or "assistant", said: texts with an image between each two.

    All of it is text: a control token or `<image>` that it spells out is none.
    """

    role: str
    texts: tuple[str, ...]

    @property
    def images(self) -> int:
        """How many images it shows."""
        return len(self.texts) - 1

    def parts(self) -> list[tuple[str, bool]]:
        """What `encode_parts` takes."""
        marked = [part for text in self.texts for part in ((prompts.IMAGE, True), (text, False))]
        return marked[1:]


def dialogue_ids(tokenizer: Tokenizer, template: str, messages: Sequence[Message]) -> list[int]:
    """Token ids of `messages` up to where the next answer begins, -200 where an image goes.

    A system message may come first; then user and assistant take turns, the user first and last. Each part
    is tokenized on its own, as answers are generated, so that a further question finds the cache of the last.
    Raises UhdError where the turns are others.
    """
    system = None
    if messages and messages[0].role == "system":
        system, messages = messages[0], messages[1:]
    expected = (["user", "assistant"] * len(messages))[: len(messages)]
    if not messages or len(messages) % 2 == 0 or [m.role for m in messages] != expected:
        raise UhdError(
            "messages: a system message may come first, then user and assistant take turns, the user last"
        )
    if any(message.images for message in (*messages[1::2], *([system] if system else []))):
        raise UhdError("messages: only the user can show images")
    before, after = prompts.TEMPLATES[template].split("{question}")
    start = _start(template, before, system)
    ids = prompts.encode_parts(tokenizer, [*start, *messages[0].parts(), (after, True)])
    opening = len(prompts.opening(tokenizer))
    before, after = prompts.FOLLOW_UPS[template].split("{question}")
    for answer, question in zip(messages[1::2], messages[2::2], strict=True):
        for parts in (answer.parts(), [(before, True), *question.parts(), (after, True)]):
            ids += prompts.encode_parts(tokenizer, parts)[opening:]
    return ids


def _start(template: str, before: str, system: Message | None) -> list[tuple[str, bool]]:
    """What comes before the first question, with `system` in place of what the template says."""
    usual = _SYSTEMS[template]
    if system is None or not (usual or system.texts[0]):
        return [(before, True)]
    if not usual:
        return [*system.parts(), ("\n" + before, True)]
    head, tail = before.split(usual)
    return [(head, True), *system.parts(), (tail, True)]
