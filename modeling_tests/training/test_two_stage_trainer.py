# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import TrainerControl, TrainerState, TrainingArguments

from remamba_hf.families import ALL_FAMILIES, FAMILIES
from remamba_hf.training.recall_data import RecallDataset, RecallLevel
from remamba_hf.training.recall_losses import evidence_loss, note_loss, token_losses, value_loss
from remamba_hf.training.recall_trainer import Curriculum, RecallTrainer, take_batch
from remamba_hf.training.two_stage_trainer import (
    PromptResponseCollator,
    TwoStageTrainer,
    answer_matches,
    each_answer_matches,
    parameter_groups,
)

VOCABULARY = 32
KEY, QUESTION = 30, 31


class MarkedTokens:
    """Rows of noise with a marked token, asked for at the end: item i is a batch, like those of `RecallDataset`."""

    def __init__(self, batches: int = 400, length: int = 24, rows: int = 32) -> None:
        self.levels = [RecallLevel((length,)), RecallLevel((length,)), RecallLevel((length,), two_stage=1.0)]
        self.batches, self.length, self.rows, self.level = batches, length, rows, 0

    def set_level(self, level: int) -> None:
        self.level = level

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> dict[str, object]:
        generator = np.random.default_rng(index)
        ids = generator.integers(10, KEY, size=(self.rows, self.length + 8))
        place = generator.integers(0, 15, size=self.rows)
        rows = np.arange(self.rows)
        ids[rows, place] = KEY
        ids[rows, place + 1] = generator.integers(0, 10, size=self.rows)
        ids[:, self.length - 1] = QUESTION
        ids[:, self.length] = ids[rows, place + 1]
        labels = np.full_like(ids, -100)
        labels[:, self.length] = ids[:, self.length]
        span = torch.from_numpy(np.stack([place, place + 2], axis=1))
        return {
            "input_ids": torch.from_numpy(ids),
            "labels": torch.from_numpy(labels),
            "prompt_length": self.length,
            "questions": 1,
            "evidence": span,
            "digits": span + torch.tensor([1, 0]),
            "compression_span": 0.7,
            "compression_ratio": 0.5,
            "compress_prompt": self.levels[self.level].two_stage > 0,
            "level": self.level,
        }


