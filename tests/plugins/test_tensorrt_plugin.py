"""The TensorRT plugins: real builds without a GPU, and enqueue on a driver that interprets the kernels."""

import json
import subprocess
import sys
import types

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.kernel_inputs import jbu_inputs, window_inputs
from support.refusals import one_line_error

from uhd_export.plugins import torch_launch
from uhd_export.plugins.graph import GraphBuilder
from uhd_export.plugins.jbu import kernel as jbu_kernel
from uhd_export.plugins.jbu.onnx_op import add_jbu
from uhd_export.plugins.jbu.torch_op import jbu
from uhd_export.plugins.launch import Launch, Scratch
from uhd_export.plugins.tensorrt import driver as gpu
from uhd_export.plugins.tensorrt import runner
from uhd_export.plugins.tensorrt.plugin import VERSION, errors, register
from uhd_export.plugins.window_attention import kernel as window_kernel
from uhd_export.plugins.window_attention.launch import inputs as window_names
from uhd_export.plugins.window_attention.onnx_op import add_window_attention
from uhd_export.plugins.window_attention.reference import Level
from uhd_export.plugins.window_attention.torch_op import window_attention
from uhd_export.runtime.engines.tensorrt.backend import logger, messages, open_tensorrt
from uhd_export.runtime.errors import UhdError

KINDS = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
CHANNELS = 16


@pytest.fixture(scope="module")
def trt():
    pytest.importorskip("tensorrt_rtx")
    return open_tensorrt("tensorrt-rtx")


def jbu_graph(dtype="float32", *, weights=None, guidance_dtype=None):
    """A graph of one uhd.JBU node whose maps are inputs of any size, and its profile."""
    b, kind, values = GraphBuilder("jbu"), KINDS[dtype], []
    shapes = {
        "source": ("b", "h", "w", CHANNELS),
        "guidance": ("b", "hh", "ww", 3),
        "upsample_y": ("hp", "h"),
        "upsample_x": ("wp", "w"),
    }
    for name, tensor in (jbu_inputs(1, 2, 2, CHANNELS) | (weights or {})).items():
        if name in shapes:
            of = KINDS[guidance_dtype] if guidance_dtype and name == "guidance" else kind
            values.append(b.input(name, of, shapes[name]))
        else:
            array = tensor.numpy()
            values.append(b.weight(name, array.shape, kind, lambda array=array: array))
    b.output(add_jbu(b, *values), "output", kind, ("b", "hh", "ww", CHANNELS))
    corners = [jbu_inputs(*size, CHANNELS) for size in ((1, 4, 4), (2, 6, 6), (2, 12, 12))]
    return b, {name: [tuple(corner[name].shape) for corner in corners] for name in shapes}


def window_graph(dtype="float32", levels=2, attribute=True):
    """A graph of one uhd.WindowAttention node over a crop of 3x4 patches, and its profile."""
    b, kind = GraphBuilder("window"), KINDS[dtype]
    *shared, tensors = window_inputs(1, 3, 4, (1, 2)[:levels], "selective", 2, CHANNELS, 2)
    named = dict(zip(window_names(levels), (*shared, *tensors), strict=True))
    values = {}
    for name, tensor in named.items():
        if name.startswith(("query", "value")):
            array = tensor.numpy()
            values[name] = b.weight(name, array.shape, kind, lambda array=array: array)
        else:
            shape = ("b", *tensor.shape[1:]) if name.startswith(("features", "scale")) else tensor.shape
            values[name] = b.input(name, kind, shape)
    made = [Level(*(values[f"{field}_{i}"] for field in Level._fields)) for i in range(levels)]
    shared = (values[name] for name in window_names(levels)[:3])
    b.output(add_window_attention(b, *shared, made), "out", kind, ("b", 4, 4, 2 * 16))
    profile = {}
    for name, tensor in named.items():
        if not name.startswith(("query", "value")):
            free = name.startswith(("features", "scale"))
            profile[name] = [
                (batch, *tensor.shape[1:]) if free else tuple(tensor.shape) for batch in (1, 2, 3)
            ]
    return b, profile


