# SPDX-License-Identifier: Apache-2.0
"""L-Eval's closed-ended tasks (An et al., arXiv 2307.11088): exams over long documents, marked by exact match.

The texts around document and question are those of OpenLMLab/LEval (`Baselines/LEval_config.py` and
`llama2-chat-test.py`), their spelling included, so that scores compare. Its chat marks (`[INST]`, `<<SYS>>`) mean nothing
to a base model: the system text stands right before the document instead, as in that repository's scripts for models
without a system role (MPT, XGen, Vicuna), and the topic question is followed by the speaker that the record goes on with.

Marks are those of its `Evaluation/auto_eval.py` and `em.py`. Where these are odd, the oddity counts, and a comment names it.
One cannot be had sample by sample: there the two answers on science fiction are one text, cut at "[fact:", so that a first
answer with these characters in it takes the place of the second.

Prompts are whole. That repository cuts a document that is too long at its end (code at its start), to as many words as a
model reads tokens and then to fewer and fewer; here whoever asks the model cuts the prompt, and says how.
"""

import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from .reporting import table_head, table_row
from .tasks import Answered, Sample, json_lines

HUB_REPOSITORY, HUB_FOLDER = "L4NLP/LEval", "LEval/Exam"
MAX_NEW_TOKENS = 512  # of every task; nothing but the end of text stops an answer
TOPICS = "topic_retrieval_longchat"
TASKS = ("coursera", "gsm100", "quality", "sci_fi", "tpo", "codeU", TOPICS)
# What the mean of a task is taken over first: every question on fiction is asked twice, about its world and about ours.
PARTS = {"sci_fi": ("loyalty", "fact"), TOPICS: ("first", "second", "third")}

_ONE_OPTION = (
    "Now you are given a very long document. Please follow the instruction based on this document. For multi-choice "
    "questions, there is only a sinlge correct option. Please only provide the letter corresponding to the answer (like A "
    "or B) when answering. For other questions, please directly give the concise and accurate answer. "
)
SYSTEM_TEXTS = {
    "coursera": "Now you are given a very long document. Please follow the instruction based on this document. For "
    "multi-choice questions, there could be a sinlge correct option or multiple correct options. Please only provide the "
    "letter corresponding to the answer (like A or AB) when answering. ",
    "gsm100": "Given several question answer pairs, you need to follow a similar format to answer the last question. Make "
    "sure the response is end with The answer is _ . ",
    "quality": _ONE_OPTION,
    "sci_fi": "Now you are given a scientific fiction. I will ask you some questions and the answer should be "
    '"True" or "False". Notice that you should answer the question based on the evidence in the document instead of your '
    "background knowledge.",
    "tpo": _ONE_OPTION,
    "codeU": "Now you are given a code base consisting of a large amount of functions and the corresponding comments. In "
    "the end, I will call some functions defined in the code base. Please carefully read these codes and comments and "
    "answer the question.",
    TOPICS: "Below is a record of our previous conversation on many different topics. You are the ASSISTANT, and I am the "
    "USER. At the beginning of each topic, the USER will say 'I would like to discuss the topic of <TOPIC>'. Memorize each "
    "<TOPIC>. At the end of the record, I will ask you to retrieve the first/second/third topic names. Now the record "
    "start. ",
}
_ABOUT_THE_DOCUMENT = "based on the world described in the document."
_ABOUT_REALITY = "based on the real-world knowledge and facts up until your last training"

_LETTERS = "ABCD"
_GOLD_JUDGEMENT = re.compile(r"\s*(true|false)\s*\[fact:\s*(true|false)\s*\]\s*", re.IGNORECASE)


@dataclass(frozen=True)
class _Document:
    """A line of a file: a text with questions and the answers to them."""

    place: str  # file and line, for messages
    line: int
    text: str
    instructions: list[str]
    outputs: list[str]


