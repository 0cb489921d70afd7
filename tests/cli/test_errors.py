"""Every mistake of a user through the command line: one line, exit code 2, nothing left."""

import json
import shutil
import struct

import pytest
from PIL import Image
from support.folders import leftovers

from uhd_export.runtime.bundle.integrity import hash_file
from uhd_export.runtime.bundle.manifest import MANIFEST, SCHEMA_VERSION, _digest
from uhd_export.runtime.image.pattern import pattern
from uhd_export.runtime.image.slicing import plan_slices

# Images


def save_exif(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pattern(300, 200).save(path, exif=exif)


KINDS = {
    "cmyk.jpg": lambda path: pattern(300, 200).convert("CMYK").save(path),
    "alpha.png": lambda path: pattern(300, 200).convert("RGBA").save(path),
    "palette.gif": lambda path: pattern(300, 200).convert("P").save(path),
    "grey16.png": lambda path: Image.new("I;16", (300, 200)).save(path),
    "rotated.jpg": save_exif,
    "one.png": lambda path: pattern(1, 1).save(path),
    "narrow.png": lambda path: pattern(3, 300).save(path),
    "100_megapixels.png": lambda path: Image.new("1", (12500, 8000)).save(path),
}


@pytest.mark.parametrize("name", KINDS)
def test_images_of_every_kind_work(call, golden_bundle, tmp_path, name):
    KINDS[name](tmp_path / name)
    options = ["--max-new-tokens", 1, "--max-slices", 1]
    done = call("run", golden_bundle, tmp_path / name, "What?", *options)
    assert done.exit_code == 0, done.output


def test_rotation_is_applied(tmp_path):
    from uhd_export.runtime.image.source import open_image

    save_exif(tmp_path / "rotated.jpg")
    assert open_image(tmp_path / "rotated.jpg").size == (200, 300)


@pytest.mark.parametrize("size", [(1, 300), (5000, 1), (2, 5000)])
def test_lines_are_refused(fails, golden_bundle, tmp_path, size):
    pattern(*size).save(tmp_path / "line.png")
    assert min(min(grid) for grid in plan_slices(size).patch_grids) == 1
    line = fails("run", golden_bundle, tmp_path / "line.png", "What?")
    assert "less elongated" in line


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\nxx"])
def test_unreadable_images(fails, golden_bundle, tmp_path, content):
    (tmp_path / "bad.png").write_bytes(content)
    assert "no image of a known format" in fails("run", golden_bundle, tmp_path / "bad.png", "What?")
    assert "no such file" in fails("run", golden_bundle, tmp_path / "absent.png", "What?")


def test_truncated_image(fails, golden_bundle, image_file, tmp_path):
    (tmp_path / "cut.png").write_bytes(image_file.read_bytes()[:2000])
    assert "truncated" in fails("run", golden_bundle, tmp_path / "cut.png", "What?")


# Prompts and options


def test_prompt_longer_than_the_context(fails, golden_bundle, image_file):
    line = fails("run", golden_bundle, image_file, "a" * 5000)
    assert "positions are more than the context of 4096" in line and "--max-slices" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--temperature", "-1"], "--temperature"),
        (["--top-k", "-1"], "--top-k"),
        (["--top-p", "0"], "--top-p"),
        (["--seed", "-1"], "--seed"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--grid", "round"], "--grid': 'round' is not one of"),
        (["--max-slices", "0"], "--max-slices"),
        (["--resize", "0"], "--resize"),
        (["--context", "0"], "--context"),
        (["--device", "tpu"], "--device': device 'tpu': unknown"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_bad_run_options(fails, golden_bundle, image_file, options, words):
    assert words in fails("run", golden_bundle, image_file, "What?", *options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--size", "10x"], "neither a size"),
        (["--size", "0x5"], "at least one pixel"),
        (["--repeats", "0"], "--repeats"),
        (["--grid", "round"], "--grid"),
    ],
)
def test_bad_profile_options(fails, golden_bundle, options, words):
    assert words in fails("profile", golden_bundle, *options)


# Bundles


@pytest.fixture
def copied(golden_bundle, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(golden_bundle, copy)
    return copy


def rewrite(folder, change):
    record = json.loads((folder / MANIFEST).read_text())
    change(record)
    record["digest"] = _digest(record)
    (folder / MANIFEST).write_text(json.dumps(record))


COMMANDS = [["run", "IMAGE", "What?"], ["check"], ["inspect"], ["eval", "--count", "1"], ["profile"]]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_untrustworthy_bundles(fails, copied, image_file, command):
    name, *rest = [str(image_file) if word == "IMAGE" else word for word in command]
    rewrite(copied, lambda record: record.update(schema_version=99))
    assert "schema version 99 is newer" in fails(name, copied, *rest)
    rewrite(copied, lambda record: record.update(schema_version=SCHEMA_VERSION))
    data = copied / "language.onnx.data"
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    assert "was altered" in fails(name, copied, *rest)
    data.write_bytes(content[:-1])
    assert "bytes instead of" in fails(name, copied, *rest)
    shutil.rmtree(copied)
    assert "uhd-export build" in fails(name, copied, *rest)


def test_a_broken_engine_with_a_right_hash(fails, copied, image_file):
    (copied / "vision.onnx").write_bytes(b"no graph")

    def change(record):
        record["files"]["vision.onnx"] = {"bytes": 8, "sha256": hash_file(copied / "vision.onnx")}

    rewrite(copied, change)
    assert "ONNX Runtime cannot load it" in fails("run", copied, image_file, "What?")


# Checkpoints


def test_no_such_checkpoint(fails, tmp_path):
    for name in (tmp_path / "absent", "no spaces allowed"):
        assert "no such folder" in fails("build", name, "-o", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "config.json: no such file" in fails("build", tmp_path / "empty", "-o", tmp_path / "out")
    assert leftovers(tmp_path) == ["empty"]


@pytest.fixture
def checkpoint(spoken_checkpoint, tmp_path):
    copy = tmp_path / "checkpoint"
    shutil.copytree(spoken_checkpoint, copy)
    return copy


def test_truncated_safetensors(fails, checkpoint, tmp_path):
    weights = checkpoint / "model.safetensors"
    whole = weights.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    options = ["-o", tmp_path / "out", "--vision-tower", checkpoint / "clip"]
    for size in (0, 5, header // 2, header + 1000, len(whole) - 1):
        weights.write_bytes(whole[:size])
        assert "not a readable safetensors file" in fails("build", checkpoint, *options)
    assert leftovers(tmp_path) == ["checkpoint"]


def test_config_fields(call, fails, checkpoint, tmp_path):
    options = ["-o", tmp_path / "out", "--vision-tower", checkpoint / "clip"]
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    for change, words in (
        ({"hidden_size": None}, "hidden_size"),
        ({"feature_scale_mask": 4}, "feature_scale_mask"),
        ({"mm_projector_type": "mlp2x_gelu"}, "mm_projector_type"),
    ):
        path.write_text(json.dumps(config | change))
        assert words in fails("build", checkpoint, *options)
    # What it takes has been said when the weights are met.
    path.write_text(json.dumps(config | {"intermediate_size": 511}))
    done = call("build", checkpoint, *options)
    assert done.exit_code == 2 and done.stderr.splitlines()[-1].startswith("error: ")
    assert "shape" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    path.write_text("{")
    assert "not readable as JSON" in fails("build", checkpoint, *options)
    assert leftovers(tmp_path) == ["checkpoint"]


def test_existing_output_is_kept(fails, spoken_checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("irreplaceable")
    for options, words in (([], "--force"), (["--force"], "no bundle")):
        assert words in fails(
            "build",
            spoken_checkpoint,
            "-o",
            tmp_path / "out",
            *options,
            "--vision-tower",
            spoken_checkpoint / "clip",
        )
    assert leftovers(tmp_path / "out") == ["thesis.txt"]
