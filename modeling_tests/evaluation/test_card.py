# SPDX-License-Identifier: Apache-2.0
"""`remamba card`: what results make of a card, what they leave alone, and which are refused.

The results are those of real evaluations of tiny models; where numbers matter they are set by hand.
"""

import copy
import json
import re
import shutil

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results
from transformers import AutoModelForCausalLM

from remamba_hf.checkpoint_files import CheckpointError
from remamba_hf.cli import main
from remamba_hf.evaluation import fidelity, memory, recall
from remamba_hf.evaluation.card import BEGIN, END, plan_update
from remamba_hf.evaluation.leval import TASKS
from remamba_hf.evaluation.longbench import BUCKETS

CARD = """---
license: apache-2.0   # a comment
tags:
  - mamba
model-index:
- name: named-by-hand
  results:
  - task: {type: text-generation}
    dataset: {type: wikitext, name: WikiText, args: {stride: 512}}
    metrics: [{type: perplexity, value: 12.5, verified: true}]
    source: {url: "https://example.org", name: Theirs}
  - task: {type: text-generation}
    dataset: {type: wikitext, name: WikiText, args: {stride: 1024}}
    metrics: [{type: perplexity, value: 13.25}]

# about what follows
language: en
---

# A model

Text  with two  spaces, ä, and no line end: <b>1</b>"""


@pytest.fixture(scope="module")
def files(books, memmamba_folder, plain_folder, remamba_folder, tmp_path_factory):
    """Results of every kind: of the ReMamba recall and leval, of the MemMamba the others. Those that are called older lack
    the digests of weights."""
    folder = tmp_path_factory.mktemp("results")
    common = ["--books", str(books), "--device", "cpu"]
    both = ["--model", str(memmamba_folder), "--plain-model", str(plain_folder), *common]
    parts = [
        "--parts",
        "passkey",
        "documents",
        "perplexity",
        "--perplexity-lengths",
        "128",
        "256",
        "--reference-length",
        "128",
    ]
    counts = ["--lengths", "512", "1024", "--samples", "4", "--document-counts", "3", "--windows", "2", "--counted", "8"]
    memory.main([*both, *parts, *counts, "--output", str(folder / "memory.json")])
    fidelity.main(
        [*both, "--length", "64", "--passages", "2", "--gaps", "1", "3", "--output", str(folder / "fidelity.json")]
    )
    strided = ["--parts", "perplexity", "--perplexity-lengths", "128", "256", "--reference-length", "128", "--stride", "64"]
    memory.main([*both, *strided, "--output", str(folder / "strided.json")])
    own = ["--model", str(remamba_folder), "--lengths", "256", "384", "--samples", "3"]
    planted = [*own, *common, "--perplexity-tokens", "16", "--plain-model", str(plain_folder)]
    recall.main([*planted, "--output", str(folder / "recall.json")])
    memory.main([*own, *common, "--parts", "passkey", "--output", str(folder / "uncompressed.json")])
    changed(folder / "recall.json", folder, lambda results: results["description"].pop("models"), "older_recall.json")
    changed(folder / "fidelity.json", folder, forget_weights, "older_fidelity.json")
    data = folder / "data"
    data.mkdir()
    line = {"input": "def f(): return 1\n" * 8, "instructions": ["What is f()?"] * 2, "outputs": ["1", "2"]}
    (data / "codeU.jsonl").write_text(json.dumps(line))
    leval = ["eval", "leval", "--model", str(remamba_folder), "--data", str(data), "--tasks", "codeU", "--device", "cpu"]
    assert main([*leval, "--max-length", "60", "--output", str(folder / "leval.json")]) == 0
    assert main([*leval, "--max-length", "60", "--no-compress", "--output", str(folder / "plain.json")]) == 0
    return {path.stem: path for path in folder.glob("*.json")}


@pytest.fixture
def memmamba(memmamba_folder, tmp_path):
    return shutil.copytree(memmamba_folder, tmp_path / "memmamba")


@pytest.fixture
def remamba(remamba_folder, tmp_path):
    return shutil.copytree(remamba_folder, tmp_path / "tiny-remamba")


@pytest.fixture
def plain(plain_folder, tmp_path):
    return shutil.copytree(plain_folder, tmp_path / "plain")


