"""The evidence that does not read itself: transformers on the same folder, and the loss by rounding."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from support.refusals import one_line_error

from uhd_export.bundle.build import build_bundle
from uhd_export.bundle.loss import ORIGINAL
from uhd_export.bundle.options import BuildOptions
from uhd_export.bundle.peer import PEER, peer_entries
from uhd_export.checkpoint.config import read_config
from uhd_export.checkpoint.options import SourceOptions
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.checkpoint.source import EMBEDDED
from uhd_export.graph.int4.options import WeightOptions
from uhd_export.runtime.bundle.manifest import STORED

pytest.importorskip("transformers")


def entries(manifest, against):
    return {entry.part: entry for entry in manifest.parity if entry.against == against}


def test_a_dense_bundle_equals_transformers(tmp_path):
    manifest = build_bundle("nano", tmp_path / "out", options=BuildOptions(context=512))
    peer = entries(manifest, PEER)
    assert peer["logits"].value < 1e-5 and peer["logits"].limit == 1e-3
    assert (peer["tokenizer"].value, peer["tokenizer"].skipped) == (0.0, None)
    assert not entries(manifest, ORIGINAL)


def test_what_the_reader_gets_wrong_is_seen(tmp_path, monkeypatch):
    name, right = "model.layers.0.mlp.down_proj.weight", Checkpoint.stored
    monkeypatch.setattr(Checkpoint, "stored", lambda self, n: right(self, n) * (n != name))
    with one_line_error("parity of logits on .* positions: relative error .* is over the limit"):
        build_bundle("nano", tmp_path / "out", options=BuildOptions(context=512))


def test_what_rounding_cost_is_a_table_of_its_own(tmp_path):
    options = BuildOptions(context=512, weights=WeightOptions("int4-rtn", activations="float"))
    manifest = build_bundle("nano", tmp_path / "out", options=options)
    stored, lost = entries(manifest, STORED), entries(manifest, ORIGINAL)
    assert stored["logits"].value < 1e-5
    assert lost.keys() == {"logits", "tokens", "after int4 weights", "after int8 head"}
    assert 1e-2 < lost["logits"].value < 1
    assert abs(entries(manifest, PEER)["logits"].value - lost["logits"].value) < 1e-4


def test_the_configuration_that_was_given_is_the_peers_too(tmp_path):
    folder, right = tmp_path / "checkpoint", tmp_path / "right.json"
    shutil.copytree(EMBEDDED, folder)
    config = json.loads((EMBEDDED / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 5e5}))
    right.write_text(json.dumps(config | {"mm_vision_tower": str(folder / "clip")}))
    options = BuildOptions(reading=SourceOptions(config=right), context=512)
    manifest = build_bundle(folder, tmp_path / "out", options=options)
    assert entries(manifest, PEER)["logits"].value < 1e-5


@pytest.mark.parametrize("name", ["config.json", "quantize_config.json"])
def test_a_quantized_folder_is_told_wherever_it_says_so(tmp_path, name):
    shutil.copytree(EMBEDDED, tmp_path, dirs_exist_ok=True)
    settings = {"quant_method": "gptq", "bits": 4}
    raw = json.loads((EMBEDDED / "config.json").read_text()) | {"quantization_config": settings}
    (tmp_path / name).write_text(json.dumps(raw if name == "config.json" else settings))
    model, source = SimpleNamespace(language=read_config(EMBEDDED).language), SimpleNamespace(config=None)
    pipeline = SimpleNamespace(manifest=SimpleNamespace(model=model, source=source))
    logits, _ = peer_entries(pipeline, tmp_path, np.zeros((3, 128)), np.zeros(442), 1e-3)
    assert (logits.value, "is quantized" in logits.skipped) == (None, True)
