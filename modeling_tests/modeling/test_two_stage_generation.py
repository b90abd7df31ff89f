# SPDX-License-Identifier: Apache-2.0
"""generate, by every way users call it, against full forwards and the float64 reference. Logits are compared, not
tokens: a tiny model may choose the same tokens with and without compression."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from modeling_tests.modeling import reference_memmamba
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
    tiny_model,
)

LENGTHS = (1, 2, 3, 7, 23, 40)
NEW = 5
LIMIT = 1e-6  # generate hands logits out in float32
EVERY_STEP = dict(do_sample=False, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True, output_scores=True)


@pytest.fixture(scope="module")
def model(family):
    return tiny_model(family=family)


@pytest.fixture(scope="module")
def prompts():
    return random_rows(LENGTHS)


@pytest.fixture(scope="module")
def alone(model, prompts):
    """Every prompt's own run."""
    return [model.generate(prompt[None], **EVERY_STEP) for prompt in prompts]


def logits_of(output):
    """[B, steps, V]"""
    return torch.stack(output.logits, dim=1)


def expected_logits(model, text, prompt_length, steps=NEW, settings=(START, SPAN, RATIO)):
    """The reference's logits before each of the last `steps` tokens of `text`. MemMamba, whose tests of generation take
    most of these, reads a prompt like any text."""
    if model.config.model_type == "memmamba":
        return reference_memmamba.next_logits(model.state_dict(), model.config, text, steps)
    logits, *_ = reference.two_stages(model.state_dict(), model.config, text[:-1], prompt_length, *settings)
    return logits[-steps:]


def assert_rows_alone(output, alone):
    for row, expected in enumerate(alone):
        assert_close(logits_of(output)[row], logits_of(expected)[0], LIMIT, f"logits of row {row}")
        assert torch.equal(output.sequences[row, -NEW:], expected.sequences[0, -NEW:])


@pytest.mark.smoke
def test_greedy_is_the_argmax_of_the_teacher_forced_forward(model, prompts, alone):
    for prompt, output in zip(prompts, alone, strict=True):
        text = output.sequences[0]
        assert torch.equal(text[: len(prompt)], prompt)
        with torch.no_grad():
            logits = model(text[None, :-1], prompt_lengths=[len(prompt)]).logits[0, -NEW:]
        assert torch.equal(logits.argmax(-1), text[-NEW:])
        assert_close(logits_of(output)[0], logits, LIMIT)
        assert_close(logits_of(output)[0], expected_logits(model, text, len(prompt)), LIMIT)


@pytest.mark.thinned(2)
@pytest.mark.smoke
@pytest.mark.filterwarnings("ignore:.*right-padding")
@pytest.mark.parametrize("padding", ["left", "right", "both"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(use_cache=False),
        dict(cache_implementation="static"),
        dict(cache_implementation="dynamic"),
        dict(cache_implementation="offloaded"),
        *(dict(prefill_chunk_length=length) for length in (1, 2, 3, 7, 64)),
        dict(prefill_chunk_length=3, use_cache=False),
    ],
    ids=str,
)
def test_ragged_batches_equal_each_row_alone(model, prompts, alone, padding, settings):
    ids, mask, _ = padded(prompts, padding)
    assert_rows_alone(model.generate(ids, attention_mask=mask, **EVERY_STEP, **settings), alone)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("with_ids", [False, True])
def test_embeddings_in_place_of_ids(model, prompts, alone, padding, use_cache, with_ids):
    ids, mask, _ = padded(prompts, padding)
    inputs = dict(inputs_embeds=model.get_input_embeddings()(ids).detach(), **(dict(input_ids=ids) if with_ids else {}))
    output = model.generate(**inputs, attention_mask=mask, use_cache=use_cache, **EVERY_STEP)
    assert output.sequences.shape[1] == NEW + (ids.shape[1] if with_ids else 0)
    assert_rows_alone(output, alone)


