# SPDX-License-Identifier: Apache-2.0
"""Prompt lengths for trainers that keep the labels to themselves, TRL's SFTTrainer first of all."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_tests.modeling.tiny_models import assert_close, tiny_model
from remamba_hf.families import FAMILIES
from remamba_hf.training import PromptResponseCollator
from remamba_hf.training.book_tokens import train_book_tokenizer
from remamba_hf.training.prompt_lengths import WithPromptLengths
from remamba_hf.training.quantised import quantization_config

SAMPLES = [
    {"prompt_ids": [5, 6, 7], "response_ids": [8, 9]},
    {"prompt_ids": list(range(10, 18)), "response_ids": [2]},
]


def without_lengths(samples):
    return {name: value for name, value in PromptResponseCollator(1)(samples).items() if name != "prompt_lengths"}


def test_lengths_are_the_tokens_before_the_labels():
    assert WithPromptLengths(without_lengths)(SAMPLES)["prompt_lengths"].tolist() == [3, 8]
    left = dict(
        attention_mask=torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]),
        labels=torch.tensor([[-100, -100, -100, 8, 9], [-100, -100, -100, -100, 2]]),
    )
    assert WithPromptLengths(lambda _: left)(SAMPLES)["prompt_lengths"].tolist() == [1, 3]
    several = dict(attention_mask=torch.ones(1, 6), labels=torch.tensor([[-100, -100, 3, -100, -100, 4]]))
    assert WithPromptLengths(lambda _: several)(SAMPLES)["prompt_lengths"].tolist() == [2], "up to the first answer"


def test_rows_without_prompt_or_response():
    for prompt, response, what in (([5], [], "response"), ([], [5], "prompt")):
        ids = torch.tensor([prompt + response])
        labels = torch.tensor([[-100] * len(prompt) + response])
        batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
        with pytest.raises(ValueError, match=f"Row 0 of the batch has no {what}"):
            WithPromptLengths(lambda _, batch=batch: batch)([])


@pytest.fixture
def sft(tmp_path):
    """Makes TRL's trainer for a model, on pairs of TRL's own format, a text or messages each."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    tokenizer = train_book_tokenizer(["hello world"], 300)
    tokenizer.chat_template = "{% for message in messages %}<{{ message.role[0] }}>{{ message.content }}{% endfor %}"

    def make(model, messages=False, own_collator=True, **settings):
        prompts = ["hello world " * (3 + row % 4) + str(row) for row in range(8)]
        pairs = [{"prompt": prompt, "completion": " bye"} for prompt in prompts]
        if messages:
            roles = {"prompt": "user", "completion": "assistant"}
            pairs = [{part: [dict(role=roles[part], content=text)] for part, text in pair.items()} for pair in pairs]
        arguments = dict(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=8,
            learning_rate=1e-2,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        collator = WithPromptLengths(DataCollatorForLanguageModeling(tokenizer.pad_token_id)) if own_collator else None
        return trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(**{**arguments, **settings}),
            train_dataset=datasets.Dataset.from_list(pairs),
            eval_dataset=datasets.Dataset.from_list(pairs),
            processing_class=tokenizer,
            data_collator=collator,
        )

    return make


def with_lora(base):
    """The recipe without the head, on which TRL trains no adapter."""
    lora = pytest.importorskip("remamba_hf.training.lora")
    recipe = lora.remamba_lora_config(base, r=2, target_modules=["embeddings", "in_proj", "out_proj"])
    return lora.add_lora(base, recipe)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("messages", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_sft_trainer_trains_the_compressor(family, messages, sft):
    """With TRL's own data format and tokenization; its losses are the model's, and what the recipe trains moves."""
    model = with_lora(tiny_model(torch.float32, family=family, vocab_size=300))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = sft(model, messages)
    trainer.train()
    unmoved = [name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])]
    assert not unmoved
    batch = next(iter(trainer.get_train_dataloader()))
    whole = next(iter(trainer.get_eval_dataloader()))
    model.eval()
    with torch.no_grad():
        assert_close(trainer.compute_loss(model, dict(batch)), model(**batch).loss, 1e-5, "TRL's loss and the model's")
        expected = model(**whole).loss.item()
        assert abs(expected - model(**whole, compress_prompt=False).loss.item()) > 1e-3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [dict(packing=True, max_length=64), dict(padding_free=True, max_length=None)], ids=str)
def test_sft_trainer_cannot_pack(settings, sft):
    """TRL refuses it together with a collator; without one the forward does."""
    model = with_lora(tiny_model(torch.float32, vocab_size=300))
    with pytest.raises(ValueError, match="custom data collator is not supported"):
        sft(model, **settings)
    with pytest.raises(ValueError, match=r"Packed rows .* are not supported.*Pad the examples"):
        sft(model, own_collator=False, **settings).train()


@pytest.mark.filterwarnings("ignore")
def test_sft_trainer_on_a_quantised_base(sft, tmp_path):
    """TRL makes what is trained bfloat16 there; `train_in_float32` takes it back."""
    pytest.importorskip("bitsandbytes")
    lora = pytest.importorskip("remamba_hf.training.lora")
    tiny_model(torch.float32, vocab_size=300, hidden_size=64).save_pretrained(tmp_path / "base")
    settings = dict(quantization_config=quantization_config(4, dtype=torch.float32))
    model = with_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base", **settings))
    trainer = sft(model, learning_rate=2e-5)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.bfloat16}
    lora.train_in_float32(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    unmoved = [name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])]
    assert not unmoved
