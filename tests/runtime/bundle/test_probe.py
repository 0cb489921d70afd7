"""The short numeric check of a device: what passes, what is refused, and that it is remembered."""

import json

import numpy as np
import pytest

from uhd_export.runtime import Pipeline
from uhd_export.runtime.bundle import probe
from uhd_export.runtime.bundle.manifest import FileRecord
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


def test_without_logits_or_room_nothing_is_checked(golden_bundle, opened):
    pipeline, manifest, folder = opened
    del manifest.files[probe.PROBE]
    probe.check_device(folder / "missing", manifest, pipeline.generator, "cuda")
    with Pipeline.open(golden_bundle, context=64) as small:
        probe.record_probe(folder / "missing", small.manifest, small.generator)
