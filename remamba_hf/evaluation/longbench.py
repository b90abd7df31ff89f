# SPDX-License-Identifier: Apache-2.0
"""LongBench-E, the 13 English tasks of LongBench with even lengths (Bai et al., arXiv 2308.14508).

Prompts and output lengths are those of THUDM/LongBench (`config/dataset2prompt.json`, `dataset2maxlen.json`; MIT licence),
their spaces included, so that scores compare; means of length buckets and their rounding are those of its `eval.py --e`. The
mean of a task is that over its buckets, as in ReMamba's published results (arXiv 2408.15496).
"""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from .longbench_scores import PARAGRAPH, score_answer
from .reporting import table_head, table_row
from .tasks import Answered, Sample, json_lines

HUB_REPOSITORY, HUB_FILE = "THUDM/LongBench", "data.zip"

BUCKETS = ("0-4k", "4-8k", "8k+")  # by an item's `length`, in words

_SEVERAL_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "The following are given passages.\n{context}\n\n"
    "Answer the question based on the given passages. Only give me the answer and do not output any other words.\n\n"
    "Question: {input}\nAnswer:"
)
PROMPTS = {
    "qasper": "You are given a scientific article and a question. Answer the question as concisely as you can, using a "
    "single phrase or sentence if possible. If the question cannot be answered based on the information in the article, "
    'write "unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". Do not provide any '
    "explanation.\n\nArticle: {context}\n\n Answer the question based on the above article as concisely as you can, using a "
    "single phrase or sentence if possible. If the question cannot be answered based on the information in the article, "
    'write "unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". Do not provide any '
    "explanation.\n\nQuestion: {input}\n\nAnswer:",
    "multifieldqa_en": "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question "
    "based on the above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
    "hotpotqa": _SEVERAL_PASSAGES,
    "2wikimqa": _SEVERAL_PASSAGES,
    "gov_report": "You are given a report by a government agency. Write a one-page summary of the report.\n\n"
    "Report:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
    "multi_news": "You are given several news passages. Write a one-page summary of all news. \n\n"
    "News:\n{context}\n\nNow, write a one-page summary of all the news.\n\nSummary:",
    "trec": "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
    "triviaqa": "Answer the question based on the given passage. Only give me the answer and do not output any other words. "
    "The following are some examples.\n\n{context}\n\n{input}",
    "samsum": "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
    "passage_count": "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please "
    "carefully read these paragraphs and determine how many unique paragraphs there are after removing duplicates. In other "
    "words, how many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final count of "
    "unique paragraphs after removing duplicates. The output format should only contain the number, such as 1, 2, 3, and so "
    "on.\n\nThe final answer is: ",
    "passage_retrieval_en": "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which "
    "paragraph the abstract is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number "
    'of the paragraph that the abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", etc.\n\n'
    "The answer is: ",
    "lcc": "Please complete the code given below. \n{context}Next line of code:\n",
    "repobench-p": "Please complete the code given below. \n{context}{input}Next line of code:\n",
}
TASKS = tuple(PROMPTS)
MAX_NEW_TOKENS = {
    "qasper": 128,
    "multifieldqa_en": 64,
    "hotpotqa": 32,
    "2wikimqa": 32,
    "gov_report": 512,
    "multi_news": 512,
    "trec": 64,
    "triviaqa": 32,
    "samsum": 128,
    "passage_count": 32,
    "passage_retrieval_en": 32,
    "lcc": 64,
    "repobench-p": 64,
}
# Without these, models go on with dialogues of their own.
STOPS = {"samsum": ("\n",)}


