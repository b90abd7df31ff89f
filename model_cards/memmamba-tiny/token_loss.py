# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Cross-entropy of logits as they are: read in their own dtype, computed in float32, without a copy in float32.

Between the passes nothing is kept but the logits and two numbers a row. The numbers are those of float32 copies: the logits
are exact in float32, and autograd rounds their gradient to their dtype as well.

Shapes: `T` tokens, `V` vocabulary.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F

from .decode_kernels import _power_of_two, jit, kernels_can_run, tl
from .optional_kernels import kernels_enabled
from .precision import at_least_float32

_WARPS = 8  # a row: of 32 threads, each with at most 32 logits of a block in registers
_LARGEST_BLOCK = 8192


def token_loss(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Sum over the tokens of -log softmax(logits)[label].

    In two Triton kernels where `loss_kernels_run`, which have no second derivative; elsewhere `token_loss_naive`. The
    logits must not be changed in place before the backward pass.

    Args:
        logits: [T, V].
        labels: [T] int64, below V; tokens labelled `ignore_index` count for nothing.

    Returns:
        Scalar in float32; in float64 for such logits.

    Raises:
        ValueError: shapes that do not fit.
        IndexError: a label outside of the vocabulary; on CUDA a device-side assertion fails, as in PyTorch's own loss.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"Logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit: give [tokens, vocabulary] and "
            "one label a token."
        )
    if labels.dtype != torch.int64 or labels.device != logits.device or not loss_kernels_run(logits):
        return token_loss_naive(logits, labels, ignore_index)
    return _TokenLoss.apply(logits, labels.contiguous(), ignore_index)


def token_loss_naive(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Reference of `token_loss`."""
    return F.cross_entropy(at_least_float32(logits), labels, ignore_index=ignore_index, reduction="sum")


def loss_kernels_run(logits: torch.Tensor) -> bool:
    """Whether `token_loss` of these logits [..., V] runs its kernels."""
    return (
        kernels_enabled()
        and not torch.compiler.is_compiling()
        and type(logits) is torch.Tensor  # a shard of the vocabulary knows nothing of the others
        and logits.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and logits.numel() > 0
        and logits.stride(-1) == 1
        and kernels_can_run(logits.device)
    )


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
        # Of each row the largest logit, and the logarithm of the sum of exponentials relative to it. Apart they keep the
        # digits that their sum would lose for large logits.
        tops, log_sums = torch.empty(2, len(labels), dtype=torch.float32, device=logits.device)
        _launch(_log_sum_kernel, logits, labels, tops, log_sums, ignore_index=ignore_index)
        ignored = labels == ignore_index
        # torch gathers, for it notices labels outside of the vocabulary.
        chosen = logits.gather(1, labels.masked_fill(ignored, 0)[:, None])[:, 0].float()
        ctx.save_for_backward(logits, labels, tops, log_sums)
        ctx.ignore_index = ignore_index
        return (log_sums - (chosen - tops)).masked_fill(ignored, 0.0).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, labels, tops, log_sums = ctx.saved_tensors
        # Not in place of the logits: they are part of the model's output.
        gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        _launch(_gradient_kernel, logits, labels, tops, log_sums, scale, gradient, ignore_index=ctx.ignore_index)
        return gradient, None, None


def _launch(kernel: Any, logits: torch.Tensor, *others: torch.Tensor, ignore_index: int) -> None:
    """A program for each row of `logits`."""
    tokens, vocabulary = logits.shape
    stride = logits.stride(0)
    with torch.cuda.device(logits.device) if logits.device.type == "cuda" else contextlib.nullcontext():
        kernel[(tokens,)](
            *(logits, *others, stride),
            IGNORED=ignore_index,
            VOCABULARY=vocabulary,
            BLOCK=min(_power_of_two(vocabulary), _LARGEST_BLOCK),
            # Triton knows whether an integer is divisible by 16 only, and rows of 50,280 are aligned for the widest loads.
            DIVISOR=min(stride & -stride, 16) or 16,
            num_warps=_WARPS,
        )


@jit
def _log_sum_kernel(
    logits,
    labels,
    tops,
    log_sums,
    stride,
    IGNORED: tl.constexpr,
    VOCABULARY: tl.constexpr,
    BLOCK: tl.constexpr,
    DIVISOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if tl.load(labels + row) != IGNORED:
        of_row = logits + tl.multiple_of(row * stride, DIVISOR)
        top = tl.full([], float("-inf"), tl.float32)
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, VOCABULARY, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(of_row + column, mask=column < VOCABULARY, other=float("-inf")).to(tl.float32)
            new_top = tl.maximum(top, tl.max(x, 0))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)  # -inf - -inf would be NaN
            sums = sums * tl.exp(top - base) + tl.exp(x - base)
            top = new_top
        tl.store(tops + row, top)
        tl.store(log_sums + row, tl.log(tl.sum(sums, 0)))


@jit
def _gradient_kernel(
    logits,
    labels,
    tops,
    log_sums,
    scale,
    gradient,
    stride,
    IGNORED: tl.constexpr,
    VOCABULARY: tl.constexpr,
    BLOCK: tl.constexpr,
    DIVISOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    to_row = gradient + row * VOCABULARY
    if label == IGNORED:
        for start in range(0, VOCABULARY, BLOCK):
            column = start + tl.arange(0, BLOCK)
            zeros = tl.zeros([BLOCK], tl.float32).to(gradient.dtype.element_ty)
            tl.store(to_row + column, zeros, mask=column < VOCABULARY)
    else:
        of_row = logits + tl.multiple_of(row * stride, DIVISOR)
        top = tl.load(tops + row)
        log_sum = tl.load(log_sums + row)
        factor = tl.load(scale).to(tl.float32)
        for start in range(0, VOCABULARY, BLOCK):
            column = start + tl.arange(0, BLOCK)
            here = column < VOCABULARY
            x = tl.load(of_row + column, mask=here, other=0.0).to(tl.float32)
            probability = tl.exp((x - top) - log_sum)
            value = tl.where(column == label, probability - 1.0, probability) * factor
            tl.store(to_row + column, value.to(gradient.dtype.element_ty), mask=here)
