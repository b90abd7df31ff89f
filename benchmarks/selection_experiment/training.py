# SPDX-License-Identifier: Apache-2.0
"""The three trainings (books, trunk, arms) with `transformers.Trainer`, which stop in time and go on where they stopped."""

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from remamba_hf import ReMambaConfig, ReMambaForCausalLM
from remamba_hf.evaluation.checkpoints import environment
from remamba_hf.training.book_tokens import write_json
from remamba_hf.training.recall_losses import LossWeights
from remamba_hf.training.recall_trainer import Curriculum, RecallTrainer, take_batch
from remamba_hf.training.two_stage_trainer import TwoStageTrainer

from .data import PhasedBatches
from .recipe import Arm, Recipe, Training

COMPLETE = "complete.json"  # of a checkpoint: written last
FAILED = "failed.json"  # starts that were given up
LAST_LOGS = 3  # that decide on it
STARTS = 4  # of which one has to learn


class OutOfTime(Exception):
    """The budget is spent; what is finished, and a checkpoint of what is not, are on disk."""


class NotLearned(Exception):
    """A training was given up: too few answers were right where its first phase that asks ended."""


class Watch(TrainerCallback):
    """Gives a training up where its first phase that asks ends if too few of the answers of its last logs are right.

    training: whose phases and `must_match` count.
    match: share of right answers at those logs; None: not yet known.
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        self.match: float | None = None

    @property
    def gave_up(self) -> bool:
        return self.match is not None and self.match < self.training.must_match

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not self.training.must_match or state.global_step < (end := self.training.first_asked_end()):
            return
        # Whenever it is asked, and of a training that was resumed in a later phase, the answer is the same.
        logged = [entry for entry in state.log_history if "level_match" in entry and entry["step"] <= end]
        matches = [entry["level_match"] for entry in logged[-LAST_LOGS:]]
        self.match = sum(matches) / max(len(matches), 1)
        if self.gave_up:
            control.should_training_stop = True


class Budget(TrainerCallback):
    """Stops a training at a deadline with a checkpoint, and marks checkpoints that are whole.

    Args:
        deadline: of `time.monotonic`.
    """

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.seconds_before = 0.0
        self._began = time.monotonic()

    def seconds(self) -> float:
        """Of training, those before an interruption included."""
        return self.seconds_before + time.monotonic() - self._began

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._began = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Means of a logging interval are not in a checkpoint: between two intervals none is lost.
        if state.global_step % args.logging_steps == 0 and time.monotonic() >= self.deadline:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        target = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_json(target / COMPLETE, {"seconds": self.seconds()})
        for other in Path(args.output_dir).glob("checkpoint-*"):
            if other != target:
                shutil.rmtree(other)


def new_base(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> ReMambaForCausalLM:
    """A model with random weights, to be trained in plain passes."""
    set_seed(seed)
    config = ReMambaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        state_size=16,
        initializer_range=recipe.initializer_range,
        residual_in_fp32=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    return ReMambaForCausalLM(config)


def arm_model(recipe: Recipe, arm: Arm, trunk: Path, seed: int) -> ReMambaForCausalLM:
    """The trunk in float32 with a compressor started as the paper does, and an arm's settings in its configuration."""
    set_seed(seed)
    model = ReMambaForCausalLM.from_pretrained(trunk, dtype=torch.float32)
    model.initialize_compressor()
    last = recipe.tuning.phases[-1].level
    model.config.selection = arm.selection or "score"
    model.config.compression_span, model.config.compression_ratio = recipe.evaluation.compression[0]
    model.config.train_compression_span, model.config.train_compression_ratio = last.span, last.ratio
    model.config.train_compression_tail = 0
    return model


def settings_of(recipe: Recipe, training: Training, folder: Path, seed: int, workers: int) -> TrainingArguments:
    """Of one training."""
    cuda = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=training.steps,
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",  # of the base; the others have a curriculum's
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=training.warmup_steps,
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        optim="adamw_torch_fused" if cuda else "adamw_torch",
        bf16=cuda,
        use_cpu=not cuda,
        logging_steps=recipe.logging_steps,
        logging_nan_inf_filter=False,  # would make every step wait for the device
        save_steps=recipe.save_steps,
        dataloader_num_workers=workers,
        dataloader_prefetch_factor=4 if workers else None,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=False,
        seed=seed,
    )


def train_base(
    recipe: Recipe, folder: Path, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, deadline: float, workers: int
) -> None:
    """Pretraining on books; leaves `folder/model`."""
    trainer = TwoStageTrainer(
        model=new_base(recipe, tokenizer),
        args=settings_of(recipe, recipe.pretraining, folder, 0, workers),
        train_dataset=dataset,
        data_collator=take_batch,
        processing_class=tokenizer,
    )
    train(trainer, folder, deadline)


