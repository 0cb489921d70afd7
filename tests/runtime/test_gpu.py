"""Which GPU nvidia-smi is asked about: the one that CUDA calls by the number that is meant."""

import sys

import pytest

from uhd_export.runtime import gpu
from uhd_export.runtime.gpu import ask_gpu, tool_id
from uhd_export.runtime.memory import free_device_memory
from uhd_export.runtime.planning.bundle import room
from uhd_export.runtime.profiling.energy import EnergyMeter
from uhd_export.runtime.profiling.machine import machine

PLACES = ("0000:41:00.0", "0000:01:00.0")
"""Of CUDA's GPUs 0 and 1: the second on the bus is the faster one."""
_TOOL = f"""#!{sys.executable}
import sys
index = {{"--id={PLACES[1]}": 0, "--id={PLACES[0]}": 1}}.get(sys.argv[-1])
if index is None:
    sys.exit("No devices were found")
told = {{
    "memory.free": [1000, 2000], "power.draw": [50.0, 250.0], "name,driver_version": ["slow, 57", "fast, 57"]
}}
print(next(told[word[12:]] for word in sys.argv if word.startswith("--query-gpu="))[index])
"""


class Driver:
    """libcuda of a machine with two GPUs, as far as it is asked."""

    def cuInit(self, flags):
        return 0

    def cuDeviceGet(self, handle, number):
        handle._obj.value = 70 + number
        return 0 if number < len(PLACES) else 101

    def cuDeviceGetPCIBusId(self, place, size, handle):
        place.value = PLACES[handle.value - 70].encode()
        return 0


@pytest.fixture
def two_gpus(tmp_path, monkeypatch):
    """The driver and the tool of a machine whose GPUs the two number differently."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(_TOOL)
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpu.ctypes, "CDLL", lambda name: Driver())


def test_the_tool_is_asked_about_the_gpu_that_is_meant(two_gpus):
    assert [free_device_memory(number) for number in range(3)] == [2000 << 20, 1000 << 20, None]
    assert [room("cuda"), room("cuda:1"), room("cuda:2")] == [2000 << 20, 1000 << 20, None]
    assert machine("cuda", None)["gpu"] == "fast, 57"
    assert machine("cuda:1", None)["gpu"] == "slow, 57"
    assert machine("cuda:2", None)["gpu"] == "unknown"


@pytest.mark.parametrize("device, watts", [("cuda", 250), ("cuda:1", 50)])
def test_energy_is_of_the_gpu_that_is_meant(two_gpus, monkeypatch, device, watts):
    from uhd_export.runtime.profiling import energy

    now = iter([0.0, 2.0])
    monkeypatch.setattr(energy.time, "perf_counter", lambda: next(now))
    with EnergyMeter(device) as meter:
        meter._gpu.wait()
    assert meter.joules["gpu"] == 2 * watts


def test_without_the_driver_the_tool_counts(monkeypatch):
    def absent(name):
        raise OSError(name)

    monkeypatch.setattr(gpu.ctypes, "CDLL", absent)
    assert tool_id(1) == "1"
    monkeypatch.setattr(gpu.ctypes, "CDLL", lambda name: object())
    assert tool_id(0) == "0"


def test_without_the_tool_nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask_gpu("memory.free") is None
    assert free_device_memory() is None
