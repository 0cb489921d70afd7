"""An engine whose inputs or outputs are not what the manifest says is refused when the bundle is opened."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from fuzz.targets import forge, write_signed

from uhd_export.runtime import Pipeline
from uhd_export.runtime.bundle.integrity import hash_file
from uhd_export.runtime.bundle.interface import check_embeddings, check_language, check_vision
from uhd_export.runtime.bundle.manifest import read_manifest
from uhd_export.runtime.engines.backends import open_engine
from uhd_export.runtime.engines.base import TensorInfo
from uhd_export.runtime.errors import UhdError


@pytest.fixture(scope="module")
def interfaces(golden_bundle):
    found = {}
    for part in ("vision", "language"):
        with open_engine(golden_bundle / f"{part}.onnx", threads=1) as engine:
            found[part] = engine.inputs, engine.outputs
    return found


def check(golden_bundle, interfaces, part, change):
    inputs, outputs = map(dict, interfaces[part])
    change(inputs, outputs)
    engine = SimpleNamespace(inputs=inputs, outputs=outputs, path=f"{part}.onnx")
    {"vision": check_vision, "language": check_language}[part](engine, read_manifest(golden_bundle))


def as_type(tensors, name, dtype):
    tensors[name] = TensorInfo(np.dtype(dtype), tensors[name].shape)


def as_shape(tensors, name, shape):
    tensors[name] = TensorInfo(tensors[name].dtype, shape)


@pytest.mark.parametrize("part", ["vision", "language"])
def test_what_was_built_fits(golden_bundle, interfaces, part):
    check(golden_bundle, interfaces, part, lambda inputs, outputs: None)


@pytest.mark.parametrize(
    "part, change, words",
    [
        ("vision", lambda i, o: i.pop("pixels"), "input pixels is missing"),
        ("vision", lambda i, o: o.pop("tokens"), "output tokens is missing"),
        ("vision", lambda i, o: as_type(i, "pixels", "int32"), r"pixels is int32 .*, expected float32"),
        ("vision", lambda i, o: as_shape(i, "pixels", ("b", 3, 336, 336)), r"pixels is .* expected .*3, \*"),
        ("vision", lambda i, o: as_shape(i, "position_y", ("a", "b", "c")), "input position_y is"),
        ("vision", lambda i, o: as_shape(i, "position_y", (24, 24)), "input position_y is"),
        ("vision", lambda i, o: as_shape(o, "tokens", ("b", 143, 128)), r"tokens is .*143, 128\), expected"),
        ("vision", lambda i, o: i.update(extra=i["pixels"]), "unknown input extra"),
        ("language", lambda i, o: i.pop("inputs_embeds"), "input inputs_embeds is missing"),
        ("language", lambda i, o: as_type(i, "inputs_embeds", "float16"), "inputs_embeds is float16"),
        ("language", lambda i, o: as_shape(i, "inputs_embeds", ("rows", "s", 7)), "inputs_embeds is"),
        ("language", lambda i, o: i.pop("past_key_values.1.key"), r"past_key_values\.1\.key is missing"),
        ("language", lambda i, o: as_shape(i, "past_key_values.0.key", (1, 2)), "a cache of None positions"),
        ("language", lambda i, o: as_shape(o, "present.0.key", ("rows", 9, 9, 9)), r"present\.0\.key is"),
        ("language", lambda i, o: as_shape(o, "logits", ("rows", "s", 5)), "output logits is"),
        ("language", lambda i, o: as_type(o, "logits", "int64"), "output logits is int64"),
        ("language", lambda i, o: i.pop("seqlens_k"), "input seqlens_k is missing"),
        ("language", lambda i, o: o.update(more=o["logits"]), "unknown output more"),
    ],
)
def test_another_interface_is_refused(golden_bundle, interfaces, part, change, words):
    with pytest.raises(UhdError, match=f"engine {part}.onnx: .*{words}.*build the bundle again"):
        check(golden_bundle, interfaces, part, change)


def test_a_cache_of_too_few_positions_is_refused(golden_bundle, interfaces):
    def shorten(inputs, outputs):
        for tensors in (inputs, outputs):
            for name in [name for name in tensors if name.startswith(("past", "present"))]:
                as_shape(tensors, name, (*tensors[name].shape[:2], 8, tensors[name].shape[3]))

    with pytest.raises(UhdError, match="a cache of 8 positions where the manifest has"):
        check(golden_bundle, interfaces, "language", shorten)


@pytest.mark.parametrize("vocab, hidden", [(10, 128), (40_000, 64)])
def test_an_embedding_table_of_another_size_is_refused(golden_bundle, vocab, hidden):
    with pytest.raises(UhdError, match=f"embeddings of shape .{vocab}, {hidden}., expected"):
        check_embeddings(SimpleNamespace(vocab=vocab, hidden=hidden), read_manifest(golden_bundle))


def test_weights_that_are_no_numbers_are_an_error_not_a_blank_answer(golden_bundle, tmp_path, image_file):
    folder = forge(golden_bundle, tmp_path)
    table = np.load(golden_bundle / "embeddings.npy")
    (folder / "embeddings.npy").unlink()
    np.save(folder / "embeddings.npy", np.full_like(table, np.nan))
    record = json.loads((folder / "manifest.json").read_text())
    path = folder / "embeddings.npy"
    record["files"][path.name] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
    write_signed(folder, record)
    with (
        Pipeline.open(folder, threads=1, max_slices=1) as pipeline,
        pytest.raises(UhdError, match="logits are not finite numbers"),
    ):
        pipeline.answer(image_file, "w400", max_new_tokens=2)
