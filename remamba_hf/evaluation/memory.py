# SPDX-License-Identifier: Apache-2.0
"""How far a model remembers: exact match, perplexity and cost of decoding by length, with tables and plots.

    python -m remamba_hf.evaluation.memory --model MODEL --plain-model PLAIN --books BOOKS --output memory.json --plots DIR

MODEL is a MemMamba, or several, such as one of every seed; any other checkpoint of this package can stand in either place, a
plain Mamba, or any causal language model as a baseline, if they are of one tokenizer. Models that compress prompts are read
without compression; models of other packages read whole prompts, which takes longer and more memory, with the same results.
BOOKS is a folder of .txt books, or a dataset such as deepmind/pg19, and should not be books that the models were trained on.
After arXiv 2510.03279, section 4, there are four parts:

    passkey     a sentence in a book gives a person a number, which is asked for behind 1k to 400k tokens, or a million. With
                `--keys M`, M people have numbers in one text, and each is asked for in a question of its own, put to a copy
                of the state behind the text: the name decides which number is right. `--distractors D` adds people nobody
                asks for. Texts longer than all books together repeat these from the beginning, and their cells have
                `books_repeated`, how often.
    documents   the same in one of 11 to 201 numbered documents of about 200 tokens each
    perplexity  of the last 50 tokens of 10 windows of every book, by the tokens of context before them, as in the paper.
                With `--stride N`, windows follow one another every N tokens and their last N count: every token of a book
                behind the longest context, once. In both, the windows of all lengths end at the same places, so the same
                tokens are scored, and only the context differs; books shorter than the longest are left out.
    decode      bytes of the state, and seconds per token, after 1k and after 64k tokens

The output file is written after every cell, and a run that was cut off goes on behind the last batch that was read. Several
GPUs: accelerate launch --multi_gpu -m remamba_hf.cli eval TASK ..., whose processes take batches by turns: less
--batch-tokens makes more of them.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remamba_hf.command_options import positive
from remamba_hf.training.recall_data import RecallSampler

from .books import Books, add_book_options, joined, open_books
from .causal_models import Checkpoint
from .checkpoints import (
    add_model_options,
    check_positions,
    check_tokenizer,
    default_batch_tokens,
    default_chunk_length,
    describe_checkpoint,
    environment,
    load_model,
    open_checkpoint,
    open_tokenizer,
    reading_family,
    reads_in_chunks,
)
from .generation_eval import Processes
from .memory_report import COLUMNS, draw_plots, markdown_tables
from .memory_tasks import (
    DECODED,
    decoding_cost,
    recall_records,
    repeated,
    rows_at_once,
    strided_ends,
    summarize_losses,
    summarize_records,
    window_ends,
    window_losses,
)
from .reporting import start_or_continue, write_results
from .shared_cells import Cell, check_outputs, launched, measure_cells
from .timing import FEWEST_NEW_TOKENS

PARTS = tuple(COLUMNS)
WINDOWS = 10  # of every book, unless they follow one another
_ROOM_FOR_HEADING, _ROOM_FOR_FACT = 16, 64  # tokens; the latter with its question and answer


@dataclass(frozen=True)
class MemorySettings:
    """What fixes an evaluation.

    Attributes:
        lengths: of the texts of `passkey` with their question, tokens.
        samples: texts per cell of `passkey` and `documents`; their facts' depths are spread evenly.
        keys: people who are asked for in a text of `passkey`.
        distractors: people in every text who are not asked for.
        digits: length of the numbers.
        seed: of the texts.
        document_counts: documents besides the one with the fact.
        document_length: tokens of a document, at most.
        perplexity_lengths: windows, tokens.
        reference_length: the length whose perplexity the others are compared with.
        windows: of every book; with a stride, at most, and 0 for all that there is room for.
        counted: tokens at the end of a window that perplexity is taken over.
        decode_lengths: tokens read before decoding is measured.
        stride: tokens from the end of a window to that of the next, all of which count; None for windows spread evenly over
            the book.
    """

    lengths: tuple[int, ...] = tuple(1024 * n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 400))
    samples: int = 100
    keys: int = 1
    distractors: int = 0
    digits: int = 5
    seed: int = 1_000_000
    document_counts: tuple[int, ...] = (10, 20, 120, 160, 200)
    document_length: int = 200
    perplexity_lengths: tuple[int, ...] = tuple(1024 * n for n in (1, 2, 4, 10, 20, 30, 40, 50, 60))
    reference_length: int = 4096
    windows: int = WINDOWS
    counted: int = 50
    decode_lengths: tuple[int, ...] = (1024, 65_536)
    stride: int | None = None

    def written(self) -> dict[str, Any]:
        """As results have them."""
        values = asdict(self)
        if self.stride is None:
            values.pop("stride")  # files from before there were any go on
        return values


class Work(NamedTuple):
    """How a cell is measured: see `Cell`, whose `enter` gets what `finish` makes of the values."""

    total: int
    at_once: int
    measure: Callable[[range], list[Any]]
    finish: Callable[[list[Any]], dict[str, Any]]


class MemoryEvaluation:
    """The parts of an evaluation on some books, for any model.

    Args:
        tokenizer: of all models.
        books: token ids of each book, as `encode_text` gives them.
        settings: what to measure.
        batch_tokens: tokens read at once, rows times chunk; changes no result but by rounding.
        chunk_length: tokens of a row read at once, likewise.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        books: Sequence[np.ndarray],
        settings: MemorySettings,
        batch_tokens: int,
        chunk_length: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self.batch_tokens = batch_tokens
        self.chunk_length = chunk_length
        self.tokens = joined(books, int(tokenizer.eos_token_id))
        self.sampler = RecallSampler(self.tokens, tokenizer, settings.seed, settings.digits)
        self.long_enough = [number for number, book in enumerate(books) if len(book) >= max(settings.perplexity_lengths)]
        self.long_books = [books[number] for number in self.long_enough]
        self.ends = [self._ends(len(book)) for book in self.long_books]

    def check(self, parts: Sequence[str]) -> None:
        """Raises a ValueError, before any work, on texts that cannot be made of these books."""
        settings = self.settings
        if min(settings.samples, settings.keys, settings.digits) < 1 or settings.windows < (settings.stride is None):
            raise ValueError("samples, keys, digits and windows are counts: give at least 1 of each")
        if min(settings.lengths + settings.perplexity_lengths + settings.decode_lengths) < 1:
            raise ValueError("lengths are numbers of tokens: give at least 1")
        if "passkey" in parts:
            shortest = min(settings.lengths)
            sampler = self._sampler(shortest)
            for number in range(settings.samples):
                sampler.text((shortest, number), shortest, settings.keys, settings.distractors)
        if "documents" in parts:
            fewest = min(settings.document_counts)
            self.sampler.documents((fewest, 0), fewest, settings.distractors, 0.5, settings.document_length)
        if "perplexity" in parts:
            if not self.long_books:
                raise ValueError(
                    f"no book has the {max(settings.perplexity_lengths)} tokens of the longest window: give longer books or "
                    "shorter windows (--lengths; with other parts --perplexity-lengths)"
                )
            if not 1 <= settings.counted < min(settings.perplexity_lengths):
                less = "--counted" if settings.stride is None else "--stride"
                raise ValueError(
                    f"{settings.counted} counted tokens and one before them do not fit into the shortest window, of "
                    f"{min(settings.perplexity_lengths)}: give less {less}, or longer windows"
                )

    def columns(self, part: str) -> tuple[int, ...]:
        """The lengths, or numbers of documents, that a part has cells for."""
        return getattr(self.settings, COLUMNS[part][1])

    def work(self, part: str, model: PreTrainedModel, column: int) -> Work:
        """How one cell of a part is measured."""
        parts: dict[str, Callable[[PreTrainedModel, int], Work]] = {
            "passkey": self._passkey,
            "documents": self._documents,
            "perplexity": self._perplexity,
            "decode": self._decode,
        }
        return parts[part](model, column)

    def _ends(self, book_length: int) -> list[int]:
        longest, settings = max(self.settings.perplexity_lengths), self.settings
        if settings.stride is None:
            return window_ends(book_length, longest, settings.windows)
        return strided_ends(book_length, longest, settings.stride, settings.windows)

    def _sampler(self, length: int) -> RecallSampler:
        """Of texts of so many tokens: where the books have fewer, they are repeated."""
        if length <= len(self.tokens):
            return self.sampler
        tokens = repeated(self.tokens, length)
        return RecallSampler(tokens, self.tokenizer, self.settings.seed, self.settings.digits)

    def _rows(self, model: PreTrainedModel, length: int) -> int:
        chunk_length = self.chunk_length if model is None or reads_in_chunks(model) else length
        return rows_at_once(length, chunk_length, self.batch_tokens)

    def _passkey(self, model: PreTrainedModel, length: int) -> Work:
        settings = self.settings
        sampler = functools.cache(lambda: self._sampler(length))

        def text(number: int) -> Any:
            depths = spread_depths(number, settings.samples, settings.keys)
            return sampler().text((length, number), length, settings.keys, settings.distractors, depths)

        times = round(length / len(self.tokens), 2)
        repeats = {"books_repeated": times} if length > len(self.tokens) else {}
        return self._recall(model, text, self._rows(model, length), repeats)

    def _documents(self, model: PreTrainedModel, noise: int) -> Work:
        settings = self.settings

        def text(number: int) -> Any:
            depth = (number + 0.5) / settings.samples
            return self.sampler.documents((noise, number), noise, settings.distractors, depth, settings.document_length)

        return self._recall(model, text, self._rows(model, (noise + 1) * settings.document_length), {})

    def _recall(self, model: PreTrainedModel, text: Callable[[int], Any], rows: int, about: dict[str, Any]) -> Work:
        def measure(numbers: range) -> list[dict[str, Any]]:
            return recall_records(model, self.tokenizer, text, numbers, self.chunk_length)

        def finish(records: list[dict[str, Any]]) -> dict[str, Any]:
            return {**summarize_records(records), "records": records, **about}

        return Work(self.settings.samples, rows, measure, finish)

    def _perplexity(self, model: PreTrainedModel, length: int) -> Work:
        windows = [(book, end) for book, ends in zip(self.long_books, self.ends, strict=True) for end in ends]

        def measure(numbers: range) -> list[float]:
            read = [windows[number] for number in numbers]
            return window_losses(model, read, length, self.settings.counted, self.chunk_length)

        def finish(losses: list[float]) -> dict[str, Any]:
            taken = iter(losses)
            return summarize_losses([[next(taken) for _ in ends] for ends in self.ends])

        return Work(len(windows), self._rows(model, length), measure, finish)

    def _decode(self, model: PreTrainedModel, length: int) -> Work:
        def measure(numbers: range) -> list[dict[str, Any]]:
            return [decoding_cost(model, self.tokens, length, self.chunk_length)]

        return Work(1, 1, measure, lambda costs: costs[0])


