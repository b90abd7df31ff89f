# SPDX-License-Identifier: Apache-2.0
"""The numbers in the files of `remamba eval` that are of one checkpoint, with their names and how they were measured.

A file is of a checkpoint if it says so: by a digest of files or weights, a commit on the Hub, or, where it has neither, by
the kind of model and its settings. What it says of other models beside it, such as baselines, is left out.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from remamba_hf.checkpoint_files import TOKENIZER_FILES, check_safetensors, first_line, has_tokenizer, read_json
from remamba_hf.families import ALL_FAMILIES, FAMILIES, PLAIN_FAMILIES

from . import leval, longbench
from .causal_models import Checkpoint, digest_of_files
from .checkpoints import digest, family_of, weights_read
from .memory_report import COLUMNS
from .reporting import percent_with_interval, short_length

TOOL = "remamba_hf"  # in an environment, the version of what has measured
DECIMALS = 4  # of the values in a card's metadata


@dataclass(frozen=True)
class Dataset:
    """What was measured on.

    Attributes:
        kind: of the results, one word.
        name: for people.
        config: what tells it from others of its kind.
        hub: its id on the Hub; None: books of a folder.
        split: on the Hub.
    """

    kind: str
    name: str
    config: str
    hub: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Score:
    """One number.

    Attributes:
        dataset: what was measured on.
        table, row, column: where it stands in the text of a card.
        shown: how it stands there.
        value: percent for shares; None for what is not finite.
        metric: its kind, such as exact_match; None for what stands in the text alone.
        name: for people, unique among those of one dataset and one reading of it.
        settings: that it depends on.
        counts: how much it was taken over.
        order: of its column; those of the same order stand as they come.
    """

    dataset: Dataset
    table: str
    row: str
    column: str
    shown: str
    value: float | None
    metric: str | None
    name: str
    settings: Mapping[str, Any]
    counts: Mapping[str, int] = field(default_factory=dict)
    order: int = 0


@dataclass(frozen=True)
class Results:
    """What a file says of one model.

    Attributes:
        file: its path.
        scores: in its order.
        environment: versions and devices.
        date: in ISO 8601, if the file has one.
        is_identified: whether the file has a digest or commit of its model.
    """

    file: Path
    scores: tuple[Score, ...]
    environment: Mapping[str, str]
    date: str | None
    is_identified: bool


class CardModel:
    """The checkpoint of a card, as far as results can tell it from others.

    Args:
        folder: with its `config.json`, and its weights where results tell their model by these.

    Raises:
        CheckpointError: a ValueError; there is no readable `config.json`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self.kind = self.config.get("model_type")
        self.weights = cache(self._weights)

    def _weights(self, dtype: str) -> str:
        """The digest of weights by which memory.py tells models."""
        if self.kind not in ALL_FAMILIES and self.kind not in PLAIN_FAMILIES:
            return "of another kind"
        check_safetensors(self.folder)
        checkpoint = str(self.folder)
        model = family_of(checkpoint).model_class.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
        return digest(weights_read(model))

    def digests(self) -> list[str]:
        """Those by which results tell a folder: without the code that it brings, and with it."""
        read = (Checkpoint(self.folder.name, str(self.folder), None, self.folder, None, code) for code in (False, True))
        # A snapshot of the Hub is told by its commit.
        return [value for one in read for name, value in one.identity().items() if name == "sha256"]

    def commit(self) -> str | None:
        """The commit on the Hub that a snapshot, or a download with `--local-dir`, is of; None if anything has changed."""
        if self.folder.parent.name == "snapshots":
            return self.folder.name
        commits = {_downloaded_commit(path) for name in ("config.json", "*.safetensors") for path in self.folder.glob(name)}
        return commits.pop() if len(commits) == 1 else None

    def tokenizer(self) -> str | None:
        """The digest of the tokenizer's files, if there are any."""
        if not has_tokenizer(self.folder):
            return None
        return digest_of_files(path for name in TOKENIZER_FILES for path in self.folder.glob(name))


def _downloaded_commit(path: Path) -> str | None:
    """As huggingface_hub notes it beside a download: commit, hash and time, a line each."""
    note = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    try:
        commit, _, time = note.read_text().split()
        return commit if path.stat().st_mtime - 1 <= float(time) else None
    except (OSError, ValueError):
        return None


