# SPDX-License-Identifier: Apache-2.0
"""MemMamba against the float64 reference, row by row and token by token, and what a memory must not do: look ahead, be
shared, forget while decoding, grow, or change the Mamba it started from."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DynamicCache, MambaConfig, MambaForCausalLM, StaticCache

from modeling_tests.modeling import reference_memmamba as reference
from modeling_tests.modeling.tiny_models import (
    assert_close,
    assert_same_memory,
    assert_same_weights,
    cached_states,
    memory_states,
    padded,
    random_rows,
    tiny_memmamba,
)
from remamba_hf import MemMambaConfig, MemMambaForCausalLM, MemMambaModel, ReMambaForCausalLM
from remamba_hf.modeling.note_memory import tokens_read

FUSIONS = ("gated", "residual", "elementwise", "conv1d", "weighted")
OPTIONS = [
    {},
    dict(write_rule="fifo"),
    dict(write_rule="periodic", write_period=7, write_span=3),
    dict(write_rule="periodic", write_period=7, write_span=3, write_threshold=0.4),
    dict(write_rule="fifo", write_threshold=0.5),
    dict(recency_weight=0.1),
    dict(write_threshold=0.6),
    *(dict(fusion=fusion) for fusion in FUSIONS[1:]),
    *(dict(fusion=fusion, read_threshold=0.5) for fusion in FUSIONS),
    *(dict(fusion=fusion, fusion_position="post") for fusion in FUSIONS),
    dict(pooling="max", pooling_window=3),
    dict(pooling="mean", pooling_window=3),
    dict(pooling="max", pooling_window=9),
    dict(pooling="mean", pooling_window=9, chunk_size=7),
    dict(pooling="mean", pooling_window=1),
    dict(chunk_size=1),
    dict(chunk_size=1, pool_size=1, pooling="max"),
    dict(chunk_size=9, pool_size=3),
    dict(chunk_size=3, pool_size=50),
    dict(chunk_size=64),
    dict(note_heads=1),
    dict(note_heads=8, note_size=16),
    dict(cross_layer_period=0),
    dict(cross_layer_period=1, cross_layer_group=1),
    dict(cross_layer_period=1, cross_layer_group=3, num_hidden_layers=4),
    dict(cross_layer_period=3, cross_layer_group=9, num_hidden_layers=4),
    dict(use_bias=True, use_conv_bias=False),
    dict(tie_word_embeddings=True, residual_in_fp32=False),
]
LENGTHS = (33, 1, 8, 19)  # in chunks of 4: one over, one, at a border, one short


def weights_of(model, **settings):
    """Its weights by name; a tied head is the embeddings."""
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return {name: value.requires_grad_(**settings) for name, value in weights.items()} if settings else weights


def labelled(rows, padding):
    """A batch in which every token of a row but its first is a label."""
    ids, mask, places = padded(rows, padding)
    labels = torch.where(mask.bool(), ids, -100)
    for row, place in enumerate(places):
        labels[row, place.start] = -100
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


def packed(model, memories):
    return [reference.packed(model.config, memory) for memory in memories]


def assert_row_is_the_references(model, text, logits, cache, row, name, memories=None):
    """`logits` of a text that continues what `memories` hold (which move on), and the row's states behind it."""
    expected, memories, _ = reference.read(weights_of(model), model.config, text, memories)
    assert_close(logits, expected, 1e-10, f"logits, {name}")
    assert_same_memory(memory_states(cache, row), packed(model, memories), 1e-10, name)
    return memories


# Against the reference


@pytest.mark.smoke
@pytest.mark.parametrize("settings", OPTIONS, ids=str)
def test_every_option_agrees_with_the_reference(settings):
    model = tiny_memmamba(**settings)
    rows = random_rows(LENGTHS)
    ids, mask, places = padded(rows, "both")
    with torch.no_grad():
        output = model(ids, attention_mask=mask, use_cache=True)
    for row, place in enumerate(places):
        assert_row_is_the_references(model, rows[row], output.logits[row, place], output.cache_params, row, f"row {row}")


@pytest.mark.parametrize(("settings", "training"), [({}, False), *((settings, True) for settings in OPTIONS)], ids=str)
def test_gradients_agree_with_the_reference(settings, training):
    model = tiny_memmamba(**settings).train(training)
    rows = random_rows((17, 6))
    model(**labelled(rows, "both")).loss.backward()
    weights = weights_of(model, requires_grad=True)
    losses = [reference.loss(weights, model.config, row, row) * (len(row) - 1) for row in rows]
    (sum(losses) / sum(len(row) - 1 for row in rows)).backward()
    for name, parameter in model.named_parameters():
        if weights[name].grad is None:
            assert parameter.grad is None or parameter.grad.abs().max() == 0, name
        else:
            assert_close(parameter.grad, weights[name].grad, 1e-8, f"gradient of {name}")
    if not settings:
        assert all(value.grad is not None and value.grad.abs().max() > 0 for value in weights.values())


def test_a_numerical_check():
    """Not only against autograd: finite differences through everything, with the choice of notes far from a tie."""
    model = tiny_memmamba(hidden_size=8)
    ids = torch.stack(random_rows([19, 19]))
    model(ids, labels=ids).loss.backward()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, dtype=parameter.dtype, generator=generator)
        losses = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                losses.append(model(ids, labels=ids).loss.item())
                parameter.add_(direction, alpha=-step)
        numerical = (losses[0] - losses[1]) / 2e-6
        assert numerical == pytest.approx((parameter.grad * direction).sum().item(), rel=1e-4, abs=1e-8), name


# Whole, in pieces, token by token


@pytest.mark.smoke
@pytest.mark.parametrize("padding", ["left", "right", "both"])
def test_prefill_in_chunks_is_each_rows_own_pass(padding):
    """Also of ragged rows, which end in different chunks, and of one without any token."""
    model = tiny_memmamba()
    rows = random_rows((33, 0, 1, 8, 19))
    ids, mask, places = padded(rows, padding)
    with torch.no_grad():
        alone = [model(row[None], use_cache=True) if len(row) else None for row in rows]
        for chunk in (1, 2, 3, 4, 7, 64):
            output = model(ids, attention_mask=mask, use_cache=True, prefill_chunk_length=chunk)
            assert output.logits.isfinite().all()
            for row, (place, expected) in enumerate(zip(places, alone, strict=True)):
                actual = memory_states(output.cache_params, row)
                if expected is None:
                    assert all((part == 0).all() for layer in actual for part in layer), "it read nothing"
                    continue
                assert_close(output.logits[row, place], expected.logits[0], 1e-10, f"logits in {chunk}, row {row}")
                assert_same_memory(actual, memory_states(expected.cache_params, 0), 1e-10, f"in {chunk}, row {row}")


