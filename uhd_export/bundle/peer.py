"""An independent check: the language model and the tokenizer by transformers, on the same folder.

Nothing of the checkpoint's reader is used here, so that what it gets wrong is seen. Where transformers is
not installed, or cannot open the folder, the entries say so.
"""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import numpy as np

from uhd_export.checkpoint.fields import read_json
from uhd_export.checkpoint.int4.settings import quantization_settings
from uhd_export.runtime.bundle.manifest import Parity
from uhd_export.runtime.config import LanguageConfig
from uhd_export.runtime.memory import available_memory
from uhd_export.runtime.pipeline import Pipeline

PEER = "transformers on the same folder"
# Texts on which tokenizers differ: spaces, digits, scripts, emoji, control characters and tokens.
HARD_TEXTS = (
    "What is shown in this image?",
    "  two  spaces,\ttabs\n\n  and  lines  ",
    "12345 3.14 1,000,000 ½ ²",
    "naïve café Ünïcödé e\u0301 ﬁ",
    "图中有几个人？ 日本語テキスト 한국어",
    "🙂👩‍👩‍👧 \u200b\ufeff\u00a0",
    "</s><s> <unk> <0x0A> <|im_start|>user",
    "don't can't I'm we'll",
    "",
)


def peer_entries(
    pipeline: Pipeline, folder: Path, embeds: np.ndarray, logits: np.ndarray, limit: float | None
) -> list[Parity]:
    """`logits` (vocab,) of the bundle after (S, D) `embeds` against transformers', and ids of HARD_TEXTS."""
    model, tokens = "logits", "tokenizer"
    metrics = {model: "relative error", tokens: f"differing of {len(HARD_TEXTS)} texts"}
    inputs = {model: f"{len(embeds)} positions", tokens: "hard texts"}
    config, given = pipeline.manifest.model.language, pipeline.manifest.source.config
    path = folder / "config.json" if given is None else Path(given)
    return [
        _measure(
            model,
            inputs[model],
            metrics[model],
            limit,
            lambda: _logits_error(folder, path, config, embeds, logits),
        ),
        _measure(tokens, inputs[tokens], metrics[tokens], None, lambda: _differing(pipeline, folder)),
    ]


class _Unavailable(Exception):
    """Why transformers cannot judge."""


def _measure(part: str, inputs: str, metric: str, limit: float | None, measure: Any) -> Parity:
    if importlib.util.find_spec("transformers") is None:
        return Parity(part, inputs, metric, None, limit, "transformers is not installed", PEER)
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # what it imports says much that is nobody's concern here
    try:
        return Parity(part, inputs, metric, float(measure()), limit, None, PEER)
    except Exception as error:  # another library's reader: whatever stops it is a reason, not a failure
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return Parity(part, inputs, metric, None, limit, f"transformers: {reason[:200]}", PEER)
    finally:
        logging.disable(disabled)


def _logits_error(
    folder: Path, path: Path, config: LanguageConfig, embeds: np.ndarray, logits: np.ndarray
) -> float:
    """The error against the weights in `folder`, configured as the file `path` says."""
    import torch
    import transformers

    if quantization_settings(folder) is not None:
        raise _Unavailable("the folder is quantized, which it needs a GPU's kernels for")
    parameters = 4 * config.layers * (4 * config.hidden**2 + 3 * config.hidden * config.intermediate)
    needed, available = parameters + 8 * config.hidden * config.vocab, available_memory()
    if available is not None and needed > available:
        raise _Unavailable("the whole model in float32 does not fit the memory")
    kinds: dict[str, tuple[Any, Any]] = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }
    settings, kind = kinds[config.kind]
    fields = {name: value for name, value in read_json(path).items() if not name.startswith("mm_")}
    transformers.logging.disable_progress_bar()
    own = settings(**{**fields, "model_type": config.kind})
    model = kind.from_pretrained(folder, config=own, dtype=torch.float32, local_files_only=True).eval()
    with torch.inference_mode():
        output = model(inputs_embeds=torch.from_numpy(embeds)[None].float(), logits_to_keep=1)
    expected = output.logits[0, -1, : config.vocab].double().numpy()
    return float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))


def _differing(pipeline: Pipeline, folder: Path) -> int:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if (folder / "tokenizer.json").is_file():
        theirs = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    else:
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return sum(pipeline.input_ids(text) != list(theirs(text).input_ids) for text in HARD_TEXTS)
