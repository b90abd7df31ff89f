# SPDX-License-Identifier: Apache-2.0
"""What a causal language model costs: seconds of reading a prompt and of a decoded token, memory, and the size of its state.

Models are measured as their users reach them, through `generate`; nothing is asked of them that would make it slower.
"""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import Cache

WARM_TOKENS = 4  # of a text, whose preparations do not count as decoding
FEWEST_NEW_TOKENS = WARM_TOKENS + 2
SHORT_SECONDS = 2.0  # what is over sooner warms up twice
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Clock:
    """Time and memory of a device, which is waited for whenever it is asked."""

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def now(self) -> float:
        """Seconds since some time in the past."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def seconds(self, run: Callable[[], Any]) -> float:
        """Of one run."""
        begin = self.now()
        run()
        return self.now() - begin

    def start_peak(self) -> None:
        """From here on `peak_bytes` counts."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with contextlib.suppress(OSError):
            _CLEAR.write_text("5")  # resets the kernel's high-water mark

    def peak_bytes(self) -> int | None:
        """The most that was allocated on the GPU, or that the whole process had in memory; None if nobody knows."""
        if self.on_gpu:
            return torch.cuda.max_memory_allocated(self.device)
        try:
            line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            return None
        return int(line.split()[1]) * 1024

    def release(self) -> None:
        """Gives back what dead models and tensors held."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()


def cache_bytes(cache: Cache) -> int:
    """Bytes of all tensors that a cache's layers hold, whatever their names."""

    def tensors(value: Any) -> list[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            return [value]
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        return [tensor for part in parts for tensor in tensors(part)]

    return sum(tensor.nbytes for layer in cache.layers for tensor in tensors(vars(layer)))


class Times(NamedTuple):
    """Of one call of `generate`.

    prefill: seconds until the first token's logits were known.
    step: seconds of a decoded token (of every row), the first few left out.
    """

    prefill: float
    step: float


class _Marks(LogitsProcessor):
    """Notes when the logits of the first token are known, and when those of the first that counts."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.calls = clock, 0
        self.first = self.warm = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 1:
            self.first = self.clock.now()
        if self.calls == 1 + WARM_TOKENS:
            self.warm = self.clock.now()
        return scores


def without_end(model: PreTrainedModel) -> PreTrainedModel:
    """The model, whose `generate` now ends at no token: every run has as many as it is asked for."""
    model.generation_config = GenerationConfig()
    return model


def generate_tokens(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, **options: Any) -> Any:
    """Greedy tokens behind prompts [B, L] long; the model is one of `without_end`."""
    return model.generate(ids, max_new_tokens=new_tokens, do_sample=False, **options)


@torch.no_grad()
def time_generation(
    model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, clock: Clock, options: Mapping[str, Any]
) -> Times:
    """Times one call.

    Args:
        ids: prompts [B, L] long.
        new_tokens: of every row, at least `FEWEST_NEW_TOKENS`.
        options: further arguments of `generate`.
    """
    marks = _Marks(clock)
    begin = clock.now()
    generate_tokens(model, ids, new_tokens, logits_processor=LogitsProcessorList([marks]), **options)
    end = clock.now()
    # The last token is not read, so of n tokens n - 1 are steps.
    return Times(marks.first - begin, (end - marks.warm) / (new_tokens - 1 - WARM_TOKENS))


@torch.no_grad()
def state_bytes(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, options: Mapping[str, Any]) -> int | None:
    """What all rows keep when `new_tokens` have been generated; None for models that hand out no cache."""
    output = generate_tokens(model, ids, new_tokens, return_dict_in_generate=True, **options)
    cache = getattr(output, "past_key_values", None)
    return cache_bytes(cache) if isinstance(cache, Cache) else None


def measure_generation(
    model: PreTrainedModel,
    ids: torch.Tensor,
    new_tokens: int,
    repeats: int,
    options: Mapping[str, Any],
    most_seconds: float = float("inf"),
) -> dict[str, Any]:
    """What prompts [B, L] cost to read and to go on from: medians, after warming up.

    Args:
        model: one of `without_end`.
        new_tokens: of every row, at least `FEWEST_NEW_TOKENS`.
        repeats: that count; fewer, but at least one, where they would take more than `most_seconds`.
        options: further arguments of `generate`.

    Returns:
        `prefill_s`, and `step_s` (a token of every row), with the least and the largest of each in `prefill_range_s` and
        `step_range_s`; `repeats`; `state_bytes` of all rows behind the last token but one; `peak_bytes`, weights included.
    """
    clock = Clock(ids.device)
    begin = clock.now()
    held = state_bytes(model, ids, new_tokens, options)  # compiles and tunes what has to be
    expected = clock.now() - begin
    if expected < SHORT_SECONDS:
        expected = clock.seconds(lambda: time_generation(model, ids, new_tokens, clock, options))
    repeats = max(int(min(repeats, most_seconds / expected)), 1)
    clock.release()
    clock.start_peak()
    times = [time_generation(model, ids, new_tokens, clock, options) for _ in range(repeats)]
    prefill, step = [one.prefill for one in times], [one.step for one in times]
    return {
        "prefill_s": statistics.median(prefill),
        "prefill_range_s": (min(prefill), max(prefill)),
        "step_s": statistics.median(step),
        "step_range_s": (min(step), max(step)),
        "repeats": repeats,
        "state_bytes": held,
        "peak_bytes": clock.peak_bytes(),
    }


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the CPU, had no room for a tensor."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
