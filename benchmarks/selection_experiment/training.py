# SPDX-License-Identifier: Apache-2.0
"""The three trainings (books, trunk, arms) with `transformers.Trainer`, which stop in time and go on where they stopped."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from remamba_hf import ReMambaConfig, ReMambaForCausalLM
from remamba_hf.evaluation.checkpoints import environment
from remamba_hf.modeling.selective_compression import Setting, window_of
from remamba_hf.training.book_tokens import write_json
from remamba_hf.training.recall_data import RecallDataset
from remamba_hf.training.recall_losses import LossWeights, evidence_loss, token_losses, value_loss
from remamba_hf.training.recall_trainer import Curriculum, RecallTrainer, take_batch
from remamba_hf.training.two_stage_trainer import TwoStageTrainer, answer_matches

from .recipe import Arm, Recipe, Training

COMPLETE = "complete.json"  # of a checkpoint: written last


class OutOfTime(Exception):
    """The budget is spent; what is finished, and a checkpoint of what is not, are on disk."""


class Bookkeeping(TrainerCallback):
    """Stops a training at a deadline with a checkpoint, marks checkpoints that are whole, and chains the batches' digests.

    Args:
        deadline: of `time.monotonic`.
    """

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.seconds = 0.0
        self.data = ""
        self.stopped = False
        self._began = time.monotonic()

    def saw(self, digest: str) -> None:
        """A batch was trained on."""
        self.data = hashlib.sha256((self.data + digest).encode()).hexdigest()

    def load(self, checkpoint: Path) -> None:
        state = json.loads((checkpoint / COMPLETE).read_text())
        self.seconds, self.data = state["seconds"], state["data"]

    def spent(self) -> float:
        """Seconds of training, those before an interruption included."""
        return self.seconds + time.monotonic() - self._began

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._began = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Means of a logging interval are not in a checkpoint: between two intervals none is lost.
        if state.global_step % args.logging_steps == 0 and time.monotonic() >= self.deadline < float("inf"):
            self.stopped = state.global_step < state.max_steps
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        target = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_json(target / COMPLETE, {"seconds": self.spent(), "data": self.data})
        for other in Path(args.output_dir).glob("checkpoint-*"):
            if other != target:
                shutil.rmtree(other)


class BookTrainer(TwoStageTrainer):
    """Language modeling in plain passes, on batches in their order."""

    def __init__(self, *args: Any, bookkeeping: Bookkeeping, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bookkeeping = bookkeeping
        self.add_callback(bookkeeping)
        # Losses are means over a whole batch.
        self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        self.bookkeeping.saw(inputs["digest"])
        outputs = model(inputs["input_ids"], labels=inputs["labels"], compress_prompt=False, use_cache=False)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class ArmTrainer(BookTrainer):
    """Fine-tuning of one arm on `TuningBatches`: the answer's loss, a little of the prompt's, and of arms that compress
    those of the compressor (`recall_losses`).

    Logs, besides the losses: `recall_match`, `lines_match` and `instructions_match` (rows whose whole answer was most
    probable), and `needle_hits` (share of the asked digits that were kept, of facts in the window).

    Args:
        weights: of the losses.
        two_stage: False reads all prompts in one pass.
    """

    def __init__(self, *args: Any, weights: LossWeights, two_stage: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.weights, self.two_stage = weights, two_stage

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        self.bookkeeping.saw(inputs["digest"])
        ids, labels, prompts = inputs["input_ids"], inputs["labels"], inputs["prompt_lengths"]
        compress = self.two_stage and inputs["compress_prompt"]
        # Pads stand behind the responses, where nothing reads them: no mask is needed.
        outputs = model(
            input_ids=ids,
            prompt_lengths=prompts,
            compress_prompt=None if compress else False,
            compression_start=0.0,
            compression_span=inputs["compression_span"],
            compression_ratio=inputs["compression_ratio"],
            output_hidden_states=self.two_stage,
            use_cache=False,
        )
        losses = token_losses(outputs.logits, ids)
        column = torch.arange(ids.shape[1], device=ids.device)
        prompt = column < torch.tensor(prompts, device=ids.device)[:, None]
        answered, read = labels[:, 1:] != -100, prompt[:, 1:]
        terms = {
            "answer": (losses * answered).sum() / answered.sum(),
            "language": (losses * read).sum() / read.sum(),
        }
        if self.two_stage:
            terms |= self._compressor_losses(model, inputs, outputs.hidden_states[-1], prompt)
        for name, term in terms.items():
            self.record(f"{name}_loss", term)
        self._record_answers(inputs, outputs, compress)
        loss = sum(getattr(self.weights, name) * term for name, term in terms.items())
        return (loss, outputs) if return_outputs else loss

    def _compressor_losses(
        self, model: nn.Module, inputs: dict[str, Any], states: Tensor, prompt: Tensor
    ) -> dict[str, Tensor]:
        backbone = self.accelerator.unwrap_model(model).backbone
        ids, lengths = inputs["input_ids"], torch.tensor(inputs["prompt_lengths"], device=states.device)
        longest = max(inputs["prompt_lengths"])
        states, prompt = states[:, :longest], prompt[:, :longest]
        embeddings = backbone.embeddings(ids[:, :longest])
        terms = {"value": value_loss(backbone.compressor.value, states[prompt], embeddings[prompt])}
        if self.weights.evidence and inputs["kind"] != "instructions":
            ends = self._window_ends(inputs).to(states.device)
            queries = states[torch.arange(len(ids), device=states.device), lengths - 1]
            scores = backbone.compressor.scores(queries, states[:, : max(ends.tolist())])
            outside = torch.arange(scores.shape[1], device=states.device) >= ends[:, None]
            # The least cosine: nothing is asked of positions behind a row's window.
            terms["evidence"] = evidence_loss(scores.masked_fill(outside, -1.0), inputs["evidence"])
        return terms

    def _window_ends(self, inputs: dict[str, Any]) -> Tensor:
        setting = Setting(0.0, inputs["compression_span"], inputs["compression_ratio"])
        return torch.tensor([window_of(length, setting).stop for length in inputs["prompt_lengths"]])

    @torch.no_grad()
    def _record_answers(self, inputs: dict[str, Any], outputs: Any, compressed: bool) -> None:
        self.record(f"{inputs['kind']}_match", answer_matches(outputs.logits, inputs["labels"]))
        if compressed and inputs["kind"] != "instructions":
            kept, digits = outputs.compressed_positions, inputs["digits"]
            hits = ((kept >= digits[:, :1]) & (kept < digits[:, 1:])).sum(-1) / (digits[:, 1] - digits[:, 0])
            self.record("needle_hits", hits, digits[:, 1] <= self._window_ends(inputs).to(digits.device))


class TrunkTrainer(RecallTrainer):
    """`RecallTrainer` in plain passes, on batches in their order."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


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


