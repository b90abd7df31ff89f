# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of what `run_gpu.py` wrote, from these files alone.

    python benchmarks/report.py benchmarks/results/gpu_full.json                  # tables, and pictures beside the file
    python benchmarks/report.py benchmarks/results/gpu_*.json --output FOLDER     # likewise for several runs, in FOLDER

Prints Markdown tables and writes them to NAME.md; draws NAME_prefill_SHAPE.png, NAME_memory_SHAPE.png (speed and memory by
length) and NAME_decode_SHAPE.png (by batch), each measurement with its limit as a dashed line of the same colour.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from run_gpu import WHAT

from remamba_hf.evaluation.reporting import (
    new_axes,
    percent,
    save_figure,
    set_length_ticks,
    table_head,
    table_row,
)

NAMES = {
    "remamba": "ReMamba",
    "remamba2": "ReMamba-2",
    "memmamba": "MemMamba",
    "mamba_ssm": "mamba_ssm",
    "transformers": "transformers",
    "llama": "transformers' Llama",
}
LLAMAS = {"2.8b": "3.4b"}  # what stands beside a shape is not of its size
VARIANTS = {
    "plain": "",
    "two_stages": ", two stages",
    "narrow_state": ", state in bfloat16",
    "lora": ", LoRA on every projection",
}
FAILED = "failed"
Entry = dict[str, Any]


class ReportError(Exception):
    """A file that no report can be made of; the message says what to do."""


def read_results(path: Path) -> dict[str, Any]:
    """What `run_gpu.py` wrote.

    Raises:
        ReportError: the file is missing, damaged, another kind of file, or holds no measurements.
    """
    try:
        results = json.loads(path.read_text())
    except OSError as error:
        raise ReportError(f"{path} cannot be read ({error.strerror}). Give a file that run_gpu.py wrote.") from error
    except ValueError as error:
        raise ReportError(f"{path} is no JSON ({error}). Give a file that run_gpu.py wrote.") from error
    if not isinstance(results, dict) or results.get("what") != WHAT:
        raise ReportError(f"{path} was not written by {WHAT}. Give a file that was.")
    if not results.get("cells"):
        raise ReportError(f"{path} holds no measurements: its run was cut off, or the gate failed. Run it again to go on.")
    return results


def markdown(results: dict[str, Any]) -> str:
    """Every part that was measured as a table, with what failed, the gate and where all that was measured below."""
    cells = results["cells"]
    tables = [table(cells) for table in (decode_table, context_table, prefill_table, long_table, training_table)]
    parts = [*tables, failures(cells), gate_table(results["gate"]), footer(results)]
    return "\n".join(part for part in parts if part)


def of_part(cells: Iterable[Entry], part: str) -> list[Entry]:
    return [cell for cell in cells if cell["part"] == part]


def label(cell: Entry) -> str:
    size = LLAMAS.get(cell["shape"], cell["shape"]) if cell["model"] == "llama" else cell["shape"]
    variant = VARIANTS.get(cell["variant"], f", {cell['variant']}")
    return f"{NAMES[cell['model']]} {size}{variant}"


def rows_of(cells: list[Entry], column: str) -> dict[str, dict[int, Entry]]:
    """Measurements by label and by the field that columns differ in."""
    rows: dict[str, dict[int, Entry]] = {}
    for cell in cells:
        rows.setdefault(label(cell), {})[cell[column]] = cell
    return rows


def by_column(title: str, cells: list[Entry], column: str, name: Callable[[int], str], show: Callable[[Entry], str]) -> str:
    """A table of one row a model; its last column is the peak memory of the last measurement that has one."""
    if not cells:
        return ""
    columns = sorted({cell[column] for cell in cells})
    text = table_head(title, [*map(name, columns), f"peak at {name(columns[-1])}, GB"])
    for model, found in rows_of(cells, column).items():
        text += table_row(
            model, [shown(found.get(value), show) for value in columns] + [shown(found.get(columns[-1]), gigabytes)]
        )
    return text


def shown(cell: Entry | None, show: Callable[[Entry], str]) -> str:
    """Nothing for what was not measured."""
    if cell is None:
        return ""
    return FAILED if "error" in cell else show(cell)


def gigabytes(cell: Entry) -> str:
    return "" if cell["peak_bytes"] is None else f"{cell['peak_bytes'] / 1e9:.2f}"


