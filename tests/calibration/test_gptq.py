"""GPTQ end to end on small models: the solver, the loop over layers, resuming, and the checkpoint written."""

import importlib.metadata
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import faults
from support.folders import leftovers
from support.quantizing import noise_pairs, quantize_options
from torch import nn

from uhd_export import load_model
from uhd_export.bundle.build import build_bundle
from uhd_export.bundle.options import BuildOptions
from uhd_export.bundle.staging import staged_folder
from uhd_export.calibration.activations import Activations
from uhd_export.calibration.gptq import CALIBRATION, HELD_OUT, WITH_GPTQ, Run
from uhd_export.calibration.options import CalibrationOptions, GptqOptions, QuantizeOptions
from uhd_export.calibration.quality import Report, output_error
from uhd_export.calibration.quantize import _fingerprint, quantize
from uhd_export.calibration.sequences import Sequences, build_sequences
from uhd_export.calibration.solver import GroupSolver
from uhd_export.calibration.work import Work
from uhd_export.calibration.writer import bytes_beside_layers, files_beside_weights, write_shards
from uhd_export.checkpoint.config import read_config
from uhd_export.checkpoint.int4.gptq import GptqCheckpoint, open_checkpoint
from uhd_export.checkpoint.int4.weight import round_to_nearest
from uhd_export.checkpoint.options import ImageOptions, SourceOptions
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.checkpoint.source import EMBEDDED
from uhd_export.checkpoint.tokenizer import checkpoint_tokenizer
from uhd_export.graph.int4.options import WeightOptions
from uhd_export.model.language import LanguageModel
from uhd_export.model.reference import embedding_rows
from uhd_export.nano.cards import NAMES, make_card_image, question
from uhd_export.runtime.bundle import manifest as manifests
from uhd_export.runtime.bundle.integrity import verify_files
from uhd_export.runtime.bundle.manifest import MANIFEST, QUALITY, QUALITY_CHART, read_manifest
from uhd_export.runtime.config import LanguageConfig
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.language.pairs import Pair, Turn

try:
    importlib.metadata.version("gptqmodel")
    INSTALLED = True
except importlib.metadata.PackageNotFoundError:
    INSTALLED = False
needs_library = pytest.mark.skipif(not INSTALLED, reason="gptqmodel is not installed")


def _correlated(rows, columns, seed):
    """Inputs that share directions, as real activations do: rounding errors can make up for each other."""
    mix = torch.randn(columns // 4, columns, generator=torch.Generator().manual_seed(9))
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns // 4, generator=rng) @ mix + 0.2 * torch.randn(
        rows, columns, generator=rng
    )


def _linear(outputs, inputs, seed):
    linear = nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
    linear.weight.data = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))
    return linear


@needs_library
@pytest.mark.parametrize(
    "options",
    [
        GptqOptions(group=32),
        GptqOptions(group=64, symmetric=False),
        GptqOptions(group=32, act_order=True),
        GptqOptions(group=64, symmetric=False, act_order=True),
    ],
)
def test_the_solver_beats_rounding_and_shares_statistics(options):
    linears = {"q": _linear(16, 128, 0), "k": _linear(24, 128, 1)}
    dense = {name: linear.weight.clone() for name, linear in linears.items()}
    solver = GroupSolver(linears, options, 600)
    for seed in (2, 3):
        solver.add(_correlated(300, 128, seed))
    solved = solver.solve()
    held_out = _correlated(300, 128, 4)
    for name, result in solved.items():
        assert (result.samples, result.fallback) == (600, None)
        weight = result.weight
        assert weight.codes.shape == dense[name].shape
        assert (weight.order is not None) == options.act_order
        assert weight.symmetric == options.symmetric
        rounded = round_to_nearest(dense[name].numpy(), options.group, symmetric=options.symmetric)
        gptq, rtn = (
            output_error(held_out, dense[name], torch.from_numpy(w.dequantize())) for w in (weight, rounded)
        )
        assert gptq < 0.5 * rtn


@needs_library
def test_a_layer_that_saw_too_little_is_rounded_and_named():
    linear = _linear(16, 64, 0)
    solver = GroupSolver({"q": linear}, GptqOptions(group=32), 100_000)
    solver.add(_correlated(30, 64, 1))
    (solved,) = solver.solve().values()
    assert solved.samples == 30
    assert solved.fallback == "saw 30 of 100,000 tokens"
    np.testing.assert_array_equal(
        solved.weight.dequantize(), round_to_nearest(linear.weight.numpy(), 32).dequantize()
    )


