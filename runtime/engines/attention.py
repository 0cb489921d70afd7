"""How ONNX Runtime attends over a cache of 8 bits on a CPU: a head's positions at once, not block by block.

By default its kernel goes through the positions in blocks that fit a core's cache, which is best for a long
prompt in float. A step over an 8-bit cache takes it 1.2 times as long that way, and prompts of 256 positions
a run 1.1 times (`benchmarks/cache.py`), while the scores that it need not hold are few. Only an environment
variable says which way, and each node reads it when its session is made.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_SWITCH = "ORT_GQA_DISABLE_FLASH_ATTENTION"
# An attribute that a graph's nodes have where their cache is of integers.
_INTEGERS = b"kv_cache_bit_width"


@contextmanager
def attention_at_once(graph: bytes) -> Iterator[None]:
    """A session that is made of `graph` within attends so, where its cache is of integers.

    A choice that the user's environment makes stands.
    """
    if _INTEGERS not in graph or _SWITCH in os.environ:
        yield
        return
    os.environ[_SWITCH] = "1"
    try:
        yield
    finally:
        os.environ.pop(_SWITCH, None)
