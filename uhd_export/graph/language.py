"""The language model as an ONNX graph, emitted layer by layer from tensors that are read while writing.

Inputs: inputs_embeds (B, S, D), the cache `past_key_values.I.key|value` (B, kv_heads, capacity, head_size),
and the dialect's position inputs. Outputs: `logits` (B, 1, vocab) float32 of the last position, what greedy
decoding needs of them (`token` (B, 1) int64, the first of the greatest, and `logits_sum` (B, 1) float32), and
the updated cache `present.I.key|value`, which a backend binds to the same buffers as the past. B is free in
the onnxruntime dialect, where each row has a length of its own, and 1 in the tensorrt dialect.
"""

import os
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir

from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.graph.cache import CacheFormat, FloatCache, Int8Cache
from uhd_export.graph.dialects import DIALECTS, Dialect
from uhd_export.graph.linear import (
    Dense,
    Linear,
    LinearFormat,
    TensorReader,
    TensorSource,
    joint_name,
    outputs_of,
)
from uhd_export.runtime.config import LanguageConfig
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.language.decoder import LOGITS, LOGITS_SUM, TOKEN
from uhd_export.runtime.progress import Progress

DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}


def emit_language(
    config: LanguageConfig,
    tensors: Checkpoint | TensorReader,
    path: str | Path,
    *,
    dtype: str = "float32",
    cache: CacheFormat | None = None,
    dialect: str = "onnxruntime",
    linear: LinearFormat | None = None,
    context: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write the language model to `path`, with its weights in `PATH.data` beside it.

    `tensors` is a checkpoint, or a function from official tensor names to tensors. `dtype` is the type of
    activations and dense weights; `cache` how keys and values are kept (default: in `dtype`); `linear` the
    weight format (default `Dense()`); `context` the number of positions of the rotary tables (default: the
    model's own). `progress(done, total)` is called before each tensor of the external data is written. One
    tensor is in memory at a time. Raises UhdError for an unsupported dtype, dialect or cache, a missing
    tensor or a wrong shape; then nothing is left at `path`.
    """
    if dtype not in DTYPES:
        raise UhdError(f"language dtype: {dtype!r} is not supported; use one of {', '.join(DTYPES)}")
    if dialect not in DIALECTS:
        raise UhdError(f"language dialect: {dialect!r} is not supported; use one of {', '.join(DIALECTS)}")
    context = config.context if context is None else context
    check_context(config, context)
    cache = cache or FloatCache(dtype)
    if isinstance(cache, Int8Cache):
        cache.check(config)
    source = TensorSource(tensors)
    graph = DIALECTS[dialect](config, source, DTYPES[dtype], context, cache)
    graph.builder.metadata = {
        "dtype": dtype,
        "dialect": dialect,
        "decoder": config.kind,
        "context": str(context),
    }
    _emit(graph, linear or Dense())
    return _save(graph, Path(path), progress)


def check_context(config: LanguageConfig, context: int) -> None:
    """Raise UhdError where the model has not been trained for `context` positions."""
    if not 1 <= context <= config.context:
        raise UhdError(
            f"language context: {context} positions; the model has been trained for 1 to {config.context}"
        )


def _emit(graph: Dialect, linear: LinearFormat) -> None:
    """All layers. The residual stream x and its pending update are added by the norm that follows."""
    config, builder = graph.config, graph.builder
    width, kv_width = config.heads * config.head_size, config.kv_heads * config.head_size

    def project(x: ir.Value, inputs: int, *layers: tuple[str, int], bias: bool = False) -> ir.Value:
        """One product for all `layers`, (name, outputs) each, that read the same x."""
        linears = [
            Linear(
                name,
                "model.embed_tokens.weight" if name == "lm_head" and config.tied else f"{name}.weight",
                inputs,
                outputs,
                graph.dtype,
                graph.source,
            )
            for name, outputs in layers
        ]
        out = linear.emit(builder, x, *linears)
        if not bias:
            return out

        def load() -> np.ndarray:
            parts = (graph.source.load(f"{name}.bias", (size,), graph.dtype) for name, size in layers)
            return np.concatenate(list(parts))

        vector = builder.weight(f"{joint_name(linears)}.bias", (outputs_of(linears),), graph.dtype, load)
        return builder.op("Add", out, vector)

    x = graph.embeds
    normed = graph.norm(x, "model.layers.0.input_layernorm")
    for i in range(config.layers):
        prefix = f"model.layers.{i}"
        attention, mlp, last = f"{prefix}.self_attn", f"{prefix}.mlp", i == config.layers - 1
        sizes = {"q_proj": width, "k_proj": kv_width, "v_proj": kv_width}
        layers = [(f"{attention}.{name}", size) for name, size in sizes.items()]
        mixed = graph.attention(project(normed, config.hidden, *layers, bias=config.qkv_bias))
        if last:
            # Logits are wanted for the last position: nothing after the last attention needs the others.
            mixed, x = _last_position(graph, mixed), _last_position(graph, x)
        update = project(mixed, width, (f"{attention}.o_proj", config.hidden))
        normed, x = graph.add_norm(x, update, f"{prefix}.post_attention_layernorm")
        pair = [(f"{mlp}.{name}", config.intermediate) for name in ("gate_proj", "up_proj")]
        both = project(normed, config.hidden, *pair)
        gate, up = builder.ops("Split", both, axis=-1, num_outputs=2, outputs=2)
        silu = builder.op("Mul", gate, builder.op("Sigmoid", gate))
        down = f"{mlp}.down_proj", config.hidden
        update = project(builder.op("Mul", silu, up), config.intermediate, down)
        next_norm = "model.norm" if last else f"model.layers.{i + 1}.input_layernorm"
        normed, x = graph.add_norm(x, update, next_norm)
    logits = project(normed, config.hidden, ("lm_head", config.vocab))
    if graph.dtype != ir.DataType.FLOAT:
        logits = builder.op("Cast", logits, to=ir.DataType.FLOAT)
    builder.output(logits, LOGITS, ir.DataType.FLOAT, (graph.rows, 1, config.vocab), direct=True)
    builder.output(graph.first_greatest(logits), TOKEN, ir.DataType.INT64, (graph.rows, 1), direct=True)
    total = builder.op("ReduceSum", logits, builder.constant([-1]), keepdims=0)
    builder.output(total, LOGITS_SUM, ir.DataType.FLOAT, (graph.rows, 1), direct=True)
    graph.declare_present()


def _last_position(graph: Dialect, x: ir.Value) -> ir.Value:
    """(1, S, ...) to (1, 1, ...)."""
    constant = graph.builder.constant
    return graph.builder.op("Slice", x, constant([-1]), constant([np.iinfo(np.int64).max]), constant([1]))


def _user_error(error: BaseException | None) -> UhdError | None:
    """The UhdError behind `error`: the serializer wraps what reading a small tensor raises."""
    while error is not None and not isinstance(error, UhdError):
        error = error.__cause__
    return error


def _save(graph: Dialect, path: Path, progress: Progress | None) -> Path:
    """Write both files in a temporary folder beside `path`, then move them: the weights, then the model."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        written = Path(folder) / path.name
        try:
            graph.builder.save(written, progress)
        except ir.serde.SerdeError as error:
            raise _user_error(error) or error from None
        data = written.with_name(f"{path.name}.data")
        if data.exists():  # absent where every tensor is small enough to lie in the model itself
            os.replace(data, path.with_name(data.name))
        os.replace(written, path)
    return path
