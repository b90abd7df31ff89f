# SPDX-License-Identifier: Apache-2.0
"""A `Trainer` for instructions: one process or many, whole weights or shared out, with evaluation that generates."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import Dataset, Sampler

from .sharded_weights import whole_weights
from .step_sampler import StepSampler, row_lengths
from .two_stage_trainer import TwoStageTrainer


class InstructionTrainer(TwoStageTrainer):
    """`TwoStageTrainer` on rows of `prompt_ids` and `response_ids` whose evaluation also generates: `eval_exact` is the
    share of held-out rows answered to the letter.

    Steps hold the same rows whatever the number of processes, and after a resumption (`StepSampler`). FSDP2 and DeepSpeed
    may share out weights and the optimizer's state.

    Args:
        answers: file for what was said, one JSON object a line, replaced by each evaluation.
        eval_rows: so many rows of the evaluation data are answered; 0: none.
        max_new_tokens: an answer's.
        group_by_length: rows of like length share a step, which saves pads. (Trainer's `train_sampling_strategy` for it
            changes the order with the number of processes, and wants `input_ids` of evaluation data.)
        autocast: compute in bfloat16. Trainer's own bf16 lets FSDP2 and DeepSpeed cast weights that need float32: A_log, D.
        args, kwargs: `Trainer`'s.
    """

    def __init__(
        self,
        *args: Any,
        answers: Path,
        eval_rows: int = 64,
        max_new_tokens: int = 128,
        group_by_length: bool = False,
        autocast: bool = False,
        **kwargs: Any,
    ) -> None:
        self.group_by_length, self.autocast = group_by_length, autocast
        super().__init__(*args, **kwargs)
        self.answers, self.eval_rows, self.max_new_tokens = answers, eval_rows, max_new_tokens

    def compute_loss_context_manager(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.autocast)

    # Trainer's one place to say in which order rows are read; there is no public one.
    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "random" or not hasattr(rows, "__len__"):
            return super()._get_train_sampler(rows)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        lengths = row_lengths(rows) if self.group_by_length else None
        # 1e-6: the epoch is a sum of steps' shares of it.
        return StepSampler(len(rows), batch, self.args.seed, lambda: int((self.state.epoch or 0) + 1e-6), lengths)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Processes that share something out have to read equally often, which is: twice.

        Raises:
            ValueError: they would not, and wait for each other for ever.
        """
        if model.training and self._compresses and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            shortest = max(2, self.model.config.compression_min_prompt)
            if inputs["prompt_lengths"].max() < shortest:
                raise ValueError(
                    f"No prompt of a batch has {shortest} tokens, so that nothing is compressed, which cannot be trained "
                    "with FSDP or DeepSpeed. Leave such rows out, read more rows at once, or launch with DDP."
                )
        # Trainer takes an evaluation's mean over the tokens of all processes' batches, then over these means: another
        # weight of each row for another number of processes.
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch if model.training else None)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        with whole_weights(self.model_wrapped):
            metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            if self.eval_rows:
                exact = {f"{metric_key_prefix}_exact": self.answer()}
                self.log(exact)
                metrics |= exact
        return metrics

    @torch.no_grad()
    def answer(self) -> float:
        """Answers held-out prompts greedily, each process its share; the share of exact answers."""
        self.model.eval()
        with self.compute_loss_context_manager():
            texts = [text for rows in self._shares() for text in self._answered(rows)]
        shares = gather_object([texts])  # process 0 has the first row, process 1 the second
        said = [share[row] for row in range(len(shares[0])) for share in shares if row < len(share)]
        if self.args.should_save:
            partial = self.answers.with_suffix(".tmp")
            partial.write_text("".join(json.dumps(text) + "\n" for text in said))
            os.replace(partial, self.answers)
        return sum(text["exact"] for text in said) / len(said)

    def _shares(self) -> Iterator[list[Any]]:
        """This process's rows, as many at once as in other evaluations."""
        count = min(self.eval_rows, len(self.eval_dataset))
        mine = range(self.args.process_index, count, self.args.world_size)
        size = self.args.per_device_eval_batch_size
        for start in range(0, len(mine), size):
            yield [self.eval_dataset[row] for row in mine[start : start + size]]

    def _answered(self, rows: list[Any]) -> list[dict[str, Any]]:
        tokenizer = self.processing_class
        prompts = [{"input_ids": row["prompt_ids"]} for row in rows]
        inputs = tokenizer.pad(prompts, padding_side="left", return_tensors="pt").to(self.args.device)
        # use_cache: Trainer turns it off under gradient checkpointing. synced_gpus: each process has all weights.
        how = dict(do_sample=False, max_new_tokens=self.max_new_tokens, use_cache=True, synced_gpus=False)
        output = self.model.generate(**inputs, **how)
        said = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right = tokenizer.batch_decode([row["response_ids"] for row in rows], skip_special_tokens=True)
        return [{"said": a, "right": b, "exact": a.strip() == b.strip()} for a, b in zip(said, right, strict=True)]
