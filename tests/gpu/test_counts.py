"""Launches, copies and synchronisations of a decoding step, which only grow by mistake."""

import ctypes

import numpy as np
import pytest
from support.tiny_language import embeddings

from uhd_export.runtime.engines.backends import open_engine
from uhd_export.runtime.image.encoder import PIXELS, TOKENS, VisionEncoder
from uhd_export.runtime.language.decoder import Decoder

# Of a layer of LLaMA: q, k, v at once; attention, which rotates and writes the cache; o; sum and norm; gate
# and up at once; their split; SiLU as two; down; sum and norm.
LAUNCHES_A_LAYER = {"float16": 10, "int4": 10}
# The first norm, the head, its logits as float32; a head of 300 rows in int4, no multiple of 8, is unpacked.
AROUND = {"float16": 3, "int4": 4}
# The first of the greatest logits, and their sum: all that leads to the last of what is fetched is run.
GREEDY = 2


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("weights", ["float16", "int4"])
def test_a_step_copies_nothing_but_its_inputs_and_what_is_asked_for(language, cuda, weights, greedy):
    with open_engine(language(weights), device="cuda") as engine:
        decoder = Decoder(engine, 96)
        last = decoder._cache._buffers["past_key_values.1.value"]
        written = ctypes.c_uint16.from_address(last.memory.data_ptr())

        def attend(name):  # the one thing that the kernel does which anyone looks at
            if "flash_fwd" in name:
                written.value = 0x3C00

        with cuda.observing(attend):
            decoder.prefill(embeddings(5))
        step = embeddings(1)[0]
        run = decoder.greedy if greedy else decoder.prefill
        run(step)
        with cuda.counting() as counts, cuda.logging() as lines:
            run(step)
    launches = 2 * LAUNCHES_A_LAYER[weights] + AROUND[weights] + GREEDY
    assert counts["launches"] == launches, "\n".join(lines)
    assert (counts["h2d"], counts["d2h"], counts["syncs"]) == (2, 2 if greedy else 1, 2)
    assert counts["h2d_bytes"] == step.size * 2 + 4  # the embedding in float16, and the length
    assert counts["d2h_bytes"] == (8 + 4 if greedy else decoder.vocab * 4)
    assert counts["d2d_bytes"] <= 2 * 2 * step.size  # the last position of two streams: never the cache
    assert counts["allocations"] == 0


# Of a batch, from the CPU: shapes and the like, which it computes.
SHAPES, SHAPES_BYTES = 81, 100_000


def test_geometry_stays_on_the_device(vision, cuda, golden_model):
    """A batch of a shape that was met copies its pixels, what is computed of shapes, and its tokens."""
    with open_engine(vision, device="cuda") as engine:
        encoder = VisionEncoder(engine, golden_model().config.model)
        crops = [np.zeros((70, 98, 3), np.uint8)] * 2
        with cuda.counting() as first:
            tokens = encoder.encode(crops, "selective")
        encoder.encode(crops, "selective")  # memory may grow once more
        with cuda.counting() as counts, cuda.logging() as lines:
            encoder.encode(crops, "selective")
    assert first["h2d"] - counts["h2d"] == len(engine.inputs) - 1, "\n".join(lines)
    assert counts["h2d"] <= 1 + SHAPES
    assert counts["h2d_bytes"] <= 2 * crops[0].size * engine.inputs[PIXELS].dtype.itemsize + SHAPES_BYTES
    assert (counts["d2h"], counts["syncs"], counts["allocations"]) == (1, 2, 0)
    assert counts["d2h_bytes"] == len(tokens) * tokens[0].size * engine.outputs[TOKENS].dtype.itemsize
    assert counts["launches"] <= 411


def test_the_geometry_of_few_shapes_is_held(vision, golden_model):
    """The oldest goes: what a device holds of them is bounded."""
    with open_engine(vision, device="cuda") as engine:
        encoder = VisionEncoder(engine, golden_model().config.model)
        for rows in range(2, 30):
            assert {type(matrix).__name__ for matrix in encoder.geometry(rows, 4, "fix").values()} == {
                "Buffer"
            }
        assert encoder.geometry.cache_info().currsize == encoder.geometry.cache_info().maxsize == 16
