# SPDX-License-Identifier: Apache-2.0
"""generate of MemMamba: every test of test_two_stage_generation.py that does not speak of compression, with the reference
that `expected_logits` takes for this family, and what this family has of its own."""

import copy

import pytest
import torch
from transformers import GenerationConfig

from modeling_tests.modeling import reference_memmamba as reference
from modeling_tests.modeling.test_two_stage_generation import (  # noqa: F401
    EVERY_STEP,
    LENGTHS,
    LIMIT,
    NEW,
    expected_logits,
    logits_of,
    test_a_batch_with_a_row_that_ended_early_is_not_continued,
    test_a_cache_of_the_callers,
    test_a_long_new_turn_is_read_in_chunks_too,
    test_a_prompt_from_the_bos_token_alone,
    test_a_refused_turn_leaves_the_cache_usable,
    test_a_reset_cache_begins_anew,
    test_a_turn_after_ids_with_embeddings,
    test_a_turn_may_be_one_token,
    test_all_the_extras_of_an_output,
    test_beams,
    test_embeddings_continue_a_cache_whatever_their_number,
    test_embeddings_in_place_of_ids,
    test_no_mask,
    test_no_mask_but_pad_tokens,
    test_one_conversation_branches,
    test_one_new_token,
    test_processors_and_criteria_see_the_whole_text,
    test_ragged_batches_equal_each_row_alone,
    test_samples_continue_each_on_its_own,
    test_samples_of_one_prompt_are_what_the_model_says,
    test_sampling_follows_the_seed,
    test_streamer,
    test_the_end_of_sequence_token_stops_a_row,
    test_the_whole_text_after_a_forward_of_ones_own,
    test_the_whole_text_after_an_interrupted_turn,
    test_the_whole_text_after_beams,
    test_the_whole_text_after_the_sequences_were_overwritten,
    test_turns_of_a_ragged_batch_with_new_tokens,
    test_turns_of_a_ragged_batch_with_the_whole_text,
    test_turns_with_new_tokens_of_any_number,
    test_turns_with_the_whole_text,
)
from modeling_tests.modeling.tiny_models import (
    assert_close,
    assert_same_memory,
    memory_states,
    padded,
    random_rows,
    tiny_memmamba,
)


