"""Attention of the onnxruntime dialect: GroupQueryAttention over each format of the cache.

Its kernel for a cache of 8 bits is made for steps of decoding: it reads a quarter of the bytes. A prompt's
attention took it three times as long as in float (on a CPU), since it turns every integer back anew for each
position. So a long run attends in float, over what is fresh and, turned back once, what is cached, and the
integers of what is fresh are written beside it: the same integers as the kernel would write.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import onnx_ir as ir

from uhd_export.graph.cache import CacheFormat, Int8Cache, LayerScales
from uhd_export.plugins.graph import CONTRIB_DOMAIN, GraphBuilder
from uhd_export.runtime.config import LanguageConfig
from uhd_export.runtime.language.decoder import KEY_VALUE, ROWS, WRITE_INDEX

# Runs of more positions attend in float: both ways take as long at about 40, on two cores after 1066.
LONG_RUN = 32
# Of the cache's axes: rows, heads, positions, channels.
_POSITIONS = 2
_END = np.iinfo(np.int64).max


class GroupedAttention:
    """Emits one layer's attention after another.

    `embeds` (rows, S, hidden) are the graph's input; `lengths` (rows,) and `total` () are int32: the index of
    each row's last position, and the most positions of a row. `tables` are
    cos and sin, in the type of a float cache, else the graph's.
    """

    def __init__(
        self,
        builder: GraphBuilder,
        config: LanguageConfig,
        cache: CacheFormat,
        dtype: ir.DataType,
        embeds: ir.Value,
        lengths: ir.Value,
        total: ir.Value,
        tables: Sequence[ir.Value],
    ) -> None:
        self._builder, self._config, self._cache, self._dtype = builder, config, cache, dtype
        self._embeds, self._lengths, self._total, self._tables = embeds, lengths, total, tables

    def emit(
        self, layer: int, qkv: ir.Value, past: Sequence[ir.Value]
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """(out, key, value): the layer's output in the graph's type, and the updated cache."""
        name = f"model.layers.{layer}.self_attn"
        if isinstance(self._cache, Int8Cache):
            return self._emit_int8(name, qkv, past, self._cache.scales[layer])
        other = self._cache.type != self._dtype
        x = self._builder.op("Cast", qkv, to=self._cache.type) if other else qkv
        out, key, value = self._attend(name, x, past)
        return self._builder.op("Cast", out, to=self._dtype) if other else out, key, value

    def _attend(
        self,
        name: str,
        qkv: ir.Value,
        past: Sequence[ir.Value],
        scales: Sequence[ir.Value] | None = None,
    ) -> tuple[ir.Value, ...]:
        """One node, which takes q, k and v as they are, side by side."""
        inputs: list[ir.Value | None] = [qkv, None, None, *past, self._lengths, self._total, *self._tables]
        attributes: dict[str, int | str] = {
            "num_heads": self._config.heads,
            "kv_num_heads": self._config.kv_heads,
            "do_rotary": 1,
        }
        if scales is not None:
            inputs += [None, None, None, *scales]
            attributes |= {f"{part}_quant_type": "PER_CHANNEL" for part in "kv"} | {"kv_cache_bit_width": 8}
        return self._builder.ops(
            "GroupQueryAttention", *inputs, domain=CONTRIB_DOMAIN, outputs=3, name=name, **attributes
        )

    def _emit_int8(
        self, name: str, qkv: ir.Value, past: Sequence[ir.Value], scales: LayerScales
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        builder, pair = self._builder, (scales.key, scales.value)

        def weight(what: str, array: np.ndarray, dtype: ir.DataType) -> ir.Value:
            return builder.weight(f"{name}.{what}", array.shape, dtype, lambda: array)

        def short() -> tuple[ir.Value, ...]:
            steps = [
                weight(f"{part}.scale", scale.reshape(-1), ir.DataType.FLOAT)
                for part, scale in zip(KEY_VALUE, pair, strict=True)
            ]
            return self._attend(f"{name}/short", qkv, past, steps)

        def long() -> list[ir.Value]:
            wide = [scale[None, :, None] for scale in pair]
            floats = []
            for part, cached, step in zip(KEY_VALUE, past, wide, strict=True):
                old = self._slice(cached, builder.constant([0]), start)
                old = builder.op("Cast", old, to=self._dtype)
                floats.append(builder.op("Mul", old, weight(f"{part}.step", step, self._dtype)))
            out, *present = self._attend(f"{name}/long", qkv, floats)
            updated = []
            for part, cached, new, step in zip(KEY_VALUE, past, present, wide, strict=True):
                fresh = self._slice(new, start, builder.constant([_END]))
                # A kernel that divides by a scale a channel takes 20 times as long.
                fresh = builder.op("Mul", fresh, weight(f"{part}.factor", 1 / step, self._dtype))
                one = builder.constant(1, self._dtype.numpy())
                integers = builder.op("QuantizeLinear", fresh, one, builder.constant(0, np.int8))
                updated.append(
                    builder.op("TensorScatter", cached, integers, start, axis=_POSITIONS, mode="linear")
                )
            return [out, *updated]

        is_long, start = self._is_long, self._start  # made outside of the branches
        out, key, value = builder.ops(
            "If",
            is_long,
            outputs=3,
            name=name,
            then_branch=builder.branch(f"{name}/long/", long),
            else_branch=builder.branch(f"{name}/short/", short),
        )
        return out, key, value

    @cached_property
    def _start(self) -> ir.Value:
        """(rows,): where in the cache the run's positions go."""
        return self._builder.input(WRITE_INDEX, ir.DataType.INT64, (ROWS,))

    @cached_property
    def _is_long(self) -> ir.Value:
        """Whether the run attends in float: it has many positions, of one row."""
        builder = self._builder
        rows, positions = (builder.op("Squeeze", builder.dim(self._embeds, axis)) for axis in (0, 1))
        many = builder.op("Greater", positions, builder.constant(LONG_RUN))
        return builder.op("And", many, builder.op("Equal", rows, builder.constant(1)))

    def _slice(self, x: ir.Value, start: ir.Value, stop: ir.Value) -> ir.Value:
        return self._builder.op("Slice", x, start, stop, self._builder.constant([_POSITIONS]))
