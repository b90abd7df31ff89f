# SPDX-License-Identifier: Apache-2.0
"""How fast a `Trainer` trains, and in how much memory."""

import time
from typing import Any

import torch
from transformers import TrainerCallback


class Throughput(TrainerCallback):
    """Counts tokens, seconds and bytes of training steps alone: not those of evaluations and checkpoints, nor those up to
    the first log, in which kernels are compiled.

    Tokens are those that Trainer counts, over all processes: needs `include_num_input_tokens_seen="non_padding"` (real
    tokens) or `"all"` (pads too) among the training arguments.

    Attributes:
        tokens, seconds: of what was measured; 0 if there was one log only.
        step_peak_bytes: most memory that this process's GPU had allocated in what was measured; 0 without a GPU.
    """

    def __init__(self) -> None:
        self.tokens, self.seconds, self.step_peak_bytes = 0, 0.0, 0
        self._start: tuple[float, int] | None = None
        self._peak_bytes = 0

    @property
    def tokens_per_second(self) -> float | None:
        """Over all processes; None if nothing was measured."""
        return self.tokens / self.seconds if self.seconds else None

    @property
    def peak_bytes(self) -> int:
        """Most memory that this process's GPU had allocated since it was first asked for any, evaluations included."""
        return max(self._peak_bytes, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._start is not None and (control.should_log or control.should_evaluate or control.should_save):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                self.step_peak_bytes = max(self.step_peak_bytes, torch.cuda.max_memory_allocated())
            began, seen = self._start
            self.seconds += time.perf_counter() - began
            self.tokens += state.num_input_tokens_seen - seen
            self._start = None  # until what follows the step is done

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            self._peak_bytes = self.peak_bytes
            torch.cuda.reset_peak_memory_stats()
        self._start = time.perf_counter(), state.num_input_tokens_seen

    on_evaluate = on_save = on_log
