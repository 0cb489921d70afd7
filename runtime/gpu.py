"""What NVIDIA's own tool tells of a GPU, by the number that CUDA gives it."""

import ctypes
import subprocess


def ask_gpu(query: str, number: int = 0) -> str | None:
    """The answer to a query of nvidia-smi, without units, about GPU `number`; None where it does not tell."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    command.append(f"--id={tool_id(number)}")
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(told.splitlines()), None)


def tool_id(number: int) -> str:
    """What nvidia-smi knows GPU `number` by: its place on the bus, where the driver tells.

    The tool counts GPUs along the bus, and all of them. CUDA begins with the fastest, and leaves out those
    that CUDA_VISIBLE_DEVICES does not name.
    """
    place, handle = ctypes.create_string_buffer(32), ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        failed = (
            driver.cuInit(0)
            or driver.cuDeviceGet(ctypes.byref(handle), number)
            or driver.cuDeviceGetPCIBusId(place, len(place), handle)
        )
    except (OSError, AttributeError):  # no driver, or one that does not tell
        return str(number)
    return str(number) if failed else place.value.decode()
