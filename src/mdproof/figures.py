"""Figures: what matplotlib has drawn, as one SVG with colours that a theme replaces.

The style file `figures.mplstyle`, which the engine hands to matplotlib, draws ink and grid in two
colours that nobody uses; `themed` puts the colours of a light or a dark page in their place.
"""

import io
import re
import sys
from pathlib import Path

STYLE = Path(__file__).with_name("figures.mplstyle")

_INK, _GRID = "#010203", "#0a0b0c"
THEMES = {"light": {_INK: "#1f2328", _GRID: "#d0d7de"}, "dark": {_INK: "#d5d9e0", _GRID: "#454b57"}}

_LONG = re.compile(r"(\d+\.\d{2})\d+")
_PATH = re.compile(r' (?:d|x|y|points)="[^"]*"')


def take() -> list[str]:
    """Return every open matplotlib figure as SVG and close it."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None:
        return []
    drawn: list[str] = []
    for number in pyplot.get_fignums():
        text = io.StringIO()
        pyplot.figure(number).savefig(
            text, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None}
        )
        drawn.append(_PATH.sub(lambda part: _LONG.sub(r"\1", part[0]), text.getvalue()))
    pyplot.close("all")
    return drawn


def themed(svg: str, theme: str) -> str:
    """Return a drawing in the colours of a theme, "light" or "dark"."""
    for placeholder, colour in THEMES[theme].items():
        svg = svg.replace(placeholder, colour)
    return svg


def size(svg: str) -> tuple[int, int]:
    """Return width and height in CSS pixels."""
    head = svg[: svg.index(">", svg.index("<svg"))]
    points = dict(re.findall(r' (width|height)="([\d.]+)pt"', head))
    return round(float(points["width"]) * 4 / 3), round(float(points["height"]) * 4 / 3)
