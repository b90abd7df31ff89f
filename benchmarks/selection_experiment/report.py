# SPDX-License-Identifier: Apache-2.0
"""From the measurements of all models to means with their spread over seeds: JSON, tables, plot."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from remamba_hf.evaluation.reporting import (
    new_panels,
    save_figure,
    set_length_ticks,
    table_head,
    table_row,
    utc_now,
    write_table,
)
from remamba_hf.training.book_tokens import write_json

from .evaluation import START, WHOLE, Measurement, measurements, setting_name
from .recipe import ARMS, Recipe

LABELS = {
    "sft": "Mamba (SFT)",
    "sft, prompt cut": "Mamba (SFT), prompt cut to as many tokens",
    "remamba": "ReMamba",
    "random": "random selection",
    "stride": "stride selection",
    "multiplicative": "multiplicative",
    "remamba-answer-only": "ReMamba, scores from the answer alone",
    START: "before fine-tuning",
}
TASKS = {
    "recall": "recall, exact match, %",
    "recall-early": "recall of facts in the window's part of the text, %",
    "recall-late": "recall of facts behind it, %",
    "lines": "LongEval's lines, written anew, exact match, %",
    "longeval": "LongEval's own lines, exact match, %",
    "questions": "held-out questions, ROUGE-L",
    "perplexity": "perplexity of books, read without compression",
}
Summary = dict[tuple[str, str, str, str], dict[int, float]]


def collect(recipe: Recipe, run: Path) -> tuple[list[Measurement], dict[str, Any]]:
    """All measurements of a run, and what its trainings say of themselves, by arm and seed."""
    found, trainings = [], {}
    for folder in sorted((run / "results").glob("*")):
        if (folder / "done.json").is_file():
            arm, _, seed = folder.name.rpartition("-")
            found += measurements(recipe, folder, arm, int(seed))
    for record in sorted(run.glob("*/training.json")) + sorted(run.glob("arms/*/training.json")):
        content = json.loads(record.read_text())
        logs = [entry for entry in content.pop("history") if "loss" in entry]
        trainings[record.parent.name] = {**content, "last_log": logs[-1]}
    if not found:
        raise FileNotFoundError(f"{run} has no finished evaluation: run the step evaluate first")
    return found, trainings


def by_cell(found: Iterable[Measurement]) -> Summary:
    """Values by seed of every (arm, task, setting, column).

    Raises:
        ValueError: a cell was measured twice for one seed.
    """
    cells: Summary = {}
    for one in found:
        seeds = cells.setdefault((one.arm, one.task, one.setting, one.column), {})
        if one.seed in seeds:
            raise ValueError(f"{one.arm}, seed {one.seed}: {one.task} at {one.column} ({one.setting}) was measured twice")
        seeds[one.seed] = one.value
    return cells


def mean_over_columns(cells: Summary) -> dict[tuple[str, str, str], dict[int, float]]:
    """The mean over a task's columns by seed, of the seeds that have all columns."""
    columns: dict[tuple[str, str, str], list[dict[int, float]]] = {}
    for (arm, task, setting, _), seeds in cells.items():
        columns.setdefault((arm, task, setting), []).append(seeds)
    return {
        key: {seed: statistics.fmean(one[seed] for one in several) for seed in set.intersection(*map(set, several))}
        for key, several in columns.items()
    }


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and the standard deviation over seeds (with n - 1; None for one seed)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def show(values: Sequence[float], signed: bool = False) -> str:
    """Mean ± standard deviation; nothing for no values."""
    if not values:
        return ""
    mean, deviation = spread(values)
    return f"{mean:{'+' if signed else ''}.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


def tables(recipe: Recipe, found: Sequence[Measurement]) -> str:
    """All tables in Markdown."""
    cells = by_cell(found)
    text = ""
    for span, ratio in recipe.evaluation.compression:
        name = setting_name(span, ratio)
        text += f"\n## Compression with {name}\n\n" + _means(cells, name) + "\n" + _differences(cells, name)
        for task in TASKS:
            if task != "perplexity":
                text += _task_table(cells, task, name)
    return text + "\n## Without compression\n" + _task_table(cells, "perplexity", WHOLE)


def _arms(cells: Summary) -> list[str]:
    there = {arm for arm, *_ in cells}
    return [arm for arm in LABELS if arm in there]


def _value(cells: Any, arm: str, task: str, setting: str, *column: str) -> dict[int, float]:
    """By seed; models that compress nothing have one value for all settings."""
    return cells.get((arm, task, setting, *column)) or cells.get((arm, task, WHOLE, *column)) or {}


def _task_table(cells: Summary, task: str, setting: str) -> str:
    columns = sorted({key[3] for key in cells if key[1] == task and key[2] in (setting, WHOLE)}, key=_number)
    rows = [(arm, [_value(cells, arm, task, setting, column) for column in columns]) for arm in _arms(cells)]
    rows = [(arm, values) for arm, values in rows if any(values)]
    if not rows:
        return ""
    text = "\n" + table_head(TASKS[task], columns)
    for arm, values in rows:
        text += table_row(LABELS[arm], [show(list(seeds.values())) for seeds in values])
    return text


def _means(cells: Summary, setting: str) -> str:
    means = mean_over_columns(cells)
    tasks = [task for task in TASKS if any(key[1] == task for key in means)]
    text = table_head("mean over lengths", tasks)
    for arm in _arms(cells):
        text += table_row(LABELS[arm], [show(list(_value(means, arm, task, setting).values())) for task in tasks])
    return text


