# SPDX-License-Identifier: Apache-2.0
"""The scan's own backward kernel, compiled, against autograd through float64, and beside mamba-ssm's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from modeling_tests.gpu.measured_errors import note, note_all, rms_ratio
from modeling_tests.modeling.test_decode_kernels import CAPS
from modeling_tests.modeling.test_scan_gradients import (
    check_autograd,
    check_extreme_steps,
    check_gradients,
    leaves_of,
    probes_of,
)
from modeling_tests.modeling.test_scan_kernels import scan_arguments
from modeling_tests.modeling.tiny_models import tiny_memmamba, tiny_model
from remamba_hf.modeling import scan_gradients as module
from remamba_hf.modeling import selective_scan as dispatch
from remamba_hf.modeling.decode_kernels import kernels_can_run
from remamba_hf.modeling.optional_kernels import load_kernel, without_kernels
from remamba_hf.modeling.scan_gradients import GradientPlan, gradient_plan, scan_backward, scan_with_gradients
from remamba_hf.modeling.scan_kernels import scan_plan
from remamba_hf.modeling.selective_scan import selective_scan

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _triton() -> None:
    if not kernels_can_run(CUDA):
        pytest.skip("no Triton, or a card from before compute capability 8.0")


def check(arguments: dict[str, Any], plan: GradientPlan | None = None, final: bool = True) -> None:
    check_gradients(arguments, plan, final, noted(arguments["x"].dtype), cap=2e-5)


def noted(dtype: torch.dtype) -> Callable[..., None]:
    return lambda name, *others: note(f"own {name}, {dtype}", *others)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 1),
        (3, 2, 5, 3),
        (2, 15, 33, 5),
        (2, 16, 40, 16),
        (5, 17, 100, 8),
        (3, 333, 257, 16),
        (2, 65, 96, 64),
        (1, 70, 24, 128),
        (1, 40, 19, 256),
        (70, 9, 64, 4),
    ],
    ids=str,
)
def test_any_sizes(sizes, dtype):
    rows, length = sizes[:2]
    lengths = tuple((length - row * 7) % (length + 1) for row in range(rows))
    check(scan_arguments(CUDA, dtype, sizes, lengths=lengths, shift=True))
    check(scan_arguments(CUDA, dtype, sizes, state=False, dt_dtype=torch.float32), final=False)


@pytest.mark.parametrize("missing", ["skip", "gate", "state", "bias"])
def test_optional_arguments(missing):
    for dtype in DTYPES:
        check(scan_arguments(CUDA, dtype, (2, 50, 70, 16), **{missing: False}), final=missing != "state")


@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
@pytest.mark.parametrize("channels", [8, 16, 32, 64])
def test_however_it_is_cut(channels, tokens):
    arguments = scan_arguments(CUDA, torch.bfloat16, (2, 100, 300, 16), lengths=(100, 37), shift=True)
    for warps in (1, 2, 4, 8):
        if 2 * warps <= channels and tokens * channels <= 128 * warps:
            check(arguments, GradientPlan(tokens, channels, warps))


def full_size(rows: int, length: int, channels: int, dtype: torch.dtype, **options: Any) -> dict[str, Any]:
    """As a model's: rates -1 ... -16, and steps from a thousandth to a tenth at most tokens."""
    arguments = scan_arguments(CUDA, dtype, (rows, length, channels, 16), state=False, **options)
    arguments["A"] = -torch.arange(1, 17, device=CUDA, dtype=torch.float32).repeat(channels, 1)
    arguments["dt_bias"] -= 3.0
    return arguments


def some_channels(arguments: dict[str, Any], some: slice) -> dict[str, Any]:
    """The scans of some channels, which depend on no others."""
    cut = dict(arguments)
    for name in ("x", "dt", "z", "A", "D", "dt_bias"):
        cut[name] = arguments[name][some] if name == "A" else arguments[name][..., some]
    if arguments["shift"] is not None:
        cut["shift"] = (arguments["shift"][0], arguments["shift"][1][some])
    return cut


