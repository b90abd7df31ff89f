# SPDX-License-Identifier: Apache-2.0
"""Decoding, prefill, long prompts and training on one GPU, beside mamba_ssm, transformers' models and a Llama.

    python benchmarks/run_gpu.py --quick                     # writes benchmarks/results/gpu_quick.json
    python benchmarks/run_gpu.py --full --parts long_prompt  # every other part likewise; all go into gpu_full.json
    python benchmarks/run_gpu.py --device cpu --shape tiny   # whether the script runs, without a GPU
    python benchmarks/report.py benchmarks/results/gpu_quick.json

One process, random weights that all contenders of a shape share (see peers.py), public interfaces only. First of all the
gate: this package's models in the timed dtype against float32 without kernels, and every peer's logits against ours.
Nothing is timed if ours fail; a peer that is missing, fails or computes something else is recorded with its error.

The output is rewritten after every measurement, and the same command goes on from it, with the same code, settings,
versions and device only.
"""

import argparse
import copy
import hashlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peers import (
    OWN,
    SHAPES,
    Contender,
    Lineup,
    LlamaContender,
    build_memmamba,
    bytes_read,
    multiplied_weights,
    release,
    round_weights,
)
from torch import nn
from tqdm.auto import tqdm

import remamba_hf
from remamba_hf.evaluation.checkpoints import environment
from remamba_hf.evaluation.reporting import start_or_continue
from remamba_hf.modeling.optional_kernels import without_kernels
from remamba_hf.training.book_tokens import write_json

WHAT = "benchmarks/run_gpu.py"
PARTS = ("gate", "decode", "prefill", "long_prompt", "training")
PACKAGES = ("mamba-ssm", "causal-conv1d", "triton", "peft")
SPAN, RATIO = 0.18, 0.009  # p and rho of the two stages, the paper's for LongBench
LORA_RANK = 8
# What `generate` and `forward` of this package's models are given besides, by variant.
OPTIONS: dict[str, dict[str, Any]] = {
    "two_stages": {"compress_prompt": True, "compression_span": SPAN, "compression_ratio": RATIO},
    "narrow_state": {"state_dtype": torch.bfloat16},
}
FEWEST_REPEATS = 5
SHORT_SECONDS = 2.0  # what is over sooner warms up twice
FEW_TOKENS, MOST_TOKENS = 4, 512  # decoded in a sample: as many as take `sample_seconds`
SLOW_TO_DECODE = ("transformers", "llama")  # without graphs; a quick run leaves some of their batches out

# The gate. Errors are RMS ratios, rms(x - reference) / rms(reference).
MOST_TIMES_TORCH = 2.0  # in bfloat16 the kernels may err as many times what plain torch does
LARGEST_ERROR = {torch.bfloat16: 0.1, torch.float32: 1e-3}
LARGEST_PEER_ERROR = {torch.bfloat16: 0.1, torch.float32: 1e-3}  # another computation or layout gives about 1
# A logit of those that win is off by some four deviations, and so is the one that should have won.
REGRETS_PER_ERROR = 10.0
Reference = Callable[..., Any]  # the `forward` that answers are compared with


class Sizes(NamedTuple):
    """What a run times.

    shapes: unless others are asked for; of peers.SHAPES.
    decode_rows: batches that are decoded, and those of `SLOW_TO_DECODE`.
    narrow_states: whether the largest batch is decoded with its state in bfloat16 as well; needs a GPU.
    decode_prompts: lengths of the prompts behind which one row is decoded; batches have the first.
    prefill_shapes, prefill_lengths: one prompt each.
    long_lengths: of the prompts that only this package's compressing model reads.
    training: shape, rows, tokens of a row.
    gate_layers, gate_tokens, gate_steps: of the models and inputs that are compared.
    """

    shapes: tuple[str, ...]
    decode_rows: tuple[int, ...]
    decode_rows_if_slow: tuple[int, ...]
    decode_prompts: tuple[int, ...]
    prefill_shapes: tuple[str, ...]
    prefill_lengths: tuple[int, ...]
    long_shapes: tuple[str, ...]
    long_lengths: tuple[int, ...]
    training: tuple[tuple[str, int, int], ...]
    narrow_states: bool = True
    gate_layers: int = 4
    gate_tokens: int = 600
    gate_steps: int = 16
    copied_bytes: int = 2 << 30
    matrix_size: int = 8192


