"""A bundle's scores on pairs with known answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.language.pairs import Pair
from uhd_export.runtime.serving.batch.work import Failed, all_busy, answer_pair
from uhd_export.runtime.serving.evaluation.scores import MEASURES
from uhd_export.runtime.serving.evaluation.statistics import Estimate, estimate, paired
from uhd_export.runtime.serving.sampling.choice import Choosing
from uhd_export.runtime.serving.service import Service


@dataclass(frozen=True)
class Question:
    """A question, its known answers, what was answered, and scores by measure; `error` where it failed."""

    where: str
    question: str
    expected: tuple[str, ...]
    answer: str
    scores: dict[str, float]
    error: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """All questions in their order, and the average of each measure. What failed scores 0."""

    questions: tuple[Question, ...]
    measures: dict[str, Estimate]

    @property
    def failed(self) -> int:
        """Questions that were not answered."""
        return sum(question.error is not None for question in self.questions)


def evaluate_pairs(
    service: Service,
    pairs: Sequence[Pair],
    measures: Sequence[str] = tuple(MEASURES),
    *,
    max_tokens: int = 64,
    on_pair: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Ask each turn of `pairs` that has a known answer, greedily; the known answers are the history."""
    if not any(turn.answer is not None for pair in pairs for turn in pair.turns):
        raise UhdError("--data: no line has an answer to compare with; add the field answer")
    found: dict[int, list[Question]] = {}
    greedy = Choosing(service.settings.sampling.changed(temperature=0.0))

    def ask(item: tuple[int, Pair]) -> list[Question]:
        _, pair = item
        try:
            answers = answer_pair(service, pair, max_tokens=max_tokens, choosing=greedy, given=True)
            texts: list[str] = [answered.text.strip() for answered in answers]
            error = None
        except Failed as failure:
            texts, error = [""] * len(pair.turns), str(failure)
        known = [(turn, text) for turn, text in zip(pair.turns, texts, strict=True) if turn.answers]
        return [
            Question(
                pair.where,
                turn.question,
                turn.answers,
                text,
                {name: 0.0 if error else MEASURES[name](text, turn.answers) for name in measures},
                error,
            )
            for turn, text in known
        ]

    for done, ((index, _), result) in enumerate(all_busy(service, enumerate(pairs), ask), start=1):
        if isinstance(result, Failed):
            raise result
        found[index] = result
        on_pair(done, len(pairs))
    questions = tuple(question for index in sorted(found) for question in found[index])
    averages = {name: estimate([question.scores[name] for question in questions]) for name in measures}
    return Evaluation(questions, averages)


@dataclass(frozen=True)
class Comparison:
    """Another bundle's scores minus the first's by measure, and questions that only one has better."""

    difference: dict[str, Estimate]
    better: dict[str, int]
    worse: dict[str, int]


def compare(first: Evaluation, other: Evaluation) -> Comparison:
    """Both evaluations are of the same pairs."""
    difference, better, worse = {}, {}, {}
    for name in first.measures:
        mine = [question.scores[name] for question in first.questions]
        theirs = [question.scores[name] for question in other.questions]
        difference[name] = paired(mine, theirs)
        better[name] = sum(b > a for a, b in zip(mine, theirs, strict=True))
        worse[name] = sum(b < a for a, b in zip(mine, theirs, strict=True))
    return Comparison(difference, better, worse)