class LEval:
    """L-Eval's closed-ended tasks, or some of them.

    Args:
        tasks: which, of `TASKS`.

    Raises:
        ValueError: there is no task of that name, or none is named.
    """

    name = "leval"

    def __init__(self, tasks: Sequence[str] = TASKS):
        unknown = [task for task in tasks if task not in TASKS]
        if unknown or not tasks:
            what = f"L-Eval has no closed-ended task {', '.join(unknown)}" if unknown else "no task of L-Eval is named"
            raise ValueError(f"{what}: choose from {', '.join(TASKS)}")
        self.tasks = tuple(task for task in TASKS if task in tasks)

    def samples(self, data: Path | None) -> list[Sample]:
        """One for every question, two for every question on fiction; task by task, in the files' order.

        Args:
            data: a folder with `TASK.jsonl` for every task, as in the benchmark's `LEval-data/Closed-ended-tasks`; None:
                the Hub's L4NLP/LEval.

        Raises:
            ValueError: a line that is not what it should be; names file, line and what is wrong.
            OSError: files that are not there, or that the Hub does not give; names them.
        """
        files = _local_files(Path(data), self.tasks) if data is not None else _hub_files(self.tasks)
        return [sample for task in self.tasks for document in _documents(files[task]) for sample in _samples(task, document)]

    def score(self, sample: Sample, answer: str) -> dict[str, float]:
        """`exact_match`: 0 or 100; 25 for some, but not all, of several right options."""
        # White space around an answer is no part of it: the benchmark's scripts strip what models of APIs say, and a
        # tokenizer that joins spaces to words puts one in front of nearly every answer to "Answer:".
        mark = _SCORERS[sample.details["task"]](answer.strip(), sample.references[0])
        return {"exact_match": 100 * mark}

    def summary(self, answered: Sequence[Answered]) -> dict[str, Any]:
        """`tasks`: by name, `accuracy` (0 to 100) and number of `samples`; with `parts`, by name, accuracy is the mean of
        these. `average`: of the tasks that have samples."""
        tasks = {
            task: _task_summary(task, [one for one in answered if one.sample.details["task"] == task]) for task in self.tasks
        }
        return {"tasks": tasks, "average": _mean([summary["accuracy"] for summary in tasks.values()])}

    def table(self, summaries: Mapping[str, Mapping[str, Any]]) -> str:
        """Models by tasks; empty where there is no sample."""
        tasks = [task for task in TASKS if any(task in summary["tasks"] for summary in summaries.values())]
        text = table_head("exact match, %", [*tasks, "average"])
        for name, summary in summaries.items():
            values = [summary["tasks"].get(task, {}).get("accuracy") for task in tasks]
            text += table_row(name, ["" if value is None else f"{value:.2f}" for value in [*values, summary["average"]]])
        return text


def _local_files(folder: Path, tasks: Sequence[str]) -> dict[str, Path]:
    files = {task: folder / f"{task}.jsonl" for task in tasks}
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"no file {', '.join(missing)}: put it there from LEval-data/Closed-ended-tasks of github.com/OpenLMLab/LEval "
            f"or {HUB_FOLDER} of the Hub's {HUB_REPOSITORY}, or choose other tasks"
        )
    return files


def _hub_files(tasks: Sequence[str]) -> dict[str, Path]:
    from huggingface_hub import hf_hub_download  # a local folder needs no Hub

    files = {}
    for task in tasks:
        name = f"{HUB_FOLDER}/{task}.jsonl"
        try:
            files[task] = Path(hf_hub_download(HUB_REPOSITORY, name, repo_type="dataset"))
        except OSError as error:
            advice = "give a folder that has the benchmark's files, or choose other tasks"
            raise OSError(f"the Hub's {HUB_REPOSITORY} does not give {name}: {advice} ({error})") from error
    return files


def _documents(path: Path) -> Iterator[_Document]:
    return (_document(*line) for line in json_lines(path))


