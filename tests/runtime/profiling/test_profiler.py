import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from support import memory_hog
from support.memory_hog import take

from uhd_export.runtime import memory
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.pattern import pattern
from uhd_export.runtime.memory import available_memory, peak_memory, run_apart
from uhd_export.runtime.pipeline import open_chunked
from uhd_export.runtime.profiling.compare import compare
from uhd_export.runtime.profiling.costs import keys_per_window
from uhd_export.runtime.profiling.facts import describe_profile
from uhd_export.runtime.profiling.paper import PAPER
from uhd_export.runtime.profiling.profiler import (
    EngineMemory,
    ProfileOptions,
    StageProfile,
    profile_pipeline,
)
from uhd_export.runtime.profiling.runs import run_once
from uhd_export.runtime.profiling.spread import Spread
from uhd_export.runtime.profiling.stages import stage_shares, vision_shares
from uhd_export.runtime.profiling.trace import write_trace
from uhd_export.runtime.terminal.profile_report import print_profile

PARTS = ["vit", "jbu", "hiwin"]
STAGES = ["pixels", "vision", *PARTS, "prefill", "decode"]


@pytest.fixture(scope="module")
def measured(pipeline):
    told = []
    options = ProfileOptions((500, 336), repeats=2, tokens=3, threads=1)
    profile = profile_pipeline(pipeline, options, lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1], "the bar does not end full"
    assert [done for done, _ in told] == list(range(1, len(told) + 1))
    return profile


def profiled(pipeline, size=(200, 200), *, grid_modes=("fix",), repeats=1, tokens=1, **options):
    return profile_pipeline(pipeline, ProfileOptions(size, grid_modes, repeats, tokens, **options))


def printed(profile, width=200):
    out = io.StringIO()
    print_profile(profile, Console(file=out, width=width))
    return out.getvalue()


@pytest.mark.slow
def test_every_stage_of_every_mode_is_measured(measured):
    assert [mode.grid_mode for mode in measured.modes] == ["selective", "fix", "pyramid"]
    for mode in measured.modes:
        assert list(mode.stages) == STAGES
        for stage in mode.stages.values():
            assert 0 < stage.seconds.low <= stage.seconds.median <= stage.seconds.high
        assert mode.stages["pixels"].flops is None
        median = {name: stage.seconds.median for name, stage in mode.stages.items()}
        # With two runs the median is the mean, so that the stages add up.
        stages = median["pixels"] + median["vision"] + median["prefill"]
        assert stages == pytest.approx(mode.first_token.median)
        assert sum(median[part] for part in PARTS) == pytest.approx(median["vision"])
        assert mode.stages["vision"].flops == sum(mode.stages[part].flops for part in PARTS)
        assert mode.tokens_per_second == pytest.approx(1 / mode.stages["decode"].seconds.median)
    assert (measured.crops, measured.visual_tokens) == (3, 3 * 144 + 2)
    assert measured.kv_bytes == 2 * 2 * 256 * 4 * measured.positions
    assert measured.kv_bytes_allocated == 2 * 2 * 256 * 4 * 4096


@pytest.mark.slow
def test_weights_are_the_files_bytes(measured, golden_bundle):
    names = [p for p in golden_bundle.iterdir() if p.suffix in (".onnx", ".data", ".npy")]
    assert len(names) == 5
    assert measured.weight_bytes == sum(p.stat().st_size for p in names)


@pytest.mark.slow
def test_flops_follow_the_grid_mode(measured, pipeline):
    flops = {mode.grid_mode: {n: s.flops for n, s in mode.stages.items()} for mode in measured.modes}
    assert flops["selective"]["vit"] == flops["pyramid"]["vit"] > 0
    keys = {
        grid: [keys_per_window(g, pipeline.manifest.model.projector, grid) for g in ((27, 20), (19, 29))]
        for grid in flops
    }
    assert keys["selective"] == [36, 18] and keys["pyramid"] == [126, 126]
    assert len({counts["hiwin"] for counts in flops.values()}) == 3
    assert max(flops, key=lambda grid: flops[grid]["hiwin"]) == "pyramid"


@pytest.mark.slow
def test_report_holds_our_rows_and_the_papers(measured):
    facts = json.loads(json.dumps(describe_profile(measured)))
    stage = facts["modes"][0]["stages"]["vit"]
    assert stage["flops_per_second"] == pytest.approx(stage["flops"] / stage["seconds"]["median"])
    assert facts["paper"]["rows"]["selective"]["latency_seconds"] == 0.54
    assert set(facts["paper"]["rows"]) == set(PAPER) == {mode["grid_mode"] for mode in facts["modes"]}
    assert "fine-tuning" in facts["paper"]["note"]
    text = printed(measured, width=80)
    for words in ("slicing and pixels", "ViT", "JBU", "Hiwin", "prefill", "decode, a token", "0.54", "62.4"):
        assert words in text
    assert "separate session" in " ".join(text.split())
    assert "…" not in text, "a column does not fit 80 characters"


def test_backends_without_traces_show_the_vision_graph_whole(pipeline, monkeypatch):
    other = dataclasses.replace(pipeline.manifest, backend="abacus")
    monkeypatch.setattr(pipeline, "manifest", other)
    profile = profiled(pipeline)
    assert list(profile.modes[0].stages) == ["pixels", "vision", "prefill", "decode"]
    assert not profile.vision_split
    assert "separate session" not in printed(profile)


