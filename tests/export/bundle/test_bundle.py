import dataclasses
import errno
import io
import json
import os
import shutil
import sys

import numpy as np
import onnx
import pytest
from golden import recipe
from rich.console import Console
from safetensors.numpy import save_file
from support.folders import leftovers
from support.goldens import assert_close, golden_tensors
from support.options import build_options

import uhd_export.bundle.build as build
import uhd_export.bundle.parity as parity
import uhd_export.bundle.staging as staging
from uhd_export.bundle.build import build_bundle
from uhd_export.bundle.check import check_bundle
from uhd_export.bundle.loss import ORIGINAL
from uhd_export.checkpoint.source import EMBEDDED
from uhd_export.runtime import Pipeline
from uhd_export.runtime.bundle.manifest import STORED, VISION, Parity, VisionQuantization, read_manifest
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.terminal.bundle_report import print_parity

SMALL = recipe.image(500, 120, 5)


@pytest.fixture
def make(spoken_checkpoint, tmp_path):
    """`make(**options)` builds the golden checkpoint into `tmp_path / "out"`."""

    def run(**options):
        own = {"verify": options.pop("verify", False), "force": options.pop("force", False)}
        options = build_options(**{"vision_tower": spoken_checkpoint / "clip", **options})
        return build_bundle(spoken_checkpoint, tmp_path / "out", options=options, **own)

    return run


@pytest.mark.slow
def test_bundle_carries_its_evidence(make, tmp_path, spoken_checkpoint):
    manifest = make(verify=True, layout="merged")
    assert manifest == read_manifest(tmp_path / "out")
    assert leftovers(tmp_path) == ["out"]
    stored = [entry for entry in manifest.parity if entry.against == STORED]
    assert [entry.part for entry in stored] == ["vision"] * 4 + ["logits", "tokens"]
    assert all(entry.value is not None and entry.value < 1e-4 for entry in stored)
    peers = [entry for entry in manifest.parity if entry.against != STORED]
    assert [entry.part for entry in peers] == ["logits", "tokenizer"]
    assert all(entry.against.startswith("transformers") for entry in peers)
    assert manifest.source.id == str(spoken_checkpoint)
    assert set(manifest.files) == set(leftovers(tmp_path / "out")) - {"manifest.json"}
    assert manifest.tools["torch"].startswith("2.")
    report = check_bundle(tmp_path / "out")
    assert report.ok and report.note is None
    assert [entry.inputs for entry in report.measured] == [entry.inputs for entry in manifest.parity]
    expected = {k.split("/")[1]: v for k, v in golden_tensors("model_merged").items() if k.startswith("main")}
    with Pipeline.open(tmp_path / "out") as pipeline:
        logits = pipeline.logits(recipe.image(1008, 672, 0), expected["prompt"].tolist())
    assert_close(logits[0], expected["logits_last"])


@pytest.mark.parametrize(("inline", "dtype"), [(False, "float32"), (True, "float32"), (False, "float16")])
def test_a_bundle_for_others_has_standard_operators_alone(make, tmp_path, inline, dtype):
    """Other readers, and GPUs, where ONNX Runtime's own attention asks for cuDNN."""
    make(inline=inline, dtype=dtype)
    model = onnx.load(tmp_path / "out" / VISION, load_external_data=False)
    attention = {node.domain for node in model.graph.node if node.op_type == "MultiHeadAttention"}
    assert attention == ({"com.microsoft"} if not inline and dtype == "float32" else set())
    if inline:
        assert not model.functions and {node.domain for node in model.graph.node} == {""}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"dtype": "float16"}, {"fold": False}, {"mask": 3}, {"roi_rounding": "bf16", "grid_mode": "pyramid"}],
)
def test_other_bundles_are_in_tolerance(make, golden_model, tmp_path, options):
    manifest = make(**options)
    with Pipeline.open(tmp_path / "out") as pipeline:
        tokens = pipeline.encode_image(SMALL)[0]
    reference = {
        name: value for name, value in options.items() if name in ("mask", "grid_mode", "roi_rounding")
    }
    expected = golden_model(**reference).encode_image(SMALL)[0].numpy()
    limit = 2e-2 if manifest.precision.vision == "float16" else 1e-4
    assert parity.relative_error(tokens, expected) < limit
    assert manifest.fold == options.get("fold", True)


