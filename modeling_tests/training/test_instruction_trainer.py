# SPDX-License-Identifier: Apache-2.0
"""`InstructionTrainer` in one process; test_finetune_example.py trains with it, test_finetune_parallel.py with several."""

import json

import pytest
import torch
from transformers import TrainingArguments

from modeling_tests.modeling.tiny_models import tiny_model
from remamba_hf.training import PromptResponseCollator
from remamba_hf.training.book_tokens import train_book_tokenizer
from remamba_hf.training.instruction_trainer import InstructionTrainer

datasets = pytest.importorskip("datasets")
LENGTHS = [40, 9, 33, 21, 14, 28, 38, 11]


@pytest.fixture
def new_trainer(tmp_path):
    tokenizer = train_book_tokenizer(["one two three"], vocab_size=300)
    tokenizer.pad_token = tokenizer.eos_token
    prompts = [torch.randint(5, 200, (length,)).tolist() for length in LENGTHS]
    rows = datasets.Dataset.from_dict({"prompt_ids": prompts, "response_ids": [prompt[:3] for prompt in prompts]})

    def new(**options):
        model = tiny_model(torch.float32, vocab_size=300, eos_token_id=None, pad_token_id=1)
        model.config.use_cache = False  # as gradient checkpointing does
        settings = dict(per_device_train_batch_size=2, per_device_eval_batch_size=2, remove_unused_columns=False)
        arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)
        return InstructionTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=PromptResponseCollator(1, seed=0),
            processing_class=tokenizer,
            answers=tmp_path / "answers.jsonl",
            **options,
        )

    return new


def test_evaluation_answers(new_trainer):
    trainer = new_trainer(eval_rows=3, max_new_tokens=4)
    metrics = trainer.evaluate()
    said = [json.loads(line) for line in trainer.answers.read_text().splitlines()]
    assert len(said) == 3
    assert metrics["eval_exact"] == sum(text["exact"] for text in said) / 3
    assert [entry for entry in trainer.state.log_history if "eval_exact" in entry]
    # An answer is what the model says to the prompt alone.
    rows = trainer.eval_dataset
    for row, text in zip(rows, said, strict=False):
        prompt = torch.tensor([row["prompt_ids"]])
        output = trainer.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False)
        decode = trainer.processing_class.decode
        assert text["said"] == decode(output[0, len(row["prompt_ids"]) :], skip_special_tokens=True)
        assert text["right"] == decode(row["response_ids"], skip_special_tokens=True)


def test_an_evaluation_may_leave_out_answers(new_trainer):
    trainer = new_trainer(eval_rows=0)
    assert "eval_exact" not in trainer.evaluate()
    assert not trainer.answers.exists()


def test_rows_of_like_length_are_read_together(new_trainer):
    for grouped in (True, False):
        batches = [batch["prompt_lengths"].tolist() for batch in new_trainer(group_by_length=grouped).get_train_dataloader()]
        assert sorted(length for batch in batches for length in batch) == sorted(LENGTHS)
        neighbours = [[9, 11], [14, 21], [28, 33], [38, 40]]
        assert (sorted(sorted(batch) for batch in batches) == neighbours) == grouped


def test_what_would_wait_for_ever_is_refused(new_trainer):
    trainer = new_trainer()
    trainer.model.config.compression_min_prompt = 20
    batch = trainer.data_collator([trainer.train_dataset[row] for row in (1, 4)])
    trainer.model.train()
    trainer.compute_loss(trainer.model, dict(batch))
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match=r"No prompt of a batch has 20 tokens.*launch with DDP"):
        trainer.compute_loss(trainer.model, dict(batch))
    trainer.compute_loss(trainer.model, dict(trainer.data_collator([trainer.train_dataset[row] for row in (1, 3)])))


def test_autocast_computes_in_bfloat16(new_trainer):
    for autocast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with new_trainer(autocast=autocast).compute_loss_context_manager():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
