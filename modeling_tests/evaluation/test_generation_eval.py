# SPDX-License-Identifier: Apache-2.0
"""The loop that asks a model: cutting, batches, answers' ends, and runs that are interrupted or shared out."""

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from modeling_tests.modeling.tiny_models import tiny_memmamba, tiny_model
from remamba_hf.checkpoint_files import CheckpointError
from remamba_hf.evaluation import answers_file, causal_models, generation_eval, prompt_reader
from remamba_hf.evaluation.generation_eval import GenerationSettings, Processes
from remamba_hf.evaluation.reporting import table_head, table_row
from remamba_hf.evaluation.tasks import Answered, Sample

VOCABULARY = 300
SIZES = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, pad_token_id=1, bos_token_id=0, eos_token_id=0)
ATTENTION = dict(num_attention_heads=4, intermediate_size=48, max_position_embeddings=256, initializer_range=0.4)
OURS = ("remamba", "remamba2", "memmamba")
MAKERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **ATTENTION)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, **ATTENTION)),
    "mamba": lambda: MambaForCausalLM(MambaConfig(**SIZES, state_size=4, initializer_range=0.4)),
    "remamba": lambda: tiny_model(torch.float32, vocab_size=VOCABULARY),
    "remamba2": lambda: tiny_model(torch.float32, family="remamba2", vocab_size=VOCABULARY),
    "memmamba": lambda: tiny_memmamba(torch.float32, vocab_size=VOCABULARY),
}
PASSAGES = ["Of the river and its people little was said. ", "They went by the old road. ", "In the garden it was known. "]


class MadeUp:
    """A benchmark about nothing: two kinds of samples of many lengths; an answer scores by its number of characters."""

    name = "made_up"

    def __init__(self, count=7, stop=("e",)):
        self.count = count
        self.stop = stop

    def samples(self, data):
        return [
            Sample(
                identity=f"made/{number}",
                prompt=f"{number}: " + PASSAGES[number % 3] * (1 + 3 * number % 8),
                max_new_tokens=(6, 9)[number % 2],
                stop=self.stop if number % 4 == 0 else (),
                details={"kind": number % 2},
            )
            for number in range(self.count)
        ]

    def score(self, sample, answer):
        return {"length": float(len(answer))}

    def summary(self, answered):
        assert all(isinstance(one, Answered) for one in answered)
        scores = [one.scores["length"] for one in answered]
        return {"average": sum(scores) / len(scores), "order": [one.sample.identity for one in answered]}

    def table(self, summaries):
        rows = (table_row(name, [f"{summary['average']:.2f}"]) for name, summary in summaries.items())
        return table_head("length", ["average"]) + "".join(rows)


@pytest.fixture(scope="module", params=list(MAKERS))
def any_folder(request, prepared, tmp_path_factory):
    return make_folder(request.param, prepared, tmp_path_factory)


@pytest.fixture(scope="module")
def llama_folder(prepared, tmp_path_factory):
    return make_folder("llama", prepared, tmp_path_factory)


def make_folder(kind, prepared, tmp_path_factory):
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("checkpoints") / kind
    MAKERS[kind]().save_pretrained(folder)
    prepared[0].save_pretrained(folder)
    return folder


def evaluate(folder, output, task=None, processes=None, **settings):
    task = task or MadeUp()
    checkpoint = causal_models.find_checkpoint(str(folder))
    tokenizer, digest = causal_models.load_tokenizer(checkpoint)
    given = GenerationSettings(**{"max_length": 90, **settings})
    return generation_eval.evaluate(
        task, task.samples(None), checkpoint, tokenizer, digest, given, output, "cpu", {"tasks": []}, processes
    )


def answers_of(results):
    return [record["answer"] for record in results["answers"]]