@pytest.mark.slow
def test_float16_is_measured_against_float32(make):
    manifest = make(dtype="float16", verify=True)
    entries = [entry for entry in manifest.parity if entry.against != ORIGINAL]
    values = {entry.part: entry.value for entry in entries}
    assert 1e-6 < values["vision"] < 2e-2
    assert 1e-6 < values["logits"] < 5e-2
    assert [entry.limit for entry in entries if entry.part == "tokens"] == [None]


def test_context_limits_the_rotary_tables(make, tmp_path):
    assert make(context=400).settings.context == 400
    with pytest.raises(UhdError, match="context"), Pipeline.open(tmp_path / "out", context=401):
        pass


@pytest.mark.slow
def test_too_small_a_context_is_said(make):
    entries = {entry.part: entry for entry in make(context=400, verify=True).parity}
    assert entries["vision"].skipped is None
    assert "positions" in entries["logits"].skipped and "positions" in entries["tokens"].skipped
    assert entries["tokens"].metric == "differing of 0 greedy tokens"


@pytest.mark.parametrize("context", [0, 64, 200])
def test_a_context_that_holds_no_answer_is_refused(make, tmp_path, context):
    with pytest.raises(UhdError, match=rf"--context {context}: .* take \d+ positions; use more"):
        make(context=context)
    assert leftovers(tmp_path) == []


def test_what_was_not_measured_is_not_called_ok():
    reason = "577 positions fill the context of [/200]"  # which is no markup
    skipped = Parity("logits", "x", "relative error", None, 1e-3, reason)
    wrong = Parity("vision", "x", "relative error", float("inf"), 1e-3, None)
    good = dataclasses.replace(skipped, value=1e-6, skipped=None)
    for built, measured, words in (
        ([skipped], [], "not measured"),
        ([good], [skipped], "not measured"),
        ([skipped], [good], "ok"),
        ([wrong], [wrong], "over"),
    ):
        console = Console(record=True, width=200, file=io.StringIO())
        print_parity(built, measured, console)
        table, *reasons = console.export_text().rstrip().split("\nnot measured: ")
        assert [word for word in ("not measured", "ok", "over") if word in table] == [words]
        assert reasons == ([reason] if skipped in (*built, *measured) else [])


def test_parity_is_skipped_with_the_reason(make, monkeypatch):
    monkeypatch.setattr(parity, "available_memory", lambda: 10**7)
    entries = make(verify=True).parity
    assert [entry.part for entry in entries] == ["vision", "logits", "tokens"]
    assert all(entry.value is None and "10.00 MB are available" in entry.skipped for entry in entries)


def test_integers_are_not_counted_as_float16_that_becomes_float32(make, tmp_path, monkeypatch):
    manifest = make(dtype="float16")
    for name in ("vision", "language"):
        with (tmp_path / f"{name}.onnx.data").open("wb") as file:
            file.truncate(10**9)
    needed = []
    monkeypatch.setattr(parity, "available_memory", lambda: 0)
    monkeypatch.setattr(parity, "format_bytes", lambda count: needed.append(count) or "")
    rounded = dataclasses.replace(manifest, vision_quantization=VisionQuantization({}, {}, 1))
    for one in (manifest, rounded):
        parity._memory_shortage(tmp_path, one)
    assert needed[0] - needed[2] == pytest.approx(1.4e9)


