"""The working folder of an unfinished quantization: what is done, and whether it may be continued.

Every file is written under a temporary name and renamed. `state.json` identifies source, data and
settings; `activations.safetensors` holds the hidden states before layer N, which it names;
`layer-00000.safetensors` and so on the finished layers below N, which become files of the checkpoint as
they are, and `layer-00000.json` what was measured on them. A run that stops loses the layer it was at,
no more.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from uhd_export.calibration.activations import Activations
from uhd_export.calibration.quality import LinearQuality
from uhd_export.runtime.errors import UhdError, is_disk_full
from uhd_export.runtime.files import replacing

_STATE, _ACTIVATIONS = "state.json", "activations.safetensors"
_FORMAT = {"format": "pt"}


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk into a UhdError that names `folder`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if is_disk_full(error):
            raise UhdError(
                f"{folder}: the disk is full; make room and run the same command to continue"
            ) from None
        raise


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: Mapping[str, str] = _FORMAT
) -> None:
    """A safetensors file that others may read too; the library makes it the owner's alone.

    Several keys of `metadata` are written in random order.
    """
    save_file(tensors, path, dict(metadata))
    path.chmod(0o644)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def differing(before: dict, now: dict) -> list[str]:
    """The keys whose values are not the same in both."""
    return sorted(key for key in {*before, *now} if before.get(key) != now.get(key))


class Work:
    """One working folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def prepare(self, identity: dict, say: Callable[[str], None]) -> None:
        """Make the folder ready for the run `identity` describes; an unfinished other one is dropped.

        `say` is told what becomes of unfinished work.
        """
        try:
            previous = json.loads((self.folder / _STATE).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            previous = None
        except (OSError, ValueError):
            previous = {}
        if previous == identity:
            for half in self.folder.glob(".*.partial"):  # of a process that was killed while it wrote
                half.unlink()
            return
        if previous is not None:
            changed = ", ".join(differing(previous, identity))
            say(f"unfinished work in {self.folder} is of other {changed}: starting anew")
        shutil.rmtree(self.folder, ignore_errors=True)
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True)
            self._save(self.folder / _STATE, lambda path: _write_json(path, identity))

    def save_activations(self, layer: int, states: dict[str, Activations], judged: tuple[int, ...]) -> None:
        """Keep the hidden states before `layer`."""
        tensors = {name: activations.rows for name, activations in states.items()}
        lengths = {name: activations.lengths for name, activations in states.items()}
        metadata = {"layer": str(layer), "lengths": json.dumps(lengths), "judged": json.dumps(judged)}
        self._save(self.folder / _ACTIVATIONS, lambda path: write_tensors(path, tensors, metadata))

    def load_activations(self) -> tuple[int, dict[str, Activations], tuple[int, ...]] | None:
        """(layer, states, judged) as saved, or None where there are none that can be read."""
        try:
            with safe_open(self.folder / _ACTIVATIONS, "pt") as file:
                metadata = file.metadata()
                lengths = json.loads(metadata["lengths"])
                # Cloned: the file is replaced while the states are in use.
                states = {
                    name: Activations(file.get_tensor(name).clone(), tuple(lengths[name]))
                    for name in file.keys()  # noqa: SIM118 (a safetensors handle is not a mapping)
                }
                return int(metadata["layer"]), states, tuple(json.loads(metadata["judged"]))
        except (FileNotFoundError, SafetensorError, KeyError, ValueError):
            return None

    def layer_file(self, layer: int) -> Path:
        """Where finished layer `layer` is kept."""
        return self.folder / f"layer-{layer:05d}.safetensors"

    def save_layer(self, layer: int, tensors: dict[str, np.ndarray], records: list[LinearQuality]) -> None:
        """Keep a finished layer and what was measured on it."""
        path, rows = self.layer_file(layer), [asdict(record) for record in records]
        self._save(path.with_suffix(".json"), lambda partial: _write_json(partial, rows))
        parts = {name: torch.from_numpy(array) for name, array in tensors.items()}
        self._save(path, lambda partial: write_tensors(partial, parts))

    def layer_quality(self, layer: int) -> list[LinearQuality]:
        """What was measured on finished layer `layer`. Raises UhdError where its file is not whole."""
        path = self.layer_file(layer)
        try:
            with safe_open(path, "pt"):  # which fails where it is cut short
                rows = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            return [LinearQuality(**row) for row in rows]
        except (FileNotFoundError, SafetensorError, TypeError, ValueError):
            raise UhdError(f"{path}: missing or damaged; delete {self.folder} to start anew") from None

    def _save(self, path: Path, write: Callable[[Path], None]) -> None:
        with disk_errors(self.folder), replacing(path) as partial:
            write(partial)

    def whole_folder(self) -> Path:
        """An empty folder for a checkpoint that is wanted in part only; `remove` takes it too."""
        folder = self.folder / "whole"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
