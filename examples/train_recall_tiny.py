# SPDX-License-Identifier: Apache-2.0
"""Trains a small model that reads books and recalls a number planted far back, from scratch, with `transformers.Trainer`.

    python examples/train_recall_tiny.py --books BOOKS --output OUTPUT --max-minutes 7      # ReMamba, on one GPU
    python examples/train_recall_tiny.py --books BOOKS --output OUTPUT --family remamba2    # ReMamba-2
    python examples/train_recall_tiny.py --books BOOKS --output OUTPUT --family memmamba --max-steps 2000
    python examples/train_recall_tiny.py --books BOOKS --output OUTPUT --plain         # its plain Mamba, the same batches
    python examples/train_recall_tiny.py --books BOOKS --output OUTPUT --smoke         # CPU, a few minutes, much smaller

BOOKS is a folder of .txt files. OUTPUT receives the tokenizer and the tokens (`data/`), checkpoints that `--resume` takes
up (`checkpoints-*/`), and the model (`model/`, bf16) with the record of its training (`training.json`).

The curriculum of ReMamba: first a plain trunk learns to copy a number, from prompts of 64 tokens to 256, while the
compressor's values learn to look like the text they stand for, and its scores where the evidence is. Then prompts are
compressed, first to every vector, then to fewer, while they grow. See remamba_hf/training/recall_losses.py.

The curriculum of MemMamba: prompts grow to 4,096 tokens, and from 128 tokens on they hold several people's numbers, of which
two are asked for, one after the other. The write scores are told which tokens are numbers of the text's people.
"""

import argparse
import math
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import remamba_hf
from remamba_hf import MemMambaConfig, MemMambaForCausalLM
from remamba_hf.families import FAMILIES
from remamba_hf.training.book_tokens import prepare_books, write_json
from remamba_hf.training.recall_data import RecallDataset, RecallLevel, RecallSampler
from remamba_hf.training.recall_losses import LossWeights
from remamba_hf.training.recall_trainer import Curriculum, RecallTrainer, take_batch

WIDE = (0.3, 0.95)
CLASSES = {name: (family.config_class, family.model_class) for name, family in FAMILIES.items()}
CLASSES["memmamba"] = (MemMambaConfig, MemMambaForCausalLM)


@dataclass(frozen=True)
class Recipe:
    """One size of model with its data and its training."""

    hidden_size: int
    layers: int
    vocab_size: int
    max_tokens: int
    digits: int
    tokens_per_batch: int
    learning_rate: float
    max_steps: int
    warmup_steps: int
    initializer_range: float
    logging_steps: int
    save_steps: int
    levels: tuple[RecallLevel, ...]
    # What each family's configuration has of its own; their models have about the same number of parameters.
    families: dict[str, dict[str, Any]] = field(default_factory=dict)
    weights: LossWeights = LossWeights()  # noqa: RUF009 - frozen
    noise: float = 0.0
    weight_decay: float = 0.1
    # Shares of the budget: after the first the learning rate falls in any case, after the second a model that has not
    # learned to copy at all starts anew with another seed.
    decay_at: float = 0.65
    give_up_at: float = 0.15
    attempts: int = 4
    compressor_from_level: int = 0
    # Inference settings of a model that compresses, written into its configuration.
    span: float = 0.95
    ratio: float = 0.03
    max_kept: int = 512

    def settings_of(self, family: str) -> dict[str, Any]:
        """Arguments of the configuration that only this family has."""
        if family == "memmamba":
            return self.families[family]
        return self.families[family] | {
            "compression_span": self.span,
            "compression_ratio": self.ratio,
            "compression_max_kept": self.max_kept,
            # What the last level draws, for whoever trains the model further.
            "train_compression_span": self.levels[-1].span,
            "train_compression_ratio": self.levels[-1].ratio,
            "train_compression_tail": 0,
        }