def train_trunk(
    recipe: Recipe,
    folder: Path,
    base: Path,
    batches: Callable[[int], PhasedBatches],
    tokenizer: PreTrainedTokenizerBase,
    deadline: float,
    workers: int,
) -> None:
    """Teaches the base to answer, in plain passes over short prompts; leaves `folder/model`, which all arms start from.

    Whether that is learned soon is chance. A start that has not learned it by the end of the first phase that asks is given
    up, noted in `failed.json`, and another begins.

    Args:
        batches: of a start, by its number.

    Raises:
        OutOfTime: the deadline came first.
        NotLearned: no start has learned it.
    """
    while True:
        failed = json.loads((folder / FAILED).read_text()) if (folder / FAILED).exists() else []
        if len(failed) >= STARTS:
            raise NotLearned(f"{folder} was begun {STARTS} times and never learned to answer: change the recipe")
        set_seed(len(failed))
        model = ReMambaForCausalLM.from_pretrained(base, dtype=torch.float32)
        settings = settings_of(recipe, recipe.trunk, folder, len(failed), workers)
        trainer, load = recall_trainer(model, settings, batches(len(failed)), tokenizer, recipe.weights, two_stage=False)
        watch = Watch(recipe.trunk)
        trainer.add_callback(watch)
        try:
            train(trainer, folder, deadline, load, failed_starts=failed)
            return
        except OutOfTime:
            if not watch.gave_up:
                raise
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        write_json(folder / FAILED, [*failed, {"step": trainer.state.global_step, "match": watch.match}])


def train_arm(
    recipe: Recipe,
    arm: Arm,
    seed: int,
    folder: Path,
    trunk: Path,
    dataset: PhasedBatches,
    tokenizer: PreTrainedTokenizerBase,
    deadline: float,
    workers: int,
) -> None:
    """Fine-tunes one arm; leaves `folder/model`, which knows its selection. A compressor that is not trained stays as it
    was started."""
    model, settings = arm_model(recipe, arm, trunk, seed), settings_of(recipe, recipe.tuning, folder, seed, workers)
    weights = recipe.weights if arm.evidence else replace(recipe.weights, evidence=0.0)
    trainer, load = recall_trainer(model, settings, dataset, tokenizer, weights, two_stage=arm.selection is not None)
    train(trainer, folder, deadline, load, data=dataset.digest())


def recall_trainer(
    model: ReMambaForCausalLM,
    settings: TrainingArguments,
    dataset: PhasedBatches,
    tokenizer: PreTrainedTokenizerBase,
    weights: LossWeights,
    two_stage: bool,
) -> tuple[RecallTrainer, Callable[[Path], None]]:
    """A trainer, and what takes up its curriculum from a checkpoint."""
    # It opens no level, as steps do: the learning rate stays up for three fifths of them, then falls.
    curriculum = Curriculum(dataset, threshold=math.inf, max_steps=settings.max_steps, patience=math.inf)
    trainer = RecallTrainer(
        model=model,
        args=settings,
        train_dataset=dataset,
        data_collator=take_batch,
        processing_class=tokenizer,
        weights=weights,
        curriculum=curriculum,
        two_stage=two_stage,
    )
    return trainer, curriculum.load


def train(
    trainer: TwoStageTrainer,
    folder: Path,
    deadline: float,
    load: Callable[[Path], Any] = lambda checkpoint: None,
    **more: Any,
) -> None:
    """Trains to the end, from the last whole checkpoint if there is one, writes the model and the record of its training,
    and removes the checkpoints.

    Args:
        load: is given the checkpoint.
        more: for the record.

    Raises:
        OutOfTime: the deadline came first.
    """
    budget = Budget(deadline)
    trainer.add_callback(budget)
    whole = sorted((folder / "checkpoints").glob(f"checkpoint-*/{COMPLETE}"), key=lambda path: path.stat().st_mtime)
    checkpoint = whole[-1].parent if whole else None
    if checkpoint is not None:
        budget.seconds_before = json.loads(whole[-1].read_text())["seconds"]
        load(checkpoint)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.state.global_step < trainer.state.max_steps:
        raise OutOfTime(f"{folder.name}: {trainer.state.global_step} of {trainer.state.max_steps} steps")
    save_rounded(trainer, folder / "model")
    record = {
        "steps": trainer.state.global_step,
        "seconds": round(budget.seconds(), 1),
        "parameters": trainer.model.num_parameters(),
        "environment": environment(str(trainer.args.device)),
        **more,
        "history": trainer.state.log_history,
    }
    write_json(folder / "training.json", record)  # last: it says that the training is finished
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def save_rounded(trainer: TwoStageTrainer, folder: Path) -> None:
    """Writes a model in bfloat16, but for what has to stay in float32, with its tokenizer; all or nothing."""
    partial = folder.with_name("model.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.config.use_cache = True  # Trainer turns it off
    model.save_pretrained(partial)
    rounded = ReMambaForCausalLM.from_pretrained(partial, dtype=torch.bfloat16)
    shutil.rmtree(partial)
    rounded.save_pretrained(partial)
    trainer.processing_class.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
