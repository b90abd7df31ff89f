# SPDX-License-Identifier: Apache-2.0
"""The model of either family: plain passes against transformers' Mamba, two-stage passes against the float64 reference, row
by row. What Mamba-2 alone has is in test_modeling_remamba2.py."""

import copy
import pickle

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, DynamicCache

from modeling_tests.modeling import reference_two_stages as reference
from modeling_tests.modeling.tiny_models import (
    RATIO,
    SPAN,
    START,
    assert_close,
    assert_same_cache,
    assert_same_weights,
    cached_states,
    padded,
    random_rows,
    tiny_config,
    tiny_model,
)
from remamba_hf.families import FAMILIES

PROMPTS, RESPONSES = (1, 2, 3, 4, 9, 30, 47), (2, 1, 4, 0, 3, 6, 1)


# Plain passes


# Before, transformers took the gated norm over all channels, whatever the groups.
GROUPS_ARE_RIGHT_FROM = Version("5.22")


def plain_config(family, **settings):
    """transformers' own configuration."""
    defaults = dict(vocab_size=50, hidden_size=32, state_size=8, num_hidden_layers=3, pad_token_id=0)
    if family == "remamba2":
        defaults.update(num_heads=4, head_dim=16, n_groups=1, chunk_size=16)
    return FAMILIES[family].plain_config_class(**{**defaults, **settings})


def both_models(folder, family, **settings):
    """transformers' plain model with the given settings, and its checkpoint loaded as the two-stage model."""
    config = plain_config(family, **settings)
    if family == "remamba2" and config.n_groups > 1 and Version(transformers.__version__) < GROUPS_ARE_RIGHT_FROM:
        pytest.skip(f"transformers {transformers.__version__} ignores the groups of the gated norm")
    theirs = FAMILIES[family].plain_model_class(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if not name.endswith(("A_log", "mixer.D", "dt_proj.bias", "dt_bias")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif family == "remamba2":
                parameter.add_(torch.randn_like(parameter))
    theirs.save_pretrained(folder)
    return theirs, FAMILIES[family].model_class.from_pretrained(folder).eval()


PLAIN_SETTINGS = [
    {},
    dict(use_bias=True),
    dict(use_conv_bias=False),
    dict(tie_word_embeddings=False),
    dict(residual_in_fp32=False),
]


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *(("remamba", settings) for settings in PLAIN_SETTINGS),
        ("remamba", dict(expand=1, conv_kernel=3, time_step_rank=5)),
        ("remamba", dict(conv_kernel=2, state_size=1)),
        ("remamba", dict(hidden_size=24, layer_norm_epsilon=1e-3)),
        *(("remamba2", settings) for settings in PLAIN_SETTINGS),
        ("remamba2", dict(tie_word_embeddings=True)),
        ("remamba2", dict(num_heads=8, head_dim=8, n_groups=2)),
        ("remamba2", dict(num_heads=8, head_dim=8, n_groups=8, chunk_size=256)),
        ("remamba2", dict(num_heads=4, n_groups=4, head_dim=16, use_bias=True, use_conv_bias=False)),
        ("remamba2", dict(time_step_limit=(0.01, 0.5))),
        ("remamba2", dict(hidden_size=15, num_heads=6, head_dim=5, state_size=7, layer_norm_epsilon=1e-3)),
        ("remamba2", dict(hidden_size=15, num_heads=6, head_dim=5, state_size=7, n_groups=3)),
        ("remamba2", dict(expand=1, num_heads=2, conv_kernel=3)),
        ("remamba2", dict(num_heads=64, head_dim=1, state_size=1, conv_kernel=2)),
    ],
    ids=str,
)
def test_plain_mode_is_transformers_mamba(tmp_path, family, settings):
    theirs, ours = both_models(tmp_path, family, **settings)
    ids = torch.randint(0, 50, (2, 70))
    labels = ids.clone()
    with torch.no_grad():
        expected = theirs(ids, labels=labels, output_hidden_states=True)
        actual = ours(ids, labels=labels, output_hidden_states=True, use_cache=True)
    assert_close(actual.logits, expected.logits, 1e-5, "logits")
    assert actual.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert actual.compressed_positions is None
    assert len(actual.hidden_states) == 4
    assert len(expected.hidden_states) == 4
    for layer, (one, other) in enumerate(zip(actual.hidden_states, expected.hidden_states, strict=True)):
        assert_close(one, other, 1e-5, f"hidden states of layer {layer}")
    with torch.no_grad():
        cached = theirs(ids, use_cache=True).cache_params
    assert_same_cache(actual.cache_params, cached, 1e-5)


