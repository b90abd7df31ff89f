# SPDX-License-Identifier: Apache-2.0
"""Training forwards: gradients of the two stages against autograd through the float64 reference, and what must not
change them."""

import copy

import pytest
import torch
import torch.nn.functional as F

from modeling_tests.modeling import reference_two_stages as reference
from modeling_tests.modeling.tiny_models import RATIO, SPAN, START, assert_close, padded, random_rows, tiny_model
from remamba_hf.modeling.selective_compression import Adaptation

PROMPTS, LENGTHS = (9, 20, 37, 2), (12, 26, 43, 4)


def labelled_batch(padding="both", prompts=PROMPTS, lengths=LENGTHS, seed=1):
    rows = random_rows(lengths, seed)
    ids, mask, places = padded(rows, padding)
    labels = torch.full_like(ids, -100)
    for row, prompt, place in zip(range(len(rows)), prompts, places, strict=True):
        labels[row, place.start + prompt : place.stop] = ids[row, place.start + prompt : place.stop]
    return rows, dict(input_ids=ids, attention_mask=mask, labels=labels)


def gradients(model, *batches, **settings):
    """Loss (mean over the batches, by labels) and every parameter's gradient."""
    model.zero_grad()
    items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    total = 0.0
    for batch in batches:
        loss = model(**batch, num_items_in_batch=items, **settings).loss
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(actual, expected, limit):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], expected[name], limit, f"gradient of {name}")


@pytest.mark.thinned(3)
@pytest.mark.smoke
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("scale_score_gradient", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_gradients_agree_with_the_reference(family, padding, scale_score_gradient, training):
    model = tiny_model(family=family, scale_score_gradient=scale_score_gradient).train(training)
    rows, batch = labelled_batch(padding)
    loss, actual = gradients(model, batch)
    weights = {name: value.detach().clone().requires_grad_() for name, value in model.state_dict().items()}
    expected_loss, count = 0, 0
    for row, prompt in zip(rows, PROMPTS, strict=True):
        logits, *_ = reference.two_stages(
            weights, model.config, row, prompt, START, SPAN, RATIO, scale_gradient=scale_score_gradient
        )
        expected_loss = expected_loss + F.cross_entropy(logits[prompt - 1 : -1], row[prompt:], reduction="sum")
        count += len(row) - prompt
    (expected_loss / count).backward()
    assert loss == pytest.approx(expected_loss.item() / count, rel=1e-10)
    assert all(value.grad.abs().max() > 0 for value in weights.values()), "the reference must reach every weight"
    assert_same_gradients(actual, {name: value.grad for name, value in weights.items()}, 1e-9)


@pytest.mark.parametrize("selection", ["stride", "random", "multiplicative"])
def test_gradients_of_the_ablations(family, selection):
    model = tiny_model(family=family, selection=selection, scale_score_gradient=False)
    (row,) = random_rows([40])
    labels = torch.where(torch.arange(40) < 32, -100, row)[None]
    output = model(row[None], labels=labels)
    output.loss.backward()
    begin = reference.window_of(32, START, SPAN, RATIO)[0]
    fixed = [position - begin for position in output.compressed_positions[0].tolist()]
    weights = {name: value.detach().clone().requires_grad_() for name, value in model.state_dict().items()}
    logits, *_ = reference.two_stages(weights, model.config, row, 32, START, SPAN, RATIO, fixed=fixed, selection=selection)
    F.cross_entropy(logits[31:-1], row[32:]).backward()
    for name, parameter in model.named_parameters():
        if weights[name].grad is None:
            assert parameter.grad is None or parameter.grad.abs().max() == 0, name
        else:
            assert_close(parameter.grad, weights[name].grad, 1e-9, f"gradient of {name}")


def test_a_numerical_check(family):
    """Not only against autograd: finite differences through everything, with the selection far from a tie."""
    model = tiny_model(family=family, num_hidden_layers=2, hidden_size=8, scale_score_gradient=False)
    _, batch = labelled_batch("left", prompts=(9, 14), lengths=(12, 17))
    _, actual = gradients(model, batch)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
        losses = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                losses.append(model(**batch).loss.item())
                parameter.add_(direction, alpha=-step)
        numerical = (losses[0] - losses[1]) / 2e-6
        assert numerical == pytest.approx((actual[name] * direction).sum().item(), rel=1e-4, abs=1e-8), name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(family, use_reentrant):
    """The authors' code loses alpha under checkpointing: the compressor's gradients would vanish."""
    model = tiny_model(family=family).train()
    _, batch = labelled_batch()
    loss, expected = gradients(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert model.is_gradient_checkpointing
    calls = []
    handle = model.backbone.layers[1].mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpointed_loss, actual = gradients(model, batch)
    handle.remove()
    assert len(calls) == 4, "two passes, each of them twice"
    assert checkpointed_loss == loss
    assert_same_gradients(actual, expected, 1e-12)
    assert actual["backbone.compressor.query.0.weight"].abs().max() > 0


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_alpha_gets_its_gradient_under_checkpointing(family, use_reentrant):
    """Of alpha itself, every one its own, through all layers."""
    model = tiny_model(family=family).train()
    hidden_states = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    where, lengths = torch.tensor([1, 2, 5, 10]), torch.tensor([9, 6])

    def alpha_gradient():
        scores = torch.tensor([-0.5, 0.3, 0.6, 0.9], dtype=torch.float64, requires_grad=True)
        alpha = Adaptation(where, torch.sigmoid(scores))
        states = model.backbone.run_layers(hidden_states, lengths, alpha, None, None)
        (states[0, 8] * states[1, 5]).sum().backward()
        return scores.grad

    expected = alpha_gradient()
    assert (expected != 0).all()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert_close(alpha_gradient(), expected, 1e-12, "gradient of alpha")


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1], [2, 2], [3, 1]], ids=str)
def test_accumulation_is_one_large_batch(family, sizes):
    model = tiny_model(family=family).train()
    _, batch = labelled_batch()
    loss, expected = gradients(model, batch)
    parts = zip(*(value.split(sizes) for value in batch.values()), strict=True)
    small = [dict(zip(batch, part, strict=True)) for part in parts]
    accumulated_loss, actual = gradients(model, *small)
    assert accumulated_loss == pytest.approx(loss, rel=1e-12)
    assert_same_gradients(actual, expected, 1e-10)


