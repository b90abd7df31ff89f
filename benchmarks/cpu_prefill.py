# SPDX-License-Identifier: Apache-2.0
"""Prefill and decoding on the CPU, side by side with transformers' Mamba or Mamba-2, and the memory that chunks need.

    python benchmarks/cpu_prefill.py                     # writes benchmarks/results/cpu_prefill_remamba.json
    python benchmarks/cpu_prefill.py --family remamba2   # and cpu_prefill_remamba2.json
    python benchmarks/cpu_prefill.py --only decoding     # adds decoding to a file of the same machine and versions

Both models have random weights of the 130m shape and the same inputs, in one process, one after the other. Before any
timing, the plain pass and the generated tokens are compared with transformers'. Decoding is greedy `generate`: the time of
2n tokens less that of n, by n, in which reading the prompt cancels out; once more with the step compiled. The memory of the
long prompts is the peak of a process of its own.
"""

import argparse
import copy
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CompileConfig, PreTrainedModel

from remamba_hf.families import FAMILIES
from remamba_hf.modeling.causal_convolution import causal_conv1d
from remamba_hf.modeling.selective_scan import selective_scan
from remamba_hf.modeling.state_space_dual import state_space_dual

SHAPE_130M = {"hidden_size": 768, "vocab_size": 50_280, "tie_word_embeddings": True}
MIXERS = {
    "remamba": {"state_size": 16},
    "remamba2": {"state_size": 128, "num_heads": 24, "head_dim": 64, "n_groups": 1},
}
# A decoding step has no chunks, but transformers' Mamba-2 pads every prompt to a whole one: of 256 tokens, reading would
# take as long as many steps, and its fluctuations would drown them.
SHORT_CHUNKS = {"remamba": {}, "remamba2": {"chunk_size": 16}}
LAYERS = 24
PARTS_OF_A_RUN = ("speed", "decoding", "memory")
LARGEST_ERROR = 1e-4  # of logits in float32, relative to the largest


def build(family: str, layers: int, **others: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Our model and transformers' at the 130m shape with the same random weights; `others`: of their configurations."""
    torch.manual_seed(0)
    settings, classes = {**SHAPE_130M, **MIXERS[family], "num_hidden_layers": layers, **others}, FAMILIES[family]
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
    if error > LARGEST_ERROR:
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


def step_compiled(backend: str) -> dict[str, Any]:
    """Arguments of `generate` that compile its decoding step, and not the reading of the prompt.

    Compiling `model.forward` would do both, and again for prompts of other lengths. transformers compiles the step alone
    where the cache is a static one, but on a CPU only if it is told that it may.
    """
    config = CompileConfig(backend=backend, mode="default" if backend == "inductor" else None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


@contextmanager
def nothing_compiled_yet() -> Iterator[None]:
    """Compilers remember nothing, neither in this process nor on disk, so that they can be timed."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    torch.compiler.reset()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            yield
        finally:
            torch.compiler.reset()
            os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
            if before is not None:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def start_of_compiler(backend: str) -> float:
    """Seconds until a compiler is ready, its headers included: otherwise the first model to compile would pay for all."""
    begin = time.perf_counter()
    torch.compile(torch.nn.Softplus(), backend=backend)(torch.ones(64))
    return round(time.perf_counter() - begin, 1)


def rounding_of_float32(model: Any, answer: Any, columns: int) -> float:
    """What float32 changes of the logits of an answer of `generate`: the largest difference to float64's of the same
    tokens, relative to a token's largest logit."""
    exact = copy.deepcopy(model).double()
    logits = exact(answer.sequences[:, :-1]).logits[:, columns - 1 :]
    found = torch.stack(answer.logits, dim=1).double()
    return ((found - logits).abs().amax(-1) / logits.abs().amax(-1)).max().item()


def agreement(expected: Any, actual: Any, columns: int, rounding: float = 0.0) -> dict[str, Any]:
    """Whether two answers of `generate` have the same tokens behind the prompt's `columns`.

    Rows may part where two tokens are equally likely but for rounding. So the logits are compared, of every row up to the
    first token that differs: until then both have read the same.

    Args:
        expected, actual: with `sequences` [B, columns + n] and `logits`, n times [B, V].
        rounding: what float32 changes of one of them; twice that is allowed if it is more than `LARGEST_ERROR`.

    Raises:
        RuntimeError: logits differ by more than rounding.
    """
    same = expected.sequences[:, columns:] == actual.sequences[:, columns:]
    read_alike = torch.cat([torch.ones_like(same[:, :1]), same[:, :-1]], dim=1).cumprod(1).bool()
    logits, others = torch.stack(expected.logits, dim=1), torch.stack(actual.logits, dim=1)
    difference = (others - logits).abs().amax(-1) / logits.abs().amax(-1)
    error = difference[read_alike].max().item()
    if not error <= max(LARGEST_ERROR, 2 * rounding):
        raise RuntimeError(
            f"Generated tokens come from logits that differ by {error:.1e}: no timing of decoding before that is mended."
        )
    firsts = [[row, int(wrong.nonzero()[0])] for row, wrong in enumerate(~same) if wrong.any()]
    return {"same_tokens": not firsts, "first_differences": firsts, "largest_relative_logit_difference": error}


@torch.no_grad()
def compare_decoding(
    family: str, rows: Sequence[int], columns: int, tokens: int, layers: int, repeats: int, backend: str
) -> dict[str, Any]:
    """Milliseconds a token of greedy `generate`, for each number of rows."""
    ours, theirs = build(family, layers, **SHORT_CHUNKS[family])
    for model in (ours, theirs):
        model.generation_config.eos_token_id = None  # every answer has as many tokens as are asked for
    weights = sum(parameter.nbytes for parameter in theirs.parameters())
    with nothing_compiled_yet():
        start = start_of_compiler(backend)
        results = [decoding(ours, theirs, batch, columns, tokens, repeats, backend) for batch in rows]
    return {
        "what": "greedy generate; ms a token: the time of 2n tokens less that of n, by n",
        "prompt": columns,
        "n": tokens,
        "repeats": repeats,
        "compiled": f"torch.compile of the step alone, backend {backend}",
        "start_of_compiler_s": start,
        "weights_MB": round(weights / 1e6, 1),
        "rows": results,
    }


def decoding(ours: Any, theirs: Any, rows: int, columns: int, tokens: int, repeats: int, backend: str) -> dict[str, Any]:
    """Both models on the same `rows` prompts, as they are and with compiled steps."""
    ids = torch.randint(0, theirs.config.vocab_size, (rows, columns))
    mask = torch.ones_like(ids)  # otherwise transformers takes the ids that pads would have for pads
    plain, compiled = {"compress_prompt": False}, step_compiled(backend)
    models: dict[str, tuple[Any, dict[str, Any]]] = {
        "transformers": (theirs, {}),
        "plain": (ours, plain),
        "transformers_compiled": (theirs, compiled),
        "plain_compiled": (ours, {**plain, **compiled}),
    }

    def answer(name: str, length: int, **settings: Any) -> Any:
        model, others = models[name]
        return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=length, **others, **settings)

    def taken(name: str, length: int) -> float:
        begin = time.perf_counter()
        answer(name, length)
        return time.perf_counter() - begin

    result: dict[str, Any] = {"rows": rows}
    torch.compiler.reset()  # else what was compiled for other rows is compiled anew for any number of them
    for name, (model, settings) in models.items():  # also the first call, which compiles
        first = taken(name, tokens)
        if "compile_config" in settings:
            if "_compiled_call" not in vars(model):
                raise RuntimeError("transformers has compiled no step: its conditions for that must have changed.")
            result[name] = {"compilation_s": round(first - taken(name, tokens), 1)}
        else:
            result[name] = {}
    whole = {name: answer(name, 2 * tokens, return_dict_in_generate=True, output_logits=True) for name in models}
    expected = whole.pop("transformers")
    rounding = rounding_of_float32(theirs, expected, columns)
    result["rounding_of_float32"] = rounding
    for name, actual in whole.items():
        result[name]["beside_transformers"] = agreement(expected, actual, columns, rounding)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats):  # taking turns, so that a busy machine slows all of them
        for name, taken_so_far in times.items():
            short = taken(name, tokens)
            taken_so_far.append(1000 * (taken(name, 2 * tokens) - short) / tokens)
    for name, milliseconds in times.items():
        result[name] = {
            "median_ms": round(statistics.median(milliseconds), 3),
            "fastest_ms": round(min(milliseconds), 3),
            "slowest_ms": round(max(milliseconds), 3),
            **result[name],
        }
    return result


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


