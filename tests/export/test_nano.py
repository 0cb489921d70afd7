"""The embedded model: its images, its tokenizer, its checkpoint and whether it can read."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from uhd_export import load_model
from uhd_export.checkpoint.source import EMBEDDED
from uhd_export.checkpoint.tokenizer import checkpoint_tokenizer
from uhd_export.nano import cards, font
from uhd_export.nano.architecture import fresh_vision, typed_config
from uhd_export.nano.evaluate import EvalResult, evaluate, held_out_question
from uhd_export.nano.reference import model_answer
from uhd_export.nano.samples import SAMPLE_SEED
from uhd_export.nano.tokenizer import build_tokenizer
from uhd_export.nano.train_vision import crop_tokens, geometry_of, to_batch
from uhd_export.nano.windows import image_crops, packed_slice
from uhd_export.runtime.language.prompt import FOLLOW_UPS, IMAGE_ID, encode, render

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def model():
    return load_model(EMBEDDED)


@pytest.fixture(scope="module")
def tokenizer(model):
    return checkpoint_tokenizer(model.folder)


def test_an_image_depends_on_its_seed_alone():
    first, cards_first = cards.make_card_image((5, 7))
    again, cards_again = cards.make_card_image((5, 7))
    other, _ = cards.make_card_image((5, 8))
    assert first.size == (1008, 672)
    assert cards_first == cards_again
    assert np.array_equal(np.asarray(first), np.asarray(again))
    assert not np.array_equal(np.asarray(first), np.asarray(other))


def test_cards_differ_in_colour_and_hold_their_print():
    for seed in range(20):
        image, found = cards.make_card_image((6, seed))
        assert len({card.colour for card in found}) == len(found) >= 3
        pixels = np.asarray(image).astype(int)
        for card in found:
            left, top, right, bottom = card.print_box
            assert card.box[0] <= left and right <= card.box[2]
            assert card.box[1] <= top and bottom <= card.box[3]
            # A whole code lies in one window, and its ink where the font says.
            assert left // cards.WINDOW == (right - 1) // cards.WINDOW
            assert top // cards.WINDOW == (bottom - 1) // cards.WINDOW
            ink = font.print_code(card.code) > 0.99
            assert pixels[top:bottom, left:right][ink].max() < 60


def test_glyphs_are_all_different():
    table = font.glyphs()
    distance = np.abs(table[:, None] - table[None]).sum((2, 3)) + 99 * np.eye(10)
    assert distance.min() > 3


def test_training_and_held_out_images_come_from_different_seeds():
    assert len({cards.TRAIN_SEED, cards.HELD_OUT_SEED, SAMPLE_SEED}) == 3
    assert evaluate.__defaults__[1] == cards.HELD_OUT_SEED
    training = {np.asarray(cards.make_card_image((cards.TRAIN_SEED, i))[0]).tobytes() for i in range(10)}
    held_out = {np.asarray(held_out_question(i)[0]).tobytes() for i in range(10)}
    assert not training & held_out


def test_labels_of_slices_agree_with_the_cards():
    crops = image_crops((6, 1))
    _, found = cards.make_card_image((6, 1))
    codes = {
        cards.NAMES[row[0] - 1]: "".join(map(str, row[2:]))
        for crop in crops[:-1]
        for row in crop.labels
        if row[1] == 1
    }
    assert codes == {card.colour: card.code for card in found}
    assert not (crops[-1].labels[:, 1] == 1).any()


def test_evaluate_counts_exact_answers():
    def half_right(image, question):
        index = half_right.index
        half_right.index += 1
        return f" {held_out_question(index)[2]}\n" if index % 2 else "12"

    half_right.index, seen = 0, []
    result = evaluate(half_right, count=6, progress=lambda done, total: seen.append((done, total)))
    assert (result.exact, result.total, result.accuracy) == (3, 6, 0.5)
    assert [miss.index for miss in result.misses] == [0, 2, 4]
    assert seen[-1] == (6, 6)
    assert EvalResult(0, 0).accuracy == 0.0


def test_cards_and_evaluation_import_no_torch():
    code = "import sys, uhd_export.nano.evaluate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_training_forward_equals_the_model():
    torch.manual_seed(1)
    tower, projector = fresh_vision(typed_config(442, [14, 201]))
    rng = np.random.default_rng(0)
    for crop in (packed_slice(rng), image_crops((6, 2))[-1]):
        pixels, _ = to_batch([crop])
        geometry = geometry_of(pixels.shape)
        with torch.no_grad():
            wanted = projector(tower(pixels, geometry), pixels, geometry)
            got = crop_tokens(tower, projector, pixels, geometry, (1, 2, 4))
        assert torch.allclose(got, wanted, atol=1e-4)


def test_checkpoint_is_small_and_complete(model):
    files = [path for path in EMBEDDED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8 * 2**20
    assert {str(path.relative_to(EMBEDDED)) for path in files} == {
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        str(Path("clip") / "config.json"),
    }
    assert model.config.projector.levels == (1, 2, 4)
    assert model.config.layout == "flat" and model.config.projector.side == 12
    assert model.config.language.context >= 2048


def test_tokenizer_is_the_one_the_script_builds(tokenizer):
    assert tokenizer.to_str() == build_tokenizer().to_str()


def test_tokenizer_round_trip(model, tokenizer):
    text = "What is the code on the red card? 0472, naïve\n"
    ids = tokenizer.encode(text).ids
    assert ids[0] == 1
    assert tokenizer.decode(ids) == text
    assert (
        max(tokenizer.get_vocab().values()) + 1 == tokenizer.get_vocab_size() == model.config.language.vocab
    )


def test_digits_and_separators_are_single_tokens(model, tokenizer):
    digits = [tokenizer.encode(d, add_special_tokens=False).ids for d in "0123456789"]
    assert all(len(ids) == 1 for ids in digits)
    joined = tokenizer.encode("card 0472 9", add_special_tokens=False).ids
    assert [i for i in joined if [i] in digits] == [digits[int(d)][0] for d in "04729"]
    assert tokenizer.decode([model.config.separators.comma]) == ","
    assert tokenizer.decode([model.config.separators.newline]) == "\n"


def test_follow_up_ends_the_answer_before_it(model, tokenizer):
    ids = tokenizer.encode(FOLLOW_UPS[model.config.template], add_special_tokens=False).ids
    assert ids[0] == model.config.language.eos[0] == 2
    prompt = encode(tokenizer, render("What is the code on the red card?", model.config.template))
    assert prompt.count(IMAGE_ID) == 1 and prompt.count(1) == 1


@pytest.mark.slow
def test_it_reads_held_out_images(model):
    result = evaluate(model_answer(model), count=12)
    assert result.exact >= 10, result.misses


@pytest.mark.slow
def test_it_reads_the_samples(model):
    answers = json.loads((EXAMPLES / "questions.json").read_text(encoding="utf-8"))
    ask = model_answer(model)
    right = []
    for name, expected in answers.items():
        question, code = next(iter(expected.items()))
        with Image.open(EXAMPLES / name) as image:
            assert image.size == (1008, 672)
            right.append(ask(image, question).strip() == code)
    assert sum(right) >= 2


@pytest.mark.slow
def test_it_cannot_read_without_slices():
    result = evaluate(model_answer(load_model(EMBEDDED, max_slices=1)), count=10)
    assert result.exact <= 2
