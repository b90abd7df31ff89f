# SPDX-License-Identifier: Apache-2.0
"""Writes results into a model's card, in the forms that the Hub reads and in one for people.

    remamba card FOLDER --results FILE [FILE ...]

- `model-index` in the front matter of FOLDER/README.md;
- `.eval_results/*.yaml` (https://huggingface.co/docs/hub/eval-results), for what was measured on a whole dataset of the
  Hub, by where the data came from or by a `--dataset` that names it: an entry there has to name one;
- tables in the text of the card, between two markers.

A run states all that a card has of `remamba eval`: what an earlier run wrote and these files do not have goes. All else
stays as it was, byte for byte in text and front matter; within `model-index`, what others wrote keeps its values and may be
laid out anew.
"""

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    eval_result_entries_to_yaml,
)
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import yaml_dump

from .card_scores import BOOK_KINDS, KINDS, TOOL, CardModel, Dataset, Results, Score, read_results
from .reporting import table_head, table_row

BEGIN, END = "<!-- remamba eval: begin -->", "<!-- remamba eval: end -->"
EVAL_RESULTS = ".eval_results"
_OWN_FILE = "# Written by `remamba card`, which replaces this file.\n"
_INDEX = "model-index"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Change:
    """What a file holds and is to hold; None: no file. Texts have the line ends of the file."""

    path: Path
    old: str | None
    new: str | None

    def diff(self, folder: Path) -> str:
        """As `diff -u` shows it, paths seen from a folder."""
        name = self.path.relative_to(folder).as_posix()
        old, new = ((text or "").splitlines(keepends=True) for text in (self.old, self.new))
        before, after = ("/dev/null" if text is None else name for text in (self.old, self.new))
        lines = difflib.unified_diff(old, new, before, after)
        return "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)

    def apply(self) -> None:
        """Writes the file under a temporary name and renames it, or removes it; raises a ValueError if it cannot."""
        try:
            if self.new is None:
                self.path.unlink()
                return
            self.path.parent.mkdir(exist_ok=True)
            temporary = self.path.with_name(f"unfinished-{self.path.name}")
            temporary.write_bytes(self.new.encode())
            os.replace(temporary, self.path)
        except OSError as error:
            raise ValueError(f"{self.path} cannot be written ({error.strerror}): correct that, and run again") from error


@dataclass(frozen=True)
class CardUpdate:
    """What results make of a card.

    Attributes:
        folder: of the model.
        changes: of files, the card last; empty if all is there.
        scores: how many numbers the card has of these results.
        notes: what a user should know.
    """

    folder: Path
    changes: tuple[Change, ...]
    scores: int
    notes: tuple[str, ...]

    def apply(self) -> None:
        for change in self.changes:
            change.apply()


def named_datasets(given: Iterable[str], books: str | None = None) -> dict[str, str]:
    """Datasets on the Hub by the kind of results that were measured on them.

    Args:
        given: each "TASK=OWNER/NAME".
        books: that of all kinds that are measured on books.

    Raises:
        ValueError: text of another form, or a task that cards know nothing of.
    """
    if books is not None and not _HUB_ID.fullmatch(books):
        raise ValueError(f"{books} is no id of a dataset on the Hub: give --books-dataset as owner/name")
    named = {} if books is None else dict.fromkeys(BOOK_KINDS, books)
    for text in given:
        kind, _, dataset = text.partition("=")
        if kind not in KINDS or not _HUB_ID.fullmatch(dataset):
            raise ValueError(f"--dataset {text} is not TASK=OWNER/NAME with one of the tasks {', '.join(KINDS)}")
        named[kind] = dataset
    return named


