"""A GPU and TensorRT's runtime, faked at the lowest seam, strict about the protocol of both.

The GPU has memory by address, with work queued until it is waited for. The runtime runs an engine whose file
holds the path of an ONNX graph, by ONNX Runtime, reading and writing that memory. Everything above is ours.
"""

import bisect
import ctypes
import functools
import threading
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort

from uhd_export.runtime.engines.tensorrt.record import read_record, write_record


class FakeCuda:
    """`uhd_export.runtime.engines.tensorrt.cuda.Cuda` on the host."""

    def __init__(self, capability="8.9", memory=2**30):
        self.name, self.capability, self.memory, self.stream = "Fake GPU", capability, memory, 7
        self.blocks, self.next, self.queued, self.graphs = {}, 4096, [], {}
        self.captured_into = None
        self.lock, self.users = threading.RLock(), set()
        self.waits, self.pinned = 0, {}
        self.copied_in = self.copied_out = self.copied = self.launches = 0

    def allocate(self, nbytes):
        address = self.next
        self.next += -(-nbytes // 256) * 256 + 4096  # a gap that nothing may touch
        # Fresh memory holds anything; NaN shows where it is read before it is written.
        self.blocks[address] = np.full(nbytes, 0xFF, np.uint8)
        return address

    def allocate_host(self, nbytes):
        memory = np.full(nbytes, 0xFF, np.uint8)
        self.pinned[memory.ctypes.data] = memory
        return memory.ctypes.data

    def is_pinned(self, array):
        starts = ((start, start + memory.size) for start, memory in self.pinned.items())
        return any(start <= array.ctypes.data < stop for start, stop in starts)

    def free(self, address):
        assert not self.queued, "memory freed while work is queued"
        del self.blocks[address]

    def at(self, address, nbytes):
        """The bytes at an address; they must lie within one block."""
        starts = sorted(self.blocks)
        index = bisect.bisect_right(starts, address) - 1
        assert index >= 0, f"no memory at {address}"
        block, offset = self.blocks[starts[index]], address - starts[index]
        assert offset + nbytes <= block.size, f"{nbytes} bytes at {address} leave their block"
        return block[offset : offset + nbytes]

    def array(self, address, shape, dtype):
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        return self.at(address, nbytes).view(dtype).reshape(shape)

    def queue(self, work):
        self.users.add(threading.get_ident())
        # Of several threads one queues at a time.
        assert len(self.users) == 1 or self.lock._is_owned(), "queued beside another thread"
        (self.queued if self.captured_into is None else self.captured_into).append(work)

    def zero(self, address, nbytes):
        self.queue(lambda: self.at(address, nbytes).fill(0))

    def copy_in(self, address, array):
        assert array.flags.c_contiguous
        self.copied_in += array.nbytes
        if self.is_pinned(array):  # read when the copy is done, as by the GPU: it holds what it holds then
            source = self.pinned_bytes(array)
        else:
            source = np.frombuffer(array.tobytes(), np.uint8)
        self.queue(lambda: self.at(address, source.size).__setitem__(slice(None), source))

    def pinned_bytes(self, array):
        start = next(s for s, memory in self.pinned.items() if s <= array.ctypes.data < s + memory.size)
        offset = array.ctypes.data - start
        return self.pinned[start][offset : offset + array.nbytes]

    def copy_out(self, array, address):
        assert array.flags.c_contiguous
        self.copied_out += array.nbytes
        target = np.ctypeslib.as_array((ctypes.c_uint8 * array.nbytes).from_address(array.ctypes.data))
        self.queue(lambda keep=array: target.__setitem__(slice(None), self.at(address, target.size)))

    def copy(self, to, source, nbytes):
        self.copied += nbytes
        self.queue(lambda: self.at(to, nbytes).__setitem__(slice(None), self.at(source, nbytes)))

    def synchronize(self):
        self.waits += 1
        work, self.queued = self.queued, []
        for step in work:
            step()

    def capture(self, queue):
        self.captured_into = []
        queue()
        graph, self.captured_into = self.captured_into, None
        self.graphs[len(self.graphs) + 1] = graph
        return len(self.graphs)

    def launch(self, graph):
        self.launches += 1
        self.queued.extend(self.graphs[graph])

    def free_graph(self, graph):
        self.graphs[graph] = None


class FakeContext:
    """An execution context that refuses what TensorRT refuses."""

    def __init__(self, engine, config):
        self.engine, self.config, self.profiler = engine, config, None
        self.profile, self.shapes, self.addresses, self.memory = 0, {}, {}, None
        self.runs = self.changes = 0

    def set_optimization_profile_async(self, index, stream):
        assert stream == self.engine.cuda.stream
        self.changes += 1
        self.profile, self.shapes, self.memory = index, {}, None
        return 0 <= index < len(self.engine.record.profiles)

    def set_input_shape(self, name, shape):
        self.changes += 1
        known = self.engine.record.inputs[name].info.shape
        assert len(known) == len(shape)
        self.shapes[name] = tuple(shape)
        ranges = self.engine.record.profiles[self.profile].ranges
        fixed = all(isinstance(d, str) or d == size for d, size in zip(known, shape, strict=True))
        return fixed and (name not in ranges or ranges[name].covers(tuple(shape)))

    def update_device_memory_size_for_shapes(self):
        assert self.shapes.keys() == self.engine.record.inputs.keys()
        return sum(int(np.prod(shape)) for shape in self.shapes.values())

    def set_device_memory(self, address, nbytes):
        assert address % 256 == 0
        self.changes += 1
        self.memory = (address, nbytes)

    def get_tensor_shape(self, name):
        inputs, sizes = self.engine.record.inputs, {}
        for other, shape in self.shapes.items():
            dims = zip(inputs[other].info.shape, shape, strict=True)
            sizes |= {d: size for d, size in dims if isinstance(d, str)}
        return self.engine.record.outputs[name].info.resolve(sizes)

    def set_tensor_address(self, name, address):
        assert name in self.engine.record.inputs or name in self.engine.record.outputs
        self.changes += 1
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        assert stream == self.engine.cuda.stream
        record, cuda = self.engine.record, self.engine.cuda
        assert self.shapes.keys() == record.inputs.keys()
        assert self.addresses.keys() == record.inputs.keys() | record.outputs.keys()
        address, nbytes = self.memory
        assert nbytes >= self.update_device_memory_size_for_shapes()
        cuda.at(address, nbytes)
        for present, past in record.aliases.items():
            assert self.addresses[present] == self.addresses[past], "not updated in place"
        if self.profiler is not None:
            assert cuda.captured_into is None
            for layer, ms in self.engine.trt.layers:
                cuda.queue(lambda layer=layer, ms=ms: self.profiler.report_layer_time(layer, ms))
        places = dict(self.addresses)
        shapes = dict(self.shapes) | {name: self.get_tensor_shape(name) for name in record.outputs}
        captured = self.changes if cuda.captured_into is not None else None

        def run():
            assert captured in (None, self.changes), "a graph of what the context no longer is"
            self.engine.run(places, shapes)

        cuda.queue(run)
        self.runs += 1
        return True


class FakeEngine:
    """A deserialized engine."""

    def __init__(self, trt, cuda, path, record):
        self.trt, self.cuda, self.record, self.contexts = trt, cuda, record, []
        quiet = ort.SessionOptions()
        quiet.log_severity_level, quiet.intra_op_num_threads = 3, 1
        self.session = ort.InferenceSession(path, quiet)
        self.device_memory_size_v2 = 123456

    def run(self, places, shapes):
        feeds = {i.name: self._array(i.name, places, shapes).copy() for i in self.session.get_inputs()}
        names = [output.name for output in self.session.get_outputs()]
        for name, result in zip(names, self.session.run(names, feeds), strict=True):
            self._array(name, places, shapes)[...] = result

    def _array(self, name, places, shapes):
        tensor = (self.record.inputs | self.record.outputs)[name]
        return self.cuda.array(places[name], shapes[name], tensor.info.dtype)

    def create_runtime_config(self):
        config = SimpleNamespace(cuda_graph_strategy=None, strategy=None, cache=None)
        config.set_execution_context_allocation_strategy = functools.partial(setattr, config, "strategy")
        config.set_runtime_cache = functools.partial(setattr, config, "cache")
        config.create_runtime_cache = self.trt.IRuntimeCache
        return config

    def create_execution_context(self, config):
        if hasattr(self.trt, "CudaGraphStrategy"):
            assert config.strategy == "USER_MANAGED"
        else:
            assert config == "USER_MANAGED"
        self.contexts.append(FakeContext(self, config))
        return self.contexts[-1]

    def get_engine_stat(self, stat):
        return 1000


class FakeCache:
    """Compiled kernels."""

    def __init__(self):
        self.content = b"nothing yet"

    def deserialize(self, content):
        self.content = content
        return True

    def serialize(self):
        return self.content + b" and more"


def fake_module(cuda, record, *, rtx=True, version=None, invalid=0, broken=False):
    """A `tensorrt_rtx` (or `tensorrt`) whose runtime loads the engines of `fake_engine`."""
    layers = [("vit/layer", 0.25), ("hiwin/layer", 0.75)]
    trt = SimpleNamespace(__version__=version or record.tensorrt, engines=[], layers=layers)
    levels = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2)

    class ILogger:
        Severity = levels

        def __init__(self):
            pass

    class Runtime:
        def __init__(self, logger):
            self.logger = logger

        def deserialize_cuda_engine(self, content):
            if broken:
                self.logger.log(
                    levels.ERROR, "IRuntime::x: Error Code 1: Serialization (bad tag. In f at /_src/a.cpp:1)"
                )
                return None
            trt.engines.append(FakeEngine(trt, cuda, bytes(content).decode(), record))
            return trt.engines[-1]

    class ValidatingRuntime(Runtime):
        def get_engine_validity(self, content):
            return ("INVALID" if invalid else "VALID"), invalid

    class IProfiler:
        def __init__(self):
            pass

    trt.ILogger, trt.IProfiler, trt.Runtime = ILogger, IProfiler, Runtime
    trt.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="USER_MANAGED")
    if rtx:
        trt.Runtime, trt.IRuntimeCache = ValidatingRuntime, FakeCache
        trt.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="WHOLE")
        # TensorRT-RTX builds for these, and not for 9.0.
        trt.ComputeCapability = SimpleNamespace(__members__={"SM86": 86, "SM89": 89, "SM120": 120})
        trt.EngineStat = SimpleNamespace(TOTAL_WEIGHTS_SIZE=0)
        trt.EngineValidity = SimpleNamespace(INVALID="INVALID")
        members = {"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2}
        trt.EngineInvalidityDiagnostics = SimpleNamespace(__members__=members)
    return trt


def fake_engine(path, graph, record):
    """Write an engine file that the fake runs, with `record` beside it; returns the record as written."""
    from dataclasses import replace

    path.write_text(str(graph))
    record = replace(record, bytes=path.stat().st_size)
    write_record(path, record)
    return read_record(path)