def test_a_build_that_cannot_be_verified_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "uhd_export.runtime.engines.onnxruntime", None)
    monkeypatch.setattr(build, "staged_folder", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(UhdError, match=r"^--verify: .*onnxruntime: not installed .*cpu.*or use --no-verify$"):
        build_bundle("nano", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_bundle_out_of_tolerance_is_not_written(make, tmp_path, monkeypatch):
    bad = Parity("vision", "x", "relative error", 1.0, 0.1, None)
    monkeypatch.setattr(build, "measure_parity", lambda *args, **options: [bad])
    with pytest.raises(UhdError, match="parity of vision"):
        make(verify=True)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int2"}, "dtype 'int2'"),
        ({"layout": "spiral"}, "layout 'spiral'"),
        ({"grid_mode": "round"}, "grid_mode 'round'"),
        ({"max_slices": 0}, "max slices 0"),
        ({"resize": 0}, "resize 0"),
        ({"context": 99999}, "context"),
        ({"mask": 2}, "mask 2: must be one of 1, 3, "),
        ({"config": "/no/config.json"}, "no such file"),
    ],
)
def test_bad_options_leave_nothing(make, tmp_path, options, message):
    with pytest.raises(UhdError, match=message) as error:
        make(**options)
    assert "\n" not in str(error.value)
    assert leftovers(tmp_path) == []


