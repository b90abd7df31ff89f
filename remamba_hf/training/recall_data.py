# SPDX-License-Identifier: Apache-2.0
"""The recall task: book text with planted sentences that give people secret numbers, and a question for one of them.

    ...and so they walked on.
    The secret number of Elinor Marsh is 48213.
    It was late when...

    Question: What is the secret number of Elinor Marsh?
    Answer: 48213<|endoftext|>

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


class RecallSampler:
    """Makes recall prompts from book tokens.

    Args:
        tokens: ids of book text, `uint16[tokens]` (a memory map will do).
        tokenizer: the tokenizer that made them; digits are single tokens and nothing is put before a text.
        seed: samples with the same seed and index are the same.
        digits: length of the numbers.

    Raises:
        ValueError: the tokenizer joins digits or adds tokens of its own.
    """

    def __init__(self, tokens: np.ndarray, tokenizer: PreTrainedTokenizerBase, seed: int = 0, digits: int = 5) -> None:
        self.tokens = tokens
        self.seed = seed
        self.digits = digits

        def encode(text: str) -> np.ndarray:
            return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)

        digit_ids = [encode(str(digit)) for digit in range(10)]
        if any(len(ids) != 1 for ids in digit_ids) or len(encode("12")) != 2:
            raise ValueError("the tokenizer must make one token of every digit: see train_book_tokenizer")
        self.digit_ids = np.concatenate(digit_ids)
        self.newline = int(encode("\n")[0])
        self.space = encode(" ")
        self.end_of_text = int(tokenizer.eos_token_id)
        self.padding = int(tokenizer.pad_token_id)
        self.facts = [tuple(encode(part) for part in fact) for fact in FACTS]
        self.questions = [(encode("\n" + head), encode(tail)) for head, tail in QUESTIONS]
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
        generator = np.random.default_rng([self.seed, *np.atleast_1d(index)])
        for _ in range(FITTING_DRAWS):
            people = self._people(generator, distractors + 1)
            numbers = generator.integers(0, 10, size=(distractors + 1, self.digits))
            facts = [self._fact(generator, name, number) for name, number in zip(people, numbers, strict=True)]
            head, tail = self.questions[generator.integers(len(self.questions))]
            question = np.concatenate([head, self._name_ids(people[0]), tail])
            room = prompt_length - len(question) - sum(len(ids) for ids, _ in facts)
            if room > 0:
                break
        text = self._text(generator, room)
        depths = generator.random(distractors + 1)
        if depth is not None:
            depths[0] = depth
        places = self._places(text, depths)
        order = sorted(range(len(facts)), key=lambda fact: (places[fact], fact))
        pieces, position, taken = [], 0, 0
        for fact in order:
            pieces.append(text[taken : places[fact]])
            position += places[fact] - taken
            taken = places[fact]
            if fact == 0:
                asked = position
            pieces.append(facts[fact][0])
            position += len(facts[fact][0])
        prompt = np.concatenate([*pieces, text[taken:], question])
        name_start, digits_end = facts[0][1]
        return RecallSample(
            prompt_ids=prompt,
            answer_ids=np.concatenate([self.space, self.digit_ids[numbers[0]], [self.end_of_text]]),
            evidence=(asked + name_start, asked + digits_end),
            digits=(asked + digits_end - self.digits, asked + digits_end),
            name=f"{FIRST_NAMES[people[0][0]]} {LAST_NAMES[people[0][1]]}",
            number="".join(map(str, numbers[0])),
            depth=places[0] / max(len(text), 1),
        )

    def _people(self, generator: np.random.Generator, count: int) -> list[tuple[int, int]]:
        """Draws people that differ in both names, so that the question has one answer."""
        first = generator.choice(len(FIRST_NAMES), size=count, replace=False)
        last = generator.choice(len(LAST_NAMES), size=count, replace=False)
        return [(int(one), int(other)) for one, other in zip(first, last, strict=True)]

    def _name_ids(self, person: tuple[int, int]) -> np.ndarray:
        return np.concatenate([self.first_names[person[0]], self.last_names[person[1]]])

    def _fact(
        self, generator: np.random.Generator, person: tuple[int, int], number: np.ndarray
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """Returns the ids of a fact with its line end, and where in it the name starts and the digits end."""
        head, verb, tail = self.facts[generator.integers(len(self.facts))]
        name = self._name_ids(person)
        ids = np.concatenate([head, name, verb, self.space, self.digit_ids[number], tail, [self.newline]])
        return ids, (len(head), len(head) + len(name) + len(verb) + len(self.space) + self.digits)

    def _text(self, generator: np.random.Generator, length: int) -> np.ndarray:
        """Returns book text that ends with a line end."""
        if length < 1:
            raise ValueError("the prompt is too short for its facts and its question: give a longer prompt_length")
        if length > len(self.tokens):
            raise ValueError(f"the books have {len(self.tokens)} tokens, fewer than the {length} asked for")
        start = int(generator.integers(0, len(self.tokens) - length + 1))
        text = np.asarray(self.tokens[start : start + length], dtype=np.int64)
        text[-1] = self.newline
        return text

    def _places(self, text: np.ndarray, depths: np.ndarray) -> list[int]:
        """Returns, for every depth, the nearest start of a line; the start of the text is one."""
        starts = np.append(0, np.flatnonzero(text == self.newline) + 1)
        target = depths * len(text)
        after = np.minimum(np.searchsorted(starts, target), len(starts) - 1)
        before = np.maximum(after - 1, 0)
        return np.where(target - starts[before] <= starts[after] - target, starts[before], starts[after]).tolist()


@dataclass(frozen=True)
class RecallLevel:
    """How hard a batch is: one step of a curriculum.

    Attributes:
        prompt_lengths: prompt lengths a batch may have (one is drawn per batch), multiples of 8.
        distractors: largest number of distractors (0 to it are drawn per row).
        depth: range that the asked fact's depth is drawn from.
        two_stage: share of the batches that go through the two-stage forward; the rest are plain.
        span: range of the compression span p.
        ratio: range of the compression ratio rho (drawn evenly in its logarithm).
        min_kept: lower bound of K, because a short window at a small ratio would keep less than a sentence.
    """

    prompt_lengths: tuple[int, ...]
    distractors: int = 0
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
    """

    def __init__(self, sampler: RecallSampler, levels: Sequence[RecallLevel], tokens_per_batch: int, batches: int) -> None:
        self.sampler = sampler
        self.levels = list(levels)
        self.tokens_per_batch = tokens_per_batch
        self.batches = batches
        self._level = torch.zeros(1, dtype=torch.int64).share_memory_()

    @property
    def answer_length(self) -> int:
        """A space, the digits and the end-of-text token."""
        return self.sampler.digits + 2

    @property
    def level(self) -> int:
        return int(self._level[0])

    def set_level(self, level: int) -> None:
        self._level[0] = level

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> dict[str, object]:
        """Returns one batch.

        `input_ids` and `labels` `int64[B, L]` (labels are -100 but on the answer), `evidence` and `digits` `int64[B, 2]`
        (first position and the one after the last), `prompt_length` (int, P of every row), `compression_span` and
        `compression_ratio` (floats), `compress_prompt` (bool) and `level` (int).
        """
        number = self.level
        level = self.levels[number]
        generator = np.random.default_rng([self.sampler.seed, index])
        length = int(generator.choice(level.prompt_lengths))
        rows = max(self.tokens_per_batch // length, 1)
        distractors = generator.integers(0, level.distractors + 1, size=rows)
        depths = generator.uniform(*level.depth, size=rows)
        samples = [
            self.sampler.sample((index, row), length, int(distractors[row]), float(depths[row])) for row in range(rows)
        ]
        end = length + self.answer_length
        ids = np.full((rows, -(-end // 8) * 8), self.sampler.padding, dtype=np.int64)
        labels = np.full_like(ids, -100)
        for row, sample in enumerate(samples):
            ids[row, :length] = sample.prompt_ids
            ids[row, length:end] = sample.answer_ids
        labels[:, length:end] = ids[:, length:end]
        span, ratio = draw_compression(generator, length, level)
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "prompt_length": length,
            "evidence": torch.tensor([sample.evidence for sample in samples]),
            "digits": torch.tensor([sample.digits for sample in samples]),
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
