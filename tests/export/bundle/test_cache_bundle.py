"""Bundles by the type of their cache, through the command line: built, shown, run, and refused."""

import json

import numpy as np
import pytest
from fuzz.targets import forge, write_signed
from PIL import Image

from uhd_export.bundle.options import BuildOptions
from uhd_export.runtime import Pipeline
from uhd_export.runtime.bundle.manifest import read_manifest
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.serving.service import Service, ServiceOptions
from uhd_export.tensorrt.options import EngineOptions

CACHES = {"float32": 4, "float16": 2, "int8": 1}


@pytest.fixture(scope="module")
def bundles(spoken_checkpoint, tmp_path_factory):
    """By the type of the cache."""
    from click.testing import CliRunner

    from uhd_export.cli.main import main

    folder, built = tmp_path_factory.mktemp("caches"), {}
    for cache in CACHES:
        arguments = ["build", spoken_checkpoint, "-o", folder / cache, "--cache", cache, "--context", 1024]
        arguments += ["--vision-tower", spoken_checkpoint / "clip", "--no-verify"]
        done = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
        built[cache] = folder / cache
    return built


def test_every_cache_answers_in_its_size(bundles, image_file):
    answers, sizes = {}, {}
    for cache, folder in bundles.items():
        with Pipeline.open(folder, threads=1, max_slices=1) as pipeline:
            answer = pipeline.generate(Image.open(image_file), "w400 w500", max_new_tokens=4)
            list(answer)
            answers[cache] = answer.ids
            sizes[cache] = pipeline.generator.decoder.kv_bytes
            further = pipeline.generate(Image.open(image_file), "w400 w500 w600", max_new_tokens=2)
            list(further)
            assert further.cached_tokens > 140
    assert sizes == {cache: sizes["int8"] * size for cache, size in CACHES.items()}
    # The first token comes from the prompt, which an 8-bit cache does not round.
    assert answers["int8"][0] == answers["float32"][0]
    assert len(answers["int8"]) == 4


def test_a_service_plans_its_slots_by_the_type_of_the_cache(bundles):
    planned = {}
    for cache, folder in bundles.items():
        with Service.open(folder, threads=1, options=ServiceOptions(slots=2, context=512)) as service:
            planned[cache] = service.memory.cache
    assert planned == {cache: planned["int8"] * size for cache, size in CACHES.items()}


def test_a_bundle_tells_its_cache(bundles, call):
    for cache, folder in bundles.items():
        assert read_manifest(folder).precision.cache == cache
        shown = call("inspect", folder).stdout
        assert f"cache {cache}" in " ".join(shown.split())
        assert ("8 bits, scales of" in shown) == (cache == "int8")
    record = json.loads(call("inspect", bundles["int8"], "--json").stdout)["cache_quantization"]
    assert (record["sequences"], record["positions"] > 1000) == (4, True)
    assert 0 < record["key_error"] < 0.02 and 0 < record["value_error"] < 0.02


def test_an_engine_with_another_cache_than_the_manifest_says_is_refused(bundles, tmp_path):
    folder = forge(bundles["float32"], tmp_path)
    record = json.loads((folder / "manifest.json").read_text())
    record["precision"]["cache"] = "int8"
    write_signed(folder, record)
    with pytest.raises(UhdError, match=r"past_key_values\.0\.key is float32 .*, expected int8"):
        Pipeline.open(folder, threads=1)
    record["precision"]["cache"] = "int3"
    write_signed(folder, record)
    with pytest.raises(UhdError, match=r"precision\.cache: 'int3' is not supported"):
        Pipeline.open(folder, threads=1)


def test_engines_take_no_other_cache(fails, tmp_path):
    with pytest.raises(UhdError, match="cache 'int4': must be one of float32, float16, int8"):
        BuildOptions(cache="int4")
    for cache in ("float32", "int8"):
        line = fails("build", "nano", "-o", tmp_path / "out", "--backend", "tensorrt-rtx", "--cache", cache)
        assert f"cache {cache}: TensorRT updates keys and values in the type of its activations" in line
    assert BuildOptions(engines=EngineOptions(), cache="float16").cache_type == "float16"
    assert not (tmp_path / "out").exists()


def test_the_scales_come_from_the_users_data(spoken_checkpoint, tmp_path, image_file, call, fails):
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"image": str(image_file), "question": "w400", "answer": "w401"}) + "\n")
    arguments = ["build", spoken_checkpoint, "--vision-tower", spoken_checkpoint / "clip", "--no-verify"]
    done = call(*arguments, "-o", tmp_path / "out", "--cache", "int8", "--data", data)
    assert done.exit_code == 0, done.output
    assert read_manifest(tmp_path / "out").cache_quantization.sequences == 1
    line = fails(*arguments, "-o", tmp_path / "other", "--data", data)
    assert line.startswith("error: --data: is for calibration") and "--cache int8" in line
    assert np.isfinite(read_manifest(tmp_path / "out").cache_quantization.key_error)
