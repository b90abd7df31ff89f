# SPDX-License-Identifier: Apache-2.0
import json
from collections import Counter
from pathlib import Path

import huggingface_hub
import pytest

from remamba_hf.evaluation.leval import TASKS, LEval
from remamba_hf.evaluation.tasks import Answered, Sample

FOLDER = Path(__file__).parent / "data" / "leval"
COUNTS = {"coursera": 3, "gsm100": 1, "quality": 2, "sci_fi": 6, "tpo": 1, "codeU": 1, "topic_retrieval_longchat": 3}


def answered(task, samples, answers):
    return [Answered(one, answer, task.score(one, answer)) for one, answer in zip(samples, answers, strict=True)]


def mark(task, gold, answer, **details):
    sample = Sample("a", "b", 1, references=(gold,), details={"task": task, **details})
    return LEval([task]).score(sample, answer)["exact_match"]


def test_every_question_is_a_sample():
    samples = LEval().samples(FOLDER)
    assert Counter(sample.details["task"] for sample in samples) == COUNTS
    assert len({sample.identity for sample in samples}) == len(samples)
    assert [sample.identity for sample in samples[:4]] == ["coursera/1/1", "coursera/1/2", "coursera/2/1", "gsm100/1/1"]
    assert {sample.max_new_tokens for sample in samples} == {512}
    json.dumps([dict(sample.details) for sample in samples])
    topics = [sample for sample in samples if sample.details["task"] == "topic_retrieval_longchat"]
    assert [sample.details["part"] for sample in topics] == ["first", "second", "third"]


def test_some_tasks_in_the_benchmarks_order():
    samples = LEval(["tpo", "quality"]).samples(FOLDER)
    assert [sample.identity for sample in samples] == ["quality/1/1", "quality/1/2", "tpo/1/1"]
    assert samples == [sample for sample in LEval().samples(FOLDER) if sample.details["task"] in ("tpo", "quality")]


@pytest.mark.parametrize(
    ("task", "start", "around_document", "end"),
    [
        (
            "quality",
            "Now you are given a very long document. Please follow the instruction based on this document. For ",
            "please directly give the concise and accurate answer. Document is as follows. The lamplighter came at six.",
            "on the corner. \nQuestion: When did the lamplighter come?\n\n (A) At five\n (B) At six\n (C) At seven\n"
            " (D) Never.  Please directly give the answer without any additional output or explanation \nAnswer:",
        ),
        (
            "coursera",
            "Now you are given a very long document. Please follow the instruction based on this document. For ",
            "to the answer (like A or AB) when answering. Document is as follows. Welcome to the course",
            "off by itself.  Please directly give the answer without any additional output or explanation \nAnswer:",
        ),
        (
            "gsm100",
            "Given several question answer pairs, you need to follow a similar format to answer the last question. Make ",
            "the response is end with The answer is _ . Question: A hen lays",
            "The answer is 6\n\n\n\nQuestion: A ferry carries 12 cars and makes 1,500 trips. How many cars are that?\n"
            "Let's think step by step\n",
        ),
        (
            "codeU",
            "Now you are given a code base consisting of a large amount of functions and the corresponding comments. In ",
            "Please carefully read these codes and comments and answer the question.def function1(rows):",
            "[4, 5, 6]]))\n\n\nWhat is the final output of the code?\nLet's think step by step\n",
        ),
        (
            "topic_retrieval_longchat",
            "Below is a record of our previous conversation on many different topics. You are the ASSISTANT, and I am the ",
            "to retrieve the first/second/third topic names. Now the record start. USER: I would like",
            "discussion. \n\nWhat is the first topic we discussed? Only give me the topic name. \nASSISTANT:",
        ),
    ],
)
def test_prompt_is_the_benchmarks(task, start, around_document, end):
    prompt = LEval([task]).samples(FOLDER)[0].prompt
    assert prompt.startswith(start)
    assert prompt.count(around_document) == 1
    assert prompt.endswith(end)


