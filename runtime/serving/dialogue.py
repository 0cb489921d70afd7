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
    """What `role`, "system", "user" or "assistant", said; `<image>` where an image goes."""

    role: str
    text: str


def dialogue_ids(tokenizer: Tokenizer, template: str, messages: Sequence[Message]) -> list[int]:
    """Token ids of `messages` up to where the next answer begins, -200 where an image goes.

    A system message may come first; then user and assistant take turns, the user first and last. Each part
    is tokenized on its own, as answers are generated, so that a further question finds the cache of the last.
    Raises UhdError where the turns are others.
    """
    system = None
    if messages and messages[0].role == "system":
        system, messages = messages[0].text, messages[1:]
    expected = (["user", "assistant"] * len(messages))[: len(messages)]
    if not messages or len(messages) % 2 == 0 or [m.role for m in messages] != expected:
        raise UhdError(
            "messages: a system message may come first, then user and assistant take turns, the user last"
        )
    if any(prompts.IMAGE in m.text for m in messages[1::2]) or prompts.IMAGE in (system or ""):
        raise UhdError("messages: only the user can show images")
    prefix = tokenizer.encode("").ids
    ids = prompts.encode(tokenizer, _first(template, system, messages[0].text))
    for answer, question in zip(messages[1::2], messages[2::2], strict=True):
        follow_up = prompts.FOLLOW_UPS[template].replace("{question}", question.text)
        for part in (answer.text, follow_up):
            more = prompts.encode(tokenizer, part)
            ids += more[len(prefix) :] if more[: len(prefix)] == prefix else more
    return ids


def _first(template: str, system: str | None, question: str) -> str:
    """The first turn, with `system` in place of what the template says."""
    before, _, after = prompts.TEMPLATES[template].partition("{question}")
    if system is not None and _SYSTEMS[template]:
        before = before.replace(_SYSTEMS[template], system)
    elif system:
        before = f"{system}\n{before}"
    return before + question + after
