# SPDX-License-Identifier: Apache-2.0
"""Which compiled CUDA kernels can be used, and if not, why not.

Both kernel packages are optional. A Python import proves nothing about them: recent mamba-ssm builds leave the compiled
selective scan out, and a wheel built for another CUDA or PyTorch fails only when its extension is loaded. So the
extension itself is imported, once, when the first CUDA tensor asks for it: importing this package stays fast, and a CPU
forward never touches these packages.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch


class Kernel(NamedTuple):
    """One optional function: the compiled extension it needs, the module and attribute it lives in, its package."""

    extension: str
    module: str
    attribute: str
    package: str


KERNELS = {
    "selective_scan": Kernel(
        "selective_scan_cuda", "mamba_ssm.ops.selective_scan_interface", "selective_scan_fn", "mamba-ssm"
    ),
    "selective_scan_step": Kernel(
        "triton", "mamba_ssm.ops.triton.selective_state_update", "selective_state_update", "mamba-ssm"
    ),
    "state_space_dual": Kernel("triton", "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", "mamba-ssm"),
    "causal_convolution": Kernel("causal_conv1d_cuda", "causal_conv1d", "causal_conv1d_fn", "causal-conv1d"),
    "causal_convolution_step": Kernel("causal_conv1d_cuda", "causal_conv1d", "causal_conv1d_update", "causal-conv1d"),
}

_disabled = False


@functools.cache
def load_kernel(name: str) -> tuple[Callable[..., Any] | None, str]:
    """Import one kernel of `KERNELS`.

    Returns:
        The function and an empty string, or None and the reason why it cannot be used.
    """
    kernel = KERNELS[name]
    try:
        importlib.import_module(kernel.extension)
        return getattr(importlib.import_module(kernel.module), kernel.attribute), ""
    except Exception as error:  # a broken wheel raises OSError, RuntimeError, AttributeError, not only ImportError
        return None, f"{type(error).__name__}: {error}"


def usable_kernel(name: str, *tensors: torch.Tensor | None) -> Callable[..., Any] | None:
    """The kernel `name` if every tensor given is on one CUDA device and the compiled function imports, else None."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if _disabled or len(devices) != 1 or next(iter(devices)).type != "cuda":
        return None
    return load_kernel(name)[0]


def kernels_enabled() -> bool:
    """False inside `without_kernels`."""
    return not _disabled


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Run everything inside through the torch paths, on any device (for comparisons and for debugging)."""
    global _disabled
    previous, _disabled = _disabled, True
    try:
        yield
    finally:
        _disabled = previous