FAMILY_SETTINGS = {
    "remamba": {},
    "remamba2": dict(num_heads=8, head_dim=8, n_groups=2),
    "memmamba": dict(note_size=8, chunk_size=4, cross_layer_period=1, fusion="weighted", read_threshold=0.1),
}
# Parameters that weight decay must not touch, and some that it must, by the ends of their names.
SPARED = {
    "remamba": ("A_log", ".D", "dt_proj.bias", "adaptation.bias", "conv1d.bias", "norm.weight", "norm_f.weight"),
    "remamba2": (
        "A_log",
        ".D",
        "dt_bias",
        "adaptation.bias",
        "conv1d.bias",
        "norm.weight",
        "mixer.norm.weight",
        "norm_f.weight",
    ),
    "memmamba": (
        *("A_log", ".D", "dt_proj.bias", "conv1d.bias", "norm.weight", "memory.norm.weight", "norm_f.weight", "sink"),
        *("note_norm.weight", "write_score.bias", "gate.bias", "token_fusion.weight", "layer_fusion.weight"),
    ),
}
DECAYED = {
    "remamba": ("embeddings.weight", "in_proj.weight", "dt_proj.weight", "conv1d.weight", "query.0.weight"),
    "remamba2": ("embeddings.weight", "in_proj.weight", "out_proj.weight", "conv1d.weight", "query.0.weight"),
    "memmamba": (
        *("embeddings.weight", "in_proj.weight", "dt_proj.weight", "conv1d.weight", "write_score.weight", "note.weight"),
        *("query.weight", "key.weight", "value.weight", "output.weight", "gate.weight"),
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def tiny_model(family="remamba", **settings):
    torch.manual_seed(0)
    config = ALL_FAMILIES[family].config_class(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        initializer_range=0.1,
        **{**FAMILY_SETTINGS[family], **settings},
    )
    return ALL_FAMILIES[family].model_class(config)


def arguments(folder, **settings) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )


def recall_trainer(folder, model, dataset, steps, two_stage=True, **settings) -> tuple[RecallTrainer, Curriculum]:
    curriculum = Curriculum(dataset, max_steps=steps, **settings.pop("curriculum", {}))
    trainer = RecallTrainer(
        model=model,
        args=arguments(folder, max_steps=steps, logging_steps=10, learning_rate=1e-2, **settings),
        train_dataset=dataset,
        data_collator=take_batch,
        curriculum=curriculum,
        two_stage=two_stage,
        compressor_from_level=1,
    )
    return trainer, curriculum


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_weight_decay_spares_rates_biases_and_norms(family):
    model = tiny_model(family)
    decayed, spared = parameter_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    spared_names = {names[id(parameter)] for parameter in spared["params"]}
    decayed_names = {names[id(parameter)] for parameter in decayed["params"]}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert decayed_names | spared_names == set(names.values())
    for ending in SPARED[family]:
        assert any(name.endswith(ending) for name in spared_names), ending
        assert not any(name.endswith(ending) for name in decayed_names), ending
    for ending in DECAYED[family]:
        assert any(name.endswith(ending) for name in decayed_names), ending
        assert not any(name.endswith(ending) for name in spared_names), ending
    # However a parameter is named: vectors set scales, rates and offsets, matrices mix what they are given.
    assert all(parameter.dim() <= 1 or "A_log" in names[id(parameter)] for parameter in spared["params"])
    assert all(parameter.dim() > 1 for parameter in decayed["params"])


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_trainer_uses_these_groups(family, tmp_path):
    model = tiny_model(family)
    trainer = TwoStageTrainer(model=model, args=arguments(tmp_path, weight_decay=0.1))
    groups = trainer.create_optimizer().param_groups
    expected = parameter_groups(model, 0.1)
    assert [{id(p) for p in group["params"]} for group in groups] == [{id(p) for p in group["params"]} for group in expected]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


@pytest.mark.parametrize(
    ("family", "modules"),
    [
        ("remamba", ["compressor", "adaptation", "dt_proj"]),
        ("remamba2", ["compressor", "adaptation", "norm"]),
        ("memmamba", ["memory"]),
    ],
)
def test_groups_of_an_adapted_model(family, modules):
    """PEFT puts its own names between a module's and its parameter's."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["in_proj"], modules_to_save=modules)
    model = peft.get_peft_model(tiny_model(family), config)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    decayed, spared = parameter_groups(model, 0.1)
    assert len(decayed["params"]) + len(spared["params"]) == len(trainable)
    vectors = {id(parameter) for parameter in trainable.values() if parameter.dim() <= 1}
    assert {id(parameter) for parameter in spared["params"]} == vectors
    assert vectors


def test_labels_start_after_the_prompt():
    samples = [
        {"prompt_ids": [5, 6, 7], "response_ids": [8, 9]},
        {"prompt_ids": np.arange(10, 18), "response_ids": [2]},
    ]
    batch = PromptResponseCollator(padding=1)(samples)
    assert batch["input_ids"].shape == (2, 16)
    assert batch["prompt_lengths"].tolist() == [3, 8]
    assert batch["input_ids"][0].tolist() == [5, 6, 7, 8, 9] + [1] * 11
    assert batch["labels"][0].tolist() == [-100] * 3 + [8, 9] + [-100] * 11
    assert batch["attention_mask"].sum(1).tolist() == [5, 9]
    with pytest.raises(ValueError, match=r"sample 1 .* empty"):
        PromptResponseCollator(padding=1)([samples[0], {"prompt_ids": [], "response_ids": [2]}])


def test_a_rows_seed_is_its_own():
    samples = [{"prompt_ids": [5, 6, number], "response_ids": [8] * (1 + number)} for number in range(4)]

    def seeds(rows, seed=3, epoch=0):
        return PromptResponseCollator(padding=1, seed=seed, epoch=epoch)(rows)["compression_seeds"].tolist()

    together = seeds(samples)
    assert [seeds([sample])[0] for sample in samples] == together, "whatever its batch is padded to"
    assert len({*together, *seeds(samples, seed=4), *seeds(samples, epoch=1)}) == 12
    assert "compression_seeds" not in PromptResponseCollator(padding=1)(samples)


def test_seeds_follow_the_epochs_and_not_the_order_of_the_run(tmp_path):
    """Two epochs: each row draws twice, differently, and a row's draw does not depend on what was drawn before it."""
    ranges = dict(train_compression_span=(0.2, 0.8), train_compression_ratio=(0.1, 0.9), train_compression_tail=0)
    data = [{"prompt_ids": [2 + row, *range(2, 20)], "response_ids": [7, 0]} for row in range(4)]

    class Watching(TwoStageTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen[inputs["input_ids"][0, 0].item()].append(inputs["compression_seeds"].item())
            return super().compute_loss(model, inputs, *args, **kwargs)

    def seeds_of(order):
        settings = arguments(tmp_path, num_train_epochs=2, seed=order, logging_steps=100)
        model, collator = tiny_model(**ranges), PromptResponseCollator(padding=1, seed=0)
        Watching(model=model, args=settings, train_dataset=data, data_collator=collator).train()

    runs = []
    for order in (0, 1):
        seen = {2 + row: [] for row in range(4)}
        seeds_of(order)
        runs.append(seen)
    assert runs[0] == runs[1]
    assert all(len(set(seeds)) == 2 for seeds in runs[0].values())


def test_logs_tell_what_was_compressed(tmp_path):
    """Means over the rows since the last log, against what the model returns for the same rows; lost losses are counted."""
    ranges = dict(train_compression_span=(0.2, 0.8), train_compression_ratio=(0.1, 0.9), train_compression_tail=0)
    model = tiny_model(**ranges, compression_min_prompt=10)
    draw = np.random.default_rng(0)
    data = [{"prompt_ids": draw.integers(8, 30, size), "response_ids": [7, 0]} for size in (4, 12, 30, 50)]
    collator = PromptResponseCollator(padding=1, seed=0)
    with torch.no_grad():
        outputs = [model.train()(**collator([row])) for row in data]

    class Losing(TwoStageTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            with torch.no_grad():
                model.lm_head.weight[7, 0] = float("nan") if (inputs["labels"] != -100).sum() and lost.pop() else 0.0
            return super().compute_loss(model, inputs, *args, **kwargs)

    lost = [False, False, True, False]
    settings = arguments(tmp_path, max_steps=1, gradient_accumulation_steps=4, logging_steps=1, learning_rate=0.0)
    trainer = Losing(model=model, args=settings, train_dataset=data, data_collator=collator)
    trainer.train()
    logs = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert outputs[0].compressed_positions is None
    scores = [output.compression_scores[output.compressed_positions >= 0] for output in outputs[1:]]
    assert logs["compressed"] == 3 / 4
    assert logs["kept"] == sum(map(len, scores)) / 3
    alphas = torch.cat(scores).relu()
    assert alphas.mean() > 0
    assert logs["alpha"] == pytest.approx(alphas.mean().item(), rel=1e-5)
    assert logs["overflow"] == 1 / 4


def test_trainer_with_collated_pairs_logs_matches_and_lowers_the_loss(family, tmp_path):
    generator = np.random.default_rng(0)
    data = [
        {"prompt_ids": generator.integers(2, VOCABULARY, size=length), "response_ids": [7, 0]}
        for length in generator.integers(20, 40, size=64)
    ]
    trainer = TwoStageTrainer(
        model=tiny_model(family, train_compression_tail=0),
        args=arguments(tmp_path, max_steps=40, logging_steps=5, learning_rate=1e-2, lr_scheduler_type="constant"),
        train_dataset=data,
        data_collator=PromptResponseCollator(padding=1),
    )
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "answer_match" in entry]
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert history[-1]["answer_match"] > history[0]["answer_match"]


def test_notes_are_wanted_above_all_others_together():
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]], requires_grad=True)
    wanted = torch.tensor([[True, False, False], [False, True, False]])
    others = torch.tensor([-1.0, 0.5, 0.0, -2.0]).exp().sum().log()
    expected = (F.softplus(others - 2.0) + F.softplus(others - 3.0)) / 2
    loss = note_loss(logits, wanted)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert (logits.grad[wanted] < 0).all()
    assert (logits.grad[~wanted] > 0).all()
    assert logits.grad[0, 2] > logits.grad[1, 2], "the highest of the others is held down most"
    assert note_loss(logits, torch.zeros_like(wanted)).item() == 0