@pytest.fixture(scope="module", params=["memmamba"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    """Prompts of 1 to 40 tokens end everywhere in its chunks of 4, and fill its pools of 5 from 23 on."""
    return tiny_memmamba()


@pytest.fixture(scope="module")
def prompts():
    return random_rows(LENGTHS)


@pytest.fixture(scope="module")
def alone(model, prompts):
    """Every prompt's own run."""
    return [model.generate(prompt[None], **EVERY_STEP) for prompt in prompts]


@pytest.mark.smoke
def test_greedy_is_the_argmax_of_the_teacher_forced_forward(model, prompts, alone):
    for prompt, output in zip(prompts, alone, strict=True):
        text = output.sequences[0]
        assert torch.equal(text[: len(prompt)], prompt)
        with torch.no_grad():
            logits = model(text[None, :-1]).logits[0, -NEW:]
        assert torch.equal(logits.argmax(-1), text[-NEW:])
        assert_close(logits_of(output)[0], logits, LIMIT)
        assert_close(logits_of(output)[0], expected_logits(model, text, len(prompt)), LIMIT)


def test_the_returned_cache_is_the_references_state(model, prompts, alone):
    for prompt, output in zip(prompts, alone, strict=True):
        _, memories, _ = reference.read(model.state_dict(), model.config, output.sequences[0, :-1])
        expected = [reference.packed(model.config, memory) for memory in memories]
        assert_same_memory(memory_states(output.past_key_values, 0), expected, 1e-10, f"after {len(prompt)} tokens")


def test_many_steps_over_many_chunks(model, prompts):
    """Sixty steps of a ragged batch: rows commit their chunks at different steps, and notes of the prompt are replaced."""
    ids, mask, _ = padded(prompts, "left")
    mode = dict(do_sample=True, max_new_tokens=60, return_dict_in_generate=True, output_logits=True)
    output = model.generate(ids, attention_mask=mask, **mode)
    for row, prompt in enumerate(prompts):
        text = torch.cat([prompt, output.sequences[row, -60:]])
        expected = reference.next_logits(model.state_dict(), model.config, text, 60)
        assert_close(logits_of(output)[row], expected, LIMIT, f"row {row}")


@pytest.mark.smoke
def test_progress_of_the_prefill(model, prompts):
    calls = []
    settings = dict(prefill_chunk_length=16, prefill_progress=lambda *done: calls.append(done))
    model.generate(prompts[-1][None], max_new_tokens=4, **settings)
    assert calls == [(16, 40), (32, 40), (40, 40)]


def wiped(cache):
    """A cache whose pools were emptied."""
    cache = copy.deepcopy(cache)
    for layer in cache.layers:
        layer.recurrent_states[1][:, :-1] = 0
    return cache


def test_the_memory_survives_decoding(model, prompts):
    """Notes of the prompt act on what is written after it, whatever the number of steps since."""
    output = model.generate(prompts[-1][None], **{**EVERY_STEP, "max_new_tokens": 9})
    last = output.sequences[:, -1:]
    kept, lost = (
        model.generate(last, past_key_values=change(output.past_key_values), **EVERY_STEP)
        for change in (copy.deepcopy, wiped)
    )
    text = torch.cat([output.sequences, kept.sequences[:, 1:]], dim=1)[0]
    assert_close(logits_of(kept)[0], expected_logits(model, text, len(text)), LIMIT)
    assert (logits_of(kept)[0, 0] - logits_of(lost)[0, 0]).abs().max() > 0.1


@pytest.mark.parametrize(
    "mode",
    [
        dict(num_beams=3),
        dict(num_return_sequences=4, do_sample=True),
        dict(num_beams=4, num_return_sequences=2),
        dict(generation_config=GenerationConfig(num_beams=3, max_new_tokens=3)),
    ],
    ids=str,
)
def test_every_prompt_is_read_once(model, prompts, mode):
    """Beams and sequences begin as equal rows: prefill reads each prompt once and repeats its state."""
    ids, mask, _ = padded(prompts[-2:], "left")
    shapes = []
    handle = model.backbone.layers[0].register_forward_hook(lambda module, args, output: shapes.append(output[0].shape[:2]))
    try:
        model.generate(ids, attention_mask=mask, **{"max_new_tokens": 3, **mode})
    finally:
        handle.remove()
    assert [tuple(shape) for shape in shapes if shape[1] > 1] == [(2, 40)]
    copies = max(mode.get("num_beams", 1), mode.get("num_return_sequences", 1), 3 if "generation_config" in mode else 1)
    assert {batch for batch, length in shapes if length == 1} == {2 * copies}


def test_beams_from_the_models_own_configuration(prompts):
    """transformers fills what a given GenerationConfig leaves open from the model's."""
    model = tiny_memmamba()
    ids = torch.stack(random_rows([20, 20]))
    expected = model.generate(ids, num_beams=3, max_new_tokens=4)
    model.generation_config.num_beams = 3
    for settings in (dict(max_new_tokens=4), dict(generation_config=GenerationConfig(max_new_tokens=4, pad_token_id=0))):
        assert torch.equal(model.generate(ids, **settings), expected)


def test_the_cache_does_not_grow(model):
    def size(length):
        (prompt,) = random_rows([length])
        cache = model.generate(prompt[None], max_new_tokens=10, return_dict_in_generate=True).past_key_values
        tensors = [t for layer in cache.layers for t in (*layer.conv_states.values(), *layer.recurrent_states.values())]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors), len(tensors)

    assert size(1) == size(1000)


@pytest.mark.parametrize("settings", [dict(chunk_size=1), dict(write_rule="fifo"), dict(fusion_position="post")], ids=str)
def test_other_memories_generate_too(settings, prompts):
    model = tiny_memmamba(**settings)
    ids, mask, _ = padded(prompts, "left")
    output = model.generate(ids, attention_mask=mask, **EVERY_STEP)
    for row, prompt in enumerate(prompts):
        text = torch.cat([prompt, output.sequences[row, -NEW:]])
        assert_close(logits_of(output)[row], expected_logits(model, text, len(prompt)), LIMIT, f"row {row}")


def test_generate_in_training_mode_is_the_same(model, prompts, alone):
    training = copy.deepcopy(model).train()
    for mode in ({}, dict(use_cache=False)):
        assert_close(logits_of(training.generate(prompts[-1][None], **EVERY_STEP, **mode)), logits_of(alone[-1]), LIMIT)


def test_a_compiled_step_is_the_same():
    """Its clock is on the host, so that it is no single graph; the result must not change."""
    torch.compiler.reset()
    model = tiny_memmamba(torch.float32, num_hidden_layers=1)
    ids, tokens = torch.stack(random_rows([18, 18])), torch.stack(random_rows([3, 3], seed=4))
    mode = dict(max_new_tokens=1, return_dict_in_generate=True, cache_implementation="static")
    expected_cache, cache = (model.generate(ids, **mode).past_key_values for _ in range(2))
    with torch.no_grad():
        expected = [model(token, cache_params=expected_cache).logits for token in tokens.split(1, dim=1)]
        step = torch.compile(model, backend="eager")
        actual = [step(token, cache_params=cache).logits for token in tokens.split(1, dim=1)]
    assert_close(torch.cat(actual, dim=1), torch.cat(expected, dim=1), 1e-6)
    assert_same_memory(cache, expected_cache, 1e-6)
    torch.compiler.reset()


# Refusals: each names what was given, and most of them the way out.


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(prompt_lookup_num_tokens=3), "prompt_lookup_num_tokens.*rolled back"),
        (dict(assistant_early_exit=1), "assistant_early_exit.*rolled back"),
        (dict(prefill_chunk_size=8), "prefill_chunk_size.*Pass prefill_chunk_length"),
        (dict(guidance_scale=2.0), "guidance_scale.*Leave it out"),
        (dict(cache_implementation="quantized"), "cache_implementation='quantized'.*leave cache_implementation out"),
        (dict(prompt_lengths=[20]), "generate takes no prompt_lengths"),
        (dict(prefill_chunk_length=0), "prefill_chunk_length must be an integer of at least 1"),
        (dict(prefill_chunk_length=2.5), "prefill_chunk_length must be an integer of at least 1"),
        (dict(inputs=torch.zeros(1, 0, dtype=torch.long)), "The prompt is empty"),
        (dict(inputs=torch.tensor([[3, 99]])), "input_ids range from 3 to 99"),
        (dict(attention_mask=torch.zeros(1, 20)), "rows \\[0\\] is all zeros"),
        (dict(compress_prompt=True), "compress_prompt"),
        (dict(compress_prompt=False), "compress_prompt"),
        (dict(compression_span=0.3), "compression_span"),
        (dict(compression_ratio=0.3), "compression_ratio"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_honoured_is_refused(model, given, words):
    inputs = dict(inputs=torch.stack(random_rows([20])), max_new_tokens=2)
    with pytest.raises(ValueError, match=words):
        model.generate(**{**inputs, **given})


def test_assisted_decoding_is_refused(model):
    with pytest.raises(ValueError, match=r"assistant_model.*rolled back"):
        model.generate(torch.stack(random_rows([20])), assistant_model=model, max_new_tokens=2)


@pytest.mark.parametrize(
    "given",
    [dict(compress_prompt=True), dict(compression_start=0.1), dict(compression_span=0.3), dict(prompt_lengths=[5])],
    ids=str,
)
def test_forward_has_no_compression(model, given):
    with pytest.raises(ValueError, match=next(iter(given))):
        model(torch.stack(random_rows([20])), **given)


def test_a_cache_of_other_rows_is_refused(model):
    ids = torch.stack(random_rows([20, 20]))
    with torch.no_grad():
        cache = model(ids, use_cache=True).cache_params
    with pytest.raises(ValueError, match="The cache holds 2 rows, the input 1"):
        model(ids[:1], cache_params=cache)
