"""Scores as the benchmarks define them, intervals that cover, and two bundles compared."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.language.pairs import Pair, Turn
from uhd_export.runtime.serving.evaluation import report
from uhd_export.runtime.serving.evaluation.evaluate import Evaluation, Question, compare, evaluate_pairs
from uhd_export.runtime.serving.evaluation.scores import MEASURES, anls, exact, relaxed, vqa
from uhd_export.runtime.serving.evaluation.statistics import estimate, paired


@pytest.mark.parametrize(
    ("score", "answer", "expected", "value"),
    [
        (exact, " Two  Cards ", ["two cards"], 1),
        (exact, "two card", ["two cards"], 0),
        (anls, "mcdonald", ["McDonalds"], 1 - 1 / 9),
        (anls, "cat", ["dog", "cats"], 0.75),
        (anls, "ab", ["abcd"], 0.5),
        (anls, "ab", ["abcde"], 0),  # under one half
        (relaxed, "104", ["100"], 1),
        (relaxed, "106", ["100"], 0),
        (relaxed, "-95", ["-100"], 1),
        (relaxed, "1,050", ["1000"], 1),
        (relaxed, "52%", ["0.5"], 1),
        (relaxed, "0", ["0"], 1),
        (relaxed, "0.01", ["0"], 0),
        (relaxed, "Blue", ["blue"], 1),
        (relaxed, "5", ["Infinity"], 0),
        (relaxed, "infinity", ["Infinity"], 1),
        (relaxed, "nan", ["Nan"], 1),
        (vqa, "The Two!", ["2"], 1),
        (vqa, "a dog", ["dog"] * 3 + ["cat"] * 7, 0.9),  # 3 * 2/3 + 7 * 1, of 10
        (vqa, "cat", ["dog"] * 3 + ["cat"] * 7, 1),
        (vqa, "dog", ["dog"] + ["cat"] * 9, 0.3),
        (vqa, "don't", ["dont"], 1),
        (vqa, "1,000.", ["1000"], 1),
        (vqa, "bird", ["cat"], 0),
    ],
)
def test_scores(score, answer, expected, value):
    assert score(answer, expected) == pytest.approx(value)


@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=10))
def test_every_score_is_between_0_and_1(answer, expected):
    for score in MEASURES.values():
        assert 0 <= score(answer, expected) <= 1
    assert exact(expected[0], expected) == 1


@pytest.mark.slow
def test_an_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        found = estimate((random.random(200) < 0.7).astype(float).tolist(), seed=int(random.integers(1000)))
        covered += found.low <= 0.7 <= found.high
    assert 50 <= covered <= 60


def test_pairing_removes_what_both_find_hard():
    random = np.random.default_rng(1)
    hard = random.random(300)
    first = (hard < 0.6).astype(float)
    second = (hard < 0.63).astype(float)  # the same questions, and a few more
    difference = paired(first.tolist(), second.tolist())
    assert difference.low > 0  # sure, where the two alone are not
    assert estimate(first.tolist()).high > estimate(second.tolist()).low
    assert difference.mean == pytest.approx(second.mean() - first.mean())


def test_a_bundle_is_asked_and_compared(serve, cards, monkeypatch):
    pairs = [Pair((image,), (Turn(q, code, ("seven",)),), q) for image, q, code in cards[:2]]
    pairs.append(Pair((cards[0][0],), (Turn(cards[0][1], "wrong"), Turn("And?", None)), "third"))
    pairs.append(Pair((), (Turn("word " * 4000, "x"),), "too long"))
    service = serve(slots=2)
    first = evaluate_pairs(service, pairs, max_tokens=6)
    assert [question.scores["exact"] for question in first.questions] == [1, 1, 0, 0]
    assert first.failed == 1 and "context" in first.questions[3].error
    assert first.measures["exact"].mean == 0.5 and first.measures["exact"].count == 4
    better = evaluate_pairs(service, pairs, ["exact", "anls"], max_tokens=6)
    monkeypatch.setitem(better.questions[2].scores, "exact", 1.0)
    both = compare(evaluate_pairs(service, pairs, ["exact"], max_tokens=6), better)
    assert both.better == {"exact": 1} and both.worse == {"exact": 0}
    assert both.difference["exact"].mean == 0.25
    with pytest.raises(UhdError, match="no line has an answer"):
        evaluate_pairs(service, [Pair((), (Turn("What?", None),), "")])


def test_names_of_others_are_no_markup(capsys, tmp_path):
    question = Question("[/a].jsonl line 1", "What?", ("5",), "", {"exact": 0.0}, "image [/b].png: no image")
    evaluation = Evaluation((question,), {"exact": estimate([0.0])})
    bundle = tmp_path / "[bold]nano"
    report.show(bundle, evaluation, bundle, evaluation, compare(evaluation, evaluation))
    told = " ".join(capsys.readouterr().out.split())  # a narrow terminal's lines are cut
    assert told.count("[bold]nano") == 2
    assert "[/a].jsonl line 1: image [/b].png: no image" in told
