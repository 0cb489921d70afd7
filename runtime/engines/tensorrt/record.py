"""The record beside an engine file: what it is for, so that a wrong one is refused before it is loaded.

An engine is opaque, and TensorRT says little about one that it cannot load. `NAME.engine.json` says by
which version and for which GPUs it was built, and describes inputs, outputs and profiles without a GPU.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from uhd_export.runtime import typed_json
from uhd_export.runtime.choices import LARGEST_SIZE
from uhd_export.runtime.engines.base import TensorInfo
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.files import write_file
from uhd_export.runtime.json_files import read_json

RECORD_VERSION = 1
_DTYPES = ("float32", "float16", "int32", "int64", "int8", "uint8", "bool")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorRecord:
    """An input or output: a numpy type name, and a number or a name for each dimension."""

    dtype: str
    shape: tuple[str, ...]

    @property
    def info(self) -> TensorInfo:
        """As engines describe it."""
        return TensorInfo(np.dtype(self.dtype), tuple(int(d) if d.isdecimal() else d for d in self.shape))


@dataclass(frozen=True)
class ShapeRange:
    """The shapes of one input in a profile: `min`, `opt`, the one to tune for, and `max`."""

    min: Shape
    opt: Shape
    max: Shape

    def covers(self, shape: Shape) -> bool:
        """Whether every dimension of `shape` is in range."""
        return len(shape) == len(self.min) and all(
            low <= size <= high for low, size, high in zip(self.min, shape, self.max, strict=True)
        )


@dataclass(frozen=True)
class OptimizationProfile:
    """One optimization profile: a range for every input that has a free dimension."""

    name: str
    ranges: dict[str, ShapeRange]

    def covers(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether the profile serves inputs of these shapes."""
        return all(found.covers(shapes[name]) for name, found in self.ranges.items() if name in shapes)


@dataclass(frozen=True)
class EngineRecord:
    """What `NAME.engine.json` holds.

    `compute_capabilities` are those the engine runs on ("8.6"). `layers` counts the network's layers by
    type, and `plugin_layers` names those that are our plugins. `aliases` maps each output to the input
    whose memory it updates in place. `key` identifies everything that went into the build, `bytes` and
    `sha256` the engine file.
    """

    record_version: int
    backend: str
    tensorrt: str
    compute_capabilities: tuple[str, ...]
    layers: dict[str, int]
    plugin_layers: tuple[str, ...]
    inputs: dict[str, TensorRecord]
    outputs: dict[str, TensorRecord]
    aliases: dict[str, str]
    profiles: tuple[OptimizationProfile, ...]
    weight_bytes: int
    key: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class MemoryPlan:
    """Device memory of an engine in bytes, as far as it is known without a GPU.

    `state` are the buffers that are updated in place (the KV cache); `transfers` holds, for each profile,
    all other inputs and outputs at their largest. Activations are not in it: how much they take depends
    on the kernels that TensorRT chooses on the device.
    """

    weights: int
    state: int
    transfers: dict[str, int]


def plan_memory(record: EngineRecord) -> MemoryPlan:
    """The memory that an engine takes on the device."""
    state_names = set(record.aliases.values())
    state = sum(_nbytes(record.inputs[name], {}) for name in state_names)
    transfers = {}
    for profile in record.profiles:
        sizes: dict[str, int] = {}
        for name, found in profile.ranges.items():
            dims = zip(record.inputs[name].shape, found.max, strict=True)
            sizes |= {dim: most for dim, most in dims if not dim.isdecimal()}
        tensors = [tensor for name, tensor in record.inputs.items() if name not in state_names]
        tensors += [tensor for name, tensor in record.outputs.items() if name not in record.aliases]
        transfers[profile.name] = sum(_nbytes(tensor, sizes) for tensor in tensors)
    return MemoryPlan(record.weight_bytes, state, transfers)


def _nbytes(tensor: TensorRecord, sizes: Mapping[str, int]) -> int:
    return int(np.prod(tensor.info.resolve(sizes), dtype=np.int64)) * tensor.info.dtype.itemsize


def record_path(engine: str | Path) -> Path:
    """Where the record of the engine file `engine` lies."""
    return Path(f"{engine}.json")


def write_record(engine: str | Path, record: EngineRecord) -> None:
    """Write the record of the file `engine`, whole or not at all."""
    write_file(record_path(engine), json.dumps(dataclasses.asdict(record), indent=1) + "\n")


def read_record(engine: str | Path) -> EngineRecord:
    """The record of the file `engine`; UhdError where one of the two is missing or they do not match."""
    engine, path = Path(engine), record_path(engine)
    if not engine.is_file():
        raise UhdError(f"engine {engine}: no such file")
    try:
        content = read_json(path, "build the bundle again")
    except OSError as error:
        raise UhdError(f"engine {engine}: no record beside it ({error}); build the bundle again") from None
    version = content.get("record_version") if isinstance(content, dict) else None
    if version != RECORD_VERSION:
        raise UhdError(
            f"{path}: record version {version} instead of {RECORD_VERSION}; build the bundle again"
        )
    record = typed_json.read(EngineRecord, content, str(path))
    _validate(record, path)
    size = engine.stat().st_size
    if size != record.bytes:
        raise UhdError(f"engine {engine}: {size} bytes instead of {record.bytes}; copy it again or rebuild")
    return record


def _validate(record: EngineRecord, path: Path) -> None:
    """Raise UhdError naming the first tensor or profile that contradicts itself or another."""

    def refuse(field: str, reason: str) -> NoReturn:
        raise UhdError(f"{path}.{field}: {reason}; build the bundle again")

    for part, tensors in (("inputs", record.inputs), ("outputs", record.outputs)):
        for name, tensor in tensors.items():
            if tensor.dtype not in _DTYPES:
                refuse(f"{part}.{name}.dtype", f"{tensor.dtype!r} is no type of an engine's tensors")
            sizes = [int(dim) for dim in tensor.shape if dim.isdecimal() and len(dim) < 20]
            if len(tensor.shape) > 8 or max(sizes, default=0) > LARGEST_SIZE:
                refuse(f"{part}.{name}.shape", "is no shape of a tensor")
    for output, name in record.aliases.items():
        if output not in record.outputs or name not in record.inputs:
            refuse("aliases", f"{output!r} and {name!r} are not an output and an input")
    if not record.profiles or not record.compute_capabilities:
        refuse("profiles", "there must be one, and a compute capability")
    for profile in record.profiles:
        for name, found in profile.ranges.items():
            shape = record.inputs[name].shape if name in record.inputs else ()
            if not all(len(shape) == len(limit) for limit in (found.min, found.opt, found.max)):
                refuse(f"profiles.{profile.name}.{name}", "is not about an input of as many dimensions")
            if not all(0 <= size <= LARGEST_SIZE for size in (*found.min, *found.opt, *found.max)):
                refuse(f"profiles.{profile.name}.{name}", "has a size that no tensor has")
        free = {dim for tensor in record.inputs.values() for dim in tensor.shape if not dim.isdecimal()}
        named = {dim for name in profile.ranges for dim in record.inputs[name].shape}
        if free - named:
            refuse(f"profiles.{profile.name}", f"gives no range for {sorted(free - named)[0]!r}")