def changed(file, folder, change, name=None):
    """A copy of results, changed."""
    results = json.loads(file.read_text())
    change(results)
    copy = folder / (name or f"changed-{file.name}")
    copy.write_text(json.dumps(results))
    return copy


def forget_weights(results):
    for model in results["models"].values():
        del model["weights"], model["dtype"]


def card(folder, *results, more=()):
    return main(["card", str(folder), "--results", *map(str, results), *more])


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def metrics(folder):
    """Values of a card as huggingface_hub reads it, by dataset's and metric's names."""
    results = ModelCard.load(folder / "README.md").data.eval_results
    return {(one.dataset_name, one.metric_name): one for one in results}


def test_every_number_of_a_model_is_in_its_card(memmamba, files, tmp_path):
    def answer_three(results):
        for cell in results["passkey"]:
            for number, record in enumerate(cell["records"]):
                record["right"] = cell["model"] == "model" and number < 3
            right = 3 if cell["model"] == "model" else 0
            cell.update(right=right, accuracy=right / 4)
        for cell in results["perplexity"]:
            cell["perplexity"] = 58.923269 + cell["length"] if cell["length"] < 200 else None

    memory_file = changed(files["memory"], tmp_path, answer_three)
    assert card(memmamba, memory_file, files["fidelity"]) == 0
    found = metrics(memmamba)
    one = "numbers planted in books, one person's number"
    key = one, "exact match, %, 512 tokens"
    assert found[key].metric_value == found[one, "exact match, %, 1024 tokens"].metric_value == 75.0
    assert (found[key].dataset_type, found[key].metric_type) == ("passkey", "exact_match")
    assert {"samples": 4, "length": 512, "remamba_hf": "0.1.0"}.items() <= found[key].metric_args.items()
    assert {"keys": 1, "seed": 1000000, "dtype": "float32", "books": 2, "device": "cpu"}.items() <= found[
        key
    ].dataset_args.items()
    assert found[key].dataset_args["date"] == json.loads(memory_file.read_text())["date"]
    perplexities = {name: each.metric_value for (_, name), each in found.items() if name.startswith("perplexity")}
    assert perplexities == {"perplexity, 128 tokens": 186.9233}
    results = json.loads(files["fidelity"].read_text())["models"]["model"]
    assert found["ETMF on books", "ETMF, paper, distance 8"].dataset_args["dtype"] == "float32"
    value = found["ECLMF on books", "ECLMF, held-out R^2, gap 1"].metric_value
    assert value == round(results["eclmf"]["1"]["held_out_r2"]["mean"], 4)
    assert ("ECLMF on books", "ECLMF, paper, gap 3") not in found
    text = ModelCard.load(memmamba / "README.md").text
    assert (
        "| passkey, exact match, %, by tokens | 512 | 1k |\n|---|---|---|\n| one person's number | 75 (30-95) | 75 (30-95) |"
        in text
    )
    assert "tokens of windows of books | 186.92 | INF |" in text
    assert not (memmamba / ".eval_results").exists()


def test_fidelity_of_several_lengths(memmamba, files, tmp_path):
    def add_a_shorter_one(results):
        results["settings"]["lengths"] = [32, 64]
        for one in results["models"].values():
            shorter = {key: copy.deepcopy(one[key]) for key in ("etmf", "eclmf")}
            shorter["etmf"]["8"]["paper"]["mean"] = 0.125
            one["shorter"] = {"32": shorter}

    assert card(memmamba, changed(files["fidelity"], tmp_path, add_a_shorter_one)) == 0
    found = metrics(memmamba)
    short, long = (found[f"ETMF on books of {length} tokens", "ETMF, paper, distance 8"] for length in (32, 64))
    assert short.metric_value == 0.125
    whole = json.loads(files["fidelity"].read_text())["models"]["model"]["etmf"]["8"]["paper"]["mean"]
    assert long.metric_value == round(whole, 4) != 0.125
    assert (short.dataset_args["length"], long.dataset_args["length"]) == (32, 64)
    assert "| ETMF of 32 tokens, by distance |" in (memmamba / "README.md").read_text()


