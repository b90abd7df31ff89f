# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes a model on instructions with LoRA, as the ReMamba paper does, with `transformers.Trainer`.

    python examples/finetune_lora.py --tiny --output RUN                                     # a CPU, under a minute
    python examples/finetune_lora.py --model state-spaces/mamba-130m-hf --data train.jsonl --output RUN
    python examples/finetune_lora.py --model state-spaces/mamba-2.8b-hf --data long_orca --output RUN
    accelerate launch --config_file examples/accelerate/ddp.yaml --num_processes 8 examples/finetune_lora.py ...

The last is the same on eight GPUs: steps of --batch rows, the same ones, however many processes. `fsdp2.yaml` and
`zero3.yaml` beside it share out the weights too, `zero2.yaml` gradients and the optimizer's state.

A plain Mamba or Mamba-2 becomes a ReMamba or ReMamba-2 first, its compressor started as the paper does (`RUN/base`).
DATA is a file or folder of .jsonl, .jsonl.gz or .parquet, or a Hub id: prompt and response (other names: --columns),
messages for the tokenizer's chat template, or `long_orca`. RUN receives checkpoints that --resume takes up, `adapter/`,
`answers.jsonl` (what the model says to held-out prompts), `training.json` (losses, tokens a second without pads, each GPU's
peak memory), and with --merge the merged `model/`.

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
from datetime import timedelta
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import remamba_hf
from remamba_hf.checkpoint_files import locate
from remamba_hf.conversion import convert_checkpoint
from remamba_hf.families import ALL_FAMILIES, PLAIN_FAMILIES
from remamba_hf.training import PromptResponseCollator
from remamba_hf.training.book_tokens import write_json
from remamba_hf.training.instruction_data import LengthRule, read_pairs, split_by_content, tokenize_pairs
from remamba_hf.training.instruction_trainer import InstructionTrainer
from remamba_hf.training.long_orca import long_orca
from remamba_hf.training.lora import (
    PAPER_ARGUMENTS,
    PAPER_BATCH,
    add_lora,
    merge_lora,
    remamba_lora_config,
    save_adapter,
)
from remamba_hf.training.quantised import quantization_config
from remamba_hf.training.sharded_weights import trained_weights
from remamba_hf.training.throughput import Throughput

STREAM_BUFFER = 1000  # rows of a stream among which the next one is drawn
TINY_MODEL = Path(__file__).parent.parent / "model_cards" / "remamba-tiny"
TINY = dict(
    steps=15, batch=4, rows=4, max_tokens=512, rank=32, learning_rate=6e-3, eval_rows=8, max_new_tokens=8, held_out=0.1
)
NAMES = ("Ada", "Ben", "Cora", "Dan", "Eve", "Finn", "Greta", "Hugo", "Ida", "Jon")


