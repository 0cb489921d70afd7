"""Building a bundle: checkpoint in, a folder out that runs without PyTorch."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from uhd_export.bundle.cost import Cost, estimate_cost
from uhd_export.bundle.options import BuildOptions
from uhd_export.bundle.parity import QUESTION, measure_parity
from uhd_export.bundle.provenance import describe_source, tool_versions
from uhd_export.bundle.stages import CACHE_CALIBRATION, HASHING, VISION_CALIBRATION
from uhd_export.bundle.staging import refuse_existing, staged_folder
from uhd_export.checkpoint.config import CheckpointConfig, read_config
from uhd_export.checkpoint.copy import copy_own
from uhd_export.checkpoint.int4.gptq import GptqCheckpoint, open_checkpoint
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.checkpoint.source import source_folder
from uhd_export.checkpoint.tokenizer import checkpoint_tokenizer
from uhd_export.graph.cache import FloatCache
from uhd_export.graph.inline import inline_functions
from uhd_export.graph.int4.choose import linear_format, resolve
from uhd_export.graph.int4.options import AUTO
from uhd_export.graph.int4.view import EMBED_TOKENS, as_stored
from uhd_export.graph.int8.cache import CachePlan, calibrate_cache
from uhd_export.graph.int8.calibrate import Int8Plan, calibrate_vision
from uhd_export.graph.language import check_context, emit_language
from uhd_export.graph.vision import emit_vision
from uhd_export.model.uhd import refuse_unknown
from uhd_export.runtime.bundle.integrity import hash_file
from uhd_export.runtime.bundle.manifest import (
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
from uhd_export.runtime.engines.backends import engine_class
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.pattern import pattern
from uhd_export.runtime.language import prompt as prompts
from uhd_export.runtime.language.pairs import Pair, Turn
from uhd_export.runtime.progress import expect, progress_bar
from uhd_export.tensorrt.engines import replace_graphs

_TABLE_ROWS = 4096


def build_bundle(
    source: str | Path,
    out: str | Path,
    *,
    options: BuildOptions | None = None,
    quantize: Callable[[], Path] | None = None,
    pairs: Callable[[], Iterable[Pair]] | None = None,
    verify: bool = True,
    on_cost: Callable[[Cost], None] | None = None,
    force: bool = False,
    progress: bool = False,
) -> Manifest:
    """Write the bundle of checkpoint `source` to the folder `out`, and return its manifest.

    `source` is a folder, a Hugging Face hub id, or "nano" for the embedded model. How its images are cut can
    be changed at run time; a quantized checkpoint's quality report goes along; the parity of engines is that
    of the graphs they are built from. With `verify`, the parts are compared with PyTorch and the
    measurements recorded; a bundle out of tolerance is not written. What is rounded is compared with the
    original too, step by step, and by `options.questions`. `quantize` is called when everything has been
    checked, and `on_cost` told what the build takes; it makes the GPTQ checkpoint that is built for
    `source`. Vision in 8 bits, on first images, and a cache in 8 bits are calibrated on `pairs` (default:
    two patterns). `force` replaces an existing bundle; `progress` draws bars.

    Weights are streamed: memory holds a few tensors at a time, and the folded projector in float32.
    Nothing is left at `out` after an error or an interruption. Raises UhdError.
    """
    options, out = options or BuildOptions(), Path(out)
    if options.engines is not None:  # which multiply with what they compute in
        head = "dense" if options.weights.lm_head == AUTO else options.weights.lm_head
        options = replace(options, weights=replace(options.weights, activations="float", lm_head=head))
    folder = source_folder(source, options.reading.revision)
    config = read_config(folder, options.reading)
    cost = _check_before(folder, config, out, options, force, quantize is not None, verify)
    if on_cost is not None:
        on_cost(cost)
    if verify:
        _refuse_unverifiable()
    chosen = list((pairs or _patterns)()) if "int8" in (options.vision_weights, options.cache) else []
    expect(cost.seconds)
    before = folder
    if quantize is not None:
        source = folder = quantize()
        options = replace(options, weights=replace(options.weights, group=None))  # now they are its own
    with closing(open_checkpoint(folder, config.language.vocab)) as checkpoint:
        quantization = resolve(checkpoint, config.language, options.weights)
        with staged_folder(out, force=force, needed=cost.staging) as staging:
            vision = _plan_int8(checkpoint, config, staging, options, chosen, progress)
            _write_vision(checkpoint, config, staging, options, vision, progress)
            stored = as_stored(checkpoint, config.language, quantization)
            cache = _plan_cache(stored, config, staging, options, chosen, progress)
            _write_language(checkpoint, config, staging, options, quantization, cache, progress)
            manifest = replace(
                _describe(source, folder, config, options),
                precision=Precision(
                    options.precision,
                    options.precision,
                    _embeddings(options, quantization),
                    options.cache_type,
                ),
                files=_files(staging, progress),
                quantization=quantization,
                vision_quantization=None if vision is None else vision.record,
                cache_quantization=None if cache is None else cache.record,
            )
            # What is measured is the graphs, which engines are built from.
            write_manifest(staging, replace(manifest, backend="onnxruntime"))
            if verify:
                with closing(open_checkpoint(before, config.language.vocab)) as unrounded:
                    original = None if isinstance(unrounded, GptqCheckpoint) else unrounded
                    parity = measure_parity(
                        staging,
                        stored,
                        config,
                        original=original,
                        questions=options.questions,
                        record=True,
                        progress=progress,
                    )
                _refuse_failed(parity)
                manifest = replace(manifest, parity=tuple(parity), files=_files(staging, progress))
            if options.engines is not None:
                context = manifest.settings.context
                replace_graphs(staging, config, options.engines, options.precision, context, progress)
                manifest = replace(
                    manifest,
                    parity=tuple(replace(p, part=f"{p.part} (graph)") for p in manifest.parity),
                    files=_files(staging, progress),
                )
            write_manifest(staging, manifest)
    return manifest


def _check_before(
    folder: Path,
    config: CheckpointConfig,
    out: Path,
    options: BuildOptions,
    force: bool,
    quantizing: bool,
    verify: bool,
) -> Cost:
    """What the build takes. Raises UhdError for what can be refused before any work, as quantizing is."""
    refuse_existing(out, force)
    with closing(open_checkpoint(folder, config.language.vocab)) as checkpoint:
        refuse_unknown(checkpoint, config)
        # What is yet to be quantized takes the options of what is rounded.
        weights = replace(options.weights, weights="int4-rtn") if quantizing else options.weights
        quantization = resolve(checkpoint, config.language, weights)
        linear_format(checkpoint, config.language, quantization, options.dialect)
        tokenizer = checkpoint_tokenizer(folder)  # which raises where there is none
        if options.context is not None:
            _refuse_small_context(options.context, config, tokenizer)
            check_context(config.language, options.context)
        gptq = checkpoint if isinstance(checkpoint, GptqCheckpoint) else None
        return estimate_cost(config, options, quantization, quantizing=quantizing, verify=verify, gptq=gptq)


def _refuse_unverifiable() -> None:
    """Raise UhdError where nothing runs the graphs, which are compared with PyTorch after an hour of work."""
    try:
        engine_class("onnxruntime")
    except UhdError as error:
        raise UhdError(f"--verify: runs the graphs; {error}; or use --no-verify") from None


def _refuse_failed(parity: Sequence[Parity]) -> None:
    failed = next((p for p in parity if not p.ok), None)
    if failed is not None:
        raise UhdError(
            f"parity of {failed.part} on {failed.inputs}: {failed.metric} {failed.value:.2e} is "
            f"over the limit of {failed.limit:.2e}; nothing was written (--no-verify writes it)"
        )


def _patterns() -> list[Pair]:
    turn = Turn(QUESTION, None)
    return [Pair((pattern(*size),), (turn,), "a pattern") for size in ((1008, 672), (500, 336))]


def _plan_int8(
    checkpoint: Checkpoint,
    config: CheckpointConfig,
    folder: Path,
    options: BuildOptions,
    pairs: list[Pair],
    progress: bool,
) -> Int8Plan | None:
    """What of the vision part is rounded to 8 bits; None where nothing is asked to be."""
    if options.vision_weights != "int8":
        return None
    with progress_bar(VISION_CALIBRATION, show=progress) as bar:
        return calibrate_vision(
            config,
            checkpoint,
            config.settings(options.images),
            [pair.images[0] for pair in pairs],
            folder,
            fold=options.fold,
            progress=bar.set,
        )


def _plan_cache(
    checkpoint: Checkpoint,
    config: CheckpointConfig,
    folder: Path,
    options: BuildOptions,
    pairs: list[Pair],
    progress: bool,
) -> CachePlan | None:
    """The scales of a cache in 8 bits; None where none is asked for."""
    if options.cache_type != "int8":
        return None
    settings, tokenizer = config.settings(options.images), checkpoint_tokenizer(checkpoint.folder)
    with progress_bar(CACHE_CALIBRATION, show=progress) as bar:
        return calibrate_cache(config, checkpoint, settings, tokenizer, pairs, folder / VISION, bar.set)


def _write_vision(
    checkpoint: Checkpoint,
    config: CheckpointConfig,
    folder: Path,
    options: BuildOptions,
    int8: Int8Plan | None,
    progress: bool,
) -> None:
    with progress_bar(VISION, show=progress) as bar:
        emit_vision(
            config,
            checkpoint if int8 is None else int8.view(checkpoint),
            folder / VISION,
            fold=options.fold,
            dtype=options.precision,
            products=None if int8 is None else int8.products(options.dialect),
            contrib=options.contrib,
            progress=bar.set,
        )
    if options.inline:
        inline_functions(folder / VISION)


def _write_language(
    checkpoint: Checkpoint,
    config: CheckpointConfig,
    folder: Path,
    options: BuildOptions,
    quantization: Quantization | None,
    cache: CachePlan | None,
    progress: bool,
) -> None:
    """The language graph, and what stands beside it."""
    for name in (QUALITY, QUALITY_CHART):
        if (checkpoint.folder / name).is_file():
            copy_own(checkpoint.folder, name, folder / name)
    (folder / TOKENIZER).write_text(checkpoint_tokenizer(checkpoint.folder).to_str(), encoding="utf-8")
    plain = FloatCache(options.cache_type, options.attention_accumulation)
    with progress_bar(LANGUAGE, show=progress) as bar:
        emit_language(
            config.language,
            checkpoint,
            folder / LANGUAGE,
            dtype=options.precision,
            dialect=options.dialect,
            cache=plain if cache is None else cache.cache,
            linear=linear_format(checkpoint, config.language, quantization, options.dialect),
            context=options.context,
            progress=bar.set,
        )
    with progress_bar(EMBEDDINGS, show=progress) as bar:
        write_embeddings(checkpoint, folder / EMBEDDINGS, _embeddings(options, quantization), bar.set)


def _refuse_small_context(context: int, config: CheckpointConfig, tokenizer: Tokenizer) -> None:
    """Raise UhdError where no answer to any question fits: the image's marker counts for its first token."""
    text = len(prompts.encode(tokenizer, prompts.render("", config.template)))
    needed = config.projector.side**2 + text
    if context < needed:
        raise UhdError(
            f"--context {context}: an overview, the prompt around a question and one token of the answer "
            f"take {needed} positions; use more"
        )