@pytest.mark.parametrize("settings", [settings for settings in OPTIONS if settings], ids=str)
def test_steps_and_pieces_are_the_whole(settings):
    model = tiny_memmamba(**settings)
    ids = torch.stack(random_rows([33, 33]))
    with torch.no_grad():
        whole = model(ids, use_cache=True)
        for pieces in ([1] * 33, [5, 1, 14, 1, 12]):
            cache, outputs = DynamicCache(config=model.config), []
            for piece in ids.split(pieces, dim=1):
                outputs.append(model(piece, cache_params=cache, use_cache=True).logits)
            assert_close(torch.cat(outputs, dim=1), whole.logits, 1e-10, f"logits in {pieces}")
            assert_same_memory(cache, whole.cache_params, 1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_random_cuts(seed):
    """A text of 150 tokens cut anywhere equals the whole; cuts of one token are decoding steps."""
    model = tiny_memmamba(chunk_size=(4, 1, 16, 7, 64)[seed], pool_size=(5, 3, 20, 9, 8)[seed])
    ids = torch.stack(random_rows([150, 150], seed))
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randperm(149, generator=generator)[: 3 + 20 * seed].add(1).sort().values.tolist()
    with torch.no_grad():
        whole = model(ids, use_cache=True)
        cache = DynamicCache(config=model.config)
        pieces = [model(piece, cache_params=cache, use_cache=True).logits for piece in ids.tensor_split(cuts, dim=1)]
    assert_close(torch.cat(pieces, dim=1), whole.logits, 1e-10, f"logits with cuts at {cuts}")
    assert_same_memory(cache, whole.cache_params, 1e-10)


def test_steps_with_gradients_enabled_are_the_same():
    model = tiny_memmamba()
    ids = torch.stack(random_rows([12, 12]))
    cache = model(ids[:, :7], use_cache=True).cache_params
    expected = model(ids).logits
    for t in range(7, 12):
        assert_close(model(ids[:, t : t + 1], cache_params=cache).logits[:, 0], expected[:, t], 1e-10)


def test_gradients_through_a_returned_cache():
    """The notes of one forward are read in the next with their gradients, though the cache moves on in place."""
    model = tiny_memmamba()
    ids = torch.stack(random_rows([20, 20]))
    memory = model.backbone.layers[0].memory
    weights = [memory.note.weight, memory.write_score.weight, memory.token_reader.query.weight]
    expected = torch.autograd.grad(model(ids, use_cache=False).logits[:, 10:].square().sum(), weights)
    cache = model(ids[:, :10], use_cache=True).cache_params
    actual = torch.autograd.grad(model(ids[:, 10:], cache_params=cache).logits.square().sum(), weights)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, 1e-9, "gradient")


# Pads, ragged rows, each row's own clock


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("padding", "settings"),
    [
        *((padding, {}) for padding in ("left", "right", "both")),
        *(("both", settings) for settings in (dict(chunk_size=1), dict(chunk_size=7), dict(pooling="max"))),
    ],
    ids=str,
)
def test_turns_of_rows_at_different_places_of_their_chunks(settings, padding):
    """Ragged texts, then ragged pieces, rows without any token among them; then steps, in which some rows' chunks end."""
    model = tiny_memmamba(**settings)
    texts = random_rows((1, 2, 3, 4, 9, 30, 47))
    ids, mask, _ = padded(texts, padding)
    turns = [(3, 0, 4, 1, 5, 2, 6), *[(1,) * 7] * 5, (2, 7, 1, 8, 0, 8, 1), (4,) * 7, (1, 0, 1, 1, 1, 1, 0)]
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).cache_params
        memories = [reference.read(weights_of(model), model.config, text)[1] for text in texts]
        for turn, lengths in enumerate(turns):
            pieces = random_rows(lengths, seed=turn + 5)
            ids, mask, places = padded(pieces, padding, spare=turn % 2 if max(lengths) > 1 else 0)
            output = model(ids, attention_mask=None if mask.all() else mask, cache_params=cache)
            for row, piece in enumerate(pieces):
                if len(piece):
                    logits, name = output.logits[row, places[row]], f"turn {turn}, row {row}"
                    assert_row_is_the_references(model, piece, logits, cache, row, name, memories[row])
                else:
                    assert_same_memory(memory_states(cache, row), packed(model, memories[row]), 1e-10, f"row {row}")


def test_pads_in_the_middle_of_a_row():
    model = tiny_memmamba()
    (row,) = random_rows([30])
    ids, mask = torch.full((1, 40), 7), torch.zeros(1, 40, dtype=torch.long)
    columns = torch.tensor([*range(2, 5), *range(7, 20), *range(24, 38)])
    ids[0, columns], mask[0, columns] = row, 1
    with torch.no_grad():
        output = model(ids, attention_mask=mask, use_cache=True)
        alone = model(row[None], use_cache=True)
    assert_close(output.logits[:, columns], alone.logits, 1e-12, "logits")
    assert_same_memory(output.cache_params, alone.cache_params, 1e-12)


def test_a_batch_of_pads_alone():
    model = tiny_memmamba()
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    with torch.no_grad():
        output = model(ids, attention_mask=mask, use_cache=True)
        text = torch.stack(random_rows([11, 11]))
        later = model(text, cache_params=output.cache_params)
        assert output.logits.isfinite().all()
        assert_close(later.logits, model(text).logits, 1e-12, "logits of what follows")


def test_nan_at_pads_goes_nowhere():
    """Embeddings of pads may be uninitialised memory."""
    model = tiny_memmamba()
    ids, mask, places = padded(random_rows(LENGTHS), "left")
    embeddings = model.get_input_embeddings()(ids).detach()
    embeddings[mask == 0] = torch.nan
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=True)
        actual = model(inputs_embeds=embeddings, attention_mask=mask, use_cache=True)
    for row, place in enumerate(places):
        assert_close(actual.logits[row, place], expected.logits[row, place], 1e-12, "logits")
    assert_same_memory(actual.cache_params, expected.cache_params, 1e-12)


@pytest.mark.parametrize("padding", ["left", "right", "both"])
def test_padding_changes_no_gradient(padding):
    model = tiny_memmamba().train()
    rows = random_rows(LENGTHS)
    model(**labelled(rows, padding)).loss.backward()
    actual = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    items = sum(len(row) - 1 for row in rows)
    for row in rows:
        model(row[None], labels=row[None], num_items_in_batch=torch.tensor(items)).loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(actual[name], parameter.grad, 1e-10, f"gradient of {name}")


# What public attempts get wrong


