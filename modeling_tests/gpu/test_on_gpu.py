# SPDX-License-Identifier: Apache-2.0
"""Everything that a CUDA device changes: the compiled kernels against float64, and the models against themselves on the CPU.

    python -m pytest modeling_tests/gpu -n 8 --gpu-report gpu_report.json

Errors are RMS ratios, rms(x - reference) / rms(reference). With a report path, every error measured is written there.
Most of the time goes into compiling Triton kernels, hence several processes.
With --run-slow mamba-ssm's Triton kernels are tuned as in use, which takes many minutes of compiling.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from modeling_tests.gpu.measured_errors import errors, note, note_all, rms_ratio
from remamba_hf.families import FAMILIES
from remamba_hf.modeling import state_space_dual as dual
from remamba_hf.modeling.causal_convolution import causal_conv1d, causal_conv1d_naive, causal_conv1d_step
from remamba_hf.modeling.optional_kernels import KERNELS, load_kernel, without_kernels
from remamba_hf.modeling.selective_scan import selective_scan, selective_scan_naive, selective_scan_step

pytestmark = pytest.mark.gpu

LENGTHS = (1, 2, 3, 5, 63, 64, 65, 129, 2047, 2049)
SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "initializer_range": 0.3,
    "eos_token_id": None,
}
COMPRESSION = {"compression_span": 0.5, "compression_ratio": 0.1}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "remamba": {},
    "remamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 32, "chunk_size": 64},
}
CAPS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(scope="module", autouse=True)
def _few_compilations(request: pytest.FixtureRequest) -> None:
    """mamba-ssm's Triton kernels are compiled in some ten block sizes each, and anew for every other dtype or argument.
    What it reads when it is imported makes it take the smallest block size at once; nothing else is deterministic then."""
    if not request.config.getoption("--run-slow"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MAMBA_DETERMINISTIC", "1")
            load_kernel("state_space_dual")


def outputs_and_gradients(function: Callable, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Both outputs, then the gradient of every input under fixed random weights on both, which bfloat16 can hold."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    y, state = function(*inputs)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).bfloat16().to(t) for t in (y, state)]
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


# The state-space dual. x, B and C are views of one tensor, as the mixer passes them, and dt, A, D and states are in float32.
# Rates from 1/150 to 4.5 at steps about 0.15: some heads remember a thousand tokens, some a single one.

DUAL_LENGTHS = (1, 3, 63, 65, 129, 257, 1000)
DUAL_NAMES = ("y", "state", "dx", "dB", "dC", "ddt", "dA", "dD", "dh0")


class DualCase(NamedTuple):
    """What the heads look like, and what comes with the tokens."""

    groups: int
    channels: int
    size: int
    chunk: int
    with_state: bool
    packed: bool
    heads: int = 8

    @property
    def parts(self) -> list[int]:
        return [self.heads * self.channels, self.groups * self.size, self.groups * self.size]

    def inputs(self, length: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """xBC [2, L, ...] in `dtype`, dt, A, D and perhaps the initial state in float32, on the GPU."""
        inputs = [
            torch.randn(2, length, sum(self.parts)).to(dtype),
            F.softplus(torch.randn(2, length, self.heads) - 2),
            -torch.exp(torch.linspace(-5, 1.5, self.heads)),
            torch.randn(self.heads),
        ]
        if self.with_state:
            inputs.append(torch.randn(2, self.heads, self.channels, self.size))
        return [tensor.to("cuda") for tensor in inputs]

    def seq_idx(self, length: int) -> torch.Tensor | None:
        """Row 0: three sequences. Row 1: a new one every 250 tokens, where quarters of 1,000 begin; numbered from 5."""
        columns = torch.arange(length, device="cuda")
        return torch.stack([columns * 3 // length, columns // 250 + 5]) if self.packed else None

    def run(self, operator: Callable, inputs: list[torch.Tensor], **kwargs: Any) -> list[torch.Tensor]:
        """Outputs and gradients in the order of DUAL_NAMES."""

        def of_views(
            xBC: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, D: torch.Tensor, state: torch.Tensor | None = None
        ) -> tuple[torch.Tensor, torch.Tensor]:
            x, B, C = xBC.split(self.parts, dim=-1)
            x = x.unflatten(-1, (self.heads, self.channels))
            B, C = (t.unflatten(-1, (self.groups, self.size)) for t in (B, C))
            return operator(x, dt, A, B, C, D, state, seq_idx=self.seq_idx(x.shape[1]), **kwargs)

        y, state, dxBC, ddt, dA, *others = outputs_and_gradients(of_views, inputs)
        return [y, state, *dxBC.split(self.parts, dim=-1), ddt, dA, *others]

    def check(self, name: str, length: int, dtype: torch.dtype, allowed: float) -> None:
        """The operator against the loop in float64 on the same rounded inputs."""
        inputs = self.inputs(length, dtype)
        values = self.run(dual.state_space_dual, inputs, chunk_size=self.chunk)
        references = self.run(dual.state_space_dual_naive, [tensor.double() for tensor in inputs])
        note_all(f"dual {str(dtype)[6:]} {name}", DUAL_NAMES[: len(values)], values, references, allowed)


DUAL_CASES = {
    "as in 2.7b": DualCase(groups=1, channels=64, size=128, chunk=256, with_state=False, packed=False),
    "with state": DualCase(groups=2, channels=24, size=40, chunk=64, with_state=True, packed=False),
    "packed": DualCase(groups=2, channels=24, size=40, chunk=64, with_state=True, packed=True),
}


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of x that reach mamba-ssm's kernel."""
    calls: list[torch.Size] = []
    find = dual.usable_kernel

    def find_watched(name: str, *tensors: torch.Tensor | None) -> Callable | None:
        kernel = find(name, *tensors)

        def watched(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append(x.shape)
            return kernel(x, *args, **kwargs)

        return watched if kernel is not None and name == "state_space_dual" else kernel

    monkeypatch.setattr(dual, "usable_kernel", find_watched)
    return calls


@pytest.mark.parametrize("case", DUAL_CASES)
@pytest.mark.parametrize("length", DUAL_LENGTHS)
def test_dual_against_float64(kernel_calls: list[torch.Size], length: int, case: str) -> None:
    DUAL_CASES[case].check(case, length, torch.bfloat16, CAPS[torch.bfloat16])
    assert len(kernel_calls) == 1


@pytest.mark.parametrize("case", DUAL_CASES)
@pytest.mark.parametrize("length", [1, 65, 1000])
def test_dual_in_float32_is_exact(kernel_calls: list[torch.Size], length: int, case: str) -> None:
    """The kernels multiply in TF32, so that they are not used unless that is allowed."""
    DUAL_CASES[case].check(case, length, torch.float32, CAPS[torch.float32])
    assert not kernel_calls


@pytest.mark.parametrize("case", ["as in 2.7b", "packed"])
def test_dual_in_tf32_where_that_is_allowed(kernel_calls: list[torch.Size], case: str) -> None:
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        DUAL_CASES[case].check(f"in TF32 {case}", 257, torch.float32, 5e-3)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert len(kernel_calls) == 1


@pytest.mark.parametrize("case", ["with state", "packed"])
def test_dual_by_halves_against_float64(monkeypatch: pytest.MonkeyPatch, kernel_calls: list[torch.Size], case: str) -> None:
    """With the limit moved to 250 tokens: the kernel must tell a sequence that goes on at a cut from one that begins."""
    monkeypatch.setattr(dual, "_overflows", lambda operands, chunk_size: operands.x.shape[:2].numel() > 250)
    DUAL_CASES[case].check(f"by halves {case}", 1000, torch.bfloat16, CAPS[torch.bfloat16])
    assert [tuple(shape[:2]) for shape in kernel_calls] == [(1, 250)] * 8


@torch.no_grad()
def test_dual_beyond_the_kernels_offsets(kernel_calls: list[torch.Size]) -> None:
    """420,000 tokens at mamba2-2.7b's width, whose last ones lie more than 2^31 elements behind the first."""
    heads, channels, size, length, piece = 80, 64, 128, 420_000, 32_768
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free GPU memory")
    xBC = torch.randn(1, length, heads * channels + 2 * size, device="cuda", dtype=torch.bfloat16)
    dt = F.softplus(torch.randn(1, length, heads, device="cuda") - 3)
    A = -torch.exp(torch.linspace(-10, 1, heads, device="cuda"))  # the slowest heads still know the first token
    D = torch.ones(heads, device="cuda")

    def run(span: slice, state: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        x, B, C = xBC[:, span].split([heads * channels, size, size], dim=-1)
        x = x.unflatten(-1, (heads, channels))
        return dual.state_space_dual(x, dt[:, span], A, B.unsqueeze(2), C.unsqueeze(2), D, state)

    expected_state: torch.Tensor | None = None
    tails = []
    for begin in range(0, length, piece):
        y, expected_state = run(slice(begin, min(begin + piece, length)), expected_state)
        tails.append(y[:, -1000:].clone())
    expected = torch.cat(tails, dim=1)[:, -1000:]
    kernel_calls.clear()
    y, state = run(slice(0, length), None)
    assert len(kernel_calls) == 2
    note("dual bfloat16 beyond 32-bit offsets, y of the last 1,000", y[:, -1000:], expected, CAPS[torch.bfloat16])
    note("dual bfloat16 beyond 32-bit offsets, state", state, expected_state, CAPS[torch.bfloat16])


@pytest.mark.parametrize("case", ["as in 2.7b", "with state"])
@pytest.mark.parametrize("dtype", CAPS)
def test_dual_steps_against_float64(dtype: torch.dtype, case: str) -> None:
    shape, steps = DUAL_CASES[case], 4
    xBC, dt, A, D = shape.inputs(steps, dtype)[:4]
    state = torch.randn(2, shape.heads, shape.channels, shape.size, device="cuda")
    x, B, C = xBC.split(shape.parts, dim=-1)
    x = x.unflatten(-1, (shape.heads, shape.channels))
    B, C = (t.unflatten(-1, (shape.groups, shape.size)) for t in (B, C))
    references = dual.state_space_dual_naive(*(t.double() for t in (x, dt, A, B, C, D, state)))
    address = state.data_ptr()
    y = [dual.state_space_dual_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, state) for t in range(steps)]
    assert state.data_ptr() == address
    assert y[0].dtype == dtype
    note_all(f"dual step {str(dtype)[6:]} {case}", ["y", "state"], [torch.stack(y, dim=1), state], references, CAPS[dtype])


def two_models(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Any, Any]:
    """The same small model on the CPU in float32 and on the GPU in `dtype`."""
    torch.manual_seed(0)
    config = FAMILIES[family].config_class(**{**SMALL, **COMPRESSION, **OF_FAMILY[family], **settings})
    model = FAMILIES[family].model_class(config).eval()
    for name, parameter in model.named_parameters():
        if "adaptation" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    on_gpu = copy.deepcopy(model).cuda()
    for name, parameter in on_gpu.named_parameters():
        if not any(f".{kept}." in f".{name}." for kept in model._keep_in_fp32_modules_strict):
            parameter.data = parameter.data.to(dtype)
    return model, on_gpu


def ragged_batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 128, (3, 300))
    mask = torch.ones_like(ids)
    mask[0, :70], mask[1, 220:], mask[2, :30] = 0, 0, 0
    return {"input_ids": ids, "attention_mask": mask, "prompt_lengths": torch.tensor([200, 75, 270])}


