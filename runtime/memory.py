"""Memory of this machine and this process, where the operating system tells."""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uhd_export.runtime.gpu import ask_gpu

_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")
_STATM = Path("/proc/self/statm")
_CGROUP, _GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping, within the control groups' limits; None if unknown."""
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    return max(min([free, *_group_rooms()]), 0)


def _group_rooms() -> Iterator[int]:
    """What each limit of this process's control groups leaves, of both versions; its group's and the root's.

    Cached pages of files that can be dropped are not counted as used.
    """
    try:
        lines = [line.split(":", 2) for line in _GROUPS.read_text().splitlines()]
    except OSError:
        lines = []
    places = {"memory": {_CGROUP / "memory"}, "": {_CGROUP, _CGROUP / "unified"}}
    for _, controllers, path in lines:
        for kind in set(controllers.split(",")) & places.keys():
            places[kind] |= {root / path.strip("/") for root in tuple(places[kind])}
    for kind, limit, used in (
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        ("", "memory.max", "memory.current"),
    ):
        for folder in places[kind]:
            try:  # "max" where there is no limit
                room = int((folder / limit).read_text()) - int((folder / used).read_text())
            except (OSError, ValueError):
                continue
            yield room + _droppable(folder / "memory.stat")


def _droppable(stat: Path) -> int:
    try:
        found = dict(line.split(" ", 1) for line in stat.read_text().splitlines())
        return int(found.get("total_inactive_file", found.get("inactive_file", 0)))
    except (OSError, ValueError):
        return 0


def free_device_memory(number: int = 0) -> int | None:
    """Bytes that are free on the GPU of that number, as NVIDIA's own tool tells; None where it does not."""
    told = ask_gpu("memory.free", number)
    return int(told) << 20 if told is not None and told.strip().isdecimal() else None


def peak_memory() -> int | None:
    """The most resident memory of this process so far, in bytes; None where it is not known.

    On Linux it is this process's alone, where getrusage(2) also tells what its parent had when it forked.
    """
    try:
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory() -> int | None:
    """Resident memory of this process now, in bytes; None where it is not known."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError, AttributeError):
        return None


def return_memory() -> None:
    """Give freed memory that the C library keeps back to the system, where it has a call for that (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@dataclass(frozen=True)
class Apart:
    """What a function returned in a process of its own, and that process's peak of memory."""

    result: Any
    peak_bytes: int | None


def run_apart(function: Callable[..., object], **arguments: object) -> Apart | None:
    """`function(**arguments)` in a process of its own that does nothing else.

    `function` is one of a module; arguments and result go as JSON. None where the process failed, as for
    lack of memory.
    """
    code = (
        "import json, sys; from uhd_export.runtime.memory import peak_memory; "
        f"from {function.__module__} import {function.__name__} as function; "
        "result = function(**json.load(sys.stdin)); print(json.dumps([result, peak_memory()]))"
    )
    # Not multiprocessing, which would run the program again that this one is part of.
    command = [sys.executable, "-P", "-c", code]  # -P: nothing is imported from the current folder
    done = subprocess.run(command, input=json.dumps(arguments), capture_output=True, text=True)
    return Apart(*json.loads(done.stdout.splitlines()[-1])) if done.returncode == 0 else None