@pytest.mark.parametrize("settings", [{}, dict(chunk_size=1), dict(write_rule="fifo"), dict(pooling="max")], ids=str)
def test_nothing_is_read_ahead(settings):
    """Other tokens from any place on change nothing before it."""
    model = tiny_memmamba(**settings)
    ids, other = torch.stack(random_rows([33, 33])), torch.stack(random_rows([33, 33], seed=2))
    with torch.no_grad():
        expected = model(ids).logits
        for place in (1, 3, 4, 5, 20, 31, 32):
            changed = torch.cat([ids[:, :place], other[:, place:]], dim=1)
            logits = model(changed).logits
            assert_close(logits[:, :place], expected[:, :place], 1e-12, f"logits before {place}")
            assert (logits[:, place:] - expected[:, place:]).abs().max() > 1e-3
            chunked = model(changed, prefill_chunk_length=6).logits
            assert_close(chunked[:, :place], expected[:, :place], 1e-12, f"logits in chunks before {place}")


@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_notes_are_read_from_the_next_chunk_on(chunk):
    """With mixers that add nothing, a token depends on itself and on notes of chunks before its own, on no other one."""
    model = tiny_memmamba(chunk_size=chunk, pool_size=40)
    for layer in model.backbone.layers:
        torch.nn.init.zeros_(layer.mixer.out_proj.weight)
    embeddings = model.get_input_embeddings()(torch.stack(random_rows([22]))).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings).logits
    for t in range(22):
        (gradient,) = torch.autograd.grad(logits[0, t].square().sum(), embeddings, retain_graph=True)
        depends = [column for column in range(22) if gradient[0, column].abs().max() > 0]
        assert depends == [*range(t // chunk * chunk), t]


def test_rows_share_nothing():
    model = tiny_memmamba()
    ids, other = torch.stack(random_rows([33] * 3)), torch.stack(random_rows([33] * 3, seed=2))
    with torch.no_grad():
        expected = model(ids, use_cache=True)
        output = model(torch.stack([other[0], ids[1], other[2]]), use_cache=True)
    assert_close(output.logits[1], expected.logits[1], 1e-12, "logits")
    assert_same_memory(memory_states(output.cache_params, 1), memory_states(expected.cache_params, 1), 1e-12)
    assert (output.logits[0] - expected.logits[0]).abs().max() > 1e-3


def test_nothing_is_remembered_outside_the_cache():
    model = tiny_memmamba()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.stack(random_rows([33, 33]))
    with torch.no_grad():
        first = model(ids, use_cache=True)
        model(torch.stack(random_rows([20] * 4, seed=3)), use_cache=True)
        assert torch.equal(model(ids).logits, first.logits)
    assert not list(model.buffers())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_checkpoints_keys_are_as_documented():
    names = {"norm.weight", "write_score.weight", "write_score.bias", "note.weight", "note_norm.weight"}
    names |= {f"token_reader.{name}.weight" for name in ("query", "key", "value", "output")}
    names |= {"token_reader.sink", "token_fusion.gate.weight", "token_fusion.gate.bias"}
    below = {name.replace("token_", "layer_") for name in names if name.startswith("token_")} | {
        "layer_reader.layer_embedding"
    }
    plain = MambaConfig(num_hidden_layers=5, hidden_size=16, state_size=4, vocab_size=50)
    expected = set(MambaForCausalLM(plain).state_dict())
    for layer in range(5):
        expected |= {f"backbone.layers.{layer}.memory.{name}" for name in names | (below if layer in (2, 4) else set())}
    model = tiny_memmamba(num_hidden_layers=5)
    assert set(model.state_dict()) == expected


def test_the_scorer_learns_from_the_answer():
    """Only the last token's loss: it reaches the scores and notes of tokens thirty columns before, through every layer."""
    model = tiny_memmamba().train()
    ids = torch.stack(random_rows([34, 34]))
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    labels = torch.where(torch.arange(34) < 33, -100, ids)
    for block in model.backbone.layers:  # no way from token to token but the notes
        torch.nn.init.zeros_(block.mixer.out_proj.weight)
    model(inputs_embeds=embeddings, labels=labels).loss.backward()
    for layer, block in enumerate(model.backbone.layers):
        for name in ("write_score.weight", "write_score.bias", "note.weight", "note_norm.weight"):
            assert block.memory.get_parameter(name).grad.abs().max() > 1e-6, f"{name} of layer {layer}"
    assert (embeddings.grad[:, :30].abs().amax(-1) > 1e-8).sum(1).min() >= 3


def wiped(cache):
    """A copy whose pools were emptied."""
    cache = copy.deepcopy(cache)
    for layer in cache.layers:
        layer.recurrent_states[1][:, :-1] = 0
    return cache


def test_memory_is_in_the_returned_cache():
    """What follows reads it, in one piece and step by step."""
    model = tiny_memmamba()
    ids, new = torch.stack(random_rows([30, 30])), torch.stack(random_rows([6, 6], seed=2))
    with torch.no_grad():
        cache = model(ids, use_cache=True).cache_params
        expected = model(torch.cat([ids, new], dim=1)).logits[:, 30:]
        for pieces in ([6], [1] * 6):
            kept, lost = copy.deepcopy(cache), wiped(cache)
            for begin, piece in zip(range(6), new.split(pieces, dim=1), strict=False):
                here = slice(begin, begin + piece.shape[1])
                assert_close(model(piece, cache_params=kept).logits, expected[:, here], 1e-10)
                assert (model(piece, cache_params=lost).logits - expected[:, here]).abs().max() > 1e-2


# The cache


def test_the_cache_is_of_constant_size():
    model = tiny_memmamba()

    def size(cache):
        tensors = [t for layer in cache.layers for t in (*layer.conv_states.values(), *layer.recurrent_states.values())]
        assert len(tensors) == 4 * 3
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    with torch.no_grad():
        cache = model(torch.stack(random_rows([10])), use_cache=True).cache_params
        at_10 = size(cache)
        for piece in torch.stack(random_rows([990], seed=2)).split([900, *[1] * 90], dim=1):
            model(piece, cache_params=cache)
    assert cache.layers[0].recurrent_states[1][0, -1, -1] == 1000
    assert size(cache) == at_10
    memory = 3 * 8 * ((8 + 1) * 4 + (5 + 1) * (8 + 3))  # layers, bytes, open chunk, pool
    mixer = 3 * 8 * (32 * 4 + 32 * 4)  # convolution inputs, state
    assert at_10 == memory + mixer


def test_counting_goes_on_where_float32_ends():
    model = tiny_memmamba(torch.float32, write_rule="fifo")
    text = torch.stack(random_rows([12]))
    far = 2**25
    with torch.no_grad():
        cache = model(text[:, :4], use_cache=True).cache_params
        for layer in cache.layers:
            layer.recurrent_states[1][:, -1, -2] += far // 2**20
        for token in text[:, 4:].split(1, dim=1):
            output = model(token, cache_params=cache, output_notes=True)
    assert tokens_read(cache) == [far + 12]
    assert output.note_positions[0][0].tolist() == [far + 7, far + 6, far + 5, far + 4, 3]


@pytest.mark.parametrize("static", [False, True])
def test_cache_reset_reorder_and_copy(static):
    model = tiny_memmamba()
    rows = random_rows((20, 13, 27))
    prompts, mask, _ = padded(rows, "left")
    new = torch.stack(random_rows([3, 3, 3], seed=2))

    def read(cache=None):
        if cache is None and static:
            cache = StaticCache(config=model.config, max_cache_len=64)
        return model(prompts, attention_mask=mask, use_cache=True, cache_params=cache).cache_params

    with torch.no_grad():
        expected = model(new, cache_params=read()).logits
        for order in ([2, 0, 0, 1], [1], [2, 1]):
            order = torch.tensor(order)
            cache = read()
            cache.reorder_cache(order)
            for t in range(3):
                logits = model(new[order, t : t + 1], cache_params=cache).logits
                assert_close(logits[:, 0], expected[order, t], 1e-12, f"step {t} after reorder_cache to {order.tolist()}")
        cache = read()
        model(new, cache_params=cache)
        cache.reset()
        assert not cache.has_previous_state()
        assert_same_memory(read(cache), read(), 1e-12, "after reset")
        copied = copy.deepcopy(cache)
        model(new, cache_params=copied)
        assert_close(model(new, cache_params=cache).logits, expected, 1e-12, "after a copy of the cache moved on")


@pytest.mark.parametrize("pieces", [[33], [1] * 33, [9, 1, 1, 22]], ids=str)
def test_a_static_cache(pieces):
    model = tiny_memmamba()
    ids = torch.stack(random_rows([33, 33]))
    with torch.no_grad():
        whole = model(ids, use_cache=True)
        cache = StaticCache(config=model.config, max_cache_len=64)
        outputs, addresses = [], set()
        for piece in ids.split(pieces, dim=1):
            outputs.append(model(piece, cache_params=cache, use_cache=True).logits)
            addresses.add(cache.layers[1].recurrent_states[1].data_ptr())
    assert_close(torch.cat(outputs, dim=1), whole.logits, 1e-10, "logits")
    assert_same_memory(cache, whole.cache_params, 1e-10)
    assert len(addresses) == 1


def test_a_caller_keeps_the_results():
    """Outputs of one call must not change when the cache moves on in place."""
    model = tiny_memmamba()
    ids = torch.stack(random_rows([20, 20]))
    with torch.no_grad():
        output = model(ids, use_cache=True, output_notes=True)
        kept = [output.logits, *output.note_positions, *output.note_scores, *output.note_reads]
        before = [tensor.clone() for tensor in kept]
        for _ in range(9):
            model(ids[:, :1], cache_params=output.cache_params)
    assert all(torch.equal(one, other) for one, other in zip(kept, before, strict=True))


# Starting from a Mamba


PLAIN = dict(vocab_size=50, hidden_size=32, state_size=8, num_hidden_layers=3, pad_token_id=0)
MEMORY = dict(note_size=8, note_heads=2, pool_size=5, chunk_size=4, cross_layer_period=2, cross_layer_group=2)


def plain_checkpoint(folder, **settings):
    theirs = MambaForCausalLM(MambaConfig(**PLAIN, **settings)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if not name.endswith(("A_log", "mixer.D", "dt_proj.bias")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("plain", "memory"),
    [
        *((plain, {}) for plain in (dict(use_bias=True), dict(use_conv_bias=False), dict(residual_in_fp32=False))),
        *(({}, dict(fusion=fusion, fusion_position=place)) for fusion in FUSIONS for place in ("pre", "post")),
        ({}, dict(write_rule="fifo", read_threshold=0.3, write_threshold=0.3)),
        (dict(tie_word_embeddings=False), dict(chunk_size=1, pooling="max")),
    ],
    ids=str,
)
def test_a_mamba_starts_as_itself(tmp_path, plain, memory):
    theirs = plain_checkpoint(tmp_path, **plain)
    ours = MemMambaForCausalLM.from_pretrained(tmp_path, **{**MEMORY, **memory}).eval()
    same_mixers = ReMambaForCausalLM.from_pretrained(tmp_path).eval()
    assert ours.config.pool_size == 5
    ids = torch.randint(1, 50, (2, 70))
    with torch.no_grad():
        expected = theirs(ids, labels=ids, output_hidden_states=True)
        actual = ours(ids, labels=ids, output_hidden_states=True, use_cache=True)
        assert torch.equal(actual.logits, same_mixers(ids).logits)
        cached = same_mixers(ids, use_cache=True).cache_params
        for one, other in zip(cached_states(actual.cache_params), cached_states(cached), strict=True):
            assert torch.equal(one[0], other[0])
            assert torch.equal(one[1], other[1])
        for cache, model in ((actual.cache_params, ours), (cached, same_mixers)):
            cache.steps = torch.cat([model(ids[:, t : t + 1], cache_params=cache).logits for t in range(9)], dim=1)
        assert torch.equal(actual.cache_params.steps, cached.steps)
    assert_close(actual.logits, expected.logits, 1e-5, "logits")
    assert actual.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    for layer, (one, other) in enumerate(zip(actual.hidden_states, expected.hidden_states, strict=True)):
        assert_close(one, other, 1e-5, f"hidden states of layer {layer}")


def test_a_mamba_in_bfloat16_starts_as_itself(tmp_path):
    plain_checkpoint(tmp_path)
    ours = MemMambaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, **MEMORY).eval()
    same_mixers = ReMambaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    ids = torch.randint(1, 50, (2, 70))
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, same_mixers(ids).logits)


@pytest.mark.parametrize(
    "settings", [{}, dict(cross_layer_group=5), dict(fusion="conv1d"), dict(fusion="weighted")], ids=str
)
def test_start_values(tmp_path, settings):
    """A loaded Mamba's memory and a fresh one: readers give zeros, and everything else can learn from the first step on."""
    plain_checkpoint(tmp_path)
    loaded = MemMambaForCausalLM.from_pretrained(tmp_path, **{**MEMORY, **settings})
    for model in (loaded, MemMambaForCausalLM(MemMambaConfig(**{**PLAIN, **MEMORY, **settings}))):
        for layer, block in enumerate(model.backbone.layers):
            memory = block.memory
            readers = [memory.token_reader, *([memory.layer_reader] if layer == 2 else [])]
            fusions = [memory.token_fusion, *([memory.layer_fusion] if layer == 2 else [])]
            for reader, fusion in zip(readers, fusions, strict=True):
                assert reader.output.weight.abs().max() == 0
                assert reader.sink.abs().max() == 0
                for name in ("query", "key", "value"):
                    assert 0 < getattr(reader, name).weight.std() < 1
                assert fusion.weight is None or fusion.weight == 1
                if fusion.mix is not None:
                    assert torch.equal(fusion.mix.weight[:, 32:, 0], torch.eye(32))
                    assert fusion.mix.weight[:, :32].abs().max() == 0
                    assert fusion.mix.bias.abs().max() == 0
            assert (memory.norm.weight == 1).all()
            assert (memory.note_norm.weight == 1).all()
            assert 0 < memory.write_score.weight.std() < 1
            assert memory.write_score.bias.abs().max() == 0
            if layer == 2:
                assert memory.layer_reader.layer_embedding.shape == (2, 8)
                assert 0 < memory.layer_reader.layer_embedding.std() < 1
        ids = torch.randint(1, 50, (2, 30))
        model(ids, labels=ids).loss.backward()
        assert all(block.memory.token_reader.output.weight.grad.abs().max() > 0 for block in model.backbone.layers)


def test_plain_gradients_are_mambas(tmp_path):
    plain_checkpoint(tmp_path)
    ours = MemMambaForCausalLM.from_pretrained(tmp_path, **MEMORY).train()
    theirs = ReMambaForCausalLM.from_pretrained(tmp_path).train()
    ids = torch.randint(1, 50, (2, 33))
    for model in (ours, theirs):
        model(ids, labels=ids).loss.backward()
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            assert_close(ours.get_parameter(name).grad, parameter.grad, 1e-5, name)


# Dtypes


def in_float32(name):
    return any(f".{kept}." in f".{name}." for kept in ("A_log", "D", "dt_proj.bias", "write_score", "sink"))


@pytest.mark.smoke
def test_bfloat16_checkpoints_keep_recurrence_and_scores_in_float32(tmp_path):
    model = tiny_memmamba(torch.float32)
    model.save_pretrained(tmp_path)
    half = MemMambaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    kept = [name for name, _ in half.named_parameters() if in_float32(name)]
    assert len(kept) == 3 * (3 + 2 + 1) + 1
    for name, parameter in half.named_parameters():
        assert parameter.dtype == (torch.float32 if in_float32(name) else torch.bfloat16), name
        if in_float32(name):
            assert torch.equal(parameter, model.get_parameter(name)), name
    ids = torch.stack(random_rows([60, 60]))
    with torch.no_grad():
        output = half(ids, use_cache=True, output_notes=True)
    assert output.logits.dtype == torch.float32
    assert all(scores.dtype == torch.float32 for scores in output.note_scores)
    for layer in output.cache_params.layers:
        assert layer.recurrent_states[0].dtype == layer.recurrent_states[1].dtype == torch.float32
        assert layer.conv_states[1].dtype == torch.float32


def overlap(actual, expected):
    """Share of the expected notes that were chosen, over all layers and rows."""
    shared = total = 0
    for mine, theirs in zip(actual.note_positions, expected.note_positions, strict=True):
        for one, other in zip(mine.tolist(), theirs.tolist(), strict=True):
            shared += len(set(one) & set(other))
            total += len(other)
    return shared / total


def read_with_notes(model, ids, **settings):
    with torch.no_grad():
        return model(ids, output_notes=True, **settings)


@pytest.mark.parametrize("kind", ["checkpoint", "cast", "autocast"])
def test_bfloat16_chooses_nearly_the_same_notes(tmp_path, kind):
    """Selection is discontinuous: what is compared is how many of the notes are the same, in 20 slots for 300 tokens."""
    model = tiny_memmamba(torch.float32, pool_size=20, chunk_size=16, num_hidden_layers=2, cross_layer_period=1)
    ids = torch.stack(random_rows([300] * 4))
    expected = read_with_notes(model, ids)
    half = copy.deepcopy(model)
    if kind == "checkpoint":
        model.save_pretrained(tmp_path)
        half = MemMambaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    elif kind == "cast":
        half = half.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        actual = read_with_notes(half, ids)
    assert overlap(expected, expected) == 1
    assert overlap(actual, expected) > 0.8
    assert all(scores.dtype == torch.float32 for scores in actual.note_scores) or kind == "cast"
    sizes = ("pool_size", "chunk_size", "num_hidden_layers", "cross_layer_period")
    random = read_with_notes(tiny_memmamba(torch.float32, 1, **{name: getattr(model.config, name) for name in sizes}), ids)
    assert overlap(random, expected) < 0.5


def test_scores_are_in_float32_under_autocast():
    """In bfloat16 the best scores of a thousand tokens would be equal."""
    model = tiny_memmamba(torch.float32)
    seen = []
    model.backbone.layers[0].memory.write_score.register_forward_hook(
        lambda _, inputs, output: seen.append((*inputs, output))
    )
    ids = torch.stack(random_rows([40]))
    expected = read_with_notes(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        actual = read_with_notes(model, ids)
    assert len(seen) == 2
    assert all(tensor.dtype == torch.float32 for call in seen for tensor in call)
    assert torch.equal(actual.note_positions[0], expected.note_positions[0])
    assert torch.equal(actual.note_scores[0], expected.note_scores[0])


@pytest.mark.parametrize("settings", [dict(), *(dict(fusion=fusion) for fusion in FUSIONS[1:])], ids=str)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, "autocast"])
def test_a_model_of_less_precision_runs(settings, kind):
    model = tiny_memmamba(torch.float32, pool_size=64, **settings)  # everything is kept, so that no choice can differ
    ids = torch.stack(random_rows([40, 40]))
    with torch.no_grad():
        expected = model(ids).logits
        cast = model if kind == "autocast" else copy.deepcopy(model).to(kind)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            cache, outputs = DynamicCache(config=model.config), []
            for piece in ids.split([21, 1, 1, 1, 16], dim=1):
                outputs.append(cast(piece, cache_params=cache, use_cache=True).logits)
            assert cast.generate(ids, max_new_tokens=3).shape == (2, 43)
    assert_close(torch.cat(outputs, dim=1), expected, 2e-2 if kind == torch.float16 else 0.15, "logits")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16_autocast_trains(checkpointing):
    model = tiny_memmamba(torch.float32, pool_size=64).train()
    ids = torch.stack(random_rows([40, 40]))
    expected = model(ids, labels=ids).loss
    if checkpointing:
        model.gradient_checkpointing_enable()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=3e-2)
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), name