@pytest.mark.parametrize("padding", ["left", "right", "both"])
def test_padding_changes_no_gradient(family, padding):
    model = tiny_model(family=family).train()
    rows, batch = labelled_batch(padding)
    _, actual = gradients(model, batch)
    alone = []
    for row, prompt in zip(rows, PROMPTS, strict=True):
        labels = torch.where(torch.arange(len(row)) < prompt, -100, row)
        alone.append(dict(input_ids=row[None], labels=labels[None]))
    _, expected = gradients(model, *alone)
    assert_same_gradients(actual, expected, 1e-10)


def test_pads_get_no_gradient(family):
    model = tiny_model(family=family)
    _, batch = labelled_batch("left")
    embeddings = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    model(inputs_embeds=embeddings, **batch).loss.backward()
    pads = batch["attention_mask"] == 0
    assert embeddings.grad[pads].abs().max() == 0
    # A row's last token predicts nothing; every other one counts.
    assert (embeddings.grad[~pads].abs().amax(-1) > 0).sum() == sum(LENGTHS) - len(LENGTHS)


def test_rows_without_a_window_give_finite_gradients(family):
    """A plain row among compressed ones, with compressor biases at zero: norms of zero vectors everywhere."""
    model = tiny_model(family=family).train()
    model.initialize_compressor()
    _, batch = labelled_batch("both", prompts=(0, 20, 1, 2))
    batch["labels"][0] = batch["input_ids"][0].masked_fill(batch["attention_mask"][0] == 0, -100)
    loss, actual = gradients(model, batch)
    assert loss == pytest.approx(loss)
    assert all(gradient.isfinite().all() for gradient in actual.values())
    assert actual["backbone.compressor.key.0.weight"].abs().max() > 0


def test_a_batch_without_any_window_trains(family):
    model = tiny_model(family=family).train()
    ids = torch.stack(random_rows([10, 10]))
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert model.backbone.layers[0].mixer.A_log.grad.abs().max() > 0