def spread_depths(number: int, samples: int, keys: int) -> list[float]:
    """Depths of the asked facts of text `number` of `samples`: those of one key cover the text evenly over the samples, and
    those of one text stand evenly apart."""
    return [((number + key * samples / keys) % samples + 0.5) / samples % 1 for key in range(keys)]


def evaluate(
    evaluation: MemoryEvaluation,
    models: dict[str, PreTrainedModel],
    parts: Sequence[str],
    output: Path,
    description: dict[str, Any],
    device: str | None = None,
    processes: Processes | None = None,
) -> dict[str, Any]:
    """Fills all cells of some parts, those already in `output` excepted.

    Args:
        evaluation: what to measure.
        models: by the name that cells are written under.
        parts: of `PARTS`.
        output: JSON file, rewritten after every cell.
        description: goes into the file as it is, and must be the same when a run goes on; `models` in it has a `label` for
            each.
        device: of the models, to be named in the file.
        processes: those that share out the work.

    Returns:
        The content of the file; in processes but the first, what it was before.

    Raises:
        ValueError: texts that cannot be made, or `output` holds results of other settings or models.
    """
    evaluation.check(parts)
    header = {"settings": evaluation.settings.written(), "description": description}
    rest = {"environment": environment(device), **{part: [] for part in PARTS}}
    results = start_or_continue(output, header, rest)
    cells = [
        _cell(evaluation, part, name, models[name], column, results)
        for part in parts
        for column in evaluation.columns(part)
        for name in models
        if not any((cell["model"], cell[COLUMNS[part][0]]) == (name, column) for cell in results[part])
    ]
    measure_cells(cells, output, lambda: write_results(output, results), processes)
    return results