FULL = Recipe(
    families={
        "remamba": dict(state_size=16),
        "remamba2": dict(state_size=64, num_heads=8, head_dim=64, n_groups=1, chunk_size=128),
    },
    hidden_size=256,
    layers=8,
    vocab_size=4096,
    max_tokens=20_000_000,
    digits=5,
    tokens_per_batch=32_768,
    learning_rate=2e-3,
    max_steps=6_000,
    warmup_steps=200,
    initializer_range=0.04,
    logging_steps=20,
    save_steps=1_000,
    levels=(
        RecallLevel((64, 80)),
        RecallLevel((128,)),
        RecallLevel((192, 256)),
        RecallLevel((384, 512), two_stage=0.5, span=WIDE, ratio=(0.5, 1.0)),
        RecallLevel((512, 1024), two_stage=0.6, span=WIDE, ratio=(0.2, 0.8)),
        RecallLevel((512, 1024, 2048), two_stage=0.6, span=WIDE, ratio=(0.05, 0.4)),
        RecallLevel((1024, 2048, 4096), two_stage=0.6, span=WIDE, ratio=(0.02, 0.2)),
        RecallLevel((1024, 2048, 4096, 8192), two_stage=0.65, span=WIDE, ratio=(0.015, 0.1)),
        RecallLevel((1024, 2048, 4096, 8192, 16_384), two_stage=0.65, span=WIDE, ratio=(0.015, 0.1)),
    ),
)
SMOKE = Recipe(
    families={
        "remamba": dict(state_size=16),
        "remamba2": dict(state_size=32, num_heads=4, head_dim=32, n_groups=1, chunk_size=64),
    },
    hidden_size=64,
    layers=2,
    vocab_size=1024,
    max_tokens=2_000_000,
    digits=1,
    tokens_per_batch=3_072,
    learning_rate=3e-3,
    max_steps=900,
    warmup_steps=50,
    initializer_range=0.1,
    logging_steps=10,
    save_steps=500,
    levels=(
        RecallLevel((56,)),
        RecallLevel((64, 80)),
        RecallLevel((96, 128)),
        RecallLevel((128, 192), two_stage=0.6, span=WIDE, ratio=(0.3, 1.0), min_kept=16),
        RecallLevel((192, 256), two_stage=0.7, span=WIDE, ratio=(0.1, 0.4), min_kept=16),
    ),
    weights=LossWeights(language=0.1),
    compressor_from_level=1,
    give_up_at=2.0,
    attempts=1,
    ratio=0.1,
)


FULL_NOTES = replace(
    FULL,
    families={"memmamba": dict(state_size=16, write_cost=0.05), "remamba": dict(state_size=16)},
    noise=0.03,
    learning_rate=1e-3,
    weights=LossWeights(language=0.1, evidence=0.05),
    levels=(
        RecallLevel((64, 80)),
        RecallLevel((128,), questions=2),
        RecallLevel((192, 256), questions=2),
        RecallLevel((384, 512), questions=2, distractors=1),
        RecallLevel((512, 1024), questions=2, distractors=2),
        RecallLevel((1024, 2048), questions=2, distractors=2),
        RecallLevel((1024, 2048, 4096), questions=2, distractors=2),
    ),
)
SMOKE_NOTES = replace(
    SMOKE,
    families={
        "memmamba": dict(state_size=16, note_size=32, pool_size=16, chunk_size=16, cross_layer_period=0, write_cost=0.05),
        "remamba": dict(state_size=16),
    },
    noise=0.03,
    weights=LossWeights(language=0.1, evidence=0.05),
    levels=(RecallLevel((56,)), RecallLevel((64, 80)), RecallLevel((96, 128)), RecallLevel((192, 256))),
)


