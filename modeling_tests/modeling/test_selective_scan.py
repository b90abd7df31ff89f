# SPDX-License-Identifier: Apache-2.0
"""The selective scan: every path against the loop, values and gradients, states in and out."""

import contextlib
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from modeling_tests.modeling.tiny_models import assert_close, rms_ratio, tiny_model
from remamba_hf.modeling import selective_scan as module
from remamba_hf.modeling.optional_kernels import without_kernels
from remamba_hf.modeling.precision import with_shift
from remamba_hf.modeling.selective_scan import (
    selective_scan,
    selective_scan_naive,
    selective_scan_step,
)

NAMES = ("x", "dt", "A", "B", "C", "D", "z", "initial_state")
LENGTHS = (1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 511, 513, 1023, 1025, 2047, 2049)
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def inputs(batch, length, channels, size, dtype=torch.float64, seed=0, gates=True, state=True):
    """The arguments of a scan, in the order of NAMES; dt like a trained model's, from 1e-3 to a few units."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    values = [
        normal(batch, length, channels),
        F.softplus(2 * normal(batch, length, channels) - 3),
        -torch.exp(normal(channels, size)),
        normal(batch, length, size),
        normal(batch, length, size),
        normal(channels) if gates else None,
        normal(batch, length, channels) if gates else None,
        normal(batch, channels, size) if state else None,
    ]
    return [value if value is None else value.to(dtype) for value in values]


def values_and_gradients(scan, arguments, seed=1, y_weight=1.0, state_weight=1.0, names=NAMES):
    """y, the final state, and the gradients of a random projection of both, by name."""
    arguments = [a if a is None else a.clone().requires_grad_() for a in arguments]
    y, state = scan(*arguments)
    generator = torch.Generator().manual_seed(seed)
    loss = 0
    for output, weight in ((y, y_weight), (state, state_weight)):
        if weight and output is not None:
            probe = torch.randn(output.shape, dtype=torch.float64, generator=generator)
            loss = loss + weight * (output.double() * probe).sum()
    present = [(name, a) for name, a in zip(names, arguments, strict=True) if a is not None]
    gradients = torch.autograd.grad(loss, [a for _, a in present], allow_unused=True)
    results = {"y": y, "state": state}
    for (name, argument), gradient in zip(present, gradients, strict=True):
        results[f"d{name}"] = torch.zeros_like(argument) if gradient is None else gradient
    return results


def assert_results(actual, expected, limit):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], expected[name], limit, name)


@pytest.mark.parametrize("length", LENGTHS)
def test_values_and_gradients_agree_with_the_loop_in_float64(length):
    batch, channels, size = 1 + length % 5, (5, 8, 7)[length % 3], (3, 4, 1)[length % 3]
    arguments = inputs(batch, length, channels, size)
    expected = values_and_gradients(selective_scan_naive, arguments)
    assert_results(values_and_gradients(selective_scan, arguments), expected, 1e-10)


@pytest.mark.smoke
@pytest.mark.parametrize("length", [1, 17, 513])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("gates", [False, True])
def test_optional_arguments(length, state, gates):
    arguments = inputs(2, length, 6, 4, state=state, gates=gates)
    expected = values_and_gradients(selective_scan_naive, arguments)
    assert_results(values_and_gradients(selective_scan, arguments), expected, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [3, 65, 2049])
def test_low_precision_stays_near_float64(dtype, length):
    """The yardstick is float64 on the same rounded inputs; the loop in the same dtype may not be much better."""
    arguments = inputs(2, length, 24, 8, dtype=dtype)
    exact = values_and_gradients(selective_scan_naive, [a.double() for a in arguments])
    loop = values_and_gradients(selective_scan_naive, arguments)
    fast = values_and_gradients(selective_scan, arguments)
    assert fast["y"].dtype == dtype
    assert fast["state"].dtype == torch.float32
    for name in exact:
        ratio, loop_ratio = rms_ratio(fast[name], exact[name]), rms_ratio(loop[name], exact[name])
        assert ratio <= LIMITS[dtype], f"{name}: {ratio:.1e}"
        assert ratio <= 2 * loop_ratio + 2e-7, f"{name}: {ratio:.1e}, the loop reaches {loop_ratio:.1e}"


@pytest.mark.parametrize(("elements", "chunk"), [(1, 1), (1, 4), (600, 2), (600, 16), (5_000, 3), (40_000, 8)])
@pytest.mark.parametrize("shape", [(1, 1, 5, 3), (3, 29, 5, 3), (4, 130, 7, 2), (2, 257, 3, 1)])
def test_every_way_of_cutting_into_blocks(monkeypatch, elements, chunk, shape):
    arguments = inputs(*shape)
    expected = values_and_gradients(selective_scan_naive, arguments)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", elements)
    monkeypatch.setattr(module, "_CHUNK", chunk)
    assert_results(values_and_gradients(selective_scan, arguments), expected, 1e-10)


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 20)
    monkeypatch.setattr(module, "_CHUNK", 2)
    arguments = [a.requires_grad_() for a in inputs(2, 7, 3, 2)]
    assert torch.autograd.gradcheck(selective_scan, arguments)


@pytest.mark.parametrize("wanted", NAMES)
def test_gradient_of_one_argument_alone(wanted):
    arguments = inputs(2, 40, 5, 3)
    expected = values_and_gradients(selective_scan_naive, arguments)[f"d{wanted}"]
    alone = [a.clone().requires_grad_(name == wanted) for name, a in zip(NAMES, arguments, strict=True)]
    y, state = selective_scan(*alone)
    generator = torch.Generator().manual_seed(1)
    loss = (y * torch.randn(y.shape, dtype=y.dtype, generator=generator)).sum()
    if state.requires_grad:
        loss = loss + (state * torch.randn(state.shape, dtype=y.dtype, generator=generator)).sum()
    else:
        assert wanted in ("C", "D", "z")
    (gradient,) = torch.autograd.grad(loss, alone[NAMES.index(wanted)])
    assert_close(gradient, expected, 1e-10, wanted)


@pytest.mark.parametrize(("y_weight", "state_weight"), [(1.0, 0.0), (0.0, 1.0)])
def test_a_loss_on_one_of_the_two_outputs(y_weight, state_weight):
    arguments = inputs(2, 50, 5, 3)
    weights = dict(y_weight=y_weight, state_weight=state_weight)
    expected = values_and_gradients(selective_scan_naive, arguments, **weights)
    assert_results(values_and_gradients(selective_scan, arguments, **weights), expected, 1e-10)


@pytest.mark.parametrize("form", ["strided", "transposed", "expanded", "reversed", "slice"])
def test_strides_do_not_matter(form):
    arguments = inputs(3, 37, 6, 4)

    def reshape(tensor):
        if form == "strided":
            return torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1).flatten(-2)[..., ::2]
        if form == "transposed":
            return tensor.transpose(0, -1).contiguous().transpose(0, -1)
        if form == "expanded":
            return tensor[:1].expand_as(tensor)
        if form == "reversed":
            return tensor.flip(0).contiguous().flip(0)
        return F.pad(tensor, (3, 2), value=torch.nan)[..., 3:-2]

    def all_views(*tensors):
        weights = ("A", "D") if form == "expanded" else ()
        return [t if name in weights else reshape(t) for name, t in zip(NAMES, tensors, strict=True)]

    expected = values_and_gradients(
        lambda *a: selective_scan_naive(*[view.contiguous() for view in all_views(*a)]), arguments
    )
    assert_results(values_and_gradients(lambda *a: selective_scan(*all_views(*a)), arguments), expected, 1e-10)


@pytest.mark.parametrize("where", ["left", "right", "inside"])
def test_dt_of_zero_passes_a_pad(where):
    """Whatever stands in x, B and C of a pad: outputs of the tokens, the state and gradients do not see it."""
    x, dt, A, B, C, D, z, state = inputs(2, 20, 5, 3)
    expected_y, expected_state = selective_scan(x, dt, A, B, C, D, z, state)
    columns = {"left": range(7, 27), "right": range(20), "inside": [*range(4), *range(9, 20), *range(22, 27)]}[where]
    columns = torch.tensor(list(columns))

    def spread(sequence, fill):
        return sequence.new_full((2, 27, sequence.shape[-1]), fill).index_copy(1, columns, sequence)

    y, final = selective_scan(spread(x, 1e3), spread(dt, 0.0), A, spread(B, 1e3), spread(C, 1e3), D, spread(z, 1e3), state)
    assert_close(y[:, columns], expected_y, 1e-12, "y")
    assert_close(final, expected_state, 1e-12, "state")


def test_only_pads_leave_the_state_alone():
    x, _, A, B, C, D, z, state = inputs(2, 33, 5, 3)
    _, final = selective_scan(x, torch.zeros_like(x), A, B, C, D, z, state)
    assert torch.equal(final, state)


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fast_decay_gives_no_nan(scale, dtype):
    """exp of positive differences, the classic of chunked scans, overflows here."""
    arguments = inputs(2, 300, 5, 3, dtype=dtype)
    arguments[2] = arguments[2] * scale
    arguments[1][:, 100:140] *= 50
    expected = values_and_gradients(selective_scan_naive, arguments)
    assert_results(values_and_gradients(selective_scan, arguments), expected, 1e-10 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("cuts", [[1], [16], [1, 2, 3], [64, 65], list(range(1, 100))])
def test_pieces_make_the_whole(cuts):
    arguments = inputs(2, 100, 5, 3)

    def in_pieces(x, dt, A, B, C, D, z, state):
        outputs = []
        for begin, end in zip([0, *cuts], [*cuts, 100], strict=True):
            span = slice(begin, end)
            y, state = selective_scan(x[:, span], dt[:, span], A, B[:, span], C[:, span], D, z[:, span], state)
            outputs.append(y)
        return torch.cat(outputs, dim=1), state

    assert_results(values_and_gradients(in_pieces, arguments), values_and_gradients(selective_scan, arguments), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gates", [False, True])
def test_steps_make_the_sequence(dtype, gates):
    x, dt, A, B, C, D, z, state = inputs(3, 30, 6, 4, dtype=dtype, gates=gates)
    expected, expected_state = selective_scan_naive(x, dt, A, B, C, D, z, state)
    state = state.to(torch.promote_types(dtype, torch.float32)).clone()
    address = state.data_ptr()
    steps = [
        selective_scan_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, None if z is None else z[:, t], state)
        for t in range(30)
    ]
    assert state.data_ptr() == address
    assert steps[0].dtype == dtype
    assert_close(torch.stack(steps, dim=1), expected, LIMITS[dtype], "y")
    assert_close(state, expected_state, LIMITS[dtype], "state")


def test_an_empty_sequence_passes_the_state():
    x, dt, A, B, C, D, z, state = inputs(2, 0, 5, 3)
    y, final = selective_scan(x, dt, A, B, C, D, z, state)
    assert y.shape == (2, 0, 5)
    assert torch.equal(final, state)


def test_the_initial_state_is_not_written_to():
    arguments = inputs(2, 40, 5, 3)
    before = arguments[-1].clone()
    selective_scan(*arguments)
    selective_scan(*[a.clone().requires_grad_() for a in arguments[:-1]], arguments[-1])[0].sum().backward()
    assert torch.equal(arguments[-1], before)


def test_autocast_leaves_the_state_in_float32():
    """The output C h is read from a float32 state: autocast must not round the state to bfloat16 on the way."""
    arguments = inputs(2, 70, 16, 8, dtype=torch.float32)
    expected, _ = selective_scan(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = selective_scan(*arguments)
    assert_close(y, expected, 1e-5, "y")


def raw_inputs(batch, length, channels, size, dtype=torch.float64, state=True):
    """`inputs` with what dt is softplus of, and behind them its bias: the arguments of `with_raw_steps`."""
    arguments = inputs(batch, length, channels, size, dtype, state=state)
    generator = torch.Generator().manual_seed(2)
    dt, bias = (
        torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((batch, length, channels), (channels,))
    )
    arguments[1] = (2 * dt - 2).to(dtype)
    return [*arguments, (bias - 1).to(torch.promote_types(dtype, torch.float32))]


def with_raw_steps(scan, lengths=None, **options):
    """`scan` of x, dt, A, B, C, D, z, initial_state and dt_bias; what it gives at pads is zeroed."""

    def run(*arguments):
        y, state = scan(*arguments[:8], dt_bias=arguments[8], softplus=True, lengths=lengths, **options)
        if lengths is not None:
            y = y.masked_fill((torch.arange(y.shape[1]) >= lengths[:, None])[..., None], 0.0)
        return y, state

    return run


RAW_NAMES = (*NAMES, "dt_bias")


@pytest.mark.parametrize("lengths", [None, (37, 0, 16)])
def test_the_reference_takes_raw_steps(lengths):
    lengths = None if lengths is None else torch.tensor(lengths)
    *arguments, bias = raw_inputs(3, 37, 5, 4)
    y, state = with_raw_steps(selective_scan_naive, lengths)(*arguments, bias)
    for row, end in enumerate([37] * 3 if lengths is None else lengths.tolist()):
        x, dt, B, C, z = (arguments[i][row : row + 1, :end] for i in (0, 1, 3, 4, 6))
        A, D, h = arguments[2], arguments[5], arguments[7][row : row + 1]
        dt = torch.log1p(torch.exp(dt + bias))
        expected_y, expected_state = selective_scan_naive(x, dt, A, B, C, D, z, h)
        assert_close(y[row : row + 1, :end], expected_y, 1e-12, "y")
        assert_close(state[row : row + 1], expected_state, 1e-12, "state")


@pytest.mark.smoke
@pytest.mark.parametrize("lengths", [None, (37, 0, 16)])
@pytest.mark.parametrize("state", [False, True])
def test_raw_steps(state, lengths):
    lengths = None if lengths is None else torch.tensor(lengths)
    arguments = raw_inputs(3, 37, 5, 4, state=state)
    expected = values_and_gradients(with_raw_steps(selective_scan_naive, lengths), arguments, names=RAW_NAMES)
    actual = values_and_gradients(with_raw_steps(selective_scan, lengths), arguments, names=RAW_NAMES)
    assert_results(actual, expected, 1e-10)


@pytest.mark.parametrize("scan", [selective_scan_naive, selective_scan])
def test_steps_of_some_tokens_are_shifted(scan):
    """As if their dt had been another, in values and gradients, that of the shift included."""
    arguments = [*raw_inputs(3, 37, 5, 4), torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)]
    where = torch.tensor([0, 5, 36, 37, 80, 110])
    there = torch.zeros(3 * 37, 1, dtype=torch.float64).index_fill_(0, where, 1.0).view(3, 37, 1)

    def shifted(*arguments):
        return with_raw_steps(scan, shift=(where, arguments[9]))(*arguments[:9])

    def moved(x, dt, *others):
        return with_raw_steps(selective_scan_naive)(x, dt + there * others[7], *others[:7])

    names = (*RAW_NAMES, "shift")
    expected = values_and_gradients(moved, arguments, names=names)
    assert_results(values_and_gradients(shifted, arguments, names=names), expected, 1e-10)


def test_a_shift_is_added_in_float32_whatever_the_result_has():
    dt, added = torch.randn(2, 7, 5).bfloat16(), torch.randn(5)
    where = torch.tensor([1, 6, 7, 13])
    wide, narrow = with_shift(dt, (where, added)), with_shift(dt, (where, added), rounded=True)
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(narrow, wide.bfloat16())
    assert torch.equal(wide.flatten(0, 1)[where], dt.float().flatten(0, 1)[where] + added)
    assert with_shift(dt, None) is dt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_mixer_hands_its_bias_over_only_where_that_changes_nothing(dtype):
    """A hook on dt_proj sees its result and acts; without one, and with one that does nothing, results are the same."""
    model = tiny_model(dtype)
    mixer = model.backbone.layers[0].mixer
    hidden = torch.randn(2, 9, 16).to(dtype)
    step = torch.randn(2, 9, mixer.dt_proj.in_features).to(dtype)
    bias = mixer.dt_proj.bias
    bias.data = bias.data.to(torch.promote_types(dtype, torch.float32))  # as it is loaded
    raw, bias = mixer._step_size(step, None)
    assert raw.dtype == dtype
    assert bias is mixer.dt_proj.bias
    expected = mixer(hidden)
    seen = []
    with_hook = mixer.dt_proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
    whole, none = mixer._step_size(step, None)
    assert none is None
    assert torch.equal(whole, raw + bias)
    assert torch.equal(mixer(hidden), expected)
    assert len(seen) == 2
    with_hook.remove()
    mixer.dt_proj.register_forward_hook(lambda module, inputs, output: output + 1.0)
    assert not torch.allclose(mixer(hidden), expected, atol=1e-3)
    narrow = tiny_model(torch.bfloat16).backbone.layers[0].mixer  # then the module rounds their sum
    assert narrow.dt_proj.bias.dtype == torch.bfloat16
    assert narrow._step_size(torch.randn(2, 9, 1, dtype=torch.bfloat16), None)[1] is None


@pytest.fixture
def own_kernel(monkeypatch):
    """Calls of `scan_forward` and `scan_with_gradients`, which run on GPUs alone: stand-ins that compute."""
    calls = []

    def stand_in(name):
        def scan(*arguments):
            calls.append(name)
            return selective_scan_naive(*arguments)

        return scan

    monkeypatch.setattr(module, "can_scan", lambda *tensors: True)
    for name in ("scan_forward", "scan_with_gradients"):
        monkeypatch.setattr(module, name, stand_in(name))
    return calls


def test_the_own_kernels_are_one_for_what_needs_no_gradient_and_one_for_what_does(own_kernel):
    arguments = raw_inputs(2, 9, 5, 4, dtype=torch.float32)
    lengths = torch.tensor([9, 4])
    expected = with_raw_steps(selective_scan_naive, lengths)(*arguments)
    for context, gradient in ((torch.no_grad, None), (torch.enable_grad, None), (torch.no_grad, 0)):
        given = [a.clone().requires_grad_(i == gradient) for i, a in enumerate(arguments)]
        with context():
            actual = with_raw_steps(selective_scan, lengths)(*given)
            alone, none = with_raw_steps(selective_scan, lengths, return_final_state=False)(*given)
        for found, wanted in zip(actual, expected, strict=True):
            assert torch.equal(found, wanted)
        assert torch.equal(alone, expected[0])
        assert none is None
    assert own_kernel == ["scan_forward"] * 6
    own_kernel.clear()
    for gradient in range(len(arguments)):
        with_raw_steps(selective_scan)(*[a.clone().requires_grad_(i == gradient) for i, a in enumerate(arguments)])
    assert own_kernel == ["scan_with_gradients"] * len(arguments)
    own_kernel.clear()
    added = torch.zeros(5, requires_grad=True)
    with_raw_steps(selective_scan, shift=(torch.tensor([0]), added))(*arguments)
    assert own_kernel == ["scan_with_gradients"]
    with without_kernels():
        with_raw_steps(selective_scan)(*arguments)
        with_raw_steps(selective_scan)(*[a.clone().requires_grad_() for a in arguments])
    assert len(own_kernel) == 1


def test_an_own_kernel_that_fails_is_left_alone(own_kernel, monkeypatch):
    """Told once, then as without it; bad input and full memory are the caller's to hear of."""
    arguments = raw_inputs(2, 9, 5, 4, dtype=torch.float32)
    with without_kernels():
        expected = with_raw_steps(selective_scan)(*arguments)
    monkeypatch.setattr(module, "_triton_fails", False)
    errors = [torch.cuda.OutOfMemoryError("full"), ValueError("bad"), RuntimeError("no compiler")]

    def fails(*arguments):
        raise errors.pop(0)

    monkeypatch.setattr(module, "scan_forward", fails)
    for error in (torch.cuda.OutOfMemoryError, ValueError):
        with pytest.raises(error):
            with_raw_steps(selective_scan)(*arguments)
    with pytest.warns(UserWarning, match="without its own kernel.*no compiler"):
        first = with_raw_steps(selective_scan)(*arguments)
    for result in (first, with_raw_steps(selective_scan)(*arguments)):
        assert all(torch.equal(found, wanted) for found, wanted in zip(result, expected, strict=True))


