# SPDX-License-Identifier: Apache-2.0
"""Books that texts are made of: a folder of .txt files, or a dataset of the Hub such as deepmind/pg19."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from remamba_hf.checkpoint_files import first_line
from remamba_hf.command_options import positive
from remamba_hf.training.book_tokens import encode_text, list_books, read_book

COLUMN = "text"  # of a dataset
MOST_BOOKS = 100  # of a dataset, unless told otherwise: all of PG-19's test split
_CONVERTED = "refs/convert/parquet"  # where the Hub has datasets as files that come as a script, which nobody runs any more


@dataclass(frozen=True)
class Books:
    """Books as tokens.

    Attributes:
        names: of each.
        ids: of each, as `encode_text` gives them.
        source: `id`, `split` and `revision` of a dataset; None for a folder of files.
        are_all: whether the folder, or the split, has no others.
    """

    names: list[str]
    ids: list[np.ndarray]
    source: dict[str, str | None] | None = None
    are_all: bool = True

    def description(self) -> dict[str, Any]:
        """What results say of them."""
        source = {} if self.source is None else {"dataset": self.source}
        return {"books": self.names, **source, **({} if self.are_all else {"first_books": len(self.names)})}


def joined(books: Sequence[np.ndarray], end: int) -> np.ndarray:
    """All books one after another, the token `end` after each."""
    behind = np.asarray([end], dtype=books[0].dtype)
    return np.concatenate([part for book in books for part in (book, behind)])


def add_book_options(parser: argparse.ArgumentParser) -> None:
    """What `open_books` goes by."""
    parser.add_argument(
        "--books",
        "--data",
        required=True,
        metavar="BOOKS",
        help="folder of .txt books, or a dataset with a column text: Hub id such as deepmind/pg19, or folder of its files",
    )
    parser.add_argument("--books-split", default="test", metavar="SPLIT", help="of a dataset (default: %(default)s)")
    parser.add_argument("--books-revision", metavar="REV", help="branch, tag or commit of a dataset")
    parser.add_argument(
        "--most-books",
        type=positive,
        metavar="N",
        help=f"read the first N only (default: all of a folder, {MOST_BOOKS} of a dataset)",
    )


def open_books(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Books:
    """Reads and encodes the books of a command with `add_book_options`.

    Raises:
        FileNotFoundError: a folder without books.
        ValueError: a book that is empty or no UTF-8, or a dataset that cannot be read.
    """
    folder = Path(options.books).expanduser()
    source, texts, count, are_all = None, None, options.most_books, True
    if not folder.exists() or _is_dataset(folder):
        count = count or MOST_BOOKS
        source, texts = _read_dataset(options.books, options.books_split, options.books_revision)
    else:
        paths = list_books(folder)
        count = count or len(paths)
        texts = ((path.name, read_book(path)) for path in paths)
    names: list[str] = []
    ids: list[np.ndarray] = []
    with tqdm(desc="encoding books", unit="book", total=count) as bar:
        for name, text in texts:
            if len(names) == count:
                are_all = False
                break
            names.append(name)
            ids.append(encode_text(text, tokenizer))
            bar.update()
    return Books(names, ids, source, are_all)


def _is_dataset(folder: Path) -> bool:
    if not folder.is_dir() or any(folder.glob("*.txt")):
        return False
    return any(path.suffix in (".parquet", ".jsonl", ".json") for path in folder.rglob("*"))


def _read_dataset(name: str, split: str, revision: str | None) -> tuple[dict[str, str | None], Iterator[tuple[str, str]]]:
    """What tells a dataset, and its books."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError('books of a dataset need the package datasets: pip install "remamba_hf[eval]"') from error
    folder = Path(name).expanduser()
    is_local = folder.is_dir()

    def load(revision: str | None) -> Any:
        return load_dataset(str(folder) if is_local else name, split=split, revision=revision, streaming=True)

    try:
        try:
            dataset = load(revision)
        except RuntimeError as error:
            if revision is not None or "scripts are no longer supported" not in str(error):
                raise
            revision = _CONVERTED
            dataset = load(revision)
        commit = None if is_local else _commit(name, revision)
    except (OSError, ValueError, RuntimeError) as error:
        lacks = f"{name} has no .txt book" if is_local else f"there is no folder {name}"
        raise ValueError(
            f"{lacks}, and split {split!r} of a dataset of that name cannot be read: {first_line(error)}"
        ) from error
    known_as = folder.resolve().name if is_local else name
    return {"id": known_as, "split": split, "revision": commit}, _rows(dataset, f"{name}, {split}")


def _commit(name: str, revision: str | None) -> str | None:
    """Of a dataset on the Hub, whose branches move."""
    from huggingface_hub import HfApi

    return HfApi().dataset_info(name, revision=revision).sha


def _rows(dataset: Any, place: str) -> Iterator[tuple[str, str]]:
    rows = 0
    for number, row in enumerate(dataset):
        text = row.get(COLUMN)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{place}, row {number} has no text in its column {COLUMN!r}; it has {', '.join(row)}")
        rows += 1
        yield f"{number}", text.replace("\r\n", "\n")
    if not rows:
        raise ValueError(f"{place} has no row")
