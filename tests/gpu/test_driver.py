"""What a plugin asks of the driver, through the real cuda-bindings: a launch a kernel, and little else."""

import re

import pytest

from uhd_export.plugins.operator import ShapeRanges
from uhd_export.plugins.operators import operators
from uhd_export.plugins.tensorrt.plugin import Build
from uhd_export.plugins.tensorrt.runner import Runner, pack, unpack
from uhd_export.runtime.errors import UhdError

BATCH, SIDE, CHANNELS = 2, 6, 64
STREAM, WORKSPACE = 0x77, 0xABC000


def shapes():
    """Of the inputs of JBU, and its output."""
    weights = [(3, 32), (32,), (32, 32), (32,), (), (), (52, 49), (49,), (49, 49), (49,)]
    maps = [(BATCH, SIDE, SIDE, CHANNELS), (BATCH, 2 * SIDE, 2 * SIDE, 3)]
    return [*maps, *weights, *2 * [(2 * SIDE + 6, SIDE)]], (BATCH, 2 * SIDE, 2 * SIDE, CHANNELS)


@pytest.fixture(scope="module")
def jbu(cuda):
    """The plugin's launcher with its kernels, as an engine's file holds them."""
    operator, (inputs, _) = operators()["JBU"], shapes()
    named = dict(zip(operator.inputs({}), inputs, strict=True))
    build = Build([89])
    build.request(operator, {}, ShapeRanges(named, named), "float16")
    return operator, unpack(pack(build.compile(operator.folder)))


def run(runner, batch=BATCH):
    inputs, _ = shapes()
    inputs = [(batch, *shape[1:]) if shape[:1] == (BATCH,) else shape for shape in inputs]
    places = [0x1000 * (i + 1) for i in range(len(inputs) + 1)]
    runner.run(inputs, ["float16"] * len(places), places, WORKSPACE, STREAM)
    return dict(zip((*runner.operator.inputs({}), *runner.operator.outputs({})), places, strict=True))


def test_a_shape_that_was_met_costs_its_launches_and_one_question(jbu, cuda):
    operator, kernels = jbu
    runner = Runner(operator, {}, kernels)
    with cuda.logging() as first:
        run(runner)
    calls = [line.split()[0] for line in first]
    assert calls[:4] == ["cuCtxGetCurrent", "cuCtxGetDevice", *2 * ["cuDeviceGetAttribute"]]
    assert calls.count("cuModuleLoadData") == calls.count("cuModuleGetFunction") == len(kernels) == 2
    with cuda.counting() as counts, cuda.logging() as lines:
        run(runner)
    assert [line.split()[:2] for line in lines] == [
        ["cuCtxGetCurrent"],
        ["launch", "range_features"],
        ["launch", "jbu_stage"],
    ]
    # Nothing is allocated, copied or waited for.
    assert +counts == {"launches": 2}
    with cuda.logging() as other:
        run(runner, batch=1)  # the kernels are there; the device is asked for once a shape
    assert not any(line.startswith("cuModule") for line in other)


def test_kernels_get_the_places_of_their_tensors(jbu, cuda):
    operator, kernels = jbu
    runner = Runner(operator, {}, kernels)
    run(runner)
    with cuda.logging() as lines:
        places = run(runner)
    inputs, _ = shapes()
    named = dict(zip(operator.inputs({}), inputs, strict=True))
    launches = operator.plan(named, {}, "float16")[0]
    for line, launch in zip(lines[1:], launches, strict=True):
        found = re.fullmatch(
            r"launch (\w+) grid (\d+) (\d+) (\d+) block (\d+) 1 1 shared (\d+) stream (\w+) arguments (.*)",
            line,
        )
        name, *grid, threads, shared, stream, arguments = found.groups()
        kernel = next(k for k in kernels.values() if k["name"] == name)
        assert tuple(map(int, grid)) == launch.grid
        assert (int(threads), int(shared)) == (32 * kernel["warps"], kernel["shared"])
        assert int(stream, 16) == STREAM
        tensors = [places.get(tensor, WORKSPACE) for tensor in launch.tensors]  # scratch is the workspace
        values = [int(value, 0) for value in arguments.replace("(nil)", "0").split()]
        assert values == [*tensors, *launch.integers, *[0] * kernel["nulls"]]


def test_a_kernel_that_wants_more_shared_memory_than_there_is_is_refused(jbu, cuda):
    operator, kernels = jbu
    greedy = {key: kernel | {"shared": 200_000} for key, kernel in kernels.items()}
    with pytest.raises(UhdError, match=r"cuFuncSetAttribute failed \(CUDA_ERROR_INVALID_VALUE\)"):
        run(Runner(operator, {}, greedy))
