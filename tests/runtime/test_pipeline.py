import subprocess
import sys

import numpy as np
import pytest
from golden import recipe
from hypothesis import given
from hypothesis import strategies as st
from support.goldens import assert_close, golden_tensors
from tokenizers import Tokenizer

from uhd_export.runtime import Pipeline
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.language.detokenizer import Detokenizer, decode
from uhd_export.runtime.language.embeddings import EmbeddingTable
from uhd_export.runtime.language.prompt import IMAGE_ID
from uhd_export.runtime.language.sequence import PromptSequence

MAIN, NO_SLICE = (1008, 672, 0), (500, 120, 5)
SMALL = recipe.image(500, 120, 5)


@pytest.fixture
def fresh(pipeline):
    """The pipeline with nothing remembered, and its default options."""
    pipeline.forget()
    pipeline.configure(grid_mode="selective", max_slices=9, resize=None)
    return pipeline


@pytest.fixture
def counted(fresh, monkeypatch):
    """Shapes of the pixels that the vision engine was run on."""
    shapes, infer = [], fresh.vision.infer
    monkeypatch.setattr(
        fresh.vision, "infer", lambda feeds, stop: shapes.append(feeds["pixels"].shape) or infer(feeds, stop)
    )
    return shapes


def golden(layout, case):
    tensors = golden_tensors(f"model_{layout}")
    return {k.split("/")[1]: v for k, v in tensors.items() if k.startswith(case)}


def test_equals_the_released_model(fresh):
    image, expected = recipe.image(*MAIN), golden("flat", "main")
    prompt = expected["prompt"].tolist()
    embeds = fresh.inputs_embeds(image, prompt)
    assert embeds.dtype == np.float32
    assert_close(embeds[0, :, ::8], expected["embeds_every8"])
    assert_close(fresh.logits(image, prompt)[0], expected["logits_last"])
    assert fresh.generate_ids(image, prompt, 16) == expected["generated"].tolist()


def test_equals_the_released_model_without_slices(fresh):
    expected = golden("flat", "noslice")
    prompt = expected["prompt"].tolist()
    assert_close(fresh.logits(SMALL, prompt)[0, ::1000], expected["logits_every1000"][-1])
    assert fresh.generate_ids(SMALL, prompt, 16) == expected["generated"].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("grid_mode", ["selective", "fix", "pyramid"])
def test_encode_image_equals_torch_in_every_grid_mode(fresh, golden_model, grid_mode):
    image = recipe.image(500, 336, 3)
    fresh.configure(grid_mode=grid_mode)
    expected = golden_model(grid_mode=grid_mode).encode_image(image)
    actual = fresh.encode_image(image)
    assert len(actual) == len(expected) == 3
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b)


def test_equal_crops_run_in_batches_of_bounded_memory(fresh, counted):
    fresh.encode_image(recipe.image(*MAIN))
    assert counted == [(2, 3, 336, 336)] * 3 + [(1, 3, 266, 406)]


def test_two_images_equal_torch(fresh, golden_model):
    images, prompt = [SMALL, recipe.image(200, 300, 1)], [1, IMAGE_ID, 13, IMAGE_ID, 2]
    assert_close(fresh.inputs_embeds(images, prompt), golden_model().inputs_embeds(images, prompt))


def test_second_question_reuses_the_cache(fresh, counted):
    first = "".join(fresh.generate(SMALL, "What is this?", max_new_tokens=5))
    assert len(counted) == 1
    whole = fresh.generator.prefix.prefilled
    second = "".join(fresh.generate(SMALL.copy(), "What was that?", max_new_tokens=5))
    assert len(counted) == 1
    # All but the words after the image; "Wh" begins both, and so do the two spaces before it.
    common = len("What ")
    questions = len("What was that? ASSISTANT:")
    assert fresh.generator.prefix.prefilled == questions - common < whole
    fresh.forget()
    assert "".join(fresh.generate(SMALL, "What was that?", max_new_tokens=5)) == second
    assert fresh.generator.prefix.prefilled > 144
    assert "".join(fresh.generate(SMALL, "What is this?", max_new_tokens=5)) == first


def test_same_prompt_again_runs_one_position(fresh):
    prompt = [1, IMAGE_ID, 20, 21]
    first = fresh.logits(SMALL, prompt)
    assert fresh.generator.prefix.prefilled == 147
    again = fresh.logits(SMALL, prompt)
    assert fresh.generator.prefix.prefilled == 1
    assert_close(again, first)


