"""A profile as plain facts, ready for JSON: what files, pictures and comparisons are made from."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.json_files import read_json
from uhd_export.runtime.profiling.machine import BUSY
from uhd_export.runtime.profiling.paper import PAPER, PAPER_NOTE
from uhd_export.runtime.profiling.profiler import Profile

KIND = "uhd-export profile"
_SCHEMA = 1


def describe_profile(profile: Profile) -> dict[str, Any]:
    """The profile ready for JSON, seconds, bytes and FLOPs as numbers, with the paper's rows."""
    facts = {"kind": KIND, "schema": _SCHEMA, **asdict(profile)}
    for mode, record in zip(profile.modes, facts["modes"], strict=True):
        for name, stage in mode.stages.items():
            record["stages"][name]["flops_per_second"] = stage.flops_per_second
        record["tokens_per_second"], record["peak_bytes"] = mode.tokens_per_second, mode.peak_bytes
    facts["warnings"] = warnings(profile)
    facts["paper"] = {
        "note": PAPER_NOTE,
        "rows": {
            grid_mode: {"training_hours": hours, "latency_seconds": latency, "training_gigabytes": gigabytes}
            for grid_mode, (hours, latency, gigabytes) in PAPER.items()
        },
    }
    return facts


def warnings(profile: Profile) -> list[str]:
    """What a reader must know before believing the figures."""
    found = []
    if profile.others is not None and profile.others > BUSY:
        found.append(
            f"the machine was busy: other work took {profile.others:.0%} of its processors meanwhile; "
            "these times are longer than they need be"
        )
    if profile.repeats < 3:
        found.append(f"{profile.repeats} runs are too few for an interval; use --repeats 5 or more")
    return found


def read_profile(path: Path) -> dict[str, Any]:
    """The facts that `profile --json` wrote to `path`. Raises UhdError where it is something else."""
    try:
        facts = read_json(path)
    except OSError as error:
        raise UhdError(f"profile {path}: cannot be read ({error})") from None
    if not isinstance(facts, dict) or facts.get("kind") != KIND:
        raise UhdError(f"profile {path}: is not what `uhd-export profile --json` writes")
    if facts.get("schema") != _SCHEMA:
        raise UhdError(
            f"profile {path}: schema {facts.get('schema')} is not {_SCHEMA}, which this program reads; "
            "profile again"
        )
    return facts


@contextmanager
def whole(*paths: Path) -> Iterator[None]:
    """What the block misses in facts that `read_profile` read from `paths` is told as a UhdError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        names = " ".join(map(str, paths))
        raise UhdError(
            f"profile {names}: not a whole profile ({type(error).__name__}: {error}); profile again"
        ) from None