def test_the_own_kernel_is_not_traced(own_kernel, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with_raw_steps(selective_scan)(*raw_inputs(2, 9, 5, 4, dtype=torch.float32))
    assert not own_kernel


# mamba-ssm's kernel cannot run here. What surrounds it can: a stand-in with its signature, layout and limits.


class Call(NamedTuple):
    shape: torch.Size
    dtype: torch.dtype
    last_state: bool
    bias: bool
    softplus: bool


def fake_kernel(calls):
    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
        """mamba_ssm.ops.selective_scan_interface.selective_scan_fn: [B, E, L], from a zero state, last state detached."""
        assert delta_bias is None or delta_bias.dtype == torch.float32
        assert u.dtype == delta.dtype == B.dtype == C.dtype, "the kernel takes one input dtype"
        assert z is None or z.dtype == u.dtype
        assert A.dtype == torch.float32
        assert D is None or D.dtype == torch.float32
        assert A.shape[-1] <= 256
        calls.append(Call(u.shape, u.dtype, return_last_state, delta_bias is not None, delta_softplus))
        y, state = selective_scan_naive(
            *(t.transpose(1, 2) for t in (u, delta)), A, *(t.transpose(1, 2) for t in (B, C)), D,
            None if z is None else z.transpose(1, 2), dt_bias=delta_bias, softplus=delta_softplus,
        )  # fmt: skip
        y = y.transpose(1, 2)
        return (y, state.detach()) if return_last_state else y

    return selective_scan_fn


@pytest.fixture
def kernel_calls(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "usable_kernel", lambda name, *tensors: fake_kernel(calls))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return calls


@pytest.mark.smoke
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("length", [1, 2, 37])
def test_around_the_cuda_kernel(kernel_calls, state, gates, length):
    arguments = inputs(3, length, 5, 4, dtype=torch.float32, state=state, gates=gates)
    expected = values_and_gradients(selective_scan_naive, [a if a is None else a.double() for a in arguments])
    actual = values_and_gradients(selective_scan, arguments)
    assert len(kernel_calls) == 1
    assert_results(actual, expected, 2e-5)


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_around_the_cuda_kernel_without_gradients(kernel_calls, dtype, state):
    arguments = inputs(3, 20, 5, 4, dtype=dtype, state=state)
    expected, expected_state = selective_scan_naive(*[a if a is None else a.double() for a in arguments])
    with torch.no_grad():
        y, final = selective_scan(*arguments)
        y_alone, none = selective_scan(*arguments, return_final_state=False)
    assert none is None
    assert final.dtype == torch.float32
    assert y.dtype == y_alone.dtype == dtype
    assert_close(y, expected, LIMITS[dtype], "y")
    assert_close(y_alone, expected, LIMITS[dtype], "y")
    assert_close(final, expected_state, LIMITS[dtype], "state")
    # Only the initial state costs extra tokens.
    assert [call.shape[-1] for call in kernel_calls] == [20 + 4 * state] * 2


@pytest.mark.parametrize("lengths", [None, (20, 0, 7)])
@pytest.mark.parametrize("way", ["training", "with the final state", "with an initial state", "both"])
def test_raw_steps_around_the_cuda_kernel(kernel_calls, way, lengths):
    """Bias, softplus and pads are the kernel's, unless state tokens stand between its tokens."""
    lengths = None if lengths is None else torch.tensor(lengths)
    arguments = raw_inputs(3, 20, 5, 4, dtype=torch.float32, state=way in ("with an initial state", "both"))
    exact = [a if a is None else a.double() for a in arguments]
    final = way in ("with the final state", "both")
    weights = dict(names=RAW_NAMES, state_weight=float(final))
    scan = with_raw_steps(selective_scan, lengths, return_final_state=final)
    expected = values_and_gradients(with_raw_steps(selective_scan_naive, lengths), exact, **weights)
    actual = values_and_gradients(scan, arguments, **weights)
    if not final:
        assert actual.pop("state") is None
        del expected["state"]
    assert_results(actual, expected, 2e-5)
    assert [(call.bias, call.softplus) for call in kernel_calls] == [(way == "training",) * 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_raw_steps_are_not_rounded_around_the_cuda_kernel(kernel_calls, dtype):
    arguments = raw_inputs(3, 20, 5, 4, dtype=dtype, state=False)
    lengths = torch.tensor([20, 0, 7])
    expected, expected_state = with_raw_steps(selective_scan_naive, lengths)(*arguments)
    with torch.no_grad():
        y, state = with_raw_steps(selective_scan, lengths)(*arguments)
    assert torch.equal(y, expected)
    assert torch.equal(state, expected_state)
    assert kernel_calls == [(torch.Size([3, 5, 20]), dtype, True, True, True)]


@pytest.mark.parametrize("decay", [1e-3, 1.0, 1e3])
def test_states_of_any_size_pass_the_cuda_kernel(kernel_calls, decay):
    arguments = inputs(2, 9, 5, 4, dtype=torch.float32)
    arguments[2] = arguments[2] * decay
    arguments[7] = arguments[7] * torch.tensor([1e-6, 1e-3, 1.0, 1e3])
    expected = values_and_gradients(selective_scan_naive, [a.double() for a in arguments])
    assert_results(values_and_gradients(selective_scan, arguments), expected, 5e-5)


def test_dispatch_leaves_what_the_kernel_cannot_do(kernel_calls):
    arguments = inputs(2, 9, 5, 4, dtype=torch.float64)
    selective_scan(*arguments)
    wide = inputs(1, 3, 2, 257, dtype=torch.float32)
    selective_scan(*wide)
    assert not kernel_calls


def test_long_inputs_reach_the_cuda_kernel_in_pieces(monkeypatch):
    """It counts elements in 32 bits. Shapes alone, without memory: 6e9 elements in all."""
    batch, length, channels, size = 2, 200_000, 16_384, 8
    shapes = []

    def kernel(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
        shapes.append(u.shape)
        assert delta.shape == u.shape
        assert z is None or z.shape == u.shape
        assert B.shape == C.shape == (batch, size, u.shape[-1])
        state = A.new_empty(batch, channels, size)
        return (torch.empty_like(u), state) if return_last_state else torch.empty_like(u)

    monkeypatch.setattr(module, "usable_kernel", lambda name, *tensors: kernel)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    x = torch.empty(batch, length, channels, device="meta")
    B = torch.empty(batch, length, size, device="meta")
    A = torch.empty(channels, size, device="meta")
    with torch.no_grad():
        y, state = selective_scan(x, x, A, B, B, A[:, 0], x)
    assert y.shape == x.shape
    assert state.shape == (batch, channels, size)
    assert len(shapes) >= 3
    assert all(shape.numel() < 2**31 for shape in shapes)
    # Every piece but the first carries a state in, which costs it `size` tokens.
    assert sum(shape[-1] for shape in shapes) == length + size * (len(shapes) - 1)


@pytest.mark.parametrize("cut", [1, 20, 36])
def test_pieces_through_the_cuda_kernel_make_the_whole(kernel_calls, cut):
    arguments = inputs(2, 37, 5, 4, dtype=torch.float32)

    def in_pieces(x, dt, A, B, C, D, z, state):
        first, state = selective_scan(x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], D, z[:, :cut], state)
        second, state = selective_scan(x[:, cut:], dt[:, cut:], A, B[:, cut:], C[:, cut:], D, z[:, cut:], state)
        return torch.cat([first, second], dim=1), state

    expected = values_and_gradients(selective_scan_naive, [a.double() for a in arguments])
    assert_results(values_and_gradients(in_pieces, arguments), expected, 5e-5)
