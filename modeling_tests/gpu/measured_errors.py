# SPDX-License-Identifier: Apache-2.0
"""Errors that the GPU tests measure: RMS ratios, rms(x - reference) / rms(reference), checked and kept for the report."""

from collections.abc import Sequence

import torch

# Of the test that runs, by what was measured; conftest.py hands them on.
errors: dict[str, float] = {}


def rms_ratio(value: torch.Tensor, reference: torch.Tensor) -> float:
    """In float64; the plain rms of `value` where the reference is nothing but zeros."""
    value, reference = value.detach().double().cpu(), reference.detach().double().cpu()
    return (value - reference).square().mean().sqrt().item() / (reference.square().mean().sqrt().item() or 1.0)


def note(name: str, value: torch.Tensor, reference: torch.Tensor, allowed: float) -> None:
    assert torch.isfinite(value).all(), name
    error = rms_ratio(value, reference)
    errors[name] = max(error, errors.get(name, 0.0))
    assert error <= allowed, f"{name}: RMS ratio {error:.1e}, allowed {allowed:.1e}"


def note_all(
    prefix: str, names: Sequence[str], values: Sequence[torch.Tensor], references: Sequence[torch.Tensor], allowed: float
) -> None:
    """`note` for each name, all of them before any failure is told."""
    failures = []
    for name, value, reference in zip(names, values, references, strict=True):
        try:
            note(f"{prefix}, {name}", value, reference, allowed)
        except AssertionError as failure:
            failures.append(str(failure))
    assert not failures, "\n".join(failures)
