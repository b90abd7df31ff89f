# SPDX-License-Identifier: Apache-2.0
"""Books of folders and of datasets, and those that cannot be read."""

import argparse
import json

import numpy as np
import pytest

from remamba_hf.evaluation import books as books_module
from remamba_hf.evaluation import memory
from remamba_hf.evaluation.books import add_book_options, joined, open_books
from remamba_hf.training.book_tokens import encode_text, read_book

BOOKS = ["Of the river little was said.\r\nThey went by the old road.\n" * 4, "Of the house.\n", "Of the garden.\n"]


def opened(source, tokenizer, *more):
    parser = argparse.ArgumentParser()
    add_book_options(parser)
    return open_books(parser.parse_args(["--books", str(source), *more]), tokenizer)


def ids_of(texts, tokenizer):
    return [encode_text(text.replace("\r\n", "\n"), tokenizer).tolist() for text in texts]


def jsonl_dataset(folder, texts, name="test.jsonl", column="text"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps({"short_book_title": "A", column: text}) + "\n" for text in texts))
    return folder


def test_folder_of_files(prepared, tmp_path):
    tokenizer, _ = prepared
    for number, text in enumerate(BOOKS):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    found = opened(tmp_path, tokenizer)
    assert [ids.tolist() for ids in found.ids] == ids_of(BOOKS, tokenizer)
    assert found.description() == {"books": ["0.txt", "1.txt", "2.txt"]}
    end = tokenizer.eos_token_id
    assert joined(found.ids, end).tolist() == [token for ids in ids_of(BOOKS, tokenizer) for token in (*ids, end)]
    assert opened(tmp_path, tokenizer, "--most-books", "3").description() == found.description()
    some = opened(tmp_path, tokenizer, "--most-books", "2")
    assert some.description() == {"books": ["0.txt", "1.txt"], "first_books": 2}
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \.txt book"):
        opened(tmp_path / "empty", tokenizer)


def test_dataset_in_a_folder(prepared, tmp_path):
    pytest.importorskip("datasets")
    tokenizer, _ = prepared
    folder = jsonl_dataset(tmp_path / "set", BOOKS)
    jsonl_dataset(folder, BOOKS[:1], "validation.jsonl")
    found = opened(folder, tokenizer)
    assert [ids.tolist() for ids in found.ids] == ids_of(BOOKS, tokenizer)
    assert found.description() == {
        "books": ["0", "1", "2"],
        "dataset": {"id": "set", "split": "test", "revision": None},
    }
    assert len(opened(folder, tokenizer, "--books-split", "validation").ids) == 1
    assert opened(folder, tokenizer, "--most-books", "2").description()["first_books"] == 2
    assert opened(folder, tokenizer, "--most-books", "3").are_all
    with pytest.raises(ValueError, match=r"set has no \.txt book, and split 'nothing' of a dataset.*cannot be read"):
        opened(folder, tokenizer, "--books-split", "nothing")


def test_parquet_as_the_hub_converts_it(prepared, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    tokenizer, _ = prepared
    (tmp_path / "default" / "test").mkdir(parents=True)
    parquet.write_table(pyarrow.table({"text": BOOKS}), tmp_path / "default" / "test" / "0000.parquet")
    assert [ids.tolist() for ids in opened(tmp_path, tokenizer).ids] == ids_of(BOOKS, tokenizer)


def test_dataset_of_the_hub(prepared, monkeypatch):
    datasets = pytest.importorskip("datasets")
    tokenizer, _ = prepared
    asked = []

    def load_dataset(name, split, revision, streaming):
        asked.append((name, split, revision, streaming))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found pg19.py")
        return iter({"text": text} for text in BOOKS * 50)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(books_module, "_commit", lambda name, revision: f"commit of {revision}")
    found = opened("deepmind/pg19", tokenizer, "--most-books", "2")
    converted = "refs/convert/parquet"
    assert asked == [("deepmind/pg19", "test", revision, True) for revision in (None, converted)]
    assert [ids.tolist() for ids in found.ids] == ids_of(BOOKS[:2], tokenizer)
    assert found.source == {"id": "deepmind/pg19", "split": "test", "revision": f"commit of {converted}"}
    assert not found.are_all
    found = opened("deepmind/pg19", tokenizer, "--books-revision", "v1")
    assert found.description()["first_books"] == len(found.ids) == books_module.MOST_BOOKS
    assert asked[-1] == ("deepmind/pg19", "test", "v1", True)


def test_commit_is_asked_of_the_hub(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    class Api:
        def dataset_info(self, name, revision):
            return argparse.Namespace(sha=f"{name} {revision}")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert books_module._commit("deepmind/pg19", "v1") == "deepmind/pg19 v1"


def test_results_name_the_dataset(memmamba_folder, books, tmp_path):
    pytest.importorskip("datasets")
    folder = jsonl_dataset(tmp_path / "set", [path.read_text() for path in sorted(books.iterdir())])
    more = ["--lengths", "192", "--samples", "2", "--digits", "3", "--device", "cpu"]
    for name, source in (("set", folder), ("books", books)):
        output = ["--output", str(tmp_path / f"{name}.json")]
        memory.main(["--model", str(memmamba_folder), "--data", str(source), *output, *more], None, ["passkey"])
    of_set, of_files = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("set", "books"))
    assert of_set["description"]["dataset"] == {"id": "set", "split": "test", "revision": None}
    assert of_set["passkey"] == of_files["passkey"], "the same books from either"


@pytest.mark.parametrize(
    ("texts", "column", "message"),
    [(["a", " \n"], "text", "row 1 has no text"), (["a"], "content", "row 0 has no text in its column 'text'; it has")],
)
def test_rows_without_a_book_are_refused(prepared, tmp_path, texts, column, message):
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match=message):
        opened(jsonl_dataset(tmp_path / "set", texts, column=column), prepared[0])


def test_what_is_neither_folder_nor_dataset(prepared, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_, **__):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'no/such' doesn't exist on the Hub or cannot be accessed.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"there is no folder no/such, and split 'test' of a dataset.*doesn't exist"):
        opened("no/such", prepared[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"1\.txt is empty"),
        (b" \r\n\n", r"1\.txt is empty"),
        (b"a" * 20_000 + b"\xff\xfe", r"1\.txt is no UTF-8: byte 0xff at offset 20000"),
    ],
)
def test_books_that_cannot_be_read_are_named(prepared, tmp_path, content, message):
    (tmp_path / "0.txt").write_text("A book.\n")
    (tmp_path / "1.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, prepared[0])


def test_line_ends_become_those_of_unix(tmp_path):
    (tmp_path / "0.txt").write_bytes("A – b\r\nc\r\n".encode())
    assert read_book(tmp_path / "0.txt") == "A – b\nc\n"


def test_large_vocabularies_have_ids_of_their_own_size(tmp_path):
    """Those of Llama 3 and Qwen do not fit into 16 bits."""

    class Tokenizer:
        def __init__(self, size):
            self.size = size

        def __len__(self):
            return self.size

        def __call__(self, pieces, **options):
            return {"input_ids": [[self.size - 1, 3] for _ in pieces]}

    (tmp_path / "book.txt").write_text("A line.\nAnother line.\n")
    options = argparse.Namespace(books=str(tmp_path), most_books=None)
    for size, dtype in ((65_536, np.uint16), (128_256, np.uint32)):
        books = open_books(options, Tokenizer(size))
        assert books.ids[0].tolist() == [size - 1, 3]
        assert joined(books.ids, end=2).dtype == dtype
