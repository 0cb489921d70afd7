"""The bundle's manifest: what the folder holds, how to run it, and the evidence that it is right.

A bundle is a folder with `manifest.json` and the files that it lists, nothing else. Reading is
strict: whatever is missing, unknown, newer or altered is refused with the reason. The digests show
damage and careless edits; they are no signature, so they don't say who made the bundle.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from uhd_export.runtime import typed_json
from uhd_export.runtime.choices import (
    BACKENDS,
    DTYPES,
    ENGINE_BACKENDS,
    GRID_MODES,
    LAYOUTS,
    ROI_ROUNDINGS,
)
from uhd_export.runtime.config import LANGUAGE_KINDS, ModelConfig
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.files import write_file
from uhd_export.runtime.language.prompt import TEMPLATES
from uhd_export.runtime.settings import Settings

MANIFEST = "manifest.json"
SCHEMA_VERSION = 3
VISION, LANGUAGE = "vision.onnx", "language.onnx"
EMBEDDINGS, TOKENIZER = "embeddings.npy", "tokenizer.json"
# What was measured while the checkpoint was quantized, where it was.
QUALITY, QUALITY_CHART = "quantization_report.json", "quantization_report.png"


@dataclass(frozen=True)
class Source:
    """Where the weights came from: the id or path given, and what identifies its content.

    `weights` maps each safetensors file to its size in bytes. `config` and `vision_tower` are the
    replacements given at build, or None.
    """

    id: str
    config_sha256: str
    weights: dict[str, int]
    release: str
    config: str | None
    vision_tower: str | None
    mask: int | None


@dataclass(frozen=True)
class Precision:
    """Types of the weights of each part."""

    vision: str
    language: str
    embeddings: str


@dataclass(frozen=True)
class Quantization:
    """The language model's linear layers as 4-bit integers in groups of `group` inputs.

    `method` is gptq, rtn (rounded to the nearest) or None where only the head is quantized; `lm_head`
    dense, int8 or int4; `activations` int8 or float, the type in which ONNX Runtime multiplies.
    """

    method: str | None
    group: int
    symmetric: bool
    act_order: bool
    lm_head: str
    activations: str


@dataclass(frozen=True)
class VisionQuantization:
    """Dense products of the vision part by name, each with the error that 8 bits cause in its output.

    `int8` are rounded, `dense` are not since it was too much; measured on `images` images.
    """

    int8: dict[str, float]
    dense: dict[str, float]
    images: int


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file."""

    bytes: int
    sha256: str


STORED = "the weights as stored, in PyTorch"
"""What a bundle's graphs must compute, rounded weights included."""


@dataclass(frozen=True)
class Parity:
    """One measured difference, on named inputs, from what `against` names.

    `value` is None where it was not measured, and `skipped` says why. `limit` None means that the
    figure is for information.
    """

    part: str
    inputs: str
    metric: str
    value: float | None
    limit: float | None
    skipped: str | None
    against: str = STORED

    @property
    def ok(self) -> bool:
        """Within the limit, or without one, or not measured."""
        return self.value is None or self.limit is None or self.value <= self.limit


@dataclass(frozen=True)
class Manifest:
    """The whole record, as `manifest.json` holds it (its digest field aside)."""

    schema_version: int
    backend: str
    fold: bool
    precision: Precision
    source: Source
    model: ModelConfig
    settings: Settings
    tools: dict[str, str]
    parity: tuple[Parity, ...]
    files: dict[str, FileRecord]
    quantization: Quantization | None = None
    vision_quantization: VisionQuantization | None = None