def test_the_returned_cache_is_the_references_state(model, prompts, alone):
    for prompt, output in zip(prompts, alone, strict=True):
        text = output.sequences[0]
        *_, states = reference.two_stages(model.state_dict(), model.config, text[:-1], len(prompt), START, SPAN, RATIO)
        assert_same_cache(cached_states(output.past_key_values, 0), states, 1e-10)


def test_no_mask(model, prompts, alone):
    prompt = prompts[-1][None]
    expected = logits_of(alone[-1])
    for settings in ({}, dict(attention_mask=None), dict(attention_mask=torch.ones_like(prompt))):
        assert_close(logits_of(model.generate(prompt, **settings, **EVERY_STEP)), expected, LIMIT)
        assert_close(logits_of(model.generate(input_ids=prompt, **settings, **EVERY_STEP)), expected, LIMIT)


def test_no_mask_but_pad_tokens(model, prompts, alone):
    """transformers takes the pad token's positions for pads then."""
    ids, _, _ = padded(prompts, "left", fill=model.config.pad_token_id)
    assert_rows_alone(model.generate(ids, **EVERY_STEP), alone)


def test_one_new_token(model, prompts, alone):
    for settings in (dict(max_new_tokens=1), dict(max_new_tokens=None, max_length=LENGTHS[-1] + 1)):
        output = model.generate(prompts[-1][None], **{**EVERY_STEP, **settings})
        assert output.sequences.shape == (1, LENGTHS[-1] + 1)
        assert_close(logits_of(output), logits_of(alone[-1])[:, :1], LIMIT)


def test_a_prompt_from_the_bos_token_alone(model):
    assert model.generate(max_new_tokens=3).shape == (1, 4)


# Settings of the call


@pytest.mark.parametrize("use_cache", [True, False])
def test_settings_of_the_call(model, prompts, use_cache):
    settings = dict(compression_start=0.2, compression_span=0.7, compression_ratio=0.15)
    output = model.generate(prompts[-1][None], use_cache=use_cache, **settings, **EVERY_STEP)
    expected = expected_logits(model, output.sequences[0], LENGTHS[-1], settings=tuple(settings.values()))
    assert_close(logits_of(output)[0], expected, LIMIT)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("kind", [list, tuple, torch.tensor], ids=["list", "tuple", "tensor"])
