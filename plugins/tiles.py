"""Small pieces that the Triton kernels share."""

# ruff: noqa: ANN001, ANN201 (Triton types the arguments)

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def multiply(a, b, PRECISION: tl.constexpr, EMULATE: tl.constexpr):
    """Matrix product with float32 accumulation.

    `PRECISION` concerns float32 operands: "ieee" (exact, without tensor cores) or "tf32". `EMULATE` is set
    for bfloat16 under the interpreter, which would multiply its bits as integers.
    """
    if EMULATE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def narrow(x, dtype: tl.constexpr, EMULATE: tl.constexpr):
    """Round float32 to `dtype`, to nearest even also where the interpreter truncates (`EMULATE`)."""
    if EMULATE:
        bits = x.to(tl.int32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        x = ((bits >> 16) << 16).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def gelu(x):
    """Exact GELU to 2e-7: erf by Abramowitz and Stegun 7.1.26, a third of libdevice's instructions."""
    z = tl.abs(x) * 0.7071067811865476
    t = tl.rsqrt(1 + 0.3275911 * z)
    t = t * t  # 1 / (1 + p z), cheaper than a division
    tail = 1.061405429 * t - 1.453152027
    tail = tail * t + 1.421413741
    tail = tail * t - 0.284496736
    tail = tail * t + 0.254829592
    half = 0.5 * tail * t * tl.exp(-z * z)  # half of erfc(z)
    return x * tl.where(x < 0, half, 1 - half)
