# SPDX-License-Identifier: Apache-2.0
"""examples/finetune_lora.py in one process and in several, with each configuration of examples/accelerate: losses at the
same global batch, tokens a second, memory of each GPU.

    python benchmarks/finetune_parallel.py --processes 2      # writes benchmarks/results/finetune_parallel.json and .md
    python benchmarks/finetune_parallel.py --tiny             # whether the script runs: a CPU, one process and two with DDP

The model has random weights, the data is made: nothing is downloaded. Both are kept in --work. The output is rewritten after
every run, and the same command goes on from it. DeepSpeed's configurations are left out where it is not installed, all but
DDP where there are no GPUs.
"""

import argparse
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peers import SHAPES
from tqdm.auto import tqdm

from remamba_hf.evaluation.reporting import start_or_continue, table_head, table_row, utc_now, write_results, write_table
from remamba_hf.training.book_tokens import train_book_tokenizer

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "finetune_lora.py"
CONFIGURATIONS = ("one", "ddp", "fsdp2", "zero2", "zero3")
VOCABULARY = 512  # the tokenizer's; the model's is its shape's, but not smaller
LOGGED = ("loss", "kept", "grad_norm", "eval_loss")
TINY = dict(shape="tiny", tokens=160, steps=4, batch=4, rows=2, learning_rate=1e-3)


