# SPDX-License-Identifier: Apache-2.0
"""What every training reads, as batches that are functions of (seed, step): any step can be made again, so that a training
goes on where it stopped, and all arms of a seed are given the same."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from remamba_hf.training.recall_data import RecallDataset, RecallLevel, RecallSampler, RecallText, draw_compression
from remamba_hf.training.two_stage_trainer import PromptResponseCollator

from .line_data import LineSampler
from .recipe import Recipe, Training


class BookBatches(Dataset):
    """Pieces of books for pretraining: item `step` has `input_ids` and `labels`, the same `int64[B, L]`.

    Args:
        tokens: of the books.
        seed: of the pieces' places.
    """

    def __init__(self, recipe: Recipe, tokens: np.ndarray, seed: int = 0) -> None:
        self.recipe, self.tokens, self.seed = recipe, tokens, seed

    def __len__(self) -> int:
        return self.recipe.pretraining.steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        lengths, training = self.recipe.book_lengths, self.recipe.pretraining
        length = lengths[min(step * len(lengths) // training.steps, len(lengths) - 1)]
        generator = np.random.default_rng([self.seed, step, 2])
        starts = generator.integers(0, len(self.tokens) - length + 1, size=max(training.tokens_per_batch // length, 1))
        rows = np.stack([self.tokens[start : start + length] for start in starts]).astype(np.int64)
        ids = torch.from_numpy(rows)
        return {"input_ids": ids, "labels": ids}


def echo_batch(tokens: np.ndarray, lengths: Sequence[int], tokens_per_batch: int, seed: int, step: int) -> dict[str, Any]:
    """Pieces of books that are said twice, as a batch of `RecallDataset` whose answers are the second saying but its first
    token, and whose evidence is not known.

    Args:
        tokens: of the books.
        lengths: a piece may have.
    """
    generator = np.random.default_rng([seed, step, 5])
    length = int(generator.choice(lengths))
    rows = max(tokens_per_batch // (2 * length), 1)
    starts = generator.integers(0, len(tokens) - length + 1, size=rows)
    pieces = np.stack([tokens[start : start + length] for start in starts]).astype(np.int64)
    ids = torch.from_numpy(np.concatenate([pieces, pieces], axis=1))
    labels = ids.clone()
    labels[:, : length + 1] = -100
    return _without_evidence(ids, labels, length, (1.0, 1.0), compress=False)


def _without_evidence(
    ids: torch.Tensor, labels: torch.Tensor, prompt_length: int, compression: tuple[float, float], compress: bool
) -> dict[str, Any]:
    """A batch in the form of `RecallDataset`'s; what it knows nothing of stands behind every window."""
    nowhere = torch.tensor([[prompt_length, prompt_length + 1]] * len(ids))
    return {
        "input_ids": ids,
        "labels": labels,
        "prompt_length": prompt_length,
        "questions": 1,
        "evidence": nowhere,
        "digits": nowhere,
        "compression_span": compression[0],
        "compression_ratio": compression[1],
        "compress_prompt": compress,
        "level": 0,
    }


class MixedSampler:
    """Planted facts or lines, decided by the first number of a text's index, which is that of its batch; facts in
    prompts that are too short for lines. Its `text` is that of both, so that `RecallDataset` takes it.

    Args:
        share: of the batches that are lines.
    """

    def __init__(self, recall: RecallSampler, lines: LineSampler, share: float) -> None:
        self.recall, self.lines, self.share = recall, lines, share
        self.seed, self.padding = recall.seed, recall.padding

    def text(self, index: Sequence[int], prompt_length: int, keys: int = 1, *rest: Any) -> RecallText:
        is_lines = np.random.default_rng([self.seed, index[0], 3]).random() < self.share
        sampler = self.lines if is_lines and self.lines.fits(prompt_length, keys) else self.recall
        return sampler.text(index, prompt_length, keys, *rest)


class RestatedSampler:
    """Texts of a sampler in which no question is asked: what asks for a number is the name and what stood behind it, on a
    line of its own, and nothing follows the number."""

    def __init__(self, sampler: MixedSampler) -> None:
        self.sampler, self.seed, self.padding = sampler, sampler.seed, sampler.padding

    def text(self, *arguments: Any) -> RecallText:
        text = self.sampler.text(*arguments)
        asked = []
        for fact in text.asked:
            name_to_number = text.text_ids[fact.evidence[0] : fact.digits[0]]
            question_ids = np.append(self.sampler.recall.newline, name_to_number)
            asked.append(replace(fact, question_ids=question_ids, answer_ids=text.text_ids[slice(*fact.digits)]))
        return replace(text, asked=tuple(asked))