def proto(b):
    """The model as the parser gets it: function bodies would win over plugins of their name."""
    model = ir.serde.serialize_model(b.model())
    del model.functions[:]
    return model


def parse(trt, model):
    """(network, parser), or the error that our plugin raises."""
    builder = trt.Builder(logger(trt))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    with errors(), messages(trt) as said:
        done = parser.parse(model.SerializeToString())
    assert done, said.errors
    return builder, network, parser


def build(trt, builder, network, profile, capabilities):
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(capabilities)
    for i, capability in enumerate(capabilities):
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}"), i)
    ranges = builder.create_optimization_profile()
    for name, shapes in profile.items():
        ranges.set_shape(name, *shapes)
    config.add_optimization_profile(ranges)
    with errors(), messages(trt) as said:
        engine = builder.build_serialized_network(network, config)
    assert engine is not None, said.errors
    return bytes(engine)


def layer_types(network):
    return [network.get_layer(i).type.name for i in range(network.num_layers)]


def packed_kernels(engine):
    """The kernels inside an engine: a zlib stream that holds JSON."""
    start = engine.find(b"\x78\xda")
    while start >= 0:
        try:
            return runner.unpack(np.frombuffer(engine[start:], np.int8))
        except UhdError:
            start = engine.find(b"\x78\xda", start + 1)
    raise AssertionError("no kernels in the engine")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_jbu_builds_with_its_kernels_inside(trt, dtype):
    capabilities = ("8.6", "8.9") if dtype == "float16" else ("8.9",)
    assert register(trt, capabilities) == ("JBU", "WindowAttention")
    b, profile = jbu_graph(dtype)
    builder, network, _parser = parse(trt, proto(b))
    assert layer_types(network).count("PLUGIN_V3") == 1
    assert network.get_output(0).shape[3] == CHANNELS
    kernels = packed_kernels(build(trt, builder, network, profile, capabilities))
    assert sorted((kernel["name"], json.loads(key)[1]) for key, kernel in kernels.items()) == [
        (name, int(capability.replace(".", "")))
        for name in ("jbu_stage", "range_features")
        for capability in capabilities
    ]
    for key, kernel in kernels.items():
        assert f".target sm_{json.loads(key)[1]}" in kernel["ptx"]


def test_plugin_wins_over_the_function_body(trt):
    register(trt, ("8.9",))
    model = ir.serde.serialize_model(jbu_graph()[0].model())
    assert len(model.functions) == 1
    builder = trt.Builder(logger(trt))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)
    with errors(), messages(trt) as said:
        assert parser.parse(model.SerializeToString()), said.errors
    assert layer_types(network).count("PLUGIN_V3") == 1


@pytest.mark.parametrize("levels", [1, 2])
def test_window_attention_builds_with_its_kernels_inside(trt, levels):
    register(trt, ("8.9",))
    b, profile = window_graph("float16", levels)
    builder, network, _parser = parse(trt, proto(b))
    assert layer_types(network).count("PLUGIN_V3") == 1
    assert tuple(network.get_output(0).shape) == (-1, 4, 4, 2 * 16)
    kernels = packed_kernels(build(trt, builder, network, profile, ("8.9",)))
    assert {kernel["name"] for kernel in kernels.values()} == {
        "window_pool",
        "window_scores",
        "window_softmax",
        "window_values",
    }


