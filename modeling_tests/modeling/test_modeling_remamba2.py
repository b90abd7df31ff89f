# SPDX-License-Identifier: Apache-2.0
"""What Mamba-2 alone has: steps with limits and one a head, groups, one projection for everything, and cached states that
transformers continues rightly. What both families share is in test_two_stage_model.py."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, Mamba2Config, Mamba2ForCausalLM

from modeling_tests.modeling import reference_two_stages as reference
from modeling_tests.modeling.tiny_models import (
    RATIO,
    SPAN,
    START,
    assert_close,
    assert_same_cache,
    cached_states,
    padded,
    random_rows,
    tiny_config,
    tiny_model,
)
from remamba_hf import ReMamba2Config, ReMamba2ForCausalLM
from remamba_hf.modeling import modeling_remamba2
from remamba_hf.modeling.modeling_remamba2 import GatedGroupNorm
from remamba_hf.modeling.selective_compression import Adaptation

UNLIMITED = (0.0, float("inf"))


def mamba2(**settings):
    return tiny_model(family="remamba2", **settings)


@pytest.fixture
def steps(monkeypatch):
    """The step sizes dt of every call of the operator, as the mixers hand them over."""
    seen = []
    operator, step = modeling_remamba2.state_space_dual, modeling_remamba2.state_space_dual_step

    def record(x, dt, *args, **kwargs):
        seen.append(dt.detach().clone())
        return operator(x, dt, *args, **kwargs)

    def record_step(x, dt, *args, **kwargs):
        seen.append(dt.detach().clone())
        return step(x, dt, *args, **kwargs)

    monkeypatch.setattr(modeling_remamba2, "state_space_dual", record)
    monkeypatch.setattr(modeling_remamba2, "state_space_dual_step", record_step)
    return seen


# Cached states


@pytest.mark.smoke
@pytest.mark.parametrize("limit", [UNLIMITED, (0.01, 0.5)], ids=str)
def test_cached_states_are_transformers_own(tmp_path, limit):
    """Turn after turn. transformers' decoding step alone ignores the limits, so with limits there are no single tokens."""
    config = Mamba2Config(
        vocab_size=50,
        hidden_size=32,
        state_size=8,
        num_hidden_layers=3,
        num_heads=4,
        head_dim=16,
        n_groups=1,
        chunk_size=16,
        time_step_limit=limit,
    )
    theirs = Mamba2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if not name.endswith(("A_log", "mixer.D")):
                parameter.add_(torch.randn_like(parameter) * (1.0 if name.endswith("dt_bias") else 0.1))
    theirs.save_pretrained(tmp_path)
    ours = ReMamba2ForCausalLM.from_pretrained(tmp_path).eval()
    pieces = [20, 7, 2, 33, 3] if limit != UNLIMITED else [20, 7, 1, 1, 33, 1, 2, 3]
    ids = torch.randint(0, 50, (3, sum(pieces)))
    mine, other = DynamicCache(config=ours.config), DynamicCache(config=config)
    with torch.no_grad():
        for turn, piece in enumerate(ids.split(pieces, dim=1)):
            expected = theirs(piece, cache_params=other, use_cache=True).logits
            assert_close(ours(piece, cache_params=mine, use_cache=True).logits, expected, 1e-5, f"logits of turn {turn}")
            assert_same_cache(mine, other, 1e-5, f"cache after turn {turn}")
    conv, recurrent = cached_states(mine)[0]
    assert conv.shape == (3, 64 + 2 * 8, 4)
    assert recurrent.shape == (3, 4, 16, 8)
    # A conversation that transformers began goes on here, and back.
    new = torch.randint(0, 50, (3, 5))
    with torch.no_grad():
        swapped = ours(new, cache_params=copy.deepcopy(other)).logits, theirs(new, cache_params=mine, use_cache=True).logits
        expected = theirs(new, cache_params=other, use_cache=True).logits
    for logits in swapped:
        assert_close(logits, expected, 1e-5, "logits on the other's cache")


# Limits of the step size


