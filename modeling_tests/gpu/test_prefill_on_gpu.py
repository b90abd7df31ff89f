# SPDX-License-Identifier: Apache-2.0
"""What only a GPU's prefill does: residual sums inside the mixers' last product, two passes without waiting in between, the
convolution's own kernel."""

import copy
import warnings
from typing import Any

import pytest
import torch

from modeling_tests.gpu.measured_errors import note, rms_ratio
from modeling_tests.modeling.test_convolution_kernels import check_convolve
from modeling_tests.modeling.tiny_models import VOCABULARY, tiny_memmamba, tiny_model
from remamba_hf.modeling import recurrent_model
from remamba_hf.modeling.recurrent_passes import PackedRows

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
FAMILIES = ["remamba", "remamba2", "memmamba"]


def model_of(family: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Small, with the residual in float32 and weights in `dtype` but for what stays in float32."""
    make = tiny_memmamba if family == "memmamba" else lambda *a, **k: tiny_model(*a, family=family, **k)
    model = make(torch.float32, residual_in_fp32=True).eval()
    kept = type(model)._keep_in_fp32_modules_strict
    for name, parameter in model.named_parameters():
        if not any(f".{part}." in f".{name}." for part in kept):
            parameter.data = parameter.data.to(dtype)
    return model.to(CUDA)


def ids_of(rows: int = 2, length: int = 33) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0)).to(CUDA)


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The residuals that were added to in place since."""
    added, project = [], recurrent_model.RecurrentMixer.project

    def counted(mixer: Any, y: torch.Tensor, onto: torch.Tensor | None) -> torch.Tensor:
        if onto is None:
            return project(mixer, y, onto)
        before = onto.clone()
        result = project(mixer, y, onto)
        assert result.data_ptr() == onto.data_ptr()
        expected = before.double() + y.double() @ mixer.out_proj.weight.double().t()
        note("residual sum inside the product", result, expected, 1e-6)
        added.append(onto)
        return result

    monkeypatch.setattr(recurrent_model.RecurrentMixer, "project", counted)
    return added


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_sums_inside_the_product(family, sums):
    """Every layer's, exact in float32; the logits are as near to float64 as with sums behind rounded products (but
    MemMamba's, where rounding decides which of two notes stays)."""
    model = model_of(family)
    exact = copy.deepcopy(model).double().cpu()
    options = {} if family == "memmamba" else {"compress_prompt": False}
    with torch.no_grad():
        logits = model(ids_of(), **options).logits
        layers = model.config.num_hidden_layers
        assert len(sums) == layers
        model.backbone.layers[0].mixer.register_forward_hook(lambda *a: None)
        apart = model(ids_of(), **options).logits
        assert len(sums) == 2 * layers - 1
        expected = exact(ids_of().cpu(), **options).logits
    assert family == "memmamba" or rms_ratio(logits, expected) < 1.5 * rms_ratio(apart, expected) + 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_that_others_hold_is_overwritten(family, sums):
    """Inputs, the outputs of hooked blocks, hidden states that are asked for, steps, and whatever has gradients."""
    model = model_of(family)
    options = {} if family == "memmamba" else {"compress_prompt": False}
    embeddings = model.get_input_embeddings()(ids_of()).float().detach()
    given = embeddings.clone()
    with torch.no_grad():
        model(inputs_embeds=embeddings, **options)
        assert torch.equal(embeddings, given)
        asked_for = model(ids_of(), output_hidden_states=True, **options).hidden_states
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []

        def keep(module: Any, arguments: Any, output: Any) -> None:
            state = output[0] if isinstance(output, tuple) else output
            seen.append((state, state.clone()))

        for block in model.backbone.layers:
            block.register_forward_hook(keep)
        cache = model(ids_of(), use_cache=True, **options).cache_params
        assert len(seen) == model.config.num_hidden_layers
        assert all(torch.equal(*pair) for pair in seen)
        assert all(torch.equal(then, state) for (_, then), state in zip(seen, asked_for, strict=False))
        sums.clear()
        model(ids_of()[:, :1], cache_params=cache, use_cache=True, **options)
        assert not sums
    model(ids_of(), **options).logits.sum().backward()
    assert not sums


def test_two_passes_wait_for_the_device_once():
    """To learn whether the scores are finite, when everything has been launched."""
    model = model_of("remamba")
    backbone, ids = model.backbone, ids_of(2, 200)

    def read() -> None:
        rows = PackedRows(ids, None, None, backbone.embeddings)
        windows = backbone.plan_windows(rows.lengths, [200, 150], 0.1, 0.5, 0.1)
        backbone.read_rows(rows, windows, [200, 150], None, columns_to_keep=1, chunk_length=64)

    with torch.no_grad():
        read()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                read()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{warning.filename}:{warning.lineno}" for warning in caught if "synchroniz" in str(warning.message)]
    assert len(waits) == 1, waits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (3, 31, 130, 2), (2, 333, 257, 3), (1, 700, 5120, 4), (9, 65, 24, 9)], ids=str
)
def test_the_convolutions_kernel(sizes, dtype):
    rows, length = sizes[:2]

    def compare(name, *others):
        note(f"own {name}, {dtype}", *others)

    check_convolve(CUDA, dtype, sizes, compare=compare)
    lengths = tuple((length - row * 7) % (length + 1) for row in range(rows))
    check_convolve(CUDA, dtype, sizes, state=False, lengths=lengths, compare=compare)