def test_each_answer_of_a_row_is_judged_by_itself():
    """Answers at labels 1-2, 4 and 6; wrong are the second row's second answer and one token of the third's first."""
    labels = torch.full((3, 8), -100)
    labels[:, [1, 2, 4, 6]] = torch.tensor([3, 4, 5, 6])
    said = labels.clone()
    said[1, 4], said[2, 2] = 0, 0
    logits = F.one_hot(said[:, 1:].clamp(min=0), 8).float()
    logits = F.pad(logits, (0, 0, 0, 1))
    right = each_answer_matches(logits, labels, 3)
    assert right.tolist() == [[True, True, True], [True, False, True], [False, True, True]]
    assert each_answer_matches(logits, labels, 4)[0].tolist() == [True] * 4, "a missing answer is not wrong"
    assert torch.equal(right.all(1), answer_matches(logits, labels))


def test_answer_matches_counts_labelled_tokens_only():
    labels = torch.tensor([[-100, -100, 3, 4], [-100, -100, 3, 5]])
    logits = torch.zeros(2, 4, 8)
    logits[:, 1, 3] = logits[:, 2, 4] = 1.0
    logits[:, 0, 6] = 1.0
    assert answer_matches(logits, labels).tolist() == [True, False]


def test_losses_are_those_of_their_definitions():
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 5, 8), torch.randint(0, 8, (2, 5))
    expected = -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(token_losses(logits, ids), expected)
    states, embeddings = torch.randn(2, 5, 4), torch.randn(2, 5, 4, requires_grad=True)
    loss = value_loss(torch.nn.Identity(), states, embeddings)
    assert loss.item() == pytest.approx(((states - embeddings) ** 2).sum().item() / embeddings.square().sum().item())
    assert not loss.requires_grad


