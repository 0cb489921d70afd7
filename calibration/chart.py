"""The quality report as a chart: the error of each linear, by layer and module."""

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from uhd_export.calibration.layers import MODULES
from uhd_export.calibration.quality import LinearQuality, Report
from uhd_export.runtime.files import replacing

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont
_PAPER, _INK, _FAINT = (255, 255, 255), (40, 40, 48), (222, 224, 230)
_RTN, _GPTQ = (214, 116, 66), (46, 108, 190)
_PANEL, _GAP, _LEFT, _TOP, _BOTTOM = (300, 190), 26, 62, 74, 44
_COLUMNS = 4


def draw_report(report: Report, path: Path) -> None:
    """Write a PNG with a panel a module: layer across, relative output error up, one curve a method."""
    rows = -(-len(MODULES) // _COLUMNS)
    cell_w, cell_h = _PANEL[0] + _GAP, _PANEL[1] + _GAP + 18
    image = Image.new("RGB", (_LEFT + _COLUMNS * cell_w, _TOP + rows * cell_h + _BOTTOM), _PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    saved = 1 - report.mean_gptq_error / report.mean_rtn_error if report.mean_rtn_error else 0.0
    draw.text(
        (_LEFT, 14),
        "Relative output error of each linear layer, held-out sequences",
        _INK,
        ImageFont.load_default(19),
    )
    _legend(draw, (_LEFT, 44), f"round to nearest, mean {report.mean_rtn_error:.2e}", _RTN, font)
    _legend(
        draw, (_LEFT + 330, 44), f"GPTQ, mean {report.mean_gptq_error:.2e} ({saved:.0%} less)", _GPTQ, font
    )
    errors = [e for linear in report.linears for e in (linear.rtn_error, linear.gptq_error) if e > 0]
    # Whole decades, so that panels share one scale that is easy to read.
    low, high = (
        (math.floor(math.log10(min(errors))), math.ceil(math.log10(max(errors)))) if errors else (-3, 0)
    )
    high = max(high, low + 1)
    for i, module in enumerate(MODULES):
        corner = _LEFT + i % _COLUMNS * cell_w, _TOP + i // _COLUMNS * cell_h + 18
        linears = [linear for linear in report.linears if linear.module == module]
        _panel(draw, corner, module, linears, (low, high), font)
    draw.text((_LEFT, image.height - 30), "across: layer; up: |x(W-Wq)|^2 / |xW|^2", _INK, font)
    with replacing(path) as partial:
        image.save(partial, "PNG", optimize=True)


def _legend(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, colour: tuple, font: Font) -> None:
    draw.line([(at[0], at[1] + 9), (at[0] + 24, at[1] + 9)], colour, 3)
    draw.text((at[0] + 32, at[1]), text, _INK, font)


def _panel(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    module: str,
    linears: list[LinearQuality],
    decades: tuple[int, int],
    font: Font,
) -> None:
    (x0, y0), (w, h), (low, high) = corner, _PANEL, decades
    last = max((linear.layer for linear in linears), default=0)

    def place(layer: int, error: float) -> tuple[float, float]:
        share = (math.log10(max(error, 10.0**low)) - low) / (high - low)
        return x0 + w * ((layer + 0.5) / (last + 1)), y0 + h * (1 - share)

    for decade in range(low, high + 1):
        y = y0 + h * (high - decade) / (high - low)
        draw.line([(x0, y), (x0 + w, y)], _FAINT)
        if x0 == _LEFT:
            draw.text((x0 - 8, y), f"1e{decade}", _INK, font, anchor="rm")
    draw.rectangle([x0, y0, x0 + w, y0 + h], outline=_FAINT)
    draw.text((x0 + w / 2, y0 - 4), module, _INK, font, anchor="mb")
    for layer in sorted({0, last // 2, last}):
        draw.text((place(layer, 1)[0], y0 + h + 3), str(layer), _INK, font, anchor="mt")
    for field, colour in (("rtn_error", _RTN), ("gptq_error", _GPTQ)):
        points = [place(linear.layer, getattr(linear, field)) for linear in linears]
        if len(points) > 1:
            draw.line(points, colour, 2)
        for x, y in points:
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
