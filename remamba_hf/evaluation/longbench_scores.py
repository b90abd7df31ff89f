# SPDX-License-Identifier: Apache-2.0
"""LongBench's marks of one answer against its references (THUDM/LongBench, `metrics.py` and `eval.py`), 0 to 1.

Its scripts stand on two packages, of which this is what counts, to the last bit: `rouge` 1.0.1 for summaries, and
`fuzzywuzzy` without `python-Levenshtein` for code, which is `difflib`; with that package, or `rapidfuzz`, scores of code
come out two to four points higher. Where the rules are odd, the oddity counts, and a comment names it.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from itertools import chain

# Models go on with further examples behind the answers of these, which are asked with examples.
FIRST_LINE_TASKS = ("trec", "triviaqa", "samsum")

PARAGRAPH = re.compile(r"Paragraph (\d+)")


def score_answer(task: str, answer: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
    """The mark against the reference that fits best; 0 without references.

    Args:
        task: a key of `SCORERS`, or "trec".
        classes: all there are, for "trec".
    """
    if task in FIRST_LINE_TASKS:
        answer = answer.lstrip("\n").split("\n")[0]
    if task == "trec":
        marks = [class_match(answer, reference, classes) for reference in references]
    else:
        marks = [SCORERS[task](answer, reference) for reference in references]
    return max(marks, default=0.0)


def word_f1(answer: str, reference: str) -> float:
    """F1 of the words, each as often as it is there; case, punctuation and articles do not count."""
    given, wanted = _plain_words(answer), _plain_words(reference)
    same = (Counter(given) & Counter(wanted)).total()
    if same == 0:
        return 0.0
    precision, recall = same / len(given), same / len(wanted)
    return (2 * precision * recall) / (precision + recall)


def _plain_words(text: str) -> list[str]:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L of whole summaries as `rouge` 1.0.1 takes it; 0 where a text is empty or nothing but full stops.

    That package runs into Python's recursion limit at two sentences of about a thousand words together, which LongBench
    counts as 0: the one case that is not the same here.
    """
    given, wanted = _sentences(answer), _sentences(reference)
    if not given or not wanted:
        return 0.0
    # Odd: a word counts once, wherever and how often it stands.
    common = set().union(*(_common_words(one, other) for one in wanted for other in given))
    precision = len(common) / len(set(chain(*given)))
    recall = len(common) / len(set(chain(*wanted)))
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def _sentences(text: str) -> list[list[str]]:
    # Odd: they end at every full stop, that of a number too, and what is left of white space between two is an empty word.
    return [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]


def _common_words(wanted: Sequence[str], given: Sequence[str]) -> set[str]:
    """The words of the longest common subsequence; of several, the one that is found from the end, `given` first."""
    lengths = [[0] * (len(given) + 1)]
    for word in wanted:
        above, row = lengths[-1], [0]
        for column, other in enumerate(given):
            row.append(above[column] + 1 if word == other else max(above[column + 1], row[column]))
        lengths.append(row)
    words, line, column = set(), len(wanted), len(given)
    while line and column:
        if wanted[line - 1] == given[column - 1]:
            line, column = line - 1, column - 1
            words.add(wanted[line])
        elif lengths[line - 1][column] > lengths[line][column - 1]:
            line -= 1
        else:
            column -= 1
    return words


def class_match(answer: str, reference: str, classes: Sequence[str]) -> float:
    """1 where the right class is named in the answer, shared with the others that are."""
    named = [name for name in classes if name in answer]
    # Names inside the right one do not count. Odd: the list gets shorter as it is gone through, and the name behind one that
    # is dropped is passed over.
    for name in named:
        if name in reference and name != reference:
            named.remove(name)
    return 1.0 / len(named) if reference in named else 0.0


def number_share(answer: str, reference: str) -> float:
    """The share of the numbers in the answer that are the right one, written alike; 0 without numbers."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def paragraph_share(answer: str, reference: str) -> float:
    """`number_share` of the number in "Paragraph 7".

    Raises:
        ValueError: the reference is not of that form.
    """
    paragraph = PARAGRAPH.search(reference)
    if paragraph is None:
        raise ValueError(f'"{reference}" is not like "Paragraph 7"')
    return number_share(answer, paragraph[1])


def code_similarity(answer: str, reference: str) -> float:
    """Likeness, in whole hundredths, of the line of code; it is the first that has no comment and no code fence in it."""
    lines = answer.lstrip("\n").split("\n")
    # Odd: a `#` in a string, a `//` in an address and a C++ `#include` pass for comments; an empty line for code.
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if not line or not reference:
        return float(line == reference)
    return round(100 * SequenceMatcher(None, line, reference).ratio()) / 100


SCORERS: dict[str, Callable[[str, str], float]] = {
    "qasper": word_f1,
    "multifieldqa_en": word_f1,
    "hotpotqa": word_f1,
    "2wikimqa": word_f1,
    "gov_report": rouge_l,
    "multi_news": rouge_l,
    "triviaqa": word_f1,
    "samsum": rouge_l,
    "passage_count": number_share,
    "passage_retrieval_en": paragraph_share,
    "lcc": code_similarity,
    "repobench-p": code_similarity,
}
