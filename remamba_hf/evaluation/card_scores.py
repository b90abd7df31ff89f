# SPDX-License-Identifier: Apache-2.0
"""The numbers in the files of `remamba eval` that are of one checkpoint, with their names and how they were measured.

A file is of a checkpoint if it says so: by a digest of files or weights, a commit on the Hub, or, where it has neither, as
files of earlier versions, by the kind of model and its settings. What it says of other models beside it, such as baselines,
is left out.
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from remamba_hf.checkpoint_files import TOKENIZER_FILES, first_line, has_tokenizer, read_json
from remamba_hf.families import FAMILIES

from . import fidelity, leval, longbench
from .causal_models import Checkpoint, digest_of_files
from .checkpoints import compression_weights, digest, load_model, reading_family, weights_read
from .memory_report import COLUMNS
from .reporting import percent_with_interval, short_length

TOOL = "remamba_hf"  # in an environment, the version of what has measured
DECIMALS = 4  # of the values in a card's metadata
_BENCHMARKS = (longbench.LongBench.name, leval.LEval.name)
BOOK_KINDS = ("passkey", "documents", "perplexity", "recall", "fidelity")
KINDS = (*_BENCHMARKS, *BOOK_KINDS)  # of datasets
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Dataset:
    """What was measured on.

    Attributes:
        kind: of the results, one word.
        name: for people.
        config: what tells it from others of its kind.
        hub: the dataset on the Hub that the data came from; None: files of a folder.
        split: of that dataset, if it is known.
        is_whole: whether all of it was measured that a result of the dataset has to be of.
    """

    kind: str
    name: str
    config: str
    hub: str | None = None
    split: str | None = None
    is_whole: bool = True

    @property
    def is_benchmark(self) -> bool:
        """Whether it has configurations of its own, and a number for each."""
        return self.kind in _BENCHMARKS


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
        self.kind = str(self.config.get("model_type") or "")
        self.weights = cache(self._weights)

    def _weights(self, dtype: str) -> dict[str, str]:
        """The digests of weights by which evaluations tell models: `weights`, those that a plain pass reads, and
        `compression_weights`.

        Raises:
            CheckpointError: a ValueError; they cannot be loaded.
        """
        if dtype not in _DTYPES:
            raise _Damaged(f"{dtype!r} stands where a dtype should")
        if "auto_map" in self.config and reading_family(self.kind) is None:
            return {"weights": "of a model with code of its own, which does not run here"}
        model = load_model(str(self.folder), "cpu", dtype)
        return {"weights": digest(weights_read(model)), "compression_weights": digest(compression_weights(model))}

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
        ValueError: the file cannot be read, is none of `remamba eval`, is not whole, has no number for a card, or is of
            another model.
    """
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}): give files that `remamba eval` wrote") from error
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({first_line(error)}): give a file that `remamba eval` wrote") from error
    reader = _reader(results)
    if reader is None:
        raise ValueError(f"{file} holds no results for a card: give JSON files that `remamba eval` wrote")
    try:
        is_identified = _CHECKS[reader](results, model, file)
        scores = tuple(_with_books(score, results) for score in reader(results, model))
        environment = _environment(results)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not as `remamba eval` writes it ({first_line(error)}): evaluate again") from error
    except _Damaged as error:
        raise ValueError(f"{file} is not as `remamba eval` writes it: {error}. Evaluate again") from error
    if not scores:
        raise ValueError(f"{file} has no number for a card yet: let the evaluation come to its end")
    date = results.get("date")
    return Results(file, scores, environment, date if isinstance(date, str) else None, is_identified)


def _with_books(score: Score, results: Mapping[str, Any]) -> Score:
    """A number with the dataset of the Hub that its books were read from, if they were, and whether these were all."""
    description = results.get("description") or {}
    read, first = description.get("dataset") or {}, description.get("first_books")
    if first is not None:
        some = replace(score.dataset, is_whole=False)
        score = replace(score, dataset=some, settings={**score.settings, "first_books": first})
    if read.get("revision") is None:  # a folder's books or files
        return score
    dataset = replace(score.dataset, hub=read["id"], split=read["split"])
    return replace(score, dataset=dataset, settings={**score.settings, "dataset": read["id"], "revision": read["revision"]})


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
    if "predictions" in results["settings"]:
        raise ValueError(f"{file} has scores of --predictions, which do not tell whose they are: give results of a --model")
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
    """Of memory.py."""
    models = results["description"]["models"]
    if _name_by_weights(models, model) is None:
        _refuse_weights(file, models, model)
    return True