def alone(folder, sample, max_length=90):
    """What `generate` answers to one cut prompt, with nothing of the loop."""
    checkpoint = causal_models.find_checkpoint(str(folder))
    tokenizer, _ = causal_models.load_tokenizer(checkpoint)
    model = causal_models.load_causal_model(checkpoint, "cpu", "float32")
    ids = tokenizer(sample.prompt)["input_ids"]
    if len(ids) > max_length:
        half = int(max_length / 2)
        ids = tokenizer(tokenizer.decode(ids[:half]) + tokenizer.decode(ids[-half:]))["input_ids"]
    suppressed = {}
    if sample.stop:
        last = [tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in sample.stop]
        suppressed = {"begin_suppress_tokens": [0, *last]}
    new = model.generate(
        torch.tensor([ids]), max_new_tokens=sample.max_new_tokens, do_sample=False, eos_token_id=0, **suppressed
    )
    answer = tokenizer.decode(new[0, len(ids) :], skip_special_tokens=True)
    for text in sample.stop:
        start = len(answer) - len(answer.lstrip())
        answer = answer[:start] + answer[start:].split(text)[0]
    return answer


def test_batches_answer_as_each_sample_alone(any_folder, tmp_path):
    task = MadeUp(stop=tuple("aeit"))
    one = evaluate(any_folder, tmp_path / "one.json", task)
    several = evaluate(any_folder, tmp_path / "several.json", task, batch_size=3)
    assert answers_of(one) == answers_of(several) == [alone(any_folder, sample) for sample in task.samples(None)]
    assert one["answers"] == several["answers"]
    assert one["summary"] == several["summary"]
    assert one["summary"]["order"] == [sample.identity for sample in task.samples(None)]
    assert len(set(answers_of(one))) > 3
    assert any(record["whole_tokens"] > record["prompt_tokens"] for record in one["answers"])
    for name in ("answers.jsonl", "md"):
        assert (tmp_path / f"one.{name}").read_bytes() == (tmp_path / f"several.{name}").read_bytes()


@pytest.mark.parametrize("max_length", [2, 31, 40, 1000])
def test_the_middle_is_cut_as_by_longbench(prepared, max_length):
    tokenizer, _ = prepared
    text = "".join(f"{number} people went by the old road. " for number in range(30))
    whole = tokenizer(text, truncation=False, return_tensors="pt").input_ids[0]
    prompt = text
    if len(whole) > max_length:  # LongBench's pred.py
        half = int(max_length / 2)
        prompt = tokenizer.decode(whole[:half], skip_special_tokens=True) + tokenizer.decode(
            whole[-half:], skip_special_tokens=True
        )
    ids, count = prompt_reader.truncate_middle(text, tokenizer, max_length)
    assert ids == tokenizer(prompt, truncation=False)["input_ids"]
    assert count == len(whole)
    assert (len(ids) < len(whole)) == (max_length < 1000)


def test_batches_have_one_kind_and_little_padding():
    samples = MadeUp(40).samples(None)
    prompts = [prompt_reader.Prompt(sample, [5] * len(sample.prompt), 0) for sample in samples]
    batches = prompt_reader.plan_batches(prompts, 4)
    assert sorted(prompt.sample.identity for batch in batches for prompt in batch) == sorted(s.identity for s in samples)
    for batch in batches:
        assert len(batch) <= 4
        assert len({(prompt.sample.max_new_tokens, prompt.sample.stop) for prompt in batch}) == 1
    lengths = [len(batch[0].ids) for batch in batches]
    assert lengths == sorted(lengths, reverse=True)
    for kind in {(prompt.sample.max_new_tokens, prompt.sample.stop) for prompt in prompts}:
        of_kind = [batch for batch in batches if (batch[0].sample.max_new_tokens, batch[0].sample.stop) == kind]
        for longer, shorter in itertools.pairwise(of_kind):
            assert min(len(prompt.ids) for prompt in longer) >= max(len(prompt.ids) for prompt in shorter)
            assert len(longer) == 4


def test_stop_texts_end_answers_behind_their_beginning():
    assert prompt_reader.stop_place("\n\nYes.\nNo", ("\n",)) == 6
    assert prompt_reader.stop_place("Yes, no", ("\n",)) is None
    assert prompt_reader.stop_place("Yes### and, no", (",", "###")) == 3
    assert prompt_reader.stop_place("", ("\n",)) is None