def test_plain_gradients_are_transformers_mambas(tmp_path, family):
    theirs, ours = both_models(tmp_path, family)
    ids = torch.randint(0, 50, (2, 33))
    theirs(ids, labels=ids).loss.backward()
    ours.train()(ids, labels=ids).loss.backward()
    own = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert_close(own[name].grad, parameter.grad, 1e-4, name)
    for name, parameter in own.items():
        assert (parameter.grad is None) == ("compressor" in name or "adaptation" in name), name


def test_the_checkpoints_keys_are_as_documented(family):
    config = tiny_config(family=family, num_hidden_layers=2, use_bias=True)
    plain = plain_config(family, num_hidden_layers=2, use_bias=True)
    theirs = set(FAMILIES[family].plain_model_class(plain).state_dict())
    added = {f"backbone.layers.{layer}.mixer.adaptation.bias" for layer in range(2)}
    for projection in ("query", "key", "value"):
        added |= {f"backbone.compressor.{projection}.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")}
    assert set(FAMILIES[family].model_class(config).state_dict()) == theirs | added


def test_start_values(family):
    """Theta is zero, dt lies in its range, A is S4D-real or counts the heads: a fresh model is a fresh Mamba."""
    torch.manual_seed(0)
    config = tiny_config(family, hidden_size=64, state_size=8, **(dict(num_heads=32) if family == "remamba2" else {}))
    model = FAMILIES[family].model_class(config)
    rates = torch.arange(1.0, 9).expand(128, 8) if family == "remamba" else torch.arange(1.0, 33)
    for layer in model.backbone.layers:
        mixer = layer.mixer
        assert mixer.adaptation.bias.abs().max() == 0
        dt = torch.nn.functional.softplus(mixer.dt_proj.bias if family == "remamba" else mixer.dt_bias)
        assert config.time_step_min * 0.99 <= dt.min() < dt.max() <= config.time_step_max * 1.01
        assert dt.min() < 4 * config.time_step_min, "log-uniform, not uniform"
        torch.testing.assert_close(mixer.A_log.exp(), rates)
        assert (mixer.D == 1).all()
        assert (layer.norm.weight == 1).all()
        assert mixer.conv1d.bias.abs().max() == 0


# Two stages


def batch_of(padding, responses=RESPONSES, seed=1):
    rows = random_rows([p + r for p, r in zip(PROMPTS, responses, strict=True)], seed)
    return rows, *padded(rows, padding)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 7, 64])
@pytest.mark.parametrize("padding", ["left", "right", "both"])
@pytest.mark.smoke
def test_ragged_rows_agree_with_the_reference(family, padding, chunk):
    """Logits at all tokens, kept positions, scores and states; prompts of 1 to 47 tokens side by side."""
    model = tiny_model(family=family)
    rows, ids, mask, places = batch_of(padding)
    with torch.no_grad():
        output = model(ids, attention_mask=mask, prompt_lengths=PROMPTS, use_cache=True, prefill_chunk_length=chunk)
    for row, place in enumerate(places):
        logits, positions, scores, states = reference.two_stages(
            model.state_dict(), model.config, rows[row], PROMPTS[row], START, SPAN, RATIO
        )
        assert_close(output.logits[row, place], logits, 1e-10, f"logits of row {row}")
        kept = output.compressed_positions[row]
        assert kept[kept >= 0].tolist() == positions
        assert (kept[len(positions) :] == -1).all()
        torch.testing.assert_close(output.compression_scores[row, : len(positions)].tolist(), scores, rtol=0, atol=1e-12)
        assert (output.compression_scores[row, len(positions) :] == 0).all()
        assert_same_cache(cached_states(output.cache_params, row), states, 1e-10, f"cache of row {row}")


@pytest.mark.parametrize("selection", ["score", "stride", "random", "multiplicative"])
def test_every_selection_agrees_with_the_reference(family, selection):
    model = tiny_model(family=family, selection=selection)
    rows, ids, mask, places = batch_of("left")
    with torch.no_grad():
        output = model(ids, attention_mask=mask, prompt_lengths=PROMPTS, use_cache=True)
    for row, place in enumerate(places):
        kept = [position for position in output.compressed_positions[row].tolist() if position >= 0]
        begin, length, count = reference.window_of(PROMPTS[row], START, SPAN, RATIO)
        fixed = [position - begin for position in kept] if selection == "random" else None
        if fixed:
            assert len(set(fixed)) == count
            assert set(fixed) <= set(range(length))
        logits, positions, _, states = reference.two_stages(
            model.state_dict(), model.config, rows[row], PROMPTS[row], START, SPAN, RATIO, fixed=fixed, selection=selection
        )
        assert kept == positions
        assert_close(output.logits[row, place], logits, 1e-10, f"logits of row {row}")
        assert_same_cache(cached_states(output.cache_params, row), states, 1e-10)