def _cell(
    evaluation: MemoryEvaluation, part: str, name: str, model: PreTrainedModel, column: int, results: dict[str, Any]
) -> Cell:
    work = evaluation.work(part, model, column)

    def measure(numbers: range) -> list[Any]:
        try:
            return work.measure(numbers)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{part} at {column} does not fit into the GPU's memory: give less --batch-tokens, a shorter "
                "--chunk-length, or shorter texts. What is finished is kept."
            ) from error

    def enter(values: list[Any]) -> None:
        results[part].append({"model": name, COLUMNS[part][0]: column, **work.finish(values)})

    about = {key: results[key] for key in ("settings", "description")}
    return Cell((part, name, column), work.total, work.at_once, measure, enter, about, alone=part == "decode")


def describe_model(model_type: str, model: PreTrainedModel) -> dict[str, Any]:
    """What names a model in the results, and lets a run know it again.

    Args:
        model_type: of its checkpoint.
    """
    description = describe_checkpoint(model_type, model)
    family = reading_family(model_type)
    if family is not None and family.compresses and family.model_type == model_type:
        description["label"] += ", compression off"
    return description


def names_of(models: Sequence[str], plain_model: str | None) -> dict[str, str]:
    """The checkpoints to compare by the names they go under: `model`, `model_2` and so on, and `plain`."""
    names = {f"model_{number}" if number > 1 else "model": model for number, model in enumerate(models, start=1)}
    return {**names, "plain": plain_model} if plain_model else names


