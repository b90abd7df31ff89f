# SPDX-License-Identifier: Apache-2.0
"""How far a model remembers: exact match, perplexity and cost of decoding by length, with tables and plots.

    python -m remamba_hf.evaluation.memory --model MODEL --plain-model PLAIN --books BOOKS --output memory.json --plots DIR

MODEL is a MemMamba, or several, such as one of every seed; any other checkpoint of this package, or a plain Mamba, can stand
in either place, and one that compresses prompts is read without compression. BOOKS should not be books that the models were
trained on. After arXiv 2510.03279, section 4, there are four parts:

    passkey     a sentence in a book gives a person a number, which is asked for behind 1k to 400k tokens. With `--keys M`, M
                people have numbers in one text, and each is asked for in a question of its own, put to a copy of the state
                behind the text: the name decides which number is right. `--distractors D` adds people nobody asks for.
    documents   the same in one of 11 to 201 numbered documents of about 200 tokens each
    perplexity  of the last 50 tokens of 10 windows of every book, by the tokens of context before them. The windows of all
                lengths end at the same places, so only the context differs; books shorter than the longest are left out.
    decode      bytes of the state, and seconds per token, after 1k and after 64k tokens

The output file is written after every cell, and a run that was cut off goes on from it.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from remamba_hf.families import PLAIN_FAMILIES
from remamba_hf.training.book_tokens import encode_text, list_books, read_book, write_json
from remamba_hf.training.recall_data import RecallSampler

from .checkpoints import CPU_CHUNK_LENGTH, digest, environment, family_of, load_model, weights_read
from .memory_report import COLUMNS, draw_plots, markdown_tables
from .memory_tasks import (
    decoding_cost,
    recall_records,
    rows_at_once,
    summarize_losses,
    summarize_records,
    window_ends,
    window_losses,
)
from .reporting import start_or_continue

PARTS = tuple(COLUMNS)
GPU_CHUNK_LENGTH = 32_768


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
        windows: of every book.
        counted: tokens at the end of a window that perplexity is taken over.
        decode_lengths: tokens read before decoding is measured.
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
    windows: int = 10
    counted: int = 50
    decode_lengths: tuple[int, ...] = (1024, 65_536)


class MemoryEvaluation:
    """The parts of an evaluation on some books, for any model.

    Args:
        tokenizer: of all models.
        books: token ids of each book, `uint16[tokens]`.
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
        end = np.asarray([tokenizer.eos_token_id], dtype=np.uint16)
        self.tokens = np.concatenate([part for book in books for part in (book, end)])
        self.sampler = RecallSampler(self.tokens, tokenizer, settings.seed, settings.digits)
        self.long_enough = [number for number, book in enumerate(books) if len(book) >= max(settings.perplexity_lengths)]
        self.long_books = [books[number] for number in self.long_enough]
        self.ends = [window_ends(len(book), max(settings.perplexity_lengths), settings.windows) for book in self.long_books]

    def check(self, parts: Sequence[str]) -> None:
        """Raises a ValueError, before any work, on texts that cannot be made of these books."""
        settings = self.settings
        if settings.samples < 1 or settings.keys < 1 or settings.windows < 1:
            raise ValueError("samples, keys and windows are counts: give at least 1 of each")
        if "passkey" in parts:
            if max(settings.lengths) > len(self.tokens):
                raise ValueError(
                    f"the books have {len(self.tokens)} tokens, fewer than the longest text of {max(settings.lengths)}: "
                    "give more books or shorter --lengths"
                )
            for number in range(settings.samples):
                self.sampler.text(
                    (min(settings.lengths), number), min(settings.lengths), settings.keys, settings.distractors
                )
        if "documents" in parts:
            fewest = min(settings.document_counts)
            self.sampler.documents((fewest, 0), fewest, settings.distractors, 0.5, settings.document_length)
        if "perplexity" in parts:
            if not self.long_books:
                raise ValueError(
                    f"no book has the {max(settings.perplexity_lengths)} tokens of the longest window: give longer books or "
                    "shorter --perplexity-lengths"
                )
            if not 1 <= settings.counted < min(settings.perplexity_lengths):
                raise ValueError(f"{settings.counted} counted tokens do not fit into the shortest window")

    def columns(self, part: str) -> tuple[int, ...]:
        """The lengths, or numbers of documents, that a part has cells for."""
        return getattr(self.settings, COLUMNS[part][1])

    def cell(self, part: str, model: PreTrainedModel, column: int) -> dict[str, Any]:
        """Measures one cell of a part."""
        cells: dict[str, Callable[[PreTrainedModel, int], dict[str, Any]]] = {
            "passkey": self._passkey,
            "documents": self._documents,
            "perplexity": self._perplexity,
            "decode": lambda model, length: decoding_cost(model, self.tokens, length, self.chunk_length),
        }
        return cells[part](model, column)

    def _rows(self, length: int) -> int:
        return rows_at_once(length, self.chunk_length, self.batch_tokens)

    def _passkey(self, model: PreTrainedModel, length: int) -> dict[str, Any]:
        settings = self.settings

        def text(number: int) -> Any:
            depths = spread_depths(number, settings.samples, settings.keys)
            return self.sampler.text((length, number), length, settings.keys, settings.distractors, depths)

        return self._recall(model, text, self._rows(length))

    def _documents(self, model: PreTrainedModel, noise: int) -> dict[str, Any]:
        settings = self.settings

        def text(number: int) -> Any:
            depth = (number + 0.5) / settings.samples
            return self.sampler.documents((noise, number), noise, settings.distractors, depth, settings.document_length)

        return self._recall(model, text, self._rows((noise + 1) * settings.document_length))

    def _recall(self, model: PreTrainedModel, text: Callable[[int], Any], rows: int) -> dict[str, Any]:
        records = recall_records(model, self.tokenizer, text, self.settings.samples, rows, self.chunk_length)
        return {**summarize_records(records), "records": records}

    def _perplexity(self, model: PreTrainedModel, length: int) -> dict[str, Any]:
        counted, rows = self.settings.counted, self._rows(length)
        losses = window_losses(model, self.long_books, self.ends, length, counted, rows, self.chunk_length)
        return summarize_losses(losses)


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

    Returns:
        The content of the file.

    Raises:
        ValueError: texts that cannot be made, or `output` holds results of other settings or models.
    """
    evaluation.check(parts)
    header = {"settings": asdict(evaluation.settings), "description": description}
    rest = {"environment": environment(device), **{part: [] for part in PARTS}}
    results = start_or_continue(output, header, rest)
    cells = [(part, name, column) for part in parts for column in evaluation.columns(part) for name in models]
    for part, name, column in tqdm(cells, desc="cells"):
        key = COLUMNS[part][0]
        if not any((cell["model"], cell[key]) == (name, column) for cell in results[part]):
            results[part].append({"model": name, key: column, **evaluation.cell(part, models[name], column)})
            write_json(output, results)
    return results


def describe_model(name: str, checkpoint: str, model: PreTrainedModel) -> dict[str, Any]:
    """What names a model in the results, and lets a run know it again."""
    kind = AutoConfig.from_pretrained(checkpoint).model_type
    family = family_of(checkpoint)
    if kind in PLAIN_FAMILIES:
        label = f"plain {family.plain_name}"
    else:
        label = f"{family.name}, compression off" if family.compresses else family.name
    weights = weights_read(model)
    return {
        "label": label + name.removeprefix("model").removeprefix("plain").replace("_", " "),
        "model_type": kind,
        "parameters": sum({tensor.data_ptr(): tensor.numel() for tensor in weights.values()}.values()),  # tied ones once
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": digest(weights),
    }


def names_of(models: Sequence[str], plain_model: str | None) -> dict[str, str]:
    """The checkpoints to compare by the names they go under: `model`, `model_2` and so on, and `plain`."""
    names = {f"model_{number}" if number > 1 else "model": model for number, model in enumerate(models, start=1)}
    return {**names, "plain": plain_model} if plain_model else names


def load_models(checkpoints: dict[str, str], device: str) -> dict[str, PreTrainedModel]:
    """The models to compare, by name.

    Raises:
        ValueError: their vocabularies differ.
    """
    models = {name: load_model(checkpoint, device) for name, checkpoint in checkpoints.items()}
    sizes = {name: loaded.config.vocab_size for name, loaded in models.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the models have different vocabularies ({sizes}): all must be of one tokenizer")
    return models


def encode_each_book(paths: Sequence[Path], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """Token ids of each book, `uint16[tokens]`."""
    return [encode_text(read_book(path), tokenizer) for path in tqdm(paths, desc="encoding books", unit="book")]


def parse_arguments(
    arguments: Sequence[str] | None = None, program: str | None = None, parts: Sequence[str] | None = None
) -> argparse.Namespace:
    """The command line; with `parts`, that of a command which measures these alone and has no options for others."""
    parser = argparse.ArgumentParser(prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", required=True, help="folders or Hub ids")
    parser.add_argument("--plain-model", help="folder or Hub id of a plain model of the same tokenizer, to compare with")
    parser.add_argument("--books", "--data", required=True, help="folder of .txt books that the models were not trained on")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--plots", type=Path, help="folder for the plots")
    if parts is None:
        parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default: all)")
    _add_part_arguments(parser, parts or PARTS)
    parser.add_argument("--batch-tokens", type=int, default=262_144, help="tokens read at once: rows times chunk")
    parser.add_argument("--chunk-length", type=int, help="tokens of a row read at once (default: 32768, CPU 4096)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
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
        add("windows", "of every book")
        add("counted", "tokens at a window's end")
    if "decode" in parts:
        add("decode_lengths", "tokens read before decoding", *also)


def main(arguments: Sequence[str] | None = None, program: str | None = None, parts: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments, program, parts)
    default = asdict(MemorySettings())
    given = ((name, getattr(options, name, value)) for name, value in default.items())
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given}
    settings = MemorySettings(**values)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    paths = list_books(options.books)
    checkpoints = names_of(options.model, options.plain_model)
    models = load_models(checkpoints, options.device)
    tokenizer = AutoTokenizer.from_pretrained(options.model[0])
    chunk_length = options.chunk_length or (CPU_CHUNK_LENGTH if options.device == "cpu" else GPU_CHUNK_LENGTH)
    books = encode_each_book(paths, tokenizer)
    evaluation = MemoryEvaluation(tokenizer, books, settings, options.batch_tokens, chunk_length)
    description = {
        "models": {name: describe_model(name, checkpoints[name], model) for name, model in models.items()},
        "books": [path.name for path in paths],
        "tokens": len(evaluation.tokens),
        "perplexity_books": [paths[number].name for number in evaluation.long_enough],
    }
    results = evaluate(evaluation, models, options.parts, options.output, description, options.device)
    print(markdown_tables(results))
    if options.plots:
        options.plots.mkdir(parents=True, exist_ok=True)
        draw_plots(results, options.plots)


if __name__ == "__main__":
    main()
