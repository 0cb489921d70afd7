"""The quantized checkpoint: AutoGPTQ's format for the language model, everything else as it was."""

import json
import os
import shutil
from pathlib import Path

from safetensors import safe_open

from uhd_export.calibration.options import GptqOptions
from uhd_export.calibration.sequences import Progress
from uhd_export.calibration.work import Work, disk_errors, write_tensors
from uhd_export.checkpoint.copy import copy_own
from uhd_export.checkpoint.int4.linears import linear_shapes
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.runtime.bundle.manifest import QUALITY, QUALITY_CHART
from uhd_export.runtime.config import LanguageConfig

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
    with disk_errors(folder):
        rest = _unquantized(checkpoint, language)
        shards, done = _split(checkpoint, rest), 0
        count = language.layers + len(shards)
        where: dict[str, str] = {}
        total = 0
        for index in range(language.layers):
            name = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            _link(work.layer_file(index), folder / name)
            with safe_open(folder / name, "pt") as file:
                for tensor in file.keys():  # noqa: SIM118 (a safetensors handle is not a mapping)
                    where[tensor] = name
                    total += file.get_tensor(tensor).nbytes
        for number, names in enumerate(shards, start=language.layers + 1):
            name = f"model-{number:05d}-of-{count:05d}.safetensors"
            tensors = {}
            for tensor in names:
                tensors[tensor] = checkpoint.stored(tensor).contiguous()
                where[tensor] = name
                total += tensors[tensor].nbytes
                done += 1
                progress(done, len(rest))
            write_tensors(folder / name, tensors)
        index_file = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        _write_json(folder / "model.safetensors.index.json", index_file)
        _write_json(folder / "config.json", config)
        _copy_rest(checkpoint.folder, folder)


def bytes_beside_layers(checkpoint: Checkpoint, language: LanguageConfig) -> int:
    """How much `write_checkpoint` writes: finished layers are on the disk already."""
    return sum(checkpoint.stored(name).nbytes for name in _unquantized(checkpoint, language))


def _unquantized(checkpoint: Checkpoint, language: LanguageConfig) -> list[str]:
    return sorted(checkpoint.names() - {f"{name}.weight" for name in linear_shapes(language)})


def _split(checkpoint: Checkpoint, names: list[str]) -> list[list[str]]:
    """Names in shards of at most _SHARD_BYTES, or of one tensor that is larger."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in names:
        tensor = checkpoint.stored(name)
        if shards[-1] and size + tensor.nbytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _link(source: Path, target: Path) -> None:
    """The same file under a second name; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _copy_rest(source: Path, target: Path) -> None:
    """Tokenizer, CLIP's configuration and whatever else belongs to the checkpoint, but no weights."""
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or not path.is_file() or path.suffix in _WEIGHT_SUFFIXES or str(relative) in _REPLACED:
            continue
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        copy_own(source, relative, target / relative)
