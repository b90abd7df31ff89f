# SPDX-License-Identifier: Apache-2.0
"""Prefill on the CPU, side by side with transformers' Mamba or Mamba-2, and the memory that chunks need.

    python benchmarks/cpu_prefill.py                     # writes benchmarks/results/cpu_prefill_remamba.json
    python benchmarks/cpu_prefill.py --family remamba2   # and cpu_prefill_remamba2.json

Both models have random weights of the 130m shape and the same inputs, in one process, one after the other. Before any
timing, the plain pass is compared with transformers'. The memory of the long prompts is the peak of a process of its own.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from remamba_hf.families import FAMILIES
from remamba_hf.modeling.causal_convolution import causal_conv1d
from remamba_hf.modeling.selective_scan import selective_scan
from remamba_hf.modeling.state_space_dual import state_space_dual

SHAPE_130M = {"hidden_size": 768, "vocab_size": 50_280, "tie_word_embeddings": True}
MIXERS = {
    "remamba": {"state_size": 16},
    "remamba2": {"state_size": 128, "num_heads": 24, "head_dim": 64, "n_groups": 1},
}
LAYERS = 24


def build(family: str, layers: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Our model and transformers' at the 130m shape with the same random weights."""
    torch.manual_seed(0)
    settings, classes = {**SHAPE_130M, **MIXERS[family], "num_hidden_layers": layers}, FAMILIES[family]
    ours = classes.model_class(classes.config_class(**settings)).eval()
    theirs = classes.plain_model_class(classes.plain_config_class(**settings)).eval()
    missing, _ = theirs.load_state_dict(ours.state_dict(), strict=False)
    if missing:
        raise RuntimeError(f"transformers' Mamba has weights that ours lacks: {missing}")
    return ours, theirs


def seconds(function: Callable[[], Any], repeats: int) -> list[float]:
    function()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return times


def per_token(times: list[float], length: int, layers: int) -> dict[str, float]:
    """Median and spread of a pass, and what a token costs in one layer."""
    median = statistics.median(times)
    return {
        "median_s": round(median, 4),
        "fastest_s": round(min(times), 4),
        "slowest_s": round(max(times), 4),
        "ms_per_token_and_layer": round(1000 * median / (length * layers), 4),
    }


@torch.no_grad()
def compare(family: str, length: int, layers: int, repeats: int) -> dict[str, Any]:
    """Whole passes and their parts."""
    ours, theirs = build(family, layers)
    ids = torch.randint(0, SHAPE_130M["vocab_size"], (1, length))
    expected = theirs(ids, logits_to_keep=1).logits
    error = ((ours(ids, logits_to_keep=1).logits - expected).abs().max() / expected.abs().max()).item()
    if error > 1e-4:
        raise RuntimeError(f"The plain pass differs from transformers' by {error:.1e}: no timing before that is mended.")
    runs: dict[str, Callable[[], Any]] = {
        "transformers": lambda: theirs(ids, logits_to_keep=1),
        "plain": lambda: ours(ids, logits_to_keep=1),
        "two_stages": lambda: ours(ids, logits_to_keep=1, compress_prompt=True),
    }
    rows: dict[str, Any] = {name: per_token(seconds(run, repeats), length, layers) for name, run in runs.items()}
    rows["parts_of_plain"] = PARTS[family](ours, length, repeats)
    plain = rows["plain"]["median_s"]
    rows["times_faster"] = round(rows["transformers"]["median_s"] / plain, 2)
    rows["largest_relative_logit_difference"] = error
    return rows


def parts_of_mamba(model: Any, length: int, repeats: int) -> dict[str, float]:
    """ms per token of one layer's matrix products, its scan and its convolution, each alone: what limits the pass."""
    mixer, config = model.backbone.layers[0].mixer, model.config
    inner, size, rank = config.intermediate_size, config.state_size, config.time_step_rank
    hidden, x = torch.randn(1, length, config.hidden_size), torch.randn(1, length, inner)
    low, dt = torch.randn(1, length, rank), torch.rand(1, length, inner) * 0.1
    B, C = torch.randn(2, 1, length, size)
    A = -torch.exp(mixer.A_log)
    runs: dict[str, Callable[[], Any]] = {
        "matrix_products": lambda: (mixer.in_proj(hidden), mixer.x_proj(x), mixer.dt_proj(low), mixer.out_proj(x)),
        "scan": lambda: selective_scan(x, dt, A, B, C, mixer.D, x),
        "convolution": lambda: causal_conv1d(x, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias),
    }
    return {name: round(1000 * statistics.median(seconds(run, repeats)) / length, 4) for name, run in runs.items()}


