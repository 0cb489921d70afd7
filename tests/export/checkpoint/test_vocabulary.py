"""Rows that no token has: the released code cuts them, so that they never win."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from uhd_export.bundle.build import build_bundle
from uhd_export.bundle.options import BuildOptions
from uhd_export.checkpoint.config import read_config
from uhd_export.checkpoint.int4.gptq import open_checkpoint
from uhd_export.checkpoint.source import EMBEDDED
from uhd_export.runtime import Pipeline
from uhd_export.runtime.bundle.manifest import EMBEDDINGS
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.settings import Sampling

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS, ROWS = 442, 464


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """The embedded model with 22 more rows, whose logits are larger than any other."""
    folder = tmp_path_factory.mktemp("padded") / "checkpoint"
    shutil.copytree(EMBEDDED, folder)
    state = load_file(folder / "model.safetensors")
    for name, value in ((TABLE, 0.0), (HEAD, 50.0)):
        rows = torch.full((ROWS - TOKENS, state[name].shape[1]), value, dtype=state[name].dtype)
        state[name] = torch.cat([state[name], rows])
    save_file(state, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": ROWS}))
    (folder / "generation_config.json").write_text('{"repetition_penalty": 1.3}')
    return folder


def test_the_vocabulary_is_cut_to_the_tokenizers(padded):
    language = read_config(padded).language
    assert language.vocab == read_config(EMBEDDED).language.vocab == TOKENS
    checkpoint, whole = open_checkpoint(padded, language.vocab), open_checkpoint(EMBEDDED)
    for name in (TABLE, HEAD):
        assert checkpoint.shape(name) == whole.shape(name)
        assert torch.equal(checkpoint.tensor(name), whole.tensor(name))
        assert checkpoint.stored(name).shape[0] == ROWS


@pytest.mark.parametrize(
    "field, ids", [("eos_token_id", 450), ("eos_token_id", [2, 450]), ("mm_separator_token_ids", [14, 450])]
)
def test_ids_that_only_rows_without_a_token_have_are_refused(padded, tmp_path, field, ids):
    shutil.copytree(padded, tmp_path / "checkpoint")
    config = json.loads((padded / "config.json").read_text())
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config | {field: ids}))
    with pytest.raises(UhdError, match=f"config field {field}: 450 is no token .* 442 tokens.*added tokens"):
        read_config(tmp_path / "checkpoint")


def test_rows_without_a_token_never_win(padded, tmp_path):
    image = np.random.RandomState(0).randint(0, 256, (200, 300, 3), np.uint8)
    answers = []
    for source, name in ((EMBEDDED, "plain"), (padded, "padded")):
        build_bundle(source, tmp_path / name, options=BuildOptions(context=512), verify=False)
        assert np.load(tmp_path / name / EMBEDDINGS, mmap_mode="r").shape[0] == TOKENS
        with Pipeline.open(tmp_path / name) as pipeline:
            prompt = pipeline.input_ids("USER: <image>\nWhat is this? ASSISTANT:")
            answers.append(pipeline.logits(image, prompt))
            sampling = Sampling(repetition_penalty=1.3 if source == padded else 1.0)
            assert pipeline.settings.sampling == pipeline.generator.sampling == sampling
    assert np.array_equal(*answers) and answers[0].shape == (1, TOKENS)
