# SPDX-License-Identifier: Apache-2.0
"""The scan's own backward kernel against autograd through the loop in float64: every gradient, however the work is cut.

`test_in_tritons_interpreter` runs this file once more, in a process of its own where the kernels run on the CPU. Elsewhere
it needs a GPU. The checks are functions of the device, for the GPU tests to use.
"""

from typing import Any

import pytest
import torch

from modeling_tests.modeling.test_decode_kernels import CAPS, CPU, Compare, assert_near
from modeling_tests.modeling.test_scan_kernels import scan_arguments
from modeling_tests.modeling.tritons_interpreter import INTERPRETED, run_in_interpreter
from remamba_hf.modeling import scan_gradients as module
from remamba_hf.modeling.scan_gradients import GradientPlan, gradient_plan, scan_backward, scan_with_gradients
from remamba_hf.modeling.scan_kernels import ScanPlan
from remamba_hf.modeling.selective_scan import selective_scan, selective_scan_naive

interpreted = pytest.mark.skipif(not INTERPRETED, reason="the kernels run on a GPU or in Triton's interpreter")
SMALL = GradientPlan(2, 4, 1)
NAMES = ("x", "dt", "A", "B", "C", "D", "z", "initial_state", "dt_bias", "shift")
SEQUENCES = ("x", "dt", "z")  # whose gradients are rounded to their dtype, as y is


def test_in_tritons_interpreter():
    run_in_interpreter(__file__)