@pytest.mark.parametrize("kind", [list, torch.tensor])
def test_settings_of_each_row(family, kind):
    model = tiny_model(family=family)
    rows, ids, mask, places = batch_of("both")
    starts, spans, ratios = [0, 0.5, 0, 0.3, 0, 0.25, 0.9], [1, 0.5, 0.1, 0.7, 0.9, 0.5, 0.1], [1, 0.1, 1, 0.5, 0.2, 0.9, 1]
    settings = dict(compression_start=kind(starts), compression_span=kind(spans), compression_ratio=kind(ratios))
    if kind is torch.tensor:
        settings = {name: value.double() for name, value in settings.items()}
        starts, spans, ratios = (value.tolist() for value in settings.values())
    with torch.no_grad():
        output = model(ids, attention_mask=mask, prompt_lengths=torch.tensor(PROMPTS), **settings)
    for row, place in enumerate(places):
        logits, positions, _, _ = reference.two_stages(
            model.state_dict(), model.config, rows[row], PROMPTS[row], starts[row], spans[row], ratios[row]
        )
        assert_close(output.logits[row, place], logits, 1e-10, f"logits of row {row}")
        assert [p for p in output.compressed_positions[row].tolist() if p >= 0] == positions


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        *((name, dict(use_bias=True)) for name in FAMILIES),
        *((name, dict(use_conv_bias=False)) for name in FAMILIES),
        *((name, dict(conv_kernel=2, expand=1)) for name in FAMILIES),
        ("remamba2", dict(n_groups=1, time_step_limit=(0.0, float("inf")))),
        ("remamba2", dict(num_heads=8, n_groups=8)),
        ("remamba2", dict(hidden_size=15, num_heads=6, n_groups=3, state_size=7, time_step_limit=(0.3, 0.3))),
        ("remamba2", dict(num_heads=1, n_groups=1, state_size=1, conv_kernel=1)),
        ("remamba2", dict(num_heads=32, tie_word_embeddings=True)),
    ],
    ids=str,
)
def test_other_shapes_agree_with_the_reference(family, settings):
    model = tiny_model(family=family, **settings)
    (row,) = random_rows([40])
    with torch.no_grad():
        output = model(row[None], prompt_lengths=[33], use_cache=True)
    logits, _, _, states = reference.two_stages(model.state_dict(), model.config, row, 33, START, SPAN, RATIO)
    assert_close(output.logits[0], logits, 1e-10, "logits")
    assert_same_cache(cached_states(output.cache_params, 0), states, 1e-10)


def test_pads_in_the_middle_of_a_row(family):
    model = tiny_model(family=family)
    (row,) = random_rows([30])
    ids, mask = torch.full((1, 40), 7), torch.zeros(1, 40, dtype=torch.long)
    columns = torch.tensor([*range(2, 5), *range(7, 20), *range(24, 38)])
    ids[0, columns], mask[0, columns] = row, 1
    with torch.no_grad():
        output = model(ids, attention_mask=mask, prompt_lengths=[25], use_cache=True)
        alone = model(row[None], prompt_lengths=[25], use_cache=True)
    assert_close(output.logits[:, columns], alone.logits, 1e-12, "logits")
    assert output.compressed_positions.tolist() == alone.compressed_positions.tolist()
    assert_same_cache(output.cache_params, alone.cache_params, 1e-12)


@pytest.mark.parametrize("mask_dtype", [torch.long, torch.bool, torch.float32])
def test_a_mask_of_any_dtype(family, mask_dtype):
    model = tiny_model(family=family)
    _, ids, mask, _ = batch_of("left")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, prompt_lengths=PROMPTS).logits
        assert torch.equal(model(ids, attention_mask=mask.to(mask_dtype), prompt_lengths=PROMPTS).logits, expected)


@pytest.mark.parametrize("padding", ["left", "right", "both"])
def test_plain_ragged_rows_equal_themselves_alone(family, padding):
    """With an all-pad row among them; transformers' own Mamba caches wrong states under right padding."""
    model = tiny_model(family=family)
    rows = random_rows([5, 0, 21, 1])
    ids, mask, places = padded(rows, padding)
    with torch.no_grad():
        output = model(ids, attention_mask=mask, use_cache=True)
        for row, place in enumerate(places):
            if len(rows[row]):
                alone = model(rows[row][None], use_cache=True)
                assert_close(output.logits[row, place], alone.logits[0], 1e-12, f"logits of row {row}")
                assert_same_cache(cached_states(output.cache_params, row), cached_states(alone.cache_params, 0), 1e-12)
    assert output.logits.isfinite().all()


def test_a_batch_of_pads_alone(family):
    model = tiny_model(family=family)
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    with torch.no_grad():
        output = model(ids, attention_mask=mask, use_cache=True)
    assert output.logits.shape == (2, 9, 50)
    assert output.logits.isfinite().all()