SIZES = {
    "quick": Sizes(
        shapes=("2.8b", "2.7b", "130m"),
        decode_rows=(1, 16, 64),
        decode_rows_if_slow=(1, 64),
        decode_prompts=(32,),
        prefill_shapes=("2.8b", "2.7b"),
        prefill_lengths=(6144, 32_768),
        long_shapes=("2.8b",),
        long_lengths=(32_768, 65_536),
        training=(("130m", 16, 2048),),
    ),
    "full": Sizes(
        shapes=("2.8b", "2.7b", "130m"),
        decode_rows=(1, 4, 16, 64),
        decode_rows_if_slow=(1, 4, 16, 64),
        decode_prompts=(32, 32_768),
        prefill_shapes=("2.8b", "2.7b", "130m"),
        prefill_lengths=(2048, 6144, 16_384, 32_768),
        long_shapes=("2.8b",),
        long_lengths=tuple(2**power for power in range(15, 21)),
        training=(("130m", 16, 2048),),
    ),
    "tiny": Sizes(
        shapes=("tiny", "tiny2"),
        decode_rows=(1, 3),
        decode_rows_if_slow=(1,),
        decode_prompts=(8, 40),
        prefill_shapes=("tiny", "tiny2"),
        prefill_lengths=(48, 96),
        long_shapes=("tiny",),
        long_lengths=(64, 128),
        training=(("tiny", 2, 64),),
        narrow_states=False,
        gate_layers=2,
        gate_tokens=96,
        gate_steps=4,
        copied_bytes=1 << 20,
        matrix_size=128,
    ),
}


class Cell(NamedTuple):
    """One measurement.

    part: of PARTS.
    variant: "plain", or of this package's models "two_stages", "narrow_state" or "lora".
    rows: of the batch.
    tokens: of every row's prompt, or of its text in training.
    """

    part: str
    shape: str
    model: str
    variant: str
    rows: int
    tokens: int

    @property
    def in_words(self) -> str:
        return f"{self.part} {self.shape} {self.model} {self.variant}, {self.rows} x {self.tokens}"


def cells(sizes: Sizes, shapes: Iterable[str], parts: Iterable[str]) -> list[Cell]:
    """What is to be timed, by shape and model, so that each is built once for inference and once for training."""
    wanted: list[Cell] = []
    for shape in shapes:
        for model in SHAPES[shape].models:
            wanted += _inference_cells(sizes, shape, model)
        for training_shape, rows, tokens in sizes.training:
            if training_shape == shape:
                wanted += _training_cells(shape, rows, tokens)
    return [cell for cell in wanted if cell.part in parts]


def _inference_cells(sizes: Sizes, shape: str, model: str) -> Iterator[Cell]:
    compresses = model == SHAPES[shape].family.model_type
    if shape in sizes.prefill_shapes:
        for variant in ("plain", "two_stages") if compresses else ("plain",):
            for length in sizes.prefill_lengths:
                yield Cell("prefill", shape, model, variant, 1, length)
    if shape in sizes.long_shapes and compresses:
        for length in sizes.long_lengths:
            yield Cell("long_prompt", shape, model, "two_stages", 1, length)
    first, *others = sizes.decode_prompts
    for rows in sizes.decode_rows_if_slow if model in SLOW_TO_DECODE else sizes.decode_rows:
        yield Cell("decode", shape, model, "plain", rows, first)
    if sizes.narrow_states and compresses:
        yield Cell("decode", shape, model, "narrow_state", max(sizes.decode_rows), first)
    for prompt in others:
        yield Cell("decode", shape, model, "plain", 1, prompt)


def _training_cells(shape: str, rows: int, tokens: int) -> Iterator[Cell]:
    for model in SHAPES[shape].models:
        if model == SHAPES[shape].family.model_type:
            for variant in ("plain", "two_stages", "lora"):
                yield Cell("training", shape, model, variant, rows, tokens)
        elif model in ("mamba_ssm", "transformers"):
            yield Cell("training", shape, model, "plain", rows, tokens)


class Ceilings(NamedTuple):
    """What the device does at best, measured in the same run.

    copy: bytes read and written a second by a copy within its memory.
    matmul: floating-point operations a second of a large square matrix product in the timed dtype.
    """

    copy: float
    matmul: float


NO_CEILINGS = Ceilings(copy=float("nan"), matmul=float("nan"))  # before they are measured


def passes(span: float = SPAN, ratio: float = RATIO) -> float:
    """How many times the two stages read a prompt: all of it, then all but what was dropped of its window."""
    return 1 + (1 - span + span * ratio)


def decoding_limit(contender: Contender, rows: int, state_bytes: int, context: float, ceilings: Ceilings) -> float:
    """Seconds of a step that only moves its bytes: weights once; of every row the state in and out, and what it keeps of a
    context of so many tokens, in."""
    moved = 2 * state_bytes + contender.context_bytes() * context
    return (bytes_read(contender.model) + rows * moved) / ceilings.copy


