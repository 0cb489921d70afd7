"""The TensorRT plugins themselves: `uhd_export.plugins.operator.Operator`s behind IPluginV3.

While an engine is built, a plugin compiles its kernels (Triton; no GPU) for the types and shapes of the
profiles and puts them, as PTX, into its serialized fields. On the device it launches them. Works with
TensorRT-RTX and TensorRT alike. `register` must run in the process that builds and in the one that
loads the engine. The classes are made once TensorRT is imported, because they derive from its own; it has no
type hints, so that its classes and objects are `Any` here and in `uhd_export.tensorrt`.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from uhd_export.plugins.launch import Launch
from uhd_export.plugins.operator import (
    Dims,
    Operator,
    ShapeRanges,
    check_shapes,
    check_types,
    kernel_dtypes,
    read_attributes,
)
from uhd_export.plugins.operators import operators
from uhd_export.plugins.tensorrt.runner import KERNELS, Runner, kernel_key, pack, unpack, workspace_bytes
from uhd_export.runtime.engines.tensorrt.backend import open_tensorrt
from uhd_export.runtime.errors import UhdError

VERSION = "1"
_failures: list[UhdError] = []  # of callbacks, which TensorRT answers for with an error of its own


@contextmanager
def errors() -> Iterator[None]:
    """Raise what a plugin found wrong in the block, in place of what TensorRT made of it.

    Put it around parsing, building, deserializing and running.
    """
    _failures.clear()
    try:
        yield
    except Exception as error:
        if _failures:
            raise _failures[0] from error
        raise
    if _failures:
        raise _failures[0]


class Build:
    """What a plugin learns while its engine is built, shared by its clones: launches for types."""

    def __init__(self, capabilities: Sequence[int]) -> None:
        self.capabilities = tuple(capabilities)
        self.launches: dict[str, tuple[Launch, tuple[str, ...], int]] = {}
        self.compiled: dict[str, dict[str, Any]] = {}
        self.failed: UhdError | None = None

    def fail(self, error: UhdError) -> None:
        """Note what is wrong; `errors` raises it, and no engine comes of it."""
        self.failed = error
        _failures.append(error)

    def request(
        self, operator: Operator, attributes: Mapping[str, int], shapes: ShapeRanges, dtype: str
    ) -> None:
        """Ask for all kernels that inputs within these ranges need, for every capability."""
        for name, axis in operator.fixed(attributes):
            first, last = shapes.min[name][axis], shapes.max[name][axis]
            if first != last:
                raise UhdError(
                    f"operator {operator.name}: axis {axis} of input {name} ranges from {first} to {last}; "
                    "it must be fixed"
                )
        scratch = {one.name: one.dtype for one in operator.plan(shapes.max, attributes, dtype)[1]}
        for launch in operator.variants(shapes, attributes, dtype):
            kinds = tuple(scratch.get(name, dtype) for name in launch.tensors)
            for capability in self.capabilities:
                self.launches[kernel_key(launch, kinds, capability)] = (launch, kinds, capability)

    def compile(self, folder: str) -> dict[str, dict[str, Any]]:
        """All kernels asked for so far, compiled, by key: always the same dictionary, which grows."""
        from uhd_export.plugins.compile.compiler import Request, compile_kernels

        if self.failed:
            raise self.failed
        missing = [key for key in self.launches if key not in self.compiled]
        requests = [
            Request.of(folder, launch, dict(zip(launch.tensors, kinds, strict=True)), capability)
            for launch, kinds, capability in (self.launches[key] for key in missing)
        ]
        fields = ("name", "ptx", "shared", "warps", "nulls")
        for key, kernel in zip(missing, compile_kernels(requests), strict=True):
            self.compiled[key] = {field: getattr(kernel, field) for field in fields}
        return self.compiled


def register(trt: ModuleType, capabilities: Sequence[str] = ()) -> tuple[str, ...]:
    """Register the plugins with TensorRT, and return the names of the operators that they run.

    `capabilities`, such as ("8.6", "8.9"), are the GPUs to build kernels for; none are needed to load
    an engine. Call it before parsing or deserializing; calling it again changes the capabilities.
    Raises UhdError for a capability that kernels cannot be compiled for.
    """
    if trt.__name__ == "tensorrt_rtx":
        open_tensorrt("tensorrt-rtx")  # else the first plugin node ends the process
    numbers = tuple(dict.fromkeys(map(kernel_capability, capabilities)))
    registry = trt.get_plugin_registry()
    for creator in _creators(trt):
        creator.capabilities = numbers
        if registry.get_creator(creator.name, VERSION, "") is None and not registry.register_creator(
            creator, ""
        ):
            raise UhdError(f"operator {creator.name}: TensorRT does not accept its plugin")
    return tuple(creator.name for creator in _creators(trt))


def kernel_capability(capability: str) -> int:
    """Compute capability "8.9" as 89. Raises UhdError where kernels cannot be compiled for it."""
    from uhd_export.plugins.compile.compiler import TARGETS

    names = {f"{target // 10}.{target % 10}": target for target in TARGETS}
    if capability not in names:
        raise UhdError(
            f"compute capability {capability}: the plugins have no kernels for it (only {', '.join(names)}); "
            "use --no-plugins"
        )
    return names[capability]


@functools.cache
def _creators(trt: ModuleType) -> list[Any]:
    """One creator an operator, kept alive as long as the process."""

    base: Any = trt.IPluginCreatorV3One

    class Creator(base):
        def __init__(self, operator: Operator) -> None:
            base.__init__(self)
            self.operator = operator
            self.name, self.plugin_version, self.plugin_namespace = operator.name, VERSION, ""
            self.capabilities: tuple[int, ...] = ()
            nothing = np.array([], np.int32)
            kind = trt.PluginFieldType.INT32
            self.fields = [trt.PluginField(name, nothing, kind) for name in operator.attributes]
            self.field_names = trt.PluginFieldCollection(self.fields)

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            values = {field.name: np.array(field.data) for field in fields}
            try:
                attributes = read_attributes(self.operator, values)
                if phase == trt.TensorRTPhase.RUNTIME:
                    return _plugin_class(trt)(self.operator, attributes, unpack(values.get(KERNELS)))
            except UhdError as error:
                _failures.append(error)
                return None
            build = Build(self.capabilities)
            return _plugin_class(trt)(self.operator, attributes, build.compiled, build)

    return [Creator(operator) for operator in operators().values()]


@functools.cache
def _plugin_class(trt: ModuleType) -> type:
    plugin: Any = trt.IPluginV3
    core: Any = trt.IPluginV3OneCore
    build_side: Any = trt.IPluginV3OneBuild
    runtime_side: Any = trt.IPluginV3OneRuntime
    dtypes = kernel_dtypes(trt)

    class Plugin(plugin, core, build_side, runtime_side):
        def __init__(
            self,
            operator: Operator,
            attributes: Mapping[str, int],
            kernels: dict[str, dict],
            build: Build | None = None,
        ) -> None:
            for base in (plugin, core, build_side, runtime_side):
                base.__init__(self)
            self.operator, self.attributes, self.kernels, self.build = operator, attributes, kernels, build
            self.runner = Runner(operator, attributes, kernels)
            self.plugin_name, self.plugin_version, self.plugin_namespace = operator.name, VERSION, ""
            self.names = operator.inputs(attributes)
            self.num_outputs = len(operator.outputs(attributes))
            # Kernels are what timing could depend on, and they follow from the operator and the types.
            self.timing_cache_id = ""

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return Plugin(self.operator, self.attributes, self.kernels, self.build)

        def get_output_data_types(self, types: Sequence[Any]) -> list[Any]:
            # An exception here would be printed with its stack; noted, it stops `get_fields_to_serialize`.
            try:
                check_types(operator=self.operator, names=self.names, trt=trt, types=types)
            except UhdError as error:
                self.building().fail(error)
            return [types[0]] * self.num_outputs

        def get_output_shapes(self, inputs: Sequence[Any], _: Sequence[Any], builder: Any) -> list[Any]:
            shapes = [
                [dim.get_constant_value() if dim.is_constant() else None for dim in dims] for dims in inputs
            ]
            try:
                check_shapes(self.operator, self.attributes, shapes)
            except UhdError as error:
                self.building().fail(error)
                return [inputs[0]] * self.num_outputs
            symbolic = {name: list(dims) for name, dims in zip(self.names, inputs, strict=True)}
            outputs = self.operator.output_shapes(symbolic, self.attributes, Dims(trt, builder))
            return [trt.DimsExprs(shape) for shape in outputs]

        def supports_format_combination(self, position: int, tensors: Sequence[Any], inputs: int) -> bool:
            one = tensors[position].desc
            return (
                one.format == trt.TensorFormat.LINEAR
                and one.type in dtypes
                and one.type == tensors[0].desc.type
            )

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            shapes = ShapeRanges(
                {name: tuple(tensor.min) for name, tensor in zip(self.names, inputs, strict=True)},
                {name: tuple(tensor.max) for name, tensor in zip(self.names, inputs, strict=True)},
            )
            if any(size < 0 for shape in shapes.max.values() for size in shape):
                return  # before the profiles' sizes are known
            build = self.building()
            try:
                build.request(self.operator, self.attributes, shapes, dtypes[inputs[0].desc.type])
            except UhdError as error:
                build.fail(error)

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            shapes = [tuple(tensor.max) for tensor in inputs]
            return workspace_bytes(self.operator, shapes, self.attributes, dtypes[inputs[0].desc.type])

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, tactic: int) -> None:
            pass

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            pass

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def building(self) -> Build:
            """The build that this plugin is part of; in a loaded engine there is none."""
            if self.build is None:
                raise RuntimeError(f"plugin {self.operator.name}: asked to build in a loaded engine")
            return self.build

        def prepare(self) -> None:
            """Compile what has been asked for while the engine is built; on the device all is there."""
            if self.build is not None:
                self.build.compile(self.operator.folder)

        def get_fields_to_serialize(self) -> Any:
            try:
                self.prepare()
            except UhdError as error:
                _failures.append(error)
                raise
            kinds = trt.PluginFieldType
            values = {KERNELS: (pack(self.kernels), kinds.INT8)}
            for name, value in self.attributes.items():
                values[name] = np.array([value], np.int32), kinds.INT32
            # Kept, because fields and collections only point to what they are made of.
            self.serialized = values, [trt.PluginField(name, *value) for name, value in values.items()]
            return trt.PluginFieldCollection(self.serialized[1])

        def enqueue(
            self,
            input_desc: Sequence[Any],
            output_desc: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            shapes = [tuple(desc.dims) for desc in input_desc]
            types = [dtypes[desc.type] for desc in (*input_desc, *output_desc)]
            try:
                self.prepare()  # TensorRT times plugins before it serializes them; TensorRT-RTX does not
                self.runner.run(shapes, types, [*inputs, *outputs], workspace, stream)
            except UhdError as error:
                _failures.append(error)
                raise

    return Plugin
