# SPDX-License-Identifier: Apache-2.0
"""The kernels of a decoding step, compiled, against their references in float64: odd shapes, the large models' shapes, and a
captured graph of steps that start before the ones before them have ended."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from modeling_tests.gpu.measured_errors import note
from modeling_tests.modeling.test_decode_kernels import (
    LINEAR_CASES,
    Numbers,
    check_convolution,
    check_convolved_outputs,
    check_dual_step,
    check_linear_in_parts,
    check_model_step,
    check_norm,
    check_norm_linear,
    check_rounding,
    check_rounding_of_sums,
    check_selective_update,
    check_step_from_parts,
    check_step_rounding,
)
from modeling_tests.modeling.test_tail_kernels import check_dual_tail, check_selective_tail
from remamba_hf.modeling.decode_kernels import (
    FEW_ROWS,
    ChannelPlan,
    Convolution,
    LinearPlan,
    PartsPlan,
    StepPlan,
    convolution_step,
    dependent_launches,
    dual_step,
    kernels_can_run,
    linear_in_parts,
    norm_linear,
    selective_update,
    step_from_parts,
)
from remamba_hf.modeling.tail_kernels import TailPlan, dual_tail, new_counters, selective_tail

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16]  # float16 is compiled to the same as bfloat16 but for its name
ROWS = [1, 2, 3, 5, 17, 64, 67]


@pytest.fixture(autouse=True)
def _triton() -> None:
    if not kernels_can_run(CUDA):
        pytest.skip("no Triton, or a card from before compute capability 8.0")


def noted(dtype: torch.dtype) -> Callable[..., None]:
    """`note`, under names that do not count every shape on its own."""

    def compare(name: str, value: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
        if expected.numel():
            function, what = name.split(" ")[0], name.rpartition(", ")[2]
            note(f"{function}, {what}, {dtype}", value, expected, limit)

    return compare


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("case", LINEAR_CASES)
def test_norm_linear(case, rows, dtype):
    options = {key: dtype if value == "own" else value for key, value in LINEAR_CASES[case].items()}
    for outputs, inputs in ((37, 70), (514, 1000)):
        check_norm_linear(CUDA, dtype, (rows, outputs, inputs), **options, compare=noted(dtype))


@pytest.mark.parametrize("rows", [1, 2, 8, 16, 64])
@pytest.mark.parametrize(("outputs", "inputs", "gate"), [(10240, 2560, False), (10576, 2560, False), (2560, 5120, True)])
def test_norm_linear_of_large_models(outputs, inputs, gate, rows):
    residual = torch.float32 if gate else None
    sizes = (rows, outputs, inputs)
    check_norm_linear(CUDA, torch.bfloat16, sizes, norm=True, gate=gate, residual=residual, compare=noted(torch.bfloat16))


@pytest.mark.parametrize(
    "plan",
    [
        LinearPlan(1, 4, 1024, 2, 8),
        LinearPlan(1, 32, 128, 6),
        LinearPlan(16, 16, 64, 3),
        LinearPlan(16, 128, 64, 3, 8),
        LinearPlan(32, 64, 64, 4, fused_norm=False),
        LinearPlan(64, 128, 64, 3, 8),
    ],
    ids=str,
)
def test_norm_linear_however_it_is_cut(plan):
    for dtype in (torch.bfloat16, torch.float16):
        for rows in (1, 3) if plan.rows < 32 else (33, 70):
            check_norm_linear(
                CUDA, dtype, (rows, 200, 1000), norm=True, gate=True, groups=2, plan=plan, compare=noted(dtype)
            )


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_norm_alone(dtype, gate):
    check_norm(CUDA, dtype, gate)


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_the_norm_is_rounded_as_the_modules_round_it(rows):
    check_rounding(CUDA, torch.bfloat16, (rows, 512, 1024))
    for bias_dtype in (torch.float32, torch.bfloat16):
        check_step_rounding(CUDA, torch.bfloat16, rows, bias_dtype)
    check_rounding_of_sums(CUDA, torch.bfloat16, rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", [2, 3, 4])
def test_convolution(width, rows, dtype):
    for channels in (83, 1536, 5120):
        check_convolution(CUDA, dtype, (rows, channels, width), width != 3, rows != 2, compare=noted(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize(
    ("outputs", "inputs", "first", "channels"),
    [(50, 70, 13, 20), (300, 1000, 0, 150), (3072, 768, 0, 1536), (10240, 2560, 0, 5120), (10576, 2560, 5120, 5376)],
)
def test_convolved_outputs(outputs, inputs, first, channels, rows, dtype):
    for width in (2, 4):
        sizes = (rows, outputs, inputs, channels, width)
        check_convolved_outputs(CUDA, dtype, sizes, first, bias=width > 2, compare=noted(dtype))


@pytest.mark.parametrize(
    "plan",
    [LinearPlan(1, 16, 64, 2, 4, True, 3), LinearPlan(1, 4, 128, 3, 1, True, 8), LinearPlan(1, 8, 512, 3, 8, False)],
    ids=str,
)
def test_convolved_outputs_however_they_are_cut(plan):
    for rows in (1, 3):
        sizes = (rows, 300, 1000, 131, 4)
        check_convolved_outputs(CUDA, torch.bfloat16, sizes, 77, plan=plan, compare=noted(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize(
    ("channels", "size", "rank", "outputs"),
    [(50, 4, 3, 20), (131, 6, 40, 70), (300, 64, 17, 40), (1536, 16, 48, 768), (4096, 16, 128, 2048), (5120, 16, 160, 2560)],
)
def test_selective_tail(channels, size, rank, outputs, rows, dtype):
    sizes = (rows, channels, size, rank, outputs)
    for dependent in (False, True):
        with dependent_launches(dependent):
            check_selective_tail(CUDA, dtype, sizes, skip=rank != 17, bias=rank == 40, compare=noted(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize(
    ("heads", "channels", "size", "groups", "outputs"),
    [
        (4, 8, 4, 2, 20),
        (6, 5, 6, 3, 9),
        (3, 16, 128, 1, 70),
        (24, 64, 128, 1, 768),
        (80, 64, 128, 1, 2560),
        (8, 64, 64, 2, 300),
    ],
)
def test_dual_tail(heads, channels, size, groups, outputs, rows, dtype):
    sizes = (rows, heads, channels, size, groups, outputs)
    for dependent in (False, True):
        with dependent_launches(dependent):
            check_dual_tail(CUDA, dtype, sizes, skip=heads != 6, bias=heads == 6, compare=noted(dtype))


@pytest.mark.parametrize(
    "plan", [TailPlan(8, 4, 64, 16, 1), TailPlan(64, 2, 128, 32, 8), TailPlan(16, 16, 512, 64, 4)], ids=str
)
def test_tails_however_they_are_cut(plan):
    given: dict[str, Any] = dict(plan=plan, state_dtype=torch.bfloat16, compare=noted(torch.bfloat16))
    for rows in (1, 3, 20):
        sizes = (rows, 300, 16, 40, 70)
        check_selective_tail(CUDA, torch.bfloat16, sizes, bias_dtype=torch.bfloat16, **given)
        check_dual_tail(CUDA, torch.bfloat16, (rows, 4, 100, 64, 2, 70), **given)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [3, 5, 16, 17, 64, 67])
@pytest.mark.parametrize(
    ("channels", "size", "rank"), [(50, 4, 3), (99, 6, 17), (200, 64, 40), (1536, 16, 48), (4096, 16, 128), (5120, 16, 160)]
)
def test_small_products(channels, size, rank, rows, dtype):
    check_linear_in_parts(CUDA, dtype, (rows, rank + 2 * size, channels), compare=noted(dtype))
    for parts in (1, 10):
        check_step_from_parts(CUDA, dtype, (rows, channels, rank, size), parts, compare=noted(dtype))


@pytest.mark.parametrize(
    "plan",
    [PartsPlan(16, 16, 256), PartsPlan(16, 64, 128, 4, 3), PartsPlan(32, 32, 512, 2, 2, 8), PartsPlan(64, 64, 256, 2, 2, 8)],
    ids=str,
)
def test_linear_in_parts_however_it_is_cut(plan):
    for rows in (3, 35, 70):
        check_linear_in_parts(CUDA, torch.bfloat16, (rows, 90, 1300), plan, noted(torch.bfloat16))


@pytest.mark.parametrize(
    "plan", [StepPlan(16, 32, 32, 4), StepPlan(16, 256, 64, 8), StepPlan(32, 64, 128, 8), StepPlan(64, 64, 64, 8)], ids=str
)
def test_step_from_parts_however_it_is_cut(plan):
    for rows in (3, 35, 70):
        check_step_from_parts(CUDA, torch.bfloat16, (rows, 300, 90, 20), 7, plan, noted(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("channels", "size", "rank"), [(50, 4, 3), (99, 6, 7), (70, 64, 17), (40, 128, 9), (1536, 16, 0), (5120, 16, 160)]
)
def test_selective_update(channels, size, rank, rows, dtype):
    sizes = (rows, channels, size, rank)
    check_selective_update(CUDA, dtype, sizes, skip=rank != 7, active=rows != 2, compare=noted(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("heads", "channels", "size", "groups"),
    [(4, 8, 4, 2), (2, 24, 16, 1), (6, 5, 6, 3), (3, 16, 128, 1), (24, 64, 128, 1), (80, 64, 128, 1), (8, 64, 64, 2)],
)
def test_dual_step(heads, channels, size, groups, rows, dtype):
    sizes = (rows, heads, channels, size, groups)
    check_dual_step(CUDA, dtype, sizes, skip=heads != 6, active=rows != 2, compare=noted(dtype))


def test_narrow_states_and_biases():
    narrow: dict[str, Any] = dict(state_dtype=torch.bfloat16, compare=noted(torch.bfloat16))
    for rows in (1, 6, 40):
        check_selective_update(CUDA, torch.bfloat16, (rows, 640, 16, 40), bias_dtype=torch.bfloat16, **narrow)
        check_dual_step(CUDA, torch.bfloat16, (rows, 8, 64, 128, 1), **narrow)


@pytest.mark.parametrize("plan", [ChannelPlan(16, 1), ChannelPlan(128, 8), ChannelPlan(32, 4)], ids=str)
def test_steps_however_they_are_cut(plan):
    for rows in (1, 3, 20):
        given: dict[str, Any] = dict(active=True, plan=plan, compare=noted(torch.bfloat16))
        check_selective_update(CUDA, torch.bfloat16, (rows, 300, 16, 20), **given)
        check_dual_step(CUDA, torch.bfloat16, (rows, 4, 100, 64, 2), **given)


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("family", ["remamba", "remamba2"])
def test_a_model_s_step(family, rows):
    check_model_step(CUDA, family, rows, compare=noted(torch.float32))


def test_results_do_not_change_from_run_to_run():
    numbers = Numbers(CUDA, torch.bfloat16)
    for rows in (1, 16, 64):
        x, weight = numbers.normal(rows, 2560, dtype=torch.float32), numbers.normal(2560, 2560, scale=0.02)
        norm_weight = numbers.normal(2560)
        first = norm_linear(x, weight, norm_weight=norm_weight)
        assert all(torch.equal(norm_linear(x, weight, norm_weight=norm_weight), first) for _ in range(20))
        projection, step_weight = numbers.normal(192, 2560, scale=0.02), numbers.normal(2560, 160, scale=0.1)
        step, shared = step_from_parts(linear_in_parts(x, projection), step_weight)
        for _ in range(20):
            again = step_from_parts(linear_in_parts(x, projection), step_weight)
            assert torch.equal(again[0], step)
            assert torch.equal(again[1], shared)


def test_the_second_device_while_the_first_is_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    check_model_step(torch.device("cuda:1"), "remamba2", 3, compare=noted(torch.float32))


class Chain:
    """Layers of both kinds, whose kernels follow each other as in a model, on states of their own."""

    def __init__(self, rows: int, layers: int = 6, hidden: int = 512, inner: int = 1024):
        numbers = Numbers(CUDA, torch.bfloat16)
        self.start = numbers.normal(rows, hidden, dtype=torch.float32)
        self.active = numbers.some(rows + 1)[1:] if rows > FEW_ROWS else None  # tails know no rows that are left out
        self.counters = [new_counters(rows, CUDA) for _ in range(2 * layers)]
        self.layers = []
        for _ in range(layers):
            weights = [
                numbers.normal(hidden, mean=1.0, scale=0.1),
                numbers.normal(2 * inner, hidden, scale=0.04),
                numbers.normal(inner, 4),
                numbers.normal(32 + 32, inner, scale=0.03),
                numbers.normal(inner, 32, scale=0.2),
                numbers.normal(inner, dtype=torch.float32),
                -torch.exp(numbers.normal(inner, 16, dtype=torch.float32)),
                numbers.normal(hidden, inner, scale=0.03),
                numbers.normal(2 * inner + 128 + 16, hidden, scale=0.04),
                numbers.normal(inner + 128, 4),
                numbers.normal(16, dtype=torch.float32),
                -torch.exp(numbers.normal(16, dtype=torch.float32)),
                numbers.normal(inner, mean=1.0, scale=0.1),
            ]
            states = [
                numbers.normal(rows, inner, 4),
                numbers.normal(rows, inner, 16, dtype=torch.float32),
                numbers.normal(rows, inner + 128, 4),
                numbers.normal(rows, 16, inner // 16, 64, dtype=torch.float32),
            ]
            self.layers.append((weights, states))

    def states(self) -> list[torch.Tensor]:
        return [state for _, states in self.layers for state in states]

    def __call__(self) -> torch.Tensor:
        hidden = self.start
        inner = self.layers[0][1][0].shape[1]
        for index, (weights, (conv1, state1, conv2, state2)) in enumerate(self.layers):
            norm, in1, kernel1, projection, step, bias, A1, out, in2, kernel2, bias2, A2, norm2 = weights
            first, second = self.counters[2 * index : 2 * index + 2]
            if len(hidden) <= FEW_ROWS:
                kernels = Convolution(0, kernel1, None, conv1), Convolution(inner, kernel2, None, conv2)
                x, z = norm_linear(hidden, in1, norm_weight=norm, convolution=kernels[0], counters=first).chunk(2, dim=1)
                last = out, None, hidden, False
                hidden = selective_tail(x, z, projection, step, bias, A1, None, state1, *last, first)
                y = norm_linear(hidden, in2, norm_weight=norm, convolution=kernels[1], counters=second)
                z, xBC, dt = y.split([inner, inner + 128, 16], dim=1)
                last = out, None, hidden, False
                hidden = dual_tail(xBC, z, dt, bias2, A2, None, state2, (0.0, 9.0), norm2, 1e-5, 1, *last, second)
                continue
            x, z = norm_linear(hidden, in1, norm_weight=norm).chunk(2, dim=1)
            x = convolution_step(x, kernel1, None, conv1, self.active)
            dt, shared = step_from_parts(linear_in_parts(x, projection), step)
            y = selective_update(x, z, shared, dt, bias, A1, None, state1, self.active)
            hidden = norm_linear(y, out, residual=hidden)
            z, xBC, dt = norm_linear(hidden, in2, norm_weight=norm).split([inner, inner + 128, 16], dim=1)
            xBC = convolution_step(xBC, kernel2, None, conv2, self.active)
            y = dual_step(xBC, dt, bias2, A2, None, state2, active=self.active)
            hidden = norm_linear(y, out, norm_weight=norm2, gate=z, residual=hidden)
        return hidden


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("dependent", [False, True])
def test_a_captured_graph_gives_what_single_launches_give(dependent, rows):
    chain = Chain(rows)
    saved = [state.clone() for state in chain.states()]
    expected = [chain() for _ in range(4)]
    expected_states = [state.clone() for state in chain.states()]

    with dependent_launches(dependent):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            chain()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = chain()
    for _ in range(5):
        for state, value in zip(chain.states(), saved, strict=True):
            state.copy_(value)
        for wanted in expected:
            graph.replay()
            assert torch.equal(out, wanted)
        for state, wanted in zip(chain.states(), expected_states, strict=True):
            assert torch.equal(state, wanted)
    for state, value in zip(expected_states, saved, strict=True):
        assert chain.active is None or torch.equal(state[~chain.active], value[~chain.active])
