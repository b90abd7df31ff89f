# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from remamba_hf.training.book_tokens import encode_text, list_books, prepare_books, train_book_tokenizer
from remamba_hf.training.recall_data import RecallDataset, RecallLevel, RecallSampler

WORDS = "the river and a house of old stone where she had walked for years with him in the rain".split()


def book_text(seed: int, lines: int = 400) -> str:
    generator = np.random.default_rng(seed)
    text = []
    for _ in range(lines):
        line = " ".join(generator.choice(WORDS, size=generator.integers(3, 11)))
        text.append(line.capitalize() + "." + ("\n" if generator.random() < 0.2 else ""))
    return "\n".join(text) + "\n"


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    folder = tmp_path_factory.mktemp("books")
    for number in range(3):
        (folder / f"{number}.txt").write_text(book_text(number))
    (folder / "quoting.txt").write_text("A collection.\nWith a piece by JANE\nAUSTEN in it.\n" + book_text(9))
    return folder


@pytest.fixture(scope="module")
def prepared(books, tmp_path_factory):
    return prepare_books(books, tmp_path_factory.mktemp("data"), vocab_size=512, exclude="jane austen")


@pytest.fixture(scope="module")
def sampler(prepared):
    tokenizer, tokens = prepared
    return RecallSampler(tokens, tokenizer, seed=3)


def test_tokenizer_gives_texts_back_and_every_digit_a_token(prepared):
    tokenizer, _ = prepared
    text = " In 1815, she said:\n\n  “4821—yes”\t\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(tokenizer("48213")["input_ids"]) == 5
    assert set(tokenizer(text)) == {"input_ids", "attention_mask"}
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)


def test_pieces_of_a_book_have_the_ids_of_the_whole(prepared):
    tokenizer, _ = prepared
    text = book_text(5)
    pieces = encode_text(text, tokenizer, lines_per_piece=7)
    assert pieces.tolist() == tokenizer(text)["input_ids"]


def test_books_that_match_are_left_out(books):
    assert [path.name for path in list_books(books, "jane austen")] == ["0.txt", "1.txt", "2.txt"]
    with pytest.raises(FileNotFoundError, match="one UTF-8 text file per book"):
        list_books(books, ".")


def test_prepared_tokens_are_taken_from_the_cache(books, tmp_path):
    _, first = prepare_books(books, tmp_path / "data", vocab_size=300, max_tokens=500)
    _, second = prepare_books(None, tmp_path / "data", vocab_size=300)
    assert len(first) == 500
    np.testing.assert_array_equal(first, second)
    with pytest.raises(ValueError, match="prepared with 300"):
        prepare_books(None, tmp_path / "data", vocab_size=301)
    with pytest.raises(FileNotFoundError, match="give a folder"):
        prepare_books(None, tmp_path / "none")


@pytest.mark.parametrize("distractors", [0, 3])
def test_sample_is_the_text_it_stands_for(sampler, prepared, distractors):
    tokenizer, _ = prepared
    for index in range(20):
        sample = sampler.sample(index, 600, distractors)
        text = tokenizer.decode(sample.prompt_ids)
        assert len(sample.prompt_ids) == 600
        assert tokenizer.decode(sample.prompt_ids[slice(*sample.digits)]) == sample.number
        evidence = tokenizer.decode(sample.prompt_ids[slice(*sample.evidence)])
        assert evidence.startswith(" " + sample.name)
        assert evidence.endswith(" " + sample.number)
        assert text.count(sample.name) == 2, "once in the fact, once in the question"
        assert text.endswith("\nAnswer:")
        assert tokenizer.decode(sample.answer_ids) == f" {sample.number}{tokenizer.eos_token}"
        assert text.count("secret") >= distractors + 2


def test_sample_ids_are_those_of_its_text(sampler, prepared):
    tokenizer, _ = prepared
    same = 0
    for index in range(20):
        sample = sampler.sample(index, 400, 1)
        # The first tokens are cut out of a word, and may be joined differently.
        same += tokenizer(tokenizer.decode(sample.prompt_ids))["input_ids"][-300:] == sample.prompt_ids[-300:].tolist()
    assert same == 20


def test_samples_depend_on_seed_and_index_only(sampler, prepared):
    tokenizer, tokens = prepared
    again = RecallSampler(tokens, tokenizer, seed=3)
    other = RecallSampler(tokens, tokenizer, seed=4)
    later = again.sample((7, 2), 300, 2)
    assert again.sample((7, 1), 300, 2).prompt_ids.tolist() == sampler.sample((7, 1), 300, 2).prompt_ids.tolist()
    assert later.prompt_ids.tolist() == sampler.sample((7, 2), 300, 2).prompt_ids.tolist()
    assert later.prompt_ids.tolist() != other.sample((7, 2), 300, 2).prompt_ids.tolist()


def test_fact_stands_at_the_asked_depth(sampler):
    for depth in (0.0, 0.25, 0.5, 1.0):
        sample = sampler.sample(1, 1000, 0, depth=depth)
        assert sample.depth == pytest.approx(depth, abs=0.04)
        assert sample.digits[0] / 1000 == pytest.approx(depth, abs=0.06)


def test_prompts_that_cannot_be_made_are_refused(sampler):
    with pytest.raises(ValueError, match="longer prompt_length"):
        sampler.sample(0, 30, 3)
    with pytest.raises(ValueError, match="fewer than"):
        sampler.sample(0, 10_000_000)


def test_tokenizer_that_joins_digits_is_refused(prepared):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    joined = Tokenizer(models.BPE())
    joined.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    joined.train_from_iterator(
        ["12 12 12 12"], trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    )
    with pytest.raises(ValueError, match="every digit"):
        RecallSampler(prepared[1], PreTrainedTokenizerFast(tokenizer_object=joined), seed=0)
    with pytest.raises(ValueError, match="at least 258"):
        train_book_tokenizer(["text"], vocab_size=100)


def test_batches_are_reproducible_and_aligned(sampler):
    levels = [
        RecallLevel((120,)),
        RecallLevel((256, 512), distractors=2, two_stage=1.0, ratio=(0.05, 0.5), min_kept=24),
    ]
    dataset = RecallDataset(sampler, levels, tokens_per_batch=1024, batches=10)
    assert dataset[0]["input_ids"].shape == (8, 128)
    assert not dataset[0]["compress_prompt"]
    dataset.set_level(1)
    for index in range(5):
        batch, again = dataset[index], dataset[index]
        length = batch["prompt_length"]
        assert torch.equal(batch["input_ids"], again["input_ids"])
        assert batch["compress_prompt"]
        assert batch["level"] == 1
        assert batch["input_ids"].shape[0] == 1024 // length
        assert batch["input_ids"].shape[1] % 8 == 0
        assert (batch["labels"][:, :length] == -100).all()
        assert torch.equal(batch["labels"][:, length : length + 7], batch["input_ids"][:, length : length + 7])
        assert (batch["labels"][:, length + 7 :] == -100).all()
        window = int(np.ceil(length * batch["compression_span"]))
        kept = int(np.ceil(window * batch["compression_ratio"]))
        assert window % 8 == 0
        assert kept % 8 == 0
        assert 24 <= kept <= window < length
