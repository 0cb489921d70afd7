"""The report's charts: Vega-Lite specifications, drawn as SVG by vl-convert.

Colours are the page's CSS variables, so that one drawing suits dark and light.
"""

from collections.abc import Sequence
from typing import Any

from uhd_export.runtime.errors import UhdError
from uhd_export.runtime.profiling.stages import VISION_STAGES

Spec = dict[str, Any]
Facts = dict[str, Any]

NAMES = {
    "open": "opening",
    "pixels": "slicing and pixels",
    "vision": "vision",
    "vit": "ViT",
    "jbu": "JBU",
    "hiwin": "Hiwin",
    "prefill": "prefill",
    "decode": "decode",
}
_COLOURS = {name: f"var(--{name})" for name in NAMES}
_INK, _FAINT, _ACCENT, _SECOND = "var(--ink)", "var(--faint)", "var(--accent)", "var(--second)"
_WIDTH = 560
_CONFIG = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": _INK,
        "titleColor": _INK,
        "gridColor": _FAINT,
        "domainColor": _FAINT,
        "tickColor": _FAINT,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelLimit": 200,
    },
    "legend": {"labelColor": _INK, "titleColor": _INK, "labelFontSize": 12, "columnPadding": 24},
    "text": {"color": _INK, "fontSize": 12},
}


def draw(spec: Spec) -> str:
    """`spec` as SVG. Raises UhdError where the library is not installed."""
    try:
        import vl_convert
    except ImportError as error:
        raise UhdError(
            f"--html: vl-convert, which draws, is not installed ({error}); pip install 'uhd-export[report]'"
        ) from None
    svg: str = vl_convert.vegalite_to_svg({**spec, "config": _CONFIG}, allowed_base_urls=[])
    return svg


def _stage_colour(stages: Sequence[str]) -> Spec:
    scale = {"domain": [NAMES[s] for s in stages], "range": [_COLOURS[s] for s in stages]}
    return {"field": "stage", "type": "nominal", "scale": scale, "legend": {"orient": "top", "title": None}}


def _stages(record: dict[str, Any]) -> list[str]:
    """What the time to the first token is made of, the parts of vision where they are known."""
    parts = [name for name in VISION_STAGES if name in record] or ["vision"]
    return ["pixels", *parts, "prefill"]


def stage_bars(facts: Facts) -> Spec:
    """Time to the first token by stage, a bar for each grid mode, its quartiles at the end."""
    names = _stages(facts["modes"][0]["stages"])
    rows = [
        {
            "mode": mode["grid_mode"],
            "stage": NAMES[name],
            "order": order,
            "ms": mode["stages"][name]["seconds"]["median"] * 1e3,
        }
        for mode in facts["modes"]
        for order, name in enumerate(names)
    ]
    ends = [
        {
            "mode": mode["grid_mode"],
            "low": mode["first_token"]["low"] * 1e3,
            "high": mode["first_token"]["high"] * 1e3,
            "label": f"{mode['first_token']['median'] * 1e3:,.0f}",
        }
        for mode in facts["modes"]
    ]
    mode_axis = {"field": "mode", "type": "nominal", "sort": None, "title": None}
    return {
        "width": _WIDTH,
        "height": {"step": 44},
        "layer": [
            {
                "data": {"values": rows},
                "mark": {"type": "bar", "height": 26},
                "encoding": {
                    "y": mode_axis,
                    "x": {"field": "ms", "type": "quantitative", "title": "milliseconds to the first token"},
                    "order": {"field": "order"},
                    "color": _stage_colour(names),
                },
            },
            {
                "data": {"values": ends},
                "mark": {"type": "rule", "strokeWidth": 2, "color": _INK},
                "encoding": {
                    "y": mode_axis,
                    "x": {"field": "low", "type": "quantitative"},
                    "x2": {"field": "high"},
                },
            },
            {
                "data": {"values": ends},
                "mark": {"type": "text", "align": "left", "dx": 6, "dy": -14},
                "encoding": {
                    "y": mode_axis,
                    "x": {"field": "high", "type": "quantitative"},
                    "text": {"field": "label"},
                },
            },
        ],
    }


