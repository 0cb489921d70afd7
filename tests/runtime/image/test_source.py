"""Images from anywhere: their pixels count, whatever lies beside them; what is no image is one line."""

import base64
import http.server
import io
import os
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from support.refusals import one_line_error

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.pattern import pattern
from uhd_export.runtime.image.source import as_images, from_bytes, open_image, source_size

WIDTH, HEIGHT = 31, 17


@pytest.fixture(scope="module")
def pixels():
    return np.asarray(pattern(WIDTH, HEIGHT))


def encoded(array, kind="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(pixels, *chunks):
    """A PNG with more `chunks` before its pixels."""
    plain = encoded(pixels)
    return plain[:33] + b"".join(chunks) + plain[33:]


def with_exif(jpeg, *entries, data=b""):
    """`jpeg` with an IFD of (tag, type, count, value) `entries`."""
    fields = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in sorted(entries))
    body = b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + fields + bytes(4) + data
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


TURNED = (0x112, 3, 1, struct.pack("<I", 6))
FAR = struct.pack("<I", 8 + 2 + 12 * 2 + 4)
METADATA = {
    "text": lambda p: png(p, chunk(b"zTXt", b"prompt\0\0" + zlib.compress(b"a" * 2_000_000))),
    "xmp": lambda p: png(p, chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b" " * 2_000_000))),
    "profile": lambda p: png(p, chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(3_000_000)))),
    "text that is no zlib": lambda p: png(p, chunk(b"zTXt", b"prompt\0\0junk")),
    "short chunks": lambda p: png(p, chunk(b"gAMA", b""), chunk(b"cHRM", b"x"), chunk(b"pHYs", b"")),
    "exif that is none": lambda p: png(p, chunk(b"eXIf", b"junk")),
}
EXIF = {
    "a negative rational": ((TURNED, (0x11A, 10, 1, FAR)), struct.pack("<ii", -1, 0)),
    "a rational of signed values": ((TURNED, (0x11A, 5, 1, FAR)), struct.pack("<ii", -1, 0)),
    "ASCII where a number belongs": ((TURNED, (0x11A, 2, 4, b"72\0\0")), b""),
    "an unknown type": ((TURNED, (0x9999, 99, 1, b"\7")), b""),
    "bytes as ASCII": ((TURNED, (0x10F, 2, 4, b"\xff\xfe\x80\0")), b""),
    "an offset beyond the end": ((TURNED, (0x11A, 5, 1, struct.pack("<I", 999_999))), b""),
    "an IFD beyond the end": ((TURNED, (0x8769, 4, 1, struct.pack("<I", 999_999))), b""),
    "an IFD that is itself": ((TURNED, (0x8769, 4, 1, struct.pack("<I", 8))), b""),
    "an IFD of text": ((TURNED, (0x8769, 2, 4, b"abc\0")), b""),
}


@pytest.mark.parametrize("kind", METADATA)
def test_metadata_of_a_png_does_not_matter(kind, pixels, tmp_path):
    data = METADATA[kind](pixels)
    assert np.array_equal(open_image(data), pixels)
    (tmp_path / "image.png").write_bytes(data)
    assert np.array_equal(open_image(tmp_path / "image.png"), pixels)
    assert source_size(str(tmp_path / "image.png")) == (WIDTH, HEIGHT)
    assert from_bytes(data, max_pixels=WIDTH * HEIGHT).size == (WIDTH, HEIGHT)


@pytest.mark.parametrize("kind", EXIF)
def test_an_image_with_odd_exif_is_upright(kind, pixels, tmp_path):
    entries, data = EXIF[kind]
    plain = encoded(pixels, "JPEG", quality=95)
    opened = open_image(with_exif(plain, *entries, data=data))
    assert np.array_equal(opened, np.rot90(open_image(plain), -1))
    (tmp_path / "image.jpg").write_bytes(with_exif(plain, *entries, data=data))
    assert source_size(str(tmp_path / "image.jpg")) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_format_is_turned_once(orientation, pixels, tmp_path):
    grey = np.repeat(np.asarray(Image.fromarray(pixels).convert("L").resize((48, 32)))[..., None], 3, 2)
    stored, exif = Image.fromarray(grey), Image.Exif()
    exif[0x112] = orientation
    upright = np.asarray(ImageOps.exif_transpose(open_with(stored, exif)))
    files = {
        "png.png": {},
        "jpeg.jpg": {"quality": 100},
        "webp.webp": {"lossless": True},
        "raw.tif": {},
        "lzw.tif": {"compression": "tiff_lzw"},
        "jpeg.tif": {"compression": "jpeg", "quality": 100},
    }
    for name, options in files.items():
        stored.save(tmp_path / name, exif=exif, **options)
        opened = np.asarray(open_image(tmp_path / name)).astype(int)
        assert opened.shape == upright.shape, name
        assert np.abs(opened - upright).max() < 5, name
        with Image.open(tmp_path / name) as given:
            assert np.array_equal(open_image(given), opened), name
        assert source_size(str(tmp_path / name)) == upright.shape[1::-1], name


def open_with(image, exif):
    """`image` as Pillow opens it from a PNG with `exif`."""
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    return Image.open(file)


@pytest.mark.parametrize("value", [(2, 2, b"6\0"), (3, 1, b"\x09"), (5, 1, b"\xff\xff"), (7, 4, b"abcd")])
def test_an_orientation_that_is_none_is_ignored(value, pixels):
    plain = encoded(pixels, "JPEG", quality=95)
    assert np.array_equal(open_image(with_exif(plain, (0x112, *value))), open_image(plain))


