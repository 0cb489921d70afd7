"""The quantized checkpoint: AutoGPTQ's format for the language model, everything else as it was."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from uhd_export.calibration.options import GptqOptions
from uhd_export.calibration.sequences import Progress
from uhd_export.calibration.work import Work, disk_errors, write_tensors
from uhd_export.checkpoint.copy import copy_own, own_file
from uhd_export.checkpoint.int4.linears import linear_shapes
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.runtime.bundle.manifest import MANIFEST, QUALITY, QUALITY_CHART, bundle_files
from uhd_export.runtime.config import LanguageConfig
from uhd_export.runtime.errors import UhdError

_SHARD_BYTES = 2 << 30
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5")
_REPLACED = ("config.json", "model.safetensors.index.json", QUALITY, QUALITY_CHART)


def quantization_config(options: GptqOptions, version: str) -> dict:
    """What config.json says about the tensors, as transformers, gptqmodel and vLLM read it."""
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": options.group,
        "sym": options.symmetric,
        "desc_act": options.act_order,
        "checkpoint_format": "gptq",
        "lm_head": False,
        "static_groups": False,
        "true_sequential": True,
        "damp_percent": options.damp,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"gptqmodel:{version}"]},
    }


def write_checkpoint(
    checkpoint: Checkpoint,
    config: dict,
    language: LanguageConfig,
    work: Work,
    folder: Path,
    progress: Progress,
) -> None:
    """Fill `folder`: the finished layers of `work`, all other tensors of `checkpoint`, and `config`.

    `progress(done, total)` counts the tensors beside the layers. One shard's are in memory at a time, and
    those of a checkpoint in the same type stay mapped.
    """
    layers = [work.layer_file(index) for index in range(language.layers)]
    with disk_errors(folder):
        write_shards(checkpoint.stored, _unquantized(checkpoint, language), folder, progress, layers)
        write_json(folder / "config.json", config)
        _copy_rest(checkpoint.folder, folder)


def write_shards(
    read: Callable[[str], torch.Tensor],
    names: list[str],
    folder: Path,
    progress: Progress,
    layers: Sequence[Path] = (),
) -> None:
    """Tensors `names` in files of `folder`, after those of `layers`, which are linked; and their index."""
    shards, done, total = _split(read, names), 0, 0
    count = len(layers) + len(shards)
    files = (f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1))
    where: dict[str, str] = {}
    for layer in layers:
        name = next(files)
        _link(layer, folder / name)
        with safe_open(folder / name, "pt") as file:
            for tensor in file.keys():  # noqa: SIM118 (a safetensors handle is not a mapping)
                where[tensor] = name
                total += file.get_tensor(tensor).nbytes
    for shard in shards:
        name, tensors = next(files), {}
        starts: set[int] = set()
        for tensor in shard:
            values = read(tensor).contiguous()
            # A tied head is the table itself, under a second name, which the format has no way to say.
            tensors[tensor] = values.clone() if values.data_ptr() in starts else values
            starts.add(values.data_ptr())
            where[tensor] = name
            total += tensors[tensor].nbytes
            done += 1
            progress(done, len(names))
        write_tensors(folder / name, tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def bytes_beside_layers(checkpoint: Checkpoint, language: LanguageConfig) -> int:
    """How much `write_checkpoint` writes: finished layers are on the disk already."""
    return sum(checkpoint.stored(name).nbytes for name in _unquantized(checkpoint, language))


def _unquantized(checkpoint: Checkpoint, language: LanguageConfig) -> list[str]:
    return sorted(checkpoint.names() - {f"{name}.weight" for name in linear_shapes(language)})


def _split(read: Callable[[str], torch.Tensor], names: list[str]) -> list[list[str]]:
    """Names in shards of at most _SHARD_BYTES, or of one tensor that is larger."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in names:
        needed = read(name).nbytes
        if shards[-1] and size + needed > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += needed
    return shards


def _link(source: Path, target: Path) -> None:
    """The same file under a second name; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_json(path: Path, value: dict) -> None:
    """A file of JSON for people too."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _copy_rest(source: Path, target: Path) -> None:
    for name in files_beside_weights(source):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        copy_own(source, name, target / name)


def files_beside_weights(folder: Path) -> list[Path]:
    """What `write_checkpoint` copies: tokenizer, CLIP's configuration and whatever else is the checkpoint's.

    Bundles that lie in its folder do not. Raises UhdError where a file is a link that leads out of it.
    """
    bundles = [path.parent for path in folder.rglob(MANIFEST) if _is_bundle(path.parent)]
    names = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or not path.is_file() or path.suffix in _WEIGHT_SUFFIXES or str(name) in _REPLACED:
            continue
        if not any(path.is_relative_to(bundle) for bundle in bundles):
            own_file(folder, name)
            names.append(name)
    return names


def _is_bundle(folder: Path) -> bool:
    try:
        bundle_files(folder)
    except UhdError:
        return False
    return True
