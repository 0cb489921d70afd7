"""Engines: opening, running, binding buffers, traces, and one-line errors."""

import os
import re
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from uhd_export.plugins.graph import GraphBuilder
from uhd_export.runtime.engines.backends import open_engine
from uhd_export.runtime.engines.base import Stop, Stopped
from uhd_export.runtime.engines.wheels import both_wheels
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.memory import resident_memory


@pytest.fixture
def accumulator(tmp_path):
    """A graph with state: total = past + x, and mean = the total's mean over the free axis."""
    builder = GraphBuilder("accumulator")
    x = builder.input("x", ir.DataType.FLOAT, ("size", 2))
    past = builder.input("past", ir.DataType.FLOAT, ("size", 2))
    ones = builder.weight("ones", (2, 2), ir.DataType.FLOAT, lambda: np.eye(2, dtype=np.float32))
    total = builder.op("Add", past, builder.op("MatMul", x, ones, name="project"), name="add")
    mean = builder.op("ReduceMean", total, builder.constant([0]), keepdims=0, name="average")
    builder.output(total, "total", ir.DataType.FLOAT, ("size", 2), direct=True)
    builder.output(mean, "mean", ir.DataType.FLOAT, (2,))
    builder.save(tmp_path / "accumulator.onnx")
    return tmp_path / "accumulator.onnx"


def test_inputs_outputs_and_results(accumulator):
    with open_engine(accumulator, threads=1) as engine:
        assert engine.inputs["x"].shape == ("size", 2) and engine.inputs["x"].dtype == np.float32
        assert engine.inputs["x"].resolve({"size": 5}) == (5, 2)
        assert list(engine.outputs) == ["total", "mean"]
        x = np.arange(6, dtype=np.float32).reshape(3, 2)
        results = engine.infer({"x": x, "past": 2 * x})
        np.testing.assert_array_equal(results["total"], 3 * x)
        np.testing.assert_array_equal(results["mean"], 3 * x.mean(0))
        assert engine.weight_bytes == sum(f.stat().st_size for f in accumulator.parent.iterdir())


