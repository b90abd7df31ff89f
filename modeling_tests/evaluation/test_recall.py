# SPDX-License-Identifier: Apache-2.0
import json
import shutil
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest
import torch

from remamba_hf import ReMambaConfig, ReMambaForCausalLM
from remamba_hf.evaluation import recall
from remamba_hf.evaluation.checkpoints import digest, weights_read
from remamba_hf.training.book_tokens import prepare_books
from remamba_hf.training.recall_data import RecallSampler


@pytest.fixture(scope="module")
def model_folder(books, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer, _ = prepare_books(books, folder / "data", vocab_size=300)
    torch.manual_seed(0)
    config = ReMambaConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=1,
        state_size=4,
        compression_span=0.5,
        compression_ratio=0.25,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    ReMambaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def arguments(books, model_folder, output, *more):
    return [
        *("--model", str(model_folder), "--books", str(books), "--output", str(output), "--device", "cpu"),
        *("--lengths", "256", "384", "--samples", "5", "--distractors", "1", "--batch-tokens", "1000"),
        *("--perplexity-tokens", "32", *more),
    ]


def test_command_writes_cells_and_tables(books, model_folder, tmp_path, capsys):
    output = tmp_path / "results" / "recall.json"
    recall.main(arguments(books, model_folder, output, "--plain-model", str(model_folder)))
    results = json.loads(output.read_text())
    cells = {(cell["variant"], cell["length"]): cell for cell in results["cells"]}
    assert set(cells) == {(name, length) for name in recall.VARIANTS for length in (256, 384)}
    for cell in cells.values():
        assert cell["samples"] == len(cell["records"]) == 5
        assert cell["right"] == sum(record["right"] for record in cell["records"])
        assert cell["interval"][0] <= cell["accuracy"] <= cell["interval"][1]
    compressed = cells["compressed", 256]["records"]
    assert all(0 <= record["kept"] <= 1 for record in compressed)
    assert {record["inside"] for record in compressed} == {True, False}
    same = [[record["number"] for record in cells[name, 256]["records"]] for name in recall.VARIANTS]
    assert same[0] == same[1] == same[2], "every variant is asked the same"
    assert results["settings"]["lengths"] == [256, 384]
    assert {"torch", "transformers", "remamba_hf", "device"} <= set(results["environment"])
    assert {entry["variant"] for entry in results["perplexity"]} == {"uncompressed", "plain"}
    assert "| exact match, % | 256 | 384 |" in capsys.readouterr().out


def test_plots_are_drawn_from_finished_results(books, model_folder, tmp_path):
    pytest.importorskip("matplotlib")
    output = tmp_path / "recall.json"
    recall.main(arguments(books, model_folder, output, "--only-compressed"))
    recall.main(arguments(books, model_folder, output, "--only-compressed", "--plots", str(tmp_path)))
    assert (tmp_path / "recall_by_length.png").stat().st_size > 1000
    assert (tmp_path / "recall_by_depth.png").stat().st_size > 1000


def test_run_goes_on_where_it_stopped_and_refuses_other_settings(books, model_folder, tmp_path, monkeypatch):
    output = tmp_path / "recall.json"
    recall.main(arguments(books, model_folder, output, "--only-compressed"))
    results = json.loads(output.read_text())
    last = results["cells"].pop()
    output.write_text(json.dumps(results))
    asked = []
    records = recall.recall_records
    monkeypatch.setattr(recall, "recall_records", lambda *given: asked.append(given[3]) or records(*given))
    recall.main(arguments(books, model_folder, output, "--only-compressed"))
    assert asked == [last["length"]] * 3, "five prompts, two at a time"
    assert json.loads(output.read_text())["cells"][-1] == last
    with pytest.raises(ValueError, match="other settings"):
        recall.main(arguments(books, model_folder, output, "--only-compressed", "--seed", "5"))


def test_answers_are_compared_with_the_number(books, model_folder, tmp_path, monkeypatch):
    tokenizer, tokens = prepare_books(None, model_folder / "data", vocab_size=300)
    right_above = 3

    def fake_answers(model, tokenizer, samples, compress, span, ratio):
        texts = [sample.number if sample.depth > 0.5 else sample.number[:right_above] for sample in samples]
        return texts, [None] * len(samples)

    monkeypatch.setattr(recall, "answer", fake_answers)
    model = ReMambaForCausalLM.from_pretrained(model_folder)
    settings = recall.RecallSettings(lengths=(400,), samples=10, distractors=0, perplexity_tokens=0)
    results = recall.evaluate(
        {"plain": (lambda: model, False)}, tokenizer, tokens, settings, tmp_path / "recall.json", batch_tokens=1600
    )
    summary = results["cells"][0]
    assert summary["accuracy"] == pytest.approx(0.5, abs=0.11)
    assert [record["right"] for record in summary["records"]] == [record["depth"] > 0.5 for record in summary["records"]]
    by_depth = recall.depth_table(results, "plain").splitlines()
    assert by_depth[2].endswith("| 0 |")
    assert by_depth[-1].endswith("| 100 |")


def test_greedy_answers_are_those_of_the_model(model_folder):
    tokenizer, tokens = prepare_books(None, model_folder / "data", vocab_size=300)
    sampler = RecallSampler(tokens, tokenizer, seed=1)
    samples = [sampler.sample(index, 300) for index in range(2)]
    model = ReMambaForCausalLM.from_pretrained(model_folder).eval()
    for compress in (True, False):
        texts, kept = recall.answer(model, tokenizer, samples, compress)
        assert (kept == [None, None]) != compress
        for sample, text in zip(samples, texts, strict=True):
            ids = torch.from_numpy(sample.prompt_ids)[None]
            for _ in range(len(sample.answer_ids)):
                logits = model(ids, prompt_lengths=[300], compress_prompt=compress).logits
                ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
                if ids[0, -1] == tokenizer.eos_token_id:
                    break
            assert text == tokenizer.decode(ids[0, 300:], skip_special_tokens=True).strip()
    _, everything = recall.answer(model, tokenizer, samples, True, span=0.99, ratio=1.0)
    assert everything == [1.0, 1.0]


def test_perplexity_is_that_of_the_last_tokens(model_folder):
    _, tokens = prepare_books(None, model_folder / "data", vocab_size=300)
    model = ReMambaForCausalLM.from_pretrained(model_folder).eval()
    text = np.asarray(tokens[:100])
    ids = torch.from_numpy(text.astype(np.int64))[None]
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    assert recall.text_ends(text, samples=2, seed=0, longest=100) == [100, 100]
    assert recall.text_loss(model, text, end=100, length=100, counted=20) == pytest.approx(
        losses[-20:].mean().item(), rel=1e-4
    )
    last = torch.nn.functional.cross_entropy(model(ids[:, 50:90]).logits[0, :-1], ids[0, 51:90], reduction="none")[-7:]
    assert recall.text_loss(model, text, end=90, length=40, counted=7) == pytest.approx(last.mean().item(), rel=1e-4)


def test_wilson_interval():
    low, high = recall.wilson_interval(95, 100)
    assert (low, high) == (pytest.approx(0.8882, abs=1e-4), pytest.approx(0.9785, abs=1e-4))
    assert recall.wilson_interval(100, 100)[1] == pytest.approx(1.0)
    assert recall.wilson_interval(0, 0) == (0.0, 1.0)


def test_model_that_does_not_compress_is_read_as_it_reads(books, memmamba_folder, neox_folder, tmp_path, capsys):
    for folder, label in ((memmamba_folder, "MemMamba"), (neox_folder, "gpt_neox")):
        output = tmp_path / f"{label}.json"
        recall.main(arguments(books, folder, output))
        results = json.loads(output.read_text())
        assert {cell["variant"] for cell in results["cells"]} == {"plain"}
        assert len(results["cells"]) == len(results["perplexity"]) == 2
        assert not any("inside" in record or "kept" in record for cell in results["cells"] for record in cell["records"])
        assert f"| {label} |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="compresses nothing: leave out --span"):
        recall.main(arguments(books, memmamba_folder, tmp_path / "recall.json", "--span", "0.5"))
    assert not (tmp_path / "recall.json").exists()


def test_plots_of_a_model_that_does_not_compress(books, memmamba_folder, tmp_path):
    pytest.importorskip("matplotlib")
    recall.main(arguments(books, memmamba_folder, tmp_path / "recall.json", "--plots", str(tmp_path)))
    assert (tmp_path / "recall_by_length.png").stat().st_size > 1000
    assert (tmp_path / "recall_by_depth.png").stat().st_size > 1000


def test_attention_model_beside_one_that_compresses(books, model_folder, neox_folder, tmp_path, capsys):
    output = tmp_path / "recall.json"
    recall.main(arguments(books, model_folder, output, "--plain-model", str(neox_folder), "--lengths", "256"))
    results = json.loads(output.read_text())
    assert [cell["variant"] for cell in results["cells"]] == ["compressed", "uncompressed", "plain"]
    assert "| gpt_neox |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="512 positions"):
        recall.main(arguments(books, model_folder, output, "--plain-model", str(neox_folder), "--lengths", "600"))


def test_results_have_a_date_and_digests_of_what_was_read(books, model_folder, tmp_path):
    output = tmp_path / "recall.json"
    recall.main(arguments(books, model_folder, output, "--plain-model", str(model_folder)))
    results = json.loads(output.read_text())
    before = datetime.now(timezone.utc)
    assert timedelta(0) <= before - datetime.fromisoformat(results["date"]) < timedelta(minutes=5)
    models = results["description"]["models"]
    model = ReMambaForCausalLM.from_pretrained(model_folder)
    assert models["model"]["weights"] == models["plain"]["weights"] == digest(weights_read(model))
    with torch.no_grad():
        model.backbone.compressor.query[0].weight += 1
    changed = shutil.copytree(model_folder, tmp_path / "changed")
    model.save_pretrained(changed)
    with pytest.raises(ValueError, match="other settings"):
        recall.main(arguments(books, changed, output, "--plain-model", str(model_folder)))


def test_prompts_longer_than_the_books_repeat_them(books, model_folder, tmp_path):
    output = tmp_path / "recall.json"
    recall.main(arguments(books, model_folder, output, "--lengths", "256", "16384", "--samples", "1"))
    results = json.loads(output.read_text())
    repeats = {(cell["variant"], cell["length"]): cell.get("books_repeated") for cell in results["cells"]}
    times = round(16_384 / results["description"]["tokens"], 2)
    assert times > 1
    assert repeats == {
        (name, n): times if n > 256 else None for name in ("compressed", "uncompressed") for n in (256, 16_384)
    }
    assert [entry["length"] for entry in results["perplexity"]] == [256], "a repeated text has no perplexity of its own"