def test_evidence_loss_is_least_where_evidence_alone_scores():
    evidence = torch.tensor([[2, 4], [9, 11]])
    perfect = torch.full((2, 8), -0.5)
    perfect[0, 2:4] = 1.0
    assert evidence_loss(perfect, evidence).item() == pytest.approx(0, abs=1e-5)
    rival = perfect.clone()
    rival[0, 6] = 0.9
    late = torch.tensor([[9, 11], [9, 11]])
    assert evidence_loss(rival, evidence) > 0.1
    assert evidence_loss(rival, late).item() == 0, "no evidence in any window"
    scores = torch.zeros(2, 8, requires_grad=True)
    evidence_loss(scores, evidence).backward()
    assert (scores.grad[0, 2:4] < 0).all()
    assert scores.grad[1].eq(0).all()


def test_recall_is_learned_and_survives_compression(family, tmp_path):
    dataset = MarkedTokens()
    trainer, curriculum = recall_trainer(
        tmp_path, tiny_model(family), dataset, 250, warmup_steps=20, save_strategy="no", curriculum={"threshold": 0.85}
    )
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "level_match" in entry]
    assert history[0]["level_match"] < 0.5
    assert curriculum.level == 2
    assert history[-1]["in_window_match"] > 0.8
    assert history[-1]["needle_hits"] > 0.9
    assert "value_loss" not in history[0], "copying comes first"
    assert history[-1]["value_loss"] < 0.5 * next(entry["value_loss"] for entry in history if "value_loss" in entry)
    assert history[-1]["learning_rate"] < 1e-3, "the rate falls once the last level is reached"