def test_fiction_is_asked_about_its_world_and_about_ours():
    loyalty, fact, second_loyalty, second_fact, *_ = LEval(["sci_fi"]).samples(FOLDER)
    assert loyalty.prompt.startswith("Now you are given a scientific fiction. I will ask you")
    assert (
        "all of its fish can sing. \nQuestion: 1.\tFish can sing, True or False? Answer this question based on the world"
        in (loyalty.prompt)
    )
    assert fact.prompt == (
        "1.\tFish can sing, True or False? Answer this question based on the real-world knowledge and facts up until your "
        "last trainingPlease directly answer without any additional output or explanation. \nAnswer:"
    )
    assert "The moon has a warm sea..  Please" in second_loyalty.prompt
    assert second_fact.prompt.startswith("2.\tThe moon has a warm sea.Please directly answer")
    assert (loyalty.references, fact.references) == (("True",), ("False",))


def test_gold_answers_are_right():
    task = LEval()
    samples = task.samples(FOLDER)
    summary = task.summary(answered(task, samples, [sample.references[0] for sample in samples]))
    assert {name: one["accuracy"] for name, one in summary["tasks"].items()} == dict.fromkeys(TASKS, 100)
    assert {name: one["samples"] for name, one in summary["tasks"].items()} == COUNTS
    assert summary["average"] == 100


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        (" B\n", "B"),
        ("The answer is B.", "B"),
        ("(B)", "B"),
        ("B. At six", "B"),
        ("(B) At six. (C) is wrong", "B"),
        ("BC", None),  # a run of letters of the alphabet is taken as it is
        ("CB", "C"),
        ("b", "A"),  # small letters do not count
        ("(b) at six", "A"),
        ("at six", "A"),
        ("Answer: B", "A"),  # the first capital, inside a word too
        ("Because of D", "B"),
        ("", None),
        (" \n", None),
    ],
)
@pytest.mark.parametrize("task", ["quality", "tpo"])
def test_one_option(task, answer, letter):
    for gold in "ABCD":
        right = mark(task, f"({gold}) At six" if task == "quality" else gold, answer) == 100
        assert right == (gold == letter)
    assert mark(task, "none of them", answer) == (100 if letter == "A" else 0), "a gold answer without letter means A"


@pytest.mark.parametrize(
    ("answer", "letters"),
    [
        ("ABC", "ABC"),
        ("ACD", "ACD"),
        ("DCA", "ACD"),
        ("ACD\nBecause B. is wrong", "ACD"),
        (" AC\nB. is wrong", "AC"),
        ("A, C", "A"),
        ("A, C.", "AC"),
        ("A, B, C and D.", "ACD"),
        ("A. C. D.", "ACD"),
        ("A and C are right", "AC"),
        ("The answers are A) and D)", "AD"),
        ("The answer is B.", "B"),
        ("(B)", "B"),
        ("B Question 2. A. Bread", "B"),
        ("Answer: BC", "A"),
        ("It is [BD]", "BD"),
        ("a, c", "A"),
        ("bread", "A"),
    ],
)
def test_several_options(answer, letters):
    assert mark("coursera", letters, answer) == 100
    assert mark("coursera", "ABCD".replace(letters[0], ""), answer) < 100


@pytest.mark.parametrize(
    ("gold", "answer", "score"),
    [
        ("ABC", "A", 25),
        ("ABC", "AC", 25),
        ("AC", "ABC", 0),
        ("AB", "C", 0),
        ("AB", "[BA]", 25),  # a run inside other characters keeps its order
        ("ABC", "", 0),
    ],
)
def test_part_of_the_options_is_a_quarter(gold, answer, score):
    assert mark("coursera", gold, answer) == score


