# SPDX-License-Identifier: Apache-2.0
"""What `remamba_hf.evaluation.memory` measures: answers about long texts, losses by length of context, cost of decoding.

This package's models read a text once, in chunks that bound memory, and every question is put to a copy of the state behind
its text. Any other model gets the text anew with every question, whole: slower, with the same answers.
"""

import contextlib
import inspect
import math
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from remamba_hf.reading import prefill_bar
from remamba_hf.training.recall_data import RecallText

from .checkpoints import plain_reading, reads_in_chunks
from .prompt_reader import Prompt, Reader
from .reporting import wilson_interval
from .tasks import Sample
from .timing import FEWEST_NEW_TOKENS, measure_generation, state_bytes, without_end
from .timing import cache_bytes as cache_bytes

DECODED = 16  # tokens, where the cost of decoding is measured
MOST_TEXT_TOKENS = 1 << 24  # of all texts that are held at once: their ids take as many bytes, times a few dozen


def rows_at_once(length: int, chunk_length: int, batch_tokens: int) -> int:
    """Rows of `length` tokens whose chunks hold at most `batch_tokens`, and they themselves `MOST_TEXT_TOKENS`; at least
    one."""
    return max(min(batch_tokens // min(length, chunk_length), MOST_TEXT_TOKENS // length), 1)


def repeated(tokens: np.ndarray, length: int) -> np.ndarray:
    """The books for a text of `length` tokens: as they are, or, where they have fewer, over and over, so that a text may
    begin at any of their tokens."""
    return tokens if length <= len(tokens) else np.resize(tokens, length + len(tokens))


@torch.no_grad()
def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[RecallText], chunk_length: int
) -> list[list[str]]:
    """Answers every question about texts, greedily; the state behind a text is copied for each of its questions.

    Args:
        model: of any family; one that compresses prompts reads them plainly. Any other causal language model: it reads
            whole prompts, as many at once as there are texts.
        texts: of equally many questions.
        chunk_length: tokens of a row that are read at once.

    Returns:
        The answers up to the end-of-text token, without white space around them, by text and question.
    """
    keys = len(texts[0].asked)
    new_tokens = max(len(fact.answer_ids) for text in texts for fact in text.asked)
    if reads_in_chunks(model):
        answers = _ask_copies(model, tokenizer, texts, chunk_length, new_tokens)
    else:
        prompts = [text.prompt_ids(key) for text in texts for key in range(keys)]
        answers = answer_whole(model, tokenizer, prompts, new_tokens, len(texts))
    return [answers[first : first + keys] for first in range(0, len(answers), keys)]


def _ask_copies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[RecallText],
    chunk_length: int,
    new_tokens: int,
) -> list[str]:
    shared = min(len(text.text_ids) for text in texts)
    questions = [
        np.concatenate([text.text_ids[shared:], fact.question_ids]) for text in texts for fact in text.asked
    ]  # what is left of longer texts is read with their questions, so that only these need pads
    options = {**plain_reading(model), "use_cache": True, "logits_to_keep": 1}
    ids = torch.from_numpy(np.stack([text.text_ids[:shared] for text in texts])).to(model.device)
    with prefill_bar("reading") if shared > chunk_length else contextlib.nullcontext() as progress:
        cache = model(ids, prefill_chunk_length=chunk_length, prefill_progress=progress, **options).cache_params
    copies = torch.arange(len(texts), device=model.device).repeat_interleave(len(texts[0].asked))
    cache.reorder_cache(copies)
    ids, mask = _left_padded(questions, int(tokenizer.pad_token_id), model.device)
    logits = model(ids, attention_mask=mask, cache_params=cache, prefill_chunk_length=chunk_length, **options).logits
    answer = [logits[:, -1].argmax(-1, keepdim=True)]
    for _ in range(new_tokens - 1):
        logits = model(answer[-1], cache_params=cache, **options).logits
        answer.append(logits[:, -1].argmax(-1, keepdim=True))
    return [_decoded(tokenizer, row) for row in torch.cat(answer, dim=1).tolist()]


