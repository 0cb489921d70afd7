"""`plan --model`, and the warning before what will not fit is loaded."""

import dataclasses
import json
import shutil

import pytest

from uhd_export.checkpoint.source import EMBEDDED
from uhd_export.cli.opening import PipelineOptions
from uhd_export.runtime.bundle.manifest import part_files, read_manifest, write_manifest
from uhd_export.runtime.choices import updates_on_gpu
from uhd_export.runtime.image.slicing import plan_slices
from uhd_export.runtime.planning.bundle import bundle_workload, fitting_bounds, largest, shortage
from uhd_export.runtime.profiling.rates import Rates


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    """A machine of 1 TFLOP/s and 10 GB/s, so that none is measured."""
    rates = Rates(1e12, 1e10, "a machine made up")
    monkeypatch.setattr("uhd_export.runtime.profiling.rates.measure_rates", lambda *_: rates)


def planned(call, *arguments):
    done = call("plan", "1008x672", "--json", *arguments)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)["answer"]


def test_parts_of_vicuna_7b(call):
    exact = planned(call, "--model", "vicuna-7b", "--memory", "64GB")
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008) * 4
    assert exact["bytes"]["language weights"] == pytest.approx(linear, rel=1e-3)
    assert exact["bytes"]["head"] == exact["bytes"]["embeddings on disk"] == 32000 * 4096 * 4
    assert exact["bytes"]["vision weights"] == pytest.approx(1.867e9, rel=0.01)  # as a built one's file
    assert exact["bytes"]["cache used"] == 2 * 32 * 4096 * 1066 * 4
    assert exact["fits"] and exact["peak"] == max(exact["stages"].values())
    assert exact["seconds"]["decode"] == pytest.approx((linear + 32000 * 4096 * 4 + 1.12e9) / 1e10, rel=0.01)


def test_what_does_not_fit_names_the_preset_that_does(call):
    exact = planned(call, "--model", "vicuna-7b", "--memory", "8GB")
    assert not exact["fits"] and exact["remedies"] == ["--preset balanced"]
    small = planned(call, "--model", "vicuna-7b", "--memory", "8GB", "--preset", "small")
    assert small["fits"] and small["disk"] < 5e9 and small["calibration"] > 3e9
    tiny = planned(call, "--model", "vicuna-7b", "--memory", "1GB", "--preset", "exact")
    assert tiny["remedies"][-1].endswith("GB more, even for --preset small")
    done = call("plan", "1008x672", "--model", "vicuna-7b", "--memory", "8GB")
    assert "does not fit into 8.00 GB; use --preset balanced" in done.stdout


def test_prefill_in_chunks_is_a_remedy_where_it_is_enough(call):
    whole = planned(call, "--model", "vicuna-7b", "--preset", "small", "--memory", "64GB")
    just_short = f"{(whole['peak'] - 10_000_000) / 1e6:.0f}MB"
    short = planned(call, "--model", "vicuna-7b", "--preset", "small", "--memory", just_short)
    assert short["remedies"][0].startswith("--prefill-chunk 128")
    given = planned(
        call, "--model", "vicuna-7b", "--preset", "small", "--memory", just_short, "--prefill-chunk", "128"
    )
    assert given["fits"] and given["prefill_chunk"] == 128


def test_a_prompt_attends_to_an_8_bit_cache_in_floats(call):
    exact, small = (planned(call, "--model", "vicuna-7b", "--preset", name) for name in ("exact", "small"))
    # Of one layer: keys and values of 1066 positions, those before the run and then all.
    more = small["bytes"]["prefill activations"] - exact["bytes"]["prefill activations"]
    assert more == pytest.approx(1.1 * 4 * 1066 * 4096 * 4, rel=0.001)


def test_a_gpu_holds_the_whole_cache_in_float16(call):
    exact = planned(call, "--model", "vicuna-7b", "--device", "h100")
    assert exact["available"] == 80e9 and exact["bytes"]["cache reserved"] == 2**31
    assert all(size > exact["bytes"]["cache reserved"] for size in exact["stages"].values())
    short = planned(call, "--model", "qwen2-7b", "--device", "rtx-4090", "--memory", "17.5GB")
    assert any(remedy.startswith("--context ") for remedy in short["remedies"])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--memory", "8GB"], "--memory: is of an answer; give --model too"),
        (["--model", "vicuna-8b"], "--model 'vicuna-8b': give vicuna-7b"),
        (["--model", "nano", "--memory", "much"], "size 'much': give bytes with a unit"),
        (["--model", "nano", "--memory", "0.5"], "size '0.5': give bytes with a unit"),
        (["--model", "nano", "--memory", "9" * 400 + "GB"], "give bytes with a unit"),
        (["--model", "nano", "--device", "h9000"], "device 'h9000': must be one of H200"),
        (["--model", "nano", "--context", "9"], "--context 9: the prompt takes 1066 positions"),
    ],
)
def test_what_is_typed_wrongly_is_one_line(fails, arguments, words):
    assert words in fails("plan", "1008x672", *arguments)