def leaves_of(arguments: dict[str, Any], dtype: torch.dtype | None = None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The arguments with leaves that want gradients, and the leaves by name; float tensors in `dtype`."""
    leaves = {}
    for name in NAMES:
        value = arguments[name] if name != "shift" or arguments[name] is None else arguments[name][1]
        if value is not None:
            leaves[name] = value.detach().to(dtype or value.dtype).requires_grad_()
    given = {**arguments, **{name: leaf for name, leaf in leaves.items() if name != "shift"}}
    if "shift" in leaves:
        given["shift"] = (arguments["shift"][0], leaves["shift"])
    return given, leaves


def probes_of(arguments: dict[str, Any], final: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of y, in its dtype, and of the final state."""
    x, A = arguments["x"], arguments["A"]
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(x.shape, generator=generator).to(x.device, x.dtype)
    dfinal = torch.randn(len(x), *A.shape, generator=generator).to(x.device)
    return dy, dfinal if final else None


def exact_gradients(arguments: dict[str, Any], dy: torch.Tensor, dfinal: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Autograd through the loop in float64; nothing comes from y at pads."""
    given, leaves = leaves_of(arguments, torch.float64)
    y, state = selective_scan_naive(**given)
    dy = dy.double()
    if arguments["lengths"] is not None:
        pads = torch.arange(y.shape[1], device=y.device) >= arguments["lengths"][:, None]
        dy = dy.masked_fill(pads.unsqueeze(-1), 0.0)
    loss = (y * dy).sum() + (0.0 if dfinal is None else (state * dfinal.double()).sum())
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def check_gradients(
    arguments: dict[str, Any],
    plan: GradientPlan | None = None,
    final: bool = True,
    compare: Compare = assert_near,
    cap: float = 5e-6,
    starts_plan: ScanPlan | None = None,
) -> None:
    """All of them; those of sequences are rounded once, the others are as exact with any inputs."""
    dy, dfinal = probes_of(arguments, final)
    expected = exact_gradients(arguments, dy, dfinal)
    if plan is not None and starts_plan is None and INTERPRETED:  # as few elements as the sizes ask for
        starts_plan = ScanPlan(plan.tokens, 4, 1)
    before = {name: arguments[name].clone() for name in NAMES[:-1] if arguments[name] is not None}
    found = scan_backward(dy, dfinal, **arguments, plan=plan, starts_plan=starts_plan)._asdict()
    assert all(torch.equal(arguments[name], value) for name, value in before.items()), "an input was written to"
    for name, wanted in expected.items():
        gradient = found[name]
        rounded = name in SEQUENCES and gradient.dtype != torch.float32
        assert gradient.dtype == (arguments[name].dtype if name in SEQUENCES else torch.float32), name
        assert gradient.isfinite().all(), name
        compare(f"scan, d{name}", gradient, wanted, CAPS[gradient.dtype] if rounded else cap)


@interpreted
@pytest.mark.parametrize(
    ("sizes", "lengths", "plan"),
    [
        ((1, 1, 1, 1), None, SMALL),
        ((2, 2, 5, 3), (2, 0), SMALL),  # a tile
        ((2, 9, 3, 1), (9, 4), GradientPlan(4, 2, 1)),
        ((3, 7, 2, 16), (3, 7, 1), GradientPlan(8, 2, 1)),
        ((1, 5, 2, 64), None, SMALL),
    ],
    ids=str,
)
def test_any_sizes(sizes, lengths, plan):
    check_gradients(scan_arguments(CPU, torch.float32, sizes, lengths=lengths, shift=True), plan)


@interpreted
@pytest.mark.parametrize("missing", ["skip", "gate", "state", "bias"])
@pytest.mark.parametrize("shift", [False, True])
def test_optional_arguments(missing, shift):
    arguments = scan_arguments(CPU, torch.float32, (2, 5, 3, 2), **{missing: False}, shift=shift, lengths=(5, 2))
    check_gradients(arguments, SMALL, final=missing != "state")
    steps = {key: value if value is None else value.abs() for key, value in arguments.items() if key in ("dt", "dt_bias")}
    check_gradients({**arguments, **steps, "shift": None, "softplus": False, "lengths": None}, SMALL)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dt_dtype", ["own", torch.float32], ids=str)
def test_narrow_inputs(dtype, dt_dtype):
    dt_dtype = dtype if dt_dtype == "own" else dt_dtype
    check_gradients(scan_arguments(CPU, dtype, (2, 5, 3, 4), dt_dtype=dt_dtype, lengths=(5, 3), shift=True), SMALL)


@interpreted
@pytest.mark.parametrize(
    "plan", [GradientPlan(1, 1, 1), GradientPlan(4, 16, 1), GradientPlan(8, 4, 2), GradientPlan(2, 64, 4)]
)
def test_however_it_is_cut(plan):
    check_gradients(scan_arguments(CPU, torch.float32, (2, 9, 5, 3), lengths=(9, 4), shift=True), plan)


@interpreted
def test_the_states_of_the_tiles_are_made_in_parts_of_the_length():
    """And for tiles shorter than what that kernel computes at a time."""
    arguments = scan_arguments(CPU, torch.float32, (2, 13, 3, 2), lengths=(13, 6), shift=True)
    for plan in (ScanPlan(4, 4, 1, 2), ScanPlan(8, 4, 1, 1), ScanPlan(2, 4, 1, 3)):
        check_gradients(arguments, SMALL, starts_plan=plan)


@interpreted
@pytest.mark.parametrize("workspace", [1, 2, 100])
def test_slices_of_rows_and_channels(workspace, monkeypatch):
    """In units of a program's: of a row, of which there are 3 programs, or of all."""
    sizes = (3, 5, 11, 2)
    monkeypatch.setattr(module, "_WORKSPACE", workspace * 3 * 2 * 4 * SMALL.channels)
    cuts = list(module._slices(*sizes, SMALL))
    assert len(cuts) == {1: 9, 2: 6, 100: 1}[workspace]
    check_gradients(scan_arguments(CPU, torch.float32, sizes, lengths=(5, 0, 3), shift=True), SMALL)


@pytest.mark.parametrize("workspace", [1, 10_000, 1_000_000, 30_000_000, 1 << 40])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (16, 2048, 1536, 16), (5, 100, 33, 4), (2, 50_000, 5120, 16)])
def test_slices_cover_everything_once(sizes, workspace, monkeypatch):
    rows, length, channels, size = sizes
    plan = gradient_plan(size)
    monkeypatch.setattr(module, "_WORKSPACE", workspace)
    covered = torch.zeros(rows, channels)
    for some, few in module._slices(rows, length, channels, size, plan):
        covered[some, few] += 1
        cells = covered[some, few].numel()
        assert cells * -(-length // plan.tokens) * size * 4 <= workspace or covered[some, few].shape[1] <= plan.channels
    assert (covered == 1).all()


@interpreted
def test_any_strides_and_what_stands_around():
    """Sequences with the length or the rows fastest, tokens far apart; what stands at pads, in dy too, is not read."""
    arguments = scan_arguments(CPU, torch.float32, (2, 5, 3, 2), lengths=(5, 3))
    starts_plan = ScanPlan(2, 4, 1)

    def framed(tensor: torch.Tensor, before: int) -> torch.Tensor:
        wide = torch.nn.functional.pad(tensor, (before, 2) + (1, 2) * (tensor.dim() - 1), value=torch.nan)
        return wide[(slice(1, -2),) * (tensor.dim() - 1)][..., before:-2]

    before = dict(x=3, dt=4, B=6, C=7, z=9)  # which makes all strides different
    check_gradients({**arguments, **{key: framed(arguments[key], columns) for key, columns in before.items()}}, SMALL)
    for reshape in (lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), lambda t: t[:1].expand_as(t)):
        check_gradients({**arguments, **{key: reshape(arguments[key]) for key in before}}, SMALL)
    dy, dfinal = probes_of(arguments, True)
    expected = scan_backward(dy, dfinal, **arguments, plan=SMALL, starts_plan=starts_plan)
    pads = (torch.arange(5) >= arguments["lengths"][:, None]).unsqueeze(-1)
    poisoned = {key: arguments[key].masked_fill(pads, torch.nan) for key in ("x", "dt", "B", "C", "z")}
    dy = framed(dy.masked_fill(pads, torch.nan), 5)
    found = scan_backward(dy, dfinal, **{**arguments, **poisoned}, plan=SMALL, starts_plan=starts_plan)
    for name, gradient, wanted in zip(found._fields, found, expected, strict=True):
        assert gradient is wanted is None if name == "shift" else torch.equal(gradient, wanted), name
        if name in ("x", "dt", "z", "B", "C"):
            assert not gradient.masked_select(pads).any(), name