def test_a_card_is_made_of_the_configuration_alone(remamba, files):
    assert card(remamba, files["recall"], files["leval"]) == 0
    made = ModelCard.load(remamba / "README.md")
    data = made.data.to_dict()
    names, found = model_index_to_eval_results(data.pop("model-index"))
    assert data == {"library_name": "transformers", "tags": ["remamba", "custom_code"]}
    assert names == "tiny-remamba"
    assert {one.dataset_name for one in found} >= {"L-Eval, codeU", "a number planted in books, compression on"}
    assert re.fullmatch(rf"\n{BEGIN}\n.*{END}\n", made.text, re.DOTALL)
    config = json.loads((remamba / "config.json").read_text())
    (remamba / "config.json").write_text(json.dumps({**config, "license": "mit"}))
    (remamba / "README.md").unlink()
    assert card(remamba, files["recall"]) == 0
    assert ModelCard.load(remamba / "README.md").data.license == "mit"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_all_else_stays_and_a_second_run_changes_nothing(memmamba, files, capsys, newline, mark):
    old = (mark + CARD.replace("\n", newline)).encode()
    readme = memmamba / "README.md"
    readme.write_bytes(old)
    assert card(memmamba, files["memory"]) == 0
    new = readme.read_bytes()
    start, end = (old.index(word) for word in (b"model-index", b"# about"))
    assert new.startswith(old[:start])
    after = old[end:]
    assert new[new.index(b"# about") :].startswith(after)
    tail = new[new.index(b"# about") + len(after) :].decode()
    assert re.fullmatch(rf"({newline}){{2}}{BEGIN}.*{END}{newline}", tail, re.DOTALL)
    assert newline == "\n" or b"\n" not in new.replace(b"\r\n", b"")

    before = yaml.safe_load(CARD.split("---")[1])["model-index"][0]
    index = yaml.safe_load(new.decode().removeprefix(mark).split("---")[1])["model-index"]
    assert index[0]["name"] == "named-by-hand"
    assert index[0]["results"][:2] == before["results"]
    assert len(index[0]["results"]) == 5

    there = contents(memmamba)
    capsys.readouterr()
    assert card(memmamba, files["memory"]) == 0
    assert contents(memmamba) == there
    assert "all there already" in capsys.readouterr().err


def test_a_run_replaces_what_an_earlier_one_wrote(memmamba, files):
    readme = memmamba / "README.md"
    readme.write_text(CARD)
    assert card(memmamba, files["fidelity"]) == 0
    alone = readme.read_bytes()
    assert card(memmamba, files["memory"], files["fidelity"]) == 0
    assert len(metrics(memmamba)) > len(
        model_index_to_eval_results(yaml.safe_load(alone.split(b"---")[1])["model-index"])[1]
    )
    readme.write_bytes(readme.read_bytes() + b"Written later.")
    assert card(memmamba, files["fidelity"]) == 0
    assert readme.read_bytes() == alone + b"Written later."


def test_numbers_survive_a_round_trip_through_the_hub_s_library(remamba, files, tmp_path):
    """Entries of the same dataset are put together there, and get the settings of the first."""
    assert card(remamba, files["recall"], files["leval"], files["plain"]) == 0
    first = ModelCard.load(remamba / "README.md")
    first.save(tmp_path / "saved.md")
    assert ModelCard.load(tmp_path / "saved.md").data.eval_results == first.data.eval_results
    read = {one.metric_name: one for one in first.data.eval_results if one.dataset_config == "codeU"}
    assert list(read) == ["exact match, %, compression on", "exact match, %, compression off"]
    settings = [one.metric_args["compression"] for one in read.values()]
    assert settings == ["on", "off"]


def read_from_the_hub(results):
    """All of L-Eval, in which every task has what codeU has here."""
    results.update(date="2026-01-31", data=None)
    tasks = results["summary"]["tasks"]
    results["summary"]["tasks"] = {task: tasks["codeU"] for task in TASKS}


