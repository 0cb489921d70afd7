"""The TensorRT engine above a faked GPU: bindings, shapes, profiles, memory, graphs, errors."""

import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_tensorrt import FakeCuda, fake_engine, fake_module
from support.refusals import one_line_error
from support.tensorrt_records import quiet_logger, record_of
from support.tiny_language import CONTEXT, difference, embeddings, reader, reference, tiny_model

from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.graph.language import emit_language
from uhd_export.graph.vision import emit_vision
from uhd_export.runtime.engines.backends import open_engine
from uhd_export.runtime.engines.tensorrt import backend as tensorrt_backend
from uhd_export.runtime.engines.tensorrt import cuda as tensorrt_cuda
from uhd_export.runtime.engines.tensorrt import engine as tensorrt_engine
from uhd_export.runtime.engines.tensorrt import memory as tensorrt_memory
from uhd_export.runtime.engines.tensorrt import plugins as tensorrt_plugins
from uhd_export.runtime.engines.tensorrt import staging as tensorrt_staging
from uhd_export.runtime.engines.tensorrt.engine import TensorrtEngine
from uhd_export.runtime.engines.tensorrt.memory import DeviceArray
from uhd_export.runtime.engines.tensorrt.record import plan_memory
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.encoder import VisionEncoder
from uhd_export.runtime.image.geometry import crop_geometry
from uhd_export.runtime.image.layout import LAYOUTS, Separators, layout_indices
from uhd_export.runtime.language import decoder as decoders
from uhd_export.runtime.language.decoder import Decoder
from uhd_export.runtime.language.sequence import place
from uhd_export.runtime.profiling.stages import vision_shares
from uhd_export.tensorrt import language_profiles, vision_profiles

trt = pytest.importorskip("tensorrt_rtx")
TINY = ("qwen2", 4, 2, True)


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """Graph and record of a tiny language model."""
    graph = tmp_path_factory.mktemp("language") / "language.onnx"
    model = tiny_model(*TINY)
    emit_language(model.config, reader(model), graph, dialect="tensorrt")
    return graph, record_of(graph, language_profiles(model.config, CONTEXT))


@pytest.fixture(scope="module")
def vision(golden_model, golden_checkpoint, tmp_path_factory):
    """Graph and record of the golden checkpoint's vision part, levels 1x and 2x."""
    config = golden_model(mask=3).config
    graph = tmp_path_factory.mktemp("vision") / "vision.onnx"
    checkpoint = Checkpoint(golden_checkpoint)
    emit_vision(config, checkpoint, graph)
    checkpoint.close()
    return graph, record_of(graph, vision_profiles(config))


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """`machine(graph, record, **changes)`: (engine, cuda, trt) on a faked GPU."""

    def start(graph, record, *, capability="8.9", rtx=True, profile=None, device="cuda", **changes):
        cuda, logger = FakeCuda(capability), quiet_logger()
        record = fake_engine(tmp_path / "x.engine", graph, record)
        module = fake_module(cuda, record, rtx=rtx, **changes)
        monkeypatch.setattr(tensorrt_engine, "open_tensorrt", lambda backend: module)
        monkeypatch.setattr(tensorrt_engine, "open_cuda", lambda number: cuda)
        monkeypatch.setattr(tensorrt_backend, "logger", lambda trt: logger)
        monkeypatch.setattr(tensorrt_engine, "logger", lambda trt: logger)
        monkeypatch.setenv("UHD_EXPORT_CACHE", str(tmp_path / "cache"))
        return TensorrtEngine(tmp_path / "x.engine", device=device, profile=profile), cuda, module

    return start


@pytest.mark.parametrize("rtx", [True, False])
def test_decoding_equals_pytorch(machine, language, rtx):
    engine, cuda, _ = machine(*language, rtx=rtx)
    embeds = embeddings(60)
    expected = reference(tiny_model(*TINY), embeds)
    decoder = Decoder(engine, CONTEXT)
    assert decoder.kv_bytes == 2 * 2 * 2 * CONTEXT * 32 * 4
    assert difference(decoder.prefill(embeds[:, :40]), expected[39]) < 5e-6
    for i in range(40, 50):
        assert difference(decoder.step(embeds[0, i]), expected[i]) < 5e-6
    decoder.rewind(25)
    assert difference(decoder.prefill(embeds[0, 25:60]), expected[59]) < 5e-6
    engine.close()
    assert not [b for b in cuda.blocks.values() if b.size > decoder.kv_bytes]


