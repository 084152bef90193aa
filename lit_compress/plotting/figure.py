"""Make a matplotlib figure without a display, and save it as a PNG file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

__all__ = ["new_figure", "save_figure"]


def new_figure(width: float, height: float) -> Any:
    """An empty figure of a size in inches, at 120 dots per inch.

    It is drawn by Agg, not by pyplot, whose global state belongs to the user.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Plots need the package matplotlib, which is not installed. Install it with "
            "pip install 'lit-compress[report]'."
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | os.PathLike[str]) -> Path:
    """Write a figure, with no frame at the top and right of its panels; folders are made.

    Returns:
        The file.
    """
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