def test_nan_at_pads_goes_nowhere(family):
    """Embeddings of pads may be uninitialised memory."""
    model = tiny_model(family=family)
    _, ids, mask, places = batch_of("left")
    embeddings = model.get_input_embeddings()(ids).detach()
    embeddings[mask == 0] = torch.nan
    with torch.no_grad():
        for settings in ({}, dict(compress_prompt=True)):
            expected = model(ids, attention_mask=mask, use_cache=True, **settings)
            actual = model(inputs_embeds=embeddings, attention_mask=mask, use_cache=True, **settings)
            for row, place in enumerate(places):
                assert_close(actual.logits[row, place], expected.logits[row, place], 1e-12, "logits")
            assert_same_cache(actual.cache_params, expected.cache_params, 1e-12)


def test_labels_tell_the_prompt(family):
    model = tiny_model(family=family)
    rows, ids, mask, places = batch_of("left", responses=(2, 1, 4, 1, 3, 6, 1))
    labels = torch.full_like(ids, -100)
    for row, place in enumerate(places):
        labels[row, place.start + PROMPTS[row] : place.stop] = rows[row][PROMPTS[row] :]
    with torch.no_grad():
        by_labels = model(ids, attention_mask=mask, labels=labels)
        by_lengths = model(ids, attention_mask=mask, labels=labels, prompt_lengths=PROMPTS)
        without = model(ids, attention_mask=mask, prompt_lengths=PROMPTS)
    assert torch.equal(by_labels.logits, by_lengths.logits)
    assert torch.equal(by_labels.logits, without.logits)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    expected = torch.nn.functional.cross_entropy(by_labels.logits.flatten(0, 1), shifted.flatten())
    assert by_labels.loss.item() == pytest.approx(expected.item(), rel=1e-10)


def test_a_prompt_may_end_before_the_labels_start(family):
    """prompt_lengths wins: what stands between prompt and labels is read after the window."""
    model = tiny_model(family=family)
    (row,) = random_rows([30])
    labels = torch.where(torch.arange(30) < 26, -100, row)[None]
    with torch.no_grad():
        output = model(row[None], labels=labels, prompt_lengths=[20])
    logits, positions, _, _ = reference.two_stages(model.state_dict(), model.config, row, 20, START, SPAN, RATIO)
    assert output.compressed_positions.tolist() == [positions]
    assert_close(output.logits[0], logits, 1e-10, "logits")


def test_plain_rows_beside_compressed_ones(family):
    """Labels from the first token on mean plain language modeling, for that row alone."""
    model = tiny_model(family=family)
    rows = random_rows([20, 25])
    ids, mask, places = padded(rows, "right", spare=0)
    labels = torch.where(mask.bool(), ids, -100)
    labels[1, :15] = -100
    with torch.no_grad():
        output = model(ids, attention_mask=mask, labels=labels)
        plain = model(rows[0][None]).logits[0]
    logits, positions, _, _ = reference.two_stages(model.state_dict(), model.config, rows[1], 15, START, SPAN, RATIO)
    assert_close(output.logits[0, places[0]], plain, 1e-12, "logits of the plain row")
    assert_close(output.logits[1], logits, 1e-10, "logits of the compressed row")
    assert output.compressed_positions.tolist() == [[-1] * len(positions), positions]


def test_without_a_known_prompt_it_is_a_plain_pass(family):
    model = tiny_model(family=family)
    (row,) = random_rows([30])
    plain, _ = reference.one_pass(model.state_dict(), model.config, model.state_dict()["backbone.embeddings.weight"][row])
    plain = plain @ model.lm_head.weight.T
    with torch.no_grad():
        for settings in ({}, dict(compress_prompt=False), dict(compress_prompt=False, prompt_lengths=[20])):
            output = model(row[None], **settings)
            assert output.compressed_positions is None
            assert_close(output.logits[0], plain, 1e-10, "logits")
        whole = model(row[None], compress_prompt=True)
        assert torch.equal(whole.logits, model(row[None], prompt_lengths=[30]).logits)
        assert not torch.equal(whole.logits, output.logits)


def test_short_prompts_are_read_as_they_are(family):
    model = tiny_model(family=family, compression_min_prompt=20)
    rows = random_rows([19, 20])
    ids, mask, places = padded(rows)
    with torch.no_grad():
        output = model(ids, attention_mask=mask, prompt_lengths=[19, 20])
        assert_close(output.logits[0, places[0]], model(rows[0][None]).logits[0], 1e-12)
    assert (output.compressed_positions[0] == -1).all()
    assert (output.compressed_positions[1] >= 0).all()


