# SPDX-License-Identifier: Apache-2.0
"""The tasks of `remamba eval`. What a task needs is imported when it runs.

A benchmark whose answers are generated (tasks.py) joins as a `_benchmark`, a module with a command line of its own as a
`_module`.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remamba_hf.command_options import add_compression_settings, compression_settings, flag, positive

DTYPES = ("auto", "float32", "bfloat16", "float16")
_DATA_SUFFIXES = (".json", ".jsonl", ".zip", ".parquet")


@dataclass(frozen=True)
class Command:
    """A task. help: one line; run: takes the arguments behind its name, and what stands before them."""

    help: str
    run: Callable[[Sequence[str], str], None]


def _benchmark(module: str, name: str, help: str) -> Command:
    def run(arguments: Sequence[str], program: str) -> None:
        kind = getattr(importlib.import_module(f"remamba_hf.evaluation.{module}"), name)
        _run_benchmark(kind, arguments, program, help)

    return Command(help, run)


def _module(module: str, help: str, **fixed: Any) -> Command:
    def run(arguments: Sequence[str], program: str) -> None:
        importlib.import_module(f"remamba_hf.evaluation.{module}").main(arguments, program=program, **fixed)

    return Command(help, run)


COMMANDS = {
    "longbench_e": _benchmark("longbench", "LongBench", "LongBench-E: 13 English tasks over long texts"),
    "leval": _benchmark("leval", "LEval", "L-Eval's closed-ended tasks: exams over long documents"),
    "longeval": _benchmark("longeval", "LongEvalLines", "LongEval's line retrieval: the number of one of many lines"),
    "pairs": _benchmark("pairs", "Pairs", "held-out prompts with responses of your own: ROUGE-L and exact match"),
    "passkey": _module("memory", "a number planted in books, by length and depth", parts=["passkey"]),
    "documents": _module("memory", "a number in one of many numbered documents", parts=["documents"]),
    "perplexity": _module("memory", "perplexity of books by length of context", parts=["perplexity"]),
    "recall": _module("recall", "a number planted in books, with and without compression"),
    "fidelity": _module("fidelity", "what states still tell of tokens and layers (ETMF, ECLMF)"),
    "speed": _module("speed", "seconds and memory by length and batch"),
    "lm_eval": _module("lm_eval_model", "EleutherAI's harness: its tasks behind compressed prompts"),
    "compare": _module("compare", "one picture and table of several models' results"),
}


def _run_benchmark(kind: Callable[..., Any], arguments: Sequence[str], program: str, description: str) -> None:
    parser = _parser(program, description, hasattr(kind, "predictions"))
    options = parser.parse_args(arguments)
    task = kind(options.tasks) if options.tasks else kind()
    if options.predictions is not None:
        _score_predictions(task, options, parser)
        return
    if options.data is not None and not options.data.exists():
        raise FileNotFoundError(f"there is no {options.data}: give --data the folder with the benchmark's files")
    whole = task.samples(options.data)
    if not whole:
        raise ValueError(f"{options.data or 'the Hub'} has no sample of {task.name}")
    samples = _limited(whole, options.limit)
    _evaluate(task, samples, options, limit=None if len(samples) == len(whole) else options.limit)


def _parser(program: str, description: str, has_predictions: bool) -> argparse.ArgumentParser:
    from .generation_eval import MAX_LENGTH

    parser = argparse.ArgumentParser(
        prog=program,
        description=f"{description}. Answers are kept as they come: the same command goes on after an interruption. Several "
        "GPUs: accelerate launch --multi_gpu -m remamba_hf.cli eval TASK ...; several processes on a CPU: torchrun "
        "--nproc_per_node N -m remamba_hf.cli eval TASK ... --device cpu (accelerate launch --cpu starts one only).",
    )
    answering = parser.add_mutually_exclusive_group(required=True)
    answering.add_argument("--model", metavar="MODEL", help="folder or Hub id of any causal language model")
    parser.set_defaults(predictions=None)
    if has_predictions:
        answering.add_argument(
            "--predictions",
            type=Path,
            metavar="FOLDER",
            help="instead of a model: score the answers in FOLDER/NAME_e.jsonl or NAME.jsonl, lines with pred, answers, "
            "length and all_classes as the benchmark's own scripts write them",
        )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of MODEL on the Hub")
    parser.add_argument("--tokenizer", metavar="TOKENIZER", help="folder or Hub id; default: MODEL's")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with the benchmark's files; default: the Hub")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="some of the benchmark's tasks; default: all")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="results (JSON); beside it answers and table; default: TASK-MODEL.json"
    )
    parser.add_argument(
        "--max-length",
        type=positive,
        default=MAX_LENGTH,
        metavar="N",
        help="tokens of a prompt: longer ones lose their middle (default: %(default)s, the ReMamba paper's)",
    )
    parser.add_argument("--batch-size", type=positive, default=1, metavar="B", help="prompts at a time (default: 1)")
    parser.add_argument("--limit", type=positive, metavar="N", help="ask N samples only, evenly over the benchmark")
    parser.add_argument(
        "--compress",
        "--compression",
        action=argparse.BooleanOptionalAction,
        help="compress prompts or read them as plain Mamba does (default: as the model does)",
    )
    add_compression_settings(parser, "; default: the checkpoint's")
    parser.add_argument(
        "--prefill-chunk-length", type=positive, metavar="N", help="tokens read at a time (default: 16384, CPU 4096)"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default: cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: the checkpoint's, on the CPU float32")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with MODEL")
    return parser


def _score_predictions(task: Any, options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Raises a ValueError for options of a model, which is not asked."""
    from .generation_eval import results_path
    from .predictions import markdown, score_predictions
    from .reporting import check_writable

    used = ("predictions", "tasks", "output")
    given = [name for name, value in vars(options).items() if name not in used and value != parser.get_default(name)]
    if given:
        raise ValueError(f"--predictions are scored as they are: leave out {', '.join(map(flag, given))}")
    if int(os.environ.get("RANK", "0")) > 0:  # there is no work to be shared
        return
    output = results_path(options.output or Path(f"{task.name}-{options.predictions.resolve().name}.json"))
    check_writable(output)
    print(markdown(task, score_predictions(task, options.predictions, output)), end="")
    print(f"results  {output}", file=sys.stderr)


