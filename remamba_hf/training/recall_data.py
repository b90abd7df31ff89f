# SPDX-License-Identifier: Apache-2.0
"""The recall task: book text with planted sentences that give people secret numbers, and a question for one of them.

    ...and so they walked on.
    The secret number of Elinor Marsh is 48213.
    It was late when...

    Question: What is the secret number of Elinor Marsh?
    Answer: 48213<|endoftext|>

`RecallText` is a text of which several people's numbers are asked, or whose text is a row of numbered documents.

Sentences are planted at the ends of lines, so that the token ids are those of the text a user would write. Everything
is a function of (seed, index): any sample can be made again, in any order and in any process.

Shape legend: B rows, P prompt tokens, L tokens of a row (P, the answer, and padding: the kernels want lengths that are
multiples of 8).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

# The name comes before the number: the state at a digit then knows whose number it is.
FACTS = (
    ("The secret number of", " is", "."),
    ("Remember that the secret number of", " is", "."),
    ("Note well: the secret number of", " is", "."),
    ("It is said that the secret number of", " is", "."),
    ("In those days the secret number of", " was", "."),
    ("Few people knew that the secret number of", " was", "."),
    ("The number kept secret by", " is", "."),
    ("As the clerk wrote, the secret number of", " is", ", and nothing more."),
)
QUESTIONS = (
    ("Question: What is the secret number of", "?\nAnswer:"),
    ("Question: Tell me the secret number of", ".\nAnswer:"),
    ("Question: What was the secret number of", "?\nAnswer:"),
    ("Question: Do you recall the secret number of", "?\nAnswer:"),
)
# Short prompts have no room for every wording: draw again, this often.
FITTING_DRAWS = 50
FIRST_NAMES = (
    "Abigail Ada Adam Agnes Albert Alfred Alice Alma Amelia Amos Andrew Anna Anthony Arthur Augusta Barbara Beatrice "
    "Benjamin Bernard Bertha Blanche Bridget Caleb Caroline Cecil Charles Charlotte Clara Clement Conrad Constance "
    "Cornelia Cyril Daniel David Deborah Dorothy Duncan Edgar Edith Edmund Edward Eleanor Elinor Elias Eliza Elizabeth "
    "Ellen Emily Emma Ernest Esther Ethel Eugene Eva Evelyn Felix Fanny Flora Florence Frances Francis Frank Frederick "
    "George Gertrude Gilbert Grace Gregory Hannah Harold Harriet Harry Helen Henry Herbert Hester Hilda Horace Hubert "
    "Hugh Ida Irene Isaac Isabel Jacob James Jane Jasper Jeremy Joan John Jonathan Joseph Josephine Joshua Judith "
    "Julia Julian Katherine Kate Laura Laurence Leonard Lewis Lilian Louis Louisa Lucy Luke Lydia Mabel Magnus Margaret "
    "Marian Mark Martha Martin Mary Matilda Matthew Maurice Michael Mildred Miriam Nathan Nicholas Nora Norman Oliver "
    "Olivia Oscar Patrick Paul Penelope Peter Philip Phoebe Rachel Ralph Raymond Rebecca Richard Robert Roger Roland "
    "Rosamund Rose Rupert Ruth Samuel Sarah Silas Simon Sophia Stephen Susan Sylvia Theodore Theresa Thomas Timothy "
    "Ursula Valentine Victor Victoria Vincent Viola Violet Virginia Walter Wilfred William Winifred"
).split()
LAST_NAMES = (
    "Abbot Adams Alden Archer Ashby Atwood Bailey Baker Barlow Barrett Bates Beck Bell Bennet Berry Bishop Blake Bolton "
    "Bowen Boyd Bradley Brewer Briggs Brook Bryant Burke Burton Butler Cameron Carey Carlton Carter Chapman Clark "
    "Clayton Cole Collins Conway Cooper Cox Crane Crawford Cross Curtis Dale Dalton Davis Dawson Day Dean Denton Dixon "
    "Drake Duncan Eaton Ellis Evans Farmer Fenton Fisher Fleming Fletcher Forbes Foster Fowler Fox Franklin Frost "
    "Fuller Gardner Gibson Gilmore Gordon Graham Grant Graves Greene Griffin Hale Hall Hamilton Harding Harper "
    "Harrison Hart Harvey Hawkins Hayes Heath Hill Holland Holmes Holt Hood Hooper Hope Howard Hudson Hughes Hunter "
    "Hutton Irving Jackson Jarvis Jennings Johnson Jordan Kemp Kent King Kirby Knight Lamb Lambert Lane Lawson Lee "
    "Lloyd Long Lowe Lucas Lynch Manning Marsh Marshall Mason Mercer Miller Mills Mitchell Monroe Moore Morgan Morris "
    "Murray Nash Nelson Newton Noble Norris North Norton Oakley Osborne Owen Page Palmer Parker Parsons Payne Pearson "
    "Perkins Perry Phillips Pierce Pope Porter Potter Powell Pratt Price Quincy Radford Reed Reynolds Rhodes Rice "
    "Richards Rivers Roberts Robinson Rogers Rowe Russell Sanders Savage Scott Sharp Shaw Shelton Sherwood Simpson "
    "Snow Spencer Stanley Steele Stevens Stone Stuart Sutton Talbot Taylor Temple Thornton Todd Townsend Travers "
    "Tucker Turner Vance Vaughan Vernon Wade Walker Wallace Walsh Walton Ward Warner Warren Watson Webb Wells West "
    "Weston Wheeler White Whitman Willis Wilson Winter Wood Woodward Wright Wyatt York Young"
).split()


@dataclass(frozen=True)
class RecallSample:
    """One prompt with its answer.

    Attributes:
        prompt_ids: prompt tokens, `int64[P]`.
        answer_ids: a space, the digits and the end-of-text token, `int64[digits + 2]`.
        evidence: positions of the asked fact from its name to its last digit: the first, and the one after the last.
        digits: positions of the asked fact's digits, likewise.
        name: whose number is asked for.
        number: the digits as text.
        depth: where the fact was planted, 0 (start of the text) to 1 (end).
    """

    prompt_ids: np.ndarray
    answer_ids: np.ndarray
    evidence: tuple[int, int]
    digits: tuple[int, int]
    name: str
    number: str
    depth: float


@dataclass(frozen=True)
class AskedFact:
    """A fact in a text, and the question for it.

    Attributes:
        question_ids: what follows the text, `int64[Q]`.
        answer_ids, evidence, digits, name, number, depth: as in `RecallSample`; positions are the text's.
    """

    question_ids: np.ndarray
    answer_ids: np.ndarray
    evidence: tuple[int, int]
    digits: tuple[int, int]
    name: str
    number: str
    depth: float


@dataclass(frozen=True)
class RecallText:
    """A text, of which one or several facts are asked, each by itself: the prompt of one is the text and its question.

    Attributes:
        text_ids: `int64[T]`.
        asked: the facts that are asked.
        other_numbers: the numbers of the people who are not asked for.
        other_digits: where these stand, as `AskedFact.digits` says it; not known of documents.
    """

    text_ids: np.ndarray
    asked: tuple[AskedFact, ...]
    other_numbers: tuple[str, ...]
    other_digits: tuple[tuple[int, int], ...] = ()

    def prompt_ids(self, fact: int = 0) -> np.ndarray:
        """The text with the question for the fact of that number, `int64[T + Q]`."""
        return np.concatenate([self.text_ids, self.asked[fact].question_ids])

    def dialogue(self) -> list[np.ndarray]:
        """All questions, each followed by its answer."""
        return [part for fact in self.asked for part in (fact.question_ids, fact.answer_ids)]


@dataclass(frozen=True)
class _Fact:
    """A sentence before it is planted. ids: with its line end; name_start, digits_start, digits_end: in it."""

    ids: np.ndarray
    name_start: int
    digits_start: int
    digits_end: int
    person: tuple[int, int]
    digits: np.ndarray

    @property
    def number(self) -> str:
        return "".join(map(str, self.digits))


class RecallSampler:
    """Makes recall prompts from book tokens.

    Args:
        tokens: ids of book text, `uint16[tokens]` (a memory map will do).
        tokenizer: the tokenizer that made them. Where digits are single tokens, as those of `train_book_tokenizer`, numbers
            are made of these; otherwise they are encoded as a whole, and may have different numbers of tokens.
        seed: samples with the same seed and index are the same.
        digits: length of the numbers.
        noise: about this share of the book tokens is replaced, in runs of 1 to 32 that repeat a few digits or a few tokens
            of any kind: long books have tables, figures, foreign scripts and signs that short texts of a training hardly
            show, and what a model never saw it can take for anything.

    Raises:
        ValueError: noise with a tokenizer that joins digits.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        tokenizer: PreTrainedTokenizerBase,
        seed: int = 0,
        digits: int = 5,
        noise: float = 0.0,
    ) -> None:
        self.tokens = tokens
        self.seed = seed
        self.digits = digits
        self.noise = noise

        def encode(text: str) -> np.ndarray:
            return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)

        digit_ids = [encode(str(digit)) for digit in range(10)]
        joins_digits = any(len(ids) != 1 for ids in digit_ids) or len(encode("12")) != 2
        if joins_digits and noise:
            raise ValueError("noise needs a tokenizer that makes one token of every digit: see train_book_tokenizer")
        self.digit_ids = None if joins_digits else np.concatenate(digit_ids)
        self.encode = encode
        self.newline = int(encode("\n")[-1])  # some tokenizers put a space before every text
        self.space = encode(" ")
        self.end_of_text = int(tokenizer.eos_token_id)
        self.plain_ids = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids) if noise else None
        self.padding = int(tokenizer.pad_token_id)
        self.facts = [tuple(encode(part) for part in fact) for fact in FACTS]
        self.questions = [(encode("\n" + head), encode(tail)) for head, tail in QUESTIONS]
        self.heading = encode("\nDocument ")
        self.first_names = [encode(" " + name) for name in FIRST_NAMES]
        self.last_names = [encode(" " + name) for name in LAST_NAMES]

    def sample(
        self, index: int | Sequence[int], prompt_length: int, distractors: int = 0, depth: float | None = None
    ) -> RecallSample:
        """Makes the prompt number `index`.

        Args:
            index: an integer or several; together with the seed it fixes the sample.
            prompt_length: tokens of the prompt, exactly.
            distractors: facts about other people, with other numbers.
            depth: where the asked fact goes, 0 to 1 (to the nearest end of a line); `None` draws it.

        Raises:
            ValueError: the prompt is too short for the facts and the question, or longer than the books.
        """
        text = self.text(index, prompt_length, 1, distractors, None if depth is None else [depth])
        fact = text.asked[0]
        return RecallSample(
            prompt_ids=text.prompt_ids(),
            answer_ids=fact.answer_ids,
            evidence=fact.evidence,
            digits=fact.digits,
            name=fact.name,
            number=fact.number,
            depth=fact.depth,
        )

    def text(
        self,
        index: int | Sequence[int],
        prompt_length: int,
        keys: int = 1,
        distractors: int = 0,
        depths: Sequence[float] | None = None,
    ) -> RecallText:
        """Makes the text number `index`, of which the numbers of `keys` people are asked; for one, that of `sample`.

        Args:
            index: as for `sample`.
            prompt_length: tokens of the text with the longest of the questions, exactly.
            keys: people who are asked for.
            distractors: people who are not; all names and numbers are drawn alike.
            depths: where the asked facts go, one each, as for `sample`; `None` draws them.

        Raises:
            ValueError: as for `sample`, or more people than there are names.
        """
        generator = np.random.default_rng([self.seed, *np.atleast_1d(index)])
        for _ in range(FITTING_DRAWS):
            facts = self._facts(generator, keys + distractors)
            questions = [self._question(generator, fact.person) for fact in facts[:keys]]
            room = prompt_length - max(map(len, questions)) - sum(len(fact.ids) for fact in facts)
            if room > 0:
                break
        text = self._text(generator, room)
        drawn = generator.random(keys + distractors)
        if depths is not None:
            drawn[:keys] = depths
        places = self._places(text, drawn)
        planted, starts = _planted(text, facts, places)
        asked = tuple(
            self._asked(facts[key], questions[key], starts[key], places[key] / max(len(text), 1)) for key in range(keys)
        )
        others = tuple(
            (start + fact.digits_start, start + fact.digits_end)
            for start, fact in zip(starts[keys:], facts[keys:], strict=True)
        )
        return RecallText(planted, asked, tuple(fact.number for fact in facts[keys:]), others)

    def documents(
        self,
        index: int | Sequence[int],
        noise: int,
        distractors: int = 0,
        depth: float | None = None,
        document_length: int = 200,
    ) -> RecallText:
        """Makes a text of `noise` + 1 documents, in one of which stands the fact that is asked.

        A document is a heading ("Document 17") and whole lines of a passage from anywhere in the books; the fact stands
        between two of its lines.

        Args:
            index: as for `sample`.
            noise: documents without the asked fact (arXiv 2510.03279 has 10 to 200).
            distractors: facts about other people, each in another one of these.
            depth: which document holds the fact, 0 (the first) to 1 (the last); `None` draws it. The fact's `depth` is
                its place in the whole text.
            document_length: tokens of a passage, at most.

        Raises:
            ValueError: more distractors than documents for them, or books too short for a passage.
        """
        if not 0 <= distractors <= noise:
            raise ValueError(f"{distractors} distractors need as many documents without the fact, and there are {noise}")
        generator = np.random.default_rng([self.seed, *np.atleast_1d(index)])
        facts = self._facts(generator, distractors + 1)
        question = self._question(generator, facts[0].person)
        drawn = generator.random()
        holder = min(int((drawn if depth is None else depth) * (noise + 1)), noise)
        others = generator.choice(np.delete(np.arange(noise + 1), holder), size=distractors, replace=False)
        fact_of = {holder: facts[0], **dict(zip(others.tolist(), facts[1:], strict=True))}
        pieces, position, start = [], 0, 0
        for number in range(noise + 1):
            heading = np.concatenate([self.heading, self._digits(str(number + 1)), [self.newline]])
            passage = self._passage(generator, document_length)
            planted = [fact_of[number]] if number in fact_of else []
            body, starts = _planted(passage, planted, self._places(passage, generator.random(len(planted))))
            if number == holder:
                start = position + len(heading) + starts[0]
            pieces += [heading, body]
            position += len(heading) + len(body)
        asked = self._asked(facts[0], question, start, start / position)
        return RecallText(np.concatenate(pieces), (asked,), tuple(fact.number for fact in facts[1:]))

    def _facts(self, generator: np.random.Generator, count: int) -> list[_Fact]:
        """Draws people, then their numbers, then the wordings."""
        people = self._people(generator, count)
        numbers = generator.integers(0, 10, size=(count, self.digits))
        return [self._fact(generator, person, number) for person, number in zip(people, numbers, strict=True)]

    def _question(self, generator: np.random.Generator, person: tuple[int, int]) -> np.ndarray:
        head, tail = self.questions[generator.integers(len(self.questions))]
        return np.concatenate([head, self._name_ids(person), tail])

    def _asked(self, fact: _Fact, question: np.ndarray, start: int, depth: float) -> AskedFact:
        """The fact that begins at the position `start` of its text."""
        end = start + fact.digits_end
        return AskedFact(
            question_ids=question,
            answer_ids=np.concatenate([*self._number(fact.number), [self.end_of_text]]),
            evidence=(start + fact.name_start, end),
            digits=(start + fact.digits_start, end),
            name=f"{FIRST_NAMES[fact.person[0]]} {LAST_NAMES[fact.person[1]]}",
            number=fact.number,
            depth=depth,
        )

    def _people(self, generator: np.random.Generator, count: int) -> list[tuple[int, int]]:
        """Draws people that differ in both names, so that the question has one answer."""
        if count > min(len(FIRST_NAMES), len(LAST_NAMES)):
            raise ValueError(f"{count} people are more than there are names: ask for fewer keys or distractors")
        first = generator.choice(len(FIRST_NAMES), size=count, replace=False)
        last = generator.choice(len(LAST_NAMES), size=count, replace=False)
        return [(int(one), int(other)) for one, other in zip(first, last, strict=True)]

    def _name_ids(self, person: tuple[int, int]) -> np.ndarray:
        return np.concatenate([self.first_names[person[0]], self.last_names[person[1]]])

    def _fact(self, generator: np.random.Generator, person: tuple[int, int], number: np.ndarray) -> _Fact:
        head, verb, tail = self.facts[generator.integers(len(self.facts))]
        name = self._name_ids(person)
        space, digits = self._number("".join(map(str, number)))
        ids = np.concatenate([head, name, verb, space, digits, tail, [self.newline]])
        digits_start = len(head) + len(name) + len(verb) + len(space)
        return _Fact(ids, len(head), digits_start, digits_start + len(digits), person, number)

    def _number(self, number: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the space before a number, none where this is a part of its first token, and of the number."""
        if self.digit_ids is None:
            return np.empty(0, dtype=np.int64), self.encode(f" {number}")
        return self.space, self._digits(number)

    def _digits(self, number: str) -> np.ndarray:
        return self.encode(number) if self.digit_ids is None else self.digit_ids[list(map(int, number))]

    def _text(self, generator: np.random.Generator, length: int) -> np.ndarray:
        """Returns book text that ends with a line end."""
        if length < 1:
            raise ValueError("the prompt is too short for its facts and its question: give longer prompts")
        if length > len(self.tokens):
            raise ValueError(f"the books have {len(self.tokens)} tokens, fewer than the {length} asked for")
        start = int(generator.integers(0, len(self.tokens) - length + 1))
        text = np.asarray(self.tokens[start : start + length], dtype=np.int64)
        if self.plain_ids is not None and self.digit_ids is not None:
            for begin in np.flatnonzero(generator.random(length) < self.noise / 16.5):  # the mean length of a run
                run = text[begin : begin + generator.integers(1, 33)]
                kinds = self.digit_ids if generator.random() < 0.5 else self.plain_ids
                run[:] = generator.choice(generator.choice(kinds, size=generator.integers(1, 9)), size=len(run))
        text[-1] = self.newline
        return text

    def _passage(self, generator: np.random.Generator, length: int) -> np.ndarray:
        """Returns the whole lines of at most `length` tokens of the books (cut where a line is longer), no blank ones at
        the ends."""
        if 2 * length > len(self.tokens):
            raise ValueError(f"the books have {len(self.tokens)} tokens, too few for passages of {length}")
        for _ in range(FITTING_DRAWS):
            start = int(generator.integers(0, len(self.tokens) - 2 * length + 1))
            window = np.asarray(self.tokens[start : start + 2 * length], dtype=np.int64)
            ends = np.flatnonzero(window == self.newline) + 1
            first = int(ends[0]) if len(ends) and ends[0] <= length else 0
            inside = ends[(ends > first) & (ends <= first + length)]
            passage = window[first : int(inside[-1]) if len(inside) else first + length - 1]
            if (passage != self.newline).any():
                break
        return np.append(np.trim_zeros(passage - self.newline) + self.newline, self.newline)

    def _places(self, text: np.ndarray, depths: np.ndarray) -> list[int]:
        """Returns, for every depth, the nearest start of a line; the start of the text is one."""
        starts = np.append(0, np.flatnonzero(text == self.newline) + 1)
        target = depths * len(text)
        after = np.minimum(np.searchsorted(starts, target), len(starts) - 1)
        before = np.maximum(after - 1, 0)
        return np.where(target - starts[before] <= starts[after] - target, starts[before], starts[after]).tolist()


def _planted(text: np.ndarray, facts: Sequence[_Fact], places: Sequence[int]) -> tuple[np.ndarray, list[int]]:
    """The text with facts inserted before its tokens `places`, and where in the result each begins."""
    pieces, position, taken = [], 0, 0
    starts = [0] * len(facts)
    for fact in sorted(range(len(facts)), key=lambda fact: (places[fact], fact)):
        pieces.append(text[taken : places[fact]])
        position += places[fact] - taken
        taken, starts[fact] = places[fact], position
        pieces.append(facts[fact].ids)
        position += len(facts[fact].ids)
    return np.concatenate([*pieces, text[taken:]]), starts


@dataclass(frozen=True)
class RecallLevel:
    """How hard a batch is: one step of a curriculum.

    Attributes:
        prompt_lengths: prompt lengths a batch may have (one is drawn per batch), multiples of 8.
        distractors: largest number of distractors (0 to it are drawn per row).
        questions: people who are asked for in every row, one after another behind its text: with several, the name decides
            which number is right, and every row teaches that several times.
        depth: range that the depths of the asked facts are drawn from.
        two_stage: share of the batches that go through the two-stage forward; the rest are plain.
        span: range of the compression span p.
        ratio: range of the compression ratio rho (drawn evenly in its logarithm).
        min_kept: lower bound of K, because a short window at a small ratio would keep less than a sentence.
    """

    prompt_lengths: tuple[int, ...]
    distractors: int = 0
    questions: int = 1
    depth: tuple[float, float] = (0.0, 1.0)
    two_stage: float = 0.0
    span: tuple[float, float] = (0.3, 0.95)
    ratio: tuple[float, float] = (1.0, 1.0)
    min_kept: int = 24


class RecallDataset(Dataset):
    """Map-style dataset whose item `i` is the whole batch `i`, a function of (seed, i, level).

    The level is a number in shared memory: `set_level` in the training process reaches the loader's workers, which may
    be a few prefetched batches behind.

    Args:
        sampler: makes the rows.
        levels: the curriculum.
        tokens_per_batch: prompt tokens of a batch; a batch has `tokens_per_batch // P` rows, at least one.
        batches: length of the dataset.

    Raises:
        ValueError: a level has several questions and compresses prompts, of which a row has one.
    """

    def __init__(self, sampler: RecallSampler, levels: Sequence[RecallLevel], tokens_per_batch: int, batches: int) -> None:
        self.sampler = sampler
        self.levels = list(levels)
        self.tokens_per_batch = tokens_per_batch
        self.batches = batches
        if any(level.questions > 1 and level.two_stage > 0 for level in self.levels):
            raise ValueError("a row with several questions has no one prompt to compress: set two_stage=0 or questions=1")
        self._level = torch.zeros(1, dtype=torch.int64).share_memory_()

    @property
    def level(self) -> int:
        return int(self._level[0])

    def set_level(self, level: int) -> None:
        self._level[0] = level

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> dict[str, object]:
        """Returns one batch.

        `input_ids` and `labels` `int64[B, L]` (labels are -100 but on answers), `evidence` and `digits` `int64[B, 2]`
        (first position and the one after the last, of the first question), `prompt_length` (int, P of every row; with
        several questions that of the longest first one), `questions` (int), `numbers` `bool[B, L]` (the digits of all
        planted facts), `compression_span` and `compression_ratio` (floats), `compress_prompt` (bool) and `level` (int).
        """
        number = self.level
        level = self.levels[number]
        generator = np.random.default_rng([self.sampler.seed, index])
        length = int(generator.choice(level.prompt_lengths))
        rows = max(self.tokens_per_batch // length, 1)
        distractors = generator.integers(0, level.distractors + 1, size=rows)
        depths = generator.uniform(*level.depth, size=(rows, level.questions))
        texts = [
            self.sampler.text((index, row), length, level.questions, int(distractors[row]), depths[row].tolist())
            for row in range(rows)
        ]
        lengths = [len(text.text_ids) + sum(map(len, text.dialogue())) for text in texts]
        ids = np.full((rows, -(-max(lengths) // 8) * 8), self.sampler.padding, dtype=np.int64)
        labels = np.full_like(ids, -100)
        numbers = np.zeros_like(ids, dtype=bool)
        for row, text in enumerate(texts):
            for first, end in (*(fact.digits for fact in text.asked), *text.other_digits):
                numbers[row, first:end] = True
            ids[row, : lengths[row]] = np.concatenate([text.text_ids, *text.dialogue()])
            end = len(text.text_ids)
            for fact in text.asked:
                begin = end + len(fact.question_ids)
                end = begin + len(fact.answer_ids)
                labels[row, begin:end] = fact.answer_ids
        span, ratio = draw_compression(generator, length, level)
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "prompt_length": length,
            "questions": level.questions,
            "numbers": torch.from_numpy(numbers),
            "evidence": torch.tensor([text.asked[0].evidence for text in texts]),
            "digits": torch.tensor([text.asked[0].digits for text in texts]),
            "compression_span": span,
            "compression_ratio": ratio,
            "compress_prompt": bool(generator.random() < level.two_stage),
            "level": number,
        }


def draw_compression(generator: np.random.Generator, length: int, level: RecallLevel) -> tuple[float, float]:
    """Draws span and ratio such that the window and the kept vectors are multiples of 8 tokens, where they can be."""
    window = _multiple_of_8(generator.uniform(*level.span) * length, most=length - 1)
    low, high = np.log(level.ratio)
    kept = _multiple_of_8(max(np.exp(generator.uniform(low, high)) * window, level.min_kept), most=window)
    # The model takes ceilings of products: half a token less makes them come out whatever the rounding.
    return (window - 0.5) / length, (kept - 0.5) / window


def _multiple_of_8(count: float, most: int) -> int:
    return max(min(round(count / 8) * 8, most // 8 * 8), min(8, most))
