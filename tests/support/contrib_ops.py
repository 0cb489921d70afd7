"""ONNX Runtime's own operators in numpy, by their documentation, for ONNX's reference evaluator.

With them a graph of the onnxruntime dialect runs where no backend's kernels are involved.
"""

import numpy as np
from onnx.reference.op_run import OpRun


def _rms(x, weight, epsilon):
    wide = x.astype(np.float32)
    scale = np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide / scale * weight.astype(np.float32)).astype(x.dtype)


class SkipSimplifiedLayerNormalization(OpRun):
    """RMS norm of a sum, and the sum as the fourth output."""

    op_domain = "com.microsoft"

    def _run(self, x, skip, weight, epsilon=1e-5):
        total = x + skip
        unused = np.zeros(0, x.dtype)
        return _rms(total, weight, epsilon), unused, unused, total


class GroupQueryAttention(OpRun):
    """Causal attention with rotary positions over a buffer as long as the cache, or as what is cached.

    q, k and v come side by side as (1, S, (heads + 2 * kv_heads) * size); the inputs for k and v are empty.
    `seqlens_k` is the index of the last position; keys and values go to the positions that end there. A cache
    of integers has a scale a channel, (kv_heads * size,).
    """

    op_domain = "com.microsoft"

    def _run(
        self,
        q,
        k,
        v,
        past_k,
        past_v,
        seqlens_k,
        total,
        cos,
        sin,
        *rest,
        num_heads=1,
        kv_num_heads=1,
        do_rotary=0,
        k_quant_type="NONE",
        v_quant_type="NONE",
        kv_cache_bit_width=0,
    ):
        assert k is None and v is None
        kind = q.dtype
        scales = np.ones(2, np.float32)
        if past_k.dtype == np.int8:
            assert (k_quant_type, v_quant_type, kv_cache_bit_width) == ("PER_CHANNEL", "PER_CHANNEL", 8)
            assert rest[:3] == (None, None, None)
            scales = [scale.reshape(kv_num_heads, 1, -1) for scale in rest[3:]]
        q, k, v = np.split(q, np.array([num_heads, num_heads + kv_num_heads]) * past_k.shape[-1], axis=-1)
        assert do_rotary == 1 and int(total) == int(seqlens_k[0]) + 1
        length, stop = q.shape[1], int(total)
        start = stop - length

        def split(x, heads):
            return x[0].reshape(length, heads, -1).transpose(1, 0, 2).astype(np.float32)

        def rotate(x):
            first, second = np.split(x, 2, axis=-1)
            c, s = (table[start:stop].astype(np.float32) for table in (cos, sin))
            return np.concatenate([first * c - second * s, second * c + first * s], axis=-1)

        q, k, v = rotate(split(q, num_heads)), rotate(split(k, kv_num_heads)), split(v, kv_num_heads)
        presents, wide = [], []
        for past, fresh, scale in zip((past_k, past_v), (k, v), scales, strict=True):
            present = np.zeros((1, past.shape[1], max(past.shape[2], stop), past.shape[3]), past.dtype)
            present[:, :, : past.shape[2]] = past
            if past.dtype == np.int8:
                fresh = np.clip(np.rint(fresh / scale), -128, 127)
            present[0, :, start:stop] = fresh
            presents.append(present)
            floats = present[0, :, :stop].astype(np.float32) * scale
            wide.append(np.repeat(floats, num_heads // kv_num_heads, axis=0))
        keys, values = wide
        scores = q @ keys.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
        scores = np.where(np.arange(stop) <= np.arange(start, stop)[:, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = (weights / weights.sum(-1, keepdims=True)) @ values
        out = out.transpose(1, 0, 2).reshape(1, length, -1).astype(kind)
        return out, *presents


CONTRIB_OPS = [SkipSimplifiedLayerNormalization, GroupQueryAttention]