def plugin_being_built(trt, name, attributes, least, most, dtype="float32"):
    """A plugin as TensorRT makes it while it builds an engine, told of its shapes."""
    register(trt, ("8.9",))
    creator = trt.get_plugin_registry().get_creator(name, VERSION, "")
    kinds = trt.PluginFieldType
    arrays = {name: np.array([value], np.int32) for name, value in attributes.items()}  # fields only point
    fields = [trt.PluginField(name, array, kinds.INT32) for name, array in arrays.items()]
    built = creator.create_plugin("node", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
    kind = types.SimpleNamespace(type=getattr(trt, dtype))
    tensors = [types.SimpleNamespace(desc=kind, min=a, max=z) for a, z in zip(least, most, strict=True)]
    built.configure_plugin(tensors, [])
    return built


def plugin_on_device(trt, name, attributes, least, most, dtype="float32"):
    """A plugin while its engine is built, and the plugin that a device makes of its serialized fields."""
    built = plugin_being_built(trt, name, attributes, least, most, dtype)
    creator = trt.get_plugin_registry().get_creator(name, VERSION, "")
    on_device = creator.create_plugin("node", built.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    assert on_device.attributes == built.attributes
    assert on_device.kernels == built.build.compile(built.operator.folder)
    return built, on_device.attach_to_context(None)


class InterpretingDriver:
    """Stands in for the GPU driver: runs the kernel of that PTX under Triton's interpreter on host memory."""

    def __init__(self, kernels, tensors, capability=89):
        self.keys = {kernel["ptx"]: json.loads(key) for key, kernel in kernels.items()}
        self.tensors = {tensor.data_ptr(): tensor for tensor in tensors}
        self.number, self.loaded, self.launches = capability, 0, []

    def tensor(self, pointer, kind):
        """The tensor that begins there, or what of the workspace, the last one, begins there."""
        if pointer in self.tensors:
            return self.tensors[pointer]
        workspace = list(self.tensors.values())[-1]
        rest = workspace[(pointer - workspace.data_ptr()) // 4 :]
        return rest.view(getattr(torch, kind))

    def capability(self):
        return self.number

    def context(self):
        return 7

    def load(self, ptx, name, shared):
        self.loaded += 1
        return self.keys[ptx]

    def launch(self, function, grid, threads, shared, stream, pointers, integers, nulls):
        name, _, kinds, constants = function
        assert nulls == 2 and stream == 99 and threads in (128, 256)
        tensors = [self.tensor(pointer, kind) for pointer, kind in zip(pointers, kinds, strict=True)]
        assert [str(t.dtype).removeprefix("torch.") for t in tensors] == kinds
        launch = Launch(
            name, grid, tuple(map(str, range(len(tensors)))), tuple(integers), tuple(constants), 4, 1
        )
        module = jbu_kernel if hasattr(jbu_kernel, name) else window_kernel
        torch_launch.run(module, [launch], dict(zip(launch.tensors, tensors, strict=True)))
        self.launches.append(name)


def enqueue(trt, plugin, driver, inputs, outputs, workspace):
    def descriptions(tensors):
        kinds = {torch.float32: trt.float32, torch.float16: trt.float16}
        return [types.SimpleNamespace(dims=tuple(t.shape), type=kinds[t.dtype]) for t in tensors]

    plugin.enqueue(
        descriptions(inputs),
        descriptions(outputs),
        [t.data_ptr() for t in inputs],
        [t.data_ptr() for t in outputs],
        workspace.data_ptr(),
        99,
    )


def test_jbu_enqueue_computes_the_reference(trt, monkeypatch):
    inputs = list(jbu_inputs(2, 3, 5, CHANNELS).values())
    output, shapes = torch.zeros(2, 6, 10, CHANNELS), [tuple(t.shape) for t in inputs]
    built, plugin = plugin_on_device(trt, "JBU", {}, shapes, shapes)
    tensors = [types.SimpleNamespace(desc=types.SimpleNamespace(type=trt.float32), max=s) for s in shapes]
    workspace = torch.zeros(built.get_workspace_size(tensors, []) // 4)
    driver = InterpretingDriver(plugin.kernels, [*inputs, output, workspace])
    monkeypatch.setattr(runner, "open_driver", lambda: driver)
    for _ in range(2):
        enqueue(trt, plugin, driver, inputs, [output], workspace)
    assert driver.launches == 2 * ["range_features", "jbu_stage"] and driver.loaded == 2
    torch.testing.assert_close(output, jbu(*inputs), atol=1e-4, rtol=1e-4)


def test_a_plugin_runs_while_its_engine_is_built(trt, monkeypatch):
    # TensorRT times plugins before it asks for the fields to serialize.
    inputs = list(jbu_inputs(1, 3, 5, CHANNELS).values())
    output, workspace = torch.zeros(1, 6, 10, CHANNELS), torch.zeros(60 * 32)
    building = plugin_being_built(trt, "JBU", {}, *2 * [[tuple(t.shape) for t in inputs]])
    driver = InterpretingDriver({}, [*inputs, output, workspace])
    driver.load = lambda ptx, name, shared: json.loads(
        next(key for key, kernel in building.kernels.items() if kernel["ptx"] == ptx)
    )
    monkeypatch.setattr(runner, "open_driver", lambda: driver)
    enqueue(trt, building.attach_to_context(None), driver, inputs, [output], workspace)
    torch.testing.assert_close(output, jbu(*inputs), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_window_attention_enqueue_computes_the_reference(trt, monkeypatch):
    *shared, levels = window_inputs(2, 3, 4, (1, 2), "selective", 2, CHANNELS, 2)
    inputs, expected = [*shared, *levels], window_attention(*shared, levels)
    output, shapes = torch.zeros_like(expected), [tuple(t.shape) for t in inputs]
    built, plugin = plugin_on_device(trt, "WindowAttention", {"levels": 2}, shapes, shapes)
    tensors = [types.SimpleNamespace(desc=types.SimpleNamespace(type=trt.float32), max=s) for s in shapes]
    workspace = torch.full((built.get_workspace_size(tensors, []) // 4,), torch.nan)
    driver = InterpretingDriver(plugin.kernels, [*inputs, output, workspace])
    monkeypatch.setattr(runner, "open_driver", lambda: driver)
    enqueue(trt, plugin, driver, inputs, [output], workspace)
    assert driver.launches == [
        *2 * ["window_pool"],
        *2 * ["window_scores"],
        "window_softmax",
        "window_values",
    ]
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)


def test_scratch_buffers_lie_apart_in_the_workspace():
    buffers = (Scratch("a", 3, "float16"), Scratch("b", 100), Scratch("c", 1, "bfloat16"))
    assert runner.layout(buffers) == ({"a": 0, "b": 256, "c": 768}, 1024)


def test_other_gpu_and_other_shapes_are_refused(trt, monkeypatch):
    inputs = list(jbu_inputs(1, 2, 2, CHANNELS).values())
    output, shapes = torch.zeros(1, 4, 4, CHANNELS), [tuple(t.shape) for t in inputs]
    _, plugin = plugin_on_device(trt, "JBU", {}, shapes, shapes)
    driver = InterpretingDriver(plugin.kernels, [], capability=120)
    monkeypatch.setattr(runner, "open_driver", lambda: driver)
    with (
        pytest.raises(UhdError, match=r"capability 12\.0, the engine's kernels are for 8\.9"),
        errors(),
    ):
        enqueue(trt, plugin, driver, inputs, [output], torch.zeros(1))
    driver.number = 89
    wide = [t.repeat(1, 1, 1, 2) if i == 0 else t for i, t in enumerate(inputs)]
    workspace = torch.zeros(1024)
    driver.tensors = {t.data_ptr(): t for t in (*wide, output, workspace)}
    with pytest.raises(UhdError, match="no kernel jbu_stage for this shape"):
        enqueue(trt, plugin, driver, wide, [output], workspace)


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (
            lambda: jbu_graph(weights={"fixup_in_bias": torch.zeros(48)}),
            r"fixup_in_bias has shape \[48\], expected \[49\]",
        ),
        (
            lambda: jbu_graph(weights={"range_temp": torch.zeros(1)}),
            "range_temp has 1 dimensions, expected 0",
        ),
        (
            lambda: jbu_graph("float16", guidance_dtype="float32"),
            "input guidance has type FLOAT, source HALF",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(trt, capfd, graph, message):
    register(trt, ("8.9",))
    with one_line_error(message):
        parse(trt, proto(graph()[0]))
    assert capfd.readouterr() == ("", "")


def test_channels_must_be_fixed(trt):
    shapes = [tuple(t.shape) for t in jbu_inputs(1, 2, 2, CHANNELS).values()]
    wider = [(1, 2, 2, 2 * CHANNELS), *shapes[1:]]
    with pytest.raises(UhdError, match="axis 3 of input source ranges from 16 to 32"), errors():
        plugin_on_device(trt, "JBU", {}, shapes, wider)


def test_node_without_levels_is_refused(trt):
    register(trt, ("8.9",))
    model = proto(window_graph()[0])
    node = model.graph.node[0]
    node.attribute.remove(next(a for a in node.attribute if a.name == "levels"))
    with pytest.raises(UhdError, match="operator WindowAttention: attribute levels is missing"):
        parse(trt, model)


def test_capability_without_kernels_is_refused(trt):
    with pytest.raises(UhdError, match=r"compute capability 7\.5: the plugins have no kernels.*--no-plugins"):
        register(trt, ("7.5",))


def test_the_device_needs_neither_triton_nor_pytorch():
    code = (
        "import sys, uhd_export.plugins.tensorrt.plugin, uhd_export.plugins.operators as o; o.operators(); "
        "print([m for m in ('torch', 'triton', 'onnx', 'click', 'cuda') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_fields_that_are_not_ours_are_refused():
    with pytest.raises(UhdError, match="build it again"):
        runner.unpack(np.zeros(9, np.int8))
    with pytest.raises(UhdError, match="build it again"):
        runner.unpack(None)


class FakeApi:
    """The driver API's calling convention: a status, then results."""

    class CUresult:
        CUDA_SUCCESS = "ok"
        CUDA_ERROR_UNSUPPORTED_PTX_VERSION = types.SimpleNamespace(name="CUDA_ERROR_UNSUPPORTED_PTX_VERSION")

    CUfunction_attribute = types.SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __init__(self):
        self.failing, self.status, self.calls = "", types.SimpleNamespace(name="CUDA_ERROR_INVALID_PTX"), []

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, *arguments))
            if name == self.failing:
                return (self.status,)
            return ("ok", name)

        return call


def test_driver_packs_arguments_and_reports_failures(monkeypatch):
    api = FakeApi()
    monkeypatch.setattr(gpu, "_import_driver", lambda: api)
    driver = gpu.Driver()
    function = driver.load("ptx", "kernel", 70000)
    driver.launch(function, (3, 2, 1), 256, 70000, 99, [11, 12], [5], 2)
    assert ("cuFuncSetAttribute", "cuModuleGetFunction", 8, 70000) in api.calls
    name, *arguments = api.calls[-1]
    values, kinds = arguments[-2]
    assert (name, *arguments[:9]) == ("cuLaunchKernel", function, 3, 2, 1, 256, 1, 1, 70000, 99)
    assert values == (11, 12, 5, 0, 0)
    assert [kind.__name__ for kind in kinds] == ["c_void_p"] * 2 + ["c_int"] + ["c_void_p"] * 2
    api.failing = "cuModuleLoadData"
    with pytest.raises(UhdError, match=r"GPU: cuModuleLoadData failed \(CUDA_ERROR_INVALID_PTX\)"):
        driver.load("ptx", "kernel", 0)
    api.status = api.CUresult.CUDA_ERROR_UNSUPPORTED_PTX_VERSION
    with pytest.raises(UhdError, match="the driver is too old"):
        driver.load("ptx", "kernel", 0)


def test_without_cuda_python(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(UhdError, match="pip install cuda-python"):
        gpu.Driver()
