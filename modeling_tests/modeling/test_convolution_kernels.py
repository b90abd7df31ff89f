# SPDX-License-Identifier: Apache-2.0
"""The convolution's own kernel against the loop in float64: any sizes, widths, strides, pads, states in and out.

`test_in_tritons_interpreter` runs this file once more, in a process of its own where the kernel runs on the CPU. Elsewhere
it needs a GPU. The check is a function of the device, for the GPU tests to use.
"""

import pytest
import torch

from modeling_tests.modeling.test_decode_kernels import CAPS, CPU, Compare, Numbers, assert_near
from modeling_tests.modeling.tritons_interpreter import INTERPRETED, run_in_interpreter
from remamba_hf.modeling import causal_convolution as module
from remamba_hf.modeling.causal_convolution import causal_conv1d, causal_conv1d_naive
from remamba_hf.modeling.convolution_kernels import can_convolve, convolve_forward

interpreted = pytest.mark.skipif(not INTERPRETED, reason="the kernel runs on a GPU or in Triton's interpreter")


def test_in_tritons_interpreter():
    run_in_interpreter(__file__)


def check_convolve(
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    state: bool = True,
    bias: bool = True,
    lengths: tuple[int, ...] | None = None,
    compare: Compare = assert_near,
) -> None:
    """Of x [B, L, E] between columns that are none of its business, for `sizes` (B, L, E, W)."""
    rows, length, channels, width = sizes
    numbers = Numbers(device, dtype)
    x = numbers.view(rows * length, channels, skipped=8).unflatten(0, (rows, length))
    weight = numbers.normal(width, channels, scale=width**-0.5).t()
    initial = numbers.normal(rows, width, channels).transpose(1, 2) if state else None
    shift = numbers.normal(channels) if bias else None
    ends = None if lengths is None else torch.tensor(lengths, device=device)
    assert can_convolve(x, weight, shift, initial)
    given = (x, weight, shift, initial)
    expected, expected_state = causal_conv1d_naive(*(None if t is None else t.double() for t in given), ends)
    y, final_state = convolve_forward(*given, ends)
    assert y.dtype == final_state.dtype == dtype
    assert y.isfinite().all()
    if ends is not None:
        pads = (torch.arange(length, device=device) >= ends[:, None]).unsqueeze(-1)
        y, expected = y.masked_fill(pads, 0.0), expected.masked_fill(pads, 0.0)
    compare("convolution, y", y, expected, CAPS[dtype])
    assert torch.equal(final_state.double(), expected_state), "the state is a copy of inputs"


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 3, 5, 4), (3, 31, 130, 2), (2, 33, 40, 3), (1, 70, 256, 9)], ids=str)
def test_any_sizes(sizes, dtype):
    rows, length = sizes[:2]
    check_convolve(CPU, dtype, sizes)
    check_convolve(CPU, dtype, sizes, state=False, bias=False)
    check_convolve(CPU, dtype, sizes, lengths=tuple((length - row * 2) % (length + 1) for row in range(rows)))


@interpreted
@pytest.mark.parametrize("state", [True, False])
def test_rows_shorter_than_the_convolution_and_rows_of_pads(state):
    check_convolve(CPU, torch.float32, (6, 35, 20, 4), state, lengths=(0, 1, 2, 3, 4, 35))
    check_convolve(CPU, torch.float32, (3, 2, 20, 4), state, lengths=(0, 1, 2))


@interpreted
def test_it_is_what_runs_without_gradients(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "convolve_forward", lambda *given: calls.append(given) or convolve_forward(*given))
    x, weight = torch.randn(2, 9, 6), torch.randn(6, 4)
    y, state = causal_conv1d(x, weight)
    assert len(calls) == 1
    assert causal_conv1d(x, weight, return_final_state=False)[1] is None
    trained = causal_conv1d(x.requires_grad_(), weight)
    assert len(calls) == 2
    assert_near("y with gradients", trained[0], y, 1e-6)
    assert torch.equal(trained[1], state)


@interpreted
def test_what_it_does_not_take():
    x, weight = torch.randn(2, 9, 6), torch.randn(6, 4)
    assert can_convolve(x, weight)
    assert not can_convolve(x.double(), weight.double())
    assert not can_convolve(x.transpose(1, 2).contiguous().transpose(1, 2), weight)
    assert not can_convolve(x, torch.randn(6, 17))
    assert not can_convolve(x[:, :0], weight)
    with pytest.raises(ValueError, match="weight has the shape"):
        convolve_forward(x, torch.randn(5, 4))


def test_the_state_is_only_made_where_it_is_asked_for():
    x, weight = torch.randn(2, 9, 6, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    y, state = causal_conv1d(x, weight)
    assert state is not None
    only_y, nothing = causal_conv1d(x, weight, return_final_state=False)
    assert nothing is None
    assert torch.equal(only_y, y)