def answer_whole(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    new_tokens: int,
    rows: int,
) -> list[str]:
    """Greedy answers of a model of another package to whole prompts, without white space around them.

    Args:
        prompts: ids of each.
        new_tokens: of an answer, at most.
        rows: prompts read at once, where the model can tell padding from text.
    """
    reader = Reader(model, tokenizer, {})
    rows = rows if reader.reads_mask else 1
    asked = [Prompt(Sample(str(number), "", new_tokens), ids.tolist(), len(ids)) for number, ids in enumerate(prompts)]
    batches = (asked[first : first + rows] for first in range(0, len(asked), rows))
    return [record["answer"].strip() for batch in batches for record in reader.answer(batch)]


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    end = tokenizer.eos_token_id
    return str(tokenizer.decode(ids[: ids.index(end)] if end in ids else ids, skip_special_tokens=True)).strip()


def _left_padded(rows: Sequence[np.ndarray], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as `[rows, longest]` on `device`, and their mask: their last tokens stand in the last column."""
    longest = max(map(len, rows))
    ids = np.full((len(rows), longest), pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = row
        mask[index, longest - len(row) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def recall_records(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    make_text: Callable[[int], RecallText],
    numbers: Sequence[int],
    chunk_length: int,
) -> list[dict[str, Any]]:
    """Makes the texts of these numbers and asks them together.

    Returns:
        One record per question: `sample`, `depth` (0 to 1), `right`, `number`, `answer`, and `other`: the answer is the
        number of somebody else in the text.
    """
    texts = [make_text(number) for number in numbers]
    answers = ask(model, tokenizer, texts, chunk_length)
    return [record for place in zip(numbers, texts, answers, strict=True) for record in _records(*place)]


def number_of(answer: str) -> str:
    """The digits that an answer begins with: models that were not trained to stop behind them go on."""
    found = re.match("[0-9]*", answer)
    return found[0] if found else ""


def _records(sample: int, text: RecallText, answers: Sequence[str]) -> list[dict[str, Any]]:
    numbers = {*text.other_numbers, *(fact.number for fact in text.asked)}
    return [
        {
            "sample": sample,
            "depth": round(fact.depth, 4),
            "right": number_of(answer) == fact.number,
            "number": fact.number,
            "answer": answer,
            "other": number_of(answer) in numbers - {fact.number},
        }
        for fact, answer in zip(text.asked, answers, strict=True)
    ]


def summarize_records(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts, accuracy with its 95 % interval, and how many answers were somebody else's number.

    The interval takes questions as independent, which several about one text are not quite.
    """
    right = sum(record["right"] for record in records)
    return {
        "samples": len(records),
        "right": right,
        "accuracy": right / len(records),
        "interval": wilson_interval(right, len(records)),
        "other": sum(record["other"] for record in records),
    }


def window_ends(book_length: int, longest: int, windows: int) -> list[int]:
    """Where windows of at most `longest` tokens end in a book: in the middles of equal parts of the places possible, so that
    none is the book's very end, which is often no text."""
    return [int(longest + (book_length - longest) * (number + 0.5) / windows) for number in range(windows)]


def strided_ends(book_length: int, longest: int, stride: int, windows: int) -> list[int]:
    """Where windows of at most `longest` tokens end that follow one another every `stride` tokens. With the last `stride`
    tokens of each counted, every token from `longest` - `stride` on counts once, whatever the windows' length.

    Args:
        windows: at most; 0 for all that the book has room for.
    """
    ends = list(range(longest, book_length + 1, stride))
    return ends[:windows] if windows else ends


@torch.no_grad()
def last_logits(model: PreTrainedModel, ids: torch.Tensor, count: int, chunk_length: int) -> torch.Tensor:
    """Logits [B, count, V] of the last positions of texts [B, L] long.

    Args:
        chunk_length: tokens of a row that this package's models read at once; others read whole texts.
    """
    if reads_in_chunks(model):
        options: dict[str, Any] = {"prefill_chunk_length": chunk_length, **plain_reading(model)}
    else:
        options = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = count
    return model(ids, use_cache=False, **options).logits[:, -count:]


def window_losses(
    model: PreTrainedModel, windows: Sequence[tuple[np.ndarray, int]], length: int, counted: int, chunk_length: int
) -> list[float]:
    """Mean cross-entropy of the last `counted` tokens of windows of `length` tokens (arXiv 2510.03279, section 4), which are
    read together.

    Args:
        windows: of each the token ids of its book, and where it ends.
        chunk_length: see `last_logits`.

    Returns:
        Nats per token, by window.
    """
    pieces = [np.asarray(book[end - length : end], dtype=np.int64) for book, end in windows]
    ids = torch.from_numpy(np.stack(pieces)).to(model.device)
    logits = last_logits(model, ids, counted + 1, chunk_length)
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2).float(), ids[:, -counted:], reduction="none")
    return losses.mean(1).tolist()


