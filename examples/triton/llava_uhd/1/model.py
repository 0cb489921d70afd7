"""Triton's Python backend over a service: each request becomes an answer's stream of pieces."""

import json
import threading
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.serving.dialogue import Message
from uhd_export.runtime.serving.images.cutting import read_image
from uhd_export.runtime.serving.scheduling.queue import Busy
from uhd_export.runtime.serving.scheduling.scheduler import Closed
from uhd_export.runtime.serving.service import Service, ServiceOptions

_MOST_PIXELS = 100_000_000
_ENDED = ("stop", "length", "context")


class TritonPythonModel:
    """What the backend calls; one instance owns the device."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle beside this file."""
        parameters = json.loads(args["model_config"])["parameters"]
        slots, context = (int(parameters[name]["string_value"]) for name in ("slots", "context"))
        folder = Path(args["model_repository"]) / args["model_version"] / "bundle"
        self.service = Service.open(folder, ServiceOptions(slots=slots, context=context))

    def execute(self, requests: list) -> None:
        """Answer each request in a thread of its own: the service puts them together."""
        for request in requests:
            threading.Thread(target=self._answer, args=(request, request.get_response_sender())).start()

    def finalize(self) -> None:
        """Give running answers a moment, and free the engines."""
        self.service.close(grace=10)

    def _answer(self, request, sender) -> None:  # noqa: ANN001 (Triton's types have no stubs)
        final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        try:
            stream = self.service.submit(self._prepare(request))
            for piece in stream:
                if request.is_cancelled():
                    stream.cancel()
                else:
                    sender.send(_response(piece.text, ""))
            reason = stream.summary.reason
            error = None if reason in _ENDED else pb_utils.TritonError(f"the answer ended early ({reason})")
            sender.send(_response("", reason, error), flags=final)
        except (UhdError, Busy, Closed) as error:
            sender.send(_response("", "error", pb_utils.TritonError(str(error))), flags=final)

    def _prepare(self, request):  # noqa: ANN001, ANN202
        inputs = {tensor.name(): tensor.as_numpy().reshape(-1) for tensor in request.inputs()}
        images = [read_image(data, max_pixels=_MOST_PIXELS) for data in inputs["IMAGES"]]
        text = inputs["QUESTION"][0].decode()
        texts = ("", *["\n"] * (len(images) - 1), f"\n{text}") if images else (text,)
        tokens = int(inputs["MAX_TOKENS"][0]) if "MAX_TOKENS" in inputs else 256
        return self.service.prepare([Message("user", texts)], images, max_tokens=tokens)


def _response(text: str, reason: str, error=None):  # noqa: ANN001, ANN202
    tensors = [
        pb_utils.Tensor(name, np.array([value.encode()], object))
        for name, value in (("TEXT", text), ("FINISH_REASON", reason))
    ]
    return pb_utils.InferenceResponse(output_tensors=tensors, error=error)