def load_models(checkpoints: dict[str, Checkpoint], device: str, dtype: str = "auto") -> dict[str, PreTrainedModel]:
    """The models to compare, by name."""
    return {name: load_model(found, device, dtype) for name, found in checkpoints.items()}


def check_room(checkpoint: Checkpoint, settings: MemorySettings, parts: Sequence[str]) -> None:
    """Raises a ValueError if a model has fewer positions than a text of one of the parts."""
    documents = (max(settings.document_counts) + 1) * (settings.document_length + _ROOM_FOR_HEADING)
    decoded = FEWEST_NEW_TOKENS + DECODED
    needed = {
        "passkey": ("--lengths", max(settings.lengths) + settings.digits + 2),
        "documents": ("--document-counts", documents + (settings.distractors + 1) * _ROOM_FOR_FACT),
        "perplexity": ("--perplexity-lengths", max(settings.perplexity_lengths)),
        "decode": ("--decode-lengths", max(settings.decode_lengths) + decoded),
    }
    for part in parts:
        option, tokens = needed[part]
        check_positions(checkpoint, tokens, option)


def parse_arguments(
    arguments: Sequence[str] | None = None, program: str | None = None, parts: Sequence[str] | None = None
) -> argparse.Namespace:
    """The command line; with `parts`, that of a command which measures these alone and has no options for others."""
    parser = argparse.ArgumentParser(prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", required=True, help="folders or Hub ids of causal language models")
    parser.add_argument("--plain-model", help="folder or Hub id of a plain model of the same tokenizer, to compare with")
    add_book_options(parser)
    parser.add_argument(
        "--output", type=Path, required=True, help="JSON file for the results; FILE.pieces beside it until they are whole"
    )
    parser.add_argument("--plots", type=Path, help="folder for the plots")
    if parts is None:
        parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default: all)")
    _add_part_arguments(parser, parts or PARTS)
    parser.add_argument(
        "--batch-tokens", type=positive, help="tokens read at once: rows times chunk (default: 262144, CPU 16384)"
    )
    parser.add_argument("--chunk-length", type=positive, help="tokens of a row read at once (default: 16384, CPU 4096)")
    add_model_options(parser)
    return parser.parse_args(arguments, argparse.Namespace(**({} if parts is None else {"parts": list(parts)})))


