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
    CACHES,
    DTYPES,
    ENGINE_BACKENDS,
    GRID_MODES,
    HEADS,
    LARGEST_SIZE,
    LAYOUTS,
    MOST_LAYERS,
    PYRAMIDS,
    ROI_ROUNDINGS,
)
from uhd_export.runtime.config import LANGUAGE_KINDS, ModelConfig
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.files import write_file
from uhd_export.runtime.json_files import parse_json, read_json
from uhd_export.runtime.language.prompt import TEMPLATES
from uhd_export.runtime.settings import Settings

MANIFEST = "manifest.json"
SCHEMA_VERSION = 6
VISION, LANGUAGE = "vision.onnx", "language.onnx"
EMBEDDINGS, TOKENIZER = "embeddings.npy", "tokenizer.json"
# What was measured while the checkpoint was quantized, where it was.
QUALITY, QUALITY_CHART = "quantization_report.json", "quantization_report.png"


@dataclass(frozen=True)
class Source:
    """Where the weights came from: the id or path given, and what identifies its content.

    `revision` is the hub's commit, None where the source is not of the hub's cache. `weights` maps each
    safetensors file to its size in bytes. `config` and `vision_tower` are the replacements given at build,
    or None.
    """

    id: str
    revision: str | None
    config_sha256: str
    weights: dict[str, int]
    release: str
    config: str | None
    vision_tower: str | None
    mask: int | None


@dataclass(frozen=True)
class Precision:
    """Types of the weights of each part, and of the key-value cache."""

    vision: str
    language: str
    embeddings: str
    cache: str


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

    @property
    def head_bits(self) -> int | None:
        """Bits of the head's weights; None where it is dense."""
        return HEADS[self.lm_head]


@dataclass(frozen=True)
class VisionQuantization:
    """Dense products of the vision part by name, each with the error that 8 bits cause in its output.

    `int8` are rounded, `dense` are not since it was too much; measured on `images` images.
    """

    int8: dict[str, float]
    dense: dict[str, float]
    images: int


@dataclass(frozen=True)
class CacheQuantization:
    """Scales of a cache in 8 bits come from `sequences` conversations, of `positions` together.

    On these, `key_error` and `value_error` are what rounding costs, ||q(x) - x|| / ||x||, in the worst layer.
    """

    sequences: int
    positions: int
    key_error: float
    value_error: float


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
    cache_quantization: CacheQuantization | None = None