def beside_paper(facts: Facts) -> Spec:
    """Each mode's time over the first mode's, here and in the paper."""
    first, rows = facts["modes"][0], []
    paper = facts["paper"]["rows"]
    for mode in facts["modes"]:
        name = mode["grid_mode"]
        here = mode["first_token"]["median"] / first["first_token"]["median"]
        there = paper[name]["latency_seconds"] / paper[first["grid_mode"]]["latency_seconds"]
        rows += [
            {"mode": name, "of": "here, to the first token", "ratio": here},
            {"mode": name, "of": "paper's latency, A100", "ratio": there},
        ]
    colours = {"domain": [row["of"] for row in rows[:2]], "range": [_ACCENT, _SECOND]}
    base = {
        "y": {"field": "mode", "type": "nominal", "sort": None, "title": None},
        "yOffset": {"field": "of", "sort": None},
        "x": {
            "field": "ratio",
            "type": "quantitative",
            "title": f"times the latency of {first['grid_mode']}",
        },
    }
    return {
        "width": _WIDTH,
        "height": {"step": 22},
        "data": {"values": rows},
        "layer": [
            {
                "mark": "bar",
                "encoding": {
                    **base,
                    "color": {"field": "of", "scale": colours, "legend": {"orient": "top", "title": None}},
                },
            },
            {
                "mark": {"type": "text", "align": "left", "dx": 4},
                "encoding": {**base, "text": {"field": "ratio", "format": ".2f"}},
            },
        ],
    }


def roofline(facts: Facts) -> Spec | None:
    """Achieved rates under what the machine can do at best; None where that was not measured."""
    rates = facts["rates"]
    if rates is None:
        return None
    points = []
    for name, stage in facts["modes"][0]["stages"].items():
        if stage["flops"] and stage["bytes"] and not (name == "vision" and facts["vision_split"]):
            points.append(
                {
                    "stage": NAMES[name],
                    "intensity": stage["flops"] / stage["bytes"],
                    "rate": stage["flops_per_second"] / 1e9,
                }
            )
    peak, bandwidth = rates["flops_per_second"] / 1e9, rates["bytes_per_second"] / 1e9
    ridge = peak / bandwidth
    low = min([point["intensity"] for point in points] + [ridge]) / 2
    high = max([point["intensity"] for point in points] + [ridge]) * 3
    roof = [{"intensity": x, "rate": min(peak, bandwidth * x)} for x in (low, ridge, high)]
    floor = min([point["rate"] for point in points] + [bandwidth * low]) / 2
    x = {
        "field": "intensity",
        "type": "quantitative",
        "scale": {"type": "log", "domain": [low, high], "nice": False},
        "title": "FLOPs a byte (bytes as if nothing were fused)",
        "axis": {"tickCount": 6, "format": "~g"},
    }
    y = {
        "field": "rate",
        "type": "quantitative",
        "scale": {"type": "log", "domain": [floor, peak * 2], "nice": False},
        "title": "GFLOP/s",
        "axis": {"tickCount": 6, "format": "~g"},
    }
    names = [name for name in NAMES if NAMES[name] in {point["stage"] for point in points}]
    return {
        "width": _WIDTH,
        "height": 280,
        "layer": [
            {
                "data": {"values": roof},
                "mark": {"type": "line", "color": _INK, "strokeWidth": 2},
                "encoding": {"x": x, "y": y},
            },
            {
                "data": {"values": points},
                "mark": {"type": "point", "filled": True, "size": 120, "opacity": 1},
                "encoding": {"x": x, "y": y, "color": {**_stage_colour(names), "legend": None}},
            },
            {
                "data": {"values": points},
                "mark": {"type": "text", "dy": 16},
                "encoding": {"x": x, "y": y, "text": {"field": "stage"}},
            },
        ],
    }