@pytest.mark.thinned(3)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("keep", [1, 3, 20, 1000, "tensor"])
def test_logits_to_keep(family, padding, keep):
    model = tiny_model(family=family)
    _, ids, mask, _ = batch_of(padding)
    columns = torch.tensor([0, 5, 6, 40, ids.shape[1] - 1]) if keep == "tensor" else slice(-keep, None)
    with torch.no_grad():
        for settings in (dict(prompt_lengths=PROMPTS), {}):
            every = model(ids, attention_mask=mask, use_cache=True, **settings)
            for chunk in (None, 5):
                some = model(
                    ids,
                    attention_mask=mask,
                    use_cache=True,
                    prefill_chunk_length=chunk,
                    logits_to_keep=columns if keep == "tensor" else keep,
                    **settings,
                )
                assert_close(some.logits, every.logits[:, columns], 1e-12, "logits")
                assert_same_cache(some.cache_params, every.cache_params, 1e-12)


def test_logits_to_keep_leaves_the_loss_whole(family):
    model = tiny_model(family=family)
    ids = torch.stack(random_rows([30, 30]))
    labels = torch.where(torch.arange(30) < 20, -100, ids)
    with torch.no_grad():
        every, some = model(ids, labels=labels), model(ids, labels=labels, logits_to_keep=2)
    assert torch.equal(some.loss, every.loss)
    assert torch.equal(some.logits, every.logits[:, -2:])


@pytest.mark.parametrize("padding", ["left", "right"])
def test_embeddings_in_place_of_ids(family, padding):
    model = tiny_model(family=family)
    _, ids, mask, _ = batch_of(padding)
    embeddings = model.get_input_embeddings()(ids)
    with torch.no_grad():
        for settings in (dict(prompt_lengths=PROMPTS), {}):
            expected = model(ids, attention_mask=mask, **settings)
            actual = model(inputs_embeds=embeddings, attention_mask=mask, **settings)
            assert_close(actual.logits, expected.logits, 1e-12, "logits")


def test_hidden_states_are_those_of_stage_1(family):
    model = tiny_model(family=family)
    rows = random_rows([30, 20])
    ids, mask, places = padded(rows, "left", spare=0)
    with torch.no_grad():
        output = model(ids, attention_mask=mask, compress_prompt=True, output_hidden_states=True)
        plain = model(ids, attention_mask=mask, output_hidden_states=True)
        chunked = model(ids, attention_mask=mask, compress_prompt=True, output_hidden_states=True, prefill_chunk_length=7)
    assert len(output.hidden_states) == 4
    for mine, theirs, pieces in zip(output.hidden_states, plain.hidden_states, chunked.hidden_states, strict=True):
        assert mine.shape == theirs.shape == (2, 30, 16)
        for row, place in enumerate(places):
            assert_close(mine[row, place], theirs[row, place], 1e-12, "hidden states")
            assert_close(pieces[row, place], theirs[row, place], 1e-12, "hidden states in chunks")


def test_the_backbone_alone(family):
    model = tiny_model(family=family)
    ids = torch.stack(random_rows([30, 30]))
    with torch.no_grad():
        output = model.backbone(ids, prompt_lengths=[25, 22], use_cache=True)
        expected = model(ids, prompt_lengths=[25, 22], use_cache=True)
    assert type(model.backbone) is FAMILIES[family].model_class.backbone_class
    assert torch.equal(model.lm_head(output.last_hidden_state), expected.logits)
    assert torch.equal(output.compressed_positions, expected.compressed_positions)


def test_tuples(family):
    model = tiny_model(family=family)
    ids = torch.stack(random_rows([30]))
    with torch.no_grad():
        expected = model(ids, compress_prompt=True, use_cache=True)
        actual = model(ids, compress_prompt=True, use_cache=True, return_dict=False)
    assert isinstance(actual, tuple)
    assert torch.equal(actual[0], expected.logits)
    assert len(actual) == len(expected)


# Continuing


@pytest.mark.thinned(2)
@pytest.mark.parametrize("padding", ["left", "right", "both"])
@pytest.mark.smoke
def test_new_tokens_after_a_cache(family, padding):
    """Ragged prompts, then ragged pieces of one and of several tokens, with every way to hand the cache over."""
    model = tiny_model(family=family)
    prompts = random_rows(PROMPTS)
    ids, mask, _ = padded(prompts, padding)
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, compress_prompt=True, use_cache=True).cache_params
        texts = list(prompts)
        for turn, lengths in enumerate([(3, 1, 4, 1, 5, 2, 6), (1,) * 7, (2, 7, 1, 8, 2, 8, 1), (4,) * 7]):
            pieces = random_rows(lengths, seed=turn + 5)
            texts = [torch.cat(pair) for pair in zip(texts, pieces, strict=True)]
            ids, mask, places = padded(pieces, padding, spare=turn % 2)
            name = ("cache_params", "past_key_values")[turn % 2]
            output = model(ids, attention_mask=mask if turn % 3 else None if mask.all() else mask, **{name: cache})
            for row, text in enumerate(texts):
                logits, _, _, states = reference.two_stages(
                    model.state_dict(), model.config, text, PROMPTS[row], START, SPAN, RATIO
                )
                assert_close(output.logits[row, places[row]], logits[-lengths[row] :], 1e-10, f"turn {turn}, row {row}")
                assert_same_cache(cached_states(cache, row), states, 1e-10, f"turn {turn}, row {row}")


