# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of any causal language model, by length of the prompt and by batch.

    remamba eval speed --model MODEL [MODEL ...] --lengths 1024 4096 16384 --batch-sizes 1 8 --output speed.json

Every model is measured as its users reach it, through `generate`, on prompts of random tokens: seconds until the first token
is known (prefill), seconds of a decoded token, the most memory, and the size of the state. Models of this package that
compress prompts are measured with and without. Plain models are transformers' own.

The output file is written after every cell, and the same command goes on from it, with the same settings, models, versions
and device only. What does not fit into memory is recorded, and the run goes on. Beside the results there are a table and a
picture. benchmarks/ compares random weights of given shapes, and checks what it times; this measures checkpoints.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from remamba_hf.command_options import add_compression_settings, compression_settings, flag, positive
from remamba_hf.reading import check_picture

from .causal_models import Checkpoint, find_checkpoint, load_causal_model, resolved_dtype
from .checkpoints import CPU_CHUNK_LENGTH, DEFAULT_CHUNK_LENGTH, default_chunk_length, environment, open_device
from .reporting import (
    check_writable,
    new_panels,
    save_figure,
    set_length_ticks,
    set_log_scale,
    short_length,
    start_or_continue,
    table_head,
    table_row,
    write_results,
    write_table,
)
from .timing import FEWEST_NEW_TOKENS, Clock, is_out_of_memory, measure_generation, without_end

LENGTHS = (1024, 4096, 16_384)
OUT_OF_MEMORY = "out of memory"
Rows = dict[str, dict[int, dict[str, Any]]]


class Measure(NamedTuple):
    """A number of a cell. field: its name there; title: with its unit; scale: from the field's unit to that."""

    field: str
    title: str
    scale: float


MEASURES = (
    Measure("prefill_s", "prefill, s", 1.0),
    Measure("step_s", "decoding, ms a token", 1e3),
    Measure("peak_bytes", "peak memory, GB", 1e-9),
    Measure("state_bytes", "state, MB", 1e-6),
)


class Way(NamedTuple):
    """How a model reads. name: "" for models that know one way only; options: of `generate`."""

    name: str
    options: dict[str, Any]


class Cell(NamedTuple):
    """One measurement. rows: of the batch; length: tokens of every row's prompt."""

    model: str
    way: str
    rows: int
    length: int


def ways_of(checkpoint: Checkpoint, compress: bool | None, settings: Mapping[str, Any], chunk_length: int) -> list[Way]:
    """The ways in which a model is measured.

    Args:
        compress: only so; None: both, for a model that compresses prompts.
        settings: of the compression.
    """
    if not checkpoint.of_this_package:
        return [Way("", {})]
    pieces = {"prefill_chunk_length": chunk_length}
    if not checkpoint.compresses:
        return [Way("", pieces)]
    both = {
        True: Way("compression on", {**pieces, "compress_prompt": True, **settings}),
        False: Way("compression off", {**pieces, "compress_prompt": False}),
    }
    return [way for wanted, way in both.items() if compress in (None, wanted)]


def describe(checkpoint: Checkpoint, dtype: str, ways: Sequence[Way]) -> dict[str, Any]:
    """What names a model in the results, and lets a run know it again."""
    return {
        "label": checkpoint.name,
        "model_type": checkpoint.config.model_type,
        "dtype": dtype,
        "identity": checkpoint.identity(),
        "ways": {way.name: way.options for way in ways},
    }


def random_prompts(model: PreTrainedModel, rows: int, length: int) -> torch.Tensor:
    """The same for every model of a vocabulary: [rows, length] long."""
    generator = torch.Generator().manual_seed(length)
    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(vocabulary, (rows, length), generator=generator).to(model.device)


