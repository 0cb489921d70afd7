"""Bundles that hold engines: built, inspected and checked without a GPU, and run on a faked one."""

import functools

import numpy as np
import pytest
from golden import recipe
from PIL import Image
from support.fake_tensorrt import FakeCuda, fake_engine, fake_module
from support.goldens import assert_close
from support.options import build_options
from support.tensorrt_records import quiet_logger, record_of

import uhd_export.tensorrt.engines as engines
from uhd_export.bundle.build import build_bundle
from uhd_export.bundle.check import check_bundle
from uhd_export.checkpoint.config import read_config
from uhd_export.checkpoint.options import SourceOptions
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.cli.main import main
from uhd_export.graph.language import emit_language
from uhd_export.graph.vision import emit_vision
from uhd_export.runtime import Pipeline
from uhd_export.runtime.bundle.manifest import read_manifest
from uhd_export.runtime.engines.tensorrt import backend as tensorrt_backend
from uhd_export.runtime.engines.tensorrt import engine as tensorrt_engine
from uhd_export.runtime.engines.tensorrt.engine import TensorrtEngine
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.source import open_image
from uhd_export.runtime.serving.dialogue import Message
from uhd_export.runtime.serving.service import Service, ServiceOptions
from uhd_export.runtime.terminal.bundle_report import describe_engines
from uhd_export.tensorrt import language_profiles, vision_profiles

pytest.importorskip("tensorrt_rtx")
CONTEXT = 1200


@pytest.fixture(scope="module")
def bundle(spoken_checkpoint, tmp_path_factory):
    """A float16 bundle for one GPU, with one profile for all crops, without plugins."""
    folder = tmp_path_factory.mktemp("engines")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UHD_EXPORT_CACHE", str(folder / "cache"))
        patch.setattr(engines, "vision_profiles", functools.partial(vision_profiles, bands=1))
        build_bundle(
            spoken_checkpoint,
            folder / "bundle",
            options=build_options(
                engines=engines.engine_options("tensorrt-rtx", ["8.9"], plugins=False),
                vision_tower=spoken_checkpoint / "clip",
                mask=1,
                context=CONTEXT,
            ),
        )
    assert len(list((folder / "cache" / "engines").glob("*.engine"))) == 2
    return folder / "bundle"


def test_bundle_holds_engines_and_the_parity_of_their_graphs(bundle):
    manifest = read_manifest(bundle)
    assert set(manifest.files) == {
        "probe.npy",
        *("vision.engine", "vision.engine.json", "language.engine", "language.engine.json"),
        *("embeddings.npy", "tokenizer.json", "probe.npy"),
    }
    assert manifest.backend == "tensorrt-rtx" and manifest.tools["tensorrt-rtx"] == "1.7.1.116"
    assert manifest.precision.vision == manifest.precision.language == "float16"
    parts = [parity.part for parity in manifest.parity]
    assert parts[:6] == ["vision (graph)"] * 4 + ["logits (graph)", "tokens (graph)"]
    assert all(parity.ok and parity.value is not None for parity in manifest.parity[:6])
    assert "compute capability 8.9; plugins: none" in describe_engines(bundle, manifest.backend)


def on_a_gpu() -> bool:
    try:
        return tensorrt_engine.open_cuda() is not None
    except UhdError:
        return False


@pytest.mark.skipif(on_a_gpu(), reason="a GPU would run it")
def test_without_a_gpu_files_are_checked_and_running_is_one_line(bundle, capsys, tmp_path):
    report = check_bundle(bundle)
    assert report.ok and report.measured == () and report.note.startswith("GPU: ")
    Image.fromarray(recipe.image(100, 80, 0)).save(tmp_path / "image.png")
    with pytest.raises(SystemExit) as exit:
        main(["run", str(bundle), str(tmp_path / "image.png"), "What?"])
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: GPU: no usable NVIDIA driver or device")


def test_engines_that_cannot_be_built_are_refused_as_options():
    for options, message in [
        ({"compute_capabilities": ["9.0"]}, r"^compute capability 9.0: .*--backend tensorrt$"),
        ({"compute_capabilities": ["7.5"]}, r"^compute capability 7.5: .*use --no-plugins$"),
        ({"backend": "abacus"}, r"^backend 'abacus': must be one of onnxruntime, "),
        (
            {"backend": "tensorrt"},
            r"^backend tensorrt: not installed .*; pip install 'uhd-export\[tensorrt\]'$",
        ),
    ]:
        with pytest.raises(UhdError, match=message):
            engines.engine_options(**{"backend": "tensorrt-rtx", **options})


