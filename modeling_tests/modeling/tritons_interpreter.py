# SPDX-License-Identifier: Apache-2.0
"""Tests of kernels without a GPU: pytest once more, in a process of its own in which Triton interprets every kernel.

The interpreter runs programs one after the other, each of their operations in NumPy. What it does besides takes most of its
time, so in such a process `hasten` leaves that away; results are the same, bit for bit.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remamba_hf.modeling.optional_kernels import without_kernels

ROOT = Path(__file__).parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def run_in_interpreter(file: str, *options: str) -> None:
    """Run a test file, with further `options` of pytest's, where its environment variable makes Triton interpret.

    The variable acts when triton is imported, on every kernel of the process.
    """
    if INTERPRETED:
        pytest.skip("this is the interpreter's process")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--durations=5", *options, file],
        cwd=ROOT,
        env={**environment, "TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def kernels_only_on_gpus() -> contextlib.AbstractContextManager[None]:
    """For what is not tested but stands around it, prompts above all: there the interpreter would take most of the time."""
    return without_kernels() if INTERPRETED else contextlib.nullcontext()


def scan_by_slices(scan: Any, inputs: Any) -> list[Any]:
    """`ScanOps.generic_scan`, which goes through elements one by one, for a slice across the scan's axis at a time."""
    sequences = [np.moveaxis(one.handle.data, scan.axis, 0) for one in inputs]
    results = [sequence.copy() for sequence in sequences]
    for at in range(1, len(sequences[0])):
        before = (scan.to_tensor(result[at - 1], one.dtype) for result, one in zip(results, inputs, strict=True))
        now = (scan.to_tensor(sequence[at], one.dtype) for sequence, one in zip(sequences, inputs, strict=True))
        combined = scan.combine_fn.fn(*before, *now)
        for result, one in zip(results, combined if isinstance(combined, tuple) else (combined,), strict=True):
            result[at] = one.handle.data.reshape(result[at].shape)
    return [
        scan.to_tensor(np.moveaxis(result, 0, scan.axis), one.dtype) for result, one in zip(results, inputs, strict=True)
    ]


class _Patches:
    """`_patch_lang`, which puts the interpreter's functions in place of the language's: once a launch for all functions that
    the kernel calls, instead of at every call."""

    def __init__(self, patch: Any, language: Any):
        self.patch = patch
        self.modules = (language, language.core)
        self.done: set[tuple[bool, ...]] = set()
        self.of_launch: Any = None

    def __call__(self, function: Any) -> Any:
        known = tuple(any(value is module for value in function.__globals__.values()) for module in self.modules)
        if known in self.done:
            return self
        scope = self.patch(function)
        if not self.done:  # the kernel itself; Triton leaves what its functions add to this
            self.of_launch = scope
        self.done.add(known)
        return self

    def restore(self) -> None:
        self.done.clear()
        self.of_launch.restore()


def hasten() -> None:
    """Change the interpreter of Triton 3.6, whose inside this knows; another one stays as slow as it is."""
    import triton
    from triton import language
    from triton.runtime import interpreter

    if not triton.__version__.startswith("3.6."):
        return
    interpreter.ScanOps.scan_by_elements = interpreter.ScanOps.generic_scan
    interpreter.ScanOps.generic_scan = scan_by_slices
    interpreter._patch_lang = _Patches(interpreter._patch_lang, language)
    # Comparisons of every sum of integers, whose results only `debug` would have looked at.
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)


if INTERPRETED and importlib.util.find_spec("triton") is not None:
    hasten()