def summarize_losses(losses: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Perplexity over all windows (None where it is not finite) and the mean loss of every book."""
    every = [loss for book in losses for loss in book]
    mean = sum(every) / len(every)
    return {
        "windows": len(every),
        "perplexity": math.exp(mean) if mean < 700 else None,  # neither of infinite losses nor of NaN
        "book_losses": [value if math.isfinite(value) else None for value in (sum(book) / len(book) for book in losses)],
    }


def perplexity_ratio(entry: dict[str, Any], reference: dict[str, Any]) -> tuple[float, tuple[float, float] | None] | None:
    """How many times the perplexity of `reference` one is, and the 95 % interval of that.

    The windows of both end at the same places, so each book gives one difference of losses; the interval takes the books
    as independent. None where a loss is not finite; no interval for one book.
    """
    pairs = list(zip(entry["book_losses"], reference["book_losses"], strict=True))
    if any(loss is None for pair in pairs for loss in pair):
        return None
    differences = [one - other for one, other in pairs]
    middle = statistics.fmean(differences)
    if middle > 700:  # no float holds its exponential
        return None
    if len(differences) < 2:
        return math.exp(middle), None
    half = 1.96 * statistics.stdev(differences) / math.sqrt(len(differences))
    return math.exp(middle), (math.exp(middle - half), math.exp(min(middle + half, 700)))


def decoding_cost(
    model: PreTrainedModel, tokens: np.ndarray, length: int, chunk_length: int, steps: int = DECODED, repeats: int = 5
) -> dict[str, Any]:
    """What one row costs to decode behind a text of `length` tokens (books shorter than that are repeated).

    Returns:
        `state_bytes` behind the text and `state_bytes_after` behind what was decoded; `seconds_per_token`, the median of
        `repeats` means over `steps` steps, with the least and the largest in `seconds_range`; `peak_bytes`, with weights:
        allocated on a GPU, elsewhere of the whole process.
    """
    ids = torch.from_numpy(np.resize(np.asarray(tokens), length).astype(np.int64))[None].to(model.device)
    options = {**plain_reading(model), **({"prefill_chunk_length": chunk_length} if reads_in_chunks(model) else {})}
    own, model = model.generation_config, without_end(model)
    try:
        cost = measure_generation(model, ids, FEWEST_NEW_TOKENS - 1 + steps, repeats, options)
        before = state_bytes(model, ids, 1, options)
    finally:
        model.generation_config = own
    return {
        "state_bytes": before,
        "state_bytes_after": cost["state_bytes"],
        "seconds_per_token": cost["step_s"],
        "seconds_range": cost["step_range_s"],
        "peak_bytes": cost["peak_bytes"],
    }