def test_results_of_the_hub_s_datasets_go_into_its_folder(remamba, files, tmp_path):
    dated = changed(files["leval"], tmp_path, read_from_the_hub)
    place = remamba / ".eval_results"
    place.mkdir()
    (place / "theirs.yaml").write_text("- dataset: {id: a/b, task_id: c}\n  value: 1\n")
    assert card(remamba, dated, files["recall"]) == 0
    assert {path.name for path in place.iterdir()} == {"theirs.yaml", "remamba-leval.yaml"}
    entries = parse_eval_result_entries(yaml.safe_load((place / "remamba-leval.yaml").read_text()))
    assert [(one.dataset_id, one.task_id, one.date) for one in entries] == [
        ("L4NLP/LEval", task, "2026-01-31") for task in (*TASKS, "closed_ended")
    ]
    average = json.loads(dated.read_text())["summary"]["average"]
    assert [one.value for one in entries] == [average] * 8
    dataset = next(one for one in metrics(remamba).values() if one.dataset_config == "codeU")
    assert (dataset.dataset_type, dataset.dataset_split) == ("L4NLP/LEval", "test")
    assert "samples 2" in entries[0].notes
    assert "max_length 60" in entries[0].notes
    assert card(remamba, files["recall"], more=["--books-dataset", "deepmind/pg19"]) == 0
    assert {path.name for path in place.iterdir()} == {"theirs.yaml", "remamba-recall.yaml"}
    entries = parse_eval_result_entries(yaml.safe_load((place / "remamba-recall.yaml").read_text()))
    assert {one.dataset_id for one in entries} == {"deepmind/pg19"}
    assert len({one.task_id for one in entries}) == len(entries) == 6
    assert {one.dataset_type for one in metrics(remamba).values()} == {"deepmind/pg19"}
    (place / "remamba-leval.yaml").write_text("# mine\n")
    there = contents(remamba)
    with pytest.raises(ValueError, match="not written by this command"):
        plan_update(remamba, [dated])
    assert contents(remamba) == there


def test_local_files_are_the_hub_s_if_somebody_says_so(remamba, files, capsys):
    """Whoever has a file of that name has not measured that dataset."""
    place = remamba / ".eval_results"
    assert card(remamba, files["leval"]) == 0
    assert "leval.json was measured on local files: if these are" in capsys.readouterr().err
    assert not place.exists()
    for one in metrics(remamba).values():
        assert (one.dataset_type, one.dataset_split) == ("leval", None)
        assert one.dataset_args["data"] == "local files"
    assert "data local files" in (remamba / "README.md").read_text()
    assert "L4NLP" not in (remamba / "README.md").read_text()
    assert card(remamba, files["leval"], more=["--dataset", "leval=mine/exams", "passkey=mine/books"]) == 0
    assert "note" not in capsys.readouterr().err
    found = {one.dataset_config: one.dataset_type for one in metrics(remamba).values()}
    assert found == {"codeU": "mine/exams", "closed_ended": "leval"}, "an average over one task is not the benchmark's"
    entries = yaml.safe_load((place / "remamba-leval.yaml").read_text())
    assert [entry["dataset"] for entry in entries] == [{"id": "mine/exams", "task_id": "codeU"}]
    assert card(remamba, files["recall"], more=["--books-dataset", "a/b", "--dataset", "recall=mine/books"]) == 0
    assert {one.dataset_type for one in metrics(remamba).values()} == {"mine/books"}


@pytest.mark.parametrize("change", [lambda results: results.update(limit=2), lambda results: results.pop("limit")])
def test_some_samples_are_no_result_of_a_dataset(remamba, files, tmp_path, capsys, change):
    limited = changed(changed(files["leval"], tmp_path, read_from_the_hub), tmp_path, change)
    assert card(remamba, limited, more=["--dataset", "leval=mine/exams"]) == 0
    assert "nothing of it is a result for the Hub" in capsys.readouterr().err
    assert not (remamba / ".eval_results").exists()
    found = list(metrics(remamba).values())
    assert {one.dataset_type for one in found} == {"leval"}
    assert found[0].dataset_args["limit"] in (2, "unknown")


def test_books_that_were_read_from_the_hub_name_their_dataset(remamba, files, tmp_path):
    source = {"id": "deepmind/pg19", "split": "test", "revision": "0" * 40}
    read = changed(files["recall"], tmp_path, lambda results: results["description"].update(dataset=source))
    assert card(remamba, read) == 0
    entries = yaml.safe_load((remamba / ".eval_results" / "remamba-recall.yaml").read_text())
    assert {entry["dataset"]["id"] for entry in entries} == {"deepmind/pg19"}
    for one in metrics(remamba).values():
        assert (one.dataset_type, one.dataset_split, one.dataset_args["revision"]) == ("deepmind/pg19", "test", "0" * 40)
    local = {**source, "revision": None}
    assert card(remamba, changed(read, tmp_path, lambda results: results["description"].update(dataset=local))) == 0
    assert not (remamba / ".eval_results" / "remamba-recall.yaml").exists()


