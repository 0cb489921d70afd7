"""What a user may choose about a bundle, one dataclass a concern."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from uhd_export.checkpoint.fields import choice
from uhd_export.checkpoint.options import ImageOptions, SourceOptions
from uhd_export.graph.int4.options import WeightOptions
from uhd_export.graph.int8.options import VISION_WEIGHTS
from uhd_export.runtime.choices import CACHES, DTYPES
from uhd_export.runtime.errors import UhdError

if TYPE_CHECKING:
    from uhd_export.tensorrt.options import EngineOptions


@dataclass(frozen=True)
class BuildOptions:
    """How a checkpoint is read, cut images are encoded, weights are stored and engines are built.

    `engines` None makes a bundle for ONNX Runtime. `dtype` is the type of weights and activations, float32
    or float16 (None: float16 for engines, else float32); `cache` that of keys and values, int8 too (None:
    `dtype`'s). `vision_weights` int8 rounds the vision part's dense
    products, weights and activations, where measured errors allow. `fold` folds the projector exactly.
    `inline` writes function bodies inline, for readers of ONNX without functions. `context` is the number of
    positions of the key-value cache (None: the model's). `questions` of those that the embedded model
    learnt are put to a bundle in which anything is rounded.
    """

    reading: SourceOptions = field(default_factory=SourceOptions)
    images: ImageOptions = field(default_factory=ImageOptions)
    weights: WeightOptions = field(default_factory=WeightOptions)
    engines: "EngineOptions | None" = None
    dtype: str | None = None
    cache: str | None = None
    vision_weights: str = "dense"
    fold: bool = True
    inline: bool = False
    context: int | None = None
    questions: int = 0

    def __post_init__(self) -> None:
        """Raise UhdError naming the first option out of range."""
        choice("dtype", self.dtype, (None, *DTYPES))
        choice("cache", self.cache, (None, *CACHES))
        if self.engines is not None and self.cache_type != self.precision:
            raise UhdError(
                f"cache {self.cache}: TensorRT updates keys and values in the type of its activations, "
                f"{self.precision}; leave it out, or use --backend onnxruntime"
            )
        if self.inline and self.engines is not None:
            raise UhdError("--inline: is for --backend onnxruntime; engines are built from functions")
        choice("vision_weights", self.vision_weights, VISION_WEIGHTS)
        if self.vision_weights == "int8" and self.engines is None and self.precision != "float32":
            raise UhdError(
                f"vision_weights int8: ONNX Runtime rounds float32 activations, not {self.precision}; "
                "leave --dtype out"
            )

    @property
    def backend(self) -> str:
        """What runs the bundle."""
        return "onnxruntime" if self.engines is None else self.engines.backend

    @property
    def dialect(self) -> str:
        """Of the language graph."""
        return "onnxruntime" if self.engines is None else "tensorrt"

    @property
    def contrib(self) -> bool:
        """Whether the vision graph may have operators that only ONNX Runtime has.

        Only in float32, which runs on a processor: on CUDA its attention asks for cuDNN, which we leave out.
        """
        return self.engines is None and not self.inline and self.precision == "float32"

    @property
    def attention_accumulation(self) -> str:
        """The type in which attention adds up its products, where the backend leaves it to the graph."""
        return "float32" if self.engines is None else self.engines.attention_accumulation

    @property
    def precision(self) -> str:
        """The type of weights and activations."""
        return self.dtype or ("float32" if self.engines is None else "float16")

    @property
    def cache_type(self) -> str:
        """The type of keys and values."""
        return self.cache or self.precision

    @property
    def rounded(self) -> bool:
        """Whether anything beside the language model's weights is computed otherwise than in float32."""
        return self.vision_weights == "int8" or {self.precision, self.cache_type} != {"float32"}
