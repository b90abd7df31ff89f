# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel is compiled for an H100, which needs none: the interpreter takes Python that the compiler refuses."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from modeling_tests.modeling.test_note_kernels import Case, Sizes
from modeling_tests.modeling.tiny_models import tiny_model
from modeling_tests.modeling.tritons_interpreter import INTERPRETED
from remamba_hf.modeling import convolution_kernels, decode_kernels, note_kernels, scan_gradients, scan_kernels, tail_kernels

triton = pytest.importorskip("triton")
compiler = pytest.importorskip("triton.compiler")
targets = pytest.importorskip("triton.backends.compiler")

pytestmark = pytest.mark.skipif(INTERPRETED, reason="nothing of it is interpreted")
CPU = torch.device("cpu")
MODULES: tuple[ModuleType, ...] = (
    *(convolution_kernels, decode_kernels, note_kernels),
    *(scan_gradients, scan_kernels, tail_kernels),
)
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8"}


class Compiling:
    """Stands in for `_launch`: compiles a kernel for what it is given, once, instead of running it."""

    def __init__(self, dependent: bool):
        self.dependent = dependent
        self.compiled: dict[Any, Any] = {}

    def __call__(
        self, kernel: Any, grid: Any, warps: int, *arguments: Any, registers: int | None = None, **constants: Any
    ) -> None:
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | constants | {"DEPENDENT": self.dependent}
        signature, values, facts = {}, {}, {}
        for place, parameter in enumerate(kernel.params):
            value = given[parameter.name]
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[parameter.name], values[(place,)] = "constexpr", value
                continue
            signature[parameter.name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
            if isinstance(value, float):
                signature[parameter.name] = "fp32"
            elif isinstance(value, torch.Tensor) or value % 16 == 0:
                facts[(place,)] = [["tt.divisibility", 16]]
        key = kernel.fn.__name__, warps, registers, str(signature), str(values)
        if key not in self.compiled:
            options = {"num_warps": warps, "launch_pdl": self.dependent, **({"maxnreg": registers} if registers else {})}
            source = compiler.ASTSource(kernel, signature, values, facts)
            target = targets.GPUTarget("cuda", 90, 32)
            self.compiled[key] = triton.compile(source, target=target, options=options).metadata


def scans() -> None:
    x, z, dt, y = (torch.ones(2, 40, 64, dtype=torch.bfloat16) for _ in range(4))
    B, C = (torch.ones(2, 40, 16, dtype=torch.bfloat16) for _ in range(2))
    A, D, bias, state = -torch.ones(64, 16), torch.ones(64), torch.ones(64), torch.ones(2, 64, 16)
    shift = torch.arange(5), torch.ones(64)
    lengths = torch.full((2,), 40)
    scan_kernels.scan_forward(x, dt, A, B, C, D, z, state, bias, True, lengths, shift, scan_kernels.ScanPlan(16, 16, 2, 2))
    scan_gradients.scan_backward(y, state, x, dt, A, B, C, D, z, state, bias, True, lengths, shift)
    convolution_kernels.convolve_forward(x, torch.ones(64, 4, dtype=torch.bfloat16), torch.ones(64, dtype=torch.bfloat16))


def steps(family: str) -> None:
    model = tiny_model(torch.bfloat16, family=family)
    for rows in (1, 3):
        with torch.no_grad():
            cache = model(torch.ones(rows, 5, dtype=torch.long), use_cache=True).cache_params
            hidden_states = torch.ones(rows, model.config.hidden_size)
            for block, layer in zip(model.backbone.layers, cache.layers, strict=True):
                states = layer.conv_states[0], layer.recurrent_states[0]
                counters = tail_kernels.new_counters(rows, CPU)
                block.mixer.fused_step(hidden_states, block.norm, *states, block.mixer.decay_rates(), counters, True)


def notes() -> None:
    for rows in (1, 20):
        case = Case(CPU, torch.bfloat16, Sizes(rows, 64, 16, 4, 10, 8), readers=2, below=20)
        note_kernels.note_step(case.hidden, case.weights, case.notes, case.opened, case.read)


@pytest.mark.parametrize("dependent", [True, False])
@pytest.mark.parametrize(
    ("what", "kernels"),
    [
        (scans, {"_scan_kernel", "_backward_kernel", "_convolution_kernel"}),
        (
            lambda: steps("remamba"),
            {
                "_norm_linear_kernel",
                "_norm_kernel",
                "_selective_tail_kernel",
                "_convolution_kernel",
                "_linear_in_parts_kernel",
                "_step_from_parts_kernel",
                "_selective_update_kernel",
            },
        ),
        (
            lambda: steps("remamba2"),
            {"_norm_linear_kernel", "_dual_tail_kernel", "_convolution_kernel", "_dual_step_kernel"},
        ),
        (notes, {"_note_projections_kernel", "_note_reading_kernel"}),
    ],
    ids=["scans", "steps of Mamba", "steps of Mamba-2", "notes"],
)
def test_kernels_compile(monkeypatch, what: Callable[[], None], kernels: set[str], dependent: bool):
    if dependent and decode_kernels.gdc_wait is None:
        pytest.skip("this Triton has no dependent launches")
    launch = Compiling(dependent)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for module in MODULES:
        monkeypatch.setattr(module, "_launch", launch)
        if hasattr(module, "kernels_can_run"):
            monkeypatch.setattr(module, "kernels_can_run", lambda device: True)
    what()
    assert kernels <= {name for name, *_ in launch.compiled}