def test_some_books_are_no_result_of_a_dataset(remamba, files, tmp_path, capsys):
    source = {"id": "deepmind/pg19", "split": "test", "revision": "0" * 40}
    for more in ({}, {"dataset": source}):
        some = changed(
            files["recall"], tmp_path, lambda results, more=more: results["description"].update(first_books=4, **more)
        )
        assert card(remamba, some, more=["--books-dataset", "deepmind/pg19"]) == 0
        assert "of some books (--most-books), not of all" in capsys.readouterr().err
        assert not (remamba / ".eval_results").exists()
        assert {one.dataset_args["first_books"] for one in metrics(remamba).values()} == {4}


def test_longbench_has_tasks_buckets_and_averages(remamba, files, tmp_path):
    def one_task(score):
        scores = dict(zip(BUCKETS, (score, score + 3, None), strict=True))
        return {"average": score + 1.5, "buckets": scores, "samples": dict.fromkeys(BUCKETS, 2)}

    def become_longbench(results):
        results["settings"]["task"] = "longbench_e"
        tasks = {"qasper": one_task(20.0), "trec": one_task(30.0)}
        results["summary"] = {"tasks": tasks, "average": 26.5, "buckets": {"0-4k": 25.0, "4-8k": 28.0, "8k+": None}}
        results["data"] = {"qasper_e.jsonl": "", "trec_e.jsonl": ""}

    file = changed(files["leval"], tmp_path, become_longbench)
    assert card(remamba, file, more=["--dataset", "longbench_e=THUDM/LongBench"]) == 0
    found = {(one.dataset_config, one.metric_name): one.metric_value for one in metrics(remamba).values()}
    on = ", compression on"
    assert found == {
        ("qasper_e", f"score, average{on}"): 21.5,
        ("trec_e", f"score, average{on}"): 31.5,
        ("longbench_e", f"score, average{on}"): 26.5,
        ("longbench_e", f"score, 0-4k{on}"): 25.0,
        ("longbench_e", f"score, 4-8k{on}"): 28.0,
    }
    text = (remamba / "README.md").read_text()
    assert f"| LongBench-E, score by words{on} | 0-4k | 4-8k | average |" in text
    assert "| trec | 30.00 | 33.00 | 31.50 |" in text
    entries = yaml.safe_load((remamba / ".eval_results" / "remamba-longbench_e.yaml").read_text())
    assert [tuple(entry["dataset"].values()) for entry in entries] == [
        ("THUDM/LongBench", "qasper_e"),
        ("THUDM/LongBench", "trec_e"),
    ]
    # The original LongBench, of other lengths, does not go by that name.
    plain = changed(file, tmp_path, lambda results: results.update(data={"qasper.jsonl": "", "trec_e.jsonl": ""}))
    assert card(remamba, plain) == 0
    assert "LongBench-E" not in (remamba / "README.md").read_text()


