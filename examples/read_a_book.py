# SPDX-License-Identifier: Apache-2.0
"""Reads a whole novel on the CPU and answers a question about one sentence near its beginning.

    python examples/read_a_book.py

A sentence with a number is planted early in Jane Austen's *Persuasion*; the small checkpoint in model_cards/ reads the
book twice, the second time with the window compressed to a few vectors, and is asked for the number. Then it answers
once more as plain Mamba, without compression. A picture shows what was kept of the book.
"""

import argparse
import re
from pathlib import Path

import torch
from transformers import TextStreamer

from remamba_hf.reading import Reading, load_for_reading, plot_kept, prefill_bar, read_and_answer

ROOT = Path(__file__).parent.parent


def plant(book: str, sentence: str, depth: float) -> str:
    """The book with the sentence as a line of its own, at the first end of a paragraph behind `depth` (0 to 1)."""
    paragraph_end = re.compile(r"\n\s*\n").search(book, int(depth * len(book)))
    place = len(book) if paragraph_end is None else paragraph_end.start() + 1
    return f"{book[:place]}{sentence}\n{book[place:]}"


def answer(arguments: argparse.Namespace, model, tokenizer, book: str, compress: bool) -> Reading:
    """One reading, with a progress bar, and the answer streamed."""
    with prefill_bar("reading, compressed" if compress else "reading, plain") as progress:
        return read_and_answer(
            model,
            tokenizer,
            book,
            arguments.question,
            max_new_tokens=arguments.max_new_tokens,
            do_sample=False,
            compress_prompt=None if compress else False,
            prefill_chunk_length=arguments.prefill_chunk_length,
            prefill_progress=progress,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "model_cards" / "remamba-tiny"), help="checkpoint folder or Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--book", type=Path, default=ROOT / "examples" / "books" / "persuasion.txt")
    parser.add_argument("--sentence", default="The secret number of Harold Marsh is 48213.")
    parser.add_argument("--question", default="What is the secret number of Harold Marsh?")
    parser.add_argument("--depth", type=float, default=0.05, help="where the sentence is planted, 0 to 1")
    parser.add_argument("--max-new-tokens", type=int, default=12)
    parser.add_argument("--prefill-chunk-length", type=int, default=4096)
    parser.add_argument("--picture", type=Path, default=Path("what_was_kept.png"))
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model, tokenizer = load_for_reading(arguments.model, arguments.revision)
    book = plant(arguments.book.read_text(encoding="utf-8"), arguments.sentence, arguments.depth)
    print(f"planted   {arguments.sentence}\nasked     {arguments.question}\nReMamba ", end=" ", flush=True)
    compressed = answer(arguments, model, tokenizer, book, compress=True)
    print(compressed.report())
    print("\nplain   ", end=" ", flush=True)
    plain = answer(arguments, model, tokenizer, book, compress=False)
    print(plain.report())
    if compressed.positions:
        plot_kept(compressed, arguments.picture)
        print(f"\n{arguments.picture}: what was kept of the book")


if __name__ == "__main__":
    main()
