"""The model that is planned: named, read from a config, or built already."""

from dataclasses import dataclass, replace
from pathlib import Path

from uhd_export.checkpoint.config import CheckpointConfig, parse_config, read_config
from uhd_export.checkpoint.fields import read_json
from uhd_export.checkpoint.int4.settings import FIELD, quantization_settings
from uhd_export.checkpoint.options import ImageOptions
from uhd_export.checkpoint.source import EMBEDDED, NANO, locate
from uhd_export.checkpoint.vision_tower import recorded_tower
from uhd_export.runtime.bundle.manifest import MANIFEST, Manifest, read_manifest
from uhd_export.runtime.choices import ENGINE_BACKENDS, updates_on_gpu
from uhd_export.runtime.config import OFFICIAL, ModelConfig, official
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.slicing import Size, SlicePlan, plan_slices


@dataclass(frozen=True)
class Subject:
    """A model's sizes, how it cuts images and lays out their tokens, and the most positions of its cache.

    `quantized` weights are stored in 4 bits already; a bundle has a `manifest`.
    """

    name: str
    model: ModelConfig
    layout: str
    context: int
    upscale_only: bool = False
    quantized: bool = False
    manifest: Manifest | None = None

    def images(self, given: ImageOptions, typed: set[str]) -> ImageOptions:
        """How images are cut: as `given` where the user `typed` it, else as the bundle says."""
        if self.manifest is None:
            return given
        settings = self.manifest.settings
        return replace(given, **{n: getattr(settings, n) for n in vars(given) if n not in typed})

    def cut(self, size: Size, images: ImageOptions) -> SlicePlan:
        """How an image of `size` is cut. Raises UhdError where it cannot be."""
        return plan_slices(
            size,
            max_slices=images.max_slices,
            resize=images.resize,
            upscale_only=self.upscale_only,
            patch=self.model.vision.patch,
        )

    def check(self, device: str | None, context: int | None) -> None:
        """Raise UhdError where it does not run on the GPU called `device` (None: here), or with `context`."""
        if context is not None and context > self.context:
            raise UhdError(
                f"--context {context}: {self.name} has {self.context} positions; use at most these"
            )
        if self.manifest is None:
            return
        backend, precision = self.manifest.backend, self.manifest.precision
        if backend in ENGINE_BACKENDS:
            if device is None:
                raise UhdError(f"--model {self.name}: is for {backend}; give --device, such as rtx-4090")
        elif device is not None and not updates_on_gpu(precision.cache, precision.language):
            raise UhdError(
                f"--device {device}: {self.name} does not run on a GPU: ONNX Runtime has no kernel for its "
                f"{precision.cache} cache beside {precision.language}; build it with --dtype float16 --cache "
                "float16, or leave --device out"
            )


def find_subject(name: str) -> Subject:
    """The model called `name`: an official one's name, a config.json or its folder, or a bundle.

    Of a checkpoint on the hub, files of JSON alone are downloaded. Raises UhdError.
    """
    path = Path(name)
    if (path / MANIFEST).is_file():
        manifest = read_manifest(name)
        settings = manifest.settings
        return Subject(
            name,
            manifest.model,
            settings.layout,
            settings.context,
            settings.upscale_only,
            manifest=manifest,
        )
    known = {official_name.lower(): official_name for official_name in OFFICIAL}
    if name.lower() in known:
        model = official(known[name.lower()])
        return Subject(name, model, "flat", model.language.context)
    if path.is_file():
        raw = read_json(path)
        return _of_config(name, parse_config(raw, recorded_tower(path.parent, raw)), raw.get(FIELD))
    if path.exists() or "/" in name or name == NANO:
        folder = EMBEDDED if name == NANO else locate(name, weights=False)
        return _of_config(name, read_config(folder), quantization_settings(folder))
    raise UhdError(f"--model {name!r}: give {', '.join(known)}, a config.json or its folder, or a bundle")


def _of_config(name: str, config: CheckpointConfig, quantization: object) -> Subject:
    return Subject(
        name,
        config.model,
        config.layout,
        config.language.context,
        config.upscale_only,
        quantized=quantization is not None,
    )
