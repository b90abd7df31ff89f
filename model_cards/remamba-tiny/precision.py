# SPDX-License-Identifier: Apache-2.0
"""What operators and models share: the dtype of recurrences, norms and step sizes, float32, or float64 for a float64 model;
what is added to step sizes; how what the host knows gets to a device."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def state_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype a scan over x computes and keeps its state in: float64 stays, everything else is float32."""
    return torch.promote_types(x.dtype, torch.float32)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """x in float32, or in float64 if it is."""
    return x.to(state_dtype(x))


def without_autocast(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Autocast turned off for x's device, so that what is in float32 stays so."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def with_shift(dt: torch.Tensor, shift: tuple[torch.Tensor, torch.Tensor] | None, rounded: bool = False) -> torch.Tensor:
    """Step sizes dt [B, L, E] with a shift (where [n], added [E]): of some tokens, different flat positions among the B L,
    what is added to them; None: of none. The sums are in float32 at least, as is the result unless it is `rounded` to dt's
    dtype."""
    if shift is None:
        return dt
    where, added = shift
    dt = dt if rounded else at_least_float32(dt)
    flat = dt.flatten(0, 1)
    shifted = at_least_float32(flat[where]) + added
    return flat.index_copy(0, where, shifted.to(dt.dtype)).view_as(dt)


def is_plain_weight(weight: torch.Tensor) -> bool:
    """Whether a parameter is the numbers that a layer multiplies with. Quantised weights, of which some claim the dtype of
    what they stand for, and shares of sharded ones are of classes of their own."""
    return type(weight) is torch.nn.Parameter


def sent(values: Any, device: torch.device) -> torch.Tensor:
    """Values of the host, a tensor or lists of numbers, on a device, without waiting for what that still has to do."""
    tensor = torch.as_tensor(values)
    if device.type == "cuda" and tensor.device.type == "cpu" and not torch.compiler.is_compiling():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