def arm_model(recipe: Recipe, arm: Arm, base: Path, seed: int) -> ReMambaForCausalLM:
    """The base in float32 with a compressor started as the paper does, and an arm's settings in its configuration."""
    set_seed(seed)
    model = ReMambaForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.initialize_compressor()
    span, ratio = recipe.evaluation.compression[0]
    last = recipe.phases[-1][1]
    model.config.selection = arm.selection or "score"
    model.config.compression_span, model.config.compression_ratio = span, ratio
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
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
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
        save_steps=training.save_steps,
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
    """Pretraining on books; leaves `folder/model`, a plain Mamba in bfloat16."""
    bookkeeping = Bookkeeping(deadline)
    trainer = BookTrainer(
        model=new_base(recipe, tokenizer),
        args=settings_of(recipe, recipe.pretraining, folder, 0, workers),
        train_dataset=dataset,
        data_collator=take_batch,
        bookkeeping=bookkeeping,
    )
    run(trainer, folder, bookkeeping)
    finish(trainer, folder, tokenizer, bookkeeping, plain=True)


def train_trunk(
    recipe: Recipe,
    folder: Path,
    base: Path,
    sampler: Any,
    tokenizer: PreTrainedTokenizerBase,
    deadline: float,
    workers: int,
) -> None:
    """Teaches the base to copy, in plain passes over short prompts; leaves `folder/model`, which all arms start from."""
    dataset = RecallDataset(sampler, recipe.trunk_levels, recipe.trunk.tokens_per_batch, recipe.trunk.steps)
    # Success opens levels; steps, not time, are the budget: the same data makes the same trunk on any machine.
    curriculum = Curriculum(dataset, threshold=recipe.trunk_threshold, max_steps=recipe.trunk.steps, patience=0.25)
    bookkeeping = Bookkeeping(deadline)
    set_seed(0)
    trainer = TrunkTrainer(
        model=ReMambaForCausalLM.from_pretrained(base, dtype=torch.float32),
        # Batches that a worker has prefetched would be of the level before.
        args=settings_of(recipe, recipe.trunk, folder, 0, 0 if not torch.cuda.is_available() else workers),
        train_dataset=dataset,
        data_collator=take_batch,
        weights=recipe.weights,
        curriculum=curriculum,
        two_stage=False,
    )
    trainer.add_callback(bookkeeping)
    run(trainer, folder, bookkeeping, curriculum.load)
    finish(trainer, folder, tokenizer, bookkeeping, plain=True, level_reached=curriculum.level)


