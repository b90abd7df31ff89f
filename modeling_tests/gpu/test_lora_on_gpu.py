# SPDX-License-Identifier: Apache-2.0
"""LoRA on a CUDA device: gradients of every projection through the kernels, and bases of few bits, against plain torch."""

import copy
from typing import Any

import pytest
import torch

from modeling_tests.gpu.measured_errors import note, note_all
from remamba_hf.families import ALL_FAMILIES

pytest.importorskip("peft")

from modeling_tests.training import test_lora, test_quantised

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
# Of logits and of each gradient, in float32: plain torch errs by 1e-3 in gradients of the compressor's key, in which much
# cancels. With 8 bits some inputs lie on the other side of a half and are rounded to the next code, which is much in
# gradients of few numbers; where the reference did not round, logits erred by .15, gradients by .7.
ALLOWED = {32: (5e-3, 5e-3), 4: (5e-3, 5e-3), 8: (2e-2, 2e-1)}


def trained_once(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients of all that is trained, with the same draws for every model."""
    torch.manual_seed(3)
    output = model.train()(**{name: tensor.to(model.device) for name, tensor in batch.items()})
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return output.logits, {name.replace(".base_layer", ""): gradient for name, gradient in gradients.items()}


class RoundedToCodes(torch.autograd.Function):
    """Rows as LLM.int8 (arXiv 2208.07339) multiplies them: 255 values a row, but for columns with outliers. Its gradient is
    that of no rounding."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, threshold: float) -> torch.Tensor:
        rows = x.flatten(0, -2)
        half = rows.half().float()
        outliers = half.abs() >= threshold
        half = half.masked_fill(outliers, 0.0)
        largest = half.abs().amax(-1, keepdim=True)
        rounded = (half * (127 / largest)).round() * largest / 127
        return torch.where(outliers.any(0), rows, rounded).view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def round_as_8_bits_do(model: Any) -> None:
    """The inputs to codes and the results to float16 of the layers that stand for 8 bits; 6 is transformers' threshold."""
    for name, module in model.named_modules():
        if name.endswith(("in_proj.base_layer", "out_proj.base_layer")):
            module.register_forward_pre_hook(lambda layer, inputs: (RoundedToCodes.apply(inputs[0], 6.0),))
            module.register_forward_hook(lambda layer, inputs, y: y + (y.half().float() - y).detach())


def compare(prefix: str, model: Any, exact: Any, batch: dict[str, torch.Tensor], allowed: tuple[float, float]) -> None:
    logits, gradients = trained_once(model, batch)
    expected_logits, expected = trained_once(exact, batch)
    assert gradients.keys() == expected.keys()
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    note(f"{prefix}, logits", logits, expected_logits, allowed[0])
    note_all(prefix, list(gradients), list(gradients.values()), [expected[name] for name in gradients], allowed[1])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_projection_gets_its_gradient(family, checkpointing):
    """In float32 through the kernels, against float64 on the CPU. cuDNN, whose convolution an adapted conv1d is, would round
    to TF32, and other vectors would be kept."""
    exact = test_lora.adapted_everywhere(test_lora.tiny(family))
    model = copy.deepcopy(exact).float().to(DEVICE)
    if checkpointing:
        model.gradient_checkpointing_enable()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        compare(f"LoRA, {family}", model, exact, test_lora.BATCH, ALLOWED[32])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_base_of_few_bits(family, bits, tmp_path):
    """As ordinary layers with the weights that the codes stand for, and the inputs. With 8 bits evenly spaced vectors are
    kept: a code that is rounded the other way would have the scores of random weights choose others."""
    pytest.importorskip("bitsandbytes")
    test_quantised.tiny(family).save_pretrained(tmp_path)
    base = test_quantised.quantised(tmp_path, "bitsandbytes", bits, device_map={"": DEVICE})
    exact = test_quantised.with_recipe(test_quantised.reference(tmp_path, base).to(DEVICE))
    model = test_quantised.with_recipe(base)
    if bits == 8:
        round_as_8_bits_do(exact)
        for one in (model, exact):
            one.get_base_model().config.selection = "stride"  # MemMamba has none
    compare(f"LoRA on {bits} bits, {family}", model, exact, test_quantised.BATCH, ALLOWED[bits])
