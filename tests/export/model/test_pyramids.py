"""Pyramids that a config may name beside the JBU's: they build, fold and run like it."""

import json
import shutil

import numpy as np
import pytest
import torch
from golden import recipe
from safetensors.torch import load_file, save_file
from support.options import build_options
from torch.nn import functional as F

from uhd_export import build_bundle, load_model
from uhd_export.checkpoint.config import parse_config
from uhd_export.model.projector import HiwinProjector
from uhd_export.runtime import Pipeline, UhdError
from uhd_export.runtime.config import ProjectorConfig
from uhd_export.runtime.image.geometry import bilinear, crop_geometry
from uhd_export.runtime.image.pattern import pattern
from uhd_export.runtime.profiling import costs

UPSAMPLER = "model.mm_projector.upsampler.upsampler."


def checkpoint_with(pyramid, spoken_checkpoint, folder):
    """The golden checkpoint with another pyramid in place of the JBU's."""
    shutil.copytree(spoken_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "feature_pyramid": pyramid}))
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(UPSAMPLER)}
    if pyramid == "deconvolution":
        channels = tensors["model.mm_projector.features_1x_projector.weight"].shape[1]
        for i in (1, 2):
            for name, shape in (("weight", (channels, channels, 2, 2)), ("bias", (channels,))):
                value = recipe.weight(f"{UPSAMPLER}up{i}.{name}", shape)
                tensors[f"{UPSAMPLER}up{i}.{name}"] = torch.from_numpy(value).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=["bilinear", "deconvolution"])
def checkpoint(request, spoken_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pyramids") / request.param
    return checkpoint_with(request.param, spoken_checkpoint, folder)


@pytest.mark.parametrize("fold", [True, False])
def test_bundles_equal_pytorch(checkpoint, fold, tmp_path):
    tower = checkpoint / "clip"
    options = build_options(vision_tower=tower, fold=fold)
    manifest = build_bundle(checkpoint, tmp_path / "bundle", options=options, verify=False)
    assert manifest.model.projector.pyramid == checkpoint.name
    model, image = load_model(checkpoint, vision_tower=tower), pattern(500, 336)
    with Pipeline.open(tmp_path / "bundle", threads=1) as pipeline:
        assert "guidance_2x_y" not in pipeline.vision.inputs
        for ours, expected in zip(pipeline.encode_image(image), model.encode_image(image), strict=True):
            error = np.linalg.norm(ours - expected.numpy()) / np.linalg.norm(expected.numpy())
            assert error < 1e-4


@pytest.mark.parametrize(("out", "size"), [(8, 4), (16, 4), (6, 3), (2, 1), (58, 29)])
def test_bilinear_is_torchs(out, size):
    line = torch.randn(1, 1, size, dtype=torch.float64)
    expected = F.interpolate(line, size=out, mode="linear", align_corners=False)
    np.testing.assert_allclose(bilinear(out, size) @ line[0, 0].numpy(), expected[0, 0].numpy(), atol=1e-12)


@pytest.mark.parametrize("pyramid", ["bilinear", "deconvolution"])
def test_levels_are_of_their_size_and_follow_torch(pyramid):
    config = ProjectorConfig("hiwin", 128, 8, (1, 4), 12, pyramid)
    module = HiwinProjector(config)
    torch.manual_seed(0)
    for parameter in module.upsampler.parameters():
        torch.nn.init.normal_(parameter)
    geometry = {
        n: torch.from_numpy(a) for n, a in crop_geometry(3, 5, levels=(1, 4), pyramid=pyramid).items()
    }
    source = torch.randn(2, 3, 5, 8)
    with torch.no_grad():
        top = module.pyramid(source, torch.empty(0), geometry)[4]
        stack, x = module.upsampler.upsampler, source.permute(0, 3, 1, 2)
        if pyramid == "bilinear":
            expected = F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False)
        else:
            expected = stack.up2(stack.up1(x))
    assert top.shape == (2, 12, 20, 8)
    torch.testing.assert_close(top, expected.permute(0, 2, 3, 1), atol=1e-5, rtol=1e-5)


def test_thin_crops_go_through_a_pyramid_without_a_kernel():
    assert "upsample_4x_y" in crop_geometry(1, 9, pyramid="bilinear")
    with pytest.raises(UhdError, match="at least 2 on each side"):
        crop_geometry(1, 9)


def test_an_unknown_pyramid_is_refused(spoken_checkpoint):
    config = json.loads((spoken_checkpoint / "config.json").read_text())
    tower = json.loads((spoken_checkpoint / "clip" / "config.json").read_text())
    with pytest.raises(UhdError, match="config field feature_pyramid: 'fpn' is not supported"):
        parse_config({**config, "feature_pyramid": "fpn"}, tower)


def test_costs_of_each_pyramid():
    grids, sizes = [(24, 24)] * 6 + [(19, 29)], ("hiwin", 4096, 1024, (1, 2, 4), 12)
    flops = {
        name: costs.total(costs.jbu(grids, ProjectorConfig(*sizes, name), folded=True)).flops
        for name in ("jbu", "bilinear", "deconvolution")
    }
    patches = sum(rows * cols for rows, cols in grids)
    assert flops["deconvolution"] == 2 * 1024 * 4 * 1024 * (patches + 4 * patches)
    assert flops["bilinear"] < flops["jbu"] < flops["deconvolution"]
