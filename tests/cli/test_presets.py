"""--preset through the command line: what it chooses, what overrides it, what a backend cannot have."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from uhd_export.bundle.presets import PRESETS
from uhd_export.cli.main import main
from uhd_export.runtime.errors import UhdError


@pytest.fixture
def options(monkeypatch, tmp_path):
    """The BuildOptions that `build nano` with further arguments arrives at, and what it says."""
    seen = []

    def build_bundle(source, out, *, options, **rest):
        seen.append(replace(options, questions=0))
        raise UhdError("enough")

    monkeypatch.setattr("uhd_export.bundle.build.build_bundle", build_bundle)

    def run(*arguments):
        result = CliRunner().invoke(main, ["build", "nano", "-o", str(tmp_path / "out"), *arguments])
        return seen[-1], result.stderr

    return run


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_default_of_other_options(options, name):
    expected = PRESETS[name].options()
    assert options("--preset", name)[0] == expected
    weights = expected.weights
    explicit = [f"--weights={weights.weights}", f"--lm-head={weights.lm_head}"]
    explicit += [f"--vision-weights={expected.vision_weights}", f"--cache={expected.cache_type}"]
    spelled = options(*explicit)[0]
    assert (spelled.weights, spelled.vision_weights) == (weights, expected.vision_weights)
    assert (spelled.cache_type, spelled.precision) == (expected.cache_type, expected.precision)
    assert len({preset.options() for preset in PRESETS.values()}) == len(PRESETS)


@pytest.mark.parametrize("last", [True, False])
def test_explicit_options_go_before_a_preset(options, last):
    explicit = ["--weights", "int4-rtn", "--lm-head", "int8"]
    arguments = ["--preset", "small", *explicit] if last else [*explicit, "--preset", "small"]
    chosen, said = options(*arguments)
    assert (chosen.weights.weights, chosen.weights.lm_head) == ("int4-rtn", "int8")
    assert chosen.vision_weights == PRESETS["small"].vision_weights
    assert "--preset" not in said


@pytest.mark.parametrize("last", [True, False])
def test_what_a_backend_cannot_have_is_float16_and_said(options, last):
    for explicit, field, reason in (
        (["--dtype", "float16"], "vision_weights", "ONNX Runtime's 8-bit vision wants float32 activations"),
        (["--backend", "tensorrt-rtx"], "lm_head", "tensorrt-rtx has no 8-bit head"),
    ):
        preset = ["--preset", "balanced"]
        chosen, said = options(*(preset + explicit if last else explicit + preset))
        assert (getattr(chosen, field, None) or getattr(chosen.weights, field)) == "dense"
        assert chosen.precision == "float16"
        assert f"--preset balanced: {reason}; it is float16" in said
    _, said = options("--preset", "balanced", "--backend", "tensorrt-rtx", "--lm-head", "dense")
    assert "8-bit head" not in said
    chosen, said = options("--preset", "small", "--backend", "tensorrt-rtx")
    assert (chosen.cache_type, chosen.weights.lm_head) == ("float16", "int4")
    assert "--preset small: tensorrt-rtx has no int8 cache; it is float16" in said


def test_an_unknown_preset_is_refused():
    result = CliRunner().invoke(main, ["build", "nano", "-o", "out", "--preset", "tiny"])
    assert result.exit_code == 2 and "'tiny' is not one of 'exact', 'balanced', 'small'" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_keeps_nanos_answers(call, tmp_path, name):
    """A quick variant of benchmarks/presets.py: 20 questions, and rounding to the nearest for GPTQ."""
    rounding = ["--weights", "int4-rtn"] if PRESETS[name].weights == "int4" else []
    done = call("build", "nano", "-o", tmp_path / "out", "--preset", name, *rounding, "--no-verify")
    assert done.exit_code == 0, done.output
    manifest = json.loads(call("inspect", tmp_path / "out", "--json").stdout)
    expected = PRESETS[name].options()
    assert manifest["precision"]["cache"] == expected.cache_type
    assert (manifest["quantization"] or {"lm_head": "dense"})["lm_head"] == expected.weights.lm_head
    assert (manifest["vision_quantization"] is not None) == (expected.vision_weights == "int8")
    result = json.loads(call("eval", tmp_path / "out", "--count", 20, "--json").stdout)
    assert result["exact"] >= 19


@pytest.mark.parametrize("made_before", [False, True])
def test_only_what_gptq_is_yet_to_make_counts(made_before, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise UhdError("far enough")

    monkeypatch.setattr("uhd_export.cli.build.quantize_into", stop)
    if made_before:
        (tmp_path / "out-gptq").mkdir()
    arguments = ["build", "nano", "-o", str(tmp_path / "out"), "--weights", "int4", "--no-verify"]
    said = CliRunner().invoke(main, arguments).stderr
    assert "far enough" in said and "of disk" in said
    assert ("kept as" in said) != made_before


def test_room_for_the_bundle_too_is_asked_for_before_gptq(tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError

    monkeypatch.setattr("uhd_export.cli.build.quantize_into", never)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3_000_000))
    arguments = ["build", "nano", "-o", str(tmp_path / "a" / "out"), "--weights", "int4", "--no-verify"]
    said = CliRunner().invoke(main, arguments).stderr
    assert re.search(
        r"error: output .*out: about \d+\.\d+ MB are needed but 3\.00 MB are free; make room", said
    )
