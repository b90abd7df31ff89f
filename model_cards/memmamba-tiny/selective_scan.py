# SPDX-License-Identifier: Apache-2.0
"""The selective scan of Mamba (arXiv 2312.00752, Eq. 2 and 4), with states in and out.

    h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] x[t]          y[t] = C[t] h[t] + D x[t],  then  y * silu(z)

Shapes: `B` batch, `L` tokens, `E` channels, `N` state size. Sequences are [B, L, E] and [B, L, N]; the state is [B, E, N]
in float32 (float64 if x is float64). A position with dt = 0 leaves the state as it is: that is how pads are passed, on
either side.

`selective_scan` picks the way: the Triton kernels of scan_kernels.py and, with gradients, of scan_gradients.py, else
mamba-ssm's CUDA kernel, else a blocked scan in plain torch that has no loop over tokens.
"""

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from .optional_kernels import kernels_enabled, usable_kernel
from .precision import at_least_float32, state_dtype, with_shift, without_autocast
from .scan_gradients import scan_with_gradients
from .scan_kernels import can_scan, scan_forward


def selective_scan_naive(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    softplus: bool = False,
    lengths: torch.Tensor | None = None,
    shift: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference of `selective_scan`: the formula as written, one token after the other."""
    dtype = state_dtype(x)
    out_dtype = x.dtype
    dt = _step_size(with_shift(dt, shift), dt_bias, softplus, lengths)
    x, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    state = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(x.shape[1]):
        step = dt[:, t, :, None]
        state = torch.exp(step * A) * state + step * B[:, t, None, :] * x[:, t, :, None]
        outputs.append((state * C[:, t, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x)
    return _skip_and_gate(y, x, D, z).to(out_dtype), state


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    return_final_state: bool = True,
    dt_bias: torch.Tensor | None = None,
    softplus: bool = False,
    lengths: torch.Tensor | None = None,
    shift: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The scan, whichever way is fastest where the tensors are.

    Args:
        x: [B, L, E], any strides, any float dtype.
        dt: [B, L, E], step sizes, >= 0 after bias and softplus; 0 passes a pad.
        A: [E, N], negative.
        B, C: [B, L, N].
        D: [E], the skip connection, or None.
        z: [B, L, E], the gate before its silu, or None.
        initial_state: [B, E, N] (None: zeros). Gradients flow to it.
        return_final_state: without it the state may be skipped, which is faster in training.
        dt_bias: [E], added to dt in float32 at least, or None.
        softplus: dt, with its bias, goes through softplus.
        lengths: [B] long, tokens of each row; behind them are pads, where dt becomes 0 and y is arbitrary. None: all L.
        shift: (where [n], added [E]): of some tokens, different flat positions among the B L, what is added to dt like
            the bias. None: none.

    Returns:
        y [B, L, E] in x's dtype and the final state [B, E, N] (None if not asked for), both with gradients.
    """
    tensors = (x, dt, A, B, C, D, z, initial_state, dt_bias, None if shift is None else shift[1])
    needs_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if kernels_enabled() and not torch.compiler.is_compiling() and can_scan(*tensors):
        scan = scan_with_gradients if needs_gradient else scan_forward
        result = _scan_triton(scan, x, dt, A.float(), B, C, D, z, initial_state, dt_bias, softplus, lengths, shift)
        if result is not None:
            return result[0], result[1] if return_final_state else None
    kernel = usable_kernel("selective_scan", *tensors)
    if kernel is not None and x.dtype != torch.float64 and A.shape[-1] <= 256 and x.shape[1] > 0:
        if _takes_raw_steps(x, A, initial_state, return_final_state and needs_gradient):
            dt = with_shift(dt, shift, rounded=dt.dtype == x.dtype)
            return _scan_cuda(kernel, x, dt, A, B, C, D, z, None, return_final_state, dt_bias, softplus, lengths)
        dt = _step_size(with_shift(dt, shift), dt_bias, softplus, lengths)
        return _scan_cuda(kernel, x, dt, A, B, C, D, z, initial_state, return_final_state)
    dt = _step_size(with_shift(dt, shift), dt_bias, softplus, lengths)
    dtype = state_dtype(x)
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], *A.shape, dtype=dtype)
    with without_autocast(x):  # the state is read in its own dtype
        y, final_state = _BlockedScan.apply(
            x.to(dtype), dt.to(dtype), A.to(dtype), B.to(dtype), C.to(dtype), initial_state.to(dtype)
        )
    return _skip_and_gate(y, x.to(dtype), D, z).to(x.dtype), final_state