@pytest.mark.parametrize(
    ("rows", "length", "channels"), [(2, 1694, 1536), (2, 1984, 1536), (2, 2048, 1536), (1, 6144, 5120)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_models(rows, length, channels, dtype):
    """What channels do not share, of the last ones: against the kernel itself on these alone, which `check` holds against
    float64. All that is shared: no worse than twice plain torch."""
    lengths = tuple(length - row * 300 for row in range(rows))
    arguments = full_size(rows, length, channels, dtype, lengths=lengths, shift=True)
    some = slice(channels - 32, channels)  # whole programs, which then compute the same
    starts_plan = scan_plan(rows, length, channels, 16)
    few = some_channels(arguments, some)
    check(few)
    dy, dfinal = probes_of(arguments, True)
    found = scan_backward(dy, dfinal, **arguments, starts_plan=starts_plan)
    alone = scan_backward(dy[..., some], dfinal[:, some], **few, starts_plan=starts_plan)
    for name in ("x", "dt", "z", "A", "D", "dt_bias", "shift"):
        all_channels, wanted = getattr(found, name), getattr(alone, name)
        part = all_channels[some] if name == "A" else all_channels[..., some]
        note(f"own scan, d{name} of some channels of many", part, wanted, 1e-6)
    expected = [0.0, 0.0]
    for first in range(0, channels, 512):
        part = slice(first, first + 512)
        own = scan_backward(dy[..., part], dfinal[:, part], **some_channels(arguments, part))
        expected = [total + gradient.double() for total, gradient in zip(expected, (own.B, own.C), strict=True)]
    for name, gradient, wanted in zip("BC", (found.B, found.C), expected, strict=True):
        note(f"own scan, d{name} of many channels", gradient, wanted, 2e-6)


@pytest.mark.parametrize("workspace", [1 << 20, 1 << 21])  # some channels of a row, one row
def test_slices_change_nothing(workspace, monkeypatch):
    arguments = full_size(3, 500, 300, torch.bfloat16, lengths=(500, 70, 499), shift=True)
    dy, dfinal = probes_of(arguments, True)
    whole = scan_backward(dy, dfinal, **arguments)
    monkeypatch.setattr(module, "_WORKSPACE", workspace)
    assert len(list(module._slices(3, 500, 300, 16, gradient_plan(16)))) > 1
    for name, gradient, wanted in zip(whole._fields, scan_backward(dy, dfinal, **arguments), whole, strict=True):
        if wanted is not None:
            note(f"own scan in slices, d{name}", gradient, wanted, 1e-6)


def test_results_do_not_change_from_run_to_run():
    arguments = full_size(2, 1000, 1536, torch.bfloat16, lengths=(1000, 700), shift=True)
    dy, dfinal = probes_of(arguments, True)
    first = scan_backward(dy, dfinal, **arguments)
    for _ in range(20):
        again = scan_backward(dy, dfinal, **arguments)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_extreme_steps():
    check_extreme_steps(CUDA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_through_autograd(dtype):
    check_autograd(CUDA, dtype, (2, 50, 40, 16), cap=2e-5)


def test_beside_mamba_ssm():
    """On what both can do, in bfloat16: each gradient's error is at most 1.2 times that of mamba-ssm's."""
    if load_kernel("selective_scan")[0] is None:
        pytest.skip("no mamba-ssm")
    arguments = full_size(2, 2048, 64, torch.bfloat16)
    dy, _ = probes_of(arguments, False)

    def gradients(scan: Callable, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        given, leaves = leaves_of(arguments, dtype)
        y = scan(**given)[0]
        return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype)), strict=True))

    def of_mamba_ssm(x, dt, A, B, C, D, z, dt_bias, **others):
        kernel = load_kernel("selective_scan")[0]
        return dispatch._scan_cuda(kernel, x, dt, A, B, C, D, z, None, False, dt_bias, True)

    exact = gradients(dispatch.selective_scan_naive, torch.float64)
    own, theirs = gradients(scan_with_gradients), gradients(of_mamba_ssm)
    allowed = [max(1.2 * rms_ratio(theirs[name], exact[name]), 1e-5) for name in exact]
    for name, cap in zip(exact, allowed, strict=True):
        note_all("own scan beside mamba-ssm's", [f"d{name}"], [own[name]], [exact[name]], cap)


@pytest.mark.parametrize("family", ["remamba", "memmamba"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_whole_model(family, autocast, checkpointing, monkeypatch):
    """Its gradients with kernels beside those of plain torch, against plain torch in float32; the own kernel made them."""
    calls = []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return scan_with_gradients(*arguments)

    monkeypatch.setattr(dispatch, "scan_with_gradients", counted)
    make = tiny_memmamba if family == "memmamba" else tiny_model
    model = make(torch.float32).to(CUDA).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.randint(0, model.config.vocab_size, (3, 60), generator=torch.Generator().manual_seed(0)).to(CUDA)
    mask = (torch.arange(60) < torch.tensor([60, 41, 50])[:, None]).long().to(CUDA)
    labels = ids.masked_fill((mask == 0) | (torch.arange(60, device=CUDA) < 40), -100)

    def gradients(autocast: bool) -> dict[str, torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}

    found = gradients(autocast)
    assert calls
    with without_kernels():
        plain, expected = gradients(autocast), gradients(False)
    assert found.keys() == plain.keys() == expected.keys()

    for name, wanted in expected.items():
        allowed = max(2 * rms_ratio(plain[name], wanted), 0.1) if autocast else 1e-3
        note(f"model through the own scan, autocast {autocast}", found[name], wanted, allowed)


def test_the_second_device_while_the_first_is_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    check(scan_arguments(torch.device("cuda:1"), torch.bfloat16, (2, 40, 70, 16)))


def test_tokens_far_apart():
    """What is read lies more than 2^31 elements behind the first."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 6 GB of free memory on the device")
    arguments = scan_arguments(CUDA, torch.bfloat16, (1, 2200, 24, 16))
    wide = torch.empty(2200, 1 << 20, device=CUDA, dtype=torch.bfloat16)
    for key, at in {"x": 0, "dt": 64, "z": 128, "B": 192, "C": 256}.items():
        arguments[key] = wide[None, :, at : at + arguments[key].shape[-1]].copy_(arguments[key])
    check(arguments)


def test_gradients_go_through_the_own_kernel(monkeypatch):
    calls, own = [], dispatch.scan_with_gradients
    monkeypatch.setattr(dispatch, "scan_with_gradients", lambda *given: calls.append(given) or own(*given))
    arguments = scan_arguments(CUDA, torch.bfloat16, (1, 5, 8, 4))
    given, _ = leaves_of(arguments)
    y, _ = selective_scan(**given)
    assert y.grad_fn is not None
    assert calls
    assert CAPS[y.dtype] >= rms_ratio(y, dispatch.selective_scan_naive(**arguments)[0])