def plan_update(folder: Path, files: Sequence[Path], datasets: Mapping[str, str] | None = None) -> CardUpdate:
    """What to change in a model's folder so that its card states the results in some files. Changes nothing.

    Args:
        folder: of the checkpoint, with or without a README.md.
        files: JSON, written by `remamba eval`.
        datasets: the dataset on the Hub that results are measured on, by their kind, where the files do not say so.

    Raises:
        ValueError: files that cannot be read, that are no results, of another model, or that contradict each other; a
            card that cannot be read or has half of the markers.
    """
    datasets = datasets or {}
    model = CardModel(folder)
    found = [read_results(file, model) for file in files]
    scores = _distinct(found)
    readme = folder / "README.md"
    old = _read(readme)
    new = _card(old, model, _eval_results(scores, datasets), _block(scores, folder))
    changes = [*_eval_files(folder, scores, datasets), Change(readme, old, new)]
    notes = [note for one in found for note in _notes(one, datasets)]
    return CardUpdate(folder, tuple(each for each in changes if each.old != each.new), len(scores), tuple(notes))


def _notes(results: Results, datasets: Mapping[str, str]) -> Iterator[str]:
    """What a user should know about a file."""
    name = results.file.name
    if not results.is_identified:
        yield f"{name} has no digest of its model: kind and settings were compared, as far as it has them"
    every = [score.dataset for score in results.scores]
    of = [dataset for dataset in every if dataset.is_benchmark]
    if not any(dataset.is_whole for dataset in every) and not of:
        yield f"{name} is of some books (--most-books), not of all: nothing of it is a result for the Hub"
    elif of and not any(dataset.is_whole for dataset in of):
        yield f"{name} is of some samples (--limit) or does not say of how many: nothing of it is a result for the Hub"
    elif of and not any(_hub_id(dataset, datasets) for dataset in of):
        kind = of[0].kind
        yield f"{name} was measured on local files: if these are a dataset's on the Hub, add --dataset {kind}=OWNER/NAME"


def _hub_id(dataset: Dataset, datasets: Mapping[str, str]) -> str | None:
    """The dataset on the Hub that a number is a result of, if it is one."""
    return datasets.get(dataset.kind, dataset.hub) if dataset.is_whole else None


def _read(path: Path) -> str | None:
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file in UTF-8. Convert it to UTF-8 first.") from None


def _distinct(found: Sequence[Results]) -> list[tuple[Results, Score]]:
    """All scores, those that several files have once.

    Raises:
        ValueError: two for one place.
    """
    places: dict[tuple[str, str, str], tuple[Results, Score]] = {}
    for results in found:
        for score in results.scores:
            other, there = places.setdefault((score.table, score.row, score.column), (results, score))
            if there != score or other.environment != results.environment:
                raise ValueError(
                    f"{other.file} and {results.file} both have {score.table}: {score.row}, {score.column} "
                    f"({there.shown} and {score.shown}): give one of them"
                )
    return list(places.values())


def _eval_results(scores: Sequence[tuple[Results, Score]], datasets: Mapping[str, str]) -> list[EvalResult]:
    """For the model-index. Settings that all numbers of a dataset share stand with the dataset, others with the number."""
    shared: dict[str, dict[str, Any]] = {}
    for results, score in scores:
        settings = _settings(results, score)
        common = shared.setdefault(score.dataset.config, settings)
        shared[score.dataset.config] = {name: common[name] for name in common if settings.get(name) == common[name]}
    entries = []
    for results, score in scores:
        common = shared[score.dataset.config]
        own = {name: value for name, value in _settings(results, score).items() if name not in common}
        if score.metric is not None and score.value is not None:
            hub = _hub_id(score.dataset, datasets)
            entries.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=hub or score.dataset.kind,
                    dataset_name=score.dataset.name,
                    dataset_config=score.dataset.config,
                    dataset_split=score.dataset.split if hub else None,
                    dataset_args=common,
                    metric_type=score.metric,
                    metric_name=score.name,
                    metric_value=score.value,
                    # The version is also the sign by which the next run knows what it may replace.
                    metric_args={TOOL: results.environment[TOOL], **score.counts, **own},
                )
            )
    if not entries:
        raise ValueError("the files have no finite number for a card")
    return entries


def _settings(results: Results, score: Score) -> dict[str, Any]:
    environment = {name: value for name, value in results.environment.items() if name != TOOL}
    date = {} if results.date is None else {"date": results.date}
    return {**score.settings, **environment, **date}


