"""Image-question pairs: read from a JSONL file, or drawn by the embedded model's own generator."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from uhd_export.nano.cards import make_card_image
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.language.prompt import IMAGE

# The embedded model trains on set 1 and is evaluated on set 2; 3 are its sample images.
CALIBRATION_SEED = 4


@dataclass(frozen=True)
class Turn:
    """A question, `<image>` where an image goes, and its answer where one is known."""

    question: str
    answer: str | None


@dataclass(frozen=True)
class Pair:
    """Images, as paths or opened, and a conversation about them; `where` names its origin in errors."""

    images: tuple[Path | Image.Image, ...]
    turns: tuple[Turn, ...]
    where: str


def card_pairs(count: int, seed: int) -> list[Pair]:
    """`count` drawn images, each with one question and its answer. The built-in data."""
    pairs = []
    for index in range(count):
        key = (CALIBRATION_SEED, seed, index)
        image, cards = make_card_image(key)
        card = cards[int(np.random.default_rng((*key, 1)).integers(len(cards)))]
        pairs.append(Pair((image,), (Turn(card.question, card.code),), f"card image {index}"))
    return pairs


def read_pairs(path: str | Path, image_root: str | Path | None = None) -> list[Pair]:
    """The pairs of a JSONL file, one object a line, of two formats that may be mixed.

    Ours: {"image": PATH, "question": TEXT, "answer": TEXT}; the answer may be missing. LLaVA's:
    {"image": PATH, "conversations": [{"from": "human", "value": TEXT}, {"from": "gpt", "value": TEXT}, ...]}.
    `image` may be a list, or null for text alone. Relative paths start at `image_root`, by default the
    file's folder. Raises UhdError naming the line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UhdError(f"{path}: no such file; --data takes a JSONL file") from None
    except (UnicodeDecodeError, OSError) as error:
        raise UhdError(f"{path}: not readable as text ({error})") from None
    root = path.parent if image_root is None else Path(image_root)
    pairs = [
        _pair(line, f"{path} line {number}", root)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not pairs:
        raise UhdError(f"{path}: holds no image-question pair")
    return pairs


def without_duplicates(pairs: list[Pair]) -> list[Pair]:
    """Each pair once: one on both sides would be judged by what it was calibrated on."""
    first: dict[tuple, Pair] = {}
    for pair in pairs:
        first.setdefault((pair.images, pair.turns), pair)
    return list(first.values())


def _pair(line: str, where: str, root: Path) -> Pair:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise UhdError(f"{where}: not a JSON object ({error}); write one object a line") from None
    if not isinstance(record, dict):
        raise UhdError(f"{where}: not a JSON object; a JSON array becomes JSONL with `jq -c '.[]'`")
    turns = _conversation(record, where) if "conversations" in record else _question(record, where)
    images = _images(record, where, root)
    markers = sum(turn.question.count(IMAGE) for turn in turns)
    if markers not in (0, len(images)):
        raise UhdError(f"{where}: {markers} {IMAGE} markers for {len(images)} images")
    return Pair(images, turns, where)


def _question(record: dict, where: str) -> tuple[Turn, ...]:
    if "image" not in record:
        raise UhdError(f"{where}: field image is missing; give a path, or null for text alone")
    answer = None if record.get("answer") is None else _text(record, "answer", where)
    return (Turn(_text(record, "question", where), answer),)


def _conversation(record: dict, where: str) -> tuple[Turn, ...]:
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


def _text(record: dict, field: str, where: str) -> str:
    value = record.get(field)
    if not isinstance(value, str) or not value.strip():
        raise UhdError(f"{where}: field {field} must be a text that is not empty")
    return value


def _images(record: dict, where: str, root: Path) -> tuple[Path, ...]:
    names = record.get("image")
    names = [] if names is None else names if isinstance(names, list) else [names]
    if not all(isinstance(name, str) and name for name in names):
        raise UhdError(f"{where}: field image must be a path, a list of paths, or null")
    paths = tuple(root / name for name in names)
    for path in paths:
        if not path.is_file():
            raise UhdError(f"{where}: image {path}: no such file; paths start at {root}, or --image-root")
    return paths
