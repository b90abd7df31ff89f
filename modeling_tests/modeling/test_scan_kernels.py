# SPDX-License-Identifier: Apache-2.0
"""The scan's own kernel against the loop in float64: any sizes, strides, pads, states in and out, however it is cut.

`test_in_tritons_interpreter` runs this file once more, in a process of its own where the kernel runs on the CPU. Elsewhere
it needs a GPU. The checks are functions of the device, for the GPU tests to use.
"""

from typing import Any

import pytest
import torch

from modeling_tests.modeling.test_decode_kernels import CAPS, CPU, Compare, Numbers, assert_near
from modeling_tests.modeling.tiny_models import assert_same_cache, padded, random_rows, tiny_memmamba, tiny_model
from modeling_tests.modeling.tritons_interpreter import INTERPRETED, run_in_interpreter
from remamba_hf.modeling import convolution_kernels, decode_kernels
from remamba_hf.modeling import scan_kernels as module
from remamba_hf.modeling.optional_kernels import without_kernels
from remamba_hf.modeling.scan_kernels import ScanPlan, can_scan, scan_forward, scan_plan
from remamba_hf.modeling.selective_scan import selective_scan_naive

interpreted = pytest.mark.skipif(not INTERPRETED, reason="the kernel runs on a GPU or in Triton's interpreter")


def test_in_tritons_interpreter():
    run_in_interpreter(__file__)


