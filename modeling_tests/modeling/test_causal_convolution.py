# SPDX-License-Identifier: Apache-2.0
"""The causal convolution: the shifted multiply-adds against the loop and torch's conv1d, states in and out, row lengths."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

from modeling_tests.modeling.tiny_models import assert_close, rms_ratio
from remamba_hf.modeling import causal_convolution as module
from remamba_hf.modeling.causal_convolution import causal_conv1d, causal_conv1d_naive, causal_conv1d_step

NAMES = ("x", "weight", "bias", "initial_state")
LENGTHS = (1, 2, 3, 4, 5, 63, 64, 65, 127, 129, 2047, 2049)


def inputs(batch, length, channels, width, dtype=torch.float64, bias=True, state=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    return [
        normal(batch, length, channels),
        normal(channels, width),
        normal(channels) if bias else None,
        normal(batch, channels, width) if state else None,
    ]


def values_and_gradients(convolve, arguments, lengths=None, y_weight=1.0, state_weight=1.0):
    arguments = [a if a is None else a.clone().requires_grad_() for a in arguments]
    y, state = convolve(*arguments, lengths=lengths)
    if lengths is not None:
        pads = torch.arange(y.shape[1]) >= lengths[:, None]
        y = y.masked_fill(pads.unsqueeze(-1), 0.0)
    generator = torch.Generator().manual_seed(1)
    loss = 0
    for output, weight in ((y, y_weight), (state, state_weight)):
        if weight:
            loss = loss + (output.double() * torch.randn(output.shape, dtype=torch.float64, generator=generator)).sum()
    present = [(name, a) for name, a in zip(NAMES, arguments, strict=True) if a is not None]
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
@pytest.mark.parametrize("state", [False, True])
def test_values_and_gradients_agree_with_the_loop_in_float64(length, state):
    arguments = inputs(1 + length % 5, length, (5, 8, 7)[length % 3], 4, state=state, bias=length % 2 == 0)
    expected = values_and_gradients(causal_conv1d_naive, arguments)
    assert_results(values_and_gradients(causal_conv1d, arguments), expected, 1e-12)


@pytest.mark.smoke
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_any_width_also_longer_than_the_sequence(width, length):
    arguments = inputs(2, length, 6, width)
    expected = values_and_gradients(causal_conv1d_naive, arguments)
    assert_results(values_and_gradients(causal_conv1d, arguments), expected, 1e-12)


@pytest.mark.parametrize("width", [2, 4])
def test_it_is_torchs_convolution(width):
    x, weight, bias, _ = inputs(2, 30, 6, width)
    expected = F.silu(F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), bias, padding=width - 1, groups=6)[..., :30])
    assert_close(causal_conv1d(x, weight, bias)[0], expected.transpose(1, 2), 1e-12)
    assert_close(causal_conv1d_naive(x, weight, bias)[0], expected.transpose(1, 2), 1e-12)


@pytest.mark.parametrize("lengths", [[9, 9, 9], [0, 1, 9], [3, 4, 5], [0, 0, 0], [2, 9, 0]])
@pytest.mark.parametrize("state", [False, True])
def test_rows_that_end_early(lengths, state):
    """Pads hold values of 1e6: the state and gradients must come from the row's own last tokens."""
    lengths = torch.tensor(lengths)
    arguments = inputs(3, 9, 5, 4, state=state)
    arguments[0] = arguments[0].masked_fill((torch.arange(9) >= lengths[:, None]).unsqueeze(-1), 1e6)
    expected = values_and_gradients(causal_conv1d_naive, arguments, lengths)
    actual = values_and_gradients(causal_conv1d, arguments, lengths)
    assert_results(actual, expected, 1e-12)
    for row, length in enumerate(lengths.tolist()):
        x, weight, bias, start = arguments
        start = start if start is None else start[row : row + 1]
        y, final = causal_conv1d(x[row : row + 1, :length], weight, bias, start)
        assert_close(actual["y"][row, :length], y[0], 1e-12, "y")
        assert_close(actual["state"][row], final[0], 1e-12, "state")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_near_float64(dtype):
    arguments = inputs(2, 129, 24, 4, dtype=dtype)
    exact = values_and_gradients(causal_conv1d_naive, [a.double() for a in arguments])
    loop = values_and_gradients(causal_conv1d_naive, arguments)
    fast = values_and_gradients(causal_conv1d, arguments)
    assert fast["y"].dtype == dtype
    for name in exact:
        assert rms_ratio(fast[name], exact[name]) <= max(2 * rms_ratio(loop[name], exact[name]), 1e-7), name
        assert rms_ratio(fast[name], exact[name]) <= {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype], name


@pytest.mark.parametrize(("y_weight", "state_weight"), [(1.0, 0.0), (0.0, 1.0)])
def test_a_loss_on_one_of_the_two_outputs(y_weight, state_weight):
    arguments = inputs(2, 3, 5, 4)
    weights = dict(y_weight=y_weight, state_weight=state_weight)
    expected = values_and_gradients(causal_conv1d_naive, arguments, **weights)
    assert_results(values_and_gradients(causal_conv1d, arguments, **weights), expected, 1e-12)