def test_a_comparison_and_what_runs_apart_keep_context_and_chunk(
    pipeline, golden_bundle, monkeypatch, tmp_path
):
    opened, cold = [], []

    def run(pipeline, *rest):
        opened.append((pipeline.generator.decoder.context, pipeline.generator.prefix.chunk))
        return run_once(pipeline, *rest)

    monkeypatch.setattr("uhd_export.runtime.profiling.compare.run_once", run)
    options = ProfileOptions((200, 200), ("fix",), 1, 1, context=1000, chunk=100)
    compare(golden_bundle, golden_bundle, options)
    assert set(opened) == {(1000, 100)}
    monkeypatch.setattr(
        "uhd_export.runtime.profiling.profiler.cold_start", lambda *_, **opening: cold.append(opening)
    )
    monkeypatch.setattr(pipeline.generator.prefix, "chunk", 77)
    opened.clear()
    monkeypatch.setattr("uhd_export.runtime.profiling.trace.run_once", run)
    write_trace(pipeline, options, tmp_path / "trace.json")
    assert set(opened) == {(4096, 77)}
    profiled(pipeline)
    assert cold[0]["prefill_chunk"] == 77
    with open_chunked(golden_bundle, prefill_chunk=77) as other:
        assert other.generator.prefix.chunk == 77


def test_bad_requests(pipeline, golden_bundle):
    for options, message in (
        ({"repeats": 0}, "at least 1"),
        ({"tokens": 0}, "at least 1"),
        ({"grid_modes": ("round",)}, "grid mode 'round'"),
        ({"tokens": 4096}, "do not fit the context"),
    ):
        with pytest.raises(UhdError, match=message):
            profiled(pipeline, **options)


def test_shares_of_a_real_trace(pipeline, golden_bundle):
    planned = pipeline.plan_image(pattern(200, 200))
    crop = np.zeros((336, 336, 3), np.uint8)
    feeds = [feeds for _, feeds in pipeline.encoder.batches([crop], planned.grid_mode)]
    shares = vision_shares(golden_bundle / "vision.onnx", feeds, threads=1)
    assert sum(shares.values()) == pytest.approx(1)
    assert all(share > 0.01 for share in shares.values())
    left = [p.name for p in golden_bundle.iterdir() if p.suffix == ".json"]
    assert sorted(left) == ["manifest.json", "tokenizer.json"], "the trace was left behind"


def test_several_traced_runs_count(golden_bundle, pipeline, monkeypatch):
    traces = []
    monkeypatch.setattr(
        "uhd_export.runtime.profiling.stages.stage_shares",
        lambda events, runs: traces.append((events, runs)) or {},
    )
    planned = pipeline.plan_image(pattern(200, 200))
    crop = np.zeros((336, 336, 3), np.uint8)
    feeds = [feeds for _, feeds in pipeline.encoder.batches([crop], planned.grid_mode)]
    vision_shares(golden_bundle / "vision.onnx", feeds * 2, threads=1)
    ((events, runs),) = traces
    assert runs == 3 * 2
    assert [e["name"] for e in events].count("model_run") == (1 + 3) * 2, "the warm-up does not count"


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
    assert stage_shares(events, 2)["vit"] == 1010 / 1100


@given(st.lists(st.floats(1e-6, 10), min_size=1))
def test_spread_is_ordered(samples):
    spread = Spread.of(samples)
    assert min(samples) <= spread.low <= spread.median <= spread.high <= max(samples)
    assert (spread.interval is None) == (len(samples) < 3)


def test_rate_needs_flops():
    second = Spread(0.5, 0.5, 0.5)
    assert StageProfile(second, 10).flops_per_second == 20
    assert StageProfile(second, None).flops_per_second is None


@pytest.mark.slow
def test_peaks_do_not_depend_on_the_other_modes(measured, pipeline):
    peaks = {mode.grid_mode: mode.peak_bytes for mode in measured.modes}
    alone = profiled(pipeline, (500, 336), grid_modes=("pyramid",), tokens=3, threads=1)
    assert peaks["pyramid"] == pytest.approx(alone.modes[0].peak_bytes, rel=0.03)
    # The difference is their features' alone, whatever the order.
    assert min(peaks.values()) == pytest.approx(max(peaks.values()), rel=0.1)


@pytest.mark.slow
@pytest.mark.skipif(not memory._STATUS.exists(), reason="macOS counts what the parent had")
def test_peak_of_another_process(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(memory_hog.__file__).parents[1]))
    small, large = (run_apart(take, megabytes=size).peak_bytes for size in (1, 65))
    assert large - small == pytest.approx(64 << 20, rel=0.1)
    held = np.ones(256 << 20, np.uint8)
    assert run_apart(take, megabytes=1).peak_bytes == pytest.approx(small, rel=0.1)
    assert peak_memory() > held.nbytes
    assert run_apart(take, gigabytes=1) is None


def test_peaks_are_left_out_where_another_copy_does_not_fit(pipeline, monkeypatch):
    monkeypatch.setattr("uhd_export.runtime.profiling.apart.available_memory", lambda: 1 << 20)
    profile = profiled(pipeline)
    assert profile.modes[0].peak_bytes is None
    assert "not taken" in printed(profile) and "process of its own" not in printed(profile)


@pytest.mark.slow
def test_engines_on_a_device_show_their_own_figures(measured, pipeline, monkeypatch):
    assert measured.engines == {}
    on_device = type("OnDevice", (type(pipeline.vision),), {"device_bytes": 2_000_000})
    monkeypatch.setattr(pipeline.vision, "__class__", on_device)
    monkeypatch.setattr(pipeline.vision, "weight_bytes", 5_000_000)
    profile = profiled(pipeline)
    assert profile.engines == {"vision": EngineMemory(5_000_000, 2_000_000, None)}
    assert "vision engine on the device: weights 5.00 MB, 2.00 MB beside them" in printed(profile)
    scratch = {"vision": EngineMemory(5_000_000, 2_000_000, 7_000_000)}
    assert "7.00 MB for activations" in printed(dataclasses.replace(profile, engines=scratch))


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