def shift_of(numbers: Numbers, tokens: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    return numbers.some(tokens).nonzero()[:, 0], numbers.normal(channels, dtype=torch.float32)


def scan_arguments(
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    skip: bool = True,
    gate: bool = True,
    state: bool = True,
    bias: bool = True,
    dt_dtype: torch.dtype | None = None,
    lengths: tuple[int, ...] | None = None,
    shift: bool = False,
) -> dict[str, Any]:
    """A mixer's: x and z, and B and C, are parts of one tensor each, and states are not contiguous."""
    rows, length, channels, size = sizes
    numbers = Numbers(device, dtype)
    x, z = numbers.normal(rows, length, 2 * channels).chunk(2, dim=-1)
    _, B, C = numbers.normal(rows, length, 3 + 2 * size).split([3, size, size], dim=-1)
    return dict(
        x=x,
        dt=numbers.normal(rows, length, channels, dtype=dt_dtype, mean=-1.0, scale=2.0),
        A=-torch.exp(numbers.normal(channels, size, dtype=torch.float32)),
        B=B,
        C=C,
        D=numbers.normal(channels, dtype=torch.float32) if skip else None,
        z=z if gate else None,
        initial_state=numbers.normal(rows, size, channels, dtype=torch.float32).transpose(1, 2) if state else None,
        dt_bias=numbers.normal(channels, dtype=torch.float32, mean=-1.0) if bias else None,
        softplus=True,
        lengths=None if lengths is None else torch.tensor(lengths, device=device),
        shift=shift_of(numbers, rows * length, channels) if shift else None,
    )


def check_scan(
    arguments: dict[str, Any],
    plan: ScanPlan | None = None,
    compare: Compare = assert_near,
    state_cap: float = 2e-6,
) -> None:
    """y at tokens, finite numbers at pads, and the final state, which is float32 and as exact with any inputs."""
    x, lengths, shift = arguments["x"], arguments["lengths"], arguments["shift"]
    tensors = {key: value for key, value in arguments.items() if key not in ("softplus", "lengths")}
    tensors["shift"] = None if shift is None else shift[1]
    assert can_scan(**tensors)
    double = {
        key: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in arguments.items()
    }
    double["shift"] = None if shift is None else (shift[0], shift[1].double())
    expected, expected_state = selective_scan_naive(**double)
    before = {key: value.clone() for key, value in tensors.items() if value is not None}
    y, state = scan_forward(**arguments, plan=plan)
    assert (y.dtype, state.dtype) == (x.dtype, torch.float32)
    assert y.isfinite().all()
    assert all(torch.equal(tensors[key], value) for key, value in before.items()), "an input was written to"
    if lengths is not None:
        pads = (torch.arange(x.shape[1], device=x.device) >= lengths[:, None]).unsqueeze(-1)
        assert not y.masked_select(pads).any()
        y, expected = y.masked_fill(pads, 0.0), expected.masked_fill(pads, 0.0)
    compare("scan, y", y, expected, CAPS[y.dtype])
    compare("scan, state", state, expected_state, state_cap)


@interpreted
@pytest.mark.parametrize("size", [1, 5, 16])
@pytest.mark.parametrize("channels", [3, 40])
@pytest.mark.parametrize("length", [1, 7, 50])
def test_any_sizes(length, channels, size):
    lengths = {1: (1, 0), 7: None, 50: (31, 50)}[length]
    check_scan(scan_arguments(CPU, torch.float32, (2, length, channels, size), lengths=lengths))


@interpreted
def test_a_large_state():
    check_scan(scan_arguments(CPU, torch.float32, (1, 9, 2, 70)))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dt_dtype", ["own", torch.float32], ids=str)
def test_narrow_inputs(dtype, dt_dtype):
    """Only y is rounded, once: the state is what float32 makes of the inputs."""
    dt_dtype = dtype if dt_dtype == "own" else dt_dtype
    check_scan(scan_arguments(CPU, dtype, (2, 19, 9, 16), dt_dtype=dt_dtype, lengths=(19, 8)))


@interpreted
@pytest.mark.parametrize("missing", ["skip", "gate", "state", "bias"])
def test_optional_arguments(missing):
    check_scan(scan_arguments(CPU, torch.float32, (1, 18, 5, 4), **{missing: False}))
    arguments = scan_arguments(CPU, torch.float32, (2, 18, 5, 4), **{missing: False}, lengths=(3, 18))
    steps = {key: value if value is None else value.abs() for key, value in arguments.items() if key in ("dt", "dt_bias")}
    check_scan({**arguments, **steps, "softplus": False})


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", [1, 3])
def test_steps_of_some_tokens_are_shifted(parts, dtype):
    """Of two thirds of all, in every row and part; without a bias as well, and without the softplus."""
    plan = ScanPlan(4, 8, 1, parts)
    for options in ({}, {"bias": False}, {"lengths": (21, 6)}):
        check_scan(scan_arguments(CPU, dtype, (2, 21, 7, 3), shift=True, **options), plan)
    arguments = scan_arguments(CPU, dtype, (2, 21, 7, 3), shift=True)
    where, added = arguments["shift"]
    steps = {"dt": arguments["dt"].abs(), "dt_bias": arguments["dt_bias"].abs(), "shift": (where, added.abs())}
    check_scan({**arguments, **steps, "softplus": False}, plan)
    check_scan({**arguments, "shift": (where[:0], added)}, plan)


PLANS = [ScanPlan(1, 1, 1), ScanPlan(2, 16, 1), ScanPlan(64, 4, 2), ScanPlan(8, 64, 4)]


@interpreted
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_however_it_is_cut(plan):
    check_scan(scan_arguments(CPU, torch.float32, (2, 21, 7, 3), lengths=(21, 6)), plan)


@interpreted
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("sizes", "lengths", "missing"),
    [
        ((1, 1, 3, 4), None, None),  # less than a tile
        ((2, 4, 3, 1), (4, 0), None),  # a tile
        ((2, 21, 7, 5), (21, 6), None),  # pads begin in an early part
        ((3, 33, 4, 16), (33, 16, 17), None),  # at, and behind, where a part does
        ((2, 18, 5, 4), None, "state"),
        ((2, 18, 5, 4), (9, 18), "bias"),
    ],
    ids=str,
)
def test_parts_of_the_length(sizes, lengths, missing, parts):
    """Any of them may have no tokens at all, the last one too."""
    options = {} if missing is None else {missing: False}
    arguments = scan_arguments(CPU, torch.float32, sizes, lengths=lengths, **options)
    check_scan(arguments, ScanPlan(4, 8, 1, parts))


@interpreted
@pytest.mark.parametrize(("length", "parts", "expected"), [(1, 4, 1), (14, 4, 4), (17, 4, 3), (13, 3, 2), (50, 1, 1)])
def test_no_part_is_without_tokens_of_the_length(length, parts, expected, monkeypatch):
    grids = []

    def counted(kernel: Any, grid: tuple[int, ...], *others: Any, **constants: Any) -> None:
        grids.append(grid[2])
        launch(kernel, grid, *others, **constants)

    launch = module._launch
    monkeypatch.setattr(module, "_launch", counted)
    scan_forward(**scan_arguments(CPU, torch.float32, (1, length, 2, 2)), plan=ScanPlan(4, 8, 1, parts))
    assert grids == ([1] if expected == 1 else [expected - 1, expected])


