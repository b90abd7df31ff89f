# SPDX-License-Identifier: Apache-2.0
"""From a folder of plain-text books to a small byte-level BPE tokenizer and one array of token ids.

Both results are cached on disk, because a training run that is resumed must see the same tokens.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
# What is left of typography and foreign scripts: books in plain ASCII, as those that PG-19 trains on, teach a tokenizer
# nothing of them, and their bytes would be tokens that no model has seen.
PLAIN_TYPE = normalizers.Sequence(
    [
        normalizers.NFKD(),
        normalizers.StripAccents(),
        *(
            normalizers.Replace(sign, plain)
            for sign, plain in (
                *zip("“”„‘’‚", "\"\"\"'''", strict=True),
                *zip("—–−", ("--", "-", "-"), strict=True),
                *zip("æœÆŒß", ("ae", "oe", "AE", "OE", "ss"), strict=True),
            )
        ),
        normalizers.Replace(Regex(r"[^\x00-\x7F]"), "?"),
    ]
)


def list_books(folder: str | os.PathLike[str], exclude: str | None = None) -> list[Path]:
    """Lists the `.txt` files of `folder` by name, without the books whose text matches `exclude`.

    Args:
        folder: folder of UTF-8 text files, one book a file.
        exclude: regular expression such as an author's name, searched in the whole text without regard to case and
            line breaks: collections that quote the author at length name her somewhere, not on the title page.

    Raises:
        FileNotFoundError: no book is left.
    """
    paths = sorted(Path(folder).glob("*.txt"))
    if exclude is not None:
        pattern = re.compile(exclude, re.IGNORECASE)
        paths = [path for path in paths if not pattern.search(" ".join(read_book(path).split()))]
    if not paths:
        raise FileNotFoundError(f"no .txt book in {folder!s}: give a folder that holds one UTF-8 text file per book")
    return paths


def read_book(path: Path) -> str:
    """Returns the book's text with Unix line ends.

    Raises:
        ValueError: it is empty, or no UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}. Convert it, or leave it out"
        ) from error
    if not text.strip():
        raise ValueError(f"{path} is empty: put the book there, or leave it out")
    return text


