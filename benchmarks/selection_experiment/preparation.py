# SPDX-License-Identifier: Apache-2.0
"""From books, instructions and questions to the folder `data` of a run: all that later steps read, so that a machine that
trains needs nothing else.

    tokenizer/, tokens.npy, data.json     of the books (`prepare_books`)
    held_out/*.txt                        books for the evaluation
    lines/2048_tokens.jsonl, ...          records of lines, in LongEval's form, if lines are trained
    longeval/*.jsonl                      LongEval's own files, if they are given
    instructions/tokens.npy, bounds.npy   of fine-tuning, if they are given
    questions/questions.jsonl             held-out prompts with responses, if they are given
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from remamba_hf.training.book_tokens import list_books, prepare_books, read_book, write_json

from .line_data import LineSampler
from .recipe import Recipe

LINE_SEED = 1_000_000  # of the evaluation; training has other seeds
PREPARED = "prepared.json"  # written last
MOST_LONGEVAL_CHARACTERS = 20_000  # of a prompt: about 9k tokens of a book tokenizer, which has few tokens for such lines


def prepare(
    recipe: Recipe,
    data: Path,
    books: Path,
    held_out: Path | None,
    exclude: str | None = None,
    instructions: Sequence[Path] = (),
    questions: Path | None = None,
    longeval: Path | None = None,
) -> dict[str, Any]:
    """Fills the folder, if it is not.

    Args:
        data: the folder.
        books: folder of .txt books to train on.
        held_out: folder of .txt books for the evaluation; None: the last fifth of every book of `books`, which the training
            then does not see.
        exclude: expression of books to leave out of the training, see `list_books`.
        instructions: files or folders of pairs of a prompt and a response, of any form that `instruction_data` reads.
        questions: likewise, held-out ones.
        longeval: folder with LongEval's files.

    Returns:
        What it was made from.
    """
    if (data / PREPARED).is_file():
        return json.loads((data / PREPARED).read_text())
    data.mkdir(parents=True, exist_ok=True)
    if held_out is None:
        books = _split(books, data)
    else:
        _copy(list_books(held_out), data / "held_out")
    tokenizer, tokens = prepare_books(books, data, recipe.vocab_size, recipe.max_tokens, exclude)
    record: dict[str, Any] = {
        "tokens": len(tokens),
        "held_out_books": len(list((data / "held_out").glob("*.txt"))),
        "instructions": _write_instructions(recipe, tokenizer, instructions, data / "instructions"),
        "questions": _write_questions(recipe, questions, data / "questions"),
        "longeval": _copy_longeval(longeval, data / "longeval"),
    }
    if recipe.line_share:
        write_lines(recipe, tokenizer, data / "lines")
    write_json(data / PREPARED, record)
    return record


def tokenizer_and_tokens(data: Path) -> tuple[PreTrainedTokenizerFast, np.ndarray]:
    """Of a filled folder; raises a FileNotFoundError for another."""
    if not (data / PREPARED).is_file():
        raise FileNotFoundError(f"{data} is not filled: run the step prepare first")
    return PreTrainedTokenizerFast.from_pretrained(data / "tokenizer"), np.load(data / "tokens.npy", mmap_mode="r")


def write_lines(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Records of lines of every length of the evaluation, the asked ones spread evenly."""
    folder.mkdir(parents=True, exist_ok=True)
    sampler, samples = LineSampler(tokenizer, LINE_SEED), recipe.evaluation.samples
    for length in recipe.evaluation.lengths:
        records = [
            sampler.record((length, number), length, (number + 0.5) / samples, tokenizer.decode) for number in range(samples)
        ]
        write_text(folder / f"{length}_tokens.jsonl", "".join(json.dumps(record) + "\n" for record in records))


def write_text(path: Path, text: str) -> None:
    """Under a temporary name first."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _split(books: Path, data: Path) -> Path:
    """The first four fifths of every book to train on, the rest held out."""
    for path in list_books(books):
        text = read_book(path)
        cut = text.rfind("\n\n", 0, len(text) * 4 // 5) + 2
        for part, name in ((text[:cut], "training"), (text[cut:], "held_out")):
            (data / name).mkdir(exist_ok=True)
            write_text(data / name / path.name, part)
    return data / "training"


def _copy(files: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)


def _copy_longeval(source: Path | None, folder: Path) -> list[str]:
    """Those of LongEval's files whose prompts are of the lengths evaluated."""
    if source is None:
        return []
    files = []
    for file in sorted(source.rglob("*_lines.jsonl")):
        with file.open(encoding="utf-8") as lines:
            if len(json.loads(next(lines))["prompt"]) <= MOST_LONGEVAL_CHARACTERS:
                files.append(file)
    if not files:
        raise FileNotFoundError(
            f"{source} has no *_lines.jsonl with prompts of at most {MOST_LONGEVAL_CHARACTERS} characters"
        )
    _copy(files, folder)
    return [file.name for file in files]


def _write_instructions(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, sources: Sequence[Path], folder: Path
) -> dict[str, int]:
    """Token ids of all pairs whose prompts fill a row of fine-tuning; the number of pairs by source."""
    if not sources:
        return {}
    from remamba_hf.training.instruction_data import LengthRule, list_files, read_pairs, tokenize_batch

    lengths = [length for phase in recipe.tuning.phases for length in phase.level.prompt_lengths]
    rule = LengthRule(max_tokens=2 * max(lengths))
    pieces: list[np.ndarray] = []
    bounds: list[tuple[int, int, int]] = []
    counts: dict[str, int] = {}
    position = 0
    for file in [file for source in sources for file in list_files(source)]:
        counts[file.name] = 0
        for pair in tqdm(read_pairs(file, skip_empty=True, streaming=True), desc=file.name, unit="pair"):
            rows = tokenize_batch({name: [text] for name, text in pair.items()}, tokenizer, rule)
            for prompt, response in zip(rows["prompt_ids"], rows["response_ids"], strict=True):
                if len(prompt) >= min(lengths):
                    bounds.append((position, position + len(prompt), position + len(prompt) + len(response)))
                    pieces += [np.asarray(prompt, np.uint16), np.asarray(response, np.uint16)]
                    position = bounds[-1][2]
                    counts[file.name] += 1
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "tokens.npy", np.concatenate(pieces))
    np.save(folder / "bounds.npy", np.array(bounds, dtype=np.int64))
    return counts


def _write_questions(recipe: Recipe, source: Path | None, folder: Path) -> int:
    """Some held-out pairs, evenly over all that there are; their number."""
    if source is None:
        return 0
    from remamba_hf.training.instruction_data import read_pairs

    pairs = list(read_pairs(source, skip_empty=True, streaming=True))
    count = min(recipe.evaluation.question_samples, len(pairs))
    chosen = [pairs[number * len(pairs) // count] for number in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": pair["prompt"], "response": pair["response"]}) + "\n" for pair in chosen]
    write_text(folder / "questions.jsonl", "".join(lines))
    return count
