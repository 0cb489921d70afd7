"""The CUDA provider of the real onnxruntime-gpu over a CUDA that computes nothing (see `support.fake_cuda`).

Run by `make test-gpu`, in an environment that has the GPU wheel; elsewhere there is nothing to collect.
"""

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
    """`language(weights)`: the graph of a model of two layers, of float32, float16, or int4 weights."""
    from uhd_export.graph.int4.formats import MatMulNBits, RoundedWeights
    from uhd_export.graph.language import emit_language

    folder, model = tmp_path_factory.mktemp("graphs"), tiny_model(*MODELS[0])

    def emit(weights):
        path, dtype = folder / f"{weights}.onnx", "float16" if weights == "int4" else weights
        form = MatMulNBits(RoundedWeights(32)) if weights == "int4" else None
        if not path.exists():
            emit_language(model.config, reader(model), path, dtype=dtype, linear=form)
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
