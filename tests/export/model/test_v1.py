"""LLaVA-UHD v1 with 64 queries, as the released classes write it, through the model and through a bundle."""

import numpy as np
import pytest
import torch
from golden import recipe
from support.goldens import assert_close, golden_tensors
from support.options import build_options

from uhd_export import load_model
from uhd_export.bundle.build import build_bundle
from uhd_export.runtime import Pipeline

SEEDS = {"1008x672": 11, "500x120": 14, "2000x500": 15}


def case(name):
    golden = {k.split("/")[1]: v for k, v in golden_tensors("v1q64").items() if k.startswith(f"{name}/")}
    return recipe.photo(*map(int, name.split("x")), SEEDS[name]), golden["ids"].tolist(), golden


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return recipe.write_checkpoint(tmp_path_factory.mktemp("v1") / "checkpoint", "v1q64")


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint, vision_tower=checkpoint / "clip")


@pytest.mark.parametrize("name", SEEDS)
def test_the_model_equals_the_released_code(model, name):
    image, ids, golden = case(name)
    embeds = model.inputs_embeds(image, ids)
    assert model.config.projector.side == 8
    assert_close(embeds[0, ::16, ::4], golden["embeds_16_4"])
    with torch.inference_mode():
        assert_close(model.language(embeds, last_only=True)[0, -1, ::16], golden["logits_16"])
    assert model.generate_ids(image, ids, 16) == golden["greedy"].tolist()


@pytest.fixture(scope="module")
def pipeline(checkpoint, tmp_path_factory):
    from tokenizers import Tokenizer, models

    vocab = {f"w{i}": i for i in range(32000)}
    Tokenizer(models.WordLevel(vocab, unk_token="w0")).save(str(checkpoint / "tokenizer.json"))
    folder = tmp_path_factory.mktemp("v1") / "bundle"
    options = build_options(vision_tower=checkpoint / "clip", context=1024)
    build_bundle(checkpoint, folder, options=options, verify=False)
    with Pipeline.open(folder) as pipeline:
        yield pipeline


@pytest.mark.parametrize("name", SEEDS)
def test_the_bundle_equals_the_released_code(pipeline, name):
    image, ids, golden = case(name)
    assert_close(pipeline.inputs_embeds(image, ids)[0, ::16, ::4], golden["embeds_16_4"])
    assert_close(pipeline.logits(image, ids)[0, ::16], golden["logits_16"])
    assert np.array_equal(pipeline.generate_ids(image, ids, 16), golden["greedy"])
