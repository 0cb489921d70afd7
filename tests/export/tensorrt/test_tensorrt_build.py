"""Engines are built without a GPU: profiles, parsing, targets, errors, cache."""

import errno
import json
import os
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.refusals import one_line_error
from support.tiny_language import CONTEXT, reader, tiny_model

from uhd_export import tensorrt
from uhd_export.checkpoint.config import read_config
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.checkpoint.source import EMBEDDED
from uhd_export.graph.cache import FloatCache
from uhd_export.graph.int4.formats import Int4Dequantize, RoundedWeights
from uhd_export.graph.language import emit_language
from uhd_export.graph.vision import emit_vision
from uhd_export.plugins.graph import GraphBuilder
from uhd_export.runtime.engines.tensorrt.record import (
    OptimizationProfile,
    ShapeRange,
    read_record,
    record_path,
)
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.geometry import GRID_MODES, crop_geometry
from uhd_export.runtime.image.slicing import plan_slices
from uhd_export.tensorrt import EngineOptions, build_engine, cached_engine, language_profiles, vision_profiles
from uhd_export.tensorrt.network import load_graph
from uhd_export.tensorrt.progress import Phases

pytest.importorskip("tensorrt_rtx")
ADA = EngineOptions(compute_capabilities=("8.9",), plugins=False)


@pytest.fixture(scope="module")
def vision_graph(golden_model, golden_checkpoint, tmp_path_factory):
    """The folded float16 graph with the levels 1x and 2x, and its configuration."""
    config = golden_model(mask=3).config
    path = tmp_path_factory.mktemp("tensorrt") / "vision.onnx"
    checkpoint = Checkpoint(golden_checkpoint)
    emit_vision(config, checkpoint, path, dtype="float16")
    checkpoint.close()
    return path, config


def language_graph(folder, dtype="float16", model=("qwen2", 4, 2, True), **options):
    """A tiny language graph in the dialect of TensorRT, and its configuration."""
    model = tiny_model(*model)
    path = folder / "language.onnx"
    emit_language(model.config, reader(model), path, dtype=dtype, dialect="tensorrt", **options)
    return path, model.config


def small_graph(folder, operator="Relu", domain="", **attributes):
    """One operator from x (size, 4) to y."""
    b = GraphBuilder("small")
    x = b.input("x", ir.DataType.FLOAT, ("size", 4))
    b.output(
        b.op(operator, x, domain=domain, name="stage/it", **attributes), "y", ir.DataType.FLOAT, ("size", 4)
    )
    path = folder / "small.onnx"
    b.save(path)
    return path


SMALL = [OptimizationProfile("any", {"x": ShapeRange((1, 4), (2, 4), (8, 4))})]


@settings(max_examples=20)
@given(
    size=st.tuples(st.integers(1, 20000), st.integers(1, 20000)),
    max_slices=st.sampled_from([1, 4, 9]),
    mode=st.sampled_from(GRID_MODES),
    bands=st.sampled_from([1, 5]),
)
def test_profiles_hold_every_crop_that_planning_produces(golden_model, size, max_slices, mode, bands):
    config = golden_model().config
    profiles = profiles_of(config, bands)
    for rows, cols in set(plan_slices(size, max_slices=max_slices).patch_grids):
        if min(rows, cols) < 2:
            continue  # no feature pyramid, refused by crop_geometry
        shapes = {name: m.shape for name, m in crop_geometry(rows, cols, grid_mode=mode).items()}
        for batch in (1, 10):
            shapes["pixels"] = (batch, 3, rows * 14, cols * 14)
            assert any(profile.covers(shapes) for profile in profiles), (rows, cols)
        shapes["pixels"] = (11, 3, rows * 14, cols * 14)
        assert not any(profile.covers(shapes) for profile in profiles)


_profiles = {}


def profiles_of(config, bands):
    """Computed once for all examples."""
    return _profiles.setdefault(bands, vision_profiles(config, bands=bands))


