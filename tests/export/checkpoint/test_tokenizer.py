import io
import json
import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer, sentencepiece_model_pb2
from support.refusals import one_line_error
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models

from uhd_export.checkpoint.tokenizer import checkpoint_tokenizer, vocabulary_size
from uhd_export.runtime.language.prompt import IMAGE_ID, encode

WORDS = [
    *("the", "code", "on", "red", "green", "blue", "card", "answer", "question", "slice", "overview"),
    *("image", "tokens", "window", "pixel", "assistant", "polite", "helpful", "detailed", "user"),
    *("human", "chat", "curious", "Überraschung", "naïve", "图像", "什么", "123", "4567"),
]
LLAMA = {
    "model_type": "bpe",
    "vocab_size": 420,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "split_digits": True,
    "character_coverage": 0.995,
}


def corpus():
    rng = random.Random(0)
    for _ in range(400):
        yield (" " * rng.choice((1, 1, 2, 4))).join(rng.choices(WORDS, k=8)) + rng.choice(".?\t")


def train(**changes) -> bytes:
    """A serialized SentencePiece model with LLaMA's settings but for `changes`."""
    out = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=corpus(), model_writer=out, minloglevel=2, **{**LLAMA, **changes}
    )
    return out.getvalue()


@pytest.fixture(scope="module")
def llama_model() -> bytes:
    """As LLaMA's: runs of spaces are pieces that all score alike."""
    model = sentencepiece_model_pb2.ModelProto.FromString(train())
    known = {piece.piece for piece in model.pieces}
    for length in range(2, 9):
        piece = "\u2581" * length
        if piece not in known:
            model.pieces.add(piece=piece, type=1)
    for piece in model.pieces:
        if set(piece.piece) == {"\u2581"} and len(piece.piece) > 1:
            piece.score = -1e9
    return model.SerializeToString()


