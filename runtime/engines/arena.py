"""The memory of activations on the CPU: one arena for all sessions, whose pages go back when it is shrunk.

ONNX Runtime gives each session an arena that grows by blocks of its own and splits none of them for less than
128 MB: measured on the vision part, half as much again as its tensors take at a time. Here all sessions share
one that grows by blocks larger than most runs need, in which freed neighbours join, and is split as asked.
Pages count from the first write on, so a block costs what is used of it.
"""

import functools
import threading
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from uhd_export.runtime.engines.product import product

_BLOCK = 1 << 29
_SETTINGS = {
    "arena_extend_strategy": 0,  # by blocks, not as requested, where neighbours could not join
    "initial_growth_chunk_size_bytes": _BLOCK,
    "max_dead_bytes_per_chunk": 1 << 20,
}
_lock = threading.Lock()


def share_arena(options: ort.SessionOptions) -> None:
    """A session with `options` takes its memory from the arena of all."""
    with _lock:
        _shrinking()
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")


def shrink_arena() -> None:
    """Blocks in which nothing lives go back to the system, and the next is of the full size again."""
    with _lock:
        session, feeds, options = _shrinking()
        session.run(None, feeds, options)


@functools.cache
def _shrinking() -> tuple[ort.InferenceSession, dict[str, NDArray[Any]], ort.RunOptions]:
    """A run that does nothing but shrink: ONNX Runtime does so at the end of a run, and only there."""
    info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(info, ort.OrtArenaCfg(_SETTINGS))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.use_env_allocators", "1")
    session = ort.InferenceSession(product(np.dtype(np.float32)), options, providers=["CPUExecutionProvider"])
    run = ort.RunOptions()
    run.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    one = np.ones((1, 1), np.float32)
    return session, {"a": one, "b": one}, run
