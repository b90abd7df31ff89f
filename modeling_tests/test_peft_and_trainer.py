# SPDX-License-Identifier: Apache-2.0
"""PEFT acts on every projection, and transformers' Trainer trains, evaluates and predicts without special care."""

import copy

import pytest
import torch
from torch.utils.data import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, Trainer, TrainingArguments

from modeling_tests.modeling.tiny_models import assert_close, random_rows, tiny_memmamba, tiny_model
from remamba_hf.families import ALL_FAMILIES

peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

IDS = torch.stack(random_rows([40, 40]))
LABELS = torch.where(torch.arange(40) < 32, -100, IDS)
BATCH = dict(input_ids=IDS, labels=LABELS)
PROJECTIONS = {
    "remamba": ("in_proj", "x_proj", "dt_proj", "out_proj", "embeddings", "lm_head"),
    "remamba2": ("in_proj", "out_proj", "embeddings", "lm_head"),
    "memmamba": ("in_proj", "x_proj", "dt_proj", "out_proj", "embeddings", "lm_head"),
}
# What each family adds to the projections of a plain model.
COMPRESSOR = r".*compressor\.(query|key|value)\.(0|2)"
READERS = ("query", "key", "value", "output")
ADDED = {
    "remamba": (COMPRESSOR,),
    "remamba2": (COMPRESSOR,),
    "memmamba": (
        *(["memory.note"], ["write_score"], ["gate"]),
        *([f"token_reader.{name}"] for name in READERS),
        *([f"layer_reader.{name}"] for name in READERS),
    ),
}
# What a recipe trains in full: Theta; or Theta, the compressor and what else sets the step size or the scale; the memory.
FULLY_TRAINED = {
    "remamba": (["adaptation"], ["adaptation", "compressor", "dt_proj"]),
    "remamba2": (["adaptation"], ["adaptation", "compressor", "norm"]),
    "memmamba": (["memory"], ["token_reader", "write_score", "dt_proj"]),
}
# How a prompt of 40 tokens is read as `generate` reads it; and settings of training that draw.
PROMPT = {"remamba": dict(prompt_lengths=[40, 40]), "remamba2": dict(prompt_lengths=[40, 40]), "memmamba": {}}
WHOLE = {"remamba": dict(compress_prompt=True), "remamba2": dict(compress_prompt=True), "memmamba": {}}
DRAWN = dict(train_compression_span=(0.2, 0.6), train_compression_ratio=(0.1, 0.9))
DRAWS = {"remamba": DRAWN, "remamba2": DRAWN, "memmamba": {}}


def tiny(family, **settings):
    if family == "memmamba":
        return tiny_memmamba(torch.float32, **settings)
    return tiny_model(torch.float32, family=family, **settings)


def for_each(choices):
    """(family, choice) pairs, as the parameters `base` and another."""
    pairs = [(family, choice) for family, of_family in choices.items() for choice in of_family]
    return [pytest.param(family, choice, id=f"{family}-{choice}") for family, choice in pairs]


@pytest.fixture(scope="module", params=ALL_FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def base(family):
    return tiny(family)


def with_lora(base, target, rank=2):
    """LoRA on `target`, away from its start, where it is a no-op."""
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=target, task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def greedy_logits(model):
    output = model.generate(
        input_ids=IDS, do_sample=False, max_new_tokens=4, output_logits=True, return_dict_in_generate=True
    )
    return output.sequences, torch.stack(output.logits, dim=1)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("family", "target"),
    for_each({family: [*([name] for name in names), *ADDED[family], "all-linear"] for family, names in PROJECTIONS.items()}),
    indirect=["family"],
)
def test_lora_acts_and_merges(base, family, target):
    """Gradients on every adapter, a changed forward and a changed generation, and the same after merging."""
    model = with_lora(base, target)
    output = model(**BATCH)
    output.loss.backward()
    adapters = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert adapters
    for name, gradient in adapters.items():
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name
    assert (output.logits - base(**BATCH).logits).abs().max() > 1e-4
    with torch.no_grad():
        sequences, steps = greedy_logits(model)
        full = model(input_ids=sequences[:, :-1], **PROMPT[family]).logits[:, -4:]
        assert_close(steps, full, 1e-5, "decoding steps")
        merged = model.merge_and_unload()
        assert not [name for name, _ in merged.named_parameters() if "lora" in name]
        assert_close(merged(**BATCH).logits, output.logits, 1e-5, "merged logits")
        assert_close(greedy_logits(merged)[1], steps, 1e-5, "merged decoding steps")


def channels_of_the_convolution(model):
    return model.backbone.layers[0].mixer.conv1d.groups