def test_of_a_checkpoint_on_the_hub_only_sizes_are_downloaded(call, monkeypatch):
    asked = []

    def download(name, patterns, revision=None):
        asked.append((name, patterns))
        return EMBEDDED

    monkeypatch.setattr("uhd_export.checkpoint.source.download", download)
    planned(call, "--model", "someone/model")
    assert asked == [("someone/model", ["*.json"])]


def test_a_bundle_is_planned_by_its_files(call, golden_bundle):
    manifest = read_manifest(golden_bundle)
    answer = planned(call, "--model", str(golden_bundle), "--grid", manifest.settings.grid_mode)
    assert answer["disk"] == sum(record.bytes for record in manifest.files.values())
    assert answer["preset"] is None and answer["context"] == manifest.settings.context


@pytest.fixture
def other_bundle(golden_bundle, tmp_path):
    """`other_bundle(**changes)`: a folder with the golden bundle's manifest and `changes`."""

    def make(**changes):
        changed = dataclasses.replace(read_manifest(golden_bundle), **changes)
        write_manifest(tmp_path, changed)
        return tmp_path

    return make


def test_a_bundle_cuts_images_as_it_was_built_to(call, golden_bundle, other_bundle):
    settings = dataclasses.replace(
        read_manifest(golden_bundle).settings,
        max_slices=4,
        grid_mode="pyramid",
        resize=500,
        upscale_only=True,
    )
    folder = str(other_bundle(settings=settings))

    def facts(*typed):
        return json.loads(call("plan", "1008x672", "--json", "--model", folder, *typed).stdout)

    whole = plan_slices((1008, 672), max_slices=4, resize=500, upscale_only=True)
    assert facts()["slice_grid"] == list(whole.slice_grid) and facts()["resized_size"] == [1008, 672]
    assert facts()["crops"][0]["keys_per_window"] != facts("--grid", "fix")["crops"][0]["keys_per_window"]
    assert facts("--max-slices", "1")["slice_grid"] is None


def test_a_context_over_the_models_is_refused(fails, golden_bundle):
    most = read_manifest(golden_bundle).settings.context
    arguments = ("plan", "1008x672", "--model")
    line = fails(*arguments, golden_bundle, "--context", most + 1)
    assert f"--context {most + 1}: {golden_bundle} has {most} positions" in line
    assert "vicuna-7b has 4096 positions" in fails(*arguments, "vicuna-7b", "--context", 5000)


def test_weights_in_4_bits_are_planned_as_build_writes_them(call, tmp_path):
    folder = tmp_path / "gptq"
    shutil.copytree(EMBEDDED, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"bits": 4}}))
    dense = planned(call, "--model", "nano")
    for source in (folder, folder / "config.json"):
        packed = planned(call, "--model", source)
        assert packed["preset"] is None and "calibration" not in packed
        assert packed["bytes"]["language weights"] < dense["bytes"]["language weights"] / 3
        assert packed["bytes"]["vision weights"] == dense["bytes"]["vision weights"]
    assert "calibration" not in planned(call, "--model", folder, "--preset", "small")


def test_what_is_built_for_a_gpu_is_said_with_its_options(call, fails, golden_bundle, other_bundle):
    small = ("--model", "vicuna-7b", "--preset", "small", "--device", "rtx-4090")
    assert planned(call, *small)["build"] == "--preset small --dtype float16 --cache float16"
    assert "as built with --preset small --dtype float16" in call("plan", "1008x672", *small).stdout
    short = planned(call, "--model", "vicuna-7b", "--device", "rtx-4090", "--memory", "8GB")
    assert "--preset balanced --dtype float16 --cache float16" in short["remedies"]
    line = fails("plan", "1008x672", "--model", golden_bundle, "--device", "rtx-4090")
    assert "no kernel for its float32 cache" in line and "--dtype float16 --cache float16" in line
    engines = other_bundle(backend="tensorrt", files=with_engines(read_manifest(golden_bundle)))
    assert "is for tensorrt; give --device" in fails("plan", "1008x672", "--model", engines)