class LongBench:
    """LongBench-E, or some of its tasks.

    Args:
        tasks: which, of `TASKS`.

    Raises:
        ValueError: there is no task of that name, or none is named.
    """

    name = "longbench_e"

    def __init__(self, tasks: Sequence[str] = TASKS):
        unknown = [task for task in tasks if task not in TASKS]
        if unknown or not tasks:
            what = f"LongBench-E has no task {', '.join(unknown)}" if unknown else "no task of LongBench-E is named"
            raise ValueError(f"{what}: choose from {', '.join(TASKS)}")
        self.tasks = tuple(task for task in TASKS if task in tasks)

    def samples(self, data: Path | None) -> list[Sample]:
        """One for every line, task by task, in the files' order.

        Prompts are whole: LongBench cuts long ones in the middle, by tokens, which takes a tokenizer.

        Args:
            data: a folder with `TASK_e.jsonl` for every task, or `TASK.jsonl` (the original LongBench, of other lengths)
                where that is missing; or the benchmark's `data.zip`, which holds such files; None: that of the Hub's
                THUDM/LongBench.

        Raises:
            ValueError: a line that is not what it should be; names file, line and what is wrong.
            OSError: files that are not there, or that the Hub does not give; names them.
        """
        files = _files(_hub_file() if data is None else Path(data), self.tasks)
        return [_sample(task, *line) for task in self.tasks for line in json_lines(files[task])]

    def predictions(self, folder: Path) -> list[tuple[Sample, str]]:
        """Answers that are there already, each behind a sample to score it by, without a prompt; task by task, in the
        files' order.

        Args:
            folder: with `TASK_e.jsonl` or `TASK.jsonl` for every task, as LongBench's `pred.py` writes them: lines with
                `pred`, `answers`, `length` and, for trec, `all_classes`.

        Raises:
            ValueError: a line that is not what it should be; names file, line and what is wrong.
            FileNotFoundError: files that are not there; names them.
        """
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}: give one with a file of predictions for every task")
        advice = "give a folder with a file of predictions for every task, or choose with --tasks"
        files = _files_of_tasks(folder, self.tasks, advice)
        return [_prediction(task, *line) for task in self.tasks for line in json_lines(files[task])]

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        """`score`: F1 of words, ROUGE-L, likeness of code or share of right answers, as the task has it; 0 to 100."""
        details = sample.details
        return {"score": 100 * score_answer(details["task"], answer, sample.references, details.get("classes", ()))}

    def summary(self, answered: Sequence[Answered]) -> dict[str, Any]:
        """Of every task and of all: `average`, that over the `buckets` (by length) that have samples.

        `tasks`: by name, with the number of `samples` by bucket. `buckets` and `average` are those over the tasks that have
        samples there. Scores of a task's buckets are rounded to two decimals, as LongBench does before it goes on.
        """
        tasks = {task: _task_summary([one for one in answered if one.sample.details["task"] == task]) for task in self.tasks}
        buckets = {bucket: _mean([summary["buckets"][bucket] for summary in tasks.values()]) for bucket in BUCKETS}
        return {"tasks": tasks, "buckets": buckets, "average": _mean([summary["average"] for summary in tasks.values()])}

    def table(self, summaries: Mapping[str, Mapping[str, Any]]) -> str:
        """Models by tasks: the averages, and a table for every bucket; empty where there is no sample."""
        tasks = [task for task in TASKS if any(task in summary["tasks"] for summary in summaries.values())]
        return "\n".join(_table(bucket, tasks, summaries) for bucket in (None, *BUCKETS))


def _hub_file() -> Path:
    from huggingface_hub import hf_hub_download  # a local folder needs no Hub

    try:
        # The files themselves: `datasets` does not run loading scripts any more, which is all that it could load them by.
        return Path(hf_hub_download(HUB_REPOSITORY, HUB_FILE, repo_type="dataset"))
    except OSError as error:
        advice = "give a folder that has the benchmark's files, or that file"
        raise OSError(f"the Hub's {HUB_REPOSITORY} does not give {HUB_FILE}: {advice} ({error})") from error


def _files(data: Path, tasks: Sequence[str]) -> dict[str, Path | zipfile.Path]:
    """The file of every task, in a folder or in `data.zip`."""
    if not data.exists():
        raise FileNotFoundError(f"no folder {data}: give one that has the benchmark's files, or its {HUB_FILE}")
    folder: Path | zipfile.Path = data
    if not data.is_dir():
        if not zipfile.is_zipfile(data):
            raise ValueError(f"{data} is neither a folder nor a zip file: give a folder that has the benchmark's files")
        folder = zipfile.Path(data, "data/")
    advice = f"put it there from {HUB_FILE} of the Hub's {HUB_REPOSITORY}, or choose other tasks"
    return _files_of_tasks(folder, tasks, advice)