def test_lora_on_the_convolution(base, family):
    """PEFT wants the rank to be a multiple of the groups, and cannot merge it; unmerged it must act everywhere."""
    with pytest.warns(UserWarning, match="Merging is not supported"):
        model = with_lora(base, ["conv1d"], rank=channels_of_the_convolution(base))
    output = model(**BATCH)
    output.loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    assert (output.logits - base(**BATCH).logits).abs().max() > 1e-4
    with torch.no_grad():
        sequences, steps = greedy_logits(model)
        full = model(input_ids=sequences[:, :-1], **PROMPT[family]).logits[:, -4:]
        assert_close(steps, full, 1e-5, "decoding steps")
        whole = model(input_ids=IDS, use_cache=True, **WHOLE[family])
        pieces = model(input_ids=IDS, use_cache=True, prefill_chunk_length=3, **WHOLE[family])
    assert_close(pieces.logits, whole.logits, 1e-5, "logits in chunks")


def test_lora_on_a_convolution_without_bias_states_and_pads(family):
    """The wrapped convolution beside the plain one, with its adapter at zero: the same, ragged rows included."""
    base = tiny(family, use_conv_bias=False)
    config = peft.LoraConfig(r=channels_of_the_convolution(base), target_modules=["conv1d"], task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match="Merging is not supported"):
        model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    mask = torch.ones_like(IDS)
    mask[0, :11] = 0
    with torch.no_grad():
        for settings in (WHOLE[family], {}):
            expected = base(IDS, attention_mask=mask, use_cache=True, **settings)
            actual = model(input_ids=IDS, attention_mask=mask, use_cache=True, **settings)
            assert_close(actual.logits[mask.bool()], expected.logits[mask.bool()], 1e-5, "logits")
            new = IDS[:, :3]
            after = model(input_ids=new, cache_params=actual.cache_params).logits
            assert_close(after, base(new, cache_params=expected.cache_params).logits, 1e-5, "logits after the cache")


@pytest.mark.parametrize(("family", "modules"), for_each(FULLY_TRAINED), indirect=["family"])
def test_modules_to_save(base, modules, tmp_path):
    """The paper's recipe: LoRA on the projections; what the family adds, and others, trained in full, saved and loaded."""
    config = peft.LoraConfig(r=2, target_modules=["in_proj"], modules_to_save=modules, task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(base), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**BATCH).loss.backward()
    whole = {name: p for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert {module for module in modules if any(f".{module}." in name for name in whole)} == set(modules)
    if modules == ["memory"]:
        own = {name for name, _ in base.named_parameters() if ".memory." in name}
        assert {name.removeprefix("base_model.model.").replace("modules_to_save.default.", "") for name in whole} == own
    for name, parameter in whole.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    optimizer.step()
    with torch.no_grad():
        expected = model.eval()(**BATCH).logits
        assert (expected - base(**BATCH).logits).abs().max() > 1e-5
        model.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        assert_close(loaded(**BATCH).logits, expected, 1e-6, "loaded")
        assert_close(loaded.merge_and_unload()(**BATCH).logits, expected, 1e-5, "merged")


def test_lora_under_gradient_checkpointing(base, family):
    memory = ["memory.note", *READERS] if family == "memmamba" else []
    model = with_lora(base, [*PROJECTIONS[family], *memory]).train()

    def gradients():
        model.zero_grad()
        model(**BATCH).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients()
    model.gradient_checkpointing_enable()
    for name, gradient in gradients().items():
        assert_close(gradient, expected[name], 1e-5, name)


# Trainer


class Questions(Dataset):
    """Rows of different lengths whose last tokens are the response; K differs from row to row."""

    def __init__(self, count=8):
        self.rows = random_rows([12 + 5 * (row % 4) for row in range(count)], seed=3)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index].tolist()
        return dict(input_ids=row, attention_mask=[1] * len(row), labels=[-100] * (len(row) - 4) + row[-4:])


@pytest.fixture(scope="module")
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[PAD]": 0, "[BOS]": 1, **{f"w{index}": index for index in range(2, 50)}}
    model = tokenizers.models.WordLevel(words, unk_token="w2")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), pad_token="[PAD]", bos_token="[BOS]")
    wrapped.padding_side = "left"
    return wrapped


def trainer(model, tokenizer, folder, **settings):
    arguments = TrainingArguments(
        output_dir=str(folder),
        **{
            **dict(
                per_device_train_batch_size=2,
                per_device_eval_batch_size=3,
                max_steps=4,
                learning_rate=1e-2,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                lr_scheduler_type="constant",
                logging_steps=1,
                seed=5,
            ),
            **settings,
        },
    )
    return Trainer(
        model,
        arguments,
        train_dataset=Questions(),
        eval_dataset=Questions(7),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    )


@pytest.mark.smoke
def test_trainer_trains_evaluates_and_predicts(family, tokenizer, tmp_path):
    model = tiny(family, **DRAWS[family])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = trainer(model, tokenizer, tmp_path, gradient_accumulation_steps=2, max_steps=12)
    start = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < start
    unmoved = [name for name, p in model.named_parameters() if torch.equal(p.detach(), before[name])]
    assert not unmoved
    predictions = run.predict(Questions(7))
    assert predictions.predictions.shape == (7, 27, 50), "logits alone: positions and scores have other lengths a batch"
    assert predictions.metrics["test_loss"] == pytest.approx(run.evaluate()["eval_loss"], rel=1e-4)


