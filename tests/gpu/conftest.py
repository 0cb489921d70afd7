"""The CUDA provider of the real onnxruntime-gpu over a CUDA that computes nothing (see `support.fake_cuda`).

Run by `make test-gpu`, in an environment that has the GPU wheel; elsewhere there is nothing to collect.
"""

import numpy as np
import onnxruntime
import pytest
from support.tiny_language import MODELS, reader, tiny_model

from uhd_export.runtime.engines.wheels import CUDA_PROVIDER

GPU_WHEEL = CUDA_PROVIDER in onnxruntime.get_available_providers()
collect_ignore_glob = [] if GPU_WHEEL else ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def cuda():
    """The fake CUDA, loaded before any session."""
    from support import fake_cuda

    return fake_cuda.load()


@pytest.fixture(scope="session")
def language(tmp_path_factory):
    """`language(weights, cache)`: the graph of a model of two layers, of float32, float16, or int4 weights.

    Its cache is in the type of the activations, or in 8 bits.
    """
    from uhd_export.graph.cache import Int8Cache, LayerScales
    from uhd_export.graph.int4.formats import MatMulNBits, RoundedWeights
    from uhd_export.graph.language import emit_language

    folder, model = tmp_path_factory.mktemp("graphs"), tiny_model(*MODELS[0])

    def emit(weights, cache=None):
        path, dtype = folder / f"{weights}-{cache}.onnx", "float16" if weights == "int4" else weights
        scales = LayerScales(*2 * [np.full((model.config.kv_heads, model.config.head_size), 0.03, "f")])
        int8 = Int8Cache([scales] * model.config.layers) if cache == "int8" else None
        form = MatMulNBits(RoundedWeights(32)) if weights == "int4" else None
        if not path.exists():
            emit_language(model.config, reader(model), path, dtype=dtype, cache=int8, linear=form)
        return path

    return emit


@pytest.fixture(scope="session")
def vision(golden_checkpoint, golden_model, tmp_path_factory):
    """The vision graph of the golden checkpoint in float16."""
    from uhd_export.checkpoint.reader import Checkpoint
    from uhd_export.graph.vision import emit_vision

    path = tmp_path_factory.mktemp("vision") / "vision.onnx"
    emit_vision(golden_model().config, Checkpoint(golden_checkpoint), path, dtype="float16")
    return path
