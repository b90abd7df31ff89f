# SPDX-License-Identifier: Apache-2.0
"""Where prompts end, for trainers that do not show the model its labels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class WithPromptLengths:
    """A collator that adds `prompt_lengths` to the batches of another one.

    A forward with labels finds the prompts by itself. TRL's SFTTrainer computes the loss outside of the model and keeps the
    labels from it: without lengths every row would be read in one pass, and the compressor would learn nothing. (It trains
    no LoRA on the head: leave "lm_head" out of `target_modules`.)

    A row holds one prompt and what follows it. TRL's `padding_free` and `packing` are refused, by TRL or by the forward;
    after `packing_strategy="wrapped"` a batch does not show where another text starts: leave that off.

    Args:
        collator: makes `input_ids`, `attention_mask` and `labels`, which are -100 in prompts.
    """

    collator: Callable[[Sequence[Any]], dict[str, Any]]

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        """The batch with `prompt_lengths` `int64[B]`: a row's tokens, pads excluded, before its first label.

        Raises:
            ValueError: a row has no prompt or no response: its labels would train on the prompt, or on nothing.
        """
        batch = self.collator(samples)
        labelled = batch["labels"] != -100
        tokens = batch["attention_mask"].bool()
        lengths = (tokens & (labelled.cumsum(1) == 0)).sum(1)
        for row, (length, total) in enumerate(zip(lengths.tolist(), tokens.sum(1).tolist(), strict=True)):
            if length in (0, total):
                what = "prompt" if length == 0 else "response"
                raise ValueError(f"Row {row} of the batch has no {what}: label the responses only, and do not cut them off.")
        return {**batch, "prompt_lengths": lengths}
