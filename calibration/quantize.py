"""Quantizing: from a checkpoint and image-question pairs to a GPTQ checkpoint with its report."""

import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image

from uhd_export.bundle.staging import output_errors, staged_folder
from uhd_export.calibration.accuracy import measure_accuracy
from uhd_export.calibration.chart import draw_report
from uhd_export.calibration.data import Pair, card_pairs, read_pairs, without_duplicates
from uhd_export.calibration.estimate import require_memory
from uhd_export.calibration.gptq import CALIBRATION, HELD_OUT, Run
from uhd_export.calibration.quality import Accuracy, Report
from uhd_export.calibration.sequences import SequenceOptions, Sequences, build_sequences, run_settings
from uhd_export.calibration.solver import GptqOptions, library_version
from uhd_export.calibration.work import Work, differing
from uhd_export.calibration.writer import bytes_beside_layers, quantization_config, write_checkpoint
from uhd_export.checkpoint.config import CheckpointConfig, check_image_options, read_config
from uhd_export.checkpoint.fields import read_json
from uhd_export.checkpoint.files import weight_paths
from uhd_export.checkpoint.int4.gptq import GptqCheckpoint, gptq_config
from uhd_export.checkpoint.int4.linears import largest_group, linear_shapes
from uhd_export.checkpoint.int4.weight import check_group
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.checkpoint.source import NANO, source_folder
from uhd_export.checkpoint.tokenizer import checkpoint_tokenizer
from uhd_export.graph.int4.view import RoundedView
from uhd_export.runtime.bundle.manifest import QUALITY, QUALITY_CHART, Quantization
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.image.slicing import MAX_SLICES
from uhd_export.runtime.progress import progress_bar
from uhd_export.runtime.settings import Settings

# Raised when a change of code makes unfinished work of an earlier version useless.
_WORK_VERSION = 2
QUESTIONS = 200
Say = Callable[[str], None]


def quantize(
    source: str | Path,
    out: str | Path,
    *,
    data: str | Path | None = None,
    image_root: str | Path | None = None,
    gptq: GptqOptions | None = None,
    sequences: SequenceOptions | None = None,
    batch: int = 1,
    layout: str | None = None,
    mask: int | None = None,
    grid_mode: str = "selective",
    max_slices: int = MAX_SLICES,
    resize: int | None = None,
    roi_rounding: str = "exact",
    vision_tower: str | Path | None = None,
    config: str | Path | None = None,
    pairs: list[Pair] | None = None,
    questions: int | None = None,
    reuse: bool = False,
    progress: bool = False,
    say: Say = lambda line: None,
) -> Report:
    """Quantize the language model of checkpoint `source` to 4 bits by GPTQ, into the folder `out`.

    Calibrates on `data`, a JSONL file (see `read_pairs`), on `pairs`, or by default on the embedded
    model's card images. `out` is a checkpoint in AutoGPTQ's format that holds the other tensors as they
    were, with its quality report as JSON and PNG. `questions` is how many of the embedded model's
    questions are asked before and after, by default 200 where `source` is "nano" and none otherwise. With
    `reuse` an `out` that was made of the same is left as it is, and its report returned. `batch` sequences
    run at once; the other options are as in `build_bundle`. An interrupted run leaves a hidden folder
    beside `out`, and the same call continues at the layer where it stopped; `say` is told so. Raises
    UhdError; then there is no `out`.
    """
    gptq, options = gptq or GptqOptions(), sequences or SequenceOptions()
    gptq.check()
    check_image_options(layout, grid_mode, max_slices, resize, roi_rounding)
    out = Path(out).absolute()
    made = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if made and not reuse:
        raise UhdError(f"output {out}: exists already; choose another, or delete it")
    version = library_version()
    folder = source_folder(source)
    if gptq_config(folder) is not None:
        raise UhdError(f"checkpoint {source}: is quantized already; build takes it as it is")
    parsed = read_config(folder, config=config, vision_tower=vision_tower, layout=layout, mask=mask)
    gptq = replace(gptq, group=gptq.group or largest_group(parsed.language))
    for name, (_, inputs) in linear_shapes(parsed.language).items():
        check_group(name, inputs, gptq.group)
    options.check(parsed.language.context)
    if pairs is None:
        count = options.samples + options.held_out
        pairs = card_pairs(count, options.seed) if data is None else _read(data, image_root, say)
    if questions is None:
        questions = QUESTIONS if str(source) == NANO else 0
    run = run_settings(
        parsed, grid_mode=grid_mode, max_slices=max_slices, resize=resize, roi_rounding=roi_rounding
    )
    settings = {"gptq": asdict(gptq), "sequences": asdict(options), "images": asdict(run)}
    identity = _identity(folder, parsed, settings, pairs, version)
    if made:
        report = _made_before(out, identity)
        say(f"{out}: quantized before, taken as it is")
        return report
    require_memory(parsed, options, batch, questions)
    work = Work(out.with_name(f".{out.name}.quantize"))
    raw = read_json(Path(config) if config else folder / "config.json")
    raw["quantization_config"] = quantization_config(gptq, version)
    with closing(Checkpoint(folder, parsed.language.vocab)) as checkpoint, output_errors(out):
        work.prepare(identity, say)
        saved = work.load_activations()
        if saved is not None:
            say(f"continuing unfinished work at layer {saved[0]} of {parsed.language.layers}")
        else:
            try:
                built = _sequences(checkpoint, parsed, run, pairs, options, progress)
                saved = 0, Run.states_of(built), built.judged
                work.save_activations(*saved)
            except BaseException:
                work.remove()  # nothing in it is worth continuing
                raise
        layer, states, judged = saved
        quantization = Run(checkpoint, parsed.language, gptq, work, states, judged, batch, layer)
        quantization.records()
        with progress_bar("GPTQ", quantization.steps, show=progress) as bar:
            quantization.quantize_layers(bar.advance)
        report = _report(quantization, settings | {"made_of": identity}, version)
        with staged_folder(out, needed=bytes_beside_layers(checkpoint, parsed.language)) as staging:
            with progress_bar("writing", len(checkpoint.names()), show=progress) as bar:
                write_checkpoint(checkpoint, raw, parsed.language, work, staging, bar.advance)
            if questions:
                accuracy = _accuracy(checkpoint, staging, parsed, run, gptq, questions, progress)
                report = replace(report, accuracy=accuracy)
            (staging / QUALITY).write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
            draw_report(report, staging / QUALITY_CHART)
    work.remove()
    return report


