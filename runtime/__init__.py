"""What the device needs: no torch, no transformers."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uhd_export.runtime.conversation import Conversation
    from uhd_export.runtime.errors import UhdError
    from uhd_export.runtime.image.slicing import plan_slices
    from uhd_export.runtime.language.answer import Answer
    from uhd_export.runtime.pipeline import Pipeline
    from uhd_export.runtime.settings import Sampling

__all__ = ["Answer", "Conversation", "Pipeline", "Sampling", "UhdError", "plan_slices"]
_MODULES = {
    "Answer": "language.answer",
    "Conversation": "conversation",
    "Pipeline": "pipeline",
    "Sampling": "language.sampling",
    "UhdError": "errors",
    "plan_slices": "image.slicing",
}


def __getattr__(name: str) -> object:
    """Import what is public when it is asked for, so that planning alone needs no backend."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
