"""Bytes that stages move, by how a bundle stores its weights."""

from dataclasses import replace

import pytest

from uhd_export.runtime.bundle.manifest import Precision, Quantization, VisionQuantization, read_manifest
from uhd_export.runtime.config import OFFICIAL
from uhd_export.runtime.profiling.work import stage_work, stored_types

GRIDS = [(24, 24)] * 6 + [(19, 29)]


@pytest.fixture
def dense(golden_bundle):
    manifest = read_manifest(golden_bundle)
    return replace(manifest, model=replace(manifest.model, language=OFFICIAL["Vicuna-7B"]))


def work(manifest):
    return stage_work(GRIDS, manifest, 1066, "selective")


def test_a_step_reads_weights_and_cache_as_they_are_stored(dense):
    head_alone = replace(dense, quantization=Quantization(None, 128, True, False, "int8", "int8"))
    int4 = replace(
        dense,
        quantization=Quantization("gptq", 128, True, False, "int4", "int8"),
        precision=Precision("float32", "float32", "float16", "int8"),
    )
    head, linear = 32000 * 4096, 6_476_005_376
    saved = work(dense)["decode"].bytes - work(head_alone)["decode"].bytes
    assert saved == pytest.approx(head * (4 - 1 - 4 / 128), rel=1e-6)
    cache = 2 * 32 * 4096 * 1066
    expected = (linear + head) * (0.5 + 4 / 128) + cache
    assert work(int4)["decode"].bytes == pytest.approx(expected, rel=0.01)
    assert stored_types(int4)["language"] == "float32 with int4 weights, int4 head, int8 cache"
    assert stored_types(dense) == {"vision": "float32", "language": "float32"}


def test_vision_in_8_bits_moves_fewer_bytes_of_weights_alone(dense):
    int8 = replace(dense, vision_quantization=VisionQuantization({"a": 0.01}, {}, 1))
    before, after = work(dense), work(int8)
    assert after["vit"].bytes < before["vit"].bytes and after["hiwin"].bytes < before["hiwin"].bytes
    assert after["jbu"] == before["jbu"] and after["vision"].flops == before["vision"].flops
    assert after["vision"].bytes == sum(after[stage].bytes for stage in ("vit", "jbu", "hiwin"))
    assert stored_types(int8)["vision"] == "float32 with int8 weights"