def _sequences(
    checkpoint: Checkpoint,
    config: CheckpointConfig,
    settings: Settings,
    pairs: list[Pair],
    options: SequenceOptions,
    progress: bool,
) -> Sequences:
    tokenizer = checkpoint_tokenizer(checkpoint.folder)
    with progress_bar("encoding images", options.samples + options.held_out, show=progress) as bar:
        return build_sequences(checkpoint, config, settings, tokenizer, pairs, options, bar)


def _accuracy(
    checkpoint: Checkpoint,
    quantized: Path,
    config: CheckpointConfig,
    settings: Settings,
    gptq: GptqOptions,
    questions: int,
    progress: bool,
) -> Accuracy:
    """The embedded model's accuracy before, rounded to the nearest, and after."""
    rounding = Quantization("rtn", gptq.group, gptq.symmetric, False, "dense", "float")
    after = GptqCheckpoint(quantized, config.language.vocab)
    weights = {"before": checkpoint, "rtn": RoundedView(checkpoint, config.language, rounding), "gptq": after}
    try:
        with progress_bar("asking", questions, show=progress) as bar:
            return measure_accuracy(weights, checkpoint, config, settings, questions, bar)
    finally:
        after.close()


def _read(data: str | Path, image_root: str | Path | None, say: Say) -> list[Pair]:
    pairs = read_pairs(data, image_root)
    distinct = without_duplicates(pairs)
    if len(distinct) < len(pairs):
        say(f"{data}: {len(pairs) - len(distinct)} of {len(pairs)} pairs are duplicates and left out")
    return distinct


def _made_before(out: Path, identity: dict[str, str]) -> Report:
    """The report of the checkpoint in `out`. Raises UhdError where it was made of anything else."""
    remedy = "delete it, or give it to build as the checkpoint"
    try:
        report = Report.from_json(json.loads((out / QUALITY).read_text(encoding="utf-8")))
        before = dict(report.settings["made_of"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UhdError(f"{out}: {QUALITY} does not tell what it was made of; {remedy}") from None
    if before != identity:
        raise UhdError(f"{out}: was made of other {', '.join(differing(before, identity))}; {remedy}")
    return report


def _identity(
    folder: Path, config: CheckpointConfig, settings: dict, pairs: list[Pair], version: str
) -> dict[str, str]:
    """Digests of what decides the result, to know it again by; the keys are shown to the user."""
    weights = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in weight_paths(folder)}
    parts = {
        "version": _WORK_VERSION,
        "checkpoint": [str(folder.resolve()), weights, repr(config)],
        "settings": settings,
        "data": _fingerprint(pairs),
        "tools": [version, torch.__version__],
    }
    return {name: hashlib.sha256(json.dumps(part).encode()).hexdigest() for name, part in parts.items()}


def _fingerprint(pairs: list[Pair]) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(repr(pair.turns).encode())
        for image in pair.images:
            if isinstance(image, Image.Image):
                digest.update(repr(image.size).encode() + image.tobytes())
            else:
                status = image.stat()
                digest.update(f"{image} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _report(run: Run, settings: dict, version: str) -> Report:
    records = run.records()
    stored = run.checkpoint.tensor("model.layers.0.self_attn.q_proj.weight").element_size()
    group = run.options.group
    rtn, gptq = run.model_qualities()
    return Report(
        settings=settings,
        tools={"gptqmodel": version, "torch": torch.__version__, "uhd-export": _own_version()},
        calibration_tokens=sum(run.states[CALIBRATION].lengths),
        held_out_tokens=sum(run.states[HELD_OUT].lengths),
        bytes_before=sum(r.outputs * r.inputs * stored for r in records),
        # Half a byte a weight, two and a half a group, four an input: qweight, scales and qzeros, g_idx.
        bytes_after=sum(
            r.outputs * r.inputs // 2 + r.outputs * (r.inputs // group) * 5 // 2 + r.inputs * 4
            for r in records
        ),
        rtn=rtn,
        gptq=gptq,
        accuracy=None,
        linears=records,
    )


def _own_version() -> str:
    try:
        return importlib.metadata.version("uhd-export")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
