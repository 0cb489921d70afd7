"""Scores of one answer, 0 to 1, as benchmarks define them."""

import math
import re
import string
from collections.abc import Callable, Sequence

from uhd_export.runtime.errors import UhdError

_ARTICLES = {"a", "an", "the"}
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_WORDS)}}
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation.replace(".", "").replace(",", ""), " "))


def exact(answer: str, expected: Sequence[str]) -> float:
    """1 where the answer is one of those expected, upper case and outer white space aside."""
    return float(_plain(answer) in {_plain(one) for one in expected})


def anls(answer: str, expected: Sequence[str]) -> float:
    """Normalised Levenshtein similarity with the nearest of those expected, 0 below one half.

    DocVQA and InfographicVQA report its average (arXiv 1907.00490, equation 1).
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise UhdError(
            "anls: this needs rapidfuzz, which is not installed: pip install 'uhd-export[serve]'"
        ) from None
    best = max(Levenshtein.normalized_similarity(_plain(answer), _plain(one)) for one in expected)
    return float(best) if best >= 0.5 else 0.0


def relaxed(answer: str, expected: Sequence[str]) -> float:
    """1 where a number is within 5 % of the one expected, other answers are exact.

    ChartQA reports its average (arXiv 2203.10244, section 5.1). Percent signs and thousands' commas are read.
    """
    return max(_relaxed(answer, one) for one in expected)


def vqa(answer: str, expected: Sequence[str]) -> float:
    """The share of people who agree, three of them counting as all, averaged over leaving out each one.

    VQAv2 and TextVQA report its average, with ten people's answers (arXiv 1505.00468, section 4). Articles,
    punctuation and apostrophes are dropped, and small numbers are digits. One answer stands for ten people.
    """
    people = [_spoken(one) for one in expected]
    people *= 10 if len(people) == 1 else 1
    agree = sum(one == _spoken(answer) for one in people)
    # Who is left out is one of those who agree, or not.
    without = [agree - (one == _spoken(answer)) for one in people]
    return sum(min(count / 3, 1.0) for count in without) / len(people)


MEASURES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact,
    "anls": anls,
    "relaxed": relaxed,
    "vqa": vqa,
}


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _relaxed(answer: str, expected: str) -> float:
    one, other = _number(answer), _number(expected)
    if one is not None and other:
        return float(abs(one - other) <= 0.05 * abs(other))
    return float(_plain(answer) == _plain(expected))


def _number(text: str) -> float | None:
    text = text.strip().rstrip(".")
    percent = text.endswith("%")
    try:
        value = float(re.sub(r"(?<=\d),(?=\d{3})", "", text.rstrip("%").strip()))
    except ValueError:
        return None
    if not math.isfinite(value):  # the words "nan", a bread, and "infinity", of which all is within 5 %
        return None
    return value / 100 if percent else value


def _spoken(text: str) -> str:
    text = text.lower().replace("'", "").replace("\n", " ")
    text = re.sub(r"(?<=\d),(?=\d)", "", text).translate(_PUNCTUATION).replace(",", " ")
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", "", text)
    words = (word for word in text.split() if word not in _ARTICLES)
    return " ".join(_NUMBERS.get(word, word) for word in words)