@pytest.mark.parametrize(
    ("gold", "answer", "score"),
    [
        ("18", "9 * 2 = 18\nThe answer is 18", 100),
        ("18", "The answer is $18.00 in 2 days", 100),
        ("18000", "The answer is 18,000.", 100),
        ("18", "The answer is 18\n\nQuestion: another\nThe answer is 7", 100),
        ("18", "They have 3 bags and 18 eggs", 100),
        ("18", "It makes 18.\n\nThat is 2 more", 100),
        ("18", "\n\nIt makes 18.", 100),
        ("5", "The answer is -5.7", 100),
        ("23", "2\n3", 100),
        ("18", "The answer is: 18 of 20", 0),  # no "The answer is " with a word: the last number counts
        ("18", "the answer is 18 of 20", 0),
        ("18", "eighteen", 0),
        ("18", "The answer is eighteen, 18", 0),
        ("18", "", 0),
        ("8", "The answer is 18", 0),
    ],
)
def test_number(gold, answer, score):
    assert mark("gsm100", gold, answer) == score


@pytest.mark.parametrize(
    ("gold", "answer", "score"),
    [
        ("[6 15]", "The final output of the code is [6, 15].", 100),
        ("[6 15]", "the final output of the code will be `[6., 15.]`", 0),
        ("[6 15]", "the final output of the code will be [6.0, 15.0]", 100),
        ("[[1 3][2 4]]", "It prints [[1, 3],\n [2, 4]]", 100),
        (
            "[6 15]",
            "the final output is a list of the sums of all rows: [6, 15]",
            0,
        ),  # further on than gold's words and three
        ("[6 15]", "[6, 15] is what I take it to be", 0),  # too far from the end
        ("[6 15]", "So we get [6, 15] for it.", 100),
        ("[6 15]", "the final output is 3. No: the final output is [6 15]", 100),
        ("3", "the final output of the code is 3", 100),
        ("3", "the value is 13", 100),  # anywhere in the text that is left
        ("this", "this", 0),  # "is" is taken out of what the model says
    ],
)
def test_code(gold, answer, score):
    assert mark("codeU", gold, answer) == score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Old bridges", 100),
        ("We discussed old bridges first.", 100),
        ("\nOLD  BRIDGES\nNight trains", 100),
        ("1\nold bridges", 100),
        ("Bridges", 0),
        ("Night trains\nOld bridges", 0),  # the first line counts
    ],
)
def test_topic(answer, score):
    assert mark("topic_retrieval_longchat", "Old bridges", answer) == score


@pytest.mark.parametrize(
    ("answer", "judgement"),
    [
        ("True", "True"),
        ("false.", "False"),
        ("It is not true; false", "True"),
        ("Untrue", "True"),
        ("False/True", "True"),
        ("True [fact: False]", "True"),
        ("[fact: True]", None),
        ("Yes", None),
        ("", None),
    ],
)
@pytest.mark.parametrize("part", ["loyalty", "fact"])
def test_judgement(answer, judgement, part):
    for gold in ("True", "False"):
        assert (mark("sci_fi", gold, answer, part=part) == 100) == (gold == judgement)


def test_summary_is_the_mean_of_parts_and_of_tasks():
    task = LEval(["coursera", "sci_fi", "tpo", "topic_retrieval_longchat"])
    samples = [sample for sample in task.samples(FOLDER) if sample.details["task"] != "tpo"]
    answers = ["AC", "B", "C", *("True", "True", "True", "True", "True", "False"), "The care of bees", "?", "Night trains"]
    kept = answered(task, samples, answers)[:-1]
    summary = task.summary(kept)
    assert summary["tasks"] == {
        "coursera": {"accuracy": pytest.approx(125 / 3), "samples": 3},
        "sci_fi": {
            "accuracy": pytest.approx((200 / 3 + 100 / 3) / 2),
            "samples": 6,
            "parts": {"loyalty": pytest.approx(200 / 3), "fact": pytest.approx(100 / 3)},
        },
        "tpo": {"accuracy": None, "samples": 0},
        "topic_retrieval_longchat": {
            "accuracy": 50,
            "samples": 2,
            "parts": {"first": 100, "second": 0, "third": None},
        },
    }
    assert summary["average"] == pytest.approx((125 / 3 + 50 + 50) / 3)
    assert json.loads(json.dumps(summary)) == summary


