"""From a checkpoint to a bundle: the model in PyTorch, its ONNX graphs, engines and bundles."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uhd_export.bundle.build import build_bundle
    from uhd_export.bundle.check import check_bundle
    from uhd_export.model.uhd import load_model

    __version__: str

__all__ = ["__version__", "build_bundle", "check_bundle", "load_model"]

# Imported when asked for, so that parts without torch can be used without it.
_ORIGINS = {
    "build_bundle": "uhd_export.bundle.build",
    "check_bundle": "uhd_export.bundle.check",
    "load_model": "uhd_export.model.uhd",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("uhd-export")
    if name in _ORIGINS:
        return getattr(importlib.import_module(_ORIGINS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