def test_plain_training_leaves_the_compressor_alone(family, tmp_path):
    model = tiny_model(family)
    before = {name: value.clone() for name, value in model.backbone.compressor.named_parameters()}
    dataset = MarkedTokens()
    dataset.levels = [RecallLevel((24,), two_stage=1.0)]
    trainer, _ = recall_trainer(tmp_path, model, dataset, 3, two_stage=False, save_strategy="no", weight_decay=0.0)
    trainer.train()
    for name, value in model.backbone.compressor.named_parameters():
        assert torch.equal(value, before[name]), name


def test_curriculum_goes_on_from_a_checkpoint(tmp_path):
    dataset = MarkedTokens()
    trainer, curriculum = recall_trainer(tmp_path, tiny_model(), dataset, 20, save_steps=10, curriculum={"threshold": -1.0})
    trainer.train()
    assert curriculum.level == 2
    again, resumed = recall_trainer(tmp_path, tiny_model(), MarkedTokens(), 30, save_steps=10)
    resumed.load(tmp_path / "checkpoint-20")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert resumed.level == 2
    assert resumed.decay_from == curriculum.decay_from
    assert again.train_dataset.level == 2
    assert again.state.global_step == 30
    assert resumed.seconds() > resumed.seconds_before > 0


def test_training_ends_in_time_and_gives_up_what_does_not_learn(tmp_path):
    trainer, curriculum = recall_trainer(
        tmp_path, tiny_model(), MarkedTokens(), 1000, save_strategy="no", curriculum={"max_seconds": 0.5}
    )
    trainer.train()
    assert trainer.state.global_step < 1000
    assert not curriculum.stuck
    trainer, curriculum = recall_trainer(
        tmp_path, tiny_model(), MarkedTokens(), 20, save_strategy="no", curriculum={"give_up_at": 0.25, "threshold": 2.0}
    )
    trainer.train()
    assert curriculum.stuck
    assert trainer.state.global_step == 5


def test_levels_open_with_right_answers_or_in_time():
    dataset = MarkedTokens()
    dataset.levels = [RecallLevel((24,))] * 4
    curriculum = Curriculum(dataset, max_steps=100, patience=0.2)
    levels = []
    for step, right in ((10, 0.2), (40, 0.2), (50, 1.0), (60, 1.0), (62, 1.0), (64, 1.0), (70, 0.5), (90, 0.5), (95, 0.5)):
        curriculum.on_log(None, TrainerState(global_step=step), TrainerControl(), logs={"level_match": right})
        levels.append(curriculum.level)
    assert levels == [0, 0, 0, 0, 0, 1, 1, 2, 2]
    assert curriculum.decay_from is None
    curriculum.on_log(None, TrainerState(global_step=99), TrainerControl(), logs={"loss": 1.0})
    assert curriculum.level == dataset.level == 2, "a log without answers says nothing"


def test_rate_waits_for_the_last_level():
    dataset = MarkedTokens()
    curriculum = Curriculum(dataset, max_steps=100, decay_at=0.9)
    assert curriculum.rate(0, warmup=10) == pytest.approx(0.1)
    assert curriculum.rate(80, warmup=10) == 1.0
    curriculum.decay_from = 0.5
    assert curriculum.rate(75, warmup=10) == pytest.approx(0.5)
    assert curriculum.rate(100, warmup=10) == pytest.approx(0.02)
    assert math.isinf(curriculum.max_seconds)


def test_levels_of_the_dataset_are_shared():
    dataset = RecallDataset.__new__(RecallDataset)
    dataset._level = torch.zeros(1, dtype=torch.int64).share_memory_()
    dataset.set_level(3)
    assert dataset.level == 3
    assert dataset._level.is_shared()
