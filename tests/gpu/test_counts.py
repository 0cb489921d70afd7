"""Launches, copies and synchronisations of a decoding step, which only grow by mistake."""

import ctypes

import pytest
from support.tiny_language import embeddings

from uhd_export.runtime.engines.backends import open_engine
from uhd_export.runtime.language.decoder import Decoder

# Of a layer of LLaMA: q, k, v at once; attention, which rotates and writes the cache; o; sum and norm; gate
# and up at once; their split; SiLU as two; down; sum and norm.
LAUNCHES_A_LAYER = {"float16": 10, "int4": 10}
# The first norm, the head, its logits as float32; a head of 300 rows in int4, no multiple of 8, is unpacked.
AROUND = {"float16": 3, "int4": 4}


@pytest.mark.parametrize("weights", ["float16", "int4"])
def test_a_step_copies_nothing_but_its_inputs_and_logits(language, cuda, weights):
    with open_engine(language(weights), device="cuda") as engine:
        decoder = Decoder(engine, 96)
        last = decoder._cache._buffers["past_key_values.1.value"]
        written = ctypes.c_uint16.from_address(last.memory.data_ptr())

        def attend(name):  # the one thing that the kernel does which anyone looks at
            if "flash_fwd" in name:
                written.value = 0x3C00

        with cuda.observing(attend):
            decoder.prefill(embeddings(5))
        step = embeddings(1)[0, 0]
        decoder.step(step)
        with cuda.counting() as counts, cuda.logging() as lines:
            decoder.step(step)
    assert counts["launches"] == 2 * LAUNCHES_A_LAYER[weights] + AROUND[weights], "\n".join(lines)
    assert (counts["h2d"], counts["d2h"], counts["syncs"]) == (2, 1, 2)
    assert counts["h2d_bytes"] == step.size * 2 + 4  # the embedding in float16, and the length
    assert counts["d2h_bytes"] == decoder.vocab * 4
    assert counts["d2d_bytes"] <= 2 * 2 * step.size  # the last position of two streams: never the cache
    assert counts["allocations"] == 0