def _document(number: int, place: str, fields: Mapping[str, Any]) -> _Document:
    if not isinstance(fields.get("input"), str):
        raise ValueError(f'{place} has no text "input"')
    for name in ("instructions", "outputs"):
        texts = fields.get(name)
        if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f'{place} has no list "{name}" of texts that are not empty')
    instructions, outputs = fields["instructions"], fields["outputs"]
    if not instructions or len(instructions) != len(outputs):
        raise ValueError(
            f"{place} has {len(instructions)} instructions and {len(outputs)} outputs: it needs as many, and some"
        )
    return _Document(place, number, fields["input"], instructions, outputs)


def _samples(task: str, document: _Document) -> Iterator[Sample]:
    for number, (instruction, output) in enumerate(zip(document.instructions, document.outputs, strict=True), 1):
        identity, prompt = f"{task}/{document.line}/{number}", _prompt(task, document.text, instruction)
        if task == "sci_fi":
            gold = _GOLD_JUDGEMENT.fullmatch(output)
            if gold is None:
                raise ValueError(f'{document.place}, output {number}: "{output}" is not like "True [fact: False]"')
            yield _sample(f"{identity}/loyalty", prompt, gold[1], {"task": task, "part": "loyalty"})
            yield _sample(f"{identity}/fact", _prompt_about_reality(instruction), gold[2], {"task": task, "part": "fact"})
        elif task == TOPICS:
            part = PARTS[TOPICS][(number - 1) % len(PARTS[TOPICS])]
            yield _sample(identity, prompt, output, {"task": task, "part": part})
        else:
            yield _sample(identity, prompt, output, {"task": task})


def _sample(identity: str, prompt: str, reference: str, details: dict[str, str]) -> Sample:
    return Sample(identity, prompt, MAX_NEW_TOKENS, references=(reference,), details=details)


def _prompt(task: str, document: str, instruction: str) -> str:
    if task in ("gsm100", "codeU"):
        return f"{SYSTEM_TEXTS[task]}{document}\n\n{instruction}"
    if task == TOPICS:
        return f"{SYSTEM_TEXTS[task]}{document}\n\n{instruction} \nASSISTANT:"
    return (
        f"{SYSTEM_TEXTS[task]}Document is as follows. {document} \nQuestion: {instruction}.  "
        "Please directly give the answer without any additional output or explanation \nAnswer:"
    )


def _prompt_about_reality(instruction: str) -> str:
    # Odd: no space between the sentences, and an instruction that does not name the document stays as it is.
    question = instruction.replace(_ABOUT_THE_DOCUMENT, _ABOUT_REALITY)
    return f"{question}Please directly answer without any additional output or explanation. \nAnswer:"


def _mark(answer: str, gold: str) -> float:
    """1, 0.25 or 0; both texts as the task's rules left them."""
    options = _without_punctuation(gold)
    if set(options) <= set(_LETTERS):
        given = _without_punctuation(answer)
        # Odd: a quarter for any part of the right options, and for all of them in another order.
        return 1.0 if given == options else 0.25 if set(given) <= set(options) else 0.0
    try:
        return float(float(answer) == float(gold))
    except ValueError:
        # Odd: of an answer of several lines the first with more than one character counts; the gold answer may stand
        # anywhere in it, even inside a longer word or number.
        line = next((line for line in answer.split("\n") if len(line) > 1), answer)
        return float(_squeezed(gold) in _squeezed(line))


