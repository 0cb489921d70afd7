"""Memory of a pipeline over many images: activations go back to the system, encoded images with `forget`."""

import itertools
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from uhd_export.runtime.bundle.manifest import read_manifest
from uhd_export.runtime.image.encoder import MAX_BATCH, PIXELS, VisionEncoder

_MIB = 1 << 20
_SCRIPT = """
import json, sys
from uhd_export.runtime import Pipeline
from uhd_export.runtime.image.pattern import pattern
from uhd_export.runtime.memory import resident_memory
with Pipeline.open(sys.argv[1]) as pipeline:
    seen = [resident_memory()]
    for side in range(336, 1400, 133):
        pipeline.encode_image(pattern(side, 900))
        seen.append(resident_memory())
    pipeline.forget()
    seen.append(resident_memory())
print(json.dumps([*seen, resident_memory()]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_images_of_many_shapes_leave_little_behind(golden_bundle):
    command = [sys.executable, "-P", "-c", _SCRIPT, str(golden_bundle)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # Measured, in MiB: 128 opened, 154 at most, 138 at the end; 443 and 379 where nothing is given back.
    opened, *images, forgotten, closed = json.loads(done.stdout)
    assert max(images) - opened < 60 * _MIB
    assert max(forgotten, closed) - opened < 30 * _MIB


@pytest.mark.parametrize(
    "rows, shape, size", [(None, (28, 28), MAX_BATCH), (12, (28, 28), 3), (3, (28, 28), 1)]
)
def test_batches_are_no_larger_than_is_faster(golden_bundle, rows, shape, size):
    engine = SimpleNamespace(inputs={PIXELS: np.zeros(0, np.float32)}, on_host=True, staging=np.empty)
    encoder = VisionEncoder(engine, read_manifest(golden_bundle).model)
    encoder.geometry, encoder.rows = (lambda *_: {}), rows
    crops = [np.zeros((*shape, 3), np.uint8)] * (MAX_BATCH + 1)
    members = [batch for batch, _ in encoder.batches(crops, "selective")]
    assert [len(batch) for batch in members[:-1]] == [size] * (len(members) - 1)
    assert list(itertools.chain(*members)) == list(range(len(crops)))