def test_a_step_moves_one_embedding_in_and_the_logits_out(machine, language):
    engine, cuda, _ = machine(*language)
    decoder = Decoder(engine, CONTEXT)
    decoder.prefill(embeddings(10))
    decoder.step(embeddings(1))
    blocks = set(cuda.blocks)
    cuda.copied_in = cuda.copied_out = cuda.copied = 0
    decoder.step(embeddings(1))
    assert (cuda.copied_in, cuda.copied_out, cuda.copied) == (128 * 4 + 8 + CONTEXT, 300 * 4, 0)
    cuda.copied_in = cuda.copied_out = 0
    decoder.greedy(embeddings(1))
    assert (cuda.copied_in, cuda.copied_out, cuda.copied) == (128 * 4 + 8 + CONTEXT, 12, 0)
    assert set(cuda.blocks) == blocks  # nothing is allocated while decoding


def test_the_profile_for_one_position_decodes(machine, language):
    engine, _, module = machine(*language)
    decoder = Decoder(engine, CONTEXT)
    decoder.prefill(embeddings(10))
    decoder.step(embeddings(1))
    decoder.prefill(embeddings(1))
    prompts, steps = module.engines[0].contexts
    assert (prompts.profile, prompts.runs) == (1, 1) and (steps.profile, steps.runs) == (0, 2)


def test_attention_reads_what_is_in_use(machine, language, monkeypatch):
    """The least of the sizes that holds it, in an engine with a profile, a context and a graph for each."""
    monkeypatch.setattr(decoders, "_LEAST_VISIBLE", 8)
    graph, _ = language
    profiles = language_profiles(tiny_model(*TINY).config, CONTEXT)
    assert [p.name for p in profiles] == ["decode 8", "decode 16", "decode 96", "prefill"]
    engine, _, module = machine(graph, record_of(graph, profiles), rtx=False)
    decoder, embeds = Decoder(engine, CONTEXT), embeddings(CONTEXT)
    expected = reference(tiny_model(*TINY), embeds)
    assert difference(decoder.prefill(embeds[:, :5]), expected[4]) < 5e-6
    for i in range(5, CONTEXT):
        assert difference(decoder.step(embeds[0, i]), expected[i]) < 5e-6
    prompts, *steps = module.engines[0].contexts
    assert prompts.shapes["visible"] == (8,)
    assert [context.shapes["visible"] for context in steps] == [(8,), (16,), (96,)]
    assert [context.runs for context in steps] == [2] * 3  # the first step of each, and the one captured
    decoder.rewind(6)
    assert difference(decoder.step(embeds[0, 6]), expected[6]) < 5e-6
    assert len(module.engines[0].contexts) == 4


def test_cuda_graphs(machine, language):
    """TensorRT-RTX makes them itself; in TensorRT the repeated run is captured, anew when memory moves."""
    engine, cuda, module = machine(*language, rtx=True)
    Decoder(engine, CONTEXT).step(embeddings(1))
    engine.infer(
        {
            name: np.zeros(i.resolve({"sequence": 3, "visible": CONTEXT}), i.dtype)
            for name, i in engine.inputs.items()
        }
    )
    bound, alone = module.engines[0].contexts
    assert bound.config.cuda_graph_strategy == "WHOLE" and alone.config.cuda_graph_strategy is None

    engine, cuda, module = machine(*language, rtx=False)
    decoder = Decoder(engine, CONTEXT)
    embeds = embeddings(20)
    expected = reference(tiny_model(*TINY), embeds)
    decoder.prefill(embeds[:, :5])
    for i in range(5, 10):
        assert difference(decoder.step(embeds[0, i]), expected[i]) < 5e-6
    prefill, decode = module.engines[0].contexts
    assert prefill.runs == 1 and decode.runs == 2 and cuda.launches == 4  # first step, captured step
    other = Decoder(engine, CONTEXT)
    other.prefill(embeddings(90))  # moves the shared memory for activations
    for i in range(10, 15):
        assert difference(decoder.step(embeds[0, i]), expected[i]) < 5e-6
    assert cuda.launches == 4 + 4
    runs = decode.runs
    decoder.prefill(embeds[:, 15:17])  # in a context of its own: the graph stays
    for i in range(17, 20):
        assert difference(decoder.step(embeds[0, i]), expected[i]) < 5e-6
    assert cuda.launches == 4 + 4 + 3 and decode.runs == runs


