"""Image-question pairs, read from a JSONL file."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import Tokenizer

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.json_files import parse_json
from uhd_export.runtime.language import prompt as prompts
from uhd_export.runtime.language.prompt import IMAGE


@dataclass(frozen=True)
class Turn:
    """A question, `<image>` where an image goes, and its answer where one is known, or several are right."""

    question: str
    answer: str | None
    others: tuple[str, ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        """All answers that are known."""
        return () if self.answer is None else (self.answer, *self.others)


@dataclass(frozen=True)
class Pair:
    """Images, as paths or opened, and a conversation about them; `where` names its origin in errors."""

    images: tuple[Path | Image.Image, ...]
    turns: tuple[Turn, ...]
    where: str


def read_pairs(path: str | Path, image_root: str | Path | None = None) -> list[Pair]:
    """The pairs of a JSONL file, one object a line, of two formats that may be mixed.

    Ours: {"image": PATH, "question": TEXT, "answer": TEXT}; the answer may be missing, or a list. LLaVA's:
    {"image": PATH, "conversations": [{"from": "human", "value": TEXT}, {"from": "gpt", "value": TEXT}, ...]}.
    `image` may be a list, or null for text alone. Relative paths start at `image_root`, by default the
    file's folder. Raises UhdError naming the line.
    """
    root = Path(path).parent if image_root is None else Path(image_root)
    pairs = [parse_pair(line, where, root) for _, where, line in numbered_lines(path)]
    if not pairs:
        raise UhdError(f"{path}: holds no image-question pair")
    return pairs


def conversation_ids(
    tokenizer: Tokenizer, pair: Pair, template: str, eos: int | None
) -> tuple[list[int], int]:
    """Token ids of the whole conversation, IMAGE_ID in place, and how many of them are its first prompt."""
    prefix = prompts.opening(tokenizer)
    marked = any(IMAGE in turn.question for turn in pair.turns)
    first = prompts.render(pair.turns[0].question, template, 0 if marked else len(pair.images))
    ids = prompts.encode(tokenizer, first)
    prompt = len(ids)
    for index, turn in enumerate(pair.turns):
        if index:
            further = prompts.FOLLOW_UPS[template].replace("{question}", turn.question)
            ids += prompts.encode(tokenizer, further)[len(prefix) :]
        if turn.answer is not None:
            ids += tokenizer.encode(turn.answer, add_special_tokens=False).ids
    if eos is not None and pair.turns[-1].answer is not None:
        ids.append(eos)
    return ids, prompt


def numbered_lines(path: str | Path) -> Iterator[tuple[int, str, str]]:
    """(number, name in errors, text) of each line of a JSONL file that is not empty. Raises UhdError."""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, f"{path} line {number}", line
    except FileNotFoundError:
        raise UhdError(f"{path}: no such file; a JSONL file of images and questions is needed") from None
    except (UnicodeDecodeError, OSError) as error:
        raise UhdError(f"{path}: not readable as text ({error})") from None


def parse_pair(line: str, where: str, root: Path, *, answered: bool = True) -> Pair:
    """The pair of one line, whose images lie under `root`; `where` names it in errors. Raises UhdError.

    Without `answered` the field answer may be anything, and is left out.
    """
    try:
        record = parse_json(line)
    except ValueError as error:
        raise UhdError(f"{where}: not a JSON object ({error}); write one object a line") from None
    if not isinstance(record, dict):
        raise UhdError(f"{where}: not a JSON object; a JSON array becomes JSONL with `jq -c '.[]'`")
    if not answered:
        record.pop("answer", None)
    turns = _conversation(record, where) if "conversations" in record else _question(record, where)
    images = _images(record, where, root)
    markers = sum(turn.question.count(IMAGE) for turn in turns)
    if markers not in (0, len(images)):
        raise UhdError(f"{where}: {markers} {IMAGE} markers for {len(images)} images")
    return Pair(images, turns, where)


def _question(record: dict[str, Any], where: str) -> tuple[Turn, ...]:
    if "image" not in record:
        raise UhdError(f"{where}: field image is missing; give a path, or null for text alone")
    question, answer = _text(record, "question", where), record.get("answer")
    if answer is None:
        return (Turn(question, None),)
    if not isinstance(answer, list):
        return (Turn(question, _text(record, "answer", where)),)
    answers = [_text({"answer": one}, "answer", where) for one in answer]
    if not answers:
        raise UhdError(f"{where}: field answer is an empty list; leave it out where none is known")
    return (Turn(question, answers[0], tuple(answers[1:])),)


def _conversation(record: dict[str, Any], where: str) -> tuple[Turn, ...]:
    messages = record["conversations"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UhdError(f"{where}: field conversations must be a list of objects with from and value")
    speakers = [message.get("from") for message in messages]
    expected = (["human", "gpt"] * len(speakers))[: len(speakers)]
    if not speakers or speakers != expected:
        raise UhdError(f"{where}: conversations must alternate between human and gpt, human first")
    texts = [_text(message, "value", where) for message in messages]
    # The last question may have no answer.
    return tuple(Turn(q, a) for q, a in itertools.zip_longest(texts[::2], texts[1::2]))


def _text(record: dict[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        raise UhdError(f"{where}: field {field} must be a text that is not empty")
    return value


def _images(record: dict[str, Any], where: str, root: Path) -> tuple[Path, ...]:
    names = record.get("image")
    names = [] if names is None else names if isinstance(names, list) else [names]
    if not all(isinstance(name, str) and name for name in names):
        raise UhdError(f"{where}: field image must be a path, a list of paths, or null")
    paths = tuple(root / name for name in names)
    for path in paths:
        try:
            reason = None if path.is_file() else "no such file"
        except OSError as error:  # a name that is too long, a folder that is closed
            reason = error.strerror
        if reason is not None:
            short = str(path) if len(str(path)) <= 200 else f"{str(path)[:200]}..."
            remedy = f"paths start at {root}, or --image-root; data URIs and addresses are not taken"
            raise UhdError(f"{where}: image {short}: {reason}; {remedy}")
    return paths
