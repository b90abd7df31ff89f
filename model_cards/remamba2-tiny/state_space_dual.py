# SPDX-License-Identifier: Apache-2.0
"""The state-space-dual operator of Mamba-2 (arXiv 2405.21060, section 6), with states in and out.

    h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]^T          y[t] = h[t] C[t] + D x[t]      for every head

Shapes: `b` rows, `L` tokens, `H` heads of `P` channels, `G` groups of heads that share B and C, `N` state size. x is
[b, L, H, P], dt [b, L, H], A and D [H], B and C [b, L, G, N]; the state is [b, H, P, N] in float32 (float64 if x is
float64). `dt` is the final step size, after bias, softplus and limits. A position with dt = 0 leaves the state as it is:
that is how pads are passed, on either side.

`state_space_dual` picks the way: mamba-ssm's Triton kernels, or a chunked form in plain torch that has no loop over tokens.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .optional_kernels import usable_kernel
from .precision import state_dtype, without_autocast


def state_space_dual_naive(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference of `state_space_dual`: the formula as written, one token after the other."""
    dtype, heads = state_dtype(x), x.shape[2]
    out_dtype = x.dtype
    x, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    B, C = (tensor.repeat_interleave(heads // tensor.shape[2], dim=2) for tensor in (B, C))
    state = x.new_zeros(x.shape[0], heads, x.shape[3], B.shape[3])
    if initial_state is not None:
        state = initial_state.to(dtype)
    outputs = []
    for t in range(x.shape[1]):
        if seq_idx is not None and t > 0:
            begins = seq_idx[:, t] != seq_idx[:, t - 1]
            state = torch.where(begins[:, None, None, None], torch.zeros_like(state), state)
        step = dt[:, t, :, None, None]
        state = torch.exp(step * A[:, None, None]) * state + step * x[:, t, ..., None] * B[:, t, :, None, :]
        outputs.append((state * C[:, t, :, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x)
    return _skip(y, x, D).to(out_dtype), state


def state_space_dual(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    return_final_state: bool = True,
    chunk_size: int = 256,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The operator, whichever way is fastest where the tensors are.

    The Triton kernels multiply float32 in TF32. A float32 x goes through them only if
    `torch.set_float32_matmul_precision` allows that, and else through the torch path, which is exact.

    Args:
        x: [b, L, H, P], any strides, any float dtype.
        dt: [b, L, H], step sizes >= 0; 0 passes a pad.
        A: [H], negative.
        B, C: [b, L, G, N]; head h reads group h // (H / G).
        D: [H], the skip connection, or None.
        initial_state: [b, H, P, N] (None: zeros). Gradients flow to it.
        seq_idx: [b, L] integers, of packed rows: the state begins anew wherever they change from one token to the next, and
            the initial state belongs to the first sequence. None: a row is one sequence.
        return_final_state: without it the state is not returned.
        chunk_size: tokens of a chunk of the Triton kernels, a power of two.

    Returns:
        y [b, L, H, P] in x's dtype and the final state [b, H, P, N] (None if not asked for), both with gradients.
    """
    if x.shape[2] % B.shape[2]:
        raise ValueError(f"{x.shape[2]} heads are no multiple of {B.shape[2]} groups.")
    runs = None if seq_idx is None else _runs(seq_idx)
    kernel = usable_kernel("state_space_dual", x, dt, A, B, C, D, initial_state)
    if kernel is not None and x.shape[1] > 0 and _kernel_is_exact_enough(x.dtype):
        y, final_state = _dual_cuda(kernel, _Operands(x, dt, B, C, initial_state, runs), A, D, chunk_size)
    else:
        y, final_state = _dual_torch(x, dt, A, B, C, D, initial_state, runs)
    return y, final_state if return_final_state else None


def state_space_dual_step(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    state: torch.Tensor,
) -> torch.Tensor:
    """One decoding step: x [b, H, P], dt [b, H], B and C [b, G, N] -> y [b, H, P]. `state` [b, H, P, N] is updated in
    place. No gradients."""
    kernel = usable_kernel("selective_scan_step", x, dt, A, B, C, D, state)
    if kernel is not None and x.dtype != torch.float64:
        channels, size = state.shape[2:]
        zero = torch.zeros_like(A)
        skip = zero if D is None else D
        # What does not depend on channel and state column is expanded, by which the kernel knows to load it once.
        with torch.cuda.device(x.device):
            return kernel(
                state,
                x,
                dt.unsqueeze(-1).expand(-1, -1, channels),
                A[:, None, None].expand(-1, channels, size),
                B,
                C,
                skip.unsqueeze(-1).expand(-1, channels),
                dt_bias=zero.unsqueeze(-1).expand(-1, channels),
            )
    dtype, heads = state.dtype, x.shape[1]
    step = dt.to(dtype)
    B, C = (tensor.to(dtype).repeat_interleave(heads // tensor.shape[1], dim=1) for tensor in (B, C))
    state.mul_(torch.exp(step * A.to(dtype))[..., None, None])
    state.addcmul_((step.unsqueeze(-1) * x.to(dtype)).unsqueeze(-1), B.unsqueeze(2))
    with without_autocast(x):
        y = torch.matmul(state, C.unsqueeze(-1)).squeeze(-1)
    return _skip(y, x.to(dtype), D).to(x.dtype)


def _skip(y: torch.Tensor, x: torch.Tensor, D: torch.Tensor | None) -> torch.Tensor:
    return y if D is None else torch.addcmul(y, x, D.to(y.dtype).unsqueeze(-1))


def _runs(seq_idx: torch.Tensor) -> torch.Tensor:
    """int32 [b, L]: which sequence of its row a token belongs to, counted from 0."""
    begins = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    return begins.cumsum(1, dtype=torch.int32)


# The chunked form. Inside a chunk of Q tokens the recurrence is a product of matrices, like attention with a decaying
# mask; between chunks it is carried, chunk by chunk. Chunks are worked off in segments, which bounds the memory of the
# masks [chunks, H, Q, Q] and keeps them in a CPU's cache.

_CHUNK = 64
_MASK_ELEMENTS = {"cpu": 1_000_000, "cuda": 64_000_000}  # of a segment


def _dual_torch(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    runs: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, length, heads, channels = x.shape
    dtype, out_dtype = state_dtype(x), x.dtype
    x, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    state = x.new_zeros(batch, heads, channels, B.shape[3]) if initial_state is None else initial_state.to(dtype)
    budget = _MASK_ELEMENTS.get(x.device.type, _MASK_ELEMENTS["cuda"])
    segment = _CHUNK * max(1, budget // max(batch * heads * _CHUNK * _CHUNK, 1))
    before = None if runs is None else torch.zeros_like(runs[:, 0])
    outputs = []
    with without_autocast(x):
        for begin in range(0, length, segment):
            span = slice(begin, min(begin + segment, length))
            y, state = _segment(
                x[:, span], dt[:, span], A, B[:, span], C[:, span], state, None if runs is None else runs[:, span], before
            )
            outputs.append(y)
            before = None if runs is None else runs[:, span.stop - 1]
    y = torch.cat(outputs, dim=1) if outputs else torch.zeros_like(x)
    return _skip(y, x, D).to(out_dtype), state


def _segment(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor,
    runs: torch.Tensor | None,
    before: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [b, T, H, P] of T tokens and the state behind them; `before` [b] is the run that `state` belongs to.

    Arrays inside are [b, c, G, r, ...]: c chunks, and r = H / G heads of a group.
    """
    length, channels, groups = x.shape[1], x.shape[3], B.shape[2]
    chunk = min(_CHUNK, length)
    missing = -length % chunk
    inputs, dt, B, C = (_as_chunks(t, chunk, missing) for t in (x * dt.unsqueeze(-1), dt, B, C))
    inputs = inputs.unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2, 5)  # [b, c, G, r, Q, P]
    # Sums of many steps differ by little: what decays from one token to another is their difference, so it is in float64.
    total = (dt * A).double().cumsum(2).permute(0, 1, 3, 2).unflatten(2, (groups, -1))  # [b, c, G, r, Q]
    mask = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).tril()
    from_start = total.to(x.dtype).exp()
    to_end = (total[..., -1:] - total).to(x.dtype).exp()
    carried = from_start[..., -1]
    if runs is not None and before is not None:
        runs = _as_chunks(runs.unsqueeze(-1), chunk, missing, fill=True).squeeze(-1)[:, :, None, None]  # [b, c, 1, 1, Q]
        mask = mask & (runs.unsqueeze(-1) == runs.unsqueeze(-2))
        ends = runs[..., -1]
        starts = torch.cat([before[:, None, None, None], ends[:, :-1]], dim=1)
        from_start = from_start * (runs == starts.unsqueeze(-1))
        to_end = to_end * (runs == ends.unsqueeze(-1))
        carried = carried * (ends == starts)
    decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).to(x.dtype).masked_fill(~mask, -math.inf).exp()

    B, C = B.transpose(2, 3), C.transpose(2, 3)  # [b, c, G, Q, N]
    y = (torch.matmul(C, B.transpose(-1, -2)).unsqueeze(3) * decay) @ inputs
    gained = (inputs * to_end.unsqueeze(-1)).transpose(-1, -2).flatten(3, 4) @ B  # [b, c, G, r * P, N]
    gained = gained.unflatten(3, (-1, channels)).flatten(2, 3)  # [b, c, H, P, N]
    carried = carried.flatten(2, 3)[..., None, None]
    befores = []
    for index in range(gained.shape[1]):
        befores.append(state)
        state = torch.addcmul(gained[:, index], carried[:, index], state)
    past = torch.stack(befores, dim=1).unflatten(2, (groups, -1)).flatten(3, 4)  # [b, c, G, r * P, N]
    read = (C @ past.transpose(-1, -2)).unflatten(-1, (-1, channels)).transpose(3, 4)  # [b, c, G, r, Q, P]
    y = torch.addcmul(y, read, from_start.unsqueeze(-1))
    return y.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)[:, :length], state


def _as_chunks(sequence: torch.Tensor, chunk: int, missing: int, fill: bool = False) -> torch.Tensor:
    """[b, T, ...] -> [b, c, Q, ...]; missing tokens are zeros, or with `fill` the last token again."""
    if missing:
        shape = (sequence.shape[0], missing, *sequence.shape[2:])
        more = sequence[:, -1:].expand(shape) if fill else sequence.new_zeros(shape)
        sequence = torch.cat([sequence, more], dim=1)
    return sequence.unflatten(1, (-1, chunk))


def _kernel_is_exact_enough(dtype: torch.dtype) -> bool:
    if dtype in (torch.bfloat16, torch.float16):
        return True
    return dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"


_LARGEST_GRID = 65_535  # blocks along CUDA's second axis


class _Operands(NamedTuple):
    """What the kernels read along the rows and tokens, and `initial_state` and `runs`, which may be None."""

    x: torch.Tensor
    dt: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    initial_state: torch.Tensor | None
    runs: torch.Tensor | None

    def rows(self, rows: slice) -> "_Operands":
        return _Operands(*(None if tensor is None else tensor[rows] for tensor in self))  # type: ignore[arg-type]

    def tokens(self, tokens: slice, state: torch.Tensor | None) -> "_Operands":
        x, dt, B, C = (tensor[:, tokens] for tensor in self[:4])
        runs = self.runs
        if runs is not None:
            # Counted from the token in front: what begins here with a sequence of its own must not read the state.
            runs = runs[:, tokens] - (runs[:, tokens.start - 1, None] if tokens.start else 0)
        return _Operands(x, dt, B, C, state, runs)


def _dual_cuda(
    kernel: Callable[..., Any], operands: _Operands, A: torch.Tensor, D: torch.Tensor | None, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    x, dt, B, C, initial_state, runs = operands
    batch, length = x.shape[:2]
    if _overflows(operands, chunk_size) and (batch > 1 or length > chunk_size):
        return _dual_by_halves(kernel, operands, A, D, chunk_size)
    with torch.cuda.device(x.device):
        return kernel(
            x,
            dt.float(),
            A.float(),
            B.to(x.dtype),
            C.to(x.dtype),
            chunk_size,
            D=None if D is None else D.float(),
            initial_states=None if initial_state is None else initial_state.float(),
            seq_idx=runs,
            return_final_states=True,
        )


def _overflows(operands: _Operands, chunk_size: int) -> bool:
    """Whether the kernels' 32-bit offsets do not reach all of what they are given, with its strides, or allocate, or their
    grid of blocks is more than CUDA launches."""
    x, B = operands.x, operands.B
    batch, length, heads, channels = x.shape
    groups, size = B.shape[2:]
    chunks = batch * -(-length // chunk_size)
    # A chunk of the outputs, of the states, of C B^T, and of what the backward pass adds up over blocks of 32 tokens.
    a_chunk = max(
        chunk_size * heads * channels,
        heads * channels * size,
        groups * chunk_size * chunk_size,
        heads * chunk_size * -(-chunk_size // 32),
    )
    reached = max(
        sum((count - 1) * stride for count, stride in zip(tensor.shape, tensor.stride(), strict=True))
        for tensor in operands[:4]
    )
    return chunks > _LARGEST_GRID or max(chunks * a_chunk, reached) >= 2**31


def _dual_by_halves(
    kernel: Callable[..., Any], operands: _Operands, A: torch.Tensor, D: torch.Tensor | None, chunk_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half of the rows after the other, or for a single row half of its tokens after the other."""
    batch, length = operands.x.shape[:2]
    if batch > 1:
        parts = [operands.rows(half) for half in (slice(0, batch // 2), slice(batch // 2, batch))]
        results = [_dual_cuda(kernel, part, A, D, chunk_size) for part in parts]
        return torch.cat([y for y, _ in results]), torch.cat([state for _, state in results])
    y1, state = _dual_cuda(kernel, operands.tokens(slice(0, length // 2), operands.initial_state), A, D, chunk_size)
    y2, state = _dual_cuda(kernel, operands.tokens(slice(length // 2, length), state), A, D, chunk_size)
    return torch.cat([y1, y2], dim=1), state