def test_generation_ends_at_a_stop_text(llama_folder):
    checkpoint = causal_models.find_checkpoint(str(llama_folder))
    tokenizer, _ = causal_models.load_tokenizer(checkpoint)
    reader = prompt_reader.Reader(causal_models.load_causal_model(checkpoint, "cpu", "float32"), tokenizer, {})
    sample = Sample("a", "They went by the old road.", 40)
    prompt = prompt_reader.Prompt(sample, tokenizer(sample.prompt)["input_ids"], 0)
    whole = reader.answer([prompt])[0]
    stop = whole["answer"][8:11]
    assert whole["answer"].index(stop) == 8
    ended = dataclasses.replace(prompt, sample=dataclasses.replace(sample, stop=(stop,)))
    record = reader.answer([ended])[0]
    assert record["answer"] == whole["answer"][:8]
    assert record["new_tokens"] < whole["new_tokens"]
    criterion = prompt_reader._StopTexts(tokenizer, ("road",), 2)
    rows = [tokenizer(text)["input_ids"] for text in ("xx by the old road", "road xx by the o")]
    width = max(map(len, rows))
    padded = torch.tensor([[1] * (width - len(row)) + row for row in rows])
    assert criterion(padded, None).tolist()[0] is True
    assert prompt_reader._StopTexts(tokenizer, ("xx by",), width - 3)(padded, None).tolist() == [False, False]


def stop_after(monkeypatch, count, error=KeyboardInterrupt):
    """Lets so many answers through, and then interrupts."""
    append = answers_file.AnswersFile.append
    seen = []

    def watched(self, record):
        if "answer" in record:
            if len(seen) == count:
                raise error
            seen.append(record["identity"])
        append(self, record)

    monkeypatch.setattr(answers_file.AnswersFile, "append", watched)
    return seen


@pytest.mark.parametrize("count", [0, 1, 4, 6])
def test_an_interrupted_run_ends_as_one_without_a_break(llama_folder, tmp_path, monkeypatch, capsys, count):
    evaluate(llama_folder, tmp_path / "whole.json", batch_size=2)
    output = tmp_path / "cut.json"
    with monkeypatch.context() as patch:
        stop_after(patch, count)
        with pytest.raises(KeyboardInterrupt):
            evaluate(llama_folder, output, batch_size=2)
    assert "goes on" in capsys.readouterr().err
    answers = tmp_path / "cut.answers.jsonl"
    assert len(answers.read_bytes().splitlines()) == 1 + count
    assert not output.exists()
    with answers.open("ab") as file:
        file.write(b'{"identity": "made/3", "answ')  # as a power cut leaves it
    seen = stop_after(monkeypatch, 100)
    results = evaluate(llama_folder, output, batch_size=2)
    assert len(seen) == results["run"]["answered"] == 7 - count
    for name in ("answers.jsonl", "md"):
        assert (tmp_path / f"cut.{name}").read_bytes() == (tmp_path / f"whole.{name}").read_bytes()
    whole, cut = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "cut"))
    assert whole.pop("run")["answered"] == 7
    assert cut.pop("run")["answered"] == 7 - count
    assert whole.pop("date") <= cut.pop("date")  # of its end
    assert whole == cut
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("cut")) == [
        "cut.answers.jsonl",
        "cut.json",
        "cut.md",
    ]


def test_a_finished_run_asks_nothing(llama_folder, tmp_path, monkeypatch):
    first = evaluate(llama_folder, tmp_path / "run.json")
    monkeypatch.setattr(generation_eval, "load_causal_model", None)
    again = evaluate(llama_folder, tmp_path / "run.json")
    assert again.pop("was_finished")
    assert again == first
    (tmp_path / "run.json").unlink()
    rescored = evaluate(llama_folder, tmp_path / "run.json")
    assert rescored["run"]["answered"] == 0
    assert rescored["summary"] == first["summary"]


@pytest.mark.parametrize("kept", ["run.json", "run.answers.jsonl"])
def test_other_settings_are_refused(llama_folder, tmp_path, kept):
    evaluate(llama_folder, tmp_path / "run.json")
    for path in tmp_path.iterdir():
        if path.name != kept:
            path.unlink()
    before = (tmp_path / kept).read_bytes()
    for settings, message in (
        (dict(max_length=80), "max_length: 90 there, 80 now"),
        (dict(dtype="bfloat16"), "dtype"),
        (dict(task=MadeUp(6)), "samples"),
    ):
        with pytest.raises(ValueError, match=f"{kept} holds results of other settings.*{message}.*another --output"):
            evaluate(llama_folder, tmp_path / "run.json", **settings)
    assert (tmp_path / kept).read_bytes() == before
    evaluate(llama_folder, tmp_path / "run.json", batch_size=5)


