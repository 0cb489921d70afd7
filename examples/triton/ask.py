"""Ask a Triton server: `python ask.py IMAGE QUESTION`."""

import queue
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton


def text(name: str, values: list[bytes]) -> triton.InferInput:
    """A tensor of byte strings."""
    tensor = triton.InferInput(name, [len(values)], "BYTES")
    tensor.set_data_from_numpy(np.array(values, object))
    return tensor


def main(image: str, question: str) -> None:
    """Print the answer as it comes."""
    pieces: queue.Queue = queue.Queue()
    with triton.InferenceServerClient("localhost:8001") as client:
        client.start_stream(callback=lambda result, error: pieces.put((result, error)))
        inputs = [text("QUESTION", [question.encode()]), text("IMAGES", [Path(image).read_bytes()])]
        client.async_stream_infer("llava_uhd", inputs)
        while True:
            result, error = pieces.get()
            if error is not None:
                sys.exit(str(error))
            print(result.as_numpy("TEXT")[0].decode(), end="", flush=True)
            if result.as_numpy("FINISH_REASON")[0]:
                print()
                return


if __name__ == "__main__":
    main(*sys.argv[1:3])
