import hashlib
import io

import numpy as np
import pytest
from conftest import golden_json
from golden import recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from runtime.errors import UhdError
from runtime.pixels import cut, normalise, open_image
from runtime.slicing import plan_slices


def sha256(array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@pytest.mark.parametrize("name", golden_json("pixels"))
def test_golden_pixels_bit_for_bit(name):
    case = golden_json("pixels")[name]
    source = recipe.image(*case["image"])
    assert sha256(source) == case["source"]
    image = open_image(source)
    *slices, overview = cut(image, plan_slices(image.size, resize=case["resize"]))
    assert [sha256(overview), sha256(normalise(overview)[None])] == case["overview"]
    if case["slices"]:
        pixels, floats = np.stack(slices), np.stack([normalise(s) for s in slices])
        assert [sha256(pixels), sha256(floats)] == case["slices"]
    else:
        assert slices == []


@settings(max_examples=20)
@given(st.integers(1, 1200), st.integers(1, 1200), st.integers(1, 9))
def test_slices_stitch_to_the_refined_image(width, height, most):
    image = open_image(recipe.image(width, height, 1))
    plan = plan_slices(image.size, max_slices=most)
    *slices, overview = cut(image, plan)
    assert [(c.shape[1], c.shape[0]) for c in (*slices, overview)] == plan.crop_sizes
    if plan.grid is None:
        return
    cols, rows = plan.grid
    stitched = np.concatenate(
        [np.concatenate(slices[row * cols : (row + 1) * cols], 1) for row in range(rows)], 0
    )
    refined = image.resize(plan.refined_size, Image.Resampling.BICUBIC)
    assert np.array_equal(stitched, np.asarray(refined))


def saved(image: Image.Image, path, **options):
    image.save(path, **options)
    return path


def test_alpha_is_composited_on_white(tmp_path):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    opened = open_image(saved(image, tmp_path / "a.png"))
    assert opened.mode == "RGB" and opened.getpixel((0, 0)) == (255, 255, 255)


def test_palette_with_transparency_is_composited(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30] + [0] * 765)
    opened = open_image(saved(image, tmp_path / "p.png", transparency=0))
    assert opened.getpixel((0, 0)) == (255, 255, 255)


def test_cmyk_and_grey_become_rgb(tmp_path):
    for mode in ("CMYK", "L"):
        opened = open_image(saved(Image.new(mode, (4, 4)), tmp_path / f"{mode}.jpg"))
        assert opened.mode == "RGB"


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = open_image(saved(Image.new("RGB", (8, 4)), tmp_path / "r.jpg", exif=exif))
    assert opened.size == (4, 8)


def test_one_pixel_wide_image_gives_crops():
    image = open_image(np.zeros((40, 1, 3), np.uint8))
    assert cut(image, plan_slices(image.size))[-1].shape[2] == 3


def test_unreadable_images_are_named(tmp_path):
    with pytest.raises(UhdError, match=r"none\.png: no such file"):
        open_image(tmp_path / "none.png")
    text = tmp_path / "text.png"
    text.write_text("not an image")
    with pytest.raises(UhdError, match=r"text\.png: cannot be read"):
        open_image(text)
    whole = io.BytesIO()
    Image.fromarray(recipe.image(64, 64)).save(whole, "PNG")
    cut_off = tmp_path / "cut.png"
    cut_off.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    with pytest.raises(UhdError, match=r"cut\.png: cannot be read"):
        open_image(cut_off)
    with pytest.raises(UhdError, match="cannot be read"):
        open_image(tmp_path)
