# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""One decoding step, a token a row, in few kernels that read every weight once. Used without gradients, inside CUDA graphs.

    Mamba      norm_linear | convolution_step | linear_in_parts | step_from_parts | selective_update | norm_linear
    Mamba-2    norm_linear | convolution_step | dual_step | norm_linear

For up to FEW_ROWS rows the convolution is part of the first kernel, and all that follows is another (tail_kernels.py). For
more, products are tensor cores' and every weight serves a block of rows.

Each function runs its Triton kernel where Triton can (CUDA tensors in float32, bfloat16 or float16), and otherwise the torch
reference beside it, `<name>_naive`, which says what is computed. Sums are taken in float32 and in a fixed order.

States are updated in place. `active` [B] (bool or int8; None: all) names the rows that take part: the states of the others
stay as they are, bit for bit, and what is returned for them means nothing, but is finite. `out` is where a result is
written (None: a new tensor); it may have any strides whose last is 1.

Shapes: `B` rows, `H` hidden size, `E` inner size, `W` width of the convolution, `N` state size, `R` rank of the step size,
`nh` heads of `P` channels, `G` groups of heads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .optional_kernels import kernels_enabled
from .precision import at_least_float32

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None
try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:
    gdc_launch_dependents = gdc_wait = None


def jit(function: Any) -> Any:
    """Triton's decorator; without Triton the functions below are never called."""
    return function if triton is None else triton.jit(function)


# What the choice of block sizes counts with, those of an H100. Other cards have other numbers, which costs time at most.
_PROCESSORS = 132
_SHARED_MEMORY = 220 * 1024  # bytes a multiprocessor has for tiles that are on their way


FEW_ROWS = 1  # up to so many every row is worth programs, and products, of its own

_dependent = False


@contextlib.contextmanager
def dependent_launches(enabled: bool = True) -> Iterator[None]:
    """Launch the kernels inside so that each starts, and fetches its first weights, while those before it run out
    (programmatic dependent launch; Hopper and later, Triton 3.4 and later, elsewhere ignored).

    Weights and the layer's states must not be written by a kernel inside that runs before; in a decoding step none is.
    """
    global _dependent
    capable = torch.cuda.is_available() and torch.version.cuda is not None and torch.cuda.get_device_capability() >= (9, 0)
    previous, _dependent = _dependent, enabled and gdc_wait is not None and capable
    try:
        yield
    finally:
        _dependent = previous


def kernels_can_run(device: torch.device) -> bool:
    """Whether the kernels run on tensors of a device: CUDA from compute capability 8.0 on, with Triton installed, or any
    device in Triton's interpreter."""
    if triton is None or _INTERPRETED:
        return triton is not None
    return device.type == "cuda" and (torch.version.cuda is None or torch.cuda.get_device_capability(device) >= (8, 0))


# Norm and linear layer


class LinearPlan(NamedTuple):
    """How `norm_linear` is cut into programs.

    Attributes:
        rows: of x in a program; 1: products are multiplied and summed, more: tensor cores, which want 16 at least.
        outputs: output channels of a program, which streams their rows of the weight.
        inputs: input channels of a tile of the weight.
        stages: tiles that are on their way at a time, the one in use included.
        warps: of 32 threads a program.
        fused_norm: every program normalises its rows itself; otherwise a kernel of its own does so first.
        ahead: tiles that are asked for before the kernel before has ended.
    """

    rows: int
    outputs: int
    inputs: int
    stages: int
    warps: int = 4
    fused_norm: bool = True
    ahead: int = 1


class Convolution(NamedTuple):
    """The step of a causal convolution, with SiLU, that some outputs of `norm_linear` go through.

    Attributes:
        first: the first of these outputs.
        weight, bias, state: as for `convolution_step`.
    """

    first: int
    weight: torch.Tensor
    bias: torch.Tensor | None
    state: torch.Tensor

    @property
    def channels(self) -> int:
        return len(self.weight)


