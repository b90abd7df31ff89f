# SPDX-License-Identifier: Apache-2.0
"""`remamba eval`: what it writes and prints, and what it refuses before any work."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_tests.modeling.tiny_models import tiny_model
from remamba_hf.cli import main
from remamba_hf.evaluation import causal_models, eval_cli, generation_eval

VOCABULARY = 300
CODE_FILES = [
    {"input": f"def f{number}(): return {number}\n" * 8, "instructions": ["What is f(1)?"] * 2, "outputs": ["1", "2"]}
    for number in range(3)
]


@pytest.fixture(scope="module")
def llama_folder(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama") / "tiny-llama"
    torch.manual_seed(4)
    sizes = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    config = LlamaConfig(**sizes, max_position_embeddings=1024, initializer_range=0.4, bos_token_id=0, eos_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder)
    prepared[0].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def remamba_folder(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("remamba") / "tiny-remamba"
    tiny_model(torch.float32, vocab_size=VOCABULARY).save_pretrained(folder)
    prepared[0].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two of L-Eval's tasks, made up."""
    folder = tmp_path_factory.mktemp("leval")
    for task in ("codeU", "quality"):
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in CODE_FILES))
    return folder


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr("remamba_hf.evaluation.leval.MAX_NEW_TOKENS", 4)


def leval(model, data, *more, tasks=("codeU", "quality")):
    given = ["--data", str(data)] if data else []
    return main(["eval", "leval", "--model", str(model), *given, "--device", "cpu", "--tasks", *tasks, *more])


def test_results_answers_and_table(llama_folder, data, tmp_path, capsys):
    output = tmp_path / "new" / "results"
    assert leval(llama_folder, data, "--output", str(output), "--max-length", "100", "--batch-size", "4") == 0
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    out, err = capsys.readouterr()
    assert out == (tmp_path / "new" / "results.md").read_text()
    assert "| tiny-llama |" in out
    assert "12 samples; prompts of at most 100 tokens, the middle left out of 12" in out
    assert "results.json" in err
    assert results["model"] == "tiny-llama"
    assert results["tasks"] == ["quality", "codeU"]
    assert list(results["data"]) == ["codeU.jsonl", "quality.jsonl"]
    assert results["data"]["codeU.jsonl"] == causal_models.digest_of_file(data / "codeU.jsonl")
    assert results["settings"]["samples"]["count"] == len(results["answers"]) == 12
    assert results["settings"]["dtype"] == "float32"
    assert {"torch", "transformers", "remamba_hf", "device"} <= set(results["environments"][0])
    assert results["run"]["answered"] == 12
    assert leval(llama_folder, data, "--output", str(output), "--max-length", "100") == 0
    again, err = capsys.readouterr()
    assert again == out
    assert "is finished: nothing was asked again" in err
    assert leval(llama_folder, data, "--output", str(output), "--max-length", "50") == 1
    assert "max_length: 100 there, 50 now" in capsys.readouterr().err


def test_interrupted_and_continued(llama_folder, data, tmp_path, capsys, monkeypatch):
    answer = generation_eval.Reader.answer
    asked = []

    def interrupted(self, prompts):
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.append(prompts)
        return answer(self, prompts)

    output = ("--output", str(tmp_path / "run.json"), "--max-length", "100")
    monkeypatch.setattr(generation_eval.Reader, "answer", interrupted)
    assert leval(llama_folder, data, *output) == 130
    err = capsys.readouterr().err
    assert "the same command goes on" in err
    assert "remamba: interrupted" in err
    monkeypatch.setattr(generation_eval.Reader, "answer", answer)
    assert leval(llama_folder, data, *output) == 0
    assert json.loads((tmp_path / "run.json").read_text())["run"]["answered"] == 7