def _embeddings(options: BuildOptions, quantization: Quantization | None) -> str:
    """The type of the embedding table: float16 beside int4 layers, which lose far more."""
    return options.precision if quantization is None or quantization.method is None else "float16"


def write_embeddings(
    checkpoint: Checkpoint, path: Path, dtype: str, on_rows: Callable[[int, int], None]
) -> None:
    """Write the embedding table as a `.npy` of `dtype`, converted a few thousand rows at a time."""
    table = checkpoint.tensor(EMBED_TOKENS)
    header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": tuple(table.shape)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(table), _TABLE_ROWS):
            with np.errstate(over="ignore"):  # what does not fit is refused next, in our words
                rows = table[start : start + _TABLE_ROWS].float().numpy().astype(dtype)
            if not np.isfinite(rows).all():
                raise UhdError(f"tensor {EMBED_TOKENS}: does not fit {dtype}; use --dtype float32")
            file.write(rows.tobytes())
            on_rows(min(start + _TABLE_ROWS, len(table)), len(table))


def _describe(source: str | Path, folder: Path, config: CheckpointConfig, options: BuildOptions) -> Manifest:
    """The manifest without files and what is measured on them."""
    return Manifest(
        schema_version=SCHEMA_VERSION,
        backend=options.backend,
        fold=options.fold and config.projector.kind == "hiwin",
        precision=Precision(options.precision, options.precision, options.precision, options.cache_type),
        source=describe_source(source, folder, config.release, options.reading),
        model=config.model,
        settings=config.settings(options.images, options.context),
        tools=tool_versions(*(() if options.engines is None else (options.backend,))),
        parity=(),
        files={},
    )


def _files(folder: Path, progress: bool) -> dict[str, FileRecord]:
    """The files in `folder` but the manifest, with their digests."""
    paths = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    size = sum(path.stat().st_size for path in paths)
    with progress_bar(HASHING, size, show=progress, nbytes=True) as bar:
        return {path.name: FileRecord(path.stat().st_size, hash_file(path, bar.advance)) for path in paths}
