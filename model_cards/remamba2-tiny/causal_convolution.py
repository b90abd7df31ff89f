# SPDX-License-Identifier: Apache-2.0
"""Depthwise causal convolution that takes and returns its state.

Shapes: `B` batch, `L` tokens, `E` channels, `W` kernel width. Sequences are [B, L, E], so that no transpose is needed
around the projections; the state is [B, E, W], the last `W` inputs of each row, oldest first, as transformers caches it.
A row may hold pads after its tokens: `lengths` says how many tokens count, and the state is then taken where they end.
"""

import torch
import torch.nn.functional as F

from .convolution_kernels import can_convolve, convolve_forward
from .optional_kernels import kernels_enabled, usable_kernel


def causal_conv1d_naive(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference of `causal_conv1d`: one token after the other, in the dtype of its inputs."""
    batch, length, channels = x.shape
    width = weight.shape[-1]
    state = x.new_zeros(batch, channels, width) if initial_state is None else initial_state.to(x.dtype)
    outputs = []
    for t in range(length):
        shifted = torch.cat([state[..., 1:], x[:, t].unsqueeze(-1)], dim=-1)
        y = (shifted * weight).sum(-1)
        outputs.append(F.silu(y if bias is None else y + bias))
        counts = torch.ones(batch, dtype=torch.bool, device=x.device) if lengths is None else lengths > t
        state = torch.where(counts[:, None, None], shifted, state)
    return torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x), state


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    return_final_state: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`silu(conv(x) + bias)`, every channel on its own, seeing only the past.

    Args:
        x: [B, L, E], any strides.
        weight: [E, W].
        bias: [E], or None.
        initial_state: [B, E, W], the inputs before x (None: zeros). Gradients flow to it.
        lengths: [B] long, tokens that count in each row, the rest are pads behind them (None: all L).
        return_final_state: without it the state is not returned.

    Returns:
        The output [B, L, E] in x's dtype (arbitrary at pads), and the final state [B, E, W] (None if not asked for), both
        with gradients.
    """
    tensors = (x, weight, bias, initial_state)
    needs_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if kernels_enabled() and not needs_gradient and not torch.compiler.is_compiling() and can_convolve(*tensors):
        y, state = convolve_forward(*tensors, lengths)
        return y, state if return_final_state else None
    final_state = _final_state(x, weight.shape[-1], initial_state, lengths) if return_final_state else None
    kernel = usable_kernel("causal_convolution", x, weight, bias, initial_state)
    if kernel is not None and _kernel_takes(x, weight, initial_state):
        y = _convolve_cuda(kernel, x, weight, bias, initial_state)
    else:
        y = _convolve_torch(x, weight, bias, initial_state)
    return y, final_state


def causal_conv1d_step(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, state: torch.Tensor
) -> torch.Tensor:
    """One decoding step: x [B, E] -> [B, E]; `state` [B, E, W] is shifted in place. No gradients."""
    kernel = usable_kernel("causal_convolution_step", x, weight, bias, state)
    if kernel is not None and 2 <= weight.shape[-1] <= 4 and state.dtype == x.dtype:
        with torch.cuda.device(x.device):
            return kernel(x, state, weight.to(x.dtype), _cast(bias, x.dtype), activation="silu")
    state.copy_(torch.cat([state[..., 1:], x.unsqueeze(-1).to(state.dtype)], dim=-1))
    y = (state.to(x.dtype) * weight.to(x.dtype)).sum(-1)
    return F.silu(y if bias is None else y + bias.to(x.dtype))


def _final_state(
    x: torch.Tensor, width: int, initial_state: torch.Tensor | None, lengths: torch.Tensor | None
) -> torch.Tensor:
    """The last `width` inputs before each row's end, reaching back into the initial state where x is shorter."""
    batch, length, channels = x.shape
    if initial_state is None:
        initial_state = x.new_zeros(batch, channels, width)
    if lengths is None:
        kept = x[:, max(length - width, 0) :].transpose(1, 2)
        return torch.cat([initial_state[..., min(length, width) :].to(x.dtype), kept], dim=-1)
    ends = lengths[:, None] + torch.arange(width, device=x.device)  # in the row (initial state, x)
    row = torch.cat([initial_state.transpose(1, 2).to(x.dtype), x], dim=1)
    return row.gather(1, ends[..., None].expand(-1, -1, channels)).transpose(1, 2)


def _convolve_torch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, initial_state: torch.Tensor | None
) -> torch.Tensor:
    """`W` shifted multiply-adds over the whole sequence: as fast as a grouped conv1d, and no layout change."""
    width, length = weight.shape[-1], x.shape[1]
    if initial_state is None:
        extended = F.pad(x, (0, 0, width - 1, 0))
    else:
        extended = torch.cat([initial_state[..., 1:].transpose(1, 2).to(x.dtype), x], dim=1)
    taps = weight.to(x.dtype).unbind(-1)
    y = extended[:, :length] * taps[0]
    for shift in range(1, width):
        y = torch.addcmul(y, extended[:, shift : shift + length], taps[shift])
    return F.silu(y if bias is None else y + bias.to(x.dtype))


def _kernel_takes(x: torch.Tensor, weight: torch.Tensor, initial_state: torch.Tensor | None) -> bool:
    """causal-conv1d's kernels: widths 2 to 4, 32-bit offsets, no float64. One wants the length to be the fastest dimension
    and no state, the other the channels, and strides in multiples of 8."""
    if not (2 <= weight.shape[-1] <= 4 and x.dtype in (torch.float32, torch.float16, torch.bfloat16) and x.shape[1] > 0):
        return False
    if x.stride(1) == 1 and x.shape[1] > 1 and initial_state is None:
        return x.shape[2] * x.stride(2) < 2**31
    return (
        x.stride(2) == 1
        and x.shape[2] % 8 == 0
        and x.stride(0) % 8 == 0
        and x.stride(1) % 8 == 0
        and x.shape[0] * max(x.stride(0), 1) < 2**31
    )


def _convolve_cuda(
    kernel, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, initial_state: torch.Tensor | None
) -> torch.Tensor:
    if initial_state is not None:  # channel-last as well: [B, E, W-1] with the channels contiguous
        initial_state = initial_state[..., 1:].to(x.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    with torch.cuda.device(x.device):
        y = kernel(
            x.transpose(1, 2),
            weight.to(x.dtype),
            _cast(bias, x.dtype),
            initial_states=initial_state,
            activation="silu",
        )
    return y.transpose(1, 2)


def _cast(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(dtype)
