# SPDX-License-Identifier: Apache-2.0
"""One picture and one table of the results of several models.

    remamba eval compare A.json B.json --output compared.png

The files are results of `remamba eval` of one task: score by words (longbench_e), accuracy by task (leval), exact match by
length and depth (passkey, recall) or by documents (documents), perplexity by length (perplexity), ETMF and ECLMF by length
(fidelity), speed and memory by length (speed). Files of several tasks, such as those that python -m
remamba_hf.evaluation.memory writes, need --task. Settings in which the files differ are told below the table: numbers of
different questions are no comparison.
"""

import argparse
import json
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import fidelity, speed
from .reporting import (
    accuracy_by_depth,
    check_writable,
    draw_depths,
    draw_perplexity,
    draw_shares,
    new_panels,
    percent_with_interval,
    save_figure,
    set_length_ticks,
    short_length,
    table_head,
    table_row,
    write_table,
)

AVERAGE = "average"
_MOST_MAPS = 12  # maps of depths in a picture


@dataclass(frozen=True)
class Line:
    """What one file says of one model.

    Attributes:
        label: of the model and how it reads.
        cells: by length, number of documents, or name of a column; the entries of the file, or its numbers.
    """

    label: str
    cells: dict[Any, Any]


@dataclass(frozen=True)
class View:
    """How results of a task are read, compared and shown.

    Attributes:
        read: the lines of a file.
        columns: what the cells are about, for people.
        show: a cell, in a table.
        draw: all lines, into a file.
        settings: names of those that numbers depend on.
    """

    read: Callable[[dict[str, Any]], list[Line]]
    columns: str
    show: Callable[[Any], str]
    draw: Callable[["View", Sequence[Line], Path], None]
    settings: tuple[str, ...] = field(default=())


def tasks_of(results: Any) -> list[str]:
    """The tasks that a file has results of; none for a file of another kind."""
    if not isinstance(results, dict) or not isinstance(results.get("settings"), dict):
        return []
    if "summary" in results:
        return [task for task in ("longbench_e", "leval") if task == results["settings"].get("task")]
    if "cells" in results:
        return ["recall"] if results["cells"] else []
    if "models" in results:
        return ["fidelity"] if results["models"] else []
    return [task for task in ("passkey", "documents", "perplexity", "speed") if results.get(task)]


def read_file(path: Path) -> dict[str, Any]:
    """Results of a file.

    Raises:
        ValueError: it is missing, damaged, or holds nothing that can be compared.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): give files that `remamba eval` wrote") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): give files that `remamba eval` wrote") from error
    if not tasks_of(results):
        raise ValueError(
            f"{path} holds no results of {', '.join(VIEWS)}: give files that `remamba eval` wrote of one of these"
        )
    return dict(results)


def common_task(files: Mapping[Path, dict[str, Any]], wanted: str | None) -> str:
    """The task that all files have results of.

    Raises:
        ValueError: there is none, or there are several and none was named.
    """
    found = {path: tasks_of(results) for path, results in files.items()}
    for path, tasks in found.items():
        if wanted is not None and wanted not in tasks:
            raise ValueError(f"{path} has results of {', '.join(tasks)}, none of {wanted}: leave it out")
    shared = [task for task in VIEWS if all(task in tasks for tasks in found.values())]
    if wanted is not None:
        return wanted
    if len(shared) == 1:
        return shared[0]
    told = "; ".join(f"{path}: {', '.join(tasks)}" for path, tasks in found.items())
    if shared:
        raise ValueError(f"the files have results of several tasks ({', '.join(shared)}): choose one with --task")
    raise ValueError(f"the files are of different tasks ({told}): give files of one task")


def lines_of(task: str, files: Mapping[Path, dict[str, Any]]) -> list[Line]:
    """The lines of all files; those of one name get the name of their file.

    Raises:
        ValueError: a file that is not as `remamba eval` writes it.
    """
    found: list[tuple[Path, Line]] = []
    for path, results in files.items():
        try:
            lines = [line for line in VIEWS[task].read(results) if line.cells]
            for line in lines:
                for cell in line.cells.values():
                    VIEWS[task].show(cell)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not as `remamba eval {task}` writes it ({error!r}): evaluate again") from error
        if not lines:
            raise ValueError(f"{path} has no number of {task} yet: let the evaluation come to its end")
        found += [(path, line) for line in lines]
    labels = [line.label for _, line in found]
    names = _short_names(files)
    return [
        Line(f"{line.label} ({names[path]})", line.cells) if labels.count(line.label) > 1 else line for path, line in found
    ]


def _short_names(files: Iterable[Path]) -> dict[Path, str]:
    """Each file's name without its ending, after as many of its folders as tell it from the others."""
    parts = {path: path.absolute().with_suffix("").parts for path in files}
    names, count = {path: "" for path in parts}, 0
    while len(set(names.values())) < len(names) or not count:
        count += 1
        names = {path: "/".join(all_parts[-count:]) for path, all_parts in parts.items()}
    return names


