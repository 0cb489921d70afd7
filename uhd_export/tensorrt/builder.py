"""Building an engine: a graph, its profiles and target GPUs in, an engine file and its record out."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from uhd_export.plugins.tensorrt import plugin
from uhd_export.runtime.bundle.integrity import hash_file
from uhd_export.runtime.engines.tensorrt.backend import (
    describe_backend,
    logger,
    messages,
    open_tensorrt,
    supported_capabilities,
)
from uhd_export.runtime.engines.tensorrt.record import (
    RECORD_VERSION,
    EngineRecord,
    OptimizationProfile,
    write_record,
)
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.files import write_file
from uhd_export.runtime.progress import Progress
from uhd_export.tensorrt.network import Network, load_graph, parse
from uhd_export.tensorrt.options import EngineOptions, target_capabilities
from uhd_export.tensorrt.progress import make_monitor


def build_engine(
    graph: str | Path,
    out: str | Path,
    profiles: Sequence[OptimizationProfile],
    options: EngineOptions | None = None,
    *,
    key: str = "",
    output_types: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> EngineRecord:
    """Build the ONNX file `graph` into the engine file `out`, its record beside it.

    `profiles` give the shapes to plan for; `output_types` converts outputs to another numpy type;
    `progress(done, total)` is told how far the build is. `key` is recorded (see `cache`).
    Returns the record. Raises UhdError where the backend is not installed, the parser refuses a node, or
    the build fails for a target; then nothing is left at `out`.
    """
    options, graph, out = options or EngineOptions(), Path(graph), Path(out)
    trt = open_tensorrt(options.backend)
    targets = target_capabilities(trt, options)
    plugins = plugin.register(trt, targets) if options.plugins else ()
    builder = trt.Builder(logger(trt))
    with plugin.errors():
        model = load_graph(graph, plugins)
        parsed = parse(trt, builder, model, graph, profiles, output_types=output_types)
        config = _configure(trt, builder, options, targets)
        for profile in profiles:
            _add_profile(builder, config, parsed, profile)
        content = _build(trt, builder, parsed, config, _Failure(graph, targets), progress)
    write_file(out, memoryview(content))
    record = EngineRecord(
        record_version=RECORD_VERSION,
        backend=options.backend,
        tensorrt=trt.__version__,
        compute_capabilities=targets,
        layers=dict(parsed.layer_types()),
        plugin_layers=tuple(parsed.plugin_layers()),
        inputs=parsed.inputs,
        outputs=parsed.outputs,
        aliases=parsed.aliases,
        profiles=tuple(profiles),
        weight_bytes=parsed.weight_bytes,
        key=key,
        bytes=out.stat().st_size,
        sha256=hash_file(out),
    )
    write_record(out, record)
    return record


def _configure(trt: ModuleType, builder: Any, options: EngineOptions, targets: Sequence[str]) -> Any:
    config = builder.create_builder_config()
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if describe_backend(options.backend).targets:
        names = supported_capabilities(trt)
        config.num_compute_capabilities = len(targets)
        for i, target in enumerate(targets):
            config.set_compute_capability(names[target], i)
    return config


def _add_profile(builder: Any, config: Any, parsed: Network, profile: OptimizationProfile) -> None:
    """Add `profile`; inputs without a range are of one shape. UhdError where the two do not fit."""
    shapes = builder.create_optimization_profile()
    for name, tensor in parsed.inputs.items():
        ranges = profile.ranges.get(name)
        if ranges is not None:
            shapes.set_shape(name, ranges.min, ranges.opt, ranges.max)
        elif free := [d for d in tensor.shape if not d.isdigit()]:
            raise UhdError(f"profile {profile.name}: no range for input {name} ({', '.join(free)})")
        else:
            shapes.set_shape(name, *3 * (tuple(map(int, tensor.shape)),))
    unknown = sorted(profile.ranges.keys() - parsed.inputs.keys())
    if unknown:
        raise UhdError(f"profile {profile.name}: the graph has no input {unknown[0]}")
    if config.add_optimization_profile(shapes) < 0:
        raise UhdError(f"profile {profile.name}: TensorRT refuses its ranges")


@dataclass(frozen=True)
class _Failure:
    """How a failed build is told."""

    graph: Path
    targets: Sequence[str]

    def error(self, reason: str) -> UhdError:
        """The reason in one line, with what can be done about it."""
        remedy = ""
        if "7.5" in self.targets:
            remedy = "; leave compute capability 7.5 out, or build it alone in float16 without int4"
        elif "insufficient memory" in reason.lower() or "out of memory" in reason.lower():
            remedy = "; close other programs, or build fewer compute capabilities at once"
        where = f"graph {self.graph} for compute capability {', '.join(self.targets)}"
        return UhdError(f"{where}: TensorRT cannot build it ({reason}){remedy}")


@contextmanager
def _separate_products(parsed: Network) -> Iterator[None]:
    """Keep TensorRT from joining products of one x by itself while a graph of one sequence is built.

    NVIDIA's own exporter does the same at batch 1, since some versions wrote wrong values from joined q, k
    and v. Our graphs join them already, in their weights.
    """
    switch, joint = "__LUNOWUD", "-peep:fc_h_fusion=off"
    before = os.environ.get(switch)
    if before is None and all(tensor.shape[:1] == ("1",) for tensor in parsed.inputs.values()):
        os.environ[switch] = joint
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(switch, None)


def _build(
    trt: ModuleType, builder: Any, parsed: Network, config: Any, failure: _Failure, progress: Progress | None
) -> Any:
    """The serialized engine. An exception in `progress`, Ctrl-C included, stops the build and is raised."""
    monitor = make_monitor(trt, progress) if progress is not None else None
    if monitor is not None:
        config.progress_monitor = monitor
    with messages(trt) as log, _separate_products(parsed):
        content = builder.build_serialized_network(parsed.network, config)
    if monitor is not None and monitor.raised is not None:
        raise monitor.raised
    if content is None:
        raise failure.error(log.reason)
    return content