def _eval_files(folder: Path, scores: Sequence[tuple[Results, Score]], datasets: Mapping[str, str]) -> list[Change]:
    """Changes of the files in `.eval_results/`: one for every kind of results."""
    entries: dict[str, list[EvalResultEntry]] = {}
    for results, score in scores:
        dataset = _hub_id(score.dataset, datasets)
        if dataset is not None and score.metric is not None and score.value is not None:
            entry = EvalResultEntry(
                dataset_id=dataset,
                task_id=_task_id(score),
                value=score.value,
                date=results.date,
                notes=_listed({**score.counts, **_settings(results, score), TOOL: results.environment[TOOL]}),
            )
            entries.setdefault(score.dataset.kind, []).append(entry)
    new = {
        f"remamba-{kind}.yaml": _OWN_FILE + yaml_dump(eval_result_entries_to_yaml(own), sort_keys=False)
        for kind, own in entries.items()
    }
    place = folder / EVAL_RESULTS
    there = {path.name: _read(path) for path in sorted(place.glob("remamba-*.yaml"))}
    for name in new:
        if not (there.get(name) or _OWN_FILE).startswith(_OWN_FILE):
            raise ValueError(f"{place / name} was not written by this command: give it another name")
    own = [name for name, text in there.items() if (text or "").startswith(_OWN_FILE)]
    return [Change(place / name, there.get(name), new.get(name)) for name in dict.fromkeys([*new, *own])]


def _task_id(score: Score) -> str:
    """The Hub's configuration for the one number of a benchmark's task, else a name made of what was measured."""
    is_only = score.dataset.is_benchmark and (score.column == "average" or score.metric == "exact_match")
    name = score.dataset.config if is_only else f"{score.dataset.config} {score.name}"
    return re.sub(r"\W+", "_", name.replace("%", "")).strip("_")


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _card(old: str | None, model: CardModel, results: list[EvalResult], block: str) -> str:
    """The text of the whole card.

    Raises:
        ValueError: a card that the Hub could not read, before or after.
    """
    mark = "\ufeff" if old is not None and old.startswith("\ufeff") else ""
    content = _new_card(model) if old is None else old.removeprefix(mark)
    newline = "\r\n" if "\r\n" in content else "\n"
    front, text = _parts(content)
    readme = model.folder / "README.md"
    before = _metadata(readme, front)
    index = _index(before.get(_INDEX), results, model.folder.resolve().name)
    text = _with_block(text, block, newline, model.folder)
    if index != before.get(_INDEX):
        front = _with_index(front or "", index, newline)
    new = _fenced(content, front, newline) + text
    try:
        is_kept = _metadata(readme, _parts(new)[0]) == {**before, _INDEX: index}
    except ValueError:
        is_kept = False
    if not is_kept:
        raise ValueError(f"the front matter of {readme} has its {_INDEX} twice, or refers to it: correct it first")
    ModelCard(new)  # raises for what the Hub could not read
    return mark + new


def _new_card(model: CardModel) -> str:
    """Metadata that the configuration tells, and no text."""
    config = model.config
    tags = [tag for tag, there in ((model.kind, model.kind), ("custom_code", "auto_map" in config)) if there]
    told: dict[str, Any] = {
        "license": config.get("license"),
        "library_name": "transformers" if "transformers_version" in config else None,
        "base_model": config.get("base_model"),
        "tags": tags,
    }
    told = {name: value for name, value in told.items() if value}
    return f"---\n{yaml_dump(told, sort_keys=False)}---\n" if told else ""


def _parts(content: str) -> tuple[str | None, str]:
    """Front matter, as the Hub finds it, and text."""
    match = REGEX_YAML_BLOCK.search(content)
    return (match.group(2), content[match.end() :]) if match else (None, content)


def _fenced(content: str, front: str | None, newline: str) -> str:
    """The front matter with its fences as they were."""
    match = REGEX_YAML_BLOCK.search(content)
    if match:
        return f"{match.group(1)}{front}{match.group(3)}"
    gap = "" if content[:1] in ("", "\r", "\n") else newline
    return f"---{newline}{front}{newline}---{newline}{gap}"


def _metadata(readme: Path, front: str | None) -> dict[str, Any]:
    try:
        data = yaml.safe_load(front or "")
    except yaml.YAMLError as error:
        raise ValueError(f"the front matter of {readme} is not YAML: {' '.join(str(error).split())}") from error
    if data is not None and not isinstance(data, dict):
        raise ValueError(f"the front matter of {readme} is no mapping of names to values: correct it first")
    return data or {}


