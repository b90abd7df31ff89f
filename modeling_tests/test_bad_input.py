# SPDX-License-Identifier: Apache-2.0
"""What cannot be honoured is refused before work is lost, by one error that says what to do instead."""

import json
import math
import re

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

from modeling_tests.modeling.tiny_models import random_rows, tiny_config, tiny_memmamba, tiny_model
from remamba_hf import MemMambaConfig, ReMamba2Config
from remamba_hf.families import ALL_FAMILIES, FAMILIES

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


def tiny(family, **settings):
    make = tiny_memmamba if family == "memmamba" else tiny_model
    return make(torch.float32, **settings, **({} if family == "memmamba" else {"family": family}))


@pytest.fixture(scope="module", params=ALL_FAMILIES)
def any_family(request):
    return request.param


@pytest.fixture(scope="module")
def any_model(any_family):
    return tiny(any_family)


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

MEMMAMBA_CONFIGURATIONS = [
    *((dict([(name, 0)]), f"{name}.*at least 1, got 0") for name in ("note_size", "pool_size", "note_heads", "chunk_size")),
    *((dict([(name, 0)]), f"{name}.*at least 1, got 0") for name in ("cross_layer_group", "pooling_window", "write_span")),
    (dict(cross_layer_period=-1), "cross_layer_period.*at least 0, got -1"),
    (dict(pool_size=2.5), "pool_size.*integer.*2.5"),
    (dict(chunk_size=True), "chunk_size.*integer.*True"),
    (dict(note_size="64"), "note_size.*integer.*'64'"),
    (dict(note_size=10, note_heads=4), "note_size=10.*no multiple of note_heads=4"),
    (dict(write_period=10, write_span=20), "write_period.*at least 20, got 10"),
    (dict(write_rule="best"), "write_rule.*'priority', 'fifo', 'periodic'.*'best'"),
    (dict(write_rule=None), "write_rule.*'priority', 'fifo', 'periodic'.*None"),
    (dict(fusion="sum"), "fusion.*gated.*residual.*elementwise.*conv1d.*weighted.*'sum'"),
    (dict(fusion_position="middle"), "fusion_position.*'pre', 'post'.*'middle'"),
    (dict(pooling="median"), "pooling.*'none', 'max', 'mean'.*'median'"),
    *((dict([(name, 1.0)]), f"{name}.*[0, 1), got 1.0") for name in ("write_threshold", "read_threshold")),
    *((dict([(name, -0.1)]), f"{name}.*[0, 1), got -0.1") for name in ("write_threshold", "read_threshold")),
    *((dict([(name, math.nan)]), f"{name}.*[0, 1), got nan") for name in ("write_threshold", "read_threshold")),
    *((dict([(name, "0.5")]), f"{name}.*number.*'0.5'") for name in ("write_threshold", "read_threshold")),
    (dict(recency_weight=-1.0), "recency_weight.*at least 0, got -1"),
    (dict(recency_weight=math.inf), "recency_weight.*finite.*inf"),
    (dict(recency_weight=math.nan), "recency_weight.*finite.*nan"),
    (dict(recency_weight=None), "recency_weight.*number.*None"),
    (dict(hidden_act="gelu"), "hidden_act.*silu"),
]

COMPRESSED_CALLS = [
    *SETTINGS,
    (dict(compression_span=[0.1, 0.2, 0.3]), "compression_span has 3 values for 2 rows"),
    (dict(compression_span=[0.1, 2.0]), "compression_span.*(0, 1].*2.0"),
    (dict(compression_ratio=torch.tensor([0.1])), "compression_ratio has 1 values for 2 rows"),
    (dict(attention_mask=NO_SECOND_ROW, compress_prompt=True), "rows [1].*all zeros.*Drop"),
]

CALLS = [
    (dict(input_ids=IDS + 40), "input_ids range.*vocabulary has ids 0 to 49.*tokenizer"),
    (dict(input_ids=IDS - 10), "input_ids range.*vocabulary has ids 0 to 49.*tokenizer"),
    (dict(input_ids=IDS[:, :0]), "at least one token"),
    (dict(prefill_chunk_length=0), "prefill_chunk_length.*at least 1"),
    (dict(prefill_chunk_length=2.5), "prefill_chunk_length.*integer"),
]