def test_a_graph_that_cannot_be_captured_is_left_out_with_the_reason(machine, language, monkeypatch, caplog):
    engine, cuda, _ = machine(*language, rtx=False)

    def refuse(queue):
        raise UhdError("GPU: cudaStreamEndCapture failed")

    monkeypatch.setattr(cuda, "capture", refuse)
    decoder, embeds = Decoder(engine, CONTEXT), embeddings(8)
    expected = reference(tiny_model(*TINY), embeds)
    for i in range(8):
        assert difference(decoder.step(embeds[0, i]), expected[i]) < 5e-6
    assert cuda.launches == 0
    (said,) = caplog.messages  # once, not at every step
    assert said.startswith("CUDA graph: not captured (GPU: cudaStreamEndCapture failed); decoding launches")


def crop_feeds(engine, rows, cols, batch, grid_mode="selective"):
    """Inputs of the vision engine for random pixels."""
    geometry = crop_geometry(rows, cols, levels=(1, 2), grid_mode=grid_mode)
    pixels = np.random.default_rng(rows).standard_normal((batch, 3, rows * 14, cols * 14), np.float32)
    return {"pixels": pixels, **{name: geometry[name] for name in engine.inputs if name != "pixels"}}


def test_vision_equals_onnx_runtime_at_any_shape(machine, vision):
    engine, _, module = machine(*vision)
    with open_engine(vision[0], threads=1) as host:
        for rows, cols, batch, grid, name in [
            (24, 24, 2, "selective", "24x24"),
            (19, 29, 1, "fix", "24x24"),
            (5, 90, 1, "pyramid", "3x161"),
            (24, 24, 1, "selective", "24x24"),
        ]:
            feeds = crop_feeds(engine, rows, cols, batch, grid)
            actual = engine.infer(feeds)["tokens"]
            assert engine.record.profiles[module.engines[0].contexts[0].profile].name == name
            assert actual.shape == (batch, 144, 256)
            assert difference(actual, host.infer(feeds)["tokens"]) < 1e-6
    assert engine.device_bytes > 0
    before = engine.device_bytes
    engine.infer(feeds)
    assert engine.device_bytes == before


def test_tokens_reach_the_language_model_on_the_device(machine, language, vision):
    """Prompts are assembled from device arrays and read where they are: nothing passes through the host."""
    engine, cuda, _ = machine(*language)
    decoder = Decoder(engine, CONTEXT)
    rows = embeddings(30)[0]
    crop = DeviceArray.allocate(cuda, (20, 128), np.float32)
    cuda.copy_in(crop.address, rows[5:25])
    cuda.synchronize()
    cuda.copied_in = 0
    prompt = engine.gather([rows[:5], crop[:12], crop[12:], rows[25:]], np.float32)
    assert cuda.copied == 20 * 128 * 4 and cuda.copied_in == 10 * 128 * 4
    logits = decoder.prefill(prompt, chunk=16)
    assert cuda.copied_in == 10 * 128 * 4 + 2 * (8 + CONTEXT)  # the write index of two chunks
    assert difference(logits, reference(tiny_model(*TINY), rows[None])[-1]) < 5e-6


def test_what_is_fed_stays_as_it_is(machine, language):
    """Also where the engine updates that input in place and nothing is bound."""
    engine, cuda, _ = machine(*language)
    feeds = {
        name: np.zeros(i.resolve({"sequence": 3, "visible": CONTEXT}), i.dtype)
        for name, i in engine.inputs.items()
    }
    feeds["inputs_embeds"] = embeddings(3)
    past = "past_key_values.0.key"
    feeds[past] = engine.gather([feeds[past].reshape(-1, 32)], np.float32)
    feeds[past] = DeviceArray(feeds[past].buffer, feeds[past].address, (1, 2, CONTEXT, 32), feeds[past].dtype)
    results = engine.infer(feeds)
    assert results["present.0.key"].any()
    assert not feeds[past].numpy(cuda).any()


