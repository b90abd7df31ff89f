# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""A mixer's decoding step behind its first product, for few rows, in one kernel.

    Mamba      x_proj | step size, states, gate | out_proj, residual sum
    Mamba-2    states | gate, norm, out_proj, residual sum

As kernels of their own these parts leave the memory idle: each waits for the whole kernel before it, computes for a
microsecond, and only then does the next one ask for its weights. Here the parts are roles of one kernel's programs. Those
of out_proj are there from the beginning, ask for all of their weights at once, and only then wait, by a counter in memory,
for the programs whose results they multiply.

So a program may wait for others. None waits for one that comes behind it in the grid: processors begin programs in the
order of the grid, and those that are waited for have begun. (Triton's interpreter runs them in that order, one by one.)

The functions run their kernels and references as those of decode_kernels.py do, whose shapes and rules hold here as well.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .decode_kernels import (
    _INTERPRETED,
    _blocks,
    _check_shape,
    _dual_channels,
    _dual_output,
    _dual_states,
    _first_tiles,
    _kernel_takes,
    _launch,
    _power_of_two,
    _selective_output,
    _selective_states,
    _silu,
    _step_size,
    _streamed_product,
    dual_step_naive,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    norm_linear_naive,
    selective_update_naive,
    tl,
    triton,
)

COUNTERS = 64  # int32 of a row: two counters, each on a line of the cache of its own


class TailPlan(NamedTuple):
    """How a tail is cut into programs.

    Attributes:
        channels: of a program that updates states.
        outputs: of a program of out_proj; x_proj's have 2.
        inputs: channels of a tile of their weights, all of which are asked for at once, up to 8 tiles.
        ranks: the same of dt_proj's weights.
        warps: of 32 threads a program.
        registers: of a thread; None: as the assembler likes.
    """

    channels: int
    outputs: int
    inputs: int
    ranks: int = 32
    warps: int = 4
    registers: int | None = None


def selective_tail_plan(channels: int, rank: int) -> TailPlan:
    """The cut for an inner size and the rank of the step.

    Measured on an H100 with the shapes of mamba-2.8b and mamba-130m. As many programs of out_proj as possible have to fit
    beside those that they wait for, and each holds its weights in registers, of which the assembler takes too few: loads
    then wait for each other.
    """
    inputs = _tile_of(channels)
    wide = inputs == 1024
    ranks = 32 if rank % 32 == 0 else 16
    return TailPlan(32 if channels >= 4096 else 16, 2, inputs, ranks, 4 if wide else 2, 80 if wide else None)


def dual_tail_plan(heads: int, channels: int, size: int, groups: int) -> TailPlan:
    """The cut for heads, channels of a head and the state size. Measured on an H100 with the shape of mamba2-2.7b: every
    program of out_proj reads y in float32, and so there are fewer of them, with more warps."""
    block = min(_power_of_two(channels), max(4096 // _power_of_two(size), 1))
    while block > 4 and heads * _blocks(channels, block) < 128:
        block //= 2
    return TailPlan(block, 4, _tile_of(heads * channels // groups), warps=8)


def _tile_of(channels: int) -> int:
    inputs = 1024
    while inputs > 256 and _blocks(channels, inputs) * inputs > 1.1 * channels:
        inputs //= 2
    return inputs


def new_counters(rows: int, device: torch.device) -> torch.Tensor:
    """What the programs of a tail wait by, set to zero: the kernel before it does that with every step."""
    return torch.zeros(_power_of_two(rows) * COUNTERS, dtype=torch.int32, device=device)


def selective_tail(
    x: torch.Tensor,
    z: torch.Tensor,
    projection: torch.Tensor,
    step_weight: torch.Tensor,
    step_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor | None,
    state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    residual_in_fp32: bool,
    counters: torch.Tensor,
    out: torch.Tensor | None = None,
    plan: TailPlan | None = None,
) -> torch.Tensor:
    """Mamba's mixer behind its convolution, and the residual sum, of one token a row; arXiv 2312.00752, Eq. 2 and 4.

    Everything is rounded where the modules round it, see `selective_update` and `norm_linear`.

    Args:
        x: [B, E], convolved. z: [B, E], the gate. Any row strides.
        projection: [R + 2 N, E], x_proj's weight; step_weight [E, R] and step_bias [E], dt_proj's.
        A: [E, N] float32, negative. D: [E], or None.
        state: [B, E, N], float32 or narrower; updated in place.
        weight: [H, E] and bias [H] or None, out_proj's.
        residual: [B, H]; added in float32 if `residual_in_fp32`. May be `out`.
        counters: of `new_counters`, zero. All weights and the states are contiguous.
        out: [B, H].

    Returns:
        [B, H] in the dtype of the sum.
    """
    rows, channels, size = state.shape
    rank, outputs = step_weight.shape[1], len(weight)
    width = rank + 2 * size
    for name, tensor, shape in (
        ("x", x, (rows, channels)),
        ("z", z, (rows, channels)),
        ("projection", projection, (width, channels)),
        ("step_weight", step_weight, (channels, rank)),
        ("step_bias", step_bias, (channels,)),
        ("A", A, (channels, size)),
        ("D", D, (channels,)),
        ("weight", weight, (outputs, channels)),
        ("bias", bias, (outputs,)),
        ("residual", residual, (rows, outputs)),
        ("out", out, (rows, outputs)),
    ):
        _check_shape(name, tensor, shape)
    contiguous = all(tensor.is_contiguous() for tensor in (projection, step_weight, A, state, weight))
    tensors = (x, z, projection, step_weight, step_bias, A, D, state, weight, bias, residual)
    if not _kernel_takes(*tensors, out) or not contiguous:
        return selective_tail_naive(*tensors, residual_in_fp32, counters, out)
    if plan is None:
        plan = selective_tail_plan(channels, rank)
    out = _result(weight, residual, residual_in_fp32, out)
    projected = x.new_empty(rows, width, dtype=projection.dtype)
    y = x.new_empty(rows, channels)
    programs = _blocks(width, 2) + _blocks(channels, plan.channels) + _blocks(outputs, plan.outputs)
    _launch(
        _selective_tail_kernel,
        (programs, rows),
        plan.warps,
        *(*tensors, projected, y, counters, out),
        *(rows, x.stride(0), z.stride(0), residual.stride(0), out.stride(0)),
        registers=plan.registers,
        CHANNELS=channels,
        RANK=rank,
        SIZE=size,
        OUTPUTS=outputs,
        BLOCK=plan.channels,
        BLOCK_RANK=plan.ranks,
        RANKS_AHEAD=min(_blocks(rank, plan.ranks), 8),
        BLOCK_SIZE=_power_of_two(size),
        BLOCK_OUT=plan.outputs,
        BLOCK_IN=plan.inputs,
        AHEAD=min(_blocks(channels, plan.inputs), 8),
        ROUND_STEP=step_bias.dtype != torch.float32,
        COUNTERS=COUNTERS,
        INTERPRETED=_INTERPRETED,
    )
    return out


def selective_tail_naive(
    x: torch.Tensor,
    z: torch.Tensor,
    projection: torch.Tensor,
    step_weight: torch.Tensor,
    step_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor | None,
    state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    residual_in_fp32: bool,
    counters: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reference of `selective_tail`."""
    projected = norm_linear_naive(x, projection)
    step = norm_linear_naive(projected[:, : step_weight.shape[1]], step_weight)
    y = selective_update_naive(x, z, projected, step, step_bias, A, D, state)
    return norm_linear_naive(y, weight, bias, residual=residual, residual_in_fp32=residual_in_fp32, out=out)


def dual_tail(
    xBC: torch.Tensor,
    z: torch.Tensor,
    step: torch.Tensor,
    step_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor | None,
    state: torch.Tensor,
    step_limits: tuple[float, float],
    norm_weight: torch.Tensor,
    eps: float,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    residual_in_fp32: bool,
    counters: torch.Tensor,
    out: torch.Tensor | None = None,
    plan: TailPlan | None = None,
) -> torch.Tensor:
    """Mamba-2's mixer behind its convolution, and the residual sum, of one token a row; arXiv 2405.21060, section 6.

    Everything is rounded where the modules round it, see `dual_step` and `norm_linear`.

    Args:
        xBC, step, step_bias, A, D, state, step_limits: as for `dual_step`.
        z: [B, E], the gate, any row stride.
        norm_weight: [E], eps and groups: of the gated norm.
        weight, bias, residual, residual_in_fp32, counters, out: as for `selective_tail`.

    Returns:
        [B, H] in the dtype of the sum.
    """
    rows, heads, channels, size = state.shape
    inner, outputs = heads * channels, len(weight)
    shared = (xBC.shape[1] - inner) // (2 * size)
    for name, tensor, shape in (
        ("xBC", xBC, (rows, inner + 2 * shared * size)),
        ("z", z, (rows, inner)),
        ("step", step, (rows, heads)),
        ("step_bias", step_bias, (heads,)),
        ("A", A, (heads,)),
        ("D", D, (heads,)),
        ("norm_weight", norm_weight, (inner,)),
        ("weight", weight, (outputs, inner)),
        ("bias", bias, (outputs,)),
        ("residual", residual, (rows, outputs)),
        ("out", out, (rows, outputs)),
    ):
        _check_shape(name, tensor, shape)
    first, then = (
        (xBC, z, step, step_bias, A, D, state),
        (norm_weight, eps, groups, weight, bias, residual, residual_in_fp32),
    )
    if heads % groups:
        raise ValueError(f"{heads} heads cannot be normalised in {groups} equal groups.")
    contiguous = state.is_contiguous() and weight.is_contiguous()
    if not _kernel_takes(*first, norm_weight, weight, bias, residual, out) or not contiguous:
        return dual_tail_naive(*first, step_limits, *then, counters, out)
    if plan is None:
        plan = dual_tail_plan(heads, channels, size, groups)
    out = _result(weight, residual, residual_in_fp32, out)
    updating = heads * _blocks(channels, plan.channels)
    y = xBC.new_empty(rows, inner, dtype=torch.float32)
    squares = xBC.new_empty(rows, updating, dtype=torch.float32)
    _launch(
        _dual_tail_kernel,
        (updating + _blocks(outputs, plan.outputs), rows),
        plan.warps,
        *(*first, norm_weight, weight, bias, residual, y, squares, counters, out),
        *(rows, xBC.stride(0), z.stride(0), step.stride(0), residual.stride(0), out.stride(0), *step_limits, eps),
        registers=plan.registers,
        HEADS=heads,
        CHANNELS=channels,
        SIZE=size,
        SHARED=shared,
        GROUPS=groups,
        OUTPUTS=outputs,
        BLOCK=plan.channels,
        BLOCK_SIZE=_power_of_two(size),
        BLOCK_OUT=plan.outputs,
        BLOCK_IN=plan.inputs,
        AHEAD=min(_blocks(inner // groups, plan.inputs), 8),
        COUNTERS=COUNTERS,
        INTERPRETED=_INTERPRETED,
    )
    return out


def dual_tail_naive(
    xBC: torch.Tensor,
    z: torch.Tensor,
    step: torch.Tensor,
    step_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor | None,
    state: torch.Tensor,
    step_limits: tuple[float, float],
    norm_weight: torch.Tensor,
    eps: float,
    groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    residual_in_fp32: bool,
    counters: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reference of `dual_tail`."""
    y = dual_step_naive(xBC, step, step_bias, A, D, state, step_limits)
    return norm_linear_naive(y, weight, bias, norm_weight, eps, z, groups, residual, residual_in_fp32, out)


def _result(weight: torch.Tensor, residual: torch.Tensor, residual_in_fp32: bool, out: torch.Tensor | None) -> torch.Tensor:
    if out is not None:
        return out
    dtype = torch.promote_types(weight.dtype, residual.dtype)
    return torch.empty_like(residual, dtype=torch.promote_types(dtype, torch.float32) if residual_in_fp32 else dtype)


@jit
def _arrive(counter):
    """Behind what all threads of the program have written."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release")


# One thread asks; the others would only keep those that arrive from being counted.
_ASK = tl and tl.constexpr("""
{
    .reg .pred asks, again;
    .reg .b32 value;
    mov.u32 value, %tid.x;
    setp.ne.u32 asks, value, 0;
    mov.u32 value, $2;
    @asks bra DONE;
AGAIN:
    ld.acquire.gpu.global.u32 value, [$1];
    setp.lt.u32 again, value, $2;
    @again bra AGAIN;
DONE:
    mov.u32 $0, value;
}
""")


@jit
def _wait_for(counter, programs, DEPENDENT: tl.constexpr):
    """Until so many have arrived; what they wrote before can then be read."""
    if DEPENDENT:  # on devices that know these instructions
        tl.inline_asm_elementwise(_ASK, "=r,l,r", [counter.to(tl.int64), programs], dtype=tl.int32, is_pure=False, pack=1)
    else:
        while tl.atomic_add(counter, 0, sem="acquire") < programs:
            pass
    tl.debug_barrier()


@jit
def _last_product(
    tiles,
    y,
    squares,
    norm_weight,
    weight,
    bias,
    residual,
    out,
    output,
    line,
    rows,
    residual_stride,
    out_stride,
    eps,
    counter,
    programs,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUPS: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    AHEAD: tl.constexpr,
    INTERPRETED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """out = residual + weight @ norm(y) + bias of a row, as soon as y is there; `squares`: SQUARES sums of y's a group."""
    SIZE: tl.constexpr = INPUTS // GROUPS
    row = line + tl.arange(0, 1)
    known = output < OUTPUTS
    before = tl.load(residual + line * residual_stride + output, mask=known, other=0.0).to(tl.float32)
    offset = tl.zeros([BLOCK_OUT], tl.float32)
    if bias is not None:
        offset += tl.load(bias + output, mask=known, other=0.0).to(tl.float32)
    _wait_for(counter, programs, DEPENDENT)
    total = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    for group in tl.static_range(GROUPS):
        if group > 0:
            tiles = _first_tiles(weight, output, group * SIZE, group * SIZE + SIZE, INPUTS, OUTPUTS, BLOCK_IN, AHEAD)
        scale = None
        if norm_weight is not None:
            scale = _inverse_rms_of(squares + (line * GROUPS + group) * SQUARES, SIZE, SQUARES, eps)
        total = _streamed_product(
            tiles,
            y,
            None,
            norm_weight,
            weight,
            total,
            output,
            row,
            rows,
            group * SIZE,
            INPUTS,
            0,
            scale,
            SIZE,
            INPUTS,
            OUTPUTS,
            False,
            BLOCK_IN,
            AHEAD,
            2,
            False,
            INTERPRETED,
            False,
        )
    product = (tl.sum(total, 1) + offset).to(weight.dtype.element_ty).to(tl.float32)
    tl.debug_barrier()  # threads may share an element, and `out` may be `residual`
    tl.store(out + line * out_stride + output, (before + product).to(out.dtype.element_ty), mask=known)


@jit
def _inverse_rms_of(squares, SIZE: tl.constexpr, SQUARES: tl.constexpr, eps):
    """1 / root mean square [1] of SIZE numbers, of whose squares there are SQUARES sums."""
    BLOCK: tl.constexpr = triton.next_power_of_2(SQUARES)
    place = tl.arange(0, BLOCK)
    total = tl.sum(tl.load(squares + place, mask=place < SQUARES, other=0.0), 0)
    return tl.zeros([1], tl.float32) + tl.rsqrt(total / SIZE + eps)


@jit
def _selective_tail_kernel(
    x,
    z,
    projection,
    step_weight,
    step_bias,
    A,
    D,
    state,
    weight,
    bias,
    residual,
    projected,
    y,
    counters,
    out,
    rows,
    x_stride,
    z_stride,
    residual_stride,
    out_stride,
    CHANNELS: tl.constexpr,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    RANKS_AHEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    AHEAD: tl.constexpr,
    ROUND_STEP: tl.constexpr,
    COUNTERS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    WIDTH: tl.constexpr = RANK + 2 * SIZE
    PROJECTING: tl.constexpr = (WIDTH + 1) // 2
    UPDATING: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    line = tl.program_id(1).to(tl.int64)
    row = line + tl.arange(0, 1)
    counters += line * COUNTERS
    mine = projected + line * WIDTH
    if program < PROJECTING:
        column = program * 2 + tl.arange(0, 2)
        x_tiles = _first_tiles(projection, column, 0, CHANNELS, CHANNELS, WIDTH, BLOCK_IN, AHEAD)
        if DEPENDENT:
            gdc_launch_dependents()
            gdc_wait()
        sums = _streamed_product(
            x_tiles,
            x,
            None,
            None,
            projection,
            tl.zeros([2, BLOCK_IN], tl.float32),
            column,
            row,
            rows,
            0,
            x_stride,
            0,
            None,
            CHANNELS,
            CHANNELS,
            WIDTH,
            False,
            BLOCK_IN,
            AHEAD,
            2,
            False,
            INTERPRETED,
            False,
        )
        tl.store(mine + column, tl.sum(sums, 1).to(projected.dtype.element_ty), mask=column < WIDTH)
        _arrive(counters)
    elif program < PROJECTING + UPDATING:
        channel = (program - PROJECTING) * BLOCK + tl.arange(0, BLOCK)
        known = channel < CHANNELS
        state += line * CHANNELS * SIZE
        step_tiles = _first_tiles(step_weight, channel, 0, RANK, RANK, CHANNELS, BLOCK_RANK, RANKS_AHEAD)
        rate, h, place, stored = _selective_states(A, state, channel, CHANNELS, SIZE, BLOCK_SIZE)
        offset = tl.load(step_bias + channel, mask=known, other=0.0).to(tl.float32)
        skip = tl.zeros([BLOCK], tl.float32)
        if D is not None:
            skip += tl.load(D + channel, mask=known, other=0.0).to(tl.float32)
        if DEPENDENT:
            gdc_launch_dependents()
            gdc_wait()
        u = tl.load(x + line * x_stride + channel, mask=known, other=0.0).to(tl.float32)
        gate = tl.load(z + line * z_stride + channel, mask=known, other=0.0).to(tl.float32)
        _wait_for(counters, PROJECTING, DEPENDENT)
        steps = _streamed_product(
            step_tiles,
            projected,
            None,
            None,
            step_weight,
            tl.zeros([BLOCK, BLOCK_RANK], tl.float32),
            channel,
            row,
            rows,
            0,
            WIDTH,
            0,
            None,
            RANK,
            RANK,
            CHANNELS,
            False,
            BLOCK_RANK,
            RANKS_AHEAD,
            2,
            False,
            INTERPRETED,
            False,
        )
        dt = _step_size(tl.sum(steps, 1), offset, step_weight.dtype.element_ty, ROUND_STEP)
        value, h = _selective_output(skip * u, dt, u, gate, rate, h, mine + RANK, SIZE, BLOCK_SIZE)
        tl.store(y + line * CHANNELS + channel, value.to(y.dtype.element_ty), mask=known)
        _arrive(counters + COUNTERS // 2)  # which also keeps threads from writing states that others have yet to read
        tl.store(place, h.to(state.dtype.element_ty), mask=stored)
    else:
        output = (program - PROJECTING - UPDATING) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        tiles = _first_tiles(weight, output, 0, CHANNELS, CHANNELS, OUTPUTS, BLOCK_IN, AHEAD)
        if DEPENDENT:
            gdc_launch_dependents()
            gdc_wait()
        _last_product(
            tiles,
            y,
            None,
            None,
            weight,
            bias,
            residual,
            out,
            output,
            line,
            rows,
            residual_stride,
            out_stride,
            0.0,
            counters + COUNTERS // 2,
            UPDATING,
            CHANNELS,
            OUTPUTS,
            1,
            1,
            BLOCK_OUT,
            BLOCK_IN,
            AHEAD,
            INTERPRETED,
            DEPENDENT,
        )


@jit
def _dual_tail_kernel(
    xBC,
    z,
    step,
    step_bias,
    A,
    D,
    state,
    norm_weight,
    weight,
    bias,
    residual,
    y,
    squares,
    counters,
    out,
    rows,
    x_stride,
    z_stride,
    step_stride,
    residual_stride,
    out_stride,
    low,
    high,
    eps,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    SHARED: tl.constexpr,
    GROUPS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    AHEAD: tl.constexpr,
    COUNTERS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    INNER: tl.constexpr = HEADS * CHANNELS
    UPDATING: tl.constexpr = HEADS * ((CHANNELS + BLOCK - 1) // BLOCK)
    program = tl.program_id(0)
    line = tl.program_id(1).to(tl.int64)
    counters += line * COUNTERS
    if program < UPDATING:
        state += line * INNER * SIZE
        h, skip, offset, rate = _dual_states(state, D, step_bias, A, program, HEADS, CHANNELS, SIZE, BLOCK, BLOCK_SIZE)
        if DEPENDENT:
            gdc_launch_dependents()
            gdc_wait()
        channel, inner = _dual_channels(program, CHANNELS, BLOCK)
        gate = tl.load(z + line * z_stride + inner, mask=channel < CHANNELS, other=0.0).to(tl.float32)
        value, place, h, stored = _dual_output(
            xBC + line * x_stride,
            step + line * step_stride,
            state,
            h,
            skip,
            offset,
            rate,
            low,
            high,
            program,
            HEADS,
            CHANNELS,
            SIZE,
            SHARED,
            BLOCK,
            BLOCK_SIZE,
        )
        value = tl.where(channel < CHANNELS, value.to(xBC.dtype.element_ty).to(tl.float32) * _silu(gate), 0.0)
        tl.store(y + line * INNER + inner, value, mask=channel < CHANNELS)
        tl.store(squares + line * UPDATING + program, tl.sum(value * value))
        _arrive(counters)  # which also keeps threads from writing states that others have yet to read
        tl.store(place, h.to(state.dtype.element_ty), mask=stored)
    else:
        output = (program - UPDATING) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        tiles = _first_tiles(weight, output, 0, INNER // GROUPS, INNER, OUTPUTS, BLOCK_IN, AHEAD)
        if DEPENDENT:
            gdc_launch_dependents()
            gdc_wait()
        _last_product(
            tiles,
            y,
            squares,
            norm_weight,
            weight,
            bias,
            residual,
            out,
            output,
            line,
            rows,
            residual_stride,
            out_stride,
            eps,
            counters,
            UPDATING,
            INNER,
            OUTPUTS,
            GROUPS,
            UPDATING // GROUPS,
            BLOCK_OUT,
            BLOCK_IN,
            AHEAD,
            INTERPRETED,
            DEPENDENT,
        )
