"""The sides that benchmarks/vision.py compares, and what each of them loads."""

import json
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from uhd_export.runtime.profiling.stages import VISION_STAGES as STAGES
from uhd_export.runtime.profiling.stages import stage_shares

Batches = list[tuple[int, int, int]]
CROP = [(1, 24, 24)]
INLINED = "inlined.onnx"


class Run(NamedTuple):
    """One run of a workload: seconds, seconds by stage where they were taken, tokens."""

    seconds: float
    stages: dict[str, float]
    tokens: list[np.ndarray]


def pixels_for(batch: int, rows: int, cols: int) -> np.ndarray:
    """Random normalised pixels of equal crops."""
    return np.random.default_rng(rows).standard_normal((batch, 3, rows * 14, cols * 14), np.float32)


class Eager:
    """The released computation in eager PyTorch, timed between stages."""

    def __init__(self, folder: Path, threads: int) -> None:
        import torch

        from uhd_export.checkpoint.config import read_config
        from uhd_export.checkpoint.reader import PROJECTOR_PREFIX, VISION_PREFIX, Checkpoint
        from uhd_export.model.projector import HiwinProjector
        from uhd_export.model.vit import VisionTower

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        config = read_config(folder).projector
        self.levels = sorted({*config.levels, *config.stages})
        with torch.device("meta"):
            self.tower, self.projector = VisionTower(read_config(folder).vision), HiwinProjector(config)
        checkpoint = Checkpoint(folder)
        checkpoint.load_into(self.tower, VISION_PREFIX, torch.float32)
        checkpoint.load_into(self.projector, PROJECTOR_PREFIX, torch.float32)
        checkpoint.close()

    def run(self, batches: Batches) -> Run:
        """Encode every batch of crops."""
        import torch

        from uhd_export.runtime.image.geometry import crop_geometry

        stages, tokens = dict.fromkeys(STAGES, 0.0), []
        for batch, rows, cols in batches:
            pixels = torch.from_numpy(pixels_for(batch, rows, cols))
            arrays = crop_geometry(rows, cols, levels=self.levels)
            geometry = {name: torch.from_numpy(array) for name, array in arrays.items()}
            times = [time.perf_counter()]
            features = self.tower(pixels, geometry)
            times.append(time.perf_counter())
            maps = self.projector.pyramid(features, pixels, geometry)
            times.append(time.perf_counter())
            tokens.append(self.projector.attend(maps, geometry).numpy())
            times.append(time.perf_counter())
            for stage, spent in zip(STAGES, np.diff(times), strict=True):
                stages[stage] += float(spent)
        return Run(sum(stages.values()), stages, tokens)


class Folded:
    """vision.onnx in ONNX Runtime, traced: that costs microseconds a node, where a run takes seconds."""

    name = "vision.onnx"

    def __init__(self, folder: Path, threads: int) -> None:
        from uhd_export.runtime.engines.backends import open_engine

        self.traces = tempfile.TemporaryDirectory()
        path, prefix = folder / self.name, Path(self.traces.name) / "vision"
        self.engine = open_engine(path, threads=threads, profile=prefix)

    def run(self, batches: Batches) -> Run:
        """Encode every batch of crops."""
        seconds, tokens = 0.0, []
        for batch in batches:
            feeds = feeds_for(*batch, self.engine.inputs)
            start = time.perf_counter()
            tokens.append(self.engine.infer(feeds)["tokens"])
            seconds += time.perf_counter() - start
        return Run(seconds, {}, tokens)

    def shares(self, runs: int) -> tuple[dict[str, float], dict[str, float]]:
        """Shares of stages, and of operators, in the last `runs` runs of the graph; ends the trace."""
        events = json.loads(self.engine.end_profile().read_text(encoding="utf-8"))
        self.traces.cleanup()
        return stage_shares(events, runs), operator_shares(events, runs)


