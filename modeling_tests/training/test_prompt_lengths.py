# SPDX-License-Identifier: Apache-2.0
"""Prompt lengths for trainers that keep the labels to themselves, TRL's SFTTrainer first of all."""

import pytest
import torch

from modeling_tests.modeling.tiny_models import assert_close, tiny_model
from remamba_hf.families import FAMILIES
from remamba_hf.training import PromptResponseCollator
from remamba_hf.training.book_tokens import train_book_tokenizer
from remamba_hf.training.prompt_lengths import WithPromptLengths

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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_sft_trainer_trains_the_compressor(family, tmp_path):
    """With TRL's own data format and tokenization; its loss is the model's, and what the recipe trains moves."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    from remamba_hf.training.lora import add_lora, remamba_lora_config

    tokenizer = train_book_tokenizer(["hello world"], 300)
    base = tiny_model(torch.float32, family=family, vocab_size=300)
    model = add_lora(base, remamba_lora_config(base, r=2, target_modules=["embeddings", "in_proj", "out_proj"]))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    settings = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    pairs = [{"prompt": "hello world " * (3 + row % 4) + str(row), "completion": " bye"} for row in range(8)]
    trainer = trl.SFTTrainer(
        model=model,
        args=settings,
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tokenizer,
        data_collator=WithPromptLengths(DataCollatorForLanguageModeling(tokenizer.pad_token_id)),
    )
    trainer.train()
    unmoved = [name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])]
    assert not unmoved
    batch = next(iter(trainer.get_train_dataloader()))
    model.eval()
    with torch.no_grad():
        assert_close(trainer.compute_loss(model, dict(batch)), model(**batch).loss, 1e-5, "TRL's loss and the model's")
