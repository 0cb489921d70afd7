"""The paper's tables: counts that can be derived by hand, and a measurement at nano's sizes."""

import json
from dataclasses import replace

import pytest
import torch

from uhd_export import load_model
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.profiling.rates import Rates
from uhd_export.study import run
from uhd_export.study.convnext import DEPTHS, WIDTHS, convnext_parts
from uhd_export.study.count import count_row
from uhd_export.study.measure import RandomCheckpoint, checkpoint_config
from uhd_export.study.rows import STUDIES, study_rows
from uhd_export.study.run import StudyOptions, run_study


@pytest.fixture(scope="module")
def nano_sizes():
    model = load_model("nano").config.model
    return replace(model, vision=replace(model.vision, layers=1))


@pytest.mark.parametrize("study", STUDIES)
def test_every_row_is_counted(study):
    facts = run_study(study, options=StudyOptions(repeats=0))
    assert json.loads(json.dumps(facts)) == facts
    assert len(facts["rows"]) == {"table1": 3, "table2": 4, "table3": 4, "table4": 3, "table6": 3}[study]
    for row in facts["rows"]:
        assert row["released"]["first_token"]["flops"] > row["hooked_flops"] > 1e13
        assert row["vision_seconds"] is None and row["vision_seconds_missing"]
        assert row["paper_measures"]
    assert facts["language_cut"] is None and "none of its layers" in facts["not_measured"]
    for row in facts["rows"]:
        for kind in ("released", "exported"):
            stages = row[kind]["stages"]
            assert row[kind]["first_token"]["flops"] == sum(stage["flops"] for stage in stages.values())
            assert row[kind]["first_token"]["weights"] > 0


def test_the_papers_flops_are_those_of_hooked_modules():
    (vicuna, *_) = study_rows("table1")
    assert vicuna.paper["tflops"] == 17.5
    assert count_row(vicuna)["hooked_flops"] / 1e12 == pytest.approx(17.5, abs=0.05)


def test_rows_differ_where_they_should():
    counts = {row.name: count_row(row) for study in STUDIES[1:] for row in study_rows(study)}
    vision = {
        name: sum(counted["released"]["stages"][stage]["flops"] for stage in ("vit", "jbu", "projector"))
        for name, counted in counts.items()
    }
    assert vision["pyramid"] > 3 * vision["selective"] and vision["fix"] == pytest.approx(
        vision["selective"], rel=1e-3
    )
    assert vision["levels 0,2"] < vision["levels 0,1,2"] < vision["levels 0,1,2,3"]
    assert vision["LLaVA-UHD (v1)"] < vision["+ JBU module"] < vision["+ pyramid (HFP integration)"]
    positions = [
        counts[name]["positions"] for name in ("+ pyramid (HFP integration)", "+ token organization")
    ]
    assert positions == [1066, 1085]


def test_convnext_is_of_the_size_that_is_known():
    """ConvNeXt-L has 198 million weights, 1.5 of them its classifier, and 34.4 GMAC at 224 x 224."""
    parts = convnext_parts([(224, 224)])
    weights = sum(part.weights for part in parts.values())
    assert weights == pytest.approx(196.2e6, rel=0.005)
    assert sum(part.flops for part in parts.values()) / 2 == pytest.approx(34.4e9, rel=0.01)
    assert len(WIDTHS) == len(DEPTHS) == len(parts)


@pytest.mark.parametrize("study", ["table3", "table6"])
def test_rows_are_measured_at_small_sizes(study, nano_sizes, monkeypatch):
    monkeypatch.setattr("uhd_export.study.measure.SIZE", (200, 200))
    told = []
    facts = run_study(
        study, nano_sizes, StudyOptions(1, threads=1), lambda done, total: told.append((done, total))
    )
    measured = {row["name"]: row["vision_seconds"] for row in facts["rows"]}
    assert told[-1] == (len(measured) + 1, len(measured) + 1)  # rows, and the language model
    assert measured.pop("ConvNext", None) is None
    assert all(spread["median"] > 0 and len(spread["samples"]) == 1 for spread in measured.values())
    assert facts["machine"]["processor"]
    cut = facts["language_cut"]
    assert (cut["layers"], cut["of_layers"]) == (2, nano_sizes.language.layers)
    assert cut["positions"] == facts["rows"][0]["positions"]
    assert cut["prefill"]["median"] > cut["decode"]["median"] > 0


def test_what_would_take_too_long_is_said(nano_sizes, monkeypatch):
    monkeypatch.setattr(run, "measure_rates", lambda *machine: Rates(1e6, 1e6, "a slow machine"))
    facts = run_study("table4", nano_sizes, StudyOptions(1))
    assert all("s a run on this machine" in row["vision_seconds_missing"] for row in facts["rows"])


def test_random_weights_are_the_same_again_and_of_order_one(nano_sizes):
    config = checkpoint_config(nano_sizes)
    first, second = RandomCheckpoint(config), RandomCheckpoint(config)
    for name in sorted(first.names())[::17]:
        tensor = first.tensor(name)
        assert torch.equal(tensor, second.tensor(name)) and tuple(tensor.shape) == first.shape(name)
        assert tensor.abs().max() < 10


def test_the_command(call, fails, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    facts = json.loads(call("profile", "--study", "table1", "--count", "--json").stdout)
    assert [row["name"] for row in facts["rows"]] == ["Vicuna-7B", "Vicuna-13B", "Qwen2-7B"]
    text = call("profile", "--study", "table6", "--count").stdout
    assert "levels 0,1,2,3" in text and "fine-tuning" in text
    assert "leave it out" in fails("profile", "bundle", "--count")
    with pytest.raises(UhdError, match="table1, table2"):
        study_rows("table5")