def test_a_double_model_computes_in_double():
    """Nothing inside may pass through float32: a change of 1e-12 in the embeddings must show, and only as large."""
    model = tiny_memmamba()
    embeddings = model.get_input_embeddings()(torch.stack(random_rows([40]))).detach()
    labels = random_rows([40])[0][None]
    with torch.no_grad():
        one = model(inputs_embeds=embeddings, labels=labels, use_cache=True, output_notes=True)
        other = model(inputs_embeds=embeddings * (1 + 1e-12), labels=labels, use_cache=True, output_notes=True)
    assert one.logits.dtype == one.note_scores[0].dtype == one.note_reads[0].dtype == torch.float64
    assert 0 < (one.logits - other.logits).abs().max() < 1e-9
    for first, second in zip(memory_states(one.cache_params), memory_states(other.cache_params), strict=True):
        assert all(0 < (mine - theirs).abs().max() < 1e-9 for mine, theirs in zip(first[:2], second[:2], strict=True))
        assert 0 < (first[3] - second[3]).abs().max() < 1e-9
    for mine, theirs in zip(one.note_reads, other.note_reads, strict=True):
        assert 0 < (mine - theirs).abs().max() < 1e-9


# Training


def gradients(model, **batch):
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("settings", [{}, dict(cross_layer_period=1, cross_layer_group=3, num_hidden_layers=4)], ids=str)
def test_gradient_checkpointing_changes_nothing(use_reentrant, settings):
    """Also of notes that layers above read, which leave a checkpointed block beside its states."""
    model = tiny_memmamba(**settings).train()
    batch = labelled(random_rows(LENGTHS), "both")
    loss, expected = gradients(model, **batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    calls = []
    handle = model.backbone.layers[1].memory.register_forward_pre_hook(lambda *_: calls.append(1))
    checkpointed_loss, actual = gradients(model, **batch)
    handle.remove()
    assert len(calls) == 2
    assert checkpointed_loss == loss
    assert actual.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name in expected:
        assert_close(actual[name], expected[name], 1e-12, f"gradient of {name}")
    model.gradient_checkpointing_disable()


def test_accumulation_is_one_large_batch():
    model = tiny_memmamba().train()
    ids = torch.stack(random_rows([20] * 4))
    _, expected = gradients(model, input_ids=ids, labels=ids)
    model.zero_grad()
    for part in ids.split([3, 1]):
        model(part, labels=part, num_items_in_batch=torch.tensor(4 * 19)).loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], 1e-10, name)


