# SPDX-License-Identifier: Apache-2.0
"""Every model through `remamba eval`, and what its result files say as one list of measurements."""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from remamba_hf.cli import main as remamba

from .recipe import ARMS, Recipe
from .training import OutOfTime

START = "start"  # what all arms start from, evaluated as it is
WHOLE = "whole"  # prompts as they are


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        name: of its result file, and of its task up to the first hyphen.
        task: of `remamba eval`.
        arguments: behind the task, but for model and output.
        setting: `setting_name` of the compression, or of what prompts are cut to; WHOLE.
        is_cut: prompts are cut to the tokens that compression leaves.
    """

    name: str
    task: str
    arguments: tuple[str, ...]
    setting: str = WHOLE
    is_cut: bool = False


@dataclass(frozen=True)
class Measurement:
    """One number.

    Attributes:
        arm, seed: of the model; the control whose prompts are cut is an arm of its own.
        task: recall, recall-early (facts in the window's part of the text), recall-late, lines, longeval, questions or
            perplexity.
        setting: of the compression; WHOLE for what has none.
        column: tokens of a prompt, or the name of a file.
        value: percent of right answers, ROUGE-L, or perplexity.
        count: of answers or windows.
    """

    arm: str
    seed: int
    task: str
    setting: str
    column: str
    value: float
    count: int


def setting_name(span: float, ratio: float) -> str:
    return f"p={span:g}, rho={ratio:g}"


def tokens_left(length: int, span: float, ratio: float) -> int:
    """P - M + K: tokens of a prompt after compression."""
    window = min(max(math.ceil(length * span), 1), length - 1)
    return length - window + math.ceil(window * ratio)


def jobs(recipe: Recipe, data: Path, arm: str) -> list[Job]:
    """All that a model is asked; the arm that compresses nothing also with its prompts cut, where `remamba eval` can cut."""
    settings = recipe.evaluation.compression
    result = [Job("perplexity", "perplexity", _perplexity(recipe, data))]
    if arm not in ARMS or ARMS[arm].selection is None:
        result.append(Job("recall", "recall", _recall(recipe, data)))
        result += [Job(name, task, (*words, "--no-compress")) for name, task, words in _generated(recipe, data)]
    else:
        for number, (span, ratio) in enumerate(settings):
            setting = setting_name(span, ratio)
            planted = ("--only-compressed", "--span", f"{span}", "--ratio", f"{ratio}")
            result.append(Job(f"recall-{number}", "recall", (*_recall(recipe, data), *planted), setting))
            given = ("--compression-span", f"{span}", "--compression-ratio", f"{ratio}")
            for name, task, words in _generated(recipe, data):
                result.append(Job(f"{name}-{number}", task, (*words, *given), setting))
    if arm == "sft":
        result += [job for number in range(len(settings)) for job in _cut(recipe, data, number)]
    return result


def _recall(recipe: Recipe, data: Path) -> tuple[str, ...]:
    settings = recipe.evaluation
    return (
        *("--books", f"{data / 'held_out'}", "--lengths", *map(str, settings.lengths), "--samples", f"{settings.samples}"),
        *("--distractors", f"{settings.distractors}", "--digits", f"{recipe.digits}", "--perplexity-tokens", "0"),
        *("--batch-tokens", f"{settings.batch_tokens}"),
    )


def _perplexity(recipe: Recipe, data: Path) -> tuple[str, ...]:
    settings = recipe.evaluation
    return (
        *("--books", f"{data / 'held_out'}", "--lengths", *map(str, settings.lengths)),
        *("--reference-length", f"{settings.lengths[0]}", "--windows", f"{settings.windows}"),
        *("--counted", f"{settings.counted}", "--batch-tokens", f"{settings.batch_tokens}"),
    )


def _generated(recipe: Recipe, data: Path) -> list[tuple[str, str, tuple[str, ...]]]:
    """Name, task and arguments of what is answered with generated text; where its files are there."""
    settings = recipe.evaluation
    # LongEval's files may be a little longer than the longest text of ours: none is cut.
    found = (
        ("lines", "longeval", 2 * max(settings.lengths)),
        ("longeval", "longeval", 2 * max(settings.lengths)),
        ("questions", "pairs", settings.question_length),
    )
    return [(name, task, _asked(recipe, data / name, most)) for name, task, most in found if (data / name).is_dir()]


def _asked(recipe: Recipe, folder: Path, max_length: int) -> tuple[str, ...]:
    return ("--data", f"{folder}", "--max-length", f"{max_length}", "--batch-size", f"{recipe.evaluation.batch_size}")


def _cut(recipe: Recipe, data: Path, number: int) -> Iterator[Job]:
    """Prompts without their middle, as many tokens as compression leaves."""
    settings = recipe.evaluation
    reading = settings.compression[number]
    setting = setting_name(*reading)
    for length in settings.lengths if (data / "lines").is_dir() else ():
        words = _asked(recipe, data / "lines", tokens_left(length, *reading))
        name = f"lines-cut-{number}-{length}"
        yield Job(name, "longeval", (*words, "--no-compress", "--tasks", f"{length}_tokens"), setting, is_cut=True)
    if (data / "questions").is_dir():
        words = _asked(recipe, data / "questions", tokens_left(settings.question_length, *reading))
        yield Job(f"questions-cut-{number}", "pairs", (*words, "--no-compress"), setting, is_cut=True)


def evaluate(recipe: Recipe, data: Path, arm: str, model: Path, folder: Path, deadline: float) -> None:
    """Asks a model all that it has not been asked; result files are `folder/NAME.json`, and `folder/done.json` at the end.

    Raises:
        OutOfTime: the deadline came between two commands.
        RuntimeError: a command failed; it has said why.
    """
    if (folder / "done.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    wanted = jobs(recipe, data, arm)
    for job in wanted:
        output = folder / f"{job.name}.json"
        done = folder / f"{job.name}.done"
        if done.exists():
            continue
        if time.monotonic() >= deadline:
            raise OutOfTime(f"evaluation of {folder.name}: before {job.name}")
        command = ["eval", job.task, "--model", str(model), "--output", str(output), *job.arguments]
        if remamba(command):
            raise RuntimeError(f"remamba {' '.join(command)} failed")
        done.touch()
    (folder / "done.json").write_text(json.dumps([asdict(job) for job in wanted], indent=2) + "\n")


def measurements(recipe: Recipe, folder: Path, arm: str, seed: int) -> list[Measurement]:
    """All that the result files of one model say.

    Args:
        folder: that `evaluate` has finished.
    """
    result = []
    for entry in json.loads((folder / "done.json").read_text()):
        job = Job(**entry)
        task = job.name.split("-")[0]
        content = json.loads((folder / f"{job.name}.json").read_text())
        name = f"{arm}, prompt cut" if job.is_cut else arm
        for one, setting, column, value, count in _READERS[task](content, recipe, job):
            result.append(Measurement(name, seed, one, setting, column, value, count))
    return result


_Numbers = Iterator[tuple[str, str, str, float, int]]


def _read_recall(content: dict[str, Any], recipe: Recipe, job: Job) -> _Numbers:
    variant = "uncompressed" if job.setting == WHOLE else "compressed"
    for cell in content["cells"]:
        if cell["variant"] != variant:
            continue
        column = str(cell["length"])
        yield "recall", job.setting, column, 100 * cell["accuracy"], cell["samples"]
        for span, ratio in recipe.evaluation.compression:
            name = setting_name(span, ratio)
            if job.setting not in (WHOLE, name):
                continue
            for task, early in (("recall-early", True), ("recall-late", False)):
                right = [record["right"] for record in cell["records"] if (record["depth"] < span) == early]
                if right:
                    yield task, name, column, 100 * sum(right) / len(right), len(right)


def _read_generated(mark: str) -> Callable[[dict[str, Any], Recipe, Job], _Numbers]:
    def read(content: dict[str, Any], recipe: Recipe, job: Job) -> _Numbers:
        task = job.name.split("-")[0]
        for column, summary in content["summary"]["tasks"].items():
            yield task, job.setting, column.removesuffix("_tokens"), summary[mark], summary["samples"]

    return read


def _read_perplexity(content: dict[str, Any], recipe: Recipe, job: Job) -> _Numbers:
    for cell in content["perplexity"]:
        if cell["perplexity"] is not None:
            yield "perplexity", WHOLE, str(cell["length"]), cell["perplexity"], cell["windows"]


_READERS: dict[str, Callable[[dict[str, Any], Recipe, Job], _Numbers]] = {
    "recall": _read_recall,
    "lines": _read_generated("accuracy"),
    "longeval": _read_generated("accuracy"),
    "questions": _read_generated("rouge_l"),
    "perplexity": _read_perplexity,
}
