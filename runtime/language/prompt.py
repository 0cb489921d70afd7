"""Prompts: conversation templates and ids with a marker where the image goes."""

import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.language.tokenizer_file import library_errors, read_tokenizer

IMAGE = "<image>"
IMAGE_ID = -200

_CHAT = "A chat between a curious {human} and an artificial intelligence assistant. " + (
    "The assistant gives helpful, detailed, and polite answers to the {human}'s questions. "
)
TEMPLATES = {
    "vicuna_v1": _CHAT.format(human="user") + "USER: {question} ASSISTANT:",
    "llava_v1": _CHAT.format(human="human") + "USER: {question} ASSISTANT:",
    "plain": "{question}\n",
    "qwen": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
}
# How a further question of the same conversation follows the previous answer.
FOLLOW_UPS = {
    "vicuna_v1": "</s>USER: {question} ASSISTANT:",
    "llava_v1": "</s>USER: {question} ASSISTANT:",
    "plain": "{question}\n",
    "qwen": "<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
}


def render(question: str, template: str, images: int = 1) -> str:
    """The full prompt for `question`, with one `<image>` line an image unless it has its own."""
    _known(template)
    if IMAGE not in question:
        question = (IMAGE + "\n") * images + question
    return TEMPLATES[template].replace("{question}", question)


def _known(template: str) -> None:
    if template not in TEMPLATES:
        raise UhdError(f"template {template!r}: must be one of {', '.join(TEMPLATES)}")


def check_text(text: str, name: str) -> None:
    """Raise UhdError where `text`, called `name`, is none: bytes outside UTF-8 leave halves of characters."""
    if not isinstance(text, str):
        raise UhdError(f"{name}: {type(text).__name__} is no text; give a str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UhdError(
            f"{name}: character {error.start + 1} is none of Unicode (a byte outside of UTF-8, or a lone "
            "surrogate); take it out, or give it in UTF-8"
        ) from None


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer stored in `path` (a tokenizer.json)."""
    return read_tokenizer(Path(path), "build the bundle again")


def encode(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """Token ids of `prompt`, with IMAGE_ID for each `<image>`; ids pass through unchanged.

    Each piece between images is tokenized on its own and the beginning-of-text token is kept once,
    as `tokenizer_image_token` of the released code does. An end-of-text token that the tokenizer would
    put behind each piece is left out: a prompt is to be continued.
    """
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    check_text(prompt, "prompt")
    return _encode(tokenizer, prompt.split(IMAGE))


def encode_question(
    tokenizer: Tokenizer, question: str, template: str, images: int = 0, *, follow_up: bool = False
) -> list[int]:
    """Token ids of `question` in its template: the question is text, whatever it looks like.

    A first question follows a line of `<image>` for each of `images`; with `follow_up` it follows
    an answer, and no beginning-of-text token leads.
    """
    _known(template)
    check_text(question, "question")
    text = FOLLOW_UPS[template] if follow_up else TEMPLATES[template]
    before, after = text.split("{question}")
    ids = encode_parts(
        tokenizer, [(before + (IMAGE + "\n") * images, True), (question, False), (after, True)]
    )
    return ids[len(opening(tokenizer)) :] if follow_up else ids


def encode_parts(tokenizer: Tokenizer, parts: Sequence[tuple[str, bool]]) -> list[int]:
    """As `encode` of the texts of `parts` in a row: control tokens and `<image>` count where markup is True.

    Where others spell them out, those that count are told from them by a character that no text holds.
    """
    controls = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    literal = "\0".join(text for text, markup in parts if not markup)
    if not any(token in literal for token in (IMAGE, *controls)):
        return encode(tokenizer, "".join(text for text, _ in parts))
    mark = next((c for c in map(chr, range(0xFDD0, 0xFDF0)) if c not in literal), None)
    if mark is None:
        raise UhdError("question: holds every noncharacter of Unicode; take them out")
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True  # so that they are text; the marked ones are no special tokens
    ids = {}
    for token in controls:
        plain.add_tokens([AddedToken(mark + token, normalized=False, special=False)])
        ids[_id(plain, mark + token)] = _id(tokenizer, token)
    pattern = re.compile("|".join(map(re.escape, sorted([IMAGE, *controls], key=len, reverse=True))))
    texts = (pattern.sub(lambda found: mark + found[0], text) if markup else text for text, markup in parts)
    return [ids.get(i, i) for i in _encode(plain, "".join(texts).split(mark + IMAGE))]


def _encode(tokenizer: Tokenizer, pieces: Sequence[str]) -> list[int]:
    """Ids of the pieces between images, after the beginning-of-text token."""
    with library_errors("tokenizer: cannot encode the prompt", "build the bundle again"):
        ids = opening(tokenizer)
        for number, piece in enumerate(pieces):
            ids += [IMAGE_ID] * (number > 0) + tokenizer.encode(piece, add_special_tokens=False).ids
        return ids


def opening(tokenizer: Tokenizer) -> list[int]:
    """The ids that the tokenizer puts before every text; those that it would put behind are left out."""
    both = tokenizer.encode("").ids
    bare, framed = (tokenizer.encode("a", add_special_tokens=added).ids for added in (False, True))
    for count in range(len(both), 0, -1):
        if framed == both[:count] + bare + both[count:]:
            return both[:count]
    return []


def _id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that the tokenizer has."""
    number = tokenizer.token_to_id(token)
    if number is None:
        raise UhdError(f"tokenizer: it has no token {token!r}; build the bundle again")
    return int(number)
