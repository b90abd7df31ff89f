# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Mamba's scan with gradients: the kernel of scan_kernels.py forwards, and one of its own backwards.

Nothing but the inputs is kept. Backwards, the forward kernel first writes the state before every tile of a few tokens; then
the tiles are gone through from the last to the first, each with its states made again in registers. With the gradient g[t]
of the state h[t] = decay[t] h[t-1] + dt[t] B[t] x[t], and r[t] = decay[t] g[t], what it hands to h[t-1],

    g[t] = C[t] dy[t] + r[t+1],

which is the forward recurrence with time reversed. What is summed over channels, the gradients of B and C, is summed in a
program first and then, in a fixed order, over programs.

Shapes: `B` rows, `L` tokens, `E` channels, `N` state size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .decode_kernels import _INTERPRETED, _blocks, _launch, _power_of_two, gdc_launch_dependents, gdc_wait, jit, tl
from .scan_kernels import ScanPlan, _exp2, _softplus, _summed, _with_columns, _without_pads, marks, scan_forward, scan_starts

# Bytes of what the backward pass writes for itself at a time, the states before the tiles most of all.
_WORKSPACE = 512 * 1024 * 1024


class GradientPlan(NamedTuple):
    """How `scan_backward` is cut into programs, each for some channels of a row.

    Attributes:
        tokens: of a tile; a power of two.
        channels: of a program; a power of two.
        warps: of 32 threads a program.
    """

    tokens: int
    channels: int
    warps: int