@pytest.fixture
def folder(tmp_path):
    """`folder(name=content)`: a checkpoint folder with these files, JSON where it is a dict."""

    def write(**files):
        for name, content in files.items():
            name = name.replace("__", ".")
            if isinstance(content, bytes):
                (tmp_path / name).write_bytes(content)
            else:
                (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path

    return write


@pytest.fixture(scope="module")
def llama(llama_model, tmp_path_factory):
    """The converted tokenizer, and the library's own."""
    path = tmp_path_factory.mktemp("llama")
    (path / "tokenizer.model").write_bytes(llama_model)
    return checkpoint_tokenizer(path), SentencePieceProcessor(model_proto=llama_model)


SPECIAL = ("<unk>", "<s>", "</s>")
texts = st.one_of(
    st.text(),
    st.text(alphabet=sorted({c for word in WORDS for c in word} | set("  \n\u2581"))),
    st.lists(st.sampled_from([*WORDS, " ", "  ", "\n", "x", "é", "🙂"])).map("".join),
    st.lists(st.sampled_from([*WORDS, " "])).map(" ".join),
)


@given(texts)
def test_ids_equal_sentencepiece(llama, text):
    converted, library = llama
    assume(not any(token in text for token in SPECIAL))
    ids = converted.encode(text).ids
    assert ids == [library.bos_id(), *library.encode(text)]
    assert converted.decode(ids) == library.decode(ids[1:])


@given(st.lists(st.one_of(st.sampled_from(SPECIAL), texts), max_size=6))
def test_special_tokens_are_atomic_and_text_between_starts_anew(llama, parts):
    converted, library = llama
    assume(not any(token in part for part in parts for token in SPECIAL if part not in SPECIAL))
    joined, expected, text = "".join(parts), [library.bos_id()], ""
    for part in [*parts, None]:
        if part is not None and part not in SPECIAL:
            text += part
            continue
        assume(not any(token in text for token in SPECIAL))
        expected += library.encode(text)
        text = ""
        expected += [] if part is None else [library.piece_to_id(part)]
    assert converted.encode(joined).ids == expected


def test_runs_of_spaces_merge_from_the_left(llama):
    converted, library = llama
    for length in range(40):
        for text in (" " * length, "red" + " " * length + "card", " " * length + "\n" + " " * length):
            assert converted.encode(text).ids[1:] == library.encode(text)


def test_image_prompts(llama):
    converted, library = llama
    ids = encode(converted, "user: <image>\nthe code</s>blue")
    pieces = library.encode("user: "), library.encode("\nthe code"), library.encode("blue")
    assert ids == [1, *pieces[0], IMAGE_ID, *pieces[1], library.eos_id(), *pieces[2]]


@pytest.fixture(scope="module")
def modern(llama_model, tmp_path_factory):
    """The tokenizer of a folder that says `legacy: false`, and the library without leading space."""
    path = tmp_path_factory.mktemp("modern")
    (path / "tokenizer.model").write_bytes(llama_model)
    (path / "tokenizer_config.json").write_text(json.dumps({"legacy": False}))
    model = sentencepiece_model_pb2.ModelProto.FromString(llama_model)
    model.normalizer_spec.add_dummy_prefix = False
    return checkpoint_tokenizer(path), SentencePieceProcessor(model_proto=model.SerializeToString())


@given(texts.filter(lambda text: not any(token in text for token in SPECIAL)))
def test_without_legacy_only_the_beginning_gets_a_space(modern, text):
    converted, plain = modern
    assert converted.encode(text).ids == [1, *(plain.encode("\u2581" + text) if text else [])]
    if not text.startswith((" ", "\u2581")):
        assert converted.encode("</s>" + text).ids == [1, 2, *plain.encode(text)]


def test_unknown_characters_without_byte_fallback(folder):
    model = train(byte_fallback=False, vocab_size=160)
    converted = checkpoint_tokenizer(folder(tokenizer__model=model))
    library = SentencePieceProcessor(model_proto=model)
    for text in ("the 🙂🙂 code", "🙂", "ß🙂 ß", "red"):
        assert converted.encode(text).ids[1:] == library.encode(text)


def test_settings_of_the_checkpoint(folder, llama_model):
    settings = {"add_bos_token": False, "add_eos_token": True, "eos_token": {"content": "</s>"}}
    converted = checkpoint_tokenizer(folder(tokenizer__model=llama_model, tokenizer_config__json=settings))
    library = SentencePieceProcessor(model_proto=llama_model)
    assert converted.encode("the code").ids == [*library.encode("the code"), library.eos_id()]


def test_added_tokens_are_atomic(folder, llama_model):
    size = SentencePieceProcessor(model_proto=llama_model).get_piece_size()
    converted = checkpoint_tokenizer(
        folder(
            tokenizer__model=llama_model,
            added_tokens__json={"<pad>": size},
            tokenizer_config__json={
                "added_tokens_decoder": {
                    "1": {"content": "<s>", "special": True},
                    str(size + 1): {"content": "<box>", "special": False, "lstrip": True},
                }
            },
        )
    )
    library = SentencePieceProcessor(model_proto=llama_model)
    expected = [1, *library.encode("red"), size, *library.encode("card"), size + 1, *library.encode("blue")]
    assert converted.encode("red<pad>card <box>blue").ids == expected


def test_tokenizer_json_comes_first(folder, llama_model):
    words = Tokenizer(models.WordLevel({"red": 5}, unk_token="red"))
    path = folder(tokenizer__model=llama_model, tokenizer__json=words.to_str())
    assert checkpoint_tokenizer(path).encode("red").ids == [5]


def test_what_training_left_in_tokenizer_json_does_nothing_to_a_prompt(folder, llama):
    plain, _ = llama
    text = "the code on the red card " * 20
    left = Tokenizer.from_str(plain.to_str())
    left.enable_truncation(8)
    left.enable_padding(length=64, pad_id=0, direction="left")
    assert (
        checkpoint_tokenizer(folder(tokenizer__json=left.to_str())).encode(text).ids == plain.encode(text).ids
    )


@pytest.mark.parametrize("beside", ["added_tokens__json", "tokenizer_config__json"])
def test_tokens_added_beside_tokenizer_json_count(folder, llama, beside):
    plain, library = llama
    size = plain.get_vocab_size()
    added = {"<box>": size, "</s>": 2}
    if beside == "tokenizer_config__json":
        added = {"added_tokens_decoder": {str(i): {"content": t, "special": True} for t, i in added.items()}}
    converted = checkpoint_tokenizer(folder(tokenizer__json=plain.to_str(), **{beside: added}))
    expected = [1, *library.encode("red"), size, *library.encode("card"), 2]
    assert converted.encode("red<box>card</s>").ids == expected
    assert vocabulary_size(converted) == vocabulary_size(plain) + 1 == size + 1
    contradiction = {"added_tokens__json": {"<box>": size + 5}}
    refused(folder(tokenizer__json=plain.to_str(), **contradiction), "added token '<box>' has id")


QWEN_TEXTS = (
    "It's the code on card 12345?  Yes,\n\n  naïve 图像 e\u0301 <|im_start|>user\nx<|im_end|>",
    "",
    "  a ",
)


def test_qwen2_equals_transformers(folder):
    from transformers import Qwen2Tokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(corpus(), vocab_size=500, show_progress=False)
    path = folder()
    trained.save_model(str(path))
    size = trained.get_vocab_size()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    folder(added_tokens__json={token: size + i for i, token in enumerate(special)})
    converted = checkpoint_tokenizer(path)
    vocab = json.loads((path / "vocab.json").read_text())
    merges = [tuple(line.split(" ")) for line in (path / "merges.txt").read_text().splitlines()[1:]]
    peer = Qwen2Tokenizer(vocab=vocab, merges=merges)
    peer.add_special_tokens({"additional_special_tokens": special[1:]})
    for text in (*QWEN_TEXTS, *(" ".join(WORDS), *corpus())):
        ids = converted.encode(text).ids
        assert ids == peer(text)["input_ids"]
        assert converted.decode(ids, skip_special_tokens=False) == peer.decode(ids)


def refused(path, match):
    with one_line_error(match):
        checkpoint_tokenizer(path)


def test_folder_without_tokenizer(folder):
    refused(folder(), "holds no tokenizer.json, tokenizer.model, or vocab.json with merges.txt; copy")


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"model_type": "unigram", "vocab_size": 320}, "it is no BPE model"),
        ({"user_defined_symbols": ["<box>"]}, "it has user-defined or unused pieces"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it normalises text"),
        ({"remove_extra_whitespaces": True}, "it normalises text"),
        ({"add_dummy_prefix": False}, "it adds no leading space"),
        ({"treat_whitespace_as_suffix": True}, "its spaces are unusual"),
    ],
)
def test_models_that_cannot_be_converted(folder, changes, reason):
    refused(folder(tokenizer__model=train(**changes)), rf"tokenizer\.model: not supported, {reason}; convert")


