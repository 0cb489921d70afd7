"""What a build says that it takes, beside what it took."""

import re
from types import SimpleNamespace

import pytest

from uhd_export.bundle.build import build_bundle
from uhd_export.bundle.cost import cost_lines, estimate_cost, loss_line
from uhd_export.bundle.options import BuildOptions
from uhd_export.bundle.presets import PRESETS, measured
from uhd_export.bundle.stages import GPTQ, IMAGES, Sizes, build_units, expected_seconds, gptq_units
from uhd_export.checkpoint.config import parse_config
from uhd_export.checkpoint.vision_tower import KNOWN_TOWERS
from uhd_export.graph.int4.options import WeightOptions
from uhd_export.runtime import progress
from uhd_export.runtime.bundle.manifest import Quantization

TOWER = "openai/clip-vit-large-patch14-336"
VICUNA_7B = {
    "model_type": "llava_llama",
    "model_mode": "uhd_v2",
    "mm_projector_type": "adapt_spatial_resampler_v2",
    "mm_vision_tower": TOWER,
    "mm_hidden_size": 1024,
    "feature_scale_mask": 7,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "num_hidden_layers": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32000,
}


def predicted(options, head, quantizing=False, verify=False):
    config = parse_config(VICUNA_7B, KNOWN_TOWERS[TOWER])
    return estimate_cost(
        config,
        options,
        Quantization("rtn", 128, True, False, head, "int8"),
        quantizing=quantizing,
        verify=verify,
    )


def test_sizes_of_a_model_of_vicunas_size_are_those_that_were_measured():
    """In MB: 4-bit layers and a dense head, float32 vision; 8-bit vision, a 4-bit head."""
    cost = predicted(BuildOptions(), "dense")
    assert cost.parts["weights"] + cost.parts["head"] == pytest.approx(3968e6, rel=0.02)
    assert cost.parts["vision"] == pytest.approx(1867e6, rel=0.02)
    assert cost.parts["embeddings"] == 32000 * 4096 * 2
    small = predicted(PRESETS["small"].options(), "int4", quantizing=True)
    assert small.parts["vision"] == pytest.approx(688e6, rel=0.01)
    assert small.bundle == pytest.approx(4468e6, rel=0.01)
    assert small.staging == small.bundle + cost.parts["vision"]  # what is calibrated on is float32
    first, second, _ = cost_lines(small, PRESETS["small"].options(), 3600.0, "out-gptq")
    assert first.startswith("about 4.") and "head 69.63 MB, embeddings 262.14 MB, vision" in first
    said = re.search(r"GB of it kept as out-gptq; takes about (\d+) minutes on a 2-core CPU", second)
    assert said is not None and int(said[1]) == pytest.approx(66, abs=3)  # rates are measured anew at times


def test_the_prediction_is_what_a_bundle_becomes(tmp_path):
    costs = []
    options = BuildOptions(weights=WeightOptions("int4-rtn"), vision_weights="int8")
    manifest = build_bundle("nano", tmp_path / "out", options=options, verify=False, on_cost=costs.append)
    sizes = {name: record.bytes for name, record in manifest.files.items()}
    (cost,) = costs
    assert cost.parts["weights"] + cost.parts["head"] == pytest.approx(sizes["language.onnx.data"], rel=0.1)
    assert cost.parts["embeddings"] == pytest.approx(sizes["embeddings.npy"], rel=0.01)
    assert cost.parts["vision"] < sizes["vision.onnx.data"] < 3 * cost.parts["vision"]
    assert cost.checkpoint == 0


def test_integers_that_a_checkpoint_has_are_counted_in_its_own_bits_and_groups():
    bits = {"mlp.down_proj": 8, "self_attn.o_proj": None}  # None is not quantized

    def own(name):
        return bits.get(name.partition(".layers.")[2].partition(".")[2], 4)

    gptq = SimpleNamespace(is_quantized=lambda name: own(name) is not None, bits=own, group=lambda name: 64)
    config = parse_config(VICUNA_7B, KNOWN_TOWERS[TOWER])
    kept = Quantization("gptq", 64, True, False, "dense", "int8")
    cost = estimate_cost(config, BuildOptions(), kept, quantizing=False, verify=False, gptq=gptq)
    square, wide, tables = 4096**2, 4096 * 11008, 4096 * 128 * 4
    four, eight = 1 / 2 + 4 / 64, 1 + 4 / 64
    layer = 3 * square * four + square * 4 + 2 * wide * four + wide * eight
    assert cost.parts["weights"] == tables + 32 * layer
    assert cost_lines(cost, BuildOptions(), 0.0, "")[-1].endswith(
        "not measured: the checkpoint was quantized before"
    )
    assert cost.parts["head"] == 32000 * 4096 * four  # as the checkpoint has it, where none is asked for


