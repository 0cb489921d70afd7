"""The machine that figures were measured on."""

import os
import platform


def machine(device: str, threads: int | None) -> dict[str, str]:
    """What the figures were measured on."""
    cores = os.cpu_count() or 1
    return {
        "processor": _processor(),
        "cores": str(cores),
        "threads": str(threads or cores),
        "device": device,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            found = next((line for line in lines if line.startswith("model name")), None)
    except OSError:
        found = None
    return found.split(":", 1)[1].strip() if found else platform.processor() or "unknown"