def test_another_model_is_refused(llama_folder, tmp_path, prepared):
    evaluate(llama_folder, tmp_path / "run.json")
    model = LlamaForCausalLM.from_pretrained(llama_folder)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "llama")
    prepared[0].save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"other settings \(model\.sha256: "):
        evaluate(tmp_path / "llama", tmp_path / "run.json")


def test_other_versions_are_written_down(llama_folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        patch.setattr(generation_eval, "environment", lambda device: {"torch": "1.0"})
        with pytest.raises(KeyboardInterrupt):
            evaluate(llama_folder, tmp_path / "run.json")
    results = evaluate(llama_folder, tmp_path / "run.json")
    assert results["environments"][0] == {"torch": "1.0"}
    assert results["environments"][1]["torch"] == torch.__version__
    assert len((tmp_path / "run.answers.jsonl").read_text().splitlines()) == 2 + 7


@pytest.mark.parametrize(
    ("number", "line", "message"),
    [(3, b"{nonsense", "line 4 is damaged.*asked again"), (0, b"[]", "line 1 is damaged"), (2, b'{"a": 1}', "line 3")],
)
def test_damaged_lines_are_named(llama_folder, tmp_path, number, line, message):
    evaluate(llama_folder, tmp_path / "run.json")
    (tmp_path / "run.json").unlink()
    path = tmp_path / "run.answers.jsonl"
    lines = path.read_bytes().splitlines()
    lines[number] = line
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(ValueError, match=f"run.answers.jsonl, {message}"):
        evaluate(llama_folder, tmp_path / "run.json")


def test_results_that_are_none_are_not_overwritten(llama_folder, tmp_path):
    (tmp_path / "run.json").write_text("my notes")
    with pytest.raises(ValueError, match="holds no results"):
        evaluate(llama_folder, tmp_path / "run.json")
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(ValueError, match="other settings"):
        evaluate(llama_folder, tmp_path / "run.json")


def test_a_model_without_a_mask_is_asked_one_by_one(llama_folder, tmp_path, monkeypatch):
    forward = LlamaForCausalLM.forward
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda self, input_ids=None, **more: forward(self, input_ids, **more))
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot tell padding from text: ask it with --batch-size 1"):
        evaluate(llama_folder, tmp_path / "run.json", batch_size=3)


def test_a_batch_too_large_for_the_gpu_is_halved(llama_folder, tmp_path, monkeypatch):
    wanted = evaluate(llama_folder, tmp_path / "wanted.json")
    answer = prompt_reader.Reader.answer
    asked = []

    def small(self, prompts):
        asked.append(len(prompts))
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answer(self, prompts)

    monkeypatch.setattr(prompt_reader.Reader, "answer", small)
    with pytest.warns(RuntimeWarning, match="out of GPU memory: going on with batches of"):
        results = evaluate(llama_folder, tmp_path / "run.json", batch_size=4)
    assert results["answers"] == wanted["answers"]
    assert asked.count(1) == 7
    assert len(asked) <= 9, "later batches are small from the beginning"

    def none(self, prompts):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(prompt_reader.Reader, "answer", none)
    with pytest.raises(ValueError, match=r"tokens does not fit into the GPU's memory: give a shorter --max-length"):
        evaluate(llama_folder, tmp_path / "none.json")