def with_engines(manifest):
    """Its files, and those of TensorRT's parts."""
    record = manifest.files[part_files("onnxruntime")[0]]
    return {**manifest.files, **dict.fromkeys(part_files("tensorrt"), record)}


@pytest.mark.parametrize(
    "cache, activations, runs",
    [
        ("float16", "float32", True),
        ("int8", "float16", True),
        ("int8", "float32", False),
        ("float32", "float32", False),
    ],
)
def test_caches_that_a_gpu_updates(cache, activations, runs):
    assert updates_on_gpu(cache, activations) is runs


def test_remedies_say_something_that_helps(call, golden_bundle):
    model = ("--model", "vicuna-7b", "--preset", "small")
    whole = planned(call, *model, "--memory", "64GB")
    chunk = planned(call, *model, "--prefill-chunk", "5000", "--memory", f"{whole['peak'] + 1}B")
    assert not chunk["fits"] and chunk["remedies"][0] == "no --prefill-chunk"
    bundle = planned(call, "--model", golden_bundle, "--memory", "50MB")
    assert bundle["remedies"] == ["0.1 GB more", "a bundle of a smaller --preset"]


def test_a_warning_comes_before_anything_is_loaded(golden_bundle, monkeypatch, capsys):
    manifest = read_manifest(golden_bundle)
    assert shortage(manifest, "cpu", available=64 << 30) is None
    monkeypatch.setattr("uhd_export.runtime.planning.bundle.available_memory", lambda: 50 << 20)
    PipelineOptions().warn(golden_bundle)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: memory: an answer about a large image takes 0.")
    assert line.endswith(" GB are available; use 0.1 GB more or a bundle of a smaller --preset")


def test_a_comparison_warns_of_each_bundle(call, golden_bundle, monkeypatch):
    monkeypatch.setattr("uhd_export.runtime.planning.bundle.available_memory", lambda: 170_000_000)
    short = ("--repeats", 1, "--tokens", 1, "--size", "200x200", "--grid", "fix", "--threads", 1)
    done = call("profile", "--compare", golden_bundle, golden_bundle, *short)
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: memory: ")]
    assert done.exit_code == 0 and len(warnings) == 2, done.stderr
    assert "--max-slices" not in done.stderr  # which profile has not


def test_fewer_slices_are_a_remedy_where_they_are_enough(golden_bundle):
    manifest = read_manifest(golden_bundle)
    one = dataclasses.replace(manifest.settings, max_slices=1)
    alone = bundle_workload(manifest, largest(one), "cpu", settings=one).fitted(0).peak
    assert alone < bundle_workload(manifest, largest(manifest.settings), "cpu").fitted(0).peak
    assert shortage(manifest, "cpu", available=alone).endswith(", or --max-slices 1")
    assert "--max-slices" not in shortage(manifest, "cpu", available=alone, slicing=False)
    assert "--max-slices" not in shortage(manifest, "cpu", available=alone - 1)
    assert shortage(manifest, "cpu", settings=one, available=alone) is None


@pytest.mark.parametrize("most", [1, 4, 9, 16])
def test_the_largest_image_takes_all_slices(golden_bundle, most):
    manifest = read_manifest(golden_bundle)
    settings = dataclasses.replace(manifest.settings, max_slices=most)
    work = bundle_workload(manifest, largest(settings), "cpu", settings=settings)
    assert len(work.slices.crop_sizes) == (most + 1 if most > 1 else 1)


def test_bounds_tighten_as_memory_gets_short(golden_bundle):
    manifest = read_manifest(golden_bundle)
    wide = fitting_bounds(manifest, "cpu", manifest.settings, None, available=64 << 30)
    tight = fitting_bounds(manifest, "cpu", manifest.settings, None, available=1)
    assert (wide.rows, wide.chunk) == (1200, 256) and (tight.rows, tight.chunk) == (0, 64)
    engines = dataclasses.replace(manifest, backend="tensorrt")
    assert fitting_bounds(engines, "cuda", manifest.settings, None, available=1).rows is None


def test_a_path_is_no_markup(call, golden_bundle, tmp_path):
    shutil.copytree(golden_bundle, tmp_path / "a[" / "b]")
    done = call("plan", "100x100", "--model", tmp_path / "a[" / "b]", "--memory", "8GB")
    assert f"an answer of {tmp_path}/a[/b]" in done.stdout, done.output
