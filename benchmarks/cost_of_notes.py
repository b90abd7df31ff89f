# SPDX-License-Identifier: Apache-2.0
"""What MemMamba costs beside a plain Mamba of the same width and depth: parameters, state, training step, reading, decoding.

    python benchmarks/cost_of_notes.py                          # the 130m shape; the accelerator if there is one
    python benchmarks/cost_of_notes.py --shape tiny --output benchmarks/results/cost_of_notes_tiny.json

Both have random weights, share mixer and kernels, and run in one process, taking turns; the plain Mamba is this package's.
Before any timing, MemMamba, whose readers start at zero, is compared with the plain Mamba of the same weights. bfloat16 on a
GPU (training under autocast, with AdamW), float32 elsewhere.

Decoding is measured as calls of the model (`decoding`), whose time on a GPU is that of launching kernels, and on a GPU as
`generate` does it as well, in captured steps (`decoding_captured`; not in files of earlier versions).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers import round_weights
from tqdm.auto import tqdm

from remamba_hf.evaluation.checkpoints import environment
from remamba_hf.evaluation.memory_tasks import cache_bytes
from remamba_hf.families import ALL_FAMILIES, FAMILIES
from remamba_hf.training.book_tokens import write_json

SHAPES = {
    "tiny": {"hidden_size": 256, "num_hidden_layers": 8, "vocab_size": 4096},
    "130m": {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50_280},
}
FEW_TOKENS = 8  # of the shorter answer, from whose time that of a longer one is counted


def build(shape: str, device: str) -> dict[str, Any]:
    """The two models on `device`, in float32, the plain one's weights in both."""
    settings = {**SHAPES[shape], "state_size": 16, "tie_word_embeddings": True, "eos_token_id": None}
    models = {}
    for name, family in (("plain", FAMILIES["remamba"]), ("memmamba", ALL_FAMILIES["memmamba"])):
        torch.manual_seed(0)
        models[name] = family.model_class(family.config_class(**settings)).to(device)
    weights = models["plain"].state_dict()
    _, extra = models["memmamba"].load_state_dict(weights, strict=False)
    if any(not name.startswith("backbone.compressor") and "adaptation" not in name for name in extra):
        raise RuntimeError(f"MemMamba lacks weights of Mamba: {extra}")
    return models


def options(name: str) -> dict[str, Any]:
    return {"compress_prompt": False} if name == "plain" else {}


@torch.no_grad()
def check(models: dict[str, Any], device: str) -> float:
    """The largest difference of the logits, relative to the largest logit.

    Raises:
        RuntimeError: they differ by more than rounding.
    """
    ids = torch.randint(0, models["plain"].config.vocab_size, (2, 500), device=device)
    plain, ours = (model.eval()(ids, **options(name)).logits for name, model in models.items())
    error = float((ours - plain).abs().max() / plain.abs().max())
    if not error < 1e-4:
        raise RuntimeError(
            f"MemMamba before training differs from its Mamba by {error:.1e}: no timing before that is mended"
        )
    return error


