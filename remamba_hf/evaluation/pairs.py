# SPDX-License-Identifier: Apache-2.0
"""Prompts with the responses that were wanted, from files: how near a fine-tuned model's answers come on held-out data.

A file of JSON lines with `prompt` and `response` is a task. Prompts are given as they are, without a template. An answer is
marked by ROUGE-L (as LongBench takes it for QMSum) and by whether it is the response to the letter.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from .longbench_scores import rouge_l
from .reporting import table_head, table_row
from .tasks import Answered, Sample, json_lines

MAX_NEW_TOKENS = 128
MARKS = {"rouge_l": "ROUGE-L", "exact_match": "exact match, %"}


class Pairs:
    """Pairs of a prompt and a response.

    Args:
        tasks: names of files without `.jsonl`; none: all there are.
    """

    name = "pairs"

    def __init__(self, tasks: Sequence[str] = ()):
        self.tasks = tuple(tasks)

    def samples(self, data: Path | None) -> list[Sample]:
        """One for every line of the files, file by file, by name.

        Args:
            data: a folder with `TASK.jsonl`, or one such file.

        Raises:
            ValueError: no folder, or a line that is not what it should be; names file and line.
            FileNotFoundError: a folder without the files.
        """
        if data is None:
            raise ValueError("there are no pairs on the Hub: give --data a folder of .jsonl files, or one file")
        files = [data] if data.is_file() else sorted(data.glob("*.jsonl"))
        there = {file.stem: file for file in files}
        missing = [task for task in self.tasks if task not in there]
        if missing or not there:
            raise FileNotFoundError(f"{data} has no {missing[0] if missing else '*'}.jsonl with prompts and responses")
        self.tasks = tuple(task for task in there if not self.tasks or task in self.tasks)
        return [sample for task in self.tasks for sample in _samples(there[task])]

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        """`rouge_l` and `exact_match`, 0 to 100; white space around an answer does not count."""
        given, wanted = answer.strip(), sample.references[0].strip()
        return {"rouge_l": 100 * rouge_l(given, wanted), "exact_match": 100.0 * (given == wanted)}

    def summary(self, answered: Sequence[Answered]) -> dict[str, Any]:
        """`tasks`: by name, the mean of every mark and the number of `samples`. `average`: of the tasks' ROUGE-L."""
        tasks: dict[str, dict[str, Any]] = {}
        for task in self.tasks:
            marks = [one.scores for one in answered if one.sample.details["task"] == task]
            means = {name: fmean(mark[name] for mark in marks) if marks else None for name in MARKS}
            tasks[task] = {**means, "samples": len(marks)}
        there = [summary["rouge_l"] for summary in tasks.values() if summary["rouge_l"] is not None]
        return {"tasks": tasks, "average": fmean(there) if there else None}

    def table(self, summaries: Mapping[str, Mapping[str, Any]]) -> str:
        """Models by tasks, a table for each mark; empty where there is no sample."""
        tasks = list(dict.fromkeys(task for summary in summaries.values() for task in summary["tasks"]))
        return "\n".join(_table(mark, tasks, summaries) for mark in MARKS)


def _table(mark: str, tasks: Sequence[str], summaries: Mapping[str, Mapping[str, Any]]) -> str:
    text = table_head(MARKS[mark], tasks)
    for name, summary in summaries.items():
        values = [summary["tasks"].get(task, {}).get(mark) for task in tasks]
        text += table_row(name, ["" if value is None else f"{value:.2f}" for value in values])
    return text


def _samples(file: Path) -> Iterator[Sample]:
    for number, place, fields in json_lines(file):
        for name in ("prompt", "response"):
            if not isinstance(fields.get(name), str) or not fields[name].strip():
                raise ValueError(f'{place} has no text "{name}"')
        reference, details = (fields["response"],), {"task": file.stem}
        yield Sample(f"{file.stem}/{number}", fields["prompt"], MAX_NEW_TOKENS, references=reference, details=details)
