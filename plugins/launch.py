"""What a kernel launch is made of, described once for PyTorch, the compiler and TensorRT.

Each op plans its launches from shapes alone (`plugins/*/launch.py`, plain arithmetic). PyTorch hands
a plan to Triton's just-in-time launcher, `plugins/compile/` compiles it ahead of time, and a TensorRT
plugin launches the compiled code on a device that has neither Triton nor PyTorch.
"""

from dataclasses import dataclass

Constant = int | bool | str


@dataclass(frozen=True)
class Launch:
    """One kernel launch: arguments are the tensors, then the integers, then the constants."""

    kernel: str  # the function's name in the op's kernel module
    grid: tuple[int, int, int]
    tensors: tuple[str, ...]  # names of inputs, outputs and scratch buffers, in argument order
    integers: tuple[int, ...]
    constants: tuple[tuple[str, Constant], ...]  # compile-time arguments, in order
    warps: int
    stages: int  # depth of the software pipeline in the channel loop
    registers: int | None = None  # most registers a thread, where that buys a second program per core


@dataclass(frozen=True)
class Scratch:
    """A buffer that a launch writes and a later one reads."""

    name: str
    elements: int
    dtype: str = "float32"


def power_of_two(n: int, minimum: int = 16) -> int:
    """The least power of two that is at least `n` and `minimum`; tiles have such sides."""
    return max(minimum, 1 << (n - 1).bit_length())
