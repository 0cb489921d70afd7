import dataclasses
import hashlib
import json
import re
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.refusals import one_line_error

from uhd_export.runtime import errors, typed_json
from uhd_export.runtime.bundle.integrity import hash_file, verify_files
from uhd_export.runtime.bundle.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    FileRecord,
    Manifest,
    Parity,
    Precision,
    Source,
    read_manifest,
    write_manifest,
)
from uhd_export.runtime.config import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.layout import Separators
from uhd_export.runtime.settings import Settings

FILES = {
    "embeddings.npy": b"rows",
    "tokenizer.json": b"{}",
    "vision.onnx": b"graph" * 100,
    "language.onnx": b"l",
}


def sample(files: dict[str, FileRecord]) -> Manifest:
    return Manifest(
        schema_version=SCHEMA_VERSION,
        backend="onnxruntime",
        fold=True,
        precision=Precision("float32", "float16", "float16", "float16"),
        source=Source("nano", None, "ab", {"model.safetensors": 7}, "branch", None, None, 7),
        model=ModelConfig(
            VisionConfig(64, 128, 3, 4, 336, 14, 1e-5),
            ProjectorConfig("hiwin", 128, 64, (1, 2, 4), 12),
            LanguageConfig("llama", 128, 256, 2, 4, 2, 32, 100, 2048, 1e-6, 10000.0, False, 1, (2,)),
        ),
        settings=Settings("flat", "vicuna_v1", Separators(), "selective", 9, None, False, "exact", 2048),
        tools={"onnx": "1.23"},
        parity=(
            Parity("vision", "image 1008x672", "relative error", 1e-6, 1e-3, None),
            Parity("logits", "image 1008x672", "relative error", None, 1e-3, "needs 60 GB of memory"),
        ),
        files=files,
    )


@pytest.fixture
def bundle(tmp_path):
    records = {}
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
        records[name] = FileRecord(len(content), hash_file(tmp_path / name))
    write_manifest(tmp_path, sample(records))
    return tmp_path


def edit(folder, change, *, keep_digest=False):
    """Change the JSON; with `keep_digest` false the digest is made to fit again."""
    from uhd_export.runtime.bundle.manifest import _digest

    record = json.loads((folder / MANIFEST).read_text())
    change(record)
    if not keep_digest:
        record["digest"] = _digest(record)
    (folder / MANIFEST).write_text(json.dumps(record))


def test_round_trip(bundle):
    manifest = read_manifest(bundle)
    assert manifest == sample(manifest.files)
    assert isinstance(manifest.model.projector.levels, tuple)
    verify_files(bundle, manifest)
    assert not list(bundle.glob("*.partial"))


def test_altered_manifest_is_refused(bundle):
    edit(bundle, lambda r: r["settings"].update(layout="merged"), keep_digest=True)
    with pytest.raises(UhdError, match="digest differs"):
        read_manifest(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(schema_version=SCHEMA_VERSION + 1), "is newer than"),
        (lambda r: r.update(schema_version=0), "schema version 0 is older .*; build the bundle again"),
        (lambda r: r.pop("schema_version"), "schema_version is missing"),
        (lambda r: r["settings"].pop("layout"), r"settings\.layout: field is missing"),
        (lambda r: r["settings"].update(colour=1), r"settings\.colour: unknown field"),
        (lambda r: r["settings"].update(max_slices="9"), r"settings\.max_slices: expected int, found str"),
        (lambda r: r["settings"].update(max_slices=True), r"settings\.max_slices: expected int, found bool"),
        (
            lambda r: r["settings"].update(grid_mode="square"),
            r"settings\.grid_mode: 'square' is not supported",
        ),
        (lambda r: r["model"]["projector"].update(levels=[1, "2"]), r"levels\[1\]: expected int"),
        (lambda r: r["model"]["projector"].update(levels=[]), r"levels: \[\] must be 1 and some of"),
        (lambda r: r["model"]["projector"].update(levels=[1, 4, 2]), r"levels: \[1, 4, 2\] must be"),
        (lambda r: r["model"]["projector"].update(levels=[2, 4]), r"levels: \[2, 4\] must be"),
        (lambda r: r["model"]["projector"].update(side=0), r"projector\.side: 0 must be above zero"),
        (lambda r: r["model"]["projector"].update(kind="mlp"), r"projector\.kind: 'mlp' is not supported"),
        (lambda r: r["model"]["vision"].update(patch=-14), r"vision\.patch: -14 must be above zero"),
        (lambda r: r["model"]["language"].update(kind="gpt"), r"language\.kind: 'gpt' is not supported"),
        (lambda r: r["model"]["language"].update(eps=float("nan")), r"language\.eps: nan must be above"),
        (lambda r: r["settings"].update(context=-5), r"settings\.context: -5 must be above zero"),
        (lambda r: r["settings"].update(context=2049), r"settings\.context: 2049 is over the model's 2048"),
        (lambda r: r["settings"].update(max_slices=0), r"settings\.max_slices: 0 must be above zero"),
        (lambda r: r["settings"].update(resize=0), r"settings\.resize: 0 must be above zero"),
        (lambda r: r["precision"].update(language="int2"), r"precision\.language: 'int2' is not supported"),
        (lambda r: r.update(backend="abacus"), r"backend: 'abacus' is not supported"),
        (lambda r: r["files"].pop("embeddings.npy"), "embeddings.npy is missing"),
        (lambda r: r["files"].pop("tokenizer.json"), "tokenizer.json is missing"),
    ],
)
def test_bad_manifest_is_refused(bundle, change, message):
    edit(bundle, change)
    with one_line_error(message):
        read_manifest(bundle)


