"""Quantizing: from a checkpoint and image-question pairs to a GPTQ checkpoint with its report."""

import glob
import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from uhd_export.bundle.cost import model_sizes
from uhd_export.bundle.exclusive import exclusive
from uhd_export.bundle.stages import ASKING, GPTQ, IMAGES, WRITING, expected_seconds, gptq_units
from uhd_export.bundle.staging import output_errors, parents_of, refuse_existing, staged_folder
from uhd_export.calibration.accuracy import measure_accuracy
from uhd_export.calibration.chart import draw_report
from uhd_export.calibration.data import card_pairs, without_duplicates
from uhd_export.calibration.estimate import require_memory
from uhd_export.calibration.gptq import CALIBRATION, HELD_OUT, Run
from uhd_export.calibration.language_part import write_language_part
from uhd_export.calibration.options import CalibrationOptions, GptqOptions, QuantizeOptions
from uhd_export.calibration.quality import Accuracy, Report
from uhd_export.calibration.sequences import Sequences, build_sequences
from uhd_export.calibration.solver import library_version
from uhd_export.calibration.work import Work, differing
from uhd_export.calibration.writer import (
    bytes_beside_layers,
    files_beside_weights,
    quantization_config,
    write_checkpoint,
)
from uhd_export.checkpoint.config import CheckpointConfig, read_config
from uhd_export.checkpoint.fields import read_json
from uhd_export.checkpoint.files import weight_paths
from uhd_export.checkpoint.hub import commit_of
from uhd_export.checkpoint.int4.gptq import GptqCheckpoint
from uhd_export.checkpoint.int4.linears import largest_group, linear_shapes
from uhd_export.checkpoint.int4.settings import is_quantized
from uhd_export.checkpoint.int4.weight import check_group
from uhd_export.checkpoint.reader import Checkpoint
from uhd_export.checkpoint.source import NANO, source_folder
from uhd_export.checkpoint.tokenizer import checkpoint_tokenizer
from uhd_export.graph.int4.view import RoundedView
from uhd_export.runtime import json_files
from uhd_export.runtime.bundle.manifest import QUALITY, QUALITY_CHART, Quantization
from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.language.pairs import Pair, read_pairs
from uhd_export.runtime.progress import expect, progress_bar
from uhd_export.runtime.settings import Settings

# Raised when a change of code makes unfinished work of an earlier version useless.
_WORK_VERSION = 3
QUESTIONS = 200
# What decides the sequences, beside the pairs and how images are cut.
SEQUENCES = ("samples", "held_out", "length", "seed")
Say = Callable[[str], None]


def quantize(
    source: str | Path,
    out: str | Path,
    *,
    options: QuantizeOptions | None = None,
    pairs: list[Pair] | None = None,
    reuse: bool = False,
    progress: bool = False,
    say: Say = lambda line: None,
) -> Report:
    """Quantize the language model of checkpoint `source` to 4 bits by GPTQ, into the folder `out`.

    Calibrates on `pairs`, by default on those that `options.calibration` names. `out` is a checkpoint in
    AutoGPTQ's format that holds the other tensors as they were, with its quality report as JSON and PNG.
    Questions are asked before and after, by default 200 where `source` is "nano" and none otherwise. With
    `reuse` an `out` that was made of the same is left as it is, and its report returned. An interrupted run
    leaves a hidden folder beside `out`, and the same call continues at the layer where it stopped; `say` is
    told so. Raises UhdError; then there is no `out`.
    """
    options, out = options or QuantizeOptions(), Path(out).absolute()
    calibration = options.calibration
    present = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if present and not reuse:
        raise UhdError(f"output {out}: exists already; choose another, or delete it")
    if not present:
        refuse_existing(out, force=False)
    version = library_version()
    folder = source_folder(source, options.reading.revision)
    if is_quantized(folder):
        raise UhdError(
            f"checkpoint {source}: is quantized already; build takes it as it is, "
            "--language-only its language part"
        )
    config = read_config(folder, options.reading)
    gptq = replace(options.gptq, group=options.gptq.group or largest_group(config.language))
    for name, (_, inputs) in linear_shapes(config.language).items():
        check_group(name, inputs, gptq.group_size)
    calibration.check_context(config.language.context)
    questions = calibration.questions
    if questions is None:
        questions = QUESTIONS if str(source) == NANO else 0
    if not present:
        require_memory(config, calibration, questions)  # before pairs, which may be as many images in memory
    if pairs is None:
        pairs = _pairs(calibration, say)
    settings = config.settings(options.images)
    record: dict[str, Any] = {
        "gptq": asdict(gptq),
        "sequences": {name: getattr(calibration, name) for name in SEQUENCES},
        "images": asdict(settings),
    }
    if options.language_only:
        record["language_only"] = True
    identity = _identity(folder, config, record, pairs, version)
    if present:
        report = _earlier_report(out, identity)
        if any(
            out.parent.glob(f".*{glob.escape(out.name)}.quantize*")
        ):  # of a process killed at its very end
            with output_errors(out), exclusive(work_folder(out)):
                Work(work_folder(out)).remove()
        say(f"{out}: quantized before, taken as it is")
        return report
    files_beside_weights(folder)  # which raises where one may not be copied, before hours of work
    work = Work(work_folder(out))
    raw = read_json(Path(options.reading.config) if options.reading.config else folder / "config.json")
    raw["quantization_config"] = quantization_config(gptq, version)
    with (
        closing(Checkpoint(folder, config.language.vocab)) as checkpoint,
        output_errors(out),
        parents_of(out),
        exclusive(work.folder),
    ):
        work.prepare(identity, say)
        saved = work.load_activations()
        layer = 0 if saved is None else saved[0]
        units = gptq_units(
            model_sizes(config),
            images=calibration.pairs if saved is None else 0,
            samples=calibration.samples,
            share=1 - layer / config.language.layers,
            questions=questions,
        )
        expect(expected_seconds(units))
        if saved is not None:
            say(f"continuing unfinished work at layer {saved[0]} of {config.language.layers}")
        else:
            try:
                sequences = _sequences(checkpoint, config, settings, pairs, calibration, progress)
                saved = 0, Run.states_of(sequences), sequences.judged
                work.save_activations(*saved)
            except BaseException:
                work.remove()  # nothing in it is worth continuing
                raise
        layer, states, judged = saved
        run = Run(checkpoint, config.language, gptq, work, states, judged, calibration.batch, layer)
        run.records()  # which raises where one is damaged, before hours of work
        with progress_bar(GPTQ, show=progress) as bar:
            run.quantize_layers(bar.set)
        origin = {"checkpoint": str(source), "revision": commit_of(folder)}
        report = _report(run, record | origin | {"made_of": identity}, version)
        with staged_folder(out, needed=bytes_beside_layers(checkpoint, config.language)) as staging:
            whole = work.whole_folder() if options.language_only else staging
            with progress_bar(WRITING, show=progress) as bar:
                write_checkpoint(checkpoint, raw, config.language, work, whole, bar.set)
                if options.language_only:
                    write_language_part(whole, raw, staging, bar.set)
            if questions:
                accuracy = _accuracy(checkpoint, whole, config, settings, gptq, questions, progress)
                report = replace(report, accuracy=accuracy)
            (staging / QUALITY).write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
            draw_report(report, staging / QUALITY_CHART)
    work.remove()
    return report