def test_pixels_lie_where_the_gpu_copies_from_and_are_not_overwritten_before_it_has(
    machine, vision, golden_model
):
    engine, cuda, _ = machine(*vision)
    encoder = VisionEncoder(engine, golden_model(mask=3).config.model)
    random = np.random.default_rng(0)
    crops = [random.integers(0, 256, (266, 280, 3), np.uint8) for _ in range(3)]
    one_by_one = [
        engine.infer_resident(encoder.feeds(encoder.pixels([crop]), "fix"))["tokens"] for crop in crops
    ]
    assert len(cuda.pinned) == 3  # nothing has been waited for
    with open_engine(vision[0], threads=1) as host:
        expected = VisionEncoder(host, golden_model(mask=3).config.model).encode(crops, "fix")
    for actual, wanted in zip(one_by_one, expected, strict=True):
        assert difference(actual.numpy(cuda)[0], wanted) < 1e-6
    encoder.encode(crops[:1], "fix")
    assert len(cuda.pinned) == 3  # and now they are used again
    sizes = [memory.size for memory in cuda.pinned.values()]
    held = [engine.staging((1 << 20,), np.uint8) for _ in range(40)]
    assert sum(memory.size for memory in cuda.pinned.values()) <= tensorrt_staging.MOST_PINNED
    assert not cuda.is_pinned(held[-1]) and cuda.is_pinned(held[0]) and sizes


def test_where_no_more_memory_can_be_pinned_pixels_lie_in_ordinary_one(monkeypatch):
    def refuse(nbytes):
        raise UhdError("GPU: cudaHostAlloc failed")

    cuda = FakeCuda()
    monkeypatch.setattr(cuda, "allocate_host", refuse)
    array = tensorrt_staging.staging(cuda, (2, 3), np.dtype(np.float16))
    assert array.shape == (2, 3) and not cuda.is_pinned(array)


def test_geometry_is_copied_once_a_shape(machine, vision, golden_model):
    engine, cuda, _ = machine(*vision)
    encoder, crops = (
        VisionEncoder(engine, golden_model(mask=3).config.model),
        [np.zeros((266, 280, 3), np.uint8)],
    )
    encoder.encode(crops, "fix")
    cuda.copied_in = 0
    encoder.encode(crops, "fix")
    assert cuda.copied_in == 3 * 266 * 280 * engine.inputs["pixels"].dtype.itemsize


def test_outputs_may_stay_on_the_device(machine, vision):
    engine, cuda, _ = machine(*vision)
    feeds = crop_feeds(engine, 24, 24, 2)
    kept = engine.infer_resident(feeds)["tokens"]
    assert cuda.copied == 0
    expected = engine.infer(feeds)["tokens"]
    engine.infer(crop_feeds(engine, 19, 29, 1))  # another run leaves it as it is
    cuda.copied_out = 0
    assert kept.shape == (2, 144, 256) and kept[1].shape == (144, 256)
    assert cuda.copied_out == 0
    np.testing.assert_array_equal(kept.numpy(cuda), expected)
    np.testing.assert_array_equal(kept[1][3:5].numpy(cuda), expected[1, 3:5])


def test_device_arrays_are_views():
    cuda = FakeCuda()
    array = DeviceArray.allocate(cuda, (4, 3), np.float16)
    assert array.ndim == 2 and len(array) == 4 and array.nbytes == 24
    assert array[1:3].address == array.address + 6 and array[1:3].shape == (2, 3)
    assert array[None].shape == (1, 4, 3) and array[None][:, 2:].shape == (1, 2, 3)
    assert array[None][:, 2:].address == array.address + 12
    assert array[-1].shape == (3,) and array[-1].address == array.address + 18
    assert array.astype(np.float16, copy=False) is array
    for index in ((slice(None), 1), slice(None, None, 2)):
        with pytest.raises(TypeError):
            array[index]
    with pytest.raises(TypeError):
        array.astype(np.float32, copy=False)


def test_memory_changes_hands_without_waiting():
    cuda = FakeCuda()
    array = DeviceArray.allocate(cuda, (4, 3), np.float16)
    view, address = array[1], array.address
    del array
    assert DeviceArray.allocate(cuda, (4, 3), np.float16).address != address  # the view holds it
    cuda.zero(view.address, 6)  # queued work, at which FakeCuda would not free
    del view
    assert DeviceArray.allocate(cuda, (4, 3), np.float16).address == address
    large = DeviceArray.allocate(cuda, (tensorrt_memory.KEPT + 1,), np.uint8)
    blocks = set(cuda.blocks)
    del large
    assert set(cuda.blocks) < blocks  # a large block goes back, once the queue is empty