def _check_recall(results: dict[str, Any], model: CardModel, file: Path) -> bool:
    """By weights where the file has digests of them, and by the settings that prompts were compressed with."""
    models = results["description"].get("models") or {}
    name = _name_by_weights(models, model)
    if models and name is None:
        _refuse_weights(file, models, model)
    if name != "plain":
        _check_settings(results, model, file)
    return bool(models)


def _check_fidelity(results: dict[str, Any], model: CardModel, file: Path) -> bool:
    models = results["models"]
    name = _name_in_fidelity(models, model)
    if name is None and any("weights" in one for one in models.values()):
        _refuse_weights(file, models, model)
    if name is None:
        said = "; ".join(f"{one['model_type']} of {one['layers']} layers" for one in models.values())
        _refuse(file, said, model, f"{model.kind} of {model.config.get('num_hidden_layers')} layers")
    return "weights" in models[name]


def _name_by_weights(models: Mapping[str, Mapping[str, Any]], model: CardModel) -> str | None:
    """Under which name a file has the model: with all the digests that it has of it."""
    for name, one in models.items():
        if one["model_type"] == model.kind:
            found = model.weights(one["dtype"])
            if one["weights"] == found["weights"] and one.get("compression_weights") in (None, found["compression_weights"]):
                return name
    return None


def _name_in_fidelity(models: Mapping[str, Mapping[str, Any]], model: CardModel) -> str | None:
    name = _name_by_weights({name: one for name, one in models.items() if "weights" in one}, model)
    kind = model.kind, model.config.get("num_hidden_layers")
    older = (key for key, one in models.items() if "weights" not in one and (one["model_type"], one["layers"]) == kind)
    return name if name is not None else next(older, None)


def _refuse_weights(file: Path, models: Mapping[str, Mapping[str, Any]], model: CardModel) -> None:
    told = ("weights", "compression_weights")
    said = "; ".join(
        f"{one['label']} ({one['model_type']}, {one['dtype']}) {' and '.join(one[key] for key in told if key in one)}"
        for one in models.values()
    )
    found = (f"{' and '.join(model.weights(one['dtype']).values())} in {one['dtype']}" for one in models.values())
    _refuse(file, f"by the SHA-256 of weights: {said}", model, f"{model.kind}, {', '.join(dict.fromkeys(found))}")


def _check_settings(results: dict[str, Any], model: CardModel, file: Path) -> None:
    said = {"model_type": results["description"].get("family"), **results["description"].get("model_settings", {})}
    differing = {name: value for name, value in said.items() if value is not None and model.config.get(name) != value}
    if differing or model.kind not in FAMILIES:
        there = ", ".join(f"{name} {value}" for name, value in differing.items()) or f"one of {', '.join(FAMILIES)}"
        names = differing or ["model_type"]
        _refuse(file, f"with {there}", model, "with " + ", ".join(f"{name} {model.config.get(name)}" for name in names))


def _reading(settings: Mapping[str, Any], model: CardModel) -> tuple[str, dict[str, Any]]:
    """How prompts of a benchmark were read, for names and tables, and all that answers depend on."""
    compression = _there(settings["compression"] or {})
    used = {name: settings[name] for name in ("max_length", "truncation", "decoding", "dtype")}
    if model.kind not in FAMILIES:
        return "", used
    state = "on" if compression else "off"
    return f", compression {state}", {"compression": state, **compression, **used}


