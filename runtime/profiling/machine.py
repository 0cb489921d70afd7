"""The machine that figures were measured on, and how busy others kept it meanwhile."""

import importlib.metadata
import os
import platform
import time
from pathlib import Path

from uhd_export.runtime.engines.device import parse_device
from uhd_export.runtime.gpu import ask_gpu

# Above this share of the processors, figures are of a machine that did something else as well.
BUSY = 0.1
_STAT = Path("/proc/stat")
_DISTRIBUTIONS = ("uhd-export", "numpy", "pillow", "tokenizers", "onnxruntime", "onnxruntime-gpu")
_ENGINES = ("tensorrt", "tensorrt-rtx", "cuda-bindings")


def machine(device: str, threads: int | None) -> dict[str, str]:
    """What the figures were measured on."""
    cores = os.cpu_count() or 1
    facts = {
        "processor": _processor(),
        "cores": str(cores),
        "threads": str(threads or cores),
        "device": device,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    kind, number = parse_device(device)
    return facts if kind == "cpu" else {**facts, "gpu": ask_gpu("name,driver_version", number) or "unknown"}


def versions() -> dict[str, str]:
    """Versions of what ran, as far as it is installed."""
    found = {}
    for name in (*_DISTRIBUTIONS, *_ENGINES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class OtherWork:
    """Which share of the processors others used between its making and `share`; None where not known."""

    def __init__(self) -> None:
        self._start, self._own = _processor_times(), time.process_time()

    def share(self) -> float | None:
        """Of all processors, 0 to 1."""
        now, own = _processor_times(), time.process_time() - self._own
        if now is None or self._start is None or now[1] <= self._start[1]:
            return None
        busy, whole = now[0] - self._start[0], now[1] - self._start[1]
        return min(max((busy - own) / whole, 0.0), 1.0)


def _processor_times() -> tuple[float, float] | None:
    """(seconds in use, all seconds) of the processors together, since the machine started."""
    try:
        fields = [int(field) for field in _STAT.read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]]
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None
    idle = sum(fields[3:5])
    return (sum(fields) - idle) / ticks, sum(fields) / ticks


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            found = next((line for line in lines if line.startswith("model name")), None)
    except OSError:
        found = None
    return found.split(":", 1)[1].strip() if found else platform.processor() or "unknown"
