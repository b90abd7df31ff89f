# SPDX-License-Identifier: Apache-2.0
"""The memory's kernels of a decoding step, compiled, against their references in float64: odd shapes, those of the 130m
model, whole models, and captured graphs of steps that start before the ones before them have ended."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from modeling_tests.gpu.measured_errors import note
from modeling_tests.modeling.test_note_kernels import (
    PLANS,
    SIZES,
    Case,
    KernelStep,
    Sizes,
    assert_same_notes,
    check_model_steps,
    check_rounding,
    rounding_of_the_modules,
    run_case,
)
from modeling_tests.modeling.tiny_models import random_rows, tiny_memmamba
from remamba_hf.modeling.decode_graph import EagerStep
from remamba_hf.modeling.decode_kernels import LinearPlan, dependent_launches, kernels_can_run, norm_linear
from remamba_hf.modeling.note_kernels import ReadingPlan, note_step

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16]  # float16 is compiled to the same as bfloat16 but for its name


@pytest.fixture(autouse=True)
def _triton() -> None:
    if not kernels_can_run(CUDA):
        pytest.skip("no Triton, or a card from before compute capability 8.0")


def noted(dtype: torch.dtype) -> Callable[..., None]:
    """`note`, under names that do not count every shape on its own."""

    def compare(name: str, value: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
        note(f"{name}, {dtype}", value, expected, limit)

    return compare


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize("sizes", [*SIZES, (17, 100, 32, 4, 5, 4), (3, 64, 8, 1, 1, 1)], ids=str)
def test_step(sizes, readers, dtype):
    for hidden_dtype in {dtype, torch.float32}:
        run_case(CUDA, dtype, sizes, readers=readers, hidden_dtype=hidden_dtype, compare=noted(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 16, 64])
@pytest.mark.parametrize("readers", [1, 2])
def test_step_at_the_130m_shape(readers, rows, dtype):
    run_case(CUDA, dtype, (rows, 768, 64, 4, 50, 64), readers=readers, below=200, compare=noted(dtype))


@pytest.mark.parametrize("plans", PLANS, ids=["narrow", "wide", "mixed"])
def test_however_it_is_cut(plans):
    for dtype in DTYPES:
        for rows in (1, 3, 20):
            run_case(CUDA, dtype, (rows, 200, 64, 4, 50, 64), readers=2, plans=plans, compare=noted(dtype))
    large = LinearPlan(16, 32, 128, 3), ReadingPlan(128, 8), ReadingPlan(128, 16, 256)
    run_case(CUDA, torch.bfloat16, (5, 768, 64, 4, 50, 64), plans=large, compare=noted(torch.bfloat16))


@pytest.mark.parametrize("rows", [3, 9, 64])
def test_results_are_rounded_where_the_modules_round(rows):
    check_rounding(CUDA, torch.bfloat16, (rows, 768, 64, 4, 50, 64))


@pytest.mark.parametrize("lengths", [(7,), (3, 9), (1, 6, 11, 4, 8, 2, 5)], ids=len)
def test_a_model_s_steps(lengths):
    for settings in ({}, dict(note_size=64, note_heads=4, pool_size=50, residual_in_fp32=False)):
        check_model_steps(CUDA, lengths, 14, compare=noted(torch.float32), **settings)


def test_the_second_device_while_the_first_is_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    check_model_steps(torch.device("cuda:1"), (3, 9), 10, compare=noted(torch.float32))


@pytest.mark.parametrize("rows", [1, 7])
def test_results_do_not_change_from_run_to_run(rows):
    case = Case(CUDA, torch.bfloat16, Sizes(rows, 768, 64, 4, 50, 64), readers=2, below=200)

    def run() -> torch.Tensor:
        mine = case.copy()
        return note_step(mine.hidden, mine.weights, mine.notes, mine.opened, mine.read)

    first = run()
    with dependent_launches():
        assert all(torch.equal(run(), first) for _ in range(20))


@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize("rows", [1, 8])
def test_tokens_that_the_kernel_before_has_just_written(rows, readers):
    """Bit for bit in a chain of steps and linear layers, whose buffers the allocator gives out again and again."""
    case = Case(CUDA, torch.bfloat16, Sizes(rows, 768, 64, 4, 64, 64), readers=readers, below=208)
    weight = 0.03 * torch.randn(768, 768, device=CUDA, dtype=torch.bfloat16)

    def run() -> tuple[torch.Tensor, Case]:
        mine = case.copy()
        token = mine.hidden
        for _ in range(40):
            token = note_step(token, mine.weights, mine.notes, mine.opened, mine.read)
            token = norm_linear(token, weight, norm_weight=mine.weights.norm, residual=token, residual_in_fp32=True)
        return token, mine

    wanted, states = run()
    assert wanted.isfinite().all()
    for _ in range(10):
        with dependent_launches():
            actual, mine = run()
        assert torch.equal(actual, wanted)
        assert torch.equal(mine.states, states.states)
        assert torch.equal(mine.read, states.read)


class Captured:
    """A `KernelStep` as two graphs, the step and its upkeep, as the decoding engine captures them."""

    def __init__(self, model: Any, cache: Any, rows: int):
        self.model, self.step = model, KernelStep(model, cache)
        self.tokens = torch.zeros(rows, 1, dtype=torch.long, device=CUDA)
        self.graph, self.upkeep = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.step.run(model, self.tokens)
                self.step.upkeep(model)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph):
            self.logits = self.step.run(model, self.tokens)
        with torch.cuda.graph(self.upkeep):
            self.step.upkeep(model)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        self.tokens.copy_(tokens[:, None])
        self.graph.replay()
        if self.step.needs_upkeep():
            self.upkeep.replay()
        return self.logits


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_captured_steps_are_those_of_the_modules(rows):
    """Twice from the same states, with weights that have changed in between.

    Weights that far from their start amplify float32's rounding, so the limit is three times what that alone does to the
    modules' logits and states (on a CPU: 1e-5 to 8e-5 beside float64, kernels' references up to 1e-5 beside the modules).
    """
    settings = dict(hidden_size=64, note_size=64, note_heads=4, pool_size=20, num_hidden_layers=5, state_size=16)
    model = tiny_memmamba(torch.float32, **settings).to(CUDA)
    ids = torch.stack(random_rows([6] * rows)).to(CUDA)
    tokens = torch.stack(random_rows([14] * rows, seed=5)).to(CUDA)
    with torch.no_grad():
        example = model(ids, use_cache=True).cache_params
        captured = Captured(model, example, rows)
        for _ in range(2):
            allowed = 3 * rounding_of_the_modules(model, ids, tokens)
            assert allowed < 1e-3
            mine, expected = (model(ids, use_cache=True).cache_params for _ in range(2))
            captured.step.begin(model, mine)
            eager = EagerStep(model, expected)
            logits, wanted = (torch.stack([step(tokens[:, at]).clone() for at in range(14)]) for step in (captured, eager))
            note("captured steps of MemMamba, logits", logits, wanted, allowed)
            captured.step.end(model, mine)
            assert_same_notes(mine, expected, allowed, model.config)
            for parameter in model.parameters():
                parameter.mul_(1.05)
