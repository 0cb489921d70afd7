"""The short numeric check of a device: what passes, what is refused, and that it is remembered."""

import importlib
import json

import numpy as np
import pytest

from uhd_export.runtime import Pipeline
from uhd_export.runtime.bundle import probe
from uhd_export.runtime.bundle.manifest import FileRecord
from uhd_export.runtime.bundle.opening import open_engines
from uhd_export.runtime.errors import UhdError


@pytest.fixture
def opened(golden_bundle, tmp_path, monkeypatch):
    """(pipeline, manifest that lists a probe, folder with the probe) of the golden bundle."""
    monkeypatch.setenv("UHD_EXPORT_CACHE", str(tmp_path / "cache"))
    with Pipeline.open(golden_bundle) as pipeline:
        probe.record_probe(tmp_path, pipeline.manifest, pipeline.generator)
        record = FileRecord((tmp_path / probe.PROBE).stat().st_size, "0" * 64)
        pipeline.manifest.files[probe.PROBE] = record
        yield pipeline, pipeline.manifest, tmp_path


def test_a_device_that_agrees_passes_once(opened, monkeypatch):
    pipeline, manifest, folder = opened
    assert np.load(folder / probe.PROBE).shape == (2, 32000)
    probe.check_device(folder, manifest, pipeline.generator, "cuda (one)")
    (passed,) = (folder / "cache" / "checked").iterdir()
    assert json.loads(passed.read_text())["relative_error"] < 1e-5
    monkeypatch.setattr(probe, "_logits", lambda *_: pytest.fail("it was run again"))
    probe.check_device(folder, manifest, pipeline.generator, "cuda (one)")


def test_what_passed_need_not_be_remembered(opened, monkeypatch):
    pipeline, manifest, folder = opened
    monkeypatch.setenv("UHD_EXPORT_CACHE", str(folder / probe.PROBE))  # no folder
    probe.check_device(folder, manifest, pipeline.generator, "cuda (three)")


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("change", [lambda logits: 1.2 * logits, lambda logits: logits * np.nan])
def test_a_device_that_differs_is_refused_and_asked_again(opened, monkeypatch, row, change):
    pipeline, manifest, folder = opened
    right = probe._logits

    def wrong(*arguments):
        logits = right(*arguments)
        logits[row] = change(logits[row])
        return logits

    monkeypatch.setattr(probe, "_logits", wrong)
    for _ in range(2):
        with pytest.raises(
            UhdError, match=r"^device cuda \(two\): its logits differ from the bundle's by .*cpu$"
        ):
            probe.check_device(folder, manifest, pipeline.generator, "cuda (two)")
    monkeypatch.setattr(probe, "_logits", right)
    probe.check_device(folder, manifest, pipeline.generator, "cuda (two)")


@pytest.mark.parametrize("room", ["pipeline", "serving.service"])
@pytest.mark.parametrize("failure", [UhdError("it differs"), RuntimeError("out of memory")])
def test_a_device_is_checked_whoever_opens_the_bundle_and_else_holds_nothing(
    golden_bundle, monkeypatch, room, failure
):
    """Here the processor stands for a GPU."""
    module, engines, logits = importlib.import_module(f"uhd_export.runtime.{room}"), [], []

    def opening(*arguments, device, threads):
        engines.extend(opened := open_engines(*arguments))
        return opened

    def check(folder, manifest, generator, device):
        logits.append(probe._logits(generator, probe._sequence(manifest, generator), None))
        raise failure

    monkeypatch.setattr(module, "open_engines", opening)
    monkeypatch.setattr(module, "check_device", check, raising=False)
    opens = module.Pipeline.open if room == "pipeline" else module.Service.open
    with pytest.raises(type(failure), match=str(failure)):
        opens(golden_bundle, device="cuda")
    assert logits[0].shape == (2, 32000)
    assert not any(hasattr(engine, "session") for engine in engines[:2])


def test_without_logits_or_room_nothing_is_checked(golden_bundle, opened):
    pipeline, manifest, folder = opened
    del manifest.files[probe.PROBE]
    probe.check_device(folder / "missing", manifest, pipeline.generator, "cuda")
    with Pipeline.open(golden_bundle, context=64) as small:
        probe.record_probe(folder / "missing", small.manifest, small.generator)