def test_limit_and_default_output(llama_folder, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert leval(llama_folder, data, "--limit", "4", "--max-length", "100") == 0
    results = json.loads((tmp_path / "leval-tiny-llama.json").read_text())
    assert [record["identity"] for record in results["answers"]] == ["quality/1/1", "quality/2/2", "codeU/1/1", "codeU/2/2"]
    assert results["limit"] == 4
    assert leval(llama_folder, data, "--limit", "12", "--max-length", "100", "--output", "all") == 0
    assert json.loads((tmp_path / "all.json").read_text())["limit"] is None
    assert eval_cli._limited([1, 2, 3], 5) == [1, 2, 3]


def test_compression_is_set(remamba_folder, data, tmp_path, capsys):
    found = {}
    for name, options in {
        "own": [],
        "off": ["--no-compress"],
        "off_as_in_generate": ["--no-compression"],
        "other": ["--compress", "--compression-span", "0.8"],
    }.items():
        assert leval(remamba_folder, data, "--output", str(tmp_path / name), "--limit", "2", *options) == 0
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())["settings"]["compression"]
    assert found["own"]["compression_span"] == 0.5
    assert found["off"] is found["off_as_in_generate"] is None
    assert (found["other"]["compression_span"], found["other"]["compress_prompt"]) == (0.8, True)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("llama", ["--compress"], "compresses no prompts: leave out --compress"),
        ("llama", ["--compression-span", "0.5"], "leave out --compression-span"),
        ("remamba", ["--no-compress", "--compression-ratio", "0.5"], "leave out --compression-ratio"),
        ("llama", ["--max-length", "1021"], "give --max-length 1020 or less"),
        ("llama", [], "1024 positions"),
        ("llama", ["--device", "abacus"], "no device 'abacus'"),
        ("llama", ["--revision", "main"], "has no revision"),
        ("llama", ["--tokenizer", "nowhere"], "There is no folder nowhere"),
    ],
)
def test_what_cannot_work_is_refused(
    llama_folder, remamba_folder, data, tmp_path, capsys, monkeypatch, kind, options, message
):
    monkeypatch.setattr(generation_eval, "load_causal_model", lambda *_: pytest.fail("loaded the weights first"))
    folder = {"llama": llama_folder, "remamba": remamba_folder}[kind]
    assert leval(folder, data, "--output", str(tmp_path / "run"), *options) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_missing_and_wrong_data(llama_folder, data, tmp_path, capsys):
    assert leval(llama_folder, tmp_path / "nowhere") == 1
    assert "there is no" in capsys.readouterr().err
    assert leval(llama_folder, tmp_path) == 1
    assert "quality.jsonl" in capsys.readouterr().err
    (tmp_path / "codeU.jsonl").write_text((data / "codeU.jsonl").read_text() + '{"input": 3}\n')
    assert leval(llama_folder, tmp_path, tasks=["codeU"]) == 1
    assert "codeU.jsonl, line 4" in capsys.readouterr().err
    (tmp_path / "codeU.jsonl").write_text("\n")
    assert leval(llama_folder, tmp_path, tasks=["codeU"]) == 1
    assert "has no sample of leval" in capsys.readouterr().err
    assert leval(llama_folder, data, tasks=["chess"]) == 1
    assert "chess" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["leval", "passkey"])
def test_tokens_that_the_model_does_not_have(llama_folder, data, books, prepared, tmp_path, capsys, task):
    tokenizer = causal_models.load_tokenizer(causal_models.find_checkpoint(str(llama_folder)))[0]
    tokenizer.add_tokens(["river"])
    tokenizer.save_pretrained(tmp_path / "other")
    more = ["--tasks", "codeU", "--max-length", "100"] if task == "leval" else ["--lengths", "128", "--samples", "1"]
    where = ["--model", str(llama_folder), "--data", str(data if task == "leval" else books), "--device", "cpu"]
    given = ["--tokenizer", str(tmp_path / "other"), "--output", str(tmp_path / "run.json")]
    assert main(["eval", task, *where, *more, *given]) == 1
    assert "tiny-llama has a vocabulary of 300, and the tokenizer of" in capsys.readouterr().err


def test_texts_that_no_tokenizer_takes(llama_folder, data, tmp_path, capsys):
    """They are told by file and line, and not by the error of whoever meets them."""
    (tmp_path / "codeU.jsonl").write_text((data / "codeU.jsonl").read_text() + json.dumps({"input": "\ud800 x"}) + "\n")
    assert leval(llama_folder, tmp_path, tasks=["codeU"]) == 1
    assert r"codeU.jsonl, line 4 has '\ud800', half of a surrogate pair" in capsys.readouterr().err
    (tmp_path / "codeU.jsonl").write_text('{"input": ' + "[" * 200_000 + "]" * 200_000 + "}\n")
    assert leval(llama_folder, tmp_path, tasks=["codeU"]) == 1
    assert "codeU.jsonl, line 1 is nested too deeply" in capsys.readouterr().err