def processes() -> PartialState:
    """This process among those of the launch. LongOrca takes one of them longer than the ten minutes for which torch would
    let the others wait."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=6))


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
        rows, held_out = split_by_content(long_orca(tokenizer), arguments.held_out)
    else:
        columns = None if arguments.columns is None else (arguments.columns[:-1], arguments.columns[-1])
        how = dict(tokenizer=tokenizer, columns=columns, group=arguments.group, revision=arguments.data_revision)
        rows = tokenize_pairs(
            read_pairs(arguments.data, streaming=arguments.stream, **how), tokenizer, rule, processes=arguments.workers
        )
        if arguments.eval_data is None:
            rows, held_out = split_by_content(rows, arguments.held_out)
        else:
            held_out = tokenize_pairs(read_pairs(arguments.eval_data, **how), tokenizer, rule)
    names = ["prompt_ids", "response_ids"]
    rows, held_out = rows.select_columns(names), held_out.select_columns(names)
    if arguments.stream:
        if next(iter(rows), None) is None:
            raise SystemExit(f"{arguments.data} has no pairs that fit --max-tokens {arguments.max_tokens}.")
        # Without an end there is one epoch, of which Trainer knows how to skip what was read before a resumption.
        rows = rows.shuffle(seed=arguments.seed, buffer_size=STREAM_BUFFER).repeat(None)
    return rows, held_out


def training_arguments(arguments: argparse.Namespace) -> TrainingArguments:
    """The paper's, in as many accumulated steps as its batch takes."""
    cuda = torch.cuda.is_available()
    at_once = arguments.rows * processes().num_processes
    if arguments.batch % at_once:
        raise SystemExit(f"--batch {arguments.batch} is no multiple of {at_once} rows at once (--rows x processes).")
    steps = arguments.eval_steps or arguments.save_steps
    settings = TrainingArguments(
        output_dir=str(arguments.output),
        **PAPER_ARGUMENTS | {"learning_rate": arguments.learning_rate, "num_train_epochs": arguments.epochs},
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.rows,
        per_device_eval_batch_size=arguments.rows,
        gradient_accumulation_steps=arguments.batch // at_once,
        gradient_checkpointing=arguments.gradient_checkpointing,
        use_cpu=not cuda,
        optim="adamw_torch_fused" if cuda else "adamw_torch",
        logging_steps=arguments.logging_steps,
        save_steps=arguments.save_steps,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=steps,
        prediction_loss_only=True,
        include_num_input_tokens_seen="non_padding",
        dataloader_num_workers=0 if arguments.tiny else 1 if arguments.stream else 2,
        # Else one process would read a stream for all of them, and join batches of different lengths.
        accelerator_config={"dispatch_batches": False},
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        report_to="none",
        seed=arguments.seed,
    )
    if settings.n_gpu > 1:  # among which Trainer would split each batch
        raise SystemExit(f"One process sees {settings.n_gpu} GPUs: use accelerate launch, or set CUDA_VISIBLE_DEVICES=0.")
    return settings


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that was written to its end: the state of the trainer comes last."""
    whole = [state.parent for state in output.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda folder: int(folder.name.split("-")[-1]), default=None)


def adapted(arguments: argparse.Namespace, base: str, revision: str | None) -> peft.PeftModel:
    """The model as it is before training; what is trained is float32."""
    dtype = getattr(torch, arguments.dtype)
    codes = None if arguments.bits is None else quantization_config(arguments.bits, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(base, revision=revision, dtype=dtype, quantization_config=codes)
    return add_lora(model, remamba_lora_config(model, r=arguments.rank, lora_alpha=arguments.rank / 4, revision=revision))


def train(arguments: argparse.Namespace) -> InstructionTrainer:
    """Trains, or goes on training, until the end."""
    settings = training_arguments(arguments)
    checkpoint = last_checkpoint(arguments.output)
    if checkpoint is not None and not arguments.resume:
        raise SystemExit(f"{arguments.output} holds {checkpoint.name}: add --resume, or give another --output.")
    if arguments.resume and checkpoint is None:
        raise SystemExit(f"{arguments.output} holds no checkpoint to resume from: leave out --resume.")
    # One process converts, reads and tokenizes; the others find what it left on disk.
    with processes().main_process_first():
        base, revision = base_checkpoint(arguments)
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer or base, revision=revision)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        try:
            rows, held_out = read_rows(arguments, tokenizer)
        except (FileNotFoundError, ValueError) as error:
            raise SystemExit(str(error)) from error
    set_seed(arguments.seed)
    model = adapted(arguments, base, revision)
    trainer = InstructionTrainer(
        model=model,
        args=settings,
        train_dataset=rows,
        eval_dataset=held_out,
        # With a seed of its own a row is compressed alike in whatever process or resumed run it is read.
        data_collator=PromptResponseCollator(tokenizer.pad_token_id, seed=arguments.seed),
        processing_class=tokenizer,
        callbacks=[Throughput()],
        answers=arguments.output / "answers.jsonl",
        eval_rows=arguments.eval_rows,
        max_new_tokens=arguments.max_new_tokens,
        group_by_length=arguments.group_by_length,
        autocast=arguments.dtype == "bfloat16",
    )
    if processes().is_main_process:
        model.print_trainable_parameters()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


def record_of(trainer: InstructionTrainer, arguments: argparse.Namespace) -> dict[str, Any]:
    """What was trained with what, and how fast. Every process has to call this."""
    cuda = torch.cuda.is_available()
    [throughput] = (callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Throughput))
    peaks = gather_object([(throughput.step_peak_bytes, throughput.peak_bytes)])
    return {
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()},
        "steps": trainer.state.global_step,
        "rows": None if arguments.stream else len(trainer.train_dataset),
        "held_out": len(trainer.eval_dataset),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "processes": trainer.args.world_size,
        "launch": trainer.accelerator.distributed_type.value,
        "tokens_per_second": throughput.tokens_per_second,
        # By process: of training steps, and of all, where evaluations gather weights that are shared out.
        "step_peak_bytes": [step for step, _ in peaks] if cuda else None,
        "peak_bytes": [whole for _, whole in peaks] if cuda else None,
        "versions": {package.__name__: package.__version__ for package in (remamba_hf, torch, transformers, peft)},
        # Without the last entry's train_loss and speed: of a resumed run they are of the rest alone, but by all steps.
        "history": [entry for entry in trainer.state.log_history if "train_loss" not in entry],
    }


def save(trainer: InstructionTrainer, arguments: argparse.Namespace) -> None:
    """Writes the adapter, the record of its training, and the merged model if asked for."""
    record, weights = record_of(trainer, arguments), trained_weights(trainer.model_wrapped)
    if not trainer.args.should_save:
        return
    # A model of its own, for shards and the wrappers of a launch can be neither saved nor merged.
    unset_hf_deepspeed_config()  # or it would be loaded as shards of processes that are no longer here
    model = adapted(arguments, *base_checkpoint(arguments))
    model.load_state_dict(weights, strict=False)
    adapter = arguments.output / "adapter"
    save_adapter(model, adapter)
    trainer.processing_class.save_pretrained(adapter)
    write_json(arguments.output / "training.json", record)
    if arguments.merge:
        partial = arguments.output / "model.partial"
        shutil.rmtree(partial, ignore_errors=True)
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
    default = "bfloat16" if torch.cuda.is_available() else "float32"
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default=default, help="of what is not trained (%(default)s)"
    )
    parser.add_argument("--bits", type=int, choices=(4, 8), help="QLoRA: quantise in_proj and out_proj (bitsandbytes)")
    parser.add_argument("--rank", type=int, default=32, help="of LoRA; alpha is a quarter of it")
    parser.add_argument("--learning-rate", type=float, default=PAPER_ARGUMENTS["learning_rate"])
    parser.add_argument("--epochs", type=float, default=PAPER_ARGUMENTS["num_train_epochs"])
    parser.add_argument("--steps", type=int, default=-1, help="optimizer steps, instead of epochs")
    parser.add_argument("--batch", type=int, default=PAPER_BATCH, help="rows of a step, over all processes")
    parser.add_argument("--rows", type=int, default=1, help="rows that a process reads at once")
    parser.add_argument("--group-by-length", action="store_true", help="rows of like length in a step: fewer pads")
    parser.add_argument("--stream", action="store_true", help="read the data as it is needed; takes --steps and --eval-data")
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
    streams_whole = arguments.steps < 1 or arguments.eval_data is None or arguments.data == "long_orca"
    if arguments.stream and (streams_whole or arguments.group_by_length):
        parser.error("--stream needs --steps, --eval-data and --data other than long_orca; it cannot --group-by-length")
    if arguments.bits and arguments.merge:
        parser.error("a base of few bits takes no adapter in: leave out --merge, and merge into the base as it was")
    if arguments.bits and any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED")):
        parser.error("FSDP and DeepSpeed cannot share out a base of few bits: use examples/accelerate/ddp.yaml")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.data is None:
        arguments.data = arguments.output / "made.jsonl"
        with processes().main_process_first():
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
