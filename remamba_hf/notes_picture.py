# SPDX-License-Identifier: Apache-2.0
"""A picture of the notes that a model has taken of a prompt, and of which it read."""

from collections.abc import Sequence
from pathlib import Path

from .reading import LayerNotes, Reading, check_picture, draw_passages, save_picture

_ROWS = 6  # more would not fit on a page
_MARGIN = 0.03  # of write scores: those of the notes that stay are often nearly equal


def plot_notes(reading: Reading, path: str | Path, passages: int = 8) -> None:
    """A picture of the notes that the prompt's last token could read, one row for every few layers, and the most read places
    as text. A note stands at its position and write score; it is the larger and darker the more attention it got.

    Args:
        reading: of a model that takes notes.
        path: the file to write; its suffix is the format (png, pdf, svg).
        passages: how many are shown as text.

    Raises:
        ValueError: there are no notes, or what `check_picture` refuses.
        OSError: the file cannot be written.
    """
    if not any(layer.positions for layer in reading.notes):
        raise ValueError(
            "The pools were empty in this reading, so there is nothing to draw: a note can be read from the end of its "
            "chunk on (config.chunk_size tokens). Give a longer document."
        )
    path = Path(path)
    check_picture(path)
    from matplotlib.figure import Figure

    shown = reading.passages[:passages]
    groups = layer_groups(len(reading.notes))
    text_height, row_height = 0.22 * len(shown) + 0.1, 1.4
    figure = Figure(figsize=(10, 1 + row_height * len(groups) + text_height), layout="constrained")
    *rows, texts = figure.subplots(len(groups) + 1, 1, height_ratios=[row_height] * len(groups) + [text_height])
    for axes, group in zip(rows, groups, strict=True):
        positions, scores, reads = _notes_of([reading.notes[layer] for layer in group])
        points = axes.scatter(
            positions, scores, [5 + 120 * read for read in reads], reads, cmap="viridis_r", vmin=0, vmax=1, clip_on=False
        )
        layers = f"layer {group[0]}" if len(group) == 1 else f"layers {group[0]} to {group[-1]}"
        share = f"{sum(reads) / len(group):.2f} of the attention went to them"
        axes.set_title(f"{layers}: notes about {len(set(positions)):,} tokens, {share}", loc="left", fontsize=9)
        axes.set(xlim=(0, reading.prompt_tokens), ylabel="write score")
        axes.set_ylim(min(scores, default=0.0) - _MARGIN, max(scores, default=1.0) + _MARGIN)
        axes.tick_params(labelbottom=axes is rows[-1])
    rows[-1].set_xlabel("position in the prompt (tokens)")
    figure.colorbar(points, ax=rows, label="share of a layer's attention", pad=0.01)
    draw_passages(texts, "position, largest share of a layer's attention, [note]", shown)
    save_picture(figure, path)


def layer_groups(layers: int) -> list[range]:
    """At most six runs of layers, of one length but for the last."""
    size = -(-layers // _ROWS)
    return [range(first, min(first + size, layers)) for first in range(0, layers, size)]


def _notes_of(layers: Sequence[LayerNotes]) -> tuple[list[int], list[float], list[float]]:
    """Positions, write scores and shares of attention of all their notes, the most read last, which is drawn on top."""
    notes = [note for layer in layers for note in zip(layer.positions, layer.scores, layer.reads, strict=True)]
    notes.sort(key=lambda note: note[2])
    return [note[0] for note in notes], [note[1] for note in notes], [note[2] for note in notes]
