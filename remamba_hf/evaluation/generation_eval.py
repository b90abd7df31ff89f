# SPDX-License-Identifier: Apache-2.0
"""Asks a model the samples of a task, and goes on from what it has been asked before.

Any causal language model can be asked, given a tokenizer; prompt_reader.py says how it reads and answers. Beside the results
`RESULTS.json` there are a table, `RESULTS.md`, and all answers as they came (answers_file.py).
"""

import gc
import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from remamba_hf.training.book_tokens import write_json

from .answers_file import AnswersFile, Record, merge, read_answers
from .causal_models import Checkpoint, load_causal_model
from .checkpoints import default_chunk_length, environment
from .prompt_reader import Prompt, Reader, encode_samples, plan_batches
from .reporting import check_same_settings, read_existing, utc_now
from .tasks import Answered, Sample, Task

MAX_LENGTH = 5500  # tokens of a prompt; the ReMamba paper's (arXiv 2408.15496, section 4)


@dataclass(frozen=True)
class GenerationSettings:
    """How a model is asked.

    Attributes:
        max_length: tokens of a prompt, without the answer.
        dtype: of the weights.
        compression: arguments of `generate` for a model that compresses prompts.
        batch_size: prompts read at once; changes no answer but by rounding, like the next.
        prefill_chunk_length: tokens of a prompt read at once by this package's models; None: 16384, on the CPU 4096.
    """

    max_length: int = MAX_LENGTH
    dtype: str = "float32"
    compression: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 1
    prefill_chunk_length: int | None = None


@dataclass(frozen=True)
class Processes:
    """Those that share out the samples: this one's number, how many there are, and how to wait for all of them."""

    rank: int = 0
    count: int = 1
    device: str | None = None
    wait: Callable[[], Any] = lambda: None
    end: Callable[[], Any] = lambda: None