def part_files(backend: str) -> tuple[str, str]:
    """Names of the vision and the language part in a bundle for `backend`."""
    if backend in ENGINE_BACKENDS:
        return "vision.engine", "language.engine"
    return VISION, LANGUAGE


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest` into `folder`, whole or not at all. Raises UhdError where no reader would take it."""
    validate(manifest, str(folder / MANIFEST))
    content = dataclasses.asdict(manifest)
    record = {"schema_version": content.pop("schema_version"), "digest": "", **content}
    record["digest"] = _digest(record)
    text = json.dumps(record, indent=2) + "\n"
    typed_json.read(Manifest, _without_digest(parse_json(text)), str(folder / MANIFEST))
    write_file(folder / MANIFEST, text)


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of the bundle in `folder`, its own digest verified.

    Raises UhdError where it is missing, broken, altered or of a newer schema.
    """
    path = Path(folder) / MANIFEST
    record = _read_record(path)
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
    _check_digest(record, path)
    manifest = typed_json.read(Manifest, _without_digest(record), str(path))
    validate(manifest, str(path))
    return manifest


def bundle_files(folder: Path) -> set[str]:
    """The names of the files that make up the bundle in `folder`, of whichever schema version.

    Raises UhdError where its manifest is not one that this program wrote.
    """
    path = folder / MANIFEST
    record = _read_record(path)
    _check_digest(record, path)
    files = record.get("files")
    if not isinstance(files, dict) or not all(_is_plain(name) for name in files):
        raise UhdError(f"{path}.files: must list plain file names")
    return {MANIFEST, *files}


def _read_record(path: Path) -> dict[str, Any]:
    """The object in `path`, which has a schema version. Raises UhdError."""
    try:
        record = read_json(path, "build the bundle again")
    except (FileNotFoundError, NotADirectoryError):
        raise UhdError(
            f"bundle {path.parent}: no {MANIFEST}; make a bundle with `uhd-export build`"
        ) from None
    if not isinstance(record, dict) or type(record.get("schema_version")) is not int:
        raise UhdError(f"{path}: field schema_version is missing; build the bundle again")
    return record


def _check_digest(record: dict[str, Any], path: Path) -> None:
    if record.get("digest") != _digest(record):
        raise UhdError(f"{path}: altered since it was written (digest differs); build the bundle again")


def _without_digest(record: Any) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name != "digest"}


def _is_plain(name: str) -> bool:
    """Whether `name` stays in its folder, also as Windows reads it, with its separators and drives."""
    return bool(name) and PureWindowsPath(name).name == name and not name.startswith(".")


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_without_digest(record), sort_keys=True).encode()).hexdigest()


def validate(manifest: Manifest, path: str) -> None:
    """Refuse values that the program cannot run, and file names that leave the folder. Raises UhdError.

    `path` is what messages call the manifest.
    """
    settings, model, precision = manifest.settings, manifest.model, manifest.precision
    for field, value, allowed in (
        ("backend", manifest.backend, BACKENDS),
        ("precision.vision", precision.vision, DTYPES),
        ("precision.language", precision.language, DTYPES),
        ("precision.embeddings", precision.embeddings, DTYPES),
        ("precision.cache", precision.cache, CACHES),
        ("model.projector.kind", model.projector.kind, ("hiwin", "v1")),
        ("model.projector.pyramid", model.projector.pyramid, PYRAMIDS),
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
        most = MOST_LAYERS if field.endswith(".layers") else LARGEST_SIZE
        if type(size) is int and size > most:
            raise UhdError(f"{path}.{field}: {size} is more than {most}; is the manifest damaged?")
    _check_model(manifest, path)
    if settings.context > model.language.context:
        raise UhdError(
            f"{path}.settings.context: {settings.context} is over the model's {model.language.context}"
        )
    for name in manifest.files:
        if not _is_plain(name):
            raise UhdError(f"{path}.files: {name!r} is not a plain file name")
    for name, record in manifest.files.items():
        if not 0 <= record.bytes < 2**63:
            raise UhdError(f"{path}.files.{name}.bytes: {record.bytes} is no size of a file")
    for name in (EMBEDDINGS, TOKENIZER, *part_files(manifest.backend)):
        if name not in manifest.files:
            raise UhdError(f"{path}.files: {name} is missing; build the bundle again")


def _check_model(manifest: Manifest, path: str) -> None:
    """Raise UhdError where sizes contradict each other, or ids are no tokens."""
    vision, projector, language = manifest.model.vision, manifest.model.projector, manifest.model.language
    for field, divisor, number in (
        ("vision.heads", vision.heads, vision.hidden),
        ("vision.patch", vision.patch, vision.image_size),
        ("language.kv_heads", language.kv_heads, language.heads),
    ):
        if number % divisor:
            raise UhdError(
                f"{path}.model.{field}: {divisor} does not divide {number}; build the bundle again"
            )
    for field, one, other in (
        ("projector.hidden", projector.hidden, language.hidden),
        ("projector.vision_hidden", projector.vision_hidden, vision.hidden),
    ):
        if one != other:
            raise UhdError(f"{path}.model.{field}: {one} must be {other}; build the bundle again")
    separators = manifest.settings.separators
    ids = {"settings.separators": (separators.comma, separators.newline), "model.language.eos": language.eos}
    for field, tokens in ids.items():
        if not all(0 <= token < LARGEST_SIZE for token in tokens):
            raise UhdError(f"{path}.{field}: {list(tokens)[:8]} are no token ids; build the bundle again")


def _sizes(manifest: Manifest) -> Iterator[tuple[str, float]]:
    """Every number that counts or measures something, by its field."""
    parts = {f"model.{part}": shape for part, shape in dataclasses.asdict(manifest.model).items()}
    for part, values in (parts | {"settings": dataclasses.asdict(manifest.settings)}).items():
        for name, value in values.items():
            if type(value) in (int, float) and name != "bos":  # an id may be zero
                yield f"{part}.{name}", value
