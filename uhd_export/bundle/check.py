"""Checking a bundle: its files byte for byte, then its parity where the checkpoint is at hand."""

from dataclasses import dataclass
from pathlib import Path

from uhd_export.bundle.parity import measure_parity
from uhd_export.checkpoint.config import CheckpointConfig
from uhd_export.checkpoint.files import weight_sizes
from uhd_export.checkpoint.hub import cached
from uhd_export.checkpoint.int4.gptq import GptqCheckpoint, open_checkpoint
from uhd_export.checkpoint.source import NANO, source_folder, whole_folder
from uhd_export.graph.int4.view import as_stored
from uhd_export.runtime.bundle.integrity import hash_file, verify_files
from uhd_export.runtime.bundle.manifest import Manifest, Parity, Source, read_manifest
from uhd_export.runtime.choices import ENGINE_BACKENDS
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.progress import progress_bar


@dataclass(frozen=True)
class CheckReport:
    """What `check_bundle` found: the files are right, or it would have raised.

    `measured` is empty where no checkpoint was at hand, and `note` says so.
    """

    manifest: Manifest
    bytes: int
    checkpoint: Path | None
    measured: tuple[Parity, ...]
    note: str | None

    @property
    def ok(self) -> bool:
        """Every figure is within its limit, those measured now and those in the manifest."""
        return all(parity.ok for parity in (*self.measured, *self.manifest.parity))


def check_bundle(
    bundle: str | Path,
    *,
    checkpoint: str | Path | None = None,
    device: str | None = None,
    progress: bool = False,
) -> CheckReport:
    """Verify every file of `bundle` by SHA-256, then measure its parity with `checkpoint` again on `device`.

    Without `checkpoint`, the source recorded in the manifest is used where it is on this machine;
    nothing is downloaded. Raises UhdError where a file is altered, or `checkpoint` is another one.
    """
    folder = Path(bundle)
    manifest = read_manifest(folder)
    size = sum(record.bytes for record in manifest.files.values())
    with progress_bar("hashing", size, show=progress, nbytes=True) as bar:
        verify_files(folder, manifest, remembered=False, on_bytes=bar.advance)
    if checkpoint is not None:
        same = str(checkpoint) == manifest.source.id and not Path(checkpoint).is_dir()
        source: Path | None = source_folder(checkpoint, manifest.source.revision if same else None)
    else:
        source = _recorded(manifest.source)
    if source is None:
        note = f"checkpoint {manifest.source.id} is not at hand: parity not measured; pass --checkpoint"
        return CheckReport(manifest, size, None, (), note)
    try:
        _refuse_other(source, manifest.source)
    except UhdError as error:
        if checkpoint is not None:
            raise
        return CheckReport(manifest, size, None, (), f"{error}: parity not measured")
    config = model_config(manifest)
    opened = open_checkpoint(source, config.language.vocab)
    try:
        reference = as_stored(opened, config.language, manifest.quantization)
        original = None if isinstance(opened, GptqCheckpoint) else opened
        measured = measure_parity(
            folder, reference, config, original=original, device=device, progress=progress
        )
    except UhdError as error:
        if manifest.backend not in ENGINE_BACKENDS or device is not None:
            raise
        # An engine needs its GPU and its TensorRT; the files are right all the same.
        return CheckReport(manifest, size, source, (), f"{error}: parity not measured")
    finally:
        opened.close()
    return CheckReport(manifest, size, source, tuple(measured), None)


def model_config(manifest: Manifest) -> CheckpointConfig:
    """The configuration that the bundle was built with."""
    model, settings = manifest.model, manifest.settings
    return CheckpointConfig(
        vision=model.vision,
        projector=model.projector,
        language=model.language,
        layout=settings.layout,
        template=settings.template,
        separators=settings.separators,
        upscale_only=settings.upscale_only,
        release=manifest.source.release,
        sampling=settings.sampling,
        prompt_limit=settings.prompt_limit,
    )


def _recorded(source: Source) -> Path | None:
    """The folder of the recorded source if it is on this machine: nano, a folder, or a cached download."""
    if source.id == NANO:
        return source_folder(NANO)
    if Path(source.id).is_dir():
        return whole_folder(Path(source.id))
    if Path(source.id).is_absolute():
        return None
    return cached(source.id, source.revision)


def _refuse_other(folder: Path, source: Source) -> None:
    """Raise UhdError where `folder` is not the checkpoint that the bundle was built from."""
    if weight_sizes(folder) != source.weights:
        raise UhdError(f"checkpoint {folder}: its weights differ from those the bundle was built from")
    config = folder / "config.json" if source.config is None else Path(source.config)
    if config.is_file() and hash_file(config) != source.config_sha256:
        raise UhdError(f"checkpoint {folder}: {config.name} differs from the one the bundle was built with")
