# SPDX-License-Identifier: Apache-2.0
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPTNeoXForCausalLM, MambaForCausalLM

from modeling_tests.modeling.tiny_models import tiny_memmamba, tiny_model
from remamba_hf import MemMambaForCausalLM, ReMambaForCausalLM
from remamba_hf.evaluation import memory, memory_report, memory_tasks
from remamba_hf.evaluation.checkpoints import default_batch_tokens, load_model, plain_reading
from remamba_hf.training.book_tokens import encode_text, read_book, train_book_tokenizer
from remamba_hf.training.recall_data import RecallSampler


@pytest.fixture(scope="module")
def sampler(prepared):
    tokenizer, tokens = prepared
    return RecallSampler(tokens, tokenizer, seed=1, digits=3)


def arguments(books, model, output, *more):
    return [
        *("--model", str(model), "--books", str(books), "--output", str(output), "--device", "cpu"),
        *("--lengths", "192", "384", "--samples", "4", "--keys", "2", "--distractors", "1", "--digits", "3"),
        *("--document-counts", "2", "4", "--document-length", "60", "--perplexity-lengths", "64", "128"),
        *("--reference-length", "64", "--windows", "3", "--counted", "10", "--decode-lengths", "32", "96"),
        *("--batch-tokens", "300", "--chunk-length", "100", *more),
    ]


def greedy(model, ids, steps, **options):
    """What a model answers to a whole prompt, read anew for every token."""
    answer = []
    for _ in range(steps):
        logits = model(torch.tensor([[*ids, *answer]]), **options).logits
        answer.append(int(logits[0, -1].argmax()))
    return answer


@pytest.mark.parametrize("family", ["memmamba", "remamba"])
def test_answers_are_those_to_the_whole_prompts(family, prepared, sampler):
    tokenizer, _ = prepared
    size = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    model = tiny_memmamba(**size) if family == "memmamba" else tiny_model(**size)
    options = {} if family == "memmamba" else {"compress_prompt": False}
    texts = [sampler.text(number, 230 + 40 * number, keys=3, distractors=1) for number in range(2)]
    answers = memory_tasks.ask(model, tokenizer, texts, chunk_length=50)
    wanted = []
    for text in texts:
        found = [greedy(model, text.prompt_ids(key).tolist(), 5, **options) for key in range(3)]
        ends = [ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else 5 for ids in found]
        wanted.append([tokenizer.decode(ids[:end]).strip() for ids, end in zip(found, ends, strict=True)])
    assert answers == wanted
    assert len({answer for row in answers for answer in row}) > 1, "the question makes a difference"


def test_answer_ends_at_the_end_of_text(prepared):
    tokenizer, _ = prepared
    ids = tokenizer(" 482")["input_ids"]
    assert memory_tasks._decoded(tokenizer, [*ids, tokenizer.eos_token_id, *ids]) == "482"
    assert memory_tasks._decoded(tokenizer, [*ids, *ids]) == "482 482"


@pytest.mark.parametrize(
    ("answer", "number"), [("482", "482"), ("482.\nAnd", "482"), ("4821", "4821"), ("It is 482", ""), ("", "")]
)
def test_an_answer_is_the_number_that_it_begins_with(answer, number):
    assert memory_tasks.number_of(answer) == number