@interpreted
@pytest.mark.parametrize("parts", [1, 3])
def test_any_strides_and_what_stands_around(parts):
    """Sequences with the length or the rows fastest, tokens far apart, and numbers that are no numbers all around."""
    arguments = scan_arguments(CPU, torch.float32, (2, 18, 5, 4), lengths=(18, 10))
    plan = ScanPlan(4, 8, 1, parts)

    def framed(tensor: torch.Tensor, before: int) -> torch.Tensor:
        wide = torch.nn.functional.pad(tensor, (before, 2) + (1, 2) * (tensor.dim() - 1), value=torch.nan)
        inside = wide[(slice(1, -2),) * (tensor.dim() - 1)][..., before:-2]
        assert torch.equal(inside, tensor)
        return inside

    before = dict(x=3, dt=4, B=6, C=7, z=9)  # which makes all strides different
    check_scan({**arguments, **{key: framed(arguments[key], columns) for key, columns in before.items()}}, plan)
    for reshape in (lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), lambda t: t[:1].expand_as(t)):
        again = {**arguments, **{key: reshape(arguments[key]) for key in before}}
        check_scan(again, plan)
    pads = torch.arange(18) >= arguments["lengths"][:, None]
    for key in ("x", "dt", "B", "C", "z"):  # what stands at pads is not read
        arguments[key] = arguments[key].masked_fill(pads.unsqueeze(-1), 1e3)
    expected = scan_forward(**arguments, plan=plan)
    poisoned = {key: arguments[key].masked_fill(pads.unsqueeze(-1), torch.nan) for key in ("x", "dt", "B", "C", "z")}
    for found, wanted in zip(scan_forward(**{**arguments, **poisoned}, plan=plan), expected, strict=True):
        assert torch.equal(found, wanted)


@interpreted
def test_pieces_make_the_whole():
    arguments = scan_arguments(CPU, torch.float32, (2, 40, 5, 4))
    y, state = scan_forward(**arguments)
    pieces, carried = [], arguments["initial_state"]
    for begin, end in ((0, 1), (1, 17), (17, 40)):
        part = {key: arguments[key][:, begin:end] for key in ("x", "dt", "B", "C", "z")}
        piece, carried = scan_forward(**{**arguments, **part, "initial_state": carried})
        pieces.append(piece)
    assert_near("y", torch.cat(pieces, dim=1), y, 1e-6)
    assert_near("state", carried, state, 1e-6)


def check_small_and_large_steps(device: torch.device) -> None:
    """From an empty state h = dt B x is dt: tiny ones keep their digits, large ones do not overflow."""
    raw = torch.tensor([-80.0, -60.0, -30.0, -17.0, -12.0, -6.0, -1.0, 0.0, 1.0, 15.0, 50.0, 1000.0], device=device)
    ones = torch.ones(1, 1, len(raw), device=device)
    column = torch.ones(1, 1, 1, device=device)
    rates, gate = -torch.ones(len(raw), 1, device=device), torch.full_like(ones, -200.0)
    y, state = scan_forward(ones, raw[None, None], rates, column, column, None, None, softplus=True)
    expected = torch.nn.functional.softplus(raw.double(), threshold=1e9)
    # What float32 rounds of an exponent grows with it.
    assert ((state[0, :, 0].double() - expected).abs() <= (4e-7 + 1.2e-7 * raw.abs()) * expected).all()
    assert torch.equal(y[0, 0], state[0, :, 0])
    y, _ = scan_forward(ones, raw[None, None], rates, column, column, None, gate, softplus=True)
    assert not y.any(), "a gate that is shut lets something through"
    for end in (0, 1):
        _, kept = scan_forward(ones, raw[None, None], rates, column, column, None, None, state, None, True, None)
        same = scan_forward(ones, raw[None, None] * 0, rates, column, column, None, None, state, None, False, None)[1]
        assert torch.equal(same, state), "a step of 0 changed the state"
        lengths = torch.tensor([end], device=device)
        found = scan_forward(ones, raw[None, None], rates, column, column, None, None, state, None, True, lengths)[1]
        assert torch.equal(found, kept if end else state)


@interpreted
def test_small_and_large_steps():
    check_small_and_large_steps(CPU)


@interpreted
def test_fast_decay_gives_no_nan():
    arguments = scan_arguments(CPU, torch.float32, (1, 20, 5, 4))
    for scale in (1e4, 1e30):
        for parts in (1, 3):
            check_scan({**arguments, "A": arguments["A"] * scale}, ScanPlan(4, 8, 1, parts))


