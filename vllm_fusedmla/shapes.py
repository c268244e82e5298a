# SPDX-License-Identifier: Apache-2.0
"""A drawing as a list of shapes, written as SVG by hand or as PNG with matplotlib."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import NamedTuple

WIDTH, HEIGHT = 1140, 560
INK, FAINT, GRID, PAPER = "#1f2933", "#7b8794", "#e4e7eb", "#ffffff"


class Rect(NamedTuple):
    """A filled rectangle; pixels, y downwards, as in the two below."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    opacity: float = 1.0


class Line(NamedTuple):
    """A line one pixel wide."""

    x0: float
    y0: float
    x1: float
    y1: float
    colour: str
    dashed: bool = False


class Text(NamedTuple):
    """A text whose baseline is at y; anchor: start, middle or end."""

    x: float
    y: float
    text: str
    anchor: str = "start"
    size: int = 12
    colour: str = INK


Shape = Rect | Line | Text


def write_svg(shapes: list[Shape], path: Path) -> None:
    """Write the drawing as an SVG document."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAPER}"/>',
    ]
    for s in shapes:
        if isinstance(s, Rect):
            box = f'x="{s.x:.2f}" y="{s.y:.2f}" width="{s.width:.2f}" height="{s.height:.2f}"'
            parts.append(f'<rect {box} fill="{s.colour}" fill-opacity="{s.opacity}"/>')
        elif isinstance(s, Line):
            dash = ' stroke-dasharray="6 4"' if s.dashed else ""
            parts.append(f'<path d="M{s.x0:.2f} {s.y0:.2f}L{s.x1:.2f} {s.y1:.2f}" stroke="{s.colour}"{dash}/>')
        else:
            style = f'font-size="{s.size}" text-anchor="{s.anchor}" fill="{s.colour}"'
            parts.append(f'<text x="{s.x:.2f}" y="{s.y:.2f}" {style}>{escape(s.text)}</text>')
    path.write_text("\n".join([*parts, "</svg>", ""]))


def write_png(shapes: list[Shape], path: Path) -> None:
    """Write the drawing as a PNG; needs matplotlib (extra `bench`), ImportError without it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Rectangle
    except ImportError:
        raise ImportError('a PNG needs matplotlib: pip install ".[bench]", or write a .svg') from None

    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=200, facecolor=PAPER)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    axes.axis("off")
    for z, s in enumerate(shapes):
        if isinstance(s, Rect):
            box = Rectangle((s.x, s.y), s.width, s.height, color=s.colour, alpha=s.opacity, linewidth=0, zorder=z)
            axes.add_patch(box)
        elif isinstance(s, Line):
            style = (0, (6, 4)) if s.dashed else "-"
            axes.plot((s.x0, s.x1), (s.y0, s.y1), color=s.colour, linewidth=0.72, linestyle=style, zorder=z)
        else:
            align = {"start": "left", "middle": "center", "end": "right"}[s.anchor]
            axes.text(s.x, s.y, s.text, ha=align, va="baseline", fontsize=0.72 * s.size, color=s.colour, zorder=z)
    FigureCanvasAgg(figure).print_png(path)