def test_more_threads_than_cores_are_refused(accumulator, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(UhdError, match="threads 3: this machine has 2 cores; use at most as many"):
        open_engine(accumulator, threads=3)


def test_rows_of_a_binding_are_the_same_memory(accumulator):
    with open_engine(accumulator, threads=1) as engine:
        whole = engine.bind({"past": "total"}, {"size": 4})
        part = whole.rows(1, 3)
        assert part.nbytes == 2 * 2 * 4
        x = np.array([[1, 2], [3, 4]], np.float32)
        assert part.infer({"x": x})["mean"].tolist() == [2, 3]
        part.rows(1, 2).infer({"x": x[:1]})
        assert whole.read("past").tolist() == [[0, 0], [1, 2], [4, 6], [0, 0]]
        del whole
        assert part.read("past").tolist() == [[1, 2], [4, 6]]


def test_a_run_can_be_stopped_from_another_thread(tmp_path):
    builder = GraphBuilder("long")
    x = builder.input("x", ir.DataType.FLOAT, (600, 600))
    y = x
    for _ in range(3000):
        y = builder.op("MatMul", y, x)
    builder.output(y, "y", ir.DataType.FLOAT, (600, 600))
    builder.save(tmp_path / "long.onnx")
    with open_engine(tmp_path / "long.onnx", threads=1) as engine:
        feeds, stop = {"x": np.zeros((600, 600), np.float32)}, Stop()
        threading.Timer(0.1, stop.request).start()
        start = time.perf_counter()
        with pytest.raises(Stopped):
            engine.infer(feeds, stop)
        assert time.perf_counter() - start < 2
        with pytest.raises(Stopped):  # and what comes after it does not begin
            engine.bind({}, {}).infer(feeds, stop)


def test_a_binding_keeps_its_buffer_and_others_have_their_own(accumulator):
    with open_engine(accumulator, threads=1) as engine:
        first, second = (engine.bind({"past": "total"}, {"size": 3}) for _ in range(2))
        assert first.nbytes == 3 * 2 * 4
        x = np.ones((3, 2), np.float32)
        means = [first.infer({"x": x})["mean"] for _ in range(3)]
        assert [m.tolist() for m in means] == [[1, 1], [2, 2], [3, 3]]
        assert first.read("past").tolist() == (3 * x).tolist()
        assert set(second.infer({"x": 5 * x})) == {"mean"}
        assert second.read("past").tolist() == (5 * x).tolist()
        nothing = engine.bind({}, {})
        for scale in (1, 2):
            results = nothing.infer({"x": scale * x[:scale], "past": x[:scale]})
            assert results["total"].tolist() == [[scale + 1] * 2] * scale
            assert results["mean"].tolist() == [scale + 1] * 2
        # Feeds need not be contiguous.
        assert first.infer({"x": np.ones((2, 3), np.float32).T})["mean"].tolist() == [4, 4]


def test_buffers_start_as_zeros_whatever_the_memory_held(accumulator, monkeypatch):
    allocate = onnxruntime.OrtValue.ortvalue_from_shape_and_type

    def dirty(shape, kind, device="cpu"):
        buffer = allocate(shape, kind, device)
        buffer.update_inplace(np.full(shape, np.nan, kind))
        return buffer

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", dirty)
    with open_engine(accumulator, threads=1) as engine:
        binding = engine.bind({"past": "total"}, {"size": 3})
        assert not binding.read("past").any()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read on Linux")
def test_buffers_take_memory_only_where_they_are_written(accumulator):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with open_engine(accumulator, threads=1) as engine:
        before = resident()
        binding = engine.bind({"past": "total"}, {"size": 2**24})
        assert binding.nbytes == 2**27
        assert resident() - before < binding.nbytes / 10


def test_feeds_are_checked(accumulator):
    x = np.ones((3, 2), np.float32)
    with open_engine(accumulator, threads=1) as engine:
        binding = engine.bind({"past": "total"}, {"size": 3})
        for run, feeds, message in [
            (engine.infer, {"x": x}, "differ from the inputs"),
            (engine.infer, {"x": x, "past": x, "y": x}, "differ from the inputs"),
            (engine.infer, {"x": x, "past": x.astype(np.float64)}, "feed past: type float64"),
            (binding.infer, {"x": x, "past": x}, "differ from the inputs"),
            (binding.infer, {"x": x.astype(np.float16)}, "feed x: type float16"),
        ]:
            with pytest.raises(ValueError, match=message):
                run(feeds)
        with pytest.raises(KeyError, match="size"):
            engine.bind({"past": "total"}, {})


def test_errors_are_one_line_with_the_remedy(accumulator, tmp_path, monkeypatch):
    with pytest.raises(UhdError, match=r"^backend 'tflite': unknown; use one of onnxruntime"):
        open_engine(accumulator, "tflite")
    with pytest.raises(UhdError, match=r"^engine .*missing.onnx: no such file$"):
        open_engine(tmp_path / "missing.onnx")
    with pytest.raises(UhdError, match=r"^device 'tpu': unknown; use cpu, cuda, or cuda:1"):
        open_engine(accumulator, device="tpu")
    with pytest.raises(UhdError, match=r"^device 'cpu:1': unknown"):
        open_engine(accumulator, device="cpu:1")
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(
        UhdError, match=r"^device cuda: .* on the CPU only; .*pip install 'uhd-export\[cuda\]'$"
    ):
        open_engine(accumulator, device="cuda")
    accumulator.write_bytes(b"not a model")
    with pytest.raises(
        UhdError, match=r"^engine .*accumulator.onnx: ONNX Runtime cannot load it .*build it again$"
    ):
        open_engine(accumulator)


PARSED = 'Parse Failed to parse provider option "device_id": '


@pytest.mark.parametrize(
    "said, line",
    [
        (
            PARSED + "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version ; GPU=0",
            "device cuda: CUDA cannot use it (CUDA failure 35: CUDA driver version is insufficient for CUDA "
            "runtime version); see nvidia-smi, and update the driver",
        ),
        (
            "run CUDA failure 46: CUDA-capable device(s) is/are busy or unavailable ; GPU=0 ; x",
            "device cuda: CUDA cannot use it (CUDA failure 46: CUDA-capable device(s) is/are busy or "
            "unavailable); see nvidia-smi, and update the driver",
        ),
        (PARSED + "Invalid device ID: 7, must", "device cuda: there is no such GPU; see nvidia-smi -L"),
        (PARSED + "CUDA failure 2: out of memory ; GPU=0 ; x", "not enough memory; close other programs"),
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0", "not enough memory; close other programs"),
        ("Available memory of 9 is smaller than requested bytes of 10", "not enough memory; close other"),
    ],
)
def test_what_cuda_lacks_is_told_as_it_is(accumulator, monkeypatch, said, line):
    def refuse(*arguments, **options):
        raise RuntimeError(said)

    monkeypatch.setattr("uhd_export.runtime.engines.onnxruntime.prepare_cuda", lambda ort: "")
    monkeypatch.setattr("onnxruntime.InferenceSession", refuse)
    with pytest.raises(UhdError, match=re.escape(line)):
        open_engine(accumulator, device="cuda")


def test_what_fails_in_a_run_is_one_line_too(accumulator):
    with open_engine(accumulator) as engine:
        x = np.zeros((3, 2), np.float32)
        with pytest.raises(
            UhdError, match=r"accumulator\.onnx: ONNX Runtime cannot run it on cpu \(.*--device$"
        ):
            engine.infer({"x": x, "past": np.zeros((2, 2), np.float32)})
        with pytest.raises(UhdError, match="cannot run it on cpu"):
            engine.bind({"past": "total"}, {"size": 2}).infer({"x": x})


def test_two_wheels_in_one_folder_are_named(accumulator, tmp_path, monkeypatch):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    for place, names in {"both": ("onnxruntime", "onnxruntime_gpu"), "apart": ("onnxruntime_gpu",)}.items():
        for name in names:
            info = tmp_path / place / f"{name}-1.31.1.dist-info"
            info.mkdir(parents=True)
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.31.1\n")
    monkeypatch.syspath_prepend(tmp_path / "apart")
    assert both_wheels() is None
    monkeypatch.syspath_prepend(tmp_path / "both")
    with pytest.raises(UhdError, match=r"^device cuda: .*both installed .* pip uninstall -y .*\[cuda\]"):
        open_engine(accumulator, device="cuda:1")


def test_a_backend_that_is_not_installed_says_what_to_install(accumulator, monkeypatch):
    monkeypatch.delitem(sys.modules, "uhd_export.runtime.engines.onnxruntime")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        UhdError, match=r"^backend onnxruntime: not installed .*'uhd-export\[cpu\]', or .*\[cuda\]"
    ):
        open_engine(accumulator)


def test_closing_frees_the_weights_though_a_binding_lives(tmp_path):
    builder = GraphBuilder("large")
    x = builder.input("x", ir.DataType.FLOAT, ("size", 4096))
    past = builder.input("past", ir.DataType.FLOAT, ("size", 4096))
    weight = builder.weight("weight", (4096, 4096), ir.DataType.FLOAT, lambda: np.ones((4096, 4096), "f4"))
    total = builder.op("Add", past, builder.op("MatMul", x, weight))
    builder.output(total, "total", ir.DataType.FLOAT, ("size", 4096), direct=True)
    builder.save(tmp_path / "large.onnx")
    engine = open_engine(tmp_path / "large.onnx", threads=1)
    binding = engine.bind({"past": "total"}, {"size": 1})
    row = binding.rows(0, 1)
    row.infer({"x": np.ones((1, 4096), np.float32)})
    opened = resident_memory()
    engine.close()
    assert resident_memory() < opened - 0.9 * 4 * 4096**2
    engine.close()
    assert binding is not row