def _limited(samples: list[Any], limit: int | None) -> list[Any]:
    if limit is None or limit >= len(samples):
        return samples
    return [samples[number * len(samples) // limit] for number in range(limit)]


def _evaluate(task: Any, samples: list[Any], options: argparse.Namespace, limit: int | None) -> None:
    """limit: of the samples, if there are more."""
    from remamba_hf.reading import checked_device

    from .causal_models import find_checkpoint, load_tokenizer, resolved_dtype
    from .generation_eval import GenerationSettings, evaluate, launched_processes, markdown, results_path
    from .reporting import check_writable

    checked_device(options.device)
    checkpoint = find_checkpoint(options.model, options.revision, options.trust_remote_code)
    compression = _compression(options, checkpoint)
    tokenizer, digest = load_tokenizer(checkpoint, options.tokenizer)
    output = results_path(options.output or Path(f"{task.name}-{checkpoint.name.replace('/', '--')}.json"))
    check_writable(output)
    processes = launched_processes(options.device)
    device = checked_device(processes.device)
    settings = GenerationSettings(
        max_length=options.max_length,
        dtype=resolved_dtype(checkpoint, device, options.dtype),
        compression=compression,
        batch_size=options.batch_size,
        prefill_chunk_length=options.prefill_chunk_length,
    )
    about = {"tasks": list(getattr(task, "tasks", ())), "data": _files(options.data), "limit": limit}
    results = evaluate(task, samples, checkpoint, tokenizer, digest, settings, output, device, about, processes)
    processes.end()
    if results is None:
        return
    if results.get("was_finished"):
        print(f"{output} is finished: nothing was asked again. Remove it to score its answers anew.", file=sys.stderr)
    print(markdown(task, results), end="")
    print(f"results  {output}", file=sys.stderr)


def _compression(options: argparse.Namespace, checkpoint: Any) -> dict[str, Any]:
    """Arguments of `generate`; raises a ValueError for those that mean nothing."""
    given = compression_settings(options)
    if not checkpoint.compresses and (given or options.compress):
        names = ", ".join([*(["--compress"] if options.compress else []), *map(flag, given)])
        raise ValueError(f"{options.model} compresses no prompts: leave out {names}")
    if options.compress is False and given:
        raise ValueError(f"--no-compress leaves nothing to set: leave out {', '.join(map(flag, given))}")
    if not checkpoint.compresses or options.compress is None:
        return given
    return {"compress_prompt": options.compress, **given}


def _files(data: Path | None) -> dict[str, str] | None:
    """SHA-256 of the files that a benchmark may have been read from, by name; None for the Hub's."""
    from .causal_models import digest_of_file

    if data is None:
        return None
    paths = [data] if data.is_file() else sorted(path for path in data.iterdir() if path.suffix in _DATA_SUFFIXES)
    return {path.name: digest_of_file(path) for path in paths if path.is_file()}