@given(st.integers(1, tensorrt_memory.KEPT))
def test_a_size_class_wastes_a_quarter_at_most(nbytes):
    size = tensorrt_memory.size_class(nbytes)
    assert nbytes <= size <= max(1.25 * nbytes, nbytes + tensorrt_memory.ALIGNMENT)
    assert size % tensorrt_memory.ALIGNMENT == 0 and tensorrt_memory.size_class(size) == size


def test_prompts_of_many_lengths_hold_what_the_longest_needs_and_no_more_than_the_cap():
    """A prompt's embeddings at 4096 a position in float16, as a hundred questions on one image make them."""
    cuda = FakeCuda()
    for length in range(1000, 1100):
        array = DeviceArray.allocate(cuda, (length, 4096), np.float16)
        largest = array.nbytes
        del array
    assert sum(block.size for block in cuda.blocks.values()) < 2 * 1.25 * largest  # of two classes
    arrays = [DeviceArray.allocate(cuda, (size << 20,), np.uint8) for size in (*range(1, 40), *range(1, 40))]
    del arrays[:]
    assert sum(block.size for block in cuda.blocks.values()) <= tensorrt_memory.MOST_KEPT


def test_kept_memory_makes_room(monkeypatch):
    cuda = FakeCuda()
    allocate = cuda.allocate

    def scarce(nbytes):
        if len(cuda.blocks) >= 2:
            raise UhdError("GPU memory")
        return allocate(nbytes)

    monkeypatch.setattr(cuda, "allocate", scarce)
    arrays = [DeviceArray.allocate(cuda, (size,), np.uint8) for size in (100, 500)]
    del arrays[0]
    arrays.append(DeviceArray.allocate(cuda, (900,), np.uint8))  # the kept block went back to the driver
    with pytest.raises(UhdError, match="GPU memory"):
        DeviceArray.allocate(cuda, (1300,), np.uint8)


def test_after_a_prompt_too_large_for_memory_decoding_has_its_own_again(machine, language, monkeypatch):
    engine, cuda, _ = machine(*language)
    decoder, embeds = Decoder(engine, CONTEXT), embeddings(60)
    expected = reference(tiny_model(*TINY), embeds)
    decoder.prefill(embeds[:, :10])
    decoder.step(embeds[0, 10])
    scratch, allocate = tensorrt_engine._shared_scratch(cuda), cuda.allocate

    def scarce(nbytes):
        if nbytes > before:
            raise UhdError("GPU memory: not enough")
        return allocate(nbytes)

    before = scratch.nbytes
    monkeypatch.setattr(cuda, "allocate", scarce)
    with pytest.raises(UhdError, match="not enough"):
        decoder.prefill(embeds[:, 11:])
    assert scratch.nbytes < before  # it was given back for a larger one
    decoder.rewind(11)
    assert difference(decoder.step(embeds[0, 11]), expected[11]) < 5e-6


def test_the_next_decoder_takes_the_memory_of_one_that_is_gone(machine, language):
    engine, cuda, _ = machine(*language)
    for _ in range(3):
        decoder = Decoder(engine, CONTEXT)
        decoder.prefill(embeddings(10))
        decoder.step(embeddings(1))
        blocks, held = len(cuda.blocks), engine.device_bytes
        del decoder
        engine.fetch(engine.keep(np.zeros(1)))  # waits
        assert engine.device_bytes < held
    Decoder(engine, CONTEXT)
    assert len(cuda.blocks) <= blocks + 1


def test_layer_times_are_a_trace(machine, language, tmp_path):
    engine, cuda, _ = machine(*language, rtx=False, profile=tmp_path / "trace")
    decoder = Decoder(engine, CONTEXT)
    for _ in range(4):
        decoder.step(embeddings(1))
    assert not cuda.launches  # a graph would hide the layers
    events = json.loads(engine.end_profile().read_text())
    nodes = [(e["name"], e["dur"]) for e in events if e["cat"] == "Node"]
    assert nodes == 4 * [("vit/layer_kernel_time", 250), ("hiwin/layer_kernel_time", 750)]
    engine, _, _ = machine(*language)
    with pytest.raises(UhdError, match="without a path for the trace"):
        engine.end_profile()


