"""What a bundle says of itself that belongs beside its figures: parity, quality, tokens by image size."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from uhd_export.runtime.bundle.manifest import QUALITY, Manifest
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.layout import visual_token_count
from uhd_export.runtime.image.slicing import Size, plan_slices
from uhd_export.runtime.json_files import read_json
from uhd_export.runtime.settings import Settings

_RATIOS = {"1:1": (1, 1), "3:2": (3, 2), "16:9": (16, 9)}
_STEP, _LONGEST = 84, 1680


@dataclass(frozen=True)
class TokenPoint:
    """An image of some aspect ratio: its slices and overview, and its positions in the prompt."""

    ratio: str
    size: Size
    crops: int
    visual_tokens: int


def bundle_evidence(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Parity and quality as the bundle records them, ready for JSON; `quality` None where it has none."""
    quality = None
    if QUALITY in manifest.files:
        try:
            quality = read_json(folder / QUALITY, "build the bundle again")
        except OSError as error:
            raise UhdError(f"{folder / QUALITY}: cannot be read ({error}); build the bundle again") from None
    return {"parity": [asdict(parity) for parity in manifest.parity], "quality": quality}


def token_points(settings: Settings, *, side: int, patch: int) -> tuple[TokenPoint, ...]:
    """Visual tokens of images of several aspect ratios, by size: arithmetic alone."""
    points = []
    for ratio, (across, down) in _RATIOS.items():
        for longest in range(_STEP * 2, _LONGEST + 1, _STEP):
            size = (longest, round(longest * down / across))
            plan = plan_slices(
                size,
                max_slices=settings.max_slices,
                resize=settings.resize,
                upscale_only=settings.upscale_only,
                patch=patch,
            )
            tokens = visual_token_count(plan.slice_grid, layout=settings.layout, side=side)
            points.append(TokenPoint(ratio, size, len(plan.crop_sizes), tokens))
    return tuple(points)