def made_pairs(count: int, tokens: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Lists of numbers, half as long as `tokens` to too long for it, which are cut."""
    draw = random.Random(seed)
    for _ in range(count):
        numbers = [str(draw.randrange(1000, 10_000)) for _ in range(draw.randrange(tokens // 10, tokens // 3))]
        yield {"prompt": f"Numbers: {' '.join(numbers)}.\nWhich came first?", "response": f" {numbers[0]}."}


def prepare(arguments: argparse.Namespace) -> Path:
    """A folder with `base`, `data.jsonl` and `held_out.jsonl`, made once."""
    held_out = 2 * arguments.processes * arguments.rows
    folder = arguments.work / f"{arguments.shape}-{arguments.tokens}-{arguments.batch * arguments.steps}-{held_out}"
    if folder.exists():
        return folder
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, count, seed in (("data", arguments.batch * arguments.steps, 0), ("held_out", held_out, 1)):
        lines = (json.dumps(pair) + "\n" for pair in made_pairs(count, arguments.tokens, seed))
        (partial / f"{name}.jsonl").write_text("".join(lines))
    texts = [pair["prompt"] for pair in made_pairs(20, arguments.tokens, seed=2)]
    train_book_tokenizer(texts, vocab_size=VOCABULARY).save_pretrained(partial / "base")
    family, settings = SHAPES[arguments.shape].family, SHAPES[arguments.shape].settings
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        config = family.config_class(**{**settings, "vocab_size": max(settings["vocab_size"], VOCABULARY)})
        model = family.model_class(config)
    model.to(torch.bfloat16 if torch.cuda.is_available() else torch.float32).save_pretrained(partial / "base")
    del model
    torch.cuda.empty_cache()  # the GPU is for the runs
    partial.rename(folder)
    return folder


def command(configuration: str, folder: Path, arguments: argparse.Namespace) -> list[str]:
    """What a user would type."""
    launcher = [sys.executable]
    if configuration != "one":
        launcher += [
            "-m",
            "accelerate.commands.launch",
            "--num_processes",
            str(arguments.processes),
            "--main_process_port",
            "0",
        ]
        launcher += ["--config_file", str(SCRIPT.parent / "accelerate" / f"{configuration}.yaml")]
    files = {"model": "base", "data": "data.jsonl", "eval-data": "held_out.jsonl", "output": f"runs/{configuration}"}
    paths = [f"--{option}={folder / file}" for option, file in files.items()]
    names = ("steps", "batch", "rows", "learning_rate", "dtype")
    settings = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in names]
    few = ["--logging-steps=1", f"--max-tokens={arguments.tokens}", f"--save-steps={arguments.steps}", "--workers=1"]
    answers = [f"--eval-rows={arguments.processes}", "--max-new-tokens=8"]
    checkpointing = ["--gradient-checkpointing"] if arguments.gradient_checkpointing else []
    return [*launcher, str(SCRIPT), *paths, *settings, *few, *answers, *checkpointing]


def why_left_out(configuration: str) -> str | None:
    if configuration.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed"
    if configuration not in ("one", "ddp") and not torch.cuda.is_available():
        return "needs GPUs"
    return None


def measure(configuration: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains, and reads what the example recorded."""
    if reason := why_left_out(configuration):
        return {"left_out": reason}
    output = folder / "runs" / configuration
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    environment = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **environment}
    if configuration == "one":
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    log = output / "log.txt"
    with log.open("w") as stream:
        words = command(configuration, folder, arguments)
        done = subprocess.run(words, env=environment, stdout=stream, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        errors = [line.strip() for line in log.read_text().splitlines() if "Error" in line]
        return {"error": (errors or [f"exit code {done.returncode}"])[-1][:300]}
    record = json.loads((output / "training.json").read_text())
    logged = {name: [entry[name] for entry in record["history"] if name in entry] for name in LOGGED}
    kept = ("processes", "launch", "device", "tokens_per_second", "step_peak_bytes", "peak_bytes", "versions")
    return {**{name: record[name] for name in kept}, **logged}


def compared(runs: dict[str, dict[str, Any]]) -> None:
    """Adds to each run how it differs from that of one process."""
    reference = runs.get("one", {})
    for run in runs.values():
        if "loss" in run and "loss" in reference:
            run["largest_loss_difference"] = max(abs(a - b) for a, b in zip(run["loss"], reference["loss"], strict=True))
            speeds = run["tokens_per_second"], reference["tokens_per_second"]
            run["throughput_ratio"] = speeds[0] / speeds[1] if all(speeds) else None


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    columns = ["processes", "tokens/s", "of one process", "first and last loss", "largest difference"]
    columns += ["peak of steps, GB a GPU", "peak with evaluation"]
    text = table_head("configuration", columns)
    for name, run in results["runs"].items():
        if "loss" not in run:
            told = f"left out: {run['left_out']}" if "left_out" in run else f"failed: {run['error']}"
            text += table_row(name, [told] + [""] * (len(columns) - 1))
            continue
        peaks = [", ".join(f"{peak / 1e9:.1f}" for peak in run[field] or ()) for field in ("step_peak_bytes", "peak_bytes")]
        ratio, difference = run.get("throughput_ratio"), run.get("largest_loss_difference")
        speed = run["tokens_per_second"]
        cells = ["" if speed is None else f"{speed:,.0f}", "" if ratio is None else f"{ratio:.2f}"]
        cells += [f"{run['loss'][0]:.4f}, {run['loss'][-1]:.4f}", "" if difference is None else f"{difference:.1e}"]
        text += table_row(name, [str(run["processes"]), *cells, *peaks])
    settings = ", ".join(f"{name} {value}" for name, value in results["settings"].items())
    found = next((run["versions"] for run in results["runs"].values() if "versions" in run), {})
    packages = ", ".join(f"{package} {version}" for package, version in found.items())
    return f"{text}\n{results['device']}; {packages}; {settings}.\n"


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=CONFIGURATIONS)
    parser.add_argument("--processes", type=int, default=2, help="of the configurations but `one`; one GPU each")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="2.8b")
    parser.add_argument("--tokens", type=int, default=6000, help="of a row at most")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=8, help="rows of a step, over all processes")
    parser.add_argument("--rows", type=int, default=1, help="rows that a process reads at once")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on GPUs")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "finetune_parallel", help="for model, data and runs")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "finetune_parallel.json")
    parser.add_argument("--tiny", action="store_true", help="a small model and short rows; give another --output as well")
    if "--tiny" in (sys.argv[1:] if words is None else words):
        parser.set_defaults(**TINY)
    arguments = parser.parse_args(words)
    arguments.dtype = arguments.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    if not arguments.tiny and torch.cuda.device_count() < arguments.processes:
        parser.error(f"there are fewer than {arguments.processes} GPUs: give --tiny to try the script out.")
    if arguments.processes < 2 or arguments.batch % (arguments.rows * arguments.processes):
        parser.error("--processes must be 2 at least, and --batch a multiple of --rows x --processes.")
    return arguments


def main(words: list[str] | None = None) -> None:
    arguments = parse_arguments(words)
    names = ("processes", "shape", "tokens", "steps", "batch", "rows", "learning_rate", "dtype", "gradient_checkpointing")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    header = {"device": device, "settings": {name: getattr(arguments, name) for name in names}}
    try:
        results = start_or_continue(arguments.output, header, {"started": utc_now(), "runs": {}})
    except ValueError as error:
        raise SystemExit(str(error)) from error
    folder = prepare(arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    for configuration in tqdm(arguments.configurations, unit="run"):
        if "loss" in results["runs"].get(configuration, {}):
            continue
        results["runs"][configuration] = measure(configuration, folder, arguments)
        compared(results["runs"])
        write_results(arguments.output, results)
        write_table(arguments.output.with_suffix(".md"), table(results))
    print(table(results))


if __name__ == "__main__":
    main()