def parts_of_mamba2(model: Any, length: int, repeats: int) -> dict[str, float]:
    """Likewise of a Mamba-2 layer."""
    mixer, config = model.backbone.layers[0].mixer, model.config
    heads, size = config.num_heads, config.state_size
    hidden, y = torch.randn(1, length, config.hidden_size), torch.randn(1, length, config.intermediate_size)
    x, dt = y.unflatten(-1, (heads, -1)), torch.rand(1, length, heads) * 0.1
    B, C = torch.randn(2, 1, length, config.n_groups, size)
    xBC = torch.randn(1, length, mixer.conv1d.in_channels)
    A = -torch.exp(mixer.A_log)
    runs: dict[str, Callable[[], Any]] = {
        "matrix_products": lambda: (mixer.in_proj(hidden), mixer.out_proj(y)),
        "scan": lambda: state_space_dual(x, dt, A, B, C, mixer.D),
        "convolution": lambda: causal_conv1d(xBC, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias),
    }
    return {name: round(1000 * statistics.median(seconds(run, repeats)) / length, 4) for name, run in runs.items()}


PARTS = {"remamba": parts_of_mamba, "remamba2": parts_of_mamba2}


@torch.no_grad()
def peak_memory(family: str, length: int, chunk: int | None, layers: int) -> None:
    """Print the peak resident memory, in MB, of a two-stage prefill in this process and of the loaded model alone."""
    torch.manual_seed(0)
    config = FAMILIES[family].config_class(**{**SHAPE_130M, **MIXERS[family], "num_hidden_layers": layers})
    model = FAMILIES[family].model_class(config).eval()
    ids = torch.randint(0, SHAPE_130M["vocab_size"], (1, length))
    model(ids[:, :8])
    loaded = peak_resident_megabytes()
    begin = time.perf_counter()
    model(ids, compress_prompt=True, use_cache=True, logits_to_keep=1, prefill_chunk_length=chunk)
    taken = time.perf_counter() - begin
    peak = peak_resident_megabytes()
    print(json.dumps({"loaded_MB": round(loaded), "peak_MB": round(peak), "seconds": round(taken, 1)}))


def peak_resident_megabytes() -> float:
    """Of this program alone; what getrusage tells includes the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1024


def memory_in_a_process(family: str, length: int, chunk: int | None, layers: int) -> dict[str, Any]:
    settings = {"--family": family, "--memory-of": length, "--chunk": chunk or 0, "--layers": layers}
    command = [sys.executable, __file__, *(str(word) for setting in settings.items() for word in setting)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return {"tokens": length, "chunk": chunk, **json.loads(answer.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="remamba")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/cpu_prefill_FAMILY.json")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--memory-lengths", type=int, nargs="*", default=[8192, 65536])
    parser.add_argument("--only", choices=("speed", "memory"), help="measure one part and keep the other's results")
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    output = arguments.output or Path(f"benchmarks/results/cpu_prefill_{arguments.family}.json")
    if arguments.memory_of:
        peak_memory(arguments.family, arguments.memory_of, arguments.chunk or None, arguments.layers)
        return

    result: dict[str, Any] = {
        "what": "CPU prefill, 130m shape, float32, batch 1",
        "family": arguments.family,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "device": {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "tokens": arguments.length,
        "layers": arguments.layers,
    }
    if output.exists():  # a run of one part keeps the other, if it comes from the same machine and versions
        earlier = json.loads(output.read_text())
        if all(earlier.get(name) == value for name, value in result.items()):
            result = earlier
    if arguments.only != "memory":
        result["speed"] = compare(arguments.family, arguments.length, arguments.layers, arguments.repeats)
        print(json.dumps(result["speed"], indent=2))
    if arguments.only != "speed":
        result["memory"] = []
        for length in arguments.memory_lengths:
            for chunk in [arguments.chunk] if length > 16_384 else [None, arguments.chunk]:
                result["memory"].append(memory_in_a_process(arguments.family, length, chunk, arguments.layers))
                print(json.dumps(result["memory"][-1]))
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(temporary, output)


if __name__ == "__main__":
    main()
