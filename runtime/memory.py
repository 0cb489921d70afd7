"""Memory of this machine and this process, where the operating system tells."""

import contextlib
import sys
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping, within the control group's limit; None if unknown."""
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    try:
        limit = int((_CGROUP / "memory.max").read_text())  # "max" where there is no limit
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return max(min(free, limit - used), 0)


def reset_peak() -> None:
    """Forget the peak that `peak_memory` tells, where the system can (Linux); elsewhere it stays."""
    # "5" resets the peak of resident memory: proc(5), /proc/pid/clear_refs.
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text("5")


def peak_memory() -> int | None:
    """The most resident memory of this process since `reset_peak`, in bytes; None where it is not known.

    Where the peak cannot be reset (macOS), it is the most since the process began.
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
