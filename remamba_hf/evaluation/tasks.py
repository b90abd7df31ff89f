# SPDX-License-Identifier: Apache-2.0
"""What a benchmark whose answers are generated consists of: samples, a score for each answer, and a summary of all scores.

Benchmarks are modules beside this one; generation_eval.py is the loop that asks a model and goes on from what it has asked.
"""

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Sample:
    """One question.

    identity: unique within its task, and the same in every run.
    prompt: the whole text that is given to the model, filled in as the benchmark does it.
    max_new_tokens: of the answer.
    references: answers that count as right; what the scorer makes of several is its own affair.
    stop: texts that end an answer, and are no part of it; empty: the tokenizer's end of text alone. With one of them no
        answer begins, and in the white space before an answer they end nothing.
    details: what scorer and summary need besides, such as the dataset or the length in words; JSON values only.
    """

    identity: str
    prompt: str
    max_new_tokens: int
    references: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answered:
    """A sample with the model's answer and its scores, by name; higher is better, 0 to 100."""

    sample: Sample
    answer: str
    scores: Mapping[str, float]


class Task(Protocol):
    """A benchmark.

    name: as on the command line.
    """

    name: str

    def samples(self, data: Path | None) -> list[Sample]:
        """All of them, in the benchmark's order.

        Args:
            data: a folder with files as the benchmark publishes them; None: the Hub.

        Raises:
            ValueError: a line that is not what it should be; names file and line.
            OSError: a missing file; names it.
        """

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        """Of one answer, by name; higher is better, 0 to 100."""

    def summary(self, answered: Sequence[Answered]) -> dict[str, Any]:
        """Means as the benchmark takes them: JSON values, `None` where there is no sample."""

    def table(self, summaries: Mapping[str, Mapping[str, Any]]) -> str:
        """Markdown of the summaries of one or several models, by their names."""


def json_lines(path: Path | zipfile.Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """The objects in a file of JSON lines, each behind the number of its line and its place for messages, "FILE, line 3".
    Empty lines are left out.

    Raises:
        ValueError: a line that is no JSON object, or with text that is none; names file and line.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                place = f"{path}, line {number}"
                yield number, place, _json_object(place, line)


def _json_object(place: str, line: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(line)
        json.dumps(fields, ensure_ascii=False).encode()  # JSON can escape what UTF-8, and so a tokenizer, does not take
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise ValueError(f"{place} has {half}, half of a surrogate pair, which is no character: remove it") from error
    except RecursionError as error:
        raise ValueError(f"{place} is nested too deeply: it is no item of a benchmark") from error
    except ValueError as error:  # neither JSON nor UTF-8
        raise ValueError(f"{place} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{place} is no JSON object")
    return fields
