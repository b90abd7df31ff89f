# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of the results of `remamba_hf.evaluation.memory`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .memory_tasks import perplexity_ratio
from .reporting import (
    accuracy_by_depth,
    depth_rows,
    draw_depths,
    draw_perplexity,
    draw_shares,
    new_axes,
    percent_with_interval,
    save_figure,
    set_length_ticks,
    short_length,
    table_head,
    table_row,
)

# What a cell of each part is about, and the setting that lists these.
COLUMNS = {
    "passkey": ("length", "lengths"),
    "documents": ("noise", "document_counts"),
    "perplexity": ("length", "perplexity_lengths"),
    "decode": ("length", "decode_lengths"),
}


def markdown_tables(results: dict[str, Any]) -> str:
    """Every part that has results as Markdown tables, with 95 % intervals."""
    tables = {"passkey": _passkey, "documents": _documents, "perplexity": _perplexity, "decode": _decode}
    return "\n".join(table(results) for part, table in tables.items() if results[part])


def draw_plots(results: dict[str, Any], folder: Path) -> None:
    """Draws what there are results of: exact match by length, by depth and by documents, and perplexity by length.

    Args:
        folder: receives `memory_passkey.png`, `memory_depths_MODEL.png`, `memory_documents.png`, `memory_perplexity.png`.
    """
    for part, label in (("passkey", "text, tokens"), ("documents", "documents without the fact")):
        if results[part]:
            _plot_recall(results, part, label, folder / f"memory_{part}.png")
    for name, cells in _by_model(results, "passkey"):
        _plot_depths(results, name, cells, folder / f"memory_depths_{name}.png")
    if results["perplexity"]:
        _plot_perplexity(results, folder / "memory_perplexity.png")


def _columns(results: dict[str, Any], part: str) -> list[int]:
    return results["settings"][COLUMNS[part][1]]


def _labels(results: dict[str, Any], part: str) -> list[str]:
    columns = _columns(results, part)
    return [str(column) for column in columns] if part == "documents" else [short_length(column) for column in columns]


def _by_model(results: dict[str, Any], part: str) -> Iterator[tuple[str, dict[int, dict[str, Any]]]]:
    """The models that have cells of a part, with these by column."""
    for name in results["description"]["models"]:
        cells = {cell[COLUMNS[part][0]]: cell for cell in results[part] if cell["model"] == name}
        if cells:
            yield name, cells


def _label(results: dict[str, Any], name: str) -> str:
    return results["description"]["models"][name]["label"]


def _recall_rows(results: dict[str, Any], part: str) -> str:
    text = ""
    people = results["settings"]["distractors"] or (part == "passkey" and results["settings"]["keys"] > 1)
    for name, cells in _by_model(results, part):
        found = [cells.get(column) for column in _columns(results, part)]
        shown = [percent_with_interval(cell["right"], cell["samples"]) if cell else "" for cell in found]
        text += table_row(_label(results, name), shown)
        if people:
            shown = [percent_with_interval(cell["other"], cell["samples"]) if cell else "" for cell in found]
            text += table_row(f"{_label(results, name)}, somebody else's number", shown)
    return text


def _passkey(results: dict[str, Any]) -> str:
    labels = _labels(results, "passkey")
    text = table_head("exact match, %, by tokens", labels) + _recall_rows(results, "passkey")
    times = {cell["length"]: cell["books_repeated"] for cell in results["passkey"] if "books_repeated" in cell}
    if times:
        told = ", ".join(f"{short_length(length)} {often} times" for length, often in times.items())
        text += f"\nTexts longer than all books repeat these: {told}.\n"
    for name, cells in _by_model(results, "passkey"):
        text += "\n" + table_head(f"{_label(results, name)}, depth", labels)
        text += depth_rows(_depths(results, cells))
    return text


def _depths(results: dict[str, Any], cells: dict[int, dict[str, Any]]) -> np.ndarray:
    return accuracy_by_depth({length: cell["records"] for length, cell in cells.items()}, _columns(results, "passkey"))


def _documents(results: dict[str, Any]) -> str:
    head = table_head("exact match, %, by documents without the fact", _labels(results, "documents"))
    return head + _recall_rows(results, "documents")


def _perplexity(results: dict[str, Any]) -> str:
    columns, reference = _columns(results, "perplexity"), results["settings"]["reference_length"]
    stride = results["settings"].get("stride")
    what = f"perplexity of all tokens, stride {stride}" if stride else "perplexity"
    text = table_head(f"{what}, by tokens of context", _labels(results, "perplexity"))
    for name, cells in _by_model(results, "perplexity"):
        found = [cells.get(column) for column in columns]
        text += table_row(_label(results, name), ["" if cell is None else _number(cell["perplexity"]) for cell in found])
        if reference in cells:
            shown = ["" if cell is None else _ratio(cell, cells[reference]) for cell in found]
            text += table_row(f"{_label(results, name)}, ratio to {short_length(reference)}", shown)
    return text


def _number(perplexity: float | None) -> str:
    return "INF" if perplexity is None or perplexity > 1e6 else f"{perplexity:.2f}"


def _ratio(cell: dict[str, Any], reference: dict[str, Any]) -> str:
    ratio = perplexity_ratio(cell, reference)
    if ratio is None:
        return "INF"
    value, interval = ratio
    return f"{value:.3f}" if interval is None or cell is reference else f"{value:.3f} ({interval[0]:.3f}-{interval[1]:.3f})"


def _decode(results: dict[str, Any]) -> str:
    text = table_head("decoding, after tokens", _labels(results, "decode"))
    rows = (
        ("state, KiB", lambda cell: f"{cell['state_bytes'] / 1024:.1f}"),
        ("ms a token", lambda cell: f"{1000 * cell['seconds_per_token']:.2f}"),
    )
    for name, cells in _by_model(results, "decode"):
        for what, show in rows:
            shown = [show(cells[column]) if column in cells else "" for column in _columns(results, "decode")]
            text += table_row(f"{_label(results, name)}, {what}", shown)
    return text


def _plot_recall(results: dict[str, Any], part: str, xlabel: str, path: Path) -> None:
    figure, axes = new_axes()
    for name, cells in _by_model(results, part):
        draw_shares(axes, _label(results, name), cells)
    axes.set(xlabel=xlabel)
    set_length_ticks(axes, _columns(results, part), _labels(results, part))
    axes.legend()
    save_figure(figure, path)


def _plot_depths(results: dict[str, Any], name: str, cells: dict[int, dict[str, Any]], path: Path) -> None:
    figure, axes = new_axes()
    image = draw_depths(axes, _depths(results, cells), _labels(results, "passkey"))
    axes.set(xlabel="text, tokens", title=_label(results, name))
    figure.colorbar(image, label="exact match")
    save_figure(figure, path)


def _plot_perplexity(results: dict[str, Any], path: Path) -> None:
    figure, axes = new_axes()
    for name, cells in _by_model(results, "perplexity"):
        draw_perplexity(axes, _label(results, name), {length: cell["perplexity"] for length, cell in cells.items()})
    axes.set(xlabel="context, tokens")
    set_length_ticks(axes, _columns(results, "perplexity"))
    axes.legend()
    save_figure(figure, path)