def test_records_tell_right_from_somebody_else_s_number(sampler, monkeypatch):
    def fake_answers(model, tokenizer, texts, chunk_length):
        assert len(texts) <= 2
        return [[text.asked[0].number, text.asked[0].number, text.other_numbers[0], "nothing"] for text in texts]

    monkeypatch.setattr(memory_tasks, "ask", fake_answers)
    made = []

    def make_text(number):
        made.append(sampler.text(number, 500, keys=4, distractors=1, depths=[0.1, 0.3, 0.5, 0.9]))
        return made[-1]

    batches = ((0, 1), (2, 3), (4,))
    records = [one for numbers in batches for one in memory_tasks.recall_records(None, None, make_text, numbers, 10)]
    assert [record["sample"] for record in records] == sorted([*range(5)] * 4)
    assert [record["right"] for record in records] == [True, False, False, False] * 5
    assert [record["other"] for record in records] == [False, True, True, False] * 5
    assert [record["number"] for record in records] == [fact.number for text in made for fact in text.asked]
    assert [record["depth"] for record in records[:4]] == pytest.approx([0.1, 0.3, 0.5, 0.9], abs=0.1)
    summary = memory_tasks.summarize_records(records)
    assert (summary["samples"], summary["right"], summary["other"], summary["accuracy"]) == (20, 5, 10, 0.25)
    assert summary["interval"] == (pytest.approx(0.1119, abs=1e-4), pytest.approx(0.4687, abs=1e-4))


@pytest.mark.parametrize(("samples", "keys"), [(5, 1), (6, 3), (5, 2), (3, 4)])
def test_depths_are_spread_over_samples_and_within_a_text(samples, keys):
    depths = np.array([memory.spread_depths(number, samples, keys) for number in range(samples)])
    assert ((depths >= 0) & (depths < 1)).all()
    for key in range(keys):
        np.testing.assert_allclose(np.diff(np.sort(depths[:, key])), 1 / samples)
    for row in depths:
        np.testing.assert_allclose(np.diff(np.sort(row)), 1 / keys)
    np.testing.assert_allclose(depths[:, 0], (np.arange(samples) + 0.5) / samples)


def test_losses_are_of_the_last_tokens_at_the_same_places(prepared):
    _, tokens = prepared
    model = tiny_memmamba(vocab_size=300)
    books = [np.asarray(tokens[:300]), np.asarray(tokens[300:700])]
    ends = [memory_tasks.window_ends(len(book), 120, windows=3) for book in books]
    assert ends == [[150, 210, 270], [166, 260, 353]]
    windows = [(book, end) for book, book_ends in zip(books, ends, strict=True) for end in book_ends]
    for length, chunk in ((120, 50), (40, 1000)):
        losses = memory_tasks.window_losses(model, windows, length, 7, chunk)
        for (book, end), loss in zip(windows, losses, strict=True):
            ids = torch.from_numpy(book[end - length : end].astype(np.int64))[None]
            logs = model(ids).logits[0].log_softmax(-1)
            wanted = -sum(logs[place - 1, ids[0, place]].item() for place in range(length - 7, length)) / 7
            assert loss == pytest.approx(wanted, rel=1e-5)


def test_perplexity_is_of_the_mean_loss_and_compared_by_book():
    near = memory_tasks.summarize_losses([[1.0, 3.0], [2.0, 2.5], [0.5, 0.9]])
    assert near["perplexity"] == pytest.approx(math.exp(9.9 / 6))
    assert near["book_losses"] == pytest.approx([2.0, 2.25, 0.7])
    assert near["windows"] == 6
    far = memory_tasks.summarize_losses([[1.1, 3.3], [2.3, 2.5], [0.5, 1.1]])
    value, (low, high) = memory_tasks.perplexity_ratio(far, near)
    differences = np.array([0.2, 0.15, 0.1])
    error = 1.96 * differences.std(ddof=1) / math.sqrt(3)
    assert value == pytest.approx(far["perplexity"] / near["perplexity"])
    assert (low, high) == pytest.approx((math.exp(0.15 - error), math.exp(0.15 + error)))
    assert memory_tasks.perplexity_ratio(near, near)[0] == 1
    one = memory_tasks.summarize_losses([[1.0]])
    assert memory_tasks.perplexity_ratio(one, one) == (1.0, None)