@needs_library
def test_statistics_that_cannot_be_factorised_are_the_reason_given():
    solver, rows = GroupSolver({"q": _linear(16, 64, 0)}, GptqOptions(group=32), 300), torch.ones(300, 64)
    rows[3, 5] = float("inf")
    solver.add(rows)
    (solved,) = solver.solve().values()
    assert (solved.samples, solved.fallback) == (300, "its statistics could not be factorised")


def test_the_install_line_is_given_where_the_library_is_missing(monkeypatch, golden_checkpoint, tmp_path):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("uhd_export.calibration.solver.importlib.metadata.version", missing)
    with pytest.raises(UhdError, match=r"pip install 'uhd-export\[gptq\]'; --weights int4-rtn needs neither"):
        quantize(golden_checkpoint, tmp_path / "out")


CONFIG = LanguageConfig(
    kind="llama", hidden=64, intermediate=128, layers=3, heads=4, kv_heads=2, head_size=16, vocab=48,
    context=256, eps=1e-5, rope_theta=1e4, tied=False, bos=1, eos=(2,),
)  # fmt: skip


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A random language model on disk."""
    torch.manual_seed(0)
    model = LanguageModel(CONFIG)
    folder = tmp_path_factory.mktemp("language")
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter) / 8
        parameter.data = 1 + noise if "norm" in name else noise
    save_file({name: p.data for name, p in model.named_parameters()}, folder / "model.safetensors")
    checkpoint = Checkpoint(folder)
    yield checkpoint
    checkpoint.close()


def _states():
    lengths = (40, 25, 33, 40)
    rows = _correlated(sum(lengths), 64, 5)
    held = Activations(_correlated(30, 64, 6), (18, 12))
    return Run.states_of(Sequences(Activations(rows, lengths), held, (2, 3)))


def _run(language, folder, batch=1, **options):
    work = Work(folder)
    work.prepare({}, print)
    return Run(language, CONFIG, GptqOptions(group=32, **options), work, _states(), (2, 3), batch)


def _tensors(run):
    return {
        name: tensor
        for layer in range(CONFIG.layers)
        for name, tensor in load_file(run.work.layer_file(layer)).items()
    }


@needs_library
def test_every_layer_is_quantized_and_better_than_rounding(language, tmp_path):
    run = _run(language, tmp_path / "work")
    steps = []
    run.quantize_layers(lambda *step: steps.append(step))
    assert steps == [(done, 12) for done in range(1, 13)]
    records = run.records()
    assert [(r.layer, r.module) for r in records[:2]] == [(0, "self_attn.q_proj"), (0, "self_attn.k_proj")]
    assert len(records) == 21
    assert {r.samples for r in records} == {138}
    assert np.mean([r.gptq_error for r in records]) < np.mean([r.rtn_error for r in records])
    assert len(_tensors(run)) == 21 * 4
    rtn, gptq, rounded_head = run.model_qualities()
    assert rtn.tokens == gptq.tokens == rounded_head.tokens == 5
    assert 0 < gptq.kl < 10
    assert rounded_head.kl == pytest.approx(gptq.kl, rel=0.2) and rounded_head.kl != gptq.kl


@needs_library
def test_what_later_layers_see_is_what_is_stored(language, tmp_path):
    """The states that run along are those of a model with the stored weights."""
    run = _run(language, tmp_path / "work")
    run.quantize_layers(lambda done, total: None)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    rest = {n: language.tensor(n) for n in language.names() if "proj" not in n}
    save_file(_tensors(run) | rest, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    checkpoint = GptqCheckpoint(folder)
    model = LanguageModel(CONFIG)
    checkpoint.load_into(model, "", torch.float32)
    before = _states()[HELD_OUT]
    logits = [
        model(rows[None])[0, -n:] for rows, n in zip(before.rows.split(before.lengths), (2, 3), strict=True)
    ]
    whole = model.lm_head(model.model.norm(run.states[WITH_GPTQ].last_rows((2, 3))))
    torch.testing.assert_close(torch.cat(logits), whole, atol=1e-4, rtol=1e-4)


@needs_library
def test_values_that_are_not_finite_are_named(language, tmp_path):
    run = _run(language, tmp_path / "work")
    run.states[HELD_OUT].rows[3, 5] = float("nan")
    with pytest.raises(UhdError, match=r"model.layers.0.self_attn.q_proj: .*not finite"):
        run.quantize_layers(lambda done, total: None)


@needs_library
def test_padding_adds_nothing(language, tmp_path):
    one, four = _run(language, tmp_path / "one"), _run(language, tmp_path / "four", batch=4)
    for run in (one, four):
        run.quantize_layers(lambda done, total: None)
    assert {r.samples for r in four.records()} == {138}
    torch.testing.assert_close(
        one.states[CALIBRATION].rows, four.states[CALIBRATION].rows, atol=0.05, rtol=0.05
    )
    differing = sum((a != _tensors(four)[n]).sum().item() for n, a in _tensors(one).items() if "qweight" in n)
    assert differing <= 20  # a code may tip where sums are rounded in another order


class _Stop(Exception):
    pass


@needs_library
@pytest.mark.parametrize("step", [2, 4, 7])
def test_interrupted_work_continues_to_the_same_result(language, tmp_path, step):
    whole = _run(language, tmp_path / "whole")
    whole.quantize_layers(lambda done, total: None)
    run, done = _run(language, tmp_path / "work"), []

    def interrupt(*progress):
        done.append(progress)
        if len(done) == step:
            raise _Stop

    with pytest.raises(_Stop):
        run.quantize_layers(interrupt)
    saved = run.work.load_activations()
    if step <= 4:
        assert saved is None
        again = _run(language, tmp_path / "work")
    else:
        assert saved[0] == 1
        again = Run(language, CONFIG, run.options, run.work, saved[1], saved[2], 1, saved[0])
    further = []
    again.quantize_layers(lambda *progress: further.append(progress))
    assert further == [(count, 12) for count in range(1 if saved is None else 5, 13)]
    assert {n: t.tolist() for n, t in _tensors(again).items()} == {
        n: t.tolist() for n, t in _tensors(whole).items()
    }
    assert again.records() == whole.records()


def test_the_checkpoint_holds_everything_else_as_it_was(source, quantized):
    out, _ = quantized
    before, after = Checkpoint(source), open_checkpoint(out)
    assert isinstance(after, GptqCheckpoint)
    assert after.names() == before.names()
    changed = {n for n in before.names() if not torch.equal(before.tensor(n), after.tensor(n))}
    assert len(changed) == 14
    assert all(after.is_quantized(n.removesuffix(".weight")) for n in changed)
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert (out / "clip" / "config.json").is_file()
    raw = json.loads((out / "config.json").read_text())
    settings = raw.pop("quantization_config")
    assert raw == json.loads((source / "config.json").read_text())
    assert (settings["bits"], settings["group_size"], settings["sym"], settings["desc_act"]) == (
        4,
        64,
        True,
        False,
    )
    assert all(after.symmetric(n.removesuffix(".weight")) and after.order(n.removesuffix(".weight")) is None
               for n in changed)  # fmt: skip
    assert not list(out.parent.glob(".*"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {p.name for p in out.glob("*.safetensors")}


def test_room_is_asked_for_what_is_written(source, quantized):
    """The finished layers lie in the work folder already."""
    layers = {"qweight", "qzeros", "scales", "g_idx"}
    rest = sum(
        tensor.nbytes
        for path in quantized[0].glob("*.safetensors")
        for name, tensor in load_file(path).items()
        if name.rpartition(".")[2] not in layers
    )
    language = read_config(source, SourceOptions(vision_tower=source / "clip")).language
    assert bytes_beside_layers(Checkpoint(source), language) == rest


def test_the_report_is_beside_it(quantized):
    out, report = quantized
    assert Report.from_json(json.loads((out / QUALITY).read_text())) == report
    assert report.fallbacks == ()
    assert report.mean_gptq_error < 0.75 * report.mean_rtn_error
    assert report.gptq.kl < report.rtn.kl
    head = report.int8_head
    assert head is not None and head.tokens == report.gptq.tokens
    assert 0 < abs(head.kl - report.gptq.kl) < 0.5 * report.gptq.kl
    assert report.settings["gptq"]["group"] == 64
    layer_bytes = sum(
        tensor.nbytes
        for path in out.glob("*.safetensors")
        for name, tensor in load_file(path).items()
        if name.endswith(("qweight", "qzeros", "scales", "g_idx"))
    )
    assert report.bytes_after == layer_bytes
    with Image.open(out / QUALITY_CHART) as picture:
        assert picture.width > 1000


def test_the_model_loads_from_it(quantized, source):
    out, _ = quantized
    model = load_model(out, vision_tower=out / "clip")
    original = load_model(source, vision_tower=source / "clip")
    image = noise_pairs()[0].images[0]
    prompt = [1, -200, 5, 6]
    logits, expected = model.logits(image, prompt), original.logits(image, prompt)
    assert torch.equal(model.encode_image(image)[0], original.encode_image(image)[0])
    error = ((logits - expected).norm() / expected.norm()).item()
    assert 1e-3 < error < 0.3


def test_transformers_loads_the_language_model(quantized):
    pytest.importorskip("optimum")
    from transformers import LlamaForCausalLM

    out, _ = quantized
    theirs = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32, device_map="cpu")
    checkpoint = open_checkpoint(out)
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        layer = theirs.get_submodule(module)
        assert type(layer).__module__.startswith("gptqmodel")
        # They dequantize in float16.
        expected = checkpoint.tensor(f"{module}.weight", torch.float16)
        assert torch.equal(layer.dequantize_weight().T.to(torch.float16), expected)
    ours = load_model(out, vision_tower=out / "clip").language
    embeds = torch.randn(1, 12, 256, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        logits = ours(embeds)  # of the tokenizer's tokens: padded rows are cut
        error = theirs(inputs_embeds=embeds).logits[..., : logits.shape[-1]] - logits
    assert error.abs().max() < 0.03 * logits.abs().max()


def test_existing_outputs_and_quantized_sources_are_refused(quantized, source, tmp_path):
    out, _ = quantized
    with pytest.raises(UhdError, match="exists already"):
        quantize(source, out, options=quantize_options(source), pairs=noise_pairs())
    with pytest.raises(UhdError, match="is quantized already"):
        quantize(out, tmp_path / "again", options=quantize_options(source), pairs=noise_pairs())


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gptq": GptqOptions(group=48)}, "group size 48: must be one of"),
        ({"calibration": CalibrationOptions(samples=9)}, "too few samples: 6 image-question pairs"),
        ({"calibration": CalibrationOptions(data="/none.jsonl")}, "no such file"),
        ({"calibration": CalibrationOptions(length=5000)}, "length 5000"),
    ],
)
def test_errors_leave_nothing_behind(source, tmp_path, change, message):
    pairs = None if change.get("calibration", CalibrationOptions()).data else noise_pairs()
    with pytest.raises(UhdError, match=message):
        quantize(source, tmp_path / "out", options=quantize_options(source, **change), pairs=pairs)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "layer"), [(2, 0), (5, 1)])
def test_a_whole_run_continues_where_it_stopped(source, quantized, tmp_path, monkeypatch, stop, layer):
    out, said = tmp_path / "out", []
    finished, count = Run.quantize_layers, []

    def stop_early(self, progress):
        def step(done, total):
            assert total == 8
            count.append(done)
            progress(done, total)
            if len(count) == stop:
                raise KeyboardInterrupt

        finished(self, step)

    monkeypatch.setattr(Run, "quantize_layers", stop_early)
    arguments = {"options": quantize_options(source), "pairs": noise_pairs(), "say": said.append}
    with pytest.raises(KeyboardInterrupt):
        quantize(source, out, **arguments)
    assert not out.exists()
    monkeypatch.undo()
    monkeypatch.setattr("uhd_export.calibration.quantize.build_sequences", None)  # they are not built again
    report = quantize(source, out, **arguments)
    assert said == [f"continuing unfinished work at layer {layer} of 2"]
    assert report == quantized[1]
    assert _bytes(out) == _bytes(quantized[0])
    assert not list(out.parent.glob(".*"))


def _bytes(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_shards_hold_no_more_metadata_than_others_expect(quantized):
    """Several keys would be written in random order: two runs would not give the same bytes."""
    for path in quantized[0].glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_tensors_that_are_one_in_memory_are_written_apart(tmp_path):
    """A file of torch.save stores a tied head once, and gives it under both names."""
    table = torch.arange(6.0).reshape(3, 2)
    read = {"embed": table, "head": table, "part": table[:2], "other": torch.ones(2)}
    write_shards(read.__getitem__, sorted(read), tmp_path, lambda done, total: None)
    written = load_file(tmp_path / "model-00001-of-00001.safetensors")
    assert {name: t.tolist() for name, t in written.items()} == {name: t.tolist() for name, t in read.items()}


def test_what_was_made_before_is_taken_where_it_was_made_of_the_same(source, quantized, tmp_path):
    out, said = tmp_path / "out", []
    shutil.copytree(quantized[0], out)
    before = _bytes(out)
    arguments = {"options": quantize_options(source), "reuse": True, "say": said.append}
    assert quantize(source, out, pairs=noise_pairs(), **arguments) == quantized[1]
    assert said == [f"{out}: quantized before, taken as it is"]
    with pytest.raises(UhdError, match="out: was made of other data; delete it, or give it to build"):
        quantize(source, out, pairs=noise_pairs(7), **arguments)
    weights = source / "model.safetensors"
    status = weights.stat()
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(UhdError, match="out: was made of other checkpoint; "):
        quantize(source, out, pairs=noise_pairs(), **arguments)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    right = (source / "tokenizer.json").read_text()
    other = json.loads(right)
    other["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False
    (source / "tokenizer.json").write_text(json.dumps(other))
    try:
        with pytest.raises(UhdError, match="out: was made of other checkpoint; "):
            quantize(source, out, pairs=noise_pairs(), **arguments)
    finally:
        (source / "tokenizer.json").write_text(right)
    assert _bytes(out) == before
    for text in ("{", "{}"):
        (out / QUALITY).write_text(text)
        with pytest.raises(UhdError, match=f"{QUALITY} does not tell what it was made of; delete it"):
            quantize(source, out, pairs=noise_pairs(), **arguments)


def test_data_is_known_again_whatever_path_leads_to_it(tmp_path, monkeypatch):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    absolute, relative = (
        [Pair((path,), (Turn("Which?", None),), "a pair")] for path in (tmp_path / "a.png", Path("a.png"))
    )
    assert _fingerprint(absolute) == _fingerprint(relative)


def test_duplicates_in_the_data_are_counted_and_left_out(source, tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    lines = [{"image": "a.png", "question": question} for question in ("Which?", "What?", "Which?", "Which?")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    calibration = CalibrationOptions(samples=4, held_out=2, length=256, data=tmp_path / "pairs.jsonl")
    options = quantize_options(source, calibration=calibration)
    said = []
    with pytest.raises(UhdError, match="too few samples: 2 image-question pairs"):
        quantize(source, tmp_path / "out", options=options, say=said.append)
    assert said == [f"{tmp_path / 'pairs.jsonl'}: 2 of 4 pairs are duplicates and left out"]


@needs_library
@pytest.mark.parametrize("place", ["file/out", "/proc/out"])
def test_places_that_cannot_be_written_are_named(source, tmp_path, place):
    (tmp_path / "file").touch()
    said = []
    with pytest.raises(UhdError, match=rf"output .*{place}: cannot be written \(.*\); choose another"):
        quantize(
            source, tmp_path / place, options=quantize_options(source), pairs=noise_pairs(), say=said.append
        )
    assert said == []


@needs_library
def test_a_link_out_of_the_checkpoint_is_refused_before_any_work(source, tmp_path, monkeypatch):
    monkeypatch.setattr("uhd_export.calibration.quantize.build_sequences", None)  # would fail if reached
    folder = tmp_path / "checkpoint"
    shutil.copytree(source, folder)
    (tmp_path / "README.md").write_text("private")
    (folder / "README.md").symlink_to(tmp_path / "README.md")
    with pytest.raises(UhdError, match=r"README\.md is a link that leads out of it"):
        quantize(folder, tmp_path / "out", options=quantize_options(source), pairs=noise_pairs())
    assert leftovers(tmp_path) == ["README.md", "checkpoint"]


def test_bundles_in_a_checkpoints_folder_are_not_of_it(source, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(source, folder)
    (folder / "more").mkdir()
    (folder / "more" / "manifest.json").write_text("{}")  # of something else
    with staged_folder(folder / "bundle") as staging:
        record = {"schema_version": 1, "files": {"language.onnx": {}}}
        (staging / MANIFEST).write_text(json.dumps(record | {"digest": manifests._digest(record)}))
        (staging / "language.onnx").touch()
    names = [str(name) for name in files_beside_weights(folder)]
    assert names == ["clip/config.json", "more/manifest.json", "tokenizer.json"]


@needs_library
def test_folders_above_the_output_are_made_and_go_with_a_failure(source, tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("uhd_export.calibration.quantize.build_sequences", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "a" / "b" / "out", options=quantize_options(source), pairs=noise_pairs())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@needs_library
def test_nano_answers_as_before(tmp_path):
    pairs = []
    for index in range(5):
        image, cards = make_card_image((7, index), (672, 336))
        pairs.append(Pair((image,), (Turn(cards[0].question, cards[0].code),), f"card {index}"))
    calibration = CalibrationOptions(samples=4, held_out=1, length=1100, questions=20)
    report = quantize("nano", tmp_path / "out", options=QuantizeOptions(calibration=calibration), pairs=pairs)
    exact = report.accuracy.exact
    assert (report.accuracy.questions, set(exact)) == (20, {"before", "rtn", "gptq"})
    assert exact["before"] >= 19
    assert exact["gptq"] >= exact["before"] - 0.02 * 20
    assert exact["gptq"] >= exact["rtn"]


@pytest.mark.slow
@needs_library
def test_visual_tokens_make_better_calibration_than_text(tmp_path):
    """On the embedded model: GPTQ beats rounding, and beats itself calibrated on as many text tokens."""
    folder = EMBEDDED
    checkpoint, config, tokenizer = Checkpoint(folder), read_config(folder), checkpoint_tokenizer(folder)
    pairs = []
    for index in range(5):
        image, cards = make_card_image((7, index), (672, 336))
        pairs.append(Pair((image,), (Turn(cards[0].question, cards[0].code),), f"card {index}"))
    options = CalibrationOptions(samples=4, held_out=1, length=1024)
    settings = config.settings(ImageOptions())
    seen = []
    visual = build_sequences(
        checkpoint, config, settings, tokenizer, pairs, options, lambda *step: seen.append(step)
    )
    assert seen == [(done, 5) for done in range(1, 6)]
    rng = np.random.default_rng(0)
    talk = [f"{question(str(rng.choice(NAMES)))} {rng.integers(1000):03d}" for _ in range(400)]
    ids = tokenizer.encode(" ".join(talk), add_special_tokens=False).ids
    lengths = visual.calibration.lengths
    assert len(ids) >= sum(lengths)
    text = Activations(torch.from_numpy(embedding_rows(checkpoint, ids[: sum(lengths)])), lengths)
    errors = {}
    for name, calibration in (("visual", visual.calibration), ("text", text)):
        work = Work(tmp_path / name)
        work.prepare({}, print)
        held = Activations(visual.held_out.rows.clone(), visual.held_out.lengths)
        states = Run.states_of(Sequences(calibration, held, visual.judged))
        run = Run(checkpoint, config.language, GptqOptions(group=64), work, states, visual.judged)
        run.quantize_layers(lambda done, total: None)
        errors[name] = np.mean([record.gptq_error for record in run.records()])
    rounded = np.mean([record.rtn_error for record in run.records()])
    assert errors["visual"] < 0.75 * rounded
    assert errors["visual"] < errors["text"]


@pytest.mark.slow
def test_killed_again_and_again_it_comes_to_the_same_bundle(source, quantized, tmp_path):
    """`quantize` on the way of `build --weights int4`, killed at later and later events, until a run ends."""
    out, folder = tmp_path / "out", tmp_path / "out-gptq"

    def make():
        quantize(source, folder, options=quantize_options(source), pairs=noise_pairs(), reuse=True)
        return folder

    def run():
        options = BuildOptions(
            reading=SourceOptions(vision_tower=source / "clip"), weights=WeightOptions("int4")
        )
        build_bundle(source, out, options=options, quantize=make, verify=False)

    lives, number = 0, 2  # of lives that were ended, and of the event that ends the next
    while faults.killed_at(number, tmp_path, run):
        lives, number = lives + 1, number + 4 + 3 * lives
        assert not out.exists() and lives < 12
        # A checkpoint is whole or not there, whatever the moment.
        assert not folder.exists() or _bytes(folder) == _bytes(quantized[0])
    assert lives > 3
    assert _bytes(folder) == _bytes(quantized[0])
    manifest = read_manifest(out)
    verify_files(out, manifest, remembered=False)
    assert manifest.quantization.method == "gptq"
    assert leftovers(tmp_path) == ["out", "out-gptq"]


def test_memory_is_asked_for_before_as_many_images_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("uhd_export.calibration.estimate.available_memory", lambda: 1 << 30)
    monkeypatch.setattr("uhd_export.calibration.quantize.card_pairs", lambda *arguments: pytest.fail("drawn"))
    options = QuantizeOptions(calibration=CalibrationOptions(samples=1_000_000, questions=0))
    with pytest.raises(UhdError, match=r"quantizing needs about .* lower --samples or --length"):
        quantize("nano", tmp_path / "out", options=options)
