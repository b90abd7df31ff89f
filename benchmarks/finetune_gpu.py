# SPDX-License-Identifier: Apache-2.0
"""A step of the paper's fine-tuning on one GPU, LoRA at 6,000 tokens a row, beside transformers' model with the same LoRA.

    python benchmarks/finetune_gpu.py                             # writes benchmarks/results/finetune_gpu.json and .md
    python benchmarks/finetune_gpu.py --device cpu --shape tiny   # whether the script runs, without a GPU

The base is frozen in bfloat16, what is trained is float32 (`add_lora`), the forward runs under autocast. Random weights;
most of a row is prompt. PEFT refuses LoRA on out_proj of transformers' Mamba, whose kernels would read around the adapter:
that model is timed without it. The output is rewritten after every measurement, and the same command goes on from it.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peers import OWN, SHAPES, Lineup, release
from run_gpu import FEWEST_REPEATS, OPTIONS, SIZES, Bench, code_digest, in_one_line, spread, versions
from tqdm.auto import tqdm

from remamba_hf.evaluation.reporting import start_or_continue, write_results, write_table
from remamba_hf.training.lora import FULLY_TRAINED, LORA_TARGETS, add_lora, remamba_lora_config

WHAT = "benchmarks/finetune_gpu.py"
RESPONSE_SHARE = 64  # a row's last 64th is its response
WITHOUT_OUT_PROJ = [name for name in LORA_TARGETS if name != "out_proj"]


class Cell(NamedTuple):
    """model: of `peers.SHAPES`; variant: "plain" or "two_stages"; checkpointing: gradient checkpointing."""

    shape: str
    model: str
    variant: str
    checkpointing: bool
    rows: int
    tokens: int

    @property
    def in_words(self) -> str:
        how = "checkpointed" if self.checkpointing else "all kept"
        return f"{self.shape} {self.model} {self.variant}, {how}, {self.rows} x {self.tokens}"


def cells(shape: str, rows: int, tokens: int) -> list[Cell]:
    """Ours in two stages and in one, and transformers' model, each with gradient checkpointing and without."""
    own = SHAPES[shape].models[0]
    contenders = ((own, "two_stages"), (own, "plain"), ("transformers", "plain"))
    return [
        Cell(shape, *contender, checkpointing, rows, tokens) for contender in contenders for checkpointing in (True, False)
    ]


def with_recipe(model: Any, shape: str) -> Any:
    """The model with the paper's adapters, or with as many of them as PEFT lets transformers' models have."""
    if model.config.model_type in OWN:
        return add_lora(model)
    family = SHAPES[shape].family
    whole = [name for name in FULLY_TRAINED[family.model_type] if name == "dt_proj"]
    recipe = dict(target_modules=WITHOUT_OUT_PROJ, modules_to_save=whole or None)
    return add_lora(model, remamba_lora_config(family.config_class(), **recipe))


def measure(cell: Cell, bench: Bench) -> dict[str, Any]:
    """Whole steps: forward, backward, AdamW. Seconds, bytes, and how many adapters have an effect."""
    release(bench.device)
    before = bench.allocated()
    lineup = Lineup(cell.shape, bench.device, bench.dtype)
    contender = lineup.load(cell.model)
    del lineup  # transformers' model shares its weights
    model = with_recipe(contender.model, cell.shape).train()
    if cell.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    contender.model = model
    ids = bench.random_ids(cell.rows, cell.tokens, model.config.vocab_size)
    prompt = cell.tokens - cell.tokens // RESPONSE_SHARE
    labels = ids.masked_fill(torch.arange(cell.tokens, device=ids.device) < prompt, -100)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-5, weight_decay=0.1, fused=bench.on_gpu)

    def backward() -> None:
        with torch.autocast(bench.device.split(":")[0], torch.bfloat16, enabled=bench.on_gpu):
            loss = contender.loss(ids, labels, **OPTIONS.get(cell.variant, {}))
        loss.backward()

    def step() -> None:
        backward()
        optimizer.step()
        optimizer.zero_grad()

    active, adapters = active_adapters(model, backward)
    samples, most = bench.timed(step)
    median = statistics.median(samples)
    return {
        "median_s": median,
        **spread(samples),
        "tokens_per_s": cell.rows * cell.tokens / median,
        "peak_bytes": None if most is None else most - before,
        "trained": sum(parameter.numel() for parameter in trained),
        "active_adapters": active,
        "adapters": adapters,
    }


