# SPDX-License-Identifier: Apache-2.0
"""What cannot be honoured is refused before work is lost, by one error that says what to do instead."""

import re

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from modeling_tests.modeling.tiny_models import random_rows, tiny_config, tiny_model
from remamba_hf import ReMamba2Config
from remamba_hf.families import FAMILIES

IDS = torch.stack(random_rows([20, 20]))
MASK = torch.ones_like(IDS)
NO_SECOND_ROW = torch.stack([MASK[0], torch.zeros_like(MASK[0])])
LABELS = torch.where(torch.arange(20) < 15, -100, IDS)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return tiny_model(torch.float32, family=family)


def filled_cache(model):
    with torch.no_grad():
        return model(IDS, use_cache=True).cache_params


# Each case: what is given, and words that its message must hold: the culprit and the way out.

SETTINGS = [
    (dict(compression_start=-0.1), "compression_start.*[0, 1)"),
    (dict(compression_start=1.0), "compression_start.*[0, 1)"),
    (dict(compression_span=0.0), "compression_span.*(0, 1].*compress_prompt=False"),
    (dict(compression_span=1.1), "compression_span.*(0, 1]"),
    (dict(compression_ratio=0), "compression_ratio.*(0, 1].*compress_prompt=False"),
    (dict(compression_ratio=1.5), "compression_ratio.*(0, 1]"),
    (dict(compression_start=0.6, compression_span=0.6), "compression_start + compression_span.*Lower one"),
    (dict(compression_span=float("nan")), "compression_span.*finite"),
    (dict(compression_ratio=float("inf")), "compression_ratio.*finite"),
    (dict(compression_span="0.3"), "compression_span.*number"),
    (dict(compression_span=True), "compression_span.*number"),
]

CONFIGURATIONS = [
    *SETTINGS,
    (dict(selection="best"), "selection.*score.*random.*stride.*multiplicative"),
    (dict(compression_max_kept=0), "compression_max_kept.*at least 1"),
    (dict(compression_min_prompt=-1), "compression_min_prompt.*at least 0"),
    (dict(compression_min_prompt=1.5), "compression_min_prompt.*integer"),
    (dict(train_compression_tail=-1), "train_compression_tail.*at least 0"),
    (dict(train_compression_span=(0.3, 0.1)), "train_compression_span.*low <= high"),
    (dict(train_compression_span=(0.3,)), "train_compression_span.*(low, high)"),
    (dict(train_compression_span=0.3), "train_compression_span.*(low, high)"),
    (dict(train_compression_span=(0.1, 1.3)), "train_compression.*compression_span"),
    (dict(train_compression_ratio=(0.0, 0.3)), "train_compression.*compression_ratio"),
    (dict(train_compression_start=(0.0, 0.9)), "train_compression.*at most 1"),
    (dict(hidden_act="gelu"), "hidden_act.*silu"),
]

REMAMBA2_CONFIGURATIONS = [
    (dict(n_groups=3), "num_heads=4.*no multiple of n_groups=3"),
    (dict(num_heads=8), "num_heads.*head_dim.*64.*expand.*hidden_size.*32"),
    (dict(expand=4), "num_heads.*head_dim.*32.*expand.*hidden_size.*64"),
    (dict(num_heads=0), "num_heads"),
    (dict(head_dim=0), "head_dim"),
    *((dict([(name, 0)]), f"{name}.*at least 1") for name in ("n_groups", "state_size", "chunk_size")),
    (dict(time_step_limit=(0.1,)), "time_step_limit.*(low, high).*(0.1,)"),
    (dict(time_step_limit=(0.0, 0.1, 0.2)), "time_step_limit.*(low, high).*0.2"),
    (dict(time_step_limit=(0.2, 0.1)), "time_step_limit.*low <= high.*(0.2, 0.1)"),
    (dict(time_step_limit=(-0.1, 0.1)), "time_step_limit.*0 <= low.*-0.1"),
    (dict(time_step_limit=[0.0, float("nan")]), "time_step_limit.*(low, high).*nan"),
]

CALLS = [
    *SETTINGS,
    (dict(compression_span=[0.1, 0.2, 0.3]), "compression_span has 3 values for 2 rows"),
    (dict(compression_span=[0.1, 2.0]), "compression_span.*(0, 1].*2.0"),
    (dict(compression_ratio=torch.tensor([0.1])), "compression_ratio has 1 values for 2 rows"),
    (dict(input_ids=IDS + 40), "input_ids range.*vocabulary has ids 0 to 49.*tokenizer"),
    (dict(input_ids=IDS - 10), "input_ids range.*vocabulary has ids 0 to 49.*tokenizer"),
    (dict(input_ids=IDS[:, :0]), "at least one token"),
    (dict(prefill_chunk_length=0), "prefill_chunk_length.*at least 1"),
    (dict(prefill_chunk_length=2.5), "prefill_chunk_length.*integer"),
    (dict(attention_mask=NO_SECOND_ROW, compress_prompt=True), "rows [1].*all zeros.*Drop"),
]

