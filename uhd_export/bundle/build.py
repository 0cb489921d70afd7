"""Building a bundle: checkpoint in, a folder out that runs without PyTorch."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from uhd_export.bundle.parity import measure_parity
from uhd_export.bundle.provenance import describe_source, tool_versions
from uhd_export.bundle.staging import refuse_existing, staged_folder
from uhd_export.checkpoint.config import CheckpointConfig, check_image_options, read_config
from uhd_export.checkpoint.fields import choice
from uhd_export.checkpoint.int4.gptq import open_checkpoint
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.checkpoint.source import source_folder
from uhd_export.checkpoint.tokenizer import checkpoint_tokenizer
from uhd_export.graph.int4.choose import WeightOptions, linear_format, resolve
from uhd_export.graph.int4.view import as_stored
from uhd_export.graph.language import check_context, emit_language
from uhd_export.graph.vision import emit_vision
from uhd_export.model.uhd import refuse_unknown
from uhd_export.runtime.bundle.integrity import hash_file
from uhd_export.runtime.bundle.manifest import (
    DTYPES,
    EMBEDDINGS,
    LANGUAGE,
    MANIFEST,
    QUALITY,
    QUALITY_CHART,
    SCHEMA_VERSION,
    TOKENIZER,
    VISION,
    FileRecord,
    Manifest,
    Parity,
    Precision,
    Quantization,
    write_manifest,
)
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.slicing import MAX_SLICES
from uhd_export.runtime.language import prompt as prompts
from uhd_export.runtime.progress import progress_bar
from uhd_export.runtime.settings import Settings
from uhd_export.tensorrt import EngineOptions
from uhd_export.tensorrt.engines import BACKENDS, engine_options, replace_graphs

_TABLE_ROWS = 4096
_EMBED_TOKENS = "model.embed_tokens.weight"


@dataclass(frozen=True)
class BuildOptions:
    """What a user may choose; see `build_bundle`."""

    backend: str = "onnxruntime"
    dtype: str = "float32"
    fold: bool = True
    layout: str | None = None
    mask: int | None = None
    grid_mode: str = "selective"
    max_slices: int = MAX_SLICES
    resize: int | None = None
    roi_rounding: str = "exact"
    vision_tower: str | None = None
    config: str | None = None
    context: int | None = None
    weights: WeightOptions = field(default_factory=WeightOptions)
    engines: EngineOptions | None = None

    def __post_init__(self) -> None:
        """Raise UhdError naming the first option out of range."""
        choice("backend", self.backend, BACKENDS)
        choice("dtype", self.dtype, DTYPES)
        check_image_options(self.layout, self.grid_mode, self.max_slices, self.resize, self.roi_rounding)

    @property
    def dialect(self) -> str:
        """Of the language graph."""
        return "onnxruntime" if self.engines is None else "tensorrt"


def build_bundle(
    source: str | Path,
    out: str | Path,
    *,
    backend: str = "onnxruntime",
    dtype: str | None = None,
    fold: bool = True,
    layout: str | None = None,
    mask: int | None = None,
    grid_mode: str = "selective",
    max_slices: int = MAX_SLICES,
    resize: int | None = None,
    roi_rounding: str = "exact",
    vision_tower: str | Path | None = None,
    config: str | Path | None = None,
    context: int | None = None,
    weights: str = "auto",
    group: int | None = None,
    lm_head: str = "dense",
    activations: str = "int8",
    compute_capabilities: Sequence[str] = (),
    plugins: bool = True,
    workspace: int | None = None,
    verify: bool = True,
    quantize: Callable[[], Path] | None = None,
    force: bool = False,
    progress: bool = False,
) -> Manifest:
    """Write the bundle of checkpoint `source` to the folder `out`, and return its manifest.

    `source` is a folder, a Hugging Face hub id, or "nano" for the embedded model. `dtype` is the type
    of weights and activations: float32 (default for onnxruntime) or float16 (for engines); `context`
    the positions of the key-value cache (default: the model's). `grid_mode`, `max_slices` and `resize`
    are defaults that can be changed at run time. `weights`, `group`, `lm_head` and `activations` say
    how the language model's linear layers are stored (see `WeightOptions`); the quality report of a
    quantized checkpoint goes along. `compute_capabilities`, `plugins` and `workspace` (MiB) are for
    engines (see `EngineOptions`), whose parity is that of the graphs they are built from. `layout`,
    `mask`, `roi_rounding`, `vision_tower` and `config` are as in `load_model`. With `verify`, the parts
    are compared with PyTorch and the measurements recorded; a bundle out of tolerance is not written.
    `quantize` is called when everything has been checked; it makes the GPTQ checkpoint that is built
    for `source`. `force` replaces an existing bundle; `progress` draws bars on a terminal.

    Weights are streamed: memory holds a few tensors at a time, and the folded projector in float32.
    Nothing is left at `out` after an error or an interruption. Raises UhdError.
    """
    engines = engine_options(backend, compute_capabilities, plugins, workspace)
    options = BuildOptions(
        backend=backend,
        dtype=dtype or ("float16" if engines else "float32"),
        fold=fold,
        layout=layout,
        mask=mask,
        grid_mode=grid_mode,
        max_slices=max_slices,
        resize=resize,
        roi_rounding=roi_rounding,
        vision_tower=None if vision_tower is None else str(vision_tower),
        config=None if config is None else str(config),
        context=context,
        weights=WeightOptions(weights, group, lm_head, "float" if engines else activations),
        engines=engines,
    )
    folder = source_folder(source)
    parsed = read_config(
        folder, config=config, vision_tower=vision_tower, layout=options.layout, mask=options.mask
    )
    _check_before(folder, parsed, Path(out), options, force, quantize is not None)
    if quantize is not None:
        source = folder = quantize()
    checkpoint = open_checkpoint(folder, parsed.language.vocab)
    try:
        quantization = resolve(checkpoint, parsed.language, options.weights)
        needed = _estimate_bytes(checkpoint, options)
        with staged_folder(Path(out), force=force, needed=needed) as staging:
            _write_parts(checkpoint, parsed, staging, options, quantization, progress)
            manifest = _describe(source, folder, parsed, staging, options, progress)
            manifest = replace(manifest, quantization=quantization)
            write_manifest(staging, replace(manifest, backend="onnxruntime"))
            if verify:
                reference = as_stored(checkpoint, parsed.language, quantization)
                parity = measure_parity(staging, reference, parsed, progress=progress)
                _refuse_failed(parity)
                manifest = replace(manifest, parity=tuple(parity))
            if engines is not None:
                parity = tuple(replace(p, part=f"{p.part} (graph)") for p in manifest.parity)
                replace_graphs(staging, parsed, engines, options.dtype, manifest.settings.context, progress)
                manifest = replace(manifest, parity=parity, files=_files(staging, progress))
            write_manifest(staging, manifest)
    finally:
        checkpoint.close()
    return manifest


def _check_before(
    folder: Path, config: CheckpointConfig, out: Path, options: BuildOptions, force: bool, quantizing: bool
) -> None:
    """Raise UhdError for whatever can be refused before any work, the longest of which is quantizing."""
    refuse_existing(out, force)
    if options.context is not None:
        _refuse_small_context(options.context, config, checkpoint_tokenizer(folder))
        check_context(config.language, options.context)
    with closing(open_checkpoint(folder, config.language.vocab)) as checkpoint:
        refuse_unknown(checkpoint, config)
        # What is yet to be quantized takes the options of what is rounded.
        weights = replace(options.weights, weights="int4-rtn") if quantizing else options.weights
        quantization = resolve(checkpoint, config.language, weights)
        linear_format(checkpoint, config.language, quantization, options.dialect)


def _refuse_failed(parity: Sequence[Parity]) -> None:
    failed = next((p for p in parity if not p.ok), None)
    if failed is not None:
        raise UhdError(
            f"parity of {failed.part} on {failed.inputs}: {failed.metric} {failed.value:.2e} is "
            f"over the limit of {failed.limit:.2e}; nothing was written (--no-verify writes it)"
        )


def _estimate_bytes(checkpoint: Checkpoint, options: BuildOptions) -> int:
    """Size of the weights in the chosen type; folding and unused tensors change it by little."""
    item = np.dtype(options.dtype).itemsize
    weights = sum(int(np.prod(checkpoint.shape(name))) for name in checkpoint.names()) * item
    return weights if options.engines is None else 2 * weights  # graphs, and engines beside them


def _write_parts(
    checkpoint: Checkpoint,
    config: CheckpointConfig,
    folder: Path,
    options: BuildOptions,
    quantization: Quantization | None,
    progress: bool,
) -> None:
    for name in (QUALITY, QUALITY_CHART):
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)
    (folder / TOKENIZER).write_text(checkpoint_tokenizer(checkpoint.folder).to_str(), encoding="utf-8")
    with progress_bar(VISION, show=progress) as bar:
        emit_vision(
            config, checkpoint, folder / VISION, fold=options.fold, dtype=options.dtype, progress=bar.set
        )
    with progress_bar(LANGUAGE, show=progress) as bar:
        emit_language(
            config.language,
            checkpoint,
            folder / LANGUAGE,
            dtype=options.dtype,
            dialect=options.dialect,
            linear=linear_format(checkpoint, config.language, quantization, options.dialect),
            context=options.context,
            progress=bar.set,
        )
    with progress_bar(EMBEDDINGS, show=progress) as bar:
        write_embeddings(checkpoint, folder / EMBEDDINGS, options.dtype, bar.set)


def _refuse_small_context(context: int, config: CheckpointConfig, tokenizer: Tokenizer) -> None:
    """Raise UhdError where no answer to any question fits: the image's marker counts for its first token."""
    text = len(prompts.encode(tokenizer, prompts.render("", config.template)))
    needed = config.projector.side**2 + text
    if context < needed:
        raise UhdError(
            f"--context {context}: an overview, the prompt around a question and one token of the answer "
            f"take {needed} positions; use more"
        )


def write_embeddings(
    checkpoint: Checkpoint, path: Path, dtype: str, on_rows: Callable[[int, int], None]
) -> None:
    """Write the embedding table as a `.npy` of `dtype`, converted a few thousand rows at a time."""
    table = checkpoint.tensor(_EMBED_TOKENS)
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": tuple(table.shape)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(table), _TABLE_ROWS):
            with np.errstate(over="ignore"):  # what does not fit is refused next, in our words
                rows = table[start : start + _TABLE_ROWS].float().numpy().astype(dtype)
            if not np.isfinite(rows).all():
                raise UhdError(f"tensor {_EMBED_TOKENS}: does not fit {dtype}; use --dtype float32")
            file.write(rows.tobytes())
            on_rows(min(start + _TABLE_ROWS, len(table)), len(table))


def _describe(
    source: str | Path,
    folder: Path,
    config: CheckpointConfig,
    staging: Path,
    options: BuildOptions,
    progress: bool,
) -> Manifest:
    """The manifest of the files in `staging`, without parity yet."""
    settings = Settings(
        layout=config.layout,
        template=config.template,
        separators=config.separators,
        grid_mode=options.grid_mode,
        max_slices=options.max_slices,
        resize=options.resize,
        upscale_only=config.upscale_only,
        roi_rounding=options.roi_rounding,
        context=options.context or config.language.context,
    )
    return Manifest(
        schema_version=SCHEMA_VERSION,
        backend=options.backend,
        fold=options.fold and config.projector.kind == "hiwin",
        precision=Precision(options.dtype, options.dtype, options.dtype),
        source=describe_source(
            source,
            folder,
            config.release,
            config=options.config,
            vision_tower=options.vision_tower,
            mask=options.mask,
        ),
        model=config.model,
        settings=settings,
        tools=tool_versions(*(() if options.engines is None else (options.backend,))),
        parity=(),
        files=_files(staging, progress),
    )


def _files(folder: Path, progress: bool) -> dict[str, FileRecord]:
    """The files in `folder` but the manifest, with their digests."""
    paths = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    with progress_bar("hashing", sum(path.stat().st_size for path in paths), show=progress) as bar:
        return {path.name: FileRecord(path.stat().st_size, hash_file(path, bar.advance)) for path in paths}