def test_another_image_or_grid_is_not_mistaken_for_the_first(fresh, counted):
    prompt = [1, IMAGE_ID, 20]
    first = fresh.logits(SMALL, prompt)
    other = SMALL.copy()
    other[0, 0] = 255 - other[0, 0]
    for change in (
        lambda: fresh.logits(other, prompt),
        lambda: fresh.configure(grid_mode="pyramid") or fresh.logits(SMALL, prompt),
    ):
        assert np.abs(change() - first).max() > 0
        assert fresh.generator.prefix.prefilled == 145
    assert len(counted) == 3


def test_conversation_runs_only_new_tokens(fresh, counted):
    conversation = fresh.converse(SMALL)
    answer = "".join(conversation.ask("What is this?", max_new_tokens=4))
    held = fresh.generator.decoder.length
    "".join(conversation.ask("Why?", max_new_tokens=4))
    assert len(counted) == 1
    follow_up = fresh.input_ids("</s>USER: Why? ASSISTANT:")[1:]
    # The last token of the answer was never run; if it was end of text, the follow-up brings it.
    assert fresh.generator.prefix.prefilled in (len(follow_up), len(follow_up) + 1)
    assert held + fresh.generator.prefix.prefilled + 3 == fresh.generator.decoder.length
    assert isinstance(answer, str)


def test_conversation_equals_the_whole_prompt(fresh):
    conversation = fresh.converse(SMALL)
    list(conversation.ask("A", max_new_tokens=3))
    second = list(conversation.ask("B", max_new_tokens=3))
    ids = conversation.ids
    fresh.forget()
    prompt = ids[: len(ids) - 3]
    tokens = fresh.generate_ids(SMALL, prompt, 3)
    assert ids[-3:] == tokens and second


def test_unfinished_answer_counts_as_far_as_it_went(fresh):
    conversation = fresh.converse(SMALL)
    answer = conversation.ask("A", max_new_tokens=50)
    next(answer)
    answer.close()
    list(conversation.ask("B", max_new_tokens=2))
    assert fresh.generator.prefix.prefilled < 60


def test_a_closed_pipeline_keeps_no_encoded_images(golden_bundle):
    with Pipeline.open(golden_bundle) as pipeline:
        pipeline.logits(SMALL, [1, IMAGE_ID, 20])
        assert len(pipeline.images) == 1
    assert len(pipeline.images) == 0


def test_interleaved_answers_are_refused(fresh):
    first = fresh.generate(SMALL, "A", max_new_tokens=60)
    next(first)
    next(fresh.generate(SMALL, "B", max_new_tokens=60))
    with pytest.raises(UhdError, match="another prompt was run"):
        list(first)


def test_sampling_is_repeatable(fresh):
    def ask(seed):
        return list(fresh.generate(SMALL, "A", max_new_tokens=8, temperature=5.0, seed=seed))

    assert ask(1) == ask(1)
    assert ask(1) != ask(2)


@pytest.mark.parametrize("options", [{"temperature": -1}, {"top_p": 0}, {"max_new_tokens": 0}])
def test_bad_sampling_is_refused_before_anything_runs(fresh, counted, options):
    with pytest.raises(UhdError):
        fresh.generate(SMALL, "A", **options)
    assert not counted


@pytest.mark.parametrize("question", [b"x", None])
def test_a_question_that_is_no_text_is_refused(fresh, question):
    with pytest.raises(UhdError, match=r"question: .* is no text; give a str"):
        fresh.generate(SMALL, question)


def test_prompt_longer_than_the_context(golden_bundle, counted):
    with Pipeline.open(golden_bundle, context=200) as small:
        assert len(small.generate_ids(SMALL, [1, IMAGE_ID, 20], 100)) == 200 - 146 + 1
        # What to do: the bundle allows more than this pipeline was opened for, up to a limit.
        for text, remedy in ((1, "give a larger --context, up to 4096$"), (4000, "or build with a larger")):
            positions = f"{1014 + text} positions are more than the context of 200;"
            with pytest.raises(UhdError, match=f"{positions} .*{remedy}"):
                small.logits(recipe.image(*MAIN), [1] * text + [IMAGE_ID])
        assert len(counted) == 0