@pytest.mark.parametrize(
    "settings",
    [
        dict(time_step_limit=(0.01, 0.5)),
        dict(time_step_limit=(0.3, float("inf"))),
        dict(time_step_limit=(0.0, 0.1)),
        dict(time_step_limit=(0.01, 0.5), hidden_size=15, num_heads=6, n_groups=3, state_size=7),
        dict(time_step_limit=(0.01, 0.5), num_heads=8, n_groups=8, use_bias=True, use_conv_bias=False),
        dict(time_step_limit=(0.01, 0.5), num_heads=32, n_groups=1, state_size=1, conv_kernel=1),
    ],
    ids=str,
)
def test_decoding_keeps_the_limits(steps, settings):
    """Token by token equals the full pass and the reference, plain and after a compressed prompt, where limits bite."""
    model = mamba2(**settings)
    low, high = settings["time_step_limit"]
    (text,) = random_rows([40])
    for prompt_length in (None, 20):
        with torch.no_grad():
            lengths = dict(prompt_lengths=[prompt_length]) if prompt_length else {}
            whole = model(text[None], use_cache=True, **lengths)
            begin = prompt_length or 3
            cache = model(text[None, :begin], compress_prompt=prompt_length is not None, use_cache=True).cache_params
            steps.clear()
            decoded = [model(token[None, None], cache_params=cache).logits for token in text[begin:]]
        assert len(steps) == 3 * (40 - begin)
        taken = torch.cat(steps)
        assert taken.shape[1:] == (model.config.num_heads,)
        assert (taken >= low).all()
        assert (taken <= high).all()
        assert low == 0 or (taken == low).any(), "the lower limit must bite in decoding"
        assert high == float("inf") or (taken == high).any(), "the upper limit must bite in decoding"
        assert_close(torch.cat(decoded, dim=1), whole.logits[:, begin:], 1e-10, "logits")
        assert_same_cache(cache, whole.cache_params, 1e-10)
    logits, _, _, states = reference.two_stages(model.state_dict(), model.config, text, 20, START, SPAN, RATIO)
    assert_close(torch.cat(decoded, dim=1)[0], logits[20:], 1e-10, "logits against the reference")
    assert_same_cache(cached_states(cache, 0), states, 1e-10)


@pytest.mark.parametrize("padding", ["left", "right", "both"])
def test_a_pad_takes_no_step_though_the_lower_limit_is_above_zero(steps, padding):
    model = mamba2(time_step_limit=(0.3, 0.6))
    ids, mask, _ = padded(random_rows([9, 0, 17, 1]), padding)
    lengths = mask.sum(1)
    with torch.no_grad():
        for settings, stages in (({}, 1), (dict(prompt_lengths=[9, 17, 1]), 2)):
            rows = [0, 2, 3] if stages == 2 else [0, 1, 2, 3]
            steps.clear()
            model(ids[rows], attention_mask=mask[rows], **settings)
            assert len(steps) == 3 * stages
            for dt in steps[:3]:
                tokens = torch.arange(dt.shape[1]) < lengths[rows][:, None]
                assert (dt[tokens] >= 0.3).all()
                assert not dt[~tokens].any(), "exactly zero at pads"
            for dt in steps[3:]:
                # 9 tokens lose all but 2 of a window of 5; 17 tokens all but 3 of a window of 9.
                assert [(row != 0).any(-1).sum().item() for row in dt] == [9 - 5 + 2, 17 - 9 + 3, 1]


