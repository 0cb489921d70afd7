"""What the device needs: no torch, no transformers."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uhd_export.runtime.pipeline import Pipeline

__all__ = ["Pipeline"]


def __getattr__(name: str) -> object:
    """Import `Pipeline` when asked for, so that planning alone needs no backend."""
    if name == "Pipeline":
        from uhd_export.runtime.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
