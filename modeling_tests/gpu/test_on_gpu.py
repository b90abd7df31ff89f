# SPDX-License-Identifier: Apache-2.0
"""Everything that a CUDA device changes: the compiled kernels against float64, and the model against itself on the CPU.

    python -m pytest modeling_tests/gpu --gpu-report gpu_report.json

Errors are RMS ratios, rms(x - reference) / rms(reference). With a report path, every error measured is written there.
"""

import copy
import json
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import MambaConfig, MambaForCausalLM

from remamba_hf import ReMambaConfig, ReMambaForCausalLM
from remamba_hf.modeling.causal_convolution import causal_conv1d, causal_conv1d_naive, causal_conv1d_step
from remamba_hf.modeling.optional_kernels import KERNELS, load_kernel, without_kernels
from remamba_hf.modeling.selective_scan import selective_scan, selective_scan_naive, selective_scan_step

pytestmark = pytest.mark.gpu

LENGTHS = (1, 2, 3, 5, 63, 64, 65, 129, 2047, 2049)
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "compression_span": 0.5,
    "compression_ratio": 0.1,
    "initializer_range": 0.3,
    "eos_token_id": None,
}
CAPS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
_errors: dict[str, float] = {}


@pytest.fixture(scope="module", autouse=True)
def _report(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    path = request.config.getoption("--gpu-report", default=None)
    if path and _errors:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
        report = {"device": torch.cuda.get_device_name(), "versions": versions, "rms_ratios": _errors}
        Path(path).write_text(json.dumps(report, indent=2) + "\n")


def rms_ratio(value: torch.Tensor, reference: torch.Tensor) -> float:
    value, reference = value.detach().double().cpu(), reference.detach().double().cpu()
    return ((value - reference).square().mean().sqrt() / reference.square().mean().sqrt().clamp(min=1e-30)).item()


def note(name: str, value: torch.Tensor, reference: torch.Tensor, allowed: float) -> None:
    assert torch.isfinite(value).all(), name
    error = rms_ratio(value, reference)
    _errors[name] = max(error, _errors.get(name, 0.0))
    assert error <= allowed, f"{name}: RMS ratio {error:.1e}, allowed {allowed:.1e}"


def outputs_and_gradients(function: Callable, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Both outputs, then the gradient of every input under fixed random weights on both."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    y, state = function(*inputs)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (y, state)]
    total = (y.double() * weights[0].double()).sum() + (state.double() * weights[1].double()).sum()
    return [y, state, *torch.autograd.grad(total, inputs)]


def scan_inputs(batch: int, length: int, channels: int, size: int, with_state: bool) -> list[torch.Tensor]:
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    inputs = [
        normal(batch, length, channels),
        F.softplus(normal(batch, length, channels) - 2),
        -torch.exp(normal(channels, size) * 0.5),
        normal(batch, length, size),
        normal(batch, length, size),
        normal(channels),
        normal(batch, length, channels),
    ]
    return [*inputs, normal(batch, channels, size)] if with_state else inputs


@pytest.mark.parametrize("name", KERNELS)
def test_the_compiled_kernels_import(name: str) -> None:
    kernel, reason = load_kernel(name)
    assert kernel is not None, reason


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("dtype", CAPS)
@pytest.mark.parametrize("length", LENGTHS)
def test_scan_against_float64(length: int, dtype: torch.dtype, with_state: bool) -> None:
    exact = scan_inputs(2, length, 40, 16, with_state)
    sequences = (0, 1, 3, 4, 6)
    cast = [t.to("cuda", dtype if i in sequences else torch.float32) for i, t in enumerate(exact)]
    exact = [t.double().cpu() for t in cast]  # the reference sees the rounded inputs
    names = ["y", "state", "dx", "ddt", "dA", "dB", "dC", "dD", "dz", "dh0"]
    reference = outputs_and_gradients(selective_scan_naive, exact)
    kernel = outputs_and_gradients(selective_scan, cast)
    with without_kernels():
        plain = outputs_and_gradients(selective_scan, cast)
    for label, k, p, r in zip(names, kernel, plain, reference, strict=False):
        allowed = min(max(2 * rms_ratio(p, r), CAPS[dtype] / 10), CAPS[dtype])
        note(f"scan {str(dtype)[6:]} {'with' if with_state else 'without'} state, {label}", k, r, allowed)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("dtype", CAPS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("channels", [40, 36])  # 36 channels: strides that the kernel refuses
def test_convolution_against_float64(length: int, channels: int, dtype: torch.dtype, with_state: bool) -> None:
    wide = torch.randn(2, length, 2 * channels, dtype=torch.float64)
    exact = [wide[..., :channels], torch.randn(channels, 4), torch.randn(channels)]
    if with_state:
        exact.append(torch.randn(2, channels, 4))
    cast = [t.to("cuda", dtype) for t in exact]
    cast[0] = wide.to("cuda", dtype)[..., :channels]  # a view, as the mixer passes
    reference = outputs_and_gradients(causal_conv1d_naive, [t.double().cpu() for t in cast])
    names = ["y", "state", "dx", "dweight", "dbias", "dstate"]
    for label, k, r in zip(names, outputs_and_gradients(causal_conv1d, cast), reference, strict=False):
        note(f"convolution {str(dtype)[6:]}, {label}", k, r, CAPS[dtype])


@pytest.mark.parametrize("dtype", CAPS)
def test_steps_against_float64(dtype: torch.dtype) -> None:
    x, dt, A, B, C, D, z, state = scan_inputs(3, 1, 40, 16, True)
    step = [x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, z[:, 0]]
    cast = [t.to("cuda", torch.float32 if i in (1, 2, 5) else dtype) for i, t in enumerate(step)]
    on_gpu = state.float().cuda()
    y = selective_scan_step(*cast, on_gpu)
    back = [t.double().cpu() for t in cast]
    sequence = [t.unsqueeze(1) if i in (0, 1, 3, 4, 6) else t for i, t in enumerate(back)]
    reference, final = selective_scan_naive(*sequence, state.float().double())
    note(f"scan step {str(dtype)[6:]}, y", y, reference[:, 0], CAPS[dtype])
    note(f"scan step {str(dtype)[6:]}, state", on_gpu, final, CAPS[dtype])

    x, weight, bias, state = (torch.randn(*s).to("cuda", dtype) for s in ((3, 40), (40, 4), (40,), (3, 40, 4)))
    reference, final = causal_conv1d_naive(*(t.double().cpu() for t in (x.unsqueeze(1), weight, bias, state)))
    note(f"convolution step {str(dtype)[6:]}, y", causal_conv1d_step(x, weight, bias, state), reference[:, 0], CAPS[dtype])
    note(f"convolution step {str(dtype)[6:]}, state", state, final, CAPS[dtype])


def two_models(dtype: torch.dtype = torch.float32) -> tuple[ReMambaForCausalLM, ReMambaForCausalLM]:
    """The same small model on the CPU in float32 and on the GPU in `dtype`."""
    torch.manual_seed(0)
    model = ReMambaForCausalLM(ReMambaConfig(**SMALL)).eval()
    for name, parameter in model.named_parameters():
        if "adaptation" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    on_gpu = copy.deepcopy(model).cuda()
    for name, parameter in on_gpu.named_parameters():
        if not any(kept in name for kept in ("A_log", ".D", "dt_proj.bias", "adaptation")):
            parameter.data = parameter.data.to(dtype)
    return model, on_gpu


def ragged_batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 128, (3, 300))
    mask = torch.ones_like(ids)
    mask[0, :70], mask[1, 220:], mask[2, :30] = 0, 0, 0
    return {"input_ids": ids, "attention_mask": mask, "prompt_lengths": torch.tensor([200, 75, 270])}


def test_two_stages_and_gradients_equal_the_cpu_in_float32() -> None:
    cpu, gpu = two_models()
    batch = ragged_batch()
    labels = batch["input_ids"].clone()
    for row, prompt in enumerate(batch["prompt_lengths"].tolist()):
        columns = batch["attention_mask"][row].nonzero().flatten()
        labels[row] = -100
        labels[row, columns[prompt:]] = batch["input_ids"][row, columns[prompt:]]
    expected = cpu(**batch, labels=labels, use_cache=True)
    found = gpu(**{k: v.cuda() for k, v in batch.items()}, labels=labels.cuda(), use_cache=True)
    torch.testing.assert_close(found.compressed_positions.cpu(), expected.compressed_positions)
    real = batch["attention_mask"].bool()
    note("model float32, logits", found.logits.cpu()[real], expected.logits[real], 1e-4)
    for layer, (f, e) in enumerate(zip(found.cache_params.layers, expected.cache_params.layers, strict=True)):
        note(f"model float32, state of layer {layer}", f.recurrent_states[0], e.recurrent_states[0], 1e-4)
    expected.loss.backward()
    found.loss.backward()
    for (name, c), g in zip(cpu.named_parameters(), gpu.parameters(), strict=True):
        note(f"model float32, gradient of {name}", g.grad, c.grad, 1e-3)


@torch.no_grad()
def test_bfloat16_errs_no_more_than_torch_and_transformers_do() -> None:
    cpu, gpu = two_models(torch.bfloat16)
    exact = copy.deepcopy(cpu)
    for parameter, rounded in zip(exact.parameters(), gpu.parameters(), strict=True):
        parameter.copy_(rounded.float())
    batch = ragged_batch()
    on_gpu = {k: v.cuda() for k, v in batch.items()}
    real = batch["attention_mask"].bool()
    # All of the window is kept, so that rounding cannot flip the selection and hide behind that.
    for name, kwargs in (("plain", {"compress_prompt": False}), ("two stages", {"compression_ratio": 1.0})):
        expected = exact(**batch, **kwargs).logits[real]
        with without_kernels():
            by_torch = gpu(**on_gpu, **kwargs).logits.cpu()[real]
        _errors[f"model bfloat16 in plain torch, logits, {name}"] = rms_ratio(by_torch, expected)
        allowed = min(2 * rms_ratio(by_torch, expected), 0.1)
        note(f"model bfloat16, logits, {name}", gpu(**on_gpu, **kwargs).logits.cpu()[real], expected, allowed)

    theirs = MambaForCausalLM(MambaConfig(**{k: v for k, v in SMALL.items() if not k.startswith("compression")})).eval()
    theirs.load_state_dict(gpu.state_dict(), strict=False)
    ids = batch["input_ids"]
    expected = exact(ids).logits
    peer = rms_ratio(theirs.to("cuda", torch.bfloat16)(ids.cuda()).logits, expected)
    _errors["transformers' Mamba in bfloat16, logits"] = peer
    note("model bfloat16 without pads, logits", gpu(ids.cuda()).logits, expected, 1.2 * peer)


def test_generate_equals_the_cpu_and_chunks_change_nothing() -> None:
    cpu, gpu = two_models()
    batch = ragged_batch()
    del batch["prompt_lengths"]
    on_gpu = {k: v.cuda() for k, v in batch.items()}
    kwargs = dict(max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0)
    expected = cpu.generate(**batch, **kwargs)
    for name, extra in (("whole", {}), ("chunks of 37", {"prefill_chunk_length": 37})):
        found = gpu.generate(**on_gpu, **kwargs, **extra)
        assert found.sequences.tolist() == expected.sequences.tolist(), name
        for step, (f, e) in enumerate(zip(found.logits, expected.logits, strict=True)):
            note(f"generate float32 {name}, logits of step {step}", f, e, 1e-3)


def test_generate_in_bfloat16_runs_with_every_cache() -> None:
    _, gpu = two_models(torch.bfloat16)
    ids = ragged_batch()["input_ids"].cuda()
    for extra in ({}, {"cache_implementation": "static"}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        assert gpu.generate(ids, max_new_tokens=6, pad_token_id=0, **extra).shape[1] == ids.shape[1] + 6


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_model_runs_on_a_device_that_is_not_current() -> None:
    cpu, gpu = two_models()
    ids = ragged_batch()["input_ids"]
    with torch.cuda.device(0), torch.no_grad():
        found = gpu.to("cuda:1")(ids.to("cuda:1"), compress_prompt=True).logits
    note("model float32 on cuda:1, logits", found, cpu(ids, compress_prompt=True).logits, 1e-4)
