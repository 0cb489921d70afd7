import dataclasses
import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from runtime import Pipeline, memory
from runtime.errors import UhdError
from runtime.flops import keys_per_window
from runtime.memory import available_memory, peak_memory, reset_peak
from runtime.pattern import pattern
from runtime.profile_report import PAPER, describe_profile, print_profile
from runtime.profiler import Spread, StageProfile, profile_pipeline, steps
from runtime.stages import stage_shares, vision_shares

STAGES = ["pixels", "vit", "jbu", "hiwin", "prefill", "decode"]


@pytest.fixture(scope="module")
def pipeline(golden_bundle):
    with Pipeline.open(golden_bundle, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def measured(pipeline):
    counted = []
    profile = profile_pipeline(
        pipeline, (500, 336), repeats=2, new_tokens=3, threads=1, on_step=lambda: counted.append(1)
    )
    assert len(counted) == steps(("selective", "fix", "pyramid"), 2)
    return profile


def test_every_stage_of_every_mode_is_measured(measured):
    assert [mode.grid for mode in measured.modes] == ["selective", "fix", "pyramid"]
    for mode in measured.modes:
        assert list(mode.stages) == STAGES
        for stage in mode.stages.values():
            assert 0 < stage.seconds.low <= stage.seconds.median <= stage.seconds.high
        assert mode.stages["pixels"].flops is None
        parts = [mode.stages[name].seconds for name in STAGES[:-1]]
        # With two runs the median is the mean, so that the parts add up.
        assert sum(part.median for part in parts) == pytest.approx(mode.first_token.median)
        assert mode.tokens_per_second == pytest.approx(1 / mode.stages["decode"].seconds.median)
    assert (measured.crops, measured.visual_tokens) == (3, 3 * 144 + 2)
    assert measured.kv_bytes == 2 * 2 * 256 * 4 * measured.positions
    assert measured.kv_bytes_allocated == 2 * 2 * 256 * 4 * 4096


def test_weights_are_the_files_bytes(measured, golden_bundle):
    names = [p for p in golden_bundle.iterdir() if p.suffix in (".onnx", ".data", ".npy")]
    assert len(names) == 5
    assert measured.weight_bytes == sum(p.stat().st_size for p in names)


def test_flops_follow_the_grid_mode(measured, pipeline):
    flops = {mode.grid: {n: s.flops for n, s in mode.stages.items()} for mode in measured.modes}
    assert flops["selective"]["vit"] == flops["pyramid"]["vit"] > 0
    keys = {
        grid: [keys_per_window(g, pipeline.manifest.model.projector, grid) for g in ((27, 20), (19, 29))]
        for grid in flops
    }
    assert keys["selective"] == [36, 18] and keys["pyramid"] == [126, 126]
    assert len({counts["hiwin"] for counts in flops.values()}) == 3
    assert max(flops, key=lambda grid: flops[grid]["hiwin"]) == "pyramid"


def test_report_holds_our_rows_and_the_papers(measured):
    facts = json.loads(json.dumps(describe_profile(measured)))
    stage = facts["modes"][0]["stages"]["vit"]
    assert stage["flops_per_second"] == pytest.approx(stage["flops"] / stage["seconds"]["median"])
    assert facts["paper"]["rows"]["selective"]["latency_seconds"] == 0.54
    assert set(facts["paper"]["rows"]) == set(PAPER) == {mode["grid"] for mode in facts["modes"]}
    assert "fine-tuning" in facts["paper"]["note"]
    out = io.StringIO()
    print_profile(measured, Console(file=out, width=80))
    text = out.getvalue()
    for words in ("slicing and pixels", "ViT", "JBU", "Hiwin", "prefill", "decode, a token", "0.54", "62.4"):
        assert words in text
    assert "separate session" in " ".join(text.split())
    assert "…" not in text, "a column does not fit 80 characters"


def test_backends_without_traces_show_the_vision_graph_whole(pipeline, monkeypatch):
    other = dataclasses.replace(pipeline.manifest, backend="abacus")
    monkeypatch.setattr(pipeline, "manifest", other)
    profile = profile_pipeline(pipeline, (200, 200), grids=["fix"], repeats=1, new_tokens=1)
    assert list(profile.modes[0].stages) == ["pixels", "vision", "prefill", "decode"]
    assert not profile.vision_split
    out = io.StringIO()
    print_profile(profile, Console(file=out))
    assert "separate session" not in out.getvalue()


def test_bad_requests(pipeline, golden_bundle):
    for options, message in (
        ({"repeats": 0}, "at least 1"),
        ({"new_tokens": 0}, "at least 1"),
        ({"grids": ["round"]}, "grid mode 'round'"),
        ({"new_tokens": 4096}, "do not fit the context"),
    ):
        with pytest.raises(UhdError, match=message):
            profile_pipeline(pipeline, (200, 200), **options)


def test_shares_of_a_real_trace(pipeline, golden_bundle):
    picture = pipeline.picture(pattern(200, 200))
    crop = np.zeros((336, 336, 3), np.uint8)
    feeds = [feeds for _, feeds in pipeline.encoder.batches([crop], picture.grid)]
    shares = vision_shares(golden_bundle / "vision.onnx", feeds, threads=1)
    assert sum(shares.values()) == pytest.approx(1)
    assert all(share > 0.01 for share in shares.values())
    left = [p.name for p in golden_bundle.iterdir() if p.suffix == ".json"]
    assert sorted(left) == ["manifest.json", "tokenizer.json"], "the trace was left behind"


def node(name, ts, dur):
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur}