def measure_cell(
    checkpoint: Checkpoint, model: PreTrainedModel, cell: Cell, options: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Numbers of a cell, or the `error` that there is none."""
    needed = cell.length + settings["new_tokens"]
    if checkpoint.positions is not None and needed > checkpoint.positions:
        return {"error": f"{checkpoint.positions} positions, needs {needed}"}
    clock = Clock(model.device)
    try:
        ids = random_prompts(model, cell.rows, cell.length)
        counts = (settings["new_tokens"], settings["repeats"])
        numbers = measure_generation(model, ids, *counts, options, settings["cell_seconds"])
        return {**numbers, **_window(model, cell.length, options)}
    except (RuntimeError, MemoryError) as error:  # the first of them is what torch raises on the CPU
        if not is_out_of_memory(error):
            raise
    clock.release()  # here, where the traceback that holds the tensors has gone
    return {"error": OUT_OF_MEMORY}


def _window(model: Any, length: int, options: Mapping[str, Any]) -> dict[str, int]:
    """Tokens that were compressed, where some could be: short prompts are read as they are."""
    if not options.get("compress_prompt"):
        return {}
    given = (options.get(f"compression_{name}") for name in ("start", "span", "ratio"))
    return {"window": model.backbone.plan_windows([length], [length], *given)[0].length}


def measure_all(
    checkpoints: Mapping[str, Checkpoint],
    ways: Mapping[str, Sequence[Way]],
    device: str,
    output: Path,
    results: dict[str, Any],
) -> None:
    """Fills all cells that are missing in `results`, and writes them after each."""
    settings = results["settings"]
    done = {tuple(entry[name] for name in Cell._fields) for entry in results["speed"]}
    cells = [
        Cell(name, way.name, rows, length)
        for name in checkpoints
        for way in ways[name]
        for rows in settings["batch_sizes"]
        for length in settings["lengths"]
    ]
    left = [cell for cell in cells if tuple(cell) not in done]
    with tqdm(total=len(cells), initial=len(cells) - len(left), desc="cells") as progress:
        for name, checkpoint in checkpoints.items():
            mine = [cell for cell in left if cell.model == name]
            if not mine:
                continue
            dtype = results["description"]["models"][name]["dtype"]
            model = without_end(load_causal_model(checkpoint, device, dtype))
            options = {way.name: way.options for way in ways[name]}
            for cell in mine:
                progress.set_postfix_str(f"{name} {cell.way} {cell.rows} x {cell.length}")
                entry = {**cell._asdict(), **measure_cell(checkpoint, model, cell, options[cell.way], settings)}
                results["speed"].append(entry)
                write_results(output, results)
                progress.update()
            del model
            Clock(device).release()


def rows_of(results: Mapping[str, Any]) -> Rows:
    """Cells by what a line of a plot or table is about, and by length."""
    rows: Rows = {}
    for cell in results["speed"]:
        label = results["description"]["models"][cell["model"]]["label"]
        way = f", {cell['way']}" if cell["way"] else ""
        batch = f", batch {cell['rows']}" if len(results["settings"]["batch_sizes"]) > 1 or cell["rows"] > 1 else ""
        rows.setdefault(f"{label}{way}{batch}", {})[cell["length"]] = cell
    return rows


def markdown_tables(rows: Rows) -> str:
    """A table of every measure that there are numbers of; where there are none at all, of the errors."""
    lengths = sorted({length for cells in rows.values() for length in cells})
    tables = []
    for measure in [one for one in MEASURES if _has_numbers(rows, one)] or MEASURES[:1]:
        text = table_head(f"{measure.title}, by tokens", [short_length(length) for length in lengths])
        for label, cells in rows.items():
            text += table_row(label, [_shown(cells.get(length), measure) for length in lengths])
        tables.append(text)
    return "\n".join(tables)


def _has_numbers(rows: Rows, measure: Measure) -> bool:
    return any(cell.get(measure.field) is not None for cells in rows.values() for cell in cells.values())


def _shown(cell: Mapping[str, Any] | None, measure: Measure) -> str:
    if cell is None:
        return ""
    if "error" in cell:
        return str(cell["error"])
    value = cell[measure.field]
    return "" if value is None else f"{value * measure.scale:.3g}"


def check_cell(cell: Mapping[str, Any]) -> str:
    """All numbers of a cell as they are shown; raises for a cell that lacks some."""
    return ", ".join(_shown(cell, measure) for measure in MEASURES)


def draw(rows: Rows, path: Path) -> None:
    """A panel for every measure, by length."""
    figure, panels = new_panels(len(MEASURES), columns=2)
    lengths = sorted({length for cells in rows.values() for length in cells})
    for axes, measure in zip(panels, MEASURES, strict=True):
        for label, points in _points(rows, measure):
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
        axes.set(xlabel="prompt, tokens", ylabel=measure.title)
        set_log_scale(axes)
        set_length_ticks(axes, lengths)
    handles, labels = max((axes.get_legend_handles_labels() for axes in panels), key=lambda found: len(found[1]))
    if labels:
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
    save_figure(figure, path)


def _points(rows: Rows, measure: Measure) -> Iterator[tuple[str, list[tuple[int, float]]]]:
    for label, cells in rows.items():
        there = {length: cell.get(measure.field) for length, cell in sorted(cells.items())}
        points = [(length, value * measure.scale) for length, value in there.items() if value is not None]
        if points:
            yield label, points


def footer(results: Mapping[str, Any]) -> str:
    """How it was measured, in a line."""
    settings, versions = results["settings"], results["environment"]
    dtypes = ", ".join(sorted({model["dtype"] for model in results["description"]["models"].values()}))
    return (
        f"\nMedians of up to {settings['repeats']} runs; {settings['new_tokens']} tokens generated; {dtypes}, "
        f"{versions['device']}, torch {versions['torch']}, transformers {versions['transformers']}.\n"
    )


def parse_arguments(arguments: Sequence[str] | None = None, program: str | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", required=True, help="folders or Hub ids of causal language models")
    parser.add_argument("--output", type=Path, metavar="FILE", help="results (JSON); default: speed-MODEL.json")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="picture; default: beside the results")
    parser.add_argument("--lengths", type=positive, nargs="+", default=list(LENGTHS), help="of prompts, tokens")
    parser.add_argument("--batch-sizes", type=positive, nargs="+", default=[1], metavar="B", help="prompts at a time")
    parser.add_argument("--new-tokens", type=positive, default=64, metavar="N", help="generated (default: %(default)s)")
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="that count (default: %(default)s)")
    parser.add_argument(
        "--cell-seconds", type=positive, default=600, metavar="S", help="repeat less what would take longer (default: 600)"
    )
    parser.add_argument(
        "--compress",
        "--compression",
        action=argparse.BooleanOptionalAction,
        help="compress prompts, or do not (default: both, for models that compress)",
    )
    add_compression_settings(parser, "; default: the checkpoint's")
    parser.add_argument(
        "--prefill-chunk-length",
        type=positive,
        metavar="N",
        help=f"tokens that our models read at a time (default: {DEFAULT_CHUNK_LENGTH}, CPU {CPU_CHUNK_LENGTH})",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default: cuda where there is one")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto: the checkpoint's, on the CPU float32",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a model")
    return parser.parse_args(arguments)


def find_models(options: argparse.Namespace) -> dict[str, Checkpoint]:
    """The models of a command line, by name.

    Raises:
        ValueError: one that is given twice, or options that mean nothing for any of them.
    """
    checkpoints: dict[str, Checkpoint] = {}
    for model in options.model:
        found = find_checkpoint(model, trust_remote_code=options.trust_remote_code)
        if found.name in checkpoints:
            raise ValueError(f"two models are called {found.name}: give each once, or give their folders other names")
        checkpoints[found.name] = found
    given = [flag(name) for name in compression_settings(options)]
    if options.compress is not None:
        given.append("--compress" if options.compress else "--no-compress")
    if given and not any(found.compresses for found in checkpoints.values()):
        raise ValueError(f"{', '.join(checkpoints)}: no model compresses prompts, so leave out {', '.join(given)}")
    if options.compress is False and compression_settings(options):
        raise ValueError(f"--no-compress leaves nothing to set: leave out {', '.join(given[:-1])}")
    return checkpoints


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> None:
    options = parse_arguments(arguments, program)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("speed is measured by one process: leave out accelerate launch or torchrun, which started several")
    if options.new_tokens < FEWEST_NEW_TOKENS:
        raise ValueError(f"--new-tokens must be at least {FEWEST_NEW_TOKENS}: the first few of a text do not count")
    checkpoints, device = find_models(options), open_device(options)
    chunk_length = options.prefill_chunk_length or default_chunk_length(device)
    settings = compression_settings(options)
    ways = {name: ways_of(found, options.compress, settings, chunk_length) for name, found in checkpoints.items()}
    first = next(iter(checkpoints)).replace("/", "--")
    output = options.output or Path(f"speed-{first}.json" if len(checkpoints) == 1 else "speed.json")
    plot = options.plot or output.with_suffix(".png")
    check_writable(output, plot)
    if options.plot is not None:
        check_picture(plot)
    dtypes = {name: resolved_dtype(found, device, options.dtype) for name, found in checkpoints.items()}
    header = {
        "settings": {
            "lengths": sorted(set(options.lengths)),
            "batch_sizes": sorted(set(options.batch_sizes)),
            "new_tokens": options.new_tokens,
            "repeats": options.repeats,
            "cell_seconds": options.cell_seconds,
        },
        "description": {"models": {name: describe(found, dtypes[name], ways[name]) for name, found in checkpoints.items()}},
        "environment": {**environment(device), "threads": torch.get_num_threads()},
    }
    results = start_or_continue(output, header, {"speed": []})
    measure_all(checkpoints, ways, device, output, results)
    rows = rows_of(results)
    table = markdown_tables(rows) + footer(results)
    write_table(output.with_suffix(".md"), table)
    print(table, end="")
    print(f"results  {output}", file=sys.stderr)
    if not any(_has_numbers(rows, measure) for measure in MEASURES):
        errors = ", ".join(dict.fromkeys(cell["error"] for cell in results["speed"]))
        raise ValueError(f"nothing could be measured ({errors}): give shorter --lengths or fewer --batch-sizes")
    try:
        draw(rows, plot)
    except ImportError:
        print('no picture: it needs matplotlib, pip install "remamba_hf[eval]"', file=sys.stderr)


if __name__ == "__main__":
    main()
