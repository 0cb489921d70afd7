"""The language model's part of a config: LLaMA and Qwen2 decoders."""

from typing import Any

from uhd_export.checkpoint.fields import optional, positive, required, shown, size
from uhd_export.runtime.choices import MOST_LAYERS
from uhd_export.runtime.config import LanguageConfig
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.settings import Sampling

# `</s>`, which every LLaMA tokenizer has and transformers takes where no config says otherwise.
LLAMA_EOS = 2


def language_config(config: dict, generating: dict) -> LanguageConfig:
    """The decoder of a checkpoint's `config.json` and `generation_config.json`. Raises UhdError."""
    model_type = required(config, "model_type", str)
    kinds = {
        "llava_llama": "llama",
        "llama": "llama",
        "llava_qwen": "qwen2",
        "llava_qwen2": "qwen2",
        "qwen2": "qwen2",
    }
    if model_type not in kinds:
        raise UhdError(
            f"config field model_type: {shown(model_type)} is not supported; expected {', '.join(kinds)}"
        )
    kind = kinds[model_type]
    if optional(config, "attention_bias", bool, False) and kind == "llama":
        raise UhdError("config field attention_bias: true is not supported for LLaMA models")
    hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    if hidden % heads:
        raise UhdError(f"config field num_attention_heads: {heads} does not divide hidden_size {hidden}")
    kv_heads = size(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise UhdError(
            f"config field num_key_value_heads: {kv_heads} does not divide num_attention_heads {heads}"
        )
    vocab = size(config, "vocab_size")
    return LanguageConfig(
        kind=kind,
        hidden=hidden,
        intermediate=size(config, "intermediate_size"),
        layers=layer_count(config),
        heads=heads,
        kv_heads=kv_heads,
        head_size=size(config, "head_dim", hidden // heads),
        vocab=vocab,
        context=size(config, "max_position_embeddings"),
        eps=positive(config, "rms_norm_eps"),
        rope_theta=_rope_theta(config),
        tied=optional(config, "tie_word_embeddings", bool, False),
        bos=optional(config, "bos_token_id", int, None),
        eos=_eos(config, generating, kind, vocab),
    )


# What transformers takes where generation_config.json samples and does not say.
_SAMPLED = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}


def default_sampling(generating: dict) -> Sampling:
    """How tokens are chosen by a checkpoint's `generation_config.json`: greedy unless it says do_sample."""
    where = "generation config"
    penalty = positive(generating, "repetition_penalty", 1.0, where)
    if not optional(generating, "do_sample", bool, False, where):
        return Sampling(repetition_penalty=penalty)
    found: dict[str, Any] = {
        name: optional(generating, name, int, default, where)
        if isinstance(default, int)
        else float(optional(generating, name, (int, float), default, where))
        for name, default in _SAMPLED.items()
    }
    try:
        return Sampling(**found, repetition_penalty=penalty)
    except UhdError as error:
        raise UhdError(f"{where} field {error}") from None


def layer_count(config: dict, where: str = "config") -> int:
    """Its num_hidden_layers."""
    layers = size(config, "num_hidden_layers", where=where)
    if layers > MOST_LAYERS:
        raise UhdError(
            f"{where} field num_hidden_layers: {layers} is more than {MOST_LAYERS}; is it damaged?"
        )
    return layers


def _rope_theta(config: dict) -> float:
    """The rotary embedding's base. Raises UhdError where it is scaled, or given twice and differently."""
    bases = {}
    if config.get("rope_theta") is not None:
        bases["rope_theta"] = positive(config, "rope_theta")
    for field in ("rope_scaling", "rope_parameters"):
        rope = optional(config, field, dict, {})
        stated = rope.get("rope_type", rope.get("type"))
        if rope.get("partial_rotary_factor", 1.0) != 1.0 or stated not in (None, "default"):
            raise UhdError(
                f"config field {field}: only the default rotary embedding is supported; expected null"
            )
        if stated is None and rope.keys() - {"rope_theta", "partial_rotary_factor"}:
            raise UhdError(f"config field {field}: has no rope_type; add it, or set the field to null")
        if rope.get("rope_theta") is not None:
            bases[field] = positive(rope, "rope_theta", where=f"config field {field}")
    if len(set(bases.values())) > 1:
        raise UhdError(f"config field rope_theta: {' and '.join(bases)} disagree; keep the right one")
    return next(iter(bases.values()), 10000.0)


def _eos(config: dict, generating: dict, kind: str, vocab: int) -> tuple[int, ...]:
    """The ids that end a text: those of config.json first, and whatever generation_config.json adds."""
    ids = []
    for values, where in ((config, "config"), (generating, "generation config")):
        found = optional(values, "eos_token_id", (int, list), [], where)
        found = found if isinstance(found, list) else [found]
        if any(type(i) is not int or i < 0 for i in found):
            raise UhdError(
                f"{where} field eos_token_id: {str(found)[:60]} must be a token id or a list of them"
            )
        if any(i >= vocab for i in found):
            raise UhdError(f"{where} field eos_token_id: {max(found)} is outside the vocabulary of {vocab}")
        ids += found
    if not ids and kind != "llama":
        raise UhdError(
            "config field eos_token_id: missing, in generation_config.json too; add the id that ends a text"
        )
    return tuple(dict.fromkeys(ids)) or (LLAMA_EOS,)
