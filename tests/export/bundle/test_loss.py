"""The loss of what runs against the original checkpoint, step by step."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import uhd_export.bundle.parity as parity
from uhd_export.bundle.build import build_bundle
from uhd_export.bundle.check import check_bundle
from uhd_export.bundle.loss import DIVERGENCE, ERROR, ORIGINAL, divergence, loss_entries
from uhd_export.bundle.options import BuildOptions
from uhd_export.graph.int4.options import WeightOptions

STEPS = ["int4 weights", "int8 head", "int8 activations", "int8 cache", "int8 vision"]


def test_divergence_is_kullback_and_leiblers():
    generator = torch.Generator().manual_seed(0)
    expected, actual = torch.randn(2, 5, 40, generator=generator, dtype=torch.float64)
    wanted = F.kl_div(
        actual.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert divergence(expected.numpy(), actual.numpy()) == pytest.approx(float(wanted))
    assert divergence(expected.numpy(), expected.numpy() + 3) == pytest.approx(0, abs=1e-12)


@pytest.fixture(scope="module")
def runs():
    """What `loss_entries` was called with while the small bundle below was built."""
    return []


@pytest.fixture(scope="module")
def manifest(tmp_path_factory, runs):
    def spied(pipeline, original, config, run):
        entries = loss_entries(pipeline, original, config, run)
        stored = loss_entries(pipeline, None, config, run)
        runs.append((run, entries, stored))
        return entries

    folder = tmp_path_factory.mktemp("loss") / "out"
    options = BuildOptions(
        weights=WeightOptions("int4-rtn"), vision_weights="int8", cache="int8", questions=2
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "loss_entries", spied)
        return build_bundle("nano", folder, options=options), folder


def test_each_step_has_its_share_and_the_last_is_what_runs(manifest, runs):
    ((run, entries, absent),) = runs
    assert [(e.part, e.metric) for e in entries[2:]] == [
        (f"after {step}", metric) for step in STEPS for metric in (ERROR, DIVERGENCE)
    ]
    value = {(entry.part, entry.metric): entry.value for entry in entries}
    errors = [value[f"after {step}", ERROR] for step in STEPS]
    assert len(set(errors)) == len(STEPS) and all(1e-3 < error < 0.5 for error in errors)
    assert all(0 < value[f"after {step}", DIVERGENCE] < 0.1 for step in STEPS)
    assert run.logits.shape == run.stored.shape == (16, run.stored.shape[1])
    assert np.array_equal(run.logits.argmax(1), run.tokens)
    assert {entry.value for entry in absent} == {None} and "not at hand" in absent[0].skipped


def test_the_evidence_is_in_the_manifest_with_answers(manifest, runs):
    built, _ = manifest
    entries = [entry for entry in built.parity if entry.against == ORIGINAL]
    assert entries[:-1] == runs[0][1]
    assert (entries[-1].part, entries[-1].inputs) == ("answers", "2 card images")
    assert entries[-1].metric == "wrong, 0 by the original" and entries[-1].value <= 1


@pytest.mark.slow
def test_check_measures_it_again(manifest):
    report = check_bundle(manifest[1])
    now = {e.part for e in report.measured if e.against == ORIGINAL}
    assert now == {"logits", "tokens", *(f"after {step}" for step in STEPS)}


def test_half_precision_is_compared_with_the_original_too(tmp_path):
    options = BuildOptions(dtype="float16", questions=2)
    entries = [
        e for e in build_bundle("nano", tmp_path / "out", options=options).parity if e.against == ORIGINAL
    ]
    steps = "float16 products", "float16 vision"
    assert [(e.part, e.metric) for e in entries[2:-1]] == [
        (f"after {step}", metric) for step in steps for metric in (ERROR, DIVERGENCE)
    ]
    assert all(0 < entry.value < 1e-2 for entry in entries[2:-1])
    assert entries[-1].part == "answers" and entries[-1].value <= 1


def test_float32_has_nothing_to_compare(tmp_path):
    built = build_bundle("nano", tmp_path / "out", options=BuildOptions(questions=2))
    assert ORIGINAL not in {entry.against for entry in built.parity}
