# SPDX-License-Identifier: Apache-2.0
"""Answers on disk, each of which is there to stay as soon as it is known.

An output `RESULTS.json` has its answers in `RESULTS.answers.jsonl`, and those of further processes in
`RESULTS.answers-1.jsonl` and so on until the run ends. Lines are JSON: first the settings and versions that the answers
behind it were made with, then an answer each. A last line that was cut off does not count.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from .reporting import check_same_settings

Record = dict[str, Any]


class AnswersFile:
    """The answers of one process, to be added to.

    Args:
        output: the results' JSON file.
        settings: of the run, compared when it goes on.
        environment: versions and device; others than before are written down, and do no harm.
        rank: of the process.

    Raises:
        ValueError: a line that is damaged, or answers of other settings.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], environment: Mapping[str, str], rank: int = 0) -> None:
        path = answers_path(output, rank)
        headers = _read(path, settings)[0] if path.exists() else []
        self._file = path.open("ab")
        whole = _whole_lines(path)
        if len(whole) != path.stat().st_size:
            self._file.truncate(len(whole))
        header = {"settings": dict(settings), "environment": dict(environment)}
        if not headers or headers[-1]["environment"] != header["environment"]:
            self.append(header)

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes a line, and returns when the disk has it."""
        self._file.write(_line(record))
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> "AnswersFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


def answers_path(output: Path, rank: int = 0) -> Path:
    """Of a process."""
    return output.with_suffix(f".answers-{rank}.jsonl" if rank else ".answers.jsonl")


def read_answers(output: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Record], list[dict[str, str]]]:
    """What all processes have answered, by the samples' identities, and the environments that they did it in.

    Raises:
        ValueError: a line that is damaged, or answers of other settings.
    """
    answers: dict[str, Record] = {}
    environments: list[dict[str, str]] = []
    for path in _paths(output):
        headers, records = _read(path, settings)
        environments += [header["environment"] for header in headers if header["environment"] not in environments]
        answers = {**{record["identity"]: record for record in records}, **answers}
    return answers, environments


def merge(
    output: Path, settings: Mapping[str, Any], environments: Sequence[Mapping[str, str]], records: Sequence[Record]
) -> None:
    """Writes all answers into the first process's file, in the given order, and removes the others."""
    path = answers_path(output)
    temporary = path.with_name(f"{path.name}.tmp")
    headers = [{"settings": dict(settings), "environment": dict(environment)} for environment in environments]
    with temporary.open("wb") as file:
        file.writelines(_line(line) for line in (*headers, *records))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    for other in _paths(output):
        if other != path:
            other.unlink()


def _paths(output: Path) -> list[Path]:
    pattern = re.compile(rf"{re.escape(output.stem)}\.answers(-\d+)?\.jsonl")
    return sorted(path for path in output.parent.glob("*.jsonl") if pattern.fullmatch(path.name))


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]


def _read(path: Path, settings: Mapping[str, Any]) -> tuple[list[Record], list[Record]]:
    """A file's headers and answers."""
    headers: list[Record] = []
    records: list[Record] = []
    for number, line in enumerate(_whole_lines(path).split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and {"settings", "environment"} <= set(record):
            check_same_settings(path, record["settings"], settings)
            headers.append(record)
        elif headers and isinstance(record, dict) and isinstance(record.get("answer"), str) and "identity" in record:
            records.append(record)
        else:
            raise ValueError(
                f"{path}, line {number} is damaged: remove this line"
                + (", and its sample is asked again" if headers else " and all others, or the file")
            )
    return headers, records
