# SPDX-License-Identifier: Apache-2.0
"""The scan's own kernel, compiled, against the loop in float64, and mamba-ssm's kernel where it adds bias, softplus and pads
itself, with its gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from modeling_tests.gpu.measured_errors import note, note_all, rms_ratio
from modeling_tests.modeling.test_decode_kernels import CAPS
from modeling_tests.modeling.test_scan_kernels import check_scan, check_small_and_large_steps, scan_arguments
from modeling_tests.modeling.test_selective_scan import RAW_NAMES
from remamba_hf.modeling import selective_scan as module
from remamba_hf.modeling.decode_kernels import kernels_can_run
from remamba_hf.modeling.optional_kernels import load_kernel, without_kernels
from remamba_hf.modeling.scan_kernels import ScanPlan, scan_forward, scan_plan
from remamba_hf.modeling.selective_scan import selective_scan, selective_scan_naive

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _triton() -> None:
    if not kernels_can_run(CUDA):
        pytest.skip("no Triton, or a card from before compute capability 8.0")


def check(arguments: dict[str, Any], plan: ScanPlan | None = None) -> None:
    check_scan(arguments, plan, noted(arguments["x"].dtype), state_cap=1e-5)


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
    check(scan_arguments(CUDA, dtype, sizes, lengths=lengths))
    check(scan_arguments(CUDA, dtype, sizes, state=False, dt_dtype=torch.float32))


@pytest.mark.parametrize("missing", ["skip", "gate", "state", "bias"])
def test_optional_arguments(missing):
    for dtype in DTYPES:
        check(scan_arguments(CUDA, dtype, (2, 50, 70, 16), **{missing: False}))


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize(("rows", "channels"), [(1, 5120), (4, 5120), (1, 1536), (2, 1536)])
def test_large_models(rows, channels, parts):
    arguments = scan_arguments(CUDA, torch.bfloat16, (rows, 6144, channels, 16), state=rows > 1)
    check(arguments, scan_plan(1, 6144, 5120, 16)._replace(parts=parts))


@pytest.mark.parametrize("tokens", [4, 8, 16, 32])
@pytest.mark.parametrize("channels", [4, 8, 16, 32, 64])
def test_however_it_is_cut(channels, tokens):
    for warps in (1, 2, 4, 8):
        if 2 * warps <= channels and tokens * channels <= 256 * warps:
            arguments = scan_arguments(CUDA, torch.bfloat16, (2, 100, 300, 16), lengths=(100, 37))
            for parts in (1, 2, 3, 4):
                check(arguments, ScanPlan(tokens, channels, warps, parts))


@pytest.mark.parametrize("size", [1, 5, 16, 64, 256])
def test_parts_of_the_length(size):
    for length, lengths in ((1, (1, 0)), (16, (16, 3)), (17, (17, 16)), (70, (70, 21)), (333, (100, 333))):
        for dtype in DTYPES:
            arguments = scan_arguments(CUDA, dtype, (2, length, 40, size), lengths=lengths)
            for parts in (2, 3, 4, 7):
                check(arguments, scan_plan(1, 6144, 5120, size)._replace(parts=parts))


@pytest.mark.parametrize("parts", [1, 4])
def test_steps_of_some_tokens_are_shifted(parts):
    plan = scan_plan(1, 6144, 5120, 16)._replace(parts=parts)
    for dtype in DTYPES:
        check(scan_arguments(CUDA, dtype, (2, 333, 70, 16), lengths=(333, 100), shift=True), plan)
        check(scan_arguments(CUDA, dtype, (2, 333, 70, 16), bias=False, shift=True), plan)


def test_small_and_large_steps():
    check_small_and_large_steps(CUDA)


@pytest.mark.parametrize("parts", [1, 4])
def test_results_do_not_change_from_run_to_run(parts):
    arguments = scan_arguments(CUDA, torch.bfloat16, (2, 1000, 1536, 16), lengths=(1000, 700))
    plan = scan_plan(1, 6144, 5120, 16)._replace(parts=parts)
    first = scan_forward(**arguments, plan=plan)
    for _ in range(20):
        assert all(torch.equal(*pair) for pair in zip(scan_forward(**arguments, plan=plan), first, strict=True))


def test_the_second_device_while_the_first_is_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    check(scan_arguments(torch.device("cuda:1"), torch.bfloat16, (2, 40, 70, 16)))


def needs_memory(gigabytes: int) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < gigabytes << 30:
        pytest.skip(f"needs {gigabytes} GB of free memory on the device")


@pytest.mark.parametrize("parts", [1, 4])
def test_tokens_and_rows_far_apart(parts):
    """What is read lies more than 2^31 elements behind the first: along the tokens, then along the rows."""
    needs_memory(6)
    arguments = scan_arguments(CUDA, torch.bfloat16, (1, 2200, 24, 16))
    wide = torch.empty(2200, 1 << 20, device=CUDA, dtype=torch.bfloat16)
    for key in ("x", "dt", "z", "B", "C"):
        at = {"x": 0, "dt": 64, "z": 128, "B": 192, "C": 256}[key]
        view = wide[None, :, at : at + arguments[key].shape[-1]]
        arguments[key] = view.copy_(arguments[key])
    check(arguments, scan_plan(1, 6144, 5120, 16)._replace(parts=parts))
    again = scan_arguments(CUDA, torch.bfloat16, (2200, 1, 24, 16))
    for key in ("x", "dt", "z", "B", "C"):
        again[key] = arguments[key].transpose(0, 1)
    check(again)


def test_results_of_more_than_two_to_the_31():
    """Rows that are all the same, so that only what is written takes memory: 2.2e9 elements of y and of the state each."""
    needs_memory(20)
    rows, length, channels, size = 33_000, 8, 8192, 8
    arguments = scan_arguments(CUDA, torch.bfloat16, (1, length, channels, size), state=False)
    expected = scan_forward(**arguments)
    for key in ("x", "dt", "z", "B", "C"):
        arguments[key] = arguments[key].expand(rows, -1, -1)
    results = scan_forward(**arguments)
    for result, row in zip(results, expected, strict=True):
        assert result.numel() > 2**31
        for first in range(0, rows, 4000):
            assert (result[first : first + 4000] == row).all()


def gradients(scan: Callable, arguments: dict[str, Any], final: bool) -> list[torch.Tensor]:
    """y, the final state if asked for, and gradients of both through random weights, the same for all ways; at tokens."""
    lengths = arguments["lengths"]
    names = [name for name in RAW_NAMES if arguments[name] is not None]
    tensors = {name: arguments[name].detach().clone().requires_grad_() for name in names}
    options = {} if scan is selective_scan_naive else {"return_final_state": final}
    y, state = scan(**{**arguments, **tensors}, **options)
    pads = (torch.arange(y.shape[1], device=y.device) >= lengths[:, None]).unsqueeze(-1)
    y = y.masked_fill(pads, 0.0)
    generator = torch.Generator().manual_seed(1)
    results = [y, state] if final else [y]
    probes = [torch.randn(result.shape, generator=generator).to(y.device) for result in results]
    loss = sum((result.double() * probe.double()).sum() for result, probe in zip(results, probes, strict=True))
    return [*results, *torch.autograd.grad(loss, list(tensors.values()))]


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 65, 2049])
def test_training(length, dtype, state, final):
    """Bias, softplus and pads with gradients, in the kernel where there are no states: no worse than twice plain torch."""
    if load_kernel("selective_scan")[0] is None:
        pytest.skip("no mamba-ssm")
    lengths = (length, length // 2, 0)
    arguments = scan_arguments(CUDA, dtype, (3, length, 40, 16), state=state, lengths=lengths)
    exact = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
    reference = gradients(selective_scan_naive, exact, final)
    kernel = gradients(selective_scan, arguments, final)
    with without_kernels():
        plain = gradients(selective_scan, arguments, final)
    names = ["y", *(["state"] if final else []), *(f"d{name}" for name in RAW_NAMES if arguments[name] is not None)]
    allowed = {
        name: min(max(2 * rms_ratio(p, r), CAPS[dtype] / 2), 2 * CAPS[dtype])
        for name, p, r in zip(names, plain, reference, strict=True)
    }
    prefix = f"scan of raw steps {str(dtype)[6:]} {'with' if state or final else 'without'} state"
    for name, k, r in zip(names, kernel, reference, strict=True):
        note_all(prefix, [name], [k], [r], allowed[name])


def test_the_way_is_chosen_by_gradients(monkeypatch):
    calls = []

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return scan_forward(*arguments)

    monkeypatch.setattr(module, "scan_forward", counted)
    arguments = scan_arguments(CUDA, torch.bfloat16, (2, 50, 64, 16), lengths=(50, 20))
    with torch.no_grad():
        y, state = selective_scan(**arguments)
    assert len(calls) == 1
    with without_kernels():
        plain, plain_state = selective_scan(**arguments)
    assert len(calls) == 1
    leaf = arguments["dt_bias"].clone().requires_grad_()
    trained, trained_state = selective_scan(**{**arguments, "dt_bias": leaf})
    assert len(calls) == 1
    assert trained.requires_grad
    real = torch.arange(50, device=CUDA) < arguments["lengths"][:, None]
    for name, result in (("inference", y), ("training", trained)):
        note(f"ways of the scan, y in {name}", result[real], plain[real], CAPS[torch.bfloat16])
    for name, result in (("inference", state), ("training", trained_state)):
        note(f"ways of the scan, state in {name}", result, plain_state, 1e-4)
    wide = scan_arguments(CUDA, torch.float32, (1, 5, 8, 257))
    selective_scan(**wide)
    double = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
    selective_scan(**double)
    assert len(calls) == 1
