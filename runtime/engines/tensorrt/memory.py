"""Device memory: buffers that grow, and arrays that stay on the device."""

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from uhd_export.runtime.engines.tensorrt.cuda import Cuda
from uhd_export.runtime.errors import UhdError

ALIGNMENT = 256
# Blocks up to this size are kept for the next who asks: giving them back would wait for the GPU each time.
KEPT = 64 << 20
# Most that is kept in all: prompts of many lengths would hold memory without end.
MOST_KEPT = 256 << 20


@functools.cache
def _spare(cuda: Cuda) -> dict[int, list[int]]:
    """Addresses of the blocks that are kept, by size."""
    return {}


def size_class(nbytes: int) -> int:
    """The size of the block that `nbytes` get: of four sizes between powers of two, a quarter more at most.

    Prompts of similar lengths then take the same blocks. Blocks too large to be kept get what they ask for.
    """
    nbytes = max(nbytes, ALIGNMENT)
    step = max(1 << (nbytes.bit_length() - 3), ALIGNMENT) if nbytes <= KEPT else ALIGNMENT
    return -(-nbytes // step) * step


def _take(cuda: Cuda, nbytes: int) -> int:
    """A block of exactly `nbytes`: one that is kept, else of the driver.

    A kept block may still be in use by queued work: whatever is done with it now is queued behind that, on
    the one stream.
    """
    with cuda.lock:
        spare = _spare(cuda)
        if spare.get(nbytes):
            return spare[nbytes].pop()
        try:
            return cuda.allocate(nbytes)
        except UhdError:
            kept = [address for addresses in spare.values() for address in addresses]
            if not kept:
                raise
            spare.clear()
            cuda.synchronize()
            for address in kept:
                cuda.free(address)
            return cuda.allocate(nbytes)


def _give(cuda: Cuda, address: int, nbytes: int) -> None:
    """Keep a block for the next, or free it once the queued work is done: a large one, or one too many."""
    with cuda.lock:
        kept = sum(size * len(addresses) for size, addresses in _spare(cuda).items())
        if nbytes <= KEPT and kept + nbytes <= MOST_KEPT:
            _spare(cuda).setdefault(nbytes, []).append(address)
            return
        cuda.synchronize()
        cuda.free(address)


class Buffer:
    """Device memory of at least what was last asked for; it belongs to this object."""

    def __init__(self, cuda: Cuda, nbytes: int = 0) -> None:
        self._cuda, self.address, self.nbytes = cuda, 0, 0
        if nbytes:
            self.ensure(nbytes)

    def ensure(self, nbytes: int) -> None:
        """Hold `nbytes` or more; the content is lost where the memory moves."""
        if nbytes <= self.nbytes and self.address:
            return
        self.close()
        nbytes = size_class(nbytes)
        self.address = _take(self._cuda, nbytes)
        self.nbytes = nbytes

    def close(self) -> None:
        """Give the memory back."""
        if self.address:
            _give(self._cuda, self.address, self.nbytes)
            self.address = self.nbytes = 0

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at exit, when CUDA may be gone before us
            self.close()


@dataclass(frozen=True)
class DeviceArray:
    """A contiguous array on the device, with as much of numpy's interface as decoding needs.

    Indexing makes views: of rows, of rows behind a leading axis of 1, and with a new leading axis.
    """

    buffer: Buffer
    """Kept so that the memory lives as long as its views."""
    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @classmethod
    def allocate(cls, cuda: Cuda, shape: Sequence[int], dtype: np.dtype[Any]) -> Self:
        """An array with memory of its own."""
        dtype, shape = np.dtype(dtype), tuple(shape)
        buffer = Buffer(cuda, max(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, 1))
        return cls(buffer, buffer.address, shape, dtype)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> "DeviceArray":
        if index is None:
            return DeviceArray(self.buffer, self.address, (1, *self.shape), self.dtype)
        if isinstance(index, tuple):
            if len(index) != 2 or index[0] != slice(None) or self.shape[0] != 1:
                raise TypeError(f"a device array cannot be indexed by {index}")
            return DeviceArray(self.buffer, self.address, self.shape[1:], self.dtype)[index[1]][None]
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise TypeError("a device array has slices of step 1 only")
            shape = (max(stop - start, 0), *self.shape[1:])
        else:
            start = range(len(self))[index]
            shape = self.shape[1:]
        row = self.nbytes // max(len(self), 1)
        return DeviceArray(self.buffer, self.address + start * row, shape, self.dtype)

    def astype(self, dtype: np.dtype[Any], *, copy: bool = True) -> Self:
        """Itself; TypeError where the type differs, because nothing converts on the device."""
        if np.dtype(dtype) != self.dtype or copy:
            raise TypeError(f"a device array of {self.dtype} cannot become {np.dtype(dtype)}")
        return self

    def numpy(self, cuda: Cuda) -> NDArray[Any]:
        """A copy on the host."""
        array = np.empty(self.shape, self.dtype)
        cuda.copy_out(array, self.address)
        cuda.synchronize()
        return array


Array = NDArray[Any] | DeviceArray


def gather(cuda: Cuda, pieces: Sequence[Array], dtype: np.dtype[Any]) -> DeviceArray:
    """(S, D) rows of all `pieces`, (n, D) each, one after the other in memory of its own.

    Pieces on the host are converted to `dtype` and copied in; those on the device must be of it.
    """
    out = DeviceArray.allocate(cuda, (sum(map(len, pieces)), pieces[0].shape[1]), dtype)
    row = 0
    for piece in pieces:
        place = out[row : row + len(piece)]
        if isinstance(piece, DeviceArray):
            piece = piece.astype(dtype, copy=False)
            cuda.copy(place.address, piece.address, piece.nbytes)
        else:
            cuda.copy_in(place.address, np.ascontiguousarray(piece, dtype))
        row += len(piece)
    return out