def linear_plan(rows: int, outputs: int, inputs: int, item_size: int = 2) -> LinearPlan:
    """The cut for x [rows, inputs] and a weight [outputs, inputs] of `item_size` bytes an element.

    Measured on an H100 with the shapes of mamba-2.8b, mamba2-2.7b and mamba-130m. One row: tiles of 8 KB, and every program
    normalises the row itself, which is why they have 16 outputs if all of them then run at once, five on a multiprocessor,
    and 8 otherwise; with few outputs and inputs programs of one warp, which ask for all of their weights at once. Several
    rows: every program reads all of x from the L2 cache, which costs more than multiprocessors without a program, hence 32
    outputs at least; a norm in a kernel of its own; stages as many as shared memory holds for the programs that share it,
    one being left for the first tile.
    """
    if rows == 1:
        block_outputs = 4
        if 4 * _PROCESSORS <= _blocks(outputs, 16) <= 5 * _PROCESSORS:
            block_outputs = 16
        elif _blocks(outputs, 8) >= 4 * _PROCESSORS:
            block_outputs = 8
        if block_outputs == 4 and inputs <= 1024:
            block_inputs = min(256, max(_power_of_two(inputs), 16))
            return LinearPlan(1, 4, block_inputs, 2, warps=1, ahead=_blocks(inputs, block_inputs))
        block_inputs = min(8192 // (item_size * block_outputs), max(_power_of_two(inputs), 16))
        return LinearPlan(1, block_outputs, block_inputs, 5 if block_outputs == 4 else 3)
    block_rows = min(max(_power_of_two(rows), 16), 64)
    block_outputs = 128
    while block_outputs > 32 and _blocks(outputs, block_outputs) < _PROCESSORS:
        block_outputs //= 2
    resident = min(_blocks(_blocks(outputs, block_outputs), _PROCESSORS), 2)
    fitting = 24 * 1024 // (item_size * (block_outputs + block_rows))
    block_inputs = min(_power_of_two(fitting + 1) // 2, 512 // item_size, max(_power_of_two(inputs), 16))
    if item_size > 2:  # products in float32 take registers instead of tensor cores
        block_outputs, block_inputs = min(block_outputs, 32), min(block_inputs, 32)
    stage = (block_outputs + block_rows) * block_inputs * item_size
    stages = min(max(_SHARED_MEMORY // (resident * stage) - 1, 2), 8 if block_rows == 64 else 4)
    return LinearPlan(block_rows, block_outputs, block_inputs, stages, fused_norm=False)


def norm_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-5,
    gate: torch.Tensor | None = None,
    groups: int = 1,
    residual: torch.Tensor | None = None,
    residual_in_fp32: bool = False,
    out: torch.Tensor | None = None,
    convolution: Convolution | None = None,
    counters: torch.Tensor | None = None,
    plan: LinearPlan | None = None,
) -> torch.Tensor:
    """residual + weight @ norm(x * silu(gate)) + bias, every part but the product optional.

    Rounded where `RMSNorm`, `GatedGroupNorm`, nn.Linear and a block's residual sum round: the normalised x to the norm
    weight's dtype, before and after that weight; the product to the weight's.

    Args:
        x: [B, K], any row stride.
        weight: [O, K], contiguous.
        bias: [O].
        norm_weight: [K]; None: no norm.
        gate: [B, K], any row stride, before its silu.
        groups: equal parts of the K channels, each normalised on its own.
        residual: [B, O]; may be `out`.
        residual_in_fp32: the sum with the residual is in float32, whatever their dtypes.
        convolution: what some of the outputs go through then; not with a residual.
        counters: int32, a power of two of them, set to 0 before the kernel ends.
        plan: how to cut the work; None: `linear_plan`'s.

    Returns:
        [B, O] in the weight's dtype, or what its sum with the residual has.
    """
    rows, inputs = x.shape
    outputs = weight.shape[0]
    _check_shape("weight", weight, (outputs, inputs))
    _check_shape("bias", bias, (outputs,))
    _check_shape("norm_weight", norm_weight, (inputs,))
    _check_shape("gate", gate, (rows, inputs))
    _check_shape("residual", residual, (rows, outputs))
    _check_shape("out", out, (rows, outputs))
    if inputs % groups:
        raise ValueError(f"{inputs} channels cannot be normalised in {groups} equal groups.")
    taps = (None, None, None) if convolution is None else convolution[1:]
    if convolution is not None:
        _check_shape("convolution.state", convolution.state, (rows, convolution.channels, convolution.state.shape[-1]))
        _check_shape("convolution.weight", convolution.weight, tuple(convolution.state.shape[1:]))
        _check_shape("convolution.bias", convolution.bias, (convolution.channels,))
        if residual is not None or not 0 <= convolution.first <= outputs - convolution.channels:
            raise ValueError("A convolution needs its channels among the outputs, and no residual.")
    ours = weight.is_contiguous() and all(tensor is None or tensor.is_contiguous() for tensor in taps)
    if not ours or not _kernel_takes(x, weight, bias, norm_weight, gate, residual, out, *taps):
        return norm_linear_naive(
            x, weight, bias, norm_weight, eps, gate, groups, residual, residual_in_fp32, out, convolution, counters
        )
    if plan is None:
        plan = linear_plan(rows, outputs, inputs, weight.element_size())
    if convolution is not None and plan.rows > 1:
        product = norm_linear(x, weight, bias, norm_weight, eps, gate, groups, out=out, counters=counters, plan=plan)
        _convolve_outputs(product, convolution, convolution_step)
        return product
    if out is None:
        dtype = weight.dtype if residual is None else torch.promote_types(weight.dtype, residual.dtype)
        widest = torch.float32 if residual is not None and residual_in_fp32 else dtype
        out = x.new_empty(rows, outputs, dtype=torch.promote_types(dtype, widest))
    if (norm_weight is not None or gate is not None) and not plan.fused_norm:
        x, gate, norm_weight = _normalised(x, gate, norm_weight, weight.dtype, groups, eps), None, None
    whole_group = min(_power_of_two(inputs // groups), 4096)
    _launch(
        _norm_linear_kernel,
        (_blocks(outputs, plan.outputs), _blocks(rows, plan.rows)),
        plan.warps,
        *(x, gate, norm_weight, weight, bias, residual, *taps, counters, out),
        *(rows, x.stride(0), _row_stride(gate), _row_stride(residual), out.stride(0), eps),
        INPUTS=inputs,
        OUTPUTS=outputs,
        GROUPS=1 if norm_weight is None else groups,
        FIRST_CONVOLVED=0 if convolution is None else convolution.first,
        CONVOLVED=0 if convolution is None else convolution.channels,
        WIDTH=0 if convolution is None else convolution.state.shape[2],
        TAPS=0 if convolution is None else _power_of_two(convolution.state.shape[2]),
        COUNTERS=0 if counters is None else counters.numel(),
        BLOCK_ROWS=plan.rows,
        BLOCK_OUT=plan.outputs,
        BLOCK_IN=plan.inputs,
        BLOCK_NORM=whole_group if plan.rows == 1 else plan.inputs,
        AHEAD=plan.ahead,
        STAGES=plan.stages,
        ROWS_FIRST=plan.rows >= 64,
        INTERPRETED=_INTERPRETED,
    )
    return out


def norm_linear_naive(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-5,
    gate: torch.Tensor | None = None,
    groups: int = 1,
    residual: torch.Tensor | None = None,
    residual_in_fp32: bool = False,
    out: torch.Tensor | None = None,
    convolution: Convolution | None = None,
    counters: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reference of `norm_linear`: the modules it stands for, one after the other."""
    if gate is not None:
        x = at_least_float32(x) * F.silu(at_least_float32(gate))
    if norm_weight is not None:
        parts = at_least_float32(x).unflatten(-1, (groups, -1))
        parts = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)
        x = norm_weight * parts.flatten(-2).to(norm_weight.dtype)
    y = F.linear(x.to(weight.dtype), weight, bias)
    if residual is not None:
        y = (at_least_float32(residual) if residual_in_fp32 else residual) + y
    y = y if out is None else out.copy_(y)
    if convolution is not None:
        _convolve_outputs(y, convolution, convolution_step_naive)
    if counters is not None:
        counters.zero_()
    return y


def _convolve_outputs(y: torch.Tensor, convolution: Convolution, step: Callable[..., torch.Tensor]) -> None:
    first, weight, bias, state = convolution
    mine = y[:, first : first + convolution.channels]
    step(mine, weight, bias, state, out=mine)


def norm_in_one_kernel(
    x: torch.Tensor, norm_weight: torch.Tensor, eps: float, gate: torch.Tensor | None = None, groups: int = 1
) -> torch.Tensor | None:
    """The norm of `norm_linear` alone, for a prompt as for a step: [..., K] -> [..., K] in the norm weight's dtype.

    None where it has to be computed otherwise: with gradients, while it is traced, without a GPU or Triton, without kernels.
    """
    if torch.compiler.is_compiling() or not kernels_enabled():
        return None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, norm_weight, gate)):
        return None
    flat_gate = None if gate is None else gate.flatten(0, -2)
    flat = x.flatten(0, -2)
    if not _kernel_takes(flat, norm_weight, flat_gate):
        return None
    return _normalised(flat, flat_gate, norm_weight, norm_weight.dtype, groups, eps).view(x.shape)


def _normalised(
    x: torch.Tensor, gate: torch.Tensor | None, norm_weight: torch.Tensor | None, dtype: torch.dtype, groups: int, eps: float
) -> torch.Tensor:
    rows, inputs = x.shape
    out = x.new_empty(rows, inputs, dtype=dtype)
    block = _power_of_two(inputs // groups)
    _launch(
        _norm_kernel,
        (rows, groups),
        min(max(block // 512, 1), 16),
        *(x, gate, norm_weight, out, rows, x.stride(0), _row_stride(gate), eps),
        INPUTS=inputs,
        GROUPS=groups,
        BLOCK=block,
    )
    return out


@jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@jit
def _gated(x, gate, row, column, here, x_stride, gate_stride):
    """x * silu(gate) [rows, columns] in float32; 0 where it is not `here`."""
    row = row.to(tl.int64)[:, None]
    value = tl.load(x + row * x_stride + column[None, :], mask=here, other=0.0).to(tl.float32)
    if gate is not None:
        value *= _silu(tl.load(gate + row * gate_stride + column[None, :], mask=here, other=0.0).to(tl.float32))
    return value


@jit
def _inverse_rms(
    x, gate, row, rows, first, x_stride, gate_stride, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    """1 / root mean square of each row's channels first ... first + SIZE."""
    squares = tl.zeros([row.shape[0], BLOCK], tl.float32)
    for start in tl.range(0, SIZE, BLOCK, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK)
        here = (row < rows)[:, None] & (column < SIZE)[None, :]
        value = _gated(x, gate, row, first + column, here, x_stride, gate_stride)
        squares += value * value
    return tl.rsqrt(tl.sum(squares, 1) / SIZE + eps)


@jit
def _weighted(value, weight):
    """Normalised values [rows, columns], rounded to the dtype of the norm's weight [columns] before and after it."""
    return (weight.to(tl.float32)[None, :] * value.to(weight.dtype).to(tl.float32)).to(weight.dtype)


@jit
def _normed(x, gate, norm_weight, row, rows, column, end, scale, x_stride, gate_stride):
    """The normalised x [rows, columns], in x's dtype if there is nothing to do."""
    here = (row < rows)[:, None] & (column < end)[None, :]
    if norm_weight is not None:
        value = _gated(x, gate, row, column, here, x_stride, gate_stride) * scale[:, None]
        result = _weighted(value, tl.load(norm_weight + column, mask=column < end, other=0.0))
    elif gate is not None:
        result = _gated(x, gate, row, column, here, x_stride, gate_stride)
    else:
        result = tl.load(x + row.to(tl.int64)[:, None] * x_stride + column[None, :], mask=here, other=0.0)
    return result


@jit
def _norm_kernel(
    x,
    gate,
    norm_weight,
    out,
    rows,
    x_stride,
    gate_stride,
    eps,
    INPUTS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    SIZE: tl.constexpr = INPUTS // GROUPS
    row = tl.program_id(0) + tl.arange(0, 1)
    column = tl.program_id(1) * SIZE + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < SIZE
    here = (row < rows)[:, None] & inside[None, :]
    if norm_weight is not None:
        weight = tl.load(norm_weight + column, mask=inside, other=0.0)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    value = _gated(x, gate, row, column, here, x_stride, gate_stride)
    if norm_weight is not None:
        value = _weighted(value * tl.rsqrt(tl.sum(value * value, 1) / SIZE + eps)[:, None], weight)
    tl.store(out + row.to(tl.int64)[:, None] * INPUTS + column[None, :], value.to(out.dtype.element_ty), mask=here)


@jit
def _product(tile, x, total, DOT: tl.constexpr, ROWS_FIRST: tl.constexpr, INTERPRETED: tl.constexpr):
    """total + the products of a tile of the weight [outputs, inputs] with x [rows, inputs]."""
    x = x.to(tile.dtype)
    if INTERPRETED:  # Triton's interpreter multiplies the bits of bfloat16
        x = x.to(tl.float32)
        tile = tile.to(tl.float32)
    if not DOT:
        total += tile.to(tl.float32) * x.to(tl.float32)
    elif ROWS_FIRST:
        total = tl.dot(x, tl.trans(tile), total, input_precision="ieee")
    else:
        total = tl.dot(tile, tl.trans(x), total, input_precision="ieee")
    return total


@jit
def _kept_in_registers(x):
    """x, which Triton would otherwise wait for where it is loaded, to move it into shared memory."""
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=32 // x.dtype.primitive_bitwidth
    )


@jit
def _weight_tile(weight, output, column, end, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr):
    """[outputs, inputs]; read once, so that it should not push anything out of the L2 cache."""
    output = tl.minimum(output, OUTPUTS - 1).to(tl.int64)
    place = weight + output[:, None] * INPUTS + column[None, :]
    return tl.load(place, mask=(column < end)[None, :], other=0.0, eviction_policy="evict_first")


@jit
def _first_tiles(
    weight, output, first, end, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK_IN: tl.constexpr, AHEAD: tl.constexpr
):
    """The first tiles of channels first ... end, which are asked for all at once."""
    tiles = ()
    for index in tl.static_range(AHEAD):
        tiles += (_weight_tile(weight, output, first + index * BLOCK_IN + tl.arange(0, BLOCK_IN), end, INPUTS, OUTPUTS),)  # type: ignore[assignment]
    return tiles


@jit
def _streamed_product(
    tiles,
    x,
    gate,
    norm_weight,
    weight,
    total,
    output,
    row,
    rows,
    first,
    x_stride,
    gate_stride,
    scale,
    SIZE: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
    INTERPRETED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """total + the products of the weight with norm(x * silu(gate)), of the channels first ... first + SIZE, whose root mean
    square in each row is 1 / `scale`."""
    end = first + SIZE
    column = first + tl.arange(0, BLOCK_IN)
    parts = ()
    for index in tl.static_range(AHEAD):
        part = _normed(x, gate, norm_weight, row, rows, column + index * BLOCK_IN, end, scale, x_stride, gate_stride)
        if DOT:
            parts += (part,)  # type: ignore[assignment]
        else:
            total = _product(tiles[index], part, total, DOT, ROWS_FIRST, INTERPRETED)
    for start in tl.range(AHEAD * BLOCK_IN, SIZE, BLOCK_IN, num_stages=STAGES):
        later_tile = _weight_tile(weight, output, column + start, end, INPUTS, OUTPUTS)
        later = _normed(x, gate, norm_weight, row, rows, column + start, end, scale, x_stride, gate_stride)
        total = _product(later_tile, later, total, DOT, ROWS_FIRST, INTERPRETED)
    if DOT:  # last, so that the loop's tiles are on their way before the first x is there
        for index in tl.static_range(AHEAD):
            part = parts[index]
            if DEPENDENT:
                part = _kept_in_registers(part)
            total = _product(tiles[index], part, total, DOT, ROWS_FIRST, INTERPRETED)
    return total


@jit
def _taps(weight, bias, state, row, rows, channel, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr):
    """Of a convolution's step: the inputs before the newest and the weights [rows, channels, taps], and the bias or 0."""
    known = (channel >= 0) & (channel < CHANNELS)
    tap = tl.arange(0, TAPS)[None, None, :]
    place = state + (row.to(tl.int64)[:, None] * CHANNELS + channel[None, :])[:, :, None] * WIDTH + tap
    here = ((row < rows)[:, None] & known[None, :])[:, :, None]
    past = tl.load(place + 1, mask=here & (tap < WIDTH - 1), other=0.0)
    factor = tl.load(weight + channel[None, :, None] * WIDTH + tap, mask=known[None, :, None] & (tap < WIDTH), other=0.0)
    offset = tl.zeros([channel.shape[0]], tl.float32)
    if bias is not None:
        offset += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    return past, factor, offset


@jit
def _convolve(
    newest,
    past,
    factor,
    offset,
    state,
    row,
    channel,
    written,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
):
    """silu(conv(x) + bias) [rows, channels] in x's dtype of the newest x and `_taps`; x moves into the state of those
    `written` [rows, channels]."""
    dtype = newest.dtype
    tap = tl.arange(0, TAPS)[None, None, :]
    place = state + (row.to(tl.int64)[:, None] * CHANNELS + channel[None, :])[:, :, None] * WIDTH + tap
    window = tl.where(tap == WIDTH - 1, newest.to(past.dtype)[:, :, None], past)
    y = (
        tl.sum(window.to(dtype).to(tl.float32) * factor.to(dtype).to(tl.float32), 2)
        + offset.to(dtype).to(tl.float32)[None, :]
    )
    tl.debug_barrier()  # no thread may write what another has yet to read
    tl.store(place, window, mask=written[:, :, None] & (tap < WIDTH))
    return _silu(y).to(dtype)


@jit
def _norm_linear_kernel(
    x,
    gate,
    norm_weight,
    weight,
    bias,
    residual,
    kernel,
    kernel_bias,
    state,
    counters,
    out,
    rows,
    x_stride,
    gate_stride,
    residual_stride,
    out_stride,
    eps,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GROUPS: tl.constexpr,
    FIRST_CONVOLVED: tl.constexpr,
    CONVOLVED: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    COUNTERS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_NORM: tl.constexpr,
    AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
    INTERPRETED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    SIZE: tl.constexpr = INPUTS // GROUPS
    DOT: tl.constexpr = BLOCK_ROWS > 1
    output = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    if not DOT:
        total = tl.zeros([BLOCK_OUT, BLOCK_IN], tl.float32)
    elif ROWS_FIRST:
        total = tl.zeros([BLOCK_ROWS, BLOCK_OUT], tl.float32)
    else:
        total = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)

    if CONVOLVED > 0:
        convolved = output - FIRST_CONVOLVED
        past, factor, offset = _taps(kernel, kernel_bias, state, row, rows, convolved, CONVOLVED, WIDTH, TAPS)
    # Unrolled: a loop whose inner loops vanish would be pipelined, and so read x before the kernel before has written it.
    for group in tl.static_range(GROUPS):
        first = group * SIZE
        # On their way while the kernel before runs out and while the norm is computed.
        tiles = _first_tiles(weight, output, first, first + SIZE, INPUTS, OUTPUTS, BLOCK_IN, AHEAD)
        if DEPENDENT and group == 0:
            gdc_launch_dependents()
            gdc_wait()
        scale = None
        if norm_weight is not None:
            scale = _inverse_rms(x, gate, row, rows, first, x_stride, gate_stride, eps, SIZE, BLOCK_NORM, STAGES)
        total = _streamed_product(
            tiles,
            x,
            gate,
            norm_weight,
            weight,
            total,
            output,
            row,
            rows,
            first,
            x_stride,
            gate_stride,
            scale,
            SIZE,
            INPUTS,
            OUTPUTS,
            DOT,
            BLOCK_IN,
            AHEAD,
            STAGES,
            ROWS_FIRST,
            INTERPRETED,
            DEPENDENT,
        )
    if counters is not None:  # noqa: SIM102 - known when this is compiled
        if tl.program_id(0) == 0 and tl.program_id(1) == 0:
            place = tl.arange(0, COUNTERS)
            tl.store(counters + place, tl.zeros([COUNTERS], tl.int32))

    if not DOT:
        y = tl.sum(total, 1)[None, :]
    elif ROWS_FIRST:
        y = total
    else:
        y = tl.trans(total)
    if bias is not None:
        y += tl.load(bias + output, mask=output < OUTPUTS, other=0.0).to(tl.float32)[None, :]
    y = y.to(weight.dtype.element_ty).to(tl.float32)
    here = (row < rows)[:, None] & (output < OUTPUTS)[None, :]
    index = row
    row = row.to(tl.int64)[:, None]
    if residual is not None:
        y += tl.load(residual + row * residual_stride + output[None, :], mask=here, other=0.0).to(tl.float32)
        tl.debug_barrier()  # threads may share an element, and `out` may be `residual`
    if CONVOLVED > 0:
        is_convolved = ((convolved >= 0) & (convolved < CONVOLVED))[None, :]
        newest = y.to(weight.dtype.element_ty)
        z = _convolve(newest, past, factor, offset, state, index, convolved, here & is_convolved, CONVOLVED, WIDTH, TAPS)
        y = tl.where(is_convolved, z.to(tl.float32), y)
    tl.store(out + row * out_stride + output[None, :], y.to(out.dtype.element_ty), mask=here)


# Convolution


class ChannelPlan(NamedTuple):
    """How a kernel that goes over channels is cut into programs: channels of a program, and its warps of 32 threads."""

    channels: int
    warps: int


def convolution_step(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    active: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """silu(conv(x) + bias) of one token; see `causal_conv1d_step`, from which it differs in rounding once, at the end.

    Args:
        x: [B, E], any row stride.
        weight: [E, W], contiguous.
        bias: [E], or None.
        state: [B, E, W], contiguous, the last W inputs, oldest first; shifted in place.

    Returns:
        [B, E] in x's dtype.
    """
    rows, channels, width = state.shape
    _check_convolution(x, weight, bias, state, active, out)
    if not _kernel_takes(x, weight, bias, state, active, out) or not (weight.is_contiguous() and state.is_contiguous()):
        return convolution_step_naive(x, weight, bias, state, active, out)
    if out is None:
        out = x.new_empty(rows, channels)
    block = 128
    _launch(
        _convolution_kernel,
        (_blocks(channels, block), rows),
        4,
        *(x, weight, bias, state, _as_bytes(active), out, rows, x.stride(0), out.stride(0)),
        CHANNELS=channels,
        WIDTH=width,
        TAPS=_power_of_two(width),
        BLOCK=block,
    )
    return out


def convolution_step_naive(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    active: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reference of `convolution_step`."""
    window = torch.cat([state[..., 1:], x.unsqueeze(-1).to(state.dtype)], dim=-1)
    y = (at_least_float32(window.to(x.dtype)) * weight.to(x.dtype)).sum(-1)
    y = F.silu(y if bias is None else y + bias.to(x.dtype)).to(x.dtype)
    _write_state(state, window, active)
    return y if out is None else out.copy_(y)


@jit
def _taking_part(active, row, rows):
    """Which rows' states may be written."""
    result = row < rows
    if active is not None:
        result = tl.load(active + row, mask=result, other=0) != 0
    return result


@jit
def _convolution_kernel(
    x,
    weight,
    bias,
    state,
    active,
    out,
    rows,
    x_stride,
    out_stride,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1) + tl.arange(0, 1)
    here = (channel < CHANNELS)[None, :]
    past, factor, offset = _taps(weight, bias, state, row, rows, channel, CHANNELS, WIDTH, TAPS)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    line = row.to(tl.int64)[:, None]
    newest = tl.load(x + line * x_stride + channel[None, :], mask=here, other=0.0)
    written = here & _taking_part(active, row, rows)[:, None]
    y = _convolve(newest, past, factor, offset, state, row, channel, written, CHANNELS, WIDTH, TAPS)
    tl.store(out + line * out_stride + channel[None, :], y.to(out.dtype.element_ty), mask=here)


# The small products of several rows


class PartsPlan(NamedTuple):
    """How `linear_in_parts` is cut into programs.

    Attributes:
        rows: of x in a program, 16 at least, as tensor cores want.
        outputs: output channels of a program.
        inputs: input channels of a tile of the weight.
        tiles: tiles of a part, one after the other in one program.
        stages: tiles that are on their way at a time, the one in use included, from the second on.
        warps: of 32 threads a program.
    """

    rows: int
    outputs: int
    inputs: int
    tiles: int = 1
    stages: int = 2
    warps: int = 4


def parts_plan(rows: int, outputs: int, inputs: int, item_size: int = 2) -> PartsPlan:
    """The cut for x [rows, inputs] and a weight [outputs, inputs] of `item_size` bytes an element.

    Predicted for an H100 and x_proj of mamba-2.8b, not measured: 512 inputs in a single tile, so that all of the weight is
    on its way before x is there, and x comes at once; that makes 10 parts. More would be summed too often by the next
    kernel, fewer leave multiprocessors idle and 16 inputs follow each other in every warp more than 32 times. 32 outputs and
    16 rows are work for four warps: 60 programs for up to 16 rows; with 32 rows and eight warps, 120 for 64 rows.
    """
    block_rows = 16 if rows <= 16 else 32
    part = 512
    while part > 128 and _blocks(inputs, part) < 8:
        part //= 2
    if item_size > 2:  # products in float32 take registers instead of tensor cores
        return PartsPlan(block_rows, 32, 32, part // 32, 3)
    return PartsPlan(block_rows, 32, part, warps=block_rows // 4)


def linear_in_parts(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None, plan: PartsPlan | None = None
) -> torch.Tensor:
    """weight @ x of few outputs and many inputs, left as partial sums over blocks of inputs, for `step_from_parts`.

    Args:
        x: [B, K], any row stride; rounded to the weight's dtype.
        weight: [J, K], contiguous.
        out: [parts, B, J] float32.
        plan: how to cut the work; None: `parts_plan`'s. A part has `plan.inputs * plan.tiles` inputs, the last what is left.

    Returns:
        [parts, B, J] in float32 at least, whose sum over the parts is the product.
    """
    rows, inputs = x.shape
    outputs = weight.shape[0]
    _check_shape("weight", weight, (outputs, inputs))
    if plan is None:
        plan = parts_plan(rows, outputs, inputs, weight.element_size())
    parts = _blocks(inputs, plan.inputs * plan.tiles)
    _check_shape("out", out, (parts, rows, outputs))
    if not _kernel_takes(x, weight, out) or not weight.is_contiguous():
        return linear_in_parts_naive(x, weight, out, plan)
    if out is None:
        out = x.new_empty(parts, rows, outputs, dtype=torch.float32)
    _launch(
        _linear_in_parts_kernel,
        (parts, _blocks(outputs, plan.outputs), _blocks(rows, plan.rows)),
        plan.warps,
        *(x, weight, out, rows, x.stride(0), out.stride(0), out.stride(1)),
        registers=128,
        INPUTS=inputs,
        OUTPUTS=outputs,
        PART=plan.inputs * plan.tiles,
        BLOCK_ROWS=plan.rows,
        BLOCK_OUT=plan.outputs,
        BLOCK_IN=plan.inputs,
        STAGES=plan.stages,
        ROWS_FIRST=plan.rows >= 64,
        INTERPRETED=_INTERPRETED,
    )
    return out


def linear_in_parts_naive(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None, plan: PartsPlan | None = None
) -> torch.Tensor:
    """Reference of `linear_in_parts`."""
    if plan is None:
        plan = parts_plan(x.shape[0], weight.shape[0], weight.shape[1], weight.element_size())
    x, weight = at_least_float32(x.to(weight.dtype)), at_least_float32(weight)
    pieces = (tensor.split(plan.inputs * plan.tiles, dim=-1) for tensor in (x, weight))
    partials = torch.stack([F.linear(*piece) for piece in zip(*pieces, strict=True)])
    return partials if out is None else out.copy_(partials)


class StepPlan(NamedTuple):
    """How `step_from_parts` is cut into programs.

    Attributes:
        rows: of a program, 16 at least, as tensor cores want.
        channels: of a program.
        ranks: columns of the step that are multiplied at a time; the first are on their way before the sums are there.
        warps: of 32 threads a program.
    """

    rows: int
    channels: int
    ranks: int
    warps: int


def step_plan(rows: int, channels: int, rank: int, item_size: int = 2) -> StepPlan:
    """The cut for a step's weight [channels, rank] of `item_size` bytes an element.

    Predicted for an H100 and mamba-2.8b, not measured: every program sums all parts of its rows, so 16 rows, and as few
    programs as keep the multiprocessors busy: 64 channels, 80 programs, for up to 16 rows, 128 channels, 160 programs, for
    64. The whole rank at a time: all of the weight is there before the sums are. Eight warps hold the parts they add without
    spilling.
    """
    if item_size > 2:  # products in float32 take registers instead of tensor cores
        return StepPlan(16, 32, min(max(_power_of_two(rank), 16), 32), 4)
    block = 128
    while block > 64 and _blocks(channels, block) * _blocks(rows, 16) < _PROCESSORS:
        block //= 2
    return StepPlan(16, block, min(max(_power_of_two(rank), 16), 256), 8)


def step_from_parts(
    partials: torch.Tensor, step_weight: torch.Tensor, out: torch.Tensor | None = None, plan: StepPlan | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_proj's partial sums summed, and dt_proj, without its bias, of the step among them; for `selective_update`.

    The sums are rounded to the weight's dtype, as is W_dt step.

    Args:
        partials: [parts, B, R + 2 N] float32, contiguous: step, B and C of `linear_in_parts`.
        step_weight: [E, R], contiguous.
        out: [B, E + 2 N], for both results side by side.
        plan: how to cut the work; None: `step_plan`'s.

    Returns:
        W_dt step [B, E], and B and C [B, 2 N]; views of `out`, in the weight's dtype.

    Raises:
        ValueError: partials have no columns besides the step's, or shapes differ.
    """
    parts, rows, width = partials.shape
    channels, rank = step_weight.shape
    shared = width - rank
    if shared < 1:
        raise ValueError(f"partials {tuple(partials.shape)} have no B and C besides a step of rank {rank}.")
    _check_shape("out", out, (rows, channels + shared))
    contiguous = partials.is_contiguous() and step_weight.is_contiguous()
    if not _kernel_takes(partials, step_weight, out) or not contiguous:
        return step_from_parts_naive(partials, step_weight, out)
    if plan is None:
        plan = step_plan(rows, channels, rank, step_weight.element_size())
    if out is None:
        out = step_weight.new_empty(rows, channels + shared)
    _launch(
        _step_from_parts_kernel,
        (_blocks(channels, plan.channels) + 1, _blocks(rows, plan.rows)),
        plan.warps,
        *(partials, step_weight, out, rows, out.stride(0)),
        CHANNELS=channels,
        RANK=rank,
        SHARED=shared,
        PARTS=parts,
        BLOCK_ROWS=plan.rows,
        BLOCK=plan.channels,
        BLOCK_RANK=plan.ranks,
        BLOCK_SHARED=min(max(_power_of_two(shared), 16), 128),
        ROWS_FIRST=plan.rows >= 64,
        INTERPRETED=_INTERPRETED,
    )
    return out[:, :channels], out[:, channels:]


def step_from_parts_naive(
    partials: torch.Tensor, step_weight: torch.Tensor, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference of `step_from_parts`."""
    channels, rank = step_weight.shape
    projected = partials.sum(0).to(step_weight.dtype)
    both = torch.cat([F.linear(projected[:, :rank], step_weight), projected[:, rank:]], dim=1)
    both = both if out is None else out.copy_(both)
    return both[:, :channels], both[:, channels:]


@jit
def _linear_in_parts_kernel(
    x,
    weight,
    partials,
    rows,
    x_stride,
    part_stride,
    row_stride,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
    INTERPRETED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    part = tl.program_id(0)
    output = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = part * PART + tl.arange(0, BLOCK_IN)
    if ROWS_FIRST:
        total = tl.zeros([BLOCK_ROWS, BLOCK_OUT], tl.float32)
    else:
        total = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    tile = _weight_tile(weight, output, column, INPUTS, INPUTS, OUTPUTS)  # on its way while the kernel before runs out
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    factor = _normed(x, None, None, row, rows, column, INPUTS, None, x_stride, 0)
    total = _product(tile, factor, total, True, ROWS_FIRST, INTERPRETED)
    for start in tl.range(BLOCK_IN, PART, BLOCK_IN, num_stages=STAGES):
        tile = _weight_tile(weight, output, column + start, INPUTS, INPUTS, OUTPUTS)
        factor = _normed(x, None, None, row, rows, column + start, INPUTS, None, x_stride, 0)
        total = _product(tile, factor, total, True, ROWS_FIRST, INTERPRETED)
    y = total if ROWS_FIRST else tl.trans(total)
    place = partials + part.to(tl.int64) * part_stride + row.to(tl.int64)[:, None] * row_stride + output[None, :]
    tl.store(place, y, mask=(row < rows)[:, None] & (output < OUTPUTS)[None, :])


@jit
def _summed_parts(partials, row, rows, column, end, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    """The sum over the parts [rows, columns]; 0 from the column `end` on."""
    total = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    here = (row < rows)[:, None] & (column < end)[None, :]
    place = partials + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    for part in tl.static_range(PARTS):
        total += tl.load(place + tl.full([], part * WIDTH, tl.int64) * rows, mask=here, other=0.0)
    return total


@jit
def _step_from_parts_kernel(
    partials,
    weight,
    out,
    rows,
    out_stride,
    CHANNELS: tl.constexpr,
    RANK: tl.constexpr,
    SHARED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_SHARED: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
    INTERPRETED: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """The last program of a block of rows rounds B and C, the others multiply."""
    WIDTH: tl.constexpr = RANK + SHARED
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rank = tl.arange(0, BLOCK_RANK)
    known = (row < rows)[:, None]
    line = out + row.to(tl.int64)[:, None] * out_stride
    dtype = weight.dtype.element_ty
    tile = _weight_tile(weight, channel, rank, RANK, RANK, CHANNELS)  # on its way while the kernel before runs out
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    if tl.program_id(0) * BLOCK >= CHANNELS:
        for start in tl.static_range(0, SHARED, BLOCK_SHARED):
            column = start + tl.arange(0, BLOCK_SHARED)
            value = _summed_parts(partials, row, rows, RANK + column, WIDTH, WIDTH, PARTS).to(dtype)
            tl.store(
                line + CHANNELS + column[None, :], value.to(out.dtype.element_ty), mask=known & (column < SHARED)[None, :]
            )
    else:
        if ROWS_FIRST:
            total = tl.zeros([BLOCK_ROWS, BLOCK], tl.float32)
        else:
            total = tl.zeros([BLOCK, BLOCK_ROWS], tl.float32)
        for start in tl.static_range(0, RANK, BLOCK_RANK):
            if start > 0:
                tile = _weight_tile(weight, channel, start + rank, RANK, RANK, CHANNELS)
            factor = _summed_parts(partials, row, rows, start + rank, RANK, WIDTH, PARTS)
            total = _product(tile, factor, total, True, ROWS_FIRST, INTERPRETED)
        y = total if ROWS_FIRST else tl.trans(total)
        y = y.to(dtype).to(out.dtype.element_ty)
        tl.store(line + channel[None, :], y, mask=known & (channel < CHANNELS)[None, :])


# Mamba's recurrence


def selective_update(
    x: torch.Tensor,
    z: torch.Tensor,
    projected: torch.Tensor,
    step: torch.Tensor,
    step_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor | None,
    state: torch.Tensor,
    active: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    plan: ChannelPlan | None = None,
) -> torch.Tensor:
    """Mamba's recurrence of one token, from its projections to the gated output; arXiv 2312.00752, Eq. 2 and 4.

        dt = softplus(step + step_bias)      h = exp(dt A) h + dt B x      y = (C h + D x) * silu(z)

    The step size is rounded as dt_proj with its bias would round it; all that follows is float32, and only y and the stored
    state are rounded.

    Args:
        x: [B, E], convolved. z: [B, E], the gate. Any row strides.
        projected: [B, 2 N], any row stride: B and C; or wider, as x_proj gives them: [B, R + 2 N], the step not read.
        step: [B, E], any row stride: W_dt step, without its bias, which is step_bias [E].
        A: [E, N] float32, contiguous, negative.
        D: [E], or None.
        state: [B, E, N], contiguous, float32 or narrower; updated in place.
        plan: how to cut the work; None: `update_plan`'s.

    Returns:
        y [B, E] in x's dtype.
    """
    rows, channels, size = state.shape
    rank = projected.shape[1] - 2 * size
    _check_shape("projected", projected, (rows, max(rank, 0) + 2 * size))
    for name, tensor in (("x", x), ("z", z), ("step", step), ("out", out)):
        _check_shape(name, tensor, (rows, channels))
    _check_shape("step_bias", step_bias, (channels,))
    _check_shape("A", A, (channels, size))
    _check_shape("D", D, (channels,))
    _check_shape("active", active, (rows,))
    contiguous = A.is_contiguous() and state.is_contiguous()
    if not _kernel_takes(x, z, projected, step, step_bias, A, D, state, active, out) or not contiguous:
        return selective_update_naive(x, z, projected, step, step_bias, A, D, state, active, out)
    if plan is None:
        plan = update_plan(channels, size)
    if out is None:
        out = x.new_empty(rows, channels)
    _launch(
        _selective_update_kernel,
        (_blocks(channels, plan.channels), rows),
        plan.warps,
        *(x, z, projected, step, step_bias, A, D, state, _as_bytes(active), out),
        *(x.stride(0), z.stride(0), projected.stride(0), step.stride(0), out.stride(0)),
        CHANNELS=channels,
        RANK=rank,
        SIZE=size,
        BLOCK=plan.channels,
        BLOCK_SIZE=_power_of_two(size),
        ROUND_STEP=step_bias.dtype != torch.float32,
    )
    return out


def update_plan(channels: int, size: int) -> ChannelPlan:
    """The cut of `selective_update`: of a float32 state 2 KB a program, 16 bytes on their way for a thread; best on an H100
    for 64 rows of mamba-2.8b, and as good as any for 16."""
    return ChannelPlan(min(max(512 // _power_of_two(size), 16), _power_of_two(channels)), 4)


def selective_update_naive(
    x: torch.Tensor,
    z: torch.Tensor,
    projected: torch.Tensor,
    step: torch.Tensor,
    step_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor | None,
    state: torch.Tensor,
    active: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reference of `selective_update`."""
    size = state.shape[-1]
    B, C = projected[:, -2 * size :].chunk(2, dim=-1)
    dt = F.softplus(at_least_float32(step + step_bias))
    u = at_least_float32(x)
    h = torch.exp(dt.unsqueeze(-1) * A) * at_least_float32(state) + (dt * u).unsqueeze(-1) * B.unsqueeze(1)
    y = (h * C.unsqueeze(1)).sum(-1)
    if D is not None:
        y = y + D * u
    y = (y * F.silu(at_least_float32(z))).to(x.dtype)
    _write_state(state, h, active)
    return y if out is None else out.copy_(y)


@jit
def _softplus(x):
    """log(1 + exp(x)), exact for small results as well: log(1 + u) = u log(w) / (w - 1) with w = 1 + u as it is rounded."""
    u = tl.exp(-tl.abs(x))
    w = 1.0 + u
    tiny = w == 1.0
    return tl.maximum(x, 0.0) + tl.where(tiny, u, tl.log(w) * (u / tl.where(tiny, 1.0, w - 1.0)))


@jit
def _step_size(step, bias, dtype: tl.constexpr, ROUND_STEP: tl.constexpr):
    """softplus(step + bias), rounded where dt_proj rounds."""
    dt = step.to(dtype).to(tl.float32) + bias
    if ROUND_STEP:
        dt = dt.to(dtype).to(tl.float32)
    return _softplus(dt)


@jit
def _selective_states(A, state, channel, CHANNELS: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Rates and states [channels, columns] of a row, where the states lie, and which there are."""
    column = tl.arange(0, BLOCK_SIZE)
    here = (channel < CHANNELS)[:, None] & (column < SIZE)[None, :]
    place = channel.to(tl.int64)[:, None] * SIZE + column[None, :]
    rate = tl.load(A + place, mask=here, other=0.0)
    return rate, tl.load(state + place, mask=here, other=0.0), state + place, here


@jit
def _selective_output(y, dt, u, gate, rate, h, shared, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """(C h + y) * silu(gate) [channels] of a row, and the new h, which is still to be stored.

    Args:
        y: D x. dt, u, gate: step size, x and gate. All [channels] in float32.
        rate, h: `_selective_states`.
        shared: B of the row, behind which C lies.
    """
    column = tl.arange(0, BLOCK_SIZE)
    # Not from this multiprocessor's own cache: a program of this very kernel may have written them.
    B = tl.load(shared + column, mask=column < SIZE, other=0.0, cache_modifier=".cg").to(tl.float32)
    C = tl.load(shared + SIZE + column, mask=column < SIZE, other=0.0, cache_modifier=".cg").to(tl.float32)
    h = tl.exp(dt[:, None] * rate) * h.to(tl.float32) + (dt * u)[:, None] * B[None, :]
    return (y + tl.sum(h * C[None, :], 1)) * _silu(gate), h


@jit
def _selective_update_kernel(
    x,
    z,
    projected,
    step,
    step_bias,
    A,
    D,
    state,
    active,
    out,
    x_stride,
    z_stride,
    projected_stride,
    step_stride,
    out_stride,
    CHANNELS: tl.constexpr,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROUND_STEP: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    known = channel < CHANNELS
    state += row * CHANNELS * SIZE

    # What the kernels before do not write comes first: on its way while they run out.
    rate, h, place, here = _selective_states(A, state, channel, CHANNELS, SIZE, BLOCK_SIZE)
    bias = tl.load(step_bias + channel, mask=known, other=0.0).to(tl.float32)
    skip = tl.zeros([BLOCK], tl.float32)
    if D is not None:
        skip += tl.load(D + channel, mask=known, other=0.0).to(tl.float32)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    written = known
    if active is not None:
        written = known & (tl.load(active + row) != 0)
    dt = tl.load(step + row * step_stride + channel, mask=known, other=0.0)
    dt = _step_size(dt, bias, step.dtype.element_ty, ROUND_STEP)
    u = tl.load(x + row * x_stride + channel, mask=known, other=0.0).to(tl.float32)
    gate = tl.load(z + row * z_stride + channel, mask=known, other=0.0).to(tl.float32)
    shared = projected + row * projected_stride + RANK
    y, h = _selective_output(skip * u, dt, u, gate, rate, h, shared, SIZE, BLOCK_SIZE)
    tl.store(out + row * out_stride + channel, y.to(out.dtype.element_ty), mask=known)
    tl.debug_barrier()  # no thread may write what another has yet to read
    tl.store(place, h.to(state.dtype.element_ty), mask=here & written[:, None])


# Mamba-2's recurrence


def dual_plan(rows: int, heads: int, channels: int, size: int) -> ChannelPlan:
    """The cut of `dual_step`, whose program has some channels of one head and one row: 32 KB of a float32 state, 256 bytes
    on their way for every thread; less where that leaves multiprocessors without two programs."""
    columns = _power_of_two(size)
    block = min(_power_of_two(channels), max(8192 // columns, 1))
    while block > 4 and rows * heads * _blocks(channels, block) < 2 * _PROCESSORS:
        block //= 2
    return ChannelPlan(block, min(max(block * columns // 2048, 1), 4))


def dual_step(
    xBC: torch.Tensor,
    step: torch.Tensor,
    step_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor | None,
    state: torch.Tensor,
    step_limits: tuple[float, float] = (0.0, float("inf")),
    active: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    plan: ChannelPlan | None = None,
) -> torch.Tensor:
    """Mamba-2's recurrence of one token, without the gate; arXiv 2405.21060, section 6.

        dt = clamp(softplus(step + step_bias))      h = exp(dt A) h + dt x B^T      y = h C + D x      for every head

    All in float32; only y and the stored state are rounded.

    Args:
        xBC: [B, E + 2 G N], convolved: x of all heads, then B and C of all groups. Any row stride.
        step: [B, nh], any row stride; step_bias: [nh].
        A: [nh] float32, negative.
        D: [nh], or None.
        state: [B, nh, P, N], contiguous, float32 or narrower; updated in place.
        step_limits: the smallest and largest dt.
        plan: how to cut the work; None: `dual_plan`'s.

    Returns:
        y [B, E] in xBC's dtype.
    """
    rows, heads, channels, size = state.shape
    groups = (xBC.shape[1] - heads * channels) // (2 * size)
    _check_shape("xBC", xBC, (rows, heads * channels + 2 * groups * size))
    if groups < 1 or heads % groups:
        raise ValueError(f"xBC {tuple(xBC.shape)} leaves {groups} groups of B and C, which must divide {heads} heads.")
    _check_shape("step", step, (rows, heads))
    for name, tensor in (("step_bias", step_bias), ("A", A), ("D", D)):
        _check_shape(name, tensor, (heads,))
    _check_shape("active", active, (rows,))
    _check_shape("out", out, (rows, heads * channels))
    if not _kernel_takes(xBC, step, step_bias, A, D, state, active, out) or not state.is_contiguous():
        return dual_step_naive(xBC, step, step_bias, A, D, state, step_limits, active, out)
    if plan is None:
        plan = dual_plan(rows, heads, channels, size)
    if out is None:
        out = xBC.new_empty(rows, heads * channels)
    _launch(
        _dual_step_kernel,
        (heads * _blocks(channels, plan.channels), rows),
        plan.warps,
        *(xBC, step, step_bias, A, D, state, _as_bytes(active), out),
        *(rows, xBC.stride(0), step.stride(0), out.stride(0), *step_limits),
        HEADS=heads,
        CHANNELS=channels,
        SIZE=size,
        GROUPS=groups,
        BLOCK=plan.channels,
        BLOCK_SIZE=_power_of_two(size),
    )
    return out


def dual_step_naive(
    xBC: torch.Tensor,
    step: torch.Tensor,
    step_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor | None,
    state: torch.Tensor,
    step_limits: tuple[float, float] = (0.0, float("inf")),
    active: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reference of `dual_step`."""
    heads, channels, size = state.shape[1:]
    inner = heads * channels
    shared = (xBC.shape[1] - inner) // 2
    x, B, C = at_least_float32(xBC).split([inner, shared, shared], dim=-1)
    x = x.unflatten(-1, (heads, channels))
    B, C = (part.unflatten(-1, (-1, size)).repeat_interleave(heads * size // shared, dim=1) for part in (B, C))
    dt = F.softplus(at_least_float32(step) + step_bias).clamp(*step_limits)
    h = torch.exp(dt * A)[..., None, None] * at_least_float32(state) + (dt[..., None] * x)[..., None] * B[:, :, None]
    y = (h * C[:, :, None]).sum(-1)
    if D is not None:
        y = y + D[:, None] * x
    y = y.flatten(1).to(xBC.dtype)
    _write_state(state, h, active)
    return y if out is None else out.copy_(y)


@jit
def _dual_channels(program, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """The channels of a program in their head, and among those of all heads."""
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    channel = program % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    return channel, program // BLOCKS * CHANNELS + channel


@jit
def _dual_places(state, program, CHANNELS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Where a program's states [channels, columns] of a row lie, and which there are."""
    channel, inner = _dual_channels(program, CHANNELS, BLOCK)
    column = tl.arange(0, BLOCK_SIZE)
    here = (channel < CHANNELS)[:, None] & (column < SIZE)[None, :]
    return state + inner.to(tl.int64)[:, None] * SIZE + column[None, :], here


@jit
def _dual_states(
    state,
    D,
    step_bias,
    A,
    program,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """What no kernel before writes: a program's states of a row; of its head D or 0, the bias of the step, and the rate."""
    place, here = _dual_places(state, program, CHANNELS, SIZE, BLOCK, BLOCK_SIZE)
    h = tl.load(place, mask=here, other=0.0)
    head = program // ((CHANNELS + BLOCK - 1) // BLOCK)
    skip = 0.0
    if D is not None:
        skip = tl.load(D + head).to(tl.float32)
    return h, skip, tl.load(step_bias + head).to(tl.float32), tl.load(A + head)


@jit
def _dual_output(
    xBC,
    step,
    state,
    h,
    skip,
    bias,
    rate,
    low,
    high,
    program,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """y [channels] of a row in float32; and, to be stored, where, the new states, and which of them there are."""
    channel, inner = _dual_channels(program, CHANNELS, BLOCK)
    head = program // ((CHANNELS + BLOCK - 1) // BLOCK)
    group = head // (HEADS // GROUPS)
    column = tl.arange(0, BLOCK_SIZE)
    dt = _softplus(tl.load(step + head).to(tl.float32) + bias)
    dt = tl.minimum(tl.maximum(dt, low), high)
    x = tl.load(xBC + inner, mask=channel < CHANNELS, other=0.0).to(tl.float32)
    shared = xBC + HEADS * CHANNELS + group * SIZE + column
    B = tl.load(shared, mask=column < SIZE, other=0.0).to(tl.float32)
    C = tl.load(shared + GROUPS * SIZE, mask=column < SIZE, other=0.0).to(tl.float32)
    h = tl.exp(dt * rate) * h.to(tl.float32) + (dt * x)[:, None] * B[None, :]
    place, here = _dual_places(state, program, CHANNELS, SIZE, BLOCK, BLOCK_SIZE)
    return tl.sum(h * C[None, :], 1) + skip * x, place, h, here


@jit
def _dual_step_kernel(
    xBC,
    step,
    step_bias,
    A,
    D,
    state,
    active,
    out,
    rows,
    x_stride,
    step_stride,
    out_stride,
    low,
    high,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    program = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    state += row * HEADS * CHANNELS * SIZE
    h, skip, bias, rate = _dual_states(state, D, step_bias, A, program, HEADS, CHANNELS, SIZE, BLOCK, BLOCK_SIZE)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    takes_part = True
    if active is not None:
        takes_part = tl.load(active + row) != 0
    y, place, h, here = _dual_output(
        xBC + row * x_stride,
        step + row * step_stride,
        state,
        h,
        skip,
        bias,
        rate,
        low,
        high,
        program,
        HEADS,
        CHANNELS,
        SIZE,
        GROUPS,
        BLOCK,
        BLOCK_SIZE,
    )
    channel, inner = _dual_channels(program, CHANNELS, BLOCK)
    tl.store(out + row * out_stride + inner, y.to(out.dtype.element_ty), mask=channel < CHANNELS)
    tl.debug_barrier()  # no thread may write what another has yet to read
    tl.store(place, h.to(state.dtype.element_ty), mask=here & takes_part)


# What they share

_INTERPRETED = triton is not None and not isinstance(_norm_linear_kernel, triton.JITFunction)
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.int8)


def _kernel_takes(*tensors: torch.Tensor | None) -> bool:
    """Whether Triton runs here, and every tensor given has a dtype that the kernels know and contiguous columns."""
    present = [tensor for tensor in tensors if tensor is not None]
    return (
        kernels_can_run(present[0].device)
        and all(tensor.device == present[0].device for tensor in present)
        and all(tensor.dtype in _KERNEL_DTYPES and (tensor.stride(-1) == 1 or tensor.shape[-1] == 1) for tensor in present)
        and present[0].numel() > 0
    )


def _launch(
    kernel: Any, grid: tuple[int, ...], warps: int, *arguments: Any, registers: int | None = None, **constants: Any
) -> None:
    """`registers`: of a thread at most. Left to itself, the assembler may take so few that loads wait for each other."""
    device = arguments[0].device
    options: dict[str, Any] = {"launch_pdl": True} if _dependent else {}
    if registers is not None and torch.version.cuda is not None:
        options["maxnreg"] = registers
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **constants, DEPENDENT=_dependent, num_warps=warps, **options)


def _check_shape(name: str, tensor: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, expected {shape}.")


def _check_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: torch.Tensor,
    active: torch.Tensor | None,
    out: torch.Tensor | None,
) -> None:
    rows, channels, width = state.shape
    _check_shape("x", x, (rows, channels))
    _check_shape("weight", weight, (channels, width))
    _check_shape("bias", bias, (channels,))
    _check_shape("active", active, (rows,))
    _check_shape("out", out, (rows, channels))


def _write_state(state: torch.Tensor, new: torch.Tensor, active: torch.Tensor | None) -> None:
    if active is not None:
        new = torch.where(active.bool().view(-1, *[1] * (state.dim() - 1)), new.to(state.dtype), state)
    state.copy_(new)


def _as_bytes(active: torch.Tensor | None) -> torch.Tensor | None:
    return active.view(torch.int8) if active is not None and active.dtype == torch.bool else active


def _row_stride(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _blocks(count: int, block: int) -> int:
    return -(-count // block)


def _power_of_two(count: int) -> int:
    """The smallest that is not below `count`."""
    return 1 << max(count - 1, 0).bit_length()