def test_dry_run_shows_and_writes_nothing(remamba, files, capsys):
    (remamba / "README.md").write_text("A card without front matter.\n")
    there = contents(remamba)
    named = ["--dataset", "leval=L4NLP/LEval"]
    assert card(remamba, files["leval"], files["recall"], more=[*named, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert contents(remamba) == there
    for line in ("--- README.md", "+model-index:", "+++ .eval_results/remamba-leval.yaml", f"+{BEGIN}"):
        assert f"{line}\n" in out
    assert "no digest" not in err
    assert "would be changed: .eval_results/remamba-leval.yaml, README.md" in err
    assert card(remamba, files["leval"], files["recall"], more=named) == 0
    assert "\n---\n\nA card without front matter.\n" in (remamba / "README.md").read_text()


def other_weights(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.backbone.layers[0].norm.weight.add_(1)
    model.save_pretrained(folder)


def other_compressor(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        next(weight for name, weight in model.named_parameters() if "compressor" in name).add_(1)
    model.save_pretrained(folder)


def other_setting(name, value):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, name: value}))

    return change


@pytest.mark.parametrize(
    ("kind", "name", "change", "message"),
    [
        (
            "memmamba",
            "memory",
            other_weights,
            r"of another model, by the SHA-256 of weights: MemMamba \(memmamba, float32\)",
        ),
        ("remamba", "leval", other_weights, r"of another model, whose configuration and weights have SHA-256 \w{64}"),
        ("remamba", "leval", lambda folder: (folder / "tokenizer_config.json").write_text("{}"), "read with a tokenizer of"),
        ("remamba", "recall", other_setting("compression_span", 0.77), "compression_span 0.77"),
        (
            "remamba",
            "recall",
            other_weights,
            r"by the SHA-256 of weights: ReMamba \(remamba, float32\) \w{64} and \w{64}; plain",
        ),
        ("remamba", "recall", other_compressor, "by the SHA-256 of weights"),
        ("plain", "recall", other_weights, "by the SHA-256 of weights"),
        ("memmamba", "fidelity", other_weights, "by the SHA-256 of weights: MemMamba"),
        ("remamba", "memory", None, "of another model"),
        ("memmamba", "recall", None, "by the SHA-256 of weights"),
        ("remamba", "fidelity", None, "by the SHA-256 of weights"),
        ("memmamba", "older_recall", None, "with model_type remamba, .*: this is .* model_type memmamba"),
        ("remamba", "older_recall", other_setting("compression_span", 0.77), "compression_span 0.77"),
        ("remamba", "older_fidelity", None, "memmamba of 3 layers; mamba of 2 layers"),
    ],
)
def test_results_of_another_model_are_refused(request, files, kind, name, change, message):
    folder = request.getfixturevalue(kind)
    if change is not None:
        change(folder)
    there = contents(folder)
    with pytest.raises(ValueError, match=message):
        plan_update(folder, [files[name]])
    assert contents(folder) == there


@pytest.mark.parametrize(
    ("kind", "name", "scores"),
    [("remamba", "recall", 6), ("plain", "recall", 4), ("memmamba", "fidelity", 10), ("remamba", "uncompressed", 2)],
)
def test_digests_tell_the_model_of_a_file(request, files, kind, name, scores):
    update = plan_update(request.getfixturevalue(kind), [files[name]])
    assert (update.scores, update.notes) == (scores, ())


@pytest.mark.parametrize(("kind", "name"), [("remamba", "recall"), ("memmamba", "fidelity")])
def test_files_without_digests_are_told_by_kind_and_settings(request, files, kind, name):
    folder = request.getfixturevalue(kind)
    other_weights(folder)
    update = plan_update(folder, [files[f"older_{name}"]])
    assert update.scores == {"recall": 6, "fidelity": 10}[name]
    assert update.notes == (
        f"older_{name}.json has no digest of its model: kind and settings were compared, as far as it has them",
    )


def test_uncompressed_weights_are_all_that_plain_reading_depends_on(remamba, files):
    other_compressor(remamba)
    other_setting("compression_span", 0.77)(remamba)
    assert card(remamba, files["uncompressed"]) == 0
    (found,) = {name for name, _ in metrics(remamba)}
    assert found == "numbers planted in books, one person's number, compression off"


def test_a_baseline_gets_its_own_numbers(plain, files):
    assert card(plain, files["recall"]) == 0
    found = metrics(plain)
    cells = json.loads(files["recall"].read_text())["cells"]
    right = {cell["length"]: cell["right"] for cell in cells if cell["variant"] == "plain"}
    assert {name for name, _ in found} == {
        "a number planted in books, one person's number",
        "perplexity, of the last 16 tokens of passages of books",
    }
    for length in (256, 384):
        one = found["a number planted in books, one person's number", f"exact match, %, {length} tokens"]
        assert one.metric_value == round(100 * right[length] / 3, 4)
        assert not [name for name in {**one.dataset_args, **one.metric_args} if "compression" in name]


def test_any_causal_model_has_a_card(neox_folder, books, tmp_path):
    folder = shutil.copytree(neox_folder, tmp_path / "neox")
    output = tmp_path / "passkey.json"
    common = ["--books", str(books), "--device", "cpu", "--samples", "2", "--output", str(output)]
    memory.main(["--model", str(folder), "--lengths", "256", *common], parts=["passkey"])
    assert card(folder, output) == 0
    assert len(metrics(folder)) == 1
    other = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.zeros_(other.gpt_neox.embed_in.weight)
    other.save_pretrained(folder)
    with pytest.raises(ValueError, match="of another model"):
        plan_update(folder, [output])


def test_strided_perplexity_stands_beside_that_of_windows(memmamba, files, tmp_path):
    some = changed(files["strided"], tmp_path, lambda results: results["settings"].update(windows=3))
    assert card(memmamba, files["memory"], files["strided"], some) == 0
    found = {name: one for (name, _), one in metrics(memmamba).items() if one.dataset_type == "perplexity"}
    whole = "perplexity of every token of books behind the first 192, stride 64"
    assert set(found) == {
        "perplexity of the last 8 tokens of windows of books",
        whole,
        "perplexity of the 192 tokens of books behind the first 192, stride 64",
    }
    assert {"stride": 64, "windows_per_book": "all", "longest": 256}.items() <= found[whole].dataset_args.items()
    assert "counted" not in found[whole].dataset_args
    cell = json.loads(files["strided"].read_text())["perplexity"][0]
    assert found[whole].metric_args["windows"] == cell["windows"] > 10


def test_texts_longer_than_all_books_say_so(memmamba, remamba, files, tmp_path):
    def repeat(part):
        def change(results):
            next(cell for cell in results[part] if cell["length"] == 512 - 128 * (part == "cells"))["books_repeated"] = 2.5

        return change

    for folder, name, part in ((memmamba, "memory", "passkey"), (remamba, "recall", "cells")):
        assert card(folder, changed(files[name], tmp_path, repeat(part))) == 0
        args = [one.metric_args.get("books_repeated") for one in metrics(folder).values()]
        assert [value for value in args if value is not None] == [2.5]
        assert "books_repeated 2.5" in (folder / "README.md").read_text()


def test_recall_among_several_people_is_a_row_of_its_own(remamba, files, tmp_path):
    several = changed(files["recall"], tmp_path, lambda results: results["settings"].update(distractors=1))
    several = changed(several, tmp_path, lambda results: results.update(perplexity=[]))
    assert card(remamba, files["recall"], several) == 0
    text = (remamba / "README.md").read_text()
    for row in ("compression on", "compression off"):
        assert f"\n| {row} | " in text
        assert f"\n| {row}, number of 1 of 2 people | " in text


def test_results_of_a_commit_are_of_its_download_alone(remamba, files, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    file = changed(
        files["leval"], tmp_path, lambda results: results["settings"].update(model={"id": "a/b", "revision": commit})
    )
    with pytest.raises(ValueError, match="no download of a commit"):
        plan_update(remamba, [file])
    snapshot = shutil.copytree(remamba, tmp_path / "snapshots" / commit)
    assert plan_update(snapshot, [file]).scores == 2
    notes = remamba / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True)
    for path in (remamba / "config.json", remamba / "model.safetensors"):
        (notes / f"{path.name}.metadata").write_text(f"{commit}\netag\n{path.stat().st_mtime}\n")
    assert plan_update(remamba, [file]).scores == 2
    (notes / "config.json.metadata").write_text(f"{commit}\netag\n1.0\n")  # changed after it was downloaded
    with pytest.raises(ValueError, match="changed since"):
        plan_update(remamba, [file])


def break_cell(results):
    results["passkey"][0]["right"] += 1


def break_answers(results):
    results["passkey"][0]["records"][0]["right"] ^= True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (break_cell, "are not an accuracy"),
        (break_answers, "do not add up"),
        (lambda results: results["passkey"][0].pop("samples"), "KeyError: 'samples'"),
        (lambda results: results["perplexity"][0].update(perplexity="5"), "'5' stands where a number should"),
        (lambda results: results["description"]["models"]["model"].update(dtype="int"), "'int' stands where a dtype should"),
        (lambda results: results.pop("environment"), "KeyError: 'environment'"),
        (lambda results: results.update(passkey=[], documents=[], perplexity=[]), "no number for a card yet"),
        (lambda results: results.pop("settings"), "holds no results for a card"),
    ],
)
def test_damaged_results_are_refused(memmamba, files, tmp_path, change, message):
    file = changed(files["memory"], tmp_path, change)
    with pytest.raises(ValueError, match=message) as error:
        plan_update(memmamba, [files["fidelity"], file])
    assert file.name in str(error.value)


