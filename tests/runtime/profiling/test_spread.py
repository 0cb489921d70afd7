import numpy as np
import pytest

from uhd_export.runtime.engines.product import product
from uhd_export.runtime.profiling import energy, machine
from uhd_export.runtime.profiling.energy import EnergyMeter
from uhd_export.runtime.profiling.machine import OtherWork
from uhd_export.runtime.profiling.rates import measure_rates
from uhd_export.runtime.profiling.spread import Spread, bootstrap, is_steady, percentiles


def test_the_interval_holds_the_median_of_most_other_series():
    random, held = np.random.default_rng(1), 0
    for _ in range(60):
        interval = bootstrap(list(random.normal(1.0, 0.1, 31)))
        held += interval[0] <= 1.0 <= interval[1]
    assert 50 <= held <= 60, "95 of 100 are meant"
    wide, narrow = (Spread.of(list(random.normal(1.0, 0.1, n))).interval for n in (5, 200))
    assert wide[1] - wide[0] > narrow[1] - narrow[0]


def test_percentiles_are_of_the_slowest_steps():
    found = percentiles([1.0] * 98 + [5.0, 9.0])
    assert found["p50"] == found["p90"] == 1.0 and 5.0 < found["p99"] < 9.0


def test_warm_up_goes_on_while_runs_get_faster():
    assert not is_steady([]) and not is_steady([3.0]) and not is_steady([3.0, 2.0])
    assert is_steady([3.0, 2.0, 1.95]) and is_steady([1.0, 1.2])


@pytest.mark.parametrize(("idle", "expected"), [(100, 0.5), (0, 1.0)])
def test_other_work_is_what_this_process_did_not_do(tmp_path, monkeypatch, idle, expected):
    stat = tmp_path / "stat"
    monkeypatch.setattr(machine, "_STAT", stat)
    monkeypatch.setattr(machine.time, "process_time", lambda: 5.0)
    stat.write_text("cpu  0 0 0 0 0 0 0 0 0 0\ncpu0 1\n")
    work = OtherWork()
    stat.write_text(f"cpu  100 0 0 {idle} 0 0 0 0 0 0\ncpu0 1\n")
    assert work.share() == pytest.approx(expected)


def test_other_work_is_unknown_where_the_system_does_not_tell(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_STAT", tmp_path / "absent")
    assert OtherWork().share() is None


def test_energy_of_packages_survives_a_counter_that_wraps(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "_RAPL", tmp_path)
    for number, name in enumerate(("package-0", "dram")):
        folder = tmp_path / f"intel-rapl:{number}"
        folder.mkdir()
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text("10000000")
        (folder / "energy_uj").write_text("9000000")
    with EnergyMeter("cpu") as meter:
        (tmp_path / "intel-rapl:0" / "energy_uj").write_text("9500000")
        (tmp_path / "intel-rapl:1" / "energy_uj").write_text("1000000")
    assert meter.joules == {"package-0": 0.5, "dram": 2.0}


def test_energy_of_a_gpu_is_its_mean_power_times_the_time(tmp_path, monkeypatch):
    told = "import sys, time; print(100.0); print(300.0, flush=True); time.sleep(30)"
    monkeypatch.setattr(energy, "_RAPL", tmp_path)
    monkeypatch.setattr(energy, "_WATTS", ["python3", "-c", told])
    with EnergyMeter("cuda") as meter:
        start = energy.time.perf_counter()
        while energy.time.perf_counter() - start < 1.0:
            energy.time.sleep(0.1)
    assert 200 * 1.0 <= meter.joules["gpu"] < 200 * 10


def test_no_energy_where_nothing_tells(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "_RAPL", tmp_path)
    monkeypatch.setattr(energy, "_WATTS", ["no-such-command"])
    with EnergyMeter("cuda") as meter:
        pass
    assert meter.joules == {}


def test_rates_of_this_machine():
    rates = measure_rates("onnxruntime", "cpu", 1)
    assert 1e8 < rates.flops_per_second < 1e14 and 1e8 < rates.bytes_per_second < 1e13
    assert measure_rates("tensorrt", "cuda", None) is None


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_model_of_one_product_is_onnx(dtype):
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(product(np.dtype(dtype)))
    onnx.checker.check_model(model)
    (node,) = model.graph.node
    assert node.op_type == "MatMul" and [i.name for i in model.graph.input] == ["a", "b"]
