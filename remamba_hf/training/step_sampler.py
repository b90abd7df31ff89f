# SPDX-License-Identifier: Apache-2.0
"""The order in which rows are read: whole steps, the same for every number of processes and after a resumption."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from pyarrow import compute
from torch.utils.data import Sampler

STEPS_OF_A_POOL = 50


class StepSampler(Sampler[int]):
    """Indices of rows in an order drawn anew for each epoch, from the seed and the epoch alone.

    The rows that are left over for a step that is not full, others in each epoch, are left out: several processes would read
    some rows twice to fill it.

    Args:
        rows: how many there are.
        batch: rows of a step, over all processes and accumulated batches.
        seed: of the order.
        epoch: tells which epoch it is, asked at its start.
        lengths: of the rows, in tokens. Given, a step has rows of like length, taken from pools of 50 steps at random, which
            saves pads; None: any rows.

    Raises:
        ValueError: there are fewer rows than `batch`, or not as many lengths as rows.
    """

    def __init__(
        self, rows: int, batch: int, seed: int, epoch: Callable[[], int], lengths: Sequence[int] | None = None
    ) -> None:
        if rows < batch:
            raise ValueError(f"{rows} rows do not fill a step of {batch}: give more data, or a smaller batch.")
        if lengths is not None and len(lengths) != rows:
            raise ValueError(f"There are {len(lengths)} lengths for {rows} rows: give one for each.")
        self.rows, self.batch, self.seed, self.epoch = rows, batch, seed, epoch
        self.lengths = None if lengths is None else np.asarray(lengths)

    def __len__(self) -> int:
        return self.rows - self.rows % self.batch

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch()])
        order = generator.permutation(self.rows)[: len(self)]
        if self.lengths is not None:
            pool = STEPS_OF_A_POOL * self.batch
            pools = [order[start : start + pool] for start in range(0, len(order), pool)]
            order = np.concatenate([rows[np.argsort(self.lengths[rows], kind="stable")] for rows in pools])
            order = generator.permutation(order.reshape(-1, self.batch)).reshape(-1)
        return iter(order.tolist())


def row_lengths(rows: Any) -> list[int]:
    """Tokens of each row of a `datasets.Dataset` with `prompt_ids` and `response_ids`, both together."""
    lengths: list[int] = []
    for batch in rows.with_format("arrow").iter(10_000):
        prompts, responses = (compute.list_value_length(batch[name]) for name in ("prompt_ids", "response_ids"))
        lengths += compute.add(prompts, responses).to_pylist()
    return lengths
