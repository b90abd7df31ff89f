# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Mamba's scan over many tokens in one kernel, from the raw step size to the gated output. Used without gradients.

Every sequence is read once, from where it is: [B, L, .] with any strides but the last, so that the halves of a projection
need no copy. The step size's bias, shift and softplus, pads, the state that comes in, skip and gate are inside; only the
result and the final state are written. A length that is cut into parts is read twice instead: first for the states that the
parts start from, then by all parts at the same time.

`can_scan` says where the kernel runs; its reference is `selective_scan_naive` (selective_scan.py).

Shapes: `B` rows, `L` tokens, `E` channels, `N` state size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .decode_kernels import (
    _INTERPRETED,
    _KERNEL_DTYPES,
    _PROCESSORS,
    _blocks,
    _check_shape,
    _launch,
    _power_of_two,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    kernels_can_run,
    tl,
)

_LARGEST_STATE = 256  # of a channel, which a program holds in registers


class ScanPlan(NamedTuple):
    """How `scan_forward` is cut into programs, each for some channels of a row and the tokens of a part of its length.

    tokens: that are computed at a time; a power of two.
    channels: of a program; a power of two.
    warps: of 32 threads a program.
    parts: of the length, at most, that are computed at the same time, of as many `tokens` each. More than one cost a pass
        over all but the last of them for the states that they start from, which does without C, z, D and y.
    """

    tokens: int
    channels: int
    warps: int
    parts: int = 1


