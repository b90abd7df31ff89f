# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/selection_experiment`: its data, that its steps go on where they stopped, what it evaluates and how it sums
up, on models of a few thousand parameters."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState

import remamba_hf
from remamba_hf.training.recall_data import RecallLevel, RecallSampler

pytest.importorskip("datasets")
pytest.importorskip("matplotlib")
BENCHMARKS = Path(remamba_hf.__file__).parent.parent / "benchmarks"
if not (BENCHMARKS / "selection_experiment").is_dir():
    pytest.skip("needs the repository's benchmarks/", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

from selection_experiment import parts, report, steps  # noqa: E402
from selection_experiment.data import BookBatches, Instructions, MixedSampler, PhasedBatches  # noqa: E402
from selection_experiment.evaluation import WHOLE, Measurement, measurements, setting_name, tokens_left  # noqa: E402
from selection_experiment.line_data import LineSampler  # noqa: E402
from selection_experiment.preparation import prepare, tokenizer_and_tokens  # noqa: E402
from selection_experiment.recipe import ARMS, FULL, TINY, Phase, Training  # noqa: E402
from selection_experiment.steps import Experiment  # noqa: E402
from selection_experiment.training import FAILED, STARTS, NotLearned, OutOfTime, Watch, arm_model  # noqa: E402

LINE = "line open-door: REGISTER_CONTENT is <123>\n"
TEXT = "".join(
    f"Of the {place} and its people little was {verb}.\nThey went by the old road.\n\n"
    for place in ("river", "house", "garden", "village")
    for verb in ("said", "known", "written", "told", "kept")
)
SMALL = replace(
    TINY,
    hidden_size=16,
    vocab_size=400,
    pretraining=Training(6, 256, 3e-3, 2),
    book_lengths=(64, 128),
    trunk=Training(6, 256, 3e-3, 2, (Phase(0.5, RecallLevel((128,))), Phase(0.5, RecallLevel((192,), questions=2)))),
    tuning=Training(
        6,
        384,
        3e-3,
        2,
        (Phase(0.5, RecallLevel((192,))), Phase(0.5, RecallLevel((192,), two_stage=1.0, ratio=(0.2, 0.8), min_kept=8))),
    ),
    evaluation=replace(TINY.evaluation, lengths=(240, 280), samples=2, question_length=128, windows=1, counted=8),
    logging_steps=2,
    seeds=(0,),
)
ARMS_RUN = ("sft", "remamba", "random")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A prepared folder, with instructions and questions."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("books", "others"):
        (folder / name).mkdir()
    for number in range(3):
        (folder / "books" / f"{number}.txt").write_text((TEXT + LINE * 3) * 6)
    (folder / "others" / "held out.txt").write_text(TEXT * 6)
    pairs = [
        {"instruction": f"Say {word}. " * 40, "input": "", "output": f"{word}."} for word in ("river", "house", "garden")
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    words = (folder / "books", folder / "others", None, [folder / "pairs.jsonl"], folder / "pairs.jsonl")
    record = prepare(SMALL, folder / "data", *words)
    assert record["instructions"] == {"pairs.jsonl": 3}
    assert record["questions"] == 2
    return folder / "data"


def experiment(run, data, **settings):
    run.mkdir(parents=True, exist_ok=True)
    if not (run / "data").exists():
        (run / "data").symlink_to(data)
    return Experiment(run, SMALL, **settings)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished run of three arms."""
    folder = tmp_path_factory.mktemp("run") / "run"
    experiment(folder, data).all(ARMS_RUN, (0,))
    return folder


def read(path):
    return json.loads(path.read_text())


def test_lines_are_those_that_a_user_would_write(data):
    tokenizer, _ = tokenizer_and_tokens(data)
    sampler = LineSampler(tokenizer, seed=3)
    for length in (300, 500, 777):
        text = sampler.text((length, 1), length, 2, 0, [0.1, 0.9])
        assert max(len(text.prompt_ids(key)) for key in range(2)) == length
        for key, fact in enumerate(text.asked):
            written = tokenizer.decode(text.prompt_ids(key).tolist())
            assert tokenizer(written)["input_ids"] == text.prompt_ids(key).tolist()
            assert f"line {fact.name}: REGISTER_CONTENT is <{fact.number}>\n" in written
            assert written.count(f" {fact.name}") == 2, "in its line and in the question"
            assert tokenizer.decode(text.text_ids[slice(*fact.digits)].tolist()) == fact.number
            assert tokenizer.decode(text.text_ids[slice(*fact.evidence)].tolist()).startswith(f" {fact.name}: ")
            assert tokenizer.decode(fact.answer_ids.tolist()) == f"{fact.number}<|endoftext|>"
        assert text.asked[0].depth < 0.5 <= text.asked[1].depth + 0.2
        assert len(text.other_numbers) == written.count("REGISTER_CONTENT is <") - 2
    again = LineSampler(tokenizer, seed=3).text((777, 1), 777, 2, 0, [0.1, 0.9])
    assert again.text_ids.tolist() == text.text_ids.tolist()
    with pytest.raises(ValueError, match="longer prompts"):
        sampler.text(0, 30)


@pytest.mark.parametrize("keys", [1, 2, 4])
def test_lines_where_they_fit_and_facts_elsewhere(data, keys, monkeypatch):
    tokenizer, tokens = tokenizer_and_tokens(data)

    def lines_of(lengths):
        """How many texts are lines, and for how many lengths these are said to fit."""
        lines = LineSampler(tokenizer, seed=3)
        mixed = MixedSampler(RecallSampler(tokens, tokenizer, 3, 1), lines, 1.0)
        texts = [(length, mixed.text((number, 0), length, keys)) for length in lengths for number in range(20)]
        assert all(max(len(text.prompt_ids(key)) for key in range(keys)) == length for length, text in texts)
        written = sum("REGISTER_CONTENT> in line" in tokenizer.decode(text.prompt_ids().tolist()) for _, text in texts)
        return written, 20 * sum(lines.fits(length, keys) for length in lengths)

    lengths = range(224, 513, 32)
    assert lines_of(lengths) == (20 * len(lengths), 20 * len(lengths))
    monkeypatch.setattr(LineSampler, "_fill", lambda self, generator, names, spare, places: not spare)
    written, fitting = lines_of(lengths)
    assert written == fitting < 10 * len(lengths), "what is drawn hardly ever has the right length by itself"


def test_batches_are_functions_of_seed_and_step(data, tmp_path):
    tokenizer, tokens = tokenizer_and_tokens(data)
    lab, instructions = experiment(tmp_path, data), Instructions.load(data / "instructions")

    def batches(seed):
        return PhasedBatches(SMALL.tuning, lab.sampler(tokens, tokenizer, seed), instructions, share=0.4)

    first, other = ([batches(seed)[step] for step in range(6)] for seed in (0, 1))
    again = [batches(0)[step] for step in reversed(range(6))][::-1]
    for batch, same, different in zip(first, again, other, strict=True):
        assert torch.equal(batch["input_ids"], same["input_ids"])
        assert batch["compression_ratio"] == same["compression_ratio"]
        assert not torch.equal(batch["input_ids"], different["input_ids"])
    assert batches(0).digest() == batches(0).digest() != batches(1).digest()
    assert [batch["compress_prompt"] for batch in first] == [False] * 3 + [True] * 3
    kinds = set()
    for batch in first + other:
        assert batch["prompt_length"] == 192
        for row, labels, digits in zip(batch["input_ids"], batch["labels"], batch["digits"].tolist(), strict=True):
            prompt, answer = tokenizer.decode(row[:192].tolist()), tokenizer.decode(row[labels != -100].tolist())
            assert (labels[:192] == -100).all()
            assert answer.endswith("<|endoftext|>")
            is_instruction = digits == [192, 193]  # no number is known
            kinds.add("instruction" if is_instruction else "line" if "REGISTER_CONTENT" in prompt[-80:] else "fact")
            if is_instruction:
                word = answer.split(".")[0]
                assert prompt.startswith(f"Say {word}. Say {word}. ")
                assert prompt.endswith(f"Say {word}. "), "the middle was left out"
            else:
                assert tokenizer.decode(row[slice(*digits)].tolist()) == answer.removesuffix("<|endoftext|>").strip()
    assert kinds == {"instruction", "line", "fact"}
    with pytest.raises(ValueError, match="no instruction has a prompt of 5000 tokens"):
        instructions.fitting(5000)
    books = BookBatches(SMALL, tokens)
    assert [books[step]["input_ids"].shape for step in (0, 5)] == [(4, 64), (2, 128)]
    assert torch.equal(books[1]["input_ids"], BookBatches(SMALL, tokens)[1]["input_ids"])


def test_all_arms_are_given_the_same_and_start_alike(run):
    trained = {arm: read(run / "arms" / f"{arm}-0" / "training.json") for arm in ARMS_RUN}
    assert len({record["data"] for record in trained.values()}) == 1
    assert all(record["steps"] == 6 for record in trained.values())
    configs = {arm: read(run / "arms" / f"{arm}-0" / "model" / "config.json") for arm in ARMS_RUN}
    assert {arm: configs[arm]["selection"] for arm in ("remamba", "random")} == {"remamba": "score", "random": "random"}
    # In the phase of plain passes the arms that compress differ in nothing; their first log is of it.
    assert trained["remamba"]["history"][0]["answer_loss"] == trained["random"]["history"][0]["answer_loss"]
    assert trained["remamba"]["history"][-2]["answer_loss"] != trained["random"]["history"][-2]["answer_loss"]
    assert "needle_hits" in trained["remamba"]["history"][-2]
    weights = {arm: load_file(run / "arms" / f"{arm}-0" / "model" / "model.safetensors") for arm in ARMS_RUN}
    started = arm_model(SMALL, ARMS["sft"], run / "trunk" / "model", 0).backbone.compressor.value[0].weight.bfloat16()
    trained_values = {arm: weights[arm]["backbone.compressor.value.0.weight"] for arm in ARMS_RUN}
    assert torch.equal(trained_values["sft"], started)
    assert not torch.equal(trained_values["remamba"], started)


def test_what_was_stopped_ends_like_what_was_not(run, data, tmp_path):
    lab = experiment(tmp_path / "run", data, deadline=0.0)
    works = [(lab.pretrain, "base"), (lab.trunk, "trunk"), (lambda: lab.finetune("remamba", 0), "arms/remamba-0")]
    for work, folder in works:
        stops = 0
        while not (lab.run / folder / "training.json").exists():
            try:
                work()
            except OutOfTime:
                stops += 1
                assert len(list((lab.run / folder / "checkpoints").iterdir())) == 1
        assert stops == 2, "6 steps in intervals of 2"
        ours, whole = (read(place / folder / "training.json") for place in (lab.run, run))
        assert [entry.get("loss") for entry in ours["history"]] == [entry.get("loss") for entry in whole["history"]]
        names = [place / folder / "model" / "model.safetensors" for place in (lab.run, run)]
        assert names[0].read_bytes() == names[1].read_bytes(), folder
        assert not (lab.run / folder / "checkpoints").exists()
    with pytest.raises(OutOfTime, match="before perplexity"):
        lab.evaluate("remamba", 0)
    with pytest.raises(SystemExit) as stop:
        steps.main(["all", "--tiny", "--run", str(tmp_path / "tiny"), "--seconds", "0"])
    assert stop.value.code == 75


def test_numbers_come_from_result_files_of_remamba_eval(run):
    found = measurements(SMALL, run / "results" / "remamba-0", "remamba", 0)
    name = setting_name(*SMALL.evaluation.compression[0])
    recall = read(run / "results" / "remamba-0" / "recall-0.json")
    assert [cell["variant"] for cell in recall["cells"]] == ["compressed"] * 2
    assert (recall["settings"]["span"], recall["settings"]["ratio"]) == SMALL.evaluation.compression[0]
    values = {(one.task, one.setting, one.column): one for one in found}
    for cell in recall["cells"]:
        assert values["recall", name, str(cell["length"])].value == 100 * cell["accuracy"]
        early = [record["right"] for record in cell["records"] if record["depth"] < 0.5]
        assert values["recall-early", name, str(cell["length"])].count == len(early)
    lines = read(run / "results" / "remamba-0" / "lines-0.json")
    assert lines["settings"]["task"] == "longeval"
    assert lines["settings"]["compression"]["compression_span"] == 0.5
    assert {row["prompt_tokens"] for row in lines["answers"]} == {240, 280}, "what was written has the tokens meant"
    assert values["lines", name, "280"].value == lines["summary"]["tasks"]["280_tokens"]["accuracy"]
    questions = read(run / "results" / "remamba-0" / "questions-0.json")
    assert values["questions", name, "questions"].value == questions["summary"]["tasks"]["questions"]["rouge_l"]
    perplexity = read(run / "results" / "remamba-0" / "perplexity.json")["perplexity"]
    assert [values["perplexity", WHOLE, str(cell["length"])].value for cell in perplexity] == [
        cell["perplexity"] for cell in perplexity
    ]
    cut = read(run / "results" / "sft-0" / "lines-cut-0-280.json")
    assert cut["settings"]["max_length"] == tokens_left(280, 0.5, 0.1) == 280 - 140 + 14
    assert cut["truncated"] == 2
    assert cut["settings"]["compression"] is None
    plain = measurements(SMALL, run / "results" / "sft-0", "sft", 0)
    assert {one.arm for one in plain} == {"sft", "sft, prompt cut"}
    cells = read(run / "results" / "sft-0" / "recall.json")["cells"]
    read_plainly = {str(cell["length"]): 100 * cell["accuracy"] for cell in cells if cell["variant"] == "uncompressed"}
    assert {one.column: one.value for one in plain if one.task == "recall"} == read_plainly


def test_report_of_a_run(run, tmp_path):
    files = report.write(SMALL, run, tmp_path / "selection")
    content, text = read(files[0]), files[1].read_text()
    assert {entry["arm"] for entry in content["aggregated"]} == {*ARMS_RUN, "sft, prompt cut", "start"}
    assert content["trainings"]["remamba-0"]["environment"]["device"] == "cpu"
    assert content["data_digests"].keys() == {"0"}
    assert content["recipe"]["tuning"]["steps"] == 6
    for label in ("ReMamba", "random selection", "Mamba (SFT), prompt cut to as many tokens", "before fine-tuning"):
        assert f"| {label} |" in text
    assert files[2].read_bytes().startswith(b"\x89PNG")


def made_up(arm, values, task="recall", setting="p=0.5, rho=0.1", column="240"):
    return [Measurement(arm, seed, task, setting, column, value, 100) for seed, value in enumerate(values)]


def test_report_takes_means_spreads_and_differences_by_seed():
    found = [
        *made_up("remamba", (50.0, 70.0, 90.0)),
        *made_up("remamba", (10.0, 30.0, 20.0), column="280"),
        *made_up("sft", (40.0, 50.0, 90.0), setting=WHOLE),
        *made_up("sft", (0.0, 10.0, 20.0), setting=WHOLE, column="280"),
        *made_up("random", (5.0,)),
    ]
    text = report.tables(SMALL, found)
    assert "| ReMamba | 70.0 ± 20.0 | 20.0 ± 10.0 |\n" in text
    assert "| Mamba (SFT) | 60.0 ± 26.5 | 10.0 ± 10.0 |\n" in text, "in the table of a setting, as it has none of its own"
    assert "| random selection | 5.0 |  |\n" in text, "one seed has no spread"
    # Means over lengths: ReMamba 30, 50, 55, SFT 20, 30, 55; seed by seed 10, 20, 0.
    assert "| ReMamba | 45.0 ± 13.2 |\n" in text
    assert "| Mamba (SFT) | +10.0 ± 10.0 |\n" in text
    assert report.spread([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    with pytest.raises(ValueError, match="twice"):
        report.by_cell([*found, found[0]])


def test_report_refuses_arms_of_different_data():
    trainings = {"base": {"data": "x"}, "sft-0": {"data": "a"}, "remamba-0": {"data": "a"}, "sft-1": {"data": "b"}}
    assert report.check_same_data(trainings) == {"0": "a", "1": "b"}
    with pytest.raises(ValueError, match="random-1 was trained on other data"):
        report.check_same_data({**trainings, "random-1": {"data": "c"}})


def test_parts_come_back_as_they_went(run, tmp_path):
    size = 0.02
    files = parts.export(run, ["trunk", "results", "recipe.json"], tmp_path / "parts", size)
    assert len(files) > 2
    assert all(file.stat().st_size <= size * parts.MEBIBYTE for file in files)
    for file in files[1:]:  # in two loads
        (tmp_path / "later").mkdir(exist_ok=True)
        file.rename(tmp_path / "later" / file.name)
    with pytest.raises(FileNotFoundError, match="part-01 is missing"):
        parts.import_parts(tmp_path / "new", [tmp_path / "parts"])
    both = [tmp_path / "parts", tmp_path / "later"]
    assert parts.import_parts(tmp_path / "new", both) == ["trunk", "results", "recipe.json"]
    for folder in ("trunk", "results"):
        there = {file.relative_to(run): file.read_bytes() for file in (run / folder).rglob("*") if file.is_file()}
        assert there
        assert all((tmp_path / "new" / name).read_bytes() == content for name, content in there.items())
    part = tmp_path / "later" / "part-01"
    part.write_bytes(part.read_bytes()[::-1])
    with pytest.raises(ValueError, match="damaged"):
        parts.import_parts(tmp_path / "third", both)
    with pytest.raises(FileExistsError, match="not empty"):
        parts.export(run, ["trunk"], tmp_path / "parts")


def test_an_unfinished_training_goes_on_elsewhere(run, data, tmp_path):
    lab = experiment(tmp_path / "run", data, deadline=0.0)
    with pytest.raises(OutOfTime):
        lab.pretrain()
    parts.export(lab.run, ["base", "recipe.json"], tmp_path / "parts")
    parts.import_parts(tmp_path / "other", [tmp_path / "parts"])
    other = experiment(tmp_path / "other", data)
    other.pretrain()
    ours, whole = (read(place / "base" / "training.json") for place in (other.run, run))
    assert len([entry for entry in ours["history"] if "loss" in entry]) == 3, "also what was logged before"
    files = [place / "base" / "model" / "model.safetensors" for place in (other.run, run)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert ours["steps"] == whole["steps"] == 6


def test_what_is_said_again(data):
    """Echoes and restated facts, which come first in the full recipe."""
    tokenizer, tokens = tokenizer_and_tokens(data)
    echo, restated, asked = (
        Phase(0.2, RecallLevel((16, 24)), "echo"),
        Phase(0.4, RecallLevel((256,), questions=3), "restated"),
        Phase(0.4, RecallLevel((128,))),
    )
    training = Training(10, 1024, 1e-3, 1, (echo, restated, asked))
    assert training.ends() == [2, 6, 10]
    assert training.first_asked_end() == 10

    def batches(seed, line_share):
        sampler = MixedSampler(RecallSampler(tokens, tokenizer, seed, 1), LineSampler(tokenizer, seed), line_share)
        return PhasedBatches(training, sampler)

    ours = batches(3, 0.0)
    for step in range(2):
        batch = ours[step]
        assert all(part.is_contiguous() for part in batch.values() if isinstance(part, torch.Tensor)), "to be pinned"
        first, second = batch["input_ids"].chunk(2, dim=1)
        length = batch["prompt_length"]
        assert length in (16, 24)
        assert torch.equal(first, second)
        assert len(first) == 1024 // (2 * length)
        assert torch.equal(batch["labels"][:, length + 1 :], second[:, 1:])
        assert (batch["labels"][:, : length + 1] == -100).all()
        assert not batch["compress_prompt"]
        assert torch.equal(batches(3, 0.0)[step]["input_ids"], batch["input_ids"])
    assert not torch.equal(batches(4, 0.0)[0]["input_ids"][:, :16], ours[0]["input_ids"][:, :16])
    assert ours[6]["prompt_length"] == 128

    for share, between in ((0.0, (" is ", " was ")), (1.0, (": REGISTER_CONTENT is <",))):
        batch = batches(3, share)[2]
        orders = set()
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            answers = ids.where(labels != -100, -1).tolist()
            numbers = "".join(tokenizer.decode([token]) if token >= 0 else " " for token in answers).split()
            text, *said = tokenizer.decode(ids[ids != tokenizer.pad_token_id].tolist()).rsplit("\n", 3)
            assert [piece.split(between[0] if between[0] in piece else between[-1])[1] for piece in said] == numbers
            places = [text.index(piece) for piece in said]
            orders.add(tuple(sorted(range(3), key=places.__getitem__)))
        assert len(orders) > 1, "not in the text's order"


def test_a_start_that_does_not_learn_is_given_up(data, tmp_path, run):
    recipe = replace(SMALL, trunk=replace(SMALL.trunk, must_match=0.9))
    lab = experiment(tmp_path / "run", data)
    (lab.run / "base").symlink_to(run / "base")
    seeds, sampler = [], lab.sampler
    lab.recipe, lab.sampler = recipe, lambda *of, seed: seeds.append(seed) or sampler(*of, seed)
    with pytest.raises(NotLearned, match="change the recipe"):
        lab.trunk()
    assert seeds == [1000, 1001, 1002, 1003]
    failed = read(lab.run / "trunk" / FAILED)
    assert [entry["step"] for entry in failed] == [4] * STARTS, "the first log behind the first phase"
    assert all(entry["match"] < 0.9 for entry in failed)
    assert not (lab.run / "trunk" / "training.json").exists()

    watch = Watch(replace(recipe.trunk, must_match=0.5))
    history = [{"step": step, "level_match": match} for step, match in ((2, 0.8), (4, 0.1), (6, 0.1))]
    for step, gave_up in ((2, None), (6, False)):
        control = TrainerControl()
        watch.on_log(None, TrainerState(global_step=step, log_history=history[: step // 2]), control)
        assert watch.match == (None if gave_up is None else 0.8), "by the logs of the first phase, whatever follows"
        assert not control.should_training_stop

    (lab.run / "trunk" / FAILED).write_text(json.dumps(failed[:1]))
    lab.recipe = replace(SMALL, trunk=replace(recipe.trunk, must_match=0.0))
    lab.trunk()
    assert seeds[-1] == 1001
    record = read(lab.run / "trunk" / "training.json")
    assert record["failed_starts"] == failed[:1]
    assert record["steps"] == 6
    assert read(run / "trunk" / "training.json")["failed_starts"] == []


def test_steps_say_what_is_missing(data, tmp_path, capsys):
    lab = experiment(tmp_path / "run", data)
    with pytest.raises(FileNotFoundError, match="run the step pretrain first"):
        lab.trunk()
    with pytest.raises(FileNotFoundError, match="run the step finetune first"):
        lab.evaluate("sft", 0)
    with pytest.raises(ValueError, match="another recipe"):
        Experiment(tmp_path / "run", replace(SMALL, layers=3))
    with pytest.raises(FileNotFoundError, match="run the step prepare first"):
        Experiment(tmp_path / "empty", SMALL).pretrain()
    start = ["finetune", "--arm", "start"]
    for words in (["prepare"], ["export", "--folders", "base"], ["import"], ["report"], ["dance"], start):
        with pytest.raises(SystemExit):
            steps.parse_arguments([*words, "--run", str(tmp_path)])
    capsys.readouterr()


def test_recipes_hold_together():
    for recipe in (FULL, TINY, SMALL):
        for training in (recipe.trunk, recipe.tuning):
            assert sum(phase.share for phase in training.phases) == pytest.approx(1)
            phases = [training.phase(step) for step in range(training.steps)]
            assert phases == sorted(phases)
            for number, phase in enumerate(training.phases):
                assert phases.count(number) == pytest.approx(phase.share * training.steps, abs=1)
        assert not any(phase.level.two_stage for phase in (*recipe.trunk.phases, recipe.tuning.phases[0]))
        assert all(phase.form == "asked" for phase in recipe.tuning.phases), "arms compress, and need a question"
        assert recipe.save_steps % recipe.logging_steps == 0
        for span, ratio in recipe.evaluation.compression:
            last = recipe.tuning.phases[-1].level
            assert last.span[0] <= span <= last.span[1], "what is evaluated was trained"
            assert ratio >= last.ratio[0] or recipe is not FULL
    assert [ARMS[arm].selection for arm in ("remamba", "remamba-answer-only")] == ["score", "score"]
    options = steps.parse_arguments(["all", "--run", "r", "--steps", "5,6,7"])
    recipe = steps.recipe_of(options)
    assert (recipe.pretraining.steps, recipe.trunk.steps, recipe.tuning.steps) == (5, 6, 7)
