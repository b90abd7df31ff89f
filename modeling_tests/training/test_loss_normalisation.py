# SPDX-License-Identifier: Apache-2.0
"""A response token counts the same in whichever micro-batch of a step its row stands, with whichever trainer."""

import copy

import numpy as np
import pytest
import torch.nn.functional as F
from transformers import Trainer, TrainingArguments

from modeling_tests.modeling.tiny_models import assert_close, tiny_memmamba, tiny_model
from remamba_hf.families import ALL_FAMILIES

pytest.importorskip("accelerate")

from remamba_hf.training import PromptResponseCollator, TwoStageTrainer
from remamba_hf.training.two_stage_trainer import COMPRESSION_INPUTS

# Each row draws a window and a ratio of its own, by its seed, so that its draws do not depend on the micro-batch.
DRAWS = dict(train_compression_span=(0.2, 0.8), train_compression_ratio=(0.1, 0.9))
DRAW = np.random.default_rng(0)
ROWS = [
    dict(prompt_ids=DRAW.integers(2, 50, size=prompt), response_ids=DRAW.integers(2, 50, size=response))
    for prompt, response in ((30, 1), (12, 8), (21, 3), (39, 2))
]


def collator(family):
    collate = PromptResponseCollator(padding=0, seed=0)
    if family != "memmamba":
        return collate
    return lambda rows: {name: value for name, value in collate(rows).items() if name not in COMPRESSION_INPUTS}


def mean_over_tokens(model, batch):
    """The loss from the logits: over all labelled tokens of all rows."""
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)


def make_model(family, adapted):
    """In float64; `adapted`: with the paper's recipe, LoRA away from its start, where half of it gets no gradient."""
    base = tiny_memmamba() if family == "memmamba" else tiny_model(family=family, **DRAWS)
    if not adapted:
        return base
    lora = pytest.importorskip("remamba_hf.training.lora")
    recipe = lora.remamba_lora_config(base, r=2, init_lora_weights=False)
    return lora.add_lora(base, recipe).to(base.dtype)


@pytest.mark.parametrize("trainer_class", [Trainer, TwoStageTrainer])
@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_accumulated_ragged_rows_are_one_batch(family, adapted, trainer_class, tmp_path):
    """A step of SGD at rate 1 subtracts the gradient: of the mean over all tokens, in one batch and in one for each row."""
    start = make_model(family, adapted)
    reference = copy.deepcopy(start).train()
    loss = mean_over_tokens(reference, collator(family)(ROWS))
    loss.backward()
    for rows in (4, 1):
        model = copy.deepcopy(start)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=4 // rows,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0,
            logging_steps=1,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
            remove_unused_columns=False,
        )
        trainer = trainer_class(model=model, args=arguments, train_dataset=ROWS, data_collator=collator(family))
        trainer.train()
        logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        assert logged == pytest.approx(loss.item(), rel=1e-6)
        before, after = dict(start.named_parameters()), dict(model.named_parameters())
        for name, parameter in reference.named_parameters():
            if parameter.requires_grad:
                step = before[name].detach() - after[name].detach()
                assert_close(step, parameter.grad, 1e-8, f"{name}, {rows} rows at once")
