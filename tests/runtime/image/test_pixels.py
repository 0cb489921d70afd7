import hashlib
import io

import numpy as np
import pytest
from golden import recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.goldens import golden_json

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.pixels import CLIP_MEAN, CLIP_STD, cut, normalise, normalise_batch
from uhd_export.runtime.image.slicing import plan_slices
from uhd_export.runtime.image.source import open_image, source_size


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
    if plan.slice_grid is None:
        return
    cols, rows = plan.slice_grid
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


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, mode):
    grey = recipe.image(64, 48)[..., 0]
    order = ">u2" if mode == "I;16B" else "<i4" if mode == "I" else "<u2"
    deep = Image.frombytes(mode, (64, 48), (grey.astype(np.int64) * 257).astype(order).tobytes())
    for source in (deep, saved(deep, tmp_path / "deep.tif")):
        assert np.array_equal(np.asarray(open_image(source)), np.stack([grey] * 3, -1))


def test_a_32_bit_image_of_8_bit_values_keeps_them():
    grey = recipe.image(64, 48)[..., 0]
    assert np.array_equal(np.asarray(open_image(Image.fromarray(grey.astype(np.int32))))[..., 0], grey)


def test_a_transparent_value_of_a_16_bit_image_is_white(tmp_path):
    deep = Image.fromarray(np.array([[0, 1, 40000]], np.uint16))
    opened = open_image(saved(deep, tmp_path / "deep.png", transparency=0))
    assert np.asarray(opened)[0, :, 0].tolist() == [255, 0, 40000 >> 8]


@pytest.mark.parametrize("values", [np.full((4, 4), 0.5, np.float32), np.full((4, 4), 2**20, np.int32)])
def test_pixels_of_no_known_range_are_refused(tmp_path, values):
    path = saved(Image.fromarray(values), tmp_path / "raw.tif")
    with pytest.raises(UhdError, match=r"^image .*raw\.tif: .*; scale them to 8 bits$"):
        open_image(path)


def test_arrays_take_the_path_of_files():
    colour = recipe.image(8, 6)
    assert np.array_equal(np.asarray(open_image(colour)), colour)
    assert np.array_equal(np.asarray(open_image(colour[..., 0]))[..., 1], colour[..., 0])
    clear = np.concatenate([colour, np.zeros((6, 8, 1), np.uint8)], -1)
    assert (np.asarray(open_image(clear)) == 255).all()


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((6, 8, 3), np.float32),
        np.zeros((6, 8), np.uint16),
        np.zeros((3, 6, 8), np.uint8),
        np.zeros((6, 8, 2), np.uint8),
        np.zeros(6, np.uint8),
    ],
)
def test_other_arrays_are_refused(array):
    with pytest.raises(UhdError, match=r"^image array: .*; expected uint8 of shape \(h, w\), \(h, w, 3\)"):
        open_image(array)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_of_a_file_is_known_without_its_pixels(tmp_path, monkeypatch, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(Image.new("RGB", (8, 4)), tmp_path / "r.jpg", exif=exif)
    expected = open_image(path).size
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)  # would fail if it were called
    assert source_size(str(path)) == expected


def test_one_pixel_wide_image_gives_crops():
    image = open_image(np.zeros((40, 1, 3), np.uint8))
    assert cut(image, plan_slices(image.size))[-1].shape[2] == 3


def test_unreadable_images_are_named(tmp_path):
    with pytest.raises(UhdError, match=r"none\.png: no such file"):
        open_image(tmp_path / "none.png")
    text = tmp_path / "text.png"
    text.write_text("not an image")
    with pytest.raises(UhdError, match=r"text\.png: no image of a known format"):
        open_image(text)
    whole = io.BytesIO()
    Image.fromarray(recipe.image(64, 64)).save(whole, "PNG")
    cut_off = tmp_path / "cut.png"
    cut_off.write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    with pytest.raises(UhdError, match=r"cut\.png: cannot be read"):
        open_image(cut_off)
    with pytest.raises(UhdError, match="is no plain file"):
        open_image(tmp_path)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_table_equals_the_arithmetic_bit_for_bit(dtype):
    crops = [np.random.default_rng(i).integers(0, 256, (28, 42, 3), np.uint8) for i in range(3)]
    crops[0].reshape(-1)[:256] = np.arange(256)
    scaled = (np.stack(crops) * (1 / 255)).astype(np.float32)
    expected = (scaled - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    batch = normalise_batch(crops, dtype)
    assert batch.dtype == dtype and batch.flags.c_contiguous
    np.testing.assert_array_equal(batch, expected.transpose(0, 3, 1, 2).astype(dtype))
    # A slice of a larger image is no contiguous array.
    wide = np.concatenate(crops, 1)[:, 42:84]
    np.testing.assert_array_equal(normalise_batch([wide], dtype)[0], batch[1])