def test_gradcheck():
    arguments = [a.requires_grad_() for a in inputs(2, 6, 3, 3)]
    lengths = torch.tensor([6, 2])
    assert torch.autograd.gradcheck(causal_conv1d, arguments)
    assert torch.autograd.gradcheck(lambda *a: causal_conv1d(*a, lengths=lengths)[1], arguments)


@pytest.mark.parametrize("cuts", [[1], [2, 3], [4], list(range(1, 20))])
def test_pieces_make_the_whole(cuts):
    x, weight, bias, state = inputs(2, 20, 5, 4)
    expected, expected_state = causal_conv1d(x, weight, bias, state)
    outputs = []
    for begin, end in zip([0, *cuts], [*cuts, 20], strict=True):
        y, state = causal_conv1d(x[:, begin:end], weight, bias, state)
        outputs.append(y)
    assert_close(torch.cat(outputs, dim=1), expected, 1e-12, "y")
    assert_close(state, expected_state, 1e-12, "state")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 2, 4, 5])
def test_steps_make_the_sequence(dtype, width):
    x, weight, bias, state = inputs(3, 12, 6, width, dtype=dtype)
    expected, expected_state = causal_conv1d_naive(x, weight, bias, state)
    state = state.clone()
    address = state.data_ptr()
    steps = [causal_conv1d_step(x[:, t], weight, bias, state) for t in range(12)]
    assert state.data_ptr() == address
    assert_close(torch.stack(steps, dim=1), expected, {torch.bfloat16: 1e-2}.get(dtype, 1e-6), "y")
    assert torch.equal(state, expected_state)


@pytest.mark.parametrize("form", ["strided", "transposed", "chunk", "expanded"])
def test_strides_do_not_matter(form):
    x, weight, bias, state = inputs(3, 17, 6, 4)
    views = {
        "strided": lambda: torch.stack([x, x + 9], dim=-1).flatten(-2)[..., ::2],
        "transposed": lambda: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "chunk": lambda: torch.cat([x, x + 9], dim=-1).chunk(2, dim=-1)[0],
        "expanded": lambda: x[:1].expand(3, -1, -1),
    }
    view = views[form]()
    expected, expected_state = causal_conv1d_naive(view.clone().contiguous(), weight, bias, state)
    y, final = causal_conv1d(view, weight, bias, state)
    assert_close(y, expected, 1e-12, "y")
    assert torch.equal(final, expected_state)


def test_an_empty_sequence_passes_the_state():
    x, weight, bias, state = inputs(2, 0, 5, 4)
    y, final = causal_conv1d(x, weight, bias, state)
    assert y.shape == (2, 0, 5)
    assert torch.equal(final, state)


def test_the_initial_state_is_not_written_to():
    x, weight, bias, state = inputs(2, 7, 5, 4)
    before = state.clone()
    causal_conv1d(x, weight, bias, state, torch.tensor([7, 2]))
    assert torch.equal(state, before)


# causal-conv1d's kernel cannot run here; a stand-in with its signature, layout and limits shows that the call is right.


@pytest.fixture
def kernel_calls(monkeypatch):
    calls = []

    def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, activation=None):
        """x [B, E, L] with channels or tokens contiguous, weight [E, W], initial_states [B, E, W-1] channel-last."""
        assert activation == "silu"
        assert weight.dtype == x.dtype
        assert bias is None or bias.dtype == x.dtype
        assert x.stride(1) == 1
        assert x.stride(0) % 8 == 0
        assert x.stride(2) % 8 == 0
        if initial_states is not None:
            assert initial_states.shape == (x.shape[0], x.shape[1], weight.shape[-1] - 1)
            assert initial_states.stride(1) == 1
            initial_states = F.pad(initial_states, (1, 0))
        calls.append(tuple(x.shape))
        return causal_conv1d_naive(x.transpose(1, 2), weight, bias, initial_states)[0].transpose(1, 2)

    monkeypatch.setattr(module, "usable_kernel", lambda name, *tensors: causal_conv1d_fn)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return calls


@pytest.mark.smoke
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("lengths", [None, [9, 2]])
def test_around_the_cuda_kernel(kernel_calls, state, lengths):
    lengths = lengths if lengths is None else torch.tensor(lengths)
    arguments = inputs(2, 9, 16, 4, dtype=torch.float32, state=state)
    expected = values_and_gradients(causal_conv1d_naive, [a if a is None else a.double() for a in arguments], lengths)
    assert_results(values_and_gradients(causal_conv1d, arguments, lengths), expected, 1e-6)
    assert kernel_calls == [(2, 16, 9)]


def test_around_the_cuda_kernel_with_half_of_a_projection(kernel_calls):
    x, weight, bias, state = inputs(2, 9, 16, 4, dtype=torch.float32)
    view = torch.cat([x, x], dim=-1).chunk(2, dim=-1)[1]
    assert_close(causal_conv1d(view, weight, bias, state)[0], causal_conv1d_naive(x, weight, bias, state)[0], 1e-6)
    assert kernel_calls


@pytest.mark.parametrize(
    ("width", "channels", "dtype"),
    [(5, 16, torch.float32), (1, 16, torch.float32), (4, 12, torch.float32), (4, 16, torch.float64)],
)
def test_dispatch_leaves_what_the_kernel_cannot_do(kernel_calls, width, channels, dtype):
    causal_conv1d(*inputs(2, 9, channels, width, dtype=dtype))
    assert not kernel_calls
