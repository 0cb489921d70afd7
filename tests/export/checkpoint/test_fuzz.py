"""Damaged configs and indexes: each is read, or refused in one line; none ends in a traceback or hangs."""

import copy
import json
import random

import pytest
import torch
from safetensors.torch import save_file
from support.goldens import GOLDEN

from uhd_export.checkpoint.config import read_config
from uhd_export.checkpoint.fields import read_json
from uhd_export.checkpoint.int4.gptq import open_checkpoint
from uhd_export.model.uhd import refuse_unknown
from uhd_export.runtime.errors import UhdError

CASES, BATCH = 400, 50
VALUES = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        12,
        2**31,
        2**63,
        10**30,
        0.5,
        -0.0,
        1e308,
        float("nan"),
        float("inf"),
    ),
    *("", "x", "../x", "/", "\\", "a" * 5000, "\x00", "\ud800", "nan", "</s>", "[", "(?P<"),
    *([], [1], [[]], [None], {}, {"a": 1}, {"": None}, {"type": "linear"}, {"rope_type": ["default"]}),
]
QUANTIZED = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "dynamic": {"+:.*": {"bits": 8}},
}


def places(value, path=()):
    """Every place in a JSON value, as keys from the top."""
    if path:
        yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def damage(value, rng):
    """A copy with one to three places dropped, replaced or added."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        found = list(places(value))
        if not found:
            break
        *path, key = rng.choice(found)
        parent = value
        for step in path:
            parent = parent[step]
        kind = rng.random()
        if kind < 0.15:
            del parent[key]
        elif kind < 0.25 and isinstance(parent, dict):
            parent[rng.choice(["quantization_config", "rope_parameters", "s2", "x"])] = copy.deepcopy(
                rng.choice(VALUES)
            )
        else:
            parent[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def attempt(action):
    """Whether it worked; a refusal must be one short line."""
    try:
        action()
    except UhdError as error:
        assert "\n" not in str(error) and len(str(error)) < 1200, error
        return False
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "clip").mkdir()
    save_file(
        {"a": torch.zeros(1), "q.qweight": torch.zeros(4, 8, dtype=torch.int32)}, folder / "one.safetensors"
    )
    return folder


@pytest.mark.parametrize("batch", range(CASES // BATCH))
def test_damaged_configs(folder, batch):
    rng = random.Random(batch)
    tower = read_json(GOLDEN / "configs" / "clip.json")
    worked = 0
    for _ in range(BATCH):
        name = rng.choice(["v2_mask7", "first_mask7", "v1", "v1q64"])
        config = read_json(GOLDEN / "configs" / f"{name}.json") | {
            "mm_vision_tower": "clip",
            "mm_hidden_size": 64,
        }
        if rng.random() < 0.3:
            config["quantization_config"] = QUANTIZED
        files = {
            "config.json": config,
            "clip/config.json": tower,
            "generation_config.json": {"eos_token_id": [2]},
        }
        hurt = rng.choice(["config.json", "config.json", *files])
        files[hurt] = damage(files[hurt], rng)
        for path, content in files.items():
            text = json.dumps(content)
            if rng.random() < 0.03:
                text = text[: rng.randrange(len(text))]
            (folder / path).write_text(text)
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)

        def build(folder=folder):
            parsed = read_config(folder)
            refuse_unknown(open_checkpoint(folder, parsed.language.vocab), parsed)

        worked += attempt(lambda: read_config(folder))
        assert not attempt(build)
    assert 0 < worked < BATCH


INDEX = {"metadata": {"total_size": 4}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}


@pytest.mark.parametrize("batch", range(4))
def test_damaged_indexes(tmp_path, batch):
    rng = random.Random(1000 + batch)
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(1)}, tmp_path / "two.safetensors")
    for _ in range(BATCH):
        text = json.dumps(damage(INDEX, rng))
        if rng.random() < 0.1:
            text = text[: rng.randrange(len(text))]
        (tmp_path / "model.safetensors.index.json").write_text(text)
        attempt(lambda: open_checkpoint(tmp_path).close())
