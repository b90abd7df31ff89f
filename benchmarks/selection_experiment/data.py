# SPDX-License-Identifier: Apache-2.0
"""What every training reads, as batches that are functions of (seed, step): any step can be made again, so that a training
goes on where it stopped, and all arms of a seed are given the same."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from remamba_hf.training.recall_data import RecallLevel, RecallSampler, RecallText, draw_compression
from remamba_hf.training.two_stage_trainer import PromptResponseCollator

from .line_data import LineSampler
from .recipe import Recipe


class BookBatches(Dataset):
    """Pieces of books for pretraining: item `step` has `input_ids` `int64[B, L]`, of which every token but the first is a
    label.

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
        return {"input_ids": ids, "labels": ids, "digest": digest_of(ids)}


class MixedSampler:
    """Planted facts or lines, decided by the first number of a text's index, which is that of its batch.

    Args:
        share: of the texts that are lines.
    """

    def __init__(self, recall: RecallSampler, lines: LineSampler, share: float) -> None:
        self.recall, self.lines, self.share = recall, lines, share
        self.seed, self.padding = recall.seed, recall.padding

    def text(self, index: Sequence[int], prompt_length: int, *rest: Any) -> RecallText:
        is_lines = np.random.default_rng([self.seed, index[0], 3]).random() < self.share
        # A record of lines has a heading, and at least two lines: shorter prompts are planted facts.
        sampler = self.lines if is_lines and prompt_length >= 96 else self.recall
        return sampler.text(index, prompt_length, *rest)


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

    def pair(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        begin, middle, end = self.bounds[number].tolist()
        return np.asarray(self.tokens[begin:middle], np.int64), np.asarray(self.tokens[middle:end], np.int64)

    def fitting(self, length: int) -> np.ndarray:
        """Numbers of the pairs for rows of `length` tokens: those of more than half of that, of which too long prompts are
        cut (`cut`), failing these the longest there are; none whose response takes more than half.

        Raises:
            ValueError: there is none.
        """
        totals = self.bounds[:, 2] - self.bounds[:, 0]
        usable = np.flatnonzero(2 * (self.bounds[:, 2] - self.bounds[:, 1]) <= length)
        if not len(usable):
            raise ValueError(f"no instruction has a response of at most {length // 2} tokens: give others")
        long = usable[totals[usable] > length // 2]
        return long if len(long) else usable[np.argsort(-totals[usable], kind="stable")][:64]


def cut(prompt: np.ndarray, room: int) -> np.ndarray:
    """A prompt without the tokens right after its first sixth of `room`, as LongOrca's lose them after the first 1,000 of
    6,000 (arXiv 2408.15496, section 4.1)."""
    if len(prompt) <= room:
        return prompt
    head = room // 6
    return np.concatenate([prompt[:head], prompt[len(prompt) - (room - head) :]])


class TuningBatches(Dataset):
    """Fine-tuning: planted facts, lines and instructions, a kind a batch, each row with one question.

    Item `step` has `input_ids` and `labels` `int64[B, L]` (padded on the right), `prompt_lengths` (list), `evidence` and
    `digits` `int64[B, 2]` (equal where there is none), `compression_span`, `compression_ratio`, `compress_prompt`, `kind`
    and `digest`.

    Args:
        seed: of the texts and of the draws.
    """

    def __init__(
        self, recipe: Recipe, recall: RecallSampler, lines: LineSampler, instructions: Instructions | None, seed: int
    ) -> None:
        self.recipe, self.recall, self.lines, self.instructions, self.seed = recipe, recall, lines, instructions, seed
        self.collate = PromptResponseCollator(recall.padding)
        kinds = {kind: share for kind, share in recipe.kinds.items() if kind != "instructions" or instructions is not None}
        self.kinds, shares = list(kinds), np.array(list(kinds.values()))
        self.shares = shares / shares.sum()

    def __len__(self) -> int:
        return self.recipe.tuning.steps

    def __getitem__(self, step: int) -> dict[str, Any]:
        generator = np.random.default_rng([self.seed, step, 4])
        level = self.recipe.level(step)
        length = int(generator.choice(level.prompt_lengths))
        kind = str(generator.choice(self.kinds, p=self.shares))
        rows = max(self.recipe.tuning.tokens_per_batch // length, 1)
        make = self._instructions if kind == "instructions" else self._recall
        samples, evidence, digits = make(generator, step, kind, length, rows, level)
        batch = self.collate(samples)
        span, ratio = draw_compression(generator, length, level)
        return {
            "input_ids": batch["input_ids"],
            "labels": batch["labels"],
            "prompt_lengths": batch["prompt_lengths"].tolist(),
            "evidence": torch.tensor(evidence),
            "digits": torch.tensor(digits),
            "compression_span": span,
            "compression_ratio": ratio,
            "compress_prompt": bool(generator.random() < level.two_stage),
            "kind": kind,
            "digest": digest_of(batch["input_ids"], batch["labels"], span, ratio, batch["prompt_lengths"]),
        }

    def _recall(
        self, generator: np.random.Generator, step: int, kind: str, length: int, rows: int, level: RecallLevel
    ) -> tuple[list[dict[str, np.ndarray]], list[tuple[int, int]], list[tuple[int, int]]]:
        sampler = self.recall if kind == "recall" else self.lines
        distractors = generator.integers(0, level.distractors + 1, size=rows)
        depths = generator.uniform(*level.depth, size=rows)
        texts = [
            sampler.text((step, row), length, 1, int(distractors[row]), [float(depths[row])]) for row in range(rows)
        ]
        samples = [{"prompt_ids": text.prompt_ids(), "response_ids": text.asked[0].answer_ids} for text in texts]
        return samples, [text.asked[0].evidence for text in texts], [text.asked[0].digits for text in texts]

    def _instructions(
        self, generator: np.random.Generator, step: int, kind: str, length: int, rows: int, level: RecallLevel
    ) -> tuple[list[dict[str, np.ndarray]], list[tuple[int, int]], list[tuple[int, int]]]:
        assert self.instructions is not None
        pairs = [self.instructions.pair(int(number)) for number in generator.choice(self.instructions.fitting(length), rows)]
        samples = [
            {"prompt_ids": cut(prompt, length - len(response)), "response_ids": response}
            for prompt, response in pairs
        ]
        return samples, [(0, 0)] * rows, [(0, 0)] * rows


def digest_of(*parts: Any) -> str:
    """SHA-256 of tensors and numbers."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part.numpy().tobytes() if isinstance(part, torch.Tensor) else repr(part).encode())
    return hashed.hexdigest()
