# SPDX-License-Identifier: Apache-2.0
"""Exact-match recall of a planted number, by prompt length, depth and window, with tables and plots.

    python -m remamba_hf.evaluation.recall --model MODEL --plain-model PLAIN --books BOOKS --output recall.json

Prompts are those of `remamba_hf.training.recall_data` in BOOKS, a folder of .txt books or a dataset such as deepmind/pg19,
which should not be books that the model was trained on; prompts longer than all books together repeat these from the
beginning, and their cells have `books_repeated`, how often. MODEL is a ReMamba or ReMamba-2, PLAIN any causal language model
of its tokenizer; given as MODEL, one that compresses nothing is read as it reads. A cell of the results is one way of
reading (see `VARIANTS`) at one length; the output file is written after every cell, and a run that was cut off goes on
behind the last batch that was read.
Several GPUs: accelerate launch --multi_gpu -m remamba_hf.cli eval recall ..., whose processes take batches by turns: less
--batch-tokens makes more of them.
"""

import argparse
import contextlib
import functools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remamba_hf.command_options import positive
from remamba_hf.families import FAMILIES
from remamba_hf.reading import PrefillWatch, prefill_bar, watch_prefill
from remamba_hf.training.recall_data import RecallSample, RecallSampler

from .books import add_book_options, joined, open_books
from .causal_models import Checkpoint
from .checkpoints import (
    add_model_options,
    check_positions,
    check_tokenizer,
    compression_weights,
    default_batch_tokens,
    default_chunk_length,
    describe_checkpoint,
    digest,
    environment,
    label_of,
    loader,
    open_checkpoint,
    open_tokenizer,
    plain_reading,
    reads_in_chunks,
)
from .generation_eval import Processes
from .memory_tasks import answer_whole, last_logits, number_of, repeated
from .reporting import (
    accuracy_by_depth,
    depth_rows,
    draw_depths,
    draw_shares,
    new_axes,
    percent,
    percent_with_interval,
    save_figure,
    set_length_ticks,
    short_length,
    start_or_continue,
    table_head,
    table_row,
    wilson_interval,
    write_results,
)
from .shared_cells import Cell, check_outputs, launched, measure_cells

Models = dict[str, tuple[Callable[[], PreTrainedModel], bool]]  # by variant: loads the model; whether prompts are compressed

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
VARIANTS = {
    "compressed": "{family}, compression on",
    "uncompressed": "{family}, compression off",
    "plain": "plain {plain}",
}


@dataclass(frozen=True)
class RecallSettings:
    """What fixes an evaluation.

    Attributes:
        lengths: prompt lengths in tokens.
        samples: prompts per cell; their depths are spread evenly.
        distractors: facts about other people in every prompt.
        digits: length of the numbers.
        seed: of the prompts.
        span: compression span p; `None` takes the model's own.
        ratio: compression ratio rho; `None` takes the model's own.
        perplexity_tokens: tokens at the end of a text that perplexity is taken over; 0 leaves it out.
    """

    lengths: tuple[int, ...] = LENGTHS
    samples: int = 100
    distractors: int = 0
    digits: int = 5
    seed: int = 1_000_000
    span: float | None = None
    ratio: float | None = None
    perplexity_tokens: int = 512


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[RecallSample],
    compress: bool,
    span: float | None = None,
    ratio: float | None = None,
) -> tuple[list[str], list[float | None]]:
    """Answers prompts of one length by greedy generation.

    Returns:
        The texts, without white space around them, and the share of each asked number's digits that the compression
        kept (None without compression).
    """
    new_tokens = max(len(sample.answer_ids) for sample in samples)
    if not reads_in_chunks(model):
        prompts = [sample.prompt_ids for sample in samples]
        return answer_whole(model, tokenizer, prompts, new_tokens, len(samples)), [None] * len(samples)
    ids = torch.from_numpy(np.stack([sample.prompt_ids for sample in samples])).to(model.device)
    settings: dict[str, Any] = {"compression_span": span, "compression_ratio": ratio} if compress else plain_reading(model)
    chunk_length = default_chunk_length(str(model.device))
    is_long = ids.shape[1] > chunk_length
    with watch_prefill(model) as prefill, prefill_bar() if is_long else contextlib.nullcontext() as progress:
        generated = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            prefill_chunk_length=chunk_length,
            prefill_progress=progress,
            **{"compress_prompt": True, **settings} if compress else settings,
        )
    texts = [text.strip() for text in tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)]
    return texts, [kept_digits(prefill, row, sample) if compress else None for row, sample in enumerate(samples)]