@pytest.mark.parametrize("family", FAMILIES)
def test_two_stages_and_gradients_equal_the_cpu_in_float32(family: str) -> None:
    cpu, gpu = two_models(family)
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
    note(f"{family} float32, logits", found.logits.cpu()[real], expected.logits[real], 1e-4)
    for layer, (f, e) in enumerate(zip(found.cache_params.layers, expected.cache_params.layers, strict=True)):
        note(f"{family} float32, state of layer {layer}", f.recurrent_states[0], e.recurrent_states[0], 1e-4)
    expected.loss.backward()
    found.loss.backward()
    for (name, c), g in zip(cpu.named_parameters(), gpu.parameters(), strict=True):
        note(f"{family} float32, gradient of {name}", g.grad, c.grad, 1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bfloat16_errs_no_more_than_torch_and_transformers_do(family: str) -> None:
    # One group: with more of them transformers' Mamba-2 has another norm before 5.22.
    settings = {"n_groups": 1} if family == "remamba2" else {}
    cpu, gpu = two_models(family, torch.bfloat16, **settings)
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
        errors[f"{family} bfloat16 in plain torch, logits, {name}"] = rms_ratio(by_torch, expected)
        allowed = min(2 * rms_ratio(by_torch, expected), 0.1)
        note(f"{family} bfloat16, logits, {name}", gpu(**on_gpu, **kwargs).logits.cpu()[real], expected, allowed)

    plain = FAMILIES[family]
    theirs = plain.plain_model_class(plain.plain_config_class(**{**SMALL, **OF_FAMILY[family], **settings})).eval()
    theirs.load_state_dict(gpu.state_dict(), strict=False)
    ids = batch["input_ids"]
    expected = exact(ids).logits
    peer = rms_ratio(theirs.to("cuda", torch.bfloat16)(ids.cuda()).logits, expected)
    errors[f"transformers' {plain.plain_name} in bfloat16, logits"] = peer
    note(f"{family} bfloat16 without pads, logits", gpu(ids.cuda()).logits, expected, 1.2 * peer)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_equals_the_cpu_and_chunks_change_nothing(family: str) -> None:
    cpu, gpu = two_models(family)
    batch = ragged_batch()
    del batch["prompt_lengths"]
    on_gpu = {k: v.cuda() for k, v in batch.items()}
    kwargs = dict(max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0)
    expected = cpu.generate(**batch, **kwargs)
    for name, extra in (("whole", {}), ("chunks of 37", {"prefill_chunk_length": 37})):
        found = gpu.generate(**on_gpu, **kwargs, **extra)
        assert found.sequences.tolist() == expected.sequences.tolist(), name
        for step, (f, e) in enumerate(zip(found.logits, expected.logits, strict=True)):
            note(f"{family} generate float32 {name}, logits of step {step}", f, e, 1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_in_bfloat16_runs_with_every_cache(family: str) -> None:
    _, gpu = two_models(family, torch.bfloat16)
    ids = ragged_batch()["input_ids"].cuda()
    for extra in ({}, {"cache_implementation": "static"}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        assert gpu.generate(ids, max_new_tokens=6, pad_token_id=0, **extra).shape[1] == ids.shape[1] + 6


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_model_runs_on_a_device_that_is_not_current(family: str) -> None:
    ids = ragged_batch()["input_ids"]
    for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        _, gpu = two_models(family, dtype)
        expected = gpu(ids.cuda(), compress_prompt=True, compression_ratio=1.0).logits
        with torch.cuda.device(0):
            found = gpu.to("cuda:1")(ids.to("cuda:1"), compress_prompt=True, compression_ratio=1.0).logits
        note(f"{family} {str(dtype)[6:]} on cuda:1 as on cuda:0, logits", found, expected, allowed)