FORWARDS = [
    *CALLS,
    (dict(input_ids=None), "either input_ids or inputs_embeds"),
    (dict(inputs_embeds=torch.zeros(2, 20, 16)), "either input_ids or inputs_embeds"),
    (dict(input_ids=IDS[0]), "[batch, length]"),
    (dict(attention_mask=MASK[:, :19]), "attention_mask has the shape.*expected (2, 20)"),
    (dict(attention_mask=MASK[:1]), "attention_mask has the shape.*expected (2, 20)"),
    (dict(attention_mask=MASK[:, None, None]), "attention_mask has the shape.*1 at tokens"),
    (dict(labels=LABELS[:, :10]), "labels.*(2, 20)"),
    (dict(labels=LABELS[0]), "labels.*(2, 20)"),
    (dict(prefill_chunk_length=5), "prefill_chunk_length is for inference.*no_grad"),
    (dict(seq_idx=torch.zeros(2, 20, dtype=torch.int32)), "Packed rows.*Pad the examples"),
    (dict(cu_seq_lens_q=torch.tensor([0, 20, 40])), "Packed rows.*Pad the examples"),
    (dict(cu_seqlens=torch.tensor([0, 20, 40])), "Packed rows.*Pad the examples"),
    (dict(position_ids=torch.arange(20).remainder(10).expand(2, -1)), "position_ids restart.*pad the examples"),
    (dict(position_ids=torch.arange(20)[None].sub(1).clamp(min=0)), "position_ids restart.*pad the examples"),
    (dict(attention_mask=MASK, position_ids=torch.zeros(2, 20, dtype=torch.long)), "position_ids restart.*pad the examples"),
    (dict(output_attentions=True), "no attention maps.*Leave it out"),
]

COMPRESSED_FORWARDS = [
    *COMPRESSED_CALLS,
    (dict(attention_mask=NO_SECOND_ROW, prompt_lengths=[5, 5]), "prompt_lengths[1].*0 tokens"),
    (dict(prompt_lengths=[5, 21]), "prompt_lengths[1] is 21.*20 tokens"),
    (dict(prompt_lengths=[0, 5]), "prompt_lengths[0] is 0.*plain pass"),
    (dict(prompt_lengths=[5]), "prompt_lengths.*2 rows.*a row"),
    (dict(prompt_lengths=5), "prompt_lengths.*2 rows.*a row"),
    (dict(prompt_lengths=torch.tensor(5)), "prompt_lengths.*2 rows.*a row"),
    (dict(prompt_lengths=[5.0, 5.0]), "prompt_lengths[0] is 5.0.*whole number"),
    (dict(prompt_lengths=[5, 16], attention_mask=torch.where(torch.arange(20) < 15, MASK, 0)), "[1] is 16.*15 tokens"),
    (dict(prompt_lengths=[15, 16], labels=LABELS), "prompt_lengths[1] is 16, but labels begin after 15.*-100"),
]

# Given to a model that compresses nothing.
OF_COMPRESSION = [
    (dict([(name, value)]), f"no arguments.*{name}.*ReMamba")
    for name, value in (
        ("compress_prompt", True),
        ("compress_prompt", False),
        ("compression_span", 0.3),
        ("prompt_lengths", [5, 5]),
    )
]

GENERATIONS = [
    *CALLS,
    (dict(input_ids=IDS[0]), "[batch, length]"),
    (dict(input_ids=IDS[:0]), "The prompt is empty.*at least one token"),
    (dict(attention_mask=NO_SECOND_ROW), "rows [1].*all zeros.*Drop"),
    (dict(prompt_lengths=[5, 5]), "prompt_lengths"),
    (dict(compression_spam=0.2), "compression_spam"),
    (dict(output_noets=True), "output_noets"),
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


@pytest.mark.parametrize(("given", "words"), MEMMAMBA_CONFIGURATIONS, ids=names(MEMMAMBA_CONFIGURATIONS))
def test_configurations_of_the_memory(given, words):
    with pytest.raises(ValueError, match=matching(words)):
        MemMambaConfig(**{**dict(hidden_size=16, state_size=4), **given})


def test_configurations_of_the_memory_are_checked_at_load(tmp_path):
    model = tiny_memmamba(torch.float32)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=matching("pool_size.*at least 1")):
        type(model).from_pretrained(tmp_path, pool_size=0)
    config = json.loads((tmp_path / "config.json").read_text()) | {"write_rule": "best"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=matching("write_rule.*'best'")):
        type(model).from_pretrained(tmp_path)


