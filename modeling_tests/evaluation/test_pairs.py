# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from remamba_hf.evaluation.pairs import Pairs
from remamba_hf.evaluation.tasks import Answered


def pair(prompt, response):
    return json.dumps({"prompt": prompt, "response": response}) + "\n"


@pytest.fixture
def data(tmp_path):
    (tmp_path / "summaries.jsonl").write_text(pair("What happened?\n", " a cat sat ") + "\n" + pair("And then?", "nothing"))
    (tmp_path / "answers.jsonl").write_text(pair("1 + 1?", "2"))
    return tmp_path


def test_every_line_is_a_sample_file_by_file(data):
    samples = Pairs().samples(data)
    assert [sample.identity for sample in samples] == ["answers/1", "summaries/1", "summaries/3"]
    assert samples[1].prompt == "What happened?\n", "as it is"
    assert [one.identity for one in Pairs().samples(data / "answers.jsonl")] == ["answers/1"]
    assert [one.identity for one in Pairs(["summaries"]).samples(data)] == ["summaries/1", "summaries/3"]


@pytest.mark.parametrize(
    ("answer", "rouge", "exact"),
    [
        ("a cat sat", 100, 100),
        ("\na cat sat ", 100, 100),  # white space does not count
        ("A cat sat", 100 * 2 / 3, 0),  # as LongBench's ROUGE-L, letters count as they are written
        ("a dog sat", 100 * 2 / 3, 0),
        ("sat cat a", 100 / 3, 0),
        ("", 0, 0),
    ],
)
def test_marks(data, answer, rouge, exact):
    task = Pairs()
    marks = task.score(task.samples(data)[1], answer)
    assert marks == {"rouge_l": pytest.approx(rouge, abs=1e-3), "exact_match": exact}


def test_summary_and_table(data):
    task = Pairs()
    answers = ("2", "a cat sat", "something")
    answered = [Answered(one, text, task.score(one, text)) for one, text in zip(task.samples(data), answers, strict=True)]
    summary = task.summary(answered)
    assert summary["tasks"]["summaries"] == {"rouge_l": pytest.approx(50, abs=1e-3), "exact_match": 50, "samples": 2}
    assert summary["average"] == pytest.approx(75, abs=1e-3)
    assert "| a | 100.00 | 50.00 |" in task.table({"a": summary})
    none = task.summary([])
    assert none["average"] is None
    assert "| b |  |  |" in task.table({"b": none})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"answers.jsonl, line 2 is not JSON"),
        ("[1]", "line 2 is no JSON object"),
        ('{"prompt": "a"}', r'line 2 has no text "response"'),
        ('{"prompt": " ", "response": "b"}', r'line 2 has no text "prompt"'),
    ],
)
def test_malformed_lines_are_named(data, content, message):
    (data / "answers.jsonl").write_text(pair("a", "b") + content + "\n")
    with pytest.raises(ValueError, match=message):
        Pairs().samples(data)


def test_missing_files_are_named(data, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no songs\.jsonl"):
        Pairs(["songs"]).samples(data)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \*\.jsonl"):
        Pairs().samples(tmp_path / "empty")
    with pytest.raises(ValueError, match="give --data a folder"):
        Pairs().samples(None)