@pytest.mark.parametrize("pieces", [[1] * 30, [7, 1, 12, 10], [30], [29, 1], [1, 29]], ids=str)
def test_a_plain_text_in_pieces(family, pieces):
    """transformers' Mamba drops its state when more than one token follows a cache."""
    model = tiny_model(family=family)
    ids = torch.stack(random_rows([30, 30]))
    with torch.no_grad():
        whole = model(ids, use_cache=True)
        cache, outputs = DynamicCache(config=model.config), []
        for piece in ids.split(pieces, dim=1):
            outputs.append(model(piece, cache_params=cache, use_cache=True).logits)
    assert_close(torch.cat(outputs, dim=1), whole.logits, 1e-10, "logits")
    assert_same_cache(cache, whole.cache_params, 1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_random_cuts(family, seed):
    """A compressed prompt and 150 tokens after it, cut anywhere, equal the whole; cuts of one token are decoding steps."""
    model = tiny_model(family=family)
    prompt, text = random_rows([40, 150], seed)
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randperm(149, generator=generator)[: 3 + 20 * seed].add(1).sort().values.tolist()
    with torch.no_grad():
        whole = model(torch.cat([prompt, text])[None], prompt_lengths=[40], use_cache=True)
        cache = model(prompt[None], compress_prompt=True, use_cache=True).cache_params
        pieces = [model(piece[None], cache_params=cache).logits for piece in text.tensor_split(cuts)]
    assert_close(torch.cat(pieces, dim=1), whole.logits[:, 40:], 1e-10, f"logits with cuts at {cuts}")
    assert_same_cache(cache, whole.cache_params, 1e-10)


def test_steps_with_gradients_enabled_are_the_same(family):
    model = tiny_model(family=family)
    ids = torch.stack(random_rows([10, 10]))
    cache = model(ids[:, :7], use_cache=True).cache_params
    expected = model(ids).logits
    for t in range(7, 10):
        assert_close(model(ids[:, t : t + 1], cache_params=cache).logits[:, 0], expected[:, t], 1e-10)


def test_cache_reset_reorder_and_select(family):
    model = tiny_model(family=family)
    prompts, new = torch.stack(random_rows([20, 20, 20])), torch.stack(random_rows([3, 3, 3], seed=2))
    with torch.no_grad():

        def read():
            return model(prompts, compress_prompt=True, use_cache=True).cache_params

        expected = model(new, cache_params=read()).logits
        order = torch.tensor([2, 0, 0, 1])
        cache = read()
        cache.reorder_cache(order)
        one_each = model(new[order], cache_params=cache).logits
        assert_close(one_each, expected[order], 1e-12, "after reorder_cache")
        cache = read()
        cache.reset()
        assert not cache.has_previous_state()
        again = model(prompts, compress_prompt=True, cache_params=cache, use_cache=True)
        assert_same_cache(again.cache_params, read(), 1e-12)
        copied = copy.deepcopy(cache)
        model(new, cache_params=copied)
        assert_close(model(new, cache_params=cache).logits, expected, 1e-12, "after a copy of the cache moved on")


def test_a_caller_keeps_the_results(family):
    """Outputs of one call must not change when the cache moves on in place."""
    model = tiny_model(family=family)
    ids = torch.stack(random_rows([20, 20]))
    with torch.no_grad():
        output = model(ids, compress_prompt=True, use_cache=True)
        before = output.logits.clone(), ids.clone()
        for _ in range(3):
            model(ids[:, :1], cache_params=output.cache_params)
    assert torch.equal(output.logits, before[0])
    assert torch.equal(ids, before[1])


# Dtypes and devices


@pytest.mark.smoke
def test_bfloat16_checkpoints_keep_the_recurrence_in_float32(family, tmp_path):
    model = tiny_model(torch.float32, family=family)
    model.save_pretrained(tmp_path)
    half = FAMILIES[family].model_class.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    for name, parameter in half.named_parameters():
        recurrent = name.endswith(("A_log", "mixer.D", "dt_proj.bias", "dt_bias", "adaptation.bias"))
        assert parameter.dtype == (torch.float32 if recurrent else torch.bfloat16), name
        if recurrent:
            assert torch.equal(parameter, model.get_parameter(name)), name
    ids = torch.stack(random_rows([60, 60]))
    with torch.no_grad():
        expected = model(ids, compress_prompt=True, use_cache=True)
        actual = half(ids, compress_prompt=True, use_cache=True)
    assert actual.logits.dtype == torch.float32
    assert_close(actual.logits, expected.logits, 5e-2, "logits")
    assert all(recurrent.dtype == torch.float32 for _, recurrent in cached_states(actual.cache_params))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
def test_a_cast_model_runs(family, dtype, limit):
    model = tiny_model(torch.float32, family=family)
    ids = torch.stack(random_rows([40, 40]))
    with torch.no_grad():
        expected = model(ids, compress_prompt=True)
        cast = copy.deepcopy(model).to(dtype)
        assert_close(cast(ids, compress_prompt=True).logits, expected.logits, limit, "logits")
        assert cast.generate(ids, max_new_tokens=3).shape == (2, 43)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16_autocast_is_finite_and_near(family, checkpointing):
    model = tiny_model(torch.float32, family=family).train()
    ids = torch.stack(random_rows([40, 40]))
    labels = torch.where(torch.arange(40) < 30, -100, ids)
    expected = model(ids, labels=labels).loss
    if checkpointing:
        model.gradient_checkpointing_enable()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=labels).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=3e-2)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all(), name