def run(ts):
    return {"cat": "Session", "name": "model_run", "ts": ts, "dur": 100}


def test_shares_of_a_made_up_trace():
    events = [
        run(0),
        node("vit/MatMul_1", 1, 1000),  # the warm-up does not count
        run(100),
        node("_inlfunc_WindowAttention_Exp_2", 150, 30),
        node("val_1_nchwc", 101, 4),  # before anything named: the ViT's
        node("vit/MatMul_1", 105, 6),
        node("jbu/MatMul_3", 120, 10),
        node("BiasGelu", 130, 20),  # renamed: with the node before it
        node("InsertedPrecisionFreeCast__inlfunc_JBU_val_5", 140, 20),
        node("hiwin/Add_9", 160, 10),
        {"cat": "Node", "name": "hiwin/Add_9_fence_before", "ts": 159, "dur": 500},
    ]
    assert stage_shares(events, 1) == {"vit": 0.1, "jbu": 0.5, "hiwin": 0.4}


@given(st.lists(st.floats(1e-6, 10), min_size=1))
def test_spread_is_ordered_and_scales(samples):
    spread = Spread.of(samples)
    assert min(samples) <= spread.low <= spread.median <= spread.high <= max(samples)
    half = spread.times(0.5)
    assert (half.median, half.low) == (spread.median / 2, spread.low / 2)


def test_rate_needs_flops():
    second = Spread(0.5, 0.5, 0.5)
    assert StageProfile(second, 10).flops_per_second == 20
    assert StageProfile(second, None).flops_per_second is None


@pytest.mark.skipif(not memory._CLEAR_REFS.exists(), reason="the peak can only be reset on Linux")
def test_peak_memory_is_reset():
    size = 64 * 2**20
    reset_peak()
    before = peak_memory()
    block = np.ones(size, np.uint8)
    assert peak_memory() >= before + size * 0.9
    del block
    reset_peak()
    assert peak_memory() < before + size * 0.5


def test_available_memory_respects_the_group(tmp_path, monkeypatch):
    free = available_memory()
    if free is None:
        pytest.skip("this system does not tell")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert available_memory() == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory() > 600
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "absent")
    assert available_memory() is None
