"""Arrays of this machine's memory from which the GPU copies by itself (pinned), used again one after another.

A copy from other memory goes through a buffer of the driver, at a fraction of the speed, and keeps the
processor busy. Pinning takes long, so blocks are kept.
"""

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uhd_export.runtime.engines.tensorrt.cuda import Cuda
from uhd_export.runtime.engines.tensorrt.memory import size_class
from uhd_export.runtime.errors import UhdError

# Most that is pinned: four batches of ten crops in float16. Beyond, arrays are ordinary ones.
MOST_PINNED = 32 << 20


class _Pool:
    """The blocks that nobody holds, by size, each with how often the GPU had been waited for by then."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.pinned = 0
        self.spare: dict[int, list[tuple[int, int]]] = {}

    def take(self, nbytes: int) -> int | None:
        """Address of a block of `nbytes` out of which nothing is copied now; None where there is none."""
        spare = self.spare.get(nbytes, [])
        for index, (address, waits) in enumerate(spare):
            if waits < self.cuda.waits:
                del spare[index]
                return address
        if self.pinned + nbytes > MOST_PINNED:
            return None
        try:
            address = self.cuda.allocate_host(nbytes)
        except UhdError:  # the machine lets no more be pinned
            return None
        self.pinned += nbytes
        return address

    def give(self, address: int, nbytes: int) -> None:
        """Keep a block, out of which queued work may still copy."""
        self.spare.setdefault(nbytes, []).append((address, self.cuda.waits))


@functools.cache
def _pool(cuda: Cuda) -> _Pool:
    return _Pool(cuda)


class _Block:
    """A block, held by the arrays that lie in it."""

    def __init__(self, pool: _Pool, address: int, nbytes: int) -> None:
        self._pool, self._address, self._nbytes = pool, address, nbytes
        self.__array_interface__ = {
            "data": (address, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "version": 3,
        }

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at exit
            self._pool.give(self._address, self._nbytes)


def staging(cuda: Cuda, shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array to be filled once and then fed: pinned, or an ordinary one where enough is pinned."""
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    pool, size = _pool(cuda), size_class(nbytes)
    with cuda.lock:
        address = pool.take(size)
    if address is None:
        return np.empty(shape, dtype)
    return np.asarray(_Block(pool, address, size))[:nbytes].view(dtype).reshape(shape)