def _index(there: Any, results: list[EvalResult], name: str) -> list[dict[str, Any]]:
    """The model-index with what others wrote first, and then these results."""
    try:
        kept = [{**model, "results": _of_others(model["results"])} for model in there or []]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"the card's {_INDEX} is not as the Hub reads it: correct or remove it") from error
    own = eval_results_to_model_index(name, results)[0]
    return [{**kept[0], "results": [*kept[0]["results"], *own["results"]]}, *kept[1:]] if kept else [own]


def _of_others(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    kept = []
    for result in results:
        metrics = [metric for metric in result["metrics"] if TOOL not in (metric.get("args") or {})]
        if metrics or not result["metrics"]:
            kept.append({**result, "metrics": metrics})
    return kept


def _with_index(front: str, index: list[dict[str, Any]], newline: str) -> str:
    """The front matter with another model-index in the place of that which it has, or at its end."""
    dumped = yaml_dump({_INDEX: index}, sort_keys=False, line_break=newline).rstrip()
    root = yaml.compose(front, yaml.SafeLoader)
    if root is None:
        return f"{front}{newline}{dumped}" if front.strip() else dumped
    if root.flow_style:
        raise ValueError("the card's front matter stands in braces: write it as lines of `name: value` first")
    keys = [key for key, _ in root.value]
    number = next((number for number, key in enumerate(keys) if key.value == _INDEX), None)
    if number is None:
        return f"{front}{newline}{dumped}"
    start = keys[number].start_mark.index
    end = keys[number + 1].start_mark.index if number + 1 < len(keys) else len(front)
    lines = front[start:end].splitlines(keepends=True)
    after: list[str] = []  # blank lines and comments in front of what comes next
    while len(lines) > 1 and (not lines[-1].strip() or lines[-1].startswith("#")):
        after.insert(0, lines.pop())
    rest = "".join(after) + front[end:]
    return f"{front[:start]}{dumped}{newline if rest else ''}{rest}"


def _with_block(text: str, block: str, newline: str, folder: Path) -> str:
    counts = text.count(BEGIN), text.count(END)
    block = f"{BEGIN}\n{block}{END}".replace("\n", newline)
    if counts == (0, 0):
        gap = "" if not text or text.endswith("\n") else newline
        return f"{text}{gap}{newline}{block}{newline}"
    start, end = text.find(BEGIN), text.find(END)
    if counts != (1, 1) or end < start:
        raise ValueError(f"{folder / 'README.md'} should have {BEGIN} and {END} once each, in this order: correct it first")
    return f"{text[:start]}{block}{text[end + len(END) :]}"


def _block(scores: Sequence[tuple[Results, Score]], folder: Path) -> str:
    """All numbers as tables, and under them the files with the settings."""
    tables: dict[str, dict[str, dict[str, str]]] = {}
    columns: dict[str, dict[str, int]] = {}
    for _, score in scores:
        tables.setdefault(score.table, {}).setdefault(score.row, {})[score.column] = score.shown
        columns.setdefault(score.table, {})[score.column] = score.order
    text = ""
    for title, rows in tables.items():
        head = sorted(columns[title], key=columns[title].__getitem__)
        text += table_head(title, head)
        text += "".join(table_row(row, [cells.get(column, "") for column in head]) for row, cells in rows.items()) + "\n"
    text += "Measured by `remamba eval`; in brackets 95 % Wilson intervals.\n\n"
    return text + "".join(f"- {line}\n" for line in dict.fromkeys(_described(*score, folder) for score in scores))


def _described(results: Results, score: Score, folder: Path) -> str:
    settings = {**_settings(results, score), TOOL: results.environment[TOOL]}
    return f"{_link(results.file, folder)}, {score.dataset.kind}: {_listed(settings)}"


def _link(file: Path, folder: Path) -> str:
    """A link to a file in the model's folder; of another its name alone, which says nothing about this machine."""
    try:
        inside = file.resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        return f"`{file.name}`"
    return f"[{inside}]({inside})"
