"""Devices by name, with what their data sheets say."""

from dataclasses import dataclass

from uhd_export.runtime.errors import UhdError


@dataclass(frozen=True)
class Device:
    """Data-sheet figures: bytes and dense float16 FLOPs a second, and bytes of memory."""

    name: str
    bandwidth: float
    flops: float
    memory: float | None = None


KNOWN_DEVICES = (
    Device("H200", 4.8e12, 989e12, 141e9),
    Device("RTX 4090", 1.0e12, 165e12, 24e9),
    Device("Jetson AGX Orin", 0.2e12, 42e12, 64e9),
    Device("H100", 3.35e12, 989e12, 80e9),
    Device("A100", 2.0e12, 312e12, 80e9),
    Device("RTX 3090", 0.936e12, 71e12, 24e9),
    Device("RTX 5090", 1.79e12, 209e12, 32e9),
)


def known_device(name: str) -> Device:
    """The device called `name`, in whichever case. Raises UhdError where none or several are."""
    words = name.lower().replace("-", " ").split()
    found = [device for device in KNOWN_DEVICES if device.name.lower().split() == words]
    found = found or [d for d in KNOWN_DEVICES if set(words) <= set(d.name.lower().split())]
    if len(found) != 1:
        names = ", ".join(device.name for device in found or KNOWN_DEVICES)
        raise UhdError(f"device {name!r}: must be one of {names}")
    return found[0]