def kept_digits(prefill: PrefillWatch, row: int, sample: RecallSample) -> float:
    """Share of the asked number's digits among the kept positions."""
    first, end = sample.digits
    return sum(first <= position < end for position in prefill.kept(row)[0]) / (end - first)


def recall_records(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampler: RecallSampler,
    length: int,
    compress: bool,
    settings: RecallSettings,
    numbers: Sequence[int],
) -> list[dict[str, Any]]:
    """Asks for the facts of these of `settings.samples` prompts of `length` tokens, together.

    Returns:
        One record per prompt: `depth` (0 to 1), `right`, `answer`, `number`; of a model that has one, `inside` (the fact
        lies in the compression window) and, compressed, `kept` (share of the number's digits that was kept).
    """
    has_window = bool(plain_reading(model))
    window = model.backbone.plan_windows([length], [length], None, settings.span, settings.ratio)[0] if has_window else None
    samples = [
        sampler.sample((length, number), length, settings.distractors, depth=(number + 0.5) / settings.samples)
        for number in numbers
    ]
    answers, kept = answer(model, tokenizer, samples, compress, settings.span, settings.ratio)
    records: list[dict[str, Any]] = []
    for sample, text, share in zip(samples, answers, kept, strict=True):
        record = {
            "depth": round(sample.depth, 4),
            "right": number_of(text) == sample.number,
            "number": sample.number,
            "answer": text,
        }
        if window is not None:
            record["inside"] = window.start <= sample.digits[0] and sample.digits[1] <= window.stop
        records.append(record if share is None else {**record, "kept": share})
    return records


def text_ends(tokens: np.ndarray, samples: int, seed: int, longest: int) -> list[int]:
    """Where the texts end whose perplexity is taken, for every length up to `longest` at the same places: what differs
    between lengths is the context alone."""
    return np.random.default_rng(seed).integers(longest, len(tokens) + 1, size=samples).tolist()


@torch.no_grad()
def text_loss(model: PreTrainedModel, tokens: np.ndarray, end: int, length: int, counted: int) -> float:
    """Mean cross-entropy, in nats, of the last `counted` tokens of a text of `length` tokens, without compression."""
    ids = torch.from_numpy(np.asarray(tokens[end - length : end], dtype=np.int64))[None].to(model.device)
    logits = last_logits(model, ids, counted + 1, default_chunk_length(str(model.device)))
    return F.cross_entropy(logits[0, :-1].float(), ids[0, -counted:]).item()


