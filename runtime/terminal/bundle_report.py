"""What a bundle is, and how its check went, as tables."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from uhd_export.runtime.bundle.integrity import verify_files
from uhd_export.runtime.bundle.manifest import (
    CacheQuantization,
    Manifest,
    Parity,
    Quantization,
    VisionQuantization,
    part_files,
    read_manifest,
)
from uhd_export.runtime.choices import ENGINE_BACKENDS
from uhd_export.runtime.engines.tensorrt.record import plan_memory, read_record
from uhd_export.runtime.errors import printable
from uhd_export.runtime.progress import progress_bar
from uhd_export.runtime.terminal.console import output
from uhd_export.runtime.terminal.quality_report import print_quality as print_quality
from uhd_export.runtime.terminal.text import cell
from uhd_export.runtime.units import format_bytes


def describe_bundle(folder: Path, manifest: Manifest, verified: Mapping[str, str]) -> dict[str, Any]:
    """The manifest ready for JSON, with the folder, its size in bytes and how each file was `verified`."""
    facts = {"bundle": str(folder), "bytes": total_bytes(manifest), **asdict(manifest)}
    return facts | {"verified": dict(verified)}


def total_bytes(manifest: Manifest) -> int:
    """Size of all files."""
    return sum(record.bytes for record in manifest.files.values())


def check_files(folder: Path, reason: str) -> None:
    """What of a check a device can do where, for `reason`, nothing can be measured: every file's SHA-256.

    Raises UhdError where a file is not as it was written.
    """
    manifest = read_manifest(folder)
    size = total_bytes(manifest)
    with progress_bar("hashing", size, nbytes=True) as bar:
        verify_files(folder, manifest, remembered=False, on_bytes=bar.advance)
    print(f"{printable(str(folder))}: {len(manifest.files)} files, {format_bytes(size)}, SHA-256 as recorded")
    print_parity(manifest.parity)
    print(f"parity not measured: {printable(reason)}")


def print_bundle(
    folder: Path, manifest: Manifest, verified: Mapping[str, str], console: Console | None = None
) -> None:
    """Print what the bundle in `folder` holds, for people, and how each file was `verified`."""
    console = console or output()
    model, settings, source = manifest.model, manifest.settings, manifest.source
    commit = "" if source.revision is None else f" at {source.revision[:12]}"
    longest = "as it is"
    if settings.resize:
        longest = f"{settings.resize}{' where that enlarges' if settings.upscale_only else ''}"
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows = {
        "bundle": f"{folder}, {format_bytes(total_bytes(manifest))}, schema {manifest.schema_version}",
        "source": f"{source.id}{commit} ({source.release} release), config {source.config_sha256[:12]}",
        "backend": f"{manifest.backend}, {'folded' if manifest.fold else 'not folded'}",
        "precision": ", ".join(f"{part} {dtype}" for part, dtype in asdict(manifest.precision).items()),
        "vision": f"{model.vision.layers} layers of {model.vision.hidden}, patch {model.vision.patch}",
        "projector": f"{model.projector.kind}, levels {', '.join(f'{s}x' for s in model.projector.levels)}, "
        f"{model.projector.side**2} tokens a crop",
        "language": f"{model.language.kind}, {model.language.layers} layers of {model.language.hidden}, "
        f"vocabulary {model.language.vocab}, context {settings.context}",
        "layout": f"{settings.layout}, template {settings.template}, separators "
        f"{settings.separators.comma} and {settings.separators.newline}",
        "slicing": f"grid mode {settings.grid_mode}, at most {settings.max_slices} slices, longest side "
        f"{longest}, RoI rounding {settings.roi_rounding}",
        "tools": ", ".join(f"{name} {version}" for name, version in manifest.tools.items()),
    }
    if manifest.backend in ENGINE_BACKENDS:
        rows["engines"] = describe_engines(folder, manifest.backend)
    if manifest.quantization is not None:
        rows["weights"] = describe_quantization(manifest.quantization)
    if manifest.vision_quantization is not None:
        rows["vision weights"] = describe_vision(manifest.vision_quantization)
    if manifest.cache_quantization is not None:
        rows["cache"] = describe_cache(manifest.cache_quantization)
    for name, value in rows.items():
        table.add_row(name, cell(value))
    console.print(table)
    files = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    files.add_column("file")
    files.add_column("bytes", justify="right")
    files.add_column("SHA-256")
    files.add_column("")
    for name, record in manifest.files.items():
        files.add_row(cell(name), f"{record.bytes:,}", record.sha256[:16], verified.get(name, "not verified"))
    console.print(files)
    print_parity(manifest.parity, console=console)
    print_quality(folder, manifest, console)


def describe_engines(folder: Path, backend: str) -> str:
    """One line for people: what the engines were built by and for."""
    vision, language = (read_record(folder / name) for name in part_files(backend))
    plugins = sorted({name.rpartition("/")[2].rpartition("_")[0] for name in vision.plugin_layers})
    shapes = ", ".join(profile.name for profile in vision.profiles)
    plans = plan_memory(vision), plan_memory(language)
    return (
        f"{backend} {vision.tensorrt}, compute capability {', '.join(vision.compute_capabilities)}; "
        f"plugins: {', '.join(plugins) or 'none'}; vision profiles around {shapes} patches; on the device "
        f"{format_bytes(sum(plan.weights for plan in plans))} of weights, "
        f"{format_bytes(plans[1].state)} of KV cache, "
        f"{format_bytes(max(max(plan.transfers.values()) for plan in plans))} for inputs and outputs, "
        "and activations"
    )


def describe_quantization(quantization: Quantization) -> str:
    """One line for people."""
    names = {"gptq": "int4 by GPTQ", "rtn": "int4, rounded to the nearest", None: "not quantized"}
    parts = [names[quantization.method]]
    if quantization.method is not None:
        parts.append(f"groups of {quantization.group}")
        parts.append("symmetric" if quantization.symmetric else "asymmetric")
    if quantization.act_order:
        parts.append("act-order")
    parts += [f"head {quantization.lm_head}", f"{quantization.activations} activations"]
    return ", ".join(parts)


def describe_vision(quantization: VisionQuantization) -> str:
    """One line for people; products that stay dense are named."""
    errors = quantization.int8.values()
    text = f"{len(errors)} products in 8 bits"
    if errors:
        text += f", output errors {min(errors):.1e} to {max(errors):.1e} on {quantization.images} images"
    names = [f"{name.rpartition('.encoder.')[2]} ({error:.1e})" for name, error in quantization.dense.items()]
    return text + (f"; dense: {', '.join(names)}" if names else "")


def describe_cache(quantization: CacheQuantization) -> str:
    """One line for people."""
    return (
        f"8 bits, scales of {quantization.positions} positions in {quantization.sequences} conversations; "
        f"rounding: keys {quantization.key_error:.1e}, values {quantization.value_error:.1e}"
    )


def print_parity(
    built: Sequence[Parity], measured: Sequence[Parity] = (), console: Console | None = None
) -> None:
    """Print each table of differences, as built and, where there is one, as measured now."""
    console = console or output()
    if not built and not measured:
        console.print("parity: not measured at build")
        return
    for against in dict.fromkeys(entry.against for entry in (*built, *measured)):
        before, now = ([e for e in entries if e.against == against] for entries in (built, measured))
        _print_table(against, before, now, console)
    for reason in dict.fromkeys(entry.skipped for entry in (*built, *measured) if entry.skipped):
        console.print(f"not measured: {cell(reason)}")


def _print_table(against: str, built: list[Parity], measured: list[Parity], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"against {cell(against)}", overflow="fold")
    for name in ("built", "now") if measured else ("built",):
        table.add_column(name, justify="right")
    table.add_column("limit", justify="right")
    table.add_column("")
    now = {_key(entry): entry for entry in measured}
    before = {_key(entry): entry for entry in built}
    for key in dict.fromkeys([*before, *now]):
        entries = [before.get(key), now.get(key)] if measured else [before[key]]
        planned = next(entry for entry in reversed(entries) if entry is not None)
        limit = "none" if planned.limit is None else _number(planned.limit)
        mark = "not measured" if planned.value is None else "[green]ok[/green]"
        if not all(entry.ok for entry in entries if entry is not None):
            mark = "[red]over[/red]"
        table.add_row(cell(": ".join(key)), *(_value(entry) for entry in entries), limit, mark)
    console.print(table)


def _key(entry: Parity) -> tuple[str, str]:
    return f"{entry.part}, {entry.metric}", entry.inputs


def _value(entry: Parity | None) -> str:
    return "-" if entry is None or entry.value is None else _number(entry.value)


def _number(value: float) -> str:
    return f"{value:.0f}" if value.is_integer() else f"{value:.1e}"