def test_a_double_model_computes_in_double(family):
    """Nothing inside may pass through float32: a change of 1e-12 in the embeddings must show, and only as large."""
    model = tiny_model(family=family)
    embeddings = model.get_input_embeddings()(torch.stack(random_rows([40])))
    labels = torch.where(torch.arange(40) < 30, -100, random_rows([40])[0])[None]
    with torch.no_grad():
        one = model(inputs_embeds=embeddings, labels=labels, use_cache=True)
        other = model(inputs_embeds=embeddings * (1 + 1e-12), labels=labels, use_cache=True)
    assert one.logits.dtype == one.loss.dtype == one.compression_scores.dtype == torch.float64
    assert 0 < (one.logits - other.logits).abs().max() < 1e-9
    for (_, first), (_, second) in zip(cached_states(one.cache_params), cached_states(other.cache_params), strict=True):
        assert 0 < (first - second).abs().max() < 1e-9
    assert 0 < abs((one.loss - other.loss).item()) < 1e-9


def test_meta_then_load(family, tmp_path):
    model = tiny_model(torch.float32, family=family)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    ids = torch.stack(random_rows([30]))
    empty.load_state_dict(model.state_dict(), assign=True)
    for other in (loaded, empty.eval()):
        assert_same_weights(other, model)
        with torch.no_grad():
            assert_close(other(ids, compress_prompt=True).logits, model(ids, compress_prompt=True).logits, 1e-6)


@pytest.mark.parametrize("settings", [{}, dict(compress_prompt=True, compression_ratio=1.0)], ids=str)
def test_shapes_on_the_meta_device(family, settings):
    """Counters of parameters and operations run models there."""
    model = tiny_model(torch.float32, family=family, selection="stride").to("meta")
    assert model(torch.zeros(2, 20, dtype=torch.long, device="meta"), use_cache=False, **settings).logits.shape == (
        2,
        20,
        50,
    )