def check_autograd(device: torch.device, dtype: torch.dtype, sizes: tuple[int, int, int, int], cap: float = 5e-6) -> None:
    """`selective_scan` takes the way, and hands out what its inputs want: of y and the state, of either alone."""
    lengths = (sizes[1], *[sizes[1] // 2] * (sizes[0] - 1))
    arguments = scan_arguments(device, dtype, sizes, lengths=lengths, shift=True)
    dy, dfinal = probes_of(arguments, True)
    for use_y, use_state in ((True, True), (True, False), (False, True)):
        given, leaves = leaves_of(arguments)
        y, state = selective_scan(**given, return_final_state=use_state or None)
        assert y.dtype == dtype
        assert (state is None) == (not use_state)
        outputs = [*([y] if use_y else []), *([state] if use_state else [])]
        probes = [*([dy] if use_y else []), *([dfinal] if use_state else [])]
        found = torch.autograd.grad(outputs, list(leaves.values()), probes, allow_unused=True)
        expected = exact_gradients(arguments, dy if use_y else torch.zeros_like(dy), dfinal if use_state else None)
        for name, gradient in zip(leaves, found, strict=True):
            assert gradient.dtype == leaves[name].dtype
            assert_near(
                f"d{name}", gradient, expected[name], max(cap, CAPS[gradient.dtype] if gradient.dtype == dtype else 0)
            )


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_through_autograd(dtype):
    check_autograd(CPU, dtype, (2, 5, 3, 2))


@interpreted
def test_only_what_is_wanted_and_only_once():
    arguments = scan_arguments(CPU, torch.float32, (1, 3, 2, 2))
    leaf = arguments["z"].clone().requires_grad_()
    y, _ = scan_with_gradients(**{**arguments, "z": leaf})
    assert y.requires_grad
    dy = torch.ones_like(y, requires_grad=True)
    (gradient,) = torch.autograd.grad(y, [leaf], dy, create_graph=True)
    assert_near("dz", gradient, exact_gradients(arguments, dy.detach(), None)["z"], 5e-6)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def check_extreme_steps(device: torch.device) -> None:
    """Nothing overflows where decays are 0 or steps are tiny, where the gate is shut or wide open."""
    arguments = scan_arguments(device, torch.float32, (1, 6, 4, 2))
    for changed in (
        {"A": arguments["A"] * 1e4},
        {"A": arguments["A"] * 1e30},
        {"dt": arguments["dt"] - 60.0},
        {"dt": arguments["dt"] + 60.0},
        {"z": arguments["z"] - 200.0},
        {"z": arguments["z"] + 200.0},
    ):
        dy, dfinal = probes_of(arguments, True)
        plan = ScanPlan(2, 4, 1) if device == CPU else None
        found = scan_backward(dy, dfinal, **{**arguments, **changed}, plan=SMALL, starts_plan=plan)
        for name, wanted in exact_gradients({**arguments, **changed}, dy, dfinal).items():
            gradient = getattr(found, name)
            assert gradient.isfinite().all(), (changed.keys(), name)
            limit = 1e-4 * wanted.abs().max().item() + 1e-30
            assert (gradient.double() - wanted).abs().max().item() <= limit, (changed.keys(), name)


@interpreted
def test_extreme_steps():
    check_extreme_steps(CPU)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16, 32, 64, 128, 256])
def test_plans_fit(size):
    """Whole warps, all of which have something to do, and at most 32 elements a thread."""
    plan = gradient_plan(size)
    columns = 1 << (size - 1).bit_length()
    assert all(value & (value - 1) == 0 for value in plan[:3])
    threads = 32 * plan.warps
    assert threads <= plan.channels * columns
    assert plan.tokens * plan.channels * columns <= 32 * threads
    assert plan.channels >= 8