def _add_part_arguments(parser: argparse.ArgumentParser, parts: Sequence[str]) -> None:
    """One option for each setting of these parts. The lengths of a part that stands alone are also called `--lengths`."""
    default = MemorySettings()

    def add(name: str, help: str, *also: str) -> None:
        value = getattr(default, name)
        several: dict[str, Any] = {"nargs": "+"} if isinstance(value, tuple) else {}
        flags = (f"--{name.replace('_', '-')}", *also)
        parser.add_argument(*flags, dest=name, type=int, default=value, help=help, **several)

    also = ("--lengths",) if len(parts) == 1 else ()
    if "passkey" in parts:
        add("lengths", "texts of passkey, tokens")
        add("keys", "people who are asked for in a text of passkey")
    if {"passkey", "documents"} & set(parts):
        add("samples", "texts per cell of passkey and documents")
        add("distractors", "people in a text nobody asks for")
        add("digits", "length of the numbers")
        add("seed", "of the texts")
    if "documents" in parts:
        add("document_counts", "documents without the fact that is asked")
        add("document_length", "tokens, at most")
    if "perplexity" in parts:
        add("perplexity_lengths", "windows, tokens", *also)
        add("reference_length", "whose perplexity others are compared with")
        add("windows", "of every book (default: 10, with --stride all that there is room for)")
        add("counted", "tokens at a window's end that count (with --stride: as many as that)")
        parser.set_defaults(windows=None, counted=None)
        parser.add_argument(
            "--stride",
            type=positive,
            help="tokens from window to window: score every token of a book behind the longest context, once",
        )
    if "decode" in parts:
        add("decode_lengths", "tokens read before decoding", *also)


def settings_of(options: argparse.Namespace) -> MemorySettings:
    """The settings of a command line.

    Raises:
        ValueError: a stride with another number of counted tokens.
    """
    default = asdict(MemorySettings())
    given = {name: getattr(options, name, value) for name, value in default.items()}
    if given["stride"] is not None:
        if given["counted"] not in (None, given["stride"]):
            raise ValueError("with --stride, as many tokens of a window count: leave out --counted")
        given["counted"] = given["stride"]
    unset = {"windows": WINDOWS if given["stride"] is None else 0, "counted": default["counted"]}
    given |= {name: value for name, value in unset.items() if given[name] is None}
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return MemorySettings(**values)


def main(arguments: Sequence[str] | None = None, program: str | None = None, parts: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments, program, parts)
    settings = settings_of(options)
    check_outputs(options.output, options.plots)
    checkpoints = {
        name: open_checkpoint(model, options) for name, model in names_of(options.model, options.plain_model).items()
    }
    for checkpoint in checkpoints.values():
        check_room(checkpoint, settings, options.parts)
    tokenizer = open_tokenizer(checkpoints["model"], options)
    for checkpoint in checkpoints.values():
        check_tokenizer(checkpoint, tokenizer)
    with launched(options) as (processes, device):
        books = open_books(options, tokenizer)
        chunk_length = options.chunk_length or default_chunk_length(device)
        batch_tokens = options.batch_tokens or default_batch_tokens(device)
        evaluation = MemoryEvaluation(tokenizer, books.ids, settings, batch_tokens, chunk_length)
        models = load_models(checkpoints, device, options.dtype)
        description = describe(checkpoints, models, books, evaluation)
        results = evaluate(evaluation, models, options.parts, options.output, description, device, processes)
    if processes.rank > 0:
        return
    print(markdown_tables(results))
    if options.plots:
        draw_plots(results, options.plots)


def describe(
    checkpoints: dict[str, Checkpoint], models: dict[str, PreTrainedModel], books: Books, evaluation: MemoryEvaluation
) -> dict[str, Any]:
    """What a run is about, and is known by when it goes on. Models of one kind are told apart by their folders' names."""
    described = {name: describe_model(checkpoints[name].config.model_type, model) for name, model in models.items()}
    labels = [one["label"] for one in described.values()]
    folders = [checkpoint.name for checkpoint in checkpoints.values()]
    for name, one in described.items():
        if labels.count(one["label"]) > 1:
            folder = checkpoints[name].name
            one["label"] += f" ({folder if folders.count(folder) == 1 else f'{folder}, {name}'})"
    return {
        "models": described,
        **books.description(),
        "tokens": len(evaluation.tokens),
        "perplexity_books": [books.names[number] for number in evaluation.long_enough],
    }


if __name__ == "__main__":
    main()