def memory(facts: Facts) -> Spec | None:
    """Resident memory of a fresh process over time, its stages behind; None where not measured."""
    cold = facts["modes"][0]["cold"]
    if cold is None or not cold["memory"]:
        return None
    points = [{"seconds": seconds, "megabytes": size / 1e6} for seconds, size in cold["memory"]]
    top = max(point["megabytes"] for point in points) * 1.05
    bands = [
        {"stage": NAMES[span["name"]], "start": span["start"], "stop": span["stop"], "top": top, "base": 0}
        for span in cold["spans"]
    ]
    return {
        "width": _WIDTH,
        "height": 220,
        "layer": [
            {
                "data": {"values": bands},
                "mark": {"type": "rect", "opacity": 0.35},
                "encoding": {
                    "x": {"field": "start", "type": "quantitative", "title": "seconds since opening"},
                    "x2": {"field": "stop"},
                    "y": {"field": "base", "type": "quantitative", "title": "resident memory, MB"},
                    "y2": {"field": "top"},
                    "color": _stage_colour([span["name"] for span in cold["spans"]]),
                },
            },
            {
                "data": {"values": points},
                "mark": {"type": "line", "color": _INK, "strokeWidth": 2, "interpolate": "step-after"},
                "encoding": {
                    "x": {"field": "seconds", "type": "quantitative"},
                    "y": {"field": "megabytes", "type": "quantitative"},
                },
            },
        ],
    }


def _size_axis(points: Sequence[dict[str, Any]]) -> Spec:
    return {
        "field": "image",
        "type": "nominal",
        "sort": None,
        "title": "image, and its crops",
        "axis": {"labelAngle": 0, "labelExpr": "split(datum.label, '|')"},
    }


def _image(point: dict[str, Any]) -> str:
    return f"{point['size'][0]}x{point['size'][1]}|{point['crops']}"


def sweep_times(facts: Facts) -> Spec | None:
    """Time to the first token by image size; None where there was no sweep."""
    points, names = facts["sweep"], ["pixels", "vision", "prefill"]
    if not points:
        return None
    rows = [
        {"image": _image(point), "stage": NAMES[n], "order": i, "ms": point["seconds"][n] * 1e3}
        for point in points
        for i, n in enumerate(names)
    ]
    return {
        "width": _WIDTH,
        "height": 220,
        "data": {"values": rows},
        "mark": {"type": "bar", "width": {"band": 0.6}},
        "encoding": {
            "x": _size_axis(points),
            "y": {"field": "ms", "type": "quantitative", "title": "milliseconds to the first token"},
            "order": {"field": "order"},
            "color": _stage_colour(names),
        },
    }


def sweep_memory(facts: Facts) -> Spec | None:
    """Peak memory by image size; None where not measured."""
    rows = [{"image": _image(p), "mb": p["peak_bytes"] / 1e6} for p in facts["sweep"] if p["peak_bytes"]]
    if not rows:
        return None
    return {
        "width": _WIDTH,
        "height": 180,
        "data": {"values": rows},
        "mark": {"type": "bar", "color": _ACCENT, "width": {"band": 0.6}},
        "encoding": {
            "x": _size_axis(facts["sweep"]),
            "y": {"field": "mb", "type": "quantitative", "title": "peak resident memory, MB"},
        },
    }


def tokens(facts: Facts) -> Spec:
    """Visual tokens by the image's longest side, for several aspect ratios."""
    rows = [
        {"ratio": point["ratio"], "side": point["size"][0], "tokens": point["visual_tokens"]}
        for point in facts["token_points"]
    ]
    ratios = list(dict.fromkeys(row["ratio"] for row in rows))
    colours = {"domain": ratios, "range": [_ACCENT, _SECOND, _COLOURS["hiwin"]]}
    return {
        "width": _WIDTH,
        "height": 220,
        "data": {"values": rows},
        "mark": {"type": "line", "interpolate": "step-after", "strokeWidth": 2},
        "encoding": {
            "x": {"field": "side", "type": "quantitative", "title": "longest side, pixels"},
            "y": {"field": "tokens", "type": "quantitative", "title": "visual tokens"},
            "color": {"field": "ratio", "scale": colours, "legend": {"orient": "top", "title": None}},
        },
    }
