# SPDX-License-Identifier: Apache-2.0
import json
import zipfile
from pathlib import Path

import huggingface_hub
import pytest

from remamba_hf.evaluation.longbench import MAX_NEW_TOKENS, PROMPTS, TASKS, LongBench, bucket_of
from remamba_hf.evaluation.longbench_scores import (
    class_match,
    code_similarity,
    number_share,
    paragraph_share,
    rouge_l,
    score_answer,
    word_f1,
)
from remamba_hf.evaluation.tasks import Answered, Sample

DATA = Path(__file__).parent / "data" / "longbench"


def write_lines(folder, name, *items):
    path = folder / name
    path.write_text("".join(f"{item if isinstance(item, str) else json.dumps(item)}\n" for item in items))
    return path


def item(**changes):
    return {"input": "Why?", "context": "A text.", "answers": ["Because"], "length": 10, "all_classes": None, **changes}


def answered(task, length, score, number=0):
    sample = Sample(f"{task}/{number}", "", 1, details={"task": task, "length": length})
    return Answered(sample, "", {"score": score})


def answer_all(task, samples, answer_of):
    return [Answered(sample, answer_of(sample), task.score(sample, answer_of(sample))) for sample in samples]


# What each answer scores, worked out by hand.
@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("The cat, the big cat!", "a cat", 1 / 2),  # cat big cat: precision 1/3, recall 1
        ("cat cat dog", "cat cat", 4 / 5),  # a word counts as often as it is in both: 2/3 and 1
        ("U.S.", "us", 1),
        ("an ox", "the ox", 1),
        ("the", "a", 0),  # nothing is left of either
        ("", "cat", 0),
    ],
)
def test_f1_of_words(answer, reference, expected):
    assert word_f1(answer, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("the cat lay on the mat.", "the cat sat on the mat.", 4 / 5),  # "the" counts once: 4 of 5 and 5 words
        ("b c. a b", "a b c", 1),  # the sequences of several sentences are put together
        ("Yes. ", "Yes", 2 / 3),  # the space behind the full stop is an empty word: precision 1/2
        ("3.14", "3.15", 1 / 2),  # a full stop in a number parts sentences as well: 3 of 3, 14
        ("b a. b", "a b", 1 / 2),  # of the sequences "a" and "b" the second counts: b of a, b, twice
        ("b a", "a b", 1 / 2),
        ("Cat", "cat", 0),  # case counts
        ("...", "cat", 0),
        ("", "cat", 0),
    ],
)
def test_rouge_l(answer, reference, expected):
    assert rouge_l(answer, reference) == pytest.approx(expected, abs=1e-7)


def test_rouge_l_of_very_long_sentences():
    words = " ".join(f"w{number}" for number in range(1500))
    assert rouge_l(words, words) == pytest.approx(1)


@pytest.mark.parametrize(
    ("answer", "classes", "expected"),
    [
        ("a capital city", ["Food", "capital city"], 1),
        ("capital city or Food", ["Food", "capital city"], 1 / 2),
        ("a town", ["Food", "capital city"], 0),
        ("Food", ["Food", "capital city"], 0),
        ("capital city", ["city", "capital city", "capital"], 1),  # names inside the right one do not count,
        ("capital city", ["capital", "city", "capital city"], 1 / 2),  # but two in a row do: the second is passed over
    ],
)
def test_classes(answer, classes, expected):
    assert class_match(answer, "capital city", classes) == expected


@pytest.mark.parametrize(
    ("answer", "expected"), [("5", 1), ("5 of 12, so 5", 2 / 3), ("05", 0), ("15", 0), ("five", 0), ("", 0)]
)
def test_numbers(answer, expected):
    assert number_share(answer, "5") == expected
    assert paragraph_share(answer, "Paragraph 5") == expected


def test_paragraph_of_another_form():
    with pytest.raises(ValueError, match='"Section 5" is not like "Paragraph 7"'):
        paragraph_share("5", "Section 5")


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("\n\nreturn x\nreturn y", "return x", 1),  # the first line that is not empty
        ("```python\n# add\n// add\nreturn x", "return x", 1),  # that has no fence and no comment
        ("x = 1\ny = 2", "y = 2", 0.6),  # the first line counts: " = " of "x = 1", 2 * 3 / 10
        ("return y", "return x", 0.88),  # 7 of 8 characters, 87.5
        ("abcdefgh", "azzzzzzz", 0.12),  # 1 of 8, 12.5: halves go to the even number
        ("tide", "diet", 0.25),  # difflib's blocks, not the longest common subsequence, which has 2 of 4
        ("# nothing but comments", "return x", 0),
        ("", "return x", 0),
        ("", "", 1),
    ],
)
def test_code(answer, reference, expected):
    assert code_similarity(answer, reference) == expected


@pytest.mark.parametrize("task", ["trec", "triviaqa", "samsum"])
def test_only_the_first_line_counts_of_answers_to_examples(task):
    assert score_answer(task, "\n\nFood\nCity", ["Food"], ["Food", "City"]) == pytest.approx(1)
    assert score_answer(task, " \nFood", ["Food"], ["Food", "City"]) == 0