def _differences(cells: Summary, setting: str) -> str:
    """ReMamba less each other arm, seed by seed."""
    means = mean_over_columns(cells)
    tasks = [task for task in TASKS if any(key[1] == task for key in means)]
    text = table_head("ReMamba less ..., same seeds", tasks)
    for arm in _arms(cells):
        row = []
        for task in tasks if arm not in ("remamba", START) else ():
            ours, theirs = (_value(means, name, task, setting) for name in ("remamba", arm))
            row.append(show([ours[seed] - theirs[seed] for seed in sorted(set(ours) & set(theirs))], signed=True))
        text += table_row(LABELS[arm], row) if any(row) else ""
    return text


def _number(column: str) -> tuple[float, str]:
    digits = "".join(character for character in column if character.isdigit())
    return (float(digits) if digits else math.inf), column


def draw(recipe: Recipe, found: Sequence[Measurement], path: Path) -> None:
    """A panel for every task by length and setting: means, with the standard deviation over seeds as bars."""
    cells = by_cell(found)
    panels = [
        (task, setting_name(*setting))
        for setting in recipe.evaluation.compression
        for task in ("recall", "recall-early", "lines")
        if any(key[1] == task for key in cells)
    ] + [("perplexity", WHOLE)]
    figure, axes = new_panels(len(panels))
    for panel, (task, setting) in zip(axes, panels, strict=True):
        lengths = [str(length) for length in recipe.evaluation.lengths]
        for arm in _arms(cells):
            points = [
                (int(length), *spread(list(seeds.values())))
                for length in lengths
                if (seeds := _value(cells, arm, task, setting, length))
            ]
            if points:
                columns, means, deviations = zip(*points, strict=True)
                label = LABELS[arm] if (task, setting) == panels[0] or arm == "sft, prompt cut" else None
                panel.errorbar(
                    columns,
                    means,
                    [value or 0.0 for value in deviations],
                    marker="o",
                    capsize=3,
                    label=label,
                    color=_colour(arm),
                )
        set_length_ticks(panel, list(recipe.evaluation.lengths))
        panel.set(xlabel="prompt, tokens", ylabel="perplexity")
        if task != "perplexity":
            panel.set(ylabel="exact match, %", ylim=(-4, 104))
        panel.set_title(f"{task}" + ("" if setting == WHOLE else f", {setting}"), fontsize="small")
    handles: dict[str, Any] = {}
    for panel in axes:
        handles |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize="small")
    save_figure(figure, path)


def _colour(arm: str) -> str:
    return f"C{list(LABELS).index(arm)}"


def check_same_data(trainings: dict[str, Any]) -> dict[str, str]:
    """The digest of the data that all arms of a seed were trained on, by seed.

    Raises:
        ValueError: two arms of a seed were trained on different data.
    """
    digests: dict[str, str] = {}
    for name, training in trainings.items():
        arm, _, seed = name.rpartition("-")
        if arm in ARMS and digests.setdefault(seed, training["data"]) != training["data"]:
            raise ValueError(f"{name} was trained on other data than another arm of seed {seed}: train it anew")
    return digests


def write(recipe: Recipe, run: Path, output: Path) -> list[Path]:
    """Writes `output.json`, `output.md` and `output.png`."""
    found, trainings = collect(recipe, run)
    digests = check_same_data(trainings)
    seeds = sorted({one.seed for one in found if one.arm in ARMS})
    output.parent.mkdir(parents=True, exist_ok=True)
    files = [output.with_name(f"{output.name}{suffix}") for suffix in (".json", ".md", ".png")]
    cells = by_cell(found)
    aggregated = [
        {
            "arm": arm,
            "task": task,
            "setting": setting,
            "column": column,
            "mean": mean,
            "deviation": deviation,
            "seeds": len(values),
        }
        for (arm, task, setting, column), values in cells.items()
        for mean, deviation in [spread(list(values.values()))]
    ]
    content = {
        "date": utc_now(),
        "recipe": recipe.written(),
        "prepared": json.loads((run / "data" / "prepared.json").read_text()),
        "data_digests": digests,
        "trainings": trainings,
        "aggregated": aggregated,
        "measurements": [asdict(one) for one in found],
    }
    write_json(files[0], content)
    write_table(files[1], f"# Selection\n\n{_about(recipe, trainings, seeds)}\n{tables(recipe, found)}")
    draw(recipe, found, files[2])
    return files


def _about(recipe: Recipe, trainings: dict[str, Any], seeds: Sequence[int]) -> str:
    first: dict[str, Any] = next(iter(trainings.values()), {"parameters": 0, "environment": {}})
    versions = ", ".join(f"{name} {version}" for name, version in first["environment"].items())
    weights = ", ".join(f"{name} {value:g}" for name, value in asdict(recipe.weights).items())
    return (
        f"Mamba-1, {first['parameters'] / 1e6:.1f}M parameters (a compressor's included), hidden {recipe.hidden_size}, "
        f"{recipe.layers} layers. Fine-tuned for {recipe.tuning.steps} steps of {recipe.tuning.tokens_per_batch} tokens, "
        f"the same for all arms of a seed. Seeds: {', '.join(map(str, seeds))}; mean ± standard deviation over them. "
        f"{recipe.evaluation.samples} prompts a cell. Loss weights: {weights}. {versions}.\n\n"
        "What the paper does not do: scores (those that are multiplied too) are told in training where the fact is, by "
        f'the loss named evidence; not in "{LABELS["remamba-answer-only"]}". '
        'Prompts of the control "prompt cut" lose their middle, to as many tokens as compression leaves.'
    )