def read_results(file: Path, model: CardModel) -> Results:
    """What a file says of a model.

    Raises:
        ValueError: the file is none of `remamba eval`, is not whole, has no number for a card, or is of another model.
        OSError: it cannot be read.
    """
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({first_line(error)}): give a file that `remamba eval` wrote") from error
    reader = _reader(results)
    if reader is None:
        raise ValueError(f"{file} holds no results for a card: give JSON files that `remamba eval` wrote")
    try:
        is_identified = _CHECKS[reader](results, model, file)
        scores = tuple(reader(results, model))
        environment = _environment(results)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not as `remamba eval` writes it ({first_line(error)}): evaluate again") from error
    except _Damaged as error:
        raise ValueError(f"{file} is not as `remamba eval` writes it: {error}. Evaluate again") from error
    if not scores:
        raise ValueError(f"{file} has no number for a card yet: let the evaluation come to its end")
    date = results.get("date")
    return Results(file, scores, environment, date if isinstance(date, str) else None, is_identified)


class _Damaged(ValueError):
    """Something in a file that no evaluation writes."""


Reader = Callable[[dict[str, Any], CardModel], Iterator[Score]]


def _reader(results: Any) -> Reader | None:
    if not isinstance(results, dict) or not isinstance(results.get("settings"), dict):
        return None
    if "summary" in results:
        return {longbench.LongBench.name: _longbench, leval.LEval.name: _leval}.get(results["settings"].get("task", ""))
    if "cells" in results:
        return _recall
    if "models" in results:
        return _fidelity
    return _memory if any(part in results for part in COLUMNS) else None


def _environment(results: Mapping[str, Any]) -> dict[str, str]:
    """Versions and devices; of several runs, all that there were."""
    several = results["environments"] if "environments" in results else [results["environment"]]
    names = (TOOL, "torch", "transformers", "device")
    return {name: ", ".join(dict.fromkeys(str(one[name]) for one in several)) for name in names}


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _Damaged(f"{value!r} stands where a number should")
    return round(float(value), DECIMALS)


def _share(cell: Mapping[str, Any]) -> tuple[float, str]:
    """Percent, and how it is shown, of a cell whose counts agree."""
    right, samples = cell["right"], cell["samples"]
    if not 0 <= right <= samples or not samples or not math.isclose(cell["accuracy"], right / samples, abs_tol=1e-9):
        raise _Damaged(f"{right} right of {samples} are not an accuracy of {cell['accuracy']}")
    if sum(record["right"] for record in cell["records"]) != right or len(cell["records"]) != samples:
        raise _Damaged(f"the answers do not add up to {right} right of {samples}")
    return _number(100 * right / samples), percent_with_interval(right, samples)


def _check_files(results: dict[str, Any], model: CardModel, file: Path) -> bool:
    """Of the benchmarks with generated answers: model and tokenizer by their files, or by a commit."""
    said = results["settings"]["model"]
    if "revision" in said:
        found: Any = model.commit()
        if found != said["revision"]:
            have = f"at commit {found}" if found else "which is no download of a commit, or was changed since"
            _refuse(file, f"of {said['id']} at commit {said['revision']}", model, have)
    elif said["sha256"] not in model.digests():
        have = ", ".join(dict.fromkeys(model.digests())) or f"commit {model.commit()}"
        _refuse(
            file,
            f"whose configuration and weights have SHA-256 {said['sha256']} ({results['model']})",
            model,
            f"with {have}",
        )
    tokenizer = model.tokenizer()
    if tokenizer is not None and results["settings"]["tokenizer"]["sha256"] != tokenizer:
        used = results["settings"]["tokenizer"]["sha256"]
        _refuse(file, f"read with a tokenizer of SHA-256 {used}", model, f"whose tokenizer has {tokenizer}")
    return True


def _refuse(file: Path, said: str, model: CardModel, found: str) -> None:
    raise ValueError(f"{file} holds results of another model, {said}: this is {model.folder}, {found}. Leave the file out")


def _check_weights(results: dict[str, Any], model: CardModel, file: Path) -> bool:
    if _name_by_weights(results, model) is None:
        models = results["description"]["models"].values()
        said = "; ".join(f"{one['label']} ({one['model_type']}, {one['dtype']}) {one['weights']}" for one in models)
        dtypes = {one["dtype"]: None for one in models}
        found = ", ".join(f"{model.weights(dtype)} in {dtype}" for dtype in dtypes)
        _refuse(file, f"by the SHA-256 of weights: {said}", model, f"{model.kind}, {found}")
    return True


def _name_by_weights(results: dict[str, Any], model: CardModel) -> str | None:
    """Under which name a file of memory.py has the model."""
    for name, one in results["description"]["models"].items():
        if one["model_type"] == model.kind and one["weights"] == model.weights(one["dtype"]):
            return name
    return None


def _check_settings(results: dict[str, Any], model: CardModel, file: Path) -> bool:
    said = {"model_type": results["description"].get("family"), **results["description"].get("model_settings", {})}
    differing = {name: value for name, value in said.items() if value is not None and model.config.get(name) != value}
    if differing or model.kind not in FAMILIES:
        there = ", ".join(f"{name} {value}" for name, value in differing.items()) or f"one of {', '.join(FAMILIES)}"
        names = differing or ["model_type"]
        _refuse(file, f"with {there}", model, "with " + ", ".join(f"{name} {model.config.get(name)}" for name in names))
    return False  # neither has a digest, and many models have that kind and settings


