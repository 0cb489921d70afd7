import json
import shutil

import pytest
import torch
from golden import recipe
from safetensors.torch import load_file, save_file
from support.refusals import one_line_error

from uhd_export import load_model
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.checkpoint.source import locate
from uhd_export.runtime.errors import UhdError

PROMPT = [1, 5, 9]


@pytest.fixture(scope="module")
def state(golden_checkpoint):
    return load_file(golden_checkpoint / "model.safetensors")


@pytest.fixture
def folder(golden_checkpoint, tmp_path):
    """A copy of the golden checkpoint's configs, without weights."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(golden_checkpoint, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    return copy


def load(folder):
    return load_model(folder, vision_tower=folder / "clip")


def write_shards(folder, state, index=None):
    names = sorted(state)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    weight_map = {}
    for number, half in enumerate(halves, 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: state[name] for name in half}, folder / file)
        weight_map.update(dict.fromkeys(half, file))
    index = {"metadata": {}, "weight_map": weight_map} if index is None else index
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def refused(folder, match):
    with one_line_error(match):
        load(folder)


def test_the_recipe_makes_the_released_runs_checkpoint(state):
    stored = json.loads((recipe.HERE / "checkpoint.json").read_text())
    assert len(stored["shapes"]) == 221
    assert recipe.digest(state) == stored["sha256"]


def test_shards_load_like_one_file(folder, state, golden_model):
    write_shards(folder, state)
    embeds = torch.from_numpy(recipe.normal(1, (1, 4, 256)))
    with torch.inference_mode():
        assert torch.equal(load(folder).language(embeds), golden_model().language(embeds))


def test_missing_tensor_is_named(folder, state):
    name = "model.mm_projector.query_3"
    save_file({k: v for k, v in state.items() if k != name}, folder / "model.safetensors")
    refused(folder, f"tensor {name} is missing")


def test_unknown_tensors_are_named(folder, state):
    extra = {f"model.extra.{i}": torch.zeros(1) for i in range(5)}
    save_file({**state, **extra}, folder / "model.safetensors")
    refused(folder, r"unknown tensors model\.extra\.0, model\.extra\.1, model\.extra\.2 and 2 more")


def test_wrong_shape_is_named(folder, state):
    name = "model.mm_projector.cat_proj.bias"
    save_file({**state, name: torch.zeros(7)}, folder / "model.safetensors")
    refused(folder, rf"tensor {name}: shape \[7\] differs from the expected \[256\]")


def test_truncated_file_is_named(folder, golden_checkpoint):
    whole = (golden_checkpoint / "model.safetensors").read_bytes()
    for length in (0, 5, 1000, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:length])
        refused(folder, r"model\.safetensors: not a readable safetensors file \(.*\); download it again")


def test_missing_shard_is_named(folder, state):
    write_shards(folder, state)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, r"model-00002-of-00002\.safetensors: listed in the index but missing; download it again")


def test_tensors_of_the_index_that_no_shard_holds_are_named(folder, state):
    write_shards(folder, state)
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    listed["weight_map"]["model.extra"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(listed))
    refused(folder, r"index lists tensors that no file holds, model\.extra; download it again")


@pytest.mark.parametrize(
    "index",
    [{}, {"weight_map": []}, {"weight_map": {"a": "../a.safetensors"}}, {"weight_map": {"a": ["b"]}}],
)
def test_broken_index_is_named(folder, index):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, r"model\.safetensors\.index\.json: field weight_map")


def test_missing_config_is_named(folder, state):
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").unlink()
    refused(folder, r"config\.json: no such file")


@pytest.mark.parametrize("source", ["no/such/folder", "nowhere", "/no/such"])
def test_sources_that_are_neither_folder_nor_hub_id(source):
    with pytest.raises(UhdError, match=f"checkpoint {source}: no such folder"):
        locate(source)


def test_tensors_are_read_lazily(golden_checkpoint, monkeypatch):
    checkpoint = Checkpoint(golden_checkpoint)
    assert len(checkpoint.names()) == 221
    assert checkpoint.shape("lm_head.weight") == (32000, 256)
    file = checkpoint._file("lm_head.weight")
    read, original = [], type(file).tensor
    monkeypatch.setattr(type(file), "tensor", lambda self, name: read.append(name) or original(self, name))
    norm = torch.nn.LayerNorm(256, device="meta")
    checkpoint.load_into(norm, "model.mm_projector.ln_q.", torch.float32)
    assert sorted(read) == ["model.mm_projector.ln_q.bias", "model.mm_projector.ln_q.weight"]
    assert norm.weight.dtype == torch.float32 and not norm.weight.requires_grad