@pytest.mark.smoke
@pytest.mark.parametrize(("given", "words"), FORWARDS, ids=names(FORWARDS))
def test_forwards(any_model, given, words):
    with pytest.raises(ValueError, match=matching(words)):
        any_model(**{**dict(input_ids=IDS), **given})


@pytest.mark.parametrize("of_pads", [0, 1, -1, 7])
def test_pads_may_have_any_position(any_model, of_pads):
    """Left of a row, inside it and behind it."""
    mask = MASK.clone()
    mask[0, :6] = mask[0, 9:11] = mask[1, 15:] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, of_pads)
    with torch.no_grad():
        given = any_model(IDS, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(given, any_model(IDS, attention_mask=mask).logits, rtol=0, atol=0)


@pytest.mark.smoke
@pytest.mark.parametrize(("given", "words"), COMPRESSED_FORWARDS, ids=names(COMPRESSED_FORWARDS))
def test_forwards_of_compression(model, given, words):
    with pytest.raises(ValueError, match=matching(words)):
        model(**{**dict(input_ids=IDS), **given})


@pytest.mark.smoke
@pytest.mark.parametrize(("given", "words"), OF_COMPRESSION, ids=names(OF_COMPRESSION))
def test_what_compresses_nothing(given, words):
    model = tiny_memmamba(torch.float32)
    with pytest.raises(ValueError, match=matching(words)):
        model(IDS, **given)
    with pytest.raises(ValueError, match=next(iter(given))):
        model.generate(IDS, max_new_tokens=2, **given)


@pytest.mark.smoke
@pytest.mark.parametrize(("given", "words"), COMPRESSED_CALLS, ids=names(COMPRESSED_CALLS))
def test_generations_of_compression(model, given, words):
    refuses_before_a_pass(model, given, words)


@pytest.mark.smoke
@pytest.mark.parametrize(("given", "words"), GENERATIONS, ids=names(GENERATIONS))
def test_generations(any_model, given, words):
    refuses_before_a_pass(any_model, given, words)


def refuses_before_a_pass(model, given, words):
    passes = []
    handle = model.backbone.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        with pytest.raises(ValueError, match=matching(words)):
            model.generate(**{**dict(input_ids=IDS, max_new_tokens=2), **given})
    finally:
        handle.remove()
    assert not passes, "refused only after a pass over the prompt"


def test_assisted_decoding(any_model):
    with pytest.raises(ValueError, match=matching("assistant_model.*rolled back.*Leave")):
        any_model.generate(IDS, assistant_model=any_model, max_new_tokens=2)


def test_modes_of_the_models_own_configuration(any_family):
    """transformers' words, but no silence either."""
    model = tiny(any_family)
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


def test_a_cache_of_other_rows(any_model):
    cache = filled_cache(any_model)
    with pytest.raises(ValueError, match=matching("The cache holds 2 rows, the input 1.*reorder_cache")):
        any_model(IDS[:1], cache_params=cache)
    with pytest.raises(ValueError, match=matching("The cache holds 2 rows, the input 4.*reorder_cache")):
        any_model.generate(IDS, past_key_values=cache, num_beams=2, max_new_tokens=2)


def foreign_caches(family):
    """Filled by models of other kinds, of other sizes and with other memories; and empty ones of other layouts."""
    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=3, state_size=4)
    others = [tiny(other) for other in ALL_FAMILIES if other != family]
    if family == "memmamba":  # ReMamba's states are plain Mamba's
        others.append(MambaForCausalLM(MambaConfig(**sizes, bos_token_id=1, pad_token_id=0, eos_token_id=None)))
        others += [tiny(family, pool_size=4), tiny(family, note_size=4), tiny(family, chunk_size=8)]
    others += [tiny(family, num_hidden_layers=2), tiny(family, state_size=8)]
    for other in others:
        yield filled_cache(other)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0))
    yield gpt2(IDS, use_cache=True).past_key_values
    yield DynamicCache()
    yield DynamicCache(config=gpt2.config)
    yield DynamicCache(config=tiny("remamba2" if family == "memmamba" else "memmamba").config)