def summarize(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts, accuracy, its 95 % interval, and the mean share of digits kept (of facts in the window)."""
    right = sum(record["right"] for record in records)
    kept = [record["kept"] for record in records if record.get("inside") and "kept" in record]
    return {
        "samples": len(records),
        "right": right,
        "accuracy": right / len(records) if records else None,
        "interval": wilson_interval(right, len(records)),
        "digits_kept": sum(kept) / len(kept) if kept else None,
    }


def evaluate(
    models: Models,
    tokenizer: PreTrainedTokenizerBase,
    tokens: np.ndarray,
    settings: RecallSettings,
    output: Path,
    batch_tokens: int,
    description: dict[str, Any] | None = None,
    device: str | None = None,
    processes: Processes | None = None,
) -> dict[str, Any]:
    """Fills all cells, those already in `output` excepted.

    Args:
        models: by variant, how to get the model and whether its prompts are compressed.
        tokenizer: of all models.
        tokens: ids of the books, as `encode_text` gives them.
        settings: what to ask.
        output: JSON file, rewritten after every cell.
        batch_tokens: prompt tokens read at once.
        description: goes into the file as it is, and must be the same when a run goes on.
        device: of the models, to be named in the file.
        processes: those that share out the work.

    Returns:
        The content of the file; in processes but the first, what it was before.

    Raises:
        ValueError: `output` holds the results of other settings.
    """
    header = {"settings": {**asdict(settings), "lengths": list(settings.lengths)}, "description": description or {}}
    results = start_or_continue(output, header, {"environment": environment(device), "cells": [], "perplexity": []})
    cells = [
        *_recall_cells(models, tokenizer, tokens, settings, batch_tokens, results),
        *_perplexity_cells(models, tokens, settings, results),
    ]
    done = {(part, one["variant"], one["length"]) for part in ("cells", "perplexity") for one in results[part]}
    left = [cell for cell in cells if cell.key not in done]
    measure_cells(left, output, lambda: write_results(output, results), processes)
    return results


def _recall_cells(
    models: Models,
    tokenizer: PreTrainedTokenizerBase,
    tokens: np.ndarray,
    settings: RecallSettings,
    batch_tokens: int,
    results: dict[str, Any],
) -> Iterator[Cell]:
    about = {key: results[key] for key in ("settings", "description")}

    @functools.lru_cache(maxsize=2)
    def sampler_of(length: int) -> RecallSampler:
        return RecallSampler(repeated(tokens, length), tokenizer, settings.seed, settings.digits)

    def cell(variant: str, length: int) -> Cell:
        load, compress = models[variant]

        def measure(numbers: range) -> list[dict[str, Any]]:
            return recall_records(load(), tokenizer, sampler_of(length), length, compress, settings, numbers)

        def enter(records: list[dict[str, Any]]) -> None:
            entry = {"variant": variant, "length": length, **summarize(records), "records": records}
            if length > len(tokens):
                entry["books_repeated"] = round(length / len(tokens), 2)
            results["cells"].append(entry)

        rows = max(batch_tokens // length, 1)
        return Cell(("cells", variant, length), settings.samples, rows, measure, enter, about)

    return (cell(variant, length) for variant in models for length in settings.lengths)


def _perplexity_cells(
    models: Models, tokens: np.ndarray, settings: RecallSettings, results: dict[str, Any]
) -> Iterator[Cell]:
    about = {key: results[key] for key in ("settings", "description")}
    lengths = [length for length in settings.lengths if length <= len(tokens)]  # repeated texts have another perplexity
    if not settings.perplexity_tokens or not lengths:
        return
    counted = min(settings.perplexity_tokens, min(settings.lengths) - 1)
    ends = text_ends(tokens, min(settings.samples, 16), settings.seed, max(lengths))

    def cell(variant: str, length: int) -> Cell:
        load, _ = models[variant]

        def measure(numbers: range) -> list[float]:
            return [text_loss(load(), tokens, ends[number], length, counted) for number in numbers]

        def enter(losses: list[float]) -> None:
            entry = {"variant": variant, "length": length, "tokens": counted, "samples": len(ends)}
            results["perplexity"].append({**entry, "perplexity": math.exp(statistics.fmean(losses))})

        return Cell(("perplexity", variant, length), len(ends), 1, measure, enter, about)

    yield from (cell(variant, length) for variant, (_, compress) in models.items() if not compress for length in lengths)


def markdown_table(results: dict[str, Any]) -> str:
    """Exact match in percent by length, with 95 % intervals, and the perplexities, as Markdown tables."""
    lengths = results["settings"]["lengths"]
    columns = [short_length(length) for length in lengths]
    text = table_head("exact match, %", columns) + _rows(results, lengths)
    for name, inside in (("in the window", True), ("behind the window", False)):
        rows = _rows(results, lengths, inside, ("compressed",))
        label = variant_label(results, "compressed")
        text += rows.replace(label, f"{label}, fact {name}")
    kept = {cell["length"]: cell["digits_kept"] for cell in results["cells"] if cell["variant"] == "compressed"}
    if kept:
        text += table_row("digits kept, %", [percent(kept.get(length)) for length in lengths])
    by_variant: dict[str, dict[int, float]] = {}
    for entry in results["perplexity"]:
        by_variant.setdefault(entry["variant"], {})[entry["length"]] = entry["perplexity"]
    if by_variant:
        text += "\n" + table_head("perplexity", columns)
    for variant, values in by_variant.items():
        text += table_row(variant_label(results, variant), [f"{values[n]:.1f}" if n in values else "" for n in lengths])
    return text


def depth_table(results: dict[str, Any], variant: str = "compressed") -> str:
    """Exact match in percent by tenth of the text and length, as a Markdown table."""
    columns = [short_length(length) for length in results["settings"]["lengths"]]
    return table_head("depth", columns) + depth_rows(_accuracy_by_depth(results, variant))


def variant_label(results: dict[str, Any], variant: str) -> str:
    """A way of reading, for people."""
    description = results.get("description", {})
    family = FAMILIES.get(description.get("family", "remamba"))
    if variant == "plain" and "plain" in description.get("models", {}):
        return str(description["models"]["plain"]["label"])
    if family is None:
        return variant
    return VARIANTS.get(variant, variant).format(family=family.name, plain=family.plain_name)


def _rows(
    results: dict[str, Any],
    lengths: Sequence[int],
    inside: bool | None = None,
    variants: Sequence[str] | None = None,
) -> str:
    """A table's rows; `inside` counts only facts in the window (or only those behind it)."""
    cells = {(cell["variant"], cell["length"]): cell["records"] for cell in results["cells"]}
    text = ""
    for variant in variants or dict.fromkeys(name for name, _ in cells):
        shown = []
        for length in lengths:
            records = cells.get((variant, length), ())
            counted = [record["right"] for record in records if inside is None or record.get("inside") == inside]
            shown.append(percent_with_interval(sum(counted), len(counted)))
        text += table_row(variant_label(results, variant), shown)
    return text


def _accuracy_by_depth(results: dict[str, Any], variant: str) -> np.ndarray:
    """Accuracy `[10, lengths]`; nan where there is no sample."""
    cells = {cell["length"]: cell["records"] for cell in results["cells"] if cell["variant"] == variant}
    return accuracy_by_depth(cells, results["settings"]["lengths"])


def plot_lengths(results: dict[str, Any], path: str | Path) -> None:
    """Draws exact match by length, a line with its 95 % interval for every variant."""
    figure, axes = new_axes()
    for variant in dict.fromkeys(cell["variant"] for cell in results["cells"]):
        cells = {cell["length"]: cell for cell in results["cells"] if cell["variant"] == variant}
        draw_shares(axes, variant_label(results, variant), cells)
    axes.set(xlabel="prompt, tokens")
    set_length_ticks(axes, results["settings"]["lengths"])
    axes.legend()
    save_figure(figure, path)


def first_variant(results: dict[str, Any]) -> str:
    """The way of reading that a run is about."""
    return str(results["cells"][0]["variant"])


def plot_depths(results: dict[str, Any], path: str | Path, variant: str = "compressed") -> None:
    """Draws exact match by depth and length as a map of colours."""
    figure, axes = new_axes()
    columns = [short_length(length) for length in results["settings"]["lengths"]]
    image = draw_depths(axes, _accuracy_by_depth(results, variant), columns)
    axes.set(xlabel="prompt, tokens", title=variant_label(results, variant))
    figure.colorbar(image, label="exact match")
    save_figure(figure, path)


def parse_arguments(arguments: Sequence[str] | None = None, program: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--plain-model", help="folder or Hub id of another model of the same tokenizer, to compare with")
    add_book_options(parser)
    parser.add_argument(
        "--output", type=Path, required=True, help="JSON file for the results; FILE.pieces beside it until they are whole"
    )
    parser.add_argument("--plots", type=Path, help="folder for the two plots")
    parser.add_argument("--lengths", type=positive, nargs="+", default=list(LENGTHS), help="prompt lengths, tokens")
    parser.add_argument("--samples", type=positive, default=100, help="prompts per length and variant")
    parser.add_argument("--distractors", type=int, default=0, help="facts about other people in every prompt")
    parser.add_argument("--digits", type=positive, default=5, help="length of the numbers")
    parser.add_argument("--seed", type=int, default=RecallSettings.seed)
    parser.add_argument("--span", type=float, help="compression span p (default: the model's)")
    parser.add_argument("--ratio", type=float, help="compression ratio rho (default: the model's)")
    parser.add_argument("--only-compressed", action="store_true", help="leave out reading without compression")
    parser.add_argument("--perplexity-tokens", type=int, default=512, help="0 leaves perplexity out")
    parser.add_argument("--batch-tokens", type=positive, help="prompt tokens read at once (default: 262144, CPU 16384)")
    add_model_options(parser)
    return parser.parse_args(arguments)


def describe(
    checkpoint: Checkpoint, plain: Checkpoint | None, load: dict[str, Callable[[], PreTrainedModel]]
) -> dict[str, Any]:
    """What names the models of a run, and lets it, and a card, know them again."""
    description: dict[str, Any] = {"family": checkpoint.config.model_type, "models": {}}
    if checkpoint.compresses:
        names = ("compression_start", "compression_span", "compression_ratio", "compression_max_kept")
        description["model_settings"] = {name: getattr(checkpoint.config, name) for name in names}
        model = load["compressed"]()
        own = describe_checkpoint(checkpoint.config.model_type, model)
        description["models"]["model"] = {**own, "compression_weights": digest(compression_weights(model))}
    other = plain if checkpoint.compresses else checkpoint
    if other is not None:
        description["models"]["plain"] = describe_checkpoint(other.config.model_type, load["plain"]())
    return description


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> None:
    options = parse_arguments(arguments, program)
    check_outputs(options.output, options.plots)
    checkpoint = open_checkpoint(options.model, options)
    plain = open_checkpoint(options.plain_model, options) if options.plain_model else None
    if not checkpoint.compresses:
        _check_nothing_to_compress(options, checkpoint)
    for each in (checkpoint, plain) if plain else (checkpoint,):
        check_positions(each, max(options.lengths) + options.digits + 2, "--lengths")
    settings = RecallSettings(
        lengths=tuple(options.lengths),
        samples=options.samples,
        distractors=options.distractors,
        digits=options.digits,
        seed=options.seed,
        span=options.span,
        ratio=options.ratio,
        perplexity_tokens=options.perplexity_tokens,
    )
    tokenizer = open_tokenizer(checkpoint, options)
    for each in (checkpoint, plain) if plain else (checkpoint,):
        check_tokenizer(each, tokenizer)
    with launched(options) as (processes, device):
        books = open_books(options, tokenizer)
        tokens = joined(books.ids, int(tokenizer.eos_token_id))
        cache: dict[str, PreTrainedModel] = {}
        own = loader(checkpoint, device, cache, options.dtype)
        models: Models = {"compressed": (own, True)} if checkpoint.compresses else {"plain": (own, False)}
        if checkpoint.compresses and not options.only_compressed:
            models["uncompressed"] = (own, False)
        if plain is not None:
            models["plain"] = (loader(plain, device, cache, options.dtype), False)
        description = {
            **describe(checkpoint, plain, {name: load for name, (load, _) in models.items()}),
            **books.description(),
            "tokens": len(tokens),
        }
        batch_tokens = options.batch_tokens or default_batch_tokens(device)
        results = evaluate(models, tokenizer, tokens, settings, options.output, batch_tokens, description, device, processes)
    if processes.rank > 0:
        return
    print(markdown_table(results))
    print(depth_table(results, first_variant(results)))
    if options.plots:
        plot_lengths(results, options.plots / "recall_by_length.png")
        plot_depths(results, options.plots / "recall_by_depth.png", first_variant(results))


def _check_nothing_to_compress(options: argparse.Namespace, checkpoint: Checkpoint) -> None:
    given = {"--plain-model": options.plain_model, "--span": options.span, "--ratio": options.ratio}
    names = [name for name, value in given.items() if value is not None]
    names += ["--only-compressed"] if options.only_compressed else []
    if names:
        raise ValueError(
            f"{checkpoint.name} is a {label_of(checkpoint.config.model_type)}, which compresses nothing: leave out "
            f"{', '.join(names)}, or give a ReMamba or ReMamba-2 as --model"
        )


if __name__ == "__main__":
    main()