def test_rotary_tables_are_as_long_as_the_context_asked_for():
    whole, short = (predicted(BuildOptions(context=context), "dense").parts for context in (None, 1024))
    assert whole["weights"] - short["weights"] == (4096 - 1024) * 128 * 4


@pytest.mark.slow
def test_the_stages_foreseen_are_those_that_come(tmp_path, monkeypatch):
    begun, costs, begin = [], [], progress._Overall.begin
    monkeypatch.setattr(
        progress._Overall, "begin", lambda bar, stage: (begun.append(stage), begin(bar, stage))
    )
    options = BuildOptions(weights=WeightOptions("int4-rtn"), vision_weights="int8", cache="int8")
    with progress.overall_bar("build"):
        build_bundle("nano", tmp_path / "out", options=options, on_cost=costs.append, progress=True)
    assert list(dict.fromkeys(begun)) == list(costs[0].seconds)
    assert all(seconds > 0 for seconds in costs[0].seconds.values())


def test_questions_are_a_part_of_parity():
    costs = [
        predicted(BuildOptions(questions=questions), "int8", verify=True).seconds["parity"]
        for questions in (0, 20)
    ]
    assert costs[1] - costs[0] == pytest.approx(20 * measured()["rates"]["seconds"]["asking"][1])


@pytest.mark.parametrize("given", [{"dtype": "float16"}, {"cache": "int8"}, {"vision_weights": "int8"}])
def test_questions_are_a_part_of_parity_where_weights_are_not_rounded(given):
    """And that their loss is measured is said."""
    config = parse_config(VICUNA_7B, KNOWN_TOWERS[TOWER])
    costs = [
        estimate_cost(config, BuildOptions(questions=questions, **given), None, quantizing=False, verify=True)
        for questions in (0, 20)
    ]
    assert all(cost.rounded for cost in costs)
    assert costs[1].seconds["parity"] > costs[0].seconds["parity"]


def test_every_stage_has_a_rate():
    sizes = Sizes(1000, 2000, 300)
    for backend in ("onnxruntime", "tensorrt-rtx"):
        units = build_units(sizes, int8_vision=True, int8_cache=True, verify=True, backend=backend)
        assert min(expected_seconds(units).values()) > 0
    whole, rest = (
        expected_seconds(gptq_units(sizes, images=images, samples=8, share=share, questions=20))
        for images, share in ((8, 1.0), (0, 0.25))
    )
    assert min(whole.values()) > 0 and set(whole) - set(rest) == {IMAGES}
    assert rest[GPTQ] == pytest.approx(whole[GPTQ] / 4)


def test_the_loss_said_is_that_of_the_preset_with_the_same_options(monkeypatch):
    rows = {name: {"questions": 200, "exact": 197 - index} for index, name in enumerate(PRESETS)}
    monkeypatch.setattr("uhd_export.bundle.cost.measured", lambda: {"presets": rows})
    for name, preset in PRESETS.items():
        answers = f"{rows[name]['exact']} of 200 answers exact, 197 in float32"
        assert loss_line(preset.options()) == f"{name} on the embedded model: {answers}"
    other = BuildOptions(weights=WeightOptions("int4-rtn"))
    rows.pop("small")
    for options in (other, PRESETS["small"].options()):
        assert loss_line(options) == "what these options lose is measured at the end, unless --no-verify"


def test_presets_keep_what_they_promise():
    """At most one point of accuracy for balanced, two for small; each smaller than the one before."""
    rows = measured()["presets"]
    assert rows.keys() == PRESETS.keys(), "python benchmarks/presets.py measures them"
    share = {name: row["exact"] / row["questions"] for name, row in rows.items()}
    assert share["balanced"] >= share["exact"] - 0.01
    assert share["small"] >= share["exact"] - 0.02
    sizes = [sum(rows[name]["bytes"].values()) for name in PRESETS]
    assert sizes == sorted(sizes, reverse=True)
