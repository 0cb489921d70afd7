"""GPTQ checkpoints as other tools leave them, layer by layer, and what is refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.refusals import one_line_error

from uhd_export.checkpoint.int4.gptq import open_checkpoint
from uhd_export.checkpoint.int4.settings import is_quantized

SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
K, N = 96, 32


def pack(seed, bits=4, group=32, sym=True, v2=False, g_idx=True):
    """A layer's tensors, packed one value at a time, and the weight they mean."""
    rng = np.random.default_rng(seed)
    per, top = 32 // bits, 1 << bits
    of_group = np.arange(K) // (group if group > 0 else K)
    groups = int(of_group[-1]) + 1
    codes = rng.integers(0, top, (K, N))
    zeros = np.full((groups, N), top // 2) if sym else rng.integers(1, top, (groups, N))
    scales = (rng.random((groups, N)) / 32 + 1e-3).astype(np.float16)
    qweight, qzeros = np.zeros((K // per, N), np.uint64), np.zeros((groups, N // per), np.uint64)
    for i in range(per):
        shift = np.uint64(bits * i)
        qweight |= codes[i::per].astype(np.uint64) << shift
        qzeros |= (zeros[:, i::per] - (not v2)).astype(np.uint64) << shift
    tensors = {"qweight": qweight.astype(np.uint32).view(np.int32), "scales": scales}
    tensors["qzeros"] = qzeros.astype(np.uint32).view(np.int32)
    if g_idx:
        tensors["g_idx"] = of_group.astype(np.int32)
    weight = (codes - zeros[of_group]).T * scales[of_group].astype(np.float32).T
    return tensors, weight.astype(np.float32)


def write(folder, settings, **layers):
    named = ((f"{name}.{part}", a) for name, parts in layers.items() for part, a in parts.items())
    tensors = {name: torch.from_numpy(array) for name, array in named}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    return folder


@pytest.mark.parametrize(
    "settings, layout",
    [
        ({}, {}),
        ({"bits": 8}, {"bits": 8}),
        ({}, {"bits": 8}),  # the tensors tell
        ({"group_size": -1}, {"group": -1}),
        ({"group_size": 64}, {"group": 64}),  # the last group is half as large
        ({"group_size": 64}, {"group": 64, "g_idx": False}),
        ({"group_size": 128}, {"group": -1, "g_idx": False}),  # larger than the layer
        ({"sym": False}, {"sym": False, "g_idx": False}),
        ({"sym": False, "bits": 8}, {"sym": False, "bits": 8}),
        ({"checkpoint_format": "gptq_v2"}, {"v2": True}),
        ({"checkpoint_format": "gptq_v2", "sym": False}, {"v2": True, "sym": False}),
        ({"dynamic": {"+:.*own": {"bits": 8}}}, {"bits": 8}),
        ({"dynamic": {".*own": {"group_size": 64}}}, {"group": 64}),
        ({"dynamic": {".*own": {"group_size": 64}}}, {"group": 64, "g_idx": False}),
        ({"dynamic": {"+:own": {"sym": False}}}, {"sym": False}),
        ({"dynamic": {"-:.*other": {}, "own": {"sym": False, "bits": 8}}}, {"sym": False, "bits": 8}),
        ({"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}, {}),
        ({"quant_method": "intel/auto-round", "backend": "auto_round:gptq"}, {}),
    ],
)
def test_every_layer_is_read_as_its_tensors_are(tmp_path, settings, layout):
    own, expected = pack(1, **layout)
    alike = {} if "dynamic" in settings else {k: v for k, v in layout.items() if k in ("sym", "v2")}
    beside, other = pack(2, **alike)
    checkpoint = open_checkpoint(write(tmp_path, SETTINGS | settings, own=own, beside=beside))
    for name, weight in (("own", expected), ("beside", other)):
        assert checkpoint.shape(f"{name}.weight") == (N, K)
        np.testing.assert_array_equal(checkpoint.tensor(f"{name}.weight").numpy(), weight)
    assert checkpoint.bits("own") == layout.get("bits", 4)
    assert checkpoint.symmetric("own") == layout.get("sym", True)
    assert checkpoint.quantized("own").group == checkpoint.group("own")
    assert is_quantized(tmp_path)


BITSANDBYTES = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FOREIGN = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    "AutoAWQ": {"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"},
    "bitsandbytes": {"quant_method": "bitsandbytes", **BITSANDBYTES},
    "old bitsandbytes": BITSANDBYTES,
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "torchao": {"quant_method": "torchao", "quant_type": "int4_weight_only"},
    "fp8": {"quant_method": "fp8"},
    "auto-round": {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_awq"},
    "list": {"quant_method": ["gptq"]},
    "three bits": {**SETTINGS, "bits": 3},
    "text": {**SETTINGS, "bits": "4"},
    "bool": {**SETTINGS, "bits": True},
    "marlin": {**SETTINGS, "checkpoint_format": "marlin"},
    "old marlin": {**SETTINGS, "is_marlin_format": True},
    "group": {**SETTINGS, "group_size": "32"},
    "sym": {**SETTINGS, "sym": "yes"},
    "dynamic": {**SETTINGS, "dynamic": [1]},
    "pattern": {**SETTINGS, "dynamic": {"(": {"bits": 8}}},
    "no object": "gptq",
    "list of them": [SETTINGS],
}


@pytest.mark.parametrize("settings", FOREIGN.values(), ids=FOREIGN)
def test_others_are_refused_with_the_path_and_a_remedy(tmp_path, settings):
    folder = write(tmp_path, settings, q=pack(1)[0])
    foreign = isinstance(settings, dict) and settings.get("quant_method") != "gptq"
    remedy = ".*pass the original checkpoint, and `uhd-export quantize` it" if foreign else ""
    with one_line_error(f"{tmp_path}.*config field quantization_config{remedy}"):
        open_checkpoint(folder)


@pytest.mark.parametrize("settings", [FOREIGN["awq"], FOREIGN["old bitsandbytes"], FOREIGN["torchao"]])
def test_quantize_and_build_refuse_alike(tmp_path, settings):
    from uhd_export.bundle.build import build_bundle
    from uhd_export.bundle.options import BuildOptions
    from uhd_export.calibration.options import QuantizeOptions
    from uhd_export.calibration.quantize import quantize
    from uhd_export.checkpoint.options import SourceOptions
    from uhd_export.checkpoint.source import EMBEDDED

    config = json.loads((EMBEDDED / "config.json").read_text())
    folder = write(tmp_path, settings, q=pack(1)[0])
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    reading = SourceOptions(vision_tower=EMBEDDED / "clip")
    for refuse, options in ((build_bundle, BuildOptions(reading)), (quantize, QuantizeOptions(reading))):
        with one_line_error(rf"{tmp_path}.*config field quantization_config\.quant_method"):
            refuse(folder, tmp_path / "out", options=options)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_settings_in_a_file_of_their_own(tmp_path, name):
    folder = write(tmp_path, None, q=pack(1)[0])
    (folder / name).write_text(json.dumps({"bits": 4, "group_size": 32}))
    assert open_checkpoint(folder).names() == {"q.weight"}
    (folder / name).write_text(json.dumps(FOREIGN["AutoAWQ"]))
    with one_line_error(r"quant_method: 'awq' is not supported"):
        open_checkpoint(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers_are_named(tmp_path, value):
    parts, _ = pack(1)
    parts["scales"][0, 3] = value
    checkpoint = open_checkpoint(write(tmp_path, SETTINGS, q=parts))
    with one_line_error(f"checkpoint {tmp_path}: layer q: scales: hold values that are no numbers"):
        checkpoint.quantized("q")


def test_three_bit_tensors_are_named(tmp_path):
    parts, _ = pack(1)
    parts["qzeros"] = parts["qzeros"][:, :3].copy()
    with one_line_error(f"checkpoint {tmp_path}: layer q: qzeros .* are of 3 bits; 4 and 8 are supported"):
        open_checkpoint(write(tmp_path, SETTINGS, q=parts))
