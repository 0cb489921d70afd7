"""What runs on the GPU and where its memory lies, and that nothing wrong is taken for right."""

from collections import Counter

import numpy as np
import onnxruntime as ort
import pytest
from support.tiny_language import embeddings

from uhd_export.runtime.engines.backends import open_engine
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.language.decoder import Decoder
from uhd_export.runtime.profiling import rates

# What may run on the CPU beside the GPU: arithmetic on shapes.
SHAPE_ARITHMETIC = {"Add", "Concat", "Div", "Min", "Mul", "Squeeze", "Sub"}
# Whether a run is a long one.
CONDITION = {"And", "Equal", "Greater", "Squeeze"}


def placement(path, device="cuda") -> dict[str, Counter]:
    """How many nodes of each type run on each provider."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    cuda = ("CUDAExecutionProvider", {"enable_cudnn": "0"})
    session = ort.InferenceSession(path, options, providers=[cuda, "CPUExecutionProvider"])
    counts: dict[str, Counter] = {}
    for part in session.get_provider_graph_assignment_info():
        counts.setdefault(part.ep_name, Counter()).update(node.op_type for node in part.get_nodes())
    return counts


def test_a_float32_cache_is_refused_with_the_remedy(language):
    with (
        open_engine(language("float32"), device="cuda") as engine,
        pytest.raises(
            UhdError, match=r"^device cuda: .*updates past_key_values\.0\.key in float32 .*--dtype float16"
        ),
    ):
        Decoder(engine, 96)


def test_a_cache_that_no_kernel_updates_is_refused_at_the_first_step(language):
    with open_engine(language("float16"), device="cuda") as engine:
        decoder = Decoder(engine, 96)
        with pytest.raises(UhdError, match=r"past_key_values\.1\.value is not updated in place on cuda"):
            decoder.prefill(embeddings(3))


@pytest.mark.parametrize("weights", ["float16", "int4"])
def test_all_of_the_language_model_runs_on_the_gpu(language, weights):
    assert set(placement(language(weights))) == {"CUDAExecutionProvider"}


def test_an_8_bit_cache_stays_on_the_gpu_in_steps_and_in_long_runs(language, cuda):
    counts = placement(language("int4", "int8"))
    assert set(counts["CPUExecutionProvider"]) <= CONDITION
    assert counts["CUDAExecutionProvider"]["TensorScatter"] == 4  # keys and values of two layers
    with open_engine(language("int4", "int8"), device="cuda") as engine:
        engine.updates_in_place = True  # kernels here compute nothing
        decoder = Decoder(engine, 4096)
        for run, kernel in (
            (lambda: decoder.prefill(embeddings(40)), "TensorScatter"),
            (lambda: decoder.step(embeddings(1)[0, 0]), "UnpackRoPEAppend"),
        ):
            run()
            with cuda.counting() as counted, cuda.logging() as lines:
                run()
            assert sum(kernel in line for line in lines) == (4 if kernel == "TensorScatter" else 2)
            # What is fresh and what is in use; never the whole cache.
            assert counted["d2d_bytes"] + counted["h2d_bytes"] + counted["d2h_bytes"] < decoder.kv_bytes / 4


def test_an_8_bit_cache_beside_float32_is_refused_with_the_remedy(language):
    with (
        open_engine(language("float32", "int8"), device="cuda") as engine,
        pytest.raises(
            UhdError, match=r"^device cuda: .* in int8 there; build the bundle with --dtype float16"
        ),
    ):
        Decoder(engine, 96)


def test_all_of_vision_but_shapes_runs_on_the_gpu_without_cudnn(vision):
    counts = placement(vision)
    assert "Conv" not in counts["CUDAExecutionProvider"]
    assert set(counts["CPUExecutionProvider"]) <= SHAPE_ARITHMETIC
    assert counts["CUDAExecutionProvider"].total() > 4 * counts["CPUExecutionProvider"].total()


def test_memory_is_taken_on_the_device_that_was_named(language, cuda):
    before = [cuda.allocated(device) for device in (0, 1)]
    with open_engine(language("float16"), device="cuda:1") as engine:
        decoder = Decoder(engine, 96)
        assert cuda.allocated(0) == before[0]
        assert cuda.allocated(1) - before[1] >= decoder.kv_bytes + engine.weight_bytes / 2
        for buffer in decoder._cache._buffers.values():
            assert cuda.device_of(buffer.memory.data_ptr()) == 1
    with pytest.raises(UhdError, match=r"^device cuda:7: there is no such GPU"):
        open_engine(language("float16"), device="cuda:7")


def test_products_are_not_rounded_and_memory_grows_by_what_is_asked_for(language):
    with open_engine(language("float32"), device="cuda") as engine:
        options = engine.session.get_provider_options()["CUDAExecutionProvider"]
    assert (options["use_tf32"], options["arena_extend_strategy"]) == ("0", "kSameAsRequested")
    assert options["enable_cudnn"] == "0"


def test_what_fails_on_the_device_is_one_line(language):
    with open_engine(language("float16"), device="cuda") as engine:
        feeds = {
            n: np.zeros(i.resolve({"sequence": 3, "capacity": 8, "rows": 1}), i.dtype)
            for n, i in engine.inputs.items()
        }
        feeds["past_key_values.0.key"] = feeds["past_key_values.0.key"][:, :, :4]
        with pytest.raises(UhdError, match="ONNX Runtime cannot run it on cuda"):
            engine.infer(feeds)


def test_the_rates_are_of_the_device_that_was_named(cuda, monkeypatch):
    monkeypatch.setitem(rates._SQUARE, "cuda", 512)
    monkeypatch.setitem(rates._VECTOR, "cuda", (512, 2048))
    before = [cuda.allocated(device) for device in (0, 1)]
    with cuda.logging() as lines:
        assert rates.measure_rates("onnxruntime", "cuda:1", None) is not None
    assert cuda.allocated(0) == before[0]
    assert {line.rsplit(" ", 1)[1] for line in lines if line.startswith("allocate ")} == {"1"}
