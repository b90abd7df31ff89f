# SPDX-License-Identifier: Apache-2.0
"""What evaluations write: result files that a run goes on from, intervals, Markdown tables and plots."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DEPTHS = 10  # parts of a text that depths are counted in


def start_or_continue(output: Path, header: Mapping[str, Any], rest: Mapping[str, Any]) -> dict[str, Any]:
    """The results in `output` to go on from, or new ones: `header`, and then `rest`.

    Raises:
        ValueError: the file holds results under another header.
    """
    if not output.exists():
        return {**header, **rest}
    results = json.loads(output.read_text())
    if any(results.get(name) != json.loads(json.dumps(value)) for name, value in header.items()):
        raise ValueError(f"{output} holds results of other settings: name another output, or remove it")
    return results


def wilson_interval(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share (95 % with the default z); (0, 1) for no samples."""
    if total == 0:
        return 0.0, 1.0
    share, weight = right / total, z * z / total
    middle = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / total + weight / total / 4) / (1 + weight)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def short_length(length: int) -> str:
    """2048 -> 2k; lengths that are no multiples of 1,024 as they are."""
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def percent(share: float | None) -> str:
    """A share in whole percent; nothing for none."""
    return "" if share is None or math.isnan(share) else f"{100 * share:.0f}"


def percent_with_interval(right: int, total: int) -> str:
    """A share in whole percent with its 95 % interval; nothing for no samples."""
    if not total:
        return ""
    low, high = wilson_interval(right, total)
    return f"{percent(right / total)} ({percent(low)}-{percent(high)})"


def table_head(first: str, columns: Sequence[str]) -> str:
    """The first two lines of a Markdown table."""
    return table_row(first, columns) + "|---|" + "---|" * len(columns) + "\n"


def table_row(first: str, values: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {first} | " + " | ".join(values) + " |\n"


def accuracy_by_depth(cells: Mapping[int, Sequence[Mapping[str, Any]]], columns: Sequence[int]) -> np.ndarray:
    """Accuracy `[DEPTHS, columns]` by tenth of the text; nan where there is no record.

    Args:
        cells: records with `depth` and `right`, by column.
        columns: which, in this order.
    """
    right, count = np.zeros((DEPTHS, len(columns))), np.zeros((DEPTHS, len(columns)))
    for number, column in enumerate(columns):
        for record in cells.get(column, ()):
            place = min(int(record["depth"] * DEPTHS), DEPTHS - 1), number
            count[place] += 1
            right[place] += record["right"]
    return np.where(count > 0, right / np.maximum(count, 1), np.nan)


def depth_label(part: int) -> str:
    """0 -> 0-10 %."""
    return f"{part * 100 // DEPTHS}-{(part + 1) * 100 // DEPTHS} %"


def depth_rows(accuracy: np.ndarray) -> str:
    """The rows of a Markdown table of `accuracy_by_depth`."""
    return "".join(table_row(depth_label(part), [percent(value) for value in row]) for part, row in enumerate(accuracy))


def new_axes() -> tuple[Any, Any]:
    """A figure and its axes, without a display."""
    # Imported here: only plots need matplotlib (`pip install remamba_hf[eval]`).
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def set_length_ticks(axes: Any, lengths: Sequence[int], labels: Sequence[str] | None = None) -> None:
    """A logarithmic axis of lengths, each of which is labelled."""
    axes.set(xscale="log")
    axes.set_xticks(lengths, labels or [short_length(length) for length in lengths])
    axes.tick_params(axis="x", which="major", labelsize="small")
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes.grid(alpha=0.3)


def draw_depths(axes: Any, accuracy: np.ndarray, columns: Sequence[str]) -> Any:
    """Accuracy `[DEPTHS, columns]` as a map of colours; returns the image."""
    image = axes.imshow(accuracy, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(DEPTHS), [depth_label(part) for part in range(DEPTHS)])
    axes.set(ylabel="depth of the fact")
    return image


def save_figure(figure: Any, path: str | Path) -> None:
    """Writes the figure under a temporary name and renames it."""
    path = Path(path)
    temporary = path.with_name(f"unfinished-{path.name}")
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)