def prefill_limit(contender: Contender, tokens: int, variant: str, ceilings: Ceilings) -> float:
    """Seconds of the matrix products of the layers alone, and of an attention model's scores and sums over the past."""
    operations = 2 * multiplied_weights(contender.model) * tokens * (passes() if variant == "two_stages" else 1)
    if isinstance(contender, LlamaContender):
        config = contender.model.config
        operations += 2 * config.num_hidden_layers * config.hidden_size * tokens**2  # half of all pairs
    return operations / ceilings.matmul


def training_limit(model: nn.Module, tokens: int, variant: str, prompt_share: float, ceilings: Ceilings) -> float:
    """Seconds of a step's matrix products: forward, and as much again for the gradients of inputs, and of weights, which
    LoRA does without.

    Args:
        tokens: of all rows.
        prompt_share: of these, that are prompts and read by the first of two stages too.
    """
    read = 1 + prompt_share * (passes() - 1) if variant == "two_stages" else 1.0
    weights = multiplied_weights(model) * read + model.lm_head.weight.numel()
    return (2 if variant == "lora" else 3) * 2 * weights * tokens / ceilings.matmul


@dataclass
class Bench:
    """Where and how often things are timed.

    repeats: that count, after warming up.
    sample_seconds: that a sample of decoding should take.
    cell_seconds: what takes longer is not repeated, and recorded as too slow.
    """

    device: str
    dtype: torch.dtype
    sizes: Sizes
    repeats: int
    sample_seconds: float
    cell_seconds: float
    ceilings: Ceilings = NO_CEILINGS

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def seconds(self, run: Callable[[], Any]) -> float:
        """Of one run, by the clock of whoever waits for it."""
        self.synchronize()
        begin = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - begin

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.on_gpu else 0

    def repeated(self, run: Callable[[], float], expected: float) -> tuple[list[float], int | None]:
        """Results of `run`, which takes about `expected` seconds, and the most bytes that were allocated meanwhile.

        Raises:
            RuntimeError: the repeats would take too long.
        """
        if expected * self.repeats > self.cell_seconds:
            raise RuntimeError(
                f"too slow: one run takes {expected:.1f} s, {self.repeats} of them more than {self.cell_seconds:g} s"
            )
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        results = [run() for _ in range(self.repeats)]
        return results, torch.cuda.max_memory_allocated(self.device) if self.on_gpu else None

    def timed(self, run: Callable[[], Any], warm_up: Callable[[], Any] | None = None) -> tuple[list[float], int | None]:
        """Seconds of `run`, after it, or after `warm_up` where that is given because it is shorter."""
        expected = self.seconds(warm_up or run)  # compiles and tunes what has to be
        if expected < SHORT_SECONDS:
            expected = self.seconds(warm_up or run)
        return self.repeated(lambda: self.seconds(run), expected)

    def random_ids(self, rows: int, tokens: int, vocab_size: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(tokens)
        return torch.randint(vocab_size, (rows, tokens), generator=generator).to(self.device)


def measure_ceilings(bench: Bench) -> Ceilings:
    source = torch.empty(bench.sizes.copied_bytes, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    copying, _ = bench.timed(lambda: [target.copy_(source) for _ in range(10)])
    size = bench.sizes.matrix_size
    one, other = torch.randn(2, size, size, device=bench.device, dtype=bench.dtype)
    multiplying, _ = bench.timed(lambda: [one @ other for _ in range(10)])
    return Ceilings(
        copy=10 * 2 * source.nbytes / statistics.median(copying), matmul=10 * 2 * size**3 / statistics.median(multiplying)
    )


@dataclass
class Loaded:
    """A contender in memory.

    own_bytes: of its weights, whether others share them or not.
    bytes_before: that were allocated when it had been loaded.
    """

    contender: Contender
    own_bytes: int
    bytes_before: int

    @property
    def vocab_size(self) -> int:
        return self.contender.model.lm_head.weight.shape[0]

    def peak(self, most_allocated: int | None) -> int | None:
        """The most that it would have taken alone."""
        return None if most_allocated is None else self.own_bytes + most_allocated - self.bytes_before


def loaded(contender: Contender, bench: Bench) -> Loaded:
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*contender.model.parameters(), *contender.model.buffers())}
    return Loaded(contender, sum(tensors.values()), bench.allocated())


