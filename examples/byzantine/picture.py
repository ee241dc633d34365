"""A heat map of the tables, where matplotlib is installed."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def draw(path: Path, tables: dict[str, NDArray[np.float64]], rows: list[str], columns: list[str]) -> str:
    """Write one panel a table as a PNG, and return what happened."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no heat map: matplotlib is not installed"
    figure = Figure(figsize=(5 + 4 * len(tables), 0.45 * len(rows) + 2), layout="constrained")
    for axes, (title, table) in zip(figure.subplots(1, len(tables), sharey=True), tables.items(), strict=True):
        image = axes.imshow(100 * table, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        axes.set_title(f"{title} data")
        axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
        axes.set_yticks(range(len(rows)), rows)
        for (line, column), value in np.ndenumerate(table):
            axes.text(column, line, f"{100 * value:.0f}", ha="center", va="center", fontsize=8)
    figure.colorbar(image, ax=figure.axes, label="test accuracy, %")
    figure.savefig(path, dpi=120)
    return f"heat map: {path}"
