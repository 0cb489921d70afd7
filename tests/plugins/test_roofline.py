"""The roofline arithmetic, by hand at small sizes, and the notes in the kernels' docstrings."""

from pathlib import Path

import pytest
import torch

from uhd_export.plugins import roofline
from uhd_export.plugins.roofline import Device, floor, jbu_cost, note, window_cost, window_kernels
from uhd_export.plugins.window_attention.launch import LevelShape
from uhd_export.runtime.profiling.costs import Cost


def test_jbu_by_hand():
    cost = jbu_cost(2, 3, 5, 10)
    pixels = 2 * 6 * 10
    assert cost.elements == 2 * 3 * 5 * 10 + pixels * 3 + pixels * 10
    mlps = 3 * 32 + 32 * 32 + 52 * 49 + 49 * 49
    assert cost.flops == 2 * pixels * (mlps + 49 * 32 + 49 * 10 + 6 * 10)


def test_window_attention_by_hand():
    # One window of 2x2 pixels and a bin: four samples' weights on four pixels.
    sizes = {"batch": 3, "side": 1, "heads": 2, "size": 5, "channels": 10}
    cost = window_cost([LevelShape(2, 2, 1, 1)], **sizes)
    values = 2 * 3 * 4 * 10 * 2 * 5  # four query sets
    assert cost.flops == 2 * 3 * 4 * 10 + 2 * 2 * 3 * 8 * 10 + values
    assert cost.elements == 3 * 4 * 11 + 8 + 8 * 12 + 10 * 12 + 3 * 4 * 10
    kernels = window_kernels([LevelShape(2, 2, 1, 1)], **sizes)
    assert sum(kernel.flops for kernel in kernels.values()) == cost.flops
    # Pooled rows are written, and read for scores and values, their scale and mass in float32; scores as well
    # are written and read three times, by the softmax in place.
    buffers = 3 * (3 * 10 + 2 * 3 * 2) + 2 * 4 * 3 * 8
    assert sum(kernel.elements for kernel in kernels.values()) == cost.elements + buffers


def test_floor_is_the_slower_of_memory_and_arithmetic():
    device = Device("toy", bandwidth=100, flops=10)
    assert floor(Cost(flops=5, weights=50, activations=150), device, size=2) == pytest.approx(4)
    assert floor(Cost(flops=50, weights=50, activations=150), device, size=2) == pytest.approx(5)
    assert (Cost(1, 2, 3) + Cost(3, 4, 5)) == Cost(4, 6, 8)


def test_image_is_seven_crops():
    cost = roofline.image_costs()
    # The overview's 551 patches beside the slices' 6 x 576: at 4x, pixels 16-fold.
    assert cost["JBU"].elements == pytest.approx(
        (6 * 576 + 551) * (1024 * (1 + 4 + 4 + 16) + 3 * 20), rel=1e-9
    )
    # Six crops share their queries and values, the overview has its own: three levels each.
    parameters = 2 * 3 * (144 * 128 * 1026 + 4096 * 1026)
    assert 0.5 < parameters / cost["WindowAttention"].elements < 0.6
    # The mixed rows of three levels and seven crops, 793 MB, pass through no memory.
    mixed = 3 * 7 * 144 * 128 * 1024
    assert sum(kernel.elements for kernel in roofline.image_kernels().values()) < 0.9 * mixed


@pytest.mark.parametrize(("op", "folder"), [("JBU", "jbu"), ("WindowAttention", "window_attention")])
def test_docstrings_tell_what_the_arithmetic_says(op, folder):
    source = Path(roofline.__file__).parent / folder / "kernel.py"
    assert note(op) in " ".join(source.read_text(encoding="utf-8").split())


@pytest.fixture
def kernels_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import kernels

    return kernels


def test_benchmark_refuses_without_a_gpu(kernels_benchmark, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["kernels.py"])
    with pytest.raises(SystemExit, match="needs a CUDA GPU") as caught:
        kernels_benchmark.main()
    assert "\n" not in str(caught.value)


def test_benchmark_checks_before_it_measures(kernels_benchmark, monkeypatch):
    made = [
        kernels_benchmark.jbu_case(1, 2, 3, 8, torch.float32, "cpu"),
        kernels_benchmark.window_case(1, 2, 3, 8, 2, 4, 2, torch.float32, "cpu"),
    ]
    monkeypatch.setattr(kernels_benchmark, "milliseconds", lambda call, repeats: {"median": 2.0})
    monkeypatch.setattr("torch.compile", lambda function, **_: function)
    for case in made:
        row = kernels_benchmark.measure(case, "float32", Device("toy", 1e3, 1e9), 1)
        assert row["error"] < 1e-6 and row["speedup_eager"] == 1
        assert row["over_floor"] == pytest.approx(2e-3 / floor(case.cost, Device("toy", 1e3, 1e9), 4))
        wrong = case._replace(kernel=lambda *x, case=case: [1.01 * y for y in case.eager(*x)])
        both = [wrong, case]
        monkeypatch.setattr(kernels_benchmark, "cases", lambda dtype, both=both: both)
        failed, fine = kernels_benchmark.measure_all("float32", Device("toy", 1e3, 1e9), 1)
        assert "relative error 1.0e-02" in failed["failed"] and "kernel_ms" not in failed
        assert fine["error"] < 1e-6
