"""Numbers too small for a float's usual form count as zero while an engine computes, on x86-64 under Linux.

A softmax over scores that lie far apart is full of them (e^-88 to e^-103 in float32), and each costs an Intel
processor many cycles: attention over random weights took four times as long. The setting is a
thread's own. ONNX Runtime's option for it is of a session's threads, and of the one that opened it, where it
stays set for all that follows, and NumPy warns of it; a thread that calls takes part in the work. So for the
caller's thread it is set, and taken back, here.
"""

import ctypes
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# The C library's fenv_t on x86-64: 28 bytes of the old coprocessor's, then the vector unit's register.
_ENVIRONMENT, _REGISTER = 32, 28
# Of that register: results that are denormal become zero, and operands that are count as zero.
_FLUSH = 0x8000 | 0x0040
SUPPORTED = sys.platform == "linux" and platform.machine() == "x86_64"


@contextmanager
def denormals_as_zero() -> Iterator[None]:
    """Within, this thread takes denormal numbers as zero; whatever changed, it is then as it was before."""
    if not SUPPORTED:
        yield
        return
    libm = ctypes.CDLL(None)
    before = ctypes.create_string_buffer(_ENVIRONMENT)
    libm.fegetenv(before)
    within = ctypes.create_string_buffer(before.raw, _ENVIRONMENT)
    register = ctypes.c_uint32.from_buffer(within, _REGISTER)
    register.value |= _FLUSH
    libm.fesetenv(within)
    try:
        yield
    finally:
        libm.fesetenv(before)
