# SPDX-License-Identifier: Apache-2.0
"""The loss of narrow logits against PyTorch's in float64, and where a model's loss takes it.

On a CPU the functions run their references; `test_in_tritons_interpreter` runs this file once more, in a process of its own
in which they run their kernels. The checks are functions of the device, for the GPU tests to use.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from modeling_tests.modeling.test_decode_kernels import CPU, Compare, Numbers, assert_near
from modeling_tests.modeling.tiny_models import VOCABULARY, tiny_memmamba, tiny_model
from modeling_tests.modeling.tritons_interpreter import INTERPRETED, run_in_interpreter
from remamba_hf.modeling import token_loss as module
from remamba_hf.modeling.optional_kernels import without_kernels
from remamba_hf.modeling.token_loss import loss_kernels_run, token_loss, token_loss_naive

DTYPES = [torch.float32, torch.float16]  # Triton's interpreter cuts bfloat16 off instead of rounding it
# Of gradients, which are rounded to the logits' dtype; the loss is in float32.
CAPS = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 3e-3}
FAMILIES = ["remamba", "remamba2", "memmamba"]
SIZES = [(1, 1), (1, 2), (5, 7), (3, 16), (9, 50), (2, 1000), (3, 8192), (4, 8193), (2, 20011)]


def test_in_tritons_interpreter():
    run_in_interpreter(__file__)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Kernels that were launched since."""
    launch, kernels = module._launch, []

    def counted(kernel: Any, *arguments: Any, **options: Any) -> None:
        kernels.append(kernel)
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(module, "_launch", counted)
    return kernels


