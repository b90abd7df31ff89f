# SPDX-License-Identifier: Apache-2.0
"""Scores answers that are there already, such as published ones: no model is asked."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm.auto import tqdm

from remamba_hf.training.book_tokens import write_json

from .checkpoints import environment
from .generation_eval import digest_of_samples
from .reporting import check_same_settings, read_existing, utc_now, write_table
from .tasks import Answered, Sample, Task


class TaskWithPredictions(Task, Protocol):
    """A benchmark whose files of predictions have all that scoring needs."""

    tasks: Sequence[str]

    def predictions(self, folder: Path) -> list[tuple[Sample, str]]:
        """Samples, whose prompts may be empty, with their answers; raises ValueError and OSError as `samples` does."""


def score_predictions(task: TaskWithPredictions, folder: Path, output: Path) -> dict[str, Any]:
    """Scores a folder of predictions, and writes results and table.

    Args:
        output: JSON file; the table has its name and `.md`.

    Returns:
        The content of the file.

    Raises:
        ValueError: a malformed line, no prediction at all, or an output that has results of others.
        OSError: missing files.
    """
    pairs = task.predictions(folder)
    if not pairs:
        raise ValueError(f"{folder} has no prediction of {task.name}")
    answers = [{"identity": sample.identity, "answer": answer} for sample, answer in pairs]
    settings = {
        "task": task.name,
        "tasks": list(task.tasks),
        "samples": {"count": len(pairs), "sha256": digest_of_samples([sample for sample, _ in pairs])},
        "predictions": {"sha256": hashlib.sha256(json.dumps(answers).encode()).hexdigest()},
    }
    there = read_existing(output)
    if there is not None:
        check_same_settings(output, there.get("settings") if isinstance(there, dict) else None, settings)
    answered = [
        Answered(sample, answer, task.score(sample, answer)) for sample, answer in tqdm(pairs, desc="scoring", unit="answer")
    ]
    results = {
        "model": folder.resolve().name,
        "date": utc_now(),
        "settings": settings,
        "summary": task.summary(answered),
        "environments": [environment("cpu")],
        "answers": [{**record, "scores": dict(one.scores)} for record, one in zip(answers, answered, strict=True)],
    }
    write_table(output.with_suffix(".md"), markdown(task, results))
    write_json(output, results)
    return results


def markdown(task: Task, results: dict[str, Any]) -> str:
    """The table, and how many answers it is of."""
    count = results["settings"]["samples"]["count"]
    return f"{task.table({results['model']: results['summary']})}\n{count} predictions, scored as they are.\n"
