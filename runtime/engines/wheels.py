"""Which ONNX Runtime is installed, and whether it can use a GPU.

`onnxruntime` and `onnxruntime-gpu` are two distributions of one package. Installed together they write over
each other's files, and what is imported then is neither; pip does not notice.
"""

import functools
import re
from contextlib import redirect_stdout
from importlib.metadata import Distribution, distributions
from io import StringIO
from pathlib import Path
from types import ModuleType

from uhd_export.runtime.errors import UhdError

CPU, GPU = "onnxruntime", "onnxruntime-gpu"
INSTALL_CPU, INSTALL_GPU = "pip install 'uhd-export[cpu]'", "pip install 'uhd-export[cuda]'"
CUDA_PROVIDER = "CUDAExecutionProvider"
_FAILURE = re.compile(r"CUDA failure \d+: [^;]*[^; ]")


def both_wheels() -> str | None:
    """What to do where both wheels lie in one folder, else None."""
    folders: dict[str, set[Path]] = {CPU: set(), GPU: set()}
    for found in distributions():
        name = _name(found)
        if name in folders:
            folders[name].add(Path(str(found.locate_file("onnxruntime"))).resolve())
    if not folders[CPU] & folders[GPU]:
        return None
    return (
        f"{CPU} and {GPU} are both installed and overwrite each other; "
        f"pip uninstall -y {CPU} {GPU}, then {INSTALL_GPU} (or [cpu])"
    )


def prepare_cuda(ort: ModuleType) -> str:
    """Make ready for sessions of `ort` on a GPU; what could not be loaded, in words, or nothing.

    Raises UhdError, with what to install, where this ONNX Runtime is not made for a GPU.
    """
    clash = both_wheels()
    if clash is not None:
        raise UhdError(f"device cuda: {clash}")
    if CUDA_PROVIDER not in ort.get_available_providers():
        raise UhdError(
            f"device cuda: this ONNX Runtime runs on the CPU only; pip uninstall -y {CPU}, then {INSTALL_GPU}"
        )
    return _preload(ort)


def cuda_refusal(said: str) -> str | None:
    """Why a device cannot be used, with the remedy, where it is that which ONNX Runtime `said`, else None.

    A driver that is too old shows first where the devices are counted, in the option for their number.
    """
    if (failure := _FAILURE.search(said)) is not None:
        return f"CUDA cannot use it ({failure[0]}); see nvidia-smi, and update the driver"
    return "there is no such GPU; see nvidia-smi -L" if "device_id" in said else None


@functools.cache
def _preload(ort: ModuleType) -> str:
    """Load CUDA's libraries from NVIDIA's wheels, where the loader would not look, else the system's.

    cuDNN is left out: no node of our graphs needs it. What fails is printed there, and returned here.
    """
    with redirect_stdout(StringIO()) as said:
        ort.preload_dlls(cuda=True, cudnn=False)
    return "; ".join(line for line in said.getvalue().splitlines() if line.startswith("Failed"))


def _name(found: Distribution) -> str:
    return (found.metadata["Name"] or "").lower().replace("_", "-")
