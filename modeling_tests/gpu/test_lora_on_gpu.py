# SPDX-License-Identifier: Apache-2.0
"""LoRA on a CUDA device: gradients of every projection through the kernels, and bases of few bits, against plain torch."""

import copy
from typing import Any

import pytest
import torch

from modeling_tests.gpu.measured_errors import note_all
from remamba_hf.families import ALL_FAMILIES

pytest.importorskip("peft")

from modeling_tests.training import test_lora, test_quantised

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
# Of each gradient: in float32, where plain torch errs by 1e-3 in those of the compressor's key, in which much cancels, and
# of bases of 4 and 8 bits, of which LLM.int8 rounds what it multiplies with.
FLOAT32, FEW_BITS = 5e-3, {4: 5e-3, 8: 1e-1}


def trained_once(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients of all that is trained, with the same draws for every model."""
    torch.manual_seed(3)
    output = model.train()(**{name: tensor.to(model.device) for name, tensor in batch.items()})
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return output.logits, {name.replace(".base_layer", ""): gradient for name, gradient in gradients.items()}


def compare(prefix: str, model: Any, exact: Any, batch: dict[str, torch.Tensor], allowed: float) -> None:
    logits, gradients = trained_once(model, batch)
    expected_logits, expected = trained_once(exact, batch)
    assert gradients.keys() == expected.keys()
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    values, references = [logits, *gradients.values()], [expected_logits, *(expected[name] for name in gradients)]
    note_all(prefix, ["logits", *gradients], values, references, allowed)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_projection_gets_its_gradient(family, checkpointing):
    """In float32 through the kernels, against float64 on the CPU."""
    exact = test_lora.adapted_everywhere(test_lora.tiny(family))
    model = copy.deepcopy(exact).float().to(DEVICE)
    if checkpointing:
        model.gradient_checkpointing_enable()
    compare(f"LoRA, {family}", model, exact, test_lora.BATCH, FLOAT32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_base_of_few_bits(family, bits, tmp_path):
    """As ordinary layers with the weights that the codes stand for."""
    pytest.importorskip("bitsandbytes")
    test_quantised.tiny(family).save_pretrained(tmp_path)
    base = test_quantised.quantised(tmp_path, "bitsandbytes", bits, device_map={"": DEVICE})
    exact = test_quantised.with_recipe(test_quantised.reference(tmp_path, base).to(DEVICE))
    model = test_quantised.with_recipe(base)
    compare(f"LoRA on {bits} bits, {family}", model, exact, test_quantised.BATCH, FEW_BITS[bits])