def differing_settings(task: str, files: Mapping[Path, dict[str, Any]]) -> list[str]:
    """Names of settings, of those that numbers depend on, that are not the same in all files."""
    names = VIEWS[task].settings
    values = {
        name: {json.dumps(results["settings"].get(name), sort_keys=True) for results in files.values()} for name in names
    }
    descriptions = [results.get("description") or {} for results in files.values()]
    values["books"] = {json.dumps([one.get("books"), one.get("dataset")], sort_keys=True) for one in descriptions}
    if task == "speed":
        values["device"] = {str(results["environment"].get("device")) for results in files.values()}
    return [name for name, different in values.items() if len(different) > 1]


def markdown(task: str, lines: Sequence[Line], differing: Sequence[str]) -> str:
    """A table of one row a line, and what makes them hard to compare."""
    if task == "speed":
        text = speed.markdown_tables({line.label: line.cells for line in lines})
    else:
        view, columns = VIEWS[task], _columns(lines)
        text = table_head(view.columns, [_column_label(task, column) for column in columns])
        for line in lines:
            text += table_row(line.label, [view.show(line.cells[one]) if one in line.cells else "" for one in columns])
    if differing:
        text += f"\nThe files differ in {', '.join(differing)}: these are not the same questions or conditions for all.\n"
    return text


def _columns(lines: Sequence[Line]) -> list[Any]:
    """Of all lines: numbers ascending, names as they come."""
    columns = list(dict.fromkeys(column for line in lines for column in line.cells))
    if all(isinstance(column, int) for column in columns):
        return sorted(columns)
    return [*(column for column in columns if column != AVERAGE), *(column for column in columns if column == AVERAGE)]


def _column_label(task: str, column: Any) -> str:
    return short_length(column) if isinstance(column, int) and task != "documents" else str(column)


def _longbench(results: dict[str, Any]) -> list[Line]:
    summary = results["summary"]
    cells = {**summary["buckets"], AVERAGE: summary["average"]}
    return [Line(_with_reading(results), {name: value for name, value in cells.items() if value is not None})]


def _leval(results: dict[str, Any]) -> list[Line]:
    summary = results["summary"]
    cells = {**{task: one["accuracy"] for task, one in summary["tasks"].items()}, AVERAGE: summary["average"]}
    return [Line(_with_reading(results), {name: value for name, value in cells.items() if value is not None})]


def _with_reading(results: dict[str, Any]) -> str:
    compression = results["settings"].get("compression")
    return f"{results['model']}{', compression on' if compression else ''}"


def _memory(task: str, column: str) -> Callable[[dict[str, Any]], list[Line]]:
    def read(results: dict[str, Any]) -> list[Line]:
        models = results["description"]["models"]
        return [
            Line(one["label"], {cell[column]: cell for cell in results[task] if cell["model"] == name})
            for name, one in models.items()
        ]

    return read


def _recall(results: dict[str, Any]) -> list[Line]:
    from .recall import variant_label

    variants = dict.fromkeys(cell["variant"] for cell in results["cells"])
    return [
        Line(variant_label(results, name), {cell["length"]: cell for cell in results["cells"] if cell["variant"] == name})
        for name in variants
    ]


def _fidelity(results: dict[str, Any]) -> list[Line]:
    labels = fidelity.model_labels(results)
    return [
        Line(f"{labels[name]}{_measured(form, place)}", numbers)
        for form in fidelity.FORMS
        for name, place, numbers in fidelity.lines(results, form)
    ]


def _measured(form: fidelity.Form, place: str) -> str:
    """What a line of `_fidelity` is of, behind the model."""
    return f", {form.title}, {form.place} {place}"


def _speed(results: dict[str, Any]) -> list[Line]:
    return [Line(label, cells) for label, cells in speed.rows_of(results).items()]


def _show_number(value: float) -> str:
    return f"{value:.2f}"


def _show_fidelity(value: float) -> str:
    return f"{value:.3f}"


def _show_share(cell: Mapping[str, Any]) -> str:
    return percent_with_interval(cell["right"], cell["samples"])


def _show_perplexity(cell: Mapping[str, Any]) -> str:
    return "INF" if cell["perplexity"] is None else f"{cell['perplexity']:.2f}"


def _draw_scores(view: View, lines: Sequence[Line], path: Path) -> None:
    figure, (axes,) = new_panels(1)
    columns = [column for column in _columns(lines) if column != AVERAGE] or [AVERAGE]
    width = 0.8 / len(lines)
    for number, line in enumerate(lines):
        places = [place for place, column in enumerate(columns) if column in line.cells]
        mean = f" (average {line.cells[AVERAGE]:.2f})" if AVERAGE in line.cells else ""
        shifted = [place + (number + 0.5) * width - 0.4 for place in places]
        axes.bar(shifted, [line.cells[columns[place]] for place in places], width, label=f"{line.label}{mean}")
    axes.set_xticks(range(len(columns)), columns, rotation=20 if len(columns) > 4 else 0)
    axes.set(ylabel=view.columns)
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside lower center", fontsize="small")
    save_figure(figure, path)