def _files_of_tasks(folder: Path | zipfile.Path, tasks: Sequence[str], advice: str) -> dict[str, Path | zipfile.Path]:
    files = {task: [folder / f"{task}_e.jsonl", folder / f"{task}.jsonl"] for task in tasks}
    found = {task: [path for path in paths if path.is_file()] for task, paths in files.items()}
    missing = [str(files[task][0]) for task, paths in found.items() if not paths]
    if missing:
        raise FileNotFoundError(f"no file {', '.join(missing)}, nor one without _e: {advice}")
    return {task: paths[0] for task, paths in found.items()}


def _check_fields(task: str, place: str, fields: Mapping[str, Any], texts: Sequence[str]) -> None:
    """Raises a ValueError unless a line has some texts and what scoring needs."""
    length = fields.get("length")
    needed = {
        **{f'text "{name}"': isinstance(fields.get(name), str) for name in texts},
        'list "answers" of texts': _are_texts(fields.get("answers")),
        'number of words "length"': isinstance(length, int) and not isinstance(length, bool) and length >= 0,
        'list "all_classes" of texts': task != "trec" or _are_texts(fields.get("all_classes")),
    }
    missing = [what for what, there in needed.items() if not there]
    if missing:
        raise ValueError(f"{place} has no {', no '.join(missing)}: it is no item of LongBench's {task}")
    for answer in fields["answers"]:
        if task == "passage_retrieval_en" and not PARAGRAPH.search(answer):
            raise ValueError(f'{place}, "answers": "{answer}" is not like "Paragraph 7"')
        if task == "trec" and answer not in fields["all_classes"]:
            raise ValueError(f'{place}, "answers": "{answer}" is not one of "all_classes"')


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(text, str) for text in value)


def _sample(task: str, number: int, place: str, fields: Mapping[str, Any]) -> Sample:
    _check_fields(task, place, fields, ("context", "input"))
    return _with_prompt(task, number, fields, PROMPTS[task].format(context=fields["context"], input=fields["input"]))


def _prediction(task: str, number: int, place: str, fields: Mapping[str, Any]) -> tuple[Sample, str]:
    _check_fields(task, place, fields, ("pred",))
    return _with_prompt(task, number, fields, ""), fields["pred"]


def _with_prompt(task: str, number: int, fields: Mapping[str, Any], prompt: str) -> Sample:
    details = {"task": task, "length": fields["length"]}
    if task == "trec":
        details["classes"] = fields["all_classes"]
    return Sample(
        identity=f"{task}/{number}",
        prompt=prompt,
        max_new_tokens=MAX_NEW_TOKENS[task],
        references=tuple(fields["answers"]),
        stop=STOPS.get(task, ()),
        details=details,
    )


def bucket_of(length: int) -> str:
    """Of `BUCKETS`, by the number of words."""
    return BUCKETS[(length >= 4000) + (length >= 8000)]


def _task_summary(answered: Sequence[Answered]) -> dict[str, Any]:
    scores: dict[str, list[float]] = {bucket: [] for bucket in BUCKETS}
    for one in answered:
        scores[bucket_of(one.sample.details["length"])].append(one.scores["score"])
    buckets = {bucket: _rounded_mean(values) if values else None for bucket, values in scores.items()}
    samples = {bucket: len(values) for bucket, values in scores.items()}
    return {"average": _mean(list(buckets.values())), "buckets": buckets, "samples": samples}


def _rounded_mean(scores: Sequence[float]) -> float:
    """To two decimals, in LongBench's own order and by numpy's rounding, which decide what 46.125 becomes."""
    return float(np.round(100 * np.mean(np.asarray(scores) / 100), 2))


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those that are there."""
    there = [value for value in values if value is not None]
    return fmean(there) if there else None


def _table(bucket: str | None, tasks: Sequence[str], summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Of one bucket, or of the averages."""
    text = table_head(f"score, {bucket} words" if bucket else "score", [*tasks, "average"])
    for name, summary in summaries.items():
        cells = [*(summary["tasks"].get(task) for task in tasks), summary]
        values = [cell and (cell["buckets"][bucket] if bucket else cell["average"]) for cell in cells]
        text += table_row(name, ["" if value is None else f"{value:.2f}" for value in values])
    return text