def _source(results: Mapping[str, Any], repository: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where a benchmark's data came from: fields of `Dataset`, and what is told beside the settings.

    Files that do not say so were not read from the Hub, nor as a whole.
    """
    is_hubs, limit = results.get("data", {}) is None, results.get("limit", "unknown")
    fields = {"hub": repository if is_hubs else None, "split": "test", "is_whole": limit is None}
    return fields, {**({} if is_hubs else {"data": "local files"}), **_there({"limit": limit})}


def _there(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _longbench(results: dict[str, Any], model: CardModel) -> Iterator[Score]:
    reading, settings = _reading(results["settings"], model)
    summary, data = results["summary"], results.get("data") or {}
    source, told = _source(results, longbench.HUB_REPOSITORY)
    settings |= told
    files = {
        task: task if f"{task}.jsonl" in data and f"{task}_e.jsonl" not in data else f"{task}_e" for task in summary["tasks"]
    }
    title = "LongBench-E" if all(name.endswith("_e") for name in files.values()) else "LongBench"
    table = f"{title}, score by words{reading}"
    counts = {"samples": results["settings"]["samples"]["count"], "tasks": len(files)}
    rows = [(task, files[task], one, {"samples": sum(one["samples"].values())}) for task, one in summary["tasks"].items()]
    for row, config, one, count in (*rows, ("average", title.lower().replace("-", "_"), summary, counts)):
        own = _of_all_tasks(source, summary, longbench.TASKS) if row == "average" else source
        dataset = Dataset(longbench.LongBench.name, f"{title}, {row}", config, **own)
        for column, value in (*one["buckets"].items(), ("average", one["average"])):
            if value is not None:
                # A task's score by length stands in the text alone: the metadata would be several hundred lines.
                metric = "score" if column == "average" or row == "average" else None
                number, shown = _number(value), f"{_number(value):.2f}"
                yield Score(dataset, table, row, column, shown, number, metric, f"score, {column}{reading}", settings, count)


def _of_all_tasks(source: Mapping[str, Any], summary: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """The `Dataset` fields of an average, which is one of the benchmark only if all tasks are in it."""
    return {**source, "is_whole": source["is_whole"] and set(tasks) <= set(summary["tasks"])}


def _leval(results: dict[str, Any], model: CardModel) -> Iterator[Score]:
    reading, settings = _reading(results["settings"], model)
    summary = results["summary"]
    source, told = _source(results, leval.HUB_REPOSITORY)
    settings |= told
    counts = {"samples": results["settings"]["samples"]["count"], "tasks": len(summary["tasks"])}
    rows = [(task, task, one["accuracy"], {"samples": one["samples"]}) for task, one in summary["tasks"].items()]
    for column, config, value, count in (*rows, ("average", "closed_ended", summary["average"], counts)):
        if value is not None:
            own = _of_all_tasks(source, summary, leval.TASKS) if column == "average" else source
            dataset = Dataset(leval.LEval.name, f"L-Eval, {column}", config, **own)
            number, table = _number(value), "L-Eval, closed-ended tasks"
            row, metric = f"exact match, %{reading}", "exact_match"
            yield Score(dataset, table, row, column, f"{number:.2f}", number, metric, row, settings, count)


def _memory(results: dict[str, Any], model: CardModel) -> Iterator[Score]:
    description, settings = results["description"], results["settings"]
    name = _name_by_weights(description["models"], model)
    assert name is not None
    used = {"dtype": description["models"][name]["dtype"], **_plain_reading(model)}
    books = {part: len(description["books"]) for part in ("passkey", "documents")}
    books["perplexity"] = len(description["perplexity_books"])  # those that are long enough
    for part, cells in ((part, results[part]) for part in books):
        own = {"books": books[part], **used}
        for cell in sorted((cell for cell in cells if cell["model"] == name), key=lambda cell: cell[COLUMNS[part][0]]):
            yield _perplexity(settings, own, cell) if part == "perplexity" else _recalled(part, settings, own, cell)


def _plain_reading(model: CardModel) -> dict[str, str]:
    """What tells that a model was measured without the compression that it has."""
    return {"compression": "off"} if model.kind in FAMILIES else {}


def _with_reading(row: str, used: Mapping[str, Any]) -> str:
    return f"{row}, compression off" if "compression" in used else row


def _people(asked: int, distractors: int) -> str:
    people = asked + distractors
    if people == 1:
        return "one person's number"
    return f"number{'s' if asked > 1 else ''} of {asked} of {people} people"


def _repeats(cell: Mapping[str, Any]) -> dict[str, Any]:
    """How many times a text longer than all books has these."""
    return _there({"books_repeated": cell.get("books_repeated")})


def _recalled(part: str, settings: Mapping[str, Any], own: Mapping[str, Any], cell: Mapping[str, Any]) -> Score:
    row = _with_reading(_people(settings["keys"] if part == "passkey" else 1, settings["distractors"]), own)
    names = ["distractors", "digits", "seed", "keys" if part == "passkey" else "document_length"]
    used = {**{name: settings[name] for name in names}, **own, **_repeats(cell)}
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


def _perplexity(settings: Mapping[str, Any], own: Mapping[str, Any], cell: Mapping[str, Any]) -> Score:
    length, value = cell["length"], cell["perplexity"]
    scored, used = _scored(settings)
    row = _with_reading(scored, own)
    dataset = Dataset("perplexity", f"perplexity {row}", f"perplexity, {row}")
    counts = {"windows": cell["windows"], "length": length}
    number = None if value is None else _number(value)
    shown = "INF" if number is None else f"{number:.2f}"
    name, table = f"perplexity, {length} tokens", "perplexity, by tokens of context"
    own = {**used, **own}
    return Score(dataset, table, row, short_length(length), shown, number, "perplexity", name, own, counts, length)


def _scored(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Which tokens a perplexity is of, for names and tables, and the settings that say so."""
    stride, windows, longest = settings.get("stride"), settings["windows"], max(settings["perplexity_lengths"])
    if stride is None:
        used = {"windows_per_book": windows, "counted": settings["counted"], "longest": longest}
        return f"of the last {settings['counted']} tokens of windows of books", used
    tokens = f"the {windows * stride} tokens" if windows else "every token"
    used = {"stride": stride, "windows_per_book": windows or "all", "longest": longest}
    return f"of {tokens} of books behind the first {longest - stride}, stride {stride}", used


def _recall(results: dict[str, Any], model: CardModel) -> Iterator[Score]:
    settings, description = results["settings"], results["description"]
    models = description.get("models") or {}
    name = _name_by_weights(models, model) or "model"
    books = {"books": len(description["books"]), **_there({"dtype": models.get(name, {}).get("dtype")})}
    asked = {**{key: settings[key] for key in ("distractors", "digits", "seed")}, **books}
    who = _people(1, settings["distractors"])
    others = f", {who}" if settings["distractors"] else ""
    given = {f"compression_{key}": settings[key] for key in ("span", "ratio") if settings[key] is not None}
    own = _there(description.get("model_settings", {}))
    if "compression_ratio" in given:
        own.pop("compression_max_kept", None)  # bounds the checkpoint's own ratio only
    stated = "".join(f", {key.removeprefix('compression_')} {value}" for key, value in given.items())
    off, plain = (f"compression off{others}", asked), (who, asked)
    if name == "plain":
        rows = {"plain": off if model.kind in FAMILIES else plain}
    else:
        rows = {"compressed": (f"compression on{stated}{others}", {**asked, **own, **given}), "uncompressed": off}
    for cell in (cell for cell in results["cells"] if cell["variant"] in rows):
        yield _recalled_number(cell, *rows[cell["variant"]])
    reading = "compression off, " if model.kind in FAMILIES else ""
    for cell in (cell for cell in results["perplexity"] if cell["variant"] in rows):
        yield _passage_perplexity(cell, reading, {"counted": cell["tokens"], "seed": settings["seed"], **books})


def _recalled_number(cell: Mapping[str, Any], row: str, asked: Mapping[str, Any]) -> Score:
    length = cell["length"]
    value, shown = _share(cell)
    dataset = Dataset("recall", f"a number planted in books, {row}", f"recall, {row}")
    table, name = "a planted number, exact match, %, by tokens", f"exact match, %, {length} tokens"
    counts, used = {"samples": cell["samples"], "length": length}, {**asked, **_repeats(cell)}
    return Score(dataset, table, row, short_length(length), shown, value, "exact_match", name, used, counts, length)


def _passage_perplexity(cell: Mapping[str, Any], reading: str, used: Mapping[str, Any]) -> Score:
    length, number = cell["length"], _number(cell["perplexity"])
    row = f"{reading}of the last {cell['tokens']} tokens of passages of books"
    dataset = Dataset("recall", f"perplexity, {row}", f"perplexity, {row}")
    table, name = "perplexity, by tokens", f"perplexity, {length} tokens"
    counts = {"passages": cell["samples"], "length": length}
    return Score(
        dataset, table, row, short_length(length), f"{number:.2f}", number, "perplexity", name, used, counts, length
    )


def _fidelity(results: dict[str, Any], model: CardModel) -> Iterator[Score]:
    name = _name_in_fidelity(results["models"], model)
    assert name is not None
    one, settings = results["models"][name], results["settings"]
    used: dict[str, Any] = {"books": len(results["description"]["books"])}
    used |= {**_there({"dtype": one.get("dtype")}), **_plain_reading(model)}
    counts = {"passages": settings["passages"]}
    by_length = fidelity.measures_by_length(results, name)
    measures = (
        ("etmf", "ETMF", "distance", {"paper": "paper", "corrected": "corrected"}),
        ("eclmf", "ECLMF", "gap", {"paper": "paper", "held_out_r2": "held-out R^2"}),
    )
    for (length, found), (key, measure, what, forms) in itertools.product(by_length.items(), measures):
        several = f" of {short_length(length)} tokens" if len(by_length) > 1 else ""
        dataset = Dataset("fidelity", f"{measure} on books{several}", f"{key}{several.replace(' ', '_')}")
        for form, label in forms.items():
            for place, values in found[key].items():
                if values is not None:  # a gap of more layers than there are
                    number = _number(values[form]["mean"])
                    table, title = f"{measure}{several}, by {what}", f"{measure}, {label}, {what} {place}"
                    metric = f"{key}_{form}"
                    own = {"length": length, **used}
                    yield Score(dataset, table, label, place, f"{number:.3f}", number, metric, title, own, counts)


_CHECKS: dict[Reader, Callable[[dict[str, Any], CardModel, Path], bool]] = {
    _longbench: _check_files,
    _leval: _check_files,
    _memory: _check_weights,
    _recall: _check_recall,
    _fidelity: _check_fidelity,
}