FORWARDS = [
    *CALLS,
    (dict(input_ids=None), "either input_ids or inputs_embeds"),
    (dict(inputs_embeds=torch.zeros(2, 20, 16)), "either input_ids or inputs_embeds"),
    (dict(input_ids=IDS[0]), "[batch, length]"),
    (dict(attention_mask=MASK[:, :19]), "attention_mask has the shape.*expected (2, 20)"),
    (dict(attention_mask=MASK[:1]), "attention_mask has the shape.*expected (2, 20)"),
    (dict(attention_mask=MASK[:, None, None]), "attention_mask has the shape.*1 at tokens"),
    (dict(attention_mask=NO_SECOND_ROW, prompt_lengths=[5, 5]), "prompt_lengths[1].*0 tokens"),
    (dict(prompt_lengths=[5, 21]), "prompt_lengths[1] is 21.*20 tokens"),
    (dict(prompt_lengths=[0, 5]), "prompt_lengths[0] is 0.*plain pass"),
    (dict(prompt_lengths=[5]), "prompt_lengths.*2 rows.*a row"),
    (dict(prompt_lengths=5), "prompt_lengths.*2 rows.*a row"),
    (dict(prompt_lengths=torch.tensor(5)), "prompt_lengths.*2 rows.*a row"),
    (dict(prompt_lengths=[5.0, 5.0]), "prompt_lengths[0] is 5.0.*whole number"),
    (dict(prompt_lengths=[5, 16], attention_mask=torch.where(torch.arange(20) < 15, MASK, 0)), "[1] is 16.*15 tokens"),
    (dict(prompt_lengths=[15, 16], labels=LABELS), "prompt_lengths[1] is 16, but labels begin after 15.*-100"),
    (dict(labels=LABELS[:, :10]), "labels.*(2, 20)"),
    (dict(labels=LABELS[0]), "labels.*(2, 20)"),
    (dict(prefill_chunk_length=5), "prefill_chunk_length is for inference.*no_grad"),
    (dict(seq_idx=torch.zeros(2, 20, dtype=torch.int32)), "Packed rows.*Pad the examples"),
    (dict(cu_seq_lens_q=torch.tensor([0, 20, 40])), "Packed rows.*Pad the examples"),
    (dict(position_ids=torch.arange(20).remainder(10).expand(2, -1)), "position_ids restart.*pad the examples"),
    (dict(output_attentions=True), "no attention maps.*Leave it out"),
]

GENERATIONS = [
    *CALLS,
    (dict(input_ids=IDS[0]), "[batch, length]"),
    (dict(input_ids=IDS[:0]), "The prompt is empty.*at least one token"),
    (dict(attention_mask=NO_SECOND_ROW), "rows [1].*all zeros.*Drop"),
    (dict(prompt_lengths=[5, 5]), "prompt_lengths"),
    (dict(compression_spam=0.2), "compression_spam"),
    (dict(prompt_lookup_num_tokens=3), "prompt_lookup_num_tokens.*rolled back.*Leave"),
    (dict(prefill_chunk_size=8), "prefill_chunk_size.*prefill_chunk_length"),
    (dict(guidance_scale=1.5), "guidance_scale.*Leave it out"),
    (dict(cache_implementation="quantized"), "quantized.*'static'"),
    (dict(cache_implementation="sliding_window"), "sliding_window.*'static'"),
    (dict(cache_implementation="paged"), "paged.*'static'"),
]


def matching(words: str) -> str:
    """`.*` stands for anything, the rest is literal."""
    return "(?s)" + ".*".join(re.escape(part) for part in words.split(".*"))


def names(cases):
    return [re.sub(r"\s+", " ", str(given))[:60] for given, _ in cases]


@pytest.mark.parametrize(("given", "words"), CONFIGURATIONS, ids=names(CONFIGURATIONS))
def test_configurations(family, given, words):
    with pytest.raises(ValueError, match=matching(words)):
        tiny_config(family, **{**dict(train_compression_span=(0.1, 0.3)), **given})


@pytest.mark.parametrize(("given", "words"), REMAMBA2_CONFIGURATIONS, ids=names(REMAMBA2_CONFIGURATIONS))
def test_configurations_of_heads_and_steps(given, words):
    with pytest.raises(ValueError, match=matching(words)):
        ReMamba2Config(**{**dict(hidden_size=16, num_heads=4, head_dim=8, n_groups=2, state_size=4), **given})