def train_book_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE in which every digit is a token of its own.

    Nothing is put before or after a text: encoding a text gives its tokens only, and decoding them gives the text back, in
    plain ASCII: accents go, quotes and dashes become a typewriter's, and what has no such form becomes a question mark.
    Id 0 is the end-of-text token (also used as beginning of text), id 1 the padding.

    Args:
        texts: training texts, consumed once.
        vocab_size: number of tokens, the two special ones and the 256 bytes included; at least 258.

    Raises:
        ValueError: `vocab_size` has no room for the bytes.
    """
    if vocab_size < 258:
        raise ValueError(f"vocab_size is {vocab_size}; a byte-level tokenizer needs at least 258 (256 bytes, 2 special)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = PLAIN_TYPE
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        padding_side="left",
        model_max_length=1 << 20,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def sample_texts(paths: list[Path], characters: int, seed: int = 0) -> Iterator[str]:
    """Yields an equal share of `characters` from every book, cut at a random place of the book."""
    generator = np.random.default_rng([seed, 0])
    share = max(characters // len(paths), 1)
    for path in paths:
        text = read_book(path)
        start = int(generator.integers(0, max(len(text) - share, 0) + 1))
        yield text[start : start + share]


def encode_books(
    paths: list[Path], tokenizer: PreTrainedTokenizerBase, max_tokens: int | None = None, seed: int | None = 0
) -> np.ndarray:
    """Encodes whole books one after another, an end-of-text token after each.

    Args:
        paths: the books.
        tokenizer: tokenizer of at most 65,536 tokens.
        max_tokens: stop after this many tokens (the last book is cut); `None` takes all.
        seed: order of the books; `None` keeps the order given.

    Returns:
        Token ids, `uint16[tokens]`.
    """
    if len(tokenizer) > 1 << 16:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens; token files hold 16-bit ids, at most 65536")
    order = np.arange(len(paths)) if seed is None else np.random.default_rng([seed, 1]).permutation(len(paths))
    pieces: list[np.ndarray] = []
    count = 0
    for index in tqdm(order, desc="encoding books", unit="book"):
        if max_tokens is not None and count >= max_tokens:
            break
        ids = encode_text(read_book(paths[index]), tokenizer)
        pieces.append(np.append(ids, np.uint16(tokenizer.eos_token_id)))
        count += len(pieces[-1])
    return np.concatenate(pieces)[:max_tokens]


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase, lines_per_piece: int = 2000) -> np.ndarray:
    """Encodes one long text in pieces of whole lines, which keeps memory flat.

    A piece ends between two lines of one paragraph: there the pre-tokenizer splits anyway, so the ids are those of the
    whole text (it would not after a blank line, because it treats white space at the end of a text differently).

    Returns:
        Ids, `uint16[tokens]`; `uint32[tokens]` if the tokenizer has more than 65,536 of them.
    """
    lines = text.splitlines(keepends=True)
    pieces, start = [], 0
    while start < len(lines):
        end = min(start + lines_per_piece, len(lines))
        while end < len(lines) and not (lines[end][0].isalpha() and lines[end - 1][-2:-1].isalnum()):
            end += 1
        pieces.append("".join(lines[start:end]))
        start = end
    encoded = tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"] if pieces else []
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    return np.concatenate([np.asarray(ids, dtype=dtype) for ids in encoded] or [np.empty(0, dtype=dtype)])


def prepare_books(
    books: str | os.PathLike[str] | None,
    output: str | os.PathLike[str],
    vocab_size: int = 4096,
    max_tokens: int | None = None,
    exclude: str | None = None,
    tokenizer_characters: int = 20_000_000,
    seed: int = 0,
) -> tuple[PreTrainedTokenizerFast, np.ndarray]:
    """Makes, or takes from the cache, the tokenizer and the training tokens.

    Args:
        books: folder of `.txt` books; may be `None` when `output` is filled already.
        output: cache folder; receives `tokenizer/`, `tokens.npy` and `data.json` (what they were made from).
        vocab_size: see `train_book_tokenizer`.
        max_tokens: see `encode_books`.
        exclude: see `list_books`.
        tokenizer_characters: characters of book text that the tokenizer is trained on.
        seed: fixes the sample for the tokenizer and the order of the books.

    Returns:
        The tokenizer and the ids as a read-only memory map, `uint16[tokens]`.

    Raises:
        FileNotFoundError: nothing cached and no books given.
        ValueError: the cache was made with another vocabulary size.
    """
    output = Path(output)
    tokens_path, record_path = output / "tokens.npy", output / "data.json"
    if not record_path.exists():
        if books is None:
            raise FileNotFoundError(f"{output!s} holds no prepared tokens: give a folder of .txt books")
        paths = list_books(books, exclude)
        tokenizer = train_book_tokenizer(
            tqdm(sample_texts(paths, tokenizer_characters, seed), desc="training tokenizer", total=len(paths)), vocab_size
        )
        tokens = encode_books(paths, tokenizer, max_tokens, seed)
        output.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(output / "tokenizer")
        _save_array(tokens_path, tokens)
        record = {
            "books": len(paths),
            "books_encoded": int((tokens == tokenizer.eos_token_id).sum()),
            "excluded": exclude,
            "seed": seed,
            "tokens": len(tokens),
            "vocab_size": vocab_size,
        }
        write_json(record_path, record)
    record = json.loads(record_path.read_text())
    if record["vocab_size"] != vocab_size:
        raise ValueError(
            f"{output!s} was prepared with {record['vocab_size']} tokens, not {vocab_size}: "
            "remove that folder or give another one"
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(output / "tokenizer")
    return tokenizer, np.load(tokens_path, mmap_mode="r")


def write_json(path: Path, content: object) -> None:
    """Writes JSON under a temporary name and renames it, so that a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def _save_array(path: Path, array: np.ndarray) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        np.save(file, array)
    os.replace(temporary, path)