@pytest.mark.parametrize("place", ["cpu", "disk", "map"])
def test_offloaded_weights(family, place, tmp_path):
    """accelerate fills a module's weights in when the module is called, and only then."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model(torch.float32, family=family)
    _, ids, mask, _ = batch_of("left")
    steps = dict(attention_mask=mask, do_sample=False, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
    expected = torch.stack(model.generate(ids, **steps).logits)
    if place == "map":
        model.save_pretrained(tmp_path / "model")
        parts = ["embeddings", "layers.0", "layers.1", "layers.2", "norm_f", "compressor"]
        devices = {f"backbone.{part}": ("cpu", "disk")[index % 2] for index, part in enumerate(parts)}
        offloaded = type(model).from_pretrained(
            tmp_path / "model", device_map={**devices, "lm_head": "cpu"}, offload_folder=str(tmp_path / "weights")
        )
    elif place == "disk":
        offloaded = accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    assert_close(torch.stack(offloaded.generate(ids, **steps).logits), expected, 1e-6, "logits")


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(("remamba", name) for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")),
        *(("remamba2", name) for name in ("in_proj", "conv1d", "norm", "out_proj")),
    ],
)
def test_hooks_see_every_call(family, name):
    """Projections are called as modules in every pass and every step, so that adapters and quantised layers act."""
    model = tiny_model(family=family)
    ids = torch.stack(random_rows([20]))
    expected = model.generate(ids, do_sample=False, max_new_tokens=4)
    calls = []
    getattr(model.backbone.layers[1].mixer, name).register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=4), expected)
    assert len(calls) == 2 + 3, "two passes, then a step for each token but the last"


class Adapted(torch.nn.Module):
    """A module with something added to what it returns, as adapters and quantisers wrap projections."""

    def __init__(self, base, added):
        super().__init__()
        self.base, self.added = base, added

    def forward(self, x):
        return self.base(x) + self.added(x)


@pytest.mark.parametrize(
    ("name", "kind"), [("in_proj", "module"), ("conv1d", "module"), ("conv1d", "hook"), ("out_proj", "hook")]
)
def test_what_is_added_to_a_projection_acts(family, name, kind):
    """In both passes, in chunks, with gradients and in every step, as if it were in the weights."""
    model = tiny_model(family=family)
    merged = copy.deepcopy(model)
    for layer, other in zip(model.backbone.layers, merged.backbone.layers, strict=True):
        base = getattr(layer.mixer, name)
        added = copy.deepcopy(base)
        torch.nn.init.normal_(added.weight, std=0.2)
        if added.bias is not None:
            torch.nn.init.zeros_(added.bias)
        with torch.no_grad():
            getattr(other.mixer, name).weight.add_(added.weight)
        if kind == "module":
            setattr(layer.mixer, name, Adapted(base, added))
        else:
            base.register_forward_hook(lambda _, inputs, output, added=added: output + added(*inputs))
    _, ids, mask, _ = batch_of("both")
    for settings in (dict(), dict(prefill_chunk_length=9)):
        mode = dict(attention_mask=mask, do_sample=False, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
        actual, expected = (torch.stack(m.generate(ids, **mode, **settings).logits) for m in (model, merged))
        assert_close(actual, expected, 1e-6, f"logits with {settings}")
    arguments = dict(attention_mask=mask, prompt_lengths=PROMPTS, use_cache=True)
    actual, expected = model(ids, **arguments), merged(ids, **arguments)
    assert_close(actual.logits, expected.logits, 1e-12, "logits with gradients")
    assert_same_cache(actual.cache_params, expected.cache_params, 1e-12)


@pytest.mark.parametrize("order", ["autocast first", "autocast last"])
def test_a_cache_is_continued_across_autocast(family, order):
    """A prompt read under autocast and steps without it, and the other way: near the float32 results, state in float32."""
    model = tiny_model(torch.float32, family=family)
    ids, new = torch.stack(random_rows([40, 40])), torch.stack(random_rows([6, 6], seed=2))
    with torch.no_grad():
        cache = model(ids, compress_prompt=True, use_cache=True).cache_params
        expected = torch.cat([model(token, cache_params=cache).logits for token in new.split([1, 1, 1, 3], dim=1)], dim=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=order == "autocast first"):
            cache = model(ids, compress_prompt=True, use_cache=True).cache_params
        with torch.autocast("cpu", torch.bfloat16, enabled=order == "autocast last"):
            outputs = [model(token, cache_params=cache).logits for token in new.split([1, 1, 1, 3], dim=1)]
    assert_close(torch.cat(outputs, dim=1), expected, 5e-2, "logits")
    assert all(recurrent.dtype == torch.float32 for _, recurrent in cached_states(cache))


def test_copies_and_pickles(family):
    model = tiny_model(family=family)
    ids = torch.stack(random_rows([30]))
    config = pickle.loads(pickle.dumps(model.config))
    assert config.to_dict() == model.config.to_dict()
    with torch.no_grad():
        expected = model(ids, compress_prompt=True).logits
        assert torch.equal(copy.deepcopy(model)(ids, compress_prompt=True).logits, expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(ids, compress_prompt=True).logits, expected)


def test_initialize_compressor(family):
    """remamba.md: the first blocks of layer 0's projections, copied."""
    model = tiny_model(family=family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.initialize_compressor()
    weights = model.state_dict()
    enter, leave = (before[f"backbone.layers.0.mixer.{name}.weight"] for name in ("in_proj", "out_proj"))
    expected = dict(key=(enter[:16], enter[16:32]), query=(enter[32:48], enter[48:64]), value=(leave[:, :16], leave[:, 16:]))
    for name, pair in expected.items():
        for index, weight in zip((0, 2), pair, strict=True):
            key = f"backbone.compressor.{name}.{index}"
            assert torch.equal(weights[f"{key}.weight"], weight)
            assert weights[f"{key}.bias"].abs().max() == 0
    with torch.no_grad():
        model.backbone.compressor.key[0].weight.zero_()
    assert torch.equal(model.backbone.layers[0].mixer.in_proj.weight, enter)


def test_determinism(family):
    model = tiny_model(torch.float32, family=family)
    _, ids, mask, _ = batch_of("left")
    with torch.no_grad():
        first, second = (model(ids, attention_mask=mask, prompt_lengths=PROMPTS) for _ in range(2))
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.compressed_positions, second.compressed_positions)
