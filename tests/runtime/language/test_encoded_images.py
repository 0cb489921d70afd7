"""Which encoded images stay: the last ones that were used."""

from types import SimpleNamespace

import numpy as np

from uhd_export.runtime.engines.base import TensorInfo
from uhd_export.runtime.language.encoded_images import EncodedImages
from uhd_export.runtime.stopwatch import Stopwatch


def test_the_image_unused_for_longest_is_dropped_first():
    encoded = []

    def encode_resident(crops, grid_mode, watch, stop):
        encoded.append(grid_mode)
        return [np.ones((2, 3), np.float32)]

    language = SimpleNamespace(
        gather=lambda pieces, dtype: np.concatenate(pieces),
        inputs={"inputs_embeds": TensorInfo(np.dtype(np.float32), (1, "S", 3))},
    )
    table = SimpleNamespace(rows=lambda ids: np.zeros((len(ids), 3), np.float32))
    images = EncodedImages(SimpleNamespace(encode_resident=encode_resident), language, table, capacity=2)

    def planned(name):
        plan = SimpleNamespace(resized_size=(1, 1), slice_grid=None, overview_size=(1, 1))
        image = SimpleNamespace(size=(1, 1), resize=lambda size, how: np.zeros((1, 1, 3), np.uint8))
        return SimpleNamespace(
            digest=name,
            source=np.array([0, 1]),
            tokens=np.zeros(2, int),
            image=image,
            plan=plan,
            grid_mode=name,
        )

    a, b, c = map(planned, "abc")
    for image in (a, b, a, c, a, b):  # c drops b, which then drops c
        assert images.rows(image, Stopwatch()).shape == (2, 3)
    assert encoded == ["a", "b", "c", "b"]
    assert a in images and b in images and c not in images and len(images) == 2
    images.clear()
    assert not len(images)
