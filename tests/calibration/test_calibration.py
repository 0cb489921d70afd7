"""Calibration data, sequences, estimates, reports and unfinished work: everything but the solver."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from uhd_export.calibration.activations import Activations
from uhd_export.calibration.chart import draw_report
from uhd_export.calibration.data import card_pairs
from uhd_export.calibration.estimate import estimate_memory, require_memory
from uhd_export.calibration.layers import GROUPS, LayerRunner, load_layer
from uhd_export.calibration.options import CalibrationOptions, GptqOptions
from uhd_export.calibration.quality import (
    Accuracy,
    LinearQuality,
    ModelQuality,
    Report,
    model_quality,
    output_error,
)
from uhd_export.calibration.sequences import (
    build_sequences,
    choose,
    conversation_ids,
    greedy_tokens,
)
from uhd_export.calibration.work import Work
from uhd_export.checkpoint.config import read_config
from uhd_export.checkpoint.options import ImageOptions, SourceOptions
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.nano.tokenizer import build_tokenizer
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.language.pairs import Pair, Turn, read_pairs
from uhd_export.runtime.language.prompt import IMAGE_ID
from uhd_export.runtime.terminal.quality_report import summary_lines


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    return "red.png"


def _lines(folder, *records):
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return path


def test_both_formats_are_read(tmp_path, picture):
    talk = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "Red."},
        {"from": "human", "value": "Sure?"},
    ]
    path = _lines(
        tmp_path,
        {"image": picture, "question": "Which colour?", "answer": "red"},
        {"id": 7, "image": picture, "conversations": talk},
        "",
        {"image": None, "question": "No picture?"},
        {"image": [picture, picture], "question": "<image> or <image>?"},
    )
    one, two, three, four = read_pairs(path)
    assert one.turns == (Turn("Which colour?", "red"),)
    assert one.images == (tmp_path / picture,)
    assert two.turns == (Turn("<image>\nWhat is it?", "Red."), Turn("Sure?", None))
    assert (three.images, three.turns) == ((), (Turn("No picture?", None),))
    assert three.where.endswith("line 4")
    assert len(four.images) == 2


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("not json", "line 2: not a JSON object"),
        ("[1]", "line 2: not a JSON object; a JSON array becomes JSONL"),
        ({"question": "?"}, "line 2: field image is missing"),
        ({"image": "none.png", "question": "?"}, "line 2: image .*none.png: no such file"),
        (
            {"image": "data:image/png;base64," + "A" * 9000, "question": "?"},
            r"line 2: image .{200}\.\.\.: File name too long; .*data URIs and addresses are not taken",
        ),
        ({"image": 3, "question": "?"}, "line 2: field image must be a path"),
        ({"image": "red.png"}, "line 2: field question"),
        ({"image": "red.png", "question": " "}, "line 2: field question"),
        ({"image": "red.png", "question": "?", "answer": 3}, "line 2: field answer"),
        ({"image": "red.png", "question": "<image><image>"}, "line 2: 2 <image> markers for 1 images"),
        ({"image": "red.png", "conversations": []}, "line 2: conversations must alternate"),
        ({"image": "red.png", "conversations": ["x"]}, "line 2: field conversations"),
        ({"image": "red.png", "conversations": [{"from": "gpt", "value": "x"}]}, "line 2: .*human first"),
        ({"image": "red.png", "conversations": [{"from": "human"}]}, "line 2: field value"),
    ],
)
def test_errors_name_the_line(tmp_path, picture, record, message):
    path = _lines(tmp_path, {"image": picture, "question": "?"}, record)
    with pytest.raises(UhdError, match=message):
        read_pairs(path)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path, picture):
    path = _lines(tmp_path, {"image": picture, "question": "?"})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_pairs(path)) == 1


def test_data_files_that_are_missing_or_empty(tmp_path):
    with pytest.raises(UhdError, match="no such file"):
        read_pairs(tmp_path / "none.jsonl")
    with pytest.raises(UhdError, match="holds no image-question pair"):
        read_pairs(_lines(tmp_path, ""))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UhdError, match="not readable as text"):
        read_pairs(tmp_path / "binary.jsonl")


def test_card_pairs_depend_on_their_seed_alone():
    one, two, other = card_pairs(2, 0), card_pairs(2, 0), card_pairs(2, 1)
    assert [pair.turns for pair in one] == [pair.turns for pair in two]
    assert one[0].images[0].tobytes() == two[0].images[0].tobytes()
    assert one[0].images[0].tobytes() != other[0].images[0].tobytes()
    assert one[0].turns[0].answer.isdigit()


def test_conversations_become_ids(tokenizer):
    pair = Pair((Image.new("RGB", (9, 9)),), (Turn("Which?", "12"), Turn("And?", "3")), "here")
    ids, prompt = conversation_ids(tokenizer, pair, "vicuna_v1", 2)
    assert ids.count(IMAGE_ID) == 1
    assert ids[0] == 1
    assert ids.count(1) == 1
    assert ids[-1] == 2
    text = tokenizer.decode([i for i in ids if i != IMAGE_ID], skip_special_tokens=False)
    assert text.endswith("ASSISTANT:12</s>USER: And? ASSISTANT:3</s>")
    assert tokenizer.decode([i for i in ids[:prompt] if i != IMAGE_ID]).endswith("Which? ASSISTANT:")
    unanswered, prompt = conversation_ids(tokenizer, Pair((), (Turn("Which?", None),), ""), "vicuna_v1", 2)
    assert len(unanswered) == prompt
    assert IMAGE_ID not in unanswered


def test_a_marker_of_a_later_turn_is_the_only_one(tokenizer):
    turns = (Turn("Hello?", "Yes."), Turn("<image>\nWhich?", "12"))
    ids, prompt = conversation_ids(tokenizer, Pair((Image.new("RGB", (9, 9)),), turns, ""), "vicuna_v1", 2)
    assert (ids[:prompt].count(IMAGE_ID), ids.count(IMAGE_ID)) == (0, 1)


def test_too_few_pairs_are_refused():
    with pytest.raises(UhdError, match=r"too few samples: 3 image-question pairs, 4 to calibrate"):
        choose(card_pairs(3, 0), CalibrationOptions(samples=4, held_out=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 3}, "samples 3: too few"),
        ({"held_out": 0}, "held-out 0"),
        ({"length": 0}, "length 0: must be at least 1"),
        ({"length": 4097}, "length 4097: .*context of 4096"),
        ({"seed": -1}, "seed -1: must be 0 or more"),
        ({"batch": 0}, "batch 0: must be at least 1"),
        ({"questions": -1}, "questions -1: must be 0 or more"),
    ],
)
def test_calibration_options_out_of_range(options, message):
    with pytest.raises(UhdError, match=message):
        CalibrationOptions(**options).check_context(4096)


def test_calibration_options_at_their_limits():
    CalibrationOptions(samples=4, held_out=1, length=4096, seed=0, batch=1, questions=0).check_context(4096)


@pytest.mark.parametrize("damp", [0, 1])
def test_gptq_options_out_of_range(damp):
    with pytest.raises(UhdError, match=f"damp {damp}: must be between 0 and 1"):
        GptqOptions(damp=damp)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=7), st.integers(1, 4))
def test_batches_cover_every_row_once(lengths, size):
    rows = torch.arange(sum(lengths) * 2, dtype=torch.float32).reshape(-1, 2)
    activations = Activations(rows.clone(), tuple(lengths))
    seen = []
    for batch in activations.batches(size):
        assert batch.padded.shape == (len(batch.lengths), max(batch.lengths), 2)
        assert batch.mask.sum(1).tolist() == list(batch.lengths)
        assert (batch.padded[~batch.mask] == 0).all()
        seen.append(batch.real(batch.padded))
        batch.replace(batch.padded + 1)
    assert torch.equal(torch.cat(seen), rows)
    assert torch.equal(activations.rows, rows + 1)
    last = activations.last_rows((1,) * len(lengths))
    ends = torch.tensor(lengths).cumsum(0) - 1
    assert torch.equal(last, activations.rows[ends])


@pytest.fixture(scope="module")
def golden(golden_checkpoint):
    checkpoint = Checkpoint(golden_checkpoint)
    yield checkpoint, read_config(golden_checkpoint, SourceOptions(vision_tower=golden_checkpoint / "clip"))
    checkpoint.close()


def _pairs(count):
    rng = np.random.default_rng(0)
    pairs = []
    for index in range(count):
        size = (int(rng.integers(60, 300)), int(rng.integers(60, 300)))
        image = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
        pairs.append(Pair((image,), (Turn(f"Which number is {index}?", str(index)),), f"pair {index}"))
    return pairs


def _sequences(golden, tokenizer, pairs, options):
    checkpoint, config = golden
    settings = config.settings(ImageOptions())
    return build_sequences(checkpoint, config, settings, tokenizer, pairs, options, lambda done, total: None)


@pytest.mark.slow
def test_sequences_are_what_the_model_sees(golden, golden_model, tokenizer):
    pairs = _pairs(6)
    options = CalibrationOptions(samples=4, held_out=1, length=400, seed=3)
    sequences = _sequences(golden, tokenizer, pairs, options)
    order = np.random.default_rng(3).permutation(6)
    model = golden_model()
    embeds = []
    for index in order[1:5]:
        ids, _ = conversation_ids(tokenizer, pairs[index], "vicuna_v1", 2)
        embeds.append(model.inputs_embeds(pairs[index].images[0], ids)[0])
    assert sequences.calibration.lengths == tuple(len(e) for e in embeds)
    torch.testing.assert_close(sequences.calibration.rows, torch.cat(embeds), atol=1e-5, rtol=0)
    ids, prompt = conversation_ids(tokenizer, pairs[order[0]], "vicuna_v1", 2)
    tokens = model.generate_ids(pairs[order[0]].images[0], ids[:prompt], 16)
    assert sequences.judged == (len(tokens),)
    expected = model.inputs_embeds(pairs[order[0]].images[0], ids[:prompt] + tokens[:-1])[0]
    torch.testing.assert_close(sequences.held_out.rows, expected, atol=1e-5, rtol=0)


def test_images_may_come_in_several_turns(golden, tokenizer):
    options = CalibrationOptions(samples=4, held_out=1, length=1024)
    turns = (Turn("<image>\nWhich?", "1"), Turn("<image>\nAnd this?", "2"))
    one, two = (pair.images[0] for pair in _pairs(2))
    pairs = [Pair((one, two), turns, f"pair {number}") for number in range(5)]
    sequences = _sequences(golden, tokenizer, pairs, options)
    further = sequences.calibration.lengths[0] - sequences.held_out.lengths[0]
    assert further > 100  # the second image's tokens, where only the first is asked about
    wrong = [Pair((one, two), turns[:1], "pair of one marker")] * 5
    with pytest.raises(UhdError, match="pair of one marker: "):
        _sequences(golden, tokenizer, wrong, options)


def test_greedy_tokens_end_after_end_of_text(golden_model):
    class Ends(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner, self.model, self.config = model, model.model, model.config
            self.new_cache = model.new_cache

        def forward(self, x, cache, last_only):
            logits = self.inner(x, cache, last_only=last_only)
            return torch.nn.functional.one_hot(torch.tensor([[2]]), logits.shape[-1]).float()

    language = golden_model().language
    assert greedy_tokens(Ends(language), torch.zeros(3, 256), 5) == [2]
    assert len(greedy_tokens(language, torch.zeros(3, 256), 5)) == 5


def test_long_prompts_are_passed_over_and_counted(golden, tokenizer):
    options = CalibrationOptions(samples=4, held_out=1, length=150)
    with pytest.raises(
        UhdError, match=r"too few samples: 6 of 6 prompts are longer than 150 positions, 0 of 4"
    ):
        _sequences(golden, tokenizer, _pairs(6), options)


def test_an_unreadable_image_is_named_by_its_line(golden, tokenizer, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    pairs = read_pairs(_lines(tmp_path, *[{"image": "broken.png", "question": "?"}] * 5))
    with pytest.raises(UhdError, match=r"pairs.jsonl line \d: .*broken.png"):
        _sequences(golden, tokenizer, pairs, CalibrationOptions(samples=4, held_out=1))


def test_layers_run_the_same_in_any_batch(golden):
    checkpoint, config = golden
    layer = load_layer(checkpoint, config.language, 1)
    rng = torch.Generator().manual_seed(0)
    sequences = [torch.randn(n, 256, generator=rng) for n in (5, 9, 3)]
    one, three = Activations.join(sequences), Activations.join(sequences)
    inputs = [
        torch.cat(
            list(LayerRunner(config.language, 9, batch).inputs(layer, Activations.join(sequences), name))
        )
        for batch in (1, 3)
        for name in ("self_attn.o_proj", "mlp.down_proj")
    ]
    torch.testing.assert_close(inputs[0], inputs[2], atol=1e-5, rtol=0)
    torch.testing.assert_close(inputs[1], inputs[3], atol=1e-5, rtol=0)
    assert inputs[1].shape == (17, 512)
    seen = {}
    LayerRunner(config.language, 9, 1).advance(layer, one)
    LayerRunner(config.language, 9, 3).advance(layer, three, lambda name, rows: seen.update({name: rows}))
    torch.testing.assert_close(one.rows, three.rows, atol=1e-5, rtol=0)
    assert set(seen) == {group[0] for group in GROUPS}
    torch.testing.assert_close(seen["mlp.down_proj"], inputs[1], atol=1e-5, rtol=0)
    whole = layer(sequences[1][None], *LayerRunner(config.language, 9)._tables, [None], 0)[0]
    torch.testing.assert_close(one.rows[5:14], whole, atol=1e-5, rtol=0)


def test_output_error_is_relative_and_squared():
    x = torch.eye(3)
    dense = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 2.0]])
    quantized = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.5]])
    assert output_error(x, dense, quantized) == pytest.approx(1.5**2 / 9)
    assert output_error(x * 0, dense, quantized) == 0


def test_model_quality_of_equal_and_of_other_logits():
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(1))
    same = model_quality(logits, logits + 3)
    assert (same.tokens, same.agreement) == (5, 1.0)
    assert same.kl == pytest.approx(0, abs=1e-9)
    expected, actual = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, np.log(3.0)]])
    assert model_quality(expected, actual).kl == pytest.approx(
        0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    )


def _report(layers=3):
    linears = tuple(
        LinearQuality(layer, name, 8, 64, 100, "few" if layer == 1 else None, 1e-2 / (layer + 1), 4e-3)
        for layer in range(layers)
        for group in GROUPS
        for name in group
    )
    quality = ModelQuality(32, 0.1, 0.9)
    accuracy = Accuracy(20, {"before": 20, "gptq": 19})
    return Report(
        {"gptq": {"group": 64}}, {"torch": "x"}, 100, 20, 1000, 300, quality, quality, accuracy, linears
    )


def test_reports_survive_json_and_name_fallbacks():
    report = _report()
    head = replace(report, int8_head=ModelQuality(32, 0.2, 0.8))
    for one in (report, head):
        assert Report.from_json(json.loads(json.dumps(one.to_json()))) == one
    earlier = {name: value for name, value in report.to_json().items() if name != "int8_head"}
    assert Report.from_json(earlier) == report
    lines = "\n".join(summary_lines(head.to_json()))
    assert "GPTQ and an int8 head: KL divergence 2.00e-01, same likeliest token at 80.0%" in lines
    assert "int8 head" not in "\n".join(summary_lines(earlier))
    assert report.fallbacks[0] == "model.layers.1.self_attn.q_proj: few"
    assert len(report.fallbacks) == 7
    assert report.mean_gptq_error == pytest.approx(4e-3)


@pytest.mark.parametrize("layers", [1, 3, 40])
def test_the_picture_shows_both_methods(tmp_path, layers):
    draw_report(_report(layers), tmp_path / "report.png")
    with Image.open(tmp_path / "report.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
    assert {(214, 116, 66), (46, 108, 190)} <= colours
    assert list(tmp_path.iterdir()) == [tmp_path / "report.png"]


def test_memory_is_estimated_before_anything_starts(golden, monkeypatch):
    _, config = golden
    options = CalibrationOptions(samples=8, held_out=2, length=1024)
    estimate = estimate_memory(config, options, 0)
    assert (
        estimate_memory(config, CalibrationOptions(samples=80, held_out=2, length=1024), 0).total
        > estimate.total
    )
    monkeypatch.setattr("uhd_export.calibration.estimate.available_memory", lambda: estimate.total - 1)
    with pytest.raises(UhdError, match=r"about 1\.\d GB of memory .* lower --samples or --length"):
        require_memory(config, options, 0)
    asked = estimate_memory(config, options, 10)
    assert asked.total > estimate.total
    monkeypatch.setattr("uhd_export.calibration.estimate.available_memory", lambda: asked.total - 1)
    with pytest.raises(UhdError, match=r"GB of it for whole models in float32.* use --eval 0"):
        require_memory(config, options, 10)
    monkeypatch.setattr("uhd_export.calibration.estimate.available_memory", lambda: estimate.total - 1)
    with pytest.raises(UhdError, match=r"for activations.* lower --samples or --length"):
        require_memory(config, options, 10)  # without questions it would not fit either
    monkeypatch.setattr("uhd_export.calibration.estimate.available_memory", lambda: None)
    assert require_memory(config, options, 0) == estimate


def test_unfinished_work_is_found_again_or_dropped(tmp_path):
    said = []
    work = Work(tmp_path / "work")
    work.prepare({"settings": 1, "data": "a"}, said.append)
    states = {"held_out": Activations(torch.ones(3, 2), (1, 2))}
    work.save_activations(2, states, (1, 1))
    work.save_layer(0, {"w": np.ones(2, np.int32)}, [_report().linears[0]])
    again = Work(tmp_path / "work")
    again.prepare({"settings": 1, "data": "a"}, said.append)
    layer, loaded, judged = again.load_activations()
    assert (layer, judged, loaded["held_out"].lengths) == (2, (1, 1), (1, 2))
    assert torch.equal(loaded["held_out"].rows, states["held_out"].rows)
    assert again.layer_quality(0) == [_report().linears[0]]
    assert not list(work.folder.glob("*.partial"))
    assert said == []
    again.prepare({"settings": 2, "data": "a"}, said.append)
    assert "of other settings: starting anew" in said[0]
    assert again.load_activations() is None


def test_half_written_work_is_not_taken_for_finished(tmp_path):
    work = Work(tmp_path / "work")
    work.prepare({}, print)
    work.save_activations(1, {"held_out": Activations(torch.ones(300, 2), (300,))}, (1,))
    path = work.folder / "activations.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert work.load_activations() is None
    work.save_layer(0, {"w": np.ones(200, np.int32)}, [])
    work.layer_file(0).write_bytes(work.layer_file(0).read_bytes()[:-100])
    with pytest.raises(UhdError, match=r"layer-00000.safetensors: missing or damaged"):
        work.layer_quality(0)


def test_where_paths_start_is_refused_without_the_data_that_has_them(tmp_path):
    with pytest.raises(UhdError, match=r"image-root .*: is where paths of --data start; give both"):
        CalibrationOptions(image_root=tmp_path)
    CalibrationOptions(data=tmp_path / "pairs.jsonl", image_root=tmp_path)