def test_output_that_cannot_be_written(llama_folder, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generation_eval, "load_causal_model", lambda *_: pytest.fail("loaded the weights first"))
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.json").mkdir()
    reasons = {"file/run": "file is no folder", "folder.json": "(Is a directory", "file/a/b/run": "b is no folder"}
    for name, reason in reasons.items():
        assert leval(llama_folder, data, "--output", str(tmp_path / name), "--max-length", "100") == 1
        err = capsys.readouterr().err
        assert "cannot be written (" in err
        assert f"{reason}): name another file" in err
        assert "Errno" not in err


def predictions_in(folder, suffix="_e", **changed):
    """Two of LongBench-E's tasks, answered by nobody."""
    folder.mkdir()
    lines = {
        "hotpotqa": [
            {"pred": " The North.", "answers": ["north"], "all_classes": None, "length": 100},
            {"pred": "south", "answers": ["north"], "all_classes": None, "length": 8000},
        ],
        "trec": [
            {"pred": "Food\nType: City", "answers": ["Food"], "all_classes": ["Food", "City"], "length": 4000},
        ],
    }
    lines["trec"][0].update(changed)
    for task, several in lines.items():
        (folder / f"{task}{suffix}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in several))
    return folder


def score(folder, *more, tasks=("trec", "hotpotqa")):
    return main(["eval", "longbench_e", "--predictions", str(folder), "--tasks", *tasks, *more])


@pytest.mark.parametrize("suffix", ["_e", ""])
def test_predictions_are_scored_without_a_model(tmp_path, capsys, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    folder = predictions_in(tmp_path / "pred", suffix)
    assert score(folder) == 0
    results = json.loads((tmp_path / "longbench_e-pred.json").read_text())
    out, err = capsys.readouterr()
    assert out == (tmp_path / "longbench_e-pred.md").read_text()
    assert "| pred | 50.00 | 100.00 | 75.00 |" in out
    assert "3 predictions, scored as they are." in out
    assert "longbench_e-pred.json" in err
    assert results["summary"]["tasks"]["hotpotqa"]["buckets"] == {"0-4k": 100, "4-8k": None, "8k+": 0}
    assert [one["scores"]["score"] for one in results["answers"]] == [100, 0, 100]
    assert score(folder) == 0  # scored again, into the same file
    predictions_in(tmp_path / "others", pred="City")
    assert score(tmp_path / "others", "--output", "longbench_e-pred.json") == 1
    assert "other settings (predictions.sha256" in capsys.readouterr().err
    assert json.loads((tmp_path / "longbench_e-pred.json").read_text())["summary"] == results["summary"]
    card = Path(__file__).parents[2] / "model_cards" / "remamba-tiny"
    assert main(["card", str(card), "--results", "longbench_e-pred.json", "--dry-run"]) == 1
    assert "scores of --predictions, which do not tell whose they are" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pred": None}, 'trec_e.jsonl, line 1 has no text "pred"'),
        ({"answers": "Food"}, 'no list "answers"'),
        ({"length": None}, 'no number of words "length"'),
        ({"all_classes": None}, 'no list "all_classes"'),
        ({"answers": ["River"]}, '"River" is not one of "all_classes"'),
    ],
)
def test_malformed_predictions_are_refused(tmp_path, capsys, changed, message):
    assert score(predictions_in(tmp_path / "pred", **changed), "--output", str(tmp_path / "run.json")) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run.json").exists()


def test_predictions_that_are_not_there_and_options_of_models(tmp_path, capsys):
    folder = predictions_in(tmp_path / "pred")
    output = ("--output", str(tmp_path / "run.json"))
    assert score(tmp_path / "nowhere", *output) == 1
    assert "no folder" in capsys.readouterr().err
    assert score(folder, *output, tasks=["trec", "lcc"]) == 1
    assert "lcc_e.jsonl, nor one without _e: give a folder with a file of predictions" in capsys.readouterr().err
    assert score(folder, *output, "--data", "d", "--max-length", "9", "--no-compress") == 1
    assert "leave out --data, --max-length, --compress" in capsys.readouterr().err
    for task, more in (("longbench_e", ["--model", "m"]), ("longbench_e", []), ("leval", [])):
        given = [] if not more and task == "longbench_e" else ["--predictions", str(folder)]
        with pytest.raises(SystemExit):
            main(["eval", task, *given, *more])
    (folder / "trec_e.jsonl").write_text("")
    assert score(folder, *output, tasks=["trec"]) == 1
    assert "has no prediction of longbench_e" in capsys.readouterr().err