def test_all_lines_count_elsewhere():
    assert score_answer("hotpotqa", "\n\nNorth\nby", ["north by"]) == 1


def test_the_best_reference_counts():
    task = LongBench(["qasper"])
    sample = Sample("qasper/1", "", 1, references=("Forty apples", "40"), details={"task": "qasper", "length": 1})
    assert task.score(sample, "40") == {"score": 100}
    assert task.score(sample, "forty")["score"] == pytest.approx(200 / 3)


def test_samples():
    samples = LongBench().samples(DATA)
    assert list(dict.fromkeys(sample.details["task"] for sample in samples)) == list(TASKS)
    assert len(TASKS) == 13
    assert len({sample.identity for sample in samples}) == len(samples) == 22
    assert all(sample.stop == (("\n",) if sample.details["task"] == "samsum" else ()) for sample in samples)
    json.dumps([dict(sample.details) for sample in samples])

    first = samples[0]
    assert (first.identity, first.max_new_tokens, first.references) == ("qasper/1", 128, ("Forty", "40"))
    assert first.prompt.startswith("You are given a scientific article")
    assert first.prompt.endswith("?\n\nAnswer:")
    assert "\n\nArticle: Abstract: We weigh apples" in first.prompt
    assert "weighed?\n" in first.prompt


def test_prompts_of_code_are_the_code_and_nothing_between():
    lcc, _, repobench = LongBench(["repobench-p", "lcc"]).samples(DATA)
    assert lcc.prompt == (
        "Please complete the code given below. \n"
        'def area(width, height):\n    """Of a {rectangle}."""\nNext line of code:\n'  # braces of a text are left alone
    )
    assert repobench.prompt.endswith(
        "    return width * height\nfrom shapes import area\n\ndef main():\nNext line of code:\n"
    )


def test_every_task_has_a_prompt_and_a_length():
    without_input = {"gov_report", "multi_news", "passage_count", "lcc"}
    assert {task for task, prompt in PROMPTS.items() if "{input}" not in prompt} == without_input
    assert all(prompt.count("{context}") == 1 for prompt in PROMPTS.values())
    assert set(MAX_NEW_TOKENS) == set(TASKS)


def test_right_and_empty_answers():
    task = LongBench()
    samples = task.samples(DATA)
    best = task.summary(answer_all(task, samples, lambda sample: sample.references[0]))
    # "Capital city" names no other class: "City" has a capital letter of its own.
    assert {name: summary["average"] for name, summary in best["tasks"].items()} == dict.fromkeys(TASKS, 100)
    assert best["average"] == 100
    assert best["buckets"] == {"0-4k": 100, "4-8k": 100, "8k+": 100}
    worst = task.summary(answer_all(task, samples, lambda sample: ""))
    assert worst["average"] == 0
    assert json.loads(json.dumps(best)) == best


def test_buckets():
    assert [bucket_of(length) for length in (0, 3999, 4000, 7999, 8000, 50000)] == [
        *("0-4k", "0-4k", "4-8k", "4-8k", "8k+", "8k+")
    ]


def test_summary_by_hand():
    task = LongBench(["qasper", "lcc", "trec"])
    scores = [("qasper", 10, 100), ("qasper", 20, 100), ("qasper", 30, 0), ("qasper", 8000, 50), ("lcc", 4000, 30)]
    summary = task.summary([answered(*score, number) for number, score in enumerate(scores)])
    assert summary["tasks"]["qasper"] == {
        "average": pytest.approx((66.67 + 50) / 2),
        "buckets": {"0-4k": 66.67, "4-8k": None, "8k+": 50},
        "samples": {"0-4k": 3, "4-8k": 0, "8k+": 1},
    }
    assert summary["tasks"]["trec"]["average"] is None
    assert summary["buckets"] == {"0-4k": 66.67, "4-8k": 30, "8k+": 50}
    assert summary["average"] == pytest.approx((58.335 + 30) / 2)


def test_halves_are_rounded_as_numpy_does():
    task = LongBench(["lcc"])
    scores = [100, 100, 100, 69, 0, 0, 0, 0]  # mean 46.125
    summary = task.summary([answered("lcc", 10, score, number) for number, score in enumerate(scores)])
    assert summary["tasks"]["lcc"]["buckets"]["0-4k"] == 46.12


def test_summary_of_nothing():
    summary = LongBench(["lcc"]).summary([])
    assert summary["average"] is None
    assert summary["buckets"] == {"0-4k": None, "4-8k": None, "8k+": None}


