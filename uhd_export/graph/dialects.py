"""What differs between backends in the language graph: norms, attention, the KV cache and its inputs."""

from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np
import onnx_ir as ir

from uhd_export.graph.cache import CacheFormat, FloatCache, Int8Cache
from uhd_export.graph.grouped_attention import GroupedAttention
from uhd_export.graph.linear import TensorSource
from uhd_export.plugins.graph import CONTRIB_DOMAIN, GraphBuilder
from uhd_export.runtime.config import LanguageConfig
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.language.decoder import (
    EMBEDS,
    KEY_VALUE,
    PAST,
    PRESENT,
    ROWS,
    SEQUENCE_LENGTHS,
    TOTAL_LENGTH,
    VISIBLE,
    WRITE_INDEX,
)


def rotary_cache(config: LanguageConfig, context: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, float64, (context, head_size / 2), of the rotary embedding (arXiv 2104.09864, eq. 15).

    Computed in float64, so that rounding to the graph's type is the only error.
    """
    frequency = config.rope_theta ** (-np.arange(0, config.head_size, 2) / config.head_size)
    angle = np.arange(context)[:, None] * frequency
    return np.cos(angle), np.sin(angle)


class Dialect(ABC):
    """Declares a graph's inputs and cache, and emits what backends have different operators for."""

    def __init__(
        self,
        config: LanguageConfig,
        source: TensorSource,
        dtype: ir.DataType,
        context: int,
        cache: CacheFormat,
    ) -> None:
        self.config, self.source, self.dtype, self.context = config, source, dtype, context
        self.cache = cache
        self.builder = GraphBuilder("language", opset=self.opset)
        self.embeds = self.builder.input(EMBEDS, dtype, (self.rows, "sequence", config.hidden))
        self._declare_positions()
        cos, sin = rotary_cache(config, context)
        self._cos = self.builder.weight("rotary.cos", cos.shape, self.attention_dtype, lambda: cos)
        self._sin = self.builder.weight("rotary.sin", sin.shape, self.attention_dtype, lambda: sin)
        self._cache_shape = (self.rows, config.kv_heads, self.capacity, config.head_size)
        self._past = [
            [self.builder.input(PAST.format(i, part), cache.type, self._cache_shape) for part in KEY_VALUE]
            for i in range(config.layers)
        ]
        self._present: list[tuple[ir.Value, ir.Value]] = []

    @property
    def attention_dtype(self) -> ir.DataType:
        """The type in which attention computes."""
        return self.dtype

    @property
    @abstractmethod
    def opset(self) -> int:
        """Of the standard operators."""

    @property
    def capacity(self) -> int | str:
        """Positions in the cache; here the runtime chooses them, up to the context."""
        return "capacity"

    @property
    def rows(self) -> int | str:
        """Sequences in one run, each in its own row of the cache."""
        return 1

    @abstractmethod
    def _declare_positions(self) -> None:
        """Declare the inputs that say where in the cache the sequence goes."""

    @abstractmethod
    def norm(self, x: ir.Value, name: str) -> ir.Value:
        """The RMS norm whose weight is `name`.weight, computed in float32, as `dtype`."""

    @abstractmethod
    def add_norm(self, x: ir.Value, update: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
        """(norm(x + update), x + update)."""

    @abstractmethod
    def attention(self, qkv: ir.Value) -> ir.Value:
        """The next layer's attention: rotates q and k, extends the cache, attends causally.

        `qkv` is (rows, S, (heads + 2 * kv_heads) * head_size): q, k and v side by side. The result is
        (rows, S, heads * head_size).
        """

    def first_greatest(self, logits: ir.Value) -> ir.Value:
        """(rows, 1) int64: where in (rows, 1, vocab) the greatest is, the first of equals."""
        return self.builder.op("ArgMax", logits, axis=-1, keepdims=0)

    def declare_present(self) -> None:
        """Declare the updated caches as outputs, after all layers."""
        for i, pair in enumerate(self._present):
            for part, value in zip(KEY_VALUE, pair, strict=True):
                # No Identity in between: the backend must see that past and present are one buffer.
                self.builder.output(
                    value, PRESENT.format(i, part), self.cache.type, self._cache_shape, direct=True
                )

    def _norm_weight(self, name: str, dtype: ir.DataType) -> ir.Value:
        name, shape = f"{name}.weight", (self.config.hidden,)
        return self.builder.weight(name, shape, dtype, lambda: self.source.load(name, shape, dtype))


class OnnxRuntimeDialect(Dialect):
    """ONNX Runtime's contributed operators; its kernels write the cache in place."""

    @property
    def opset(self) -> int:
        """24 where TensorScatter writes into the cache."""
        return 24 if isinstance(self.cache, Int8Cache) else 23

    @property
    def attention_dtype(self) -> ir.DataType:
        """That of a float cache: the operator takes no two types of floating point."""
        return self.cache.type if isinstance(self.cache, FloatCache) else self.dtype

    @property
    def rows(self) -> str:
        """Chosen by the runtime; GroupQueryAttention takes a length for each row."""
        return ROWS

    def _declare_positions(self) -> None:
        self._lengths = self.builder.input(SEQUENCE_LENGTHS, ir.DataType.INT32, (self.rows,))
        self._total = self.builder.input(TOTAL_LENGTH, ir.DataType.INT32, ())

    def norm(self, x: ir.Value, name: str) -> ir.Value:
        """One fused node; statistics are float32 whatever the type (stash_type)."""
        weight = self._norm_weight(name, self.dtype)
        return self.builder.op(
            "RMSNormalization", x, weight, axis=-1, epsilon=self.config.eps, stash_type=1, name=name
        )

    def add_norm(self, x: ir.Value, update: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
        """One fused node; its second and third outputs are for training only."""
        weight = self._norm_weight(name, self.dtype)
        normed, _, _, total = self.builder.ops(
            "SkipSimplifiedLayerNormalization",
            x,
            update,
            weight,
            domain=CONTRIB_DOMAIN,
            outputs=4,
            epsilon=self.config.eps,
            name=name,
        )
        return normed, total

    def attention(self, qkv: ir.Value) -> ir.Value:
        """See `GroupedAttention`."""
        layer = len(self._present)
        out, *present = self._attention.emit(layer, qkv, self._past[layer])
        self._present.append((present[0], present[1]))
        return out

    @cached_property
    def _attention(self) -> GroupedAttention:
        return GroupedAttention(
            self.builder,
            self.config,
            self.cache,
            self.dtype,
            self.embeds,
            self._lengths,
            self._total,
            (self._cos, self._sin),
        )


class TensorRtDialect(Dialect):
    """Standard operators of opset 24 only, as TensorRT reads them.

    Attention gets a slice of the cache, as long as the input `visible`, and an explicit mask over it:
    TensorRT ignores its `nonpad_kv_seqlen`, and refuses `softmax_precision`. What the mask hides must be
    finite, so the cache starts as zeros. TensorRT's cache update needs a static capacity: it is the context.
    TensorRT-RTX 1.7 has kernels for float16; in float32 it builds only where its Attention layers are marked
    decomposable.
    """

    opset = 24

    def __init__(
        self,
        config: LanguageConfig,
        source: TensorSource,
        dtype: ir.DataType,
        context: int,
        cache: CacheFormat,
    ) -> None:
        if not isinstance(cache, FloatCache) or cache.type != dtype:
            raise UhdError(f"cache: the tensorrt dialect keeps it in the type of the activations, {dtype}")
        # Else a fused kernel for float16 adds up in float16 too.
        self._upcast = cache.accumulation == "float32" and dtype != ir.DataType.FLOAT
        super().__init__(config, source, dtype, context, cache)

    @property
    def capacity(self) -> int:
        """The context."""
        return self.context

    def _declare_positions(self) -> None:
        builder = self.builder
        self._index = builder.input(WRITE_INDEX, ir.DataType.INT64, (1,))
        self._arange = builder.constant(np.arange(self.context))
        self._visible = builder.dim(builder.input(VISIBLE, ir.DataType.BOOL, ("visible",)), 0)

    def _first(self, count: ir.Value) -> ir.Value:
        """0, 1, ... count - 1."""
        zero = self.builder.constant([0])
        return self.builder.op("Slice", self._arange, zero, count, zero)

    @cached_property
    def _places(self) -> tuple[ir.Value, ir.Value]:
        """Positions (1, S) of the sequence, and which cache positions each may see, (1, 1, S, visible)."""
        builder = self.builder
        positions = builder.op("Add", self._first(builder.dim(self.embeds, 1)), self._index)
        rows = builder.op("Unsqueeze", positions, builder.constant([0, 1, 3]))
        mask = builder.op("LessOrEqual", self._first(self._visible), rows)
        return builder.op("Unsqueeze", positions, builder.constant([0])), mask

    def norm(self, x: ir.Value, name: str) -> ir.Value:
        """RMSNormalization in float32, between casts where the graph is not."""
        half = self.dtype != ir.DataType.FLOAT
        weight = self._norm_weight(name, ir.DataType.FLOAT)
        x = self.builder.op("Cast", x, to=ir.DataType.FLOAT) if half else x
        x = self.builder.op("RMSNormalization", x, weight, axis=-1, epsilon=self.config.eps, name=name)
        return self.builder.op("Cast", x, to=self.dtype) if half else x

    def add_norm(self, x: ir.Value, update: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
        """Add, then `norm`."""
        total = self.builder.op("Add", x, update)
        return self.norm(total, name), total

    def attention(self, qkv: ir.Value) -> ir.Value:
        """RotaryEmbedding, TensorScatter into the cache, and Attention over what of it is in use."""
        builder, config, layer = self.builder, self.config, len(self._present)
        positions, mask = self._places
        counts = [config.heads, config.kv_heads, config.kv_heads]
        heads = builder.reshape(qkv, (1, -1, sum(counts), config.head_size))
        heads = builder.op("Transpose", heads, perm=[0, 2, 1, 3])
        q, k, v = builder.ops("Split", heads, builder.constant(counts), axis=1, outputs=3)
        q, k = (builder.op("RotaryEmbedding", x, self._cos, self._sin, positions) for x in (q, k))
        key, value = (
            builder.op("TensorScatter", past, x, self._index, axis=2, mode="linear")
            for past, x in zip(self._past[layer], (k, v), strict=True)
        )
        self._present.append((key, value))
        name = f"model.layers.{layer}.self_attn"
        zero, axis = builder.constant([0]), builder.constant([2])
        seen = [builder.op("Slice", cache, zero, self._visible, axis) for cache in (key, value)]
        if self._upcast:  # which is no work: the kernel reads the cache as it is
            q, *seen = (builder.op("Cast", x, to=ir.DataType.FLOAT) for x in (q, *seen))
        out = builder.op("Attention", q, *seen, mask, name=name)
        out = builder.op("Cast", out, to=self.dtype) if self._upcast else out
        out = builder.op("Transpose", out, perm=[0, 2, 1, 3])
        return builder.reshape(out, (1, -1, config.heads * config.head_size))

    def first_greatest(self, logits: ir.Value) -> ir.Value:
        """Spelled out: which of equals TensorRT's own search finds is not documented.

        It becomes one kernel, with the sum of the logits.
        """
        builder, vocab = self.builder, self.config.vocab
        last = builder.constant([-1])
        greatest = builder.op("Equal", logits, builder.op("ReduceMax", logits, last, keepdims=1))
        ids, none = (builder.constant(x, np.int32) for x in (np.arange(vocab), vocab))
        token = builder.op("ReduceMin", builder.op("Where", greatest, ids, none), last, keepdims=0)
        return builder.op("Cast", token, to=ir.DataType.INT64)


DIALECTS: dict[str, type[Dialect]] = {"onnxruntime": OnnxRuntimeDialect, "tensorrt": TensorRtDialect}