@pytest.mark.parametrize(
    "name",
    ["/a", "../a", "a/../b", "a/b", "a/", "./a", ".a", "..", "a\\b", "..\\a", "C:a", ""],
)
def test_a_file_name_that_leaves_the_folder_is_refused(bundle, name):
    edit(bundle, lambda record: record["files"].update({name: {"bytes": 1, "sha256": ""}}))
    with pytest.raises(UhdError, match=f"files: {re.escape(repr(name))} is not a plain file name"):
        read_manifest(bundle)


def test_a_file_name_with_dots_inside_is_plain(bundle):
    edit(bundle, lambda record: record["files"].update({"a..b.onnx": {"bytes": 1, "sha256": ""}}))
    assert "a..b.onnx" in read_manifest(bundle).files


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"schema_version": "1"}'])
def test_broken_json_is_refused(bundle, content):
    (bundle / MANIFEST).write_bytes(content)
    with pytest.raises(UhdError):
        read_manifest(bundle)


def test_no_bundle(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UhdError, match="uhd-export build"):
            read_manifest(folder)


def test_files_are_verified(bundle):
    manifest = read_manifest(bundle)
    (bundle / ".DS_Store").write_bytes(b"x")  # the operating system's own, passed over
    verify_files(bundle, manifest)
    (bundle / "extra.bin").write_bytes(b"x")
    with pytest.raises(UhdError, match=r"extra\.bin is not listed"):
        verify_files(bundle, manifest)
    (bundle / "extra.bin").unlink()
    (bundle / "vision.onnx").write_bytes(b"graph" * 99)
    with pytest.raises(UhdError, match="495 bytes instead of 500"):
        verify_files(bundle, manifest)
    (bundle / "vision.onnx").write_bytes(b"GRAPH" * 100)
    with pytest.raises(UhdError, match="was altered"):
        verify_files(bundle, manifest)
    (bundle / "vision.onnx").unlink()
    with pytest.raises(UhdError, match=r"vision\.onnx is missing"):
        verify_files(bundle, manifest)


def test_hash_reports_every_byte(bundle):
    counted = []
    manifest = read_manifest(bundle)
    verify_files(bundle, manifest, on_bytes=counted.append)
    assert sum(counted) == sum(len(content) for content in FILES.values())


@dataclasses.dataclass(frozen=True)
class _Inner:
    a: int
    b: tuple[float, ...]
    c: str | None


@dataclasses.dataclass(frozen=True)
class _Outer:
    inner: tuple[_Inner, ...]
    named: dict[str, _Inner]
    flag: bool


printable = st.text().filter(lambda text: errors.printable(text) == text and "\n" not in text)
inner = st.builds(
    _Inner,
    st.integers(),
    st.lists(st.floats(allow_nan=False)).map(tuple),
    st.none() | printable,
)
outer = st.builds(_Outer, st.lists(inner).map(tuple), st.dictionaries(printable, inner), st.booleans())


@given(outer)
def test_typed_json_round_trip(value):
    assert typed_json.read(_Outer, json.loads(json.dumps(dataclasses.asdict(value))), "x") == value


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda s: st.lists(s) | st.dictionaries(st.text(), s),
    )
)
def test_typed_json_never_fails_otherwise(value):
    with pytest.raises(UhdError):
        typed_json.read(_Outer, value, "x")


def test_parity_limits():
    assert Parity("a", "i", "m", 1.0, 1.0, None).ok
    assert not Parity("a", "i", "m", 1.1, 1.0, None).ok
    assert Parity("a", "i", "m", 9.0, None, None).ok


def _fields(kind, where=""):
    """Every field below dataclass `kind`, with its type."""
    for field in dataclasses.fields(kind):
        hint = typing.get_type_hints(kind)[field.name]
        yield f"{where}{field.name}: {hint}"
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner):
                yield from _fields(inner, f"{where}{field.name}.")


def test_another_field_is_another_schema_version():
    digest = hashlib.sha256("\n".join(_fields(Manifest)).encode()).hexdigest()[:12]
    assert (SCHEMA_VERSION, digest) == (6, "81f28981407b"), "raise SCHEMA_VERSION, and put both here"
