"""The language part of a GPTQ checkpoint alone, as other programs open it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.quantizing import noise_pairs, quantize_options
from tokenizers import Tokenizer

from uhd_export import load_model
from uhd_export.calibration.language_part import extract_language
from uhd_export.calibration.quantize import quantize
from uhd_export.checkpoint.int4.gptq import open_checkpoint
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.model.reference import embedding_rows
from uhd_export.runtime.bundle.manifest import QUALITY
from uhd_export.runtime.errors import UhdError


@pytest.fixture(scope="module")
def language_part(quantized, tmp_path_factory):
    out = tmp_path_factory.mktemp("language") / "out"
    extract_language(quantized[0], out)
    return out


def _as_qwen2(folder, target):
    """The GPTQ checkpoint in `folder` as if it were Qwen2's: biases on q, k and v."""
    shutil.copytree(folder, target)
    raw = json.loads((target / "config.json").read_text())
    raw |= {"model_type": "llava_qwen2", "eos_token_id": [2, 3]}
    (target / "config.json").write_text(json.dumps(raw))
    index = json.loads((target / "model.safetensors.index.json").read_text())
    for layer in range(2):
        biases = {
            f"model.layers.{layer}.self_attn.{name}.bias": torch.full((width,), 0.1, dtype=torch.float16)
            for name, width in (("q_proj", 256), ("k_proj", 256), ("v_proj", 256))
        }
        save_file(biases, target / f"biases-{layer}.safetensors", {"format": "pt"})
        index["weight_map"] |= dict.fromkeys(biases, f"biases-{layer}.safetensors")
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    return target


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_language_part_alone_opens_as_a_causal_language_model(quantized, language_part, tmp_path, kind):
    pytest.importorskip("optimum")
    from transformers import AutoModelForCausalLM

    whole, part = quantized[0], language_part
    if kind == "qwen2":
        whole, part = _as_qwen2(whole, tmp_path / "whole"), tmp_path / "part"
        extract_language(whole, part)
    raw = json.loads((part / "config.json").read_text())
    tokens = Tokenizer.from_file(str(part / "tokenizer.json")).get_vocab_size()
    assert (raw["model_type"], raw["vocab_size"]) == (kind, tokens)
    theirs = AutoModelForCausalLM.from_pretrained(part, dtype=torch.float32, device_map="cpu")
    assert type(theirs).__name__ == raw["architectures"][0]
    assert theirs.get_input_embeddings().weight.shape[0] == theirs.lm_head.weight.shape[0] == tokens
    layer = theirs.get_submodule("model.layers.0.self_attn.q_proj")
    assert type(layer).__module__.startswith("gptqmodel")
    checkpoint = open_checkpoint(whole)
    ours = load_model(whole, vision_tower=whole / "clip")
    ids = [1, 5, 6, 40, 41, 42, 9, 3]
    with torch.inference_mode():
        expected = ours.language(torch.from_numpy(embedding_rows(checkpoint, ids))[None])
        logits = theirs(input_ids=torch.tensor([ids])).logits
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() < 0.03 * expected.abs().max()  # they dequantize in float16


def test_the_language_part_holds_its_tensors_bit_for_bit_and_nothing_else(quantized, language_part):
    before, after = Checkpoint(quantized[0]), Checkpoint(language_part)
    outside = ("model.vision_tower.", "model.mm_projector.")
    assert after.names() == {name for name in before.names() if not name.startswith(outside)}
    rows = json.loads((language_part / "config.json").read_text())["vocab_size"]
    for name in after.names():
        stored = before.stored(name)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert len(stored) > rows
            stored = stored[:rows]
        assert torch.equal(after.stored(name), stored)
    settings = [json.loads((f / "config.json").read_text())["quantization_config"]
                for f in (quantized[0], language_part)]  # fmt: skip
    assert settings[0] == settings[1]
    assert (language_part / "tokenizer.json").is_file() and (language_part / QUALITY).is_file()
    assert not any(path.is_dir() for path in language_part.iterdir())
    assert not list(language_part.parent.glob(".*"))


@pytest.mark.slow
def test_quantizing_for_the_language_part_alone_gives_the_same(source, language_part, tmp_path):
    quantize(
        source, tmp_path / "out", options=quantize_options(source, language_only=True), pairs=noise_pairs()
    )
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    for path in language_part.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes() or path.name == QUALITY


def test_a_language_part_is_of_a_quantized_checkpoint_in_a_new_folder(source, quantized, tmp_path):
    with pytest.raises(UhdError, match="is not quantized; `uhd-export quantize` it first"):
        extract_language(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UhdError, match="exists already"):
        extract_language(quantized[0], quantized[0])


def test_a_folder_called_nano_is_not_the_embedded_model(quantized, tmp_path, monkeypatch):
    """And its configuration may be another one."""
    shutil.copytree(quantized[0], tmp_path / "nano")
    raw = json.loads((quantized[0] / "config.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(raw | {"rope_theta": 5e5}))
    monkeypatch.chdir(tmp_path)
    extract_language(Path("nano"), "out", config="other.json")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_theta"] == 5e5


def test_a_link_out_of_the_checkpoint_is_not_followed(quantized, tmp_path):
    shutil.copytree(quantized[0], tmp_path / "checkpoint")
    (tmp_path / "private").write_text("private")
    (tmp_path / "checkpoint" / "NOTICE").symlink_to(tmp_path / "private")
    with pytest.raises(UhdError, match="NOTICE is a link that leads out of it"):
        extract_language(tmp_path / "checkpoint", tmp_path / "out")
