"""From a checkpoint to a bundle: the model in PyTorch, its ONNX graphs, engines and bundles."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uhd_export.model.uhd import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> object:
    """Import `load_model` when asked for, so that parts without torch can be used without it."""
    if name == "load_model":
        from uhd_export.model.uhd import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