def test_stages_of_the_vision_engine(machine, vision):
    engine, _, module = machine(*vision)
    feeds = [crop_feeds(engine, 24, 24, 2), crop_feeds(engine, 19, 29, 1)]

    def shares(layers):
        module.layers[:] = layers
        return vision_shares(engine.path, feeds, backend="tensorrt-rtx")

    assert shares([("vit/layer", 1), ("reformat", 2), ("jbu/JBU_3", 4), ("hiwin/layer", 3)]) == {
        "vit": pytest.approx(0.3),
        "jbu": pytest.approx(0.4),
        "hiwin": pytest.approx(0.3),
    }
    assert (
        shares([("{ForeignNode[vit/a...vit/b]}", 1), ("{ForeignNode[hiwin/a...hiwin/b]}", 1)])["vit"] == 0.5
    )
    assert shares([("{ForeignNode[vit/a...hiwin/b]}", 1)]) == {}
    assert shares([("kernel", 1)]) == {}


def test_compiled_kernels_are_kept(machine, language, tmp_path):
    engine, _, _ = machine(*language)
    engine.close()
    (kept,) = (tmp_path / "cache" / "jit").iterdir()
    assert kept.name == "5" * 32 + "-8.9.bin" and kept.read_bytes() == b"nothing yet and more"
    engine, _, module = machine(*language)
    Decoder(engine, CONTEXT).step(embeddings(1))
    assert module.engines[0].contexts[0].config.cache.content == b"nothing yet and more"


def test_compiled_kernels_that_cannot_be_read_are_compiled_again(machine, language, monkeypatch):
    machine(*language)[0].close()

    def refuse(path):
        raise PermissionError("of another user")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    engine, _, module = machine(*language)
    Decoder(engine, CONTEXT).step(embeddings(1))
    assert module.engines[0].contexts[0].config.cache.content == b"nothing yet"


def test_memory_is_the_engines_own_figure(machine, language):
    engine, _, _ = machine(*language)
    assert engine.weight_bytes == 1000 and engine.most_scratch_bytes == 123456
    engine, _, _ = machine(*language, rtx=False)
    assert engine.weight_bytes == language[1].weight_bytes


def test_memory_is_planned_without_a_gpu(language, vision):
    plan = plan_memory(language[1])
    assert plan.weights == language[1].weight_bytes
    assert plan.state == 2 * 2 * 2 * CONTEXT * 32 * 4
    # The write index, a byte a position that is visible; the logits, their sum, and the greatest's place.
    fixed = 8 + CONTEXT + 300 * 4 + 4 + 8
    assert plan.transfers == {f"decode {CONTEXT}": 128 * 4 + fixed, "prefill": CONTEXT * 128 * 4 + fixed}
    plan = plan_memory(vision[1])
    assert plan.state == 0
    pixels, tokens = 10 * 3 * 420 * 420 * 4, 10 * 144 * 256 * 4
    assert pixels + tokens < plan.transfers["24x24"] < 1.1 * (pixels + tokens)


def test_an_engine_with_custom_operators_registers_their_plugins(machine, vision, monkeypatch):
    calls = []

    class Plugins:
        def register(self, trt):
            calls.append(trt)
            return ("JBU",)

        @contextmanager
        def errors(self):
            yield
            raise UhdError("operator JBU: wrong")

    monkeypatch.setattr(tensorrt_plugins, "entry_points", lambda *, group: ())
    graph, record = vision
    needy = replace(record, plugin_layers=("jbu/JBU_3",))
    with pytest.raises(UhdError, match="calls custom operators, and nothing installed offers plugins"):
        machine(graph, needy)
    engine, _, _ = machine(graph, record)  # without plugin layers, none are looked for
    engine.close()
    entry = SimpleNamespace(load=Plugins)
    monkeypatch.setattr(tensorrt_plugins, "entry_points", lambda *, group: (entry,))
    with pytest.raises(UhdError, match=r"^operator JBU: wrong$"):
        machine(graph, needy)
    assert len(calls) == 1