def test_bands_are_tight_around_their_crops(golden_model):
    first, *others = profiles_of(golden_model().config, 5)
    assert first.name == "24x24" and first.ranges["pixels"].opt == (6, 3, 336, 336)
    assert len(others) == 4
    height, width = (size // 14 for size in first.ranges["pixels"].max[2:])
    assert height * width < 2 * 576
    (everything,) = profiles_of(golden_model().config, 1)
    assert everything.ranges["pixels"].max == (10, 3, 288 * 14, 288 * 14)


@pytest.fixture(scope="module")
def nano_graph(tmp_path_factory):
    """The embedded model's vision graph in float16, and its configuration."""
    folder = EMBEDDED
    path = tmp_path_factory.mktemp("nano") / "vision.onnx"
    checkpoint, config = Checkpoint(folder), read_config(folder)
    emit_vision(config, checkpoint, path, dtype="float16")
    checkpoint.close()
    return path, config


@pytest.mark.slow
@pytest.mark.parametrize("plugins", [True, False])
def test_nano_vision_engine(nano_graph, tmp_path, plugins):
    path, config = nano_graph
    done = []
    record = build_engine(
        path,
        tmp_path / "vision.engine",
        vision_profiles(config, bands=1, max_batch=2),
        replace(ADA, plugins=plugins),
        output_types={"tokens": "float16"},
        progress=lambda *step: done.append(step),
    )
    assert read_record(tmp_path / "vision.engine") == record
    assert record.bytes == (tmp_path / "vision.engine").stat().st_size > record.weight_bytes
    assert record.compute_capabilities == ("8.9",)
    operators = [name.split("_")[0] for name in record.plugin_layers]
    assert operators == (["jbu/JBU", "jbu/JBU", "hiwin/WindowAttention"] if plugins else [])
    assert record.layers.get("PLUGIN_V3", 0) == len(operators)
    assert (record.layers["MATRIX_MULTIPLY"] < 60) == plugins
    assert record.inputs["pixels"].info.shape == ("batch", 3, "height", "width")
    assert record.inputs["roi_1x_y"].info.shape[0] == 12  # the same in all profiles
    assert record.outputs["tokens"].info.dtype == np.float16
    assert record.outputs["tokens"].info.shape == ("batch", 144, 128)
    assert len(done) > 20 and done == sorted(done) and done[-1][0] <= done[-1][1]
    assert {f.name for f in tmp_path.iterdir()} == {"vision.engine", "vision.engine.json"}


def test_plugins_have_kernels_for_each_target(tmp_path, vision_graph):
    path, config = vision_graph
    turing = EngineOptions(compute_capabilities=("7.5",))
    message = r"^compute capability 7.5: the plugins have no kernels for it .*; use --no-plugins$"
    refused(message, path, tmp_path / "x.engine", vision_profiles(config, bands=1), turing)


def test_bodies_are_named_after_the_node_they_replace(vision_graph):
    path, _ = vision_graph
    model = load_graph(path, plugins=())
    assert not model.functions and all(node.domain == "" for node in model.graph.node)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    stages = {name.split("/")[0] for name in names if "/" in name}
    assert stages == {"vit", "jbu", "hiwin"}
    # Casts in front of the first stage and after the last.
    assert {node.op_type for node in model.graph.node if "/" not in node.name} == {"Cast", "Identity"}
    kept = load_graph(path, plugins=("JBU", "WindowAttention"))
    assert not kept.functions and {n.op_type for n in kept.graph.node if n.domain} == {
        "JBU",
        "WindowAttention",
    }


def test_inlined_graph_computes_the_same(vision_graph):
    path, _ = vision_graph
    quiet = ort.SessionOptions()
    quiet.log_severity_level = 3
    inlined = path.with_name("inlined.onnx")
    onnx.save(load_graph(path, plugins=()), inlined)
    sessions = [ort.InferenceSession(p, quiet) for p in (path, inlined)]
    pixels = np.random.default_rng(0).standard_normal((2, 3, 70, 98), np.float32)
    geometry = crop_geometry(5, 7, levels=(1, 2))
    names = {i.name for i in sessions[0].get_inputs()} - {"pixels"}
    feeds = {"pixels": pixels, **{name: geometry[name] for name in names}}
    expected, actual = (session.run(None, feeds)[0] for session in sessions)
    assert np.linalg.norm(actual - expected) < 1e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_language_engine_updates_its_cache_in_place(tmp_path, dtype):
    path, config = language_graph(tmp_path, dtype)
    record = build_engine(path, tmp_path / "l.engine", language_profiles(config, CONTEXT), ADA)
    names = [f"{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert record.aliases == {f"present.{n}": f"past_key_values.{n}" for n in names}
    assert record.layers["KV_CACHE_UPDATE"] == 4 and record.layers["ATTENTION_INPUT"] == 2
    assert record.inputs["past_key_values.0.key"].info.shape == (1, 2, CONTEXT, 32)
    assert record.inputs["inputs_embeds"].info.dtype == np.dtype(dtype)
    assert [p.name for p in record.profiles] == [f"decode {CONTEXT}", "prefill"]
    assert record.profiles[0].covers({"inputs_embeds": (1, 1, 128), "visible": (CONTEXT,)})
    assert not record.profiles[0].covers({"inputs_embeds": (1, 2, 128), "visible": (CONTEXT,)})
    assert record.profiles[1].covers({"inputs_embeds": (1, CONTEXT, 128), "visible": (CONTEXT,)})


def test_int4_weights_stay_int4(tmp_path):
    path, config = language_graph(tmp_path, linear=Int4Dequantize(RoundedWeights(32)))
    profiles = language_profiles(config, CONTEXT)
    record = build_engine(path, tmp_path / "int4.engine", profiles, ADA)
    assert record.layers["DEQUANTIZE"] == 4 * 2 + 1  # q, k, v and gate, up are one each
    (tmp_path / "dense").mkdir()
    path, _ = language_graph(tmp_path / "dense")
    dense = build_engine(path, tmp_path / "dense.engine", profiles, ADA)
    assert record.weight_bytes < 0.4 * dense.weight_bytes
    assert record.bytes - record.weight_bytes < dense.bytes


def test_one_engine_for_several_gpus(tmp_path):
    path, config = language_graph(tmp_path)
    profiles = language_profiles(config, CONTEXT)
    several = EngineOptions(compute_capabilities=("8.0", "8.6", "8.9", "12.0"), plugins=False)
    record = build_engine(path, tmp_path / "several.engine", profiles, several)
    assert record.compute_capabilities == ("8.0", "8.6", "8.9", "12.0")
    assert build_engine(path, tmp_path / "one.engine", profiles, ADA).bytes < record.bytes


def test_builds_are_reproducible(tmp_path):
    """All but the names of TensorRT's internal symbols, which follow addresses."""
    path, config = language_graph(tmp_path)
    profiles = language_profiles(config, CONTEXT)
    first, second = (build_engine(path, tmp_path / f"{i}.engine", profiles, ADA) for i in range(2))
    assert replace(first, sha256=second.sha256) == second
    one, two = (np.fromfile(tmp_path / f"{i}.engine", np.uint8) for i in range(2))
    assert (one != two).mean() < 1e-2


def test_dimensions_of_one_size_are_fixed(tmp_path):
    # All in float16: with float32 around attention TensorRT-RTX needs a free size, which our profiles have.
    path, _ = language_graph(tmp_path, cache=FloatCache("float16", "float16"))
    ranges = {"inputs_embeds": ShapeRange(*3 * ((1, 20, 128),)), "visible": ShapeRange(*3 * ((CONTEXT,),))}
    fixed = [OptimizationProfile("prefill", ranges)]
    record = build_engine(path, tmp_path / "fixed.engine", fixed, ADA)
    assert record.inputs["inputs_embeds"].shape == ("1", "20", "128")


def refused(message, *arguments):
    with one_line_error(message):
        build_engine(*arguments)


def test_errors_name_the_remedy(tmp_path):
    graph, out = small_graph(tmp_path), tmp_path / "out.engine"
    for message, options in [
        (
            r"^compute capability 9.0: tensorrt-rtx .* builds for 7.5, 8.0, .*--backend tensorrt$",
            EngineOptions(compute_capabilities=("8.6", "9.0")),
        ),
        (r"^backend 'tflite': unknown; use one of tensorrt-rtx, tensorrt$", EngineOptions("tflite")),
        (
            r"^backend tensorrt: not installed .*; pip install 'uhd-export\[tensorrt\]'$",
            EngineOptions("tensorrt"),
        ),
    ]:
        refused(message, graph, out, SMALL, options)
    refused(
        r"^profile none: no range for input x \(size\)$", graph, out, [OptimizationProfile("none", {})], ADA
    )
    more = {"x": SMALL[0].ranges["x"], "z": ShapeRange((1,), (1,), (1,))}
    refused(r"^profile more: the graph has no input z$", graph, out, [OptimizationProfile("more", more)], ADA)
    assert {f.name for f in tmp_path.iterdir()} == {"small.onnx", "small.onnx.data"}


def test_a_node_that_the_parser_refuses_is_named(tmp_path):
    out = tmp_path / "out.engine"
    unknown = small_graph(tmp_path, "GroupQueryAttention", "com.microsoft", num_heads=1, kv_num_heads=1)
    refused(r"TensorRT refuses node 0 'stage/it' \(GroupQueryAttention\): ", unknown, out, SMALL, ADA)
    lost = small_graph(tmp_path, "Lost", "uhd")
    refused(r"refuses node 0 'stage/it' \(Lost\): .*not registered: use --no-plugins", lost, out, SMALL, ADA)
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    refused(r"broken.onnx: cannot be read", tmp_path / "broken.onnx", out, SMALL, ADA)
    refused(r"missing.onnx: no such file", tmp_path / "missing.onnx", out, SMALL, ADA)
    assert not [f.name for f in tmp_path.iterdir() if "engine" in f.name]


def test_a_target_that_cannot_run_the_graph_is_named(tmp_path):
    path, config = language_graph(tmp_path, linear=Int4Dequantize(RoundedWeights(32)))
    turing = EngineOptions(compute_capabilities=("7.5", "8.6"), plugins=False)
    message = (
        r"compute capability 7.5, 8.6: TensorRT cannot build it \(.*int4.*leave compute capability 7.5 out"
    )
    refused(message, path, tmp_path / "x.engine", language_profiles(config, CONTEXT), turing)


def test_a_build_can_be_interrupted(tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(small_graph(tmp_path), tmp_path / "x.engine", SMALL, ADA, progress=stop)
    assert not (tmp_path / "x.engine").exists()


def test_nested_phases_are_one_growing_number():
    phases, seen = Phases(), []
    phases.start("all", 2)
    for outer in range(2):
        phases.start("part", 4)
        for step in range(4):
            phases.step("part", step + 1)
            assert phases.advance()
            seen.append(phases.reached)
        phases.finish("part")
        phases.step("all", outer + 1)
        assert not phases.advance()
    assert seen == [125, 250, 375, 500, 625, 750, 875, 1000]


def test_the_cache_keeps_what_was_built(tmp_path):
    graph, cache = small_graph(tmp_path), tmp_path / "cache"
    steps = []

    def get(out="out.engine", graph=graph, profiles=SMALL, options=ADA, **more):
        steps.clear()
        report = lambda *step: steps.append(step)  # noqa: E731
        return cached_engine(graph, tmp_path / out, profiles, options, folder=cache, progress=report, **more)

    first = get()
    assert steps and len(first.key) == 64
    assert get("again.engine") == first and not steps
    assert (tmp_path / "again.engine").read_bytes() == (tmp_path / "out.engine").read_bytes()
    assert read_record(tmp_path / "again.engine") == first
    # Whatever changes the engine changes the key.
    keys = {
        first.key,
        get(profiles=[OptimizationProfile("any", {"x": ShapeRange((1, 4), (4, 4), (8, 4))})]).key,
        get(options=EngineOptions(compute_capabilities=("8.6",), plugins=False)).key,
        get(options=EngineOptions(compute_capabilities=("8.9",), plugins=False, tf32=True)).key,
        get(output_types={"y": "float16"}).key,
        get(graph=small_graph(tmp_path, "Neg")).key,
    }
    assert len(keys) == 6
    # What is not whole is built again.
    kept = cache / f"{first.key}.engine"
    small_graph(tmp_path)
    kept.write_bytes(kept.read_bytes()[:-1] + b"!")
    assert get() == first and steps
    record_path(kept).write_text("{")
    assert get() == first and steps
    assert get() == first and not steps


def test_a_cache_that_cannot_be_written_stops_no_build(tmp_path, monkeypatch):
    graph, file = small_graph(tmp_path), tmp_path / "file"
    file.touch()
    record = cached_engine(graph, tmp_path / "out.engine", SMALL, ADA, folder=file / "engines")
    assert read_record(tmp_path / "out.engine") == record
    cached_engine(graph, tmp_path / "out.engine", SMALL, ADA, folder=tmp_path / "cache")

    def refuse(path):
        raise PermissionError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(os, "utime", refuse)
    again = cached_engine(graph, tmp_path / "again.engine", SMALL, ADA, folder=tmp_path / "cache")
    assert read_record(tmp_path / "again.engine") == again


def test_the_least_recently_used_engines_go_first(tmp_path):
    for age, name in enumerate(["new", "middle", "old"]):
        engine = tmp_path / f"{name}.engine"
        engine.write_bytes(bytes(100))
        record_path(engine).write_text("{}")
        os.utime(record_path(engine), (1e9 - age, 1e9 - age))
    tensorrt.cache.prune(tmp_path, 250)
    assert {f.name for f in tmp_path.glob("*.engine")} == {"new.engine", "middle.engine"}
    tensorrt.cache.prune(tmp_path, 50, keep=tmp_path / "middle.engine")
    assert {f.name for f in tmp_path.iterdir()} == {"middle.engine", "middle.engine.json"}


def test_records_are_read_strictly(tmp_path):
    record = build_engine(small_graph(tmp_path), tmp_path / "x.engine", SMALL, ADA)
    path = record_path(tmp_path / "x.engine")
    content = json.loads(path.read_text())
    for change, message in [
        ({"record_version": 2}, "record version 2 instead of 1"),
        ({"backend": 5}, r"\.backend: expected str"),
        ({"more": 1}, r"\.more: unknown field"),
        ({"bytes": record.bytes + 1}, f"{record.bytes} bytes instead of {record.bytes + 1}"),
    ]:
        path.write_text(json.dumps(content | change))
        with pytest.raises(UhdError, match=message):
            read_record(tmp_path / "x.engine")
    path.unlink()
    with pytest.raises(UhdError, match="no record beside it"):
        read_record(tmp_path / "x.engine")


def test_only_floating_point_is_written_into_a_cache(tmp_path):
    """Why `--cache int8` is refused for engines: a cache in 8 bits would have no update in place."""
    b = GraphBuilder("cache", opset=24)
    past = b.input("past", ir.DataType.INT8, (1, 2, 8, 4))
    fresh = b.input("fresh", ir.DataType.INT8, (1, 2, 1, 4))
    index = b.input("index", ir.DataType.INT64, (1,))
    updated = b.op("TensorScatter", past, fresh, index, axis=2, mode="linear")
    b.output(updated, "present", ir.DataType.INT8, (1, 2, 8, 4), direct=True)
    b.save(tmp_path / "cache.onnx")
    with pytest.raises(UhdError, match="cache has type Int8 but must have type Float, Half, or BFloat16"):
        build_engine(
            tmp_path / "cache.onnx", tmp_path / "cache.engine", [OptimizationProfile("any", {})], ADA
        )
    assert not (tmp_path / "cache.engine").exists()
