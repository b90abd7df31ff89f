# SPDX-License-Identifier: Apache-2.0
"""The paper's recipe: every adapter learns, saves, loads and merges to what was trained."""

import copy
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig, TrainingArguments

from modeling_tests.modeling.tiny_models import assert_close, random_rows, tiny_memmamba, tiny_model
from remamba_hf.conversion import convert_checkpoint
from remamba_hf.families import ALL_FAMILIES, FAMILIES

peft = pytest.importorskip("peft")

from remamba_hf.training import PromptResponseCollator, TwoStageTrainer  # noqa: E402
from remamba_hf.training.lora import (  # noqa: E402
    FULLY_TRAINED,
    LORA_TARGETS,
    add_lora,
    merge_lora,
    remamba_lora_config,
    save_adapter,
    untie_embeddings,
)

IDS = torch.stack(random_rows([40, 40]))
BATCH = dict(input_ids=IDS, labels=torch.where(torch.arange(40) < 32, -100, IDS))


def tiny(family, dtype=torch.float64, **settings):
    if family == "memmamba":
        return tiny_memmamba(dtype, **settings)
    return tiny_model(dtype, family=family, **settings)


@pytest.fixture(params=ALL_FAMILIES)
def family(request):
    return request.param


def with_recipe(base, **changes):
    """The recipe on a copy, its LoRA away from its start, where it does nothing."""
    model = add_lora(copy.deepcopy(base), remamba_lora_config(base, **{"r": 2, "lora_alpha": 4, **changes})).to(base.dtype)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_the_recipe_is_the_papers(family):
    base = tiny(family)
    for source in (base, base.config):
        config = remamba_lora_config(source)
        assert (config.r, config.lora_alpha, config.lora_dropout, config.task_type) == (32, 8, 0.0, "CAUSAL_LM")
        assert set(config.target_modules) == set(LORA_TARGETS)
        assert set(config.modules_to_save) == set(FULLY_TRAINED[family])
    changed = remamba_lora_config(base, r=4, target_modules=["in_proj"], lora_dropout=0.1)
    assert (changed.r, set(changed.target_modules), changed.lora_dropout) == (4, {"in_proj"}, 0.1)


def test_only_what_the_recipe_names_is_trained(family):
    model = add_lora(tiny(family))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapters = {name for name in trained if "lora_" in name}
    layers = model.config.num_hidden_layers
    assert len(adapters) == 2 * (2 * layers + 2)
    assert all(any(f".{part}." in name for part in FULLY_TRAINED[family]) for name in trained - adapters)
    for part in FULLY_TRAINED[family]:
        whole = {name for name, _ in tiny(family).named_parameters() if f".{part}." in name}
        assert len([name for name in trained if f".{part}." in name]) == len(whole) > 0, part