def measure(cell: Cell, taken: Loaded, bench: Bench) -> dict[str, Any]:
    """What a cell adds to its description: seconds (of a decoded token, a pass or a training step), memory and limit."""
    result = {"decode": decode, "prefill": prefill, "long_prompt": prefill, "training": train}[cell.part](cell, taken, bench)
    median = statistics.median(result.pop("samples"))
    result["share_of_limit"] = result["limit_s"] / median if median > 0 else None
    if cell.part != "decode":
        result["tokens_per_s"] = cell.rows * cell.tokens / median
    return {"median_s": median, **result}


def spread(samples: list[float]) -> dict[str, Any]:
    return {"samples": samples, "fastest_s": min(samples), "slowest_s": max(samples), "repeats": len(samples)}


@torch.no_grad()
def decode(cell: Cell, taken: Loaded, bench: Bench) -> dict[str, Any]:
    """The time of a token is that of `generate` for n tokens more than a few, by n: reading the prompt cancels out.

    The few come with the host's preparations, which vary by some milliseconds, by tens where Python reads the prompt; n
    tokens take `sample_seconds`, so that they hardly count.
    """
    ids = bench.random_ids(cell.rows, cell.tokens, taken.vocab_size)
    options = OPTIONS.get(cell.variant, {})

    def seconds(tokens: int) -> float:
        return bench.seconds(lambda: taken.contender.generate(ids, tokens, **options))

    def sample(tokens: int) -> float:
        longer = seconds(FEW_TOKENS + tokens)
        return (longer - seconds(FEW_TOKENS)) / tokens

    def again(tokens: int) -> float:
        seconds(tokens)  # whoever captures a graph for a length does it here
        return seconds(tokens)

    few, tokens = again(FEW_TOKENS), FEW_TOKENS
    while (longer := again(FEW_TOKENS + tokens)) - few < bench.sample_seconds and tokens < MOST_TOKENS:
        tokens = min(2 * tokens, MOST_TOKENS)
    samples, most = bench.repeated(lambda: sample(tokens), longer + few)
    state_bytes = taken.contender.state_bytes(**options)
    # The tokens that count are decoded behind the prompt and a few others.
    limit = decoding_limit(taken.contender, cell.rows, state_bytes, cell.tokens + FEW_TOKENS + tokens / 2, bench.ceilings)
    return {
        **spread(samples),
        "peak_bytes": taken.peak(most),
        "limit_s": limit,
        "decoded_tokens": tokens,
        "state_bytes": state_bytes,
        "weight_bytes_read": bytes_read(taken.contender.model),
    }


@torch.no_grad()
def prefill(cell: Cell, taken: Loaded, bench: Bench) -> dict[str, Any]:
    """`generate` of one token: the prompt is read, its state kept, and the last position's logits give the token."""
    ids = bench.random_ids(1, cell.tokens, taken.vocab_size)

    def run(ids: torch.Tensor = ids) -> torch.Tensor:
        return taken.contender.generate(ids, 1, **OPTIONS.get(cell.variant, {}))

    # A million tokens are read in chunks; as many as the shortest long prompt has are enough to warm up.
    short = ids[:, : min(bench.sizes.long_lengths)]
    is_long = cell.part == "long_prompt"
    samples, most = bench.timed(run, (lambda: run(short)) if is_long else None)
    limit = prefill_limit(taken.contender, cell.tokens, cell.variant, bench.ceilings)
    return {**spread(samples), "peak_bytes": taken.peak(most), "limit_s": limit}


def train(cell: Cell, taken: Loaded, bench: Bench) -> dict[str, Any]:
    """Whole steps on a copy of the model: forward under autocast, backward, AdamW."""
    release(bench.device)  # the copy of the last cell, which would else go in the middle of this one
    before = bench.allocated()
    ids = bench.random_ids(cell.rows, cell.tokens, taken.vocab_size)
    contender, labels, prompt = copy.copy(taken.contender), ids, 0
    contender.model = copy.deepcopy(taken.contender.model).train()
    if cell.variant == "two_stages":  # nearly all of a row is prompt, the rest its answer
        prompt = cell.tokens - cell.tokens // 32
        labels = ids.masked_fill(torch.arange(cell.tokens, device=ids.device) < prompt, -100)

    def backward() -> None:
        with torch.autocast(bench.device.split(":")[0], torch.bfloat16, enabled=bench.on_gpu):
            loss = contender.loss(ids, labels, **OPTIONS.get(cell.variant, {}))
        loss.backward()

    adapters = with_lora(contender, backward) if cell.variant == "lora" else None
    weights = [parameter for parameter in contender.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=bench.on_gpu)

    def step() -> None:
        backward()
        optimizer.step()
        optimizer.zero_grad()

    samples, most = bench.timed(step)
    share, tokens = prompt / cell.tokens, cell.rows * cell.tokens
    return {
        **spread(samples),
        "peak_bytes": None if most is None else most - before,
        "limit_s": training_limit(taken.contender.model, tokens, cell.variant, share, bench.ceilings),
        **({} if adapters is None else {"active_adapters": adapters}),
    }