def timed(runs: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, dict[str, float]]:
    """Seconds of every run, in turns, after two that do not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in tqdm(range(-2, repeats), leave=False):
        for name, run in runs.items():
            synchronize(device)
            begin = time.perf_counter()
            run()
            synchronize(device)
            if repeat >= 0:
                times[name].append(time.perf_counter() - begin)
    return {
        name: {"median_s": statistics.median(taken), "fastest_s": min(taken), "slowest_s": max(taken)}
        for name, taken in times.items()
    }


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def training(models: dict[str, Any], rows: int, length: int, repeats: int, device: str) -> dict[str, Any]:
    """Whole steps: forward, backward, AdamW; with the tokens per second, and on a GPU the peak memory, of each."""
    cuda = device.startswith("cuda")
    ids = torch.randint(0, models["plain"].config.vocab_size, (rows, length), device=device)
    runs, peaks = {}, {}
    for name, model in models.items():
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-5, fused=cuda)

        def step(name: str = name, model: Any = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=cuda):
                model(ids, labels=ids, use_cache=False, **options(name)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        runs[name] = step
        if cuda:
            step()
            torch.cuda.reset_peak_memory_stats(device)
            step()
            peaks[name] = torch.cuda.max_memory_allocated(device)
    result = timed(runs, repeats, device)
    for name, entry in result.items():
        entry["tokens_per_s"] = rows * length / entry["median_s"]
        if cuda:
            entry["peak_bytes"] = peaks[name]
    return {"rows": rows, "length": length, **compared(result)}


@torch.no_grad()
def reading(models: dict[str, Any], length: int, repeats: int, device: str) -> dict[str, Any]:
    """A pass over one prompt, with the states it leaves."""
    ids = torch.randint(0, models["plain"].config.vocab_size, (1, length), device=device)
    runs = {
        name: lambda name=name, model=model: model(ids, use_cache=True, logits_to_keep=1, **options(name))
        for name, model in models.items()
    }
    return {"length": length, **compared(timed(runs, repeats, device))}


@torch.no_grad()
def decoding(models: dict[str, Any], rows: int, steps: int, repeats: int, device: str) -> dict[str, Any]:
    """Greedy steps behind a prompt of 256 tokens; seconds are those of one step. `state_bytes` of one row."""
    ids = torch.randint(0, models["plain"].config.vocab_size, (rows, 256), device=device)
    runs, state = {}, {}
    for name, model in models.items():
        output = model(ids, use_cache=True, logits_to_keep=1, **options(name))
        state[name] = cache_bytes(output.cache_params) // rows

        def run(name: str = name, model: Any = model, cache: Any = output.cache_params) -> None:
            token = ids[:, -1:]
            for _ in range(steps):
                token = model(token, cache_params=cache, **options(name)).logits[:, -1].argmax(-1, keepdim=True)

        runs[name] = run
    result = timed(runs, repeats, device)
    for name, entry in result.items():
        for key in ("median_s", "fastest_s", "slowest_s"):
            entry[key] /= steps
        entry["state_bytes"] = state[name]
    return {"rows": rows, "steps": steps, **compared(result)}


@torch.no_grad()
def decoding_captured(
    models: dict[str, Any], rows: int, steps: int, repeats: int, device: str, cuda_graph: bool = True
) -> dict[str, Any]:
    """Greedy steps of `generate` behind a prompt of 256 tokens; seconds are those of one step: of two lengths of the answer,
    the difference, so that neither the prompt nor a capture counts. Spreads are those of the longer.

    Args:
        cuda_graph: as for `generate`.
    """
    ids = torch.randint(0, models["plain"].config.vocab_size, (rows, 256), device=device)
    result = {}
    for name, model in models.items():
        settings = {"do_sample": False, "cuda_graph": cuda_graph, **options(name)}

        def run(tokens: int, model: Any = model, settings: dict[str, Any] = settings) -> None:
            model.generate(ids, max_new_tokens=tokens, **settings)

        result |= {name: lambda run=run: run(FEW_TOKENS + steps), f"{name}, few tokens": lambda run=run: run(FEW_TOKENS)}
    times = timed(result, repeats, device)
    each = {}
    for name in models:
        few = times[f"{name}, few tokens"]["median_s"]
        each[name] = {key: (taken - few) / steps for key, taken in times[name].items()}
    return {"rows": rows, "steps": steps, **compared(each)}


def compared(result: dict[str, Any]) -> dict[str, Any]:
    return {**result, "times_plain": result["memmamba"]["median_s"] / result["plain"]["median_s"]}


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="130m")
    parser.add_argument("--rows", type=int, default=16, help="of a training step")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row in training")
    parser.add_argument("--prompt", type=int, default=32_768, help="tokens of the prompt that is read")
    parser.add_argument("--decode-rows", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--steps", type=int, default=64, help="tokens decoded in a repeat; a chunk has 64")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cost_of_notes_130m.json"))
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    arguments = parse_arguments(words)
    models = build(arguments.shape, arguments.device)
    results: dict[str, Any] = {
        "shape": arguments.shape,
        "environment": environment(arguments.device),
        "parameters": {name: count_parameters(model) for name, model in models.items()},
        "largest_relative_logit_difference": check(models, arguments.device),
        "training_step": training(models, arguments.rows, arguments.length, arguments.repeats, arguments.device),
    }
    for model in models.values():
        model.zero_grad()
        model.eval()
        if arguments.device.startswith("cuda"):
            round_weights(model, torch.bfloat16)
    results["reading"] = reading(models, arguments.prompt, arguments.repeats, arguments.device)
    results["decoding"] = [
        decoding(models, rows, arguments.steps, arguments.repeats, arguments.device) for rows in arguments.decode_rows
    ]
    if arguments.device.startswith("cuda"):
        results["decoding_captured"] = [
            decoding_captured(models, rows, arguments.steps, arguments.repeats, arguments.device)
            for rows in arguments.decode_rows
        ]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output, results)
    print(f"{arguments.output}: training step {results['training_step']['times_plain']:.2f} times plain Mamba's")


def count_parameters(model: Any) -> int:
    """Without those that only compressing a prompt uses."""
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if "compressor" not in name and "adaptation" not in name
    )


if __name__ == "__main__":
    main()