def active_adapters(model: Any, backward: Callable[[], None]) -> tuple[int, int]:
    """How many of LoRA's adapters get a gradient where they start at zero, and how many there are."""
    backward()
    zeros = ("lora_B.", "lora_embedding_A.")
    gradients = [weight.grad for name, weight in model.named_parameters() if any(part in name for part in zeros)]
    model.zero_grad()
    return sum(gradient is not None and bool(gradient.any()) for gradient in gradients), len(gradients)


def table(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| model | gradients | tokens/s (slowest-fastest) | peak, GB | adapters with an effect |",
        "|---|---|---|---|---|",
    ]
    for cell in found:
        model = {"two_stages": "two stages", "plain": "one pass"}[cell["variant"]]
        start = f"| {cell['shape']} {cell['model']}, {model} | {'checkpointed' if cell['checkpointing'] else 'all kept'} "
        if "error" in cell:
            lines.append(f"{start}| failed: {cell['error']} | | |")
            continue
        count = cell["rows"] * cell["tokens"]
        speeds = [count / cell[name] for name in ("median_s", "slowest_s", "fastest_s")]
        peak = "" if cell["peak_bytes"] is None else f"{cell['peak_bytes'] / 1e9:.1f}"
        speed = f"{speeds[0]:,.0f} ({speeds[1]:,.0f}-{speeds[2]:,.0f})"
        lines.append(f"{start}| {speed} | {peak} | {cell['active_adapters']} of {cell['adapters']} |")
    return "\n".join(lines) + "\n"


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="2.8b")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=6000, help="of a row")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/finetune_gpu.json"))
    parser.add_argument("--repeats", type=int, default=FEWEST_REPEATS)
    parser.add_argument("--cell-seconds", type=float, default=120, help="what would take longer is recorded as too slow")
    arguments = parser.parse_args(words)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device: give --device cpu --shape tiny to try the script out.")
    if min(arguments.rows, arguments.tokens // RESPONSE_SHARE) < 1:
        parser.error(f"--rows must be at least 1, --tokens at least {RESPONSE_SHARE}.")
    return arguments


def main(words: list[str] | None = None) -> None:
    arguments = parse_arguments(words)
    transformers.logging.set_verbosity_error()
    dtype = torch.bfloat16 if arguments.device.startswith("cuda") else torch.float32
    bench = Bench(arguments.device, dtype, SIZES["quick"], arguments.repeats, 0.0, arguments.cell_seconds)
    header = {
        "what": WHAT,
        "settings": {"dtype": str(dtype).removeprefix("torch."), "repeats": arguments.repeats},
        "environment": versions(arguments.device),
        "code": code_digest(),
    }
    try:
        results = start_or_continue(arguments.output, header, {"cells": []})
    except (OSError, ValueError) as error:
        raise SystemExit(f"Cannot go on from {arguments.output}: {error}.") from error
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    done = {tuple(entry[field] for field in Cell._fields) for entry in results["cells"]}
    left = [cell for cell in cells(arguments.shape, arguments.rows, arguments.tokens) if tuple(cell) not in done]
    for cell in tqdm(left, desc="fine-tuning steps"):
        tqdm.write(cell.in_words)
        try:
            outcome = measure(cell, bench)
        except Exception as failure:  # out of memory, or a peer that is missing
            outcome = {"error": in_one_line(failure)}
        results["cells"].append({**cell._asdict(), **outcome})
        write_results(arguments.output, results)
    text = table(results["cells"])
    write_table(arguments.output.with_suffix(".md"), text)
    print(text)


if __name__ == "__main__":
    main()
