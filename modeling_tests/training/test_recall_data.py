# SPDX-License-Identifier: Apache-2.0
import hashlib
import re

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
    text = ' In 1815, she said:\n\n  "4821--yes"\t\n'
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


class Characters:
    """A tokenizer whose ids no library decides."""

    eos_token_id, pad_token_id = 0, 1

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [ord(character) for character in text]}


def test_samples_are_those_that_models_were_trained_on():
    text = "".join(
        f"Of the {place} and its people little was {verb}.\nThey went by the old road.\n\n"
        for place in ("river", "house", "garden", "village")
        for verb in ("said", "known", "written", "told", "kept")
    )
    sampler = RecallSampler(np.array([ord(character) for character in text * 20], dtype=np.uint16), Characters(), seed=11)
    hashed = hashlib.sha256()
    cases = ((0, 400, 0, None), ((3, 1), 900, 4, 0.25), ((7,), 300, 1, 1.0), (5, 5000, 9, None), (2, 190, 1, 0.5))
    for case in cases:
        sample = sampler.sample(*case)
        hashed.update(sample.prompt_ids.astype("<i8").tobytes())
        hashed.update(sample.answer_ids.astype("<i8").tobytes())
        fields = sample.evidence, sample.digits, sample.name, sample.number, round(sample.depth, 9)
        hashed.update(repr(fields).encode())
    assert (sample.name, sample.number) == ("Caroline Hill", "32996")
    assert hashed.hexdigest() == "92d772836a9df17512c39322d32be0cce44a4ea3a9e93f2cc9fd60749e848d30"


@pytest.mark.parametrize("distractors", [0, 2])
def test_every_person_in_a_text_is_asked_for_by_name(sampler, prepared, distractors):
    tokenizer, _ = prepared
    for index in range(10):
        text = sampler.text(index, 700, keys=3, distractors=distractors)
        words = tokenizer.decode(text.text_ids)
        assert len({fact.name for fact in text.asked}) == len(text.asked) == 3
        assert max(len(text.prompt_ids(key)) for key in range(3)) == 700
        assert len(text.other_numbers) == distractors
        assert words.endswith("\n")
        for number in text.other_numbers:
            assert f" {number}" in words
        for key, fact in enumerate(text.asked):
            assert text.prompt_ids(key)[: len(text.text_ids)].tolist() == text.text_ids.tolist()
            assert words.count(fact.name) == 1
            evidence = tokenizer.decode(text.text_ids[slice(*fact.evidence)])
            assert evidence.startswith(" " + fact.name)
            assert evidence.endswith(" " + fact.number)
            assert tokenizer.decode(text.text_ids[slice(*fact.digits)]) == fact.number
            question = tokenizer.decode(fact.question_ids)
            assert fact.name in question
            assert question.startswith("\nQuestion: ")
            assert question.endswith("\nAnswer:")
            assert tokenizer.decode(fact.answer_ids) == f" {fact.number}{tokenizer.eos_token}"


def test_text_of_one_person_is_the_sample(sampler):
    sample, text = sampler.sample((4, 2), 500, 3, depth=0.4), sampler.text((4, 2), 500, 1, 3, [0.4])
    assert text.prompt_ids().tolist() == sample.prompt_ids.tolist()
    assert (text.asked[0].evidence, text.asked[0].number) == (sample.evidence, sample.number)


def test_facts_of_a_text_stand_at_the_asked_depths(sampler):
    depths = [0.9, 0.1, 0.5, 0.5]
    text = sampler.text(1, 1500, keys=4, distractors=2, depths=depths)
    assert [fact.depth for fact in text.asked] == pytest.approx(depths, abs=0.03)
    assert [fact.digits[0] / 1500 for fact in text.asked] == pytest.approx(depths, abs=0.1)


