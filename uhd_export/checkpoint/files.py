"""The files of a checkpoint that hold its tensors: which they are, and which of them holds a tensor.

Followed is what transformers does: `model.safetensors` comes first, then the safetensors files that an
index names, then `pytorch_model.bin` and those that its index names. Whatever lies beside them is not read.
"""

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from uhd_export.checkpoint.fields import read_json
from uhd_export.runtime.errors import UhdError

_WRONG = "download it again"


class TensorFile(Protocol):
    """One file of named tensors, each read when it is asked for."""

    path: Path

    def names(self) -> Iterable[str]:
        """Every tensor name."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`, without reading it."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """Tensor `name` as it is stored."""
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...


class SafetensorsFile:
    """A memory-mapped safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = safe_open(path, "pt").__enter__()
        except FileNotFoundError:
            raise UhdError(f"{path}: missing; {_WRONG}") from None
        except (SafetensorError, OSError) as error:
            raise UhdError(f"{path}: not a readable safetensors file ({error}); {_WRONG}") from None

    def names(self) -> Iterable[str]:
        """Every tensor name."""
        return self._handle.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`, without reading it."""
        return tuple(self._handle.get_slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        """Tensor `name` as it is stored."""
        return self._handle.get_tensor(name)

    def close(self) -> None:
        """Let go of the file."""
        self._handle.__exit__(None, None, None)


class TorchFile:
    """A file of `torch.save`, memory-mapped; nothing but tensors is ever unpickled from it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except FileNotFoundError:
            raise UhdError(f"{path}: missing; {_WRONG}") from None
        except pickle.UnpicklingError:
            raise UhdError(
                f"{path}: holds more than tensors, which is never unpickled; "
                "save its state_dict as safetensors"
            ) from None
        except Exception as error:  # torch raises RuntimeError, EOFError, KeyError, ... for what is broken
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UhdError(
                f"{path}: not a readable file of torch.save ({reason[:120]}); "
                f"{_WRONG}, or save it as safetensors"
            ) from None
        if not isinstance(state, dict) or not all(
            isinstance(value, torch.Tensor) for value in state.values()
        ):
            raise UhdError(f"{path}: must hold a dictionary of tensors; save its state_dict as safetensors")
        self._state: dict[str, torch.Tensor] = {str(name): value.detach() for name, value in state.items()}

    def names(self) -> Iterable[str]:
        """Every tensor name."""
        return self._state

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`."""
        return tuple(self._state[name].shape)

    def tensor(self, name: str) -> torch.Tensor:
        """Tensor `name` as it is stored."""
        return self._state[name]

    def close(self) -> None:
        """Let go of the file."""
        self._state = {}


def weight_paths(folder: Path) -> list[Path]:
    """The files that the tensors of the checkpoint in `folder` are read from. Raises UhdError."""
    return _choose(folder)[0]


def weight_sizes(folder: Path) -> dict[str, int]:
    """Size in bytes of each file that holds tensors of the checkpoint in `folder`; 0 of a missing one."""
    return {path.name: path.stat().st_size if path.is_file() else 0 for path in weight_paths(folder)}


def open_files(folder: Path) -> dict[str, TensorFile]:
    """The file that holds each tensor of the checkpoint in `folder`, by tensor name.

    Raises UhdError where a file is missing or broken, an index names a tensor that its file lacks, or
    two files without an index hold the same tensor.
    """
    paths, index = _choose(folder)
    files = {path.name: _open(path) for path in paths}
    if index is None:
        return _unique(files.values())
    held = {name: set(file.names()) for name, file in files.items()}
    absent = sorted(tensor for tensor, name in index.items() if tensor not in held[name])
    if absent:
        raise UhdError(
            f"checkpoint {folder}: the index lists tensors that no file holds, {some(absent)}; {_WRONG}"
        )
    return {tensor: files[name] for tensor, name in index.items()}


def some(names: list[str]) -> str:
    """The first of `names`, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _open(path: Path) -> TensorFile:
    if not path.is_file():
        raise UhdError(f"{path}: listed in the index but missing; {_WRONG}")
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def _unique(files: Iterable[TensorFile]) -> dict[str, TensorFile]:
    where: dict[str, TensorFile] = {}
    for file in files:
        for name in file.names():
            if name in where:
                raise UhdError(
                    f"tensor {name}: is in both {where[name].path} and {file.path.name}, and no index says "
                    "which counts; move the stale file away"
                )
            where[name] = file
    return where


def _choose(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files that count, and the index that says which of them holds a tensor, where one does."""
    for single, parts in (
        ("model.safetensors", "*.safetensors"),
        ("pytorch_model.bin", "pytorch_model-*.bin"),
    ):
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return [folder / single], None
        if index.is_file():
            where = _weight_map(index)
            return [folder / name for name in sorted(set(where.values()))], where
        loose = sorted(p for p in folder.glob(parts) if p.is_file() and "adapter" not in p.name)
        if loose:
            return loose, None
    raise UhdError(f"checkpoint {folder}: {_what_it_is(folder)}")


def _weight_map(path: Path) -> dict[str, str]:
    found = read_json(path).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise UhdError(f"{path}: field weight_map is missing; {_WRONG}")
    suffix = ".safetensors" if path.name.startswith("model") else ".bin"
    for name in found.values():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(suffix):
            raise UhdError(f"{path}: field weight_map must hold plain names of {suffix} files; {_WRONG}")
    return found


def _what_it_is(folder: Path) -> str:
    """What a folder without weights holds instead, and what to do."""
    has = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if any(name.startswith("adapter_") for name in has):
        base = None
        if "adapter_config.json" in has:
            base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        of = f" of {base}" if isinstance(base, str) else ""
        return (
            f"is a LoRA adapter{of}, not a model; merge it first (peft's merge_and_unload), "
            "and pass the merged model"
        )
    if has & {"mm_projector.bin", "non_lora_trainables.bin"}:
        return (
            "holds only the projector (mm_projector.bin), as pre-training leaves it; pass the folder of the "
            "fine-tuned model"
        )
    others = sorted(
        n for n in has if n.endswith((".bin", ".pt", ".pth", ".gguf", ".ckpt", ".msgpack", ".h5"))
    )
    if others:
        return (
            f"holds no model.safetensors or pytorch_model.bin, but {some(others)}; "
            "convert it to safetensors first"
        )
    return "holds no safetensors file and no pytorch_model.bin; is the download whole?"
