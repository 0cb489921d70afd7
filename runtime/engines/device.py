"""Which device an engine runs on: "cpu", "cuda", or "cuda:1" for another GPU than the first."""

import ctypes
import platform
import re
from typing import NamedTuple

from uhd_export.runtime.errors import UhdError


class Device(NamedTuple):
    """A kind of device ("cpu" or "cuda"), and which of them."""

    kind: str
    number: int = 0

    def __str__(self) -> str:
        return f"{self.kind}:{self.number}" if self.number else self.kind


def parse_device(text: str) -> Device:
    """The device called `text`. Raises UhdError for another name."""
    found = re.fullmatch(r"(cpu|cuda)(?::(\d+))?", text)
    if not found or (found[1] == "cpu" and int(found[2] or 0)):
        raise UhdError(f"device {text!r}: unknown; use cpu, cuda, or cuda:1 for the second GPU")
    return Device(found[1], int(found[2] or 0))


def describe(device: Device) -> str:
    """The processor or the GPU, with its driver's version, as far as the driver tells without a toolkit."""
    if device.kind == "cpu":
        return platform.machine()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "a GPU without a name"
    name, handle, version = ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int()
    driver.cuInit(0)
    driver.cuDriverGetVersion(ctypes.byref(version))
    driver.cuDeviceGet(ctypes.byref(handle), device.number)
    driver.cuDeviceGetName(name, len(name), handle)
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return f"{name.value.decode() or 'a GPU without a name'}, driver for CUDA {cuda}"