def with_lora(contender: Contender, backward: Callable[[], None]) -> int:
    """Puts LoRA on every projection of the layers; the number of adapters, all of which have an effect.

    Raises:
        RuntimeError: some have none: their gradients are zero where those of others are not.
    """
    import peft  # only this cell needs it: `pip install remamba_hf[train]`

    layers = contender.model.backbone.layers
    targets = {name.split(".")[-1] for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    config = peft.LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=sorted(targets), task_type="CAUSAL_LM")
    contender.model = peft.get_peft_model(contender.model, config)
    backward()
    gradients = {name: weight.grad for name, weight in contender.model.named_parameters() if "lora_B" in name}
    dead = [name for name, gradient in gradients.items() if gradient is None or not gradient.any()]
    contender.model.zero_grad()
    if dead or not gradients:
        raise RuntimeError(f"LoRA has no effect at {len(dead)} of {len(gradients)} projections: {dead[:3]}")
    return len(gradients)


def rms_ratio(value: torch.Tensor, reference: torch.Tensor) -> float:
    """rms(value - reference) / rms(reference) in float64; infinite if anything is not finite."""
    value, reference = value.double(), reference.double()
    if not (value.isfinite().all() and reference.isfinite().all()):
        return float("inf")
    return ((value - reference).square().mean().sqrt() / reference.square().mean().sqrt()).item()


def check_shape(shape: str, bench: Bench) -> Iterator[dict[str, Any]]:
    """The gate of one shape, at full width and few layers: an entry for every model but the Llama, ours first."""
    sizes = bench.sizes
    lineup = Lineup(shape, bench.device, bench.dtype, layers=sizes.gate_layers)
    wake(lineup.base, bench.dtype)
    contenders = {lineup.base.config.model_type: Contender(lineup.base)}
    if "memmamba" in SHAPES[shape].models:
        # Which notes are kept is a matter of rounding; pools that hold all of them leave nothing to chance.
        every = sizes.gate_tokens + sizes.gate_steps
        memmamba = build_memmamba(lineup.base, bench.device, bench.dtype, pool_size=every)
        wake(memmamba, bench.dtype)
        contenders["memmamba"] = Contender(memmamba)
    references = {name: reference_of(contender) for name, contender in contenders.items()}
    ids = bench.random_ids(2, sizes.gate_tokens, lineup.base.config.vocab_size)
    own = lineup.base.config.model_type
    for name, contender in contenders.items():
        yield entry_of(shape, name, lambda: check_own(contender, references[name], ids, sizes.gate_steps))  # noqa: B023
    for name in SHAPES[shape].models:
        if name in OWN or name == "llama":
            continue
        yield entry_of(
            shape,
            name,
            lambda: check_peer(lineup.load(name), references[own], ids, sizes.gate_steps, bench.dtype),  # noqa: B023
        )


def entry_of(shape: str, model: str, check: Callable[[], list[dict[str, Any]]]) -> dict[str, Any]:
    """What the gate records of a model, whether its checks could be made or not."""
    try:
        checks = check()
    except Exception as failure:
        return {"shape": shape, "model": model, "passed": False, "error": in_one_line(failure)}
    return {"shape": shape, "model": model, "passed": all(entry["passed"] for entry in checks), "checks": checks}


