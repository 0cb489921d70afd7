"""From a bundle's graphs to its engines, for backends that run engines."""

from collections.abc import Sequence
from pathlib import Path

from uhd_export.checkpoint.config import CheckpointConfig
from uhd_export.checkpoint.fields import choice
from uhd_export.plugins.tensorrt.plugin import kernel_capability
from uhd_export.runtime.bundle.manifest import LANGUAGE, VISION, part_files
from uhd_export.runtime.choices import BACKENDS, DTYPES, ENGINE_BACKENDS
from uhd_export.runtime.engines.tensorrt.backend import open_tensorrt
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.encoder import TOKENS
from uhd_export.runtime.progress import progress_bar
from uhd_export.tensorrt import EngineOptions, cached_engine, language_profiles, vision_profiles
from uhd_export.tensorrt.options import target_capabilities


def engine_options(
    backend: str,
    compute_capabilities: Sequence[str] = (),
    plugins: bool = True,
    workspace: int | None = None,
    attention_accumulation: str = EngineOptions.attention_accumulation,
) -> EngineOptions | None:
    """How to build engines, or None where `backend` runs the graphs themselves. `workspace` is in MiB.

    Raises UhdError where the backend is not installed or cannot build for a compute capability, and where
    an option for engines is given to one that has none.
    """
    choice("backend", backend, BACKENDS)
    choice("attention_accumulation", attention_accumulation, DTYPES)
    if backend not in ENGINE_BACKENDS:
        given = {
            "--compute-capability": compute_capabilities,
            "--no-plugins": not plugins,
            "--workspace": workspace,
            "--attention-accumulation": attention_accumulation != EngineOptions.attention_accumulation,
        }
        for option in (option for option, value in given.items() if value):
            raise UhdError(f"{option}: is for engines; give it with --backend {' or '.join(ENGINE_BACKENDS)}")
        return None
    options = EngineOptions(
        backend=backend,
        compute_capabilities=tuple(compute_capabilities),
        plugins=plugins,
        workspace=None if workspace is None else workspace * 2**20,
        attention_accumulation=attention_accumulation,
    )
    targets = target_capabilities(open_tensorrt(backend), options)
    if plugins:
        for target in targets:
            kernel_capability(target)
    return options


def replace_graphs(
    folder: Path, config: CheckpointConfig, options: EngineOptions, dtype: str, context: int, progress: bool
) -> None:
    """Build the engines of the graphs in `folder`, and remove the graphs.

    Visual tokens leave the vision engine in `dtype`, in which the language engine takes them.
    """
    vision, language = (folder / name for name in part_files(options.backend))
    parts = (
        (folder / VISION, vision, vision_profiles(config), {TOKENS: dtype}),
        (folder / LANGUAGE, language, language_profiles(config.language, context), None),
    )
    for graph, engine, profiles, types in parts:
        with progress_bar(engine.name, show=progress) as bar:
            cached_engine(graph, engine, profiles, options, output_types=types, progress=bar.set)
        graph.unlink()
        graph.with_name(f"{graph.name}.data").unlink(missing_ok=True)
