"""Which file of a folder holds a tensor."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import save_file
from support.options import build_options

from uhd_export.checkpoint.files import weight_sizes
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.runtime.errors import UhdError

NEW = {name: torch.full((2, 2), float(i + 1)) for i, name in enumerate("abcd")}
OLD = {name: torch.zeros(2, 2) for name in NEW}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def take(state, names):
    return {name: state[name] for name in names}


def index(folder, name, **files):
    where = {tensor: file.replace("__", ".") for file, tensors in files.items() for tensor in tensors}
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def layouts():
    """Folders with stale zeros beside the right tensors, by name."""

    def stale_in_another_shard(d):
        save_file(take(NEW, "ab"), d / "model-1.safetensors")
        save_file(take(NEW, "cd") | take(OLD, "a"), d / "model-2.safetensors")
        index(d, INDEX, **{"model-1__safetensors": "ab", "model-2__safetensors": "cd"})

    def single_file_and_old_file(d):
        save_file(NEW, d / SINGLE)
        save_file(OLD, d / "old_model.safetensors")
        save_file(OLD, d / "zz.safetensors")

    def single_file_and_old_index(d):
        save_file(NEW, d / SINGLE)
        save_file(OLD, d / "model-1.safetensors")
        index(d, INDEX, **{"model-1__safetensors": "abcd"})

    def file_outside_the_index(d):
        save_file(NEW, d / "model-1.safetensors")
        save_file(OLD | {"more": torch.zeros(1)}, d / "model-9.safetensors")
        index(d, INDEX, **{"model-1__safetensors": "abcd"})

    def safetensors_and_old_bin(d):
        save_file(NEW, d / SINGLE)
        torch.save(OLD, d / BIN)

    def index_and_old_bin(d):
        save_file(NEW, d / "model-1.safetensors")
        index(d, INDEX, **{"model-1__safetensors": "abcd"})
        torch.save(OLD, d / BIN)

    def adapter_beside_shards(d):
        save_file(take(NEW, "ab"), d / "model-1.safetensors")
        save_file(take(NEW, "cd"), d / "model-2.safetensors")
        save_file(OLD, d / "adapter_model.safetensors")

    def bin_only(d):
        torch.save(NEW, d / BIN)
        torch.save(OLD, d / "optimizer.bin")

    def bin_shards(d):
        torch.save(take(NEW, "ab"), d / "pytorch_model-00001-of-00002.bin")
        torch.save(take(NEW, "cd") | take(OLD, "b"), d / "pytorch_model-00002-of-00002.bin")
        one, two = "pytorch_model-00001-of-00002__bin", "pytorch_model-00002-of-00002__bin"
        index(d, BIN_INDEX, **{one: "ab", two: "cd"})

    def bin_shards_without_an_index(d):
        torch.save(take(NEW, "ab"), d / "pytorch_model-00001-of-00002.bin")
        torch.save(take(NEW, "cd"), d / "pytorch_model-00002-of-00002.bin")

    return {name: make for name, make in locals().items()}


@pytest.mark.parametrize("make", layouts().values(), ids=layouts())
def test_no_stale_copy_is_read(tmp_path, make):
    make(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.names() == set(NEW)
    for name, value in NEW.items():
        assert torch.equal(checkpoint.tensor(name), value), name
        assert checkpoint.shape(name) == (2, 2)
    checkpoint.close()


def test_the_files_that_are_read_identify_a_checkpoint(tmp_path):
    save_file(NEW, tmp_path / SINGLE)
    before = weight_sizes(tmp_path)
    save_file(OLD, tmp_path / "old.safetensors")
    assert weight_sizes(tmp_path) == before == {SINGLE: (tmp_path / SINGLE).stat().st_size}


def refused(folder, match):
    with pytest.raises(UhdError, match=match) as caught:
        Checkpoint(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_tensor_in_two_files_without_an_index_is_named(tmp_path):
    save_file(NEW, tmp_path / "a.safetensors")
    save_file(take(OLD, "b"), tmp_path / "b.safetensors")
    refused(tmp_path, r"tensor b: is in both .*a\.safetensors and b\.safetensors, .*move the stale file away")


def test_a_tensor_that_another_shard_holds_is_missing(tmp_path):
    save_file(take(NEW, "ab"), tmp_path / "model-1.safetensors")
    save_file(take(NEW, "cd"), tmp_path / "model-2.safetensors")
    index(tmp_path, INDEX, **{"model-1__safetensors": "abc", "model-2__safetensors": "d"})
    refused(tmp_path, "the index lists tensors that no file holds, c; download it again")


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize(
    "content, match",
    [
        (lambda path: torch.save({"a": Trap()}, path), "holds more than tensors, which is never unpickled"),
        (lambda path: path.write_bytes(pickle.dumps({"a": Trap()})), r"pytorch_model\.bin: "),
        (lambda path: torch.save([torch.zeros(1)], path), "must hold a dictionary of tensors"),
        (
            lambda path: torch.save({"model": {"a": torch.zeros(1)}}, path),
            "must hold a dictionary of tensors",
        ),
        (lambda path: path.write_bytes(b""), "not a readable file of torch.save"),
        (lambda path: path.write_bytes(b"PK\x03\x04broken"), "not a readable file of torch.save"),
        (
            lambda path: torch.save(NEW, path, _use_new_zipfile_serialization=False),
            "not a readable file of torch.save .*save it as safetensors",
        ),
    ],
)
def test_torch_files_are_read_as_tensors_only(tmp_path, content, match):
    content(tmp_path / BIN)
    refused(tmp_path, match)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.int64, torch.complex64])
def test_values_that_are_no_weights_are_named(tmp_path, dtype):
    torch.save({"a": torch.zeros(2, dtype=dtype)}, tmp_path / BIN)
    with pytest.raises(UhdError, match=rf"checkpoint {tmp_path}: tensor a holds \w+ values, not weights"):
        Checkpoint(tmp_path).tensor("a", torch.float32)


def adapter(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    save_file({"base_model.model.lora_A.weight": torch.zeros(4, 8)}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "make, match",
    [
        (adapter, "is a LoRA adapter of owner/base, not a model; merge it first"),
        (lambda d: torch.save(NEW, d / "mm_projector.bin"), "holds only the projector"),
        (lambda d: torch.save(NEW, d / "model.pth"), r"but model\.pth; convert it to safetensors first"),
        (lambda d: None, "holds no safetensors file and no pytorch_model.bin; is the download whole"),
    ],
)
def test_folders_without_a_model_say_what_they_are(tmp_path, make, match):
    make(tmp_path)
    refused(tmp_path, match)


@pytest.mark.parametrize(
    "prefix, match",
    [
        ("model.vision_tower.", r"tensor model\.vision_tower\..* is missing: it holds no vision tower"),
        ("model.mm_projector.", r"tensor model\.mm_projector\..* is missing: it holds no projector"),
        (
            "lm_head.",
            "tensor lm_head.weight is missing; if the head is the embedding table, set tie_word_emb",
        ),
        ("model.layers.1.mlp.", "is missing; do config.json and the weights belong together"),
    ],
)
def test_what_is_missing_from_a_model_is_named_before_any_work(golden_checkpoint, tmp_path, prefix, match):
    from uhd_export.bundle.build import build_bundle

    shutil.copytree(golden_checkpoint, tmp_path / "c", ignore=shutil.ignore_patterns("*.safetensors"))
    whole = Checkpoint(golden_checkpoint)
    kept = {name: whole.tensor(name) for name in whole.names() if not name.startswith(prefix)}
    save_file(kept, tmp_path / "c" / SINGLE)
    with pytest.raises(UhdError, match=match) as caught:
        options = build_options(vision_tower=tmp_path / "c" / "clip")
        build_bundle(tmp_path / "c", tmp_path / "out", options=options)
    assert str(tmp_path / "c") in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_parameters_are_read_as_tensors(tmp_path):
    torch.save({name: torch.nn.Parameter(value) for name, value in NEW.items()}, tmp_path / BIN)
    tensor = Checkpoint(tmp_path).tensor("a")
    assert tensor.numpy().tolist() == NEW["a"].tolist() and type(tensor) is torch.Tensor
