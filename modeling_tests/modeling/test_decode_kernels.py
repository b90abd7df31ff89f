# SPDX-License-Identifier: Apache-2.0
"""The kernels of a decoding step against their references in float64, and a model's step against its modules.

On a CPU the functions run their references; `test_in_tritons_interpreter` runs this file once more, in a process of its own
in which they run their kernels. The checks are functions of the device, for the GPU tests to use.
"""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_tests.modeling.tiny_models import assert_close, assert_same_cache, random_rows, tiny_model
from modeling_tests.modeling.tritons_interpreter import INTERPRETED, kernels_only_on_gpus, run_in_interpreter
from remamba_hf.modeling import decode_kernels, tail_kernels
from remamba_hf.modeling.decode_kernels import (
    ChannelPlan,
    Convolution,
    LinearPlan,
    PartsPlan,
    StepPlan,
    convolution_step,
    convolution_step_naive,
    dual_plan,
    dual_step,
    dual_step_naive,
    kernels_can_run,
    linear_in_parts,
    linear_in_parts_naive,
    linear_plan,
    norm_in_one_kernel,
    norm_linear,
    norm_linear_naive,
    parts_plan,
    selective_update,
    selective_update_naive,
    step_from_parts,
    step_from_parts_naive,
    step_plan,
    update_plan,
)
from remamba_hf.modeling.optional_kernels import without_kernels
from remamba_hf.modeling.tail_kernels import new_counters

CPU = torch.device("cpu")
# The interpreter cuts bfloat16 off instead of rounding to the nearest: every error doubles, and all have one sign.
CAPS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 3e-2 if INTERPRETED else 1e-2}
ROWS = [(torch.float32, 1), (torch.float32, 2), (torch.float32, 3), (torch.float32, 5), (torch.float32, 17)]
ROWS += [(torch.float16, 5), (torch.bfloat16, 1), (torch.bfloat16, 3)]
SINGLE_ROWS = [(dtype, rows) for dtype, rows in ROWS if rows < 17]  # of kernels whose programs have one row each
Compare = Callable[[str, torch.Tensor, torch.Tensor, float], None]


def test_in_tritons_interpreter():
    run_in_interpreter(__file__)


@contextlib.contextmanager
def kernels_run(device: torch.device) -> Iterator[None]:
    """Fails unless kernels ran inside, where they can run, and none otherwise."""
    launch, launched = decode_kernels._launch, []

    def counted(kernel: Any, *arguments: Any, **constants: Any) -> None:
        launched.append(kernel)
        launch(kernel, *arguments, **constants)

    modules: Any = (decode_kernels, tail_kernels)
    for module in modules:
        module._launch = counted
    try:
        yield
    finally:
        for module in modules:
            module._launch = launch
    assert bool(launched) == kernels_can_run(device)