@pytest.mark.parametrize("tied", [False, True])
def test_everything_trained_gets_gradients_and_merges(family, tied):
    """In float64, against the model of merged weights: the same logits, and the same gradient of what is trained in full."""
    base = tiny(family, tie_word_embeddings=tied)
    model = with_recipe(base)
    output = model(**BATCH)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
    with torch.no_grad():
        assert (output.logits - base(**BATCH).logits).abs().max() > 1e-3
    merged = merge_lora(copy.deepcopy(model))
    assert type(merged) is type(base)
    assert not merged.config.tie_word_embeddings
    actual = merged.requires_grad_(True)(**BATCH)
    assert_close(actual.logits, output.logits, 1e-9, "merged logits")
    actual.loss.backward()
    gradients = {name: p.grad for name, p in merged.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            plain = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
            assert_close(parameter.grad, gradients[plain], 1e-8, name)
    weights = {name: p.detach() for name, p in merged.named_parameters()}
    # dL/dA and dL/dB of W + scale * B A, from the merged weight's own gradient.
    adapter = model.get_base_model().backbone.layers[0].mixer.in_proj
    whole = gradients["backbone.layers.0.mixer.in_proj.weight"]
    up, down = adapter.lora_B["default"].weight, adapter.lora_A["default"].weight
    assert_close(up.grad, 2 * whole @ down.T, 1e-8, "lora_B of in_proj")
    assert_close(down.grad, 2 * up.T @ whole, 1e-8, "lora_A of in_proj")
    table, head = weights["backbone.embeddings.weight"], weights["lm_head.weight"]
    assert (table - head).abs().max() > 0.1


def test_a_tied_merge_would_be_another_model(family):
    model = with_recipe(tiny(family, tie_word_embeddings=True))
    with torch.no_grad():
        expected = model(**BATCH).logits
        with pytest.warns(UserWarning, match="tie_word_embeddings"):
            tied = copy.deepcopy(model).merge_and_unload()
        assert (tied(**BATCH).logits - expected).abs().max() > 1e-2
        assert untie_embeddings(model)
        assert_close(model(**BATCH).logits, expected, 0.0, "untied")
    assert not untie_embeddings(model)


def test_a_merge_without_adapters_on_either_end_stays_tied():
    model = with_recipe(tiny("remamba", tie_word_embeddings=True), target_modules=["in_proj"])
    merged = merge_lora(model)
    assert merged.lm_head.weight is merged.backbone.embeddings.weight
    assert merged.config.tie_word_embeddings


@pytest.mark.parametrize("tied", [False, True])
def test_saved_adapters_load_by_themselves(family, tied, tmp_path):
    """Through AutoPeftModelForCausalLM, and onto the code that travels with the base."""
    tiny(family, torch.float32, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = with_recipe(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.01)
        expected = model(**BATCH).logits
    save_adapter(model, tmp_path / "adapter")
    save_adapter(model, tmp_path / "adapter")  # again, in its place
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}
    saved = sum(p.numel() for p in model.parameters() if p.requires_grad) * 4
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < saved + 40_000, "no frozen weights"
    for settings in ({}, {"trust_remote_code": True}):
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", **settings).eval()
        with torch.no_grad():
            assert_close(loaded(**BATCH).logits, expected, 1e-6, "loaded")
    travelling = _travelling_class(tmp_path / "base").from_pretrained(tmp_path / "base")
    assert type(travelling).__module__.startswith("transformers_modules")
    with torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(travelling, tmp_path / "adapter").eval()
        assert_close(loaded(**BATCH).logits, expected, 1e-6, "on travelling code")
        assert_close(merge_lora(loaded)(**BATCH).logits, expected, 1e-5, "merged")


def _travelling_class(folder):
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    reference = json.loads((folder / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]
    return get_class_from_dynamic_module(reference, folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_converts_with_its_plain_base(family, tmp_path):
    """What is trained on a plain model's ReMamba is whole: the plain model and the adapter make it again."""
    plain_class = FAMILIES[family].plain_model_class
    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, tie_word_embeddings=True)
    heads = dict(num_heads=4, head_dim=8, n_groups=1, state_size=8) if family == "remamba2" else dict(state_size=4)
    torch.manual_seed(0)
    plain_class(FAMILIES[family].plain_config_class(**sizes, **heads, eos_token_id=0, pad_token_id=0)).save_pretrained(
        tmp_path / "plain"
    )
    base = FAMILIES[family].model_class.from_pretrained(tmp_path / "plain").eval()
    base.initialize_compressor()
    model = with_recipe(base)
    save_adapter(model, tmp_path / "adapter")
    convert_checkpoint(str(tmp_path / "plain"), tmp_path / "out", adapter=str(tmp_path / "adapter"))
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        # Random weights score all positions alike: which are kept is rounding's choice, so these passes do not compress.
        settings = dict(input_ids=IDS, compress_prompt=False)
        assert_close(converted(**settings).logits, model(**settings).logits, 1e-5, "converted")
    for name, parameter in converted.named_parameters():
        if "compressor" in name:
            trained = model.get_parameter(
                f"base_model.model.{name}".replace("compressor.", "compressor.modules_to_save.default.")
            )
            assert torch.equal(parameter, trained), name


def test_what_is_trained_is_float32_on_a_bfloat16_base(family, tmp_path):
    base = tiny(family, torch.float32).to(torch.bfloat16)
    model = add_lora(base)
    trained = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    frozen = {name: parameter.dtype for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert trained == {torch.float32}
    assert frozen["base_model.model.backbone.embeddings.base_layer.weight"] == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**BATCH).loss
        loss.backward()
        assert model.generate(input_ids=IDS[:, :20], max_new_tokens=2, do_sample=False).shape == (2, 22)
    assert loss.isfinite()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad and p.grad.abs().max() > 0}
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5).step()
    moved = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert moved == set(before), "a step of the paper's size moves all"
    save_adapter(model, tmp_path / "adapter")
    model.load_adapter(tmp_path / "adapter", "default", is_trainable=True)  # as Trainer does to resume
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}


def test_clear_errors(tmp_path):
    base = tiny("remamba", torch.float32)
    with pytest.raises(ValueError, match=r"memmamba, remamba, remamba2, got a mamba.*ReMambaForCausalLM"):
        remamba_lora_config(MambaConfig(num_hidden_layers=1))
    with pytest.raises(ValueError, match="got a Linear"):
        remamba_lora_config(torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"no fields \['rank'\]"):
        remamba_lora_config(base, rank=4)
    with pytest.raises(ValueError, match="target_modules names 'q_proj'"):
        remamba_lora_config(base, target_modules=["in_proj", "q_proj"])
    with pytest.raises(ValueError, match="modules_to_save names 'memory'"):
        remamba_lora_config(base, modules_to_save=["memory"])
    with pytest.warns(UserWarning, match="Merging is not supported"):
        convolved = add_lora(base, remamba_lora_config(base, r=32, target_modules=["conv1d"]))
    with pytest.raises(ValueError, match="conv1d cannot be merged"):
        merge_lora(convolved)
    (tmp_path / "papers").mkdir()
    with pytest.raises(FileExistsError, match="no adapter"):
        save_adapter(convolved, tmp_path / "papers")


def pairs(count=8):
    generator = np.random.default_rng(0)
    sizes = zip(generator.integers(12, 40, size=count), generator.integers(1, 9, size=count), strict=True)
    return [
        dict(prompt_ids=generator.integers(2, 50, size=p), response_ids=generator.integers(2, 50, size=r)) for p, r in sizes
    ]


def steps_taken(base, folder, rows, accumulation, trainer_class=TwoStageTrainer):
    """What two steps of SGD with the recipe add to what is trained."""
    model = with_recipe(base)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters() if p.requires_grad])
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        optim="sgd",
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
    )
    trainer_class(model=model, args=arguments, train_dataset=pairs(), data_collator=PromptResponseCollator(0)).train()
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]) - before


@pytest.mark.parametrize("family", FAMILIES)  # MemMamba takes no prompt_lengths
def test_accumulated_ragged_rows_are_one_large_batch(family, tmp_path):
    """Rows of 1 to 8 response tokens: a token counts the same in whichever piece of the batch it stands."""
    base = tiny(family)
    whole = steps_taken(base, tmp_path, 4, 1)
    assert whole.abs().max() > 1e-4
    for rows, accumulation in ((1, 4), (2, 2)):
        assert_close(steps_taken(base, tmp_path, rows, accumulation), whole, 1e-7, f"{accumulation} pieces")
