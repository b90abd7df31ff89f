# SPDX-License-Identifier: Apache-2.0
import gzip
import json
from pathlib import Path

import pytest

datasets = pytest.importorskip("datasets")

from remamba_hf.training import PromptResponseCollator, instruction_data  # noqa: E402
from remamba_hf.training.book_tokens import train_book_tokenizer  # noqa: E402
from remamba_hf.training.instruction_data import (  # noqa: E402
    InstructionDataError,
    LengthRule,
    pair_of,
    read_pairs,
    split_by_content,
    tokenize_pairs,
)

DATA = Path(__file__).parent / "data"
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if m.role == 'assistant' %}<|endoftext|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_book_tokenizer(["Where does the river end? In the sea. Name a bird. A wren or an owl."], vocab_size=300)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def write(path: Path, records: list[object]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in records))
    return path


def many(count: int) -> list[object]:
    return [{"prompt": f"What is {number} and one?", "response": str(number + 1)} for number in range(count)]


def test_known_columns_make_pairs():
    pairs = read_pairs(DATA / "instructions.jsonl")
    assert pairs["prompt"][:] == ["Name a bird.", "Which is larger?\n\nA hen or a swan.", "Name a bird."]
    assert pairs["response"][:] == ["A wren.", "The swan.", "An owl."]
    for record, expected in (
        ({"prompt": "p", "completion": "r"}, ("p", "r")),
        ({"system_prompt": "s", "question": "p", "response": "r", "id": 1}, ("p", "r")),
        ({"context": "c", "query": "q", "answer": "r"}, ("c\n\nq", "r")),
    ):
        pair = pair_of(record)
        assert (pair["prompt"], pair["response"]) == expected
    assert pair_of({"a": "x", "b": "y", "c": "z"}, columns=(("b", "a"), "c"))["prompt"] == "y\n\nx"


def test_messages_become_what_the_template_makes_of_them(tokenizer):
    tokenizer.chat_template = TEMPLATE
    pairs = read_pairs(DATA / "messages.jsonl", tokenizer=tokenizer)
    assert pairs[0]["prompt"] == "[system]Be brief.\n[user]Where does the river end?\n[assistant]"
    assert pairs[0]["response"] == "In the sea.<|endoftext|>\n"
    assert pairs[1]["prompt"].endswith("[assistant]Ada.<|endoftext|>\n[user]And the inn?\n[assistant]")
    for row in tokenize_pairs(pairs, tokenizer):
        assert row["response_ids"].count(tokenizer.eos_token_id) == 1, "the template's end is not doubled"
    tokenizer.chat_template = TEMPLATE.replace("[assistant]", "[answer]")
    with pytest.raises(InstructionDataError, match=r"messages\.jsonl:1: the chat template does not open"):
        read_pairs(DATA / "messages.jsonl", tokenizer=tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(InstructionDataError, match="chat template"):
        read_pairs(DATA / "messages.jsonl", tokenizer=tokenizer)


def test_rows_are_the_text_and_an_end(tokenizer):
    rows = tokenize_pairs(read_pairs(DATA / "instructions.jsonl"), tokenizer)
    assert tokenizer.decode(rows[1]["prompt_ids"]) == "Which is larger?\n\nA hen or a swan."
    assert rows[1]["response_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(rows[1]["response_ids"][:-1]) == "The swan."
    batch = PromptResponseCollator(tokenizer.pad_token_id)([rows[0], rows[1]])
    assert batch["prompt_lengths"].tolist() == [len(rows[0]["prompt_ids"]), len(rows[1]["prompt_ids"])]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".parquet"])