def exact(
    logits: torch.Tensor, labels: torch.Tensor, scale: float = 1.0, ignored: int = -100
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient in float64 of the same, rounded logits."""
    wide = logits.detach().double().requires_grad_()
    loss = F.cross_entropy(wide, labels, ignore_index=ignored, reduction="sum")
    (loss * scale).backward()
    return loss.detach(), wide.grad


def labels_of(device: torch.device, tokens: int, vocabulary: int) -> torch.Tensor:
    """The first and the last of the vocabulary among them; every third is ignored, if there is more than one."""
    labels = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(0))
    labels[-1], labels[0] = 0, vocabulary - 1
    labels[1::3] = -100
    return labels.to(device)


def check_loss(
    logits: torch.Tensor, labels: torch.Tensor, scale: float = 1.0, ignored: int = -100, compare: Compare = assert_near
) -> None:
    logits = logits.detach().requires_grad_()
    assert loss_kernels_run(logits) == (INTERPRETED or logits.is_cuda)
    loss = token_loss(logits, labels, ignored)
    (loss * scale).backward()
    expected, gradient = exact(logits, labels, scale, ignored)
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    assert (logits.grad.dtype, logits.grad.shape) == (logits.dtype, logits.shape)
    compare(f"loss, {logits.dtype}", loss.detach(), expected, 1e-5)
    compare(f"gradient, {logits.dtype}", logits.grad, gradient, CAPS[logits.dtype])
    assert not logits.grad[labels == ignored].any()
    with torch.no_grad():
        assert torch.equal(token_loss(logits, labels, ignored), loss.detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_any_sizes(sizes, dtype, launched):
    logits = Numbers(CPU, dtype).normal(*sizes, scale=3.0)
    # Gradients of float16 have few digits where they are tiny: a loss scale is what keeps them.
    check_loss(logits, labels_of(CPU, *sizes), 256.0)
    assert bool(launched) == INTERPRETED


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_a_wider_tensor(dtype):
    numbers = Numbers(CPU, dtype)
    check_loss(numbers.view(6, 37), labels_of(CPU, 6, 37))
    check_loss(numbers.normal(11, 40)[::2], labels_of(CPU, 6, 40))
    check_loss(numbers.normal(1, 40).expand(6, 40), labels_of(CPU, 6, 40))


def test_columns_that_are_not_neighbours_take_the_reference(launched):
    logits, labels = Numbers(CPU, torch.float16).normal(37, 6).t(), labels_of(CPU, 6, 37)
    assert not loss_kernels_run(logits)
    assert torch.equal(token_loss(logits, labels), token_loss_naive(logits, labels))
    assert not launched


def check_ignored(device: torch.device, dtype: torch.dtype) -> None:
    """None count of all, and none of the numbers in their rows; another index may stand for them."""
    logits = Numbers(device, dtype).normal(4, 30).requires_grad_()
    loss = token_loss(logits, torch.full((4,), -100, device=device))
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()
    check_loss(logits, torch.tensor([5, 0, 29, 5], device=device), ignored=5)
    if loss_kernels_run(logits):
        broken, labels = logits.detach().clone(), labels_of(device, 4, 30)
        broken[1] = float("nan")
        broken.requires_grad_()
        token_loss(broken, labels).backward()
        expected = exact(logits, labels)[1]
        assert_near("gradient", broken.grad, expected, CAPS[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ignored_tokens(dtype):
    check_ignored(CPU, dtype)


def check_extremes(device: torch.device, dtype: torch.dtype, columns: int) -> None:
    """Logits of +-10,000 keep the digits of small differences; -inf has no probability, wherever it stands."""
    numbers = Numbers(device, dtype)
    labels = labels_of(device, 6, columns)
    for offset in (1e4, -1e4):
        near_the_top = numbers.normal(6, columns)
        near_the_top[:, ::2] = offset
        near_the_top[:, 1::2] = -1e4
        labels[2:] = torch.tensor([0, -100, 2, columns - 1 - (columns - 1) % 2], device=device)
        labels[0] = 0
        check_loss(near_the_top, labels)
    masked = numbers.normal(6, columns)
    masked[:, : columns // 2 + 3] = float("-inf")
    masked[:, columns - 2] = float("-inf")
    check_loss(masked, labels.clamp(max=-1).where(labels < 0, columns - 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [40, 17000])
def test_extreme_logits(columns, dtype):
    check_extremes(CPU, dtype, columns)


def check_not_finite(device: torch.device, dtype: torch.dtype) -> None:
    """What is infinite or no number in PyTorch's loss and gradient, is here."""
    inf, nan = float("inf"), float("nan")
    for row in ([-inf] * 4, [1.0, inf, 0.0, 2.0], [1.0, nan, 0.0, 2.0], [-inf, 1.0, 0.0, 2.0]):
        logits = torch.tensor([row], dtype=dtype, device=device).requires_grad_()
        label = torch.zeros(1, dtype=torch.long, device=device)
        loss = token_loss(logits, label)
        loss.backward()
        expected, gradient = exact(logits, label)
        torch.testing.assert_close(loss.detach(), expected.float(), equal_nan=True)
        torch.testing.assert_close(logits.grad, gradient.to(dtype), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite(dtype):
    check_not_finite(CPU, dtype)


def test_the_gradient_is_the_slope_of_the_loss():
    logits, labels = Numbers(CPU, torch.float32).normal(3, 11).requires_grad_(), torch.tensor([4, -100, 10])
    (gradient,) = torch.autograd.grad(token_loss(logits, labels), logits)
    step = 1e-2
    for row in range(3):
        for column in range(11):
            sides = []
            for sign in (1, -1):
                moved = logits.detach().clone()
                moved[row, column] += sign * step
                sides.append(token_loss(moved, labels).item())
            assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(gradient[row, column].item(), abs=3e-4)


def test_the_logits_stay_as_they_are():
    logits, labels = Numbers(CPU, torch.float16).normal(3, 11).requires_grad_(), torch.tensor([4, -100, 10])
    before = logits.detach().clone()
    token_loss(logits, labels).backward()
    assert torch.equal(logits.detach(), before)
    if loss_kernels_run(logits):
        changed = logits * 1
        loss = token_loss(changed, labels)
        changed += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_bad_labels_are_named():
    logits = torch.zeros(3, 5, dtype=torch.float16)
    for wrong in (5, -1, 10**12):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            token_loss(logits, torch.tensor([0, wrong, 1]))
    with pytest.raises(ValueError, match=r"Logits \(3, 5\) and labels \(2,\) do not fit"):
        token_loss(logits, torch.zeros(2, dtype=torch.long))


def test_no_tokens():
    assert token_loss(torch.zeros(0, 5, dtype=torch.float16), torch.zeros(0, dtype=torch.long)).item() == 0.0


def model_of(family: str) -> Any:
    return tiny_memmamba(torch.float32) if family == "memmamba" else tiny_model(torch.float32, family=family)


def check_model_loss(device: torch.device, dtype: torch.dtype, options: dict[str, Any], compare: Compare) -> None:
    """`language_modeling_loss` of narrow logits against transformers' loss, with its gradient."""
    model = model_of("remamba").to(device)
    numbers = Numbers(device, dtype)
    logits = numbers.normal(2, 9, VOCABULARY, scale=2.0).requires_grad_()
    labels = labels_of(device, 18, VOCABULARY).view(2, 9)
    labels = labels.masked_fill(labels == -100, options.get("ignore_index", -100))
    own = dict(options)
    if own.get("shift_labels") == "given":
        own["shift_labels"] = labels.flip(1)
    results = []
    for function in (model.language_modeling_loss, ForCausalLMLoss):
        loss = function(logits=logits, labels=labels, **({"vocab_size": VOCABULARY} if results else {}), **own)
        results.append((loss, *torch.autograd.grad(loss, logits)))
    (loss, gradient), (expected, reference) = results
    assert (loss.dtype, gradient.dtype) == (expected.dtype, dtype) == (torch.float32, dtype)
    compare(f"model loss, {dtype}", loss, expected, 1e-5)
    compare(f"model loss's gradient, {dtype}", gradient, reference, CAPS[dtype])


OPTIONS = [
    {},
    dict(num_items_in_batch=7),
    dict(num_items_in_batch=torch.tensor(7)),
    dict(num_items_in_batch=None, shift_labels="given"),
    dict(ignore_index=3),
    dict(shift_labels="given", num_items_in_batch=3.0, ignore_index=-100),
    dict(output_attentions=False),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_model_s_loss_is_transformers(options, launched):
    check_model_loss(CPU, torch.float16, options, assert_near)
    assert len(launched) == (2 if INTERPRETED else 0)


def test_a_batch_without_labels_has_no_mean():
    model, logits = model_of("remamba"), torch.zeros(1, 4, VOCABULARY, dtype=torch.float16)
    labels = torch.full((1, 4), -100)
    assert model.language_modeling_loss(logits, labels).isnan()
    assert model.language_modeling_loss(logits.double(), labels).isnan()


def test_what_transformers_loss_is_asked_for_otherwise(launched):
    """A loss function of the user, arguments of a loss to come, logits in float32, and comparisons without kernels."""
    model, labels = model_of("remamba"), torch.ones(1, 4, dtype=torch.long)
    logits = torch.zeros(1, 4, VOCABULARY, dtype=torch.float16)
    model.language_modeling_loss(logits.float(), labels)
    model.language_modeling_loss(logits, labels, label_smoothing=0.1)
    with without_kernels():
        model.language_modeling_loss(logits, labels)
    model.loss_function = lambda logits, labels, vocab_size, **others: logits.sum() + vocab_size
    for dtype in (torch.float16, torch.float64):
        assert model.language_modeling_loss(logits.to(dtype), labels).item() == VOCABULARY
    assert not launched


def test_a_float64_model_s_loss_honours_its_arguments():
    model, numbers = model_of("remamba"), Numbers(CPU, torch.float64)
    logits, labels = numbers.normal(2, 9, VOCABULARY), labels_of(CPU, 18, VOCABULARY).view(2, 9)
    for options in ({}, dict(num_items_in_batch=5), dict(shift_labels=labels), dict(shift_labels=labels, ignore_index=-100)):
        loss = model.language_modeling_loss(logits, labels, **options)
        assert loss.dtype == torch.float64
        assert loss.item() == pytest.approx(ForCausalLMLoss(logits, labels, VOCABULARY, **options).item(), rel=1e-6)


@pytest.mark.skipif(not INTERPRETED, reason="the references have nothing to be found out by")
def test_the_checks_find_errors(monkeypatch):
    launch = module._launch

    def with_other_labels(kernel: Any, logits: torch.Tensor, labels: torch.Tensor, *others: Any, **options: Any) -> None:
        launch(kernel, logits, labels.where(labels < 0, 0), *others, **options)

    monkeypatch.setattr(module, "_launch", with_other_labels)
    with pytest.raises(AssertionError):
        check_loss(Numbers(CPU, torch.float32).normal(5, 7), labels_of(CPU, 5, 7))