def test_parts_count_alike_however_many_samples_they_have():
    task = LEval(["sci_fi"])
    samples = [sample for sample in task.samples(FOLDER) if sample.identity != "sci_fi/1/3/fact"]
    summary = task.summary(answered(task, samples, ["True", "True", "True", "True", "False"]))
    assert summary["tasks"]["sci_fi"] == {"accuracy": 50, "samples": 5, "parts": {"loyalty": 100, "fact": 0}}


def test_no_samples():
    summary = LEval(["tpo"]).summary([])
    assert summary == {"tasks": {"tpo": {"accuracy": None, "samples": 0}}, "average": None}


def test_table():
    one = {"tasks": {"tpo": {"accuracy": 12.345}, "coursera": {"accuracy": None}}, "average": 12.345}
    other = {"tasks": {"codeU": {"accuracy": 50.0}}, "average": 50.0}
    assert LEval().table({"one": one, "other": other}) == (
        "| exact match, % | coursera | tpo | codeU | average |\n"
        "|---|---|---|---|---|\n"
        "| one |  | 12.35 |  | 12.35 |\n"
        "| other |  |  | 50.00 | 50.00 |\n"
    )


@pytest.mark.parametrize("tasks", [["tpo", "squality"], []])
def test_unknown_tasks_are_refused(tasks):
    with pytest.raises(
        ValueError, match=r"(squality|no task).*coursera, gsm100, quality, sci_fi, tpo, codeU, topic_retrieval"
    ):
        LEval(tasks)


def test_missing_files_are_named(tmp_path):
    (tmp_path / "tpo.jsonl").write_text("")
    with pytest.raises(FileNotFoundError, match=r"quality\.jsonl, .*codeU\.jsonl: put it there.*other tasks") as refused:
        LEval(["quality", "tpo", "codeU"]).samples(tmp_path)
    assert "tpo.jsonl" not in str(refused.value)


GOOD = {"input": "text", "instructions": ["a?", "b?"], "outputs": ["A", "B"]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"input": ', "is not JSON"),
        (b"\xff\xfe\xfa", "is not JSON"),
        ("[1]", "no JSON object"),
        ({**GOOD, "input": None}, 'no text "input"'),
        ({"input": "text", "instructions": ["a?"]}, 'no list "outputs"'),
        ({**GOOD, "instructions": "a?"}, 'no list "instructions"'),
        ({**GOOD, "outputs": ["A", 2]}, 'no list "outputs"'),
        ({**GOOD, "outputs": ["A", " "]}, 'no list "outputs"'),
        ({**GOOD, "outputs": ["A"]}, "2 instructions and 1 outputs"),
        ({**GOOD, "instructions": [], "outputs": []}, "0 instructions and 0 outputs"),
    ],
)
def test_malformed_lines_are_named(tmp_path, line, message):
    text = json.dumps(line) if isinstance(line, dict) else line
    path = tmp_path / "tpo.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + (text if isinstance(text, bytes) else text.encode()) + b"\n")
    with pytest.raises(ValueError, match=rf"tpo\.jsonl, line 3 .*{message}"):
        LEval(["tpo"]).samples(tmp_path)


def test_malformed_judgements_are_named(tmp_path):
    (tmp_path / "sci_fi.jsonl").write_text(json.dumps({**GOOD, "outputs": ["True [fact: True]", "True"]}))
    with pytest.raises(ValueError, match=r'sci_fi\.jsonl, line 1, output 2: "True" is not like "True \[fact: False\]"'):
        LEval(["sci_fi"]).samples(tmp_path)


def test_the_hub_gives_the_same(monkeypatch):
    asked = []

    def download(repo_id, filename, *, repo_type):
        asked.append((repo_id, filename, repo_type))
        return str(FOLDER / Path(filename).name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert LEval(["tpo", "codeU"]).samples(None) == LEval(["tpo", "codeU"]).samples(FOLDER)
    assert asked == [("L4NLP/LEval", f"LEval/Exam/{task}.jsonl", "dataset") for task in ("tpo", "codeU")]


def test_a_hub_out_of_reach_is_said(monkeypatch):
    def download(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(OSError, match=r"L4NLP/LEval does not give LEval/Exam/tpo\.jsonl: give a folder.*no connection"):
        LEval(["tpo"]).samples(None)