def test_training_uses_no_cache_unless_asked():
    model = tiny_memmamba().train()
    ids = torch.stack(random_rows([20]))
    assert model(ids).cache_params is None
    assert model(ids, use_cache=True).cache_params is not None


def recall_batch(batch, length, generator):
    """Noise from 2 to 9 with one key from 10 to 17 in it, and 1 at the end, after which the key is asked for."""
    ids = torch.randint(2, 10, (batch, length), generator=generator)
    key = torch.randint(10, 18, (batch,), generator=generator)
    ids[torch.arange(batch), torch.randint(length - 9, (batch,), generator=generator)] = key
    ids[:, -1] = 1
    return ids, key


def test_a_memory_learns_to_recall():
    """Behind a Mamba whose state forgets at once: after training at 40 tokens it recalls at 1,000, from the notes alone and
    because of what the scorer learned."""
    settings = dict(note_size=16, note_heads=2, pool_size=24, chunk_size=8, tie_word_embeddings=False, state_size=4)
    model = MemMambaForCausalLM(
        MemMambaConfig(vocab_size=20, hidden_size=32, num_hidden_layers=1, pad_token_id=0, **settings)
    )
    rates = model.backbone.layers[0].mixer.A_log
    torch.nn.init.constant_(rates.requires_grad_(False), 5.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        ids, key = recall_batch(32, 40, generator)
        loss = F.cross_entropy(model(ids, logits_to_keep=1).logits[:, -1], key)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def accuracy(length, change=copy.deepcopy):
        ids, key = recall_batch(64, length, torch.Generator().manual_seed(1))
        cache = change(model.eval()(ids[:, :-1], use_cache=True).cache_params)
        return (model(ids[:, -1:], cache_params=cache).logits[:, -1].argmax(-1) == key).double().mean().item()

    assert accuracy(40) > 0.9
    assert accuracy(1000) > 0.7
    assert accuracy(40, wiped) < 0.4
    assert accuracy(1000, wiped) < 0.4
    torch.nn.init.zeros_(model.backbone.layers[0].memory.write_score.weight)
    assert accuracy(1000) < 0.4, "a scorer that knows nothing keeps the first notes"


# What can be seen of the notes


def assert_readings(output, row, expected, limit=1e-10):
    """Every layer's reading of a row as the reference's."""
    for layer, reading in enumerate(expected):
        count = len(reading.positions)
        positions, scores, reads = (
            values[layer][row] for values in (output.note_positions, output.note_scores, output.note_reads)
        )
        assert positions.tolist() == reading.positions + [-1] * (len(positions) - count), f"layer {layer}"
        for name, values, wanted in (("scores", scores, reading.scores), ("reads", reads, reading.weights)):
            assert_close(values[:count], values.new_tensor(wanted), limit, f"{name} of layer {layer}")
            assert (values[count:] == 0).all()


@pytest.mark.smoke
@pytest.mark.parametrize(
    "settings", [{}, *OPTIONS[1:7], dict(chunk_size=1), dict(chunk_size=64), dict(chunk_size=9)], ids=str
)
def test_the_notes_that_are_shown(settings):
    """Of each row's last token, whatever the padding and the way the text was read."""
    model = tiny_memmamba(**settings)
    rows = random_rows(LENGTHS)
    ids, mask, _ = padded(rows, "both")
    expected = [reference.read(weights_of(model), model.config, text)[2] for text in rows]
    size = model.config.chunk_size
    for chunk in (None, 1, 5, 8):
        output = read_with_notes(model, ids, attention_mask=mask, prefill_chunk_length=chunk)
        assert len(output.note_positions) == len(output.note_scores) == len(output.note_reads) == 3
        for row, text in enumerate(rows):
            assert_readings(output, row, expected[row])
            for positions, reads in zip(output.note_positions, output.note_reads, strict=True):
                assert positions.shape == reads.shape == (4, model.config.pool_size)
                there = positions[row][positions[row] >= 0]
                assert len(set(there.tolist())) == len(there)
                assert (there < (len(text) - 1) // size * size).all(), "strictly before the last token's chunk"
                assert (reads >= 0).all()
                assert reads[row].sum() < 1


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_the_notes_that_a_step_reads(chunk_size):
    """Token by token, of rows at different places."""
    model = tiny_memmamba(chunk_size=chunk_size)
    texts = random_rows((7, 2, 12))
    ids, mask, _ = padded(texts, "left")
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).cache_params
        for step in range(10):
            new = random_rows([1, 1, 1], seed=step + 3)
            texts = [torch.cat(pair) for pair in zip(texts, new, strict=True)]
            output = model(torch.stack(new), cache_params=cache, output_notes=True)
            for row, text in enumerate(texts):
                assert_readings(output, row, reference.read(weights_of(model), model.config, text)[2])


def test_showing_notes_changes_nothing():
    model = tiny_memmamba().train()
    ids = torch.stack(random_rows([20, 20]))
    expected, wanted = gradients(model, input_ids=ids, labels=ids)
    loss, found = gradients(model, input_ids=ids, labels=ids, output_notes=True)
    assert loss == expected
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    output = model(ids)
    assert output.note_positions is output.note_scores is output.note_reads is None


def test_notes_under_gradient_checkpointing():
    model = tiny_memmamba().train()
    ids = torch.stack(random_rows([20, 20]))
    expected = model(ids, output_notes=True)
    model.gradient_checkpointing_enable()
    actual = model(ids, output_notes=True)
    for name in ("note_positions", "note_scores", "note_reads"):
        assert all(torch.equal(one, other) for one, other in zip(actual[name], expected[name], strict=True))


def test_equal_tokens_are_remembered_by_their_first_position():
    """Of equal scores the earlier stays, by every way of reading."""
    model = tiny_memmamba(torch.float32, num_hidden_layers=1)
    ids = torch.full((1, 30), 7)
    for settings in ({}, dict(prefill_chunk_length=7), dict(prefill_chunk_length=1)):
        output = read_with_notes(model, ids, **settings)
        assert output.note_positions[0].tolist() == [[0, 1, 2, 3, 4]]


# The surface


def test_the_backbone_alone_tuples_and_extras():
    model = tiny_memmamba()
    ids, mask, _ = padded(random_rows(LENGTHS), "left")
    settings = dict(attention_mask=mask, use_cache=True, output_notes=True, output_hidden_states=True)
    with torch.no_grad():
        expected = model(ids, **settings)
        backbone = model.backbone(ids, **settings)
        values = model(ids, **settings, return_dict=False)
    assert type(model.backbone) is MemMambaModel
    assert torch.equal(model.lm_head(backbone.last_hidden_state), expected.logits)
    assert torch.equal(backbone.note_positions[2], expected.note_positions[2])
    assert isinstance(values, tuple)
    assert len(values) == len(expected)
    assert torch.equal(values[0], expected.logits)
    assert len(expected.hidden_states) == 4
    assert all(states.shape == (*ids.shape, 16) for states in expected.hidden_states)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("keep", [1, 3, 1000, "tensor"])
def test_logits_to_keep(padding, keep):
    model = tiny_memmamba()
    ids, mask, _ = padded(random_rows(LENGTHS), padding)
    columns = torch.tensor([0, 5, 6, ids.shape[1] - 1]) if keep == "tensor" else slice(-keep, None)
    with torch.no_grad():
        every = model(ids, attention_mask=mask, use_cache=True)
        for chunk in (None, 5):
            kept = columns if keep == "tensor" else keep
            some = model(ids, attention_mask=mask, use_cache=True, prefill_chunk_length=chunk, logits_to_keep=kept)
            assert_close(some.logits, every.logits[:, columns], 1e-12, "logits")
            assert_same_memory(some.cache_params, every.cache_params, 1e-12)


def test_the_loss_is_cross_entropy():
    model = tiny_memmamba()
    batch = labelled(random_rows(LENGTHS), "left")
    with torch.no_grad():
        output = model(**batch)
    shifted = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    expected = F.cross_entropy(output.logits.flatten(0, 1), shifted.flatten())
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.parametrize("padding", [None, "left", "right", "both"])
def test_what_writing_costs(padding):
    """The mean of -log(1 - score) over a batch's own tokens and layers, by hand; part of the loss in training only."""
    model = tiny_memmamba(write_cost=0.3).train()
    rows = random_rows(LENGTHS if padding else (20, 20))
    batch = labelled(rows, padding) if padding else {"input_ids": torch.stack(rows), "labels": torch.stack(rows)}
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    logits = []
    hooks = [
        block.memory.write_score.register_forward_hook(lambda _, inputs, output: logits.append(output.squeeze(-1)))
        for block in model.backbone.layers
    ]
    output = model(**batch)
    for hook in hooks:
        hook.remove()
    packed = torch.arange(real.shape[1]) < real.sum(1, keepdim=True)
    expected = torch.stack(
        [-torch.log(1 - torch.sigmoid(x[:, : real.sum(1).max()][packed[:, : x.shape[1]]])) for x in logits]
    )
    assert output.write_loss.item() == pytest.approx(expected.mean().item(), rel=1e-10)
    for mine, by_hook in zip(output.write_logits, logits, strict=True):
        assert torch.equal(mine[real], by_hook[:, : real.sum(1).max()][packed[:, : by_hook.shape[1]]])
    free = model.eval()(**batch)
    assert free.write_loss is None
    assert free.write_logits is None
    assert output.loss.item() == pytest.approx(free.loss.item() + 0.3 * expected.mean().item(), rel=1e-10)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_what_writing_costs_is_learned_from_under_checkpointing_and_accumulation(use_reentrant):
    model = tiny_memmamba(write_cost=0.5).train()
    batch = {"input_ids": torch.stack(random_rows((20, 20))), "labels": torch.stack(random_rows((20, 20)))}

    def gradients(*pieces, items=None):
        model.zero_grad()
        for piece in pieces:
            model(**{name: value[piece] for name, value in batch.items()}, num_items_in_batch=items).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}

    whole = gradients(slice(0, 2))
    model.config.write_cost = 0.0
    free = gradients(slice(0, 2))
    model.config.write_cost = 0.5
    name = "backbone.layers.1.memory.write_score.bias"
    assert (whole[name] - free[name]).item() > 1e-3, "the cost draws scores down"
    in_pieces = gradients(slice(0, 1), slice(1, 2), items=38)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    checkpointed = gradients(slice(0, 2))
    for name, gradient in whole.items():
        assert_close(in_pieces[name], gradient, 1e-10, f"in pieces, {name}")
        assert_close(checkpointed[name], gradient, 1e-10, f"checkpointed, {name}")


