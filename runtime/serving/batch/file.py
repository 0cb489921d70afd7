"""A file of questions: answers by line, each written whole, so that a run goes on where it stopped."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uhd_export.runtime.bundle.manifest import Manifest
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.json_files import parse_json
from uhd_export.runtime.language.pairs import numbered_lines, parse_pair
from uhd_export.runtime.serving.batch.work import Answered, Failed, all_busy, answer_pair
from uhd_export.runtime.serving.sampling.choice import Choosing
from uhd_export.runtime.serving.service import Service
from uhd_export.runtime.settings import Settings


@dataclass(frozen=True)
class BatchOptions:
    """`max_tokens` of an answer; `retry` asks again what failed before."""

    max_tokens: int | None = 256
    choosing: Choosing | None = None
    image_root: Path | None = None
    retry: bool = False


@dataclass(frozen=True)
class BatchResult:
    """How many lines are answered, how many failed, and how many of all were there before."""

    answered: int
    failed: int
    before: int


@dataclass(frozen=True)
class Line:
    """A line of the questions: its number, its name in errors, and its text."""

    number: int
    where: str
    text: str


Results = Callable[[Sequence[Line]], Iterator[tuple[Line, dict[str, Any]]]]
"""What is written of each line, as it is answered."""


def answer_file(
    service: Service,
    questions: Path,
    output: Path,
    options: BatchOptions,
    on_line: Callable[[int, int], None] = lambda done, total: None,
) -> BatchResult:
    """Answer the pairs of `questions` (see `read_pairs`) into the JSONL file `output`.

    Each line of it tells which line it answers; what cannot be answered has an `error` and stops nothing.
    Lines of an unfinished `output` stay and are not asked again. Raises UhdError where `output` answers
    other questions, or with other options.
    """

    def results(lines: Sequence[Line]) -> Iterator[tuple[Line, dict[str, Any]]]:
        return answer_lines(service, lines, questions, options)

    run = run_digest(service.manifest, service.settings, service.context, options)
    return write_answers(questions, output, run, options.retry, results, on_line)


def answer_lines(
    service: Service, lines: Sequence[Line], questions: Path, options: BatchOptions
) -> Iterator[tuple[Line, dict[str, Any]]]:
    """Each of `lines` with what is written of it, all slots busy."""

    def ask(line: Line) -> list[Answered]:
        return answer_line(service, line, questions, options)

    for line, result in all_busy(service, lines, ask):
        yield line, describe(result)


def write_answers(
    questions: Path,
    output: Path,
    run: str,
    retry: bool,
    results: Results,
    on_line: Callable[[int, int], None],
) -> BatchResult:
    """Write what `results` gives for the lines that `output` does not hold; see `answer_file`."""
    check_output(questions, output)
    lines = [Line(*line) for line in numbered_lines(questions)]
    before = read_answers(output, {line.number: line.text for line in lines}, run)
    if retry:
        before = {number: record for number, record in before.items() if "error" not in record}
        rewrite(output, before)
    failed = sum("error" in record for record in before.values())
    done = len(before)
    on_line(done, len(lines))
    with output.open("ab", buffering=0) as file:
        for line, told in results([line for line in lines if line.number not in before]):
            record = {**_origin(line.number, line.text, run), **told}
            rest = (json.dumps(record, ensure_ascii=False) + "\n").encode()
            while rest:  # a disk that is nearly full takes a part, and refuses what is left
                rest = rest[file.write(rest) :]
            failed += "error" in told
            done += 1
            on_line(done, len(lines))
        os.fsync(file.fileno())
    return BatchResult(done - failed, failed, len(before))


def check_output(questions: Path, output: Path) -> None:
    """Raise UhdError where answers to `questions` cannot go to `output`: it takes no bundle to tell."""
    try:
        if output.exists() and not output.is_file():
            raise UhdError(f"{output}: is no plain file; give another -o")
        if not output.parent.is_dir():
            raise UhdError(f"{output}: {output.parent} is no folder; make it, or give another -o")
        if output.exists() and questions.exists() and output.samefile(questions):
            raise UhdError(f"{output}: holds the questions; give another -o")
    except OSError as error:
        raise UhdError(f"{output}: {error.strerror}; give another -o") from None


def answer_line(service: Service, line: Line, questions: Path, options: BatchOptions) -> list[Answered]:
    """The answers to a line's turns. Raises Failed."""
    root = options.image_root or questions.parent
    try:
        pair = parse_pair(line.text, line.where, root, answered=False)
    except UhdError as error:
        raise Failed(str(error)) from None
    return answer_pair(service, pair, max_tokens=options.max_tokens, choosing=options.choosing)


def describe(result: list[Answered] | Failed) -> dict[str, Any]:
    """What a line of the output says of its answers; one turn's `answer`, several turns' `answers`."""
    if isinstance(result, Failed):
        return {"error": str(result)}
    texts = [answered.text for answered in result]
    last = result[-1].summary
    return {
        **({"answer": texts[0]} if len(texts) == 1 else {"answers": texts}),
        "finish_reason": last.reason,
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": sum(answered.summary.completion_tokens for answered in result),
    }


def digest(text: str) -> str:
    """What tells a line from an edited one."""
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]


def run_digest(manifest: Manifest, settings: Settings, context: int, options: BatchOptions) -> str:
    """What tells runs apart whose answers may differ: the bundle's weights, and how it is asked."""
    files = sorted((name, record.sha256) for name, record in manifest.files.items())
    return digest(repr((files, settings, context, options.max_tokens, options.choosing)))


def read_answers(output: Path, lines: dict[int, str], run: str) -> dict[int, dict[str, Any]]:
    """What `output` holds already, by line; a line that was cut off when it was written is dropped."""
    if not output.exists():
        return {}
    content = output.read_bytes()
    whole = content.rfind(b"\n") + 1
    records: dict[int, dict[str, Any]] = {}
    for record in _records(content[:whole], output):
        number = record.get("line")
        if not isinstance(number, int) or number not in lines or record.get("of") != digest(lines[number]):
            raise UhdError(f"{output}: answers other questions; remove it, or give another -o")
        if record.get("run") != run:
            raise UhdError(
                f"{output}: was made from another bundle or with other options; remove it, or give another -o"
            )
        records[number] = record
    torn = content[whole:]
    if torn:
        heads = (_record_head(number, text, run) for number, text in lines.items())
        if not any(head[: len(torn)] == torn[: len(head)] for head in heads):
            raise _other_things(output)
        os.truncate(output, whole)
    return records


def rewrite(output: Path, records: dict[int, dict[str, Any]]) -> None:
    """Write `records` alone, so that `output` is whole or as it was."""
    from uhd_export.runtime.files import write_file

    write_file(output, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records.values()))


def _records(content: bytes, output: Path) -> Iterator[dict[str, Any]]:
    for line in content.split(b"\n"):
        if line:
            try:
                record = parse_json(line)
            except ValueError:
                record = None
            if not isinstance(record, dict):
                raise _other_things(output)
            yield record


def _origin(number: int, text: str, run: str) -> dict[str, Any]:
    """How a record begins: which line it answers, and in which run."""
    return {"line": number, "of": digest(text), "run": run}


def _record_head(number: int, text: str, run: str) -> bytes:
    return json.dumps(_origin(number, text, run), ensure_ascii=False)[:-1].encode()


def _other_things(output: Path) -> UhdError:
    return UhdError(f"{output}: holds other things than answers; give another -o")