def operator_shares(events: Sequence[dict], runs: int) -> dict[str, float]:
    """Share of each operator in the last `runs` runs of a trace, the largest first."""
    starts = sorted(event["ts"] for event in events if event.get("name") == "model_run")
    totals: Counter[str] = Counter()
    for event in events:
        if event["name"].endswith("_kernel_time") and event["ts"] >= starts[-runs]:
            totals[event["args"]["op_name"]] += event["dur"]
    return {name: spent / totals.total() for name, spent in totals.most_common()}


class Int8(Folded):
    """The same in 8 bits."""

    name = "int8.onnx"


class OpenVino:
    """OpenVINO in its default types: bfloat16 where the processor multiplies it."""

    name = "vision.xml"

    def __init__(self, folder: Path, threads: int) -> None:
        import openvino

        settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        model = openvino.Core().compile_model(folder / self.name, "CPU", settings)
        self.names = {name for port in model.inputs for name in port.names}
        self.request = model.create_infer_request()

    def run(self, batches: Batches) -> Run:
        """Encode every batch of crops."""
        seconds, tokens = 0.0, []
        for batch in batches:
            feeds = feeds_for(*batch, self.names)
            start = time.perf_counter()
            tokens.append(self.request.infer(feeds)["tokens"].copy())
            seconds += time.perf_counter() - start
        return Run(seconds, {}, tokens)


class OpenVinoInt8(OpenVino):
    """Quantized by NNCF."""

    name = "vision-int8.xml"


SIDES = {
    "eager": Eager,
    "folded": Folded,
    "int8": Int8,
    "openvino-bf16": OpenVino,
    "openvino-int8": OpenVinoInt8,
}


def feeds_for(batch: int, rows: int, cols: int, names: Collection[str]) -> dict[str, np.ndarray]:
    """What a graph with inputs `names` takes for equal crops."""
    from uhd_export.runtime.image.geometry import crop_geometry

    geometry = {k: v for k, v in crop_geometry(rows, cols).items() if k in names}
    return {"pixels": pixels_for(batch, rows, cols), **geometry}


def export(folder: Path, sides: Sequence[str]) -> None:
    """Emit beside the checkpoint what `sides` load."""
    from uhd_export.checkpoint.config import read_config
    from uhd_export.checkpoint.options import ImageOptions
    from uhd_export.checkpoint.reader import Checkpoint
    from uhd_export.graph.inline import inline_functions
    from uhd_export.graph.int8.calibrate import calibrate_vision
    from uhd_export.graph.vision import emit_vision
    from uhd_export.runtime.image.pattern import pattern

    config, checkpoint = read_config(folder), Checkpoint(folder)
    emit_vision(config, checkpoint, folder / Folded.name, contrib=True)
    if "int8" in sides:
        images = [pattern(336, 336)]  # nothing can be learnt of random weights
        plan = calibrate_vision(config, checkpoint, config.settings(ImageOptions()), images, folder)
        products = plan.products("onnxruntime")
        emit_vision(config, plan.view(checkpoint), folder / Int8.name, products=products, contrib=True)
        print(f"int8: {len(plan.record.int8)} products in 8 bits, {len(plan.record.dense)} dense")
    if any(side.startswith("openvino") for side in sides):
        emit_vision(config, checkpoint, folder / INLINED)
        inline_functions(folder / INLINED)
        export_openvino(folder, "openvino-int8" in sides)


def export_openvino(folder: Path, int8: bool) -> None:
    """OpenVINO's files of the inlined graph."""
    import openvino

    model = openvino.Core().read_model(folder / INLINED)
    openvino.save_model(model, folder / OpenVino.name, compress_to_fp16=False)
    if int8:
        import nncf

        names = {name for port in model.inputs for name in port.names}
        crops = nncf.Dataset([feeds_for(1, rows, cols, names) for _, rows, cols in (CROP[0], (1, 19, 29))])
        quantized = nncf.quantize(model, crops, model_type=nncf.ModelType.TRANSFORMER, subset_size=2)
        openvino.save_model(quantized, folder / OpenVinoInt8.name)