def test_other_files_and_folders_are_refused(memmamba, files, tmp_path, capsys):
    for content in ("{", "[]", "{}", '{"settings": {"task": "other"}, "summary": {}}'):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(ValueError, match=r"other\.json.*remamba eval"):
            plan_update(memmamba, [tmp_path / "other.json"])
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        plan_update(tmp_path, [files["memory"]])
    assert card(memmamba, files["memory"], more=["--books-dataset", "pg19"]) == 1
    assert "give --books-dataset as owner/name" in capsys.readouterr().err
    for wrong in ("deepmind/pg19", "passkey=pg19", "chess=a/b"):
        assert card(memmamba, files["memory"], more=["--dataset", wrong]) == 1
        assert (
            f"--dataset {wrong} is not TASK=OWNER/NAME with one of the tasks longbench_e, leval," in capsys.readouterr().err
        )
    assert card(memmamba, tmp_path / "missing.json") == 1
    assert "missing.json cannot be read (No such file or directory): give files" in capsys.readouterr().err
    (memmamba / ".eval_results").write_text("")
    assert card(memmamba, files["memory"], more=["--dataset", "passkey=a/b"]) == 1
    assert "remamba-passkey.yaml cannot be written (" in capsys.readouterr().err


def test_files_of_one_table_stand_in_the_order_of_lengths(memmamba, files, tmp_path):
    def keep(length):
        def change(results):
            results["passkey"] = [cell for cell in results["passkey"] if cell["length"] == length]

        folder = tmp_path / str(length)
        folder.mkdir()
        return changed(files["memory"], folder, change)

    assert card(memmamba, keep(1024), keep(512)) == 0
    assert "| passkey, exact match, %, by tokens | 512 | 1k |" in (memmamba / "README.md").read_text()