def selective_scan_step(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    state: torch.Tensor,
) -> torch.Tensor:
    """One decoding step: x, dt, z [B, E]; B, C [B, N] -> y [B, E]. `state` [B, E, N] is updated in place. No gradients."""
    kernel = usable_kernel("selective_scan_step", x, dt, A, B, C, D, z, state)
    if kernel is not None and x.dtype != torch.float64:
        zero = torch.zeros_like(A[:, 0])  # released kernels fail on a missing bias or skip, though both are optional
        with torch.cuda.device(x.device):
            return kernel(state, x, dt, A, B, C, zero if D is None else D, z=z, dt_bias=zero)
    dtype = state.dtype
    step = dt.to(dtype).unsqueeze(-1)
    state.mul_(torch.exp(step * A.to(dtype)))
    state.addcmul_(step * x.to(dtype).unsqueeze(-1), B.to(dtype).unsqueeze(1))
    with without_autocast(x):
        y = torch.matmul(state, C.to(dtype).unsqueeze(-1)).squeeze(-1)
    return _skip_and_gate(y, x.to(dtype), D, z).to(x.dtype)


_triton_fails = False


def _scan_triton(scan: Callable[..., Any], *arguments: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The scan, or None once it could not be compiled or launched: without a C compiler Triton imports, but fails."""
    global _triton_fails
    if _triton_fails:
        return None
    try:
        return scan(*arguments)
    except (ValueError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        _triton_fails = True
        warnings.warn(f"The scan goes on without its own kernel, which cannot run here ({error}).", stacklevel=3)
        return None


def _step_size(dt: torch.Tensor, bias: torch.Tensor | None, softplus: bool, lengths: torch.Tensor | None) -> torch.Tensor:
    """The final dt, in float32 at least if bias or softplus act."""
    if bias is not None:
        dt = at_least_float32(dt) + bias
    if softplus:
        dt = F.softplus(at_least_float32(dt))
    return _with_pads(dt, lengths, 0.0)


def _with_pads(dt: torch.Tensor, lengths: torch.Tensor | None, value: float) -> torch.Tensor:
    if lengths is None:
        return dt
    pads = torch.arange(dt.shape[1], device=dt.device) >= lengths[:, None]
    return dt.masked_fill(pads.unsqueeze(-1), value)


def _skip_and_gate(y: torch.Tensor, x: torch.Tensor, D: torch.Tensor | None, z: torch.Tensor | None) -> torch.Tensor:
    if D is not None:
        y = torch.addcmul(y, x, D.to(y.dtype))
    return y if z is None else y * F.silu(z.to(y.dtype))


# The blocked scan. A block of T tokens is cut into n chunks of c tokens. Every chunk runs its recurrence at the same time,
# c steps that each handle n tokens: once from zero, to learn what each chunk adds to the state, then, after n short
# steps that carry the state from chunk to chunk, once more from the right state. Arrays are [c, n, rows, N, E]: a step
# is one contiguous multiply-add, and E, the long dimension, is the one that vectorises. Blocks are sized to stay in cache.

_BLOCK_ELEMENTS = 1_600_000  # of one array; measured best on x86 CPUs with 1 to 2 MB of L2 cache a core
_CHUNK = 16


def _block_shape(elements_per_token: int, rows: int, length: int) -> tuple[int, int, int]:
    """(rows, chunk length c, chunks n) of a block, so that c * n * rows * elements_per_token stays near the budget."""
    rows = max(1, min(rows, _BLOCK_ELEMENTS // (2 * _CHUNK * elements_per_token)))
    tokens = min(length, max(2 * _CHUNK, _BLOCK_ELEMENTS // (rows * elements_per_token)))
    chunk = min(tokens, _CHUNK if tokens < 64 * _CHUNK else 2 * _CHUNK)
    return rows, chunk, max(1, -(-tokens // max(chunk, 1)))


def _as_chunks(sequence: torch.Tensor, chunk: int, chunks: int) -> torch.Tensor:
    """[rows, up to c * n, F] -> [c, n, rows, F]; missing tokens are zeros, which for dt means that nothing happens."""
    missing = chunk * chunks - sequence.shape[1]
    if missing:
        sequence = F.pad(sequence, (0, 0, 0, missing))
    return sequence.unflatten(1, (chunks, chunk)).permute(2, 1, 0, 3)


def _as_sequence(chunked: torch.Tensor, length: int) -> torch.Tensor:
    """[c, n, rows, F] -> [rows, length, F], the inverse of `_as_chunks`."""
    return chunked.permute(2, 1, 0, 3).flatten(1, 2)[:, :length]


def _solve(
    decay: torch.Tensor, state: torch.Tensor, start: torch.Tensor, chunk_decay: torch.Tensor, reverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace `state` by the solution of s[t] = decay[t] * s[t-1] + state[t], all of [c, n, rows, N, E], from `start`.

    With `reverse` time runs backwards. `chunk_decay` [n, rows, N, E] is the product of each chunk's decays. Returns what
    each chunk started from [n, rows, N, E], and the last solution [rows, N, E].
    """
    steps = range(len(decay) - 1, -1, -1) if reverse else range(len(decay))
    order = range(decay.shape[1] - 1, -1, -1) if reverse else range(decay.shape[1])
    before = torch.empty_like(decay[0])
    before[order[0]] = start
    if len(order) > 1:
        gained = state[steps[0]].clone()
        for t in steps[1:]:
            torch.addcmul(state[t], decay[t], gained, out=gained)
        for previous, current in pairwise(order):
            torch.addcmul(gained[previous], chunk_decay[previous], before[previous], out=before[current])
    last = before
    for t in steps:
        torch.addcmul(state[t], decay[t], last, out=state[t])
        last = state[t]
    return before, last[order[-1]].clone()


class _BlockedScan(torch.autograd.Function):
    """y, h[L] = scan(x, dt, A, B, C, h[0]) without skip and gate. Keeps one state a block and recomputes the others."""

    @staticmethod
    def forward(ctx: Any, x, dt, A, B, C, initial_state):
        At = A.t().contiguous()
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        final_state = torch.empty_like(initial_state, memory_format=torch.contiguous_format)
        starts: list[torch.Tensor] = []
        keep = any(ctx.needs_input_grad)
        for rows, spans, shape in _blocks(x, A):
            state = initial_state[rows].transpose(1, 2)
            for span in spans:
                if keep:
                    starts.append(state)
                block = _Block(x[rows, span], dt[rows, span], At, B[rows, span], C[rows, span], shape)
                _, state = block.solve(state)
                y[rows, span] = _as_sequence(torch.matmul(block.C.unsqueeze(-2), block.states).squeeze(-2), block.length)
            final_state[rows] = state.transpose(1, 2)
        ctx.save_for_backward(x, dt, A, B, C, *starts)
        return y, final_state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy, dfinal):
        with without_autocast(dy):
            return _scan_gradients(*ctx.saved_tensors, dy=dy, dfinal=dfinal)


