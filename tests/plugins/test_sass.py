"""What the kernels compile to on each target, as bounds: registers, spills, and what their hot loops execute.

Counts are of the machine code, so that a change of a kernel or a compiler that costs instructions shows here
without a GPU. Bounds leave about a tenth above what Triton 3.7 gives.
"""

import re
import sys
from pathlib import Path

import pytest
from support.sass import TENSOR, assemble, innermost, loops

from uhd_export.plugins.compile import compiler as aot
from uhd_export.plugins.compile import report

# Most registers a thread, float16. Those of 128 are held to it, so that two programs share a core.
REGISTERS = {
    "range_features": 80,
    "jbu_stage": 128,
    "window_pool": 112,
    "window_scores": 128,
    "window_softmax": 72,
    "window_values": 128,
}
# Bytes a thread, where the limit of 128 registers costs some: outside of the loops over rows.
SPILLS = {
    "jbu_stage": {120: 16},
    "window_values": {80: 64, 86: 16, 87: 16, 89: 16, 90: 16, 120: 160},
}
OLD_SPILLS = {"window_values": 64}  # by CUDA 12.0's assembler
# The ISAs: Ampere's on Orin and Ada's, Hopper's, Blackwell's on RTX cards.
GENERATIONS = (87, 89, 90, 120)
OLD_PTXAS = Path(sys.prefix) / "cuda-12.0" / "nvidia" / "cuda_nvcc" / "bin" / "ptxas"


def kernels(dtype, targets):
    """Every kernel of both ops at real size, with its target."""
    for op, (launches, scratch) in report.real_size(dtype).items():
        for launch in launches:
            kinds = report.types(launch, scratch, dtype)
            requests = [aot.Request.of(op, launch, kinds, target) for target in targets]
            yield from zip([launch.kernel] * len(targets), aot.compile_kernels(requests), strict=True)


@pytest.mark.slow
def test_registers_and_spills_of_each_target():
    for name, kernel in kernels("float16", aot.TARGETS):
        assert kernel.registers <= REGISTERS[name], (name, kernel.capability, kernel.registers)
        allowed = SPILLS.get(name, {}).get(kernel.capability, 0)
        assert kernel.spilled <= allowed, (name, kernel.capability, kernel.spilled)


@pytest.mark.slow
@pytest.mark.parametrize("target", GENERATIONS)
def test_hot_loops_execute_what_they_should(tmp_path, target):
    code = {}
    for name, kernel in kernels("float16", [target]):
        code[name] = loops(assemble(kernel.ptx, tmp_path)[0])

    # A pixel of 16 bytes a thread, for four bins: eight channels times four.
    pixel = innermost(code["window_pool"], ("FFMA",))
    assert pixel.opcodes["FFMA"] == 32 and len(pixel) <= 150, pixel

    # Three pooled rows a turn, eight channels a thread, four queries: a load of each row and of each weight.
    rows = innermost(code["window_values"], ("FFMA",))
    assert rows.opcodes["FFMA"] == 3 * 8 * 4 and rows.opcodes["LDG"] == 3 * (1 + 4), rows
    assert rows.opcodes["LDL"] == rows.opcodes["STL"] == 0 and len(rows) <= 215, rows

    # 128 x 128 sums and 64 channels a turn on eight warps: 64 products of 16 x 8 x 16 each, or 4 of Hopper's.
    values = max((loop for loop in code["window_values"] if loop.products), key=lambda loop: -len(loop))
    assert values.products == (4 if target == 90 else 64), values
    assert len(values) <= (450 if target == 90 else 880), values

    # 64 x 128 scores and 64 channels, which come through asynchronous copies.
    scores = innermost(code["window_scores"], TENSOR)
    assert scores.products == (4 if target == 90 else 32), scores
    assert len(scores) <= 160 and scores.opcodes["LDGSTS"] >= 6 and not scores.opcodes["LDL"], scores

    stage = innermost(code["jbu_stage"], TENSOR)
    assert stage.products and len(stage) <= 200 and not stage.opcodes["LDL"], stage


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "targets"),
    [("float16", [t for t in aot.TARGETS if t < 100]), ("float32", [89]), ("bfloat16", [89])],
)
def test_the_oldest_assembler_takes_our_ptx(tmp_path, dtype, targets):
    """CUDA 12.0's ptxas, whose drivers are the oldest that engines run on; `make test` installs it."""
    if not OLD_PTXAS.is_file():
        pytest.skip(f"no {OLD_PTXAS}: `make cuda-12.0` installs it where there is a wheel (Linux on x86_64)")
    for name, kernel in kernels(dtype, targets):
        log = assemble(kernel.ptx, tmp_path, str(OLD_PTXAS))[1]
        spilled = int(re.search(r"(\d+) bytes stack frame", log)[1])
        # float32 multiplies without tensor cores, and its kernels are not held to registers.
        assert dtype == "float32" or spilled <= OLD_SPILLS.get(name, 0), (name, kernel.capability, spilled)
