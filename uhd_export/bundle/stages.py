"""The stages of a build and of GPTQ, by the names that their bars have, and how long each may take.

Each stage goes through so many numbers of the vision part and of the language model, in some stages as often
as there are images or positions. The seconds of each were measured by `benchmarks/stages.py` at Vicuna-7B's
width, on the machine that `nano/presets.json` names; elsewhere they say how long stages take beside others.
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
# Of the vision part, and of the language model.
Units = tuple[int, int]


@dataclass(frozen=True)
class Sizes:
    """Numbers of the folded vision part, of the language model's linear layers, and of its head."""

    vision: int
    language: int
    head: int


def build_units(
    sizes: Sizes, *, int8_vision: bool, int8_cache: bool, verify: bool, backend: str
) -> dict[str, Units]:
    """What each stage of a build goes through, in order."""
    vision, language = sizes.vision, sizes.language + sizes.head
    units: dict[str, Units] = {VISION_CALIBRATION: (vision, 0)} if int8_vision else {}
    units[VISION] = vision, 0
    if int8_cache:
        units[CACHE_CALIBRATION] = vision, language
    units |= {LANGUAGE: (0, language), EMBEDDINGS: (0, sizes.head), HASHING: (vision, language)}
    if verify:
        units[PARITY] = vision, language
    if backend in ENGINE_BACKENDS:
        vision_part, language_part = part_files(backend)
        units |= {vision_part: (vision, 0), language_part: (0, language)}
    return units


def gptq_units(
    sizes: Sizes, *, images: int, samples: int, share: float = 1.0, questions: int = 0
) -> dict[str, Units]:
    """The same of GPTQ: `images` are yet to be encoded, and `share` of the layers to be seen by `samples`.

    `questions` are of the embedded model, whatever its size.
    """
    units: dict[str, Units] = {IMAGES: (images * sizes.vision, 0)} if images else {}
    units[GPTQ] = 0, round(share * sizes.language) * samples * _POSITIONS
    units[WRITING] = sizes.vision, sizes.language + sizes.head
    if questions:
        units[ASKING] = 0, questions
    return units


def expected_seconds(units: dict[str, Units]) -> dict[str, float]:
    """By stage."""
    rates = measured()["rates"]["seconds"]
    return {
        stage: sum(rate * count for rate, count in zip(rates[stage], counts, strict=True))
        for stage, counts in units.items()
    }