@pytest.mark.parametrize("mode", [{}, dict(num_beams=2), dict(num_return_sequences=3, do_sample=True)], ids=str)
def test_settings_of_each_row(model, prompts, kind, mode):
    ids, mask, _ = padded(prompts[-2:], "left")
    spans, ratios = [0.25, 0.75], [0.5, 0.125]
    settings = dict(compression_span=kind(spans), compression_ratio=kind(ratios))
    output = model.generate(ids, attention_mask=mask, **settings, **{**EVERY_STEP, **mode})
    copies = output.sequences.shape[0] // 2
    if "num_beams" in mode:
        for row in range(2):
            own = dict(compression_span=spans[row], compression_ratio=ratios[row])
            expected = model.generate(prompts[-2 + row][None], **own, **{**EVERY_STEP, **mode})
            assert_close(output.sequences_scores[row], expected.sequences_scores[0], LIMIT)
        return
    for row in range(2 * copies):
        length = LENGTHS[-2 + row // copies]
        text = output.sequences[row, -length - NEW :]
        expected = expected_logits(model, text, length, settings=(START, spans[row // copies], ratios[row // copies]))
        assert_close(logits_of(output)[row], expected, LIMIT)


def test_one_number_as_a_tensor(model, prompts):
    ids = prompts[-1].expand(2, -1)
    settings = dict(max_new_tokens=2, num_beams=2)
    expected = model.generate(ids, compression_span=0.25, **settings)
    assert torch.equal(model.generate(ids, compression_span=torch.tensor(0.25), **settings), expected)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("mode", [{}, dict(num_beams=2)], ids=str)
def test_without_compression_it_is_plain(model, prompts, use_cache, mode):
    output = model.generate(prompts[-1][None], compress_prompt=False, use_cache=use_cache, **{**EVERY_STEP, **mode})
    if not mode:
        with torch.no_grad():
            plain = model(output.sequences[:, :-1]).logits[:, -NEW:]
            compressed = model(output.sequences[:, :-1], prompt_lengths=[LENGTHS[-1]]).logits[:, -NEW:]
        assert_close(logits_of(output), plain, LIMIT)
        assert (plain - compressed).abs().max() > 1e-3, "the model must be able to tell"


@pytest.mark.smoke
def test_progress_of_the_prefill(model, prompts):
    calls = []
    model.generate(
        prompts[-1][None], max_new_tokens=4, prefill_chunk_length=16, prefill_progress=lambda *done: calls.append(done)
    )
    window = reference.window_of(40, START, SPAN, RATIO)
    shortened = 40 - window[1] + window[2]
    total = 40 + shortened
    assert calls == [(16, total), (32, total), (40, total), (56, total), (total, total)]


def test_progress_of_a_plain_prefill(model, prompts):
    calls = []
    model.generate(
        prompts[-1][None],
        compress_prompt=False,
        max_new_tokens=2,
        prefill_chunk_length=16,
        prefill_progress=lambda *done: calls.append(done),
    )
    assert calls == [(16, 40), (32, 40), (40, 40)]


# Sampling, beams, several sequences


def test_sampling_follows_the_seed(model, prompts):
    ids, mask, _ = padded(prompts, "left")

    def sample(seed, **settings):
        torch.manual_seed(seed)
        return model.generate(ids, attention_mask=mask, do_sample=True, max_new_tokens=8, **settings)

    first = sample(1)
    assert torch.equal(first, sample(1))
    assert torch.equal(first, sample(1, use_cache=False))
    assert torch.equal(first, sample(1, prefill_chunk_length=3))
    assert not torch.equal(first, sample(2))


@pytest.mark.parametrize("use_cache", [True, False])
def test_samples_of_one_prompt_are_what_the_model_says(model, prompts, use_cache):
    ids, mask, _ = padded(prompts[-2:], "left")
    settings = {**EVERY_STEP, "do_sample": True}
    output = model.generate(ids, attention_mask=mask, num_return_sequences=3, use_cache=use_cache, **settings)
    assert output.sequences.shape[0] == 6
    assert len({tuple(row) for row in output.sequences.tolist()}) > 2
    for row in range(6):
        length = LENGTHS[-2 + row // 3]
        expected = expected_logits(model, output.sequences[row, -length - NEW :], length)
        assert_close(logits_of(output)[row], expected, LIMIT)


@pytest.mark.thinned(3)
@pytest.mark.smoke
@pytest.mark.filterwarnings("ignore:.*right-padding")
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(
    "settings", [{}, dict(use_cache=False), dict(cache_implementation="static"), dict(prefill_chunk_length=3)], ids=str
)
def test_beams(model, prompts, padding, settings):
    """Batched beams equal each prompt's own, whose scores are the sums of the teacher-forced log probabilities."""
    ids, mask, _ = padded(prompts, padding)
    mode = dict(num_beams=3, max_new_tokens=NEW, return_dict_in_generate=True, output_scores=True, length_penalty=0.0)
    output = model.generate(ids, attention_mask=mask, **mode, **settings)
    for row, prompt in enumerate(prompts):
        text = torch.cat([prompt, output.sequences[row, -NEW:]])
        probabilities = expected_logits(model, text, len(prompt)).log_softmax(-1)
        expected = probabilities.gather(1, text[-NEW:, None]).sum()
        assert output.sequences_scores[row].item() == pytest.approx(expected.item(), abs=1e-4)
        best = model.generate(prompt[None], **mode)
        assert output.sequences_scores[row].item() == pytest.approx(best.sequences_scores[0].item(), abs=1e-5)


@pytest.mark.parametrize(
    "mode",
    [
        dict(num_beams=3),
        dict(num_return_sequences=4, do_sample=True),
        dict(num_beams=4, num_return_sequences=2),
        dict(generation_config=GenerationConfig(num_beams=3, max_new_tokens=3)),
        dict(generation_config=GenerationConfig(num_return_sequences=3, do_sample=True, max_new_tokens=3)),
    ],
    ids=str,
)
def test_every_prompt_is_read_once(model, prompts, mode):
    """Beams and sequences begin as equal rows: prefill reads each prompt once and repeats its state."""
    ids, mask, _ = padded(prompts[-2:], "left")
    shapes = []
    handle = model.backbone.layers[0].register_forward_hook(lambda module, args, output: shapes.append(output.shape[:2]))
    try:
        model.generate(ids, attention_mask=mask, **{"max_new_tokens": 3, **mode})
    finally:
        handle.remove()
    prefill = [shape for shape in shapes if shape[1] > 1]
    assert [batch for batch, _ in prefill] == [2, 2]
    copies = {"num_beams": mode.get("num_beams"), "num_return_sequences": mode.get("num_return_sequences")}
    config = mode.get("generation_config")
    expected = max(value or getattr(config, name, None) or 1 for name, value in copies.items())
    assert {batch for batch, length in shapes if length == 1} == {2 * expected}


def test_beams_from_the_models_own_configuration(family, prompts):
    """transformers fills what a given GenerationConfig leaves open from the model's."""
    model = tiny_model(family=family)
    ids = torch.stack(random_rows([20, 20]))
    expected = model.generate(ids, num_beams=3, max_new_tokens=4, compression_span=[0.25, 0.5])
    model.generation_config.num_beams = 3
    for settings in (dict(max_new_tokens=4), dict(generation_config=GenerationConfig(max_new_tokens=4, pad_token_id=0))):
        assert torch.equal(model.generate(ids, compression_span=[0.25, 0.5], **settings), expected)


@pytest.mark.parametrize("prompt", [torch.tensor([[5]]), torch.tensor([[5, 6]])], ids=str)
def test_beams_where_nothing_is_compressed(model, prompt):
    assert model.generate(prompt, num_beams=2, num_return_sequences=2, max_new_tokens=3).shape == (2, prompt.shape[1] + 3)


def test_all_the_extras_of_an_output(model, prompts):
    ids, mask, _ = padded(prompts[-2:], "left")
    for mode in ({}, dict(num_beams=2), dict(use_cache=False)):
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=3,
            output_hidden_states=True,
            output_scores=True,
            return_dict_in_generate=True,
            **mode,
        )
        assert len(output.hidden_states) == 3
        assert output.hidden_states[0][0].shape[:2] == (2 * mode.get("num_beams", 1), ids.shape[1])


# What sees the tokens as they come


class _Record(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.append(value.tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("use_cache", [True, False])
def test_streamer(model, prompts, alone, use_cache):
    streamer = _Record()
    model.generate(prompts[-1][None], streamer=streamer, do_sample=False, max_new_tokens=NEW, use_cache=use_cache)
    assert streamer.ended
    assert streamer.tokens == [[prompts[-1].tolist()], *[[token] for token in alone[-1].sequences[0, -NEW:].tolist()]]


@pytest.mark.parametrize("use_cache", [True, False])
def test_processors_and_criteria_see_the_whole_text(model, prompts, use_cache):
    seen = []

    class Forbid(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids[0].tolist())
            return scores.index_fill(1, input_ids[0], -torch.inf)

    class Stop(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((1,), input_ids.shape[1] == LENGTHS[-1] + 3)

    output = model.generate(
        prompts[-1][None],
        do_sample=False,
        max_new_tokens=9,
        logits_processor=LogitsProcessorList([Forbid()]),
        stopping_criteria=StoppingCriteriaList([Stop()]),
        use_cache=use_cache,
    )
    text = output[0].tolist()
    assert len(text) == LENGTHS[-1] + 3
    assert seen == [text[:length] for length in range(LENGTHS[-1], LENGTHS[-1] + 3)]
    assert not set(text[LENGTHS[-1] :]) & set(text[: LENGTHS[-1]])


def test_the_end_of_sequence_token_stops_a_row(model, prompts, alone):
    ids, mask, _ = padded(prompts, "left")
    end = alone[-1].sequences[0, -NEW + 1].item()
    output = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, eos_token_id=end, pad_token_id=0)
    for row, expected in enumerate(alone):
        tokens = expected.sequences[0, -NEW:].tolist()
        if end in tokens:
            stop = tokens.index(end) + 1
            tokens = tokens[:stop] + [0] * (NEW - stop)
        written = output[row, ids.shape[1] :].tolist()
        assert written == tokens[: len(written)]


# Several turns


def continued(model, cache, sent, name="past_key_values", **settings):
    return model.generate(sent, **{name: cache}, **EVERY_STEP, **settings)


@pytest.mark.thinned(4)
@pytest.mark.smoke
@pytest.mark.filterwarnings("ignore:.*right-padding")
@pytest.mark.parametrize("name", ["cache_params", "past_key_values"])
@pytest.mark.parametrize("first", [{}, dict(cache_implementation="static"), dict(prefill_chunk_length=4)], ids=str)
def test_turns_of_a_ragged_batch_with_new_tokens(model, prompts, name, first):
    """Every turn sends each row's last token, which was never fed back, and its new ones, padded on any side."""
    ids, mask, _ = padded(prompts, "left")
    output = model.generate(ids, attention_mask=mask, **EVERY_STEP, **first)
    texts = [torch.cat([prompt, new]) for prompt, new in zip(prompts, output.sequences[:, -NEW:], strict=True)]
    for turn, padding in enumerate(("left", "right", "both", "left")):
        new = random_rows([3, 1, 6, 2, 5, 4][turn:] + [7, 8, 9][:turn], seed=turn + 9)
        sent = [torch.cat([text[-1:], tokens]) for text, tokens in zip(texts, new, strict=True)]
        ids, mask, _ = padded(sent, padding, turn)
        output = continued(model, output.past_key_values, ids, name, attention_mask=mask)
        texts = [
            torch.cat([text, tokens, answer])
            for text, tokens, answer in zip(texts, new, output.sequences[:, -NEW:], strict=True)
        ]
        for row, text in enumerate(texts):
            expected = expected_logits(model, text, LENGTHS[row])
            assert_close(logits_of(output)[row], expected, LIMIT, f"turn {turn}, row {row}")


@pytest.mark.thinned(3)
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("use_cache", [True, False])
def test_turns_with_the_whole_text(model, prompts, with_mask, use_cache):
    """Chat loops send everything again; what the cache has read is skipped."""
    text, output = prompts[-1][None], None
    for turn, length in enumerate((0, 3, 50, 1)):
        text = torch.cat([text, *[row[None] for row in random_rows([length], seed=turn + 5)]], dim=1)
        settings = dict(attention_mask=torch.ones_like(text)) if with_mask else {}
        if output is not None:
            settings.update(past_key_values=output.past_key_values, use_cache=use_cache)
        output = model.generate(text, **settings, **EVERY_STEP)
        assert torch.equal(output.sequences[:, : text.shape[1]], text)
        text = output.sequences
        assert_close(logits_of(output)[0], expected_logits(model, text[0], LENGTHS[-1]), LIMIT, f"turn {turn}")


@pytest.mark.thinned(2)
@pytest.mark.filterwarnings("ignore:.*right-padding")
@pytest.mark.parametrize("padding", ["left", "right", "both"])
def test_turns_of_a_ragged_batch_with_the_whole_text(model, prompts, padding):
    ids, mask, _ = padded(prompts, padding)
    output = model.generate(ids, attention_mask=mask, **EVERY_STEP)
    for turn, length in enumerate((3, 50)):
        new = torch.stack(random_rows([length] * len(prompts), seed=turn + 5))
        text = torch.cat([output.sequences, new], dim=1)
        mask = torch.nn.functional.pad(mask, (0, text.shape[1] - mask.shape[1]), value=1)
        output = continued(model, output.past_key_values, text, attention_mask=mask)
        whole = torch.nn.functional.pad(mask, (0, NEW), value=1).bool()
        for row, tokens in enumerate(output.sequences):
            expected = expected_logits(model, tokens[whole[row]], LENGTHS[row])
            assert_close(logits_of(output)[row], expected, LIMIT, f"turn {turn}, row {row}")


@pytest.mark.parametrize("length", [3, 60])
def test_turns_with_new_tokens_of_any_number(model, prompts, alone, length):
    output = model.generate(prompts[3][None], **EVERY_STEP)
    read, (new,) = output.sequences, random_rows([length])
    output = continued(model, output.past_key_values, torch.cat([read[:, -1:], new[None]], dim=1))
    text = torch.cat([read[0, :-1], output.sequences[0]])
    assert_close(logits_of(output)[0], expected_logits(model, text, LENGTHS[3]), LIMIT)


@pytest.mark.parametrize("length", [1, 2])
def test_a_turn_may_be_one_token(model, prompts, length):
    """max_new_tokens=1 or 2, then only the last token: nothing new but what the model wrote."""
    output = model.generate(prompts[-1][None], **{**EVERY_STEP, "max_new_tokens": length})
    read = output.sequences
    output = continued(model, output.past_key_values, read[:, -1:])
    text = torch.cat([read[0, :-1], output.sequences[0]])
    assert_close(logits_of(output)[0], expected_logits(model, text, LENGTHS[-1]), LIMIT)


def test_samples_continue_each_on_its_own(model, prompts):
    settings = {**EVERY_STEP, "do_sample": True}
    output = model.generate(prompts[-1][None], num_return_sequences=3, **settings)
    new = torch.stack(random_rows([4, 4, 4], seed=3))
    for whole in (False, True):
        text = torch.cat([output.sequences, new], dim=1)
        read = output.sequences[:, :-1]
        sent = text if whole else text[:, read.shape[1] :]
        output = continued(model, output.past_key_values, sent, attention_mask=torch.ones_like(sent))  # pads may be sampled
        text = output.sequences if whole else torch.cat([read, output.sequences], dim=1)
        for row in range(3):
            assert_close(logits_of(output)[row], expected_logits(model, text[row], LENGTHS[-1]), LIMIT)
        output.sequences = text


def test_one_conversation_branches(model, prompts):
    """A cache repeated by reorder_cache answers one question in several ways."""
    output = model.generate(prompts[-1][None], **EVERY_STEP)
    cache, read = output.past_key_values, output.sequences
    cache.reorder_cache(torch.zeros(3, dtype=torch.long))
    sent = torch.cat([read[:, -1:], random_rows([4])[0][None]], dim=1)
    output = model.generate(sent, past_key_values=cache, num_return_sequences=3, **{**EVERY_STEP, "do_sample": True})
    for row in range(3):
        text = torch.cat([read[0, :-1], output.sequences[row]])
        assert_close(logits_of(output)[row], expected_logits(model, text, LENGTHS[-1]), LIMIT)


def test_a_reset_cache_begins_anew(model, prompts, alone):
    output = model.generate(prompts[-2][None], **EVERY_STEP)
    output.past_key_values.reset()
    assert_close(logits_of(continued(model, output.past_key_values, prompts[-1][None])), logits_of(alone[-1]), LIMIT)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_cache_of_the_callers(model, prompts, alone, kind):
    cache = kind(config=model.config, **(dict(max_cache_len=100) if kind is StaticCache else {}))
    ids, mask, _ = padded(prompts, "left")
    assert_rows_alone(model.generate(ids, attention_mask=mask, past_key_values=cache, **EVERY_STEP), alone)
    assert cache.has_previous_state()


@pytest.mark.parametrize("length", [3, 60])
def test_embeddings_continue_a_cache_whatever_their_number(model, prompts, length):
    """Embeddings of new tokens alone: more or fewer than were read before, none may be skipped."""
    output = model.generate(prompts[3][None], **EVERY_STEP)
    read, (new,) = output.sequences, random_rows([length])
    sent = torch.cat([read[:, -1:], new[None]], dim=1)
    embeddings = model.get_input_embeddings()(sent).detach()
    output = model.generate(inputs_embeds=embeddings, past_key_values=output.past_key_values, **EVERY_STEP)
    text = torch.cat([read[0, :-1], sent[0], output.sequences[0]])
    assert_close(logits_of(output)[0], expected_logits(model, text, LENGTHS[3]), LIMIT)


def test_a_turn_after_ids_with_embeddings(model, prompts):
    """Turn 1 gives both: the prompt counts once."""
    ids = prompts[3][None]
    output = model.generate(ids, inputs_embeds=model.get_input_embeddings()(ids).detach(), **EVERY_STEP)
    text = torch.cat([output.sequences, random_rows([4])[0][None]], dim=1)
    output = continued(model, output.past_key_values, text)
    assert_close(logits_of(output)[0], expected_logits(model, output.sequences[0], LENGTHS[3]), LIMIT)


def right_or_refused(model, cache, text):
    """The whole text again, on a cache that moved in between: the right logits, or an error; never wrong ones."""
    try:
        output = continued(model, cache, text)
    except ValueError:
        return
    for row in range(text.shape[0]):
        assert_close(logits_of(output)[row], expected_logits(model, output.sequences[row], LENGTHS[-1]), LIMIT)


def test_the_whole_text_after_a_forward_of_ones_own(model, prompts):
    output = model.generate(prompts[-1][None], **EVERY_STEP)
    new = random_rows([4])[0][None]
    with torch.no_grad():
        model(torch.cat([output.sequences[:, -1:], new], dim=1), cache_params=output.past_key_values)
    right_or_refused(model, output.past_key_values, torch.cat([output.sequences, new, new], dim=1))


def test_the_whole_text_after_an_interrupted_turn(model, prompts):
    class Interrupt(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            raise KeyboardInterrupt

    output = model.generate(prompts[-1][None], **EVERY_STEP)
    text = torch.cat([output.sequences, random_rows([4])[0][None]], dim=1)
    with pytest.raises(KeyboardInterrupt):
        continued(model, output.past_key_values, text, stopping_criteria=StoppingCriteriaList([Interrupt()]))
    right_or_refused(model, output.past_key_values, text)


@pytest.mark.parametrize("mistake", [dict(compression_spam=1), dict(max_new_tokens=0), dict(compression_span=2.0)], ids=str)
def test_a_refused_turn_leaves_the_cache_usable(model, prompts, mistake):
    output = model.generate(prompts[-1][None], **EVERY_STEP)
    text = torch.cat([output.sequences, random_rows([4])[0][None]], dim=1)
    with pytest.raises(ValueError):
        model.generate(text, past_key_values=output.past_key_values, **{**EVERY_STEP, **mistake})
    output = continued(model, output.past_key_values, text)
    assert_close(logits_of(output)[0], expected_logits(model, output.sequences[0], LENGTHS[-1]), LIMIT)


def test_the_whole_text_after_the_sequences_were_overwritten(model, prompts):
    output = model.generate(prompts[-1][None], **EVERY_STEP)
    text = torch.cat([output.sequences, random_rows([4])[0][None]], dim=1)
    output.sequences.zero_()
    right_or_refused(model, output.past_key_values, text)


def test_the_whole_text_after_beams(model, prompts):
    mode = dict(num_beams=3, num_return_sequences=3, max_new_tokens=NEW, return_dict_in_generate=True)
    output = model.generate(prompts[-1][None], **mode)
    new = torch.stack(random_rows([4, 4, 4]))
    right_or_refused(model, output.past_key_values, torch.cat([output.sequences, new], dim=1))


# Compiled decoding


@pytest.mark.thinned(3)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_decoding_step_compiles_whole(family, backend, kind):
    """One graph, compiled once; no compiler is needed for these backends."""
    torch.compiler.reset()
    model = tiny_model(torch.float32, family=family)
    ids = torch.stack(random_rows([20, 20]))

    def read():
        cache = None if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=64)
        return model(ids, compress_prompt=True, use_cache=True, cache_params=cache).cache_params

    counter = CompileCounter() if backend == "eager" else None
    with torch.no_grad():
        tokens = torch.stack(random_rows([6, 6], seed=4))
        expected_cache, cache = read(), read()
        expected = [model(tokens[:, t : t + 1], cache_params=expected_cache).logits for t in range(6)]
        step = torch.compile(model, fullgraph=True, backend=counter or backend)
        actual = [step(tokens[:, t : t + 1], cache_params=cache).logits for t in range(6)]
    assert_close(torch.cat(actual, dim=1), torch.cat(expected, dim=1), 1e-6)
    assert_same_cache(cache, expected_cache, 1e-6)
    if counter is not None:
        assert counter.frame_count == 1
    torch.compiler.reset()


@pytest.mark.parametrize("whole", [True, False], ids=["whole text", "new tokens"])
def test_a_long_new_turn_is_read_in_chunks_too(model, prompts, whole):
    first = model.generate(prompts[-1][None], **EVERY_STEP)
    new = random_rows([11])[0][None]
    text = torch.cat([first.sequences if whole else first.sequences[:, -1:], new], dim=1)
    cache = copy.deepcopy(first.past_key_values)
    expected = model.generate(text, past_key_values=cache, **EVERY_STEP)
    read, seen = [], []
    with model.backbone.layers[0].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1])):
        chunked = model.generate(
            text,
            past_key_values=first.past_key_values,
            prefill_chunk_length=5,
            prefill_progress=lambda done, total: seen.append((done, total)),
            **EVERY_STEP,
        )
    assert read[:3] == [5, 5, 2]
    assert seen == [(5, 12), (10, 12), (12, 12)]
    for step, other in zip(chunked.logits, expected.logits, strict=True):
        torch.testing.assert_close(step, other)


def test_generate_draws_no_training_settings(model, prompts):
    expected = model.generate(prompts[-1][None], **EVERY_STEP)
    training = copy.deepcopy(model).train()
    training.config.train_compression_span, training.config.train_compression_tail = (0.1, 0.15), 0
    for mode in ({}, dict(use_cache=False)):
        state = torch.get_rng_state()
        found = training.generate(prompts[-1][None], **EVERY_STEP, **mode)
        assert torch.equal(torch.get_rng_state(), state)
        for step, other in zip(found.logits, expected.logits, strict=True):
            torch.testing.assert_close(step, other)


def test_a_batch_with_a_row_that_ended_early_is_not_continued(model):
    """transformers feeds a finished row pads until the last one ends, and its state has read them."""
    end = 7

    class EndFirstRow(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, end] = -1e9
            if input_ids.shape[1] == 21:
                scores[0, end] = 1e9
            return scores

    rows = torch.stack(random_rows([20, 20]))
    settings = dict(do_sample=False, eos_token_id=end, pad_token_id=0, return_dict_in_generate=True, max_new_tokens=6)
    for count, refused in ((2, True), (1, False)):
        output = model.generate(rows[:count], logits_processor=LogitsProcessorList([EndFirstRow()]), **settings)
        assert output.sequences[0, 21] == end
        text = torch.cat([output.sequences, torch.stack(random_rows([4] * count))], dim=1)
        if refused:
            with pytest.raises(ValueError, match=r"Rows \[0\] of this cache ended before"):
                model.generate(text, past_key_values=output.past_key_values, **settings)
        else:
            model.generate(text, past_key_values=output.past_key_values, **settings)


def test_misspelt_and_contradictory_arguments_of_forward(model, prompts):
    ids = prompts[-1][None]
    for name in ("compresion_span", "compress_promt", "prefill_chunk", "prompt_length"):
        with pytest.raises(ValueError, match=name):
            model(ids, **{name: 1})
    with pytest.raises(ValueError, match="nothing says what the prompt is"):
        model(ids, compression_span=0.3)
    cache = model(ids, use_cache=True).cache_params
    with pytest.raises(ValueError, match="prompt_lengths on a filled cache"):
        model(ids[:, :3], cache_params=cache, prompt_lengths=[3])
