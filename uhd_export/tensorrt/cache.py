"""Built engines kept for the next time, under a key of everything that decides what they are."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from uhd_export.runtime.bundle.integrity import hash_file
from uhd_export.runtime.engines.tensorrt.backend import open_tensorrt
from uhd_export.runtime.engines.tensorrt.record import (
    EngineRecord,
    OptimizationProfile,
    read_record,
    record_path,
)
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.files import cache_folder, replacing
from uhd_export.runtime.progress import Progress
from uhd_export.tensorrt.builder import build_engine
from uhd_export.tensorrt.fingerprint import plugin_fingerprint
from uhd_export.tensorrt.options import EngineOptions, target_capabilities

# Change it whenever the same graph and options come to give another engine.
BUILDER_VERSION = 1
# The least recently used engines beyond this much are removed.
CACHE_LIMIT = 30 * 2**30


def engine_key(
    graph: Path,
    profiles: Sequence[OptimizationProfile],
    options: EngineOptions,
    output_types: Mapping[str, str] | None = None,
) -> str:
    """SHA-256 over the graph with its weights, profiles, options, plugins, and TensorRT's version."""
    trt = open_tensorrt(options.backend)
    weights = graph.with_name(f"{graph.name}.data")
    facts = {
        "builder": BUILDER_VERSION,
        "tensorrt": trt.__version__,
        "options": {**asdict(options), "compute_capabilities": target_capabilities(trt, options)},
        "plugins": plugin_fingerprint() if options.plugins else None,
        "graph": hash_file(graph),
        "weights": hash_file(weights) if weights.is_file() else None,
        "profiles": [asdict(profile) for profile in profiles],
        "output_types": dict(output_types or {}),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def cached_engine(
    graph: str | Path,
    out: str | Path,
    profiles: Sequence[OptimizationProfile],
    options: EngineOptions | None = None,
    *,
    output_types: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    folder: Path | None = None,
) -> EngineRecord:
    """Put the engine of `graph` at `out`, from the cache or built and kept there; returns its record.

    Arguments as for `build_engine`; `folder` replaces the user's cache. An engine in the cache that is not
    whole is built again. A cache that cannot be written does not stop the build.
    """
    graph, out, options = Path(graph), Path(out), options or EngineOptions()
    folder = folder or cache_folder() / "engines"
    key = engine_key(graph, profiles, options, output_types)
    entry = folder / f"{key}.engine"
    if _is_whole(entry, key):
        _copy(entry, out)
        with suppress(OSError):  # a read-only disk, or another user's
            os.utime(record_path(entry))
        return read_record(out)
    record = build_engine(
        graph, out, profiles, options, key=key, output_types=output_types, progress=progress
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _copy(out, entry)
        prune(folder, keep=entry)
    except OSError:  # a full or read-only disk; the engine itself is written
        with suppress(OSError):
            entry.unlink(missing_ok=True)
    return record


def prune(folder: Path, limit: int = CACHE_LIMIT, *, keep: Path | None = None) -> None:
    """Remove the least recently used engines until those left, with `keep`, take at most `limit` bytes."""
    records = sorted(folder.glob("*.engine.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    total = 0
    for record in records:
        engine = record.with_suffix("")
        total += engine.stat().st_size if engine.is_file() else 0
        if total > limit and engine != keep:
            record.unlink(missing_ok=True)
            engine.unlink(missing_ok=True)


def _is_whole(engine: Path, key: str) -> bool:
    try:
        record = read_record(engine)
    except UhdError:
        return False
    return record.key == key and hash_file(engine) == record.sha256


def _copy(source: Path, out: Path) -> None:
    """Copy an engine, then its record: who sees the record sees a whole engine."""
    for path, target in ((source, out), (record_path(source), record_path(out))):
        with replacing(target) as temporary:
            shutil.copyfile(path, temporary)