@pytest.mark.parametrize(
    "option",
    [
        ("--compute-capability", "8.9"),
        ("--workspace", "64"),
        ("--no-plugins",),
        ("--attention-accumulation", "float16"),
    ],
)
def test_options_of_engines_need_a_backend_that_builds_them(fails, tmp_path, option):
    line = fails("build", "nano", "-o", tmp_path / "out", *option)
    assert line == f"error: {option[0]}: is for engines; give it with --backend tensorrt-rtx or tensorrt"
    assert list(tmp_path.iterdir()) == []


def test_more_scratch_memory_than_tensorrt_can_count_is_refused_at_once(fails, tmp_path):
    options = ("--backend", "tensorrt-rtx", "--compute-capability", "8.9", "--workspace", 10**14)
    assert "'--workspace'" in fails("build", "nano", "-o", tmp_path / "out", *options)


@pytest.fixture
def on_faked_gpu(spoken_checkpoint, tmp_path, monkeypatch):
    """The golden bundle's model as engines on a faked GPU, which is given too."""
    config = read_config(spoken_checkpoint, SourceOptions(vision_tower=spoken_checkpoint / "clip"))
    checkpoint = Checkpoint(spoken_checkpoint)
    emit_vision(config, checkpoint, tmp_path / "vision.onnx")
    emit_language(
        config.language, checkpoint, tmp_path / "language.onnx", dialect="tensorrt", context=CONTEXT
    )
    checkpoint.close()
    profiles = {"vision": vision_profiles(config), "language": language_profiles(config.language, CONTEXT)}
    cuda, made, logger = FakeCuda(), {}, quiet_logger()
    records = {part: record_of(tmp_path / f"{part}.onnx", ranges) for part, ranges in profiles.items()}
    monkeypatch.setattr(tensorrt_engine, "open_cuda", lambda number: cuda)
    monkeypatch.setenv("UHD_EXPORT_CACHE", str(tmp_path / "cache"))
    for name in (tensorrt_backend, tensorrt_engine):
        monkeypatch.setattr(name, "logger", lambda trt: logger)
    for part in records:
        graph, path = tmp_path / f"{part}.onnx", tmp_path / f"{part}.engine"
        record = fake_engine(path, graph, records[part])
        module = fake_module(cuda, record)
        monkeypatch.setattr(tensorrt_engine, "open_tensorrt", lambda backend, module=module: module)
        made[part] = TensorrtEngine(path)
    return made["vision"], made["language"], cuda


@pytest.fixture
def pipelines(golden_bundle, on_faked_gpu):
    """The golden bundle in ONNX Runtime, and the same model's engines on a faked GPU."""
    vision, language, cuda = on_faked_gpu
    device = Pipeline(golden_bundle, read_manifest(golden_bundle), vision, language, context=CONTEXT)
    with Pipeline.open(golden_bundle, context=CONTEXT, threads=1) as host, device:
        yield host, device, cuda


def test_a_pipeline_of_engines_equals_onnx_runtime(pipelines):
    host, device, cuda = pipelines
    image, question = recipe.image(500, 120, 5), "<image>\nWhat is this?"
    for ours, theirs in zip(device.encode_image(image), host.encode_image(image), strict=True):
        assert_close(ours, theirs, 1e-4)
    assert_close(device.inputs_embeds(image, question), host.inputs_embeds(image, question), 1e-4)
    expected = host.generate_ids(image, question, 8)
    assert device.generate_ids(image, question, 8) == expected
    # The picture is kept on the device: a second question brings in its own text alone.
    cuda.copied_in = 0
    again = device.generate_ids(image, "<image>\nWhere?", 1)
    assert again == host.generate_ids(image, "<image>\nWhere?", 1)
    assert 0 < cuda.copied_in < 20 * 256 * 4
    large = np.array(recipe.image(700, 500, 1))
    assert device.generate_ids(large, question, 3) == host.generate_ids(large, question, 3)


def test_a_service_of_engines_answers_each_as_alone(golden_bundle, on_faked_gpu):
    """Its slots are caches of their own; images are encoded in another thread, which takes turns."""
    vision, language, cuda = on_faked_gpu
    manifest = read_manifest(golden_bundle)
    cases = [(recipe.image(500, 120, 5), "what"), (recipe.image(336, 336, 3), "why"), ([], "what is this")]
    options = ServiceOptions(slots=2, context=CONTEXT)
    with Pipeline.open(golden_bundle, context=CONTEXT, threads=1) as host:
        texts = ["".join(host.generate(image, asked, max_new_tokens=6)) for image, asked in cases]
    with Service(golden_bundle, manifest, manifest.settings, (vision, language), options) as service:
        assert not service.scheduler._rows.together
        streams = []
        for image, question in cases:
            images = [open_image(image)] if len(image) else []
            message = Message("user", ("", f"\n{question}") if images else (question,))
            request = service.prepare([message], images, max_tokens=6)
            streams.append(service.submit(request))
        assert [stream.text() for stream in streams] == texts
    assert len(cuda.users) > 1