def test_broken_files_are_named(folder, llama_model):
    refused(
        folder(tokenizer__model=llama_model[:-7]), r"tokenizer\.model: not a readable SentencePiece model"
    )
    refused(folder(tokenizer__model=b""), r"tokenizer\.model: not supported, it holds no pieces")
    refused(folder(vocab__json="{", merges__txt="", tokenizer__model=llama_model[:-7]), "SentencePiece")
    refused(folder(tokenizer__json="{"), r"tokenizer\.json: cannot be read")


def test_broken_qwen2_files_are_named(folder):
    refused(folder(vocab__json="{", merges__txt=""), r"vocab\.json and merges\.txt are not readable")


@pytest.mark.parametrize(
    "files, match",
    [
        ({"added_tokens__json": {"<pad>": 9999}}, "added token '<pad>' has id 9999, but would get"),
        ({"added_tokens__json": {"<pad>": "9"}}, "'<pad>' must have a whole number"),
        ({"tokenizer_config__json": {"legacy": "yes"}}, "tokenizer_config field legacy: 'yes'"),
        ({"tokenizer_config__json": {"bos_token": "<bos>"}}, "token '<bos>' of tokenizer_config"),
        ({"tokenizer_config__json": {"added_tokens_decoder": {"x": 1}}}, "added_tokens_decoder: entry 'x'"),
    ],
)
def test_settings_that_contradict_the_model(folder, llama_model, files, match):
    refused(folder(tokenizer__model=llama_model, **files), match)