def scan_plan(rows: int, length: int, channels: int, size: int) -> ScanPlan:
    """The cut for [B, L, E] of a recurrence with a state of `size` a channel.

    Measured on an H100 with mamba-2.8b's row of 6144 tokens (E = 5120, N = 16, bfloat16). Its time is the latency of one or
    two warps a scheduler, so what counts is how much of a thread's work depends on nothing: with 4 of a channel's states a
    thread and 16 tokens at a time 464 us (16 channels, 2 warps), 471 (8, 1), 514 (16, 4: 2 states a thread), 519 (32, 4);
    with 2 states 621 (8, 2) and 545 (32, 8), with 8 tokens 605 (8, 1). States of more than 64 get 8 of a channel's a thread
    and 8 tokens, which is as many registers. Programs have 8 channels at least, 16 bytes, which a thread loads at a time.

    In whole prompts, where the clock is lower, one such row takes 461 us with 32 tokens at a time, with 16 516; several rows
    take 4 to 7 % longer with 32.

    More parts than one pay where most schedulers would have no warp: a row of 1536 channels takes 387 us in one part, 248
    in 4, 189 in 8, 155 in 16; one of 5120 channels 473 in one, 499 in 4, 466 in 16.
    """
    columns = _power_of_two(size)
    own = 8 if columns > 64 else min(4, columns)
    block = max(8, 64 * own // columns)
    warps = block * columns // (32 * own)
    tokens = 8 if columns > 64 else 16
    few = rows * _blocks(channels, block) * warps <= 2 * _PROCESSORS
    parts = min(16, max(length // (8 * tokens), 1)) if few else 1
    if rows == 1 and not few and tokens == 16:
        tokens = 32
    return ScanPlan(tokens, block, warps, parts)


def can_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
) -> bool:
    """Whether `scan_forward` takes these tensors: where Triton runs, in float32, bfloat16 or float16, N up to 256."""
    present = [tensor for tensor in (x, dt, A, B, C, D, z, initial_state, dt_bias, shift) if tensor is not None]
    return (
        kernels_can_run(x.device)
        and A.shape[1] <= _LARGEST_STATE
        and all(tensor.device == x.device and tensor.dtype in _KERNEL_DTYPES for tensor in present)
        and x.numel() > 0
    )


def scan_forward(
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
    plan: ScanPlan | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`selective_scan` without gradients, for tensors that `can_scan` accepts; all in float32, y rounded once.

    Args:
        x, dt, B, C, z: as for `selective_scan`; copied if their last stride is not 1.
        A: [E, N] float32.
        initial_state: [B, E, N], float32 or narrower.
        lengths: [B] long, tokens of each row; y is 0 at the pads behind them.
        shift: as for `selective_scan`; read from a byte a token.
        plan: how to cut the work; None: `scan_plan`'s.

    Returns:
        y [B, L, E] in x's dtype and the final state [B, E, N] in float32.
    """
    rows, length, channels = x.shape
    size = A.shape[1]
    for name, tensor in (("dt", dt), ("z", z)):
        _check_shape(name, tensor, (rows, length, channels))
    for name, tensor in (("B", B), ("C", C)):
        _check_shape(name, tensor, (rows, length, size))
    for name, tensor in (("D", D), ("dt_bias", dt_bias)):
        _check_shape(name, tensor, (channels,))
    _check_shape("A", A, (channels, size))
    _check_shape("initial_state", initial_state, (rows, channels, size))
    _check_shape("lengths", lengths, (rows,))
    if plan is None:
        plan = scan_plan(rows, length, channels, size)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    final_state = x.new_empty(rows, channels, size, dtype=torch.float32)
    marked = None if shift is None else (marks(shift[0], rows, length), shift[1])
    _scan(x, dt, A, B, initial_state, dt_bias, softplus, lengths, marked, plan, C, D, z, out, final_state)
    return out, final_state


def scan_starts(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    initial_state: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    softplus: bool,
    lengths: torch.Tensor | None,
    shift: tuple[torch.Tensor, torch.Tensor] | None,
    every: int,
    plan: ScanPlan | None = None,
) -> torch.Tensor:
    """The states that the tokens 0, every, 2 every, ... start from: [B, tiles, E, N] float32. See `scan_forward`.

    Args:
        shift: as `marks` of the tokens [B, L], and what is added to them [E].
        every: a power of two; the plan's tokens become a multiple of it.
    """
    rows, length, channels = x.shape
    size = A.shape[1]
    if plan is None:
        plan = scan_plan(rows, length, channels, size)
    plan = plan._replace(tokens=max(plan.tokens, every))
    starts = x.new_empty(rows, _blocks(length, every), channels, size, dtype=torch.float32)
    _scan(x, dt, A, B, initial_state, dt_bias, softplus, lengths, shift, plan, starts=starts, every=every)
    return starts


def marks(where: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """Flat positions among rows and tokens as a byte a token, [B, L]: 1 there, 0 elsewhere."""
    flat = torch.zeros(rows * length, dtype=torch.uint8, device=where.device)
    return flat.index_fill_(0, where, 1).view(rows, length)


def _scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    initial_state: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    softplus: bool,
    lengths: torch.Tensor | None,
    shift: tuple[torch.Tensor, torch.Tensor] | None,
    plan: ScanPlan,
    C: torch.Tensor | None = None,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    final_state: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    every: int = 1,
) -> None:
    """Write `out` and `final_state`, or `starts`."""
    rows, length, channels = x.shape
    size = A.shape[1]
    x, dt, B = (_with_columns(sequence) for sequence in (x, dt, B))
    C, z = (None if sequence is None else _with_columns(sequence) for sequence in (C, z))
    shifted, added_there = (None, None) if shift is None else (shift[0].contiguous(), shift[1].contiguous())
    A = A.contiguous()
    D, dt_bias, initial_state, lengths = (t if t is None else t.contiguous() for t in (D, dt_bias, initial_state, lengths))
    columns = _power_of_two(size)
    own = min(max(plan.channels * columns // (32 * plan.warps), 1), columns, 4)
    part_length = _blocks(_blocks(length, plan.tokens), plan.parts) * plan.tokens
    parts = _blocks(length, part_length)
    added = steps = None
    if parts > 1:
        added = x.new_empty(rows, parts - 1, channels, size, dtype=torch.float32)
        steps = x.new_empty(rows, parts - 1, channels, dtype=torch.float32)
    sequences = tuple(x if sequence is None else sequence for sequence in (x, dt, B, C, z, out))

    def launch(parts_now: int, *read_and_written: torch.Tensor | None) -> None:
        _launch(
            _scan_kernel,
            (_blocks(channels, plan.channels), rows, parts_now),
            plan.warps,
            *(x, dt, A, B, dt_bias, shifted, added_there, lengths, added, steps, *read_and_written, length, part_length),
            *(stride for sequence in sequences for stride in sequence.stride()[:2]),
            CHANNELS=channels,
            SIZE=size,
            SOFTPLUS=softplus,
            TOKENS=plan.tokens,
            EVERY=every,
            BLOCK=plan.channels,
            BLOCK_SIZE=columns,
            PARTS=parts,
            OWN=own,
            LEVELS=min((columns // own).bit_length() - 1, 4),
            PTX=not _INTERPRETED and torch.version.cuda is not None,
            INTERPRETED_LENGTH=part_length if _INTERPRETED else None,  # the interpreter counts to no number but a constant
        )

    if parts > 1:
        launch(parts - 1, *[None] * 7)
    launch(parts, C, D, z, initial_state, out, final_state, starts)


def _with_columns(sequence: torch.Tensor) -> torch.Tensor:
    return sequence if sequence.stride(-1) == 1 or sequence.shape[-1] == 1 else sequence.contiguous()


@jit
def _joined(decay1, input1, decay2, input2):
    """Two spans of h = decay h + input, one behind the other, as one."""
    return decay2 * decay1, decay2 * input1 + input2


@jit
def _exp2(x, PTX: tl.constexpr):
    """2^x, but 0 below 2^-126: that saves three of what Triton's own costs, which is four instructions."""
    if PTX:
        y = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        y = tl.exp2(x)
    return y


@jit
def _softplus(x, PTX: tl.constexpr):
    """log(1 + exp(x)) with a relative error of 2e-7 wherever u = exp(-|x|) has one: the polynomial is log(1 + u) / u."""
    u = _exp2(tl.abs(x) * -1.4426950408889634, PTX)
    p = u * 0.0053475042805075645 - 0.030084801837801933
    p = p * u + 0.07939537614583969
    p = p * u - 0.1378513127565384
    p = p * u + 0.19176346063613892
    p = p * u - 0.24865210056304932
    p = p * u + 0.3332262635231018
    p = p * u - 0.49999719858169556
    p = p * u + 1.0
    return p * u + tl.maximum(x, 0.0)


@jit
def _silu(x, PTX: tl.constexpr):
    divisor = 1.0 + _exp2(x * -1.4426950408889634, PTX)
    if PTX:
        y = x * tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [divisor], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        y = x / divisor
    return y


@jit
def _summed(parts, OWN: tl.constexpr, LEVELS: tl.constexpr):
    """The sum over all states [tokens, channels]: over the `OWN` of a thread, then by halves, `LEVELS` times.

    What is split must be in one thread, so that Triton moves these sums through shared memory once and the threads share
    the rest of the work; with tl.sum alone every thread would sum all of them, over as many shuffles.
    """
    TOKENS: tl.constexpr = parts.shape[0]
    CHANNELS: tl.constexpr = parts.shape[2]
    parts = tl.sum(tl.reshape(parts, [TOKENS, parts.shape[1] // OWN, OWN, CHANNELS]), 2)
    if parts.shape[1] > 1 << LEVELS:
        parts = tl.sum(tl.reshape(parts, [TOKENS, 1 << LEVELS, parts.shape[1] >> LEVELS, CHANNELS]), 2)
    parts = tl.permute(parts, (0, 2, 1))
    for _ in tl.static_range(LEVELS):
        first, second = tl.split(tl.reshape(parts, [TOKENS, CHANNELS, parts.shape[2] // 2, 2]))
        parts = first + second
    return tl.reshape(parts, [TOKENS, CHANNELS])


@jit
def _step_size(raw, bias, shifted, shift, here, SOFTPLUS: tl.constexpr, PTX: tl.constexpr):
    """dt [tokens, channels] in float32, 0 where there is no token `here`."""
    step = raw.to(tl.float32)
    if bias is not None:
        step += bias
    if shifted is not None:
        step += tl.where((shifted != 0)[:, None], shift, 0.0)
    if SOFTPLUS:
        step = _softplus(step, PTX)
    return tl.where(here, step, 0.0)


@jit
def _after_parts(
    h,
    rate,
    added,
    steps,
    row,
    part,
    channel,
    CHANNELS,
    SIZE,
    in_state,
    in_state_here,
    PARTS: tl.constexpr,
    PTX: tl.constexpr,
):
    """The state [1, states, channels] that `part` starts from, from the row's first, `h`: see `_scan_kernel`.

    Parts that are not before this one are read as no steps and nothing added, so that all can be fetched at once.
    """
    for before in tl.static_range(PARTS - 1):
        first = (row * (PARTS - 1) + before) * CHANNELS
        here = (before < part) & (channel < CHANNELS)[None, None, :]
        passed = tl.load(steps + first + channel[None, None, :], mask=here, other=0.0)
        reached = tl.load(added + first * SIZE + in_state, mask=(before < part) & in_state_here, other=0.0)
        h = _exp2(passed * rate, PTX) * h + reached
    return h


@jit
def _without_pads(length, lengths, row, begin):
    if lengths is not None:
        length = tl.minimum(tl.load(lengths + row).to(tl.int32) - begin, length)
    return length


@jit
def _skipped_and_gated(y, u, skip, gate, PTX: tl.constexpr):
    if skip is not None:
        y += u.to(tl.float32) * skip
    if gate is not None:
        y *= _silu(gate.to(tl.float32), PTX)
    return y


@jit
def _scan_kernel(  # noqa: C901 - its branches are constants, which a compiled kernel has none of
    x,
    dt,
    A,
    B,
    dt_bias,
    shifted,
    shift,
    lengths,
    added,
    steps,
    C,
    D,
    z,
    initial_state,
    out,
    final_state,
    starts,
    length,
    part_length,
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
    out_row,
    out_token,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    TOKENS: tl.constexpr,
    EVERY: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    OWN: tl.constexpr,
    LEVELS: tl.constexpr,
    PTX: tl.constexpr,
    INTERPRETED_LENGTH: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Every part of the length from the state that the parts before it leave: `out`, and `final_state` by the last part; or
    `starts` [B, tiles, E, N], the states before every tile of EVERY tokens.

    Without either: of every part but the last, the state that it makes of none, `added` [B, parts - 1, E, N], and the sum of
    its step sizes, `steps` [B, parts - 1, E], which is all that its decay depends on.
    """
    row = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    FIRST_PASS: tl.constexpr = out is None and starts is None
    token = tl.arange(0, TOKENS)
    place = token.to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_SIZE)
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()

    # From here on tokens are counted from the part's first.
    begin = part * part_length
    if shifted is not None:
        shifted += row * length + begin.to(tl.int64)
    length -= begin
    end = _without_pads(length, lengths, row, begin)
    stop = tl.minimum(end if FIRST_PASS else length, part_length)
    known = (channel < CHANNELS)[None, :]
    column_known = (column < SIZE)[None, :]
    # With its tokens' dimension of one, the state comes in the layout that the loop keeps it in.
    in_state = channel[None, None, :] * SIZE + column[None, :, None]
    in_state_here = (channel < CHANNELS)[None, None, :] & (column < SIZE)[None, :, None]
    rate = tl.load(A + in_state, mask=in_state_here, other=0.0) * 1.4426950408889634
    in_states = row * CHANNELS * SIZE + in_state
    if initial_state is not None:
        h = tl.load(initial_state + in_states, mask=in_state_here, other=0.0).to(tl.float32)
    else:
        h = tl.zeros([1, BLOCK_SIZE, BLOCK], tl.float32)
    if FIRST_PASS:
        total = tl.zeros([TOKENS, BLOCK], tl.float32)
    else:
        h = _after_parts(h, rate, added, steps, row, part, channel, CHANNELS, SIZE, in_state, in_state_here, PARTS, PTX)
    bias = None
    if dt_bias is not None:
        bias = tl.load(dt_bias + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)[None, :]
    if shifted is not None:
        shift = tl.load(shift + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)[None, :]
    skip = None
    if D is not None:
        skip = tl.load(D + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)[None, :]

    # A sequence's tiles: a pointer that moves, and where the elements of a tile are behind it.
    jump = tl.full([], TOKENS, tl.int64)
    begin = begin.to(tl.int64)
    if starts is not None:
        starts += (row * tl.cdiv(length + begin, EVERY) + begin // EVERY) * (CHANNELS * SIZE)
    x += row * x_row + begin * x_token
    dt += row * dt_row + begin * dt_token
    B += row * B_row + begin * B_token
    x_place = place * x_token + channel[None, :]
    dt_place = place * dt_token + channel[None, :]
    B_place = place * B_token + column[None, :]
    here = (token < end)[:, None]
    u = tl.load(x + x_place, mask=here & known, other=0.0)
    raw = tl.load(dt + dt_place, mask=here & known, other=0.0)
    B_tile = tl.load(B + B_place, mask=here & column_known, other=0.0).to(tl.float32)
    if out is not None:
        C += row * C_row + begin * C_token
        C_place = place * C_token + column[None, :]
        C_tile = tl.load(C + C_place, mask=here & column_known, other=0.0).to(tl.float32)
        out += row * out_row + begin * out_token
        out_place = place * out_token + channel[None, :]
    gate = None
    if z is not None:
        z += row * z_row + begin * z_token
        z_place = place * z_token + channel[None, :]
        gate = tl.load(z + z_place, mask=here & known, other=0.0)
    shifted_here = None
    if shifted is not None:
        shifted_here = tl.load(shifted + token, mask=token < end, other=0)
    step = _step_size(raw, bias, shifted_here, shift, here, SOFTPLUS, PTX)
    drive = step * u.to(tl.float32)

    for start in range(0, stop if INTERPRETED_LENGTH is None else INTERPRETED_LENGTH, TOKENS):
        # The next tile is on its way while this one is computed.
        here = (start + TOKENS + token < end)[:, None]
        x += jump * x_token
        dt += jump * dt_token
        B += jump * B_token
        u_next = tl.load(x + x_place, mask=here & known, other=0.0)
        raw = tl.load(dt + dt_place, mask=here & known, other=0.0)
        B_next = tl.load(B + B_place, mask=here & column_known, other=0.0)
        if shifted is not None:
            later = start + TOKENS + token
            shifted_here = tl.load(shifted + later, mask=later < end, other=0)
        if out is not None:
            C += jump * C_token
            C_next = tl.load(C + C_place, mask=here & column_known, other=0.0)
        if gate is not None:
            z += jump * z_token
            gate_next = tl.load(z + z_place, mask=here & known, other=0.0)

        decay = _exp2(step[:, None, :] * rate, PTX)
        value = drive[:, None, :] * B_tile[:, :, None]
        value = tl.where((token == 0)[:, None, None], decay * h + value, value)
        _, states = tl.associative_scan((decay, value), 0, _joined)
        # -0.0 is what can be added without changing anything, and so costs nothing.
        if starts is not None:
            for earlier in tl.static_range(TOKENS // EVERY):
                inside = in_state_here & (start + earlier * EVERY < stop)
                tl.store(starts + in_state, h, mask=inside)
                starts += CHANNELS * SIZE
                at_end = token == (earlier + 1) * EVERY - 1
                h = tl.sum(tl.where(at_end[:, None, None], states, -0.0), 0, keep_dims=True)
        else:
            h = tl.sum(tl.where((token == TOKENS - 1)[:, None, None], states, -0.0), 0, keep_dims=True)
        if FIRST_PASS:
            total += step
        if out is not None:
            y = _summed(states * C_tile[:, :, None], OWN, LEVELS)
            y = _skipped_and_gated(y, u, skip, gate, PTX)
            inside = (start + token < stop)[:, None] & known
            tl.store(out + out_place, y.to(out.dtype.element_ty), mask=inside)
            out += jump * out_token
            C_tile = C_next.to(tl.float32)

        if gate is not None:
            gate = gate_next
        u = u_next
        step = _step_size(raw, bias, shifted_here, shift, here, SOFTPLUS, PTX)
        drive = step * u.to(tl.float32)
        B_tile = B_next.to(tl.float32)

    if FIRST_PASS:
        first = (row * (PARTS - 1) + part) * CHANNELS
        tl.store(added + first * SIZE + in_state, h, mask=in_state_here)
        tl.store(steps + first + channel, tl.sum(total, 0), mask=channel < CHANNELS)
    if final_state is not None:
        tl.store(final_state + in_states, h, mask=in_state_here & (part == PARTS - 1))