@pytest.mark.smoke
@pytest.mark.parametrize(("given", "words"), FORWARDS, ids=names(FORWARDS))
def test_forwards(model, given, words):
    with pytest.raises(ValueError, match=matching(words)):
        model(**{**dict(input_ids=IDS), **given})


@pytest.mark.smoke
@pytest.mark.parametrize(("given", "words"), GENERATIONS, ids=names(GENERATIONS))
def test_generations(model, given, words):
    passes = []
    handle = model.backbone.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        with pytest.raises(ValueError, match=matching(words)):
            model.generate(**{**dict(input_ids=IDS, max_new_tokens=2), **given})
    finally:
        handle.remove()
    assert not passes, "refused only after a pass over the prompt"


def test_assisted_decoding(model):
    with pytest.raises(ValueError, match=matching("assistant_model.*rolled back.*Leave")):
        model.generate(IDS, assistant_model=model, max_new_tokens=2)


def test_modes_of_the_models_own_configuration(family):
    """transformers' words, but no silence either."""
    model = tiny_model(torch.float32, family=family)
    for name, value in (("prompt_lookup_num_tokens", 3), ("prefill_chunk_size", 8), ("guidance_scale", 1.5)):
        setattr(model.generation_config, name, value)
        with pytest.raises(ValueError):
            model.generate(IDS, max_new_tokens=2)
        setattr(model.generation_config, name, None)


def test_compression_forced_on_a_filled_cache(model):
    words = matching("compress_prompt=True on a filled cache.*Leave compress_prompt out")
    with pytest.raises(ValueError, match=words):
        model(IDS, cache_params=filled_cache(model), compress_prompt=True)
    with pytest.raises(ValueError, match=words):
        model.generate(IDS, past_key_values=filled_cache(model), compress_prompt=True, max_new_tokens=2)


def test_a_cache_of_other_rows(model):
    cache = filled_cache(model)
    with pytest.raises(ValueError, match=matching("The cache holds 2 rows, the input 1.*reorder_cache")):
        model(IDS[:1], cache_params=cache)
    with pytest.raises(ValueError, match=matching("The cache holds 2 rows, the input 4.*reorder_cache")):
        model.generate(IDS, past_key_values=cache, num_beams=2, max_new_tokens=2)


def test_an_empty_cache_may_be_compressed_into(model):
    cache = DynamicCache(config=model.config)
    assert model.generate(IDS, past_key_values=cache, compress_prompt=True, max_new_tokens=2).shape == (2, 22)


def test_initialize_compressor_of_another_width(family):
    with pytest.raises(ValueError, match=matching("expand=2.*expand=1")):
        tiny_model(family=family, expand=1).initialize_compressor()


def other_kinds(family):
    """A model of another architecture, and the other family's, plain and two-stage."""
    yield GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0))
    for name, other in FAMILIES.items():
        if name != family:
            yield tiny_model(torch.float32, family=name)
            own = {} if name == "remamba" else dict(num_heads=4, head_dim=8, n_groups=1)
            yield other.plain_model_class(
                other.plain_config_class(vocab_size=50, hidden_size=16, num_hidden_layers=1, **own)
            )


def test_a_checkpoint_of_another_kind(family, tmp_path):
    refused = []
    for other in other_kinds(family):
        kind = other.config.model_type
        other.save_pretrained(tmp_path / kind)
        with pytest.raises(ValueError, match=matching(f"'{kind}'.*AutoModelForCausalLM.*'{family}'")):
            FAMILIES[family].model_class.from_pretrained(tmp_path / kind)
        refused.append(kind)
    assert refused == ["gpt2", *(["remamba2", "mamba2"] if family == "remamba" else ["remamba", "mamba"])]


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_checkpoint(model, family, tmp_path, kept):
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(OSError, match=r"damaged or cut off.*Get the files again"):
        FAMILIES[family].model_class.from_pretrained(tmp_path)


def test_a_file_in_the_place_of_the_folder(model, tmp_path):
    (tmp_path / "taken").write_text("something else")
    with pytest.raises(FileExistsError, match="taken is a file"):
        model.save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "something else"


@pytest.mark.parametrize("mode", [{}, dict(do_sample=True), dict(num_beams=2)], ids=str)
def test_weights_that_are_not_finite(family, mode):
    model = tiny_model(torch.float32, family=family)
    with torch.no_grad():
        model.backbone.layers[0].mixer.in_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        model.generate(IDS, max_new_tokens=2, **mode)
