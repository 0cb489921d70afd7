"""A campaign: cases of a kind in processes of their own, so that hangs and crashes are counted too."""

import contextlib
import json
import os
import select
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

OUTCOMES = ("taken", "refused", "traceback", "hang", "signal")
DEFECTS = OUTCOMES[2:]
# A case takes a second at most; the first loads libraries.
_SECONDS, _FIRST = 60, 180


@dataclass
class Result:
    """How the cases of a kind went, and what the defects said, by number."""

    kind: str
    counts: Counter = field(default_factory=Counter)
    defects: dict[int, str] = field(default_factory=dict)

    def __str__(self):
        counts = ", ".join(f"{self.counts[outcome]} {outcome}" for outcome in OUTCOMES)
        return f"{self.kind}: {sum(self.counts.values())} cases: {counts}"


def run(kind, seed, count, bundle):
    """Try `count` cases of `kind` from `seed`."""
    result, start = Result(kind), 0
    while start < count:
        start = _run_some(kind, seed, start, count, bundle, result)
    return result


def _run_some(kind, seed, start, count, bundle, result):
    """Cases from `start` on, until one ends its process; the first that is still to be tried."""
    tests = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(tests), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fuzz.worker", kind, str(seed), str(start), str(count), str(bundle)]
    process = subprocess.Popen(
        command, cwd=tests, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    current, limit, said = start, _FIRST, []
    while True:
        if not select.select([process.stdout], [], [], limit)[0]:
            process.kill()
            _note(result, current, "hang", f"no answer within {limit} s")
            break
        line = process.stdout.readline()
        if not line:
            break
        number, outcome, *detail = line.rstrip("\n").split(" ", 2)
        if not number.isdigit():
            continue  # what a library prints
        current = int(number)
        if outcome != "begun":
            limit = _SECONDS
            _note(result, current, outcome, json.loads(detail[0]))
            current += 1
    with contextlib.suppress(ValueError):
        said = process.communicate()[1].splitlines()[-5:]
    if process.returncode and process.returncode != -9 and current < count:
        _note(result, current, "signal", f"exit status {process.returncode}: {said}")
        return current + 1
    return current if current >= count else current + 1


def _note(result, number, outcome, detail):
    result.counts[outcome] += 1
    if outcome in DEFECTS:
        result.defects[number] = detail
