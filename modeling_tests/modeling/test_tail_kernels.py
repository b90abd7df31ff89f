# SPDX-License-Identifier: Apache-2.0
"""A mixer's step behind its first product, in one kernel, against its reference in float64, as in `test_decode_kernels`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from modeling_tests.modeling.test_decode_kernels import CAPS, CPU, SINGLE_ROWS, Compare, Numbers, assert_near, check
from modeling_tests.modeling.tritons_interpreter import INTERPRETED, run_in_interpreter
from remamba_hf.modeling.tail_kernels import (
    TailPlan,
    dual_tail,
    dual_tail_naive,
    dual_tail_plan,
    new_counters,
    selective_tail,
    selective_tail_naive,
    selective_tail_plan,
)


def test_in_tritons_interpreter():
    run_in_interpreter(__file__)


def counting(function: Callable, rows: int, device: torch.device) -> Callable:
    """With counters that nothing has counted with yet."""
    return lambda **arguments: function(**arguments, counters=new_counters(rows, device))


def sum_of(
    numbers: Numbers, rows: int, sizes: tuple[int, int], bias: bool, residual: torch.dtype, in_fp32: bool
) -> tuple[dict[str, Any], torch.Tensor]:
    """The arguments of the last product and sum, and where the result goes."""
    inputs, outputs = sizes
    arguments = dict(
        weight=numbers.normal(outputs, inputs, scale=inputs**-0.5),
        bias=numbers.normal(outputs) if bias else None,
        residual=numbers.view(rows, outputs, skipped=1, dtype=residual),
        residual_in_fp32=in_fp32,
    )
    dtype = torch.float32 if in_fp32 else torch.promote_types(numbers.dtype, residual)
    out = torch.full((rows, outputs + 2), float("nan"), device=numbers.device, dtype=dtype)
    return arguments, out[:, 1:-1]


def check_selective_tail(
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int, int],
    skip: bool = True,
    bias: bool = False,
    residual: torch.dtype = torch.float32,
    in_fp32: bool = True,
    state_dtype: torch.dtype = torch.float32,
    bias_dtype: torch.dtype = torch.float32,
    plan: TailPlan | None = None,
    compare: Compare = assert_near,
) -> None:
    rows, channels, size, rank, outputs = sizes
    numbers = Numbers(device, dtype)
    last, out = sum_of(numbers, rows, (channels, outputs), bias, residual, in_fp32)
    arguments = dict(
        x=numbers.view(rows, channels),
        z=numbers.view(rows, channels, skipped=2),
        projection=numbers.normal(rank + 2 * size, channels, scale=channels**-0.5),
        step_weight=numbers.normal(channels, rank, scale=rank**-0.5),
        step_bias=numbers.normal(channels, dtype=bias_dtype, mean=-3.0, scale=2.0),
        A=-torch.exp(numbers.normal(channels, size, dtype=torch.float32)),
        D=numbers.normal(channels, dtype=torch.float32) if skip else None,
        state=numbers.state(rows, channels, size, dtype=state_dtype),
        **last,
    )
    functions = (counting(function, rows, device) for function in (selective_tail, selective_tail_naive))
    check(*functions, arguments, out, compare, plan, f"selective_tail {sizes} {dtype}", state_cap=CAPS[dtype])


SELECTIVE = [(35, 4, 3, 20), (131, 16, 7, 33), (70, 6, 40, 9), (300, 64, 17, 40)]


@pytest.mark.parametrize(("dtype", "rows"), SINGLE_ROWS)
@pytest.mark.parametrize(("channels", "size", "rank", "outputs"), SELECTIVE)
def test_selective_tail(channels, size, rank, outputs, dtype, rows):
    check_selective_tail(CPU, dtype, (rows, channels, size, rank, outputs), skip=rank != 7, bias=rank == 40)


@pytest.mark.parametrize(("residual", "in_fp32"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)])
def test_selective_tail_of_narrow_tensors(residual, in_fp32):
    narrow: dict[str, Any] = dict(state_dtype=torch.bfloat16, bias_dtype=torch.bfloat16)
    check_selective_tail(CPU, torch.bfloat16, (2, 40, 16, 5, 30), residual=residual, in_fp32=in_fp32, **narrow)


@pytest.mark.parametrize(
    "plan", [TailPlan(8, 4, 32, 16, 1), TailPlan(64, 2, 128, 32, 8), TailPlan(16, 16, 16, 16, 2)], ids=str
)
def test_selective_tail_however_it_is_cut(plan):
    for rows in (1, 3):
        check_selective_tail(CPU, torch.float32, (rows, 150, 6, 40, 30), plan=plan)


def check_dual_tail(
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int, int, int],
    skip: bool = True,
    bias: bool = False,
    residual: torch.dtype = torch.float32,
    in_fp32: bool = True,
    state_dtype: torch.dtype = torch.float32,
    limits: tuple[float, float] = (0.02, 1.5),
    plan: TailPlan | None = None,
    compare: Compare = assert_near,
) -> None:
    rows, heads, channels, size, groups, outputs = sizes
    numbers = Numbers(device, dtype)
    inner = heads * channels
    last, out = sum_of(numbers, rows, (inner, outputs), bias, residual, in_fp32)
    arguments = dict(
        xBC=numbers.view(rows, inner + 2 * groups * size),
        z=numbers.view(rows, inner, skipped=2),
        step=numbers.view(rows, heads),
        step_bias=numbers.normal(heads, dtype=torch.float32, mean=-2.0, scale=3.0),
        A=-torch.exp(numbers.normal(heads, dtype=torch.float32)),
        D=numbers.normal(heads, dtype=torch.float32) if skip else None,
        state=numbers.state(rows, heads, channels, size, dtype=state_dtype),
        step_limits=limits,
        norm_weight=numbers.normal(inner, scale=0.3, mean=1.0),
        eps=1e-3,
        groups=groups,
        **last,
    )
    functions = (counting(function, rows, device) for function in (dual_tail, dual_tail_naive))
    check(*functions, arguments, out, compare, plan, f"dual_tail {sizes} {dtype}")


DUAL = [(4, 8, 4, 2, 20), (2, 24, 16, 1, 33), (6, 5, 6, 3, 9), (2, 16, 128, 1, 40)]


@pytest.mark.parametrize(("dtype", "rows"), SINGLE_ROWS)
@pytest.mark.parametrize(("heads", "channels", "size", "groups", "outputs"), DUAL)
def test_dual_tail(heads, channels, size, groups, outputs, dtype, rows):
    limits = (0.0, float("inf")) if rows == 2 else (0.02, 1.5)
    sizes = (rows, heads, channels, size, groups, outputs)
    check_dual_tail(CPU, dtype, sizes, skip=heads != 6, bias=heads == 6, limits=limits)


@pytest.mark.parametrize(("residual", "in_fp32"), [(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)])
def test_dual_tail_of_narrow_tensors(residual, in_fp32):
    sizes = (2, 2, 8, 16, 1, 30)
    check_dual_tail(CPU, torch.bfloat16, sizes, residual=residual, in_fp32=in_fp32, state_dtype=torch.bfloat16)


@pytest.mark.parametrize("plan", [TailPlan(8, 4, 32, warps=1), TailPlan(64, 2, 128, warps=8), TailPlan(16, 16, 16)], ids=str)
def test_dual_tail_however_it_is_cut(plan):
    for rows in (1, 3):
        check_dual_tail(CPU, torch.float32, (rows, 4, 20, 16, 2, 30), plan=plan)


@pytest.mark.skipif(INTERPRETED, reason="refused before any kernel")
def test_shapes_that_do_not_fit_are_named():
    numbers = Numbers(CPU, torch.float32)
    x = numbers.normal(1, 8)
    rest = numbers.normal(8), -x.T @ x, None, numbers.normal(1, 8, 8), numbers.normal(5, 8), None, numbers.normal(1, 5), True
    with pytest.raises(ValueError, match=r"projection has the shape \(18, 8\), expected \(19, 8\)"):
        selective_tail(x, x, numbers.normal(18, 8), numbers.normal(8, 3), *rest, new_counters(1, CPU))


def test_plans_of_the_large_models():
    """What was measured best for the shapes of mamba-2.8b, mamba-130m and mamba2-2.7b."""
    assert selective_tail_plan(5120, 160) == (32, 2, 1024, 32, 4, 80)
    assert selective_tail_plan(1536, 48) == (16, 2, 512, 16, 2, None)
    assert dual_tail_plan(80, 64, 128, 1) == (32, 4, 1024, 32, 8, None)


@pytest.mark.parametrize("channels", [1, 40, 768, 1536, 2048, 3072, 4096, 5120, 8192])
def test_plans_hold_all_weights_at_once(channels):
    """Up to 8 tiles, and with little that is none of a weight's."""
    for inputs in (selective_tail_plan(channels, 32).inputs, dual_tail_plan(channels, 1, 16, 1).inputs):
        assert inputs & (inputs - 1) == 0
        assert channels <= 8 * inputs
        assert -(-channels // inputs) * inputs <= max(1.1 * channels, channels + 255)
