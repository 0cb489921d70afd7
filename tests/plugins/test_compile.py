"""Ahead-of-time compilation of the kernels, without a GPU."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
from support.refusals import one_line_error

from uhd_export.plugins.compile import compiler as aot
from uhd_export.plugins.compile import report
from uhd_export.plugins.jbu import launch as jbu
from uhd_export.runtime.errors import UhdError

# Most dynamic shared memory of a block, in bytes, by compute capability (CUDA programming guide).
SHARED = {80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}


def small_request(capability=89, **changes):
    launches, scratch = jbu.plan(1, 4, 4, 16, "float16")
    request = aot.Request.of("jbu", launches[0], report.types(launches[0], scratch, "float16"), capability)
    return dataclasses.replace(request, **changes)


@pytest.mark.slow
def test_every_kernel_compiles_for_every_target_at_real_size():
    rows = report.report(["float16"])
    assert {row["sm"] for row in rows} == set(aot.TARGETS)
    assert {row["kernel"] for row in rows} == {
        "range_features",
        "jbu_stage",
        "window_pool",
        "window_scores",
        "window_softmax",
        "window_values",
    }
    for row in rows:
        assert row["shared"] <= SHARED[row["sm"]], row
        assert row["registers"] * 32 * row["warps"] <= 65536, row
        if row["kernel"] in ("jbu_stage", "window_values"):  # two programs fit a core
            assert 2 * row["registers"] * 32 * row["warps"] <= 65536
            assert 2 * row["shared"] <= SHARED[row["sm"]]


def test_kernels_compile_without_a_cache_that_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("UHD_EXPORT_CACHE", str(tmp_path / "file"))
    (kernel,) = aot.compile_kernels([small_request()])
    assert kernel.name == "range_features" and kernel.capability == 89 and ".entry" in kernel.ptx


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_types_fit_small_gpus(dtype):
    assert all(row["shared"] <= SHARED[89] for row in report.report([dtype], [89]))


def test_channel_loops_move_16_bytes_at_a_time():
    for op, (launches, scratch) in report.real_size("float16").items():
        for launch in launches:
            request = aot.Request.of(op, launch, report.types(launch, scratch, "float16"), 89)
            (kernel,) = aot.compile_kernels([request])
            if launch.kernel in ("jbu_stage", "window_scores"):  # asynchronously
                copies = re.findall(r"cp\.async\.cg\.shared\.global [^;]*, 0x10\b", kernel.ptx)
                assert len(copies) >= 2, launch.kernel
            elif launch.kernel != "range_features":
                assert re.search(r"ld\.global(\.\w+)*\.v4\.b32", kernel.ptx), launch.kernel
            assert "st.global.v4.b32" in kernel.ptx


def test_kernels_are_written_in_ptx_that_older_drivers_read():
    # CUDA 12.0's drivers compile PTX 8.0; Blackwell's RTX cards need 12.8's anyway.
    for capability in aot.TARGETS:
        (kernel,) = aot.compile_kernels([small_request(capability)])
        assert f".version {'8.7' if capability == 120 else '8.0'}\n" in kernel.ptx


def test_results_are_kept_and_follow_the_source(tmp_path, monkeypatch):
    monkeypatch.setenv("UHD_EXPORT_CACHE", str(tmp_path))
    (kernel,) = aot.compile_kernels([small_request()])
    assert kernel.name == "range_features" and f".target sm_{kernel.capability}" in kernel.ptx
    assert kernel.nulls == kernel.ptx.count(".param .u64") - 6  # five weights and maps in, one out
    (path,) = (tmp_path / "kernels").iterdir()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"registers": -1}))
    assert aot.compile_kernels([small_request()])[0].registers == -1
    other = small_request(warps=8)
    assert other.key() != small_request().key()


def test_key_follows_the_kernel_source(tmp_path, monkeypatch):
    key = small_request().key()
    (tmp_path / "jbu").mkdir()
    (tmp_path / "compile").mkdir()
    for name in ("tiles.py", "compile/worker.py", "jbu/kernel.py"):
        (tmp_path / name).write_bytes((aot.FOLDER / name).read_bytes())
    monkeypatch.setattr(aot, "FOLDER", tmp_path)
    assert small_request().key() == key
    (tmp_path / "tiles.py").write_bytes(b"# changed\n")
    assert small_request().key() != key


def test_what_the_compiler_refuses_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("UHD_EXPORT_CACHE", str(tmp_path))
    with one_line_error(r"kernel range_features for sm_89: not compiled: .*PRECISION"):
        aot.compile_kernels([small_request(constants=())])
    assert not any((tmp_path / "kernels").iterdir())


def test_without_triton(monkeypatch):
    def missing(name):
        raise aot.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(aot.importlib.metadata, "version", missing)
    with pytest.raises(UhdError, match="pip install triton"):
        small_request().key()


def test_command_prints_json():
    command = [
        sys.executable,
        "-m",
        "uhd_export.plugins.compile",
        "--dtype",
        "float16",
        "--target",
        "89",
        "--json",
    ]
    rows = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert rows == report.report(["float16"], [89])