def test_the_device_needs_neither_torch_nor_triton():
    names = ("runtime.pipeline", "runtime.engines.tensorrt.engine", "plugins.tensorrt.plugin")
    modules = ", ".join(f"uhd_export.{name}" for name in names)
    script = f"import sys, {modules}; print({{'torch', 'triton', 'onnx'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_feeds_are_checked(machine, language):
    engine, _, _ = machine(*language)
    binding = engine.bind({}, {})
    feeds = {
        name: np.zeros(i.resolve({"sequence": 3, "visible": CONTEXT}), i.dtype)
        for name, i in engine.inputs.items()
    }
    with pytest.raises(ValueError, match="differ from the inputs"):
        binding.infer({"inputs_embeds": feeds["inputs_embeds"]})
    with pytest.raises(ValueError, match="feed inputs_embeds: type float16"):
        engine.infer({**feeds, "inputs_embeds": feeds["inputs_embeds"].astype(np.float16)})
    message = (
        r"shape \[1, 97, 128\]: .* \[1, 1, 128\] to \[1, 1, 128\]; \[1, 1, 128\] to \[1, 96, 128\]; build"
    )
    with pytest.raises(UhdError, match=f"^input inputs_embeds of {message}"):
        engine.infer({**feeds, "inputs_embeds": np.zeros((1, 97, 128), np.float32)})
    assert engine.infer(feeds)["logits"].shape == (1, 1, 300)  # an error leaves the engine usable
    with pytest.raises(UhdError, match="logits is not written in place of inputs_embeds"):
        engine.bind({"inputs_embeds": "logits"}, {"sequence": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"version": "1.8.0"},
            r"built by tensorrt-rtx 1\.7.*, but 1\.8\.0 is installed; build the bundle again",
        ),
        (
            {"capability": "9.0"},
            r"built for compute capability 8\.6, 8\.9, but this GPU has 9\.0 \(Fake GPU\); build the bundle "
            "again on this machine, with --backend tensorrt",
        ),
        ({"capability": "12.0"}, r"build the bundle again with --compute-capability 12\.0"),
        ({"invalid": 3}, r"cannot load it \(version mismatch, unsupported cc\); build the bundle again$"),
        ({"invalid": 8}, r"cannot load it \(not valid on this system\)"),
        ({"broken": True}, r"cannot load it \(bad tag\); build the bundle again$"),
        ({"device": "cpu"}, r"^device cpu: a TensorRT engine runs on cuda; use a bundle for onnxruntime$"),
    ],
)
def test_an_engine_that_does_not_fit_says_what_to_do(machine, language, changes, message):
    with one_line_error(message):
        machine(*language, **changes)


def test_without_a_gpu_or_the_backend(language, tmp_path, monkeypatch):
    graph, record = language
    fake_engine(tmp_path / "x.engine", graph, record)
    tensorrt_cuda._opened.cache_clear()
    try:
        count = tensorrt_cuda._import_runtime().cudaGetDeviceCount()[1]
    except UhdError as error:
        assert "cuda-python is not installed" in str(error)
        count = None
    if not count:
        with pytest.raises(UhdError, match=r"^GPU: "):
            open_engine(tmp_path / "x.engine", "tensorrt-rtx", device="cuda")
    fake_engine(tmp_path / "x.engine", graph, replace(record, backend="tensorrt"))
    with pytest.raises(
        UhdError, match=r"^backend tensorrt: not installed .*; pip install 'uhd-export\[tensorrt\]'$"
    ):
        open_engine(tmp_path / "x.engine", "tensorrt", device="cuda")
    with pytest.raises(UhdError, match="no such file"):
        open_engine(tmp_path / "missing.engine", "tensorrt-rtx", device="cuda")
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(UhdError, match=r"^GPU: cuda-python is not installed .*pip install cuda-python$"):
        tensorrt_cuda.Cuda()


def test_records_hold_the_profiles(language, tmp_path):
    graph, record = language
    written = fake_engine(tmp_path / "x.engine", graph, record)
    assert written.profiles == record.profiles and written.aliases == record.aliases
    assert json.loads((tmp_path / "x.engine.json").read_text())["backend"] == "tensorrt-rtx"


@settings(max_examples=40)
@given(
    slice_grid=st.none() | st.tuples(st.integers(1, 4), st.integers(1, 3)), layout=st.sampled_from(LAYOUTS)
)
def test_rows_are_placed_in_long_pieces(slice_grid, layout):
    source, _ = layout_indices(slice_grid, layout=layout, side=12, separators=Separators())
    crops = [np.full((144, 2), i) + np.arange(144)[:, None] / 1000 for i in range(source.max() // 144 + 1)]
    separators = -1.0 - np.arange((source < 0).sum() * 2).reshape(-1, 2)
    pieces = place(source, crops, separators)
    expected = np.concatenate(crops)[np.maximum(source, 0)]
    expected[source < 0] = separators
    np.testing.assert_array_equal(np.concatenate(pieces), expected)
    cols, rows = slice_grid or (0, 0)
    assert len(pieces) <= 1 + (2 * rows * cols if layout == "flat" else 12 * rows * (cols + 1))