def work_folder(out: Path) -> Path:
    """Where unfinished work on `out` is kept."""
    return out.with_name(f".{out.name}.quantize")


def _sequences(
    checkpoint: Checkpoint,
    config: CheckpointConfig,
    settings: Settings,
    pairs: list[Pair],
    options: CalibrationOptions,
    progress: bool,
) -> Sequences:
    tokenizer = checkpoint_tokenizer(checkpoint.folder)
    with progress_bar(IMAGES, options.pairs, show=progress) as bar:
        return build_sequences(checkpoint, config, settings, tokenizer, pairs, options, bar.set)


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
    rounding = Quantization("rtn", gptq.group_size, gptq.symmetric, False, "dense", "float")
    after = GptqCheckpoint(quantized, config.language.vocab)
    weights = {"before": checkpoint, "rtn": RoundedView(checkpoint, config.language, rounding), "gptq": after}
    try:
        with progress_bar(ASKING, questions, show=progress) as bar:
            return measure_accuracy(weights, checkpoint, config, settings, questions, bar.set)
    finally:
        after.close()


def _pairs(options: CalibrationOptions, say: Say) -> list[Pair]:
    """The pairs to calibrate on and to judge by, each once."""
    if options.data is None:
        return card_pairs(options.pairs, options.seed)
    pairs = read_pairs(options.data, options.image_root)
    distinct = without_duplicates(pairs)
    if len(distinct) < len(pairs):
        say(f"{options.data}: {len(pairs) - len(distinct)} of {len(pairs)} pairs are duplicates and left out")
    return distinct


def _earlier_report(out: Path, identity: dict[str, str]) -> Report:
    """The report of the checkpoint in `out`. Raises UhdError where it was made of anything else."""
    remedy = "delete it, or give it to build as the checkpoint"
    try:
        record = json_files.read_json(out / QUALITY)
        if not isinstance(record, dict):
            raise TypeError("no JSON object")
        report = Report.from_json(record)
        before = dict(record["settings"]["made_of"])
    except (OSError, UhdError, ValueError, KeyError, TypeError, AttributeError):
        raise UhdError(f"{out}: {QUALITY} does not tell what it was made of; {remedy}") from None
    if before != identity:
        raise UhdError(f"{out}: was made of other {', '.join(differing(before, identity))}; {remedy}")
    return report


def _identity(
    folder: Path, config: CheckpointConfig, settings: dict, pairs: list[Pair], version: str
) -> dict[str, str]:
    """Digests of what decides the result, to know it again by; the keys are shown to the user."""
    weights = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in weight_paths(folder)}
    tokenizer = checkpoint_tokenizer(folder).to_str()
    parts = {
        "version": _WORK_VERSION,
        "checkpoint": [str(folder.resolve()), weights, repr(config), tokenizer],
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
                digest.update(f"{image.resolve()} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()


def _report(run: Run, settings: dict, version: str) -> Report:
    records = run.records()
    stored = run.checkpoint.tensor("model.layers.0.self_attn.q_proj.weight").element_size()
    group = run.options.group_size
    rtn, gptq, int8_head = run.model_qualities()
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
        int8_head=int8_head,
    )


def _own_version() -> str:
    try:
        return importlib.metadata.version("uhd-export")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
