"""What may be chosen by name. Nothing is imported, so that a command line can offer it at once."""

GRID_MODES = ("selective", "fix", "pyramid")
LAYOUTS = ("flat", "merged")
TEMPLATES = ("vicuna_v1", "llava_v1", "plain", "qwen")
"""Conversation templates of the released code."""
TEMPLATE_ALIASES = {"v1": "vicuna_v1", "qwen_1_5": "qwen", "qwen_2": "qwen"}
"""Other names that the released scripts give them."""
PYRAMIDS = ("jbu", "bilinear", "deconvolution")
"""How the feature maps of higher levels are made; official checkpoints have the first."""
ROI_ROUNDINGS = ("exact", "bf16")
DTYPES = ("float32", "float16")
CACHES = (*DTYPES, "int8")
"""Types of keys and values."""
HEADS = {"dense": None, "int8": 8, "int4": 4}
"""Types of the language model's head, by their bits where it is rounded."""
ENGINE_BACKENDS = ("tensorrt-rtx", "tensorrt")
"""Those that run engines of their own; "onnxruntime" runs the graphs."""
BACKENDS = ("onnxruntime", *ENGINE_BACKENDS)
GROUP_SIZES = (32, 64, 128)
"""Inputs that share a scale, where weights are small integers."""
LARGEST_SIZE, MOST_LAYERS = 1 << 24, 1000
"""No model, image or cache is larger: a greater number is damage, and work on it would not end."""


def updates_on_gpu(cache: str, activations: str) -> bool:
    """Whether ONNX Runtime has kernels on a GPU that keep a cache of type `cache` beside `activations`.

    Integers beside float32 would be copied to the processor and back in every run: attention that reads them
    is in float32, for which a GPU has no kernel.
    """
    return cache == "float16" or (cache == "int8" and activations == "float16")