@pytest.mark.parametrize("loss", [math.inf, math.nan, 800.0])
def test_losses_beyond_numbers_are_no_perplexity(loss):
    broken = memory_tasks.summarize_losses([[loss, 1.0], [2.0, 2.0]])
    fine = memory_tasks.summarize_losses([[1.0, 1.0], [2.0, 2.0]])
    json.dumps(broken, allow_nan=False)
    if loss == 800.0:
        assert broken["perplexity"] == pytest.approx(math.exp(805 / 4))
        return
    assert broken["perplexity"] is None
    assert memory_tasks.perplexity_ratio(broken, fine) is None


@pytest.mark.parametrize("length", [20, 48])
def test_strided_windows_score_every_token_once_whatever_their_length(prepared, length):
    """Against the definition, token by token in float64."""
    _, tokens = prepared
    model = tiny_memmamba(vocab_size=300)
    book, longest, stride = np.asarray(tokens[:90]).astype(np.int64), 48, 9
    ends = memory_tasks.strided_ends(len(book), longest, stride, windows=0)
    assert ends == [48, 57, 66, 75, 84]
    assert memory_tasks.strided_ends(len(book), longest, stride, windows=2) == ends[:2]
    losses = memory_tasks.window_losses(model, [(book, end) for end in ends], length, stride, chunk_length=7)
    wanted, scored = [], []
    for end in ends:
        logs = model(torch.from_numpy(book[end - length : end])[None]).logits[0].log_softmax(-1)
        places = range(end - stride, end)
        scored += places
        wanted.append(-sum(logs[place - (end - length) - 1, book[place]].item() for place in places) / stride)
    assert scored == list(range(longest - stride, 84)), "the same tokens at every length, each once"
    assert losses == pytest.approx(wanted, rel=1e-5)