def test_trainer_with_accumulation_is_trainer_with_large_batches(base, tokenizer, tmp_path):
    weights = []
    for size, steps in ((4, 1), (1, 4), (2, 2)):
        model = copy.deepcopy(base)
        settings = dict(per_device_train_batch_size=size, gradient_accumulation_steps=steps, optim="sgd", max_grad_norm=0)
        run = trainer(model, tokenizer, tmp_path, max_steps=2, **settings)
        run.train()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in base.parameters()])
    for other in weights[1:]:
        assert_close(other - start, weights[0] - start, 1e-3, "the step taken")


def test_trainer_follows_its_seed(family, tokenizer, tmp_path):
    """The draws of the compression come from torch's generator, which Trainer seeds."""
    losses = []
    for _ in range(2):
        model = tiny(family, **DRAWS[family])
        run = trainer(model, tokenizer, tmp_path)
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]
    assert len(set(losses[0])) > 1


def test_trainer_with_checkpointing_and_bfloat16(base, tokenizer, tmp_path):
    """Autocast leaves the first loss what it is in float32, but for bfloat16's rounding."""
    first_losses = []
    for settings in (dict(bf16=True, gradient_checkpointing=True), {}):
        model = copy.deepcopy(base)
        run = trainer(model, tokenizer, tmp_path, **settings)
        run.train()
        assert all(p.isfinite().all() for p in model.parameters())
        first_losses.append(next(entry["loss"] for entry in run.state.log_history if "loss" in entry))
    assert first_losses[0] == pytest.approx(first_losses[1], rel=0.03)


def test_trainer_saves_and_resumes(family, tokenizer, tmp_path):
    """A resumed run draws what the uninterrupted one would have drawn."""
    arguments = dict(save_strategy="steps", save_steps=2, max_steps=4)
    whole = tiny(family, **DRAWS[family])
    trainer(whole, tokenizer, tmp_path, **arguments).train()
    resumed = tiny(family, **DRAWS[family])
    trainer(resumed, tokenizer, tmp_path, **arguments).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert_close(other, one, 1e-6, name)


def test_trainer_with_a_peft_model(base, family, tokenizer, tmp_path):
    added = "memory" if family == "memmamba" else "compressor"
    config = peft.LoraConfig(r=2, target_modules=["in_proj", "out_proj"], modules_to_save=[added], task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(base), config)
    run = trainer(model, tokenizer, tmp_path, max_steps=8)
    start = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < start
    assert run.predict(Questions(7)).predictions.shape == (7, 27, 50)


@pytest.mark.filterwarnings("ignore")
def test_quantised_projections_act(base, family):
    """Linear layers replaced by quantised ones are called in every pass and in a decoding step."""
    model = copy.deepcopy(base)
    ids = torch.randint(1, 50, (1, 24))
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    called = []
    for name, module in quantised.named_modules():
        if type(module) is torch.ao.nn.quantized.dynamic.Linear and name.startswith("backbone.layers.0"):
            module.register_forward_hook(lambda *_, name=name: called.append(name.split(".")[-1]))
    assert quantised.generate(ids, max_new_tokens=2, pad_token_id=0, eos_token_id=None).shape == (1, 26)
    # Mamba-1's dt_proj is of a class of its own, which this way of quantising leaves alone.
    linear = [name for name in PROJECTIONS[family] if name in ("in_proj", "x_proj", "out_proj")]
    if family == "memmamba":
        assert sorted(called) == sorted([*linear, "note", *READERS[:3], "gate"] * 2), "one pass and one step"
    else:
        assert sorted(called) == sorted(linear * 3), "two passes and one step"
    with torch.no_grad():
        exact, rounded = (m(ids).logits for m in (model, quantised))
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).square().mean().sqrt() < 0.5 * exact.square().mean().sqrt()


@pytest.mark.parametrize("make", [tiny_model, tiny_memmamba], ids=["remamba", "memmamba"])
def test_prompt_tuning_trains_and_says_how_to_generate(make):
    base = make(torch.float32)
    shape = dict(num_virtual_tokens=4, num_attention_heads=1, num_layers=3, token_dim=16)
    model = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", **shape)).eval()
    ids = torch.randint(1, 50, (2, 12))
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    assert model.prompt_encoder["default"].embedding.weight.grad.abs().max() > 0
    with pytest.raises(ValueError, match="inputs_embeds to the base model's generate"):
        model.generate(input_ids=ids, max_new_tokens=3)
    embeds = torch.cat([model.get_prompt(2), base.get_input_embeddings()(ids)], dim=1)
    assert base.generate(inputs_embeds=embeds, max_new_tokens=3, do_sample=False).shape == (2, 3)
