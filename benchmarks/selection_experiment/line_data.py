# SPDX-License-Identifier: Apache-2.0
"""Records of lines with a number each, of which one is asked for, in the form of LongEval's line retrieval
(github.com/DachengLi1/LongChat, longeval; its files are read by `remamba eval longeval`).

    ...
    line torpid-kid: REGISTER_CONTENT is <24169>
    ...
    Now the record is over. Tell me what is the <REGISTER_CONTENT> in line torpid-kid? I need the number. 24169<|endoftext|>

Texts are made for the tokenizers of `train_book_tokenizer`, for which digits are single tokens, and whose ids of a line do
not depend on what stands around it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from remamba_hf.training.recall_data import AskedFact, RecallText

HEADING = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its corresponding "
    "<REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding <REGISTER_CONTENT> of a "
    "certain line index. Now the record start:"
)
QUESTION = ("Now the record is over. Tell me what is the <REGISTER_CONTENT> in line ", "? I need the number. ")
# For prompts that have no room for the benchmark's own words.
BRIEF_HEADING = "A record of lines:"
BRIEF_QUESTION = ("What is the <REGISTER_CONTENT> in line ", "? ")
LARGEST_NUMBER = 50_000
FITTING_DRAWS = 200
ADJECTIVES = (
    "able ancient angry autumn awkward basic big bitter black blue bold brave brief bright broken busy calm careful "
    "cheap clean clear clever close cloudy cold common cool crooked cruel curious dark dear deep distant double dry dull "
    "eager early easy empty equal exact fair faint false famous fast few fierce fine firm flat fond foreign formal free "
    "fresh frozen full gentle giant glad golden good grand grave gray great green half happy hard heavy hidden high "
    "hollow holy honest hot huge humble hungry idle iron jolly keen kind large late lazy little lively lonely long loud "
    "low loyal lucky mad main merry mild modern narrow neat new noble noisy odd old open orderly pale patient plain "
    "polite poor proud pure quick quiet rapid rare raw ready red rich ripe rough round royal rude sad safe scarce secret "
    "sharp short shy silent silver simple slow small smooth soft solid sore sour square steady steep stiff still strange "
    "strong sudden sweet swift tall tame tender thick thin tidy tight tiny tired true upper usual vain vast violet warm "
    "weak wet white whole wide wild wise wooden yellow young"
).split()
NOUNS = (
    "account acre actor air animal answer apple arm army arrow ash aunt axe baker ball band bank barn basket bath beach "
    "bean bear bed bee bell belt bench bird blanket block board boat body bone book boot bottle bowl box boy branch "
    "bread brick bridge broom brother bucket butter button cabin cake camel camp candle cap captain card cart castle cat "
    "chain chair chalk cheese cherry chest chicken child church circle city class clock cloth cloud coat coin collar "
    "comb cook copper corn cottage cotton cow crow crown cup curtain daisy dance daughter desk dinner dish doctor dog "
    "donkey door dove dream dress drum duck dust eagle ear earth edge egg engine eye face fall farm father feather fence "
    "field finger fire fish flag floor flower fly food foot forest fork fox friend frog fruit garden gate ghost gift "
    "girl glass glove goat gold goose grain grape grass ground guide gun hair hall hammer hand harbor hat hawk head "
    "heart hill honey hook horn horse hour house ice ink island jar jewel judge juice jury kettle key king kitchen kite "
    "knee knife knot lace lad ladder lake lamp leaf leg lemon letter line lion lip lock log maid map market marsh mast "
    "meadow meal meat milk mill mirror monkey moon morning mother mouse mouth music nail neck needle nest net night "
    "north nose note nut oak oar ocean office oil orange oven owl ox page paint palace paper park path peach pear pen "
    "pencil pepper picture pie pig pilot pin pipe plate pocket poet pond potato pot powder prince queen quill rabbit "
    "rain rat ring river road robin rock roof room root rope rose sail salt sand school sea seed sheep shell ship shirt "
    "shoe shop sister skin sky snake snow soap sock song soup spade spider spoon spring star station stone storm street "
    "sugar summer sun swan table tail tea tent thread throat thumb tiger time tin toad tooth tower town toy train tree "
    "truck trunk turkey uncle valley vase village vine voice wagon wall watch water wave wheel whip window wine wing "
    "winter wolf wood wool worm yard year zebra"
).split()


class LineSampler:
    """Makes texts of lines; everything is a function of (seed, index).

    Its `text` is that of `RecallSampler`, so that `RecallDataset` takes either.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> None:
        self.seed = seed
        self.padding = int(tokenizer.pad_token_id)
        self.end_of_text = int(tokenizer.eos_token_id)

        def encode(text: str) -> np.ndarray:
            return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)

        self.newline = encode("\n")
        self.digit_ids = np.concatenate([encode(str(digit)) for digit in range(10)])
        self.headings = [encode(HEADING), encode(BRIEF_HEADING)]
        self.questions = [
            tuple(encode(part) for part in (f"\n{head[:-1]}", tail)) for head, tail in (QUESTION, BRIEF_QUESTION)
        ]
        self.adjectives = [encode(f" {word}") for word in ADJECTIVES]
        self.nouns = [np.concatenate([encode("-"), encode(word)]) for word in NOUNS]
        self.line = (encode("line"), encode(": REGISTER_CONTENT is <"), encode(">\n"))
        adjective_lengths, noun_lengths = (np.array([len(ids) for ids in words]) for words in (self.adjectives, self.nouns))
        self.name_lengths = (adjective_lengths[:, None] + noun_lengths).flatten()
        self._fits: dict[tuple[int, int], bool] = {}

    def text(
        self,
        index: int | Sequence[int],
        prompt_length: int,
        keys: int = 1,
        distractors: int = 0,
        depths: Sequence[float] | None = None,
    ) -> RecallText:
        """Makes the text number `index`, of which `keys` lines are asked for.

        Args:
            index, prompt_length, depths: as for `RecallSampler.text`.
            distractors: without effect, since all lines but the asked ones are.

        Raises:
            ValueError: no lines fit exactly, as in very short prompts.
        """
        generator = np.random.default_rng([self.seed, *np.atleast_1d(index), 1])
        for _ in range(FITTING_DRAWS):
            if (text := self._text(generator, prompt_length, keys, depths)) is not None:
                return text
        raise ValueError(f"no {max(keys, 2)} lines fill a prompt of {prompt_length} tokens: give longer prompts")

    def fits(self, prompt_length: int, keys: int) -> bool:
        """Whether a fifth of what is drawn, or more, fills such a prompt. Short ones have too few lines to exchange."""
        if (prompt_length, keys) not in self._fits:
            generator = np.random.default_rng([prompt_length, keys])
            filled = sum(self._text(generator, prompt_length, keys, None) is not None for _ in range(FITTING_DRAWS))
            self._fits[prompt_length, keys] = 5 * filled >= FITTING_DRAWS
        return self._fits[prompt_length, keys]

    def _text(
        self, generator: np.random.Generator, prompt_length: int, keys: int, depths: Sequence[float] | None
    ) -> RecallText | None:
        """A text whose prompt has that length; None if what was drawn does not fill it."""
        brief = int(2 * (len(self.headings[0]) + len(self.questions[0][1])) > prompt_length)
        heading = np.concatenate([self.headings[brief], self.newline, self.newline])
        head, tail = self.questions[brief]
        question_room = len(head) + len(tail) + int(self.name_lengths.mean())
        names, numbers = self._fitting(generator, prompt_length - len(heading) - question_room)
        if len(names) < max(keys, 2):
            return None
        places = self._places(generator, len(names), keys, depths)
        questions = [np.concatenate([head, self._name(names[place]), tail]) for place in places]
        lines = [self._line(name, number) for name, number in zip(names, numbers, strict=True)]
        spare = prompt_length - len(heading) - sum(map(len, lines)) - max(map(len, questions))
        if not self._fill(generator, names, spare, places):
            return None
        lines = [self._line(name, number) for name, number in zip(names, numbers, strict=True)]
        starts = len(heading) + np.cumsum([0, *map(len, lines)])
        asked = tuple(
            self._asked(int(starts[place]), names[place], numbers[place], question, place / len(lines))
            for place, question in zip(places, questions, strict=True)
        )
        others = tuple(str(number) for place, number in enumerate(numbers) if place not in places)
        return RecallText(np.concatenate([heading, *lines]), asked, others)

    def record(self, index: int | Sequence[int], prompt_length: int, depth: float, decode: Any) -> dict[str, Any]:
        """A text in the form of a line of LongEval's files; `decode` makes text of ids."""
        text = self.text(index, prompt_length, 1, 0, [depth])
        fact = text.asked[0]
        return {
            "random_idx": [fact.name, round(fact.depth, 4)],
            "expected_number": int(fact.number),
            "num_lines": len(text.other_numbers) + 1,
            "token_size": prompt_length,
            "prompt": decode(text.prompt_ids().tolist()),
        }

    def _fitting(self, generator: np.random.Generator, room: int) -> tuple[list[int], list[int]]:
        """Names and numbers of lines that have about as many tokens as there is room."""
        fixed = sum(map(len, self.line))
        most = max(room // (fixed + int(self.name_lengths.min()) + 1) + 1, 0)
        names = generator.choice(len(self.name_lengths), size=most, replace=False)
        numbers = generator.integers(1, LARGEST_NUMBER, size=most)
        lengths = np.cumsum(fixed + self.name_lengths[names] + np.char.str_len(numbers.astype(str)))
        count = int(np.abs(np.append(0, lengths) - room).argmin())
        return names[:count].tolist(), numbers[:count].tolist()

    def _fill(self, generator: np.random.Generator, names: list[int], spare: int, places: Sequence[int]) -> bool:
        """Exchanges names, but those at `places`, for others that have `spare` tokens more in all; says whether it could."""
        free = [place for place in generator.permutation(len(names)) if place not in places]
        for place in free * 2:
            if not spare:
                break
            candidates = generator.integers(len(self.name_lengths), size=64)
            gains = (self.name_lengths[candidates] - self.name_lengths[names[place]]) * np.sign(spare)
            gains[(gains > abs(spare)) | np.isin(candidates, names)] = 0
            best = int(gains.argmax())
            if gains[best] > 0:
                names[place] = int(candidates[best])
                spare -= int(gains[best] * np.sign(spare))
        return not spare

    def _places(self, generator: np.random.Generator, lines: int, keys: int, depths: Sequence[float] | None) -> list[int]:
        """Different lines, near the depths if they are given."""
        drawn = generator.random(keys) if depths is None else np.asarray(depths)
        places: list[int] = []
        for depth in drawn:
            wanted = min(int(depth * lines), lines - 1)
            places.append(
                min((place for place in range(lines) if place not in places), key=lambda place: abs(place - wanted))
            )
        return places

    def _name(self, name: int) -> np.ndarray:
        adjective, noun = divmod(name, len(self.nouns))
        return np.concatenate([self.adjectives[adjective], self.nouns[noun]])

    def _digits(self, number: int) -> np.ndarray:
        return self.digit_ids[[int(digit) for digit in str(number)]]

    def _line(self, name: int, number: int) -> np.ndarray:
        return np.concatenate([self.line[0], self._name(name), self.line[1], self._digits(number), self.line[2]])

    def _asked(self, start: int, name: int, number: int, question: np.ndarray, depth: float) -> AskedFact:
        digits_start = start + len(self.line[0]) + len(self._name(name)) + len(self.line[1])
        digits = (digits_start, digits_start + len(str(number)))
        adjective, noun = divmod(name, len(self.nouns))
        return AskedFact(
            question_ids=question,
            answer_ids=np.append(self._digits(number), self.end_of_text),
            evidence=(start + len(self.line[0]), digits[1]),
            digits=digits,
            name=f"{ADJECTIVES[adjective]}-{NOUNS[noun]}",
            number=str(number),
            depth=depth,
        )