def _without_punctuation(text: str) -> str:
    text = "".join(character for character in text if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _squeezed(text: str) -> str:
    return text.lower().replace(" ", "")


def _mark_one_option(answer: str, gold: str) -> float:
    return _mark(_option(answer), _gold_options(gold))


def _mark_several_options(answer: str, gold: str) -> float:
    return _mark(_options(answer), _gold_options(gold))


def _gold_options(gold: str) -> str:
    """The letters in the first word: "(C) By train" -> C."""
    return "".join(character for character in gold.split()[0] if character in _LETTERS) or "A"


def _option(answer: str) -> str:
    """The letter that is chosen where one is right."""
    if not answer or answer in _LETTERS:
        return answer or "None"
    # Odd: it is the first capital A to D, inside a word too ("Answer: B" means A, "Because of C" means B); small letters
    # do not count, and an answer without any means A.
    return next((character for character in answer if character in _LETTERS), "A")


def _options(answer: str) -> str:
    """The letters that are chosen where several may be right."""
    if not answer or answer in _LETTERS:
        return answer or "None"
    start = answer[: len(answer) - len(answer.lstrip(_LETTERS))]
    if len(start) > 1:
        return _sorted_letters(start)
    # Odd: letters count where white space, "." or ")" comes after them, so "A, B, C." means AC, and "A, B" means A.
    rest = answer[len(start) :].split("Question")[0]
    found = _sorted_letters(start + "".join(re.findall(r"[A-D](?=[\s.)])", rest)))
    if found:
        return found
    # Odd: failing these, the first run of capitals A to D, inside a word too and in its own order, else A.
    run = re.search("[A-D]+", rest)
    return run[0] if run else "A"


def _sorted_letters(letters: str) -> str:
    return "".join(sorted(set(letters)))


def _mark_number(answer: str, gold: str) -> float:
    return _mark(_number(answer), _number(gold))


def _number(text: str) -> str:
    """What comes after the first "The answer is ", else the last word of the first paragraph that has a digit."""
    named = re.search(r"The answer is (\S+)", text)
    words = [named[1]] if named else text.split("\n\n")[0].split(" ")[::-1]
    word = next((word for word in words if any(map(str.isdigit, word))), "")
    # Odd: signs and fractions are dropped, and words are cut at spaces alone: "2\n3" means 23.
    return "".join(filter(str.isdigit, word.split(".")[0]))


def _mark_code(answer: str, gold: str) -> float:
    return _mark(_code_output(answer, len(gold.split())), _plain_values(gold))


def _plain_values(text: str) -> str:
    """Arrays as numpy prints them; odd: 0.05 becomes 05."""
    text = re.sub(r"\s+", " ", text)
    for old, new in ((",", ""), ("'", ""), ("\\", ""), (".0", ""), ("] [", "]["), ("[ [", "[["), ("] ]", "]]")):
        text = text.replace(old, new)
    return text


def _code_output(answer: str, gold_words: int) -> str:
    """The words after the last "the final output", else the last words: three more than the gold answer has."""
    text = _plain_values(answer)
    # Odd: these go inside words too, so that "this" becomes "th"; gold answers keep them.
    for words in ("will be", "of the code", "is", "would be", "the value of", "the result of", "printed"):
        text = text.replace(words, "")
    _, found, after = text.rpartition("the final output")
    # Odd: the space in front of the first word and that behind the last make a word each.
    return " ".join(re.split(r"\s+", after)[: gold_words + 3] if found else re.split(r"\s+", after)[-gold_words - 3 :])


def _mark_judgement(answer: str, gold: str) -> float:
    return _mark(_judgement(answer), gold)


def _judgement(answer: str) -> str:
    """The first word that has "true" or "false" in it; odd: "untrue" means true."""
    for word in answer.lower().split("[fact:")[0].split():
        for judgement in ("true", "false"):
            if judgement in word:
                return judgement
    return "<error>"


_SCORERS: dict[str, Callable[[str, str], float]] = {
    "coursera": _mark_several_options,
    "gsm100": _mark_number,
    "quality": _mark_one_option,
    "sci_fi": _mark_judgement,
    "tpo": _mark_one_option,
    "codeU": _mark_code,
    TOPICS: _mark,
}


def _task_summary(task: str, answered: Sequence[Answered]) -> dict[str, Any]:
    scores = [one.scores["exact_match"] for one in answered]
    if task not in PARTS:
        return {"accuracy": _mean(scores), "samples": len(answered)}
    parts = {
        part: _mean([one.scores["exact_match"] for one in answered if one.sample.details["part"] == part])
        for part in PARTS[task]
    }
    return {"accuracy": _mean(list(parts.values())), "samples": len(answered), "parts": parts}


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those that are there."""
    there = [value for value in values if value is not None]
    return fmean(there) if there else None