@torch.no_grad()
def check_peer(
    peer: Contender, reference: Reference, ids: torch.Tensor, steps: int, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """A peer with our weights must give our logits, and decode accordingly."""
    expected, allowed = reference(ids).logits, LARGEST_PEER_ERROR[dtype]
    error = rms_ratio(peer.logits(ids)[..., : expected.shape[-1]], expected)
    logits = {"name": "prefill, logits", "error": error, "allowed": allowed, "passed": error <= allowed}
    return [logits, regret(peer, reference, ids[:, : ids.shape[1] // 2], steps, allowed)]


# What the gate draws anew, by the ends of names. Fresh weights hide most of a model: D lets a token pass the state by, the
# steps are so small that next to nothing enters it, Theta and the readers of notes are zero, and so are nearly all scores.
AWAKE: dict[tuple[str, ...], Callable[[torch.Tensor], torch.Tensor]] = {
    ("mixer.D",): lambda weight: nn.init.normal_(weight, std=0.1),
    ("dt_proj.bias", "dt_bias"): lambda weight: nn.init.uniform_(weight, -5, -1),
    ("adaptation.bias",): lambda weight: nn.init.normal_(weight, std=2.0),
    ("compressor.query.2.bias", "compressor.key.2.bias"): lambda weight: nn.init.constant_(weight, 0.3),
    ("reader.output.weight", "reader.query.weight", "reader.sink", "score.weight"): lambda weight: nn.init.normal_(
        weight, std=0.1
    ),
}


def wake(model: Any, dtype: torch.dtype) -> None:
    """Let every part of a model count in its logits, the memory most of all, so that the gate sees it."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        for endings, draw in AWAKE.items():
            if name.endswith(endings):
                draw(parameter)
    round_weights(model, dtype)


def reference_of(contender: Contender) -> Reference:
    """`forward` of the same weights in float32, without kernels and thereby without TF32."""
    model = copy.deepcopy(contender.model).float()

    @torch.no_grad()
    def forward(ids: torch.Tensor, **options: Any) -> Any:
        with without_kernels():
            return model(ids, use_cache=False, **{**contender.reading, **options})

    return forward


@torch.no_grad()
def check_own(contender: Contender, reference: Reference, ids: torch.Tensor, steps: int) -> list[dict[str, Any]]:
    """One of this package's models, as it is timed, against its reference: prompts `ids` [B, L], and `steps` decoded tokens
    behind the first half of them."""
    model, reading, tokens = contender.model, contender.reading, ids.shape[1]
    pieces: dict[str, Any] = {"prefill_chunk_length": tokens // 3 + 1}
    stages = OPTIONS["two_stages"] | {"compression_ratio": 1.0}
    ways = {"prefill": {}, "prefill in chunks": pieces}
    if reading:  # it compresses; all of the window is kept, for which of equal scores win is a matter of rounding
        ways |= {"two stages": stages, "two stages in chunks": stages | pieces}
    checks = []
    for name, options in ways.items():
        whole = {option: value for option, value in options.items() if option not in pieces}
        outputs = [model(ids, **{**reading, **options}), reference(ids, **whole)]
        with without_kernels():
            outputs.append(model(ids, **{**reading, **options}))
        behind = slice(tokens // 4 if whole else 0, None)  # up to the window's end logits are those of the first stage
        checks.append(compared(f"{name}, logits", *(output.logits[:, behind] for output in outputs), model.dtype))
        if whole:
            checks.append(compared(f"{name}, scores", *(output.compression_scores for output in outputs), model.dtype))

    prompt = ids[:, : tokens // 2]
    output: Any = contender.generate(prompt, steps, output_logits=True, return_dict_in_generate=True)
    text = output.sequences[:, :-1]
    by_torch = steps_by_torch(contender, text, steps)
    found = torch.stack(output.logits, dim=1)
    checks.append(compared("decoding, logits", found, reference(text).logits[:, -steps:], by_torch, model.dtype))

    checks.append(regret(contender, reference, prompt, steps, checks[-1]["allowed"]))
    return checks


def regret(contender: Contender, reference: Reference, prompt: torch.Tensor, steps: int, allowed: float) -> dict[str, Any]:
    """An entry of the gate about decoding as it is timed, which tells no logits: its tokens must be such as the reference
    finds about as good as its own.

    Args:
        allowed: error of logits, which decides how much worse they may be.
    """
    sequences = contender.generate(prompt, steps)
    logits = reference(sequences[:, :-1]).logits[:, -steps:]
    worse = logits.max(-1).values - logits.gather(-1, sequences[:, -steps:, None])[..., 0]
    error, allowed = (worse.square().mean().sqrt() / logits.square().mean().sqrt()).item(), REGRETS_PER_ERROR * allowed
    return {"name": "decoding, regret", "error": error, "allowed": allowed, "passed": error <= allowed}


def compared(
    name: str, found: torch.Tensor, expected: torch.Tensor, by_torch: torch.Tensor, dtype: torch.dtype
) -> dict[str, Any]:
    """An entry of the gate; in bfloat16 what plain torch errs decides what is allowed."""
    error, of_torch, allowed = rms_ratio(found, expected), rms_ratio(by_torch, expected), LARGEST_ERROR[dtype]
    if dtype == torch.bfloat16:
        allowed = min(MOST_TIMES_TORCH * of_torch, allowed)
    return {"name": name, "error": error, "plain_torch_error": of_torch, "allowed": allowed, "passed": error <= allowed}


def steps_by_torch(contender: Contender, text: torch.Tensor, steps: int) -> torch.Tensor:
    """Logits [B, steps, V] that plain torch gives for the last tokens of a text [B, L], step by step."""
    model, options = contender.model, {**contender.reading, "logits_to_keep": 1}
    with without_kernels():
        output = model(text[:, : text.shape[1] - steps + 1], use_cache=True, **options)
        logits = [output.logits]
        for column in range(text.shape[1] - steps + 1, text.shape[1]):
            token = text[:, column : column + 1]
            logits.append(model(token, cache_params=output.cache_params, use_cache=True, **options).logits)
    return torch.cat(logits, dim=1)


def in_one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def why_not(entry: dict[str, Any]) -> str:
    """Why an entry of the gate did not pass."""
    failed = [check for check in entry.get("checks", ()) if not check["passed"]]
    told = [f"{check['name']}: {check['error']:.2e}, allowed {check['allowed']:.2e}" for check in failed]
    return "; ".join(told) or entry["error"]


class Run:
    """Fills a file with what is missing in it.

    Args:
        results: from `start_or_continue`.
        until: time (of `time.monotonic`) from which no further measurement begins.
    """

    def __init__(self, bench: Bench, results: dict[str, Any], output: Path, until: float):
        self.bench, self.results, self.output, self.until = bench, results, output, until

    def record(self, part: str, entry: dict[str, Any]) -> None:
        self.results[part].append(entry)
        write_json(self.output, self.results)

    def ceilings(self) -> None:
        if self.results["ceilings"] is None:
            self.results["ceilings"] = measure_ceilings(self.bench)._asdict()
            write_json(self.output, self.results)
            release(self.bench.device)
        self.bench.ceilings = Ceilings(**self.results["ceilings"])

    def gate(self, shapes: Iterable[str]) -> None:
        """Raises SystemExit unless all of this package's models of these shapes pass."""
        checked = {entry["shape"] for entry in self.results["gate"]}
        for shape in tqdm([shape for shape in shapes if shape not in checked], desc="gate"):
            entries = list(check_shape(shape, self.bench))  # a shape is checked as a whole or not at all
            self.results["gate"] += entries
            write_json(self.output, self.results)
            release(self.bench.device)
        failures = [entry for entry in self.results["gate"] if entry["model"] in OWN and not entry["passed"]]
        if failures:
            told = [f"  {entry['shape']} {entry['model']}, {why_not(entry)}" for entry in failures]
            raise SystemExit(
                f"The correctness gate failed, so nothing is timed ({self.output} has every error):\n" + "\n".join(told)
            )

    def refusal(self, cell: Cell) -> str | None:
        """Why the gate lets a peer not be timed."""
        for entry in self.results["gate"]:
            if (entry["shape"], entry["model"]) == (cell.shape, cell.model) and not entry["passed"]:
                return entry.get("error") or f"gives other logits with our weights: {why_not(entry)}"
        return None

    def time(self, wanted: list[Cell]) -> bool:
        """Whether everything that was wanted could be measured before the time was over."""
        done = {tuple(entry[field] for field in Cell._fields) for entry in self.results["cells"]}
        left = [cell for cell in wanted if tuple(cell) not in done]
        with tqdm(total=len(left), desc="timing") as progress:
            for shape in dict.fromkeys(cell.shape for cell in left):
                for training in (False, True):
                    group = [cell for cell in left if cell.shape == shape and (cell.part == "training") == training]
                    if group and not self._time_shape(shape, group, training, progress):
                        return False
                    release(self.bench.device)
        return True

    def _time_shape(self, shape: str, group: list[Cell], training: bool, progress: Any) -> bool:
        """Training starts from float32 weights, everything else from those in the timed dtype."""
        lineup = None
        for model in dict.fromkeys(cell.model for cell in group):
            taken: Loaded | None = None
            for cell in (cell for cell in group if cell.model == model):
                if time.monotonic() >= self.until:
                    return False
                progress.set_postfix_str(cell.in_words)
                entry, error = cell._asdict(), self.refusal(cell)
                if error is None:
                    try:
                        lineup = lineup or Lineup(shape, self.bench.device, torch.float32 if training else self.bench.dtype)
                        taken = taken or loaded(lineup.load(model), self.bench)
                        entry |= measure(cell, taken, self.bench)
                    except Exception as failure:
                        error = in_one_line(failure)
                self.record("cells", entry if error is None else {**entry, "error": error})
                self._stop_if_broken(cell, error)
                progress.update()
            del taken
            release(self.bench.device)
        return True

    def _stop_if_broken(self, cell: Cell, error: str | None) -> None:
        if error is not None:
            tqdm.write(f"{cell.in_words}: {error}", file=sys.stderr)
        try:
            self.bench.synchronize()
            if error is not None:
                release(self.bench.device)
        except Exception as failure:  # after an invalid access every further call fails
            raise SystemExit(
                f"The device does not answer after {cell.in_words} ({in_one_line(failure)}). Run the same command again: "
                "it goes on behind that."
            ) from failure


def versions(device: str) -> dict[str, Any]:
    """What a measurement depends on besides the code: packages, and the device."""
    found: dict[str, Any] = environment(device)
    found["cuda"] = torch.version.cuda if device.startswith("cuda") else None
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def code_digest() -> str:
    """SHA-256 of what is timed and what times it."""
    here, package = Path(__file__).parent, Path(remamba_hf.__file__).parent
    files = [*sorted(package.rglob("*.py")), here / "peers.py", here / "run_gpu.py"]
    return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", dest="mode", action="store_const", const="quick", help="minutes; the default")
    mode.add_argument("--full", dest="mode", action="store_const", const="full", help="more lengths and batches")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="the gate runs before any of them")
    parser.add_argument("--shape", nargs="+", choices=sorted(SHAPES), help="default: all but the tiny ones")
    parser.add_argument("--long-lengths", nargs="+", type=int, metavar="TOKENS", help="of long prompts; default: the mode's")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu_quick.json or gpu_full.json")
    parser.add_argument("--repeats", type=int, default=FEWEST_REPEATS)
    parser.add_argument("--sample-seconds", type=float, default=1.0, help="that a sample of decoded tokens should take")
    parser.add_argument("--cell-seconds", type=float, default=300, help="what would take longer is recorded as too slow")
    parser.add_argument("--limit-seconds", type=float, default=float("inf"), help="begin no measurement after that time")
    arguments = parser.parse_args(words)
    arguments.mode = arguments.mode or "quick"
    tiny = [shape.startswith("tiny") for shape in arguments.shape or ["2.8b"]]
    if any(tiny) != all(tiny):
        parser.error("--shape tiny and tiny2 are for trying the script out: leave the other shapes to another run.")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device: give --device cpu --shape tiny to try the script out.")
    if not arguments.device.startswith("cuda") and not all(tiny):
        parser.error(f"--device {arguments.device} would take days for these shapes: give --shape tiny, tiny2 or both.")
    if arguments.repeats < FEWEST_REPEATS:
        parser.error(f"--repeats must be at least {FEWEST_REPEATS}: a median of fewer says little.")
    arguments.sizes = SIZES["tiny" if all(tiny) else arguments.mode]
    if arguments.long_lengths:
        if min(arguments.long_lengths) < 1:
            parser.error(f"--long-lengths {min(arguments.long_lengths)}: a prompt has at least one token.")
        arguments.sizes = arguments.sizes._replace(long_lengths=tuple(sorted(set(arguments.long_lengths))))
    arguments.output = arguments.output or Path(f"benchmarks/results/gpu_{arguments.mode}.json")
    return arguments


def open_results(arguments: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    header = {
        "what": WHAT,
        "settings": {
            "dtype": str(dtype).removeprefix("torch."),
            "repeats": arguments.repeats,
            "sample_seconds": arguments.sample_seconds,
            "cell_seconds": arguments.cell_seconds,
            "span": SPAN,
            "ratio": RATIO,
            "lora_rank": LORA_RANK,
        },
        "environment": versions(arguments.device),
        "code": code_digest(),
    }
    try:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        return start_or_continue(arguments.output, header, {"ceilings": None, "gate": [], "cells": []})
    except (OSError, ValueError) as error:
        raise SystemExit(
            f"Cannot go on from {arguments.output}: {error}. Settings, code, versions and device must be the same."
        ) from error


def main(words: list[str] | None = None) -> None:
    started = time.monotonic()
    arguments = parse_arguments(words)
    transformers.logging.set_verbosity_error()
    dtype = torch.bfloat16 if arguments.device.startswith("cuda") else torch.float32
    bench = Bench(
        arguments.device, dtype, arguments.sizes, arguments.repeats, arguments.sample_seconds, arguments.cell_seconds
    )
    run = Run(bench, open_results(arguments, dtype), arguments.output, started + arguments.limit_seconds)
    wanted = cells(arguments.sizes, arguments.shape or arguments.sizes.shapes, arguments.parts)
    run.gate(arguments.shape or arguments.sizes.shapes)
    run.ceilings()
    if not run.time(wanted):
        raise SystemExit(f"The time is over. Run the same command again to go on; {arguments.output} has what was measured.")
    failed = [entry for entry in run.results["cells"] if "error" in entry and entry["model"] in OWN]
    if failed:
        raise SystemExit(f"{arguments.output}: {len(failed)} measurements of this package's models failed.")
    print(f"{arguments.output}: {len(run.results['cells'])} measurements in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
