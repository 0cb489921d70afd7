"""How many of the embedded model's questions a quantized language model still answers."""

from collections.abc import Mapping

import torch

from uhd_export.calibration.quality import Accuracy
from uhd_export.calibration.sequences import Progress, greedy_tokens
from uhd_export.checkpoint.config import CheckpointConfig
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.checkpoint.tokenizer import checkpoint_tokenizer
from uhd_export.model.language import LanguageModel
from uhd_export.model.reference import VisionReference, reference_embeds
from uhd_export.nano.evaluate import held_out_question
from uhd_export.runtime.language.prompt import encode, render
from uhd_export.runtime.language.sequence import PromptSequence, plan_image
from uhd_export.runtime.settings import Settings

_LONGEST = 8


@torch.inference_mode()
def measure_accuracy(
    weights: Mapping[str, Checkpoint],
    vision_from: Checkpoint,
    config: CheckpointConfig,
    settings: Settings,
    count: int,
    progress: Progress,
) -> Accuracy:
    """Ask each of `weights` the first `count` held-out questions, in float32, images encoded once;
    `progress(done, total)` counts questions.

    The language models are loaded whole: this is for the embedded model, a few megabytes.
    """
    tokenizer = checkpoint_tokenizer(vision_from.folder)
    vision = VisionReference(vision_from, config, roi_rounding=settings.roi_rounding)
    models = {name: _load(checkpoint, config) for name, checkpoint in weights.items()}
    exact = dict.fromkeys(models, 0)
    for index in range(count):
        image, question, expected = held_out_question(index)
        planned = plan_image(image, settings, config.model)
        sequence = PromptSequence(encode(tokenizer, render(question, settings.template)), [planned])
        embeds = torch.from_numpy(reference_embeds(vision_from, vision, sequence))
        for name, model in models.items():
            tokens = greedy_tokens(model, embeds, _LONGEST)
            exact[name] += tokenizer.decode(tokens).strip() == expected
        progress(index + 1, count)
    return Accuracy(count, exact)


def _load(checkpoint: Checkpoint, config: CheckpointConfig) -> LanguageModel:
    with torch.device("meta"):
        model = LanguageModel(config.language)
    checkpoint.load_into(model, "", torch.float32)
    return model
