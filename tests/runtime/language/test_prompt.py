import pytest
from support.goldens import golden_json
from support.refusals import one_line_error
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.language.prompt import (
    FOLLOW_UPS,
    IMAGE,
    IMAGE_ID,
    TEMPLATES,
    encode,
    load_tokenizer,
    render,
)

QUESTION = "What is shown in this image? Answer briefly."


def words(*, bos: bool) -> Tokenizer:
    """One id a word, with a beginning-of-text token where asked."""
    vocab = {"<s>": 1, "[UNK]": 0, "look": 5, "at": 6, "and": 7, "this": 8}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.mark.parametrize("template", golden_json("prompts"))
def test_rendered_prompts_equal_the_released_ones(template):
    assert render(QUESTION, template) == golden_json("prompts")[template]


def test_templates_have_follow_ups():
    assert TEMPLATES.keys() == FOLLOW_UPS.keys()
    assert all("{question}" in text for text in (*TEMPLATES.values(), *FOLLOW_UPS.values()))


def test_images_lead_the_question_unless_it_places_them():
    assert render("this", "plain") == f"{IMAGE}\nthis\n"
    assert render("this", "plain", images=2) == f"{IMAGE}\n{IMAGE}\nthis\n"
    assert render(f"look {IMAGE} at", "plain", images=1) == f"look {IMAGE} at\n"


def test_braces_in_a_question_are_text():
    assert render("what is {question} or {0}?", "plain").endswith("what is {question} or {0}?\n")


def test_unknown_template_is_named():
    with pytest.raises(UhdError, match="template 'alpaca'"):
        render("this", "alpaca")


@pytest.mark.parametrize("bos, prefix", [(True, [1]), (False, [])])
def test_each_image_becomes_one_marker_and_bos_stays_once(bos, prefix):
    ids = encode(words(bos=bos), f"look at {IMAGE} and {IMAGE} this")
    assert ids == [*prefix, 5, 6, IMAGE_ID, 7, IMAGE_ID, 8]
    assert encode(words(bos=bos), f"{IMAGE}this") == [*prefix, IMAGE_ID, 8]
    assert encode(words(bos=bos), f"look{IMAGE}") == [*prefix, 5, IMAGE_ID]


def test_ids_pass_through():
    assert encode(words(bos=True), [1, IMAGE_ID, 13]) == [1, IMAGE_ID, 13]


def test_tokenizer_round_trip_and_missing_file(tmp_path):
    words(bos=True).save(str(tmp_path / "tokenizer.json"))
    assert encode(load_tokenizer(tmp_path / "tokenizer.json"), "look this") == [1, 5, 8]
    with pytest.raises(UhdError, match=r"none\.json: no such file"):
        load_tokenizer(tmp_path / "none.json")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_is_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with one_line_error(r"tokenizer\.json: cannot be read \(.*\); build the bundle again"):
        load_tokenizer(tmp_path / "tokenizer.json")
