"""The example for Triton Inference Server, on a stand-in of its backend's module."""

import importlib.util
import io
import json
import queue
import sys
import types
from pathlib import Path

import numpy as np
import pytest

MODEL = Path(__file__).parents[3] / "examples" / "triton" / "llava_uhd"


class Tensor:
    def __init__(self, name, value):
        self._name, self._value = name, value

    def name(self):
        return self._name

    def as_numpy(self):
        return self._value


class Request:
    def __init__(self, **inputs):
        self._inputs, self.responses = inputs, queue.Queue()

    def inputs(self):
        return [Tensor(name, np.array(value)) for name, value in self._inputs.items()]

    def get_response_sender(self):
        return self

    def is_cancelled(self):
        return False

    def send(self, response, flags=0):
        self.responses.put((response, flags))

    def answer(self):
        """(text, finish reason, error) once the last response is there."""
        text = ""
        while True:
            response, flags = self.responses.get(timeout=60)
            values = {tensor.name(): tensor.as_numpy()[0].decode() for tensor in response.output_tensors}
            text += values["TEXT"]
            if flags:
                return text, values["FINISH_REASON"], response.error


@pytest.fixture
def model(monkeypatch, nano_bundle, tmp_path):
    backend = types.ModuleType("triton_python_backend_utils")
    backend.Tensor, backend.TritonError = Tensor, str
    backend.InferenceResponse = lambda output_tensors, error=None: types.SimpleNamespace(
        output_tensors=output_tensors, error=error
    )
    backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    monkeypatch.setitem(sys.modules, backend.__name__, backend)
    spec = importlib.util.spec_from_file_location("triton_model", MODEL / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "bundle").symlink_to(nano_bundle)
    config = {"parameters": {"slots": {"string_value": "2"}, "context": {"string_value": "2048"}}}
    model = module.TritonPythonModel()
    model.initialize(
        {"model_config": json.dumps(config), "model_repository": str(tmp_path), "model_version": "1"}
    )
    yield model
    model.finalize()


def test_requests_are_answered_in_pieces(model, cards):
    image, question, code = cards[0]
    file = io.BytesIO()
    image.save(file, "PNG")
    asked = Request(QUESTION=[question.encode()], IMAGES=np.array([file.getvalue()], object), MAX_TOKENS=[8])
    broken = Request(QUESTION=[b"What?"], IMAGES=np.array([b"no image"], object))
    plain = Request(QUESTION=[b"Hello."], IMAGES=np.array([], object), MAX_TOKENS=[1])
    model.execute([asked, broken, plain])
    assert asked.answer() == (code, "stop", None)
    assert "no image of a known format" in broken.answer()[2]
    assert plain.answer()[1:] == ("length", None)


def test_the_configuration_names_what_the_model_reads():
    text = (MODEL / "config.pbtxt").read_text()
    for name in ("QUESTION", "IMAGES", "MAX_TOKENS", "TEXT", "FINISH_REASON", "slots", "context"):
        assert f'"{name}"' in text
