"""Figures: what matplotlib has drawn, as one SVG with colours that a theme replaces.

The style file `figures.mplstyle`, which the engine hands to matplotlib, draws ink and grid in two
colours that nobody uses; `themed` puts the colours of a light or a dark page in their place.

A figure that an animation of matplotlib moves becomes one drawing of all its frames, which plays
once by its own style sheet, without a script. Its last frame is what stays, and all that is shown
in print, to readers who asked for less motion, and at the address that ends in `#still` (browsers
do not tell a drawing inside a page what its reader asked for).
"""

import io
import re
import sys
from pathlib import Path
from typing import Any

STYLE = Path(__file__).with_name("figures.mplstyle")

_INK, _GRID = "#010203", "#0a0b0c"
THEMES = {"light": {_INK: "#1f2328", _GRID: "#d0d7de"}, "dark": {_INK: "#d5d9e0", _GRID: "#454b57"}}

_LONG = re.compile(r"(\d+\.\d{2})\d+")
_DEFINITIONS = re.compile(r"<defs>.*?</defs>\n?", flags=re.DOTALL)
_PATH = re.compile(r' (?:d|x|y|points)="[^"]*"')


def take() -> list[str]:
    """Return every open matplotlib figure as SVG and close it."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None:
        return []
    drawn: list[str] = []
    for number in pyplot.get_fignums():
        figure = pyplot.figure(number)
        movie = _movie(figure)
        drawn.append(_drawing(figure, tight=True) if movie is None else _play(movie))
    pyplot.close("all")
    return drawn


def _drawing(figure: Any, *, tight: bool) -> str:
    text = io.StringIO()
    box = {"bbox_inches": "tight"} if tight else {}
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, **box)
    return _PATH.sub(lambda part: _LONG.sub(r"\1", part[0]), text.getvalue())


def _movie(figure: Any) -> Any:
    """Return the animation of a figure: what waits for its first drawing to begin."""
    module = sys.modules.get("matplotlib.animation")
    if module is None:
        return None
    for proxy in figure.canvas.callbacks.callbacks.get("draw_event", {}).values():
        owner = getattr(proxy(), "__self__", None)
        if isinstance(owner, module.Animation):
            return owner
    return None


def _play(movie: Any) -> str:
    """Return all frames of an animation as one drawing that plays once."""
    from matplotlib.animation import AbstractMovieWriter

    frames: list[str] = []

    class Writer(AbstractMovieWriter):
        def setup(self, fig: Any, outfile: Any, dpi: float | None = None) -> None:
            self.fig = fig

        def grab_frame(self, **_: Any) -> None:
            frames.append(_drawing(self.fig, tight=False))  # a tight box would jump

        def finish(self) -> None: ...

    movie.save("frames", writer=Writer(fps=1))
    return _film(frames, seconds=movie.event_source.interval / 1000)


def _film(frames: list[str], *, seconds: float) -> str:
    """Lay drawings of one size over each other, each seen for some seconds, the last for good."""
    head, _, _ = frames[0].partition("</defs>")
    style = (
        f"<style>.frame{{visibility:hidden;animation:seen {seconds:g}s step-end}}"
        "@keyframes seen{from{visibility:visible}to{visibility:hidden}}"
        f".frame:last-of-type{{visibility:visible;animation:wait {seconds * (len(frames) - 1):g}s "
        "step-end}@keyframes wait{from{visibility:hidden}to{visibility:visible}}"
        "@media print,(prefers-reduced-motion:reduce){.frame{animation:none!important}}"
        "#still:target~.frame{animation:none!important}</style><g id=\"still\"/>"
    )
    # Glyphs and clips are defined once, outside the frames: a clip that is hidden hides everything.
    shared: dict[str, None] = {}
    parts: list[str] = []
    for i, frame in enumerate(frames):
        body = frame.partition("</defs>")[2].rpartition("</svg>")[0]
        shared |= dict.fromkeys(_DEFINITIONS.findall(body))
        delay = f' style="animation-delay:{i * seconds:g}s"' if i < len(frames) - 1 else ""
        parts.append(f'<g class="frame"{delay}>{_DEFINITIONS.sub("", body)}</g>\n')
    return "".join([f"{head}</defs>\n{style}\n", *shared, *parts]) + "</svg>\n"


def count(svg: str) -> int:
    """Return the number of frames of a drawing; 1 for one that stands still."""
    return max(1, svg.count('<g class="frame"'))


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
