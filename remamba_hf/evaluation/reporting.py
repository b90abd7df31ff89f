# SPDX-License-Identifier: Apache-2.0
"""What evaluations write: result files that a run goes on from, intervals, Markdown tables and plots."""

import errno
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from remamba_hf.training.book_tokens import write_json

DEPTHS = 10  # parts of a text that depths are counted in
_SHOWN_DIFFERENCES, _SHOWN_CHARACTERS = 4, 40


def check_writable(*files: Path) -> None:
    """Makes the folders of files that are to be written at the end of long work; raises a ValueError for a file that cannot
    be written there."""
    for file in files:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            with tempfile.TemporaryFile(dir=file.parent):
                pass
        except OSError as error:
            is_file = isinstance(error, (FileExistsError, NotADirectoryError))
            reason = f"{file.parent} is no folder" if is_file else error.strerror
            raise ValueError(f"{file} cannot be written ({reason}): name another file") from error


def read_existing(output: Path) -> Any:
    """The JSON value in the file of results that a run may go on from; None: there is no file.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    try:
        return json.loads(output.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{output} cannot be read ({error.strerror}): name another --output") from error
    except ValueError as error:
        raise ValueError(f"{output} holds no results ({error}): name another --output, or remove it") from error


def check_same_settings(path: Path, found: Any, wanted: Mapping[str, Any]) -> None:
    """Raises a ValueError that names what differs."""
    differences = list(_differences(found if isinstance(found, dict) else {}, json.loads(json.dumps(wanted))))
    if not differences:
        return
    shown = "; ".join(differences[:_SHOWN_DIFFERENCES])
    more = len(differences) - _SHOWN_DIFFERENCES
    others = f"; and {more} more" if more > 0 else ""
    raise ValueError(f"{path} holds results of other settings ({shown}{others}): name another --output, or remove it")


def _differences(found: Any, wanted: Any, name: str = "") -> Iterator[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in {**wanted, **found}:
            yield from _differences(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    elif found != wanted:
        yield f"{name}: {_short(found)} there, {_short(wanted)} now"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."


def start_or_continue(output: Path, header: Mapping[str, Any], rest: Mapping[str, Any]) -> dict[str, Any]:
    """The results in `output` to go on from, or new ones: `header`, and then `rest`.

    Raises:
        ValueError: the file holds no results, or such under another header.
    """
    results = read_existing(output)
    if results is None:
        return {**header, **rest}
    found = results if isinstance(results, dict) else {}
    check_same_settings(output, {name: found.get(name) for name in header}, header)
    return {**rest, **found}


def write_results(output: Path, results: dict[str, Any]) -> None:
    """Writes results with the time of the last of them as `date`, so that a reader never sees half a file."""
    results["date"] = utc_now()
    write_json(output, results)


def write_table(path: Path, text: str) -> None:
    """Writes a text under a temporary name and renames it."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def utc_now() -> str:
    """The time in ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


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
    figure, axes = new_panels(1)
    return figure, axes[0]


def new_panels(count: int, columns: int = 3) -> tuple[Any, list[Any]]:
    """A figure of several panels, row by row, and their axes."""
    # Imported here: only plots need matplotlib (`pip install remamba_hf[eval]`).
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = math.ceil(count / columns)
    size = (7, 4) if count == 1 else (5 * columns, 3.8 * rows)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for empty in axes[count:]:
        empty.axis("off")
    return figure, axes[:count]


def draw_shares(axes: Any, label: str, cells: Mapping[int, Mapping[str, Any]]) -> None:
    """A line of `accuracy` by column, with its `interval`."""
    columns = sorted(cells)
    axes.plot(columns, [cells[column]["accuracy"] for column in columns], marker="o", label=label)
    low, high = zip(*(cells[column]["interval"] for column in columns), strict=True)
    axes.fill_between(columns, low, high, alpha=0.15)
    axes.set(ylim=(-0.02, 1.02), ylabel="exact match")


def draw_perplexity(axes: Any, label: str, values: Mapping[int, float | None]) -> None:
    """A line of perplexity by length; None stands for what is not finite, and is left out."""
    points = [(length, value) for length, value in sorted(values.items()) if value is not None]
    if points:
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(ylabel="perplexity")
    set_log_scale(axes)


def set_log_scale(axes: Any) -> None:
    """A logarithmic axis of values with their plain numbers: the default writes 6.1 x 10^1 where values are close."""
    from matplotlib.ticker import LogFormatter  # only plots need matplotlib

    class Plain(LogFormatter):  # which chooses the ticks that are labelled, but writes 6e-02
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    axes.set(yscale="log")
    axes.yaxis.set_major_formatter(Plain())
    axes.yaxis.set_minor_formatter(Plain())


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
