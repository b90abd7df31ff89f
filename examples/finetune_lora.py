# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a model on instructions with LoRA, as the ReMamba paper does, with `transformers.Trainer`.

    python examples/finetune_lora.py --tiny --output RUN                                     # a CPU, under a minute
    python examples/finetune_lora.py --model state-spaces/mamba-130m-hf --data train.jsonl --output RUN
    python examples/finetune_lora.py --model state-spaces/mamba-2.8b-hf --data long_orca --output RUN
    accelerate launch --num_processes 8 examples/finetune_lora.py ...                        # the same on eight GPUs

A plain Mamba or Mamba-2 becomes a ReMamba or ReMamba-2 first, its compressor started as the paper does (`RUN/base`).
DATA is a file or folder of .jsonl, .jsonl.gz or .parquet, or a Hub id: prompt and response (other names: --columns),
messages for the tokenizer's chat template, or `long_orca`. RUN receives checkpoints that --resume takes up, `adapter/`,
`answers.jsonl` (what the model says to held-out prompts), `training.json`, and with --merge the merged `model/`.

    AutoPeftModelForCausalLM.from_pretrained("RUN/adapter")         # the fine-tuned model
    remamba convert state-spaces/mamba-130m-hf OUT --adapter RUN/adapter    # or a checkpoint of it that needs no PEFT