def test_bad_arguments(fresh, golden_bundle, tmp_path):
    for call, message in (
        (lambda: Pipeline.open(golden_bundle, context=5000), "context 5000: must be 1 to 4096"),
        (lambda: Pipeline.open(golden_bundle, grid_mode="round"), "grid mode 'round'"),
        (lambda: Pipeline.open(golden_bundle, device="tpu"), "device 'tpu'"),
        (lambda: Pipeline.open(golden_bundle, threads=0), "threads 0: must be at least 1"),
        (lambda: Pipeline.open(golden_bundle, threads=-3), "threads -3: must be at least 1"),
        (lambda: Pipeline.open(golden_bundle, resize=0), "resize 0: the longest side"),
        (lambda: Pipeline.open(golden_bundle, max_slices=-1), "max slices -1: must be at least 1"),
        (lambda: fresh.configure(max_slices=0), "max slices 0: must be at least 1"),
        (lambda: Pipeline.open(tmp_path), "uhd-export build"),
        (lambda: fresh.inputs_embeds(SMALL, [1, 2]), "0 <image> markers for 1 images"),
        (lambda: fresh.inputs_embeds(SMALL, [IMAGE_ID, 40000]), "token id 40000 is outside"),
        (lambda: fresh.inputs_embeds([], []), "prompt: empty"),
        (lambda: fresh.encode_image(tmp_path / "no.png"), "no such file"),
        (lambda: fresh.encode_image(np.zeros((400, 1, 3), np.uint8)), "patches"),
    ):
        with pytest.raises(UhdError, match=message):
            call()


def test_tampered_bundle_is_refused(golden_bundle, tmp_path):
    import shutil

    copy = tmp_path / "bundle"
    shutil.copytree(golden_bundle, copy)
    data = bytearray((copy / "vision.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "vision.onnx.data").write_bytes(data)
    with pytest.raises(UhdError, match=r"vision\.onnx\.data was altered"):
        Pipeline.open(copy)


def test_pictures_are_known_before_they_are_encoded(fresh, counted):
    sequence = fresh.sequence([SMALL, recipe.image(*MAIN)], [5, IMAGE_ID, 6, IMAGE_ID])
    assert isinstance(sequence, PromptSequence)
    assert len(sequence) == 1 + 144 + 1 + 1014
    assert sequence.keys[0] == 5 and sequence.keys[145] == 6
    assert not counted


def test_a_prompt_that_the_released_code_would_cut_is_refused(fresh, monkeypatch):
    monkeypatch.setattr(fresh.generator, "prompt_limit", 145)
    assert len(fresh.sequence([SMALL], [5, IMAGE_ID])) == 145
    with pytest.raises(UhdError, match="146 positions are more than tokenizer_model_max_length 145"):
        fresh.sequence([SMALL], [5, IMAGE_ID, 6])


@given(ids=st.lists(st.integers(1, 300), max_size=30))
def test_streamed_text_is_the_decoded_whole(tokenizer, ids):
    detokenizer, whole = Detokenizer(tokenizer), decode(tokenizer, ids)
    text = "".join(detokenizer.push(token) for token in ids) + detokenizer.flush()
    assert text == whole
    assert whole == tokenizer.decode(ids) or "\ufffd" in whole


@given(text=st.text(min_size=1, max_size=8), cut=st.integers(1, 3))
def test_a_cut_character_is_one_replacement_and_the_others_stay(tokenizer, text, cut):
    raw = text.encode()[:-cut]
    # The space that a text of such a tokenizer begins with is its own, and is left out.
    assert decode(tokenizer, [3 + byte for byte in raw]) == raw.decode(errors="replace").removeprefix(" ")


@given(text=st.text(max_size=20))
def test_characters_of_several_tokens_arrive_whole(tokenizer, text):
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in tokenizer.encode(text).ids]
    held = detokenizer.flush()
    assert "".join(pieces) + held == tokenizer.decode(tokenizer.encode(text).ids)
    if "\ufffd" not in text:
        assert not held and not any("\ufffd" in piece for piece in pieces)


@pytest.fixture(scope="module")
def tokenizer(spoken_checkpoint):
    return Tokenizer.from_file(str(spoken_checkpoint / "tokenizer.json"))


@pytest.mark.parametrize("array", [np.zeros(3, np.float32), np.zeros((2, 2), np.int64)])
def test_bad_embedding_tables_are_refused(tmp_path, array):
    np.save(tmp_path / "rows.npy", array)
    with pytest.raises(UhdError, match="two axes of float32 or float16"):
        EmbeddingTable(tmp_path / "rows.npy")
    (tmp_path / "rows.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(UhdError, match="cannot be read"):
        EmbeddingTable(tmp_path / "rows.npy")


def test_runtime_needs_neither_torch_nor_transformers(golden_bundle):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import numpy as np; from uhd_export.runtime import Pipeline\n"
        f"pipeline = Pipeline.open({str(golden_bundle)!r})\n"
        "image = np.zeros((120, 500, 3), np.uint8)\n"
        "print(len(list(pipeline.generate(image, 'A', max_new_tokens=2))) >= 0)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
