"""A profile as comma-separated values, a row for each grid mode and stage."""

import csv
import io
from typing import Any

_COLUMNS = (
    "bundle",
    "grid_mode",
    "stage",
    "seconds_median",
    "seconds_low_quartile",
    "seconds_high_quartile",
    "interval_low",
    "interval_high",
    "runs",
    "flops",
    "flops_per_second",
    "bytes",
    "peak_bytes",
    "width",
    "height",
    "crops",
    "visual_tokens",
    "positions",
    "backend",
    "vision_precision",
    "language_precision",
    "processor",
    "threads",
    "device",
    "paper_latency_seconds",
)


def profile_csv(facts: dict[str, Any]) -> str:
    """The rows of the profile `facts`; seconds, bytes and FLOPs as plain numbers, empty where not known."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for mode in facts["modes"]:
        for stage, record in _stages(mode).items():
            writer.writerow(_row(facts, mode, stage, record))
    return out.getvalue()


def _stages(mode: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The stages, the time to the first token, and the cold start where it was measured."""
    found = {**mode["stages"], "first_token": {"seconds": mode["first_token"]}}
    if mode["cold"] is not None:
        for name in ("open", "first_token"):
            seconds = mode["cold"][f"{name}_seconds"]
            spread = {
                "median": seconds,
                "low": seconds,
                "high": seconds,
                "interval": None,
                "samples": [seconds],
            }
            found[f"cold_{name}"] = {"seconds": spread}
    return found


def _row(facts: dict[str, Any], mode: dict[str, Any], stage: str, record: dict[str, Any]) -> dict[str, Any]:
    seconds, machine = record["seconds"], facts["machine"]
    low, high = seconds["interval"] or ("", "")
    return {
        "bundle": facts["bundle"],
        "grid_mode": mode["grid_mode"],
        "stage": stage,
        "seconds_median": seconds["median"],
        "seconds_low_quartile": seconds["low"],
        "seconds_high_quartile": seconds["high"],
        "interval_low": low,
        "interval_high": high,
        "runs": len(seconds["samples"]),
        "flops": record.get("flops"),
        "flops_per_second": record.get("flops_per_second"),
        "bytes": record.get("bytes"),
        "peak_bytes": mode["peak_bytes"],
        "width": facts["size"][0],
        "height": facts["size"][1],
        "crops": facts["crops"],
        "visual_tokens": facts["visual_tokens"],
        "positions": facts["positions"],
        "backend": facts["backend"],
        "vision_precision": facts["precision"]["vision"],
        "language_precision": facts["precision"]["language"],
        "processor": machine["processor"],
        "threads": machine["threads"],
        "device": machine["device"],
        "paper_latency_seconds": facts["paper"]["rows"][mode["grid_mode"]]["latency_seconds"],
    }
