"""Energy, where the machine tells: processor packages through RAPL, an NVIDIA GPU through nvidia-smi."""

import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from uhd_export.runtime.engines.device import parse_device
from uhd_export.runtime.gpu import tool_id

_RAPL = Path("/sys/class/powercap")
_SECONDS = 0.2
_WATTS = [
    "nvidia-smi",
    "--query-gpu=power.draw",
    "--format=csv,noheader,nounits",
    f"--loop-ms={int(_SECONDS * 1000)}",
]


class EnergyMeter:
    """Joules between entering and leaving, by source; empty where the machine does not tell.

    The whole package or GPU is meant, whatever else it did.
    """

    def __init__(self, device: str) -> None:
        self._device, self.joules = parse_device(device), dict[str, float]()

    def __enter__(self) -> Self:
        self._gpu = None
        if self._device.kind != "cpu":
            command = [*_WATTS, f"--id={tool_id(self._device.number)}"]
            try:
                self._gpu = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                )
            except OSError:
                self._gpu = None
        self._start, self._packages = time.perf_counter(), _packages()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.perf_counter() - self._start
        for name, (before, most) in self._packages.items():
            after = _packages().get(name, (before, most))[0]
            used = after - before if after >= before else after + most - before  # the counter wraps
            self.joules[name] = used / 1e6
        if self._gpu is not None:
            self._gpu.terminate()
            told = self._gpu.communicate()[0]
            watts = [float(line) for line in told.split() if line.replace(".", "", 1).isdigit()]
            if watts:
                self.joules["gpu"] = sum(watts) / len(watts) * seconds


def _packages() -> dict[str, tuple[int, int]]:
    """(microjoules so far, where the counter wraps) of each processor package that may be read."""
    found = {}
    for folder in sorted(_RAPL.glob("intel-rapl:[0-9]")):
        try:
            name = (folder / "name").read_text().strip()
            counter = int((folder / "energy_uj").read_text())
            found[name] = (counter, int((folder / "max_energy_range_uj").read_text()))
        except (OSError, ValueError):
            continue
    return found