@torch.no_grad()
def test_a_cache_of_another_model(any_family, any_model):
    """Whatever its states are: never a wrong continuation, and never an error from inside a layer."""
    words = matching("cache.*another model.*DynamicCache(config=model.config)")
    for cache in foreign_caches(any_family):
        with pytest.raises(ValueError, match=words):
            any_model(IDS, cache_params=cache)
        with pytest.raises(ValueError, match=words):
            any_model.generate(IDS, past_key_values=cache, max_new_tokens=2)


def test_a_fresh_cache_is_filled(any_model):
    cache = DynamicCache(config=any_model.config)
    sequences = any_model.generate(IDS, past_key_values=cache, max_new_tokens=2)
    assert torch.equal(sequences, any_model.generate(IDS, max_new_tokens=2))
    assert cache.has_previous_state()


def test_an_empty_cache_may_be_compressed_into(model):
    cache = DynamicCache(config=model.config)
    assert model.generate(IDS, past_key_values=cache, compress_prompt=True, max_new_tokens=2).shape == (2, 22)


def test_initialize_compressor_of_another_width(family):
    with pytest.raises(ValueError, match=matching("expand=2.*expand=1")):
        tiny_model(family=family, expand=1).initialize_compressor()


def test_initialize_compressor_from_codes(family):
    model = tiny_model(family=family)
    projection = model.backbone.layers[0].mixer.out_proj
    projection.weight = type("Codes", (torch.nn.Parameter,), {})(projection.weight.detach())
    with pytest.raises(ValueError, match=matching("quantised.*Load the model without quantization_config")):
        model.initialize_compressor()


def other_kinds(family):
    """A model of another architecture, and the other families', plain where it is of another type, and their own."""
    yield GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0))
    plain_types = {ALL_FAMILIES[family].plain_type}
    for name, other in ALL_FAMILIES.items():
        if name == family:
            continue
        yield tiny(name)
        if other.plain_type not in plain_types:
            plain_types.add(other.plain_type)
            own = dict(num_heads=4, head_dim=8, n_groups=1) if name == "remamba2" else {}
            yield other.plain_model_class(
                other.plain_config_class(vocab_size=50, hidden_size=16, num_hidden_layers=1, **own)
            )


def test_a_checkpoint_of_another_kind(any_family, tmp_path):
    family, refused = any_family, []
    for other in other_kinds(family):
        kind = other.config.model_type
        other.save_pretrained(tmp_path / kind)
        with pytest.raises(ValueError, match=matching(f"'{kind}'.*AutoModelForCausalLM.*'{family}'")):
            ALL_FAMILIES[family].model_class.from_pretrained(tmp_path / kind)
        refused.append(kind)
    expected = {
        "remamba": ["gpt2", "remamba2", "mamba2", "memmamba"],
        "remamba2": ["gpt2", "remamba", "mamba", "memmamba"],
        "memmamba": ["gpt2", "remamba", "remamba2", "mamba2"],
    }
    assert refused == expected[family]


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_checkpoint(any_model, any_family, tmp_path, kept):
    any_model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(OSError, match=r"damaged or cut off.*Get the files again"):
        ALL_FAMILIES[any_family].model_class.from_pretrained(tmp_path)


def test_a_file_in_the_place_of_the_folder(any_model, tmp_path):
    (tmp_path / "taken").write_text("something else")
    with pytest.raises(FileExistsError, match="taken is a file"):
        any_model.save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "something else"


@pytest.mark.parametrize("mode", [{}, dict(do_sample=True), dict(num_beams=2)], ids=str)
def test_weights_that_are_not_finite(family, mode):
    model = tiny_model(torch.float32, family=family)
    with torch.no_grad():
        model.backbone.layers[0].mixer.in_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        model.generate(IDS, max_new_tokens=2, **mode)
