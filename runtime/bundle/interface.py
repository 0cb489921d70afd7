"""The interface of a bundle's engines: the inputs and outputs that its manifest promises, checked when it is
opened, so that no answer breaks off in the middle."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from uhd_export.runtime.bundle.manifest import Manifest
from uhd_export.runtime.engines.base import Engine, TensorInfo
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.encoder import PIXELS, TOKENS
from uhd_export.runtime.image.geometry import crop_geometry
from uhd_export.runtime.language.decoder import (
    EMBEDS,
    KEY_VALUE,
    LOGITS,
    LOGITS_SUM,
    PAST,
    PRESENT,
    ROWS,
    SEQUENCE_LENGTHS,
    TOKEN,
    TOTAL_LENGTH,
    VISIBLE,
    WRITE_INDEX,
)
from uhd_export.runtime.language.embeddings import EmbeddingTable

# Stands for a dimension that the runtime chooses anew in each run, whatever its name.
FREE = "*"
_FLOATS = ("float32", "float16")
# Two crops that have no dimension in common: what differs between their geometries must be free.
_CROPS = ((24, 22), (18, 30))


def check_vision(engine: Engine, manifest: Manifest) -> None:
    """Raise UhdError naming the first input or output of the vision engine that is not the manifest's."""
    model = manifest.model
    geometries = [
        crop_geometry(
            rows,
            cols,
            levels=model.projector.scales,
            side=model.projector.side,
            table=model.vision.table,
            patch=model.vision.patch,
        )
        for rows, cols in _CROPS
    ]
    inputs = {PIXELS: TensorInfo(_own_float(engine.inputs, PIXELS), (FREE, 3, FREE, FREE))}
    for name, one in geometries[0].items():
        if name in engine.inputs:  # which of them a graph needs depends on its projector
            other = geometries[1][name]
            dims = zip(one.shape, other.shape, strict=True)
            # RoI bins depend on the grid mode too.
            free = name.startswith(("roi_", "window_position_"))
            shape = [FREE if a != b or (free and axis == 1) else a for axis, (a, b) in enumerate(dims)]
            inputs[name] = TensorInfo(_own_float(engine.inputs, name), tuple(shape))
    tokens = (FREE, model.projector.side**2, model.projector.hidden)
    _check(engine, inputs, {TOKENS: TensorInfo(_own_float(engine.outputs, TOKENS), tokens)}, geometries[0])


def check_language(engine: Engine, manifest: Manifest) -> None:
    """Raise UhdError naming the first input or output of the language engine that is not the manifest's."""
    language = manifest.model.language
    float_type = np.dtype(manifest.precision.language)
    embeds = engine.inputs.get(EMBEDS)
    rows = ROWS if embeds is not None and embeds.shape[:1] == (ROWS,) else 1
    first = engine.inputs.get(PAST.format(0, KEY_VALUE[0]))
    capacity = first.shape[2] if first is not None and len(first.shape) == 4 else None
    if not (capacity == "capacity" or (isinstance(capacity, int) and capacity >= manifest.settings.context)):
        raise UhdError(
            f"{_name(engine)}: a cache of {capacity} positions where the manifest has "
            f"{manifest.settings.context}; build the bundle again"
        )
    inputs = {EMBEDS: TensorInfo(float_type, (rows, FREE, language.hidden))}
    if WRITE_INDEX in engine.inputs:
        inputs[WRITE_INDEX] = TensorInfo(np.dtype(np.int64), (rows,))
    if VISIBLE in engine.inputs:
        inputs[VISIBLE] = TensorInfo(np.dtype(np.bool_), (FREE,))
    else:
        inputs[SEQUENCE_LENGTHS] = TensorInfo(np.dtype(np.int32), (rows,))
        inputs[TOTAL_LENGTH] = TensorInfo(np.dtype(np.int32), ())
    outputs = {
        LOGITS: TensorInfo(_own_float(engine.outputs, LOGITS), (rows, 1, language.vocab)),
        TOKEN: TensorInfo(np.dtype(np.int64), (rows, 1)),
        LOGITS_SUM: TensorInfo(_own_float(engine.outputs, LOGITS_SUM), (rows, 1)),
    }
    cache = TensorInfo(
        np.dtype(manifest.precision.cache), (rows, language.kv_heads, capacity, language.head_size)
    )
    for layer in range(language.layers):
        for part in KEY_VALUE:
            inputs[PAST.format(layer, part)] = outputs[PRESENT.format(layer, part)] = cache
    _check(engine, inputs, outputs)


def check_embeddings(table: EmbeddingTable, manifest: Manifest) -> None:
    """Raise UhdError where the table has not a row of the model's width for every token."""
    language, separators = manifest.model.language, manifest.settings.separators
    if table.hidden != language.hidden or table.vocab < language.vocab:
        raise UhdError(
            f"embeddings of shape {[table.vocab, table.hidden]}, expected "
            f"{[language.vocab, language.hidden]} as the manifest says; build the bundle again"
        )
    if max(separators.comma, separators.newline) >= table.vocab:
        raise UhdError(
            f"manifest field settings.separators: {separators.comma} and {separators.newline} are not both "
            f"in the vocabulary of {table.vocab}; build the bundle again"
        )


def _own_float(tensors: Mapping[str, TensorInfo], name: str) -> np.dtype[Any]:
    """The type of `name` where it is a floating-point type that the runtime converts from or to."""
    info = tensors.get(name)
    return info.dtype if info is not None and info.dtype.name in _FLOATS else np.dtype(np.float32)


def _check(
    engine: Engine,
    inputs: Mapping[str, TensorInfo],
    outputs: Mapping[str, TensorInfo],
    loose: Collection[str] = (),
) -> None:
    for what, found, wanted in (("input", engine.inputs, inputs), ("output", engine.outputs, outputs)):
        for name in wanted:
            if name not in found:
                raise UhdError(f"{_name(engine)}: {what} {name} is missing; build the bundle again")
        for name, info in found.items():
            if name not in wanted:
                raise UhdError(f"{_name(engine)}: unknown {what} {name}; build the bundle again")
            if info.dtype != wanted[name].dtype or not _fits(info.shape, wanted[name].shape, name in loose):
                raise UhdError(
                    f"{_name(engine)}: {what} {name} is {_told(info)}, expected {_told(wanted[name])} as the "
                    "manifest says; build the bundle again"
                )


def _fits(shape: tuple[int | str, ...], wanted: tuple[int | str, ...], loose: bool) -> bool:
    """Whether a tensor of `shape` takes all of `wanted`; `loose` where a fixed size may be left free."""
    return len(shape) == len(wanted) and all(
        isinstance(size, str) if expected == FREE else size == expected or (loose and isinstance(size, str))
        for size, expected in zip(shape, wanted, strict=True)
    )


def _told(info: TensorInfo) -> str:
    return f"{info.dtype} ({', '.join(map(str, info.shape))})"


def _name(engine: Engine) -> str:
    return f"engine {getattr(engine, 'path', '')}".rstrip()
