"""How the report's figures look: colours that colour-blind eyes tell apart, and files that are the same every time.

A figure is drawn once. On the page it is inline SVG whose colours are the page's own variables, so that it follows a
dark or a light theme; beside the page it lies as PNG and SVG on white.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from rlplastic.run_directory import write_atomically

ARMS = {
    "#0072b2": "#56aee2",
    "#d55e00": "#f0812f",
    "#009e73": "#2fc79c",
    "#cc79a7": "#e08fbd",
    "#e69f00": "#f0b432",
    "#882255": "#d06a9c",
    "#8c6d31": "#c9a860",
    "#44aa99": "#6fd0c0",
}
"""Colours of arms, on light and on dark ground: Okabe and Ito's that can be seen on white, and some of Tol's."""
INK, FAINT, PAPER = "#1b1f24", "#d4d8dd", "#fdfdfe"
THEME = {INK: "#e4e7eb", FAINT: "#3a4048", PAPER: "#16191d"}
"""Text, grid and ground: light, and dark."""
SECTIONS = {
    "#0b4f7d": "#2f83bd",
    "#2f83bd": "#56aee2",
    "#86bfe6": "#9bd0f3",
    "#c5e0f3": "#cfe8f9",
    "#5f676f": "#7b858f",
    "#969ea6": "#a6aeb6",
    "#c6ccd2": "#c6ccd2",
}
"""More colours, of what time is spent on: learning in blues, keeping house in greys."""
DASHES = ("-", "--", ":", "-.")
"""Line styles, one per round through `ARMS`."""

PARAMETERS: dict[Any, Any] = {
    "font.size": 9.0,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.titlesize": "medium",
    "axes.titleweight": "bold",
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.limits": (-4, 5),
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.09,
    "figure.constrained_layout.h_pad": 0.07,
}


@contextmanager
def drawing(name: str) -> Iterator[None]:
    """Within the block figures look like the report's; ``name`` keeps apart the names inside of several SVG files."""
    with matplotlib.rc_context(PARAMETERS | {"svg.hashsalt": name}):
        yield


def colour(index: int) -> dict[str, Any]:
    """Colour and line style of the arm that comes ``index``-th, as arguments of a plot."""
    colours = list(ARMS)
    return {"color": colours[index % len(colours)], "linestyle": DASHES[index // len(colours) % len(DASHES)]}


def on(shade: str) -> str:
    """White or black, whichever can be read on a colour."""
    red, green, blue = (int(shade[i : i + 2], 16) for i in (1, 3, 5))
    return "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 140 else "#101214"


def engineering(axes: Axes) -> None:
    """Label the horizontal axis 5k and 2M."""
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def save(figure: Figure, folder: Path, name: str) -> str:
    """Write ``name.png`` and ``name.svg``; returns the SVG for the page.

    Raises:
        OSError: a file cannot be written.
    """
    figure.draw_without_rendering()  # lays it out, which takes longest, once and not for every file
    figure.set_layout_engine("none")
    picture, drawing = io.BytesIO(), io.StringIO()
    figure.savefig(picture, format="png", dpi=144, facecolor="white", metadata={"Software": None})
    figure.savefig(drawing, format="svg", metadata={"Date": None, "Creator": None})
    write_atomically(folder / f"{name}.png", picture.getvalue())
    svg = drawing.getvalue()
    write_atomically(folder / f"{name}.svg", svg.replace("<svg ", '<svg style="background: white" ', 1))
    return themed(svg)


def themed(svg: str) -> str:
    """An SVG document as an element of the page: its colours are the page's, its width is free."""
    element = svg[svg.index("<svg ") :]
    element = re.sub(r'^(<svg [^>]*?)\bwidth="[\d.]+pt" height="[\d.]+pt"', r"\1", element, count=1)
    element = re.sub(r"font: ([\d.]+px|(?:\w+ )+[\d.]+px) [^;\"]*", r"font: \1 var(--font)", element)
    for light in {**ARMS, **SECTIONS, **THEME}:
        element = element.replace(light, f"var({variable(light)})")
    return element


def variable(light: str) -> str:
    """The page's variable for a colour."""
    return f"--c-{light[1:]}"


def variables(dark: bool) -> Mapping[str, str]:
    """Every variable of the page's colours, in one of its themes."""
    return {variable(light): on_dark if dark else light for light, on_dark in {**ARMS, **SECTIONS, **THEME}.items()}
