"""The whole model in PyTorch: the reference that every exported part is checked against."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import nn

from uhd_export.checkpoint.config import CheckpointConfig, read_config
from uhd_export.checkpoint.fields import choice
from uhd_export.checkpoint.int4.gptq import open_checkpoint
from uhd_export.checkpoint.options import ImageOptions, SourceOptions
from uhd_export.checkpoint.reader import PROJECTOR_PREFIX, VISION_PREFIX, Checkpoint
from uhd_export.checkpoint.source import source_folder
from uhd_export.checkpoint.tokenizer import checkpoint_tokenizer
from uhd_export.model.language import LanguageModel
from uhd_export.model.projector import HiwinProjector, V1Projector
from uhd_export.model.vit import Geometry, VisionTower
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.layout import layout_indices
from uhd_export.runtime.image.pixels import cut, normalise
from uhd_export.runtime.image.slicing import MAX_SLICES, SlicePlan, plan_slices
from uhd_export.runtime.image.source import ImageLike, Images, as_images, open_image
from uhd_export.runtime.language import prompt as prompts

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class UhdModel:
    """LLaVA-UHD v2 in plain PyTorch. Make one with `load_model`."""

    def __init__(
        self, folder: Path, config: CheckpointConfig, dtype: torch.dtype, images: ImageOptions
    ) -> None:
        self.folder, self.config, self.dtype, self.images = folder, config, dtype, images
        parts = Parts.on_meta(config)
        self.vision_tower, self.projector, self.language = parts
        checkpoint = open_checkpoint(folder, config.language.vocab)
        refuse_unknown(checkpoint, config)
        for prefix, module in parts.by_prefix().items():
            checkpoint.load_into(module, prefix, dtype)
        checkpoint.close()
        self._tokenizer: Tokenizer | None = None

    def plan(self, image: Image.Image) -> SlicePlan:
        """How `image` is cut."""
        return plan_slices(
            image.size,
            max_slices=self.images.max_slices,
            resize=self.images.resize,
            upscale_only=self.config.upscale_only,
        )

    def geometry(self, rows: int, cols: int) -> Geometry:
        """The geometry tensors of a crop of rows x cols patches."""
        arrays = self.config.model.geometry(
            rows, cols, grid_mode=self.images.grid_mode, roi_rounding=self.images.roi_rounding
        )
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    @torch.inference_mode()
    def encode_crops(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, 14h, 14w) normalised pixels of equal crops to (B, side^2, D) tokens."""
        patch = self.config.vision.patch
        geometry = self.geometry(pixels.shape[2] // patch, pixels.shape[3] // patch)
        pixels = pixels.to(self.dtype)
        return self.projector(self.vision_tower(pixels, geometry), pixels, geometry)

    def encode_image(self, image: ImageLike) -> list[torch.Tensor]:
        """One (tokens, D) tensor a crop: slices first, row by row, the overview last."""
        return self._encode(open_image(image))[1]

    def _encode(self, image: Image.Image) -> tuple[SlicePlan, list[torch.Tensor]]:
        plan = self.plan(image)
        crops = [torch.from_numpy(normalise(crop)) for crop in cut(image, plan)]
        tokens: list[torch.Tensor] = []
        if len(crops) > 1:
            tokens.extend(self.encode_crops(torch.stack(crops[:-1])))
        tokens.extend(self.encode_crops(crops[-1][None]))
        return plan, tokens

    def input_ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of `prompt`, -200 where an image goes."""
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        if self._tokenizer is None:
            self._tokenizer = checkpoint_tokenizer(self.folder)
        return prompts.encode(self._tokenizer, prompt)

    @torch.inference_mode()
    def inputs_embeds(self, image: Images, prompt: str | Sequence[int]) -> torch.Tensor:
        """(1, S, D) embeddings of `prompt` with each image's tokens and separators in place."""
        images = as_images(image)
        ids = self.input_ids(prompt)
        if ids.count(prompts.IMAGE_ID) != len(images):
            raise UhdError(
                f"prompt has {ids.count(prompts.IMAGE_ID)} <image> markers for {len(images)} images"
            )
        if not ids:
            raise UhdError("prompt: empty; ask a question")
        vocab = self.config.language.vocab
        for token in ids:
            if token != prompts.IMAGE_ID and not 0 <= token < vocab:
                raise UhdError(f"prompt: token id {token} is outside the vocabulary of {vocab}")
        rest, table = iter(images), self.language.model.embed_tokens
        pieces = []
        for token in ids:
            if token == prompts.IMAGE_ID:
                pieces.append(self._visual_embeds(next(rest)))
            else:
                pieces.append(table(torch.tensor([token])))
        return torch.cat(pieces)[None]

    def _visual_embeds(self, image: ImageLike) -> torch.Tensor:
        plan, crops = self._encode(open_image(image))
        rows, separators = layout_indices(
            plan.slice_grid,
            layout=self.config.layout,
            side=self.config.projector.side,
            separators=self.config.separators,
        )
        source, tokens = torch.from_numpy(rows), torch.from_numpy(separators)
        out = torch.cat(crops)[source.clamp(min=0)]
        out[source < 0] = self.language.model.embed_tokens(tokens[source < 0])
        return out

    @torch.inference_mode()
    def logits(self, image: Images, prompt: str | Sequence[int]) -> torch.Tensor:
        """(1, S, vocab) logits."""
        return self.language(self.inputs_embeds(image, prompt))

    @torch.inference_mode()
    def generate_ids(self, image: Images, prompt: str | Sequence[int], max_new_tokens: int) -> list[int]:
        """Greedy continuation; ends before `max_new_tokens` after an end-of-text token."""
        embeds, cache = self.inputs_embeds(image, prompt), self.language.new_cache()
        out: list[int] = []
        while len(out) < max_new_tokens:
            token = int(self.language(embeds, cache, last_only=True)[0, -1].argmax())
            out.append(token)
            if token in self.config.language.eos:
                break
            embeds = self.language.model.embed_tokens(torch.tensor([[token]]))
        return out


class Parts(NamedTuple):
    """The model's three parts."""

    vision_tower: VisionTower
    projector: HiwinProjector | V1Projector
    language: LanguageModel

    @classmethod
    def on_meta(cls, config: CheckpointConfig) -> "Parts":
        """The parts on the meta device, where they hold no memory."""
        projector = HiwinProjector if config.projector.kind == "hiwin" else V1Projector
        with torch.device("meta"):
            return cls(
                VisionTower(config.vision), projector(config.projector), LanguageModel(config.language)
            )

    def by_prefix(self) -> dict[str, nn.Module]:
        """The parts by the prefix of their tensors in a checkpoint."""
        return {VISION_PREFIX: self.vision_tower, PROJECTOR_PREFIX: self.projector, "": self.language}


def refuse_unknown(checkpoint: Checkpoint, config: CheckpointConfig) -> None:
    """Raise UhdError naming tensors that the model of `config` lacks in `checkpoint`, or has no place for.

    So it does where one of vision is of another shape, as with another CLIP's configuration.
    """
    modules = Parts.on_meta(config).by_prefix().items()
    used = {prefix + name for prefix, module in modules for name, _ in module.named_parameters()}
    for name in sorted(used - checkpoint.names()):
        checkpoint.shape(name)
    for prefix, module in modules:
        if prefix:  # the vocabulary of the language model is cut
            for name, parameter in module.named_parameters():
                checkpoint.check_shape(prefix + name, tuple(parameter.shape))
    last = f"encoder.layers.{config.vision.layers}."
    checkpoint.refuse_unknown(used, lambda n: last in n or (config.language.tied and n == "lm_head.weight"))


def load_model(
    source: str | Path,
    *,
    dtype: str = "float32",
    revision: str | None = None,
    config: str | Path | None = None,
    vision_tower: str | Path | None = None,
    layout: str | None = None,
    mask: int | None = None,
    grid_mode: str = "selective",
    max_slices: int = MAX_SLICES,
    resize: int | None = None,
    roi_rounding: str | None = None,
) -> UhdModel:
    """Load a LLaVA-UHD checkpoint, a folder, a Hugging Face hub id or "nano", as a PyTorch model.

    `revision` is a branch, tag or commit on the hub; `config` is a path that replaces the folder's
    config.json; `vision_tower` a folder or hub id that replaces its `mm_vision_tower`; `layout` is flat or
    merged; `mask` the feature_scale_mask; `grid_mode` selective, fix or pyramid; `resize` the longest side
    before slicing, or None; `roi_rounding` exact or bf16, by default as the released code in `dtype`.
    Raises UhdError for whatever is missing, broken or not supported.
    """
    choice("dtype", dtype, DTYPES)
    roi_rounding = roi_rounding or ("bf16" if dtype == "bfloat16" else "exact")
    reading = SourceOptions(config, vision_tower, layout, mask, revision=revision)
    images = ImageOptions(grid_mode, max_slices, resize, roi_rounding)
    folder = source_folder(source, revision)
    return UhdModel(folder, read_config(folder, reading), DTYPES[dtype], images)