def test_a_broken_png_stays_an_error(pixels):
    for data in (encoded(pixels)[:60], METADATA["text"](pixels)[:-30], b"\x89PNG\r\n\x1a\n", b""):
        with one_line_error("image: .*convert it to PNG or JPEG"):
            open_image(data)


@pytest.mark.parametrize("bits", [9, 10, 12])
def test_fewer_bits_in_16_are_not_turned_black(bits, tmp_path):
    grey = (np.linspace(0, 2**bits - 1, 100 * 100).reshape(100, 100)).astype(np.uint16)
    for name in ("grey.png", "grey.tif"):
        Image.fromarray(grey).save(tmp_path / name)
        with pytest.raises(UhdError, match=f"{name}: 16-bit values up to .* nearly black.*scale them"):
            open_image(tmp_path / name)
    rows = np.repeat(grey[:, :, None], 3, axis=2).astype(">u2")
    header = struct.pack(">IIBBBBB", 100, 100, 16, 2, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    colour = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    with pytest.raises(UhdError, match="nearly black"):
        open_image(colour)


def test_a_black_16_bit_image_is_black(tmp_path):
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(tmp_path / "black.png")
    assert not np.asarray(open_image(tmp_path / "black.png")).any()


def test_what_an_image_may_come_from(pixels, tmp_path):
    data = encoded(pixels)
    path = tmp_path / "image.png"
    path.write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    wrapped = "data:image/png;base64,\r\n" + base64.encodebytes(data).decode()
    with path.open("rb") as file:
        given = [
            wrapped,
            path,
            str(path),
            data,
            bytearray(data),
            memoryview(data),
            uri,
            io.BytesIO(data),
            file,
            pixels,
        ]
        for image in given:
            assert np.array_equal(open_image(image), pixels), image
            assert len(as_images(image)) == 1
    assert len(as_images([path, data])) == 2


def test_tensors_are_taken_channels_first(pixels):
    import torch

    assert np.array_equal(open_image(torch.from_numpy(pixels.copy()).permute(2, 0, 1)), pixels)
    grey = torch.from_numpy(pixels[..., 0].copy())
    for tensor in (grey, grey[None]):
        assert np.array_equal(np.asarray(open_image(tensor))[..., 0], pixels[..., 0])
    tensor = torch.zeros(3, 5, 5)
    for other in (tensor, tensor.bool(), tensor.to(torch.bfloat16), tensor[0, 0], tensor.byte()[None]):
        with one_line_error("image (tensor|array): .*uint8"):
            open_image(other)
    assert len(as_images(tensor)) == 1


@pytest.mark.parametrize(
    "image, words",
    [
        (None, "NoneType is not supported; give a path"),
        (3, "int is not supported"),
        ({}, "dict is not supported"),
        (object(), "object is not supported"),
        (io.StringIO("x"), "gives text; open it with mode 'rb'"),
        ("data:image/png;base64,@@", "is not base64"),
        ("data:text/html,x", "a data URI must read"),
        ("data:", "a data URI must read"),
        ("a\0b.png", "cannot be read"),
        ("x" * 300, "File name too long"),
        ("\ud800.png", "no such file|cannot be read"),
        (np.zeros((0, 5, 3), np.uint8), "expected uint8 of shape"),
        (np.array(["x"]), "expected uint8"),
        (b"\0" * 100, "no image of a known format"),
    ],
)
def test_what_is_no_image_is_one_line(image, words):
    for each in as_images(image):
        with one_line_error(words):
            open_image(each)


def test_nothing_that_may_not_end_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", "/dev/tty", "/dev/stdin", tmp_path):
        with one_line_error("is no plain file|no such file|cannot be read"):
            open_image(path)
        with one_line_error("is no plain file|cannot be read|neither a"):
            source_size(str(path))


def test_a_file_that_fails_while_it_is_read():
    class Broken(io.BytesIO):
        def read(self, size=-1):
            raise ValueError("I/O operation on closed file")

    with one_line_error("the open file cannot be read"):
        open_image(Broken())


def test_too_many_pixels_are_refused_before_they_are_made(pixels):
    assert from_bytes(encoded(pixels), max_pixels=WIDTH * HEIGHT).size == (WIDTH, HEIGHT)
    with pytest.raises(UhdError, match="more than 0 megapixels"):
        from_bytes(encoded(pixels), max_pixels=WIDTH * HEIGHT - 1)
    huge = png(pixels)[:16] + struct.pack(">II", 60_000, 60_000) + png(pixels)[24:29]
    huge += struct.pack(">I", zlib.crc32(huge[12:29])) + png(pixels)[33:]
    with one_line_error("more than 179 megapixels; make it smaller"):
        open_image(huge)


@pytest.fixture
def site(pixels):
    """The address of a server on loopback."""
    image = encoded(pixels)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/circle":
                self.send_response(302)
                self.send_header("Location", "/circle")
                self.end_headers()
                return
            self.send_response(404 if self.path == "/missing" else 200)
            self.end_headers()
            self.wfile.write(image)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_address_is_fetched(site, pixels):
    assert np.array_equal(open_image(f"{site}/image.png"), pixels)
    with one_line_error("the server answered 404"):
        open_image(f"{site}/missing")
    with one_line_error("redirects"):
        open_image(f"{site}/circle")
    with one_line_error("cannot be fetched"):
        open_image("http://127.0.0.1:1/x")
    with one_line_error("no valid address|only"):
        open_image("https://")
