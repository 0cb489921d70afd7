"""One interface over the backends that run a graph."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from uhd_export.runtime.errors import UhdError

# numpy's arrays, or an engine's own on its device with the same interface as far as rows go.
Array = Any


@dataclass(frozen=True)
class TensorInfo:
    """An input or output: its type, and its shape with a name where a dimension is free."""

    dtype: np.dtype[Any]
    shape: tuple[int | str, ...]

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with free dimensions from `sizes`; KeyError where one is missing."""
        return tuple(sizes[d] if isinstance(d, str) else d for d in self.shape)


class Stopped(Exception):
    """A run was ended by its `Stop`."""


class Stop:
    """Ends runs from another thread, where the backend can; elsewhere a run goes to its end."""

    def __init__(self) -> None:
        self.requested = False
        self._lock = threading.Lock()
        self._end: Callable[[], None] | None = None

    def request(self) -> None:
        """End the run that holds this, and refuse any later one."""
        with self._lock:
            self.requested = True
            if self._end is not None:
                self._end()

    @contextmanager
    def ending(self, end: Callable[[], None]) -> Iterator[None]:
        """For the time of a run, `end` is what ends it. Raises Stopped where that was requested before."""
        with self._lock:
            if self.requested:
                raise Stopped
            self._end = end
        try:
            yield
        finally:
            with self._lock:
                self._end = None


class Binding(ABC):
    """An engine with some inputs and outputs bound to buffers that stay on the device between calls.

    Several bindings of one engine have their own buffers and share its weights.
    """

    nbytes: int
    """Size of the persistent buffers, each counted once."""

    @abstractmethod
    def infer(
        self,
        feeds: Mapping[str, Array],
        stop: Stop | None = None,
        *,
        outputs: Collection[str] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Run once: `feeds` are the inputs that are not bound, the result the outputs that are not.

        With `outputs`, these alone are copied to this machine's memory. Raises Stopped where `stop` ended it;
        what the buffers hold of this run is then undefined.
        """

    def rows(self, start: int, stop: int) -> "Binding":
        """A binding on rows `start` to `stop` of the same memory, where the first axis is free.

        Raises UhdError where the backend's memory cannot be taken apart.
        """
        raise UhdError(f"slots: {type(self).__name__} keeps one sequence; use --slots 1")

    @abstractmethod
    def read(self, name: str) -> NDArray[Any]:
        """A copy of the buffer bound to input `name`."""


class Engine(ABC):
    """A loaded graph. Use it as a context manager, or call `close`."""

    inputs: dict[str, TensorInfo]
    outputs: dict[str, TensorInfo]
    where: str = "cpu"
    """What computes, with its version, and on which device."""
    weight_bytes: int | None = None
    """Bytes of weights that the engine loaded, where the backend knows."""
    on_host: bool = False
    """Whether the processor computes, in this machine's memory."""

    @property
    def most_scratch_bytes(self) -> int | None:
        """What activations take at the largest shapes, where the backend knows."""
        return None

    @property
    def device_bytes(self) -> int | None:
        """Device memory the engine needs beside its weights and bound buffers, where the backend knows."""
        return None

    @abstractmethod
    def infer(self, feeds: Mapping[str, Array], stop: Stop | None = None) -> dict[str, NDArray[Any]]:
        """Run once on all inputs by name; returns all outputs by name, as arrays of their own.

        Raises ValueError where a feed is missing, unknown or of another type, Stopped where `stop` ended it.
        """

    def infer_resident(self, feeds: Mapping[str, Array], stop: Stop | None = None) -> dict[str, Array]:
        """As `infer`, but outputs stay on the engine's device where it is not this machine's memory."""
        return self.infer(feeds, stop)

    def gather(self, pieces: Sequence[Array], dtype: np.dtype[Any]) -> Array:
        """(S, D) rows of all `pieces`, one after the other, where the engine reads them without a copy.

        `dtype` is the type in which it will be fed; in this machine's memory the pieces keep theirs.
        """
        return np.concatenate(pieces)

    def staging(self, shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array to be filled once and then fed, in memory from which the engine copies the fastest."""
        return np.empty(shape, dtype)

    def keep(self, array: NDArray[Any]) -> Array:
        """`array` where the engine reads it without a copy, to be fed again and again."""
        return array

    def fetch(self, array: Array) -> NDArray[Any]:
        """`array` in this machine's memory."""
        return np.asarray(array)

    def end_profile(self) -> Path:
        """Stop the profiling that the engine was opened for; the path of its trace (Chrome trace events).

        Raises UhdError where the backend leaves none.
        """
        raise UhdError(f"{type(self).__name__}: this backend leaves no trace of its layers")

    def trim(self) -> None:  # noqa: B027 (most backends keep what they reserved)
        """Give memory that finished runs took back to the system: at the end of an image, or of a prompt."""

    @abstractmethod
    def bind(self, shared: Mapping[str, str], sizes: Mapping[str, int]) -> Binding:
        """A binding in which each input of `shared` and the output it maps to are one buffer of zeros.

        `sizes` gives the free dimensions of these buffers by name.
        """

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {', '.join(self.inputs)} -> {', '.join(self.outputs)}>"

    def close(self) -> None:  # noqa: B027 (most backends have nothing to do)
        """Free what the backend holds; the engine cannot be used afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_feeds(
    feeds: Mapping[str, Array], inputs: Mapping[str, TensorInfo], bound: Mapping[str, str]
) -> None:
    """ValueError where `feeds` are not exactly the `inputs` that are not `bound`, with their types."""
    free = inputs.keys() - bound.keys()
    if feeds.keys() != free:
        raise ValueError(f"feeds {sorted(feeds)} differ from the inputs {sorted(free)}")
    for name, array in feeds.items():
        if array.dtype != inputs[name].dtype:
            raise ValueError(f"feed {name}: type {array.dtype} differs from {inputs[name].dtype}")