def test_documents_are_numbered_and_one_holds_the_fact(sampler, prepared):
    tokenizer, _ = prepared
    for holder in range(7):
        text = sampler.documents(3, 6, distractors=2, depth=(holder + 0.5) / 7, document_length=80)
        words = tokenizer.decode(text.text_ids)
        assert words.startswith("\nDocument 1\n")
        documents = [part.split("\n", 1) for part in words.split("\nDocument ")[1:]]
        assert [number for number, _ in documents] == [str(number + 1) for number in range(7)]
        holders = [index for index, (_, body) in enumerate(documents) if text.asked[0].name in body]
        assert holders == [holder]
        others = [index for number in text.other_numbers for index, (_, body) in enumerate(documents) if number in body]
        assert len({*others, holder}) == 3, "every fact in a document of its own"
        for index, (_, body) in enumerate(documents):
            assert body.endswith(".\n")
            assert ("secret" in body) == (index in {*others, holder})
            assert 20 < len(tokenizer(body)["input_ids"]) <= (160 if index in {*others, holder} else 80)
        assert tokenizer.decode(text.text_ids[slice(*text.asked[0].digits)]) == text.asked[0].number
        assert tokenizer.decode(text.text_ids[slice(*text.asked[0].evidence)]).startswith(" " + text.asked[0].name)
        assert text.asked[0].depth == pytest.approx((holder + 0.5) / 7, abs=0.1)
        assert tokenizer(words)["input_ids"] == text.text_ids.tolist(), "the ids are those of the text"


def test_documents_can_be_made_again_and_hold_other_passages(sampler, prepared):
    tokenizer, tokens = prepared
    again = RecallSampler(tokens, tokenizer, seed=3)
    first = sampler.documents((8, 1), 12)
    assert again.documents((8, 1), 12).text_ids.tolist() == first.text_ids.tolist()
    assert again.documents((8, 2), 12).text_ids.tolist() != first.text_ids.tolist()
    bodies = tokenizer.decode(first.text_ids).split("\nDocument ")[1:]
    assert len({body.split("\n", 1)[1] for body in bodies}) == 13
    crowded = tokenizer.decode(sampler.documents(9, 12, distractors=12).text_ids).split("\nDocument ")[1:]
    assert [("secret" in body) for body in crowded] == [True] * 13, "every fact in a document of its own"


def test_lines_longer_than_a_document_are_cut(prepared):
    tokenizer, _ = prepared
    words = tokenizer("word " * 40)["input_ids"]
    newline = tokenizer("\n")["input_ids"][0]
    sampler = RecallSampler(np.array([*words, newline, *words] * 4, dtype=np.uint16), tokenizer)
    for index in range(20):
        passage = sampler._passage(np.random.default_rng(index), 9)
        assert 1 < len(passage) <= 9
        assert passage[-1] == newline
        assert newline not in (passage[0], passage[-2])


def test_fact_stands_at_the_asked_depth(sampler):
    for depth in (0.0, 0.25, 0.5, 1.0):
        sample = sampler.sample(1, 1000, 0, depth=depth)
        assert sample.depth == pytest.approx(depth, abs=0.04)
        assert sample.digits[0] / 1000 == pytest.approx(depth, abs=0.06)


def test_prompts_that_cannot_be_made_are_refused(sampler):
    with pytest.raises(ValueError, match="longer prompts"):
        sampler.sample(0, 30, 3)
    with pytest.raises(ValueError, match="fewer than"):
        sampler.sample(0, 10_000_000)
    with pytest.raises(ValueError, match="fewer keys or distractors"):
        sampler.text(0, 4000, keys=2, distractors=400)
    with pytest.raises(ValueError, match="documents without the fact"):
        sampler.documents(0, 3, distractors=4)
    with pytest.raises(ValueError, match="too few for passages"):
        sampler.documents(0, 3, document_length=10_000_000)