def _scan_gradients(x, dt, A, B, C, *starts, dy, dfinal):
    """Gradients of the inputs of `_BlockedScan`, block by block from the last to the first."""
    At = A.t().contiguous()
    dx, ddt, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, B, C))
    dAt = torch.zeros_like(At)
    dinitial = torch.empty(x.shape[0], *A.shape, dtype=x.dtype, device=x.device)
    first = 0
    for rows, spans, shape in _blocks(x, A):
        carried = dfinal[rows].transpose(1, 2)  # gradient of the state that leaves the block, [rows, N, E]
        for index, span in reversed(list(enumerate(spans))):
            block = _Block(x[rows, span], dt[rows, span], At, B[rows, span], C[rows, span], shape)
            grads, carried = block.backward(starts[first + index], dy[rows, span], carried)
            for target, grad in zip((dx, ddt, dB, dC), grads[:4], strict=True):
                target[rows, span] = grad
            dAt += grads[4]
        dinitial[rows] = carried.transpose(1, 2)
        first += len(spans)
    return dx, ddt, dAt.t(), dB, dC, dinitial


def _blocks(x: torch.Tensor, A: torch.Tensor) -> list[tuple[slice, list[slice], tuple[int, int]]]:
    """Row groups, the token spans of each, and the (c, n) their blocks are cut into."""
    batch, length, _ = x.shape
    rows, chunk, chunks = _block_shape(A.numel(), batch, length)
    size = chunk * chunks
    spans = [slice(t, min(t + size, length)) for t in range(0, length, max(size, 1))]
    return [(slice(b, min(b + rows, batch)), spans, (chunk, chunks)) for b in range(0, batch, rows)]