def launched_processes(device: str | None) -> Processes:
    """What `accelerate launch` or `torchrun` started; this process alone without them.

    Args:
        device: as asked for; a GPU becomes the one of this process.

    Raises:
        ValueError: accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(device=device)
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ValueError("several processes need accelerate: pip install accelerate") from error
    on_cpu = not torch.cuda.is_available() if device is None else device == "cpu"
    # The first to end waits for the last, and nobody knows how long that takes.
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=30))
    return Processes(
        state.process_index, state.num_processes, str(state.device), state.wait_for_everyone, state.destroy_process_group
    )


def check_length(checkpoint: Checkpoint, samples: Sequence[Sample], max_length: int) -> None:
    """Raises a ValueError if prompts and answers do not fit into the positions that a model has."""
    if max_length < 2:
        raise ValueError("--max-length must be at least 2: half of it is kept of either end of a prompt")
    longest = max((sample.max_new_tokens for sample in samples), default=0)
    if checkpoint.positions is not None and max_length + longest > checkpoint.positions:
        room = checkpoint.positions - longest
        advice = f"give --max-length {room} or less" if room > 1 else "it is too short for this benchmark"
        raise ValueError(
            f"{checkpoint.name} has {checkpoint.positions} positions (max_position_embeddings), but prompts of "
            f"{max_length} tokens with answers of up to {longest} need {max_length + longest}: {advice}"
        )


def results_path(output: Path) -> Path:
    """The JSON file of an output that may be named without its ending."""
    return output if output.suffix == ".json" else output.with_name(f"{output.name}.json")


def digest_of_samples(samples: Sequence[Sample]) -> str:
    """SHA-256 by which a run knows its questions again, wherever they were read from."""
    hashed = hashlib.sha256()
    for sample in samples:
        hashed.update(json.dumps(asdict(sample), sort_keys=True).encode() + b"\n")
    return hashed.hexdigest()


def run_settings(
    task: Task, samples: Sequence[Sample], checkpoint: Checkpoint, tokenizer_digest: str, settings: GenerationSettings
) -> dict[str, Any]:
    """What answers depend on, as JSON values: a run goes on from answers of the same alone."""
    return {
        "task": task.name,
        "samples": {"count": len(samples), "sha256": digest_of_samples(samples)},
        "model": checkpoint.identity(),
        "tokenizer": {"sha256": tokenizer_digest},
        "dtype": settings.dtype,
        "max_length": settings.max_length,
        "truncation": "middle",
        "decoding": "greedy",
        "compression": _effective_compression(checkpoint, settings.compression),
    }


def _effective_compression(checkpoint: Checkpoint, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """What holds for a model that compresses prompts; None for others."""
    if not checkpoint.compresses or given.get("compress_prompt") is False:
        return None
    names = ("compression_start", "compression_span", "compression_ratio", "compression_max_kept", "compression_min_prompt")
    own = {name: getattr(checkpoint.config, name) for name in names}
    if "compression_ratio" in given:
        own["compression_max_kept"] = None  # bounds the checkpoint's own ratio only
    return {**own, **given}


def evaluate(
    task: Task,
    samples: Sequence[Sample],
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_digest: str,
    settings: GenerationSettings,
    output: Path,
    device: str,
    about: Mapping[str, Any] | None = None,
    processes: Processes | None = None,
) -> dict[str, Any] | None:
    """Asks all samples that have no answer yet, scores all answers, and writes results and table.

    Args:
        task: which scores.
        samples: of the task, in its order.
        checkpoint, tokenizer, tokenizer_digest: the model, loaded only if there is something to ask.
        settings: how to ask.
        output: JSON file, of which the other files have their names.
        device: of this process.
        about: goes into the results as it is.
        processes: those that share out the samples.

    Returns:
        The content of the file; None in processes but the first.

    Raises:
        ValueError: files of other settings, prompts that the model cannot read.
    """
    processes = processes or Processes()
    header = run_settings(task, samples, checkpoint, tokenizer_digest, settings)
    finished = _finished(output, header)
    if finished is not None:
        return finished if processes.rank == 0 else None
    check_length(checkpoint, samples, settings.max_length)
    answers, _ = read_answers(output, header)
    # Nobody writes before all have read: they take what is left by turns, so all must see the same left.
    processes.wait()
    started = time.perf_counter()
    if len(answers) < len(samples):
        quiet = processes.rank > 0
        batches = plan_batches(encode_samples(samples, tokenizer, settings.max_length, quiet), settings.batch_size)
        # A batch is asked whole if any of it is missing: its answers are then those of a run without a break.
        left = [batch for batch in batches if any(prompt.sample.identity not in answers for prompt in batch)]
        _check_batches(checkpoint, batches)
        mine = left[processes.rank :: processes.count]
        if mine:
            reader = _load_reader(checkpoint, tokenizer, settings, device)
            with AnswersFile(output, header, environment(device), processes.rank) as file:
                _answer_all(reader, mine, answers, settings.batch_size, file, len(samples), quiet)
    processes.wait()
    if processes.rank > 0:
        return None
    run = {
        "seconds": round(time.perf_counter() - started, 1),
        "answered": len(samples) - len(answers),
        "processes": processes.count,
        "batch_size": settings.batch_size,
    }
    return _finish(task, samples, checkpoint.name, header, run, about or {}, output)


def _finished(output: Path, header: Mapping[str, Any]) -> dict[str, Any] | None:
    """The results, if they are there."""
    results = read_existing(output)
    if results is None:
        return None
    check_same_settings(output, results.get("settings") if isinstance(results, dict) else None, header)
    return {**results, "was_finished": True}


def _check_batches(checkpoint: Checkpoint, batches: Sequence[Sequence[Prompt]]) -> None:
    """Raises a ValueError for prompts that came out longer than planned: cut texts may have other tokens at the cut."""
    for prompt in (prompt for batch in batches for prompt in batch):
        needed = len(prompt.ids) + prompt.sample.max_new_tokens
        if checkpoint.positions is not None and needed > checkpoint.positions:
            raise ValueError(
                f"sample {prompt.sample.identity} and its answer need {needed} positions, but {checkpoint.name} has "
                f"{checkpoint.positions}: give a --max-length that is {needed - checkpoint.positions} or more less"
            )


def _load_reader(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, settings: GenerationSettings, device: str
) -> Reader:
    options: dict[str, Any] = dict(settings.compression)
    if checkpoint.of_this_package:
        options["prefill_chunk_length"] = settings.prefill_chunk_length or default_chunk_length(device)
    return Reader(load_causal_model(checkpoint, device, settings.dtype), tokenizer, options)


def _answer_all(
    reader: Reader,
    batches: Sequence[list[Prompt]],
    answers: Mapping[str, Record],
    batch_size: int,
    file: AnswersFile,
    samples: int,
    quiet: bool,
) -> None:
    """Asks batch by batch, and writes every answer that is not among `answers`."""
    tokens, started = 0, time.perf_counter()
    total = sum(prompt.sample.identity not in answers for batch in batches for prompt in batch)
    with tqdm(total=total, desc="answers", unit="sample", disable=quiet) as progress:
        try:
            for records in _answered(reader, batches, batch_size):
                for record in records:
                    tokens += record["prompt_tokens"] + record["new_tokens"]
                    if record["identity"] not in answers:
                        file.append(record)
                        progress.update()
                progress.set_postfix_str(f"{tokens / (time.perf_counter() - started):,.0f} tokens/s")
        except KeyboardInterrupt:
            if not quiet:
                progress.close()
                print("All answers so far are kept: the same command goes on from them.", file=sys.stderr)
            raise


def _answered(reader: Reader, batches: Sequence[list[Prompt]], batch_size: int) -> Iterator[list[Record]]:
    """Answers batches in their order, in parts where they are too large for the GPU."""
    for batch in batches:
        first = 0
        while first < len(batch):
            part = batch[first : first + batch_size]
            records = _answer_if_it_fits(reader, part)
            if records is None:
                if len(part) == 1:
                    raise ValueError(
                        f"a prompt of {len(part[0].ids)} tokens does not fit into the GPU's memory: give a shorter "
                        "--max-length or --prefill-chunk-length, or another --dtype"
                    )
                batch_size = len(part) // 2
                warnings.warn(f"out of GPU memory: going on with batches of {batch_size}", RuntimeWarning, stacklevel=2)
                continue
            yield records
            first += len(part)


def _answer_if_it_fits(reader: Reader, prompts: Sequence[Prompt]) -> list[Record] | None:
    try:
        return reader.answer(prompts)
    except torch.OutOfMemoryError:
        pass  # its traceback holds the tensors that are in the way: they go where it ends
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _finish(
    task: Task,
    samples: Sequence[Sample],
    name: str,
    header: Mapping[str, Any],
    run: Mapping[str, Any],
    about: Mapping[str, Any],
    output: Path,
) -> dict[str, Any]:
    """Scores all answers and writes everything."""
    answers, environments = read_answers(output, header)
    records = [answers[sample.identity] for sample in samples]
    merge(output, header, environments, records)
    answered = [
        Answered(sample, record["answer"], task.score(sample, record["answer"]))
        for sample, record in zip(samples, tqdm(records, desc="scoring", unit="sample", leave=False), strict=True)
    ]
    results = {
        "model": name,
        "date": utc_now(),
        "settings": dict(header),
        "summary": task.summary(answered),
        "truncated": sum(record["whole_tokens"] > header["max_length"] for record in records),
        **about,
        "environments": environments,
        "run": dict(run),
        "answers": [{**record, "scores": dict(one.scores)} for record, one in zip(records, answered, strict=True)],
    }
    output.with_suffix(".md").write_text(markdown(task, results), encoding="utf-8")
    write_json(output, results)  # last: it says that the run is finished
    return results


def markdown(task: Task, results: Mapping[str, Any]) -> str:
    """The table of one run, with the settings that it was made with."""
    settings = results["settings"]
    compression = settings["compression"]
    reading = (
        ""
        if compression is None
        else ", compressed: "
        + ", ".join(
            f"{setting.removeprefix('compression_')} {value}" for setting, value in compression.items() if value is not None
        )
    )
    return (
        f"{task.table({results['model']: results['summary']})}\n"
        f"{settings['samples']['count']} samples; prompts of at most {settings['max_length']} tokens, the middle left out "
        f"of {results['truncated']}{reading}; greedy answers, {settings['dtype']}.\n"
    )
