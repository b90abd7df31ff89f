# SPDX-License-Identifier: Apache-2.0
"""The paper's recipe: every adapter learns, saves, loads and merges to what was trained."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MambaConfig, Trainer, TrainingArguments

from modeling_tests.modeling import reference_memmamba, reference_two_stages
from modeling_tests.modeling.tiny_models import RATIO, SPAN, START, assert_close, random_rows, tiny_memmamba, tiny_model
from remamba_hf.conversion import convert_checkpoint
from remamba_hf.families import ALL_FAMILIES, FAMILIES

peft = pytest.importorskip("peft")

from remamba_hf.training import PromptResponseCollator  # noqa: E402
from remamba_hf.training.lora import (  # noqa: E402
    FULLY_TRAINED,
    LORA_TARGETS,
    AdaptedModel,
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


# Everything that LoRA can act on, by family.
COMPRESSOR = [f"compressor.{part}.{layer}" for part in ("query", "key", "value") for layer in (0, 2)]
READERS = [f"{reader}.{part}" for reader in ("token_reader", "layer_reader") for part in ("query", "key", "value", "output")]
MAMBA = ["embeddings", "in_proj", "conv1d", "x_proj", "dt_proj", "out_proj", "lm_head"]
TARGETS = {
    "remamba": [*MAMBA, *COMPRESSOR],
    "remamba2": [*(name for name in MAMBA if name not in ("x_proj", "dt_proj")), *COMPRESSOR],
    "memmamba": [*MAMBA, "note", "write_score", "gate", *READERS],
}


# Rows of 40 and 31 tokens, of which the last eight are responses.
RAGGED, RAGGED_PROMPTS = random_rows([40, 31]), [32, 23]


class DenseKernel:
    """A convolution's weight [E, 1, W] with a low-rank update, which PEFT makes a sum over all channels, [E, E, W]; as the
    references use a weight: `(inputs * kernel[:, 0]).sum(-1)`."""

    def __init__(self, weight):
        self.weight = weight

    def __getitem__(self, index):
        assert index == (slice(None), 0)
        return self

    def __rmul__(self, inputs):
        return torch.einsum("eck,...ck->...e", self.weight, inputs)[..., None]


def with_updates(weights, halves, scale):
    """Weights W of a plain model with W + scale * B A in the place of those that have `halves` (A, B)."""
    updated = dict(weights)
    for name, (down, up) in halves.items():
        weight = weights[f"{name}.weight"]
        if name.endswith("conv1d"):
            diagonal = torch.eye(len(weight), dtype=weight.dtype)[..., None] * weight
            updated[f"{name}.weight"] = DenseKernel(diagonal + scale * up * down)
        else:
            update = scale * up @ down
            updated[f"{name}.weight"] = weight + (update.T if name.endswith("embeddings") else update)
    return updated


def reference_loss(family, weights, config):
    """Mean over the labels of both rows, which have as many."""
    losses = []
    for row, prompt in zip(RAGGED, RAGGED_PROMPTS, strict=True):
        labels = torch.where(torch.arange(len(row)) < prompt, -100, row)
        if family == "memmamba":
            losses.append(reference_memmamba.loss(weights, config, row, labels))
        else:
            settings = dict(scale_gradient=config.scale_score_gradient)
            logits, *_ = reference_two_stages.two_stages(weights, config, row, prompt, START, SPAN, RATIO, **settings)
            losses.append(F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100))
    return sum(losses) / len(losses)


def adapted_everywhere(base):
    """With LoRA, and nothing else, on all that it can act on."""
    channels = base.backbone.layers[0].mixer.conv1d.groups
    patterns = dict(rank_pattern={"conv1d": channels}, alpha_pattern={"conv1d": 2 * channels})
    with pytest.warns(UserWarning, match="Merging is not supported"):
        return with_recipe(base, target_modules=TARGETS[base.config.model_type], modules_to_save=None, **patterns)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_every_adapter_are_the_references(family, tied):
    """In float64, against a loop over tokens with plain matrices W + scale * B A, which knows neither PEFT nor this package:
    whatever LoRA can act on, all at once, beneath the compression; in training with fixed draws, on ragged rows."""
    base = tiny(family, tie_word_embeddings=tied)
    model = adapted_everywhere(base)
    samples = [dict(prompt_ids=r[:p], response_ids=r[p:]) for r, p in zip(RAGGED, RAGGED_PROMPTS, strict=True)]
    batch = PromptResponseCollator(padding=0)(samples)
    if family == "memmamba":
        del batch["prompt_lengths"]
    loss = model.train()(**batch).loss
    loss.backward()

    adapters = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            embedding = name.endswith("embeddings")
            pair = (module.lora_embedding_A, module.lora_embedding_B) if embedding else (module.lora_A, module.lora_B)
            adapters[name] = [half["default"] if embedding else half["default"].weight for half in pair]
            assert module.scaling["default"] == 2
    for target in TARGETS[family]:
        assert any(name == target or name.endswith(f".{target}") for name in adapters), target
    halves = {name: [half.detach().clone().requires_grad_() for half in pair] for name, pair in adapters.items()}
    weights = with_updates({"lm_head.weight": base.lm_head.weight, **base.state_dict()}, halves, 2)
    expected = reference_loss(family, weights, base.config)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    for name, pair in adapters.items():
        for side, actual, wanted in zip("AB", pair, halves[name], strict=True):
            assert wanted.grad.abs().max() > 0, (name, side)
            assert_close(actual.grad, wanted.grad, 1e-8, f"{name}, {side}")


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
        merge_lora(loaded).save_pretrained(tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert_close(merged(**BATCH).logits, expected, 1e-5, "merged, saved and loaded")


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


@pytest.mark.parametrize("family", FAMILIES)
def test_the_compressor_under_training_heeds_the_models_settings(family):
    """PEFT trains a copy of it."""
    model = with_recipe(tiny(family)).eval()
    kept = {}
    for selection in ("score", "stride", "random"):
        model.get_base_model().config.selection = selection
        with torch.no_grad():
            kept[selection] = model(IDS, compress_prompt=True).compressed_positions.tolist()
    assert len({str(positions) for positions in kept.values()}) == 3


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
    for adapted in (convolved, base):
        with pytest.raises(ValueError, match="has adapters already"):
            add_lora(adapted)
    (tmp_path / "papers").mkdir()
    with pytest.raises(FileExistsError, match="no adapter"):
        save_adapter(convolved, tmp_path / "papers")


def pairs(count=8):
    generator = np.random.default_rng(0)
    sizes = zip(generator.integers(12, 40, size=count), generator.integers(1, 9, size=count), strict=True)
    return [
        dict(prompt_ids=generator.integers(2, 50, size=p), response_ids=generator.integers(2, 50, size=r)) for p, r in sizes
    ]


def trained_values(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters() if p.requires_grad])


def train(model, folder, resume_from=None):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=pairs(), data_collator=PromptResponseCollator(0))
    trainer.train(resume_from_checkpoint=resume_from)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_trainers_checkpoints_hold_no_frozen_weights(family, tied, tmp_path):
    """With transformers' own Trainer; and a run resumed from one ends, to the bit, where the uninterrupted run does."""
    base = tiny(family, torch.float32, tie_word_embeddings=tied, train_compression_span=(0.2, 0.8))
    whole, resumed = with_recipe(base), with_recipe(base)
    train(whole, tmp_path)
    checkpoint = tmp_path / "checkpoint-2"
    saved = load_file(checkpoint / "adapter_model.safetensors")
    names = {name.replace(".modules_to_save.default", "").replace(".default", "") for name in trained_names(whole)}
    assert saved.keys() == names
    train(resumed, tmp_path, resume_from=str(checkpoint))
    assert torch.equal(trained_values(resumed), trained_values(whole))
    assert not torch.equal(trained_values(resumed), trained_values(with_recipe(base)))


def trained_names(model):
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_what_pefts_rule_saves_of_a_resized_model(tmp_path):
    """Where no adapter acts on embeddings or head, nothing but their rows would tell that ids were added."""
    tiny("remamba", torch.float32).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(53)
    model = add_lora(base, remamba_lora_config(base, r=2, target_modules=["in_proj"]))
    assert isinstance(model, AdaptedModel)
    with pytest.warns(UserWarning, match="has been resized"):
        save_adapter(model, tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {len(weight) for name, weight in saved.items() if "embeddings" in name or "lm_head" in name} == {53}
    everywhere = add_lora(model.unload(), remamba_lora_config(base, r=2))
    save_adapter(everywhere, tmp_path / "adapter")
    smaller = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(smaller, tmp_path / "adapter")
