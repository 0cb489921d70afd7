"""Records and loggers of engines that were never built."""

from types import SimpleNamespace

import tensorrt_rtx as trt

from uhd_export.runtime.engines.tensorrt import backend as tensorrt_backend
from uhd_export.runtime.engines.tensorrt.record import RECORD_VERSION, EngineRecord
from uhd_export.tensorrt.network import load_graph, parse


def record_of(graph, profiles):
    """The record of a real network, as a build would write it."""
    builder = trt.Builder(tensorrt_backend.logger(trt))
    network = parse(trt, builder, load_graph(graph, ()), graph, profiles)
    return EngineRecord(
        record_version=RECORD_VERSION,
        backend="tensorrt-rtx",
        tensorrt=trt.__version__,
        compute_capabilities=("8.6", "8.9"),
        layers=dict(network.layer_types()),
        plugin_layers=(),
        inputs=network.inputs,
        outputs=network.outputs,
        aliases=network.aliases,
        profiles=tuple(profiles),
        weight_bytes=network.weight_bytes,
        key="key",
        bytes=0,
        sha256="5" * 64,
    )


def quiet_logger():
    """What TensorRT's logger is to `messages`."""
    logger = SimpleNamespace(sinks=[])
    logger.log = lambda level, text: [sink.errors.append(text) for sink in logger.sinks]
    return logger
