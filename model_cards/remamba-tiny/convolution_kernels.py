# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The mixers' convolution over many tokens in one kernel that also leaves the state behind them. Used without gradients.

x is read from where it is, [B, L, E] with any strides but the last, so that parts of a projection need no copy. Pads behind
the tokens of a row cost nothing: the state is read where the tokens end.

`can_convolve` says where the kernel runs; its reference is `causal_conv1d_naive` (causal_convolution.py).

Shapes: `B` rows, `L` tokens, `E` channels, `W` width of the convolution.
"""

from __future__ import annotations

import torch

from .decode_kernels import _KERNEL_DTYPES, _blocks, _check_shape, _launch, _power_of_two, jit, kernels_can_run, tl

_TOKENS, _CHANNELS = 32, 128  # of a program; 4 warps then read 16 bytes of bfloat16 a thread at a time
_WIDEST = 16


def can_convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, initial_state: torch.Tensor | None = None
) -> bool:
    """Whether `convolve_forward` takes these tensors: where Triton runs, in float32, bfloat16 or float16, W up to 16."""
    present = [tensor for tensor in (x, weight, bias, initial_state) if tensor is not None]
    return (
        kernels_can_run(x.device)
        and weight.shape[1] <= _WIDEST
        and all(tensor.device == x.device and tensor.dtype in _KERNEL_DTYPES for tensor in present)
        and x.stride(-1) == 1
        and x.numel() > 0
    )


def convolve_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`causal_conv1d` without gradients, for tensors that `can_convolve` accepts; in float32, y rounded once.

    Args:
        x: [B, L, E]; the last stride is 1.
        weight: [E, W].
        bias: [E], or None.
        initial_state: [B, E, W], the inputs before x, oldest first; None: zeros.
        lengths: [B] long, tokens of each row; y means nothing at the pads behind them. None: all L.

    Returns:
        y [B, L, E] and the final state [B, E, W], both in x's dtype.
    """
    rows, length, channels = x.shape
    width = weight.shape[1]
    _check_shape("weight", weight, (channels, width))
    _check_shape("bias", bias, (channels,))
    _check_shape("initial_state", initial_state, (rows, channels, width))
    _check_shape("lengths", lengths, (rows,))
    weight = weight.contiguous()
    bias, initial_state, lengths = (t if t is None else t.contiguous() for t in (bias, initial_state, lengths))
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    final_state = x.new_empty(rows, channels, width)
    block = min(_power_of_two(channels), _CHANNELS)
    _launch(
        _convolution_kernel,
        (_blocks(length, _TOKENS), _blocks(channels, block), rows),
        4,
        *(x, weight, bias, initial_state, lengths, y, final_state, length, x.stride(0), x.stride(1)),
        CHANNELS=channels,
        WIDTH=width,
        TOKENS=_TOKENS,
        BLOCK=block,
        BLOCK_WIDTH=_power_of_two(width),
    )
    return y, final_state


@jit
def _tap(weight, channel, known, tap, WIDTH: tl.constexpr):
    """One of the weights of every channel, [1, channels] in float32."""
    return tl.load(weight + channel * WIDTH + tap, mask=known, other=0.0).to(tl.float32)[None, :]


@jit
def _convolution_kernel(
    x,
    weight,
    bias,
    initial_state,
    lengths,
    y,
    final_state,
    length,
    x_row,
    x_token,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    row = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = channel < CHANNELS
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    x += row * x_row
    in_states = (row * CHANNELS + channel) * WIDTH

    total = tl.zeros([TOKENS, BLOCK], tl.float32)
    for tap in tl.static_range(WIDTH):
        source = token + (tap - WIDTH + 1)
        inside = ((source >= 0) & (source < length))[:, None] & known[None, :]
        value = tl.load(x + source.to(tl.int64)[:, None] * x_token + channel[None, :], mask=inside, other=0.0)
        total += value.to(tl.float32) * _tap(weight, channel, known, tap, WIDTH)
    # Behind all other loads, which would wait for these in every program.
    if initial_state is not None:  # noqa: SIM102 - decided when it is compiled, unlike the next
        if tl.program_id(0) == 0:
            for tap in tl.static_range(WIDTH - 1):
                source = token + (tap - WIDTH + 1)
                before = (source < 0)[:, None] & known[None, :]
                kept = tl.load(initial_state + in_states[None, :] + (WIDTH + source)[:, None], mask=before, other=0.0)
                total += kept.to(tl.float32) * _tap(weight, channel, known, tap, WIDTH)
    if bias is not None:
        total += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    total = total / (1.0 + tl.exp(-total))
    place = (row * length + token.to(tl.int64))[:, None] * CHANNELS + channel[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=(token < length)[:, None] & known[None, :])

    if tl.program_id(0) == 0:
        end = length
        if lengths is not None:
            end = tl.minimum(tl.load(lengths + row), length).to(tl.int32)
        column = tl.arange(0, BLOCK_WIDTH)
        origin = end - WIDTH + column
        here = (column < WIDTH)[None, :] & known[:, None]
        last = tl.load(
            x + origin.to(tl.int64)[None, :] * x_token + channel[:, None], mask=here & (origin >= 0)[None, :], other=0.0
        )
        if initial_state is not None:
            missing = here & (origin < 0)[None, :]
            earlier = tl.load(initial_state + in_states[:, None] + (WIDTH + origin)[None, :], mask=missing, other=0.0)
            last = tl.where((origin < 0)[None, :], earlier.to(last.dtype), last)
        tl.store(final_state + in_states[:, None] + column[None, :], last, mask=here)
