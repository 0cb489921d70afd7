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
    """Causal attention with rotary positions over a buffer as long as the cache.

    q, k and v come side by side as (1, S, (heads + 2 * kv_heads) * size); the inputs for k and v are empty.
    `seqlens_k` is the index of the last position; keys and values go to the positions that end there.
    """

    op_domain = "com.microsoft"

    def _run(
        self, q, k, v, past_k, past_v, seqlens_k, total, cos, sin, num_heads=1, kv_num_heads=1, do_rotary=0
    ):
        assert k is None and v is None
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
        present_k, present_v = past_k.copy(), past_v.copy()
        present_k[0, :, start:stop], present_v[0, :, start:stop] = k, v
        keys, values = (
            np.repeat(x[0, :, :stop].astype(np.float32), num_heads // kv_num_heads, axis=0)
            for x in (present_k, present_v)
        )
        scores = q @ keys.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
        scores = np.where(np.arange(stop) <= np.arange(start, stop)[:, None], scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = (weights / weights.sum(-1, keepdims=True)) @ values
        out = out.transpose(1, 0, 2).reshape(1, length, -1).astype(past_k.dtype)
        return out, present_k, present_v


CONTRIB_OPS = [SkipSimplifiedLayerNormalization, GroupQueryAttention]
