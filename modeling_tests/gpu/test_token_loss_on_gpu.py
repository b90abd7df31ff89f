# SPDX-License-Identifier: Apache-2.0
"""The loss of narrow logits, compiled: any vocabulary, a training batch's shape, and a model's loss with all its gradients
with and without it."""

from collections.abc import Callable

import pytest
import torch

from modeling_tests.gpu.measured_errors import note
from modeling_tests.modeling import test_token_loss
from modeling_tests.modeling.test_decode_kernels import Numbers
from modeling_tests.modeling.test_token_loss import (
    FAMILIES,
    OPTIONS,
    SIZES,
    check_extremes,
    check_ignored,
    check_loss,
    check_model_loss,
    check_not_finite,
    labels_of,
    model_of,
)
from modeling_tests.modeling.tiny_models import VOCABULARY
from remamba_hf.modeling.decode_kernels import kernels_can_run
from remamba_hf.modeling.token_loss import token_loss, token_loss_naive

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NARROW = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _triton() -> None:
    if not kernels_can_run(CUDA):
        pytest.skip("no Triton, or a card from before compute capability 8.0")


def noted(prefix: str = "own") -> Callable[..., None]:
    return lambda name, *others: note(f"{prefix} {name}", *others)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [*SIZES, (33, 50280), (33, 50277), (33, 50288), (5, 151936), (3, 262147)], ids=str)
def test_any_sizes(sizes, dtype):
    logits = Numbers(CUDA, dtype).normal(*sizes, scale=3.0)
    check_loss(logits, labels_of(CUDA, *sizes), 256.0, compare=noted())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_a_wider_tensor(dtype):
    numbers = Numbers(CUDA, dtype)
    for columns in (37, 9000):
        check_loss(numbers.view(6, columns), labels_of(CUDA, 6, columns), compare=noted())
        check_loss(numbers.view(6, columns, skipped=8), labels_of(CUDA, 6, columns), compare=noted())
        check_loss(numbers.normal(11, columns)[::2], labels_of(CUDA, 6, columns), compare=noted())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_tokens_extremes_and_what_is_not_finite(dtype):
    check_ignored(CUDA, dtype)
    check_not_finite(CUDA, dtype)
    for columns in (40, 17000):
        check_extremes(CUDA, dtype, columns)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_training_batch_against_float32(dtype):
    """The reference as autograd computes it: a float32 copy, whose gradient is rounded once. No such copy is made."""
    tokens, vocabulary = 4096, 50280
    logits = (3 * torch.randn(tokens, vocabulary, device=CUDA, generator=torch.Generator(CUDA).manual_seed(0))).to(dtype)
    labels = labels_of(CUDA, tokens, vocabulary)
    logits.requires_grad_()
    expected = token_loss_naive(logits, labels)
    (reference,) = torch.autograd.grad(expected * 16, logits)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = token_loss(logits, labels)
    (gradient,) = torch.autograd.grad(loss * 16, logits)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1.05 * logits.numel() * logits.element_size()
    note(f"own loss of a batch, {dtype}", loss, expected, 1e-6)
    note(f"own gradient of a batch, {dtype}", gradient, reference, CAP_OF_SAME_ROUNDING[dtype])


# Both round the same float32 numbers but for their last digits, which seldom changes what they are rounded to.
CAP_OF_SAME_ROUNDING = {torch.bfloat16: 1e-3, torch.float16: 2e-4}


def test_beyond_2_to_the_31_logits():
    tokens, vocabulary = 43000, 50280
    if torch.cuda.mem_get_info()[0] < 3 * 2 * tokens * vocabulary:
        pytest.skip("needs 13 GB")
    logits = torch.zeros(tokens, vocabulary, dtype=torch.bfloat16, device=CUDA)
    labels = torch.full((tokens,), -100, device=CUDA)
    labels[-3:] = torch.tensor([7, 0, vocabulary - 1], device=CUDA)
    logits[-3:].normal_(generator=torch.Generator(CUDA).manual_seed(0))
    check_small = logits[-3:].clone().requires_grad_()
    logits.requires_grad_()
    loss, expected = token_loss(logits, labels), token_loss(check_small, labels[-3:])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0.0)
    loss.backward()
    expected.backward()
    assert torch.equal(logits.grad[-3:], check_small.grad)
    assert all(not part.any() for part in logits.grad[:-3].split(4096))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_model_s_loss_is_transformers(dtype, options):
    check_model_loss(CUDA, dtype, options, noted())


@pytest.mark.parametrize("items", [None, 11, "tensor"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32 body", "autocast"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_training_gives_the_same_with_and_without(family, dtype, autocast, items, monkeypatch):
    """The rest of the model with its kernels both times.

    The gradients of the weights are compared where only the head's output is narrow. Under autocast the two ways are the
    same from the logits' gradient on, which is what is compared there: a last bit of it in one of a thousand logits moves
    the gates' bfloat16 gradients by 1.4e-2, whichever kernel it came from.
    """
    model = model_of(family).to(CUDA).train()
    ids = torch.randint(2, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(0)).to(CUDA)
    labels = ids.clone()
    labels[0, :7] = -100
    count = torch.tensor(11) if items == "tensor" else items
    kernels: list[str] = []
    of_logits: list[torch.Tensor] = []
    launch = test_token_loss.module._launch

    def counted(kernel, *arguments, **others):
        kernels.append(kernel)
        launch(kernel, *arguments, **others)

    def narrowed(head, arguments, logits):
        logits = logits.to(dtype)
        logits.register_hook(of_logits.append)
        return logits

    def train() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        with torch.autocast(CUDA.type, dtype=dtype, enabled=autocast):
            loss = model(ids, labels=labels, num_items_in_batch=count).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.lm_head.register_forward_hook(narrowed)
    monkeypatch.setattr(test_token_loss.module, "_launch", counted)
    loss, gradients = train()
    assert len(kernels) == 2
    monkeypatch.setattr("remamba_hf.modeling.recurrent_generation.loss_kernels_run", lambda logits: False)
    expected, references = train()
    assert len(kernels) == 2
    assert gradients.keys() == references.keys()
    how = f"with and without, {dtype}, {'autocast' if autocast else 'float32 body'}"
    note(f"{family}'s loss {how}", loss, expected, 1e-5)
    gradient, reference = of_logits
    assert gradient.dtype == reference.dtype == dtype
    note(f"{family}'s logits' gradient {how}", gradient, reference, CAP_OF_SAME_ROUNDING[dtype])
    for name, gradient in gradients.items():
        assert gradient.isfinite().all(), name
        if not autocast and references[name].any():
            note(f"{family}'s gradients {how}", gradient, references[name], 1e-2)


def test_the_second_device_while_the_first_is_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    second = torch.device("cuda:1")
    check_loss(Numbers(second, torch.bfloat16).normal(5, 1000), labels_of(second, 5, 1000), compare=noted())


def test_nothing_waits_for_the_device():
    model, numbers = model_of("remamba").to(CUDA), Numbers(CUDA, torch.bfloat16)
    logits, labels = numbers.normal(2, 9, VOCABULARY).requires_grad_(), labels_of(CUDA, 18, VOCABULARY).view(2, 9)
    model.language_modeling_loss(logits, labels).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model.language_modeling_loss(logits, labels).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