def test_the_limits_survive_a_checkpoint(tmp_path):
    for limit in (UNLIMITED, (0.01, 0.5)):
        tiny_config("remamba2", time_step_limit=limit).save_pretrained(tmp_path)
        assert tuple(ReMamba2Config.from_pretrained(tmp_path).time_step_limit) == limit


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(n_groups=3), "num_heads=4 is no multiple of n_groups=3"),
        (dict(time_step_limit=(0.5, 0.1)), "time_step_limit"),
        (dict(time_step_limit=(-0.5, 0.1)), "time_step_limit"),
        (dict(time_step_limit=(0.1,)), "time_step_limit"),
        (dict(time_step_limit=(0.0, float("nan"))), "time_step_limit"),
        (dict(hidden_act="gelu"), "silu"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_honoured(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config("remamba2", **settings)


# Selective adaptation

LENGTH, WHERE = 12, torch.tensor([2, 3, 12 + 5])  # flat positions in two rows


def mixer_steps(steps, mixer, hidden_states, alpha=None, where=WHERE):
    """dt [2, L, heads] of one pass."""
    steps.clear()
    with torch.no_grad():
        mixer(hidden_states, None if alpha is None else Adaptation(where, torch.as_tensor(alpha).double()))
    return steps[0]


def test_without_alpha_a_kept_vector_steps_by_theta_and_bias_alone(steps):
    """dt = clamp(softplus(Theta + dt_bias)): alpha scales what the projection says and not the bias."""
    mixer = mamba2(time_step_limit=UNLIMITED).backbone.layers[1].mixer
    hidden_states = torch.randn(2, LENGTH, 16, dtype=torch.float64)
    plain = mixer_steps(steps, mixer, hidden_states)
    adapted = mixer_steps(steps, mixer, hidden_states, [0.0, 0.0, 0.0])
    kept = torch.zeros(2 * LENGTH, dtype=torch.bool).index_fill(0, WHERE, True).view(2, LENGTH)
    assert torch.equal(adapted[~kept], plain[~kept]), "nothing changes where no vector was kept"
    assert (plain[kept] != adapted[kept]).all()
    expected = F.softplus(mixer.adaptation.bias + mixer.dt_bias).detach()
    torch.testing.assert_close(adapted[kept], expected.expand(3, -1), rtol=1e-14, atol=0)
    mixer.config.time_step_limit = low, high = 0.2, 0.4
    limited = mixer_steps(steps, mixer, hidden_states, [0.0, 0.0, 0.0])
    torch.testing.assert_close(limited[kept], expected.clamp(low, high).expand(3, -1), rtol=1e-14, atol=0)
    assert (expected < low).any() or (expected > high).any(), "the limits must bite"


def test_alpha_scales_the_projected_step(steps):
    mixer = mamba2(time_step_limit=UNLIMITED).backbone.layers[0].mixer
    hidden_states = torch.randn(2, LENGTH, 16, dtype=torch.float64)
    alpha = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)
    adapted = mixer_steps(steps, mixer, hidden_states, alpha).flatten(0, 1)[WHERE]
    with torch.no_grad():
        raw = mixer.in_proj(hidden_states)[..., -4:].flatten(0, 1)[WHERE]
        expected = F.softplus(alpha[:, None] * raw + mixer.adaptation.bias + mixer.dt_bias)
    torch.testing.assert_close(adapted, expected, rtol=1e-13, atol=0)


def test_theta_acts_on_its_own_head(steps):
    mixer = mamba2(time_step_limit=UNLIMITED).backbone.layers[0].mixer
    hidden_states = torch.randn(2, LENGTH, 16, dtype=torch.float64)
    before = mixer_steps(steps, mixer, hidden_states, [0.5, 0.5, 0.5])
    with torch.no_grad():
        mixer.adaptation.bias[2] += 1
    after = mixer_steps(steps, mixer, hidden_states, [0.5, 0.5, 0.5])
    changed = (before != after).flatten(0, 1)
    expected = torch.zeros_like(changed)
    expected[WHERE, 2] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("alpha", [[0.0, 0.0, 0.0], [0.3, 1.0, 0.0]], ids=str)
@pytest.mark.parametrize("padded_to", [None, 9])
def test_a_mixer_agrees_with_the_reference(alpha, padded_to):
    """Outputs and states of one mixer, and the gradient of alpha, with the second row shorter or not."""
    model = mamba2()
    mixer = model.backbone.layers[2].mixer
    weights = reference.under(model.state_dict(), "backbone.layers.2.mixer.")
    hidden_states = torch.randn(2, LENGTH, 16, dtype=torch.float64)
    lengths = [LENGTH, padded_to or LENGTH]
    mine, theirs = (torch.tensor(alpha, dtype=torch.float64, requires_grad=True) for _ in range(2))
    cache = DynamicCache(config=model.config)
    for layer in range(2):  # the layers below must have been there
        model.backbone.layers[layer].mixer(hidden_states, cache_params=cache)
    tokens = torch.tensor(lengths) if padded_to else None
    y = mixer(hidden_states, Adaptation(WHERE, mine), tokens, cache)
    steps_of_rows = [[None] * LENGTH, [None] * LENGTH]
    for place, value in zip(WHERE.tolist(), theirs, strict=True):
        steps_of_rows[place // LENGTH][place % LENGTH] = value
    total, expected_total = 0, 0
    for row, length in enumerate(lengths):
        expected, (conv, ssm) = reference.mamba2_mixer(
            weights, model.config, hidden_states[row, :length], steps_of_rows[row], None
        )
        assert_close(y[row, :length], expected, 1e-12, f"output of row {row}")
        assert_close(cached_states(cache, row)[2][0], conv, 1e-12, f"convolution inputs of row {row}")
        assert_close(cached_states(cache, row)[2][1], ssm, 1e-12, f"state of row {row}")
        total, expected_total = total + y[row, :length].sin().sum(), expected_total + expected.sin().sum()
    (gradient,) = torch.autograd.grad(total, mine)
    (expected_gradient,) = torch.autograd.grad(expected_total, theirs)
    assert_close(gradient, expected_gradient, 1e-10, "gradient of alpha")


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nothing_is_modified_in_place(dtype, with_gradients):
    """What came in, alpha, and what in_proj returned: the step is a view of it."""
    model = mamba2(dtype=dtype)
    hidden_states = torch.randn(2, LENGTH, 16, dtype=dtype)
    alpha, where, lengths = torch.tensor([0.1, 0.5, 0.9], dtype=dtype), WHERE.clone(), torch.tensor([12, 7])
    watched = [(tensor, tensor.clone(), tensor._version) for tensor in (hidden_states, alpha, where, lengths)]
    for block in model.backbone.layers:
        block.mixer.in_proj.register_forward_hook(lambda *call: watched.append((call[2], call[2].clone(), call[2]._version)))
    with torch.set_grad_enabled(with_gradients):
        cache = DynamicCache(config=model.config)
        model.backbone.run_layers(hidden_states, lengths, Adaptation(where, alpha), cache, None)
        model.backbone.run_layers(hidden_states[:, :5], None, None, cache, None)
        model.backbone.run_layers(hidden_states[:, :1], None, None, cache, None)
        embeddings = torch.randn(2, 30, 16, dtype=dtype)
        watched.append((embeddings, embeddings.clone(), embeddings._version))
        model(inputs_embeds=embeddings, compress_prompt=True)
    assert len(watched) == 4 + 3 * 3 + 1 + 2 * 3
    for tensor, before, version in watched:
        assert torch.equal(tensor, before)
        assert tensor._version == version


# Dtypes


@pytest.mark.parametrize("how", ["loaded", "cast", "autocast"])
def test_steps_and_states_are_in_float32(steps, tmp_path, how):
    """In prefill and decoding, whatever the weights are in; a step in bfloat16 would be off by up to 1 in 256."""
    model = mamba2(dtype=torch.float32)
    if how == "loaded":
        model.save_pretrained(tmp_path)
        model = ReMamba2ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    elif how == "cast":
        model = model.to(torch.bfloat16)
    ids = torch.stack(random_rows([20, 20]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        output = model(ids, compress_prompt=True, use_cache=True)
        model(ids[:, :1], cache_params=output.cache_params)
    assert len(steps) == 3 * 3
    for dt in steps:
        assert dt.dtype == torch.float32
        assert not torch.equal(dt, dt.bfloat16().float())
    assert all(recurrent.dtype == torch.float32 for _, recurrent in cached_states(output.cache_params))


def test_a_double_model_computes_its_steps_in_double(steps):
    model = mamba2()
    ids = torch.stack(random_rows([20, 20]))
    with torch.no_grad():
        output = model(ids, compress_prompt=True, use_cache=True)
        model(ids[:, :1], cache_params=output.cache_params)
    for dt in steps:
        assert dt.dtype == torch.float64
        assert not torch.equal(dt, dt.float().double())


# The gated norm


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_the_gated_norm_is_taken_over_each_group(groups):
    norm = GatedGroupNorm(12, groups, eps=1e-5).double()
    torch.nn.init.normal_(norm.weight)
    x, gate = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    gated = x * gate * torch.sigmoid(gate)
    parts = [part / (part.square().mean(-1, keepdim=True) + 1e-5).sqrt() for part in gated.chunk(groups, dim=-1)]
    with torch.no_grad():
        actual = norm(x, gate)
        assert_close(actual, torch.cat(parts, dim=-1) * norm.weight, 1e-14, "norm")
        if groups > 1:
            louder = x.clone()
            louder[..., : 12 // groups] *= 100
            assert torch.equal(norm(louder, gate)[..., 12 // groups :], actual[..., 12 // groups :])
            norm.groups = 1
            assert (norm(x, gate) - actual).abs().max() > 0.1, "the groups must show"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gated_norm_computes_in_float32(dtype):
    """x * silu(gate) leaves float16's range here, the norm of it does not."""
    norm = GatedGroupNorm(8, 2, eps=1e-5)
    x, gate = (1000 * torch.randn(2, 3, 8).abs()).to(dtype), (500 * torch.rand(3, 8) + 1).to(dtype)
    with torch.no_grad():
        expected = norm(x.float(), gate.float())
        actual = norm.to(dtype)(x, gate)
    assert actual.dtype == dtype
    assert torch.equal(actual[0], expected[0].to(dtype))