def test_training_draws(family):
    """One draw for the batch, from torch's seed; per-call settings and eval mode draw nothing."""
    ranges = dict(train_compression_span=(0.2, 0.8), train_compression_ratio=(0.1, 0.9))
    model = tiny_model(family=family, **ranges).train()
    _, batch = labelled_batch()

    def kept(seed, **settings):
        torch.manual_seed(seed)
        with torch.no_grad():
            return (model(**batch, **settings).compressed_positions >= 0).sum(1).tolist()

    assert kept(1) == kept(1)
    assert len({tuple(kept(seed)) for seed in range(6)}) > 3
    fixed = dict(compression_span=0.5, compression_ratio=0.3)
    before = kept(1, **fixed)
    assert before == kept(2, **fixed)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with torch.no_grad():
        model(**batch, **fixed)
        model.eval()(**batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert kept(1) == kept(2) == before


def test_seeded_draws_belong_to_the_rows(family):
    """A row keeps the same vectors in whichever batch it comes; evaluation draws nothing; bad seeds are named."""
    ranges = dict(train_compression_span=(0.2, 0.8), train_compression_ratio=(0.1, 0.9))
    model = tiny_model(family=family, **ranges).train()
    _, batch = labelled_batch()
    rows = len(batch["input_ids"])
    seeds = torch.arange(rows) + 40
    together = model(**batch, compression_seeds=seeds).compressed_positions
    for row in range(rows):
        alone = model(
            **{name: value[row : row + 1] for name, value in batch.items()}, compression_seeds=seeds[row : row + 1]
        )
        kept = together[row][together[row] >= 0]
        assert torch.equal(alone.compressed_positions[0], kept)
    assert not torch.equal(model(**batch, compression_seeds=seeds + 9).compressed_positions, together)
    plain = model.eval()(**batch).compressed_positions
    assert torch.equal(model(**batch, compression_seeds=seeds).compressed_positions, plain)
    for wrong in (seeds[:-1], seeds.double(), 3):
        with pytest.raises(ValueError, match=f"compression_seeds must be {rows} integers"):
            model(**batch, compression_seeds=wrong)


def test_training_with_drawn_settings_is_the_same_under_checkpointing(family):
    model = tiny_model(family=family, train_compression_span=(0.2, 0.8), train_compression_ratio=(0.1, 0.9)).train()
    _, batch = labelled_batch()
    torch.manual_seed(7)
    loss, expected = gradients(model, batch)
    model.gradient_checkpointing_enable()
    torch.manual_seed(7)
    checkpointed_loss, actual = gradients(model, batch)
    assert checkpointed_loss == loss
    assert_same_gradients(actual, expected, 1e-12)


def test_training_uses_no_cache_unless_asked(family):
    model = tiny_model(family=family).train()
    _, batch = labelled_batch()
    assert model(**batch).cache_params is None
    assert model(**batch, use_cache=True).cache_params is not None


def test_gradients_through_a_returned_cache(family):
    """The states of one forward continue in the next with their gradients, though the cache moves on in place."""
    model = tiny_model(family=family)
    ids = torch.stack(random_rows([20, 20]))
    rates = model.backbone.layers[0].mixer.A_log
    (expected,) = torch.autograd.grad(model(ids, use_cache=False).logits[:, 12:].square().sum(), rates)
    cache = model(ids[:, :12], use_cache=True).cache_params
    (actual,) = torch.autograd.grad(model(ids[:, 12:], cache_params=cache).logits.square().sum(), rates)
    assert_close(actual, expected, 1e-9, "gradient of A_log")


def test_checkpointing_refuses_a_filled_cache(family):
    """The recomputation would start from a state that has moved on: right gradients or an error, never wrong ones."""
    model = tiny_model(family=family)
    ids = torch.stack(random_rows([20, 20]))
    rates = model.backbone.layers[0].mixer.A_log
    with torch.no_grad():
        cache = model(ids[:, :12], use_cache=True).cache_params
        other = copy.deepcopy(cache)
    (expected,) = torch.autograd.grad(model(ids[:, 12:], cache_params=other).logits.square().sum(), rates)
    model.train().gradient_checkpointing_enable()
    try:
        (actual,) = torch.autograd.grad(model(ids[:, 12:], cache_params=cache).logits.square().sum(), rates)
    except ValueError:
        return
    assert_close(actual, expected, 1e-9, "gradient of A_log")


def test_frozen_backbone_trains_the_compressor_alone(family):
    model = tiny_model(family=family).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("compressor" in name)
    reference_model = copy.deepcopy(model).requires_grad_(True)
    _, batch = labelled_batch()
    _, expected = gradients(reference_model, batch)
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        if "compressor" in name:
            assert_close(parameter.grad, expected[name], 1e-10, name)
        else:
            assert parameter.grad is None, name
