"""The stages of a build and of GPTQ, by the names that their bars have, and how long each may take.

Each stage goes through so many units: numbers of a part, or those times images or positions. A unit's
seconds were measured by `benchmarks/stages.py` at Vicuna-7B's width, on the machine that `nano/presets.json`
names; on another they say how long stages take beside each other.
"""

from dataclasses import dataclass

from uhd_export.bundle.presets import measured
from uhd_export.runtime.bundle.manifest import EMBEDDINGS, LANGUAGE, VISION, part_files
from uhd_export.runtime.choices import ENGINE_BACKENDS

VISION_CALIBRATION, CACHE_CALIBRATION = f"{VISION}, calibrating", "key-value cache, calibrating"
HASHING, PARITY = "hashing", "parity"
IMAGES, GPTQ, WRITING, ASKING = "encoding images", "GPTQ", "writing", "asking"
# Of a question about a 1008x672 image.
_POSITIONS = 1060


@dataclass(frozen=True)
class Sizes:
    """Numbers of the folded vision part, of the language model's linear layers, and of its head."""

    vision: int
    language: int
    head: int

    @property
    def all(self) -> int:
        """Of the whole model."""
        return self.vision + self.language + self.head


def build_units(
    sizes: Sizes, *, int8_vision: bool, int8_cache: bool, verify: bool, backend: str
) -> dict[str, int]:
    """What each stage of a build goes through, in order."""
    units = {VISION_CALIBRATION: sizes.vision} if int8_vision else {}
    units[VISION] = sizes.vision
    if int8_cache:
        units[CACHE_CALIBRATION] = sizes.language
    units |= {LANGUAGE: sizes.language + sizes.head, EMBEDDINGS: sizes.head, HASHING: sizes.all}
    if verify:
        units[PARITY] = sizes.all
    if backend in ENGINE_BACKENDS:
        vision, language = part_files(backend)
        units |= {vision: sizes.vision, language: sizes.language + sizes.head}
    return units


def gptq_units(
    sizes: Sizes, *, images: int, samples: int, share: float = 1.0, questions: int = 0
) -> dict[str, int]:
    """The same of GPTQ: `images` are yet to be encoded, and `share` of the layers to be seen by `samples`."""
    units = {IMAGES: images * sizes.vision} if images else {}
    units |= {GPTQ: round(share * sizes.language) * samples * _POSITIONS, WRITING: sizes.all}
    if questions:
        units[ASKING] = questions
    return units


def expected_seconds(units: dict[str, int]) -> dict[str, float]:
    """By stage."""
    rates = measured()["rates"]["seconds"]
    return {stage: rates[stage] * count for stage, count in units.items()}
