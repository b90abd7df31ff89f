# SPDX-License-Identifier: Apache-2.0
import json
from collections import Counter

import pytest

datasets = pytest.importorskip("datasets")

from remamba_hf.training.book_tokens import train_book_tokenizer  # noqa: E402
from remamba_hf.training.instruction_data import InstructionDataError, LengthRule  # noqa: E402
from remamba_hf.training.long_orca import LongOrcaRule, long_orca  # noqa: E402

RULE = LongOrcaRule(general=20, long=10, general_tokens=60, long_tokens=61, long_prompt=30, fit=LengthRule(64, 16))


@pytest.fixture(scope="module")
def tokenizer():
    return train_book_tokenizer(["word word word word answer answer question"], vocab_size=300)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def orca(number, words):
    return {"id": str(number), "system_prompt": "Think.", "question": f"{number}" + " word" * words, "response": "answer"}


@pytest.fixture
def sources(tmp_path):
    """Of OpenOrca 40 short pairs, 30 long ones and 20 that are too long; of LongAlpaca short, long and very long ones."""
    open_orca, long_alpaca = tmp_path / "orca", tmp_path / "alpaca.jsonl"
    open_orca.mkdir()
    pairs = [orca(1000 + number, 5 if number < 40 else 40 if number < 70 else 80) for number in range(90)]
    for part in range(2):
        (open_orca / f"{part}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs[part::2]))
    alpaca = [
        {"instruction": f"{number}" + " word" * words, "output": "answer", "file": ""}
        for number, words in enumerate((3, 45, 90))
    ]
    long_alpaca.write_text("".join(json.dumps(pair) + "\n" for pair in alpaca))
    return open_orca, long_alpaca


def test_parts_have_their_sizes_and_lengths(tokenizer, sources):
    rows = long_orca(tokenizer, *sources, RULE)
    assert Counter(rows["part"]) == {"general": 20, "long": 10, "alpaca": 2}
    for row in rows:
        prompt, response = row["prompt_ids"], row["response_ids"]
        assert response == [*tokenizer("answer", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if row["part"] == "general":
            assert len(prompt) + len(response) < 60
        elif row["part"] == "long":
            assert len(prompt) > 30
            assert len(prompt) + len(response) < 61
    first = tokenizer.decode(rows[0]["prompt_ids"])
    assert first.startswith("10"), "the question alone, without its system prompt"
    kept, cut = (row for row in rows if row["part"] == "alpaca")
    assert (kept["cut"], cut["cut"]) == (False, True)
    assert len(cut["prompt_ids"]) + len(cut["response_ids"]) == 64
    words = tokenizer("2" + " word" * 90, add_special_tokens=False)["input_ids"]
    room = 64 - len(cut["response_ids"])
    assert cut["prompt_ids"] == [*words[:16], *words[len(words) - (room - 16) :]]


def test_general_and_long_share_no_pair_and_general_is_a_fair_sample(tokenizer, sources):
    rows = long_orca(tokenizer, sources[0], None, RULE)
    groups = rows["group"][:]
    assert len(set(groups)) == len(groups)
    lengths = [len(row["prompt_ids"]) > 30 for row in rows if row["part"] == "general"]
    assert 0 < sum(lengths) < len(lengths), "short and long ones"


def test_the_choice_is_that_of_text_and_seed(tokenizer, sources, tmp_path):
    once = long_orca(tokenizer, *sources, RULE)
    merged = tmp_path / "merged.jsonl"
    lines = [line for file in sorted(sources[0].iterdir()) for line in file.read_text().splitlines(keepends=True)]
    merged.write_text("".join(reversed(lines)))
    assert list(long_orca(tokenizer, merged, sources[1], RULE)) == list(once)
    other = long_orca(tokenizer, *sources, LongOrcaRule(**{**vars(RULE), "seed": 1}))
    assert set(other["group"]) != set(once["group"])


def test_missing_sources_and_parts(tokenizer, sources, tmp_path):
    with pytest.raises(InstructionDataError, match="Give OpenOrca, LongAlpaca or both"):
        long_orca(tokenizer, None, None, RULE)
    with pytest.raises(InstructionDataError, match="No pair meets"):
        long_orca(tokenizer, None, sources[1], LongOrcaRule(long_prompt=500))
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"text": "x"}) + "\n")
    with pytest.raises(InstructionDataError, match=r"bad\.jsonl:1: column 'question' is missing"):
        long_orca(tokenizer, bad, None, RULE)


def test_pairs_without_text_are_left_out(tokenizer, tmp_path):
    path = tmp_path / "holes.jsonl"
    path.write_text(json.dumps(orca(1, 3)) + "\n" + json.dumps({**orca(2, 3), "response": ""}) + "\n")
    assert len(long_orca(tokenizer, path, None, RULE)) == 1