class _Block:
    """One block's decays and inputs, [c, n, rows, N, E], and the recurrences over them."""

    def __init__(self, x, dt, At, B, C, shape: tuple[int, int]):
        self.length = x.shape[1]
        chunk = min(shape[0], self.length)
        chunks = -(-self.length // chunk)
        self.At = At
        self.x, self.dt, self.B, self.C = (_as_chunks(sequence, chunk, chunks) for sequence in (x, dt, B, C))
        self.decay = torch.mul(self.dt.unsqueeze(-2), At).exp_()
        self.chunk_decay = torch.mul(self.dt.sum(0).unsqueeze(-2), At).exp_()
        self.states = (self.dt * self.x).unsqueeze(-2) * self.B.unsqueeze(-1)

    def solve(self, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _solve(self.decay, self.states, start, self.chunk_decay)

    def backward(self, start: torch.Tensor, dy: torch.Tensor, carried: torch.Tensor):
        """Gradients of x, dt, B, C [rows, length, .] and of A^T, and of the state the block started from.

        With G[t] the gradient of h[t] and r[t] = exp(dt[t] A) G[t] what it hands to h[t-1]:
        G[t] = C[t] dy[t] + r[t+1], so r solves the same recurrence with time reversed.
        """
        before, _ = self.solve(start)
        previous = torch.cat([before.unsqueeze(0), self.states[:-1]])  # h[t-1]
        dy = _as_chunks(dy, *self.decay.shape[:2])
        gradient = self.C.unsqueeze(-1) * dy.unsqueeze(-2)
        handed = self.decay * gradient
        after, dstart = _solve(self.decay, handed, carried, self.chunk_decay, reverse=True)
        gradient[:-1] += handed[1:]
        gradient[-1] += after

        dC = torch.matmul(self.states, dy.unsqueeze(-1)).squeeze(-1)
        dB = torch.matmul(gradient, (self.dt * self.x).unsqueeze(-1)).squeeze(-1)
        dinput = torch.matmul(self.B.unsqueeze(-2), gradient).squeeze(-2)
        dlog = handed.mul_(previous)  # gradient of log decay = dt A
        ddt = dinput * self.x + (dlog * self.At).sum(-2)
        dAt = (dlog * self.dt.unsqueeze(-2)).sum((0, 1, 2))
        grads = [_as_sequence(grad, self.length) for grad in (dinput * self.dt, ddt, dB, dC)]
        return (*grads, dAt), dstart


# The CUDA kernel takes no initial state, and the last state it returns carries no gradient. Both are exact with tokens
# that stand for state columns: N in front, token n of them putting h[0][:, n] into column n, and N behind, with dt = 0
# and C = e_n, each reading column n out. These tokens carry the state in x, so then the kernel runs in float32.

_PSEUDO_STEP = 2.0**-20  # so small that exp(_PSEUDO_STEP * A * N) stays near 1; a power of two divides exactly


def _takes_raw_steps(
    x: torch.Tensor, A: torch.Tensor, initial_state: torch.Tensor | None, state_with_gradient: bool
) -> bool:
    """Whether the kernel runs once, on the tokens alone: it can then add bias, softplus and pads itself."""
    return initial_state is None and not state_with_gradient and not _too_long(x, A)


def _too_long(x: torch.Tensor, A: torch.Tensor) -> bool:
    """The kernel counts elements in 32 bits."""
    batch, length, channels = x.shape
    return length > 1 and batch * channels * (length + 2 * A.shape[-1]) >= 2**31


def _scan_cuda(
    kernel: Callable[..., Any],
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    initial_state,
    return_final_state: bool,
    dt_bias: torch.Tensor | None = None,
    softplus: bool = False,
    lengths: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """mamba-ssm's kernel. Bias, softplus and lengths only where it `_takes_raw_steps`."""
    _, length, _ = x.shape
    size = A.shape[-1]
    if _too_long(x, A):
        cut = length // 2
        first, second = ([t if t is None else t[:, s] for t in (x, dt, B, C, z)] for s in (slice(cut), slice(cut, None)))
        y1, state = _scan_cuda(kernel, first[0], first[1], A, first[2], first[3], D, first[4], initial_state, True)
        y2, state = _scan_cuda(
            kernel, second[0], second[1], A, second[2], second[3], D, second[4], state, return_final_state
        )
        return torch.cat([y1, y2], dim=1), state

    A = A.float()
    needs_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, dt, A, B, initial_state))
    lead = 0 if initial_state is None else size
    trail = size if return_final_state and needs_gradient else 0
    out_dtype = x.dtype
    if lead or trail:
        x, dt, B, C = (tensor.float() for tensor in (x, dt, B, C))
        x, dt, B, C = _with_state_tokens(x, dt, A, B, C, initial_state, lead, trail)
    else:
        if not softplus:
            dt, dt_bias = _step_size(dt, dt_bias, False, None), None
        # What softplus makes 0 at pads, in any dtype.
        dt = _with_pads(dt, lengths, -torch.inf if softplus else 0.0)
        dt, B, C = (tensor.to(x.dtype) for tensor in (dt, B, C))
    with torch.cuda.device(x.device):
        result = kernel(
            x.transpose(1, 2),
            dt.transpose(1, 2),
            A,
            B.transpose(1, 2),
            C.transpose(1, 2),
            None if D is None or lead or trail else D.float(),
            z=None if z is None or lead or trail else z.to(x.dtype).transpose(1, 2),
            delta_bias=None if dt_bias is None else dt_bias.float(),
            delta_softplus=softplus,
            return_last_state=return_final_state and not trail,
        )
    y, final_state = result if isinstance(result, tuple) else (result, None)
    y = y.transpose(1, 2)
    if trail:
        final_state = y[:, lead + length :].transpose(1, 2)
    if lead or trail:
        y, x = y[:, lead : lead + length], x[:, lead : lead + length]
        y = _skip_and_gate(y, x, D, z)
    return y.to(out_dtype), final_state


def _with_state_tokens(x, dt, A, B, C, initial_state, lead: int, trail: int):
    """Put `lead` tokens in front that write the initial state and `trail` behind that read the final one (0 or N)."""
    batch, _, channels = x.shape
    size = A.shape[-1]
    columns = torch.eye(size, dtype=x.dtype, device=x.device).expand(batch, size, size)
    no_columns = torch.zeros_like(columns)
    no_tokens = x.new_zeros(batch, size, channels)
    if lead:
        # Column n is written by token n and then decays over the N - 1 - n tokens that follow it.
        later = torch.arange(size - 1, -1, -1, device=x.device, dtype=x.dtype)
        written = initial_state.float() / (_PSEUDO_STEP * torch.exp(_PSEUDO_STEP * A * later))
        x = torch.cat([written.transpose(1, 2), x], dim=1)
        dt = torch.cat([torch.full_like(no_tokens, _PSEUDO_STEP), dt], dim=1)
        B, C = torch.cat([columns, B], dim=1), torch.cat([no_columns, C], dim=1)
    if trail:
        x, dt = torch.cat([x, no_tokens], dim=1), torch.cat([dt, no_tokens], dim=1)
        B, C = torch.cat([B, no_columns], dim=1), torch.cat([C, columns], dim=1)
    return x, dt, B, C
