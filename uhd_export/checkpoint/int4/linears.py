"""The linear layers of a language model: their names, shapes and the group sizes that fit them."""

from uhd_export.checkpoint.int4.weight import GROUP_SIZES
from uhd_export.runtime.config import LanguageConfig
from uhd_export.runtime.errors import UhdError

LM_HEAD = "lm_head"


def layer_linears(config: LanguageConfig) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the linears of one decoder layer, by name within it."""
    width, kv = config.heads * config.head_size, config.kv_heads * config.head_size
    return {
        "self_attn.q_proj": (width, config.hidden),
        "self_attn.k_proj": (kv, config.hidden),
        "self_attn.v_proj": (kv, config.hidden),
        "self_attn.o_proj": (config.hidden, width),
        "mlp.gate_proj": (config.intermediate, config.hidden),
        "mlp.up_proj": (config.intermediate, config.hidden),
        "mlp.down_proj": (config.hidden, config.intermediate),
    }


def linear_shapes(config: LanguageConfig) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every linear layer but the head, by official module name."""
    layer = layer_linears(config)
    return {
        f"model.layers.{index}.{name}": shape
        for index in range(config.layers)
        for name, shape in layer.items()
    }


def largest_group(config: LanguageConfig) -> int:
    """The largest group size that divides the inputs of every linear layer, a quarter of them at most.

    In a small model 128 would be whole rows: measured on the embedded one, groups of 32 keep more answers
    than 128 and cost little. Raises UhdError where no size divides.
    """
    inputs = sorted({k for _, k in layer_linears(config).values()})
    fits = [size for size in GROUP_SIZES if all(k % size == 0 for k in inputs)]
    if fits:
        return max((size for size in fits if 4 * size <= inputs[0]), default=min(fits))
    raise UhdError(
        f"group size: none of {', '.join(map(str, GROUP_SIZES))} divides all of "
        f"{', '.join(map(str, inputs))}, the inputs of the linear layers; use --weights dense"
    )


def head_group(config: LanguageConfig) -> int:
    """The largest group size that divides the head's inputs; the smallest where none does."""
    fits = [size for size in GROUP_SIZES if config.hidden % size == 0]
    return max(fits, default=min(GROUP_SIZES))
