"""A short numeric check: the logits of one prompt with an image, as the bundle gave them where it was built.

A device that has never run the bundle is asked for the same logits when it is opened there. Two rows: after
the prompt, and after one token more, which reads the key-value cache. A wrong driver, kernel or library shows
here, not in answers. What passed is remembered, so the next start takes no time for it.
"""

import dataclasses
import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from uhd_export.runtime.bundle.manifest import Manifest
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.files import cache_folder, write_file
from uhd_export.runtime.image.pattern import pattern
from uhd_export.runtime.language import prompt as prompts
from uhd_export.runtime.language.generation import TextGenerator
from uhd_export.runtime.language.sampling import greedy
from uhd_export.runtime.language.sequence import PromptSequence, plan_image

PROBE = "probe.npy"
_SIZE, _QUESTION = (300, 200), "What is shown in this image?"
# Where the manifest has no limit of its own for the logits.
_LIMIT = 5e-2


def record_probe(folder: Path, manifest: Manifest, generator: TextGenerator) -> None:
    """Write the logits that the bundle in `folder` gives, float32 (2, vocab), where the context allows."""
    sequence = _sequence(manifest, generator)
    if sequence is not None:
        np.save(folder / PROBE, _logits(generator, sequence, None))


def check_device(folder: Path, manifest: Manifest, generator: TextGenerator, device: str) -> None:
    """Compare this device's logits with the recorded ones, the first time that `device` opens the bundle.

    `device` names what computes, with its version. Does nothing where no logits were recorded or the context
    is too small. Raises UhdError where they differ by more than the bundle's own parity may.
    """
    sequence = _sequence(manifest, generator) if PROBE in manifest.files else None
    if sequence is None:
        return
    digests = sorted(record.sha256 for record in manifest.files.values())
    key = hashlib.sha256(json.dumps([digests, device]).encode()).hexdigest()
    passed = cache_folder() / "checked" / f"{key[:32]}.json"
    if passed.is_file():
        return
    expected = np.load(folder / PROBE)
    error = _relative_error(_logits(generator, sequence, greedy(expected[0])), expected)
    limits = [p.limit for p in manifest.parity if p.part.startswith("logits") and p.limit is not None]
    limit = max([*limits, _LIMIT])
    if not error <= limit:
        raise UhdError(
            f"device {device}: its logits differ from the bundle's by {error:.1e}, over {limit:.0e}; its "
            "answers would be wrong: update the driver and the backend, or use --device cpu"
        )
    with suppress(OSError):  # a cache that cannot be written: it is asked again the next time
        passed.parent.mkdir(parents=True, exist_ok=True)
        write_file(passed, json.dumps({"device": device, "relative_error": error, "limit": limit}))


def _sequence(manifest: Manifest, generator: TextGenerator) -> PromptSequence | None:
    """The prompt, its image as one crop; None where it and a token do not fit the context."""
    model = manifest.model
    settings = dataclasses.replace(manifest.settings, max_slices=1, resize=None)
    image = plan_image(pattern(*_SIZE), settings, model)
    ids = prompts.encode(generator.tokenizer, prompts.render(_QUESTION, settings.template))
    sequence = PromptSequence(ids, [image])
    return sequence if len(sequence) < generator.decoder.context else None


def _logits(generator: TextGenerator, sequence: PromptSequence, token: int | None) -> NDArray[Any]:
    """float32 (2, vocab): after the prompt, and after `token` (default: the likeliest)."""
    first = generator.prefill(sequence)
    return np.stack([first, generator.step(greedy(first) if token is None else token)])


def _relative_error(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    """||actual - expected|| / ||expected||, the worse of the two rows; NaN where a value is not finite."""
    difference = np.linalg.norm(actual.astype(np.float64) - expected, axis=1)
    return float((difference / np.linalg.norm(expected.astype(np.float64), axis=1)).max())