def part_files(backend: str) -> tuple[str, str]:
    """Names of the vision and the language part in a bundle for `backend`."""
    if backend in ENGINE_BACKENDS:
        return "vision.engine", "language.engine"
    return VISION, LANGUAGE


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest` into `folder`, whole or not at all."""
    content = dataclasses.asdict(manifest)
    record = {"schema_version": content.pop("schema_version"), "digest": "", **content}
    record["digest"] = _digest(record)
    write_file(folder / MANIFEST, json.dumps(record, indent=2) + "\n")


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of the bundle in `folder`, its own digest verified.

    Raises UhdError where it is missing, broken, altered or of a newer schema.
    """
    path = Path(folder) / MANIFEST
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UhdError(f"bundle {folder}: no {MANIFEST}; make a bundle with `uhd-export build`") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UhdError(f"{path}: cannot be read ({error}); build the bundle again") from None
    if not isinstance(record, dict) or not isinstance(record.get("schema_version"), int):
        raise UhdError(f"{path}: field schema_version is missing; build the bundle again")
    if record["schema_version"] > SCHEMA_VERSION:
        raise UhdError(
            f"{path}: schema version {record['schema_version']} is newer than {SCHEMA_VERSION}, the newest "
            "this program reads; upgrade uhd-export"
        )
    if record["schema_version"] < SCHEMA_VERSION:
        raise UhdError(
            f"{path}: schema version {record['schema_version']} is older than {SCHEMA_VERSION}, the only one "
            "this program reads; build the bundle again"
        )
    if record.get("digest") != _digest(record):
        raise UhdError(f"{path}: altered since it was written (digest differs); build the bundle again")
    del record["digest"]
    manifest = typed_json.read(Manifest, record, str(path))
    _validate(manifest, path)
    return manifest


def _digest(record: dict[str, Any]) -> str:
    content = {name: value for name, value in record.items() if name != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _validate(manifest: Manifest, path: Path) -> None:
    """Refuse values that the program cannot run, and file names that leave the folder."""
    settings, model, precision = manifest.settings, manifest.model, manifest.precision
    for field, value, allowed in (
        ("backend", manifest.backend, BACKENDS),
        ("precision.vision", precision.vision, DTYPES),
        ("precision.language", precision.language, DTYPES),
        ("precision.embeddings", precision.embeddings, DTYPES),
        ("model.projector.kind", model.projector.kind, ("hiwin", "v1")),
        ("model.language.kind", model.language.kind, tuple(LANGUAGE_KINDS)),
        ("settings.layout", settings.layout, LAYOUTS),
        ("settings.template", settings.template, TEMPLATES),
        ("settings.grid_mode", settings.grid_mode, GRID_MODES),
        ("settings.roi_rounding", settings.roi_rounding, ROI_ROUNDINGS),
    ):
        if value not in allowed:
            raise UhdError(f"{path}.{field}: {value!r} is not supported; expected {', '.join(allowed)}")
    levels = model.projector.levels
    if levels[:1] != (1,) or levels != tuple(scale for scale in (1, 2, 4, 8) if scale in levels):
        raise UhdError(f"{path}.model.projector.levels: {list(levels)} must be 1 and some of 2, 4, 8")
    for field, size in _sizes(manifest):
        if not 0 < size < math.inf:
            raise UhdError(f"{path}.{field}: {size} must be above zero; build the bundle again")
    if settings.context > model.language.context:
        raise UhdError(
            f"{path}.settings.context: {settings.context} is over the model's {model.language.context}"
        )
    for name in manifest.files:
        # As Windows reads it, so that separators of both kinds and drives are refused everywhere.
        if not name or PureWindowsPath(name).name != name or name.startswith("."):
            raise UhdError(f"{path}.files: {name!r} is not a plain file name")
    for name in (EMBEDDINGS, TOKENIZER):
        if name not in manifest.files:
            raise UhdError(f"{path}.files: {name} is missing; build the bundle again")


def _sizes(manifest: Manifest) -> Iterator[tuple[str, float]]:
    """Every number that counts or measures something, by its field."""
    parts = {f"model.{part}": shape for part, shape in dataclasses.asdict(manifest.model).items()}
    for part, values in (parts | {"settings": dataclasses.asdict(manifest.settings)}).items():
        for name, value in values.items():
            if type(value) in (int, float) and name != "bos":  # an id may be zero
                yield f"{part}.{name}", value