def _check_kind(results: dict[str, Any], model: CardModel, file: Path) -> bool:
    if _name_by_kind(results, model) is None:
        said = "; ".join(f"{one['model_type']} of {one['layers']} layers" for one in results["models"].values())
        _refuse(file, said, model, f"{model.kind} of {model.config.get('num_hidden_layers')} layers")
    return False  # many models have that kind and size


def _name_by_kind(results: dict[str, Any], model: CardModel) -> str | None:
    for name, one in results["models"].items():
        if (one["model_type"], one["layers"]) == (model.kind, model.config.get("num_hidden_layers")):
            return name
    return None


def _reading(settings: Mapping[str, Any], model: CardModel) -> tuple[str, dict[str, Any]]:
    """How prompts of a benchmark were read, for names and tables, and all that answers depend on."""
    compression = _there(settings["compression"] or {})
    used = {name: settings[name] for name in ("max_length", "truncation", "decoding", "dtype")}
    if model.kind not in FAMILIES:
        return "", used
    state = "on" if compression else "off"
    return f", compression {state}", {"compression": state, **compression, **used}


def _there(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _longbench(results: dict[str, Any], model: CardModel) -> Iterator[Score]:
    reading, settings = _reading(results["settings"], model)
    summary, data = results["summary"], results.get("data") or {}
    files = {
        task: task if f"{task}.jsonl" in data and f"{task}_e.jsonl" not in data else f"{task}_e" for task in summary["tasks"]
    }
    title = "LongBench-E" if all(name.endswith("_e") for name in files.values()) else "LongBench"
    table = f"{title}, score by words{reading}"
    counts = {"samples": results["settings"]["samples"]["count"], "tasks": len(files)}
    rows = [(task, files[task], one, {"samples": sum(one["samples"].values())}) for task, one in summary["tasks"].items()]
    for row, config, one, count in (*rows, ("average", title.lower().replace("-", "_"), summary, counts)):
        dataset = Dataset(longbench.LongBench.name, f"{title}, {row}", config, longbench.HUB_REPOSITORY, "test")
        for column, value in (*one["buckets"].items(), ("average", one["average"])):
            if value is not None:
                # A task's score by length stands in the text alone: the metadata would be several hundred lines.
                metric = "score" if column == "average" or row == "average" else None
                number, shown = _number(value), f"{_number(value):.2f}"
                yield Score(dataset, table, row, column, shown, number, metric, f"score, {column}{reading}", settings, count)


def _leval(results: dict[str, Any], model: CardModel) -> Iterator[Score]:
    reading, settings = _reading(results["settings"], model)
    summary = results["summary"]
    counts = {"samples": results["settings"]["samples"]["count"], "tasks": len(summary["tasks"])}
    rows = [(task, task, one["accuracy"], {"samples": one["samples"]}) for task, one in summary["tasks"].items()]
    for column, config, value, count in (*rows, ("average", "closed_ended", summary["average"], counts)):
        if value is not None:
            dataset = Dataset(leval.LEval.name, f"L-Eval, {column}", config, leval.HUB_REPOSITORY, "test")
            number, table = _number(value), "L-Eval, closed-ended tasks"
            row, metric = f"exact match, %{reading}", "exact_match"
            yield Score(dataset, table, row, column, f"{number:.2f}", number, metric, row, settings, count)


def _memory(results: dict[str, Any], model: CardModel) -> Iterator[Score]:
    name, settings = _name_by_weights(results, model), results["settings"]
    dtype = results["description"]["models"][name]["dtype"]
    books = {"books": len(results["description"]["books"]), "dtype": dtype}
    for part, cells in ((part, results[part]) for part in ("passkey", "documents", "perplexity")):
        for cell in sorted((cell for cell in cells if cell["model"] == name), key=lambda cell: cell[COLUMNS[part][0]]):
            yield _perplexity(settings, books, cell) if part == "perplexity" else _recalled(part, settings, books, cell)


def _recalled(part: str, settings: Mapping[str, Any], books: Mapping[str, Any], cell: Mapping[str, Any]) -> Score:
    asked = settings["keys"] if part == "passkey" else 1
    people = asked + settings["distractors"]
    row = "one person's number" if people == 1 else f"numbers of {asked} of {people} people"
    names = ["distractors", "digits", "seed", "keys" if part == "passkey" else "document_length"]
    used = {**{name: settings[name] for name in names}, **books}
    value, shown = _share(cell)
    order = cell[COLUMNS[part][0]]
    counts = {"samples": cell["samples"], COLUMNS[part][0]: order}
    if part == "passkey":
        dataset = Dataset(part, f"numbers planted in books, {row}", f"{part}, {row}")
        table, column, at = "passkey, exact match, %, by tokens", short_length(cell["length"]), f"{cell['length']} tokens"
    else:
        dataset = Dataset(part, f"a number in one of many documents, {row}", f"{part}, {row}")
        table, column = "one of many documents, exact match, %, by documents without the fact", str(cell["noise"])
        at = f"{cell['noise']} other documents"
    return Score(dataset, table, row, column, shown, value, "exact_match", f"exact match, %, {at}", used, counts, order)


def _perplexity(settings: Mapping[str, Any], books: Mapping[str, Any], cell: Mapping[str, Any]) -> Score:
    length, value = cell["length"], cell["perplexity"]
    row = f"of the last {settings['counted']} tokens of windows of books"
    dataset = Dataset("perplexity", f"perplexity {row}", f"perplexity, {row}")
    counts = {"windows": cell["windows"], "length": length}
    number = None if value is None else _number(value)
    shown = "INF" if number is None else f"{number:.2f}"
    used = {"windows_per_book": settings["windows"], "counted": settings["counted"], **books}
    name, table = f"perplexity, {length} tokens", "perplexity, by tokens of context"
    return Score(dataset, table, row, short_length(length), shown, number, "perplexity", name, used, counts, length)


def _recall(results: dict[str, Any], model: CardModel) -> Iterator[Score]:
    settings, books = results["settings"], {"books": len(results["description"]["books"])}
    own = _there(results["description"].get("model_settings", {}))
    given = {f"compression_{name}": settings[name] for name in ("span", "ratio") if settings[name] is not None}
    if "compression_ratio" in given:
        own.pop("compression_max_kept", None)  # bounds the checkpoint's own ratio only
    stated = "".join(f", {name.removeprefix('compression_')} {value}" for name, value in given.items())
    used = {**{name: settings[name] for name in ("distractors", "digits", "seed")}, **books}
    rows = {
        "compressed": (f"compression on{stated}", {**used, **own, **given}),
        "uncompressed": ("compression off", used),
    }
    for cell in (cell for cell in results["cells"] if cell["variant"] in rows):
        length, (row, used) = cell["length"], rows[cell["variant"]]
        value, shown = _share(cell)
        dataset = Dataset("recall", f"a number planted in books, {row}", f"recall, {row}")
        table, name = "a planted number, exact match, %, by tokens", f"exact match, %, {length} tokens"
        counts = {"samples": cell["samples"], "length": length}
        yield Score(dataset, table, row, short_length(length), shown, value, "exact_match", name, used, counts, length)
    for cell in (cell for cell in results["perplexity"] if cell["variant"] in rows):
        length, number = cell["length"], _number(cell["perplexity"])
        row = f"compression off, of the last {cell['tokens']} tokens of passages of books"
        dataset = Dataset("recall", f"perplexity, {row}", f"perplexity, {row}")
        table, name = "perplexity, by tokens", f"perplexity, {length} tokens"
        counts = {"passages": cell["samples"], "length": length}
        taken = {"counted": cell["tokens"], "seed": settings["seed"], **books}
        yield Score(
            dataset, table, row, short_length(length), f"{number:.2f}", number, "perplexity", name, taken, counts, length
        )


def _fidelity(results: dict[str, Any], model: CardModel) -> Iterator[Score]:
    name = _name_by_kind(results, model)
    assert name is not None
    one, settings = results["models"][name], results["settings"]
    used = {"length": settings["length"], "books": len(results["description"]["books"])}
    counts = {"passages": settings["passages"]}
    measures = (
        ("etmf", "ETMF", "distance", {"paper": "paper", "corrected": "corrected"}),
        ("eclmf", "ECLMF", "gap", {"paper": "paper", "held_out_r2": "held-out R^2"}),
    )
    for key, measure, what, forms in measures:
        dataset = Dataset("fidelity", f"{measure} on books", key)
        for form, label in forms.items():
            for place, values in one[key].items():
                if values is not None:  # a gap of more layers than there are
                    number = _number(values[form]["mean"])
                    table, title = f"{measure}, by {what}", f"{measure}, {label}, {what} {place}"
                    metric = f"{key}_{form}"
                    yield Score(dataset, table, label, place, f"{number:.3f}", number, metric, title, used, counts)


_CHECKS: dict[Reader, Callable[[dict[str, Any], CardModel, Path], bool]] = {
    _longbench: _check_files,
    _leval: _check_files,
    _memory: _check_weights,
    _recall: _check_settings,
    _fidelity: _check_kind,
}
