"""Runs a parsed TensorRT network on the CPU, layer by layer, from what the network itself says.

A build shows that TensorRT accepts a graph, not that its parser read it as meant (it passes over some
inputs in silence). Here the network's own layers compute, in PyTorch, by TensorRT's documentation of each.
"""

import math

import numpy as np
import torch
from torch.nn import functional as F

SIMPLE = {
    "SUM": torch.add,
    "PROD": torch.mul,
    "MAX": torch.maximum,
    "MIN": torch.minimum,
    "SUB": torch.sub,
    "POW": torch.pow,
    "AND": torch.logical_and,
    "OR": torch.logical_or,
    "EQUAL": torch.eq,
    "GREATER": torch.gt,
    "LESS": torch.lt,
}
UNARY = {
    "EXP": torch.exp,
    "SQRT": torch.sqrt,
    "RECIP": torch.reciprocal,
    "ABS": torch.abs,
    "NEG": torch.neg,
    "NOT": torch.logical_not,
    "ERF": torch.erf,
}
ACTIVATIONS = {"SIGMOID": torch.sigmoid, "RELU": torch.relu, "GELU_ERF": F.gelu}


class Interpreter:
    """A network, ready to run. `constants` are weights that the binding cannot show (INT4), by name."""

    def __init__(self, trt, network, constants=None, plugins=None):
        self.trt, self.network = trt, network
        self.constants, self.plugins = constants or {}, plugins or {}
        self.attention = {}

    def run(self, feeds):
        """Outputs by name, from numpy inputs by name."""
        self.values = {name: torch.from_numpy(np.array(array)) for name, array in feeds.items()}
        waiting = [self.network.get_layer(i) for i in range(self.network.num_layers)]
        while waiting:  # layers are not always in the order of their tensors
            left = [layer for layer in waiting if not self._try(layer)]
            assert len(left) < len(waiting), f"{left[0].name} never gets its inputs"
            waiting = left
        outputs = [self.network.get_output(i) for i in range(self.network.num_outputs)]
        return {tensor.name: self.values[tensor.name].numpy() for tensor in outputs}

    def _try(self, layer):
        """Run a layer whose inputs are there."""
        tensors = [layer.get_input(i) for i in range(layer.num_inputs)]
        if any(tensor is not None and tensor.name not in self.values for tensor in tensors):
            return False
        kind = layer.type.name
        inputs = [None if tensor is None else self.values[tensor.name] for tensor in tensors]
        outputs = getattr(self, f"_{kind.lower()}")(self._cast_class(layer, kind), inputs)
        for i, value in enumerate(outputs if isinstance(outputs, (list, tuple)) else [outputs]):
            self._store(layer.get_output(i), value, layer)
        return True

    def _cast_class(self, layer, kind):
        """The layer as its own class: the binding hands out the base class."""
        special = {"ELEMENTWISE": "ElementWise", "SOFTMAX": "SoftMax", "KV_CACHE_UPDATE": "KVCacheUpdate"}
        name = special.get(kind) or "".join(part.capitalize() for part in kind.split("_"))
        layer.__class__ = getattr(self.trt, f"I{name}Layer")
        return layer

    def _store(self, tensor, value, layer):
        """Keep a result whose shape is what TensorRT inferred, where it inferred one."""
        shape = tuple(tensor.shape)
        fits = all(size in (-1, actual) for size, actual in zip(shape, value.shape, strict=True))
        assert fits, f"{layer.name}: {tuple(value.shape)} instead of {shape}"
        self.values[tensor.name] = value

    def _constant(self, layer, inputs):
        shape, weights = tuple(layer.shape), layer.weights
        if layer.name in self.constants:
            return torch.from_numpy(self.constants[layer.name])
        return torch.from_numpy(np.array(weights).reshape(shape))

    def _identity(self, layer, inputs):
        return inputs[0]

    def _cast(self, layer, inputs):
        kinds = {self.trt.float32: torch.float32, self.trt.int32: torch.int32, self.trt.int64: torch.int64}
        return inputs[0].to(
            {**kinds, self.trt.bool: torch.bool, self.trt.float16: torch.float16}[layer.to_type]
        )

    def _elementwise(self, layer, inputs):
        a, b = inputs
        assert a.dtype == b.dtype and a.ndim == b.ndim, layer.name
        name = layer.op.name
        if name == "DIV":
            return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")
        if name == "FLOOR_DIV":
            return torch.div(a, b, rounding_mode="floor")
        return SIMPLE[name](a, b)

    def _unary(self, layer, inputs):
        return UNARY[layer.op.name](inputs[0])

    def _activation(self, layer, inputs):
        kind = layer.type.name
        if kind == "CLIP":
            return inputs[0].clamp(layer.alpha, layer.beta)
        return ACTIVATIONS[kind](inputs[0])

    def _softmax(self, layer, inputs):
        (axis,) = _axes(layer.axes, inputs[0].ndim)
        return inputs[0].softmax(axis)

    def _select(self, layer, inputs):
        return torch.where(*inputs)

    def _reduce(self, layer, inputs):
        axes = _axes(layer.axes, inputs[0].ndim)
        function = {"SUM": torch.sum, "AVG": torch.mean, "MAX": torch.amax, "MIN": torch.amin}[layer.op.name]
        return function(inputs[0], axes, keepdim=layer.keep_dims)

    def _shape(self, layer, inputs):
        return torch.tensor(inputs[0].shape, dtype=torch.int64)

    def _concatenation(self, layer, inputs):
        return torch.cat(inputs, layer.axis)

    def _squeeze(self, layer, inputs):
        x = inputs[0]
        axes = [a for a, size in enumerate(x.shape) if size == 1]  # all of length 1 where none are named
        if len(inputs) > 1:
            axes = [int(axis) % x.ndim for axis in inputs[1].reshape(-1)]
        assert all(x.shape[axis] == 1 for axis in axes)
        return x.reshape([size for axis, size in enumerate(x.shape) if axis not in axes])

    def _unsqueeze(self, layer, inputs):
        rank = inputs[0].ndim + inputs[1].numel()
        axes, rest = sorted(int(axis) % rank for axis in inputs[1].reshape(-1)), iter(inputs[0].shape)
        return inputs[0].reshape([1 if axis in axes else next(rest) for axis in range(rank)])

    def _shuffle(self, layer, inputs):
        x = inputs[0].permute(_permutation(layer.first_transpose, inputs[0].ndim))
        if len(inputs) > 1:
            dims = inputs[1].tolist()
        else:
            dims = list(layer.reshape_dims) if _is_set(layer.reshape_dims) else list(x.shape)
        if layer.zero_is_placeholder:
            dims = [x.shape[i] if size == 0 else size for i, size in enumerate(dims)]
        x = x.reshape(dims)
        return x.permute(_permutation(layer.second_transpose, x.ndim))

    def _slice(self, layer, inputs):
        x, given = inputs[0], inputs[1:] + [None] * (5 - len(inputs[1:]))
        start, size, stride = (
            (value.tolist() if value is not None else list(fixed))
            for value, fixed in zip(given, (layer.start, layer.shape, layer.stride), strict=False)
        )
        axes = inputs[5].tolist() if len(inputs) > 5 and inputs[5] is not None else None
        axes = axes or (list(layer.axes) if _is_set(layer.axes) else list(range(x.ndim)))
        mode = layer.mode.name
        for axis, first, count, step in zip(axes, start, size, stride, strict=True):
            index = first + step * torch.arange(count)
            if mode == "REFLECT":
                last = x.shape[axis] - 1
                index = index.abs()
                index = last - (last - index).abs()
            assert mode in ("STRICT_BOUNDS", "REFLECT"), mode
            x = x.index_select(axis, index)
        return x

    def _gather(self, layer, inputs):
        data, indices = inputs[0], inputs[1].long()
        if layer.mode.name == "ELEMENT":
            return data.gather(
                layer.axis, torch.where(indices < 0, indices + data.shape[layer.axis], indices)
            )
        assert layer.mode.name == "DEFAULT" and layer.num_elementwise_dims == 0
        picked = data.index_select(layer.axis, indices.reshape(-1))
        return picked.reshape(*data.shape[: layer.axis], *indices.shape, *data.shape[layer.axis + 1 :])

    def _matrix_multiply(self, layer, inputs):
        a, b = inputs
        swap = self.trt.MatrixOperation.TRANSPOSE
        assert self.trt.MatrixOperation.VECTOR not in (layer.op0, layer.op1)
        a = a.mT if layer.op0 == swap else a
        return a @ (b.mT if layer.op1 == swap else b)

    def _fill(self, layer, inputs):
        assert layer.operation.name == "LINSPACE"
        (size,) = inputs[0].tolist() if inputs and inputs[0] is not None else layer.shape
        start = inputs[1] if len(inputs) > 1 else torch.tensor(layer.alpha)
        step = inputs[2].reshape(()) if len(inputs) > 2 else torch.tensor(layer.beta)
        return start.reshape(()) + step * torch.arange(size)

    def _normalization(self, layer, inputs):
        x, scale, bias = inputs
        axes = _axes(layer.axes, x.ndim)
        x = (x - x.mean(axes, keepdim=True)) * torch.rsqrt(
            x.var(axes, correction=0, keepdim=True) + layer.epsilon
        )
        return x * scale + bias

    def _convolution(self, layer, inputs):
        kernel = inputs[1] if len(inputs) > 1 else torch.from_numpy(np.array(layer.kernel))
        size = tuple(layer.kernel_size_nd)
        kernel = kernel.reshape(layer.num_output_maps, -1, *size)
        assert tuple(layer.pre_padding) == tuple(layer.post_padding) == (0, 0) and layer.num_groups == 1
        bias = np.array(layer.bias)
        assert bias.size == 0
        return F.conv2d(inputs[0], kernel, stride=tuple(layer.stride_nd))

    def _dequantize(self, layer, inputs):
        weight, scale = inputs[:2]
        return weight.float() * scale.repeat_interleave(weight.shape[0] // scale.shape[0], 0)

    def _rotary_embedding(self, layer, inputs):
        """Halves rotated by the positions' angles: input 3 picks rows of the tables."""
        x, cos, sin, positions = inputs
        assert not layer.interleaved and layer.rotary_embedding_dim in (0, x.shape[-1])
        cos, sin = (table[positions.long()][:, None] for table in (cos, sin))
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def _kv_cache_update(self, layer, inputs):
        cache, update, index = inputs[:3]
        assert layer.cache_mode.name == "LINEAR" and index.numel() == 1
        cache, at = cache.clone(), int(index)
        cache[:, :, at : at + update.shape[2]] = update
        return cache

    def _attention_input(self, layer, inputs):
        """softmax(q k^T) v: TensorRT scales nothing itself, and hides where a boolean mask is false."""
        attention = layer.attention
        assert not attention.causal and attention.norm_op.name == "SOFTMAX"
        q, k, v = inputs[:3]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = q @ k.mT
        mask = self.values[attention.mask.name] if attention.mask is not None else torch.zeros(())
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(-1) @ v

    def _attention_output(self, layer, inputs):
        return inputs[0]

    def _plugin_v3(self, layer, inputs):
        return self.plugins[layer.name.rpartition("/")[2].rpartition("_")[0]](inputs)


def _axes(mask, rank):
    """Axes of a bit mask."""
    return [axis for axis in range(rank) if mask >> axis & 1]


def _is_set(dims):
    """TensorRT stands a rank of -1 for dimensions that nobody gave."""
    try:
        return dims is not None and len(dims) >= 0
    except ValueError:
        return False


def _permutation(permutation, rank):
    order = list(permutation)[:rank]
    return order if sorted(order) == list(range(rank)) else list(range(rank))
