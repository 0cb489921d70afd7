import pytest
from support.goldens import golden_json
from support.refusals import one_line_error
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from uhd_export.runtime import choices
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.language.prompt import (
    FOLLOW_UPS,
    IMAGE,
    IMAGE_ID,
    TEMPLATES,
    encode,
    encode_question,
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
    assert tuple(TEMPLATES) == choices.TEMPLATES
    assert TEMPLATES.keys() == FOLLOW_UPS.keys()
    assert set(choices.TEMPLATE_ALIASES.values()) < set(TEMPLATES)
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


@pytest.fixture(scope="module")
def letters():
    """LLaMA's conventions, one token a character, and the special tokens of both families."""
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    characters = ["\u2581", "\n", *map(chr, range(33, 127))]
    vocab = {token: i for i, token in enumerate([*special, *characters])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    space = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), space])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.mark.parametrize("follow_up", [False, True])
@pytest.mark.parametrize("template", TEMPLATES)
def test_ordinary_questions_are_encoded_with_their_template(letters, template, follow_up):
    for question in ("What is this?", "  two  spaces ", "", "{question}", "a < b > c", "<|im_start"):
        if follow_up:
            text = FOLLOW_UPS[template].replace("{question}", question)
            assert encode_question(letters, question, template, follow_up=True) == encode(letters, text)[1:]
        else:
            expected = encode(letters, render(question, template, 2))
            assert encode_question(letters, question, template, 2) == expected


@pytest.mark.parametrize("follow_up", [False, True])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("token", ["</s>", "<s>", "<unk>", "<|im_end|>", IMAGE])
def test_control_tokens_in_a_question_are_text(letters, template, token, follow_up):
    images = 0 if follow_up else 1
    harmless = encode_question(letters, "what is X?", template, images, follow_up=follow_up)
    ids = encode_question(letters, f"what is {token}?", template, images, follow_up=follow_up)
    spelt = letters.encode("X" + token.replace("<", "X"), add_special_tokens=False).ids[2:]
    spelt[0] = letters.token_to_id("<")
    at = harmless.index(letters.token_to_id("X"), harmless.index(letters.token_to_id("?")) - 2)
    assert ids == [*harmless[:at], *spelt, *harmless[at + 1 :]]


def test_a_prompt_itself_is_parsed(letters):
    assert encode(letters, "a</s>b").count(2) == 1
    assert encode(letters, f"a{IMAGE}b").count(IMAGE_ID) == 1


def test_an_end_of_text_token_that_the_tokenizer_appends_is_left_out():
    both = words(bos=True)
    both.add_special_tokens(["</s>"])
    end = both.token_to_id("</s>")
    both.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", end)]
    )
    assert both.encode("look").ids == [1, 5, end]
    assert encode(both, f"look at {IMAGE} and {IMAGE} this") == [1, 5, 6, IMAGE_ID, 7, IMAGE_ID, 8]
    assert encode(both, "look at") == [1, 5, 6]