def milliseconds(cell: Entry) -> str:
    """Median, range and share of the limit."""
    median, low, high = (1000 * cell[name] for name in ("median_s", "fastest_s", "slowest_s"))
    digits = 2 if median < 10 else 1 if median < 100 else 0
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f}), {share(cell)}"


def share(cell: Entry) -> str:
    return f"{percent(cell['share_of_limit'])} %" if cell["share_of_limit"] is not None else "no share"


def tokens(length: int) -> str:
    return f"{length:,} tokens"


def decode_table(cells: list[Entry]) -> str:
    found = of_part(cells, "decode")
    first = min((cell["tokens"] for cell in found), default=0)
    batches = [cell for cell in found if cell["tokens"] == first]
    title = "decoding, ms a token (fastest-slowest), share of the limit"
    return by_column(title, batches, "rows", lambda rows: f"B={rows}", milliseconds)


def context_table(cells: list[Entry]) -> str:
    single = [cell for cell in of_part(cells, "decode") if cell["rows"] == 1]
    if len({cell["tokens"] for cell in single}) < 2:
        return ""
    title = "decoding one row behind a prompt, ms a token (fastest-slowest), share of the limit"
    return by_column(title, single, "tokens", tokens, milliseconds)


def prefill_table(cells: list[Entry]) -> str:
    title = "time to the first token, ms (fastest-slowest), share of the limit"
    return by_column(title, of_part(cells, "prefill"), "tokens", tokens, milliseconds)


def long_table(cells: list[Entry]) -> str:
    found = of_part(cells, "long_prompt")
    if not found:
        return ""
    lengths = sorted({cell["tokens"] for cell in found})
    text = table_head("long prompts", list(map(tokens, lengths)))
    for model, row in rows_of(found, "tokens").items():
        shortest = next((row[length] for length in lengths if "error" not in row.get(length, {"error": ""})), None)
        lines: tuple[tuple[str, Callable[[Entry], str]], ...] = (
            ("µs a token", lambda cell: f"{per_token(cell):.2f}"),
            ("times the shortest's", lambda cell, one=shortest: f"{per_token(cell) / per_token(one):.2f}"),
            ("peak, GB", gigabytes),
            ("share of the limit", share),
        )
        for what, show in lines:
            text += table_row(f"{model}, {what}", [shown(row.get(length), show) for length in lengths])
    return text


def per_token(cell: Entry) -> float:
    """Microseconds."""
    return 1e6 * cell["median_s"] / cell["tokens"]


def training_table(cells: list[Entry]) -> str:
    found = of_part(cells, "training")
    if not found:
        return ""
    rows, length = found[0]["rows"], found[0]["tokens"]
    columns = ["tokens/s (slowest-fastest)", "times mamba_ssm", "share of the limit", "peak, GB"]
    text = table_head(f"training, {rows} x {length:,} tokens a step", columns)
    peers = {cell["shape"]: cell for cell in found if cell["model"] == "mamba_ssm" and "error" not in cell}
    for cell in found:
        if "error" in cell:
            text += table_row(label(cell), [FAILED, "", "", ""])
            continue
        count, peer = cell["rows"] * cell["tokens"], peers.get(cell["shape"])
        speed, low, high = (count / cell[name] for name in ("median_s", "slowest_s", "fastest_s"))
        ratio = "" if peer is None else f"{speed / peer['tokens_per_s']:.2f}"
        text += table_row(label(cell), [f"{speed:,.0f} ({low:,.0f}-{high:,.0f})", ratio, share(cell), gigabytes(cell)])
    return text