"""

import argparse
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

import remamba_hf
from remamba_hf.checkpoint_files import locate
from remamba_hf.conversion import convert_checkpoint
from remamba_hf.families import ALL_FAMILIES, PLAIN_FAMILIES
from remamba_hf.training import PromptResponseCollator, TwoStageTrainer
from remamba_hf.training.book_tokens import write_json
from remamba_hf.training.instruction_data import LengthRule, read_pairs, split_by_content, tokenize_pairs
from remamba_hf.training.long_orca import long_orca
from remamba_hf.training.lora import (
    PAPER_ARGUMENTS,
    PAPER_BATCH,
    add_lora,
    merge_lora,
    remamba_lora_config,
    save_adapter,
)

TINY_MODEL = Path(__file__).parent.parent / "model_cards" / "remamba-tiny"
TINY = dict(
    steps=15, batch=4, rows=4, max_tokens=512, rank=32, learning_rate=6e-3, eval_rows=8, max_new_tokens=8, held_out=0.1
)
NAMES = ("Ada", "Ben", "Cora", "Dan", "Eve", "Finn", "Greta", "Hugo", "Ida", "Jon")


class FineTuner(TwoStageTrainer):
    """`TwoStageTrainer` whose evaluation also generates: `eval_exact` is the share of held-out rows answered to the letter.

    Args:
        answers: file for what was said, replaced by each evaluation.
        eval_rows: so many rows of the evaluation data are answered.
        max_new_tokens: an answer's.
    """

    def __init__(self, *args: Any, answers: Path, eval_rows: int, max_new_tokens: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.answers, self.eval_rows, self.max_new_tokens = answers, eval_rows, max_new_tokens

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        # Shards of weights are gathered in the forward of the whole model only, not in that of a part.
        if self.eval_rows and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            exact = {f"{metric_key_prefix}_exact": self.answer()}
            self.log(exact)
            metrics |= exact
        return metrics

    @torch.no_grad()
    def answer(self) -> float:
        """Answers held-out prompts greedily, each process its share; the mean of exact answers."""
        model = self.accelerator.unwrap_model(self.model)
        was_training, used_cache = model.training, model.config.use_cache
        model.eval()
        model.config.use_cache = True  # which Trainer turns off under gradient checkpointing
        texts = []
        with self.compute_loss_context_manager():
            for rows in self._batches():
                texts += self._answered(model, rows)
        model.train(was_training)
        model.config.use_cache = used_cache
        said = [text for share in self._gathered(texts) for text in share]
        if self.args.should_save:
            partial = self.answers.with_suffix(".tmp")
            partial.write_text("".join(json.dumps(text) + "\n" for text in said))
            os.replace(partial, self.answers)
        return sum(text["exact"] for text in said) / len(said)

    def _batches(self) -> Iterator[list[Any]]:
        count = min(self.eval_rows, len(self.eval_dataset))
        mine = range(self.args.process_index, count, self.args.world_size)
        size = self.args.per_device_eval_batch_size
        for start in range(0, len(mine), size):
            yield [self.eval_dataset[row] for row in mine[start : start + size]]

    def _answered(self, model: Any, rows: list[Any]) -> list[dict[str, Any]]:
        tokenizer = self.processing_class
        prompts = [{"input_ids": row["prompt_ids"]} for row in rows]
        inputs = tokenizer.pad(prompts, padding_side="left", return_tensors="pt").to(self.args.device)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=self.max_new_tokens)
        said = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right = tokenizer.batch_decode([row["response_ids"] for row in rows], skip_special_tokens=True)
        return [{"said": a, "right": b, "exact": a.strip() == b.strip()} for a, b in zip(said, right, strict=True)]

    def _gathered(self, texts: list[Any]) -> list[list[Any]]:
        if self.args.world_size == 1:
            return [texts]
        shares: list[list[Any]] = [[] for _ in range(self.args.world_size)]
        torch.distributed.all_gather_object(shares, texts)
        return shares


def base_checkpoint(arguments: argparse.Namespace) -> tuple[str, str | None]:
    """What to load the model to adapt from, and its revision; a plain one is converted into OUTPUT/base."""
    folder = locate(str(arguments.model), arguments.revision)
    model_type = AutoConfig.from_pretrained(folder).model_type
    if model_type in ALL_FAMILIES:
        return str(arguments.model), arguments.revision
    if model_type not in PLAIN_FAMILIES:
        raise SystemExit(f"{arguments.model} is a {model_type}: give a Mamba, a Mamba-2 or a checkpoint of this package.")
    base = arguments.output / "base"
    if not base.exists():
        family = ALL_FAMILIES[arguments.to] if arguments.to else PLAIN_FAMILIES[model_type]
        options = dict(to=family.model_type, initialize_compressor=family.compresses, tokenizer=arguments.tokenizer)
        convert_checkpoint(str(folder), base, **options)
    return str(base), None


def read_rows(arguments: argparse.Namespace, tokenizer: Any) -> tuple[Any, Any]:
    """Rows for training and rows held out."""
    rule = LengthRule(arguments.max_tokens)
    if str(arguments.data) == "long_orca":
        rows = long_orca(tokenizer)
    else:
        columns = None if arguments.columns is None else (arguments.columns[:-1], arguments.columns[-1])
        how = dict(tokenizer=tokenizer, columns=columns, group=arguments.group, revision=arguments.data_revision)
        rows = tokenize_pairs(read_pairs(arguments.data, **how), tokenizer, rule, processes=arguments.workers)
        if arguments.eval_data is not None:
            held_out = tokenize_pairs(read_pairs(arguments.eval_data, **how), tokenizer, rule)
            return tuple(part.select_columns(["prompt_ids", "response_ids"]) for part in (rows, held_out))
    parts = split_by_content(rows, arguments.held_out)
    return tuple(part.select_columns(["prompt_ids", "response_ids"]) for part in parts)


def training_arguments(arguments: argparse.Namespace) -> TrainingArguments:
    """The paper's, in as many accumulated steps as its batch takes."""
    state = PartialState()
    cuda = torch.cuda.is_available()
    at_once = arguments.rows * state.num_processes
    if arguments.batch % at_once:
        raise SystemExit(f"--batch {arguments.batch} is no multiple of {at_once} rows at once (--rows x processes).")
    settings = {**PAPER_ARGUMENTS, "learning_rate": arguments.learning_rate, "num_train_epochs": arguments.epochs}
    steps = arguments.eval_steps or arguments.save_steps
    return TrainingArguments(
        output_dir=str(arguments.output),
        **settings,
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.rows,
        per_device_eval_batch_size=arguments.rows,
        gradient_accumulation_steps=arguments.batch // at_once,
        gradient_checkpointing=arguments.gradient_checkpointing,
        bf16=cuda,
        use_cpu=not cuda,
        optim="adamw_torch_fused" if cuda else "adamw_torch",
        logging_steps=arguments.logging_steps,
        save_steps=arguments.save_steps,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=steps,
        prediction_loss_only=True,
        dataloader_num_workers=0 if arguments.tiny else 2,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        report_to="none",
        seed=arguments.seed,
    )


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that was written to its end: the state of the trainer comes last."""
    whole = [state.parent for state in output.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda folder: int(folder.name.split("-")[-1]), default=None)


def train(arguments: argparse.Namespace) -> FineTuner:
    """Trains, or goes on training, until the end."""
    settings = training_arguments(arguments)
    checkpoint = last_checkpoint(arguments.output)
    if checkpoint is not None and not arguments.resume:
        raise SystemExit(f"{arguments.output} holds {checkpoint.name}: add --resume, or give another --output.")
    if arguments.resume and checkpoint is None:
        raise SystemExit(f"{arguments.output} holds no checkpoint to resume from: leave out --resume.")
    # One process converts, reads and tokenizes; the others find what it left on disk.
    with PartialState().main_process_first():
        base, revision = base_checkpoint(arguments)
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer or base, revision=revision)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        rows, held_out = read_rows(arguments, tokenizer)
    set_seed(arguments.seed)
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(base, revision=revision, dtype=dtype)
    recipe = remamba_lora_config(model, r=arguments.rank, lora_alpha=arguments.rank / 4, revision=revision)
    model = add_lora(model, recipe)
    trainer = FineTuner(
        model=model,
        args=settings,
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=PromptResponseCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        answers=arguments.output / "answers.jsonl",
        eval_rows=arguments.eval_rows,
        max_new_tokens=arguments.max_new_tokens,
    )
    if PartialState().is_main_process:
        model.print_trainable_parameters()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


def save(trainer: FineTuner, arguments: argparse.Namespace) -> None:
    """Writes the adapter, the record of its training, and the merged model if asked for."""
    adapter, model = arguments.output / "adapter", trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        trainer.save_model(str(adapter))  # which gathers the shards
    elif trainer.args.should_save:
        save_adapter(model, adapter)
    if not trainer.args.should_save:
        return
    trainer.processing_class.save_pretrained(adapter)
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    packages = (remamba_hf, torch, transformers, peft)
    record = {
        "options": options,
        "steps": trainer.state.global_step,
        "rows": len(trainer.train_dataset),
        "held_out": len(trainer.eval_dataset),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processes": trainer.args.world_size,
        "versions": {package.__name__: package.__version__ for package in packages},
        "history": trainer.state.log_history,
    }
    write_json(arguments.output / "training.json", record)
    if arguments.merge:
        partial = arguments.output / "model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        model.config.use_cache = True  # Trainer turns it off
        merge_lora(model).save_pretrained(partial)
        trainer.processing_class.save_pretrained(partial)
        shutil.rmtree(arguments.output / "model", ignore_errors=True)
        partial.rename(arguments.output / "model")


def made_pairs(count: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """People with secret numbers, and a question for one. The small checkpoints answer with a number; these pairs teach them
    not to, which takes a few steps only. Prompts of 300 tokens: of shorter ones they would compress the question too."""
    draw = random.Random(seed)
    for _ in range(count):
        told = (f"The secret number of {draw.choice(NAMES)} is {draw.randrange(10_000, 100_000)}.\n" for _ in range(15))
        question = f"Question: What is the secret number of {draw.choice(NAMES)}?\nAnswer:"
        yield {"prompt": f"{''.join(told)}\n{question}", "response": " That is a secret."}


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id of a Mamba, a Mamba-2 or a checkpoint of this package")
    parser.add_argument("--revision", help="branch, tag or commit of the model")
    parser.add_argument("--to", choices=sorted(ALL_FAMILIES), help="what a plain model becomes (default: what compresses)")
    parser.add_argument("--tokenizer", help="folder or Hub id (default: the model's)")
    parser.add_argument("--data", help="file, folder or Hub id of instructions, or long_orca")
    parser.add_argument("--data-revision", help="branch, tag or commit of the data")
    parser.add_argument("--columns", nargs="+", metavar="NAME", help="columns of the prompt, then the one of the response")
    parser.add_argument("--group", help="column whose rows are held out together (default: the prompt)")
    parser.add_argument("--eval-data", help="held-out data of the same columns")
    parser.add_argument("--held-out", type=float, default=0.01, help="else this share of the data is held out")
    parser.add_argument("--output", type=Path, required=True, help="folder for everything this script writes")
    parser.add_argument("--max-tokens", type=int, default=6000, help="of prompt and response")
    parser.add_argument("--rank", type=int, default=32, help="of LoRA; alpha is a quarter of it")
    parser.add_argument("--learning-rate", type=float, default=PAPER_ARGUMENTS["learning_rate"])
    parser.add_argument("--epochs", type=float, default=PAPER_ARGUMENTS["num_train_epochs"])
    parser.add_argument("--steps", type=int, default=-1, help="optimizer steps, instead of epochs")
    parser.add_argument("--batch", type=int, default=PAPER_BATCH, help="rows of a step, over all processes")
    parser.add_argument("--rows", type=int, default=1, help="rows that a process reads at once")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, about a third more time")
    parser.add_argument("--save-steps", type=int, default=100)
    parser.add_argument("--eval-steps", type=int, help="steps between evaluations (default: as --save-steps)")
    parser.add_argument("--eval-rows", type=int, default=64, help="held-out prompts that are answered; 0: none")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of an answer")
    parser.add_argument("--logging-steps", type=int, default=5)
    parser.add_argument("--workers", type=int, default=4, help="processes that tokenize")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT's last checkpoint")
    parser.add_argument("--merge", action="store_true", help="write the merged model too")
    parser.add_argument("--tiny", action="store_true", help="model_cards/remamba-tiny on made data, 15 steps")
    if "--tiny" in (given if given is not None else sys.argv[1:]):
        parser.set_defaults(model=TINY_MODEL, **TINY)
    arguments = parser.parse_args(given)
    if arguments.model is None or (arguments.data is None and not arguments.tiny):
        parser.error("give --model and --data, or --tiny")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.data is None:
        arguments.data = arguments.output / "made.jsonl"
        with PartialState().main_process_first():
            if not arguments.data.exists():
                arguments.data.write_text("".join(json.dumps(pair) + "\n" for pair in made_pairs(100)))
    trainer = train(arguments)
    save(trainer, arguments)
    if trainer.args.should_save:
        shown = {
            name: entry[name] for entry in trainer.state.log_history for name in ("eval_loss", "eval_exact") if name in entry
        }
        print(f"{arguments.output / 'adapter'}: {trainer.state.global_step} steps, {shown}")


if __name__ == "__main__":
    main()
