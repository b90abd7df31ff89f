# SPDX-License-Identifier: Apache-2.0
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from remamba_hf.training.throughput import Throughput


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still; `clock.now` sets it."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


class Run:
    """A training whose callbacks are called as Trainer calls them."""

    def __init__(self, clock, tmp_path):
        self.callback, self.clock = Throughput(), clock
        self.args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
        self.state, self.control = TrainerState(), TrainerControl()
        self.handler = CallbackHandler([self.callback], None, None, None, None)

    def step(self, seconds, tokens, **due):
        self.clock.now += seconds
        self.state.num_input_tokens_seen += tokens
        for name in ("log", "evaluate", "save"):
            setattr(self.control, f"should_{name}", name in due)
        self.handler.on_step_end(self.args, self.state, self.control)
        for name, took in due.items():
            self.clock.now += took
            if name == "log":
                self.handler.on_log(self.args, self.state, self.control, {"loss": 1.0})
            elif name == "evaluate":
                self.handler.on_evaluate(self.args, self.state, self.control, {})
            else:
                self.handler.on_save(self.args, self.state, self.control)


def test_only_steps_behind_the_first_log_count(clock, tmp_path):
    run = Run(clock, tmp_path)
    run.step(50, 10)
    run.step(50, 10, log=0.5)
    assert run.callback.tokens_per_second is None
    run.step(2, 100)
    run.step(2, 100, log=1)
    assert (run.callback.tokens, run.callback.seconds) == (200, 4)
    run.step(1, 50)
    run.step(1, 50, log=1, evaluate=30, save=10)
    run.step(4, 700, evaluate=20)  # without a log
    run.step(1, 1000)  # not yet counted
    assert (run.callback.tokens, run.callback.seconds) == (1000, 10)
    assert run.callback.tokens_per_second == 100


def test_peaks_of_steps_and_of_all(clock, tmp_path, monkeypatch):
    peak = SimpleNamespace(bytes=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak.bytes)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(peak, "bytes", 10))
    run = Run.__new__(Run)
    with monkeypatch.context() as without:
        without.setattr(torch.cuda, "is_available", lambda: False)
        run.__init__(clock, tmp_path)
    peak.bytes = 70  # loading
    run.step(1, 1, log=0)
    peak.bytes = 40
    run.step(1, 1, log=0)
    run.handler.on_prediction_step(run.args, run.state, run.control)
    peak.bytes = 90  # an evaluation
    run.handler.on_evaluate(run.args, run.state, run.control, {})
    peak.bytes = 30
    run.step(1, 1, log=0)
    assert run.callback.step_peak_bytes == 40
    assert run.callback.peak_bytes == 90
