"""Bundles with int4 language models: what is chosen, that they hold the exact integers, and their reports."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from safetensors.torch import load_file, save_file
from support.options import build_options

from uhd_export.bundle.build import build_bundle
from uhd_export.bundle.check import check_bundle
from uhd_export.calibration.options import CalibrationOptions, GptqOptions, QuantizeOptions
from uhd_export.checkpoint.config import read_config
from uhd_export.checkpoint.int4.gptq import open_checkpoint
from uhd_export.checkpoint.int4.linears import linear_shapes
from uhd_export.checkpoint.int4.weight import QuantizedWeight, round_to_nearest
from uhd_export.checkpoint.int4.words import pack_gptq
from uhd_export.checkpoint.options import SourceOptions
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.cli.main import main
from uhd_export.graph.int4.choose import resolve
from uhd_export.graph.int4.options import WeightOptions
from uhd_export.graph.int4.view import as_stored
from uhd_export.runtime.bundle.manifest import QUALITY, STORED, FileRecord, read_manifest
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.terminal.quality_report import print_quality


@pytest.fixture(scope="module")
def plain(spoken_checkpoint):
    return spoken_checkpoint


def _config(folder):
    return read_config(folder, SourceOptions(vision_tower=folder / "clip"))


def _gptq(plain, folder, *, form="gptq", symmetric=True, ordered=False):
    """The checkpoint with its linear layers in GPTQ's format."""
    folder.mkdir()
    for name in ("tokenizer.json", "clip"):
        (folder / name).symlink_to(plain / name)
    tensors = load_file(plain / "model.safetensors")
    rng = np.random.default_rng(0)
    for name in linear_shapes(_config(plain).language):
        weight = round_to_nearest(tensors.pop(f"{name}.weight").float().numpy(), 64, symmetric=symmetric)
        if ordered:
            order = np.argsort(rng.permutation(weight.codes.shape[1]) // 64, kind="stable")
            weight = QuantizedWeight(weight.codes, weight.scales, weight.zeros, 4, order)
        tensors |= {f"{name}.{part}": torch.from_numpy(a) for part, a in pack_gptq(weight, form).items()}
    save_file(tensors, folder / "model.safetensors")
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": symmetric, "desc_act": ordered}
    raw = json.loads((plain / "config.json").read_text())
    raw["mm_vision_tower"] = "clip"
    raw["quantization_config"] = settings | {"checkpoint_format": form}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def _parity(manifest):
    return {entry.part: entry.value for entry in manifest.parity if entry.against == STORED}


@pytest.mark.slow
@pytest.mark.parametrize(
    "made",
    [{}, {"form": "gptq_v2", "symmetric": False}, {"ordered": True}],
    ids=["v1", "v2 asymmetric", "act-order"],
)
def test_a_gptq_checkpoint_is_built_bit_for_bit(plain, tmp_path, made):
    source = _gptq(plain, tmp_path / "gptq", **made)
    manifest = build_bundle(source, tmp_path / "out", options=build_options(activations="float"))
    record = manifest.quantization
    assert (record.method, record.group, record.lm_head) == ("gptq", 64, "int8")
    assert record.symmetric == made.get("symmetric", True)
    assert record.act_order == made.get("ordered", False)
    assert _parity(manifest)["logits"] < 1e-5
    assert read_manifest(tmp_path / "out") == manifest


@pytest.mark.slow
def test_rounded_weights_and_head_are_held_to_their_integers(plain, tmp_path):
    out = tmp_path / "out"
    manifest = build_bundle(
        plain,
        out,
        options=build_options(
            vision_tower=plain / "clip", weights="int4-rtn", group=32, lm_head="int8", activations="float"
        ),
    )
    assert manifest.quantization.method == "rtn"
    assert _parity(manifest)["logits"] < 1e-5
    dense = 4 * sum(n * k for n, k in linear_shapes(_config(plain).language).values())
    stored = manifest.files["language.onnx.data"].bytes
    assert stored < dense / 4 + 32000 * 256 * 1.2 + 2 * 4096 * 64 * 4 + 2e6
    assert check_bundle(out, checkpoint=plain).ok


@pytest.mark.slow
@pytest.mark.parametrize("head", ["int8", "int4"])
def test_the_head_of_a_tied_model_is_rounded_and_its_embeddings_are_not(plain, tmp_path, head):
    folder, out = tmp_path / "tied", tmp_path / "out"
    folder.mkdir()
    for name in ("tokenizer.json", "clip"):
        (folder / name).symlink_to(plain / name)
    tensors = load_file(plain / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    raw = json.loads((plain / "config.json").read_text())
    raw |= {"mm_vision_tower": "clip", "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(raw))
    manifest = build_bundle(folder, out, options=build_options(lm_head=head, activations="float"))
    assert _parity(manifest)["logits"] < 1e-5
    table = tensors["model.embed_tokens.weight"].float().numpy()
    np.testing.assert_array_equal(np.load(out / "embeddings.npy"), table)


@pytest.mark.slow
def test_int8_activations_have_a_wider_limit(plain, tmp_path):
    options = build_options(vision_tower=plain / "clip", weights="int4-rtn")
    manifest = build_bundle(plain, tmp_path / "out", options=options)
    assert manifest.quantization.group == 64
    (logits,) = (entry for entry in manifest.parity if (entry.part, entry.against) == ("logits", STORED))
    assert 1e-3 < logits.value < logits.limit == 0.1


def test_what_is_chosen(plain, tmp_path):
    config = _config(plain).language
    dense, gptq = open_checkpoint(plain), open_checkpoint(_gptq(plain, tmp_path / "gptq"))
    assert resolve(dense, config, WeightOptions()) is None
    assert resolve(gptq, config, WeightOptions("dense")) is None
    assert resolve(gptq, config, WeightOptions()).method == "gptq"
    head = resolve(dense, config, WeightOptions(lm_head="int4"))
    assert (head.method, head.lm_head) == (None, "int4")
    view = as_stored(dense, config, head)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(view.tensor(name), dense.tensor(name))
    assert not torch.equal(
        view.tensor("lm_head.weight", torch.float32), dense.tensor("lm_head.weight", torch.float32)
    )
    for checkpoint, options, message in (
        (dense, WeightOptions("int4"), "not quantized; make a GPTQ checkpoint with `uhd-export quantize`"),
        (gptq, WeightOptions("int4-rtn"), "is quantized already"),
        (gptq, WeightOptions("int4", 32), "the checkpoint's own groups are kept"),
        (dense, WeightOptions("int4-rtn", 48), "group size 48"),
        (dense, WeightOptions(group=32), "group size 32: is for --weights int4 and int4-rtn"),
    ):
        with pytest.raises(UhdError, match=message):
            resolve(checkpoint, config, options)


@pytest.mark.parametrize("option", ["weights", "lm_head", "activations"])
def test_options_out_of_range_are_named(option):
    with pytest.raises(UhdError, match=f"{option} 'int3': must be one of"):
        WeightOptions(**{option: "int3"})


REPORT = {
    "settings": {"gptq": {"group": 32}},
    "calibration_tokens": 1000,
    "held_out_tokens": 100,
    "bytes_before": 4000,
    "bytes_after": 1000,
    "mean_rtn_error": 8e-3,
    "mean_gptq_error": 4e-3,
    "rtn": {"kl": 0.2, "agreement": 0.75, "tokens": 32},
    "gptq": {"kl": 0.1, "agreement": 0.875, "tokens": 32},
    "accuracy": {"questions": 20, "exact": {"before": 20, "rtn": 18, "gptq": 19}},
    "fallbacks": ["q_proj: its statistics could not be factorised"],
    "linears": [
        {"layer": i, "module": "mlp.up_proj", "samples": 9, "rtn_error": 8e-3, "gptq_error": i * 1e-3}
        for i in range(9)
    ],
}


def test_the_quality_report_goes_along_and_is_printed(plain, tmp_path):
    source = _gptq(plain, tmp_path / "gptq")
    (source / QUALITY).write_text(json.dumps(REPORT))
    manifest = build_bundle(source, tmp_path / "out", verify=False)
    assert QUALITY in manifest.files
    console = Console(width=200, record=True, quiet=False)
    print_quality(tmp_path / "out", manifest, console)
    text = console.export_text()
    assert "rounded to nearest 8.00e-03, GPTQ 4.00e-03 (50% less)" in text
    assert "KL divergence 1.00e-01, same likeliest token at 87.5% of 32" in text
    assert "before 100.0%, rtn 90.0%, gptq 95.0%" in text
    assert text.index("layers.8.mlp.up_proj") < text.index("layers.4.mlp.up_proj")
    assert "layers.3." not in text
    assert "rounded instead of GPTQ: q_proj: its statistics could not be factorised" in text
    (tmp_path / "out" / QUALITY).write_text("{}")
    with pytest.raises(UhdError, match="not a quality report"):
        print_quality(tmp_path / "out", manifest, console)
    manifest.files.clear()
    manifest.files["x"] = FileRecord(0, "")
    print_quality(tmp_path / "out", manifest, console)


@pytest.fixture
def calibrated(monkeypatch):
    """What `build` would have quantized: source, output, settings."""
    calls = []
    target = "uhd_export.cli.build.quantize_into"
    monkeypatch.setattr(target, lambda *arguments, **rest: calls.append((*arguments, rest)))
    return calls


def _build(*arguments):
    return CliRunner().invoke(main, ["build", *map(str, arguments)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--activations", "int3"], "'--activations': 'int3' is not one of"),
        (["--lm-head", "int3"], "'--lm-head': 'int3' is not one of"),
        (["--dtype", "int3"], "'--dtype': 'int3' is not one of"),
        (["--backend", "none"], "'--backend': 'none' is not one of"),
        (["--grid", "none"], "'--grid': 'none' is not one of"),
        (["--context", "99999"], "context: 99999 positions"),
        (["--context", "10"], "--context 10: "),
        (["--force"], "exists and is no bundle"),
        ([], "exists already"),
    ],
)
def test_a_build_that_cannot_be_is_refused_before_anything_is_quantized(
    plain, tmp_path, calibrated, options, message
):
    (tmp_path / "out").mkdir()
    if message.startswith("exists"):
        (tmp_path / "out" / "file").touch()
    result = _build(
        plain, "-o", tmp_path / "out", "--weights", "int4", "--vision-tower", plain / "clip", *options
    )
    assert (result.exit_code, calibrated) == (2, [])
    assert message in result.output
    assert result.output.count("\n") == 1


@pytest.mark.parametrize("eight", [("--vision-weights", "int8"), ("--cache", "int8")])
def test_data_that_8_bits_cannot_be_calibrated_on_is_refused_before_anything_is_quantized(
    tmp_path, calibrated, eight
):
    data = tmp_path / "text.jsonl"
    data.write_text('{"image": null, "question": "What is two and two?", "answer": "4"}\n')
    result = _build("nano", "-o", tmp_path / "out", "--weights", "int4", "--data", data, *eight)
    assert f"{data}: holds no image to calibrate on" in result.output
    assert calibrated == []


def test_the_cost_of_what_is_yet_to_be_quantized_is_of_the_groups_asked_for(tmp_path, calibrated):
    told = [
        _build("nano", "-o", tmp_path / "out", "--weights", "int4", "--group-size", group).output
        for group in (32, 64)
    ]
    weights, tables = 3 * (4 * 128**2 + 3 * 128 * 384), 4096 * 32 * 4
    for text, group in zip(told, (32, 64), strict=True):
        size = tables + weights // 2 + weights // group * 4
        assert f"weights {size / 1e3:.1f} kB" in text
    assert len(calibrated) == 2


def test_build_quantizes_what_is_not_quantized(plain, tmp_path, calibrated):
    gptq, out = _gptq(plain, tmp_path / "gptq"), tmp_path / "out"
    result = _build(
        plain, "-o", out, "--weights", "int4", "--vision-tower", plain / "clip", "--group-size", "64"
    )
    assert "out-gptq: holds no safetensors file" in result.output  # nothing has made it
    ((source, folder, options, rest),) = calibrated
    assert (source, folder, rest) == (str(plain), tmp_path / "out-gptq", {"reuse": True})
    reading = SourceOptions(vision_tower=str(plain / "clip"))
    assert options == QuantizeOptions(reading=reading, gptq=GptqOptions(group=64))
    _build("nano", "-o", out, "--weights", "int4")
    assert calibrated[1][2].calibration.questions == 50
    result = _build(gptq, "-o", out, "--weights", "int4", "--no-verify")
    assert (result.exit_code, len(calibrated)) == (0, 2)


@pytest.mark.parametrize("option", ["--data", "--samples", "--length", "--seed", "--eval"])
def test_options_of_calibration_are_refused_where_nothing_is_calibrated(plain, tmp_path, option):
    out = tmp_path / "out"
    for weights in ("auto", "dense", "int4-rtn"):
        result = _build(plain, "-o", out, "--weights", weights, option, 32)
        expected = f"{option}: is for calibration; give it with --weights int4, --vision-weights int8 or "
        assert expected in result.output
    result = _build(_gptq(plain, tmp_path / "gptq"), "-o", out, "--weights", "int4", option, 32)
    assert f"{option}: checkpoint {tmp_path}/gptq is quantized already" in result.output
    assert not out.exists()


@pytest.mark.parametrize("option", ["--samples", "--length", "--eval"])
def test_options_of_gptq_alone_are_refused_where_8_bits_are_calibrated(plain, tmp_path, option):
    for rounded in (("--vision-weights", "int8"), ("--cache", "int8")):
        result = _build(plain, "-o", tmp_path / "out", *rounded, option, 32)
        assert result.output.endswith(f"{option}: is for calibration; give it with --weights int4\n")
    gptq = _gptq(plain, tmp_path / "gptq")
    result = _build(gptq, "-o", tmp_path / "out", "--weights", "int4", "--cache", "int8", option, 32)
    assert f"{option}: checkpoint {gptq} is quantized already" in result.output


def test_questions_may_be_counted_wherever_nano_is_rounded(tmp_path, monkeypatch):
    asked = []

    class Stop(Exception):
        pass

    def stop(*arguments, options, **rest):
        asked.append(options.questions)
        raise Stop

    monkeypatch.setattr("uhd_export.bundle.build.build_bundle", stop)
    for rounded in (
        ("--weights", "int4-rtn"),
        ("--lm-head", "int8"),
        ("--vision-weights", "int8"),
        ("--cache", "int8"),
        ("--dtype", "float16"),
    ):
        _build("nano", "-o", tmp_path / "out", *rounded, "--eval", 5)
    assert asked == [5] * 5
    assert "--eval: is for calibration" in _build("nano", "-o", tmp_path / "out", "--eval", 5).output


def test_options_that_would_change_nothing_are_refused(plain, tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(
        "uhd_export.bundle.build.build_bundle", lambda *arguments, options, **rest: built.append(options)
    )
    gptq, out = _gptq(plain, tmp_path / "gptq"), tmp_path / "out"

    def build(source, *options):
        return _build(source, "-o", out, *options).output

    activations = "--activations", "float"
    for given in ((), ("--weights", "dense"), ("--cache", "int8")):
        assert "--activations: is for integer weights" in build(plain, *activations, *given)
    assert "--activations: is for integer weights" in build(gptq, *activations, "--weights", "dense")
    engines = "--backend", "tensorrt-rtx", "--weights", "int4-rtn"
    assert "--activations: is for --backend onnxruntime" in build(plain, *activations, *engines)
    rounded = "--weights", "int4-rtn", "--eval", 5
    assert "--eval: is asked where parity is measured" in build("nano", *rounded, "--no-verify")
    assert built == []
    build(gptq, *activations)
    build(plain, *activations, "--lm-head", "int4")
    build(plain, *activations, "--weights", "int4-rtn")
    build("nano", *rounded)
    build("nano", "--weights", "int4", "--eval", 5, "--no-verify")  # of GPTQ's models
    assert len(built) == 5


def test_the_folder_one_is_in_may_be_the_output(tmp_path, monkeypatch, calibrated):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    _build("nano", "-o", ".", "--weights", "int4")
    assert calibrated[0][1] == tmp_path / "out-gptq"


def test_the_next_command_repeats_what_the_checkpoint_does_not_hold(tmp_path, monkeypatch):
    report = SimpleNamespace(to_json=dict)
    monkeypatch.setattr("uhd_export.calibration.quantize.quantize", lambda *arguments, **options: report)
    monkeypatch.setattr("uhd_export.runtime.terminal.quality_report.summary_lines", lambda report: ())
    given = ["--layout", "merged", "--mask", "5", "--vision-tower", "a b", "--grid", "fix", "--seed", "3"]
    result = CliRunner().invoke(main, ["quantize", "nano", "-o", "out", "--config", "c.json", *given])
    again = "--vision-tower 'a b' --layout merged --mask 5 --grid fix"
    assert f"`uhd-export build out -o BUNDLE {again}` builds it" in result.output
    result = CliRunner().invoke(main, ["quantize", "nano", "-o", "out"])
    assert "`uhd-export build out -o BUNDLE` builds it" in result.output


def test_the_language_part_of_a_quantized_folder_takes_few_options(plain, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "uhd_export.calibration.language_part.extract_language",
        lambda *arguments, **options: seen.append((arguments, options)),
    )
    gptq, out = _gptq(plain, tmp_path / "gptq"), tmp_path / "out"
    command = ["quantize", str(gptq), "-o", str(out), "--language-only"]
    for option in (["--samples", "9"], ["--asym"], ["--layout", "flat"], ["--max-slices", "2"]):
        result = CliRunner().invoke(main, [*command, *option])
        assert f"{option[0]}: checkpoint {gptq} is quantized already; leave it out" in result.output
    assert seen == []
    result = CliRunner().invoke(main, [*command, "--config", "c.json"])
    assert (result.exit_code, seen) == (0, [((gptq, out), {"config": "c.json", "progress": True})])


def test_the_command_passes_its_options_on(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("uhd_export.cli.quantize.quantize_into", lambda *arguments: seen.append(arguments))
    arguments = [
        "nano",
        "-o",
        str(tmp_path / "out"),
        "--group-size",
        "64",
        "--asym",
        "--samples",
        "9",
        "--eval",
        "3",
    ]
    result = CliRunner().invoke(main, ["quantize", *arguments])
    assert result.exit_code == 0, result.output
    (source, output, options) = seen[0]
    assert (source, output) == ("nano", tmp_path / "out")
    assert options.gptq == GptqOptions(group=64, symmetric=False)
    assert options.calibration == CalibrationOptions(samples=9, questions=3)


def test_a_plain_checkpoint_stays_plain(plain):
    assert type(open_checkpoint(plain)) is Checkpoint