def require_compiler(backend: str) -> None:
    """Raise, before any work, where the step could not be compiled."""
    if backend == "inductor" and not shutil.which(os.environ.get("CXX", "g++")):
        raise SystemExit(
            "The inductor compiles with g++, or what CXX names, and finds none. Install it, or --backend aot_eager."
        )


def write(result: dict[str, Any], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(temporary, output)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(FAMILIES), default="remamba")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/cpu_prefill_FAMILY.json")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--memory-lengths", type=int, nargs="*", default=[8192, 65536])
    parser.add_argument("--only", choices=PARTS_OF_A_RUN, help="measure one part and keep the others' results")
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--decode-rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--decode-prompt", type=int, default=16, help="tokens of the prompt before decoding")
    parser.add_argument("--decode-tokens", type=int, default=32, help="n: answers of n and of 2n tokens are timed")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    torch.set_num_threads(arguments.threads)
    output = arguments.output or Path(f"benchmarks/results/cpu_prefill_{arguments.family}.json")
    if arguments.memory_of:
        peak_memory(arguments.family, arguments.memory_of, arguments.chunk or None, arguments.layers)
        return
    parts = [arguments.only] if arguments.only else PARTS_OF_A_RUN
    if "decoding" in parts:
        require_compiler(arguments.backend)

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
    if output.exists():  # a run of one part keeps the others, if they come from the same machine and versions
        earlier = json.loads(output.read_text())
        if all(earlier.get(name) == value for name, value in result.items()):
            result = earlier
    if "speed" in parts:
        result["speed"] = compare(arguments.family, arguments.length, arguments.layers, arguments.repeats)
        print(json.dumps(result["speed"], indent=2))
        write(result, output)
    if "decoding" in parts:
        result["decoding"] = compare_decoding(
            arguments.family,
            arguments.decode_rows,
            arguments.decode_prompt,
            arguments.decode_tokens,
            arguments.layers,
            arguments.repeats,
            arguments.backend,
        )
        print(json.dumps(result["decoding"], indent=2))
        write(result, output)
    if "memory" in parts:
        result["memory"] = []
        for length in arguments.memory_lengths:
            for chunk in [arguments.chunk] if length > 16_384 else [None, arguments.chunk]:
                result["memory"].append(memory_in_a_process(arguments.family, length, chunk, arguments.layers))
                print(json.dumps(result["memory"][-1]))
        write(result, output)


if __name__ == "__main__":
    main()