def test_files_that_contradict_each_other_are_refused(memmamba, files, tmp_path):
    twice = plan_update(memmamba, [files["memory"], files["memory"]])
    assert twice.scores == plan_update(memmamba, [files["memory"]]).scores

    def another(results):
        results["perplexity"][0]["perplexity"] *= 1.5

    with pytest.raises(ValueError, match=r"both have perplexity.*give one of them"):
        plan_update(memmamba, [files["memory"], changed(files["memory"], tmp_path, another)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"# A\n{BEGIN}\n", "once each, in this order"),
        (f"# A\n{END}\n{BEGIN}\n", "once each, in this order"),
        (f"{BEGIN}{END}{BEGIN}{END}", "once each, in this order"),
        ("---\nlicense: [\n---\n", "is not YAML"),
        ("---\n- a\n---\n", "no mapping"),
        ("---\n{license: mit}\n---\n", "stands in braces"),
        ("---\nmodel-index: 5\n---\n", "not as the Hub reads it"),
        ("---\nmodel-index: &here [{name: a, results: []}]\nother: *here\n---\n", "refers to it"),
        ("---\nmodel-index: []\nmodel-index: [{name: a, results: []}]\n---\n", "twice"),
        ("---\nmodel-index: [{name: a, results: [{}]}]\n---\n", "not as the Hub reads it"),
        (b"\xff\xfe", "not a text file in UTF-8"),
    ],
)
def test_broken_cards_stay_as_they_are(memmamba, files, content, message):
    (memmamba / "README.md").write_bytes(content if isinstance(content, bytes) else content.encode())
    there = contents(memmamba)
    with pytest.raises(ValueError, match=message):
        plan_update(memmamba, [files["fidelity"]]).apply()
    assert contents(memmamba) == there


def test_text_between_markers_is_replaced_where_it_stands(memmamba, files):
    (memmamba / "README.md").write_text(f"# A\n{BEGIN}\nold\n{END} behind\n\n## B\n")
    assert card(memmamba, files["fidelity"]) == 0
    text = (memmamba / "README.md").read_text().split("---\n", 2)[2]
    assert re.fullmatch(rf"\n# A\n{BEGIN}\n\| ETMF.*{END} behind\n\n## B\n", text, re.DOTALL)
    assert "old" not in text
