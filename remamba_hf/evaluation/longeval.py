# SPDX-License-Identifier: Apache-2.0
"""LongEval's line retrieval: the number of one of many numbered lines (github.com/DachengLi1/LongChat, `longeval`).

A file has texts of one length, such as `200_lines.jsonl`, and is a task. Prompts are those of the files, without a chat's
roles around them. As in `longeval/utils.py` of that repository, an answer's last number counts.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from .reporting import table_head, table_row
from .tasks import Answered, Sample, json_lines

MAX_NEW_TOKENS = 100


class LongEvalLines:
    """LongEval's line retrieval, from its files.

    Args:
        tasks: names of files without `.jsonl`; none: all there are.
    """

    name = "longeval"

    def __init__(self, tasks: Sequence[str] = ()):
        self.tasks = tuple(tasks)

    def samples(self, data: Path | None) -> list[Sample]:
        """One for every line of the files, file by file: by their numbers of lines, and by name.

        Args:
            data: a folder with `TASK.jsonl`, or one that has them in `lines/` or `lines/testcases/`.

        Raises:
            ValueError: no folder, or a line that is not what it should be; names file and line.
            FileNotFoundError: a folder without the files.
        """
        if data is None:
            raise ValueError(
                "LongEval is not on the Hub: give --data a folder with longeval/evaluation/lines/testcases of "
                "github.com/DachengLi1/LongChat"
            )
        files = _files(Path(data), self.tasks)
        self.tasks = tuple(file.stem for file in files)
        return [sample for file in files for sample in _samples(file)]

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        """`exact_match`: 0 or 100."""
        numbers = re.findall("[0-9]+", answer)
        return {"exact_match": 100.0 * (bool(numbers) and int(numbers[-1]) == int(sample.references[0]))}

    def summary(self, answered: Sequence[Answered]) -> dict[str, Any]:
        """`tasks`: by name, `accuracy` (0 to 100) and number of `samples`. `average`: of the tasks that have samples."""
        scores: dict[str, list[float]] = {task: [] for task in self.tasks}
        for one in answered:
            scores.setdefault(one.sample.details["task"], []).append(one.scores["exact_match"])
        tasks = {
            task: {"accuracy": fmean(marks) if marks else None, "samples": len(marks)} for task, marks in scores.items()
        }
        there = [summary["accuracy"] for summary in tasks.values() if summary["accuracy"] is not None]
        return {"tasks": tasks, "average": fmean(there) if there else None}

    def table(self, summaries: Mapping[str, Mapping[str, Any]]) -> str:
        """Models by tasks; empty where there is no sample."""
        tasks = list(dict.fromkeys(task for summary in summaries.values() for task in summary["tasks"]))
        text = table_head("exact match, %", [*tasks, "average"])
        for name, summary in summaries.items():
            values = [summary["tasks"].get(task, {}).get("accuracy") for task in tasks]
            text += table_row(name, ["" if value is None else f"{value:.2f}" for value in [*values, summary["average"]]])
        return text


def _files(data: Path, tasks: Sequence[str]) -> list[Path]:
    folders = [data, data / "lines", data / "lines" / "testcases"]
    folder = next((folder for folder in folders if any(folder.glob("*.jsonl"))), None)
    if folder is None:
        raise FileNotFoundError(f"{data} has no .jsonl file: give a folder with LongEval's files, such as 200_lines.jsonl")
    there = {file.stem: file for file in sorted(folder.glob("*.jsonl"), key=_size_and_name)}
    missing = [task for task in tasks if task not in there]
    if missing:
        raise FileNotFoundError(f"{folder} has no {missing[0]}.jsonl: choose from {', '.join(there)}")
    return [file for task, file in there.items() if not tasks or task in tasks]


def _size_and_name(file: Path) -> tuple[int, str]:
    number = re.match(r"\d+", file.stem)
    return int(number[0]) if number else 0, file.stem


def _samples(file: Path) -> Iterator[Sample]:
    for number, place, fields in json_lines(file):
        if not isinstance(fields.get("prompt"), str) or not fields["prompt"]:
            raise ValueError(f'{place} has no text "prompt": it is no item of LongEval\'s line retrieval')
        expected = fields.get("expected_number")
        if not isinstance(expected, int) or isinstance(expected, bool):
            raise ValueError(f'{place} has no number "expected_number": it is no item of LongEval\'s line retrieval')
        identity, details = f"{file.stem}/{number}", {"task": file.stem}
        yield Sample(identity, fields["prompt"], MAX_NEW_TOKENS, references=(str(expected),), details=details)