def test_predictions_are_scored_by_one_of_several_processes(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert score(predictions_in(tmp_path / "pred"), "--output", str(tmp_path / "run.json")) == 0
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run.json").exists()


def test_model_without_tokenizer_or_without_anything(llama_folder, data, tmp_path, capsys):
    bare = shutil.copytree(llama_folder, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    assert leval(bare, data) == 1
    assert "bare has no tokenizer. Give the one" in capsys.readouterr().err
    given = ("--tokenizer", str(llama_folder), "--output", str(tmp_path / "run"), "--limit", "1", "--max-length", "90")
    assert leval(bare, data, *given) == 0
    capsys.readouterr()
    assert leval(tmp_path / "nothing", data) == 1
    assert "There is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["chess"], ["leval"], ["leval", "--model", "m", "--max-length", "0"]])
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["eval", *arguments])
    assert stop.value.code == 2
    if arguments == ["chess"]:
        assert "longbench_e" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(eval_cli.COMMANDS))
def test_every_task_has_its_help(name, capsys):
    if name == "lm_eval":  # the harness has a parser of its own, and is optional
        pytest.importorskip("lm_eval")
    with pytest.raises(SystemExit) as stop:
        main(["eval", name, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert ("usage: lm-eval" if name == "lm_eval" else f"usage: remamba eval {name}") in out
    needed = {
        "speed": ("--model", "--output", "--device"),
        "compare": ("RESULTS", "--output", "--task"),
        "lm_eval": ("run",),
    }
    for words in needed.get(name, ("--model", "--data", "--output", "--device")):
        assert words in out
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    out = capsys.readouterr().out
    assert f"  {name}" in out
    assert eval_cli.COMMANDS[name].help in out


SMALL = {
    "passkey": ["--lengths", "192", "--samples", "2", "--digits", "3"],
    "documents": ["--document-counts", "2", "--document-length", "60", "--samples", "2", "--digits", "3"],
    "perplexity": ["--lengths", "64", "128", "--reference-length", "64", "--windows", "2", "--counted", "10"],
    "recall": ["--lengths", "128", "--samples", "2", "--digits", "3", "--perplexity-tokens", "0"],
    "fidelity": ["--length", "64", "--passages", "2", "--gaps", "1"],
}


@pytest.mark.parametrize("name", list(SMALL))
def test_evaluations_that_were_there_before(name, books, memmamba_folder, remamba_folder, tmp_path, capsys):
    model = remamba_folder if name == "recall" else memmamba_folder
    where = ["--model", str(model), "--data", str(books), "--output", str(tmp_path / "run.json"), "--device", "cpu"]
    assert main(["eval", name, *where, *SMALL[name]]) == 0
    results = json.loads((tmp_path / "run.json").read_text())
    if name in ("passkey", "documents", "perplexity"):
        filled = [part for part in ("passkey", "documents", "perplexity", "decode") if results[part]]
        assert filled == [name]
        setting, values = {
            "passkey": ("lengths", [192]),
            "documents": ("document_counts", [2]),
            "perplexity": ("perplexity_lengths", [64, 128]),
        }[name]
        assert results["settings"][setting] == values
    assert "|---|" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["eval", name, *where, "--parts", "decode"])


def test_command_in_several_processes(llama_folder, data, tmp_path):
    pytest.importorskip("accelerate")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = ["--model", str(llama_folder), "--data", str(data), "--tasks", "codeU", "--max-length", "100"]
    where = ["--output", str(tmp_path / "run"), "--device", "cpu", "--limit", "4"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", "remamba_hf.cli", "eval", "leval", *arguments, *where]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run.json").read_text())["run"]["processes"] == 2
    assert done.stdout == (tmp_path / "run.md").read_text(), "one process prints"
