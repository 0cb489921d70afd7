"""benchmarks/gpu.py on a machine without a GPU: it refuses in one line, and its pieces are right on a CPU."""

import json
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

SIZE = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4}
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def pieces(monkeypatch):
    """The scripts' folder on the path, no gradients, as in the script, and no warming up."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_engines

    monkeypatch.setattr(gpu_engines, "WARM_SECONDS", 0.0)
    with torch.no_grad():
        yield


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_it_refuses_without_a_gpu(tmp_path):
    command = [sys.executable, BENCHMARKS / "gpu.py", "--json", tmp_path / "result.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    assert done.stderr.splitlines() == [
        "benchmarks/gpu.py: not measured: no CUDA GPU that PyTorch can use is at hand"
    ]


def test_a_wrong_result_has_no_time():
    import attempts
    import gpu

    assert attempts.require("x", 1e-3, 1e-2) == 1e-3
    for error in (1.0, float("nan")):
        with pytest.raises(attempts.Wrong, match="x: relative error"):
            attempts.require("x", error, 1e-2)
    assert gpu.relative([np.ones(3), torch.zeros(2)], [np.ones(3), torch.ones(2)]) == 1.0


def test_a_failure_costs_its_own_figure_only(monkeypatch, capsys, tmp_path):
    import gpu

    def fails(*_):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "describe_machine", lambda: {"gpu": "NVIDIA H100"})
    monkeypatch.setattr(gpu, "measure_kernels", fails)
    monkeypatch.setattr(gpu, "measure_decode", lambda *_: {"step": 1})
    arguments = ["gpu.py", "--part", "kernels", "--part", "decode", "--json", str(tmp_path / "x.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == "benchmarks/gpu.py: kernels: RuntimeError: out of memory"
    result = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "x.json").read_text()) == result
    assert result.pop("predicted")
    assert result == {
        "machine": {"gpu": "NVIDIA H100"},
        "kernels": {"failed": "RuntimeError: out of memory"},
        "decode": {"step": 1},
    }


@pytest.fixture
def models(golden_checkpoint):
    """The released computation and ours, tiny, in float32 on the CPU."""
    import gpu_vision

    tower = golden_checkpoint / "clip"
    kinds = (gpu_vision.Released, gpu_vision.Ours)
    return [kind(golden_checkpoint, "cpu", torch.float32, vision_tower=tower) for kind in kinds]


def test_ours_computes_what_the_released_code_does(models):
    import gpu
    import gpu_vision

    released, ours = models
    for shape in ((2, 6, 8), (1, 5, 7)):
        batch = released.batch(shape)
        assert gpu.relative([ours.encode(batch)], [released.encode(batch)]) < 1e-5
    gpu_vision.vit_products(ours, batch)()


def test_products_are_those_of_the_vit(models):
    """Counted by PyTorch: the tower's multiplications, nothing else."""
    import gpu_vision
    from torch.utils.flop_counter import FlopCounterMode

    batch, counts = models[0].batch((2, 6, 8)), []
    for run in (lambda: models[0].vit(batch), gpu_vision.vit_products(models[0], batch)):
        with FlopCounterMode(display=False) as counter:
            run()
        counts.append(counter.get_total_flops())
    assert counts[1] == pytest.approx(counts[0], rel=0.05)  # the tower interpolates positions besides


def test_the_backend_is_one_that_runs_on_the_gpu():
    import gpu_engines

    pytest.importorskip("tensorrt_rtx")
    assert gpu_engines.choose_backend("8.9") == "tensorrt-rtx"
    with pytest.raises(
        gpu_engines.Unavailable, match=r"no target for compute capability 9\.0; backend tensorrt"
    ):
        gpu_engines.choose_backend("9.0")


def test_engines_get_the_crops_that_pytorch_gets(models):
    import gpu_engines

    shape = (2, 6, 8)
    feeds = gpu_engines.crop_feeds(["pixels", "roi_1x_y"], shape)
    assert set(feeds) == {"pixels", "roi_1x_y"}
    np.testing.assert_array_equal(feeds["pixels"], models[0].batch(shape).pixels.numpy())


@pytest.mark.parametrize("dialect", ["onnxruntime", "tensorrt"])
def test_the_decode_loop(tmp_path, dialect):
    import gpu_engines
    from decode_runners import llama_config

    from uhd_export.runtime.engines.backends import open_engine

    config = llama_config({**SIZE, "num_hidden_layers": 2, "vocab_size": 300, "max_position_embeddings": 64})
    graph = gpu_engines.emit_int4(config, tmp_path / "x.onnx", dialect, 64)
    with open_engine(graph, threads=1) as engine:
        times = gpu_engines.decode_times(engine, config, 64, prompt=20, steps=4)
    assert times["kv_bytes"] == 2 * 2 * 64 * 256 * 2
    assert times["prefill_seconds"] > 0 and times["step_seconds"] > 0


@pytest.mark.slow
def test_every_part_on_a_tiny_model(golden_checkpoint, tmp_path, monkeypatch):
    """The parts as the script runs them, with the CPU in the GPU's place: shapes, keys, what is missing."""
    import gpu
    import kernels
    import random_checkpoint

    import uhd_export.plugins.roofline

    def tiny(folder, **_):
        shutil.copytree(golden_checkpoint, folder, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"mm_vision_tower": "clip"}))
        return folder

    def timed(run, repeats):
        run()
        return {"median": 1.0}

    monkeypatch.setattr(random_checkpoint, "write_checkpoint", tiny)
    monkeypatch.setattr(random_checkpoint, "VICUNA_7B", {**SIZE, "vocab_size": 300})
    monkeypatch.setattr(kernels, "milliseconds", timed)
    monkeypatch.setattr(uhd_export.plugins.roofline, "CROPS", ((2, 6, 8), (1, 5, 7)))
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(torch, "compile", lambda run, **_: run)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    options, machine = Namespace(repeats=1, layers=2), {"gpu": "NVIDIA H200", "capability": "9.0"}
    vision = gpu.measure_vision(options, machine)
    for name in ("eager", "compiled", "ours"):
        assert 0 < vision[name]["error"] < 5e-2
        assert {f"{stage}_ms" for stage in ("vit", "jbu", "hiwin", "all")} <= vision[name].keys()
    assert vision["over_vit_products"] == 1.0
    assert vision["speedup_eager"] == vision["speedup_compiled"] == {"projector": 1.0, "vision": 1.0}
    engines = gpu.measure_vision_engines(options, machine)
    assert "no target for compute capability 9.0" in engines["tensorrt_plugins"]["not_measured"]
    assert "no CUDA provider" in engines["onnxruntime_cuda"]["not_measured"]
    decode = gpu.measure_decode(options, machine)
    assert "no target" in decode["tensorrt"]["not_measured"]
    assert "runs on the CPU only" in decode["onnxruntime"]["not_measured"]