def new_model(recipe: Recipe, family: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A model with random weights, a function of the seed."""
    set_seed(seed)
    config_class, model_class = CLASSES[family]
    config = config_class(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        # Tied embeddings are also the head: 0.1, Mamba's default, makes the first logits too sure of themselves.
        initializer_range=recipe.initializer_range,
        residual_in_fp32=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        **recipe.settings_of(family),
    )
    model = model_class(config)
    if family in FAMILIES:
        with torch.no_grad():
            # Values are trained towards embeddings: begin near their size.
            model.backbone.compressor.value[2].weight.mul_(0.1)
    return model


def train(recipe: Recipe, arguments: argparse.Namespace) -> tuple[RecallTrainer, Curriculum]:
    """Trains, with another seed again if a model does not learn to copy."""
    tokenizer, tokens = prepare_books(
        arguments.books, arguments.data, recipe.vocab_size, recipe.max_tokens, arguments.exclude
    )
    began = time.monotonic()
    for attempt in range(recipe.attempts):
        seed = arguments.seed + 1000 * attempt
        minutes = arguments.max_minutes - (time.monotonic() - began) / 60
        trainer, curriculum = build(recipe, arguments, tokenizer, tokens, seed, minutes)
        checkpoint = get_last_checkpoint(trainer.args.output_dir) if arguments.resume else None
        if checkpoint is not None:
            curriculum.load(Path(checkpoint))
        trainer.train(resume_from_checkpoint=checkpoint)
        if not curriculum.stuck:
            break
        print(f"seed {seed} did not learn to copy; starting anew")
    return trainer, curriculum


def build(
    recipe: Recipe,
    arguments: argparse.Namespace,
    tokenizer: PreTrainedTokenizerFast,
    tokens: np.ndarray,
    seed: int,
    minutes: float,
) -> tuple[RecallTrainer, Curriculum]:
    """The trainer of one attempt."""
    max_steps = arguments.max_steps or recipe.max_steps
    sampler = RecallSampler(tokens, tokenizer, seed, recipe.digits, recipe.noise)
    dataset = RecallDataset(sampler, recipe.levels, recipe.tokens_per_batch, max_steps)
    curriculum = Curriculum(
        dataset,
        max_steps=max_steps,
        max_seconds=60 * minutes,
        decay_at=recipe.decay_at,
        give_up_at=recipe.give_up_at,
    )
    cuda = torch.cuda.is_available()
    settings = TrainingArguments(
        output_dir=str(arguments.output / f"checkpoints-{seed}"),
        max_steps=max_steps,
        per_device_train_batch_size=1,
        learning_rate=arguments.learning_rate or recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        warmup_steps=recipe.warmup_steps,
        optim="adamw_torch_fused" if cuda else "adamw_torch",
        bf16=cuda,
        use_cpu=not cuda,
        logging_steps=recipe.logging_steps,
        # Asking whether every loss is finite makes every step wait for the device.
        logging_nan_inf_filter=False,
        save_steps=recipe.save_steps,
        dataloader_num_workers=arguments.workers,
        dataloader_prefetch_factor=4 if arguments.workers else None,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        report_to="none",
        seed=seed,
    )
    trainer = RecallTrainer(
        model=new_model(recipe, arguments.family, tokenizer, seed),
        args=settings,
        train_dataset=dataset,
        data_collator=take_batch,
        processing_class=tokenizer,
        weights=recipe.weights,
        curriculum=curriculum,
        two_stage=arguments.family in FAMILIES and not arguments.plain,
        compressor_from_level=recipe.compressor_from_level,
    )
    return trainer, curriculum


def save(trainer: RecallTrainer, curriculum: Curriculum, recipe: Recipe, arguments: argparse.Namespace) -> None:
    """Writes the model in bf16, with its tokenizer and the record of its training."""
    target = arguments.output / "model"
    trainer.model.config.use_cache = True  # Trainer turns it off
    with tempfile.TemporaryDirectory(dir=arguments.output) as exact:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(exact)
        # Loading in bf16 leaves in fp32 what has to stay there (A_log, D, the biases of the step size).
        rounded = CLASSES[arguments.family][1].from_pretrained(exact, dtype=torch.bfloat16)
    if arguments.plain:
        rounded = as_plain(rounded)
    partial = arguments.output / "model.partial"
    rounded.save_pretrained(partial)
    trainer.processing_class.save_pretrained(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    history = trainer.state.log_history
    write_json(
        arguments.output / "training.json",
        {
            "recipe": asdict(recipe),
            "family": arguments.family,
            "plain": arguments.plain,
            "seed": trainer.args.seed,
            "learning_rate": trainer.args.learning_rate,
            "steps": trainer.state.global_step,
            "prompt_tokens": trainer.state.global_step * recipe.tokens_per_batch,
            "minutes": curriculum.seconds() / 60,
            "level_reached": curriculum.level,
            "parameters": trainer.model.num_parameters(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "versions": {
                "remamba_hf": remamba_hf.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "history": history,
        },
    )


def as_plain(model: PreTrainedModel) -> PreTrainedModel:
    """transformers' own Mamba or Mamba-2 with the weights of a model that was trained as one."""
    family = FAMILIES[model.config.model_type]
    given = {name: value for name, value in model.config.to_dict().items() if name not in ("model_type", "architectures")}
    known = family.plain_config_class().to_dict()
    plain = family.plain_model_class(family.plain_config_class(**{name: given[name] for name in known if name in given}))
    missing, _ = plain.load_state_dict(model.state_dict(), strict=False, assign=True)
    if missing:
        raise RuntimeError(f"{family.plain_name} has weights that the trained model lacks: {missing}")
    plain.tie_weights()
    return plain


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--books", type=Path, help="folder of .txt books; not needed once OUTPUT/data is filled")
    parser.add_argument("--output", type=Path, required=True, help="folder for everything this script writes")
    parser.add_argument("--data", type=Path, help="folder of tokenizer and tokens (default: OUTPUT/data)")
    parser.add_argument("--exclude", default="jane austen", help="leave out books whose text matches this expression")
    parser.add_argument("--family", choices=sorted(CLASSES), default="remamba", help="which model to train")
    parser.add_argument("--plain", action="store_true", help="train a plain Mamba: one stage, no compressor, no notes")
    parser.add_argument("--smoke", action="store_true", help="a very small model on short prompts, for the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-minutes", type=float, default=math.inf, help="stop in time, learning rate included")
    parser.add_argument("--max-steps", type=int, help="steps of the whole training")
    parser.add_argument("--learning-rate", type=float, help="highest learning rate (default: the recipe's)")
    parser.add_argument("--workers", type=int, default=4, help="processes that make batches")
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT's last checkpoint")
    parser.add_argument("--prepare-only", action="store_true", help="make tokenizer and tokens, then stop")
    arguments = parser.parse_args()
    arguments.data = arguments.data or arguments.output / "data"
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.family == "memmamba":
        recipe = SMOKE_NOTES if arguments.smoke else FULL_NOTES
        # Its plain Mamba is read by the other family on Mamba-1, without compression.
        arguments.family = "remamba" if arguments.plain else arguments.family
    else:
        recipe = SMOKE if arguments.smoke else FULL
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.prepare_only:
        prepare_books(arguments.books, arguments.data, recipe.vocab_size, recipe.max_tokens, arguments.exclude)
        return
    trainer, curriculum = train(recipe, arguments)
    save(trainer, curriculum, recipe, arguments)
    print(f"{arguments.output / 'model'}: level {curriculum.level} after {trainer.state.global_step} steps")


if __name__ == "__main__":
    main()