def test_table():
    task = LongBench(["lcc", "qasper"])
    summaries = {
        "ours": task.summary([answered("qasper", 10, 50), answered("lcc", 4000, 200 / 3)]),
        "other": LongBench(["lcc"]).summary([answered("lcc", 10, 25)]),
    }
    tables = task.table(summaries).split("\n\n")
    assert tables[0].splitlines() == [
        "| score | qasper | lcc | average |",
        "|---|---|---|---|",
        "| ours | 50.00 | 66.67 | 58.34 |",
        "| other |  | 25.00 | 25.00 |",
    ]
    assert [table.splitlines()[0].split(" | ")[0] for table in tables[1:]] == [
        *("| score, 0-4k words", "| score, 4-8k words", "| score, 8k+ words")
    ]
    assert tables[2].splitlines()[2:] == ["| ours |  | 66.67 | 66.67 |", "| other |  |  |  |"]


def test_files_without_e_are_second_choice(tmp_path):
    write_lines(tmp_path, "lcc.jsonl", item(context="old\n"))
    assert "\nold\n" in LongBench(["lcc"]).samples(tmp_path)[0].prompt
    write_lines(tmp_path, "lcc_e.jsonl", "", item(context="even\n"))
    (sample,) = LongBench(["lcc"]).samples(tmp_path)
    assert "\neven\n" in sample.prompt
    assert sample.identity == "lcc/2"


@pytest.fixture
def archive(tmp_path):
    """`data.zip` as it is on the Hub."""
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as file:
        for source in DATA.iterdir():
            file.write(source, f"data/{source.name}")
        file.writestr("data/lcc.jsonl", "not asked for")
    return path


def test_the_hubs_archive(archive, monkeypatch):
    asked = []

    def download(repository, name, **options):
        asked.append((repository, name, options))
        return str(archive)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    task = LongBench()
    assert task.samples(None) == task.samples(archive) == task.samples(DATA)
    assert asked == [("THUDM/LongBench", "data.zip", {"repo_type": "dataset"})]


def test_a_hub_that_does_not_answer(monkeypatch):
    def download(*names, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(OSError, match=r"THUDM/LongBench does not give data\.zip: give a folder .*no connection"):
        LongBench().samples(None)


def test_malformed_line_in_an_archive(tmp_path):
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data/lcc_e.jsonl", "{}\n")
    with pytest.raises(ValueError, match=r"data\.zip/data/lcc_e\.jsonl, line 1 has no text \"context\""):
        LongBench(["lcc"]).samples(path)


@pytest.mark.parametrize(
    ("task", "bad", "message"),
    [
        ("lcc", "{", "is not JSON"),
        ("lcc", "[]", "is no JSON object"),
        ("lcc", item(context="\udc00"), r"has '\udc00', half of a surrogate pair, which is no character"),
        ("lcc", "[" * 200_000 + "]" * 200_000, "is nested too deeply"),
        ("lcc", {"input": "", "context": "", "answers": ["x"]}, 'has no number of words "length"'),
        ("lcc", item(length=True), 'has no number of words "length"'),
        ("lcc", item(length=-1), 'has no number of words "length"'),
        ("lcc", item(context=None, answers="x"), 'has no text "context", no list "answers" of texts: it is no item'),
        ("lcc", item(answers=[]), 'has no list "answers"'),
        ("lcc", item(answers=[1]), 'has no list "answers"'),
        ("trec", item(), 'has no list "all_classes"'),
        ("trec", item(all_classes=["Food"]), '"Because" is not one of "all_classes"'),
        ("passage_retrieval_en", item(), '"Because" is not like "Paragraph 7"'),
    ],
)
def test_malformed_lines(task, bad, message, tmp_path):
    classes = ["Because", "Paragraph 3"]
    path = write_lines(tmp_path, f"{task}_e.jsonl", item(answers=["Paragraph 3"], all_classes=classes), bad)
    with pytest.raises(ValueError, match="line 2") as raised:
        LongBench([task]).samples(tmp_path)
    assert str(raised.value).startswith(f"{path}, line 2")
    assert message in str(raised.value)


def test_a_line_that_is_not_unicode(tmp_path):
    (tmp_path / "lcc_e.jsonl").write_bytes(b'{"input": "\xff"}\n')
    with pytest.raises(ValueError, match=r"lcc_e\.jsonl, line 1 is not JSON"):
        LongBench(["lcc"]).samples(tmp_path)


def test_missing_files(tmp_path):
    write_lines(tmp_path, "lcc_e.jsonl", item())
    with pytest.raises(
        FileNotFoundError, match=r"no file .*trec_e\.jsonl, .*samsum_e\.jsonl, nor one without _e: put it"
    ) as raised:
        LongBench(["lcc", "trec", "samsum"]).samples(tmp_path)
    assert "lcc_e" not in str(raised.value)
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere: give one"):
        LongBench().samples(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"lcc_e\.jsonl is neither a folder nor a zip file"):
        LongBench().samples(tmp_path / "lcc_e.jsonl")


def test_unknown_tasks():
    with pytest.raises(ValueError, match=r"no task narrativeqa, lsht: choose from qasper, .*repobench-p"):
        LongBench(["lcc", "narrativeqa", "lsht"])
    with pytest.raises(ValueError, match="no task of LongBench-E is named: choose from"):
        LongBench([])
