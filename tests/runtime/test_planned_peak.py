"""The planned peak beside the measured one: a process of its own that answers one question at 1008x672."""

import json
import subprocess
import sys

import pytest

from uhd_export.runtime.bundle.manifest import read_manifest
from uhd_export.runtime.image.pattern import pattern
from uhd_export.runtime.planning.bundle import bundle_workload, largest

_SCRIPT = """
import json, sys
from uhd_export.runtime import Pipeline
from uhd_export.runtime.memory import peak_memory
with Pipeline.open(sys.argv[1]) as pipeline:
    list(pipeline.generate(sys.argv[2], "What is the code on the red card?", max_new_tokens=4))
print(json.dumps(peak_memory()))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc"),
]


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "pattern.png"
    pattern(1008, 672).save(path)
    return path


def measured_peak(bundle, image):
    command = [sys.executable, "-P", "-c", _SCRIPT, str(bundle), str(image)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def planned_peak(bundle):
    return bundle_workload(read_manifest(bundle), (1008, 672), "cpu").plan().peak


_MANY = """
import json, random, sys
import numpy as np
from PIL import Image
from uhd_export.runtime import Pipeline
from uhd_export.runtime.memory import resident_memory
random.seed(0)
with Pipeline.open(sys.argv[1]) as pipeline:
    seen = []
    for seed in range(int(sys.argv[2])):
        shape = random.randint(200, 1400), random.randint(200, 1400), 3
        pipeline.encode_image(Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape, np.uint8)))
        seen.append(resident_memory())
print(json.dumps(seen))
"""


# int4-rtn lies in memory as int4 does, and needs no calibration.
NANO = {
    "exact": {"weights": "dense", "lm_head": "dense"},
    "balanced": {"weights": "int4-rtn", "lm_head": "int8", "vision_weights": "int8", "cache": "int8"},
    "small": {"weights": "int4-rtn", "lm_head": "int4", "vision_weights": "int8", "cache": "int8"},
}


@pytest.mark.parametrize("preset", NANO)
def test_nano_peaks_as_planned(preset, image, tmp_path):
    from support.options import build_options

    from uhd_export import build_bundle

    build_bundle("nano", tmp_path / "nano", options=build_options(**NANO[preset]), verify=False)
    assert planned_peak(tmp_path / "nano") == pytest.approx(measured_peak(tmp_path / "nano", image), rel=0.1)


def test_random_images_leave_no_more_than_is_planned(tmp_path):
    from uhd_export import build_bundle

    bundle = tmp_path / "nano"
    manifest = build_bundle("nano", bundle, verify=False)
    command = [sys.executable, "-P", "-c", _MANY, str(bundle), "24"]
    seen = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    # Between images: what the programs and weights take, and little of the activations of the largest.
    work = bundle_workload(manifest, largest(manifest.settings), "cpu")
    assert max(seen) < 1.1 * (work.plan().peak - work.plan().vision)
    assert max(seen[12:]) < 1.1 * max(seen[:12])


@pytest.mark.parametrize("preset", NANO)
def test_a_cut_of_vicunas_width_peaks_as_planned(preset, image, tmp_path, spoken_checkpoint):
    from support.vicuna_cut import write_cut

    bundle = write_cut(tmp_path / "cut", preset, spoken_checkpoint / "tokenizer.json")
    assert planned_peak(bundle) == pytest.approx(measured_peak(bundle, image), rel=0.1)
