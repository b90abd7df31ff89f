# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from remamba_hf.evaluation.longeval import LongEvalLines
from remamba_hf.evaluation.tasks import Answered


def line(number, prompt="A record of lines. Tell me the number."):
    return json.dumps({"random_idx": ["torpid-kid", 7], "expected_number": number, "num_lines": 2, "prompt": prompt}) + "\n"


@pytest.fixture
def data(tmp_path):
    for name, numbers in (("1000_lines", (7,)), ("200_lines", (2416, 31))):
        (tmp_path / f"{name}.jsonl").write_text("".join(map(line, numbers)) + "\n")
    return tmp_path


def test_every_line_is_a_sample_by_numbers_of_lines(data):
    samples = LongEvalLines().samples(data)
    assert [sample.identity for sample in samples] == ["200_lines/1", "200_lines/2", "1000_lines/1"]
    assert [sample.references for sample in samples] == [("2416",), ("31",), ("7",)]
    assert {sample.prompt for sample in samples} == {"A record of lines. Tell me the number."}
    assert [sample.identity for sample in LongEvalLines(["1000_lines"]).samples(data)] == ["1000_lines/1"]
    (data / "other").mkdir()
    (data / "other" / "lines").mkdir()
    (data / "200_lines.jsonl").rename(data / "other" / "lines" / "200_lines.jsonl")
    assert len(LongEvalLines().samples(data / "other")) == 2


@pytest.mark.parametrize(
    ("answer", "mark"),
    [
        ("2416", 100),
        (" <2416>.", 100),
        ("In line 7 it is 2416", 100),
        ("It is 2416 in line 7", 0),  # the last number counts, as in the benchmark
        ("02416", 100),
        ("24160", 0),
        ("two thousand", 0),
        ("", 0),
    ],
)
def test_the_last_number_counts(data, answer, mark):
    task = LongEvalLines()
    assert task.score(task.samples(data)[0], answer) == {"exact_match": mark}


def test_summary_is_the_mean_of_files(data):
    task = LongEvalLines()
    answers = ("2416", "7", "7")
    answered = [Answered(one, text, task.score(one, text)) for one, text in zip(task.samples(data), answers, strict=True)]
    summary = task.summary(answered)
    assert summary["tasks"] == {"200_lines": {"accuracy": 50, "samples": 2}, "1000_lines": {"accuracy": 100, "samples": 1}}
    assert summary["average"] == 75
    assert "| a | 50.00 | 100.00 | 75.00 |" in task.table({"a": summary, "b": task.summary(answered[:1])})
    assert task.summary(answered[:2])["tasks"]["1000_lines"] == {"accuracy": None, "samples": 0}
    assert task.summary([])["average"] is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"200_lines.jsonl, line 2 is not JSON"),
        ("[]", "line 2 is no JSON object"),
        ('{"prompt": ""}', r'line 2 has no text "prompt"'),
        ('{"prompt": "a"}', r'line 2 has no number "expected_number"'),
        ('{"prompt": "a", "expected_number": true}', r'line 2 has no number "expected_number"'),
    ],
)
def test_malformed_lines_are_named(data, content, message):
    (data / "200_lines.jsonl").write_text(line(1) + content + "\n")
    with pytest.raises(ValueError, match=message):
        LongEvalLines().samples(data)


def test_missing_files_are_named(data, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no 300_lines\.jsonl: choose from 200_lines, 1000_lines"):
        LongEvalLines(["300_lines"]).samples(data)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \.jsonl file"):
        LongEvalLines().samples(tmp_path / "empty")
    with pytest.raises(ValueError, match="not on the Hub: give --data"):
        LongEvalLines().samples(None)
