# SPDX-License-Identifier: Apache-2.0
"""Trains a small model from scratch on the recall task: losses, a curriculum that waits for success, a learning rate."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..modeling.selective_compression import Setting, window_of
from .book_tokens import write_json
from .recall_data import RecallDataset
from .recall_losses import LossWeights, evidence_loss, note_loss, token_losses, value_loss
from .two_stage_trainer import TwoStageTrainer, each_answer_matches


def take_batch(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Collator for a dataset whose items are whole batches."""
    (batch,) = items
    return batch


class Curriculum(TrainerCallback):
    """Raises the dataset's level when answers at the present level are right, and ends the training in time.

    The learning rate stays up until the last level is reached (or `decay_at` of the budget is spent), then falls
    linearly: a rate that falls before the model has learned to copy leaves it where it is.

    Args:
        dataset: whose level is set.
        threshold: share of right answers, a running mean over logs from 0 on, that opens the next level.
        max_steps: steps of the whole training.
        max_seconds: time budget; training ends at whichever comes first.
        decay_at: share of the budget after which the rate falls in any case.
        give_up_at: share of the budget after which a model still at level 0 is given up (`stuck` is then true); above 1:
            never.
        patience: share of the budget after which a level but the first is left, right answers or not.
    """

    def __init__(
        self,
        dataset: RecallDataset,
        threshold: float = 0.9,
        max_steps: int = 1,
        max_seconds: float = math.inf,
        decay_at: float = 0.6,
        give_up_at: float = 2.0,
        patience: float = 0.12,
    ) -> None:
        self.dataset = dataset
        self.threshold = threshold
        self.max_steps = max_steps
        self.max_seconds = max_seconds
        self.decay_at = decay_at
        self.give_up_at = give_up_at
        self.patience = patience
        self.level = 0
        self.level_began = 0.0
        self.mean = 0.0
        self.seconds_before = 0.0
        self.decay_from: float | None = None
        self.stuck = False
        self._started = time.monotonic()

    def save(self, checkpoint: Path) -> None:
        """Writes `curriculum.json` into a checkpoint's folder."""
        state = {
            "level": self.level,
            "level_began": self.level_began,
            "mean": self.mean,
            "seconds_before": self.seconds(),
            "decay_from": self.decay_from,
        }
        write_json(checkpoint / "curriculum.json", state)

    def load(self, checkpoint: Path) -> None:
        """Takes up what `save` wrote."""
        for name, value in json.loads((checkpoint / "curriculum.json").read_text()).items():
            setattr(self, name, value)

    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self._started

    def progress(self, step: int) -> float:
        """Share of the budget that is spent, in steps or in time."""
        return max(step / self.max_steps, self.seconds() / self.max_seconds)

    def rate(self, step: int, warmup: int) -> float:
        """Factor on the learning rate at `step`."""
        if step < warmup:
            return (step + 1) / warmup
        if self.decay_from is None:
            return 1.0
        return max((1 - self.progress(step)) / max(1 - self.decay_from, 1e-3), 0.02)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._started = time.monotonic()
        self.dataset.set_level(self.level)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        progress = self.progress(state.global_step)
        if progress >= self.decay_at and self.decay_from is None:
            self.decay_from = progress
        self.stuck = self.level == 0 and progress >= self.give_up_at and len(self.dataset.levels) > 1
        if progress >= 1 or self.stuck:
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "level_match" not in logs:
            return
        progress, last = self.progress(state.global_step), len(self.dataset.levels) - 1
        self.mean += 0.5 * (logs["level_match"] - self.mean)
        tired = self.level > 0 and progress - self.level_began > self.patience
        if self.level < last and (self.mean >= self.threshold or tired):
            self.level += 1
            self.level_began = progress
            self.mean = 0.0
            self.dataset.set_level(self.level)
        if self.level == last and self.decay_from is None:
            self.decay_from = progress


def _window_end(batch: dict[str, Any]) -> int:
    """Where the window, which starts with the prompt, ends in every row of a batch."""
    return window_of(batch["prompt_length"], Setting(0.0, batch["compression_span"], batch["compression_ratio"])).stop


