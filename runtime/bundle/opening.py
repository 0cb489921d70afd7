"""Opening a bundle: its files verified, its engines loaded, their interface compared with the manifest."""

from collections.abc import Callable
from pathlib import Path

from uhd_export.runtime.bundle.integrity import OpenFiles, verify_files
from uhd_export.runtime.bundle.interface import check_embeddings, check_language, check_vision
from uhd_export.runtime.bundle.manifest import EMBEDDINGS, Manifest, part_files
from uhd_export.runtime.engines.backends import open_engine
from uhd_export.runtime.engines.base import Engine
from uhd_export.runtime.language.embeddings import EmbeddingTable


def open_engines(
    folder: Path, manifest: Manifest, *, device: str | None = None, threads: int | None = None
) -> tuple[Engine, Engine, OpenFiles]:
    """The vision and the language engine of the bundle in `folder`, and its files as they are now.

    Raises UhdError where the bundle cannot be trusted or run; then nothing stays open.
    """
    files = OpenFiles(folder, manifest)
    verify_files(folder, manifest)
    check_embeddings(EmbeddingTable(folder / EMBEDDINGS), manifest)
    checks: tuple[Callable[[Engine, Manifest], None], ...] = (check_vision, check_language)
    engines: list[Engine] = []
    try:
        for name, check in zip(part_files(manifest.backend), checks, strict=True):
            engines.append(open_engine(folder / name, manifest.backend, device=device, threads=threads))
            check(engines[-1], manifest)
        files.check()
    except BaseException:
        for engine in engines:
            engine.close()
        raise
    return engines[0], engines[1], files
