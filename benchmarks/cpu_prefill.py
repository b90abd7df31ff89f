# SPDX-License-Identifier: Apache-2.0
"""Prefill on the CPU, side by side with transformers' Mamba, and the memory that chunks need.

    python benchmarks/cpu_prefill.py --output benchmarks/results/cpu_prefill.json

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
from transformers import MambaForCausalLM

from remamba_hf import ReMambaConfig, ReMambaForCausalLM

SHAPE_130M = {"hidden_size": 768, "num_hidden_layers": 24, "state_size": 16, "vocab_size": 50_280}


def build(layers: int) -> tuple[ReMambaForCausalLM, MambaForCausalLM]:
    """Both models at the 130m shape with the same random weights."""
    torch.manual_seed(0)
    config = ReMambaConfig(**{**SHAPE_130M, "num_hidden_layers": layers})
    ours = ReMambaForCausalLM(config).eval()
    theirs = MambaForCausalLM(transformers.MambaConfig(**{**SHAPE_130M, "num_hidden_layers": layers})).eval()
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
def compare(length: int, layers: int, repeats: int) -> dict[str, Any]:
    """Whole passes and their parts."""
    ours, theirs = build(layers)
    ids = torch.randint(0, SHAPE_130M["vocab_size"], (1, length))
    expected = theirs(ids, logits_to_keep=1).logits
    error = ((ours(ids, logits_to_keep=1).logits - expected).abs().max() / expected.abs().max()).item()
    if error > 1e-4:
        raise RuntimeError(f"The plain pass differs from transformers' by {error:.1e}: no timing before that is mended.")
    runs: dict[str, Callable[[], Any]] = {
        "transformers_mamba": lambda: theirs(ids, logits_to_keep=1),
        "remamba_plain": lambda: ours(ids, logits_to_keep=1),
        "remamba_two_stages": lambda: ours(ids, logits_to_keep=1, compress_prompt=True),
    }
    rows: dict[str, Any] = {name: per_token(seconds(run, repeats), length, layers) for name, run in runs.items()}
    rows["parts_of_remamba_plain"] = parts(ours, length, repeats)
    plain = rows["remamba_plain"]["median_s"]
    rows["times_faster"] = round(rows["transformers_mamba"]["median_s"] / plain, 2)
    rows["largest_relative_logit_difference"] = error
    return rows


def parts(model: ReMambaForCausalLM, length: int, repeats: int) -> dict[str, float]:
    """ms per token of one layer's matrix products, its scan and its convolution, each alone: what limits the pass."""
    from remamba_hf.modeling.causal_convolution import causal_conv1d
    from remamba_hf.modeling.selective_scan import selective_scan

    mixer, config = model.backbone.layers[0].mixer, model.config
    inner, size, rank = config.intermediate_size, config.state_size, config.time_step_rank
    hidden, x = torch.randn(1, length, config.hidden_size), torch.randn(1, length, inner)
    low, dt = torch.randn(1, length, rank), torch.rand(1, length, inner) * 0.1
    B, C = torch.randn(2, 1, length, size)
    A = -torch.exp(mixer.A_log)
    runs = {
        "matrix_products": lambda: (mixer.in_proj(hidden), mixer.x_proj(x), mixer.dt_proj(low), mixer.out_proj(x)),
        "scan": lambda: selective_scan(x, dt, A, B, C, mixer.D, x),
        "convolution": lambda: causal_conv1d(x, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias),
    }
    return {name: round(1000 * statistics.median(seconds(run, repeats)) / length, 4) for name, run in runs.items()}


@torch.no_grad()
def peak_memory(length: int, chunk: int | None, layers: int) -> None:
    """Print the peak resident memory, in MB, of a two-stage prefill in this process and of the loaded model alone."""
    torch.manual_seed(0)
    model = ReMambaForCausalLM(ReMambaConfig(**{**SHAPE_130M, "num_hidden_layers": layers})).eval()
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


def memory_in_a_process(length: int, chunk: int | None, layers: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--memory-of", str(length), "--chunk", str(chunk or 0), "--layers", str(layers)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    return {"tokens": length, "chunk": chunk, **json.loads(answer.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu_prefill.json"))
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=SHAPE_130M["num_hidden_layers"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--memory-lengths", type=int, nargs="*", default=[8192, 65536])
    parser.add_argument("--only", choices=("speed", "memory"), help="measure one part and keep the other's results")
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        peak_memory(arguments.memory_of, arguments.chunk or None, arguments.layers)
        return

    result: dict[str, Any] = {
        "what": "CPU prefill, 130m shape, float32, batch 1",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "device": {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "tokens": arguments.length,
        "layers": arguments.layers,
    }
    if arguments.output.exists():  # a run of one part keeps the other, if it comes from the same machine and versions
        earlier = json.loads(arguments.output.read_text())
        if all(earlier.get(name) == value for name, value in result.items()):
            result = earlier
    if arguments.only != "memory":
        result["speed"] = compare(arguments.length, arguments.layers, arguments.repeats)
        print(json.dumps(result["speed"], indent=2))
    if arguments.only != "speed":
        result["memory"] = []
        for length in arguments.memory_lengths:
            for chunk in [arguments.chunk] if length > 16_384 else [None, arguments.chunk]:
                result["memory"].append(memory_in_a_process(length, chunk, arguments.layers))
                print(json.dumps(result["memory"][-1]))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = arguments.output.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(temporary, arguments.output)


if __name__ == "__main__":
    main()
