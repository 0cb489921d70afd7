"""Prompts: conversation templates and ids with a marker where the image goes."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from uhd_export.runtime.errors import UhdError

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
    if template not in TEMPLATES:
        raise UhdError(f"template {template!r}: must be one of {', '.join(TEMPLATES)}")
    if IMAGE not in question:
        question = (IMAGE + "\n") * images + question
    return TEMPLATES[template].replace("{question}", question)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer stored in `path` (a tokenizer.json)."""
    if not Path(path).is_file():
        raise UhdError(f"tokenizer {path}: no such file")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UhdError(f"tokenizer {path}: cannot be read ({error}); build the bundle again") from None


def encode(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """Token ids of `prompt`, with IMAGE_ID for each `<image>`; ids pass through unchanged.

    Each piece between images is tokenized on its own and the beginning-of-text token is kept once,
    as `tokenizer_image_token` of the released code does.
    """
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    pieces = [tokenizer.encode(piece).ids for piece in prompt.split(IMAGE)]
    prefix = tokenizer.encode("").ids
    ids = list(pieces[0])
    for piece in pieces[1:]:
        ids.append(IMAGE_ID)
        ids.extend(piece[len(prefix) :] if piece[: len(prefix)] == prefix else piece)
    return ids