def test_prompts_beyond_the_positions_are_refused(llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(generation_eval, "load_causal_model", None)
    with pytest.raises(ValueError, match=r"256 positions .* need 309: give --max-length 247 or less"):
        evaluate(llama_folder, tmp_path / "run.json", max_length=300)
    with pytest.raises(ValueError, match="at least 2"):
        evaluate(llama_folder, tmp_path / "run.json", max_length=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", OURS)
def test_models_without_positions_have_no_limit(kind, prepared, tmp_path_factory, tmp_path):
    results = evaluate(make_folder(kind, prepared, tmp_path_factory), tmp_path / "run.json", MadeUp(2), max_length=10**6)
    assert results["truncated"] == 0


def test_compression_reaches_the_model(prepared, tmp_path_factory, tmp_path):
    folder = make_folder("remamba", prepared, tmp_path_factory)
    runs = {
        "own": {},
        "off": {"compress_prompt": False},
        "other": {"compression_span": 0.9, "compression_ratio": 0.1},
    }
    results = {name: evaluate(folder, tmp_path / f"{name}.json", compression=options) for name, options in runs.items()}
    assert len({tuple(answers_of(result)) for result in results.values()}) == 3
    settings = {name: result["settings"]["compression"] for name, result in results.items()}
    assert settings["off"] is None
    assert (settings["own"]["compression_span"], settings["other"]["compression_span"]) == (0.5, 0.9)
    assert settings["other"]["compression_max_kept"] is None
    assert "span 0.9" in (tmp_path / "other.md").read_text()
    assert "compressed" not in (tmp_path / "off.md").read_text()
    with pytest.raises(ValueError, match="other settings"):
        evaluate(folder, tmp_path / "own.json", compression=runs["other"])


def test_mixed_up_samples_are_named(llama_folder, tmp_path):
    class Twice(MadeUp):
        def samples(self, data):
            return super().samples(data) * 2

    class Empty(MadeUp):
        def samples(self, data):
            return [Sample("nothing", "", 3)]

    with pytest.raises(ValueError, match="two samples are called made/0"):
        evaluate(llama_folder, tmp_path / "run.json", Twice())
    with pytest.raises(ValueError, match="sample nothing has an empty prompt"):
        evaluate(llama_folder, tmp_path / "run.json", Empty())


def test_a_checkpoint_s_own_penalties_and_sampling_do_not_count(llama_folder, tmp_path, prepared):
    wanted = evaluate(llama_folder, tmp_path / "wanted.json")
    model = LlamaForCausalLM.from_pretrained(llama_folder)
    model.generation_config.update(do_sample=True, temperature=3.0, repetition_penalty=5.0, eos_token_id=[0])
    model.save_pretrained(tmp_path / "llama")
    prepared[0].save_pretrained(tmp_path / "llama")
    assert answers_of(evaluate(tmp_path / "llama", tmp_path / "run.json")) == answers_of(wanted)


def test_padding_without_a_usable_token(llama_folder, tmp_path):
    checkpoint = causal_models.find_checkpoint(str(llama_folder))
    model = causal_models.load_causal_model(checkpoint, "cpu", "float32")
    prompts = [prompt_reader.Prompt(Sample(str(size), "", 6), list(range(40, 40 + size)), size) for size in (9, 4)]
    wanted = None
    for token in (None, "<a new one>"):
        tokenizer, _ = causal_models.load_tokenizer(checkpoint)
        tokenizer.pad_token = token
        if token:
            tokenizer.add_special_tokens({"pad_token": token})
            assert tokenizer.pad_token_id == VOCABULARY
        reader = prompt_reader.Reader(model, tokenizer, {})
        wanted = wanted or [reader.answer([prompt])[0] for prompt in prompts]
        assert reader.answer(prompts) == wanted


def test_checkpoints_that_cannot_be_asked(llama_folder, tmp_path):
    with pytest.raises(CheckpointError, match="There is no folder"):
        causal_models.find_checkpoint(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        causal_models.find_checkpoint(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(CheckpointError, match="--trust-remote-code"):
        causal_models.find_checkpoint(str(tmp_path))
    model = LlamaForCausalLM.from_pretrained(llama_folder)
    model.save_pretrained(tmp_path)
    checkpoint = causal_models.find_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"has no tokenizer.*--tokenizer"):
        causal_models.load_tokenizer(checkpoint)
    tokenizer, digest = causal_models.load_tokenizer(checkpoint, str(llama_folder))
    assert (tokenizer.eos_token_id, digest) == (
        0,
        causal_models.load_tokenizer(causal_models.find_checkpoint(str(llama_folder)))[1],
    )
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        causal_models.load_tokenizer(checkpoint)
    os.truncate(tmp_path / "model.safetensors", 500)
    with pytest.raises(CheckpointError, match="damaged"):
        causal_models.find_checkpoint(str(tmp_path))


def test_reasons_of_others_end_in_one_full_stop(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(CheckpointError, match=r"\w\. If it brings code of its own") as raised:
        causal_models.find_checkpoint(str(tmp_path))
    assert ".." not in str(raised.value)


def test_tensors_of_other_sizes_are_named(llama_folder, tmp_path):
    folder = shutil.copytree(llama_folder, tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 50}))
    checkpoint = causal_models.find_checkpoint(str(folder))
    with pytest.raises(
        CheckpointError, match=r"llama has 6 tensors of other sizes .* e\.g\. \S*down_proj\.weight: \["
    ) as raised:
        causal_models.load_causal_model(checkpoint, "cpu", "float32")
    assert "[32, 48] instead of [32, 50]" in str(raised.value)


def test_tokens_beyond_the_vocabulary_are_refused(llama_folder, tmp_path):
    tokenizer, _ = causal_models.load_tokenizer(causal_models.find_checkpoint(str(llama_folder)))
    folder = shutil.copytree(llama_folder, tmp_path / "llama")
    tokenizer.add_special_tokens({"pad_token": "<pad of its own>"})
    tokenizer.save_pretrained(folder)
    checkpoint = causal_models.find_checkpoint(str(folder))
    causal_models.load_tokenizer(checkpoint)  # what pads is not read
    tokenizer.add_tokens(["river", "house"])
    tokenizer.save_pretrained(folder)
    message = "llama has a vocabulary of 300, and the tokenizer of llama 2 tokens beyond it, e.g. 'river'"
    with pytest.raises(CheckpointError, match=message):
        causal_models.load_tokenizer(checkpoint)
    with pytest.raises(CheckpointError, match=f"{message.replace('of llama 2', f'of {folder} 2')}.*--tokenizer"):
        causal_models.load_tokenizer(causal_models.find_checkpoint(str(llama_folder)), str(folder))


def test_processes_share_out_the_samples(llama_folder, tmp_path):
    """One after the other, so that what each does can be told apart."""
    whole = evaluate(llama_folder, tmp_path / "whole.json", batch_size=2)
    output = tmp_path / "shared.json"

    def second():  # reaches each of its two waits while the first stands in its own
        evaluate(llama_folder, output, batch_size=2, processes=Processes(1, 2))
        parts.append((tmp_path / "shared.answers-1.jsonl").read_text().splitlines())

    parts = []
    waits = iter([second, lambda: None])
    results = evaluate(llama_folder, output, batch_size=2, processes=Processes(0, 2, wait=lambda: next(waits)()))
    assert 1 < len(parts[0]) < 7
    assert results["answers"] == whole["answers"]
    assert results["run"]["processes"] == 2
    assert (tmp_path / "shared.answers.jsonl").read_bytes() == (tmp_path / "whole.answers.jsonl").read_bytes()
    assert not list(tmp_path.glob("shared.answers-*"))


SCRIPT = """
import sys
from pathlib import Path
from modeling_tests.evaluation import test_generation_eval as tests
from remamba_hf.evaluation.generation_eval import launched_processes

processes = launched_processes("cpu")
tests.evaluate(Path(sys.argv[1]), Path(sys.argv[2]), batch_size=2, processes=processes)
processes.end()
"""


def test_two_launched_processes_give_the_results_of_one(llama_folder, tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    evaluate(llama_folder, tmp_path / "one.json", batch_size=2)
    with monkeypatch.context() as patch:  # one process begins, two go on
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            evaluate(llama_folder, tmp_path / "two.json", batch_size=2)
    (tmp_path / "script.py").write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(tmp_path / "script.py"), str(llama_folder), str(tmp_path / "two.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "two.json").read_text())
    assert results["run"]["processes"] == 2
    for name in ("answers.jsonl", "md"):
        assert (tmp_path / f"two.{name}").read_bytes() == (tmp_path / f"one.{name}").read_bytes()