class RecallTrainer(TwoStageTrainer):
    """`TwoStageTrainer` on `RecallDataset` batches, with the losses of `recall_losses`.

    Args:
        weights: of the loss terms; without compressor training (`two_stage=False`) only the first two count.
        curriculum: the callback that sets levels and the learning rate.
        two_stage: `False` reads all batches in one pass: a plain Mamba, or a model that does not compress.
        compressor_from_level: the compressor's losses begin at this level; very small models learn to copy sooner if
            that is later than level 0.

    Logs, besides the losses: `level`, `level_match` (right answers among the batches of the present level),
    `plain_match`, `in_window_match` and `out_of_window_match` (two-stage batches by where the fact stood), and
    `needle_hits` (share of the asked digits that were kept, of facts in the window).
    """

    lr_scheduler: Any

    def __init__(
        self,
        *args: Any,
        weights: LossWeights = LossWeights(),  # noqa: B008 - frozen
        curriculum: Curriculum,
        two_stage: bool = True,
        compressor_from_level: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                "a batch of RecallDataset cannot be split over the GPUs of one process: "
                "show it one, with CUDA_VISIBLE_DEVICES=0"
            )
        self.weights = weights
        self.curriculum = curriculum
        self.can_compress = hasattr(self.model.config, "compression_span")
        if two_stage and not self.can_compress:
            raise ValueError(f"{type(self.model).__name__} does not compress prompts: train it with two_stage=False.")
        self.two_stage = two_stage
        self.write_cost: float = getattr(self.model.config, "write_cost", 0.0)
        self.compressor_from_level = compressor_from_level
        self.add_callback(curriculum)
        # The loss below is a mean that knows nothing of `num_items_in_batch`: Trainer has to average accumulated steps.
        self.model_accepts_loss_kwargs = False

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        if self.lr_scheduler is None:
            warmup = self.args.get_warmup_steps(num_training_steps)
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = LambdaLR(optimizer, lambda step: self.curriculum.rate(step, warmup))
        return self.lr_scheduler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        input_ids, prompt = inputs["input_ids"], inputs["prompt_length"]
        compress = self.two_stage and inputs["compress_prompt"]
        how: dict[str, Any] = {}
        if self.can_compress:
            how = {
                "prompt_lengths": torch.full((len(input_ids),), prompt),
                "compress_prompt": None if compress else False,
                "compression_start": 0.0,
                "compression_span": inputs["compression_span"],
                "compression_ratio": inputs["compression_ratio"],
            }
        outputs = model(input_ids=input_ids, output_hidden_states=self.two_stage, use_cache=False, **how)
        losses = token_losses(outputs.logits, input_ids)
        answered = inputs["labels"][:, 1:] != -100
        read = ~answered[:, : prompt - 1]  # of several questions the first may be short, and its answer stand in the prompt
        terms = {
            "answer": (losses * answered).sum() / answered.sum(),
            "language": (losses[:, : prompt - 1] * read).sum() / read.sum(),
        }
        if self.two_stage and inputs["level"] >= self.compressor_from_level:
            terms |= self._compressor_losses(model, inputs, outputs.hidden_states[-1][:, :prompt])
        if (logits := getattr(outputs, "write_logits", None)) is not None:
            # Lower layers know too little of what a token is part of, and may note what else is of use.
            upper = logits[len(logits) // 2 :]
            terms["evidence"] = torch.stack([note_loss(layer, inputs["numbers"]) for layer in upper]).mean()
        for name, term in terms.items():
            self.record(f"{name}_loss", term)
        self._record_answers(inputs, outputs, compress)
        loss = sum(getattr(self.weights, name) * term for name, term in terms.items())
        if (write_loss := getattr(outputs, "write_loss", None)) is not None:
            self.record("write_loss", write_loss)
            loss = loss + self.write_cost * write_loss
        return (loss, outputs) if return_outputs else loss

    def _compressor_losses(self, model: nn.Module, inputs: dict[str, Any], states: Tensor) -> dict[str, Tensor]:
        backbone = self.accelerator.unwrap_model(model).backbone
        prompt = states.shape[1]
        scores = backbone.compressor.scores(states[:, -1], states[:, : _window_end(inputs)])
        embeddings = backbone.embeddings(inputs["input_ids"][:, :prompt])
        return {
            "value": value_loss(backbone.compressor.value, states, embeddings),
            "evidence": evidence_loss(scores, inputs["evidence"]),
        }

    @torch.no_grad()
    def _record_answers(self, inputs: dict[str, Any], outputs: Any, compressed: bool) -> None:
        right = each_answer_matches(outputs.logits, inputs["labels"], inputs["questions"])
        self.record("level", right.new_full((1,), inputs["level"], dtype=torch.float32))
        if inputs["level"] == self.curriculum.level:
            self.record("level_match", right)
        if not compressed:
            self.record("plain_match", right)
            return
        right, digits = right[:, 0], inputs["digits"]
        inside = digits[:, 1] <= _window_end(inputs)
        self.record("in_window_match", right, inside)
        self.record("out_of_window_match", right, ~inside)
        kept = outputs.compressed_positions
        hits = ((kept >= digits[:, :1]) & (kept < digits[:, 1:])).sum(-1) / (digits[:, 1] - digits[:, 0])
        self.record("needle_hits", hits, inside)