def failures(cells: list[Entry]) -> str:
    """What failed, and why, each reason once."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        if "error" in cell:
            reasons.setdefault((label(cell), cell["error"]), []).append(cell["part"])
    return "".join(f"- {model} ({', '.join(dict.fromkeys(parts))}): {error}\n" for (model, error), parts in reasons.items())


def gate_table(gate: list[Entry]) -> str:
    """The errors that were found before anything was timed, with those that were allowed."""
    checks = list(dict.fromkeys(check["name"] for entry in gate for check in entry.get("checks", ())))
    if not checks:
        return ""
    text = table_head("correctness gate: RMS ratio (allowed)", checks)
    for entry in gate:
        found = {check["name"]: check for check in entry.get("checks", ())}
        shown = [f"{found[name]['error']:.1e} ({found[name]['allowed']:.1e})" if name in found else "" for name in checks]
        verdict = "" if entry["passed"] else f", {FAILED}"
        text += table_row(f"{NAMES[entry['model']]} {entry['shape']}{verdict}", shown)
    return text


def footer(results: dict[str, Any]) -> str:
    """Where, with what and how all of this was measured."""
    about, ceilings, settings = results["environment"], results["ceilings"], results["settings"]
    versions = ", ".join(f"{name} {value}" for name, value in about.items() if value is not None and name != "device")
    copy, matmul = ceilings["copy"] / 1e12, ceilings["matmul"] / 1e12
    return (
        f"One {about['device']}, {settings['dtype']}, random weights, all in one process; medians of {settings['repeats']} "
        f"repeats. Limits follow from what this device reached in the same run: a copy {copy:.3g} TB/s, a matrix product "
        f"{matmul:.3g} TFLOP/s. {versions}.\n"
    )


def draw(results: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Draws what there is enough of for a line; returns the files."""
    good = [cell for cell in results["cells"] if "error" not in cell]
    drawn = []
    for shape in dict.fromkeys(cell["shape"] for cell in good):
        cells = [cell for cell in good if cell["shape"] == shape]
        reading = of_part(cells, "prefill") + of_part(cells, "long_prompt")
        decoding = of_part(cells, "decode")
        batches = [cell for cell in decoding if cell["tokens"] == min(cell["tokens"] for cell in decoding)]
        for kind, points, axis, values in (
            ("prefill", reading, "tokens", speed_axes),
            ("memory", [cell for cell in reading if cell["peak_bytes"] is not None], "tokens", memory_axes),
            ("decode", batches, "rows", batch_axes),
        ):
            if len({cell[axis] for cell in points}) > 1:
                drawn.append(folder / f"{name}_{kind}_{shape}.png")
                figure, axes = new_axes()
                values(axes, points)
                axes.legend(fontsize="small")
                save_figure(figure, drawn[-1])
    return drawn


def speed_axes(axes: Any, cells: list[Entry]) -> None:
    draw_lines(axes, cells, "tokens", per_token, lambda cell: 1e6 * cell["limit_s"] / cell["tokens"])
    axes.set(xlabel="prompt, tokens", ylabel="µs a token to the first token", yscale="log")
    set_length_ticks(axes, sorted({cell["tokens"] for cell in cells}))


def memory_axes(axes: Any, cells: list[Entry]) -> None:
    draw_lines(axes, cells, "tokens", lambda cell: cell["peak_bytes"] / 1e9)
    axes.set(xlabel="prompt, tokens", ylabel="peak memory, GB", ylim=(0, None))
    set_length_ticks(axes, sorted({cell["tokens"] for cell in cells}))


def batch_axes(axes: Any, cells: list[Entry]) -> None:
    draw_lines(axes, cells, "rows", lambda cell: 1000 * cell["median_s"], lambda cell: 1000 * cell["limit_s"])
    axes.set(xlabel="rows of the batch", ylabel="ms a token", yscale="log")
    rows = sorted({cell["rows"] for cell in cells})
    set_length_ticks(axes, rows, list(map(str, rows)))


def draw_lines(
    axes: Any,
    cells: list[Entry],
    column: str,
    value: Callable[[Entry], float],
    limit: Callable[[Entry], float] | None = None,
) -> None:
    """One line a model, and its limits dashed."""
    for model, row in rows_of(cells, column).items():
        points = [row[place] for place in sorted(row)]
        places = [point[column] for point in points]
        (line,) = axes.plot(places, [value(point) for point in points], marker="o", markersize=4, label=model)
        if limit is not None:
            axes.plot(places, [limit(point) for point in points], linestyle="--", linewidth=1, color=line.get_color())
    if limit is not None:
        axes.plot([], [], linestyle="--", linewidth=1, color="grey", label="limits")


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: beside each file")
    parser.add_argument("--tables-only", action="store_true", help="no pictures, which need matplotlib")
    arguments = parser.parse_args(words)
    names = [path.stem for path in arguments.results]
    if arguments.output is not None and len(set(names)) < len(names):
        parser.error("two of these files have the same name: give them one by one, each with its own --output.")
    try:
        everything = {path: read_results(path) for path in arguments.results}
    except ReportError as error:
        raise SystemExit(str(error)) from error
    for path, results in everything.items():
        folder = arguments.output or path.parent
        folder.mkdir(parents=True, exist_ok=True)
        text = markdown(results)
        temporary = folder / f"unfinished-{path.stem}.md"
        temporary.write_text(text)
        temporary.replace(folder / f"{path.stem}.md")
        print(text)
        if not arguments.tables_only:
            draw(results, folder, path.stem)


if __name__ == "__main__":
    main()