def test_numbers_of_a_tokenizer_that_joins_digits():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    joining = Tokenizer(models.BPE())
    joining.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    joining.decoder = decoders.ByteLevel()
    numbers = " ".join(str(number) for number in range(10_000, 100_000, 3))
    joining.train_from_iterator(
        [numbers],
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<end>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=joining, eos_token="<end>", pad_token="<end>")
    book = np.asarray(tokenizer("A line of a book.\n" * 300)["input_ids"], dtype=np.uint16)
    sampler = RecallSampler(book, tokenizer, seed=0)
    widths = set()
    for index in range(20):
        text = sampler.text(index, 400, keys=2, distractors=1)
        for fact in text.asked:
            digits = text.text_ids[slice(*fact.digits)]
            widths.add(len(digits))
            assert tokenizer.decode(digits).strip() == fact.number
            assert tokenizer.decode(fact.answer_ids).removesuffix("<end>").strip() == fact.number
            assert f"{fact.name}" in tokenizer.decode(text.text_ids[slice(*fact.evidence)])
        other = tokenizer.decode(text.text_ids[slice(*text.other_digits[0])]).strip()
        assert other == text.other_numbers[0]
        documents = tokenizer.decode(sampler.documents(index, 12, document_length=40).text_ids)
        assert "\nDocument 1\n" in documents
        assert "\nDocument 13\n" in documents
    assert len(widths) > 1, "numbers of different widths in tokens"
    with pytest.raises(ValueError, match="every digit"):
        RecallSampler(book, tokenizer, seed=0, noise=0.1)


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
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


def test_noise_replaces_a_share_of_the_book_and_nothing_else(prepared):
    tokenizer, tokens = prepared
    clean, noisy = (RecallSampler(tokens, tokenizer, seed=3, noise=noise) for noise in (0.0, 0.1))
    everything = np.concatenate([tokens, *(part for fact in clean.facts for part in fact), *clean.first_names])
    everything = np.concatenate([everything, *clean.last_names, clean.digit_ids])
    seen, replaced, total = set(), 0, 0
    for index in range(20):
        text, other = clean.text(index, 600, 2, 1), noisy.text(index, 600, 2, 1)
        assert np.isin(text.text_ids, everything).all()
        for fact in other.asked:
            assert tokenizer.decode(other.text_ids[slice(*fact.digits)]) == fact.number
        body = other.text_ids
        differs = ~np.isin(body, everything)
        seen |= set(body[differs].tolist())
        replaced += int(differs.sum())
        total += len(body)
    assert 0.01 < replaced / total < 0.1, "half of the runs are of digits, and some of the book's tokens"
    assert len(seen) > 50
    assert not seen & set(tokenizer.all_special_ids)


def test_typography_becomes_plain(prepared):
    tokenizer, _ = prepared
    text = "“It’s” — naïve Æsop…\u00a0‘No’ – 1½ λόγος £2\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == "\"It's\" -- naive AEsop... 'No' - 11?2 ????? ?2\n"


def document_of(tokenizer, ids, padding):
    return tokenizer.decode(ids[ids != padding]).split("\nQuestion:")[0]


def test_several_questions_in_a_row(sampler, prepared):
    """Every row: its text, then question and answer of each person in turn; only answers are labelled."""
    level = RecallLevel((400, 512), questions=3, distractors=2)
    dataset = RecallDataset(sampler, [level], tokens_per_batch=1024, batches=10)
    orders = set()
    for index in range(4):
        batch = dataset[index]
        assert batch["questions"] == 3
        assert batch["input_ids"].shape[0] == 1024 // batch["prompt_length"]
        for ids, labels, numbers in zip(batch["input_ids"], batch["labels"], batch["numbers"], strict=True):
            answered = ids[labels != -100].tolist()
            assert torch.equal(ids[labels != -100], labels[labels != -100])
            assert len(answered) == 3 * 7
            planted = re.findall(r" (?:is|was) (\d{5})[.,]", document_of(prepared[0], ids, sampler.padding))
            assert prepared[0].decode(ids[numbers]) == "".join(planted)
            said = prepared[0].decode(ids[ids != sampler.padding])
            document, *dialogue = said.split("\nQuestion:")
            people = []
            for part in dialogue:
                question, answer = part.split("Answer: ")
                name = question.strip().rstrip("?.").split("number of ")[1]
                number = answer.split("<|endoftext|>")[0]
                people.append(name)
                assert f"{name} is {number}" in document or f"{name} was {number}" in document
            assert len(set(people)) == 3
            orders.add(tuple(sorted(people, key=document.index).index(name) for name in people))
    assert len(orders) > 1, "questions do not follow the order of the text"
    with pytest.raises(ValueError, match="several questions has no one prompt to compress"):
        RecallDataset(sampler, [RecallLevel((200,), questions=2, two_stage=0.5)], 1024, 1)
