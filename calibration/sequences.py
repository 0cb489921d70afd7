"""Calibration sequences: what the language model will see, with real visual tokens in place."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from uhd_export.calibration.activations import Activations
from uhd_export.calibration.data import Pair
from uhd_export.checkpoint.config import CheckpointConfig
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.model.language import LanguageModel
from uhd_export.model.reference import VisionReference, embedding_rows, reference_embeds
from uhd_export.runtime.config import LanguageConfig
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.pixels import open_image
from uhd_export.runtime.language import prompt as prompts
from uhd_export.runtime.language.sequence import PromptSequence, plan_image
from uhd_export.runtime.progress import Bar
from uhd_export.runtime.settings import Settings

MIN_SAMPLES = 4
# Greedy tokens of the unquantized model, on which predictions are compared.
NEW_TOKENS = 16
# Below this many weights float32 costs nothing, and CPUs are slow in float16.
_SMALL = 1 << 28


@dataclass(frozen=True)
class SequenceOptions:
    """`samples` sequences to calibrate on and `held_out` others to judge by, `length` positions at most.

    `seed` chooses and orders the pairs. A pair whose prompt is longer than `length` is passed over;
    answers are cut.
    """

    samples: int = 32
    held_out: int = 8
    length: int = 2048
    seed: int = 0

    def check(self, context: int) -> None:
        """Raise UhdError naming the option that cannot be met."""
        if self.samples < MIN_SAMPLES:
            raise UhdError(f"samples {self.samples}: too few to calibrate on; at least {MIN_SAMPLES}")
        if self.held_out < 1:
            raise UhdError(f"held-out {self.held_out}: at least 1 sequence is needed to judge by")
        if self.seed < 0:
            raise UhdError(f"seed {self.seed}: must be 0 or more")
        if not 1 <= self.length <= context:
            raise UhdError(f"length {self.length}: must be from 1 to the model's context of {context}")


@dataclass
class Sequences:
    """Embeddings to calibrate on, and held-out ones that end in greedy tokens of the model.

    The last `judged[i]` positions of held-out sequence i predict its greedy tokens.
    """

    calibration: Activations
    held_out: Activations
    judged: tuple[int, ...]


def conversation_ids(
    tokenizer: Tokenizer, pair: Pair, template: str, eos: int | None
) -> tuple[list[int], int]:
    """Token ids of the whole conversation, IMAGE_ID in place, and how many of them are its first prompt."""
    prefix = prompts.opening(tokenizer)
    first = prompts.render(pair.turns[0].question, template, len(pair.images))
    ids = prompts.encode(tokenizer, first)
    prompt = len(ids)
    for index, turn in enumerate(pair.turns):
        if index:
            further = prompts.FOLLOW_UPS[template].replace("{question}", turn.question)
            ids += prompts.encode(tokenizer, further)[len(prefix) :]
        if turn.answer is not None:
            ids += tokenizer.encode(turn.answer, add_special_tokens=False).ids
    if eos is not None and pair.turns[-1].answer is not None:
        ids.append(eos)
    return ids, prompt


def choose(pairs: list[Pair], options: SequenceOptions) -> Iterable[Pair]:
    """The pairs in the order that the seed gives. Raises UhdError where there are too few."""
    wanted = options.samples + options.held_out
    if len(pairs) < wanted:
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
    options: SequenceOptions,
    bar: Bar,
) -> Sequences:
    """Encode the pairs with the checkpoint's own vision part and embedding table, in float32.

    Held-out pairs come first in the seed's order, so that more samples of one file leave them as they are.
    Raises UhdError naming a pair whose image cannot be read, and where too few are short enough.
    """
    options.check(config.language.context)
    vision = VisionReference(checkpoint, config, roi_rounding=settings.roi_rounding)
    language: LanguageModel | None = None
    held_out, judged, calibration, passed = [], [], [], 0
    for pair in choose(pairs, options):
        if len(calibration) == options.samples:
            break
        held = len(held_out) < options.held_out
        ids, prompt = conversation_ids(
            tokenizer, pair, settings.template, next(iter(config.language.eos), None)
        )
        try:
            images = [
                plan_image(open_image(image), settings, side=config.projector.side, patch=config.vision.patch)
                for image in pair.images
            ]
            sequence = PromptSequence(ids[:prompt] if held else ids, images)
        except UhdError as error:
            raise UhdError(f"{pair.where}: {error}") from None
        shortest = len(PromptSequence(ids[:prompt], images)) + (NEW_TOKENS if held else 0)
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
        bar.advance()
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
    x, cache, out = embeds[None].to(table.weight.dtype), model.new_cache(), []
    while len(out) < count:
        out.append(int(model(x, cache, last_only=True)[0, -1].argmax()))
        if out[-1] in model.config.eos:
            break
        x = table(torch.tensor([[out[-1]]]))
    return out


def run_settings(
    config: CheckpointConfig,
    *,
    grid_mode: str = "selective",
    max_slices: int = 9,
    resize: int | None = None,
    roi_rounding: str,
) -> Settings:
    """How images are cut and laid out while calibrating: as the bundle will do."""
    return Settings(
        layout=config.layout,
        template=config.template,
        separators=config.separators,
        grid_mode=grid_mode,
        max_slices=max_slices,
        resize=resize,
        upscale_only=config.upscale_only,
        roi_rounding=roi_rounding,
        context=config.language.context,
    )