def test_existing_output(make, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    make()  # an empty folder is no obstacle
    before = (out / "manifest.json").read_text()
    with pytest.raises(UhdError, match="exists already; use --force"):
        make()
    make(grid_mode="fix", force=True)
    assert read_manifest(out).settings.grid_mode == "fix" and (out / "manifest.json").read_text() != before
    assert leftovers(tmp_path) == ["out"]
    (out / "manifest.json").unlink()
    with pytest.raises(UhdError, match="no bundle"):
        make(force=True)


@pytest.mark.slow
def test_failed_replacement_keeps_the_old_bundle(make, tmp_path, monkeypatch):
    make()
    monkeypatch.setattr(build, "emit_language", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make(force=True)
    assert leftovers(tmp_path) == ["out"]
    check_bundle(tmp_path / "out")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_is_one_line_and_leaves_nothing(make, tmp_path, monkeypatch, number):
    def full(*args, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(build, "write_embeddings", full)
    with pytest.raises(UhdError, match="disk is full"):
        make()
    assert leftovers(tmp_path) == []


def test_too_little_space_is_known_before_writing(make, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(build, "emit_vision", None)  # would fail if it were reached
    with pytest.raises(UhdError, match=r"about \d+\.\d+ MB are needed but 1\.00 MB are free"):
        make()
    assert leftovers(tmp_path) == []


def test_broken_checkpoints(spoken_checkpoint, tmp_path):
    out, clip = tmp_path / "out", spoken_checkpoint / "clip"
    copy = tmp_path / "checkpoint"
    shutil.copytree(spoken_checkpoint, copy)
    weights = copy / "model.safetensors"
    whole = weights.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:100], b""):
        weights.write_bytes(content)
        with pytest.raises(UhdError, match="not a readable safetensors file"):
            build_bundle(copy, out, options=build_options(vision_tower=clip))
    weights.write_bytes(whole)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(UhdError, match="tokenizer"):
        build_bundle(copy, out, options=build_options(vision_tower=clip))
    with pytest.raises(UhdError, match="no such folder"):
        build_bundle(tmp_path / "absent", out)
    assert leftovers(tmp_path) == ["checkpoint"]


def test_what_does_not_belong_together_is_refused_before_vision_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "emit_vision", None)  # would fail if it were reached
    copy, out = tmp_path / "checkpoint", tmp_path / "out"
    shutil.copytree(EMBEDDED, copy)
    config = json.loads((EMBEDDED / "clip" / "config.json").read_text())
    image_size = config.get("vision_config", config)
    image_size["image_size"] = 224
    (copy / "clip" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UhdError, match=r"position_embedding\.weight: shape .* differs from the expected"):
        build_bundle(copy, out)
    shutil.copytree(EMBEDDED, copy, dirs_exist_ok=True)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(UhdError, match=r"holds no tokenizer\.json"):
        build_bundle(copy, out)


def test_unknown_tensors_are_named(spoken_checkpoint, tmp_path):
    copy = tmp_path / "checkpoint"
    shutil.copytree(spoken_checkpoint, copy)
    (copy / "model.safetensors").rename(copy / "one.safetensors")  # without an index all files count
    save_file({"model.extra.0": np.zeros(1, np.float32)}, copy / "two.safetensors")
    with pytest.raises(UhdError, match=r"unknown tensors model\.extra\.0"):
        build_bundle(copy, tmp_path / "out", options=build_options(vision_tower=copy / "clip"))
    assert leftovers(tmp_path) == ["checkpoint"]


def test_embeddings_that_do_not_fit_are_refused(tmp_path):
    class Huge:
        def tensor(self, name):
            import torch

            return torch.full((3, 2), 1e5)

    with pytest.raises(UhdError, match="does not fit float16"):
        build.write_embeddings(Huge(), tmp_path / "e.npy", "float16", lambda done, total: None)
    build.write_embeddings(Huge(), tmp_path / "e.npy", "float32", lambda done, total: None)
    assert np.array_equal(np.load(tmp_path / "e.npy"), np.full((3, 2), 1e5, np.float32))


def test_check_finds_what_was_altered(golden_bundle, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(golden_bundle, copy)
    data = bytearray((copy / "language.onnx.data").read_bytes())
    data[-1] ^= 1
    (copy / "language.onnx.data").write_bytes(data)
    with pytest.raises(UhdError, match=r"language\.onnx\.data was altered"):
        check_bundle(copy)


@pytest.mark.parametrize("place", [".", f"snapshots/{'a' * 40}"])
def test_a_folder_of_the_hubs_cache_is_found_again(tmp_path, monkeypatch, place):
    cache = tmp_path / "models--owner--name"
    source = cache / place
    shutil.copytree(EMBEDDED, cache / "snapshots" / ("a" * 40))
    build_bundle(source, tmp_path / "out", options=build_options(context=512), verify=False)
    monkeypatch.setattr("uhd_export.bundle.check.measure_parity", lambda *arguments, **options: [])
    for checkpoint in (None, source):
        report = check_bundle(tmp_path / "out", checkpoint=checkpoint)
        assert (report.checkpoint, report.note) == (cache / "snapshots" / ("a" * 40), None)


@pytest.mark.slow
def test_check_without_the_checkpoint(golden_bundle, spoken_checkpoint, tmp_path, monkeypatch):
    import uhd_export.bundle.check as check

    moved = tmp_path / "moved"
    shutil.copytree(spoken_checkpoint, moved)
    monkeypatch.setattr(check, "_recorded", lambda source: None)
    report = check_bundle(golden_bundle)
    assert report.measured == () and "not at hand" in report.note and report.ok
    assert check_bundle(golden_bundle, checkpoint=moved).measured
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
    with pytest.raises(UhdError, match=r"config\.json differs"):
        check_bundle(golden_bundle, checkpoint=moved)
    with (moved / "model.safetensors").open("ab") as file:
        file.write(b"1")
    with pytest.raises(UhdError, match="its weights differ"):
        check_bundle(golden_bundle, checkpoint=moved)


@pytest.mark.slow
def test_check_reports_what_is_out_of_tolerance(golden_bundle, monkeypatch):
    monkeypatch.setattr(parity, "LIMITS", {"float32": 1e-9})
    report = check_bundle(golden_bundle)
    assert not report.ok
    wrong = [entry.part for entry in report.measured if not entry.ok and entry.against == STORED]
    assert wrong == ["vision"] * 4 + ["logits"]
    bad = Parity("vision", "x", "relative error", 1.0, 0.1, None)
    again = dataclasses.replace(
        report, measured=(), manifest=dataclasses.replace(report.manifest, parity=(bad,))
    )
    assert not again.ok