class Numbers:
    """Reproducible tensors in a dtype on a device, among them views of wider ones, as a step's are."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        values = torch.randn(*shape, dtype=torch.float64, generator=self.generator) * scale + mean
        return values.to(self.device, dtype or self.dtype)

    def view(self, rows: int, columns: int, skipped: int = 3, **options: Any) -> torch.Tensor:
        """[rows, columns] between `skipped` columns that are none of its business, and large."""
        wide = self.normal(rows, columns + 2 * skipped, **options)
        wide[:, :skipped] = wide[:, -skipped:] = 1e4
        return wide[:, skipped:-skipped]

    def state(self, rows: int, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """[rows, ...] between two rows of NaN."""
        framed = self.normal(rows + 2, *shape, dtype=dtype)
        framed[0] = framed[-1] = float("nan")
        return framed[1:-1]

    def some(self, rows: int) -> torch.Tensor:
        """Which rows are active: every third is not, nor is the only one."""
        return torch.arange(rows, device=self.device) % 3 != 0


def framed_is_untouched(view: torch.Tensor) -> bool:
    """Whether all that a tensor of `Numbers` is a view of, but itself, is still NaN."""
    whole = view._base.clone()
    whole.as_strided(view.shape, view.stride(), view.storage_offset()).zero_()
    return int(whole.isnan().sum()) == whole.numel() - view.numel()


def check(
    function: Callable,
    naive: Callable,
    arguments: dict[str, Any],
    out: torch.Tensor,
    compare: Compare,
    plan: Any = None,
    name: str = "",
    state_cap: float | None = None,
) -> None:
    """A kernel against its reference in float64: results, states, what must stay untouched, in `out` and in a new tensor."""
    dtype = out.dtype
    caps = CAPS[max(CAPS, key=lambda d: CAPS[d] * any(getattr(t, "dtype", None) == d for t in (*arguments.values(), out)))]
    double = {
        key: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in arguments.items()
    }
    active = arguments.get("active")
    rows = torch.ones(len(out), dtype=torch.bool, device=out.device) if active is None else active.bool()
    expected = naive(**double)
    expected, expected_partials = expected if isinstance(expected, tuple) else (expected, None)

    for target in (out, None) if len(out) == 1 else (out,):
        again = dict(arguments)
        state = arguments.get("state")
        if state is not None:
            again["state"] = state._base.clone()[1:-1]
        with kernels_run(out.device):
            result = function(**again, out=target, plan=plan) if plan is not None else function(**again, out=target)
        result, partials = result if isinstance(result, tuple) else (result, None)
        assert result.dtype == dtype
        assert result.isfinite().all(), name
        if target is not None:
            assert result.data_ptr() == out.data_ptr()
            assert framed_is_untouched(out)
        compare(f"{name}, result", result[rows], expected[rows], caps)
        if partials is not None:
            assert partials.dtype == torch.float32
            compare(f"{name}, projection", partials.sum(0)[rows], expected_partials.sum(0)[rows], caps)
        if state is not None:
            assert framed_is_untouched(again["state"])
            assert torch.equal(again["state"][~rows], state[~rows]), f"{name}: an inactive row's state changed"
            compare(f"{name}, state", again["state"][rows], double["state"][rows], state_cap or CAPS[state.dtype])


def assert_near(name: str, value: torch.Tensor, expected: torch.Tensor, limit: float) -> None:
    if expected.numel():
        assert_close(value.cpu(), expected.cpu(), limit, name)


def check_norm_linear(
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    norm: bool = False,
    gate: bool = False,
    groups: int = 1,
    bias: bool = False,
    residual: torch.dtype | None = None,
    in_fp32: bool = False,
    plan: LinearPlan | None = None,
    compare: Compare = assert_near,
) -> None:
    rows, outputs, inputs = sizes
    numbers = Numbers(device, dtype)
    arguments = dict(
        x=numbers.view(rows, inputs, dtype=torch.float32 if norm and not gate else None),
        weight=numbers.normal(outputs, inputs, scale=inputs**-0.5),
        bias=numbers.normal(outputs) if bias else None,
        norm_weight=numbers.normal(inputs, scale=0.3, mean=1.0) if norm else None,
        eps=1e-3,
        gate=numbers.view(rows, inputs) if gate else None,
        groups=groups,
        residual=None if residual is None else numbers.view(rows, outputs, skipped=1, dtype=residual),
        residual_in_fp32=in_fp32,
    )
    out_dtype = dtype if residual is None else torch.promote_types(dtype, residual)
    out = torch.full((rows, outputs + 2), float("nan"), device=device, dtype=torch.float32 if in_fp32 else out_dtype)
    check(norm_linear, norm_linear_naive, arguments, out[:, 1:-1], compare, plan, f"norm_linear {sizes} {dtype}")


LINEAR_CASES: dict[str, dict[str, Any]] = {
    "product": {},
    "norm": dict(norm=True),
    "norm, bias": dict(norm=True, bias=True),
    "norm in two groups": dict(norm=True, groups=2),
    "gated norm, residual": dict(norm=True, gate=True, groups=2, residual=torch.float32, in_fp32=True),
    "gated norm": dict(norm=True, gate=True),
    "residual": dict(residual=torch.float32),
    "residual as wide as the weight": dict(bias=True, residual="own"),
    "residual widened": dict(residual="own", in_fp32=True),
}


@pytest.mark.parametrize(("dtype", "rows"), ROWS)
@pytest.mark.parametrize("case", LINEAR_CASES)
def test_norm_linear(case, dtype, rows):
    options = {key: dtype if value == "own" else value for key, value in LINEAR_CASES[case].items()}
    check_norm_linear(CPU, dtype, (rows, 37, 70), **options)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    "plan",
    [
        LinearPlan(1, 8, 32, 3),
        LinearPlan(1, 16, 128, 2, fused_norm=False),
        LinearPlan(1, 8, 16, 3, warps=1, ahead=3),
        LinearPlan(16, 16, 16, 2, ahead=2),
        LinearPlan(16, 16, 16, 4),
        LinearPlan(16, 64, 32, 2, fused_norm=False),
        LinearPlan(64, 32, 32, 3),
    ],
    ids=str,
)
def test_norm_linear_however_it_is_cut(plan, norm):
    rows = (1, 3) if plan.rows < 64 else (70,)
    for count in rows:
        check_norm_linear(CPU, torch.float32, (count, 50, 100), norm=norm, gate=norm, groups=2 if norm else 1, plan=plan)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_norm_alone(dtype, gate):
    check_norm(CPU, dtype, gate)


def check_norm(device: torch.device, dtype: torch.dtype, gate: bool) -> None:
    """`norm_in_one_kernel` of rows that lie apart, and where it leaves the work to others."""
    numbers = Numbers(device, dtype)
    for shape, groups in (((2, 5, 48), 3), ((7, 70), 1), ((1, 1, 5000), 1)):
        wide = numbers.normal(*shape[:-1], shape[-1] + 8)
        x, other = wide[..., 4:-4], numbers.normal(*shape) if gate else None
        weight = numbers.normal(shape[-1], scale=0.3, mean=1.0)
        y = norm_in_one_kernel(x, weight, 1e-3, other, groups)
        assert (y is not None) == kernels_can_run(device)
        if y is None:
            continue
        flat = x.flatten(0, -2).double(), None if other is None else other.flatten(0, -2).double()
        same = torch.eye(shape[-1], dtype=torch.float64, device=device)
        expected = norm_linear_naive(flat[0], same, None, weight.double(), 1e-3, flat[1], groups).view(shape)
        assert y.dtype == dtype
        assert_near("norm", y, expected, CAPS[dtype])
        assert norm_in_one_kernel(x, weight.requires_grad_(), 1e-3, other, groups) is None, "it has no backward pass"
        with torch.no_grad():
            assert norm_in_one_kernel(x, weight, 1e-3, other, groups) is not None
            with without_kernels():
                assert norm_in_one_kernel(x, weight, 1e-3, other, groups) is None


def check_rounding(device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    """Rounding the norm elsewhere moves nearly every second result by its last bit, summing in another order very few."""
    rows, outputs, inputs = sizes
    numbers = Numbers(device, dtype)
    x, gate = numbers.normal(rows, inputs, dtype=torch.float32), numbers.normal(rows, inputs)
    weight, norm_weight = numbers.normal(outputs, inputs, scale=inputs**-0.5), numbers.normal(inputs, scale=0.3, mean=1.0)
    same = torch.eye(inputs, dtype=dtype, device=device)
    for used_gate in (None, gate):
        value = norm_linear(x, weight, norm_weight=norm_weight, gate=used_gate)
        normed = norm_linear_naive(x, same, norm_weight=norm_weight, gate=used_gate)
        expected = (normed.double() @ weight.double().T).to(dtype)
        assert (value != expected).float().mean() <= 0.1
    added = norm_linear(gate, weight, residual=torch.zeros_like(expected), residual_in_fp32=True)
    assert torch.equal(added, added.to(dtype).float()), "the product was not rounded before the sum"


def test_the_norm_is_rounded_as_the_modules_round_it():
    check_rounding(CPU, torch.float16, (3, 64, 256))


def test_the_sum_may_replace_the_residual():
    numbers = Numbers(CPU, torch.float32)
    for rows in (1, 3):
        y, weight, residual = numbers.normal(rows, 24), numbers.normal(40, 24), numbers.normal(rows, 40)
        expected = norm_linear_naive(y, weight, residual=residual)
        assert norm_linear(y, weight, residual=residual, out=residual) is residual
        assert_close(residual, expected, 1e-6)


def check_convolution(
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    bias: bool = True,
    active: bool = False,
    state_dtype: torch.dtype | None = None,
    plan: ChannelPlan | None = None,
    compare: Compare = assert_near,
) -> None:
    rows, channels, width = sizes
    numbers = Numbers(device, dtype)
    arguments = dict(
        x=numbers.view(rows, channels),
        weight=numbers.normal(channels, width),
        bias=numbers.normal(channels) if bias else None,
        state=numbers.state(rows, channels, width, dtype=state_dtype),
        active=numbers.some(rows) if active else None,
    )
    out = torch.full((rows, channels + 2), float("nan"), device=device, dtype=dtype)[:, 1:-1]
    check(convolution_step, convolution_step_naive, arguments, out, compare, plan, f"convolution_step {sizes} {dtype}")


@pytest.mark.parametrize(("dtype", "rows"), SINGLE_ROWS)
@pytest.mark.parametrize("width", [2, 3, 4])
def test_convolution(width, dtype, rows):
    check_convolution(CPU, dtype, (rows, 131, width), bias=width != 3, active=rows != 2)


def test_convolution_of_narrow_inputs_with_a_wide_state():
    check_convolution(CPU, torch.bfloat16, (2, 20, 4), state_dtype=torch.float32)


def check_convolved_outputs(
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int, int],
    first: int,
    bias: bool = True,
    state_dtype: torch.dtype | None = None,
    plan: LinearPlan | None = None,
    compare: Compare = assert_near,
) -> None:
    """`norm_linear` with a convolution, and with counters."""
    rows, outputs, inputs, channels, width = sizes
    numbers = Numbers(device, dtype)
    counters = torch.ones(64, dtype=torch.int32, device=device)

    def convolved(function: Callable) -> Callable:
        def call(kernel: Any, kernel_bias: Any, state: Any, **others: Any) -> torch.Tensor:
            counters.fill_(1)
            y = function(**others, convolution=Convolution(first, kernel, kernel_bias, state), counters=counters)
            assert not counters.any()
            return y

        return call

    arguments = dict(
        x=numbers.view(rows, inputs, dtype=torch.float32),
        weight=numbers.normal(outputs, inputs, scale=inputs**-0.5),
        bias=numbers.normal(outputs) if bias else None,
        norm_weight=numbers.normal(inputs, scale=0.3, mean=1.0),
        kernel=numbers.normal(channels, width),
        kernel_bias=numbers.normal(channels) if bias else None,
        state=numbers.state(rows, channels, width, dtype=state_dtype),
    )
    out = torch.full((rows, outputs + 2), float("nan"), device=device, dtype=dtype)[:, 1:-1]
    name = f"convolved outputs {sizes} {dtype}"
    functions = convolved(norm_linear), convolved(norm_linear_naive)
    check(*functions, arguments, out, compare, plan, name, state_cap=CAPS[dtype])


@pytest.mark.parametrize(("dtype", "rows"), SINGLE_ROWS)
@pytest.mark.parametrize(("first", "channels", "width"), [(0, 50, 4), (0, 20, 3), (17, 20, 2), (13, 37, 4)])
def test_convolved_outputs(first, channels, width, dtype, rows):
    check_convolved_outputs(CPU, dtype, (rows, 50, 70, channels, width), first, bias=width != 3)


def test_convolved_outputs_with_a_wide_state():
    check_convolved_outputs(CPU, torch.bfloat16, (1, 50, 70, 20, 4), 5, state_dtype=torch.float32)


@pytest.mark.parametrize(
    "plan",
    [LinearPlan(1, 16, 32, 2, 4, True, 2), LinearPlan(1, 4, 64, 3, 1, True, 2), LinearPlan(1, 8, 32, 3, 4, False)],
    ids=str,
)
def test_convolved_outputs_however_they_are_cut(plan):
    for rows in (1, 3):
        check_convolved_outputs(CPU, torch.float32, (rows, 50, 100, 31, 4), 9, plan=plan)


def check_linear_in_parts(
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int],
    plan: PartsPlan | None = None,
    compare: Compare = assert_near,
) -> None:
    """Every part on its own, in `out` and in a new tensor."""
    rows, outputs, inputs = sizes
    numbers = Numbers(device, dtype)
    x, weight = numbers.view(rows, inputs), numbers.normal(outputs, inputs, scale=inputs**-0.5)
    used = plan or parts_plan(rows, outputs, inputs, weight.element_size())
    expected = linear_in_parts_naive(x.double(), weight.double(), plan=used)
    assert len(expected) == -(-inputs // (used.inputs * used.tiles))
    framed = torch.full((len(expected) + 2, rows, outputs + 2), float("nan"), device=device)[1:-1, :, 1:-1]
    for out in (framed, None):
        with kernels_run(device):
            partials = linear_in_parts(x, weight, out, plan)
        assert partials.dtype == torch.float32
        assert partials.shape == expected.shape
        assert out is None or (partials.data_ptr() == out.data_ptr() and framed_is_untouched(out))
        # Products of narrow numbers are exact in float32; tensor cores cut their sums off instead of rounding them.
        cap = CAPS[dtype] if dtype == torch.float32 else 5e-5
        compare(f"linear_in_parts {sizes} {dtype}, partial sums", partials, expected, cap)
    assert_near("sum of the parts", expected.sum(0), x.double() @ weight.double().T, 1e-12)


@pytest.mark.parametrize(("dtype", "rows"), ROWS)
@pytest.mark.parametrize(("outputs", "inputs"), [(13, 83), (40, 300), (16, 1030)])
def test_linear_in_parts(outputs, inputs, dtype, rows):
    check_linear_in_parts(CPU, dtype, (rows, outputs, inputs))


@pytest.mark.parametrize(
    "plan",
    [PartsPlan(16, 16, 32), PartsPlan(16, 32, 64, 2), PartsPlan(32, 64, 16, 3, 3), PartsPlan(64, 16, 512, 1, 2, 8)],
    ids=str,
)
def test_linear_in_parts_however_it_is_cut(plan):
    for dtype, rows in ((torch.float32, 3), (torch.float16, 35), (torch.float32, 70)):
        check_linear_in_parts(CPU, dtype, (rows, 37, 150), plan)


def check_step_from_parts(
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    parts: int = 3,
    plan: StepPlan | None = None,
    compare: Compare = assert_near,
) -> None:
    """The step times its weight, and the rounded B and C, in `out` and in a new tensor."""
    rows, channels, rank, size = sizes
    numbers = Numbers(device, dtype)
    partials = numbers.normal(parts, rows, rank + 2 * size, dtype=torch.float32, scale=parts**-0.5)
    weight = numbers.normal(channels, rank, scale=rank**-0.5)
    expected = step_from_parts_naive(partials.double(), weight.double())
    width = channels + 2 * size
    framed = torch.full((rows + 2, width + 2), float("nan"), device=device, dtype=dtype)[1:-1, 1:-1]
    for out in (framed, None):
        with kernels_run(device):
            results = step_from_parts(partials, weight, out, plan)
        for what, value, wanted in zip(("step", "B and C"), results, expected, strict=True):
            assert value.dtype == dtype
            assert value.shape == wanted.shape
            compare(f"step_from_parts {sizes} {dtype}, {what}", value, wanted, CAPS[dtype])
        assert out is None or (results[0].data_ptr() == out.data_ptr() and framed_is_untouched(out))


@pytest.mark.parametrize(("dtype", "rows"), ROWS)
@pytest.mark.parametrize(("channels", "rank", "size", "parts"), [(50, 3, 4, 1), (131, 40, 16, 5), (20, 17, 70, 11)])
def test_step_from_parts(channels, rank, size, parts, dtype, rows):
    check_step_from_parts(CPU, dtype, (rows, channels, rank, size), parts)


@pytest.mark.parametrize("plan", [StepPlan(16, 16, 16, 4), StepPlan(32, 64, 32, 8), StepPlan(64, 32, 64, 4)], ids=str)
def test_step_from_parts_however_it_is_cut(plan):
    for dtype, rows in ((torch.float32, 3), (torch.float16, 35), (torch.float32, 70)):
        check_step_from_parts(CPU, dtype, (rows, 90, 37, 6), plan=plan)


def check_rounding_of_sums(device: torch.device, dtype: torch.dtype, rows: int, parts: int = 3) -> None:
    """Not rounding the sums before they are multiplied moves every third result by its last bit."""
    numbers = Numbers(device, dtype)
    partials = numbers.normal(parts, rows, 96, dtype=torch.float32)
    weight = numbers.normal(256, 64)
    step, shared = step_from_parts(partials, weight)
    projected = partials.double().sum(0).to(dtype)
    expected = (projected[:, :64].double() @ weight.double().T).to(dtype)
    assert (step != expected).float().mean() <= 0.1
    assert (shared != projected[:, 64:]).float().mean() <= 0.02


def test_the_sums_are_rounded_as_the_modules_round_them():
    for rows in (1, 17):
        check_rounding_of_sums(CPU, torch.float16, rows)


def check_selective_update(
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    skip: bool = True,
    active: bool = False,
    state_dtype: torch.dtype = torch.float32,
    bias_dtype: torch.dtype = torch.float32,
    plan: ChannelPlan | None = None,
    compare: Compare = assert_near,
) -> None:
    """With rank 0 it is given B and C alone."""
    rows, channels, size, rank = sizes
    numbers = Numbers(device, dtype)
    arguments = dict(
        x=numbers.view(rows, channels),
        z=numbers.view(rows, channels, skipped=2),
        projected=numbers.view(rows, rank + 2 * size),
        step=numbers.view(rows, channels, skipped=4),
        step_bias=numbers.normal(channels, dtype=bias_dtype, mean=-3.0, scale=2.0),
        A=-torch.exp(numbers.normal(channels, size, dtype=torch.float32)),
        D=numbers.normal(channels, dtype=torch.float32) if skip else None,
        state=numbers.state(rows, channels, size, dtype=state_dtype),
        active=numbers.some(rows) if active else None,
    )
    out = torch.full((rows, channels + 2), float("nan"), device=device, dtype=dtype)[:, 1:-1]
    name = f"selective_update {sizes} {dtype}"
    check(selective_update, selective_update_naive, arguments, out, compare, plan, name, state_cap=CAPS[dtype])


@pytest.mark.parametrize(("dtype", "rows"), SINGLE_ROWS)
@pytest.mark.parametrize(("size", "rank"), [(4, 3), (16, 3), (5, 7), (16, 0), (64, 17)])
def test_selective_update(size, rank, dtype, rows):
    check_selective_update(CPU, dtype, (rows, 35, size, rank), skip=rank != 7, active=rows != 2)


def test_selective_update_with_narrow_states_and_biases():
    for rows in (1, 6):
        check_selective_update(CPU, torch.bfloat16, (rows, 40, 16, 5), state_dtype=torch.bfloat16, bias_dtype=torch.bfloat16)


def check_step_rounding(device: torch.device, dtype: torch.dtype, rows: int, bias_dtype: torch.dtype) -> None:
    """From an empty state, h = dt B x shows the step size in float32, and any digit of it that was not rounded away."""
    numbers = Numbers(device, dtype)
    ones, zeros = torch.ones(rows, 40, dtype=dtype, device=device), torch.zeros(rows, 40, 1, device=device)
    step, bias = numbers.normal(rows, 40), numbers.normal(40, dtype=bias_dtype)
    states = zeros.clone(), zeros.clone()
    for function, state in zip((selective_update, selective_update_naive), states, strict=True):
        function(ones, ones, ones[:, :2], step, bias, zeros[0] - 1, None, state)
    assert_near("state", *states, 1e-6)


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [1, 6])
def test_the_step_size_is_rounded_as_the_module_rounds_it(rows, bias_dtype):
    check_step_rounding(CPU, torch.float16, rows, bias_dtype)


def check_dual_step(
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int, int],
    skip: bool = True,
    active: bool = False,
    state_dtype: torch.dtype = torch.float32,
    limits: tuple[float, float] = (0.02, 1.5),
    plan: ChannelPlan | None = None,
    compare: Compare = assert_near,
) -> None:
    rows, heads, channels, size, groups = sizes
    numbers = Numbers(device, dtype)
    arguments = dict(
        xBC=numbers.view(rows, heads * channels + 2 * groups * size),
        step=numbers.view(rows, heads),
        step_bias=numbers.normal(heads, dtype=torch.float32, mean=-2.0, scale=3.0),
        A=-torch.exp(numbers.normal(heads, dtype=torch.float32)),
        D=numbers.normal(heads, dtype=torch.float32) if skip else None,
        state=numbers.state(rows, heads, channels, size, dtype=state_dtype),
        step_limits=limits,
        active=numbers.some(rows) if active else None,
    )
    out = torch.full((rows, heads * channels + 2), float("nan"), device=device, dtype=dtype)[:, 1:-1]
    check(dual_step, dual_step_naive, arguments, out, compare, plan, f"dual_step {sizes} {dtype}")


@pytest.mark.parametrize(("dtype", "rows"), SINGLE_ROWS)
@pytest.mark.parametrize(
    ("heads", "channels", "size", "groups"), [(4, 8, 4, 2), (2, 24, 16, 1), (6, 5, 6, 3), (2, 16, 128, 1)]
)
def test_dual_step(heads, channels, size, groups, dtype, rows):
    limits = (0.0, float("inf")) if rows == 2 else (0.02, 1.5)
    check_dual_step(CPU, dtype, (rows, heads, channels, size, groups), skip=heads != 6, active=rows != 2, limits=limits)


def test_dual_step_with_narrow_states():
    check_dual_step(CPU, torch.bfloat16, (2, 2, 8, 16, 1), state_dtype=torch.bfloat16)


def test_rows_of_steps_far_from_zero():
    """Tiny steps keep their digits, large ones do not overflow."""
    step = torch.tensor([[-30.0, -17.0, -12.0, -6.0, 0.0, 15.0, 50.0, 100.0]])
    heads = step.shape[1]
    xBC = torch.cat([torch.ones(1, heads), torch.ones(1, 2)], dim=1)
    state, zeros = torch.zeros(1, heads, 1, 1), torch.zeros(heads)
    y = dual_step(xBC, step, zeros, zeros, None, state)
    expected = torch.nn.functional.softplus(step.double(), threshold=1e9)
    assert ((y.double() - expected).abs() <= 2e-6 * expected).all()
    assert torch.equal(state.flatten(), y.flatten())


def check_model_step(device: torch.device, family: str, rows: int, compare: Compare = assert_near, **settings: Any) -> None:
    """A decoding step of a whole model from the kernels' functions, against its modules: hidden states and both states."""
    model = tiny_model(torch.float32, family=family, **settings).to(device)
    ids = torch.stack(random_rows([9] * rows)).to(device)
    with torch.no_grad():
        with kernels_only_on_gpus():
            cache, own = (model(ids[:, :-1], use_cache=True).cache_params for _ in range(2))
            expected = model(ids[:, -1:], cache_params=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        hidden_states = model.backbone.embeddings(ids[:, -1])
        with kernels_run(device):
            for block, layer in zip(model.backbone.layers, own.layers, strict=True):
                states = layer.conv_states[0], layer.recurrent_states[0]
                rates = block.mixer.decay_rates()
                counters = new_counters(rows, device)
                fused = hidden_states, block.norm, *states, rates, counters, block.residual_in_fp32
                hidden_states = block.mixer.fused_step(*fused)
            norm = model.backbone.norm_f
            logits = norm_linear(hidden_states, model.lm_head.weight, None, norm.weight, norm.eps)
    compare(f"{family}, logits of {rows} rows", logits, expected, 1e-5)
    assert_same_cache(own, cache, 1e-5)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", ["remamba", "remamba2"])
@pytest.mark.parametrize("settings", [{}, dict(use_bias=True, use_conv_bias=False, residual_in_fp32=False, conv_kernel=3)])
def test_a_model_s_step(family, rows, settings):
    check_model_step(CPU, family, rows, **settings)


def test_float64_takes_the_reference_everywhere():
    numbers = Numbers(CPU, torch.float64)
    x, weight = numbers.normal(2, 8), numbers.normal(3, 8)
    assert torch.equal(norm_linear(x, weight), torch.nn.functional.linear(x, weight))


def test_shapes_that_do_not_fit_are_named():
    x, weight = torch.ones(2, 6), torch.ones(4, 6)
    with pytest.raises(ValueError, match=r"residual has the shape \(2, 6\), expected \(2, 4\)"):
        norm_linear(x, weight, residual=x)
    with pytest.raises(ValueError, match="6 channels cannot be normalised in 4 equal groups"):
        norm_linear(x, weight, norm_weight=torch.ones(6), groups=4)
    with pytest.raises(ValueError, match=r"weight has the shape \(4, 6\), expected \(4, 5\)"):
        linear_in_parts(x[:, :5], weight)
    with pytest.raises(ValueError, match=r"out has the shape \(2, 2, 4\), expected \(1, 2, 4\)"):
        linear_in_parts(x, weight, torch.ones(2, 2, 4))
    with pytest.raises(ValueError, match="no B and C besides a step of rank 6"):
        step_from_parts(torch.ones(3, 2, 6), weight)
    with pytest.raises(ValueError, match=r"out has the shape \(2, 4\), expected \(2, 6\)"):
        step_from_parts(torch.ones(3, 2, 8), weight, torch.ones(2, 4))
    with pytest.raises(ValueError, match="active has the shape"):
        convolution_step(x, torch.ones(6, 4), None, torch.ones(2, 6, 4), active=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="groups of B and C"):
        dual_step(torch.ones(2, 6), *(torch.ones(2, 3), *[torch.ones(3)] * 3), torch.ones(2, 3, 2, 4))


MULTIPROCESSORS, SHARED_MEMORY = 132, 227 * 1024  # of an H100


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 33, 64, 100])
@pytest.mark.parametrize(
    ("outputs", "inputs"), [(10240, 2560), (2560, 5120), (10576, 2560), (50280, 2560), (3072, 768), (768, 1536), (16, 16)]
)
@pytest.mark.parametrize("item_size", [2, 4])
def test_plans_of_linear_layers_fit_the_card(rows, outputs, inputs, item_size):
    plan = linear_plan(rows, outputs, inputs, item_size)
    assert all(size & (size - 1) == 0 for size in plan[:3])
    assert plan.rows == 1 if rows == 1 else 16 <= plan.rows <= 64
    assert (plan.stages + 1) * (plan.outputs + plan.rows) * plan.inputs * item_size <= SHARED_MEMORY
    programs = -(-outputs // plan.outputs)
    if rows == 1:
        assert programs >= 4 * MULTIPROCESSORS or plan.outputs == 4
    else:
        assert programs >= MULTIPROCESSORS or plan.outputs == 32


@pytest.mark.parametrize("rows", [3, 16, 17, 64, 100])
@pytest.mark.parametrize(("inputs", "rank"), [(5120, 160), (8192, 256), (1536, 48), (3072, 96), (16, 1)])
@pytest.mark.parametrize("item_size", [2, 4])
def test_plans_of_small_products_fit_the_card(rows, inputs, rank, item_size):
    plan = parts_plan(rows, rank + 32, inputs, item_size)
    tiles = min(plan.stages, plan.tiles)
    assert all(size & (size - 1) == 0 and size >= 16 for size in plan[:3])
    assert (tiles + 1) * (plan.outputs + plan.rows) * plan.inputs * item_size <= SHARED_MEMORY
    assert plan.inputs * plan.tiles <= 512
    step = step_plan(rows, inputs, rank, item_size)
    assert all(size & (size - 1) == 0 and size >= 16 for size in step[:3])
    assert (step.rows + step.channels) * step.ranks * item_size <= SHARED_MEMORY // 2


def test_plans_of_the_large_models():
    """What the docstrings promise for the shapes of mamba-2.8b and mamba2-2.7b."""
    assert linear_plan(1, 10240, 2560)[1:4] == (16, 256, 3)
    assert linear_plan(1, 10576, 2560)[1:4] == (8, 512, 3)
    assert linear_plan(1, 2560, 5120)[1:4] == (4, 1024, 5)
    assert linear_plan(1, 3072, 768) == (1, 4, 256, 2, 1, True, 3)
    assert linear_plan(1, 10240, 2560).fused_norm
    assert not linear_plan(64, 10240, 2560).fused_norm
    assert update_plan(5120, 16) == (32, 4)
    for rows, programs in ((4, 60), (16, 60), (64, 120)):
        plan = parts_plan(rows, 192, 5120)
        assert -(-5120 // plan.inputs) * -(-192 // plan.outputs) * -(-rows // plan.rows) == programs
        assert plan.tiles == 1, "the whole weight is on its way before x is there"
    for rows, programs in ((4, 80), (16, 80), (64, 160)):
        step = step_plan(rows, 5120, 160)
        assert -(-5120 // step.channels) * -(-rows // step.rows) == programs
        assert step.ranks >= 160
    assert 80 * -(-64 // dual_plan(1, 80, 64, 128).channels) >= 2 * MULTIPROCESSORS
    assert dual_plan(64, 80, 64, 128).channels * 128 * 4 == 32 * 1024


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
package = type(sys)("alone")
package.__path__ = [sys.argv[1]]
sys.modules["alone"] = package
import torch
from alone.decode_kernels import kernels_can_run, norm_linear
assert not kernels_can_run(torch.device("cuda")) and not kernels_can_run(torch.device("cpu"))
y = norm_linear(torch.ones(2, 3), torch.ones(4, 3), norm_weight=torch.ones(3), eps=0.0)
assert torch.equal(y, torch.full((2, 4), 3.0))
"""


@pytest.mark.skipif(INTERPRETED, reason="nothing of it is interpreted")
def test_without_triton_the_references_run():
    folder = Path(decode_kernels.__file__).parent
    result = subprocess.run([sys.executable, "-c", WITHOUT_TRITON, str(folder)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(not INTERPRETED, reason="the references have nothing to be found out by")
@pytest.mark.parametrize("part", ["result", "state"])
def test_the_checks_find_errors(part, monkeypatch):
    """A kernel that drops what it should do is noticed: here one of the reference's arguments changes."""
    naive = selective_update_naive

    def other(**arguments: Any) -> torch.Tensor:
        arguments["D" if part == "result" else "A"] *= 1.001
        return naive(**arguments)

    monkeypatch.setitem(check_selective_update.__globals__, "selective_update_naive", other)
    with pytest.raises(AssertionError, match="rms ratio"):
        check_selective_update(CPU, torch.float32, (2, 20, 4, 3))