@interpreted
@pytest.mark.parametrize("family", ["remamba", "remamba2", "memmamba"])
def test_models_read_prompts_with_kernels(family, monkeypatch):
    """Rows of several lengths, in two pieces: logits of all tokens and the cache are those of the torch paths."""
    model = tiny_memmamba(torch.float32) if family == "memmamba" else tiny_model(torch.float32, family=family)
    ids, mask, _ = padded(random_rows((7, 4)))
    launched = []
    for kernels in (module, convolution_kernels, decode_kernels):
        launch = kernels._launch
        monkeypatch.setattr(kernels, "_launch", lambda *given, launch=launch, **own: launched.append(launch(*given, **own)))

    def read() -> tuple[torch.Tensor, Any]:
        first = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True)
        second = model(ids[:, 6:], attention_mask=mask, use_cache=True, cache_params=first.cache_params)
        return torch.cat([first.logits, second.logits], dim=1)[mask.bool()], second.cache_params

    with torch.no_grad():
        logits, cache = read()
        assert len(launched) >= 2 * 2 * len(model.backbone.layers)
        with without_kernels():
            expected, expected_cache = read()
    assert_near("logits", logits, expected, 1e-5)
    assert_same_cache(cache, expected_cache, 1e-5)


@interpreted
def test_spans_are_joined_in_any_order():
    """As Triton joins them on a GPU; its interpreter only goes from the first to the last."""
    spans = [tuple(span) for span in torch.rand(3, 2, dtype=torch.float64)]
    join = module._joined.fn
    expected = join(*join(*spans[0], *spans[1]), *spans[2])
    for found, wanted in zip(join(*spans[0], *join(*spans[1], *spans[2])), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-12)


@interpreted
def test_scans_by_slices_are_those_by_elements(monkeypatch):
    """Of the interpreter, see `hasten`: bit for bit."""
    from triton.runtime.interpreter import ScanOps

    if not hasattr(ScanOps, "scan_by_elements"):
        pytest.skip("the interpreter of this Triton is as it was")
    arguments = scan_arguments(CPU, torch.float32, (1, 6, 3, 2))
    results = scan_forward(**arguments, plan=ScanPlan(4, 4, 1))
    monkeypatch.setattr(ScanOps, "generic_scan", ScanOps.scan_by_elements)
    for result, expected in zip(results, scan_forward(**arguments, plan=ScanPlan(4, 4, 1)), strict=True):
        assert torch.equal(result, expected)


def test_what_the_kernel_does_not_take():
    arguments = scan_arguments(CPU, torch.float32, (1, 3, 4, 2))
    del arguments["softplus"], arguments["lengths"], arguments["shift"]
    assert can_scan(**arguments) == INTERPRETED
    assert not can_scan(**{**arguments, "x": arguments["x"].double()})
    assert not can_scan(**{**arguments, "x": arguments["x"][:, :0]})
    assert not can_scan(**{**arguments, "A": arguments["A"][:, :1].expand(4, 257)})
    assert not can_scan(**{**arguments, "D": torch.zeros(4, device="meta")})


@pytest.mark.parametrize("key", ["dt", "A", "B", "C", "D", "z", "initial_state", "dt_bias", "lengths"])
def test_shapes_that_do_not_fit_are_told(key):
    arguments = scan_arguments(CPU, torch.float32, (2, 3, 4, 2), lengths=(1, 2))
    arguments[key] = arguments[key][..., :-1]
    with pytest.raises(ValueError, match=r"has the shape .* expected"):
        scan_forward(**arguments)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16, 32, 64, 128, 256])
def test_plans_fit(size):
    """Whole warps, all of which have something to do, and at most 64 elements a thread, of one row 128."""
    check_plan(scan_plan(4, 6144, 5120, size), size, 64)
    check_plan(scan_plan(1, 6144, 5120, size), size, 128)


def check_plan(plan: ScanPlan, size: int, most: int) -> None:
    columns = 1 << (size - 1).bit_length()
    assert all(value & (value - 1) == 0 for value in (plan.tokens, plan.channels, plan.warps))
    assert 1 <= plan.warps <= 16
    threads = 32 * plan.warps
    assert threads <= plan.channels * columns
    assert plan.tokens * plan.channels * columns <= most * threads
    assert plan.channels >= 8


def test_the_plans_of_mamba_s_state_are_those_that_were_fastest():
    assert scan_plan(1, 6144, 5120, 16) == ScanPlan(32, 16, 2)
    assert scan_plan(4, 6144, 5120, 16) == ScanPlan(16, 16, 2)
    assert scan_plan(1, 6144, 1536, 16) == ScanPlan(16, 16, 2, 16)
    assert scan_plan(1, 100, 1536, 16) == ScanPlan(16, 16, 2)
