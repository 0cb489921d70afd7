"""The golden checkpoint with a tokenizer, and the same quantized, once for a worker."""

import importlib.util
import json

import pytest
from support.quantizing import noise_pairs, quantize_options

from uhd_export.nano.tokenizer import build_tokenizer, save_tokenizer


@pytest.fixture(scope="session")
def source(golden_checkpoint, tmp_path_factory):
    """The golden checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("source") / "checkpoint"
    folder.mkdir()
    for path in golden_checkpoint.rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(golden_checkpoint)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    save_tokenizer(build_tokenizer(), folder / "tokenizer.json")
    config = json.loads((folder / "config.json").read_text())
    separators = {"mm_separator_token_ids": [14, 201]}  # a comma and a newline of this tokenizer
    (folder / "config.json").write_text(json.dumps(config | separators))
    return folder


@pytest.fixture(scope="session")
def quantized(source, tmp_path_factory):
    if importlib.util.find_spec("gptqmodel") is None:
        pytest.skip("gptqmodel is not installed")
    from uhd_export.calibration.quantize import quantize

    out = tmp_path_factory.mktemp("quantized") / "out"
    report = quantize(source, out, options=quantize_options(source), pairs=noise_pairs())
    return out, report