@dataclass(frozen=True)
class Instructions:
    """Pairs of a prompt and a response as arrays on disk.

    Attributes:
        tokens: `uint16`, of all pairs, one after another.
        bounds: `int64[pairs, 3]`: where a pair's prompt begins, where its response does, and where it ends.
    """

    tokens: np.ndarray
    bounds: np.ndarray

    @classmethod
    def load(cls, folder: Path) -> "Instructions | None":
        """Those of a folder that `prepare` has filled; None if there are none."""
        if not (folder / "bounds.npy").is_file():
            return None
        return cls(np.load(folder / "tokens.npy", mmap_mode="r"), np.load(folder / "bounds.npy"))

    def pair(self, number: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """A prompt of exactly `length` tokens, and its response. Of a longer prompt the tokens behind the first sixth are
        left out, as LongOrca's lose those behind the first 1,000 of 6,000 (arXiv 2408.15496, section 4.1)."""
        begin, middle, end = self.bounds[number].tolist()
        head = length // 6
        prompt = np.concatenate([self.tokens[begin : begin + head], self.tokens[middle - (length - head) : middle]])
        return prompt.astype(np.int64), self.tokens[middle:end].astype(np.int64)

    def fitting(self, length: int) -> np.ndarray:
        """Numbers of the pairs whose prompts have `length` tokens or more, and whose responses at most half as many.

        Raises:
            ValueError: there is none.
        """
        prompts, responses = np.diff(self.bounds).T
        numbers = np.flatnonzero((prompts >= length) & (2 * responses <= length))
        if not len(numbers):
            raise ValueError(f"no instruction has a prompt of {length} tokens and a response of half that: give longer ones")
        return numbers


class PhasedBatches(Dataset):
    """Batches of planted facts or of lines as those of `RecallDataset`, and of instructions and echoes in the same form, in
    which no evidence is known.

    Args:
        training: whose steps and phases these are.
        sampler: of facts and lines, and of the books whose pieces are echoed.
        instructions: None: none.
        share: of the batches that are instructions, where questions are asked.
    """

    def __init__(
        self, training: Training, sampler: MixedSampler, instructions: Instructions | None = None, share: float = 0.0
    ) -> None:
        self.training, self.instructions, self.share, self.seed = training, instructions, share, sampler.seed
        self.books = sampler.recall.tokens
        self.levels = [phase.level for phase in training.phases]
        samplers = {"asked": sampler, "restated": RestatedSampler(sampler)}
        self.recall = [
            RecallDataset(samplers[phase.form], [phase.level], training.tokens_per_batch, training.steps)
            if phase.form in samplers
            else None
            for phase in training.phases
        ]
        self.collate = PromptResponseCollator(sampler.padding)

    def set_level(self, level: int) -> None:
        """Without effect: steps open the phases."""

    def __len__(self) -> int:
        return self.training.steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        number = self.training.phase(step)
        phase, recall, size = self.training.phases[number], self.recall[number], self.training.tokens_per_batch
        if recall is None:
            return echo_batch(self.books, phase.level.prompt_lengths, size, self.seed, step)
        generator = np.random.default_rng([self.seed, step, 4])
        if phase.form == "asked" and self.instructions is not None and generator.random() < self.share:
            return self._of_instructions(generator, self.instructions, phase.level)
        return recall[step]

    def digest(self) -> str:
        """SHA-256 of the first and the last batch."""
        hashed = hashlib.sha256()
        for batch in (self[0], self[len(self) - 1]):
            hashed.update(batch["input_ids"].numpy().tobytes())
            hashed.update(f"{batch['compression_span']} {batch['compression_ratio']}".encode())
        return hashed.hexdigest()

    def _of_instructions(
        self, generator: np.random.Generator, instructions: Instructions, level: RecallLevel
    ) -> dict[str, Any]:
        length = int(generator.choice(level.prompt_lengths))
        rows = max(self.training.tokens_per_batch // length, 1)
        pairs = [instructions.pair(number, length) for number in generator.choice(instructions.fitting(length), rows)]
        batch = self.collate(
            [{"prompt_ids": prompt.tolist(), "response_ids": response.tolist()} for prompt, response in pairs]
        )
        span, ratio = draw_compression(generator, length, level)
        compress = bool(generator.random() < level.two_stage)
        return _without_evidence(batch["input_ids"], batch["labels"], length, (span, ratio), compress)