def test_other_files_hold_the_same(tmp_path, suffix):
    records = many(5)
    path = tmp_path / f"data{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_list(records).to_parquet(path)
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode()))
    assert read_pairs(path)["response"][:] == ["1", "2", "3", "4", "5"]
    assert read_pairs(tmp_path)["response"][:] == ["1", "2", "3", "4", "5"], "of a folder"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "p", "resp', "cannot be read"),
        ("[1]", "no JSON object"),
        ({"prompt": "p", "response": " "}, "'response' is empty"),
        ({"prompt": 3, "response": "r"}, "'prompt' is no text"),
        ({"prompt": "p"}, "are none of"),
        ({"messages": [{"role": "user", "content": "q"}]}, "two or more"),
        ({"messages": [{"role": "user", "content": "q"}] * 2}, "must be the assistant's"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_lines_are_named(tmp_path, line, message, streaming):
    path = write(tmp_path / "bad.jsonl", [*many(2), "", line, *many(1)])
    with pytest.raises(InstructionDataError, match=rf"bad\.jsonl:4.*{message}"):
        list(read_pairs(path, streaming=streaming))


def test_empty_texts_are_skipped_only_if_asked(tmp_path):
    path = write(tmp_path / "holes.jsonl", [*many(2), {"prompt": "p", "response": ""}])
    assert len(read_pairs(path, skip_empty=True)) == 2


@pytest.mark.parametrize("lines", [[], ["", "  "], ['{"prompt": "", "response": "r"}']], ids=["empty", "blank", "skipped"])
def test_files_without_any_pair(tmp_path, lines):
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with pytest.raises(InstructionDataError, match=r"a.jsonl has no pair of a prompt and a response: give files"):
        read_pairs(tmp_path / "a.jsonl", skip_empty=True)


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(InstructionDataError, match="no file or folder"):
        read_pairs(tmp_path / "nothing.jsonl")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InstructionDataError, match=r"end with \.jsonl"):
        read_pairs(tmp_path / "notes.txt")
    whole = gzip.compress(b'{"prompt": "p", "response": "r"}\n' * 100)
    (tmp_path / "half.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InstructionDataError, match=r"half\.jsonl\.gz cannot be read on"):
        read_pairs(tmp_path / "half.jsonl.gz")


def test_long_prompts_lose_what_follows_their_head():
    rule = LengthRule(max_tokens=20, prompt_head=5)
    prompt = list(range(100, 130))
    assert rule.fit(prompt, [1] * 4) == [*prompt[:5], *prompt[-11:]]
    assert rule.fit(prompt[:16], [1] * 4) == prompt[:16], "fits exactly"
    assert rule.fit(prompt[:17], [1] * 4) == [*prompt[:5], *prompt[6:17]]
    assert LengthRule(20, 1000).fit(prompt, [1] * 4) == [*prompt[:8], *prompt[-8:]], "half of the room at most"
    assert rule.fit(prompt, [1] * 11) is None, "a response is never cut"
    assert rule.fit([], [1]) is None
    paper = LengthRule()
    cut = paper.fit(list(range(9000)), [0] * 100)
    assert len(cut) == 5900
    assert cut[:1000] == list(range(1000))
    assert cut[1000] == 4100


def test_rows_that_are_left_out_and_cut_ones(tmp_path, tokenizer):
    long = "word " * 40
    path = write(tmp_path / "long.jsonl", [*many(1), {"prompt": long, "response": "r"}, {"prompt": "p", "response": long}])
    rows = tokenize_pairs(read_pairs(path), tokenizer, LengthRule(32))
    assert rows["cut"][:] == [False, True]
    assert len(rows[1]["prompt_ids"]) + len(rows[1]["response_ids"]) == 32
    with pytest.raises(InstructionDataError, match="None of 3 pairs is left"):
        tokenize_pairs(
            read_pairs(write(tmp_path / "all.jsonl", [{"prompt": "p", "response": long}] * 3)), tokenizer, LengthRule(8)
        )


def test_tokens_are_cached_by_content(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "data.jsonl", many(20))
    first = tokenize_pairs(read_pairs(path), tokenizer)

    def fail(*_args, **_kwargs):
        raise AssertionError("tokenized again")

    with monkeypatch.context() as patched:
        patched.setattr(instruction_data, "tokenize_batch", fail)
        patched.setattr(instruction_data, "read_records", fail)
        tokenizer(["used", "with", "padding"], padding=True, truncation=True, max_length=2)  # changes the tokenizer's state
        again = tokenize_pairs(read_pairs(write(tmp_path / "moved.jsonl", many(20))), tokenizer)
        assert again._fingerprint == first._fingerprint
        assert again[3] == first[3]
        with pytest.raises(Exception, match="tokenized again"):
            tokenize_pairs(read_pairs(path), tokenizer, LengthRule(100))
    assert tokenize_pairs(read_pairs(write(path, many(21))), tokenizer)._fingerprint != first._fingerprint


def test_splits_follow_the_text_alone(tmp_path, tokenizer):
    records = many(200)
    training, held_out = split_by_content(tokenize_pairs(read_pairs(write(tmp_path / "a.jsonl", records)), tokenizer), 0.2)
    assert len(training) + len(held_out) == 200
    assert 20 < len(held_out) < 60
    shuffled = [*many(300)[200:], *reversed(records), *records[:50]]
    rows = tokenize_pairs(read_pairs(write(tmp_path / "b.jsonl", shuffled)), tokenizer)
    others = split_by_content(rows, 0.2)
    assert set(held_out["group"]) <= set(others[1]["group"])
    assert not set(others[0]["group"]) & set(others[1]["group"])
    with pytest.raises(InstructionDataError, match="leaves 350 and 0"):
        split_by_content(rows, 1e-9)


def test_rows_of_a_group_stay_together(tmp_path, tokenizer):
    records = [{**record, "book": number // 10} for number, record in enumerate(many(200))]
    rows = tokenize_pairs(read_pairs(write(tmp_path / "a.jsonl", records), group="book"), tokenizer)
    parts = split_by_content(rows, 0.3)
    assert not set(parts[0]["group"]) & set(parts[1]["group"])
    assert all(len(part) % 10 == 0 for part in parts)
    with pytest.raises(InstructionDataError, match=r"a\.jsonl:1: there is no column 'author'"):
        read_pairs(tmp_path / "a.jsonl", group="author")


def test_streams_give_what_files_give(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", many(100))
    whole = split_by_content(tokenize_pairs(read_pairs(path), tokenizer), 0.2)
    stream = split_by_content(tokenize_pairs(read_pairs(path, streaming=True), tokenizer), 0.2)
    for one, other in zip(whole, stream, strict=True):
        assert list(one) == list(other)


def test_hub_datasets_read_like_files(tmp_path, tokenizer, monkeypatch):
    """What `load_dataset` gives is stood in for: the tests have no network."""
    records = datasets.Dataset.from_list([*many(3), {"prompt": "p", "response": ""}])

    def load(name, revision, split, streaming):
        assert (name, revision, split) == ("owner/data", "main", "train")
        return records.to_iterable_dataset() if streaming else records

    monkeypatch.setattr(instruction_data, "load_dataset", load)
    for streaming in (False, True):
        how = dict(revision="main", streaming=streaming)
        assert [pair["response"] for pair in read_pairs("owner/data", skip_empty=True, **how)] == ["1", "2", "3"]
        with pytest.raises(InstructionDataError, match="owner/data, row 3: column 'response' is empty"):
            list(read_pairs("owner/data", **how))


def test_a_tokenizer_without_an_end(tokenizer):
    pairs = read_pairs(DATA / "instructions.jsonl")
    tokenizer.eos_token, kept = None, tokenizer.eos_token
    try:
        with pytest.raises(InstructionDataError, match="no eos_token"):
            tokenize_pairs(pairs, tokenizer)
    finally:
        tokenizer.eos_token = kept
