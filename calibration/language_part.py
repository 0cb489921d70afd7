"""The language part of a GPTQ checkpoint alone: a plain LLaMA or Qwen2 one, as other programs open it.

Its integers, scales and other tensors are the checkpoint's own, bit for bit. The vocabulary is cut to the
tokenizer's, since others take its size from the tensors and would let rows without a token win.
"""

import re
from contextlib import closing
from pathlib import Path

import torch

from uhd_export.bundle.staging import output_errors, staged_folder
from uhd_export.calibration.sequences import Progress
from uhd_export.calibration.writer import write_json, write_shards
from uhd_export.checkpoint.config import cut_vocabulary
from uhd_export.checkpoint.copy import copy_own
from uhd_export.checkpoint.fields import optional, read_json
from uhd_export.checkpoint.int4.gptq import GptqCheckpoint
from uhd_export.checkpoint.int4.linears import LM_HEAD
from uhd_export.checkpoint.int4.settings import FIELD, is_quantized
from uhd_export.checkpoint.language_config import language_config
from uhd_export.checkpoint.reader import VOCABULARY, Checkpoint
from uhd_export.runtime.bundle.manifest import QUALITY, QUALITY_CHART
from uhd_export.runtime.config import LanguageConfig
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.progress import progress_bar

_TENSORS = re.compile(r"(model\.(embed_tokens|layers\.\d+|norm)|lm_head)\.(?!.*rotary_emb\.inv_freq$)")
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_COPIED = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
    *(QUALITY, QUALITY_CHART, "LICENSE", "LICENSE.txt", "NOTICE"),
)


def extract_language(
    folder: Path, out: str | Path, *, config: str | Path | None = None, progress: bool = False
) -> None:
    """Write the language part of the GPTQ checkpoint in `folder` into the folder `out`.

    `config` is a path that replaces the folder's config.json. Raises UhdError, where `folder` is not
    quantized too; then there is no `out`.
    """
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UhdError(f"output {out}: exists already; choose another, or delete it")
    if not is_quantized(folder):
        raise UhdError(f"checkpoint {folder}: is not quantized; `uhd-export quantize` it first")
    raw = read_json(Path(config) if config else folder / "config.json")
    with output_errors(out), staged_folder(out) as staging, progress_bar("writing", show=progress) as bar:
        write_language_part(folder, raw, staging, bar.set)


def write_language_part(folder: Path, raw: dict, target: Path, progress: Progress) -> None:
    """Fill `target` from the GPTQ checkpoint in `folder`, whose config.json is `raw`.

    `progress(done, total)` counts tensors; one shard's are in memory at a time. Raises UhdError.
    """
    path = folder / "generation_config.json"
    generating = read_json(path) if path.is_file() else {}
    language = cut_vocabulary(folder, language_config(raw, generating))
    with closing(GptqCheckpoint(folder, language.vocab)) as quantized:
        rows = _rows(quantized, language)
        zeros = quantized.zero_biases()
        settings = {"quant_method": "gptq", **quantized.settings, "checkpoint_format": quantized.format}
    unused = zeros | ({"lm_head.weight"} if language.tied else set())
    with closing(Checkpoint(folder)) as checkpoint:

        def read(name: str) -> torch.Tensor:
            tensor = checkpoint.stored(name)
            return tensor[:rows] if name in VOCABULARY else tensor

        write_shards(read, sorted(filter(_TENSORS.match, checkpoint.names() - unused)), target, progress)
    write_json(target / "config.json", plain_config(raw, language, rows) | {FIELD: settings})
    for name in _COPIED:
        if (folder / name).is_file():
            copy_own(folder, name, target / name)


def plain_config(raw: dict, language: LanguageConfig, vocab: int) -> dict:
    """config.json of a LLaMA or Qwen2 of `vocab` rows, whose type at run time is the scales'."""
    config = {
        "architectures": [_ARCHITECTURES[language.kind]],
        "model_type": language.kind,
        "vocab_size": vocab,
        "hidden_size": language.hidden,
        "intermediate_size": language.intermediate,
        "num_hidden_layers": language.layers,
        "num_attention_heads": language.heads,
        "num_key_value_heads": language.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": language.context,
        "rms_norm_eps": language.eps,
        "rope_theta": language.rope_theta,
        "tie_word_embeddings": language.tied,
        "bos_token_id": language.bos,
        "eos_token_id": language.eos[0] if len(language.eos) == 1 else list(language.eos),
        "pad_token_id": optional(raw, "pad_token_id", int, None),
        "torch_dtype": "float16",
    }
    if language.head_size * language.heads != language.hidden:
        config["head_dim"] = language.head_size
    return config


def _rows(checkpoint: GptqCheckpoint, language: LanguageConfig) -> int:
    """How many rows the embedding table and the head get."""
    rows = checkpoint.shape("model.embed_tokens.weight")[0]
    head = checkpoint.shape(checkpoint.head(language.tied))[0]
    whole = checkpoint.stored("model.embed_tokens.weight").shape[0]
    if checkpoint.is_quantized(LM_HEAD) and whole != rows:
        raise UhdError(
            f"checkpoint {checkpoint.folder}: its head is quantized, so the {whole - rows} rows beyond the "
            "tokenizer's cannot be cut; quantize the original without its head"
        )
    if rows != head:
        raise UhdError(
            f"checkpoint {checkpoint.folder}: the embedding table has {rows} rows and the head {head}; "
            "do config.json and the weights belong together?"
        )
    return rows