def train_arm(
    recipe: Recipe,
    arm: Arm,
    seed: int,
    folder: Path,
    base: Path,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    deadline: float,
    workers: int,
) -> None:
    """Fine-tunes one arm; leaves `folder/model` in bfloat16: a plain Mamba, or a ReMamba that knows its selection."""
    bookkeeping = Bookkeeping(deadline)
    weights = recipe.weights if arm.evidence else LossWeights(**{**vars(recipe.weights), "evidence": 0.0})
    trainer = ArmTrainer(
        model=arm_model(recipe, arm, base, seed),
        args=settings_of(recipe, recipe.tuning, folder, seed, workers),
        train_dataset=dataset,
        data_collator=take_batch,
        bookkeeping=bookkeeping,
        weights=weights,
        two_stage=arm.selection is not None,
    )
    run(trainer, folder, bookkeeping)
    finish(trainer, folder, tokenizer, bookkeeping, plain=arm.selection is None)


def run(
    trainer: TwoStageTrainer, folder: Path, bookkeeping: Bookkeeping, load: Callable[[Path], Any] = lambda checkpoint: None
) -> None:
    """Trains to the end, from the last whole checkpoint if there is one.

    Raises:
        OutOfTime: the deadline came first.
    """
    whole = sorted((folder / "checkpoints").glob(f"checkpoint-*/{COMPLETE}"), key=lambda path: path.stat().st_mtime)
    checkpoint = whole[-1].parent if whole else None
    if checkpoint is not None:
        bookkeeping.load(checkpoint)
        load(checkpoint)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if bookkeeping.stopped:
        raise OutOfTime(f"{folder.name}: {trainer.state.global_step} of {trainer.state.max_steps} steps")


def finish(
    trainer: TwoStageTrainer,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    bookkeeping: Bookkeeping,
    plain: bool,
    **more: Any,
) -> None:
    """Writes the model and the record of its training, and removes the checkpoints."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.config.use_cache = True  # Trainer turns it off
    save_rounded(model, folder / "model", tokenizer, plain)
    record = {
        "steps": trainer.state.global_step,
        "seconds": round(bookkeeping.spent(), 1),
        "data": bookkeeping.data,
        "parameters": trainer.model.num_parameters(),
        "environment": environment(str(trainer.args.device)),
        **more,
        "history": trainer.state.log_history,
    }
    write_json(folder / "training.json", record)  # last: it says that the training is finished
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def save_rounded(model: ReMambaForCausalLM, folder: Path, tokenizer: PreTrainedTokenizerBase, plain: bool) -> None:
    """Writes a model in bfloat16, but for what has to stay in float32, with its tokenizer; all or nothing."""
    partial = folder.with_name("model.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    rounded: PreTrainedModel = ReMambaForCausalLM.from_pretrained(partial, dtype=torch.bfloat16)
    shutil.rmtree(partial)
    if plain:
        rounded = as_plain(rounded)
    rounded.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def as_plain(model: PreTrainedModel) -> MambaForCausalLM:
    """transformers' own Mamba with the weights of a model that was trained in plain passes."""
    given, known = model.config.to_dict(), MambaConfig().to_dict()
    names = [name for name in known if name in given and name not in ("model_type", "architectures")]
    plain = MambaForCausalLM(MambaConfig(**{name: given[name] for name in names}))
    missing, _ = plain.load_state_dict(model.state_dict(), strict=False, assign=True)
    if missing:
        raise RuntimeError(f"a plain Mamba has weights that the trained model lacks: {missing}")
    plain.tie_weights()
    return plain