def _draw_recall(view: View, lines: Sequence[Line], path: Path) -> None:
    """Exact match by length, and a map by length and depth for every line."""
    maps = lines[:_MOST_MAPS]
    figure, (axes, *panels) = new_panels(1 + len(maps))
    columns = _columns(lines)
    for line in lines:
        draw_shares(axes, line.label, line.cells)
    set_length_ticks(axes, columns)
    axes.set(xlabel="text, tokens")
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    for line, panel in zip(maps, panels, strict=True):
        records = {length: cell["records"] for length, cell in line.cells.items()}
        lengths = sorted(records)
        image = draw_depths(panel, accuracy_by_depth(records, lengths), [short_length(length) for length in lengths])
        panel.set(xlabel="text, tokens")
        panel.set_title(textwrap.fill(line.label, 44), fontsize="small")
        panel.tick_params(labelsize="small")
    figure.colorbar(image, ax=panels, label="exact match", shrink=0.6)
    save_figure(figure, path)


def _draw_documents(view: View, lines: Sequence[Line], path: Path) -> None:
    figure, (axes,) = new_panels(1)
    for line in lines:
        draw_shares(axes, line.label, line.cells)
    columns = _columns(lines)
    set_length_ticks(axes, columns, [str(column) for column in columns])
    axes.set(xlabel="documents without the fact")
    axes.legend()
    save_figure(figure, path)


def _draw_perplexity(view: View, lines: Sequence[Line], path: Path) -> None:
    figure, (axes,) = new_panels(1)
    for line in lines:
        draw_perplexity(axes, line.label, {length: cell["perplexity"] for length, cell in line.cells.items()})
    set_length_ticks(axes, _columns(lines))
    axes.set(xlabel="context, tokens")
    axes.legend()
    save_figure(figure, path)


def _draw_fidelity(view: View, lines: Sequence[Line], path: Path) -> None:
    found = {form: [line for line in lines if _measured(form, "") in line.label] for form in fidelity.FORMS}
    fidelity.draw_panels(
        {form: [(line.label.replace(f", {form.title}", ""), line.cells) for line in of] for form, of in found.items()}, path
    )


def _draw_speed(view: View, lines: Sequence[Line], path: Path) -> None:
    speed.draw({line.label: line.cells for line in lines}, path)


_GENERATED = ("samples", "max_length", "truncation", "decoding")
_PLANTED = ("samples", "distractors", "digits", "seed")
VIEWS = {
    "longbench_e": View(_longbench, "score, by words", _show_number, _draw_scores, _GENERATED),
    "leval": View(_leval, "exact match, %, by task", _show_number, _draw_scores, _GENERATED),
    "passkey": View(
        _memory("passkey", "length"), "exact match, %, by tokens", _show_share, _draw_recall, (*_PLANTED, "keys")
    ),
    "documents": View(
        _memory("documents", "noise"),
        "exact match, %, by documents without the fact",
        _show_share,
        _draw_documents,
        (*_PLANTED, "document_length"),
    ),
    "perplexity": View(
        _memory("perplexity", "length"),
        "perplexity, by tokens of context",
        _show_perplexity,
        _draw_perplexity,
        ("counted", "windows", "stride"),
    ),
    "recall": View(_recall, "exact match, %, by tokens", _show_share, _draw_recall, _PLANTED),
    "fidelity": View(_fidelity, "ETMF and ECLMF, by tokens of a passage", _show_fidelity, _draw_fidelity, ("passages",)),
    "speed": View(_speed, "speed and memory, by tokens", speed.check_cell, _draw_speed, ("new_tokens",)),
}


def parse_arguments(arguments: Sequence[str] | None = None, program: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="JSON files that remamba eval wrote")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="picture (png, pdf, svg); beside it the table"
    )
    parser.add_argument("--task", choices=tuple(VIEWS), help="of files that have results of several tasks")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> None:
    from remamba_hf.reading import check_picture

    options = parse_arguments(arguments, program)
    check_writable(options.output)
    check_picture(options.output)
    files = {path: read_file(path) for path in dict.fromkeys(options.results)}
    task = common_task(files, options.task)
    lines = lines_of(task, files)
    table = markdown(task, lines, differing_settings(task, files))
    VIEWS[task].draw(VIEWS[task], lines, options.output)
    write_table(options.output.with_suffix(".md"), table)
    print(table, end="")


if __name__ == "__main__":
    main()
