"""How plots look, in PNG and on the page: the one palette, markers and the titles of axes and modes."""

from __future__ import annotations

import io
from collections.abc import Iterable

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by colour-blind readers, with grey for its yellow, which is faint on
# white; markers repeat the distinction.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#8C8C8C")
WHITE_ON = ("#0072B2", "#000000", "#009E73", "#D55E00", "#8C8C8C")  # colours too dark for black text
# Matplotlib's markers, and the names that Vega has for their shapes.
SHAPES = {
    "o": "circle",
    "s": "square",
    "D": "diamond",
    "^": "triangle-up",
    "v": "triangle-down",
    "P": "cross",
    "X": "triangle-left",
    "*": "triangle-right",
}
AXES = {"T": "tokens T", "E": "experts E", "K": "experts per token K"}
MODE_TITLES = {"forward": "forward", "forward_backward": "forward + backward"}
GRID = {"color": "0.9"}
LIMIT = {"color": "0.4", "linestyle": "--", "linewidth": 1}


def styles_of(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Give each implementation a colour and a marker; 64 pairs before one comes again."""
    rounds, markers = len(COLOURS), tuple(SHAPES)
    return {
        name: (COLOURS[i % rounds], markers[(i + i // rounds) % len(markers)])
        for i, name in enumerate(sorted(names))
    }


def png(figure: Figure) -> bytes:
    """Turn a figure into a PNG and close it; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()