def gradient_plan(size: int) -> GradientPlan:
    """The cut for a recurrence with a state of `size` a channel: 4 of a channel's states and 8 tokens a thread.

    Measured on an H100 (N = 16, bfloat16; 16 rows of 2048 tokens with 1536 channels, one of 6144 with 5120), all of
    `scan_backward`: 2.05 and 1.94 ms for (8 tokens, 16 channels, 2 warps), 2.13 and 2.07 for (8, 32, 4), 3.00 and 3.14 for
    (8, 16, 1), 2.17 and 2.26 for (4, 16, 2), which writes twice as many states; with fewer registers 2.68 and more.
    mamba-ssm's kernel takes 3.66 and 2.52 ms, and 5.60 where 2.05 become 1.71, for 1694 tokens.
    """
    columns = _power_of_two(size)
    channels = max(8, min(256 // columns, 32))
    warps = max(1, min(channels * columns // 128, 8))
    tokens = max(1, min(8, 32 * 32 * warps // (channels * columns)))
    return GradientPlan(tokens, channels, warps)


class Gradients(NamedTuple):
    """Of `selective_scan`'s inputs, None for what is not there: of x, dt and z in their dtypes, all others in float32."""

    x: torch.Tensor
    dt: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    D: torch.Tensor | None
    z: torch.Tensor | None
    dt_bias: torch.Tensor | None
    shift: torch.Tensor | None
    initial_state: torch.Tensor | None


def scan_with_gradients(
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
    """`scan_forward`, for what `can_scan`, with gradients of y and of the final state, once."""
    where, added = (None, None) if shift is None else shift
    return _Scan.apply(x, dt, A, B, C, D, z, initial_state, dt_bias, added, where, lengths, softplus)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, dt, A, B, C, D, z, initial_state, dt_bias, added, where, lengths, softplus):
        ctx.set_materialize_grads(False)
        ctx.softplus = softplus
        ctx.save_for_backward(x, dt, A, B, C, D, z, initial_state, dt_bias, added, where, lengths)
        shift = None if where is None else (where, added)
        return scan_forward(x, dt, A, B, C, D, z, initial_state, dt_bias, softplus, lengths, shift)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy, dfinal):
        x, dt, A, B, C, D, z, initial_state, dt_bias, added, where, lengths = ctx.saved_tensors
        shift = None if where is None else (where, added)
        if dy is None:
            dy = torch.zeros_like(x)
        g = scan_backward(dy, dfinal, x, dt, A, B, C, D, z, initial_state, dt_bias, ctx.softplus, lengths, shift)
        inputs = (x, dt, A, B, C, D, z, initial_state, dt_bias, added)
        gradients = (g.x, g.dt, g.A, g.B, g.C, g.D, g.z, g.initial_state, g.dt_bias, g.shift)
        needed = (
            gradient.to(tensor.dtype) if tensor is not None and gradient is not None and wanted else None
            for tensor, gradient, wanted in zip(inputs, gradients, ctx.needs_input_grad, strict=False)
        )
        return (*needed, None, None, None)


def scan_backward(
    dy: torch.Tensor,
    dfinal: torch.Tensor | None,
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
    plan: GradientPlan | None = None,
    starts_plan: ScanPlan | None = None,
) -> Gradients:
    """The gradients of `scan_forward`'s inputs, all of it in float32.

    Args:
        dy: [B, L, E], of y; what it says at pads is not read.
        dfinal: [B, E, N], of the final state, or None for zeros.
        x, dt, A, B, C, D, z, initial_state, dt_bias, softplus, lengths, shift: what the scan was called with.
        plan: how to cut the work; None: `gradient_plan`'s.
        starts_plan: how to cut that of the states before the tiles; None: `scan_plan`'s.
    """
    rows, length, channels = x.shape
    size = A.shape[1]
    if plan is None:
        plan = gradient_plan(size)
    dy, x, dt, B, C = (_with_columns(sequence) for sequence in (dy, x, dt, B, C))
    z = None if z is None else _with_columns(z)
    marked = None if shift is None else (marks(shift[0], rows, length), shift[1])
    dx, ddt = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt))
    dz = None if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    dB, dC = (t.new_zeros(t.shape, dtype=torch.float32) for t in (B, C))
    dA = x.new_zeros(channels, size, dtype=torch.float32)
    sums = x.new_zeros(3, channels, dtype=torch.float32)  # of D, of the bias and of the shift
    dinitial = x.new_empty(rows, channels, size, dtype=torch.float32)
    for some, few in _slices(rows, length, channels, size, plan):

        def cut(tensor: Any, some: slice = some, few: slice = few) -> Any:
            return None if tensor is None else tensor[some, ..., few]

        def cut_states(tensor: Any, some: slice = some, few: slice = few) -> Any:
            return None if tensor is None else tensor[some, few].contiguous()

        own_shift = None if marked is None else (marked[0][some].contiguous(), marked[1][few].contiguous())
        own_lengths = None if lengths is None else lengths[some].contiguous()
        own = (cut(x), cut(dt), A[few].contiguous(), B[some])
        state, bias, skip = cut_states(initial_state), _part(dt_bias, few), _part(D, few)
        starts = scan_starts(*own, state, bias, softplus, own_lengths, own_shift, plan.tokens, starts_plan)
        gradients = (cut(dy), cut_states(dfinal), cut(dx), cut(ddt), cut(dz))
        parts = _launch_backward(
            plan, *own, C[some], skip, cut(z), bias, own_shift, own_lengths, starts, *gradients, softplus
        )
        dA[few] += parts[0].sum(0)
        dB[some] += parts[1].sum(0)
        dC[some] += parts[2].sum(0)
        sums[:, few] += parts[3].sum(1)
        dinitial[some, few] = parts[4]
    of_vectors = (total if there is not None else None for total, there in zip(sums, (D, dt_bias, shift), strict=True))
    dD, dbias, dshift = of_vectors
    return Gradients(dx, ddt, dA, dB, dC, dD, dz, dbias, dshift, None if initial_state is None else dinitial)


def _part(vector: torch.Tensor | None, few: slice) -> torch.Tensor | None:
    return None if vector is None else vector[few].contiguous()


def _slices(rows: int, length: int, channels: int, size: int, plan: GradientPlan) -> Iterator[tuple[slice, slice]]:
    """Rows and channels whose states before the tiles fit into the workspace: all channels of some rows, or some of one."""
    of_channel = _blocks(length, plan.tokens) * size * 4
    few = max(_WORKSPACE // of_channel // plan.channels, 1) * plan.channels
    if few >= channels:
        some = max(_WORKSPACE // (of_channel * channels), 1)
        some = _blocks(rows, _blocks(rows, some))
        yield from ((slice(row, row + some), slice(None)) for row in range(0, rows, some))
    else:
        blocks = _blocks(channels, plan.channels)
        few = _blocks(blocks, _blocks(channels, few)) * plan.channels
        cuts = [slice(channel, channel + few) for channel in range(0, channels, few)]
        yield from ((slice(row, row + 1), cut) for row in range(rows) for cut in cuts)


def _launch_backward(
    plan: GradientPlan, x, dt, A, B, C, D, z, dt_bias, shift, lengths, starts, dy, dfinal, dx, ddt, dz, softplus: bool
) -> tuple[torch.Tensor, ...]:
    """Write dx, ddt and dz; return what is left to be summed of dA [B, E, N], dB and dC [blocks, B, L, N] and of the vectors
    [3, B, E], and the gradient of the state that comes in."""
    rows, length, channels = x.shape
    size = A.shape[1]
    blocks = _blocks(channels, plan.channels)
    columns = _power_of_two(size)
    dA, dinitial = (x.new_empty(rows, channels, size, dtype=torch.float32) for _ in range(2))
    dB, dC = (x.new_empty(blocks, rows, length, size, dtype=torch.float32) for _ in range(2))
    sums = x.new_empty(3, rows, channels, dtype=torch.float32)
    shifted, added = (None, None) if shift is None else shift
    threads = 32 * plan.warps
    own = min(max(plan.channels * columns // threads, 1), columns, 4)
    wraps = max(plan.channels * columns // (own * threads), 1)
    sequences = (x, dt, B, C, x if z is None else z, dy, dx)
    _launch(
        _backward_kernel,
        (blocks, rows),
        plan.warps,
        *(x, dt, A, B, C, D, z, dt_bias, shifted, added, lengths, starts, dy, dfinal),
        *(dx, ddt, dz, dA, dB, dC, sums, dinitial, rows, length),
        *(stride for sequence in sequences for stride in sequence.stride()[:2]),
        CHANNELS=channels,
        SIZE=size,
        SOFTPLUS=softplus,
        TOKENS=plan.tokens,
        BLOCK=plan.channels,
        BLOCK_SIZE=columns,
        OWN=own,
        LEVELS=min((columns // own).bit_length() - 1, 4),
        WRAPS=wraps,
        CHANNEL_LEVELS=min((plan.channels // wraps).bit_length() - 1, 5),
        PTX=not _INTERPRETED and torch.version.cuda is not None,
        INTERPRETED_TILES=_blocks(length, plan.tokens) if _INTERPRETED else None,
    )
    return dA, dB, dC, sums, dinitial


@jit
def _of_token(tile, at):
    """A token's [1, states, channels] of a tile. -0.0 is what can be added without changing a number, so costs nothing."""
    return tl.sum(tl.where(at, tile, -0.0), 0, keep_dims=True)


@jit
def _forwards(decay, value, h):
    """h[t-1] and h[t] = decay[t] h[t-1] + value[t] of a tile's tokens, which are all in one thread."""
    token = tl.arange(0, decay.shape[0])[:, None, None]
    before = decay
    states = decay
    for t in tl.static_range(decay.shape[0]):
        before = tl.where(token == t, h, before)
        h = _of_token(decay, token == t) * h + _of_token(value, token == t)
        states = tl.where(token == t, h, states)
    return before, states


@jit
def _backwards(decay, direct, handed):
    """g[t] = direct[t] + r[t+1] and r[t] = decay[t] g[t] of a tile's tokens, and r of the first. Its own loop, as Triton's
    reversed scan sends everything through the warp and back."""
    token = tl.arange(0, decay.shape[0])[:, None, None]
    gradient = direct
    passed = decay
    for back in tl.static_range(decay.shape[0]):
        at = token == decay.shape[0] - 1 - back
        now = _of_token(direct, at) + handed
        handed = _of_token(decay, at) * now
        gradient = tl.where(at, now, gradient)
        passed = tl.where(at, handed, passed)
    return gradient, passed, handed


@jit
def _sigmoid(x, PTX: tl.constexpr):
    divisor = 1.0 + _exp2(x * -1.4426950408889634, PTX)
    if PTX:
        y = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [divisor], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        y = 1.0 / divisor
    return y


@jit
def _summed_over_channels(parts, WRAPS: tl.constexpr, LEVELS: tl.constexpr):
    """The sum over all channels [tokens, states]: over the `WRAPS` of a thread, then by halves, as in `_summed`."""
    TOKENS: tl.constexpr = parts.shape[0]
    STATES: tl.constexpr = parts.shape[1]
    if WRAPS > 1:
        parts = tl.sum(tl.reshape(parts, [TOKENS, STATES, WRAPS, parts.shape[2] // WRAPS]), 2)
    if parts.shape[2] > 1 << LEVELS:
        parts = tl.sum(tl.reshape(parts, [TOKENS, STATES, parts.shape[2] >> LEVELS, 1 << LEVELS]), 2)
    for _ in tl.static_range(LEVELS):
        first, second = tl.split(tl.reshape(parts, [TOKENS, STATES, parts.shape[2] // 2, 2]))
        parts = first + second
    return tl.reshape(parts, [TOKENS, STATES])


@jit
def _of_shifted(shifted, value):
    return tl.where((shifted != 0)[:, None], value, 0.0)


@jit
def _step_and_slope(raw, bias, shifted, shift, here, SOFTPLUS: tl.constexpr, PTX: tl.constexpr):
    """dt [tokens, channels] and its derivative by what it is made of, both 0 where there is no token `here`."""
    step = raw.to(tl.float32)
    if bias is not None:
        step += bias
    if shifted is not None:
        step += _of_shifted(shifted, shift)
    slope = tl.full(step.shape, 1.0, tl.float32)
    if SOFTPLUS:
        slope = _sigmoid(step, PTX)
        step = _softplus(step, PTX)
    return tl.where(here, step, 0.0), tl.where(here, slope, 0.0)


@jit
def _backward_kernel(  # noqa: C901 - its branches are constants, which a compiled kernel has none of
    x,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    shifted,
    shift,
    lengths,
    starts,
    dy,
    dfinal,
    dx,
    ddt,
    dz,
    dA,
    dB,
    dC,
    sums,
    dinitial,
    rows,
    length,
    x_row,
    x_token,
    dt_row,
    dt_token,
    B_row,
    B_token,
    C_row,
    C_token,
    z_row,
    z_token,
    dy_row,
    dy_token,
    dx_row,
    dx_token,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    OWN: tl.constexpr,
    LEVELS: tl.constexpr,
    WRAPS: tl.constexpr,
    CHANNEL_LEVELS: tl.constexpr,
    PTX: tl.constexpr,
    INTERPRETED_TILES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A row's tiles from the last to the first, for BLOCK channels."""
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    channel = block * BLOCK + tl.arange(0, BLOCK)
    token = tl.arange(0, TOKENS)
    place = token.to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_SIZE)
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()

    length += tl.zeros([], tl.int32)  # Triton makes a constant of 1
    end = _without_pads(length, lengths, row, 0)
    tiles = tl.cdiv(length, TOKENS)
    start = (tiles - 1) * TOKENS
    known = (channel < CHANNELS)[None, :]
    column_known = (column < SIZE)[None, :]
    # With its tokens' dimension of one, the state comes in the layout that the loop keeps it in.
    in_state = channel[None, None, :] * SIZE + column[None, :, None]
    in_state_here = (channel < CHANNELS)[None, None, :] & (column < SIZE)[None, :, None]
    in_states = row * CHANNELS * SIZE + in_state
    rate = tl.load(A + in_state, mask=in_state_here, other=0.0) * 1.4426950408889634
    if dfinal is not None:
        handed = tl.load(dfinal + in_states, mask=in_state_here, other=0.0).to(tl.float32)
    else:
        handed = tl.zeros([1, BLOCK_SIZE, BLOCK], tl.float32)
    rate_gradient = tl.zeros([1, BLOCK_SIZE, BLOCK], tl.float32)
    bias = None
    if dt_bias is not None:
        bias = tl.load(dt_bias + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)[None, :]
    if shifted is not None:
        shift = tl.load(shift + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)[None, :]
        shift_gradient = tl.zeros([TOKENS, BLOCK], tl.float32)
    skip = None
    if D is not None:
        skip = tl.load(D + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)[None, :]
    skip_gradient = tl.zeros([TOKENS, BLOCK], tl.float32)
    bias_gradient = tl.zeros([TOKENS, BLOCK], tl.float32)

    # A sequence's tiles: a pointer that moves, and where the elements of a tile are behind it.
    jump = tl.full([], TOKENS, tl.int64)
    first = start.to(tl.int64)
    x += row * x_row + first * x_token
    dt += row * dt_row + first * dt_token
    B += row * B_row + first * B_token
    C += row * C_row + first * C_token
    dy += row * dy_row + first * dy_token
    written = row * dx_row + first * dx_token
    dx += written
    ddt += written
    starts += (row * tiles + tiles - 1) * (CHANNELS * SIZE)
    summed = ((block * rows + row) * length + first) * SIZE
    dB += summed
    dC += summed
    x_place = place * x_token + channel[None, :]
    dt_place = place * dt_token + channel[None, :]
    B_place = place * B_token + column[None, :]
    C_place = place * C_token + column[None, :]
    dy_place = place * dy_token + channel[None, :]
    dx_place = place * dx_token + channel[None, :]
    summed_place = token[:, None] * SIZE + column[None, :]
    here = (start + token < end)[:, None]
    u = tl.load(x + x_place, mask=here & known, other=0.0)
    raw = tl.load(dt + dt_place, mask=here & known, other=0.0)
    B_tile = tl.load(B + B_place, mask=here & column_known, other=0.0).to(tl.float32)
    C_tile = tl.load(C + C_place, mask=here & column_known, other=0.0).to(tl.float32)
    dy_tile = tl.load(dy + dy_place, mask=here & known, other=0.0)
    h = tl.load(starts + in_state, mask=in_state_here, other=0.0)
    gate = None
    if z is not None:
        z += row * z_row + first * z_token
        z_place = place * z_token + channel[None, :]
        gate = tl.load(z + z_place, mask=here & known, other=0.0)
        dz += written
    shifted_here = None
    if shifted is not None:
        shifted += row * length
        shifted_here = tl.load(shifted + start + token, mask=start + token < end, other=0)
    step, slope = _step_and_slope(raw, bias, shifted_here, shift, here, SOFTPLUS, PTX)
    source = u.to(tl.float32)
    drive = step * source

    for _ in range(0, tiles if INTERPRETED_TILES is None else INTERPRETED_TILES):
        # The tile before is on its way while this one is computed.
        x -= jump * x_token
        dt -= jump * dt_token
        B -= jump * B_token
        C -= jump * C_token
        dy -= jump * dy_token
        starts -= CHANNELS * SIZE
        before = start - TOKENS + token
        here_before = ((before >= 0) & (before < end))[:, None]
        u_before = tl.load(x + x_place, mask=here_before & known, other=0.0)
        raw_before = tl.load(dt + dt_place, mask=here_before & known, other=0.0)
        B_before = tl.load(B + B_place, mask=here_before & column_known, other=0.0)
        C_before = tl.load(C + C_place, mask=here_before & column_known, other=0.0)
        dy_before = tl.load(dy + dy_place, mask=here_before & known, other=0.0)
        h_before = tl.load(starts + in_state, mask=in_state_here & (start > 0), other=0.0)
        if gate is not None:
            z -= jump * z_token
            gate_before = tl.load(z + z_place, mask=here_before & known, other=0.0)
        if shifted is not None:
            shifted_before = tl.load(shifted + before, mask=(before >= 0) & (before < end), other=0)

        inside = (start + token < length)[:, None]
        dout = dy_tile.to(tl.float32)
        if gate is not None:
            g = gate.to(tl.float32)
            opened = _sigmoid(g, PTX)
            dscan = dout * (g * opened)
        else:
            dscan = dout
        B_now = B_tile[:, :, None]
        C_now = C_tile[:, :, None]

        # The states that the tile's tokens start from and make, and what is made of them, before there are more to be kept.
        decay = _exp2(step[:, None, :] * rate, PTX)
        h_prev, states = _forwards(decay, drive[:, None, :] * B_now, h)
        if gate is not None:
            y = _summed(states * C_now, OWN, LEVELS)
            if skip is not None:
                y += skip * source
            dgate = dout * y * (opened * (1.0 + g * (1.0 - opened)))
            tl.store(dz + dx_place, dgate.to(dz.dtype.element_ty), mask=inside & known)
            dz -= jump * dx_token
        in_row = inside & column_known
        tl.store(dC + summed_place, _summed_over_channels(states * dscan[:, None, :], WRAPS, CHANNEL_LEVELS), mask=in_row)

        # Their gradients, and what these hand to the tokens before.
        gradient, passed, handed = _backwards(decay, C_now * dscan[:, None, :], handed)
        exponent = passed * h_prev
        rate_gradient += tl.sum(exponent * step[:, None, :], 0, keep_dims=True)
        through_decay = _summed(exponent * rate, OWN, LEVELS)
        through_input = _summed(gradient * B_now, OWN, LEVELS)
        tl.store(dB + summed_place, _summed_over_channels(gradient * drive[:, None, :], WRAPS, CHANNEL_LEVELS), mask=in_row)
        du = through_input * step
        if skip is not None:
            du += skip * dscan
            skip_gradient += dscan * source
        tl.store(dx + dx_place, du.to(dx.dtype.element_ty), mask=inside & known)
        dstep = (source * through_input + 0.6931471805599453 * through_decay) * slope
        tl.store(ddt + dx_place, dstep.to(ddt.dtype.element_ty), mask=inside & known)
        bias_gradient += dstep
        if shifted is not None:
            shift_gradient += _of_shifted(shifted_here, dstep)

        dx -= jump * dx_token
        ddt -= jump * dx_token
        dB -= TOKENS * SIZE
        dC -= TOKENS * SIZE
        start -= TOKENS
        B_tile = B_before.to(tl.float32)
        C_tile = C_before.to(tl.float32)
        dy_tile = dy_before
        h = h_before
        if gate is not None:
            gate = gate_before
        if shifted is not None:
            shifted_here = shifted_before
        step, slope = _step_and_slope(raw_before, bias, shifted_here, shift, here_before, SOFTPLUS, PTX)
        source = u_before.to(tl.float32)
        drive = step * source

    tl.store(dinitial + in_states, handed, mask=in_state_here)
    tl.store(dA + in_states, rate_gradient, mask=in_state_here)
    of_row = sums + row * CHANNELS + channel
    of_next = tl.full([], CHANNELS, tl.int64) * rows
    tl.store(of_row, tl.sum(skip_gradient, 0), mask=channel < CHANNELS)
    tl.store(of_row + of_next, tl.sum(bias_gradient, 0), mask=channel < CHANNELS)
    if shifted is not None:
        tl.store(of_row + 2 * of_next, tl.sum(shift_gradient, 0), mask=channel < CHANNELS)