def test_command_with_a_stride(books, memmamba_folder, tmp_path, capsys):
    output = tmp_path / "memory.json"
    more = ["--lengths", "64", "128", "--reference-length", "64", "--stride", "400", "--device", "cpu"]
    with pytest.raises(ValueError, match="shortest window"):
        memory.main(
            ["--model", str(memmamba_folder), "--data", str(books), "--output", str(output), *more], None, ["perplexity"]
        )
    more[more.index("400")] = "50"
    memory.main(
        ["--model", str(memmamba_folder), "--data", str(books), "--output", str(output), *more], None, ["perplexity"]
    )
    results = json.loads(output.read_text())
    assert {name: results["settings"][name] for name in ("stride", "counted", "windows")} == {
        "stride": 50,
        "counted": 50,
        "windows": 0,
    }
    (book, *_) = [len(encode_text(read_book(path), memory_tokenizer(memmamba_folder))) for path in books.iterdir()]
    windows = 2 * (1 + (book - 128) // 50)
    assert [cell["windows"] for cell in results["perplexity"]] == [windows, windows]
    assert "perplexity of all tokens, stride 50, by tokens of context | 64 | 128 |" in capsys.readouterr().out


def memory_tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


class LargestTensor(TorchDispatchMode):
    """The most elements of any tensor that an operator gives."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("family", ["memmamba", "remamba"])
def test_memory_for_a_text_does_not_grow_with_it(family, prepared, sampler):
    """But for its ids, which are an eighth of what any activation of a chunk takes."""
    tokenizer, tokens = prepared
    size = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    model = tiny_memmamba(torch.float32, **size) if family == "memmamba" else tiny_model(torch.float32, **size)
    sampler = RecallSampler(memory_tasks.repeated(np.asarray(tokens), 8192), tokenizer, seed=1, digits=3)
    found = []
    for length in (2048, 8192):
        with LargestTensor() as mode:
            memory_tasks.ask(model, tokenizer, [sampler.text(1, length)], chunk_length=512)
        found.append(mode.largest)
    assert found[0] == found[1] > 8192


def test_texts_longer_than_the_books_repeat_them(books, memmamba_folder, tmp_path, monkeypatch, capsys):
    asked = {}

    def fake_answers(model, tokenizer, texts, chunk_length):
        asked.update({len(text.prompt_ids()): text for text in texts})
        return [[text.asked[0].number] for text in texts]

    monkeypatch.setattr(memory_tasks, "ask", fake_answers)
    output = tmp_path / "memory.json"
    where = ["--model", str(memmamba_folder), "--data", str(books), "--output", str(output), "--device", "cpu"]
    memory.main([*where, "--length", "300", str(1 << 20), "--samples", "1", "--digits", "3"], None, ["passkey"])
    results = json.loads(output.read_text())
    near, far = results["passkey"]
    assert (near["accuracy"], far["accuracy"], far["length"]) == (1.0, 1.0, 1 << 20)
    assert "books_repeated" not in near
    whole = results["description"]["tokens"]
    assert far["books_repeated"] == round((1 << 20) / whole, 2)
    text = asked[1 << 20].text_ids
    start, end = asked[1 << 20].asked[0].evidence
    before = text[: start - 20]  # the fact's own words come before its name
    assert (before[whole : 2 * whole] == before[:whole]).all()
    assert (text[end + 20 : end + 20 + whole] == text[end + 20 + whole : end + 20 + 2 * whole]).all()
    assert f"repeat these: 1024k {far['books_repeated']} times" in capsys.readouterr().out


def test_attention_model_as_a_baseline(books, memmamba_folder, neox_folder, tmp_path, capsys):
    output = tmp_path / "memory.json"
    memory.main(arguments(books, memmamba_folder, output, "--plain-model", str(neox_folder)))
    results = json.loads(output.read_text())
    assert results["description"]["models"]["plain"]["label"] == "gpt_neox"
    for part, (column, setting) in memory.COLUMNS.items():
        cells = {(cell["model"], cell[column]) for cell in results[part]}
        assert cells == {(name, value) for name in ("model", "plain") for value in results["settings"][setting]}
    first, second = (cell["state_bytes"] for cell in results["decode"] if cell["model"] == "plain")
    assert second == 3 * first, "keys and values of 96 tokens and of 32"
    for part in ("passkey", "documents"):
        asked = [[record["number"] for record in cell["records"]] for cell in results[part]]
        assert asked[0] == asked[1], "both models are asked the same"
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"512 positions .* needs 705: give shorter --lengths"):
        memory.main(arguments(books, neox_folder, tmp_path / "other.json", "--parts", "passkey", "--lengths", "700"))
    with pytest.raises(ValueError, match="shorter --document-counts"):
        memory.main(arguments(books, neox_folder, tmp_path / "other.json", "--document-counts", "10"))
    assert not (tmp_path / "other.json").exists()


def test_attention_model_answers_as_by_its_own_forward(prepared, sampler, neox_folder):
    tokenizer, _ = prepared
    model = GPTNeoXForCausalLM.from_pretrained(neox_folder).eval()
    texts = [sampler.text(number, 250 + 40 * number, keys=2) for number in range(2)]
    answers = memory_tasks.ask(model, tokenizer, texts, chunk_length=50)
    with torch.no_grad():
        wanted = [[greedy(model, text.prompt_ids(key).tolist(), 5) for key in range(2)] for text in texts]
    ends = [[ids.index(0) if 0 in ids else 5 for ids in row] for row in wanted]
    assert answers == [
        [tokenizer.decode(ids[:end], skip_special_tokens=True).strip() for ids, end in zip(row, stops, strict=True)]
        for row, stops in zip(wanted, ends, strict=True)
    ]
    ids = torch.randint(300, (2, 30), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(memory_tasks.last_logits(model, ids, 4, 10), model(ids).logits[:, -4:])


def test_state_is_all_that_a_layer_holds_and_does_not_grow(prepared):
    _, tokens = prepared
    model = tiny_memmamba(torch.float32, vocab_size=300)
    config = model.config
    mixer = config.intermediate_size * (config.conv_kernel + config.state_size)
    notes = config.chunk_size * (config.note_size + 1) + (config.pool_size + 1) * (config.note_size + 3)
    wanted = 4 * config.num_hidden_layers * (mixer + notes)
    costs = [memory_tasks.decoding_cost(model, tokens, length, 50, steps=2, repeats=3) for length in (7, 130)]
    assert [cost["state_bytes"] for cost in costs] == [wanted, wanted]
    assert [cost["state_bytes_after"] for cost in costs] == [wanted, wanted]
    for cost in costs:
        assert 0 < cost["seconds_range"][0] <= cost["seconds_per_token"] <= cost["seconds_range"][1]
    growing = SimpleNamespace(layers=[SimpleNamespace(keys=torch.zeros(3, 5), rest={0: torch.zeros(2), 1: None}, size=7)])
    assert memory_tasks.cache_bytes(growing) == 4 * 17


def test_rows_fill_the_batch_chunk_by_chunk():
    assert memory_tasks.rows_at_once(1024, 4096, 16_384) == 16
    assert memory_tasks.rows_at_once(409_600, 4096, 16_384) == 4
    assert memory_tasks.rows_at_once(409_600, 32_768, 16_384) == 1
    assert memory_tasks.rows_at_once(1 << 20, 4096, 1 << 20) == 16, "not 256 texts of a million tokens"


def test_command_measures_every_part_of_both_models(books, memmamba_folder, plain_folder, tmp_path, capsys):
    output = tmp_path / "results" / "memory.json"
    memory.main(arguments(books, memmamba_folder, output, "--plain-model", str(plain_folder)))
    results = json.loads(output.read_text())
    for part, (column, setting) in memory.COLUMNS.items():
        cells = {(cell["model"], cell[column]) for cell in results[part]}
        assert cells == {(name, value) for name in ("model", "plain") for value in results["settings"][setting]}
        assert len(results[part]) == len(cells)
    assert {cell["samples"] for cell in results["passkey"]} == {8}, "two keys in each of four texts"
    assert {cell["samples"] for cell in results["documents"]} == {4}
    for part in ("passkey", "documents"):
        asked = [[record["number"] for record in cell["records"]] for cell in results[part]]
        assert asked[0] == asked[1], "both models are asked the same"
        assert asked[0] != asked[2]
    assert {cell["windows"] for cell in results["perplexity"]} == {6}
    assert results["description"]["perplexity_books"] == ["0.txt", "1.txt"]
    models = results["description"]["models"]
    assert [models[name]["label"] for name in models] == ["MemMamba", "plain Mamba-1"]
    assert models["plain"]["parameters"] == MambaForCausalLM.from_pretrained(plain_folder).num_parameters()
    assert {"torch", "transformers", "remamba_hf", "device"} <= set(results["environment"])
    text = capsys.readouterr().out
    for head in (
        "exact match, %, by tokens | 192 | 384",
        "MemMamba, depth",
        "without the fact | 2 | 4",
        "decoding, after tokens | 32 | 96",
    ):
        assert f"{head} |" in text
    assert "| plain Mamba-1, ratio to 64 | 1.000 |" in text


def test_run_goes_on_where_it_stopped(books, memmamba_folder, plain_folder, tmp_path, monkeypatch):
    output = tmp_path / "memory.json"
    both = ("--plain-model", str(plain_folder), "--parts", "passkey", "perplexity")
    memory.main(arguments(books, memmamba_folder, output, *both))
    whole = json.loads(output.read_text())
    missing = whole["passkey"].pop(1)
    output.write_text(json.dumps(whole))
    measured = []
    work = memory.MemoryEvaluation.work

    def watched(self, part, model, column):
        measured.append((part, column))
        return work(self, part, model, column)

    monkeypatch.setattr(memory.MemoryEvaluation, "work", watched)
    memory.main(arguments(books, memmamba_folder, output, *both))
    assert measured == [("passkey", missing["length"])]
    assert json.loads(output.read_text())["passkey"][-1] == missing
    memory.main(arguments(books, memmamba_folder, output, *both, "--parts", "decode"))
    assert [part for part, _ in measured[1:]] == ["decode"] * 4, "another part joins the file"
    with pytest.raises(ValueError, match="other settings"):
        memory.main(arguments(books, memmamba_folder, output, *both, "--seed", "5"))


def test_results_of_another_model_are_not_continued(books, memmamba_folder, tmp_path):
    output = tmp_path / "memory.json"
    memory.main(arguments(books, memmamba_folder, output, "--parts", "documents"))
    model = MemMambaForCausalLM.from_pretrained(memmamba_folder)
    with torch.no_grad():
        model.backbone.layers[1].memory.note.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    for file in memmamba_folder.glob("tokenizer*"):
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="other settings"):
        memory.main(arguments(books, tmp_path / "other", output, "--parts", "documents"))


def test_batches_and_chunks_change_nothing(books, memmamba_folder, tmp_path):
    several, one = tmp_path / "several.json", tmp_path / "one.json"
    parts = ("--parts", "passkey", "documents", "perplexity")
    memory.main(arguments(books, memmamba_folder, several, *parts, "--batch-tokens", "5000", "--chunk-length", "37"))
    memory.main(arguments(books, memmamba_folder, one, *parts, "--batch-tokens", "1", "--chunk-length", "4096"))
    several, one = (json.loads(path.read_text()) for path in (several, one))
    for part in ("passkey", "documents"):
        assert several[part] == one[part]
    for left, right in zip(several["perplexity"], one["perplexity"], strict=True):
        assert left["book_losses"] == pytest.approx(right["book_losses"], rel=1e-4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--parts", "passkey", "--lengths", "40", "384"), "longer prompts"),
        (("--parts", "passkey", "--distractors", "500"), "more than there are names"),
        (("--parts", "passkey", "--samples", "0"), "at least 1"),
        (("--parts", "passkey", "--digits", "0"), "at least 1"),
        (("--parts", "documents", "--distractors", "3"), "documents without the fact"),
        (("--parts", "perplexity", "--perplexity-lengths", "100000"), "longer books"),
        (("--parts", "perplexity", "--counted", "64"), "shortest window, of 64: give less --counted,"),
        (("--parts", "perplexity", "--stride", "64", "--counted", "64"), "shortest window, of 64: give less --stride,"),
        (("--parts", "perplexity", "--counted", "9", "--stride", "8"), "leave out --counted"),
        (("--parts", "passkey", "--lengths", "0"), "at least 1"),
    ],
)
def test_what_cannot_be_made_is_refused_before_any_work(books, memmamba_folder, tmp_path, monkeypatch, more, message):
    monkeypatch.setattr(memory.MemoryEvaluation, "work", None)
    with pytest.raises(ValueError, match=message):
        memory.main(arguments(books, memmamba_folder, tmp_path / "memory.json", *more))
    assert not (tmp_path / "memory.json").exists()


def test_a_cpu_reads_less_at_once_unless_told_otherwise(books, memmamba_folder, tmp_path, monkeypatch):
    read = []

    def evaluate(evaluation, *others):
        read.append(evaluation.batch_tokens)
        raise KeyboardInterrupt

    monkeypatch.setattr(memory, "evaluate", evaluate)
    for more in ([], ["--batch-tokens", "300"]):
        words = ["--model", str(memmamba_folder), "--books", str(books), "--output", str(tmp_path / "memory.json")]
        with pytest.raises(KeyboardInterrupt):
            memory.main([*words, "--perplexity-lengths", "64", "--lengths", "384", "--device", "cpu", *more])
    assert read == [16_384, 300]
    assert default_batch_tokens("cuda:1") == 262_144


def test_books_too_short_for_the_longest_window_are_left_out(prepared):
    tokenizer, tokens = prepared
    settings = memory.MemorySettings(perplexity_lengths=(50, 200), windows=2, counted=5)
    books = [np.asarray(tokens[:150]), np.asarray(tokens[:200]), np.asarray(tokens[:300])]
    evaluation = memory.MemoryEvaluation(tokenizer, books, settings, batch_tokens=100, chunk_length=50)
    assert evaluation.long_enough == [1, 2]
    assert evaluation.ends == [[200, 200], [225, 275]]
    assert len(evaluation.tokens) == 653, "an end-of-text token behind every book"


def test_texts_of_one_key_are_the_prompts_of_the_recall_evaluation(prepared, monkeypatch):
    tokenizer, tokens = prepared
    settings = memory.MemorySettings(lengths=(300,), samples=3, distractors=1, perplexity_lengths=(100,))
    evaluation = memory.MemoryEvaluation(tokenizer, [np.asarray(tokens)], settings, batch_tokens=10, chunk_length=10)
    asked = []

    def fake_answers(model, tokenizer, texts, chunk_length):
        asked.extend(texts)
        return [[text.asked[0].number] for text in texts]

    monkeypatch.setattr(memory_tasks, "ask", fake_answers)
    work = evaluation.work("passkey", None, 300)
    assert work.finish(work.measure(range(work.total)))["accuracy"] == 1
    sampler = RecallSampler(evaluation.tokens, tokenizer, settings.seed, settings.digits)
    for number, text in enumerate(asked):
        prompt = sampler.sample((300, number), 300, 1, depth=(number + 0.5) / 3).prompt_ids
        assert text.prompt_ids().tolist() == prompt.tolist()


def test_models_of_another_tokenizer_are_refused(books, prepared, memmamba_folder, tmp_path):
    tokenizer, _ = prepared

    def saved(name, size, other=None):
        tiny_memmamba(torch.float32, vocab_size=size).save_pretrained(tmp_path / name)
        if other is not None:
            other.save_pretrained(tmp_path / name)
        return tmp_path / name

    output = tmp_path / "memory.json"
    short = ("--parts", "decode", "--decode-lengths", "8")
    with pytest.raises(ValueError, match="vocabulary of 299, and the tokenizer 300"):
        memory.main(arguments(books, memmamba_folder, output, *short, "--plain-model", str(saved("small", 299))))
    other = train_book_tokenizer(["quite another text " * 99], 280)
    with pytest.raises(ValueError, match="has another tokenizer"):
        memory.main(arguments(books, memmamba_folder, output, *short, "--plain-model", str(saved("other", 300, other))))
    assert not output.exists()
    memory.main(arguments(books, memmamba_folder, output, *short, "--plain-model", str(saved("padded", 304, tokenizer))))
    assert len(json.loads(output.read_text())["decode"]) == 2


def test_model_that_compresses_is_read_plainly(tmp_path):
    tiny_model(torch.float32, vocab_size=300).save_pretrained(tmp_path)
    model = ReMambaForCausalLM.from_pretrained(tmp_path)
    assert plain_reading(model) == {"compress_prompt": False}
    assert memory.describe_model("remamba", model)["label"] == "ReMamba, compression off"
    assert memory.describe_model("mamba", model)["label"] == "plain Mamba-1"
    assert memory.names_of(["a", "b"], "c") == {"model": "a", "model_2": "b", "plain": "c"}
    with torch.no_grad():
        before = memory.describe_model("remamba", model)["weights"]
        model.backbone.compressor.query[0].weight += 1
        assert memory.describe_model("remamba", model)["weights"] == before
        model.backbone.embeddings.weight += 1
        assert memory.describe_model("remamba", model)["weights"] != before


def test_models_of_one_kind_are_told_apart_by_their_folders(books, memmamba_folder, plain_folder, tmp_path):
    other = shutil.copytree(memmamba_folder, tmp_path / "other")
    output = tmp_path / "memory.json"
    few = ("--parts", "decode", "--decode-lengths", "8", "--plain-model", str(plain_folder))
    memory.main([*arguments(books, memmamba_folder, output, *few), "--model", str(memmamba_folder), str(other)])
    models = json.loads(output.read_text())["description"]["models"]
    labels = [f"MemMamba ({memmamba_folder.name})", "MemMamba (other)", "plain Mamba-1"]
    assert [model["label"] for model in models.values()] == labels


def test_plain_checkpoint_is_read_as_by_transformers(plain_folder):
    model = load_model(str(plain_folder), "cpu")
    assert plain_reading(model) == {"compress_prompt": False}
    ids = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = MambaForCausalLM.from_pretrained(plain_folder).eval()(ids).logits
        torch.testing.assert_close(model(ids, **plain_reading(model)).logits, wanted, atol=1e-5, rtol=1e-5)
    assert plain_reading(tiny_memmamba()) == {}


def fake_results():
    def recall(model, column, value, rights, others):
        records = [{"depth": (n + 0.5) / 10, "right": n < rights} for n in range(10)]
        summary = {"samples": 10, "right": rights, "accuracy": rights / 10, "interval": (0.0, 1.0), "other": others}
        return {"model": model, column: value, **summary, "records": records}

    def losses(model, length, values):
        return {"model": model, "length": length, **memory_tasks.summarize_losses(values)}

    models = {"model": {"label": "MemMamba"}, "plain": {"label": "plain Mamba-1"}}
    settings = {
        "lengths": [1024, 409_600],
        "document_counts": [10],
        "perplexity_lengths": [4096, 61_440],
        "decode_lengths": [1024],
        "reference_length": 4096,
        "keys": 1,
        "distractors": 2,
    }
    return {
        "settings": settings,
        "description": {"models": models},
        "passkey": [recall("model", "length", 1024, 10, 0), recall("plain", "length", 409_600, 4, 3)],
        "documents": [recall("plain", "noise", 10, 9, 1)],
        "perplexity": [
            losses("model", 4096, [[2.0], [3.0]]),
            losses("model", 61_440, [[2.0], [3.1]]),
            losses("plain", 4096, [[2.0], [3.0]]),
            losses("plain", 61_440, [[math.inf], [3.0]]),
        ],
        "decode": [{"model": "model", "length": 1024, "state_bytes": 3072, "seconds_per_token": 0.0015}],
    }


def test_tables_say_what_the_cells_hold():
    lines = memory_report.markdown_tables(fake_results()).splitlines()
    assert lines[0] == "| exact match, %, by tokens | 1k | 400k |"
    assert "| MemMamba | 100 (72-100) |  |" in lines
    assert "| plain Mamba-1 |  | 40 (17-69) |" in lines
    assert "| plain Mamba-1, somebody else's number |  | 30 (11-60) |" in lines
    assert "| 30-40 % |  | 100 |" in lines
    assert "| 40-50 % |  | 0 |" in lines
    assert "| plain Mamba-1 | 90 (60-98) |" in lines
    assert f"| MemMamba | {math.exp(2.5):.2f} | {math.exp(2.55):.2f} |" in lines
    assert "| plain Mamba-1 | 12.18 | INF |" in lines
    half = 1.96 * 0.05
    interval = f"{math.exp(0.05 - half):.3f}-{math.exp(0.05 + half):.3f}"
    assert f"| MemMamba, ratio to 4k | 1.000 | {math.exp(0.05):.3f} ({interval}) |" in lines
    assert "| plain Mamba-1, ratio to 4k | 1.000 | INF |" in lines
    assert "| MemMamba, state, KiB | 3.0 |" in lines
    assert "| MemMamba, ms a token | 1.50 |" in lines


def test_plots_are_drawn_of_what_there_is(tmp_path):
    pytest.importorskip("matplotlib")
    memory_report.draw_plots(fake_results(), tmp_path)
    drawn = {"passkey", "depths_model", "depths_plain", "documents", "perplexity"}
    assert {path.name for path in tmp_path.iterdir()} == {f"memory_{name}.png" for name in drawn}
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())
    (tmp_path / "none").mkdir()
    memory_report.draw_plots({**fake_results(), **{part: [] for part in memory.PARTS}}, tmp_path / "none")
    assert not list((tmp_path / "none").iterdir())
