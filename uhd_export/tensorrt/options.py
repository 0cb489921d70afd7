"""What a user may choose about engines, and which GPUs a TensorRT can build for."""

from dataclasses import dataclass
from types import ModuleType

from uhd_export.runtime.engines.tensorrt.backend import describe_backend, supported_capabilities
from uhd_export.runtime.engines.tensorrt.cuda import current_capability
from uhd_export.runtime.errors import UhdError

# What an engine is built for where nobody says: every GPU that runs all our graphs (7.5 has neither int4
# nor float32 products).
DEFAULT_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")


@dataclass(frozen=True)
class EngineOptions:
    """How to build engines.

    `compute_capabilities` are the target GPUs ("8.6"), all in one engine; empty means
    DEFAULT_CAPABILITIES, and with backend "tensorrt", which knows no targets, the GPU at hand. `plugins`
    says whether custom operators run as plugins or as their function bodies. `workspace` is the most
    scratch memory of one layer in bytes. `tf32` lets float32 products round to TF32.
    `attention_accumulation` is the type in which the language model's attention adds up its products.
    """

    backend: str = "tensorrt-rtx"
    compute_capabilities: tuple[str, ...] = ()
    plugins: bool = True
    workspace: int | None = None
    tf32: bool = False
    attention_accumulation: str = "float32"


def target_capabilities(trt: ModuleType, options: EngineOptions) -> tuple[str, ...]:
    """The capabilities to build for. Raises UhdError naming one that the backend cannot build for."""
    if not describe_backend(options.backend).targets:
        return (_only_current(options),)
    supported = supported_capabilities(trt)
    targets = options.compute_capabilities or tuple(c for c in DEFAULT_CAPABILITIES if c in supported)
    for name in targets:
        if name not in supported:
            raise UhdError(
                f"compute capability {name}: {options.backend} {trt.__version__} builds for "
                f"{', '.join(supported)}; for other GPUs build on the device with --backend tensorrt"
            )
    return tuple(dict.fromkeys(targets))


def _only_current(options: EngineOptions) -> str:
    """The capability of the GPU at hand, the only one that `tensorrt` builds for."""
    current = current_capability()
    other = [name for name in options.compute_capabilities if name != current]
    if other:
        raise UhdError(
            f"compute capability {other[0]}: backend {options.backend} builds for the GPU at hand "
            f"({current}) only; use --backend tensorrt-rtx"
        )
    return current
