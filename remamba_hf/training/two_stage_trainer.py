# SPDX-License-Identifier: Apache-2.0
"""What every training of a two-stage model needs: a collator, parameter groups, and a Trainer that watches the answers."""

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

# Weight decay would pull these towards a value that means something else than "small": A_log = 0 is a time constant,
# D = 0 cuts the skip, a bias of the step size sets how fast the state forgets, a sink of 0 is a note like others, and the
# weight of a fusion scales all that is read.
NO_DECAY = re.compile(r"bias|A_log|(?:^|\.)D$|norm(?:_f)?\.|\.sink$|fusion\.weight$")


def decayed_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that weight decay may act on: all but biases (Theta is one), norms, `A_log`, `D`, the sinks of
    readers and the weights of fusions."""
    return [name for name, _ in model.named_parameters() if not NO_DECAY.search(name)]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for an optimizer of torch: with `weight_decay` and without; frozen parameters are left out."""
    decayed = set(decayed_parameters(model))
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for name, parameter in trainable if name in decayed], "weight_decay": weight_decay},
        {"params": [parameter for name, parameter in trainable if name not in decayed], "weight_decay": 0.0},
    ]


@dataclass
class PromptResponseCollator:
    """Makes a right-padded batch of prompts, each followed by its response.

    Args:
        padding: id of the padding token.
        multiple: rows are padded to a multiple of this many tokens; odd lengths slow the CUDA kernels down.
        seed: adds `compression_seeds`, from this seed, the epoch and a row's tokens, so that a row draws the same whatever
            batch, process or resumed run it is read in. None: the model draws, once for each batch, as the paper's authors
            did with batches of one row.
        epoch: set by `TwoStageTrainer`.
    """

    padding: int
    multiple: int = 8
    seed: int | None = None
    epoch: int = 0

    def __call__(self, samples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """Collates samples of `prompt_ids` and `response_ids`.

        Returns:
            `input_ids` and `attention_mask` `int64[B, L]`, `labels` `int64[B, L]` (-100 outside the response) and
            `prompt_lengths` `int64[B]`; with a seed also `compression_seeds` `int64[B]`.

        Raises:
            ValueError: a prompt or a response is empty.
        """
        for number, sample in enumerate(samples):
            if not len(sample["prompt_ids"]) or not len(sample["response_ids"]):
                raise ValueError(f"sample {number} of the batch has an empty prompt or response: leave it out of the data")
        prompts = [len(sample["prompt_ids"]) for sample in samples]
        totals = [prompt + len(sample["response_ids"]) for prompt, sample in zip(prompts, samples, strict=True)]
        length = -(-max(totals) // self.multiple) * self.multiple
        ids = torch.full((len(samples), length), self.padding)
        labels = torch.full((len(samples), length), -100)
        mask = torch.zeros(len(samples), length, dtype=torch.int64)
        for row, (sample, prompt, total) in enumerate(zip(samples, prompts, totals, strict=True)):
            ids[row, :prompt] = torch.as_tensor(sample["prompt_ids"])
            ids[row, prompt:total] = labels[row, prompt:total] = torch.as_tensor(sample["response_ids"])
            mask[row, :total] = 1
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "prompt_lengths": torch.tensor(prompts)}
        if self.seed is not None:
            batch["compression_seeds"] = torch.tensor(
                [self._seed_of(row[:total]) for row, total in zip(ids, totals, strict=True)]
            )
        return batch

    def _seed_of(self, tokens: Tensor) -> int:
        return zlib.crc32(tokens.numpy().tobytes(), zlib.crc32(f"{self.seed} {self.epoch}".encode()))


def answer_matches(logits: Tensor, labels: Tensor) -> Tensor:
    """Says of every row whether each labelled token is the most probable one under teacher forcing.

    Args:
        logits: `[B, L, V]`, aligned with the input.
        labels: `int64[B, L]`, -100 where a token does not count.

    Returns:
        `bool[B]`.
    """
    targets = labels[:, 1:]
    return ((logits[:, :-1].argmax(-1) == targets) | (targets == -100)).all(-1)


def each_answer_matches(logits: Tensor, labels: Tensor, answers: int) -> Tensor:
    """`answer_matches` of rows with several answers, between which other tokens stand, by answer: `bool[B, answers]`.

    An answer that a row does not have counts as right.
    """
    targets = labels[:, 1:]
    counted = targets != -100
    wrong = counted & (logits[:, :-1].argmax(-1) != targets)
    number = (counted & ~nn.functional.pad(counted, (1, 0))[:, :-1]).cumsum(1) - 1
    errors = wrong.new_zeros(len(labels), answers, dtype=torch.int64)
    return errors.scatter_add(1, number.clamp(0, answers - 1), wrong.long()) == 0


# What a collator gives for the compression, and models that compress nothing do not take.
COMPRESSION_INPUTS = ("prompt_lengths", "compression_seeds")


class _EpochOfDraws(TrainerCallback):
    """Tells a collator with seeds the epoch, before it or its copies in worker processes collate for it."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.collator.epoch = int((state.epoch or 0) + 1e-6)  # a sum of steps' shares of it


class TwoStageTrainer(Trainer):
    """`Trainer` with the right parameter groups and with means of what happened in the logs.

    Logs, besides Trainer's own, over all processes since the last log:

    - `answer_match`: share of rows whose whole answer was most probable;
    - `overflow`: share of losses that were not finite, which Trainer leaves out of its mean `loss`;
    - for models that compress, `compressed`: share of rows with a window; `kept`: vectors kept of such a row; `alpha`: mean
      of what scales their step sizes, the scores' positive parts.

    Means are summed on the device and read once per log, so that no step waits for the device.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sums: dict[str, Tensor] = {}
        self._compresses = hasattr(getattr(self.model, "config", None), "compression_span")
        if hasattr(self.data_collator, "epoch"):
            self.add_callback(_EpochOfDraws(self.data_collator))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decayed_parameters(model)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The model's own loss; records on the way what the logs tell."""
        if not self._compresses:
            inputs = {name: value for name, value in inputs.items() if name not in COMPRESSION_INPUTS}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training and "labels" in inputs:
            self.record("answer_match", answer_matches(outputs.logits.detach(), inputs["labels"]))
            self.record("overflow", ~loss.detach().isfinite())
            if self._compresses:
                self._record_compression(outputs, len(inputs["labels"]))
        return (loss, outputs) if return_outputs else loss

    def _record_compression(self, outputs: Any, rows: int) -> None:
        positions = outputs.compressed_positions
        if positions is None:  # no row has a window
            self.record("compressed", outputs.logits.new_zeros(rows))
            return
        kept = positions >= 0
        compressed = kept.any(1)
        self.record("compressed", compressed)
        self.record("kept", kept.sum(1), compressed)
        self.record("alpha", outputs.compression_scores.relu(), kept)

    def record(self, name: str, values: Tensor, counted: Tensor | None = None) -> None:
        """Adds `values` to the mean `name` of the running logging interval; `counted` (bool, same shape) picks some."""
        values = values.detach().float()
        weights = torch.ones_like(values) if counted is None else counted.float()
        pair = torch.stack([(values * weights).sum(), weights.sum()])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, and with a training loss the recorded means, which then start anew."""
        if "loss" in logs and (self._sums or self.args.world_size > 1):
            logs = {**logs, **self._means()}
        super().log(logs, start_time)

    def _means(self) -> dict[str, float]:
        """The recorded means over all processes, which may have recorded different names."""
        pairs = torch.stack(list(self._sums.values())).tolist() if self._sums else []
        mine = dict(zip(self._sums, pairs, strict=True))
        self._sums.clear()
        totals: dict[str, tuple[float, float]] = {}
        for share in gather_object([mine]):
            for name, (total, count) in share.items():
                before = totals.get(name, (0.0, 0.0))
                totals[name] = (before[0] + total, before[1] + count)
        return {name: total / count for name, (total, count) in totals.items() if count}