def test_equal_tokens_rank_by_position_however_a_text_is_cut():
    """In layer 0 scores depend on tokens alone, so that most of this text's are equal but for rounding."""
    model = tiny_memmamba(pool_size=12)
    text = torch.randint(0, 4, (1, 200), generator=torch.Generator().manual_seed(3))
    whole = read_with_notes(model, text, use_cache=True)
    for length in (1, 7, 50):
        cache = None
        for piece in text.split(length, dim=1):
            output = read_with_notes(model, piece, use_cache=True, cache_params=cache)
            cache = output.cache_params
        assert torch.equal(output.note_positions[0], whole.note_positions[0])


def test_save_load_copy_and_pickle(tmp_path):
    model = tiny_memmamba(torch.float32)
    model.save_pretrained(tmp_path)
    ids = torch.stack(random_rows([30]))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is MemMambaForCausalLM
    with torch.device("meta"):
        empty = MemMambaForCausalLM(model.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.load_state_dict(model.state_dict(), assign=True)
    with torch.no_grad():
        expected = model(ids).logits
        for other in (loaded, empty.eval(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_same_weights(other, model)
            assert_close(other(ids).logits, expected, 1e-6)
    assert loaded.config.to_dict().items() >= dict(pool_size=5, chunk_size=4, note_size=8, write_rule="priority").items()


def test_shapes_on_the_meta_device():
    """Counters of parameters and operations run models there."""
    model = tiny_memmamba(torch.float32).to("meta")
    ids = torch.zeros(2, 21, dtype=torch.long, device="meta")
    assert model(ids, use_cache=False).logits.shape == (2, 21, 50)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_weights(place, tmp_path):
    """accelerate fills a module's weights in when the module is called, and only then."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny_memmamba(torch.float32)
    ids, mask, _ = padded(random_rows(LENGTHS), "left")
    steps = dict(attention_mask=mask, do_sample=False, max_new_tokens=5, return_dict_in_generate=True, output_logits=True)
    expected = torch.stack(model.generate(ids, **steps).logits)
    if place == "disk":
        offloaded = accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert_close(torch.stack(offloaded.generate(ids, **steps).logits), expected, 1e-6, "logits")


@pytest.mark.parametrize(
    "name", ["write_score", "note", "token_reader.query", "token_reader.key", "token_reader.value", "token_reader.output"]
)
def test_what_is_added_to_a_projection_acts(name):
    """Adapters and quantisers wrap projections; in passes and in steps they must be called as modules."""
    model = tiny_memmamba()
    merged = copy.deepcopy(model)
    for block, other in zip(model.backbone.layers, merged.backbone.layers, strict=True):
        base = block.memory.get_submodule(name)
        added = torch.randn_like(base.weight) * 0.3
        base.register_forward_hook(lambda _, inputs, output, added=added: output + inputs[0] @ added.T)
        with torch.no_grad():
            other.memory.get_submodule(name).weight.add_(added)
    ids, mask, _ = padded(random_rows(LENGTHS), "both")
    steps = dict(attention_mask=mask, do_sample=False, max_new_tokens=6, return_dict_in_generate=True, output_logits=True)
    actual, expected = (torch.stack(m.generate(ids, **steps).logits) for m in (model, merged))
    assert_close(actual, expected, 1e-6, "logits")


def test_determinism():
    model = tiny_memmamba(torch.float32)
    ids, mask, _ = padded(random_rows(LENGTHS), "left")
    first, second = (read_with_notes(model, ids, attention_mask=mask) for _ in range(2))
    assert torch.equal(first.logits, second.logits)
    assert all(torch.equal(*pair) for pair in zip(first.note_positions, second.note_positions, strict=True))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(pool_size=0), "pool_size must be an integer of at least 1"),
        (dict(chunk_size=0), "chunk_size must be an integer of at least 1"),
        (dict(chunk_size=2.5), "chunk_size must be an integer"),
        (dict(note_heads=3), "note_size=64 is no multiple of note_heads=3"),
        (dict(cross_layer_period=-1), "cross_layer_period must be an integer of at least 0"),
        (dict(cross_layer_group=0), "cross_layer_group must be an integer of at least 1"),
        (dict(write_rule="best"), "write_rule must be one of .*priority.*fifo.*periodic"),
        (dict(fusion="sum"), "fusion must be one of .*gated.*weighted"),
        (dict(fusion_position="mid"), "fusion_position must be one of .*pre.*post"),
        (dict(pooling="min"), "pooling must be one of .*none.*max.*mean"),
        (dict(pooling_window=0), "pooling_window must be an integer of at least 1"),
        (dict(write_threshold=1.0), r"write_threshold must be a number in \[0, 1\)"),
        (dict(read_threshold=-0.1), r"read_threshold must be a number in \[0, 1\)"),
        (dict(read_threshold=float("nan")), r"read_threshold must be a number in \[0, 1\)"),
        (dict(recency_weight=-1.0), "recency_weight must be a finite number of at least 0"),
        (dict(recency_weight=float("inf")), "recency_weight must be a finite number of at least 0"),
        (dict(write_cost=-0.1), "write_cost must be a finite number of at least 0"),
        (dict(write_period=10, write_span=11), "write_period must be an integer of at least 11"),
        (dict(hidden_act="gelu"), "hidden_act='gelu'"),
    ],
    ids=str,
)
def test_configurations_that_cannot_be_honoured(given, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        MemMambaConfig(**given)
    MemMambaConfig(hidden_size=16, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        MemMambaConfig.from_pretrained(tmp_path, **given)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "remamba", "hidden_size": 16}))
    with pytest.raises(ValueError, match="'remamba' model"):
        MemMambaForCausalLM.from_pretrained(tmp_path)


# Long texts

# Runs in a process of its own, whose peak is nobody else's: prints the peak's growth in bytes after each length. VmHWM,
# because ru_maxrss begins with what the parent held when it started the process.
PEAKS = """
import json, re, sys, torch
from modeling_tests.modeling.tiny_models import tiny_memmamba
torch.set_num_threads(1)
model = tiny_memmamba(torch.float32, hidden_size=32, num_hidden_layers=2, cross_layer_period=1, chunk_size=64, pool_size=50)
peaks = []
for length in map(int, sys.argv[1:]):
    ids = torch.randint(2, 50, (1, length), generator=torch.Generator().manual_seed(0))
    assert model.generate(ids, max_new_tokens=2, prefill_chunk_length=1024).shape == (1, length + 2)
    peaks.append(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]))
print(json.dumps([peak - peaks[0] for peak in peaks[1:]]))
"""


def test_memory_is_flat_in_the_length():
    """What grows with a token: its id, 8 bytes a few times over, and noise; activations would be kilobytes."""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc to measure a peak")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", PEAKS, "2048", "4096", "20480"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    at_4k, at_20k = json.loads(result.stdout)
    assert at_20k - at_4k < 16_384 * 300


@pytest.mark.parametrize("chunk", [1000, 4096])
def test_a_long_text_in_chunks_is_the_whole(chunk):
    model = tiny_memmamba(hidden_size=8, num_hidden_layers=2, cross_layer_period=1, chunk_size=64, pool_size=50)
    ids = torch.stack(random_rows([8_192]))
    whole = read_with_notes(model, ids, use_cache=True)
    pieces = read_with_notes(model, ids, use_cache=True, prefill_chunk_length=chunk)
    assert_close(pieces.logits, whole.logits, 1e-9, "logits")
    assert_same_memory(pieces.cache_params, whole.cache_params, 1e-9)
    for one, other in zip(pieces.note_positions, whole.note_positions, strict=True):
        assert torch.equal(one, other)
