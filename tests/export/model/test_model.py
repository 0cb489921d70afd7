import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from golden import recipe
from support.goldens import GOLDEN, assert_close, golden_tensors

from uhd_export import load_model
from uhd_export.checkpoint.source import EMBEDDED
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.language.prompt import IMAGE_ID

IMAGES = {"main": (1008, 672, 0), "noslice": (500, 120, 5)}
CASES = [(layout, case) for layout in ("flat", "merged") for case in IMAGES]


def run(golden_model, layout, case):
    golden = golden_tensors(f"model_{layout}")
    part = {k.split("/")[1]: v for k, v in golden.items() if k.startswith(case)}
    return golden_model(layout=layout), recipe.image(*IMAGES[case]), part["prompt"].tolist(), part


@pytest.fixture(scope="module")
def embeddings(golden_model):
    """`embeddings(layout, case)`: what the model makes of a case, once for all tests."""

    @functools.cache
    def make(layout, case):
        model, image, prompt, _ = run(golden_model, layout, case)
        return model.inputs_embeds(image, prompt)

    return make


@pytest.mark.parametrize("layout, case", CASES)
def test_embeddings_and_logits_equal_the_released_model(golden_model, embeddings, layout, case):
    model, image, prompt, golden = run(golden_model, layout, case)
    embeds = embeddings(layout, case)
    if case == "main":
        assert_close(embeds[0, :, ::8], golden["embeds_every8"])
    else:
        assert_close(embeds[0, ::16], golden["embeds_every16_rows"])
    with torch.inference_mode():
        logits = model.language(embeds)[0]
    assert_close(logits[:, ::1000], golden["logits_every1000"])
    assert np.array_equal(logits.argmax(-1), golden["argmax"])
    if case == "main":
        assert_close(logits[-1], golden["logits_last"])
    else:
        assert torch.equal(model.logits(image, prompt)[0], logits)


@pytest.mark.parametrize("layout, case", CASES)
def test_sixteen_greedy_tokens_equal_the_released_model(golden_model, embeddings, monkeypatch, layout, case):
    model, image, prompt, golden = run(golden_model, layout, case)
    if case == "main":  # the image is not encoded again
        monkeypatch.setattr(model, "inputs_embeds", lambda *_: embeddings(layout, case))
    assert model.generate_ids(image, prompt, 16) == golden["generated"].tolist()


def test_first_generation_config_gives_the_merged_layout(golden_model):
    first = golden_model(config=GOLDEN / "configs" / "first_mask7.json")
    image, prompt = recipe.image(700, 400, 2), [1, IMAGE_ID, 13]
    merged = golden_model(layout="merged").inputs_embeds(image, prompt)
    assert torch.equal(first.inputs_embeds(image, prompt), merged)
    assert first.config.upscale_only


def test_two_images_in_a_prompt(golden_model):
    model = golden_model()
    images = recipe.image(200, 300, 1), recipe.image(500, 120, 5)
    both = model.inputs_embeds(images, [1, IMAGE_ID, 13, IMAGE_ID, 2])
    alone = [model.inputs_embeds(image, [IMAGE_ID]) for image in images]
    words = model.language.model.embed_tokens(torch.tensor([[1, 13, 2]]))
    expected = [words[:, :1], alone[0], words[:, 1:2], alone[1], words[:, 2:]]
    assert_close(both, torch.cat(expected, 1), 1e-6)
    with pytest.raises(UhdError, match="1 <image> markers for 2 images"):
        model.inputs_embeds(images, [1, IMAGE_ID])


@pytest.mark.parametrize("token", [-5, 32000])
def test_prompt_ids_outside_the_vocabulary_are_named(golden_model, token):
    with pytest.raises(UhdError, match=f"token id {token} is outside the vocabulary of 32000"):
        golden_model().generate_ids(recipe.image(500, 120, 5), [token, IMAGE_ID, 3], 3)


def test_an_empty_prompt_is_refused(golden_model):
    with pytest.raises(UhdError, match="prompt: empty"):
        golden_model().generate_ids([], [], 3)


def test_generation_stops_at_end_of_text(golden_model, monkeypatch):
    model, image, prompt, golden = run(golden_model, "flat", "noslice")
    stopping = replace(model.config.language, eos=(int(golden["generated"][3]),))
    monkeypatch.setattr(model, "config", replace(model.config, language=stopping))
    assert model.generate_ids(image, prompt, 16) == golden["generated"][:4].tolist()


def test_the_embedded_model_is_loaded_by_name():
    assert load_model("nano").folder == EMBEDDED


@pytest.mark.parametrize(
    "options, field",
    [
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"layout": "stacked"}, "layout 'stacked'"),
        ({"grid_mode": "auto"}, "grid_mode 'auto'"),
        ({"roi_rounding": "foo"}, "roi_rounding 'foo': must be one of exact, bf16"),
        ({"max_slices": 0}, "max slices 0"),
        ({"resize": 0}, "resize 0"),
        ({"mask": 6}, "mask 6: must be one of 1, 3, "),
        ({"vision_tower": "/no/such/tower/here"}, "/no/such/tower/here"),
        ({"config": "/no/such.json"}, r"/no/such\.json: no such file"),
    ],
)
def test_options_that_cannot_be_met_are_named(golden_checkpoint, options, field):
    with pytest.raises(UhdError, match=field):
        load_model(golden_checkpoint, **{"vision_tower": golden_checkpoint / "clip", **options})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_stays_near(golden_model, dtype):
    image = recipe.image(500, 120, 5)
    exact = golden_model().encode_image(image)[0]
    half = golden_model(dtype=dtype, roi_rounding="exact").encode_image(image)[0]
    assert half.dtype == getattr(torch, dtype)
    assert ((half.float() - exact).norm() / exact.norm()) < (0.005 if dtype == "float16" else 0.05)
