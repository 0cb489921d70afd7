"""Calibration sequences: what the language model will see, with real visual tokens in place."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from uhd_export.calibration.activations import Activations
from uhd_export.calibration.options import CalibrationOptions
from uhd_export.checkpoint.config import CheckpointConfig
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.model.language import LanguageModel
from uhd_export.model.reference import VisionReference, embedding_rows, reference_embeds
from uhd_export.runtime.config import LanguageConfig
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.source import open_image
from uhd_export.runtime.language.pairs import Pair, conversation_ids
from uhd_export.runtime.language.prompt import IMAGE_ID
from uhd_export.runtime.language.sequence import PromptSequence, plan_image
from uhd_export.runtime.settings import Settings

Progress = Callable[[int, int], None]

# Greedy tokens of the unquantized model, on which predictions are compared.
NEW_TOKENS = 16
# Below this many weights float32 costs nothing, and CPUs are slow in float16.
_SMALL = 1 << 28


@dataclass
class Sequences:
    """Embeddings to calibrate on, and held-out ones that end in greedy tokens of the model.

    The last `judged[i]` positions of held-out sequence i predict its greedy tokens.
    """

    calibration: Activations
    held_out: Activations
    judged: tuple[int, ...]


def choose(pairs: list[Pair], options: CalibrationOptions) -> Iterable[Pair]:
    """The pairs in the order that the seed gives. Raises UhdError where there are too few."""
    if len(pairs) < options.pairs:
        raise UhdError(
            f"too few samples: {len(pairs)} image-question pairs, {options.samples} to calibrate on and "
            f"{options.held_out} held out are wanted; add pairs or lower --samples"
        )
    return (pairs[i] for i in np.random.default_rng(options.seed).permutation(len(pairs)))


@torch.inference_mode()
def build_sequences(
    checkpoint: Checkpoint,
    config: CheckpointConfig,
    settings: Settings,
    tokenizer: Tokenizer,
    pairs: list[Pair],
    options: CalibrationOptions,
    progress: Progress,
) -> Sequences:
    """Encode the pairs with the checkpoint's own vision part and embedding table, in float32.

    Held-out pairs come first in the seed's order, so that more samples of one file leave them as they are.
    `progress(done, total)` counts sequences. Raises UhdError naming a pair whose image
    cannot be read, and where too few are short enough.
    """
    options.check_context(config.language.context)
    vision = VisionReference(checkpoint, config, roi_rounding=settings.roi_rounding)
    language: LanguageModel | None = None
    held_out: list[torch.Tensor] = []
    calibration: list[torch.Tensor] = []
    judged: list[int] = []
    passed = 0
    for pair in choose(pairs, options):
        if len(calibration) == options.samples:
            break
        held = len(held_out) < options.held_out
        ids, prompt = conversation_ids(
            tokenizer, pair, settings.template, next(iter(config.language.eos), None)
        )
        try:
            images = [plan_image(open_image(image), settings, config.model) for image in pair.images]
            # Images of later turns are not in the first prompt.
            first = PromptSequence(ids[:prompt], images[: ids[:prompt].count(IMAGE_ID)])
            sequence = first if held else PromptSequence(ids, images)
        except UhdError as error:
            raise UhdError(f"{pair.where}: {error}") from None
        shortest = len(first) + (NEW_TOKENS if held else 0)
        if shortest > options.length:
            passed += 1
            continue
        embeds = torch.from_numpy(reference_embeds(checkpoint, vision, sequence))
        if held:
            language = language or _language_model(checkpoint, config.language)
            tokens = greedy_tokens(language, embeds, NEW_TOKENS)
            further = torch.from_numpy(embedding_rows(checkpoint, tokens[:-1]))
            held_out.append(torch.cat([embeds, further]))
            judged.append(len(tokens))
        else:
            calibration.append(embeds[: options.length])
        progress(len(held_out) + len(calibration), options.pairs)
    if len(calibration) < options.samples:
        raise UhdError(
            f"too few samples: {passed} of {len(pairs)} prompts are longer than {options.length} positions, "
            f"{len(calibration)} of {options.samples} sequences remain; raise --length or lower --samples"
        )
    return Sequences(Activations.join(calibration), Activations.join(held_out), tuple(judged))


def _language_model(checkpoint: Checkpoint, config: LanguageConfig) -> LanguageModel:
    """The language model to generate with: in the type that is stored, so that a large one stays mapped."""
    with torch.device("meta"):
        model = LanguageModel(config)
    small = sum(parameter.numel() for parameter in model.parameters()) < _SMALL
    stored = checkpoint.tensor("model.embed_tokens.weight").dtype
    checkpoint.load_into(model, "", torch.float32 if small else stored)
    return model


@torch.inference_mode()
def greedy_tokens(model: LanguageModel, embeds: torch.Tensor, count: int) -> list[int]:
    """Up to `count` greedy tokens after (S, D) embeddings; ends after an end-of-text token."""
    table = model.model.embed_tokens
    x, cache = embeds[None].to(table.weight.dtype), model.new_cache()
    out: list[int] = []
    while len(out) < count:
        out.append(int(model(x, cache, last_only=True)[0, -1].argmax()))
        if out[-1] in model.config.eos:
            break
        x = table(torch.tensor([[out[-1]]]))
    return out
