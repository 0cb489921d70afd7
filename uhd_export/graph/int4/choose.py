"""How the language model's weights are stored in a bundle: what a user asks for, as format and record."""

from uhd_export.checkpoint.int4.gptq import GptqCheckpoint
from uhd_export.checkpoint.int4.linears import LM_HEAD, head_group, largest_group, linear_shapes
from uhd_export.checkpoint.int4.weight import check_group
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.graph.int4.formats import (
    ByName,
    GptqWeights,
    Int4Dequantize,
    MatMulNBits,
    RoundedWeights,
    WeightSource,
)
from uhd_export.graph.int4.options import ACTIVATIONS, AUTO, WeightOptions
from uhd_export.graph.linear import Dense, LinearFormat
from uhd_export.runtime.bundle.manifest import Quantization
from uhd_export.runtime.config import LanguageConfig
from uhd_export.runtime.errors import UhdError


def resolve(checkpoint: Checkpoint, config: LanguageConfig, options: WeightOptions) -> Quantization | None:
    """What the bundle will hold, or None where nothing is quantized. Raises UhdError."""
    weights = options.weights
    gptq = checkpoint if isinstance(checkpoint, GptqCheckpoint) else None
    if weights == "auto":
        weights = "dense" if gptq is None else "int4"
    if weights == "int4" and gptq is None:
        raise UhdError(
            f"checkpoint {checkpoint.folder}: its weights are not quantized; make a GPTQ checkpoint with "
            "`uhd-export quantize`, or use int4-rtn"
        )
    if weights == "int4-rtn" and gptq is not None:
        raise UhdError(f"checkpoint {checkpoint.folder}: is quantized already; use --weights int4")
    if weights == "dense" and options.group is not None:
        raise UhdError(f"group size {options.group}: is for --weights int4 and int4-rtn; leave it out")
    head = options.lm_head
    if head == AUTO:
        divides = config.hidden % head_group(config) == 0
        stored = gptq is not None and gptq.is_quantized(LM_HEAD)
        head = "int8" if weights != "dense" and divides and not stored else "dense"
    if weights == "dense" and head == "dense":
        return None
    group, symmetric, act_order = options.group or largest_group(config), True, False
    if weights == "int4" and gptq is not None:
        if options.group is not None:
            raise UhdError(f"group {options.group}: the checkpoint's own groups are kept; leave it out")
        names = [name for name in linear_shapes(config) if gptq.is_quantized(name)]
        if not names:
            raise UhdError(
                f"checkpoint {checkpoint.folder}: no linear layer of the language model is quantized"
            )
        group = gptq.group(names[0])
        symmetric = all(gptq.symmetric(name) for name in names)
        act_order = any(gptq.order(name) is not None for name in names)
    elif weights == "int4-rtn":
        for name, (_, inputs) in linear_shapes(config).items():
            check_group(name, inputs, group)
    if head != "dense":
        check_group(LM_HEAD, config.hidden, head_group(config))
    methods = {"int4": "gptq", "int4-rtn": "rtn", "dense": None}
    return Quantization(methods[weights], group, symmetric, act_order, head, options.activations)


def linear_format(
    checkpoint: Checkpoint, config: LanguageConfig, quantization: Quantization | None, dialect: str
) -> LinearFormat:
    """The weight format of a language graph in `dialect`. Raises UhdError where TensorRT cannot do it."""
    if quantization is None:
        return Dense()
    accuracy_level = ACTIVATIONS[quantization.activations]

    def form(weights: WeightSource) -> LinearFormat:
        if dialect == "tensorrt":
            return Int4Dequantize(weights)
        return MatMulNBits(weights, accuracy_level=accuracy_level)

    bits = quantization.head_bits
    if dialect == "tensorrt" and bits == 8:
        raise UhdError("lm_head int8: TensorRT takes dense or int4")
    head: LinearFormat = Dense()
    if bits is not None:
        head = form(RoundedWeights(head_group(config), bits=bits))
    if quantization.method == "gptq":
        if not isinstance(checkpoint, GptqCheckpoint):
            raise UhdError(f"checkpoint {checkpoint.folder}: its weights are not quantized; use int4-rtn")
        body = form(GptqWeights(checkpoint))
        # A head that the checkpoint quantizes stays so unless another type is asked for.
        return body if bits is None else ByName(body, {LM_HEAD: head})
    body = Dense() if quantization.method is None else form(RoundedWeights(quantization.group))
    return ByName(body, {LM_HEAD: head})
